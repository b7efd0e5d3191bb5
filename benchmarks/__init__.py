"""Benchmarks of the layer and the networks; installed as ``awnet.benchmarks``."""

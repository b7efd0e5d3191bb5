"""Seeded faults in the kernels, each of which some test must catch: ``make mutations``."""

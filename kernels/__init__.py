"""Triton kernels of the layer's passes; installed as ``awnet.kernels``."""

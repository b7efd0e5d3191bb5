"""The implementations of the layer: one module for each backend."""

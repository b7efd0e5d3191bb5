"""Benchmarks of the layer; installed as ``awnet.benchmarks``.

``awnet bench run`` calls :func:`run`. ``cases`` is what is measured, ``providers`` who computes it, and
``runner`` verifies, times and records.
"""

from .runner import BenchOptions, run

__all__ = ["BenchOptions", "run"]

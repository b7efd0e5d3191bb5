"""Benchmarks; installed as ``awnet.benchmarks``.

``awnet bench run`` calls :func:`run`. ``cases`` is what is measured, ``providers`` who computes it,
``timing`` how long it takes, ``ceilings`` what the device can do, ``runner`` verifies, times and records,
``results`` reads and writes the CSV files, ``goals`` judges them, ``report`` makes tables and figures.
"""

from .runner import BenchOptions, run

__all__ = ["BenchOptions", "run"]

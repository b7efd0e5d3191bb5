"""Benchmarks; installed as ``awnet.benchmarks``.

``awnet bench run`` calls :func:`run`. ``options`` holds its options, ``cases`` the layers and networks,
``providers`` the implementations, ``verification`` the check of their results, ``timing`` the clock,
``interference`` what disturbed it, ``ceilings`` the limits of the device, ``machine`` its description,
``runner`` the run itself, ``results`` the CSV files, ``goals`` the goals, ``report`` tables and figures.
``train`` and ``plain`` are ``awnet bench train``, ``tune`` is ``awnet bench tune``.
"""

from .runner import BenchOptions, run

__all__ = ["BenchOptions", "run"]

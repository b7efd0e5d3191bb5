"""Robust accuracy at every eps, from the smallest perturbations that a minimum-norm attack found."""

from __future__ import annotations

from typing import Any

import numpy as np

from awnet.evaluation.results import Array
from awnet.evaluation.statistics import wilson_interval

POINTS = 64


def accuracy_curve(distances: Array, eps: float, norm: str) -> dict[str, Any]:
    """The robust accuracy as a function of eps, JSON-ready.

    An image counts as robust at eps if its smallest perturbation is larger. Like the robust accuracy under
    any attack, this is an upper bound on the true one.

    Args:
        distances: size of each image's smallest perturbation ``[n]``; 0 for an image that is misclassified
            without one, infinity where none was found.
        eps: the threat model's, which is one of the points.

    Returns:
        ``norm``; ``eps``, ``accuracy``, ``low`` and ``high`` (Wilson's 95 % interval), each of about 64
        points from 0 to twice ``eps`` or beyond the 99 % quantile; ``median``: the median distance of the
        images that are classified correctly without an attack, None if it is infinite or there are none; and
        ``not_found``: the number of images for which no perturbation was found.
    """
    values = np.sort(np.asarray(distances, np.float64))
    n, finite, attacked = len(values), values[np.isfinite(values)], values[values > 0]
    end = max(2 * eps, 1.05 * float(np.quantile(finite, 0.99)) if len(finite) else 0.0)
    sizes = np.union1d(np.linspace(0.0, end, POINTS), [eps])
    counts = n - np.searchsorted(values, sizes, side="right")
    intervals = [wilson_interval(int(count), n) for count in counts]
    median = float(np.median(attacked)) if len(attacked) else np.inf
    return {
        "norm": norm,
        "eps": sizes.tolist(),
        "accuracy": (counts / n).tolist(),
        "low": [low for low, _ in intervals],
        "high": [high for _, high in intervals],
        "median": median if np.isfinite(median) else None,
        "not_found": int(np.isinf(values).sum()),
    }

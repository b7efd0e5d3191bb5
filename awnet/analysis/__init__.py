"""Figures from arrays, and measurements of modules."""

from awnet.analysis.figures import (
    filter_means,
    p_clean_histogram,
    training_curves,
    w_robust_bars,
    weight_gap_curves,
)
from awnet.analysis.weight_gap import WeightGap, weight_gaps

__all__ = [
    "WeightGap",
    "filter_means",
    "p_clean_histogram",
    "training_curves",
    "w_robust_bars",
    "weight_gap_curves",
    "weight_gaps",
]

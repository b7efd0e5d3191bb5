"""Figures drawn from arrays, and measurements of modules."""

from awnet.analysis.figures import (
    accuracy_against_eps,
    example_images,
    p_clean_histogram,
    paired_differences,
    roc_curves,
    sanity_curves,
    w_robust_bars,
    waterfall,
)
from awnet.analysis.filter_figures import filter_means, weight_gap_curves
from awnet.analysis.training_figures import compared_curves, differences_by_training, training_curves
from awnet.analysis.weight_gap import WeightGap, weight_gaps

__all__ = [
    "WeightGap",
    "accuracy_against_eps",
    "compared_curves",
    "differences_by_training",
    "example_images",
    "filter_means",
    "p_clean_histogram",
    "paired_differences",
    "roc_curves",
    "sanity_curves",
    "training_curves",
    "w_robust_bars",
    "waterfall",
    "weight_gap_curves",
    "weight_gaps",
]

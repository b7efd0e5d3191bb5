"""Figures from arrays."""

from awnet.analysis.figures import filter_means, p_clean_histogram, training_curves, w_robust_bars

__all__ = ["filter_means", "p_clean_histogram", "training_curves", "w_robust_bars"]

"""Whole experiments: each trains, attacks, compares and prints."""

from awnet.reproduce.digits import DigitsResult, run_digits

__all__ = ["DigitsResult", "run_digits"]

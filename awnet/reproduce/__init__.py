"""Whole experiments: each trains, attacks, compares and prints."""

from awnet.evaluation.paper import PaperRow, paper_rows
from awnet.reproduce.digits import DigitsResult, run_digits
from awnet.reproduce.experiments import BUDGETS, EXPERIMENTS
from awnet.reproduce.seeds import SeedsResult, Spread, run_digits_seeds
from awnet.reproduce.tables import Line, Outcome, reproduce

__all__ = [
    "BUDGETS",
    "EXPERIMENTS",
    "DigitsResult",
    "Line",
    "Outcome",
    "PaperRow",
    "SeedsResult",
    "Spread",
    "paper_rows",
    "reproduce",
    "run_digits",
    "run_digits_seeds",
]

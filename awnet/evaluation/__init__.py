"""How accurate and how robust a model is, with intervals, paired comparison, a report and figures."""

from awnet.evaluation.detection import auc_interval, detection, roc_curve
from awnet.evaluation.measure import accuracy, evaluate, robust_correct
from awnet.evaluation.report import AttackDifference, AttackResult, Comparison, Report, compare
from awnet.evaluation.sanity import Check, sanity_table
from awnet.evaluation.statistics import (
    auc,
    bootstrap_interval,
    mcnemar,
    t_interval,
    w_robust_accuracy,
    wilson_interval,
)
from awnet.evaluation.table import comparison_table, w_robust_table

__all__ = [
    "AttackDifference",
    "AttackResult",
    "Check",
    "Comparison",
    "Report",
    "accuracy",
    "auc",
    "auc_interval",
    "bootstrap_interval",
    "compare",
    "comparison_table",
    "detection",
    "evaluate",
    "mcnemar",
    "robust_correct",
    "roc_curve",
    "sanity_table",
    "t_interval",
    "w_robust_accuracy",
    "w_robust_table",
    "wilson_interval",
]

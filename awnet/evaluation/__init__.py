"""How accurate and how robust a model is, with intervals, paired comparison, a report and figures."""

from awnet.evaluation.measure import accuracy, evaluate, robust_correct
from awnet.evaluation.report import AttackDifference, AttackResult, Comparison, Report, compare
from awnet.evaluation.statistics import auc, bootstrap_interval, mcnemar, w_robust_accuracy, wilson_interval
from awnet.evaluation.table import comparison_table, w_robust_table

__all__ = [
    "AttackDifference",
    "AttackResult",
    "Comparison",
    "Report",
    "accuracy",
    "auc",
    "bootstrap_interval",
    "compare",
    "comparison_table",
    "evaluate",
    "mcnemar",
    "robust_correct",
    "w_robust_accuracy",
    "w_robust_table",
    "wilson_interval",
]

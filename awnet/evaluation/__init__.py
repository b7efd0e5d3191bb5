"""Evaluates how accurate and how robust a model is: intervals, paired comparison, report and figures.

``evaluate`` is the entry point. ``collect`` runs the model batch by batch, ``resume`` stores the state of an
interrupted evaluation, ``summarize`` turns outcomes into a report. ``results`` defines the report's content
and ``report`` its files, which ``store`` writes with checksums; ``tables``, ``figures`` and ``html`` render
it.
"""

from awnet.evaluation.compare import compare
from awnet.evaluation.detection import auc_interval, detection, roc_curve
from awnet.evaluation.evaluate import accuracy, evaluate, robust_correct
from awnet.evaluation.norms import evaluate_norms
from awnet.evaluation.parts import gated_parts
from awnet.evaluation.report import Report
from awnet.evaluation.results import AttackDifference, AttackResult, Comparison, Results
from awnet.evaluation.sanity import Check, sanity_table
from awnet.evaluation.statistics import (
    auc,
    bootstrap_interval,
    mcnemar,
    t_interval,
    w_robust_accuracy,
    welch_interval,
    wilson_interval,
)
from awnet.evaluation.tables import comparison_table, parts_table, w_robust_table

__all__ = [
    "AttackDifference",
    "AttackResult",
    "Check",
    "Comparison",
    "Report",
    "Results",
    "accuracy",
    "auc",
    "auc_interval",
    "bootstrap_interval",
    "compare",
    "comparison_table",
    "detection",
    "evaluate",
    "evaluate_norms",
    "gated_parts",
    "mcnemar",
    "parts_table",
    "robust_correct",
    "roc_curve",
    "sanity_table",
    "t_interval",
    "w_robust_accuracy",
    "w_robust_table",
    "welch_interval",
    "wilson_interval",
]

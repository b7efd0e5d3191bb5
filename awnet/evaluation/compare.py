"""Compares the results of two models, paired by image."""

from __future__ import annotations

import numpy as np

from awnet.evaluation.comparable import differences_of
from awnet.evaluation.results import AttackDifference, Comparison, Results
from awnet.evaluation.statistics import bootstrap_interval, mcnemar


def compare(this: Results, other: Results, seed: int = 0) -> Comparison:
    """``this`` minus ``other``, paired by image, for the attacks that both were evaluated with.

    Raises ValueError unless both used the same images, ε and precision, and the same settings for each shared
    attack, apart from those that follow from the model.
    """
    for report in (this, other):
        if not report.per_sample:
            raise ValueError(
                f"the report of {report.model} holds no per-sample outcomes, which pairing needs"
            )
    reasons = differences_of(this, other, seeds=True)
    if reasons:
        raise ValueError(f"{this.model} and {other.model} cannot be compared: {'; '.join(reasons)}")
    attacks = {}
    results, other_results = this.results(), other.results()
    for name in (name for name in results if name in other_results):
        theirs = other_results[name]
        differences = this.w_values(name) - other.w_values(name)
        attacks[name] = AttackDifference(
            robust_accuracy=theirs.robust_accuracy,
            w_robust_accuracy=theirs.w_robust_accuracy,
            w_interval_95=theirs.w_interval_95,
            difference=float(differences.mean()),
            interval_95=bootstrap_interval(differences, seed=seed),
            mcnemar_p=mcnemar(this.per_sample[f"{name}_correct"], other.per_sample[f"{name}_correct"]),
        )
    correct, other_correct = this.per_sample["clean_correct"], other.per_sample["clean_correct"]
    differences = correct.astype(np.float64) - other_correct.astype(np.float64)
    return Comparison(
        model=other.model,
        clean_accuracy=other.clean_accuracy,
        clean_difference=float(differences.mean()),
        clean_interval_95=bootstrap_interval(differences, seed=seed),
        clean_mcnemar_p=mcnemar(correct, other_correct),
        attacks=attacks,
    )

"""Compares the results of two models, paired by image."""

from __future__ import annotations

import numpy as np

from awnet.evaluation.results import AttackDifference, Comparison, Results
from awnet.evaluation.statistics import bootstrap_interval, mcnemar


def compare(this: Results, other: Results, seed: int = 0) -> Comparison:
    """``this`` minus ``other``, paired by image, for the attacks that both were evaluated with.

    Raises ValueError unless both used the same images, and the same settings for each shared attack.
    """
    for report in (this, other):
        if not report.per_sample:
            raise ValueError(
                f"the report of {report.model} holds no per-sample outcomes, which pairing needs"
            )
    for name in ("index", "label"):
        same = np.array_equal(this.per_sample[name], other.per_sample[name])
        if not same or (this.dataset, this.split) != (other.dataset, other.split):
            raise ValueError(
                f"{this.model} and {other.model} were not evaluated on the same images: "
                f"{this.n} of {this.dataset} {this.split} and {other.n} of {other.dataset} {other.split}; "
                "evaluate both with the same images"
            )
    if this.approximate != other.approximate:
        raise ValueError(
            f"{this.model} and {other.model} were evaluated in different precisions: evaluate both in float32"
        )
    attacks = {}
    results, other_results = this.results(), other.results()
    for name in (name for name in results if name in other_results):
        theirs = other_results[name]
        # the union has the attacks that apply to a model, and starts from its own router's mean ω
        if name != "union" and results[name].settings != theirs.settings:
            raise ValueError(
                f"{this.model} and {other.model} were evaluated under {name} with different settings, "
                f"{results[name].settings} and {theirs.settings}: evaluate both with the same settings"
            )
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

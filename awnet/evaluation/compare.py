"""Compares the results of two models, paired by image, if they can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from awnet.data.dataset import Dataset
from awnet.evaluation.results import AttackDifference, Comparison, Results
from awnet.evaluation.statistics import bootstrap_interval, mcnemar

# settings of an attack that follow from the attacked model
_OF_THE_MODEL = {"filter_scales", "lambdas", "teacher", "surrogate"}
# members that the union has only for networks with a router, or with teachers or other surrogates
_OF_SOME_MODELS = ("two_phase", "forced", "softened", "adaptive_paper", "transfer_")


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


def check_same_images(dataset: Dataset, report: Results, name: str) -> None:
    """Raises ValueError if ``report``, called ``name``, is of other images or another threat model.

    This is known before the evaluation, the rest of :func:`differences_of` only after it.
    """
    threat_model = dataset.threat_model
    reasons = [
        f"{what} {one} and {two}"
        for what, one, two in (
            ("data set", dataset.name, report.dataset),
            ("split", dataset.split, report.split),
            ("number of images", len(dataset), report.n),
            ("eps", f"{threat_model.eps:.6g}", f"{report.eps:.6g}"),
            ("norm", threat_model.norm, report.norm),
            ("norms", "one", report.norms or "one"),
        )
        if one != two
    ]
    if reasons:
        raise ValueError(f"the evaluation cannot be compared with {name}: {'; '.join(reasons)}")


def differences_of(this: Results, other: Results, *, seeds: bool = False) -> list[str]:
    """Why ``this`` and ``other`` cannot be compared image by image; empty if they can.

    With ``seeds`` the seeds of the attacks must be equal too.
    """
    ignored = _OF_THE_MODEL if seeds else _OF_THE_MODEL | {"seed"}
    reasons = []
    for what, one, two in (
        ("data set", this.dataset, other.dataset),
        ("split", this.split, other.split),
        ("number of images", this.n, other.n),
        ("eps", f"{this.eps:.6g}", f"{other.eps:.6g}"),
        ("norm", this.norm, other.norm),
        ("norms", this.norms or "one", other.norms or "one"),
        ("precision", _precision(this), _precision(other)),
    ):
        if one != two:
            reasons.append(f"{what} {one} and {two}")
    if not reasons and this.per_sample and other.per_sample:
        prints = [report.settings.get("fingerprint") for report in (this, other)]
        same = all(np.array_equal(this.per_sample[n], other.per_sample[n]) for n in ("index", "label"))
        if not same or (None not in prints and prints[0] != prints[1]):
            reasons.append("different images")
    if reasons:  # attacks with another eps differ too
        return reasons
    theirs = other.results()
    for name, result in this.results().items():
        if name in theirs:
            reasons += _setting_differences(name, result.settings, theirs[name].settings, ignored)
    return reasons


def _precision(report: Results) -> str:
    return str(report.settings.get("precision")) if report.approximate else "float32 or wider"


def _setting_differences(name: str, this: Any, other: Any, ignored: set[str]) -> list[str]:
    """Differences between the settings of one attack, apart from those that follow from the model."""
    if isinstance(this, Mapping) and isinstance(other, Mapping):
        if name == "union":
            return _union_differences(this, other, ignored)
        return [
            reason
            for key in dict.fromkeys([*this, *other])
            if key not in ignored
            for reason in _setting_differences(f"{name} {key}", this.get(key), other.get(key), ignored)
        ]
    plain = [list(value) if isinstance(value, tuple) else value for value in (this, other)]
    return [] if plain[0] == plain[1] else [f"{name} {plain[0]} and {plain[1]}"]


def _union_differences(this: Mapping[str, Any], other: Mapping[str, Any], ignored: set[str]) -> list[str]:
    """Members that both unions have must have equal settings; others must depend on the model."""
    names = [{*settings.get("members", {}), *settings.get("after", ())} for settings in (this, other)]
    apart = sorted(name for name in names[0] ^ names[1] if not name.startswith(_OF_SOME_MODELS))
    reasons = [f"only one union includes {', '.join(apart)}"] if apart else []
    members, theirs = this.get("members", {}), other.get("members", {})
    for name in members:
        if name in theirs:
            reasons += _setting_differences(f"union: {name}", members[name], theirs[name], ignored)
    return reasons

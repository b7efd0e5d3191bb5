"""Compares the results of two models, paired by image, if they can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from awnet.data.dataset import Dataset
from awnet.evaluation.results import Array, AttackDifference, Comparison, Results
from awnet.evaluation.statistics import Interval, mcnemar, paired_difference, sign_flip_test

# settings of an attack that follow from the attacked model
_MODEL_SETTINGS = {"filter_scales", "lambdas", "teacher", "surrogate"}
# members that the union has only for networks with a router, or with teachers or other surrogates
_OPTIONAL_MEMBERS = ("two_phase", "forced", "softened", "adaptive_paper", "transfer_")


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

    def difference(quantity: str) -> tuple[float, Interval]:
        return paired_difference(outcomes(this, quantity), outcomes(other, quantity), seed=seed)

    attacks = {}
    results, other_results = this.results(), other.results()
    for name in (name for name in results if name in other_results):
        w_difference, w_interval = difference(f"{name} A_w")
        attacks[name] = AttackDifference(
            robust_accuracy=other_results[name].robust_accuracy,
            w_robust_accuracy=other_results[name].w_robust_accuracy,
            w_interval_95=other_results[name].w_interval_95,
            difference=w_difference,
            interval_95=w_interval,
            mcnemar_p=p_value(this, other, name),
        )
    clean_difference, clean_interval = difference("clean")
    return Comparison(
        model=other.model,
        clean_accuracy=other.clean_accuracy,
        clean_difference=clean_difference,
        clean_interval_95=clean_interval,
        clean_mcnemar_p=p_value(this, other, "clean"),
        attacks=attacks,
    )


def outcomes(report: Results, quantity: str) -> Array:
    """The outcome of each image, float64 ``[n]``, whose mean is the quantity.

    ``quantity``: ``clean``, or ``NAME`` (A_adv) or ``NAME A_w`` for an attack.
    """
    name, is_w, _ = quantity.partition(" A_w")
    return report.w_values(name) if is_w else report.per_sample[f"{name}_correct"].astype(np.float64)


def p_value(this: Results, other: Results, quantity: str) -> float:
    """p of no difference in ``quantity``: McNemar's exact test, for A_w the exact sign-flip test."""
    first, second = outcomes(this, quantity), outcomes(other, quantity)
    if quantity.endswith(" A_w"):
        return sign_flip_test(first - second)
    return mcnemar(first > 0.5, second > 0.5)


def check_same_images(dataset: Dataset, report: Results, name: str) -> None:
    """Raises ValueError if ``report``, called ``name``, is of other images or another threat model.

    This is known before the evaluation, the rest of :func:`differences_of` only after it.
    """
    reasons = _unequal(
        {
            "data set": dataset.name,
            "split": dataset.split,
            "number of images": len(dataset),
            "eps": f"{dataset.threat_model.eps:.6g}",
            "norm": dataset.threat_model.norm,
            "norms": "one",
        },
        _images(report),
    )
    if reasons:
        raise ValueError(f"the evaluation cannot be compared with {name}: {'; '.join(reasons)}")


def differences_of(this: Results, other: Results, *, seeds: bool = False) -> list[str]:
    """Why ``this`` and ``other`` cannot be compared image by image; empty if they can.

    With ``seeds`` the seeds of the attacks must be equal too.
    """
    ignored = _MODEL_SETTINGS if seeds else _MODEL_SETTINGS | {"seed"}
    reasons = _unequal(
        _images(this) | {"precision": _precision(this)}, _images(other) | {"precision": _precision(other)}
    )
    if not reasons and this.per_sample and other.per_sample:
        fingerprints = [report.settings.get("fingerprint") for report in (this, other)]
        same = all(np.array_equal(this.per_sample[n], other.per_sample[n]) for n in ("index", "label"))
        if not same or (None not in fingerprints and fingerprints[0] != fingerprints[1]):
            reasons.append("different images")
    if reasons:  # attacks with another eps differ too
        return reasons
    other_results = other.results()
    for name, result in this.results().items():
        if name in other_results:
            reasons += _setting_differences(name, result.settings, other_results[name].settings, ignored)
    return reasons


def _images(report: Results) -> dict[str, Any]:
    """What a report was measured on; reports can only be compared if these are equal."""
    return {
        "data set": report.dataset,
        "split": report.split,
        "number of images": report.n,
        "eps": f"{report.eps:.6g}",
        "norm": report.norm,
        "norms": report.norms or "one",
    }


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [f"{name} {one[name]} and {other[name]}" for name in one if one[name] != other[name]]


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
    in_one = sorted(name for name in names[0] ^ names[1] if not name.startswith(_OPTIONAL_MEMBERS))
    reasons = [f"only one union includes {', '.join(in_one)}"] if in_one else []
    members, other_members = this.get("members", {}), other.get("members", {})
    for name in members:
        if name in other_members:
            reasons += _setting_differences(f"union: {name}", members[name], other_members[name], ignored)
    return reasons

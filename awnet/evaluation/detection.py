"""How well the type head separates attacks from clean images, with intervals and controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from awnet.evaluation.statistics import LEVEL, Interval, auc

Array = NDArray[Any]

UNIFORM, SIGN = "uniform_noise", "sign_noise"
CONTROLS = (UNIFORM, SIGN)
"""Noise of size eps that is not an attack: uniform in the ball, and of random signs (±eps in L-infinity)."""


class Curve(NamedTuple):
    """A ROC curve: fractions of adversarial and of clean images classified as clean, ``[points]`` each."""

    false_clean: Array
    true_clean: Array


def roc_curve(clean: ArrayLike, adversarial: ArrayLike, points: int = 200) -> Curve:
    """The curve from (0, 0) to (1, 1) as the threshold for "clean" decreases; at most ``points`` points."""
    from sklearn.metrics import roc_curve as curve

    first, second = np.asarray(clean), np.asarray(adversarial)
    kinds = np.concatenate([np.ones(first.size), np.zeros(second.size)])
    false_clean, true_clean, _ = curve(kinds, np.concatenate([first, second]))
    rows = np.unique(np.linspace(0, len(false_clean) - 1, points).round().astype(int))
    return Curve(false_clean[rows], true_clean[rows])


def auc_interval(
    clean: ArrayLike, adversarial: ArrayLike, *, level: float = LEVEL, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of :func:`~awnet.evaluation.statistics.auc`, resampling both samples."""
    sides = [np.asarray(values, dtype=np.float64) for values in (clean, adversarial)]
    distinct = np.unique(np.concatenate(sides))
    shares = [
        np.bincount(np.searchsorted(distinct, side), minlength=distinct.size) / side.size for side in sides
    ]
    generator = np.random.default_rng(seed % 2**64)
    values: list[Array] = []
    chunk = max(1, 2_000_000 // distinct.size)
    for first in range(0, resamples, chunk):
        size = min(chunk, resamples - first)
        high, low = (
            generator.multinomial(side.size, share, size=size) / side.size
            for side, share in zip(sides, shares, strict=True)
        )
        values.append((high * (low.cumsum(1) - low / 2)).sum(1))
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def detection(per_sample: Mapping[str, Array], attacks: list[str], seed: int = 0) -> dict[str, Any]:
    """AUC of the type margin (clean minus adversarial logit) for each attack and each control, JSON-ready.

    For each of ``attacks``: ``auc`` and ``interval_95`` over all its images; ``successful``, the same over
    the images that it broke, with their number ``n`` (left out if there are none); ``rounded``, over all its
    images rounded to the data's levels. For the controls ``auc`` and ``interval_95``.

    Args:
        per_sample: per-sample values of a report: ``<kind>_type_score``, ``<kind>_correct``,
            ``<attack>_rounded_type_score``.
    """
    clean = per_sample["clean_type_score"]

    def with_interval(scores: Array) -> dict[str, Any]:
        return {"auc": auc(clean, scores), "interval_95": list(auc_interval(clean, scores, seed=seed))}

    results: dict[str, Any] = {}
    for name in attacks:
        scores = per_sample[f"{name}_type_score"]
        results[name] = with_interval(scores)
        broken = per_sample["clean_correct"] & ~per_sample[f"{name}_correct"]
        if broken.any():
            results[name]["successful"] = with_interval(scores[broken]) | {"n": int(broken.sum())}
        results[name]["rounded"] = with_interval(per_sample[f"{name}_rounded_type_score"])
    return results | {name: with_interval(per_sample[f"{name}_type_score"]) for name in CONTROLS}


def detection_flags(results: Mapping[str, Any]) -> list[str]:
    """Warnings from the controls about the type head."""
    attacks = {name: value for name, value in results.items() if name not in CONTROLS}
    if not attacks:
        return []
    weakest, strongest = (pick(value["auc"] for value in attacks.values()) for pick in (min, max))
    flags = []
    for name in CONTROLS:
        noise = results[name]["auc"]
        if noise > 0.6 and noise >= weakest:
            flags.append(
                f"the router separates {name.replace('_', ' ')} from clean images (AUC {noise:.3f}) as well "
                f"as attacks (AUC {weakest:.3f} to {strongest:.3f}): it may detect unusual pixels rather "
                "than attacks"
            )
    lost = {
        name: value["rounded"]["auc"]
        for name, value in attacks.items()
        if value["auc"] - value["rounded"]["auc"] > 0.1
    }
    if lost:
        changes = ", ".join(
            f"{name} {attacks[name]['auc']:.3f} to {value:.3f}" for name, value in lost.items()
        )
        flags.append(
            f"rounding adversarial images to the data's levels lowers the router's AUC ({changes}): it may "
            "detect that pixels are not on the grid of levels"
        )
    return flags

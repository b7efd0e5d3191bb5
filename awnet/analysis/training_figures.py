"""Draws training curves, and differences between trainings, into the PNG file ``path``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awnet.analysis.style import ADVERSARIAL, CLEAN, CONTROL, CYCLE, figure_file
from awnet.text import figure_text


def training_curves(records: Sequence[Mapping[str, Any]], path: str | Path, title: str = "Training") -> None:
    """Losses, validation accuracies and, if recorded, the norm of the gradient by epoch.

    Args:
        records: the epochs' records of a run's ``log.jsonl``: ``epoch``, losses (``total``, ``nat``, ``adv``,
            ``type`` and others by name), and fractions named ``…accuracy`` in the epochs with validation.
    """
    if not records:
        raise ValueError("records is empty: no epoch to draw")
    other = {"epoch", "step", "lr", "router_lr", "images_per_second", "seconds", "w_nat", "type_accuracy"}
    other |= {"grad_norm", "skipped_steps"}  # these are not losses
    norms = any("grad_norm" in record for record in records)
    names = list(dict.fromkeys(name for record in records for name in record))
    numeric = [
        n for n in names if n not in other and all(isinstance(r.get(n, 0.0), int | float) for r in records)
    ]
    scores = [name for name in numeric if name.endswith("accuracy")]
    losses = [name for name in numeric if not name.endswith("accuracy")]
    with figure_file(path, 12.0 if norms else 9.0, 3.5) as figure:
        left, right, *further = figure.subplots(1, 3 if norms else 2)
        colors = {"total": "#333333", "nat": CLEAN, "adv": ADVERSARIAL}
        spare = iter(CYCLE[2:] * (1 + len(losses)))
        means = [(left, name, colors.get(name) or next(spare), figure_text(name)) for name in losses]
        for axes, name, color, label in [*means, *((axes, "grad_norm", "#333333", None) for axes in further)]:
            epochs, values = _column(records, name)
            dashes = "-" if name != "type" else (0, (4, 1.5))
            marker = "o" if len(values) == 1 else None  # a line through one point is invisible
            axes.plot(epochs, values, label=label, color=color, marker=marker, ls=dashes)
        _by_epoch(left, f"{figure_text(title)}: loss terms")
        for axes in further:
            _by_epoch(axes, "Norm of the gradient")
        styles = {
            "clean_accuracy": ("clean, $A_{nat}$", CLEAN),
            "w_robust_accuracy": ("W-Robust, $A_w$", "#333333"),
            "robust_accuracy": ("adversarial, $A_{adv}$", ADVERSARIAL),
        }
        for name in sorted(scores, key=lambda n: list(styles).index(n) if n in styles else len(styles)):
            epochs, values = _column(records, name)
            label, color = styles.get(name, (figure_text(name), CONTROL))
            size = 7 if len(values) == 1 else 3
            right.plot(epochs, 100 * values, label=label, color=color, marker="o", ms=size)
        chosen = "w_robust_accuracy" if "w_robust_accuracy" in scores else "clean_accuracy"
        if chosen in scores:
            epochs, values = _column(records, chosen)
            best = len(values) - 1 - int(np.argmax(values[::-1]))  # the later one of equals
            right.plot(epochs[best], 100 * values[best], "o", ms=10, mfc="none", mec="#333333", mew=1.4)
            inside = 0 < best < len(values) - 1 or len(values) == 1
            right.annotate(
                f"best: epoch {epochs[best]:.0f}",
                (epochs[best], 100 * values[best]),
                xytext=(0, -16 if values[best] > 0.15 else 12),  # above a point next to the axis
                textcoords="offset points",
                ha="center" if inside else ("left", "right")[best > 0],
                fontsize=8.5,
                color="#333333",
            )
        _by_epoch(right, "Validation accuracy", "percent", (0, 101))
        for axes, series in ((left, losses), (right, scores)):
            if series:
                axes.legend(loc="best", ncols=2 if len(series) > 3 else 1)
        if len(records) == 1:  # the axis would have ticks at fractions of an epoch
            for axes in (left, right, *further):
                axes.set_xticks([records[0]["epoch"]])


def compared_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, title: str = "Training"
) -> None:
    """Loss and validation accuracies of several runs by epoch, one color per run.

    Args:
        runs: name → the epochs' records of each run's ``log.jsonl``, as for :func:`training_curves`.
    """
    if not any(runs.values()):
        raise ValueError("runs is empty: no epoch to draw")
    with figure_file(path, 9.0, 3.5) as figure:
        left, right = figure.subplots(1, 2)
        styles = {"clean_accuracy": (":", "clean"), "w_robust_accuracy": ("-", "$A_w$")}
        for number, (name, records) in enumerate(runs.items()):
            color, run = CYCLE[number % len(CYCLE)], figure_text(name)
            for axes, key, style, label in (
                (left, "total", "-", run),
                *((right, key, style, f"{run}, {text}") for key, (style, text) in styles.items()),
            ):
                if any(key in record for record in records):
                    epochs, values = _column(records, key)
                    factor = 1 if key == "total" else 100
                    axes.plot(epochs, factor * values, ls=style, color=color, label=label, marker="o", ms=3)
        _by_epoch(left, f"{figure_text(title)}: loss")
        _by_epoch(right, "Validation accuracy", "percent", (0, 101))
        for axes in (left, right):
            axes.legend(loc="best")


def differences_by_training(
    differences: Mapping[str, Mapping[str, tuple[Sequence[float], tuple[float, float]]]],
    path: str | Path,
    *,
    title: str = "Differences between trainings",
) -> None:
    """The difference of each training as a mark, next to the mean and its interval.

    Args:
        differences: pair of systems → attack → (one value per training, (low, high) of the mean), fractions.
    """
    attacks = list(dict.fromkeys(attack for by_attack in differences.values() for attack in by_attack))
    if not attacks:
        raise ValueError("differences holds no attack: nothing to draw")
    width = 0.8 / len(differences)
    with figure_file(path, min(max(6.0, 1.2 + 1.5 * len(attacks)), 13.0), 3.9) as figure:
        axes = figure.subplots()
        axes.axhline(0, color="#333333", lw=1)
        for number, (pair, by_attack) in enumerate(differences.items()):
            color = CYCLE[number % len(CYCLE)]
            offset = (number - (len(differences) - 1) / 2) * width
            positions = np.array([attacks.index(attack) for attack in by_attack]) + offset
            for position, (values, _) in zip(positions, by_attack.values(), strict=True):
                spread = np.linspace(-0.3, 0.1, len(values)) * width
                axes.plot(position + spread, 100 * np.asarray(values), "o", ms=4, mfc="none", color=color)
            means = 100 * np.array([np.mean(values) for values, _ in by_attack.values()])
            ends = 100 * np.array([interval for _, interval in by_attack.values()])
            errors = np.abs(ends - means[:, None]).T
            style = {"fmt": "s", "ms": 5, "color": color, "capsize": 3}
            axes.errorbar(positions + 0.25 * width, means, errors, label=figure_text(pair), **style)
        axes.set_xticks(range(len(attacks)), [figure_text(attack) for attack in attacks])
        axes.tick_params(axis="x", length=0)
        axes.set(title=figure_text(title), ylabel="difference in points", xlim=(-0.5, len(attacks) - 0.5))
        figure.legend(loc="outside lower center", ncols=len(differences))


def _by_epoch(
    axes: Any, title: str, unit: str = "mean over the epoch", limits: tuple[float, float | None] = (0, None)
) -> None:
    axes.set(title=title, xlabel="epoch", ylabel=unit, ylim=limits)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _column(records: Sequence[Mapping[str, Any]], name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    rows = [(record["epoch"], record[name]) for record in records if name in record]
    epochs, values = np.array(rows, dtype=np.float64).T
    return epochs, values

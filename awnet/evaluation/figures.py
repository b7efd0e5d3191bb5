"""Draws the figures of a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from awnet import analysis
from awnet.analysis.figures import Measured
from awnet.evaluation.detection import CONTROLS, roc_curve
from awnet.evaluation.results import Results
from awnet.evaluation.tables import LABELS, attack_label

NAMES = {"clean": "clean", "uniform_noise": "uniform noise", "sign_noise": "sign noise", **LABELS}
PANELS = 4


def draw(report: Results, folder: Path, training_log: Path | None = None) -> None:
    """Writes the figures that ``report`` and the log have data for into ``folder``."""
    if report.results():
        systems, clean = _bars(report)
        title = f"W-Robust accuracy on {report.dataset} {report.split}"
        analysis.w_robust_bars(systems, folder / "w_robust.png", clean=clean, title=title)
    p_clean = {
        kind: report.per_sample[f"{kind}_p_clean"]
        for kind in ("clean", *report.attacks, *CONTROLS)
        if f"{kind}_p_clean" in report.per_sample
    }
    if p_clean:
        analysis.p_clean_histogram(
            {NAMES.get(kind, kind): values for kind, values in p_clean.items()},
            folder / "p_clean.png",
            auc={NAMES.get(kind, kind): value for kind, value in report.router_auc.items()},
            controls=tuple(NAMES[kind] for kind in CONTROLS),
            title=f"{report.model} on {report.dataset}: the router's probability that an image is clean",
        )
    _draw_checks(report, folder)
    layers = _layers(report)
    if layers:
        analysis.filter_means(
            layers, folder / "filter_means.png", title=f"{report.model}: mean weight of each filter"
        )
    if training_log is not None:
        epochs = read_epochs(training_log)
        if epochs:
            analysis.training_curves(epochs, folder / "training.png", title=report.model)


def _draw_checks(report: Results, folder: Path) -> None:
    """Figures to check the results with: worst case, sanity curves, ROC curves, example images."""
    if report.union is not None:
        robust, broken = int(report.per_sample["union_correct"].sum()), report.union.broken_first_by
        analysis.waterfall(
            report.n,
            report.n - robust - sum(broken.values()),
            {attack_label(name): count for name, count in broken.items()},
            folder / "waterfall.png",
            title=f"{report.model}: attacks that break images first",
        )
    if report.accuracy_by_eps:
        analysis.accuracy_against_eps(
            {attack_label(name): curve for name, curve in report.accuracy_by_eps.items()},
            folder / "accuracy_by_eps.png",
            own_eps=report.eps,
            attacks={
                attack_label(name): (result.robust_accuracy, result.interval_95)
                for name, result in report.results().items()
                if name not in report.accuracy_by_eps
            },
            title=f"{report.model}: robust accuracy against ε",
        )
    if report.curves:
        steps, eps = report.curves["loss_against_steps"], report.curves["accuracy_against_eps"]
        analysis.sanity_curves(
            steps["steps"],
            steps["loss"],
            steps["accuracy"],
            eps["eps"],
            eps["accuracy"],
            folder / "sanity.png",
            own_eps=report.eps,
        )
    kinds = [kind for kind in report.router_auc if f"{kind}_type_score" in report.per_sample]
    if kinds:
        scores = report.per_sample["clean_type_score"]
        analysis.roc_curves(
            {
                NAMES.get(kind, kind): roc_curve(scores, report.per_sample[f"{kind}_type_score"])
                for kind in kinds
            },
            folder / "roc.png",
            auc={NAMES.get(kind, kind): report.router_auc[kind] for kind in kinds},
            controls=tuple(NAMES[kind] for kind in CONTROLS),
        )
    if report.examples:
        examples = report.examples
        analysis.example_images(
            examples["clean"],
            examples["adversarial"],
            [
                (_class(report, before), _class(report, after))
                for before, after in zip(examples["before"], examples["after"], strict=True)
            ],
            folder / "examples.png",
            eps=report.eps if report.norm == "Linf" else _largest_change(examples),
        )


def _largest_change(examples: dict[str, Any]) -> float:
    """The largest change of a pixel, in image units."""
    return float(np.abs(examples["adversarial"].astype(np.float64) - examples["clean"]).max())


def _class(report: Results, label: int) -> str:
    names = report.settings.get("class_names") or []
    return str(names[label]) if label < len(names) else str(label)


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """The records of the epochs in a ``log.jsonl``; an incomplete last line is skipped."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        records = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}; move it away to evaluate without it") from error
    return [record for record in records if record.get("kind") == "epoch"]


def _bars(report: Results) -> tuple[dict[str, dict[str, Measured]], dict[str, float]]:
    """A_w with intervals, and A_nat, of the report's model and the models it is compared with."""
    measured = {name: (a.w_robust_accuracy, a.w_interval_95) for name, a in report.results().items()}
    systems: dict[str, dict[str, Measured]] = {report.model: _named(measured)}
    clean = {report.model: report.clean_accuracy}
    for name, other in report.compared_with.items():
        theirs = {attack: (a.w_robust_accuracy, a.w_interval_95) for attack, a in other.attacks.items()}
        systems[name], clean[name] = _named(theirs), other.clean_accuracy
    return systems, clean


def _named(measured: dict[str, Measured]) -> dict[str, Measured]:
    return {NAMES.get(attack, attack): value for attack, value in measured.items()}


def _layers(report: Results) -> dict[str, dict[str, Any]]:
    """Up to ``PANELS`` layers, evenly spaced: weights and, if they are scaled, effective filters."""
    kinds = {"weights": "weights", "clean": "clean images, ω·weights"}
    attacks = [
        name for name in report.attacks if any(key.startswith(f"{name}/") for key in report.filter_means)
    ]
    if attacks:
        shown = "pgd_sat" if "pgd_sat" in attacks else attacks[-1]
        kinds[shown] = f"adversarial images ({NAMES.get(shown, shown)}), ω·weights"
    series: dict[str, dict[str, Any]] = {}
    for key, means in report.filter_means.items():
        kind, layer = key.split("/", 1)
        if kind in kinds:
            series.setdefault(layer, {})[kinds[kind]] = means
    most = max((len(kinds_of_layer) for kinds_of_layer in series.values()), default=0)
    names = [layer for layer, kinds_of_layer in series.items() if len(kinds_of_layer) == most]
    chosen = np.unique(np.linspace(0, len(names) - 1, min(PANELS, len(names))).round().astype(int))
    return {names[i]: series[names[i]] for i in chosen}

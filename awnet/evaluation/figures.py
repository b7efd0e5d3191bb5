"""Draws the figures of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from awnet import analysis
from awnet.analysis.figures import Measured
from awnet.data.threat_model import norm_text
from awnet.evaluation.detection import CONTROLS, roc_curve
from awnet.evaluation.results import AttackDifference, AttackResult, Results
from awnet.evaluation.tables import LABELS, attack_label

NAMES = {"clean": "clean", "uniform_noise": "uniform noise", "sign_noise": "sign noise", **LABELS}
PANELS = 4


def _name(kind: str) -> str:
    return NAMES.get(kind) or attack_label(kind)


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
            {_name(kind): values for kind, values in p_clean.items()},
            folder / "p_clean.png",
            auc={_name(kind): value for kind, value in report.router_auc.items()},
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
            title=f"{report.model}: {'norms' if report.norms else 'attacks'} that break images first",
        )
    if report.accuracy_by_eps:
        analysis.accuracy_against_eps(
            {
                attack_label(name): {**curve, "norm": norm_text(curve["norm"])}
                for name, curve in report.accuracy_by_eps.items()
            },
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
            {_name(kind): roc_curve(scores, report.per_sample[f"{kind}_type_score"]) for kind in kinds},
            folder / "roc.png",
            auc={_name(kind): report.router_auc[kind] for kind in kinds},
            controls=tuple(NAMES[kind] for kind in CONTROLS),
        )
    if report.examples:
        clean, adversarial, before, after = (
            report.examples[name] for name in ("clean", "adversarial", "before", "after")
        )
        largest = float(np.abs(adversarial.astype(np.float64) - clean).max())  # change of a pixel
        captions = [(_class(report, b), _class(report, a)) for b, a in zip(before, after, strict=True)]
        eps = report.eps if report.norm == "Linf" else largest
        analysis.example_images(clean, adversarial, captions, folder / "examples.png", eps=eps)


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
    attacks: dict[str, Mapping[str, AttackResult | AttackDifference]] = {report.model: report.results()}
    attacks |= {name: other.attacks for name, other in report.compared_with.items()}
    systems = {
        system: {_name(attack): (a.w_robust_accuracy, a.w_interval_95) for attack, a in results.items()}
        for system, results in attacks.items()
    }
    clean = {name: other.clean_accuracy for name, other in report.compared_with.items()}
    return systems, {report.model: report.clean_accuracy} | clean


def _layers(report: Results) -> dict[str, dict[str, Any]]:
    """Up to ``PANELS`` layers, evenly spaced: weights and, if they are scaled, effective filters."""
    kinds = {"weights": "weights", "clean": "clean images, ω·weights"}
    attacks = [
        name for name in report.attacks if any(key.startswith(f"{name}/") for key in report.filter_means)
    ]
    if attacks:
        shown = "pgd_sat" if "pgd_sat" in attacks else attacks[-1]
        kinds[shown] = f"adversarial images ({_name(shown)}), ω·weights"
    series: dict[str, dict[str, Any]] = {}
    for key, means in report.filter_means.items():
        kind, layer = key.split("/", 1)
        if kind in kinds:
            series.setdefault(layer, {})[kinds[kind]] = means
    most = max((len(kinds_of_layer) for kinds_of_layer in series.values()), default=0)
    names = [layer for layer, kinds_of_layer in series.items() if len(kinds_of_layer) == most]
    chosen = np.unique(np.linspace(0, len(names) - 1, min(PANELS, len(names))).round().astype(int))
    return {names[i]: series[names[i]] for i in chosen}

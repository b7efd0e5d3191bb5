"""Turns the collected outcomes of an evaluation into a report, with the warnings that it shows first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import nn

from awnet.attacks import Cascade
from awnet.evaluation.collect import CLEAN, UNION, Collected, Plan
from awnet.evaluation.detection import detection, detection_flags
from awnet.evaluation.filters import filter_means
from awnet.evaluation.report import Report
from awnet.evaluation.results import (
    Array,
    AttackResult,
    Results,
    accuracy_curve,
    attack_result,
    target_success,
)
from awnet.evaluation.sanity import union_check
from awnet.evaluation.statistics import auc, wilson_interval
from awnet.models.rdi import has_exits
from awnet.models.registry import name_of
from awnet.provenance import environment


def build_report(
    plan: Plan,
    model: nn.Module,
    collected: Collected,
    settings: dict[str, Any],
    selected_on: str | None,
    missing: dict[str, str],
) -> Report:
    """The report on ``model``, as the caller passed it; ``plan.model`` may be its inference copy."""
    dataset, seed = plan.dataset, plan.seed
    per_sample: dict[str, Array] = {
        "index": dataset.index.cpu().numpy(),
        "label": dataset.labels.cpu().numpy(),
    }
    for kind in collected.batches:
        per_sample |= {f"{kind}_{name}": values for name, values in collected.arrays(kind).items()}
        check_finite(per_sample.pop(f"{kind}_finite", None), kind)
    table = [*collected.sanity.get("table", [])]
    if plan.union is not None and "aa" in plan.chosen:
        table.append(asdict(union_check(per_sample["aa_correct"], per_sample["union_correct"])))

    clean = per_sample["clean_correct"]

    def result(kind: str, settings: dict[str, Any], members: Sequence[str]) -> AttackResult:
        outcome = attack_result(clean, per_sample[f"{kind}_correct"], settings, seed)
        if f"{kind}_broken_by" in per_sample:
            broken_by = per_sample[f"{kind}_broken_by"]
            counts = {name: int((broken_by == number).sum()) for number, name in enumerate(members)}
            outcome.broken_first_by = {name: count for name, count in counts.items() if count}
        if f"{kind}_target" in per_sample:
            target, prediction = per_sample[f"{kind}_target"], per_sample[f"{kind}_prediction"]
            outcome.target_success = target_success(target, prediction, per_sample["label"])
        outcome.warnings = dict(sorted(collected.notes[kind].items()))
        return outcome

    report = Report(
        model=name_of(model),
        dataset=dataset.name,
        split=dataset.split,
        n=len(dataset),
        norm=dataset.threat_model.norm,
        eps=dataset.threat_model.eps,
        clean_accuracy=int(clean.sum()) / len(clean),
        clean_interval_95=wilson_interval(int(clean.sum()), len(clean)),
        attacks={
            kind: result(kind, attack.settings, list(attack.members) if isinstance(attack, Cascade) else [])
            for kind, attack in plan.chosen.items()
        },
        union=None
        if plan.union is None
        else result(UNION, plan.union.settings | {"after": list(plan.chosen)}, plan.order),
        router_auc={
            kind: auc(per_sample["clean_type_score"], per_sample[f"{kind}_type_score"])
            for kind in plan.kinds
            if plan.has_type_head and kind != CLEAN
        },
        detection=detection(per_sample, plan.attacked, seed) if plan.has_type_head else {},
        sanity=table,
        curves=collected.sanity.get("curves", {}),
        parts=collected.parts,
        flags=[],
        settings=settings
        | {
            "source": dataset.source,
            "classes": dataset.num_classes,
            "fingerprint": dataset.fingerprint(),
            "robust_accuracy": "of adversarial images made from all images, also those misclassified clean",
        },
        environment=environment(dataset.device),
        selected_on=selected_on,
        missing=missing,
        per_sample=per_sample,
        examples=collected.example_arrays(),
        filter_means=filter_means(
            model,
            next(dataset.batches(1)).x,
            {
                kind: [scale / len(dataset) for scale in collected.scales[kind]]
                for kind in [CLEAN, *plan.attacked]
                if collected.scales[kind]
            },
        ),
    )
    if has_exits(model):
        report.exits = {
            kind: _exit_use(model, per_sample[f"{kind}_exit"], dataset.image_size)
            for kind in [CLEAN, *plan.attacked]
        }
    report.accuracy_by_eps = {
        kind: accuracy_curve(per_sample[f"{kind}_distance"], report.eps, attack.norm)
        for kind, attack in plan.chosen.items()
        if f"{kind}_distance" in per_sample
    }
    accuracies = {
        name.removesuffix("_pass_share"): float(np.asarray(values, np.float64).mean())
        for name, values in per_sample.items()
        if name.endswith("_pass_share")
    }
    if accuracies:
        report.settings["stochastic"] |= {"single_pass_accuracy": accuracies}
    doubt = dataset.threat_model.implausible(dataset.pixels)
    report.flags = ([] if doubt is None else [doubt]) + flags(report)
    return report


def check_finite(finite: Array | None, kind: str) -> None:
    """Raises FloatingPointError unless all logits of the images ``kind`` are finite."""
    if finite is not None and not finite.all():
        raise FloatingPointError(
            f"the model's logits are NaN or infinite for {int((~finite).sum())} of {len(finite)} {kind} "
            "images, so there is no accuracy to report: look for NaN in its weights"
        )


def _exit_use(model: nn.Module, exit_of: Array, image_size: tuple[int, int]) -> dict[str, Any]:
    cost = np.array(model.flops(image_size))  # type: ignore[operator]
    return {
        "mean_exit": float(exit_of.mean()) + 1,
        "shares": [float((exit_of == e).mean()) for e in range(len(cost))],
        "mean_flops": float(cost[exit_of].mean()),
        "full_flops": int(cost[-1]),
    }


def flags(report: Results) -> list[str]:
    """Warnings about the results, one sentence each."""
    reasons = []
    if report.approximate:
        reasons.append(
            f"measured in {report.settings['precision']}, whose rounding may change outcomes: the report has "
            "no headline; evaluate in float32 for one"
        )
    if report.missing:
        causes = "; ".join(dict.fromkeys(report.missing.values()))
        reasons.append(
            f"incomplete: {', '.join(report.missing)} could not run ({causes}), so the robust accuracy may "
            "be too high"
        )
    if report.selected_on == "test":
        reasons.append(
            "the checkpoint was selected on test images, as in the paper, which flatters the result"
        )
    classes = report.settings.get("classes")
    if classes and report.clean_interval_95[0] <= 1 / classes:
        reasons.append(
            f"clean accuracy, {100 * report.clean_accuracy:.1f} %, is not above chance "
            f"({100 / classes:.3g} %), so the robust accuracy says nothing: the network has learned nothing, "
            "or it expects normalized images (--mean, --std) or classes in another order (--classes)"
        )
    one_step = report.attacks.get("fgsm")
    if one_step is not None:
        weaker = [
            name
            for name in ("pgd_sat", "pgd_trades", "cw")
            if name in report.attacks and report.attacks[name].robust_accuracy > one_step.robust_accuracy
        ]
        if weaker:
            reasons.append(
                f"{', '.join(weaker)} breaks fewer images than a single step: gradients may be masked"
            )
    for name, result in report.attacks.items():
        reasons += _autoattack_warnings(name, result, report.n)
    if report.union is not None and "aa" in report.attacks:
        gap = report.attacks["aa"].robust_accuracy - report.union.robust_accuracy
        if gap > 0.02:
            reasons.append(
                f"other attacks break {100 * gap:.1f} % of the images beyond AutoAttack: gradients may be "
                "masked"
            )
    reasons += detection_flags(report.detection)
    suspicious = [row["check"] for row in report.sanity if row["result"] == "suspicious"]
    if suspicious:
        reasons.append(f"suspicious in the sanity table: {'; '.join(suspicious)}")
    if report.settings.get("budget") == "smoke" and (report.union is not None or "aa" in report.attacks):
        reasons.append("the attacks ran at the smoke budget, which only shows that they run")
    return reasons


def _autoattack_warnings(name: str, result: AttackResult, n: int) -> list[str]:
    """AutoAttack's own warnings, as sentences."""
    sentences = {
        "randomized": "gave different logits for the same image: its defense is random",
        "probabilities": "returns probabilities, not logits, on which cross-entropy is flat",
        "dynamic": "computes gradients in its forward pass",
        "zero_gradients": "has no gradient at {} points: gradients may be masked",
    }
    warnings = [
        f"{name}: the model {sentences[key].format(count)}"
        for key, count in result.warnings.items()
        if key in sentences
    ]
    gain = result.broken_first_by.get("square", 0) / n
    if (
        "square" in result.settings.get("members", {})
        and len(result.settings["members"]) > 1
        and gain > 0.002
    ):
        warnings.append(
            f"{name}: Square broke {100 * gain:.1f} % of the images after the white-box attacks failed: "
            "gradients may be masked"
        )
    return warnings

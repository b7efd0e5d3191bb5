"""Evaluates a model in several norms, and the worst case per image over them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from awnet.attacks.cascade import ROBUST, WRONG_CLEAN
from awnet.data.dataset import Dataset
from awnet.data.threat_model import Norm, ThreatModel, norm_text
from awnet.distributed import Ranks
from awnet.evaluation.compare import compare
from awnet.evaluation.evaluate import evaluate
from awnet.evaluation.report import Report
from awnet.evaluation.results import AttackResult, attack_result
from awnet.evaluation.resume import evaluation_lock, parts_folder
from awnet.files import expanded
from awnet.run_folder import RunFolder


def evaluate_norms(
    model: nn.Module,
    dataset: Dataset,
    threat_models: Sequence[ThreatModel],
    attacks: Sequence[str] = ("fgsm", "pgd_sat", "pgd_trades", "cw"),
    *,
    out: str | Path | None = None,
    name: str = "default",
    compared_with: Mapping[str, Report] | None = None,
    ranks: Ranks | None = None,
    **options: Any,
) -> tuple[Report, dict[Norm, Report]]:
    """Evaluates ``model`` in each of ``threat_models``, and the worst case per image over all of them.

    Each norm is a whole evaluation, :func:`awnet.evaluate`, of the name ``<name>-<norm>``. An interrupted
    call resumes: norms that are complete are loaded, and the interrupted one continues.

    Args:
        threat_models: at least two, of different norms.
        attacks: names of attacks, run in each norm.
        out, name: as for ``evaluate``; the report over the norms is written to ``out/evaluations/<name>``.
        compared_with: reports of other models over the same norms, by name, to add paired differences with.
        options: as for ``evaluate``.

    Returns:
        The report over the norms, and those of each norm. In the first, each norm is an attack, whose outcome
        is the worst case per image over the attacks in that norm, and ``union`` is the worst case over norms.
    """
    norms = [threat_model.norm for threat_model in threat_models]
    if len(norms) < 2 or len(set(norms)) < len(norms):
        raise ValueError(f"threat_models must be at least two, of different norms, got {norms}")
    if isinstance(attacks, Mapping):
        raise TypeError("attacks must be names: an Attack has one norm")
    for other, value in (compared_with or {}).items():
        if value.threat_models != list(threat_models):
            raise ValueError(f"{other} was evaluated in {value.threat_text}: evaluate it in the same norms")
    out = None if out is None else expanded(out)
    ranks = ranks or Ranks(dataset.device)
    with evaluation_lock(out, name, ranks) as place:
        parts = {
            threat_model.norm: evaluate(
                model,
                replace(dataset, threat_model=threat_model),
                attacks,
                out=None if place is None else place.path,
                name=f"{name}-{threat_model.norm}",
                part_of=name,
                ranks=ranks,
                **options,
            )
            for threat_model in threat_models
        }
        report = over_norms(parts, options.get("seed", 0))
        report.compared_with = {
            other: compare(report, value, options.get("seed", 0))
            for other, value in (compared_with or {}).items()
        }
        if place is not None:
            ranks.first(partial(_publish, report, place, name))
        return report, parts


def _publish(report: Report, place: RunFolder, name: str) -> None:
    place.during(lambda: report.publish(place.path, name))
    marks = place.path / parts_folder(name)
    shutil.rmtree(marks, ignore_errors=True)
    if marks.parent.is_dir() and not any(marks.parent.iterdir()):
        marks.parent.rmdir()


def over_norms(parts: Mapping[Norm, Report], seed: int = 0) -> Report:
    """The report over the norms of ``parts``, reports on the same images."""
    first = next(iter(parts.values()))
    clean = first.per_sample["clean_correct"]
    per_sample = {key: first.per_sample[key] for key in ("index", "label", "clean_correct")}
    broken_by = np.where(clean, ROBUST, WRONG_CLEAN)
    attacks: dict[str, AttackResult] = {}
    for number, (norm, part) in enumerate(parts.items()):
        kinds = ["union"] if part.union is not None else list(part.attacks)
        correct = clean & np.logical_and.reduce([part.per_sample[f"{kind}_correct"] for kind in kinds])
        settings = {"attack": "worst case", "norm": norm, "eps": part.eps, "over": list(part.results())}
        attacks[norm] = attack_result(clean, correct, settings, seed)
        per_sample[f"{norm}_correct"] = correct
        broken_by = np.where((broken_by == ROBUST) & ~correct, number, broken_by)
    per_sample |= {"union_correct": broken_by == ROBUST, "union_broken_by": broken_by}
    union = attack_result(
        clean, broken_by == ROBUST, {"attack": "worst case over norms", "norms": list(parts)}, seed
    )
    union.broken_first_by = {
        norm: count for number, norm in enumerate(parts) if (count := int((broken_by == number).sum()))
    }
    reasons = {flag: [norm for norm, part in parts.items() if flag in part.flags]
               for part in parts.values() for flag in part.flags}  # fmt: skip
    return Report(
        model=first.model,
        dataset=first.dataset,
        split=first.split,
        n=first.n,
        norm=first.norm,
        eps=first.eps,
        norms={norm: part.eps for norm, part in parts.items()},
        clean_accuracy=first.clean_accuracy,
        clean_interval_95=first.clean_interval_95,
        attacks=attacks,
        union=union,
        flags=[
            flag if len(norms) == len(parts) else f"{', '.join(map(norm_text, norms))}: {flag}"
            for flag, norms in reasons.items()
        ],
        settings=first.settings,
        environment=first.environment,
        selected_on=first.selected_on,
        missing={key: why for part in parts.values() for key, why in part.missing.items()},
        per_sample=per_sample,
    )

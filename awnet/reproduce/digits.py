"""The main job: AW-Net and its static twins on scikit-learn's digits, trained alike, attacked, compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from awnet.data import Splits, load_dataset
from awnet.evaluation import Comparison, Report, comparison_table, evaluate, w_robust_table
from awnet.evaluation.table import LABELS
from awnet.training import MTARD, recipe_for, train

AWNET = "awnet_tiny"
TWINS = {
    "resnet_tiny": "same width, no router",
    "resnet_tiny_wide": "as many parameters as awnet_tiny",
}
ATTACKS = ("fgsm", "pgd_sat", "pgd_trades", "cw")


@dataclass(frozen=True)
class DigitsResult:
    """folder: AW-Net's run folder, which holds all the rest; reports: of the test images, by model."""

    folder: Path
    reports: dict[str, Report]


def run_digits(
    out: str | Path = "runs/digits",
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    recipe: MTARD | None = None,
    splits: Splits | None = None,
    attacks: Sequence[str] = ATTACKS,
    quiet: bool = False,
) -> DigitsResult:
    """Trains ``awnet_tiny`` and two static twins by MTARD with the same two teachers and compares them.

    The teachers (plain and adversarial training of ``resnet_tiny``) lie in ``out/teachers``, AW-Net in
    ``out`` itself, the twins in ``out/compared``. Every model is judged on the same held-out test images;
    differences are paired by image. Where an interval holds 0 the text says that there is no significant
    difference.

    resume, overwrite: go on with, or replace, what is in ``out``; without either an existing run is an error.
    recipe, splits: other settings or images than the data set's, for a smaller run, say.
    """
    begun = time.monotonic()
    console = Console(quiet=quiet, highlight=False)
    out = Path(out)
    if splits is None:
        splits = load_dataset("digits", seed=seed)
    if recipe is None:
        usual = recipe_for("mtard", "digits")
        assert isinstance(usual, MTARD)
        recipe = usual
    _say(console, f"{splits.train.name}: {splits.train.source}")
    _say(
        console,
        f"{len(splits.train)} training, {len(splits.validation)} validation and {len(splits.test)} test "
        f"images, L-infinity eps {splits.train.threat_model.eps:.4g}; seed {seed}",
    )

    trained = {
        AWNET: train(
            recipe,
            AWNET,
            splits,
            out,
            seed=seed,
            device=device,
            resume=resume,
            overwrite=overwrite,
            quiet=quiet,
        )
    }
    teachers = (out / "teachers" / "clean", out / "teachers" / "robust")
    for name in TWINS:
        trained[name] = train(
            recipe,
            name,
            splits,
            out / "compared" / name,
            seed=seed,
            device=device,
            resume=True,  # it lies within this run, which was asked for above
            teachers=teachers,
            quiet=quiet,
        )

    reports: dict[str, Report] = {}
    for name in (*TWINS, AWNET):  # AW-Net last: its report holds the comparison
        reports[name] = evaluate(
            trained[name].model,
            splits.test,
            attacks,
            seed=seed,
            out=trained[name].folder,
            progress=console.is_terminal and not quiet,
            compared_with=dict(reports) if name == AWNET else None,
        )
    reports = {name: reports[name] for name in (AWNET, *TWINS)}
    _tell(console, reports, out, time.monotonic() - begun)
    return DigitsResult(out, reports)


def _tell(console: Console, reports: dict[str, Report], out: Path, seconds: float) -> None:
    report = reports[AWNET]
    console.print(w_robust_table(reports))
    console.print(comparison_table(report))
    for name, comparison in report.compared_with.items():
        _say(console, f"{AWNET} against {name} ({TWINS[name]}):")
        for line in verdicts(comparison):
            _say(console, f"  {line}")
    _say(
        console,
        "One seed, one test set, and no correction for the number of comparisons: see the intervals, and "
        "train with other seeds before believing a small difference.",
    )
    if report.router_auc:
        values = ", ".join(
            f"{LABELS.get(k, k.replace('_', ' '))} {v:.3f}" for k, v in report.router_auc.items()
        )
        _say(console, f"The router tells clean images from others with AUC: {values}.")
    for flag in report.flags:
        _say(console, f"note: {flag}")
    _say(console, f"{seconds:.0f} s in all")
    folder = out / "evaluations" / "default"
    _say(console, f"report:     {out / 'report.json'}")
    _say(console, f"figures:    {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
    _say(console, f"checkpoint: {out / 'best.safetensors'}")


def verdicts(comparison: Comparison) -> list[str]:
    """A line on clean accuracy, one on A_w under each attack; significant: the 95 % interval excludes 0."""
    lines = [_verdict("clean accuracy", comparison.clean_difference, comparison.clean_interval_95)]
    for name, found in comparison.attacks.items():
        lines.append(_verdict(f"A_w under {LABELS.get(name, name)}", found.difference, found.interval_95))
    return lines


def _verdict(what: str, difference: float, interval: tuple[float, float]) -> str:
    low, high = interval
    if low > 0:
        verdict = "better"
    elif high < 0:
        verdict = "worse"
    else:
        verdict = "no significant difference"
    return f"{what}: {100 * difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], {verdict}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)

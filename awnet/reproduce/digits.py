"""The digits experiment: AW-Net and two static twins, trained by the same recipe, attacked and compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from awnet.attacks import list_attacks
from awnet.data import Splits, load_dataset
from awnet.devices import resolve_device
from awnet.evaluation import Comparison, Report, compare, comparison_table, evaluate, w_robust_table
from awnet.evaluation.statistics import Interval
from awnet.evaluation.store import locked
from awnet.evaluation.tables import LABELS, attack_label
from awnet.files import expanded, make_folder
from awnet.reproduce.parallel import run_in_parallel
from awnet.run_folder import RunFolder
from awnet.terminal import safe_console
from awnet.text import visible
from awnet.training import MTARD, Recipe, recipe_for, train
from awnet.training.checkpoint import claim

AWNET = "awnet_tiny"
TEACHER = "resnet_tiny"
TWINS = {
    "resnet_tiny": "same width, no router",
    "resnet_tiny_wide": "as many parameters as awnet_tiny",
}
ATTACKS = ("fgsm", "pgd_sat", "pgd_trades", "cw")


@dataclass(frozen=True)
class DigitsResult:
    """folder: AW-Net's run folder, which contains the other runs; reports: on the test images, by model."""

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
    processes: int | None = None,
    quiet: bool = False,
) -> DigitsResult:
    """Trains ``awnet_tiny`` and two static twins by MTARD with the same two teachers and compares them.

    The teachers (plain and adversarial training of ``resnet_tiny``) are stored in ``out/teachers``, AW-Net in
    ``out`` and the twins in ``out/compared``. All models are evaluated on the same held-out test images, and
    differences are paired by image. If an interval contains 0, the text reports no significant difference.

    Args:
        out: the run folder.
        seed: keys all random numbers.
        resume, overwrite: resume or replace the run in ``out``; an existing run is an error otherwise.
        device: as for :func:`awnet.train`.
        recipe, splits: other settings or images than those of digits, for example for a smaller run.
        attacks: names of the attacks.
        processes: 1, or 2 to train in parallel, each with half of torch's threads; by default 2 on a CPU if
            torch has two threads or more. The same number gives the same table.
        quiet: print nothing.
    """
    begun = time.monotonic()
    console = safe_console(quiet=quiet)
    out = expanded(out)
    where = resolve_device(device)
    if processes is None:
        processes = 2 if where.type == "cpu" and torch.get_num_threads() >= 2 else 1
    if processes not in (1, 2):
        raise ValueError(f"processes must be None, 1 or 2, got {processes!r}")
    for name in attacks:
        if name not in list_attacks():
            raise ValueError(f"attacks must be among {', '.join(list_attacks())}, got {name!r}")
    if splits is None:
        splits = load_dataset("digits", seed=seed)
    if recipe is None:
        default = recipe_for("mtard", "digits")
        assert isinstance(default, MTARD)
        recipe = default
    claim(out, resume=resume, overwrite=overwrite)
    with experiment_folder(out, partial(say, console)) as place:
        reports = _trained_and_evaluated(
            place, recipe, splits, seed, where, attacks=attacks, processes=processes, console=console
        )
        report = reports[AWNET]
        report.compared_with = {name: compare(report, reports[name], seed) for name in TWINS}
        place.during(lambda: _save(report, place.path))
        _print_results(console, reports, place.path, time.monotonic() - begun)
        return DigitsResult(place.path, reports)


def experiment_folder(folder: Path, warn: Callable[[str], None]) -> RunFolder:
    """Creates the folder of an experiment; the result follows it if it is renamed."""
    return RunFolder(make_folder(folder), warn, "the experiment")


def _trained_and_evaluated(
    place: RunFolder,
    recipe: MTARD,
    splits: Splits,
    seed: int,
    device: torch.device,
    *,
    attacks: Sequence[str],
    processes: int,
    console: Console,
) -> dict[str, Report]:
    """The reports of AW-Net, which is not saved before the comparison, and of its twins."""
    say(console, f"{splits.train.name}: {splits.train.source}")
    say(
        console,
        f"{len(splits.train)} training, {len(splits.validation)} validation and {len(splits.test)} test "
        f"images, L-infinity eps {splits.train.threat_model.eps:.4g}; seed {seed}",
    )

    def job(recipe: Recipe, model: str, folder: str, *, second: bool = False) -> _Training:
        """``second``: whether the job is for the second process, if there are two, which prints nothing."""
        student = isinstance(recipe, MTARD)
        return partial(
            train_network,
            recipe,
            model,
            splits,
            folder,
            seed=seed,
            device=device,
            teachers=("teachers/clean", "teachers/robust") if student else (),
            attacks=attacks if student else (),
            quiet=console.quiet or (second and processes == 2),
        )

    def run_jobs(first: list[_Training], second: list[_Training]) -> list[_Trained]:
        """The results of the jobs of the first and then of the second process."""
        queues = [first, second] if processes == 2 else [first + second]
        jobs = [[partial(train_all, place.path, queue)] for queue in queues]
        results = run_in_parallel(jobs, max(1, torch.get_num_threads() // processes))
        return [one for queue in results for trained in queue for one in trained]

    where = ", in a second process" if processes == 2 else ""
    clean, robust = recipe.teacher_recipe("clean"), recipe.teacher_recipe("robust")
    say(console, f"teachers: {TEACHER} by {robust.name}, and by {clean.name}{where}")
    trained = run_jobs(
        [job(robust, TEACHER, "teachers/robust")],
        [job(clean, TEACHER, "teachers/clean", second=True)],
    )
    say(console, f"clean teacher: validation accuracy {100 * trained[1].validation['clean_accuracy']:.1f} %")
    say(console, f"students by {recipe.title}: {AWNET}; {' and '.join(TWINS)}{where}")
    trained = run_jobs(
        [job(recipe, AWNET, "")],
        [job(recipe, name, f"compared/{name}", second=True) for name in TWINS],
    )
    return {
        name: one.report for name, one in zip((AWNET, *TWINS), trained, strict=True) if one.report is not None
    }


@dataclass(frozen=True)
class _Trained:
    validation: dict[str, float]
    report: Report | None


_Training = Callable[[RunFolder], _Trained]


def train_all(out: Path, trainings: Sequence[_Training]) -> list[_Trained]:
    """Runs ``trainings`` in order in ``out``, which is experiment_folder if it is renamed."""
    # without warnings: the process that started the experiment prints them
    with RunFolder(out, lambda text: None, "the experiment") as place:
        return [training(place) for training in trainings]


def train_network(
    recipe: Recipe,
    model: str,
    splits: Splits,
    folder: str,
    place: RunFolder,
    *,
    seed: int,
    device: torch.device,
    teachers: Sequence[str],
    attacks: Sequence[str],
    quiet: bool,
) -> _Trained:
    """Trains one model, or resumes its training, and evaluates it if there are attacks.

    ``folder`` and ``teachers`` are relative to ``place``.
    """
    result = train(
        recipe,
        model,
        splits,
        place.path / folder,
        seed=seed,
        device=device,
        resume=True,  # run_digits has checked the folder
        teachers=[place.path / teacher for teacher in teachers] or None,
        quiet=quiet,
    )
    report = None
    if attacks:
        run = place.path / folder
        report = evaluate(result.model, splits.test, attacks, seed=seed, selected_on="validation", run=run)
        if model != AWNET:  # its report is saved with the comparison
            place.during(lambda: _save(report, place.path / folder))
    return _Trained(result.validation, report)


def _save(report: Report, folder: Path) -> None:
    with locked(folder / "evaluations" / "default"):
        report.publish(folder)


def _print_results(console: Console, reports: dict[str, Report], out: Path, seconds: float) -> None:
    report = reports[AWNET]
    console.print(w_robust_table(reports))
    console.print(comparison_table(report))
    for name, comparison in report.compared_with.items():
        say(console, f"{AWNET} against {name} ({TWINS[name]}): {conclusion(comparison)}")
    say(
        console,
        "One seed, one test set, and no correction for the number of comparisons: look at the intervals, "
        "and train with other seeds before you trust a small difference.",
    )
    if report.router_auc:
        values = ", ".join(f"{attack_label(name)} {value:.3f}" for name, value in report.router_auc.items())
        say(console, f"AUC of the router for clean against attacked images: {values}.")
    for flag in report.flags:
        say(console, f"note: {flag}")
    say(console, f"{seconds:.0f} s in total")
    folder = out / "evaluations" / "default"
    say(console, f"figures:    {', '.join(str(path) for path in sorted(folder.glob('*.png')))}")
    say(console, f"checkpoint: {out / 'best.safetensors'}")
    say(console, f"report:     {folder / 'report.html'}")


def conclusion(comparison: Comparison) -> str:
    """Clean accuracy and A_w under each attack: better or worse if the 95 % interval excludes 0."""
    clean = {"clean": (comparison.clean_difference, comparison.clean_interval_95)}
    attacks = {name: (attack.difference, attack.interval_95) for name, attack in comparison.attacks.items()}
    return in_words(clean | attacks)


def in_words(differences: Mapping[str, tuple[float, Interval]]) -> str:
    """The differences as text, by better and worse.

    ``differences``: "clean" (of A_nat) or attack (of A_w) → difference and interval.
    """
    groups: dict[str, list[str]] = {"better": [], "worse": [], "no significant difference": []}
    for name, (difference, (low, high)) in differences.items():
        what = "clean accuracy" if name == "clean" else f"A_w under {LABELS.get(name, name)}"
        if low <= 0 <= high:
            groups["no significant difference"].append(what)
        else:
            groups["better" if low > 0 else "worse"].append(f"{what} ({100 * difference:+.1f} points)")
    return "; ".join(f"{group}: {', '.join(members)}" for group, members in groups.items() if members)


def say(console: Console, text: str) -> None:
    """Prints a line without markup."""
    console.print(visible(text), markup=False, soft_wrap=True)

"""The digits experiment with several seeds: which differences remain when networks are trained again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from awnet import analysis
from awnet.evaluation import Report, t_interval
from awnet.evaluation.statistics import Interval
from awnet.evaluation.tables import attack_label
from awnet.files import expanded, write_json
from awnet.reproduce.digits import AWNET, TWINS, DigitsResult, experiment_folder, in_words, run_digits, say
from awnet.terminal import safe_console

CLEAN = "clean"


@dataclass(frozen=True)
class Spread:
    """One quantity over several trainings, as fractions.

    values: in the order of the seeds. sd: standard deviation between trainings, with n − 1. interval_95:
    Student's, of the mean.
    """

    values: list[float]
    mean: float
    sd: float
    interval_95: Interval


@dataclass(frozen=True)
class SeedsResult:
    """The content of ``seeds.json``, and the runs.

    Accuracies by model, differences (``awnet_tiny`` minus the twin) by twin; in both ``"clean"`` is
    A_nat, and any other key A_w under the attack of that name.
    """

    folder: Path
    seeds: list[int]
    accuracies: dict[str, dict[str, Spread]]
    differences: dict[str, dict[str, Spread]]
    runs: dict[int, DigitsResult]


def run_digits_seeds(
    out: str | Path = "runs/digits-seeds",
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **options: Any,
) -> SeedsResult:
    """:func:`run_digits` once for each of ``seeds``, in ``out/seed-N``, with means and intervals.

    A seed determines weights, order, augmentation, attacks, validation images and teachers; the test images
    are the same. So the intervals are over trainings, for these test images. ``out`` also contains
    ``seeds.json`` and ``seeds.png``.

    Args:
        out: folder of the runs.
        seeds: two or more different numbers.
        resume, overwrite: of each seed's folder, as in :func:`run_digits`. With ``resume`` only new seeds are
            trained.
        quiet: print nothing.
        options: further arguments of :func:`run_digits`.

    Raises:
        ValueError: fewer than two seeds, or one of them twice.
    """
    seeds = list(seeds)
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be two or more different numbers, got {seeds}")
    out, console = expanded(out), safe_console(quiet=quiet)
    runs = {}
    with experiment_folder(out, partial(say, console)) as place:
        for number, seed in enumerate(seeds, 1):
            console.rule(f"seed {seed}, {number} of {len(seeds)}")
            folder = place.path / f"seed-{seed}"
            runs[seed] = run_digits(
                folder, seed=seed, resume=resume, overwrite=overwrite, quiet=quiet, **options
            )
        out = place.path
    per_seed = [{name: _figures(report) for name, report in run.reports.items()} for run in runs.values()]
    accuracies = {
        model: {what: _spread([one[model][what] for one in per_seed]) for what in per_seed[0][model]}
        for model in (AWNET, *TWINS)
    }
    differences = {
        twin: {
            what: _spread([one[AWNET][what] - one[twin][what] for one in per_seed])
            for what in per_seed[0][twin]
        }
        for twin in TWINS
    }
    result = SeedsResult(out, seeds, accuracies, differences, runs)
    saved = {"seeds": seeds, "accuracies": _plain(accuracies), "differences": _plain(differences)}
    write_json(out / "seeds.json", saved)
    analysis.differences_by_training(
        {
            f"{AWNET} − {twin}": {
                attack_label(what): (s.values, s.interval_95) for what, s in spreads.items()
            }
            for twin, spreads in differences.items()
        },
        out / "seeds.png",
        title=f"digits: {len(seeds)} trainings, one mark each",
    )
    console.rule(f"{len(seeds)} seeds")
    console.print(_table(result))
    for twin, spreads in differences.items():
        conclusion = in_words({what: (spread.mean, spread.interval_95) for what, spread in spreads.items()})
        say(console, f"{AWNET} against {twin} ({TWINS[twin]}): {conclusion}")
    say(console, f"written to {out / 'seeds.json'} and {out / 'seeds.png'}")
    return result


def _figures(report: Report) -> dict[str, float]:
    attacks = {name: result.w_robust_accuracy for name, result in report.results().items()}
    return {CLEAN: report.clean_accuracy, **attacks}


def _spread(values: list[float]) -> Spread:
    return Spread(values, fmean(values), stdev(values), t_interval(values))


def _plain(by_model: dict[str, dict[str, Spread]]) -> dict[str, Any]:
    return {name: {what: asdict(one) for what, one in spreads.items()} for name, spreads in by_model.items()}


def _points(difference: float) -> str:
    return f"{round(100 * difference, 1) + 0.0:+.1f}"  # no -0.0


def _table(result: SeedsResult) -> Table:
    """A row for each model, mean ± standard deviation; under each twin the mean difference's interval."""
    table = Table(
        title=f"digits, {len(result.seeds)} trainings of each network",
        caption="percent; ± the standard deviation between trainings. Below: awnet_tiny minus the twin in "
        "points, with Student's 95 % interval of the mean",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    names = list(result.accuracies[AWNET])
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column("Clean\nA_nat" if name == CLEAN else f"{attack_label(name)}\nA_w", justify="right")
    for model, spreads in result.accuracies.items():
        cells = [f"{100 * spreads[name].mean:.1f} ±{100 * spreads[name].sd:.1f}" for name in names]
        table.add_row(model, *cells)
    table.add_section()
    for twin, spreads in result.differences.items():
        cells = []
        for name in names:
            mean, low, high = (_points(value) for value in (spreads[name].mean, *spreads[name].interval_95))
            cells.append(f"{mean}\n\\[{low}, {high}]")
        table.add_row(f"minus {twin}", *cells)
    return table

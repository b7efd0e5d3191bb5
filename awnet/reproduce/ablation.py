"""Ablations: each system trained with several seeds and compared with its baseline, paired by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from awnet.analysis import paired_differences
from awnet.evaluation import Report
from awnet.evaluation.comparison import Group, Measured, compare_reports, quantity_label
from awnet.evaluation.tables import interval_text
from awnet.files import write_json, write_text
from awnet.reproduce.experiments import Experiment
from awnet.reproduce.markdown import (
    attack_settings,
    markdown_table,
    opening,
    record,
    section,
    statement,
    training_section,
)
from awnet.reproduce.runs import Runs
from awnet.text import csv_text, visible


def run_ablation(name: str, experiment: Experiment, *by_seed: Runs) -> None:
    """Trains and evaluates every system with each seed, and writes the differences to its baseline.

    The results are ``table.md``, ``table.csv``, ``table.json`` and ``differences.png``.
    """
    (dataset,) = experiment.datasets
    first, seeds = by_seed[0], [runs.seed for runs in by_seed]
    reports: dict[str, list[Report]] = {system.label: [] for system in experiment.systems}
    for runs in by_seed:
        for system in experiment.systems:
            runs.say(f"seed {runs.seed}, {system.label}")
            reports[system.label].append(runs.evaluated(system, dataset, experiment.attacks, name))
    groups = {label: Group(label, tuple(several), tuple(seeds)) for label, several in reports.items()}
    rows = _rows(experiment, groups)
    folder = first.results(name)
    lines = statement(experiment, first, seeds)
    attacks = dict.fromkeys(
        attack_settings(attack, result)
        for several in reports.values()
        for attack, result in several[0].results().items()
    )
    quantities = ["clean", *experiment.attacks]
    text = opening(name, experiment, lines)
    text += section("Accuracy, percent, mean over the trainings", _accuracies(rows, experiment, quantities))
    text += section(
        "Difference to the baseline in points, with 95 % intervals over images, paired by image",
        _differences(rows, experiment, quantities, "over_images"),
    )
    if len(seeds) > 1:
        text += section(
            "Difference to the baseline in points, with 95 % intervals over trainings, paired by seed",
            _differences(rows, experiment, quantities, "over_seeds"),
        )
    text += section("Attacks", [f"- {attack}" for attack in attacks])
    text += training_section(first.trainings, f"Trainings of seed {first.seed}")
    write_text(folder / "table.md", "\n".join(map(visible, text)))
    write_text(folder / "table.csv", csv_text(_csv_rows(rows, experiment)))
    write_json(
        folder / "table.json",
        record(name, experiment, first, lines)
        | {
            "seeds": seeds,
            "attacks": list(attacks),
            "rows": [asdict(row) for row in rows.values()],
            "trainings": [asdict(training) for runs in by_seed for training in runs.trainings],
        },
    )
    _draw(rows, experiment, quantities, folder / "differences.png")
    first.say("\n".join(text))


def _baselines(experiment: Experiment) -> dict[str, str]:
    """The label of each system's baseline, which may be the system itself."""
    first = experiment.systems[0].label
    return {system.label: system.baseline or first for system in experiment.systems}


def _rows(experiment: Experiment, groups: dict[str, Group]) -> dict[tuple[str, str], Measured]:
    """(system, quantity) → its accuracy and difference to its baseline."""
    baselines = _baselines(experiment)
    rows: dict[tuple[str, str], Measured] = {}
    for baseline in dict.fromkeys(baselines.values()):
        others = [label for label, one in baselines.items() if one == baseline and label != baseline]
        for row in compare_reports([groups[label] for label in (baseline, *others)]).rows:
            if row.group != baseline or baselines[baseline] == baseline:
                rows[row.group, row.quantity] = row
    return rows


def _accuracies(
    rows: dict[tuple[str, str], Measured], experiment: Experiment, quantities: Sequence[str]
) -> list[str]:
    headings = ["system", "epochs", *map(quantity_label, quantities)]
    cells = [
        [
            system.label,
            str(system.settings.get("epochs", "")),
            *(f"{100 * rows[system.label, quantity].accuracy:.1f}" for quantity in quantities),
        ]
        for system in experiment.systems
    ]
    return markdown_table(headings, cells, 1)


def _differences(
    rows: dict[tuple[str, str], Measured], experiment: Experiment, quantities: Sequence[str], interval: str
) -> list[str]:
    def points(row: Measured) -> str:
        assert row.difference is not None  # a system with a baseline
        return f"{100 * row.difference:+.1f} {interval_text(getattr(row, interval))}"

    cells = [
        [label, baseline, *(points(rows[label, quantity]) for quantity in quantities)]
        for label, baseline in _baselines(experiment).items()
        if label != baseline
    ]
    return markdown_table(["system", "baseline", *map(quantity_label, quantities)], cells, 2)


def _csv_rows(rows: dict[tuple[str, str], Measured], experiment: Experiment) -> list[list[object]]:
    baselines = _baselines(experiment)
    intervals = ("interval_95", "over_images", "over_seeds")
    ends = [f"{interval}_{end}" for interval in intervals for end in ("low", "high")]
    table: list[list[object]] = [["system", "baseline", "quantity", "accuracy", "difference", *ends]]
    for row in rows.values():
        values = [row.accuracy, row.difference]
        for interval in intervals:
            values += getattr(row, interval) or (None, None)
        shown = ["" if value is None else f"{value:.6f}" for value in values]
        table.append([row.group, baselines[row.group], row.quantity, *shown])
    return table


def _draw(
    rows: dict[tuple[str, str], Measured], experiment: Experiment, quantities: Sequence[str], path: Path
) -> None:
    """A line for each system and quantity."""
    compared = [label for label, baseline in _baselines(experiment).items() if label != baseline]
    series = {
        quantity_label(quantity): {
            label: (row.difference, row.over_images, row.over_seeds)
            for label in compared
            if (row := rows[label, quantity]).difference is not None and row.over_images is not None
        }
        for quantity in quantities
    }
    paired_differences(series, path, title="Difference to the baseline")

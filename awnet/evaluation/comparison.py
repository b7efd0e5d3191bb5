"""Compares any number of reports on the same images: differences to the first, with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from awnet import analysis
from awnet.evaluation import html
from awnet.evaluation.compare import differences_of, outcomes, p_value
from awnet.evaluation.report import Report
from awnet.evaluation.results import Array
from awnet.evaluation.statistics import (
    LEVEL,
    Interval,
    bootstrap_interval,
    holm,
    paired_difference,
    t_interval,
    welch_interval,
    wilson_interval,
)
from awnet.evaluation.tables import attack_label, interval_text, p_text
from awnet.files import expanded, make_folder, write_json, write_text
from awnet.run_config import is_run, read_config
from awnet.text import visible

Adjust = Literal["none", "holm"]


@dataclass(frozen=True)
class Group:
    """The reports of one configuration: one report, or one for each training seed.

    label: its name in tables. reports: at least one. seeds: of the trainings, in the order of ``reports``;
    None for a single report.
    """

    label: str
    reports: tuple[Report, ...]
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Measured:
    """One quantity of one group, as fractions, and its difference to the first group's.

    quantity: ``clean``, or ``NAME`` (A_adv) or ``NAME A_w`` for an attack.
    accuracy: mean over the group's reports. interval_95: Wilson's over images for one report's accuracy, the
        bootstrap's for A_w, Student's over trainings for several reports.
    difference: this group minus the first; None for the first.
    over_images: bootstrap interval of ``difference``, paired by image; an image's value is its mean over the
        group's reports.
    over_seeds: Student's interval of ``difference`` over trainings, paired by seed if both groups have the
        same seeds, else Welch's; None unless both groups have several reports.
    p: of the hypothesis that there is no difference, for two single reports: McNemar's exact test, for A_w
        the exact sign-flip test; None otherwise. Adjusted if the comparison is.
    level: of ``over_images``, 0.95 unless the comparison is adjusted.
    """

    group: str
    quantity: str
    accuracy: float
    interval_95: Interval
    difference: float | None = None
    over_images: Interval | None = None
    over_seeds: Interval | None = None
    p: float | None = None
    level: float = LEVEL


@dataclass(frozen=True)
class ReportComparison:
    """The result of :func:`compare_reports`.

    notes: what could not be compared, and why. adjust: the correction for several comparisons, ``"none"`` or
    ``"holm"``.
    """

    groups: tuple[Group, ...]
    rows: tuple[Measured, ...]
    notes: tuple[str, ...]
    adjust: Adjust = "none"

    @property
    def setting(self) -> str:
        """The data and the threat model, in one line."""
        first = self.groups[0].reports[0]
        return f"{first.n} {first.split} images of {first.dataset}, {first.threat_text}"

    def table(self) -> Table:
        """A row for each quantity and group, percent, differences in points."""
        table = Table(title=Text(visible(self.setting)), caption=self.caption(), box=SIMPLE_HEAD)
        for number, heading in enumerate(self.headings()):
            table.add_column(heading, justify="left" if number < 2 else "right")
        for cells in self.cells():
            table.add_row(*(Text(visible(cell)) for cell in cells))
        return table

    def headings(self) -> list[str]:
        headings = ["", "", "percent", "difference", "over images"]
        return headings + (["over seeds"] if self._with_seeds() else []) + ["p"]

    def cells(self) -> list[list[str]]:
        """The rows of the table as text."""
        rows, previous = [], ""
        for row in self.rows:
            low, high = row.interval_95
            cells = [
                "" if row.quantity == previous else quantity_label(row.quantity),
                row.group,
                f"{100 * row.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                "" if row.difference is None else f"{100 * row.difference:+.1f}",
                interval_text(row.over_images),
                *([interval_text(row.over_seeds)] if self._with_seeds() else []),
                p_text(row.p),
            ]
            rows.append(cells)
            previous = row.quantity
        return rows

    def caption(self) -> str:
        seeds = "; over seeds: between trainings" if self._with_seeds() else ""
        levels = "intervals" if self.adjust == "holm" else "95 % intervals"
        holm = (
            f" p and the intervals over images are adjusted by Holm's method for the {len(self.groups) - 1} "
            "comparisons of a quantity."
            if self.adjust == "holm"
            else ""
        )
        return (
            f"Differences to {visible(self.groups[0].label)} in points, paired by image, with {levels}"
            f"{seeds}. p: McNemar's exact test, for A_w the exact sign-flip test.{holm}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready."""
        first = self.groups[0].reports[0]
        return {
            "dataset": first.dataset,
            "split": first.split,
            "n": first.n,
            "norm": first.norm,
            "eps": first.eps,
            "norms": first.norms,
            "adjust": self.adjust,
            "baseline": self.groups[0].label,
            "groups": [
                {
                    "label": group.label,
                    "models": [report.model for report in group.reports],
                    "seeds": None if group.seeds is None else list(group.seeds),
                }
                for group in self.groups
            ],
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def save(self, folder: str | Path) -> Path:
        """Writes ``comparison.html``, ``comparison.json`` and ``comparison.png``; returns the folder."""
        folder = make_folder(expanded(folder))
        series: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            if row.difference is not None and not row.quantity.endswith(" A_w"):
                value = (row.difference, row.over_images, row.over_seeds)
                series.setdefault(row.group, {})[quantity_label(row.quantity)] = value
        title = f"Difference to {self.groups[0].label}"
        analysis.paired_differences(series, folder / "comparison.png", title=title)
        page = html.comparison_page(
            "Comparison: " + ", ".join(group.label for group in self.groups),
            self.setting,
            self.headings(),
            self.cells(),
            caption=self.caption(),
            notes=self.notes,
            figure=folder / "comparison.png",
        )
        write_text(folder / "comparison.html", page)
        write_json(folder / "comparison.json", self.to_dict())
        return folder

    def _with_seeds(self) -> bool:
        return any(row.over_seeds is not None for row in self.rows)


def quantity_label(quantity: str) -> str:
    """The label of a quantity in tables and figures."""
    if quantity == "clean":
        return "Clean A_nat"
    name, is_w, _ = quantity.partition(" A_w")
    return f"{attack_label(name)} {'A_w' if is_w else 'A_adv'}"


def compare_reports(groups: Sequence[Group], seed: int = 0, adjust: Adjust = "none") -> ReportComparison:
    """Differences of each group to the first, for clean images and each attack that all reports have.

    Args:
        adjust: ``"holm"`` corrects p and the intervals over images of each quantity for the number of groups
            that are compared with the first.

    Raises:
        ValueError: ``adjust`` with several trainings in a group, which have no p; fewer than two groups, or
            reports that cannot be compared: other images, other ε or norm, another precision, an attack with
            other settings. The message lists all reasons.
    """
    if adjust not in ("none", "holm"):
        raise ValueError(f"adjust must be none or holm, got {adjust!r}")
    if adjust == "holm" and any(len(group.reports) > 1 for group in groups):
        raise ValueError("adjust='holm' needs one report per configuration: several trainings have no p")
    if len(groups) < 2:
        raise ValueError(f"a comparison needs two or more reports, got {len(groups)}")
    named = {
        group.label if len(group.reports) == 1 else f"{group.label}, report {number}": report
        for group in groups
        for number, report in enumerate(group.reports, 1)
    }
    (first_name, first), *others = named.items()
    reasons = [
        f"{name} has no outcomes per image (per_sample.npz), which pairing needs"
        for name, report in named.items()
        if not report.per_sample
    ]
    for name, report in others:
        reasons += [f"{name} against {first_name}: {reason}" for reason in differences_of(report, first)]
    if reasons:
        raise ValueError(f"not comparable: {'; '.join(dict.fromkeys(reasons))}")
    attacks = dict.fromkeys(attack for report in named.values() for attack in report.results())
    shared = [attack for attack in attacks if all(attack in report.results() for report in named.values())]
    notes = [
        f"{attack_label(attack)} is not compared: {', '.join(lacking)} "
        f"{'was' if len(lacking) == 1 else 'were'} evaluated without it"
        for attack in attacks
        if (lacking := [name for name, report in named.items() if attack not in report.results()])
    ]
    notes += [
        f"the union of {name} is incomplete: it lacks {', '.join(report.missing)}"
        for name, report in named.items()
        if report.missing and "union" in shared
    ]
    quantities = ["clean", *(name for attack in shared for name in (attack, f"{attack} A_w"))]
    rows: list[Measured] = []
    for quantity in quantities:
        values: Sequence[float | None] = [
            p_value(group.reports[0], groups[0].reports[0], quantity)
            if len(group.reports) == len(groups[0].reports) == 1
            else None
            for group in groups[1:]
        ]
        levels = [LEVEL] * len(values)
        if adjust == "holm":
            values, levels = holm([p for p in values if p is not None])
        rows.append(_measured(groups[0], groups[0], quantity, seed))
        for group, p, level in zip(groups[1:], values, levels, strict=True):
            rows.append(replace(_measured(group, groups[0], quantity, seed, level), p=p))
    return ReportComparison(tuple(groups), tuple(rows), tuple(notes), adjust)


def _measured(group: Group, baseline: Group, quantity: str, seed: int, level: float = LEVEL) -> Measured:
    values = np.stack([outcomes(report, quantity) for report in group.reports])  # [reports, n]
    accuracies = values.mean(1)
    n = values.shape[1]
    if len(values) > 1:
        interval = t_interval(accuracies)
    elif quantity.endswith(" A_w"):
        interval = bootstrap_interval(values[0], seed=seed)
    else:
        interval = wilson_interval(int(values.sum()), n)
    measured = Measured(group.label, quantity, float(accuracies.mean()), interval)
    if group is baseline:
        return measured
    other = np.stack([outcomes(report, quantity) for report in baseline.reports])
    difference, interval = paired_difference(values.mean(0), other.mean(0), level=level, seed=seed)
    return replace(
        measured,
        difference=difference,
        over_images=interval,
        over_seeds=_over_seeds(group, accuracies, baseline, other.mean(1)),
        level=level,
    )


def _over_seeds(group: Group, accuracies: Array, baseline: Group, other: Array) -> Interval | None:
    if min(len(accuracies), len(other)) < 2:
        return None
    if group.seeds is not None and baseline.seeds is not None and {*group.seeds} == {*baseline.seeds}:
        order = [baseline.seeds.index(one) for one in group.seeds]
        return t_interval(accuracies - other[order])
    return welch_interval(accuracies, other)


def load_groups(sources: Sequence[str | Path], name: str = "default") -> list[Group]:
    """The reports in ``sources``; several trainings of one configuration become one group.

    Args:
        sources: each a run folder (its evaluation ``name``), the folder of an evaluation, or its
            ``report.json``. Runs whose ``config.json`` differ in the seed only are one group, unless there is
            no other group to compare them with.
        name: name of the evaluation in run folders.

    Raises:
        FileNotFoundError, ValueError: a source has no report, or it is damaged.
    """
    folders = [report_folder(source, name) for source in sources]
    reports = [Report.load(folder) for folder in folders]
    labels = source_labels([Path(source) for source in sources])
    configs = [_configuration(folder) for folder in folders]
    by_config: dict[str, list[int]] = {}
    for number, config in enumerate(configs):
        key = f"single {number}" if config is None else config[0]
        by_config.setdefault(key, []).append(number)
    if len(by_config) == 1:  # trainings of one configuration are compared with each other
        return [Group(label, (one,)) for label, one in zip(labels, reports, strict=True)]
    groups: list[Group] = []
    for numbers in by_config.values():
        seeds = [config[1] for number in numbers if (config := configs[number]) is not None]
        if len(numbers) == 1 or len(set(seeds)) < len(numbers):  # one seed twice: no sample of trainings
            groups += [Group(labels[number], (reports[number],)) for number in numbers]
            continue
        members = tuple(reports[number] for number in numbers)
        label = f"{_common(labels, numbers)} ({len(numbers)} seeds)"
        groups.append(Group(label, members, tuple(seeds)))
    return groups


def report_folder(source: str | Path, name: str = "default") -> Path:
    """The folder of the report that ``source`` names, see :func:`load_groups`."""
    path = expanded(source)
    if path.is_file():
        return path.resolve().parent
    if not path.exists():
        raise FileNotFoundError(
            f"{source} does not exist: give a run folder, RUN/evaluations/NAME, or a report.json"
        )
    if (path / "evaluations").is_dir() or is_run(path):
        folder = path / "evaluations" / name
        if not (folder / "report.json").is_file():
            option = "" if name == "default" else f" --name {name}"
            raise FileNotFoundError(
                f"{source} has no evaluation {name!r}: run awnet evaluate {source}{option}"
            )
        return folder
    return path


def _configuration(folder: Path) -> tuple[str, int] | None:
    """A text that is equal for trainings that differ in the seed only, and the seed; None without a run."""
    run = folder.resolve().parent.parent
    if folder.resolve().parent.name != "evaluations" or not is_run(run):
        return None
    config = read_config(run)
    seed = config.pop("seed", None)
    if not isinstance(seed, int):
        return None
    for key in ("kind", "sessions", "format"):
        config.pop(key, None)
    dataset = config.get("dataset")
    if isinstance(dataset, dict):
        dataset.pop("fingerprints", None)  # the seed chooses the validation images
        dataset.pop("source", None)
    for about in (config.get("teachers") or {}).values():
        if isinstance(about, dict):
            about.pop("weights", None)  # each seed has its own teachers
    return json.dumps(config, sort_keys=True, default=str), seed


def source_labels(paths: Sequence[Path]) -> list[str]:
    """A unique name for each path: that of its run, or the path if two runs have the same name."""
    names = []
    for path in paths:
        folder = path.parent if path.name == "report.json" else path
        parts = expanded(folder).resolve().parts
        if len(parts) > 2 and parts[-2] == "evaluations":
            parts = parts[:-2] if parts[-1] == "default" else (*parts[:-3], f"{parts[-3]} {parts[-1]}")
        names.append(parts[-1])
    unique = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    return [
        label if unique.count(label) == 1 else f"{label} ({number})" for number, label in enumerate(unique, 1)
    ]


def _common(labels: Sequence[str], numbers: Sequence[int]) -> str:
    """The common prefix of the labels ``numbers``, or the first label if that is too short."""
    names = [labels[number] for number in numbers]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    shared = "".join(letters[0] for letters in same).rstrip("-_. ")
    return shared if len(shared) > 2 else names[0]

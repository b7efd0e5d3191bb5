"""The common parts of the pages and JSON records of experiments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from awnet.devices import resolve_device
from awnet.evaluation.paper import paper_rows
from awnet.evaluation.results import AttackResult
from awnet.evaluation.tables import attack_label
from awnet.provenance import environment
from awnet.reproduce.experiments import Experiment
from awnet.reproduce.runs import Runs, Training


def attack_settings(name: str, result: AttackResult) -> str:
    """The settings of an attack, or the members of a union, as a sentence."""
    settings = result.settings
    if "members" in settings:
        text = ", ".join(settings["members"])
    else:
        shown = {k: v for k, v in settings.items() if k not in ("attack", "seed", "eps")}
        text = ", ".join(
            f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in shown.items()
            if isinstance(value, str | int | float)
        )
    return f"{table_label(name)}: {text or 'see report.json'}."


def table_label(name: str) -> str:
    """The name of an attack in text; empty for no attack."""
    if name.startswith("transfer_"):
        return f"{table_label(name.removeprefix('transfer_'))}, transferred"
    return attack_label(name)


def opening(name: str, experiment: Experiment, lines: Sequence[str]) -> list[str]:
    """The title of a page, and the ``lines`` of :func:`statement`."""
    return [f"# {name}: {experiment.title}", "", *(f"- {line}" for line in lines), ""]


def record(name: str, experiment: Experiment, runs: Runs, lines: list[str]) -> dict[str, Any]:
    """The entries that ``table.json`` has for every experiment; ``lines`` are those of :func:`statement`."""
    return {
        "experiment": name,
        "title": experiment.title,
        "budget": runs.budget_name,
        "statement": lines,
        "environment": environment(resolve_device(runs.device or "cpu")),
    }


def statement(experiment: Experiment, runs: Runs, seeds: Sequence[int] = ()) -> list[str]:
    """What our values were measured on, as text; ``seeds``: those of several trainings of each network."""
    lines = []
    for dataset in experiment.datasets:
        splits = runs.splits(dataset)
        lines.append(
            f"Data: {splits.train.name}, {len(splits.train)} training, {len(splits.validation)} validation "
            f"and {len(splits.test)} test images ({splits.train.source}); L-infinity eps "
            f"{splits.test.threat_model.eps:.4g}."
        )
    if runs.networks:
        given = ", ".join(f"{label} from {folder.name}" for label, folder in runs.networks.items())
        lines.append(
            f"Networks trained before: {given}; widths, recipes and epochs differ from the paper's as the "
            "table of trainings shows."
        )
    else:
        lines += _trained_as(runs, seeds)
    lines += [
        *experiment.notes,
        *(f"{system} was not measured: {reason}." for system, reason in runs.skipped.items()),
    ]
    if experiment.table is not None:
        lines += [
            f"Table {experiment.table}, {row.system}, {row.attack}: {row.note}."
            for row in paper_rows(experiment.table)
            if row.note
        ]
    return lines


def _trained_as(runs: Runs, seeds: Sequence[int]) -> list[str]:
    """How the networks are trained under the budget, as text."""
    budget = runs.budget
    channels = "" if budget.width == 1 else f"channels × {budget.width:g}; "
    trainings = f"seed {runs.seed}, one run of each network"
    if seeds:
        trainings = f"{len(seeds)} runs of each network, seeds {', '.join(map(str, seeds))}"
    return [
        f"Budget {runs.budget_name}: {budget.about}.",
        f"Training: {channels}{trainings}; the checkpoint is the best on the validation images (the paper "
        "selected on the test images).",
        *_budget_settings(runs),
    ]


def _budget_settings(runs: Runs) -> list[str]:
    settings = runs.budget.settings
    if not settings:
        return []
    eps = "attack_step_size"  # in image units, shown in 255ths
    texts = [f"{k.replace('_', ' ')} {f'{255 * v:.3g}/255' if k == eps else v}" for k, v in settings.items()]
    return [f"Settings of all recipes: {', '.join(texts)}."]


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    """A table in Markdown; columns after the first ``text_columns`` are aligned to the right."""
    rule = ["---"] * text_columns + ["--:"] * (len(headings) - text_columns)
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def training_section(trainings: Sequence[Training], title: str = "Trainings") -> list[str]:
    """A table with a row for each training."""
    counted = any(one.multiply_adds is not None for one in trainings)
    headings = ["data", "network trained", "as", "recipe", "parameters", "epochs", "minutes"]
    rows = []
    for one in trainings:
        cells = [one.dataset, one.label, one.network, one.recipe, f"{one.parameters:,}", str(one.epochs)]
        cells.append("–" if one.seconds is None else f"{one.seconds / 60:.1f}")
        if counted:
            cells.append("–" if one.multiply_adds is None else f"{one.multiply_adds / 1e12:.2f}")
        rows.append(cells)
    table = markdown_table([*headings, *(["multiply-adds, 10¹²"] if counted else [])], rows, 4)
    return section(f"{title}, with wall-clock minutes of a machine that may have done other work", table)


def section(title: str, lines: Sequence[str]) -> list[str]:
    """A heading with its lines; nothing without lines."""
    return [f"## {title}", "", *lines, ""] if lines else []

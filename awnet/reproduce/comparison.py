"""Comparison of two run folders: settings, training, evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from awnet.analysis import compared_curves
from awnet.evaluation import Report, compare, comparison_table, w_robust_table
from awnet.evaluation.results import Comparison
from awnet.run_config import read_config
from awnet.training.checkpoint import differences
from awnet.training.logging import read_log

_APART = ("kind", "sessions", "format")  # parts of config.json that are not settings


@dataclass(frozen=True)
class RunComparison:
    """What :func:`compare_runs` returns.

    settings: those of ``config.json`` that differ, by name, in both runs; reports: the evaluations, by run;
    paired: a minus b on the same images, None if the evaluations cannot be paired; curves: the figure.
    """

    labels: tuple[str, str]
    settings: dict[str, tuple[Any, Any]]
    best: tuple[dict[str, float], dict[str, float]]
    reports: dict[str, Report]
    paired: Comparison | None
    curves: Path | None
    notes: list[str]

    def tables(self) -> list[Table]:
        """Tables for the terminal: settings, validation, and accuracies if there are evaluations."""
        tables = [_settings(self), _validation(self)]
        if self.reports:
            tables.append(w_robust_table(self.reports))
        if self.paired is not None:
            report = self.reports[self.labels[0]]
            report.compared_with = {self.labels[1]: self.paired}
            tables.append(comparison_table(report, label=self.labels[0]))
        return tables


def compare_runs(
    a: str | Path, b: str | Path, *, name: str = "default", out: str | Path | None = None
) -> RunComparison:
    """Compares the runs in the folders ``a`` and ``b``.

    Args:
        a, b: run folders.
        name: name of the evaluations, ``evaluations/<name>``.
        out: PNG file for the training curves of both runs; None for no figure.

    Raises:
        FileNotFoundError, ValueError: a folder is not a run.
    """
    folders = [Path(a), Path(b)]
    labels = _labels(folders)
    configs = [{k: v for k, v in read_config(f).items() if k not in _APART} for f in folders]
    logs = [_epochs(folder) for folder in folders]
    best = [max((r for r in log if _score(r) is not None), key=_score, default={}) for log in logs]
    notes, reports = [], {}
    for label, folder in zip(labels, folders, strict=True):
        if (folder / "evaluations" / name / "report.json").is_file():
            reports[label] = Report.load(folder / "evaluations" / name)
        else:
            command = f"awnet evaluate {folder}" + ("" if name == "default" else f" --name {name}")
            notes.append(f"{folder} has no evaluation {name!r}: {command}")
    paired = None
    if len(reports) == 2:
        try:
            paired = compare(reports[labels[0]], reports[labels[1]])
        except ValueError as error:
            notes.append(f"not paired by image: {error}")
    curves = None
    if out is not None and all(logs):
        curves = Path(out)
        compared_curves(dict(zip(labels, logs, strict=True)), curves)
        notes.append(f"training curves: {curves}")
    return RunComparison(labels, _differing(*configs), (best[0], best[1]), reports, paired, curves, notes)


def _labels(folders: Sequence[Path]) -> tuple[str, str]:
    """The names of the folders, or their paths if the names are equal."""
    names = [folder.resolve().name for folder in folders]
    first, second = names if names[0] != names[1] else map(str, folders)
    return (first, second) if first != second else (f"{first} (a)", f"{second} (b)")


def _epochs(folder: Path) -> list[dict[str, Any]]:
    try:
        return read_log(folder, "epoch")
    except FileNotFoundError:
        return []


def _score(record: dict[str, Any]) -> Any:
    return record.get("w_robust_accuracy", record.get("clean_accuracy"))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in _flat(part, f"{path}.{name}").items()}
    return {path.removeprefix("."): value}


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    first, second = _flat(a), _flat(b)
    names = [name for name in {**first, **second} if list(differences(first.get(name), second.get(name), ""))]
    return {name: (first.get(name), second.get(name)) for name in names}


def _settings(comparison: RunComparison) -> Table:
    table = Table(title="Settings that differ", box=SIMPLE_HEAD)
    for heading in ("", *comparison.labels):
        table.add_column(escape(heading), overflow="fold")
    for name, values in comparison.settings.items():
        table.add_row(escape(name), *("–" if v is None else escape(str(v)) for v in values))
    if not comparison.settings:
        table.add_row("none", "", "")
    return table


def _validation(comparison: RunComparison) -> Table:
    table = Table(title="Best validation, percent", box=SIMPLE_HEAD)
    for heading in ("", *comparison.labels, "difference"):
        table.add_column(escape(heading), justify="right" if heading else "left")
    table.add_row("epoch", *(str(best.get("epoch", "–")) for best in comparison.best), "")
    for name, label in (
        ("clean_accuracy", "clean"), ("robust_accuracy", "robust"), ("w_robust_accuracy", "A_w"),
    ):  # fmt: skip
        values = [best.get(name) for best in comparison.best]
        if values != [None, None]:
            cells = ["–" if value is None else f"{100 * value:.1f}" for value in values]
            known = [value for value in values if value is not None]
            table.add_row(label, *cells, f"{100 * (known[0] - known[1]):+.1f}" if len(known) == 2 else "")
    return table

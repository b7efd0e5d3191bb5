"""Comparison of run folders: settings, training and, by image, evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from awnet.analysis import compared_curves
from awnet.evaluation.comparison import (
    Adjust,
    ReportComparison,
    compare_reports,
    load_groups,
    report_folder,
    source_labels,
)
from awnet.files import expanded, make_folder
from awnet.run_config import is_run, read_config
from awnet.training.checkpoint import differences
from awnet.training.logging import read_log

_NOT_SETTINGS = ("kind", "sessions", "format")  # parts of config.json that are not settings


@dataclass(frozen=True)
class RunComparison:
    """The result of :func:`compare_runs`.

    settings: the settings in ``config.json`` that differ, by name, one value for each run; best: the record
    of the best validation of each run; curves: the figure, or None; notes: what was not compared, and why.
    """

    labels: tuple[str, ...]
    settings: dict[str, tuple[Any, ...]]
    best: tuple[dict[str, float], ...]
    curves: Path | None
    notes: tuple[str, ...]

    def tables(self) -> list[Table]:
        """Tables for the terminal: settings and validation."""
        return [_settings(self), _validation(self)]


def compare_runs(
    folders: Sequence[str | Path], *, name: str = "default", out: str | Path | None = None
) -> RunComparison:
    """Compares settings and training curves of the runs in ``folders``.

    Args:
        folders: two or more run folders.
        name: name of the evaluations, ``evaluations/<name>``; a run that lacks it gets a note.
        out: folder for the training curves of all runs, ``training.png``; None for no figure.

    Raises:
        FileNotFoundError, ValueError: a folder is not a run.
    """
    paths = [expanded(folder) for folder in folders]
    labels = source_labels(paths)
    configs = [{k: v for k, v in read_config(path).items() if k not in _NOT_SETTINGS} for path in paths]
    logs = [_epochs(path) for path in paths]
    best = [max((r for r in log if _score(r) is not None), key=_score, default={}) for log in logs]
    notes = [note for path in paths if (note := _missing_report(path, name))]
    curves = None
    if out is not None and all(logs):
        curves = make_folder(expanded(out)) / "training.png"
        compared_curves(dict(zip(labels, logs, strict=True)), curves)
    return RunComparison(tuple(labels), _differing(configs), tuple(best), curves, tuple(notes))


def compare_sources(
    sources: Sequence[str | Path], *, name: str = "default", adjust: Adjust = "none"
) -> ReportComparison | None:
    """Compares evaluations by image, see :func:`load_groups` and :func:`compare_reports`.

    If all sources are run folders, those without the evaluation are left out; then None if fewer than two
    have it.

    Raises:
        FileNotFoundError, ValueError: fewer than two sources, one that holds no report, or reports that
            cannot be compared.
    """
    if len(sources) < 2:
        raise ValueError(f"a comparison needs two or more reports, got {len(sources)}")
    if all(map(is_run, sources)):
        sources = [source for source in sources if _missing_report(source, name) is None]
        if len(sources) < 2:
            return None
    return compare_reports(load_groups(sources, name), adjust=adjust)


def _missing_report(run: str | Path, name: str) -> str | None:
    """A message if ``run`` has no evaluation ``name``, else None."""
    try:
        report_folder(run, name)
    except FileNotFoundError as error:
        return str(error)
    return None


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


def _differing(configs: Sequence[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    flat = [_flat(config) for config in configs]
    values = {
        name: tuple(one.get(name) for one in flat)
        for name in dict.fromkeys(key for one in flat for key in one)
    }
    return {
        name: row for name, row in values.items() if any(list(differences(row[0], v, "")) for v in row[1:])
    }


def _settings(comparison: RunComparison) -> Table:
    table = Table(title="Settings that differ", box=SIMPLE_HEAD)
    for heading in ("", *comparison.labels):
        table.add_column(escape(heading), overflow="fold")
    for name, values in comparison.settings.items():
        table.add_row(escape(name), *("–" if v is None else escape(str(v)) for v in values))
    if not comparison.settings:
        table.add_row("none", *("" for _ in comparison.labels))
    return table


def _validation(comparison: RunComparison) -> Table:
    table = Table(title="Best validation, percent", box=SIMPLE_HEAD)
    for heading in ("", *comparison.labels):
        table.add_column(escape(heading), justify="right" if heading else "left")
    table.add_row("epoch", *(str(best.get("epoch", "–")) for best in comparison.best))
    for name, label in (
        ("clean_accuracy", "clean"), ("robust_accuracy", "robust"), ("w_robust_accuracy", "A_w"),
    ):  # fmt: skip
        values = [best.get(name) for best in comparison.best]
        if any(value is not None for value in values):
            table.add_row(label, *("–" if value is None else f"{100 * value:.1f}" for value in values))
    return table

"""The report of an evaluation: its files, checked when they are read, and its tables."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from awnet.data.threat_model import check_norm
from awnet.evaluation import figures, html, store, tables
from awnet.evaluation.results import AttackDifference, AttackResult, Comparison, Results
from awnet.files import expanded, write_json, write_text
from awnet.scalars import is_number

_ARRAYS = ("per_sample", "examples", "filter_means")  # fields that are stored in .npz files


class Report(Results):
    """The results of an evaluation, with files and tables. :meth:`to_dict` is what ``report.json`` holds."""

    def _repr_html_(self) -> str:
        """The accuracies as a table, for a notebook."""
        return html.summary(self)

    def table(self) -> Table:
        """A table for the terminal: A_nat, then A_adv and A_w for each attack, percent ± half an interval."""
        return tables.w_robust_table({self.model: self})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready; keys without content are left out."""
        values = {name: value for name, value in asdict(self).items() if name not in _ARRAYS}
        results = [*values["attacks"].values(), values["union"] or {}]
        for part, kind in ((values, Results), *((result, AttackResult) for result in results)):
            for field in fields(kind):
                optional = field.default is not MISSING or field.default_factory is not MISSING
                if optional and not part.get(field.name):
                    part.pop(field.name, None)
        plain: dict[str, Any] = json.loads(json.dumps(values))  # tuples become lists
        return plain

    def save(self, folder: str | Path, training_log: str | Path | None = None) -> Path:
        """Writes ``report.json``, ``report.html``, the arrays and the figures; returns the path of the first.

        They replace those of an earlier evaluation in ``folder`` together or not at all: if the process is
        killed, :meth:`load` reads the old report or the new one. Other files in ``folder`` are kept.

        Args:
            folder: the folder to write; it is created if needed.
            training_log: the run's ``log.jsonl``, for a figure of its training curves.

        Raises:
            BlockingIOError: another process evaluates in ``folder``.
        """
        folder = expanded(folder)
        with store.locked(folder):
            self._write(folder, training_log)
        return folder / store.REPORT

    def publish(self, run_folder: str | Path, name: str = "default") -> Path:
        """Writes the report into ``run_folder`` as its evaluation ``name``; returns that folder.

        ``report.json`` in ``run_folder`` becomes a link to that of this evaluation. The caller holds the lock
        of the evaluation's folder (:func:`awnet.evaluation.store.locked`).
        """
        run_folder = expanded(run_folder)
        folder, log = run_folder / "evaluations" / name, run_folder / "log.jsonl"
        if (folder / store.REPORT).is_file():
            store.link(folder / store.REPORT, run_folder / store.REPORT)
        self._write(folder, log if log.is_file() else None)
        store.link(folder / store.REPORT, run_folder / store.REPORT)
        return folder

    def _write(self, folder: Path, training_log: str | Path | None) -> None:
        known = (store.REPORT, "report.html", *html.FIGURES, *(f"{name}.npz" for name in _ARRAYS))
        with store.replaced_together(folder, known) as new:
            for name in _ARRAYS:
                arrays = getattr(self, name)
                if arrays:
                    with open(new / f"{name}.npz", "wb") as file:
                        np.savez_compressed(file, **arrays)
            figures.draw(self, new, None if training_log is None else Path(training_log))
            write_text(new / "report.html", html.page(self, new, folder))
            write_json(new / store.REPORT, self.to_dict())

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """The report that :meth:`save` wrote into ``folder``, or the newest one of the run in ``folder``.

        Every file is checked against the checksums that were written with it, and the accuracies against the
        outcomes per image.

        Raises:
            FileNotFoundError: there is no report.
            ValueError: the report is damaged, was not written by awnet, or its files belong to different
                evaluations.
        """
        folder = _evaluation_folder(expanded(folder))
        path = folder / store.REPORT
        contents = store.read_together(folder, (store.REPORT, *(f"{name}.npz" for name in _ARRAYS)))
        if store.REPORT not in contents:
            raise FileNotFoundError(f"{path} does not exist: {_where_reports_are(folder)}")
        try:
            values = json.loads(contents[store.REPORT])
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not readable as JSON: {error}") from error
        try:
            report = cls._from_dict(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a report of this version: {error}; evaluate again") from error
        for name in _ARRAYS:
            data = contents.get(f"{name}.npz")
            if data is not None:
                try:
                    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                        setattr(report, name, dict(arrays))
                except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
                    raise ValueError(
                        f"{folder / f'{name}.npz'} is damaged: {error}; evaluate again"
                    ) from error
        report._check_arrays(folder)
        return report

    @classmethod
    def _from_dict(cls, values: dict[str, Any]) -> Report:
        values["attacks"] = {
            name: AttackResult(**_tuples(value)) for name, value in values["attacks"].items()
        }
        if "union" in values:
            values["union"] = AttackResult(**_tuples(values["union"]))
        values["compared_with"] = {
            name: Comparison(**_tuples(value)) for name, value in values.get("compared_with", {}).items()
        }
        for comparison in values["compared_with"].values():
            comparison.attacks = {
                name: AttackDifference(**_tuples(value)) for name, value in comparison.attacks.items()
            }
        report = cls(**_tuples(values))
        report._check_types()
        return report

    def _check_arrays(self, folder: Path) -> None:
        """Raises ValueError if the accuracies differ from the means of the outcomes per image."""
        accuracies = {"clean": self.clean_accuracy}
        accuracies |= {name: result.robust_accuracy for name, result in self.results().items()}
        for kind, accuracy in accuracies.items():
            correct = self.per_sample.get(f"{kind}_correct")
            if self.per_sample and (
                correct is None or correct.shape != (self.n,) or correct.mean() != accuracy
            ):
                raise ValueError(
                    f"{folder}: report.json and per_sample.npz are not of the same evaluation: their {kind} "
                    "outcomes differ; evaluate again"
                )

    def _check_types(self) -> None:
        """Raises TypeError, naming the entry, if a value has another type than evaluations write."""
        check_norm(self.norm)
        texts = {name: getattr(self, name) for name in ("model", "dataset", "split")}
        numbers = {name: getattr(self, name) for name in ("n", "eps", "clean_accuracy")}
        intervals = {"clean_interval_95": self.clean_interval_95}
        dicts = {name: getattr(self, name) for name in ("attacks", "router_auc", "settings", "environment")}
        for attack, result in self.results().items():
            numbers |= {f"{attack}.{n}": getattr(result, n) for n in ("robust_accuracy", "w_robust_accuracy")}
            intervals |= {f"{attack}.{n}": getattr(result, n) for n in ("interval_95", "w_interval_95")}
            dicts[f"{attack}.settings"] = result.settings
        numbers |= {f"{name}[{i}]": v for name, pair in intervals.items() for i, v in enumerate(pair)}
        for values, holds, kind in (
            (texts, lambda v: isinstance(v, str), "a text"),
            (numbers, is_number, "a number"),
            (intervals, lambda v: isinstance(v, tuple) and len(v) == 2, "two numbers"),
            (dicts, lambda v: isinstance(v, dict), "a dict"),
            ({"flags": self.flags}, lambda v: isinstance(v, list), "a list"),
        ):
            for name, value in values.items():
                if not holds(value):
                    raise TypeError(f"{name} must be {kind}, got {repr(value)[:60]}")


def _evaluation_folder(folder: Path) -> Path:
    """For a run folder the folder of the evaluation that its ``report.json`` comes from, else ``folder``."""
    path = folder / store.REPORT
    if path.is_symlink():
        return path.resolve().parent
    if path.is_file():  # a copy, on a file system without links
        report = path.read_bytes()
        for candidate in sorted(folder.glob(f"evaluations/*/{store.REPORT}")):
            if candidate.read_bytes() == report:
                return candidate.parent
    return folder


def _where_reports_are(folder: Path) -> str:
    """Advice for a folder without report.json."""
    if not folder.exists():
        parent = folder.parent
        if parent.name == "evaluations" and parent.is_dir():
            names = ", ".join(
                sorted(entry.name for entry in parent.iterdir() if (entry / "report.json").is_file())
            )
            return f"{parent.parent} has no evaluation {folder.name!r}, it has {names or 'none'}"
        run = parent.parent if parent.name == "evaluations" else folder
        if not run.exists():
            return f"there is no folder {run}; give a run folder, or RUN/evaluations/NAME"
        if parent.name == "evaluations":
            return f"{run} was not evaluated: do that first, by `awnet evaluate {run}` or out={str(run)!r}"
    return (
        "give the folder of an evaluation, RUN/evaluations/NAME, or that of a run which was evaluated by "
        f"`awnet evaluate {folder}` or with out={str(folder)!r}"
    )


def check_name(name: str) -> None:
    """Raises ValueError unless ``name`` can be the name of a folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"name must be letters, digits, '.', '_' and '-', as it names a folder, got {name!r}"
        )


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with the intervals as tuples again."""
    return {
        name: tuple(value) if name.endswith("interval_95") and isinstance(value, list) else value
        for name, value in values.items()
    }

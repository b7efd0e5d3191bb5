"""What an evaluation found, its files and its comparison with other models."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from awnet.evaluation import store
from awnet.evaluation.detection import detection_flags
from awnet.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    mcnemar,
    w_robust_accuracy,
    wilson_interval,
)
from awnet.files import expanded, write_json, write_text
from awnet.scalars import is_number

if TYPE_CHECKING:
    from rich.table import Table

Array = NDArray[Any]

_ARRAYS = ("per_sample", "examples", "filter_means")  # of a report: files of their own


@dataclass
class AttackResult:
    """Accuracy under one attack, fractions; intervals are 95 %."""

    robust_accuracy: float
    """A_adv: accuracy on x_adv over all images, those that were wrong before the attack included."""
    w_robust_accuracy: float
    """A_w = ½A_nat + ½A_adv (Eq. 23)."""
    interval_95: Interval
    """Wilson's interval of ``robust_accuracy``."""
    w_interval_95: Interval
    """Bootstrap interval of ``w_robust_accuracy`` over images, clean and adversarial outcome paired."""
    settings: dict[str, Any]
    broken_first_by: dict[str, int] = field(default_factory=dict)
    """Of an attack made of several: how many images each of them broke first."""
    warnings: dict[str, int] = field(default_factory=dict)
    """What AutoAttack's own checks warn of, in counts (see :class:`awnet.attacks.AutoAttack`)."""


@dataclass
class AttackDifference:
    """Another model under one attack, and this model minus that one, on the same images."""

    robust_accuracy: float
    w_robust_accuracy: float
    w_interval_95: Interval
    """These three are the other model's."""
    difference: float
    """Of A_w: positive where this model is better."""
    interval_95: Interval
    """Paired bootstrap interval of ``difference``."""
    mcnemar_p: float
    """Exact p for equal accuracy on x_adv."""


@dataclass
class Comparison:
    """This model against another one."""

    model: str
    clean_accuracy: float
    clean_difference: float
    clean_interval_95: Interval
    clean_mcnemar_p: float
    attacks: dict[str, AttackDifference]


@dataclass(eq=False, repr=False)
class Report:
    """An evaluation; :meth:`to_dict` is what ``report.json`` holds. Accuracies are fractions."""

    model: str
    dataset: str
    split: str
    n: int
    eps: float
    clean_accuracy: float
    clean_interval_95: Interval
    attacks: dict[str, AttackResult]
    router_auc: dict[str, float]
    """How well the type logits tell each attack, and noise as a control, from clean images."""
    flags: list[str]
    """What a reader should know before believing the numbers."""
    settings: dict[str, Any]
    environment: dict[str, Any]
    exits: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of a network with side exits, for each kind of image: ``mean_exit`` (the first is 1), each exit's
    ``shares``, ``mean_flops`` of an image that leaves there, and ``full_flops`` of one that never does."""
    selected_on: str | None = None
    """The split whose images chose the checkpoint; None where that is not known."""
    union: AttackResult | None = None
    """The worst case, image by image, over all attacks: the headline where it was measured."""
    detection: dict[str, Any] = field(default_factory=dict)
    """``router_auc`` with intervals, over broken images and with controls, see :func:`detection`."""
    sanity: list[dict[str, str]] = field(default_factory=list)
    """Lines of the sanity table: ``check``, ``result`` (pass or suspicious), ``evidence``."""
    curves: dict[str, Any] = field(default_factory=dict)
    """What the sanity table was read from, see :func:`sanity_table`."""
    compared_with: dict[str, Comparison] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Attacks that belong to the union but could not run, and why: its figure may be too high."""
    per_sample: dict[str, Array] = field(default_factory=dict, repr=False)
    """``index``, ``label``, and for each kind of image ``<kind>_correct`` and the like, all ``[n]``."""
    examples: dict[str, Array] = field(default_factory=dict, repr=False)
    """A few broken images: ``clean``, ``adversarial`` [k, C, H, W], ``label``, ``before``, ``after`` [k]."""
    filter_means: dict[str, Array] = field(default_factory=dict, repr=False)
    """``<kind>/<layer>`` → ``[C_out]``: mean of each filter's weights, see :func:`filter_means`."""

    def __repr__(self) -> str:
        """The accuracies in percent, on one line."""
        results = ", ".join(f"{name} {100 * r.robust_accuracy:.1f}" for name, r in self.results().items())
        doubts = f"; {len(self.flags)} doubt{'s' * (len(self.flags) != 1)}, see .flags" if self.flags else ""
        return (
            f"Report({self.model} on {self.n} {self.split} images of {self.dataset}, L-infinity eps "
            f"{self.eps:.4g}: clean {100 * self.clean_accuracy:.1f} %{', robust ' * bool(results)}{results}"
            f"{doubts})"
        )

    def _repr_html_(self) -> str:
        """The same as a table, for a notebook."""
        from awnet.evaluation.html import summary

        return summary(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-ready; keys without content are left out."""
        whole = asdict(self)
        for name in _ARRAYS:
            del whole[name]
        for name in (
            "selected_on",
            "router_auc",
            "exits",
            "union",
            "detection",
            "sanity",
            "curves",
            "compared_with",
            "missing",
        ):
            if not whole[name]:
                del whole[name]
        for result in (*whole["attacks"].values(), whole.get("union", {})):
            for name in ("broken_first_by", "warnings"):
                if not result.get(name):
                    result.pop(name, None)
        plain: dict[str, Any] = json.loads(json.dumps(whole))  # tuples become lists
        return plain

    def save(self, folder: str | Path, training_log: str | Path | None = None) -> Path:
        """Writes ``report.json``, ``report.html``, the arrays and the figures; returns the path of the first.

        They replace those of an earlier evaluation in ``folder`` together or not at all: after a kill at any
        moment :meth:`load` finds the old report or the new one. Other files in ``folder`` stay.

        Args:
            folder: is made where it is missing.
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
        from awnet.evaluation.figures import draw
        from awnet.evaluation.html import FIGURES, page

        known = (store.REPORT, "report.html", *FIGURES, *(f"{name}.npz" for name in _ARRAYS))
        with store.replaced_together(folder, known) as new:
            for name in _ARRAYS:
                arrays = getattr(self, name)
                if arrays:
                    with open(new / f"{name}.npz", "wb") as file:
                        np.savez_compressed(file, **arrays)
            draw(self, new, None if training_log is None else Path(training_log))
            write_text(new / "report.html", page(self, new, folder))
            write_json(new / store.REPORT, self.to_dict())

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """The report that :meth:`save` wrote into ``folder``, or the newest one of the run in ``folder``.

        Every file is checked against the checksums that were written with it, and the accuracies against the
        outcomes per image.

        Raises FileNotFoundError where there is none, ValueError where it is damaged or foreign, or where its
        files are of different evaluations.
        """
        folder = _evaluation_folder(expanded(folder))
        path = folder / store.REPORT
        contents = store.read_together(folder, (store.REPORT, *(f"{name}.npz" for name in _ARRAYS)))
        if store.REPORT not in contents:
            raise FileNotFoundError(f"{path} does not exist: {_where_reports_are(folder)}")
        try:
            whole = json.loads(contents[store.REPORT])
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not readable as JSON: {error}") from error
        try:
            whole["attacks"] = {
                name: AttackResult(**_tuples(value)) for name, value in whole["attacks"].items()
            }
            if "union" in whole:
                whole["union"] = AttackResult(**_tuples(whole["union"]))
            whole["compared_with"] = {
                name: Comparison(**_tuples(value)) for name, value in whole.get("compared_with", {}).items()
            }
            for comparison in whole["compared_with"].values():
                comparison.attacks = {
                    name: AttackDifference(**_tuples(value)) for name, value in comparison.attacks.items()
                }
            whole.setdefault("router_auc", {})
            report = cls(**_tuples(whole))
            report._check_types()
        except (KeyError, TypeError, AttributeError) as error:
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

    def _check_arrays(self, folder: Path) -> None:
        """ValueError where the outcomes per image do not give the accuracies."""
        claims = {"clean": self.clean_accuracy}
        claims |= {name: result.robust_accuracy for name, result in self.results().items()}
        for kind, claim in claims.items():
            correct = self.per_sample.get(f"{kind}_correct")
            if self.per_sample and (correct is None or correct.shape != (self.n,) or correct.mean() != claim):
                raise ValueError(
                    f"{folder}: report.json and per_sample.npz are not of the same evaluation: their {kind} "
                    "outcomes differ; evaluate again"
                )

    def _check_types(self) -> None:
        """Raises TypeError, naming the entry, where a value has another type than evaluations write."""
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

    def table(self) -> Table:
        """For the terminal: A_nat, then A_adv and A_w for each attack, per cent with half a 95 % interval."""
        from awnet.evaluation.table import w_robust_table

        return w_robust_table({self.model: self})

    @property
    def approximate(self) -> bool:
        """Whether it was measured in less than float32: then it has no headline."""
        return not str(self.settings.get("precision", "float32")).startswith(("float32", "float64"))

    def headline(self) -> tuple[str, AttackResult] | None:
        """The attack that the report is judged by, and its result; None where nothing attacked.

        The union where it was measured, else the strongest attack. Raises ValueError for figures that were
        measured in less than float32.
        """
        if self.approximate:
            raise ValueError(
                f"figures measured in {self.settings['precision']} are no headline: evaluate in float32"
            )
        if self.union is not None:
            return "union", self.union
        return min(self.attacks.items(), key=lambda item: item[1].robust_accuracy, default=None)

    def results(self) -> dict[str, AttackResult]:
        """All attacks, and the union last."""
        return self.attacks | ({} if self.union is None else {"union": self.union})

    def w_values(self, attack: str) -> Array:
        """½(clean correct) + ½(adversarial correct) of each image, ``[n]``: their mean is A_w."""
        clean, adversarial = self.per_sample["clean_correct"], self.per_sample[f"{attack}_correct"]
        return 0.5 * clean.astype(np.float64) + 0.5 * adversarial.astype(np.float64)


def _evaluation_folder(folder: Path) -> Path:
    """For a run folder the folder of the evaluation whose report it shows, else ``folder``."""
    path = folder / store.REPORT
    if path.is_symlink():
        return path.resolve().parent
    if path.is_file():  # a copy, where the file system has no links
        report = path.read_bytes()
        for copied in sorted(folder.glob(f"evaluations/*/{store.REPORT}")):
            if copied.read_bytes() == report:
                return copied.parent
    return folder


def _where_reports_are(folder: Path) -> str:
    """What to do about a folder without report.json."""
    if not folder.exists():
        near = folder.parent
        if near.name == "evaluations" and near.is_dir():
            names = ", ".join(sorted(one.name for one in near.iterdir() if (one / "report.json").is_file()))
            return f"{near.parent} has no evaluation {folder.name!r}, it has {names or 'none'}"
        run = near.parent if near.name == "evaluations" else folder
        if not run.exists():
            return f"there is no folder {run}; give a run folder, or RUN/evaluations/NAME"
        if near.name == "evaluations":
            return f"{run} was not evaluated: do that first, by `awnet evaluate {run}` or out={str(run)!r}"
    return (
        "give the folder of an evaluation, RUN/evaluations/NAME, or that of a run which was evaluated by "
        f"`awnet evaluate {folder}` or with out={str(folder)!r}"
    )


def attack_result(
    clean_correct: Array, correct: Array, settings: dict[str, Any], seed: int = 0
) -> AttackResult:
    """Accuracies and intervals from bool ``[n]`` outcomes on clean and adversarial images."""
    n, right = len(correct), int(correct.sum())
    values = 0.5 * clean_correct.astype(np.float64) + 0.5 * correct.astype(np.float64)
    return AttackResult(
        robust_accuracy=right / n,
        w_robust_accuracy=w_robust_accuracy(int(clean_correct.sum()) / n, right / n),
        interval_95=wilson_interval(right, n),
        w_interval_95=bootstrap_interval(values, seed=seed),
        settings=settings,
    )


def compare(this: Report, other: Report, seed: int = 0) -> Comparison:
    """``this`` minus ``other``, paired by image, for the attacks that both faced.

    Raises ValueError unless both saw the same images, with the same settings for each shared attack.
    """
    for report in (this, other):
        if not report.per_sample:
            raise ValueError(
                f"the report of {report.model} holds no per-sample outcomes, which pairing needs"
            )
    for name in ("index", "label"):
        same = np.array_equal(this.per_sample[name], other.per_sample[name])
        if not same or (this.dataset, this.split) != (other.dataset, other.split):
            raise ValueError(
                f"{this.model} and {other.model} were not evaluated on the same images: "
                f"{this.n} of {this.dataset} {this.split} and {other.n} of {other.dataset} {other.split}; "
                "evaluate both alike"
            )
    if this.approximate != other.approximate:
        raise ValueError(
            f"{this.model} and {other.model} were evaluated in different precisions: evaluate both in float32"
        )
    attacks = {}
    ours, others = this.results(), other.results()
    for name in (name for name in ours if name in others):
        # the union has the attacks that apply to a model, and starts from its own router's mean ω
        if name != "union" and ours[name].settings != others[name].settings:
            raise ValueError(
                f"{this.model} and {other.model} faced {name} with different settings, "
                f"{ours[name].settings} and {others[name].settings}: evaluate both alike"
            )
        mine, theirs = this.w_values(name), other.w_values(name)
        attacks[name] = AttackDifference(
            robust_accuracy=others[name].robust_accuracy,
            w_robust_accuracy=others[name].w_robust_accuracy,
            w_interval_95=others[name].w_interval_95,
            difference=float((mine - theirs).mean()),
            interval_95=bootstrap_interval(mine - theirs, seed=seed),
            mcnemar_p=mcnemar(this.per_sample[f"{name}_correct"], other.per_sample[f"{name}_correct"]),
        )
    mine, theirs = this.per_sample["clean_correct"], other.per_sample["clean_correct"]
    values = mine.astype(np.float64) - theirs.astype(np.float64)
    return Comparison(
        model=other.model,
        clean_accuracy=other.clean_accuracy,
        clean_difference=float(values.mean()),
        clean_interval_95=bootstrap_interval(values, seed=seed),
        clean_mcnemar_p=mcnemar(mine, theirs),
        attacks=attacks,
    )


def flags(report: Report) -> list[str]:
    """Doubts that the numbers themselves raise."""
    found = []
    if report.approximate:
        found.append(
            f"measured in {report.settings['precision']}, whose rounding may decide: no figure here is a "
            "headline; evaluate in float32 for one"
        )
    if report.missing:
        reasons = "; ".join(dict.fromkeys(report.missing.values()))
        found.append(
            f"incomplete: {', '.join(report.missing)} could not run ({reasons}), so the robust accuracy may "
            "be too high"
        )
    if report.selected_on == "test":
        found.append("the checkpoint was selected on test images, as in the paper, which flatters the result")
    classes = report.settings.get("classes")
    if classes and report.clean_interval_95[0] <= 1 / classes:
        found.append(
            f"clean accuracy, {100 * report.clean_accuracy:.1f} %, is not above chance "
            f"({100 / classes:.3g} %): the network has learned nothing, and its robust accuracy says nothing"
        )
    one_step = report.attacks.get("fgsm")
    if one_step is not None:
        weaker = [
            name
            for name in ("pgd_sat", "pgd_trades", "cw")
            if name in report.attacks and report.attacks[name].robust_accuracy > one_step.robust_accuracy
        ]
        if weaker:
            found.append(
                f"{', '.join(weaker)} breaks fewer images than a single step: gradients may be masked"
            )
    for name, result in report.attacks.items():
        found += _warnings(name, result, report.n)
    if report.union is not None and "aa" in report.attacks:
        gap = report.attacks["aa"].robust_accuracy - report.union.robust_accuracy
        if gap > 0.02:
            found.append(
                f"other attacks break {100 * gap:.1f} % of the images beyond AutoAttack: gradients may be "
                "masked"
            )
    found += detection_flags(report.detection)
    suspicious = [line["check"] for line in report.sanity if line["result"] == "suspicious"]
    if suspicious:
        found.append(f"suspicious in the sanity table: {'; '.join(suspicious)}")
    if report.settings.get("budget") == "smoke" and (report.union is not None or "aa" in report.attacks):
        found.append("the attacks ran at the smoke budget, which shows that they run and no more")
    return found


def _warnings(name: str, result: AttackResult, n: int) -> list[str]:
    """AutoAttack's own warnings, as sentences."""
    said = {
        "randomized": "gave different logits for the same image: its defence is random",
        "probabilities": "returns probabilities, not logits, on which cross-entropy is flat",
        "dynamic": "computes gradients in its forward pass",
        "zero_gradients": "has no gradient at {} points: gradients may be masked",
    }
    found = [
        f"{name}: the model {said[key].format(count)}"
        for key, count in result.warnings.items()
        if key in said
    ]
    gain = result.broken_first_by.get("square", 0) / n
    if (
        "square" in result.settings.get("members", {})
        and len(result.settings["members"]) > 1
        and gain > 0.002
    ):
        found.append(
            f"{name}: Square broke {100 * gain:.1f} % of the images after the white-box attacks failed: "
            "gradients may be masked"
        )
    return found


def check_name(name: str) -> None:
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

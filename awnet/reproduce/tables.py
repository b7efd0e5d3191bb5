"""``awnet reproduce table1``: trains what a table needs and compares the results with the paper's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import nn

from awnet.analysis import w_robust_bars
from awnet.attacks import named_attack
from awnet.attacks.craft import craft
from awnet.attacks.transfer import replay
from awnet.detectors import LNG, NNIF, Detector, RouterDetector
from awnet.evaluation import Report, auc, compare
from awnet.evaluation.filters import filter_means
from awnet.evaluation.paper import PaperRow, paper_rows
from awnet.files import expanded, write_json, write_text
from awnet.precision import full_precision
from awnet.reproduce.ablation import run_ablation
from awnet.reproduce.analyses import compare_filters, measure_weight_gap
from awnet.reproduce.digits import conclusion, experiment_folder, say
from awnet.reproduce.experiments import AWNET, BUDGETS, EXPERIMENTS, Experiment, System
from awnet.reproduce.markdown import (
    attack_settings,
    markdown_table,
    opening,
    record,
    section,
    statement,
    table_label,
    training_section,
)
from awnet.reproduce.runs import SURROGATE, Runs
from awnet.run_config import read_config
from awnet.scalars import check_integer
from awnet.terminal import safe_console
from awnet.text import csv_text, visible


@dataclass(frozen=True)
class Line:
    """One quantity, our value and the paper's, as fractions; None if there is no value."""

    dataset: str
    system: str
    attack: str
    """Empty for a quantity without attack."""
    quantity: str
    """``clean``, ``adversarial``, ``w_robust`` or ``auc``."""
    paper: float | None
    ours: float | None
    low: float | None
    """95 % interval of ``ours``."""
    high: float | None

    @property
    def difference(self) -> float | None:
        return None if self.paper is None or self.ours is None else self.ours - self.paper


@dataclass(frozen=True)
class Outcome:
    """folder: with table.md, table.csv, table.json and figures; lines: empty for a figure and an ablation."""

    folder: Path
    lines: tuple[Line, ...]


def reproduce(
    name: str,
    budget: str = "smoke",
    *,
    out: str | Path = "runs/paper",
    data_dir: str | Path | None = None,
    seed: int = 0,
    seeds: Sequence[int] = (),
    networks: Mapping[str, str | Path] | None = None,
    test_limit: int | None = None,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> Outcome:
    """Runs one experiment of :data:`EXPERIMENTS` and writes ``out/<name>-<budget>/``.

    Networks are trained under ``out/runs`` and shared with other experiments; an interrupted call is resumed.
    The table lists the paper's figure, ours and the difference, and states what ours was measured on.

    Args:
        seeds: of an ablation, the trainings of each system; by default those of the experiment. Several
            processes can share ``out``, each with other seeds; a last call with all of them only compares.
        networks: finished run folders, by the table's names. The table then has these systems only, and
            nothing is trained but a surrogate; the budget's limits of images and attacks apply.
        test_limit: number of test images, instead of the budget's.

    Raises:
        ValueError: an unknown name or budget, ``seeds`` for an experiment of one training, ``seed`` for an
            ablation, or ``networks`` that are no finished runs, not in the table or trained on other data.
        FileNotFoundError: the folder of a data set is missing. With ``smoke`` generated images are used
            instead, and the table states this.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"what must be digits or one of {', '.join(EXPERIMENTS)}, got {name!r}")
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    experiment = EXPERIMENTS[name]
    if seeds and experiment.kind != "ablation":
        raise ValueError(f"seeds is an option of digits and of ablations; run {name} once per seed")
    if seed and experiment.kind == "ablation":
        raise ValueError(f"seed is not an option of {name}, which has several: give seeds")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different numbers, got {list(seeds)}")
    given = {label: expanded(folder) for label, folder in (networks or {}).items()}
    if given:
        experiment = _restricted(name, experiment, given)
    console = safe_console(quiet=quiet)
    allowed = replace(BUDGETS[budget], **experiment.changes.get(budget, {}))
    if test_limit is not None:
        allowed = replace(allowed, test_limit=check_integer("test_limit", test_limit, 1))
    with experiment_folder(expanded(out), partial(say, console)) as place:
        by_seed = [
            Runs(
                place,
                budget,
                allowed,
                data_dir=None if data_dir is None else expanded(data_dir),
                seed=each,
                device=device,
                console=console,
                teachers=experiment.teachers,
                networks=given,
            )
            for each in seeds or experiment.seeds or (seed,)
        ]
        runs = by_seed[0]
        runs.say(f"{name}: {experiment.title}; budget {budget}: {allowed.about}")
        if experiment.equal_cost:
            (dataset,) = experiment.datasets
            experiment = replace(experiment, systems=runs.at_equal_cost(experiment.systems, dataset))
        lines = _KINDS[experiment.kind](name, experiment, *by_seed) or []
        if lines:
            _write(name, experiment, lines, runs)
            console.print(_rich(experiment, lines, runs))
        folder = runs.results(name)
        runs.say(f"written to {folder}")
        return Outcome(folder, tuple(lines))


def _restricted(name: str, experiment: Experiment, networks: Mapping[str, Path]) -> Experiment:
    """The experiment with the systems in ``networks`` only, all finished runs on one of its data sets."""
    if experiment.kind in ("ablation", "weight_gap") or experiment.equal_cost:
        raise ValueError(f"networks is not an option of {name}, which trains its networks itself")
    labels = [system.label for system in experiment.systems]
    unknown = [label for label in networks if label not in labels]
    if unknown:
        raise ValueError(f"{name} has no system {unknown[0]!r}: it has {', '.join(labels)}")
    datasets = set()
    for folder in networks.values():
        dataset = read_config(folder, whole=True)["dataset"]["name"]
        datasets.add(dataset)
        if dataset not in experiment.datasets or len(datasets) > 1:
            raise ValueError(
                f"{folder} was trained on {dataset}, but {name} needs runs on "
                f"{' or '.join(experiment.datasets)}, all on the same data set"
            )
        if not (folder / "best.safetensors").is_file():
            raise ValueError(f"{folder} has no best.safetensors: finish it first by awnet train --resume")
    systems = tuple(system for system in experiment.systems if system.label in networks)
    return replace(experiment, systems=systems, datasets=tuple(datasets))


def _accuracy(name: str, experiment: Experiment, runs: Runs) -> list[Line]:
    lines = []
    for dataset in experiment.datasets:
        reports: dict[str, Report] = {}
        for system in experiment.systems:
            try:
                reports[system.label] = runs.evaluated(system, dataset, experiment.attacks, name)
            except ImportError as error:  # of an optional package
                runs.say(f"{system.label} is skipped: {error}")
                runs.skipped[system.label] = str(error)
        lines += _summarize(name, experiment, runs, dataset, reports, experiment.attacks)
    return lines


def _transfer(name: str, experiment: Experiment, runs: Runs) -> list[Line]:
    lines = []
    for dataset in experiment.datasets:
        surrogate = runs.trained(SURROGATE, dataset)
        test = runs.splits(dataset).test
        crafted = {}
        for attack in experiment.attacks:
            runs.say(f"{attack} on {SURROGATE.label}, {len(test)} test images")
            folder = runs.run_folder(SURROGATE, dataset) / "crafted"
            crafted[f"transfer_{attack}"] = craft(surrogate, test, attack, folder=folder, seed=runs.seed)
        reports = {}
        for system in experiment.systems:
            model = runs.trained(system, dataset)
            replayed = {attack: replay(model, images) for attack, images in crafted.items()}
            reports[system.label] = runs.evaluated(system, dataset, replayed, name)
        lines += _summarize(name, experiment, runs, dataset, reports, [*crafted])
    return lines


def _summarize(
    name: str,
    experiment: Experiment,
    runs: Runs,
    dataset: str,
    reports: dict[str, Report],
    attacks: Sequence[str],
) -> list[Line]:
    """The lines of one data set; adds notes to ``runs`` and draws the figure."""
    _add_notes(reports, runs, dataset)
    _draw_bars(experiment, reports, runs.results(name) / f"{dataset}.png", runs.splits(dataset).test.name)
    return _lines_of(experiment, dataset, reports, attacks)


@full_precision()
def _detection(name: str, experiment: Experiment, runs: Runs) -> list[Line]:
    lines = []
    (dataset,), (system,) = experiment.datasets, experiment.systems
    splits = runs.splits(dataset)
    model = runs.trained(system, dataset)
    train = next(splits.train.batches(len(splits.train)))
    held_out, test = (next(part.batches(len(part))) for part in (splits.validation, splits.test))
    neighbors = max(2, min(len(train.y) // 4, 50))
    makers: dict[str, Callable[[nn.Module], Detector]] = {
        "NNIF": lambda m: NNIF(m, neighbours=neighbors),
        "LNG": lambda m: LNG(m, neighbours=min(10, len(held_out.y) - 1)),
        system.label: RouterDetector,
    }
    for attack_name in experiment.attacks:
        attack = named_attack(attack_name, model, splits.test.threat_model, seed=runs.seed)
        adversarial = {
            "fit": attack(held_out.x, held_out.y, index=held_out.index),
            "test": attack(test.x, test.y, index=test.index),
        }
        for label, make in makers.items():
            runs.say(f"{label} against {attack_name}")
            detector = make(model).fit(train.x, train.y, held_out.x, adversarial["fit"])
            value = auc(detector.score(adversarial["test"]).numpy(), detector.score(test.x).numpy())
            paper = _paper(experiment, dataset, label, attack_name)
            printed = None if paper is None or paper.auc is None else paper.auc / 100
            lines.append(Line(dataset, label, attack_name, "auc", printed, value, None, None))
    return lines


def _filters(name: str, experiment: Experiment, runs: Runs) -> None:
    """Fig. 1 and 3: the first two convolutions of each network after plain and after robust training."""
    (dataset,) = experiment.datasets
    networks: dict[str, dict[str, nn.Module]] = {}
    for system in experiment.systems:
        network, _, recipe = system.label.partition(" by ")
        networks.setdefault(network, {})[recipe] = runs.trained(system, dataset)
    compare_filters(networks, runs.results(name), title=experiment.title)


def _weight_gap(name: str, experiment: Experiment, runs: Runs) -> None:
    """One step from the same weights against Eq. 8; and whole trainings that differ only in ε and α."""
    from scipy.stats import wasserstein_distance

    (dataset,), (system,) = experiment.datasets, experiment.systems
    test = runs.splits(dataset).test
    batch = next(test.batches(min(128, len(test))))
    eps = test.threat_model.eps
    plain = runs.trained(_varied(system, 1.0, 0.0), dataset)
    measure_weight_gap(plain, batch.x, batch.y, eps, runs.results(name))

    base = filter_means(plain)
    rows: list[tuple[Any, ...]] = [
        ("eps", "adv_weight", "layer", "wasserstein", "mean_difference", "std_ratio")
    ]
    for scale, alpha in ((1.0, 0.25), (1.0, 0.5), (1.0, 1.0), (0.25, 0.5), (0.5, 0.5)):
        means = filter_means(runs.trained(_varied(system, scale, alpha), dataset))
        for layer, values in means.items():
            distance = wasserstein_distance(values, base[layer])
            shift, ratio = values.mean() - base[layer].mean(), values.std() / base[layer].std()
            rows.append((eps * scale, alpha, layer, *map(float, (distance, shift, ratio))))
    write_text(runs.results(name) / "trained.csv", csv_text(rows))


def _varied(system: System, eps_scale: float, adv_weight: float) -> System:
    return replace(
        system,
        label=f"{system.label}, eps × {eps_scale:g}, adv_weight {adv_weight:g}",
        settings={"adv_weight": adv_weight},
        eps_scale=eps_scale,
    )


_KINDS: dict[str, Callable[..., list[Line] | None]] = {
    "ablation": run_ablation,
    "accuracy": _accuracy,
    "transfer": _transfer,
    "detection": _detection,
    "filters": _filters,
    "weight_gap": _weight_gap,
}


Figures = tuple[float | None, float | None, float | None]  # ours, and its interval
NOTHING: Figures = (None, None, None)


def _paper(experiment: Experiment, dataset: str, system: str, attack: str) -> PaperRow | None:
    if experiment.table is None:
        return None
    key = (dataset, system, attack)
    rows = [row for row in paper_rows(experiment.table) if (row.dataset, row.system, row.attack) == key]
    return rows[0] if rows else None


def _lines_of(
    experiment: Experiment, dataset: str, reports: dict[str, Report], attacks: Sequence[str]
) -> list[Line]:
    """The lines of all systems; without figures of ours for a system that has no report."""
    lines = []
    for system in (system.label for system in experiment.systems):
        report = reports.get(system)
        rows = {attack: _paper(experiment, dataset, system, attack) for attack in attacks}
        clean = next((row.clean for row in rows.values() if row is not None and row.clean is not None), None)
        lines.append(
            Line(
                dataset,
                system,
                "",
                "clean",
                _fraction(clean),
                *(NOTHING if report is None else (report.clean_accuracy, *report.clean_interval_95)),
            )
        )
        for attack, row in rows.items():
            result = None if report is None else report.results()[attack]
            printed = (None, None) if row is None else (_fraction(row.adversarial), _fraction(row.w_robust))
            adversarial, w_robust = NOTHING, NOTHING
            if result is not None:
                adversarial = (result.robust_accuracy, *result.interval_95)
                w_robust = (result.w_robust_accuracy, *result.w_interval_95)
            lines += [
                Line(dataset, system, attack, "adversarial", printed[0], *adversarial),
                Line(dataset, system, attack, "w_robust", printed[1], *w_robust),
            ]
    return lines


def _add_notes(reports: dict[str, Report], runs: Runs, dataset: str) -> None:
    """Adds attack settings, paired differences and flags to ``runs``, for the text of the table."""
    attacks = {name: result for report in reports.values() for name, result in report.results().items()}
    for name, result in attacks.items():
        text = attack_settings(name, result)
        if text not in runs.attack_settings:
            runs.attack_settings.append(text)
    first = reports.get(AWNET.label)
    for label, report in reports.items():
        if first is not None and report is not first:
            runs.differences.append(
                f"{AWNET.label} against {label}, {dataset}: {conclusion(compare(first, report, runs.seed))}."
            )
        runs.flags += [f"{label}, {dataset}: {flag}." for flag in report.flags]


def _fraction(per_cent: float | None) -> float | None:
    return None if per_cent is None else per_cent / 100


_QUANTITIES = {"clean": "A_nat", "adversarial": "A_adv", "w_robust": "A_w", "auc": "AUC"}


def _cells(line: Line, printed: bool) -> list[str]:
    def show(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.2f}"

    interval = "" if line.low is None or line.high is None else f" [{show(line.low)}, {show(line.high)}]"
    attack = table_label(line.attack) or "–"
    cells = [line.system, attack, _QUANTITIES[line.quantity], show(line.ours) + interval]
    if printed:
        difference = "–" if line.difference is None else f"{100 * line.difference:+.2f}"
        cells = [*cells[:3], show(line.paper), cells[3], difference]
    return cells


def _headings(printed: bool) -> list[str]:
    """``printed``: whether the paper has figures to compare with."""
    before = ["system", "attack", "quantity"]
    return [*before, "paper", "ours [95 %]", "difference"] if printed else [*before, "ours [95 %]"]


def _claims(lines: Sequence[Line]) -> list[str]:
    """For each system the strongest single attack, the union and the difference; empty without a union."""
    rows = []
    adversarial = [line for line in lines if line.quantity == "adversarial" and line.ours is not None]
    for union in (line for line in adversarial if line.attack == "union"):
        key = (union.dataset, union.system)
        others = [line for line in adversarial if (line.dataset, line.system) == key and line is not union]
        if not others:
            continue
        claimed = min(others, key=lambda line: line.ours or 0.0)
        gap = f"{100 * ((union.ours or 0.0) - (claimed.ours or 0.0)):+.2f}"
        cells = [_cells(line, printed=False)[3] for line in (claimed, union)]
        rows.append([union.system, table_label(claimed.attack), *cells, gap])
    headings = ["system", "strongest attack of the papers", "claimed [95 %]", "union [95 %]", "difference"]
    return markdown_table(headings, rows, 2) if rows else []


def _write(name: str, experiment: Experiment, lines: list[Line], runs: Runs) -> None:
    description = statement(experiment, runs)
    text = opening(name, experiment, description)
    printed = any(line.paper is not None for line in lines)
    for dataset in experiment.datasets:
        rows_of_dataset = [_cells(line, printed) for line in lines if line.dataset == dataset]
        text += section(
            f"{runs.splits(dataset).test.name}, percent",
            markdown_table(_headings(printed), rows_of_dataset, 3),
        )
    text += section("Accuracy under the papers' attacks and under the union", _claims(lines))
    text += section("Paired by image, 95 % intervals", [f"- {line}" for line in runs.differences])
    text += section("Attacks", [f"- {line}" for line in runs.attack_settings])
    text += section("Flags of the reports", [f"- {line}" for line in runs.flags])
    text += training_section(runs.trainings)
    folder = runs.results(name)
    write_text(folder / "table.md", "\n".join(map(visible, text)))
    names = [*(field.name for field in fields(Line)), "difference"]
    rows = [[f"{v:.6f}" if isinstance(v := getattr(line, n), float) else v for n in names] for line in lines]
    write_text(folder / "table.csv", csv_text([names, *rows]))
    write_json(
        folder / "table.json",
        record(name, experiment, runs, description)
        | {
            "seed": runs.seed,
            "attacks": runs.attack_settings,
            "differences": runs.differences,
            "doubts": runs.flags,
            "trainings": [asdict(training) for training in runs.trainings],
            "runs": {
                f"{dataset}/{system.label}": str(
                    runs.run_folder(system, dataset).name
                    if runs.networks
                    else runs.run_folder(system, dataset).relative_to(runs.place.path)
                )
                for dataset in experiment.datasets
                for system in experiment.systems
            },
        },
    )


def _rich(experiment: Experiment, lines: list[Line], runs: Runs) -> Table:
    caption = Text(visible(statement(experiment, runs)[0]))
    table = Table(title=f"{experiment.title}, percent", box=SIMPLE_HEAD, caption=caption)
    printed = any(line.paper is not None for line in lines)
    for number, heading in enumerate(_headings(printed)):
        table.add_column(heading, justify="right" if number > 2 else "left")
    previous = None
    for line in lines:
        system, *cells = [visible(cell) for cell in _cells(line, printed)]
        if len(experiment.datasets) > 1:
            system += f", {line.dataset}"
        table.add_row(*map(Text, ("" if system == previous else system, *cells)))
        previous = system
    return table


def _draw_bars(experiment: Experiment, reports: dict[str, Report], path: Path, data: str) -> None:
    w_robust_bars(
        {
            system: {
                table_label(attack): (result.w_robust_accuracy, result.w_interval_95)
                for attack, result in report.results().items()
            }
            for system, report in reports.items()
        },
        path,
        clean={system: report.clean_accuracy for system, report in reports.items()},
        title=f"{experiment.title}: A_w with 95 % intervals, {data}",
    )

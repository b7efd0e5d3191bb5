"""Renders reports as tables for the terminal, accuracies in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import nn

from awnet.attacks.registry import TARGET_MODES, TRANSFER
from awnet.data.threat_model import ThreatModel
from awnet.evaluation.results import Results
from awnet.evaluation.statistics import Interval
from awnet.models.registry import name_of
from awnet.ops.dispatch import default_backend
from awnet.text import visible

LABELS = {"fgsm": "FGSM", "pgd_sat": "PGD sat", "pgd_trades": "PGD trades", "cw": "CW", "aa": "AA"}
LABELS |= {"aa_rand": "AA rand", "malt": "MALT", "fmn": "FMN", "Linf": "L-infinity"}
LONGEST = 14  # characters of an attack's name above a column
WIDEST = 4  # columns of attacks that fit into 80 characters; with more attacks they become the rows


def attack_label(name: str) -> str:
    """The label of an attack, or of another kind of image, in tables and figures."""
    if name.startswith(TRANSFER):
        return f"transfer, {attack_label(name.removeprefix(TRANSFER))}"
    base, _, mode = name.rpartition("-")
    if base and (mode in TARGET_MODES or mode.isdecimal()):
        return f"{attack_label(base)} to {mode.replace('_', ' ')}"
    return LABELS.get(name, name.replace("_", " "))


def in_one_line(
    model: nn.Module, images: str, *threat_models: ThreatModel, trained: str | None = None
) -> str:
    """One line of text: model, parameters, recipe, images, device, backend, threat model."""
    count = sum(parameter.numel() for parameter in model.parameters())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts = [f"{name_of(model)}, {count:,} parameters", trained, images]
    parts += [f"{device}, backend {default_backend(device.type)}", *map(str, threat_models)]
    return "; ".join(part for part in parts if part)


def w_robust_table(reports: Mapping[str, Results], title: str | None = None) -> Table:
    """A row per report: A_nat, then A_adv and A_w (Eq. 23) for each attack, ± half a 95 % interval.

    With more attacks than fit into columns the attacks are the rows.
    """
    if not reports:
        raise ValueError("reports is empty: there is nothing to show")
    first = next(iter(reports.values()))
    names = list(dict.fromkeys(name for report in reports.values() for name in report.results()))
    table = _table(title or _title(first), "percent; ± half the width of a 95 % interval")
    if len(names) > WIDEST or first.norms or any(len(LABELS.get(name, name)) > LONGEST for name in names):
        return _tall(table, reports, names)
    table.add_column("model", no_wrap=True)
    table.add_column("Clean\nA_nat", justify="right")
    for name in names:
        label = LABELS.get(name, name)
        longest = max(len(word) for word in label.split())
        table.add_column(Text(f"{visible(label)}\nA_adv"), justify="right", min_width=longest)
        table.add_column("A_w", justify="right", style="bold")
    for label, report in reports.items():
        clean = _cell(report.clean_accuracy, report.clean_interval_95)
        table.add_row(
            Text(visible(label)), clean, *(cell for name in names for cell in _attack_cells(report, name))
        )
    return table


def _tall(table: Table, reports: Mapping[str, Results], names: list[str]) -> Table:
    """A row per attack, two columns per report."""
    table.add_column("", no_wrap=True)
    for label in reports:
        table.add_column(Text(f"{visible(label)}\nA_adv"), justify="right")
        table.add_column("\nA_w", justify="right", style="bold")
    clean = [(_cell(r.clean_accuracy, r.clean_interval_95), "") for r in reports.values()]
    table.add_row("Clean (A_nat)", *(cell for pair in clean for cell in pair))
    for name in names:
        cells = (cell for report in reports.values() for cell in _attack_cells(report, name))
        table.add_row(Text(visible(LABELS.get(name, name))), *cells)
    return table


def comparison_table(report: Results, label: str | None = None, title: str | None = None) -> Table:
    """Differences to each model in ``report.compared_with``, paired by image: of A_nat, and of A_w by attack.

    Each cell holds the difference, its 95 % bootstrap interval and p of McNemar's exact test. The test
    compares outcomes on clean images, and in the other rows on adversarial images (A_adv alone, whereas the
    interval is of A_w).
    """
    if not report.compared_with:
        raise ValueError("the report has no comparisons: evaluate with compared_with={name: report}")
    table = _table(
        title or f"{label or report.model} minus …, paired by image",
        r"percentage points \[95 % interval]; p: McNemar's exact test of A_nat, of A_adv",
    )
    table.add_column("", no_wrap=True)
    for other in report.compared_with:
        table.add_column(Text(visible(other)), justify="right")
    comparisons = report.compared_with.values()
    clean = [_difference(c.clean_difference, c.clean_interval_95, c.clean_mcnemar_p) for c in comparisons]
    table.add_row("Clean A_nat", *clean)
    for name in dict.fromkeys(name for comparison in comparisons for name in comparison.attacks):
        differences = [comparison.attacks.get(name) for comparison in comparisons]
        cells = [
            "–" if d is None else _difference(d.difference, d.interval_95, d.mcnemar_p) for d in differences
        ]
        table.add_row(Text(f"{visible(LABELS.get(name, name))} A_w"), *cells)
    return table


def parts_table(report: Results, title: str | None = None) -> Table:
    """A row for each part of a network with a router (:func:`gated_parts`), accuracies in percent.

    A part that the network lacks has the reason in its row.
    """
    if not report.parts:
        raise ValueError("the report has no parts: evaluate with parts=True (--parts yes)")
    table = _table(title or f"{report.model} in parts", parts_caption(report))
    table.add_column("")
    for heading in ("clean", "PGD", "changed"):
        table.add_column(heading, justify="right")
    reasons = []
    for row in report.parts.get("rows", []):
        cells = ["–", "–", "–"]
        if row["not_applicable"] is None:
            clean, changed = (f"{100 * row[name]:.1f}" for name in ("clean_accuracy", "changed"))
            cells = [clean, _cell(row["robust_accuracy"], row["interval_95"]), changed]
        else:
            reasons.append(f"{row['part']}: not applicable, {row['not_applicable']}")
        table.add_row(Text(visible(row["part"])), *cells)
    if reasons:
        table.caption = Text(visible(f"{table.caption}. {'. '.join(reasons)}"))
    return table


def parts_caption(report: Results) -> str:
    """What the table of the parts was measured on, and its cost."""
    parts = report.parts
    if "not_applicable" in parts:
        return f"not applicable: {parts['not_applicable']}"
    passes = parts["passes"]
    return (
        f"percent of {parts['images']} images; PGD: {parts['steps']} steps on the row's own variant; "
        "changed: clean images whose prediction differs from the whole network's; cost per image: "
        f"{passes['forward']} forward and {passes['backward']} backward passes"
    )


def _table(title: str, caption: str) -> Table:
    # this padding fits nine columns into 80 characters
    return Table(title=Text(visible(title)), caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _title(report: Results) -> str:
    marked = f", {report.settings['precision']}: no headline" if report.approximate else ""
    marked += f", incomplete: {len(report.missing)} attacks could not run" if report.missing else ""
    return f"{report.dataset} {report.split}, {report.n} images, {report.threat_text}{marked}"


def _cell(value: float, interval: Interval) -> str:
    return f"{100 * value:.1f} ±{50 * (interval[1] - interval[0]):.1f}"


def _attack_cells(report: Results, name: str) -> tuple[str, str]:
    """A_adv and A_w under one attack."""
    result = report.results().get(name)
    if result is None:
        return "–", "–"
    robust = _cell(result.robust_accuracy, result.interval_95)
    return robust, _cell(result.w_robust_accuracy, result.w_interval_95)


def _difference(value: float, interval: Interval, p: float) -> str:
    return f"{100 * value:+.1f} \\{interval_text(interval)}  p {p_text(p)}"


def interval_text(interval: Sequence[float] | None) -> str:
    """The interval of a difference in points, empty if there is none."""
    return "" if interval is None else f"[{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def p_text(p: float | None) -> str:
    """A p-value as text, empty if there is none."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"

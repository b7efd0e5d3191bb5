"""Reports as tables for the terminal, accuracies in per cent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from awnet.evaluation.report import Report
from awnet.evaluation.statistics import Interval

if TYPE_CHECKING:
    from rich.table import Table

LABELS = {"fgsm": "FGSM", "pgd_sat": "PGD_sat", "pgd_trades": "PGD_trades", "cw": "CW"}


def w_robust_table(reports: Mapping[str, Report], title: str | None = None) -> Table:
    """A row for each report: A_nat, then A_adv and A_w (Eq. 23) for each attack, ± half a 95 % interval."""
    from rich.table import Table

    if not reports:
        raise ValueError("reports is empty: nothing to tabulate")
    first = next(iter(reports.values()))
    table = Table(title=title or _title(first), caption="per cent; ± half the width of a 95 % interval")
    table.add_column("model", no_wrap=True)
    table.add_column("Clean A_nat", justify="right")
    names = list(dict.fromkeys(name for report in reports.values() for name in report.attacks))
    for name in names:
        table.add_column(f"{LABELS.get(name, name)} A_adv", justify="right")
        table.add_column("A_w", justify="right", style="bold")
    for label, report in reports.items():
        cells = [_cell(report.clean_accuracy, report.clean_interval_95)]
        for name in names:
            result = report.attacks.get(name)
            if result is None:
                cells += ["–", "–"]
                continue
            cells.append(_cell(result.robust_accuracy, result.interval_95))
            cells.append(_cell(result.w_robust_accuracy, result.w_interval_95))
        table.add_row(label, *cells)
    return table


def comparison_table(report: Report, label: str | None = None, title: str | None = None) -> Table:
    """A row for each model in ``report.compared_with``: differences of A_nat and A_w, paired by image.

    Beside each difference its 95 % bootstrap interval, and p of McNemar's exact test on the images' outcomes.
    """
    from rich.table import Table

    this = label or report.model
    table = Table(
        title=title or f"{this} minus each other model, paired by image",
        caption="percentage points; [95 % interval]; p: McNemar's exact test, clean or adversarial outcomes",
    )
    table.add_column("compared with", no_wrap=True)
    table.add_column("ΔA_nat", justify="right")
    names = list(dict.fromkeys(n for comparison in report.compared_with.values() for n in comparison.attacks))
    for name in names:
        table.add_column(f"{LABELS.get(name, name)} ΔA_w", justify="right")
    for other, comparison in report.compared_with.items():
        cells = [
            _difference(comparison.clean_difference, comparison.clean_interval_95, comparison.clean_mcnemar_p)
        ]
        for name in names:
            found = comparison.attacks.get(name)
            cells.append(
                "–" if found is None else _difference(found.difference, found.interval_95, found.mcnemar_p)
            )
        table.add_row(other, *cells)
    return table


def _title(report: Report) -> str:
    return f"{report.dataset} {report.split}, {report.n} images, eps {report.eps:.4g}"


def _cell(value: float, interval: Interval) -> str:
    return f"{100 * value:.1f} ±{50 * (interval[1] - interval[0]):.1f}"


def _difference(value: float, interval: Interval, p: float) -> str:
    low, high = (f"{100 * end:+.1f}" for end in interval)
    significance = "p<0.001" if p < 0.001 else f"p={p:.3f}"
    return f"{100 * value:+.1f} [{low}, {high}] {significance}".replace("[", r"\[")

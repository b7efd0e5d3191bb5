"""The paper's results, typed from its tables into ``paper.csv`` and read by ``paper_rows``.

Units are percent. ``parameters_m`` is in the paper's mixed units: 2^20 parameters for ResNet, VGG and
RepVGG, 10^6 for WideResNet, Swin and AW-Net; its 2.7 for RDI-ResNet-38 fits neither (692,310 by definition).
Two of the values are misprints by the paper's own arithmetic, A_w = (clean + adversarial) / 2; they are kept
as printed, with a note.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class PaperRow:
    """One row of one table: a system under one attack.

    table: "1" … "11", or "text". attack: awnet's name of it; ``transfer_*`` use a WideResNet-70-16.
    clean, adversarial, w_robust, auc: percent; None if the paper does not give the value.
    """

    table: str
    dataset: str
    system: str
    parameters_m: float | None
    attack: str
    clean: float | None
    adversarial: float | None
    w_robust: float | None
    auc: float | None
    note: str


_WORDS = {"table", "dataset", "system", "attack", "note"}


@cache
def paper_rows(table: str | None = None) -> tuple[PaperRow, ...]:
    """All rows, or those of one table ("1" … "11", "text"), in the paper's order.

    Raises ValueError if the paper has no such table.
    """
    text = resources.files("awnet.evaluation").joinpath("paper.csv").read_text(encoding="utf-8")
    rows = []
    for line in csv.DictReader(text.splitlines()):
        values: dict[str, Any] = {
            name: text if name in _WORDS else float(text) if text else None for name, text in line.items()
        }
        rows.append(PaperRow(**values))
    if table is None:
        return tuple(rows)
    chosen = tuple(row for row in rows if row.table == table)
    if not chosen:
        raise ValueError(
            f"table must be one of {', '.join(dict.fromkeys(r.table for r in rows))}, got {table!r}"
        )
    return chosen

"""The values typed from the paper are consistent with each other."""

from __future__ import annotations

import csv
from collections import Counter
from decimal import Decimal
from importlib import resources

import pytest

from awnet.evaluation.paper import paper_rows

TEXT = resources.files("awnet.evaluation").joinpath("paper.csv").read_text(encoding="utf-8")
LINES = list(csv.DictReader(TEXT.splitlines()))
COMPLETE = [line for line in LINES if line["clean"] and line["adversarial"] and line["w_robust"]]


@pytest.mark.parametrize(
    "line", COMPLETE, ids=lambda line: f"{line['table']}-{line['system']}-{line['attack']}"
)
def test_w_robust_is_the_mean_of_the_row_or_the_row_is_a_noted_misprint(line: dict[str, str]) -> None:
    mean = (Decimal(line["clean"]) + Decimal(line["adversarial"])) / 2
    # both figures are printed with two digits, so their mean may be half a digit from the third
    agrees = abs(mean - Decimal(line["w_robust"])) <= Decimal("0.005")
    assert agrees != line["note"].startswith("misprint")
    if not agrees:
        assert str(mean.quantize(Decimal("0.01"))) in line["note"] or f"{mean:.2f}" in line["note"]


def test_every_table_has_its_rows() -> None:
    systems_times_attacks = {
        "1": 30,
        "2": 30,
        "3": 8,
        "4": 8,
        "5": 9,
        "6": 12,
        "7": 12,
        "8": 9,
        "9": 8,
        "10": 4,
        "11": 15,
        "text": 1,
    }
    assert Counter(line["table"] for line in LINES) == systems_times_attacks
    assert len({(line["table"], line["dataset"], line["system"], line["attack"]) for line in LINES}) == len(
        LINES
    )


def test_a_system_has_one_clean_accuracy_per_dataset() -> None:
    seen: dict[tuple[str, str], set[str]] = {}
    for line in LINES:
        if line["clean"]:
            seen.setdefault((line["dataset"], line["system"]), set()).add(line["clean"])
    assert {key: values for key, values in seen.items() if len(values) > 1} == {}


def test_improvements_that_the_text_states_follow_from_the_rows() -> None:
    for table, stated in (("1", [9.04, 1.57, 0.81, 0.35, 0.43]), ("11", [9.17, 1.96, 1.78, 0.55, 0.28])):
        for attack, gain in zip(("fgsm", "pgd_sat", "pgd_trades", "cw", "aa"), stated, strict=True):
            rows = [row for row in paper_rows(table) if row.attack == attack and not row.note]
            ours = max(row.w_robust or 0 for row in rows if row.system == "AW-Net")
            best = max(row.w_robust or 0 for row in rows if row.system != "AW-Net")
            assert ours - best == pytest.approx(gain, abs=0.0051), (table, attack)


def test_rows_are_numbers_and_an_unknown_table_is_refused() -> None:
    row = paper_rows("1")[-1]
    assert (row.system, row.attack, row.clean, row.adversarial, row.w_robust, row.auc) == (
        "AW-Net",
        "aa",
        93.08,
        44.56,
        68.82,
        None,
    )
    assert paper_rows("5")[0].auc == 99.96
    with pytest.raises(ValueError, match="table must be one of 1, 2"):
        paper_rows("12")

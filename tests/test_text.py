"""Text from outside: names of folders, models, attacks and classes in terminals, CSV files and figures."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from awnet.analysis import accuracy_against_eps, compared_curves, w_robust_bars, waterfall
from awnet.analysis import filter_means as draw_filter_means
from awnet.cli.options import print_text
from awnet.evaluation import Report, compare, comparison_table, w_robust_table
from awnet.evaluation.results import AttackResult
from awnet.models import create_model
from awnet.reproduce.analyses import compare_filters
from awnet.text import csv_cell, csv_text, figure_text, visible
from awnet.training.logging import Reporter

HOSTILE = (
    "runs/[/]",
    "[red]x[/red] [link=http://a.b]y",
    "a\x1b]0;title\x07\x1b[2J\x1b[31mb",
    "line\nbreak\r\x9b31m",
    "name \u202egnp.exe",
    "half \udc80 pair",
    "tail\\",
    "$x_{",
    "_hidden",
    '=HYPERLINK("http://a.b";"c")',
    "@SUM(1+1)*cmd|' /C calc'!A0",
)


def printed(*things: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=400, force_terminal=True, color_system="truecolor", highlight=False)
    for thing in things:
        console.print(thing)
    return file.getvalue()


def report(model: str, attack: str = "fgsm") -> Report:
    correct = np.arange(8) % 2 == 0
    result = AttackResult(0.5, 0.5, (0.2, 0.8), (0.2, 0.8), {})
    return Report(
        model=model,
        dataset="digits",
        split="test",
        n=8,
        eps=0.1,
        clean_accuracy=0.5,
        clean_interval_95=(0.2, 0.8),
        attacks={attack: result},
        router_auc={},
        flags=[],
        settings={},
        environment={},
        per_sample={
            "index": np.arange(8),
            "label": np.arange(8),
            "clean_correct": correct,
            f"{attack}_correct": correct,
        },
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_tables_print_every_name_as_it_is(name: str) -> None:
    one = report(name)
    one.compared_with = {name: compare(one, report("b"))}
    text = printed(
        w_robust_table({name: one}), comparison_table(one, name), w_robust_table({name: one}, name)
    )
    many = {f"{name}{i}": report("m", f"attack{i}") for i in range(6)}
    text += printed(w_robust_table(many))
    assert text.count(visible(name)) >= 5
    for control in ("\x1b]", "\x1b[2J", "\x1b[31m", "\x9b", "\r", "\u202e", "\x07"):
        assert control not in text
    text.encode()


@pytest.mark.parametrize("name", HOSTILE)
def test_lines_print_every_name_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    print_text(Console(file=file, width=40, highlight=False), f"written to {name}")
    assert file.getvalue() == f"written to {visible(name)}\n"
    Reporter(name).say(f"{name} is finished")
    assert capsys.readouterr().out == f"{visible(name)} is finished\n"


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_visible_text_is_one_printable_line_and_stays_so(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable() or {c for c in shown if not c.isprintable()} <= set(
        "\u00a0\u2000\u3000\u202f"
    ) | {chr(i) for i in range(0x2000, 0x200B)} | {"\u1680", "\u205f"}  # spaces
    assert "\n" not in shown
    assert "\x1b" not in shown
    assert visible(shown) == shown
    shown.encode()
    if text.isascii() and text.isprintable():
        assert shown == text


@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_csv_reads_back_without_formulas_or_extra_lines(rows: list[list[str]]) -> None:
    text = csv_text(rows)
    read = list(csv.reader(io.StringIO(text)))
    assert len(text.splitlines()) == len(read) == len(rows)
    for row, found in zip(rows, read, strict=True):
        for value, cell in zip(row, found, strict=True):
            assert cell in (visible(value), f"'{visible(value)}")
            if cell.lstrip()[:1] in set("=+-@"):
                float(cell)  # a number


def test_csv_cells_that_look_like_formulas_are_escaped() -> None:
    assert csv_text([("a,b", 'c"d', None, -0.5, 3, "x\ny")]) == '"a,b","c""d",,-0.5,3,x\\ny\n'
    for formula in ('=HYPERLINK("a")', "+1+1", "-cmd", "@SUM(1)", " =1", "\uff1d1"):
        assert csv_cell(formula).startswith("'")
    for plain in ("-0.5", "+1e-3", "-inf", "a=b", "", "-0.5 ", "\\t=1+1"):
        assert csv_cell(plain) == plain


@pytest.mark.parametrize("name", ["$x_{", "a\x1b[31m", "_hidden", "b\nc", "$a$ $b$"])
def test_figures_accept_every_name(name: str, tmp_path: Path) -> None:
    measured = (0.5, (0.4, 0.6))
    w_robust_bars({name: {name: measured}}, tmp_path / "bars.png", clean={name: 0.5}, title=name)
    waterfall(10, 1, {name: 2}, tmp_path / "waterfall.png", title=name)
    values = np.linspace(-1, 1, 8)
    draw_filter_means({name: {name: values, "b": values}}, tmp_path / "means.png", title=name)
    epoch = {"epoch": 1, "total": 1.0, "clean_accuracy": 0.5}
    compared_curves({name: [epoch]}, tmp_path / "runs.png", title=name)
    curve = {"eps": [0, 0.1], "accuracy": [1, 0], "low": [1, 0], "high": [1, 0], "norm": "L2"}
    path, attacks = tmp_path / "eps.png", {name: measured}
    accuracy_against_eps({name: curve}, path, own_eps=0.1, attacks=attacks, title=name)
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert not figure_text(name).startswith("_")


def test_analyses_write_any_label_into_csv(tmp_path: Path) -> None:
    label = '=HYPERLINK("a"),\n[/]'
    model = create_model("resnet_tiny", in_channels=1)
    compare_filters({"tiny": {label: model}}, tmp_path, layers=1)
    rows = list(csv.DictReader((tmp_path / "filter_means.csv").open(newline="")))
    assert {row["model"] for row in rows} == {"'" + visible(label)}
    assert all(np.isfinite(float(row["mean"])) for row in rows)

"""The report's page: self-contained, escaped, with the worst case first and the paper's row next to ours."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from awnet.data import load_dataset
from awnet.data.threat_model import eps_text
from awnet.evaluation import Report, evaluate
from awnet.evaluation.html import comparison_page, page
from awnet.evaluation.summarize import flags
from awnet.files import write_json
from awnet.models import create_model

VOID = {"meta", "br", "img"}


class Outline(HTMLParser):
    """Fails on a tag that is closed by another, and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.alternatives: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("src", "href"):
            if values.get(name):
                self.sources.append(values[name] or "")
        if tag == "img":
            self.alternatives.append(values.get("alt") or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """The report of an untrained network with every section that a report can have."""
    torch.manual_seed(0)
    model = create_model("awnet_tiny", in_channels=1)
    out = tmp_path_factory.mktemp("run")
    test = load_dataset("digits").test
    actual = evaluate(model, test, ["fgsm", "pgd_sat", "union"], budget="smoke", limit=12, out=out)
    return actual, out / "evaluations" / "default"


def test_the_page_is_self_contained_and_starts_with_the_worst_case(report: tuple[Report, Path]) -> None:
    actual, folder = report
    text = (folder / "report.html").read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.sources
    assert all(source.startswith("data:image/png;base64,") for source in outline.sources)
    assert not re.search(r"https?://|<script|@import", text)
    assert all(outline.alternatives)
    assert 'name="viewport"' in text
    assert actual.union is not None
    headline = f"{100 * actual.union.robust_accuracy:.1f}robust: the worst case over all attacks"
    assert headline in outline.words
    for words in ("Sanity checks", "What the router detects", "sign noise", "Settings and environment"):
        assert words in outline.words
    for flag in actual.flags:
        assert flag in outline.words
    # every figure that was drawn is on the page
    assert len(outline.sources) == len(list(folder.glob("*.png"))) >= 5


def test_the_page_names_run_date_and_checkpoint_and_doubts_a_network_that_guesses(
    report: tuple[Report, Path], tmp_path: Path
) -> None:
    actual = replace(report[0], eps=8 / 255, selected_on="validation")
    place = tmp_path / "my-run" / "evaluations" / "default"
    place.mkdir(parents=True)
    write_json(tmp_path / "my-run" / "config.json", {"sessions": [{"started": "2026-03-04T05:06:07+0000"}]})
    actual.save(place)
    words = Outline((place / "report.html").read_text(encoding="utf-8")).words
    assert f"{actual.model} on digits · my-run" in words
    assert "Run my-run, trained 2026-03-04 05:06. Checkpoint selected on validation." in words
    assert "ε = 8/255" in words
    assert " · " not in Outline(page(actual, tmp_path)).words  # in no run folder
    assert any("is not above chance (10 %)" in flag for flag in report[0].flags)
    able = replace(actual, clean_accuracy=0.9, clean_interval_95=(0.6, 0.98))
    assert not any("chance" in flag for flag in flags(able))


def test_a_report_is_one_line_in_a_terminal_and_a_table_in_a_notebook(report: tuple[Report, Path]) -> None:
    actual = report[0]
    assert repr(actual).startswith(
        "Report(awnet_tiny on 12 test images of digits, L-infinity eps 0.15: clean "
    )
    assert "\n" not in repr(actual)
    assert len(repr(actual)) < 250
    outline = Outline(actual._repr_html_())
    for name in ("FGSM", "PGD sat", "union"):
        assert name in outline.words


@pytest.mark.parametrize(
    ("eps", "text"),
    [(8 / 255, "8/255"), (4 / 255, "4/255"), (0.15, "0.15"), (0.2, "0.2"), (0.0123, "0.0123")],
)
def test_eps_is_written_in_levels_where_it_is_some(eps: float, text: str) -> None:
    assert eps_text(eps) == text


def test_examples_are_images_that_the_last_attack_broke(report: tuple[Report, Path]) -> None:
    actual, folder = report
    again = Report.load(folder)
    for name, values in actual.examples.items():
        assert np.array_equal(again.examples[name], values)
    broken = actual.per_sample["clean_correct"] & ~actual.per_sample["union_correct"]
    assert len(actual.examples.get("label", [])) == min(8, int(broken.sum()))
    if broken.any():
        assert (actual.examples["before"] == actual.examples["label"]).all()
        assert (actual.examples["after"] != actual.examples["label"]).all()
        distance = np.abs(actual.examples["adversarial"] - actual.examples["clean"]).max()
        assert 0 < distance <= actual.eps + 1e-6


def test_no_interval_is_broken_into_two_lines(report: tuple[Report, Path], tmp_path: Path) -> None:
    interval = r"\[[^\[\]<>]*\]"
    rows = [["clean", "a", "50.0 [40.0, 60.0]", "-1.0", "[-2.0, +1.0]", "0.500"]]
    Image.new("L", (2, 2)).save(tmp_path / "comparison.png")
    compared = comparison_page(
        "a and b", "digits", [""] * 6, rows, caption="", notes=[], figure=tmp_path / "comparison.png"
    )
    for text, least in (((report[1] / "report.html").read_text(encoding="utf-8"), 10), (compared, 2)):
        body = text.partition("<details>")[0].partition("</style>")[2]
        whole = re.findall(rf'class="[^"]*whole">{interval}</span>', body)
        assert len(whole) == len(re.findall(rf"{interval}(?=<)", body)) >= least
        assert ".whole { white-space: nowrap; }" in text


def test_norms_have_one_spelling_on_the_page(report: tuple[Report, Path], tmp_path: Path) -> None:
    over = replace(report[0], norms={"Linf": 8 / 255, "L2": 0.5}, attacks={"Linf": report[0].attacks["fgsm"]})
    text = page(over, tmp_path, tmp_path / "run" / "evaluations" / "full")
    assert '<a href="../full-Linf/report.html">L-infinity</a>' in text
    for words in (Outline(text).words, Outline(page(report[0], tmp_path)).words):
        assert "L-infinity" in words
        assert "Linf" not in words.partition("Settings and environment")[0]


def test_names_in_the_page_are_escaped(report: tuple[Report, Path], tmp_path: Path) -> None:
    actual = replace(report[0], model="<b>&", flags=["<script>alert(1)</script>"])
    text = page(actual, tmp_path)
    assert "<script>" not in text
    assert "&lt;b&gt;&amp; on digits" in text
    assert Outline(text).sources == []  # there are no figures in that folder


def test_the_papers_row_is_next_to_ours_with_its_data_set(
    report: tuple[Report, Path], tmp_path: Path
) -> None:
    assert "paper" not in Outline(page(report[0], tmp_path)).words
    ours = replace(report[0], model="awnet_resnet18", dataset="cifar10")
    words = Outline(page(ours, tmp_path)).words
    assert "the paper's Table 1 (clean 93.08)" in words
    assert "checkpoint selected on them" in words
    for figure in ("77.38", "85.23", "50.93", "72.01"):  # FGSM and PGD sat, A_adv and A_w
        assert figure in words


def test_without_a_union_the_strongest_attack_is_the_headline(
    report: tuple[Report, Path], tmp_path: Path
) -> None:
    plain = replace(report[0], union=None, sanity=[], detection={}, flags=[])
    words = Outline(page(plain, tmp_path)).words
    assert "the strongest of 2 attacks (no union was measured)" in words
    for absent in ("Sanity checks", "Warnings", "What the router detects"):
        assert absent not in words


def browser(folder: Path, *arguments: str) -> str:
    """Runs Chromium without a window, and returns what it prints."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium on the PATH")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_renders_the_page(report: tuple[Report, Path], tmp_path: Path, width: int) -> None:
    shot, address = tmp_path / "page.png", (report[1] / "report.html").as_uri()
    browser(tmp_path, f"--window-size={width},4000", f"--screenshot={shot}", address)
    pixels = np.asarray(Image.open(shot).convert("L"), dtype=np.float64)
    assert pixels.shape[1] == width
    for band in np.array_split(pixels[:2000], 8):  # text or a figure in every part of it
        assert (band < 128).mean() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_figures_and_text_fit_into_a_window_of_any_width(
    report: tuple[Report, Path], tmp_path: Path, width: int
) -> None:
    measure = """
<script>addEventListener("load", () => {
  const width = document.getElementById("frame").contentDocument.documentElement.clientWidth;
  const page = document.getElementById("frame").contentDocument;
  const ends = [...page.images].map(image => image.getBoundingClientRect().right);
  document.title = JSON.stringify([width, page.documentElement.scrollWidth, ends.length, Math.max(...ends)]);
});</script>"""
    text = escape((report[1] / "report.html").read_text(encoding="utf-8"))
    frame = f'<iframe id="frame" style="border: 0" width="{width}" height="4000" srcdoc="{text}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html>{frame}{measure}", encoding="utf-8")
    shown = browser(tmp_path, "--window-size=1600,4200", "--dump-dom", (tmp_path / "frame.html").as_uri())
    actual = re.search(r"<title>(.*?)</title>", shown)
    assert actual is not None
    inner, needed, figures, end = json.loads(actual[1])
    assert inner == needed  # the page itself does not scroll sideways
    assert width - 20 < inner <= width  # a scroll bar takes the rest
    assert figures >= 5
    assert 0 < end <= inner

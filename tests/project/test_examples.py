"""Examples, and the quickstart in the documents: they run as they are printed."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.extras import importable_torchvision

from awnet.evaluation import Report

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

# what makes each one small enough for the quick suite
SMALL: dict[str, dict[str, Any]] = {
    "layer": {},
    "train_digits": {"epochs": 1, "limit": 20},
    "evaluate_your_model": {"steps": 30, "limit": 10},
    "attack_a_gated_network": {"epochs": 1, "images": 8},
    "convert_timm_resnet": {"epochs": 1, "images": 64},
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def main_of(name: str) -> Callable[..., Any]:
    main: Callable[..., Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return main


def test_every_example_is_tested_and_short() -> None:
    files = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert files.keys() == SMALL.keys()
    assert {name: text.count("\n") for name, text in files.items() if not 30 <= text.count("\n") <= 65} == {}
    page = (ROOT / "docs" / "examples.md").read_text()
    assert {name for name in SMALL if f'--8<-- "examples/{name}.py"' not in page} == set()


def test_the_layer_example_checks_its_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    main_of("layer")()
    said = capsys.readouterr().out
    assert "gradcheck: True" in said
    assert "runs this call" in said


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn", "one_thread")
def test_the_training_example_compares_two_networks(capsys: pytest.CaptureFixture[str]) -> None:
    main_of("train_digits")("out", **SMALL["train_digits"])
    said = capsys.readouterr().out
    assert re.search(r"pgd_sat: [+-]\d+\.\d points \[", said)
    assert "RunResult(awnet_tiny" in said
    assert Path("out/awnet_tiny/evaluations/default/report.html").is_file()


@pytest.mark.usefixtures("one_thread")
def test_the_evaluation_example_measures_the_union(capsys: pytest.CaptureFixture[str]) -> None:
    report = main_of("evaluate_your_model")(**SMALL["evaluate_your_model"])
    assert report.union is not None
    assert report.union.robust_accuracy <= report.attacks["pgd_sat"].robust_accuracy
    assert "warning: the attacks ran at the smoke budget" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_attack_example_ends_with_the_worst_case(capsys: pytest.CaptureFixture[str]) -> None:
    main_of("attack_a_gated_network")("out", **SMALL["attack_a_gated_network"])
    lines = capsys.readouterr().out.splitlines()
    right = {line.split()[0]: float(line.split()[1]) for line in lines if "% right" in line}
    assert {"clean", "PGD-20", "joint", "two_phase", "forced", "softened", "union"} <= right.keys()
    assert right["union"] <= min(right["PGD-20"], right["joint"])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_timm_example_keeps_the_logits(capsys: pytest.CaptureFixture[str]) -> None:
    importable_torchvision()
    pytest.importorskip("timm")
    main_of("convert_timm_resnet")("out", **SMALL["convert_timm_resnet"])
    said = capsys.readouterr().out
    assert float(re.search(r"logits differ by (\S+)", said)[1]) < 1e-3  # type: ignore[index]


def python_of(document: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.mark.usefixtures("one_thread")
def test_the_readmes_quickstart_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = python_of("README.md")
    names: dict[str, Any] = {}
    code = code.replace("epochs=3", "epochs=1").replace("limit=100", "limit=20")
    exec(compile(code, "README.md", "exec"), names)
    report = names["report"]
    assert isinstance(report, Report)
    assert set(report.attacks) == {"fgsm", "pgd_sat"}
    assert capsys.readouterr().out.rstrip().endswith(")")


def test_the_layer_on_the_quickstart_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = python_of("docs/quickstart.md")[-1]
    exec(compile(code, "docs/quickstart.md", "exec"), {})
    assert "runs this call" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_notebook_runs_from_top_to_bottom() -> None:
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"tour.ipynb, cell {number}", "exec"), names)
    assert "<table" in names["report"]._repr_html_()
    assert "<table" in names["result"]._repr_html_()

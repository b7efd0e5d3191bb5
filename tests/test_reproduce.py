"""The main job, end to end, on a handful of digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from awnet.data import Splits, load_dataset
from awnet.evaluation import Comparison
from awnet.evaluation.report import AttackDifference
from awnet.models import load_model
from awnet.reproduce.digits import run_digits, verdicts
from awnet.training import MTARD, read_log, recipe_for


def small() -> tuple[Splits, MTARD]:
    splits = load_dataset("digits")
    splits = Splits(splits.train.subset(60), splits.validation.subset(20), splits.test.subset(30))
    recipe = recipe_for("mtard", "digits", epochs=1, batch_size=30, attack_steps=1)
    assert isinstance(recipe, MTARD)
    return splits, recipe


def test_it_trains_attacks_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits, recipe = small()
    out = tmp_path / "digits"
    result = run_digits(out, recipe=recipe, splits=splits, attacks=("fgsm", "pgd_trades"))
    said = capsys.readouterr().out
    names = ["awnet_tiny", "resnet_tiny", "resnet_tiny_wide"]
    assert list(result.reports) == names
    assert all(name in said for name in names)
    assert "A_w under FGSM" in said
    assert "trained by pgd_at" in said

    # what it says is there is there
    report = json.loads((out / "report.json").read_text())
    assert str(out / "report.json") in said
    assert report["n"] == 30
    assert set(report["compared_with"]) == {"resnet_tiny", "resnet_tiny_wide"}
    assert report["selected_on"] == "validation"
    figures = list((out / "evaluations" / "default").glob("*.png"))
    assert figures
    assert all(str(path) in said for path in figures)
    assert str(out / "best.safetensors") in said
    for folder in (out, out / "compared" / "resnet_tiny", out / "compared" / "resnet_tiny_wide"):
        assert len(read_log(folder, "epoch")) == 1
        load_model(folder)

    # every model had the same teachers, recipe and images
    configs = [json.loads((out / "compared" / n / "config.json").read_text()) for n in names[1:]]
    assert configs[0]["teachers"] == configs[1]["teachers"]
    mine = json.loads((out / "config.json").read_text())
    assert all(c["recipe"] == mine["recipe"] and c["dataset"] == mine["dataset"] for c in configs)

    # again: an error, unless it is told to go on, and then the same numbers without any training
    with pytest.raises(FileExistsError, match="already holds a run"):
        run_digits(out, recipe=recipe, splits=splits, quiet=True)
    before = (out / "last.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    again = run_digits(out, recipe=recipe, splits=splits, attacks=("fgsm", "pgd_trades"), resume=True)
    assert capsys.readouterr().out.count("is finished") == 3
    assert (out / "last.safetensors").stat().st_mtime_ns == before
    for name, report_again in again.reports.items():
        assert report_again.to_dict()["attacks"] == result.reports[name].to_dict()["attacks"]


def test_the_verdict_follows_the_interval() -> None:
    def under(difference: float, interval: tuple[float, float]) -> AttackDifference:
        return AttackDifference(0.5, 0.7, (0.6, 0.8), difference, interval, 0.04)

    comparison = Comparison(
        model="resnet_tiny",
        clean_accuracy=0.9,
        clean_difference=0.0,
        clean_interval_95=(-0.01, 0.01),
        clean_mcnemar_p=1.0,
        attacks={
            "fgsm": under(0.02, (0.001, 0.04)),
            "cw": under(-0.03, (-0.05, -0.01)),
            "x": under(0.01, (0, 0.1)),
        },
    )
    clean, fgsm, cw, other = verdicts(comparison)
    assert clean == "clean accuracy: +0.0 points [-1.0, +1.0], no significant difference"
    assert fgsm == "A_w under FGSM: +2.0 points [+0.1, +4.0], better"
    assert cw == "A_w under CW: -3.0 points [-5.0, -1.0], worse"
    assert other.endswith("no significant difference")

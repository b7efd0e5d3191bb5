"""Ablations: what is trained, what is compared, and what the table says."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from awnet.cli import main
from awnet.evaluation import Report
from awnet.reproduce import BUDGETS, EXPERIMENTS
from awnet.reproduce.runs import Runs, averaged_down
from awnet.reproduce.synthetic import synthetic_splits
from awnet.run_folder import RunFolder

ABLATIONS = [name for name, experiment in EXPERIMENTS.items() if experiment.kind == "ablation"]


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_baseline_is_a_system_that_is_its_own_baseline(name: str) -> None:
    systems = {system.label: system for system in EXPERIMENTS[name].systems}
    assert len(systems) == len(EXPERIMENTS[name].systems)
    for system in systems.values():
        assert system.baseline is None or system.baseline in systems


def test_presets_compares_awnet_with_both_twins_under_each_preset() -> None:
    compared = Counter((s.recipe, s.baseline) for s in EXPERIMENTS["presets"].systems)
    assert compared == {
        (preset, f"AW-Net, {preset}"): 3
        for preset in ("pgd_at_strong", "trades_strong", "mtard_strong", "single_step")
    }


@pytest.mark.usefixtures("undrawn")
def test_an_ablation_compares_each_system_with_its_baseline_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {system.label: system for system in EXPERIMENTS["recipes"].systems}
    names = ("PGD-AT", "N-FGSM", "TRADES", "TRADES with DKL")
    small = replace(EXPERIMENTS["recipes"], systems=tuple(rows[name] for name in names), attacks=("pgd_sat",))
    monkeypatch.setitem(EXPERIMENTS, "recipes", small)
    arguments = [
        "reproduce",
        "recipes",
        "--out",
        str(tmp_path),
        "--data-dir",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert main([*arguments, "--seeds", "3", "4"]) == 0
    assert "TRADES with DKL" in capsys.readouterr().out
    folder = tmp_path / "recipes-smoke"
    with open(folder / "table.csv", newline="", encoding="utf-8") as file:
        table = {(row["system"], row["quantity"]): row for row in csv.DictReader(file)}
    assert set(table) == {(name, what) for name in names for what in ("clean", "pgd_sat", "pgd_sat A_w")}

    runs = tmp_path / "runs" / "smoke"
    outcomes: dict[str, list[Any]] = {}
    for name, pattern in (("TRADES", "*-trades-recipe-epochs*"), ("TRADES with DKL", "*divergence=dkl*")):
        for seed in (3, 4):
            (run,) = runs.glob(f"{pattern}seed{seed}")
            report = Report.load(run / "evaluations" / "recipes")
            outcomes.setdefault(name, []).append(report.per_sample["pgd_sat_correct"].mean())
    row = table["TRADES with DKL", "pgd_sat"]
    assert row["baseline"] == "TRADES"
    assert float(row["accuracy"]) == pytest.approx(np.mean(outcomes["TRADES with DKL"]), abs=1e-6)
    difference = np.subtract(outcomes["TRADES with DKL"], outcomes["TRADES"])
    assert float(row["difference"]) == pytest.approx(difference.mean(), abs=1e-6)
    # Student's interval with one degree of freedom: 12.7 standard errors
    half = 12.706 * difference.std(ddof=1) / np.sqrt(2)
    assert float(row["over_seeds_high"]) - difference.mean() == pytest.approx(half, abs=1e-4)
    assert table["TRADES", "pgd_sat"]["baseline"] == "PGD-AT"
    assert table["PGD-AT", "pgd_sat"]["difference"] == ""

    record = json.loads((folder / "table.json").read_text())
    assert record["seeds"] == [3, 4]
    assert "2 runs of each network, seeds 3, 4" in (folder / "table.md").read_text()
    costs = {one["label"]: one for one in record["trainings"] if one["multiply_adds"] is not None}
    per_epoch = costs["N-FGSM"]["multiply_adds"] / costs["N-FGSM"]["epochs"]
    assert abs(costs["N-FGSM"]["multiply_adds"] - costs["PGD-AT"]["multiply_adds"]) <= per_epoch / 2
    assert (folder / "differences.png").stat().st_size > 10_000

    assert main([*arguments, "--seeds", "3", "3"]) == 2
    assert "seeds must be different numbers" in capsys.readouterr().err
    assert main([*arguments, "--seed", "5"]) == 2
    assert "seed is not an option of recipes" in capsys.readouterr().err
    assert main(["reproduce", "table1", "--seeds", "0", "1"]) == 2
    assert "run table1 once per seed" in capsys.readouterr().err


def test_pseudo_labels_are_the_clean_teachers_predictions_on_images_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(
        "awnet.reproduce.runs.synthetic_splits", lambda name: read.append(name) or synthetic_splits(name)
    )
    budget = replace(BUDGETS["smoke"], shrink=2)
    runs = Runs(
        RunFolder(tmp_path, print),
        "smoke",
        budget,
        data_dir=tmp_path,
        seed=0,
        device="cpu",
        console=Console(quiet=True),
        teachers=EXPERIMENTS["recipes"].teachers,
    )
    path = runs.pseudo_labeled("cifar10")
    with np.load(path) as file:
        images, labels = torch.from_numpy(file["image"]).permute(0, 3, 1, 2), torch.from_numpy(file["label"])
    used = set(runs.splits("cifar10").train.index.tolist())
    whole = averaged_down(synthetic_splits("cifar10").train, 2)
    rest = whole.take(
        torch.tensor([row for row, index in enumerate(whole.index.tolist()) if index not in used])
    )
    assert len(used) + len(rest) == len(whole)
    assert torch.equal(images, rest.images)
    teacher = runs.trained(EXPERIMENTS["recipes"].teachers["clean"], "cifar10").eval()
    assert torch.equal(labels, teacher(next(rest.batches(len(rest))).x).argmax(1))
    before = path.stat().st_mtime_ns
    assert runs.pseudo_labeled("cifar10") == path
    assert path.stat().st_mtime_ns == before
    assert read == ["cifar10"]  # the data set is read once

    system = next(system for system in EXPERIMENTS["recipes"].systems if system.extra_fraction)
    runs.trained(system, "cifar10")
    config = json.loads((runs.run_folder(system, "cifar10") / "config.json").read_text())
    assert config["dataset"]["extra"]["images"] == len(rest)
    assert config["dataset"]["extra"]["fraction"] == system.extra_fraction

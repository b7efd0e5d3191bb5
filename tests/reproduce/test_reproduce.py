"""The main job, end to end, on a handful of digits."""

from __future__ import annotations

import json
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from awnet.data import Splits, load_dataset
from awnet.evaluation import Comparison, Report
from awnet.evaluation.results import AttackDifference
from awnet.models import load_model
from awnet.reproduce import digits, run_digits_seeds
from awnet.reproduce.digits import conclusion, run_digits, train_all, train_network
from awnet.reproduce.parallel import run_in_parallel
from awnet.training import MTARD, checkpoint, read_log, recipe_for

pytestmark = pytest.mark.usefixtures("one_thread")


def small() -> tuple[Splits, MTARD]:
    splits = load_dataset("digits")
    splits = Splits(splits.train.subset(60), splits.validation.subset(20), splits.test.subset(30))
    recipe = recipe_for("mtard", "digits", epochs=1, batch_size=30, attack_steps=1)
    assert isinstance(recipe, MTARD)
    return splits, recipe


def test_reproduce_trains_attacks_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    splits, recipe = small()
    out = tmp_path / "digits"
    result = run_digits(out, recipe=recipe, splits=splits, attacks=("fgsm", "pgd_trades"), processes=2)
    said = capsys.readouterr().out
    names = ["awnet_tiny", "resnet_tiny", "resnet_tiny_wide"]
    assert list(result.reports) == names
    assert all(name in said for name in names)
    assert "awnet_tiny against resnet_tiny_wide" in said
    assert "teachers: resnet_tiny by pgd_at, and by standard" in said

    # what it says is there is there
    report = json.loads((out / "report.json").read_text())
    assert str(out / "evaluations" / "default" / "report.html") in said
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

    # again: an error, unless it resumes, and then the same numbers without any training
    with pytest.raises(FileExistsError, match="already holds a run"):
        run_digits(out, recipe=recipe, splits=splits, quiet=True)
    assert capsys.readouterr().out == ""
    before = (out / "last.safetensors").stat().st_mtime_ns
    request.getfixturevalue("undrawn")
    again = run_digits(
        out, recipe=recipe, splits=splits, attacks=("fgsm", "pgd_trades"), resume=True, processes=1
    )
    assert f"{out} is finished" in capsys.readouterr().out
    assert (out / "last.safetensors").stat().st_mtime_ns == before
    for name, report_again in again.reports.items():
        assert report_again.to_dict()["attacks"] == result.reports[name].to_dict()["attacks"]


@pytest.mark.usefixtures("undrawn")
def test_a_folder_that_is_renamed_between_and_during_trainings_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    splits, recipe = small()
    old, between, new = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    names = iter([(old, between), (None, None), (between, new), *[(None, None)] * 9])
    train = digits.train

    def renaming(*arguments: Any, **options: Any) -> Any:
        """Renames after the first training, and while the first student is evaluated."""
        result = train(*arguments, **options)
        now, later = next(names)
        if now is not None:
            now.rename(later)
        return result

    monkeypatch.setattr(digits, "train", renaming)
    result = run_digits(old, recipe=recipe, splits=splits, attacks=("fgsm",), processes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert result.folder == new
    for folder in (new, new / "compared" / "resnet_tiny", new / "compared" / "resnet_tiny_wide"):
        assert Report.load(folder).n == 30
        assert load_model(folder)
    assert load_model(new / "teachers" / "clean")
    said = capsys.readouterr().out
    assert f"note: {old} was renamed during the experiment; the run continues in {between}" in said
    assert str(new / "evaluations" / "default" / "report.html") in said


def test_the_conclusion_of_a_comparison_follows_its_interval() -> None:
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
    assert conclusion(comparison) == (
        "better: A_w under FGSM (+2.0 points); worse: A_w under CW (-3.0 points); "
        "no significant difference: clean accuracy, A_w under x"
    )


# --- several seeds


@pytest.mark.usefixtures("undrawn")
def test_seeds_are_trained_each_and_compared_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits, recipe = small()
    options: dict[str, Any] = {"recipe": recipe, "splits": splits, "attacks": ("fgsm",), "processes": 1}
    result = run_digits_seeds(tmp_path, (3, 1), **options)
    said = capsys.readouterr().out
    names = ["awnet_tiny", "resnet_tiny", "resnet_tiny_wide"]
    assert all(load_model(tmp_path / f"seed-{seed}") for seed in (3, 1))
    saved = json.loads((tmp_path / "seeds.json").read_text())
    assert saved["seeds"] == [3, 1]
    assert list(saved["accuracies"]) == names
    assert list(saved["differences"]) == names[1:]
    for number, seed in enumerate((3, 1)):
        reports = result.runs[seed].reports
        for name in names:
            actual = saved["accuracies"][name]
            assert actual["clean"]["values"][number] == reports[name].clean_accuracy
            assert actual["fgsm"]["values"][number] == reports[name].attacks["fgsm"].w_robust_accuracy
        assert json.loads((tmp_path / f"seed-{seed}" / "config.json").read_text())["seed"] == seed
    for twin in names[1:]:
        for what in ("clean", "fgsm"):
            mine, theirs = (saved["accuracies"][name][what] for name in (names[0], twin))
            spread = saved["differences"][twin][what]
            assert spread["values"] == pytest.approx(
                [a - b for a, b in zip(mine["values"], theirs["values"], strict=True)]
            )
            assert spread["mean"] == pytest.approx(mine["mean"] - theirs["mean"])
            half = abs(spread["values"][0] - spread["values"][1]) / 2
            assert spread["sd"] == pytest.approx(2**0.5 * half)
            # Student's t of one degree of freedom at 0.975 is tan(0.475 π)
            width = math.tan(0.475 * math.pi) * half
            assert spread["interval_95"] == pytest.approx([spread["mean"] - width, spread["mean"] + width])
    assert (tmp_path / "seeds.png").stat().st_size > 1000
    assert "seed 1, 2 of 2" in said
    assert "2 trainings of each network" in said
    assert "awnet_tiny against resnet_tiny (same width, no router)" in said

    # a further seed trains only its own networks
    before = (tmp_path / "seed-3" / "last.safetensors").stat().st_mtime_ns
    more = run_digits_seeds(tmp_path, (3, 1, 2), resume=True, quiet=True, **options)
    assert (tmp_path / "seed-3" / "last.safetensors").stat().st_mtime_ns == before
    assert more.accuracies["awnet_tiny"]["fgsm"].values[:2] == result.accuracies["awnet_tiny"]["fgsm"].values
    assert len(more.accuracies["awnet_tiny"]["fgsm"].values) == 3


@pytest.mark.parametrize("seeds", [(), (1,), (1, 2, 1)])
def test_seeds_must_be_several_and_different(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two or more different numbers"):
        run_digits_seeds(tmp_path / "run", seeds)
    assert not (tmp_path / "run").exists()


# --- parallel


def test_queues_run_in_separate_processes_with_their_number_of_threads() -> None:
    threads = torch.get_num_threads()
    jobs = [os.getpid, torch.get_num_threads, partial(max, 3, 5)]
    here, there = run_in_parallel([jobs, jobs], 1)
    assert here == [os.getpid(), 1, 5]
    assert there[0] != os.getpid()
    assert there[1:] == [1, 5]
    assert torch.get_num_threads() == threads


def test_a_failing_job_of_another_process_raises(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="a process of this run failed with status 1"):
        run_in_parallel([[partial(int, "3")], [partial(int, "three")]], 1)
    assert "invalid literal for int() with base 10: 'three'" in capfd.readouterr().err


def test_an_interrupt_stops_the_other_processes_after_they_save(tmp_path: Path) -> None:
    splits, _ = small()
    recipe = recipe_for("standard", "digits", epochs=100_000, batch_size=10)
    run = tmp_path / "run"
    arguments = {"seed": 0, "device": torch.device("cpu"), "teachers": (), "attacks": (), "quiet": True}
    endless = partial(
        train_all, tmp_path, [partial(train_network, recipe, "resnet_tiny", splits, "run", **arguments)]
    )

    def interrupted() -> None:
        while not checkpoint.states(run) or checkpoint.load_state(run)["epoch"] < 1:
            time.sleep(0.1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_parallel([[interrupted], [endless]], 1)
    step = checkpoint.load_state(run)["step"]
    assert step >= 6
    time.sleep(0.5)
    assert checkpoint.load_state(run)["step"] == step  # nobody trains on


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"processes": 3}, "processes must be None, 1 or 2"),
        ({"attacks": ("aa", "pgd")}, "attacks must be among"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_bad_arguments_fail_before_anything_is_trained(
    tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    splits, recipe = small()
    with pytest.raises(ValueError, match=message):
        run_digits(tmp_path / "run", recipe=recipe, splits=splits, quiet=True, **wrong)
    assert not (tmp_path / "run").exists()

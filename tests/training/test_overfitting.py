"""The guard against catastrophic overfitting, on a network that collapses in one batch."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from awnet.data import Splits, from_arrays
from awnet.data.dataset import Batch
from awnet.training import (
    PGDAT,
    LossOptions,
    Outputs,
    RunResult,
    Teachers,
    checkpoint,
    read_log,
    recipe_for,
    train,
)
from awnet.training.forward import Forward, joint_pass
from awnet.training.overfitting import MOST_IN_A_ROW, OverfittingGuard

K = 3

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, K)
    )


def make_splits() -> Splits:
    parts = []
    for seed, (name, n) in enumerate((("train", 48), ("validation", 24), ("test", 6))):
        y = torch.arange(n) % K
        x = torch.randint(0, 60, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed))
        x[torch.arange(n), 0, y] += 190
        parts.append(from_arrays(x.to(torch.uint8), y, name="stripes", split=name, eps=0.05))
    return Splits(*parts)


SPLITS, EPOCHS, RUINED = make_splits(), 7, (4, 1)
ORDER = [
    batch.index for batch in SPLITS.train.batches(12, shuffle=True, augment=True, seed=0, epoch=RUINED[0])
]


STOPS: list[signal.Signals] = []  # sent in the step before


def ruining_pass(
    model: nn.Module, batch: Batch, x_adv: Tensor | None, options: LossOptions, teachers: Teachers | None
) -> Outputs:
    """In one batch of the run the loss is that of reversed logits, which one step learns."""
    if STOPS and torch.equal(batch.index, ORDER[RUINED[1] - 1]):
        os.kill(os.getpid(), STOPS.pop())
    outputs = joint_pass(model, batch, x_adv, options, teachers)
    if not torch.equal(batch.index, ORDER[RUINED[1]]):
        return outputs
    return outputs._replace(clean=-30 * outputs.clean, adversarial=-30 * outputs.adversarial)


@dataclass(frozen=True)
class Ruined(PGDAT):
    forward: ClassVar[Forward] = staticmethod(ruining_pass)


RECIPE = Ruined(
    epochs=EPOCHS,
    batch_size=12,
    lr=0.05,
    attack_kind="n_fgsm",
    attack_steps=1,
    schedule="cosine",
    overfitting_checks=4,
    overfitting_images=12,
    validate_limit=12,
    log_every=3,
    ema_decay=0.5,
)


def go(folder: Path, recipe: PGDAT = RECIPE, **options: Any) -> RunResult:
    settings = {"tensorboard": False, "quiet": True} | options
    return train(recipe, net(), SPLITS, folder, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("guarded") / "run").folder


def test_a_collapsed_network_goes_back_to_the_last_good_check(whole: Path, tmp_path: Path) -> None:
    ruined = 4 * RUINED[0] + RUINED[1] + 1  # the step, from 1
    (record,) = read_log(whole, "rollback")
    assert (record["step"], record["to_step"], record["epoch"]) == (ruined, ruined - 1, RUINED[0] + 1)
    assert record["robust_accuracy"] < 0.5 * record["best_accuracy"]
    assert record["best_accuracy"] > 0.7
    without = go(tmp_path / "without", replace(RECIPE, overfitting_checks=0))
    robust = {name: read_log(f, "epoch")[RUINED[0]]["robust_accuracy"]
              for name, f in (("with", whole), ("without", without.folder))}  # fmt: skip
    assert robust["with"] > 0.7 > robust["without"]


def test_weights_momentum_and_average_go_back_and_the_schedule_does_not(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is stopped before and after the collapse, and ends as the uninterrupted one."""
    folder, ruined = tmp_path / "run", 4 * RUINED[0] + RUINED[1] + 1
    STOPS.append(signal.SIGTERM)
    with pytest.raises(SystemExit):
        go(folder)
    before = checkpoint.load_state(folder)
    capsys.readouterr()
    go(folder, max_minutes=1e-9, resume=True, quiet=False)
    said = capsys.readouterr().out
    assert f"step {ruined} (epoch {RUINED[0] + 1}): catastrophic overfitting" in said
    assert f"back to the weights of step {ruined - 1}, and PGD up to step {ruined + 4}" in said
    after = checkpoint.load_state(folder)
    assert (before["step"], after["step"]) == (ruined - 1, ruined)
    for part in ("model", "average"):
        one, other = (flat(state[part]) for state in (before, after))
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    one, other = (flat(state["optimizer"]["state"]) for state in (before, after))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert after["scheduler"]["last_epoch"] == ruined
    assert after["optimizer"]["param_groups"][0]["lr"] < before["optimizer"]["param_groups"][0]["lr"]
    assert after["guard"]["rescue_until"] == ruined + 4
    assert go(folder, resume=True).finished
    assert_same_end(whole, folder)


def assert_same_end(whole: Path, folder: Path) -> None:
    one, other = (flat(checkpoint.load_state(run)) for run in (whole, folder))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert [r["step"] for r in read_log(folder, "rollback")] == [
        r["step"] for r in read_log(whole, "rollback")
    ]
    for name in ("last.safetensors", "best.safetensors"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes()


def flat(value: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else ()
    return {name: one for key, part in pairs for name, one in flat(part, f"{path}.{key}").items()}


@pytest.mark.slow
def test_a_run_that_is_stopped_at_every_step_ends_the_same(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result, starts = go(folder, max_minutes=1e-9), 1
    while not result.finished:
        result, starts = go(folder, max_minutes=1e-9, resume=True), starts + 1
    assert starts >= 4 * EPOCHS - EPOCHS  # the last step of an epoch is separate
    assert_same_end(whole, folder)


def guard(checks: int = 2, steps: int = 10) -> OverfittingGuard:
    recipe = PGDAT(attack_kind="fgsm_rs", attack_steps=1, overfitting_checks=checks)
    return OverfittingGuard(recipe, net(), SPLITS.train, steps, seed=0)


@pytest.mark.parametrize(
    ("checks", "steps", "after"), [(1, 4, [4]), (2, 5, [3, 5]), (3, 10, [4, 7, 10]), (9, 3, [1, 2, 3])]
)
def test_checks_are_spread_over_an_epoch(checks: int, steps: int, after: list[int]) -> None:
    one = guard(checks, steps)
    assert [batch for batch in range(1, steps + 1) if one.due(batch)] == after


def test_only_a_large_fall_is_a_collapse() -> None:
    one = guard()
    for step, accuracy in enumerate((0.0, 0.08, 0.04, 0.4, 0.25, 0.21)):  # small, or not below half
        assert one.collapsed(accuracy, step, lambda step=step: {"step": step}) is None
    assert (one.best, one.step) == (0.4, 5)
    assert one.collapsed(0.19, 6, dict) == {"step": 5}
    assert one.rescue_until == 16
    assert one.collapsed(0.3, 7, lambda: {"step": 7}) is None
    assert one.in_a_row == 0
    for step in range(8, 8 + MOST_IN_A_ROW - 1):
        assert one.collapsed(0.1, step, dict) == {"step": 7}
    with pytest.raises(RuntimeError, match=r"5 checks in a row.*best PGD accuracy, 40\.0 %, last 1\.0 %"):
        one.collapsed(0.01, 20, dict)


def test_the_attack_after_a_collapse_has_several_steps() -> None:
    pgd = guard().rescue.pgd  # type: ignore[attr-defined]
    assert (pgd.steps, pgd.step_size, pgd.eps) == (3, 0.025, 0.05)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("pgd_at", {"overfitting_checks": -1}, "overfitting_checks must be an integer of at least 0"),
        ("pgd_at", {"overfitting_images": 0}, "overfitting_images must be an integer of at least 1"),
        ("pgd_at", {"rescue_steps": 0}, "rescue_steps must be an integer of at least 1"),
        ("standard", {"overfitting_checks": 1}, "overfitting_checks must be 0: standard does not attack"),
        ("advmoe", {"overfitting_checks": 1}, "overfitting_checks must be 0: advmoe makes 2 updates"),
    ],
)
def test_bad_settings_of_the_overfitting_guard_are_named(
    name: str, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_for(name, "cifar10", **wrong)


def test_a_check_needs_held_out_images(tmp_path: Path) -> None:
    splits = SPLITS._replace(validation=SPLITS.validation.take(torch.arange(0)))
    with pytest.raises(ValueError, match=r"splits\.validation is empty"):
        train(RECIPE, net(), splits, tmp_path / "run", select_on="test", quiet=True)
    assert not (tmp_path / "run").exists()

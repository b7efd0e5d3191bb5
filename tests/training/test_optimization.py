"""Optimizers and schedules against torch's and their formulas; a skipped step changes nothing."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.fake_cuda import Recorder
from support.training_step import batch, broken, linear, made
from torch import Tensor, nn

from awnet.training import PGDAT, Recipe, recipe_for
from awnet.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Module:
    torch.manual_seed(0)
    return linear()


def shifted(x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
    return 0.9 * x


ADAMW = PGDAT(optimizer="adamw", lr=0.01, weight_decay=0.1, epochs=4, schedule="linear", warmup_epochs=1.0)
NESTEROV = PGDAT(nesterov=True, lr=0.1, weight_decay=0.01, epochs=4, schedule="cosine")


@pytest.mark.parametrize("recipe", [ADAMW, NESTEROV], ids=["adamw", "nesterov"])
def test_a_step_equals_torchs(recipe: Recipe) -> None:
    model = net().double()
    other = copy.deepcopy(model)
    step = made(replace(recipe, clip_norm=0.3), model)
    settings: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "foreach": False}
    if recipe.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            other.parameters(), betas=(0.9, 0.999), **settings
        )
    else:
        optimizer = torch.optim.SGD(other.parameters(), momentum=0.9, nesterov=True, **settings)
    for i in range(6):
        data = batch(seed=i, dtype=torch.float64)
        for group, ours in zip(optimizer.param_groups, step.optimizer.param_groups, strict=True):
            group["lr"] = ours["lr"]
        step(data, shifted)
        optimizer.zero_grad()
        clean, adversarial = other(data.x), other(0.9 * data.x)
        (0.5 * F.cross_entropy(clean, data.y) + 0.5 * F.cross_entropy(adversarial, data.y)).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.3)
        optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        # clip_grad_norm_ adds 1e-6 to the norm, and ours divides by a float32; AdamW hardly feels a scale
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def everything(step: TrainingStep) -> list[Tensor]:
    slots = [value for state in step.optimizer.state.values() for value in state.values()]
    return [value.clone() for value in (*step.model.state_dict().values(), *slots) if value is not None]


@pytest.mark.filterwarnings("ignore:Detected call of")  # the schedule advances before a first step
@pytest.mark.parametrize("when", [0, 2])
def test_a_skipped_step_leaves_adamw_as_it_was(when: int) -> None:
    whole, part = (made(ADAMW, net()) for _ in range(2))
    for i in range(4):
        if i == when:
            assert whole(batch(seed=i), broken)["skipped"].item() == 1
            part.scheduler.step()
        else:
            for step in (whole, part):
                step(batch(seed=i), shifted)
    for a, b in zip(everything(whole), everything(part), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", [ADAMW, NESTEROV], ids=["adamw", "nesterov"])
def test_a_resumed_step_computes_the_same_bits(recipe: Recipe) -> None:
    one = made(recipe, net())
    for i in range(3):
        one(batch(seed=i), shifted)
    two = made(recipe, net())
    two.model.load_state_dict(copy.deepcopy(one.model.state_dict()))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for i in range(3, 6):
        for step in (one, two):
            step(batch(seed=i), shifted)
    assert all(torch.equal(a, b) for a, b in zip(everything(one), everything(two), strict=True))
    assert one.optimizer.param_groups[0]["lr"] == two.optimizer.param_groups[0]["lr"]


def test_a_captured_step_of_adamw_equals_the_step() -> None:
    recorder = Recorder()
    plain = made(ADAMW, net())
    captured = made(replace(ADAMW, capture=True), net(), record=recorder)
    for i in range(6):
        for step in (plain, captured):
            step(batch(seed=i), broken if i == 4 else shifted)
    assert len(recorder.recorded) == 1
    for a, b in zip(everything(plain), everything(captured), strict=True):
        # a rate that is a float32 tensor instead of a number
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def factors(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    optimizer = recipe.build_optimizer(net())
    scheduler = recipe.build_scheduler(optimizer, steps_per_epoch)
    actual = []
    for _ in range(recipe.epochs * steps_per_epoch):
        actual.append(optimizer.param_groups[0]["lr"] / recipe.lr)
        optimizer.step()
        scheduler.step()
    return actual


def test_schedules_are_their_formulas() -> None:
    steps = 3
    for name, after in (
        ("cosine", lambda t: 0.5 * (1 + math.cos(math.pi * t))),
        ("linear", lambda t: 1 - t),
    ):
        plain = factors(PGDAT(epochs=4, schedule=name), steps)  # type: ignore[arg-type]
        assert plain == pytest.approx([after(n / 12) for n in range(12)])
        warm = factors(PGDAT(epochs=4, schedule=name, warmup_epochs=1.5), steps)  # type: ignore[arg-type]
        expected = [(n + 1) / 4 for n in range(4)] + [after((n - 4) / 8) for n in range(4, 12)]
        assert warm == pytest.approx(expected)  # 1.5 epochs of 3 steps round to 4
    warm = factors(PGDAT(epochs=4, milestones=(2, 3), warmup_epochs=1), steps)
    assert warm == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": "adam"}, "optimizer must be one of"),
        ({"optimizer": "adamw", "nesterov": True}, "nesterov needs optimizer=sgd with a momentum"),
        ({"momentum": 0, "nesterov": True}, "nesterov needs optimizer=sgd with a momentum"),
        ({"nesterov": 1}, "nesterov must be true or false"),
        ({"schedule": "poly"}, "schedule must be one of"),
        ({"schedule": "onecycle", "warmup_epochs": 1}, "warmup_epochs must be 0 with schedule=onecycle"),
        ({"warmup_epochs": -1}, "warmup_epochs must be a number of at least 0"),
        ({"epochs": 5, "warmup_epochs": 6}, "warmup_epochs must be at most epochs, 5, got 6"),
    ],
)
def test_bad_settings_of_optimizers_and_schedules_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_for("pgd_at", "cifar10", **wrong)

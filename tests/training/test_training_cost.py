"""Multiply-adds of training: against torch's own counter, by hand, and as a way to set epochs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from awnet.data import Batch, load_dataset
from awnet.models import create_model
from awnet.ops import use_backend
from awnet.reproduce import BUDGETS, EXPERIMENTS
from awnet.reproduce.runs import Runs
from awnet.training import TrainingStep, recipe_for
from awnet.training.cost import MultiplyAddCounter, cost_settings, multiply_adds

DIGITS = load_dataset("digits").train


def no_attack(x: torch.Tensor, y: torch.Tensor, *, index: torch.Tensor) -> torch.Tensor:
    raise AssertionError("plain training attacks nothing")


def test_plain_training_costs_what_torch_counts() -> None:
    recipe = recipe_for("standard", "digits")
    model = create_model("resnet_tiny", in_channels=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    actual = multiply_adds(recipe, model, DIGITS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    step = TrainingStep(recipe, model, torch.device("cpu"), steps_per_epoch=10)
    step.start_epoch(0)
    batch: Batch = next(DIGITS.batches(8))
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        step(batch, no_attack)
    assert actual * 8 * 2 == counter.get_total_flops()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_grouped_convolution_costs_its_groups_share_in_both_directions(groups: int) -> None:
    x = torch.rand(3, 8, 6, 5, requires_grad=True)
    weight = torch.rand(12, 8 // groups, 3, 3, requires_grad=True)
    once = 3 * 12 * 6 * 5 * (8 // groups) * 9
    with MultiplyAddCounter() as forward:
        y = F.conv2d(x, weight, padding=1, groups=groups)
    assert forward.total == once
    with MultiplyAddCounter() as both:
        y.sum().backward()
    assert both.total == 2 * once
    y = F.conv2d(x.detach(), weight, padding=1, groups=groups)
    with MultiplyAddCounter() as one:
        y.sum().backward()
    assert one.total == once  # the input's gradient is not wanted


@pytest.mark.parametrize("name", ["resnet_tiny", "awnet_tiny"])
def test_a_step_of_the_attack_costs_a_forward_pass_and_a_gradient_for_the_image(name: str) -> None:
    model = create_model(name, in_channels=1)
    costs = [multiply_adds(recipe_for("pgd_at", "digits", attack_steps=n), model, DIGITS) for n in (1, 2, 5)]
    batch = next(DIGITS.batches(8))
    with use_backend("reference"), MultiplyAddCounter() as counter, torch.no_grad():
        model.eval()(batch.x)
    forward = counter.total / 8
    step = costs[1] - costs[0]
    assert costs[2] - costs[1] == pytest.approx(3 * step, abs=4)  # costs are rounded to an image's
    # every product has a gradient for its input, as large as itself; none is wanted for a weight
    if name == "resnet_tiny":
        assert step == pytest.approx(2 * forward, abs=2)
    else:  # except for the filters of each sample, from which ω's gradient is computed
        assert 2 * forward < step < 3 * forward


def test_the_teachers_forward_passes_are_counted() -> None:
    student, wide = (create_model(name, in_channels=1) for name in ("resnet_tiny", "resnet_tiny_wide"))
    recipe = recipe_for("mtard", "digits")
    forward = {}
    for name, model in (("student", student), ("wide", wide)):
        with use_backend("reference"), MultiplyAddCounter() as counter, torch.no_grad():
            model.eval()(next(DIGITS.batches(8)).x)
        forward[name] = counter.total / 8
    costs = [multiply_adds(recipe, student, DIGITS, pair) for pair in ((student, student), (wide, student))]
    assert costs[1] - costs[0] == pytest.approx(forward["wide"] - forward["student"], abs=2)
    same_attack = multiply_adds(recipe_for("pgd_at", "digits"), student, DIGITS)  # and a pass on both images
    assert costs[0] - same_attack == pytest.approx(2 * forward["student"], abs=2)


def test_a_recipe_without_its_teachers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 2 teachers, got 0"):
        multiply_adds(recipe_for("mtard", "digits"), nn.Identity(), DIGITS)


def test_settings_of_the_optimizer_and_the_images_do_not_change_the_cost() -> None:
    model = create_model("awnet_tiny", in_channels=1)
    plain = recipe_for("pgd_at", "digits", attack_steps=1)
    for settings in (
        {"lr": 0.01, "router_lr": 0.2, "momentum": 0.5, "nesterov": True, "weight_decay": 0.0},
        {"schedule": "cosine", "warmup_epochs": 2.0, "milestones": (3,), "lr_decay": 0.5, "ema_decay": 0.9},
        {"optimizer": "adamw", "augment": ("cutout", "cutmix"), "label_smoothing": 0.1},
    ):
        changed = recipe_for("pgd_at", "digits", attack_steps=1, **settings)
        assert cost_settings(changed) == cost_settings(plain)
        assert multiply_adds(changed, model, DIGITS) == multiply_adds(plain, model, DIGITS)
    for settings in ({"attack_steps": 2}, {"awp": 0.01}):
        changed = recipe_for("pgd_at", "digits", **({"attack_steps": 1} | settings))
        assert cost_settings(changed) != cost_settings(plain)
        assert multiply_adds(changed, model, DIGITS) > multiply_adds(plain, model, DIGITS)


def test_systems_of_equal_cost_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def counting(recipe, model, *others):
        counted.append(recipe)
        return multiply_adds(recipe, model, *others)

    monkeypatch.setattr("awnet.reproduce.runs.multiply_adds", counting)
    runs = Runs(
        tmp_path, "smoke", BUDGETS["smoke"], data_dir=tmp_path, seed=0, device="cpu",
        console=Console(quiet=True), teachers=EXPERIMENTS["recipes"].teachers,
    )  # fmt: skip
    labels = ("PGD-AT", "label smoothing 0.1", "AdamW", "SiLU", "Cutout", "TRADES", "N-FGSM", "CutMix")
    rows = {system.label: system for system in EXPERIMENTS["recipes"].systems}
    systems = runs.at_equal_cost([rows[label] for label in labels], "cifar10")
    assert [recipe.title for recipe in counted] == ["pgd_at", "pgd_at", "trades", "pgd_at"]
    train = runs.splits("cifar10").train
    costs = [multiply_adds(runs.recipe(s, "cifar10"), runs.build_network(s, train), train) for s in systems]
    assert [s.settings["epochs"] for s in systems] == [max(1, round(costs[0] / cost)) for cost in costs]


def test_epochs_at_equal_cost_are_those_that_come_nearest(tmp_path: Path) -> None:
    budget = replace(BUDGETS["smoke"], epochs=20)
    runs = Runs(
        tmp_path, "smoke", budget, data_dir=tmp_path, seed=0, device="cpu", console=Console(quiet=True)
    )
    systems = runs.at_equal_cost(EXPERIMENTS["systems"].systems[:3], "cifar10")
    train = runs.splits("cifar10").train
    costs = [multiply_adds(runs.recipe(s, "cifar10"), runs.build_network(s, train), train) for s in systems]
    epochs = [system.settings["epochs"] for system in systems]
    assert epochs[0] == 20
    assert epochs[1] > 20  # the static twin is cheaper
    for cost, count in zip(costs, epochs, strict=True):
        assert abs(cost * count - costs[0] * 20) <= cost / 2

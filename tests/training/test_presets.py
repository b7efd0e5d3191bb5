"""Recipes by name: presets, data sets, and runs of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from awnet.data import Splits, from_arrays
from awnet.training import MTARD, PRESETS, RECIPES, MTARDWeights, Standard, list_recipes, recipe_for, train

pytestmark = pytest.mark.usefixtures("one_thread")


def splits() -> Splits:
    x = torch.randint(0, 256, (12, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    part = from_arrays(x, torch.arange(12) % 3, eps=0.05)
    return Splits(part, part, part)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_method_with_its_settings_and_a_source(name: str) -> None:
    preset, recipe = PRESETS[name], recipe_for(name, "cifar10")
    assert type(recipe) is preset.method
    assert {key: getattr(recipe, key) for key in preset.settings} == dict(preset.settings)
    assert recipe.title == recipe.to_dict()["name"] == name
    assert "preset" not in recipe.to_dict()
    assert len(preset.source) > 20
    method, _, kind = name.rpartition("_")
    if method in RECIPES:
        assert recipe_for(method, "cifar10", preset=kind) == recipe  # type: ignore[arg-type]


def test_the_papers_settings_are_the_methods() -> None:
    assert recipe_for("trades", "cifar10", preset="paper") == recipe_for("trades", "cifar10")
    assert recipe_for("trades", "cifar10").title == "trades"
    assert list_recipes() == [*RECIPES, *PRESETS]


@pytest.mark.parametrize(
    ("name", "preset", "message"),
    [
        ("trades", "quick", "preset must be one of paper, fast, strong, got 'quick'"),
        ("trades_fast", "fast", "recipe 'trades_fast' is a preset itself"),
        ("hat", "fast", r"recipe 'hat' has no preset 'fast'; recipes with one: .*trades"),
    ],
)
def test_unknown_presets_are_named(name: str, preset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_for(name, "cifar10", preset=preset)


def test_the_name_of_a_preset_is_not_a_setting() -> None:
    with pytest.raises(TypeError, match="preset"):
        Standard(preset=1)  # type: ignore[arg-type]


def test_adamw_brings_its_rates_unless_they_are_given() -> None:
    assert not recipe_for("trades_strong", "cifar10", optimizer="adamw").nesterov
    recipe = recipe_for("pgd_at", "cifar10", optimizer="adamw", router_lr=0.5)
    assert (recipe.lr, recipe.router_lr, recipe.weight_decay) == (1e-3, 0.5, 0.05)


def test_an_attack_of_one_step_brings_its_number_of_steps() -> None:
    assert recipe_for("trades", "cifar10", attack_kind="fgsm_rs").attack_steps == 1
    with pytest.raises(ValueError, match="attack_steps must be 1"):
        recipe_for("trades", "cifar10", attack_kind="fgsm_rs", attack_steps=3)


@pytest.mark.parametrize("name", ["trades_fast", "pgd_at"])
def test_a_run_of_a_version_with_fewer_settings_resumes(tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 6, "attack_steps": 1}
    options: dict[str, Any] = {"quiet": True, "tensorboard": False}
    recipe = recipe_for(name, "mine", **settings)
    train(recipe, net(), splits(), tmp_path, max_minutes=1e-9, **options)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["recipe"]["name"] == name
    new = ("label_smoothing", "optimizer", "nesterov", "warmup_epochs", "attack_kind", "attack_radius", "awp")
    new += ("augment", "awp_warmup", "overfitting_checks", "overfitting_images", "rescue_steps")
    for setting in new:
        del config["recipe"][setting]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert train(recipe, net(), splits(), tmp_path, resume=True, **options).finished
    changed = recipe_for(name, "mine", label_smoothing=0.1, **settings)
    with pytest.raises(ValueError, match=r"label_smoothing was 0\.0, is now 0\.1"):
        train(changed, net(), splits(), tmp_path, resume=True, **options)


def test_the_state_of_mtards_weights_without_temperatures_is_the_earlier_versions() -> None:
    assert set(MTARDWeights().state_dict()) == {"w_nat", "first"}
    assert MTARD().temperature_lr == 0


def test_the_strong_presets_have_their_published_ingredients() -> None:
    trades, pgd_at, mtard = (
        recipe_for(name, "cifar10", preset="strong") for name in ("trades", "pgd_at", "mtard")
    )
    for recipe in (trades, pgd_at, mtard):
        assert (recipe.ema_decay, recipe.nesterov, recipe.schedule) == (0.9995, True, "cosine")
    assert (trades.awp, trades.awp_warmup, trades.label_smoothing, trades.adv_weight) == (0.005, 10, 0.1, 5.0)
    assert (pgd_at.awp, pgd_at.awp_warmup, pgd_at.label_smoothing) == (0.01, 0, 0.1)
    assert isinstance(mtard, MTARD)
    assert mtard.temperature_lr == 0.001
    single = recipe_for("single_step", "cifar10")
    assert (single.attack_kind, single.attack_steps, single.overfitting_checks) == ("n_fgsm", 1, 4)


def test_warm_ups_scale_with_the_number_of_epochs_unless_they_are_given() -> None:
    assert recipe_for("trades_strong", "cifar10", epochs=50).awp_warmup == 5
    assert recipe_for("trades_strong", "digits").awp_warmup == 1  # 12 epochs
    assert recipe_for("trades_strong", "cifar10", epochs=50, awp_warmup=10).awp_warmup == 10
    assert recipe_for("trades_strong", "digits").schedule == "cosine"


@pytest.mark.parametrize("name", ["pgd_at_strong", "single_step"])
def test_a_preset_trains(tmp_path: Path, name: str) -> None:
    recipe = recipe_for(name, "mine", epochs=2, batch_size=6, attack_steps=1)
    result = train(recipe, net(), splits(), tmp_path, quiet=True, tensorboard=False)
    assert result.finished
    assert result.history[-1]["skipped_steps"] == 0
    assert json.loads((tmp_path / "config.json").read_text())["recipe"]["name"] == name

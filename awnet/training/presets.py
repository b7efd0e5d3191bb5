"""Presets: recipes with the settings of a publication, or of short runs; and recipes by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from awnet.scalars import is_integer, is_number, plain
from awnet.training.recipes import MTARD, PGDAT, RECIPES, Recipe, Standard, Trades

PresetName = Literal["paper", "fast", "strong"]


@dataclass(frozen=True)
class Preset:
    """Settings of a method that belong together.

    name: of the preset, a recipe's name for :func:`recipe_for` and ``awnet train --recipe``.
    method: the recipe that it sets.
    settings: those that differ from the recipe's defaults.
    source: where they come from.
    """

    name: str
    method: type[Recipe]
    settings: Mapping[str, Any]
    source: str


_ONE_CYCLE = {
    "epochs": 30,
    "lr": 0.2,
    "router_lr": 0.02,
    "weight_decay": 5e-4,
    "schedule": "onecycle",
    "validate_every": 5,
}
_SHORT = "30 epochs, one cycle of the learning rate (Smith and Topin, 2018), decay of Pang et al. (2021)"

_STRONG = {
    "lr": 0.1,
    "router_lr": 0.01,
    "weight_decay": 5e-4,
    "nesterov": True,
    "schedule": "cosine",
    "ema_decay": 0.9995,
    "validate_every": 5,
}
_MODERN = (
    "weight decay of Pang et al. (2021); Nesterov and cosine of Wang et al. (2023); weight average as in "
    "Rebuffi et al. (2021), decay 0.9995"
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("mtard_fast", MTARD, _ONE_CYCLE, _SHORT),
        Preset("trades_fast", Trades, _ONE_CYCLE, _SHORT),
        Preset("pgd_at_fast", PGDAT, _ONE_CYCLE, _SHORT),
        Preset(
            "standard_fast",
            Standard,
            _ONE_CYCLE | {"epochs": 18, "batch_size": 512, "lr": 0.4, "router_lr": 0.04, "validate_every": 6},
            "a clean teacher in 18 epochs of large batches, meant for a minute or two on an H200",
        ),
        Preset(
            "pgd_at_strong",
            PGDAT,
            _STRONG | {"label_smoothing": 0.1, "awp": 0.01},
            f"{_MODERN}; label smoothing 0.1 of Wang et al. (2023); AWP 0.01 of Wu et al. (2020)",
        ),
        Preset(
            "trades_strong",
            Trades,
            _STRONG | {"label_smoothing": 0.1, "adv_weight": 5.0, "awp": 0.005, "awp_warmup": 10},
            f"{_MODERN}; label smoothing 0.1 and factor 5 of Wang et al. (2023); AWP 0.005 after 10 epochs "
            "of Wu et al. (2020)",
        ),
        Preset(
            "mtard_strong",
            MTARD,
            _STRONG | {"temperature_lr": 0.001},
            f"{_MODERN}; the teachers' temperatures of B-MTARD, Zhao et al. (2024)",
        ),
        Preset(
            "single_step",
            PGDAT,
            _ONE_CYCLE | {"attack_kind": "n_fgsm", "attack_steps": 1, "overfitting_checks": 4},
            "N-FGSM of de Jorge et al. (2022), 30 epochs, one cycle up to 0.2; clean images as in PGD-AT",
        ),
    )
}

# Settings of ``optimizer=adamw``, for which those of SGD are far too large
_ADAMW = {"lr": 1e-3, "router_lr": 1e-4, "weight_decay": 0.05, "nesterov": False}

# Settings per data set that differ from a recipe's defaults (the CIFAR settings of the paper's methods).
_SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 12, "batch_size": 64, "schedule": "onecycle", "validate_every": 3},
}
_PAPERS = (MTARD, Trades, PGDAT, Standard)
_PAPERS_SETTINGS: dict[str, dict[str, Any]] = {
    "tiny_imagenet": {"epochs": 50, "batch_size": 128, "milestones": (25, 40)},
}
_MTARD_SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"robust_teacher": "pgd_at"},  # a weak TRADES teacher limits its students here
    "cifar100": {"temperature": 5.0},
    "tiny_imagenet": {"temperature": 5.0},
}


def list_recipes() -> list[str]:
    """The names that :func:`recipe_for` knows: methods, then presets."""
    return [*RECIPES, *PRESETS]


def recipe_for(name: str, dataset_name: str, *, preset: PresetName | None = None, **overrides: Any) -> Recipe:
    """The recipe ``name`` with its settings for a data set, changed by ``overrides``.

    An unknown data set gets the recipe's CIFAR-10 settings. Milestones and the epochs of warm-ups scale with
    the number of epochs: 75 and 90 of 100 epochs become 7 and 9 of 10.

    Args:
        name: a method, such as ``trades``, or a preset, such as ``trades_fast``; see :func:`list_recipes`.
        dataset_name: a data set, see :func:`awnet.data.list_datasets`.
        preset: of a method: ``paper`` are its defaults, and ``fast`` and ``strong`` are the presets
            ``name_fast`` and ``name_strong``.
        overrides: settings by name.
    """
    if not isinstance(name, str) or name not in list_recipes():
        raise ValueError(f"unknown recipe {name!r}; available: {', '.join(list_recipes())}")
    name = _with_preset(name, preset)
    chosen = PRESETS.get(name)
    kind = RECIPES[name] if chosen is None else chosen.method
    known = {field.name for field in fields(kind)} - {"preset"}
    for key in overrides:
        if key not in known:
            raise ValueError(f"recipe {name!r} has no setting {key!r}; it has {', '.join(sorted(known))}")
    if overrides.get("optimizer") == "adamw":
        overrides = _ADAMW | overrides
    base = {} if chosen is None else dict(chosen.settings)
    settings = base | {
        key: value
        for key, value in _SETTINGS.get(dataset_name, {}).items()
        if not (key == "schedule" and key in base)
    }
    if chosen is None and (kind in _PAPERS or kind.network is not None):  # baseline networks too
        settings |= _PAPERS_SETTINGS.get(dataset_name, {})
    if issubclass(kind, MTARD):
        settings |= _MTARD_SETTINGS.get(dataset_name, {})
    overrides = {key: plain(value) for key, value in overrides.items()}
    if overrides.get("attack_kind", "pgd") != "pgd":
        overrides.setdefault("attack_steps", 1)
    first, default = kind(**base), kind(**settings)
    settings |= {"preset": None if chosen is None else name}
    if is_integer(overrides.get("epochs")) and "milestones" not in overrides:
        scale = overrides["epochs"] / default.epochs
        settings["milestones"] = tuple(sorted({math.floor(m * scale) for m in default.milestones} - {0}))
    return kind(**(settings | _warm_ups(first, settings | overrides, overrides) | overrides))


def with_defaults(settings: Any) -> Any:
    """The settings of a recipe in config.json, with the defaults of those that are missing."""
    name = settings.get("name") if isinstance(settings, dict) else None
    if name not in list_recipes():
        return settings
    chosen = PRESETS.get(name)
    recipe = RECIPES[name]() if chosen is None else chosen.method(**chosen.settings, preset=name)
    return {key: value for key, value in recipe.to_dict().items() if key != "capture"} | settings


def _with_preset(name: str, preset: str | None) -> str:
    if preset is None:
        return name
    if preset not in get_args(PresetName):
        raise ValueError(f"preset must be one of {', '.join(get_args(PresetName))}, got {preset!r}")
    if name in PRESETS:
        raise ValueError(f"recipe {name!r} is a preset itself: give the method, or leave preset out")
    if preset == "paper":
        return name
    chosen = f"{name}_{preset}"
    if chosen not in PRESETS:
        have = ", ".join(one.removesuffix(f"_{preset}") for one in PRESETS if one.endswith(f"_{preset}"))
        raise ValueError(f"recipe {name!r} has no preset {preset!r}; recipes with one: {have}")
    return chosen


def _warm_ups(first: Recipe, settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The epochs of warm-ups, scaled as the number of epochs differs from the preset's."""
    epochs = settings.get("epochs", first.epochs)
    if not (is_integer(epochs) and epochs >= 1) or epochs == first.epochs:
        return {}
    scale = epochs / first.epochs
    scaled: dict[str, Any] = {}
    if "awp_warmup" not in overrides and first.awp_warmup:
        scaled["awp_warmup"] = math.floor(first.awp_warmup * scale)
    if "warmup_epochs" not in overrides and is_number(first.warmup_epochs) and first.warmup_epochs:
        scaled["warmup_epochs"] = first.warmup_epochs * scale
    return scaled

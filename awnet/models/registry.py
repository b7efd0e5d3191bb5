"""Models by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from awnet import rng
from awnet.models import advmoe, awnet, mobilenet, rdi, repvgg, resnet, separate, swin, vgg, wide_resnet
from awnet.models.sizes import build_on_meta, check_memory, numbers
from awnet.nn import RoutedNetwork, unwrapped
from awnet.scalars import check_integer, is_number, plain

Build = Callable[..., nn.Module]
_REGISTRY: dict[str, Build] = {}


def register_model(name: str, build: Build) -> None:
    """Registers ``name``: ``create_model(name, …)`` calls ``build(num_classes=…, in_channels=…, **options)``.

    The parameters of ``build`` are the model's options. Raises ValueError if ``name`` is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"name {name!r} is taken by {_REGISTRY[name]}; choose another")
    _REGISTRY[name] = build


_FAMILIES: tuple[tuple[tuple[str, ...], Build], ...] = (
    (advmoe.NAMES, advmoe.ADVMOE),
    (awnet.NAMES, awnet.AWResNet),
    (mobilenet.NAMES, mobilenet.MobileNetV2),
    (rdi.NAMES, rdi.RDIResNet),
    (repvgg.NAMES, repvgg.RepVGG),
    (resnet.NAMES, resnet.ResNet),
    (separate.NAMES, separate.SeparateNet),
    (swin.NAMES, swin.Swin),
    (vgg.NAMES, vgg.VGG),
    (wide_resnet.NAMES, wide_resnet.WideResNet),
)
for _names, _class in _FAMILIES:
    for _name in _names:
        register_model(_name, partial(_class, _name))


_OURS = tuple(_REGISTRY.values())
_USUAL_SIZE = 16  # for larger options the memory is checked before the model is created


def class_of(name: str) -> type[nn.Module] | None:
    """The class of a model of the package; None for one of :func:`register_model`."""
    build = _REGISTRY.get(name)
    if not is_ours(name) or not isinstance(build, partial):
        return None
    kind: Any = build.func
    return kind if isinstance(kind, type) else None


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern such as ``"awnet*"``, sorted."""
    return sorted(name for name in _REGISTRY if fnmatchcase(name, pattern))


def create_model(name: str, *, num_classes: int = 10, in_channels: int = 3, **options: Any) -> nn.Module:
    """A new model with random weights, in train mode.

    Args:
        name: one of ``list_models()``.
        num_classes: K, the number of logits.
        in_channels: C of the images [B, C, H, W].
        options: the model's own, such as ``beta`` or ``bn`` (see :class:`awnet.models.AWResNet`).

    Returns:
        The model; its ``config`` (name, num_classes, in_channels, options) rebuilds it.

    Raises:
        ValueError: an unknown name (near ones are listed) or a value out of range.
        TypeError: an option that the model does not have (those it has are listed).
        MemoryError: the weights would take more than the machine's memory; nothing is allocated.
    """
    build, config = _checked(name, num_classes, in_channels, options)
    if max([*numbers(config["options"]), num_classes / 1000, in_channels / 100]) > _USUAL_SIZE:
        model = meta_model_of(config)
        if model is not None and torch.get_default_device().type != "meta":
            check_memory(model, _described(config))
    model = build(num_classes=config["num_classes"], in_channels=config["in_channels"], **config["options"])
    if config_of(model) is None:
        vars(model)[_CONFIG] = config  # a user's model may have another config
        if not hasattr(model, "config"):
            model.config = config  # type: ignore[assignment]
    return model


def create_seeded_model(name: str, seed: int, **options: Any) -> nn.Module:
    """:func:`create_model` with weights drawn from ``seed``; torch's global generator keeps its state."""
    with torch.random.fork_rng([]):
        torch.manual_seed(rng.torch_seed(seed, "model"))
        return create_model(name, **options)


_CONFIG = "_awnet_config"
SOURCE = "_awnet_source"  # attribute of models that are neither registered nor from a run


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """The arguments of :func:`create_model` that rebuild ``model``; None for any other model.

    Router settings (``beta``, ``p_temperature``, ``p_scale``) and a Separate-Net's ``threshold`` have their
    current values. An attribute ``config`` that the user set, in another form or to None, is ignored.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    if config is not None:
        config = vars(model).get(_CONFIG, config)
    if not isinstance(config, dict) or set(config) != {"name", "num_classes", "in_channels", "options"}:
        return None
    if not isinstance(config["name"], str) or not isinstance(config["options"], dict):
        return None
    options = dict(config["options"])
    if isinstance(model, RoutedNetwork):
        for module in (model.router, model):
            for option in ("beta", "p_temperature", "p_scale", "threshold"):
                value = plain(vars(module).get(option))
                if option in options and is_number(value):
                    options[option] = value
    return config | {"options": options}


def name_of(model: nn.Module) -> str:
    """The source that ``awnet.load_model`` took ``model`` from, its registered name, or its class's name."""
    model = unwrapped(model)
    config = config_of(model)
    known = type(model).__name__ if config is None else str(config["name"])
    return str(vars(model).get(SOURCE, known))


def is_ours(name: str) -> bool:
    """Whether ``name`` is a model of the package, not one of :func:`register_model`."""
    return _REGISTRY.get(name) in _OURS


def meta_model_of(config: dict[str, Any]) -> nn.Module | None:
    """The model that ``create_model`` would build, on the meta device.

    None for a model of :func:`register_model`, whose function may do anything. Raises what ``create_model``
    raises, and ValueError if a size is larger than torch can address.
    """
    name, options = config["name"], config["options"]
    build, config = _checked(name, config["num_classes"], config["in_channels"], options)
    if build not in _OURS:
        return None
    sizes = {"num_classes": config["num_classes"], "in_channels": config["in_channels"]}
    return build_on_meta(partial(build, **sizes, **config["options"]), _described(config))


def _described(config: dict[str, Any]) -> str:
    sizes = {"num_classes": config["num_classes"], "in_channels": config["in_channels"]} | config["options"]
    return f"{config['name']} with {', '.join(f'{key}={value!r}' for key, value in sizes.items())}"


def _checked(
    name: str, num_classes: int, in_channels: int, options: dict[str, Any]
) -> tuple[Build, dict[str, Any]]:
    """The function that builds a model, and its config in plain values."""
    if not isinstance(name, str) or name not in _REGISTRY:
        near = difflib.get_close_matches(str(name), _REGISTRY, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"available: {', '.join(list_models())}"
        raise ValueError(f"unknown model {name!r}; {hint} (awnet.list_models() lists all)")
    build = _REGISTRY[name]
    known = _options(build)
    if known is not None and (unknown := sorted(set(options) - known)):
        has = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise TypeError(f"{name} has no option {', '.join(unknown)}; {has}")
    num_classes = check_integer("num_classes", num_classes, 1)
    in_channels = check_integer("in_channels", in_channels, 1)
    options = {option: plain(value) for option, value in options.items()}
    return build, {"name": name, "num_classes": num_classes, "in_channels": in_channels, "options": options}


def model_options() -> set[str]:
    """Names of the options that some registered model has."""
    return set().union(*(_options(build) or () for build in _REGISTRY.values()))


def _options(build: Build) -> set[str] | None:
    """Names of the options that ``build`` takes; None if it takes any name."""
    function: Any = build.func if isinstance(build, partial) else build
    if isinstance(function, type):  # PyTorchModelHubMixin has a __new__(*args, **kwargs)
        function = vars(function).get("__init__", function)
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return set(parameters) - {"self", "name", "num_classes", "in_channels"}

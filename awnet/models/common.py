"""What all families of models use: the width factor, the config that rebuilds a model, FLOPs."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from awnet.nn.inference import InferenceCopy, inference_copy, not_supported
from awnet.scalars import check_integers, check_number, plain

# modules that packages import without requiring them → what provides them
_PROVIDERS = {
    "autoattack": "git+https://github.com/fra31/auto-attack",
    "pkg_resources": "'setuptools<81'",
}


def scaled(channels: int, width: float) -> int:
    """``channels`` times the factor ``width``, rounded, at least 1; ValueError unless ``width`` > 0."""
    return max(1, round(channels * check_number("width", width, above=0)))


def checked_router_widths(widths: Sequence[int] | None, default: Sequence[int], width: float) -> list[int]:
    """``widths``, integers of at least 1; if None, ``default`` times the factor ``width``."""
    if widths is None:
        return [scaled(stage_width, width) for stage_width in default]
    return check_integers("router_widths", widths, 1)


def config(name: str, num_classes: int, in_channels: int, **options: Any) -> dict[str, Any]:
    """The arguments of :func:`~awnet.models.create_model` that build the same network again."""
    options = {option: plain(value) for option, value in options.items()}
    if options.get("activation") == "relu":  # the default, which the configs of earlier versions do not name
        del options["activation"]
    return {
        "name": name,
        "num_classes": plain(num_classes),
        "in_channels": plain(in_channels),
        "options": options,
    }


def optional_module(name: str, package: str, needed_by: str) -> ModuleType:
    """The module ``name`` of an optional package.

    Args:
        name: ``"timm"`` or ``"timm.models"``, for example.
        package: what to install with pip.
        needed_by: subject of the error message.

    Raises:
        ImportError: it is not installed, or its import fails. Packages built for another torch raise errors
            of other types.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ImportError(f"{needed_by} needs {_import_problem(name, package, error)}") from error


def _import_problem(name: str, package: str, error: Exception) -> str:
    """The package of the module ``name``, why it does not import, and what to install."""
    top = name.partition(".")[0]
    missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
    if missing == top:
        return f"{top}, which is not installed: pip install {package}"
    versioned = top
    with suppress(importlib.metadata.PackageNotFoundError):
        versioned = f"{top} {importlib.metadata.version(top)}"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if "torchvision::" in reason:
        return (
            f"{versioned}, whose torchvision does not import beside torch {torch.__version__} ({reason}): "
            "install the torchvision of the same release and index, for a torch without CUDA pip install "
            "torchvision --index-url https://download.pytorch.org/whl/cpu"
        )
    missing = missing.partition(".")[0]
    if missing and missing != top:
        provider = _PROVIDERS.get(missing, missing)
        advice = f"the module {missing} is missing, which pip install {provider} installs"
    else:
        advice = f"install a version that fits the other packages: pip install --upgrade {package}"
    return f"{versioned}, which is installed but does not import ({reason}): {advice}"


def flops(network: nn.Module, run: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and linear layers in ``network`` that ``run()`` executes.

    A multiply-add counts as two; batch norms, activations and pools are not counted, as is usual.
    """
    total = 0

    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += 2 * output.numel() * module.weight[0].numel()

    hooks = [
        module.register_forward_hook(count)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return total


class WithInferenceCopy(nn.Module):
    """Adds the method ``inference_copy``, which attacks and evaluation use."""

    def inference_copy(self, dtype: torch.dtype | None = None) -> InferenceCopy:
        """Returns an inference copy of this network in eval mode, differentiable with respect to images only.

        ``refresh()`` of the copy copies this network's current weights to it.

        Args:
            dtype: dtype of weights and images; the model's own if None. ω, p and the algebra of batch norms
                stay float32 or wider.

        Raises:
            TypeError: a copy might not compute what this model does, because of a subclass, replaced layers,
                hooks or parametrized weights (:func:`awnet.nn.not_supported`). The message gives the reason.
        """
        copy = inference_copy(self, dtype)
        if copy is None:
            raise TypeError(
                f"{type(self).__name__} has no inference copy: {not_supported(self)}; freeze the model "
                "itself: `with awnet.attacks.frozen(model)`"
            )
        return copy

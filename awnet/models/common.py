"""What the families of networks share: a width factor, a configuration that rebuilds a model, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from awnet.nn.frozen import Frozen, FrozenCopy


def scaled(channels: int, width: float) -> int:
    """``channels`` times the factor ``width``, rounded, at least 1; ValueError unless ``width`` > 0."""
    if isinstance(width, bool) or not isinstance(width, int | float):
        raise TypeError(f"width must be a number (1 is the full network), got {width!r}")
    if not (width > 0 and math.isfinite(width)):
        raise ValueError(f"width must be finite and above 0 (1 is the full network), got {width}")
    return max(1, round(channels * width))


def config(name: str, num_classes: int, in_channels: int, **options: Any) -> dict[str, Any]:
    """What :func:`~awnet.models.create_model` needs to build the same network again."""
    return {"name": name, "num_classes": num_classes, "in_channels": in_channels, "options": options}


def flops(network: nn.Module, run: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and linear layers in ``network`` that ``run()`` executes.

    Two for a multiply-add; batch norms, activations and pools are left out, as is usual.
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


class Freezable(nn.Module):
    """Offers ``frozen`` for attacks, by a copy; a network with a faster way overrides it."""

    def frozen(self, dtype: torch.dtype | None = None) -> Frozen:
        """A copy of this network in test mode, differentiable in the images alone, for attacks.

        ``dtype`` is that of weights and images, the model's own if None. ``refresh()`` brings the copy up to
        date with this network, which it leaves as it is.
        """
        return FrozenCopy(self, next(self.parameters()).dtype if dtype is None else dtype)

"""The mean of each filter's weights, unscaled and as the router scales them (Fig. 1 and 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from awnet.attacks import frozen
from awnet.nn import AWNet, FilterScaledConv2d, route, routed_networks, with_routing

Array = NDArray[Any]


def filter_means(
    model: nn.Module, x: Tensor | None = None, scales: Mapping[str, Sequence[Tensor]] | None = None
) -> dict[str, Array]:
    """Means over (C_in, k, k) of the filters of every convolution larger than 1×1, float64 ``[C_out]`` each.

    Keys are ``weights/<layer>`` and, for each kind of image in ``scales`` (``clean``, an attack's name),
    ``<kind>/<layer>``: the means of the effective filters ω·𝒦, with ω averaged over the images. The router's
    convolutions are left out.

    Args:
        x: an image ``[1, C, H, W]``, run once to see which layer uses which filter scales of the router; only
            needed with ``scales``.
        scales: the average filter scales, ``[C_out]`` each, in the order of ``Routing.filter_scales``.
    """
    body = _body(model)
    means = {
        name: np.asarray(module.weight.detach().double().flatten(1).mean(1).cpu().numpy())
        for name, module in body.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    }
    results = {f"weights/{name}": mean for name, mean in means.items()}
    if not scales:
        return results
    if x is None:
        raise ValueError("x is missing: scales need an image to find the layer of each filter scale")
    numbers = _scale_of_each_layer(model, body, x)
    for kind, values in scales.items():
        for name, number in numbers.items():
            if name in means:
                results[f"{kind}/{name}"] = means[name] * values[number].double().cpu().numpy()
    return results


def _body(model: nn.Module) -> nn.Module:
    """The dynamic sub-network of the AW-Net that ``model`` is or contains; else the model itself."""
    networks = routed_networks(model)
    return networks[0].dynamic if len(networks) == 1 and isinstance(networks[0], AWNet) else model


def _scale_of_each_layer(model: nn.Module, body: nn.Module, x: Tensor) -> dict[str, int]:
    """Layer → position of its filter scale in ``Routing.filter_scales``, from one forward pass."""
    numbers: dict[str, int] = {}
    with ExitStack() as hooks, frozen(model), torch.no_grad():
        routing = route(model, x)

        def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            used = kwargs.get("filter_scale", args[1] if len(args) > 1 else None)
            for number, scale in enumerate(routing.filter_scales):
                if scale is used:
                    numbers[name] = number

        for name, module in body.named_modules():
            if isinstance(module, FilterScaledConv2d):
                hook = module.register_forward_pre_hook(partial(record, name), with_kwargs=True)
                hooks.enter_context(hook)
        with_routing(model, x, routing)
    return numbers

"""The mean of each filter's weights, in the static network and as the router scales it (Fig. 1 and 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    own convolutions are left out.

    Args:
        x: an image ``[1, C, H, W]``, run once to see which layer takes which of the router's signals; needed
            with ``scales`` alone.
        scales: that average, ``[C_out]`` for each signal in the order of ``Routing.filter_scales``.
    """
    body = _body(model)
    means = {
        name: _mean(module.weight)
        for name, module in body.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1
    }
    found = {f"weights/{name}": mean for name, mean in means.items()}
    if not scales:
        return found
    if x is None:
        raise ValueError("x is missing: scales need an image that shows which layer each of them is for")
    takers = _takers(model, body, x)
    for kind, values in scales.items():
        for name, signal in takers.items():
            if name in means:
                found[f"{kind}/{name}"] = means[name] * values[signal].double().cpu().numpy()
    return found


def _body(model: nn.Module) -> nn.Module:
    """The dynamic sub-network of the AW-Net that ``model`` is or holds; else the model itself."""
    networks = routed_networks(model)
    return networks[0].dynamic if len(networks) == 1 and isinstance(networks[0], AWNet) else model


def _takers(model: nn.Module, body: nn.Module, x: Tensor) -> dict[str, int]:
    """Layer → number of the router's signal that scales it, as a forward pass shows."""
    found: dict[str, int] = {}
    handles = []
    with frozen(model), torch.no_grad():
        routing = route(model, x)

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                taken = kwargs.get("filter_scale", args[1] if len(args) > 1 else None)
                for number, scale in enumerate(routing.filter_scales):
                    if scale is taken:
                        found[name] = number

            return hook

        try:
            for name, module in body.named_modules():
                if isinstance(module, FilterScaledConv2d):
                    handles.append(module.register_forward_pre_hook(watch(name), with_kwargs=True))
            with_routing(model, x, routing)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _mean(weight: Tensor) -> Array:
    return np.asarray(weight.detach().double().flatten(1).mean(1).cpu().numpy())

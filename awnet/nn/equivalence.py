"""Checks that a converted network computes the same as the original."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from awnet.nn.network import AWNet
from awnet.nn.rewriting import ConvertedNorm
from awnet.nn.router import Routing


@torch.no_grad()
def check_equivalence(
    original: nn.Module, network: AWNet, x: Tensor, norms: dict[str, ConvertedNorm]
) -> None:
    """Raises ValueError unless both give the same logits for ``x`` in eval mode at ω ≡ 1.

    They are compared twice, the second time with random batch norms, since a zero-initialized one hides its
    branch. ``original`` keeps the random values; ``network`` is restored.
    """
    _check_error(original, network, x)
    mixed = [norm.mixed for norm in norms.values()]
    tensors = [tensor for norm in mixed for tensor in (*norm.parameters(), *norm.buffers())]
    saved = [tensor.clone() for tensor in tensors], [norm.eps for norm in mixed]
    try:
        _randomize(original, x, norms)
        _check_error(original, network, x)
    finally:
        for tensor, value in zip(tensors, saved[0], strict=True):
            tensor.copy_(value)
        for norm, eps in zip(mixed, saved[1], strict=True):
            norm.eps = eps


def _randomize(original: nn.Module, x: Tensor, norms: dict[str, ConvertedNorm]) -> None:
    """Gives the batch norms of both networks the statistics of ``x`` and random weights."""
    parts: dict[str, Any] = dict(original.named_modules())
    pairs = [(parts[path if path in parts else path.removesuffix(".norm")], norms[path]) for path in norms]
    for norm, _ in pairs:
        norm.eps = 1e-8  # so that a signal does not vanish
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
            norm.train()
    original(x)
    for norm, (mixed, bias) in pairs:
        norm.eval()
        if norm.weight is not None:
            norm.weight.uniform_(0.5, 1.5)
            mixed.weight.copy_(norm.weight)
        mixed.running_mean.copy_(norm.running_mean if bias is None else norm.running_mean - bias)
        mixed.running_var.copy_(norm.running_var)
        mixed.eps = norm.eps


def _check_error(original: nn.Module, network: AWNet, x: Tensor) -> None:
    # a convolution that sums in another order differs by some 1e-6 in float32, a wrong graph by far more
    tolerance = 1e-3 if x.dtype in (torch.float32, torch.float64) else 0.1
    error = _error(original, network, x)
    if not error <= tolerance and x.dtype == torch.float32:  # rounding that batch norms enlarged, or a fault
        error = _error(copy.deepcopy(original).double(), copy.deepcopy(network).double(), x.double())
    if not error <= tolerance:
        raise ValueError(
            f"the converted network's logits are off by {error:.1e} of the largest one: forward does "
            "something that tracing cannot follow, such as changing in place a value that is used again"
        )


def _error(original: nn.Module, network: AWNet, x: Tensor) -> float:
    expected = original(x).nan_to_num()
    scales = [x.new_ones(len(x), width) for width in network.router.signal_widths]
    logits = network(x, routing=Routing(None, x.new_full((len(x),), 0.5), scales)).nan_to_num()
    return float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-6))

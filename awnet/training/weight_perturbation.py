"""Adversarial weight perturbation (Wu, Xia and Wang, NeurIPS 2020).

    v_l = γ ‖w_l‖ / ‖g_l‖ · g_l,   g = ∂L/∂w at w,   and the step uses ∂L/∂w at w + v

for every layer l, that is, every weight tensor of two or more axes except those of norms. L is the loss that
the step minimizes, on the same clean and adversarial images. A layer whose gradient is zero is not moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from awnet.nn import MixBatchNorm2d

_NORMS = (_NormBase, MixBatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def perturbed_weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the perturbation moves, each once."""
    parameters = {
        id(parameter): parameter
        for module in model.modules()
        if not isinstance(module, _NORMS)
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad and parameter.dim() > 1
    }
    return list(parameters.values())


@contextmanager
def perturbed(weights: Sequence[Tensor], gradients: Sequence[Tensor], gamma: float) -> Iterator[None]:
    """``weights`` moved by γ ‖w‖ / ‖g‖ · g, for a block of code, and then bitwise as before.

    Everything runs on the device. A gradient that is not finite makes the weights NaN within the block.
    """
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        sizes, lengths = (torch._foreach_norm(list(tensors)) for tensors in (before, gradients))
        rates = [
            torch.where(length == 0, 0.0, gamma * size / torch.where(length == 0, 1.0, length))
            for size, length in zip(sizes, lengths, strict=True)
        ]
        steps = [gradient * rate for gradient, rate in zip(gradients, rates, strict=True)]
        torch._foreach_add_(list(weights), steps)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(weights), before)

"""The activations of ``awnet.ops.args.ACTIVATIONS`` other than the ReLU, and their slopes, in plain torch.

The same formulas are in ``csrc/arithmetic.h`` and ``kernels/activations.py``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from awnet.ops.args import ACTIVATIONS

NEGATIVE_SLOPE = 0.01  # of the leaky ReLU, as in torch.nn.LeakyReLU


def activated_(z: Tensor, activation: int) -> Tensor:
    """act(z); may overwrite ``z``."""
    name = ACTIVATIONS[activation]
    if name == "silu":
        return F.silu(z, inplace=True)
    if name == "gelu":
        return F.gelu(z)
    return F.leaky_relu_(z, NEGATIVE_SLOPE)


def slope(z: Tensor, activation: int) -> Tensor:
    """act'(z). That of the leaky ReLU at 0 is the negative slope, as in torch.

    SiLU: σ(z) (1 + z (1 − σ(z))) with the logistic function σ. GELU: Φ(z) + z φ(z) with the distribution
    function Φ and the density φ of the normal distribution.
    """
    name = ACTIVATIONS[activation]
    if name == "silu":
        s = z.sigmoid()
        return s * (1 + z * (1 - s))
    if name == "gelu":
        density = torch.exp(z.square() * -0.5) * (1 / math.sqrt(2 * math.pi))
        return torch.special.ndtr(z) + z * density
    return (z > 0).to(z.dtype).clamp_(min=NEGATIVE_SLOPE)

"""The implementations: the literal form, plain torch, its static form, both compiled, and our backends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awnet import reference
from awnet.ops import available_backends, aw_conv2d

from .cases import MODES, Layer, Mode


@dataclass(frozen=True)
class Provider:
    """A way to compute the layer, and with it blocks and networks."""

    layer: Layer
    """A function with the arguments of awnet.ops.aw_conv2d."""
    backend: str | None = None
    """Modules run under this backend; if None, ``layer`` replaces their layers."""
    static: bool = False
    """Whether it computes the static form: no filter scale, one batch norm, no router."""
    compiled: bool = False
    frozen: bool = True
    """Whether an attack's parameters are marked as needing no gradient, as awnet's attacks do."""
    modes: tuple[Mode, ...] = MODES
    """The modes in which it is measured."""


def unfused(
    input: Tensor,
    weight: Tensor,
    filter_scale: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    p_clean: Tensor | None = None,
    is_clean: Tensor | None = None,
    training: bool = False,
    stride: Any = 1,
    padding: Any = 0,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str | None = "relu",
) -> Tensor:
    """The layer in plain torch: a shared convolution, the scale, two batch norms, the ReLU.

    In training the batch must be concat[clean; adversarial], so that its halves are views; ``is_clean`` is
    not read. With tables of one row it is the static layer: convolution, batch norm, ReLU.
    """

    def norm(row: int, z: Tensor) -> Tensor:
        tables = running_mean[row], running_var[row], bn_weight[row], bn_bias[row]
        return F.batch_norm(z, *tables, training, 0.1, 1e-5)

    z = F.conv2d(input, weight, None, stride, padding, 1, groups)
    if filter_scale is not None:
        z = z * filter_scale[:, :, None, None].to(z.dtype)
    if len(bn_weight) == 1:
        mixed = norm(0, z)
    elif training:
        half = len(z) // 2
        mixed = torch.cat([norm(1, z[:half]), norm(0, z[half:])])
    else:
        assert p_clean is not None
        p = p_clean[:, None, None, None].to(z.dtype)
        mixed = (1 - p) * norm(0, z) + p * norm(1, z)
    if residual is not None:
        mixed = mixed + residual
    return reference.activated(mixed, activation)


COMPILED = {
    "compile": Provider(unfused, compiled=True, frozen=False),
    "compile_frozen": Provider(unfused, compiled=True, modes=("attack",)),  # elsewhere it is compile
    "static_compile": Provider(unfused, compiled=True, static=True),
}


def providers(device: str | None = None) -> dict[str, Provider]:
    """Every provider that is available on this machine, or on ``device``. ``literal`` is ``reference``."""
    table = {
        "literal": Provider(reference.aw_conv2d, backend="reference"),
        "unfused": Provider(unfused),
        "static": Provider(unfused, static=True),
        **COMPILED,
    }
    for name, reason in available_backends(device).items():
        if reason is None and name != "reference":
            table[name] = Provider(partial(aw_conv2d, backend=name), backend=name)
    return table

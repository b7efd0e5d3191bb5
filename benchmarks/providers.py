"""Who computes the layer: the literal form, plain torch, a static layer, and every backend of ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from awnet.ops import available_backends, aw_conv2d

from .cases import Inputs, Layer, literal


@dataclass(frozen=True)
class Provider:
    """A way to compute the layer. A static one has no filter scale and one batch norm."""

    layer: Layer
    static: bool = False


def _batch_norm(inputs: Inputs, row: int, z: Tensor, training: bool) -> Tensor:
    return F.batch_norm(
        z,
        inputs.running_mean[row],
        inputs.running_var[row],
        inputs.bn_weight[row],
        inputs.bn_bias[row],
        training,
        0.1,
        1e-5,
    )


def unfused(inputs: Inputs, training: bool) -> Tensor:
    """What one would write in plain torch: a shared convolution, the scale, two batch norms, the ReLU.

    In training the batch is concat[clean; adversarial], so that its halves are views.
    """
    u = F.conv2d(inputs.input, inputs.weight, padding=1)
    assert inputs.filter_scale is not None
    z = u * inputs.filter_scale[:, :, None, None].to(u.dtype)
    if training:
        half = len(z) // 2
        mixed = torch.cat([_batch_norm(inputs, 1, z[:half], True), _batch_norm(inputs, 0, z[half:], True)])
    else:
        assert inputs.p_clean is not None
        p = inputs.p_clean[:, None, None, None].to(u.dtype)
        mixed = (1 - p) * _batch_norm(inputs, 0, z, False) + p * _batch_norm(inputs, 1, z, False)
    return torch.relu(mixed)


def static(inputs: Inputs, training: bool) -> Tensor:
    """A convolution, a batch norm and a ReLU: the layer of a network without dynamic weights."""
    return torch.relu(_batch_norm(inputs, 0, F.conv2d(inputs.input, inputs.weight, padding=1), training))


def _backend(name: str) -> Layer:
    def layer(inputs: Inputs, training: bool) -> Tensor:
        return aw_conv2d(
            inputs.input,
            inputs.weight,
            inputs.filter_scale,
            inputs.bn_weight,
            inputs.bn_bias,
            inputs.running_mean,
            inputs.running_var,
            p_clean=None if training else inputs.p_clean,
            is_clean=inputs.is_clean if training else None,
            training=training,
            padding=1,
            backend=name,
        )

    return layer


def providers() -> dict[str, Provider]:
    """Every provider that this machine has, by name. The backend ``reference`` is ``literal``."""
    found = {
        "literal": Provider(literal),
        "unfused": Provider(unfused),
        "static": Provider(static, static=True),
    }
    for name, reason in available_backends().items():
        if reason is None and name != "reference":
            found[name] = Provider(_backend(name))
    return found

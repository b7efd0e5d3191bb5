"""The layer's equations once more, independent of torch's convolution and batch norm: sums of products.

Sample by sample, tap by tap, in any dtype; gradients by autograd through slices, products and sums alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: by name, as the definitions say; their gradients are autograd's
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: z.clamp(min=0),
    "silu": lambda z: z / (1 + (-z).exp()),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
}


def convolved(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, groups: int) -> Tensor:
    """One image [C_in, H, W] and filters [C_out, C_in/groups, k_h, k_w] → [C_out, H', W']."""
    c_in, height, width = x.shape
    c_out, _, k_h, k_w = weight.shape
    padded = torch.cat([x.new_zeros(c_in, padding, width), x, x.new_zeros(c_in, padding, width)], 1)
    side = x.new_zeros(c_in, height + 2 * padding, padding)
    padded = torch.cat([side, padded, side], 2)
    rows = (height + 2 * padding - dilation * (k_h - 1) - 1) // stride + 1
    columns = (width + 2 * padding - dilation * (k_w - 1) - 1) // stride + 1
    outputs: list[Tensor] = []
    for filters, part in zip(weight.chunk(groups), padded.chunk(groups), strict=True):
        total = x.new_zeros(len(filters), rows * columns)
        for i in range(k_h):
            for j in range(k_w):
                down, right = i * dilation, j * dilation
                seen = part[:, down:, right:][:, : (rows - 1) * stride + 1 : stride]
                seen = seen[:, :, : (columns - 1) * stride + 1 : stride]
                total = total + filters[:, :, i, j] @ seen.reshape(len(part), -1)
        outputs.append(total)
    return torch.cat(outputs).reshape(c_out, rows, columns)


def aw_conv2d(
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
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str | None = "relu",
) -> Tensor:
    """Equations 11 to 16, with the running statistics updated in place in training."""
    z: list[Tensor] = []
    for b in range(len(input)):
        own = weight if filter_scale is None else weight * filter_scale[b][:, None, None, None]  # Eq. 11
        z.append(convolved(input[b], own, stride, padding, dilation, groups))  # Eq. 12
    kinds = [0] * len(z) if is_clean is None else [int(kind) for kind in is_clean]
    affine_rows, statistics_rows = len(bn_weight), len(running_mean)

    def normalized(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (x - mean[:, None, None]) / (var + eps).sqrt()[:, None, None]

    def affine(x: Tensor, k: int) -> Tensor:
        row = min(k, affine_rows - 1)
        return x * bn_weight[row][:, None, None] + bn_bias[row][:, None, None]

    outputs: list[Tensor] = []
    if training:  # Eq. 13
        normal: list[Tensor] = list(z)
        for s in range(statistics_rows):
            members = [b for b, kind in enumerate(kinds) if statistics_rows == 1 or kind == s]
            if not members:
                continue
            values = torch.stack([z[b].flatten(1) for b in members])  # [B, C, HW]
            count = values.shape[0] * values.shape[2]
            mean = values.sum((0, 2)) / count
            var = ((values - mean[:, None]) ** 2).sum((0, 2)) / count
            for b in members:
                normal[b] = normalized(z[b], mean, var)
            with torch.no_grad():
                unbiased = var * (count / (count - 1))
                running_mean[s] = (1 - momentum) * running_mean[s] + momentum * mean
                running_var[s] = (1 - momentum) * running_var[s] + momentum * unbiased
        outputs = [affine(x, kind) for x, kind in zip(normal, kinds, strict=True)]
    else:  # Eq. 14
        for b, x in enumerate(z):
            branches = [
                affine(
                    normalized(
                        x, running_mean[min(k, statistics_rows - 1)], running_var[min(k, statistics_rows - 1)]
                    ),
                    k,
                )
                for k in range(max(affine_rows, statistics_rows))
            ]
            if len(branches) == 1:
                outputs.append(branches[0])
            else:
                assert p_clean is not None
                outputs.append((1 - p_clean[b]) * branches[0] + p_clean[b] * branches[1])
    y = torch.stack(outputs)
    if residual is not None:
        y = y + residual  # Eq. 16
    return y if activation is None else ACTIVATIONS[activation](y)

"""A small network for ``ops.affine_network`` with every kind of connection."""

from __future__ import annotations

import torch
from torch import Tensor

from awnet import ops


def small_network(dtype: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, list, list, list]:
    """Stem, a strided block with a shortcut, a grouped layer without ReLU that two later ones take."""

    def convolution(stride: int, size: int, groups: int, activation: str | None) -> ops.AffineConvolution:
        return ops.AffineConvolution(
            stride=(stride, stride),
            padding=(size // 2,) * 2,
            dilation=(1, 1),
            groups=groups,
            activation=activation,
        )

    torch.manual_seed(0)
    # channels in and out, filter, stride, groups, activation, input, residual, averaged
    rows = [
        (3, 8, 3, 1, 1, "relu", -1, -1, True),
        (8, 16, 1, 2, 1, None, 0, -1, False),
        (8, 16, 3, 2, 1, "relu", 0, -1, False),
        (16, 16, 3, 1, 1, "relu", 2, 1, True),
        (16, 16, 3, 1, 4, None, 3, -1, False),
        (16, 16, 3, 1, 1, "relu", 4, 4, True),
    ]
    weights = [torch.randn(o, i // g, k, k, dtype=dtype) / k for i, o, k, _, g, *_ in rows]
    layers = [
        ops.NetworkLayer(convolution(stride, k, g, activation), *rest)
        for _, _, k, stride, g, activation, *rest in rows
    ]
    tables = [(torch.rand(2, row[1], dtype=dtype) + 0.5, torch.randn(2, row[1], dtype=dtype)) for row in rows]
    x = torch.rand(2, 3, 16, 16, dtype=dtype).contiguous(memory_format=layout)
    return x, weights, tables, layers

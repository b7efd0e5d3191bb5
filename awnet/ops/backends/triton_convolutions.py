"""Convolutions with the layer's work in their epilogue (``awnet.kernels``), where a measurement says so."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from awnet.ops.launch_config import convolutions


def _kernels() -> Any:
    return importlib.import_module("awnet.kernels.fused_conv")


class TritonConvolutions:
    """The fused convolutions of the Triton backend.

    Each returns None where the device's table (:func:`awnet.ops.launch_config.convolutions`) has no entry for
    the case: the library's convolution followed by a pass is then used.
    """

    def fused_apply(
        self,
        input: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        relu: bool,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        keep_u: bool,
        keep_mask: bool,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """y = act(u · scale + shift + residual), u = conv(input, weight) and the mask, if they are kept."""
        table = convolutions(input.device)
        if not table:
            return None
        where = (stride, padding, dilation, groups)
        arguments = (input, weight, scale, shift, residual, relu, *where, keep_u, keep_mask)
        return _kernels().fused_apply(*arguments, table=table)

    def fused_statistics(
        self,
        input: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """u = conv(input, weight) and its per-sample mean and centred sum of squares, [B, C_out]."""
        table = convolutions(input.device)
        if not table:
            return None
        where = (stride, padding, dilation, groups)
        return _kernels().fused_statistics(input, weight, *where, table=table)

    def fused_dgrad(
        self,
        d_u: Tensor,
        weight: Tensor,
        input_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor | None:
        """The gradient of the convolution's input."""
        table = convolutions(d_u.device)
        if not table:
            return None
        where = (stride, padding, dilation, groups)
        return _kernels().fused_dgrad(d_u, weight, input_shape, *where, table=table)

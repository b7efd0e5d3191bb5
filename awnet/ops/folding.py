"""Batch norms folded into the weights of a frozen network, for cuDNN's convolution with addition and ReLU.

Where scale and shift of a layer are the same for all images (a router, a static network),

    conv(x, weight) · scale + shift = conv(x, weight · scale) + shift,

and one operator of cuDNN computes relu(conv(x, weight · scale) + shift + residual): the output of the
convolution is neither written nor read again. torch's ``cudnn_convolution_relu``, the operator without a
residual, is not used: it adds its uninitialized output times 0, which is NaN where that memory holds one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from awnet.ops.args import RELU, Conv, LayerArgs
from awnet.ops.autograd import convolved
from awnet.ops.backends.base import wide_dtype
from awnet.ops.functional import NetworkLayer

_ALIGNMENT = 8  # channels; cuDNN's fused operator needs 16 bytes of 16-bit channels


def fold_norms(
    weights: Sequence[Tensor], coefficients: Sequence[tuple[Tensor, Tensor]], layers: Sequence[NetworkLayer]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The weights of a frozen network with its batch norms folded in where cuDNN can run the layer.

    A layer is folded if it has a ReLU and cuDNN's operator can be given a defined addend: its residual, or
    its input times 0, which must have the shape of the output. A layer without an activation that is only the
    residual of such a layer (a shortcut) is folded too, and its shift is added to that of its reader.

    Args:
        weights: of each layer, of the images' dtype.
        coefficients: scale and shift ``[C_out]`` of each layer, equal for all images.
        layers: their connections.

    Returns:
        For each layer the weight, in channels_last if it is folded, and the bias ``[C_out]`` of the weight's
        dtype; the bias is None for a layer that is not folded, and zero for a folded shortcut.
    """
    shifts = [shift for _, shift in coefficients]
    folded = [_has_relu_and_addend(layer, weight) for layer, weight in zip(layers, weights, strict=True)]
    for i, layer in enumerate(layers):
        reader = _reader_of_shortcut(i, layers)
        plain = layer.convolution.activation is None and layer.residual < 0
        if plain and reader is not None and folded[reader]:
            folded[i] = True
            shifts[reader] = shifts[reader] + shifts[i]
            shifts[i] = torch.zeros_like(shifts[i])
    new_weights = list(weights)
    biases: list[Tensor | None] = [None] * len(layers)
    for i, (weight, (scale, _)) in enumerate(zip(weights, coefficients, strict=True)):
        if folded[i]:
            product = weight.to(wide_dtype(weight.dtype)) * scale[:, None, None, None]
            new_weights[i] = product.to(weight.dtype).contiguous(memory_format=torch.channels_last)
            biases[i] = shifts[i].to(weight.dtype)
    return new_weights, biases


def _has_relu_and_addend(layer: NetworkLayer, weight: Tensor) -> bool:
    conv, c_out = layer.convolution.conv, weight.shape[0]
    channels = weight.shape[1] * conv.groups
    if layer.convolution.activation != "relu" or layer.input < 0:
        return False
    if channels % _ALIGNMENT or c_out % _ALIGNMENT:
        return False
    return layer.residual >= 0 or (channels == c_out and _keeps_size(conv, weight))


def _keeps_size(conv: Conv, weight: Tensor) -> bool:
    """Whether the output of the convolution has as many rows and columns as its input."""
    return conv.stride == (1, 1) and all(
        2 * padding == dilation * (size - 1)
        for padding, dilation, size in zip(conv.padding, conv.dilation, weight.shape[2:], strict=True)
    )


def _reader_of_shortcut(index: int, layers: Sequence[NetworkLayer]) -> int | None:
    """The layer of which ``index`` is the residual, if nothing else reads its output."""
    readers = [i for i, layer in enumerate(layers) if index in (layer.input, layer.residual)]
    alone = len(readers) == 1 and layers[readers[0]].input != index and not layers[index].averaged
    return readers[0] if alone else None


def runs_cudnn(x: Tensor) -> bool:
    """Whether :func:`folded_layer` uses cuDNN's operator for ``x``."""
    return x.is_cuda


def folded_layer(args: LayerArgs) -> Tensor:
    """relu(conv(input, weight) + shift + residual), or conv(input, weight) without an activation.

    ``args`` is a layer of :func:`fold_norms`: its weight contains the scale, and its shift is ``[C_out]``.
    On a CPU torch's convolution, addition and ReLU run instead of cuDNN's operator.
    """
    if args.code != RELU:
        return convolved(args)
    x, weight, conv = args.input, args.weight, args.conv
    geometry = conv.stride, conv.padding, conv.dilation
    # the operator reads an addend even without a residual: the input is defined, and is read anyway
    addend, factor = (x, 0.0) if args.residual is None else (args.residual, 1.0)
    if runs_cudnn(x):
        return torch.ops.aten.cudnn_convolution_add_relu(
            x, weight, addend, factor, args.shift, *geometry, conv.groups
        )
    y: Tensor = torch.ops.aten.convolution(x, weight, args.shift, *geometry, False, [0, 0], conv.groups)
    return y.add_(addend, alpha=factor).relu_()

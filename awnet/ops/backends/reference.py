"""The ``reference`` backend: the paper's equations as :mod:`awnet.reference` states them, and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from awnet import reference
from awnet.ops.args import LayerArgs
from awnet.ops.backends.base import Backend, memory_format


class Reference(Backend):
    name = "reference"
    summary = "the paper's equations literally, gradients by autograd"
    every_transform = True

    def not_supported(self, args: LayerArgs) -> str | None:
        return "it does not implement process groups" if args.norm and args.norm.process_group else None

    def run(self, args: LayerArgs) -> Tensor:
        return _equations(args).contiguous(memory_format=memory_format(args.input))


def _equations(args: LayerArgs) -> Tensor:
    conv, norm = args.conv, args.norm
    y = args.input
    if args.weight is not None:
        y = reference.filter_scaled_conv2d(
            args.input,
            args.weight,
            args.filter_scale,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
        )
    if norm is not None:
        y = reference.mix_batch_norm(
            y,
            norm.weight,
            norm.bias,
            norm.mean,
            norm.var,
            p_clean=args.p_clean,
            is_clean=args.is_clean,
            training=norm.training,
            momentum=norm.momentum,
            eps=norm.eps,
        )
    if args.shift is not None:
        y = y + args.shift.to(y.dtype)[:, :, None, None]
    if args.residual is not None:
        y = y + args.residual
    return torch.relu(y) if args.activation == "relu" else y

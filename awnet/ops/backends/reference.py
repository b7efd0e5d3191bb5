"""The ``reference`` backend: the paper's equations as :mod:`awnet.reference` states them, and autograd."""

from __future__ import annotations

import torch.nn.functional as F
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
        return equations(args).contiguous(memory_format=memory_format(args.input))


def equations(args: LayerArgs, *, scale_outputs: bool = False) -> Tensor:
    """The layer by the paper's equations.

    With ``scale_outputs`` the filter scales multiply the outputs of one convolution for the whole batch. That
    is equal, since a convolution is linear in its filters, and needs no groups that depend on the batch.
    """
    conv, norm = args.conv, args.norm
    y = args.input
    if args.weight is not None and scale_outputs:
        y = F.conv2d(y, args.weight, None, *conv)
        if args.filter_scale is not None:
            y = y * args.filter_scale.to(y.dtype)[:, :, None, None]
    elif args.weight is not None:
        y = reference.filter_scaled_conv2d(args.input, args.weight, args.filter_scale, **conv._asdict())
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
    return reference.activated(y, args.activation)

"""The public functions of the layer, also importable as ``awnet.functional``.

Each one checks its arguments by :mod:`awnet.ops.checks`, builds a :class:`~awnet.ops.args.LayerArgs` from
them and runs it on the backend that :mod:`awnet.ops.dispatch` selects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awnet.ops.args import Conv, LayerArgs
from awnet.ops.backends.base import Backend
from awnet.ops.checks import (
    Size2,
    autocast,
    check_filter_scale,
    check_image,
    check_table,
    checked_convolution,
    checked_norm,
    checked_residual,
)
from awnet.ops.dispatch import Explanation, explain_call, select
from awnet.ops.transforms import transform


def filter_scaled_conv2d(
    input: Tensor,
    weight: Tensor,
    filter_scale: Tensor | None,
    *,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Convolution whose filters are re-weighted per sample (Eq. 11 and 12): ω ⊙ conv(input, weight).

    Args:
        input: ψ, float ``[B, C_in, H, W]``, any memory format.
        weight: the shared filters, ``[C_out, C_in/groups, k_h, k_w]``, of ``input``'s dtype.
        filter_scale: ω, ``[B, C_out]``, one factor for each sample and filter; None means ω ≡ 1.
        stride, padding, dilation: an int or a pair, in pixels.
        groups: as in ``torch.nn.functional.conv2d``; depthwise too.
        backend: a backend's name, or None for the best that supports this call.

    Returns:
        ``[B, C_out, H', W']`` in ``input``'s dtype and memory format.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, device or shape, or the named backend does
            not support the call; the message names the argument, what is expected and what was passed.
    """
    input, weight, conv, output = checked_convolution(input, weight, stride, padding, dilation, groups)
    check_filter_scale(filter_scale, output, input)
    return _run(LayerArgs(input, weight, conv, filter_scale), backend)


def mix_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    p_clean: Tensor | None = None,
    is_clean: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    process_group: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Two-branch batch norm: a branch per sample in train mode (Eq. 13), a blend by p in eval mode (Eq. 14).

    Args:
        input: float ``[B, C, H, W]``.
        weight, bias: γ and β, ``[2, C]``: row 0 adversarial, row 1 clean. ``[1, C]`` is one plain batch norm
            (if the statistics have one row too), which needs neither ``p_clean`` nor ``is_clean``.
        running_mean, running_var: ``[2, C]``, or ``[1, C]`` for statistics that both branches share. Updated
            in place in train mode, with the unbiased variance, each branch from its samples; a branch without
            samples in the batch is not changed.
        p_clean: p, ``[B]``, the probability that a sample is clean; eval mode only.
        is_clean: ``[B]`` bool, whether a sample is clean; train mode only.
        training: train mode (statistics of the batch) or eval mode (running statistics).
        momentum: weight of the batch in the running statistics, a float or a tensor with one value per row.
        eps: added to the variance.
        process_group: name of a torch.distributed group (``group.group_name``) whose ranks share the batch
            statistics in train mode, exactly, also with unequal batches; every rank must make the call. The
            gradients of weight and bias stay the sums of each rank. None: this process only.
        backend: a backend's name, or None for the best that supports this call.

    Returns:
        ``[B, C, H, W]`` in ``input``'s dtype and memory format.

    Raises:
        TypeError, ValueError: as in :func:`filter_scaled_conv2d`; ValueError also if a branch has a
            single value per channel in train mode. Over a process group the count is that of all ranks and is
            checked after the forward, on every rank; inside torch.compile or a CUDA graph it is not checked.
    """
    input = autocast(check_image(input, "input"))
    if input.shape[2] == 0 or input.shape[3] == 0:
        raise ValueError(f"input must have at least one pixel, got shape {list(input.shape)}")
    tables = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    norm, p_clean, is_clean = checked_norm(
        input, tuple(input.shape), tables, p_clean, is_clean, training, momentum, eps, process_group
    )
    return _run(LayerArgs(input, norm=norm, p_clean=p_clean, is_clean=is_clean), backend)


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
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    process_group: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The fused layer, Eq. 11 to 16: act(BN_mix(ω ⊙ conv(input, weight)) + residual).

    Args:
        input, weight, filter_scale, stride, padding, dilation, groups: as in :func:`filter_scaled_conv2d`;
            ``filter_scale=None`` makes a static convolution with MixBN (a stem, a shortcut).
        bn_weight, bn_bias, running_mean, running_var, p_clean, is_clean, training, momentum, eps,
            process_group: as in :func:`mix_batch_norm`.
        residual: ``[B, C_out, H', W']`` of ``input``'s dtype, added before the activation, or None.
        activation: ``"relu"``, ``"silu"``, ``"gelu"`` (the exact one, not its approximation by tanh),
            ``"leaky_relu"`` (with negative slope 0.01) or None.
        backend: a backend's name, or None for the best that supports this call.

    Returns:
        ``[B, C_out, H', W']`` in ``input``'s dtype and memory format. Differentiable once in input, weight,
        filter_scale, p_clean, bn_weight, bn_bias and residual; for second derivatives use
        ``backend="reference"``.

    Raises:
        TypeError, ValueError: as in :func:`filter_scaled_conv2d` and :func:`mix_batch_norm`.
    """
    input, weight, conv, output = checked_convolution(input, weight, stride, padding, dilation, groups)
    check_filter_scale(filter_scale, output, input)
    affine = {"bn_weight": bn_weight, "bn_bias": bn_bias}
    tables = affine | {"running_mean": running_mean, "running_var": running_var}
    norm, p_clean, is_clean = checked_norm(
        input, output, tables, p_clean, is_clean, training, momentum, eps, process_group
    )
    residual = checked_residual(residual, activation, output, input)
    args = LayerArgs(
        input,
        weight,
        conv,
        filter_scale,
        norm,
        p_clean=p_clean,
        is_clean=is_clean,
        residual=residual,
        activation=activation,
    )
    return _run(args, backend)


def affine_conv2d(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    backend: str | None = None,
) -> Tensor:
    """act(conv(input, weight) · scale + shift + residual): the fused layer once its coefficients are known.

    Args:
        input, weight, stride, padding, dilation, groups: as in :func:`filter_scaled_conv2d`.
        scale, shift: ``[B, C_out]``, of any floating dtype; float32 or wider avoids a loss of precision.
        residual, activation: as in :func:`aw_conv2d`.
        backend: a backend's name, or None for the best that supports this call.

    Returns:
        ``[B, C_out, H', W']`` in ``input``'s dtype and memory format. Differentiable once in input, weight,
        scale, shift and residual (for second derivatives use ``backend="reference"``). The convolution's
        output is saved only for the gradients of scale and shift, the input only for that of the weight.

    Raises:
        TypeError, ValueError: as in :func:`aw_conv2d`.
    """
    input, weight, conv, output = checked_convolution(input, weight, stride, padding, dilation, groups)
    for name, table in (("scale", scale), ("shift", shift)):
        check_table(table, name, output[:2], "[B, C_out]", input)
    residual = checked_residual(residual, activation, output, input)
    # without a norm the filter scale is the scale
    args = LayerArgs(input, weight, conv, scale, shift=shift, residual=residual, activation=activation)
    return _run(args, backend)


def _run(args: LayerArgs, backend: str | None) -> Tensor:
    return select(args, backend).run(args)


class AffineConvolution:
    """:func:`affine_conv2d` of one geometry without its checks, for layers that run very often.

    The caller must pass correct shapes, dtypes and devices, and must not enable autocast.
    """

    def __init__(
        self,
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        activation: str | None,
    ) -> None:
        self.conv = Conv((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)
        self.activation = activation

    def __call__(
        self, input: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        args = self.args(input, weight, scale, shift, residual)
        return select(args, None).run(args)

    def args(
        self,
        input: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor,
        residual: Tensor | None = None,
    ) -> LayerArgs:
        """The record of a call; without a scale it is 1."""
        return LayerArgs(
            input, weight, self.conv, scale, shift=shift, residual=residual, activation=self.activation
        )


class NetworkLayer(NamedTuple):
    """A layer of :func:`awnet.ops.affine_network`: ``act(conv(input) · scale + shift + residual)``."""

    convolution: AffineConvolution
    input: int  # the layer whose output is its input, -1 for the images
    residual: int  # the layer whose output is added, -1 for none
    averaged: bool  # whether the mean of its output over pixels is returned


class _GlobalAverage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad / (ctx.shape[2] * ctx.shape[3]))[:, :, None, None].expand(ctx.shape)


def global_average(x: Tensor) -> Tensor:
    """The mean over pixels of images [B, C, H, W], [B, C].

    Equal to ``x.mean((2, 3))``, but its gradient is an expanded tensor that takes no memory.
    """
    if transform([x]):
        return x.mean((2, 3))
    mean: Tensor = _GlobalAverage.apply(x)
    return mean


def explain(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Explanation:
    """Returns which backend would run ``function(*args, **kwargs)``, and why not the others; runs nothing.

    Args:
        function: :func:`aw_conv2d`, :func:`mix_batch_norm`, :func:`filter_scaled_conv2d` or
            :func:`affine_conv2d`.
        args, kwargs: its arguments, which are checked as in a call of the function.

    Returns:
        An :class:`Explanation`: ``backend``, ``others`` (name → reason), and a readable ``str``.
    """
    backend = kwargs.pop("backend", None)
    return explain_call(layer_args(function, *args, **kwargs), backend)


_FUNCTIONS = (aw_conv2d, mix_batch_norm, filter_scaled_conv2d, affine_conv2d)


def layer_args(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> LayerArgs:
    """The record of a call of one of the functions that :func:`explain` takes; runs nothing."""
    if function not in _FUNCTIONS:
        names = ", ".join(f.__name__ for f in _FUNCTIONS)
        raise ValueError(f"function must be one of {names}, got {getattr(function, '__name__', function)!r}")
    recorder = _Recorder()
    function(*args, **kwargs, backend=recorder)
    return recorder.args


class _Recorder(Backend):
    """Records a call instead of running it."""

    args: LayerArgs

    def run(self, args: LayerArgs) -> Tensor:
        self.args = args
        return args.input

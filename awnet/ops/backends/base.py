"""The interface every backend implements.

A :class:`Backend` runs a whole call, or says why it cannot. Most backends run the layer as a registered
operator (:mod:`awnet.ops.autograd`) that is assembled from :class:`Passes`: four passes over ``[B, C, H, W]``
and the coefficients on ``[B, C]``. Images keep their dtype; ``[B, C]`` tensors are float32, or float64 for
float64 images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from awnet.ops.args import RELU, Conv, EvalBackwardArgs, LayerArgs, Needs
from awnet.ops.coefficients import (
    BatchStats,
    Gradients,
    Mix,
    Norm,
    Propagation,
    Reduced,
    SampleStats,
    TrainSums,
)

_LEAST_CAPABILITY = (8, 0)
NO_FLOAT64 = "it has no float64 (use eager or reference)"


class Backend:
    """One implementation of the layer; ``awnet.ops.dispatch.BACKENDS`` lists one of each by preference."""

    name: str
    summary: str
    every_transform = False  # whether it is made of torch operations alone, which all transforms support

    def not_supported(self, args: LayerArgs) -> str | None:
        """The reason why this backend cannot run ``args``; None where it can."""
        raise NotImplementedError

    def run(self, args: LayerArgs) -> Tensor:
        """Runs the call and, in train mode, updates the running statistics in place."""
        raise NotImplementedError


class Passes:
    """What an operator of :mod:`awnet.ops.autograd` is assembled from. Outputs keep u's memory format.

    ``activation`` is a position in :data:`awnet.ops.args.ACTIVATIONS`. g is the gradient of the activation's
    input z = u · scale + shift + residual. For the ReLU it is ``grad`` where ``relu_mask`` says that the
    gradient passes, else 0: ``relu_mask`` is y itself, or a bool mask that is True where y is not <= 0 (so
    NaN passes, as in torch). For the other activations g = grad · ``slope`` with slope = act'(z), an image of
    ``grad``'s dtype. Without an activation both are None, and g = grad.
    """

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample mean and centred sum of squares M2, each ``[B, C]``."""
        raise NotImplementedError

    def apply(
        self,
        u: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        activation: int,
        keep_mask: bool,
        in_place: bool,
        frozen: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """y = act(u · scale + shift + residual) and its mask, or its slope, empty without ``keep_mask``.

        With ``in_place`` y overwrites u. With ``frozen`` the mask is for :meth:`eval_backward` only, and may
        have a form that only the backend's own reads.
        """
        raise NotImplementedError

    def reduce(
        self,
        grad: Tensor,
        u: Tensor,
        centre: Tensor,
        relu_mask: Tensor | None,
        slope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """G1 = Σ g and Gc = Σ g (u − centre), each ``[B, C]``."""
        raise NotImplementedError

    def propagate(
        self,
        grad: Tensor,
        u: Tensor | None,
        centre: Tensor | None,
        relu_mask: Tensor | None,
        propagation: Propagation,
        residual: bool,
        slope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """∂u, and with ``residual`` ∂residual = g. u and centre are read only for ``by_input``."""
        raise NotImplementedError

    def eval_backward(self, args: EvalBackwardArgs) -> tuple[Tensor, Tensor | None, Reduced | None]:
        """∂u = g · scale, ∂residual = g or None, and the sums of ``reduce`` or None, in eval mode.

        A backend may do in one kernel what is several here.
        """
        grad, u, relu_mask = args.grad, args.u, args.relu_mask
        if args.other_grad is not None:
            grad = grad + args.other_grad
        if args.d_mean is not None:
            per_pixel = args.d_mean / (grad.shape[2] * grad.shape[3])
            grad = grad + per_pixel[:, :, None, None].to(grad.dtype)
        if args.shift is not None:
            assert u is not None
            relu_mask = self.apply(u, args.scale, args.shift, None, RELU, True, False)[1]
        reduced = None
        if args.sums:
            assert u is not None
            # any centre is exact; one near the channel's mean keeps the digits, and a pixel of u is near it
            centre = u[:, :, 0, 0].to(wide_dtype(u.dtype))
            g1, gc = self.reduce(grad, u, centre, relu_mask, args.slope)
            reduced = Reduced(g1, gc, centre) if args.centred else Reduced(g1, gc.addcmul(centre, g1), None)
        propagation = Propagation(args.scale)
        d_u, d_residual = self.propagate(grad, None, None, relu_mask, propagation, args.residual, args.slope)
        return d_u, d_residual, reduced

    # Convolutions with the layer's work in their epilogue; None: torch's convolution and the passes run.

    def fused_apply(
        self, args: LayerArgs, scale: Tensor, shift: Tensor, keep_u: bool, keep_mask: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """y, u (empty without ``keep_u``) and the mask or slope of ``apply`` on u = conv(input, weight)."""
        return None

    def fused_statistics(self, args: LayerArgs) -> tuple[Tensor, Tensor, Tensor] | None:
        """u = conv(input, weight) and its ``statistics``."""
        return None

    def fused_dgrad(
        self, d_u: Tensor, weight: Tensor, conv: Conv, input_shape: Sequence[int]
    ) -> Tensor | None:
        """The gradient of the convolution's input."""
        return None

    # Coefficients: :mod:`awnet.ops.coefficients` has a function of the same name for each.

    def eval_coefficients(self, norm: Norm, mix: Mix, batch: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def eval_gradients(self, sums: Reduced, norm: Norm, mix: Mix, needs: Needs) -> Gradients:
        raise NotImplementedError

    def batch_statistics(self, stats: SampleStats, mix: Mix, stat_rows: int) -> BatchStats:
        raise NotImplementedError

    def train_coefficients(self, norm: Norm, mix: Mix, batch: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def train_sums(self, sums: Reduced, norm: Norm, mix: Mix) -> TrainSums:
        raise NotImplementedError

    def train_gradients(
        self,
        sums: Reduced,
        stats: SampleStats,
        norm: Norm,
        n: Tensor,
        mix: Mix,
        need_filter_scale: bool,
        totals: TrainSums | None,
    ) -> tuple[Gradients, Propagation]:
        raise NotImplementedError


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and ``[B, C]`` tensors for images of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last where ``x`` has that layout and is not NCHW-contiguous too (one channel or pixel)."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Makes torch.compile call ``function`` while it traces and take the result as a constant.

    torch's decorator of this purpose, ``torch.compiler.assume_constant_result``, imports the compiler, which
    takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def device_obstacle(device: torch.device) -> str | None:
    """Why no CUDA kernel of ours can run on ``device``; None where one can."""
    if not torch.cuda.is_available():
        return f"it needs a CUDA device, this machine has none and the input is on {device}"
    if device.type != "cuda":
        return f"it runs on CUDA devices, and the input is on {device}"
    if torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, and this torch is built for AMD's (ROCm {torch.version.hip})"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _LEAST_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or more, and {device} has {major}.{minor}"
    return None

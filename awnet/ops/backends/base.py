"""The interface every backend implements.

A :class:`Backend` runs a whole call, or says why it cannot. Most backends run the layer as a registered
operator (:mod:`awnet.ops.autograd`) that is assembled from :class:`Passes`: four passes over ``[B, C, H, W]``
and the coefficients on ``[B, C]``, here in plain torch. Images keep their dtype; ``[B, C]`` tensors are
float32, or float64 for float64 images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from awnet.ops import activations, coefficients
from awnet.ops.args import RELU, Conv, EvalBackwardArgs, LayerArgs
from awnet.ops.coefficients import Propagation, Reduced

_LEAST_CAPABILITY = (8, 0)
NO_FLOAT64 = "it has no float64 (use eager or reference)"


class Backend:
    """One implementation of the layer; ``awnet.ops.dispatch.BACKENDS`` lists one of each by preference."""

    name: str
    summary: str
    every_transform = False  # whether it is made of torch operations alone, which all transforms support

    def not_supported(self, args: LayerArgs) -> str | None:
        """The reason why this backend cannot run ``args``; None if it can."""
        raise NotImplementedError

    def run(self, args: LayerArgs) -> Tensor:
        """Runs the call and, in train mode, updates the running statistics in place."""
        raise NotImplementedError


def _image(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def _masked(grad: Tensor, relu_mask: Tensor | None, slope: Tensor | None) -> Tensor:
    """The gradient of the activation's input; of the wide dtype with a slope, else of ``grad``'s."""
    if slope is not None:
        wide = wide_dtype(grad.dtype)
        return grad.to(wide) * slope.to(wide)
    if relu_mask is None:
        return grad
    if relu_mask.dtype == torch.bool:
        return torch.where(relu_mask, grad, 0)
    return torch.ops.aten.threshold_backward(grad, relu_mask, 0)


class Passes:
    """The passes and coefficients that an operator of :mod:`awnet.ops.autograd` calls, in plain torch.

    ``eager`` uses these functions on any device and dtype, other backends override them with kernels. Outputs
    have u's memory format.

    ``activation`` is a position in :data:`awnet.ops.args.ACTIVATIONS`. g is the gradient of the activation's
    input z = u · scale + shift + residual. For the ReLU it is ``grad`` where ``relu_mask`` says that the
    gradient passes, else 0: ``relu_mask`` is y itself, or a bool mask that is True where y is not <= 0 (so
    NaN passes, as in torch). For the other activations g = grad · ``slope`` with slope = act'(z), an image of
    ``grad``'s dtype. Without an activation both are None, and g = grad.
    """

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample mean and centered sum of squares M2, each ``[B, C]``."""
        wide = u.to(wide_dtype(u.dtype))
        mean = wide.mean((2, 3))
        return mean, (wide - _image(mean)).square_().sum((2, 3))

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

        With ``in_place`` y overwrites u. With ``frozen`` the mask is for :meth:`eval_backward` only, so a
        backend may store it in any form.
        """
        wide = u.to(wide_dtype(u.dtype))
        y = wide if in_place or wide is not u else torch.empty_like(wide)
        torch.addcmul(_image(shift), wide, _image(scale), out=y)
        if residual is not None:
            y.add_(residual)
        mask = y.new_empty(0, dtype=torch.bool)
        if activation > RELU:
            z = y
            mask = activations.slope(z, activation).to(u.dtype) if keep_mask else mask
            y = activations.activated_(z, activation)
        elif activation == RELU:
            y.relu_()
        y = y.to(u.dtype)
        if activation == RELU and keep_mask:
            mask = (y <= 0).logical_not_()
        return y, mask

    def reduce(
        self, grad: Tensor, u: Tensor, center: Tensor, relu_mask: Tensor | None, slope: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """G1 = Σ g and Gc = Σ g (u − center), each ``[B, C]``."""
        wide = wide_dtype(u.dtype)
        g = _masked(grad, relu_mask, slope).to(wide)
        return g.sum((2, 3)), (u.to(wide) - _image(center)).mul_(g).sum((2, 3))

    def propagate(
        self,
        grad: Tensor,
        u: Tensor | None,
        center: Tensor | None,
        relu_mask: Tensor | None,
        propagation: Propagation,
        residual: bool,
        slope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """∂u, and with ``residual`` ∂residual = g. u and center are read only for ``by_input``."""
        by_grad, by_input, constant = propagation
        wide = wide_dtype(grad.dtype)
        g = _masked(grad, relu_mask, slope)
        reusable = g is not grad and g.dtype == wide and not residual and by_input is None
        d_u = g if reusable else torch.empty_like(grad, dtype=wide)
        if by_input is None or constant is None:
            torch.mul(g.to(wide), _image(by_grad), out=d_u)
        else:
            assert u is not None
            assert center is not None
            torch.sub(u.to(wide), _image(center), out=d_u)
            d_u.mul_(_image(by_input)).add_(_image(constant))
            d_u.addcmul_(g.to(wide), _image(by_grad))
        if not residual:
            return d_u.to(grad.dtype), None
        return d_u.to(grad.dtype), g.clone() if g is grad else g.to(grad.dtype)

    def eval_backward(self, args: EvalBackwardArgs) -> tuple[Tensor, Tensor | None, Reduced | None]:
        """∂u = g · scale, ∂residual = g or None, and the sums of ``reduce`` or None, in eval mode.

        A backend may override it by one kernel.
        """
        grad, u, relu_mask = args.grad, args.u, args.relu_mask
        if args.other_grad is not None:
            grad = grad + args.other_grad
        if args.d_mean is not None:
            per_pixel = args.d_mean / (grad.shape[2] * grad.shape[3])
            grad = grad + per_pixel[:, :, None, None].to(grad.dtype)
        if args.shift is not None:
            assert u is not None
            assert args.scale is not None
            relu_mask = self.apply(u, args.scale, args.shift, None, RELU, True, False)[1]
        reduced = None
        if args.sums:
            assert u is not None
            # any center is exact; one near the channel's mean keeps the digits, and a pixel of u is near it
            center = u[:, :, 0, 0].to(wide_dtype(u.dtype))
            g1, gc = self.reduce(grad, u, center, relu_mask, args.slope)
            reduced = Reduced(g1, gc, center) if args.centered else Reduced(g1, gc.addcmul(center, g1), None)
        if args.scale is None:
            d_u = _masked(grad, relu_mask, args.slope).to(grad.dtype)
            return d_u, d_u if args.residual else None, reduced
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

    eval_coefficients = staticmethod(coefficients.eval_coefficients)
    eval_gradients = staticmethod(coefficients.eval_gradients)
    batch_statistics = staticmethod(coefficients.batch_statistics)
    train_coefficients = staticmethod(coefficients.train_coefficients)
    train_sums = staticmethod(coefficients.train_sums)
    train_gradients = staticmethod(coefficients.train_gradients)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and ``[B, C]`` tensors for images of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last if ``x`` has that layout and is not NCHW-contiguous too (one channel or pixel)."""
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
    """Why our CUDA kernels cannot run on ``device``; None if they can."""
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

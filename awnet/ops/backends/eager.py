"""The ``eager`` backend: the passes and the coefficients in plain torch, on any device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from awnet.ops import activations, coefficients
from awnet.ops.args import RELU, LayerArgs, Saved, unflatten
from awnet.ops.autograd import OperatorBackend, register
from awnet.ops.backends.base import Passes, wide_dtype
from awnet.ops.backends.reference import equations
from awnet.ops.coefficients import Propagation


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


class EagerPasses(Passes):
    """The passes in plain torch."""

    eval_coefficients = staticmethod(coefficients.eval_coefficients)
    eval_gradients = staticmethod(coefficients.eval_gradients)
    batch_statistics = staticmethod(coefficients.batch_statistics)
    train_coefficients = staticmethod(coefficients.train_coefficients)
    train_sums = staticmethod(coefficients.train_sums)
    train_gradients = staticmethod(coefficients.train_gradients)

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
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
        self,
        grad: Tensor,
        u: Tensor,
        centre: Tensor,
        relu_mask: Tensor | None,
        slope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(u.dtype)
        g = _masked(grad, relu_mask, slope).to(wide)
        return g.sum((2, 3)), (u.to(wide) - _image(centre)).mul_(g).sum((2, 3))

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
        by_grad, by_input, constant = propagation
        wide = wide_dtype(grad.dtype)
        g = _masked(grad, relu_mask, slope)
        reusable = g is not grad and g.dtype == wide and not residual and by_input is None
        d_u = g if reusable else torch.empty_like(grad, dtype=wide)
        if by_input is None or constant is None:
            torch.mul(g.to(wide), _image(by_grad), out=d_u)
        else:
            assert u is not None
            assert centre is not None
            torch.sub(u.to(wide), _image(centre), out=d_u)
            d_u.mul_(_image(by_input)).add_(_image(constant))
            d_u.addcmul_(g.to(wide), _image(by_grad))
        if not residual:
            return d_u.to(grad.dtype), None
        return d_u.to(grad.dtype), g.clone() if g is grad else g.to(grad.dtype)


class Eager(OperatorBackend):
    name = "eager"
    summary = "one convolution and one affine map in plain torch, gradients by the centred formulas"

    def __init__(self) -> None:
        super().__init__(register("eager", EagerPasses()))

    def not_supported(self, args: LayerArgs) -> str | None:
        return None


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The layer's operator of this backend in operators of torch, for exporters; eval mode only.

    A table for ``ExportedProgram.run_decompositions``.
    """
    return {torch.ops.awnet.layer_eager.default: _in_torch_operators}


def _in_torch_operators(*flat: Any) -> tuple[Tensor, ...]:
    args, _, _ = unflatten(flat)
    y = equations(args, scale_outputs=True)
    return (y, *(y.new_empty(0) for _ in Saved._fields[1:]))

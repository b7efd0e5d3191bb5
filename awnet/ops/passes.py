"""What a backend brings: passes over [B, C, H, W] and the [B, C] algebra; and the eager one, in plain torch.

The convolution is the library's. ``[B, C]`` arguments are float32 (float64 for float64 images); images keep
their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from awnet.ops import algebra
from awnet.ops.algebra import BatchStatistics, Gradients, Propagation


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and the [B, C] algebra for images of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Passes(Protocol):
    """What a backend implements. Outputs keep the memory format of ``u``."""

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample mean [B, C] and centred sum of squares M2 [B, C]."""
        ...

    def apply(self, u: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        """y = act(u · scale + shift + residual), [B, C, H, W]."""
        ...

    def reduce(self, grad: Tensor, u: Tensor, centre: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """G1 = Σ g and Gc = Σ g (u − centre), [B, C]; g is ``grad`` where y > 0 (y None: no activation)."""
        ...

    def propagate(
        self, grad: Tensor, u: Tensor, centre: Tensor, y: Tensor | None, how: Propagation, residual: bool
    ) -> tuple[Tensor, Tensor | None]:
        """∂u by ``how``, and ∂residual = g where asked for."""
        ...

    # convolutions with the layer's work in their epilogue; None: the library's convolution and the passes

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
        save: bool,
        /,
    ) -> tuple[Tensor, Tensor] | None:
        """y = act(u · scale + shift + residual) and u = conv(input, weight), empty without ``save``."""
        ...

    def fused_statistics(
        self,
        input: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        /,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """u = conv(input, weight) and what ``statistics`` gives of it."""
        ...

    def fused_dgrad(
        self,
        d_u: Tensor,
        weight: Tensor,
        input_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        /,
    ) -> Tensor | None:
        """The gradient of the convolution's input."""
        ...

    # the algebra: see awnet/ops/algebra.py for each

    def testing_coefficients(
        self,
        omega: Tensor | None,
        bn_weight: Tensor,
        bn_bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        p_clean: Tensor | None,
        eps: float,
        batch: int,
        /,
    ) -> tuple[Tensor, Tensor]: ...

    def testing_gradients(
        self,
        g1: Tensor,
        gc: Tensor,
        centre: Tensor,
        omega: Tensor | None,
        bn_weight: Tensor,
        bn_bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        p_clean: Tensor | None,
        eps: float,
        /,
    ) -> Gradients: ...

    def batch_statistics(
        self, mean: Tensor, m2: Tensor, hw: int, omega: Tensor | None, is_clean: Tensor | None, rows: int, /
    ) -> BatchStatistics: ...

    def training_coefficients(
        self,
        omega: Tensor | None,
        bn_weight: Tensor,
        bn_bias: Tensor,
        statistics: BatchStatistics,
        is_clean: Tensor | None,
        eps: float,
        batch: int,
        /,
    ) -> tuple[Tensor, Tensor]: ...

    def training_gradients(
        self,
        g1: Tensor,
        gc: Tensor,
        mean: Tensor,
        m2: Tensor,
        hw: int,
        omega: Tensor | None,
        bn_weight: Tensor,
        statistics: BatchStatistics,
        is_clean: Tensor | None,
        eps: float,
        /,
    ) -> tuple[Gradients, Propagation]: ...


def _image(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def _masked(grad: Tensor, y: Tensor | None) -> Tensor:
    return grad if y is None else torch.ops.aten.threshold_backward(grad, y, 0)


class LibraryConvolutions:
    """For a backend without convolutions of its own."""

    def fused_apply(self, *arguments: Any) -> None:
        return None

    def fused_statistics(self, *arguments: Any) -> None:
        return None

    def fused_dgrad(self, *arguments: Any) -> None:
        return None


class EagerPasses(LibraryConvolutions):
    """The passes in plain torch: any device and dtype."""

    testing_coefficients = staticmethod(algebra.testing_coefficients)
    testing_gradients = staticmethod(algebra.testing_gradients)
    batch_statistics = staticmethod(algebra.batch_statistics)
    training_coefficients = staticmethod(algebra.training_coefficients)
    training_gradients = staticmethod(algebra.training_gradients)

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        wide = u.to(wide_dtype(u.dtype))
        mean = wide.mean((2, 3))
        return mean, (wide - _image(mean)).square_().sum((2, 3))

    def apply(self, u: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        wide = u.to(wide_dtype(u.dtype))
        y = torch.empty_like(wide)
        torch.addcmul(_image(shift), wide, _image(scale), out=y)
        if residual is not None:
            y.add_(residual)
        if relu:
            y.relu_()
        return y.to(u.dtype)

    def reduce(self, grad: Tensor, u: Tensor, centre: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(u.dtype)
        g = _masked(grad, y).to(wide)
        return g.sum((2, 3)), (u.to(wide) - _image(centre)).mul_(g).sum((2, 3))

    def propagate(
        self, grad: Tensor, u: Tensor, centre: Tensor, y: Tensor | None, how: Propagation, residual: bool
    ) -> tuple[Tensor, Tensor | None]:
        wide = wide_dtype(u.dtype)
        g = _masked(grad, y)
        d_u = torch.empty_like(u, dtype=wide)
        if how.by_input is None or how.constant is None:
            torch.mul(g.to(wide), _image(how.by_grad), out=d_u)
        else:
            torch.sub(u.to(wide), _image(centre), out=d_u)
            d_u.mul_(_image(how.by_input)).add_(_image(how.constant))
            d_u.addcmul_(g.to(wide), _image(how.by_grad))
        if not residual:
            return d_u.to(u.dtype), None
        return d_u.to(u.dtype), g.clone() if y is None else g

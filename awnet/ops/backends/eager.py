"""What a backend brings: passes over [B, C, H, W] and the [B, C] algebra; and the eager one, in plain torch.

The convolution is the library's. ``[B, C]`` arguments are float32 (float64 for float64 images); images keep
their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from awnet.ops import coefficients
from awnet.ops.args import Needs
from awnet.ops.coefficients import BatchStatistics, Gradients, Propagation, Sums


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and the [B, C] algebra for images of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Passes(Protocol):
    """What a backend implements. Outputs keep the memory format of ``u``.

    ``gate`` says where the activation passed: y itself, or a bool mask that is True where y is not <= 0 (so
    NaN passes, as in torch); None where there is no activation. g is ``grad`` where it passed, else 0.
    """

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample mean [B, C] and centred sum of squares M2 [B, C]."""
        ...

    def apply(
        self,
        u: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        relu: bool,
        keep_mask: bool,
        in_place: bool,
        /,
    ) -> tuple[Tensor, Tensor]:
        """y = act(u · scale + shift + residual), [B, C, H, W], in u's own memory if ``in_place``.

        And the mask, empty without ``keep_mask``.
        """
        ...

    def reduce(
        self, grad: Tensor, u: Tensor, centre: Tensor, gate: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """G1 = Σ g and Gc = Σ g (u − centre), [B, C]."""
        ...

    def propagate(
        self,
        grad: Tensor,
        u: Tensor | None,
        centre: Tensor | None,
        gate: Tensor | None,
        how: Propagation,
        residual: bool,
        /,
    ) -> tuple[Tensor, Tensor | None]:
        """∂u by ``how``, and ∂residual = g if asked for; u and centre only where ``how`` has ``by_input``."""
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
        keep_u: bool,
        keep_mask: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """What ``apply`` gives of u = conv(input, weight), and u in between, empty without ``keep_u``."""
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

    # the algebra: see awnet/ops/coefficients.py for each

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
        needs: Needs,
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

    def training_sums(
        self,
        g1: Tensor,
        gc: Tensor,
        mean: Tensor,
        omega: Tensor | None,
        bn_weight: Tensor,
        statistics: BatchStatistics,
        is_clean: Tensor | None,
        eps: float,
        /,
    ) -> Sums: ...

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
        need_scale: bool,
        sums: Sums | None,
        /,
    ) -> tuple[Gradients, Propagation]: ...


def _image(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def _masked(grad: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return grad
    if gate.dtype == torch.bool:
        return torch.where(gate, grad, 0)
    return torch.ops.aten.threshold_backward(grad, gate, 0)


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

    testing_coefficients = staticmethod(coefficients.testing_coefficients)
    testing_gradients = staticmethod(coefficients.testing_gradients)
    batch_statistics = staticmethod(coefficients.batch_statistics)
    training_coefficients = staticmethod(coefficients.training_coefficients)
    training_sums = staticmethod(coefficients.training_sums)
    training_gradients = staticmethod(coefficients.training_gradients)

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
        relu: bool,
        keep_mask: bool,
        in_place: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = u.to(wide_dtype(u.dtype))
        y = wide if in_place or wide is not u else torch.empty_like(wide)
        torch.addcmul(_image(shift), wide, _image(scale), out=y)
        if residual is not None:
            y.add_(residual)
        if relu:
            y.relu_()
        y = y.to(u.dtype)
        mask = (y <= 0).logical_not_() if keep_mask else y.new_empty(0, dtype=torch.bool)
        return y, mask

    def reduce(self, grad: Tensor, u: Tensor, centre: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(u.dtype)
        g = _masked(grad, gate).to(wide)
        return g.sum((2, 3)), (u.to(wide) - _image(centre)).mul_(g).sum((2, 3))

    def propagate(
        self,
        grad: Tensor,
        u: Tensor | None,
        centre: Tensor | None,
        gate: Tensor | None,
        how: Propagation,
        residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        wide = wide_dtype(grad.dtype)
        g = _masked(grad, gate)
        own = g is not grad and g.dtype == wide and not residual and how.by_input is None
        d_u = g if own else torch.empty_like(grad, dtype=wide)
        if how.by_input is None or how.constant is None:
            torch.mul(g.to(wide), _image(how.by_grad), out=d_u)
        else:
            assert u is not None
            assert centre is not None
            torch.sub(u.to(wide), _image(centre), out=d_u)
            d_u.mul_(_image(how.by_input)).add_(_image(how.constant))
            d_u.addcmul_(g.to(wide), _image(how.by_grad))
        if not residual:
            return d_u.to(grad.dtype), None
        return d_u.to(grad.dtype), g.clone() if gate is None else g

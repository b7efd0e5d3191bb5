"""A whole network in test mode: every layer's scale and shift at once, and the layer that takes them.

With the weights frozen, nothing in a layer depends on the images but ω and p. All coefficients are then known
before the network runs (``docs/equations.md``), each layer is ``act(conv(x) · scale + shift + residual)``,
and an attack needs the gradients of images, ω and p alone.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from awnet import reference
from awnet.ops import backends, triton_passes
from awnet.ops.algebra import Propagation
from awnet.ops.functional import (
    Size2,
    _autocast,
    _check_image,
    _check_like,
    _check_table,
    _conv_call,
    _output_shape,
)
from awnet.ops.layer import Call, memory_format
from awnet.ops.passes import EagerPasses, LibraryConvolutions, wide_dtype
from awnet.ops.tuning import launch_parameters


class _NativePasses(LibraryConvolutions):
    """The passes of ``csrc/``, on a CPU or a CUDA device."""

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
        return torch.ops.awnet.apply(u, scale, shift, residual, relu, keep_mask)

    def reduce(self, grad: Tensor, u: Tensor, centre: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.awnet.reduce(grad, u, centre, gate)

    def propagate(
        self,
        grad: Tensor,
        u: Tensor | None,
        centre: Tensor | None,
        gate: Tensor | None,
        how: Propagation,
        residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        d_u, d_residual = torch.ops.awnet.propagate(grad, u, centre, gate, *how, residual)
        return d_u, d_residual if residual else None


_PASSES: dict[str, Any] = {
    "triton": triton_passes.TritonPasses(),
    "cuda": _NativePasses(),
    "cpp": _NativePasses(),
    "eager": EagerPasses(),
}


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
        scale, shift: ``[B, C_out]``, of any floating dtype; float32 or wider keeps their digits.
        residual: ``[B, C_out, H', W']`` of ``input``'s dtype, added before the activation, or None.
        activation: ``"relu"`` or None.
        backend: a backend's name, or None for the best that can run this call.

    Returns:
        ``[B, C_out, H', W']`` in ``input``'s dtype and memory format. Differentiable once in input, weight,
        scale, shift and residual (for second derivatives use ``backend="reference"``); the convolution's
        output is kept only for scale and shift, the input only for the weight.

    Raises:
        TypeError, ValueError: as in :func:`aw_conv2d`.
    """
    if activation not in ("relu", None):
        raise ValueError(f'activation must be "relu" or None, got {activation!r}')
    call = _conv_call(input, weight, None, stride, padding, dilation, groups)
    assert call.input is not None
    assert call.weight is not None
    input, weight = call.input, call.weight
    shape = _output_shape(call)
    for label, table in (("scale", scale), ("shift", shift)):
        _check_table(table, label, shape[:2], "[B, C_out]", input)
    if residual is not None:
        residual = _autocast(_check_image(residual, "residual"))
        if tuple(residual.shape) != shape:
            raise ValueError(
                f"residual must have the output's shape {list(shape)}, got {list(residual.shape)}"
            )
        _check_like(residual, "residual", input, "input")
    call = call._replace(filter_scale=scale, residual=residual, relu=activation == "relu")
    name = backends.select(call, backend).name
    if name == "reference":
        return _literal(call, shift)
    wide = wide_dtype(input.dtype)
    tensors = (input, weight, scale.to(wide), shift.to(wide), residual)
    where = _Where(_PASSES[name], call.relu, call.stride, call.padding, call.dilation, call.groups)
    device = input.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _affine(tensors, where)
    return _affine(tensors, where)


def _literal(call: Call, shift: Tensor) -> Tensor:
    convolution: dict[str, Any] = {
        "stride": tuple(call.stride),
        "padding": tuple(call.padding),
        "dilation": tuple(call.dilation),
        "groups": call.groups,
    }
    images: list[Any] = [call.input, call.weight, call.filter_scale]
    y = reference.filter_scaled_conv2d(*images, **convolution)
    y = y + shift.to(y.dtype)[:, :, None, None]
    if call.residual is not None:
        y = y + call.residual
    y = F.relu(y) if call.relu else y
    return y if call.input is None else y.contiguous(memory_format=memory_format(call.input))


class _Where(NamedTuple):
    passes: Any
    relu: bool
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def _affine(tensors: _Tensors, where: _Where) -> Tensor:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Affine.apply(*tensors, where)
    return _run(tensors, where, keep_u=False, keep_mask=False)[0]


def _run(tensors: _Tensors, where: _Where, keep_u: bool, keep_mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, u and the mask of where the activation passed, the last two of use where they are kept."""
    input, weight, scale, shift, residual = tensors
    passes, relu, *place = where
    fused = passes.fused_apply(input, weight, scale, shift, residual, relu, *place, keep_u, keep_mask)
    if fused is not None:
        return fused
    *sizes, groups = place
    u = torch.ops.aten.convolution(input, weight, None, *sizes, False, [0, 0], groups)
    u = u.contiguous(memory_format=memory_format(input))
    y, mask = passes.apply(u, scale, shift, residual, relu, keep_mask, not keep_u)
    return y, u, mask


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        where: _Where,
    ) -> Tensor:
        need_weight, need_table = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:4])
        # y is the next layer's saved input where weights are trained; else a mask takes a byte an element
        keep_mask = where.relu and not need_weight
        y, u, mask = _run((input, weight, scale, shift, residual), where, need_table, keep_mask)
        ctx.where, ctx.input_shape, ctx.layout = where, input.shape, memory_format(y)
        ctx.save_for_backward(
            input if need_weight else None,
            weight,
            scale,
            u if need_table else None,
            (mask if keep_mask else y) if where.relu else None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight, scale, u, gate = ctx.saved_tensors
        passes, _, *place = ctx.where
        need_input, need_weight, need_scale, need_shift, need_residual = ctx.needs_input_grad[:5]
        grad = grad.contiguous(memory_format=ctx.layout)
        d_input = d_weight = d_scale = d_shift = d_residual = None
        if need_scale or need_shift:
            # any centre is exact; one near the channel's mean keeps the digits, a pixel of u is such a one
            centre = u[:, :, 0, 0].to(scale.dtype)
            d_shift, gc = passes.reduce(grad, u, centre, gate)
            d_scale = torch.addcmul(gc, centre, d_shift)
        if need_input or need_weight or need_residual:
            how = Propagation(scale, None, None)
            d_u, d_residual = passes.propagate(grad, None, None, gate, how, need_residual)
            if need_input:
                d_input = passes.fused_dgrad(d_u, weight, ctx.input_shape, *place)
            if need_weight or (need_input and d_input is None):
                *sizes, groups = place
                if input is None:
                    input = torch.empty(
                        ctx.input_shape, dtype=d_u.dtype, device=d_u.device, memory_format=memory_format(d_u)
                    )
                needs = [need_input and d_input is None, need_weight, False]
                found = torch.ops.aten.convolution_backward(
                    d_u, input, weight, None, *sizes, False, [0, 0], groups, needs
                )
                d_input, d_weight = found[0] if needs[0] else d_input, found[1]
        return d_input, d_weight, d_scale, d_shift, d_residual, None


def network_coefficients(
    tables: Tensor,
    widths: Sequence[int],
    omega: Tensor | None,
    p_clean: Tensor,
    *,
    eps: float,
    backend: str | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """scale and shift ``[B, C_l]`` of every layer of a network in test mode (Eq. 11 and 14).

    scale = ω [(1 − p) γ_0/σ_0 + p γ_1/σ_1], shift = (1 − p)(β_0 − μ_0 γ_0/σ_0) + p (β_1 − μ_1 γ_1/σ_1). On
    the Triton backend one launch makes them all.

    Args:
        tables: ``[4, 2, T]`` with T = Σ C_l, float32 or wider: γ, β, μ, σ² of the adversarial and the clean
            branch, the layers side by side.
        widths: C_l of each layer.
        omega: ω ``[B, D]`` of the dynamic layers side by side; these are the first of ``widths``, and their
            widths sum to D. None where no layer is dynamic.
        p_clean: p ``[B]``.
        eps: added to the variances.
        backend: a backend's name, or None for the best that can run the call.

    Returns:
        One contiguous (scale, shift) for each layer, of ``tables``' dtype; differentiable once in ``omega``
        and ``p_clean``, not in ``tables``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``tables`` requires a gradient.
    """
    widths = tuple(widths)
    _check_network(tables, widths, omega, p_clean, eps)
    p_clean = p_clean.to(tables.dtype)
    omega = None if omega is None else omega.to(tables.dtype)
    runs_triton = backends.select(_stand_in(tables, omega, p_clean), backend).name == "triton"
    flat = _NetworkCoefficients.apply(omega, p_clean, tables, widths, float(eps), runs_triton)
    return list(zip(flat[::2], flat[1::2], strict=True))


def _check_network(
    tables: Tensor, widths: tuple[int, ...], omega: Tensor | None, p_clean: Tensor, eps: float
) -> None:
    columns = sum(widths)
    if not widths or tuple(tables.shape) != (4, 2, columns):
        raise ValueError(f"tables must be [4, 2, {columns}] for widths {widths}, got {list(tables.shape)}")
    if tables.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"tables must be float32 or float64, got {tables.dtype}")
    if tables.requires_grad:
        raise ValueError("tables must not require a gradient: pass tables.detach(), or use aw_conv2d")
    if p_clean.dim() != 1 or not p_clean.is_floating_point():
        raise ValueError(f"p_clean must be floating point [B], got {p_clean.dtype} {list(p_clean.shape)}")
    if not isinstance(eps, float | int) or not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    for name, x in (("omega", omega), ("p_clean", p_clean)):
        if x is not None and x.device != tables.device:
            raise ValueError(f"{name} is on {x.device}, tables on {tables.device}: put both on one device")
    if omega is None:
        return
    sums = {sum(widths[: i + 1]) for i in range(len(widths))}
    if omega.dim() != 2 or len(omega) != len(p_clean) or omega.shape[1] not in sums:
        raise ValueError(
            f"omega must be [{len(p_clean)}, D] with D the sum of the first widths of {widths}, got "
            f"{list(omega.shape)}"
        )


def _stand_in(tables: Tensor, omega: Tensor | None, p_clean: Tensor) -> Call:
    """A call by which a backend judges device and dtype."""
    image = tables[:1]
    return Call(image, None, omega, p_clean, *(None,) * 6, False, 1e-5, False, (1, 1), (0, 0), (1, 1), 1)


class _NetworkCoefficients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        omega: Tensor | None,
        p_clean: Tensor,
        tables: Tensor,
        widths: tuple[int, ...],
        eps: float,
        runs_triton: bool,
    ) -> tuple[Tensor, ...]:
        ctx.eps, ctx.has_omega = eps, omega is not None
        ctx.save_for_backward(omega, p_clean, tables)
        if runs_triton:
            return _by_one_kernel(omega, p_clean, tables, widths, eps)
        gain, offset = _folded(tables, eps)
        p = p_clean[:, None]
        q = 1 - p
        mixed = q * gain[0] + p * gain[1]  # [B, T]
        shifts = (q * offset[0] + p * offset[1]).split(widths, 1)
        dynamic = 0 if omega is None else omega.shape[1]
        scales = [part.contiguous() for part in mixed.split(widths, 1)]
        begin = 0
        for scale, width in zip(scales, widths, strict=True):
            if begin < dynamic:
                assert omega is not None
                scale.mul_(omega[:, begin : begin + width])
            begin += width
        return tuple(x for pair in zip(scales, shifts, strict=True) for x in (pair[0], pair[1].contiguous()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        omega, p_clean, tables = ctx.saved_tensors
        gain, offset = _folded(tables, ctx.eps)
        d_scale, d_shift = torch.cat(grads[::2], 1), torch.cat(grads[1::2], 1)  # [B, T]
        d_omega = d_p = None
        dynamic = 0 if omega is None else omega.shape[1]
        if ctx.needs_input_grad[0]:
            p = p_clean[:, None]
            mixed = (1 - p) * gain[0, :dynamic] + p * gain[1, :dynamic]
            d_omega = d_scale[:, :dynamic] * mixed
        if ctx.needs_input_grad[1]:
            if omega is not None:
                d_scale[:, :dynamic].mul_(omega)
            by_p = d_scale * (gain[1] - gain[0])  # no product of matrices: autocast would take it to 16 bits
            d_p = by_p.addcmul_(d_shift, offset[1] - offset[0]).sum(1)
        return d_omega, d_p, None, None, None, None


def _folded(tables: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """γ/σ and β − μγ/σ of both branches, [2, T]."""
    weight, bias, mean, var = tables
    gain = weight * torch.rsqrt(var + eps)
    return gain, torch.addcmul(bias, mean, gain, value=-1)


def _by_one_kernel(
    omega: Tensor | None, p_clean: Tensor, tables: Tensor, widths: tuple[int, ...], eps: float
) -> tuple[Tensor, ...]:
    kernels = importlib.import_module("awnet.kernels.coefficients")
    dynamic = 0 if omega is None else omega.shape[1]
    packed = kernels.PackedNorms(tables, _layout(widths, dynamic, tables.device), widths, dynamic, eps)
    how = launch_parameters("network_coefficients", tables.device, len(p_clean), sum(widths))
    omega = None if omega is None else omega.contiguous()
    pairs = kernels.network_coefficients(omega, packed, p_clean.contiguous(), how)
    return tuple(x for pair in pairs for x in pair)


@functools.lru_cache(maxsize=64)
def _layout(widths: tuple[int, ...], dynamic: int, device: torch.device) -> Tensor:
    """Of each column begin_l, C_l and the column of ω or -1, int32 [3, T]: the layout of ``PackedNorms``."""
    rows: list[tuple[int, int, int]] = []
    begin = 0
    for width in widths:
        rows += [(begin, width, begin + i if begin < dynamic else -1) for i in range(width)]
        begin += width
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32).T.contiguous().to(device)

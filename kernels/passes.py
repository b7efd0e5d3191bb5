"""The layer's passes over images [B, C, H, W]: apply, statistics, reduce and propagate.

A *plane* is one channel of one sample; there are B·C of them. Every pass works on tiles of ``BLOCK_M`` planes
by ``BLOCK_P`` pixels with one coefficient per plane. The two layouts differ in offsets alone: in NCHW the
pixels of a plane are adjacent, in channels_last the channels of a pixel are, and a tile stays within one
sample. Values and sums are float32, offsets int64. There are no atomics: where the pixels of a plane are
split over several programs, each writes its partial result and a second kernel combines them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activated
from .launch import Case, Table, launch, power_of_two
from .tables import as_bytes
from .tiles import (
    Grid,
    in_eights,
    is_packed,
    launch_grid,
    load_planes,
    load_values,
    packed,
    packed_mask,
    packed_offsets,
    planes_of_program,
    shape_of,
    store_values,
    tile_of_program,
    tile_offsets,
)

OPS = ("apply", "statistics", "reduce", "propagate")


# --- kernels


@triton.jit
def _parts_of_program(num_planes, splits, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """The planes of a combining program, the splits, and the offsets [BLOCK_M, BLOCK_S] of their parts."""
    plane = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.arange(0, BLOCK_S).to(tl.int64)
    in_planes = plane < num_planes
    offsets = split[None, :] * num_planes + plane[:, None]
    return plane, in_planes, split, offsets, in_planes[:, None] & (split < splits)[None, :]


@triton.jit
def _load_masked_grad(grad_ptr, relu_mask_ptr, slope_ptr, offsets, in_bounds):
    """The gradient of the activation's input: of a ReLU the gradient of y where it passed, else 0.

    The mask is y (NaN passes, as in torch) or bytes. Of another activation the product with its slope.
    """
    g = load_values(grad_ptr, offsets, in_bounds)
    if relu_mask_ptr is not None:
        g = tl.where(load_values(relu_mask_ptr, offsets, in_bounds) <= 0, 0.0, g)
    if slope_ptr is not None:
        g *= load_values(slope_ptr, offsets, in_bounds)
    return g


@triton.jit
def apply_kernel(
    y_ptr,
    mask_ptr,  # of a ReLU bytes or packed bits, of another activation its slope, of the shape of y; or None
    u_ptr,
    scale_ptr,  # [B, C]
    shift_ptr,
    residual_ptr,  # like u, or None
    residual_scale_ptr,  # [B, C], or None
    residual_shift_ptr,
    num_planes,
    channels,
    hw,
    splits,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    plane, in_planes, offsets, in_bounds = tile_of_program(
        num_planes, channels, hw, splits, CHANNELS_LAST, BLOCK_M, BLOCK_P
    )
    u = load_values(u_ptr, offsets, in_bounds)
    # an explicit fma: eval_backward_kernel computes the same bits again
    y = tl.fma(
        u,
        tl.broadcast_to(load_planes(scale_ptr, plane, in_planes), u.shape),
        tl.broadcast_to(load_planes(shift_ptr, plane, in_planes), u.shape),
    )
    if residual_ptr is not None:
        residual = load_values(residual_ptr, offsets, in_bounds)
        if residual_scale_ptr is not None:
            shift = load_planes(residual_shift_ptr, plane, in_planes)
            residual = residual * load_planes(residual_scale_ptr, plane, in_planes) + shift
        y += residual
    if ACTIVATION > 1:
        y, slope = activated(y, ACTIVATION)
        if mask_ptr is not None:
            store_values(mask_ptr, offsets, slope, in_bounds)
    elif ACTIVATION == 1:
        y = tl.where(y <= 0, 0.0, y)  # NaN passes, as in torch
    store_values(y_ptr, offsets, y, in_bounds)
    if ACTIVATION <= 1:  # noqa: SIM102 (two conditions of the compiler)
        if mask_ptr is not None:  # of y as stored
            stored = y.to(y_ptr.dtype.element_ty).to(tl.float32)
            relu_mask = tl.where(stored <= 0, 0, 1)
            if PACKED:
                pid = tl.program_id(0)
                first_pixel = (pid % splits).to(tl.int64) * BLOCK_P
                offsets, in_bounds = packed_offsets(
                    pid // splits, first_pixel, num_planes, channels, hw, CHANNELS_LAST, BLOCK_M, BLOCK_P
                )
                relu_mask = packed(relu_mask, CHANNELS_LAST, BLOCK_M, BLOCK_P)
            tl.store(mask_ptr + offsets, relu_mask.to(tl.uint8), mask=in_bounds)


@triton.jit
def statistics_kernel(
    mean_ptr,  # [splits, B, C]
    m2_ptr,
    u_ptr,
    num_planes,
    channels,
    hw,
    splits,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEPS: tl.constexpr,
):
    plane, in_planes, start, split = planes_of_program(
        num_planes, channels, hw, splits, CHANNELS_LAST, BLOCK_M
    )
    first_pixel = split * (BLOCK_P * STEPS)
    offsets, in_bounds = tile_offsets(start, in_planes, first_pixel, channels, hw, CHANNELS_LAST, BLOCK_P)
    x = load_values(u_ptr, offsets, in_bounds)
    mean = tl.sum(x, 1) / tl.minimum(hw - first_pixel, BLOCK_P).to(tl.float32)
    # All values are centered on the mean of the first tile, so two sums at the end are enough. What the drift
    # cancels is at most STEPS · M2, since the first tile alone adds 1/STEPS of it to M2.
    centered = tl.where(in_bounds, x - mean[:, None], 0.0)
    sums = centered
    squares = centered * centered
    for step in range(1, STEPS):
        begin = first_pixel + step * BLOCK_P
        offsets, in_bounds = tile_offsets(start, in_planes, begin, channels, hw, CHANNELS_LAST, BLOCK_P)
        x = load_values(u_ptr, offsets, in_bounds)
        centered = tl.where(in_bounds, x - mean[:, None], 0.0)
        sums += centered
        squares += centered * centered
    m2 = tl.sum(squares, 1)
    if STEPS > 1:
        total = tl.sum(sums, 1)
        drift = total / tl.minimum(hw - first_pixel, BLOCK_P * STEPS).to(tl.float32)
        mean += drift
        m2 -= total * drift
        m2 = tl.where(m2 < 0, 0.0, m2)  # rounding; NaN stays
    tl.store(mean_ptr + split * num_planes + plane, mean, mask=in_planes)
    tl.store(m2_ptr + split * num_planes + plane, m2, mask=in_planes)


@triton.jit
def combine_statistics_kernel(
    mean_ptr,  # [B, C]
    m2_ptr,
    part_mean_ptr,  # [splits, B, C]
    part_m2_ptr,
    num_planes,
    hw,
    splits,
    PIXELS_PER_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    plane, in_planes, split, offsets, in_bounds = _parts_of_program(num_planes, splits, BLOCK_M, BLOCK_S)
    count = tl.minimum(tl.maximum(hw - split * PIXELS_PER_SPLIT, 0), PIXELS_PER_SPLIT)
    count = count.to(tl.float32)[None, :]
    part_mean = load_values(part_mean_ptr, offsets, in_bounds)
    mean = tl.sum(part_mean * count, 1) / hw
    delta = tl.where(in_bounds, part_mean - mean[:, None], 0.0)
    m2 = tl.sum(load_values(part_m2_ptr, offsets, in_bounds) + count * delta * delta, 1)
    tl.store(mean_ptr + plane, mean, mask=in_planes)
    tl.store(m2_ptr + plane, m2, mask=in_planes)


@triton.jit
def reduce_kernel(
    g1_ptr,  # [splits, B, C]
    gc_ptr,
    grad_ptr,
    u_ptr,
    center_ptr,  # [B, C]
    relu_mask_ptr,
    slope_ptr,
    num_planes,
    channels,
    hw,
    splits,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEPS: tl.constexpr,
):
    plane, in_planes, start, split = planes_of_program(
        num_planes, channels, hw, splits, CHANNELS_LAST, BLOCK_M
    )
    first_pixel = split * (BLOCK_P * STEPS)
    center = load_planes(center_ptr, plane, in_planes)
    g1 = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    gc = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    for step in range(STEPS):
        begin = first_pixel + step * BLOCK_P
        offsets, in_bounds = tile_offsets(start, in_planes, begin, channels, hw, CHANNELS_LAST, BLOCK_P)
        g = _load_masked_grad(grad_ptr, relu_mask_ptr, slope_ptr, offsets, in_bounds)
        g1 += g
        gc += tl.where(in_bounds, g * (load_values(u_ptr, offsets, in_bounds) - center), 0.0)
    tl.store(g1_ptr + split * num_planes + plane, tl.sum(g1, 1), mask=in_planes)
    tl.store(gc_ptr + split * num_planes + plane, tl.sum(gc, 1), mask=in_planes)


@triton.jit
def combine_sums_kernel(
    g1_ptr,  # [B, C]
    gc_ptr,
    part_g1_ptr,  # [splits, B, C]
    part_gc_ptr,
    num_planes,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    plane, in_planes, _, offsets, in_bounds = _parts_of_program(num_planes, splits, BLOCK_M, BLOCK_S)
    tl.store(g1_ptr + plane, tl.sum(load_values(part_g1_ptr, offsets, in_bounds), 1), mask=in_planes)
    tl.store(gc_ptr + plane, tl.sum(load_values(part_gc_ptr, offsets, in_bounds), 1), mask=in_planes)


@triton.jit
def propagate_kernel(
    d_u_ptr,
    d_residual_ptr,  # or None
    grad_ptr,
    u_ptr,  # None without by_input, like center and constant
    center_ptr,  # [B, C]
    relu_mask_ptr,
    slope_ptr,
    by_grad_ptr,
    by_input_ptr,
    constant_ptr,
    num_planes,
    channels,
    hw,
    splits,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    plane, in_planes, offsets, in_bounds = tile_of_program(
        num_planes, channels, hw, splits, CHANNELS_LAST, BLOCK_M, BLOCK_P
    )
    g = _load_masked_grad(grad_ptr, relu_mask_ptr, slope_ptr, offsets, in_bounds)
    d_u = g * load_planes(by_grad_ptr, plane, in_planes)
    if by_input_ptr is not None:
        centered = load_values(u_ptr, offsets, in_bounds) - load_planes(center_ptr, plane, in_planes)
        by_input = load_planes(by_input_ptr, plane, in_planes)
        d_u += centered * by_input + load_planes(constant_ptr, plane, in_planes)
    store_values(d_u_ptr, offsets, d_u, in_bounds)
    if d_residual_ptr is not None:
        store_values(d_residual_ptr, offsets, g, in_bounds)


# --- launches


_COMBINE_TILE = 2048  # elements of a tile of the combining kernels


def _combine(kernel: object, grid: Grid, *arguments: object, **constants: int) -> None:
    block_s = power_of_two(grid.splits)
    block_m = min(power_of_two(grid.shape.planes), max(1, _COMBINE_TILE // block_s))
    programs = -(-grid.shape.planes // block_m)
    launch(kernel, programs, *arguments, BLOCK_M=block_m, BLOCK_S=block_s, **constants)


def table_like(u: Tensor, splits: int = 1) -> Tensor:
    """Uninitialized float32 [B, C], or [splits, B, C] for partial results."""
    size = u.shape[:2] if splits == 1 else (splits, *u.shape[:2])
    return torch.empty(size, dtype=torch.float32, device=u.device)


def apply(
    u: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    activation: int,
    config: Mapping[str, int],
    *,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    out: Tensor | None = None,
    relu_mask: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """y = act(u · scale + shift + r) with r = residual, or residual · residual_scale + residual_shift.

    Args:
        u: [B, C, H, W], contiguous or channels_last, float32, bfloat16 or float16.
        scale, shift, residual_scale, residual_shift: contiguous float32 [B, C].
        residual: of the shape, dtype and layout of ``u``, or None.
        activation: of act, see :mod:`awnet.kernels.activations`.
        config: launch parameters ``tile``, ``inner``, ``warps``.
        out: the tensor to write to, which may be ``u``; a new tensor like ``u`` if None.
        relu_mask: for the ReLU, a bool tensor like ``u`` to write to, True where y is not <= 0; or the same
            as bits, :func:`packed_mask`.
        slope: for activations other than the ReLU, a tensor like ``u`` to write act' to.
    """
    y = torch.empty_like(u) if out is None else out
    as_bits = is_packed(relu_mask)
    grid = launch_grid(shape_of(u), in_eights(config) if as_bits else config)
    launch(
        apply_kernel, grid.programs,
        y, as_bytes(relu_mask) if slope is None else slope, u, scale, shift, residual, residual_scale,
        residual_shift, *grid.sizes,
        ACTIVATION=activation, PACKED=as_bits, warps=config["warps"], **grid.constants,
    )  # fmt: skip
    return y


def statistics(
    u: Tensor, config: Mapping[str, int], *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and centered sum of squares of each plane of ``u`` [B, C, H, W]: two float32 [B, C].

    ``config``: launch parameters ``tile``, ``inner``, ``steps``, ``warps``. ``out``: tensors to write to.
    """
    grid = launch_grid(shape_of(u), config, steps=True)
    out = (table_like(u), table_like(u)) if out is None else out
    parts = out if grid.splits == 1 else (table_like(u, grid.splits), table_like(u, grid.splits))
    launch(statistics_kernel, grid.programs, *parts, u, *grid.sizes, warps=config["warps"], **grid.constants)
    if grid.splits > 1:
        pixels = grid.constants["BLOCK_P"] * grid.constants["STEPS"]
        sizes = (grid.shape.planes, grid.shape.hw, grid.splits)
        _combine(combine_statistics_kernel, grid, *out, *parts, *sizes, PIXELS_PER_SPLIT=pixels)
    return out


def reduce(
    grad: Tensor,
    u: Tensor,
    center: Tensor,
    relu_mask: Tensor | None,
    config: Mapping[str, int],
    *,
    slope: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """G1 = Σ g and Gc = Σ g (u − center) over each plane, float32 [B, C].

    g is ``grad`` where the ReLU passed and 0 elsewhere, or ``grad`` · ``slope``.

    Args:
        grad, u: [B, C, H, W] of one dtype and layout.
        center: contiguous float32 [B, C].
        relu_mask: y, or the bool mask that :func:`apply` writes, of the same layout; None without a ReLU.
        config: launch parameters ``tile``, ``inner``, ``steps``, ``warps``.
        slope: what :func:`apply` writes for other activations, of the same layout; else None.
        out: tensors to write to.
    """
    grid = launch_grid(shape_of(u), config, steps=True)
    out = (table_like(u), table_like(u)) if out is None else out
    parts = out if grid.splits == 1 else (table_like(u, grid.splits), table_like(u, grid.splits))
    launch(
        reduce_kernel, grid.programs, *parts, grad, u, center, as_bytes(relu_mask), slope, *grid.sizes,
        warps=config["warps"], **grid.constants,
    )  # fmt: skip
    if grid.splits > 1:
        _combine(combine_sums_kernel, grid, *out, *parts, grid.shape.planes, grid.splits)
    return out


def propagate(
    grad: Tensor,
    u: Tensor | None,
    center: Tensor | None,
    relu_mask: Tensor | None,
    by_grad: Tensor,
    by_input: Tensor | None,
    constant: Tensor | None,
    residual: bool,
    config: Mapping[str, int],
    *,
    slope: Tensor | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """∂u = by_grad · g + by_input · (u − center) + constant, and ∂residual = g with ``residual``.

    Args:
        grad, u, relu_mask, slope: as in :func:`reduce`.
        center, by_grad, by_input, constant: contiguous float32 [B, C]; u, center, by_input and constant are
            either all given or all None.
        residual: whether ∂residual is requested.
        config: launch parameters ``tile``, ``inner``, ``warps``.
        out: tensors to write to.
    """
    grid = launch_grid(shape_of(grad), config)
    if by_input is None:
        u = center = None
    if out is None:
        out = torch.empty_like(grad), torch.empty_like(grad) if residual else None
    launch(
        propagate_kernel, grid.programs,
        *out, grad, u, center, as_bytes(relu_mask), slope, by_grad, by_input, constant, *grid.sizes,
        warps=config["warps"], **grid.constants,
    )  # fmt: skip
    return out


# --- ahead-of-time compilation

RELU = 1
SMOOTH = {2: "silu", 3: "gelu"}  # the activations that take most registers

# a stage of a ResNet-18, ImageNet's first map, one with no even size, the smallest
SHAPES = {
    "64@32²": (256, 64, 32, 32),
    "64@112²": (1, 64, 112, 112),
    "33@7²": (5, 33, 7, 7),
    "512@2²": (256, 512, 2, 2),
    "1@1²": (1, 1, 1, 1),  # Triton turns sizes of 1 into constants
}


def cases(table: Table) -> Iterator[Case]:
    """Each pass with and without its options at every shipped set of launch parameters."""
    for key, config in table.items():
        op, *rest = key.split("@")[0].split("/")
        if op not in OPS:
            continue
        dtypes = [d for d in ("float32", "bfloat16", "float16") if d in rest] or ["float32", "bfloat16"]
        for dtype in dtypes:
            for name, size in SHAPES.items():
                # a key for this dtype takes precedence
                is_used = dtype in rest or f"{op}/{dtype}/{rest[-1]}" not in table
                for case in _cases_of(op, key, dtype, "channels_last" in rest, name, size, config):
                    yield replace(case, quick=case.quick and is_used)


def _cases_of(
    op: str, key: str, dtype: str, last: bool, name: str, size: tuple[int, ...], config: Mapping[str, int]
) -> Iterator[Case]:
    layout = torch.channels_last if last else torch.contiguous_format
    u = torch.empty(size, dtype=getattr(torch, dtype), device="meta", memory_format=layout)
    mask = torch.empty(size, dtype=torch.bool, device="meta", memory_format=layout)
    c = torch.empty(size[:2], device="meta")
    title = f"{key} {dtype} {name}"
    calls: dict[str, Callable[[], object]] = {}  # the first is compiled for every shape
    if op == "apply":
        calls[" residual relu"] = lambda: apply(u, c, c, u, RELU, config)
        calls[""] = lambda: apply(u, c, c, None, 0, config)
        calls[" relu mask"] = lambda: apply(u, c, c, u, RELU, config, relu_mask=mask)
        bits = packed_mask(u) if u.element_size() == 2 else None  # frozen networks pack no others
        if bits is not None:
            calls[" relu packed mask"] = lambda: apply(u, c, c, u, RELU, config, relu_mask=bits)
        shortcut = {"residual_scale": c, "residual_shift": c}
        calls[" shortcut relu"] = lambda: apply(u, c, c, u, RELU, config, **shortcut)
        for code, smooth in SMOOTH.items():
            calls[f" residual {smooth} slope"] = partial(apply, u, c, c, u, code, config, slope=u)
    elif op == "statistics":
        calls[""] = lambda: statistics(u, config)
    elif op == "reduce":
        calls[" relu"] = lambda: reduce(u, u, c, u, config)
        calls[""] = lambda: reduce(u, u, c, None, config)
        calls[" mask"] = lambda: reduce(u, u, c, mask, config)
        calls[" slope"] = lambda: reduce(u, u, c, None, config, slope=u)
    elif op == "propagate":
        calls[" training relu"] = lambda: propagate(u, u, c, u, c, c, c, True, config)
        calls[" attack mask"] = lambda: propagate(u, None, None, mask, c, None, None, False, config)
        calls[" training mask"] = lambda: propagate(u, u, c, mask, c, c, c, True, config)
        calls[" training slope"] = lambda: propagate(u, u, c, None, c, c, c, True, config, slope=u)
    quick = name == "64@32²" and dtype == "bfloat16"
    for number, (options, run) in enumerate(calls.items()):
        if number == 0 or name == "64@32²":
            yield Case(
                title + options, run, quick=quick and (number == 0 or "mask" in options or "gelu" in options)
            )

"""The backward pass of a layer in eval mode over images [B, C, H, W], in one kernel.

In eval mode the gradient of u does not depend on sums over pixels, so one kernel reads the gradient, u and
the mask once, writes the gradient of u, and sums what the gradients of scale and shift need. It also adds up
to two gradients of y, for a layer whose output has two readers, and the gradient of y's mean over pixels.

Where the pixels of a plane are split over several programs, each stores its partial sums and takes a ticket;
the program with the last ticket adds the parts in the order of the splits, so the bits do not depend on the
order in which programs finish. Tiles and layouts are those of :mod:`awnet.kernels.passes`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Case, Table, launch, power_of_two
from .passes import SHAPES, table_like
from .tables import as_bytes
from .tiles import (
    in_eights,
    is_packed,
    launch_grid,
    load_planes,
    load_values,
    packed_mask,
    packed_offsets,
    planes_of_program,
    shape_of,
    store_values,
    tile_offsets,
    unpacked,
)

OP = "eval_backward"
_COMBINE_TILE = 2048  # partial sums that the last program holds at once


@triton.jit
def eval_backward_kernel(
    d_u_ptr,
    d_residual_ptr,  # or None
    g1_ptr,  # [B, C]; None: no sums
    gc_ptr,  # Σ g (u − center) if center_ptr is given, else Σ g u
    center_ptr,  # [B, C] or None
    part_g1_ptr,  # [splits, B, C]; None for one split
    part_gc_ptr,
    tickets_ptr,  # int32, one for each row of tiles, 0 before
    grad_ptr,  # of y
    other_grad_ptr,  # or None
    d_mean_ptr,  # [B, C], the gradient of y's mean over pixels, or None
    u_ptr,  # None if neither sums nor a mask from u are requested
    relu_mask_ptr,  # y, bytes or packed bits; or None
    slope_ptr,  # of another activation; or None
    scale_ptr,  # [B, C]; None: 1
    shift_ptr,  # [B, C]: the mask is of act(u · scale + shift); or None
    num_planes,
    channels,
    hw,
    splits,
    CHANNELS_LAST: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COMBINE_STEPS: tl.constexpr,
):
    plane, in_planes, start, split = planes_of_program(
        num_planes, channels, hw, splits, CHANNELS_LAST, BLOCK_M
    )
    first_pixel = split * (BLOCK_P * STEPS)
    if scale_ptr is not None:
        scale = load_planes(scale_ptr, plane, in_planes)
    if g1_ptr is not None:
        # any center is exact; one near the channel's mean keeps the digits, and a pixel of u is near it
        center = tl.load(u_ptr + start, mask=in_planes, other=0.0).to(tl.float32)
        g1 = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
        gc = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    for step in range(STEPS):
        begin = first_pixel + step * BLOCK_P
        offsets, in_bounds = tile_offsets(start, in_planes, begin, channels, hw, CHANNELS_LAST, BLOCK_P)
        g = load_values(grad_ptr, offsets, in_bounds)
        if other_grad_ptr is not None:
            g += load_values(other_grad_ptr, offsets, in_bounds)
        if d_mean_ptr is not None:
            g += load_planes(d_mean_ptr, plane, in_planes) / hw
        if u_ptr is not None:
            u = load_values(u_ptr, offsets, in_bounds)
        if slope_ptr is not None:
            g *= load_values(slope_ptr, offsets, in_bounds)
        if PACKED:
            mask_offsets, in_mask = packed_offsets(
                tl.program_id(0) // splits, begin, num_planes, channels, hw, CHANNELS_LAST, BLOCK_M, BLOCK_P
            )
            mask = tl.load(relu_mask_ptr + mask_offsets, mask=in_mask, other=0)
            g = tl.where(unpacked(mask, CHANNELS_LAST, BLOCK_M, BLOCK_P) == 0, 0.0, g)
        elif relu_mask_ptr is not None:
            g = tl.where(load_values(relu_mask_ptr, offsets, in_bounds) <= 0, 0.0, g)
        elif shift_ptr is not None:
            # y as apply_kernel stored it
            y = tl.fma(
                u,
                tl.broadcast_to(scale, u.shape),
                tl.broadcast_to(load_planes(shift_ptr, plane, in_planes), u.shape),
            )
            g = tl.where(y.to(u_ptr.dtype.element_ty).to(tl.float32) <= 0, 0.0, g)
        if scale_ptr is not None:
            store_values(d_u_ptr, offsets, g * scale, in_bounds)
        else:
            store_values(d_u_ptr, offsets, g, in_bounds)
        if d_residual_ptr is not None:
            store_values(d_residual_ptr, offsets, g, in_bounds)
        if g1_ptr is not None:
            g1 += tl.where(in_bounds, g, 0.0)
            gc += tl.where(in_bounds, g * (u - center[:, None]), 0.0)
    if g1_ptr is not None:
        sum_g1 = tl.sum(g1, 1)
        sum_gc = tl.sum(gc, 1)
        last = True
        if part_g1_ptr is not None:
            tl.store(part_g1_ptr + split * num_planes + plane, sum_g1, mask=in_planes)
            tl.store(part_gc_ptr + split * num_planes + plane, sum_gc, mask=in_planes)
            tl.debug_barrier()  # the parts of all threads come before the ticket
            ticket = tl.atomic_add(tickets_ptr + tl.program_id(0) // splits, 1, sem="acq_rel")
            last = ticket == splits - 1
            if last:
                sums_g1 = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
                sums_gc = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
                for step in range(COMBINE_STEPS):
                    part = (step * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
                    offsets = part[None, :] * num_planes + plane[:, None]
                    in_parts = in_planes[:, None] & (part < splits)[None, :]
                    # bypass the L1 cache, which may hold values from before the other programs' stores
                    sums_g1 += tl.load(part_g1_ptr + offsets, mask=in_parts, other=0.0, cache_modifier=".cg")
                    sums_gc += tl.load(part_gc_ptr + offsets, mask=in_parts, other=0.0, cache_modifier=".cg")
                sum_g1 = tl.sum(sums_g1, 1)
                sum_gc = tl.sum(sums_gc, 1)
        if last:
            tl.store(g1_ptr + plane, sum_g1, mask=in_planes)
            if center_ptr is not None:
                tl.store(gc_ptr + plane, sum_gc, mask=in_planes)
                tl.store(center_ptr + plane, center, mask=in_planes)
            else:
                tl.store(gc_ptr + plane, sum_gc + center * sum_g1, mask=in_planes)


class Sums(NamedTuple):
    """The sums over pixels of :func:`eval_backward`, float32 [B, C]."""

    g1: Tensor  # Σ g
    gc: Tensor  # Σ g (u − center), or Σ g u without a center
    center: Tensor | None


def eval_backward(
    grad: Tensor,
    other_grad: Tensor | None,
    d_mean: Tensor | None,
    u: Tensor | None,
    relu_mask: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    config: Mapping[str, int],
    *,
    slope: Tensor | None = None,
    residual: bool = False,
    sums: bool = False,
    centered: bool = False,
    out: tuple[Tensor, Tensor | None, Sums | None] | None = None,
) -> tuple[Tensor, Tensor | None, Sums | None]:
    """∂u = g · scale, ∂residual = g, and the sums of g and g u over pixels.

    g is ``grad`` + ``other_grad`` + ``d_mean`` / HW where the ReLU passed, and 0 elsewhere; or that sum times
    ``slope``.

    Args:
        grad, other_grad: gradients of y [B, C, H, W], of one dtype and layout; the second may be None.
        d_mean: contiguous float32 [B, C], the gradient of y's mean over pixels, or None.
        u: like the gradients; None if neither ``sums`` nor ``shift`` is given.
        relu_mask: y, or the mask that ``apply`` writes, bool or packed, of the same layout; None without an
            activation or with ``shift``.
        scale: contiguous float32 [B, C]; None for 1.
        shift: contiguous float32 [B, C] where y = relu(u · scale + shift), without a residual: the mask is
            then computed from u. Otherwise None.
        config: launch parameters ``tile``, ``inner``, ``steps``, ``warps``.
        slope: what ``apply`` writes for activations other than the ReLU, of the same layout; else None.
        residual: whether ∂residual is requested.
        sums: whether the sums are requested.
        centered: whether they are returned about a center, which keeps more digits, else about 0.
        out: tensors to write to.

    Returns:
        ∂u, ∂residual or None, and :class:`Sums` or None.
    """
    packed = is_packed(relu_mask)
    grid = launch_grid(shape_of(grad), in_eights(config) if packed else config, steps=True)
    if out is None:
        tables = Sums(table_like(grad), table_like(grad), table_like(grad) if centered else None)
        d_residual = torch.empty_like(grad) if residual else None
        out = torch.empty_like(grad), d_residual, tables if sums else None
    d_u, d_residual, result = out
    parts: tuple[Tensor | None, ...] = (None, None, None)
    split = result is not None and grid.splits > 1
    if split:
        tickets = torch.zeros(grid.programs // grid.splits, dtype=torch.int32, device=grad.device)
        parts = (table_like(grad, grid.splits), table_like(grad, grid.splits), tickets)
    block_s = min(power_of_two(grid.splits), max(1, _COMBINE_TILE // int(grid.constants["BLOCK_M"])))
    launch(
        eval_backward_kernel, grid.programs,
        d_u, d_residual, *((None, None, None) if result is None else result), *parts,
        grad, other_grad, d_mean, u, as_bytes(relu_mask), slope, scale, shift, *grid.sizes,
        warps=config["warps"], PACKED=packed, BLOCK_S=block_s if split else 1,
        COMBINE_STEPS=-(-grid.splits // block_s) if split else 1, **grid.constants,
    )  # fmt: skip
    return out


# --- ahead-of-time compilation


def cases(table: Table) -> Iterator[Case]:
    """The pass with and without its options at every shipped set of launch parameters."""
    for key, config in table.items():
        op, *rest = key.split("@")[0].split("/")
        if op != OP:
            continue
        dtypes = [d for d in ("float32", "bfloat16", "float16") if d in rest] or ["float32", "bfloat16"]
        for dtype in dtypes:
            for name, size in SHAPES.items():
                yield from _cases_of(key, dtype, "channels_last" in rest, name, size, config)


def _cases_of(
    key: str, dtype: str, last: bool, name: str, size: tuple[int, ...], config: Mapping[str, int]
) -> Iterator[Case]:
    layout = torch.channels_last if last else torch.contiguous_format
    u = torch.empty(size, dtype=getattr(torch, dtype), device="meta", memory_format=layout)
    mask = torch.empty(size, dtype=torch.bool, device="meta", memory_format=layout)
    c = torch.empty(size[:2], device="meta")
    calls: dict[str, Callable[[], object]] = {  # the first is compiled for every shape
        " join residual mask": lambda: eval_backward(
            u, u, c, u, mask, c, None, config, residual=True, sums=True
        ),
        " from u": lambda: eval_backward(u, None, None, u, None, c, c, config, sums=True),
        " layer": lambda: eval_backward(u, None, None, u, u, c, None, config, sums=True, centered=True),
        " static mask": lambda: eval_backward(u, None, None, None, mask, c, None, config),
        " join residual slope": lambda: eval_backward(
            u, u, c, u, None, c, None, config, slope=u, residual=True, sums=True
        ),
    }
    bits = packed_mask(u) if u.element_size() == 2 else None  # frozen networks pack no others
    if bits is not None:
        calls[" join folded"] = lambda: eval_backward(u, u, c, None, u, None, None, config)
        calls[" join residual packed mask"] = lambda: eval_backward(
            u, u, c, u, bits, c, None, config, residual=True, sums=True
        )
        calls[" static packed mask"] = lambda: eval_backward(u, None, None, None, bits, c, None, config)
    quick = name == "64@32²" and dtype == "bfloat16"
    for number, (options, run) in enumerate(calls.items()):
        if number == 0 or name == "64@32²":
            yield Case(f"{key} {dtype} {name}{options}", run, quick=quick and number < 2)

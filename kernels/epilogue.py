"""Shared parts of the convolution kernels: the problem, and the epilogue of a tile in registers.

The epilogue is either the layer's affine map, y = act(u · scale + shift + residual), or the statistics of u:
each tile writes the mean and the centered sum of squares of its pixels, and ``combine`` merges the tiles of a
sample by Chan's update. There are no atomics, so the same call gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activated
from .launch import launch, power_of_two


class Image(NamedTuple):
    """The size of one sample."""

    channels: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width


class Problem(NamedTuple):
    """The operation and the shape of one convolution."""

    operation: str  # "apply", "statistics" or "dgrad", the gradient of the input
    dtype: torch.dtype
    precision: str  # of float32's products on tensor cores: "ieee" or "tf32"
    channels_last: bool
    batch: int
    c_in: int
    c_out: int
    groups: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)

    @property
    def input(self) -> Image:
        return Image(self.c_in, *self.size)

    @property
    def output(self) -> Image:
        sizes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * pad - by * (taps - 1) - 1) // step + 1 for n, taps, step, pad, by in sizes)
        return Image(self.c_out, height, width)

    @property
    def dgrad(self) -> bool:
        return self.operation == "dgrad"

    @property
    def reads(self) -> Image:
        """The image that the kernel reads: the input, or ∂u."""
        return self.output if self.dgrad else self.input

    @property
    def writes(self) -> Image:
        return self.input if self.dgrad else self.output


class Epilogue(NamedTuple):
    """The tensors of ``finish`` in its order; None for those that a call does not use."""

    u: Tensor | None
    y: Tensor | None = None
    mask: Tensor | None = None  # bytes of a ReLU, or the slope of another activation
    residual: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    m2: Tensor | None = None


@triton.jit
def finish(
    acc,  # [BLOCK_M, BLOCK_N] float32, a tile of u
    sample_in_tile,  # [BLOCK_M] int32, the sample of each row minus first_sample
    pixel,  # [BLOCK_M] int32
    row_in_bounds,  # [BLOCK_M]
    channel,  # [BLOCK_N]
    first_sample,  # int64, the sample of the first row
    part,  # index among the PARTS tiles of the sample (statistics)
    batch,
    u_ptr,  # [B, C, HW] in the images' layout, or None
    y_ptr,  # the same, or None for no affine map
    mask_ptr,  # the same, or None: of a ReLU bytes, 1 where it passed; of another activation its slope
    residual_ptr,  # the same, or None
    scale_ptr,  # [B, C] float32
    shift_ptr,
    mean_ptr,  # [B, PARTS, C] float32, or None for no statistics
    m2_ptr,
    HW: tl.constexpr,
    C: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,  # rows of one sample in a tile: BLOCK_M, or less if several samples share a tile
    SPAN: tl.constexpr,  # a sample may end within a tile and the next one begin (then no statistics)
    ACTIVATION: tl.constexpr,
):
    channel_in_bounds = channel < C
    in_bounds = row_in_bounds[:, None] & channel_in_bounds[None, :]
    start = first_sample * (HW * C)  # a 64-bit offset for the tile, 32-bit offsets within it
    offsets = (sample_in_tile * (HW * C) + pixel * PIXEL_STRIDE)[:, None] + channel[None, :] * CHANNEL_STRIDE
    if u_ptr is not None:
        tl.store(u_ptr + start + offsets, acc.to(u_ptr.dtype.element_ty), mask=in_bounds)
    if y_ptr is not None:
        scale_from = scale_ptr + first_sample * C
        shift_from = shift_ptr + first_sample * C
        if SPAN:
            table_offsets = (sample_in_tile * C)[:, None] + channel[None, :]
            y = acc * tl.load(scale_from + table_offsets, mask=in_bounds, other=0.0)
            y += tl.load(shift_from + table_offsets, mask=in_bounds, other=0.0)
        elif ROWS < BLOCK_M:
            each = tl.arange(0, BLOCK_M // ROWS)
            sample_in_bounds = (first_sample + each < batch)[:, None] & channel_in_bounds[None, :]
            table_offsets = (each * C)[:, None] + channel[None, :]
            scale = tl.load(scale_from + table_offsets, mask=sample_in_bounds, other=0.0)
            shift = tl.load(shift_from + table_offsets, mask=sample_in_bounds, other=0.0)
            by_sample = tl.reshape(acc, [BLOCK_M // ROWS, ROWS, BLOCK_N])
            y = tl.reshape(by_sample * scale[:, None, :] + shift[:, None, :], [BLOCK_M, BLOCK_N])
        else:
            scale = tl.load(scale_from + channel, mask=channel_in_bounds, other=0.0)
            shift = tl.load(shift_from + channel, mask=channel_in_bounds, other=0.0)
            y = acc * scale[None, :] + shift[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + start + offsets, mask=in_bounds, other=0.0).to(tl.float32)
        if ACTIVATION > 1:
            y, slope = activated(y, ACTIVATION)
            if mask_ptr is not None:
                tl.store(mask_ptr + start + offsets, slope.to(mask_ptr.dtype.element_ty), mask=in_bounds)
        elif ACTIVATION == 1:
            y = tl.where(y < 0, 0.0, y)  # NaN passes, as in torch
        tl.store(y_ptr + start + offsets, y.to(y_ptr.dtype.element_ty), mask=in_bounds)
        if ACTIVATION <= 1:  # noqa: SIM102 (two conditions of the compiler)
            if mask_ptr is not None:  # of y as stored
                stored = y.to(y_ptr.dtype.element_ty).to(tl.float32)
                relu_mask = tl.where(stored <= 0, 0, 1).to(tl.uint8)
                tl.store(mask_ptr + start + offsets, relu_mask, mask=in_bounds)
    if mean_ptr is not None:
        SAMPLES: tl.constexpr = BLOCK_M // ROWS
        PARTS: tl.constexpr = (HW + ROWS - 1) // ROWS
        # of u as stored, which is what later passes read
        value = tl.where(row_in_bounds[:, None], acc.to(u_ptr.dtype.element_ty).to(tl.float32), 0.0)
        if SAMPLES == 1:
            count = tl.minimum(HW - part * ROWS, ROWS).to(tl.float32)
            mean = tl.sum(value, 0) / count
            centered = tl.where(row_in_bounds[:, None], value - mean[None, :], 0.0)
            m2 = tl.sum(centered * centered, 0)
            out = (first_sample * PARTS + part) * C + channel
            tl.store(mean_ptr + out, mean, mask=channel_in_bounds)
            tl.store(m2_ptr + out, m2, mask=channel_in_bounds)
        else:
            # HW <= ROWS: each sample is whole in this tile
            by_sample = tl.reshape(value, [SAMPLES, ROWS, BLOCK_N])
            mean = tl.sum(by_sample, 1) / HW
            inside = (tl.arange(0, ROWS) < HW)[None, :, None]
            centered = tl.where(inside, by_sample - mean[:, None, :], 0.0)
            m2 = tl.sum(centered * centered, 1)
            sample = first_sample + tl.arange(0, SAMPLES)
            out = (sample * C)[:, None] + channel[None, :]
            out_in_bounds = (sample < batch)[:, None] & channel_in_bounds[None, :]
            tl.store(mean_ptr + out, mean, mask=out_in_bounds)
            tl.store(m2_ptr + out, m2, mask=out_in_bounds)


@triton.jit
def combine_kernel(
    part_mean_ptr,  # [B, PARTS, C]
    part_m2_ptr,
    mean_ptr,  # [B, C]
    m2_ptr,
    HW: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    PARTS: tl.constexpr = (HW + ROWS - 1) // ROWS
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    sample = tl.program_id(0).to(tl.int64) // BLOCKS_C
    channel = tl.program_id(0) % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_in_bounds = channel < C
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, PARTS, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        count = tl.maximum(tl.minimum(HW - part * ROWS, ROWS), 0).to(tl.float32)[:, None]
        offsets = ((sample * PARTS + part) * C)[:, None] + channel[None, :]
        in_bounds = (part < PARTS)[:, None] & channel_in_bounds[None, :]
        part_mean = tl.load(part_mean_ptr + offsets, mask=in_bounds, other=0.0)
        part_m2 = tl.load(part_m2_ptr + offsets, mask=in_bounds, other=0.0)
        before = first * ROWS * 1.0
        new = tl.sum(count)
        new_mean = tl.sum(part_mean * count, 0) / new
        centered = part_mean - new_mean[None, :]
        new_m2 = tl.sum(part_m2 + count * centered * centered, 0)
        delta = new_mean - mean
        mean += delta * (new / (before + new))
        m2 += new_m2 + delta * delta * (before * new / (before + new))
    tl.store(mean_ptr + sample * C + channel, mean, mask=channel_in_bounds)
    tl.store(m2_ptr + sample * C + channel, m2, mask=channel_in_bounds)


def new_tensor(
    shape: Sequence[int], like: Tensor, dtype: torch.dtype = torch.float32, **layout: Any
) -> Tensor:
    """A tensor for a kernel to fill, on the device of ``like``."""
    return torch.empty(shape, dtype=dtype, device=like.device, **layout)


def combine(part_mean: Tensor, part_m2: Tensor, hw: int, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and M2 [B, C] of samples of ``hw`` pixels from those of their tiles of ``rows``, [B, PARTS, C]."""
    batch, parts, channels = part_mean.shape
    if parts == 1:
        return part_mean[:, 0], part_m2[:, 0]
    mean, m2 = (new_tensor((batch, channels), part_mean) for _ in range(2))
    block_c = min(64, power_of_two(channels))
    launch(
        combine_kernel, batch * triton.cdiv(channels, block_c), part_mean, part_m2, mean, m2,
        HW=hw, C=channels, ROWS=rows, BLOCK_PARTS=min(32, power_of_two(parts)), BLOCK_C=block_c,
        warps=4, stages=1,
    )  # fmt: skip
    return mean, m2

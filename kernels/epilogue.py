"""What the convolutions have in common: the problem, and what becomes of a finished tile in the registers.

Either the layer's affine map, y = act(u · scale + shift + residual), or the statistics of u: each tile writes
the mean and the centred sum of squares of its own pixels, and ``combine`` joins the tiles of a sample by
Chan's update. Nothing is added atomically, so the same call gives the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    """What a convolution kernel is to do for a layer of this shape."""

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
        """What the kernel reads beside the weight: the input, or ∂u."""
        return self.output if self.dgrad else self.input

    @property
    def writes(self) -> Image:
        return self.input if self.dgrad else self.output


class Epilogue(NamedTuple):
    """What ``finish`` writes and reads, in its order; None for what a call does without."""

    u: Tensor | None
    y: Tensor | None = None
    mask: Tensor | None = None
    residual: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    m2: Tensor | None = None


@triton.jit
def finish(
    acc,  # [BLOCK_M, BLOCK_N] float32, a tile of u
    nearby,  # [BLOCK_M] int32, the row's sample, counted from first_sample
    pixel,  # [BLOCK_M] int32
    row_ok,  # [BLOCK_M]
    channel,  # [BLOCK_N]
    first_sample,  # int64, the sample of the tile's first row
    part,  # which of its sample's PARTS tiles this is (statistics)
    batch,
    u_ptr,  # [B, C, HW] in the images' layout, or None
    y_ptr,  # the same, or None for no affine map
    mask_ptr,  # the same in bytes, or None: 1 where the activation passed
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
    ROWS: tl.constexpr,  # rows of one sample in a tile: BLOCK_M, or a part of it where samples share a tile
    SPAN: tl.constexpr,  # rows run on from sample to sample (then no statistics)
    RELU: tl.constexpr,
):
    channel_ok = channel < C
    ok = row_ok[:, None] & channel_ok[None, :]
    start = first_sample * (HW * C)  # 64 bits for the tile's place, 32 within it
    at = (nearby * (HW * C) + pixel * PIXEL_STRIDE)[:, None] + channel[None, :] * CHANNEL_STRIDE
    if u_ptr is not None:
        tl.store(u_ptr + start + at, acc.to(u_ptr.dtype.element_ty), mask=ok)
    if y_ptr is not None:
        scale_from = scale_ptr + first_sample * C
        shift_from = shift_ptr + first_sample * C
        if SPAN:
            own = (nearby * C)[:, None] + channel[None, :]
            y = acc * tl.load(scale_from + own, mask=ok, other=0.0)
            y += tl.load(shift_from + own, mask=ok, other=0.0)
        elif ROWS < BLOCK_M:
            each = tl.arange(0, BLOCK_M // ROWS)
            each_ok = (first_sample + each < batch)[:, None] & channel_ok[None, :]
            own = (each * C)[:, None] + channel[None, :]
            scale = tl.load(scale_from + own, mask=each_ok, other=0.0)
            shift = tl.load(shift_from + own, mask=each_ok, other=0.0)
            apart = tl.reshape(acc, [BLOCK_M // ROWS, ROWS, BLOCK_N])
            y = tl.reshape(apart * scale[:, None, :] + shift[:, None, :], [BLOCK_M, BLOCK_N])
        else:
            scale = tl.load(scale_from + channel, mask=channel_ok, other=0.0)
            shift = tl.load(shift_from + channel, mask=channel_ok, other=0.0)
            y = acc * scale[None, :] + shift[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + start + at, mask=ok, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y < 0, 0.0, y)  # as torch's, this keeps NaN
        tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), mask=ok)
        if mask_ptr is not None:  # of y as it is stored
            stored = y.to(y_ptr.dtype.element_ty).to(tl.float32)
            tl.store(mask_ptr + start + at, tl.where(stored <= 0, 0, 1).to(tl.uint8), mask=ok)
    if mean_ptr is not None:
        SAMPLES: tl.constexpr = BLOCK_M // ROWS
        PARTS: tl.constexpr = (HW + ROWS - 1) // ROWS
        # of u as it is stored, so that they agree with what later passes read
        value = tl.where(row_ok[:, None], acc.to(u_ptr.dtype.element_ty).to(tl.float32), 0.0)
        if SAMPLES == 1:
            count = tl.minimum(HW - part * ROWS, ROWS).to(tl.float32)
            mean = tl.sum(value, 0) / count
            centred = tl.where(row_ok[:, None], value - mean[None, :], 0.0)
            m2 = tl.sum(centred * centred, 0)
            out = (first_sample * PARTS + part) * C + channel
            tl.store(mean_ptr + out, mean, mask=channel_ok)
            tl.store(m2_ptr + out, m2, mask=channel_ok)
        else:
            # HW <= ROWS: each sample is whole in this tile
            apart = tl.reshape(value, [SAMPLES, ROWS, BLOCK_N])
            mean = tl.sum(apart, 1) / HW
            inside = (tl.arange(0, ROWS) < HW)[None, :, None]
            centred = tl.where(inside, apart - mean[:, None, :], 0.0)
            m2 = tl.sum(centred * centred, 1)
            own_sample = first_sample + tl.arange(0, SAMPLES)
            out = (own_sample * C)[:, None] + channel[None, :]
            out_ok = (own_sample < batch)[:, None] & channel_ok[None, :]
            tl.store(mean_ptr + out, mean, mask=out_ok)
            tl.store(m2_ptr + out, m2, mask=out_ok)


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
    channel_ok = channel < C
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, PARTS, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        count = tl.maximum(tl.minimum(HW - part * ROWS, ROWS), 0).to(tl.float32)[:, None]
        at = ((sample * PARTS + part) * C)[:, None] + channel[None, :]
        ok = (part < PARTS)[:, None] & channel_ok[None, :]
        means = tl.load(part_mean_ptr + at, mask=ok, other=0.0)
        m2s = tl.load(part_m2_ptr + at, mask=ok, other=0.0)
        before = first * ROWS * 1.0
        new = tl.sum(count)
        new_mean = tl.sum(means * count, 0) / new
        apart = means - new_mean[None, :]
        new_m2 = tl.sum(m2s + count * apart * apart, 0)
        delta = new_mean - mean
        mean += delta * (new / (before + new))
        m2 += new_m2 + delta * delta * (before * new / (before + new))
    tl.store(mean_ptr + sample * C + channel, mean, mask=channel_ok)
    tl.store(m2_ptr + sample * C + channel, m2, mask=channel_ok)


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

"""Tiles of images [B, C, H, W]: planes, offsets, grids, and masks of one bit per element.

:mod:`awnet.kernels.passes` describes planes and tiles.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import power_of_two

_ENOUGH_PROGRAMS = 512  # about four per multiprocessor of a large GPU


# --- device functions


@triton.jit
def planes_of(row, num_planes, channels, hw, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr):
    """The planes of a row of tiles, which are in bounds, and the offsets of their first pixels."""
    if CHANNELS_LAST:
        rows_per_sample = tl.cdiv(channels, BLOCK_M)
        sample = (row // rows_per_sample).to(tl.int64)
        channel = (row % rows_per_sample) * BLOCK_M + tl.arange(0, BLOCK_M)
        plane = sample * channels + channel
        in_planes = channel < channels
        start = sample * hw * channels + channel
    else:
        plane = row.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_planes = plane < num_planes
        start = plane * hw
    return plane, in_planes, start


@triton.jit
def tile_offsets(
    start, in_planes, first_pixel, channels, hw, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Offsets [BLOCK_M, BLOCK_P] of the pixels from ``first_pixel``, and which are in bounds."""
    pixel = first_pixel + tl.arange(0, BLOCK_P)
    if CHANNELS_LAST:
        offsets = start[:, None] + (pixel * channels)[None, :]
    else:
        offsets = start[:, None] + pixel[None, :]
    return offsets, in_planes[:, None] & (pixel < hw)[None, :]


@triton.jit
def tile_of_program(
    num_planes, channels, hw, splits,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The planes of a program that computes one tile, and the offsets of the tile."""
    pid = tl.program_id(0)
    plane, in_planes, start = planes_of(pid // splits, num_planes, channels, hw, CHANNELS_LAST, BLOCK_M)
    first_pixel = (pid % splits).to(tl.int64) * BLOCK_P
    offsets, in_bounds = tile_offsets(start, in_planes, first_pixel, channels, hw, CHANNELS_LAST, BLOCK_P)
    return plane, in_planes, offsets, in_bounds


@triton.jit
def planes_of_program(num_planes, channels, hw, splits, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr):
    """The planes of a program that loops over tiles, their offsets, and the index of its split."""
    pid = tl.program_id(0)
    plane, in_planes, start = planes_of(pid // splits, num_planes, channels, hw, CHANNELS_LAST, BLOCK_M)
    return plane, in_planes, start, (pid % splits).to(tl.int64)


@triton.jit
def load_values(ptr, offsets, in_bounds):
    return tl.load(ptr + offsets, mask=in_bounds, other=0.0).to(tl.float32)


@triton.jit
def load_planes(ptr, plane, in_planes):
    """One coefficient per plane, [BLOCK_M, 1]."""
    return tl.load(ptr + plane, mask=in_planes, other=0.0)[:, None]


@triton.jit
def store_values(ptr, offsets, values, in_bounds):
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=in_bounds)


@triton.jit
def packed_offsets(
    row, first_pixel, num_planes, channels, hw,
    CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile's packed mask, which is an image of bytes with an eighth of the contiguous axis."""
    if CHANNELS_LAST:
        _, in_planes, start = planes_of(row, num_planes // 8, channels // 8, hw, True, BLOCK_M // 8)
        offsets, in_bounds = tile_offsets(start, in_planes, first_pixel, channels // 8, hw, True, BLOCK_P)
    else:
        _, in_planes, start = planes_of(row, num_planes, channels, hw // 8, False, BLOCK_M)
        offsets, in_bounds = tile_offsets(
            start, in_planes, first_pixel // 8, channels, hw // 8, False, BLOCK_P // 8
        )
    return offsets, in_bounds


@triton.jit
def packed(bits, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    """Eight 0 or 1 [BLOCK_M, BLOCK_P] along the contiguous axis as one byte, the first in its lowest bit."""
    if CHANNELS_LAST:
        eights = tl.reshape(bits, [BLOCK_M // 8, 8, BLOCK_P])
        result = tl.sum(eights << tl.arange(0, 8)[None, :, None], 1)
    else:
        eights = tl.reshape(bits, [BLOCK_M, BLOCK_P // 8, 8])
        result = tl.sum(eights << tl.arange(0, 8)[None, None, :], 2)
    return result.to(tl.uint8)


@triton.jit
def unpacked(mask, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    """The bits of :func:`packed`, [BLOCK_M, BLOCK_P]."""
    if CHANNELS_LAST:
        bits = (mask.to(tl.int32)[:, None, :] >> tl.arange(0, 8)[None, :, None]) & 1
    else:
        bits = (mask.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, [BLOCK_M, BLOCK_P])


# --- launches


class Shape(NamedTuple):
    """The shape and layout of a dense image tensor."""

    batch: int
    channels: int
    hw: int
    channels_last: bool

    @property
    def planes(self) -> int:
        return self.batch * self.channels


def shape_of(u: Tensor) -> Shape:
    """The shape of ``u`` [B, C, H, W]; ValueError if it is dense in neither layout."""
    batch, channels, height, width = u.shape
    if not u.is_contiguous() and not u.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"u must be contiguous or channels_last, got strides {u.stride()}")
    return Shape(batch, channels, height * width, not u.is_contiguous())


@dataclass(frozen=True)
class Grid:
    """Tiles over a shape: ``splits`` programs for each row of tiles, ``programs`` in all."""

    shape: Shape
    programs: int
    splits: int
    constants: dict[str, int | bool]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The kernels' arguments num_planes, channels, hw, splits."""
        return self.shape.planes, self.shape.channels, self.shape.hw, self.splits


def launch_grid(shape: Shape, config: Mapping[str, int], steps: bool = False) -> Grid:
    """Tiles of at most ``tile`` elements, at most ``inner`` along the contiguous axis.

    With ``steps`` a program loops over up to ``config["steps"]`` tiles of pixels, fewer if there would be too
    few programs to fill a GPU.
    """
    return _grid(shape, config["tile"], config["inner"], config["steps"] if steps else 0)


@functools.lru_cache(maxsize=1024)
def _grid(shape: Shape, tile: int, inner: int, steps: int) -> Grid:
    if shape.channels_last:
        block_m = min(power_of_two(shape.channels), inner, tile)
        block_p = min(power_of_two(shape.hw), tile // block_m)
        rows = shape.batch * -(-shape.channels // block_m)
    else:
        block_p = min(power_of_two(shape.hw), inner, tile)
        block_m = min(power_of_two(shape.planes), tile // block_p)
        rows = -(-shape.planes // block_m)
    tiles = -(-shape.hw // block_p)
    constants: dict[str, int | bool] = {
        "CHANNELS_LAST": shape.channels_last,
        "BLOCK_M": block_m,
        "BLOCK_P": block_p,
    }
    if steps:
        per_program = min(steps, power_of_two(tiles))
        while per_program > 1 and rows * -(-tiles // per_program) < _ENOUGH_PROGRAMS:
            per_program //= 2
        constants["STEPS"] = per_program
        tiles = -(-tiles // per_program)
    return Grid(shape, rows * tiles, tiles, constants)


# --- masks of one bit per element


def is_packed(mask: Tensor | None) -> bool:
    """Whether a mask is one of :func:`packed_mask`, not y or a bool tensor."""
    return mask is not None and mask.dtype == torch.uint8


def packed_mask(u: Tensor) -> Tensor | None:
    """An uninitialized mask of one bit per element of ``u`` [B, C, H, W], uint8 [B·C·H·W / 8].

    The bits are in the order of ``u``'s memory. None if the size of the contiguous axis (channels in
    channels_last, pixels in NCHW) is not a multiple of 8.
    """
    shape = shape_of(u)
    if (shape.channels if shape.channels_last else shape.hw) % 8:
        return None
    return torch.empty(u.numel() // 8, dtype=torch.uint8, device=u.device)


def in_eights(config: Mapping[str, int]) -> dict[str, int]:
    """``config`` with tiles of at least 8 elements along the contiguous axis."""
    return {**config, "inner": max(config["inner"], 8), "tile": max(config["tile"], 8)}

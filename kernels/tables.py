"""Shared parts of the kernels on ``[B, C]`` tables: tiles and device functions.

The host functions take the records of :mod:`awnet.ops.coefficients` (Norm, Mix, SampleStats and so on); this
package does not import them, as it imports nothing from ``awnet.ops``.

All tables are contiguous float32. Affine parameters have K rows and statistics S rows, each 1 or 2: row 0
adversarial, row 1 clean. A tile holds ``BLOCK_B`` samples and ``BLOCK_C`` channels. Sums over samples run in
a fixed order, and a sample never enters the sum of the other row, not even as NaN · 0.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, power_of_two

Config = Mapping[str, int]


# --- device functions


@triton.jit
def load_row(table_ptr, row, c, channels):
    """One row of a [rows, C] table at the channels ``c``: [BLOCK_C]."""
    return tl.load(table_ptr + row * channels + c, mask=c < channels, other=0.0)


@triton.jit
def store_rows(table_ptr, row_0, row_1, c, channels, ROWS: tl.constexpr):
    tl.store(table_ptr + c, row_0, mask=c < channels)
    if ROWS == 2:
        tl.store(table_ptr + channels + c, row_1, mask=c < channels)


@triton.jit
def inverse_std(var, eps):
    return tl.rsqrt(var + eps)


@triton.jit
def tile_offsets(b, c, batch, channels):
    """Offsets [BLOCK_B, BLOCK_C] into a [B, C] table, and which are in bounds."""
    offsets = b[:, None] * channels + c[None, :]
    return offsets, (b < batch)[:, None] & (c < channels)[None, :]


@triton.jit
def tile_of_program(channels, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """The samples and channels of this program in a grid of tiles."""
    pid = tl.program_id(0)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    b = (pid // blocks_c).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    return b, (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def scaled(x, filter_scale_ptr, offsets, in_bounds):
    """x · filter_scale, or x without a filter scale."""
    if filter_scale_ptr is not None:
        x = x * tl.load(filter_scale_ptr + offsets, mask=in_bounds, other=0.0)
    return x


@triton.jit
def load_is_clean(is_clean_ptr, b, batch):
    """[BLOCK_B, 1]; False everywhere, which selects row 0, where the tables have one row."""
    if is_clean_ptr is not None:
        is_clean = tl.load(is_clean_ptr + b, mask=b < batch, other=0) != 0
    else:
        is_clean = b < 0
    return is_clean[:, None]


@triton.jit
def load_sample_rows(table_ptr, is_clean, c, channels, ROWS: tl.constexpr):
    """The row of a table that belongs to each sample: [BLOCK_B or 1, BLOCK_C]."""
    row = load_row(table_ptr, 0, c, channels)[None, :]
    if ROWS == 2:
        row = tl.where(is_clean, load_row(table_ptr, 1, c, channels)[None, :], row)
    return row


@triton.jit
def add_by_row(sum_0, sum_1, x, is_clean, in_bounds, ROWS: tl.constexpr):
    """Adds x, per element, to the sum of each sample's row; with one row all samples to ``sum_0``."""
    if ROWS == 2:
        sum_0 += tl.where(in_bounds & (is_clean == 0), x, 0.0)
        sum_1 += tl.where(in_bounds & is_clean, x, 0.0)
    else:
        sum_0 += tl.where(in_bounds, x, 0.0)
    return sum_0, sum_1


@triton.jit
def reduce_rows(sum_0, sum_1, ROWS: tl.constexpr):
    """The sums over the samples of what :func:`add_by_row` added; with one row, the same sum twice."""
    row_0 = tl.sum(sum_0, 0)
    if ROWS == 2:
        row_1 = tl.sum(sum_1, 0)
    else:
        row_1 = row_0
    return row_0, row_1


# --- launches


def block_sizes(batch: int, channels: int, config: Config) -> tuple[int, int]:
    """BLOCK_B and BLOCK_C."""
    block_c = min(power_of_two(channels), config["inner"])
    return min(power_of_two(batch), max(1, config["tile"] // block_c)), block_c


def launch_tiles(
    kernel: object, batch: int, channels: int, config: Config, *arguments: object, **constants: int
) -> None:
    """Launches one program for each tile of samples and channels."""
    block_b, block_c = block_sizes(batch, channels, config)
    launch(
        kernel, -(-batch // block_b) * -(-channels // block_c), *arguments,
        BLOCK_B=block_b, BLOCK_C=block_c, warps=config["warps"], **constants,
    )  # fmt: skip


def launch_channels(
    kernel: object, batch: int, channels: int, config: Config, *arguments: object, **constants: int
) -> None:
    """Launches one program for each block of channels; it loops over all samples."""
    block_b, block_c = block_sizes(batch, channels, config)
    launch(
        kernel, -(-channels // block_c), *arguments,
        BLOCK_B=block_b, BLOCK_C=block_c, STEPS=power_of_two(-(-batch // block_b)), warps=config["warps"],
        **constants,
    )  # fmt: skip


def constants_of(norm: Any) -> dict[str, int]:
    """The kernels' constants K and S: the rows of the affine parameters and of the statistics."""
    return {"K": norm.weight.shape[0], "S": norm.mean.shape[0]}


def tables_of(norm: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, bias, mean, var, in the order of the kernels' arguments."""
    return norm.weight, norm.bias, norm.mean, norm.var


def meta_norm(rows: int, channels: int) -> Any:
    """Tables on the meta device, for ahead-of-time compilation."""
    table = torch.empty(rows, channels, device="meta")
    return SimpleNamespace(weight=table, bias=table, mean=table, var=table, eps=1e-5)


def as_bytes(x: Tensor | None) -> Tensor | None:
    """A bool tensor as bytes, which is what kernels read; other tensors unchanged."""
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x

"""Direct convolution for groups > 1, depthwise included, with the layer's work in its epilogue.

Such a convolution is bound by memory: each program computes a tile of pixels × channels of one sample by
plain multiply-adds, in either layout (channels_last reads runs of channels, NCHW runs of pixels), and the
affine map or the statistics cost no further pass. The gradient of the input is the same kernel,
``TRANSPOSED``, for any stride. kernels/fused_conv.py calls it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import Epilogue, Problem, finish
from .launch import launch, power_of_two

NAME = "grouped_conv"


class Tile(NamedTuple):
    """The launch parameters of one grouped convolution."""

    pixels: int
    channels: int
    warps: int


def key(problem: Problem) -> str:
    """The table's key; its entry has the fields of :class:`Tile`, and ``least_batch``, from which it wins."""
    layout = "channels_last" if problem.channels_last else "nchw"
    name = str(problem.dtype).removeprefix("torch.")
    shape = f"{problem.c_in}x{problem.c_out}g{problem.groups}/{problem.size[0]}x{problem.size[1]}"
    (kh, kw), (sh, sw) = problem.kernel, problem.stride
    return f"grouped_conv/{problem.operation}/{layout}/{name}/{shape}/k{kh}x{kw}s{sh}x{sw}"


def read_key(key: str) -> Problem:
    """The problem of 32 samples that ``key`` is about, padded by half the kernel."""
    _, operation, layout, name, channels, size, taps = key.split("/")
    c_in, c_out, groups = map(int, channels.replace("g", "x").split("x"))
    height, width = map(int, size.split("x"))
    kh, kw, sh, sw = map(int, taps[1:].replace("s", "x").split("x"))
    return Problem(
        operation, getattr(torch, name), "ieee", layout == "channels_last", 32, c_in, c_out, groups,
        (height, width), (kh, kw), (sh, sw), (kh // 2, kw // 2),
    )  # fmt: skip


def default_tile(problem: Problem) -> Tile:
    """A tile that is safe on any shape; tuning finds better ones."""
    channels = power_of_two(problem.writes.channels)
    pixels = max(16, power_of_two(problem.writes.pixels))
    if problem.channels_last:
        across = min(64, channels)
        return Tile(min(1024 // across, pixels), across, 4)
    along = min(1024, pixels)
    return Tile(along, min(1024 // along, channels), 4)


@triton.jit
def grouped_conv_kernel(
    x_ptr,  # [B, C_IN, H, W], channels_last or NCHW
    weight_ptr,
    u_ptr,  # outputs and their companions: see finish
    y_ptr,
    mask_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    m2_ptr,
    batch,
    weight_out,  # strides of the weight
    weight_in,
    weight_row,
    weight_column,
    C_IN: tl.constexpr,  # channels of x and of the result: for TRANSPOSED, of ∂u and of ∂input
    C_OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    HW: tl.constexpr = OH * OW
    PARTS: tl.constexpr = (HW + BLOCK_P - 1) // BLOCK_P
    BLOCKS_C: tl.constexpr = (C_OUT + BLOCK_C - 1) // BLOCK_C
    READ: tl.constexpr = C_IN // GROUPS  # channels of x that a channel of the result reads
    OWN: tl.constexpr = C_OUT // GROUPS
    X_CHANNEL: tl.constexpr = 1 if CHANNELS_LAST else H * W
    X_PIXEL: tl.constexpr = C_IN if CHANNELS_LAST else 1
    CHANNEL_STRIDE: tl.constexpr = 1 if CHANNELS_LAST else HW
    PIXEL_STRIDE: tl.constexpr = C_OUT if CHANNELS_LAST else 1

    program = tl.program_id(0).to(tl.int64)
    channel = (program % BLOCKS_C).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = program // BLOCKS_C
    part = (tile % PARTS).to(tl.int32)
    sample = tile // PARTS
    row = tl.arange(0, BLOCK_P)
    pixel = part * BLOCK_P + row
    row_ok = pixel < HW
    channel_ok = channel < C_OUT
    y = pixel // OW
    x = pixel % OW
    x_sample = x_ptr + sample * (C_IN * H * W)
    source = channel // OWN * READ  # the first channel of the group
    if TRANSPOSED:  # the weight is [C_IN, OWN, KH, KW]
        weight = weight_ptr + source * weight_out + channel % OWN * weight_in
        weight_read = weight_out
    else:  # [C_OUT, READ, KH, KW]
        weight = weight_ptr + channel * weight_out
        weight_read = weight_in

    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i in range(KH):
        for j in tl.static_range(KW):
            if TRANSPOSED:
                down = y + PADDING_H - i * DILATION_H
                across = x + PADDING_W - j * DILATION_W
                # negative ones must not reach the division, which rounds towards zero
                inside = row_ok & (down >= 0) & (across >= 0)
                inside = inside & (down % STRIDE_H == 0) & (across % STRIDE_W == 0)
                down = down // STRIDE_H
                across = across // STRIDE_W
                inside = inside & (down < H) & (across < W)
            else:
                down = y * STRIDE_H - PADDING_H + i * DILATION_H
                across = x * STRIDE_W - PADDING_W + j * DILATION_W
                inside = row_ok & (down >= 0) & (down < H) & (across >= 0) & (across < W)
            at = ((down * W + across) * X_PIXEL)[:, None] + (source * X_CHANNEL)[None, :]
            ok = inside[:, None] & channel_ok[None, :]
            tap = weight + (i * weight_row + j * weight_column)
            for read in range(READ):
                value = tl.load(x_sample + (at + read * X_CHANNEL), mask=ok, other=0.0).to(tl.float32)
                factor = tl.load(tap + read * weight_read, mask=channel_ok, other=0.0).to(tl.float32)
                acc += value * factor[None, :]
    finish(
        acc,
        tl.zeros([BLOCK_P], tl.int32),
        pixel,
        row_ok,
        channel,
        sample,
        part,
        batch,
        u_ptr,
        y_ptr,
        mask_ptr,
        residual_ptr,
        scale_ptr,
        shift_ptr,
        mean_ptr,
        m2_ptr,
        HW,
        C_OUT,
        CHANNEL_STRIDE,
        PIXEL_STRIDE,
        BLOCK_P,
        BLOCK_C,
        BLOCK_P,
        False,
        RELU,
    )


def rows(problem: Problem, tile: Tile) -> int:
    """How many rows of a tile are one sample's: all."""
    return tile.pixels


def keeps_mask(problem: Problem, tile: Tile) -> bool:
    """Whether there are registers for a mask too."""
    return True


def run(problem: Problem, tile: Tile, x: Tensor, weight: Tensor, epilogue: Epilogue, relu: bool) -> None:
    """Convolves ``x`` and fills what ``epilogue`` holds."""
    reads, writes = problem.reads, problem.writes
    programs = (
        problem.batch * triton.cdiv(writes.pixels, tile.pixels) * triton.cdiv(writes.channels, tile.channels)
    )
    launch(
        grouped_conv_kernel, programs,
        x, weight, *epilogue, problem.batch, *weight.stride(),
        C_IN=reads.channels, C_OUT=writes.channels, GROUPS=problem.groups, H=reads.height, W=reads.width,
        OH=writes.height, OW=writes.width, KH=problem.kernel[0], KW=problem.kernel[1],
        STRIDE_H=problem.stride[0], STRIDE_W=problem.stride[1],
        PADDING_H=problem.padding[0], PADDING_W=problem.padding[1],
        DILATION_H=problem.dilation[0], DILATION_W=problem.dilation[1],
        TRANSPOSED=problem.dgrad, CHANNELS_LAST=problem.channels_last, RELU=relu,
        BLOCK_P=tile.pixels, BLOCK_C=tile.channels, warps=tile.warps, stages=1,
    )  # fmt: skip


def refusal(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> str | None:
    """Why this kernel cannot convolve ``x`` [B, C_in, H, W] with ``weight``; None if it can."""
    if max(weight.shape[2:]) > 7:
        return f"it does kernels up to 7×7 (got {weight.shape[2]}×{weight.shape[3]})"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"it does float32, bfloat16 and float16, one for both (got {x.dtype} and {weight.dtype})"
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return "the input is neither contiguous nor channels_last"
    if x.numel() == 0:
        return "the input is empty"
    reach = [size + 2 * pad for size, pad in zip(x.shape[2:], padding, strict=True)]
    if max(x.shape[1], weight.shape[0]) * reach[0] * reach[1] >= 2**31 or weight.numel() >= 2**31:
        return "one sample or the weight has 2^31 values or more"
    return None


def dgrad_refusal(problem: Problem) -> str | None:
    """What else is in the way of the gradient of the input."""
    reach = [size + 2 * pad for size, pad in zip(problem.size, problem.padding, strict=True)]
    if problem.c_in * reach[0] * reach[1] >= 2**31:
        return "one sample of the gradient has 2^31 values or more"
    return None


# what the default tiles must compile for: depthwise in both layouts, small images, 7×7 strided, plain groups
_SHIPPED = (
    *(
        f"grouped_conv/{operation}/{layout}/{dtype}/64x64g64/32x32/k3x3s1x1"
        for operation in ("apply", "statistics", "dgrad")
        for layout in ("channels_last", "nchw")
        for dtype in ("bfloat16", "float32")
    ),
    "grouped_conv/apply/channels_last/float16/64x64g64/32x32/k3x3s1x1",
    "grouped_conv/apply/channels_last/bfloat16/512x512g512/4x4/k3x3s1x1",
    "grouped_conv/statistics/channels_last/bfloat16/96x96g96/56x56/k7x7s1x1",
    "grouped_conv/dgrad/channels_last/bfloat16/96x96g96/56x56/k7x7s2x2",
    "grouped_conv/apply/channels_last/bfloat16/128x128g32/16x16/k3x3s1x1",
    "grouped_conv/dgrad/nchw/bfloat16/128x128g32/16x16/k3x3s2x2",
)
QUICK = _SHIPPED[:1]


def shipped() -> Iterator[tuple[str, Problem, Tile]]:
    """What kernels/ahead.py compiles, by name: the default tiles."""
    for name in _SHIPPED:
        problem = read_key(name)
        yield name, problem, default_tile(problem)

"""Direct convolution for groups > 1, depthwise included, with the layer's work in its epilogue.

Such a convolution is memory-bound. Each program computes a tile of pixels × channels of one sample by plain
multiply-adds, in either layout, and the affine map or the statistics need no further pass. The gradient of
the input is the same kernel, ``TRANSPOSED``, for any stride. kernels/fused_conv.py calls it.
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
    """Key of the launch table; an entry holds the fields of :class:`Tile` and ``least_batch``."""
    layout = "channels_last" if problem.channels_last else "nchw"
    name = str(problem.dtype).removeprefix("torch.")
    shape = f"{problem.c_in}x{problem.c_out}g{problem.groups}/{problem.size[0]}x{problem.size[1]}"
    (kh, kw), (sh, sw) = problem.kernel, problem.stride
    return f"grouped_conv/{problem.operation}/{layout}/{name}/{shape}/k{kh}x{kw}s{sh}x{sw}"


def read_key(key: str) -> Problem:
    """The problem that ``key`` describes, with 32 samples and half the kernel as padding."""
    _, operation, layout, name, channels, size, taps = key.split("/")
    c_in, c_out, groups = map(int, channels.replace("g", "x").split("x"))
    height, width = map(int, size.split("x"))
    kh, kw, sh, sw = map(int, taps[1:].replace("s", "x").split("x"))
    return Problem(
        operation, getattr(torch, name), "ieee", layout == "channels_last", 32, c_in, c_out, groups,
        (height, width), (kh, kw), (sh, sw), (kh // 2, kw // 2),
    )  # fmt: skip


def default_tile(problem: Problem) -> Tile:
    """A tile that works for every shape; tuning finds faster ones."""
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
    weight_ptr,  # [KH, KW, GROUP_IN, GROUPS, GROUP_OUT] in the strides below
    u_ptr,  # from here to m2_ptr: see finish
    y_ptr,
    mask_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    m2_ptr,
    batch,
    weight_row,
    weight_column,
    weight_in,
    weight_group,
    weight_out,
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
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    HW: tl.constexpr = OH * OW
    PARTS: tl.constexpr = (HW + BLOCK_P - 1) // BLOCK_P
    BLOCKS_C: tl.constexpr = (C_OUT + BLOCK_C - 1) // BLOCK_C
    GROUP_IN: tl.constexpr = C_IN // GROUPS
    GROUP_OUT: tl.constexpr = C_OUT // GROUPS
    X_CHANNEL: tl.constexpr = 1 if CHANNELS_LAST else H * W
    X_PIXEL: tl.constexpr = C_IN if CHANNELS_LAST else 1
    CHANNEL_STRIDE: tl.constexpr = 1 if CHANNELS_LAST else HW
    PIXEL_STRIDE: tl.constexpr = C_OUT if CHANNELS_LAST else 1

    pid = tl.program_id(0).to(tl.int64)
    channel = (pid % BLOCKS_C).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = pid // BLOCKS_C
    part = (tile % PARTS).to(tl.int32)
    sample = tile // PARTS
    row = tl.arange(0, BLOCK_P)
    pixel = part * BLOCK_P + row
    row_in_bounds = pixel < HW
    channel_in_bounds = channel < C_OUT
    y = pixel // OW
    x = pixel % OW
    x_sample = x_ptr + sample * (C_IN * H * W)
    first_in = channel // GROUP_OUT * GROUP_IN  # first input channel of the group
    weight = weight_ptr + channel // GROUP_OUT * weight_group + channel % GROUP_OUT * weight_out

    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i in range(KH):
        for j in tl.static_range(KW):
            if TRANSPOSED:
                in_y = y + PADDING_H - i * DILATION_H
                in_x = x + PADDING_W - j * DILATION_W
                # checked here, since the division rounds negative values toward zero
                inside = row_in_bounds & (in_y >= 0) & (in_x >= 0)
                inside = inside & (in_y % STRIDE_H == 0) & (in_x % STRIDE_W == 0)
                in_y = in_y // STRIDE_H
                in_x = in_x // STRIDE_W
                inside = inside & (in_y < H) & (in_x < W)
            else:
                in_y = y * STRIDE_H - PADDING_H + i * DILATION_H
                in_x = x * STRIDE_W - PADDING_W + j * DILATION_W
                inside = row_in_bounds & (in_y >= 0) & (in_y < H) & (in_x >= 0) & (in_x < W)
            offsets = ((in_y * W + in_x) * X_PIXEL)[:, None] + (first_in * X_CHANNEL)[None, :]
            in_bounds = inside[:, None] & channel_in_bounds[None, :]
            tap = weight + (i * weight_row + j * weight_column)
            for i_in in range(GROUP_IN):
                value = tl.load(x_sample + (offsets + i_in * X_CHANNEL), mask=in_bounds, other=0.0)
                factor = tl.load(tap + i_in * weight_in, mask=channel_in_bounds, other=0.0)
                acc += value.to(tl.float32) * factor.to(tl.float32)[None, :]
    finish(
        acc, tl.zeros([BLOCK_P], tl.int32), pixel, row_in_bounds, channel, sample, part, batch,
        u_ptr, y_ptr, mask_ptr, residual_ptr, scale_ptr, shift_ptr, mean_ptr, m2_ptr,
        HW, C_OUT, CHANNEL_STRIDE, PIXEL_STRIDE, BLOCK_P, BLOCK_C, BLOCK_P, False, ACTIVATION,
    )  # fmt: skip


def rows(problem: Problem, tile: Tile) -> int:
    """Rows of one sample in a tile."""
    return tile.pixels


def keeps_mask(problem: Problem, tile: Tile) -> bool:
    """Whether the epilogue can write a mask or slope."""
    return True


def kernel_weight(problem: Problem, weight: Tensor) -> Tensor:
    """``weight`` as [k_h, k_w, in, groups, out], where in and out are channels of a group, read and written.

    For channels_last it is a contiguous copy: the channels of a tap are then adjacent, like those of a pixel,
    and a thread loads its channels as one vector. For NCHW it is a view: a thread has few channels.
    """
    split = weight.unflatten(0, (problem.groups, -1))  # groups, out, in, k_h, k_w of the convolution
    read, written = (1, 2) if problem.dgrad else (2, 1)
    view = split.permute(3, 4, read, 0, written)
    return view.contiguous() if problem.channels_last else view


def run(problem: Problem, tile: Tile, x: Tensor, weight: Tensor, epilogue: Epilogue, activation: int) -> None:
    """Convolves ``x`` and writes the outputs of ``epilogue``."""
    reads, writes = problem.reads, problem.writes
    programs = (
        problem.batch * triton.cdiv(writes.pixels, tile.pixels) * triton.cdiv(writes.channels, tile.channels)
    )
    weight = kernel_weight(problem, weight)
    launch(
        grouped_conv_kernel, programs,
        x, weight, *epilogue, problem.batch, *weight.stride(),
        C_IN=reads.channels, C_OUT=writes.channels, GROUPS=problem.groups, H=reads.height, W=reads.width,
        OH=writes.height, OW=writes.width, KH=problem.kernel[0], KW=problem.kernel[1],
        STRIDE_H=problem.stride[0], STRIDE_W=problem.stride[1],
        PADDING_H=problem.padding[0], PADDING_W=problem.padding[1],
        DILATION_H=problem.dilation[0], DILATION_W=problem.dilation[1],
        TRANSPOSED=problem.dgrad, CHANNELS_LAST=problem.channels_last, ACTIVATION=activation,
        BLOCK_P=tile.pixels, BLOCK_C=tile.channels, warps=tile.warps, stages=1,
    )  # fmt: skip


def not_supported(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> str | None:
    """Why this kernel cannot convolve ``x`` [B, C_in, H, W] with ``weight``; None if it can."""
    if max(weight.shape[2:]) > 7:
        return f"it supports kernels up to 7×7 (got {weight.shape[2]}×{weight.shape[3]})"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return (
            f"it supports float32, bfloat16 and float16, the same for both (got {x.dtype} and {weight.dtype})"
        )
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return "the input is neither contiguous nor channels_last"
    if x.numel() == 0:
        return "the input is empty"
    reach = [size + 2 * pad for size, pad in zip(x.shape[2:], padding, strict=True)]
    if max(x.shape[1], weight.shape[0]) * reach[0] * reach[1] >= 2**31 or weight.numel() >= 2**31:
        return "one sample or the weight has 2^31 values or more"
    return None


def dgrad_not_supported(problem: Problem) -> str | None:
    """Why this kernel cannot compute the gradient of the input; None if it can."""
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

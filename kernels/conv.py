"""Implicit-GEMM convolution for groups = 1 in channels_last, with the layer's work in its epilogue.

Rows of the product are output pixels, columns output channels, and the contraction runs over taps and input
channels, so no patch matrix is ever written. float32 accumulation, int64 addresses, no atomics. The gradient
of the input, for stride 1, is the convolution of ∂u with the weight turned by 180 degrees and transposed,
which the kernel reads in that order: nothing is copied. kernels/fused_conv.py calls it.
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

NAME = "conv"


class Tile(NamedTuple):
    """The launch parameters of one convolution."""

    block_m: int  # output pixels
    block_n: int  # output channels
    block_k: int  # input channels of one tap
    warps: int
    stages: int
    swap_ab: int = 0  # 1: weights on the M side of the tensor cores' product


def key(problem: Problem) -> str:
    """The table's key; its entry has the fields of :class:`Tile`, and ``least_batch``, from which it wins."""
    name = "tfloat32" if problem.precision == "tf32" else str(problem.dtype).removeprefix("torch.")
    channels, size = f"{problem.c_in}x{problem.c_out}", f"{problem.size[0]}x{problem.size[1]}"
    return f"conv/{problem.operation}/{name}/{channels}/{size}/k{problem.kernel[0]}s{problem.stride[0]}"


def read_key(key: str) -> Problem:
    """The problem of 32 samples that ``key`` is about, padded by half the kernel."""
    _, operation, name, channels, size, taps = key.split("/")
    c_in, c_out = map(int, channels.split("x"))
    height, width = map(int, size.split("x"))
    kernel, stride = int(taps[1]), int(taps[3:])
    precision = "tf32" if name == "tfloat32" else "ieee"
    dtype = torch.float32 if precision == "tf32" else getattr(torch, name)
    return Problem(
        operation, dtype, precision, True, 32, c_in, c_out, 1, (height, width),
        (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2),
    )  # fmt: skip


def default_tile(problem: Problem) -> Tile:
    """A tile that is safe on any shape; tuning finds better ones."""
    deepest = max(16, power_of_two(problem.reads.channels))
    if problem.dtype != torch.float32:
        block_k = min(64, deepest)
        if problem.writes.channels <= 64:
            return Tile(128, 64, block_k, 4, 3)
        return Tile(128, 128, block_k, 8, 3)
    if problem.precision == "tf32":
        return Tile(64, 64, min(32, deepest), 4, 3)
    return Tile(64, 64, 16, 8, 2)


@triton.jit
def conv_kernel(
    x_ptr,  # [B, H, W, C_IN] in memory
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
    weight_out,  # strides of the weight by output channel, input channel and tap
    weight_in,
    weight_tap,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    K: tl.constexpr,  # taps along a side
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLIP: tl.constexpr,  # taps in reverse: the gradient of the input
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    SWAP_AB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    HW: tl.constexpr = OH * OW
    BLOCKS_N: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    BLOCKS_K: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    TAPS: tl.constexpr = K * K

    # neighbours share the pixels, the larger operand
    program = tl.program_id(0).to(tl.int64)
    tile = program // BLOCKS_N
    channel = (program % BLOCKS_N).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    if SPAN:
        part = 0
        first_sample = tile * BLOCK_M // HW
        run = (tile * BLOCK_M % HW).to(tl.int32) + row
        nearby = run // HW
        pixel = run % HW
    else:
        PARTS: tl.constexpr = (HW + ROWS - 1) // ROWS
        part = (tile % PARTS).to(tl.int32)
        first_sample = tile // PARTS * (BLOCK_M // ROWS)
        nearby = row // ROWS
        pixel = part * ROWS + row % ROWS
    row_ok = (first_sample + nearby < batch) & (pixel < HW)

    top = pixel // OW * STRIDE - PADDING
    left = pixel % OW * STRIDE - PADDING
    # 64 bits for the tile's place, 32 within it; a row's first tap may lie in the padding
    x_from = x_ptr + first_sample * (H * W * C_IN)
    x_row = (nearby * (H * W) + top * W + left) * C_IN
    weight_column = channel * weight_out
    if SWAP_AB:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(TAPS * BLOCKS_K):
        tap = step % TAPS  # taps innermost: they read the same pixels
        depth = step // TAPS * BLOCK_K + tl.arange(0, BLOCK_K)
        i = tap // K
        j = tap % K
        inside = row_ok & (top + i >= 0) & (top + i < H) & (left + j >= 0) & (left + j < W)
        x_ok = inside[:, None]
        weight_ok = (channel < C_OUT)[None, :]
        if C_IN % BLOCK_K != 0:
            x_ok = x_ok & (depth < C_IN)[None, :]
            weight_ok = weight_ok & (depth < C_IN)[:, None]
        x_at = x_row[:, None] + ((i * W + j) * C_IN + depth)[None, :]
        x = tl.load(x_from + x_at, mask=x_ok, other=0.0)
        weight_tap_at = tap
        if FLIP:
            weight_tap_at = TAPS - 1 - tap
        weight_at = weight_column[None, :] + (depth * weight_in + weight_tap_at * weight_tap)[:, None]
        weight = tl.load(weight_ptr + weight_at, mask=weight_ok, other=0.0)
        if SWAP_AB:
            acc = tl.dot(tl.trans(weight), tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    if SWAP_AB:
        acc = tl.trans(acc)
    finish(
        acc,
        nearby,
        pixel,
        row_ok,
        channel,
        first_sample,
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
        1,
        C_OUT,
        BLOCK_M,
        BLOCK_N,
        ROWS,
        SPAN,
        RELU,
    )


def _spans(problem: Problem, tile: Tile) -> bool:
    """Whether rows run on from sample to sample, where no tile is whole samples and no sample whole tiles.

    Not so in statistics, where no sum may mix samples: the last rows of a tile stay empty instead.
    """
    hw = problem.writes.pixels
    return problem.operation != "statistics" and hw % tile.block_m != 0 and tile.block_m % hw != 0


def rows(problem: Problem, tile: Tile) -> int:
    """How many rows of a tile are one sample's."""
    if _spans(problem, tile):
        return tile.block_m
    return min(tile.block_m, power_of_two(problem.writes.pixels))


def keeps_mask(problem: Problem, tile: Tile) -> bool:
    """Whether there are registers for a mask too: where rows run on from sample to sample there are not."""
    return not _spans(problem, tile)


def run(problem: Problem, tile: Tile, x: Tensor, weight: Tensor, epilogue: Epilogue, relu: bool) -> None:
    """Convolves ``x`` and fills what ``epilogue`` holds."""
    reads, writes, (taps, _) = problem.reads, problem.writes, problem.kernel
    spans, own_rows = _spans(problem, tile), rows(problem, tile)
    if spans:
        tiles = triton.cdiv(problem.batch * writes.pixels, tile.block_m)
    else:
        samples = tile.block_m // own_rows
        tiles = triton.cdiv(problem.batch, samples) * triton.cdiv(writes.pixels, own_rows)
    by_out, by_in, by_tap = weight.stride(0), weight.stride(1), weight.stride(3)
    if problem.dgrad:
        by_out, by_in = by_in, by_out
    launch(
        conv_kernel, tiles * triton.cdiv(writes.channels, tile.block_n),
        x, weight, *epilogue, problem.batch, by_out, by_in, by_tap,
        C_IN=reads.channels, C_OUT=writes.channels, H=reads.height, W=reads.width,
        OH=writes.height, OW=writes.width, K=taps, STRIDE=problem.stride[0],
        PADDING=taps - 1 - problem.padding[0] if problem.dgrad else problem.padding[0],
        FLIP=problem.dgrad, SPAN=spans, ROWS=own_rows, RELU=relu, PRECISION=problem.precision,
        SWAP_AB=tile.swap_ab, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def refusal(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> str | None:
    """Why this kernel cannot convolve ``x`` [B, C_in, H, W] with ``weight``; None if it can."""
    kernel = tuple(weight.shape[2:])
    if kernel not in ((1, 1), (3, 3)):
        return f"it does 1×1 and 3×3 kernels (got {kernel[0]}×{kernel[1]})"
    if tuple(stride) not in ((1, 1), (2, 2)) or tuple(padding) not in ((0, 0), (1, 1)):
        return f"it does stride 1 and 2 and padding 0 and 1 (got {tuple(stride)}, {tuple(padding)})"
    if tuple(dilation) != (1, 1):
        return f"it has no dilation (got {tuple(dilation)})"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"it does float32, bfloat16 and float16, one for both (got {x.dtype} and {weight.dtype})"
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return "it does channels_last only"
    if weight.stride(2) != 3 * weight.stride(3) and kernel == (3, 3):
        return "the weight's taps are not evenly strided"
    if x.numel() == 0:
        return "the input is empty"
    if max(x[0].numel(), x.shape[2] * x.shape[3] * weight.shape[0], weight.numel()) >= 2**30:
        return "one sample or the weight has 2^30 values or more"
    if max(weight.shape[:2]) >= 2**17:
        return "it has 2^17 channels or more"
    return None


def dgrad_refusal(problem: Problem) -> str | None:
    """What else is in the way of the gradient of the input."""
    if problem.stride != (1, 1):
        return f"its gradient of the input is for stride 1 (got {problem.stride})"
    if problem.input.pixels * problem.c_in >= 2**30:
        return "one sample of the gradient has 2^30 values or more"
    return None


# what the default tiles must compile for: ResNet-18's stages, a strided convolution, a shortcut, a stem
_SHIPPED = (
    *(
        f"conv/{operation}/{dtype}/{shape}/k3s1"
        for dtype in ("bfloat16", "tfloat32", "float32")
        for shape in ("64x64/32x32", "512x512/4x4")
        for operation in ("apply", "statistics", "dgrad")
    ),
    "conv/apply/float16/64x64/32x32/k3s1",
    "conv/apply/bfloat16/128x128/16x16/k3s1",
    "conv/apply/bfloat16/256x256/8x8/k3s1",
    "conv/apply/bfloat16/512x512/7x7/k3s1",
    "conv/apply/tfloat32/512x512/7x7/k3s1",
    "conv/statistics/bfloat16/512x512/7x7/k3s1",
    "conv/apply/bfloat16/64x128/32x32/k3s2",
    "conv/statistics/bfloat16/64x128/32x32/k1s2",
    "conv/apply/bfloat16/3x64/32x32/k3s1",
)
QUICK = (_SHIPPED[0], _SHIPPED[4])


def shipped() -> Iterator[tuple[str, Problem, Tile]]:
    """What kernels/ahead.py compiles, by name: the default tiles, some also swapped."""
    for name in _SHIPPED:
        problem = read_key(name)
        tile = default_tile(problem)
        yield name, problem, tile
        if problem.dtype == torch.bfloat16 and problem.c_in == problem.c_out:
            yield f"{name} swap_ab", problem, tile._replace(swap_ab=1)

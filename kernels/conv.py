"""Implicit-GEMM convolution for groups = 1 in channels_last, with the layer's work in its epilogue.

Rows of the product are output pixels, columns output channels, and the contraction runs over taps and input
channels, so no patch matrix is written. Accumulation is in float32, offsets are int64, and there are no
atomics. The gradient of the input, for stride 1, is the convolution of ∂u with the weight rotated by 180
degrees and transposed; the kernel reads the weight in that order without a copy. kernels/fused_conv.py calls
it.
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
    """Key of the launch table; an entry holds the fields of :class:`Tile` and ``least_batch``."""
    name = "tfloat32" if problem.precision == "tf32" else str(problem.dtype).removeprefix("torch.")
    channels, size = f"{problem.c_in}x{problem.c_out}", f"{problem.size[0]}x{problem.size[1]}"
    return f"conv/{problem.operation}/{name}/{channels}/{size}/k{problem.kernel[0]}s{problem.stride[0]}"


def read_key(key: str) -> Problem:
    """The problem that ``key`` describes, with 32 samples and half the kernel as padding."""
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
    """A tile that works for every shape; tuning finds faster ones."""
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
    u_ptr,  # from here to m2_ptr: see finish
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
    FLIP: tl.constexpr,  # reverses the taps, for the gradient of the input
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
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

    # adjacent programs share the pixels, the larger operand
    pid = tl.program_id(0).to(tl.int64)
    tile = pid // BLOCKS_N
    channel = (pid % BLOCKS_N).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    if SPAN:
        part = 0
        first_sample = tile * BLOCK_M // HW
        run = (tile * BLOCK_M % HW).to(tl.int32) + row
        sample_in_tile = run // HW
        pixel = run % HW
    else:
        PARTS: tl.constexpr = (HW + ROWS - 1) // ROWS
        part = (tile % PARTS).to(tl.int32)
        first_sample = tile // PARTS * (BLOCK_M // ROWS)
        sample_in_tile = row // ROWS
        pixel = part * ROWS + row % ROWS
    row_in_bounds = (first_sample + sample_in_tile < batch) & (pixel < HW)

    top = pixel // OW * STRIDE - PADDING
    left = pixel % OW * STRIDE - PADDING
    # a 64-bit offset for the tile, 32-bit offsets within it; a row's first tap may be in the padding
    x_from = x_ptr + first_sample * (H * W * C_IN)
    x_row = (sample_in_tile * (H * W) + top * W + left) * C_IN
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
        inside = row_in_bounds & (top + i >= 0) & (top + i < H) & (left + j >= 0) & (left + j < W)
        x_in_bounds = inside[:, None]
        weight_in_bounds = (channel < C_OUT)[None, :]
        if C_IN % BLOCK_K != 0:
            x_in_bounds = x_in_bounds & (depth < C_IN)[None, :]
            weight_in_bounds = weight_in_bounds & (depth < C_IN)[:, None]
        x_offsets = x_row[:, None] + ((i * W + j) * C_IN + depth)[None, :]
        x = tl.load(x_from + x_offsets, mask=x_in_bounds, other=0.0)
        flipped_tap = tap
        if FLIP:
            flipped_tap = TAPS - 1 - tap
        weight_offsets = weight_column[None, :] + (depth * weight_in + flipped_tap * weight_tap)[:, None]
        weight = tl.load(weight_ptr + weight_offsets, mask=weight_in_bounds, other=0.0)
        if SWAP_AB:
            acc = tl.dot(tl.trans(weight), tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    if SWAP_AB:
        acc = tl.trans(acc)
    finish(
        acc, sample_in_tile, pixel, row_in_bounds, channel, first_sample, part, batch,
        u_ptr, y_ptr, mask_ptr, residual_ptr, scale_ptr, shift_ptr, mean_ptr, m2_ptr,
        HW, C_OUT, 1, C_OUT, BLOCK_M, BLOCK_N, ROWS, SPAN, ACTIVATION,
    )  # fmt: skip


def _spans(problem: Problem, tile: Tile) -> bool:
    """Whether a tile may contain the end of one sample and the start of the next.

    True unless samples divide a tile or tiles divide a sample. Never for statistics, whose sums must not mix
    samples: there the last rows of a tile are empty.
    """
    hw = problem.writes.pixels
    return problem.operation != "statistics" and hw % tile.block_m != 0 and tile.block_m % hw != 0


def rows(problem: Problem, tile: Tile) -> int:
    """Rows of one sample in a tile."""
    if _spans(problem, tile):
        return tile.block_m
    return min(tile.block_m, power_of_two(problem.writes.pixels))


def keeps_mask(problem: Problem, tile: Tile) -> bool:
    """Whether the epilogue can write a mask or slope; with samples that end within a tile it would spill."""
    return not _spans(problem, tile)


def run(problem: Problem, tile: Tile, x: Tensor, weight: Tensor, epilogue: Epilogue, activation: int) -> None:
    """Convolves ``x`` and writes the outputs of ``epilogue``."""
    reads, writes, (taps, _) = problem.reads, problem.writes, problem.kernel
    spans, tile_rows = _spans(problem, tile), rows(problem, tile)
    if spans:
        tiles = triton.cdiv(problem.batch * writes.pixels, tile.block_m)
    else:
        samples = tile.block_m // tile_rows
        tiles = triton.cdiv(problem.batch, samples) * triton.cdiv(writes.pixels, tile_rows)
    by_out, by_in, by_tap = weight.stride(0), weight.stride(1), weight.stride(3)
    if problem.dgrad:
        by_out, by_in = by_in, by_out
    launch(
        conv_kernel, tiles * triton.cdiv(writes.channels, tile.block_n),
        x, weight, *epilogue, problem.batch, by_out, by_in, by_tap,
        C_IN=reads.channels, C_OUT=writes.channels, H=reads.height, W=reads.width,
        OH=writes.height, OW=writes.width, K=taps, STRIDE=problem.stride[0],
        PADDING=taps - 1 - problem.padding[0] if problem.dgrad else problem.padding[0],
        FLIP=problem.dgrad, SPAN=spans, ROWS=tile_rows, ACTIVATION=activation, PRECISION=problem.precision,
        SWAP_AB=tile.swap_ab, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def not_supported(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> str | None:
    """Why this kernel cannot convolve ``x`` [B, C_in, H, W] with ``weight``; None if it can."""
    kernel = tuple(weight.shape[2:])
    if kernel not in ((1, 1), (3, 3)):
        return f"it supports 1×1 and 3×3 kernels (got {kernel[0]}×{kernel[1]})"
    if tuple(stride) not in ((1, 1), (2, 2)) or tuple(padding) not in ((0, 0), (1, 1)):
        return f"it supports stride 1 and 2 and padding 0 and 1 (got {tuple(stride)}, {tuple(padding)})"
    if tuple(dilation) != (1, 1):
        return f"it does not support dilation (got {tuple(dilation)})"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return (
            f"it supports float32, bfloat16 and float16, the same for both (got {x.dtype} and {weight.dtype})"
        )
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return "it supports channels_last only"
    if weight.stride(2) != 3 * weight.stride(3) and kernel == (3, 3):
        return "the weight's taps are not evenly strided"
    if x.numel() == 0:
        return "the input is empty"
    if max(x[0].numel(), x.shape[2] * x.shape[3] * weight.shape[0], weight.numel()) >= 2**30:
        return "one sample or the weight has 2^30 values or more"
    if max(weight.shape[:2]) >= 2**17:
        return "it has 2^17 channels or more"
    return None


def dgrad_not_supported(problem: Problem) -> str | None:
    """Why this kernel cannot compute the gradient of the input; None if it can."""
    if problem.stride != (1, 1):
        return f"its gradient of the input is for stride 1 (got {problem.stride})"
    if problem.input.pixels * problem.c_in >= 2**30:
        return "one sample of the gradient has 2^30 values or more"
    return None


# the cases that kernels/ahead.py compiles with default tiles: ResNet-18's stages, a strided convolution, a
# shortcut, a stem
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

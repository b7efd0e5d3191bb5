"""Implicit-GEMM convolution for groups = 1 in channels_last, with the layer's work in its epilogue.

Rows of the product are output pixels, columns output channels, and the contraction runs over taps and input
channels, so no patch matrix is ever written. float32 accumulation, int64 addresses, no atomics.

The library's convolution is the default everywhere: a function here returns None unless a measured table says
that this kernel wins for the case, or ``force`` is set.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import combine, finish, new_tensor
from .launch import Case, Table, launch, power_of_two


class Tile(NamedTuple):
    """The launch parameters of one convolution."""

    block_m: int  # output pixels
    block_n: int  # output channels
    block_k: int  # input channels of one tap
    warps: int
    stages: int
    swap_ab: int = 0  # 1: weights on the M side of the tensor cores' product


def key(
    operation: str,
    dtype: torch.dtype,
    precision: str,
    c_in: int,
    c_out: int,
    size: tuple[int, int],
    kernel: int,
    stride: int,
) -> str:
    """The table's key for apply, statistics or dgrad of a layer with ``c_in``, ``c_out`` and input ``size``.

    Its entry has the fields of :class:`Tile`, and ``least_batch``, the batch from which the kernel wins.
    """
    name = "tfloat32" if precision == "tf32" and dtype == torch.float32 else str(dtype).removeprefix("torch.")
    return f"conv/{operation}/{name}/{c_in}x{c_out}/{size[0]}x{size[1]}/k{kernel}s{stride}"


def default_tile(dtype: torch.dtype, precision: str, c_in: int, c_out: int) -> Tile:
    """A tile that is safe on any shape; tuning finds better ones."""
    if dtype != torch.float32:
        block_k = min(64, max(16, power_of_two(c_in)))
        return Tile(128, 64, block_k, 4, 3) if c_out <= 64 else Tile(128, 128, block_k, 8, 3)
    if precision == "tf32":
        return Tile(64, 64, min(32, max(16, power_of_two(c_in))), 4, 3)
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


class Problem(NamedTuple):
    """One product of the kernel; for dgrad, input and output are exchanged."""

    batch: int
    c_in: int
    c_out: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: int
    stride: int
    padding: int
    flip: bool

    @property
    def hw(self) -> int:
        return self.out_size[0] * self.out_size[1]


def constants(problem: Problem, tile: Tile, statistics: bool, relu: bool, precision: str) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    hw = problem.hw
    # samples whole in a tile or tiles whole in a sample; else rows run on, except in statistics, where no sum
    # may mix samples and the last rows of a tile stay empty instead
    span = not statistics and hw % tile.block_m != 0 and tile.block_m % hw != 0
    return {
        "C_IN": problem.c_in,
        "C_OUT": problem.c_out,
        "H": problem.size[0],
        "W": problem.size[1],
        "OH": problem.out_size[0],
        "OW": problem.out_size[1],
        "K": problem.kernel,
        "STRIDE": problem.stride,
        "PADDING": problem.padding,
        "FLIP": problem.flip,
        "SPAN": span,
        "ROWS": tile.block_m if span else min(tile.block_m, power_of_two(hw)),
        "RELU": relu,
        "PRECISION": precision,
        "SWAP_AB": tile.swap_ab,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }


def _launch(
    problem: Problem,
    tile: Tile,
    precision: str,
    x: Tensor,
    weight: Tensor,
    *,
    u: Tensor | None,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
    m2: Tensor | None = None,
    relu: bool = False,
) -> None:
    fixed = constants(problem, tile, mean is not None, relu, precision)
    if fixed["SPAN"]:
        tiles = triton.cdiv(problem.batch * problem.hw, tile.block_m)
    else:
        samples = tile.block_m // fixed["ROWS"]
        tiles = triton.cdiv(problem.batch, samples) * triton.cdiv(problem.hw, fixed["ROWS"])
    by_out, by_in, by_tap = weight.stride(0), weight.stride(1), weight.stride(3)
    if problem.flip:
        by_out, by_in = by_in, by_out
    launch(
        conv_kernel, tiles * triton.cdiv(problem.c_out, tile.block_n),
        x, weight, u, y, mask, residual, scale, shift, mean, m2, problem.batch, by_out, by_in, by_tap,
        **fixed, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def refusal(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """Why this kernel cannot convolve ``x`` [B, C_in, H, W] with ``weight``; None if it can."""
    kernel = tuple(weight.shape[2:])
    if groups != 1:
        return f"it has no groups (got {groups})"
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


def _problem(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Problem:
    c_out, c_in, kernel, _ = weight.shape
    height, width = ((size + 2 * padding[0] - kernel) // stride[0] + 1 for size in x.shape[2:])
    size = (x.shape[2], x.shape[3])
    return Problem(len(x), c_in, c_out, size, (height, width), kernel, stride[0], padding[0], False)


def _tile(operation: str, x: Tensor, of: Problem, precision: str, table: Table, force: bool) -> Tile | None:
    c_in, c_out, size = of.c_in, of.c_out, of.size
    if of.flip:
        c_in, c_out, size = c_out, c_in, of.out_size
    entry = table.get(key(operation, x.dtype, precision, c_in, c_out, size, of.kernel, of.stride))
    if entry is not None and (force or of.batch >= entry["least_batch"]):
        return _tile_of(entry)
    return default_tile(x.dtype, precision, of.c_in, of.c_out) if force else None


def _tile_of(entry: Mapping[str, int]) -> Tile:
    return Tile(**{name: entry[name] for name in Tile._fields})


def _output(problem: Problem, like: Tensor) -> Tensor:
    shape = (problem.batch, problem.c_out, *problem.out_size)
    layout = torch.channels_last
    return new_tensor(shape, like, like.dtype, memory_format=layout)


def fused_apply(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    keep_u: bool,
    keep_mask: bool = False,
    *,
    table: Table | None = None,
    precision: str = "ieee",
    force: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """y = act(conv(input, weight) · scale + shift + residual); u = conv(input, weight) if ``keep_u``; and the
    bool mask of where the activation passed if ``keep_mask``.

    ``input`` [B, C_in, H, W] channels_last; ``scale``, ``shift`` [B, C_out] float32, contiguous; ``residual``
    and the results [B, C_out, H', W'] channels_last; u and mask are empty where they are not kept.
    ``precision`` is "ieee" or "tf32", for float32 only. None where the kernel cannot run the call (see
    :func:`refusal`) or ``table`` does not say that it wins; ``force`` takes it all the same, and ``tile``
    with these parameters.
    """
    if refusal(input, weight, stride, padding, dilation, groups) is not None:
        return None
    if residual is not None and not (
        residual.dtype == input.dtype and residual.is_contiguous(memory_format=torch.channels_last)
    ):
        return None
    problem = _problem(input, weight, stride, padding)
    tile = tile or _tile("apply", input, problem, precision, table or {}, force)
    if tile is None:
        return None
    if keep_mask and constants(problem, tile, False, relu, precision)["SPAN"]:
        return None  # where rows run on from sample to sample, a mask too is more than the registers hold
    y = _output(problem, input)
    u = _output(problem, input) if keep_u else None
    mask = torch.empty_like(y, dtype=torch.bool) if keep_mask else None
    _launch(
        problem, tile, precision, input, weight,
        u=u, y=y, mask=None if mask is None else mask.view(torch.uint8), residual=residual,
        scale=scale.contiguous(), shift=shift.contiguous(), relu=relu,
    )  # fmt: skip
    return (
        y,
        input.new_empty(0) if u is None else u,
        input.new_empty(0, dtype=torch.bool) if mask is None else mask,
    )


def fused_statistics(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    table: Table | None = None,
    precision: str = "ieee",
    force: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """u = conv(input, weight) and its per-sample mean and centred sum of squares, [B, C_out] float32.

    Arguments as for :func:`fused_apply`.
    """
    if refusal(input, weight, stride, padding, dilation, groups) is not None:
        return None
    problem = _problem(input, weight, stride, padding)
    tile = tile or _tile("statistics", input, problem, precision, table or {}, force)
    if tile is None:
        return None
    u = _output(problem, input)
    rows = constants(problem, tile, True, False, precision)["ROWS"]
    parts = (problem.batch, triton.cdiv(problem.hw, rows), problem.c_out)
    mean, m2 = (new_tensor(parts, input) for _ in range(2))
    _launch(problem, tile, precision, input, weight, u=u, mean=mean, m2=m2)
    return u, *combine(mean, m2, problem.hw, rows)


def fused_dgrad(
    d_u: Tensor,
    weight: Tensor,
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    table: Table | None = None,
    precision: str = "ieee",
    force: bool = False,
    tile: Tile | None = None,
) -> Tensor | None:
    """The gradient of the convolution's input, [B, C_in, H, W] channels_last, for stride 1.

    It is the convolution of ``d_u`` [B, C_out, H', W'] with the weight turned by 180 degrees and transposed,
    which the kernel reads in that order: nothing is copied.
    """
    if refusal(d_u, weight, stride, padding, dilation, groups) is not None or tuple(stride) != (1, 1):
        return None
    c_out, c_in, kernel, _ = weight.shape
    batch, _, height, width = input_shape
    problem = Problem(
        batch,
        c_out,
        c_in,
        (d_u.shape[2], d_u.shape[3]),
        (height, width),
        kernel,
        1,
        kernel - 1 - padding[0],
        True,
    )
    if problem.hw * c_in >= 2**30:
        return None
    tile = tile or _tile("dgrad", d_u, problem, precision, table or {}, force)
    if tile is None:
        return None
    d_input = _output(problem, d_u)
    _launch(problem, tile, precision, d_u, weight, u=d_input)
    return d_input


def _sample_call(key: str, tile: Tile) -> None:
    """The call that ``key`` is about, with all that an epilogue can take, on the meta device."""
    _, operation, name, channels, size, taps = key.split("/")
    c_in, c_out = map(int, channels.split("x"))
    h, w = map(int, size.split("x"))
    kernel, stride = int(taps[1]), int(taps[3:])
    precision = "tf32" if name == "tfloat32" else "ieee"
    dtype = torch.float32 if precision == "tf32" else getattr(torch, name)

    def image(channels: int, h: int, w: int) -> Tensor:
        made = torch.empty(32, channels, h, w, dtype=dtype, device="meta")
        return made.to(memory_format=torch.channels_last)

    weight = torch.empty(c_out, c_in, kernel, kernel, dtype=dtype, device="meta")
    weight = weight.to(memory_format=torch.channels_last)
    padding = kernel // 2
    where: tuple[Any, Any, Any, int] = ((stride, stride), (padding, padding), (1, 1), 1)
    oh, ow = ((side + 2 * padding - kernel) // stride + 1 for side in (h, w))
    if operation == "apply":
        scale = torch.empty(32, c_out, device="meta")
        residual = image(c_out, oh, ow)
        x = image(c_in, h, w)
        kept = (True, tile.block_m % (oh * ow) == 0 or oh * ow % tile.block_m == 0)
        fused_apply(x, weight, scale, scale, residual, True, *where, *kept, precision=precision, tile=tile)
    elif operation == "statistics":
        fused_statistics(image(c_in, h, w), weight, *where, precision=precision, tile=tile)
    else:
        shape = (32, c_in, h, w)
        fused_dgrad(image(c_out, oh, ow), weight, shape, *where, precision=precision, tile=tile)


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


def cases(table: Table) -> Iterator[Case]:
    """The calls that kernels/ahead.py compiles: the default tiles, each also swapped, and the table's."""
    tiles: list[tuple[str, str, Tile]] = []
    for full in _SHIPPED:
        _, operation, name, channels, _, _ = full.split("/")
        c_in, c_out = map(int, channels.split("x"))
        if operation == "dgrad":
            c_in, c_out = c_out, c_in
        precision = "tf32" if name == "tfloat32" else "ieee"
        dtype = torch.float32 if precision == "tf32" else getattr(torch, name)
        tile = default_tile(dtype, precision, c_in, c_out)
        tiles.append((full, full, tile))
        if name == "bfloat16" and c_in == c_out:
            tiles.append((f"{full} swap_ab", full, tile._replace(swap_ab=1)))
    for full, entry in table.items():
        if full.startswith("conv/"):
            tiles.append((full, full.split("@")[0], _tile_of(entry)))
    for label, full, tile in tiles:
        instruction = "" if "/float32/" in full else "wgmma"
        quick = full in (_SHIPPED[0], _SHIPPED[4]) and not tile.swap_ab
        yield Case(label, partial(_sample_call, full, tile), instruction, quick)

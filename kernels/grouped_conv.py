"""Direct convolution for groups > 1, depthwise included, with the layer's work in its epilogue.

Such a convolution is bound by memory: each program computes a tile of pixels × channels of one sample by
plain multiply-adds, in either layout (channels_last reads runs of channels, NCHW runs of pixels), and the
affine map or the statistics cost no further pass. The gradient of the input is the same
kernel, ``TRANSPOSED``.

The library's convolution is the default: a function here returns None unless a measured table says that this
kernel wins for the case, or ``force`` is set.
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
    """The launch parameters of one grouped convolution."""

    pixels: int
    channels: int
    warps: int


def key(
    operation: str,
    dtype: torch.dtype,
    channels_last: bool,
    c_in: int,
    c_out: int,
    groups: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
) -> str:
    """The table's key for apply, statistics or dgrad of a layer with ``c_in``, ``c_out`` and input ``size``.

    Its entry has the fields of :class:`Tile`, and ``least_batch``, the batch from which the kernel wins.
    """
    layout = "channels_last" if channels_last else "nchw"
    name = str(dtype).removeprefix("torch.")
    taps = f"k{kernel[0]}x{kernel[1]}s{stride[0]}x{stride[1]}"
    return f"grouped_conv/{operation}/{layout}/{name}/{c_in}x{c_out}g{groups}/{size[0]}x{size[1]}/{taps}"


def default_tile(hw: int, channels: int, channels_last: bool) -> Tile:
    """A tile that is safe on any shape; tuning finds better ones."""
    if channels_last:
        across = min(64, power_of_two(channels))
        return Tile(min(1024 // across, max(16, power_of_two(hw))), across, 4)
    along = min(1024, max(16, power_of_two(hw)))
    return Tile(along, min(1024 // along, power_of_two(channels)), 4)


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


class Problem(NamedTuple):
    """One run of the kernel; for dgrad, input and output are exchanged."""

    batch: int
    c_in: int
    c_out: int
    groups: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    transposed: bool
    channels_last: bool

    @property
    def hw(self) -> int:
        return self.out_size[0] * self.out_size[1]


def constants(problem: Problem, tile: Tile, relu: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return {
        "C_IN": problem.c_in,
        "C_OUT": problem.c_out,
        "GROUPS": problem.groups,
        "H": problem.size[0],
        "W": problem.size[1],
        "OH": problem.out_size[0],
        "OW": problem.out_size[1],
        "KH": problem.kernel[0],
        "KW": problem.kernel[1],
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "PADDING_H": problem.padding[0],
        "PADDING_W": problem.padding[1],
        "DILATION_H": problem.dilation[0],
        "DILATION_W": problem.dilation[1],
        "TRANSPOSED": problem.transposed,
        "CHANNELS_LAST": problem.channels_last,
        "RELU": relu,
        "BLOCK_P": tile.pixels,
        "BLOCK_C": tile.channels,
    }


def _launch(
    problem: Problem,
    tile: Tile,
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
    programs = (
        problem.batch * triton.cdiv(problem.hw, tile.pixels) * triton.cdiv(problem.c_out, tile.channels)
    )
    launch(
        grouped_conv_kernel, programs,
        x, weight, u, y, mask, residual, scale, shift, mean, m2, problem.batch, *weight.stride(),
        **constants(problem, tile, relu), warps=tile.warps, stages=1,
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
    if groups == 1:
        return "it is for groups > 1"
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


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second


def _problem(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Problem:
    size, kernel = _pair(x.shape[2:]), _pair(weight.shape[2:])
    reach = [step * (taps - 1) + 1 for step, taps in zip(dilation, kernel, strict=True)]
    height, width = ((size[axis] + 2 * padding[axis] - reach[axis]) // stride[axis] + 1 for axis in range(2))
    return Problem(
        len(x), x.shape[1], len(weight), groups, size, (height, width), kernel,
        _pair(stride), _pair(padding), _pair(dilation), False, not x.is_contiguous(),
    )  # fmt: skip


def _tile(operation: str, x: Tensor, of: Problem, table: Table, force: bool) -> Tile | None:
    c_in, c_out, size = of.c_in, of.c_out, of.size
    if of.transposed:
        c_in, c_out, size = c_out, c_in, of.out_size
    entry = table.get(
        key(operation, x.dtype, of.channels_last, c_in, c_out, of.groups, size, of.kernel, of.stride)
    )
    if entry is not None and (force or of.batch >= entry["least_batch"]):
        return _tile_of(entry)
    return default_tile(of.hw, of.c_out, of.channels_last) if force else None


def _tile_of(entry: Mapping[str, int]) -> Tile:
    return Tile(**{name: entry[name] for name in Tile._fields})


def _output(problem: Problem, like: Tensor) -> Tensor:
    shape = (problem.batch, problem.c_out, *problem.out_size)
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format
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
    force: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """y = act(conv(input, weight) · scale + shift + residual); u = conv(input, weight) if ``keep_u``; and the
    bool mask of where the activation passed if ``keep_mask``.

    ``input`` [B, C_in, H, W] contiguous or channels_last, the results and ``residual`` [B, C_out, H', W']
    laid out alike; ``weight`` [C_out, C_in/groups, k, k]; ``scale``, ``shift`` [B, C_out] float32; u and
    mask are empty where they are not kept. None where the kernel cannot run the call (see :func:`refusal`) or
    ``table`` does not say that it wins; ``force`` takes it all the same, and ``tile`` with these parameters.
    """
    if refusal(input, weight, stride, padding, dilation, groups) is not None:
        return None
    problem = _problem(input, weight, stride, padding, dilation, groups)
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format
    if residual is not None and not (
        residual.dtype == input.dtype and residual.is_contiguous(memory_format=layout)
    ):
        return None
    tile = tile or _tile("apply", input, problem, table or {}, force)
    if tile is None:
        return None
    y = _output(problem, input)
    u = _output(problem, input) if keep_u else None
    mask = torch.empty_like(y, dtype=torch.bool) if keep_mask else None
    _launch(
        problem, tile, input, weight,
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
    force: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """u = conv(input, weight) and its per-sample mean and centred sum of squares, [B, C_out] float32.

    Arguments as for :func:`fused_apply`.
    """
    if refusal(input, weight, stride, padding, dilation, groups) is not None:
        return None
    problem = _problem(input, weight, stride, padding, dilation, groups)
    tile = tile or _tile("statistics", input, problem, table or {}, force)
    if tile is None:
        return None
    u = _output(problem, input)
    parts = (problem.batch, triton.cdiv(problem.hw, tile.pixels), problem.c_out)
    mean, m2 = (new_tensor(parts, input) for _ in range(2))
    _launch(problem, tile, input, weight, u=u, mean=mean, m2=m2)
    return u, *combine(mean, m2, problem.hw, tile.pixels)


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
    force: bool = False,
    tile: Tile | None = None,
) -> Tensor | None:
    """The gradient of the convolution's input, laid out as ``d_u`` [B, C_out, H', W'], for any stride."""
    if refusal(d_u, weight, stride, padding, dilation, groups) is not None:
        return None
    batch, c_in, height, width = input_shape
    reach = (height + 2 * padding[0]) * (width + 2 * padding[1])
    if c_in * reach >= 2**31:
        return None
    problem = Problem(
        batch, len(weight), c_in, groups, _pair(d_u.shape[2:]), (height, width), _pair(weight.shape[2:]),
        _pair(stride), _pair(padding), _pair(dilation), True, not d_u.is_contiguous(),
    )  # fmt: skip
    tile = tile or _tile("dgrad", d_u, problem, table or {}, force)
    if tile is None:
        return None
    d_input = _output(problem, d_u)
    _launch(problem, tile, d_u, weight, u=d_input)
    return d_input


def _sample_call(key: str, tile: Tile | None) -> None:
    """The call that ``key`` is about, with all that an epilogue can take, on the meta device."""
    _, operation, layout, name, channels, size, taps = key.split("/")
    c_in, c_out, groups = map(int, channels.replace("g", "x").split("x"))
    h, w = map(int, size.split("x"))
    kernel, stride = (_pair([int(n) for n in part.split("x")]) for part in taps[1:].split("s"))
    dtype = getattr(torch, name)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def image(channels: int, h: int, w: int) -> Tensor:
        made = torch.empty(32, channels, h, w, dtype=dtype, device="meta")
        return made.to(memory_format=memory_format)

    weight = torch.empty(c_out, c_in // groups, *kernel, dtype=dtype, device="meta")
    padding = (kernel[0] // 2, kernel[1] // 2)
    where: tuple[Any, Any, Any, int] = (stride, padding, (1, 1), groups)
    oh = (h + 2 * padding[0] - kernel[0]) // stride[0] + 1
    ow = (w + 2 * padding[1] - kernel[1]) // stride[1] + 1
    force = tile is None
    if operation == "apply":
        scale = torch.empty(32, c_out, device="meta")
        residual, x = image(c_out, oh, ow), image(c_in, h, w)
        fused_apply(x, weight, scale, scale, residual, True, *where, True, True, tile=tile, force=force)
    elif operation == "statistics":
        fused_statistics(image(c_in, h, w), weight, *where, tile=tile, force=force)
    else:
        fused_dgrad(image(c_out, oh, ow), weight, (32, c_in, h, w), *where, tile=tile, force=force)


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


def cases(table: Table) -> Iterator[Case]:
    """The calls that kernels/ahead.py compiles: the default tiles and the table's."""
    for full in _SHIPPED:
        yield Case(full, partial(_sample_call, full, None), quick=full == _SHIPPED[0])
    for full, entry in table.items():
        if full.startswith("grouped_conv/"):
            yield Case(full, partial(_sample_call, full.split("@")[0], _tile_of(entry)))

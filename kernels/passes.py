"""The layer's passes over [B, C, H, W]: apply, statistics, reduce, propagate.

A *map* is one channel of one sample, B·C in all; every pass works on tiles of [MAPS, PIXELS] with one
coefficient a map. The two layouts differ in addresses alone: NCHW has a map's pixels side by side,
channels_last a pixel's channels, and then a tile stays within one sample. Values are float32 from the load
on, sums too; addresses are int64. Nothing is atomic: where a map's pixels are split over programs, each
leaves its partial result and a second kernel combines them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Case, Table, launch, power_of_two

OPS = ("apply", "statistics", "reduce", "propagate")


# --- kernels


@triton.jit
def _maps(group, total, channels, pixels, LAST: tl.constexpr, MAPS: tl.constexpr):
    """The maps of tile row ``group``: their numbers, which exist, and where the first pixel of each lies."""
    if LAST:
        groups = tl.cdiv(channels, MAPS)
        sample = (group // groups).to(tl.int64)
        channel = (group % groups) * MAPS + tl.arange(0, MAPS)
        maps = sample * channels + channel
        exists = channel < channels
        start = sample * pixels * channels + channel
    else:
        maps = group.to(tl.int64) * MAPS + tl.arange(0, MAPS)
        exists = maps < total
        start = maps * pixels
    return maps, exists, start


@triton.jit
def _places(start, exists, first, channels, pixels, LAST: tl.constexpr, PIXELS: tl.constexpr):
    """Addresses [MAPS, PIXELS] of PIXELS pixels from ``first`` on, and which of them exist."""
    pixel = first + tl.arange(0, PIXELS)
    if LAST:
        places = start[:, None] + (pixel * channels)[None, :]
    else:
        places = start[:, None] + pixel[None, :]
    return places, exists[:, None] & (pixel < pixels)[None, :]


@triton.jit
def _tile(total, channels, pixels, splits, LAST: tl.constexpr, MAPS: tl.constexpr, PIXELS: tl.constexpr):
    """The one tile of a program: its maps, which exist, the tile's addresses, and which of these exist."""
    program = tl.program_id(0)
    maps, exists, start = _maps(program // splits, total, channels, pixels, LAST, MAPS)
    first = (program % splits).to(tl.int64) * PIXELS
    places, mask = _places(start, exists, first, channels, pixels, LAST, PIXELS)
    return maps, exists, places, mask


@triton.jit
def _run_of_tiles(total, channels, pixels, splits, LAST: tl.constexpr, MAPS: tl.constexpr):
    """A program of several tiles: its maps, which exist, their starts, and which of the splits it is."""
    program = tl.program_id(0)
    split = (program % splits).to(tl.int64)
    maps, exists, start = _maps(program // splits, total, channels, pixels, LAST, MAPS)
    return maps, exists, start, split


@triton.jit
def _parts(total, splits, MAPS: tl.constexpr, SPLITS: tl.constexpr):
    """What combines: the maps and which exist, the splits, and the addresses and existence of their parts."""
    maps = tl.program_id(0).to(tl.int64) * MAPS + tl.arange(0, MAPS)
    split = tl.arange(0, SPLITS).to(tl.int64)
    exists = maps < total
    places = split[None, :] * total + maps[:, None]
    return maps, exists, split, places, exists[:, None] & (split < splits)[None, :]


@triton.jit
def _read(pointer, places, mask):
    return tl.load(pointer + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, places, values, mask):
    tl.store(pointer + places, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _read_gated_grad(grad, gate, places, mask):
    """∂L/∂y where the activation passed by ``gate``: y, where NaN lets it pass as in torch, or 0 and 1."""
    g = _read(grad, places, mask)
    if gate is not None:
        g = tl.where(_read(gate, places, mask) <= 0, 0.0, g)
    return g


@triton.jit
def apply_kernel(
    y,
    passed,
    u,
    scale,
    shift,
    residual,
    residual_scale,
    residual_shift,
    total,
    channels,
    pixels,
    splits,
    LAST: tl.constexpr,
    RELU: tl.constexpr,
    MAPS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    maps, exists, places, mask = _tile(total, channels, pixels, splits, LAST, MAPS, PIXELS)
    v = _read(u, places, mask) * _read(scale, maps, exists)[:, None] + _read(shift, maps, exists)[:, None]
    if residual is not None:
        r = _read(residual, places, mask)
        if residual_scale is not None:
            r = (
                r * _read(residual_scale, maps, exists)[:, None]
                + _read(residual_shift, maps, exists)[:, None]
            )
        v += r
    if RELU:
        v = tl.where(v <= 0, 0.0, v)  # NaN passes, as in torch
    _write(y, places, v, mask)
    if passed is not None:  # of y as it is stored
        stored = v.to(y.dtype.element_ty).to(tl.float32)
        tl.store(passed + places, tl.where(stored <= 0, 0, 1).to(tl.uint8), mask=mask)


@triton.jit
def statistics_kernel(
    mean_out,
    m2_out,
    u,
    total,
    channels,
    pixels,
    splits,
    LAST: tl.constexpr,
    MAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    maps, exists, start, split = _run_of_tiles(total, channels, pixels, splits, LAST, MAPS)
    first = split * (PIXELS * STEPS)
    mean = tl.zeros([MAPS], tl.float32)
    m2 = tl.zeros([MAPS], tl.float32)
    for step in range(STEPS):
        begin = first + step * PIXELS
        places, mask = _places(start, exists, begin, channels, pixels, LAST, PIXELS)
        count = tl.minimum(tl.maximum(pixels - begin, 0), PIXELS).to(tl.float32)
        before = tl.minimum(pixels - first, step * PIXELS).to(tl.float32)
        x = _read(u, places, mask)
        own_mean = tl.sum(x, 1) / tl.maximum(count, 1.0)
        d = tl.where(mask, x - own_mean[:, None], 0.0)
        # Chan's update: tiles merge by their means and centred squares
        share = count / (before + count)
        apart = own_mean - mean
        mean += apart * share
        m2 += tl.sum(d * d, 1) + apart * apart * (before * share)
    tl.store(mean_out + split * total + maps, mean, mask=exists)
    tl.store(m2_out + split * total + maps, m2, mask=exists)


@triton.jit
def combine_statistics_kernel(
    mean_out,
    m2_out,
    means,
    m2s,
    total,
    pixels,
    splits,
    SPAN: tl.constexpr,
    MAPS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    maps, exists, split, places, mask = _parts(total, splits, MAPS, SPLITS)
    count = tl.minimum(tl.maximum(pixels - split * SPAN, 0), SPAN).to(tl.float32)[None, :]
    means = _read(means, places, mask)
    mean = tl.sum(means * count, 1) / pixels
    apart = tl.where(mask, means - mean[:, None], 0.0)
    m2 = tl.sum(_read(m2s, places, mask) + count * apart * apart, 1)
    tl.store(mean_out + maps, mean, mask=exists)
    tl.store(m2_out + maps, m2, mask=exists)


@triton.jit
def reduce_kernel(
    g1_out,
    gc_out,
    grad,
    u,
    centre,
    gate,
    total,
    channels,
    pixels,
    splits,
    LAST: tl.constexpr,
    MAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    maps, exists, start, split = _run_of_tiles(total, channels, pixels, splits, LAST, MAPS)
    first = split * (PIXELS * STEPS)
    middle = _read(centre, maps, exists)[:, None]
    g1 = tl.zeros([MAPS, PIXELS], tl.float32)
    gc = tl.zeros([MAPS, PIXELS], tl.float32)
    for step in range(STEPS):
        places, mask = _places(start, exists, first + step * PIXELS, channels, pixels, LAST, PIXELS)
        g = _read_gated_grad(grad, gate, places, mask)
        g1 += g
        gc += tl.where(mask, g * (_read(u, places, mask) - middle), 0.0)
    tl.store(g1_out + split * total + maps, tl.sum(g1, 1), mask=exists)
    tl.store(gc_out + split * total + maps, tl.sum(gc, 1), mask=exists)


@triton.jit
def combine_sums_kernel(g1_out, gc_out, g1s, gcs, total, splits, MAPS: tl.constexpr, SPLITS: tl.constexpr):
    maps, exists, _, places, mask = _parts(total, splits, MAPS, SPLITS)
    tl.store(g1_out + maps, tl.sum(_read(g1s, places, mask), 1), mask=exists)
    tl.store(gc_out + maps, tl.sum(_read(gcs, places, mask), 1), mask=exists)


@triton.jit
def propagate_kernel(
    d_u,
    d_residual,
    grad,
    u,
    centre,
    gate,
    by_grad,
    by_input,
    constant,
    total,
    channels,
    pixels,
    splits,
    LAST: tl.constexpr,
    MAPS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    maps, exists, places, mask = _tile(total, channels, pixels, splits, LAST, MAPS, PIXELS)
    g = _read_gated_grad(grad, gate, places, mask)
    d = g * _read(by_grad, maps, exists)[:, None]
    if by_input is not None:
        away = _read(u, places, mask) - _read(centre, maps, exists)[:, None]
        d += away * _read(by_input, maps, exists)[:, None] + _read(constant, maps, exists)[:, None]
    _write(d_u, places, d, mask)
    if d_residual is not None:
        _write(d_residual, places, g, mask)


# --- launches


@dataclass(frozen=True)
class Shape:
    """A dense image tensor as the kernels see it."""

    batch: int
    channels: int
    pixels: int
    last: bool  # channels_last

    @property
    def layout(self) -> str:
        return "channels_last" if self.last else "nchw"


def shape_of(u: Tensor) -> Shape:
    """The shape of ``u`` [B, C, H, W]; ValueError where it is dense in neither layout."""
    batch, channels, height, width = u.shape
    if not u.is_contiguous() and not u.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"u must be contiguous or channels_last, got strides {u.stride()}")
    return Shape(batch, channels, height * width, not u.is_contiguous())


@dataclass(frozen=True)
class _Grid:
    """Tiles over a shape. ``constants`` goes to the kernel, ``programs`` = map tiles × ``splits``."""

    programs: int
    splits: int
    constants: dict[str, int | bool]


def _grid(shape: Shape, how: Mapping[str, int], steps: bool = False) -> _Grid:
    """Tiles of at most ``how["tile"]`` elements, at most ``how["inner"]`` along the contiguous axis.

    With ``steps`` a program takes up to ``how["steps"]`` tiles of pixels in turn, fewer where too few
    programs would be left to fill a GPU.
    """
    total = shape.batch * shape.channels
    if shape.last:
        maps = min(power_of_two(shape.channels), how["inner"], how["tile"])
        pixels = min(power_of_two(shape.pixels), how["tile"] // maps)
        groups = shape.batch * -(-shape.channels // maps)
    else:
        pixels = min(power_of_two(shape.pixels), how["inner"], how["tile"])
        maps = min(power_of_two(total), how["tile"] // pixels)
        groups = -(-total // maps)
    tiles = -(-shape.pixels // pixels)
    constants: dict[str, int | bool] = {"LAST": shape.last, "MAPS": maps, "PIXELS": pixels}
    if steps:
        each = min(how["steps"], power_of_two(tiles))
        while each > 1 and groups * -(-tiles // each) < _ENOUGH_PROGRAMS:
            each //= 2
        constants["STEPS"] = each
        tiles = -(-tiles // each)
    return _Grid(groups * tiles, tiles, constants)


_ENOUGH_PROGRAMS = 512  # about four for each multiprocessor of a large GPU
_COMBINED = 2048  # elements of a tile where partial results are combined


def _combine(kernel: object, total: int, splits: int, *arguments: object, **constants: int) -> None:
    width = power_of_two(splits)
    maps = min(power_of_two(total), max(1, _COMBINED // width))
    launch(kernel, -(-total // maps), *arguments, MAPS=maps, SPLITS=width, **constants)


def _table(u: Tensor, splits: int = 1) -> Tensor:
    """Uninitialised float32 [B, C], or [splits, B, C] for partial results."""
    size = u.shape[:2] if splits == 1 else (splits, *u.shape[:2])
    return torch.empty(size, dtype=torch.float32, device=u.device)


def _bytes(gate: Tensor | None) -> Tensor | None:
    return gate.view(torch.uint8) if gate is not None and gate.dtype == torch.bool else gate


def apply(
    u: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    how: Mapping[str, int],
    *,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    out: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """y = act(u · scale + shift + r) with r = residual, or residual · residual_scale + residual_shift.

    Args:
        u: [B, C, H, W], contiguous or channels_last, float32, bfloat16 or float16.
        scale, shift, residual_scale, residual_shift: contiguous float32 [B, C].
        residual: of ``u``'s shape, dtype and layout, or None.
        relu: whether act is the ReLU; else it is the identity.
        how: launch parameters ``tile``, ``inner``, ``warps``.
        out: where to write, ``u`` itself too; a new tensor like ``u`` if None.
        mask: bool like ``u``, gets where the activation passed: where y is not <= 0.
    """
    y = torch.empty_like(u) if out is None else out
    shape = shape_of(u)
    grid = _grid(shape, how)
    launch(
        apply_kernel,
        grid.programs,
        y,
        _bytes(mask),
        u,
        scale,
        shift,
        residual,
        residual_scale,
        residual_shift,
        shape.batch * shape.channels,
        shape.channels,
        shape.pixels,
        grid.splits,
        RELU=relu,
        warps=how["warps"],
        **grid.constants,
    )
    return y


def statistics(
    u: Tensor, how: Mapping[str, int], *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and centred sum of squares of each map of ``u`` [B, C, H, W]: two float32 [B, C].

    ``how``: launch parameters ``tile``, ``inner``, ``steps``, ``warps``. ``out``: where to write.
    """
    shape = shape_of(u)
    total = shape.batch * shape.channels
    grid = _grid(shape, how, steps=True)
    out = (_table(u), _table(u)) if out is None else out
    parts = out if grid.splits == 1 else (_table(u, grid.splits), _table(u, grid.splits))
    launch(
        statistics_kernel,
        grid.programs,
        *parts,
        u,
        total,
        shape.channels,
        shape.pixels,
        grid.splits,
        warps=how["warps"],
        **grid.constants,
    )
    if grid.splits > 1:
        span = grid.constants["PIXELS"] * grid.constants["STEPS"]
        _combine(
            combine_statistics_kernel,
            total,
            grid.splits,
            *out,
            *parts,
            total,
            shape.pixels,
            grid.splits,
            SPAN=span,
        )
    return out


def reduce(
    grad: Tensor,
    u: Tensor,
    centre: Tensor,
    gate: Tensor | None,
    how: Mapping[str, int],
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """G1 = Σ g and Gc = Σ g (u − centre) over each map, float32 [B, C]; g is ``grad`` where the gate passes.

    Args:
        grad, u: [B, C, H, W] of one dtype and layout.
        gate: y, or the bool mask that :func:`apply` leaves, laid out alike; None without an activation.
        centre: contiguous float32 [B, C].
        how: launch parameters ``tile``, ``inner``, ``steps``, ``warps``.
        out: where to write.
    """
    shape = shape_of(u)
    total = shape.batch * shape.channels
    grid = _grid(shape, how, steps=True)
    out = (_table(u), _table(u)) if out is None else out
    parts = out if grid.splits == 1 else (_table(u, grid.splits), _table(u, grid.splits))
    launch(
        reduce_kernel,
        grid.programs,
        *parts,
        grad,
        u,
        centre,
        _bytes(gate),
        total,
        shape.channels,
        shape.pixels,
        grid.splits,
        warps=how["warps"],
        **grid.constants,
    )
    if grid.splits > 1:
        _combine(combine_sums_kernel, total, grid.splits, *out, *parts, total, grid.splits)
    return out


def propagate(
    grad: Tensor,
    u: Tensor | None,
    centre: Tensor | None,
    gate: Tensor | None,
    by_grad: Tensor,
    by_input: Tensor | None,
    constant: Tensor | None,
    residual: bool,
    how: Mapping[str, int],
    *,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """∂u = by_grad · g + by_input · (u − centre) + constant, and ∂residual = g with ``residual``.

    Args:
        grad, u, gate: as in :func:`reduce`.
        centre, by_grad, by_input, constant: contiguous float32 [B, C]; u, centre, by_input and constant are
            None all together.
        how: launch parameters ``tile``, ``inner``, ``warps``.
        out: where to write.
    """
    shape = shape_of(grad)
    grid = _grid(shape, how)
    if by_input is None:
        u = centre = None
    if out is None:
        out = torch.empty_like(grad), torch.empty_like(grad) if residual else None
    d_u, d_residual = out
    launch(
        propagate_kernel,
        grid.programs,
        d_u,
        d_residual,
        grad,
        u,
        centre,
        _bytes(gate),
        by_grad,
        by_input,
        constant,
        shape.batch * shape.channels,
        shape.channels,
        shape.pixels,
        grid.splits,
        warps=how["warps"],
        **grid.constants,
    )
    return d_u, d_residual


# --- what to compile ahead of time

# a stage of a ResNet-18, ImageNet's first map, one with no even size, the smallest
_SHAPES = {
    "64@32²": (256, 64, 32, 32),
    "64@112²": (1, 64, 112, 112),
    "33@7²": (5, 33, 7, 7),
    "512@2²": (256, 512, 2, 2),
    "1@1²": (1, 1, 1, 1),  # Triton turns sizes of 1 into constants
}


def cases(table: Table) -> Iterator[Case]:
    """Each pass with and without its options at every shipped set of launch parameters."""
    for key, how in table.items():
        op, *rest = key.split("@")[0].split("/")
        if op not in OPS:
            continue
        dtypes = [d for d in ("float32", "bfloat16", "float16") if d in rest] or ["float32", "bfloat16"]
        for dtype in dtypes:
            for name, size in _SHAPES.items():
                yield from _cases_of(op, key, dtype, "channels_last" in rest, name, size, how)


def _cases_of(
    op: str, key: str, dtype: str, last: bool, name: str, size: tuple[int, ...], how: Mapping[str, int]
) -> Iterator[Case]:
    layout = torch.channels_last if last else torch.contiguous_format
    u = torch.empty(size, dtype=getattr(torch, dtype), device="meta", memory_format=layout)
    gate = torch.empty(size, dtype=torch.bool, device="meta", memory_format=layout)
    c = torch.empty(size[:2], device="meta")
    title = f"{key} {dtype} {name}"
    plain = name == "64@32²"  # the options make other kernels; one shape shows them
    quick = plain and dtype == "bfloat16"
    if op == "apply":
        yield Case(title + " residual relu", lambda: apply(u, c, c, u, True, how), quick=quick)
        if plain:
            yield Case(title, lambda: apply(u, c, c, None, False, how))
            yield Case(title + " relu mask", lambda: apply(u, c, c, u, True, how, mask=gate), quick=quick)
            yield Case(
                title + " shortcut relu",
                lambda: apply(u, c, c, u, True, how, residual_scale=c, residual_shift=c),
            )
    elif op == "statistics":
        yield Case(title, lambda: statistics(u, how), quick=quick)
    elif op == "reduce":
        yield Case(title + " relu", lambda: reduce(u, u, c, u, how), quick=quick)
        if plain:
            yield Case(title, lambda: reduce(u, u, c, None, how))
            yield Case(title + " mask", lambda: reduce(u, u, c, gate, how), quick=quick)
    elif op == "propagate":
        yield Case(title + " training relu", lambda: propagate(u, u, c, u, c, c, c, True, how), quick=quick)
        if plain:
            yield Case(
                title + " attack mask", lambda: propagate(u, None, None, gate, c, None, None, False, how)
            )
            yield Case(
                title + " training mask", lambda: propagate(u, u, c, gate, c, c, c, True, how), quick=quick
            )

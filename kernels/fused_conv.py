"""Convolutions with the layer's work in their epilogue: by conv.py without groups, by grouped_conv.py with.

The library's convolution is the default: a function here returns None unless a measured table has an entry
for the case, which means that our kernel is faster, or ``force`` is set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import conv, grouped_conv
from .epilogue import Epilogue, Image, Problem, combine, new_tensor
from .launch import Case, Table
from .tables import as_bytes


def kernel_of(groups: int) -> Any:
    """The module of the kernel for this number of groups."""
    return conv if groups == 1 else grouped_conv


def problem_of(
    operation: str,
    x: Tensor,
    weight: Tensor,
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str = "ieee",
) -> Problem:
    """The problem of a layer with these arguments; ``x`` is its input, or ∂u for the operation "dgrad"."""
    batch, c_in, *size = input_shape
    c_out, _, *kernel = weight.shape
    precision = precision if x.dtype == torch.float32 else "ieee"
    pairs: Any = (tuple(pair) for pair in (size, kernel, stride, padding, dilation))
    return Problem(
        operation, x.dtype, precision, not x.is_contiguous(), batch, c_in, c_out, groups, *pairs
    )  # fmt: skip


def _tile(problem: Problem, table: Table | None, force: bool) -> Any:
    kernel = kernel_of(problem.groups)
    entry = (table or {}).get(kernel.key(problem))
    if entry is not None and (force or problem.batch >= entry["least_batch"]):
        return _tile_of(kernel, entry)
    return kernel.default_tile(problem) if force else None


def _tile_of(kernel: Any, entry: Mapping[str, int]) -> Any:
    return kernel.Tile(**{name: entry[name] for name in kernel.Tile._fields})


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _result(problem: Problem, like: Tensor) -> Tensor:
    shape = (problem.batch, *problem.writes)
    return new_tensor(shape, like, like.dtype, memory_format=_layout(problem.channels_last))


def fused_apply(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    activation: int,
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
    tile: Any = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """y = act(u · scale + shift + residual) with u = conv(input, weight); returns y, u and the mask.

    The mask is bool, True where the ReLU's gradient passes, or the slope of another activation.

    Args:
        input: [B, C_in, H, W], contiguous or channels_last; the results are laid out alike.
        weight: [C_out, C_in/groups, k_h, k_w].
        scale, shift: [B, C_out] float32.
        residual: [B, C_out, H', W'] of the input's dtype and layout, or None.
        activation: of act, see :mod:`awnet.kernels.activations`.
        stride, padding, dilation: pairs.
        keep_u, keep_mask: whether to return u and the mask; otherwise they are empty.
        table: the cases in which our kernel is faster, with the tile of each.
        precision: "ieee" or "tf32", for float32 without groups.
        force: use our kernel in any case, with a default tile if the table has none.
        tile: use our kernel with this ``Tile`` of its module.

    Returns:
        None if the kernel does not support the call or ``table`` has no entry for it.
    """
    kernel, geometry = kernel_of(groups), (stride, padding, dilation, groups)
    if kernel.not_supported(input, weight, *geometry[:3]) is not None:
        return None
    problem = problem_of("apply", input, weight, input.shape, *geometry, precision)
    layout = _layout(problem.channels_last)
    if residual is not None and not (
        residual.dtype == input.dtype and residual.is_contiguous(memory_format=layout)
    ):
        return None
    tile = tile or _tile(problem, table, force)
    if tile is None or (keep_mask and not kernel.keeps_mask(problem, tile)):
        return None
    y = _result(problem, input)
    u = _result(problem, input) if keep_u else None
    mask = None
    if keep_mask:
        mask = torch.empty_like(y, dtype=y.dtype if activation > 1 else torch.bool)
    epilogue = Epilogue(u, y, as_bytes(mask), residual, scale.contiguous(), shift.contiguous())
    kernel.run(problem, tile, input, weight, epilogue, activation)
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
    tile: Any = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """u = conv(input, weight) and its per-sample mean and centered sum of squares, [B, C_out] float32.

    Arguments as for :func:`fused_apply`.
    """
    kernel, geometry = kernel_of(groups), (stride, padding, dilation, groups)
    if kernel.not_supported(input, weight, *geometry[:3]) is not None:
        return None
    problem = problem_of("statistics", input, weight, input.shape, *geometry, precision)
    tile = tile or _tile(problem, table, force)
    if tile is None:
        return None
    u = _result(problem, input)
    rows, pixels = kernel.rows(problem, tile), problem.output.pixels
    parts = (problem.batch, -(-pixels // rows), problem.c_out)
    mean, m2 = (new_tensor(parts, input) for _ in range(2))
    kernel.run(problem, tile, input, weight, Epilogue(u, mean=mean, m2=m2), 0)
    return u, *combine(mean, m2, pixels, rows)


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
    tile: Any = None,
) -> Tensor | None:
    """The gradient of the convolution's input, laid out as ``d_u`` [B, C_out, H', W'].

    Other arguments as for :func:`fused_apply`; without groups for stride 1 only.
    """
    kernel, geometry = kernel_of(groups), (stride, padding, dilation, groups)
    if kernel.not_supported(d_u, weight, *geometry[:3]) is not None:
        return None
    problem = problem_of("dgrad", d_u, weight, input_shape, *geometry, precision)
    if kernel.dgrad_not_supported(problem) is not None:
        return None
    tile = tile or _tile(problem, table, force)
    if tile is None:
        return None
    d_input = _result(problem, d_u)
    kernel.run(problem, tile, d_u, weight, Epilogue(d_input), 0)
    return d_input


def _sample_call(problem: Problem, tile: Any, activation: int = 1) -> None:
    """A call of ``problem`` on the meta device with every option of the epilogue."""

    def image(size: Image) -> Tensor:
        shape = (problem.batch, *size)
        return torch.empty(
            shape, dtype=problem.dtype, device="meta", memory_format=_layout(problem.channels_last)
        )

    weight = torch.empty(
        problem.c_out,
        problem.c_in // problem.groups,
        *problem.kernel,
        dtype=problem.dtype,
        device="meta",
        memory_format=torch.channels_last if problem.groups == 1 else torch.contiguous_format,
    )
    geometry: Any = (problem.stride, problem.padding, problem.dilation, problem.groups)
    options: Any = {"precision": problem.precision, "tile": tile}
    x, other = image(problem.reads), image(problem.writes)
    if problem.operation == "apply":
        scale = torch.empty(problem.batch, problem.c_out, device="meta")
        keep_mask = kernel_of(problem.groups).keeps_mask(problem, tile)
        arguments: Any = (x, weight, scale, scale, other, activation, *geometry, True, keep_mask)
        fused_apply(*arguments, **options)
    elif problem.operation == "statistics":
        fused_statistics(x, weight, *geometry, **options)
    else:
        fused_dgrad(x, weight, other.shape, *geometry, **options)


def cases(table: Table) -> Iterator[Case]:
    """The calls that kernels/ahead.py compiles: each kernel's own, and the table's."""
    for kernel in (conv, grouped_conv):
        calls: list[tuple[str, Problem, Any]] = list(kernel.shipped())
        for key, entry in table.items():
            if key.startswith(f"{kernel.NAME}/"):
                calls.append((key, kernel.read_key(key.split("@")[0]), _tile_of(kernel, entry)))
        for name, problem, tile in calls:
            in_full = problem.dtype == torch.float32 and problem.precision == "ieee"
            call = partial(_sample_call, problem, tile)
            instruction = "" if in_full else "wgmma"
            yield Case(name, call, instruction, name in kernel.QUICK)
            if name in kernel.QUICK and problem.operation == "apply":
                yield Case(f"{name} silu", partial(_sample_call, problem, tile, 2), instruction)

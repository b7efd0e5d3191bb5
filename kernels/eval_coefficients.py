"""Scale and shift of the layer in eval mode, and their gradients, for one layer or for a whole network.

A network is one layer with all channels side by side. Its filter scale covers the first D channels, and its
results are stored layer by layer, so that each layer gets contiguous ``[B, C_l]`` tables.
:mod:`awnet.ops.coefficients` states the equations, docs/equations.md derives them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Case, Table, launch, power_of_two
from .tables import (
    Config,
    block_sizes,
    constants_of,
    inverse_std,
    launch_tiles,
    load_row,
    meta_norm,
    tables_of,
    tile_of_program,
    tile_offsets,
)

OPS = ("eval_coefficients", "eval_gradients", "network_coefficients", "network_gradients")


# --- kernels


@triton.jit
def _branch(
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    eps,
    k: tl.constexpr,
    c,
    channels,
    K: tl.constexpr,
    S: tl.constexpr,
):
    """Branch ``k``: gain γ/σ, offset β − μγ/σ, μ, 1/σ, β; each [1, BLOCK_C]."""
    affine_row: tl.constexpr = k if K == 2 else 0
    stat_row: tl.constexpr = k if S == 2 else 0
    inv_std = inverse_std(load_row(var_ptr, stat_row, c, channels), eps)
    gain = load_row(weight_ptr, affine_row, c, channels) * inv_std
    mean = load_row(mean_ptr, stat_row, c, channels)
    bias = load_row(bias_ptr, affine_row, c, channels)
    return gain[None, :], (bias - mean * gain)[None, :], mean[None, :], inv_std[None, :], bias[None, :]


@triton.jit
def _load_filter_scale(filter_scale_ptr, b, c, in_bounds, dynamic_channels):
    """[BLOCK_B, BLOCK_C]; 1 for the channels that have none."""
    offsets = b[:, None] * dynamic_channels + c[None, :]
    return tl.load(filter_scale_ptr + offsets, mask=in_bounds & (c < dynamic_channels)[None, :], other=1.0)


@triton.jit
def eval_coefficients_kernel(
    scale_ptr,  # [B, C]; with a layout one [B, C_l] block per layer, one after the other
    shift_ptr,
    filter_scale_ptr,  # [B, D], or None
    weight_ptr,  # [K, C]
    bias_ptr,
    mean_ptr,  # [S, C]
    var_ptr,
    p_clean_ptr,  # [B], or None where K = S = 1
    layout_ptr,  # [2, C] int32: first channel and width of the layer of each channel; None for one layer
    batch,
    channels,
    dynamic_channels,  # D
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, c = tile_of_program(channels, BLOCK_B, BLOCK_C)
    offsets, in_bounds = tile_offsets(b, c, batch, channels)
    scale, shift, _, _, _ = _branch(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, 0, c, channels, K, S)
    if K == 2 or S == 2:
        gain, offset, _, _, _ = _branch(weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, 1, c, channels, K, S)
        p = tl.load(p_clean_ptr + b, mask=b < batch, other=0.0)[:, None]
        scale = (1.0 - p) * scale + p * gain
        shift = (1.0 - p) * shift + p * offset
    scale = tl.broadcast_to(scale, [BLOCK_B, BLOCK_C])
    if filter_scale_ptr is not None:
        scale *= _load_filter_scale(filter_scale_ptr, b, c, in_bounds, dynamic_channels)
    if layout_ptr is not None:
        begin = tl.load(layout_ptr + c, mask=c < channels, other=0).to(tl.int64)
        width = tl.load(layout_ptr + channels + c, mask=c < channels, other=0)
        offsets = (begin * batch)[None, :] + b[:, None] * width[None, :] + (c - begin)[None, :]
    tl.store(scale_ptr + offsets, scale, mask=in_bounds)
    tl.store(shift_ptr + offsets, tl.broadcast_to(shift, [BLOCK_B, BLOCK_C]), mask=in_bounds)


@triton.jit
def eval_gradients_kernel(
    d_filter_scale_ptr,  # [B, D], or None
    d_p_clean_ptr,  # [B], or None
    d_weight_ptr,  # [programs, K, C]: the sums of each program; or None
    d_bias_ptr,
    g1_ptr,  # [B, C], ∂L/∂shift
    gc_ptr,  # [B, C], ∂L/∂scale − center · g1
    center_ptr,  # [B, C], or None for 0
    filter_scale_ptr,  # [B, D], or None
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    p_clean_ptr,
    batch,
    channels,
    dynamic_channels,
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """A program takes all channels of BLOCK_B samples."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid * BLOCK_B + tl.arange(0, BLOCK_B)
    part = pid * (K * channels)
    d_p = tl.zeros([BLOCK_B], tl.float32)
    for step in range(STEPS):
        c = step * BLOCK_C + tl.arange(0, BLOCK_C)
        offsets, in_bounds = tile_offsets(b, c, batch, channels)
        gain_0, _, mean_0, inv_std_0, bias_0 = _branch(
            weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, 0, c, channels, K, S
        )
        g1 = tl.load(g1_ptr + offsets, mask=in_bounds, other=0.0)
        gc = tl.load(gc_ptr + offsets, mask=in_bounds, other=0.0)
        d_scale = gc
        # Σ g (ωu − μ_k) = ω gc + (ω center − μ_k) g1, without the difference of two large sums
        scaled_gc = gc
        if filter_scale_ptr is not None:
            filter_scale = _load_filter_scale(filter_scale_ptr, b, c, in_bounds, dynamic_channels)
            scaled_gc = gc * filter_scale
        if center_ptr is not None:
            center = tl.load(center_ptr + offsets, mask=in_bounds, other=0.0)
            d_scale += center * g1
            if filter_scale_ptr is not None:
                center = center * filter_scale
            centered_0 = scaled_gc + (center - mean_0) * g1
        else:
            centered_0 = scaled_gc - mean_0 * g1
        if K == 2 or S == 2:
            gain_1, _, mean_1, inv_std_1, bias_1 = _branch(
                weight_ptr, bias_ptr, mean_ptr, var_ptr, eps, 1, c, channels, K, S
            )
            p = tl.load(p_clean_ptr + b, mask=b < batch, other=0.0)[:, None]
            q = 1.0 - p
            if center_ptr is not None:
                centered_1 = scaled_gc + (center - mean_1) * g1
            else:
                centered_1 = scaled_gc - mean_1 * g1
            gain = q * gain_0 + p * gain_1
            d_weight_0, d_weight_1 = q * centered_0 * inv_std_0, p * centered_1 * inv_std_1
            d_bias_0, d_bias_1 = q * g1, p * g1
            if K == 1:
                d_weight_0 += d_weight_1
                d_bias_0 += d_bias_1
            elif d_weight_ptr is not None:
                column = part + channels + c
                tl.store(
                    d_weight_ptr + column, tl.sum(tl.where(in_bounds, d_weight_1, 0.0), 0), mask=c < channels
                )
                tl.store(
                    d_bias_ptr + column, tl.sum(tl.where(in_bounds, d_bias_1, 0.0), 0), mask=c < channels
                )
            if d_p_clean_ptr is not None:
                difference = gain_1 * centered_1 + bias_1 * g1 - (gain_0 * centered_0 + bias_0 * g1)
                d_p += tl.sum(tl.where(in_bounds, difference, 0.0), 1)
        else:
            gain = gain_0
            d_weight_0, d_bias_0 = centered_0 * inv_std_0, g1
        if d_weight_ptr is not None:
            column = part + c
            tl.store(
                d_weight_ptr + column, tl.sum(tl.where(in_bounds, d_weight_0, 0.0), 0), mask=c < channels
            )
            tl.store(d_bias_ptr + column, tl.sum(tl.where(in_bounds, d_bias_0, 0.0), 0), mask=c < channels)
        if d_filter_scale_ptr is not None:
            dynamic = in_bounds & (c < dynamic_channels)[None, :]
            dynamic_offsets = b[:, None] * dynamic_channels + c[None, :]
            tl.store(d_filter_scale_ptr + dynamic_offsets, d_scale * gain, mask=dynamic)
    if d_p_clean_ptr is not None:
        tl.store(d_p_clean_ptr + b, d_p, mask=b < batch)


@triton.jit
def sum_parts_kernel(
    first_out_ptr,  # [width]
    second_out_ptr,
    first_ptr,  # [parts, width]
    second_ptr,
    width,
    parts,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Sums of two tensors over their leading axis."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets, in_bounds = tile_offsets(tl.arange(0, BLOCK_PARTS).to(tl.int64), column, parts, width)
    first = tl.load(first_ptr + offsets, mask=in_bounds, other=0.0)
    tl.store(first_out_ptr + column, tl.sum(first, 0), mask=column < width)
    second = tl.load(second_ptr + offsets, mask=in_bounds, other=0.0)
    tl.store(second_out_ptr + column, tl.sum(second, 0), mask=column < width)


# --- launches


def _pair(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(shape), like.new_empty(shape)


def _dynamic_channels(norm: Any, mix: Any) -> int:
    return norm.weight.shape[1] if mix.filter_scale is None else mix.filter_scale.shape[1]


def eval_coefficients(
    norm: Any, mix: Any, batch: int, config: Config, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """scale and shift ``[B, C]`` of a layer in eval mode.

    Args:
        norm: running statistics and affine parameters.
        mix: ``filter_scale`` and, unless all tables have one row, ``p_clean``.
        batch: B.
        config: launch parameters ``tile``, ``inner``, ``warps``.
        out: tensors to write to.
    """
    channels = norm.weight.shape[1]
    out = _pair(norm.weight, batch, channels) if out is None else out
    _launch_coefficients(out, norm, mix, None, batch, config)
    return out


def _launch_coefficients(
    out: tuple[Tensor, Tensor], norm: Any, mix: Any, layout: Tensor | None, batch: int, config: Config
) -> None:
    channels = norm.weight.shape[1]
    launch_tiles(
        eval_coefficients_kernel, batch, channels, config,
        *out, mix.filter_scale, *tables_of(norm), mix.p_clean, layout,
        batch, channels, _dynamic_channels(norm, mix), norm.eps, **constants_of(norm),
    )  # fmt: skip


def network_layout(widths: Sequence[int], device: torch.device) -> Tensor:
    """First channel and width of the layer of each channel, int32 ``[2, T]``: ``layout`` below."""
    begins = [sum(widths[:i]) for i in range(len(widths))]
    columns = [(begin, width) for begin, width in zip(begins, widths, strict=True) for _ in range(width)]
    return torch.tensor(columns, dtype=torch.int32).T.contiguous().to(device)


def network_coefficients(
    norm: Any,
    mix: Any,
    widths: Sequence[int],
    layout: Tensor,
    config: Config,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """scale and shift ``[B, C_l]`` of every layer of a network in eval mode, in one launch.

    Args:
        norm: the layers' tables side by side, two rows each, T = Σ C_l channels.
        mix: ``p_clean`` [B], and ``filter_scale`` [B, D] of the first layers side by side, or None.
        widths: C_l of each layer.
        layout: :func:`network_layout` of ``widths``.
        config: launch parameters ``tile``, ``inner``, ``warps``.
        out: two flat float32 buffers of B · T elements.
    """
    batch = len(mix.p_clean)
    if out is None:
        out = _pair(norm.weight, batch * sum(widths))
    _launch_coefficients(out, norm, mix, layout, batch, config)
    blocks = zip(*(flat.split([batch * width for width in widths]) for flat in out), widths, strict=True)
    return [(scale.view(batch, width), shift.view(batch, width)) for scale, shift, width in blocks]


# the gradients of filter_scale [B, D], p_clean [B], weight and bias [K, C]; None where not requested
EvalGradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def eval_gradients(
    sums: Any,
    norm: Any,
    mix: Any,
    needs: Sequence[bool],
    config: Config,
    *,
    out: EvalGradients | None = None,
) -> EvalGradients:
    """Gradients of a layer in eval mode, or of a network's filter scale and p_clean.

    Args:
        sums: g1 = Σ g and gc = Σ g (u − center) over the pixels, and center (None means 0), ``[B, C]``; for a
            network ∂L/∂shift and ∂L/∂scale of all layers side by side, and None.
        norm, mix: as in the forward pass.
        needs: whether the gradients of filter_scale, p_clean, weight and bias are requested; the last two
            are computed together.
        config: launch parameters ``tile``, ``inner``, ``warps``.
        out: tensors to write to.
    """
    g1, gc, center = sums
    batch, channels = g1.shape
    dynamic_channels = _dynamic_channels(norm, mix)
    if out is None:
        need_filter_scale, need_p_clean, *need_tables = needs
        out = (
            g1.new_empty(batch, dynamic_channels) if need_filter_scale else None,
            g1.new_empty(batch) if need_p_clean else None,
            *(_pair(g1, *norm.weight.shape) if any(need_tables) else (None, None)),
        )
    d_filter_scale, d_p_clean, d_weight, d_bias = out
    if batch == 0:
        for table in (d_weight, d_bias):
            if table is not None:
                table.zero_()
        return out
    block_b, block_c = block_sizes(batch, channels, config)
    programs = -(-batch // block_b)
    parts = (d_weight, d_bias)
    if programs > 1 and d_weight is not None:
        parts = _pair(g1, programs, *norm.weight.shape)
    launch(
        eval_gradients_kernel, programs,
        d_filter_scale, d_p_clean, *parts, g1, gc, center, mix.filter_scale, *tables_of(norm), mix.p_clean,
        batch, channels, dynamic_channels, norm.eps, BLOCK_B=block_b, BLOCK_C=block_c,
        STEPS=power_of_two(-(-channels // block_c)), warps=config["warps"], **constants_of(norm),
    )  # fmt: skip
    if programs > 1 and d_weight is not None:
        width, block_parts = norm.weight.numel(), power_of_two(programs)
        block_n = min(power_of_two(width), max(1, config["tile"] // block_parts))
        launch(
            sum_parts_kernel, -(-width // block_n), d_weight, d_bias, *parts, width, programs,
            BLOCK_N=block_n, BLOCK_PARTS=block_parts,
        )  # fmt: skip
    return out


# --- ahead-of-time compilation


def cases(table: Table) -> Iterator[Case]:
    """Each kernel for two rows and one, with and without a filter scale, and for a network."""
    for key, config in table.items():
        op = key.split("@")[0].split("/")[0]
        if op in OPS[:2]:
            for batch, channels in ((256, 64), (5, 33), (1024, 512), (1, 1)):
                for rows, has_scale in ((2, True), (1, False)):
                    title = f"{key} {batch}×{channels}, {rows} row{'s' if rows == 2 else ''}"
                    title += ", filter_scale" if has_scale else ""
                    yield _layer_case(op, title, config, (batch, channels, rows, has_scale))
        elif op in OPS[2:]:
            yield _network_case(op, key, config)


def _layer_case(op: str, title: str, config: Config, shape: tuple[int, int, int, bool]) -> Case:
    batch, channels, rows, has_scale = shape
    c = torch.empty(batch, channels, device="meta")
    norm = meta_norm(rows, channels)
    p_clean = torch.empty(batch, device="meta") if rows == 2 else None
    mix = SimpleNamespace(filter_scale=c if has_scale else None, p_clean=p_clean)

    def run() -> object:
        if op == "eval_coefficients":
            return eval_coefficients(norm, mix, batch, config)
        return eval_gradients((c, c, c), norm, mix, (has_scale, rows == 2, True, True), config)

    return Case(title, run, quick=rows == 2 and batch == 256)


def _network_case(op: str, key: str, config: Config) -> Case:
    widths, batch = (64, 128, 256, 512), 256
    channels = sum(widths)
    norm = meta_norm(2, channels)
    c = torch.empty(batch, channels, device="meta")
    mix = SimpleNamespace(filter_scale=c[:, :512], p_clean=torch.empty(batch, device="meta"))
    layout = torch.empty(2, channels, dtype=torch.int32, device="meta")

    def run() -> object:
        if op == "network_coefficients":
            return network_coefficients(norm, mix, widths, layout, config)
        return eval_gradients((c, c, None), norm, mix, (True, True, False, False), config)

    return Case(key, run, quick=True)

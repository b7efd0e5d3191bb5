"""Batch statistics, scale and shift of the layer in train mode, and their gradients.

Each sample uses the statistics and affine parameters of its own row. :mod:`awnet.ops.coefficients` states the
equations, docs/equations.md derives them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Case, Table
from .tables import (
    Config,
    add_by_row,
    as_bytes,
    constants_of,
    inverse_std,
    launch_channels,
    launch_tiles,
    load_is_clean,
    load_row,
    load_sample_rows,
    meta_norm,
    reduce_rows,
    scaled,
    store_rows,
    tables_of,
    tile_of_program,
    tile_offsets,
)

OPS = ("batch_statistics", "train_coefficients", "train_gradients")


# --- kernels


@triton.jit
def _channels_of_program(BLOCK_C: tl.constexpr):
    return tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _samples_of_step(step, c, is_clean_ptr, batch, channels, BLOCK_B: tl.constexpr):
    """The samples of a step, the offsets of their tile, which are in bounds, and which samples are clean."""
    b = step * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    offsets, in_bounds = tile_offsets(b, c, batch, channels)
    return b, offsets, in_bounds, load_is_clean(is_clean_ptr, b, batch)


@triton.jit
def batch_statistics_kernel(
    batch_mean_ptr,  # [S, C]
    batch_var_ptr,
    n_ptr,  # [S]
    mean_ptr,  # [B, C], per sample
    m2_ptr,
    filter_scale_ptr,  # [B, C], or None
    is_clean_ptr,  # [B] bytes, or None
    batch,
    channels,
    pixels,
    S: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    c = _channels_of_program(BLOCK_C)
    hw = pixels * 1.0  # a value of 1 becomes a constant, which has no .to()
    # sums per element of the tile: the reductions over samples follow after the loops
    total_0 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    total_1 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    count_0 = tl.zeros([BLOCK_B, 1], tl.float32)
    count_1 = tl.zeros([BLOCK_B, 1], tl.float32)
    for step in range(STEPS):
        b, offsets, in_bounds, is_clean = _samples_of_step(step, c, is_clean_ptr, batch, channels, BLOCK_B)
        mean = tl.load(mean_ptr + offsets, mask=in_bounds, other=0.0)
        mean = scaled(mean, filter_scale_ptr, offsets, in_bounds)
        total_0, total_1 = add_by_row(total_0, total_1, mean, is_clean, in_bounds, S)
        in_batch = (b < batch)[:, None]
        count_0, count_1 = add_by_row(count_0, count_1, 1.0, is_clean, in_batch, S)
    total_0, total_1 = reduce_rows(total_0, total_1, S)
    count_0, count_1 = reduce_rows(count_0, count_1, S)
    batch_mean_0 = total_0 / tl.maximum(count_0, 1.0)
    batch_mean_1 = total_1 / tl.maximum(count_1, 1.0)
    m2_0 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    m2_1 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for step in range(STEPS):
        _, offsets, in_bounds, is_clean = _samples_of_step(step, c, is_clean_ptr, batch, channels, BLOCK_B)
        mean = tl.load(mean_ptr + offsets, mask=in_bounds, other=0.0)
        delta = scaled(mean, filter_scale_ptr, offsets, in_bounds)
        delta -= tl.where(is_clean, batch_mean_1[None, :], batch_mean_0[None, :])
        m2 = tl.load(m2_ptr + offsets, mask=in_bounds, other=0.0)
        m2 = scaled(m2, filter_scale_ptr, offsets, in_bounds)
        m2 = scaled(m2, filter_scale_ptr, offsets, in_bounds) + hw * delta * delta
        m2_0, m2_1 = add_by_row(m2_0, m2_1, m2, is_clean, in_bounds, S)
    m2_0, m2_1 = reduce_rows(m2_0, m2_1, S)
    var_0 = m2_0 / (tl.maximum(count_0, 1.0) * hw)
    var_1 = m2_1 / (tl.maximum(count_1, 1.0) * hw)
    store_rows(batch_mean_ptr, batch_mean_0, batch_mean_1, c, channels, S)
    store_rows(batch_var_ptr, var_0, var_1, c, channels, S)
    first_program = tl.arange(0, 1) + tl.program_id(0) == 0
    tl.store(n_ptr + tl.arange(0, 1), count_0 * hw, mask=first_program)
    if S == 2:
        tl.store(n_ptr + 1 + tl.arange(0, 1), count_1 * hw, mask=first_program)


@triton.jit
def train_coefficients_kernel(
    scale_ptr,  # [B, C]
    shift_ptr,
    filter_scale_ptr,  # [B, C], or None
    weight_ptr,  # [K, C]
    bias_ptr,
    batch_mean_ptr,  # [S, C]
    batch_var_ptr,
    is_clean_ptr,
    batch,
    channels,
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, c = tile_of_program(channels, BLOCK_B, BLOCK_C)
    offsets, in_bounds = tile_offsets(b, c, batch, channels)
    is_clean = load_is_clean(is_clean_ptr, b, batch)
    inv_std = inverse_std(load_sample_rows(batch_var_ptr, is_clean, c, channels, S), eps)
    gain = load_sample_rows(weight_ptr, is_clean, c, channels, K) * inv_std
    mean = load_sample_rows(batch_mean_ptr, is_clean, c, channels, S)
    shift = load_sample_rows(bias_ptr, is_clean, c, channels, K) - mean * gain
    scale = scaled(tl.broadcast_to(gain, [BLOCK_B, BLOCK_C]), filter_scale_ptr, offsets, in_bounds)
    tl.store(scale_ptr + offsets, scale, mask=in_bounds)
    tl.store(shift_ptr + offsets, tl.broadcast_to(shift, [BLOCK_B, BLOCK_C]), mask=in_bounds)


@triton.jit
def _train_sums(
    g1_ptr,
    gc_ptr,
    mean_ptr,
    filter_scale_ptr,
    weight_ptr,
    batch_mean_ptr,
    batch_var_ptr,
    is_clean_ptr,
    batch,
    c,
    channels,
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """∂γ and ∂β of both rows, and Σ γ g and Σ γ g x̂ over the samples of each row of the statistics."""
    d_weight_0 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    d_weight_1 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    d_bias_0 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    d_bias_1 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    d_mean_0 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    d_mean_1 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    d_var_0 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    d_var_1 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for step in range(STEPS):
        _, offsets, in_bounds, is_clean = _samples_of_step(step, c, is_clean_ptr, batch, channels, BLOCK_B)
        inv_std = inverse_std(load_sample_rows(batch_var_ptr, is_clean, c, channels, S), eps)
        gamma = load_sample_rows(weight_ptr, is_clean, c, channels, K)
        g1 = tl.load(g1_ptr + offsets, mask=in_bounds, other=0.0)
        gc = tl.load(gc_ptr + offsets, mask=in_bounds, other=0.0)
        gc = scaled(gc, filter_scale_ptr, offsets, in_bounds)
        mean = tl.load(mean_ptr + offsets, mask=in_bounds, other=0.0)
        delta = scaled(mean, filter_scale_ptr, offsets, in_bounds)
        delta -= load_sample_rows(batch_mean_ptr, is_clean, c, channels, S)
        g_xhat = (gc + delta * g1) * inv_std
        d_weight_0, d_weight_1 = add_by_row(d_weight_0, d_weight_1, g_xhat, is_clean, in_bounds, K)
        d_bias_0, d_bias_1 = add_by_row(d_bias_0, d_bias_1, g1, is_clean, in_bounds, K)
        d_mean_0, d_mean_1 = add_by_row(d_mean_0, d_mean_1, gamma * g1, is_clean, in_bounds, S)
        d_var_0, d_var_1 = add_by_row(d_var_0, d_var_1, gamma * g_xhat, is_clean, in_bounds, S)
    d_weight_0, d_weight_1 = reduce_rows(d_weight_0, d_weight_1, K)
    d_bias_0, d_bias_1 = reduce_rows(d_bias_0, d_bias_1, K)
    d_mean_0, d_mean_1 = reduce_rows(d_mean_0, d_mean_1, S)
    d_var_0, d_var_1 = reduce_rows(d_var_0, d_var_1, S)
    return d_weight_0, d_weight_1, d_bias_0, d_bias_1, d_mean_0, d_mean_1, d_var_0, d_var_1


@triton.jit
def train_sums_kernel(
    d_weight_ptr,  # [K, C]
    d_bias_ptr,
    through_ptr,  # [2, S, C]
    g1_ptr,  # [B, C]
    gc_ptr,
    mean_ptr,
    filter_scale_ptr,
    weight_ptr,
    batch_mean_ptr,
    batch_var_ptr,
    is_clean_ptr,
    batch,
    channels,
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    c = _channels_of_program(BLOCK_C)
    d_weight_0, d_weight_1, d_bias_0, d_bias_1, d_mean_0, d_mean_1, d_var_0, d_var_1 = _train_sums(
        g1_ptr, gc_ptr, mean_ptr, filter_scale_ptr, weight_ptr, batch_mean_ptr, batch_var_ptr, is_clean_ptr,
        batch, c, channels, eps, K, S, BLOCK_B, BLOCK_C, STEPS,
    )  # fmt: skip
    store_rows(d_weight_ptr, d_weight_0, d_weight_1, c, channels, K)
    store_rows(d_bias_ptr, d_bias_0, d_bias_1, c, channels, K)
    store_rows(through_ptr, d_mean_0, d_mean_1, c, channels, S)
    store_rows(through_ptr + S * channels, d_var_0, d_var_1, c, channels, S)


@triton.jit
def train_gradients_kernel(
    d_filter_scale_ptr,  # [B, C], or None
    d_weight_ptr,  # [K, C]
    d_bias_ptr,
    by_grad_ptr,  # [B, C]
    by_input_ptr,
    constant_ptr,
    through_ptr,  # [2, S, C] of train_sums_kernel with other ranks' added; None: computed here
    g1_ptr,
    gc_ptr,
    mean_ptr,
    m2_ptr,
    filter_scale_ptr,
    weight_ptr,
    batch_mean_ptr,
    batch_var_ptr,
    n_ptr,
    is_clean_ptr,
    batch,
    channels,
    pixels,
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    c = _channels_of_program(BLOCK_C)
    hw = pixels * 1.0  # a value of 1 becomes a constant, which has no .to()
    if through_ptr is None:
        d_weight_0, d_weight_1, d_bias_0, d_bias_1, d_mean_0, d_mean_1, d_var_0, d_var_1 = _train_sums(
            g1_ptr, gc_ptr, mean_ptr, filter_scale_ptr, weight_ptr, batch_mean_ptr, batch_var_ptr,
            is_clean_ptr, batch, c, channels, eps, K, S, BLOCK_B, BLOCK_C, STEPS,
        )  # fmt: skip
        store_rows(d_weight_ptr, d_weight_0, d_weight_1, c, channels, K)
        store_rows(d_bias_ptr, d_bias_0, d_bias_1, c, channels, K)
    else:
        d_mean_0 = load_row(through_ptr, 0, c, channels)
        d_mean_1 = load_row(through_ptr, S - 1, c, channels)
        d_var_0 = load_row(through_ptr, S, c, channels)
        d_var_1 = load_row(through_ptr, 2 * S - 1, c, channels)
    n_0 = tl.maximum(tl.load(n_ptr), 1.0)
    n_1 = tl.maximum(tl.load(n_ptr + S - 1), 1.0)
    for step in range(STEPS):
        _, offsets, in_bounds, is_clean = _samples_of_step(step, c, is_clean_ptr, batch, channels, BLOCK_B)
        inv_std = inverse_std(load_sample_rows(batch_var_ptr, is_clean, c, channels, S), eps)
        gamma = load_sample_rows(weight_ptr, is_clean, c, channels, K)
        mean = tl.load(mean_ptr + offsets, mask=in_bounds, other=0.0)
        delta = scaled(mean, filter_scale_ptr, offsets, in_bounds)
        delta -= load_sample_rows(batch_mean_ptr, is_clean, c, channels, S)
        through_mean = tl.where(is_clean, (d_mean_1 / n_1)[None, :], (d_mean_0 / n_0)[None, :])
        through_var = tl.where(is_clean, (d_var_1 / n_1)[None, :], (d_var_0 / n_0)[None, :]) * inv_std
        factor = scaled(tl.broadcast_to(inv_std, [BLOCK_B, BLOCK_C]), filter_scale_ptr, offsets, in_bounds)
        tl.store(by_grad_ptr + offsets, gamma * factor, mask=in_bounds)
        by_input = -scaled(factor * through_var, filter_scale_ptr, offsets, in_bounds)
        tl.store(by_input_ptr + offsets, by_input, mask=in_bounds)
        tl.store(constant_ptr + offsets, -factor * (through_mean + through_var * delta), mask=in_bounds)
        if d_filter_scale_ptr is not None:
            g1 = tl.load(g1_ptr + offsets, mask=in_bounds, other=0.0)
            gc = tl.load(gc_ptr + offsets, mask=in_bounds, other=0.0)
            m2 = tl.load(m2_ptr + offsets, mask=in_bounds, other=0.0)
            m2 = scaled(m2, filter_scale_ptr, offsets, in_bounds)
            at_mean = gamma * g1 - hw * (through_mean + through_var * delta)
            d_filter_scale = inv_std * (gamma * gc - through_var * m2 + mean * at_mean)
            tl.store(d_filter_scale_ptr + offsets, d_filter_scale, mask=in_bounds)


# --- launches


# of each row: mean and biased variance [S, C], and the number of values per channel [S]
BatchStats = tuple[Tensor, Tensor, Tensor]
# the gradients of weight and bias [K, C], and [2, S, C]: Σ γ g and Σ γ g x̂
TrainSums = tuple[Tensor, Tensor, Tensor]
# the gradients of filter_scale [B, C], weight and bias [K, C], and three tables [B, C] of
# ∂u = by_grad · g + by_input · (u − mean) + constant
TrainGradients = tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]


def batch_statistics(
    stats: Any, mix: Any, rows: int, config: Config, *, out: BatchStats | None = None
) -> BatchStats:
    """Statistics of ``filter_scale · u`` over the samples of each of ``rows`` rows.

    Args:
        stats: mean and M2 of u ``[B, C]``, and the number of pixels.
        mix: ``filter_scale``, and ``is_clean`` for two rows.
        rows: S.
        config: launch parameters ``tile``, ``inner``, ``warps``.
        out: tensors to write to.
    """
    mean, m2, hw = stats.mean, stats.m2, stats.hw
    batch, channels = mean.shape
    if out is None:
        out = mean.new_empty(rows, channels), mean.new_empty(rows, channels), mean.new_empty(rows)
    if batch == 0:
        for x in out:
            x.zero_()
        return out
    launch_channels(
        batch_statistics_kernel, batch, channels, config,
        *out, mean, m2, mix.filter_scale, as_bytes(mix.is_clean), batch, channels, hw, S=rows,
    )  # fmt: skip
    return out


def train_coefficients(
    norm: Any, mix: Any, batch: int, config: Config, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """scale and shift ``[B, C]`` in train mode; ``norm`` holds the batch statistics.

    ``config``: launch parameters ``tile``, ``inner``, ``warps``. ``out``: tensors to write to.
    """
    channels = norm.weight.shape[1]
    if out is None:
        size = (batch, channels)
        out = norm.weight.new_empty(size), norm.weight.new_empty(size)
    launch_tiles(
        train_coefficients_kernel, batch, channels, config,
        *out, mix.filter_scale, *tables_of(norm), as_bytes(mix.is_clean), batch, channels, norm.eps,
        **constants_of(norm),
    )  # fmt: skip
    return out


def train_sums(
    sums: Any,
    norm: Any,
    mix: Any,
    config: Config,
    *,
    out: TrainSums | None = None,
) -> TrainSums:
    """The sums over the batch that :func:`train_gradients` needs. Arguments as there."""
    g1, gc, mean = sums
    batch, channels = g1.shape
    if out is None:
        tables = torch.empty_like(norm.weight), torch.empty_like(norm.weight)
        out = *tables, g1.new_empty(2, *norm.mean.shape)
    if batch == 0:
        for x in out:
            x.zero_()
        return out
    launch_channels(
        train_sums_kernel, batch, channels, config,
        *out, g1, gc, mean, mix.filter_scale, norm.weight, norm.mean, norm.var, as_bytes(mix.is_clean),
        batch, channels, norm.eps, **constants_of(norm),
    )  # fmt: skip
    return out


def train_gradients(
    sums: Any,
    stats: Any,
    norm: Any,
    n: Tensor,
    mix: Any,
    need_filter_scale: bool,
    totals: TrainSums | None,
    config: Config,
    *,
    out: TrainGradients | None = None,
) -> TrainGradients:
    """Gradients in train mode, and the coefficients of ∂u.

    Args:
        sums: g1 = Σ g and gc = Σ g (u − mean) over the pixels, and mean, ``[B, C]``.
        stats: mean and M2 of u ``[B, C]``, and the number of pixels.
        norm: affine parameters and batch statistics.
        n: values per channel of each row, ``[S]``.
        mix: ``filter_scale``, and ``is_clean`` for two rows.
        need_filter_scale: whether the gradient of the filter scale is requested.
        totals: of :func:`train_sums`, with the other ranks' added to the last; None computes them here.
        config: launch parameters ``tile``, ``inner``, ``warps``.
        out: tensors to write to.
    """
    g1, gc, _ = sums
    batch, channels = g1.shape
    if out is None:
        if totals is None:
            tables = torch.empty_like(norm.weight), torch.empty_like(norm.weight)
        else:
            tables = totals[:2]
        d_filter_scale = torch.empty_like(g1) if need_filter_scale else None
        out = d_filter_scale, *tables, torch.empty_like(g1), torch.empty_like(g1), torch.empty_like(g1)
    if batch == 0:
        for table in out[1:3]:
            table.zero_()
        return out
    launch_channels(
        train_gradients_kernel, batch, channels, config,
        *out, None if totals is None else totals[2], g1, gc, stats.mean, stats.m2, mix.filter_scale,
        norm.weight, norm.mean, norm.var, n, as_bytes(mix.is_clean), batch, channels, stats.hw, norm.eps,
        **constants_of(norm),
    )  # fmt: skip
    return out


# --- ahead-of-time compilation


def cases(table: Table) -> Iterator[Case]:
    """Each kernel for two rows and one, with and without a filter scale."""
    for key, config in table.items():
        op = key.split("@")[0].split("/")[0]
        if op in OPS:
            for batch, channels in ((256, 64), (5, 33), (1024, 512), (1, 1)):
                for rows, has_scale in ((2, True), (1, False)):
                    title = f"{key} {batch}×{channels}, {rows} row{'s' if rows == 2 else ''}"
                    title += ", filter_scale" if has_scale else ""
                    yield _case(op, title, config, (batch, channels, rows, has_scale))


def _case(op: str, title: str, config: Config, shape: tuple[int, int, int, bool]) -> Case:
    batch, channels, rows, has_scale = shape
    c = torch.empty(batch, channels, device="meta")
    norm = meta_norm(rows, channels)
    is_clean = torch.empty(batch, dtype=torch.bool, device="meta") if rows == 2 else None
    mix = SimpleNamespace(filter_scale=c if has_scale else None, is_clean=is_clean)
    stats, n = SimpleNamespace(mean=c, m2=c, hw=1024), torch.empty(rows, device="meta")

    def run() -> object:
        if op == "batch_statistics":
            return batch_statistics(stats, mix, rows, config)
        if op == "train_coefficients":
            return train_coefficients(norm, mix, batch, config)
        totals = train_sums((c, c, c), norm, mix, config)
        for given in (None, totals):
            train_gradients((c, c, c), stats, norm, n, mix, has_scale, given, config)
        return totals

    return Case(title, run, quick=rows == 2 and batch == 256)

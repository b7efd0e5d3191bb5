"""The [B, C] algebra of the layer: awnet/ops/coefficients.py has the formulas, docs/equations.md proves them.

Tables of the batch norm have K rows (affine) or S rows (statistics), each 1 or 2: 0 adversarial, 1 clean.
Everything is float32. Sums over samples are taken in a fixed order; a sample never enters the other row's
sum, not even as NaN · 0.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Case, Table, launch, power_of_two

OPS = (
    "testing_coefficients",
    "testing_gradients",
    "batch_statistics",
    "training_coefficients",
    "training_gradients",
)


# --- kernels


@triton.jit
def _row(table, row, channel, channels, exists):
    return tl.load(table + row * channels + channel, mask=exists, other=0.0)


@triton.jit
def _inv_std(var, eps):
    return tl.rsqrt(var + eps)


@triton.jit
def _tile(sample, channel, batch, channels):
    """Addresses [SAMPLES, CHANNELS] and which exist."""
    places = sample[:, None] * channels + channel[None, :]
    return places, (sample < batch)[:, None] & (channel < channels)[None, :]


@triton.jit
def _own_tile(channels, SAMPLES: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's samples and channels in a grid of tiles, and which of the channels exist."""
    groups = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    channel = (program % groups) * CHANNELS + tl.arange(0, CHANNELS)
    return sample, channel, channel < channels


@triton.jit
def _own_channels(channels, CHANNELS: tl.constexpr):
    """The channels of a program that takes all samples in steps, and which exist."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    return channel, channel < channels


@triton.jit
def _step(step, channel, is_clean, batch, channels, SAMPLES: tl.constexpr):
    """A step's samples: their numbers, addresses [SAMPLES, CHANNELS], which exist, and which are clean."""
    sample = step * SAMPLES + tl.arange(0, SAMPLES).to(tl.int64)
    places, mask = _tile(sample, channel, batch, channels)
    return sample, places, mask, _is_clean(is_clean, sample, batch)


@triton.jit
def _scaled(x, omega, places, mask):
    if omega is not None:
        x = x * tl.load(omega + places, mask=mask, other=0.0)
    return x


@triton.jit
def _is_clean(is_clean, sample, batch):
    """[SAMPLES, 1]; all adversarial, hence row 0, where there is one row."""
    if is_clean is not None:
        clean = tl.load(is_clean + sample, mask=sample < batch, other=0) != 0
    else:
        clean = sample < 0
    return clean[:, None]


@triton.jit
def _own_row(table, clean, channel, channels, exists, ROWS: tl.constexpr):
    """Each sample's row of ``table``: [SAMPLES or 1, CHANNELS]."""
    first = _row(table, 0, channel, channels, exists)[None, :]
    if ROWS == 2:
        first = tl.where(clean, _row(table, 1, channel, channels, exists)[None, :], first)
    return first


@triton.jit
def _sums(x, clean, mask, ROWS: tl.constexpr):
    """Sums of the two rows' own samples; with one row the sum of all, twice."""
    if ROWS == 2:
        zeroth = tl.sum(tl.where(mask & (clean == 0), x, 0.0), 0)
        first = tl.sum(tl.where(mask & clean, x, 0.0), 0)
    else:
        zeroth = tl.sum(tl.where(mask, x, 0.0), 0)
        first = zeroth
    return zeroth, first


@triton.jit
def _branch(
    weight, bias, mean, var, eps, k: tl.constexpr, channel, channels, exists, K: tl.constexpr, S: tl.constexpr
):
    """Branch ``k``: gain γ/σ, offset β − μγ/σ, μ, 1/σ, β; each [1, CHANNELS]."""
    a: tl.constexpr = k if K == 2 else 0
    s: tl.constexpr = k if S == 2 else 0
    inv_std = _inv_std(_row(var, s, channel, channels, exists), eps)
    gain = _row(weight, a, channel, channels, exists) * inv_std
    mu = _row(mean, s, channel, channels, exists)
    beta = _row(bias, a, channel, channels, exists)
    return gain[None, :], (beta - mu * gain)[None, :], mu[None, :], inv_std[None, :], beta[None, :]


@triton.jit
def testing_coefficients_kernel(
    scale_out,
    shift_out,
    omega,
    weight,
    bias,
    mean,
    var,
    p_clean,
    batch,
    channels,
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, channel, exists = _own_tile(channels, SAMPLES, CHANNELS)
    places, mask = _tile(sample, channel, batch, channels)
    scale, shift, _, _, _ = _branch(weight, bias, mean, var, eps, 0, channel, channels, exists, K, S)
    if K == 2 or S == 2:
        gain, offset, _, _, _ = _branch(weight, bias, mean, var, eps, 1, channel, channels, exists, K, S)
        p = tl.load(p_clean + sample, mask=sample < batch, other=0.0)[:, None]
        scale = (1.0 - p) * scale + p * gain
        shift = (1.0 - p) * shift + p * offset
    scale = _scaled(tl.broadcast_to(scale, [SAMPLES, CHANNELS]), omega, places, mask)
    tl.store(scale_out + places, scale, mask=mask)
    tl.store(shift_out + places, tl.broadcast_to(shift, [SAMPLES, CHANNELS]), mask=mask)


@triton.jit
def testing_gradients_kernel(
    d_omega,
    d_p,
    d_weight,
    d_bias,
    g1,
    gc,
    centre,
    omega,
    weight,
    bias,
    mean,
    var,
    p_clean,
    batch,
    channels,
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """All channels of SAMPLES samples; d_weight and d_bias [programs, K, C] get this program's sums.

    d_omega, d_p, and d_weight with d_bias are None where nobody asks for them.
    """
    program = tl.program_id(0).to(tl.int64)
    sample = program * SAMPLES + tl.arange(0, SAMPLES)
    sums = program * (K * channels)
    by_p = tl.zeros([SAMPLES], tl.float32)
    for step in range(STEPS):
        channel = step * CHANNELS + tl.arange(0, CHANNELS)
        exists = channel < channels
        places, mask = _tile(sample, channel, batch, channels)
        gain_0, _, mu_0, inv_std_0, bias_0 = _branch(
            weight, bias, mean, var, eps, 0, channel, channels, exists, K, S
        )
        own_g1 = tl.load(g1 + places, mask=mask, other=0.0)
        own_gc = tl.load(gc + places, mask=mask, other=0.0)
        own_centre = tl.load(centre + places, mask=mask, other=0.0)
        scaled_gc = _scaled(own_gc, omega, places, mask)
        scaled_centre = _scaled(own_centre, omega, places, mask)
        # Σ g (ωu − μ_k) without the difference of two large sums
        about_0 = scaled_gc + (scaled_centre - mu_0) * own_g1
        if K == 2 or S == 2:
            gain_1, _, mu_1, inv_std_1, bias_1 = _branch(
                weight, bias, mean, var, eps, 1, channel, channels, exists, K, S
            )
            p = tl.load(p_clean + sample, mask=sample < batch, other=0.0)[:, None]
            q = 1.0 - p
            about_1 = scaled_gc + (scaled_centre - mu_1) * own_g1
            gain = q * gain_0 + p * gain_1
            d_weight_0, d_weight_1 = q * about_0 * inv_std_0, p * about_1 * inv_std_1
            d_bias_0, d_bias_1 = q * own_g1, p * own_g1
            if K == 1:
                d_weight_0 += d_weight_1
                d_bias_0 += d_bias_1
            elif d_weight is not None:
                column = sums + channels + channel
                tl.store(d_weight + column, tl.sum(tl.where(mask, d_weight_1, 0.0), 0), mask=exists)
                tl.store(d_bias + column, tl.sum(tl.where(mask, d_bias_1, 0.0), 0), mask=exists)
            if d_p is not None:
                difference = gain_1 * about_1 + bias_1 * own_g1 - (gain_0 * about_0 + bias_0 * own_g1)
                by_p += tl.sum(tl.where(mask, difference, 0.0), 1)
        else:
            gain = gain_0
            d_weight_0, d_bias_0 = about_0 * inv_std_0, own_g1
        if d_weight is not None:
            tl.store(d_weight + sums + channel, tl.sum(tl.where(mask, d_weight_0, 0.0), 0), mask=exists)
            tl.store(d_bias + sums + channel, tl.sum(tl.where(mask, d_bias_0, 0.0), 0), mask=exists)
        if d_omega is not None:
            tl.store(d_omega + places, (own_gc + own_centre * own_g1) * gain, mask=mask)
    if d_p is not None:
        tl.store(d_p + sample, by_p, mask=sample < batch)


@triton.jit
def sum_parts_kernel(
    first_out, second_out, first, second, width, parts, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):
    """Sums over the leading axis of two [parts, width] tensors."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS).to(tl.int64)
    places, mask = _tile(part, column, parts, width)
    tl.store(
        first_out + column, tl.sum(tl.load(first + places, mask=mask, other=0.0), 0), mask=column < width
    )
    tl.store(
        second_out + column, tl.sum(tl.load(second + places, mask=mask, other=0.0), 0), mask=column < width
    )


@triton.jit
def batch_statistics_kernel(
    mean_out,
    var_out,
    n_out,
    mean,
    m2,
    omega,
    is_clean,
    batch,
    channels,
    pixels,
    S: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    channel, exists = _own_channels(channels, CHANNELS)
    hw = pixels * 1.0  # one pixel comes as a constant, which has no .to()
    total_0 = tl.zeros([CHANNELS], tl.float32)
    total_1 = tl.zeros([CHANNELS], tl.float32)
    count_0 = tl.zeros([1], tl.float32)
    count_1 = tl.zeros([1], tl.float32)
    for step in range(STEPS):
        sample, places, mask, clean = _step(step, channel, is_clean, batch, channels, SAMPLES)
        x = _scaled(tl.load(mean + places, mask=mask, other=0.0), omega, places, mask)
        zeroth, first = _sums(x, clean, mask, S)
        total_0 += zeroth
        total_1 += first
        ones = tl.full([SAMPLES, 1], 1.0, tl.float32)
        zeroth, first = _sums(ones, clean, (sample < batch)[:, None], S)
        count_0 += zeroth
        count_1 += first
    mu_0 = total_0 / tl.maximum(count_0, 1.0)
    mu_1 = total_1 / tl.maximum(count_1, 1.0)
    spread_0 = tl.zeros([CHANNELS], tl.float32)
    spread_1 = tl.zeros([CHANNELS], tl.float32)
    for step in range(STEPS):
        _, places, mask, clean = _step(step, channel, is_clean, batch, channels, SAMPLES)
        x = _scaled(tl.load(mean + places, mask=mask, other=0.0), omega, places, mask)
        own = x - tl.where(clean, mu_1[None, :], mu_0[None, :])
        within = _scaled(tl.load(m2 + places, mask=mask, other=0.0), omega, places, mask)
        spread = _scaled(within, omega, places, mask) + hw * own * own
        zeroth, first = _sums(spread, clean, mask, S)
        spread_0 += zeroth
        spread_1 += first
    tl.store(mean_out + channel, mu_0, mask=exists)
    tl.store(var_out + channel, spread_0 / (tl.maximum(count_0, 1.0) * hw), mask=exists)
    once = tl.arange(0, 1) + tl.program_id(0) == 0
    tl.store(n_out + tl.arange(0, 1), count_0 * hw, mask=once)
    if S == 2:
        tl.store(mean_out + channels + channel, mu_1, mask=exists)
        tl.store(var_out + channels + channel, spread_1 / (tl.maximum(count_1, 1.0) * hw), mask=exists)
        tl.store(n_out + 1 + tl.arange(0, 1), count_1 * hw, mask=once)


@triton.jit
def training_coefficients_kernel(
    scale_out,
    shift_out,
    omega,
    weight,
    bias,
    mean,
    var,
    is_clean,
    batch,
    channels,
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, channel, exists = _own_tile(channels, SAMPLES, CHANNELS)
    places, mask = _tile(sample, channel, batch, channels)
    clean = _is_clean(is_clean, sample, batch)
    inv_std = _inv_std(_own_row(var, clean, channel, channels, exists, S), eps)
    gain = _own_row(weight, clean, channel, channels, exists, K) * inv_std
    mu = _own_row(mean, clean, channel, channels, exists, S)
    shift = _own_row(bias, clean, channel, channels, exists, K) - mu * gain
    scale = _scaled(tl.broadcast_to(gain, [SAMPLES, CHANNELS]), omega, places, mask)
    tl.store(scale_out + places, scale, mask=mask)
    tl.store(shift_out + places, tl.broadcast_to(shift, [SAMPLES, CHANNELS]), mask=mask)


@triton.jit
def _training_sums(
    g1,
    gc,
    mean,
    omega,
    weight,
    batch_mean,
    batch_var,
    is_clean,
    batch,
    channel,
    channels,
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """∂γ and ∂β of both rows, and Σ γ g and Σ γ g x̂ over each row of the statistics."""
    exists = channel < channels
    weight_0 = tl.zeros([CHANNELS], tl.float32)
    weight_1 = tl.zeros([CHANNELS], tl.float32)
    bias_0 = tl.zeros([CHANNELS], tl.float32)
    bias_1 = tl.zeros([CHANNELS], tl.float32)
    a_0 = tl.zeros([CHANNELS], tl.float32)
    a_1 = tl.zeros([CHANNELS], tl.float32)
    d_0 = tl.zeros([CHANNELS], tl.float32)
    d_1 = tl.zeros([CHANNELS], tl.float32)
    for step in range(STEPS):
        _, places, mask, clean = _step(step, channel, is_clean, batch, channels, SAMPLES)
        inv_std = _inv_std(_own_row(batch_var, clean, channel, channels, exists, S), eps)
        gamma = _own_row(weight, clean, channel, channels, exists, K)
        own_g1 = tl.load(g1 + places, mask=mask, other=0.0)
        own_gc = _scaled(tl.load(gc + places, mask=mask, other=0.0), omega, places, mask)
        m = _scaled(tl.load(mean + places, mask=mask, other=0.0), omega, places, mask)
        d = m - _own_row(batch_mean, clean, channel, channels, exists, S)
        along = (own_gc + d * own_g1) * inv_std  # Σ g x̂
        zeroth, first = _sums(along, clean, mask, K)
        weight_0 += zeroth
        weight_1 += first
        zeroth, first = _sums(own_g1, clean, mask, K)
        bias_0 += zeroth
        bias_1 += first
        zeroth, first = _sums(gamma * own_g1, clean, mask, S)
        a_0 += zeroth
        a_1 += first
        zeroth, first = _sums(gamma * along, clean, mask, S)
        d_0 += zeroth
        d_1 += first
    return weight_0, weight_1, bias_0, bias_1, a_0, a_1, d_0, d_1


@triton.jit
def _store_rows(table, zeroth, first, channel, channels, exists, ROWS: tl.constexpr):
    tl.store(table + channel, zeroth, mask=exists)
    if ROWS == 2:
        tl.store(table + channels + channel, first, mask=exists)


@triton.jit
def training_sums_kernel(
    d_weight,
    d_bias,
    through,  # [2, S, C]
    g1,
    gc,
    mean,
    omega,
    weight,
    batch_mean,
    batch_var,
    is_clean,
    batch,
    channels,
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    channel, exists = _own_channels(channels, CHANNELS)
    weight_0, weight_1, bias_0, bias_1, a_0, a_1, d_0, d_1 = _training_sums(
        g1, gc, mean, omega, weight, batch_mean, batch_var, is_clean, batch, channel, channels, eps,
        K, S, SAMPLES, CHANNELS, STEPS,
    )  # fmt: skip
    _store_rows(d_weight, weight_0, weight_1, channel, channels, exists, K)
    _store_rows(d_bias, bias_0, bias_1, channel, channels, exists, K)
    _store_rows(through, a_0, a_1, channel, channels, exists, S)
    _store_rows(through + S * channels, d_0, d_1, channel, channels, exists, S)


@triton.jit
def training_gradients_kernel(
    d_omega,
    d_weight,
    d_bias,
    by_grad,
    by_input,
    constant,
    through,  # [2, S, C] of training_sums_kernel, other ranks' added; None: this kernel sums up
    g1,
    gc,
    mean,
    m2,
    omega,
    weight,
    batch_mean,
    batch_var,
    n,
    is_clean,
    batch,
    channels,
    pixels,
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    channel, exists = _own_channels(channels, CHANNELS)
    hw = pixels * 1.0  # one pixel comes as a constant, which has no .to()
    if through is None:
        weight_0, weight_1, bias_0, bias_1, a_0, a_1, d_0, d_1 = _training_sums(
            g1, gc, mean, omega, weight, batch_mean, batch_var, is_clean, batch, channel, channels, eps,
            K, S, SAMPLES, CHANNELS, STEPS,
        )  # fmt: skip
        _store_rows(d_weight, weight_0, weight_1, channel, channels, exists, K)
        _store_rows(d_bias, bias_0, bias_1, channel, channels, exists, K)
    else:
        a_0 = _row(through, 0, channel, channels, exists)
        a_1 = _row(through, S - 1, channel, channels, exists)
        d_0 = _row(through, S, channel, channels, exists)
        d_1 = _row(through, 2 * S - 1, channel, channels, exists)
    n_0 = tl.maximum(tl.load(n), 1.0)
    n_1 = tl.maximum(tl.load(n + S - 1), 1.0)
    for step in range(STEPS):
        _, places, mask, clean = _step(step, channel, is_clean, batch, channels, SAMPLES)
        inv_std = _inv_std(_own_row(batch_var, clean, channel, channels, exists, S), eps)
        gamma = _own_row(weight, clean, channel, channels, exists, K)
        own_mean = tl.load(mean + places, mask=mask, other=0.0)
        d = _scaled(own_mean, omega, places, mask)
        d -= _own_row(batch_mean, clean, channel, channels, exists, S)
        through_mean = tl.where(clean, (a_1 / n_1)[None, :], (a_0 / n_0)[None, :])
        through_var = tl.where(clean, (d_1 / n_1)[None, :], (d_0 / n_0)[None, :]) * inv_std
        scaled = _scaled(tl.broadcast_to(inv_std, [SAMPLES, CHANNELS]), omega, places, mask)
        tl.store(by_grad + places, gamma * scaled, mask=mask)
        tl.store(by_input + places, -_scaled(scaled * through_var, omega, places, mask), mask=mask)
        tl.store(constant + places, -scaled * (through_mean + through_var * d), mask=mask)
        if d_omega is not None:
            own_g1 = tl.load(g1 + places, mask=mask, other=0.0)
            own_gc = tl.load(gc + places, mask=mask, other=0.0)
            own_m2 = _scaled(tl.load(m2 + places, mask=mask, other=0.0), omega, places, mask)
            at_mean = gamma * own_g1 - hw * (through_mean + through_var * d)
            d_own = inv_std * (gamma * own_gc - through_var * own_m2 + own_mean * at_mean)
            tl.store(d_omega + places, d_own, mask=mask)


@triton.jit
def network_coefficients_kernel(
    scale_out,
    shift_out,
    omega,
    tables,
    layout,
    p_clean,
    batch,
    columns,
    omega_columns,
    eps,
    SAMPLES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Every layer's scale and shift: :class:`PackedNorms` says how ``tables`` and ``layout`` are laid out."""
    sample, column, exists = _own_tile(columns, SAMPLES, CHANNELS)
    mask = (sample < batch)[:, None] & exists[None, :]
    begin = tl.load(layout + column, mask=exists, other=0).to(tl.int64)
    width = tl.load(layout + columns + column, mask=exists, other=0)
    source = tl.load(layout + 2 * columns + column, mask=exists, other=-1)
    # weight, bias, mean, var: two rows each
    gain_0 = _row(tables, 0, column, columns, exists) * _inv_std(
        _row(tables, 6, column, columns, exists), eps
    )
    gain_1 = _row(tables, 1, column, columns, exists) * _inv_std(
        _row(tables, 7, column, columns, exists), eps
    )
    offset_0 = _row(tables, 2, column, columns, exists) - _row(tables, 4, column, columns, exists) * gain_0
    offset_1 = _row(tables, 3, column, columns, exists) - _row(tables, 5, column, columns, exists) * gain_1
    p = tl.load(p_clean + sample, mask=sample < batch, other=0.0)[:, None]
    scale = (1.0 - p) * gain_0[None, :] + p * gain_1[None, :]
    shift = (1.0 - p) * offset_0[None, :] + p * offset_1[None, :]
    if omega is not None:
        dynamic = mask & (source >= 0)[None, :]
        scale *= tl.load(omega + sample[:, None] * omega_columns + source[None, :], mask=dynamic, other=1.0)
    places = (begin * batch)[None, :] + sample[:, None] * width[None, :] + (column - begin)[None, :]
    tl.store(scale_out + places, scale, mask=mask)
    tl.store(shift_out + places, shift, mask=mask)


# --- launches


class Norm(NamedTuple):
    """A layer's batch norm: contiguous float32 ``[K, C]``, ``[K, C]``, ``[S, C]``, ``[S, C]``."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    @property
    def rows(self) -> dict[str, int]:
        return {"K": len(self.weight), "S": len(self.mean)}


def _sizes(batch: int, channels: int, how: Mapping[str, int]) -> tuple[int, int]:
    """SAMPLES and CHANNELS of a tile."""
    wide = min(power_of_two(channels), how["inner"])
    return min(power_of_two(batch), max(1, how["tile"] // wide)), wide


def _launch_tiles(
    kernel: object, batch: int, channels: int, how: Mapping[str, int], *arguments: object, **constants: int
) -> None:
    """One program for each tile of samples and channels."""
    samples, wide = _sizes(batch, channels, how)
    launch(
        kernel, -(-batch // samples) * -(-channels // wide), *arguments,
        SAMPLES=samples, CHANNELS=wide, warps=how["warps"], **constants,
    )  # fmt: skip


def _launch_channels(
    kernel: object, batch: int, channels: int, how: Mapping[str, int], *arguments: object, **constants: int
) -> None:
    """One program for each run of channels, which takes all samples in steps."""
    samples, wide = _sizes(batch, channels, how)
    launch(
        kernel, -(-channels // wide), *arguments,
        SAMPLES=samples, CHANNELS=wide, STEPS=power_of_two(-(-batch // samples)), warps=how["warps"],
        **constants,
    )  # fmt: skip


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def _bytes(is_clean: Tensor | None) -> Tensor | None:
    return None if is_clean is None else is_clean.view(torch.uint8)


def testing_coefficients(
    omega: Tensor | None,
    norm: Norm,
    p_clean: Tensor | None,
    eps: float,
    batch: int,
    how: Mapping[str, int],
    *,
    out: tuple[Tensor, Tensor] | None = None,  # noqa: PT028
) -> tuple[Tensor, Tensor]:
    """scale and shift [B, C] in test mode. All tensors contiguous float32; ``how``: tile, inner, warps."""
    channels = norm.weight.shape[1]
    if out is None:
        size = (batch, channels)
        out = (norm.weight.new_empty(size), norm.weight.new_empty(size))
    _launch_tiles(
        testing_coefficients_kernel, batch, channels, how,
        *out, omega, *norm, p_clean, batch, channels, eps, **norm.rows,
    )  # fmt: skip
    return out


class TestingGradients(NamedTuple):
    omega: Tensor | None  # [B, C]
    p_clean: Tensor | None  # [B]
    weight: Tensor | None  # [K, C]
    bias: Tensor | None  # [K, C]


def testing_gradients(
    g1: Tensor,
    gc: Tensor,
    centre: Tensor,
    omega: Tensor | None,
    norm: Norm,
    p_clean: Tensor | None,
    eps: float,
    needs: Sequence[bool],
    how: Mapping[str, int],
    *,
    out: TestingGradients | None = None,  # noqa: PT028
) -> TestingGradients:
    """Gradients in test mode. All tensors contiguous float32; ``how``: tile, inner, warps.

    ``needs``: whether ω's, p's, weight's and bias's are asked for; the last two come together or not at all.
    """
    batch, channels = g1.shape
    need_omega, need_p, *need_tables = needs
    if out is None:
        tables = (_like(norm.weight), _like(norm.weight)) if any(need_tables) else (None, None)
        out = TestingGradients(
            _like(g1) if need_omega else None, g1.new_empty(batch) if need_p else None, *tables
        )
    if batch == 0:
        for table in out[2:]:
            if table is not None:
                table.zero_()
        return out
    samples, wide = _sizes(batch, channels, how)
    programs = -(-batch // samples)
    sums = (out.weight, out.bias)
    if programs > 1 and out.weight is not None:
        size = (programs, *norm.weight.shape)
        sums = (g1.new_empty(size), g1.new_empty(size))
    launch(
        testing_gradients_kernel,
        programs,
        out.omega,
        out.p_clean,
        *sums,
        g1,
        gc,
        centre,
        omega,
        *norm,
        p_clean,
        batch,
        channels,
        eps,
        SAMPLES=samples,
        CHANNELS=wide,
        STEPS=power_of_two(-(-channels // wide)),
        warps=how["warps"],
        **norm.rows,
    )
    if programs > 1 and out.weight is not None:
        width, parts = norm.weight.numel(), power_of_two(programs)
        columns = min(power_of_two(width), max(1, how["tile"] // parts))
        launch(
            sum_parts_kernel,
            -(-width // columns),
            out.weight,
            out.bias,
            *sums,
            width,
            programs,
            COLUMNS=columns,
            PARTS=parts,
        )
    return out


class Statistics(NamedTuple):
    mean: Tensor  # [S, C]
    var: Tensor  # [S, C], biased
    n: Tensor  # [S]


def batch_statistics(
    mean: Tensor,
    m2: Tensor,
    hw: int,
    omega: Tensor | None,
    is_clean: Tensor | None,
    rows: int,
    how: Mapping[str, int],
    *,
    out: Statistics | None = None,
) -> Statistics:
    """Statistics of ω ⊙ u over each row's samples, from mean and M2 of u. ``how``: tile, inner, warps."""
    batch, channels = mean.shape
    if out is None:
        table = (rows, channels)
        out = Statistics(mean.new_empty(table), mean.new_empty(table), mean.new_empty(rows))
    if batch == 0:
        for x in out:
            x.zero_()
        return out
    _launch_channels(
        batch_statistics_kernel, batch, channels, how,
        *out, mean, m2, omega, _bytes(is_clean), batch, channels, hw, S=rows,
    )  # fmt: skip
    return out


def training_coefficients(
    omega: Tensor | None,
    norm: Norm,
    is_clean: Tensor | None,
    eps: float,
    batch: int,
    how: Mapping[str, int],
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """scale and shift [B, C] in training, ``norm`` with batch statistics. ``how``: tile, inner, warps."""
    channels = norm.weight.shape[1]
    if out is None:
        size = (batch, channels)
        out = (norm.weight.new_empty(size), norm.weight.new_empty(size))
    _launch_tiles(
        training_coefficients_kernel, batch, channels, how,
        *out, omega, *norm, _bytes(is_clean), batch, channels, eps, **norm.rows,
    )  # fmt: skip
    return out


class Sums(NamedTuple):
    weight: Tensor  # [K, C]
    bias: Tensor  # [K, C]
    through: Tensor  # [2, S, C]


def training_sums(
    g1: Tensor,
    gc: Tensor,
    mean: Tensor,
    omega: Tensor | None,
    bn_weight: Tensor,
    statistics: Statistics,
    is_clean: Tensor | None,
    eps: float,
    how: Mapping[str, int],
    *,
    out: Sums | None = None,
) -> Sums:
    """What :func:`training_gradients` sums over the batch. Arguments as there."""
    batch, channels = g1.shape
    if out is None:
        rows = (2, *statistics.mean.shape)
        out = Sums(_like(bn_weight), _like(bn_weight), g1.new_empty(rows))
    if batch == 0:
        for x in out:
            x.zero_()
        return out
    _launch_channels(
        training_sums_kernel, batch, channels, how,
        *out, g1, gc, mean, omega, bn_weight, statistics.mean, statistics.var, _bytes(is_clean),
        batch, channels, eps, K=len(bn_weight), S=len(statistics.mean),
    )  # fmt: skip
    return out


class TrainingGradients(NamedTuple):
    omega: Tensor | None  # [B, C]
    weight: Tensor  # [K, C]
    bias: Tensor  # [K, C]
    by_grad: Tensor  # [B, C], and so the next two: ∂u = by_grad g + by_input (u − mean) + constant
    by_input: Tensor
    constant: Tensor


def training_gradients(
    g1: Tensor,
    gc: Tensor,
    mean: Tensor,
    m2: Tensor,
    hw: int,
    omega: Tensor | None,
    bn_weight: Tensor,
    statistics: Statistics,
    is_clean: Tensor | None,
    eps: float,
    need_omega: bool,
    sums: Sums | None,
    how: Mapping[str, int],
    *,
    out: TrainingGradients | None = None,
) -> TrainingGradients:
    """Gradients in training. All tensors contiguous float32, is_clean bool; ``how``: tile, inner, warps.

    ``sums`` of :func:`training_sums`, where other ranks' have been added to ``sums.through``; else None.
    """
    batch, channels = g1.shape
    if out is None:
        tables = (_like(bn_weight), _like(bn_weight)) if sums is None else (sums.weight, sums.bias)
        coefficients = (_like(g1), _like(g1), _like(g1))
        out = TrainingGradients(_like(g1) if need_omega else None, *tables, *coefficients)
    if batch == 0:
        out.weight.zero_()
        out.bias.zero_()
        return out
    _launch_channels(
        training_gradients_kernel, batch, channels, how,
        *out, None if sums is None else sums.through, g1, gc, mean, m2, omega, bn_weight, *statistics,
        _bytes(is_clean), batch, channels, hw, eps, K=len(bn_weight), S=len(statistics.mean),
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class PackedNorms:
    """The batch norms of a network's layers in one table, so that one launch makes every scale and shift.

    Layer l of width C_l owns the columns [begin_l, begin_l + C_l) of T = Σ C_l. :func:`network_coefficients`
    writes its scale as a contiguous [B, C_l] block from element B · begin_l on of one flat buffer: each layer
    gets a view that the passes take as it is. ω of all dynamic layers is one [B, D] matrix, side by side in
    the layers' order, into whose slices a router's heads can write.
    """

    tables: Tensor  # [4, 2, T] float32: weight, bias, mean, var; adversarial, clean
    layout: Tensor  # [3, T] int32: begin_l, C_l, column of ω or -1
    widths: tuple[int, ...]  # C_l
    omega_width: int  # D
    eps: float

    @classmethod
    def pack(cls, norms: Sequence[Norm], dynamic: Sequence[bool], eps: float) -> PackedNorms:
        """Copies ``norms`` into a new table, one row twice; ``dynamic`` tells which layers have an ω."""
        if not norms or len(norms) != len(dynamic):
            raise ValueError(
                f"norms and dynamic must be as long as each other and not empty, got {len(norms)} and "
                f"{len(dynamic)}"
            )
        widths = tuple(norm.weight.shape[1] for norm in norms)
        device = norms[0].weight.device
        layout: list[tuple[int, int, int]] = []
        begin = omega = 0
        for width, has_omega in zip(widths, dynamic, strict=True):
            layout += [(begin, width, omega + i if has_omega else -1) for i in range(width)]
            begin += width
            omega += width if has_omega else 0
        packed = cls(
            torch.empty(4, 2, begin, device=device),
            torch.tensor(layout, dtype=torch.int32).T.contiguous().to(device),
            widths,
            omega,
            eps,
        )
        packed.refresh(norms)
        return packed

    @torch.no_grad()
    def refresh(self, norms: Sequence[Norm]) -> None:
        """Copies the norms' present values: a few launches into the same memory, fit for a CUDA graph."""
        columns = self.tables.split(self.widths, 2)
        targets = [table for own in columns for table in own.unbind(0)]
        sources = [table.detach().expand(2, -1) for norm in norms for table in norm]
        torch._foreach_copy_(targets, sources)


def network_coefficients(
    omega: Tensor | None,
    packed: PackedNorms,
    p_clean: Tensor,
    how: Mapping[str, int],
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """scale and shift [B, C_l] of every layer in test mode, in one launch.

    Args:
        omega: contiguous float32 [B, D], the dynamic layers' ω side by side; None where no layer has one.
        packed: the layers' batch norms.
        p_clean: contiguous float32 [B].
        how: launch parameters tile, inner, warps.
        out: two flat float32 buffers of B · T elements.
    """
    batch, columns = len(p_clean), sum(packed.widths)
    expected = (batch, packed.omega_width)
    if (omega is None) != (packed.omega_width == 0) or (omega is not None and omega.shape != expected):
        got = None if omega is None else list(omega.shape)
        raise ValueError(f"omega must have shape {list(expected)} (None where D is 0), got {got}")
    if out is None:
        out = (p_clean.new_empty(batch * columns), p_clean.new_empty(batch * columns))
    _launch_tiles(
        network_coefficients_kernel, batch, columns, how,
        *out, omega, packed.tables, packed.layout, p_clean, batch, columns, packed.omega_width, packed.eps,
    )  # fmt: skip
    sizes = [batch * width for width in packed.widths]
    blocks = zip(*(buffer.split(sizes) for buffer in out), packed.widths, strict=True)
    return [(scale.view(batch, width), shift.view(batch, width)) for scale, shift, width in blocks]


# --- what to compile ahead of time


def cases(table: Table) -> Iterator[Case]:
    """Each kernel for two rows and one, with ω and without, at every shipped set of launch parameters."""
    for key, how in table.items():
        op = key.split("@")[0]
        if op in OPS:
            for batch, channels in ((256, 64), (5, 33), (1024, 512), (1, 1)):
                for rows, scaled in ((2, True), (1, False)):
                    yield _case(op, key, how, batch, channels, rows, scaled)
        elif op == "network_coefficients":
            yield _network_case(key, how)


def _case(
    op: str, key: str, how: Mapping[str, int], batch: int, channels: int, rows: int, scaled: bool
) -> Case:
    c = torch.empty(batch, channels, device="meta")
    table = torch.empty(rows, channels, device="meta")
    norm = Norm(table, table, table, table)
    n = torch.empty(rows, device="meta")
    omega = c if scaled else None
    p = torch.empty(batch, device="meta") if rows == 2 else None
    clean = torch.empty(batch, dtype=torch.bool, device="meta") if rows == 2 else None
    statistics = Statistics(table, table, n)

    def run() -> object:
        if op == "testing_coefficients":
            return testing_coefficients(omega, norm, p, 1e-5, batch, how)
        if op == "testing_gradients":
            needs = (scaled, rows == 2, True, True)
            return testing_gradients(c, c, c, omega, norm, p, 1e-5, needs, how)
        if op == "batch_statistics":
            return batch_statistics(c, c, 1024, omega, clean, rows, how)
        if op == "training_coefficients":
            return training_coefficients(omega, norm, clean, 1e-5, batch, how)
        sums = training_sums(c, c, c, omega, table, statistics, clean, 1e-5, how)
        for given in (None, sums):
            training_gradients(c, c, c, c, 1024, omega, table, statistics, clean, 1e-5, scaled, given, how)
        return sums

    title = f"{key} {batch}×{channels}, {rows} row{'s' if rows == 2 else ''}{', ω' if scaled else ''}"
    return Case(title, run, quick=rows == 2 and batch == 256)


def _network_case(key: str, how: Mapping[str, int]) -> Case:
    widths = (64, 128, 256, 512)
    table = torch.empty(4, 2, sum(widths), device="meta")
    layout = torch.empty(3, sum(widths), dtype=torch.int32, device="meta")
    packed = PackedNorms(table, layout, widths, sum(widths), 1e-5)
    omega, p = torch.empty(256, sum(widths), device="meta"), torch.empty(256, device="meta")
    return Case(key, lambda: network_coefficients(omega, packed, p, how), quick=True)

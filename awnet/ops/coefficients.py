"""The layer's coefficients on [B, C]: scale and shift, and gradients from sums over pixels.

Every mode of the layer is ``y = act(u * scale + shift + residual)`` with ``u = conv(input, weight)``. This
file computes ``scale`` and ``shift`` in the forward, and gradients from the sums of the reduce pass backward.
``docs/equations.md`` derives each line. All tensors are float32 or wider.

A filter scale may have fewer columns than the norm: it belongs to the first ones, and is 1 in the rest. So a
network in eval mode is one layer with the channels of all layers side by side, followed by :func:`split`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from awnet.ops.args import Needs


class Norm(NamedTuple):
    """A batch norm's tables: row 0 adversarial, row 1 clean. In train mode the statistics are the batch's."""

    weight: Tensor  # γ [K, C], K = affine_rows
    bias: Tensor  # β [K, C]
    mean: Tensor  # μ [S, C], S = stat_rows
    var: Tensor  # σ² [S, C], biased
    eps: float

    @classmethod
    def stacked(cls, tables: Tensor, eps: float) -> Norm:
        """From weight, bias, mean and var in one tensor ``[4, rows, C]``."""
        weight, bias, mean, var = tables.unbind(0)
        return cls(weight, bias, mean, var, eps)


class Mix(NamedTuple):
    """The per-sample inputs of the coefficients."""

    filter_scale: Tensor | None = None  # ω [B, C]; None means 1
    p_clean: Tensor | None = None  # p [B], eval mode with two branches
    is_clean: Tensor | None = None  # [B] bool, train mode with two branches


class SampleStats(NamedTuple):
    """Statistics of u over each sample's pixels."""

    mean: Tensor  # m [B, C]
    m2: Tensor  # M2 [B, C], the centered sum of squares
    hw: int  # the number of pixels


class BatchStats(NamedTuple):
    """Statistics of ω ⊙ u over each branch's samples."""

    mean: Tensor  # [S, C]
    var: Tensor  # [S, C], biased
    n: Tensor  # [S], values per channel, 0 where a branch has no sample


class Reduced(NamedTuple):
    """The sums of the reduce pass."""

    g1: Tensor  # Σ g [B, C]
    gc: Tensor  # Σ g (u − center) [B, C]
    center: Tensor | None  # [B, C]; None means 0


class Gradients(NamedTuple):
    """Gradients of the [B, C] inputs; None where not required or where there is no such input."""

    filter_scale: Tensor | None = None  # [B, C]
    p_clean: Tensor | None = None  # [B]
    bn_weight: Tensor | None = None  # [K, C]
    bn_bias: Tensor | None = None  # [K, C]


class Propagation(NamedTuple):
    """∂u = by_grad · g + by_input · (u − center) + constant, each [B, C]; None means zero."""

    by_grad: Tensor
    by_input: Tensor | None = None
    constant: Tensor | None = None


class TrainSums(NamedTuple):
    """What a backward in train mode sums over the batch."""

    bn_weight: Tensor  # [K, C], the gradients of γ and β
    bn_bias: Tensor
    through: Tensor  # [2, S, C], Σ γ g and Σ γ g x̂ over all values that share the statistics


def _scaled(x: Tensor, filter_scale: Tensor | None) -> Tensor:
    """x · ω, where ω may cover the first columns only."""
    if filter_scale is None:
        return x
    width = filter_scale.shape[1]
    if width == x.shape[-1]:
        return x * filter_scale
    batch = filter_scale.shape[0]
    return torch.cat([x[..., :width] * filter_scale, x[..., width:].expand(batch, -1)], 1)


def _rows(table: Tensor, is_clean: Tensor | None, batch: int) -> Tensor:
    """Each sample's row of a table: [rows, C] → [B, C]."""
    if len(table) == 1:
        return table.expand(batch, -1)
    assert is_clean is not None
    return torch.where(is_clean[:, None], table[1], table[0])


def _sum_by_row(x: Tensor, is_clean: Tensor | None, rows: int) -> Tensor:
    """Sums each row's samples: [B, C] → [rows, C]. A NaN does not spread to the other row."""
    if rows == 1:
        return x.sum(0, keepdim=True)
    assert is_clean is not None
    zero = x.new_zeros(())
    clean = is_clean[:, None]
    return torch.stack([torch.where(clean, zero, x).sum(0), torch.where(clean, x, zero).sum(0)])


# --- eval mode and attacks: running statistics, branches weighted by p


class _Branches(NamedTuple):
    gain: list[Tensor]  # γ_k / σ_k, [C]
    offset: list[Tensor]  # β_k − μ_k γ_k / σ_k, [C]
    mean: list[Tensor]
    inv_std: list[Tensor]
    bias: list[Tensor]


def _branches(norm: Norm) -> _Branches:
    affine_rows, stat_rows = len(norm.weight), len(norm.mean)
    number = max(affine_rows, stat_rows)
    inv_std = torch.rsqrt(norm.var + norm.eps)
    means = [norm.mean[min(k, stat_rows - 1)] for k in range(number)]
    stds = [inv_std[min(k, stat_rows - 1)] for k in range(number)]
    gains = [norm.weight[min(k, affine_rows - 1)] * stds[k] for k in range(number)]
    biases = [norm.bias[min(k, affine_rows - 1)] for k in range(number)]
    offsets = [biases[k] - means[k] * gains[k] for k in range(number)]
    return _Branches(gains, offsets, means, stds, biases)


def _probabilities(p_clean: Tensor | None, number: int) -> list[Tensor | None]:
    if number == 1:
        return [None]
    assert p_clean is not None
    return [1 - p_clean[:, None], p_clean[:, None]]


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def _blend(values: list[Tensor], weights: list[Tensor | None]) -> Tensor:
    total = _weighted(values[0], weights[0])
    return total if len(values) == 1 else total + _weighted(values[1], weights[1])


def eval_coefficients(norm: Norm, mix: Mix, batch: int) -> tuple[Tensor, Tensor]:
    """scale = ω Σ_k w_k γ_k/σ_k, shift = Σ_k w_k (β_k − μ_k γ_k/σ_k) with w = (1 − p, p), Eq. 14; [B, C]."""
    branch = _branches(norm)
    weights = _probabilities(mix.p_clean, len(branch.gain))
    scale = _scaled(_blend(branch.gain, weights), mix.filter_scale)
    shift = _blend(branch.offset, weights)
    return scale.expand(batch, -1), shift.expand(batch, -1)


def split(scale: Tensor, shift: Tensor, widths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The contiguous (scale, shift) of each layer, from those of all layers side by side, [B, Σ widths]."""
    pairs = zip(scale.split(list(widths), 1), shift.split(list(widths), 1), strict=True)
    return [(a.contiguous(), b.contiguous()) for a, b in pairs]


def eval_gradients(sums: Reduced, norm: Norm, mix: Mix, needs: Needs) -> Gradients:
    """The gradients of ``needs`` in eval mode from G1 = Σ g and Gc = Σ g (u − center)."""
    g1, gc, center = sums
    branch = _branches(norm)
    number = len(branch.gain)
    weights = _probabilities(mix.p_clean, number)
    filter_scale = mix.filter_scale
    d_filter_scale = d_p = d_weight = d_bias = None
    if needs.filter_scale:
        d_filter_scale = (gc if center is None else gc + center * g1) * _blend(branch.gain, weights)
        if filter_scale is not None:
            d_filter_scale = d_filter_scale[:, : filter_scale.shape[1]]
    # Σ g (ωu − μ_k) without the difference of two large sums: ω Gc + (ω center − μ_k) G1
    scaled_gc = _scaled(gc, filter_scale)
    scaled_center: Tensor | float = 0.0 if center is None else _scaled(center, filter_scale)
    about_mean = [scaled_gc + (scaled_center - branch.mean[k]) * g1 for k in range(number)]
    if needs.p_clean:
        by_branch = [branch.gain[k] * about_mean[k] + branch.bias[k] * g1 for k in range(2)]
        d_p = (by_branch[1] - by_branch[0]).sum(1)
    if needs.bn_weight:
        rows = [_weighted(about_mean[k] * branch.inv_std[k], weights[k]).sum(0) for k in range(number)]
        d_weight = torch.stack(rows)
    if needs.bn_bias:
        d_bias = torch.stack([_weighted(g1, weights[k]).sum(0) for k in range(number)])
    if len(norm.weight) < number:  # both branches share one affine row
        d_weight, d_bias = (None if x is None else x.sum(0, keepdim=True) for x in (d_weight, d_bias))
    return Gradients(d_filter_scale, d_p, d_weight, d_bias)


# --- train mode: batch statistics of each branch's samples


def batch_statistics(stats: SampleStats, mix: Mix, stat_rows: int) -> BatchStats:
    """μ_k and v_k of ω ⊙ u from the per-sample m and M2 of u, by Chan's update (never E[x²] − μ²)."""
    filter_scale, is_clean, hw = mix.filter_scale, mix.is_clean, stats.hw
    scaled_mean = _scaled(stats.mean, filter_scale)
    samples = _sum_by_row(torch.ones_like(scaled_mean[:, :1]), is_clean, stat_rows)  # [S, 1]
    divisor = samples.clamp(min=1)
    mu = _sum_by_row(scaled_mean, is_clean, stat_rows) / divisor
    distance = scaled_mean - _rows(mu, is_clean if stat_rows == 2 else None, len(scaled_mean))
    spread = _scaled(_scaled(stats.m2, filter_scale), filter_scale) + hw * distance.square()
    var = _sum_by_row(spread, is_clean, stat_rows) / (divisor * hw)
    return BatchStats(mu, var, samples[:, 0] * hw)


class _Samples(NamedTuple):
    """The tables' rows that belong to each sample, [B, C]."""

    weight: Tensor
    mean: Tensor
    inv_std: Tensor


def _samples(norm: Norm, is_clean: Tensor | None, batch: int) -> _Samples:
    inv_std = torch.rsqrt(norm.var + norm.eps)
    return _Samples(*(_rows(table, is_clean, batch) for table in (norm.weight, norm.mean, inv_std)))


def train_coefficients(norm: Norm, mix: Mix, batch: int) -> tuple[Tensor, Tensor]:
    """scale = ω γ_k/σ_k and shift = β_k − μ_k γ_k/σ_k for each sample's branch k, Eq. 13; both [B, C]."""
    sample = _samples(norm, mix.is_clean, batch)
    gain = sample.weight * sample.inv_std
    shift = _rows(norm.bias, mix.is_clean, batch) - sample.mean * gain
    return _scaled(gain, mix.filter_scale), shift


def train_sums(sums: Reduced, norm: Norm, mix: Mix) -> TrainSums:
    """The sums over the batch that :func:`train_gradients` needs, which ranks add up in between.

    The center of ``sums`` is each sample's mean m; the norm's bias is not read.
    """
    g1, gc, mean = sums
    assert mean is not None
    is_clean, affine_rows, stat_rows = mix.is_clean, len(norm.weight), len(norm.mean)
    sample = _samples(norm, is_clean, len(mean))
    d = _scaled(mean, mix.filter_scale) - sample.mean
    grad_dot_normalized = (_scaled(gc, mix.filter_scale) + d * g1) * sample.inv_std  # Σ_hw g · normalized
    return TrainSums(
        _sum_by_row(grad_dot_normalized, is_clean, affine_rows),
        _sum_by_row(g1, is_clean, affine_rows),
        torch.stack([_sum_by_row(sample.weight * x, is_clean, stat_rows) for x in (g1, grad_dot_normalized)]),
    )


def train_gradients(
    sums: Reduced,
    stats: SampleStats,
    norm: Norm,
    n: Tensor,
    mix: Mix,
    need_filter_scale: bool,
    totals: TrainSums | None = None,
) -> tuple[Gradients, Propagation]:
    """Gradients in train mode from G1 = Σ g and Gc = Σ g (u − m), and the coefficients of ∂u.

    Args:
        sums, norm, mix: as in :func:`train_sums`.
        stats: the per-sample statistics of u.
        n: values per channel of each branch, ``[S]``.
        need_filter_scale: whether ω's gradient is required.
        totals: this batch's sums, with ``through`` of all batches that share the statistics; None where this
            batch is the only one.
    """
    if totals is None:
        totals = train_sums(sums, norm, mix)
    is_clean, filter_scale, batch = mix.is_clean, mix.filter_scale, len(stats.mean)
    sample = _samples(norm, is_clean, batch)
    count = _rows(n[:, None].clamp(min=1), is_clean, batch)  # [B, 1]
    d = _scaled(stats.mean, filter_scale) - sample.mean
    # gradients through the statistics of each sample's branch
    through_mean = _rows(totals.through[0], is_clean, batch) / count
    through_var = _rows(totals.through[1], is_clean, batch) * sample.inv_std / count

    scaled_inv_std = _scaled(sample.inv_std, filter_scale)
    propagation = Propagation(
        by_grad=sample.weight * scaled_inv_std,
        by_input=-_scaled(scaled_inv_std * through_var, filter_scale),
        constant=-scaled_inv_std * (through_mean + through_var * d),
    )
    d_filter_scale = None
    if need_filter_scale:
        assert filter_scale is not None
        at_mean = sample.weight * sums.g1 - stats.hw * (through_mean + through_var * d)
        spread = sample.weight * sums.gc - through_var * filter_scale * stats.m2
        d_filter_scale = sample.inv_std * (spread + stats.mean * at_mean)
    return Gradients(d_filter_scale, None, totals.bn_weight, totals.bn_bias), propagation

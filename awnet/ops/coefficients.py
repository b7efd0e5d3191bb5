"""The [B, C] mathematics of the layer: what is left when the images are summed up.

Every mode of the layer is ``y = act(u * scale + shift + residual)`` with ``u = conv(input, weight)``. This
file makes ``scale`` and ``shift`` (forward) and turns the sums of the reduce pass into gradients (backward).
``docs/equations.md`` derives each line. All arguments are float32 or wider.

Symbols: ``mean`` m and ``m2`` M2 [B, C] of u; ``omega`` ω [B, C] or None (ω ≡ 1); ``g1`` Σ g and ``gc``
Σ g (u − centre) [B, C]; ``hw`` the number of pixels. Affine parameters have K rows and statistics S rows,
each 1 or 2: row 0 adversarial, row 1 clean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from awnet.ops.args import Needs


class Gradients(NamedTuple):
    """Gradients of the [B, C] quantities; None where the layer has no such input."""

    filter_scale: Tensor | None  # [B, C]
    p_clean: Tensor | None  # [B]
    bn_weight: Tensor | None  # [K, C]
    bn_bias: Tensor | None  # [K, C]


class Propagation(NamedTuple):
    """∂u = by_grad · g + by_input · (u − mean) + constant, each [B, C]; None means zero."""

    by_grad: Tensor
    by_input: Tensor | None
    constant: Tensor | None


class BatchStatistics(NamedTuple):
    """Statistics of ω ⊙ u over each branch's own samples."""

    mean: Tensor  # [S, C]
    var: Tensor  # [S, C], biased
    n: Tensor  # [S], N_k: values per channel, 0 where a branch has no sample


class Sums(NamedTuple):
    """What a backward in training sums over the batch."""

    bn_weight: Tensor  # [K, C], the gradients of γ and β
    bn_bias: Tensor
    through: Tensor  # [2, S, C], Σ γ g and Σ γ g x̂ over all values that share the statistics


def _times(x: Tensor, omega: Tensor | None) -> Tensor:
    return x if omega is None else x * omega


def _rows(table: Tensor, is_clean: Tensor | None, batch: int) -> Tensor:
    """Each sample's own row: [rows, C] → [B, C]."""
    if len(table) == 1:
        return table.expand(batch, -1)
    assert is_clean is not None
    return torch.where(is_clean[:, None], table[1], table[0])


def _sum_by_row(x: Tensor, is_clean: Tensor | None, rows: int) -> Tensor:
    """Sums each row's own samples: [B, C] → [rows, C]. A sample never touches the other row, NaN or not."""
    if rows == 1:
        return x.sum(0, keepdim=True)
    assert is_clean is not None
    zero = x.new_zeros(())
    clean = is_clean[:, None]
    return torch.stack([torch.where(clean, zero, x).sum(0), torch.where(clean, x, zero).sum(0)])


# --- testing and attack: running statistics, branches weighted by p


class _Branches(NamedTuple):
    gain: list[Tensor]  # γ_k / σ_k, [C]
    offset: list[Tensor]  # β_k − μ_k γ_k / σ_k, [C]
    mean: list[Tensor]
    inv_std: list[Tensor]
    bias: list[Tensor]


def _branches(bn_weight: Tensor, bn_bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> _Branches:
    number = max(len(bn_weight), len(mean))
    inv_std = torch.rsqrt(var + eps)
    means = [mean[min(k, len(mean) - 1)] for k in range(number)]
    stds = [inv_std[min(k, len(mean) - 1)] for k in range(number)]
    gains = [bn_weight[min(k, len(bn_weight) - 1)] * stds[k] for k in range(number)]
    biases = [bn_bias[min(k, len(bn_weight) - 1)] for k in range(number)]
    offsets = [biases[k] - means[k] * gains[k] for k in range(number)]
    return _Branches(gains, offsets, means, stds, biases)


def _probabilities(p_clean: Tensor | None, number: int) -> list[Tensor | None]:
    if number == 1:
        return [None]
    assert p_clean is not None
    return [1 - p_clean[:, None], p_clean[:, None]]


def _mix(values: list[Tensor], weights: list[Tensor | None]) -> Tensor:
    total = _times(values[0], weights[0])
    return total if len(values) == 1 else total + _times(values[1], weights[1])


def testing_coefficients(
    omega: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    p_clean: Tensor | None,
    eps: float,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """scale = ω Σ_k w_k γ_k/σ_k, shift = Σ_k w_k (β_k − μ_k γ_k/σ_k) with w = (1 − p, p), Eq. 14; [B, C]."""
    branch = _branches(bn_weight, bn_bias, running_mean, running_var, eps)
    weights = _probabilities(p_clean, len(branch.gain))
    scale = _times(_mix(branch.gain, weights), omega)
    shift = _mix(branch.offset, weights)
    return scale.expand(batch, -1), shift.expand(batch, -1)


def testing_gradients(
    g1: Tensor,
    gc: Tensor,
    centre: Tensor,
    omega: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    p_clean: Tensor | None,
    eps: float,
    needs: Needs,
) -> Gradients:
    """The gradients of ``needs`` in test mode from G1 = Σ g and Gc = Σ g (u − centre)."""
    branch = _branches(bn_weight, bn_bias, running_mean, running_var, eps)
    number = len(branch.gain)
    weights = _probabilities(p_clean, number)
    d_omega = d_p = d_weight = d_bias = None
    if needs.filter_scale:
        d_omega = (gc + centre * g1) * _mix(branch.gain, weights)
    # Σ g (ωu − μ_k) without the difference of two large sums: ω Gc + (ω centre − μ_k) G1
    scaled_gc, scaled_centre = _times(gc, omega), _times(centre, omega)
    about_mean = [scaled_gc + (scaled_centre - branch.mean[k]) * g1 for k in range(number)]
    if needs.p_clean:
        by_branch = [branch.gain[k] * about_mean[k] + branch.bias[k] * g1 for k in range(2)]
        d_p = (by_branch[1] - by_branch[0]).sum(1)
    if needs.bn_weight:
        rows = [_times(about_mean[k] * branch.inv_std[k], weights[k]).sum(0) for k in range(number)]
        d_weight = torch.stack(rows)
    if needs.bn_bias:
        d_bias = torch.stack([_times(g1, weights[k]).sum(0) for k in range(number)])
    if len(bn_weight) < number:  # both branches have one affine row
        d_weight, d_bias = (None if x is None else x.sum(0, keepdim=True) for x in (d_weight, d_bias))
    return Gradients(d_omega, d_p, d_weight, d_bias)


# --- training: batch statistics of each branch's own samples


def batch_statistics(
    mean: Tensor, m2: Tensor, hw: int, omega: Tensor | None, is_clean: Tensor | None, rows: int
) -> BatchStatistics:
    """μ_k and v_k of ω ⊙ u from the per-sample m and M2 of u, by Chan's update (never E[x²] − μ²)."""
    scaled_mean = _times(mean, omega)
    samples = _sum_by_row(torch.ones_like(scaled_mean[:, :1]), is_clean, rows)  # [S, 1]
    divisor = samples.clamp(min=1)
    mu = _sum_by_row(scaled_mean, is_clean, rows) / divisor
    own = scaled_mean - _rows(mu, is_clean if rows == 2 else None, len(mean))
    spread = _times(_times(m2, omega), omega) + hw * own.square()
    var = _sum_by_row(spread, is_clean, rows) / (divisor * hw)
    return BatchStatistics(mu, var, samples[:, 0] * hw)


def training_coefficients(
    omega: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    statistics: BatchStatistics,
    is_clean: Tensor | None,
    eps: float,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """scale = ω γ_k/σ_k and shift = β_k − μ_k γ_k/σ_k for each sample's own branch k, Eq. 13; both [B, C]."""
    inv_std = _rows(torch.rsqrt(statistics.var + eps), is_clean, batch)
    gain = _rows(bn_weight, is_clean, batch) * inv_std
    shift = _rows(bn_bias, is_clean, batch) - _rows(statistics.mean, is_clean, batch) * gain
    return _times(gain, omega), shift


def training_sums(
    g1: Tensor,
    gc: Tensor,
    mean: Tensor,
    omega: Tensor | None,
    bn_weight: Tensor,
    statistics: BatchStatistics,
    is_clean: Tensor | None,
    eps: float,
) -> Sums:
    """The sums over the batch behind :func:`training_gradients`, which ranks add up in between."""
    batch, rows = len(mean), len(statistics.mean)
    inv_std = _rows(torch.rsqrt(statistics.var + eps), is_clean, batch)
    gamma = _rows(bn_weight, is_clean, batch)
    d = _times(mean, omega) - _rows(statistics.mean, is_clean, batch)
    along = (_times(gc, omega) + d * g1) * inv_std  # Σ_hw g · normalised
    return Sums(
        _sum_by_row(along, is_clean, len(bn_weight)),
        _sum_by_row(g1, is_clean, len(bn_weight)),
        torch.stack([_sum_by_row(gamma * x, is_clean, rows) for x in (g1, along)]),
    )


def training_gradients(
    g1: Tensor,
    gc: Tensor,
    mean: Tensor,
    m2: Tensor,
    hw: int,
    omega: Tensor | None,
    bn_weight: Tensor,
    statistics: BatchStatistics,
    is_clean: Tensor | None,
    eps: float,
    need_scale: bool,
    sums: Sums | None = None,
) -> tuple[Gradients, Propagation]:
    """Gradients in training mode from G1 = Σ g and Gc = Σ g (u − m), and the coefficients of ∂u.

    ``sums``: this batch's, with ``through`` of all batches that share the statistics; None: there is but one.
    """
    if sums is None:
        sums = training_sums(g1, gc, mean, omega, bn_weight, statistics, is_clean, eps)
    batch = len(mean)
    inv_std = _rows(torch.rsqrt(statistics.var + eps), is_clean, batch)
    gamma = _rows(bn_weight, is_clean, batch)
    n = _rows(statistics.n[:, None].clamp(min=1), is_clean, batch)  # [B, 1]
    d = _times(mean, omega) - _rows(statistics.mean, is_clean, batch)
    # what reaches each sample through its statistics
    through_mean = _rows(sums.through[0], is_clean, batch) / n
    through_var = _rows(sums.through[1], is_clean, batch) * inv_std / n

    scaled_inv_std = _times(inv_std, omega)
    propagation = Propagation(
        by_grad=gamma * scaled_inv_std,
        by_input=-_times(scaled_inv_std * through_var, omega),
        constant=-scaled_inv_std * (through_mean + through_var * d),
    )
    d_omega = None
    if need_scale:
        assert omega is not None
        at_mean = gamma * g1 - hw * (through_mean + through_var * d)
        d_omega = inv_std * (gamma * gc - through_var * omega * m2 + mean * at_mean)
    return Gradients(d_omega, None, sums.bn_weight, sums.bn_bias), propagation

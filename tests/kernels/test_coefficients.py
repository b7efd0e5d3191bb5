"""The [B, C] algebra on Triton against awnet/ops/coefficients.py in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from awnet.kernels import eval_coefficients as evaluated
from awnet.kernels import train_coefficients as trained
from support.interpreter import DEVICE, Guarded
from torch import Tensor

from awnet.ops import coefficients
from awnet.ops.args import Needs
from awnet.ops.coefficients import Mix, Norm

ROWS = [(2, 2), (2, 1), (1, 1), (1, 2)]
SIZES = [(1, 1), (5, 3), (13, 9)]
SMALL = {"tile": 32, "inner": 8, "warps": 4}  # 4 samples × 8 channels
LARGE = {"tile": 1024, "inner": 64, "warps": 4}
HW = 35
EPS = 1e-5
# sums of up to 13 terms in float32, of which the largest few cancel: 1e-6 would be the rounding of one
TOLERANCE = 1e-5


class Problem:
    """Random arguments in float32 between guard bands, and the same in float64."""

    def __init__(
        self, batch: int, channels: int, k: int, s: int, has_scale: bool, kinds: str = "mixed"
    ) -> None:
        self.guarded = Guarded()
        self.generator = torch.Generator().manual_seed(batch * 100 + channels)
        self.batch, self.channels, self.k, self.s = batch, channels, k, s
        image = (batch, channels)
        self.mean, self.g1, self.gc, self.center = (self.normal(*image) for _ in range(4))
        self.m2 = self.normal(*image).square() * HW
        self.filter_scale = self.normal(*image).abs() if has_scale else None
        two = max(k, s) == 2
        self.p = torch.rand(batch, generator=self.generator) if two else None
        clean = torch.rand(batch, generator=self.generator) < 0.5
        if kinds != "mixed":
            clean[:] = kinds == "clean"
        self.clean = clean if two else None
        self.table = self.normal(k, channels), self.normal(k, channels), self.normal(s, channels)
        self.var = self.normal(s, channels).abs() + 0.1

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def put(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else self.guarded.input(x.to(DEVICE))

    def new(self, *shape: int) -> Tensor:
        return self.guarded.output(torch.empty(shape, device=DEVICE))

    def norm(self) -> Norm:
        return Norm(*(self.put(x) for x in (*self.table, self.var)), EPS)

    def mix(self) -> Mix:
        is_clean = None if self.clean is None else self.clean.to(DEVICE)
        return Mix(self.put(self.filter_scale), self.put(self.p), is_clean)

    def exact(self) -> tuple[Tensor, ...]:
        return tuple(x.double() for x in (*self.table, self.var))

    def exact_norm(self) -> coefficients.Norm:
        return coefficients.Norm(*self.exact(), EPS)

    def exact_mix(self) -> coefficients.Mix:
        return coefficients.Mix(wide(self.filter_scale), wide(self.p), self.clean)


def wide(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.dtype != torch.bool else x


def assert_agrees(got: Tensor | None, expected: Tensor | None, scale: float | Tensor = 0.0) -> None:
    assert (got is None) == (expected is None)
    if got is not None and expected is not None:
        assert got.shape == expected.shape
        difference = float((got.double().cpu() - expected).abs().max()) if got.numel() else 0.0
        assert difference <= TOLERANCE * max(float(expected.abs().max()), float(scale))


every = pytest.mark.parametrize(
    ("k", "s", "has_scale"), [(*rows, has_scale) for rows, has_scale in product(ROWS, (True, False))]
)
tiles = pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])


@every
@tiles
def test_eval_coefficients_and_gradients_equal_float64(k: int, s: int, has_scale: bool, config: dict) -> None:
    for batch, channels in SIZES:
        x = Problem(batch, channels, k, s, has_scale)
        exact = x.exact_norm(), x.exact_mix()
        out = x.new(batch, channels), x.new(batch, channels)
        norm, mix = x.norm(), x.mix()
        got = evaluated.eval_coefficients(norm, mix, batch, config, out=out)
        for a, b in zip(got, coefficients.eval_coefficients(*exact, batch), strict=True):
            assert_agrees(a, b)

        buffers = (
            x.new(batch, channels) if has_scale else None,
            x.new(batch) if max(k, s) == 2 else None,
            x.new(k, channels),
            x.new(k, channels),
        )
        sums = coefficients.Reduced(*(x.put(v) for v in (x.g1, x.gc, x.center)))
        for needs in (
            Needs(filter_scale=has_scale, p_clean=max(k, s) == 2, bn_weight=True, bn_bias=True),
            Needs(filter_scale=has_scale),
        ):
            requested = tuple(v if need else None for v, need in zip(buffers, needs[2:6], strict=True))
            grads = evaluated.eval_gradients(sums, norm, mix, needs[2:6], config, out=requested)
            exact_sums = coefficients.Reduced(*(v.double() for v in (x.g1, x.gc, x.center)))
            expected = coefficients.eval_gradients(exact_sums, *exact, needs)
            for a, b in zip(grads, expected, strict=True):
                assert_agrees(a, b, scale=1.0)
        x.guarded.check()


@every
@tiles
def test_train_coefficients_and_gradients_equal_float64(
    k: int, s: int, has_scale: bool, config: dict
) -> None:
    for (batch, channels), kinds in zip(SIZES, ("clean", "adversarial", "mixed"), strict=True):
        x = Problem(batch, channels, k, s, has_scale, kinds)
        norm, mix = x.norm(), x.mix()
        stats = coefficients.SampleStats(x.put(x.mean), x.put(x.m2), HW)
        exact_stats, exact_mix = coefficients.SampleStats(x.mean.double(), x.m2.double(), HW), x.exact_mix()

        out = x.new(s, channels), x.new(s, channels), x.new(s)
        got = coefficients.BatchStats(*trained.batch_statistics(stats, mix, s, config, out=out))
        for a, b in zip(got, coefficients.batch_statistics(exact_stats, exact_mix, s), strict=True):
            assert_agrees(a, b)

        batch_norm = norm._replace(mean=got.mean, var=got.var)
        pair = x.new(batch, channels), x.new(batch, channels)
        # evaluated at the statistics that the kernel was given: a variance near 0 magnifies their rounding
        given = coefficients.BatchStats(*(v.double().cpu() for v in got))
        exact_norm = x.exact_norm()._replace(mean=given.mean, var=given.var)
        expected_pair = coefficients.train_coefficients(exact_norm, exact_mix, batch)
        got_pair = trained.train_coefficients(batch_norm, mix, batch, config, out=pair)
        for a, b in zip(got_pair, expected_pair, strict=True):
            assert_agrees(a, b)

        sums = coefficients.Reduced(x.put(x.g1), x.put(x.gc), stats.mean)
        exact_sums = coefficients.Reduced(x.g1.double(), x.gc.double(), exact_stats.mean)
        out = x.new(k, channels), x.new(k, channels), x.new(2, s, channels)
        local_sums = coefficients.TrainSums(*trained.train_sums(sums, batch_norm, mix, config, out=out))
        exact_own = coefficients.train_sums(exact_sums, exact_norm, exact_mix)
        for a, b in zip(local_sums, exact_own, strict=True):
            assert_agrees(a, b)
        # alone, and where another rank has added its sums, as large as ours
        for others in (False, True):
            buffers = (
                x.new(batch, channels) if has_scale else None,
                *(local_sums[:2] if others else (x.new(k, channels), x.new(k, channels))),
                *(x.new(batch, channels) for _ in range(3)),
            )
            shared = local_sums._replace(through=2 * local_sums.through) if others else None
            exact_shared = exact_own._replace(through=2 * exact_own.through) if others else None
            grads = trained.train_gradients(
                sums, stats, batch_norm, got.n, mix, has_scale, shared, config, out=buffers
            )
            expected, by = coefficients.train_gradients(
                exact_sums, exact_stats, exact_norm, given.n, exact_mix, has_scale, exact_shared
            )
            check_train(x, grads, expected, by, exact_norm)
        x.guarded.check()


def check_train(x: Problem, grads, expected, by, norm: coefficients.Norm) -> None:
    # the gradient of the filter scale in a branch of few samples is what is left of large terms
    inv_std = torch.rsqrt(norm.var.min() + EPS)
    size = float(inv_std * (norm.weight.abs().max() * x.gc.abs().max() + HW * x.mean.abs().max()))
    d_filter_scale, d_weight, d_bias, *own_by = grads
    assert_agrees(d_filter_scale, expected.filter_scale, scale=size)
    assert_agrees(d_weight, expected.bn_weight)
    assert_agrees(d_bias, expected.bn_bias)
    for a, b in zip(own_by, by, strict=True):
        assert_agrees(a, b)


@tiles
@pytest.mark.parametrize("rows", [1, 2])
def test_the_batch_variance_around_a_large_mean(rows: int, config: dict) -> None:
    x = Problem(13, 9, rows, rows, False)
    x.mean = 1000 + 0.1 * x.mean
    if x.clean is not None:
        x.mean[x.clean] *= -1  # the rows' means are far apart
    x.m2 *= 0.01
    stats = coefficients.SampleStats(x.put(x.mean), x.put(x.m2), HW)
    got = trained.batch_statistics(stats, x.mix(), rows, config)
    exact = coefficients.SampleStats(x.mean.double(), x.m2.double(), HW)
    mean, var, n = coefficients.batch_statistics(exact, x.exact_mix(), rows)
    assert torch.equal(got[2].double().cpu(), n)
    assert float((got[0].double().cpu() - mean).abs().max()) <= 4 * 2.0**-24 * 1000
    # the mean's error, squared, and its product with deviations of 0.5 at most; E[x²] − μ² would be off by 0.1
    assert float((got[1].double().cpu() - var).abs().max()) <= 4 * 2.0**-24 * 1000
    again = trained.batch_statistics(stats, x.mix(), rows, config)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@tiles
def test_a_row_is_untouched_by_nan_in_the_other(config: dict) -> None:
    x = Problem(9, 5, 2, 2, True)
    assert x.filter_scale is not None
    x.clean = torch.arange(9) < 4
    results = []
    for spoilt in (False, True):
        if spoilt:
            for v in (x.mean, x.m2, x.filter_scale, x.g1, x.gc):
                v[~x.clean] = float("nan")
        norm, mix = x.norm(), x.mix()
        mean, m2, g1, gc = (x.put(v) for v in (x.mean, x.m2, x.g1, x.gc))
        stats = coefficients.SampleStats(mean, m2, HW)
        batch_mean, batch_var, n = trained.batch_statistics(stats, mix, 2, config)
        norm = norm._replace(mean=batch_mean, var=batch_var)
        sums = coefficients.Reduced(g1, gc, mean)
        d_scale, d_weight, d_bias, *by = trained.train_gradients(
            sums, stats, norm, n, mix, True, None, config
        )
        results.append([v[1] for v in (batch_mean, batch_var, d_weight, d_bias)])
        results[-1] += [v[:4] for v in (d_scale, *by)]
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


def test_coefficients_of_an_empty_batch_are_empty() -> None:
    x = Problem(0, 3, 2, 2, True)
    norm, mix = x.norm(), x.mix()
    empty = torch.empty(0, 3, device=DEVICE)
    assert evaluated.eval_coefficients(norm, mix, 0, SMALL)[0].shape == (0, 3)
    sums = coefficients.Reduced(empty, empty, empty)
    *_, d_weight, d_bias = evaluated.eval_gradients(sums, norm, mix, (True,) * 4, SMALL)
    assert float(d_weight.abs().sum()) == float(d_bias.abs().sum()) == 0
    stats = coefficients.SampleStats(empty, empty, HW)
    batch = trained.batch_statistics(stats, mix, 2, SMALL)
    assert all(float(v.abs().sum()) == 0 for v in batch)
    _, d_weight, d_bias, *_ = trained.train_gradients(sums, stats, norm, batch[2], mix, True, None, SMALL)
    assert float(d_weight.abs().sum()) == float(d_bias.abs().sum()) == 0


@tiles
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("dynamic_layers", [0, 1, 3])
def test_a_network_is_one_layer_with_all_channels_side_by_side(
    dynamic_layers: int, batch: int, config: dict
) -> None:
    widths = (3, 17, 8)
    channels, dynamic = sum(widths), sum(widths[:dynamic_layers])
    x = Problem(batch, channels, 2, 2, True)
    assert x.p is not None
    assert x.filter_scale is not None
    covered = x.filter_scale[:, :dynamic].contiguous() if dynamic else None
    mix = Mix(x.put(covered), x.put(x.p))
    out = x.new(batch * channels), x.new(batch * channels)
    layout = evaluated.network_layout(widths, DEVICE)
    norm = x.norm()
    got = evaluated.network_coefficients(norm, mix, widths, layout, config, out=out)
    x.filter_scale[:, dynamic:] = 1
    exact = x.exact_norm(), coefficients.Mix(x.filter_scale.double(), x.p.double())
    expected = coefficients.eval_coefficients(*exact, batch)
    for table, part in zip(expected, zip(*got, strict=True), strict=True):
        for ours, layer in zip(part, table.split(widths, 1), strict=True):
            assert ours.is_contiguous()
            assert_agrees(ours, layer)

    d_filter_scale = x.new(batch, dynamic) if dynamic else None
    buffers = d_filter_scale, x.new(batch), None, None
    sums = coefficients.Reduced(x.put(x.g1), x.put(x.gc), None)
    needs = (dynamic > 0, True, False, False)
    d_filter_scale, d_p_clean, *_ = evaluated.eval_gradients(sums, norm, mix, needs, config, out=buffers)
    exact_sums = coefficients.Reduced(x.g1.double(), x.gc.double(), None)
    all_needs = Needs(filter_scale=True, p_clean=True)
    reference = coefficients.eval_gradients(exact_sums, *exact, all_needs)
    assert reference.filter_scale is not None
    if dynamic:
        assert_agrees(d_filter_scale, reference.filter_scale[:, :dynamic])
    assert_agrees(d_p_clean, reference.p_clean, scale=channels**0.5)  # terms of about 1 that cancel
    x.guarded.check()

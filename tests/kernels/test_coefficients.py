"""The [B, C] algebra on Triton against awnet/ops/coefficients.py in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from awnet.kernels import coefficients as kernels
from support.interpreter import DEVICE, Guarded
from torch import Tensor

from awnet.ops import coefficients

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

    def __init__(self, batch: int, channels: int, k: int, s: int, omega: bool, kinds: str = "mixed") -> None:
        self.guarded = Guarded()
        self.generator = torch.Generator().manual_seed(batch * 100 + channels)
        self.batch, self.channels, self.k, self.s = batch, channels, k, s
        image = (batch, channels)
        self.mean, self.g1, self.gc, self.centre = (self.normal(*image) for _ in range(4))
        self.m2 = self.normal(*image).square() * HW
        self.omega = self.normal(*image).abs() if omega else None
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

    def norm(self) -> kernels.Norm:
        return kernels.Norm(*(self.put(x) for x in (*self.table, self.var)))

    def exact(self) -> tuple[Tensor, ...]:
        return tuple(x.double() for x in (*self.table, self.var))


def wide(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.dtype != torch.bool else x


def assert_agrees(got: Tensor | None, expected: Tensor | None, scale: float | Tensor = 0.0) -> None:
    assert (got is None) == (expected is None)
    if got is not None and expected is not None:
        assert got.shape == expected.shape
        difference = float((got.double().cpu() - expected).abs().max()) if got.numel() else 0.0
        assert difference <= TOLERANCE * max(float(expected.abs().max()), float(scale))


every = pytest.mark.parametrize(("k", "s", "omega"), [(*rows, o) for rows, o in product(ROWS, (True, False))])
tiles = pytest.mark.parametrize("how", [SMALL, LARGE], ids=["small", "large"])


@every
@tiles
def test_testing(k: int, s: int, omega: bool, how: dict) -> None:
    for batch, channels in SIZES:
        x = Problem(batch, channels, k, s, omega)
        exact = (wide(x.omega), *x.exact(), wide(x.p), EPS)
        out = x.new(batch, channels), x.new(batch, channels)
        norm, own_omega, p = x.norm(), x.put(x.omega), x.put(x.p)
        got = kernels.testing_coefficients(own_omega, norm, p, EPS, batch, how, out=out)
        for a, b in zip(got, coefficients.testing_coefficients(*exact, batch), strict=True):
            assert_agrees(a, b)

        buffers = kernels.TestingGradients(
            x.new(batch, channels) if omega else None,
            x.new(batch) if max(k, s) == 2 else None,
            x.new(k, channels),
            x.new(k, channels),
        )
        sums = [x.put(v) for v in (x.g1, x.gc, x.centre)]
        for needs in (
            coefficients.Needs(omega, max(k, s) == 2, True, True),
            coefficients.Needs(omega, False, False, False),
        ):
            wanted = kernels.TestingGradients(
                *(v if need else None for v, need in zip(buffers, needs, strict=True))
            )
            found = kernels.testing_gradients(*sums, own_omega, norm, p, EPS, needs, how, out=wanted)
            expected = coefficients.testing_gradients(
                *(v.double() for v in (x.g1, x.gc, x.centre)), *exact, needs
            )
            for a, b in zip(found, expected, strict=True):
                assert_agrees(a, b, scale=1.0)
        x.guarded.check()


@every
@tiles
def test_training(k: int, s: int, omega: bool, how: dict) -> None:
    for (batch, channels), kinds in zip(SIZES, ("clean", "adversarial", "mixed"), strict=True):
        x = Problem(batch, channels, k, s, omega, kinds)
        norm, own_omega, clean = x.norm(), x.put(x.omega), x.clean
        clean = None if clean is None else clean.to(DEVICE)
        mean, m2 = x.put(x.mean), x.put(x.m2)
        exact_images = (x.mean.double(), x.m2.double(), HW, wide(x.omega))

        out = kernels.Statistics(x.new(s, channels), x.new(s, channels), x.new(s))
        got = kernels.batch_statistics(mean, m2, HW, own_omega, clean, s, how, out=out)
        statistics = coefficients.batch_statistics(*exact_images, x.clean, s)
        for a, b in zip(got, statistics, strict=True):
            assert_agrees(a, b)

        batch_norm = kernels.Norm(norm.weight, norm.bias, got.mean, got.var)
        pair = x.new(batch, channels), x.new(batch, channels)
        weight, bias = x.table[0].double(), x.table[1].double()
        # judged at the very statistics that the kernel was given: a variance near 0 magnifies their rounding
        given = coefficients.BatchStatistics(*(v.double().cpu() for v in got))
        expected_pair = coefficients.training_coefficients(
            wide(x.omega), weight, bias, given, x.clean, EPS, batch
        )
        found_pair = kernels.training_coefficients(own_omega, batch_norm, clean, EPS, batch, how, out=pair)
        for a, b in zip(found_pair, expected_pair, strict=True):
            assert_agrees(a, b)

        sums = x.put(x.g1), x.put(x.gc)
        rest = (own_omega, norm.weight, got, clean, EPS)
        exact_sums, exact_rest = (x.g1.double(), x.gc.double()), (wide(x.omega), weight, given, x.clean, EPS)
        own = kernels.Sums(x.new(k, channels), x.new(k, channels), x.new(2, s, channels))
        own = kernels.training_sums(*sums, mean, *rest, how, out=own)
        exact_own = coefficients.training_sums(*exact_sums, exact_images[0], *exact_rest)
        for a, b in zip(own, exact_own, strict=True):
            assert_agrees(a, b)
        # alone, and where another rank has added its sums, as large as ours
        for others in (False, True):
            buffers = kernels.TrainingGradients(
                x.new(batch, channels) if omega else None,
                *((own.weight, own.bias) if others else (x.new(k, channels), x.new(k, channels))),
                *(x.new(batch, channels) for _ in range(3)),
            )
            shared = own._replace(through=2 * own.through) if others else None
            exact_shared = exact_own._replace(through=2 * exact_own.through) if others else None
            found = kernels.training_gradients(*sums, mean, m2, HW, *rest, omega, shared, how, out=buffers)
            gradients, how_to = coefficients.training_gradients(
                *exact_sums, *exact_images[:3], *exact_rest, omega, exact_shared
            )
            check_training(x, found, gradients, how_to, given, weight)
        x.guarded.check()


def check_training(x: Problem, found, gradients, how_to, given, weight: Tensor) -> None:
    # ∂ω of a branch of few samples is what is left of large terms
    inv_std = torch.rsqrt(given.var.min() + EPS)
    size = float(inv_std * (weight.abs().max() * x.gc.abs().max() + HW * x.mean.abs().max()))
    assert_agrees(found.omega, gradients.filter_scale, scale=size)
    assert_agrees(found.weight, gradients.bn_weight)
    assert_agrees(found.bias, gradients.bn_bias)
    for a, b in zip(found[3:], how_to, strict=True):
        assert_agrees(a, b)


@tiles
def test_a_row_is_untouched_by_nan_in_the_other(how: dict) -> None:
    x = Problem(9, 5, 2, 2, True)
    assert x.omega is not None
    clean = torch.arange(9) < 4
    results = []
    for spoilt in (False, True):
        if spoilt:
            for v in (x.mean, x.m2, x.omega, x.g1, x.gc):
                v[~clean] = float("nan")
        norm, omega, kind = x.norm(), x.put(x.omega), clean.to(DEVICE)
        mean, m2, g1, gc = (x.put(v) for v in (x.mean, x.m2, x.g1, x.gc))
        statistics = kernels.batch_statistics(mean, m2, HW, omega, kind, 2, how)
        found = kernels.training_gradients(
            g1, gc, mean, m2, HW, omega, norm.weight, statistics, kind, EPS, True, None, how
        )
        rows = [v[1] for v in (statistics.mean, statistics.var, found.weight, found.bias)]
        results.append([*rows, *(v[:4] for v in (found.omega, *found[3:]) if v is not None)])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


def test_an_empty_batch() -> None:
    x = Problem(0, 3, 2, 2, True)
    norm, clean = x.norm(), torch.empty(0, dtype=torch.bool, device=DEVICE)
    empty, p = torch.empty(0, 3, device=DEVICE), torch.empty(0, device=DEVICE)
    assert kernels.testing_coefficients(empty, norm, p, EPS, 0, SMALL)[0].shape == (0, 3)
    found = kernels.testing_gradients(empty, empty, empty, empty, norm, p, EPS, (True,) * 4, SMALL)
    assert float(found.weight.abs().sum()) == float(found.bias.abs().sum()) == 0
    statistics = kernels.batch_statistics(empty, empty, HW, empty, clean, 2, SMALL)
    assert all(float(v.abs().sum()) == 0 for v in statistics)
    trained = kernels.training_gradients(
        empty, empty, empty, empty, HW, empty, norm.weight, statistics, clean, EPS, True, None, SMALL
    )
    assert float(trained.weight.abs().sum()) == float(trained.bias.abs().sum()) == 0


@tiles
@pytest.mark.parametrize("batch", [1, 6])
def test_all_layers_of_a_network_in_one_launch(batch: int, how: dict) -> None:
    layers = [
        Problem(batch, c, *rows, True) for c, rows in ((3, (2, 2)), (17, (2, 1)), (1, (1, 1)), (8, (2, 2)))
    ]
    dynamic = [True, False, True, True]
    guarded = layers[0].guarded
    p = torch.rand(batch, generator=layers[0].generator)
    norms = [layer.norm() for layer in layers]
    packed = kernels.PackedNorms.pack(norms, dynamic, EPS)
    assert packed.omega_width == 12
    omegas = [layer.omega for layer, has in zip(layers, dynamic, strict=True) if has]
    omega = guarded.input(torch.cat([o for o in omegas if o is not None], 1).to(DEVICE))
    for repeat in range(2):
        if repeat:  # weights that were changed in place
            for layer, norm in zip(layers, norms, strict=True):
                layer.var += 1
                norm.var.copy_(layer.var)
            packed.refresh(norms)
        flat = torch.empty(batch * 29, device=DEVICE)
        out = guarded.output(flat), guarded.output(flat)
        got = kernels.network_coefficients(omega, packed, guarded.input(p.to(DEVICE)), how, out=out)
        assert len(got) == len(layers)
        for layer, has, pair in zip(layers, dynamic, got, strict=True):
            own = wide(layer.omega) if has else None
            expected = coefficients.testing_coefficients(own, *layer.exact(), p.double(), EPS, batch)
            for a, b in zip(pair, expected, strict=True):
                assert a.is_contiguous()
                assert_agrees(a, b)
        for whole in out:
            assert not whole.isnan().any()
    for layer in layers[1:]:
        layer.guarded = Guarded()  # their tables were changed on purpose


def test_a_network_refuses_what_does_not_fit() -> None:
    layers = [Problem(2, 3, 2, 2, True), Problem(2, 4, 2, 2, True)]
    norms = [layer.norm() for layer in layers]
    with pytest.raises(ValueError, match="as long as each other and not empty, got 2 and 1"):
        kernels.PackedNorms.pack(norms, [True], EPS)
    packed = kernels.PackedNorms.pack(norms, [True, False], EPS)
    p = torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"omega must have shape \[2, 3\] .* got \[2, 7\]"):
        kernels.network_coefficients(torch.ones(2, 7, device=DEVICE), packed, p, SMALL)
    with pytest.raises(ValueError, match="got None"):
        kernels.network_coefficients(None, packed, p, SMALL)
    alone = kernels.PackedNorms.pack(norms, [False, False], EPS)
    assert len(kernels.network_coefficients(None, alone, p, SMALL)) == 2

"""The Triton passes against float64, between guard bands, with outputs that start as NaN."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from awnet.kernels import passes, tiles
from awnet.kernels.launch import launch, power_of_two
from support.interpreter import DEVICE, INTERPRETED, Guarded
from torch import Tensor

from awnet import reference
from awnet.ops import activations
from awnet.ops.args import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"tile": 64, "inner": 16, "steps": 4, "warps": 4}
LARGE = {"tile": 2048, "inner": 128, "steps": 4, "warps": 4}
# 1 pixel; planes smaller than a tile; odd sizes; pixels, maps and channels that end within a tile
SHAPES: list[tuple[tuple[int, ...], dict[str, int]]] = [
    ((1, 1, 1, 1), SMALL),
    ((2, 3, 5, 7), SMALL),
    ((3, 17, 2, 2), SMALL),
    ((1, 2, 13, 11), SMALL),
    ((2, 1, 1, 37), LARGE),
    ((2, 16, 4, 4), LARGE),
    ((3, 17, 5, 3), LARGE),
]
# rounding of one stored value, relative; the interpreter cuts bfloat16 off where a GPU rounds it
STORED = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8,
    torch.float16: 2.0**-11,
}


def tensor(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, last: bool = False
) -> Tensor:
    x = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .to(dtype)
        .to(DEVICE)
    )
    return x.contiguous(memory_format=torch.channels_last) if last else x


def shapes(dtype: torch.dtype) -> list[tuple[tuple[int, ...], dict[str, int]]]:
    """All for float32; for the others, which differ in loads and stores alone, one with odd sizes each."""
    return {torch.float32: SHAPES, torch.bfloat16: SHAPES[1:2], torch.float16: SHAPES[6:7]}[dtype]


def image(table: Tensor) -> Tensor:
    return table.double()[:, :, None, None]


def assert_close(got: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype, terms: int = 4) -> None:
    """Within ``terms`` roundings of float32 of numbers as large as ``size``, and one of the stored ``dtype``."""
    allowed = (
        terms * 2.0**-23 * size + STORED[dtype] * expected.abs() + 2.0**-24
    )  # fp16 subnormals step by 2^-24
    assert bool(((got.double() - expected).abs() <= allowed).all())


@pytest.fixture(params=["one tile a program", "many tiles a program"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles a program":
        monkeypatch.setattr(tiles, "_ENOUGH_PROGRAMS", 1)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Guarded:
    """Partial results between guard bands too."""
    guarded = Guarded()
    plain = passes.table_like
    monkeypatch.setattr(passes, "table_like", lambda u, splits=1: guarded.output(plain(u, splits)))
    return guarded


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", ["none", "plain", "with a map of its own"])
@pytest.mark.parametrize("relu", [True, False])
def test_apply_equals_float64(
    guarded: Guarded,
    residual: str,
    relu: bool,
    dtype: torch.dtype,
    last: bool,
) -> None:
    for seed, (shape, config) in enumerate(shapes(dtype)):
        u = guarded.input(tensor(shape, seed, dtype, last))
        scale, shift = (guarded.input(tensor(shape[:2], seed + 10 * i)) for i in (1, 2))
        r = None if residual == "none" else guarded.input(tensor(shape, seed + 30, dtype, last))
        affine: dict = {}
        expected = u.double() * image(scale) + image(shift)
        size = (u.double() * image(scale)).abs() + image(shift).abs()
        if r is not None:
            r_scale, r_shift = torch.ones(shape[:2], device=DEVICE), torch.zeros(shape[:2], device=DEVICE)
            if residual != "plain":
                r_scale, r_shift = (guarded.input(tensor(shape[:2], seed + 10 * i)) for i in (4, 5))
                affine = {"residual_scale": r_scale, "residual_shift": r_shift}
            expected = expected + r.double() * image(r_scale) + image(r_shift)
            size = size + (r.double() * image(r_scale)).abs() + image(r_shift).abs()
        expected = expected.relu() if relu else expected
        y = passes.apply(u, scale, shift, r, relu, config, **affine, out=guarded.output(u))
        assert_close(y, expected, size, dtype)
        # in u's own place, and with the mask of y as it is stored
        ours, mask = guarded.output(u).copy_(u), torch.empty_like(u, dtype=torch.bool)
        again = passes.apply(ours, scale, shift, r, relu, config, **affine, out=ours, relu_mask=mask)
        assert torch.equal(again, y)
        assert torch.equal(mask, ~(y <= 0))
    guarded.check()


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", range(2, len(ACTIVATIONS)), ids=ACTIVATIONS[2:])
def test_apply_with_an_activation_whose_slope_is_stored(
    guarded: Guarded, code: int, dtype: torch.dtype, last: bool
) -> None:
    for seed, (shape, how) in enumerate(shapes(dtype)[-2:]):
        u, r = (guarded.input(tensor(shape, seed + 30 * i, dtype, last)) for i in (0, 1))
        scale, shift = (guarded.input(tensor(shape[:2], seed + 10 * i)) for i in (1, 2))
        z = u.double() * image(scale) + image(shift) + r.double()
        slope = guarded.output(u)
        y = passes.apply(u, scale, shift, r, code, how, out=guarded.output(u), slope=slope)
        # |act'| and |act''| are at most 1.13, and exp and erf are right to some roundings
        size = 1 + (u.double() * image(scale)).abs() + image(shift).abs() + r.double().abs()
        assert_close(y, reference.activated(z, ACTIVATIONS[code]), size, dtype, terms=8)
        assert_close(slope, activations.slope(z, code), size, dtype, terms=8)
        assert torch.equal(passes.apply(u, scale, shift, r, code, how, out=guarded.output(u)), y)
    guarded.check()


@pytest.mark.parametrize("code", range(2, len(ACTIVATIONS)), ids=ACTIVATIONS[2:])
def test_activations_of_extreme_values(code: int) -> None:
    z = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e30, -1e30, float("nan"), 6.0, -6.0], device=DEVICE)
    ones, zeros = torch.ones(1, 1, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    u = z.view(1, 1, 3, 3)
    slope = torch.empty_like(u)
    y = passes.apply(u, ones, zeros, None, code, SMALL, slope=slope)
    for got, expected in (
        (y, reference.activated(u.double(), ACTIVATIONS[code])),
        (slope, activations.slope(u.double(), code)),
    ):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_statistics_equal_float64(
    guarded: Guarded,
    loops: None,
    mean: float,
    dtype: torch.dtype,
    last: bool,
) -> None:
    for seed, (shape, config) in enumerate(shapes(dtype)):
        x = tensor(shape, seed, last=last) + mean
        u = guarded.input(x.to(dtype))
        empty = torch.empty(shape[:2], device=DEVICE)
        got_mean, got_m2 = passes.statistics(u, config, out=(guarded.output(empty), guarded.output(empty)))
        exact = u.double()
        expected = exact.mean((2, 3))
        assert_close(got_mean, expected, exact.abs().mean((2, 3)), torch.float32)
        centered = exact - image(expected)
        # merging tiles meets the rounding of their means once for each deviation; E[x²] − μ² would square it
        size = centered.square().sum((2, 3)) + exact.abs().amax((2, 3)) * centered.abs().sum((2, 3))
        assert_close(got_m2, centered.square().sum((2, 3)), size, torch.float32, terms=2)
    guarded.check()


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("outlier", [0, 1, 4, 37, 63])
def test_statistics_with_one_value_far_from_the_others(outlier: int, loops: None, last: bool) -> None:
    # in the first tile, the center of all values, or behind it; a relative bound, with nothing for the mean
    u = tensor((2, 5, 8, 8), 3, last=last)
    u[:, :, outlier // 8, outlier % 8] += 1e6
    mean, m2 = passes.statistics(u, SMALL)
    exact = u.double()
    assert_close(mean, exact.mean((2, 3)), exact.abs().mean((2, 3)), torch.float32)
    expected = (exact - image(exact.mean((2, 3)))).square().sum((2, 3))
    # 1 + 4 tiles: what cancels is at most 4 times M2
    assert_close(m2, expected, 5 * expected, torch.float32)
    again = passes.statistics(u, SMALL)
    assert torch.equal(again[0], mean)
    assert torch.equal(again[1], m2)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_statistics_of_equal_values_and_of_nan(loops: None, last: bool) -> None:
    u = tensor((2, 5, 9, 7), 3, last=last)
    u[0] = u[0, :, :1, :1] * 1e3 + 1e4
    u[1, 2, 8, 6] = float("nan")
    mean, m2 = passes.statistics(u, SMALL)
    # the centers are off by a few roundings of the values
    assert bool((m2[0] >= 0).all())
    assert bool((m2[0] <= 63 * (4 * 2.0**-23 * u[0, :, 0, 0]).square()).all())
    nan = torch.arange(5, device=DEVICE) == 2
    assert torch.equal(mean[1].isnan(), nan)
    assert torch.equal(m2[1].isnan(), nan)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [True, False])
def test_reduce_equals_float64(
    guarded: Guarded, loops: None, relu: bool, dtype: torch.dtype, last: bool
) -> None:
    for seed, (shape, config) in enumerate(shapes(dtype)):
        grad, u, y = (guarded.input(tensor(shape, seed + 10 * i, dtype, last)) for i in (1, 2, 3))
        center = guarded.input(tensor(shape[:2], seed))
        empty = torch.empty(shape[:2], device=DEVICE)
        out = guarded.output(empty), guarded.output(empty)
        g1, gc = passes.reduce(grad, u, center, y if relu else None, config, out=out)
        if relu:
            by_mask = passes.reduce(grad, u, center, y > 0, config)
            assert all(torch.equal(a, b) for a, b in zip(by_mask, (g1, gc), strict=True))
        g = torch.where(y > 0, grad, 0).double() if relu else grad.double()
        along = g * (u.double() - image(center))
        assert_close(g1, g.sum((2, 3)), g.abs().sum((2, 3)), torch.float32)
        size = (g.abs() * (u.double().abs() + image(center).abs())).sum((2, 3))
        assert_close(gc, along.sum((2, 3)), size, torch.float32)
    guarded.check()


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_propagate_equals_float64(
    guarded: Guarded,
    residual: bool,
    training: bool,
    relu: bool,
    dtype: torch.dtype,
    last: bool,
) -> None:
    for seed, (shape, config) in enumerate(shapes(dtype)):
        grad, u, y = (guarded.input(tensor(shape, seed + 10 * i, dtype, last)) for i in (1, 2, 3))
        tables = [guarded.input(tensor(shape[:2], seed + 10 * i)) for i in range(4)]
        center, by_grad, by_input, constant = tables
        g = torch.where(y > 0, grad, 0).double() if relu else grad.double()
        expected = g * image(by_grad)
        size = expected.abs()
        if training:
            expected = expected + (u.double() - image(center)) * image(by_input) + image(constant)
            size = (
                size
                + (u.double().abs() + image(center).abs()) * image(by_input).abs()
                + image(constant).abs()
            )
        rest = (by_input, constant) if training else (None, None)
        out = guarded.output(u), guarded.output(u) if residual else None
        about = (u, center) if training else (None, None)
        d_u, d_residual = passes.propagate(
            grad, *about, y if relu else None, by_grad, *rest, residual, config, out=out
        )
        if relu:
            by_mask = passes.propagate(grad, *about, y > 0, by_grad, *rest, residual, config)
            assert torch.equal(by_mask[0], d_u)
        assert_close(d_u, expected, size, dtype)
        if residual:
            assert d_residual is not None
            assert torch.equal(d_residual.double(), g)
        else:
            assert d_residual is None
    guarded.check()


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slope_multiplies_the_gradient(guarded: Guarded, dtype: torch.dtype, last: bool) -> None:
    for seed, (shape, how) in enumerate(shapes(dtype)[-2:]):
        grad, u, slope = (guarded.input(tensor(shape, seed + 10 * i, dtype, last)) for i in (1, 2, 3))
        center, by = (guarded.input(tensor(shape[:2], seed + 10 * i)) for i in (0, 4))
        g = grad.double() * slope.double()
        g1, gc = passes.reduce(grad, u, center, None, how, slope=slope)
        assert_close(g1, g.sum((2, 3)), g.abs().sum((2, 3)), torch.float32)
        along = g.abs() * (u.double().abs() + image(center).abs())
        expected = (g * (u.double() - image(center))).sum((2, 3))
        assert_close(gc, expected, along.sum((2, 3)), torch.float32)
        out = guarded.output(u), guarded.output(u)
        d_u, d_residual = passes.propagate(
            grad, None, None, None, by, None, None, True, how, slope=slope, out=out
        )
        assert_close(d_u, g * image(by), (g * image(by)).abs(), dtype)
        assert d_residual is not None
        assert_close(d_residual, g, g.abs(), dtype)
    guarded.check()


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_other_samples_filled_with_nan_change_no_bit(last: bool) -> None:
    shape = (3, 5, 3, 5)
    u, grad, y = (tensor(shape, i, last=last) for i in range(3))
    center, scale = tensor(shape[:2], 3), tensor(shape[:2], 4)

    def results() -> list[Tensor]:
        return [
            *passes.statistics(u, SMALL),
            *passes.reduce(grad, u, center, y, SMALL),
            passes.apply(u, scale, center, grad, True, SMALL),
            passes.propagate(grad, u, center, y, scale, scale, center, False, SMALL)[0],
        ]

    before = results()
    for x in (u, grad, y, center, scale):
        x[[0, 2]] = float("nan")
    for clean, spoilt in zip(before, results(), strict=True):
        assert torch.equal(clean[1], spoilt[1])
        assert spoilt[0].isnan().all()


def test_nan_passes_the_activation_as_in_torch() -> None:
    u = torch.tensor([[[[float("nan"), -1.0, 0.0, 2.0]]]], device=DEVICE)
    one, zero = torch.ones(1, 1, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    y = passes.apply(u, one, zero, None, True, SMALL)
    assert torch.equal(y.nan_to_num(7), torch.relu(u).nan_to_num(7))
    grad = torch.arange(1.0, 5.0, device=DEVICE).view_as(u)
    d_u, g = passes.propagate(grad, u, zero, y, one, None, None, True, SMALL)
    expected = torch.ops.aten.threshold_backward(grad, y, 0)
    assert torch.equal(d_u, expected)
    assert g is not None
    assert torch.equal(g, expected)
    assert torch.equal(passes.reduce(grad, u * 0 + 1, zero, y, SMALL)[0], expected.sum((2, 3)))


@triton.jit
def _addresses_kernel(out, group, first, total, channels, pixels, LAST: tl.constexpr):
    plane, in_planes, start = tiles.planes_of(group, total, channels, pixels, LAST, 16)
    first_pixel = first + tl.zeros([], tl.int64)
    offsets, in_bounds = passes.tile_offsets(start, in_planes, first_pixel, channels, pixels, LAST, 16)
    inside = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + inside, tl.where(in_bounds, offsets, -1))
    tl.store(out + 256 + tl.arange(0, 16), tl.where(in_planes, plane, -1))


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_addresses_beyond_two_to_the_31(last: bool) -> None:
    # a tensor of that size does not fit into a test; its addresses do
    batch, channels, pixels = 300, 40, 1 << 20
    out = torch.zeros(272, dtype=torch.int64, device=DEVICE)
    group = 299 * 3 + 2 if last else batch * channels // 16 - 1
    launch(_addresses_kernel, 1, out, group, pixels - 8, batch * channels, channels, pixels, LAST=last)
    pixel = torch.arange(pixels - 8, pixels + 8)
    if last:
        channel = torch.arange(32, 48)
        expected = (299 * pixels + pixel[None, :]) * channels + channel[:, None]
        expected[channel >= channels] = -1
        maps = torch.where(channel < channels, 299 * channels + channel, -1)
    else:
        maps = torch.arange(group * 16, group * 16 + 16)
        expected = maps[:, None] * pixels + pixel[None, :]
    expected[:, pixel >= pixels] = -1
    assert int(expected.max()) > 2**33
    assert torch.equal(out[:256].cpu().view(16, 16), expected)
    assert torch.equal(out[256:].cpu(), maps)


def test_an_empty_batch_launches_nothing() -> None:
    u, table = torch.empty(0, 3, 4, 4, device=DEVICE), torch.empty(0, 3, device=DEVICE)
    assert passes.apply(u, table, table, None, True, SMALL).shape == u.shape
    assert all(x.shape == (0, 3) for x in passes.statistics(u, SMALL))
    assert all(x.shape == (0, 3) for x in passes.reduce(u, u, table, u, SMALL))
    assert passes.propagate(u, u, table, u, table, None, None, False, SMALL)[0].shape == u.shape


def test_tensors_that_the_kernels_cannot_address_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous or channels_last, got strides"):
        passes.statistics(torch.ones(2, 3, 4, 5, device=DEVICE).transpose(2, 3), SMALL)
    with pytest.raises(ValueError, match="a grid holds fewer than 2"):
        launch(_addresses_kernel, 2**31, torch.ones(1, device=DEVICE))


def test_a_single_large_image_still_fills_a_gpu() -> None:
    for last in (False, True):
        grid = tiles.launch_grid(tiles.Shape(1, 64, 224 * 224, last), LARGE, steps=True)
        assert grid.programs >= 264  # two for each multiprocessor of an H200
    grid = tiles.launch_grid(tiles.Shape(256, 512, 4, False), LARGE, steps=True)
    assert grid.constants["BLOCK_M"] * grid.constants["BLOCK_P"] == LARGE["tile"]  # several planes a program


def test_power_of_two_is_the_least_one_not_below() -> None:
    assert [power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 1025)] == [1, 1, 2, 4, 4, 8, 2048]

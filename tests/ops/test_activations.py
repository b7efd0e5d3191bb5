"""SiLU, GELU and leaky ReLU in the fused layer: values, slopes, extremes, dtypes, graphs and frozen networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_layers import build, error, run
from torch import Tensor

from awnet import ops, reference
from awnet.ops import activations
from awnet.ops.args import ACTIVATIONS, CODES, flatten
from awnet.ops.backends import amx, native
from awnet.ops.backends.base import Passes
from awnet.ops.backends.native import NativePasses
from awnet.ops.coefficients import Propagation
from awnet.ops.functional import aw_conv2d, layer_args

SMOOTH = ACTIVATIONS[2:]
built = pytest.mark.skipif(native.load() is not None, reason=str(native.load()))
BACKENDS = ["eager", pytest.param("cpp", marks=built)]
PASSES = [pytest.param(Passes(), id="eager"), pytest.param(NativePasses(), id="cpp", marks=built)]


def applied(passes: Any, z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(z) and its slope, z being the layer's value before the activation."""
    u = z.view(1, 1, 1, -1)
    ones, zeros = torch.ones(1, 1), torch.zeros(1, 1)
    y, slope = passes.apply(u, ones, zeros, None, CODES[activation], True, False)
    return y.flatten(), slope.flatten()


@pytest.mark.parametrize("activation", SMOOTH)
def test_the_slope_is_the_derivative_in_float64(activation: str) -> None:
    z = torch.linspace(-12, 12, 1001, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(reference.activated(z, activation).sum(), z)
    # 1 + erf in torch's own derivative loses digits in the tail, hence an absolute bound
    torch.testing.assert_close(
        activations.slope(z.detach(), CODES[activation]), expected, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("activation", SMOOTH)
def test_values_and_slopes_of_all_sizes_in_float32(activation: str, passes: Any) -> None:
    z = torch.cat(
        [torch.linspace(-20, 20, 4099), torch.logspace(-30, 30, 301), -torch.logspace(-30, 30, 301)]
    )
    y, slope = applied(passes, z, activation)
    wide = z.double()
    # a few roundings of values up to |z|, which for z below -1 the exponential makes small
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(y.double(), reference.activated(wide, activation), **close)
    torch.testing.assert_close(slope.double(), activations.slope(wide, CODES[activation]), **close)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_negative_tail_keeps_its_digits(activation: str, passes: Any) -> None:
    z = torch.linspace(-9, -2, 200)
    y = applied(passes, z, activation)[0].double()
    wide = z.double()
    expected = wide * (wide.sigmoid() if activation == "silu" else torch.erfc(wide * -(0.5**0.5)) / 2)
    # SiLU: some roundings. GELU: torch's float32 computes 1 + erf; ours rounds z²/2, at most 40.5, to 2^-19
    relative = ((y - expected) / expected).abs()
    bound = 1e-6 if activation == "silu" else 1e-5
    if isinstance(passes, NativePasses) or activation == "silu":
        assert float(relative.max()) < bound
    assert float((y - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", SMOOTH)
def test_extreme_and_missing_values(activation: str, backend: str) -> None:
    z = torch.tensor([100.0, -100.0, 1e38, -1e38, 0.0, -0.0, float("nan"), 1.0, -1.0]).view(1, 1, 3, 3)
    z = torch.cat([z] * 2).requires_grad_()  # 18 values: a whole vector and single ones
    weight, one, zero = torch.ones(1, 1, 1, 1), torch.ones(2, 1), torch.zeros(2, 1)
    y = ops.affine_conv2d(z, weight, one, zero, activation=activation, backend=backend)
    (grad,) = torch.autograd.grad(y, z, torch.ones_like(y))
    wide = z.detach().double().requires_grad_()
    expected = reference.activated(wide, activation)
    (d_expected,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    finite = ~wide.isnan()  # at NaN the leaky ReLU has its negative slope, as in torch
    torch.testing.assert_close(grad.double()[finite], d_expected[finite], rtol=1e-6, atol=1e-6)
    assert grad[~finite].isnan().all() or activation == "leaky_relu"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, activation: str, backend: str, training: bool) -> None:
    layer = build(torch.Generator().manual_seed(3), training, activation=activation).rounded(dtype)
    exact, got = run(layer, backend="reference"), run(layer.to(dtype), backend=backend)
    eps = torch.finfo(dtype).eps  # one rounding is at most eps / 2, relatively
    # y: u and y are stored, and |act'| <= 1.13 passes u's error on; gradients: also the slope and d_u
    assert error(got.output, exact.output) <= 3 * eps
    # ω's gradient under batch statistics nearly cancels: it is bounded by the size of its terms
    for name, value in exact.grads.items():
        assert error(got.grads[name], value) <= (20 if name == "filter_scale" and training else 6) * eps, name


@built
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 7), st.integers(1, 9)),
    activation=st.sampled_from(SMOOTH), last=st.booleans(), residual=st.booleans(), in_place=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_the_native_passes_equal_plain_torch(
    shape: tuple[int, ...], activation: str, last: bool, residual: bool, in_place: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    layout = torch.channels_last if last else torch.contiguous_format

    def image() -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout)

    u, other, grad = image(), image(), image()
    scale, shift = (torch.randn(shape[:2], generator=generator) for _ in range(2))
    code, eps = CODES[activation], torch.finfo(dtype).eps
    arguments = (scale, shift, other if residual else None, code)
    y, slope = NativePasses().apply(u, *arguments, True, in_place)
    wide = [x.double() if isinstance(x, Tensor) else x for x in arguments]
    for got, expected in zip((y, slope), Passes().apply(u.double(), *wide, True, False), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=eps, atol=4 * 2.0**-23 + eps / 64)
    g1, gc = NativePasses().reduce(grad, u, shift, None, slope)
    wide_sums = Passes().reduce(grad.double(), u.double(), shift.double(), None, slope.double())
    for got, expected in zip((g1, gc), wide_sums, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    d_u, d_residual = NativePasses().propagate(grad, None, None, None, Propagation(scale), True, slope)
    g = grad.double() * slope.double()
    torch.testing.assert_close(d_residual.double(), g, rtol=eps, atol=1e-7)
    torch.testing.assert_close(d_u.double(), g * scale.double()[:, :, None, None], rtol=eps, atol=1e-7)


@built
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "size", [(8, 8), (16, 16), (7, 9)], ids=["half vectors", "whole vectors", "ragged rows"]
)
@pytest.mark.parametrize("activation", SMOOTH)
def test_the_direct_convolution_with_an_activation(
    activation: str, size: tuple[int, int], training: bool
) -> None:
    layer = build(torch.Generator().manual_seed(1), training, groups=1, size=size, activation=activation)
    layer = layer.rounded(torch.float32)
    exact, got = run(layer, backend="reference"), run(layer.to(torch.float32), backend="cpp")
    assert error(got.output, exact.output) <= 1e-5  # the contract's figures
    for name, value in exact.grads.items():
        assert error(got.grads[name], value) <= 1e-4, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", SMOOTH)
def test_opcheck(activation: str, backend: str) -> None:
    layer = build(torch.Generator().manual_seed(0), True, activation=activation).to(torch.float32)
    tensors = {
        n: x.requires_grad_(x.is_floating_point() and "running" not in n) for n, x in layer.tensors.items()
    }
    name = "native" if backend == "cpp" else backend
    operator = getattr(torch.ops.awnet, f"layer_{name}").default
    flat = flatten(layer_args(aw_conv2d, **tensors, **layer.options), True, True)
    torch.library.opcheck(operator, flat)


@pytest.mark.parametrize("activation", SMOOTH)
def test_a_frozen_network_equals_its_layers(activation: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    widths, stride = [5, 5, 5], [1, 1]
    conv = ops.AffineConvolution(
        stride=stride, padding=[1, 1], dilation=[1, 1], groups=1, activation=activation
    )
    layers = [
        ops.NetworkLayer(conv, -1, -1, False), ops.NetworkLayer(conv, 0, -1, False),
        ops.NetworkLayer(conv, 1, 0, True),
    ]  # fmt: skip
    x = normal(3, 5, 6, 7).requires_grad_()
    weights = [normal(5, 5, 3, 3) / 6 for _ in widths]
    tables = [(normal(3, 5).requires_grad_(), normal(3, 5).requires_grad_()) for _ in widths]
    inputs = [x, *(t for pair in tables for t in pair)]

    def gradients() -> list[Tensor]:
        (mean,) = ops.affine_network(x, weights, tables, layers)
        return [mean, *torch.autograd.grad(mean.square().sum(), inputs)]

    got = gradients()
    with ops.use_backend("reference"):
        expected = gradients()
    for a, b in zip(got, expected, strict=True):
        assert error(a, b) < 1e-5


@built
def test_amx_networks_have_no_other_activation_and_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWNET_AMX", "emulate")
    x, weight = torch.randn(16, 32, 4, 4).bfloat16(), torch.randn(32, 32, 3, 3).bfloat16()
    table = torch.ones(16, 32)
    assert amx.runs(x, [weight], [1], ["relu"])
    assert not amx.runs(x, [weight], [1], ["silu"])
    explained = ops.explain(ops.affine_conv2d, x, weight, table, table, padding=1, activation="silu")
    assert explained.backend == "cpp"
    assert explained.amx == "not on AMX tiles, whose networks have no activation 'silu'"

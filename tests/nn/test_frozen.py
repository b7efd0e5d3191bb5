"""Frozen modules against the live model in test mode, and the ops they are made of against plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.small_network import small_network
from torch import Tensor, nn

import awnet
from awnet import ops
from awnet.attacks import frozen
from awnet.models import create_model
from awnet.nn import AdversarialRouter, AWNet, Backbone, InferenceAWNet, InferenceBackbone, Routing
from awnet.ops import coefficients, use_backend
from awnet.ops.backends import native

CPP = pytest.param(
    "cpp",
    marks=pytest.mark.skipif(native.load() is not None, reason="the C++ backend is not built"),
)
BACKENDS = ["eager", CPP]


def shaken(model: nn.Module, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """``model`` with branches that differ, ω away from 1 and plausible statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator) if value.is_floating_point() else None
            if "running_var" in name:
                value.copy_(0.5 + noise.abs())
            elif noise is not None and ("bn." in name or "head" in name):
                value.copy_(0.2 * noise + ("bn.weight" in name))
    return model.to(dtype)


CASES = {
    "awnet_tiny": ("awnet_tiny", {}),
    "dual": ("awnet_tiny", {"bn": "dual"}),
    "one": ("awnet_tiny", {"bn": "one"}),
    "beta 0": ("awnet_tiny", {"beta": 0.0}),
    "beta ½": ("awnet_tiny", {"beta": 0.5}),
    "no type head": ("awnet_tiny", {"type_head": False, "test_bn": "mix"}),
    "no scaling": ("awnet_tiny", {"filter_scaling": False}),
    "no router": ("awnet_tiny", {"filter_scaling": False, "type_head": False, "test_bn": "mix"}),
    "no router, one": ("awnet_tiny", {"filter_scaling": False, "type_head": False, "bn": "one"}),
    "dynamic shortcut": ("awnet_tiny", {"dynamic_shortcut": True, "p_scale": 0.7, "p_temperature": 2.0}),
    "resnet_tiny": ("resnet_tiny", {}),
    "mobile": ("awnet_mobilenet_v2", {"width": 0.125, "router_widths": [4, 8]}),
}


def build(case: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    name, options = CASES[case]
    return shaken(create_model(name, num_classes=5, in_channels=2, **options), dtype)


def images(dtype: torch.dtype = torch.float64, batch: int = 3) -> Tensor:
    return torch.rand(batch, 2, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def logits_and_gradient(model: Callable[..., Tensor], x: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    logits = model(x, **kwargs)
    (gradient,) = torch.autograd.grad((logits * torch.arange(1, 6).to(logits)).sum(), x)
    return logits.detach(), gradient


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
def test_an_inference_copy_equals_the_model_in_eval_mode(case: str) -> None:
    model, x = build(case), images()
    with frozen(model):
        logits, gradient = logits_and_gradient(model, x)
    actual, slope = logits_and_gradient(model.inference_copy(), x)
    # the same formulas in another order of a few roundings, in float64
    assert error(actual, logits) < 1e-12
    assert error(slope, gradient) < 1e-12
    single = model.inference_copy(torch.float32)
    actual, slope = logits_and_gradient(single, x.float())
    assert actual.dtype == slope.dtype == torch.float32
    assert error(actual, logits) < 1e-5
    assert error(slope, gradient) < 1e-4  # the bound of a layer's gradients, 1-layer's accuracy demanded


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_an_inference_copy_equals_the_model_on_each_backend(backend: str) -> None:
    model, x = build("dynamic shortcut"), images()
    with frozen(model):
        logits, gradient = logits_and_gradient(model, x)
    with use_backend(backend):
        actual, slope = logits_and_gradient(model.inference_copy(torch.float32), x.float())
    assert error(actual, logits) < 1e-5
    assert error(slope, gradient) < 1e-4


def test_inference_copies_of_deep_and_bottleneck_networks_equal_the_model() -> None:
    torch.manual_seed(0)
    for block in ("basic", "bottleneck"):
        net = Backbone(block, (2, 1), (4, 6), num_classes=5, in_channels=2, dynamic_shortcut=True)
        router = AdversarialRouter(net.signal_widths, in_channels=2, widths=(4, 8), blocks=(1, 2))
        model = shaken(AWNet(net, router), torch.float64)
        with frozen(model):
            logits, gradient = logits_and_gradient(model, images())
        actual, slope = logits_and_gradient(InferenceAWNet(model), images())
        assert error(actual, logits) < 1e-12
        assert error(slope, gradient) < 1e-12


def test_bfloat16_is_no_worse_than_twice_autocast() -> None:
    model, x = build("awnet_tiny", torch.float32), images(torch.float32, batch=16)
    with frozen(model):
        logits, gradient = logits_and_gradient(copy.deepcopy(model).double(), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            low, low_gradient = logits_and_gradient(model, x)
    actual, slope = logits_and_gradient(model.inference_copy(torch.bfloat16), x)
    assert actual.dtype == torch.bfloat16
    assert slope.dtype == torch.float32
    assert error(actual, logits) < 2 * error(low, logits)
    assert error(slope, gradient) < 2 * error(low_gradient, gradient)


def test_an_inference_copy_routes_like_the_model() -> None:
    for case in ("dynamic shortcut", "no type head", "no scaling", "no router"):
        model, x = build(case), images()
        still = model.inference_copy()
        with frozen(model):
            expected = model.route(x)
            other = Routing(None, torch.rand(3).double(), [s * 0.5 + 0.1 for s in expected.filter_scales])
            values = logits_and_gradient(model, x, routing=other)
        routing = still.route(x)
        assert (routing.type_logits is None) == (expected.type_logits is None)
        assert error(routing.p_clean + 1, expected.p_clean + 1) < 1e-12
        assert len(routing.filter_scales) == len(expected.filter_scales)
        for got, scale in zip(routing.filter_scales, expected.filter_scales, strict=True):
            assert error(got, scale) < 1e-12
        assert torch.equal(still(x, routing=routing), still(x))
        for got, value in zip(logits_and_gradient(still, x, routing=other), values, strict=True):
            assert error(got, value) < 1e-12


@pytest.mark.parametrize("case", ["awnet_tiny", "no router", "resnet_tiny"])
def test_refresh_updates_an_inference_copy(case: str) -> None:
    model, x = build(case), images()
    still = model.inference_copy()
    before = still(x)
    fresh = build(case).state_dict()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():  # every weight and statistic in place
                value.add_(0.05 * torch.rand(value.shape, generator=torch.Generator().manual_seed(2)))
            assert name in fresh
    assert torch.equal(still(x), before)
    still.refresh()
    assert error(still(x), model.eval()(x)) < 1e-12
    assert error(before, still(x)) > 1e-3  # it did move
    if case == "awnet_tiny":
        model.router.beta = 1.0  # an option of the live model counts at once
        assert error(still(x), model(x)) < 1e-12


def test_an_inference_copy_leaves_the_model_unchanged() -> None:
    model, x = build("awnet_tiny").train(), images()
    model.router.eval()
    modes = [m.training for m in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    still = model.inference_copy()
    logits_and_gradient(still, x)
    still.refresh()
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in still.parameters())
    assert not set(map(id, still.parameters())) & set(map(id, model.parameters()))
    assert sum(p.numel() for p in still.parameters()) > 0


def test_attacks_take_an_inference_copy_as_a_model() -> None:
    model, x = build("awnet_tiny", torch.float32).eval(), images(torch.float32)
    y = torch.tensor([0, 1, 2])
    size = {"eps": 0.1, "step_size": 0.02, "steps": 5}
    expected = awnet.attacks.PGD(model, **size)(x, y)
    actual = awnet.attacks.PGD(model.inference_copy(), **size)(x, y)
    assert (actual == expected).float().mean() > 0.99  # a sign turns where a gradient is a rounding from 0
    assert (
        awnet.attacks.CW(model.inference_copy(torch.bfloat16), steps=2, eps=0.1, step_size=0.02)(x, y).dtype
        == x.dtype
    )


def test_inference_mode_and_autocast_do_not_affect_an_inference_copy() -> None:
    model, x = build("resnet_tiny", torch.float32), images(torch.float32)
    still = model.inference_copy()
    with torch.inference_mode():
        inside = still(x)
    logits, _ = logits_and_gradient(still, x)  # the coefficients made inside may be differentiated through
    assert torch.equal(inside, logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(still(x), logits)


def test_invalid_inference_copies_are_errors() -> None:
    converted = awnet.convert(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), Pooled(), nn.Linear(3, 5))
    )
    assert not hasattr(converted, "inference_copy")
    with pytest.raises(
        TypeError, match=r"must be an AWNet on a Backbone, got .*GraphModule.*awnet\.attacks\.frozen"
    ):
        InferenceAWNet(converted)
    model = build("awnet_tiny")
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32.* got torch\.int32"):
        model.inference_copy(torch.int32)
    with pytest.raises(ValueError, match=r"must hold 6 tensors.*got 1"):
        model.inference_copy()(images(), routing=Routing(None, torch.zeros(3), [torch.ones(3, 16)]))
    with pytest.raises(ValueError, match="in_channels"):
        model.inference_copy()(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="p_clean is missing"):
        InferenceBackbone(model.dynamic, torch.float32)(images())
    with pytest.raises(TypeError, match="no classifier"):
        InferenceBackbone(model.router.backbone, torch.float32)(images())
    model.dynamic.stem.bn.eps = 1e-3
    with pytest.raises(TypeError, match="one eps"):
        model.inference_copy()


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


# --- the ops


def affine_case(dtype: torch.dtype, groups: int = 1, residual: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"input": (3, 4, 7, 6), "weight": (6, 4 // groups, 3, 3), "scale": (3, 6), "shift": (3, 6)}
    if residual:
        shapes["residual"] = (3, 6, 4, 3)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def plain(input, weight, scale, shift, residual=None, *, groups=1, activation="relu"):  # type: ignore[no-untyped-def]
    u = F.conv2d(input, weight, stride=2, padding=1, groups=groups)
    y = u * scale[:, :, None, None] + shift[:, :, None, None]
    y = y if residual is None else y + residual
    return F.relu(y) if activation else y


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "last"])
@pytest.mark.parametrize(("groups", "residual", "activation"), [(1, True, "relu"), (2, False, None)])
def test_affine_conv2d_and_its_gradients_equal_plain_torch(
    backend, layout, groups, residual, activation
) -> None:  # type: ignore[no-untyped-def]
    options = {"groups": groups, "activation": activation}
    single = affine_case(torch.float32, groups, residual)
    leaves = {n: t.double().requires_grad_() for n, t in single.items()}
    expected = plain(**leaves, **options)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    slopes = torch.autograd.grad(expected, list(leaves.values()), upstream)
    single["input"] = single["input"].contiguous(memory_format=layout)
    for name in single:  # each gradient alone, then all of them
        chosen = {n: t.clone().requires_grad_(n == name) for n, t in single.items()}
        y = ops.affine_conv2d(**chosen, stride=2, padding=1, backend=backend, **options)
        assert y.is_contiguous(memory_format=layout)
        assert error(y, expected) < 1e-5
        (got,) = torch.autograd.grad(y, [chosen[name]], upstream.float())
        assert error(got, slopes[list(single).index(name)]) < 1e-4
    chosen = {n: t.clone().requires_grad_() for n, t in single.items()}
    y = ops.affine_conv2d(**chosen, stride=2, padding=1, backend=backend, **options)
    for got, slope in zip(
        torch.autograd.grad(y, list(chosen.values()), upstream.float()), slopes, strict=True
    ):
        assert error(got, slope) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_affine_conv2d_keeps_no_more_than_it_needs(backend: str) -> None:
    def saved_shapes(*names: str) -> list[tuple[int, ...]]:
        tensors = {n: t.requires_grad_(n in names) for n, t in affine_case(torch.float32).items()}
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
        ):
            ops.affine_conv2d(**tensors, stride=2, padding=1, backend=backend)
        return [shape for shape in shapes if len(shape) == 4 and shape[1] != 4]

    image = (3, 6, 4, 3)
    assert saved_shapes("input") == [image]  # the mask alone
    assert saved_shapes("input", "scale") == [image, image]  # u as well
    assert saved_shapes() == []


def test_affine_conv2d_refuses_bad_arguments() -> None:
    good = affine_case(torch.float32)
    for change, message in (
        ({"scale": torch.ones(3, 5)}, r"scale must have shape \[B, C_out\] = \[3, 6\], got \[3, 5\]"),
        ({"shift": torch.ones(2, 6)}, r"shift must have shape"),
        ({"residual": torch.ones(3, 6, 4, 4)}, r"residual must have the output's shape \[3, 6, 4, 3\]"),
        ({"activation": "tanh"}, "activation must be"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.affine_conv2d(**(good | change), stride=2, padding=1)
    with pytest.raises(TypeError, match="residual has dtype"):
        ops.affine_conv2d(**(good | {"residual": good["residual"].bfloat16()}), stride=2, padding=1)
    x = good["input"].requires_grad_()
    y = ops.affine_conv2d(**(good | {"input": x}), stride=2, padding=1)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        slope.sum().backward()


def network_case(dynamic: int) -> tuple[Tensor, tuple[int, ...], Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(5)
    widths = (3, 4, 2)
    tables = torch.randn(4, 2, 9, generator=generator, dtype=torch.float64)
    tables[3].abs_()
    filter_scale = torch.rand(5, dynamic, generator=generator, dtype=torch.float64) if dynamic else None
    return tables, widths, filter_scale, torch.rand(5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dynamic", [0, 3, 7, 9])
def test_network_coefficients_equal_those_of_each_layer(dynamic: int) -> None:
    tables, widths, filter_scale, p = network_case(dynamic)
    actual = ops.network_coefficients(tables, widths, filter_scale, p, eps=1e-5)
    begin = 0
    for (scale, shift), width in zip(actual, widths, strict=True):
        layer_scale = (
            None if filter_scale is None or begin >= dynamic else filter_scale[:, begin : begin + width]
        )
        norm = coefficients.Norm.stacked(tables[:, :, begin : begin + width], 1e-5)
        expected = coefficients.eval_coefficients(norm, coefficients.Mix(layer_scale, p), 5)
        assert scale.is_contiguous()
        assert shift.is_contiguous()
        assert error(scale, expected[0]) < 1e-14
        assert error(shift, expected[1]) < 1e-14
        begin += width
    leaves = [x.requires_grad_() for x in (filter_scale, p) if x is not None]

    def flat(*given: Tensor) -> tuple[Tensor, ...]:
        o = given[0] if filter_scale is not None else None
        pairs = ops.network_coefficients(tables, widths, o, given[-1], eps=1e-5)
        return tuple(x for pair in pairs for x in pair)

    assert torch.autograd.gradcheck(flat, leaves)


@pytest.mark.skipif(native.load() is not None, reason="the C++ backend is not built")
@pytest.mark.parametrize("requested", ["both", "scales", "shifts"])
@pytest.mark.parametrize("dynamic", [0, 3, 7, 9])
def test_network_coefficients_in_one_operator_equal_eager(dynamic: int, requested: str) -> None:
    tables, widths, filter_scale, p = network_case(dynamic)
    chosen = {"both": slice(None), "scales": slice(0, None, 2), "shifts": slice(1, None, 2)}[requested]

    def results(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (filter_scale, p) if x is not None]
        given = None if filter_scale is None else leaves[0]
        pairs = ops.network_coefficients(
            tables.to(dtype), widths, given, leaves[-1], eps=1e-5, backend=backend
        )
        outputs = [x for pair in pairs for x in pair]
        generator = torch.Generator().manual_seed(6)
        upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
        grads = torch.autograd.grad(
            outputs[chosen], leaves, [g.to(dtype) for g in upstream[chosen]], materialize_grads=True
        )
        return [*outputs, *grads]

    got = results("cpp", torch.float32)
    assert "Coefficients" in got[0].grad_fn.name()
    for one, other in zip(got, results("eager", torch.float64), strict=True):
        # sums of at most 18 products in float32
        one, other = one.detach().double(), other.detach()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_network_coefficients_refuse_bad_arguments() -> None:
    tables, widths, filter_scale, p = network_case(7)
    call = {"tables": tables, "widths": widths, "filter_scale": filter_scale, "p_clean": p, "eps": 1e-5}
    for change, kind, message in (
        ({"widths": (3, 4)}, ValueError, r"tables must be \[4, 2, 7\]"),
        ({"tables": tables.half()}, TypeError, "tables must be float32 or float64"),
        ({"tables": tables.clone().requires_grad_()}, ValueError, "must not require a gradient"),
        ({"filter_scale": filter_scale[:, :5]}, ValueError, r"filter_scale must be \[5, D\]"),
        ({"p_clean": p[:, None]}, ValueError, r"p_clean must be floating point \[B\]"),
        ({"eps": 0}, ValueError, "eps must be a positive number"),
    ):
        with pytest.raises(kind, match=message):
            ops.network_coefficients(**(call | change))


def test_sign_step_clips_and_casts() -> None:
    x = torch.tensor([0.0, 0.5, 1.0, 0.5, 0.5, 0.5])
    x_adv = torch.tensor([0.0, 0.5, 1.0, 0.59, 0.41, 0.55])
    grad = torch.tensor([-1.0, 0.0, 2.0, 1e-30, -3.0, 5.0])
    cast = torch.empty(6, dtype=torch.bfloat16)
    moved = ops.sign_step(x_adv, grad, x, 0.03, 0.1, cast=cast)
    assert moved.tolist() == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.4, 0.58], abs=1e-7)
    assert torch.equal(cast, moved.bfloat16())
    assert torch.equal(ops.sign_step(x_adv, grad.bfloat16(), x, 0.03, 0.1), moved)
    with pytest.raises(ValueError, match=r"grad must have x_adv's shape \[6\], got \[2\]"):
        ops.sign_step(x_adv, grad[:2], x, 0.03, 0.1)


# --- a network of layers in one operator


@pytest.mark.skipif(native.load() is not None, reason="the C++ backend is not built")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("requested", ["images", "tables", "both"])
def test_a_network_in_one_operator_equals_its_layers(requested: str, layout: torch.memory_format) -> None:
    x, weights, tables, layers = small_network(torch.float32, layout)
    leaves = [] if requested == "tables" else [x.requires_grad_()]
    if requested != "images":
        leaves += [table.requires_grad_() for pair in tables for table in pair]
    generator = torch.Generator().manual_seed(1)

    def results(backend: str, leaves: list[Tensor], arguments: tuple) -> list[Tensor]:
        with use_backend(backend):
            outputs = ops.affine_network(*arguments, layers)
        generator.manual_seed(1)
        grads = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    got = results("cpp", leaves, (x, weights, tables))
    assert all("Network" in y.grad_fn.name() for y in got[:3])  # not layer by layer
    wide_x = x.detach().double().requires_grad_()
    wide_tables = [tuple(t.detach().double().requires_grad_() for t in pair) for pair in tables]
    wide = [] if requested == "tables" else [wide_x]
    wide += [] if requested == "images" else [t for pair in wide_tables for t in pair]
    want = results("reference", wide, (wide_x, [w.double() for w in weights], wide_tables))
    assert len(got) == len(want) == 3 + len(leaves)
    for one, other in zip(got, want, strict=True):
        # six layers of sums of at most 144 products in float32
        torch.testing.assert_close(
            one.double(), other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max())
        )


@pytest.mark.skipif(native.load() is not None, reason="the C++ backend is not built")
def test_a_network_in_one_operator_without_gradients_and_with_one_output_used() -> None:
    x, weights, tables, layers = small_network(torch.float32, torch.contiguous_format)
    with torch.no_grad():
        quiet = ops.affine_network(x, weights, tables, layers)
    with torch.inference_mode():
        inferred = ops.affine_network(x, weights, tables, layers)
    outputs = ops.affine_network(x.requires_grad_(), weights, tables, layers)
    for one, other, third in zip(outputs, quiet, inferred, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
        assert not other.requires_grad
    (early,) = torch.autograd.grad(outputs[0].sum(), x, retain_graph=True)  # later layers get no gradient
    assert early.abs().sum() > 0
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(outputs[2].sum(), x, create_graph=True)


@pytest.mark.skipif(native.load() is not None, reason="the C++ backend is not built")
def test_a_network_in_one_operator_refuses_a_wiring_that_cannot_be() -> None:
    x, weights, tables, layers = small_network(torch.float32, torch.contiguous_format)
    with pytest.raises(RuntimeError, match="layer 1 may take the outputs of earlier layers only, not of 3"):
        ops.affine_network(x, weights, tables, [layers[0], layers[1]._replace(input=3), *layers[2:]])
    scales, shifts = zip(*tables, strict=True)
    with pytest.raises(RuntimeError, match="expected 11 numbers for each of 6 layers, got 3"):
        torch.ops.awnet.network_native(x, scales, shifts, weights, [0, 0, 0])
    numbers = [-1, -1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    with pytest.raises(RuntimeError, match=r"layer 0 needs a scale and a shift \[2, 8\], got \[2, 4\]"):
        torch.ops.awnet.network_native(x, [scales[0][:, :4]], shifts[:1], weights[:1], numbers)
    with pytest.raises(RuntimeError, match="a scale and a shift for each of 1 layers, got 6 and 1"):
        torch.ops.awnet.network_native(x, scales, shifts[:1], weights[:1], numbers)

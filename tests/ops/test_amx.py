"""Frozen bfloat16 networks on AMX tiles, on the processor's where it has them and on emulated ones anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from awnet import ops
from awnet.attacks import frozen
from awnet.models import create_model
from awnet.ops.backends import amx, native
from awnet.ops.network import NetworkLayer, layer_by_layer

pytestmark = pytest.mark.skipif(native.load() is not None, reason="the native module is not built")


def has_amx() -> bool:
    return native.load() is None and amx.hardware_obstacle() is None


needs_amx = pytest.mark.skipif(not has_amx(), reason="this processor has no AMX")


@pytest.fixture(params=["emulate", pytest.param("auto", marks=needs_amx)])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWNET_AMX", request.param)
    monkeypatch.setattr(amx, "_FEWEST_IMAGES", 1)
    return str(request.param)


class Net(NamedTuple):
    x: Tensor
    weights: list[Tensor]
    coefficients: list[tuple[Tensor, Tensor]]
    layers: list[NetworkLayer]

    def on(self, dtype: torch.dtype) -> Net:
        """Detached copies that require gradients; scale and shift at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        tables = [tuple(t.detach().to(wide).requires_grad_() for t in pair) for pair in self.coefficients]
        weights = [w.to(dtype) for w in self.weights]
        return Net(self.x.detach().to(dtype).requires_grad_(), weights, tables, self.layers)  # type: ignore[arg-type]


def conv(
    input: int,
    residual: int = -1,
    averaged: bool = False,
    relu: bool = True,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
) -> NetworkLayer:
    geometry = ops.AffineConvolution(
        stride=(stride, stride),
        padding=(padding, padding),
        dilation=(dilation, dilation),
        groups=1,
        activation="relu" if relu else None,
    )
    return NetworkLayer(geometry, input, residual, averaged)


def net(
    images: tuple[int, int, int, int],
    widths: Sequence[int],
    kernels: Sequence[int],
    layers: list[NetworkLayer],
) -> Net:
    generator = torch.Generator().manual_seed(0)
    batch, channels = images[:2]
    weights, tables = [], []
    for width, kernel, layer in zip(widths, kernels, layers, strict=True):
        inputs = channels if layer.input < 0 else widths[layer.input]
        weight = torch.randn(width, inputs, kernel, kernel, generator=generator)
        weights.append((weight / (inputs * kernel**2) ** 0.5).bfloat16())
        scale = torch.rand(batch, width, generator=generator) + 0.5
        tables.append((scale, 0.3 * torch.randn(batch, width, generator=generator)))
    x = torch.rand(images, generator=generator).bfloat16()
    return Net(x, weights, tables, layers)


def block_net(batch: int = 18, side: int = 9) -> Net:
    """A stem, a strided block with a 1x1 shortcut and one without, three averages: 36 channels."""
    layers = [
        conv(-1, averaged=True),
        conv(0, relu=False, stride=2, padding=0),
        conv(0, stride=2),
        conv(2, residual=1, averaged=True),
        conv(3),
        conv(4, residual=3, averaged=True),
    ]
    return net((batch, 3, side, side - 1), [20, 36, 36, 36, 36, 36], [3, 1, 3, 3, 3, 3], layers)


Run = Callable[..., list[Tensor]]


def values_and_gradients(
    run: Run, network: Net, cotangents: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    means = run(*network)
    leaves = [network.x, *(table for pair in network.coefficients for table in pair)]
    total = sum((mean * c.to(mean.dtype)).sum() for mean, c in zip(means, cotangents, strict=True))
    gradients = torch.autograd.grad(total, [leaf for leaf in leaves if leaf.requires_grad])  # type: ignore[arg-type]
    return [mean.detach() for mean in means], list(gradients)


def cotangents_of(network: Net) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    widths = [len(w) for w, layer in zip(network.weights, network.layers, strict=True) if layer.averaged]
    return [torch.randn(len(network.x), width, generator=generator).bfloat16() for width in widths]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


# images, width, kernel, stride, padding, dilation
SHAPES = {
    "3x3": ((5, 3, 7, 6), 40, 3, 1, 1, 1),
    "a full cell": ((16, 32, 4, 4), 32, 3, 1, 1, 1),
    "1x1 stride 2, 17 images": ((17, 33, 7, 7), 24, 1, 2, 0, 1),
    "3x3 stride 2, even side": ((4, 16, 8, 6), 48, 3, 2, 1, 1),
    "dilation 2, stride 3": ((4, 5, 9, 11), 16, 3, 3, 2, 2),
    "one pixel": ((6, 64, 1, 1), 33, 3, 1, 1, 1),
    "5x5, no padding": ((4, 2, 6, 5), 7, 5, 1, 0, 1),
    "padding beyond the filter": ((4, 2, 3, 3), 7, 1, 1, 1, 1),
}
ROUNDING, SUM = 2.0**-8, 2.0**-24  # of bfloat16 and of one float32 addition


@pytest.mark.parametrize("shape", SHAPES)
def test_one_layer_is_within_the_bound_of_its_roundings(shape: str, tiles: str) -> None:
    images, width, kernel, stride, padding, dilation = SHAPES[shape]
    layer = conv(-1, averaged=True, stride=stride, padding=padding, dilation=dilation)
    given = net(images, [width], [kernel], [layer])
    cotangents = cotangents_of(given)
    assert amx.runs(given.x, given.weights, [1])
    (mean,), (d_x, d_scale, d_shift) = values_and_gradients(
        ops.affine_network, given.on(torch.bfloat16), cotangents
    )
    exact = given.on(torch.float64)
    (expected,), (expected_x, expected_scale, expected_shift) = values_and_gradients(
        layer_by_layer, exact, cotangents
    )

    # the same with absolute values bounds every sum that is rounded
    x, weight = exact.x.detach(), exact.weights[0]
    scale, shift = (t.detach()[:, :, None, None] for t in exact.coefficients[0])
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    u = torch.conv2d(x, weight, **geometry)
    terms = images[1] * kernel**2 + 3
    sums = torch.conv2d(x.abs(), weight.abs(), **geometry) * scale + shift.abs()
    y = torch.relu(u * scale + shift)
    of_mean = (ROUNDING * y + terms * SUM * sums).mean((2, 3)) + ROUNDING * expected.abs()
    pixels = y.shape[2] * y.shape[3]
    assert ((mean.double() - expected).abs() <= of_mean + pixels * SUM * y.mean((2, 3))).all()

    g = (cotangents[0].double()[:, :, None, None] / pixels).expand_as(u) * (y > 0)
    assert ((d_shift.double() - expected_shift).abs() <= (pixels + 2) * SUM * g.abs().sum((2, 3))).all()
    of_scale = (ROUNDING + (pixels + terms) * SUM) * (g * sums / scale).abs().sum((2, 3))
    assert ((d_scale.double() - expected_scale).abs() <= of_scale).all()
    spread = torch.nn.grad.conv2d_input(list(x.shape), weight.abs(), (g * scale).abs(), **geometry)
    of_x = (ROUNDING + (width * kernel**2 + 2) * SUM) * spread + ROUNDING * expected_x.abs()
    assert ((d_x.double() - expected_x).abs() <= of_x + 1e-12).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_residual_blocks_are_no_worse_than_twice_the_library(
    threads: int, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 18 images are two groups, which two threads take one each; 5 are one, whose layers they share
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (5, 18):
            given = block_net(batch)
            cotangents = cotangents_of(given)
            means, gradients = values_and_gradients(ops.affine_network, given.on(torch.bfloat16), cotangents)
            monkeypatch.setenv("AWNET_AMX", "0")
            low, low_gradients = values_and_gradients(
                ops.affine_network, given.on(torch.bfloat16), cotangents
            )
            monkeypatch.setenv("AWNET_AMX", tiles)
            exact, exact_gradients = values_and_gradients(layer_by_layer, given.on(torch.float64), cotangents)
            for got, library, expected in zip(
                means + gradients, low + low_gradients, exact + exact_gradients, strict=True
            ):
                assert error(got, expected) < 2 * error(library, expected)
    finally:
        torch.set_num_threads(before)


# In each, some layer's output has several readers, whose gradients are added up in the order of the backward.
READERS = {
    "the residual of two layers": [
        conv(-1),
        conv(0),
        conv(1, residual=0),
        conv(2, residual=0, averaged=True),
    ],
    "the input and the residual of one layer": [
        conv(-1),
        conv(0, residual=0),
        conv(1, residual=1, averaged=True),
    ],
    "a residual, the input of a branch and of another residual's layer": [
        conv(-1),
        conv(0),
        conv(1, residual=0),
        conv(0, relu=False),
        conv(3, residual=2, averaged=True),
    ],
    "averaged, input and residual": [
        conv(-1, averaged=True),
        conv(0, averaged=True),
        conv(1, residual=0),
        conv(1, residual=2, averaged=True),
    ],
}


@pytest.mark.parametrize("readers", READERS)
def test_gradients_of_all_readers_of_a_layer_are_added(readers: str, tiles: str) -> None:
    layers = READERS[readers]
    given = net((3, 2, 4, 3), [7] * len(layers), [3] * len(layers), layers)
    cotangents = cotangents_of(given)
    means, grads = values_and_gradients(ops.affine_network, given.on(torch.bfloat16), cotangents)
    exact, exact_grads = values_and_gradients(layer_by_layer, given.on(torch.float64), cotangents)
    # One reader's gradient is a third of the whole or more. Each of the five layers rounds what it passes on to
    # 8 bits, and a ReLU may decide otherwise where its input rounds to the other side of 0.
    for got, value in zip(means + grads, exact + exact_grads, strict=True):
        assert error(got, value) < 0.06


def test_an_image_does_not_depend_on_the_others_nor_on_the_batch(tiles: str) -> None:
    given = block_net(21)
    cotangents = cotangents_of(given)
    means, gradients = values_and_gradients(ops.affine_network, given.on(torch.bfloat16), cotangents)
    spoiled = given._replace(x=given.x.clone())
    spoiled.x[[3, 17]] = torch.nan
    broken, broken_gradients = values_and_gradients(
        ops.affine_network, spoiled.on(torch.bfloat16), cotangents
    )
    others = [i for i in range(21) if i not in (3, 17)]
    for got, expected in zip(broken + broken_gradients, means + gradients, strict=True):
        assert torch.equal(got[others], expected[others])
    assert broken[-1][[3, 17]].isnan().all()
    part = Net(given.x[:7], given.weights, [(a[:7], b[:7]) for a, b in given.coefficients], given.layers)
    fewer, fewer_gradients = values_and_gradients(
        ops.affine_network, part.on(torch.bfloat16), [c[:7] for c in cotangents]
    )
    for got, expected in zip(fewer, means, strict=True):
        assert torch.equal(got, expected[:7])
    assert torch.equal(fewer_gradients[0], gradients[0][:7])


def test_images_of_any_strides_and_used_memory_give_the_same_bits(tiles: str) -> None:
    given = block_net(6)
    cotangents = cotangents_of(given)
    expected = values_and_gradients(ops.affine_network, given.on(torch.bfloat16), cotangents)
    room = torch.full((8, 5, 11, 10), torch.nan).bfloat16()
    room[1:7, 1:4, 1:10, 1:9] = given.x
    views = [room[1:7, 1:4, 1:10, 1:9], given.x.contiguous(memory_format=torch.channels_last)]
    other = net((9, 40, 8, 8), [40], [3], [conv(-1, averaged=True)])
    other.x.fill_(torch.nan)
    for view in views:
        values_and_gradients(ops.affine_network, other.on(torch.bfloat16), cotangents_of(other))
        network = given.on(torch.bfloat16)._replace(x=view.detach().requires_grad_())
        got = values_and_gradients(ops.affine_network, network, cotangents)
        for a, b in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
            assert torch.equal(a, b)
    assert got[1][0].is_contiguous(memory_format=torch.channels_last)


LAYERS = {
    "3x3": ((17, 32, 6, 5), 64, 3, 1, 1, 1),
    "3x3 stride 2, 40 images": ((40, 64, 7, 8), 32, 3, 2, 1, 1),
    "1x1 stride 2": ((16, 32, 4, 4), 32, 1, 2, 0, 1),
    "more pixels than a chunk": ((16, 32, 9, 9), 32, 3, 1, 1, 1),
    "dilation 2": ((33, 32, 5, 5), 32, 3, 1, 2, 2),
    "a stride beyond the image": ((16, 32, 5, 4), 32, 3, 2**20, 1, 1),
    "padding and dilation of one size": ((16, 32, 5, 4), 32, 3, 1, 2**20, 2**20),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_s_convolution_is_within_the_bound_of_its_roundings(case: str, tiles: str) -> None:
    images, width, kernel, stride, padding, dilation = LAYERS[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, generator=generator).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(width, images[1], kernel, kernel, generator=generator).bfloat16()
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    numbers = [[stride] * 2, [padding] * 2, [dilation] * 2]
    y = torch.ops.awnet.amx_convolution(x, weight, *numbers)
    grad = torch.randn(y.shape, generator=generator).bfloat16().contiguous(memory_format=torch.channels_last)
    d_x, d_weight = torch.ops.awnet.amx_convolution_backward(grad, x, weight, *numbers, True, True)

    def exact(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
        y = torch.conv2d(x, weight, **geometry)
        d_x = torch.nn.grad.conv2d_input(list(x.shape), weight, grad, **geometry)
        return [y, d_x, torch.nn.grad.conv2d_weight(x, list(weight.shape), grad, **geometry)]

    expected = exact(x.double(), weight.double(), grad.double())
    terms = exact(x.double().abs(), weight.double().abs(), grad.double().abs())
    for got, value, sums in zip((y, d_x, d_weight), expected, terms, strict=True):
        additions = max(images[1], width) * kernel**2 + len(x) * y.shape[2] * y.shape[3]
        assert ((got.double() - value).abs() <= ROUNDING * value.abs() + additions * SUM * sums).all()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert d_x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("sizes", [(2**40, 1, 1), (1, 2**40, 2**40), (1, 2**62, 1)])
def test_sizes_too_large_for_tiles_are_refused_by_name(sizes: tuple[int, int, int], tiles: str) -> None:
    x = torch.ones(16, 32, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.ones(32, 32, 3, 3).bfloat16()
    numbers = [[size] * 2 for size in sizes]
    with pytest.raises(RuntimeError, match="a size is too large for tiles"):
        torch.ops.awnet.amx_convolution(x, weight, *numbers)
    with pytest.raises(RuntimeError, match="a size is too large for tiles"):
        torch.ops.awnet.amx_convolution_backward(x, x, weight, *numbers, True, True)


def test_a_training_layer_takes_tiles_and_is_no_worse_than_twice_the_library(
    tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(18, 32, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 32, 3, 3, generator=generator) / 17
    filter_scale, clean = torch.rand(18, 64, generator=generator) + 0.5, torch.arange(18) % 2 == 0

    def run(dtype: torch.dtype, backend: str, stride: int = 1) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, filter_scale)]
        wide = torch.promote_types(dtype, torch.float32)
        norm = [torch.full((2, 64), value, dtype=wide) for value in (1.0, 0.0, 0.0, 1.0)]
        call: dict[str, Any] = {"is_clean": clean, "training": True, "padding": 1, "stride": stride}
        y = ops.aw_conv2d(*leaves, *norm, **call, backend=backend)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return [y.detach(), *torch.autograd.grad((y * cotangent).sum(), leaves)]

    ours = run(torch.bfloat16, "cpp")
    beyond = run(torch.bfloat16, "cpp", 2**40)
    monkeypatch.setenv("AWNET_AMX", "0")
    library = run(torch.bfloat16, "cpp")
    # sizes too large for tiles are the library's
    assert all(torch.equal(a, b) for a, b in zip(beyond, run(torch.bfloat16, "cpp", 2**40), strict=True))
    # y may be the same to the bit, the sums of a weight's gradient have another order
    assert not all(torch.equal(a, b) for a, b in zip(ours, library, strict=True))
    for got, low, expected in zip(ours, library, run(torch.float64, "eager"), strict=True):
        assert error(got, expected) < 2 * error(low, expected)


def test_gradients_are_made_of_what_requires_them_only(tiles: str) -> None:
    given = block_net(5)
    cotangents = cotangents_of(given)
    whole = values_and_gradients(ops.affine_network, given.on(torch.bfloat16), cotangents)[1]
    network = given.on(torch.bfloat16)
    (d_x,) = torch.autograd.grad(
        sum((m * c).sum() for m, c in zip(ops.affine_network(*network), cotangents, strict=True)), network.x
    )
    assert torch.equal(d_x, whole[0])
    fixed = network._replace(x=network.x.detach())
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            values_and_gradients(ops.affine_network, fixed, cotangents)[1], whole[1:], strict=True
        )
    )
    # one of three averages, twice over one graph: what lies behind it gets no gradient
    mean = ops.affine_network(*network)[0]
    leaves = [network.x, network.coefficients[0][0], network.coefficients[5][0]]
    first = torch.autograd.grad(mean.sum(), leaves, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(mean.sum(), leaves, allow_unused=True)
    assert first[0].abs().sum() > 0
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[2] is None or not first[2].any()
    with torch.no_grad():
        assert not any(m.requires_grad for m in ops.affine_network(*network))


def test_packed_weights_follow_the_weights(tiles: str) -> None:
    given = block_net(4).on(torch.bfloat16)
    packed = ops.PackedWeights()
    with torch.no_grad():
        before = ops.affine_network(*given, packed)
        assert packed.of(given.weights) is packed.of(given.weights)
        given.weights[0].mul_(2)
        after = ops.affine_network(*given, packed)
        expected = ops.affine_network(*given)
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
    assert not torch.equal(before[0], after[0])


def test_a_frozen_model_is_no_worse_than_twice_autocast_and_follows_its_model(tiles: str) -> None:
    torch.manual_seed(0)
    model = create_model("awnet_tiny", num_classes=5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "head" in name or "bn" in name:
                value.add_(0.2 * torch.randn_like(value))
    x = torch.rand(20, 3, 8, 8)

    def run(of: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.clone().requires_grad_()
        logits = of(images)
        return logits.detach(), torch.autograd.grad((logits * torch.arange(5)).sum(), images)[0]

    still = model.inference_copy(torch.bfloat16)
    for _ in range(2):
        with frozen(model):
            with torch.autocast("cpu", torch.bfloat16):
                low = run(model, x)
            exact = run(model.double(), x.double())
        model.float()
        for got, library, expected in zip(run(still, x), low, exact, strict=True):
            assert error(got, expected) < 2 * error(library, expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        still.refresh()


def test_grouped_convolutions_other_dtypes_and_the_switch_keep_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWNET_AMX", "emulate")
    given = block_net(8)
    groups = [1] * len(given.weights)
    assert amx.runs(given.x, given.weights, groups)
    assert not amx.runs(given.x, given.weights, [*groups[1:], 2])
    assert not amx.runs(given.x.float(), given.weights, groups)
    assert not amx.runs(given.x[:7], given.weights, groups)
    monkeypatch.setenv("AWNET_AMX", "0")
    assert not amx.runs(given.x, given.weights, groups)
    assert amx.obstacle() == "AWNET_AMX=0"
    monkeypatch.setenv("AWNET_AMX", "yes")
    with pytest.raises(ValueError, match="AWNET_AMX must be one of auto, 0, emulate, got 'yes'"):
        amx.obstacle()


def test_explain_reports_whether_a_frozen_network_runs_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    given = block_net(4)

    def said(groups: int = 1, dtype: torch.dtype = torch.bfloat16) -> str | None:
        x = torch.rand(2, 4, 3, 3, dtype=dtype)
        table = torch.ones(2, 8)
        weight = torch.rand(8, 4 // groups, 1, 1, dtype=dtype)
        return ops.explain(ops.affine_conv2d, x, weight, table, table, groups=groups).amx

    monkeypatch.setenv("AWNET_AMX", "emulate")
    assert said() == "on AMX tiles (emulated)"
    assert said(groups=2) == "not on AMX tiles, which do not support grouped convolutions"
    assert said(dtype=torch.float32) is None
    monkeypatch.setenv("AWNET_AMX", "0")
    text = str(ops.explain(ops.affine_conv2d, given.x, given.weights[0], *given.coefficients[0]))
    assert "in a frozen network: not on AMX tiles, AWNET_AMX=0" in text


def test_the_operator_refuses_what_it_cannot_run() -> None:
    given = block_net(4)
    packed = ops.PackedWeights().of(given.weights)
    scales, shifts = zip(*given.coefficients, strict=True)
    numbers = [n for layer in given.layers for n in _numbers(layer)]

    def run(**changed: Any) -> None:
        arguments = {"x": given.x, "scales": scales, "shifts": shifts, "weights": given.weights}
        arguments |= {"packed": packed, "numbers": numbers, "emulate": True}
        torch.ops.awnet.network_amx(**(arguments | changed))

    run()
    for changed, message in (
        ({"x": given.x.float()}, "expected layers and bfloat16 images"),
        ({"packed": packed[::-1]}, "these are not its packed filters"),
        ({"scales": [s[:3] for s in scales]}, "needs a scale and a shift"),
        ({"x": given.x[:, :2]}, "takes 3 channels, got 2"),
        ({"numbers": [*numbers[:10], 2, *numbers[11:]]}, "has 2 groups"),
        ({"numbers": [*numbers[:-10], 0, *numbers[-9:]]}, "adds a residual of another shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(**changed)


def _numbers(layer: NetworkLayer) -> list[int]:
    conv, relu = layer.convolution.conv, layer.convolution.activation == "relu"
    head = [layer.input, layer.residual, int(layer.averaged), int(relu)]
    return [*head, *conv.stride, *conv.padding, *conv.dilation, conv.groups]


def test_a_forked_process_gives_the_same_bits(tiles: str) -> None:
    given = block_net(6)
    with torch.no_grad():
        expected = ops.affine_network(*given)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            same = all(torch.equal(a, b) for a, b in zip(ops.affine_network(*given), expected, strict=True))
            os.write(write, b"same" if same else b"else")
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        assert answer.read() == b"same"
    os.waitpid(child, 0)


_REFUSED = """
    import ctypes, logging, struct
    # a seccomp filter: arch_prctl(0x1023, ...) fails with EPERM, all else passes
    code = [(0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023),
            (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
    program = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(program)
    filter = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter, 0, 0) == 0
    logging.basicConfig(level=logging.WARNING)
    import torch
    from awnet.models import create_model
    from awnet.ops.backends import amx
    model = create_model("awnet_tiny").inference_copy(torch.bfloat16)
    with torch.no_grad():
        print(model(torch.rand(8, 3, 8, 8)).isfinite().all().item())
    print(amx.obstacle())
"""


@pytest.mark.slow
@needs_amx
def test_without_permission_for_amx_the_library_runs_and_the_reason_is_reported() -> None:
    environment = {**os.environ, "AWNET_AMX": "auto", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_REFUSED)], capture_output=True, text=True, env=environment
    )
    if "assert libc.prctl" in ran.stderr:
        pytest.skip("this machine allows no seccomp filter")
    assert ran.returncode == 0, ran.stderr
    works, reason = ran.stdout.splitlines()
    assert works == "True"
    assert reason.startswith("the kernel refuses this process the use of AMX")
    assert ran.stderr.count("bfloat16 networks run without AMX: the kernel refuses") == 1

"""The Triton convolutions against the reference in float64: tests/support/interpreter.py says how this file runs.

Tiles are 16³ here, the least that a tensor-core product takes: the paths are those of a shipped tile, and the
interpreter takes milliseconds for each step of a product. bfloat16 products are garbage in the interpreter:
they are compiled ahead of time instead (kernels/ahead.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from awnet.benchmarks import convolutions
from awnet.kernels import conv, epilogue, fused_conv, grouped_conv
from awnet.kernels.launch import recorded
from support.interpreter import DEVICE, Guarded
from torch import Tensor

from awnet import reference
from awnet.ops import activations, launch_config
from awnet.ops.args import ACTIVATIONS, Conv, LayerArgs
from awnet.ops.backends.triton import TritonPasses

TILE = conv.Tile(16, 16, 16, warps=4, stages=2)
SWAPPED = TILE._replace(swap_ab=1)
# float32 sums of at most 200 products; float16 rounds the result once, to 2^-12 on average
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


class Shape(NamedTuple):
    batch: int
    c_in: int
    c_out: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple[Any, Any, Any, int]:
        return self.stride, self.padding, self.dilation, self.groups


SHAPES = {
    "rows run on over odd samples": Shape(3, 5, 7, (5, 3), (3, 3), padding=(1, 1)),
    "stride 2, several blocks of both channels": Shape(2, 20, 18, (6, 5), (3, 3), (2, 2), (1, 1)),
    "1x1, more than one block of input channels": Shape(5, 17, 3, (3, 4), (1, 1)),
    "1x1 stride 2 with padding": Shape(3, 4, 5, (6, 6), (1, 1), (2, 2), (1, 1)),
    "a sample is a tile": Shape(2, 16, 16, (6, 6), (3, 3)),
    "several samples are a tile": Shape(5, 3, 17, (2, 2), (3, 3), padding=(1, 1)),
    "several samples and empty rows are a tile": Shape(3, 3, 5, (3, 2), (3, 3), padding=(1, 1)),
    "several tiles are a sample": Shape(1, 6, 4, (8, 4), (3, 3), padding=(1, 1)),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
ways = pytest.mark.parametrize(
    ("dtype", "tile"),
    [(torch.float32, TILE), (torch.float16, SWAPPED)],
    ids=["float32", "float16 swap_ab"],
)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """Every tensor that the kernels fill starts as NaN between guard bands."""
    bands = Guarded()

    def new_tensor(shape: Any, like: Tensor, dtype: torch.dtype = torch.float32, **layout: Any) -> Tensor:
        return bands.output(torch.empty(shape, dtype=dtype, device=like.device, **layout))

    for module in (fused_conv, epilogue):
        monkeypatch.setattr(module, "new_tensor", new_tensor)
    yield bands
    bands.check()


class Layer:
    """Random arguments of a convolution between guard bands, and what the reference makes of them."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        bands: Guarded,
        channels_last: bool = True,
        offset: float = 0.0,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(shape[:3]))
        layout = torch.channels_last if channels_last else torch.contiguous_format

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        def image(values: Tensor) -> Tensor:
            return bands.input(values.to(DEVICE, dtype).to(memory_format=layout))

        fan_in = shape.c_in // shape.groups
        self.shape = shape
        self.x = image(normal(shape.batch, shape.c_in, *shape.size) + offset)
        weight = (
            normal(shape.c_out, fan_in, *shape.kernel) / (fan_in * shape.kernel[0] * shape.kernel[1]) ** 0.5
        )
        self.weight = bands.input(weight.to(DEVICE, dtype))
        self.scale = bands.input(normal(shape.batch, shape.c_out).to(DEVICE))
        self.shift = bands.input(normal(shape.batch, shape.c_out).to(DEVICE))
        self.u = self._convolved(None)
        self.residual = image(normal(*self.u.shape))
        self.d_u = image(normal(*self.u.shape))

    def _convolved(self, scale: Tensor | None) -> Tensor:
        stride, padding, dilation, groups = self.shape.geometry
        return reference.filter_scaled_conv2d(
            self.x.double(), self.weight.double(), scale,
            stride=stride, padding=padding, dilation=dilation, groups=groups,
        )  # fmt: skip

    def y(self, residual: bool, relu: bool) -> Tensor:
        y = self._convolved(self.scale.double()) + self.shift.double()[:, :, None, None]
        if residual:
            y = y + self.residual.double()
        return torch.relu(y) if relu else y

    def d_input(self) -> Tensor:
        stride, padding, dilation, groups = self.shape.geometry
        return torch.nn.grad.conv2d_input(
            self.x.shape, self.weight.double(), self.d_u.double(), stride, padding, dilation, groups
        )


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def check_statistics(
    actual: tuple[Tensor, Tensor, Tensor] | None, layer: Layer, dtype: torch.dtype, m2_tolerance: float = 1e-5
) -> None:
    assert actual is not None
    u, mean, m2 = actual
    assert error(u, layer.u) < TOLERANCE[dtype]
    stored = u.double()
    expected = stored.mean((2, 3))
    assert mean.shape == m2.shape == expected.shape
    # of the u that was stored, whatever its dtype, hence float32's own rounding; a mean may cancel
    assert float((mean.double() - expected).abs().max()) < 1e-6 * float(stored.abs().max())
    assert error(m2, (stored - expected[:, :, None, None]).square().sum((2, 3))) < m2_tolerance


@shapes
@pytest.mark.parametrize(
    ("dtype", "tile", "residual", "relu", "save"),
    [
        (torch.float32, TILE, True, True, True),
        (torch.float32, SWAPPED, True, False, True),
        (torch.float16, TILE, False, True, False),
    ],
    ids=["all of it", "swap_ab, no activation", "float16, no residual, no u"],
)
def test_fused_apply_equals_float64(
    shape: Shape,
    dtype: torch.dtype,
    tile: conv.Tile,
    residual: bool,
    relu: bool,
    save: bool,
    guarded: Guarded,
) -> None:
    layer = Layer(shape, dtype, guarded)
    other = layer.residual if residual else None
    problem = fused_conv.problem_of("apply", layer.x, layer.weight, layer.x.shape, *shape.geometry)
    keep_mask = not save and conv.keeps_mask(problem, tile)
    arguments: Any = (layer.x, layer.weight, layer.scale, layer.shift, other, relu, *shape.geometry, save)
    actual = fused_conv.fused_apply(*arguments, keep_mask, tile=tile)
    assert actual is not None
    assert keep_mask or fused_conv.fused_apply(*arguments, True, tile=tile) is None or save
    y, u, mask = actual
    assert torch.equal(mask, ~(y <= 0)) if keep_mask else mask.numel() == 0
    assert error(y, layer.y(residual, relu)) < TOLERANCE[dtype]
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    if save:
        assert error(u, layer.u) < TOLERANCE[dtype]
        assert u.is_contiguous(memory_format=torch.channels_last)
    else:
        assert u.numel() == 0


@pytest.mark.parametrize("code", range(2, len(ACTIVATIONS)), ids=ACTIVATIONS[2:])
def test_apply_with_an_activation_whose_slope_is_stored(code: int, guarded: Guarded) -> None:
    shape = SHAPES["a sample is a tile"]
    layer = Layer(shape, torch.float32, guarded)
    arguments: Any = (layer.x, layer.weight, layer.scale, layer.shift, layer.residual, code, *shape.geometry)
    actual = fused_conv.fused_apply(*arguments, False, True, tile=TILE)
    assert actual is not None
    z = layer.y(True, False)
    assert error(actual[0], reference.activated(z, ACTIVATIONS[code])) < TOLERANCE[torch.float32]
    assert error(actual[2], activations.slope(z, code)) < TOLERANCE[torch.float32]


@shapes
@ways
def test_fused_statistics_equal_float64(
    shape: Shape, dtype: torch.dtype, tile: conv.Tile, guarded: Guarded
) -> None:
    layer = Layer(shape, dtype, guarded)
    actual = fused_conv.fused_statistics(layer.x, layer.weight, *shape.geometry, tile=tile)
    check_statistics(actual, layer, dtype)


@pytest.mark.parametrize("size", [(3, 3), (7, 5)], ids=["in one tile", "over tiles"])
def test_statistics_are_centered_before_they_are_squared(size: tuple[int, int], guarded: Guarded) -> None:
    # |mean| is about 3000 times the deviation: E[x²] − mean² would keep no digit of M2 in float32. The tiles'
    # means are rounded, to 3000 · 2^-24 of a deviation, and that much error M2 may have for each pixel.
    layer = Layer(Shape(2, 4, 5, size, (1, 1)), torch.float32, guarded, offset=3000.0)
    actual = fused_conv.fused_statistics(layer.x, layer.weight, *layer.shape.geometry, tile=TILE)
    check_statistics(actual, layer, torch.float32, m2_tolerance=3e-4)


DGRADS = {
    "3x3 padding 1": Shape(3, 5, 7, (5, 3), (3, 3), padding=(1, 1)),
    "3x3 padding 0, several blocks": Shape(2, 18, 20, (5, 4), (3, 3)),
    "1x1": Shape(5, 17, 3, (3, 4), (1, 1)),
    "1x1 padding 1": Shape(2, 3, 4, (3, 4), (1, 1), padding=(1, 1)),
}


@pytest.mark.parametrize("shape", DGRADS.values(), ids=DGRADS.keys())
@ways
def test_fused_dgrad_equals_float64(
    shape: Shape, dtype: torch.dtype, tile: conv.Tile, guarded: Guarded
) -> None:
    layer = Layer(shape, dtype, guarded)
    d_input = fused_conv.fused_dgrad(layer.d_u, layer.weight, layer.x.shape, *shape.geometry, tile=tile)
    assert d_input is not None
    assert d_input.shape == layer.x.shape
    assert d_input.is_contiguous(memory_format=torch.channels_last)
    assert error(d_input, layer.d_input()) < TOLERANCE[dtype]


def test_weight_in_channels_last_gives_the_same_bits(guarded: Guarded) -> None:
    layer = Layer(SHAPES["rows run on over odd samples"], torch.float32, guarded)
    weight = guarded.input(layer.weight.to(memory_format=torch.channels_last))
    assert weight.stride() != layer.weight.stride()
    for run in (
        lambda w: fused_conv.fused_statistics(layer.x, w, *layer.shape.geometry, tile=TILE)[0],  # type: ignore[index]
        lambda w: fused_conv.fused_dgrad(layer.d_u, w, layer.x.shape, *layer.shape.geometry, tile=TILE),
    ):
        assert torch.equal(run(weight), run(layer.weight))


@pytest.mark.parametrize(
    "name", ["rows run on over odd samples", "several samples are a tile", "several tiles are a sample"]
)
def test_the_same_call_gives_the_same_bits_and_other_samples_never_matter(name: str) -> None:
    shape = SHAPES[name]._replace(batch=2)
    layer = Layer(shape, torch.float32, Guarded())

    def run(x: Tensor) -> list[Tensor]:
        applied = fused_conv.fused_apply(
            x, layer.weight, layer.scale, layer.shift, None, True, *shape.geometry, True, tile=TILE
        )
        counted = fused_conv.fused_statistics(x, layer.weight, *shape.geometry, tile=SWAPPED)
        assert applied is not None
        assert counted is not None
        return [*applied[:2], *counted]

    first = run(layer.x)
    poisoned = layer.x.clone(memory_format=torch.preserve_format)
    poisoned[0] = float("nan")
    for before, after in zip(first, run(poisoned), strict=True):
        assert torch.equal(before[1], after[1])
        assert bool(after[0].isnan().any())  # and NaN is kept, also by ReLU
    for before, after in zip(first, run(layer.x), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(("hw", "rows"), [(75, 2), (66, 2), (40, 16), (33, 16)])
def test_combined_statistics_of_tiles_equal_those_of_the_image(hw: int, rows: int, guarded: Guarded) -> None:
    values = torch.randn(3, 70, hw, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 100
    parts = values.split(rows, dim=2)
    means = torch.stack([part.mean(2) for part in parts], dim=1)
    m2s = torch.stack([(part - part.mean(2, keepdim=True)).square().sum(2) for part in parts], dim=1)
    mean, m2 = epilogue.combine(
        guarded.input(means.float().to(DEVICE)), guarded.input(m2s.float().to(DEVICE)), hw, rows
    )
    assert error(mean.cpu(), values.mean(2)) < 1e-6
    # the tiles' means come rounded to float32: 100 · 2^-24 of a deviation of 1
    assert error(m2.cpu(), (values - values.mean(2, keepdim=True)).square().sum(2)) < 1e-5


GROUPED = {
    "depthwise": Shape(2, 6, 6, (4, 5), (3, 3), padding=(1, 1), groups=6),
    "depthwise, two outputs each, stride 2, dilated": Shape(
        2, 3, 6, (8, 5), (3, 2), (2, 1), (2, 1), (2, 2), groups=3
    ),
    "groups of several": Shape(2, 6, 4, (5, 4), (3, 3), (2, 2), (1, 1), groups=2),
    "7x7 over a small image": Shape(1, 3, 3, (4, 3), (7, 7), padding=(3, 3), groups=3),
    "stride beyond the kernel": Shape(1, 4, 4, (7, 8), (1, 2), (3, 3), groups=2),
}
grouped_shapes = pytest.mark.parametrize("shape", GROUPED.values(), ids=GROUPED.keys())
layouts = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "nchw"])
GROUPED_TILE = grouped_conv.Tile(pixels=16, channels=4, warps=4)


@grouped_shapes
@pytest.mark.parametrize(
    ("channels_last", "dtype"),
    [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)],
    ids=["channels_last", "nchw", "bfloat16"],
)
def test_grouped_convolution_equals_float64(
    shape: Shape, channels_last: bool, dtype: torch.dtype, guarded: Guarded
) -> None:
    layer = Layer(shape, dtype, guarded, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    arguments: Any = (layer.x, layer.weight, layer.scale, layer.shift)
    full = fused_conv.fused_apply(
        *arguments, layer.residual, True, *shape.geometry, True, True, tile=GROUPED_TILE
    )
    assert full is not None
    assert error(full[0], layer.y(True, True)) < TOLERANCE[dtype]
    assert error(full[1], layer.u) < TOLERANCE[dtype]
    assert torch.equal(full[2], ~(full[0] <= 0))
    assert all(x.is_contiguous(memory_format=layout) for x in full)
    actual = fused_conv.fused_statistics(layer.x, layer.weight, *shape.geometry, tile=GROUPED_TILE)
    check_statistics(actual, layer, dtype)


def test_grouped_convolution_without_residual_activation_and_u(guarded: Guarded) -> None:
    shape = GROUPED["groups of several"]
    layer = Layer(shape, torch.float32, guarded)
    actual = fused_conv.fused_apply(
        layer.x,
        layer.weight,
        layer.scale,
        layer.shift,
        None,
        False,
        *shape.geometry,
        False,
        tile=GROUPED_TILE,
    )
    assert actual is not None
    assert error(actual[0], layer.y(False, False)) < TOLERANCE[torch.float32]
    assert actual[1].numel() == 0


@grouped_shapes
@layouts
def test_grouped_dgrad_equals_float64(shape: Shape, channels_last: bool, guarded: Guarded) -> None:
    layer = Layer(shape, torch.float32, guarded, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    d_input = fused_conv.fused_dgrad(
        layer.d_u, layer.weight, layer.x.shape, *shape.geometry, tile=GROUPED_TILE
    )
    assert d_input is not None
    assert d_input.shape == layer.x.shape
    assert d_input.is_contiguous(memory_format=layout)
    assert error(d_input, layer.d_input()) < TOLERANCE[torch.float32]


@layouts
@pytest.mark.parametrize("how", ["channels_last", "a slice", "input and output channels swapped"])
def test_grouped_convolution_takes_weights_of_any_strides(
    how: str, channels_last: bool, guarded: Guarded
) -> None:
    shape = GROUPED["groups of several"]
    layer = Layer(shape, torch.float32, guarded, channels_last)
    weight = {
        "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
        "a slice": lambda w: torch.cat([w, w], 3)[..., : w.shape[3]],
        "input and output channels swapped": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    }[how](layer.weight)
    assert not weight.is_contiguous()
    actual = fused_conv.fused_statistics(layer.x, weight, *shape.geometry, tile=GROUPED_TILE)
    check_statistics(actual, layer, torch.float32)
    d_input = fused_conv.fused_dgrad(layer.d_u, weight, layer.x.shape, *shape.geometry, tile=GROUPED_TILE)
    assert d_input is not None
    assert error(d_input, layer.d_input()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("operation", ["apply", "statistics", "dgrad"])
def test_depthwise_channels_last_reads_the_weights_of_adjacent_channels(operation: str) -> None:
    name = f"grouped_conv/{operation}/channels_last/bfloat16/32x32g32/8x8/k3x3s1x1"
    problem = grouped_conv.read_key(name)
    layer = Layer(Shape(2, 32, 32, (8, 8), (3, 3), padding=(1, 1), groups=32), torch.bfloat16, Guarded())
    weight = grouped_conv.kernel_weight(problem, layer.weight)
    assert weight.is_contiguous()
    assert weight.shape == (3, 3, 1, 32, 1)
    # a stride of 1 is a constant for Triton, which then reads vectors
    assert weight.stride(3) == 1
    assert torch.equal(weight[:, :, 0, :, 0], layer.weight[:, 0].permute(1, 2, 0))
    view = grouped_conv.kernel_weight(problem._replace(channels_last=False), layer.weight)
    assert view.data_ptr() == layer.weight.data_ptr()


REFUSED = {
    "1×1 and 3×3": (Shape(1, 4, 4, (6, 6), (5, 5)), {}),
    "stride 1 and 2": (Shape(1, 4, 4, (6, 6), (3, 3), (3, 3)), {}),
    "padding 0 and 1": (Shape(1, 4, 4, (6, 6), (3, 3), padding=(1, 0)), {}),
    "does not support dilation": (Shape(1, 4, 4, (6, 6), (3, 3), dilation=(2, 2)), {}),
    "float32, bfloat16 and float16": (Shape(1, 4, 4, (6, 6), (3, 3)), {"dtype": torch.float64}),
    "channels_last only": (Shape(1, 4, 4, (6, 6), (3, 3)), {"channels_last": False}),
}


@pytest.mark.parametrize(("reason", "case"), REFUSED.items(), ids=REFUSED.keys())
def test_fused_convolutions_refuse_unsupported_calls_by_name(
    reason: str, case: tuple[Shape, dict[str, Any]]
) -> None:
    shape, how = case
    layer = Layer(shape, how.get("dtype", torch.float32), Guarded(), how.get("channels_last", True))
    assert reason in str(conv.not_supported(layer.x, layer.weight, *shape.geometry[:3]))
    arguments: Any = (layer.x, layer.weight, layer.scale, layer.shift, None, True)
    assert fused_conv.fused_apply(*arguments, *shape.geometry, False, force=True) is None
    assert fused_conv.fused_statistics(layer.x, layer.weight, *shape.geometry, force=True) is None
    assert fused_conv.fused_dgrad(layer.d_u, layer.weight, layer.x.shape, *shape.geometry, force=True) is None


def test_grouped_convolutions_refuse_unsupported_calls() -> None:
    for shape, reason in ((Shape(1, 4, 4, (9, 9), (8, 1), groups=2), "up to 7×7"),):
        layer = Layer(shape, torch.float32, Guarded())
        assert reason in str(grouped_conv.not_supported(layer.x, layer.weight, *shape.geometry[:3]))
        assert fused_conv.fused_statistics(layer.x, layer.weight, *shape.geometry, force=True) is None
    layer = Layer(Shape(2, 4, 4, (4, 4), (3, 3), groups=4), torch.float32, Guarded())
    cropped = layer.x[:, :, 1:]
    assert "neither contiguous" in str(
        grouped_conv.not_supported(cropped, layer.weight, *layer.shape.geometry[:3])
    )


def test_strided_dgrad_is_the_librarys() -> None:
    layer = Layer(Shape(1, 4, 4, (6, 6), (3, 3), (2, 2)), torch.float32, Guarded())
    assert (
        fused_conv.fused_dgrad(layer.d_u, layer.weight, layer.x.shape, *layer.shape.geometry, force=True)
        is None
    )


def test_the_library_convolves_unless_the_table_says_that_the_kernel_wins(guarded: Guarded) -> None:
    shape = Shape(3, 5, 7, (3, 4), (3, 3), padding=(1, 1))
    layer = Layer(shape, torch.float32, guarded)
    arguments: Any = (layer.x, layer.weight, layer.scale, layer.shift, None, True, *shape.geometry, False)
    entry = TILE._asdict() | {"least_batch": 3}
    name = "conv/apply/float32/5x7/3x4/k3s1"
    assert fused_conv.fused_apply(*arguments) is None
    assert fused_conv.fused_apply(*arguments, table={name: entry | {"least_batch": 4}}) is None
    assert fused_conv.fused_statistics(layer.x, layer.weight, *shape.geometry, table={name: entry}) is None
    actual = fused_conv.fused_apply(*arguments, table={name: entry})
    assert actual is not None
    assert error(actual[0], layer.y(False, True)) < TOLERANCE[torch.float32]

    with recorded() as launches:
        fused_conv.fused_apply(*arguments, table={name: entry}, force=True)
        fused_conv.fused_apply(*arguments, force=True)
        backwards = "conv/dgrad/float32/5x7/3x4/k3s1"
        fused_conv.fused_dgrad(
            layer.d_u, layer.weight, layer.x.shape, *shape.geometry, table={backwards: entry}
        )
    assert [x.arguments["BLOCK_M"] for x in launches] == [16, 64, 16]


def test_grouped_convolutions_follow_the_devices_table(guarded: Guarded) -> None:
    shape = Shape(3, 4, 8, (3, 4), (3, 3), (2, 1), padding=(1, 1), groups=4)
    layer = Layer(shape, torch.float32, guarded, channels_last=False)
    entry = GROUPED_TILE._asdict() | {"least_batch": 3}
    for operation, run in (
        (
            "statistics",
            lambda t: fused_conv.fused_statistics(layer.x, layer.weight, *shape.geometry, table=t),
        ),
        (
            "dgrad",
            lambda t: fused_conv.fused_dgrad(
                layer.d_u, layer.weight, layer.x.shape, *shape.geometry, table=t
            ),
        ),
    ):
        name = f"grouped_conv/{operation}/nchw/float32/4x8g4/3x4/k3x3s2x1"
        with recorded() as launches:
            assert run({}) is None
            assert run({name: entry | {"least_batch": 4}}) is None
            assert not launches
            assert run({name: entry}) is not None
        assert launches[0].arguments["BLOCK_P"] == 16


@pytest.mark.parametrize("groups", [1, 2])
def test_the_backend_reads_the_devices_table(
    groups: int, guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(2, 4, 6, (3, 4), (3, 3), padding=(1, 1), groups=groups)
    layer = Layer(shape, torch.float32, guarded)
    kept = (True, False)
    args = LayerArgs(layer.x, layer.weight, Conv(*shape.geometry), activation="relu")
    backend = TritonPasses()
    calls = {
        "apply": lambda: backend.fused_apply(args, layer.scale, layer.shift, *kept),
        "statistics": lambda: backend.fused_statistics(args),
        "dgrad": lambda: backend.fused_dgrad(layer.d_u, layer.weight, args.conv, layer.x.shape),
    }
    monkeypatch.setattr(launch_config, "FOLDER", tmp_path)
    launch_config.forget_tables()
    assert [run() for run in calls.values()] == [None, None, None]

    table = {}
    for operation in calls:
        if groups == 1:
            name = f"conv/{operation}/float32/4x6/3x4/k3s1"
        else:
            name = f"grouped_conv/{operation}/channels_last/float32/4x6g2/3x4/k3x3s1x1"
        tile: Any = TILE if groups == 1 else GROUPED_TILE
        table[name] = tile._asdict() | {"least_batch": 1}
    path = tmp_path / f"{launch_config.device_slug(DEVICE)}.json"
    path.write_text(json.dumps({"launches": {}, "convolutions": table}))
    launch_config.forget_tables()
    try:
        applied, counted, d_input = (run() for run in calls.values())
    finally:
        monkeypatch.undo()
        launch_config.forget_tables()
    assert isinstance(applied, tuple)
    assert isinstance(d_input, Tensor)
    assert error(applied[0], layer.y(False, True)) < TOLERANCE[torch.float32]
    assert error(applied[1], layer.u) < TOLERANCE[torch.float32]
    check_statistics(counted, layer, torch.float32)  # type: ignore[arg-type]
    assert error(d_input, layer.d_input()) < TOLERANCE[torch.float32]


def test_the_race_runs_and_refuses_a_wrong_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ["--batches", "2", "--dtypes", "float32", "--operations", "dgrad"]
    layers = ["--layers", "smoke", "smoke depthwise"]
    assert convolutions.main([*usual, *layers, "--out", str(tmp_path / "race.csv")]) == 0
    lines = (tmp_path / "race.csv").read_text().splitlines()
    assert [line.split(",")[:4] for line in lines[1:]] == [
        ["smoke", "dgrad", "2", "float32"],
        ["smoke depthwise", "dgrad", "2", "float32"],
    ]
    # samples whole in a tile, which keeps a mask; and rows that run on from sample to sample, which does not
    for layer in ("smoke", "8-8@5k3s1g1"):
        apply = [*usual[:-1], "apply", "--layers", layer]
        assert convolutions.main([*apply, "--out", str(tmp_path / "apply.csv")]) == 0
    right = fused_conv.fused_dgrad
    monkeypatch.setattr(fused_conv, "fused_dgrad", lambda *args, **how: right(*args, **how) + 1)
    with pytest.raises(RuntimeError, match="does not equal the library's result"):
        convolutions.main([*usual, "--layers", "smoke"])


def test_convolutions_with_default_tiles_equal_float64(guarded: Guarded) -> None:
    shape = Shape(2, 5, 7, (5, 4), (3, 3), padding=(1, 1))
    layer = Layer(shape, torch.float16, guarded)
    actual = fused_conv.fused_statistics(layer.x, layer.weight, *shape.geometry, force=True)
    check_statistics(actual, layer, torch.float16)
    depthwise = Shape(2, 70, 70, (5, 4), (3, 3), padding=(1, 1), groups=70)
    for channels_last in (True, False):
        layer = Layer(depthwise, torch.float32, guarded, channels_last)
        actual = fused_conv.fused_statistics(layer.x, layer.weight, *depthwise.geometry, force=True)
        check_statistics(actual, layer, torch.float32)


@pytest.mark.parametrize(
    ("module", "name", "entry"),
    [
        (conv, "conv/dgrad/bfloat16/64x64/32x32/k3s1", SWAPPED),
        (grouped_conv, "grouped_conv/dgrad/nchw/bfloat16/8x16g8/5x4/k3x5s2x1", GROUPED_TILE),
    ],
    ids=["conv", "grouped_conv"],
)
def test_ahead_of_time_cases_cover_every_entry_of_the_table(module: Any, name: str, entry: Any) -> None:
    assert module.key(module.read_key(name)) == name
    table = {f"{name}@some-device": entry._asdict() | {"least_batch": 1}, "apply/nchw": {"tile": 1}}
    cases = [case for case in fused_conv.cases(table) if case.name.startswith(f"{module.NAME}/")]
    assert cases[-1].name == f"{name}@some-device"
    assert sum(case.quick for case in cases) >= 1
    for case in cases:
        with recorded() as launches:
            case.run()
        assert launches, case.name
        operation = case.name.split("/")[1]
        given = launches[0].arguments
        assert (given["y_ptr"] is not None) == (operation == "apply")
        assert (given["mean_ptr"] is not None) == (operation == "statistics")
        if case is cases[-1]:
            parameters = entry._asdict()
            assert given.get("BLOCK_M", given.get("BLOCK_P")) == next(iter(parameters.values()))
            assert launches[0].warps == parameters["warps"]

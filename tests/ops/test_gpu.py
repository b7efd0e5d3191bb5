"""The CUDA and the Triton backend on a GPU, against the reference in float64 on the CPU.

``AWNET_TEST_DEVICE=cpu`` runs what makes sense there on the C++ backend, so that the tests themselves are
tested where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.random_layers import Layer, Result, build, error, has_single_value, layers, plain_torch, run
from torch import Tensor

from awnet import ops
from awnet.ops import self_check
from awnet.ops.backends import native, triton
from awnet.ops.dispatch import BACKENDS
from awnet.precision import full_precision

DEVICE = os.environ.get("AWNET_TEST_DEVICE", "cuda")
NAMES = ("cuda", "triton") if DEVICE == "cuda" else ("cpp",)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
gpu = pytest.mark.gpu
pytestmark = [gpu] if DEVICE == "cuda" else [pytest.mark.slow]
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="streams, graphs and devices are CUDA's")
each_backend = pytest.mark.parametrize("backend", NAMES)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "testing"])
both_layouts = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)
SIZES = {
    "stage1": (64, 32),
    "stage2": (128, 16),
    "stage3": (256, 8),
    "stage4": (512, 4),
    "odd": (24, 7),
    "one": (3, 1),
}


@pytest.fixture(autouse=True)
def full_float32_and_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cuDNN convolves without TF32, and sums its gradients in the same order at each call."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with full_precision():
        yield


def example(training: bool, channels: int, size: int, seed: int = 0, **changes: object) -> Layer:
    defaults: dict = {
        "batch": 10, "c_in": channels, "c_out": channels, "groups": 1, "size": (size, size),
    }  # fmt: skip
    layer = build(torch.Generator().manual_seed(seed), training, **(defaults | changes))
    if training:
        layer.tensors["is_clean"] = torch.arange(len(layer.tensors["input"])) % 2 == 0
    return layer


def on_device(layer: Layer, layout: torch.memory_format = torch.contiguous_format) -> Layer:
    images = ("input", "weight", "residual")
    return Layer(
        {
            n: x.to(DEVICE, memory_format=layout) if n in images else x.to(DEVICE)
            for n, x in layer.tensors.items()
        },
        layer.options,
    )


def result_on_cpu(result: Result) -> Result:
    return Result(
        result.output.cpu(),
        {n: x.cpu() for n, x in result.grads.items()},
        {n: x.cpu() for n, x in result.running.items()},
    )


def errors(got: Result, want: Result) -> dict[str, float]:
    assert got.grads.keys() == want.grads.keys()
    pairs = {"output": (got.output, want.output)}
    pairs |= {name: (got.grads[name], value) for name, value in want.grads.items()}
    pairs |= {name: (got.running[name], value) for name, value in want.running.items()}
    return {name: error(*pair) for name, pair in pairs.items()}


# --- values


@each_backend
@both_layouts
@both_modes
@pytest.mark.parametrize("size", SIZES)
def test_float32_keeps_the_required_digits(size: str, training: bool, layout, backend: str) -> None:
    layer = example(training, *SIZES[size]).rounded(torch.float32)
    if size == "one":
        layer.tensors["input"] *= 30  # the zero padding around one pixel leaves little variance
    want = run(layer, backend="reference")
    got = result_on_cpu(run(on_device(layer.to(torch.float32), layout), backend=backend))
    for name, relative_error in errors(got, want).items():
        limit = 1e-5 if name in ("output", "running_mean", "running_var") else 1e-4
        assert relative_error <= limit, (name, relative_error)


@each_backend
@both_layouts
@both_modes
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("size", ["stage1", "stage3", "stage4", "odd"])
def test_low_precision_is_no_worse_than_twice_plain_torch(
    size: str, dtype: torch.dtype, training: bool, layout, backend: str
) -> None:
    layer = example(training, *SIZES[size]).rounded(dtype)
    want = run(layer, backend="reference")
    low = on_device(layer.to(dtype), layout)
    ours = errors(result_on_cpu(run(low, backend=backend)), want)
    plain = errors(result_on_cpu(run(low, function=plain_torch)), want)
    for name in want.grads.keys() | {"output"}:
        # one rounding of the result is free: a gradient that plain torch gets right by luck is no yardstick
        assert ours[name] <= 2 * max(plain[name], torch.finfo(dtype).eps / 2), (name, ours[name], plain[name])


@each_backend
@settings(max_examples=60, deadline=None)
@given(layer=layers(), last=st.booleans())
def test_layers_of_any_shape_equal_the_reference(backend: str, layer: Layer, last: bool) -> None:
    assume(not has_single_value(layer))
    conv = {k: layer.options[k] for k in ("stride", "padding", "dilation", "groups")}
    u = ops.filter_scaled_conv2d(
        layer.tensors["input"], layer.tensors["weight"], None, **conv, backend="reference"
    )
    # float32 against float64: keep away from branches of two or three values, where 1/σ³ magnifies any rounding
    assume(not layer.options["training"] or u[0, 0].numel() * len(u) >= 40)
    layer = layer.rounded(torch.float32)
    low = on_device(layer.to(torch.float32), torch.channels_last if last else torch.contiguous_format)
    want = run(layer, backend="reference")
    got = errors(result_on_cpu(run(low, backend=backend)), want)
    plain = errors(result_on_cpu(run(low, backend="eager")), want)
    for name, relative_error in got.items():
        limit = 2e-5 if name in ("output", "running_mean", "running_var") else 2e-4
        # a gradient may nearly cancel (a filter of one weight under batch statistics)
        assert relative_error <= max(limit, 8 * plain[name]), (name, relative_error, plain[name])


@each_backend
@both_layouts
def test_large_images_split_over_blocks_equal_the_reference(layout, backend: str) -> None:
    for training in (True, False):
        layer = example(training, 5, 250, batch=4, offset=10.0).rounded(torch.float32)
        want = run(layer, backend="reference")
        got = errors(result_on_cpu(run(on_device(layer.to(torch.float32), layout), backend=backend)), want)
        assert got["output"] <= 2e-5
        assert max(got.values()) <= 3e-4, got


@each_backend
def test_views_and_other_strides_equal_the_reference(backend: str) -> None:
    layer = on_device(example(False, 16, 9).to(torch.float32))
    plain = run(layer, backend=backend)
    tensors = dict(layer.tensors)
    x = tensors["input"]
    shifted = torch.empty(x.numel() + 1, device=DEVICE)[1:].view(x.shape)  # off 16 bytes
    shifted.copy_(x)
    for other in (shifted, x.transpose(2, 3).contiguous().transpose(2, 3)):
        got = run(Layer(tensors | {"input": other}, layer.options), backend=backend)
        assert error(got.output, plain.output) < 1e-6
        assert error(got.grads["input"], plain.grads["input"]) < 1e-5


# --- contract


@each_backend
@both_layouts
@both_modes
def test_the_same_call_gives_the_same_bits(training: bool, layout, backend: str) -> None:
    layer = on_device(example(training, 48, 33).to(torch.float32), layout)
    first = run(layer, backend=backend)
    for _ in range(5):
        again = run(layer, backend=backend)
        assert torch.equal(first.output, again.output)
        for name, value in first.grads.items():
            assert torch.equal(value, again.grads[name]), name


@each_backend
def test_other_samples_filled_with_nan_change_no_bit(backend: str) -> None:
    layer = on_device(example(False, 16, 9).to(torch.float32))
    sample = 3
    with_nan = dict(layer.tensors)
    for name in ("input", "filter_scale", "p_clean", "residual"):
        with_nan[name] = with_nan[name].clone()
        with_nan[name][torch.arange(10, device=DEVICE) != sample] = float("nan")
    clean, dirty = run(layer, backend=backend), run(Layer(with_nan, layer.options), backend=backend)
    assert torch.equal(clean.output[sample], dirty.output[sample])
    for name in ("input", "filter_scale", "p_clean", "residual"):
        assert torch.equal(clean.grads[name][sample], dirty.grads[name][sample]), name


@each_backend
@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_output_keeps_layout_dtype_and_device(dtype: torch.dtype, layout, backend: str) -> None:
    for training in (True, False):
        layer = on_device(example(training, 16, 9).to(dtype), layout)
        result = run(layer, backend=backend)
        for x in (result.output, result.grads["input"]):
            assert x.is_contiguous(memory_format=layout)
            assert x.dtype == dtype
            assert x.device.type == DEVICE


@each_backend
def test_an_empty_batch_gives_an_empty_output(backend: str) -> None:
    for training in (True, False):
        layer = on_device(example(training, 16, 9, batch=0).to(torch.float32))
        result = run(layer, backend=backend)
        assert result.output.shape == (0, 16, 9, 9)
        assert all(torch.isfinite(x).all() for x in (*result.grads.values(), *result.running.values()))


@each_backend
def test_unsupported_calls_are_refused_by_name(backend: str) -> None:
    layer = on_device(example(False, 4, 5))
    with pytest.raises(
        ValueError, match=f"'{backend}' cannot run this call: it has no float64.*'eager' can run it"
    ):
        run(layer, backend=backend)


@each_backend
def test_a_call_without_a_choice_takes_a_kernel(backend: str) -> None:
    layer = on_device(example(False, 4, 5).to(torch.float32))
    taken = ops.explain(ops.aw_conv2d, **layer.tensors, **layer.options).backend
    assert taken in NAMES
    assert {b.name for b in BACKENDS} >= {backend}


# --- CUDA's own matters


@only_cuda
@each_backend
def test_the_self_check_passes_on_the_gpu(backend: str) -> None:
    if backend == "cuda" and (native.load() is not None or native.build_info()["cuda"] is False):
        pytest.skip("awnet._C has no CUDA part")
    checked = {"cuda": native.CHECKED, "triton": triton.CHECKED}[backend]
    result, stored = self_check.check(checked, torch.device("cuda", 0))
    assert result.reason is None
    assert stored


@only_cuda
@each_backend
@both_modes
def test_a_layer_does_not_synchronize_with_the_device(training: bool, backend: str) -> None:
    layer = on_device(example(training, 16, 9).to(torch.float32))
    run(layer, backend=backend)  # compiles, picks algorithms
    call = layer.tensors | {"input": layer.tensors["input"].requires_grad_()}
    upstream = torch.ones(10, 16, 9, 9, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = ops.aw_conv2d(**call, **layer.options, backend=backend)
        torch.autograd.grad(y, call["input"], upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@only_cuda
@each_backend
def test_kernels_run_on_the_current_stream(backend: str) -> None:
    layer = on_device(example(False, 16, 33).to(torch.float32))
    want = run(layer, backend=backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x = torch.full_like(layer.tensors["input"], float("nan"))
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would now read NaN
        x.copy_(layer.tensors["input"])
        got = run(Layer(layer.tensors | {"input": x}, layer.options), backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got.output, want.output)
    assert torch.equal(got.grads["input"], want.grads["input"])


@only_cuda
@each_backend
def test_an_attack_step_can_be_captured_in_a_graph(backend: str) -> None:
    layer = on_device(example(False, 16, 17).to(torch.float32))
    x = layer.tensors["input"].clone().requires_grad_()
    upstream = torch.randn(10, 16, 17, 17, device=DEVICE)

    def attack_step() -> Tensor:
        y = ops.aw_conv2d(**(layer.tensors | {"input": x}), **layer.options, backend=backend)
        return torch.autograd.grad(y, x, upstream)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            attack_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attack_step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, attack_step())


@only_cuda
@each_backend
def test_kernels_run_on_the_tensors_device_and_not_on_the_current_one(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    layer = example(False, 16, 9).to(torch.float32)
    want = run(on_device(layer), backend=backend)
    moved = Layer({n: x.to("cuda:1") for n, x in layer.tensors.items()}, layer.options)
    with torch.cuda.device(0):
        got = run(moved, backend=backend)
    assert got.output.device == torch.device("cuda:1")
    assert error(got.output.cpu(), want.output.cpu()) < 1e-6


@only_cuda
@each_backend
@both_layouts
def test_tensors_of_more_than_two_to_the_31_elements(layout, backend: str) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of free GPU memory, there are {free / 2**30:.0f}")
    shape = (2**31 // (64 * 1024) + 2, 64, 32, 32)
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=layout)
    for part in x.split(1024):
        part.normal_()
    tables = [torch.rand(2, 64, device=DEVICE) + 0.5 for _ in range(4)]
    p = torch.rand(len(x), device=DEVICE)
    y = ops.mix_batch_norm(x, *tables, p_clean=p, backend=backend)
    for place in (0, len(x) // 2, len(x) - 1):
        sample = ops.mix_batch_norm(
            x[place : place + 1].clone(memory_format=torch.preserve_format),
            *tables,
            p_clean=p[place : place + 1],
            backend=backend,
        )
        assert torch.equal(y[place : place + 1], sample)

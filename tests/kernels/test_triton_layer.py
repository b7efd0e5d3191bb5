"""The whole layer on backend="triton": values, every gradient, running statistics, contract."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from support.interpreter import DEVICE, INTERPRETED
from support.random_layers import Layer, build, error, has_single_value, layers, run

from awnet import ops
from awnet.ops.args import flatten
from awnet.ops.backends import triton as triton_backend
from awnet.ops.backends.base import Passes
from awnet.ops.backends.triton import TritonPasses
from awnet.ops.coefficients import Mix, Norm, Reduced, SampleStats
from awnet.ops.functional import aw_conv2d, layer_args

few = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def on_device(layer: Layer) -> Layer:
    return Layer({n: x.to(DEVICE) for n, x in layer.tensors.items()}, layer.options)


def example(training: bool, seed: int = 0, **changes: Any) -> Layer:
    return build(torch.Generator().manual_seed(seed), training, **({"batch": 5} | changes))


def triton_run(layer: Layer, dtype: torch.dtype = torch.float32):
    return run(on_device(layer.to(dtype)), backend="triton")


@few
@given(layers())
def test_the_triton_layer_equals_the_reference(layer: Layer) -> None:
    assume(not has_single_value(layer))
    layer = layer.rounded(torch.float32)
    exact = run(layer, backend="reference")
    eager, got = run(layer.to(torch.float32), backend="eager"), triton_run(layer)
    assert got.output.shape == exact.output.shape
    assert got.grads.keys() == exact.grads.keys()
    # the contract's figures; where a branch of few values is worse conditioned, no worse than four times eager
    assert error(got.output.cpu(), exact.output) <= max(1e-5, 4 * error(eager.output, exact.output))
    for name, value in exact.grads.items():
        assert error(got.grads[name].cpu(), value) <= max(1e-4, 4 * error(eager.grads[name], value)), name
    for name, value in exact.running.items():
        assert error(got.running[name].cpu(), value) <= max(1e-5, 4 * error(eager.running[name], value)), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_keeps_the_required_digits(training: bool, offset: float) -> None:
    for seed in range(2):
        layer = example(training, seed, offset=offset, batch=8, size=[9, 8], kernel=(3, 2), padding=0)
        layer = layer.rounded(torch.float32)
        exact, got = run(layer, backend="reference"), triton_run(layer)
        factor = 1.0 if offset == 0 else 300.0  # κ/10: random filters bring |mean|/std to a few thousand
        assert error(got.output.cpu(), exact.output) <= 1e-5 * factor
        for name, value in exact.grads.items():
            assert error(got.grads[name].cpu(), value) <= 1e-4 * factor, (name, seed)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_twice_eager(dtype: torch.dtype, training: bool) -> None:
    layer = example(training, 1).rounded(dtype)
    exact, got = run(layer, backend="reference"), triton_run(layer, dtype)
    eager = run(layer.to(dtype), backend="eager")
    # the interpreter cuts bfloat16 off where torch rounds: up to twice the error of each of two stores
    allowed = 4 if INTERPRETED and dtype == torch.bfloat16 else 1.5
    assert got.output.dtype == dtype
    assert error(got.output.cpu(), exact.output) <= allowed * error(eager.output, exact.output)
    for name, value in exact.grads.items():
        assert error(got.grads[name].cpu(), value) <= allowed * error(eager.grads[name], value) + 1e-3, name


@pytest.mark.parametrize("training", [True, False])
def test_the_output_keeps_the_memory_format_and_nothing_is_copied_for_it(training: bool) -> None:
    layer = example(training, 2, c_in=16, c_out=16, groups=1).to(torch.float32)
    tensors = dict(on_device(layer).tensors)
    for name in ("input", "residual", "weight"):
        tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    leaves = {n: x.clone().requires_grad_(n in ("input", "filter_scale")) for n, x in tensors.items()}
    upstream = torch.ones_like(tensors["residual"])
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
        y = ops.aw_conv2d(**leaves, **layer.options, backend="triton")
        d_input, _ = torch.autograd.grad(y, [leaves["input"], leaves["filter_scale"]], upstream)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert d_input.is_contiguous(memory_format=torch.channels_last)
    copying = ("aten::copy_", "aten::clone", "aten::_to_copy")
    copies = [e for e in profile.events() if e.name in copying and [5, 16, 6, 5] in e.input_shapes]
    assert not copies
    plain = triton_run(layer)
    again = run(Layer(tensors, layer.options), backend="triton")
    assert error(again.output, plain.output) < 1e-6


def test_the_same_call_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    # on a GPU cuDNN may else sum the gradients of the convolution in another order
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    layer = example(True, 3)
    first, second = triton_run(layer), triton_run(layer)
    assert torch.equal(first.output, second.output)
    assert all(torch.equal(first.grads[n], second.grads[n]) for n in first.grads)


def test_mix_batch_norm_and_filter_scaled_conv2d_equal_the_reference() -> None:
    for training in (True, False):
        t = on_device(example(training, 5).to(torch.float32)).tensors
        kind = {"is_clean": t["is_clean"]} if training else {"p_clean": t["p_clean"]}
        results = []
        for backend in ("reference", "triton"):
            x = t["residual"].clone().requires_grad_()
            tables = [t[n].clone().requires_grad_(n[0] == "b") for n in ("bn_weight", "bn_bias")]
            running = [t[n].clone() for n in ("running_mean", "running_var")]
            y = ops.mix_batch_norm(x, *tables, *running, **kind, training=training, backend=backend)
            results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *tables]), *running])
        for expected, got in zip(*results, strict=True):
            assert error(got, expected) < 1e-5
    results = []
    for backend in ("reference", "triton"):
        leaves = [t[n].clone().requires_grad_() for n in ("input", "weight", "filter_scale")]
        y = ops.filter_scaled_conv2d(*leaves, padding=1, groups=2, backend=backend)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for expected, got in zip(*results, strict=True):
        assert error(got, expected) < 1e-5


def test_the_triton_operator_passes_opcheck() -> None:
    for training in (True, False):
        layer = on_device(example(training, 7, batch=2, size=[3, 3]).to(torch.float32))
        t = layer.tensors
        names = ("input", "weight", "filter_scale", "p_clean", "bn_weight", "bn_bias", "residual")
        args = layer_args(
            aw_conv2d, **{"filter_scale": None} | {n: x.clone().requires_grad_(n in names) for n, x in t.items()},
            training=training, padding=1, groups=2,
        )  # fmt: skip
        for keep_mask in (False, True):
            arguments = flatten(args, True, keep_mask)
            torch.library.opcheck(torch.ops.awnet.layer_triton.default, arguments)


def test_float64_is_refused_and_explained() -> None:
    x, w = torch.ones(1, 2, 3, 3, device=DEVICE).double(), torch.ones(2, 2, 1, 1, device=DEVICE).double()
    with pytest.raises(
        ValueError, match=r"backend 'triton' cannot run this call: it has no float64.*'eager' can run it"
    ):
        ops.filter_scaled_conv2d(x, w, None, backend="triton")
    assert ops.explain(ops.filter_scaled_conv2d, x.float(), w.float(), None).backend == "triton"
    assert "float64" in ops.explain(ops.filter_scaled_conv2d, x, w, None).others["triton"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_the_fused_convolutions_within_the_layer(
    training: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what a device's table would choose, taken by force: values and gradients stay the reference's
    kernels = importlib.import_module("awnet.kernels.fused_conv")
    monkeypatch.setattr(triton_backend, "convolutions", lambda device: {"any": {}})
    taken = []

    def forced(name: str):
        kernel = getattr(kernels, name)

        def call(*arguments: object, table: object) -> object:
            outputs = kernel(*arguments, force=True)
            taken.append(name if outputs is not None else f"no {name}")
            return outputs

        return call

    for name in ("fused_apply", "fused_statistics", "fused_dgrad"):
        monkeypatch.setattr(kernels, name, forced(name))
    layer = example(training, 3, groups=groups, batch=3, size=[4, 3]).rounded(torch.float32)
    for name in ("input", "residual"):
        layer.tensors[name] = layer.tensors[name].contiguous(memory_format=torch.channels_last)
    exact, got = run(layer, backend="reference"), triton_run(layer)
    assert taken == ["fused_statistics" if training else "fused_apply", "fused_dgrad"]
    assert error(got.output.cpu(), exact.output) <= 1e-5
    for name, value in exact.grads.items():
        assert error(got.grads[name].cpu(), value) <= 1e-4, name


def test_gradients_from_the_sums_of_several_ranks_equal_eager() -> None:
    # what a rank hands in where others share its statistics: here its sums twice
    generator = torch.Generator().manual_seed(0)
    g1, gc, mean, m2, filter_scale = torch.rand(5, 5, 6, generator=generator, dtype=torch.float64).unbind(1)
    weight = torch.rand(2, 6, generator=generator, dtype=torch.float64)
    is_clean = torch.tensor([True, False, False, True, False])
    results = []
    for passes, device, dtype in (
        (Passes(), "cpu", torch.float64), (TritonPasses(), DEVICE, torch.float32),
    ):  # fmt: skip
        x = [t.to(device, dtype) for t in (g1, gc, mean, m2, filter_scale, weight)]
        kind = is_clean.to(device)
        stats, mix = SampleStats(x[2], x[3], 9), Mix(x[4], None, kind)
        batch_stats = passes.batch_statistics(stats, mix, 2)
        norm = Norm(x[5], x[5], batch_stats.mean, batch_stats.var, 1e-5)
        reduced = Reduced(x[0], x[1], x[2])
        sums = passes.train_sums(reduced, norm, mix)
        both = sums._replace(through=2 * sums.through)
        gradients, propagation = passes.train_gradients(
            reduced, stats, norm, 2 * batch_stats.n, mix, True, both
        )
        results.append([y for y in (*sums, *gradients, *propagation) if y is not None])
    for got, expected in zip(results[1], results[0], strict=True):
        assert error(got.cpu(), expected) <= 1e-4

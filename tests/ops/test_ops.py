"""The ops against the reference in float64: values, every gradient, running statistics, contract."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.layer_calls import LAYER_BACKENDS, NOT_BUILT, ON_CPU, built, example
from support.random_layers import (
    DIFFERENTIABLE,
    Layer,
    error,
    has_single_value,
    layers,
    plain_torch,
    run,
)

from awnet import ops, reference
from awnet.ops.backends.base import Passes
from awnet.ops.dispatch import BACKENDS
from awnet.ops.functional import layer_args

RUNNING = [name for name in ON_CPU if name != "cpp" or NOT_BUILT is None]


few = settings(max_examples=60, deadline=None)


def assert_agrees(layer: Layer, forward: float, gradient: float) -> None:
    expected, got = run(layer, backend="reference"), run(layer, backend="eager")
    fixed = run(with_fixed_statistics(layer), backend="reference")
    assert error(got.output, expected.output) <= forward
    assert got.output.shape == expected.output.shape
    assert got.grads.keys() == expected.grads.keys()
    for name, value in expected.grads.items():
        # through batch statistics a gradient may cancel to nothing (a 1×1 filter of one channel has no gradient
        # along itself): constant statistics give the size of the terms that cancel
        allowed = gradient * (value.norm() + fixed.grads[name].norm())
        assert (got.grads[name] - value).norm() <= allowed, name
    for name, value in expected.running.items():
        assert error(got.running[name], value) <= forward, name


def with_fixed_statistics(layer: Layer) -> Layer:
    """The layer in eval mode with the batch's statistics as constants, p = is_clean, and without activation.

    Its gradients have the size of the terms that cancel in the gradients of ``layer``. With a ReLU some of these
    terms could be missing: a ReLU that passes only padding gives the weight no gradient at constant statistics.
    """
    if not layer.options["training"]:
        return layer
    running = run(Layer(layer.tensors, layer.options | {"momentum": 1.0}), backend="reference").running
    tensors = {n: x for n, x in layer.tensors.items() if n != "is_clean"} | running
    tensors["p_clean"] = layer.tensors["is_clean"].to(torch.float64)
    return Layer(tensors, layer.options | {"training": False, "activation": None})


@few
@given(layers())
def test_eager_equals_the_reference_in_float64(layer: Layer) -> None:
    assume(not has_single_value(layer))
    # 1e-9: rounding of float64 (1e-16) times the condition of a branch of two or three values (eps = 1e-5 bounds
    # 1/σ by 316, its cube enters ∂u)
    assert_agrees(layer, forward=1e-9, gradient=1e-7)


@settings(max_examples=25, deadline=None)
@given(layers(offset=1000.0, least=4))
def test_eager_equals_the_reference_where_the_mean_is_a_thousand_deviations(layer: Layer) -> None:
    assume(not has_single_value(layer))
    # the reference itself loses three digits to |mean|/std = 1000; E[x²] − μ² would lose six
    assert_agrees(layer, forward=1e-8, gradient=1e-5)


def kappa(layer: Layer) -> float:
    conv = {k: layer.options[k] for k in ("stride", "padding", "dilation", "groups")}
    u = reference.filter_scaled_conv2d(layer.tensors["input"], layer.tensors["weight"], None, **conv)
    std = u.transpose(0, 1).flatten(1).std(1)
    return float((u.mean((0, 2, 3)).abs() / std).max())


@built
@settings(max_examples=40, deadline=None)
@given(layers(), st.sampled_from(["cpp"]))
def test_native_layers_of_any_shape_equal_the_reference(layer: Layer, backend: str) -> None:
    layer = layer.rounded(torch.float32)
    assume(not has_single_value(layer))
    values = run(layer, backend="reference").output[:, 0].numel()
    # a training batch of a few values has 1/σ up to 316 and magnifies any rounding
    assume(not layer.options["training"] or values >= 40)
    exact, got = run(layer, backend="reference"), run(layer.to(torch.float32), backend=backend)
    fixed = run(with_fixed_statistics(layer), backend="reference")
    assert error(got.output, exact.output) <= 2e-5
    for name, value in exact.grads.items():
        allowed = 1e-4 * value.norm() + 2e-5 * fixed.grads[name].norm()  # as in assert_agrees
        assert got.grads[name].shape == value.shape
        assert (got.grads[name] - value).norm() <= allowed, name
    for name, value in exact.running.items():
        assert error(got.running[name], value) <= 1e-5, name


@built
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_passes_equal_eager_in_every_shape(dtype: torch.dtype, training: bool, last: bool) -> None:
    # less than a vector; full vectors and a rest, more than a block of columns and of pixels; several blocks
    for channels, size in ((5, [3, 3]), (70, [9, 11]), (130, [4, 4])):
        layer = example(
            training, channels, batch=4, c_in=channels, c_out=channels, groups=channels, kernel=(1, 1),
            padding=0, size=size,
        ).rounded(dtype)  # fmt: skip
        # a filter that changes nothing: what is left are the passes
        tensors = layer.tensors | {"weight": torch.ones_like(layer.tensors["weight"])}
        if last:
            for name in ("input", "residual"):
                tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
        layer = Layer(tensors, layer.options)
        exact, got = run(layer, backend="reference"), run(layer.to(dtype), backend="cpp")
        # float32 arithmetic, rounded to the nearest value of the images' dtype: half a unit in the last place
        away = (got.output.double() - exact.output).abs()
        assert (away <= 0.5 * torch.finfo(dtype).eps * exact.output.abs() + 1e-5 * exact.output.std()).all()
        # (in the other dtypes upstream's gradient is rounded, which is not the passes' doing)
        if dtype == torch.float32:
            assert got.grads.keys() == exact.grads.keys()
            for name, value in exact.grads.items():
                # batch norm takes out the size of a filter of one weight, whose gradient is eps-small then
                assert name == "weight" or error(got.grads[name], value) <= 1e-4, name


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_nan_passes_the_activation_as_in_torch(backend: str, last: bool) -> None:
    layer = example(False, 0, batch=2, c_in=20, c_out=20, groups=20, kernel=(1, 1), padding=0)
    layer = layer.to(torch.float32)
    broken = torch.rand(layer.tensors["input"].shape, generator=torch.Generator().manual_seed(2)) < 0.3
    u = layer.tensors["input"].masked_fill(broken, float("nan"))
    u = u.contiguous(memory_format=torch.channels_last) if last else u
    y = run(Layer(layer.tensors | {"input": u}, layer.options), backend=backend).output
    assert torch.equal(y.isnan(), broken)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_eps_matters_where_the_variance_is_small(backend: str, training: bool) -> None:
    layer = example(training, 0, batch=12).rounded(torch.float32)
    small = {"input": layer.tensors["input"] / 256, "running_var": layer.tensors["running_var"] / 65536}
    layer = Layer(layer.tensors | small, layer.options | {"eps": 1e-3})
    expected, got = run(layer, backend="reference"), run(layer.to(torch.float32), backend=backend)
    assert error(got.output, expected.output) <= 1e-5
    for name, value in expected.grads.items():
        assert error(got.grads[name], value) <= 1e-4, name


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
def test_float32_keeps_the_required_digits(training: bool, offset: float, backend: str) -> None:
    for seed in range(6):
        layer = example(training, seed, offset=offset, batch=12, size=[9, 8], kernel=(3, 2), padding=0)
        layer = layer.rounded(torch.float32)
        expected, got = run(layer, backend="reference"), run(layer.to(torch.float32), backend=backend)
        factor = max(1.0, kappa(layer) / 10)  # the contract's: rounding of u grows with |mean|/std
        assert error(got.output, expected.output) <= 1e-5 * factor
        for name, value in expected.grads.items():
            assert error(got.grads[name], value) <= 1e-4 * factor, (name, seed)


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_the_variance_does_not_cancel_far_from_zero(backend: str) -> None:
    for seed in range(4):
        # without filter scales: theirs would spread the samples' means, beside which the pixels' spread is nothing
        layer = example(True, seed, scale="none", offset=1000.0, batch=12, size=[9, 8], padding=0)
        layer = layer.rounded(torch.float32)
        expected, got = run(layer, backend="reference"), run(layer.to(torch.float32), backend=backend)
        assert kappa(layer) > 300
        assert error(got.output, expected.output) <= 1e-5 * kappa(layer) / 10  # as above
        for name in ("bn_weight", "bn_bias", "input"):
            assert error(got.grads[name], expected.grads[name]) <= 1e-4 * kappa(layer) / 10, name


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_filter_scale_gradient_is_exact_where_a_branch_holds_few_samples(backend: str) -> None:
    # with one or two samples ∂ω is O(ε/σ²): a near-cancelling sum, compared in absolute error
    for batch in (1, 2):
        layer = example(
            True, batch, batch=batch, kinds="all clean", activation=None, residual=False, size=[8, 8]
        )
        layer = layer.rounded(torch.float32)
        expected, got = run(layer, backend="reference"), run(layer.to(torch.float32), backend=backend)
        conv = {k: layer.options[k] for k in ("stride", "padding", "dilation", "groups")}
        u = reference.filter_scaled_conv2d(layer.tensors["input"], layer.tensors["weight"], None, **conv)
        upstream = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        scaled = u * layer.tensors["filter_scale"][:, :, None, None]
        std = (scaled.var((0, 2, 3), unbiased=False) + 1e-5).sqrt()
        size = layer.tensors["bn_weight"][1].abs() / std
        size = size * (upstream.abs() * (u - u.mean((2, 3), keepdim=True)).abs()).sum((2, 3))
        difference = (got.grads["filter_scale"].double() - expected.grads["filter_scale"]).abs()
        assert (difference <= 1e-5 * size).all()


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_low_precision_is_no_worse_than_twice_plain_torch(dtype, training: bool, backend: str) -> None:
    worst: dict[str, list[float]] = {}
    for seed in range(4):
        layer = example(training, seed, batch=12, c_in=8, c_out=8, size=[10, 10]).rounded(dtype)
        exact = run(layer, backend="reference")
        plain, ours = run(layer.to(dtype), function=plain_torch), run(layer.to(dtype), backend=backend)
        assert ours.output.dtype == dtype
        pairs = {"output": (ours.output, plain.output, exact.output)}
        pairs |= {n: (ours.grads[n], plain.grads[n], exact.grads[n]) for n in exact.grads}
        for name, (a, b, c) in pairs.items():
            worst.setdefault(name, [0.0, 0.0])
            worst[name][0] += error(a, c)
            worst[name][1] += error(b, c)
    for name, (ours_error, plain_error) in worst.items():
        assert ours_error <= 2 * plain_error, name


@settings(max_examples=40, deadline=None)
@given(layers(training=False, least=2), st.integers(0, 6), st.sampled_from(RUNNING))
def test_other_samples_filled_with_nan_change_no_bit(layer: Layer, which: int, backend: str) -> None:
    layer = layer.to(torch.float32)
    batch = len(layer.tensors["input"])
    sample = which % batch
    with_nan = dict(layer.tensors)
    for name in ("input", "filter_scale", "p_clean", "residual"):
        if name in with_nan:
            with_nan[name] = with_nan[name].clone()
            with_nan[name][torch.arange(batch) != sample] = float("nan")
    clean, dirty = run(layer, backend=backend), run(Layer(with_nan, layer.options), backend=backend)
    assert torch.equal(clean.output[sample], dirty.output[sample])
    for name in ("input", "filter_scale", "p_clean", "residual"):
        if name in clean.grads:
            assert torch.equal(clean.grads[name][sample], dirty.grads[name][sample]), name


def test_a_branch_is_untouched_by_nan_in_the_other() -> None:
    layer = example(True, 3, batch=8).to(torch.float32)
    clean = layer.tensors["is_clean"]
    clean[:3], clean[3:] = True, False
    spoilt = dict(layer.tensors)
    for name in ("input", "filter_scale", "residual"):
        spoilt[name] = spoilt[name].clone()
        spoilt[name][~clean] = float("nan")
    good, bad = run(layer), run(Layer(spoilt, layer.options))
    assert torch.equal(good.output[clean], bad.output[clean])
    assert torch.equal(good.grads["bn_weight"][1], bad.grads["bn_weight"][1])
    assert torch.equal(good.running["running_mean"][1], bad.running["running_mean"][1])


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_eager_passes_gradcheck(backend: str) -> None:
    for training in (True, False):
        layer = example(
            training, 1, batch=4, c_out=4, size=[3, 3], activation=None
        )  # ReLU has no derivative at 0
        names = [n for n in DIFFERENTIABLE if n in layer.tensors]
        fixed = {n: x for n, x in layer.tensors.items() if n not in names}

        def function(*values: torch.Tensor, names=names, fixed=fixed, layer=layer) -> torch.Tensor:
            tensors = fixed | dict(zip(names, values, strict=True))
            running = {n: tensors[n].clone() for n in ("running_mean", "running_var")}
            return ops.aw_conv2d(**(tensors | running), **layer.options, backend=backend)

        values = [layer.tensors[n].clone().requires_grad_() for n in names]
        # the input alone may be left out: the operators keep less then, and must still be right
        assert torch.autograd.gradcheck(function, values, atol=1e-6)
        values = [v.detach().requires_grad_(n == "input") for n, v in zip(names, values, strict=True)]
        assert torch.autograd.gradcheck(function, values, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    # sums cost a few of 16 and 7 digits
    [("eager", torch.float64, 1e-12), pytest.param("cpp", torch.float32, 1e-5, marks=built)],
    ids=["eager", "cpp"],
)
def test_mix_batch_norm_and_filter_scaled_conv2d_equal_the_reference(
    backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    both = (("reference", torch.float64), (backend, dtype))
    for training in (True, False):
        layer = example(training, 5).rounded(dtype)
        t = layer.tensors
        kind = {"is_clean": t["is_clean"]} if training else {"p_clean": t["p_clean"]}
        results = []
        for name, of_dtype in both:
            x = t["residual"].to(of_dtype, copy=True).requires_grad_()
            tables = [
                t[n].to(of_dtype, copy=True).requires_grad_(n[0] == "b") for n in ("bn_weight", "bn_bias")
            ]
            running = [t[n].to(of_dtype, copy=True) for n in ("running_mean", "running_var")]
            given = {n: v if v.dtype == torch.bool else v.to(of_dtype) for n, v in kind.items()}
            y = ops.mix_batch_norm(x, *tables, *running, **given, training=training, backend=name)
            grads = torch.autograd.grad(y.sin().sum(), [x, *tables])
            results.append([y, *grads, *running])
        for expected, got in zip(*results, strict=True):
            assert error(got, expected) < tolerance

    results = []
    for name, of_dtype in both:
        leaves = [t[n].to(of_dtype, copy=True).requires_grad_() for n in ("input", "weight", "filter_scale")]
        y = ops.filter_scaled_conv2d(*leaves, padding=1, groups=2, backend=name)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    for expected, got in zip(*results, strict=True):
        assert error(got, expected) < tolerance


def test_one_branch_equals_torchs_batch_norm_module() -> None:
    # an oracle that shares no code with us: two nn.BatchNorm2d over the two halves
    layer = example(True, 7, scale="none", residual=False, activation=None)
    t = layer.tensors
    y = ops.aw_conv2d(**t, filter_scale=None, **layer.options)
    u = torch.nn.functional.conv2d(t["input"], t["weight"], padding=1, groups=2)
    fresh = example(True, 7, scale="none", residual=False, activation=None).tensors
    for k in range(2):
        norm = torch.nn.BatchNorm2d(6, dtype=torch.float64)
        norm.weight.data, norm.bias.data = t["bn_weight"][k].clone(), t["bn_bias"][k].clone()
        norm.running_mean, norm.running_var = fresh["running_mean"][k], fresh["running_var"][k]
        branch = t["is_clean"] == bool(k)
        assert error(y[branch], norm(u[branch])) < 1e-12
        assert error(t["running_mean"][k], norm.running_mean) < 1e-12
        assert error(t["running_var"][k], norm.running_var) < 1e-12


def test_a_missing_branch_keeps_its_statistics_and_momentum_may_differ_by_branch() -> None:
    layer = example(True, 2, kinds="all clean")
    before = layer.tensors["running_mean"].clone(), layer.tensors["running_var"].clone()
    after = run(Layer(layer.tensors, layer.options | {"momentum": torch.tensor([0.5, 1.0])})).running
    assert torch.equal(after["running_mean"][0], before[0][0])
    assert torch.equal(after["running_var"][0], before[1][0])
    whole = run(Layer(layer.tensors, layer.options | {"momentum": 1.0})).running
    assert torch.equal(after["running_mean"][1], whole["running_mean"][1])


def test_an_empty_batch_gives_an_empty_output() -> None:
    for training in (True, False):
        layer = example(training, 0, batch=0).to(torch.float32)
        for backend in ("reference", *RUNNING):
            result = run(layer, backend=backend)
            assert result.output.shape == (0, 6, 6, 5)
            assert torch.equal(result.running["running_mean"], layer.tensors["running_mean"])
            assert all(torch.isfinite(g).all() for g in result.grads.values())


def test_one_value_per_channel_in_training_is_an_error() -> None:
    layer = example(True, 0, size=[1, 1], kernel=(1, 1), padding=0, batch=3)
    layer.tensors["is_clean"][:] = torch.tensor([True, False, False])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(layer)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        run(
            example(True, 0, size=[1, 1], kernel=(1, 1), padding=0, batch=1, affine_rows=1, statistics_rows=1)
        )


@pytest.mark.parametrize("channels", [4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_the_output_keeps_the_inputs_memory_format(backend: str, dtype: torch.dtype, channels: int) -> None:
    # the same values whatever the layout, up to the order of the convolution's sums
    tolerance = 2 * torch.finfo(dtype).eps
    for training in (True, False):
        layer = example(training, 0, c_in=channels, c_out=channels).to(dtype)
        plain = run(layer, backend=backend)
        tensors = dict(layer.tensors)
        for name in ("input", "residual", "weight"):
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
        last = run(Layer(tensors, layer.options), backend=backend)
        assert plain.output.is_contiguous()
        assert last.output.is_contiguous(memory_format=torch.channels_last)
        assert last.grads["input"].is_contiguous(memory_format=torch.channels_last)
        assert error(last.output, plain.output) < tolerance
        for name, value in plain.grads.items():
            assert error(last.grads[name], value) < 20 * tolerance, name
        strided = layer.tensors["input"].transpose(2, 3).clone().transpose(2, 3)
        odd = run(Layer(layer.tensors | {"input": strided}, layer.options), backend=backend)
        assert error(odd.output, plain.output) < tolerance


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
@pytest.mark.parametrize(("groups", "kernel"), [(1, 3), (16, 3), (1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_weights_gradient_has_the_weights_strides(
    layout: torch.memory_format, groups: int, kernel: int, backend: str
) -> None:
    for images in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.rand(4, 16, 9, 9, dtype=dtype).contiguous(memory_format=images)
            weight = torch.rand(16, 16 // groups, kernel, kernel, dtype=dtype)
            weight = weight.contiguous(memory_format=layout).requires_grad_()
            y = ops.filter_scaled_conv2d(x, weight, torch.rand(4, 16), groups=groups, backend=backend)
            (d_weight,) = torch.autograd.grad(y.square().sum(), weight)
            assert d_weight.stride() == weight.stride(), (images, dtype)


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_the_same_call_gives_the_same_bits(backend: str) -> None:
    for training in (True, False):
        layer = example(training, 0, batch=16, size=[17, 13]).to(torch.float32)
        first, second = run(layer, backend=backend), run(layer, backend=backend)
        assert torch.equal(first.output, second.output)
        assert all(torch.equal(first.grads[n], second.grads[n]) for n in first.grads)
        torch.use_deterministic_algorithms(True)
        try:
            run(layer, backend=backend)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mask_in_place_of_y_changes_nothing(dtype, layout: torch.memory_format, backend: str) -> None:
    for training in (True, False):
        layer = example(training, 4, size=[9, 7]).to(dtype)
        tensors = layer.tensors
        for name in ("input", "residual"):
            tensors[name] = tensors[name].contiguous(memory_format=layout)
        tensors["residual"][0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), 1e-7])
        if not training:  # y as it is stored: in float16 this is next to zero and rounds to it
            tensors["residual"][1] = 1e-8
            for name in ("filter_scale", "bn_bias", "running_mean"):
                tensors[name][-1 if name == "filter_scale" else slice(None)] = 0.0
        whole = run(layer, backend=backend)  # the weight needs its gradient, so y is kept
        names = [n for n in ("input", "filter_scale", "p_clean", "residual") if n in tensors]
        leaves = {n: x.clone().requires_grad_(n in names) for n, x in tensors.items()}
        y = ops.aw_conv2d(**leaves, **layer.options, backend=backend)
        assert torch.equal(y.nan_to_num(7.0), whole.output.nan_to_num(7.0))
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = torch.autograd.grad(y, [leaves[n] for n in names], upstream.to(y))
        for name, got in zip(names, grads, strict=True):
            got, want = got.nan_to_num(7.0), whole.grads[name].nan_to_num(7.0)
            # the compiler contracts products and sums of the two loops in its own way, the library may convolve
            # in another order: rounding, where a wrong gate would show in whole pixels
            assert error(got, want) <= 4 * torch.finfo(dtype).eps, name
        # and with nothing to save at all the layer may write over its own u, never over the caller's tensors
        before = {n: x.clone() for n, x in tensors.items()}
        with torch.no_grad():
            again = ops.aw_conv2d(**before, **layer.options, backend=backend)
        assert torch.equal(again.nan_to_num(7.0), whole.output.nan_to_num(7.0))
        for n in ("input", "weight", "residual", "filter_scale"):
            assert torch.equal(before[n].nan_to_num(7.0), tensors[n].nan_to_num(7.0)), n


def test_mix_batch_norm_never_writes_to_its_input() -> None:
    t = example(False, 0).to(torch.float32).tensors
    tables = [t[n] for n in ("bn_weight", "bn_bias", "running_mean", "running_var")]
    for backend in RUNNING:
        x = t["residual"].clone()
        ops.mix_batch_norm(x, *tables, p_clean=t["p_clean"], backend=backend)
        assert torch.equal(x, t["residual"])


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_gradients_that_are_not_required_are_not_computed(backend: str, monkeypatch) -> None:
    # in the attack that is ∂γ, ∂β; a router's layer has neither ω nor p
    requested = []
    if backend == "eager":
        plain = Passes.eval_gradients
        monkeypatch.setattr(
            Passes, "eval_gradients", staticmethod(lambda *a: requested.append(a[-1][2:6]) or plain(*a))
        )
    layer = example(False, 0).to(torch.float32)
    leaves = {n: x.clone().requires_grad_(n in ("filter_scale", "p_clean")) for n, x in layer.tensors.items()}
    y = ops.aw_conv2d(**leaves, **layer.options, backend=backend)
    torch.autograd.grad(y.sum(), [leaves["filter_scale"], leaves["p_clean"]])
    assert requested == ([(True, True, False, False)] if backend == "eager" else [])
    if backend == "cpp":
        sums = [torch.randn(6, 6) for _ in range(3)]
        tables = [layer.tensors[n] for n in ("bn_weight", "bn_bias", "running_mean", "running_var")]
        arguments = (*sums, layer.tensors["filter_scale"], layer.tensors["p_clean"], *tables, 1e-5)
        for needs in ([True, True, False, False], [False, True, False, False], [False, False, True, True]):
            grads = torch.ops.awnet.eval_gradients(*arguments, needs)
            assert [x.numel() > 0 for x in grads] == needs


@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_only_arguments_that_require_a_gradient_get_one(backend: str) -> None:
    for training, scale in ((True, "random"), (False, "random"), (False, "none")):
        layer = example(training, 0, scale=scale).to(torch.float32)
        everything = run(layer, backend=backend).grads
        for name in everything:
            leaves = {n: x.clone().requires_grad_(n == name) for n, x in layer.tensors.items()}
            leaves.setdefault("filter_scale", None)
            y = ops.aw_conv2d(**leaves, **layer.options, backend=backend)
            upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            y.backward(upstream.to(y))
            assert leaves[name].grad is not None, name
            # the same sums, but for the order in which the library's convolution takes them
            assert error(leaves[name].grad, everything[name]) < 1e-6, name
            assert all(x is None or x.grad is None for n, x in leaves.items() if n != name)


def test_a_second_derivative_names_the_reference() -> None:
    layer = example(False, 0)
    for backend in ("eager", "reference"):
        x = layer.tensors["input"].clone().requires_grad_()
        tensors = layer.tensors | {"input": x}
        y = ops.aw_conv2d(**tensors, **layer.options, backend=backend)
        upstream = torch.ones_like(y).requires_grad_()
        (first,) = torch.autograd.grad((y * upstream).square().sum(), x, create_graph=True)
        if backend == "reference":
            torch.autograd.grad(first.sum(), upstream)
        else:
            with pytest.raises(RuntimeError, match="backend='reference'"):
                torch.autograd.grad(first.sum(), upstream)


# --- dispatch


def test_explain_reports_the_backend_and_the_reasons_against_others() -> None:
    layer = example(False, 0)
    explanation = ops.explain(ops.aw_conv2d, **layer.tensors, **layer.options)
    assert explanation.backend == next(b.name for b in BACKENDS if ran_by(b, layer))
    assert set(explanation.others) == {b.name for b in BACKENDS} - {explanation.backend}
    assert all(explanation.others.values())
    assert explanation.backend in str(explanation)
    named = ops.explain(ops.aw_conv2d, **layer.tensors, **layer.options, backend="reference")
    assert named.backend == "reference"
    with pytest.raises(ValueError, match="function must be one of"):
        ops.explain(torch.relu, layer.tensors["input"])


def ran_by(backend, layer: Layer) -> bool:
    return backend.not_supported(layer_args(ops.aw_conv2d, **layer.tensors, **layer.options)) is None


def test_use_backend_and_the_environment_select_the_backend() -> None:
    layer = example(False, 0)

    def taken(**more: object) -> str:
        return ops.explain(ops.aw_conv2d, **layer.tensors, **layer.options, **more).backend

    with ops.use_backend("reference"):
        assert taken() == "reference"
        assert taken(backend="eager") == "eager"
        with ops.use_backend(None):
            assert taken() != "reference"
        with pytest.raises(KeyError), ops.use_backend("eager"):
            raise KeyError
        assert taken() == "reference"
    with pytest.raises(ValueError, match="unknown backend 'fast'"), ops.use_backend("fast"):
        pass
    code = """
import os, torch
for value in ("reference", "nonsense"):
    if os.fork() == 0:  # after torch's seconds of import and before ours, which reads the variable
        os.environ["AWNET_BACKEND"] = value
        import awnet.ops as o
        x = torch.ones(1, 1, 3, 3)
        print(o.explain(o.filter_scaled_conv2d, x, x, None).backend)
        break
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "reference\n"
    assert "AWNET_BACKEND: unknown backend 'nonsense'" in done.stderr


def test_a_named_backend_that_cannot_run_raises_with_the_reason() -> None:
    layer = example(False, 0)
    for backend in BACKENDS:
        if not ran_by(backend, layer):
            with pytest.raises(ValueError, match=f"{backend.name}.*cannot run this call: .* can run it"):
                ops.aw_conv2d(**layer.tensors, **layer.options, backend=backend.name)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=False)
@given(layers(offset=0.0))
def test_ten_thousand_random_layers_equal_the_reference(layer: Layer) -> None:
    assume(not has_single_value(layer))
    assert_agrees(layer, forward=1e-9, gradient=1e-7)

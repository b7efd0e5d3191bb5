"""The operators under opcheck, torch.compile, torch.export and autocast."""

from __future__ import annotations

import pytest
import torch
from support.layer_calls import LAYER_BACKENDS, example
from support.random_layers import (
    DIFFERENTIABLE,
    Layer,
    error,
    run,
)

from awnet import ops
from awnet.ops.args import flatten
from awnet.ops.autograd import keep_flags
from awnet.ops.functional import layer_args

# --- torch's machinery


def operator_arguments(layer: Layer) -> tuple:
    args = layer_args(ops.aw_conv2d, **{"filter_scale": None} | layer.tensors, **layer.options)
    return flatten(args, *keep_flags(args))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", LAYER_BACKENDS)
def test_the_operators_pass_opcheck(training: bool, layout: torch.memory_format, backend: str) -> None:
    layer = example(training, 0).to(torch.float32)
    for name in ("input", "residual"):
        layer.tensors[name] = layer.tensors[name].contiguous(memory_format=layout)
    operator = getattr(torch.ops.awnet, "layer_native" if backend == "cpp" else f"layer_{backend}").default
    # training saves u and y, an attack u and a mask, a frozen router a mask alone
    attacked = [] if training else [("input", "filter_scale", "p_clean", "residual"), ("input",)]
    for names in (DIFFERENTIABLE, *attacked):
        for name, x in layer.tensors.items():
            if x.is_floating_point():
                x.requires_grad_(name in names)
        torch.library.opcheck(operator, operator_arguments(layer))


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_compiles_without_a_graph_break(training: bool) -> None:
    layer = example(training, 0).to(torch.float32)
    expected = run(layer)
    torch.compiler.reset()
    got = run(layer, function=compiled(ops.aw_conv2d))
    assert torch.equal(got.output, expected.output)
    for name in expected.grads:
        assert torch.equal(got.grads[name], expected.grads[name]), name
    assert torch.equal(got.running["running_mean"], expected.running["running_mean"])
    with ops.use_backend("eager"):
        run(layer, function=compiled(ops.aw_conv2d))


def test_a_layer_exports_in_eval_mode_with_a_dynamic_batch() -> None:
    layer = example(False, 0).to(torch.float32)
    t = layer.tensors

    class Module(torch.nn.Module):
        def forward(self, x, scale, p, residual):
            tables = (t["bn_weight"], t["bn_bias"], t["running_mean"], t["running_var"])
            return ops.aw_conv2d(
                x, t["weight"], scale, *tables, p_clean=p, residual=residual, padding=1, groups=2
            )

    per_sample = (t["input"], t["filter_scale"], t["p_clean"], t["residual"])
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Module(), per_sample, dynamic_shapes={n: {0: batch} for n in ("x", "scale", "p", "residual")}
    )
    larger = tuple(torch.cat([x, x]) for x in per_sample)
    assert torch.equal(program.module()(*larger), Module()(*larger))


def test_autocast_is_applied_once() -> None:
    for training in (True, False):
        layer = example(training, 0).to(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            result = run(layer)
        assert result.output.dtype == torch.bfloat16
        assert all(result.grads[n].dtype == x.dtype for n, x in layer.tensors.items() if n in result.grads)
        assert result.running["running_mean"].dtype == torch.float32
        direct = run(layer.to(torch.bfloat16))
        assert torch.equal(result.output, direct.output)
        with torch.autocast("cpu", torch.bfloat16):
            assert run(example(training, 0)).output.dtype == torch.float64  # as torch: float64 is left alone


def test_half_precision_parameters_get_gradients_of_their_dtype() -> None:
    layer = example(True, 0)
    half = Layer(
        {n: x.bfloat16() if x.is_floating_point() else x for n, x in layer.tensors.items()}, layer.options
    )
    result = run(half)
    assert all(g.dtype == torch.bfloat16 for g in result.grads.values())
    assert error(result.output, run(layer).output) < 0.05

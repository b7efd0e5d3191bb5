"""The Triton backend on Triton's own launch path, compiled for sm_90 and not run: which kernels a call launches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.launch_path import Launches, host_seconds
from torch import Tensor

from awnet import ops
from awnet.models import create_model
from awnet.nn.inference import inference_copy

# multiples of 16, for which Triton compiles one variant only
BATCH, CHANNELS, SIZE = 16, 16, 16


def layer(training: bool, x: Tensor, weight: Tensor, filter_scale: Tensor) -> Tensor:
    tables = [torch.ones(2, CHANNELS) for _ in range(4)]
    mix = {"is_clean": torch.arange(BATCH) % 2 == 0} if training else {"p_clean": torch.full((BATCH,), 0.5)}
    return ops.aw_conv2d(
        x, weight, filter_scale, *tables, padding=1, training=training, activation="relu", backend="triton", **mix
    )  # fmt: skip


def arguments(frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(BATCH, CHANNELS, SIZE, SIZE, requires_grad=True)
    weight = torch.rand(CHANNELS, CHANNELS, 3, 3, requires_grad=not frozen)
    return x, weight, torch.rand(BATCH, CHANNELS, requires_grad=not frozen)


def test_a_layer_in_train_mode_launches_each_pass_once(triton_launches: Launches) -> None:
    y = layer(True, *arguments(frozen=False))
    forward = ["statistics_kernel", "batch_statistics_kernel", "train_coefficients_kernel", "apply_kernel"]
    assert triton_launches.kernels == forward
    triton_launches.clear()
    y.sum().backward()
    assert triton_launches.kernels == ["reduce_kernel", "train_gradients_kernel", "propagate_kernel"]


def test_an_attack_step_on_a_frozen_layer_reads_no_sums(triton_launches: Launches) -> None:
    layer(False, *arguments(frozen=True)).sum().backward()
    assert triton_launches.kernels[:2] == ["eval_coefficients_kernel", "apply_kernel"]
    assert triton_launches.kernels[2:] == ["propagate_kernel"]  # with the scale of the forward


def test_a_layers_attack_step_is_four_launches_and_no_operator(triton_launches: Launches) -> None:
    """Gradients of image, ω and p; the host time of the step is that of these calls."""
    x, weight, filter_scale = arguments(frozen=True)
    p_clean = torch.full((BATCH,), 0.5, requires_grad=True)
    tables = [torch.ones(2, CHANNELS) for _ in range(4)]
    with torch.profiler.profile() as profile:
        y = ops.aw_conv2d(
            x, weight, filter_scale.requires_grad_(), *tables, padding=1, p_clean=p_clean, backend="triton"
        )
        torch.autograd.grad(y, (x, filter_scale, p_clean), torch.ones_like(y))
    assert triton_launches.kernels == [
        "eval_coefficients_kernel", "apply_kernel", "eval_backward_kernel", "eval_gradients_kernel"
    ]  # fmt: skip
    assert not [event.name for event in profile.events() if event.name.startswith("awnet::")]


def test_the_second_call_compiles_nothing(triton_launches: Launches) -> None:
    tensors = arguments(frozen=True)
    layer(False, *tensors)
    triton_launches.clear()
    layer(False, *tensors)
    assert triton_launches.counts
    assert triton_launches.compiled == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_coefficients_alone_copy_the_center_once(
    triton_launches: Launches, dtype: torch.dtype
) -> None:
    """A pixel of u is strided: in float32 each kernel that reads it would make a dense copy."""
    x, weight, filter_scale = (tensor.detach() for tensor in arguments(frozen=True))
    filter_scale.requires_grad_()
    y = layer(False, x.to(dtype), weight.to(dtype), filter_scale)
    triton_launches.clear()
    with torch.profiler.profile() as profile:
        torch.autograd.grad(y, filter_scale, torch.ones_like(y))
    assert triton_launches.counts.keys() == {"reduce_kernel", "eval_gradients_kernel"}
    assert sum(event.name in ("aten::clone", "aten::_to_copy") for event in profile.events()) <= 1


def test_the_host_time_of_a_call_is_measurable(triton_launches: Launches) -> None:
    tensors = arguments(frozen=True)
    assert 0 < host_seconds(lambda: layer(False, *tensors), repeats=3) < 10


@pytest.mark.slow  # it compiles about twenty kernels
def test_a_frozen_network_makes_its_coefficients_in_one_launch(triton_launches: Launches) -> None:
    model = create_model("awnet_tiny", num_classes=10, in_channels=3)
    copy = inference_copy(model)
    assert copy is not None
    x = torch.rand(BATCH, 3, SIZE, SIZE, requires_grad=True)
    with ops.use_backend("triton"):
        copy(x).sum().backward()
    counts = triton_launches.counts
    layers = counts["apply_kernel"]
    # one for the router, one for the dynamic network that takes the router's ω and p
    assert counts["eval_coefficients_kernel"] == 2
    assert counts["eval_gradients_kernel"] == 1
    # one kernel does a layer's whole backward
    assert counts["eval_backward_kernel"] == layers
    assert counts.keys() & {"reduce_kernel", "propagate_kernel"} == set()


# --- torch.compile


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The whole as one graph, through Dynamo and AOTAutograd; a graph break is an error."""
    torch._dynamo.reset()
    result: Callable[..., Tensor] = torch.compile(function, backend="aot_eager", fullgraph=True)
    return result


def test_coefficients_and_attack_step_compile_into_one_graph(triton_launches: Launches) -> None:
    tables, x = torch.rand(4, 2, 2 * CHANNELS), torch.rand(BATCH, CHANNELS)
    cast = torch.empty_like(x, dtype=torch.bfloat16)
    leaves = torch.rand(BATCH, CHANNELS, requires_grad=True), torch.rand(BATCH, requires_grad=True)

    def forward(filter_scale: Tensor, p_clean: Tensor) -> Tensor:
        pairs = ops.network_coefficients(tables, (CHANNELS, CHANNELS), filter_scale, p_clean, eps=1e-5)
        return torch.stack([scale + shift for scale, shift in pairs])

    with ops.use_backend("triton"):
        compiled(forward)(*leaves).sum().backward()
        y = compiled(lambda start: ops.sign_step(start, x, x, 0.01, 0.03, cast=cast) + cast)(x)
    assert y.shape == x.shape
    names = ["eval_coefficients_kernel", "eval_gradients_kernel", "sign_step_kernel"]
    assert triton_launches.kernels == names
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.slow  # the compiler takes one to two minutes a network
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "live"])
def test_a_compiled_network_launches_the_kernels_of_the_network(
    triton_launches: Launches, frozen: bool, backend: str
) -> None:
    model = create_model("awnet_tiny", num_classes=10, in_channels=3).eval()
    network = inference_copy(model) if frozen else model
    assert network is not None
    x = torch.rand(BATCH, 3, SIZE, SIZE, requires_grad=True)
    torch._dynamo.reset()
    with ops.use_backend("triton"):
        network(x).sum().backward()  # a frozen network makes its router's coefficients at the first call
        triton_launches.clear()
        network(x).sum().backward()
        uncompiled = triton_launches.counts
        triton_launches.clear()
        torch.compile(network, backend=backend, fullgraph=True)(x).sum().backward()
    counts = triton_launches.counts
    assert counts["apply_kernel"] == uncompiled["apply_kernel"]
    # only layers in eager mode keep the scale for their backward; the operator's backward computes it again
    repeats = 1 if frozen else 2
    assert counts["eval_coefficients_kernel"] == repeats * uncompiled["eval_coefficients_kernel"]
    assert counts["eval_gradients_kernel"] == uncompiled["eval_gradients_kernel"]

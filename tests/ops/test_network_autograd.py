"""A frozen network as one autograd function, on plain torch passes in float64, against its separate layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.small_network import small_network
from torch import Tensor

from awnet import ops
from awnet.ops import network_autograd
from awnet.ops.backends.base import Passes
from awnet.ops.network import layer_by_layer

Arguments = tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]], list[ops.NetworkLayer]]


def as_one_function(*arguments: Any) -> list[Tensor]:
    return network_autograd.run(Passes(), *arguments)


def leaves_of(arguments: Arguments, required: str) -> list[Tensor]:
    x, _, tables, _ = arguments
    leaves = [] if required == "tables" else [x]
    if required == "some tables":
        leaves = [tables[1][0], tables[3][1]]
    elif required != "images":
        leaves += [table for pair in tables for table in pair]
    return [leaf.requires_grad_() for leaf in leaves]


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    pairs = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if y.requires_grad]
    return list(torch.autograd.grad([y for y, _ in pairs], leaves, [grad for _, grad in pairs]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("required", ["images", "tables", "both", "some tables"])
def test_values_and_gradients_equal_those_of_the_layers(required: str, layout: torch.memory_format) -> None:
    arguments = small_network(torch.float64, layout)
    leaves = leaves_of(arguments, required)
    got = as_one_function(*arguments)
    with ops.use_backend("reference"):
        expected = layer_by_layer(*arguments)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert one.requires_grad == other.requires_grad
    for one, other in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
        # float64 sums of six layers; their terms are up to a hundred times their sum
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * float(other.abs().max()))


@pytest.mark.parametrize("output", [0, 1, 2])
def test_an_output_without_a_gradient_is_left_out(output: int) -> None:
    arguments = small_network(torch.float64, torch.contiguous_format)
    leaves = leaves_of(arguments, "images")
    (got,) = torch.autograd.grad(as_one_function(*arguments)[output].sum(), leaves)
    with ops.use_backend("reference"):
        (expected,) = torch.autograd.grad(layer_by_layer(*arguments)[output].sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_nothing_is_saved_without_gradients() -> None:
    arguments = small_network(torch.float64, torch.contiguous_format)
    outputs = as_one_function(*arguments)
    assert not any(y.requires_grad for y in outputs)
    leaves_of(arguments, "both")
    with torch.no_grad():
        quiet = as_one_function(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(outputs, quiet, strict=True))


def test_masks_are_saved_only_where_u_does_not_give_them() -> None:
    arguments = small_network(torch.float64, torch.contiguous_format)
    leaves_of(arguments, "both")
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        as_one_function(*arguments)
    layers = arguments[3]
    with_residual = [layer for layer in layers if layer.residual >= 0]
    assert sum(x.dtype == torch.bool for x in saved) == len(with_residual) == 2
    assert sum(x.dim() == 4 and x.shape[0] == 2 and x.dtype != torch.bool for x in saved) == len(layers)  # u


def test_no_gradient_is_computed_below_the_first_table_that_needs_one() -> None:
    arguments = small_network(torch.float64, torch.contiguous_format)
    leaves = [table.requires_grad_() for table in arguments[2][4]]
    outputs = as_one_function(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(outputs[2].sum(), leaves)
    # layer 5 reads layer 4, whose input needs no gradient
    assert sum(e.name == "aten::convolution_backward" for e in profile.events()) == 1


def test_a_second_derivative_of_a_frozen_network_is_refused() -> None:
    arguments = small_network(torch.float64, torch.contiguous_format)
    leaves = leaves_of(arguments, "images")
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(as_one_function(*arguments)[2].sum(), leaves, create_graph=True)

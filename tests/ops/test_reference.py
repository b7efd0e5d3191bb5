"""The specification itself, against sums of products and against the layouts that a tensor can have."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import layer_statement as statement
from support.random_layers import DIFFERENTIABLE, Layer, build, error, has_single_value, layers
from torch import Tensor

from awnet import ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "odd stride of the batch": lambda x: torch.cat([x.flatten(1), x.new_zeros(len(x), 3)], 1)[:, : x[0].numel()]
    .unflatten(1, x.shape[1:]),
}  # fmt: skip
IMAGES = ("input", "weight", "residual")


def results(
    function: Callable[..., Tensor], layer: Layer, layouts: dict[str, str], upstream: str
) -> dict[str, Tensor]:
    """Output, gradients and running statistics; the images and the upstream gradient in ``layouts``."""
    leaves: dict[str, Any] = {}
    for name, x in layer.tensors.items():
        leaves[name] = LAYOUTS[layouts[name]](x).detach() if name in IMAGES else x.clone()
        leaves[name].requires_grad_(name in DIFFERENTIABLE)
    y = function(**({"filter_scale": None} | leaves), **layer.options)
    output = y.detach()
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = [name for name in DIFFERENTIABLE if name in leaves]
    if upstream == "through a product":  # whose strides are those of y
        y, grad = (y * grad).sum(), torch.ones((), dtype=torch.float64)
    else:
        grad = LAYOUTS[upstream](grad)
    gradients = torch.autograd.grad(y, [leaves[name] for name in names], grad, allow_unused=True)
    running = {name: leaves[name].detach() for name in ("running_mean", "running_var")}
    used = {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    return {"output": output, **used, **running}


def agree(layer: Layer, layouts: dict[str, str], upstream: str, backend: str) -> None:
    def function(**arguments: Any) -> Tensor:
        if backend == "awnet.reference":
            return reference.aw_conv2d(**arguments)
        return ops.aw_conv2d(**arguments, backend=backend)

    expected = results(statement.aw_conv2d, layer, layouts, upstream)
    for name, got in results(function, layer, layouts, upstream).items():
        # float64: rounding alone, but for gradients that nearly cancel, as ω's in a branch of one sample
        size = float(expected[name].norm())
        assert error(got, expected[name]) <= 1e-9 or float((got - expected[name]).norm()) <= 1e-9, (
            name,
            size,
        )


@pytest.mark.parametrize("backend", ["awnet.reference", "eager"])
@settings(max_examples=12)
@given(
    layer=layers(),
    layouts=st.fixed_dictionaries({name: st.sampled_from(list(LAYOUTS)) for name in IMAGES}),
    upstream=st.sampled_from([*LAYOUTS, "through a product"]),
)
def test_layers_of_any_shape_and_layout_equal_sums_of_products(
    layer: Layer, layouts: dict[str, str], upstream: str, backend: str
) -> None:
    if not has_single_value(layer):
        agree(layer, layouts, upstream, backend)


@pytest.mark.parametrize("training", [False, True], ids=["testing", "training"])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_pair_of_layouts_equals_sums_of_products(batch: int, training: bool) -> None:
    for groups, residual, activation in [(1, False, None), (2, True, None), (1, True, "relu")]:
        layer = build(
            torch.Generator().manual_seed(0), training, batch=batch, groups=groups, size=(4, 4),
            kinds="all clean", residual=residual, activation=activation,
        )  # fmt: skip
        for first, second in itertools.product(LAYOUTS, LAYOUTS):
            layouts = {"input": first, "weight": second, "residual": first}
            agree(layer, layouts, "through a product", "awnet.reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("training", [False, True], ids=["testing", "training"])
def test_the_batch_norm_is_computed_in_float32_or_wider(training: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + 4).to(dtype)
    tables = [torch.rand(1, 2), torch.rand(1, 2), torch.rand(1, 2), torch.rand(1, 2) + 0.5]
    got = reference.mix_batch_norm(x, *(t.clone() for t in tables), training=training)
    exact = reference.mix_batch_norm(x.double(), *(t.double() for t in tables), training=training)
    assert got.dtype == dtype
    # one rounding to the dtype, and float32's in the statistics
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_one_value_per_channel_in_training_is_an_error() -> None:
    tables = torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        reference.mix_batch_norm(torch.ones(1, 2, 1, 1), *tables, training=True)

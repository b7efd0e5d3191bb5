"""The layer's gradient in eager mode, without an operator, and that of the operator, for graphs and modes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from support.random_layers import build
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from awnet.ops.args import LayerArgs, Saved, flatten
from awnet.ops.autograd import keep_flags
from awnet.ops.backends.base import Backend
from awnet.ops.dispatch import BACKENDS
from awnet.ops.functional import aw_conv2d, layer_args

EAGER: Backend = next(backend for backend in BACKENDS if backend.name == "eager")


def arguments(training: bool, names: tuple[str, ...]) -> tuple[LayerArgs, list[Tensor]]:
    layer = build(torch.Generator().manual_seed(0), training)
    tensors = {n: x.clone().requires_grad_(n in names) for n, x in layer.tensors.items()}
    args = layer_args(aw_conv2d, **{"filter_scale": None} | tensors, **layer.options)
    return args, [tensors[n] for n in names]


def through_the_operator(args: LayerArgs) -> Tensor:
    return Saved(*torch.ops.awnet.layer_eager(*flatten(args, *keep_flags(args)))).y


@pytest.mark.parametrize(
    "names", [("input", "filter_scale", "bn_weight", "bn_bias"), ("input",), ("weight",)]
)
@pytest.mark.parametrize("training", [True, False])
def test_eager_mode_and_the_operator_give_the_same_bits(training: bool, names: tuple[str, ...]) -> None:
    results = []
    for run in (EAGER.run, through_the_operator):
        args, leaves = arguments(training, names)
        y = run(args)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Operators(TorchDispatchMode):
    """The layer's operators that are called in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "awnet":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_eager_calls_have_no_operator_in_their_graph() -> None:
    args, _ = arguments(False, ("input",))
    assert EAGER.run(args).grad_fn.name() == "_LayerBackward"
    assert through_the_operator(args).grad_fn.name() != "_LayerBackward"


@pytest.mark.parametrize("training", [True, False])
def test_modes_subclasses_and_traces_see_the_operator(training: bool) -> None:
    args, (x,) = arguments(training, ("input",))
    with Operators() as seen:
        EAGER.run(args).sum().backward()
    assert seen.names == ["layer_eager.default", "layer_eager_backward.default"]
    y = EAGER.run(replace(args, input=x.detach().as_subclass(Subclass).requires_grad_()))
    assert "_LayerBackward" not in y.grad_fn.name()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        shape = EAGER.run(replace(args, input=fake.from_tensor(x))).shape
    assert shape == y.shape
    assert EAGER.run(moved(args, "meta")).shape == y.shape


def moved(args: LayerArgs, device: str) -> LayerArgs:
    changes = {
        f.name: value.to(device) for f in fields(args) if isinstance(value := getattr(args, f.name), Tensor)
    }
    assert args.norm is not None
    tables = {name: getattr(args.norm, name).to(device) for name in ("weight", "bias", "mean", "var")}
    return replace(args, **changes, norm=replace(args.norm, **tables))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
def test_traced_layers_are_traced_as_operators() -> None:
    args, (x,) = arguments(False, ("input",))
    with torch.no_grad():
        traced = torch.jit.trace(lambda image: EAGER.run(replace(args, input=image)), x)
        assert "awnet::layer_eager" in str(traced.graph)
        assert torch.equal(traced(x + 1), EAGER.run(replace(args, input=x + 1)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_nothing_is_saved(mode: type) -> None:
    args, _ = arguments(False, ("input", "weight"))
    with mode():
        y = EAGER.run(args)
    assert y.grad_fn is None
    assert torch.equal(y, EAGER.run(args))


def test_unused_outputs_and_gradients_of_none_are_handled() -> None:
    args, (x,) = arguments(False, ("input",))
    y = EAGER.run(args)
    (zero,) = torch.autograd.grad(y.detach().sum() + 0 * x.sum(), x)
    assert torch.equal(zero, torch.zeros_like(x))


def test_the_first_derivative_with_create_graph_is_the_same_and_a_second_one_raises() -> None:
    args, (x,) = arguments(False, ("input",))
    plain = torch.autograd.grad(EAGER.run(args).square().sum(), x)[0]
    graphed = torch.autograd.grad(EAGER.run(args).square().sum(), x, create_graph=True)[0]
    assert torch.equal(plain, graphed)
    with pytest.raises(RuntimeError, match="first derivative only"):
        graphed.sum().backward()


def test_the_running_statistics_have_no_history() -> None:
    args, _ = arguments(True, ("input", "bn_weight"))
    assert args.norm is not None
    EAGER.run(args)
    assert args.norm.mean.grad_fn is None
    assert not args.norm.mean.requires_grad

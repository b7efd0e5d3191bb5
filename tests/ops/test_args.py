"""The records of a layer call and their flat form, which the operators take."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awnet.ops import args
from awnet.ops.args import ACTIVATIONS, BackwardArgs, Conv, LayerArgs, MixNorm, Needs

tensors = st.builds(torch.empty, st.just(()))  # told apart by identity
maybe = st.none() | tensors
pairs = st.tuples(st.integers(0, 9), st.integers(0, 9))
convs = st.builds(Conv, pairs, pairs, pairs, st.integers(1, 9))
norms = st.none() | st.builds(
    MixNorm,
    *[tensors] * 4,
    eps=st.floats(1e-9, 1),
    training=st.booleans(),
    process_group=st.sampled_from(["", "group"]),
)
layers = st.builds(
    LayerArgs,
    input=tensors,
    weight=maybe,
    conv=convs,
    filter_scale=maybe,
    norm=norms,
    p_clean=maybe,
    is_clean=maybe,
    shift=maybe,
    residual=maybe,
    activation=st.sampled_from(ACTIVATIONS),
)
backwards = st.builds(
    BackwardArgs,
    grad=tensors,
    input=maybe,
    input_shape=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    weight=maybe,
    conv=convs,
    filter_scale=maybe,
    norm=norms,
    p_clean=maybe,
    is_clean=maybe,
    shift=maybe,
    u=maybe,
    relu_mask=maybe,
    slope=maybe,
    mean=tensors,
    m2=tensors,
    n=tensors,
    channels_last=st.booleans(),
    needs=st.builds(Needs, *[st.booleans()] * 8),
)


def same(a: object, b: object) -> bool:
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in names)
    return a is b if isinstance(a, Tensor) else a == b


@given(layers, st.booleans(), st.booleans())
def test_layer_args_survive_a_round_trip_through_the_flat_form(
    layer: LayerArgs, keep_u: bool, keep_mask: bool
) -> None:
    flat = args.flatten(layer, keep_u, keep_mask)
    again, *kept = args.unflatten(flat)
    assert same(again, layer)
    assert kept == [keep_u, keep_mask]


def flattened(backward: BackwardArgs) -> tuple[object, ...]:
    b, norm = backward, backward.norm
    tables, options = [None] * 4, [False, 1e-5, ""]
    if norm is not None:
        tables = [norm.weight, norm.bias, norm.mean, norm.var]
        options = [norm.training, norm.eps, norm.process_group]
    layer = (b.input, b.weight, b.filter_scale, b.p_clean, *tables[:2], b.shift, *tables[2:], b.is_clean)
    tensors = (*layer, b.u, b.relu_mask, b.slope, b.mean, b.m2, b.n)
    options += b.conv
    return args.backward_arguments(b.grad, b.input_shape, tensors, options, b.channels_last, list(b.needs))


@given(backwards)
def test_backward_args_survive_a_round_trip_through_the_flat_form(backward: BackwardArgs) -> None:
    assert same(args.unflatten_backward(flattened(backward)), backward)


def expected_types(flat: tuple[object, ...]) -> list[str]:
    def kind(x: object) -> str:
        if isinstance(x, bool):
            return "bool"
        if isinstance(x, list | tuple):
            return "List[bool]" if x and isinstance(x[0], bool) else "List[int]"
        return {Tensor: "Tensor", int: "int", float: "float", str: "str"}[type(x)]

    return [kind(x) for x in flat]


@pytest.mark.parametrize("name", ["layer_eager", "layer_triton", "layer_native"])
def test_the_flat_order_is_that_of_the_schemas(name: str) -> None:
    x = torch.empty(())
    norm = MixNorm(x, x, x, x)
    layer = LayerArgs(x, x, filter_scale=x, norm=norm, p_clean=x, is_clean=x, shift=x, residual=x)
    backward = BackwardArgs(
        grad=x, input=x, input_shape=[1, 2, 3, 4], weight=x, conv=Conv(), filter_scale=x, norm=norm, p_clean=x,
        is_clean=x, shift=x, u=x, relu_mask=x, slope=x, mean=x, m2=x, n=x, channels_last=True, needs=Needs(),
    )  # fmt: skip
    for suffix, flat in (
        ("", args.flatten(layer, True, False)),
        ("_backward", flattened(backward)),
    ):
        schema = getattr(torch.ops.awnet, name + suffix).default._schema
        declared = [str(a.type).removeprefix("Optional[").removesuffix("]") for a in schema.arguments]
        declared = [t + "]" if t.startswith("List[") else t for t in declared]
        assert [t.replace("SymInt", "int") for t in declared] == expected_types(flat)
        returned = [r.name for r in schema.returns]
        assert returned == list(args.Needs._fields if suffix else args.Saved._fields)


def test_every_tensor_that_can_get_a_gradient_is_listed_in_the_order_of_needs() -> None:
    x = {name: torch.empty(()) for name in Needs._fields}
    norm = MixNorm(x["bn_weight"], x["bn_bias"], torch.empty(()), torch.empty(()))
    names = ("input", "weight", "filter_scale", "p_clean", "shift", "residual")
    layer = LayerArgs(**{name: x[name] for name in names}, norm=norm)
    assert [a is b for a, b in zip(layer.differentiable(), x.values(), strict=True)] == [True] * 8


def test_records_are_frozen() -> None:
    layer = LayerArgs(torch.empty(()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.input = torch.empty(())
    assert not hasattr(layer, "__dict__")

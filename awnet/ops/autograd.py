"""The layer as a registered forward/backward pair of operators, one pair for each backend.

``register(name, passes)`` assembles convolution, passes and algebra into ``torch.ops.awnet.layer_<name>``
and ``layer_<name>_backward``, with fake kernels and autograd. One pair serves all four public functions:
without a weight there is no convolution (``mix_batch_norm``); without a batch norm the affine map is the
filter scale alone (``filter_scaled_conv2d``), or it and ``bn_bias`` as the shift (``affine_conv2d``).
``csrc/layer.cpp`` is the same in C++, ``layer_native``, for the backends whose passes are native.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awnet.ops.backends.eager import Passes, wide_dtype
from awnet.ops.coefficients import BatchStatistics, Gradients, Needs, Propagation
from awnet.ops.distributed import joined_statistics, summed
from awnet.ops.transforms import refuse_tangents

_ARGUMENTS = """Tensor{optional} input, Tensor? weight, Tensor? filter_scale, Tensor? p_clean,
    Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, Tensor? running_mean, Tensor? running_var,
    Tensor? is_clean, bool training, float eps, bool relu, int[2] stride, int[2] padding, int[2] dilation,
    int groups, str process_group"""
_FORWARD = f"""({_ARGUMENTS.format(optional="")}, bool keep_u, bool keep_mask)
    -> (Tensor y, Tensor u, Tensor mask, Tensor mean, Tensor m2, Tensor batch_mean, Tensor batch_var,
    Tensor n)"""
_BACKWARD = f"""(Tensor grad, {_ARGUMENTS.format(optional="?")}, Tensor? u, Tensor? gate, Tensor mean,
    Tensor m2, Tensor batch_mean, Tensor batch_var, Tensor n, SymInt[] input_shape, bool channels_last,
    bool[] needs)
    -> (Tensor input, Tensor weight, Tensor filter_scale, Tensor p_clean, Tensor bn_weight, Tensor bn_bias,
    Tensor residual)"""
Layer = Callable[..., tuple[Tensor, ...]]

_DIFFERENTIABLE = 7  # the first seven arguments; the backward returns their gradients in this order


class Call(NamedTuple):
    """The arguments of one layer call, in the operators' order; ``awnet.ops.checks`` has checked them."""

    input: Tensor | None  # [B, C_in, H, W]; None in a backward that needs only its shape
    weight: Tensor | None  # [C_out, C_in/groups, k, k]
    filter_scale: Tensor | None  # [B, C_out]
    p_clean: Tensor | None  # [B]
    bn_weight: Tensor | None  # [K, C_out]
    bn_bias: Tensor | None  # the same; without a bn_weight the shift itself, [B, C_out]
    residual: Tensor | None  # [B, C_out, H', W']
    running_mean: Tensor | None  # [S, C_out]
    running_var: Tensor | None
    is_clean: Tensor | None  # [B] bool
    training: bool
    eps: float
    relu: bool
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    process_group: str = ""  # whose ranks share the batch statistics; empty: this process alone


class Saved(NamedTuple):
    """What the forward operator returns beside y."""

    u: Tensor  # [B, C_out, H', W']; empty where it is the input itself or the backward will not need it
    mask: Tensor  # of u's shape, bool: where the activation passed; empty where y itself says so
    mean: Tensor  # [B, C_out] of u; this and the rest are empty outside training
    m2: Tensor
    batch_mean: Tensor  # [S, C_out] of ω ⊙ u
    batch_var: Tensor
    n: Tensor  # [S], values per channel


def kept(call: Call) -> tuple[bool, bool]:
    """``keep_u`` and ``keep_mask``: whether the backward of ``call`` will need u, and a mask in place of y.

    Where the weight is trained, so is the next layer's, which keeps y as its input: y costs nothing then.
    Else, in an attack, nobody keeps y, and a mask takes a byte an element.
    """

    def wanted(x: Any) -> bool:
        return isinstance(x, Tensor) and x.requires_grad

    if not torch.is_grad_enabled() or not any(map(wanted, call[:_DIFFERENTIABLE])):
        return False, False
    by_batch = call.training and call.bn_weight is not None
    keep_u = by_batch or any(map(wanted, call[2 : _DIFFERENTIABLE - 1]))
    return keep_u, call.relu and not wanted(call.weight)


class _Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last only where ``x`` is laid out so and not NCHW-contiguous too (one channel or pixel)."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _convolved(call: Call) -> Tensor:
    assert call.input is not None
    layout = memory_format(call.input)
    if call.weight is None:
        return call.input.contiguous(memory_format=layout)
    u = torch.ops.aten.convolution(
        call.input, call.weight, None, call.stride, call.padding, call.dilation, False, [0, 0], call.groups
    )
    return u.contiguous(memory_format=layout)


def _widened(call: Call, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, _Norm | None]:
    """filter_scale, p_clean and the batch norm's tensors in the algebra's dtype."""
    omega = None if call.filter_scale is None else call.filter_scale.to(dtype)
    p_clean = None if call.p_clean is None else call.p_clean.to(dtype)
    if call.bn_weight is None:
        return omega, p_clean, None
    assert call.bn_bias is not None
    assert call.running_mean is not None
    assert call.running_var is not None
    tables = (call.bn_weight, call.bn_bias, call.running_mean, call.running_var)
    return omega, p_clean, _Norm(*(table.to(dtype) for table in tables))


def _where(call: Call) -> tuple[Sequence[int], Sequence[int], Sequence[int], int]:
    return call.stride, call.padding, call.dilation, call.groups


def _forward(passes: Passes, *arguments: Any) -> tuple[Tensor, ...]:
    call, keep_u, keep_mask = Call(*arguments[:-2]), *arguments[-2:]
    refuse_tangents(call)
    assert call.input is not None
    wide = wide_dtype(call.input.dtype)
    keep_u = keep_u and call.weight is not None
    with torch.autocast(call.input.device.type, enabled=False):
        omega, p_clean, norm = _widened(call, wide)
        if norm is not None and call.training:
            y, u, mask, statistics = _train(passes, call, omega, norm, keep_u, keep_mask)
        else:
            y, u, mask = _test(passes, call, omega, p_clean, norm, keep_u, keep_mask)
            statistics = tuple(y.new_empty(0, dtype=wide) for _ in range(5))
    return y, u if keep_u else y.new_empty(0), mask, *statistics


def _train(
    passes: Passes, call: Call, omega: Tensor | None, norm: _Norm, keep_u: bool, keep_mask: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    assert call.input is not None
    fused = None
    if call.weight is not None:
        fused = passes.fused_statistics(call.input, call.weight, *_where(call))
    if fused is None:
        u = _convolved(call)
        mean, m2 = passes.statistics(u)
    else:
        u, mean, m2 = fused
    rows, hw = len(norm.mean), u.shape[2] * u.shape[3]
    batch = passes.batch_statistics(mean, m2, hw, omega, call.is_clean, rows)
    if call.process_group:
        batch = joined_statistics(batch, call.process_group)
    scale, shift = passes.training_coefficients(
        omega, norm.weight, norm.bias, batch, call.is_clean, call.eps, len(u)
    )
    in_place = call.weight is not None and not keep_u
    y, mask = passes.apply(u, scale, shift, call.residual, call.relu, keep_mask, in_place)
    return y, u, mask, (mean, m2, *batch)


def _test(
    passes: Passes,
    call: Call,
    omega: Tensor | None,
    p_clean: Tensor | None,
    norm: _Norm | None,
    keep_u: bool,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    assert call.input is not None
    if norm is not None:
        scale, shift = passes.testing_coefficients(omega, *norm, p_clean, call.eps, len(call.input))
    else:
        scale = _ones(call) if omega is None else omega
        shift = torch.zeros_like(scale) if call.bn_bias is None else call.bn_bias.to(scale.dtype)
    epilogue = (scale, shift, call.residual, call.relu)
    fused = None
    if call.weight is not None:
        fused = passes.fused_apply(call.input, call.weight, *epilogue, *_where(call), keep_u, keep_mask)
    if fused is not None:
        return fused
    u = _convolved(call)
    y, mask = passes.apply(u, *epilogue, keep_mask, call.weight is not None and not keep_u)
    return y, u, mask


def _ones(call: Call) -> Tensor:
    """ω ≡ 1, [B, C_out]."""
    like = call.input
    assert like is not None
    channels = like.shape[1] if call.weight is None else call.weight.shape[0]
    return like.new_ones((len(like), channels), dtype=wide_dtype(like.dtype))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call, keep_u, keep_mask = Call(*arguments[:-2]), *arguments[-2:]
    assert call.input is not None
    u = _convolved(call)
    wide = wide_dtype(call.input.dtype)
    sizes: list[list[Any]] = [[0]] * 5
    if call.training and call.running_mean is not None:
        per_sample, per_branch = [u.shape[0], u.shape[1]], [call.running_mean.shape[0], u.shape[1]]
        sizes = [per_sample, per_sample, per_branch, per_branch, per_branch[:1]]
    own_u = torch.empty_like(u) if keep_u and call.weight is not None else u.new_empty(0)
    mask = torch.empty_like(u, dtype=torch.bool) if keep_mask else u.new_empty(0, dtype=torch.bool)
    return torch.empty_like(u), own_u, mask, *(u.new_empty(size, dtype=wide) for size in sizes)


def _convolution_gradients(
    call: Call, d_u: Tensor, input_shape: Sequence[int], need_input: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    assert call.weight is not None
    source = call.input
    if source is None:
        # only its shape matters, and the library would copy one that is not dense
        source = torch.empty(
            input_shape, dtype=d_u.dtype, device=d_u.device, memory_format=memory_format(d_u)
        )
    wanted = [need_input, need_weight, False]
    stride, padding, dilation, groups = _where(call)
    convolution = (stride, padding, dilation, False, [0, 0], groups)
    found = torch.ops.aten.convolution_backward(d_u, source, call.weight, None, *convolution, wanted)
    return found[0], found[1]


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


_FIELDS = len(Call._fields)


def _backward(passes: Passes, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    refuse_tangents((grad, *arguments))
    call = Call(*arguments[:_FIELDS])
    u, gate, mean, m2, *batch, input_shape, channels_last, needs = arguments[_FIELDS:]
    need_input, need_weight, *need_tables, need_residual = needs
    asked = Needs(*need_tables)
    wide = wide_dtype(grad.dtype)
    with torch.autocast(grad.device.type, enabled=False):
        grad = grad.contiguous(memory_format=_layout(channels_last))
        omega, p_clean, norm = _widened(call, wide)
        by_batch = norm is not None and call.training
        need_images = need_input or need_weight or need_residual
        centre = None
        found = Gradients(None, None, None, None)
        how: Propagation | None = None
        if any(asked) or (by_batch and need_images):
            # any centre is exact; one near the channel's mean keeps the digits, as a pixel of u does
            centre = mean if by_batch else u[:, :, 0, 0].to(wide)
            g1, gc = passes.reduce(grad, u, centre, gate)
            if norm is None:
                found = Gradients(torch.addcmul(gc, centre, g1), None, None, g1)
            elif by_batch:
                statistics = BatchStatistics(*batch)
                sums = None
                if call.process_group:
                    arguments = (g1, gc, mean, omega, norm.weight, statistics, call.is_clean, call.eps)
                    sums = passes.training_sums(*arguments)
                    sums = sums._replace(through=summed(sums.through, call.process_group))
                hw, need_scale = grad.shape[2] * grad.shape[3], asked.filter_scale
                rest = (norm.weight, statistics, call.is_clean, call.eps, need_scale, sums)
                found, how = passes.training_gradients(g1, gc, mean, m2, hw, omega, *rest)
            else:
                found = passes.testing_gradients(g1, gc, centre, omega, *norm, p_clean, call.eps, asked)
        d_input = d_weight = d_residual = None
        if need_images:
            if how is None:
                if norm is not None:
                    scale = passes.testing_coefficients(omega, *norm, p_clean, call.eps, len(grad))[0]
                else:
                    scale = grad.new_ones(grad.shape[:2], dtype=wide) if omega is None else omega
                how = Propagation(scale, None, None)
            d_input, d_residual = passes.propagate(grad, u, centre, gate, how, need_residual)
        if call.weight is not None and (need_input or need_weight):
            assert d_input is not None
            d_u, fused = d_input, None
            if need_input:
                fused = passes.fused_dgrad(d_u, call.weight, input_shape, *_where(call))
            if need_weight or fused is None:
                d_input, d_weight = _convolution_gradients(
                    call, d_u, input_shape, need_input and fused is None, need_weight
                )
            d_input = d_input if fused is None else fused
    wanted = (d_input, d_weight, *found, d_residual)
    like = (grad, grad, call.filter_scale, call.p_clean, call.bn_weight, call.bn_bias, grad)
    return tuple(
        value.to(of.dtype) if need and value is not None and of is not None else grad.new_empty(0)
        for need, value, of in zip(needs, wanted, like, strict=True)
    )


def _backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments[:_FIELDS])
    input_shape, channels_last, needs = arguments[-3:]
    d_input = d_u = torch.empty_like(grad, memory_format=_layout(channels_last))
    if call.weight is not None:
        d_input = _convolution_gradients(call, d_u, input_shape, True, False)[0]
    like: tuple[Any, ...] = (d_input, *call[1 : _DIFFERENTIABLE - 1], d_u)
    return tuple(
        torch.empty_like(of) if need and of is not None else grad.new_empty(0)
        for need, of in zip(needs, like, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, keep_u, keep_mask = Call(*inputs[:-2]), *inputs[-2:]
    assert call.input is not None
    y, saved = output[0], Saved(*output[1:])
    # without a weight the input is u itself; with one, its values serve the weight's gradient only
    keep_input = keep_u if call.weight is None else ctx.needs_input_grad[1]
    ctx.input_shape = call.input.shape
    ctx.channels_last = memory_format(y) == torch.channels_last
    ctx.options = call[10:]
    ctx.set_materialize_grads(False)
    gate = saved.mask if keep_mask else y
    ctx.save_for_backward(
        call.input if keep_input else None,
        *call[1 : _DIFFERENTIABLE - 1],
        # training normalises by the batch, and is about to change the running statistics in place
        *((saved.batch_mean, saved.batch_var) if call.training else call[_DIFFERENTIABLE:9]),
        call.is_clean,
        gate if call.relu else None,
        saved.u if keep_u and call.weight is not None else None,
        *saved[2:],
    )


def _autograd(operator: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    undifferentiable: tuple[Any, ...] = (None,) * (_FIELDS + 2 - _DIFFERENTIABLE)
    if grads[0] is None:
        return (None,) * _DIFFERENTIABLE + undifferentiable
    *tensors, gate, u, mean, m2, batch_mean, batch_var, n = ctx.saved_tensors
    residual = None  # its gradient needs no values
    arguments = [*tensors[: _DIFFERENTIABLE - 1], residual, *tensors[_DIFFERENTIABLE - 1 :], *ctx.options]
    call = Call(*arguments)
    if call.weight is None:
        u = call.input
        call = call._replace(input=None)
    needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    statistics = (mean, m2, batch_mean, batch_var, n)
    where = (list(ctx.input_shape), ctx.channels_last, needs)
    found = operator(grads[0], *call, u, gate, *statistics, *where)
    return tuple(value if need else None for need, value in zip(needs, found, strict=True)) + undifferentiable


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "this layer has a first derivative only; for a second one call it with backend='reference' "
        "(or inside `with awnet.use_backend('reference')`), which plain autograd differentiates"
    )


def register(name: str, passes: Passes) -> Layer:
    """Registers the pair for a backend whose passes are Python functions; returns the forward operator."""
    forward, backward = f"awnet::layer_{name}", f"awnet::layer_{name}_backward"
    torch.library.define(forward, " ".join(_FORWARD.split()))
    torch.library.define(backward, " ".join(_BACKWARD.split()))
    torch.library.impl(forward, "CompositeExplicitAutograd", partial(_forward, passes))
    torch.library.impl(backward, "CompositeExplicitAutograd", partial(_backward, passes))
    operator = describe(name)
    torch.library.register_autograd(
        forward,
        partial(_autograd, getattr(torch.ops.awnet, f"layer_{name}_backward")),
        setup_context=_setup_context,
    )
    return operator


def describe(name: str) -> Layer:
    """Gives a defined pair what tracing needs, and its backward a refusal; returns the forward operator."""
    forward, backward = f"awnet::layer_{name}", f"awnet::layer_{name}_backward"
    torch.library.register_fake(forward, _forward_fake)
    torch.library.register_fake(backward, _backward_fake)
    torch.library.register_autograd(
        backward, _no_second_derivative, setup_context=lambda ctx, inputs, output: None
    )
    operator: Layer = getattr(torch.ops.awnet, f"layer_{name}").default
    return operator

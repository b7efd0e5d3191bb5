"""The layer as a registered forward/backward pair of operators, one pair for each backend.

``register(name, passes)`` assembles convolution, passes and algebra into ``torch.ops.awnet.layer_<name>``
and ``layer_<name>_backward``, with fake kernels and autograd. One pair serves all three public functions:
without a weight there is no convolution (``mix_batch_norm``); without a batch norm the affine map is the
filter scale alone (``filter_scaled_conv2d``). ``csrc/layer.cpp`` is the same in C++, ``layer_native``, for
the backends whose passes are native.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awnet.ops.algebra import BatchStatistics, Gradients, Propagation
from awnet.ops.passes import Passes, wide_dtype

_ARGUMENTS = """Tensor{optional} input, Tensor? weight, Tensor? filter_scale, Tensor? p_clean,
    Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, Tensor? running_mean, Tensor? running_var,
    Tensor? is_clean, bool training, float eps, bool relu, int[2] stride, int[2] padding, int[2] dilation,
    int groups"""
_FORWARD = f"""({_ARGUMENTS.format(optional="")}, bool save)
    -> (Tensor y, Tensor u, Tensor mean, Tensor m2, Tensor batch_mean, Tensor batch_var, Tensor n)"""
_BACKWARD = f"""(Tensor grad, {_ARGUMENTS.format(optional="?")}, Tensor u, Tensor? y, Tensor mean, Tensor m2,
    Tensor batch_mean, Tensor batch_var, Tensor n, SymInt[] input_shape, bool[] needs)
    -> (Tensor input, Tensor weight, Tensor filter_scale, Tensor p_clean, Tensor bn_weight, Tensor bn_bias,
    Tensor residual)"""
Layer = Callable[..., tuple[Tensor, ...]]

_DIFFERENTIABLE = 7  # the first seven arguments; the backward returns their gradients in this order


class Call(NamedTuple):
    """The arguments of one layer call, in the operators' order; ``awnet.ops.functional`` has checked them."""

    input: Tensor | None  # [B, C_in, H, W]; None in a backward that needs only its shape
    weight: Tensor | None  # [C_out, C_in/groups, k, k]
    filter_scale: Tensor | None  # [B, C_out]
    p_clean: Tensor | None  # [B]
    bn_weight: Tensor | None  # [K, C_out]
    bn_bias: Tensor | None
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


class Saved(NamedTuple):
    """What the forward operator returns beside y."""

    u: Tensor  # [B, C_out, H', W']; empty where it is the input itself or no gradient will be asked for
    mean: Tensor  # [B, C_out] of u; this and the rest are empty outside training
    m2: Tensor
    batch_mean: Tensor  # [S, C_out] of ω ⊙ u
    batch_var: Tensor
    n: Tensor  # [S], values per channel


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
    call, save = Call(*arguments[:-1]), arguments[-1]
    assert call.input is not None
    wide = wide_dtype(call.input.dtype)
    with torch.autocast(call.input.device.type, enabled=False):
        omega, p_clean, norm = _widened(call, wide)
        if norm is not None and call.training:
            y, u, statistics = _train(passes, call, omega, norm)
        else:
            y, u = _test(passes, call, omega, p_clean, norm, save)
            statistics = tuple(y.new_empty(0, dtype=wide) for _ in range(5))
    kept = u if save and call.weight is not None else y.new_empty(0)
    return y, kept, *statistics


def _train(
    passes: Passes, call: Call, omega: Tensor | None, norm: _Norm
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
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
    scale, shift = passes.training_coefficients(
        omega, norm.weight, norm.bias, batch, call.is_clean, call.eps, len(u)
    )
    return passes.apply(u, scale, shift, call.residual, call.relu), u, (mean, m2, *batch)


def _test(
    passes: Passes, call: Call, omega: Tensor | None, p_clean: Tensor | None, norm: _Norm | None, save: bool
) -> tuple[Tensor, Tensor]:
    assert call.input is not None
    if norm is not None:
        scale, shift = passes.testing_coefficients(omega, *norm, p_clean, call.eps, len(call.input))
    else:
        scale = _ones(call) if omega is None else omega
        shift = torch.zeros_like(scale)
    epilogue = (scale, shift, call.residual, call.relu)
    fused = None
    if call.weight is not None:
        fused = passes.fused_apply(call.input, call.weight, *epilogue, *_where(call), save)
    if fused is not None:
        return fused
    u = _convolved(call)
    return passes.apply(u, *epilogue), u


def _ones(call: Call) -> Tensor:
    """ω ≡ 1, [B, C_out]."""
    like = call.input
    assert like is not None
    channels = like.shape[1] if call.weight is None else call.weight.shape[0]
    return like.new_ones((len(like), channels), dtype=wide_dtype(like.dtype))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call, save = Call(*arguments[:-1]), arguments[-1]
    assert call.input is not None
    u = _convolved(call)
    wide = wide_dtype(call.input.dtype)
    sizes: list[list[Any]] = [[0]] * 5
    if call.training and call.running_mean is not None:
        per_sample, per_branch = [u.shape[0], u.shape[1]], [call.running_mean.shape[0], u.shape[1]]
        sizes = [per_sample, per_sample, per_branch, per_branch, per_branch[:1]]
    kept = torch.empty_like(u) if save and call.weight is not None else u.new_empty(0)
    return torch.empty_like(u), kept, *(u.new_empty(size, dtype=wide) for size in sizes)


def _placeholder(u: Tensor, shape: Sequence[int]) -> Tensor:
    """Stands for an input of which only the shape matters. The library would copy one that is not dense."""
    return torch.empty(shape, dtype=u.dtype, device=u.device, memory_format=memory_format(u))


def _backward(passes: Passes, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments[:17])
    u, y = arguments[17:19]
    mean, m2, *batch = arguments[19:24]
    input_shape, needs = arguments[24:]
    need_input, need_weight, need_scale, need_p, need_gamma, need_beta, need_residual = needs
    wide = wide_dtype(u.dtype)
    with torch.autocast(u.device.type, enabled=False):
        grad = grad.contiguous(memory_format=memory_format(u))
        omega, p_clean, norm = _widened(call, wide)
        by_batch = norm is not None and call.training
        # any centre is exact; one near the channel's mean keeps the digits, and a pixel of u is such a one
        centre = mean if by_batch else u[:, :, 0, 0].to(wide)
        found = Gradients(None, None, None, None)
        how: Propagation | None = None
        need_images = need_input or need_weight or need_residual
        if need_scale or need_p or need_gamma or need_beta or (by_batch and need_images):
            g1, gc = passes.reduce(grad, u, centre, y)
            if norm is None:
                found = Gradients(gc + centre * g1, None, None, None)
            elif call.training:
                hw = u.shape[2] * u.shape[3]
                found, how = passes.training_gradients(
                    g1, gc, mean, m2, hw, omega, norm.weight, BatchStatistics(*batch), call.is_clean, call.eps
                )
            else:
                found = passes.testing_gradients(g1, gc, centre, omega, *norm, p_clean, call.eps)
        d_input = d_weight = d_residual = None
        if need_images:
            if how is None:
                if norm is not None:
                    scale = passes.testing_coefficients(omega, *norm, p_clean, call.eps, len(u))[0]
                else:
                    scale = u.new_ones(u.shape[:2], dtype=wide) if omega is None else omega
                how = Propagation(scale, None, None)
            d_input, d_residual = passes.propagate(grad, u, centre, y, how, need_residual)
        fused = None
        if call.weight is not None and need_input:
            assert d_input is not None
            fused = passes.fused_dgrad(d_input, call.weight, input_shape, *_where(call))
        if call.weight is not None and (need_weight or (need_input and fused is None)):
            source = _placeholder(u, input_shape) if call.input is None else call.input
            d_input, d_weight, _ = torch.ops.aten.convolution_backward(
                d_input,
                source,
                call.weight,
                None,
                call.stride,
                call.padding,
                call.dilation,
                False,
                [0, 0],
                call.groups,
                [need_input and fused is None, need_weight, False],
            )
        if fused is not None:
            d_input = fused
    wanted = (d_input, d_weight, *found, d_residual)
    like = (u, u, call.filter_scale, call.p_clean, call.bn_weight, call.bn_bias, u)
    return tuple(
        value.to(of.dtype) if need and value is not None and of is not None else u.new_empty(0)
        for need, value, of in zip(needs, wanted, like, strict=True)
    )


def _backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call, u = Call(*arguments[:17]), arguments[17]
    input_shape, needs = arguments[24:]
    d_input = u.new_empty(input_shape)
    if call.weight is not None:
        source = _placeholder(u, input_shape) if call.input is None else call.input
        d_input = torch.ops.aten.convolution_backward(
            u,
            source,
            call.weight,
            None,
            call.stride,
            call.padding,
            call.dilation,
            False,
            [0, 0],
            call.groups,
            [True, False, False],
        )[0]
    like = (d_input, *call[1 : _DIFFERENTIABLE - 1], u)
    return tuple(
        torch.empty_like(of) if need and of is not None else u.new_empty(0)
        for need, of in zip(needs, like, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = Call(*inputs[:-1])
    assert call.input is not None
    y, saved = output[0], Saved(*output[1:])
    # without a weight the input is u itself; with one, its values serve the weight's gradient only
    keep_input = call.weight is None or ctx.needs_input_grad[1]
    ctx.input_shape = call.input.shape
    ctx.options = call[10:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        call.input if keep_input else None,
        *call[1 : _DIFFERENTIABLE - 1],
        # training normalises by the batch, and is about to change the running statistics in place
        *(saved[3:5] if call.training else call[_DIFFERENTIABLE:9]),
        call.is_clean,
        y if call.relu else None,
        *saved,
    )


def _autograd(operator: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    undifferentiable: tuple[Any, ...] = (None,) * (len(Call._fields) + 1 - _DIFFERENTIABLE)
    if grads[0] is None:
        return (None,) * _DIFFERENTIABLE + undifferentiable
    *tensors, y, u, mean, m2, batch_mean, batch_var, n = ctx.saved_tensors
    residual = None  # its gradient needs no values
    arguments = [*tensors[: _DIFFERENTIABLE - 1], residual, *tensors[_DIFFERENTIABLE - 1 :], *ctx.options]
    call = Call(*arguments)
    if call.weight is None:
        u = call.input
        call = call._replace(input=None)
    needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    found = operator(grads[0], *call, u, y, mean, m2, batch_mean, batch_var, n, list(ctx.input_shape), needs)
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

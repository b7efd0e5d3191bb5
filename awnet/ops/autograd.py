"""The layer as a registered forward/backward pair of operators, one pair for each backend.

:func:`register` assembles convolution, passes and coefficients into ``torch.ops.awnet.layer_<name>`` and
``layer_<name>_backward``, with fake kernels and autograd. ``csrc/layer.cpp`` is the same in C++,
``layer_native``, for the backends whose passes are native.

The operators are for graphs (torch.compile, torch.export), tensor subclasses and dispatch modes. In eager
mode :class:`PassesBackend` calls the same functions through a ``torch.autograd.Function``, without an
operator, which takes the host less time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from awnet.ops import running_statistics
from awnet.ops.args import (
    BACKWARD_SCHEMA,
    FORWARD_SCHEMA,
    RELU,
    BackwardArgs,
    Conv,
    EvalBackwardArgs,
    LayerArgs,
    MixNorm,
    Needs,
    Saved,
    backward_arguments,
    flatten,
    layer_options,
    unflatten,
    unflatten_backward,
)
from awnet.ops.backends.base import Backend, Passes, memory_format, wide_dtype
from awnet.ops.coefficients import Gradients, Mix, Norm, Propagation, Reduced, SampleStats
from awnet.ops.distributed import joined_statistics, summed
from awnet.ops.transforms import refuse_tangents

Layer = Callable[..., tuple[Tensor, ...]]


class OperatorBackend(Backend):
    """A backend whose layer is an operator of this module."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def run(self, args: LayerArgs) -> Tensor:
        saved = Saved(*self._layer(*flatten(args, *keep_flags(args))))
        if args.uses_batch_statistics:
            _update_statistics(args, saved)
        return saved.y


class PassesBackend(OperatorBackend):
    """A backend whose layer is made of Python functions.

    Args:
        name: of the operators that are registered.
        passes: the functions.
    """

    def __init__(self, name: str, passes: Passes) -> None:
        super().__init__(register(name, passes))
        self._passes = passes
        self._backward: Layer = getattr(torch.ops.awnet, f"layer_{name}_backward").default

    def run(self, args: LayerArgs) -> Tensor:
        if _needs_operator(args):
            return super().run(args)
        outcome: list[Saved] = []
        call = (self._passes, self._backward, args, *keep_flags(args), outcome)
        if torch.is_grad_enabled():
            y: Tensor = _Layer.apply(call, *args.differentiable())
        else:
            y = _Layer.forward(None, call)
        if args.uses_batch_statistics:
            _update_statistics(args, outcome[0])
        return y


def _needs_operator(args: LayerArgs) -> bool:
    """Whether something other than autograd has to see the call: a graph, a mode, a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
        or args.input.is_meta
        or any(type(x) not in _PLAIN for x in (*args.tensors(), args.is_clean))
    )


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def _update_statistics(args: LayerArgs, saved: Saved) -> None:
    norm = args.norm
    assert norm is not None
    if norm.process_group and saved.y.shape[2] * saved.y.shape[3] == 1:
        _check_more_than_one_value(saved.n)
    running_statistics.update(norm, saved)


def _check_more_than_one_value(n: Tensor) -> None:
    # over ranks the counts are known afterwards only; all ranks see the same ones and raise alike
    if torch.compiler.is_compiling() or n.is_meta or (n.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if bool((n == 1).any()):
        raise ValueError(
            "expected more than 1 value per channel when training, got one in a branch over all ranks"
        )


def keep_flags(args: LayerArgs) -> tuple[bool, bool]:
    """``keep_u`` and ``keep_mask``: whether the backward of ``args`` will need u, and a mask instead of y.

    Of a ReLU: where the weight is trained, so is the next layer's, which keeps y as its input, and y takes no
    extra memory. Otherwise, in an attack, nothing else keeps y, and a mask takes one byte per element. The
    other activations keep their slope act'(z) in both cases, an image of y's dtype.
    """
    if not torch.is_grad_enabled():
        return False, False
    needs = Needs(*[x is not None and x.requires_grad for x in args.differentiable()])
    if not any(needs):
        return False, False
    keep_mask = args.code > RELU or (args.code == RELU and not needs.weight)
    return args.uses_batch_statistics or needs.coefficients, keep_mask


def convolved(args: LayerArgs) -> Tensor:
    """u = conv(input, weight), or the input without a weight, in the input's memory format."""
    layout = memory_format(args.input)
    if args.weight is None:
        return args.input.contiguous(memory_format=layout)
    conv = args.conv
    u = torch.convolution(
        args.input, args.weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups
    )
    return u.contiguous(memory_format=layout)


def _to(x: Any, dtype: torch.dtype) -> Any:
    return x if x is None or x.dtype == dtype else x.to(dtype)


def _norm(norm: MixNorm | None, dtype: torch.dtype) -> Norm | None:
    if norm is None:
        return None
    weight, bias = _to(norm.weight, dtype), _to(norm.bias, dtype)
    return Norm(weight, bias, _to(norm.mean, dtype), _to(norm.var, dtype), norm.eps)


def _mix(args: LayerArgs | BackwardArgs, dtype: torch.dtype) -> Mix:
    return Mix(_to(args.filter_scale, dtype), _to(args.p_clean, dtype), args.is_clean)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _outputs(
    passes: Passes, args: LayerArgs, keep_u: bool, keep_mask: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor | None]:
    """y, u, mask; in train mode the statistics of :class:`Saved`, in eval mode the scale [B, C].

    Without ``keep_u`` the memory of u may be that of y.
    """
    wide = wide_dtype(args.input.dtype)
    keep_u = keep_u and args.weight is not None
    with _without_autocast(args.input):
        if args.uses_batch_statistics:
            return *_train(passes, args, wide, keep_u, keep_mask), None
        y, u, mask, scale = _eval(passes, args, wide, keep_u, keep_mask)
        return y, u, mask, (), scale


def _forward(passes: Passes, *flat: Any) -> tuple[Tensor, ...]:
    refuse_tangents(flat)
    args, keep_u, keep_mask = unflatten(flat)
    y, u, mask, statistics, _ = _outputs(passes, args, keep_u, keep_mask)
    if not statistics:
        statistics = tuple(y.new_empty(0, dtype=wide_dtype(y.dtype)) for _ in range(5))
    return y, u if keep_u and args.weight is not None else y.new_empty(0), mask, *statistics


def _train(
    passes: Passes, args: LayerArgs, wide: torch.dtype, keep_u: bool, keep_mask: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    norm, mix = _norm(args.norm, wide), _mix(args, wide)
    assert args.norm is not None
    assert norm is not None
    fused = None if args.weight is None else passes.fused_statistics(args)
    if fused is None:
        u = convolved(args)
        mean, m2 = passes.statistics(u)
    else:
        u, mean, m2 = fused
    stats = SampleStats(mean, m2, u.shape[2] * u.shape[3])
    batch = passes.batch_statistics(stats, mix, norm.mean.shape[0])
    if args.norm.process_group:
        batch = joined_statistics(batch, args.norm.process_group)
    norm = norm._replace(mean=batch.mean, var=batch.var)
    scale, shift = passes.train_coefficients(norm, mix, u.shape[0])
    in_place = args.weight is not None and not keep_u
    y, mask = passes.apply(u, scale, shift, args.residual, args.code, keep_mask, in_place)
    return y, u, mask, (mean, m2, *batch)


def _eval(
    passes: Passes, args: LayerArgs, wide: torch.dtype, keep_u: bool, keep_mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm, mix = _norm(args.norm, wide), _mix(args, wide)
    if norm is not None:
        scale, shift = passes.eval_coefficients(norm, mix, args.input.shape[0])
    else:
        scale = _ones(args, wide) if mix.filter_scale is None else mix.filter_scale
        shift = torch.zeros_like(scale) if args.shift is None else args.shift.to(wide)
    fused = None if args.weight is None else passes.fused_apply(args, scale, shift, keep_u, keep_mask)
    if fused is not None:
        return *fused, scale
    u = convolved(args)
    in_place = args.weight is not None and not keep_u
    y, mask = passes.apply(u, scale, shift, args.residual, args.code, keep_mask, in_place)
    return y, u, mask, scale


def _ones(args: LayerArgs, wide: torch.dtype) -> Tensor:
    """ω ≡ 1, [B, C_out]."""
    x = args.input
    channels = x.shape[1] if args.weight is None else args.weight.shape[0]
    return x.new_ones((len(x), channels), dtype=wide)


def _forward_fake(*flat: Any) -> tuple[Tensor, ...]:
    args, keep_u, keep_mask = unflatten(flat)
    u = convolved(args)
    wide = wide_dtype(args.input.dtype)
    sizes: list[list[Any]] = [[0]] * 5
    if args.norm is not None and args.norm.training:
        per_sample, per_branch = [u.shape[0], u.shape[1]], [args.norm.mean.shape[0], u.shape[1]]
        sizes = [per_sample, per_sample, per_branch, per_branch, per_branch[:1]]
    saved_u = torch.empty_like(u) if keep_u and args.weight is not None else u.new_empty(0)
    mask = u.new_empty(0, dtype=torch.bool)
    if keep_mask:
        mask = torch.empty_like(u, dtype=torch.bool if args.code == RELU else u.dtype)
    return torch.empty_like(u), saved_u, mask, *(u.new_empty(size, dtype=wide) for size in sizes)


def _convolution_gradients(
    d_u: Tensor,
    source: Tensor | None,
    input_shape: Sequence[int],
    weight: Tensor,
    conv: Conv,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    if source is None:
        # only its shape matters, and the library would copy one that is not dense
        source = torch.empty(
            input_shape, dtype=d_u.dtype, device=d_u.device, memory_format=memory_format(d_u)
        )
    grads = torch.ops.aten.convolution_backward.default(
        d_u, source, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups,
        [need_input, need_weight, False],
    )  # fmt: skip
    d_input, d_weight = grads[:2]
    # the fake kernel promises the weight's strides; the library may return the input's layout
    if need_weight and d_weight.stride() != weight.stride():
        d_weight = torch.empty_like(weight).copy_(d_weight)
    return d_input, d_weight


def input_gradient(
    passes: Passes, d_u: Tensor, weight: Tensor, conv: Conv, input_shape: Sequence[int]
) -> Tensor:
    """The gradient of a convolution's input from ``d_u``, that of its output."""
    fused = passes.fused_dgrad(d_u, weight, conv, input_shape)
    if fused is not None:
        return fused
    return _convolution_gradients(d_u, None, input_shape, weight, conv, True, False)[0]


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _backward(passes: Passes, *flat: Any) -> tuple[Tensor, ...]:
    refuse_tangents(flat)
    args = unflatten_backward(flat)
    grads = _converted_gradients(passes, args)
    return tuple(args.grad.new_empty(0) if value is None else value for value in grads)


def _converted_gradients(passes: Passes, args: BackwardArgs) -> list[Tensor | None]:
    """The gradients in the order of :class:`Needs`, in the dtypes of their arguments; None if not needed."""
    with _without_autocast(args.grad):
        grads = _gradients(passes, args)
    norm = args.norm
    bn_weight, bn_bias = (None, None) if norm is None else (norm.weight, norm.bias)
    grad = args.grad
    like = (grad, grad, args.filter_scale, args.p_clean, bn_weight, bn_bias, args.shift, grad)
    return [
        _to(value, of.dtype) if need and of is not None else None
        for need, value, of in zip(args.needs, grads, like, strict=True)
    ]


def _gradients(passes: Passes, args: BackwardArgs) -> tuple[Tensor | None, ...]:
    """The gradients in the order of :class:`Needs`, each in the dtype in which it was computed."""
    needs, u, relu_mask, slope = args.needs, args.u, args.relu_mask, args.slope
    grad = args.grad.contiguous(memory_format=_layout(args.channels_last))
    wide = wide_dtype(grad.dtype)
    norm, mix = _norm(args.norm, wide), _mix(args, wide)
    d_shift = None
    grads = Gradients()
    d_input = d_weight = d_residual = None
    if args.norm is not None and args.norm.training:
        if needs.coefficients or needs.images:
            assert u is not None
            sums = Reduced(*passes.reduce(grad, u, args.mean, relu_mask, slope), args.mean)
            assert norm is not None
            grads, propagation = _train_gradients(passes, args, sums, norm, mix)
            if needs.images:
                d_input, d_residual = passes.propagate(
                    grad, u, args.mean, relu_mask, propagation, needs.residual, slope
                )
    else:
        d_input, d_residual, reduced = _eval_passes(passes, args, grad, norm, mix)
        if reduced is not None and norm is None:
            grads, d_shift = Gradients(reduced.gc), reduced.g1
        elif reduced is not None:
            assert norm is not None
            grads = passes.eval_gradients(reduced, norm, mix, needs)
    if args.weight is not None and (needs.input or needs.weight):
        assert d_input is not None
        d_u = d_input
        fused = passes.fused_dgrad(d_u, args.weight, args.conv, args.input_shape) if needs.input else None
        if needs.weight or fused is None:
            need_input = needs.input and fused is None
            d_input, d_weight = _convolution_gradients(
                d_u, args.input, args.input_shape, args.weight, args.conv, need_input, needs.weight
            )
        d_input = d_input if fused is None else fused
    return d_input, d_weight, *grads, d_shift, d_residual


def _eval_passes(
    passes: Passes, args: BackwardArgs, grad: Tensor, norm: Norm | None, mix: Mix
) -> tuple[Tensor | None, Tensor | None, Reduced | None]:
    """∂u, ∂residual and the sums of a backward in eval mode, each None where it is not required.

    Without a norm the sums are the gradients of the shift and the scale.
    """
    needs, u, relu_mask, slope = args.needs, args.u, args.relu_mask, args.slope
    wide = wide_dtype(grad.dtype)
    centered = norm is not None
    if not needs.images:
        if not needs.coefficients:
            return None, None, None
        assert u is not None
        center = u[:, :, 0, 0].to(wide).contiguous()  # once, for both kernels that read it
        g1, gc = passes.reduce(grad, u, center, relu_mask, slope)
        return None, None, Reduced(g1, gc, center) if centered else Reduced(g1, gc.addcmul(center, g1), None)
    if args.scale is not None:
        scale = args.scale
    elif norm is not None:
        scale = passes.eval_coefficients(norm, mix, grad.shape[0])[0]
    elif mix.filter_scale is not None:
        scale = mix.filter_scale
    else:
        scale = grad.new_ones(grad.shape[:2], dtype=wide)
    if not needs.coefficients:
        propagation = Propagation(scale)
        d_u, d_residual = passes.propagate(grad, None, None, relu_mask, propagation, needs.residual, slope)
        return d_u, d_residual, None
    return passes.eval_backward(
        EvalBackwardArgs(
            grad,
            scale,
            u=u,
            relu_mask=relu_mask,
            residual=needs.residual,
            sums=True,
            centered=centered,
            slope=slope,
        )
    )


def _train_gradients(
    passes: Passes, args: BackwardArgs, sums: Reduced, norm: Norm, mix: Mix
) -> tuple[Gradients, Propagation]:
    assert args.norm is not None
    totals = None
    if args.norm.process_group:
        totals = passes.train_sums(sums, norm, mix)
        totals = totals._replace(through=summed(totals.through, args.norm.process_group))
    stats = SampleStats(args.mean, args.m2, args.grad.shape[2] * args.grad.shape[3])
    return passes.train_gradients(sums, stats, norm, args.n, mix, args.needs.filter_scale, totals)


def _backward_fake(*flat: Any) -> tuple[Tensor, ...]:
    args = unflatten_backward(flat)
    grad, norm = args.grad, args.norm
    d_input = d_u = torch.empty_like(grad, memory_format=_layout(args.channels_last))
    if args.weight is not None:
        shape, weight = args.input_shape, args.weight
        d_input = _convolution_gradients(d_u, args.input, shape, weight, args.conv, True, False)[0]
    bn_weight, bn_bias = (None, None) if norm is None else (norm.weight, norm.bias)
    like = (d_input, args.weight, args.filter_scale, args.p_clean, bn_weight, bn_bias, args.shift, d_u)
    return tuple(
        torch.empty_like(of) if need and of is not None else grad.new_empty(0)
        for need, of in zip(args.needs, like, strict=True)
    )


_DIFFERENTIABLE = len(Needs._fields)  # the first arguments of the forward operator


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args, keep_u, keep_mask = unflatten(inputs)
    need_weight = ctx.needs_input_grad[1]
    _save(ctx, args, keep_u, keep_mask, Saved(*output), need_weight)


def _save(
    ctx: Any,
    args: LayerArgs,
    keep_u: bool,
    keep_mask: bool,
    saved: Saved,
    need_weight: bool,
    scale: Tensor | None = None,
) -> None:
    """Saves in ``ctx`` what :func:`backward_arguments` takes, and ``scale`` where it is given."""
    norm = args.norm
    ctx.input_shape, ctx.options = args.input.shape, layer_options(args)
    ctx.channels_last = memory_format(saved.y) == torch.channels_last
    ctx.set_materialize_grads(False)
    relu_mask = slope = None
    if args.code > RELU:
        slope = saved.mask
    elif args.code == RELU:
        relu_mask = saved.mask if keep_mask else saved.y
    mean = var = None
    if norm is not None:
        # the running statistics are about to be updated in place
        mean, var = (saved.batch_mean, saved.batch_var) if norm.training else (norm.mean, norm.var)
    u = None
    if keep_u:
        u = args.input if args.weight is None else saved.u
    input = args.input if args.weight is not None and need_weight else None
    weight_to_shift = args.differentiable()[1:7]
    statistics = (saved.mean, saved.m2, saved.n)
    layer = (input, *weight_to_shift, mean, var, args.is_clean, u, relu_mask, slope, *statistics)
    ctx.save_for_backward(*layer, scale)


def _autograd(operator: Any, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    gradients: list[Any] = [None] * len(ctx.needs_input_grad)
    if grads[0] is None:
        return tuple(gradients)
    needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    shape, layout = list(ctx.input_shape), ctx.channels_last
    flat = backward_arguments(grads[0], shape, ctx.saved_tensors[:-1], ctx.options, layout, needs)
    for i, value in enumerate(operator(*flat)):
        if needs[i]:
            gradients[i] = value
    return tuple(gradients)


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "this layer has a first derivative only; for a second one call it with backend='reference' "
        "(or inside `with awnet.use_backend('reference')`), which plain autograd differentiates"
    )


def define(name: str) -> None:
    """Defines the schemas of a pair."""
    torch.library.define(f"awnet::layer_{name}", FORWARD_SCHEMA)
    torch.library.define(f"awnet::layer_{name}_backward", BACKWARD_SCHEMA)


def describe(name: str) -> Layer:
    """Gives a defined pair fake kernels, and its backward an error for second derivatives.

    Returns the forward operator.
    """
    forward, backward = f"awnet::layer_{name}", f"awnet::layer_{name}_backward"
    torch.library.register_fake(forward, _forward_fake)
    torch.library.register_fake(backward, _backward_fake)
    torch.library.register_autograd(
        backward, _no_second_derivative, setup_context=lambda ctx, inputs, output: None
    )
    operator: Layer = getattr(torch.ops.awnet, f"layer_{name}").default
    return operator


def register(name: str, passes: Passes) -> Layer:
    """Registers a pair whose passes are Python functions; returns the forward operator."""
    define(name)
    forward, backward = f"awnet::layer_{name}", f"awnet::layer_{name}_backward"
    torch.library.impl(forward, "CompositeExplicitAutograd", partial(_forward, passes))
    torch.library.impl(backward, "CompositeExplicitAutograd", partial(_backward, passes))
    operator = describe(name)
    backward_operator = getattr(torch.ops.awnet, f"layer_{name}_backward").default
    torch.library.register_autograd(
        forward, partial(_autograd, backward_operator), setup_context=_setup_context
    )
    return operator


def register_operator(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers ``torch.ops.awnet.<name>``, an operator without a gradient.

    Args:
        schema: arguments and results.
        function: computes the result.
        fake: returns tensors of the result's shapes, strides and dtypes, for torch.compile.
    """
    torch.library.define(f"awnet::{name}", schema)
    torch.library.impl(f"awnet::{name}", "CompositeExplicitAutograd", function)
    torch.library.register_fake(f"awnet::{name}", fake)


class _Layer(torch.autograd.Function):
    """The layer in eager mode: the functions of the operators, called directly.

    ``call``: the passes, the backward operator, the arguments, ``keep_u``, ``keep_mask``, and a list to which
    the forward appends its outputs.
    """

    # without setup_context, for which torch inspects the signature of forward at each call
    @staticmethod
    def forward(ctx: Any, call: Any, *differentiable: Tensor | None) -> Tensor:
        passes, backward, args, keep_u, keep_mask, outcome = call
        refuse_tangents(args.tensors())
        with torch._C._AutoDispatchBelowAutograd():
            y, u, mask, statistics, scale = _outputs(passes, args, keep_u, keep_mask)
        saved = Saved(y, u, mask, *(statistics or _NO_STATISTICS))
        outcome.append(saved)
        if ctx is not None:
            ctx.functions = passes, backward
            need_weight = ctx.needs_input_grad[2]
            _save(ctx, args, keep_u, keep_mask, saved, need_weight, None if args.norm is None else scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return tuple(None for _ in ctx.needs_input_grad)
        passes, operator = ctx.functions
        needs = ctx.needs_input_grad[1:]
        *tensors, scale = ctx.saved_tensors
        flat = backward_arguments(grad, ctx.input_shape, tensors, ctx.options, ctx.channels_last, needs)
        if torch.is_grad_enabled():  # create_graph=True: the operator's autograd reports second derivatives
            return None, *_through_operator(operator, flat)
        with torch._C._AutoDispatchBelowAutograd():
            return None, *_converted_gradients(passes, unflatten_backward(flat, scale))


_NO_STATISTICS: Any = [None] * len(Saved._fields[3:])


def _through_operator(operator: Layer, flat: tuple[Any, ...]) -> list[Tensor | None]:
    *others, mean, m2, n, channels_last, needs = flat
    statistics = (flat[0].new_empty(0) if x is None else x for x in (mean, m2, n))
    others[2] = list(others[2])
    grads = operator(*others, *statistics, channels_last, list(needs))
    return [value if need else None for need, value in zip(needs, grads, strict=True)]

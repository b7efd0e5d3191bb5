"""A frozen network and its gradient on the passes of a backend, as one autograd function.

Where every layer is an autograd function, autograd adds the gradients of an output that two layers read, and
expands the gradient of a mean over pixels. Here the backward of the layer below adds them as it reads them
(:meth:`awnet.ops.backends.base.Passes.eval_backward`). A layer with a ReLU and without a residual whose u is
saved needs no mask either: the backward computes it from u.

A layer whose scale is None has its batch norm folded into the weight (:mod:`awnet.ops.folding`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awnet.ops.args import RELU, EvalBackwardArgs, LayerArgs
from awnet.ops.autograd import convolved, input_gradient
from awnet.ops.backends.base import Passes, memory_format, wide_dtype
from awnet.ops.folding import folded_layer
from awnet.ops.functional import NetworkLayer

# scale and shift [B, C] of a layer; None and the bias [C] where the scale is folded into the weight
Coefficients = Sequence[tuple[Tensor | None, Tensor]]


class _Saved(NamedTuple):
    """The tensors of a layer that its backward reads."""

    weight: Tensor
    scale: Tensor | None  # None: folded into the weight
    shift: Tensor | None  # if the mask is computed from u
    u: Tensor | None  # if the gradient of scale or shift is required
    mask: Tensor | None  # of a ReLU
    slope: Tensor | None  # of another activation


@dataclass(frozen=True)
class _Plan:
    """Which gradients of a network are required."""

    x: bool
    tables: tuple[bool, ...]  # per layer: of scale or shift
    outputs: list[bool]  # per layer: of its output

    def of(self, source: int) -> bool:
        """Whether the gradient of the images (-1) or of a layer's output is required."""
        return self.x if source < 0 else self.outputs[source]

    @classmethod
    def make(cls, x: Tensor, coefficients: Coefficients, layers: Sequence[NetworkLayer]) -> _Plan:
        enabled = torch.is_grad_enabled()
        tables = tuple(
            enabled and a is not None and (a.requires_grad or b.requires_grad) for a, b in coefficients
        )
        plan = cls(enabled and x.requires_grad, tables, [])
        for layer, table in zip(layers, tables, strict=True):
            residual = layer.residual >= 0 and plan.of(layer.residual)
            plan.outputs.append(table or residual or plan.of(layer.input))
        return plan


def run(
    passes: Passes,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Coefficients,
    layers: Sequence[NetworkLayer],
) -> list[Tensor]:
    """:func:`awnet.ops.network.affine_network` on ``passes``."""
    plan = _Plan.make(x, coefficients, layers)
    tables = [table for pair in coefficients for table in pair]
    if not any(plan.outputs):
        means, _ = _forward(passes, x, weights, coefficients, layers, plan)
        return means
    return list(_Network.apply(passes, layers, plan, weights, x, *tables))


def _forward(
    passes: Passes,
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Coefficients,
    layers: Sequence[NetworkLayer],
    plan: _Plan,
) -> tuple[list[Tensor], list[tuple[_Saved, torch.Size, torch.memory_format]]]:
    wide = wide_dtype(x.dtype)
    last_reader = {  # of each output
        source: i for i, layer in enumerate(layers) for source in (layer.input, layer.residual)
    }
    outputs: dict[int, Tensor] = {-1: x}
    means: list[Tensor] = []
    saved = []
    for i, (layer, weight, (scale, shift)) in enumerate(zip(layers, weights, coefficients, strict=True)):
        residual = None if layer.residual < 0 else outputs[layer.residual]
        if scale is not None:
            scale, shift = scale.to(wide), shift.to(wide)
        args = layer.convolution.args(outputs[layer.input], weight, scale, shift, residual)
        y, u, mask, mask_from_u = _layer(passes, args, keep_u=plan.tables[i], need_mask=plan.outputs[i])
        outputs[i] = y
        saved_shift, saved_u = shift if mask_from_u else None, u if plan.tables[i] else None
        relu_mask, slope = (mask, None) if args.code == RELU else (None, mask)
        tensors = _Saved(weight, scale, saved_shift, saved_u, relu_mask, slope)
        saved.append((tensors, y.shape, memory_format(y)))
        if layer.averaged:
            means.append(y.mean((2, 3)))
        for source in (layer.input, layer.residual):
            if source >= 0 and last_reader[source] == i:
                outputs.pop(source, None)
    return means, saved


def _layer(
    passes: Passes, args: LayerArgs, keep_u: bool, need_mask: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """y, u and mask (or slope) of a layer, and whether the backward computes the mask from u."""
    scale, shift = args.filter_scale, args.shift
    assert shift is not None
    need_mask = need_mask and args.activation is not None
    if scale is None:
        y = folded_layer(args)
        return y, None, y if need_mask else None, False
    fused = passes.fused_apply(args, scale, shift, keep_u, need_mask)
    if fused is not None:
        y, u, mask = fused
        return y, u, mask if need_mask else None, False
    mask_from_u = need_mask and keep_u and args.residual is None and args.code == RELU
    u = convolved(args)
    keep_mask = need_mask and not mask_from_u
    y, mask = passes.apply(
        u, scale, shift, args.residual, args.code, keep_mask, in_place=not keep_u, frozen=True
    )
    return y, u, mask if keep_mask else None, mask_from_u


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        passes: Passes,
        layers: Sequence[NetworkLayer],
        plan: _Plan,
        weights: Sequence[Tensor],
        x: Tensor,
        *tables: Tensor,
    ) -> tuple[Tensor, ...]:
        coefficients = list(zip(tables[::2], tables[1::2], strict=True))
        means, saved = _forward(passes, x, weights, coefficients, layers, plan)
        ctx.passes, ctx.layers, ctx.plan = passes, layers, plan
        ctx.shapes = [(shape, layout) for _, shape, layout in saved]
        ctx.images = x.shape
        ctx.set_materialize_grads(False)
        averaged = [i for i, layer in enumerate(layers) if layer.averaged]
        constant = [mean for i, mean in zip(averaged, means, strict=True) if not plan.outputs[i]]
        ctx.mark_non_differentiable(*constant)
        ctx.save_for_backward(*(tensor for tensors, _, _ in saved for tensor in tensors))
        return tuple(means)

    @staticmethod
    def backward(ctx: Any, *d_means: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a frozen network has a first derivative only; for a second one run it inside "
                "`with awnet.use_backend('reference')`"
            )
        passes, layers, plan, tensors = ctx.passes, ctx.layers, ctx.plan, ctx.saved_tensors
        fields = len(_Saved._fields)
        grads: dict[int, list[Tensor]] = {i: [] for i in range(-1, len(layers))}
        d_tables: list[Tensor | None] = [None] * (2 * len(layers))
        remaining_d_means = list(d_means)
        for i in reversed(range(len(layers))):
            layer = layers[i]
            d_mean = remaining_d_means.pop() if layer.averaged else None
            if not plan.outputs[i] or (not grads[i] and d_mean is None):
                continue
            layer_saved = _Saved(*tensors[fields * i : fields * (i + 1)])
            grad, other_grad, d_mean = _incoming(grads.pop(i), d_mean, *ctx.shapes[i])
            need_residual = layer.residual >= 0 and plan.of(layer.residual)
            args = EvalBackwardArgs(
                grad=grad,
                scale=layer_saved.scale,
                other_grad=other_grad,
                d_mean=d_mean,
                u=layer_saved.u,
                relu_mask=layer_saved.mask,
                shift=layer_saved.shift,
                residual=need_residual and layer_saved.scale is not None,
                sums=plan.tables[i],
                slope=layer_saved.slope,
            )
            if layer_saved.scale is None:
                d_u = d_residual = _folded_gradient(passes, args)
                sums = None
            else:
                d_u, d_residual, sums = passes.eval_backward(args)
            if sums is not None:
                d_tables[2 * i], d_tables[2 * i + 1] = sums.gc, sums.g1
            if need_residual:
                grads[layer.residual].append(d_residual)
            if plan.of(layer.input):
                shape = ctx.images if layer.input < 0 else ctx.shapes[layer.input][0]
                conv = layer.convolution.conv
                grads[layer.input].append(input_gradient(passes, d_u, layer_saved.weight, conv, shape))
        needed = ctx.needs_input_grad[5:]
        result = [d if need else None for d, need in zip(d_tables, needed, strict=True)]
        return None, None, None, None, _total(grads[-1]), *result


def _folded_gradient(passes: Passes, args: EvalBackwardArgs) -> Tensor:
    """The gradient of u, and of the residual, of a layer whose batch norm is folded into its weight."""
    if args.relu_mask is None and args.other_grad is None and args.d_mean is None:
        return args.grad
    return passes.eval_backward(args)[0]


def _total(grads: Sequence[Tensor]) -> Tensor | None:
    return functools.reduce(torch.add, grads) if grads else None


def _incoming(
    grads: Sequence[Tensor], d_mean: Tensor | None, shape: Sequence[int], layout: torch.memory_format
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``grad``, ``other_grad`` and ``d_mean`` of ``eval_backward``, from all gradients of an output."""
    if not grads:
        assert d_mean is not None
        per_pixel = (d_mean / (shape[2] * shape[3]))[:, :, None, None]
        return per_pixel.expand(*shape).contiguous(memory_format=layout), None, None
    if d_mean is not None:
        d_mean = d_mean.to(wide_dtype(d_mean.dtype))
    total = _total(grads[:-1])
    first = grads[-1].contiguous(memory_format=layout)
    return first, None if total is None else total.contiguous(memory_format=layout), d_mean

"""A whole network in eval mode: every layer's scale and shift at once.

With frozen weights only ω and p depend on the images. All coefficients are then known before the network runs
(``docs/equations.md``), each layer is ``act(conv(x) · scale + shift + residual)``, ``affine_conv2d``, and an
attack needs the gradients of images, ω and p alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awnet.ops import dispatch, folding, launch_config, network_autograd
from awnet.ops.args import CODES, Conv, LayerArgs, Needs
from awnet.ops.backends import amx
from awnet.ops.backends import triton as triton_backend
from awnet.ops.backends.base import Passes, memory_format
from awnet.ops.coefficients import Mix, Norm, Reduced, eval_coefficients, eval_gradients, split
from awnet.ops.functional import NetworkLayer, global_average
from awnet.ops.transforms import transform


def affine_network(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Sequence[tuple[Tensor, Tensor]],
    layers: Sequence[NetworkLayer],
    packed: amx.PackedWeights | None = None,
) -> list[Tensor]:
    """A network of frozen layers in eval mode, each by :class:`awnet.ops.AffineConvolution`.

    On the ``cpp`` and ``cuda`` backends the network is one operator, because a small network would otherwise
    spend as much time between its layers as in them. In bfloat16 on a CPU with AMX that operator keeps all
    activations in the layout of AMX tiles (:mod:`awnet.ops.backends.amx`). On the ``triton`` backend the
    network is one autograd function (:mod:`awnet.ops.network_autograd`). On CUDA devices the backward of a
    layer adds the gradients of an output with several readers as it reads them.

    Args:
        x: images ``[B, C, H, W]``.
        weights: of each layer, of ``x``'s dtype; they get no gradient.
        coefficients: scale and shift ``[B, C_out]`` of each layer.
        layers: the inputs of each are outputs of earlier ones.
        packed: caches the filters that AMX reads; without it each call packs them.

    Returns:
        For each layer with ``averaged``, in order, the mean of its output over pixels, ``[B, C_out]``;
        differentiable once in ``x`` and coefficients; any number of times, and in forward mode, on the
        ``reference`` backend.

    Raises:
        As :class:`awnet.ops.AffineConvolution`: the caller must pass correct shapes, dtypes and devices.
    """
    first = layers[0].convolution.args(x, weights[0], *coefficients[0])
    chosen = dispatch.select_network(first, None).name
    by_layer = chosen not in ("cpp", "cuda", "triton") or torch.compiler.is_compiling()
    scales, shifts = zip(*coefficients, strict=True)
    if by_layer or transform((*weights, *scales, *shifts)):
        return layer_by_layer(x, weights, coefficients, layers)
    if chosen == "triton":
        return network_autograd.run(triton_backend.PASSES, x, weights, coefficients, layers)
    numbers: list[int] = []
    for layer in layers:
        conv = layer.convolution.conv
        numbers += [layer.input, layer.residual, layer.averaged, CODES[layer.convolution.activation]]
        numbers += [*conv.stride, *conv.padding, *conv.dilation, conv.groups]
    means: list[Tensor]
    groups = [layer.convolution.conv.groups for layer in layers]
    if amx.runs(x, weights, groups, [layer.convolution.activation for layer in layers]):
        filters = (packed or amx.PackedWeights()).of(weights)
        emulate = amx.mode() == "emulate"
        means = torch.ops.awnet.network_amx(x, scales, shifts, weights, filters, numbers, emulate)
    else:
        means = torch.ops.awnet.network_native(x, scales, shifts, weights, numbers)
    return means


def folds_norms(x: Tensor, weight: Tensor, layer: NetworkLayer) -> bool:
    """Whether :func:`folded_network` is to run a network of constant coefficients on images ``x``.

    The device's table says so for ``x``'s dtype (:func:`awnet.ops.launch_config.frozen_network`), ``x`` is
    channels_last and not empty, the network is neither compiled nor transformed, and no deterministic results
    are requested, which torch's operator for cuDNN does not provide.

    Args:
        x: images ``[B, C, H, W]``.
        weight, layer: the first layer.
    """
    if torch.compiler.is_compiling() or not len(x):
        return False
    if launch_config.frozen_network(x.device, x.dtype)["norms"] != "folded":
        return False
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    if folding.runs_cudnn(x) and (deterministic or not cudnn.enabled):
        return False
    if memory_format(x) != torch.channels_last:
        return False
    return not transform((x, weight)) and _passes(x, weight, layer) is not None


def _passes(x: Tensor, weight: Tensor, layer: NetworkLayer) -> Passes | None:
    """The passes of the backend that runs a frozen network; None for a backend with other operators."""
    chosen = dispatch.select_network(LayerArgs(x, weight, layer.convolution.conv), None).name
    return {"triton": triton_backend.PASSES, "eager": _EAGER}.get(chosen)


def folded_network(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Sequence[tuple[Tensor | None, Tensor]],
    layers: Sequence[NetworkLayer],
) -> list[Tensor]:
    """:func:`affine_network` of weights in which :func:`awnet.ops.fold_norms` has folded batch norms.

    Args:
        x: images for which :func:`folds_norms` is True.
        weights: of each layer.
        coefficients: scale and shift ``[B, C_out]``; None and the bias ``[C_out]`` of a folded layer.
        layers: the inputs of each are outputs of earlier ones.
    """
    passes = _passes(x, weights[0], layers[0])
    assert passes is not None
    return network_autograd.run(passes, x, weights, coefficients, layers)


_EAGER = Passes()


def layer_by_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    coefficients: Sequence[tuple[Tensor, Tensor]],
    layers: Sequence[NetworkLayer],
) -> list[Tensor]:
    """:func:`affine_network` with one call per layer, on any backend."""
    outputs: list[Tensor] = []
    for layer, weight, tables in zip(layers, weights, coefficients, strict=True):
        residual = None if layer.residual < 0 else outputs[layer.residual]
        source = x if layer.input < 0 else outputs[layer.input]
        outputs.append(layer.convolution(source, weight, *tables, residual))
    return [global_average(y) for y, layer in zip(outputs, layers, strict=True) if layer.averaged]


def network_coefficients(
    tables: Tensor,
    widths: Sequence[int],
    filter_scale: Tensor | None,
    p_clean: Tensor,
    *,
    eps: float,
    backend: str | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """scale and shift ``[B, C_l]`` of every layer of a network in eval mode (Eq. 11 and 14).

    scale = ω [(1 − p) γ_0/σ_0 + p γ_1/σ_1], shift = (1 − p)(β_0 − μ_0 γ_0/σ_0) + p (β_1 − μ_1 γ_1/σ_1). On
    the Triton backend one launch computes all of them, on ``cpp`` one operator.

    Args:
        tables: ``[4, 2, T]`` with T = Σ C_l, float32 or wider: γ, β, μ, σ² of the adversarial and the clean
            branch, the layers side by side.
        widths: C_l of each layer.
        filter_scale: ω ``[B, D]`` of the dynamic layers side by side; these are the first of ``widths``, and
            their widths sum to D. None if no layer is dynamic.
        p_clean: p ``[B]``.
        eps: added to the variances.
        backend: a backend's name, or None for the best that can run the call.

    Returns:
        One contiguous (scale, shift) for each layer, of ``tables``' dtype; differentiable once in
        ``filter_scale`` and ``p_clean``, not in ``tables``; any number of times, and in forward mode, on
        ``reference``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or ``tables`` requires a gradient.
    """
    widths = tuple(widths)
    _check_network(tables, widths, filter_scale, p_clean, eps)
    p_clean = p_clean.to(tables.dtype)
    filter_scale = None if filter_scale is None else filter_scale.to(tables.dtype)
    # a backend decides by device and dtype; torch.compile cannot trace the record's default for conv
    probe = LayerArgs(tables[:1], conv=Conv(), filter_scale=filter_scale, p_clean=p_clean)
    chosen = dispatch.select_network(probe, backend).name
    if chosen == "reference":
        norm = Norm.stacked(tables, float(eps))
        return split(*eval_coefficients(norm, Mix(filter_scale, p_clean), len(p_clean)), widths)
    if chosen == "cpp" and not torch.compiler.is_compiling():
        flat = torch.ops.awnet.network_coefficients_native(filter_scale, p_clean, tables, widths, eps)
    else:
        on_triton = chosen == "triton"
        flat = _NetworkCoefficients.apply(filter_scale, p_clean, tables, widths, float(eps), on_triton)
    return list(zip(flat[::2], flat[1::2], strict=True))


def _check_network(
    tables: Tensor, widths: tuple[int, ...], filter_scale: Tensor | None, p_clean: Tensor, eps: float
) -> None:
    columns = sum(widths)
    if not widths or tuple(tables.shape) != (4, 2, columns):
        raise ValueError(f"tables must be [4, 2, {columns}] for widths {widths}, got {list(tables.shape)}")
    if tables.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"tables must be float32 or float64, got {tables.dtype}")
    if tables.requires_grad:
        raise ValueError("tables must not require a gradient: pass tables.detach(), or use aw_conv2d")
    if p_clean.dim() != 1 or not p_clean.is_floating_point():
        raise ValueError(f"p_clean must be floating point [B], got {p_clean.dtype} {list(p_clean.shape)}")
    if not isinstance(eps, float | int) or not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    for name, x in (("filter_scale", filter_scale), ("p_clean", p_clean)):
        if x is not None and x.device != tables.device:
            raise ValueError(f"{name} is on {x.device}, tables on {tables.device}: put both on one device")
    if filter_scale is None:
        return
    sums = {sum(widths[: i + 1]) for i in range(len(widths))}
    if filter_scale.dim() != 2 or len(filter_scale) != len(p_clean) or filter_scale.shape[1] not in sums:
        raise ValueError(
            f"filter_scale must be [{len(p_clean)}, D] with D the sum of the first widths of {widths}, got "
            f"{list(filter_scale.shape)}"
        )


class _NetworkCoefficients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        filter_scale: Tensor | None,
        p_clean: Tensor,
        tables: Tensor,
        widths: tuple[int, ...],
        eps: float,
        on_triton: bool,
    ) -> tuple[Tensor, ...]:
        ctx.eps, ctx.on_triton = eps, on_triton
        ctx.save_for_backward(filter_scale, p_clean, tables)
        batch = len(p_clean)
        if not on_triton:
            pairs = split(
                *eval_coefficients(Norm.stacked(tables, eps), Mix(filter_scale, p_clean), batch), widths
            )
            return tuple(table for pair in pairs for table in pair)
        sizes = [batch * width for width in widths]
        flat = torch.ops.awnet.network_coefficients_triton(filter_scale, p_clean, tables, widths, eps)
        blocks = zip(*(whole.split(sizes) for whole in flat), widths, strict=True)
        return tuple(block.view(batch, width) for *pair, width in blocks for block in pair)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a frozen network's coefficients have a first derivative only; for a second one run it "
                "inside `with awnet.use_backend('reference')`"
            )
        filter_scale, p_clean, tables = ctx.saved_tensors
        d_scale, d_shift = torch.cat(grads[::2], 1), torch.cat(grads[1::2], 1)  # [B, T]
        need_filter_scale, need_p_clean = ctx.needs_input_grad[:2]
        if ctx.on_triton:
            d_filter_scale, d_p_clean = torch.ops.awnet.network_gradients_triton(
                d_scale, d_shift, filter_scale, p_clean, tables, ctx.eps, [need_filter_scale, need_p_clean]
            )
            d_filter_scale = d_filter_scale if need_filter_scale else None
            return d_filter_scale, d_p_clean if need_p_clean else None, None, None, None, None
        norm, mix = Norm.stacked(tables, ctx.eps), Mix(filter_scale, p_clean)
        needs = Needs(filter_scale=need_filter_scale, p_clean=need_p_clean)
        result = eval_gradients(Reduced(d_shift, d_scale, None), norm, mix, needs)
        return result.filter_scale, result.p_clean, None, None, None, None

"""The arguments of one layer call, as records and in the flat form of the registered operators.

:class:`LayerArgs` describes one call of y = act(conv(input, weight) · scale + shift + residual); every
backend takes it. The operators of ``torch.library`` take flat arguments: ``FORWARD_SCHEMA`` and
``BACKWARD_SCHEMA`` name them, and ``flatten``, ``unflatten``, ``backward_arguments`` and
``unflatten_backward`` convert, here and nowhere else in Python. ``csrc/autograd.cpp`` reads the same schemas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

# An activation is a name in Python and its position in this tuple in operators and kernels. `Activation` in
# csrc/arithmetic.h and kernels/activations.py have the same order.
ACTIVATIONS = (None, "relu", "silu", "gelu", "leaky_relu")
RELU = 1
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


class Conv(NamedTuple):
    """The geometry of a convolution, in pixels (height, width)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True, slots=True)
class MixNorm:
    """A batch norm with 1 or 2 branches: row 0 is adversarial, row 1 clean."""

    weight: Tensor  # γ [K, C_out], K = affine_rows
    bias: Tensor  # β [K, C_out]
    mean: Tensor  # running mean [S, C_out], S = stat_rows
    var: Tensor  # running variance [S, C_out]
    eps: float = 1e-5
    momentum: float | Tensor = 0.1  # of the running statistics; not an argument of the operators
    training: bool = False
    process_group: str = ""  # the group whose ranks share batch statistics; empty for this process only


@dataclass(frozen=True, slots=True)
class LayerArgs:
    """One layer call; :mod:`awnet.ops.checks` has checked it.

    Without a ``weight`` there is no convolution (``mix_batch_norm``). Without a ``norm`` the scale is
    ``filter_scale`` and the shift is ``shift``, 1 and 0 if None (``filter_scaled_conv2d``,
    ``affine_conv2d``).
    """

    input: Tensor  # [B, C_in, H, W]
    weight: Tensor | None = None  # [C_out, C_in/groups, k_h, k_w]
    conv: Conv = field(default_factory=Conv)
    filter_scale: Tensor | None = None  # ω [B, C_out]
    norm: MixNorm | None = None
    p_clean: Tensor | None = None  # p [B], eval mode with two branches
    is_clean: Tensor | None = None  # [B] bool, train mode with two branches
    shift: Tensor | None = None  # [B, C_out], only without a norm
    residual: Tensor | None = None  # [B, C_out, H', W']
    activation: str | None = None  # one of ACTIVATIONS

    @property
    def code(self) -> int:
        """The position of the activation in ``ACTIVATIONS``."""
        return CODES[self.activation]

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the layer normalizes by the statistics of the batch."""
        return self.norm is not None and self.norm.training

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The arguments that can get a gradient, in the order of :class:`Needs`."""
        norm = self.norm
        bn_weight, bn_bias = (None, None) if norm is None else (norm.weight, norm.bias)
        images = (self.input, self.weight, self.filter_scale)
        return *images, self.p_clean, bn_weight, bn_bias, self.shift, self.residual

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All floating-point arguments on which the output depends."""
        norm = self.norm
        statistics = () if norm is None else (norm.mean, norm.var)
        return *self.differentiable(), *statistics


class Needs(NamedTuple):
    """The arguments for which a gradient is required."""

    input: bool = False
    weight: bool = False
    filter_scale: bool = False
    p_clean: bool = False
    bn_weight: bool = False
    bn_bias: bool = False
    shift: bool = False
    residual: bool = False

    @property
    def coefficients(self) -> bool:
        """Whether a gradient on [B, C] is required, for which the backward needs u."""
        return any(self[2:7])

    @property
    def images(self) -> bool:
        """Whether ∂u or the gradient of the residual is required."""
        return self.input or self.weight or self.residual


class Saved(NamedTuple):
    """The outputs of the forward operator."""

    y: Tensor  # [B, C_out, H', W']
    u: Tensor  # of y's shape, conv(input, weight); empty without a weight or without keep_u
    mask: Tensor  # what the backward reads of the activation, see keep_mask; empty without it
    mean: Tensor  # [B, C_out] of u; this and the rest are empty outside train mode
    m2: Tensor  # [B, C_out]
    batch_mean: Tensor  # [S, C_out] of ω ⊙ u
    batch_var: Tensor  # [S, C_out], biased
    n: Tensor  # [S], values per channel


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardArgs:
    """The arguments of the backward operator."""

    grad: Tensor  # ∂L/∂y
    input: Tensor | None = None  # its values, only if the weight's gradient is required
    input_shape: Sequence[int]
    weight: Tensor | None = None
    conv: Conv = field(default_factory=Conv)
    filter_scale: Tensor | None = None
    norm: MixNorm | None = None  # in train mode with the statistics of the batch
    p_clean: Tensor | None = None
    is_clean: Tensor | None = None
    shift: Tensor | None = None  # only its dtype is read
    u: Tensor | None = None  # conv(input, weight), or the input without a weight
    relu_mask: Tensor | None = None  # y, or a bool mask; None without a ReLU
    slope: Tensor | None = None  # act'(z), of grad's dtype, for the other activations
    mean: Tensor  # [B, C_out] of u; this and the rest are empty outside train mode
    m2: Tensor  # [B, C_out]
    n: Tensor  # [S]
    channels_last: bool
    needs: Needs
    scale: Tensor | None = None  # [B, C_out] of the forward in eval mode; None to compute it again


class EvalBackwardArgs(NamedTuple):
    """The arguments of the passes of a backward in eval mode, ``Passes.eval_backward``."""

    grad: Tensor  # [B, C, H, W], of y
    scale: Tensor | None  # [B, C]; None for 1
    other_grad: Tensor | None = None  # a second gradient of y, which is added
    d_mean: Tensor | None = None  # [B, C], the gradient of y's mean over pixels, added too
    u: Tensor | None = None  # needed for ``sums`` and ``shift``
    relu_mask: Tensor | None = None  # y, or a mask of apply; None without an activation or with ``shift``
    shift: Tensor | None = None  # [B, C] where y = relu(u · scale + shift): u then gives the mask
    residual: bool = False  # whether ∂residual is requested
    sums: bool = False  # whether the sums are requested
    centered: bool = False  # whether they are about a center; otherwise gc is the gradient of the scale
    slope: Tensor | None = None  # of an activation other than the ReLU; then there is no relu_mask


_LAYER = """Tensor? weight, Tensor? filter_scale, Tensor? p_clean, Tensor? bn_weight, Tensor? bn_bias,
    Tensor? shift, {residual} Tensor? mean, Tensor? var, Tensor? is_clean, bool training, float eps,
    str process_group, int[2] stride, int[2] padding, int[2] dilation, int groups"""
_FORWARD = f"""(Tensor input, {_LAYER.format(residual="Tensor? residual,")}, int activation, bool keep_u,
    bool keep_mask) -> (Tensor y, Tensor u, Tensor mask, Tensor mean, Tensor m2, Tensor batch_mean,
    Tensor batch_var, Tensor n)"""
_BACKWARD = f"""(Tensor grad, Tensor? input, SymInt[] input_shape, {_LAYER.format(residual="")}, Tensor? u,
    Tensor? relu_mask, Tensor? slope, Tensor u_mean, Tensor u_m2, Tensor n, bool channels_last, bool[8] needs)
    -> (Tensor input, Tensor weight, Tensor filter_scale, Tensor p_clean, Tensor bn_weight, Tensor bn_bias,
    Tensor shift, Tensor residual)"""
FORWARD_SCHEMA, BACKWARD_SCHEMA = " ".join(_FORWARD.split()), " ".join(_BACKWARD.split())


def layer_options(args: LayerArgs) -> tuple[Any, ...]:
    """The flat arguments from training to groups, which forward and backward have in common."""
    norm = args.norm
    if norm is None:
        return False, 1e-5, "", *args.conv
    return norm.training, norm.eps, norm.process_group, *args.conv


def flatten(args: LayerArgs, keep_u: bool, keep_mask: bool) -> tuple[Any, ...]:
    """``args`` and what to keep for the backward, in the order of ``FORWARD_SCHEMA``."""
    norm = args.norm
    statistics = (None, None) if norm is None else (norm.mean, norm.var)
    tensors = *args.differentiable(), *statistics, args.is_clean
    return *tensors, *layer_options(args), args.code, keep_u, keep_mask


def unflatten(flat: Sequence[Any]) -> tuple[LayerArgs, bool, bool]:
    """The inverse of :func:`flatten`; the momentum, which the operators do not take, is the default."""
    (input, weight, filter_scale, p_clean, bn_weight, bn_bias, shift, residual, mean, var, is_clean, training,
     eps, process_group, stride, padding, dilation, groups, code, keep_u, keep_mask) = flat  # fmt: skip
    args = LayerArgs(
        input,
        weight,
        Conv(stride, padding, dilation, groups),
        filter_scale,
        _norm(bn_weight, bn_bias, mean, var, training, eps, process_group),
        p_clean=p_clean,
        is_clean=is_clean,
        shift=shift,
        residual=residual,
        activation=ACTIVATIONS[code],
    )
    return args, keep_u, keep_mask


def _norm(
    weight: Tensor | None, bias: Any, mean: Any, var: Any, training: bool, eps: float, process_group: str
) -> MixNorm | None:
    if weight is None:
        return None
    return MixNorm(weight, bias, mean, var, eps, training=training, process_group=process_group)


def backward_arguments(
    grad: Tensor,
    input_shape: Sequence[int],
    tensors: Sequence[Tensor | None],
    options: Sequence[Any],
    channels_last: bool,
    needs: Sequence[bool],
) -> tuple[Any, ...]:
    """The arguments of the backward operator, in the order of ``BACKWARD_SCHEMA``.

    Args:
        tensors: those from the input to n, in that order.
        options: of :func:`layer_options`.
        grad, input_shape, channels_last, needs: as in :class:`BackwardArgs`.
    """
    input, *layer = tensors
    return grad, input, input_shape, *layer[:9], *options, *layer[9:], channels_last, needs


def unflatten_backward(flat: Sequence[Any], scale: Tensor | None = None) -> BackwardArgs:
    """The record of :func:`backward_arguments` and of ``scale``; the momentum is the default."""
    (grad, input, input_shape, weight, filter_scale, p_clean, bn_weight, bn_bias, shift, mean, var, is_clean,
     training, eps, process_group, stride, padding, dilation, groups, u, relu_mask, slope, u_mean, m2,
     n, channels_last, needs) = flat  # fmt: skip
    return BackwardArgs(
        grad=grad,
        input=input,
        input_shape=input_shape,
        weight=weight,
        conv=Conv(stride, padding, dilation, groups),
        filter_scale=filter_scale,
        norm=_norm(bn_weight, bn_bias, mean, var, training, eps, process_group),
        p_clean=p_clean,
        is_clean=is_clean,
        shift=shift,
        u=u,
        relu_mask=relu_mask,
        slope=slope,
        mean=u_mean,
        m2=m2,
        n=n,
        channels_last=channels_last,
        needs=Needs(*needs),
        scale=scale,
    )

"""The ``triton`` backend: passes and coefficients on ``awnet.kernels``, which is imported on first use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awnet.ops import self_check
from awnet.ops.args import RELU, Conv, EvalBackwardArgs, LayerArgs, Needs
from awnet.ops.autograd import PassesBackend, register_operator
from awnet.ops.backends.base import NO_FLOAT64, Passes, constant_in_graphs, device_obstacle
from awnet.ops.coefficients import (
    BatchStats,
    Gradients,
    Mix,
    Norm,
    Propagation,
    Reduced,
    SampleStats,
    TrainSums,
)
from awnet.ops.launch_config import FOLDER, Parameters, convolutions, launch_parameters


@functools.cache
def kernels(name: str) -> Any:
    """The module ``awnet.kernels.<name>``."""
    return importlib.import_module(f"awnet.kernels.{name}")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, slowly, for tests: TRITON_INTERPRET=1 from the start."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(x: Tensor) -> str | None:
    """Why the kernels cannot run on ``x``; None where they can."""
    reason = _obstacle_on(x.device)
    return NO_FLOAT64 if reason is None and x.dtype == torch.float64 else reason


@constant_in_graphs
def _obstacle_on(device: torch.device) -> str | None:
    if not _installed():
        return "Triton is not installed (pip install triton, on Linux)"
    if device.type == "cpu" and interpreted():
        # the interpreter is for tests, which check the kernels themselves, and there a check takes seconds
        return self_check.obstacle(CHECKED, device) if self_check.mode() == "always" else None
    return device_obstacle(device) or self_check.obstacle(CHECKED, device)


def _dense(x: Tensor | None) -> Any:
    return None if x is None else x.contiguous()


def _alike(x: Tensor, u: Tensor) -> Tensor:
    """``x`` in the layout of ``u``; a copy only where it has the other."""
    if u.is_contiguous():
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last)


def _for_images(op: str, u: Tensor) -> Parameters:
    batch, channels, height, width = u.shape
    layout = "nchw" if u.is_contiguous() else "channels_last"
    return launch_parameters(op, u.device, batch, channels, height * width, u.dtype, layout)


def _norm(norm: Norm) -> Norm:
    weight, bias, mean, var, eps = norm
    return Norm(weight.contiguous(), bias.contiguous(), mean.contiguous(), var.contiguous(), eps)


def _mix(mix: Mix) -> Mix:
    return Mix(*map(_dense, mix))


class TritonPasses(Passes):
    """float32, bfloat16 and float16 images, either layout."""

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return kernels("passes").statistics(u, _for_images("statistics", u))

    def apply(
        self,
        u: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        activation: int,
        keep_mask: bool,
        in_place: bool,
        frozen: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """With ``frozen`` the mask of a ReLU on 16-bit images has one bit per element where rows allow it."""
        other = None if residual is None else _alike(residual, u)
        config, out = _for_images("apply", u), u if in_place else None
        smooth, mask = activation > RELU, None
        if keep_mask and frozen and activation == RELU and u.element_size() == 2:
            mask = kernels("tiles").packed_mask(u)
        if keep_mask and mask is None:
            mask = torch.empty_like(u, dtype=u.dtype if smooth else torch.bool)
        options = {"out": out, "slope" if smooth else "relu_mask": mask}
        y = kernels("passes").apply(u, _dense(scale), _dense(shift), other, activation, config, **options)
        return y, u.new_empty(0, dtype=torch.bool) if mask is None else mask

    def reduce(
        self, grad: Tensor, u: Tensor, center: Tensor, relu_mask: Tensor | None, slope: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        config = _for_images("reduce", u)
        return kernels("passes").reduce(_alike(grad, u), u, _dense(center), relu_mask, config, slope=slope)

    def propagate(
        self,
        grad: Tensor,
        u: Tensor | None,
        center: Tensor | None,
        relu_mask: Tensor | None,
        propagation: Propagation,
        residual: bool,
        slope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        by = [_dense(x) for x in propagation]
        config = _for_images("propagate", grad)
        center = _dense(center)
        return kernels("passes").propagate(grad, u, center, relu_mask, *by, residual, config, slope=slope)

    def eval_backward(self, args: EvalBackwardArgs) -> tuple[Tensor, Tensor | None, Reduced | None]:
        grad, other = args.grad, args.other_grad
        d_u, d_residual, sums = kernels("eval_backward").eval_backward(
            grad, None if other is None else _alike(other, grad), _dense(args.d_mean), args.u, args.relu_mask,
            _dense(args.scale), _dense(args.shift), _for_images("eval_backward", grad),
            slope=args.slope, residual=args.residual, sums=args.sums, centered=args.centered,
        )  # fmt: skip
        return d_u, d_residual, None if sums is None else Reduced(*sums)

    # convolutions, where the device's table has an entry for the case

    def fused_apply(
        self, args: LayerArgs, scale: Tensor, shift: Tensor, keep_u: bool, keep_mask: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        table = convolutions(args.input.device)
        if not table:
            return None
        epilogue = (scale, shift, args.residual, args.code)
        fused = kernels("fused_conv").fused_apply
        return fused(args.input, args.weight, *epilogue, *args.conv, keep_u, keep_mask, table=table)

    def fused_statistics(self, args: LayerArgs) -> tuple[Tensor, Tensor, Tensor] | None:
        table = convolutions(args.input.device)
        if not table:
            return None
        return kernels("fused_conv").fused_statistics(args.input, args.weight, *args.conv, table=table)

    def fused_dgrad(
        self, d_u: Tensor, weight: Tensor, conv: Conv, input_shape: Sequence[int]
    ) -> Tensor | None:
        table = convolutions(d_u.device)
        if not table:
            return None
        return kernels("fused_conv").fused_dgrad(d_u, weight, input_shape, *conv, table=table)

    # coefficients

    def eval_coefficients(self, norm: Norm, mix: Mix, batch: int) -> tuple[Tensor, Tensor]:
        config = launch_parameters("eval_coefficients", norm.weight.device, batch, norm.weight.shape[1])
        return kernels("eval_coefficients").eval_coefficients(_norm(norm), _mix(mix), batch, config)

    def eval_gradients(self, sums: Reduced, norm: Norm, mix: Mix, needs: Needs) -> Gradients:
        config = launch_parameters("eval_gradients", sums.g1.device, *sums.g1.shape)
        return _eval_gradients(sums, norm, mix, needs, config)

    def batch_statistics(self, stats: SampleStats, mix: Mix, stat_rows: int) -> BatchStats:
        config = launch_parameters("batch_statistics", stats.mean.device, *stats.mean.shape)
        return BatchStats(
            *kernels("train_coefficients").batch_statistics(stats, _mix(mix), stat_rows, config)
        )

    def train_coefficients(self, norm: Norm, mix: Mix, batch: int) -> tuple[Tensor, Tensor]:
        config = launch_parameters("train_coefficients", norm.weight.device, batch, norm.weight.shape[1])
        return kernels("train_coefficients").train_coefficients(_norm(norm), _mix(mix), batch, config)

    def train_sums(self, sums: Reduced, norm: Norm, mix: Mix) -> TrainSums:
        config = launch_parameters("train_gradients", sums.g1.device, *sums.g1.shape)
        return TrainSums(*kernels("train_coefficients").train_sums(sums, _norm(norm), _mix(mix), config))

    def train_gradients(
        self,
        sums: Reduced,
        stats: SampleStats,
        norm: Norm,
        n: Tensor,
        mix: Mix,
        need_filter_scale: bool,
        totals: TrainSums | None = None,
    ) -> tuple[Gradients, Propagation]:
        config = launch_parameters("train_gradients", sums.g1.device, *sums.g1.shape)
        d_filter_scale, d_weight, d_bias, *by = kernels("train_coefficients").train_gradients(
            sums, stats, _norm(norm), _dense(n), _mix(mix), need_filter_scale, totals, config
        )
        return Gradients(d_filter_scale, None, d_weight, d_bias), Propagation(*by)


def _eval_gradients(sums: Reduced, norm: Norm, mix: Mix, needs: Needs, config: Parameters) -> Gradients:
    required = (needs.filter_scale, needs.p_clean, needs.bn_weight, needs.bn_bias)
    dense = sums._replace(center=_dense(sums.center))
    return Gradients(
        *kernels("eval_coefficients").eval_gradients(dense, _norm(norm), _mix(mix), required, config)
    )


PASSES = TritonPasses()


# a frozen network, as operators with fake kernels, so that torch.compile passes them by


def _network_coefficients(
    filter_scale: Tensor | None, p_clean: Tensor, tables: Tensor, widths: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """All layers' scales and shifts, each one after the other in a flat tensor, in one launch."""
    norm, mix, widths = Norm.stacked(tables, eps), Mix(filter_scale, p_clean), tuple(widths)
    batch, channels = len(p_clean), tables.shape[2]
    config = launch_parameters("network_coefficients", tables.device, batch, channels)
    layout = _network_layout(widths, tables.device)
    flat = tables.new_empty(batch * channels), tables.new_empty(batch * channels)
    kernels("eval_coefficients").network_coefficients(
        _norm(norm), _mix(mix), widths, layout, config, out=flat
    )
    return flat


def _fake_network_coefficients(
    filter_scale: Tensor | None, p_clean: Tensor, tables: Tensor, widths: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    size = len(p_clean) * tables.shape[2]
    return tables.new_empty(size), tables.new_empty(size)


def _network_gradients(
    d_scale: Tensor,
    d_shift: Tensor,
    filter_scale: Tensor | None,
    p_clean: Tensor,
    tables: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of ω and p, empty where not needed."""
    norm, mix = Norm.stacked(tables, eps), Mix(filter_scale, p_clean)
    config = launch_parameters("network_gradients", tables.device, *d_shift.shape)
    required = Needs(filter_scale=needs[0], p_clean=needs[1])
    grads = _eval_gradients(Reduced(d_shift, d_scale, None), norm, mix, required, config)
    return (
        tables.new_empty(0) if grads.filter_scale is None else grads.filter_scale,
        tables.new_empty(0) if grads.p_clean is None else grads.p_clean,
    )


def _fake_network_gradients(
    d_scale: Tensor,
    d_shift: Tensor,
    filter_scale: Tensor | None,
    p_clean: Tensor,
    tables: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    d_filter_scale = tables.new_empty(0) if filter_scale is None else torch.empty_like(filter_scale)
    return (
        d_filter_scale if needs[0] else tables.new_empty(0),
        torch.empty_like(p_clean) if needs[1] else tables.new_empty(0),
    )


register_operator(
    "network_coefficients_triton",
    "(Tensor? filter_scale, Tensor p_clean, Tensor tables, int[] widths, float eps) "
    "-> (Tensor scale, Tensor shift)",
    _network_coefficients,
    _fake_network_coefficients,
)
register_operator(
    "network_gradients_triton",
    "(Tensor d_scale, Tensor d_shift, Tensor? filter_scale, Tensor p_clean, Tensor tables, float eps, "
    "bool[2] needs) -> (Tensor d_filter_scale, Tensor d_p_clean)",
    _network_gradients,
    _fake_network_gradients,
)


# the step of a sign-gradient attack


def _sign_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float, eps: float, cast: Tensor | None
) -> Tensor:
    config = launch_parameters("sign_step", x.device, len(x), 1, x[0].numel() if len(x) else 1)
    start = _without_gaps(x_adv)
    copied = None if cast is None or cast.stride() != start.stride() else cast
    stepped: Tensor = kernels("sign_step").sign_step(
        start, _with_strides(grad, start), _with_strides(x, start), step_size, eps, config, cast=copied
    )
    if cast is not None and copied is None:
        cast.copy_(stepped)
    return stepped


def _fake_sign_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float, eps: float, cast: Tensor | None
) -> Tensor:
    return torch.empty_like(_without_gaps(x_adv))


def _without_gaps(x: Tensor) -> Tensor:
    return x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.clone()


def _with_strides(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with the strides of ``like``; a copy only where its strides differ."""
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


register_operator(
    "sign_step_triton",
    "(Tensor x_adv, Tensor grad, Tensor x, float step_size, float eps, Tensor(a!)? cast) -> Tensor",
    _sign_step,
    _fake_sign_step,
)


# what the self-check runs


def _probe(device: torch.device) -> str | None:
    start = torch.full((1000,), 0.5, dtype=torch.float32, device=device)
    grad = torch.ones_like(start)
    stepped = _sign_step(start, grad, start, 0.125, 0.25, None)
    return None if bool((stepped == 0.625).all()) else "a kernel ran and gave a wrong result"


def _stepped(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _sign_step(*arguments), arguments[-1]


def _sources() -> Iterator[Path]:
    package = importlib.util.find_spec("awnet.kernels")
    assert package is not None
    assert package.submodule_search_locations is not None
    yield from Path(package.submodule_search_locations[0]).glob("*.py")
    yield from FOLDER.glob("*.json")
    yield Path(__file__)


def _forward_and_backward(
    u: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, args: EvalBackwardArgs
) -> tuple[Any, ...]:
    """y of a frozen layer with a ReLU, and its backward with the mask that the forward stored."""
    y, mask = PASSES.apply(u, scale, shift, residual, RELU, True, False, frozen=True)
    return y, *PASSES.eval_backward(args._replace(relu_mask=mask))


CHECKED = self_check.Kernels(
    "triton",
    PASSES,
    _probe,
    _sources,
    {
        "eval_backward": PASSES.eval_backward,
        "forward_and_backward": _forward_and_backward,
        "network_coefficients": _network_coefficients,
        "network_gradients": _network_gradients,
        "sign_step": _stepped,
    },
)


@functools.lru_cache(maxsize=64)
def _network_layout(widths: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        layout: Tensor = kernels("eval_coefficients").network_layout(widths, device)
    return layout


class Triton(PassesBackend):
    name = "triton"
    summary = "Triton kernels (CUDA devices)"

    def __init__(self) -> None:
        super().__init__("triton", PASSES)

    def not_supported(self, args: LayerArgs) -> str | None:
        return obstacle(args.input)

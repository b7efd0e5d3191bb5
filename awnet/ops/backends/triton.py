"""The passes and the [B, C] algebra on the Triton kernels of ``awnet.kernels``, imported on first use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awnet.ops.args import Needs
from awnet.ops.backends.triton_convolutions import TritonConvolutions
from awnet.ops.coefficients import BatchStatistics, Gradients, Propagation, Sums
from awnet.ops.launch_config import Parameters, launch_parameters

_LEAST_CAPABILITY = (8, 0)


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


@functools.cache
def device_obstacle(device: torch.device) -> str | None:
    """Why no CUDA kernel of ours can run on ``device``; None where one can."""
    if not torch.cuda.is_available():
        return f"it needs a CUDA device, this machine has none and the input is on {device}"
    if device.type != "cuda":
        return f"it runs on CUDA devices, and the input is on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _LEAST_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or more, and {device} has {major}.{minor}"
    return None


def obstacle(x: Tensor) -> str | None:
    """Why the kernels cannot run on ``x``; None where they can."""
    if not _installed():
        return "Triton is not installed (pip install triton, on Linux)"
    if x.device.type != "cpu" or not interpreted():
        reason = device_obstacle(x.device)
        if reason is not None:
            return reason
    if x.dtype == torch.float64:
        return "it has no float64 (use eager or reference)"
    return None


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


def _for_table(op: str, device: torch.device, batch: int, channels: int) -> Parameters:
    return launch_parameters(op, device, batch, channels)


def _norm(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Any:
    return kernels("tables").Norm(*map(_dense, (weight, bias, mean, var)), eps)


def _network_norm(tables: Tensor, eps: float) -> Any:
    weight, bias, mean, var = tables.unbind(0)
    return _norm(weight, bias, mean, var, eps)


def _mix(omega: Tensor | None, p_clean: Tensor | None, is_clean: Tensor | None = None) -> Any:
    return kernels("tables").Mix(*map(_dense, (omega, p_clean, is_clean)))


class TritonPasses(TritonConvolutions):
    """See :class:`awnet.ops.backends.eager.Passes`. float32, bfloat16 and float16 images, either layout."""

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return kernels("passes").statistics(u, _for_images("statistics", u))

    def apply(
        self,
        u: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        relu: bool,
        keep_mask: bool,
        in_place: bool,
    ) -> tuple[Tensor, Tensor]:
        other = None if residual is None else _alike(residual, u)
        config, out = _for_images("apply", u), u if in_place else None
        mask = torch.empty_like(u, dtype=torch.bool) if keep_mask else None
        y = kernels("passes").apply(
            u, _dense(scale), _dense(shift), other, relu, config, out=out, relu_mask=mask
        )
        return y, u.new_empty(0, dtype=torch.bool) if mask is None else mask

    def reduce(self, grad: Tensor, u: Tensor, centre: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        config = _for_images("reduce", u)
        return kernels("passes").reduce(_alike(grad, u), u, _dense(centre), gate, config)

    def propagate(
        self,
        grad: Tensor,
        u: Tensor | None,
        centre: Tensor | None,
        gate: Tensor | None,
        how: Propagation,
        residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        coefficients = [_dense(x) for x in how]
        config = _for_images("propagate", grad)
        return kernels("passes").propagate(grad, u, _dense(centre), gate, *coefficients, residual, config)

    def testing_coefficients(
        self,
        omega: Tensor | None,
        bn_weight: Tensor,
        bn_bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        p_clean: Tensor | None,
        eps: float,
        batch: int,
    ) -> tuple[Tensor, Tensor]:
        norm = _norm(bn_weight, bn_bias, running_mean, running_var, eps)
        config = _for_table("eval_coefficients", bn_weight.device, batch, bn_weight.shape[1])
        return kernels("eval_coefficients").eval_coefficients(norm, _mix(omega, p_clean), batch, config)

    def testing_gradients(
        self,
        g1: Tensor,
        gc: Tensor,
        centre: Tensor,
        omega: Tensor | None,
        bn_weight: Tensor,
        bn_bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        p_clean: Tensor | None,
        eps: float,
        needs: Needs,
    ) -> Gradients:
        norm = _norm(bn_weight, bn_bias, running_mean, running_var, eps)
        config = _for_table("eval_gradients", g1.device, *g1.shape)
        mix = _mix(omega, p_clean)
        required = (needs.filter_scale, needs.p_clean, needs.bn_weight, needs.bn_bias)
        grads = kernels("eval_coefficients").eval_gradients(
            g1, gc, _dense(centre), norm, mix, required, config
        )
        return Gradients(*grads)

    def batch_statistics(
        self, mean: Tensor, m2: Tensor, hw: int, omega: Tensor | None, is_clean: Tensor | None, rows: int
    ) -> BatchStatistics:
        train = kernels("train_coefficients")
        config = _for_table("batch_statistics", mean.device, *mean.shape)
        stats = train.SampleStats(mean, m2, hw)
        return BatchStatistics(*train.batch_statistics(stats, _mix(omega, None, is_clean), rows, config))

    def training_coefficients(
        self,
        omega: Tensor | None,
        bn_weight: Tensor,
        bn_bias: Tensor,
        statistics: BatchStatistics,
        is_clean: Tensor | None,
        eps: float,
        batch: int,
    ) -> tuple[Tensor, Tensor]:
        norm = _norm(bn_weight, bn_bias, statistics.mean, statistics.var, eps)
        config = _for_table("train_coefficients", bn_weight.device, batch, bn_weight.shape[1])
        mix = _mix(omega, None, is_clean)
        return kernels("train_coefficients").train_coefficients(norm, mix, batch, config)

    def training_sums(
        self,
        g1: Tensor,
        gc: Tensor,
        mean: Tensor,
        omega: Tensor | None,
        bn_weight: Tensor,
        statistics: BatchStatistics,
        is_clean: Tensor | None,
        eps: float,
    ) -> Sums:
        norm = _norm(bn_weight, bn_weight, statistics.mean, statistics.var, eps)
        config = _for_table("train_gradients", g1.device, *g1.shape)
        mix = _mix(omega, None, is_clean)
        return Sums(*kernels("train_coefficients").train_sums(g1, gc, mean, norm, mix, config))

    def training_gradients(
        self,
        g1: Tensor,
        gc: Tensor,
        mean: Tensor,
        m2: Tensor,
        hw: int,
        omega: Tensor | None,
        bn_weight: Tensor,
        statistics: BatchStatistics,
        is_clean: Tensor | None,
        eps: float,
        need_scale: bool,
        sums: Sums | None,
    ) -> tuple[Gradients, Propagation]:
        train = kernels("train_coefficients")
        config = _for_table("train_gradients", g1.device, *g1.shape)
        stats = train.SampleStats(mean, m2, hw)
        norm = _norm(bn_weight, bn_weight, statistics.mean, statistics.var, eps)
        mix, n = _mix(omega, None, is_clean), _dense(statistics.n)
        own_sums = None if sums is None else train.TrainSums(*sums)
        grads = train.train_gradients(g1, gc, stats, norm, n, mix, need_scale, own_sums, config)
        by = Propagation(grads.by_grad, grads.by_input, grads.constant)
        return Gradients(grads.filter_scale, None, grads.weight, grads.bias), by


def network_coefficients(
    tables: Tensor, widths: Sequence[int], omega: Tensor | None, p_clean: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """scale and shift of each layer of a network in eval mode, in turn; tables ``[4, 2, T]``."""
    config = _for_table("network_coefficients", tables.device, len(p_clean), sum(widths))
    layout = _network_layout(tuple(widths), tables.device)
    pairs = kernels("eval_coefficients").network_coefficients(
        _network_norm(tables, eps), _mix(omega, p_clean), widths, layout, config
    )
    return tuple(table for pair in pairs for table in pair)


def network_gradients(
    d_scale: Tensor,
    d_shift: Tensor,
    tables: Tensor,
    omega: Tensor | None,
    p_clean: Tensor,
    eps: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ω and p from those of all scales and shifts side by side, ``[B, T]``."""
    config = _for_table("network_gradients", tables.device, *d_scale.shape)
    norm, mix = _network_norm(tables, eps), _mix(omega, p_clean)
    grads = kernels("eval_coefficients").eval_gradients(
        d_shift, d_scale, None, norm, mix, (*needs, False, False), config
    )
    return grads.filter_scale, grads.p_clean


@functools.lru_cache(maxsize=64)
def _network_layout(widths: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        layout: Tensor = kernels("eval_coefficients").network_layout(widths, device)
    return layout

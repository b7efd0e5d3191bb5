"""The passes and the [B, C] algebra on the Triton kernels of ``awnet.kernels``, imported on first use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from awnet.ops.backends.triton_convolutions import TritonConvolutions
from awnet.ops.coefficients import BatchStatistics, Gradients, Needs, Propagation, Sums
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
        how, out = _for_images("apply", u), u if in_place else None
        mask = torch.empty_like(u, dtype=torch.bool) if keep_mask else None
        y = kernels("passes").apply(u, _dense(scale), _dense(shift), other, relu, how, out=out, mask=mask)
        return y, u.new_empty(0, dtype=torch.bool) if mask is None else mask

    def reduce(self, grad: Tensor, u: Tensor, centre: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        how = _for_images("reduce", u)
        return kernels("passes").reduce(_alike(grad, u), u, _dense(centre), gate, how)

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
        launch = _for_images("propagate", grad)
        return kernels("passes").propagate(grad, u, _dense(centre), gate, *coefficients, residual, launch)

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
        algebra = kernels("coefficients")
        norm = algebra.Norm(_dense(bn_weight), _dense(bn_bias), _dense(running_mean), _dense(running_var))
        how = _for_table("testing_coefficients", bn_weight.device, batch, bn_weight.shape[1])
        return algebra.testing_coefficients(_dense(omega), norm, _dense(p_clean), eps, batch, how)

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
        algebra = kernels("coefficients")
        norm = algebra.Norm(_dense(bn_weight), _dense(bn_bias), _dense(running_mean), _dense(running_var))
        how = _for_table("testing_gradients", g1.device, *g1.shape)
        images = (g1, gc, _dense(centre), _dense(omega))
        return Gradients(*algebra.testing_gradients(*images, norm, _dense(p_clean), eps, needs, how))

    def batch_statistics(
        self, mean: Tensor, m2: Tensor, hw: int, omega: Tensor | None, is_clean: Tensor | None, rows: int
    ) -> BatchStatistics:
        how = _for_table("batch_statistics", mean.device, *mean.shape)
        found = kernels("coefficients").batch_statistics(
            mean, m2, hw, _dense(omega), _dense(is_clean), rows, how
        )
        return BatchStatistics(*found)

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
        algebra = kernels("coefficients")
        norm = algebra.Norm(_dense(bn_weight), _dense(bn_bias), statistics.mean, statistics.var)
        how = _for_table("training_coefficients", bn_weight.device, batch, bn_weight.shape[1])
        return algebra.training_coefficients(_dense(omega), norm, _dense(is_clean), eps, batch, how)

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
        how = _for_table("training_gradients", g1.device, *g1.shape)
        tables = (_dense(omega), _dense(bn_weight), statistics, _dense(is_clean))
        return Sums(*kernels("coefficients").training_sums(g1, gc, mean, *tables, eps, how))

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
        algebra = kernels("coefficients")
        how = _for_table("training_gradients", g1.device, *g1.shape)
        weight, kind = _dense(bn_weight), _dense(is_clean)
        given = None if sums is None else algebra.Sums(*sums)
        found = algebra.training_gradients(
            g1, gc, mean, m2, hw, _dense(omega), weight, statistics, kind, eps, need_scale, given, how
        )
        gradients = Gradients(found.omega, None, found.weight, found.bias)
        return gradients, Propagation(found.by_grad, found.by_input, found.constant)

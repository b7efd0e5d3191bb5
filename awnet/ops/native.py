"""The compiled module ``awnet._C``: whether it is there and fits this torch, and its passes."""

from __future__ import annotations

import importlib.util
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awnet.ops.algebra import BatchStatistics, Gradients, Propagation

_MARK = b"awnet-built-for-torch="
_REBUILD = "build it again with `pip install --no-build-isolation -e .` in the repository"


def _built_for(path: Path) -> str | None:
    """The torch version that the module was compiled against, read from the file without loading it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        start = view.find(_MARK)
        if start < 0:
            return None
        return view[start + len(_MARK) : view.find(b";", start)].decode()


def load(name: str = "awnet._C") -> str | None:
    """Loads the compiled module, which registers its operators. Returns None, or the reason why it cannot.

    A module that was built for another torch is never loaded: it could crash the process.
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        return f"the native module {name} is not built; {_REBUILD}"
    built_for = _built_for(Path(found.origin))
    if built_for is None:
        return f"{found.origin} was not built by awnet; {_REBUILD}"
    if built_for != torch.__version__:
        return f"{name} was built for torch {built_for} and this is torch {torch.__version__}; {_REBUILD}"
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} does not load ({error}); {_REBUILD}"
    return None


class NativePasses:
    """The passes and the algebra of ``torch.ops.awnet``: C++ on CPU tensors."""

    def __init__(self) -> None:
        self._ops = torch.ops.awnet

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._ops.statistics(u)

    def apply(self, u: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        return self._ops.apply(u, scale, shift, residual, relu)

    def reduce(self, grad: Tensor, u: Tensor, centre: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._ops.reduce(grad, u, centre, y)

    def propagate(
        self, grad: Tensor, u: Tensor, centre: Tensor, y: Tensor | None, how: Propagation, residual: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self._ops.propagate(grad, u, centre, y, *how, residual)

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
        return self._ops.testing_coefficients(
            _dense(omega), bn_weight, bn_bias, running_mean, running_var, _dense(p_clean), eps, batch
        )

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
    ) -> Gradients:
        d_omega, d_p, d_weight, d_bias = self._ops.testing_gradients(
            g1,
            gc,
            centre.contiguous(),
            _dense(omega),
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            _dense(p_clean),
            eps,
        )
        return Gradients(d_omega, d_p, d_weight, d_bias)

    def batch_statistics(
        self, mean: Tensor, m2: Tensor, hw: int, omega: Tensor | None, is_clean: Tensor | None, rows: int
    ) -> BatchStatistics:
        return BatchStatistics(
            *self._ops.batch_statistics(mean, m2, hw, _dense(omega), _dense(is_clean), rows)
        )

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
        return self._ops.training_coefficients(
            _dense(omega), bn_weight, bn_bias, statistics.mean, statistics.var, _dense(is_clean), eps, batch
        )

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
    ) -> tuple[Gradients, Propagation]:
        d_omega, d_weight, d_bias, *how = self._ops.training_gradients(
            g1, gc, mean, m2, hw, _dense(omega), bn_weight, *statistics, _dense(is_clean), eps
        )
        return Gradients(d_omega, None, d_weight, d_bias), Propagation(*how)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def build_info() -> dict[str, Any]:
    """How the native module was built; call it only where :func:`load` returned None."""
    module = importlib.import_module("awnet._C")
    info: dict[str, Any] = module.build_info()
    return info

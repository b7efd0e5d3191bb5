"""The ``cpp`` and ``cuda`` backends: the layer as one C++ operator of the compiled module ``awnet._C``.

The environment variable ``AWNET_NATIVE`` names the file of another build of the module (`make sanitize`).
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awnet.ops import self_check
from awnet.ops.args import EvalBackwardArgs, LayerArgs, Needs
from awnet.ops.autograd import Layer, OperatorBackend, define, describe
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

_MARK = b"awnet-built-for-torch="
INTERFACE = "interface=5"  # of the operators; as in csrc/module.cpp
REBUILD = "build it again with `pip install --no-build-isolation -e .` in the repository"


def _built_for(path: Path) -> tuple[str, bool] | None:
    """The torch version that the module was compiled for, and whether its operators are this version's.

    Both are read from the file without loading it.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        start = view.find(_MARK)
        if start < 0:
            return None
        version, _, rest = view[start + len(_MARK) : start + 200].partition(b";")
        return version.decode(), rest.startswith(INTERFACE.encode() + b";")


def load(name: str = "awnet._C") -> str | None:
    """Loads the compiled module, which registers its operators. Returns None, or the reason why it cannot.

    A module that was built for another torch, or from sources with other operators, is never loaded: it could
    crash the process.
    """
    path = os.environ.get("AWNET_NATIVE") if name == "awnet._C" else None
    if path is not None and not Path(path).is_file():
        return f"AWNET_NATIVE is not a file: {path}"
    spec = importlib.util.spec_from_file_location(name, path) if path else importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return f"the native module {name} is not built; {REBUILD}"
    built_for = _built_for(Path(spec.origin))
    if built_for is None:
        return f"{spec.origin} was not built by awnet; {REBUILD}"
    version, same_operators = built_for
    if version != torch.__version__:
        return f"{name} was built for torch {version} and this is torch {torch.__version__}; {REBUILD}"
    if not same_operators:
        return f"{spec.origin} was built from another version's sources; {REBUILD}"
    try:
        if path is None:
            importlib.import_module(name)
        elif name not in sys.modules:
            assert spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
    except ImportError as error:
        return f"{name} does not load ({error}); {REBUILD}"
    return None


@functools.cache
def cuda_obstacle() -> str | None:
    """Why the module that :func:`load` has loaded cannot serve CUDA devices; None if it can."""
    if build_info()["cuda"]:
        return None
    return (
        "awnet._C was built without its CUDA part; with nvcc on the PATH "
        "`AWNET_BUILD=cuda pip install --no-build-isolation -e .` builds it or says what is missing"
    )


def build_info() -> dict[str, Any]:
    """How the native module was built; call it only if :func:`load` returned None."""
    module = importlib.import_module("awnet._C")
    info: dict[str, Any] = module.build_info()
    return info


@functools.cache
def _layer() -> tuple[Layer, str | None]:
    """The operator ``awnet::layer_native``, and why it cannot run, or None."""
    define("native")
    reason = load()
    return (_unavailable if reason else describe("native")), reason


def _unavailable(*flat: Any) -> Any:
    raise AssertionError("awnet.ops.dispatch never selects a backend that is not supported")


class NativePasses(Passes):
    """The operators of ``awnet._C`` on one device; :func:`load` must have returned None."""

    def statistics(self, u: Tensor) -> Any:
        return torch.ops.awnet.statistics(u)

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
    ) -> Any:
        """As in :class:`Passes`, but never in place."""
        return torch.ops.awnet.apply(u, scale, shift, residual, activation, keep_mask)

    def reduce(
        self, grad: Tensor, u: Tensor, center: Tensor, relu_mask: Tensor | None, slope: Tensor | None = None
    ) -> Any:
        return torch.ops.awnet.reduce(grad, u, center, relu_mask, slope)

    def propagate(
        self,
        grad: Tensor,
        u: Tensor | None,
        center: Tensor | None,
        relu_mask: Tensor | None,
        propagation: Propagation,
        residual: bool,
        slope: Tensor | None = None,
    ) -> Any:
        return torch.ops.awnet.propagate(grad, u, center, relu_mask, *propagation, residual, slope)

    def eval_coefficients(self, norm: Norm, mix: Mix, batch: int) -> Any:
        return torch.ops.awnet.eval_coefficients(*mix[:2], *norm, batch)

    def eval_gradients(self, sums: Reduced, norm: Norm, mix: Mix, needs: Needs) -> Gradients:
        required = [needs.filter_scale, needs.p_clean, needs.bn_weight, needs.bn_bias]
        return Gradients(*torch.ops.awnet.eval_gradients(*sums, *mix[:2], *norm, required))

    def batch_statistics(self, stats: SampleStats, mix: Mix, stat_rows: int) -> BatchStats:
        return BatchStats(*torch.ops.awnet.batch_statistics(*stats, *mix[::2], stat_rows))

    def train_coefficients(self, norm: Norm, mix: Mix, batch: int) -> Any:
        return torch.ops.awnet.train_coefficients(*mix[::2], *norm, batch)

    def train_sums(self, sums: Reduced, norm: Norm, mix: Mix) -> TrainSums:
        return TrainSums(*torch.ops.awnet.train_sums(*sums, *mix[::2], *norm))

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
        through = None if totals is None else totals.through
        d_filter_scale, d_weight, d_bias, *by = torch.ops.awnet.train_gradients(
            *sums, *stats, *mix[::2], *norm, n, need_filter_scale, through
        )
        if totals is not None:  # the gradients of γ and β are known already
            d_weight, d_bias = totals.bn_weight, totals.bn_bias
        return Gradients(d_filter_scale, None, d_weight, d_bias), Propagation(*by)


class _Native(OperatorBackend):
    def __init__(self) -> None:
        operator, self._obstacle = _layer()
        super().__init__(operator)


class Cpp(_Native):
    name = "cpp"
    summary = "C++ kernels (CPU)"

    def not_supported(self, args: LayerArgs) -> str | None:
        if args.input.device.type != "cpu":
            return f"it runs on CPUs, and the input is on {args.input.device}"
        if args.input.dtype == torch.float64:
            return NO_FLOAT64
        return self._obstacle


@constant_in_graphs
def _obstacle_on(device: torch.device) -> str | None:
    reason = device_obstacle(device) or _layer()[1] or cuda_obstacle()
    return reason or self_check.obstacle(CHECKED, device)


def _probe(device: torch.device) -> str | None:
    reason: str | None = importlib.import_module("awnet._C").self_test()
    return reason


def _sources() -> Iterator[Path]:
    yield Path(str(sys.modules["awnet._C"].__file__))


def _eval_backward(args: EvalBackwardArgs) -> tuple[Tensor, Tensor | None, Reduced | None]:
    """``Passes.eval_backward`` by the kernel that the operator of a layer runs."""
    d_u, d_residual, g1, gc, center = torch.ops.awnet.eval_backward(**args._asdict())
    reduced = Reduced(g1, gc, center if args.centered else None) if args.sums else None
    return d_u, d_residual if args.residual else None, reduced


CHECKED = self_check.Kernels("cuda", NativePasses(), _probe, _sources, {"eval_backward": _eval_backward})


class Cuda(_Native):
    name = "cuda"
    summary = "CUDA C++ kernels (CUDA devices)"

    def not_supported(self, args: LayerArgs) -> str | None:
        reason = _obstacle_on(args.input.device)
        return NO_FLOAT64 if reason is None and args.input.dtype == torch.float64 else reason

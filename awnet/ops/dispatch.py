"""Selects the backend that runs a call, and gives the reasons why the others do not.

If no backend is requested, the first of ``BACKENDS`` that supports the call runs it. A requested backend
(argument, ``use_backend``, ``AWNET_BACKEND``) runs the call or raises an error with the reason: there is no
silent fallback.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from awnet.ops import self_check
from awnet.ops.args import LayerArgs, MixNorm
from awnet.ops.backends import amx
from awnet.ops.backends.base import Backend
from awnet.ops.backends.eager import Eager
from awnet.ops.backends.native import Cpp, Cuda
from awnet.ops.backends.reference import Reference
from awnet.ops.backends.triton import Triton
from awnet.ops.transforms import transform

# In order of preference. In the 62 rows of benchmarks/results/nvidia-h200.csv, outside a CUDA graph, cuda ran
# single layers 1.3 to 4.2 times (median 2.6) as fast as triton. Frozen networks: select_network.
BACKENDS: tuple[Backend, ...] = (Cuda(), Triton(), Cpp(), Eager(), Reference())
_BY_NAME = {backend.name: backend for backend in BACKENDS}

_requested: list[str | None] = [os.environ.get("AWNET_BACKEND") or None]


def _named(name: object, source: str) -> Backend:
    if not isinstance(name, str):
        raise TypeError(f"{source} must be a backend's name or None, got {type(name).__name__}")
    if name not in _BY_NAME:
        raise ValueError(f"{source}: unknown backend {name!r}; available are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs every layer call of the ``with`` block on backend ``name``; None lets awnet choose.

    It applies to the whole process, all threads included, and overrides ``AWNET_BACKEND``; an explicit
    ``backend=`` overrides both. Raises ValueError for an unknown name.
    """
    if name is not None:
        _named(name, "use_backend")
    _requested.append(name)
    try:
        yield
    finally:
        _requested.pop()


def chosen_backend() -> str | None:
    """The backend that ``use_backend`` or ``AWNET_BACKEND`` names, or None."""
    return _requested[-1]


def default_backend(device: str) -> str:
    """The backend that runs float32 layers on ``device``: the requested one, or the first that supports them.

    "cuda+triton" if cuda runs single layers and triton frozen networks.
    """
    names = [choose(_probe(device), None).name for choose in (select, select_network)]
    return chosen_backend() or "+".join(dict.fromkeys(names))


def _reason(backend: Backend, args: LayerArgs, transformed: str | None) -> str | None:
    return transformed if transformed and not backend.every_transform else backend.not_supported(args)


def select(args: LayerArgs, backend: str | Backend | None) -> Backend:
    """The backend that runs ``args``; a :class:`Backend` object is returned unchanged.

    Raises ValueError if no backend supports the call, or if the requested one is unknown or does not.
    """
    transformed = transform(args.tensors())
    source = "backend"
    if backend is None:
        backend = chosen_backend()
        source = "AWNET_BACKEND" if len(_requested) == 1 else "use_backend"
    if backend is None:
        for candidate in BACKENDS:
            reason = _reason(candidate, args, transformed)
            if reason is None:
                return candidate
            if reason.startswith(self_check.FAILED):
                self_check.report(candidate.name, reason)
        reasons = (f"{candidate.name}: {_reason(candidate, args, transformed)}" for candidate in BACKENDS)
        raise ValueError(f"no backend can run this call; {'; '.join(reasons)}")
    if isinstance(backend, Backend):
        return backend
    chosen = _named(backend, source)
    reason = _reason(chosen, args, transformed)
    if reason is not None:
        supporting = [
            candidate.name for candidate in BACKENDS if _reason(candidate, args, transformed) is None
        ]
        others = f"{supporting[0]!r} can run it" if supporting else "no other backend can run it"
        raise ValueError(f"{source} {chosen.name!r} cannot run this call: {reason}; {others}")
    return chosen


def select_network(args: LayerArgs, backend: str | None) -> Backend:
    """The backend that runs a frozen network with layers like ``args``; raises as :func:`select`.

    If no backend is requested, ``triton`` comes before ``cuda``. Attacks replay frozen networks as CUDA
    graphs, in which the time of the host does not matter, and the advantage of cuda was time of the host.
    benchmarks/results/nvidia-h200-train.csv was measured with triton; cuda in a graph was not measured.
    """
    chosen = select(args, backend)
    if chosen.name == "cuda" and backend is None and chosen_backend() is None:
        triton = _BY_NAME["triton"]
        if _reason(triton, args, transform(args.tensors())) is None:
            return triton
    return chosen


@dataclass(frozen=True)
class Explanation:
    """The backend that would run a call, and for each other backend the reason why it is not used.

    ``amx`` is set for bfloat16 calls on the ``cpp`` backend: whether a frozen network of such layers runs on
    AMX tiles, or why not.
    """

    backend: str
    others: dict[str, str]
    amx: str | None = None
    self_check: str | None = None  # the result of the backend's self-check, if there is one

    def __str__(self) -> str:
        lines = [f"{self.backend}: runs this call ({_BY_NAME[self.backend].summary})"]
        if self.self_check is not None:
            lines.append(self.self_check)
        if self.amx is not None:
            lines.append(f"in a frozen network: {self.amx}")
        lines += [f"{name}: not used, {reason}" for name, reason in self.others.items()]
        return "\n".join(lines)


def explain_call(args: LayerArgs, backend: str | None) -> Explanation:
    """See :func:`awnet.ops.explain`."""
    selected, transformed = select(args, backend), transform(args.tensors())
    others: dict[str, str] = {}
    for candidate in BACKENDS:
        if candidate is not selected:
            reason = _reason(candidate, args, transformed)
            others[candidate.name] = reason or (
                "another backend was requested"
                if BACKENDS.index(candidate) < BACKENDS.index(selected)
                else f"it could run it, but {selected.name} is preferred"
            )
    amx_support = _amx_support(args) if selected.name == "cpp" else None
    return Explanation(selected.name, others, amx_support, self_check.status(selected.name))


def _amx_support(args: LayerArgs) -> str | None:
    if args.input.dtype != torch.bfloat16:
        return None
    obstacle = amx.obstacle() or amx.layer_obstacle(args.conv.groups, args.activation)
    if obstacle is not None:
        return f"not on AMX tiles, {obstacle}"
    return "on AMX tiles" + (" (emulated)" if amx.mode() == "emulate" else "")


def available_backends(device: str | None = None) -> dict[str, str | None]:
    """Maps each backend to None if it can run on this machine, else to the reason.

    Each is checked with a small float32 call on ``device``; by default on the CPU and, if there is one, on
    the CUDA device.
    """
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return dict.fromkeys((backend.name for backend in BACKENDS), "there is no CUDA device")
    devices = [device] if device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    reasons: dict[str, str | None] = {}
    for backend in BACKENDS:
        by_device = [backend.not_supported(_probe(device)) for device in devices]
        reasons[backend.name] = None if None in by_device else by_device[-1]
    return reasons


def _probe(device: str) -> LayerArgs:
    x = torch.empty(1, 1, 1, 1, device=device)
    table = torch.empty(1, 1, device=device)
    return LayerArgs(x, x, norm=MixNorm(table, table, table, table), filter_scale=table, activation="relu")

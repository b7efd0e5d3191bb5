"""Which implementation runs a call, and why the others do not.

A backend is a name, a predicate that gives the reason why it cannot run a call (None if it can), and a
function that runs it and, in training, updates the running statistics. With no backend named, the first of
``BACKENDS`` that can run a call takes it. A backend named by the caller (argument, ``use_backend``,
``AWNET_BACKEND``) runs it or raises with the reason: nothing falls back in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awnet import reference
from awnet.ops.autograd import Call, Layer, Saved, describe, kept, memory_format, register
from awnet.ops.backends import amx, native
from awnet.ops.backends import triton as triton_backend
from awnet.ops.backends.eager import EagerPasses
from awnet.ops.transforms import transform

Momentum = float | Tensor


@dataclass(frozen=True)
class Backend:
    """One implementation of the layer."""

    name: str
    summary: str
    refusal: Callable[[Call], str | None]
    run: Callable[[Call, Momentum], Tensor]
    plain: bool = False  # made of torch's own operations alone, which every transform of torch knows


def _runner(operator: Layer) -> Callable[[Call, Momentum], Tensor]:
    def run(call: Call, momentum: Momentum) -> Tensor:
        y, *rest = operator(*call, *kept(call))
        if call.training and call.running_mean is not None:
            saved = Saved(*rest)
            if call.process_group and y.shape[2] * y.shape[3] == 1:
                _check_more_than_one_value(saved.n)
            _update_running_statistics(call, momentum, saved)
        return y

    return run


def _check_more_than_one_value(n: Tensor) -> None:
    # over ranks the counts are known afterwards only; all ranks see the same and raise alike
    if torch.compiler.is_compiling() or n.is_meta or (n.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if bool((n == 1).any()):
        raise ValueError(
            "expected more than 1 value per channel when training, got one in a branch over all ranks"
        )


@torch.no_grad()
def _update_running_statistics(call: Call, momentum: Momentum, saved: Saved) -> None:
    assert call.running_mean is not None
    assert call.running_var is not None
    n = saved.n[:, None]
    rate = momentum[:, None].to(n) if isinstance(momentum, Tensor) else momentum
    unbiased = saved.batch_var * (n / (n - 1).clamp(min=1))
    for running, batch in ((call.running_mean, saved.batch_mean), (call.running_var, unbiased)):
        moved = (1 - rate) * running + rate * batch
        running.copy_(torch.where(n > 0, moved, running))


def _literal(call: Call, momentum: Momentum) -> Tensor:
    """The call on ``awnet.reference``, in the input's memory format."""
    assert call.input is not None
    return _equations(call, momentum).contiguous(memory_format=memory_format(call.input))


def _equations(call: Call, momentum: Momentum) -> Tensor:
    convolution: dict[str, Any] = {
        "stride": tuple(call.stride),
        "padding": tuple(call.padding),
        "dilation": tuple(call.dilation),
        "groups": call.groups,
    }
    norm: dict[str, Any] = {
        "p_clean": call.p_clean,
        "is_clean": call.is_clean,
        "training": call.training,
        "momentum": momentum,
        "eps": call.eps,
    }
    images: list[Any] = [call.input, call.weight, call.filter_scale]
    tables: list[Any] = [call.bn_weight, call.bn_bias, call.running_mean, call.running_var]
    if call.bn_weight is None:
        y = reference.filter_scaled_conv2d(*images, **convolution)
        if call.bn_bias is not None:
            y = y + call.bn_bias.to(y.dtype)[:, :, None, None]
        y = y if call.residual is None else y + call.residual
        return torch.relu(y) if call.relu else y
    if call.weight is None:
        return reference.mix_batch_norm(images[0], *tables, **norm)
    last = {"residual": call.residual, "activation": "relu" if call.relu else None}
    return reference.aw_conv2d(*images, *tables, **(norm | convolution | last))


def _never(call: Call, momentum: Momentum) -> Tensor:
    raise AssertionError("select() refuses a backend that is not there")


_native_obstacle = native.load()
_native = _never if _native_obstacle else _runner(describe("native"))


def _cpp_refuses(call: Call) -> str | None:
    assert call.input is not None
    if call.input.device.type != "cpu":
        return f"it runs on CPUs, and the input is on {call.input.device}"
    if call.input.dtype == torch.float64:
        return "it has no float64 (use eager or reference)"
    return _native_obstacle


def _cuda_refuses(call: Call) -> str | None:
    assert call.input is not None
    reason = triton_backend.device_obstacle(call.input.device)
    if reason is not None:
        return reason
    if call.input.dtype == torch.float64:
        return "it has no float64 (use eager or reference)"
    return _native_obstacle or native.cuda_obstacle()


def _triton_refuses(call: Call) -> str | None:
    assert call.input is not None
    return triton_backend.obstacle(call.input)


def _runs_anything(call: Call) -> str | None:
    return None


def _reference_refuses(call: Call) -> str | None:
    return "it knows nothing of process groups" if call.process_group else None


# in order of preference
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "triton",
        "Triton kernels (CUDA devices)",
        _triton_refuses,
        _runner(register("triton", triton_backend.TritonPasses())),
    ),
    Backend("cuda", "CUDA C++ kernels (CUDA devices)", _cuda_refuses, _native),
    Backend("cpp", "C++ kernels (CPU)", _cpp_refuses, _native),
    Backend(
        "eager",
        "one convolution and one affine map in plain torch, gradients by the centred formulas",
        _runs_anything,
        _runner(register("eager", EagerPasses())),
    ),
    Backend(
        "reference",
        "the paper's equations literally, gradients by autograd",
        _reference_refuses,
        _literal,
        plain=True,
    ),
)
_BY_NAME = {backend.name: backend for backend in BACKENDS}

_chosen: list[str | None] = [os.environ.get("AWNET_BACKEND") or None]


def _named(name: object, source: str) -> Backend:
    if not isinstance(name, str):
        raise TypeError(f"{source} must be a backend's name or None, got {type(name).__name__}")
    if name not in _BY_NAME:
        raise ValueError(f"{source} names no backend: {name!r}; there are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs every layer call of the ``with`` block on backend ``name``; None gives the choice back to awnet.

    It holds for the process, all threads included, and outranks ``AWNET_BACKEND``; an explicit ``backend=``
    outranks both. Raises ValueError for an unknown name.
    """
    if name is not None:
        _named(name, "use_backend")
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def chosen_backend() -> str | None:
    """The backend that ``use_backend`` or ``AWNET_BACKEND`` names, or None."""
    return _chosen[-1]


def default_backend(device: str) -> str:
    """The backend that a float32 layer on ``device`` takes: the named one, or the first that can run it."""
    return chosen_backend() or select(_probe(device), None).name


def _refusal(backend: Backend, call: Call, transformed: str | None) -> str | None:
    return transformed if transformed and not backend.plain else backend.refusal(call)


def select(call: Call, backend: str | None) -> Backend:
    """The backend that runs ``call``. ValueError where none can, or the named one is unknown or cannot."""
    transformed = transform(call)
    source = "backend"
    if backend is None:
        backend = chosen_backend()
        source = "AWNET_BACKEND" if len(_chosen) == 1 else "use_backend"
    if backend is None:
        for candidate in BACKENDS:
            if _refusal(candidate, call, transformed) is None:
                return candidate
        reasons = (f"{one.name}: {_refusal(one, call, transformed)}" for one in BACKENDS)
        raise ValueError(f"no backend can run this call; {'; '.join(reasons)}")
    chosen = _named(backend, source)
    reason = _refusal(chosen, call, transformed)
    if reason is not None:
        able = [one.name for one in BACKENDS if _refusal(one, call, transformed) is None]
        others = f"{able[0]!r} can" if able else "no other can"
        raise ValueError(f"{source} {chosen.name!r} cannot run this call, {others}: {reason}")
    return chosen


@dataclass(frozen=True)
class Explanation:
    """What a call would run on: ``backend``, and for each other one, in order of preference, why not.

    ``amx``, for a bfloat16 call on the ``cpp`` backend only: whether a frozen network of such layers runs on
    AMX tiles, or why not.
    """

    backend: str
    others: dict[str, str]
    amx: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.backend}: runs this call ({_BY_NAME[self.backend].summary})"]
        if self.amx is not None:
            lines.append(f"in a frozen network: {self.amx}")
        lines += [f"{name}: not taken, {reason}" for name, reason in self.others.items()]
        return "\n".join(lines)


def explain_call(call: Call, backend: str | None) -> Explanation:
    """See :func:`awnet.ops.explain`."""
    taken, transformed = select(call, backend), transform(call)
    others: dict[str, str] = {}
    for candidate in BACKENDS:
        if candidate is not taken:
            reason = _refusal(candidate, call, transformed)
            others[candidate.name] = reason or (
                "another one was named"
                if BACKENDS.index(candidate) < BACKENDS.index(taken)
                else f"it could run it, but {taken.name} is preferred"
            )
    return Explanation(taken.name, others, _on_tiles(call) if taken.name == "cpp" else None)


def _on_tiles(call: Call) -> str | None:
    assert call.input is not None
    if call.input.dtype != torch.bfloat16:
        return None
    obstacle = amx.obstacle()
    if obstacle is not None:
        return f"not on AMX tiles, {obstacle}"
    if call.groups != 1:
        return "not on AMX tiles, which run no grouped convolutions"
    return "on AMX tiles" + (" (emulated)" if amx.mode() == "emulate" else "")


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None where it can run on this machine and else the reason why not.

    Asked for a small float32 call on the CPU and, where there is one, on the CUDA device.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    reasons: dict[str, str | None] = {}
    for backend in BACKENDS:
        answers = [backend.refusal(_probe(device)) for device in devices]
        reasons[backend.name] = None if None in answers else answers[-1]
    return reasons


def _probe(device: str) -> Call:
    x = torch.empty(1, 1, 1, 1, device=device)
    table = torch.empty(1, 1, device=device)
    tables = (table, table, None, table, table)
    return Call(x, x, table, None, *tables, None, False, 1e-5, True, (1, 1), (0, 0), (1, 1), 1)

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

import torch
from torch import Tensor

from awnet import reference
from awnet.ops.args import LayerArgs, MixNorm, Saved, flatten
from awnet.ops.autograd import Layer, define, describe, kept, memory_format, register
from awnet.ops.backends import amx, native
from awnet.ops.backends import triton as triton_backend
from awnet.ops.backends.eager import EagerPasses
from awnet.ops.transforms import transform


@dataclass(frozen=True)
class Backend:
    """One implementation of the layer."""

    name: str
    summary: str
    refusal: Callable[[LayerArgs], str | None]
    run: Callable[[LayerArgs], Tensor]
    plain: bool = False  # made of torch's own operations alone, which every transform of torch knows


def _runner(operator: Layer) -> Callable[[LayerArgs], Tensor]:
    def run(args: LayerArgs) -> Tensor:
        saved = Saved(*operator(*flatten(args, *kept(args))))
        norm = args.norm
        if norm is not None and norm.training:
            if norm.process_group and saved.y.shape[2] * saved.y.shape[3] == 1:
                _check_more_than_one_value(saved.n)
            _update_running_statistics(norm, saved)
        return saved.y

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
def _update_running_statistics(norm: MixNorm, saved: Saved) -> None:
    n = saved.n[:, None]
    momentum = norm.momentum
    rate = momentum[:, None].to(n) if isinstance(momentum, Tensor) else momentum
    unbiased = saved.batch_var * (n / (n - 1).clamp(min=1))
    for running, batch in ((norm.mean, saved.batch_mean), (norm.var, unbiased)):
        moved = (1 - rate) * running + rate * batch
        running.copy_(torch.where(n > 0, moved, running))


def _literal(args: LayerArgs) -> Tensor:
    """The call on ``awnet.reference``, in the input's memory format."""
    return _equations(args).contiguous(memory_format=memory_format(args.input))


def _equations(args: LayerArgs) -> Tensor:
    conv, norm = args.conv, args.norm
    u = args.input
    if args.weight is not None:
        u = reference.filter_scaled_conv2d(
            args.input,
            args.weight,
            args.filter_scale,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
        )
    if norm is not None:
        y = reference.mix_batch_norm(
            u,
            norm.weight,
            norm.bias,
            norm.mean,
            norm.var,
            p_clean=args.p_clean,
            is_clean=args.is_clean,
            training=norm.training,
            momentum=norm.momentum,
            eps=norm.eps,
        )
    else:
        y = u if args.shift is None else u + args.shift.to(u.dtype)[:, :, None, None]
    y = y if args.residual is None else y + args.residual
    return torch.relu(y) if args.activation == "relu" else y


def _never(args: LayerArgs) -> Tensor:
    raise AssertionError("select() refuses a backend that is not there")


define("native")
_native_obstacle = native.load()
_native = _never if _native_obstacle else _runner(describe("native"))


def _cpp_refuses(args: LayerArgs) -> str | None:
    if args.input.device.type != "cpu":
        return f"it runs on CPUs, and the input is on {args.input.device}"
    if args.input.dtype == torch.float64:
        return "it has no float64 (use eager or reference)"
    return _native_obstacle


def _cuda_refuses(args: LayerArgs) -> str | None:
    reason = triton_backend.device_obstacle(args.input.device)
    if reason is not None:
        return reason
    if args.input.dtype == torch.float64:
        return "it has no float64 (use eager or reference)"
    return _native_obstacle or native.cuda_obstacle()


def _triton_refuses(args: LayerArgs) -> str | None:
    return triton_backend.obstacle(args.input)


def _runs_anything(args: LayerArgs) -> str | None:
    return None


def _reference_refuses(args: LayerArgs) -> str | None:
    return "it knows nothing of process groups" if args.norm is not None and args.norm.process_group else None


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


def _refusal(backend: Backend, args: LayerArgs, transformed: str | None) -> str | None:
    return transformed if transformed and not backend.plain else backend.refusal(args)


def select(args: LayerArgs, backend: str | None) -> Backend:
    """The backend that runs ``args``. ValueError where none can, or the named one is unknown or cannot."""
    transformed = transform(args.differentiable())
    source = "backend"
    if backend is None:
        backend = chosen_backend()
        source = "AWNET_BACKEND" if len(_chosen) == 1 else "use_backend"
    if backend is None:
        for candidate in BACKENDS:
            if _refusal(candidate, args, transformed) is None:
                return candidate
        reasons = (f"{one.name}: {_refusal(one, args, transformed)}" for one in BACKENDS)
        raise ValueError(f"no backend can run this call; {'; '.join(reasons)}")
    chosen = _named(backend, source)
    reason = _refusal(chosen, args, transformed)
    if reason is not None:
        able = [one.name for one in BACKENDS if _refusal(one, args, transformed) is None]
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


def explain_call(args: LayerArgs, backend: str | None) -> Explanation:
    """See :func:`awnet.ops.explain`."""
    taken, transformed = select(args, backend), transform(args.differentiable())
    others: dict[str, str] = {}
    for candidate in BACKENDS:
        if candidate is not taken:
            reason = _refusal(candidate, args, transformed)
            others[candidate.name] = reason or (
                "another one was named"
                if BACKENDS.index(candidate) < BACKENDS.index(taken)
                else f"it could run it, but {taken.name} is preferred"
            )
    return Explanation(taken.name, others, _on_tiles(args) if taken.name == "cpp" else None)


def _on_tiles(args: LayerArgs) -> str | None:
    if args.input.dtype != torch.bfloat16:
        return None
    obstacle = amx.obstacle()
    if obstacle is not None:
        return f"not on AMX tiles, {obstacle}"
    if args.conv.groups != 1:
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


def _probe(device: str) -> LayerArgs:
    x = torch.empty(1, 1, 1, 1, device=device)
    table = torch.empty(1, 1, device=device)
    return LayerArgs(x, x, norm=MixNorm(table, table, table, table), filter_scale=table, activation="relu")

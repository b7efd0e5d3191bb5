"""Launches kernels on the device of their tensors, or records launches to compile them without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction
from triton.runtime import driver as triton_driver

# key of awnet/ops/configs/*.json → its launch parameters
Table = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Case:
    """One call whose kernels ``kernels/ahead.py`` compiles.

    ``run`` calls launch functions with tensors on the ``meta`` device; every kernel that it launches is
    compiled with that call's types, constants and divisibility. ``instruction`` is the tensor-core
    instruction that kernels with a ``tl.dot`` must have: "wgmma" (on sm_90; "mma" on sm_80), "mma", or ""
    for no instruction (float32 in full precision).
    """

    name: str
    run: Callable[[], object]
    instruction: str = ""
    quick: bool = False  # whether the quick test compiles it


@dataclass(frozen=True)
class Launched:
    """One recorded launch."""

    kernel: Any
    arguments: dict[str, Any]  # by the kernel's own names, constants included
    warps: int
    stages: int


_record: list[list[Launched]] = []


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """In the ``with`` block :func:`launch` runs nothing and appends its launches to the list."""
    launches: list[Launched] = []
    _record.append(launches)
    try:
        yield launches
    finally:
        _record.pop()


def launch(
    kernel: Any, programs: int, *arguments: Any, warps: int = 4, stages: int = 3, **constants: Any
) -> None:
    """Runs ``kernel`` in ``programs`` programs on the device of its first tensor. 0 programs do nothing.

    Triton's launch path takes about 20 µs of Python. Its result is cached for calls with the same dtypes,
    alignments, sizes and constants, which take about 5 µs.

    Args:
        kernel: a ``triton.jit`` function.
        programs: size of the one-dimensional grid.
        arguments: the kernel's run-time arguments in order; None for an unused pointer.
        warps, stages: Triton's num_warps and num_stages.
        constants: the kernel's ``tl.constexpr`` arguments.
    """
    if programs >= 2**31:
        raise ValueError(f"{kernel.__name__} needs {programs} programs; a grid holds fewer than 2^31")
    if _record:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        _record[-1].append(Launched(kernel, named, warps, stages))
        return
    if programs == 0:
        return
    device = _device(arguments)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, *arguments, warps=warps, stages=stages, **constants)
        return
    if (
        type(kernel) is not JITFunction  # the interpreter's
        or _observers is None
        or any(_observers)
        or kernel.pre_run_hooks
        or torch.compiler.is_dynamo_compiling()
    ):
        kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages, **constants)
        return
    driver = triton_driver.active
    index = driver.get_current_device()
    # Triton compiles a variant per pointer dtype and alignment to 16 bytes, and per integer that is 1 or a
    # multiple of 16; equal integers share a plan, and so do all floats. Each plan references its kernel, so
    # that the id is not reused.
    key = (id(kernel), index, warps, stages, *constants.items(), *[
        x if (kind := type(x)) is int or x is None
        else (x.dtype, x.data_ptr() & 15) if kind is Tensor or isinstance(x, Tensor)
        else kind if kind is float
        else (kind, x)
        for x in arguments
    ])  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        compiled = kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages, **constants)
        plan = _plan(kernel, compiled, len(arguments), constants)
        if plan is not None:
            _plans[key] = plan
        return
    run, function, metadata, last, _ = plan
    stream = driver.get_current_stream(index)
    run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments, *last)


def _device(arguments: tuple[Any, ...]) -> torch.device:
    for x in arguments:
        if isinstance(x, Tensor):
            return x.device
    raise TypeError("a kernel needs a tensor, whose device it runs on")


# the cached launch of a compiled kernel: launcher, function, packed metadata, constants in order, the kernel
_Plan = tuple[Callable[..., None], Any, Any, tuple[Any, ...], Any]
_plans: dict[tuple[Any, ...], _Plan] = {}

# Triton's hooks (for profilers) and knobs: while one of them is set, Triton's launch path is used. None for
# versions of Triton whose launchers may take other arguments.
_observers: tuple[Any, ...] | None = None
if triton.__version__.startswith(("3.6.", "3.7.", "3.8.")):
    _runtime = triton.knobs.runtime
    _observers = (
        _runtime.launch_enter_hook.calls,
        _runtime.launch_exit_hook.calls,
        vars(_runtime),
        vars(triton.knobs.compilation),
    )


def _plan(kernel: Any, compiled: Any, arguments: int, constants: dict[str, Any]) -> _Plan | None:
    """How to launch ``compiled`` again; None if the constants are not the kernel's last parameters."""
    names = [parameter.name for parameter in kernel.params]
    if compiled is None or sorted(names[arguments:]) != sorted(constants):
        return None
    last = tuple(constants[name] for name in names[arguments:])
    return compiled.run, compiled.function, compiled.packed_metadata, last, kernel


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()

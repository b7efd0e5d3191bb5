"""Launches kernels on the device of their tensors, or records launches to compile them without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# key of awnet/ops/configs/*.json → its launch parameters
Table = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Case:
    """One call whose kernels ``kernels/ahead.py`` compiles.

    ``run`` calls launch functions with tensors on the ``meta`` device; every kernel that it launches is
    compiled with that call's types, constants and divisibility. ``instruction`` is the tensor-core
    instruction that kernels with a ``tl.dot`` must have: "wgmma" (on sm_90; "mma" on sm_80), "mma", or ""
    where none can be (float32 in full precision).
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
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages, **constants)
    else:
        kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages, **constants)


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()

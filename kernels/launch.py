"""How every kernel is launched: on its tensors' device, or recorded and compiled without one."""

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
    quick: bool = False  # in the part that the quick test compiles


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
    """Inside the block :func:`launch` runs nothing and adds what it would have run to the list it yields."""
    launches: list[Launched] = []
    _record.append(launches)
    try:
        yield launches
    finally:
        _record.pop()


def launch(
    kernel: Any, programs: int, *arguments: Any, warps: int = 4, stages: int = 3, **constants: Any
) -> None:
    """Runs ``kernel`` in ``programs`` programs on the device of its first tensor; with none it does nothing.

    Args:
        kernel: a ``triton.jit`` function.
        programs: size of the one-dimensional grid.
        arguments: the kernel's run-time arguments in order; None for a pointer that is not used.
        warps, stages: Triton's num_warps and num_stages.
        constants: the kernel's ``tl.constexpr`` arguments.
    """
    if programs >= 2**31:
        raise ValueError(f"{kernel.__name__} would take {programs} programs; a grid holds fewer than 2^31")
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

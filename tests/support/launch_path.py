"""Triton's launch path on a machine without a GPU, with kernels that are compiled and never run.

:func:`launch_path` replaces Triton's active driver. A launch then passes Triton's own binder, specialization,
cache and compiler (sm_90, down to a cubin) and ends in an empty launcher, which counts it. The ``triton``
backend accepts CPU tensors meanwhile. Outputs hold whatever their memory held: only launches, shapes, dtypes
and host time mean anything. Triton's cache on disk keeps the compiled kernels for the next run.

The interpreter and the compiler cannot share a process: without TRITON_INTERPRET=1 only.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

_DEVICE = 97  # Triton caches compiled kernels by the device's number: one that no machine has


class Launches:
    """What was launched since the beginning, or since :meth:`clear`."""

    def __init__(self) -> None:
        self.kernels: list[str] = []  # names, in order
        self.functions: list[object] = []  # their compiled variants
        self.compiled = 0  # number of loaded kernels; each variant of a kernel counts

    @property
    def counts(self) -> dict[str, int]:
        """Number of launches by the kernel's name."""
        return dict(Counter(self.kernels))

    def clear(self) -> None:
        self.kernels.clear()
        self.functions.clear()
        self.compiled = 0


def _driver() -> Any:
    """The part of Triton's driver that compiling and launching use; the same in Triton 3.6 to 3.8."""
    from triton.backends.compiler import GPUTarget

    class EmptyLauncher:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.name = src.fn.__name__

        def __call__(self, *arguments: Any) -> None:
            _current[-1].kernels.append(self.name)
            _current[-1].functions.append(arguments[4])

    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        assert binary, name
        _current[-1].compiled += 1
        return 1, object(), 0, 0, 1024  # module, function, registers, spills, threads

    utils = SimpleNamespace(
        load_binary=load_binary, get_device_properties=lambda device: {"max_shared_mem": 227 * 1024}
    )
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: _DEVICE,
        get_current_stream=lambda device: 0,
        launcher_cls=EmptyLauncher,
        utils=utils,
    )


def _no_obstacle(device: object) -> None:
    return None


# launchers outlive their driver, in the caches of the kernels
_current: list[Launches] = []


@contextmanager
def launch_path() -> Iterator[Launches]:
    """In the ``with`` block the ``triton`` backend runs on CPU tensors up to the launch itself."""
    from triton.runtime import driver

    from awnet.ops.backends import triton as backend

    assert os.environ.get("TRITON_INTERPRET") != "1", (
        "the interpreter and the compiler cannot share a process"
    )
    launches = Launches()
    before = driver._active
    _current.append(launches)
    driver.set_active(_driver())
    try:
        # kernels that never run would fail their self-check
        unchecked = mock.patch.dict(os.environ, {"AWNET_SELF_CHECK": "0"})
        with unchecked, mock.patch.object(backend, "device_obstacle", _no_obstacle):
            yield launches
    finally:
        driver._active = before
        _current.pop()


def host_seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """The least time that this thread spent on the processor in one of ``repeats`` calls.

    Other processes of the machine lengthen it far less than the time on the clock.
    """
    least = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        call()
        least = min(least, time.thread_time() - start)
    return least

"""A stand-in for ``torch.cuda``'s streams and graphs, with the failures of a capture as torch 2.11 has them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

WAIT = "called a synchronizing CUDA operation"


class FakeCUDA:
    """The state of a device that a capture changes.

    ``wait`` is what an operation that waits for the device does: it warns or raises by the sync debug mode,
    and invalidates a capture.
    """

    def __init__(self) -> None:
        self.stream = "default"
        self.open_pools: set[tuple[int, int]] = set()
        self.released: list[tuple[int, int]] = []
        self.generator = "usable"
        self.mode = "default"
        self.capturing = self.invalid = False
        self.pools = 0
        self.events: list[str] = []

    def wait(self) -> None:
        if self.mode == "error":
            raise RuntimeError(WAIT)
        if self.mode == "warn":
            warnings.warn(WAIT, stacklevel=2)
        if self.capturing:
            self.invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeCUDA:
        device = self

        class Stream:
            def __init__(self, index: int = 0) -> None:
                self.name = "side"

            def wait_stream(self, other: Any) -> None:
                device.events.append("wait_stream")

        class Current(Stream):
            def __init__(self) -> None:
                self.name = device.stream

        class Generator:
            def clone_state(self) -> str:
                return device.generator

            def graphsafe_set_state(self, state: str) -> None:
                device.generator = state

        class Graph:
            def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
                assert device.stream == "side"
                assert capture_error_mode == "thread_local"
                self.pool = pool
                device.open_pools.add(pool)
                device.capturing, device.generator = True, "in capture mode"

            def capture_end(self) -> None:
                if not device.capturing:
                    raise RuntimeError("no capture")
                device.capturing = False
                if device.invalid:
                    device.invalid = False
                    raise RuntimeError("operation failed due to a previous error during capture")
                device.open_pools.discard(self.pool)
                device.generator = "usable"

            def replay(self) -> None:
                device.events.append("replay")

        @contextmanager
        def stream(of: Stream) -> Iterator[None]:
            before, device.stream = device.stream, of.name
            try:
                yield
            finally:
                device.stream = before

        def pool_handle() -> tuple[int, int]:
            device.pools += 1
            return 0, device.pools

        def end(index: int, pool: tuple[int, int]) -> None:
            if pool not in device.open_pools:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            device.open_pools.discard(pool)

        names: dict[str, Any] = {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "current_stream": Current,
            "current_device": lambda: 0,
            "stream": stream,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "graph_pool_handle": pool_handle,
            "default_generators": (Generator(),),
            "get_sync_debug_mode": lambda: device.mode,
            "set_sync_debug_mode": lambda mode: setattr(device, "mode", mode),
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda index, pool: device.released.append(pool), raising=False
        )
        return self


class Recorded:
    """What a captured function returns: a replay calls the function again."""

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self.function = function

    def replay(self) -> None:
        self.value = self.function()

    def clone(self) -> Tensor:
        return self.value.clone()


class Recorder:
    """Stands in for the capture of CUDA graphs: a replay calls the function again."""

    def __init__(self) -> None:
        self.recorded: list[Recorded] = []

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Any, Callable[[], None]]:
        self.recorded.append(Recorded(function))
        return self.recorded[-1], self.recorded[-1].replay

"""Times named parts of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PartClock:
    """Milliseconds of named parts; on a GPU by events that are read at the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.setdefault(name, []).append((start, self._now()))

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def clear(self) -> None:
        self._spans.clear()

    def read(self) -> dict[str, list[float]]:
        if self.device.type == "cpu":
            return {name: [1000 * (b - a) for a, b in spans] for name, spans in self._spans.items()}
        torch.cuda.synchronize(self.device)
        return {name: [a.elapsed_time(b) for a, b in spans] for name, spans in self._spans.items()}

"""Times steps: all of them in turns on a CPU, by CUDA events with a flushed cache on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_LEAST_TURNS = 3


@dataclass(frozen=True)
class Times:
    """Of one step: milliseconds (median, 20 % and 80 % quantile), and peak memory beside its inputs."""

    median: float
    p20: float
    p80: float
    peak_mib: float | None = None


def measure(
    steps: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, Times]:
    """The times of every step, about ``seconds`` for each after a warm-up."""
    if device.type == "cuda":
        return {name: _on_cuda(once, seconds) for name, once in steps.items()}
    return _on_cpu(steps, seconds)


def _on_cpu(steps: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Times]:
    """All take turns, so that whatever else runs on the machine slows them alike."""

    def turn() -> dict[str, float]:
        took: dict[str, float] = {}
        for name, once in steps.items():
            start = time.perf_counter()
            once()
            took[name] = 1000 * (time.perf_counter() - start)
        return took

    budget = seconds * len(steps)
    warm = time.perf_counter() + 0.2 * budget
    turn()
    while time.perf_counter() < warm:
        turn()
    turns: list[dict[str, float]] = []
    end = time.perf_counter() + budget
    while len(turns) < _LEAST_TURNS or time.perf_counter() < end:
        turns.append(turn())
    times: dict[str, Times] = {}
    for name in steps:
        samples = [took[name] for took in turns]
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        times[name] = Times(statistics.median(samples), fifths[0], fifths[3])
    return times


def _on_cuda(once: Callable[[], object], seconds: float) -> Times:
    from triton.testing import do_bench

    for _ in range(3):
        once()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    once()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20
    rep = max(1, round(1000 * seconds))
    median, p20, p80 = do_bench(once, warmup=max(1, rep // 4), rep=rep, quantiles=[0.5, 0.2, 0.8])
    return Times(median, p20, p80, peak)

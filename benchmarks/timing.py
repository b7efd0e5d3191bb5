"""Times steps: in turns on a CPU, by replays of a CUDA graph on a GPU.

A measurement that was disturbed (:mod:`awnet.benchmarks.interference`) is repeated, and the least disturbed
one counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from awnet.cuda_graphs import capture

from . import interference
from .interference import UNDISTURBED, Interference, Monitor, least_disturbed

_MIN_TURNS = 3
# steps in one CUDA graph: enough that the launch of the graph is a small part of its time
STEPS_PER_GRAPH = 10
_MIN_REPLAYS, _MAX_REPLAYS = 5, 1000
Steps = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one step, peak memory in addition to its inputs, and the disturbance."""

    median: float
    p20: float
    p80: float
    best: float
    peak_mib: float | None = None
    interference: Interference = UNDISTURBED


def measure(steps: Steps, device: torch.device, seconds: float, retries: int = 0) -> dict[str, Times]:
    """The times of calls of every step, about ``seconds`` for each after a warm-up.

    While any step was disturbed, all of them are measured again, at most ``retries`` times, so that the times
    of one call stay comparable. The least disturbed attempt is returned.
    """
    if not steps:
        return {}
    run = _on_cuda if device.type == "cuda" else _on_cpu
    return _retried(lambda: run(steps, seconds), retries)


def on_graphs(device: torch.device) -> bool:
    """Whether steps on ``device`` are timed by :func:`measure_replays`."""
    return device.type == "cuda"


@dataclass(frozen=True)
class GpuTimes:
    """Two measurements of one step on a GPU.

    eager: of single calls, each with the host time of its launches.
    replay: of a step in the replay of a CUDA graph, without host time; None if the step cannot be captured.
    refusal: why there is no ``replay``.
    """

    eager: Times
    replay: Times | None
    refusal: str = ""


class CudaGraphs:
    """Captures and times steps on the current CUDA device."""

    def eager(self, step: Callable[[], object], seconds: float) -> Times:
        """The times of single calls, with the cache flushed before each, and the peak memory."""
        return _step_on_cuda(step, seconds)

    def capture(self, program: Callable[[], None]) -> Callable[[], None]:
        """The replay of ``program`` as a CUDA graph. RuntimeError if it cannot be captured."""
        nothing = torch.empty(0)

        def run() -> torch.Tensor:
            program()
            return nothing

        return capture(run, warm_ups=2)[1]

    def milliseconds(self, replay: Callable[[], None], count: int) -> list[float]:
        """The device time of each of ``count`` replays in a row, by events."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            replay()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(events)]


def measure_replays(
    steps: Steps, seconds: float, retries: int = 0, gpu: CudaGraphs | None = None
) -> dict[str, GpuTimes]:
    """The times of every step on the current GPU, one step after another.

    Each step is called several times, which warms it up, and timed by single calls for a quarter of
    ``seconds``. Then ``STEPS_PER_GRAPH`` calls are captured in one CUDA graph, whose replays are timed for
    about ``seconds``. Host time, which differs between machines and is hidden in a captured training step,
    counts in the first measurement only. Disturbed replays are repeated as in :func:`measure`.

    Args:
        steps: functions without arguments that may neither wait for the device nor draw random numbers. They
            should rotate over several inputs.
        seconds: time to measure.
        retries: number of repetitions of disturbed replays.
        gpu: captures and times; tests replace it.
    """
    gpu = CudaGraphs() if gpu is None else gpu
    return {name: _replayed(step, seconds, retries, gpu) for name, step in steps.items()}


def _replayed(step: Callable[[], object], seconds: float, retries: int, gpu: CudaGraphs) -> GpuTimes:
    eager = gpu.eager(step, seconds / 4)

    def program() -> None:
        for _ in range(STEPS_PER_GRAPH):
            step()

    try:
        replay = gpu.capture(program)
        first = gpu.milliseconds(replay, 2)[1]
    except RuntimeError as error:
        return GpuTimes(eager, None, f"not captured: {next(iter(str(error).splitlines()), repr(error))}")
    count = round(1000 * seconds / first) if first > 0 else _MAX_REPLAYS
    count = min(max(count, _MIN_REPLAYS), _MAX_REPLAYS)

    def replays() -> dict[str, Times]:
        monitor = Monitor()
        times = summary([ms / STEPS_PER_GRAPH for ms in gpu.milliseconds(replay, count)])
        return {"": replace(times, peak_mib=eager.peak_mib, interference=monitor.read())}

    return GpuTimes(eager, _retried(replays, retries)[""])


def in_turns(steps: Steps, rounds: int, retries: int) -> dict[str, Times]:
    """The times of ``rounds`` runs of each step on the CPU, in turns, after one run of each; see measure."""
    return _retried(lambda: _on_cpu(steps, 0.0, rounds), retries)


def _retried(run: Callable[[], dict[str, Times]], retries: int) -> dict[str, Times]:
    attempts = [run()]
    while len(attempts) <= retries and any(times.interference.disturbed for times in attempts[-1].values()):
        attempts.append(run())
    rows = [{name: times.interference for name, times in attempt.items()} for attempt in attempts]
    return attempts[least_disturbed(rows)]


def summary(milliseconds: list[float]) -> Times:
    """Median, 20 % and 80 % quantiles, and minimum."""
    if len(milliseconds) == 1:
        milliseconds = milliseconds * 2
    fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Times(statistics.median(milliseconds), fifths[0], fifths[3], min(milliseconds))


def _on_cpu(steps: Steps, seconds: float, min_turns: int = _MIN_TURNS) -> dict[str, Times]:
    """All steps take turns, so that other load on the machine slows them equally."""
    switches: dict[str, int | None] = {}

    def turn() -> dict[str, float]:
        milliseconds: dict[str, float] = {}
        for name, step in steps.items():
            before = interference.involuntary_switches()
            start = time.perf_counter()
            step()
            milliseconds[name] = 1000 * (time.perf_counter() - start)
            after = interference.involuntary_switches()
            counted = before is not None and after is not None
            switches[name] = (switches.get(name) or 0) + after - before if counted else None  # type: ignore[operator]
        return milliseconds

    budget = seconds * len(steps)
    warm = time.perf_counter() + 0.2 * budget
    turn()
    while time.perf_counter() < warm:
        turn()
    switches.clear()
    turns: list[dict[str, float]] = []
    monitor, end = Monitor(), time.perf_counter() + budget
    while len(turns) < min_turns or time.perf_counter() < end:
        turns.append(turn())
    steal = monitor.read().steal  # of all steps: a tick of the counter is longer than most of them
    times: dict[str, Times] = {}
    for name in steps:
        samples = [milliseconds[name] for milliseconds in turns]
        disturbance = Interference(sum(samples) / 1000, switches[name], steal, torch.get_num_threads())
        times[name] = replace(summary(samples), interference=disturbance)
    return times


def _on_cuda(steps: Steps, seconds: float) -> dict[str, Times]:
    return {name: _step_on_cuda(step, seconds) for name, step in steps.items()}


def _step_on_cuda(step: Callable[[], object], seconds: float) -> Times:
    from triton.testing import do_bench

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20
    rep = max(1, round(1000 * seconds))
    monitor = Monitor()
    warmup, quantiles = max(1, rep // 4), [0.5, 0.2, 0.8, 0.0]
    median, p20, p80, best = do_bench(step, warmup=warmup, rep=rep, quantiles=quantiles)
    return Times(median, p20, p80, best, peak, monitor.read())

"""Captures of CUDA graphs and their cache, with fakes of capture; the tests marked gpu capture graphs."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.fake_cuda import FakeCUDA, Recorder
from torch import Tensor

from awnet.cuda_graphs import GraphCache, Graphed, capture


def refuse(function: Callable[[], Tensor]) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing")


# --- Graphed


def test_graphed_captures_each_shape_at_its_second_call() -> None:
    recorder = Recorder()
    double = Graphed(lambda x, y: 2 * x + y, recorder)
    for i, shape in enumerate([(3,), (3,), (2,), (3,), (2,), (3,)]):
        x, y = torch.full(shape, float(i)), torch.rand(shape)
        assert torch.equal(double(x, y), 2 * x + y)
        assert len(recorder.recorded) == (0, 1, 1, 1, 2, 2)[i]
    double(torch.rand(3), torch.rand(3), key=0.5)
    assert len(recorder.recorded) == 2  # plain, the first of its key


def test_graphed_keeps_a_bounded_number_of_graphs() -> None:
    recorder = Recorder()
    double = Graphed(lambda x: 2 * x, recorder, max_graphs=2)
    for size in (1, 1, 2, 2, 3, 3, 1, 1, 3):
        assert torch.equal(double(torch.ones(size)), torch.full((size,), 2.0))
    assert len(double.cache) == 2
    assert len(recorder.recorded) == 4  # 1 was dropped for 3, and 2 for 1


def test_graphed_runs_the_function_after_a_failed_capture() -> None:
    double = Graphed(lambda x: 2 * x, refuse)
    double(torch.ones(2))
    with pytest.warns(UserWarning, match="not permitted"):
        assert double(torch.ones(2)).tolist() == [2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(torch.ones(2)).tolist() == [2, 2]


def test_a_graph_and_the_plain_call_before_it_read_the_same_aligned_memory() -> None:
    """A view of the caller may be aligned otherwise, which would compile another kernel in the capture."""
    seen: list[tuple[int, tuple[int, ...]]] = []

    def function(x: Tensor) -> Tensor:
        seen.append((x.data_ptr(), x.stride()))
        return 2 * x

    storage = torch.arange(9.0)
    double = Graphed(function, Recorder())
    for first in (1, 0, 3):
        x = storage[first : first + 4]
        assert torch.equal(double(x), 2 * x)
    assert len(set(seen)) == 1
    assert seen[0][0] % 16 == 0
    assert storage.tolist() == list(range(9))


def test_the_plain_calls_result_is_the_callers() -> None:
    same = Graphed(lambda x: x, Recorder())
    first = same(torch.ones(2))
    same(torch.zeros(2))
    assert first.tolist() == [1, 1]


def test_closed_graphs_are_dropped_and_captured_anew() -> None:
    recorder = Recorder()
    double = Graphed(lambda x: 2 * x, recorder)
    for _ in range(2):
        double(torch.ones(2))
    double.close()
    assert len(double.cache) == 0
    for i in range(3):
        assert double(torch.full((2,), float(i))).tolist() == [2 * i, 2 * i]
    assert len(recorder.recorded) == 2


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_wait_of_the_host_rules_out_graphs_before_any_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeCUDA().install(monkeypatch)
    calls: list[str] = []

    def waits(x: Tensor) -> Tensor:
        calls.append(device.mode)
        device.wait()
        return 2 * x

    double = Graphed(waits)
    with no_warnings():  # what is made once may wait in the first call
        assert double(torch.ones(2)).tolist() == [2, 2]
    with pytest.warns(UserWarning, match=r"no CUDA graph, so slower: the host waits .*test_cuda_graphs\.py:"):
        assert double(torch.ones(2)).tolist() == [2, 2]
    with no_warnings():
        assert double(torch.ones(2)).tolist() == [2, 2]
    assert calls == ["default", "warn", "default"]
    assert (device.pools, device.mode) == (0, "default")


def test_other_warnings_of_the_watched_call_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeCUDA().install(monkeypatch)

    def warns(x: Tensor) -> Tensor:
        warnings.warn("look here", stacklevel=1)
        return 2 * x

    double = Graphed(warns)
    for _ in range(2):
        with pytest.warns(UserWarning, match="look here"):
            double(torch.ones(2))
    with pytest.warns(UserWarning, match="look here"):  # captured
        double(torch.ones(2))
    assert device.events.count("replay") == 1


# --- capture


def state(device: FakeCUDA) -> tuple[Any, ...]:
    return device.stream, device.open_pools, device.generator, device.mode, device.capturing


def test_a_capture_leaves_stream_pool_and_generator_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeCUDA().install(monkeypatch)
    before = state(device)
    modes: list[tuple[str, bool, bool]] = []

    def program() -> Tensor:
        assert device.stream == "side"
        modes.append((device.mode, torch.backends.cudnn.benchmark, device.capturing))
        return torch.ones(1)

    output, replay = capture(program, warm_ups=2)
    replay()
    assert output.tolist() == [1]
    assert device.events[-1] == "replay"
    assert state(device) == before
    assert not torch.backends.cudnn.benchmark
    # algorithms are timed in the warm-ups; the last one raises where the host waits
    assert modes == [("default", True, False), ("error", True, False), ("default", False, True)]


@pytest.mark.parametrize("invalid", [True, False])
def test_a_failed_capture_leaves_stream_pool_and_generator_as_they_were(
    monkeypatch: pytest.MonkeyPatch, invalid: bool
) -> None:
    device = FakeCUDA().install(monkeypatch)
    before = state(device)

    def program() -> Tensor:
        if invalid:
            device.wait()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="not permitted" if invalid else "stopped"):
        capture(program)
    assert state(device) == before
    # capture_end ends and the graph releases the pool of a capture that was not invalidated
    assert device.released == ([(0, 1)] if invalid else [])


def test_a_wait_of_the_host_is_found_in_the_last_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeCUDA().install(monkeypatch)
    before, runs = state(device), []

    def program() -> Tensor:
        runs.append(device.mode)
        device.wait()
        return torch.ones(1)

    with pytest.raises(RuntimeError, match="synchronizing"):
        capture(program, warm_ups=2)
    assert runs == ["default", "error"]
    assert device.pools == 0  # nothing was captured
    assert state(device) == before


@pytest.mark.parametrize("deterministic", ["cudnn", "torch"])
def test_algorithms_are_not_timed_where_results_must_be_deterministic(
    monkeypatch: pytest.MonkeyPatch, deterministic: str
) -> None:
    FakeCUDA().install(monkeypatch)
    seen: list[bool] = []

    def program() -> Tensor:
        seen.append(torch.backends.cudnn.benchmark)
        return torch.ones(1)

    if deterministic == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    else:
        torch.use_deterministic_algorithms(True)
    try:
        capture(program, warm_ups=1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, False]


def test_a_cache_that_refused_holds_no_graph() -> None:
    cache = GraphCache(Recorder(), 2)
    assert cache.graph("a", lambda x: 2 * x, [torch.ones(1)]) is not None
    cache.record = refuse
    assert cache.graph("b", lambda x: 2 * x, [torch.ones(1)]) is None
    assert cache.graph("a", lambda x: 2 * x, [torch.ones(1)]) is None
    assert len(cache) == 0
    assert "could not be captured (operation not permitted" in str(cache.refusal)


PROVOKED = """
import torch
from awnet.cuda_graphs import capture

x = torch.ones(4, device="cuda")
stream = torch.cuda.current_stream()
for warm_ups, message in ((0, "capturing"), (2, "synchronizing")):
    try:
        capture(lambda: x * float(x.sum()), warm_ups)
    except RuntimeError as error:
        assert message in str(error) or warm_ups == 0, error
    else:
        raise SystemExit("captured a wait of the host")
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == 0
    torch.rand(4, device="cuda").sum().item()  # the generator works
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        torch.empty(64 << 20, device="cuda")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before  # memory goes back: no pool is open
output, replay = capture(lambda: 2 * x, 2)
x.fill_(3)
replay()
assert output.tolist() == [6] * 4
print("well")
"""


@pytest.mark.gpu
def test_on_a_gpu_the_process_is_usable_after_failed_captures() -> None:
    done = subprocess.run([sys.executable, "-c", PROVOKED], capture_output=True, text=True, timeout=300)
    assert done.stdout == "well\n", done.stderr

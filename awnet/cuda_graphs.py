"""CUDA graphs of functions of tensors, and a cache of them."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor

Program = Callable[[], Tensor]
#: takes a program of device operations on persistent memory; returns its output and what replays it
Record = Callable[[Program], tuple[Tensor, Callable[[], None]]]


def capture(
    program: Program, warm_ups: int = 0, *, fastest: bool = True
) -> tuple[Tensor, Callable[[], None]]:
    """Captures ``program`` as a CUDA graph without running it.

    The program may neither read values back to the host nor use torch's generators. After a failed capture
    the current stream, the allocator and the generator are as before, so that the program can run without a
    graph.

    Args:
        program: device operations that return a tensor.
        warm_ups: number of runs on a side stream before the capture, in which libraries choose algorithms and
            kernels are compiled; if there are at least two, a wait of the host in the last one is an error. 0
            for a program that may not run more often than it is called.
        fastest: whether cuDNN times its algorithms in the warm-ups (:func:`fastest_convolutions`).

    Returns:
        The output, and the function that replays the graph into it.

    Raises:
        RuntimeError: the host waits for the device in a warm-up, or capture fails.
    """
    current, device = torch.cuda.current_stream(), torch.cuda.current_device()
    stream = _capture_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for run in range(warm_ups):
            waits = sync_debug_mode("error" if 0 < run == warm_ups - 1 else "default")
            with fastest_convolutions() if fastest else nullcontext(), waits:
                program()
    current.wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    generator = torch.cuda.default_generators[device]
    state = generator.clone_state()
    with torch.cuda.stream(stream):
        try:
            # other threads (a checkpoint being written, the next batch gathered) may use the device meanwhile
            graph.capture_begin(pool, capture_error_mode="thread_local")
            output = program()
            graph.capture_end()
        except BaseException:
            _abandon(graph, pool, device)
            generator.graphsafe_set_state(state)  # torch 2.11 leaves the old one in capture mode
            raise
    return output, graph.replay


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: int) -> None:
    """Ends a failed capture.

    ``capture_end`` raises if the capture was invalidated, and then (up to torch 2.13 at least) leaves the
    allocator's pool open.
    """
    with suppress(RuntimeError):
        graph.capture_end()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # capture_end has ended it, and the graph releases it
        return
    torch._C._cuda_releasePool(device, pool)


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    """What a wait of the host for the device does in this block: "default", "warn" or "error"."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """In this block cuDNN times its algorithms for each new shape and keeps the fastest one.

    It does not if deterministic results are requested, since the choice may differ from run to run.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    if not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled()):
        cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.benchmark = before


class Recorded:
    """``function(*tensors)`` → one tensor, for tensors of these shapes and layouts, on persistent memory.

    :meth:`record` captures it. :meth:`plain` runs the function without a graph on the same memory, so that
    kernels that are compiled for aligned pointers or for strides are the same in both.
    """

    def __init__(self, function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
        self._function = function
        self._inputs = [torch.empty_like(tensor).copy_(tensor) for tensor in tensors]
        self._output: Tensor | None = None
        self._replay: Callable[[], None] | None = None

    @property
    def recorded(self) -> bool:
        return self._replay is not None

    def record(self, record: Record) -> None:
        self._output, self._replay = record(lambda: self._function(*self._inputs))

    def close(self) -> None:
        """Frees the graph and its memory, even while this object is still referenced."""
        self._output = self._replay = None
        self._inputs = []

    def plain(self, *tensors: Tensor) -> Tensor:
        self._copy(tensors)
        return self._function(*self._inputs).clone()

    def __call__(self, *tensors: Tensor) -> Tensor:
        assert self._replay is not None
        assert self._output is not None
        self._copy(tensors)
        self._replay()
        return self._output.clone()  # the next replay overwrites it

    def _copy(self, tensors: Sequence[Tensor]) -> None:
        for target, source in zip(self._inputs, tensors, strict=True):
            target.copy_(source)


class GraphCache:
    """The graphs of a function, one for each key; the least recently used is dropped.

    After a failed capture, or after ``max_captures`` captures, the cache no longer captures or replays, and
    ``refusal`` gives the reason.

    Args:
        record: captures a program, :func:`capture` for CUDA graphs.
        max_graphs: largest number of graphs; each holds the memory of a whole batch.
        max_captures: largest number of captures. Each takes seconds, so the plain function is faster for
            shapes that do not recur.
    """

    def __init__(self, record: Record, max_graphs: int, max_captures: int = 32) -> None:
        self.record, self.max_graphs, self.max_captures = record, max_graphs, max_captures
        self.refusal: str | None = None
        self._graphs: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._captures = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def clear(self) -> None:
        """Drops all graphs."""
        while self._graphs:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._graphs.popitem(last=False)[1].close()

    def refuse(self, reason: str) -> None:
        """Drops all graphs and captures no more; ``reason`` is stored as ``refusal``."""
        self.refusal = reason
        self.clear()

    def prepared(
        self, key: Hashable, function: Callable[..., Tensor], tensors: Sequence[Tensor]
    ) -> Recorded | None:
        """The entry of ``key``, created from ``function`` and ``tensors`` if it is new; None if refused."""
        if self.refusal is not None:
            return None
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        while len(self._graphs) >= self.max_graphs:
            self._drop_oldest()
        self._graphs[key] = Recorded(function, tensors)
        return self._graphs[key]

    def graph(
        self, key: Hashable, function: Callable[..., Tensor], tensors: Sequence[Tensor]
    ) -> Recorded | None:
        """The graph of ``key``, captured unless it was captured before; None if refused."""
        known = self._graphs.get(key)
        if self.refusal is None and (known is None or not known.recorded):
            if self._captures >= self.max_captures:
                self.refuse(f"{self.max_captures} captures, and yet another batch shape")
                return None
            self._captures += 1
            try:
                graph = self.prepared(key, function, tensors)
                assert graph is not None
                graph.record(self.record)
            except RuntimeError as error:
                self.refuse(f"they could not be captured ({error})")
                return None
        return self.prepared(key, function, tensors)


class Graphed:
    """``function(*tensors)`` → one tensor, as one graph for each shape of its arguments.

    The first call with a shape runs the function, which warms up libraries and compiles kernels; the second
    captures it. Before the first capture of all, one more call runs the function and checks that the host
    does not wait for the device. If it does, or if a capture fails, the function runs without graphs from
    then on, with a warning that gives the reason.

    Args:
        function: device operations on the tensors.
        record: captures a program without running it; None captures CUDA graphs.
        max_graphs: largest number of graphs.
    """

    def __init__(
        self, function: Callable[..., Tensor], record: Record | None = None, max_graphs: int = 4
    ) -> None:
        self.function = function
        self.cache = GraphCache(record or capture, max_graphs)
        self._check_syncs = record is None  # in the next call that could be captured

    def close(self) -> None:
        """Drops all graphs; later calls capture them again."""
        self.cache.clear()

    def __call__(self, *tensors: Tensor, key: Hashable = None) -> Tensor:
        """Calls the function or replays its graph; ``key`` holds what else the graph depends on."""
        entry_key = (key, *((tuple(t.shape), t.stride(), t.dtype) for t in tensors))
        new = entry_key not in self.cache
        entry = self.cache.prepared(entry_key, self.function, tensors)
        if entry is None:
            return self.function(*tensors)
        if new:
            with fastest_convolutions():
                return entry.plain(*tensors)
        if self._check_syncs:
            self._check_syncs = False
            return self._checked_call(entry, tensors)
        graph = self.cache.graph(entry_key, self.function, tensors)
        if graph is None:
            self._warn()
            return self.function(*tensors)
        return graph(*tensors)

    def _checked_call(self, entry: Recorded, tensors: Sequence[Tensor]) -> Tensor:
        """Runs the function without a graph; if the host waits for the device in it, graphs are refused."""
        with warnings.catch_warnings(record=True) as caught, sync_debug_mode("warn"):
            warnings.simplefilter("always")
            output = entry.plain(*tensors)
        waits = []
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                waits.append(f"{warning.filename}:{warning.lineno}")
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if waits:
            self.cache.refuse(f"the host waits for the device in {', '.join(dict.fromkeys(waits))}")
            self._warn()
        return output

    def _warn(self) -> None:
        warnings.warn(f"no CUDA graph, so slower: {self.cache.refusal}", stacklevel=3)

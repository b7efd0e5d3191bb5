"""CUDA graphs of functions of tensors, and a cache of them."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

Program = Callable[[], Tensor]
#: takes a program of device operations on persistent memory; returns its output and what replays it
Record = Callable[[Program], tuple[Tensor, Callable[[], None]]]


def capture(program: Program, warm_ups: int = 0) -> tuple[Tensor, Callable[[], None]]:
    """Captures ``program`` as a CUDA graph without running it.

    The program may neither read values back to the host nor use torch's generators.

    Args:
        program: device operations that return a tensor.
        warm_ups: number of runs on a side stream before the capture, in which libraries choose algorithms and
            kernels are compiled. 0 for a program that may not run more often than it is called.

    Returns:
        The output, and the function that replays the graph into it.

    Raises:
        RuntimeError: capture fails.
    """
    if warm_ups:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_ups):
                program()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # other threads (a checkpoint being written, the next batch gathered) may use the device meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = program()
    return output, graph.replay


class Recorded:
    """``function(*tensors)`` → one tensor, recorded by ``record`` for tensors of these shapes and layouts."""

    def __init__(self, function: Callable[..., Tensor], tensors: Sequence[Tensor], record: Record) -> None:
        self._inputs = [torch.empty_like(tensor).copy_(tensor) for tensor in tensors]
        self._output, self._replay = record(lambda: function(*self._inputs))

    def __call__(self, *tensors: Tensor) -> Tensor:
        for target, source in zip(self._inputs, tensors, strict=True):
            target.copy_(source)
        self._replay()
        return self._output.clone()  # the next replay overwrites it


class GraphCache:
    """The graphs of a function, one for each key; the least recently used is dropped.

    Nothing is captured or replayed any more after a capture failed or ``max_captures`` were made: ``refusal``
    then gives the reason.

    Args:
        record: captures a program, :func:`capture` for CUDA graphs.
        max_graphs: number of graphs that are kept; each holds the memory of a whole batch.
        max_captures: number of captures in all. Each takes seconds, so the plain function is faster for
            shapes that do not return.
    """

    def __init__(self, record: Record, max_graphs: int, max_captures: int = 32) -> None:
        self.record, self.max_graphs, self.max_captures = record, max_graphs, max_captures
        self.refusal: str | None = None
        self._graphs: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._captures = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drops all graphs."""
        self._graphs.clear()

    def graph(
        self, key: Hashable, function: Callable[..., Tensor], tensors: Sequence[Tensor]
    ) -> Recorded | None:
        """The graph of ``key``, captured from ``function`` and ``tensors`` if it is new; None if refused."""
        if self.refusal is not None:
            return None
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if self._captures >= self.max_captures:
            self.refusal = f"{self.max_captures} captures, and yet another batch shape"
            return None
        self._captures += 1
        while len(self._graphs) >= self.max_graphs:
            self._graphs.popitem(last=False)
        try:
            graph = Recorded(function, tensors, self.record)
        except RuntimeError as error:
            self.refusal = f"they could not be captured ({error})"
            return None
        self._graphs[key] = graph
        return graph


class Graphed:
    """``function(*tensors)`` → one tensor, as one graph for each shape of its arguments.

    The first call with a shape runs the function, which warms up libraries and compiles kernels; the second
    is captured. If a capture fails, the function runs without graphs from then on, with a warning that gives
    the reason.

    Args:
        function: device operations on the tensors.
        record: captures a program.
        max_graphs: number of graphs that are kept.
    """

    def __init__(
        self, function: Callable[..., Tensor], record: Record = capture, max_graphs: int = 4
    ) -> None:
        self.function = function
        self.cache = GraphCache(record, max_graphs)
        self._seen: set[Hashable] = set()

    def __call__(self, *tensors: Tensor, key: Hashable = None) -> Tensor:
        """``key`` is anything else that the graph depends on."""
        whole = (key, *((tuple(t.shape), t.stride(), t.dtype) for t in tensors))
        if whole not in self._seen or self.cache.refusal is not None:
            self._seen.add(whole)
            return self.function(*tensors)
        graph = self.cache.graph(whole, self.function, tensors)
        if graph is None:
            warnings.warn(f"no CUDA graph, so slower: {self.cache.refusal}", stacklevel=2)
            return self.function(*tensors)
        return graph(*tensors)

"""CUDA graphs: a function of tensors recorded once, with memory of its own for what goes in and comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Program = Callable[[], Tensor]
#: takes a program of device operations on memory that stays; gives its output, and what runs it into that
Record = Callable[[Program], tuple[Tensor, Callable[[], None]]]


def capture(program: Program, warm_ups: int = 0) -> tuple[Tensor, Callable[[], None]]:
    """Records ``program`` as a CUDA graph, without running it; its output, and what runs it into that output.

    The program may neither read a value back to the host nor draw from torch's generators. ``warm_ups`` runs
    on a side stream come first, for a program that may run more often than it is asked for: libraries choose
    their algorithms, and kernels are compiled, before capture. Raises RuntimeError where capture fails.
    """
    if warm_ups:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_ups):
                program()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # other threads (a checkpoint being written, the next batch gathered) may go on using the device meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = program()
    return output, graph.replay


class Recorded:
    """``function(*tensors)`` → one tensor, recorded by ``record`` for tensors of these shapes and layouts."""

    def __init__(self, function: Callable[..., Tensor], tensors: Sequence[Tensor], record: Record) -> None:
        self._inputs = [torch.empty_like(tensor).copy_(tensor) for tensor in tensors]
        self._output, self._replay = record(lambda: function(*self._inputs))

    def __call__(self, *tensors: Tensor) -> Tensor:
        for own, given in zip(self._inputs, tensors, strict=True):
            own.copy_(given)
        self._replay()
        return self._output.clone()  # the next replay writes to it

"""Ranks: a command on several processes, on one machine or more, started by ``torchrun``.

Each rank holds the whole model. In training it computes its share of every global batch: gradients, batch
statistics and MTARD's losses are averaged over all samples of the global batch, so the number of ranks only
changes rounding. In an evaluation it computes whole batches, so the number of ranks does not change rounding
either. Rank 0 writes reports and logs and prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a command; by default this process is the only one.

    device: the device of this rank.
    rank: number of this process.
    size: number of processes.
    group: process group for gradients and statistics: NCCL on CUDA, gloo on a CPU.
    control: gloo process group between the hosts; its collectives never wait for a GPU.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    group: Any = None
    control: Any = None

    @property
    def group_name(self) -> str | None:
        """The argument of ``awnet.nn.synchronize``; None for a single process."""
        return None if self.group is None else str(self.group.group_name)

    @torch.no_grad()
    def mean(self, tensors: Sequence[Tensor], count: int) -> None:
        """Averages ``tensors`` over the ranks in place, each rank's weighted by its ``count`` of samples.

        There is one collective per dtype. The host does not wait for the device, so a CUDA graph can capture
        this; the graph contains ``count`` as a constant.
        """
        if self.size == 1:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.dtype, []).append(tensor)
        for group in groups.values():
            weighted = [tensor.reshape(-1) * count for tensor in group]
            flat = torch.cat([*weighted, weighted[0].new_full((1,), count)])
            dist.all_reduce(flat, group=self.group)
            parts = (flat[:-1] / flat[-1]).split([tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [p.view(t.shape) for p, t in zip(parts, group, strict=True)])

    def total(self, values: Tensor) -> Tensor:
        """The sum of ``values``, a CPU tensor, over the ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.control)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """Rank 0 calls ``make()``; every rank returns its result or raises its exception."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.control)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result

    def gathered(self, value: T) -> list[T]:
        """The ``value`` of every rank, in order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def share(self, model: nn.Module) -> None:
        """Copies the weights and buffers of rank 0's ``model`` to all ranks.

        Raises:
            ValueError: the statistics of a batch norm would differ from rank to rank.
        """
        if self.size == 1:
            return
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                raise ValueError(
                    f"model's {name or type(module).__name__} is a plain batch norm, whose statistics would "
                    "differ from rank to rank: use awnet.nn.MixBatchNorm2d(branches='one') instead, or on "
                    "CUDA nn.SyncBatchNorm.convert_sync_batchnorm(model)"
                )
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, src=0, group=self.group)


class Agreement:
    """The maximum of integers over the ranks, one call later.

    Each call starts a reduction between the hosts and returns the result of the previous one, so no rank
    waits longer than a step for another. A single process gets its values at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[Any, Tensor] | None = None

    def __call__(self, *values: int) -> list[int]:
        if self._ranks.size == 1:
            return list(values)
        maxima = self.close() or [0] * len(values)
        tensor = torch.tensor(values)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._ranks.control, async_op=True)
        self._pending = work, tensor
        return maxima

    def close(self) -> list[int] | None:
        """Returns the result of the pending reduction; all ranks have to call this equally often."""
        if self._pending is None:
            return None
        work, values = self._pending
        self._pending = None
        work.wait()
        return [int(value) for value in values]


def is_first() -> bool:
    """Whether this process is rank 0 of torchrun, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def restarts() -> int:
    """How often torchrun has restarted the ranks after a failure (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _init_process_group(backend: str) -> None:
    store, rank, size = next(dist.rendezvous("env://"))
    # with --master_addr the store of torchrun survives a restart and holds addresses of dead processes
    store = dist.PrefixStore(f"attempt {restarts()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


@contextmanager
def joined(device: torch.device, timeout: timedelta | None = None) -> Iterator[Ranks]:
    """The ranks of a command: torchrun's, those of an existing process group, or this process only.

    Args:
        device: "cuda" becomes the GPU of this rank, by torchrun's LOCAL_RANK.
        timeout: how long hosts wait for each other, by default torch's half an hour; the end of a process is
            noticed at once.

    Raises:
        ValueError: under torchrun, a numbered GPU, which all ranks would share, or more ranks than GPUs.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    joins = launched and not dist.is_initialized()
    if joins and device.type == "cuda" and device.index is not None:
        raise ValueError(f"device must be 'cuda' under torchrun, where each rank takes a GPU, got {device}")
    if device.type == "cuda" and device.index is None and (joins or dist.is_initialized()):
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started more ranks on this machine than it has GPUs, {torch.cuda.device_count()}: "
                "lower --nproc_per_node, or use device='cpu'"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if joins:
        _init_process_group("nccl" if device.type == "cuda" else "gloo")
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield Ranks(device)
        return
    control = dist.new_group(backend="gloo", timeout=timeout)
    yield Ranks(device, dist.get_rank(), dist.get_world_size(), dist.group.WORLD, control)
    if joins:  # not after an error: a pending collective with a lost rank would block the exit
        dist.destroy_process_group()

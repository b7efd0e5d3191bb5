"""Batch statistics and their gradients over the ranks of a process group: one collective each.

Both are registered operators, so that ``csrc/layer.cpp`` can call them. A process group is given by its name,
``group.group_name``; every rank must take part in every call, with an empty batch if it has no samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from awnet.ops.coefficients import BatchStats


def _group_size(name: str) -> int:
    from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

    try:
        return _resolve_process_group(GroupName(name)).size()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"process_group {name!r} is not the name of a process group of this process: pass "
            "torch.distributed's group.group_name after init_process_group"
        ) from error


@torch.library.custom_op("awnet::joined_statistics", mutates_args=())
def _joined_statistics(
    mean: Tensor, var: Tensor, n: Tensor, process_group: str
) -> tuple[Tensor, Tensor, Tensor]:
    size = _group_size(process_group)
    local = torch.cat([mean, var, n[:, None]], 1)[None]  # [1, S, 2C + 1]
    collectives = torch.ops._c10d_functional
    gathered = collectives.all_gather_into_tensor(local.contiguous(), size, process_group)
    means, variances, counts = collectives.wait_tensor(gathered).split([mean.shape[1], var.shape[1], 1], 2)
    total = counts.sum(0)  # [S, 1]
    divisor = total.clamp(min=1)
    joined = (means * counts).sum(0) / divisor
    squares = (counts * (variances + (means - joined).square())).sum(0)  # Chan's rule: never E[z²] − μ²
    return joined, squares / divisor, total[:, 0].clone()


@torch.library.custom_op("awnet::summed", mutates_args=())
def summed(x: Tensor, process_group: str) -> Tensor:
    """The sum of ``x`` over the ranks."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", process_group))


def joined_statistics(local: BatchStats, process_group: str) -> BatchStats:
    """The statistics of all ranks' values from those of each rank; exact for any counts, 0 included.

    The (n, mean, variance) of the ranks are gathered and merged in rank order: all ranks get the same bits.
    Raises ValueError if ``process_group`` is not the name of a group.
    """
    return BatchStats(*_joined_statistics(local.mean, local.var, local.n, process_group))

"""Copies of a user's model with any kind of tensors in its modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model) -> Model:
    """A deep copy of ``model`` in which non-leaf tensors are detached copies.

    ``copy.deepcopy`` refuses such tensors, which are computed from others with gradient: a stored activation,
    or the weight that ``torch.nn.utils.weight_norm`` sets before each forward pass.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors_in(vars(module)):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)


def _tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item, depth - 1)


@torch.no_grad()
def unshare_memory(model: nn.Module) -> None:
    """Replaces parameters and buffers of ``model`` whose elements share memory by dense copies, in place.

    ``tensor.expand`` returns such tensors. torch does not write to them, so ``load_state_dict`` would fail.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and _overlaps(buffer):
                module._buffers[name] = buffer.contiguous().clone()
    for parameter in model.parameters():
        if _overlaps(parameter):
            parameter.data = parameter.data.contiguous().clone()


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements of a strided tensor may have the same address."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return False
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return reach < tensor.numel()

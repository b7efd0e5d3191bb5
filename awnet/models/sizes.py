"""A model's size before it is built, compared with a file's tensors and with the machine's memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from awnet.scalars import is_number

Shapes = Mapping[str, tuple[int, ...]]


def build_on_meta(build: Callable[[], nn.Module], described: str) -> nn.Module:
    """Calls ``build()`` on the meta device, so that the module has shapes but no values.

    Raises what ``build`` raises, and ValueError if a size is larger than torch can address.
    """
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{described} is larger than torch can address: {reason}") from error


def check_state(model: nn.Module, shapes: Shapes, *, strict: bool = True) -> None:
    """Raises ValueError unless ``shapes``, of a file's tensors, are those of the state of ``model``.

    Buffers that no state dict holds must not have more elements than the file. With ``strict=False`` only
    names that both have are compared.
    """
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing, unexpected = sorted(state.keys() - shapes.keys()), sorted(shapes.keys() - state.keys())
    for what, keys in (("Missing keys", missing), ("Unexpected keys", unexpected)):
        if keys and strict:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"{what}: {', '.join(keys[:3])}{more}")
    for key, shape in shapes.items():
        if key in state and shape != state[key]:
            raise ValueError(f"{key} has shape {list(shape)}, the model's has {list(state[key])}")
    stored = elements(shapes)
    unsaved = sum(buffer.numel() for name, buffer in model.named_buffers() if name not in state)
    if unsaved > stored:
        raise ValueError(f"the model has buffers of {unsaved:,} elements for weights of {stored:,}")


def check_lists(options: Any, tensors: int) -> None:
    """Raises ValueError if ``options``, of a file with this number of tensors, contain more numbers."""
    if sum(1 for _ in numbers(options)) > max(tensors, 100):
        raise ValueError(f"its description states more sizes than its {tensors} tensors can have")


def check_memory(model: nn.Module, described: str) -> None:
    """Raises MemoryError unless ``model``, from :func:`build_on_meta`, fits into this machine's memory."""
    counts = [*(p.numel() for p in model.parameters()), *(b.numel() for b in model.buffers())]
    needed = sum(counts) * torch.get_default_dtype().itemsize
    if needed > (available := _memory()):
        raise MemoryError(
            f"the weights of {described} would take {needed / 2**30:,.0f} GiB, this machine has "
            f"{available / 2**30:,.0f} GiB: choose smaller sizes"
        )


def _memory() -> float:
    """Bytes of this machine's memory; infinity if unknown."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def elements(shapes: Shapes) -> int:
    """Number of elements of tensors of these shapes."""
    return sum(map(math.prod, shapes.values()))


def numbers(value: Any) -> Iterator[float]:
    """All numbers in nested lists and dicts."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif is_number(value):
        yield value

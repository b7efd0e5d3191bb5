"""Freezing a model in place: eval mode and no parameter gradients, for a block of code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class _Held:
    """A module or parameter that at least one block has frozen, with the state to restore."""

    target: Any  # a strong reference: its id stays unique while it is held
    state: Any
    blocks: int = 0


_LOCK = threading.RLock()
_MODULES: dict[int, _Held] = {}
_PARAMETERS: dict[int, _Held] = {}


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in eval mode with ``requires_grad=False`` for every parameter, for a block of code.

    An attack on a frozen model computes no weight gradients. When the block ends, also by an exception,
    every submodule gets its training flag back, and every parameter its ``requires_grad`` and ``grad``.

    Blocks may be nested and may overlap in several threads, also if the models share only some modules:
    each module and parameter is restored when the last block that holds it ends, to its state before the
    first one.
    """
    modules: list[nn.Module] = []
    parameters: list[nn.Parameter] = []
    try:
        with _LOCK:
            for module in model.modules():
                _hold(_MODULES, module, lambda m: m.training)
                modules.append(module)
            for parameter in model.parameters():
                _hold(_PARAMETERS, parameter, lambda p: (p.requires_grad, p.grad))
                parameters.append(parameter)
            if any(module.training for module in modules):
                model.eval()
            for parameter in parameters:
                parameter.requires_grad_(False)
        yield model
    finally:
        with _LOCK:
            _restore_modes(modules)
            for parameter in parameters:
                if held := _release(_PARAMETERS, parameter):
                    requires_grad, gradient = held.state
                    parameter.requires_grad_(requires_grad)
                    parameter.grad = gradient


def _restore_modes(modules: list[nn.Module]) -> None:
    released = [held for module in modules if (held := _release(_MODULES, module))]
    for held in released:
        if held.state and not held.target.training and type(held.target).train is not nn.Module.train:
            held.target.train()  # the user's method may do more than set the flag
    for held in released:
        held.target.training = held.state
    for module in modules:
        if id(module) in _MODULES:  # another block still holds it
            module.training = False


def _hold(table: dict[int, _Held], target: Any, read: Callable[[Any], Any]) -> None:
    held = table.get(id(target))
    if held is None:
        held = table[id(target)] = _Held(target, read(target))
    held.blocks += 1


def _release(table: dict[int, _Held], target: Any) -> _Held | None:
    """Ends one block's hold; returns what was held if no other block holds it."""
    held = table[id(target)]
    held.blocks -= 1
    return table.pop(id(target)) if not held.blocks else None

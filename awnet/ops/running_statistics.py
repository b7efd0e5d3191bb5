"""Updates of running statistics and counters of batch norms, for all layers of a forward pass at once.

A layer in train mode calls :func:`update` after its forward. Outside a :func:`joint_updates` block the
running statistics change immediately. Inside one (the forward of every network is one), they change when the
outermost block ends: a ResNet then launches about twenty kernels instead of twenty per layer. The values are
equal bit by bit, since the operations per element are the same.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from awnet.ops.args import MixNorm, Saved

P = ParamSpec("P")
R = TypeVar("R")


class _Update(NamedTuple):
    """The running statistics of a layer and the statistics of the batch, each ``[S, C]``."""

    mean: Tensor
    var: Tensor
    batch_mean: Tensor
    batch_var: Tensor
    n: Tensor  # [S], values per channel


class _Joint:
    """The pending updates of a block, grouped by the settings that must be equal to apply them together."""

    def __init__(self) -> None:
        self.updates: dict[Any, list[_Update]] = {}
        self.counts: dict[Any, tuple[Tensor | int, list[Tensor]]] = {}
        self.present: dict[int, tuple[Tensor, Tensor]] = {}
        self._changing: set[int] = set()

    def add(self, momentum: float, update: _Update) -> None:
        self._claim(update.mean)
        kinds = (update.mean.dtype, update.var.dtype, update.batch_var.dtype, update.mean.device)
        self.updates.setdefault((momentum, *kinds), []).append(update)

    def count(self, counter: Tensor, batches: Tensor | int) -> None:
        self._claim(counter)
        key = batches if isinstance(batches, int) else id(batches)
        self.counts.setdefault((key, counter.device), (batches, []))[1].append(counter)

    def _claim(self, tensor: Tensor) -> None:
        """Applies the pending updates if one of them is of ``tensor``: its layer was called a second time."""
        if id(tensor) in self._changing:
            self.apply()
        self._changing.add(id(tensor))

    def apply(self) -> None:
        updates, counts = self.updates, self.counts
        self.updates, self.counts, self._changing = {}, {}, set()
        for (momentum, *_), group in updates.items():
            _update_all(group, momentum)
        for batches, counters in counts.values():
            _count_all(counters, batches)


class _State(threading.local):
    joint: _Joint | None = None


_state = _State()


@contextmanager
def joint_updates() -> Iterator[None]:
    """Collects this thread's updates in the block and applies them when the outermost block ends.

    If the block raises, they are dropped. Code that ``torch.compile`` traces updates immediately.
    """
    if _state.joint is not None:
        yield
        return
    joint = _state.joint = _Joint()
    try:
        yield
    finally:
        _state.joint = None
    joint.apply()


def with_joint_updates(forward: Callable[P, R]) -> Callable[P, R]:
    """Decorator: ``forward`` runs in a :func:`joint_updates` block, except if torch.compile traces it."""

    @functools.wraps(forward)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with joint_updates():
            return forward(*args, **kwargs)

    return wrapped


def _current() -> _Joint | None:
    return None if torch.compiler.is_compiling() else _state.joint


def update(norm: MixNorm, saved: Saved) -> None:
    """running ← (1 − m) running + m batch, with the unbiased variance; not for a branch without values.

    Args:
        norm: its ``mean`` and ``var`` change in place; m is its ``momentum``, a number or ``[S]``.
        saved: the batch statistics of the layer's forward.
    """
    layer = _Update(norm.mean, norm.var, saved.batch_mean, saved.batch_var, saved.n)
    joint = _current()
    if joint is None or isinstance(norm.momentum, Tensor):
        _update(layer, norm.momentum)
    else:
        joint.add(norm.momentum, layer)


@torch.no_grad()
def _update(layer: _Update, momentum: float | Tensor) -> None:
    n = layer.n[:, None]
    rate = momentum[:, None].to(n) if isinstance(momentum, Tensor) else momentum
    for running, batch in ((layer.mean, layer.batch_mean), (layer.var, _unbiased(layer.batch_var, n))):
        running.copy_(_moved(running, batch, n, rate))


def _unbiased(var: Tensor, n: Tensor) -> Tensor:
    return var * (n / (n - 1).clamp(min=1))


def _moved(running: Tensor, batch: Tensor, n: Tensor, rate: float | Tensor) -> Tensor:
    return torch.where(n > 0, (1 - rate) * running + rate * batch, running)


@torch.no_grad()
def _update_all(updates: list[_Update], momentum: float) -> None:
    """:func:`_update` of all layers, side by side as one vector."""
    if len(updates) == 1:
        return _update(updates[0], momentum)
    n = torch.cat([count.expand(layer.mean.shape[1]) for layer in updates for count in layer.n.unbind()])
    means, variances, batch_means, batch_variances = (
        [row for layer in updates for row in layer[i].unbind()] for i in range(4)
    )
    unbiased = _unbiased(torch.cat(batch_variances), n)
    batch = torch.cat([*batch_means, unbiased]).view(2, -1)
    running = torch.cat([*means, *variances]).view(2, -1)
    targets = [*means, *variances]
    moved = _moved(running, batch, n, momentum).view(-1).split([len(row) for row in targets])
    torch._foreach_copy_(targets, moved)


def present_branches(is_clean: Tensor) -> Tensor:
    """Whether the batch has adversarial and clean samples, bool ``[2]``; computed once per block."""
    joint = _current()
    if joint is None:
        return _present(is_clean)
    if id(is_clean) not in joint.present:
        joint.present[id(is_clean)] = is_clean, _present(is_clean)
    return joint.present[id(is_clean)][1]


def _present(is_clean: Tensor) -> Tensor:
    return torch.stack([~is_clean, is_clean]).any(1)


def count(counter: Tensor, batches: Tensor | int) -> None:
    """``counter`` += ``batches``: an int, or bool ``[S]`` like the counter, int64 ``[S]``."""
    joint = _current()
    if joint is None:
        counter.add_(batches)
    else:
        joint.count(counter, batches)


@torch.no_grad()
def _count_all(counters: list[Tensor], batches: Tensor | int) -> None:
    if isinstance(batches, Tensor):
        torch._foreach_add_(counters, [batches.to(counters[0].dtype)] * len(counters))
    elif batches:
        torch._foreach_add_(counters, batches)

"""The steps of an evaluation's PGD attacks as CUDA graphs, with the same images as without them."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from awnet import ops
from awnet.attacks.base import Attack
from awnet.attacks.filtered import FilteredAttack
from awnet.attacks.pgd import PGD
from awnet.cuda_graphs import GraphCache, Record
from awnet.cuda_graphs import capture as capture_graph
from awnet.nn import InferenceCopy


def captures_attacks(capture: bool | Literal["auto"], device: torch.device, model: nn.Module) -> bool:
    """Resolves ``capture`` for attacks on ``model``: ``"auto"`` captures an inference copy on a CUDA device.

    Raises:
        ValueError: ``capture`` is True where nothing can be captured, or is none of True, False and "auto".
    """
    if not (isinstance(capture, bool) or capture == "auto"):
        raise ValueError(f"capture must be True, False or 'auto', got {capture!r}")
    copied = isinstance(model, InferenceCopy)
    if capture == "auto":
        return device.type == "cuda" and copied
    if capture and device.type != "cuda":
        raise ValueError(f"capture needs a CUDA device, got {device}: leave it out")
    if capture and not copied:
        raise ValueError(
            f"capture needs an inference copy of the model, but a {type(model).__name__} is attacked itself: "
            "leave it out"
        )
    return capture


@contextmanager
def graphed_steps(
    attacks: Iterable[Attack], num_classes: int, record: Record | None = None
) -> Iterator[None]:
    """Replays the steps of those ``attacks`` that can be captured as CUDA graphs, for a block of code.

    These are PGD and CW with at least two steps on an inference copy, also as the first attack of a
    :class:`FilteredAttack`. Other attacks drop the images that are broken, so each of their batches has
    another shape, or have a loss that may wait for the device.

    Args:
        attacks: attacks on models whose weights do not change in this block.
        num_classes: K.
        record: captures a program; None captures CUDA graphs.
    """
    graphed: list[GraphedSteps] = []
    try:
        for attack in attacks:
            one = attack.first if isinstance(attack, FilteredAttack) else attack
            if isinstance(one, PGD) and _capturable(one):
                graphed.append(GraphedSteps(one, num_classes, record))
                one.graphed = graphed[-1]
        yield
    finally:
        for steps in graphed:
            steps.attack.graphed = None
            steps.close()


def _capturable(attack: PGD) -> bool:
    known = type(attack).perturb is PGD.perturb and isinstance(attack.loss, str)
    return known and attack.steps > 1 and isinstance(attack.model, InferenceCopy)


class GraphedSteps:
    """:meth:`PGD.ascend` of an attack on an inference copy, as one CUDA graph for each batch shape.

    The first batch of a shape runs without a graph. The second runs both ways; if the capture fails, or if
    the images differ in a single bit, this and all later batches run without graphs, with a warning.

    Args:
        attack: on an :class:`InferenceCopy` whose weights do not change.
        num_classes: K.
        record: captures a program; None captures CUDA graphs.
    """

    def __init__(self, attack: PGD, num_classes: int, record: Record | None = None) -> None:
        assert isinstance(attack.model, InferenceCopy)
        self.attack, self.model, self.num_classes = attack, attack.model, num_classes
        # cuDNN must run the same algorithms as in the steps without a graph
        self.cache = GraphCache(record or partial(capture_graph, warm_ups=2, fastest=False), max_graphs=1)
        self._seen: set[Hashable] = set()

    def close(self) -> None:
        """Drops the graph and its memory."""
        self.cache.clear()
        self._seen.clear()

    def __call__(self, start: Tensor, x: Tensor, y: Tensor, largest_label: int) -> Tensor:
        """As :meth:`PGD.ascend`."""
        tensors = start, x, y
        shapes = tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors)
        key = (shapes, ops.chosen_backend(), torch.are_deterministic_algorithms_enabled())
        checked = largest_label < self.num_classes  # otherwise the plain steps raise
        if checked and key in self.cache:
            graph = self.cache.prepared(key, self._program, tensors)
            assert graph is not None
            return graph(*tensors)
        x_adv = self.attack.ascend(start, x, y, largest_label)
        if checked and key in self._seen and self.cache.refusal is None:
            self._capture(key, tensors, x_adv)
        self._seen.add(key)
        return x_adv

    def _capture(self, key: Hashable, tensors: tuple[Tensor, ...], expected: Tensor) -> None:
        """Captures the steps, and keeps the graph if it gives the ``expected`` images."""
        device = expected.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            graph = self.cache.graph(key, self._program, tensors)
            # NaN, which a gradient that is not finite gives, counts as equal; no pixel is 2
            if graph is not None and not torch.equal(graph(*tensors).nan_to_num(2), expected.nan_to_num(2)):
                self.cache.refuse("it gives other images than the steps one by one")
        self.model.clear_cache()  # the program cached tensors in the graph's memory
        if self.cache.refusal is not None:
            warnings.warn(f"no CUDA graph, so slower: {self.cache.refusal}", stacklevel=2)

    def _program(self, start: Tensor, x: Tensor, y: Tensor) -> Tensor:
        self.model.clear_cache()  # a graph computes cached tensors again, in its own memory
        return self.attack.ascend(start, x, y, self.num_classes - 1)

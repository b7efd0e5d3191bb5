"""The attack of training: all PGD steps of a batch as one CUDA graph over a frozen copy of the model."""

from __future__ import annotations

import logging
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awnet import ops
from awnet.attacks.base import check_count
from awnet.attacks.pgd import PGD
from awnet.graphs import Record, Recorded, capture
from awnet.nn import frozen_copy, not_supported, unwrapped
from awnet.nn.freezing import frozen

logger = logging.getLogger(__name__)

_MOST_CAPTURES = 32  # each takes seconds: with shapes that never come again the plain loop is faster


class GraphedPGD:
    """PGD as a training step calls it: on the model as it now is, without a wait for the device.

    Where a frozen copy can replace the model (:func:`awnet.nn.not_supported`, asked at each call), the attack
    runs on that copy, which takes the model's present weights at each call; the model itself and its mode are
    not touched. On a CUDA device the weights'
    copying and all steps of a batch are one CUDA graph, captured for each batch shape, dtype, backend and
    attack size, with the same x_adv to the last bit as without. The start's noise is keyed by seed and sample
    (``awnet.rng``) and made outside the graph, so no random generator need be registered with it. On a CPU,
    and where capture fails, the same steps run one by one; the log says why, once.

    Any other model (a converted network, a subclass, a model with hooks) is frozen in place for the call
    (:func:`awnet.attacks.frozen`), and the log says why, once.

    Args:
        model: maps images in [0, 1] to logits ``[B, K]``.
        num_classes: K; labels are not looked at.
        dtype: of the frozen copy's weights and images; the model's own if None.
        capture: whether the model and the loss can be captured, that is wait for nothing on the host; None
            means yes, unless the loss is a function.
        max_graphs: graphs that are kept, each with the memory of a whole batch (the usual one, and the last
            of an epoch); beyond them the one used longest ago goes.
        record: what captures and replays a batch's operations; None is a CUDA graph, on CUDA devices.
        settings: those of :class:`PGD`. ``seed`` may be set anew at any time.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        dtype: torch.dtype | None = None,
        capture: bool | None = None,
        max_graphs: int = 2,
        record: Record | None = None,
        **settings: Any,
    ) -> None:
        self.pgd = PGD(model, **settings)
        self.model = model
        self.num_classes = check_count("num_classes", num_classes)
        self.dtype = dtype
        self.capture = isinstance(self.pgd.loss, str) if capture is None else capture
        self.max_graphs = max_graphs
        self.record = record
        self._module: Any = None  # the frozen copy, None where the model itself runs
        self._graphs: OrderedDict[tuple[Any, ...], Recorded] = OrderedDict()
        self._captures = 0
        self._refusal: str | None = None  # why nothing more is captured
        self._said: set[str] = set()

    @property
    def seed(self) -> int:
        return self.pgd.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.pgd.seed = seed

    def __call__(self, x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
        """Adversarial images ``[B, C, H, W]`` in ``x``'s dtype, float32 or float64, for ``x`` in [0, 1].

        ``y`` int64 ``[B]``; ``index`` int64 ``[B]`` keys the noise. Values are not checked: where a gradient
        is not finite the result is NaN.
        """
        x = x.detach()
        with torch.inference_mode(False), torch.enable_grad():
            reason = not_supported(self.model)
            if reason is not None:
                self._graphs.clear()
                self._module = None
                self._say(f"the training attack runs the model itself, frozen in place: {reason}")
                self.pgd.model = self.model
                with frozen(self.model):
                    return self.pgd.perturb(x, y, index, self.num_classes - 1)
            module = self._module
            if module is None or _device(module) != x.device or not module.is_of(unwrapped(self.model)):
                self._graphs.clear()
                self._module = frozen_copy(self.model, self.dtype)
            start = self.pgd.start(x, index)
            if len(x) == 0:
                return start
            self.pgd.model = self._module
            obstacle = self._obstacle(x)
            graph = obstacle or self._graph(start, x, y)
            if isinstance(graph, Recorded):
                return graph(start, x, y)
            self._say(f"attack steps run one by one: {graph}")
            return self._program(start, x, y)

    def _obstacle(self, x: Tensor) -> str | None:
        """Why the steps cannot be recorded; None where they can."""
        if self._refusal is not None:
            return self._refusal
        if not self.capture:
            return "the loss or the model may wait for the device"
        if self.record is not None:
            return None
        if x.device.type != "cuda":
            return f"CUDA graphs need a CUDA device, and the images are on {x.device}"
        if torch.cuda.is_current_stream_capturing():
            return "a capture is under way, which takes them in"
        return None

    def _graph(self, start: Tensor, x: Tensor, y: Tensor) -> Recorded | str:
        """The graph for such a batch, or why there is none."""
        key = self._key(start, x, y)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if self._captures >= _MOST_CAPTURES:
            self._refusal = f"{_MOST_CAPTURES} captures, and yet another batch shape"
            return self._refusal
        self._captures += 1
        while len(self._graphs) >= self.max_graphs:
            self._graphs.popitem(last=False)
        try:
            record = self.record or partial(capture, warm_ups=2)
            graph = Recorded(self._program, (start, x, y), record)
        except RuntimeError as error:
            self._refusal = f"they could not be captured ({error})"
            return self._refusal
        self._graphs[key] = graph
        return graph

    def _key(self, *tensors: Tensor) -> tuple[Any, ...]:
        """All that a graph holds fast: shapes, sizes of the attack, backend, addresses of the weights."""
        pgd = self.pgd
        shapes = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        sizes = (pgd.eps, pgd.step_size, pgd.steps, pgd.loss, pgd.kappa, self.num_classes)
        modes = (ops.chosen_backend(), torch.are_deterministic_algorithms_enabled())
        return (*shapes, *sizes, *modes, *self._module.baked())

    def _program(self, start: Tensor, x: Tensor, y: Tensor) -> Tensor:
        # the frozen copy has a dtype of its own, and its backward pass would see the caller's autocast
        with torch.autocast(x.device.type, enabled=False):
            self._module.refresh()
            return self.pgd.ascend(start, x, y, self.num_classes - 1)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.info(reason)


def _device(module: nn.Module) -> torch.device | None:
    return next((p.device for p in module.parameters()), None)

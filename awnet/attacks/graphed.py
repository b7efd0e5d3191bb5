"""The training attack: all PGD steps of a batch as one CUDA graph on an inference copy of the model."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from awnet import ops
from awnet.attacks.base import check_count
from awnet.attacks.pgd import PGD
from awnet.cuda_graphs import GraphCache, Record
from awnet.cuda_graphs import capture as capture_graph
from awnet.nn import inference_copy, not_supported, unwrapped
from awnet.nn.freezing import frozen
from awnet.nn.inference import Watch

logger = logging.getLogger(__name__)


class GraphedPGD:
    """PGD for a training step: it attacks the model with its current weights and never waits for the device.

    If an inference copy can replace the model (:func:`awnet.nn.not_supported`, checked at each call), the
    attack runs on that copy and copies the model's current weights to it at each call; the model and its mode
    are not touched. On a CUDA device, copying the weights and all steps of a batch are one CUDA graph,
    captured for each batch shape, dtype, backend and settings of the attack. The images are bitwise those of
    the uncaptured attack, if cuDNN runs the same algorithms. The noise of the start is a function of seed and
    sample (``awnet.rng``), so no random generator is registered with the graph. On a CPU, and where capture
    fails, the same steps run one by one, and the reason is logged once, as a warning if a capture failed.

    Any other model (a converted network, a subclass, a model with hooks) is frozen in place for the call
    (:func:`awnet.attacks.frozen`), and the reason is logged once.

    Args:
        model: maps images in [0, 1] to logits ``[B, K]``.
        kind: class of the attack, :class:`PGD` or a subclass that starts elsewhere.
        num_classes: K; the values of labels are not checked.
        dtype: dtype of the copy's weights and images; the model's own if None.
        capture: whether model and loss can be captured, that is, never wait for the device; by default True
            unless the loss is a function.
        max_graphs: number of graphs that are kept, each with the memory of a whole batch. Two are enough for
            the usual batch and the last one of an epoch.
        record: captures and replays the operations of a batch; None captures CUDA graphs on CUDA devices.
        settings: those of ``kind``. ``seed`` may be changed at any time.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        kind: type[PGD] = PGD,
        dtype: torch.dtype | None = None,
        capture: bool | None = None,
        max_graphs: int = 2,
        record: Record | None = None,
        **settings: Any,
    ) -> None:
        self.pgd = kind(model, **settings)
        self.model = model
        self.num_classes = check_count("num_classes", num_classes)
        self.dtype = dtype
        self.capture = isinstance(self.pgd.loss, str) if capture is None else capture
        self.record = record
        self.graphs = GraphCache(record or partial(capture_graph, warm_ups=2), max_graphs)
        self._copy: Any = None  # the inference copy; None if the model itself runs
        self._device: torch.device | None = None  # of the copy
        self._watch: Watch | None = None  # for changes of the model that the copy or its graph may not allow
        self._weights_key: tuple[Any, ...] = ()
        self._logged: set[str] = set()

    @classmethod
    def of(cls, attack: PGD, *, num_classes: int, record: Record | None = None) -> GraphedPGD:
        """The same attack on an inference copy of the same model, in the model's dtype, without checks."""
        settings = {name: value for name, value in attack.settings.items() if name != "attack"}
        if not isinstance(attack.loss, str):
            settings["loss"] = attack.loss
        return cls(attack.model, num_classes=num_classes, record=record, **settings)

    @property
    def seed(self) -> int:
        return self.pgd.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.pgd.seed = seed

    def close(self) -> None:
        """Drops the CUDA graphs; a later call captures new ones."""
        self.graphs.clear()

    def __call__(self, x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
        """Adversarial images ``[B, C, H, W]`` in ``x``'s dtype, float32 or float64, for ``x`` in [0, 1].

        ``y`` int64 ``[B]``; ``index`` int64 ``[B]`` keys the noise. Values are not checked: where a gradient
        is not finite the result is NaN.
        """
        x = x.detach()
        with torch.inference_mode(False), torch.enable_grad():
            if self._watch is None or x.device != self._device or not self._watch.unchanged():
                reason = self._prepare(x.device)
                if reason is not None:
                    self._log(f"the training attack runs the model itself, frozen in place: {reason}")
                    self.pgd.model = self.model
                    with frozen(self.model):
                        return self.pgd.perturb(x, y, index, self.num_classes - 1)
            if len(x) == 0:
                return x.clone()
            self.pgd.model = self._copy
            tensors = x, y, index, torch.full((), self.pgd.start_key(), dtype=torch.int64, device=x.device)
            reason, level = self._not_capturable(x), logging.INFO
            if reason is None:
                graph = self.graphs.graph(self._key(*tensors), self._program, tensors)
                if graph is not None:
                    return graph(*tensors)
                reason, level = self.graphs.refusal, logging.WARNING
            self._log(f"attack steps run one by one: {reason}", level)
            return self._program(*tensors)

    def _prepare(self, device: torch.device) -> str | None:
        """Makes the inference copy, unless it still fits; returns why none can replace the model."""
        reason = not_supported(self.model)
        if reason is not None:
            self.graphs.clear()
            self._copy = self._watch = None
            return reason
        copy = self._copy
        if copy is None or device != self._device or not copy.matches(unwrapped(self.model)):
            self.graphs.clear()
            self._copy = inference_copy(self.model, self.dtype)
        self._device, self._watch = device, Watch(self.model)
        self._weights_key = self._copy.graph_key()
        return None

    def _not_capturable(self, x: Tensor) -> str | None:
        """Why the steps cannot be captured here; None if they can."""
        if not self.capture:
            return "the loss or the model may wait for the device"
        if self.record is not None:
            return None
        if x.device.type != "cuda":
            return f"CUDA graphs need a CUDA device, and the images are on {x.device}"
        if torch.cuda.is_current_stream_capturing():
            return "they are part of the CUDA graph that is being captured"
        return None

    def _key(self, *tensors: Tensor) -> tuple[Any, ...]:
        """The cache key of a graph: shapes, settings of the attack, backend, addresses of the weights."""
        pgd = self.pgd
        shapes = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        sizes = (pgd.norm, pgd.eps, pgd.step_size, pgd.steps, pgd.loss, pgd.kappa, self.num_classes)
        modes = (ops.chosen_backend(), torch.are_deterministic_algorithms_enabled())
        return (*shapes, *sizes, *modes, self._weights_key)

    def _program(self, x: Tensor, y: Tensor, index: Tensor, key: Tensor) -> Tensor:
        # autocast of the caller would change the dtypes of the copy, also in its backward
        with torch.autocast(x.device.type, enabled=False):
            self._copy.refresh()
            return self.pgd.ascend(self.pgd.start(x, index, key), x, y, self.num_classes - 1)

    def _log(self, reason: str, level: int = logging.INFO) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            logger.log(level, reason)

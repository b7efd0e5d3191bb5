"""One training step: forward, loss, backward, guard, optimiser. The loop calls it and never waits for it.

What a step whose loss or gradient is not finite leaves unchanged, decided on the device without the host:
weights, momentum, every buffer of the model (running statistics too), MTARD's weights and the weight average.
What goes on: the learning rate's schedule, the position in the data, torch's generators.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from awnet.cuda_graphs import Graphed, Record, capture
from awnet.nn.copies import copied
from awnet.nn.wrappers import with_wrapper_names, without_wrapper_names
from awnet.training.losses import Attack, Averaging, Batch, Loss, LossResult, MTARDWeights, Teachers
from awnet.training.recipes import MTARD, Recipe
from awnet.training.teachers import TeacherModel


class Numerics(NamedTuple):
    """What ``auto`` comes to on a device; goes into config.json.

    precision: of convolutions and products. Weights, statistics and coefficients are float32 (or the
        model's own dtype) in any case.
    layout: memory format of images and convolution weights.
    """

    precision: Literal["float32", "bfloat16"]
    layout: Literal["nchw", "channels_last"]


def numerics(recipe: Recipe, device: torch.device) -> Numerics:
    """bfloat16 and channels_last on CUDA, float32 and NCHW elsewhere, where the recipe says ``auto``."""
    cuda = device.type == "cuda"
    precision = recipe.precision
    if precision == "auto":
        precision = "bfloat16" if cuda else "float32"
    layout = recipe.layout
    if layout == "auto":
        layout = "channels_last" if cuda else "nchw"
    return Numerics(precision, layout)


class TrainingStep:
    """Trains ``model`` by ``recipe``, one batch a call.

    It owns what a step changes: ``optimizer``, ``scheduler``, MTARD's ``weights`` and the weight average.

    Args:
        recipe: how to train.
        model: on ``device``; trained in place, its convolutions laid out as ``recipe.layout`` says.
        device: where the model and the batches are.
        steps_per_epoch: for the schedule.
        teachers: for a recipe that distils; private copies, as they are changed in precision and layout.
        average: of a distributed run: ``average(tensors, count)`` replaces tensors, in place, by their means
            over the ranks, each weighted by its ``count``. Called with the gradients and the loss (0-d), with
            equal counts, before anything is decided upon them, and with MTARD's losses.
        record: captures the step with ``recipe.capture``; None captures CUDA graphs on a CUDA device.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        device: torch.device,
        steps_per_epoch: int,
        teachers: Teachers | None = None,
        *,
        average: Averaging | None = None,
        record: Record | None = None,
    ) -> None:
        if recipe.capture and record is None and device.type != "cuda":
            raise ValueError(f"capture needs a CUDA device, got {device}: leave it out")
        self.recipe, self.model, self.device, self._over_ranks = recipe, model, device, average
        self.numerics = numerics(recipe, device)
        self.memory_format = (
            torch.channels_last if self.numerics.layout == "channels_last" else torch.contiguous_format
        )
        model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.teachers = None
        if teachers is not None:
            self.teachers = Teachers(*(self._teacher(one) for one in teachers if one is not None))
        self.options = recipe.loss_options()
        self.optimizer = recipe.optimizer(model)
        self.scheduler = recipe.scheduler(self.optimizer, steps_per_epoch)
        self.graphed = Graphed(self._learn_from, record or capture) if recipe.capture else None
        self._rates = [torch.zeros((), device=device) for _ in self.optimizer.param_groups]
        self._weight = torch.ones((), dtype=torch.float64, device=device)  # which a graph reads
        self._names: list[str] = []
        adapts = isinstance(recipe, MTARD) and recipe.adv_weight is None
        self.weights = MTARDWeights(device, average=average) if adapts else None
        self.average = Average(model, recipe.ema_decay) if recipe.ema_decay else None
        for group in self.optimizer.param_groups:
            if group["momentum"]:
                for parameter in group["params"]:  # what a first step that is skipped would leave undefined
                    self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def start_epoch(self, epoch: int) -> None:
        """Before the steps of ``epoch`` (the first is 0), also where a run goes on within it."""
        self.model.train()
        if self.weights is not None:
            assert isinstance(self.recipe, MTARD)
            # all micro-batches of a step together move the weights as far as one batch would
            self.weights.learning_rate = self.recipe.weight_lr_at(epoch) / self.recipe.accumulate

    def _teacher(self, teacher: nn.Module) -> TeacherModel:
        low = self.numerics.precision == "bfloat16"
        return TeacherModel(teacher, self._autocast, low, self.memory_format)

    def _autocast(self) -> torch.autocast:
        low = self.numerics.precision == "bfloat16"
        # without its cache of cast weights: an attack in between would leave casts that know of no gradient
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low, cache_enabled=False)

    def __call__(self, batch: Batch, attack: Attack, weight: float = 1.0) -> dict[str, Tensor]:
        """Trains on one batch, in ``recipe.accumulate`` micro-batches.

        ``weight``: of this rank's loss in the mean over the ranks, its number of images over the ranks' mean
        number. It multiplies the loss, not the gradient, since a gradient through shared batch statistics has
        parts of all ranks' losses.

        Returns the loss's terms, means over the batch, with ``grad_norm`` (before clipping) and ``skipped``,
        1 for a step that was left out because loss or gradient was not finite; all 0-d, on the device.
        """
        batch = _Piece(batch.x.contiguous(memory_format=self.memory_format), batch.y, batch.index)
        self._weight.fill_(weight)
        if self.graphed is None:
            terms = self._learn(batch, attack)
        else:
            terms = self._replayed(batch, attack)
        self.scheduler.step()
        return terms

    def _learn(self, batch: _Piece, attack: Attack) -> dict[str, Tensor]:
        """All of a step that happens on the device: an update for each of the recipe's losses in turn."""
        phases = [self._learn_by(loss, batch, attack) for loss in self.recipe.phases()]
        terms = phases[0]
        for later in phases[1:]:  # its own terms; of those that both have, the first loss's
            skipped = torch.maximum(terms["skipped"], later["skipped"])
            terms = {**later, **terms, "skipped": skipped}
        return terms

    def _learn_by(self, loss: Loss, batch: _Piece, attack: Attack) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        kept = _Kept(self._guarded())
        pieces = min(self.recipe.accumulate, len(batch.y))
        shares, results = [], []
        for piece in _pieces(batch, pieces):
            share = len(piece.y) / len(batch.y)
            with self._autocast():
                result: LossResult = loss(
                    self.model, piece, attack, self.options, self.teachers, self.weights
                )
            total = result.total if pieces == 1 else result.total * share
            if self._over_ranks is not None:
                total = total * self._weight.to(total.dtype)
            total.backward()
            shares.append(share)
            results.append(result.terms)
        terms = results[0] if pieces == 1 else _mean(results, shares)
        return {**terms, **self._update(terms["total"], kept)}

    def _guarded(self) -> list[Tensor]:
        """What the forward pass changes in place."""
        own = [] if self.weights is None else list(self.weights.state_dict().values())
        return [*self.model.buffers(), *own]

    def _update(self, total: Tensor, kept: _Kept) -> dict[str, Tensor]:
        """The optimiser's step, or none where something is not finite."""
        for parameter in self.model.parameters():
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                parameter.grad = _like(parameter, parameter.grad)  # the fused optimiser wants one layout
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = total.clone()
        if self._over_ranks is not None:
            self._over_ranks([*gradients, total], 1)
        norm = torch.nn.utils.get_total_norm(gradients)
        failed = ~(norm.isfinite() & total.isfinite())
        # the fused optimiser does nothing where found_inf is 1, and divides by grad_scale
        self.optimizer.found_inf = failed.float()  # type: ignore[attr-defined]
        if self.recipe.clip_norm is not None:
            self.optimizer.grad_scale = (norm.float() / self.recipe.clip_norm).clamp(min=1)  # type: ignore[attr-defined]
        self.optimizer.step()
        kept.restore(failed)
        if self.average is not None:
            self.average.update(self.model, failed)
        return {"grad_norm": norm, "skipped": failed.float()}

    # The same as a CUDA graph, all but the attack, which is a graph of its own

    def _replayed(self, batch: _Piece, attack: Attack) -> dict[str, Tensor]:
        assert self.graphed is not None
        x_adv = batch.x
        if self.recipe.needs_attack:
            with self._autocast():
                x_adv = attack(batch.x, batch.y, index=batch.index)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate, tensor in zip(self.optimizer.param_groups, rates, self._rates, strict=True):
            tensor.fill_(rate)
            group["lr"] = tensor  # which the graph reads
        try:
            # the learning rate of MTARD's weights is a number in the graph
            rate = None if self.weights is None else self.weights.learning_rate
            terms = self.graphed(*batch, x_adv, key=rate)
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        return dict(zip(self._names, terms.unbind(), strict=True))

    def _learn_from(self, x: Tensor, y: Tensor, index: Tensor, x_adv: Tensor) -> Tensor:
        terms = self._learn(_Piece(x, y, index), lambda x, y, index: x_adv)
        self._names = list(terms)
        return torch.stack([term.float() for term in terms.values()])

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is validated and saved: the weight average if there is one, else the model."""
        return self.model if self.average is None else self.average.module

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "weights": {} if self.weights is None else self.weights.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, own in self.optimizer.state.items():
            if "momentum_buffer" in own:
                own["momentum_buffer"] = _like(parameter, own["momentum_buffer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.weights is not None:
            self.weights.load_state_dict(state["weights"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


class Average:
    """The exponential moving average of a model's weights and floating-point buffers, as a model.

    θ̄ ← θ̄ + r (θ − θ̄) with r = max(1 − decay, 9 / (n + 9)) at the n-th step that counts, so that the first
    weights, which are random, are soon forgotten. Whole numbers (``num_batches_tracked``) are copied. torch's
    ``AveragedModel`` asks the device at every step whether it is the first; this never does.

    module: the averaged model, in eval mode, without gradients.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copied(model).eval().requires_grad_(False)
        self.decay = decay
        self.count = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model: nn.Module, failed: Tensor) -> None:
        """Takes in the model's values, unless ``failed`` (bool, 0-d)."""
        ours, theirs, counts, new_counts = [], [], [], []
        for one, other in zip(_tensors(self.module), _tensors(model), strict=True):
            if one.is_floating_point():
                ours.append(one)
                theirs.append(other)
            else:
                counts.append(one)
                new_counts.append(other)
        self.count += ~failed
        rate = (9 / (self.count + 9)).clamp(min=1 - self.decay)
        step = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(step, torch.where(failed, 0.0, rate))
        torch._foreach_add_(ours, step)
        if counts:
            torch._foreach_copy_(counts, new_counts)

    def state_dict(self) -> dict[str, Any]:
        return {"model": without_wrapper_names(self.module, self.module.state_dict()), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(with_wrapper_names(self.module, state["model"]))
        self.count.copy_(state["count"])


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """``values`` laid out in memory as ``parameter`` is."""
    return torch.empty_like(parameter, requires_grad=False).copy_(values)


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


class _Kept:
    """Copies of tensors that are about to change in place, and the way back, in a few launches in all."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            self.groups.setdefault(tensor.dtype, []).append(tensor)
        self.before = {dtype: _flat(group) for dtype, group in self.groups.items()}

    def restore(self, failed: Tensor) -> None:
        """Puts the old values back where ``failed`` (bool, 0-d)."""
        for dtype, group in self.groups.items():
            chosen = torch.where(failed, self.before[dtype], _flat(group))
            parts = chosen.split([tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [p.view(t.shape) for p, t in zip(parts, group, strict=True)])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class _Piece(NamedTuple):
    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


def _pieces(batch: _Piece, count: int) -> list[_Piece]:
    if count == 1:
        return [batch]
    parts = (tensor.tensor_split(count) for tensor in batch)
    return [_Piece(*piece) for piece in zip(*parts, strict=True)]


def _mean(results: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    pairs = list(zip(results, shares, strict=True))
    return {name: torch.stack([result[name] * share for result, share in pairs]).sum() for name in results[0]}

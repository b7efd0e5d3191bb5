"""One training step: attack, forward, loss, backward, optimizer; the host never waits for the device.

A step whose loss or gradient is not finite leaves weights, momentum, all buffers of the model (running
statistics too), MTARD's weights and the weight average unchanged. The device decides this. The schedule of
the learning rate, the position in the data and torch's generators still advance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from awnet.cuda_graphs import Graphed, Record
from awnet.data.dataset import Batch
from awnet.nn.copies import copied
from awnet.nn.wrappers import with_wrapper_names, without_wrapper_names
from awnet.ops.running_statistics import joint_updates
from awnet.training.forward import Phase, Teachers
from awnet.training.losses import Averaging, MTARDWeights, TeacherTemperatures
from awnet.training.recipes import MTARD, Precision, Recipe
from awnet.training.teachers import TeacherModel
from awnet.training.weight_perturbation import perturbed, perturbed_weights

#: images [B, C, H, W], labels [B], ``index=`` → adversarial images
Attack = Callable[..., Tensor]
#: a part of a batch and its adversarial images
MicroBatch = tuple[Batch, Tensor | None]


class Numerics(NamedTuple):
    """The values of ``auto`` on a device; stored in config.json.

    precision: dtype of convolutions and matrix products. Weights, statistics and coefficients are always
        float32 (or the model's dtype).
    layout: memory format of images and convolution weights.
    attack_precision: the same for the attacked network.
    """

    precision: Precision
    layout: Literal["nchw", "channels_last"]
    attack_precision: Precision

    @property
    def precisions(self) -> str:
        """The precision of training, and that of the attack if it differs, as text for messages."""
        if self.attack_precision == self.precision:
            return self.precision
        return f"{self.precision} with a {self.attack_precision} attack"

    def __str__(self) -> str:
        return f"{self.precisions}, {self.layout}"


def numerics(recipe: Recipe, device: torch.device) -> Numerics:
    """Resolves ``auto``: bfloat16 on CUDA, float32 elsewhere; channels_last on CUDA and with bfloat16."""
    precision, attack_precision = recipe.precisions(device)
    layout = recipe.layout
    if layout == "auto":
        layout = "channels_last" if device.type == "cuda" or precision == "bfloat16" else "nchw"
    return Numerics(precision, layout, attack_precision)


def captures(recipe: Recipe, device: torch.device) -> bool:
    """Resolves ``recipe.capture``: ``auto`` captures a step of one micro-batch and one phase on CUDA."""
    if recipe.capture == "auto":
        return device.type == "cuda" and recipe.accumulate == 1 and len(recipe.phases()) == 1
    return recipe.capture


class TrainingStep:
    """Trains ``model`` with ``recipe``, one batch per call.

    It holds what a step changes: ``optimizer``, ``scheduler``, MTARD's ``weights`` and the weight average.

    Args:
        recipe: how to train.
        model: on ``device``; trained in place, with convolution weights in the layout ``recipe.layout``.
        device: device of the model and the batches.
        steps_per_epoch: number of steps per epoch, for the schedule of the learning rate.
        teachers: for a recipe that distills. Pass copies, since their precision and layout are changed.
        average: in a distributed run, ``average(tensors, count)`` replaces tensors in place with their means
            over the ranks, each weighted by its ``count``. It is called with the gradients and the loss
            (0-d), with equal counts, before they are checked, and with MTARD's losses.
        record: captures the step, if :func:`captures` is True; None captures CUDA graphs on a CUDA device.
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
        if recipe.capture is True and record is None and device.type != "cuda":
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
        self.optimizer = recipe.build_optimizer(model)
        self.scheduler = recipe.build_scheduler(self.optimizer, steps_per_epoch)
        self.graphed = Graphed(self._captured, record) if captures(recipe, device) else None
        self._rates = [torch.zeros((), device=device) for _ in self.optimizer.param_groups]
        self._weight = torch.ones((), dtype=torch.float64, device=device)
        self._names: list[str] = []
        self.weights = _adaptive_weights(recipe, device, average)
        self.average = Average(model, recipe.ema_decay) if recipe.ema_decay else None
        self._perturbed = perturbed_weights(model) if recipe.awp else []
        self._gamma = 0.0  # size of the weight perturbation in this epoch
        for group in self.optimizer.param_groups:
            if group.get("momentum"):
                for parameter in group["params"]:  # a skipped first step would leave it undefined
                    self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def start_epoch(self, epoch: int) -> None:
        """Call this before the first step of ``epoch`` (from 0), also when a run resumes within an epoch."""
        self.model.train()
        if self.weights is not None:
            assert isinstance(self.recipe, MTARD)
            # all micro-batches of a step change the weights as much as one batch would
            self.weights.learning_rate = self.recipe.weight_lr_at(epoch) / self.recipe.accumulate
            if self.weights.temperatures is not None:
                rate = self.recipe.temperature_lr_at(epoch) / self.recipe.accumulate
                self.weights.temperatures.learning_rate = rate
        gamma = self.recipe.awp if epoch >= self.recipe.awp_warmup else 0.0
        if gamma != self._gamma and self.graphed is not None:
            self.graphed.close()  # a captured step contains a fixed number of passes
        self._gamma = gamma

    def close(self) -> None:
        """Drops the CUDA graphs of the step and its teachers, for example before their process group ends.

        A later call captures new ones.
        """
        if self.graphed is not None:
            self.graphed.close()
        for teacher in self.teachers or ():
            if isinstance(teacher, TeacherModel):
                teacher.close()

    def _teacher(self, teacher: nn.Module) -> TeacherModel:
        precision = self.numerics.precision
        autocast = partial(self._autocast, precision)
        return TeacherModel(teacher, autocast, precision == "bfloat16", self.memory_format)

    def _autocast(self, precision: Precision) -> torch.autocast:
        low = precision == "bfloat16"
        # without the cache of cast weights: it would keep the casts of the attack, which have no gradient
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low, cache_enabled=False)

    def __call__(self, batch: Batch, attack: Attack, weight: float = 1.0) -> dict[str, Tensor]:
        """Trains on one batch, in ``recipe.accumulate`` micro-batches.

        Args:
            batch: on the device.
            attack: makes the adversarial images; it attacks the model in eval mode and restores its mode.
            weight: factor of this rank's loss: its number of images, divided by the mean number of images of
                the ranks. It multiplies the loss and not the gradient, since the gradient through shared
                batch statistics contains parts of all ranks' losses.

        Returns:
            The terms of the loss, means over the batch, with ``grad_norm`` (before clipping) and ``skipped``,
            1 if the step was skipped because loss or gradient were not finite; all 0-d, on the device.
        """
        batch = batch._replace(x=batch.x.contiguous(memory_format=self.memory_format))
        self._weight.fill_(weight)
        if self.graphed is None:
            phases = [
                self._update_by(phase, self._micro_batches(batch, attack), len(batch.y))
                for phase in self.recipe.phases()
            ]
            terms = _merged_terms(phases)
        else:
            terms = self._replayed(batch, attack)
        self.scheduler.step()
        return terms

    def _adversarial(self, batch: Batch, attack: Attack) -> Tensor | None:
        """The adversarial images of ``batch``; None for a recipe without attack."""
        if not self.recipe.needs_attack:
            return None
        with self._autocast(self.numerics.attack_precision):
            y = batch.y if batch.y.dim() == 1 else batch.y.argmax(1)  # of mixed labels the largest
            return attack(batch.x, y, index=batch.index)

    def _micro_batches(self, batch: Batch, attack: Attack) -> Iterator[MicroBatch]:
        """The micro-batches of ``batch``; each is attacked when it is consumed, after the earlier ones."""
        count = min(self.recipe.accumulate, len(batch.y))
        for part in [batch] if count == 1 else map(Batch, *(t.tensor_split(count) for t in batch)):
            yield part, self._adversarial(part, attack)

    def _update_by(self, phase: Phase, micro_batches: Iterable[MicroBatch], images: int) -> dict[str, Tensor]:
        """Forward, loss and backward of each micro-batch, then the update; returns the terms."""
        self.optimizer.zero_grad(set_to_none=True)
        saved = _Saved(self._mutable_tensors())
        if not self._gamma:
            terms = self._backward(phase, micro_batches, images)
            return {**terms, **self._optimize(terms["total"], saved)}
        attacked = list(micro_batches)  # both passes are over the same adversarial images
        gradients, failed = self._weight_gradients(phase, attacked, images)
        saved.restore(torch.ones_like(failed))  # only the second pass updates statistics and MTARD's weights
        with perturbed(self._perturbed, gradients, self._gamma):
            terms = self._backward(phase, attacked, images)
        return {**terms, **self._optimize(terms["total"], saved, failed)}

    def _losses(
        self, phase: Phase, micro_batches: Iterable[MicroBatch], images: int
    ) -> Iterator[tuple[Tensor, float, dict[str, Tensor]]]:
        """For each micro-batch the loss to differentiate, its share of the batch, and the terms."""
        for batch, x_adv in micro_batches:
            share = len(batch.y) / images
            with self._autocast(self.numerics.precision), joint_updates():
                result = phase.result(self.model, batch, x_adv, self.options, self.teachers, self.weights)
            total = result.total if share == 1 else result.total * share
            if self._over_ranks is not None:
                total = total * self._weight.to(total.dtype)
            yield total, share, result.terms

    def _backward(self, phase: Phase, micro_batches: Iterable[MicroBatch], images: int) -> dict[str, Tensor]:
        """Adds the gradients of all micro-batches to the parameters; returns the means of the terms."""
        shares, results = [], []
        for total, share, terms in self._losses(phase, micro_batches, images):
            total.backward()
            shares.append(share)
            results.append(terms)
        return results[0] if len(results) == 1 else _mean(results, shares)

    def _weight_gradients(
        self, phase: Phase, micro_batches: Iterable[MicroBatch], images: int
    ) -> tuple[list[Tensor], Tensor]:
        """The gradients of the perturbed weights, equal on all ranks, and whether one is not finite (0-d)."""
        sums: list[Tensor | None] = [None] * len(self._perturbed)
        for total, _, _ in self._losses(phase, micro_batches, images):
            grads = torch.autograd.grad(total, self._perturbed, allow_unused=True)
            sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, grads, strict=True)]
        pairs = zip(sums, self._perturbed, strict=True)
        gradients = [torch.zeros_like(weight) if one is None else one for one, weight in pairs]
        if self._over_ranks is not None:
            self._over_ranks(gradients, 1)
        return gradients, ~torch.nn.utils.get_total_norm(gradients).isfinite()

    def _mutable_tensors(self) -> list[Tensor]:
        """The tensors that the forward pass changes in place."""
        weights = [] if self.weights is None else list(self.weights.state_dict().values())
        return [*self.model.buffers(), *weights]

    def _optimize(self, total: Tensor, saved: _Saved, failed: Tensor | None = None) -> dict[str, Tensor]:
        """Runs the optimizer, unless loss or gradient are not finite or ``failed`` (bool, 0-d) is set."""
        for parameter in self.model.parameters():
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                # the fused optimizer needs the strides of the parameter
                parameter.grad = _like(parameter, parameter.grad)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = total.clone()
        if self._over_ranks is not None:
            self._over_ranks([*gradients, total], 1)
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = norm.isfinite() & total.isfinite()
        failed = ~finite if failed is None else failed | ~finite
        # the fused optimizer does nothing where found_inf is 1, and divides by grad_scale
        self.optimizer.found_inf = failed.float()  # type: ignore[attr-defined]
        if self.recipe.clip_norm is not None:
            self.optimizer.grad_scale = (norm.float() / self.recipe.clip_norm).clamp(min=1)  # type: ignore[attr-defined]
        self.optimizer.step()
        saved.restore(failed)
        if self.average is not None:
            self.average.update(self.model, failed)
        return {"grad_norm": norm, "skipped": failed.float()}

    # The step as a CUDA graph; the attack is a separate graph

    def _replayed(self, batch: Batch, attack: Attack) -> dict[str, Tensor]:
        assert self.graphed is not None
        x_adv = self._adversarial(batch, attack)
        learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate, tensor in zip(self.optimizer.param_groups, learning_rates, self._rates, strict=True):
            tensor.fill_(rate)
            group["lr"] = tensor  # the graph reads this tensor
        try:
            terms = self.graphed(*batch, *([] if x_adv is None else [x_adv]))
        finally:
            for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
                group["lr"] = rate
        return dict(zip(self._names, terms.unbind(), strict=True))

    def _captured(self, x: Tensor, y: Tensor, index: Tensor, x_adv: Tensor | None = None) -> Tensor:
        (phase,) = self.recipe.phases()
        terms = self._update_by(phase, [(Batch(x, y, index), x_adv)], len(y))
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
        for parameter, slots in self.optimizer.state.items():
            for name, value in slots.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    slots[name] = _like(parameter, value)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.weights is not None:
            self.weights.load_state_dict(state["weights"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def go_back(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, except for the schedule, which is not changed."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.load_state_dict({**state, "scheduler": self.scheduler.state_dict()})
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.close()  # a captured step refers to the optimizer's former tensors


class Average:
    """The exponential moving average of a model's weights and floating-point buffers, as a model.

    θ̄ ← θ̄ + r (θ − θ̄) with r = max(1 − decay, 9 / (n + 9)) at the n-th step that is not skipped, so that the
    random initial weights soon have no influence. Integer buffers (``num_batches_tracked``) are copied.
    Unlike torch's ``AveragedModel`` this never waits for the device.

    module: the averaged model, in eval mode, without gradients.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copied(model).eval().requires_grad_(False)
        self.decay = decay
        self.count = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model: nn.Module, failed: Tensor) -> None:
        """Adds the current values of ``model``, unless ``failed`` (bool, 0-d)."""
        averages, values, counts, new_counts = [], [], [], []
        for one, other in zip(_tensors(self.module), _tensors(model), strict=True):
            if one.is_floating_point():
                averages.append(one)
                values.append(other)
            else:
                counts.append(one)
                new_counts.append(other)
        self.count += ~failed
        rate = (9 / (self.count + 9)).clamp(min=1 - self.decay)
        step = torch._foreach_sub(values, averages)
        torch._foreach_mul_(step, torch.where(failed, 0.0, rate))
        torch._foreach_add_(averages, step)
        if counts:
            torch._foreach_copy_(counts, new_counts)

    def state_dict(self) -> dict[str, Any]:
        return {"model": without_wrapper_names(self.module, self.module.state_dict()), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(with_wrapper_names(self.module, state["model"]))
        self.count.copy_(state["count"])


def _adaptive_weights(recipe: Recipe, device: torch.device, average: Averaging | None) -> MTARDWeights | None:
    """MTARD's weights and its teachers' temperatures, if ``recipe`` adapts them at each step."""
    if not isinstance(recipe, MTARD) or (recipe.adv_weight is not None and not recipe.temperature_lr):
        return None
    temperatures = None
    if recipe.temperature_lr:
        temperatures = TeacherTemperatures(device, recipe.temperature, average=average)
    return MTARDWeights(device, average=average, temperatures=temperatures)


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """``values`` in the memory layout of ``parameter``."""
    return torch.empty_like(parameter, requires_grad=False).copy_(values)


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


class _Saved:
    """Copies of tensors that will change in place, saved and restored in a few kernel launches."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            self.groups.setdefault(tensor.dtype, []).append(tensor)
        self.before = {dtype: _flat(group) for dtype, group in self.groups.items()}

    def restore(self, failed: Tensor) -> None:
        """Restores the saved values if ``failed`` (bool, 0-d)."""
        for dtype, group in self.groups.items():
            chosen = torch.where(failed, self.before[dtype], _flat(group))
            parts = chosen.split([tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [p.view(t.shape) for p, t in zip(parts, group, strict=True)])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _merged_terms(phases: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The terms of all phases of a step; for equal names the first phase's; ``skipped`` is 1 if any is."""
    terms = phases[0]
    for later in phases[1:]:
        skipped = torch.maximum(terms["skipped"], later["skipped"])
        terms = {**later, **terms, "skipped": skipped}
    return terms


def _mean(results: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    pairs = list(zip(results, shares, strict=True))
    return {name: torch.stack([result[name] * share for result, share in pairs]).sum() for name in results[0]}

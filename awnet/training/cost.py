"""The cost of training in multiply-adds, which does not depend on the machine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from awnet.data import Dataset
from awnet.ops import use_backend
from awnet.training.forward import Teachers
from awnet.training.recipes import Recipe
from awnet.training.step import TrainingStep

_IMAGES = 8
# settings of a recipe that change no convolution and no matrix product of a training step
_WITHOUT_COST = (
    *("lr", "router_lr", "optimizer", "momentum", "nesterov", "weight_decay", "ema_decay"),
    *("schedule", "warmup_epochs", "milestones", "lr_decay", "augment", "label_smoothing"),
)


def cost_settings(recipe: Recipe) -> Recipe:
    """``recipe`` with the settings that :func:`multiply_adds` does not depend on at their defaults.

    Equal results mean equal costs for the same model, data set and teachers.
    """
    defaults: dict[str, Any] = {
        field.name: field.default for field in fields(recipe) if field.name in _WITHOUT_COST
    }
    return replace(recipe, **defaults)


def multiply_adds(
    recipe: Recipe, model: nn.Module, dataset: Dataset, teachers: Sequence[nn.Module] = ()
) -> int:
    """Multiply-adds of convolutions and matrix products per image in an epoch of ``recipe``.

    They are counted while the reference backend trains on one small batch: the training attack, forward and
    backward passes, but not batch norms, activations, the optimizer and validation. If filters are scaled for
    each sample, that backend computes gradients of these filters also in the attack, which faster backends
    avoid; they add up to half of the cost of an attack step. ``model`` and ``teachers`` are not changed.

    Args:
        teachers: those that the recipe needs, in its order. Their forward passes are counted, their training
            is not.

    Raises:
        ValueError: another number of teachers than the recipe needs.
    """
    if len(teachers) != len(recipe.teachers):
        raise ValueError(f"recipe {recipe.name!r} needs {len(recipe.teachers)} teachers, got {len(teachers)}")
    cpu = torch.device("cpu")
    recipe, model = replace(recipe, capture=False, precision="float32"), copy.deepcopy(model).to(cpu)
    batch = next(dataset.to(cpu).batches(_IMAGES))
    with torch.random.fork_rng([]), use_backend("reference"):
        # in a Sequential: an inference copy of the teacher would hide its convolutions
        plain = [nn.Sequential(copy.deepcopy(one).to(cpu)) for one in teachers]
        step = TrainingStep(recipe, model, cpu, 10, Teachers(*plain) if plain else None)
        attack = recipe.attack(model, dataset.threat_model, dataset.num_classes, seed=0)
        step.start_epoch(recipe.epochs - 1)  # after all warm-ups
        with MultiplyAddCounter() as counter:
            step(batch, attack)
    return round(counter.total / len(batch.y))


class MultiplyAddCounter(TorchDispatchMode):
    """Counts the multiply-adds of operations inside it, including backward passes.

    torch's ``FlopCounterMode`` counts the backward of a grouped convolution as if it had one group. The
    reference backend computes a convolution with filters for each sample as a grouped convolution.
    """

    total: float = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        operation = func.overloadpacket
        if func.namespace == "awnet" and "layer" in func.__name__:
            raise RuntimeError(f"{func} hides its convolutions: they cannot be counted")
        if operation is torch.ops.aten.convolution:
            self.total += output.numel() * args[1][0].numel()
        elif operation is torch.ops.aten.convolution_backward:
            gradient, _, weight = args[:3]
            output_mask = args[-1]  # input, weight, bias
            self.total += gradient.numel() * weight[0].numel() * sum(output_mask[:2])
        elif operation in flop_registry:
            self.total += flop_registry[operation](*args, **kwargs, out_val=output) / 2
        return output

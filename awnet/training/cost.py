"""What training costs, whatever the machine: multiply-adds, counted while one small batch is trained on."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from awnet.data import Dataset
from awnet.ops import use_backend
from awnet.training.recipes import Recipe
from awnet.training.step import TrainingStep

_IMAGES = 8


def multiply_adds(recipe: Recipe, model: nn.Module, dataset: Dataset) -> int:
    """Multiply-adds of convolutions and products that an epoch of ``recipe`` spends on one image.

    The training attack, the forward passes and the backward passes count, as the reference backend executes
    them; batch norms, activations, the optimiser and validation do not. Where filters are scaled for each
    sample that backend pays, in the attack too, for a gradient of these filters, which faster ones avoid: up
    to half as much again for a step of the attack. ``model`` is not changed.

    Raises ValueError for a recipe with teachers, whose training this leaves out.
    """
    if recipe.teachers:
        raise ValueError(f"recipe {recipe.name!r} needs teachers: what training them costs is not counted")
    cpu = torch.device("cpu")
    recipe, model = replace(recipe, capture=False, precision="float32"), copy.deepcopy(model).to(cpu)
    batch = next(dataset.to(cpu).batches(_IMAGES))
    with torch.random.fork_rng([]), use_backend("reference"):
        step = TrainingStep(recipe, model, cpu, steps_per_epoch=10)
        attack = recipe.attack(model, dataset.threat_model, dataset.num_classes, seed=0)
        step.start_epoch(0)
        with _Counter() as counter:
            step(batch, attack)
    return round(counter.total / len(batch.y))


class _Counter(TorchDispatchMode):
    """Adds up the multiply-adds of what runs inside it, backward passes too.

    torch's own ``FlopCounterMode`` counts the backward of a grouped convolution, which an AW-Net's filters of
    each sample's own are, as if it had one group.
    """

    total: float = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        operation = func.overloadpacket
        if func.namespace == "awnet" and "layer" in func.__name__:
            raise RuntimeError(f"{func} hides its convolutions: they cannot be counted")
        if operation is torch.ops.aten.convolution:
            self.total += found.numel() * args[1][0].numel()
        elif operation is torch.ops.aten.convolution_backward:
            gradient, _, weight = args[:3]
            wanted = args[-1]  # of input, weight, bias
            self.total += gradient.numel() * weight[0].numel() * sum(wanted[:2])
        elif operation in flop_registry:
            self.total += flop_registry[operation](*args, **kwargs, out_val=found) / 2
        return found

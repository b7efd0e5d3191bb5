"""Small networks, batches and training steps for the tests of the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from awnet.data import Splits, from_arrays
from awnet.data.dataset import Batch
from awnet.nn import AdversarialRouter, AWNet, Backbone
from awnet.training import Recipe
from awnet.training.step import TrainingStep

CPU = torch.device("cpu")


K = 3


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, K))


def dynamic() -> AWNet:
    basis = Backbone("basic", [1, 1], [4, 6], num_classes=K, in_channels=1)
    return AWNet(basis, AdversarialRouter(basis.signal_widths, in_channels=1, widths=(4,), blocks=(1,)))


def batch(n: int = 10, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 4, 4, generator=generator).to(dtype)
    return Batch(x, torch.arange(n) % K, torch.arange(n))


def shifted(x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
    return (x + 0.2 * torch.sin(torch.arange(16.0).view(1, 1, 4, 4))).clamp(0, 1).to(x.dtype)


def broken(x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
    """As an attack is whose gradient was not finite."""
    return torch.full_like(x, torch.nan)


def made(recipe: Recipe, model: nn.Module, **options: Any) -> TrainingStep:
    step = TrainingStep(recipe, model, CPU, 5, **options)
    step.start_epoch(0)
    return step


def everything(step: TrainingStep) -> list[Tensor]:
    """All tensors that a step may change."""
    found = [*step.model.state_dict().values()]
    found += [state["momentum_buffer"] for state in step.optimizer.state.values()]
    if step.weights is not None:
        found += step.weights.state_dict().values()
    if step.average is not None:
        found += [*step.average.module.state_dict().values(), step.average.count]
    return [value.clone() for value in found]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def splits() -> Splits:
    generator = torch.Generator().manual_seed(1)
    parts = []
    for name, n in (("train", 12), ("validation", 6), ("test", 6)):
        x = torch.randint(0, 256, (n, 1, 4, 4), generator=generator).to(torch.uint8)
        parts.append(from_arrays(x, torch.arange(n) % K, split=name, eps=0.05))
    return Splits(*parts)


QUICK: dict[str, Any] = {"batch_size": 4, "log_every": 2, "milestones": (), "lr": 0.05}

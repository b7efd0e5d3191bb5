"""Small networks, batches and runs for the tests of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from awnet.data import Splits, from_arrays
from awnet.data.dataset import Batch
from awnet.nn import AdversarialRouter, AWNet, Backbone
from awnet.training import PGDAT, Recipe

K = 3  # classes


def static_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, K)
    )


def dynamic_net(**router: Any) -> AWNet:
    dynamic = Backbone("basic", [1], [4], num_classes=K, in_channels=1)
    net = AWNet(
        dynamic,
        AdversarialRouter(dynamic.signal_widths, in_channels=1, widths=(4,), blocks=(1,), **router),
    )
    if net.router.signal_heads is not None:  # a router that has learnt something: ω differs from 1
        nn.init.normal_(net.router.signal_heads.weight, std=0.3)
    return net


def images(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """4×4 images of three classes that a small network can learn."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % K
    x = torch.randint(0, 60, (n, 1, 4, 4), generator=generator)
    x[torch.arange(n), 0, y] += 190
    return x.to(torch.uint8), y


def batch(n: int = 10) -> Batch:
    x, y = images(n, seed=7)
    return Batch(x / 255, y, torch.arange(n))


def small_splits() -> Splits:
    parts = []
    for i, (name, n) in enumerate((("train", 44), ("validation", 12), ("test", 15))):
        x, y = images(n, seed=i)
        parts.append(from_arrays(x, y, name="stripes", split=name, eps=0.05, flip=True))
    return Splits(*parts)


SPLITS = small_splits()


FAST: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 16,
    "attack_steps": 2,
    "log_every": 2,
    "milestones": (1,),
    "lr": 0.05,
}


# --- the loop


def quick(kind: type[Recipe] = PGDAT, **settings: Any) -> Recipe:
    return kind(**(FAST | settings))

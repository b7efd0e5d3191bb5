"""Generated images with the shapes of a published data set, for tests of commands."""

from __future__ import annotations

import torch

from awnet import rng
from awnet.data import Dataset, Splits, ThreatModel, from_arrays

_SHAPES = {"cifar10": (10, 32), "cifar100": (100, 32), "tiny_imagenet": (200, 64)}


def synthetic_splits(
    name: str, seed: int = 0, *, train: int = 1024, validation: int = 256, test: int = 256
) -> Splits:
    """A data set called "stand-in for <name>" with its classes, image size and threat model (8/255).

    Each class is a pattern of a few waves; an image is the pattern of its class, moved and with noise.
    Accuracies on it say nothing about the published images.

    Raises:
        ValueError: no images are generated for this data set.
    """
    if name not in _SHAPES:
        raise ValueError(f"there is a stand-in for {', '.join(_SHAPES)}, not for {name!r}")
    classes, size = _SHAPES[name]
    number = torch.arange(classes)
    waves = rng.uniform(
        rng.key("stand-in waves", name), number, (3, 2, 3)
    )  # per channel: 2 waves of 3 numbers
    grid = torch.arange(size) / size

    def part(split: str, n: int) -> Dataset:
        index = torch.arange(n)
        labels = index % classes
        key = rng.key("stand-in", name, split, seed)
        move = rng.uniform(rng.key(key, "move"), index, (2,))
        class_waves = waves[labels]  # [n, 3, 2, 3]
        frequency = (1 + (class_waves[..., :2] * 3).floor()) * 2 * torch.pi
        phase = class_waves[..., 2] * 2 * torch.pi
        rows = (grid[None] + move[:, :1])[:, None, None, :, None]
        columns = (grid[None] + move[:, 1:])[:, None, None, None, :]
        waved = frequency[..., 0, None, None] * rows + frequency[..., 1, None, None] * columns
        pattern = (waved + phase[..., None, None]).sin().mean(2)  # [n, 3, size, size]
        noise = rng.normal(rng.key(key, "noise"), index, (3, size, size))
        images = (127.5 + 90 * pattern + 12 * noise).clamp(0, 255).to(torch.uint8)
        dataset = from_arrays(
            images,
            labels,
            name=f"stand-in for {name}",
            split=split,
            classes=[f"pattern {c}" for c in range(classes)],
            source="generated; not the published images",
        )
        assert dataset.threat_model == ThreatModel(8 / 255)
        return dataset

    return Splits(part("train", train), part("validation", validation), part("test", test))

"""Evaluate a model that awnet knows nothing of, on images of your own."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import awnet


def your_images() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, C, H, W] and labels [N]: here scikit-learn's digits, stretched to 0…255."""
    digits = load_digits()
    return (digits.images[:, None] * 255 / 16).astype(np.uint8), digits.target


def your_model() -> nn.Module:
    """Anything that maps float images [B, C, H, W] in [0, 1] to logits [B, K]; normalization goes inside."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)
    )


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        rows = torch.arange(step * 64, step * 64 + 64) % len(x)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(steps: int = 200, limit: int | None = 200) -> awnet.evaluation.Report:
    torch.manual_seed(0)
    images, labels = your_images()
    test = awnet.data.from_arrays(images[1400:], labels[1400:], name="my digits", split="test", eps=0.1)
    model = your_model()
    train(model, torch.from_numpy(images[:1400]) / 255, torch.from_numpy(labels[:1400]), steps)

    # "union" is the worst case over AutoAttack and all others. The smoke budget takes seconds and is for
    # trying things out; leave budget out for numbers to publish.
    report = awnet.evaluate(model, test, attacks=["fgsm", "pgd_sat", "union"], budget="smoke", limit=limit)
    print(report)
    for flag in report.flags:
        print("warning:", flag)
    for line in report.sanity:
        print(f"{line['result']}: {line['check']} ({line['evidence']})")
    return report


if __name__ == "__main__":
    main()

"""Small networks that look robust and are not, made by hand, and images that they classify well.

Of each 8×8 image, rows 0 to 3 tell the class robustly (±0.3 against eps = 0.1), rows 4 and 5 weakly (±0.03),
and rows 6 and 7 hold a checkerboard of contrast 0.2 that the gates read.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from awnet.data.dataset import Dataset, from_arrays
from awnet.nn import Routing

EPS = 0.1
BOARD = torch.tensor([[1.0, -1.0] * 4, [-1.0, 1.0] * 4])


def images(n: int = 24, seed: int = 0) -> Dataset:
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    sign = (1.0 - 2.0 * labels)[:, None, None]
    x = np.full((n, 8, 8), 0.5)
    x[:, :4] += 0.3 * sign
    x[:, 4:6] += 0.03 * sign
    x[:, 6:] += 0.2 * BOARD.numpy()
    x += generator.uniform(-0.02, 0.02, x.shape)
    pixels = np.rint(255 * x).astype(np.uint8)[:, None]
    return from_arrays(pixels, labels, split="test", eps=EPS, name="striped", classes=["a", "b", "c", "d"])


class Scored(nn.Module):
    """Two classes by the sign of a score ``[B]``, and two that nothing belongs to."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))  # gives the model a device

    def robust(self, x: Tensor) -> Tensor:
        return (x[:, 0, :4] - 0.5).mean((1, 2))

    def weak(self, x: Tensor) -> Tensor:
        return (x[:, 0, 4:6] - 0.5).mean((1, 2))

    def score(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def classify(self, score: Tensor) -> Tensor:
        none = torch.full_like(score, -1.0)
        return self.scale * torch.stack([score + self.zero, -score, none, 0.9 * none], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.score(x))


class Honest(Scored):
    """Robust in truth."""

    def score(self, x: Tensor) -> Tensor:
        return self.robust(x)


class Masked(Scored):
    """Weak, with logits so large that cross-entropy is flat in float32."""

    scale = 1e4

    def score(self, x: Tensor) -> Tensor:
        return self.weak(x)


class Valley(Scored):
    """Withstands long steps: the score is negative only in a narrow valley close to the image."""

    def score(self, x: Tensor) -> Tensor:
        side = self.robust(x).sign().detach()
        moved = 0.03 - self.weak(x) * side  # towards the other class
        return side * ((moved - 0.2 * EPS).abs() - 0.005 * EPS).clamp(max=0.05)


class Gated(Scored):
    """A robust expert and a weak one; what picks the weak one is a checkerboard of contrast above 0.27."""

    sharpness = 4000.0  # at 0.2, exp(-280) is 0 in float32: no gradient reaches the board through p

    def gate(self, margin: Tensor) -> Tensor:
        return torch.stack([-margin / 2, margin / 2], 1).softmax(1)[:, 1]

    def route(self, x: Tensor) -> Routing:
        board = ((x[:, 0, 6:] - 0.5) * BOARD.to(x)).mean((1, 2))
        margin = self.sharpness * (board - 0.27)
        return Routing(torch.stack([-margin / 2, margin / 2], 1), self.gate(margin), [])

    def forward(self, x: Tensor, *, routing: Routing | None = None) -> Tensor:
        p = (self.route(x) if routing is None else routing).p_clean
        return self.classify(p * self.weak(x) + (1 - p) * self.robust(x))


class HardGated(Gated):
    """Its gate is a step, which has no gradient at all."""

    sharpness = 40.0

    def gate(self, margin: Tensor) -> Tensor:
        return (margin > 0).to(margin.dtype)

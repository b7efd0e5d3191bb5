"""The worst case per image over several attacks: the headline of an evaluation.

:class:`WorstCase` records which attack broke each image first, so that the union attacks only the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from awnet.attacks import Attack, Cascade
from awnet.attacks.cascade import ROBUST, WRONG_CLEAN


class WorstCase:
    """For one batch: the first attack that broke each image, and its adversarial image.

    Attacks are added in the order in which they ran; :meth:`attack` then runs the remaining members of the
    union on the images that no attack has broken.

    Args:
        x, correct: the clean images and whether they are classified correctly.
        names: names of the attacks in the order of their numbers in ``broken_by``.
    """

    def __init__(self, x: Tensor, correct: Tensor, names: list[str]) -> None:
        self.x_adv = x.clone()
        self.broken_by = torch.where(correct, ROBUST, WRONG_CLEAN)
        self.names = names

    def add(self, name: str, x_adv: Tensor, correct: Tensor) -> None:
        """Adds the result of an attack on the whole batch."""
        first = (self.broken_by == ROBUST) & ~correct
        self.broken_by[first] = self.names.index(name)
        self.x_adv[first] = x_adv[first]

    def attack(self, rest: Cascade | None, x: Tensor, y: Tensor, index: Tensor) -> None:
        """Attacks the images that are not broken yet with ``rest``; None if every member has run."""
        rows = (self.broken_by == ROBUST).nonzero()[:, 0]
        if rest is None or len(rows) == 0:
            return
        self.x_adv[rows] = rest(x[rows], y[rows], index=index[rows])
        assert rest.outcome is not None
        broken_by = rest.outcome.broken_by
        numbers = torch.tensor([self.names.index(name) for name in rest.members], device=x.device)
        self.broken_by[rows] = torch.where(broken_by >= 0, numbers[broken_by.clamp(min=0)], ROBUST)

    def confirmed(self, correct: Tensor) -> Tensor:
        """``broken_by``, corrected by the model's outcomes on the whole batch."""
        again = correct & (self.broken_by >= 0)  # broken only in a smaller batch, which rounds differently
        return torch.where(again, ROBUST, self.broken_by)


def remaining(union: Attack, done: Mapping[str, Attack]) -> Cascade | None:
    """The members of ``union`` that are not among the attacks in ``done``; None if there are none."""
    if not isinstance(union, Cascade):
        raise TypeError(f"attacks['union'] must be a Cascade, got {type(union).__name__}")
    left = {
        name: member
        for name, member in union.members.items()
        if name not in done or done[name].settings != member.settings
    }
    return Cascade(union.model, left, eps=union.eps, norm=union.norm, seed=union.seed) if left else None

"""Runs an attack in low precision first, and in full precision only on the images that survive."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from awnet.attacks.base import Attack
from awnet.attacks.cascade import Cascade
from awnet.attacks.norms import per_image
from awnet.attacks.transfer import TransferAttack


class FilteredAttack(Attack):
    """Runs ``first`` on all images, then ``attack`` on those that ``attack.model`` classifies correctly.

    ``attack.model`` classifies both results. An image counts as broken only if this model misclassifies it,
    and as robust only if ``attack`` failed on it, so the robust accuracy is never that of ``first`` alone.
    With a robust accuracy of s, and ``first`` r times faster than ``attack``, the filter takes 1/r + s of
    ``attack``'s time: it saves time only if s < 1 - 1/r.

    Args:
        attack: the attack in full precision, on the evaluated model.
        first: the same attack on a copy of the model in lower precision.
        precision: the lower precision's name, for the settings.
    """

    def __init__(self, attack: Attack, first: Attack, precision: str = "bfloat16") -> None:
        super().__init__(attack.model, eps=attack.eps, norm=attack.norm, seed=attack.seed)
        self.attack, self.first, self.precision = attack, first, precision
        self.notes: Counter[str] = Counter()
        """Warnings of ``attack``, counted, and ``filter_missed``: images that ``attack`` alone broke."""

    @property
    def settings(self) -> dict[str, Any]:
        return self.attack.settings | {"filter": self.precision}

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """As for :class:`Attack`, but synchronizes with the host to see which images survive."""
        x_adv = self.first.perturb(x, y, index, largest_label).detach()
        finite = x_adv.isfinite().flatten(1).all(1)  # a gradient may overflow in low precision alone
        x_adv = torch.where(per_image(finite), x_adv, x)
        x_adv = self.project(x_adv, x)
        rows = (~finite | self.correct(x_adv, y, largest_label)).nonzero()[:, 0]
        self.notes = Counter()
        if len(rows):
            images = self.attack.perturb(x[rows], y[rows], index[rows], largest_label).detach()
            x_adv[rows] = images
            self.notes += Counter(getattr(self.attack, "notes", {}))
            self.notes["filter_missed"] = int((~self.correct(images, y[rows], largest_label)).sum())
        return x_adv


def filtered(attack: Attack, first: Attack, precision: str = "bfloat16") -> Attack:
    """``attack`` with ``first``, the same attack on a copy in lower precision, as its filter.

    A :class:`Cascade` keeps its order, its records and its model, and each of its members is filtered. A
    transfer attack does not run on the evaluated model and is returned unchanged, and so is an attack that
    does not end at the first misclassification.
    """
    if isinstance(attack, Cascade) and isinstance(first, Cascade):
        attack.members = {
            name: filtered(member, first.members[name], precision) for name, member in attack.members.items()
        }
        return attack
    if isinstance(attack, TransferAttack) or not attack.filterable:
        return attack
    return FilteredAttack(attack, first, precision)

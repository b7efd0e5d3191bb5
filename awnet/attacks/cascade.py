"""Runs several attacks one after the other, each only on the images that no earlier attack has broken.

:meth:`Cascade.perturb` decides which images are already broken: after each attack the model classifies the
new images, and ``broken_by`` records for each image the attack that broke it first. AutoAttack and the union
of all attacks are cascades. :class:`awnet.evaluation.collect.WorstCase` does the same over the attacks of an
evaluation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awnet.attacks.base import Attack, check_ball
from awnet.attacks.pgd import margin
from awnet.attacks.saved import Saved, digest
from awnet.attacks.stochastic import seeded
from awnet.data.threat_model import Norm

#: in ``Outcome.broken_by``: still classified correctly, and misclassified before any attack
ROBUST, WRONG_CLEAN = -1, -2


class Outcome(NamedTuple):
    """The result of a cascade on one batch."""

    x_adv: Tensor
    """``[B, C, H, W]``"""
    broken_by: Tensor
    """int64 ``[B]``: the number of the first member that broke the image, ``ROBUST`` or ``WRONG_CLEAN``."""
    notes: Counter[str]
    """Warnings of the members, counted."""


class Cascade(Attack):
    """Runs ``members`` in order, each on the images that are still classified correctly.

    An image's ``x_adv`` is that of the member that broke it; for an image that no member broke, the one with
    the smallest margin. An image that is misclassified without an attack is returned unchanged.

    Args:
        model: the attacked model; it classifies every member's images, also those made on another model.
        members: attacks by name, run in this order.
        eps, norm, seed: as for :class:`Attack`; the members must have the same norm.
    """

    def __init__(
        self,
        model: nn.Module,
        members: Mapping[str, Attack],
        *,
        eps: float,
        norm: Norm = "Linf",
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, seed=seed)
        if not members:
            raise ValueError("members is empty: a cascade needs an attack")
        for name, member in members.items():
            if not isinstance(member, Attack):
                raise TypeError(f"members[{name!r}] must be an Attack, got {type(member).__name__}")
            if member.norm != self.norm:
                raise ValueError(
                    f"members[{name!r}] attacks in {member.norm}, the cascade in {self.norm}: all attacks of "
                    "a cascade must have the same norm"
                )
        self.members = dict(members)
        self.announce: Callable[[str], None] | None = None
        """Called with a member's name before it runs."""
        self.outcome: Outcome | None = None
        """The result of the last batch."""
        self._saved: Saved | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"members": {name: m.settings for name, m in self.members.items()}}

    def keep_in(self, saved: Saved | None) -> None:
        """Saves each batch to ``saved`` after each member, and resumes from there; None saves nothing."""
        self._saved = saved
        for member in self.members.values():
            if isinstance(member, Cascade):
                member.keep_in(saved)

    def examine(self, x: Tensor, y: Tensor, largest_label: int) -> Counter[str]:
        """Checks a batch before it is attacked; returns warnings, counted."""
        return Counter()

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """As for :class:`Attack`, but synchronizes with the host after each member to see what it broke."""
        name = "" if self._saved is None else digest(self.settings, x, y, index)
        state = None if self._saved is None else self._saved.load(name, x.device)
        if state is None:
            x_adv, done, notes = x.clone(), 0, self.examine(x, y, largest_label)
            correct, smallest_margin = self._classify(x, y, largest_label)
            broken_by = torch.where(correct, ROBUST, WRONG_CLEAN)
            smallest_margin.fill_(torch.inf)  # the first attack's image always replaces x
        else:
            tensors, note = state
            assert self._saved is not None
            # copied into x's strides: they choose a convolution's algorithm, and so its rounding
            check_ball(
                tensors["x_adv"], x, self.eps, self.norm, f"the images saved in {self._saved.path(name)}"
            )
            x_adv = torch.empty_like(x).copy_(tensors["x_adv"])
            broken_by, smallest_margin = tensors["broken_by"], tensors["closest"]
            done, notes = note["done"], Counter(note["notes"])
        for number, (member_name, member) in list(enumerate(self.members.items()))[done:]:
            rows = (broken_by == ROBUST).nonzero()[:, 0]  # the images that are not broken yet
            if len(rows) == 0:
                break
            if self.announce is not None:
                self.announce(member_name)
            with seeded(self.model, member_name, index[rows]):
                images = member.perturb(x[rows], y[rows], index[rows], largest_label).detach()
            if not bool(images.isfinite().all()):
                raise FloatingPointError(
                    f"{member_name} computed a gradient that is not finite: look for NaN in the model's "
                    "weights and outputs"
                )
            images = self.project(images, x[rows])
            with seeded(self.model, f"after {member_name}", index[rows]):
                correct, margins = self._classify(images, y[rows], largest_label)
            better = (margins < smallest_margin[rows]) | ~correct
            x_adv[rows[better]], smallest_margin[rows[better]] = images[better], margins[better]
            broken_by[rows[~correct]] = number
            if isinstance(member, Cascade) and member.outcome is not None:
                notes += member.outcome.notes
            notes += Counter(getattr(member, "notes", {}))
            if self._saved is not None:
                tensors = {"x_adv": x_adv, "broken_by": broken_by, "closest": smallest_margin}
                self._saved.save(name, tensors, {"done": number + 1, "notes": notes})
        self.outcome = Outcome(x_adv, broken_by, notes)
        return x_adv

    def _classify(self, x: Tensor, y: Tensor, largest_label: int) -> tuple[Tensor, Tensor]:
        """Whether each image is classified correctly, bool ``[B]``, and its margin ``[B]``."""
        values = self.decision(x, largest_label)
        return values.argmax(1) == y, margin(values, y)

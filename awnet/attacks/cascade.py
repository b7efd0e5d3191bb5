"""Several attacks in a row, each on the images that no earlier one broke."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awnet.attacks.base import Attack, check_ball
from awnet.attacks.pgd import margin
from awnet.attacks.saved import Saved, digest

#: in ``Outcome.broken_by``: still classified correctly, and misclassified before any attack
ROBUST, WRONG_CLEAN = -1, -2


class Outcome(NamedTuple):
    """What a cascade did to a batch."""

    x_adv: Tensor
    """``[B, C, H, W]``"""
    broken_by: Tensor
    """int64 ``[B]``: the number of the first member that broke an image, ``ROBUST`` or ``WRONG_CLEAN``."""
    notes: Counter[str]
    """What members noticed, in counts."""


class Cascade(Attack):
    """``members`` one after the other, each on the images that are still classified correctly.

    An image's ``x_adv`` is that of the member that broke it; for an image that withstood all of them, the one
    with the smallest margin seen. An image that is misclassified without an attack is left as it is.

    Args:
        model: the attacked model, which judges every member's images, also those made on another model.
        members: attacks by name, run in this order.
        eps, seed: as for :class:`Attack`.
    """

    def __init__(self, model: nn.Module, members: Mapping[str, Attack], *, eps: float, seed: int = 0) -> None:
        super().__init__(model, eps=eps, seed=seed)
        if not members:
            raise ValueError("members is empty: a cascade needs an attack")
        for name, member in members.items():
            if not isinstance(member, Attack):
                raise TypeError(f"members[{name!r}] must be an Attack, got {type(member).__name__}")
        self.members = dict(members)
        self.announce: Callable[[str], None] | None = None
        """Called with a member's name before it runs."""
        self.outcome: Outcome | None = None
        """Of the last batch."""
        self._saved: Saved | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"members": {name: m.settings for name, m in self.members.items()}}

    def keep_in(self, saved: Saved | None) -> None:
        """Keeps each batch there after each member, and goes on from what is there; None keeps nothing."""
        self._saved = saved
        for member in self.members.values():
            if isinstance(member, Cascade):
                member.keep_in(saved)

    def examine(self, x: Tensor, y: Tensor, largest_label: int) -> Counter[str]:
        """What there is to notice of a batch before it is attacked."""
        return Counter()

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """As for :class:`Attack`, but reads back after each member which images it broke."""
        low, high = self.ball(x)
        name = "" if self._saved is None else digest(self.settings, x, y, index)
        found = None if self._saved is None else self._saved.load(name, x.device)
        if found is None:
            x_adv, done, notes = x.clone(), 0, self.examine(x, y, largest_label)
            correct, closest = self._judge(x, y, largest_label)
            broken_by = torch.where(correct, ROBUST, WRONG_CLEAN)
            closest.fill_(torch.inf)  # the first attack's image replaces x, however well it holds
        else:
            tensors, note = found
            # with x's strides, whatever they are: they choose a convolution's path, and so its rounding
            check_ball(tensors["x_adv"], x, self.eps, f"the images kept in {self._saved_at(name)}")
            x_adv = torch.empty_like(x).copy_(tensors["x_adv"])
            broken_by, closest = tensors["broken_by"], tensors["closest"]
            done, notes = note["done"], Counter(note["notes"])
        for number, (member_name, member) in list(enumerate(self.members.items()))[done:]:
            rows = (broken_by == ROBUST).nonzero()[:, 0]
            if len(rows) == 0:
                break
            if self.announce is not None:
                self.announce(member_name)
            made = member.perturb(x[rows], y[rows], index[rows], largest_label).detach()
            if not bool(made.isfinite().all()):
                raise FloatingPointError(
                    f"{member_name} met a gradient that is not finite: look for NaN in the model's weights "
                    "and outputs"
                )
            made = torch.maximum(torch.minimum(made, high[rows]), low[rows])
            correct, distance = self._judge(made, y[rows], largest_label)
            closer = (distance < closest[rows]) | ~correct
            x_adv[rows[closer]], closest[rows[closer]] = made[closer], distance[closer]
            broken_by[rows[~correct]] = number
            if isinstance(member, Cascade) and member.outcome is not None:
                notes += member.outcome.notes
            notes += Counter(getattr(member, "notes", {}))
            if self._saved is not None:
                state = {"x_adv": x_adv, "broken_by": broken_by, "closest": closest}
                self._saved.save(name, state, {"done": number + 1, "notes": notes})
        self.outcome = Outcome(x_adv, broken_by, notes)
        return x_adv

    def _saved_at(self, name: str) -> str:
        return "" if self._saved is None else str(self._saved.path(name))

    def _judge(self, x: Tensor, y: Tensor, largest_label: int) -> tuple[Tensor, Tensor]:
        """Whether each image is classified correctly, bool ``[B]``, and its margin ``[B]``."""
        with torch.no_grad():
            logits = self.logits(x, largest_label)
        return logits.argmax(1) == y, margin(logits, y)

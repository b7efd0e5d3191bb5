"""Maximisers within the ball that leave an image alone once it is broken, and APGD."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import rng
from awnet.attacks.base import Attack, check_count, check_size
from awnet.attacks.pgd import margin

#: maps (x_adv ``[b, …]``, their places in the batch ``[b]``) to the loss ``[b]``, to be maximised, and
#: whether the attacked model misclassifies x_adv, bool ``[b]`` (None where the loss is another model's)
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]

EVERY = 10  # steps between two looks at which images are left: each makes the host wait for the device
RHO, MOMENTUM = 0.75, 0.75


class _Point(NamedTuple):
    loss: Tensor
    gradient: Tensor
    broken: Tensor


def _look(objective: Objective, x_adv: Tensor, rows: Tensor) -> _Point:
    with torch.enable_grad():
        point = x_adv.detach().requires_grad_()
        loss, broken = objective(point, rows)
        if not loss.requires_grad:
            raise ValueError("the loss has no gradient with respect to x: does the model detach it?")
        (gradient,) = torch.autograd.grad(loss.sum(), point)
    if broken is None:
        broken = torch.zeros(len(rows), dtype=torch.bool, device=x_adv.device)
    return _Point(loss.detach(), gradient, broken)


def ascend(
    objective: Objective, start: Tensor, low: Tensor, high: Tensor, *, steps: int, step_size: float
) -> Tensor:
    """``steps`` times x ← clip(x + step_size·sign(∂loss/∂x)); an image stays where it is first broken.

    Returns the last points ``[B, …]``; NaN where a gradient was not finite.
    """
    result, rows = start.clone(), torch.arange(len(start), device=start.device)
    for step in range(steps):
        x_adv = result[rows]
        at = _look(objective, x_adv, rows)
        moved = torch.add(x_adv, at.gradient.sign(), alpha=step_size)
        moved = torch.maximum(torch.minimum(moved, high[rows]), low[rows])
        moved = torch.where(_wide(at.broken), x_adv, moved)
        result[rows] = torch.where(at.gradient.isfinite(), moved, torch.nan)
        if step % EVERY == EVERY - 1:
            rows = rows[~at.broken & _finite(at.gradient)]
            if len(rows) == 0:
                break
    return result


def ascend_auto(
    objective: Objective, start: Tensor, low: Tensor, high: Tensor, *, steps: int, eps: float
) -> Tensor:
    """APGD (Croce and Hein 2020, Algorithm 1): steps with momentum whose size halves where they fail.

    Each image has its own step size, at first 2·eps. At checkpoints, closer and closer together, it is halved
    and the search goes back to the best point, where fewer than 75 % of the steps since the last checkpoint
    raised the loss, or where neither step size nor best loss changed since then.

    Returns the points where images were first broken, of the others those of the highest loss ``[B, …]``;
    NaN where a gradient was not finite.
    """
    result = start.clone()
    rows = torch.arange(len(start), device=start.device)
    at = _look(objective, start, rows)
    zeros = torch.zeros_like(at.loss)
    s = {
        "low": low,
        "high": high,
        "x": start.clone(),
        "previous": start.clone(),
        "gradient": at.gradient,
        "loss": at.loss,
        "best": start.clone(),
        "best_gradient": at.gradient,
        "best_loss": at.loss,
        "loss_at_check": at.loss,
        "raised": zeros,
        "reduced": torch.ones_like(at.broken),
        "step": torch.full_like(at.loss, 2 * eps),
        "done": at.broken | ~_finite(at.gradient),
    }
    result = torch.where(_wide(_finite(at.gradient)), result, torch.nan)
    interval = max(int(0.22 * steps), 1)
    shortest, shorter = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    since = 0
    for step in range(steps):
        direction = s["x"] + _wide(s["step"]) * s["gradient"].sign()
        direction = torch.maximum(torch.minimum(direction, s["high"]), s["low"])
        share = MOMENTUM if step > 0 else 1.0
        moved = s["x"] + (direction - s["x"]) * share + (s["x"] - s["previous"]) * (1 - share)
        moved = torch.maximum(torch.minimum(moved, s["high"]), s["low"])
        s["previous"], s["x"] = s["x"], moved
        at = _look(objective, moved, rows)
        finite = _finite(at.gradient)
        now = ~s["done"] & (at.broken | ~finite)
        result[rows] = torch.where(
            _wide(now), torch.where(_wide(finite), moved, torch.nan), result[rows]
        )  # the point that broke an image
        s["done"] = s["done"] | now
        s["raised"] = s["raised"] + (at.loss > s["loss"])
        s["gradient"], s["loss"] = at.gradient, at.loss
        better = at.loss > s["best_loss"]
        s["best"] = torch.where(_wide(better), moved, s["best"])
        s["best_gradient"] = torch.where(_wide(better), at.gradient, s["best_gradient"])
        s["best_loss"] = torch.where(better, at.loss, s["best_loss"])
        since += 1
        if since < interval:
            continue
        stuck = ~s["reduced"] & (s["loss_at_check"] >= s["best_loss"])
        reduce = (s["raised"] <= RHO * since) | stuck
        s["reduced"], s["loss_at_check"] = reduce, s["best_loss"]
        s["step"] = torch.where(reduce, s["step"] / 2, s["step"])
        s["x"] = torch.where(_wide(reduce), s["best"], s["x"])
        s["gradient"] = torch.where(_wide(reduce), s["best_gradient"], s["gradient"])
        s["raised"] = torch.zeros_like(s["raised"])
        since, interval = 0, max(interval - shorter, shortest)
        left = ~s["done"]
        rows, s = rows[left], {name: value[left] for name, value in s.items()}
        if len(rows) == 0:
            return result
    result[rows] = torch.where(_wide(s["done"]), result[rows], s["best"])
    return result


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _finite(gradient: Tensor) -> Tensor:
    return gradient.isfinite().flatten(1).all(1)


class Search(Attack):
    """An attack of several searches, each on the images that the model still classifies correctly.

    A subclass writes :meth:`objective`. Images that are misclassified already are left as they are; of an
    image that withstands all searches the last one's point is returned.

    Args:
        steps: of each search.
        optimiser: ``"sign"``: steps of fixed size. ``"auto"``: APGD's.
        step_size: of ``"sign"``, in image units; eps/4 if None.
        seed: keys the random starts, uniform in the ball, together with each sample's index.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        steps: int = 100,
        optimiser: Literal["sign", "auto"] = "sign",
        step_size: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, seed=seed)
        self.steps = check_count("steps", steps)
        if optimiser not in ("sign", "auto"):
            raise ValueError(f"optimiser must be 'sign' or 'auto', got {optimiser!r}")
        self.optimiser = optimiser
        self.step_size = self.eps / 4 if step_size is None else check_size("step_size", step_size)

    @property
    def settings(self) -> dict[str, Any]:
        size = {"step_size": self.step_size} if self.optimiser == "sign" else {}
        return super().settings | {"steps": self.steps, "optimiser": self.optimiser} | size

    @abstractmethod
    def searches(self, x: Tensor) -> int:
        """How many searches there are for images like ``x``."""

    @abstractmethod
    def objective(self, number: int, x: Tensor, y: Tensor, largest_label: int) -> Objective:
        """What the search of this number maximises for the images ``x``."""

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """As for :class:`Attack`, but reads back after each search which images it broke."""
        result = x.clone()
        rows = self._correct(x, y, largest_label).nonzero()[:, 0]
        for number in range(self.searches(x[:1])):
            if len(rows) == 0:
                break
            found = self.search(number, x[rows], y[rows], index[rows], largest_label)
            result[rows] = found
            if not bool(found.isfinite().all()):
                break
            rows = rows[self._correct(found, y[rows], largest_label)]
        return result

    def search(self, number: int, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """One search: a random start, then the objective's maximum."""
        return self.maximise(
            self.objective(number, x, y, largest_label), x, self.start(number, x, index), self.steps
        )

    def maximise(self, objective: Objective, x: Tensor, start: Tensor, steps: int) -> Tensor:
        low, high = self.ball(x)
        if self.optimiser == "auto":
            return ascend_auto(objective, start, low, high, steps=steps, eps=self.eps)
        return ascend(objective, start, low, high, steps=steps, step_size=self.step_size)

    def start(self, number: int, x: Tensor, index: Tensor) -> Tensor:
        low, high = self.ball(x)
        noise = rng.uniform(rng.key("search start", self.seed, number), index, x.shape[1:]).mul_(2).sub_(1)
        return torch.maximum(torch.minimum(torch.add(x, noise.to(x.dtype), alpha=self.eps), high), low)

    def _correct(self, x: Tensor, y: Tensor, largest_label: int) -> Tensor:
        with torch.no_grad():
            return self.logits(x, largest_label).argmax(1) == y


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio ``[B]`` (Croce and Hein 2020), to be maximised; needs 3 classes."""
    ordered = logits.sort(1).values
    return -margin(logits, y) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Its targeted form ``[B]``: the target's logit against the label's; needs 4 classes."""
    ordered = logits.sort(1).values
    scale = ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2 + 1e-12
    own, other = (logits.gather(1, k[:, None])[:, 0] for k in (y, target))
    return (other - own) / scale


APGDLoss = Literal["ce", "dlr", "dlr_targeted"]


class APGD(Search):
    """APGD with restarts on cross-entropy, the logits' ratio, or its targeted form.

    Unlike the official code it draws its starts by sample and takes a loss with more than logits in it (see
    :class:`awnet.attacks.adaptive.JointAPGD`). Restart r of ``"dlr_targeted"`` aims at the class that comes
    r-th (from 0, in turn, at most 9) after the label in the logits of ``x``.

    Args:
        loss: with fewer classes than ``"dlr"`` (3) and ``"dlr_targeted"`` (4) need, they are the margin.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        loss: APGDLoss = "ce",
        steps: int = 100,
        restarts: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, steps=steps, optimiser="auto", seed=seed)
        if loss not in ("ce", "dlr", "dlr_targeted"):
            raise ValueError(f"loss must be 'ce', 'dlr' or 'dlr_targeted', got {loss!r}")
        self.loss = loss
        self.restarts = check_count("restarts", restarts)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"loss": self.loss, "restarts": self.restarts}

    def searches(self, x: Tensor) -> int:
        return self.restarts

    def observe(self, x: Tensor, number: int, largest_label: int) -> tuple[Tensor, Tensor | float]:
        """The logits ``[B, K]`` and what is added to their loss ``[B]``."""
        return self.logits(x, largest_label), 0.0

    def objective(self, number: int, x: Tensor, y: Tensor, largest_label: int) -> Objective:
        with torch.no_grad():
            clean = self.logits(x, largest_label)
        classes = clean.shape[1]
        others = clean.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
        target = others[:, number % min(9, classes - 1)]

        def loss(x_adv: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, extra = self.observe(x_adv, number, largest_label)
            label = y[rows]
            if self.loss == "ce":
                value = F.cross_entropy(logits, label, reduction="none")
            elif self.loss == "dlr" and classes >= 3:
                value = dlr(logits, label)
            elif self.loss == "dlr_targeted" and classes >= 4:
                value = dlr_targeted(logits, label, target[rows])
            else:
                value = -margin(logits, label)
            return value + extra, logits.argmax(1) != label

        return loss

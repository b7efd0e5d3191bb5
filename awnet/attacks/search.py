"""Sign-gradient ascent and APGD within the ball; both stop changing an image once it is broken."""

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

#: maps (x_adv ``[b, …]``, their rows in the batch ``[b]``) to the loss ``[b]`` to maximize, and whether the
#: attacked model misclassifies x_adv, bool ``[b]`` (None if the loss is another model's)
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]

EVERY = 10  # steps between checks of which images are not broken yet; each check synchronizes with the host
RHO, MOMENTUM = 0.75, 0.75


class _Point(NamedTuple):
    loss: Tensor
    gradient: Tensor
    broken: Tensor


def _evaluate(objective: Objective, x_adv: Tensor, rows: Tensor) -> _Point:
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
    """``steps`` times x ← clip(x + step_size·sign(∂loss/∂x)); an image does not change once it is broken.

    Returns the last points ``[B, …]``; NaN if a gradient was not finite.
    """
    result, rows = start.clone(), torch.arange(len(start), device=start.device)
    for step in range(steps):
        x_adv = result[rows]
        point = _evaluate(objective, x_adv, rows)
        moved = torch.add(x_adv, point.gradient.sign(), alpha=step_size)
        moved = torch.maximum(torch.minimum(moved, high[rows]), low[rows])
        moved = torch.where(_wide(point.broken), x_adv, moved)
        result[rows] = torch.where(point.gradient.isfinite(), moved, torch.nan)
        if step % EVERY == EVERY - 1:
            rows = rows[~point.broken & _finite(point.gradient)]
            if len(rows) == 0:
                break
    return result


def ascend_auto(
    objective: Objective, start: Tensor, low: Tensor, high: Tensor, *, steps: int, eps: float
) -> Tensor:
    """APGD (Croce and Hein 2020, Algorithm 1): steps with momentum, whose size is halved without progress.

    Each image has its own step size, initially 2·eps. At checkpoints, whose distance decreases, the step size
    is halved and the search returns to the best point if fewer than 75 % of the steps since the last
    checkpoint increased the loss, or if neither step size nor best loss changed since then.

    Returns the first point that broke each image, or for images that are not broken the point with the
    highest loss ``[B, …]``; NaN if a gradient was not finite.
    """
    result = start.clone()
    rows = torch.arange(len(start), device=start.device)
    point = _evaluate(objective, start, rows)
    zeros = torch.zeros_like(point.loss)
    s = {
        "low": low,
        "high": high,
        "x": start.clone(),
        "previous": start.clone(),
        "gradient": point.gradient,
        "loss": point.loss,
        "best": start.clone(),
        "best_gradient": point.gradient,
        "best_loss": point.loss,
        "loss_at_check": point.loss,
        "raised": zeros,
        "reduced": torch.ones_like(point.broken),
        "step": torch.full_like(point.loss, 2 * eps),
        "done": point.broken | ~_finite(point.gradient),
    }
    result = torch.where(_wide(_finite(point.gradient)), result, torch.nan)
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
        point = _evaluate(objective, moved, rows)
        finite = _finite(point.gradient)
        now = ~s["done"] & (point.broken | ~finite)
        result[rows] = torch.where(
            _wide(now), torch.where(_wide(finite), moved, torch.nan), result[rows]
        )  # the point that broke an image
        s["done"] = s["done"] | now
        s["raised"] = s["raised"] + (point.loss > s["loss"])
        s["gradient"], s["loss"] = point.gradient, point.loss
        better = point.loss > s["best_loss"]
        s["best"] = torch.where(_wide(better), moved, s["best"])
        s["best_gradient"] = torch.where(_wide(better), point.gradient, s["best_gradient"])
        s["best_loss"] = torch.where(better, point.loss, s["best_loss"])
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

    A subclass implements :meth:`searches` and :meth:`objective`. Images that are already misclassified are
    not changed; for an image that no search breaks, the last search's point is returned.

    Args:
        steps: steps of each search.
        optimizer: ``"sign"``: steps of fixed size. ``"auto"``: APGD.
        step_size: step of ``"sign"``, in image units; eps/4 if None.
        seed: keys the random starts, uniform in the ball, together with each sample's index.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        steps: int = 100,
        optimizer: Literal["sign", "auto"] = "sign",
        step_size: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, seed=seed)
        self.steps = check_count("steps", steps)
        if optimizer not in ("sign", "auto"):
            raise ValueError(f"optimizer must be 'sign' or 'auto', got {optimizer!r}")
        self.optimizer = optimizer
        self.step_size = self.eps / 4 if step_size is None else check_size("step_size", step_size)

    @property
    def settings(self) -> dict[str, Any]:
        # the keys are stored in reports, so their spelling stays
        size = {"step_size": self.step_size} if self.optimizer == "sign" else {}
        return super().settings | {"steps": self.steps, "optimiser": self.optimizer} | size

    @abstractmethod
    def searches(self, x: Tensor) -> int:
        """The number of searches for images like ``x``."""

    @abstractmethod
    def objective(self, number: int, x: Tensor, y: Tensor, largest_label: int) -> Objective:
        """The function that search ``number`` maximizes for the images ``x``."""

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """As for :class:`Attack`, but synchronizes with the host after each search to see what it broke."""
        result = x.clone()
        rows = self._correct(x, y, largest_label).nonzero()[:, 0]
        for number in range(self.searches(x[:1])):
            if len(rows) == 0:
                break
            x_adv = self.search(number, x[rows], y[rows], index[rows], largest_label)
            result[rows] = x_adv
            if not bool(x_adv.isfinite().all()):
                break
            rows = rows[self._correct(x_adv, y[rows], largest_label)]
        return result

    def search(self, number: int, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """One search: maximizes the objective from a random start."""
        return self.maximize(
            self.objective(number, x, y, largest_label), x, self.start(number, x, index), self.steps
        )

    def maximize(self, objective: Objective, x: Tensor, start: Tensor, steps: int) -> Tensor:
        low, high = self.ball(x)
        if self.optimizer == "auto":
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
    """The difference of logits ratio ``[B]`` (Croce and Hein 2020), to maximize; needs 3 classes."""
    ordered = logits.sort(1).values
    return -margin(logits, y) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The targeted form of :func:`dlr` ``[B]``, target against label, to maximize; needs 4 classes."""
    ordered = logits.sort(1).values
    scale = ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2 + 1e-12
    label_logit, target_logit = (logits.gather(1, k[:, None])[:, 0] for k in (y, target))
    return (target_logit - label_logit) / scale


APGDLoss = Literal["ce", "dlr", "dlr_targeted"]


class APGD(Search):
    """APGD with restarts on cross-entropy, the logits' ratio, or its targeted form.

    Unlike the official code it draws random starts per sample, and the loss may depend on more than the
    logits (see :class:`awnet.attacks.adaptive.JointAPGD`). Restart r of ``"dlr_targeted"`` targets the class
    with the r-th largest logit for ``x`` besides the label (from 0, modulo at most 9).

    Args:
        loss: ``"dlr"`` needs 3 classes and ``"dlr_targeted"`` 4; with fewer classes they are the margin.
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
        super().__init__(model, eps=eps, steps=steps, optimizer="auto", seed=seed)
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
        """The logits ``[B, K]`` and a term to add to their loss ``[B]``."""
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

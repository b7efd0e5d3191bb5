"""Ascent within the ball, by steps of fixed size and by APGD; an image does not change once it is broken."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from awnet.attacks.norms import L1, L2, Geometry, per_image

#: maps (x_adv ``[b, …]``, their rows in the batch ``[b]``) to the loss ``[b]`` to maximize, and whether the
#: attacked model misclassifies x_adv, bool ``[b]`` (None if the loss is another model's)
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]

CHECK_INTERVAL = 10  # steps between removals of broken images; each synchronizes with the host
RHO, MOMENTUM = 0.75, 0.75

# APGD in L1
RADII = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))  # radius in units of eps, share of the steps
FIRST_SHARE = 0.2  # of the pixels that the first step changes
REDUCTION = 1.5  # divides the step size, and the number of pixels that the best point changes
SPARSER = 0.95  # a best point with less than this share of its former changed pixels became sparser
SMALLEST_STEP = 0.1  # in units of the radius


class Point(NamedTuple):
    """Loss ``[b]``, gradient ``[b, …]``, and whether the images are broken, bool ``[b]``."""

    loss: Tensor
    gradient: Tensor
    broken: Tensor


def evaluate_objective(objective: Objective, x_adv: Tensor, rows: Tensor, eot: int) -> Point:
    """Loss and gradient, averaged over ``eot`` calls; an image is broken if it is in every call."""
    first = _evaluate_once(objective, x_adv, rows)
    if eot == 1:
        return first
    loss, gradient, broken = first
    for _ in range(eot - 1):
        point = _evaluate_once(objective, x_adv, rows)
        loss, gradient = loss + point.loss, gradient + point.gradient
        broken = broken & point.broken
    return Point(loss / eot, gradient / eot, broken)


def _evaluate_once(objective: Objective, x_adv: Tensor, rows: Tensor) -> Point:
    with torch.enable_grad():
        point = x_adv.detach().requires_grad_()
        loss, broken = objective(point, rows)
        if not loss.requires_grad:
            raise ValueError("the loss has no gradient with respect to x: does the model detach it?")
        (gradient,) = torch.autograd.grad(loss.sum(), point)
    if broken is None:
        broken = torch.zeros(len(rows), dtype=torch.bool, device=x_adv.device)
    return Point(loss.detach(), gradient, broken)


def ascend(
    objective: Objective,
    start: Tensor,
    x: Tensor,
    geometry: Geometry,
    *,
    steps: int,
    step_size: float,
    eps: float,
    eot: int = 1,
) -> Tensor:
    """``steps`` steps of steepest ascent of size ``step_size``; an image does not change once it is broken.

    Each loss and gradient is the mean over ``eot`` calls of ``objective``, and an image is broken if it is in
    every call.

    Returns the last points ``[B, …]``; NaN if a gradient was not finite.
    """
    result, rows = start.clone(), torch.arange(len(start), device=start.device)
    for step in range(steps):
        x_adv = result[rows]
        point = evaluate_objective(objective, x_adv, rows, eot)
        moved = geometry.step(x_adv, point.gradient, x[rows], step_size, eps)
        moved = torch.where(per_image(point.broken), x_adv, moved)
        result[rows] = torch.where(per_image(_finite(point.gradient)), moved, torch.nan)
        if step % CHECK_INTERVAL == CHECK_INTERVAL - 1:
            rows = rows[~point.broken & _finite(point.gradient)]
            if len(rows) == 0:
                break
    return result


def ascend_auto(
    objective: Objective,
    start: Tensor,
    x: Tensor,
    geometry: Geometry,
    *,
    steps: int,
    eps: float,
    eot: int = 1,
) -> Tensor:
    """APGD (Croce and Hein 2020, Algorithm 1): steps with momentum, whose size is halved without progress.

    Each image has its own step size, initially 2·eps. At checkpoints, whose distance decreases, the step size
    is halved and the search returns to the best point if fewer than 75 % of the steps since the last
    checkpoint increased the loss, or if neither step size nor best loss changed since then.

    In L1 this is the variant of Croce and Hein 2021, with sparse steps (:class:`_Sparse`) in three stages:
    30 % of the steps in the ball of radius 3·eps, 30 % in that of 2·eps, and 40 % in that of eps. Only the
    last stage stops at broken images. ``eot`` as for :func:`ascend`.

    Returns the first point that broke each image, or for images that are not broken the point with the
    highest loss ``[B, …]``; NaN if a gradient was not finite.
    """
    if not isinstance(geometry, L1):
        return _search(objective, start, _Momentum(start, x, geometry, steps, eps), steps, eot)
    counts = [math.ceil(share * steps) for _, share in RADII[:-1]]
    counts.append(max(steps - sum(counts), 0))
    for (factor, _), count in zip(RADII, counts, strict=True):
        start = geometry.project(start, x, factor * eps)
        schedule = _Sparse(start, x, geometry, count, factor * eps, first=factor == RADII[0][0])
        start = _search(objective if factor == 1 else _not_broken(objective), start, schedule, count, eot)
    return start


def _not_broken(objective: Objective) -> Objective:
    return lambda x_adv, rows: (objective(x_adv, rows)[0], None)


class _Schedule(ABC):
    """The steps of a search: how to move, and how the step sizes change at checkpoints.

    ``state`` maps names to one value per image that is not broken yet.
    """

    interval: int  # steps until the next checkpoint

    def __init__(self, x: Tensor, step_size: float) -> None:
        self.state = {"clean": x, "step": torch.full((len(x),), step_size, dtype=x.dtype, device=x.device)}

    def begin(self, loss: Tensor) -> None:  # noqa: B027  optional
        """Called once with the loss of the starting points ``[B]``."""

    @abstractmethod
    def move(self, x_adv: Tensor, gradient: Tensor) -> Tensor:
        """The next point."""

    @abstractmethod
    def check(self, best: Tensor, best_loss: Tensor, increases: Tensor, since: int) -> Tensor:
        """Adapts the step sizes; returns which images restart from their best point, bool ``[b]``.

        ``increases`` ``[b]``: how many of the last ``since`` steps increased the loss.
        """


class _Momentum(_Schedule):
    """L-infinity and L2: momentum, and step sizes that are halved."""

    def __init__(self, start: Tensor, x: Tensor, geometry: Geometry, steps: int, eps: float) -> None:
        super().__init__(x, 2 * eps)
        self.geometry, self.eps, self.alpha = geometry, eps, 1.0
        self.interval = max(int(0.22 * steps), 1)
        self.min_interval, self.decrease = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
        self.state |= {
            "previous": start.clone(),
            "reduced": torch.ones(len(x), dtype=torch.bool, device=x.device),
        }

    def begin(self, loss: Tensor) -> None:
        self.state["loss_at_check"] = loss

    def move(self, x_adv: Tensor, gradient: Tensor) -> Tensor:
        s, geometry = self.state, self.geometry
        direction = geometry.unit(gradient, x_adv) if isinstance(geometry, L2) else gradient.sign()
        target = geometry.project(x_adv + per_image(s["step"]) * direction, s["clean"], self.eps)
        moved = x_adv + (target - x_adv) * self.alpha + (x_adv - s["previous"]) * (1 - self.alpha)
        s["previous"], self.alpha = x_adv, MOMENTUM
        return geometry.project(moved, s["clean"], self.eps)

    def check(self, best: Tensor, best_loss: Tensor, increases: Tensor, since: int) -> Tensor:
        s = self.state
        stuck = ~s["reduced"] & (s["loss_at_check"] >= best_loss)
        reduce = (increases <= RHO * since) | stuck
        s["reduced"], s["loss_at_check"] = reduce, best_loss
        s["step"] = torch.where(reduce, s["step"] / 2, s["step"])
        self.interval = max(self.interval - self.decrease, self.min_interval)
        return reduce


class _Sparse(_Schedule):
    """L1: each step changes a share of the pixels, which follows the sparsity of the best point.

    At a checkpoint, every 4 % of the steps, an image whose best point became sparser by 5 % restarts from
    that point with the largest step size, the radius. The step size of the others is divided by 1.5, down to
    a tenth of the radius.
    """

    def __init__(
        self, start: Tensor, x: Tensor, geometry: L1, steps: int, radius: float, *, first: bool
    ) -> None:
        super().__init__(x, radius)
        self.geometry, self.radius = geometry, radius
        self.interval = max(int(0.04 * steps), 1)
        changed = _changed(start, x)
        share = torch.full_like(changed, FIRST_SHARE) if first else changed / REDUCTION
        self.state |= {"share": share, "changed": torch.ones_like(changed) if first else changed}

    def move(self, x_adv: Tensor, gradient: Tensor) -> Tensor:
        s = self.state
        return self.geometry.sparse_step(x_adv, gradient, s["clean"], s["step"], self.radius, s["share"])

    def check(self, best: Tensor, best_loss: Tensor, increases: Tensor, since: int) -> Tensor:
        s = self.state
        changed = _changed(best, s["clean"])
        sparser = changed < SPARSER * s["changed"]
        smaller = (s["step"] / REDUCTION).clamp(min=SMALLEST_STEP * self.radius)
        s["step"] = torch.where(sparser, self.radius, smaller)
        s["share"], s["changed"] = changed / REDUCTION, changed
        return sparser


def _search(objective: Objective, start: Tensor, schedule: _Schedule, steps: int, eot: int) -> Tensor:
    """``steps`` steps from ``start``; returns as :func:`ascend_auto`."""
    rows = torch.arange(len(start), device=start.device)
    point = evaluate_objective(objective, start, rows, eot)
    schedule.begin(point.loss)
    s = schedule.state
    s |= {
        "x": start.clone(),
        "gradient": point.gradient,
        "loss": point.loss,
        "best": start.clone(),
        "best_gradient": point.gradient,
        "best_loss": point.loss,
        "increases": torch.zeros_like(point.loss),
        "done": point.broken | ~_finite(point.gradient),
    }
    result = torch.where(per_image(_finite(point.gradient)), start, torch.nan)
    since = 0
    for _ in range(steps):
        moved = schedule.move(s["x"], s["gradient"])
        s["x"] = moved
        point = evaluate_objective(objective, moved, rows, eot)
        finite = _finite(point.gradient)
        newly_done = ~s["done"] & (point.broken | ~finite)
        last = torch.where(per_image(finite), moved, torch.nan)
        result[rows] = torch.where(per_image(newly_done), last, result[rows])
        s["done"] = s["done"] | newly_done
        s["increases"] = s["increases"] + (point.loss > s["loss"])
        s["gradient"], s["loss"] = point.gradient, point.loss
        better = point.loss > s["best_loss"]
        s["best"] = torch.where(per_image(better), moved, s["best"])
        s["best_gradient"] = torch.where(per_image(better), point.gradient, s["best_gradient"])
        s["best_loss"] = torch.where(better, point.loss, s["best_loss"])
        since += 1
        if since < schedule.interval:
            continue
        restart = schedule.check(s["best"], s["best_loss"], s["increases"], since)
        s["x"] = torch.where(per_image(restart), s["best"], s["x"])
        s["gradient"] = torch.where(per_image(restart), s["best_gradient"], s["gradient"])
        s["increases"] = torch.zeros_like(s["increases"])
        since = 0
        active = ~s["done"]
        rows = rows[active]
        for name, value in s.items():
            s[name] = value[active]
        if len(rows) == 0:
            return result
    result[rows] = torch.where(per_image(s["done"]), result[rows], s["best"])
    return result


def _changed(x_adv: Tensor, x: Tensor) -> Tensor:
    """The share of the pixels that differ, float32 ``[B]``."""
    return (x_adv != x).flatten(1).float().mean(1)


def _finite(gradient: Tensor) -> Tensor:
    return gradient.isfinite().flatten(1).all(1)

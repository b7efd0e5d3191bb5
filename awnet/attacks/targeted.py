"""APGD toward target classes, and MALT, which ranks the classes by their distance in a linear model."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import rng
from awnet.attacks.ascent import ascend_auto
from awnet.attacks.base import Attack, Target, check_count
from awnet.attacks.norms import geometry, per_image
from awnet.attacks.pgd import logit_difference, margin
from awnet.attacks.search import dlr_targeted
from awnet.attacks.stochastic import eot_passes
from awnet.data.threat_model import Norm

DUAL: dict[Norm, Norm] = {"Linf": "L1", "L2": "L2", "L1": "Linf"}


class _TowardClass(Attack):
    """APGD toward a class, from a random start for each number."""

    steps: int
    loss: Literal["ce", "dlr"] = "dlr"

    def toward(
        self, goal: Tensor, x: Tensor, y: Tensor, index: Tensor, number: int, *, until_goal: bool
    ) -> Tensor:
        """Moves ``x`` toward the classes ``goal`` ``[B]``, from random start ``number``.

        An image stops once it is classified as its goal, or without ``until_goal`` as any wrong class.
        """

        def objective(x_adv: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, label, target = self.logits(x_adv, 0), y[rows], goal[rows]
            if self.loss == "ce":
                value = -F.cross_entropy(logits, target, reduction="none")
            elif logits.shape[1] >= 4:
                value = dlr_targeted(logits, label, target)
            else:
                value = margin(logits, target)
            predicted = logits.argmax(1)
            return value, predicted == target if until_goal else predicted != label

        start = self.geometry.start(rng.key("search start", self.seed, number), x, index, self.eps)
        eot = eot_passes(self.model)
        return ascend_auto(objective, start, x, self.geometry, steps=self.steps, eps=self.eps, eot=eot)


class TargetedAPGD(_TowardClass):
    """APGD that tries to make the model predict a target class, with restarts.

    Args:
        target: the classes to reach, see :class:`awnet.attacks.Attack`.
        loss: ``"dlr"``: the targeted difference of logits ratio, or with fewer than 4 classes the target's
            margin. ``"ce"``: minus the cross-entropy with the target.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        target: Target,
        norm: Norm = "Linf",
        loss: Literal["ce", "dlr"] = "dlr",
        steps: int = 100,
        restarts: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, seed=seed, target=target)
        if target is None:
            raise ValueError("target must be 'random', 'least_likely', a class or a tensor of classes")
        if loss not in ("ce", "dlr"):
            raise ValueError(f"loss must be 'ce' or 'dlr', got {loss!r}")
        self.loss = loss
        self.steps, self.restarts = check_count("steps", steps), check_count("restarts", restarts)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"steps": self.steps, "restarts": self.restarts, "loss": self.loss}

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """As for :class:`Attack`, but synchronizes with the host after each restart."""
        goal = self.goal(x, y, index, largest_label)
        result, rows = x.clone(), (goal != y).nonzero()[:, 0]
        for number in range(self.restarts):
            if len(rows) == 0:
                break
            x_adv = self.toward(goal[rows], x[rows], y[rows], index[rows], number, until_goal=True)
            result[rows] = x_adv
            if not bool(x_adv.isfinite().all()):
                break
            rows = rows[~self.correct(x_adv, goal[rows], largest_label)]
        return result


def linear_ranking(
    attack: Attack, x: Tensor, y: Tensor, candidates: int, largest_label: int
) -> tuple[Tensor, Tensor]:
    """Ranks classes by the perturbation that a linear model of the network at ``x`` needs to predict them.

    For class k its size is (z_y - z_k) / ‖∇(z_y - z_k)‖, in the dual norm of ``attack.norm``.

    Args:
        attack: the attack whose model and norm are used.
        x, y: images ``[B, …]`` and labels ``[B]``.
        candidates: number of classes to rank, those with the largest logits besides the label; one forward
            and backward pass each.

    Returns:
        The C candidates of each image, nearest first, int64, and the sizes, float64; both ``[B, C]``.
    """
    logits = attack.decision(x, largest_label)
    count = min(candidates, logits.shape[1] - 1)
    classes = logits.scatter(1, y[:, None], -torch.inf).topk(count, dim=1).indices
    dual = geometry(DUAL[attack.norm])
    sizes = []
    for goal in classes.T:

        def gap(images: Tensor, goal: Tensor = goal) -> Tensor:
            return logit_difference(attack.logits(images, largest_label), y, goal)

        length = dual.size(attack.gradient(gap, x)).clamp(min=1e-30)
        sizes.append(logit_difference(logits, y, goal).double() / length)
    distances = torch.stack(sizes, 1) if sizes else logits.new_zeros(len(x), 0).double()
    distances, order = distances.sort(dim=1, stable=True)
    return classes.gather(1, order), distances


class MALT(_TowardClass):
    """Mesoscopic almost linearity targeting (Melamed et al. 2024): APGD toward the linearly closest classes.

    For each of the ``candidates`` classes with the largest logits besides the label, a linear model of the
    network at x would need a perturbation of size (z_y - z_k) / ‖∇(z_y - z_k)‖ to predict class k, in the
    dual norm of the threat model's norm. APGD on the targeted difference of logits ratio runs toward the
    ``targets`` classes for which that is smallest, nearest first, each on the images that are still
    classified correctly. AutoAttack's APGD-T takes the classes with the largest logits instead, which may
    differ if there are more than ``targets`` + 1 classes.

    Args:
        targets: number of target classes.
        candidates: number of classes that are ranked; one forward and backward pass each.
        steps: steps toward each target.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        targets: int = 9,
        candidates: int = 100,
        steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, seed=seed)
        self.targets, self.candidates = check_count("targets", targets), check_count("candidates", candidates)
        self.steps = check_count("steps", steps)

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"targets": self.targets, "candidates": self.candidates, "steps": self.steps}
        return super().settings | sizes

    def ranking(self, x: Tensor, y: Tensor, largest_label: int) -> tuple[Tensor, Tensor]:
        """The candidates ``[B, C]`` of each image, nearest first, and their linear distances ``[B, C]``."""
        return linear_ranking(self, x, y, self.candidates, largest_label)

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """As for :class:`Attack`, but synchronizes with the host after each target."""
        goals, distances = self.ranking(x, y, largest_label)
        result = torch.where(per_image(distances.isfinite().all(1)), x, torch.nan)
        rows = self.correct(x, y, largest_label).nonzero()[:, 0]
        for number, goal in enumerate(goals.T[: self.targets]):
            if len(rows) == 0 or not bool(result.isfinite().all()):
                break
            x_adv = self.toward(goal[rows], x[rows], y[rows], index[rows], number, until_goal=False)
            result[rows] = x_adv
            rows = rows[self.correct(x_adv, y[rows], largest_label)]
        return result

"""FMN, the fast minimum-norm attack (Pintor et al. 2021): searches for the smallest perturbation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from awnet.attacks.ascent import evaluate_objective
from awnet.attacks.base import Attack, check_count, check_size
from awnet.attacks.norms import geometry, per_image
from awnet.attacks.pgd import logit_difference, margin
from awnet.attacks.stochastic import eot_passes
from awnet.attacks.targeted import DUAL, linear_ranking
from awnet.data.threat_model import Norm

CANDIDATES = 100  # number of classes that are ranked
LAST_STEP = 0.01  # size of the last step, in units of the first
LAST_GAMMA = 0.001


class FMN(Attack):
    """The fast minimum-norm attack (Pintor et al. 2021), which searches for the smallest perturbation.

    Each step follows the margin's gradient, scaled to Euclidean length ``step_size``, and projects onto the
    ball of the image's current radius ε_k in ``norm``, within [0, 1]. As long as no perturbation has broken
    the image, ε_k = 1.001 (‖δ‖ + margin / ‖∇margin‖) in the dual norm: just beyond the decision boundary of a
    linear model. Afterwards ε_k shrinks by the factor 1 - γ_k where δ breaks the image, and grows by 1 + γ_k
    where it does not. Step size and γ_k fall along a cosine, to ``step_size``/100 and 0.001.

    As published, the search crosses the boundary to the class with the second largest logit. It is repeated
    with z_y - z_k instead of the margin for the ``targets`` classes k that are nearest in a linear model
    (:func:`awnet.attacks.targeted.linear_ranking`); an image keeps the smallest perturbation of all searches.

    The attack's ``eps`` does not limit the search. A call returns the smallest perturbation found where it is
    within ``eps``, and the clean image otherwise; ``distances`` has the sizes of all of them.

    Args:
        steps: forward and backward passes of each search.
        step_size: length of the first step, in image units.
        gamma: γ of the first step.
        targets: further searches of ``steps`` each, toward the linearly nearest classes; 0 for the published
            attack.
    """

    filterable = False

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        steps: int = 1000,
        step_size: float = 1.0,
        gamma: float = 0.05,
        targets: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, seed=seed)
        self.steps = check_count("steps", steps)
        self.step_size, self.gamma = check_size("step_size", step_size), check_size("gamma", gamma, 1.0)
        self.targets = check_count("targets", targets)
        self.distances: Tensor | None = None
        """For the last batch, the size of the smallest perturbation found, float64 ``[B]``: 0 for an image
        that is misclassified without one, infinity where none was found."""

    @property
    def settings(self) -> dict[str, Any]:
        sizes = {"steps": self.steps, "step_size": self.step_size, "gamma": self.gamma}
        return super().settings | sizes | {"targets": self.targets}

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        correct = self.correct(x, y, largest_label)
        best, distances = x.clone(), torch.where(correct, torch.inf, 0.0).double()
        goals: list[Tensor | None] = [None]
        if self.targets:
            goals += linear_ranking(self, x, y, CANDIDATES, largest_label)[0].T[: self.targets]
        for goal in goals:
            point, sizes = self._search(goal, correct, x, y, largest_label)
            best = torch.where(per_image((sizes < distances) | point.isnan().flatten(1).any(1)), point, best)
            distances = torch.minimum(sizes, distances)
        self.distances = distances
        within = self.geometry.inside(best, x, self.eps) | best.isnan().flatten(1).any(1)
        return torch.where(per_image(within), best, x)

    def _search(
        self, goal: Tensor | None, correct: Tensor, x: Tensor, y: Tensor, largest_label: int
    ) -> tuple[Tensor, Tensor]:
        """The nearest misclassified points ``[B, …]`` found toward ``goal``, and their distances ``[B]``."""

        def objective(x_adv: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            z = self.logits(x_adv, largest_label)
            gap = margin(z, y) if goal is None else logit_difference(z, y, goal)
            return -gap, z.argmax(1) != y

        rows, eot = torch.arange(len(x), device=x.device), eot_passes(self.model)
        dual, euclidean = geometry(DUAL[self.norm]), geometry("L2")
        distances = torch.where(correct, torch.inf, 0.0).double()
        x_adv, best, radius = x.clone(), x.clone(), torch.full_like(distances, torch.inf)
        for step in range(self.steps):
            share = (1 + math.cos(math.pi * step / self.steps)) / 2
            gamma = LAST_GAMMA + (self.gamma - LAST_GAMMA) * share
            step_size = self.step_size * (LAST_STEP + (1 - LAST_STEP) * share)
            loss, gradient, broken = evaluate_objective(objective, x_adv, rows, eot)
            size = self.geometry.size(x_adv - x)
            closer = broken & (size < distances)
            best = torch.where(per_image(closer), x_adv, best)
            distances = torch.where(closer, size, distances)
            linear = (size - loss.double() / dual.size(gradient).clamp(min=1e-30)) * (1 + LAST_GAMMA)
            grown = torch.where(distances.isfinite(), radius * (1 + gamma), linear)
            radius = torch.where(broken, torch.minimum(radius * (1 - gamma), distances), grown)
            length = euclidean.size(gradient).clamp(min=1e-30).to(x.dtype)
            moved = x_adv + gradient * per_image(step_size / length)
            x_adv = self.geometry.project(moved, x, radius.to(x.dtype))
            # an image whose gradient is not finite must not look robust
            x_adv = torch.where(per_image(gradient.isfinite().flatten(1).all(1)), x_adv, torch.nan)
            best = torch.where(per_image(x_adv.isfinite().flatten(1).all(1)), best, torch.nan)
        return best, distances

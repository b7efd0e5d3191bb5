"""A guard against catastrophic overfitting of single-step training.

Networks that train on attacks of a single step may lose all robustness to PGD within a few hundred steps,
while their loss still falls (Wong et al., ICLR 2020). The guard compares the PGD accuracy on held-out images
with the best one so far, several times per epoch. After a collapse the weights, the optimizer and everything
else that steps change go back to the last good check. The schedule, the position in the data and the random
generators advance, as for a skipped step, and PGD replaces the recipe's attack for the length of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from awnet.data import Dataset
from awnet.training.recipes import Recipe
from awnet.training.training_attacks import TrainingAttack

COLLAPSE = 0.5  # of the best accuracy
LEAST_FALL = 0.05  # of all images, more than chance
MOST_IN_A_ROW = 5
_STATE = ("best", "step", "rescue_until", "in_a_row")


class OverfittingGuard:
    """Decides at each check whether the network has collapsed, and stores the state of the last good check.

    Args:
        recipe: with ``overfitting_checks`` above 0.
        model: the network that trains.
        data: its data set, for the attack after a collapse.
        steps_per_epoch: number of steps of an epoch.
        seed: keys the noise of that attack.

    Attributes:
        best: the best accuracy of a good check so far, a fraction.
        step: the step of the last good check, 0 before the first.
        rescue_until: the last step that :attr:`rescue` attacks.
        in_a_row: number of collapses since the last good check.
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, data: Dataset, steps_per_epoch: int, seed: int
    ) -> None:
        self.checks, self.steps_per_epoch = recipe.overfitting_checks, steps_per_epoch
        self.best, self.step, self.rescue_until, self.in_a_row = 0.0, 0, 0, 0
        self._good: dict[str, Any] = {}
        rescue_recipe = replace(
            recipe,
            attack_kind="pgd",
            attack_radius=None,
            attack_steps=max(recipe.attack_steps, recipe.rescue_steps),
            attack_step_size=None if recipe.attack_kind == "pgd" else data.threat_model.eps / 2,
        )
        self.rescue: TrainingAttack = rescue_recipe.attack(model, data.threat_model, data.num_classes, seed)

    def due(self, batch: int) -> bool:
        """Whether a check follows ``batch`` of an epoch, counted from 1; the last one always has one."""
        return batch * self.checks // self.steps_per_epoch > (batch - 1) * self.checks // self.steps_per_epoch

    def collapsed(
        self, accuracy: float, step: int, snapshot: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The state of the last good check if the network has collapsed; else None.

        Args:
            accuracy: of the network under PGD after ``step``, a fraction.
            snapshot: makes the state to keep if the check is good.

        Raises:
            RuntimeError: the network has collapsed several times since the last good check.
        """
        fall = self.best - accuracy
        if not self._good or accuracy >= COLLAPSE * self.best or fall < LEAST_FALL:
            self.best, self.step, self.in_a_row = max(self.best, accuracy), step, 0
            self._good = snapshot()
            return None
        self.in_a_row += 1
        if self.in_a_row >= MOST_IN_A_ROW:
            raise RuntimeError(
                f"catastrophic overfitting: {self.in_a_row} checks in a row found less than half of the best "
                f"PGD accuracy, {100 * self.best:.1f} %, last {100 * accuracy:.1f} % after step {step}. "
                "The last checkpoint is kept. More steps of the attack (attack_kind=pgd), more noise "
                "(attack_radius) or a lower learning rate usually help, in a new run"
            )
        self.rescue_until = step + self.steps_per_epoch
        return self._good

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE} | {"good": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name])
        self._good = state["good"]

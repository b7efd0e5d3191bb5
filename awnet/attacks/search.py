"""Attacks of several searches, each on the images that no earlier search has broken; among them APGD."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import rng
from awnet.attacks.ascent import Objective, ascend, ascend_auto
from awnet.attacks.base import Attack, check_count, check_size
from awnet.attacks.pgd import logit_difference, margin
from awnet.attacks.stochastic import eot_passes
from awnet.data.threat_model import Norm


class Search(Attack):
    """An attack of several searches, each on the images that the model still classifies correctly.

    A subclass implements :meth:`searches` and :meth:`objective`. Images that are already misclassified are
    not changed; for an image that no search breaks, the last search's point is returned.

    Args:
        steps: steps of each search.
        optimizer: ``"sign"``: steps of steepest ascent of fixed size, which in L-infinity follow the
            gradient's sign. ``"auto"``: APGD.
        step_size: step of ``"sign"``, in image units; eps/4 if None.
        seed: seed of the random starts, which are uniform in the ball and depend on the sample's index.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        steps: int = 100,
        optimizer: Literal["sign", "auto"] = "sign",
        step_size: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, seed=seed)
        self.steps = check_count("steps", steps)
        if optimizer not in ("sign", "auto"):
            raise ValueError(f"optimizer must be 'sign' or 'auto', got {optimizer!r}")
        self.optimizer = optimizer
        self.step_size = self.eps / 4 if step_size is None else check_size("step_size", step_size)

    @property
    def settings(self) -> dict[str, Any]:
        # the keys are stored in reports and must not be renamed
        size = {"step_size": self.step_size} if self.optimizer == "sign" else {}
        return super().settings | {"steps": self.steps, "optimiser": self.optimizer} | size

    @abstractmethod
    def searches(self, x: Tensor) -> int:
        """The number of searches for images like ``x``."""

    @abstractmethod
    def objective(self, number: int, x: Tensor, y: Tensor, largest_label: int) -> Objective:
        """The function that search ``number`` maximizes for the images ``x``."""

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """See :class:`Attack`. After each search the host waits for the device, to find the broken images."""
        result = x.clone()
        rows = self.correct(x, y, largest_label).nonzero()[:, 0]
        for number in range(self.searches(x[:1])):
            if len(rows) == 0:
                break
            x_adv = self.search(number, x[rows], y[rows], index[rows], largest_label)
            result[rows] = x_adv
            if not bool(x_adv.isfinite().all()):
                break
            rows = rows[self.correct(x_adv, y[rows], largest_label)]
        return result

    def search(self, number: int, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        """One search: maximizes the objective from a random start."""
        return self.maximize(
            self.objective(number, x, y, largest_label), x, self.start(number, x, index), self.steps
        )

    def maximize(self, objective: Objective, x: Tensor, start: Tensor, steps: int) -> Tensor:
        """The points ``[B, …]`` after ``steps`` steps of the optimizer from ``start``."""
        shared: dict[str, Any] = {"steps": steps, "eps": self.eps, "eot": eot_passes(self.model)}
        if self.optimizer == "auto":
            return ascend_auto(objective, start, x, self.geometry, **shared)
        return ascend(objective, start, x, self.geometry, step_size=self.step_size, **shared)

    def start(self, number: int, x: Tensor, index: Tensor) -> Tensor:
        """The random start of search ``number``, keyed by seed and ``index``."""
        return self.geometry.start(rng.key("search start", self.seed, number), x, index, self.eps)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The difference of logits ratio ``[B]`` (Croce and Hein 2020), to maximize; needs 3 classes."""
    ordered = logits.sort(1).values
    return -margin(logits, y) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The targeted form of :func:`dlr` ``[B]``, target against label, to maximize; needs 4 classes."""
    ordered = logits.sort(1).values
    scale = ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2 + 1e-12
    return logit_difference(logits, target, y) / scale


APGDLoss = Literal["ce", "dlr", "dlr_targeted"]


class APGD(Search):
    """APGD with restarts on the cross-entropy, the DLR loss, or the targeted DLR loss.

    Unlike the official code it draws random starts per sample, and the loss may depend on more than the
    logits (see :class:`awnet.attacks.adaptive.JointAPGD`). Restart r of ``"dlr_targeted"`` targets, of
    the classes other than the label, the one with the r-th largest logit for ``x`` (r modulo at most 9).

    Args:
        loss: ``"dlr"`` needs 3 classes and ``"dlr_targeted"`` 4; with fewer classes the margin is used.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        loss: APGDLoss = "ce",
        steps: int = 100,
        restarts: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, steps=steps, optimizer="auto", seed=seed)
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

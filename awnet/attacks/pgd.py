"""Projected gradient descent, and its variants FGSM and CW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import rng
from awnet.attacks.base import Attack, Target, check_count, check_size
from awnet.attacks.norms import per_image
from awnet.data.threat_model import Norm
from awnet.nn import InferenceCopy

#: maps (model, x_adv, x, y) to a loss ``[B]`` to maximize
LossFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

LOSSES = ("ce", "margin", "kl")
STARTS = ("uniform", "normal", None)


class PGD(Attack):
    """Projected gradient descent (Madry et al. 2018): ``steps`` times x ← project(x + step_size·direction).

    The direction is that of steepest ascent in the norm: in L-infinity sign(∂loss/∂x); in L2 the gradient of
    each image, scaled to length 1; in L1 the pixels of largest gradient, filled one after the other up to 0
    or 1. The projection is exact, on the ball of radius ``eps`` within [0, 1] (:mod:`awnet.attacks.norms`).
    An image whose gradient is 0 does not change, in L-infinity no pixel whose gradient is 0.

    Args:
        model: any ``nn.Module`` that maps images in [0, 1] to logits ``[B, K]``.
        eps: radius of the ball, in image units.
        norm: ``"Linf"``, ``"L2"`` or ``"L1"``.
        step_size: length of a step in that norm, in image units.
        steps: number of steps; 0 gives the starting point.
        loss: the loss to maximize. ``"ce"``: cross-entropy. ``"margin"``: Carlini and Wagner's
            -max(z_y - max_{j≠y} z_j, -kappa). ``"kl"``: KL(model(x) ‖ model(x_adv)), as in TRADES. Or a
            function of (model, x_adv, x, y) that returns ``[B]``.
        random_start: ``"uniform"`` in the norm's ball; ``"normal"``: x + noise_std·N(0, 1); both are
            projected. None: at x itself.
        noise_std: standard deviation of the ``"normal"`` start, in image units.
        seed: keys the start, together with each sample's index.
        kappa: the margin at which ``"margin"`` saturates, in units of the logits.
        target: the classes to reach, see :class:`Attack`: the loss is then minus the cross-entropy with the
            target, or the target's margin up to kappa. Not for ``"kl"`` and functions.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        step_size: float,
        steps: int,
        loss: Literal["ce", "margin", "kl"] | LossFunction = "ce",
        random_start: Literal["uniform", "normal"] | None = "uniform",
        noise_std: float = 0.001,
        seed: int = 0,
        kappa: float = 50.0,
        target: Target | None = None,
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, seed=seed, target=target)
        self.step_size = check_size("step_size", step_size)
        self.steps = check_count("steps", steps)
        self.noise_std = check_size("noise_std", noise_std)
        self.kappa = check_size("kappa", kappa)
        if not callable(loss) and loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)} or a function, got {loss!r}")
        if random_start not in STARTS:
            raise ValueError(f"random_start must be 'uniform', 'normal' or None, got {random_start!r}")
        if loss == "kl" and random_start is None:
            raise ValueError(
                "random_start must be 'uniform' or 'normal' with loss 'kl': its gradient is 0 at x"
            )
        if target is not None and loss not in ("ce", "margin"):
            raise ValueError("target needs loss 'ce' or 'margin': no other loss has a target class")
        self.loss = loss
        self.random_start = random_start
        self.graphed: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None = None
        """Called in place of :meth:`ascend`, see :mod:`awnet.attacks.graphed_steps`."""

    @property
    def settings(self) -> dict[str, Any]:
        loss = self.loss if isinstance(self.loss, str) else getattr(self.loss, "__qualname__", "function")
        settings = super().settings | {
            "step_size": self.step_size,
            "steps": self.steps,
            "loss": loss,
            "random_start": self.random_start,
        }
        if self.random_start == "normal":
            settings["noise_std"] = self.noise_std
        if self.loss == "margin":
            settings["kappa"] = self.kappa
        return settings

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        ascend = self.ascend if self.graphed is None else self.graphed
        if self.target is None:
            return ascend(self.start(x, index), x, y, largest_label)
        goal = self.goal(x, y, index, largest_label)
        x_adv = ascend(self.start(x, index), x, goal, largest_label)
        return torch.where(per_image(goal == y), x, x_adv)

    def start_key(self) -> int:
        """The key of the noise of :meth:`start`, from the seed."""
        return rng.key("attack start", self.seed)

    def start(self, x: Tensor, index: Tensor, key: Tensor | None = None) -> Tensor:
        """The starting point: noise keyed by seed and ``index``, within the ball.

        ``key`` is :meth:`start_key` as int64, 0-d, on ``x``'s device, which a CUDA graph reads; by default it
        is computed from the seed.
        """
        noise_key: int | Tensor = self.start_key() if key is None else key
        if self.random_start == "uniform":
            return self.geometry.start(noise_key, x, index, self.eps)
        if self.random_start == "normal":
            noise = rng.normal(noise_key, index, x.shape[1:]).to(x.dtype)
            x_adv = torch.add(x, noise, alpha=self.noise_std)
            return self.geometry.project(x_adv, x, self.eps)
        return self.geometry.project(x, x, self.eps)

    def ascend(self, start: Tensor, x: Tensor, y: Tensor, largest_label: int) -> Tensor:
        """Runs all steps from ``start``, with device operations only; no argument is modified."""
        objective = self._objective(x, y, largest_label) if self.steps else None
        # an inference copy may take images of lower precision
        dtype = self.model.image_dtype if isinstance(self.model, InferenceCopy) else x.dtype
        x_adv, image = start, start.to(dtype, copy=True)
        nan_if_broken = torch.zeros_like(x)
        for _ in range(self.steps):
            assert objective is not None
            gradient = self.gradient(objective, image)
            copy = None if dtype == x.dtype else torch.empty_like(image)
            x_adv = self.geometry.step(x_adv, gradient, x, self.step_size, self.eps, cast=copy)
            image = x_adv if copy is None else copy
            # a step follows sign(NaN) = 0, so a NaN gradient would look like a robust model: 0·NaN stays NaN
            nan_if_broken.add_(gradient, alpha=0)
        return x_adv + nan_if_broken

    def _objective(self, x: Tensor, y: Tensor, largest_label: int) -> Callable[[Tensor], Tensor]:
        """The loss ``[B]`` as a function of x_adv alone; ``y`` are the targets of a targeted attack."""
        loss = self.loss
        if not isinstance(loss, str):
            return lambda x_adv: loss(self.model, x_adv, x, y)
        if self.target is not None and loss == "ce":
            return lambda x_adv: -F.cross_entropy(self.logits(x_adv, largest_label), y, reduction="none")
        if self.target is not None:
            return lambda x_adv: margin(self.logits(x_adv, largest_label), y).clamp(max=self.kappa)
        if loss == "ce":
            return lambda x_adv: F.cross_entropy(self.logits(x_adv, largest_label), y, reduction="none")
        if loss == "margin":
            return lambda x_adv: -margin(self.logits(x_adv, largest_label), y).clamp(min=-self.kappa)
        with torch.no_grad():
            clean = F.log_softmax(self.logits(x, largest_label), dim=1)
        return lambda x_adv: F.kl_div(
            F.log_softmax(self.logits(x_adv, largest_label), dim=1), clean, reduction="none", log_target=True
        ).sum(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{j≠y} z_j ``[B]`` of logits ``[B, K]`` and labels ``[B]``: positive if y is predicted."""
    label = y[:, None]
    others = logits.scatter(1, label, -torch.inf).amax(1)
    return logits.gather(1, label).squeeze(1) - others


def logit_difference(logits: Tensor, y: Tensor, other: Tensor) -> Tensor:
    """z_y - z_other ``[B]`` of logits ``[B, K]`` and classes ``[B]``."""
    return (logits.gather(1, y[:, None]) - logits.gather(1, other[:, None])).squeeze(1)


class FGSM(PGD):
    """The fast gradient sign method (Goodfellow et al. 2015): x + eps·sign(∂CE/∂x), clipped to [0, 1].

    In L2 and L1: one step of PGD of length eps.

    Args:
        random_start: start uniformly in the ball instead of at x (the paper does not).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        random_start: bool = False,
        seed: int = 0,
        target: Target | None = None,
    ) -> None:
        start: Literal["uniform"] | None = "uniform" if random_start else None
        super().__init__(
            model, eps=eps, norm=norm, step_size=eps, steps=1, random_start=start, seed=seed, target=target
        )


class CW(PGD):
    """Carlini and Wagner's margin loss -max(z_y - max_{j≠y} z_j, -kappa), maximized by PGD in the ball."""

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        step_size: float,
        steps: int = 30,
        kappa: float = 50.0,
        seed: int = 0,
        target: Target | None = None,
    ) -> None:
        super().__init__(
            model,
            eps=eps,
            norm=norm,
            step_size=step_size,
            steps=steps,
            loss="margin",
            kappa=kappa,
            seed=seed,
            target=target,
        )

"""The attacks that training runs on each batch: PGD, and attacks of a single step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import rng
from awnet.attacks.base import check_size
from awnet.attacks.pgd import PGD
from awnet.nn import Steering, observe
from awnet.precision import at_least_float32


class TrainingAttack(Protocol):
    """A training attack: images [B, C, H, W] and labels [B] to adversarial images."""

    seed: int

    def __call__(self, x: Tensor, y: Tensor, *, index: Tensor) -> Tensor: ...


class SingleStepKind(NamedTuple):
    """An attack of one step from noise.

    noise: ``uniform`` in [−radius, radius] per pixel, or ``bernoulli``, ±radius with probability ½ each.
    radius, step: in units of eps.
    projected: whether the image is projected to the ball of radius eps after the step. It always stays in
        [0, 1].
    """

    noise: Literal["uniform", "bernoulli"]
    radius: float
    step: float
    projected: bool


SINGLE_STEP_KINDS = {
    "fgsm_rs": SingleStepKind("uniform", 1.0, 1.25, projected=True),
    "n_fgsm": SingleStepKind("uniform", 2.0, 1.0, projected=False),
    "bernoulli": SingleStepKind("bernoulli", 0.5, 1.0, projected=True),
}


class SingleStepAttack(PGD):
    """One step x + δ + step_size · sign(∂loss/∂x) from noise δ with a separate radius, within eps and [0, 1].

    FGSM-RS (Wong et al., ICLR 2020), N-FGSM (de Jorge et al., NeurIPS 2022) and the attack of GAT
    (Sriramanan et al., NeurIPS 2020) are this with the settings of :data:`SINGLE_STEP_KINDS`.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, K].
        noise: see :class:`SingleStepKind`.
        noise_radius: in image units.
        settings: the others of :class:`~awnet.attacks.PGD`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        noise: Literal["uniform", "bernoulli"],
        noise_radius: float,
        **settings: Any,
    ) -> None:
        super().__init__(model, **(settings | {"steps": 1, "random_start": "uniform"}))
        self.noise = noise
        self.noise_radius = check_size("noise_radius", noise_radius)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"noise": self.noise, "noise_radius": self.noise_radius}

    def start(self, x: Tensor, index: Tensor, key: Tensor | None = None) -> Tensor:
        """The noisy images, keyed by seed and ``index``."""
        noise = rng.uniform(self.start_key() if key is None else key, index, x.shape[1:])
        noise = torch.where(noise < 0.5, -1.0, 1.0) if self.noise == "bernoulli" else 2 * noise - 1
        return torch.add(x, noise.to(x.dtype), alpha=self.noise_radius).clamp_(0, 1)


# The objectives that a training attack maximizes, one value per sample

Objective = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Any]]


def _forward(model: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    steering = Steering()
    logits = observe(model, x, steering)
    return logits, steering.routings[0] if steering.routings else None


def cross_entropy(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    """CE [B] of the adversarial images, and their routing."""
    logits, routing = _forward(model, x_adv)
    return F.cross_entropy(at_least_float32(logits), y, reduction="none"), routing


def kl_from_clean(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    """KL(p_nat ‖ p_adv) [B], and the routing of the adversarial images."""
    with torch.no_grad():
        log_p = F.log_softmax(at_least_float32(model(x)), dim=1)
    logits, routing = _forward(model, x_adv)
    return (log_p.exp() * (log_p - F.log_softmax(at_least_float32(logits), dim=1))).sum(1), routing


def guided_by(weight: float) -> Objective:
    """CE + weight · ‖p_nat − p_adv‖² [B], the objective of GAT."""

    def objective(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        with torch.no_grad():
            p_nat = F.softmax(at_least_float32(model(x)), dim=1)
        logits, routing = _forward(model, x_adv)
        logits = at_least_float32(logits)
        distance = (p_nat - F.softmax(logits, dim=1)).square().sum(1)
        return F.cross_entropy(logits, y, reduction="none") + weight * distance, routing

    return objective


def with_type_loss(objective: Objective, weight: float) -> Callable[..., Tensor]:
    """``objective`` plus ``weight`` times the router's cross-entropy with "adversarial"; [B]."""

    def loss(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        value, routing = objective(model, x_adv, x, y)
        if not weight or routing is None or routing.type_logits is None:  # no router, or without a type head
            return value
        adversarial = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        return value + weight * F.cross_entropy(
            at_least_float32(routing.type_logits), adversarial, reduction="none"
        )

    return loss

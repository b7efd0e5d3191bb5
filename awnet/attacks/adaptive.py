"""Adaptive attacks on networks with a router: they target the router, fix it or soften it.

A network with a router may look robust only because gradients through the router point elsewhere, saturate,
or are zero. Each attack here removes one of these causes. Some of them also apply to models without a router.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet.attacks.ascent import Objective
from awnet.attacks.base import check_model, frozen
from awnet.attacks.pgd import PGD, margin
from awnet.attacks.saved import digest, model_fingerprint
from awnet.attacks.search import APGD, APGDLoss, Search
from awnet.data.threat_model import Norm
from awnet.models.rdi import has_exits
from awnet.nn import Steering, has_router, observe, route, routers, with_routing
from awnet.precision import at_least_float32
from awnet.scalars import check_number

LAMBDAS = (0.0, 0.01, -0.01, 0.1, -0.1, 1.0, -1.0, 10.0, -10.0, 100.0, -100.0)
"""Weights λ of the type logits' margin, added to the classes' margin."""


def has_type_head(model: nn.Module) -> bool:
    """Whether the model has a router with a type head (clean or adversarial)."""
    if not has_router(model):
        return False
    model_routers = routers(model)
    return not model_routers or getattr(model_routers[0], "type_head", None) is not None


def type_margin(routing: Any) -> Tensor | None:
    """Clean minus adversarial type logit ``[B]``: positive if the router classifies the image as clean."""
    logits = routing.type_logits
    return None if logits is None else (logits[:, 1] - logits[:, 0]).float()


def _checked_lambdas(model: nn.Module, lambdas: Sequence[float]) -> tuple[float, ...]:
    """``lambdas`` as numbers; 0 alone for a model without a type head."""
    return tuple(check_number("lambdas", value) for value in lambdas) if has_type_head(model) else (0.0,)


class Joint(Search):
    """Maximizes the classes' margin plus λ times the type logits' margin, both on logits; one search per λ.

    λ > 0 makes the image look clean to the router, λ < 0 adversarial; λ = 0 ignores the router.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        lambdas: Sequence[float] = LAMBDAS,
        steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, steps=steps, seed=seed)
        self.lambdas = _checked_lambdas(model, lambdas)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"loss": "margin + lambda · type margin", "lambdas": list(self.lambdas)}

    def searches(self, x: Tensor) -> int:
        return len(self.lambdas)

    def objective(self, number: int, x: Tensor, y: Tensor, largest_label: int) -> Objective:
        weight = self.lambdas[number]

        def loss(x_adv: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, toward_clean = _observe(self, x_adv, largest_label)
            value = -margin(logits, y[rows])
            if weight and toward_clean is not None:
                value = value + weight * toward_clean
            return value, logits.argmax(1) != y[rows]

        return loss


def _observe(attack: Search, x: Tensor, largest_label: int) -> tuple[Tensor, Tensor | None]:
    """The attacked model's logits and type margin, from one forward pass."""
    if not has_router(attack.model):
        return attack.logits(x, largest_label), None
    logits, routing = _logits_and_routing(attack.model, x)
    return logits, type_margin(routing)


def _logits_and_routing(model: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    """Logits, float32 or wider, and the routing of the same forward pass."""
    steering = Steering()
    logits = observe(model, x, steering)
    routing = steering.routings[0] if len(steering.routings) == 1 else route(model, x)
    return at_least_float32(logits), routing


class JointAPGD(APGD):
    """APGD on cross-entropy or the difference of logits ratio, plus λ times the type logits' margin.

    Restart r uses ``lambdas[r % len(lambdas)]``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        loss: APGDLoss = "ce",
        lambdas: Sequence[float] = LAMBDAS,
        steps: int = 100,
        restarts: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, loss=loss, steps=steps, restarts=restarts, seed=seed)
        self.lambdas = _checked_lambdas(model, lambdas)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"lambdas": list(self.lambdas)}

    def observe(self, x: Tensor, number: int, largest_label: int) -> tuple[Tensor, Tensor | float]:
        logits, toward_clean = _observe(self, x, largest_label)
        weight = self.lambdas[number % len(self.lambdas)]
        return logits, 0.0 if toward_clean is None or weight == 0 else weight * toward_clean


class ForcedStatic(Search):
    """Attacks the network with a fixed router: p is 0, ½ or 1, and ω is the clean image's or a mean.

    Each search maximizes the margin of that static network. Its image is then classified by the model with
    its router.

    Args:
        mean_scales: ω averaged over images, ``[C_out]`` for each layer; None omits the searches with a mean.
    """

    P = (0.0, 0.5, 1.0)

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        mean_scales: Sequence[Tensor] | None = None,
        steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, steps=steps, seed=seed)
        if not has_router(model):
            raise ValueError(f"ForcedStatic needs a model with a router, got a {type(model).__name__}")
        self.mean_scales = list(mean_scales or [])

    @property
    def settings(self) -> dict[str, Any]:
        scales = ["of the clean image"]
        settings = super().settings | {"loss": "margin", "p_clean": list(self.P), "filter_scales": scales}
        if self.mean_scales:
            scales.append(f"mean, {digest(*self.mean_scales)}")
        return settings

    def searches(self, x: Tensor) -> int:
        return len(self.P) * (2 if self.mean_scales else 1)

    def objective(self, number: int, x: Tensor, y: Tensor, largest_label: int) -> Objective:
        p, use_mean = self.P[number % len(self.P)], number >= len(self.P)
        with torch.no_grad():
            routing = route(self.model, x)

        def loss(x_adv: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            if use_mean:
                scales = [scale.to(x.device).expand(len(rows), -1) for scale in self.mean_scales]
            else:
                scales = [scale[rows] for scale in routing.filter_scales]
            p_clean = routing.p_clean.new_full((len(rows),), p)
            fixed = replace(routing, type_logits=None, p_clean=p_clean, filter_scales=scales)
            return -margin(at_least_float32(with_routing(self.model, x_adv, fixed)), y[rows]), None

        return loss


def mean_scales(model: nn.Module, x: Tensor) -> list[Tensor]:
    """ω averaged over the images ``x``, ``[C_out]`` per layer; empty without filter scaling."""
    if not has_router(model):
        return []
    with frozen(model), torch.no_grad():
        routing = route(model, x)
    return [scale.double().mean(0).to(scale.dtype) for scale in routing.filter_scales]


class TwoPhase(Search):
    """First makes the router classify the image as clean, then maximizes the margin under that constraint.

    The first search, of ``steps``, maximizes the type margin. The second, of ``steps`` from there, maximizes
    the classes' margin while the type margin is above a bound, and the type margin otherwise. The bound is
    that of p_clean = 0.99, or for an image that did not reach it, half of its increase.
    """

    BOUND = 4.6  # log(0.99 / 0.01)

    def __init__(
        self, model: nn.Module, *, eps: float, norm: Norm = "Linf", steps: int = 100, seed: int = 0
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, steps=steps, seed=seed)
        if not has_type_head(model):
            raise ValueError(f"TwoPhase needs a model with a type head, got a {type(model).__name__}")

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"loss": "type margin, then margin where p_clean ≥ 0.99"}

    def searches(self, x: Tensor) -> int:
        return 1

    def objective(self, number: int, x: Tensor, y: Tensor, largest_label: int) -> Objective:
        def loss(x_adv: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, toward_clean = _observe(self, x_adv, largest_label)
            assert toward_clean is not None
            return toward_clean, logits.argmax(1) != y[rows]

        return loss

    def search(self, number: int, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        start = self.start(number, x, index)
        clean = self.maximize(self.objective(number, x, y, largest_label), x, start, self.steps)
        with torch.no_grad():
            before, after = (_observe(self, images, largest_label)[1] for images in (start, clean))
        assert before is not None
        assert after is not None
        bound = ((before + after) / 2).clamp(max=self.BOUND)

        def constrained(x_adv: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, toward_clean = _observe(self, x_adv, largest_label)
            assert toward_clean is not None
            value = torch.where(toward_clean >= bound[rows], -margin(logits, y[rows]), toward_clean)
            return value, logits.argmax(1) != y[rows]

        return self.maximize(constrained, x, clean, self.steps)


class Softened(Search):
    """Maximizes the margin with gradients through a softened router, which does not saturate.

    With temperature T, p_soft = softmax(type_logits / T) and ω_soft = (tanh(a / T) + 1)^β, where a is the
    output of the signal heads. Mode ``"through"`` (straight through) uses the model's values and the soft
    gradients. Mode ``"value"`` uses the soft values too; its image is then classified by the model.
    """

    MODES = (("through", 10.0), ("through", 100.0), ("value", 10.0))

    def __init__(
        self, model: nn.Module, *, eps: float, norm: Norm = "Linf", steps: int = 100, seed: int = 0
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, steps=steps, seed=seed)
        if not has_router(model):
            raise ValueError(f"Softened needs a model with a router, got a {type(model).__name__}")

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"loss": "margin", "router": [list(mode) for mode in self.MODES]}

    def searches(self, x: Tensor) -> int:
        return len(self.MODES)

    def objective(self, number: int, x: Tensor, y: Tensor, largest_label: int) -> Objective:
        mode, temperature = self.MODES[number]
        soft = SoftRouter(self.model, temperature, straight_through=mode == "through")

        def loss(x_adv: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
            logits = soft(x_adv)
            broken = logits.argmax(1) != y[rows] if mode == "through" else None
            return -margin(logits, y[rows]), broken

        return loss


class SoftRouter(nn.Module):
    """A model with a router at a higher temperature; see :class:`Softened`."""

    def __init__(self, model: nn.Module, temperature: float, *, straight_through: bool) -> None:
        super().__init__()
        self.model, self.temperature, self.straight_through = model, temperature, straight_through
        self.router = next(iter(routers(model)), None)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → logits [B, K]."""
        signals: list[Tensor] = []
        thread = threading.get_ident()

        def record(module: nn.Module, args: object, output: Tensor) -> None:
            if threading.get_ident() == thread:  # another thread may attack the same model
                signals.append(output)

        heads = getattr(self.router, "signal_heads", None)
        handle = heads.register_forward_hook(record) if isinstance(heads, nn.Module) else None
        try:
            routing = route(self.model, x)
        finally:
            if handle is not None:
                handle.remove()
        return at_least_float32(with_routing(self.model, x, self.soften(routing, signals)))

    def soften(self, routing: Any, signals: list[Tensor]) -> Any:
        """``routing`` with soft p and ω. ``signals``: the output of the signal heads; empty without them."""
        p_clean, scales = routing.p_clean, routing.filter_scales
        if routing.type_logits is not None:
            p_clean = self._mixed(p_clean, (routing.type_logits.float() / self.temperature).softmax(1)[:, 1])
        if signals and scales:
            beta = float(self.router.beta)  # type: ignore[union-attr, arg-type]
            soft = ((signals[0].float() / self.temperature).tanh() + 1).clamp(min=1e-6).pow(beta)
            widths = [scale.shape[1] for scale in scales]
            scales = [self._mixed(*pair) for pair in zip(scales, soft.split(widths, 1), strict=True)]
        return replace(routing, p_clean=p_clean, filter_scales=scales)

    def _mixed(self, value: Tensor, soft: Tensor) -> Tensor:
        return soft + (value - soft).detach() if self.straight_through else soft


class AdaptivePaper(PGD):
    """The paper's adaptive attack: ``pgd_trades`` on cross-entropy plus the joint loss of Eq. 22.

    The attack maximizes CE(S(x'), y) + L_type(x') + w_adv·τ²·KL(T_adv^τ(x') ‖ S^τ(x')). L_nat does not depend
    on x'. L_type is the type head's cross-entropy with x' labeled adversarial; it is left out for models
    without a type head. The paper does not give w_adv; the default is ½, MTARD's initial value.

    Args:
        teacher: T_adv, the robust teacher; gradients flow through it too.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        step_size: float,
        teacher: nn.Module,
        steps: int = 20,
        temperature: float = 1.0,
        adv_weight: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model, eps=eps, norm=norm, step_size=step_size, steps=steps, loss=self.joint_loss, seed=seed
        )
        check_model(teacher)
        self.teacher, self.temperature, self.adv_weight = teacher, temperature, adv_weight

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {
            "loss": "CE + joint loss of Eq. 22",
            "teacher": model_fingerprint(self.teacher),
            "temperature": self.temperature,
            "adv_weight": self.adv_weight,
        }

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        with frozen(self.teacher):
            return super().perturb(x, y, index, largest_label)

    def joint_loss(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        logits, routing = _logits_and_routing(model, x_adv) if has_router(model) else (model(x_adv), None)
        loss = F.cross_entropy(logits, y, reduction="none")
        if routing is not None and routing.type_logits is not None:
            loss = loss + F.cross_entropy(routing.type_logits, torch.zeros_like(y), reduction="none")
        tau = self.temperature
        target = F.log_softmax(self.teacher(x_adv.to(x.dtype)) / tau, dim=1)
        student = F.log_softmax(logits / tau, dim=1)
        divergence = (target.exp() * (target - student)).sum(1)
        return loss + self.adv_weight * tau**2 * divergence


class DeepSloth(PGD):
    """DeepSloth (Hong et al. 2021): moves every exit toward the uniform distribution.

    Minimizes Σ CE(uniform, softmax(exit)) over the exits: those of ``model.exits(x)`` if there is such a
    method, else the final logits, and with a router its type logits.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        step_size: float,
        steps: int = 30,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            eps=eps,
            norm=norm,
            step_size=step_size,
            steps=steps,
            loss=_uniform_exits,
            random_start=None,
            seed=seed,
        )

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"loss": "-CE(uniform, exits)"}


def _uniform_exits(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
    exits: list[Tensor]
    if has_exits(model):
        exits = list(model.exits(x_adv))  # type: ignore[operator]
    elif has_router(model):
        logits, routing = _logits_and_routing(model, x_adv)
        exits = [logits]
        exits += [] if routing.type_logits is None else [routing.type_logits]
    else:
        exits = [model(x_adv)]
    return sum((F.log_softmax(e.float(), dim=1).mean(1) for e in exits), torch.zeros(len(x), device=x.device))

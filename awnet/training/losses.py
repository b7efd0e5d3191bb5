"""The losses of joint training, all with one signature.

    loss(model, batch, attack, options, teachers=None, weights=None) -> LossResult

``model`` is in training mode. A dynamic model (an AW-Net, or a module that holds one) takes every sample
through the branch of its kind and adds the type loss of its router; a static model makes the same pass
without both.
``attack(x, y, index=index)`` makes the adversarial images; it runs the model in test mode and restores it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet.nn import Routing, Steering, has_router, observe

Attack = Callable[..., Tensor]
# averages tensors over the ranks of a distributed run, in place, weighted by each rank's number of images
Averaging = Callable[[Sequence[Tensor], int], None]


class Batch(Protocol):
    """What a loss reads of a batch: ``x`` [B, C, H, W] in [0, 1], ``y`` int64 [B], ``index`` int64 [B]."""

    @property
    def x(self) -> Tensor: ...
    @property
    def y(self) -> Tensor: ...
    @property
    def index(self) -> Tensor: ...


@dataclass(frozen=True)
class LossOptions:
    """The settings that the losses share.

    type_weight: factor of the router's type loss; 0 leaves it out.
    type_label_smoothing: in [0, 1).
    adv_weight: ``pgd_at``: w of (1 − w) CE(clean) + w CE(adversarial), ½ if None. ``trades``: the factor of
        the KL term, 6 if None. ``mtard``: None adapts both weights, a number in [0, 1] fixes
        w_adv = 1 − w_nat.
    consistency: factor of KL(p_nat ‖ p_adv), added to any loss that sees adversarial images.
    temperature: τ of the distillation, on both sides.
    kl_reduction: ``batchmean`` sums over the classes and takes the mean over the batch; ``elementmean``
        takes the mean over both, as MTARD's code does (smaller by the number of classes).
    label_smoothing: of the cross-entropy of ``standard``, in [0, 1).
    helper_weight: γ, the factor of the helper term in ``hat``.
    router_passes: ``joint`` routes clean and adversarial images in one batch; ``separate`` in two, whose
        plain batch norms then see one kind only, in training, and so may leak it.
    """

    type_weight: float = 1.0
    type_label_smoothing: float = 0.0
    adv_weight: float | None = None
    consistency: float = 0.0
    temperature: float = 1.0
    kl_reduction: Literal["batchmean", "elementmean"] = "batchmean"
    label_smoothing: float = 0.0
    helper_weight: float = 0.5
    router_passes: Literal["joint", "separate"] = "joint"


class LossResult(NamedTuple):
    """``total`` is 0-d with its graph; ``terms`` are 0-d and detached, on the model's device."""

    total: Tensor
    terms: dict[str, Tensor]


class Teachers(NamedTuple):
    """Models in eval mode that need no gradient; images [B, C, H, W] to logits [B, K].

    ``robust`` is None for a loss that asks the clean one only.
    """

    clean: nn.Module
    robust: nn.Module | None = None


class Loss(Protocol):
    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        attack: Attack,
        options: LossOptions,
        teachers: Teachers | None = None,
        weights: MTARDWeights | None = None,
    ) -> LossResult: ...


class MTARDWeights:
    """The two weights that MTARD (Zhao et al., ECCV 2022) adapts, on the device and never read by the host.

    With l̂ = L / L(first step), before each step's loss is summed:

        w_nat ← w_nat − η (w_nat − l̂_nat / (l̂_nat + l̂_adv)),   w_adv = 1 − w_nat,   both ½ at the start

    so that the side which has learnt less, relative to its start, weighs more. A side whose loss is zero so
    far has no scale yet: its l̂ is 1 until a positive loss comes, which then counts as its first.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        learning_rate: float = 0.025,
        average: Averaging | None = None,
    ) -> None:
        self.w_nat = torch.tensor(0.5, device=device)
        self.first = torch.zeros(2, device=device)  # the first losses: clean, adversarial
        self._average = average
        self.learning_rate = learning_rate  # η of the coming step: the loop lowers it at the milestones

    def update(self, nat: Tensor, adv: Tensor, images: int = 1) -> tuple[Tensor, Tensor]:
        """Takes this step's two losses (0-d), means over so many images; returns the new (w_nat, w_adv)."""
        loss = torch.stack([nat.detach(), adv.detach()]).to(self.first)
        if self._average is not None:
            self._average([loss], images)
        self.first.copy_(torch.where(self.first > 0, self.first, loss))
        known = self.first > 0
        relative = torch.where(known, loss / torch.where(known, self.first, 1.0), 1.0)
        total = relative.sum()
        goal = torch.where(total > 0, relative[0] / torch.where(total > 0, total, 1.0), 0.5)
        self.w_nat.copy_(self.w_nat - self.learning_rate * (self.w_nat - goal))
        return self.w_nat.clone(), 1 - self.w_nat

    def state_dict(self) -> dict[str, Tensor]:
        return {"w_nat": self.w_nat, "first": self.first}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.w_nat.copy_(state["w_nat"])
        self.first.copy_(state["first"])


def kl_divergence(
    target: Tensor, logits: Tensor, *, temperature: float = 1.0, reduction: str = "batchmean"
) -> Tensor:
    """KL(softmax(target / τ) ‖ softmax(logits / τ)) of two [B, K] logits, 0-d; gradients flow into both."""
    log_p = F.log_softmax(_wide(target) / temperature, dim=1)
    log_q = F.log_softmax(_wide(logits) / temperature, dim=1)
    divergence = log_p.exp() * (log_p - log_q)  # [B, K]
    if reduction == "batchmean":
        return divergence.sum(1).mean()
    if reduction == "elementmean":
        return divergence.mean()
    raise ValueError(f"kl_reduction must be 'batchmean' or 'elementmean', got {reduction!r}")


def _wide(logits: Tensor) -> Tensor:
    """float32 at least: a loss in 16 bits would lose its last digits, and under autocast may be there."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Pass(NamedTuple):
    clean: Tensor  # [B, K]
    adversarial: Tensor  # [B, K]
    type_logits: Tensor | None  # [2B, 2], clean images first; None for a static model
    is_clean: Tensor  # bool [2B]
    helper: Tensor | None = None  # [B, K]


def is_dynamic(model: nn.Module) -> bool:
    """Whether the model routes its samples (an AW-Net, or a module with one inside), by kind in training."""
    return has_router(model)


def _joint_pass(
    model: nn.Module,
    clean: Tensor,
    adversarial: Tensor,
    options: LossOptions,
    helper: Tensor | None = None,
) -> _Pass:
    """One training-mode forward over [clean; adversarial; helper], each sample through its kind's branch.

    The helper images, if any, are perturbed ones and take the adversarial branch; the type loss leaves them
    out.
    """
    size = len(clean)
    perturbed = adversarial if helper is None else torch.cat([adversarial, helper])
    x = torch.cat([clean, perturbed])
    is_clean = torch.arange(len(x), device=x.device) < size
    type_logits = None
    if not is_dynamic(model):
        logits = model(x)
    else:
        separate = options.router_passes == "separate"
        logits, routing = _routed_pass(model, x, is_clean, size if separate else None)
        if routing.type_logits is not None:
            type_logits = routing.type_logits[: 2 * size]
    parts = _wide(logits).split(size)
    return _Pass(parts[0], parts[1], type_logits, is_clean[: 2 * size], None if helper is None else parts[2])


def _routed_pass(
    model: nn.Module, x: Tensor, is_clean: Tensor, split: int | None = None
) -> tuple[Tensor, Routing]:
    """Logits and routing of one pass by kind; with ``split`` the router sees ``x[:split]`` by itself."""

    def in_two(network: Any, images: Tensor) -> Routing:
        one, two = network.route(images[:split]), network.route(images[split:])
        return Routing(
            type_logits=_cat(one.type_logits, two.type_logits),
            p_clean=torch.cat([one.p_clean, two.p_clean]),
            filter_scales=[
                torch.cat(pair) for pair in zip(one.filter_scales, two.filter_scales, strict=True)
            ],
        )

    steering = Steering(route=None if split is None else in_two, is_clean=is_clean)
    logits = observe(model, x, steering)
    if len(steering.routings) != 1:
        raise ValueError(
            f"{type(model).__name__} calls the routed network in it {len(steering.routings)} times for one "
            "batch; training needs exactly one call, on the whole batch"
        )
    return logits, steering.routings[0]


def _cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat([a, b])


def _result(terms: dict[str, Tensor], weighted: Tensor, outputs: _Pass, options: LossOptions) -> LossResult:
    """Adds what every loss shares: L_type, the mean over all samples of CE(type logits, y'), y' = 1 for clean
    (the type logits' order is [adversarial, clean]), and the consistency term."""
    total = weighted
    if outputs.type_logits is not None:
        kind = outputs.is_clean.long()
        terms["type"] = F.cross_entropy(
            _wide(outputs.type_logits), kind, label_smoothing=options.type_label_smoothing
        )
        terms["type_accuracy"] = (outputs.type_logits.detach().argmax(1) == kind).float().mean()
        if options.type_weight:
            total = total + options.type_weight * terms["type"]
    if options.consistency:
        terms["consistency"] = kl_divergence(outputs.clean, outputs.adversarial)
        total = total + options.consistency * terms["consistency"]
    terms = {"total": total, **terms}
    return LossResult(total, {name: term.detach() for name, term in terms.items()})


def standard(
    model: nn.Module,
    batch: Batch,
    attack: Attack,
    options: LossOptions,
    teachers: Teachers | None = None,
    weights: MTARDWeights | None = None,
) -> LossResult:
    """Plain training, L = CE(S(x), y), without adversarial images; labels may be smoothed.

    A dynamic model learns its clean branch only; its type loss teaches it to call every image clean.
    """
    x, y = batch.x, batch.y
    is_clean = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if is_dynamic(model):
        logits, routing = _routed_pass(model, x, is_clean)
        type_logits = routing.type_logits
    else:
        logits, type_logits = model(x), None
    logits = _wide(logits)
    nat = F.cross_entropy(logits, y, label_smoothing=options.label_smoothing)
    outputs = _Pass(logits, logits, type_logits, is_clean)
    return _result({"nat": nat}, nat, outputs, replace(options, consistency=0.0))


def pgd_at(
    model: nn.Module,
    batch: Batch,
    attack: Attack,
    options: LossOptions,
    teachers: Teachers | None = None,
    weights: MTARDWeights | None = None,
) -> LossResult:
    """Adversarial training (Madry et al., ICLR 2018) on both kinds of image:

    L = ½ CE(S(x_nat), y) + ½ CE(S(x_adv), y) + L_type
    """
    x_adv = attack(batch.x, batch.y, index=batch.index)
    outputs = _joint_pass(model, batch.x, x_adv, options)
    nat = F.cross_entropy(outputs.clean, batch.y)
    adv = F.cross_entropy(outputs.adversarial, batch.y)
    w_adv = 0.5 if options.adv_weight is None else options.adv_weight
    return _result({"nat": nat, "adv": adv}, (1 - w_adv) * nat + w_adv * adv, outputs, options)


def trades(
    model: nn.Module,
    batch: Batch,
    attack: Attack,
    options: LossOptions,
    teachers: Teachers | None = None,
    weights: MTARDWeights | None = None,
) -> LossResult:
    """TRADES (Zhang et al., ICML 2019): L = CE(S(x_nat), y) + 6 KL(p_nat ‖ p_adv) + L_type.

    Its attack maximises the same KL. p_nat is not detached: the gradient flows into both sides.
    """
    x_adv = attack(batch.x, batch.y, index=batch.index)
    outputs = _joint_pass(model, batch.x, x_adv, options)
    nat = F.cross_entropy(outputs.clean, batch.y)
    adv = kl_divergence(outputs.clean, outputs.adversarial)
    factor = 6.0 if options.adv_weight is None else options.adv_weight
    return _result({"nat": nat, "adv": adv}, nat + factor * adv, outputs, options)


def mtard(
    model: nn.Module,
    batch: Batch,
    attack: Attack,
    options: LossOptions,
    teachers: Teachers | None = None,
    weights: MTARDWeights | None = None,
) -> LossResult:
    """Distillation from a clean and a robust teacher (MTARD), Equations 20–22 of the paper:

        L_adv = τ² KL(T_adv^τ(x_adv) ‖ S^τ(x_adv))                     (20)
        L_nat = τ² KL(T_nat^τ(x_nat) ‖ S^τ(x_nat))                     (21)
        L     = L_type + w_adv L_adv + w_nat L_nat                     (22)

    S^τ and T^τ are softmax(logits / τ); the weights are ``MTARDWeights``, or fixed by ``options.adv_weight``.
    """
    if teachers is None or teachers.robust is None:
        raise ValueError("mtard needs teachers: pass Teachers(clean=..., robust=...)")
    if weights is None and options.adv_weight is None:
        raise ValueError("mtard adapts its weights: pass weights=MTARDWeights(device), or fix adv_weight")
    x_nat, tau = batch.x, options.temperature
    x_adv = attack(x_nat, batch.y, index=batch.index)
    with torch.no_grad():
        goal_nat, goal_adv = teachers.clean(x_nat), teachers.robust(x_adv)  # [B, K] each
    outputs = _joint_pass(model, x_nat, x_adv, options)
    reduction = options.kl_reduction
    nat = tau**2 * kl_divergence(goal_nat, outputs.clean, temperature=tau, reduction=reduction)
    adv = tau**2 * kl_divergence(goal_adv, outputs.adversarial, temperature=tau, reduction=reduction)
    if options.adv_weight is not None:
        w_adv = torch.full_like(nat, options.adv_weight, requires_grad=False)
        w_nat = 1 - w_adv
    else:
        assert weights is not None
        w_nat, w_adv = weights.update(nat, adv, len(x_nat))
    return _result({"nat": nat, "adv": adv, "w_nat": w_nat}, w_nat * nat + w_adv * adv, outputs, options)


def hat(
    model: nn.Module,
    batch: Batch,
    attack: Attack,
    options: LossOptions,
    teachers: Teachers | None = None,
    weights: MTARDWeights | None = None,
) -> LossResult:
    """Helper-based adversarial training (Rade and Moosavi-Dezfooli, ICLR 2022): TRADES and helper images.

        L = CE(S(x), y) + 2.5 KL(p_nat ‖ p_adv) + ½ CE(S(x_help), y_help) + L_type
        x_help = x + 2 (x_adv − x),   y_help = argmax T_nat(x_adv)

    x_help lies outside the ball, and is not clipped to [0, 1]; its label is what a plainly trained network
    takes x_adv for, so that the margin grows no further than that network's.
    """
    if teachers is None:
        raise ValueError("hat needs a clean teacher: pass Teachers(clean=...)")
    x = batch.x
    x_adv = attack(x, batch.y, index=batch.index)
    with torch.no_grad():
        y_help = teachers.clean(x_adv).argmax(1)
    outputs = _joint_pass(model, x, x_adv, options, helper=x + 2 * (x_adv - x))
    assert outputs.helper is not None
    nat = F.cross_entropy(outputs.clean, batch.y)
    adv = kl_divergence(outputs.clean, outputs.adversarial)
    helper = F.cross_entropy(outputs.helper, y_help)
    factor = 2.5 if options.adv_weight is None else options.adv_weight
    total = nat + factor * adv + options.helper_weight * helper
    return _result({"nat": nat, "adv": adv, "helper": helper}, total, outputs, options)

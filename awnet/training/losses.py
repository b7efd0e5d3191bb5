"""The losses of the recipes: functions of a model's outputs and the labels.

    loss(outputs, y, options) -> LossResult

``awnet.training.forward`` computes the outputs. Only ``mtard`` has state: it also takes the ``weights`` that
it updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from awnet.precision import at_least_float32

#: ``average(tensors, count)`` replaces tensors by their means over ranks, weighted by numbers of images
Averaging = Callable[[Sequence[Tensor], int], None]


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The settings that the losses share.

    type_weight: factor of the router's type loss; 0 omits it.
    type_label_smoothing: in [0, 1).
    adv_weight: ``pgd_at``: w of (1 − w) CE(clean) + w CE(adversarial), ½ if None. ``trades``: the factor of
        the KL term, 6 if None. ``mart`` and ``gat``: λ, 5 and 10 if None. ``mtard``: None adapts both
        weights, a number in [0, 1] fixes w_adv = 1 − w_nat.
    consistency: factor of KL(p_nat ‖ p_adv), added to every loss with adversarial images.
    temperature: τ of the distillation, for teacher and student.
    kl_reduction: ``batchmean`` sums over the classes and averages over the batch; ``elementmean`` averages
        over both, as the MTARD code does (smaller by the number of classes).
    label_smoothing: share of the label that is spread over all classes, in [0, 1), in every cross-entropy
        with labels, of clean and of adversarial images.
    divergence: the term of TRADES: ``kl``, or ``dkl``, see :func:`decoupled_kl`.
    dkl_alpha, dkl_beta: factors of the weighted squared error and of the cross-entropy of ``dkl``.
    dkl_symmetric: whether its squared error has a gradient for the adversarial logits too.
    helper_weight: γ, the factor of the helper term in ``hat``.
    router_passes: ``joint`` routes clean and adversarial images in one batch; ``separate`` in two. Then the
        plain batch norms of the router see one kind of image at a time in training and may leak it.
    """

    type_weight: float = 1.0
    type_label_smoothing: float = 0.0
    adv_weight: float | None = None
    consistency: float = 0.0
    temperature: float = 1.0
    kl_reduction: Literal["batchmean", "elementmean"] = "batchmean"
    label_smoothing: float = 0.0
    divergence: Literal["kl", "dkl"] = "kl"
    dkl_alpha: float = 1.0
    dkl_beta: float = 1.0
    dkl_symmetric: bool = False
    helper_weight: float = 0.5
    router_passes: Literal["joint", "separate"] = "joint"


class LossResult(NamedTuple):
    """``total`` is 0-d with its graph; ``terms`` are 0-d and detached, on the model's device."""

    total: Tensor
    terms: dict[str, Tensor]


class Outputs(NamedTuple):
    """The outputs of a model, and of its teachers, for the clean and the adversarial images of a batch.

    clean, adversarial: logits [B, K], float32 or wider.
    is_clean: bool, which of the images in ``type_logits`` are clean.
    type_logits: [2B, 2], clean images first, in the order [adversarial, clean]; None for a static model.
    helper: logits [B, K] of the helper images of HAT.
    helper_labels: int64 [B], the labels of these images.
    teacher_clean: the clean teacher's logits [B, K] of the clean images.
    teacher_adversarial: the robust teacher's logits [B, K] of the adversarial images.
    """

    clean: Tensor
    adversarial: Tensor
    is_clean: Tensor
    type_logits: Tensor | None = None
    helper: Tensor | None = None
    helper_labels: Tensor | None = None
    teacher_clean: Tensor | None = None
    teacher_adversarial: Tensor | None = None


#: loss(outputs, y, options): ``outputs`` are those of the forward pass that belongs to the loss; ``y`` are
#: labels int64 [B], or shares [B, K] of mixed ones. ``mtard`` also takes its weights.
Loss = Callable[..., LossResult]


class _Adapted:
    """Numbers on the device that a loss updates at each step; the host never reads them.

    ``learning_rate`` may be changed between steps, and is read on the device, by a CUDA graph too.
    """

    def __init__(
        self, device: torch.device | str | None, learning_rate: float, average: Averaging | None
    ) -> None:
        self._average = average
        self._rate = torch.zeros((), device=device)
        self.learning_rate = learning_rate

    @property
    def learning_rate(self) -> float:
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate = value
        self._rate.fill_(value)


class TeacherTemperatures(_Adapted):
    """The two teachers' temperatures of B-MTARD (Zhao et al., TPAMI 2024), which balance their entropies.

    With the mean entropies H of the tempered teachers' probabilities in a step, after its losses:

        τ_nat ← τ_nat − r sign(H_nat − H_adv),   τ_adv ← τ_adv − r sign(H_adv − H_nat)

    both clamped to [1, 10] (or to the start, if it is outside), so that the teacher with the larger entropy
    becomes sharper and the other one softer.

    Args:
        device: where the temperatures are stored.
        start: both temperatures before the first step.
        learning_rate: r.
        average: averages the entropies over the ranks of a distributed run.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        start: float = 1.0,
        learning_rate: float = 0.001,
        average: Averaging | None = None,
    ) -> None:
        super().__init__(device, learning_rate, average)
        self.values = torch.full((2,), float(start), device=device)  # of the clean and the robust teacher
        self._bounds = min(1.0, start), max(10.0, start)

    @torch.no_grad()
    def update(self, clean: Tensor, adversarial: Tensor, images: int = 1) -> None:
        """Updates the temperatures by the teachers' logits [B, K] of a step with ``images`` images."""
        logits = (clean, adversarial)
        entropies = [_entropy(one, tau) for one, tau in zip(logits, self.values, strict=True)]
        entropy = torch.stack(entropies).to(self.values)
        if self._average is not None:
            self._average([entropy], images)
        step = self._rate * torch.sign(entropy - entropy.flip(0))
        self.values.copy_((self.values - step).clamp(*self._bounds))


def _entropy(logits: Tensor, temperature: Tensor) -> Tensor:
    """The mean entropy of softmax(logits / τ), 0-d."""
    log_p = F.log_softmax(at_least_float32(logits) / temperature, dim=1)
    return -(log_p.exp() * log_p).sum(1).mean()


class MTARDWeights(_Adapted):
    """The two adaptive weights of MTARD (Zhao et al., ECCV 2022), on the device; the host never reads them.

    With l̂ = L / L(first step), before the losses of a step are added:

        w_nat ← w_nat − η (w_nat − l̂_nat / (l̂_nat + l̂_adv)),   w_adv = 1 − w_nat,   both ½ at the start

    So the loss that has decreased less, relative to its first value, has the larger weight. While a loss has
    always been zero its l̂ is 1; its first positive value counts as its first.

    Args:
        device: where the weights are stored.
        learning_rate: η.
        average: averages the losses over the ranks of a distributed run.
        temperatures: of the teachers, if they are adapted too; part of the state.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        learning_rate: float = 0.025,
        average: Averaging | None = None,
        temperatures: TeacherTemperatures | None = None,
    ) -> None:
        super().__init__(device, learning_rate, average)
        self.w_nat = torch.tensor(0.5, device=device)
        self.first = torch.zeros(2, device=device)  # of clean and adversarial images
        self.temperatures = temperatures

    def update(self, nat: Tensor, adv: Tensor, images: int = 1) -> tuple[Tensor, Tensor]:
        """Updates the weights by the losses of a step and returns them.

        Args:
            nat, adv: 0-d, means over ``images`` images.

        Returns:
            w_nat and w_adv, 0-d.
        """
        loss = torch.stack([nat.detach(), adv.detach()]).to(self.first)
        if self._average is not None:
            self._average([loss], images)
        self.first.copy_(torch.where(self.first > 0, self.first, loss))
        known = self.first > 0
        relative = torch.where(known, loss / torch.where(known, self.first, 1.0), 1.0)
        total = relative.sum()
        goal = torch.where(total > 0, relative[0] / torch.where(total > 0, total, 1.0), 0.5)
        self.w_nat.copy_(self.w_nat - self._rate * (self.w_nat - goal))
        return self.w_nat.clone(), 1 - self.w_nat

    def state_dict(self) -> dict[str, Tensor]:
        adapted = {} if self.temperatures is None else {"temperatures": self.temperatures.values}
        return {"w_nat": self.w_nat, "first": self.first, **adapted}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.w_nat.copy_(state["w_nat"])
        self.first.copy_(state["first"])
        if self.temperatures is not None:
            self.temperatures.values.copy_(state["temperatures"])


def kl_divergence(
    target: Tensor,
    logits: Tensor,
    *,
    temperature: float = 1.0,
    target_temperature: float | Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(softmax(target / τ) ‖ softmax(logits / τ)) of two [B, K] logits, 0-d; gradients flow into both.

    ``target_temperature`` is the target's τ if it is another one, a number or 0-d.
    """
    target_temperature = temperature if target_temperature is None else target_temperature
    log_p = F.log_softmax(at_least_float32(target) / target_temperature, dim=1)
    log_q = F.log_softmax(at_least_float32(logits) / temperature, dim=1)
    divergence = log_p.exp() * (log_p - log_q)  # [B, K]
    if reduction == "batchmean":
        return divergence.sum(1).mean()
    if reduction == "elementmean":
        return divergence.mean()
    raise ValueError(f"kl_reduction must be 'batchmean' or 'elementmean', got {reduction!r}")


def cross_entropy(logits: Tensor, y: Tensor, options: LossOptions) -> Tensor:
    """Mean cross-entropy of logits [B, K] with labels, smoothed by ``options.label_smoothing``; 0-d.

    ``y`` is int64 [B], or [B, K] with the shares of mixed labels.
    """
    if y.is_floating_point():
        y = y.to(logits.dtype)
    return F.cross_entropy(logits, y, label_smoothing=options.label_smoothing)


def divergence(clean: Tensor, adversarial: Tensor, options: LossOptions) -> Tensor:
    """KL(p_nat ‖ p_adv) of two [B, K] logits, 0-d, or its decoupled form, by ``options.divergence``."""
    if options.divergence == "kl":
        return kl_divergence(clean, adversarial)
    return decoupled_kl(
        clean, adversarial, alpha=options.dkl_alpha, beta=options.dkl_beta, symmetric=options.dkl_symmetric
    )


def decoupled_kl(
    target: Tensor, logits: Tensor, *, alpha: float = 1.0, beta: float = 1.0, symmetric: bool = False
) -> Tensor:
    """The decoupled Kullback–Leibler divergence (Cui et al., NeurIPS 2024) of two [B, K] logits m and n, 0-d:

        α/4 Σ_jk s_j s_k ((m_j − m_k) − (n_j − n_k))² − β Σ_j s_j log softmax(n)_j,   s = softmax(m)

    averaged over the batch. The weights s have no gradient; neither has n in the first term, unless
    ``symmetric`` (the first improvement of their IKL). With α = β = 1 and without ``symmetric`` both
    gradients are those of KL(softmax(m) ‖ softmax(n)); the value differs.
    """
    m, n = at_least_float32(target), at_least_float32(logits)
    s = F.softmax(m, dim=1).detach()
    difference = m - (n if symmetric else n.detach())
    centered = difference - (s * difference).sum(1, keepdim=True)
    squares = 0.5 * alpha * (s * centered.square()).sum(1)  # Σ_jk s_j s_k (d_j − d_k)² = 2 Σ_j s_j (d_j − d̄)²
    soft_labels = -beta * (s * F.log_softmax(n, dim=1)).sum(1)
    return (squares + soft_labels).mean()


def loss_result(total: Tensor, terms: dict[str, Tensor]) -> LossResult:
    """``total`` and the detached ``terms``, with the total first."""
    return LossResult(total, {name: term.detach() for name, term in ({"total": total} | terms).items()})


def _with_shared_terms(
    terms: dict[str, Tensor], weighted: Tensor, outputs: Outputs, options: LossOptions
) -> LossResult:
    """Adds L_type and the consistency term to the weighted sum of the other terms.

    L_type is the mean over all images of CE(type logits, y'), with y' = 1 for clean images.
    """
    total = weighted
    if outputs.type_logits is not None:
        kind = outputs.is_clean.long()
        terms["type"] = F.cross_entropy(
            at_least_float32(outputs.type_logits), kind, label_smoothing=options.type_label_smoothing
        )
        terms["type_accuracy"] = (outputs.type_logits.detach().argmax(1) == kind).float().mean()
        if options.type_weight:
            total = total + options.type_weight * terms["type"]
    if options.consistency:
        terms["consistency"] = kl_divergence(outputs.clean, outputs.adversarial)
        total = total + options.consistency * terms["consistency"]
    return loss_result(total, terms)


def standard(outputs: Outputs, y: Tensor, options: LossOptions) -> LossResult:
    """Plain training, L = CE(S(x), y), without adversarial images; labels may be smoothed.

    A dynamic model trains only its clean branch; its type loss trains it to call every image clean.
    """
    nat = cross_entropy(outputs.clean, y, options)
    return _with_shared_terms({"nat": nat}, nat, outputs, replace(options, consistency=0.0))


def pgd_at(outputs: Outputs, y: Tensor, options: LossOptions) -> LossResult:
    """Adversarial training (Madry et al., ICLR 2018) on clean and adversarial images:

    L = ½ CE(S(x_nat), y) + ½ CE(S(x_adv), y) + L_type
    """
    nat, adv = (cross_entropy(logits, y, options) for logits in (outputs.clean, outputs.adversarial))
    w_adv = 0.5 if options.adv_weight is None else options.adv_weight
    return _with_shared_terms({"nat": nat, "adv": adv}, (1 - w_adv) * nat + w_adv * adv, outputs, options)


def trades(outputs: Outputs, y: Tensor, options: LossOptions) -> LossResult:
    """TRADES (Zhang et al., ICML 2019): L = CE(S(x_nat), y) + 6 KL(p_nat ‖ p_adv) + L_type.

    Its attack maximizes the same KL. p_nat is not detached: the gradient flows through both sides.
    """
    nat = cross_entropy(outputs.clean, y, options)
    adv = divergence(outputs.clean, outputs.adversarial, options)
    factor = 6.0 if options.adv_weight is None else options.adv_weight
    return _with_shared_terms({"nat": nat, "adv": adv}, nat + factor * adv, outputs, options)


def mtard(
    outputs: Outputs, y: Tensor, options: LossOptions, weights: MTARDWeights | None = None
) -> LossResult:
    """Distillation from a clean and a robust teacher (MTARD), Equations 20–22 of the paper:

        L_adv = τ² KL(T_adv^τ(x_adv) ‖ S^τ(x_adv))                     (20)
        L_nat = τ² KL(T_nat^τ(x_nat) ‖ S^τ(x_nat))                     (21)
        L     = L_type + w_adv L_adv + w_nat L_nat                     (22)

    S^τ and T^τ are softmax(logits / τ). The weights are ``weights``, which are updated first, or fixed by
    ``options.adv_weight``. B-MTARD's ``weights.temperatures`` replace the teachers' τ and are updated last.
    """
    if weights is None and options.adv_weight is None:
        raise ValueError("mtard adapts its weights: pass weights=MTARDWeights(device), or fix adv_weight")
    assert outputs.teacher_clean is not None
    assert outputs.teacher_adversarial is not None
    tau, reduction = options.temperature, options.kl_reduction
    temperatures = None if weights is None else weights.temperatures
    tau_nat, tau_adv = (None, None) if temperatures is None else temperatures.values.clone().unbind()

    def distilled(teacher: Tensor, student: Tensor, teacher_tau: Tensor | None) -> Tensor:
        return tau**2 * kl_divergence(
            teacher, student, temperature=tau, target_temperature=teacher_tau, reduction=reduction
        )

    nat = distilled(outputs.teacher_clean, outputs.clean, tau_nat)
    adv = distilled(outputs.teacher_adversarial, outputs.adversarial, tau_adv)
    if options.adv_weight is not None:
        w_adv = torch.full_like(nat, options.adv_weight, requires_grad=False)
        w_nat = 1 - w_adv
    else:
        assert weights is not None
        w_nat, w_adv = weights.update(nat, adv, len(y))
    terms = {"nat": nat, "adv": adv, "w_nat": w_nat}
    if temperatures is not None:
        assert tau_nat is not None
        assert tau_adv is not None
        terms |= {"tau_nat": tau_nat, "tau_adv": tau_adv}
        temperatures.update(outputs.teacher_clean, outputs.teacher_adversarial, len(y))
    return _with_shared_terms(terms, w_nat * nat + w_adv * adv, outputs, options)


def hat(outputs: Outputs, y: Tensor, options: LossOptions) -> LossResult:
    """Helper-based adversarial training (Rade and Moosavi-Dezfooli, ICLR 2022): TRADES and helper images.

        L = CE(S(x), y) + 2.5 KL(p_nat ‖ p_adv) + ½ CE(S(x_help), y_help) + L_type
        x_help = x + 2 (x_adv − x),   y_help = argmax T_nat(x_adv)

    x_help is outside the ball and is not clipped to [0, 1]. Its label is the class that a plainly trained
    network assigns to x_adv, so that the margin does not grow beyond that network's.
    """
    assert outputs.helper is not None
    assert outputs.helper_labels is not None
    nat = cross_entropy(outputs.clean, y, options)
    adv = divergence(outputs.clean, outputs.adversarial, options)
    helper = cross_entropy(outputs.helper, outputs.helper_labels, options)
    factor = 2.5 if options.adv_weight is None else options.adv_weight
    total = nat + factor * adv + options.helper_weight * helper
    return _with_shared_terms({"nat": nat, "adv": adv, "helper": helper}, total, outputs, options)


def mart(outputs: Outputs, y: Tensor, options: LossOptions) -> LossResult:
    """MART (Wang et al., ICLR 2020), which weights the images that the model misclassifies:

        L   = BCE(p_adv, y) + 5 mean[(1 − p_nat,y) KL(p_nat ‖ p_adv)] + L_type
        BCE = −log p_adv,y − log(1 − max_{k≠y} p_adv,k)

    Its attack maximizes the cross-entropy. Clean images enter by the second term only.
    """
    label = y[:, None]
    log_nat, log_adv = (F.log_softmax(logits, dim=1) for logits in (outputs.clean, outputs.adversarial))
    rival = log_adv.detach().scatter(1, label, -torch.inf).argmax(1, keepdim=True)
    without_rival = log_adv.scatter(1, rival, -torch.inf).logsumexp(1)  # log(1 − p_rival), exact near p = 1
    adv = cross_entropy(outputs.adversarial, y, options) - without_rival.mean()
    p_nat = log_nat.exp()
    missed = 1 - p_nat.gather(1, label).squeeze(1)
    weighted = (missed * (p_nat * (log_nat - log_adv)).sum(1)).mean()
    factor = 5.0 if options.adv_weight is None else options.adv_weight
    return _with_shared_terms(
        {"adv": adv, "misclassified": weighted}, adv + factor * weighted, outputs, options
    )


def gat(outputs: Outputs, y: Tensor, options: LossOptions) -> LossResult:
    """Guided adversarial training (Sriramanan et al., NeurIPS 2020), for attacks of a single step:

        L = CE(S(x_nat), y) + 10 mean ‖p_nat − p_adv‖² + L_type

    Its attack maximizes CE + 10 ‖p_nat − p_adv‖².
    """
    nat = cross_entropy(outputs.clean, y, options)
    difference = F.softmax(outputs.clean, dim=1) - F.softmax(outputs.adversarial, dim=1)
    adv = difference.square().sum(1).mean()
    factor = 10.0 if options.adv_weight is None else options.adv_weight
    return _with_shared_terms({"nat": nat, "adv": adv}, nat + factor * adv, outputs, options)

"""Losses of modern recipes against their equations, written out literally in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from awnet.training import (
    GAT,
    HAT,
    MART,
    MTARD,
    PGDAT,
    LossOptions,
    MTARDWeights,
    Outputs,
    Standard,
    Trades,
    recipe_for,
)
from awnet.training.losses import (
    TeacherTemperatures,
    decoupled_kl,
    gat,
    hat,
    kl_divergence,
    mart,
    mtard,
    pgd_at,
    trades,
)

B, K = 7, 5
EXACT = {"rtol": 1e-11, "atol": 1e-13}  # float64, another order of sums

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def leaves(scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Clean and adversarial logits in float64 that require gradients."""
    clean, adversarial = (scale * torch.randn(B, K, dtype=torch.float64) for _ in range(2))
    return clean.requires_grad_(), adversarial.requires_grad_()


def outputs(clean: Tensor, adversarial: Tensor, **more: Any) -> Outputs:
    return Outputs(clean, adversarial, torch.arange(2 * B) < B, **more)


LABELS = torch.arange(B) % K


def assert_same_loss(actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Value and gradients."""
    torch.testing.assert_close(actual, expected, **EXACT)
    ours, theirs = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (actual, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("factor", [None, 2.0])
def test_mart_is_its_equation(factor: float | None) -> None:
    clean, adversarial = leaves()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(B):  # Wang et al., Equations 9 to 11
        y = int(LABELS[i])
        p, p_adv = clean[i].softmax(0), adversarial[i].softmax(0)
        others = [p_adv[k] for k in range(K) if k != y]
        bce = -torch.log(p_adv[y]) - torch.log(1 - torch.stack(others).max())
        kl = (p * torch.log(p / p_adv)).sum()
        total = total + (bce + (5.0 if factor is None else factor) * kl * (1 - p[y])) / B
    actual = mart(outputs(clean, adversarial), LABELS, LossOptions(adv_weight=factor))
    assert_same_loss(actual.total, total, (clean, adversarial))


def test_mart_is_finite_where_the_wrong_class_is_certain() -> None:
    adversarial = torch.zeros(B, K)
    adversarial[torch.arange(B), (LABELS + 1) % K] = 200.0  # p of the wrong class rounds to 1
    adversarial.requires_grad_()
    loss = mart(outputs(torch.zeros(B, K), adversarial), LABELS, LossOptions()).total
    loss.backward()
    assert loss.isfinite()
    assert adversarial.grad is not None
    assert adversarial.grad.isfinite().all()


def test_gat_is_its_equation() -> None:
    clean, adversarial = leaves()
    distance = ((clean.softmax(1) - adversarial.softmax(1)) ** 2).sum(1).mean()
    expected = F.cross_entropy(clean, LABELS) + 10 * distance
    assert_same_loss(
        gat(outputs(clean, adversarial), LABELS, LossOptions()).total, expected, (clean, adversarial)
    )


def literal_dkl(m: Tensor, n: Tensor, alpha: float, beta: float, symmetric: bool) -> Tensor:
    """Cui et al., Equation 5, pair by pair of classes."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        s = m[i].softmax(0).detach()
        target = n[i] if symmetric else n[i].detach()
        for j in range(K):
            for k in range(K):
                squared = ((m[i, j] - m[i, k]) - (target[j] - target[k])) ** 2
                total = total + alpha / 4 * s[j] * s[k] * squared
        total = total - beta * (s * n[i].log_softmax(0)).sum()
    return total / B


@pytest.mark.parametrize(("alpha", "beta", "symmetric"), [(1, 1, False), (4, 0.5, False), (0.3, 2, True)])
def test_decoupled_kl_is_its_equation(alpha: float, beta: float, symmetric: bool) -> None:
    m, n = leaves()
    actual = decoupled_kl(m, n, alpha=alpha, beta=beta, symmetric=symmetric)
    assert_same_loss(actual, literal_dkl(m, n, alpha, beta, symmetric), (m, n))


def test_decoupled_kl_has_the_gradients_of_the_kl() -> None:
    m, n = leaves()
    ours, theirs = (torch.autograd.grad(loss, (m, n)) for loss in (decoupled_kl(m, n), kl_divergence(m, n)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    half = torch.autograd.grad(decoupled_kl(m, n, alpha=0.5), (m, n))
    assert not torch.allclose(half[0], ours[0])
    torch.testing.assert_close(half[1], ours[1], **EXACT)  # α is the clean side's


@pytest.mark.parametrize("loss", [trades, hat])
def test_the_losses_with_a_kl_take_the_decoupled_one(loss: Any) -> None:
    clean, adversarial = leaves()
    options = LossOptions(divergence="dkl", dkl_alpha=2, dkl_beta=0.5, adv_weight=3.0, helper_weight=0.0)
    given = outputs(clean, adversarial, helper=clean.detach(), helper_labels=LABELS)
    expected = F.cross_entropy(clean, LABELS) + 3 * literal_dkl(clean, adversarial, 2, 0.5, False)
    assert_same_loss(loss(given, LABELS, options).total, expected, (clean, adversarial))


def smoothed(logits: Tensor, smoothing: float) -> Tensor:
    target = torch.full((B, K), smoothing / K, dtype=torch.float64)
    target[torch.arange(B), LABELS] += 1 - smoothing
    return -(target * logits.log_softmax(1)).sum(1).mean()


def test_every_cross_entropy_with_labels_is_smoothed() -> None:
    clean, adversarial = leaves()
    both, options = (clean, adversarial), LossOptions(label_smoothing=0.2)
    given, s = outputs(*both), 0.2
    expected = 0.5 * smoothed(clean, s) + 0.5 * smoothed(adversarial, s)
    assert_same_loss(pgd_at(given, LABELS, options).total, expected, both)
    kl = kl_divergence(clean, adversarial)
    assert_same_loss(trades(given, LABELS, options).total, smoothed(clean, s) + 6 * kl, both)
    plain = mart(given, LABELS, LossOptions()).total
    change = smoothed(adversarial, s) - F.cross_entropy(adversarial, LABELS)
    assert_same_loss(mart(given, LABELS, options).total, plain + change, both)
    plain = gat(given, LABELS, LossOptions()).total
    change = smoothed(clean, s) - F.cross_entropy(clean, LABELS)
    assert_same_loss(gat(given, LABELS, options).total, plain + change, both)
    for recipe in (Standard, PGDAT, Trades, HAT, MART, GAT):
        assert recipe(label_smoothing=0.2).loss_options().label_smoothing == 0.2


def test_mixed_labels_are_shares_of_classes() -> None:
    clean, adversarial = leaves()
    shares = torch.rand(B, K).softmax(1)
    expected = -(shares.double() * (clean.log_softmax(1) + adversarial.log_softmax(1))).sum(1).mean() / 2
    actual = pgd_at(outputs(clean, adversarial), shares, LossOptions())
    assert_same_loss(actual.total, expected, (clean, adversarial))
    one_hot = F.one_hot(LABELS, K).float()
    for loss in (pgd_at, trades, gat):
        options = LossOptions(label_smoothing=0.1)
        same = [loss(outputs(clean, adversarial), y, options).total for y in (LABELS, one_hot)]
        torch.testing.assert_close(*same, **EXACT)


def test_b_mtards_temperatures_follow_their_recurrence() -> None:
    """The loop of Zhao et al. in Python numbers; the sharper teacher changes during the steps."""
    temperatures = TeacherTemperatures(learning_rate=0.3)
    weights = MTARDWeights(learning_rate=0.1, temperatures=temperatures)
    tau_nat, tau_adv, w_nat, first = 1.0, 1.0, 0.5, None
    for step in range(8):
        clean, adversarial = leaves()
        sharp = 3.0 if step < 4 else 0.3
        teacher_nat, teacher_adv = (
            scale * torch.randn(B, K, dtype=torch.float64) for scale in (sharp, 4.0 - sharp)
        )

        def kl(teacher: Tensor, tau: float, student: Tensor) -> Tensor:
            p = (teacher / tau).softmax(1)
            return (p * (p.log() - student.log_softmax(1))).sum(1).mean()

        def entropy(teacher: Tensor, tau: float) -> float:
            p = (teacher / tau).softmax(1)
            return float(-(p * p.log()).sum(1).mean())

        nat, adv = kl(teacher_nat, tau_nat, clean), kl(teacher_adv, tau_adv, adversarial)
        first = first or (nat.item(), adv.item())
        share = (nat.item() / first[0], adv.item() / first[1])
        w_nat -= 0.1 * (w_nat - share[0] / sum(share))
        expected = w_nat * nat + (1 - w_nat) * adv
        given = outputs(clean, adversarial, teacher_clean=teacher_nat, teacher_adversarial=teacher_adv)
        actual = mtard(given, LABELS, LossOptions(), weights)
        assert actual.total.item() == pytest.approx(expected.item(), rel=1e-5)  # weights are float32
        assert actual.terms["tau_nat"].item() == pytest.approx(tau_nat, rel=1e-6)
        h_nat, h_adv = entropy(teacher_nat, tau_nat), entropy(teacher_adv, tau_adv)
        sign = 1 if h_nat > h_adv else -1
        tau_nat = min(10.0, max(1.0, tau_nat - 0.3 * sign))
        tau_adv = min(10.0, max(1.0, tau_adv + 0.3 * sign))
        assert temperatures.values.tolist() == pytest.approx([tau_nat, tau_adv], rel=1e-6)
    assert tau_adv > 1.0
    again = MTARDWeights(temperatures=TeacherTemperatures())
    again.load_state_dict(weights.state_dict())
    assert again.temperatures is not None
    assert torch.equal(again.temperatures.values, temperatures.values)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("mtard", {"label_smoothing": 0.1}, "label_smoothing must be 0: the loss of mtard has no labels"),
        ("mtard", {"temperature_lr": -1}, r"temperature_lr must be a number in \[0, 1\]"),
        ("trades", {"label_smoothing": 1}, "label_smoothing"),
        ("trades", {"divergence": "js"}, "divergence must be one of"),
        ("trades", {"dkl_alpha": 2}, "dkl_alpha, dkl_beta and dkl_symmetric are settings of divergence=dkl"),
        ("trades", {"divergence": "dkl", "dkl_beta": -1}, "dkl_beta must be a number of at least 0"),
        ("hat", {"divergence": "dkl", "dkl_symmetric": 1}, "dkl_symmetric must be true or false"),
        ("pgd_at", {"divergence": "dkl"}, "'pgd_at' has no setting 'divergence'"),
        ("mart", {"adv_weight": -1}, "adv_weight must be None or a number of at least 0"),
    ],
)
def test_bad_settings_of_losses_are_named(name: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_for(name, "cifar10", **wrong)


def test_b_mtards_rate_falls_with_mtards_weights() -> None:
    recipe = MTARD(epochs=6, milestones=(3, 5), temperature_lr=0.001)
    assert [recipe.temperature_lr_at(e) for e in (0, 3, 5)] == pytest.approx([0.001, 0.0001, 0.00001])

"""Losses against the equations written out again, and their options."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.small_training import K, batch, dynamic_net, static_net
from torch import nn

from awnet.data.dataset import Batch
from awnet.training import (
    HAT,
    MTARD,
    PGDAT,
    LossOptions,
    LossResult,
    MTARDWeights,
    Recipe,
    Standard,
    Teachers,
    Trades,
)
from awnet.training.losses import kl_divergence

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def shifted(x: torch.Tensor, y: torch.Tensor, *, index: torch.Tensor) -> torch.Tensor:
    """A stand-in for an attack: fixed, and different for every sample."""
    return (x + 0.4 * torch.sin(torch.arange(x[0].numel())).view(1, *x.shape[1:])).clamp(0, 1)


def loss_of(
    kind: type[Recipe],
    net: nn.Module,
    data: Batch,
    attack: Any,
    options: LossOptions,
    teachers: Teachers | None = None,
    weights: MTARDWeights | None = None,
) -> LossResult:
    """The loss of a recipe with one phase, on the batch and its adversarial images by ``attack``."""
    (phase,) = kind().phases()
    x_adv = attack(data.x, data.y, index=data.index)
    return phase.result(net, data, x_adv, options, teachers, weights)


def tempered(logits: torch.Tensor, tau: float) -> torch.Tensor:
    return F.softmax(logits / tau, dim=1)


def textbook_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(q.log(), p, reduction="batchmean")


# --- losses


@pytest.mark.parametrize("tau", [1.0, 5.0])
def test_kl_is_torchs_and_its_reductions_differ_by_the_number_of_classes(tau: float) -> None:
    a, b = torch.randn(6, K, dtype=torch.float64), torch.randn(6, K, dtype=torch.float64)
    ours = kl_divergence(a, b, temperature=tau)
    assert ours.item() == pytest.approx(textbook_kl(tempered(a, tau), tempered(b, tau)).item(), rel=1e-12)
    by_element = kl_divergence(a, b, temperature=tau, reduction="elementmean")
    assert by_element.item() == pytest.approx(ours.item() / K, rel=1e-12)
    assert kl_divergence(a, a).item() == 0
    with pytest.raises(ValueError, match="batchmean"):
        kl_divergence(a, b, reduction="sum")


def outputs_of(net: nn.Module, data: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Clean and adversarial logits and type logits of one joint training pass, written out again."""
    net = copy.deepcopy(net).train()
    x = torch.cat([data.x, shifted(data.x, data.y, index=data.index)])
    n = len(data.x)
    if not hasattr(net, "route"):
        logits = net(x)
        return logits[:n], logits[n:], None
    kinds = torch.tensor([True] * n + [False] * n)
    routing = net.route(x)
    logits = net(x, is_clean=kinds, routing=routing)
    return logits[:n], logits[n:], routing.type_logits


def type_loss(type_logits: torch.Tensor | None, n: int) -> torch.Tensor:
    if type_logits is None:
        return torch.zeros(())
    # order [adversarial, clean]; clean images come first
    return -F.log_softmax(type_logits, 1)[torch.arange(2 * n), torch.tensor([1] * n + [0] * n)].mean()


@pytest.mark.parametrize("make", [static_net, dynamic_net])
def test_the_losses_of_pgd_at_and_trades_equal_their_equations(make: Any) -> None:
    net, data = make().train(), batch()
    clean, adversarial, type_logits = outputs_of(net, data)
    ce = F.cross_entropy
    expected = 0.5 * ce(clean, data.y) + 0.5 * ce(adversarial, data.y) + type_loss(type_logits, 10)
    actual = loss_of(PGDAT, copy.deepcopy(net), data, shifted, LossOptions())
    assert actual.total.item() == pytest.approx(expected.item(), rel=1e-5)  # float32, another order of sums
    weighted = loss_of(PGDAT, copy.deepcopy(net), data, shifted, LossOptions(adv_weight=0.8))
    expected = 0.2 * ce(clean, data.y) + 0.8 * ce(adversarial, data.y) + type_loss(type_logits, 10)
    assert weighted.total.item() == pytest.approx(expected.item(), rel=1e-5)

    kl = textbook_kl(clean.softmax(1), adversarial.softmax(1))
    expected = ce(clean, data.y) + 6 * kl + type_loss(type_logits, 10)
    actual = loss_of(Trades, copy.deepcopy(net), data, shifted, LossOptions())
    assert actual.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert actual.terms["adv"].item() == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)
    assert all(term.dim() == 0 and not term.requires_grad for term in actual.terms.values())


def test_trades_differentiates_the_clean_side_of_its_kl_too() -> None:
    net, data = static_net().train(), batch()
    loss_of(Trades, net, data, shifted, LossOptions()).total.backward()
    ours = net[4].bias.grad.clone()

    def by_hand(detach: bool) -> torch.Tensor:
        other = copy.deepcopy(net)
        other.zero_grad()
        logits = other(torch.cat([data.x, shifted(data.x, data.y, index=data.index)]))
        clean, adversarial = logits[:10], logits[10:]
        p = clean.softmax(1).detach() if detach else clean.softmax(1)
        (F.cross_entropy(clean, data.y) + 6 * textbook_kl(p, adversarial.softmax(1))).backward()
        return other[4].bias.grad

    assert torch.allclose(ours, by_hand(detach=False), atol=1e-5)
    assert not torch.allclose(ours, by_hand(detach=True), atol=1e-3)


@pytest.mark.parametrize("make", [static_net, dynamic_net])
@pytest.mark.parametrize(("tau", "reduction", "factor"), [(1.0, "batchmean", 1), (5.0, "elementmean", 1 / K)])
def test_the_mtard_loss_equals_equations_20_to_22(
    make: Any, tau: float, reduction: Any, factor: float
) -> None:
    net, data = make().train(), batch()
    teachers = Teachers(static_net().eval(), static_net().eval())
    clean, adversarial, type_logits = outputs_of(net, data)
    x_adv = shifted(data.x, data.y, index=data.index)
    nat = factor * tau**2 * textbook_kl(tempered(teachers.clean(data.x), tau), tempered(clean, tau))
    adv = factor * tau**2 * textbook_kl(tempered(teachers.robust(x_adv), tau), tempered(adversarial, tau))
    options = LossOptions(temperature=tau, kl_reduction=reduction)
    weights = MTARDWeights()
    actual = loss_of(MTARD, copy.deepcopy(net), data, shifted, options, teachers, weights)
    expected = type_loss(type_logits, 10) + 0.5 * adv + 0.5 * nat  # the first step's weights are ½
    assert actual.total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert actual.terms["nat"].item() == pytest.approx(nat.item(), rel=1e-4, abs=1e-6)

    fixed = loss_of(MTARD, copy.deepcopy(net), data, shifted, replace(options, adv_weight=0.9), teachers)
    expected = type_loss(type_logits, 10) + 0.9 * adv + 0.1 * nat
    assert fixed.total.item() == pytest.approx(expected.item(), rel=1e-4)
    fixed.total.backward()
    assert all(p.grad is None for teacher in teachers for p in teacher.parameters())


@pytest.mark.parametrize("make", [static_net, dynamic_net])
def test_the_hat_loss_equals_its_equation(make: Any) -> None:
    net, data = make().double().train(), batch()
    data = data._replace(x=data.x.double())
    teacher = static_net().double().eval()
    x_adv = shifted(data.x, data.y, index=data.index).double()
    x_help = data.x + 2 * (x_adv - data.x)
    assert x_help.max() > 1  # beyond the images, unclipped
    y_help = teacher(x_adv).argmax(1)
    other, kinds = copy.deepcopy(net), torch.tensor([True] * 10 + [False] * 20)
    x, type_logits = torch.cat([data.x, x_adv, x_help]), None
    if make is dynamic_net:
        routing = other.route(x)
        logits, type_logits = other(x, is_clean=kinds, routing=routing), routing.type_logits[:20]
    else:
        logits = other(x)
    clean, adversarial, helper = logits[:10], logits[10:20], logits[20:]
    kl = textbook_kl(clean.softmax(1), adversarial.softmax(1))
    ce = F.cross_entropy
    expected = ce(clean, data.y) + 2.5 * kl + 0.5 * ce(helper, y_help) + type_loss(type_logits, 10)
    attack = lambda x, y, index: x_adv  # noqa: E731
    actual = loss_of(HAT, copy.deepcopy(net), data, attack, LossOptions(), Teachers(teacher))
    assert actual.total.item() == pytest.approx(expected.item(), rel=1e-10)  # float64
    assert actual.terms["helper"].item() == pytest.approx(ce(helper, y_help).item(), rel=1e-10)
    options = LossOptions(adv_weight=1.0, helper_weight=2.0)
    actual = loss_of(HAT, copy.deepcopy(net), data, attack, options, Teachers(teacher))
    expected = ce(clean, data.y) + kl + 2 * ce(helper, y_help) + type_loss(type_logits, 10)
    assert actual.total.item() == pytest.approx(expected.item(), rel=1e-10)
    with pytest.raises(ValueError, match="clean teacher"):
        loss_of(HAT, net, data, attack, LossOptions())


def test_plain_training_may_smooth_its_labels() -> None:
    net, data = static_net().train(), batch()
    expected = F.cross_entropy(copy.deepcopy(net)(data.x), data.y, label_smoothing=0.2)
    actual = loss_of(Standard, net, data, shifted, LossOptions(label_smoothing=0.2))
    assert actual.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert Standard(label_smoothing=0.2).loss_options().label_smoothing == 0.2


def test_mtard_without_teachers_or_weights_is_an_error() -> None:
    net, data = static_net(), batch()
    with pytest.raises(ValueError, match="teachers"):
        loss_of(MTARD, net, data, shifted, LossOptions(), None, MTARDWeights())
    with pytest.raises(ValueError, match="teachers"):
        loss_of(MTARD, net, data, shifted, LossOptions(), Teachers(net), MTARDWeights())
    with pytest.raises(ValueError, match="weights"):
        loss_of(MTARD, net, data, shifted, LossOptions(), Teachers(net, net))


def test_mtard_weights_follow_their_recurrence() -> None:
    series = [(2.0, 4.0), (1.0, 4.0), (0.5, 2.0), (1.5, 1.0)]
    weights, w = MTARDWeights(learning_rate=0.025), 0.5
    for step, (nat, adv) in enumerate(series):
        if step == 2:
            weights.learning_rate = 0.0025
        eta = 0.025 if step < 2 else 0.0025
        w_nat, w_adv = weights.update(torch.tensor(nat), torch.tensor(adv))
        relative_nat, relative_adv = nat / series[0][0], adv / series[0][1]
        w -= eta * (w - relative_nat / (relative_nat + relative_adv))
        assert w_nat.item() == pytest.approx(w, abs=1e-7)
        assert w_adv.item() == pytest.approx(1 - w, abs=1e-7)
    assert w != 0.5
    again = MTARDWeights()
    again.load_state_dict(weights.state_dict())
    later = [one.update(torch.tensor(1.0), torch.tensor(3.0))[0] for one in (weights, again)]
    again.learning_rate = weights.learning_rate
    assert torch.equal(again.first, weights.first)
    assert later[0] != later[1]  # another η
    again.load_state_dict(weights.state_dict())
    assert torch.equal(*(one.update(torch.tensor(1.0), torch.tensor(3.0))[0] for one in (weights, again)))


def test_mtard_weights_survive_a_zero_first_loss() -> None:
    weights = MTARDWeights(learning_rate=0.5)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    assert weights.update(zero, zero)[0].item() == 0.5
    assert weights.update(zero, one)[0].item() == 0.5  # the clean side has no scale yet
    assert weights.update(one, one)[0].item() == 0.5
    assert weights.first.tolist() == [1.0, 1.0]
    assert weights.update(zero, zero)[0].item() == 0.5  # both learnt to the end: back to even weights
    assert weights.update(one, 3 * one)[0].item() == pytest.approx(0.5 - 0.5 * (0.5 - 0.25))


def test_the_type_loss_follows_its_flags() -> None:
    net, data = dynamic_net().train(), batch()
    plain = loss_of(PGDAT, copy.deepcopy(net), data, shifted, LossOptions())
    without = loss_of(PGDAT, net, data, shifted, LossOptions(type_weight=0.0))
    assert without.total.item() == pytest.approx(0.5 * (without.terms["nat"] + without.terms["adv"]).item())
    assert plain.total.item() == pytest.approx((without.total + plain.terms["type"]).item(), rel=1e-6)
    without.total.backward()
    assert net.router.type_head.weight.grad is None  # the head gets no gradient
    smooth = loss_of(PGDAT, copy.deepcopy(net), data, shifted, LossOptions(type_label_smoothing=0.2))
    type_logits = outputs_of(net, data)[2]
    kinds = torch.tensor([1] * 10 + [0] * 10)
    expected = F.cross_entropy(type_logits, kinds, label_smoothing=0.2)
    assert smooth.terms["type"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_router_without_a_type_head_has_no_type_loss() -> None:
    net, data = dynamic_net(type_head=False).train(), batch()
    result = loss_of(PGDAT, net, data, shifted, LossOptions())
    assert "type" not in result.terms
    assert result.total.item() == pytest.approx(0.5 * (result.terms["nat"] + result.terms["adv"]).item())


def test_the_consistency_term_equals_its_equation() -> None:
    net, data = static_net().train(), batch()
    clean, adversarial, _ = outputs_of(net, data)
    plain = loss_of(PGDAT, copy.deepcopy(net), data, shifted, LossOptions()).total
    more = loss_of(PGDAT, copy.deepcopy(net), data, shifted, LossOptions(consistency=2.0)).total
    kl = textbook_kl(clean.softmax(1), adversarial.softmax(1))
    assert (more - plain).item() == pytest.approx(2 * kl.item(), rel=1e-3)


def test_router_passes_can_be_separate() -> None:
    net, data = dynamic_net().train(), batch()
    x_adv = shifted(data.x, data.y, index=data.index)
    other = copy.deepcopy(net)
    separate = torch.cat([other.route(data.x).type_logits, other.route(x_adv).type_logits])
    actual = loss_of(PGDAT, copy.deepcopy(net), data, shifted, LossOptions(router_passes="separate"))
    assert actual.terms["type"].item() == pytest.approx(type_loss(separate, 10).item(), rel=1e-5)
    joint = loss_of(PGDAT, copy.deepcopy(net), data, shifted, LossOptions())
    assert joint.terms["type"].item() != pytest.approx(actual.terms["type"].item(), rel=1e-4)


def test_each_kind_goes_through_its_own_branch() -> None:
    net, data = dynamic_net().train(), batch()
    before = net.dynamic.stem.bn.running_mean.clone()
    loss_of(PGDAT, net, data, shifted, LossOptions())
    u = F.conv2d(data.x, net.dynamic.stem.weight, padding=1)
    u_adv = F.conv2d(shifted(data.x, data.y, index=data.index), net.dynamic.stem.weight, padding=1)
    for row, features in ((1, u), (0, u_adv)):
        expected = 0.9 * before[row] + 0.1 * features.mean((0, 2, 3))
        assert torch.allclose(net.dynamic.stem.bn.running_mean[row], expected, atol=1e-6)


def test_plain_training_leaves_the_adversarial_branch_alone() -> None:
    net, data = dynamic_net().train(), batch()
    result = loss_of(Standard, net, data, shifted, LossOptions(consistency=1.0))
    assert net.dynamic.stem.bn.running_mean[0].eq(0).all()
    assert net.dynamic.stem.bn.running_mean[1].ne(0).any()
    assert set(result.terms) == {"total", "nat", "type", "type_accuracy"}

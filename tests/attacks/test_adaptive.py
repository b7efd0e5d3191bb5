"""The adaptive attacks on defenses that are known to be broken, APGD against the official code, and bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.broken_defenses import EPS, Gated, HardGated, Honest, Masked, Valley, images
from torch import Tensor, nn

from awnet.attacks import Attack, adaptive, named_attack
from awnet.attacks.adaptive import (
    AdaptivePaper,
    DeepSloth,
    ForcedStatic,
    Joint,
    JointAPGD,
    Softened,
    SoftRouter,
    TwoPhase,
    has_router,
    has_type_head,
    mean_scales,
    type_margin,
)
from awnet.attacks.autoattack import OfficialAttack
from awnet.attacks.cascade import ROBUST
from awnet.attacks.pgd import PGD, margin
from awnet.attacks.registry import BUDGETS, Budget, Suite
from awnet.attacks.search import APGD, dlr, dlr_targeted
from awnet.data.threat_model import ThreatModel
from awnet.models import create_model
from awnet.nn import Routing

THREAT = ThreatModel(EPS)


def correct(model: nn.Module, attack: Attack | None = None) -> Tensor:
    x, y, index = next(images().batches(64))
    with torch.no_grad():
        return model(x if attack is None else attack(x, y, index=index)).argmax(1) == y


def share(model: nn.Module, name: str | None = None) -> float:
    x = next(images().batches(64)).x
    suite = Suite(classes=4, budget="smoke", reference=x)
    attack = None if name is None else named_attack(name, model, THREAT, suite=suite)
    return correct(model, attack).double().mean().item()


# ---- what is broken gets broken


def test_the_hand_made_networks_are_accurate() -> None:
    for model in (Honest(), Masked(), Valley(), Gated(), HardGated()):
        assert share(model) == 1, type(model).__name__


def test_an_honest_network_withstands_everything() -> None:
    # 0.3 of class signal against eps = 0.1: no attack can exist
    for name in ("fgsm", "pgd_sat", "union"):
        assert share(Honest(), name) == 1, name


@pytest.mark.parametrize(
    ("model", "found_by"),
    [
        (Masked(), ["cw", "joint", "apgd_joint_dlr", "aa"]),
        (Valley(), ["apgd_ce", "apgd_joint_ce", "aa"]),
        (Gated(), ["joint", "two_phase", "softened"]),
        (HardGated(), ["joint", "two_phase", "softened"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_union_finds_what_pgd_misses(model: nn.Module, found_by: list[str]) -> None:
    assert share(model, "pgd_sat") > 0.9
    assert share(model, "fgsm") > 0.9
    assert share(model, "union") == 0
    for name in found_by:
        assert share(model, name) < 0.1, name  # at 20 steps a search may stop beside the valley


def test_broken_gates_withstand_attacks_that_ignore_the_router() -> None:
    for model in (Gated(), HardGated()):
        for name in ("cw", "apgd_ce", "apgd_t", "fab_t", "forced"):
            assert share(model, name) == 1, (type(model).__name__, name)


def test_union_records_which_attack_broke_an_image_first() -> None:
    x, y, index = next(images().batches(64))
    attack = named_attack("union", Gated(), THREAT, suite=Suite(classes=4, budget="smoke", reference=x))
    x_adv = attack(x, y, index=index)
    names = list(attack.members)
    assert names[:2] == ["aa", "cw"]
    assert {"joint", "two_phase", "forced", "softened", "apgd_joint_ce", "deepsloth"} < set(names)
    actual = {names[k] for k in attack.outcome.broken_by.tolist()}
    assert actual & {"joint", "two_phase"}
    assert not actual & {"cw", "forced"}
    assert not (Gated()(x_adv).argmax(1) == y).any()
    assert (attack.outcome.broken_by != ROBUST).all()


def test_union_of_a_static_model_has_the_families_that_apply() -> None:
    suite = Suite(classes=4, budget="smoke", teacher=Honest(), surrogates={"weak": Masked()})
    static = named_attack("union", Honest(), THREAT, suite=suite)
    assert list(static.members) == [
        "aa",
        "cw",
        "joint",
        "apgd_joint_ce",
        "apgd_joint_dlr",
        "apgd_joint_t",
        "adaptive_paper",
        "deepsloth",
        "transfer_weak_pgd_sat",
        "transfer_weak_cw",
    ]
    assert static.members["joint"].lambdas == (0.0,)
    gated = named_attack("union", Gated(), THREAT, suite=suite)
    assert set(gated.members) - set(static.members) == {"two_phase", "forced", "softened"}
    assert gated.members["joint"].lambdas == (0.0, 1.0, -1.0)
    standard = named_attack("joint", Gated(), THREAT)
    assert standard.lambdas == (0, 0.01, -0.01, 0.1, -0.1, 1, -1, 10, -10, 100, -100)
    assert standard.settings["steps"] == 100
    assert named_attack("apgd_joint_ce", Gated(), THREAT).settings["restarts"] == 10


def test_attacks_on_a_router_refuse_models_without_one() -> None:
    for name, message in (("two_phase", "type head"), ("forced", "router"), ("softened", "router")):
        with pytest.raises(ValueError, match=message):
            named_attack(name, Honest(), THREAT)
    with pytest.raises(ValueError, match="needs the robust teacher"):
        named_attack("adaptive_paper", Gated(), THREAT)


# ---- each attack does what it says, on an AW-Net


def awnet_tiny(**options: object) -> nn.Module:
    """With filter scales and branches that differ, as after training."""
    torch.manual_seed(0)
    model = create_model("awnet_tiny", num_classes=4, in_channels=1, **options)
    with torch.no_grad():
        if getattr(model.router, "signal_heads", None) is not None:
            model.router.signal_heads.weight.normal_(std=0.1)
        for kind in range(6):
            model((torch.rand(8, 1, 6, 6) + 0.1 * kind).clamp(0, 1), is_clean=torch.arange(8) % 2 == 0)
    return model.eval()


def batch(model: nn.Module, n: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return x, model(x).argmax(1)


OURS = {
    "joint": lambda model, **size: Joint(model, lambdas=(0.0, 1.0), **size),
    "joint_apgd": lambda model, **size: JointAPGD(model, loss="dlr_targeted", restarts=2, **size),
    "forced": lambda model, **size: ForcedStatic(
        model, mean_scales=mean_scales(model, torch.rand(4, 1, 6, 6)), **size
    ),
    "two_phase": lambda model, **size: TwoPhase(model, **size),
    "softened": lambda model, **size: Softened(model, **size),
    "apgd": lambda model, **size: APGD(model, loss="dlr", **size),
    "paper": lambda model, **size: AdaptivePaper(
        model, step_size=0.01, teacher=create_model("resnet_tiny", num_classes=4, in_channels=1), **size
    ),
    "deepsloth": lambda model, **size: DeepSloth(model, step_size=0.01, **size),
}


@pytest.mark.parametrize("name", OURS)
def test_adaptive_attacks_stay_in_the_ball_are_keyed_by_sample_and_restore_the_model(name: str) -> None:
    model = awnet_tiny()
    x, y = batch(model)
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    model.train()
    model.router.type_head.bias.grad = torch.ones(2)
    before = [value.clone() for value in model.state_dict().values()]
    torch.manual_seed(1)  # of a teacher's weights
    attack = OURS[name](model, eps=0.02, steps=4, seed=3)
    index = torch.tensor([5, 2, 40, 11, 3, 8])
    x_adv = attack(x, y, index=index)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert (x_adv.double() - x.double()).abs().max() <= 0.02 + 2.0**-24  # x ± eps is rounded once
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not torch.equal(x_adv, x)
    assert torch.equal(attack(x, y, index=index), x_adv)
    order = torch.tensor([3, 0, 5])
    part = attack(x[order], y[order], index=index[order])
    # a batch of another size is convolved with other rounding, which a sign may turn into a step
    assert (part - x_adv[order]).abs().gt(1e-6).double().mean() < 0.05


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([0.0, 1e-8, 1 / 255, 8 / 255, 0.3, 1.0]),
    st.integers(1, 25),
    st.sampled_from(["ce", "dlr", "dlr_targeted"]),
    st.integers(2, 5),
    st.integers(0, 2**31),
)
def test_apgd_stays_in_the_ball(shape, eps, steps, loss, classes, seed) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    x = torch.rand(shape).mul(1.4).sub(0.2).clamp(0, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), classes))
    y = model(x).argmax(1)
    x_adv = APGD(model, eps=eps, loss=loss, steps=steps, restarts=2, seed=seed)(x, y)
    assert (x_adv.double() - x.double()).abs().max() <= eps + 2.0**-24  # x ± eps is rounded once
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def cnn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_breaks_the_images_that_the_official_apgd_breaks(loss: str) -> None:
    ours_broken = theirs_broken = both = 0
    for seed in range(3):
        model = cnn(seed)
        x = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
        y = model(x).argmax(1)
        ours = APGD(model, eps=0.06, loss=loss, steps=50, seed=seed)(x, y)
        theirs = OfficialAttack(model, f"apgd_{loss}", eps=0.06, steps=50, seed=seed)(x, y)
        a, b = (model(actual).argmax(1) != y for actual in (ours, theirs))
        ours_broken, theirs_broken = ours_broken + int(a.sum()), theirs_broken + int(b.sum())
        both += int((a & b).sum())
    assert 30 < theirs_broken < 150
    # other random starts: a few images on the edge of what is possible fall to one and not to the other
    assert abs(ours_broken - theirs_broken) <= 4
    assert both >= theirs_broken - 4


def test_ratio_losses_equal_their_equations() -> None:
    z = torch.tensor([[3.0, 1.0, 0.5, -2.0, 0.0], [0.2, 4.0, 1.0, 3.0, 2.5]])
    y, target = torch.tensor([0, 3]), torch.tensor([2, 0])
    assert torch.allclose(dlr(z, y), torch.tensor([-(3 - 1) / (3 - 0.5), -(3 - 4) / (4 - 2.5)]))
    expected = [-(3 - 0.5) / (3 - 0.25), -(3 - 0.2) / (4 - (2.5 + 1.0) / 2)]
    assert torch.allclose(dlr_targeted(z, y, target), torch.tensor(expected))


def test_joint_attack_weights_steer_the_router() -> None:
    model = awnet_tiny()
    x, y = batch(model)
    y = y * 0 + model(x).argmax(1)
    margins = {}
    for weight in (-100.0, 0.0, 100.0):
        attack = Joint(model, eps=0.002, lambdas=(weight,), steps=20)
        with torch.no_grad():
            margins[weight] = type_margin(model.route(attack(x, y))).mean().item()
    assert margins[-100.0] < margins[0.0] < margins[100.0]


def test_two_phase_attack_is_classified_as_clean() -> None:
    model = awnet_tiny()
    x, y = batch(model)
    attack = TwoPhase(model, eps=0.002, steps=20)  # too small a ball to break anything
    x_adv = attack(x, y)
    with torch.no_grad():
        assert (model(x_adv).argmax(1) == y).all()
        start = attack.start(0, x, torch.arange(len(x)))
        clean = attack.maximize(attack.objective(0, x, y, 3), x, start, 20)
        reached, bound = (type_margin(model.route(at)) for at in (x_adv, clean))
        before = type_margin(model.route(start))
        # within a step of the bound, and with a smaller margin than phase one left
        assert (reached >= before + 0.3 * (bound - before)).double().mean() > 0.8
        assert margin(model(x_adv), y).mean() < margin(model(clean), y).mean()


def test_forced_static_attack_freezes_the_router() -> None:
    model = awnet_tiny()
    x, y = batch(model)
    means = mean_scales(model, x)
    with torch.no_grad():
        for mean, scale in zip(means, model.route(x).filter_scales, strict=True):
            assert torch.allclose(mean, scale.mean(0), atol=1e-6)
    attack = ForcedStatic(model, eps=0.05, mean_scales=means, steps=3)
    assert attack.searches(x) == 6
    assert ForcedStatic(model, eps=0.05).searches(x) == 3
    x_adv = (x + 0.01).clamp(0, 1)
    with torch.no_grad():
        for number in range(6):
            loss, broken = attack.objective(number, x, y, 3)(x_adv[1:3], torch.tensor([1, 2]))
            assert broken is None
            routing = model.route(x[1:3])
            routing.p_clean = torch.full((2,), attack.P[number % 3])
            if number >= 3:
                routing.filter_scales = [mean.expand(2, -1) for mean in means]
            expected = -margin(model(x_adv[1:3], routing=routing), y[1:3])
            assert torch.allclose(loss, expected, atol=1e-5)  # two rows instead of six are summed otherwise
    with torch.no_grad():
        values = [attack.objective(number, x, y, 3)(x_adv, torch.arange(6))[0].mean() for number in range(6)]
    assert len({round(value.item(), 5) for value in values}) == 6
    assert mean_scales(Honest(), x) == []


def test_soft_router_keeps_the_forward_values() -> None:
    model = awnet_tiny()
    x, _ = batch(model)
    with torch.no_grad():
        through, soft = (SoftRouter(model, 100.0, straight_through=which)(x) for which in (True, False))
        assert torch.allclose(through, model(x), atol=1e-4, rtol=1e-4)  # soft + (value - soft) is rounded
        assert not torch.allclose(soft, model(x), atol=1e-2)
    assert not model.router.signal_heads._forward_hooks


def test_soft_router_gives_gradients_through_a_saturated_router() -> None:
    model = awnet_tiny()
    beta, temperature = model.router.beta, 50.0
    signals = torch.tensor([[40.0, -30.0], [25.0, -60.0]], requires_grad=True)  # tanh is ±1 in float32
    types = torch.tensor([[200.0, -20.0], [-150.0, 30.0]], requires_grad=True)
    hard = Routing(types, types.softmax(1)[:, 1], [(signals.tanh() + 1).pow(beta)])

    def gradients(routing: Routing) -> tuple[Tensor, Tensor]:
        total = routing.p_clean.sum() + routing.filter_scales[0].sum()
        return torch.autograd.grad(total, (signals, types), retain_graph=True)

    assert all(not gradient.any() for gradient in gradients(hard))
    soft = SoftRouter(model, temperature, straight_through=True).soften(hard, [signals])
    assert torch.allclose(soft.p_clean, hard.p_clean, atol=1e-6)
    assert torch.allclose(soft.filter_scales[0], hard.filter_scales[0], atol=1e-5)
    tanh = (signals / temperature).tanh()
    p = (types / temperature).softmax(1)[:, 1]
    slope = p * (1 - p) / temperature
    expected = beta * (tanh + 1).pow(beta - 1) * (1 - tanh**2) / temperature, torch.stack([-slope, slope], 1)
    for actual, wanted in zip(gradients(soft), expected, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-4)  # float32


def test_paper_adaptive_attack_maximizes_its_equation() -> None:
    model, teacher = awnet_tiny(), create_model("resnet_tiny", num_classes=4, in_channels=1)
    teacher.train()
    x, y = batch(model)
    attack = AdaptivePaper(model, eps=0.1, step_size=0.01, teacher=teacher, temperature=2.0, adv_weight=0.3)
    attack(x, y)
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    teacher.eval()
    with torch.no_grad():
        actual = attack.joint_loss(model, x, x, y)
        routing, logits, goal = model.route(x), model(x), teacher(x)
        p, q = (goal / 2).softmax(1), (logits / 2).softmax(1)
        expected = -logits.log_softmax(1)[torch.arange(6), y] - routing.type_logits.log_softmax(1)[:, 0]
        expected = expected + 0.3 * 4 * (p * (p / q).log()).sum(1)
    assert torch.allclose(actual, expected, atol=1e-5)  # float32 sums in another order
    assert attack.settings["loss"] == "CE + joint loss of Eq. 22"


def test_deepsloth_makes_every_exit_uniform() -> None:
    model = awnet_tiny()
    x, y = batch(model)
    threat = ThreatModel(8 / 255)
    attack = named_attack("deepsloth", model, threat)
    actual = attack.settings
    assert (actual["eps"], actual["step_size"], actual["steps"]) == pytest.approx((0.03125, 0.002, 30))

    def distance(at: Tensor) -> float:
        with torch.no_grad():
            exits = [model(at), model.route(at).type_logits]
        return -sum(e.log_softmax(1).mean(1).mean().item() for e in exits)

    assert distance(DeepSloth(model, eps=0.1, step_size=0.01)(x, y)) < distance(x)


class ManyExits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Sequential(nn.Flatten(), nn.Linear(36, 4)) for _ in range(2))

    def exits(self, x: Tensor) -> list[Tensor]:
        return [self.first(x), self.last(x)]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


def test_deepsloth_takes_side_exits() -> None:
    model = ManyExits()
    x, y = batch(model)
    x_adv = DeepSloth(model, eps=0.1, step_size=0.01)(x, y)

    def entropy(logits: Tensor) -> float:
        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean().item()

    with torch.no_grad():
        for before, after in zip(model.exits(x), model.exits(x_adv), strict=True):
            assert entropy(after) > entropy(before)


def test_variants_of_aw_net_have_the_families_that_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "smoke", Budget(steps=2, restarts=1, lambdas=(0.0, 1.0)))
    for options, router, head in (
        ({}, True, True),
        ({"type_head": False}, True, False),
        ({"type_head": False, "filter_scaling": False}, True, False),
        ({"filter_scaling": False}, True, True),
        ({"bn": "one"}, True, True),
    ):
        model = awnet_tiny(**options)
        assert (has_router(model), has_type_head(model)) == (router, head), options
        x, y = batch(model, 3)
        attack = named_attack("union", model, ThreatModel(0.01), suite=Suite(classes=4, budget="smoke"))
        assert ("two_phase" in attack.members) == head
        for name in ("joint", "forced", "softened", "apgd_joint_t", "deepsloth"):
            assert attack.members[name](x, y).shape == x.shape
    assert not has_router(create_model("resnet_tiny"))
    assert adaptive.has_type_head(Gated())


def test_search_skips_misclassified_images_and_stops_at_the_first_success() -> None:
    model = awnet_tiny()
    x, y = batch(model)
    y[1] = (y[1] + 1) % 4
    x_adv = Joint(model, eps=0.3, steps=30)(x, y)
    assert torch.equal(x_adv[1], x[1])
    calls = []
    handle = model.dynamic.classifier.register_forward_hook(lambda m, i, o: calls.append(len(o)))
    x_adv = Joint(model, eps=0.3, steps=30, lambdas=(0.0,) * 5)(x, y)
    handle.remove()
    assert not (model(x_adv).argmax(1) == y).any()
    assert len(calls) <= 2 + 10 + 1  # one search, which stopped at the first look
    assert calls[1] == 5


def test_images_with_broken_gradients_do_not_count_as_robust() -> None:
    class Sick(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = x.mean((1, 2, 3)) + (x - x.detach()).sqrt().sum((1, 2, 3))
            return torch.stack([score, -score, 0 * score], 1)

    x, y = torch.rand(3, 1, 4, 4) + 0.0, torch.zeros(3, dtype=torch.int64)
    for attack in (Joint(Sick(), eps=0.1, steps=3), APGD(Sick(), eps=0.1, steps=3)):
        with pytest.raises(FloatingPointError, match="not finite for 3 of 3 images"):
            attack(x, y)
    with pytest.raises(ValueError, match="no gradient with respect to x"):
        Joint(_Detached(), eps=0.1, steps=3)(x, y)


class _Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        score = x.detach().mean((1, 2, 3))
        return torch.stack([score, -score], 1)


def test_adaptive_attacks_refuse_bad_options() -> None:
    model = Honest()
    with pytest.raises(ValueError, match="loss must be 'ce', 'dlr' or 'dlr_targeted'"):
        APGD(model, eps=0.1, loss="margin")
    with pytest.raises(ValueError, match="steps must be an integer of at least 0"):
        Joint(model, eps=0.1, steps=-1)
    with pytest.raises(ValueError, match="restarts must be an integer of at least 0"):
        JointAPGD(model, eps=0.1, restarts=-1)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        AdaptivePaper(Gated(), eps=0.1, step_size=0.01, teacher="robust")


def test_attack_by_name_returns_pgd_and_its_variants() -> None:
    assert isinstance(named_attack("pgd_sat", Honest(), THREAT), PGD)

"""The geometry of L-infinity, L2 and L1, and attacks in each of them on linear models with a closed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from awnet.attacks import FGSM, PGD, Suite, list_attacks, named_attack
from awnet.attacks.adaptive import Joint, JointAPGD
from awnet.attacks.norms import geometry
from awnet.data import NORMS, ThreatModel, from_arrays

ORDER = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}
SMOKE = Suite(classes=3, budget="smoke")


def size(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.double().flatten(1), ORDER[norm], dim=1)


def nearest(v: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """The projection of ``v`` on the ball within [0, 1] in float64, by bisection on the multiplier."""
    v, x = v.double(), x.double()
    if norm == "Linf":
        return v.clamp(x - eps, x + eps).clamp(0, 1)

    def at(multiplier: Tensor) -> Tensor:
        if norm == "L2":
            return ((v + multiplier * x) / (1 + multiplier)).clamp(0, 1)
        delta = v - x
        return (x + delta.sign() * (delta.abs() - multiplier).clamp(min=0)).clamp(0, 1)

    low, high = torch.zeros(len(v), 1, 1, 1).double(), torch.full((len(v), 1, 1, 1), 1e9).double()
    for _ in range(200):
        middle = (low + high) / 2
        too_far = (size(at(middle) - x, norm) > eps)[:, None, None, None]
        low, high = torch.where(too_far, middle, low), torch.where(too_far, high, middle)
    inside = (size(v.clamp(0, 1) - x, norm) <= eps)[:, None, None, None]
    return torch.where(inside, v.clamp(0, 1), at(high))


@st.composite
def points(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    """Points anywhere, images in [0, 1] with pixels at 0 and 1, and a radius."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4)), 3)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x = torch.rand(shape, generator=generator, dtype=dtype)
    x = (x * draw(st.sampled_from([1.0, 3.0])) - draw(st.sampled_from([0.0, 1.0]))).clamp(0, 1)
    v = x + draw(st.sampled_from([1e-4, 0.3, 5.0])) * torch.randn(shape, generator=generator, dtype=dtype)
    v = torch.where(torch.rand(shape, generator=generator) < 0.2, x, v)  # pixels that do not change
    return v, x, draw(st.sampled_from([1e-3, 0.1, 0.5, 1.0]))


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=20, deadline=None)
@given(case=points())
def test_a_projection_is_the_nearest_point_of_ball_and_box(norm, case):
    v, x, eps = case
    projected = geometry(norm).project(v, x, eps)
    assert projected.dtype == x.dtype
    assert (projected >= 0).all()
    assert (projected <= 1).all()
    # L-infinity rounds its bounds once; the others round toward x, so only the float64 sum is rounded
    rounding = 2.0**-24 if norm == "Linf" else 1e-12 * eps
    assert (size(projected.double() - x.double(), norm) <= eps + rounding).all()
    # one rounding of a value below 1, and for the rounding toward x one unit more
    unit = 2.0**-23 if x.dtype == torch.float32 else 1e-9
    assert (projected.double() - nearest(v, x, eps, norm)).abs().max() <= unit
    assert torch.equal(geometry(norm).project(projected, x, eps), projected)
    assert geometry(norm).inside(projected, x, eps).all()
    assert torch.equal(geometry(norm).confine(projected, x, eps), projected)


@pytest.mark.parametrize("norm", NORMS)
def test_each_image_may_have_its_radius_and_step(norm):
    torch.manual_seed(0)
    x, v, gradient = torch.rand(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    eps, step = torch.tensor([0.0, 0.1, 0.4, 1.0]), torch.tensor([0.3, 0.0, 0.2, 0.9])
    projected = geometry(norm).project(v, x, eps)
    stepped = geometry(norm).step(x, gradient, x, step, eps)
    assert torch.equal(projected[0], x[0])
    for i in range(4):
        one = slice(i, i + 1)
        alone = geometry(norm).project(v[one], x[one], float(eps[i]))
        assert torch.allclose(projected[one], alone, atol=1e-7)
        alone = geometry(norm).step(x[one], gradient[one], x[one], float(step[i]), float(eps[i]))
        assert torch.allclose(stepped[one], alone, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_is_the_steepest_of_its_length_and_zero_gradients_do_not_move(norm):
    torch.manual_seed(0)
    x = torch.full((3, 1, 4, 4), 0.5)
    gradient = torch.randn(x.shape) * torch.tensor([1.0, 1e-30, 0.0])[:, None, None, None]
    moved = geometry(norm).step(x, gradient, x, 0.2, 1.0)
    change = (moved - x).double()
    assert torch.equal(moved[2], x[2])
    assert size(change[:2], norm) == pytest.approx([0.2, 0.2], rel=1e-5)
    # the largest inner product with the gradient is the step size times the dual norm
    dual = {"Linf": 1.0, "L2": 2.0, "L1": float("inf")}[norm]
    best = 0.2 * torch.linalg.vector_norm(gradient.double().flatten(1), dual, dim=1)
    reached = (change * gradient.double()).flatten(1).sum(1)
    assert (reached[:2] / best[:2]).tolist() == pytest.approx([1, 1], rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_is_uniform_in_the_ball_and_depends_on_seed_and_index_alone(norm):
    x, index = torch.full((4000, 1, 1, 3), 0.5), torch.arange(4000)
    start = geometry(norm).start(7, x, index, 0.3)
    # of a uniform point in three dimensions, (size / eps)³ is uniform: mean ½, standard deviation 12^-½
    cube = (size(start - x, norm) / 0.3) ** 3
    assert (size(start - x, norm) <= 0.3 * (1 + 1e-6)).all()
    assert float(cube.mean()) == pytest.approx(0.5, abs=4 * 12**-0.5 / 4000**0.5)
    assert (start - x).mean(0).abs().max() < 0.02
    again = geometry(norm).start(7, x[:2], index[5:7], 0.3)
    assert torch.equal(again, start[5:7])
    assert not torch.equal(geometry(norm).start(8, x[:2], index[5:7], 0.3), start[5:7])


@pytest.mark.parametrize("norm", NORMS)
def test_signs_have_the_size_of_the_ball(norm):
    signs = torch.randn(2, 3, 4, 4).sign()
    assert size(geometry(norm).signs(signs, 0.7), norm) == pytest.approx([0.7, 0.7], rel=1e-6)


# ---- a linear model, whose robust accuracy is known


class Linear(nn.Module):
    """Two classes whose margin is w·x + b."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        margin = x.flatten(1) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(margin), margin], 1)


def smallest_margin(weight: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """The least w·x' over the ball within [0, 1], in float64: the exact worst case ``[B]``."""
    weight, x = weight.double(), x.double().flatten(1)
    room = torch.where(weight > 0, x, 1 - x)  # how far each pixel can move against w
    size = weight.abs().expand_as(x)
    if norm == "Linf":
        moved = room.clamp(max=eps)
    elif norm == "L1":  # the pixels with the largest weight first
        order = size.argsort(dim=1, descending=True)
        ordered = room.gather(1, order)
        moved = torch.minimum((eps - ordered.cumsum(1) + ordered).clamp(min=0), ordered)
        moved = torch.zeros_like(room).scatter(1, order, moved)
    else:  # proportional to w, up to the bound, by bisection on the factor
        low, high = torch.zeros(len(x), 1).double(), torch.full((len(x), 1), 1e6).double()
        for _ in range(200):
            middle = (low + high) / 2
            over = torch.minimum(middle * size, room).norm(dim=1, keepdim=True) > eps
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        moved = torch.minimum(low * size, room)
    return x @ weight - (size * moved).sum(1)


EPS = {"Linf": 0.05, "L2": 0.3, "L1": 1.2}


@pytest.mark.parametrize("box", ["inactive", "active"])
@pytest.mark.parametrize("norm", NORMS)
def test_attacks_find_the_exact_robust_accuracy_of_a_linear_model(norm, box):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, generator=generator)
    x = torch.rand(32, 3, 4, 4, generator=generator)
    if box == "inactive":
        # far enough from 0 and 1 for the whole budget of any norm in one pixel
        eps = EPS[norm] if norm != "L1" else 0.3
        x = 0.4 + 0.2 * x
    else:
        eps, x = EPS[norm] * 2, (3 * x - 1).clamp(0, 1)
    worst = smallest_margin(weight, x, eps, norm)
    if box == "inactive":  # the closed form: the margin falls by eps times the dual norm of w
        dual = {"Linf": 1.0, "L2": 2.0, "L1": float("inf")}[norm]
        fall = eps * torch.linalg.vector_norm(weight.double(), dual)
        assert torch.allclose(worst, x.double().flatten(1) @ weight.double() - fall, atol=1e-6)
    model = Linear(weight, -worst.median().float())  # half of the images can be broken
    y = torch.ones(32, dtype=torch.int64)
    clean = (model(x).argmax(1) == y).double().mean()
    exact = (worst > worst.median()).double().mean()
    assert clean > exact + 0.1
    attacks = {
        "pgd": PGD(model, eps=eps, norm=norm, step_size=eps / 4, steps=40),
        "joint": Joint(model, eps=eps, norm=norm, steps=40),
        "apgd_joint": JointAPGD(model, eps=eps, norm=norm, steps=100, restarts=1),
    }
    if box == "inactive":
        attacks["fgsm"] = FGSM(model, eps=eps, norm=norm)
    # In L1 a step of fixed size overshoots, and APGD's sparsity adapts in a few checkpoints only: both end
    # short of the worst case. FAB's projection is exact in every norm.
    attacks["fab_t"] = named_attack("fab_t", model, ThreatModel(eps, norm), suite=Suite(classes=2))
    fall = x.double().flatten(1) @ weight.double() - worst
    for name, attack in attacks.items():
        x_adv = attack(x, y)
        assert (size(x_adv.double() - x.double(), norm) <= eps * (1 + 1e-6)).all(), name
        broken = model(x_adv).argmax(1) != y
        tolerance = 0.15 if norm == "L1" and name != "fab_t" else 1e-3
        decided = (worst - worst.median()).abs() > tolerance * fall
        assert decided.sum() > 16
        assert torch.equal(broken[decided], (worst < worst.median())[decided]), name
        assert not (broken & (worst > worst.median() + 1e-3 * fall)).any(), name


# ---- every attack by name


def small_cnn(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 6 * 5, classes)
    ).eval()


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_every_named_attack_stays_in_the_ball_and_finds_what_noise_does_not(norm):
    model = small_cnn()
    x = torch.rand(6, 2, 6, 5, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    threat = ThreatModel({"L2": 0.8, "L1": 3.0}[norm], norm)
    suite = Suite(classes=4, budget="smoke", teacher=small_cnn(), queries=50)
    for name in list_attacks():
        if name in ("two_phase", "forced", "softened"):  # for models with a router
            continue
        attack = named_attack(name, model, threat, suite=suite)
        x_adv = attack(x, y)
        assert attack.norm == attack.settings["norm"] == norm
        assert x_adv.min() >= 0, name
        assert x_adv.max() <= 1, name
        assert (size(x_adv.double() - x.double(), norm) <= attack.eps * (1 + 1e-5)).all(), name
        assert not torch.equal(x_adv, x), name
    noise = geometry(norm).start(0, x, torch.arange(6), threat.eps)
    strong = named_attack("pgd_sat", model, threat)(x, y)
    assert (model(strong).argmax(1) == y).sum() < (model(noise).argmax(1) == y).sum()


# ---- bad input


def test_a_threat_model_names_what_is_wrong():
    assert ThreatModel(0.1).norm == "Linf"
    assert ThreatModel(0.5, "l2") == ThreatModel(0.5, "L2")
    assert ThreatModel(12, "L1").eps == 12
    for norm in ("L3", "inf", "", None, 2):
        with pytest.raises(ValueError, match="norm must be one of Linf, L2, L1"):
            ThreatModel(0.5, norm)
    for eps, norm in ((0.0, "L2"), (-1.0, "L1"), (float("nan"), "L2"), (float("inf"), "L1"), (1.5, "Linf")):
        with pytest.raises(ValueError, match="eps must be"):
            ThreatModel(eps, norm)
    with pytest.raises(ValueError, match="norm must be one of"):
        PGD(small_cnn(), eps=0.1, norm="L0", step_size=0.1, steps=1)
    with pytest.raises(ValueError, match="eps must be at most 1"):
        PGD(small_cnn(), eps=8, step_size=0.1, steps=1)


@pytest.mark.parametrize(
    ("eps", "norm", "says"),
    [
        (8 / 255, "L2", "may be meant for another norm"),
        (0.5, "L1", "may be meant for another norm"),
        (0.5, "Linf", "uniformly gray"),
        (30, "L2", "uniformly gray"),
        (8 / 255, "Linf", None),
        (0.5, "L2", None),
        (12, "L1", None),
    ],
)
def test_an_implausible_eps_is_explained(eps, norm, says):
    threat_model = ThreatModel(eps, norm)
    reason = threat_model.implausible(3 * 32 * 32)
    assert (reason is None) == (says is None)
    assert says is None or (says in reason and f" in {threat_model.norm_text} is so " in reason)


def test_a_data_set_takes_a_norm():
    images, labels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    assert from_arrays(images, labels, eps=0.5, norm="L2").threat_model == ThreatModel(0.5, "L2")

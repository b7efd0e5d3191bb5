"""Attacks of one step, written out again; the attack of GAT; PGD in L2 and L1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import rng
from awnet.attacks import PGD
from awnet.data import ThreatModel
from awnet.models import create_model
from awnet.training import GAT, PGDAT, Recipe, Trades, recipe_for

EPS, K, SEED = 0.06, 10, 5
THREAT = ThreatModel(EPS)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return create_model("awnet_tiny", in_channels=1).train()


def images(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(n) % K, 100 + 3 * torch.arange(n)


def gradient_sign(net: nn.Module, x: Tensor, loss: Any) -> Tensor:
    x = x.clone().requires_grad_()
    training = net.training
    net.eval()
    (gradient,) = torch.autograd.grad(loss(net(x)), x)
    net.train(training)
    return gradient.sign()


def uniform(x: Tensor, index: Tensor) -> Tensor:
    return 2 * rng.uniform(rng.key("attack start", SEED), index, x.shape[1:]) - 1


def expected_images(kind: str, net: nn.Module, x: Tensor, y: Tensor, index: Tensor, loss: Any) -> Tensor:
    if kind == "fgsm_rs":  # Wong et al., Algorithm 3
        start = (x + EPS * uniform(x, index)).clamp(0, 1)
        step, projected = 1.25 * EPS, True
    elif kind == "n_fgsm":  # de Jorge et al., Algorithm 1, with k = 2
        start, step, projected = (x + 2 * EPS * uniform(x, index)).clamp(0, 1), EPS, False
    else:  # Sriramanan et al., Algorithm 2
        sign = torch.where(uniform(x, index) < 0, -1.0, 1.0)
        start, step, projected = (x + EPS / 2 * sign).clamp(0, 1), EPS, True
    x_adv = start + step * gradient_sign(net, start, loss)
    if projected:
        x_adv = torch.minimum(torch.maximum(x_adv, x - EPS), x + EPS)
    return x_adv.clamp(0, 1)


@pytest.mark.parametrize("kind", ["fgsm_rs", "n_fgsm", "bernoulli"])
def test_an_attack_of_one_step_is_its_algorithm(net: nn.Module, kind: Any) -> None:
    x, y, index = images()
    recipe = recipe_for("pgd_at", "cifar10", attack_kind=kind)
    assert recipe.attack_steps == 1
    actual = recipe.attack(net, THREAT, K, SEED)(x, y, index=index)
    expected = expected_images(
        kind, net, x, y, index, lambda logits: F.cross_entropy(logits, y, reduction="sum")
    )
    # a pixel whose gradient is near zero may go the other way, by the rounding of the inference copy
    assert ((actual - expected).abs() < 1e-6).float().mean() > 0.99
    largest = (actual - x).abs().max().item()
    assert largest <= (3 * EPS if kind == "n_fgsm" else EPS) + 1e-6
    assert actual.min() >= 0
    assert actual.max() <= 1
    assert (largest > 1.5 * EPS) == (kind == "n_fgsm")


@pytest.mark.parametrize("kind", ["fgsm_rs", "n_fgsm", "bernoulli"])
def test_the_noise_of_an_attack_of_one_step_is_keyed_by_the_image(net: nn.Module, kind: Any) -> None:
    x, y, index = images()
    attack = recipe_for("pgd_at", "cifar10", attack_kind=kind, attack_step_size=1e-9).attack(
        net, THREAT, K, 3
    )
    whole = attack(x, y, index=index)
    halves = [attack(x[part], y[part], index=index[part]) for part in (slice(0, 2), slice(2, 6))]
    assert torch.equal(torch.cat(halves), whole)
    attack.seed = 4
    assert not torch.equal(attack(x, y, index=index), whole)


def test_an_attack_of_one_step_refuses_other_norms(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="attack_kind=n_fgsm attacks in Linf, not in L2: use pgd"):
        PGDAT(attack_kind="n_fgsm", attack_steps=1).attack(net, ThreatModel(0.5, "L2"), K, SEED)
    x, y, index = images()
    actual = PGDAT().attack(net, ThreatModel(0.5, "L2"), K, SEED)(x, y, index=index)
    lengths = (actual - x).flatten(1).norm(dim=1)
    assert lengths.max() <= 0.5 + 1e-5
    assert (actual - x).abs().max() > 0.05


def test_radius_and_step_of_an_attack_of_one_step_are_settings(net: nn.Module) -> None:
    x, y, index = images()
    recipe = PGDAT(attack_kind="n_fgsm", attack_steps=1, attack_radius=0.5, attack_step_size=0.01)
    moved = recipe.attack(net, THREAT, K, SEED)(x, y, index=index) - x
    assert moved.abs().max() <= 0.5 * EPS + 0.01 + 1e-6
    large = ThreatModel(0.6)  # the ball around the noise would be larger than all images
    actual = PGDAT(attack_kind="n_fgsm", attack_steps=1).attack(net, large, K, SEED)(x, y, index=index)
    assert actual.min() >= 0
    assert actual.max() <= 1


def test_gats_attack_maximizes_its_loss(net: nn.Module) -> None:
    x, y, index = images()
    net.eval()
    with torch.no_grad():
        p = net(x).softmax(1)

    def loss(logits: Tensor) -> Tensor:
        distance = (p - logits.softmax(1)).square().sum(1)
        return (F.cross_entropy(logits, y, reduction="none") + 200 * distance).sum()

    actual = GAT(adv_weight=200.0).attack(net, THREAT, K, SEED)(x, y, index=index)
    expected = expected_images("bernoulli", net, x, y, index, loss)
    assert ((actual - expected).abs() < 1e-6).float().mean() > 0.98
    plain = GAT(adv_weight=0.0).attack(net, THREAT, K, SEED)(x, y, index=index)
    assert not torch.equal(plain, actual)


@pytest.mark.parametrize("kind", [PGDAT, Trades, GAT])
def test_an_attack_of_one_step_attacks_a_static_network(kind: type[Recipe]) -> None:
    static = nn.Sequential(nn.Flatten(), nn.Linear(64, K))
    x, y, index = images()
    settings: dict[str, Any] = {} if kind is GAT else {"attack_kind": "fgsm_rs", "attack_steps": 1}
    actual = kind(**settings).attack(static, THREAT, K, SEED)(x, y, index=index)
    assert 0 < (actual - x).abs().max() <= EPS + 1e-6


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("pgd_at", {"attack_kind": "fgsm"}, "attack_kind must be one of"),
        ("pgd_at", {"attack_kind": "n_fgsm", "attack_steps": 2}, "attack_steps must be 1"),
        ("pgd_at", {"attack_radius": 1.0}, "attack_radius needs an attack of one step"),
        (
            "pgd_at",
            {"attack_kind": "n_fgsm", "attack_radius": -1},
            "attack_radius must be None or a number above",
        ),
        ("standard", {"attack_kind": "n_fgsm"}, "attack_kind must be pgd: standard does not attack"),
        ("rdi", {"attack_kind": "n_fgsm"}, "attack_kind must be pgd: rdi defines its attack"),
    ],
)
def test_bad_settings_of_training_attacks_are_named(name: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_for(name, "cifar10", **wrong)


@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.6), ("L1", 3.0)])
@pytest.mark.parametrize("kind", [PGDAT, Trades])
def test_the_training_attack_is_pgd_of_the_data_sets_norm(
    kind: type[Recipe], norm: Any, eps: float, net: nn.Module
) -> None:
    x, y, index = images()
    threat = ThreatModel(eps, norm)
    x_adv = kind().attack(net, threat, K, seed=SEED)(x, y, index=index)
    loss, step = ("kl", threat.trades_train_step_size) if kind is Trades else ("ce", eps / 4)
    same = PGD(net, eps=eps, norm=norm, step_size=step, steps=10, loss=loss, random_start="normal", seed=SEED)
    # the inference copy rounds gradients in another order, and here their values count, not only their signs
    assert torch.allclose(x_adv, same(x, y, index=index), atol=1e-4)
    size = (x_adv.double() - x.double()).flatten(1).norm(p={"L2": 2, "L1": 1}[norm], dim=1)
    assert (size <= eps * (1 + 1e-12)).all()  # rounded toward the clean image
    assert (size > 0.5 * eps).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1

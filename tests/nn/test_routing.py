"""Which models route their images, and routed networks inside other modules, in training and under attack."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from awnet.attacks import named_attack
from awnet.attacks.pgd import PGD
from awnet.data import Dataset, Splits, load_dataset
from awnet.data.dataset import Batch
from awnet.detectors.base import Embedding
from awnet.evaluation import evaluate
from awnet.models import AWResNet, create_model
from awnet.nn import Steering, has_router, observe, route, routers, with_routing
from awnet.training import PGDAT, Recipe, Standard, Trades, recipe_for, train
from awnet.training.losses import LossOptions


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.3) / 0.3


class Normalized(AWResNet):
    def forward(self, x: Tensor, **arguments: object) -> Tensor:  # type: ignore[override]
        return super().forward((x - 0.3) / 0.3, **arguments)  # type: ignore[arg-type]


class Plain(nn.Module):
    """With attributes of the user's that have names of ours."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        self.f = nn.Linear(64, 10)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x.flatten(1))


class Courier(Plain):
    def route(self, x: Tensor) -> str:
        return "north"

    def exits(self) -> int:
        return 2


def network(kind: Callable[[], nn.Module] = lambda: create_model("awnet_tiny", in_channels=1)) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    with torch.no_grad():
        model.router.signal_heads.weight.normal_(std=0.1)
        model.router.type_head.weight.normal_(std=0.5)
    return model


def hooked(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(lambda _, args: (Norm()(args[0]),))
    return model


WRAPPED = {
    "in a Sequential": lambda: nn.Sequential(Norm(), network()),
    "with a pre-hook": lambda: hooked(network()),
    "in a subclass": lambda: network(lambda: Normalized("awnet_tiny", 10, 1)),
    "nested": lambda: nn.Sequential(Norm(), nn.Sequential(network(), nn.Identity())),
}


@pytest.fixture(scope="module")
def digits() -> Splits:
    splits = load_dataset("digits")
    return Splits(*(part.subset(16) for part in splits))


def batch(data: Dataset, size: int = 8) -> Batch:
    return next(data.batches(size))


@pytest.mark.parametrize("case", WRAPPED)
def test_a_routed_network_inside_is_seen_and_steered(case: str) -> None:
    model, x = WRAPPED[case]().eval(), torch.rand(5, 1, 8, 8)
    plain = network().eval()
    assert has_router(model)
    assert len(routers(model)) == 1
    steering = Steering()
    logits = observe(model, x, steering)
    assert torch.equal(logits, model(x))
    assert torch.equal(logits, plain(Norm()(x)))
    expected = plain.route(Norm()(x))
    (routing,) = steering.routings
    for actual in (routing, route(model, x)):
        assert torch.equal(actual.type_logits, expected.type_logits)
    other = plain.route(torch.rand(5, 1, 8, 8))
    assert torch.equal(with_routing(model, x, other), plain(Norm()(x), routing=other))
    assert torch.equal(model(x), logits)  # nothing of it is left


@pytest.mark.parametrize("passes", ["joint", "separate"])
@pytest.mark.parametrize("kind", [Standard, PGDAT, Trades])
@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapped_network_trains_as_the_network_on_the_wrappers_images(
    case: str, kind: type[Recipe], passes: str, digits: Splits
) -> None:
    data = batch(digits.train)
    options = LossOptions(router_passes=passes)  # type: ignore[arg-type]
    normalized = data._replace(x=Norm()(data.x))
    results = []
    for model, given in ((WRAPPED[case](), data), (network(), normalized)):
        assert has_router(model)
        shift = 0.1 if given is data else 0.1 / 0.3
        (phase,) = kind().phases()
        result = phase.result(model.train(), given, given.x + shift, options)
        result.total.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        results.append((result.terms, norm))
    (terms, norm), (expected, expected_norm) = results
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        WRAPPED["in a Sequential"],
        pytest.param(lambda: nn.DataParallel(network()), marks=pytest.mark.slow),
        pytest.param(WRAPPED["nested"], marks=pytest.mark.slow),
    ],
)
def test_a_wrapped_network_trains_to_the_end_and_its_router_learns_at_its_own_rate(
    make: Callable[[], nn.Module], digits: Splits, tmp_path: object
) -> None:
    recipe = recipe_for("trades", "digits", epochs=1, attack_steps=1)
    result = train(recipe, make(), digits, f"{tmp_path}/run", quiet=True, tensorboard=False)
    assert result.finished
    assert "type" in result.history[-1]
    assert len(recipe.build_optimizer(result.model).param_groups) == 2


def test_two_routed_networks_are_refused_before_training(digits: Splits, tmp_path: object) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = network(), network()

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    with pytest.raises(ValueError, match="Both holds 2 networks with routers"):
        train(recipe_for("standard", "digits", epochs=1), Both(), digits, f"{tmp_path}/r", quiet=True)
    assert not os.path.exists(f"{tmp_path}/r")


@pytest.mark.parametrize("case", WRAPPED)
def test_adaptive_attacks_see_a_wrapped_router(case: str, digits: Splits) -> None:
    model = WRAPPED[case]().eval()
    x, y, index = batch(digits.test, 4)
    for name in ("joint", "two_phase", "forced", "softened"):
        attack = named_attack(name, model, digits.test.threat_model)
        attack.steps = 2
        assert attack.searches(x) >= 1
        assert (attack(x, y, index=index) - x).abs().max() <= digits.test.threat_model.eps + 1e-6
    report = evaluate(model, digits.test, ["fgsm"])
    assert "fgsm" in report.router_auc


ATTRIBUTES = [
    {},
    {"inference_copy": False},
    {"config": {"width": 4}},
    {"config": {"name": 3, "num_classes": "ten"}},
    {"route": "north"},
    {"route": nn.Linear(2, 2)},
    {"router": "192.168.1.1"},
    {"router": nn.Linear(4, 4)},
    {"dynamic": True, "image_dtype": "uint8", "exits": 7, "exit_of": {}, "signal_widths": 3},
    {"has_branches": "yes", "thresholds": None, "gate": 1, "live": (), "image_size": "small"},
]


@pytest.mark.parametrize("attributes", ATTRIBUTES, ids=str)
@pytest.mark.parametrize("kind", [Plain, Courier])
def test_attributes_of_the_users_with_names_of_ours_change_nothing(
    kind: type[Plain], attributes: dict[str, object], digits: Splits, tmp_path: object
) -> None:
    if kind is Courier and "route" in attributes:
        pytest.skip("it has a method of that name")
    torch.manual_seed(0)
    model = kind(**attributes)
    assert not has_router(model)
    assert routers(model) == []
    assert not has_router(model)
    x, y, index = batch(digits.test)
    torch.manual_seed(0)
    expected = PGD(Plain(), eps=0.1, step_size=0.05, steps=2)(x, y, index=index)
    assert torch.equal(PGD(model, eps=0.1, step_size=0.05, steps=2)(x, y, index=index), expected)
    report = evaluate(model, digits.test.subset(4), ["fgsm", "deepsloth"])
    assert (report.model, report.router_auc) == (kind.__name__, {})
    recipe = recipe_for("pgd_at", "digits", epochs=1, attack_steps=1)
    assert len(recipe.build_optimizer(model).param_groups) == 1
    if kind is Courier or attributes.keys() & {"config", "route", "router"}:
        assert train(recipe, model, digits, f"{tmp_path}/run", quiet=True, tensorboard=False).finished


def test_a_layer_called_router_counts_among_a_detectors_layers() -> None:
    model = nn.Sequential()
    model.add_module("router", nn.Conv2d(1, 2, 3))
    model.add_module("flatten", nn.Flatten())
    model.add_module("linear", nn.Linear(72, 3))
    assert Embedding(model, torch.rand(1, 1, 8, 8)).layers == ["router"]

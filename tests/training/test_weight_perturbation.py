"""Adversarial weight perturbation against a literal implementation, and with the other parts of a step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.fake_cuda import Recorder
from torch import Tensor, nn

from awnet.data.dataset import Batch
from awnet.models import create_model
from awnet.training import MTARD, PGDAT, Recipe, Teachers, Trades, recipe_for
from awnet.training.step import TrainingStep
from awnet.training.weight_perturbation import perturbed, perturbed_weights

CPU, K = torch.device("cpu"), 3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, K)
    ).double()


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, K))


def batch(seed: int, n: int = 10) -> Batch:
    x = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Batch(x, torch.arange(n) % K, torch.arange(n))


def shifted(x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
    return (x + 0.2 * torch.sin(torch.arange(16.0).view(1, 1, 4, 4))).clamp(0, 1).to(x.dtype)


def made(recipe: Recipe, model: nn.Module, epoch: int = 0, **options: Any) -> TrainingStep:
    step = TrainingStep(recipe, model, CPU, 5, **options)
    step.start_epoch(epoch)
    return step


def everything(step: TrainingStep) -> list[Tensor]:
    actual = [*step.model.state_dict().values()]
    for slots in step.optimizer.state.values():
        actual += [value for value in slots.values() if isinstance(value, Tensor)]
    if step.weights is not None:
        actual += step.weights.state_dict().values()
    return [value.clone() for value in actual]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def loss_of(kind: type[Recipe], model: nn.Module, data: Batch) -> Tensor:
    n = len(data.y)
    clean, adversarial = model(torch.cat([data.x, shifted(data.x, data.y, index=data.index)])).split(n)
    if kind is PGDAT:
        return 0.5 * F.cross_entropy(clean, data.y) + 0.5 * F.cross_entropy(adversarial, data.y)
    p, p_adv = clean.softmax(1), adversarial.softmax(1)
    return F.cross_entropy(clean, data.y) + 6 * (p * (p / p_adv).log()).sum(1).mean()


@pytest.mark.parametrize("kind", [PGDAT, Trades])
def test_a_step_equals_the_algorithm_written_out(kind: type[Recipe]) -> None:
    """Wu et al., Algorithm 1, with a copy of the network as the one that is perturbed."""
    gamma, lr = 0.05, 0.3
    model = convolutional()
    other = copy.deepcopy(model).train()
    step = made(kind(lr=lr, momentum=0.9, weight_decay=0.01, awp=gamma), model)
    optimizer = torch.optim.SGD(other.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
    for i in range(3):
        data = batch(i)
        step(data, shifted)
        proxy = copy.deepcopy(other)
        proxy.zero_grad()
        loss_of(kind, proxy, data).backward()
        moves = {}
        for name, weight in proxy.named_parameters():
            if "weight" in name and weight.dim() > 1:
                assert weight.grad is not None
                moves[name] = gamma * weight.norm() / weight.grad.norm() * weight.grad
        assert len(moves) == 2
        before = {name: weight.detach().clone() for name, weight in other.named_parameters()}
        with torch.no_grad():
            for name, move in moves.items():
                other.get_parameter(name).add_(move)
        optimizer.zero_grad()
        loss_of(kind, other, data).backward()
        with torch.no_grad():
            for name, weight in other.named_parameters():
                weight.copy_(before[name])
        optimizer.step()
    for name, value in model.state_dict().items():
        # float64, another order of sums
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_norms_and_biases_are_not_perturbed() -> None:
    model = create_model("awnet_tiny", in_channels=1)
    chosen = {id(weight) for weight in perturbed_weights(model)}
    for name, parameter in model.named_parameters():
        norm = ".bn" in name or "norm" in name or name.endswith("bias")
        assert (id(parameter) in chosen) == (not norm and parameter.dim() > 1), name
    assert len(chosen) > 10


def test_weights_are_bitwise_restored_also_after_an_error() -> None:
    model = linear()
    weights = perturbed_weights(model)
    before = [weight.detach().clone() for weight in weights]
    gradients = [torch.randn_like(weights[0]), torch.zeros_like(weights[1])]

    def fails() -> None:
        with perturbed(weights, gradients, 0.1):
            moved = (weights[0] - before[0]).norm().item()
            assert moved == pytest.approx(0.1 * before[0].norm().item(), rel=1e-5)
            assert torch.equal(weights[1], before[1])  # its gradient is 0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert same([w.detach() for w in weights], before)


def test_weight_perturbation_begins_after_its_warm_up() -> None:
    model = linear().double()
    plain, warming, on = (
        made(PGDAT(awp=gamma, awp_warmup=2), copy.deepcopy(model), epoch)
        for gamma, epoch in ((0.0, 1), (0.1, 1), (0.1, 2))
    )
    for step in (plain, warming, on):
        step(batch(0), shifted)
    assert same(everything(plain), everything(warming))
    assert not same(everything(plain), everything(on))


def test_micro_batches_are_perturbed_by_the_gradient_of_the_batch() -> None:
    model = linear().double()
    whole, parts = (made(PGDAT(awp=0.1, accumulate=n), copy.deepcopy(model)) for n in (1, 4))
    for i in range(3):
        one, other = whole(batch(i), shifted), parts(batch(i), shifted)
        assert other["total"].item() == pytest.approx(one["total"].item(), rel=1e-9)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)  # float64, another order of sums


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    recipe = MTARD(awp=0.01, temperature_lr=0.1, ema_decay=0.9, clip_norm=1.0)
    step = made(recipe, convolutional().float(), teachers=Teachers(linear(), linear()))
    data = [Batch(b.x.float(), b.y, b.index) for b in map(batch, range(3))]
    step(data[0], shifted)
    before = everything(step)
    broken = step(data[1], lambda x, y, index: torch.full_like(x, torch.nan))
    assert broken["skipped"].item() == 1
    assert same(before, everything(step))
    assert step(data[2], shifted)["skipped"].item() == 0
    assert all(value.isfinite().all() for value in everything(step))


def test_a_first_pass_that_is_not_finite_is_enough_to_skip_the_step() -> None:
    class Breaks(nn.Module):
        passes = 0

        def __init__(self) -> None:
            super().__init__()
            self.net = linear()

        def forward(self, x: Tensor) -> Tensor:
            self.passes += self.training
            output = self.net(x)
            return output + (output.sum() * 0 + torch.inf if self.passes == 1 else 0.0)

    step = made(PGDAT(awp=0.01), Breaks())
    before = everything(step)
    data = batch(0)
    assert step(Batch(data.x.float(), data.y, data.index), shifted)["skipped"].item() == 1
    assert same(before, everything(step))


def test_the_statistics_move_once_per_step() -> None:
    model = convolutional()
    step = made(PGDAT(awp=0.01), model)
    for i in range(3):
        step(batch(i), shifted)
    assert model[1].num_batches_tracked.item() == 3


def test_a_captured_step_with_weight_perturbation_equals_the_step() -> None:
    recorder = Recorder()
    recipe = Trades(epochs=3, milestones=(), awp=0.05, awp_warmup=1, ema_decay=0.9)
    model = linear()
    plain = made(recipe, copy.deepcopy(model))
    captured = made(replace(recipe, capture=True), model, record=recorder)
    for epoch in range(2):
        for step in (plain, captured):
            step.start_epoch(epoch)
        for i in range(4):
            data = batch(i)
            data = Batch(data.x.float(), data.y, data.index)
            one, other = plain(data, shifted), captured(data, shifted)
            assert other["total"].item() == pytest.approx(one["total"].item(), rel=1e-6)
    assert len(recorder.recorded) == 2  # one with a single pass, one with two
    for a, b in zip(everything(plain), everything(captured), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("pgd_at", {"awp": -0.1}, "awp must be a number of at least 0"),
        ("pgd_at", {"awp_warmup": 1.5}, "awp_warmup must be an integer of at least 0"),
        ("advmoe", {"awp": 0.01}, "awp must be 0: advmoe makes 2 updates per batch"),
    ],
)
def test_bad_settings_of_weight_perturbation_are_named(
    name: str, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_for(name, "cifar10", **wrong)

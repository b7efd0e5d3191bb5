"""Stochastic models: detection, seeding, averaged gradients, AutoAttack's rand version, classification."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack as Official
from torch import Tensor, nn

from awnet.attacks import CW, PGD, AutoAttack, Cascade, Stochastic
from awnet.attacks.search import APGD
from awnet.attacks.stochastic import decision, randomness, seeded


class Noisy(nn.Module):
    """A linear model whose logits, or input, get noise from one of the generators that models use."""

    def __init__(self, noise: float = 0.5, source: str = "torch", classes: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(classes, 16, generator=generator))
        self.noise, self.source = noise, source

    def forward(self, x: Tensor) -> Tensor:
        if self.source == "torch":
            noise = torch.randn(x.shape, dtype=x.dtype)
        elif self.source == "numpy":
            noise = torch.from_numpy(np.random.normal(size=x.shape)).to(x.dtype)  # noqa: NPY002
        elif self.source == "python":
            noise = torch.full_like(x, random.gauss(0, 1))
        else:
            noise = torch.zeros_like(x)
        return (x + self.noise * noise).flatten(1).tanh() @ self.weight.to(x.dtype).T


def batch(n: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, 4, 4, generator=generator).to(dtype)
    return x, Noisy(0.0)(x.float()).argmax(1)


class Dropped(nn.Module):
    """Layers that stay in train mode, by one of the ways in which that happens."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm, self.drop = how, nn.BatchNorm2d(1), nn.Dropout(0.5)
        self.last = nn.Linear(16, 4)

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True if self.how == "train method" else mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "batch statistics":
            x = F.batch_norm(x, None, None, training=True)
        elif self.how == "running statistics":
            self.norm.train()
            x = self.norm(x)
        elif self.how == "functional":
            x = F.dropout(x)  # its default is train mode
        else:
            x = self.drop(x)
        return self.last(x.flatten(1))


@pytest.mark.parametrize("source", ["torch", "numpy", "python", "none"])
def test_two_forward_passes_detect_any_generator_and_restore_it(source: str) -> None:
    x, _ = batch()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    actual = randomness(Noisy(0.01, source).train(), x)
    assert (actual.difference > 1e-5) == (source != "none")
    assert actual.train_mode == ()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("how", "stochastic", "functions"),
    [
        ("module", False, ()),
        ("functional", True, ("dropout",)),
        ("train method", True, ("dropout",)),
        ("batch statistics", False, ("batch_norm",)),
        ("running statistics", False, ("batch_norm",)),
    ],
)
def test_train_mode_in_eval_mode_is_detected(how: str, stochastic: bool, functions: tuple[str, ...]) -> None:
    model, (x, _) = Dropped(how), batch()
    statistics = model.norm.running_mean.clone()
    actual = randomness(model, x)
    assert (actual.difference > 0, actual.train_mode) == (stochastic, functions)
    assert torch.equal(model.norm.running_mean, statistics)


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_the_noise_is_seeded_by_purpose_and_images(source: str) -> None:
    x, _ = batch()
    index = torch.arange(len(x))

    def run(model: nn.Module, purpose: str = "a", first: int = 0) -> Tensor:
        with seeded(model, purpose, index + first):
            return model(x)

    model = Stochastic(Noisy(source=source), seed=1)
    other_seed = Stochastic(Noisy(source=source), seed=2)
    value = run(model)
    random.random()
    torch.rand(1)
    assert torch.equal(run(model), value)
    for other in (run(model, "b"), run(model, first=1), run(other_seed)):
        assert not torch.allclose(other, value)


class Counted(Noisy):
    """Noise that is a known function of the number of the pass."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.linspace(-1, 1, 16, dtype=x.dtype) * np.sin(type(self).calls)
        type(self).calls += 1
        return (x.flatten(1) + 0.3 * shift).tanh() @ self.weight.to(x.dtype).T


def literal_eot(model: nn.Module, x: Tensor, y: Tensor, eot: int, eps: float, step: float, n: int) -> Tensor:
    """PGD without a random start whose gradient is the mean over ``eot`` passes, one after the other."""
    x_adv = x.clone()
    for _ in range(n):
        gradients = []
        for _ in range(eot):
            point = x_adv.clone().requires_grad_()
            loss = -model(point).log_softmax(1)[torch.arange(len(y)), y].sum()
            gradients.append(torch.autograd.grad(loss, point)[0])
        x_adv = x_adv + step * torch.stack(gradients).mean(0).sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


def test_pgd_averages_the_gradient_over_passes() -> None:
    x, y = batch(dtype=torch.float64)
    attack = PGD(Stochastic(Counted().double(), eot=5), eps=0.1, step_size=0.03, steps=4, random_start=None)
    Counted.calls = 0
    got = attack(x, y)
    assert Counted.calls == 4 * 5
    Counted.calls = 0
    expected = literal_eot(Counted().double(), x, y, 5, 0.1, 0.03, 4)
    # both sum the same float64 gradients, so only a sign of a gradient near 0 could differ
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert attack.settings["eot"] == 5
    Counted.calls = 0
    assert not torch.allclose(literal_eot(Counted().double(), x, y, 1, 0.1, 0.03, 4), expected)


def test_apgd_averages_the_gradient_and_stops_at_images_that_every_pass_misclassifies() -> None:
    x, y = batch()
    plain = APGD(Noisy(0.0, "none"), eps=0.2, steps=10)(x, y)
    averaged = APGD(Stochastic(Noisy(0.0, "none"), eot=3, passes=2), eps=0.2, steps=10)(x, y)
    torch.testing.assert_close(plain, averaged)  # a deterministic model: the mean is the value
    model = Stochastic(Noisy(0.4), eot=8, passes=50, seed=1)
    x_adv = APGD(model, eps=0.3, steps=20)(x, y)
    with seeded(model, "test", torch.arange(len(x))):
        assert (decision(model, x_adv).argmax(1) == y).sum() < (decision(model, x).argmax(1) == y).sum()


def test_the_predicted_class_is_that_of_the_mean_probabilities() -> None:
    x, _ = batch(dtype=torch.float64)
    model = Stochastic(Counted().double(), passes=7)
    Counted.calls = 0
    logits, votes = model.classify(lambda: model(x))
    Counted.calls = 0
    passes = torch.stack([Counted().double()(x) for _ in range(7)])
    torch.testing.assert_close(logits, passes.softmax(2).mean(0).log())
    shares = torch.stack([(passes.argmax(2) == k).double().mean(0) for k in range(4)], 1)
    torch.testing.assert_close(votes, shares)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.3), ("L1", 1.0)])
def test_rand_version_equals_pyautoattacks(norm: str, eps: float) -> None:
    x, y = batch(8)
    model = Noisy(0.2)
    attack = AutoAttack(Stochastic(model, eot=4), eps=eps, norm=norm, classes=4, seed=5, steps=10)
    assert list(attack.members) == ["apgd_ce", "apgd_dlr"]
    official = Official(model, eps=eps, norm=norm, seed=5, version="rand")
    assert official.attacks_to_run == ["apgd-ce", "apgd-dlr"]
    assert (official.apgd.eot_iter, official.apgd.n_iter) == (20, 100)  # the whole version's
    official.apgd.eot_iter, official.apgd.n_iter = 4, 10
    official.apgd.n_iter_2, official.apgd.n_iter_min, official.apgd.size_decr = 2, 1, 1
    for name, loss in (("apgd_ce", "ce"), ("apgd_dlr", "dlr")):
        official.apgd.loss = loss
        torch.manual_seed(0)
        expected = official.apgd.perturb(x, y)
        got = attack.members[name](x, y)
        # the official code seeds the generator that the model draws from; its images may leave the ball by
        # rounding, and are projected
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert "randomized" not in attack.examine(x, y, 3)


def test_rand_version_by_name_and_with_few_classes() -> None:
    assert AutoAttack(Noisy(), eps=0.1).settings["version"] == "standard"
    rand = AutoAttack(Noisy(), eps=0.1, version="rand")
    assert (rand.settings["version"], rand.settings["eot"]) == ("rand", 20)
    assert list(AutoAttack(Noisy(), eps=0.1, classes=2, version="rand").members) == ["apgd_ce"]
    assert AutoAttack(Stochastic(Noisy(), eot=3), eps=0.1).settings["version"] == "reduced rand"
    with pytest.raises(ValueError, match="version must be 'standard', 'rand' or None"):
        AutoAttack(Noisy(), eps=0.1, version="random")  # type: ignore[arg-type]


def test_attacks_on_a_stochastic_model_are_reproducible() -> None:
    x, y = batch()
    model = Stochastic(Noisy(0.3), eot=2, passes=3)
    members = {"pgd": PGD(model, eps=0.1, step_size=0.03, steps=3), "cw": CW(model, eps=0.1, step_size=0.03)}
    first = Cascade(model, members, eps=0.1)
    x_adv = first(x, y)
    torch.rand(3)
    second = Cascade(model, members, eps=0.1)
    assert torch.equal(second(x, y), x_adv)
    assert torch.equal(first.outcome.broken_by, second.outcome.broken_by)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eot": 0}, ValueError, "eot must be an integer of at least 1"),
        ({"passes": 0}, ValueError, "passes must be an integer of at least 1"),
        ({"eot": 1.5}, TypeError, "eot must be an integer"),
        ({"model": len}, TypeError, "model must be a torch.nn.Module"),
    ],
)
def test_stochastic_models_refuse_bad_options(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Stochastic(**{"model": Noisy(), **options})  # type: ignore[arg-type]

"""The attacks against those of torchattacks, another implementation, on a network trained on digits."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.extras import optional
from torch import Tensor, nn

from awnet.attacks import CW, FGSM, PGD, Attack, frozen
from awnet.attacks.autoattack import AutoAttack, Name, OfficialAttack
from awnet.attacks.search import APGD
from awnet.data import load_dataset

EPS = 0.1
ULP = 2.0**-24  # of float32 below 1


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return optional("torchattacks")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A plain network that classifies most digits, trained for a second."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    train = load_dataset("digits").train
    for _ in range(8):
        for x, y, _ in train.batches(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    x, y, _ = next(load_dataset("digits").test.batches(200))
    return x, y


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


def check_in_ball(x_adv: Tensor, x: Tensor, eps: float = EPS) -> None:
    assert x_adv.dtype == x.dtype
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (x_adv.double() - x.double()).abs().max() <= eps + ULP


def test_fgsm_gives_the_images_of_torchattacks(
    theirs: ModuleType, network: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    x, y = digits
    expected, actual = theirs.FGSM(network, eps=EPS)(x, y), FGSM(network, eps=EPS)(x, y)
    assert 0.05 < right(network, expected, y).double().mean() < 0.9  # an attack that decides something
    assert (actual - expected).abs().max() <= ULP
    check_in_ball(actual, x)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_pgd_without_random_start_gives_the_images_of_torchattacks(
    theirs: ModuleType, network: nn.Module, digits: tuple[Tensor, Tensor], steps: int
) -> None:
    x, y = digits
    expected = theirs.PGD(network, eps=EPS, alpha=EPS / 4, steps=steps, random_start=False)(x, y)
    actual = PGD(network, eps=EPS, step_size=EPS / 4, steps=steps, random_start=None)(x, y)
    # both round x ± eps once, elsewhere; where a gradient is close to 0 this may turn its sign, and from there
    # on an image goes another way
    same = (actual - expected).abs().flatten(1).amax(1) <= 4 * ULP
    assert same.double().mean() >= 0.95
    assert (right(network, actual, y) != right(network, expected, y)).sum() <= 1
    check_in_ball(actual, x)


def agree(counts: list[list[int]]) -> bool:
    """Whether the means of two samples of counts differ by no more than those within a sample do.

    The allowance is three standard errors of the difference, taken from both samples' spread, which is at
    least that of one image.
    """
    first, second = (torch.tensor(c, dtype=torch.double) for c in counts)
    spread = torch.stack([first.var(), second.var()]).mean().clamp(min=1.0)
    error = (2 * spread / len(first)).sqrt()
    return bool((first.mean() - second.mean()).abs() <= 3 * error)


@pytest.mark.parametrize("kind", ["pgd", "pgd of small steps", "fgsm from a random start"])
def test_random_starts_agree_within_the_noise_of_their_draws(
    theirs: ModuleType, network: nn.Module, digits: tuple[Tensor, Tensor], kind: str
) -> None:
    x, y = digits
    size, steps = {
        "pgd": (EPS / 4, 20),
        "pgd of small steps": (EPS / 10, 20),
        "fgsm from a random start": (EPS, 1),
    }[kind]
    counts: list[list[int]] = [[], []]
    for seed in range(6):
        torch.manual_seed(seed)
        expected = theirs.PGD(network, eps=EPS, alpha=size, steps=steps, random_start=True)(x, y)
        actual: Tensor
        if steps == 1:
            actual = FGSM(network, eps=EPS, random_start=True, seed=seed)(x, y)
        else:
            actual = PGD(network, eps=EPS, step_size=size, steps=steps, seed=seed)(x, y)
        check_in_ball(actual, x)
        for own, images in zip(counts, (actual, expected), strict=True):
            own.append(int(right(network, images, y).sum()))
    assert agree(counts), counts
    assert 5 < sum(counts[0]) / 6 < 190


PARTS: list[tuple[Name, Callable[[Any, nn.Module], Any]]] = [
    ("apgd_ce", lambda t, m: t.APGD(m, eps=EPS, steps=100, loss="ce", seed=0)),
    ("apgd_dlr", lambda t, m: t.APGD(m, eps=EPS, steps=100, loss="dlr", seed=0)),
    ("apgd_t", lambda t, m: t.APGDT(m, eps=EPS, steps=20, n_classes=10, seed=0)),
    ("fab_t", lambda t, m: t.FAB(m, eps=EPS, steps=10, multi_targeted=True, n_classes=10, seed=0)),
    (
        "square",
        lambda t, m: t.Square(m, eps=EPS, n_queries=300, p_init=0.8, resc_schedule=False, seed=0),
    ),
]


@pytest.mark.parametrize(("name", "make"), PARTS, ids=[name for name, _ in PARTS])
def test_parts_of_autoattack_agree_with_torchattacks(
    theirs: ModuleType,
    network: nn.Module,
    digits: tuple[Tensor, Tensor],
    name: Name,
    make: Callable[[Any, nn.Module], Any],
) -> None:
    x, y = (part[:60] for part in digits)
    expected = make(theirs, network)
    steps = getattr(expected, "steps", 100)
    actual = OfficialAttack(network, name, eps=EPS, steps=steps, queries=300)(x, y)
    check_in_ball(actual, x)
    with frozen(network):
        counts = [int(right(network, images, y).sum()) for images in (actual, expected(x, y))]
    assert counts[0] < 55
    assert abs(counts[0] - counts[1]) <= 2, counts  # the same attack from another random start


def test_apgd_agrees_with_torchattacks(
    theirs: ModuleType, network: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    x, y = digits
    for loss in ("ce", "dlr"):
        expected = theirs.APGD(network, eps=EPS, steps=50, loss=loss, seed=0)(x, y)
        actual = APGD(network, eps=EPS, steps=50, loss=loss)(x, y)  # type: ignore[arg-type]
        check_in_ball(actual, x)
        counts = [int(right(network, images, y).sum()) for images in (actual, expected)]
        assert abs(counts[0] - counts[1]) <= 4, (loss, counts)  # 2 % of the images


@pytest.mark.slow
def test_autoattack_agrees_with_torchattacks(
    theirs: ModuleType, network: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    x, y = (part[:30] for part in digits)
    expected = theirs.AutoAttack(network, eps=EPS, version="standard", n_classes=10, seed=3)(x, y)
    actual = AutoAttack(network, eps=EPS, seed=3)(x, y)
    counts = [int(right(network, images, y).sum()) for images in (actual, expected)]
    assert abs(counts[0] - counts[1]) <= 1, counts
    check_in_ball(actual, x)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: FGSM(m, eps=0.3, random_start=True),
        lambda m: PGD(m, eps=0.3, step_size=0.11, steps=4),
        lambda m: CW(m, eps=0.3, step_size=0.11, steps=4),
        lambda m: PGD(m, eps=0.3, step_size=0.11, steps=4, random_start="normal", noise_std=1.0),
    ],
    ids=["fgsm", "pgd", "cw", "normal start"],
)
def test_no_image_leaves_the_ball_by_more_than_one_ulp(
    network: nn.Module, digits: tuple[Tensor, Tensor], make: Callable[[nn.Module], Attack]
) -> None:
    x, y = digits
    x = (x * 0.97 + 0.011).contiguous()  # off the grid of levels
    check_in_ball(make(network)(x, y), x, 0.3)

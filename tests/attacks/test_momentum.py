"""MI-FGSM with DI, TI, SI and NI against literal rewrites in float64, and transfer from surrogates by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve
from torch import Tensor, nn

from awnet.attacks import MIFGSM, Suite, named_attack
from awnet.attacks.momentum import gaussian, smoothed
from awnet.attacks.norms import geometry
from awnet.cli import main
from awnet.data.threat_model import ThreatModel


class Curved(nn.Module):
    def __init__(self, side: int = 5, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, side * side, generator=generator).double())

    def forward(self, x: Tensor) -> Tensor:
        return (3 * (x.flatten(1) - 0.5) @ self.weight.to(x.dtype).T).tanh()


def batch(n: int = 4, side: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 1, side, side, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % 4


def literal(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int,
    decay: float,
    scales: int = 1,
    nesterov: bool = False,
    width: int = 1,
) -> Tensor:
    """The published loops, in L-infinity; scipy smooths the gradient."""
    x_adv, momentum, step = x.clone(), torch.zeros_like(x), eps / steps
    kernel = gaussian(width, torch.zeros(1, dtype=torch.float64)).numpy()
    for _ in range(steps):
        point = x_adv + decay * step * momentum if nesterov else x_adv
        total = torch.zeros_like(x)
        for i in range(scales):
            leaf = point.clone().requires_grad_()
            loss = -model(leaf / 2**i).log_softmax(1)[torch.arange(len(y)), y].sum()
            total += torch.autograd.grad(loss, leaf)[0]
        planes = [convolve(plane.numpy(), kernel, mode="constant") for plane in total[:, 0]]
        total = torch.from_numpy(np.stack(planes))[:, None]
        momentum = decay * momentum + total / total.abs().mean((1, 2, 3), keepdim=True)
        x_adv = x_adv + step * momentum.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 1),
        ({"decay": 0.5}, 1),
        ({"kernel": 3}, 3),
        ({"scales": 3}, 1),
        ({"nesterov": True}, 1),
        ({"nesterov": True, "scales": 2, "kernel": 5, "decay": 0.9}, 5),
    ],
)
def test_the_attack_equals_a_literal_loop(options: dict[str, object], width: int) -> None:
    model, (x, y) = Curved(), batch()
    attack = MIFGSM(model, eps=0.1, steps=6, **options)  # type: ignore[arg-type]
    rest = {name: value for name, value in options.items() if name != "kernel"}
    expected = literal(model, x, y, **{"eps": 0.1, "steps": 6, "decay": 1.0, "width": width, **rest})  # type: ignore[arg-type]
    torch.testing.assert_close(attack(x, y), expected, rtol=0, atol=1e-12)  # the same float64 operations


def test_momentum_and_smoothing_change_the_images() -> None:
    model, (x, y) = Curved(), batch()
    plain = MIFGSM(model, eps=0.1, decay=0.0)(x, y)
    for options in ({"decay": 1.0}, {"kernel": 3}, {"scales": 3}, {"diversity": 1.0}):
        attack = MIFGSM(model, eps=0.1, **{"decay": 0.0, **options})  # type: ignore[arg-type]
        assert not torch.equal(attack(x, y), plain)


def placed(image: Tensor, size: float, offset: tuple[float, float]) -> Tensor:
    """One image shrunk to ``size`` of its side, its center moved; bilinear, black outside; pixel by pixel."""
    side = image.shape[-1]
    result = torch.zeros_like(image)
    for row in range(side):
        for column in range(side):
            where = []
            for pixel, shift in ((row, offset[1]), (column, offset[0])):
                center = (2 * pixel + 1) / side - 1  # in [-1, 1]
                where.append(((center - shift) / size + 1) * side / 2 - 0.5)
            for i in range(side):
                for j in range(side):
                    share = max(0, 1 - abs(where[0] - i)) * max(0, 1 - abs(where[1] - j))
                    result[row, column] += share * image[i, j]
    return result


def test_diverse_images_are_shrunk_and_placed_by_seed_and_index() -> None:
    x, _ = batch(64)
    index = torch.arange(64) * 3
    attack = MIFGSM(Curved(), eps=0.1, diversity=0.5, shrink=0.6)
    got = attack.diverse(x, index, 2)
    same = torch.tensor([torch.allclose(a, b, atol=1e-12) for a, b in zip(got, x, strict=True)])
    assert 16 < same.sum() < 48  # binomial(64, 1/2), 4 standard deviations
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attack.diverse(x[order], index[order], 2), got[order])
    assert not torch.allclose(attack.diverse(x, index, 3), got)
    always = MIFGSM(Curved(), eps=0.1, diversity=1.0, shrink=0.6)
    white = always.diverse(torch.ones_like(x), index, 0)
    assert (white.mean((1, 2, 3)) <= 1 + 1e-12).all()
    # the area of a square of relative side 0.6 to 1; bilinear weights blur its border by half a pixel
    area = white.mean((1, 2, 3))
    assert 0.36 * 0.9 < area.min() < 0.5
    assert area.max() > 0.85
    # against sampling pixel by pixel, with the size and position read off an image of coordinates
    ramp = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
    images = torch.stack(
        [torch.ones(5, 5, dtype=torch.float64), ramp.expand(5, 5), ramp[:, None].expand(5, 5)]
    )
    index = torch.full((3,), 7)  # the same transformation for all three
    moved = always.diverse(images[:, None], index, 1)[:, 0]
    inside = (moved[0] > 1 - 1e-12).nonzero()
    (row, column), (_, last_column) = inside[0].tolist(), inside[-1].tolist()
    slope = (moved[1][row, last_column] - moved[1][row, column]) / (last_column - column)
    size = float((ramp[1] - ramp[0]) / slope)
    assert 0.6 <= size <= 1

    def center(values: Tensor, pixel: int) -> float:
        at = (2 * pixel + 1) / 5 - 1
        return at - size * float((values * 4 + 0.5) / 5 * 2 - 1)

    offset = (center(moved[1][row, column], column), center(moved[2][row, column], row))
    assert max(map(abs, offset)) <= 1 - size + 1e-9
    for image, result in zip(images, moved, strict=True):
        torch.testing.assert_close(result, placed(image, size, offset), rtol=0, atol=1e-9)


def test_smoothing_is_a_convolution_with_a_gaussian() -> None:
    kernel = gaussian(5, torch.zeros(1, dtype=torch.float64))
    ratio = kernel[2, 3] / kernel[2, 2]
    assert float(ratio) == pytest.approx(np.exp(-0.5 * (6 / 5) ** 2))
    assert float(kernel.sum()) == pytest.approx(1)
    gradient = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [
        [convolve(plane.numpy(), kernel.numpy(), mode="constant") for plane in image] for image in gradient
    ]
    np.testing.assert_allclose(smoothed(gradient, kernel), np.array(expected), atol=1e-12)
    widths = {299: 15, 224: 11, 64: 3, 32: 3, 28: 3, 8: 1}
    attack = MIFGSM(Curved(), eps=0.1, kernel=None)
    for side, width in widths.items():
        assert attack.kernel_width(torch.zeros(1, 1, side, side)) == width


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_images_stay_in_the_ball_and_raise_the_loss_in_every_norm(norm: str) -> None:
    model, (x, y) = Curved(), batch(8)
    y = model(x).argmax(1)
    eps = {"Linf": 0.1, "L2": 0.4, "L1": 1.5}[norm]
    attack = MIFGSM(model, eps=eps, norm=norm, diversity=0.5, kernel=3, scales=2, nesterov=True)
    x_adv = attack(x, y)
    assert geometry(norm).inside(x_adv, x, eps).all()
    loss = nn.CrossEntropyLoss(reduction="none")
    assert (loss(model(x_adv), y) > loss(model(x), y)).float().mean() > 0.8
    targeted = MIFGSM(model, eps=eps, norm=norm, target="least_likely")
    goal = targeted.goals(x, y, index=torch.arange(8))
    assert (loss(model(targeted(x, y)), goal) < loss(model(x), goal)).float().mean() > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 4}, "kernel must be odd, got 4"),
        ({"diversity": 1.5}, r"diversity must be in \[0, 1\]"),
        ({"shrink": 0.0}, r"shrink must be in \(0, 1\]"),
        ({"scales": 0}, "scales must be at least 1"),
        ({"decay": -1.0}, "decay must be finite and at least 0"),
    ],
)
def test_mi_fgsm_refuses_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MIFGSM(Curved(), eps=0.1, **options)  # type: ignore[arg-type]


def test_transfer_by_name_replays_the_surrogates_images() -> None:
    x, y = batch(8)
    x = x.float()
    model, surrogate = Curved(seed=0).float(), Curved(seed=1).float()
    y = model(x).argmax(1)
    threat, suite = ThreatModel(0.3), Suite(classes=4, surrogates={"other": surrogate})
    attack = named_attack("transfer-mi_di_ti", model, threat, suite=suite)
    assert list(attack.members) == ["other"]
    source = named_attack("mi_di_ti", surrogate, threat, suite=suite)
    torch.testing.assert_close(attack(x, y)[y == model(x).argmax(1)], source(x, y))
    with pytest.raises(ValueError, match="transfer-mi_fgsm needs models to make its images on: give --surr"):
        named_attack("transfer-mi_fgsm", model, threat)
    for name in ("transfer-luck", "transfer-transfer-cw", "transfer-"):
        with pytest.raises(ValueError, match="replays an attack's images from --surrogates"):
            named_attack(name, model, threat, suite=suite)


CODE = """
import torch
from torch import nn

def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4))

def other():
    return net(1)
"""


def test_the_command_line_evaluates_transfer_from_surrogates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4)).astype(np.uint8)
    np.savez("test.npz", images=pixels, labels=np.arange(20) % 4)
    Path("net_of_momentum_test.py").write_text(CODE)
    words = ["net_of_momentum_test.py:net", "--data", "test.npz", "--eps", "0.2", "--device", "cpu"]
    attacks = ["--attacks", "mi_fgsm", "transfer-mi_di_ti", "transfer-pgd_sat"]
    assert main(["evaluate", *words, *attacks, "--surrogates", "net_of_momentum_test.py:other"]) == 0
    folder = Path("runs/net_of_momentum_test.py-net/evaluations/default")
    stored = json.loads((folder / "report.json").read_text())["attacks"]
    assert list(stored["transfer-mi_di_ti"]["settings"]["members"]) == ["net_of_momentum_test.py-other"]
    assert stored["mi_fgsm"]["robust_accuracy"] <= stored["transfer-mi_di_ti"]["robust_accuracy"]
    capsys.readouterr()
    assert main(["evaluate", *words, *attacks]) != 0
    assert "give --surrogates" in capsys.readouterr().err
    out = ["--attack", "si_ni_di_ti", "--out", "images.npz"]
    assert main(["attack", "net_of_momentum_test.py:other", *words[1:], *out]) == 0
    settings = json.loads(str(np.load("images.npz")["provenance"]))["settings"]
    assert (settings["scales"], settings["nesterov"], settings["diversity"]) == (5, True, 0.5)

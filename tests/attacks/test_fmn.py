"""FMN: exact distances of linear models in every norm, a literal loop in float64, and its results in a report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.user_network import write_user_network
from torch import Tensor, nn

from awnet.attacks import FMN, named_attack
from awnet.attacks.norms import geometry
from awnet.cli import main
from awnet.data.dataset import from_arrays
from awnet.data.threat_model import ThreatModel
from awnet.evaluation import Report, evaluate
from awnet.evaluation.results import accuracy_curve
from awnet.evaluation.statistics import wilson_interval


class Linear(nn.Module):
    def __init__(self, classes: int = 5, curved: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, 16, generator=generator).double())
        self.curved = curved

    def forward(self, x: Tensor) -> Tensor:
        z = (x.flatten(1) - 0.5) @ self.weight.to(x.dtype).T
        return z.tanh() + 0.1 * z if self.curved else z


def batch(model: nn.Module, n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 0.35 + 0.3 * torch.rand(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, model(x).argmax(1)


def exact_distance(model: Linear, x: Tensor, y: int, norm: str) -> float:
    """The smallest perturbation of one image, ignoring the box: the nearest of K - 1 hyperplanes."""
    weight, z = model.weight.detach(), model(x[None])[0].detach()
    distances = []
    for k in range(len(z)):
        if k != y:
            gap = weight[y] - weight[k]
            dual = {"Linf": gap.abs().sum(), "L2": gap.norm(), "L1": gap.abs().max()}[norm]
            distances.append(float((z[y] - z[k]) / dual))
    return min(distances)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_distances_to_a_linear_model_are_exact(norm: str) -> None:
    model = Linear()
    x, y = batch(model)
    attack = FMN(model, eps=0.1, norm=norm, steps=400)
    attack(x, y)
    exact = torch.tensor(
        [exact_distance(model, image, int(label), norm) for image, label in zip(x, y, strict=True)]
    )
    # with the box, the L1 perturbation of one pixel may have to use a second one
    if norm == "L1":
        room = torch.minimum(x, 1 - x).flatten(1).amin(1)
        fits = exact < room
        assert fits.sum() >= 3
        exact, distances = exact[fits], attack.distances[fits]
    else:
        distances = attack.distances
    assert (distances >= exact * (1 - 1e-9)).all()
    assert (distances <= exact * 1.001).all()  # γ ends at 0.001


def literal(model: nn.Module, x: Tensor, y: int, steps: int) -> tuple[float, Tensor]:
    """FMN of one image in L-infinity, step by step as published."""
    delta, best, best_size, eps = torch.zeros_like(x), torch.zeros_like(x), np.inf, np.inf
    for k in range(steps):
        share = (1 + np.cos(np.pi * k / steps)) / 2
        gamma, alpha = 0.001 + (0.05 - 0.001) * share, 0.01 + (1 - 0.01) * share
        point = (x + delta).requires_grad_()
        z = model(point[None])[0]
        loss = z[y] - max(z[j] for j in range(len(z)) if j != y)
        gradient = torch.autograd.grad(loss, point)[0]
        size = float(delta.abs().max())
        if loss < 0:
            if size < best_size:
                best, best_size = delta, size
            eps = min(eps * (1 - gamma), best_size)
        elif best_size < np.inf:
            eps = eps * (1 + gamma)
        else:
            eps = 1.001 * (size + float(loss.detach()) / float(gradient.abs().sum()))
        delta = delta - alpha * gradient / gradient.norm()
        delta = (x + delta.clamp(-eps, eps)).clamp(0, 1) - x
    return best_size, x + best


def test_the_published_search_takes_the_second_largest_logit_and_may_miss_the_nearest_class() -> None:
    model = Linear()
    x, y = batch(model)
    both, published = FMN(model, eps=0.1, steps=60), FMN(model, eps=0.1, steps=60, targets=0)
    both(x, y)
    published(x, y)
    assert (both.distances <= published.distances).all()
    assert (both.distances < 0.8 * published.distances).any()


def test_the_search_equals_a_literal_loop() -> None:
    model = Linear(curved=True)
    x, y = batch(model, 4)
    attack = FMN(model, eps=1.0, steps=25, targets=0)
    x_adv = attack(x, y)
    for row in range(4):
        size, expected = literal(model, x[row], int(y[row]), 25)
        assert float(attack.distances[row]) == pytest.approx(size, rel=1e-9)
        torch.testing.assert_close(x_adv[row], expected, rtol=0, atol=1e-12)  # the same float64 operations


def test_fmn_returns_perturbations_within_eps_and_else_the_clean_image() -> None:
    model = Linear()
    x, y = batch(model)
    y = y.clone()
    y[0] = (y[0] + 1) % 5  # misclassified without an attack
    attack = FMN(model, eps=0.01, steps=50)
    x_adv = attack(x, y)
    assert attack.distances[0] == 0
    within = attack.distances <= 0.01
    assert 1 < within.sum() < len(x)
    assert torch.equal(model(x_adv).argmax(1) != y, within)
    assert torch.equal(x_adv[~within], x[~within])
    sizes = geometry("Linf").size(x_adv - x)
    torch.testing.assert_close(sizes[within], attack.distances[within])

    class Constant(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * super().forward(x) + torch.arange(5.0, dtype=x.dtype)

    constant = FMN(Constant(), eps=0.1, steps=5)
    assert torch.equal(constant(x, torch.full_like(y, 4)), x)
    assert constant.distances.isinf().all()
    none = FMN(model, eps=0.1, steps=0)
    assert torch.equal(none(x, y), x)


def test_the_curve_counts_larger_distances() -> None:
    distances = np.array([0.0, 0.1, 0.1, 0.25, np.inf])
    curve = accuracy_curve(distances, 0.1, "L2")
    eps = np.array(curve["eps"])
    assert 0.1 in curve["eps"]
    assert eps[0] == 0
    assert eps[-1] >= 0.25
    assert (np.diff(eps) > 0).all()
    for size, accuracy, low, high in zip(eps, curve["accuracy"], curve["low"], curve["high"], strict=True):
        count = int((distances > size).sum())
        assert accuracy == count / 5
        assert (low, high) == wilson_interval(count, 5)
    assert (curve["median"], curve["not_found"], curve["norm"]) == (pytest.approx(0.175), 1, "L2")
    assert accuracy_curve(np.array([np.inf, np.inf]), 0.1, "Linf")["median"] is None
    assert accuracy_curve(np.array([0.0]), 0.1, "Linf")["accuracy"][0] == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps must be an integer of at least 0"),
        ({"gamma": 1.5}, ValueError, "gamma must be at most 1"),
        ({"step_size": -1.0}, ValueError, "step_size must be finite and at least 0"),
        ({"norm": "L0"}, ValueError, "norm must be one of Linf, L2, L1"),
    ],
)
def test_fmn_refuses_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FMN(Linear(), **{"eps": 0.1, **options})  # type: ignore[arg-type]


class Interrupted(Exception):
    pass


class Limited(nn.Module):
    def __init__(self, calls: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight, self.left = nn.Parameter(torch.randn(4, 16, generator=generator)), calls

    def forward(self, x: Tensor) -> Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Interrupted
        return x.flatten(1) @ self.weight.T


def test_an_interrupted_evaluation_resumes_to_the_same_distances(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 1, 4, 4)).astype(np.uint8)
    data = from_arrays(pixels, np.arange(12) % 4, split="test", eps=0.1)
    options = {"attacks": ["fmn"], "budget": "smoke", "batch_size": 4}
    whole = evaluate(Limited(), data, **options)  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        evaluate(Limited(calls=120), data, out=tmp_path, **options)  # type: ignore[arg-type]
    model = Limited(calls=140)  # fewer than all three batches need
    parts = evaluate(model, data, out=tmp_path, **options)  # type: ignore[arg-type]
    assert np.array_equal(parts.per_sample["fmn_distance"], whole.per_sample["fmn_distance"])
    assert parts.accuracy_by_eps == whole.accuracy_by_eps


def test_a_report_has_the_accuracy_at_every_eps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, _, x, labels = write_user_network("net_of_fmn_test.py")
    words = [
        "net_of_fmn_test.py:net",
        "--data",
        "test.npz",
        "--eps",
        "0.1",
        "--device",
        "cpu",
        "--batch-size",
        "8",
    ]
    assert main(["evaluate", *words, "--attacks", "fgsm", "fmn", "--budget", "short"]) == 0
    assert "fmn: median of the smallest perturbations in L-infinity: 0." in " ".join(
        capsys.readouterr().out.split()
    )
    folder = Path("runs/net_of_fmn_test.py-net/evaluations/default")
    report = Report.load(folder)
    curve = report.accuracy_by_eps["fmn"]
    assert json.loads((folder / "report.json").read_text())["accuracy_by_eps"]["fmn"] == curve
    attack = named_attack("fmn", model, ThreatModel(0.1))
    attack.steps = 200
    attack(x, labels)
    np.testing.assert_allclose(report.per_sample["fmn_distance"], attack.distances, rtol=1e-4)
    at_eps = curve["accuracy"][curve["eps"].index(0.1)]
    assert at_eps == report.attacks["fmn"].robust_accuracy
    assert curve["accuracy"][0] == report.clean_accuracy == 0.9
    assert (
        curve["accuracy"][-1] < at_eps <= report.attacks["fgsm"].robust_accuracy
    )  # exact for a linear model
    page = (folder / "report.html").read_text()
    assert "Smallest perturbations" in page
    assert (folder / "accuracy_by_eps.png").stat().st_size > 5000

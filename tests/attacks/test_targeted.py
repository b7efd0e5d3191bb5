"""Targeted attacks and MALT: closed forms on linear models, literal loops in float64, and bad options."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.user_network import write_user_network
from torch import Tensor, nn

from awnet.attacks import CW, FGSM, MALT, PGD, FilteredAttack, Suite, TargetedAPGD, named_attack
from awnet.attacks.filtered import filtered
from awnet.cli import main
from awnet.data.dataset import from_arrays
from awnet.data.threat_model import ThreatModel
from awnet.evaluation import Report, evaluate
from awnet.evaluation.tables import attack_label

CLASSES = 6


class Linear(nn.Module):
    def __init__(self, classes: int = CLASSES, pixels: int = 16, scale: Tensor | float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, pixels, generator=generator).double() * scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.to(x.dtype).T


class Curved(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (3 * super().forward(x)).tanh() + 0.1 * super().forward(x)


def batch(model: nn.Module, n: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 0.3 + 0.4 * torch.rand(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, model(x).argmax(1), torch.arange(n) * 7 + 3


def literal(model: nn.Module, x: Tensor, goal: Tensor, loss: str, eps: float, step: float, n: int) -> Tensor:
    """Targeted PGD from x itself: descends the cross-entropy with the goal, or ascends the goal's margin."""
    x_adv, rows = x.clone(), torch.arange(len(x))
    for _ in range(n):
        point = x_adv.clone().requires_grad_()
        z = model(point)
        if loss == "ce":
            value = z.log_softmax(1)[rows, goal].sum()
        else:
            others = z.clone()
            others[rows, goal] = -np.inf
            value = (z[rows, goal] - others.max(1).values).sum()
        x_adv = x_adv + step * torch.autograd.grad(value, point)[0].sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_targeted_pgd_equals_a_literal_loop(loss: str) -> None:
    model = Curved()
    x, y, index = batch(model)
    goal = (y + 1) % CLASSES
    targets = torch.zeros(100, dtype=torch.int64)
    targets[index] = goal
    targets[index[0]] = y[0]  # not attacked
    attack = PGD(model, eps=0.1, step_size=0.02, steps=6, loss=loss, random_start=None, target=targets)
    got = attack(x, y, index=index)
    expected = literal(model, x, goal, loss, 0.1, 0.02, 6)
    torch.testing.assert_close(got[1:], expected[1:], rtol=0, atol=1e-12)  # the same float64 operations
    assert torch.equal(got[0], x[0])
    assert torch.equal(attack.goals(x, y, index=index)[1:], goal[1:])


def test_targets_are_random_least_likely_or_given_classes() -> None:
    model = Curved()
    x, y, index = batch(model, 64)
    least = FGSM(model, eps=0.1, target="least_likely").goals(x, y, index=index)
    assert torch.equal(least, model(x).argmin(1))  # y is the most likely class
    worst = model(x).argmin(1)
    second = model(x).scatter(1, worst[:, None], torch.inf).argmin(1)
    assert torch.equal(FGSM(model, eps=0.1, target="least_likely").goals(x, worst, index=index), second)
    drawn = FGSM(model, eps=0.1, target="random", seed=2).goals(x, y, index=index)
    assert not (drawn == y).any()
    assert set(((drawn - y) % CLASSES).tolist()) == set(range(1, CLASSES))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    other = PGD(model, eps=0.1, step_size=0.1, steps=1, target="random", seed=2)
    assert torch.equal(other.goals(x[order], y[order], index=index[order]), drawn[order])  # keyed by sample
    assert torch.equal(FGSM(model, eps=0.1, target=4).goals(x, y, index=index), torch.full_like(y, 4))


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_targeted_apgd_reaches_the_target_of_a_linear_model_and_not_below_its_distance(
    norm: str, loss: str
) -> None:
    model = Linear(classes=4)
    x, y, index = batch(model, 6)
    goal = (y + 1) % 4
    for image, label, target, number in zip(x, y, goal, index, strict=True):
        gap = model.weight[label] - model.weight[target]
        z = model(image[None])[0]
        dual = {"Linf": gap.abs().sum(), "L2": gap.norm(), "L1": gap.abs().max()}[norm]
        distance = float(
            (z.detach()[label] - z.detach()[target]) / dual.detach()
        )  # to predict the target rather than the label
        below = TargetedAPGD(model, eps=0.97 * distance, norm=norm, target=int(target), loss=loss, steps=30)
        x_adv = below(image[None], label[None], index=number[None])
        assert model(x_adv).argmax(1) != target
    above = TargetedAPGD(
        model, eps=3.0 if norm == "L1" else 0.6, norm=norm, target="least_likely", loss=loss, steps=30
    )
    reached = model(above(x, y, index=index)).argmax(1) == above.goals(x, y, index=index)
    assert reached.float().mean() > 0.6
    untargeted = model(named_attack("pgd_sat", model, ThreatModel(0.1))(x, y)).argmax(1)
    assert (untargeted != y).any()


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_malt_ranks_the_classes_of_a_linear_model_by_their_exact_distance(norm: str) -> None:
    scale = torch.linspace(0.2, 3, 12, dtype=torch.float64)[:, None]  # so that logits and distances disagree
    model = Linear(classes=12, scale=scale)
    x, y, _ = batch(model, 5)
    attack = MALT(model, eps=0.1, norm=norm, candidates=7)
    classes, distances = attack.ranking(x, y, 11)
    assert classes.shape == distances.shape == (5, 7)
    disagree = False
    for row in range(5):
        z, weight = model(x[row : row + 1])[0].detach(), model.weight.detach()
        candidates = [k for k in z.argsort(descending=True).tolist() if k != y[row]][:7]
        exact = {}
        for k in candidates:
            gap = weight[y[row]] - weight[k]
            dual = {"Linf": gap.abs().sum(), "L2": gap.norm(), "L1": gap.abs().max()}[norm]
            exact[k] = float((z[y[row]] - z[k]) / dual)
        order = sorted(candidates, key=exact.__getitem__)
        assert classes[row].tolist() == order
        assert distances[row].tolist() == pytest.approx([exact[k] for k in order], rel=1e-9)
        disagree = disagree or order != candidates
    assert disagree


def test_malt_breaks_an_image_with_one_target_at_the_distance_of_its_nearest_class() -> None:
    model = Linear(classes=12, scale=torch.linspace(0.2, 3, 12, dtype=torch.float64)[:, None])
    x, y, index = batch(model, 20)
    _, distances = MALT(model, eps=0.1).ranking(x, y, 11)
    assert (distances[:, 0] <= distances[:, 1]).all()
    eps = float(distances[:, 0].median())
    x_adv = MALT(model, eps=eps * 1.02, targets=1, steps=30)(x, y, index=index)
    broken = model(x_adv).argmax(1) != y
    assert broken[distances[:, 0] < eps].all()  # the ball of a linear model is exact in L-infinity
    assert not broken[distances[:, 0] > 1.03 * eps].any()
    assert torch.equal(MALT(model, eps=0.1, targets=0)(x, y), x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: FGSM(m, eps=0.1, target="likely"), ValueError, "target must be 'random', 'least_likely'"),
        (lambda m: FGSM(m, eps=0.1, target=-1), ValueError, "target must be an integer of at least 0"),
        (lambda m: FGSM(m, eps=0.1, target=2.5), TypeError, "target must be an integer"),
        (lambda m: FGSM(m, eps=0.1, target=torch.zeros(3)), ValueError, "target must be int64"),
        (lambda m: TargetedAPGD(m, eps=0.1, target=None), ValueError, "target must be 'random'"),
        (lambda m: TargetedAPGD(m, eps=0.1, target=1, loss="kl"), ValueError, "loss must be 'ce' or 'dlr'"),
        (
            lambda m: PGD(m, eps=0.1, step_size=0.1, steps=1, loss="kl", target="random"),
            ValueError,
            "target needs loss 'ce' or 'margin'",
        ),
        (lambda m: MALT(m, eps=0.1, targets=-1), ValueError, "targets must be an integer of at least 0"),
        (lambda m: named_attack("cw-unlikely", m, ThreatModel(0.1)), ValueError, "or a targeted form"),
        (lambda m: named_attack("aa-random", m, ThreatModel(0.1)), ValueError, "unknown attack 'aa-random'"),
        (
            lambda m: named_attack("cw-6", m, ThreatModel(0.1), suite=Suite(classes=6)),
            ValueError,
            "cw-6: the model has 6 classes",
        ),
    ],
)
def test_targeted_attacks_refuse_bad_options(make, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        make(Linear())


def test_targets_that_do_not_fit_the_images_or_the_model_are_refused() -> None:
    model = Linear()
    x, y, index = batch(model)
    with pytest.raises(ValueError, match="target must be below the model's 6 classes, got 9"):
        FGSM(model, eps=0.1, target=9)(x, y)
    with pytest.raises(ValueError, match="an image's index is 52"):
        FGSM(model, eps=0.1, target=torch.zeros(52, dtype=torch.int64))(x, y, index=index)


def test_a_filter_leaves_targeted_attacks_whole() -> None:
    model = Linear()
    targeted = CW(model, eps=0.1, step_size=0.02, target="random")
    assert filtered(targeted, targeted) is targeted
    plain = CW(model, eps=0.1, step_size=0.02)
    assert isinstance(filtered(plain, plain), FilteredAttack)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("cw", "CW"),
        ("pgd_sat-least_likely", "PGD sat to least likely"),
        ("fgsm-3", "FGSM to 3"),
        ("transfer-mi_di_ti", "transfer, mi di ti"),
        ("transfer-cw-random", "transfer, CW to random"),
        ("my-attack", "my-attack"),
    ],
)
def test_labels_of_targeted_and_transferred_attacks(name: str, label: str) -> None:
    assert attack_label(name) == label


def test_the_report_has_the_success_beside_the_robust_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, pixels, x, labels = write_user_network("net_of_targeted_test.py")
    words = ["net_of_targeted_test.py:net", "--data", "test.npz", "--eps", "0.2", "--device", "cpu"]
    names = ["pgd_sat-least_likely", "fgsm-2", "malt"]
    assert main(["evaluate", *words, "--attacks", *names, "--budget", "smoke"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    folder = Path("runs/net_of_targeted_test.py-net/evaluations/default")
    stored = json.loads((folder / "report.json").read_text())["attacks"]
    data = from_arrays(pixels[:, None], labels.numpy(), split="test", eps=0.2)
    for name, count in (("pgd_sat-least_likely", 30), ("fgsm-2", int((labels != 2).sum()))):
        attack = named_attack(name, model, data.threat_model, suite=Suite(classes=4))
        prediction = model(attack(x, labels)).argmax(1)
        goal = attack.goals(x, labels, index=torch.arange(30))
        reached = (prediction == goal)[goal != labels].double().mean().item()
        success = stored[name]["target_success"]
        assert 0 < reached <= 1
        assert (success["rate"], success["n"]) == (pytest.approx(reached), count)
        assert stored[name]["robust_accuracy"] == (prediction == labels).double().mean().item()
        assert f"{name}: the target is reached for {100 * reached:.1f} %" in printed
    assert "target_success" not in stored["malt"]
    assert Report.load(folder).attacks["fgsm-2"].target_success == stored["fgsm-2"]["target_success"]
    page = (folder / "report.html").read_text()
    assert "target reached" in page
    assert "PGD sat to least likely" in page
    assert main(["attack", *words, "--attack", "cw-random", "--out", "images.npz"]) == 0
    assert json.loads(str(np.load("images.npz")["provenance"]))["settings"]["target"] == "random"
    assert main(["evaluate", *words, "--attacks", "pgd_sat-9"]) != 0
    assert "pgd_sat-9: the model has 4 classes, numbered from 0" in capsys.readouterr().err
    assert evaluate(model, data, ["fgsm"]).attacks["fgsm"].target_success == {}

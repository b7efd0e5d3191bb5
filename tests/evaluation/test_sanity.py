"""The union, the sanity table and detection within an evaluation, on networks known to be broken or honest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.broken_defenses import EPS, Gated, HardGated, Honest, Masked, Valley, images
from torch import Tensor, nn

from awnet.attacks import PGD, Attack, Suite, named_attack
from awnet.evaluation import (
    Report,
    auc,
    auc_interval,
    compare,
    detection,
    evaluate,
    roc_curve,
    sanity_table,
    w_robust_table,
)

ATTACKS = ["fgsm", "pgd_sat", "aa", "union"]
SUITE = Suite(classes=4, budget="smoke")


def smoke(model: nn.Module, attacks: object = ATTACKS, **options: object) -> Report:
    return evaluate(model, images(), attacks, budget="smoke", batch_size=12, **options)


# ---- the sanity table


@pytest.mark.parametrize(
    ("model", "lines"),
    [
        (Masked(), {"the loss has a gradient", "accuracy falls to 0 as eps grows"}),
        (Valley(), {"more steps of PGD do not help much beyond 20, and never hurt"}),
        (Gated(), {"the router's p lets gradients through"}),
        (HardGated(), {"the router's p lets gradients through"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_broken_defenses_are_suspicious(model: nn.Module, lines: set[str]) -> None:
    actual, curves = sanity_table(model, images(), SUITE)
    assert lines <= {check.check for check in actual if check.result == "suspicious"}
    assert len(actual) == (8 if hasattr(model, "route") else 7)
    assert curves["loss_against_steps"]["steps"] == [5, 20, 100]
    assert len(curves["accuracy_against_eps"]["eps"]) == len(curves["accuracy_against_eps"]["accuracy"])
    assert all(check.evidence for check in actual)


def test_an_honest_network_passes() -> None:
    actual, curves = sanity_table(Honest(), images(), SUITE)
    assert [(check.check, check.evidence) for check in actual if check.result != "pass"] == []
    shares = curves["accuracy_against_eps"]["accuracy"]
    assert (shares[0], shares[1], shares[-1]) == (1, 1, 0)
    assert "p_clean" not in curves


class Coupled(Honest):
    """A model whose logits depend on the batch, or are random."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if self.how == "batch":
            return logits + 0.1 * logits.mean(0)
        return logits + 0.01 * torch.randn_like(logits)


@pytest.mark.parametrize("how", ["batch", "chance"])
def test_logits_that_depend_on_more_than_the_image_are_suspicious(how: str) -> None:
    torch.manual_seed(0)
    actual, _ = sanity_table(Coupled(how), images(), SUITE)
    line = next(check for check in actual if "logits are the same" in check.check)
    assert line.result == "suspicious"


def test_a_black_box_attack_that_beats_white_box_attacks_is_suspicious() -> None:
    class Steps(Masked):
        """A staircase: no gradient anywhere, but differences that queries see."""

        scale = 1.0

        def score(self, x: Tensor) -> Tensor:
            return (200 * self.weak(x)).round() / 200 + 0 * self.weak(x)

    actual, _ = sanity_table(Steps(), images(), SUITE)
    results = {check.check: check.result for check in actual}
    assert results["white-box attacks are no weaker than black-box ones"] == "suspicious"
    assert results["the loss has a gradient"] == "suspicious"
    suite = Suite(classes=4, budget="smoke", surrogates={"weak": Masked()})
    actual, _ = sanity_table(Steps(), images(), suite)
    assert "transfer from weak 100.0 %" in next(c for c in actual if "black-box" in c.check).evidence


# ---- the union in a report


@pytest.mark.parametrize("model", [Masked(), Valley(), Gated(), HardGated()], ids=lambda m: type(m).__name__)
def test_the_headline_of_a_report_is_the_union(model: nn.Module) -> None:
    report = smoke(model)
    assert report.attacks["pgd_sat"].robust_accuracy > 0.9
    assert report.union.robust_accuracy == 0
    assert report.union.w_robust_accuracy == 0.5
    assert report.union.robust_accuracy <= min(a.robust_accuracy for a in report.attacks.values())
    assert sum(report.union.broken_first_by.values()) == round(24 * report.clean_accuracy)
    assert any(line["result"] == "suspicious" for line in report.sanity)
    assert any("suspicious in the sanity table" in flag for flag in report.flags)
    assert any("smoke budget" in flag for flag in report.flags)
    if isinstance(model, Gated):
        assert report.attacks["aa"].robust_accuracy > 0.5
        assert any("beyond AutoAttack" in flag for flag in report.flags)
        assert set(report.union.broken_first_by) & {"joint", "two_phase"}


def test_the_report_of_an_honest_network_has_no_warning() -> None:
    report = smoke(Honest())
    assert report.union.robust_accuracy == report.attacks["aa"].robust_accuracy == 1
    assert report.union.broken_first_by == {}
    assert [flag for flag in report.flags if "smoke budget" not in flag] == []


def test_union_starts_from_the_other_attacks() -> None:
    class Sure(Attack):
        """Knows the answer for the first ten images."""

        def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
            low, high = (x - self.eps).clamp(min=0), (x + self.eps).clamp(max=1)
            worse = torch.where(y[:, None, None, None] == 0, low, high)
            return torch.where(index[:, None, None, None] < 10, worse, x)

    model, data = Masked(), images()
    union = named_attack("union", model, data.threat_model, suite=SUITE)
    report = smoke(model, {"sure": Sure(model, eps=EPS), "union": union})
    assert report.union.broken_first_by["sure"] == 10
    assert sum(report.union.broken_first_by.values()) == 24
    assert "pgd_sat" not in report.union.broken_first_by
    worst = report.per_sample["union_correct"]
    assert not worst.any()
    assert (report.per_sample["union_broken_by"] >= 0).all()
    with pytest.raises(TypeError, match=r"attacks\['union'\] must be a Cascade"):
        smoke(model, {"union": PGD(model, eps=EPS, step_size=0.1, steps=1)})


@pytest.mark.usefixtures("undrawn")
def test_the_report_of_a_union_is_restored_from_disk(tmp_path: Path) -> None:
    report = smoke(Gated(), out=tmp_path, name="whole")
    folder = tmp_path / "evaluations" / "whole"
    assert not (folder / "state").exists()
    actual = json.loads((folder / "report.json").read_text())
    assert set(actual["union"]) >= {"robust_accuracy", "w_robust_accuracy", "interval_95", "broken_first_by"}
    assert set(actual["union"]["settings"]["members"]) >= {"aa", "joint", "forced", "softened"}
    assert actual["union"]["settings"]["after"] == ["fgsm", "pgd_sat", "aa"]
    assert set(actual["sanity"][0]) == {"check", "result", "evidence"}
    assert "AutoAttack is not far from the union" in actual["sanity"][-1]["check"]
    assert "broken_first_by" not in actual["attacks"]["fgsm"]
    assert Report.load(folder).to_dict() == report.to_dict()
    static = smoke(Honest())
    difference = compare(report, static).attacks["union"]
    assert difference.difference == -0.5
    w_robust_table({"gated": report, "honest": static})


def test_autoattacks_warnings_reach_the_report() -> None:
    class Flat(Masked):
        scale = 1.0

        def score(self, x: Tensor) -> Tensor:
            return self.weak(x).sign() + 0 * self.weak(x)

    report = smoke(Flat(), ["aa"])
    assert report.attacks["aa"].warnings["zero_gradients"] >= 24
    assert any("no gradient at" in flag for flag in report.flags)
    assert report.to_dict()["attacks"]["aa"]["warnings"] == report.attacks["aa"].warnings
    assert report.union is None
    assert report.sanity == []


# ---- going on after an interruption


class Stopped(Exception):
    pass


@pytest.mark.usefixtures("undrawn")
def test_interrupted_evaluation_gives_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from awnet.attacks.saved import Saved

    save = Saved.save
    writes = 0

    def counted(self: Saved, *args: object) -> None:
        nonlocal writes
        save(self, *args)
        writes += 1
        if writes == stop:
            raise Stopped

    monkeypatch.setattr(Saved, "save", counted)
    stop, options = -1, {"attacks": ["fgsm", "square", "union"], "seed": 3}
    expected = smoke(Gated(), out=tmp_path, name="whole", **options)
    total, folder = writes, tmp_path / "evaluations" / "broken"
    assert total > 12
    sessions = 0
    while True:
        writes, stop = 0, total // 4
        sessions += 1
        try:
            report = smoke(Gated(), out=tmp_path, name="broken", **options)
            break
        except Stopped:
            assert any(folder.glob("state/*/*.safetensors"))
            assert not (folder / "report.json").exists()
    assert sessions > 3
    assert report.to_dict() == expected.to_dict()
    for name, values in expected.per_sample.items():
        assert np.array_equal(report.per_sample[name], values), name
    assert not (folder / "state").exists()


def test_the_state_of_another_model_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = smoke(Honest(), ["pgd_sat", "aa"])

    def stop(*args: object, **options: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("awnet.evaluation.summarize.filter_means", stop)
        with pytest.raises(Stopped):
            smoke(Masked(), ["pgd_sat", "aa"], out=tmp_path)
    state = tmp_path / "evaluations" / "default" / "state"
    assert len(list(state.iterdir())) == 1
    assert smoke(Honest(), ["pgd_sat", "aa"], out=tmp_path).attacks == expected.attacks
    assert not state.exists()


# ---- detection


def test_detection_figures_equal_values_by_hand() -> None:
    generator = np.random.default_rng(0)
    clean, attacked = generator.normal(1, 1, 60), generator.normal(0, 1, 60)
    correct = np.arange(60) < 20
    per_sample = {
        "clean_type_score": clean,
        "clean_correct": np.arange(60) < 50,
        "pgd_type_score": attacked,
        "pgd_correct": correct,
        "pgd_rounded_type_score": attacked + 1,
        "uniform_noise_type_score": clean,
        "sign_noise_type_score": attacked,
    }
    actual = detection(per_sample, ["pgd"])
    assert actual["pgd"]["auc"] == auc(clean, attacked)
    assert actual["pgd"]["successful"]["n"] == 30
    assert actual["pgd"]["successful"]["auc"] == auc(clean, attacked[20:50])
    assert actual["pgd"]["rounded"]["auc"] == auc(clean, attacked + 1)
    assert actual["uniform_noise"]["auc"] == pytest.approx(0.5, abs=1e-12)
    low, high = actual["pgd"]["interval_95"]
    assert low < actual["pgd"]["auc"] < high
    nothing = detection(per_sample | {"pgd_correct": per_sample["clean_correct"]}, ["pgd"])
    assert "successful" not in nothing["pgd"]


def test_auc_interval_equals_resampling_by_index() -> None:
    generator = np.random.default_rng(1)
    clean, attacked = generator.integers(0, 12, 40), generator.integers(0, 8, 30)

    def drawn() -> float:
        a, b = generator.choice(clean, (40, 1)), generator.choice(attacked, 30)
        return float(((a > b) + 0.5 * (a == b)).mean())

    expected = np.quantile([drawn() for _ in range(2000)], [0.025, 0.975])
    # a quantile of 2000 resamples whose spread is 0.06 is known to about 0.003
    assert np.allclose(auc_interval(clean, attacked, resamples=4000), expected, atol=0.012)
    assert auc_interval([1, 2], [0, 0.5]) == (1.0, 1.0)
    assert auc_interval(clean, attacked) == auc_interval(clean, attacked)


def test_roc_curve_encloses_the_auc() -> None:
    generator = np.random.default_rng(2)
    clean, attacked = generator.normal(1, 1, 500), generator.normal(0, 1, 400)
    curve = roc_curve(clean, attacked, points=100)
    assert (curve.false_clean[0], curve.true_clean[0]) == (0, 0)
    assert (curve.false_clean[-1], curve.true_clean[-1]) == (1, 1)
    assert len(curve.false_clean) <= 100
    area = np.trapezoid(curve.true_clean, curve.false_clean)
    assert area == pytest.approx(auc(clean, attacked), abs=0.01)  # 100 of some 400 corners


def test_a_router_that_detects_the_8_bit_grid_is_flagged() -> None:
    class KnowsTheGrid(Honest):
        """Calls an image clean if its pixels are whole levels of 16."""

        def route(self, x: Tensor) -> object:
            from awnet.nn import Routing

            off = (16 * x - (16 * x).round()).abs().mean((1, 2, 3))
            return Routing(torch.stack([off, -off], 1), torch.exp(-off), [])

        def forward(self, x: Tensor, *, routing: object = None) -> Tensor:
            return super().forward(x)

    from awnet.data.dataset import from_arrays

    generator = np.random.default_rng(0)
    data = from_arrays(
        generator.integers(0, 17, (20, 1, 8, 8)).astype(np.uint8),
        np.arange(20) % 4,
        split="test",
        max_value=16,
        eps=0.02,
    )
    report = evaluate(KnowsTheGrid(), data, ["pgd_sat"])
    assert report.detection["pgd_sat"]["auc"] == 1
    assert report.detection["pgd_sat"]["rounded"]["auc"] == 0.5  # on the data's own levels nothing is left
    assert report.detection["sign_noise"]["auc"] == 1
    assert sum("unusual pixels" in flag for flag in report.flags) == 2
    assert any("on the grid" in flag for flag in report.flags)

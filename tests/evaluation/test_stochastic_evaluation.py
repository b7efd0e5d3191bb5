"""Evaluations of stochastic models, in Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet.attacks import FGSM, Stochastic
from awnet.cli import main
from awnet.data.dataset import Dataset, from_arrays
from awnet.evaluation import evaluate

CODE = """
import torch
from torch import nn

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        rows = torch.arange(6)[:, None].expand(6, 6) // 2
        self.weight = nn.Parameter(torch.stack([(rows == k).float() for k in range(3)]).flatten(1))

    def forward(self, x):
        return (x + 0.1 * torch.randn_like(x)).flatten(1) @ self.weight.T
"""


def images(n: int = 18) -> Dataset:
    """Images of three classes, each brighter in different rows."""
    generator = np.random.default_rng(0)
    labels = np.arange(n) % 3
    pixels = generator.integers(0, 170, (n, 1, 6, 6))
    for image, label in zip(pixels, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 45
    return from_arrays(pixels.astype(np.uint8), labels, split="test", eps=0.06)


class Interrupted(Exception):
    pass


class Noisy(nn.Module):
    def __init__(self, noise: float = 0.1, calls: int | None = None) -> None:
        super().__init__()
        rows = torch.arange(6)[:, None].expand(6, 6) // 2
        self.weight = nn.Parameter(torch.stack([(rows == k).float() for k in range(3)]).flatten(1))
        self.noise, self.left = noise, calls

    def forward(self, x: Tensor) -> Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Interrupted
        return (x + self.noise * torch.randn_like(x)).flatten(1) @ self.weight.T


def test_a_stochastic_model_is_detected_and_evaluated_by_averages() -> None:
    report = evaluate(Noisy(), images(), ["fgsm", "aa"], budget="smoke", batch_size=9)
    about = report.settings["stochastic"]
    assert (about["eot"], about["passes"]) == (2, 20)
    assert about["difference"] > 1e-3
    assert report.attacks["fgsm"].settings["eot"] == 2
    assert report.attacks["aa"].settings["version"] == "reduced rand"
    assert set(report.attacks["aa"].settings["members"]) == {"apgd_ce", "apgd_dlr"}
    (flag,) = [flag for flag in report.flags if "stochastic" in flag]
    assert "over 2 passes (--eot), and AutoAttack is its rand version" in flag
    share = report.per_sample["fgsm_pass_share"]
    assert about["single_pass_accuracy"]["fgsm"] == pytest.approx(share.mean(), abs=1e-6)
    assert ((share > 0) & (share < 1)).any()
    # with two classes near each other the mean probabilities and the votes may differ, but not when all agree
    assert report.per_sample["fgsm_correct"][share == 1].all()
    assert not report.per_sample["fgsm_correct"][share == 0].any()


def test_a_deterministic_model_is_not_stochastic_unless_eot_says_so() -> None:
    report = evaluate(Noisy(0.0), images(), ["fgsm"])
    assert "stochastic" not in report.settings
    assert "eot" not in report.attacks["fgsm"].settings
    forced = evaluate(Noisy(0.0), images(), ["fgsm"], eot=3)
    assert forced.settings["stochastic"]["eot"] == 3
    assert forced.attacks["fgsm"].robust_accuracy == report.attacks["fgsm"].robust_accuracy
    assert any("did not differ" in flag for flag in forced.flags)
    unaveraged = evaluate(Noisy(), images(), ["fgsm"], eot=1)
    assert any("may be too high" in flag for flag in unaveraged.flags)


@pytest.mark.parametrize(
    ("attacks", "interruptions"),
    [(["fgsm", "aa"], (60, 150)), pytest.param(["fgsm", "union"], (200, 900), marks=pytest.mark.slow)],
)
def test_an_interrupted_evaluation_of_a_stochastic_model_resumes_to_the_same_report(
    attacks: list[str], interruptions: tuple[int, ...], tmp_path: Path
) -> None:
    options = {"attacks": attacks, "budget": "smoke", "batch_size": 9, "sanity": False}
    whole = evaluate(Noisy(), images(), out=tmp_path / "whole", **options)  # type: ignore[arg-type]
    torch.rand(5)  # the state of the global generator plays no part
    for calls in interruptions:
        with pytest.raises(Interrupted):
            evaluate(Noisy(calls=calls), images(), out=tmp_path / "parts", **options)  # type: ignore[arg-type]
    parts = evaluate(Noisy(), images(), out=tmp_path / "parts", **options)  # type: ignore[arg-type]
    assert parts.to_dict() == whole.to_dict()
    for name, values in whole.per_sample.items():
        assert np.array_equal(values, parts.per_sample[name])


class BatchStatistics(Noisy):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.batch_norm(x, None, None, training=True))


def test_train_mode_and_attacks_without_averages_are_flagged() -> None:
    report = evaluate(BatchStatistics(0.0), images(), ["fgsm"])
    assert any("batch_norm in train mode" in flag and "other images" in flag for flag in report.flags)
    model = Noisy()
    both = {"own": FGSM(model, eps=0.06), "averaged": FGSM(Stochastic(model, eot=2), eps=0.06)}
    report = evaluate(model, images(), both)
    assert any(flag.startswith("own neither averages gradients") for flag in report.flags)


def test_surrogates_are_averaged_too_and_must_fit() -> None:
    data, surrogates = images(), {"noisy one": Noisy(), "plain": Noisy(0.0)}
    report = evaluate(Noisy(0.0), data, ["transfer-fgsm"], budget="smoke", surrogates=surrogates)
    members = report.attacks["transfer-fgsm"].settings["members"]
    assert members["noisy_one"]["settings"]["eot"] == 2
    assert "eot" not in members["plain"]["settings"]
    with pytest.raises(ValueError, match=r"surrogate wide: the model failed on images \[1, 1, 6, 6\]"):
        evaluate(Noisy(0.0), data, ["transfer-fgsm"], surrogates={"wide": nn.Conv2d(3, 3, 1)})


def test_the_command_line_detects_a_stochastic_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = images()
    np.savez("test.npz", images=data.images[:, 0].numpy(), labels=data.labels.numpy())
    Path("noisy_of_stochastic_test.py").write_text(CODE)
    words = ["noisy_of_stochastic_test.py:Noisy", "--data", "test.npz", "--eps", "0.06", "--device", "cpu"]
    assert main(["evaluate", *words, "--attacks", "fgsm", "aa_rand", "--budget", "smoke", "--eot", "3"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "evaluated as a stochastic one" in printed
    assert "average their gradients over 3 passes" in printed
    folder = Path("runs/noisy_of_stochastic_test.py-Noisy/evaluations/default")
    report = json.loads((folder / "report.json").read_text())
    assert report["settings"]["stochastic"]["eot"] == 3
    assert report["attacks"]["aa_rand"]["settings"]["eot"] == 3
    assert "one forward pass" in (folder / "report.html").read_text()
    assert main(["attack", *words, "--attack", "pgd_sat", "--eot", "2", "--out", "images.npz"]) == 0
    assert "evaluated as a stochastic one" in " ".join(capsys.readouterr().out.split())
    assert json.loads(str(np.load("images.npz")["provenance"]))["settings"]["eot"] == 2
    for command in (["evaluate"], ["attack", "--out", "more.npz"]):
        assert main([command[0], *words, *command[1:], "--eot", "0"]) != 0
        assert "eot must be an integer of at least 1, got 0" in capsys.readouterr().err

"""`awnet evaluate` and `awnet train` with models and images that are not the package's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from support.extras import optional

from awnet.cli import main

CODE = """
import torch
from torch import nn

class Pair(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10], x

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    digits = load_digits()
    images, labels = (digits.images[:120] * 255 / 16).astype(np.uint8), digits.target[:120]
    np.savez(tmp_path / "test.npz", images=images, labels=labels)
    np.savez(tmp_path / "both.npz", x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
    (tmp_path / "net_of_test.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("net_of_test", None)


def test_any_model_is_evaluated_on_any_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["net_of_test.py:net", "--data", "test.npz", "--limit", "20", "--device", "cpu"]
    assert (
        main(["evaluate", *words, "--attacks", "fgsm", "--mean", "0.5", "--std", "0.25", "--eps", "0.1"]) == 0
    )
    printed = capsys.readouterr().out
    assert "net_of_test.py:net" in printed
    assert "it expects normalized images" in printed  # an untrained network is at chance
    folder = place / "runs" / "net_of_test.py-net" / "evaluations" / "default"
    report = json.loads((folder / "report.json").read_text())
    assert (report["model"], report["dataset"], report["n"]) == ("net_of_test.py:net", "test", 20)
    assert report["eps"] == 0.1
    assert (folder / "report.html").is_file()
    assert main(["evaluate", *words, "--attacks", "fgsm", "--out", "elsewhere"]) == 0
    assert (place / "elsewhere" / "evaluations" / "default" / "report.json").is_file()
    assert main(["attack", *words, "--attack", "fgsm", "--out", "images.npz"]) == 0
    assert np.load("images.npz")["x_adv"].shape == (20, 1, 8, 8)


def test_a_network_is_trained_and_evaluated_on_the_users_images(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "both.npz", "--recipe", "standard", "--model", "resnet_tiny", "--epochs", "1"]
    assert main(["train", *words, "--device", "cpu"]) == 0
    assert "runs/both-resnet_tiny-standard-0" in capsys.readouterr().out
    assert main(["evaluate", "runs/both-resnet_tiny-standard-0", "--attacks", "fgsm", "--device", "cpu"]) == 0
    assert "20 test images of both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "net_of_test.py:net"], "which would name its data set: give --data"),
        (["evaluate", "net_of_test.py:Pair", "--data", "test.npz"], "got a tuple of Tensor, Tensor: wrap"),
        (["evaluate", "net_of_test.py:narrow", "--data", "test.npz"], "got [1, 3] for one image"),
        (["evaluate", "net_of_test.py:net", "--data", "cifar10x"], "unknown data set 'cifar10x'"),
        (["evaluate", "net_of_test.py:net", "--data", "no/folder"], "is neither a folder"),
        (["evaluate", "net_of_test.py:net", "--data", "digits", "--classes", "c.txt"], "given by a path"),
        (["evaluate", "net_of_test.py:net", "--data", "test.npz", "--mean", "0", "0"], "mean has 2 values"),
        (["evaluate", "nowhere", "--data", "digits"], "another source of a model"),
        (["train", "--data", "test.npz"], "has no training images"),
    ],
)
def test_models_and_images_that_do_not_fit_are_a_one_line_error(
    words: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--device", "cpu"]) != 0
    printed = " ".join(capsys.readouterr().err.split())
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_resnet", 32),
        ("test_convnext", 32),
        ("test_vit", 160),  # the size that its position embedding is for
        ("test_efficientnet", 32),
        ("repvgg_a0", 32),
        ("densenet121", 32),
    ],
)
def test_a_network_of_each_kind_from_timm_is_evaluated(name: str, size: int, place: Path) -> None:
    optional("timm")
    import timm

    torch.manual_seed(0)
    reference = timm.create_model(name, pretrained=False, num_classes=4)
    torch.save(reference.state_dict(), "w.pt")
    images = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
    np.savez("color.npz", images=images, labels=np.arange(8) % 4)
    words = [f"timm:{name}", "--weights", "w.pt", "--num-classes", "4", "--data", "color.npz"]
    words += ["--image-size", str(size), "--mean", "0.5", "--std", "0.25", "--device", "cpu"]
    assert main(["evaluate", *words, "--attacks", "fgsm", "pgd_sat"]) == 0
    folder = Path("runs") / f"timm-{name}" / "evaluations" / "default"
    report = json.loads((folder / "report.json").read_text())
    assert (report["model"], report["n"]) == (f"timm:{name}", 8)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    with torch.no_grad():
        right = reference.eval()((x - 0.5) / 0.25).argmax(1) == torch.arange(8) % 4
    assert report["clean_accuracy"] == right.double().mean()
    assert report["attacks"]["pgd_sat"]["robust_accuracy"] <= report["clean_accuracy"]

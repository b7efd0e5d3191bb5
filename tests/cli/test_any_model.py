"""`awnet evaluate` and `awnet train` with models and images that are not the package's."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from support.extras import optional
from torch import nn

import awnet
from awnet.cli import main
from awnet.data import from_arrays

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def color():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))

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


def fitted(network: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> nn.Sequential:
    """``network``, which ends in a linear layer, with weights that classify some images correctly."""
    with torch.no_grad():
        inputs = network[:-1](x)
        network[-1].weight.copy_(F.one_hot(y, 10).float().T @ (inputs - inputs.mean(0)) / 10)
        network[-1].bias.zero_()
    return network.eval()


def accuracies(folder: str) -> list[float]:
    """Clean accuracy and the robust accuracies of the report in ``folder``."""
    report = json.loads((Path(folder) / "evaluations" / "default" / "report.json").read_text())
    assert report["n"] == 20
    return [report["clean_accuracy"], *(one["robust_accuracy"] for one in report["attacks"].values())]


def expected(
    network: nn.Module, images: np.ndarray, labels: np.ndarray, attacks: list[str], eps: float
) -> list[float]:
    """The same from Python, for images [N, C, H, W] of 8 bits."""
    report = awnet.evaluate(network, from_arrays(images, labels, eps=eps), attacks)
    return [report.clean_accuracy, *(one.robust_accuracy for one in report.attacks.values())]


def test_a_program_file_is_evaluated_like_the_network_that_was_exported(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load("both.npz") as file:
        images, labels = file["x_test"][:, None], file["y_test"]
    x, y = torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()
    torch.manual_seed(0)
    network = fitted(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)), x, y)
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(network, (x[:2],), dynamic_shapes=({0: batch},)), "net.pt2")
    words = ["net.pt2", "--data", "both.npz", "--eps", "0.05", "--batch-size", "16", "--device", "cpu"]
    assert main(["evaluate", *words, "--attacks", "fgsm", "pgd_sat"]) == 0
    actual = accuracies("runs/net.pt2")
    assert actual == expected(network, images, labels, ["fgsm", "pgd_sat"], eps=0.05)
    assert actual[0] > actual[1] > 0
    torch.export.save(torch.export.export(network, (x[:4],)), "four.pt2")
    assert main(["evaluate", "four.pt2", "--data", "both.npz", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("awnet: error: the model failed on images [1, 1, 8, 8] of both: ")
    assert "export the program with a dynamic batch size" in error
    assert error.count("\n") == 1


def test_a_folder_of_class_folders_is_evaluated_with_the_files_class_numbers(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load("both.npz") as file:
        images, labels = file["x_test"], file["y_test"]
    names = [f"digit {9 - number}" for number in range(10)]  # sorted by name the numbers would be reversed
    Path("names.txt").write_text("\n".join(names))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = Path("pictures", names[label], f"{number:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    color = np.repeat(images[:, None], 3, 1)
    x, y = torch.from_numpy(color).float() / 255, torch.from_numpy(labels).long()
    network = fitted(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), x, y)
    torch.save(network.state_dict(), "w.pt")
    words = ["net_of_test.py:color", "--weights", "w.pt", "--data", "pictures", "--classes", "names.txt"]
    assert main(["evaluate", *words, "--attacks", "fgsm", "--eps", "0.1", "--device", "cpu"]) == 0
    actual = accuracies("runs/net_of_test.py-color")
    assert actual == expected(network, color, labels, ["fgsm"], eps=0.1)
    assert actual[0] > actual[1] > 0
    Path("pictures").rename("test")
    Path("pictures").mkdir()
    Path("test").rename("pictures/test")
    shutil.copytree("pictures/test", "pictures/train")
    words = ["train", "--data", "pictures", "--recipe", "standard", "--model", "resnet_tiny", "--epochs", "1"]
    assert main([*words, "--classes", "names.txt", "--device", "cpu", "--out", "run"]) == 0
    capsys.readouterr()
    for options, note in ((["--classes", "names.txt"], False), ([], True)):
        assert main(["evaluate", "run", "--attacks", "fgsm", "--device", "cpu", *options]) == 0
        assert ("differ from those that the run recorded: give --classes" in capsys.readouterr().out) == note


def test_a_network_is_trained_and_evaluated_on_the_users_images(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "both.npz", "--recipe", "standard", "--model", "resnet_tiny", "--epochs", "1"]
    assert main(["train", *words, "--device", "cpu"]) == 0
    assert "runs/both-resnet_tiny-standard-0" in capsys.readouterr().out
    assert main(["evaluate", "runs/both-resnet_tiny-standard-0", "--attacks", "fgsm", "--device", "cpu"]) == 0
    assert "20 test images of both" in capsys.readouterr().out


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

"""Bad models, images and options of `awnet evaluate`, `attack`, `train` and `compare`: one line, with advice."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import awnet
from awnet.cli import main

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")

CODE = """
import torch
from torch import nn

class Returns(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.linear = form, nn.Linear(64, 10)

    def forward(self, x):
        return self.form(self.linear(x.flatten(1)))

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def pair():
    return Returns(lambda logits: (logits, logits))

def mapping():
    return Returns(lambda logits: {"logits": logits})

def narrow():
    return Returns(lambda logits: logits[:, :3])

def deep():
    return Returns(lambda logits: logits[:, :, None, None])

def classes():
    return Returns(lambda logits: logits.argmax(1))

def color():
    return nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten())

def large():
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))

def failing():
    raise KeyError("checkpoint")

def number():
    return 3
"""


class Sneaky:
    def __reduce__(self) -> object:
        return (print, ("code from a file ran",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with images, models and files that are neither."""
    folder, before, path = tmp_path_factory.mktemp("bad"), Path.cwd(), [*sys.path]
    os.chdir(folder)
    images, labels = np.zeros((12, 8, 8), np.uint8), np.arange(12) % 10
    images[labels, 0, 0] = 255
    np.savez("ok.npz", images=images, labels=labels)
    np.savez("floats.npz", images=images / 255, labels=labels)
    np.savez("fewer.npz", images=images, labels=labels[:5])
    np.savez("words.npz", images=images, labels=np.array(["cat"] * 12))
    np.savez("negative.npz", images=images, labels=labels - 1)
    np.savez("hot.npz", images=images, labels=np.eye(10, dtype=int)[labels])
    np.savez("nameless.npz", pictures=images)
    np.savez("none.npz", images=images[:0], labels=labels[:0])
    Path("damaged.npz").write_bytes(Path("ok.npz").read_bytes()[:200])
    Path("damaged.pt2").write_bytes(b"nothing")
    Path("file.txt").write_text("text")
    for name, size in (
        ("plain/1.png", 8),
        ("sizes/a/1.png", 8),
        ("sizes/b/2.png", 9),
        ("words/cat/1.png", 8),
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (size, size)).save(name)
    for name in ("torn/a/1.png", "empty/a/notes.txt"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_bytes(b"nothing")
    Path("dog.txt").write_text("dog\n")
    Path("code_of_bad.py").write_text(CODE)
    Path("wrong_code_of_bad.py").write_text("def :")
    torch.save({"a": 1}, "numbers.pt")
    torch.save(nn.Linear(2, 2).state_dict(), "other.pt")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).state_dict(), "three.pt")
    torch.save({"model": Sneaky()}, "objects.pt")
    awnet.save_model(awnet.create_model("resnet_tiny", in_channels=1), "ours.safetensors")
    words = ["evaluate", "code_of_bad.py:net", "--attacks", "fgsm"]
    assert main([*words, "--data", "ok.npz", "--out", "first"]) == 0
    assert main([*words, "--data", "ok.npz", "--out", "second", "--limit", "10"]) == 0
    yield folder
    os.chdir(before)
    sys.path[:] = path
    sys.modules.pop("code_of_bad", None)


def model(name: str, *options: str) -> list[str]:
    """`awnet evaluate` of a function of the file above, or of another source, on images that are in order."""
    source = name if any(mark in name for mark in ":./") else f"code_of_bad.py:{name}"
    return ["evaluate", source, "--data", "ok.npz", *options]


def data(name: str, *options: str) -> list[str]:
    return ["evaluate", "code_of_bad.py:net", "--data", name, *options]


CASES: list[tuple[list[str], str]] = [
    # models
    (
        model("./nowhere"),
        "nowhere does not exist: give a run folder, which awnet train makes, a .safetensors file or another source of a model (awnet evaluate --help)",
    ),
    (model("file.txt"), "file.txt is neither a run folder nor a .safetensors file"),
    (model("nowhere.py:net"), "nowhere.py is not a file: give a Python file, or the name of a module"),
    (
        model("no_such_module_anywhere:net"),
        "no_such_module_anywhere cannot be imported: ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    ),
    (
        model("wrong_code_of_bad.py:net"),
        "wrong_code_of_bad.py cannot be imported: SyntaxError: invalid syntax (wrong_code_of_bad.py, line 1)",
    ),
    (model("absent"), "code_of_bad.py has no function 'absent'"),
    (model("number"), "code_of_bad.py:number must return an nn.Module, got int"),
    (model("failing"), "code_of_bad.py:failing failed: KeyError: 'checkpoint'"),
    (
        model("pair"),
        "model must return logits [B, 10] for ok, got a tuple of Tensor, Tensor: wrap the model so that its forward returns the logits alone",
    ),
    (
        model("mapping"),
        "model must return logits [B, 10] for ok, got dict: wrap the model so that its forward returns the logits alone",
    ),
    (
        model("narrow"),
        "model must return logits [B, 10] for ok, got [1, 3] for one image: create it with num_classes=10",
    ),
    (
        model("deep"),
        "model must return logits [B, 10] for ok, got [1, 10, 1, 1] for one image: reduce it to one value for each class, for example with logits.flatten(1)",
    ),
    (
        model("classes"),
        "model must return logits [B, 10] for ok in floating point, got torch.int64: return the logits before argmax",
    ),
    (
        model("color"),
        "the model failed on images [1, 1, 8, 8] of ok: Given groups=1, weight of size [10, 3, 8, 8], expected input[1, 1, 8, 8] to have 3 channels, but got 1 channels instead: give images of the shape that the model was made for, or resize them within it (--image-size, image_size of load_model)",
    ),
    (
        model("large"),
        "): give images of the shape that the model was made for, or resize them within it (--image-size, image_size of load_model)",
    ),
    (model("nowhere.pt2"), "nowhere.pt2 does not exist: give a file of torch.export.save"),
    (
        model("damaged.pt2"),
        "damaged.pt2 is not an exported program that this torch can load: BadZipFile: File is not a zip file",
    ),
    (model("zoo:nothing"), "the zoo has no model 'nothing': it has awnet_tiny_digits, "),
    (model("hub:sizes"), "hub:sizes cannot be loaded: FileNotFoundError: "),
    (
        model("net", "--weights", "nowhere.pt"),
        "nowhere.pt does not exist: give a .safetensors file, or one of torch.save",
    ),
    (model("net", "--weights", "file.txt"), "file.txt is damaged or not a file of weights: "),
    (
        model("net", "--weights", "numbers.pt"),
        "numbers.pt does not contain a state dict: save model.state_dict()",
    ),
    (
        model("net", "--weights", "other.pt"),
        "other.pt does not fit the Sequential: it lacks 1.bias, 1.weight; the model lacks bias, weight",
    ),
    (
        model("net", "--weights", "three.pt"),
        "three.pt does not fit the Sequential: 1.weight is [3, 64] and not [10, 64], 1.bias is [3] and not [10]",
    ),
    (
        model("net", "--weights", "objects.pt"),
        "objects.pt holds Python objects, which could run code when they are loaded, or is damaged: save model.state_dict() instead",
    ),
    (
        model("ours.safetensors", "--weights", "three.pt"),
        "weights is for timm models and functions: ours.safetensors has weights",
    ),
    (
        model("ours.safetensors", "--mean", "0.5"),
        "mean, std and image_size are for models that awnet did not create: a run's model takes images in [0, 1] of its data set's size",
    ),
    (
        model("net", "--mean", "0.5", "0.5"),
        "the model failed on images [1, 1, 8, 8] of ok: mean has 2 values, but the images have 1 channel: give one value for each channel, or one for all",
    ),
    (model("net", "--std", "0"), "std must hold positive numbers, one for each channel, got (0.0,)"),
    (
        model("net", "--num-classes", "10"),
        "num_classes is for timm models: code_of_bad.py:net has its number of classes",
    ),
    (model("net", "--image-size", "0"), "image_size must be an integer of at least 1, got 0"),
    (
        model("net", "--image-size", "16"),
        "): give images of the shape that the model was made for, or resize them within it (--image-size, image_size of load_model)",
    ),
    (
        model("net", "--checkpoint", "last"),
        "--checkpoint last is for run folders: code_of_bad.py:net has one set of weights",
    ),
    # images
    (
        ["evaluate", "code_of_bad.py:net"],
        "code_of_bad.py:net is not in a run folder, which would name its data set: give --data",
    ),
    (
        data("cifar10x"),
        "unknown data set 'cifar10x'; known are digits, cifar10, cifar100, tiny_imagenet; your own images are given by the path of a folder or .npz file, or by awnet.data.from_arrays in Python",
    ),
    (data("no/folder"), "no/folder is neither a folder with a folder for each class nor a .npz file"),
    (data("nowhere.npz"), "nowhere.npz does not exist"),
    (data("damaged.npz"), "damaged.npz cannot be read as arrays of numbers: File is not a zip file"),
    (
        data("floats.npz"),
        "floats.npz: images must be uint8 [N, C, H, W], got float64 [12, 1, 8, 8]; convert gray images [N, H, W] with images[:, None], and floats in [0, 1] with (255 * images).round().astype('uint8')",
    ),
    (data("fewer.npz"), "fewer.npz: labels must hold one value for each of the 12 images, got 5"),
    (
        data("words.npz"),
        "words.npz: labels must be whole numbers [N], got <U3 [12], such as 'cat'; number the words: classes, labels = numpy.unique(words, return_inverse=True)",
    ),
    (data("negative.npz"), "negative.npz: labels must be classes numbered from 0, got -1"),
    (
        data("hot.npz"),
        "hot.npz: labels must be whole numbers [N], got int64 [12, 10], such as 1; convert one-hot labels with .argmax(1)",
    ),
    (
        data("nameless.npz"),
        "nameless.npz has the arrays pictures; expected images and labels, or x and y, of all images or with the name of a part, such as x_train, y_train, x_test and y_test",
    ),
    (data("none.npz"), "none.npz has no test images: it is empty"),
    (data("plain"), "plain holds no folders: expected a folder with the images of each class"),
    (data("torn"), "torn/a/1.png is damaged, or no image: "),
    (
        data("empty"),
        "empty holds no images of the kinds .png, .jpg, .jpeg, .bmp, .ppm, .pgm, .webp, .tif, .tiff in its class folders",
    ),
    (
        data("sizes"),
        "sizes/b/2.png is 9×9, the first image 8×8 pixels: give image_size (--image-size) to resize them all",
    ),
    (data("words", "--classes", "dog.txt"), "dog.txt does not name 1 of the 1 classes, for example cat"),
    (data("ok.npz", "--classes", "nowhere.txt"), "the file of class names, nowhere.txt, cannot be read: "),
    (
        data("digits", "--classes", "dog.txt"),
        "image_size and classes are for data sets given by a path, not for digits",
    ),
    (data("ok.npz", "--split", "train"), "ok.npz has no train images: give --split test"),
    (data("ok.npz", "--limit", "0"), "limit must be an integer of at least 1, got 0"),
    (
        ["train", "--data", "ok.npz"],
        "ok.npz has no training images: put them in a folder train with a folder for each class, or in arrays x_train and y_train",
    ),
    # threat models and attacks
    (model("net", "--norm", "L3"), "norm must be one of Linf, L2, L1, got 'L3'"),
    (
        model("net", "--norm", "L2"),
        "--norm L2 needs --eps, one for each norm: the eps of the data or the run, 8/255, is for Linf",
    ),
    (
        model("net", "--norm", "Linf", "L2", "--eps", "0.1"),
        "--norm and --eps must have the same number of values, got 2 (Linf L2) and 1 (0.1)",
    ),
    (model("net", "--norm", "L2", "L2", "--eps", "1", "1"), "--norm takes each norm once, got L2 L2"),
    (model("net", "--eps", "0"), "eps must be in (0, 1], got 0.0"),
    (
        model("net", "--eps", "8"),
        "eps must be in (0, 1], got 8: images are in [0, 1], so write 8/255 if you count in 8-bit levels",
    ),
    (model("net", "--attacks", "pgd"), "unknown attack 'pgd': choose from fgsm, pgd_sat, "),
    (model("net", "--attacks", "fgsm", "fgsm"), "attacks must be different names, got ['fgsm', 'fgsm']"),
    (model("net", "--attacks", "cw-10"), "cw-10: the model has 10 classes, numbered from 0"),
    (
        model("net", "--attacks", "square-random"),
        "a targeted form, such as pgd_sat-least_likely, of fgsm, pgd_sat, pgd_trades, cw, apgd_ce, apgd_t with ",
    ),
    (
        model("net", "--attacks", "transfer-fgsm"),
        "transfer-fgsm needs models to make its images on: give --surrogates (surrogates=)",
    ),
    (model("net", "--attacks", "two_phase"), "TwoPhase needs a model with a type head, got a Sequential"),
    (
        model("net", "--attacks", "adaptive_paper"),
        "adaptive_paper needs the robust teacher that the model was trained with: evaluate a run that has teachers (RUN/teachers/robust), or give --teachers (teacher=)",
    ),
    (
        model("net", "--attacks", "fgsm", "--surrogates", "code_of_bad.py:narrow"),
        "surrogate code_of_bad.py-narrow: model must return logits [B, 10] for ok, got [1, 3] for one image: create it with num_classes=10",
    ),
    (model("net", "--attacks", "fgsm", "--eot", "0"), "eot must be an integer of at least 1, got 0"),
    (
        model("net", "--attacks", "cw", "--device", "cpu", "--capture", "true"),
        "capture needs a CUDA device, got cpu: leave it out",
    ),
    (
        model("net", "--attacks", "fgsm", "--name", "../x"),
        "name must be letters, digits, '.', '_' and '-', as it names a folder, got '../x'",
    ),
    (
        [
            "attack",
            "code_of_bad.py:net",
            "--data",
            "ok.npz",
            "--out",
            "x.npz",
            "--norm",
            "L2",
            "L1",
            "--eps",
            "1",
            "1",
        ],
        "--norm takes one norm here, got L2 L1",
    ),
    # comparisons
    (["compare", "first"], "a comparison needs two or more reports, got 1"),
    (
        ["compare", "first", "nowhere"],
        "nowhere does not exist: give a run folder, RUN/evaluations/NAME, or a report.json",
    ),
    (["compare", "first", "second"], "not comparable: second against first: number of images 10 and 12"),
    (
        ["compare", "first", "second", "--name", "full"],
        "first has no evaluation 'full': run awnet evaluate first --name full",
    ),
    (
        data("ok.npz", "--compare-with", "second", "--attacks", "fgsm"),
        "the evaluation cannot be compared with second: number of images 12 and 10",
    ),
]


def files(folder: Path) -> list[Path]:
    """All files but Python's caches, and locks, which are kept."""
    return sorted(path for path in folder.rglob("[!.]*.*") if path.suffix != ".pyc" and path.is_file())


@pytest.mark.parametrize(("words", "message"), CASES, ids=[" ".join(words) for words, _ in CASES])
def test_a_bad_input_is_one_line_that_says_what_to_do(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(folder)
    capsys.readouterr()
    assert main([*words, "--device", "cpu"] if words[0] != "compare" else words) == 2
    out, error = capsys.readouterr()
    assert error.startswith("awnet: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert "ran" not in out
    assert files(folder) == before

"""The user's own models on the command line: --import, and --model CODE:FUNCTION."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from awnet.cli import main
from awnet.models import registry
from awnet.models.user_code import build_model, import_code

CODE = """
import torch
from torch import nn
import awnet
from {helper} import WIDTH

class CNN(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.head(torch.relu(self.norm2(self.conv2(x))).mean((2, 3)))

def converted(width=WIDTH):
    return awnet.convert(CNN(width), image_size=8, router_widths=(4,))

def wider():
    return converted(8)

def no_module():
    return 1

def failing():
    raise NameError("oops")

awnet.models.register_model("registered by a file", lambda num_classes, in_channels, width=4: converted(width))
"""
TRAIN = ["train", "--recipe", "pgd_at", "--epochs", "1", "--limit", "40", "--attack-steps", "1"]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a name that is no identifier, which imports its neighbor."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    (tmp_path / "neighbor_of_code.py").write_text("WIDTH = 4")
    (tmp_path / "user-code.py").write_text(CODE.format(helper="neighbor_of_code"))
    yield Path("user-code.py")
    for name in set(sys.modules) - modules:
        if name in ("user_code", "neighbor_of_code"):
            del sys.modules[name]


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.usefixtures("one_thread", "undrawn")
def test_a_converted_network_is_trained_evaluated_attacked_and_exported(
    code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    function = f"{code}:converted"
    assert main([*TRAIN, "--model", function, "--out", "run"]) == 0
    assert f"next: awnet evaluate run --model {function}" in capsys.readouterr().out
    small = ["--limit", "20", "--model", function]
    assert main(["evaluate", "run", "--attacks", "fgsm", *small]) == 0
    assert main(["attack", "run", "--attack", "fgsm", "--out", "x.npz", *small]) == 0
    assert main(["export", "program", "run", "--out", "x.pt2", *small]) == 0
    assert Path("run/report.json").is_file()
    assert Path("x.npz").is_file()
    exported = torch.export.load("x.pt2").module()
    assert exported(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    assert "--model FILE.py:FUNCTION" in error_of(["evaluate", "run", "--attacks", "fgsm"], capsys)
    assert "does not fit the model" in error_of(["evaluate", "run", "--model", f"{code}:wider"], capsys)


@pytest.mark.usefixtures("one_thread", "undrawn")
def test_a_registered_model_is_found_after_its_file_is_imported(
    code: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = ["--model", "registered by a file"]
    assert "unknown model" in error_of([*TRAIN, *name, "--out", "run"], capsys)
    imported = ["--import", str(code)]
    assert main([*TRAIN, *name, "--model-options", "width=6", "--out", "run", *imported]) == 0
    assert f"next: awnet evaluate run --import {code}" in capsys.readouterr().out
    assert main(["evaluate", *imported, "run", "--attacks", "fgsm", "--limit", "20"]) == 0
    assert main(["analyze", "filters", "run", *imported, "--out", "figures", "--images", "8"]) == 0
    monkeypatch.delitem(registry._REGISTRY, "registered by a file")  # as in a new process
    assert "(command line: --import FILE.py)" in error_of(["evaluate", "run", "--attacks", "fgsm"], capsys)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("user-code.py:no_module", "must return an nn.Module, got int"),
        ("user-code.py:failing", "user-code.py:failing failed: NameError: oops"),
        ("user-code.py:absent", "has no function 'absent'"),
        ("user-code.py:", "expected FILE.py:FUNCTION"),
        (":converted", "expected FILE.py:FUNCTION"),
        ("absent.py:converted", "absent.py is not a file"),
        ("no_such_module_at_all:converted", "cannot be imported: ModuleNotFoundError"),
        (".:converted", "cannot be imported"),
        ("json.py:loads", "is loaded already, from elsewhere: rename the file"),
        ("wrong.py:converted", "wrong.py cannot be imported: SyntaxError"),
    ],
)
def test_code_that_cannot_be_used_is_one_line(
    function: str, message: str, code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("json.py").write_text("")
    Path("wrong.py").write_text("def :")
    message_shown = error_of([*TRAIN, "--model", function, "--out", "run"], capsys)
    assert message in message_shown
    assert not Path("run").exists()


def test_code_is_imported_once_and_again_after_a_failure(code: Path) -> None:
    assert import_code(str(code)) is import_code(str(code.resolve()))
    late = Path("late-code.py")
    late.write_text("raise RuntimeError('not yet')")
    with pytest.raises(ImportError, match="RuntimeError: not yet"):
        import_code("late-code.py")
    late.write_text("import torch\nbuild = torch.nn.Identity")
    assert isinstance(build_model("late-code.py:build"), torch.nn.Identity)
    del sys.modules["late_code"]

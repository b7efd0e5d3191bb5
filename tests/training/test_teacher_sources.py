"""Teachers from any source that load_model takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import nn

from awnet.data import Splits, load_dataset
from awnet.evaluation.teachers import find_teachers
from awnet.training import recipe_for, train

CODE = """
import torch
from torch import nn

def net(seed={seed}):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""
FULL = load_dataset("digits")
DIGITS = Splits(FULL.train.subset(12), FULL.validation.subset(10), FULL.test.subset(10))


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "teacher_code.py"
    path.write_text(CODE.format(seed=0))
    sys.modules.pop("teacher_code", None)
    yield path
    sys.modules.pop("teacher_code", None)


def run(out: Path, teacher: str, *, resume: bool = False) -> None:
    recipe = recipe_for("hat", "digits", epochs=1, batch_size=12, attack_steps=1)
    train(
        recipe, "resnet_tiny", DIGITS, out, teachers=(teacher,), resume=resume, quiet=True, tensorboard=False
    )


def test_a_teacher_from_code_is_recorded_by_its_weights(code: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "run", f"{code}:net"
    run(out, source)
    (session,) = json.loads((out / "config.json").read_text())["sessions"]
    about = session["teachers"]["clean"]
    assert (about["source"], about["path"]) == (source, None)
    run(out, source, resume=True)
    recorded = find_teachers(out)  # code of the record does not run
    assert recorded.models == {}
    assert f"it was {source}, which may be code, so it must be given again" in recorded.missing["clean"]
    assert isinstance(find_teachers(out, given=(source,)).models["clean"], nn.Module)
    code.write_text(CODE.format(seed=1))
    sys.modules.pop("teacher_code")
    assert "has other weights" in find_teachers(out, given=(source,)).missing["clean"]
    with pytest.raises(ValueError, match="cannot be resumed with another configuration"):
        run(out, source, resume=True)

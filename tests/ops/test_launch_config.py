"""The tables of launch parameters: look-up, defaults, damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from awnet.ops import launch_config

CPU = torch.device("cpu")
SHIPPED = launch_config.FOLDER


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A configs folder with the shipped defaults, in which the device is called "toy"."""
    (tmp_path / "default.json").write_text((SHIPPED / "default.json").read_text())
    monkeypatch.setattr(launch_config, "FOLDER", tmp_path)
    monkeypatch.setattr(launch_config, "device_slug", lambda device: "toy")
    launch_config.forget_tables()
    yield tmp_path
    monkeypatch.undo()
    launch_config.forget_tables()


def look_up(**changes: object) -> dict[str, int]:
    arguments: dict = {
        "op": "apply", "device": CPU, "batch": 200, "channels": 64, "pixels": 1000,
        "dtype": torch.bfloat16, "layout": "nchw",
    }  # fmt: skip
    return dict(launch_config.launch_parameters(**(arguments | changes)))


def entry(tile: int) -> dict[str, int]:
    return {"tile": tile, "inner": 64, "warps": 4}


def test_every_shipped_table_is_sound() -> None:
    for path in SHIPPED.glob("*.json"):
        assert launch_config.read_table(path)
        launch_config.launches(path.stem)
    for op in ("apply", "statistics", "reduce", "propagate", "eval_backward"):
        for layout in ("nchw", "channels_last"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert look_up(op=op, layout=layout, dtype=dtype)["tile"] > 0
    for op in (
        "eval_coefficients",
        "eval_gradients",
        "network_coefficients",
        "network_gradients",
        "batch_statistics",
        "train_coefficients",
        "train_gradients",
        "sign_step",
    ):
        assert look_up(op=op, dtype=None, layout=None)["warps"] > 0


def test_a_table_with_the_former_op_names_is_read(folder: Path) -> None:
    launches = {"testing_gradients/b256c64p1": entry(512), "training_coefficients": entry(256)}
    (folder / "toy.json").write_text(json.dumps({"device": "toy", "launches": launches}))
    assert look_up(op="eval_gradients", pixels=1, dtype=None, layout=None)["tile"] == 512
    assert look_up(op="train_coefficients", dtype=None, layout=None)["tile"] == 256


def test_the_most_specific_entry_of_the_device_wins(folder: Path) -> None:
    launches: dict[str, dict[str, int]] = {}
    default = look_up()
    for number, key in enumerate(["apply/nchw", "apply/bfloat16/nchw", "apply/bfloat16/nchw/b256c64p1024"]):
        launches[key] = entry(64 << number)
        (folder / "toy.json").write_text(json.dumps({"device": "toy", "launches": launches}))
        launch_config.forget_tables()
        assert look_up() == entry(64 << number)
    assert look_up(batch=300) == entry(128)
    assert look_up(dtype=torch.float32) == entry(64)
    assert look_up(layout="channels_last") != entry(64)
    assert default == json.loads((SHIPPED / "default.json").read_text())["launches"]["apply/bfloat16/nchw"]


def test_an_unknown_device_takes_the_default_and_an_unknown_op_is_an_error(folder: Path) -> None:
    assert look_up() == json.loads((folder / "default.json").read_text())["launches"]["apply/bfloat16/nchw"]
    with pytest.raises(KeyError, match="no launch parameters for 'fly'"):
        look_up(op="fly")


def test_buckets_round_up_to_powers_of_two() -> None:
    assert launch_config.bucket(1, 64, 1000) == "b1c64p1024"
    assert launch_config.bucket(257, 3, 49) == "b512c4p64"


DAMAGED = {
    "{": "is not JSON",
    "[]": 'must hold an object with "launches"',
    '{"launches": {"apply/nchw": 4}}': "must be an object of launch parameters, got 4",
    '{"launches": {"apply/nchw": {"tile": 100, "inner": 64, "warps": 4}}}': "a power of two for tile",
    '{"launches": {"apply/nchw": {"tile": 64.0, "inner": 64, "warps": 4}}}': "integers of at least 0",
    '{"launches": {"apply/nchw": {"tile": 64, "inner": 64, "warps": 64}}}': "at most 32 warps",
    '{"launches": {"apply/nchw": {"tile": 64, "warps": 4}}}': "has tile, warps; expected tile, inner, warps",
    '{"launches": {"fly/nchw": {"tile": 64, "warps": 4}}}': "is for an op without defaults",
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_table_is_a_clear_error(folder: Path, text: str) -> None:
    (folder / "toy.json").write_text(text)
    with pytest.raises(ValueError, match="awnet bench tune") as caught:
        look_up()
    assert str(folder / "toy.json") in str(caught.value)
    assert DAMAGED[text] in str(caught.value)

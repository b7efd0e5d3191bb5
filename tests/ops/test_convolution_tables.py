"""The tables that say where a convolution of ours beats the library's: how they are made and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from awnet.benchmarks import convolutions

from awnet.ops import launch_config

ENTRY = {
    "block_m": 128,
    "block_n": 64,
    "block_k": 64,
    "warps": 4,
    "stages": 3,
    "swap_ab": 0,
    "least_batch": 128,
}


class Tile(NamedTuple):
    width: int


def row(key: str, batch: int, library: float, **ours: float) -> convolutions.Result:
    tiles = {Tile(int(name[1:])): ms for name, ms in ours.items()}
    return convolutions.Result("layer", "apply", batch, "bfloat16", key, library, library / 2, tiles)


def test_a_win_needs_one_tile_that_is_faster_from_a_batch_on() -> None:
    rows = [
        row("always", 128, 1.0, t1=0.9, t2=0.5),
        row("always", 256, 2.0, t1=1.0, t2=1.5),
        row("always", 512, 4.0, t1=3.9, t2=2.0),
        row("large only", 128, 1.0, t1=1.1),
        row("large only", 256, 2.0, t1=1.5),
        row("large only", 512, 4.0, t1=3.0),
        row("small only", 128, 1.0, t1=0.5),
        row("small only", 512, 4.0, t1=4.1),
        row("within the noise", 512, 4.0, t1=3.99),
    ]
    assert convolutions.wins(rows) == {
        "always": {"width": 2, "least_batch": 128},
        "large only": {"width": 1, "least_batch": 256},
    }


def test_a_tile_that_some_batch_could_not_run_wins_nothing() -> None:
    rows = [row("key", 128, 1.0, t1=0.1), row("key", 256, 2.0, t2=0.1)]
    assert convolutions.wins(rows) == {}


def test_an_update_keeps_the_rest_of_the_devices_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_config, "FOLDER", tmp_path)
    path = tmp_path / "cpu.json"
    launches = {"apply/nchw": {"tile": 2048, "inner": 1024, "warps": 4}}
    old = {"conv/measured before": ENTRY, "conv/lost now": ENTRY}
    path.write_text(json.dumps({"device": "cpu", "launches": launches, "convolutions": old}))
    rows = [row("conv/lost now", 128, 1.0, t1=2.0), row("conv/won now", 128, 1.0, t1=0.5)]
    assert convolutions.update_table(torch.device("cpu"), rows) == path
    written = json.loads(path.read_text())
    assert written["launches"] == launches
    assert written["convolutions"] == {
        "conv/measured before": ENTRY,
        "conv/won now": {"width": 1, "least_batch": 128},
    }


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"conv/a": ENTRY | {"block_m": 100}}, "power of two for block_m"),
        ({"conv/a": {"block_m": 128}}, "must have the fields block_k, block_m"),
        ({"apply/a": ENTRY}, "must begin with conv or grouped_conv"),
        ({"conv/a": ENTRY | {"stages": -1}}, "but stages is not one"),
        ([ENTRY], "must be an object"),
    ],
)
def test_damaged_tables_are_named(entries: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "nvidia-h200.json"
    path.write_text(json.dumps({"launches": {}, "convolutions": entries}))
    with pytest.raises(ValueError, match=reason) as caught:
        launch_config.read_convolutions(path)
    assert str(path) in str(caught.value)
    assert "awnet bench tune" in str(caught.value)


def test_no_table_and_no_convolutions_in_it_are_legal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_config, "FOLDER", tmp_path)
    launch_config.forget_tables()
    assert launch_config.convolutions(torch.device("cpu")) == {}
    (tmp_path / "cpu.json").write_text(json.dumps({"launches": {}}))
    launch_config.forget_tables()
    assert launch_config.convolutions(torch.device("cpu")) == {}
    monkeypatch.undo()
    launch_config.forget_tables()


def test_the_comparison_without_a_gpu_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has what it needs")
    with pytest.raises(SystemExit):
        convolutions.main([])
    assert "needs a CUDA device, this machine has none" in capsys.readouterr().err


def test_layers_are_found_by_name_and_by_shape() -> None:
    assert convolutions.find_layer("stage 1") == convolutions.Convolution(64, 64, 32)
    assert convolutions.find_layer("512-256@7") == convolutions.Convolution(512, 256, 7)
    spelt = convolutions.find_layer("96-96@56k7s2g96")
    assert spelt == convolutions.Convolution(96, 96, 56, kernel=7, stride=2, groups=96)


def test_an_unknown_layer_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convolutions.main(["--layers", "stage 9"])
    assert "unknown layer 'stage 9'; available: stage 1" in capsys.readouterr().err

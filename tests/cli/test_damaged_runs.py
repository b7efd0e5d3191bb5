"""Commands on a run whose config, weights, state or data file was changed or damaged: one line of error."""

import hashlib
import json
import re
import shutil
from functools import reduce

import pytest
import torch
from rich.console import Console
from support.cifar_files import write_cifar10
from support.trained_run import TRAIN, fails

from awnet.cli import EXPECTED, main
from awnet.cli.run_options import RunOptions
from awnet.data import load_dataset
from awnet.models import load_model


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is read from or left in the working directory by accident
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("AWNET_DEBUG", raising=False)


def edits(config):
    """(entry, value): each entry of a config.json missing, or with values of other types and sizes."""
    entries = [(), *((name,) for name in config)]
    entries += [(part, name) for part in ("model", "dataset", "recipe") for name in config[part]]
    entries += [("dataset", "fingerprints", split) for split in ("train", "validation", "test")]
    entries += [("sessions", 0), ("sessions", 0, "teachers"), ("sessions", 0, "environment")]
    for entry in entries:
        for value in (..., None, "", "unknown", "\0", 0, -1, 0.5, 10**400, True, [], [1], {}, {"a": [None]}):
            yield entry, value


def edited(config, entry, value):
    config = json.loads(json.dumps(config))
    if not entry:
        return value
    *above, last = entry
    place = reduce(lambda inner, key: inner[key], above, config)
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return config


def test_a_changed_config_is_read_or_refused_with_its_path(run, tmp_path, monkeypatch):
    config = json.loads((run / "config.json").read_text())
    model, splits = load_model(run), load_dataset("digits")
    monkeypatch.setattr("awnet.models.load_model", lambda path, **_: model)
    monkeypatch.setattr(
        "awnet.data.load_dataset", lambda name, data_dir, seed, **_: loaded(splits, name, seed)
    )
    (tmp_path / "best.safetensors").touch()
    refused, unclear = 0, []
    for entry, value in edits(config):
        if not entry and value is ...:
            continue
        (tmp_path / "config.json").write_text(json.dumps(edited(config, entry, value)))
        command = RunOptions(source=str(tmp_path))
        try:
            command.load(Console(quiet=True))
        except EXPECTED as error:
            refused += 1
            if str(tmp_path) not in str(error) or len(str(error)) > 500:
                unclear.append((entry, value, error))
    assert not unclear
    assert refused > 150


def loaded(splits, name, seed):
    assert name == "digits"
    assert type(seed) is int
    return splits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not readable as JSON"),
        ('{"kind": "awnet run"', "is not readable as JSON"),
        ("[" * 10**5, "is not readable as JSON"),
        ("9" * 5000, "is not readable as JSON"),
        ("\xff", "does not describe|is not readable"),
        ("null", "does not describe a training run"),
        ('{"kind": "awnet run"}', "recipe is missing"),
        ('{"kind": "awnet run", "recipe": 3}', "recipe must be a dict, got 3"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_a_damaged_config_is_one_line(run, tmp_path, text, message, command, capsys):
    shutil.copy(run / "best.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    words = ["evaluate", tmp_path] if command == "evaluate" else ["train", "--resume", "--out", tmp_path]
    said = fails(capsys, *words)
    if command == "evaluate" or "must be" in message:
        assert re.search(message, said)
        assert str(tmp_path / "config.json") in said


def test_damaged_weights_are_reported(tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not weights")
    assert "model.safetensors is damaged" in fails(capsys, "evaluate", file, "--data", "digits")


def test_a_data_file_that_was_damaged_or_changed_stops_a_resumed_run(tmp_path, capsys):
    data, out = write_cifar10(tmp_path / "data", rows=(8, 8, 8, 8, 8, 8)), tmp_path / "run"
    train = [
        "train",
        "--data",
        "cifar10",
        "--data-dir",
        data,
        "--model",
        "resnet_tiny",
        "--recipe",
        "standard",
    ]
    train = [*map(str, train), "--epochs", "1", "--batch-size", "8", "--out", str(out)]
    assert main([*train, "--max-minutes", "1e-9"]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    path = data / "data_batch_3"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "data_batch_3" in fails(capsys, *train, "--resume")
    path.write_bytes(whole.replace(content := whole[5000:5004], bytes(255 - b for b in content), 1))
    said = fails(capsys, *train, "--resume")
    assert "another configuration: dataset.fingerprints.train was" in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    path.write_bytes(whole)
    assert main([*train, "--resume"]) == 0


@pytest.mark.parametrize(
    ("part", "value"),
    [("model", None), ("model", {}), ("optimizer", {}), ("scheduler", []), ("epoch", "3"), ("step", -1),
     ("best_model", 3), ("random", {}), ("random", [3]), ("log_bytes", 1.5), ("finished", 2), ("of_epoch", None)],
)  # fmt: skip
def test_a_state_with_other_content_and_a_correct_checksum_is_a_one_line_error(
    run, tmp_path, part, value, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    newest = sorted((folder / "state").glob("*.pt"))[-1]
    state = torch.load(newest, weights_only=True) | {"finished": False, part: value}
    torch.save(state, newest)
    digest = hashlib.sha256(newest.read_bytes()).hexdigest()
    newest.with_name(f"{newest.name}.sha256").write_text(f"{digest}  {newest.name}\n")
    words = [*TRAIN, "--recipe", "standard", "--eps", "1/10", "--seed", "3", "--out", folder, "--resume"]
    assert str(folder) in fails(capsys, *words)

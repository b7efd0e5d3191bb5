"""Damaged, foreign and outdated states of a run."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interrupted_runs import (
    RECIPE,
    SPLITS,
    TEACHERS,
    Planned,
    assert_same,
    assert_same_run,
    crash,
    go,
    interrupt,
    make_splits,
    model,
    stop_at,
    teacher,
)
from torch import nn

from awnet.models.files import weights_fingerprint
from awnet.training import PGDAT, read_log, train
from awnet.training import checkpoint as C

pytestmark = pytest.mark.usefixtures("one_thread", "signals_act")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 6}, r"seed was 5, is now 6"),
        ({"select_on": "test"}, r"selected_on was 'validation', is now 'test'"),
        ({"teachers": (teacher(1), teacher(3))}, r"teachers\.robust\.weights"),
        ({"recipe": Planned(**{**vars(RECIPE), "epochs": 4})}, r"recipe\.epochs was 3, is now 4"),
        (
            {"recipe": PGDAT(epochs=3, batch_size=4), "teachers": None},
            r"recipe\.name was 'mtard', is now 'pgd_at'",
        ),
        ({"splits": make_splits(1)}, r"dataset\.fingerprints\.train"),
        ({"model": teacher(0)}, r"model\.name was 'AWNet', is now 'Sequential'"),
    ],
)
def test_another_configuration_is_not_resumed(
    uninterrupted: Path, change: dict[str, Any], named: str
) -> None:
    stop_at(1, crash)
    arguments = {"recipe": RECIPE, "model": model(), "splits": SPLITS, "teachers": TEACHERS, "seed": 5}
    with pytest.raises(ValueError, match=named):
        train(out=uninterrupted, resume=True, quiet=True, **(arguments | change))  # type: ignore[arg-type]


def change_state(run: Path, **changes: Any) -> None:
    """Rewrites the newest state, with a checksum that fits."""
    C.save_state(run, C.load_state(run) | changes)


def test_a_state_of_another_environment_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The environment is compared with the state's: the last session may have ended before it saved a state."""
    stop_at(None)
    go(tmp_path / "run", max_minutes=1e-9)
    environment = C.load_state(tmp_path / "run")["environment"]
    assert environment["threads"] == torch.get_num_threads() == 1
    stop_at(1, crash)
    with pytest.raises(MemoryError):
        go(tmp_path / "run", resume=True, quiet=False)
    assert "the last bits" not in capsys.readouterr().out
    other = {"awnet": "0.0.1", "commit": "0" * 40, "torch": "1.0", "device": "tpu", "threads": 64}
    change_state(tmp_path / "run", environment=environment | other)
    stop_at(None)
    assert go(tmp_path / "run", resume=True, quiet=False).finished
    said = capsys.readouterr().out
    assert "note: the last bits may differ from an uninterrupted run: environment.awnet was '0.0.1'" in said
    assert all(f"environment.{name} was {value!r}, is now" in said for name, value in other.items())
    assert C.load_state(tmp_path / "run")["environment"] == environment


def test_a_run_resumes_with_another_number_of_threads(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(None)
    torch.set_num_threads(2)
    try:
        go(tmp_path / "run", max_minutes=1e-9)
    finally:
        torch.set_num_threads(1)
    assert C.load_state(tmp_path / "run")["environment"]["threads"] == 2
    assert go(tmp_path / "run", resume=True, quiet=False).finished
    assert "environment.threads was 2, is now 1" in capsys.readouterr().out
    one, two = (C.load_state(run) for run in (uninterrupted, tmp_path / "run"))
    for name, value in one["model"].items():  # float32, sums in another order, through twelve steps
        assert torch.allclose(value, two["model"][name], rtol=0, atol=1e-4), name


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_an_outdated_state_is_an_error_that_names_its_version(tmp_path: Path, part: str) -> None:
    """Recipe, model name and data are the same, but this version's network has other weights."""
    stop_at(None)
    go(tmp_path / "run", max_minutes=1e-9)
    state = C.load_state(tmp_path / "run")
    if part == "model":
        changed = dict(list(state["model"].items())[1:])
    else:
        changed = state["optimizer"] | {"param_groups": state["optimizer"]["param_groups"][:1]}
    change_state(tmp_path / "run", **{part: changed})
    before = C.states(tmp_path / "run")[0].read_bytes()
    commit = state["environment"]["commit"]
    with pytest.raises(ValueError, match=rf"step 1 in .*does not fit.*awnet [\d.]+\w* at commit {commit}"):
        go(tmp_path / "run", resume=True)
    assert C.states(tmp_path / "run")[0].read_bytes() == before


# --- damaged and foreign states


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["HOSTILE_MARK"],))


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[:-200])
    elif kind == "cut in half":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "a flipped bit":
        place = len(content) // 3
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
    elif kind == "no checksum":
        checksum(path).unlink()
    elif kind == "another checksum":
        checksum(path).write_text(f"{0:064x}  {path.name}\n")
    elif kind == "an empty checksum":
        checksum(path).write_bytes(b"")


def checksum(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


DAMAGE = (
    *("truncated", "cut in half", "empty", "a flipped bit"),
    *("no checksum", "another checksum", "an empty checksum"),
)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_is_skipped_for_the_previous_one(tmp_path: Path, kind: str) -> None:
    for step in (3, 5):
        C.save_state(tmp_path, {"step": step, "model": {"weight": torch.full((100, 100), float(step))}})
    newest, before = C.states(tmp_path)
    damage(newest, kind)
    said: list[str] = []
    assert C.load_state(tmp_path, said.append)["step"] == 3
    assert len(said) == 1
    assert str(newest) in said[0]
    assert "Going back to the checkpoint before it, step-00000003.pt" in said[0]
    damage(before, "truncated")
    with pytest.raises(ValueError, match=r"step-00000005\.pt.*step-00000003\.pt is trunc.*overwrite"):
        C.load_state(tmp_path)


def write_foreign(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("not a checkpoint\n" * 50)
    elif kind == "hostile pickle":
        path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    elif kind == "hostile archive":
        torch.save({"mark": Hostile()}, path)
    elif kind == "another's":
        torch.save({"epoch": 3, "model": {}}, path)
    elif kind == "a tensor":
        torch.save(torch.ones(3), path)
    elif kind == "a later format":
        torch.save(torch.load(path, weights_only=True) | {"format": 99}, path)
    checksum(path).write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")


@pytest.mark.parametrize(
    "kind", ["text", "hostile pickle", "hostile archive", "another's", "a tensor", "a later format"]
)
def test_a_foreign_state_is_an_error_and_runs_no_code(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "it ran code"
    monkeypatch.setenv("HOSTILE_MARK", str(mark))
    C.save_state(tmp_path, {"step": 1, "model": {"weight": torch.randn(100, 100)}})
    write_foreign(C.states(tmp_path)[0], kind)
    with pytest.raises(ValueError, match=r"step-00000001\.pt.*overwrite"):
        C.load_state(tmp_path)
    assert not mark.exists()


def test_a_state_of_another_version_is_not_skipped(tmp_path: Path) -> None:
    for step in (3, 5):
        C.save_state(tmp_path, {"step": step})
    write_foreign(C.states(tmp_path)[0], "a later format")
    with pytest.raises(ValueError, match="has format 99, this version of awnet reads 2"):
        C.load_state(tmp_path)


def test_a_run_whose_newest_state_is_damaged_goes_back_and_ends_the_same(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The log, the weights and the best weights are cut back to the state that is used."""
    stop_at(9, crash)
    with pytest.raises(MemoryError):
        go(tmp_path / "run")
    newest, before = C.states(tmp_path / "run")
    assert (newest.name, before.name) == ("step-00000008.pt", "step-00000004.pt")
    damage(newest, "a flipped bit")
    (tmp_path / "run" / "best.safetensors").write_bytes(b"of a later epoch")
    for place in (tmp_path / "run" / ".last.safetensors.x.tmp", tmp_path / "run" / "state" / ".s.tmp"):
        place.write_bytes(b"left behind by a killed process")
    stop_at(1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", resume=True, quiet=False)
    said = capsys.readouterr().out
    assert "step-00000008.pt is truncated or damaged" in said
    assert "after step 4" in said
    assert [path.name for path in C.states(tmp_path / "run")] == ["step-00000005.pt", "step-00000004.pt"]
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert len(read_log(tmp_path / "run", "epoch")) == 1
    from safetensors.torch import load_file

    assert_same(
        load_file(tmp_path / "run" / "best.safetensors"), C.load_state(tmp_path / "run")["best_model"]
    )
    stop_at(None)
    assert go(tmp_path / "run", resume=True).finished
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("keep", [1, 3])
def test_keep_bounds_the_number_of_states(tmp_path: Path, keep: int) -> None:
    stop_at(None)
    go(tmp_path / "run", keep_checkpoints=keep)
    steps = [0, 4, 8, 12][-keep:]
    names = {f"step-{step:08d}.pt{end}" for step in steps for end in ("", ".sha256")}
    assert {path.name for path in (tmp_path / "run" / "state").iterdir()} == names


def test_checksums_are_those_of_sha256sum(uninterrupted: Path) -> None:
    actual = subprocess.run(
        ["sha256sum", "--check", "--strict", *(checksum(path).name for path in C.states(uninterrupted))],
        cwd=uninterrupted / "state",
        capture_output=True,
        text=True,
    )
    assert actual.returncode == 0, actual.stderr
    assert actual.stdout.count(": OK") == 2


def test_damaged_states_stop_train_before_it_changes_anything(tmp_path: Path) -> None:
    stop_at(3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run")
    for path in C.states(tmp_path / "run"):
        damage(path, "truncated")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match="truncated"):
        go(tmp_path / "run", resume=True)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


# --- no state, no run


def test_a_folder_without_a_state_or_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        C.load_state(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        C.read_config(tmp_path)
    assert not C.is_run(tmp_path)
    (tmp_path / "config.json").write_text('{"mark": ')
    with pytest.raises(ValueError, match="not readable as JSON"):
        C.read_config(tmp_path)


def test_fingerprints_depend_on_weights_and_shapes() -> None:
    one, two = teacher(1), teacher(1)
    assert weights_fingerprint(one) == weights_fingerprint(two)
    with torch.no_grad():
        two[1].weight[0, 0] += 1e-6  # type: ignore[union-attr, index]
    assert weights_fingerprint(one) != weights_fingerprint(two)
    assert weights_fingerprint(nn.BatchNorm2d(3)) != weights_fingerprint(nn.BatchNorm2d(4))

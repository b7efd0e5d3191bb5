"""Run folders that are moved, deleted, locked by another process, not empty or on a full disk."""

from __future__ import annotations

import errno
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interrupted_runs import (
    PLAN,
    RECIPE,
    SPLITS,
    STEPS,
    assert_same_run,
    crash,
    go,
    stop_at,
    timeless,
)
from support.processes import context, start

from awnet import files
from awnet.files import written_atomically
from awnet.training import MTARD, PGDAT, read_log, train
from awnet.training import checkpoint as C
from awnet.training.logging import RunLog
from awnet.training.setup import memory_advice

CPU = torch.device("cpu")


# where a subprocess finds this module and tests/support
IMPORT_PATH = [str(path) for path in Path(__file__).resolve().parents[:2]]


pytestmark = pytest.mark.usefixtures("one_thread", "signals_act")


# --- a run folder that is moved or deleted while a run writes to it


@pytest.mark.parametrize(("step", "replaced"), [(1, False), (6, True), (12, False)])
def test_a_run_folder_that_is_renamed_during_training_is_followed(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int, replaced: bool
) -> None:
    old, new = tmp_path / "run", tmp_path / "elsewhere" / "kept"
    new.parent.mkdir()

    def rename() -> None:
        while not C.states(old):  # the first state is written in the background
            time.sleep(0.01)
        old.rename(new)
        if replaced:
            old.mkdir()
            (old / "notes.txt").write_text("the user's own")

    stop_at(step, rename)
    result = go(old, quiet=False, tensorboard=step == 6)
    assert result.folder == new
    assert f"{old} was renamed during training; the run continues in {new}" in capsys.readouterr().out
    assert_same_run(uninterrupted, new)
    assert timeless(result.history) == timeless(read_log(new, "epoch"))
    assert not old.exists() if not replaced else [path.name for path in old.iterdir()] == ["notes.txt"]
    if step == 6:
        assert len(list((new / "tensorboard").iterdir())) == 2  # the second was begun at the new place


def test_a_run_folder_that_is_renamed_while_a_checkpoint_is_written(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is renamed while a file is written, so its temporary file is no longer there."""
    stop_at(None)
    old, new, save, count = tmp_path / "run", tmp_path / "new", torch.save, 0

    def slow(state: Any, file: Any) -> None:
        nonlocal count
        save(state, file)
        count += 1
        if count == 2:
            old.rename(new)

    monkeypatch.setattr(torch, "save", slow)
    assert go(old).folder == new
    assert_same_run(uninterrupted, new)
    assert not old.exists()
    assert not list(new.rglob("*.tmp"))


def test_a_run_folder_that_is_renamed_while_a_teacher_trains(tmp_path: Path) -> None:
    old, new = tmp_path / "run", tmp_path / "new"
    recipe = MTARD(epochs=1, batch_size=4, attack_steps=1, robust_teacher="pgd_at")
    once = [True]

    attack = PGDAT.attack

    def renaming(self: Any, *arguments: Any) -> Any:
        if once:
            once.clear()
            old.rename(new)
        return attack(self, *arguments)

    stop_at(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PGDAT, "attack", renaming)
        result = train(recipe, "resnet_tiny", SPLITS, old, quiet=True, tensorboard=False)
    assert not once
    assert result.folder == new
    assert result.finished
    assert C.load_state(new / "teachers" / "robust")["finished"]
    assert not old.exists()


@pytest.mark.parametrize("recreated", [False, True])
def test_a_run_folder_that_is_deleted_during_training_stops_it_and_does_not_come_back(
    tmp_path: Path, recreated: bool
) -> None:
    run = tmp_path / "run"

    def delete() -> None:
        while [path.name for path in C.states(run)] != ["step-00000004.pt", "step-00000000.pt"] or list(
            run.rglob("*.tmp")
        ):  # a state is written in the background
            time.sleep(0.01)
        shutil.rmtree(run)
        if recreated:
            run.mkdir()

    stop_at(5, delete)
    with pytest.raises(FileNotFoundError, match="was deleted or moved away during training"):
        go(run)
    assert PLAN["step"] < 3 * STEPS
    assert not run.exists() or not list(run.iterdir())


# --- what is there already


def test_a_finished_run_is_only_loaded(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop_at(1, crash)  # no step is to be made
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    result = go(uninterrupted, resume=True, quiet=False)
    assert "is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")} == before
    assert result.finished
    assert result.validation == C.load_state(uninterrupted)["best"]
    assert len(result.history) == 3


def test_an_existing_run_needs_resume_or_overwrite(uninterrupted: Path) -> None:
    stop_at(1, crash)
    with pytest.raises(FileExistsError, match=r"already holds a run.*--resume.*--overwrite"):
        go(uninterrupted)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_foreign_folder_is_not_touched(tmp_path: Path, options: dict[str, bool]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "config.json").write_text('{"model": "somebody else\'s"}')
    with pytest.raises(FileExistsError, match="holds no training run"):
        go(tmp_path, **options)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_is_being_created_counts_as_a_new_run(tmp_path: Path) -> None:
    """Two processes start at the same time, or one was killed while it wrote its config.json."""
    other = tmp_path / "compared" / "other"
    other.mkdir(parents=True)
    with C.locked(other), written_atomically(other / "config.json") as temporary:
        C.check(tmp_path, resume=True)
        temporary.rename(other / ".config.json.killed.tmp")
        temporary.touch()
    (other / "config.json").unlink()
    C.check(other)
    (other / "notes.txt").write_text("somebody's")
    for folder in (tmp_path, other):
        with pytest.raises(FileExistsError, match="holds no training run"):
            C.check(folder, resume=True)


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        go(tmp_path / "run")


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    stop_at(None)
    go(tmp_path / "run")
    first = C.load_state(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "evaluations").mkdir()
    go(tmp_path / "run", overwrite=True, seed=6)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "evaluations").exists()
    assert len(read_log(tmp_path / "run", "epoch")) == 3
    assert C.read_config(tmp_path / "run")["seed"] == 6
    stem = "dynamic.stem.weight"
    assert not torch.equal(C.load_state(tmp_path / "run")["model"][stem], first["model"][stem])


def test_resume_starts_a_new_run_where_there_is_none(tmp_path: Path) -> None:
    stop_at(None)
    assert go(tmp_path / "run", resume=True).finished


# --- two processes, one folder


def train_and_wait(run: Path, reached: Event) -> None:
    def wait() -> None:
        reached.set()
        time.sleep(1000)

    stop_at(2, wait)
    go(run)


def test_a_second_process_is_refused_while_the_first_trains(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    reached = context.Event()
    first = start(train_and_wait, run, reached)
    try:
        while not reached.wait(0.01) or not C.states(run):  # its first state is written in the background
            assert first.is_alive()
        before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(
                BlockingIOError, match=rf"another process .*\(process {first.pid} on .*, since"
            ):
                go(run, **options)
        with pytest.raises(BlockingIOError, match="another process trains in"):
            C.claim(run, overwrite=True)
        with pytest.raises(FileExistsError, match="already holds a run"):
            go(run)
        assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    finally:
        first.kill()  # which leaves no lock behind
        first.join()
    stop_at(None)
    assert go(run, resume=True).finished
    assert_same_run(uninterrupted, run)


def test_a_second_process_is_refused_in_a_new_folder(tmp_path: Path) -> None:
    with C.locked(tmp_path / "run"):
        with pytest.raises(BlockingIOError, match=r"another process trains in .*run: wait for it"):
            go(tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    stop_at(None)
    assert go(tmp_path / "run").finished  # the lock's file alone is no run


def test_a_file_system_without_locks_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unable(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unable)
    stop_at(None)
    assert go(tmp_path / "run", quiet=False).finished
    assert "could not be locked ([Errno 37] No locks available)" in capsys.readouterr().out


# --- out of memory


def gpu_is_full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def host_is_full() -> None:
    torch.empty(2**50)  # a pebibyte, which the system refuses in earnest


@pytest.mark.parametrize(
    ("full", "told"),
    [(gpu_is_full, "Tried to allocate 2.00 GiB"), (host_is_full, "can't allocate memory"), (crash, "fell")],
)
def test_out_of_memory_comes_with_advice(
    uninterrupted: Path, tmp_path: Path, full: Callable[[], None], told: str
) -> None:
    stop_at(7, full)
    with pytest.raises(MemoryError, match=f"memory of cpu or of the host is full .*{told}") as raised:
        go(tmp_path / "run")
    advice = str(raised.value)
    for part in ("--resume", "on more ranks", "accumulate (now 1)", "batch_size (now 4)", "bfloat16"):
        assert part in advice
    assert C.load_state(tmp_path / "run")["step"] == 4
    stop_at(None)
    assert go(tmp_path / "run", resume=True).finished
    assert_same_run(uninterrupted, tmp_path / "run")


def test_memory_advice_depends_on_the_device(tmp_path: Path) -> None:
    with (
        pytest.raises(MemoryError) as raised,
        memory_advice(RECIPE, torch.device("cuda"), tmp_path),
    ):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    assert "--data-memory host" in str(raised.value)
    assert "bfloat16" not in str(raised.value)  # it is that already
    with pytest.raises(RuntimeError, match="shapes"), memory_advice(RECIPE, CPU, tmp_path):
        raise RuntimeError("shapes cannot be multiplied")


# --- a full disk


def test_a_state_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    C.save_state(tmp_path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        C.save_state(tmp_path, {"step": 2, "model": lambda: None})

    def full(state: Any, file: Any) -> None:
        file.write(b"the beginning of a state")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            C.save_state(tmp_path, {"step": 2})
    assert C.load_state(tmp_path)["step"] == 1
    assert {p.name for p in (tmp_path / "state").iterdir()} == {"step-00000001.pt", "step-00000001.pt.sha256"}


def test_a_run_survives_a_disk_that_is_full_for_a_while(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of the second epoch cannot be written: a warning is printed, and the next one succeeds."""
    stop_at(None)
    save, count = torch.save, 0

    def full(state: Any, file: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            file.write(b"the beginning of a state")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    assert go(tmp_path / "run", quiet=False).finished
    said = capsys.readouterr().out
    assert said.count("warning: a checkpoint could not be written ([Errno 28] No space left on device)") == 1
    assert [path.name for path in C.states(tmp_path / "run")] == ["step-00000012.pt", "step-00000004.pt"]
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert_same_run(uninterrupted, tmp_path / "run")


def train_without_room(run: Path, limit: bool) -> None:
    """Resumes a run with a whole checkpoint of its first step, where no further one can be written."""
    stop_at(None)
    go(run, max_minutes=1e-9)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # EFBIG, from the system itself
    else:
        free = os.statvfs(run).f_bavail * os.statvfs(run).f_bsize
        (run.parent / "ballast").write_bytes(bytes(free - 8192))
    try:
        go(run, resume=True, quiet=False)
    except OSError as error:
        print("at the end:", error)
    print("state of step", C.load_state(run)["step"])
    print("left behind:", [path.name for path in run.rglob("*.tmp")])


FULL = """
import sys
sys.path[:0] = {path}
import torch, test_run_folder as t
torch.set_num_threads(1)
t.train_without_room(t.Path({run!r}), limit=False)
"""


@pytest.mark.parametrize("how", ["a limit of the system", "a full file system"])
def test_a_run_without_room_to_save_trains_to_its_end(uninterrupted: Path, tmp_path: Path, how: str) -> None:
    """No checkpoint can be written: the run trains to its end and fails; its old checkpoint is intact."""
    run, text = tmp_path / "disk" / "run", tmp_path / "printed.txt"
    run.parent.mkdir()
    if how == "a limit of the system":
        process = start(train_without_room, run, True, output=text)
        process.join()
        assert process.exitcode == 0, text.read_text()
        printed = text.read_text()
    else:
        (tmp_path / "job.py").write_text(FULL.format(path=IMPORT_PATH, run=str(run)))
        command = [sys.executable, str(tmp_path / "job.py")]
        mount = f"mount -t tmpfs -o size=2m none {shlex.quote(str(tmp_path / 'disk'))}"
        if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
            pytest.skip("this system lets nobody mount a small file system")
        command = ["unshare", "-rm", "sh", "-c", f"{mount} && {shlex.join(command)}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    assert "warning: a checkpoint could not be written" in printed
    assert "at the end: the checkpoint of step 12 could not be written" in printed
    assert "state of step 1\n" in printed
    assert "left behind: []" in printed
    if how == "a limit of the system":  # the other disk is gone with its name space
        assert go(run, resume=True).finished
        assert_same_run(uninterrupted, run)


def test_log_lines_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    said: list[str] = []
    log = RunLog(tmp_path, tensorboard=False, warn=said.append)
    log.write({"kind": "step", "step": 1})
    disk, log.file = log.file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for step in (2, 3):
        log.write({"kind": "step", "step": step})
    assert len(said) == 1
    assert "the log could not be written" in said[0]
    assert log.length == 3 * len('{"kind": "step", "step": 1}\n')
    with pytest.raises(OSError, match="waits for room"):
        log.sync(log.length)
    log.file.close()
    log.file = disk
    log.write({"kind": "step", "step": 4})
    log.sync(log.length)
    log.close()
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4]

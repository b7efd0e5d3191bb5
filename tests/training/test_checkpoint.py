"""Run folders and resumption: a run that was stopped anywhere ends with the bits of one that was not."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.processes import context, start
from torch import nn

from awnet import early_signals, files
from awnet.data import Splits, from_arrays
from awnet.files import written_atomically
from awnet.models.files import weights_fingerprint
from awnet.nn import AdversarialRouter, AWNet, Backbone
from awnet.training import MTARD, PGDAT, RunResult, read_log, train
from awnet.training import checkpoint as C
from awnet.training import losses as L
from awnet.training.logging import RunLog
from awnet.training.setup import memory_advice

CPU = torch.device("cpu")
# where a subprocess finds this module and tests/support
IMPORT_PATH = [str(path) for path in Path(__file__).resolve().parents[:2]]
K, STEPS = 3, 4  # classes, steps an epoch


def model(seed: int = 0) -> nn.Module:
    """A small AW-Net with dropout, which draws from torch's own generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dynamic = Backbone("basic", [1], [4], num_classes=K, in_channels=1)
        router = AdversarialRouter(dynamic.signal_widths, in_channels=1, widths=(4,), blocks=(1,))
        dynamic.classifier = nn.Sequential(nn.Dropout(0.3), dynamic.classifier)  # type: ignore[assignment, arg-type]
        return AWNet(dynamic, router)


def teacher(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, K))


def make_splits(seed: int = 0) -> Splits:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, n in (("train", 4 * STEPS - 1), ("validation", 6), ("test", 6)):
        x = torch.randint(0, 256, (n, 1, 4, 4), generator=generator).to(torch.uint8)
        parts.append(
            from_arrays(x, torch.arange(n) % K, name="noise", split=name, eps=0.05, shift=1, flip=True)
        )
    return Splits(*parts)


SPLITS = make_splits()
TEACHERS = (teacher(1), teacher(2))

# what happens inside a run's loss at a step, counted from 1 over all the process; reset by each test
PLAN: dict[str, Any] = {"step": 0, "at": None, "do": None}


def planned(*arguments: Any) -> L.LossResult:
    PLAN["step"] += 1
    if PLAN["step"] == PLAN["at"]:
        PLAN["do"]()
    return L.mtard(*arguments)


@dataclass(frozen=True)
class Planned(MTARD):
    """MTARD in all but the interruption that ``PLAN`` holds."""

    loss: ClassVar[L.Loss] = staticmethod(planned)


RECIPE = Planned(
    epochs=3,
    batch_size=4,
    attack_steps=1,
    log_every=3,
    lr=0.05,
    milestones=(1, 2),
    weight_lr=0.5,
)


def go(out: Path, recipe: MTARD = RECIPE, **options: Any) -> RunResult:
    settings: dict[str, Any] = {"teachers": TEACHERS, "seed": 5, "quiet": True, "tensorboard": False}
    return train(recipe, model(), options.pop("splits", SPLITS), out, **(settings | options))


def stop_at(step: int | None, do: Callable[[], None] | None = None) -> None:
    PLAN.update(step=0, at=step, do=do)


pytestmark = pytest.mark.usefixtures("one_thread", "signals_act")


@pytest.fixture
def signals_act() -> Iterator[None]:
    """SIGINT and SIGHUP as in a terminal, also where the tests run in the background or under nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stop_at(None)
    return go(tmp_path_factory.mktemp("whole") / "run").folder


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records]


def assert_same(one: Any, two: Any, path: str = "state") -> None:
    """Bitwise, all the way down."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), path
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for name in one:
            if name not in ("seconds", "log_bytes"):  # of the clock, and of the digits it takes
                assert_same(one[name], two[name], f"{path}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), path
        for i, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    else:
        assert one == two, path


def assert_same_run(whole: Path, resumed: Path) -> None:
    assert_same(C.load_state(whole), C.load_state(resumed))
    assert timeless(read_log(whole)) == timeless(read_log(resumed))
    for name in ("last.safetensors", "best.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise MemoryError("something fell")


# --- exact resumption


@pytest.mark.parametrize(
    ("how", "raised", "step"),
    [
        (interrupt, KeyboardInterrupt, 3),
        (interrupt, KeyboardInterrupt, 4),  # an epoch's last
        (terminate, SystemExit, 5),
        (terminate, SystemExit, 8),
        (crash, MemoryError, 1),
        (crash, MemoryError, 4),
        (crash, MemoryError, 11),
    ],
)
def test_a_run_stopped_at_a_step_resumes_with_the_same_bits(
    uninterrupted: Path, tmp_path: Path, how: Callable[[], None], raised: type[BaseException], step: int
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop_at(step, how)
    with pytest.raises(raised):
        go(tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    saved = C.load_state(tmp_path / "run")
    if how is crash:  # nothing could be saved: back to the last epoch's end
        assert saved["step"] == (step - 1) // STEPS * STEPS
    else:  # the step was finished and saved
        assert saved["step"] == step
        assert saved["batch"] == step % STEPS
    stop_at(None)
    torch.manual_seed(step)  # the new process has another random state
    result = go(tmp_path / "run", resume=True)
    assert result.finished
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_run_stopped_repeatedly_ends_with_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    """One step at a time, as a job on a machine that is lent for seconds."""
    run, sessions = tmp_path / "run", 0
    while True:
        stop_at(1, interrupt)
        try:
            result = go(run, resume=True)
        except KeyboardInterrupt:
            sessions += 1
            continue
        break
    assert sessions == 3 * STEPS - 1  # at the very last step there is nothing left to stop
    assert result.finished
    assert_same_run(uninterrupted, run)
    assert len(C.read_config(run)["sessions"]) == 3 * STEPS


def test_a_run_out_of_time_resumes_with_the_same_bits(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(None)
    result = go(tmp_path / "run", max_minutes=1e-9, quiet=False)
    assert not result.finished
    assert result.history == []
    assert result.validation == {}
    assert "stopped in epoch 1 of 3, after step 1; saved in" in capsys.readouterr().out
    assert go(tmp_path / "run", resume=True).finished
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_run_killed_between_the_files_of_a_checkpoint_resumes(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log and the weights of the second epoch are written, its state is not."""
    stop_at(None)
    write, count = C.save_state, 0

    def fall(*arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:  # the start, the first epoch, the second epoch
            raise MemoryError("something fell")
        write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(C, "save_state", fall)
        with pytest.raises(MemoryError):  # at the next time that the loop meets the writer
            go(tmp_path / "run")
    assert len(read_log(tmp_path / "run", "epoch")) == 3
    assert C.load_state(tmp_path / "run")["epoch"] == 1
    go(tmp_path / "run", resume=True)
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_run_saves_within_a_long_epoch(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(C.Writer, "busy", False)  # so that each step waits for the writer
        stop_at(7, crash)
        with pytest.raises(MemoryError):
            go(tmp_path / "run", checkpoint_minutes=1e-9)
    assert C.load_state(tmp_path / "run")["step"] == 6
    stop_at(None)
    go(tmp_path / "run", resume=True)
    assert_same_run(uninterrupted, tmp_path / "run")


def test_training_continues_while_a_checkpoint_is_written(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is held until step 3 begins: steps 1 and 2 find it busy, and pass."""
    reached, writing = threading.Event(), threading.Lock()
    save, saved = C.save_state, []

    def slow(folder: Path, state: dict[str, Any], **options: Any) -> None:
        assert writing.acquire(blocking=False)
        assert state["step"] != 0 or reached.wait(30)
        save(folder, state, **options)
        saved.append(state["step"])
        writing.release()

    monkeypatch.setattr(C, "save_state", slow)
    stop_at(3, reached.set)
    go(tmp_path / "run", checkpoint_minutes=1e-9)
    assert {0, 4, 8, 12} <= set(saved)
    assert not {1, 2} & set(saved)
    assert sorted(set(saved)) == saved
    assert_same_run(uninterrupted, tmp_path / "run")


def train_until_sigterm(run: Path) -> None:
    stop_at(2, terminate)
    go(run, quiet=False)


def test_sigterm_saves_and_another_process_resumes(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM: the exit status says so, the message says how to resume, and another process resumes."""
    stopped = start(train_until_sigterm, tmp_path / "run", output=tmp_path / "printed.txt")
    stopped.join()
    printed = (tmp_path / "printed.txt").read_text()
    assert stopped.exitcode == 128 + signal.SIGTERM, printed
    assert "finishing the step" in printed
    assert "with --resume" in printed
    stop_at(None)
    assert go(tmp_path / "run", resume=True, quiet=False).finished
    assert "after step 2" in capsys.readouterr().out
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        raise KeyboardInterrupt

    stop_at(2, twice)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run")
    assert C.load_state(tmp_path / "run")["step"] == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_hangup_or_a_batch_systems_warning_saves_and_stops_however_often_it_comes(
    uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    def send() -> None:
        for _ in range(3):
            os.kill(os.getpid(), number)

    stop_at(6, send)
    with pytest.raises(SystemExit) as stopped:
        go(tmp_path / "run")
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == signal.SIG_DFL
    assert C.load_state(tmp_path / "run")["step"] == 6
    stop_at(None)
    assert go(tmp_path / "run", resume=True).finished
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_hangup_before_training_begins_saves_and_stops_after_the_first_step(
    number: int, tmp_path: Path
) -> None:
    usual = signal.getsignal(number)
    stop_at(None)
    with early_signals.noted():
        os.kill(os.getpid(), number)
        with pytest.raises(SystemExit) as ended:
            go(tmp_path / "run")
    assert ended.value.code == 128 + number
    assert C.load_state(tmp_path / "run")["step"] == 1
    assert signal.getsignal(number) == usual
    assert early_signals.take() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_an_ignored_signal_stays_ignored(tmp_path: Path, number: signal.Signals) -> None:
    """SIGHUP under nohup, SIGINT in a shell's background job."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        stop_at(2, lambda: os.kill(os.getpid(), number))
        assert go(tmp_path / "run").finished
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_programs_own_handler_of_a_batch_systems_signal_stays(tmp_path: Path) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    try:
        stop_at(2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert go(tmp_path / "run").finished
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == [signal.SIGUSR1]


def test_a_run_interrupted_while_a_teacher_trains_resumes(tmp_path: Path) -> None:
    """The student's run has begun but has no state yet; resumed, it finishes teacher and student."""
    recipe = MTARD(epochs=1, batch_size=4, attack_steps=1, robust_teacher="pgd_at")
    student = "resnet_tiny"
    result = train(recipe, student, SPLITS, tmp_path, max_minutes=1e-9, quiet=True, tensorboard=False)
    assert not result.finished
    assert not (tmp_path / "state").exists()
    assert C.load_state(tmp_path / "teachers" / "clean")["step"] == 1
    result = train(recipe, student, SPLITS, tmp_path, resume=True, quiet=True, tensorboard=False)
    assert result.finished


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
    """In the middle of a file, so that its temporary name is no longer there."""
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


# --- the log and TensorBoard after a resumption


def test_a_log_of_a_run_is_checked_before_the_run_is_resumed(tmp_path: Path) -> None:
    stop_at(9, crash)
    with pytest.raises(MemoryError):
        go(tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    whole = log.read_bytes()
    length = C.load_state(tmp_path / "run")["log_bytes"]
    lines = whole[:length].splitlines(keepends=True)
    blank = b'{"kind": "step", "step": 1, "fill": "%s"}\n'
    epoch = next(line for line in lines if b'"kind": "epoch"' in line)
    damaged = {
        "a line is missing": b"".join(lines[:-1]),
        "empty": b"",
        "bytes that are no text": whole[:30] + b"\xff" * 20 + whole[50:],
        "a line that is no record": whole.replace(lines[0], b"[%s]\n" % (b" " * (len(lines[0]) - 3))),
        "a line cut in two": whole[: length - 10] + b"\n" + whole[length - 9 :],
        "text beyond a shortened end": whole[: length - 5] + b"x" * 50,
        "another order": b"".join([*lines[1:], lines[0]]),
        "an epoch less": whole.replace(epoch, blank % (b"x" * (len(epoch) - len(blank) + 2))),
    }
    for what, content in damaged.items():
        log.write_bytes(content)
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        stop_at(None)
        with pytest.raises(ValueError, match=r"log\.jsonl.*: put the log back, or move it away"):
            go(tmp_path / "run", resume=True)
        assert PLAN["step"] == 0, what  # nothing was trained
        assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}, what


def test_a_run_whose_log_was_moved_away_resumes_with_a_new_one(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (9, 2):
        stop_at(step, terminate)
        with pytest.raises(SystemExit):
            go(tmp_path / "run", resume=True, quiet=False)
        if step == 9:
            (tmp_path / "run" / "log.jsonl").rename(tmp_path / "log.jsonl")
    assert "log.jsonl is missing: a new one begins after step 9" in capsys.readouterr().out
    stop_at(None)
    result = go(tmp_path / "run", resume=True)
    assert [record["epoch"] for record in result.history] == [3]
    assert timeless(read_log(tmp_path / "run")) == timeless(read_log(uninterrupted))[-2:]
    assert_same(C.load_state(uninterrupted), C.load_state(tmp_path / "run"))


def test_a_run_is_resumed_with_the_same_images_in_another_place(uninterrupted: Path, tmp_path: Path) -> None:
    def of(place: str) -> Splits:
        return Splits(*(replace(part, source=place) for part in SPLITS))

    stop_at(5, terminate)
    with pytest.raises(SystemExit):
        go(tmp_path / "run", splits=of("/scratch/job1"))
    stop_at(None)
    assert go(tmp_path / "run", splits=of("/scratch/job2"), resume=True).finished
    assert_same_run(uninterrupted, tmp_path / "run")
    assert C.read_config(tmp_path / "run")["dataset"]["source"] == "/scratch/job2"
    other = Splits(*(replace(part, images=part.images.flip(3)) for part in of("/scratch/job2")))
    with pytest.raises(ValueError, match=r"another configuration: dataset\.fingerprints"):
        go(tmp_path / "run", splits=other, resume=True)


def test_tensorboard_does_not_repeat_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stop_at(7, crash)
    with pytest.raises(MemoryError):
        go(tmp_path / "run", tensorboard=True)
    stop_at(None)
    go(tmp_path / "run", tensorboard=True, resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("step/total")] == [3, 6, 9, 12]
    assert [event.step for event in events.Scalars("epoch/clean_accuracy")] == [4, 8, 12]


def test_a_truncated_log_line_is_skipped(uninterrupted: Path, tmp_path: Path) -> None:
    lines = (uninterrupted / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(lines[:-20])
    assert len(read_log(tmp_path)) == len(lines.splitlines()) - 1
    (tmp_path / "log.jsonl").write_text("{]\n" + lines)
    with pytest.raises(ValueError, match="line 1"):
        read_log(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        read_log(tmp_path / "none")


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
    """As two processes that begin together see it, or one that was killed while it wrote its config.json."""
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
    """By the state, not by the last session: that may have ended before it had saved anything."""
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
    """The recipe, the model's name and the data are the same, but not what the code makes of them."""
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
    found = subprocess.run(
        ["sha256sum", "--check", "--strict", *(checksum(path).name for path in C.states(uninterrupted))],
        cwd=uninterrupted / "state",
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(": OK") == 2


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
    """The checkpoint of the second epoch cannot be written: a warning, and all is well at the end."""
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
import test_checkpoint as t
t.torch.set_num_threads(1)
t.train_without_room(t.Path({run!r}), limit=False)
"""


@pytest.mark.parametrize("how", ["a limit of the system", "a full file system"])
def test_a_run_without_room_to_save_trains_to_its_end(uninterrupted: Path, tmp_path: Path, how: str) -> None:
    """The system refuses in earnest: the run trains to its end, says so, and its old checkpoint is whole."""
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


# --- killed anywhere

LONG = Planned(**{**vars(RECIPE), "epochs": 12, "milestones": (6, 9)})


def in_a_process(run: Path) -> None:
    torch.set_num_threads(1)
    stop_at(None)
    go(run, LONG, checkpoint_minutes=1e-9)


def newest(run: Path) -> int:
    return max((int(path.stem[5:]) for path in C.states(run)), default=-1)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Twenty runs, with a checkpoint being written at almost every step: SIGKILL to each at a random moment,
    to every second one while a state is being written. All of them resume and end with the same bits."""
    stop_at(None)
    whole, steps = tmp_path / "whole", LONG.epochs * STEPS
    go(whole, LONG)
    chance, stages, torn = random.Random(), [], 0
    for number in range(20):
        run, killed = tmp_path / f"run {number}", False
        while not killed:  # the rare one that ends before its moment comes begins anew
            shutil.rmtree(run, ignore_errors=True)
            process = start(in_a_process, run)
            after, writing = chance.randrange(-1, steps - 1), number % 2 == 1
            while process.is_alive() and newest(run) < after:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.03))
            while process.is_alive() and writing and not list((run / "state").glob(".step-*.pt.*.tmp")):
                pass
            process.kill()
            process.join()
            killed = process.exitcode == -signal.SIGKILL
        stages.append(newest(run))
        torn += bool(list(run.rglob(".*.tmp")))
        assert go(run, LONG, resume=True).finished
        assert_same_run(whole, run)
        shutil.rmtree(run)
    assert len(set(stages)) > 5  # at moments of all kinds
    assert torn >= 5  # and in the middle of a file: of ten that were awaited some finish it just in time

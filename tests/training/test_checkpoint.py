"""Run folders and resumption: a run that was stopped anywhere ends bit-identical to an uninterrupted one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interrupted_runs import (
    PLAN,
    RECIPE,
    SPLITS,
    STEPS,
    Planned,
    assert_same,
    assert_same_run,
    crash,
    go,
    interrupt,
    newest,
    stop_at,
    timeless,
)
from support.processes import start

from awnet import early_signals
from awnet.data import Splits
from awnet.training import MTARD, read_log, train
from awnet.training import checkpoint as C

pytestmark = pytest.mark.usefixtures("one_thread", "signals_act")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


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
    """The run is stopped after every step."""
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
    """The writer is blocked until step 3 begins: steps 1 and 2 continue without a checkpoint."""
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
    with early_signals.recorded():
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


# --- killed anywhere

LONG = Planned(**{**vars(RECIPE), "epochs": 12, "milestones": (6, 9)})


def in_a_process(run: Path) -> None:
    torch.set_num_threads(1)
    stop_at(None)
    go(run, LONG, checkpoint_minutes=1e-9)


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

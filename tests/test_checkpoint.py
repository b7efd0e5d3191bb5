"""Run folders and resumption: a run that was stopped anywhere ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from awnet.data import Splits, from_arrays
from awnet.nn import AdversarialRouter, AWNet, Backbone
from awnet.training import MTARD, PGDAT, loop, read_log, train
from awnet.training import checkpoint as C
from awnet.training import losses as L

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


def go(out: Path, recipe: MTARD = RECIPE, **options: Any) -> loop.RunResult:
    settings: dict[str, Any] = {"teachers": TEACHERS, "seed": 5, "quiet": True, "tensorboard": False}
    return train(recipe, model(), SPLITS, out, **(settings | options))


def stop_at(step: int | None, do: Callable[[], None] | None = None) -> None:
    PLAN.update(step=0, at=step, do=do)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On networks this small a second thread costs more than it gains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
def test_stopped_at_a_step_and_resumed(
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


def test_stopped_again_and_again(uninterrupted: Path, tmp_path: Path) -> None:
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


def test_out_of_time_and_resumed(
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


def test_killed_between_the_files_of_a_checkpoint(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log and the weights of the second epoch are written, its state is not."""
    stop_at(None)
    write, count = C.save_state, 0

    def fall(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:  # the start, the first epoch, the second epoch
            raise MemoryError("something fell")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(C, "save_state", fall)
        with pytest.raises(MemoryError):
            go(tmp_path / "run")
    assert len(read_log(tmp_path / "run", "epoch")) == 2
    assert C.load_state(tmp_path / "run")["epoch"] == 1
    go(tmp_path / "run", resume=True)
    assert_same_run(uninterrupted, tmp_path / "run")


def test_saved_within_a_long_epoch(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0.0)
    stop_at(7, crash)
    with pytest.raises(MemoryError):
        go(tmp_path / "run")
    assert C.load_state(tmp_path / "run")["step"] == 6
    stop_at(None)
    go(tmp_path / "run", resume=True)
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_process_that_is_told_to_stop(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM: the exit status says so, the message says how to go on, and another process goes on."""
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch, test_checkpoint as t
        torch.set_num_threads(1)
        t.stop_at(2, t.terminate)
        t.go(t.Path({str(tmp_path / "run")!r}), quiet=False)
        """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    stopped = subprocess.run(command, capture_output=True, text=True)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "finishing the step" in stopped.stdout
    assert "with --resume" in stopped.stdout
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


def test_interrupted_while_a_teacher_trains(tmp_path: Path) -> None:
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


def test_a_log_line_cut_short_is_passed_over(uninterrupted: Path, tmp_path: Path) -> None:
    lines = (uninterrupted / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(lines[:-20])
    assert len(read_log(tmp_path)) == len(lines.splitlines()) - 1
    (tmp_path / "log.jsonl").write_text("{]\n" + lines)
    with pytest.raises(ValueError, match="line 1"):
        read_log(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run folder"):
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


def test_an_existing_run_needs_a_word(uninterrupted: Path) -> None:
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


def test_resume_begins_where_there_is_nothing(tmp_path: Path) -> None:
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


def test_another_machine_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop_at(None)
    go(tmp_path / "run", max_minutes=1e-9)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["sessions"][0]["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(config))
    go(tmp_path / "run", resume=True, quiet=False)
    assert "the last bits may differ" in capsys.readouterr().out


# --- damaged and foreign states


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["HOSTILE_MARK"],))


def damage(path: Path, kind: str) -> None:
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "cut in half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
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


@pytest.mark.parametrize(
    "kind",
    [
        *("truncated", "cut in half", "empty", "text", "hostile pickle", "hostile archive"),
        *("another's", "a tensor", "a later format"),
    ],
)
def test_a_damaged_or_foreign_state_is_an_error(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "it ran code"
    monkeypatch.setenv("HOSTILE_MARK", str(mark))
    C.save_state(tmp_path, {"model": {"weight": torch.randn(100, 100)}})
    damage(C.state_path(tmp_path), kind)
    with pytest.raises(ValueError, match=r"training\.pt.*overwrite"):
        C.load_state(tmp_path)
    assert not mark.exists()


def test_a_damaged_state_stops_train_before_it_changes_anything(tmp_path: Path) -> None:
    stop_at(3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run")
    damage(C.state_path(tmp_path / "run"), "truncated")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match="truncated"):
        go(tmp_path / "run", resume=True)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_no_state_and_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        C.load_state(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run folder"):
        C.read_config(tmp_path)
    assert not C.is_run(tmp_path)
    (tmp_path / "config.json").write_text('{"mark": ')
    with pytest.raises(ValueError, match="not readable as JSON"):
        C.read_config(tmp_path)


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    C.save_state(tmp_path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        C.save_state(tmp_path, {"step": lambda: None})
    assert C.load_state(tmp_path)["step"] == 1
    assert [p.name for p in C.state_path(tmp_path).parent.iterdir()] == ["training.pt"]


def test_fingerprints_tell_weights_and_shapes() -> None:
    one, two = teacher(1), teacher(1)
    assert C.fingerprint(one) == C.fingerprint(two)
    with torch.no_grad():
        two[1].weight[0, 0] += 1e-6  # type: ignore[union-attr, index]
    assert C.fingerprint(one) != C.fingerprint(two)
    assert C.fingerprint(nn.BatchNorm2d(3)) != C.fingerprint(nn.BatchNorm2d(4))

"""An evaluation's files: replaced together, checked on every read, written by one process at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from awnet.attacks import FGSM, PGD, Attack, Cascade
from awnet.attacks.craft import craft
from awnet.attacks.saved import Saved
from awnet.attacks.transfer import Crafted, replay
from awnet.data import Dataset, from_arrays
from awnet.evaluation import Report, evaluate, store
from awnet.evaluation.store import locked, read_together, replaced_together

N = 12


def data() -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (N, 1, 4, 4), dtype=np.uint8)
    return from_arrays(torch.from_numpy(pixels), torch.arange(N) % 4, name="noise", split="test", eps=0.1)


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4))


@pytest.fixture(scope="module")
def reports() -> tuple[Report, Report]:
    """Reports of two models, with different accuracies."""
    first, second = evaluate(linear(0), data(), ["fgsm", "cw"]), evaluate(linear(1), data(), ["fgsm"])
    assert first.clean_accuracy != second.clean_accuracy
    return first, second


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the figures, which take most of the time, by small files."""

    def draw(report: Report, folder: Path, log: Path | None = None) -> None:
        names = ["w_robust.png", *(["sanity.png"] if "cw" in report.attacks else [])]
        for name in names:
            (folder / name).write_bytes(repr(report.clean_accuracy).encode())

    monkeypatch.setattr("awnet.evaluation.figures.draw", draw)
    monkeypatch.setattr("awnet.evaluation.html.FIGURES", {"w_robust.png": "", "sanity.png": ""})


class Kill(BaseException):
    pass


class Interrupted(Exception):
    pass


def killed_at(number: int, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs ``act`` as a process that is killed just before its file operation ``number``; whether it was.

    Nothing that the process would do afterwards, its clean-up say, happens.
    """
    count = 0

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > number:
                raise Kill
            return operation(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for place, names in (
            (os, ("replace", "rename", "symlink", "mkdir", "rmdir", "unlink")),
            (shutil, ("rmtree",)),
            (Path, ("mkdir", "rmdir", "unlink", "write_text", "write_bytes")),
        ):
            for name in names:
                patch.setattr(place, name, dying(getattr(place, name)))
        try:
            act()
        except Kill:
            return True
    return False


def test_a_kill_between_any_two_file_operations_leaves_the_old_report_or_the_new(
    reports: tuple[Report, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = reports
    before, run = tmp_path / "before", tmp_path / "run"
    place = run / "evaluations" / "default"
    old.publish(before)
    (before / "evaluations" / "default" / "notes.txt").write_text("the user's")
    seen = []
    for number in range(1000):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(before, run, symlinks=True)
        if not killed_at(number, lambda: new.publish(run), monkeypatch):
            break
        actual = Report.load(place)
        seen.append("new" if actual.to_dict() == new.to_dict() else "old")
        expected = new if seen[-1] == "new" else old
        assert actual.to_dict() == expected.to_dict(), number
        for name in expected.per_sample:
            np.testing.assert_array_equal(actual.per_sample[name], expected.per_sample[name])
        if (place / "report.json").exists():  # for those who read single files
            plain = json.loads((place / "report.json").read_text())
            with np.load(place / "per_sample.npz") as arrays:
                assert plain["clean_accuracy"] == arrays["clean_correct"].mean()
            assert json.loads((run / "report.json").read_text()) == plain
        # the next writer finishes or repeats it, and nothing of either attempt is left over
        new.publish(run)
        names = {path.name for path in place.iterdir() if path.name != "filter_means.npz"}
        assert names == {"manifest.json", "notes.txt", "per_sample.npz", "report.html", "report.json"} | {
            "w_robust.png",
            *(["examples.npz"] if new.examples else []),
        }
        assert Report.load(place).to_dict() == json.loads((run / "report.json").read_text())
    assert set(seen) == {"old", "new"}
    assert seen == sorted(seen, reverse=True)  # old until some operation, new from there on
    assert len(seen) > 10


def test_a_failure_while_files_are_written_changes_nothing(
    reports: tuple[Report, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = reports
    old.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("awnet.evaluation.figures.draw", full)
    with pytest.raises(OSError, match="No space left"):
        new.save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["report.json", "per_sample.npz"])
@pytest.mark.parametrize("change", ["flip", "cut", "remove", "swap"])
def test_every_read_verifies_the_files(
    reports: tuple[Report, Report], tmp_path: Path, name: str, change: str
) -> None:
    old, new = reports
    old.save(tmp_path / "old")
    new.save(tmp_path / "new")
    path = tmp_path / "new" / name
    content = bytearray(path.read_bytes())
    if change == "flip":
        content[len(content) // 2] ^= 4
    path.write_bytes(content[:-20] if change == "cut" else content)
    if change == "swap":
        shutil.copy(tmp_path / "old" / name, path)
    if change == "remove":
        path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is (missing|damaged or was changed).*evaluate again"):
        Report.load(tmp_path / "new")


def test_without_a_manifest_the_arrays_must_give_the_figures(
    reports: tuple[Report, Report], tmp_path: Path
) -> None:
    for number, report in enumerate(reports):
        report.save(tmp_path / str(number))
        (tmp_path / str(number) / "manifest.json").unlink()  # as an earlier version left it
    assert Report.load(tmp_path / "0").to_dict() == reports[0].to_dict()
    shutil.copy(tmp_path / "0" / "per_sample.npz", tmp_path / "1")
    with pytest.raises(ValueError, match="are not of the same evaluation: their clean outcomes differ"):
        Report.load(tmp_path / "1")


def test_a_reader_during_the_moves_sees_one_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a", "b", "report.json"]

    def write(text: str) -> None:
        with replaced_together(tmp_path, names) as new:
            for name in names:
                (new / name).write_text(text)

    write("old")
    actual = []
    for name in ("replace", "rename"):
        operation = getattr(os, name)

        def move(*args: Any, operation: Callable[..., None] = operation) -> None:
            actual.append(read_together(tmp_path, names))
            operation(*args)
            actual.append(read_together(tmp_path, names))

        monkeypatch.setattr(os, name, move)
    write("new")
    sets = [{data.decode() for data in one.values()} for one in actual]
    assert all(len(one) == 3 for one in actual)
    assert sets in ([{"old"}] * k + [{"new"}] * (len(sets) - k) for k in range(1, len(sets)))


def test_a_second_evaluation_of_the_same_name_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "evaluations" / "default"
    with locked(place):
        with pytest.raises(BlockingIOError, match=rf"evaluates in .*default \(process {os.getpid()} on "):
            evaluate(linear(0), data(), ["fgsm"], out=tmp_path)
        with pytest.raises(BlockingIOError, match="wait for it, stop it, or choose another name"):
            evaluate(linear(0), data(), ["fgsm"]).save(place)
        evaluate(linear(0), data(), ["fgsm"], out=tmp_path, name="other")
    evaluate(linear(0), data(), ["fgsm"], out=tmp_path)
    assert Report.load(place).n == N


class Stopped(Attack):
    """An attack that fails at its second batch, after the first was saved."""

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        if int(index.max()) >= 6:
            raise Interrupted
        return x


def interrupted(folder: Path, attack: str) -> Path:
    """An evaluation that was interrupted after its first batch; the file with its images."""
    model = linear(0)
    attacks: dict[str, Attack] = {"first": FGSM(model, eps=0.1)}
    if attack == "cascade":
        attacks = {"first": Cascade(model, attacks, eps=0.1)}
    with pytest.raises(Interrupted):
        evaluate(model, data(), attacks | {"stopped": Stopped(model, eps=0.1)}, batch_size=6, out=folder)
    files = list((folder / "evaluations" / "default" / "state").glob("*/*.safetensors"))
    return next(path for path in files if "x_adv" in load_file(path) and "stopped" not in path.name)


def resume(folder: Path, attack: str) -> Report:
    model = linear(0)
    attacks: dict[str, Attack] = {"first": FGSM(model, eps=0.1)}
    if attack == "cascade":
        attacks = {"first": Cascade(model, attacks, eps=0.1)}
    return evaluate(model, data(), attacks | {"stopped": Stopped(model, eps=0.1)}, batch_size=6, out=folder)


@pytest.mark.parametrize("attack", ["plain", "cascade"])
def test_a_flipped_bit_of_a_saved_image_is_detected(tmp_path: Path, attack: str) -> None:
    path = interrupted(tmp_path, attack)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # of the last tensor's values
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"{path.name} is damaged or was changed, its checksum does not match"
    ):
        resume(tmp_path, attack)


@pytest.mark.parametrize("attack", ["plain", "cascade"])
@pytest.mark.parametrize("value", [0.31, -0.31, float("nan"), 2.0])
def test_a_saved_image_outside_the_ball_is_an_error_despite_a_correct_checksum(
    tmp_path: Path, attack: str, value: float
) -> None:
    path = interrupted(tmp_path, attack)
    saved = Saved(path.parent, ".")
    actual = saved.load(path.stem)
    assert actual is not None
    tensors, note = actual
    tensors["x_adv"][3, 0, 1, 2] += value
    saved.save(path.stem, tensors, note)
    with pytest.raises(
        ValueError, match=r"images saved in .*1 of 6 are not in \[0, 1\] and within eps = 0.1"
    ):
        resume(tmp_path, attack)


def test_an_attack_that_leaves_its_ball_is_an_error() -> None:
    class Beyond(Attack):
        def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
            return (x + 0.2).clamp(0, 1)

    model = linear(0)
    with pytest.raises(ValueError, match=r"images of the attack far: .* not in"):
        evaluate(model, data(), {"far": Beyond(model, eps=0.1)})
    evaluate(model, data(), {"far": Beyond(model, eps=0.2)})


def test_crafted_images_are_checked_in_parts_and_as_a_whole(tmp_path: Path) -> None:
    model, images = linear(0), data()

    class Second(PGD):
        def perturb(self, x: Tensor, *rest: Any) -> Tensor:
            if int(rest[1].max()) >= 6:
                raise Interrupted
            return super().perturb(x, *rest)

    def make(attack: type[PGD]) -> Callable[[nn.Module], Attack]:
        return lambda m: attack(m, eps=0.1, step_size=0.05, steps=2)

    with pytest.raises(Interrupted):
        craft(model, images, make(Second), folder=tmp_path, batch_size=6)
    (part,) = tmp_path.glob("*.parts/0.safetensors")
    tensors = load_file(part)
    save_file({"x_adv": 1 - tensors["x_adv"]}, part)
    with pytest.raises(ValueError, match=r"0.safetensors is damaged or was changed"):
        craft(model, images, make(Second), folder=tmp_path, batch_size=6)
    shutil.rmtree(part.parent)
    whole = craft(model, images, make(PGD), folder=tmp_path, batch_size=6)
    assert torch.equal(Crafted.load(next(tmp_path.glob("*.safetensors"))).x_adv, whole.x_adv)
    whole.x_adv[2, 0, 0, 0] = torch.nan
    x, y, index = next(images.batches(N))
    with pytest.raises(ValueError, match="not the images that were attacked: 1 of 12"):
        replay(model, whole)(x, y, index=index)


def test_a_report_that_is_about_to_be_moved_is_read(
    reports: tuple[Report, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "evaluations" / "default"
    reports[0].save(place)
    finish = store.finish_evaluation
    calls = []

    def stop(folder: Path, known: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise Kill
        finish(folder, known)

    with monkeypatch.context() as patch:
        patch.setattr(store, "finish_evaluation", stop)
        with pytest.raises(Kill):
            reports[1].save(place)
    (place / "report.json").unlink()  # the first operation of the moves
    assert Report.load(place).to_dict() == reports[1].to_dict()


@pytest.mark.parametrize("links", [True, False])
def test_a_run_folder_gives_its_newest_report_with_all_arrays(
    links: bool, reports: tuple[Report, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "symlink", refused)
    old, new = reports
    old.publish(tmp_path, "first")
    new.publish(tmp_path, "second")
    actual = Report.load(tmp_path)
    assert actual.to_dict() == new.to_dict()
    assert actual.per_sample.keys() == new.per_sample.keys() != set()
    for name, array in new.per_sample.items():
        np.testing.assert_array_equal(actual.per_sample[name], array)


# --- a folder that is renamed while files are written to it


class Renaming(FGSM):
    """FGSM that renames a folder once, before the second batch."""

    def __init__(self, model: nn.Module, old: Path, new: Path) -> None:
        super().__init__(model, eps=0.1)
        self.old, self.new, self.batches, self.last = old, new, 0, 10

    def __call__(self, x: Tensor, y: Tensor, *, index: Tensor | None = None) -> Tensor:
        self.batches += 1
        if self.batches == 2:
            self.old.rename(self.new)
        if self.batches > self.last:
            raise KeyboardInterrupt
        return super().__call__(x, y, index=index)


@pytest.mark.parametrize("parent", [False, True])
def test_a_run_folder_that_is_renamed_during_evaluation_is_followed(
    parent: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"selected_on": "test"}')
    old, new = (run.parent, tmp_path / "other") if parent else (run, run.parent / "renamed")
    attack = Renaming(linear(0), old, new)
    report = evaluate(linear(0), data(), {"mine": attack}, out=run, name="a", batch_size=4)
    moved = new / "run" if parent else new
    assert not old.exists()
    assert Report.load(moved / "evaluations" / "a").to_dict() == report.to_dict()
    assert Report.load(moved).to_dict() == report.to_dict()
    assert report.selected_on == "test"
    assert not list(moved.rglob("*.tmp"))
    assert not (moved / "evaluations" / "a" / "state").exists()
    assert f"{run} was renamed during evaluation; the run continues in {moved}" in caplog.text


def test_an_evaluation_is_resumed_in_the_folder_that_it_was_renamed_to(tmp_path: Path) -> None:
    old, new = tmp_path / "run", tmp_path / "renamed"
    old.mkdir()
    attack = Renaming(linear(0), old, new)
    attack.last = 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(linear(0), data(), {"mine": attack}, out=old, batch_size=4)
    assert not old.exists()
    attack.last = 10
    evaluate(linear(0), data(), {"mine": attack}, out=new, batch_size=4)
    assert attack.batches == 4  # the third batch alone
    assert (new / "report.json").is_file()


def test_a_run_folder_that_is_deleted_during_evaluation_does_not_come_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()

    class Deleting(FGSM):
        def __call__(self, x: Tensor, y: Tensor, *, index: Tensor | None = None) -> Tensor:
            shutil.rmtree(run, ignore_errors=True)
            return super().__call__(x, y, index=index)

    with pytest.raises(FileNotFoundError, match="deleted or moved away during evaluation"):
        evaluate(linear(0), data(), {"mine": Deleting(linear(0), eps=0.1)}, out=run)
    assert not run.exists()


def test_a_folder_that_is_renamed_while_images_are_crafted_is_followed(tmp_path: Path) -> None:
    old, new = tmp_path / "crafted", tmp_path / "renamed"

    def attack(model: nn.Module) -> Attack:
        return Renaming(model, old, new)

    made = craft(linear(0), data(), attack, folder=old, batch_size=4)
    assert not old.exists()
    (path,) = new.glob("*.safetensors")
    assert torch.equal(Crafted.load(path).x_adv, made.x_adv)
    assert sorted(p.suffix for p in new.iterdir()) == [".json", ".safetensors"]

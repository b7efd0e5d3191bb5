"""Paths, atomic writes and locks: on odd file systems, on devices and links, and after kills."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import awnet
from awnet import files
from awnet.files import expanded, is_temporary, locked, sweep, write_json, write_text, written_atomically
from awnet.models.files import write_tensors

posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX systems")


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if is_temporary(path)]


def hold(path: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing ``path``."""
    code = """
        import sys
        from awnet.files import written_atomically
        with written_atomically(sys.argv[1]) as temporary:
            temporary.write_text("half")
            print("writing", flush=True)
            sys.stdin.read()
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


# ── what a write keeps ────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=25, deadline=None)
@given(name=st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=260))
def test_every_name_that_the_file_system_takes_can_be_written(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("names")
    plain = folder / name
    try:
        plain.write_text("old")
    except (OSError, ValueError):
        return  # "..", or longer than the file system allows
    write_text(plain, "new")
    assert plain.read_text() == "new"
    assert os.listdir(folder) == [name]


def test_a_name_of_255_bytes_can_be_saved_and_loaded(tmp_path):
    for stem in ("x" * 243, "é" * 121 + "x"):
        path = tmp_path / f"{stem}.safetensors"
        assert len(os.fsencode(path.name)) == 255
        awnet.save_model(awnet.create_model("resnet_tiny"), path)
        assert isinstance(awnet.load_model(path), torch.nn.Module)


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o664])
def test_an_existing_file_keeps_its_mode_and_is_never_wider_on_the_way(tmp_path, mode):
    path = tmp_path / "secret.json"
    path.write_text("old")
    path.chmod(mode)
    with written_atomically(path) as temporary:
        temporary.write_text("new")
        wider = stat.S_IMODE(temporary.stat().st_mode) & ~(mode | 0o600)
        assert wider == 0
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_text() == "new"


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_gets_the_mode_of_the_umask_whoever_writes_it(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a", "")
        write_tensors({"w": torch.ones(2)}, tmp_path / "b.safetensors")
    finally:
        os.umask(before)
    for name in ("a", "b.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


@posix
@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path, there):
    target, link = tmp_path / "disk" / "model.safetensors", tmp_path / "runs" / "best.safetensors"
    target.parent.mkdir()
    link.parent.mkdir()
    link.symlink_to(Path("..") / "disk" / "model.safetensors")
    if there:
        target.write_text("old")
    awnet.save_model(awnet.create_model("resnet_tiny"), link)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert isinstance(awnet.load_model(target), torch.nn.Module)
    assert os.listdir(link.parent) == [link.name]
    assert os.listdir(target.parent) == [target.name]


@posix
def test_a_link_in_a_circle_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write_text(tmp_path / "a", "x")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@posix
def test_a_device_or_a_pipe_receives_the_bytes_and_stays(tmp_path):
    before = os.stat(os.devnull)
    write_text(os.devnull, "nobody reads this")
    assert os.stat(os.devnull).st_rdev == before.st_rdev
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)

    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_json(pipe, [1, 2])
    reader.join(10)
    assert json.loads(read[0]) == [1, 2]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]

    shown = tmp_path / "shown"
    code = "from awnet.files import write_text; write_text('/dev/stdout', 'to standard output')"
    with open(shown, "wb") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert shown.read_text() == "to standard output"


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
def test_a_full_device_is_an_error():
    with pytest.raises(OSError, match="No space left"):
        write_text("/dev/full", "x")


def test_a_folder_is_never_replaced(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError, match="a file cannot replace a folder"):
        write_json(tmp_path / "a.json", {})
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(FileNotFoundError), written_atomically(tmp_path / "a") as temporary:
        temporary.unlink()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("refused", ["fsync of a folder", "fsync of anything", "chmod", "flock", "all"])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM, errno.ENOTSUP])
def test_a_file_system_that_lacks_an_operation_is_written_to(tmp_path, monkeypatch, refused, code):
    fsync = os.fsync

    def refuse(*arguments, **options):
        raise OSError(code, os.strerror(code))

    def of_files_only(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            refuse()
        fsync(handle)

    if refused in ("fsync of a folder", "all"):
        monkeypatch.setattr(os, "fsync", of_files_only)
    if refused == "fsync of anything":
        monkeypatch.setattr(os, "fsync", refuse)
    if refused in ("chmod", "all"):
        monkeypatch.setattr(os, "chmod", refuse)
    if refused in ("flock", "all"):
        monkeypatch.setattr(files.fcntl, "flock", refuse)
    path = tmp_path / "a.json"
    for value in ([1], [2]):
        write_json(path, value)
        assert files.read_json(path) == value
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_data_that_does_not_reach_the_disk_is_an_error(tmp_path, monkeypatch, code):
    def broken(handle):
        raise OSError(code, os.strerror(code))

    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


def test_text_that_utf_8_cannot_hold_is_escaped_and_json_reads_it_back(tmp_path):
    name = os.fsdecode(b"run-\xff")
    write_json(tmp_path / "a.json", {"folder": name})
    assert files.read_json(tmp_path / "a.json") == {"folder": name}


# ── what kills leave ──────────────────────────────────────────────────────────────────────────────────────


def test_what_a_killed_writer_leaves_is_swept_and_a_living_ones_is_not(tmp_path):
    living = hold(tmp_path / "run" / "state" / "living.pt")
    killed = hold(tmp_path / "run" / "teachers" / "clean" / "killed.pt")
    killed.kill()
    killed.wait()
    assert len(leftovers(tmp_path)) == 2
    sweep(tmp_path / "run")
    (name,) = leftovers(tmp_path)
    assert name.startswith(".living.pt.")
    living.communicate("")  # it ends its write
    assert living.returncode == 0
    assert (tmp_path / "run" / "state" / "living.pt").read_text() == "half"
    assert not leftovers(tmp_path)


def test_the_next_write_of_a_file_sweeps_its_own_leftovers_and_no_others(tmp_path):
    living, killed = hold(tmp_path / "a.npz"), hold(tmp_path / "a.npz")
    for process in (killed, other := hold(tmp_path / "a.npz.json")):
        process.kill()
        process.wait()
    assert other.returncode
    (tmp_path / ".mine.tmp").write_text("the user's own")
    write_text(tmp_path / "a.npz", "whole")
    names = leftovers(tmp_path)
    assert len(names) == 3  # the living one's, a.npz.json's, which its own next write removes, the user's
    living.communicate("")
    write_text(tmp_path / "a.npz.json", "whole")
    assert leftovers(tmp_path) == [".mine.tmp"]


def test_leftovers_of_earlier_versions_and_of_safetensors_are_swept(tmp_path):
    for name in (".best.safetensors.abc12345.tmp", ".tmpAb3_xY", ".step-00000004.pt.q.tmp"):
        (tmp_path / name).write_text("half")
    kept = [".tmp", ".tmpdir12345", "a.tmp", "tmpAb3_xY"]
    for name in kept:
        (tmp_path / name).write_text("the user's own")
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_without_locks_only_old_leftovers_are_swept(tmp_path, monkeypatch):
    def unable(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unable)
    for name, age in ((".young.tmp", 3600), (".old.tmp", 3 * 24 * 3600)):
        (tmp_path / name).write_text("half")
        then = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (then, then))
    sweep(tmp_path)
    assert os.listdir(tmp_path) == [".young.tmp"]


def test_many_writers_of_one_file_and_sweepers_never_disturb_each_other(tmp_path):
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(40):
                write_json(tmp_path / "a.json", [number] * 200 + [i])
                sweep(tmp_path)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(files.read_json(tmp_path / "a.json")) == 201
    assert os.listdir(tmp_path) == ["a.json"]


# ── locks ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lock_is_refused_while_it_is_held_and_free_after_a_kill(tmp_path):
    code = (
        "import sys; from awnet.files import locked\n"
        "with locked(sys.argv[1], lambda: 'busy'): print('held', flush=True); sys.stdin.read()"
    )
    path = tmp_path / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(BlockingIOError, match="the other process"),
            locked(path, lambda: "the other process"),
        ):
            pass
        process.kill()
    with locked(path, lambda: "busy") as held:
        assert held
        with pytest.raises(BlockingIOError, match="busy"), locked(path, lambda: "busy"):
            pass


def test_without_locks_a_block_runs_with_a_warning(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(files, "fcntl", None)
    with locked(tmp_path / ".lock", lambda: "busy", said.append) as held:
        assert not held
    assert "could not be locked" in said[0]


# ── systems ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_package_imports_and_writes_without_fcntl(tmp_path):
    """As on Windows, where the module is missing."""
    code = """
        import sys
        sys.modules["fcntl"] = None
        import awnet
        import awnet.cli, awnet.reproduce, awnet.training
        from awnet.files import write_json, read_json
        write_json(sys.argv[1], [1])
        assert read_json(sys.argv[1]) == [1]
        """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a.json")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


# ── ~ ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_home_folder_is_expanded_at_the_beginning_of_a_path_only(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert expanded("~/runs/x") == tmp_path / "runs" / "x"
    assert expanded("~") == tmp_path
    for name in ("runs/~/x", "a~b", "/tmp/~", "/~x/y"):
        assert expanded(name) == Path(name)
    write_json("~/a/b.json", [1])
    assert files.read_json("~/a/b.json") == [1]
    assert (tmp_path / "a" / "b.json").is_file()


@posix
def test_an_unknown_home_folder_is_an_error():
    with pytest.raises(ValueError, match=r"home folder of '~nobody-here' is not known"):
        expanded("~nobody-here/x")

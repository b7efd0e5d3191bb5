"""Output that cannot be written ends no work."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest

from awnet import terminal
from awnet.cli import main
from awnet.terminal import SafeStream, safe_console, safe_output
from awnet.training import read_log

TRAIN = ["train", "--model", "resnet_tiny", "--recipe", "standard", "--batch-size", "512", "--epochs", "1"]


def broken(kind: str):
    """A standard output to which nothing can be written."""
    if kind == "a full disk":
        if not os.path.exists("/dev/full"):
            pytest.skip("this system has no /dev/full")
        return open("/dev/full", "w", buffering=1)
    if kind == "a pipe whose reader has ended":
        read, write = os.pipe()
        os.close(read)
        return os.fdopen(write, "w", buffering=1)
    if kind == "a closed file":
        stream = io.StringIO()
        stream.close()
        return stream
    return None


BROKEN = ["a full disk", "a pipe whose reader has ended", "a closed file", "no standard output"]


def discard(stream) -> None:
    """Closes it, although its text cannot be written."""
    if stream is not None and not stream.closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.close()


@pytest.mark.parametrize("kind", BROKEN)
def test_printing_to_a_broken_stream_raises_nothing_and_is_noted_once(kind, monkeypatch, capsys):
    stream = broken(kind)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(terminal, "_noted", weakref.WeakSet())
    for console in (safe_console(), safe_console()):
        console.print("some text, " * 10_000)
        console.rule("and a rule")
        assert console.file.error is not None
    assert capsys.readouterr().err.count("standard output could not be written") == 1
    discard(stream)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_what_an_encoding_lacks_is_written_in_ascii(encoding):
    raw = io.BytesIO()
    stream = SafeStream("stdout", io.TextIOWrapper(raw, encoding=encoding))
    stream.write("läufe: 5.0 ± 1.4 … 語\n" + os.fsdecode(b"\xff"))
    stream.flush()
    assert stream.error is None
    text = raw.getvalue().decode(encoding)
    assert "\\u8a9e" in text
    assert text.endswith("\\udcff")
    assert ("l\\xe4ufe: 5.0 +- 1.4 ..." in text) == (encoding == "ascii")


def test_a_live_display_prints_through_a_safe_stream(monkeypatch):
    from rich.progress import Progress

    with safe_output():
        console = safe_console()
        with Progress(console=console) as progress:
            progress.add_task("x", total=2)
            print("through the proxy that the display puts into sys.stdout")
    assert console.file.error is None


@pytest.mark.parametrize(
    "kind", ["a full disk", pytest.param("a pipe whose reader has ended", marks=pytest.mark.slow)]
)
def test_commands_finish_their_work_without_standard_output(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (
        [*TRAIN, "--out", "läufe"],
        ["evaluate", "läufe", "--attacks", "fgsm", "--limit", "10"],
        ["attack", "läufe", "--attack", "fgsm", "--limit", "10", "--out", "x.npz"],
    ):
        stream = broken(kind)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert main(words) == 0
        discard(stream)
    assert len(read_log("läufe", "epoch")) == 1
    assert Path("läufe/evaluations/default/report.json").is_file()
    assert Path("x.npz").is_file()


def test_a_command_whose_text_is_its_result_fails_on_a_full_disk_only(monkeypatch, capsys):
    for kind, status in (("a full disk", 2), ("a pipe whose reader has ended", 0)):
        for words in (["data", "info", "digits"], ["--help"]):
            stream = broken(kind)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", stream)
                try:
                    result = main(words)
                except SystemExit as error:
                    result = error.code
            discard(stream)
            assert (result or 0) == status, (kind, words)
            said = capsys.readouterr().err
            assert ("error: standard output could not be written" in said) == (status == 2)
            assert "the work continues" not in said


@pytest.mark.skipif(os.name != "posix", reason="a shell's pipe")
def test_the_exit_status_tells_of_the_work_and_not_of_the_output(tmp_path):
    """At the interpreter's exit Python flushes what could not be written, and would end with status 120."""
    code = """
        import sys
        from awnet.terminal import safe_console
        console = safe_console()
        for number in range(2000):
            console.print("line", number)
        open(sys.argv[1], "w").write("done")
        """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "done")]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, (tmp_path / "done").read_text()) == (0, "done")
    (tmp_path / "done").unlink()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait() == 0
    assert (tmp_path / "done").read_text() == "done"

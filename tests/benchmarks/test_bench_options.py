"""Bad values of every option of ``awnet bench``: each ends in an error message, none in a traceback."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from awnet.benchmarks import amx, goals, report, train, tune
from awnet.benchmarks.options import BenchOptions

from awnet.cli import main

# commands that end within a moment if an option is accepted
COMMANDS: dict[str, tuple[type, list[str]]] = {
    "run": (
        BenchOptions,
        [
            *("--smoke", "--cases", "stage4", "--modes", "forward", "--providers", "static"),
            *("--seconds", "0.001", "--retries", "0", "--device", "cpu"),
        ],
    ),
    "train": (
        train.TrainBenchOptions,
        [
            *("--model", "awnet_tiny", "--size", "8", "--batch", "4", "--steps", "1", "--retries", "0"),
            *("--recipe", "standard", "--providers", "awnet", "--device", "cpu"),
        ],
    ),
    "tune": (tune.TuneOptions, ["--device", "cpu"]),
    "verify": (goals.VerifyOptions, []),
    "plot": (report.PlotOptions, []),
    "table": (report.TableOptions, []),
}
HUGE = "99999999999999999999"
# by the type of the option: every value is wrong
BAD: dict[str, tuple[str, ...]] = {
    "int": ("abc", "1.5", "", "-1", HUGE),
    "float": ("abc", "", "-1", "nan", "inf", "1e9"),
    "str": ("abc", "", "-1"),
    "Literal": ("abc", "", "-1", "0"),
}
ZERO = {"batch", "batches", "threads", "seconds", "steps", "attack_steps", "size", "width"}  # 0 is wrong too


def options() -> list[tuple[str, str, str]]:
    """(command, option, kind) of every option that takes a value and is not a path."""
    fields_by_command = []
    for command, (kind, _) in COMMANDS.items():
        assert is_dataclass(kind)
        for field in fields(kind):
            annotation = str(field.type)
            if "Path" not in annotation and annotation != "bool":
                name = next(name for name in ("Literal", "Mode", "int", "float", "str") if name in annotation)
                fields_by_command.append((command, field.name, "Literal" if name == "Mode" else name))
    return fields_by_command


def without(words: list[str], flag: str) -> list[str]:
    if flag not in words:
        return words
    place = words.index(flag)
    return words[:place] + words[place + 2 :]


def fails_with_a_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command prints after a bad value; "" if the parser has rejected the value."""
    try:
        status, parsed = main(["bench", *arguments]), True
    except SystemExit as ended:  # the parser's own message
        status, parsed = ended.code, False
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2, arguments
    if not parsed:
        assert lines
        return ""
    assert len(lines) == 1, lines
    assert lines[0].startswith("awnet: error: ")
    return lines[0]


@pytest.mark.parametrize(("command", "option", "kind"), options())
def test_a_bad_value_is_an_error_message(
    command: str, option: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = "-1" if kind in ("int", "float") else "abc"
    check_bad_values(command, option, kind, (value,), tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option", "kind"), options())
def test_every_bad_value_is_an_error_message(
    command: str, option: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = (*BAD[kind], *(["0"] if option in ZERO else []))
    check_bad_values(command, option, kind, values, tmp_path, capsys)


def check_bad_values(
    command: str,
    option: str,
    kind: str,
    values: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flag = "--" + option.replace("_", "-")
    words = without(COMMANDS[command][1], flag)
    if option == "shape":
        words = without(words, "--cases")
    if option == "teachers":
        words = ["mtard" if word == "standard" else word for word in words]
    for value in values:
        given = [value, value] if option == "teachers" else [value]
        arguments = [command, *words, flag, *given, "--out", str(tmp_path / "out")]
        message = fails_with_a_message(arguments, capsys)
        if message and kind in ("int", "float"):
            assert option in message
    assert not (tmp_path / "out").exists()  # nothing was measured


@pytest.mark.parametrize("command", ["run", "train", "tune", pytest.param("plot", marks=pytest.mark.slow)])
def test_an_output_folder_that_is_a_file_is_an_error_message(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file, file / "below"):
        message = fails_with_a_message([command, *COMMANDS[command][1], "--out", str(path)], capsys)
        if command != "plot":
            assert f"out must be a folder, but {file} is a file" in message
    assert file.read_text() == "x"


@pytest.mark.parametrize("command", ["verify", "plot", "table"])
def test_results_that_cannot_be_read_are_an_error_message(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "page.md"
    document.write_text("<!-- bench:goals -->\n<!-- /bench:goals -->\n")
    words = [command, *([str(document)] if command == "table" else [])]
    assert "there is no folder" in fails_with_a_message([*words, "--results", str(tmp_path / "no")], capsys)
    (tmp_path / "abacus.csv").write_bytes(b"\xff\x00\xfe")
    assert "is not a CSV file" in fails_with_a_message([*words, "--results", str(tmp_path)], capsys)
    (tmp_path / "abacus.csv").write_text("a,b\n1,2\n")
    assert "has other columns" in fails_with_a_message([*words, "--results", str(tmp_path)], capsys)


def test_a_missing_document_is_an_error_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "page.md" in fails_with_a_message(["table", str(tmp_path / "page.md")], capsys)


@pytest.mark.parametrize(
    "shape", ["3,3", "0,3,3", "3,3,3,2", "4,3,8,3,1,2", "1,1,1000000000", "1,1,1,9999999"]
)
def test_a_shape_that_cannot_be_measured_is_an_error_message(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = without(COMMANDS["run"][1], "--cases")
    message = fails_with_a_message(["run", *words, "--shape", shape, "--out", str(tmp_path / "out")], capsys)
    assert "shape" in message or "not enough memory" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "threads must be at least 1"),
        (["--rounds", "-1"], "rounds must be at least 1"),
        (["--batch", "1"], "batch must be at least 2"),
        (["--size", HUGE], "size must be at most"),
        (["--retries", "-1"], "retries must be at least 0"),
        (["--only", "step", "--model", "nonsense"], "unknown model"),
        (["--rounds", "x"], "invalid int value"),
    ],
)
def test_the_amx_benchmark_rejects_bad_values(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWNET_AMX", "auto")
    monkeypatch.setattr(amx.amx, "obstacle", lambda: None)
    with pytest.raises(SystemExit) as ended:
        amx.main([*words, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_every_option_has_a_default() -> None:
    defaults: list[Any] = [f.default for kind, _ in COMMANDS.values() for f in fields(kind)]
    assert MISSING not in defaults
    assert not any(isinstance(value, float) and math.isnan(value) for value in defaults)

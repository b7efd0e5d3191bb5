"""Any value of any option: the command works, or ends with one line and status 2, never with a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from awnet.cli import main

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")

NUMBERS = ("-1", "0", "1e400", "nan", "-inf", "abc", "1.5", "9" * 20, "1/0", "", "1e-300", "0x10", "١")
PATHS = ("nowhere", "file.txt", "empty", "bad.safetensors", "/dev/null", "", "~nobody0/x", "a\0b", "x" * 300)
NAMES = ("", "nowhere", "../run", "a/b", "[red]x", "x" * 300, "-", "\x1b[31m", "None", "é")
DEVICES = ("meta", "mps", "cuda:99", "cpu:7", "xla", "", "0", "CPU")
PAIRS = ("=", "a", "a=", "=b", "width=nan", "width=-1", "width=[", "width={}", "width=none", "width=1,2", "self=1",
         "bn=two", "name=x", "router_widths=", "router_widths=0", "router_widths=1,,a", "num_classes=3")  # fmt: skip
SETTINGS = ("eps=nan", "epochs=abc", "milestones=3", "milestones=", "lr=", "lr=none", "momentum=2", "name=x",
            "batch_size=0", "batch_size=true", "epochs=1e400", "epochs=2.5", "precision=half", "layout=x",
            "attack_steps=none", "weight_decay=-1", "temperature=0", "steps=3")  # fmt: skip

TRAIN = ["train", "--recipe", "standard", "--model", "resnet_tiny", "--out", "new", "--overwrite"]
SHORT = ["--limit", "20", "--epochs", "1"]
EVALUATE = ["evaluate", "run", "--attacks", "fgsm", "--limit", "20"]
ATTACK = ["attack", "run", "--attack", "fgsm", "--limit", "20", "--overwrite", "--out", "x.npz"]
PROGRAM = ["export", "program", "run", "--out", "x.pt2", "--overwrite"]
BENCH = ["export", "robustbench", "run", "--name", "A2024B", "--out", "zoo"]
FILTERS = ["analyze", "filters", "run", "--out", "figures"]
GAP = ["analyze", "weight-gap", "run", "--images", "4", "--out", "figures"]


def cases() -> Iterator[list[str]]:
    for value in NUMBERS:
        for option in (
            "epochs",
            "batch-size",
            "lr",
            "eps",
            "limit",
            "checkpoint-minutes",
            "keep-checkpoints",
            "seed",
        ):
            yield [*TRAIN, *SHORT, f"--{option}", value]
        for option in ("limit", "batch-size", "seed", "eps", "queries"):
            yield [*EVALUATE, f"--{option}", value]
        for option in ("limit", "batch-size", "eps"):
            yield [*ATTACK, f"--{option}", value]
        yield [*FILTERS, "--images", value]
        yield [*FILTERS, "--images", "4", "--layers", value]
        yield [*GAP, "--images", value]
        yield ["data", "info", "digits", "--seed", value]
        yield ["reproduce", "fig3", "--out", "file.txt", "--seed", value]
    for value in PATHS:
        for option in ("data-dir", "init-from", "teachers", "import"):
            yield [*TRAIN, *SHORT, f"--{option}", value]
        yield [*TRAIN, *SHORT, "--model", f"{value}:build"]
        yield ["evaluate", value, "--data", "digits", "--attacks", "fgsm", "--limit", "20"]
        for option in ("data-dir", "compare-with", "teachers", "model"):
            yield [*EVALUATE, f"--{option}", value]
        yield ["attack", value, "--out", "x.npz"]
        yield [*ATTACK[:-1], value]
        yield [*PROGRAM[:4], value]
        yield [*BENCH[:-1], value]
        yield ["compare", "run", value, "--out", "c"]
        yield ["compare", "run", "run", "--out", value]
        yield ["analyze", "filters", value]
        yield [*GAP[:-1], value]
        yield ["data", "info", "cifar10", "--data-dir", value]
        yield ["reproduce", "digits", "--out", value, "--device", "meta"]
    for value in NAMES:
        for option in ("recipe", "model", "data", "precision", "select-on"):
            yield [*TRAIN, *SHORT, f"--{option}", value]
        for option in ("attacks", "data", "split", "budget", "checkpoint", "precision", "name"):
            yield [*EVALUATE, f"--{option}", value]
        yield [*ATTACK, "--attack", value]
        yield [*BENCH, "--name", value]
        yield [*BENCH, "--evaluation", value]
        yield ["compare", "run", "run", "--name", value, "--out", "c"]
        for words in (["data", "info"], ["data", "download"], ["reproduce"], ["export"], ["analyze"], []):
            yield [*words, value]
        yield ["reproduce", "table3", "--data", value]
    for value in DEVICES:
        for command in (TRAIN, EVALUATE, ATTACK, PROGRAM, BENCH, FILTERS, GAP):
            yield [*command, "--device", value]
        yield ["reproduce", "fig3", "--device", value, "--out", "file.txt"]
    for value in PAIRS:
        yield [*TRAIN, *SHORT, "--model-options", value]
        yield [*TRAIN, *SHORT, "--model", "awnet_tiny", "--model-options", value]
    for value in SETTINGS:
        for recipe in ("standard", "mtard"):
            yield [*TRAIN, *SHORT, "--recipe", recipe, "--max-minutes", "1e-3", "--recipe-options", value]


ALL = list(cases())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with the run folder ``run`` and files that are none."""
    folder, before = tmp_path_factory.mktemp("odd"), Path.cwd()
    os.chdir(folder)
    assert main([*TRAIN[:-3], "--out", "run", *SHORT]) == 0
    (folder / "file.txt").write_text("text")
    (folder / "empty").mkdir()
    (folder / "bad.safetensors").write_bytes(b"123")
    yield folder
    os.chdir(before)


def check(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.chdir(folder)
    capsys.readouterr()
    status: object
    try:
        status, by_tyro = main(words), False
    except SystemExit as end:  # tyro's, with its own message
        status, by_tyro = end.code, True
    error = capsys.readouterr().err
    assert status in (0, 2), words
    if status == 2 and not by_tyro:
        assert error.startswith("awnet: error: "), words
        assert error.count("\n") == 1, words
        assert len(error) < 1200, words
        assert "Errno 17" not in error, words


@pytest.mark.parametrize("part", range(4))
def test_odd_values_end_in_one_line(part: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every 20th; all of them in the slow test."""
    for words in ALL[5 * part :: 20 * 4]:
        check(words, folder, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_every_odd_value_ends_in_one_line(
    part: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ALL[part::20]:
        check(words, folder, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*EVALUATE, "--limit", "9" * 20], "limit must be an integer that int64 holds"),
        ([*FILTERS, "--images", "0"], "images must be an integer of at least 1"),
        (["reproduce", "fig3", "--out", "file.txt"], "file.txt must be a folder, but file.txt is a file"),
        (["reproduce", "table3", "--data", "cifar10"], "data is an option of table3, and must be digits"),
        ([*GAP[:-1], "file.txt/x"], "file.txt/x must be a folder, but file.txt is a file"),
        ([*TRAIN, "--data-dir", "a\0b"], "'a\\x00b' is not a path: it contains a null byte"),
    ],
)
def test_error_messages_name_the_option(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.chdir(folder)
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_negative_seed_evaluates(folder: Path) -> None:
    os.chdir(folder)
    assert main([*EVALUATE, "--seed", "-1"]) == 0

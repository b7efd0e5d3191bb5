"""docs/add-an-op.md: its code, put into a copy of the repository, builds, passes its tests and compiles."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import runner
from support.cuda_on_cpu import compiler

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "add-an-op.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r'^```(\w+) title="([\w./]+)"\n(.*?)^```$', TEXT, re.MULTILINE | re.DOTALL)
PYTHON_FILES = sorted({file for _, file, _ in BLOCKS if file.endswith(".py")})
COMMANDS = re.findall(r"^\$ (.*)\n((?:(?!\$ |```).*\n)*)", TEXT, re.MULTILINE)


def before_and_after(diff: str) -> tuple[str, str]:
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    return old.rstrip("\n"), "".join(line[1:] for line in lines if line[0] in " +").rstrip("\n")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository with the op of the page."""
    copy = runner.copy_repository(tmp_path)
    for kind, file, body in BLOCKS:
        path = copy / file
        if kind == "diff":
            (old, new), text = before_and_after(body), path.read_text(encoding="utf-8")
            assert text.count(old) == 1, body
            path.write_text(text.replace(old, new), encoding="utf-8")
        else:
            with path.open("a", encoding="utf-8") as target:
                target.write(body)
    return copy


def test_the_code_of_the_page_applies_to_the_repository(copy: Path) -> None:
    assert len(re.findall(r"^```\w", TEXT, re.MULTILINE)) == len(BLOCKS) + 1  # the commands
    for check in (["check"], ["format", "--check"]):
        done = runner.run(copy, "-m", "ruff", *check, *PYTHON_FILES)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the op")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_commands_of_the_page_succeed(copy: Path) -> None:
    python = f'function python {{ {sys.executable} "$@"; }}; '
    assert len(COMMANDS) == 4
    for command, said in COMMANDS:
        done = subprocess.run(
            ["bash", "-c", python + command], cwd=copy, env=runner.environment(copy), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert all(line in output for line in said.splitlines()), output
    done = runner.run(copy, "-m", "mypy", *(file for file in PYTHON_FILES if not file.startswith("tests/")))
    assert done.returncode == 0, done.stdout + done.stderr

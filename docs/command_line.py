"""Writes docs/command-line.md from the commands: ``python docs/command_line.py``. A test compares."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import tyro

from awnet import cli
from awnet.files import write_text

PAGE = Path(__file__).with_name("command-line.md")
ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    *("train", "evaluate", "attack", "compare", "reproduce", "analyze filters", "analyze weight-gap"),
    *("bench run", "bench train", "bench verify", "bench plot", "bench table", "bench tune"),
    *("data info", "data download", "export robustbench", "export program", "export onnx", "info"),
)
INTRODUCTION = """# Command line

Generated from the commands by `python docs/command_line.py`.

`awnet COMMAND --help` prints the same text. Numbers may be fractions: `--eps 8/255`. An error prints one line
and the exit status is 2; `--traceback`, or `AWNET_DEBUG=1`, prints the traceback too. Ctrl-C saves a run; the
exit status is then 130. `awnet --version` prints the version.

"""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\\\|").replace("<", "&lt;")


def _rows(parser: Any) -> list[tuple[str, str, str]]:
    rows = []
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        values = (
            action.metavar
            if isinstance(action.metavar, str)
            else ""
            if action.metavar is None
            else " ".join(action.metavar)
        )
        name = action.option_strings[-1] if action.option_strings else values
        shown = values if action.option_strings else ""
        text, _, default = (action.help or "").partition("(default: ")
        default = default.replace(f"{ROOT}/", "")
        rows.append((name, shown, _cell(text), _cell(default.rstrip(") \n"))))
    return rows


def page() -> str:
    parts = [INTRODUCTION]
    for words in COMMANDS:
        command = cli.command_named(words.split())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            parser = tyro.extras.get_parser(command, config=cli.CONFIG, prog=f"awnet {words}")
        about = re.sub(r"\n\n", "\n\n", inspect.cleandoc(command.__doc__ or ""))
        parts.append(
            f"## awnet {words}\n\n{about}\n\n| option | value | meaning | default |\n|---|---|---|---|\n"
        )
        for name, shown, text, default in _rows(parser):
            value = f"`{shown}`" if shown else ""
            given = f"`{default}`" if default and default not in ("None", "False") else ""
            parts.append(f"| `{name}` | {_cell(value)} | {text} | {given} |\n")
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    write_text(PAGE, page())
    print(PAGE)

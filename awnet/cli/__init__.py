"""The command line: one file per command. A command parses its options, calls the library and prints.

``options.py`` holds the types of options that several commands use, ``run_options.py`` the options that name
a trained model and its images. Heavy imports are inside the methods that run a command, which keeps
``awnet --help`` fast.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import tyro

from awnet._version import __version__
from awnet.cli.commands import CONFIG, canonical, command_named, command_union
from awnet.cli.options import expand_paths
from awnet.cli.train import misplaced_option
from awnet.terminal import SafeStream, safe_output
from awnet.text import visible

__all__ = ["CONFIG", "EXPECTED", "command_named", "main"]

DESCRIPTION = """Train, attack and evaluate AW-Nets: networks whose filters are re-weighted for each image.

Each command has its own --help; --version prints the version. An error prints one line and the exit
status is 2; --traceback (or AWNET_DEBUG=1) prints the traceback too."""

# errors that a user can cause and fix; any other exception is a defect and keeps its traceback
EXPECTED = (ValueError, TypeError, OSError, ArithmeticError, MemoryError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status: 0 or the command's own, 2 after an error, 130 after Ctrl-C.

    A command continues if its output cannot be written. Commands whose text is the result (help, info,
    data info) then return 2, unless the reader of a pipe has exited.
    """
    with safe_output() as out:
        try:
            return _main(arguments, out)
        finally:
            out.flush()
            if out.error is not None and not out.note and not isinstance(out.error, BrokenPipeError):
                print(f"awnet: error: standard output could not be written ({out.error})", file=sys.stderr)
                sys.exit(2)


def _main(arguments: Sequence[str] | None, out: SafeStream) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--traceback" in words or os.environ.get("AWNET_DEBUG", "") not in ("", "0")
    words = canonical([word for word in words if word != "--traceback"]) or ["--help"]
    out.note = False  # tyro's help is a result
    if words[0] == "train" and (hint := misplaced_option(words)):
        print(f"awnet: error: {hint}", file=sys.stderr)
        return 2

    if words == ["--version"]:
        print(f"awnet {__version__}")
        return 0
    command: Any = tyro.cli(
        command_union(words), prog="awnet", description=DESCRIPTION, args=words, config=CONFIG
    )
    from rich.console import Console

    out.note = not getattr(getattr(command, "command", command), "prints_its_result", False)
    try:
        status: int | None = expand_paths(command).run(Console(highlight=False))
    except EXPECTED as error:
        if debug:
            traceback.print_exc()
        print(f"awnet: error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("awnet: interrupted", file=sys.stderr)
        return 130
    return status or 0

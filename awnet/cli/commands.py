"""The table of commands, and the union type that tyro parses the command line into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tyro.conf import DisallowNone, FlagCreatePairsOff, OmitArgPrefixes

from awnet.cli import bench
from awnet.cli.analyze import AnalyzeFilters, AnalyzeWeightGap
from awnet.cli.attack import Attack
from awnet.cli.compare import Compare
from awnet.cli.data import DataInfo, Download
from awnet.cli.evaluate import Evaluate
from awnet.cli.export import ExportOnnx, ExportProgram, ExportRobustBench
from awnet.cli.info import Info
from awnet.cli.options import command_group, subcommands, with_placeholders
from awnet.cli.reproduce import Reproduce
from awnet.cli.train import Train

CONFIG = (DisallowNone, FlagCreatePairsOff, OmitArgPrefixes)

_SUBCOMMANDS = {  # bench has its own table
    "analyze": {"filters": AnalyzeFilters, "weight-gap": AnalyzeWeightGap},
    "export": {"robustbench": ExportRobustBench, "program": ExportProgram, "onnx": ExportOnnx},
    "data": {"download": Download, "info": DataInfo},
}
_COMMANDS: dict[str, Any] = {
    "train": Train,
    "evaluate": Evaluate,
    "attack": Attack,
    "compare": Compare,
    "reproduce": Reproduce,
    "analyze": command_group("Plot the weights of trained networks.", _SUBCOMMANDS["analyze"]),
    "bench": bench.group(()),
    "data": command_group("Download data sets, and print what they contain.", _SUBCOMMANDS["data"]),
    "export": command_group("Export models to the formats of other tools.", _SUBCOMMANDS["export"]),
    "info": Info,
}
_ALIASES = {"analyse": "analyze"}


def canonical(words: list[str]) -> list[str]:
    """The words of a command line with an alias of a command replaced by its name."""
    return [_ALIASES.get(word, word) for word in words[:1]] + words[1:]


def command_named(words: Sequence[str]) -> Any:
    """The class that holds the options of a command, such as ``["train"]`` or ``["bench", "run"]``."""
    command, *rest = words
    if command == "bench":
        return bench.command(rest[0])
    return with_placeholders(_SUBCOMMANDS[command][rest[0]] if rest else _COMMANDS[command])


def command_union(words: Sequence[str]) -> Any:
    """The union of all commands' classes, for tyro to parse ``words``.

    The options of ``awnet bench`` are loaded only if ``words`` name one of its subcommands.
    """
    for command in (*_COMMANDS.values(), *(c for group in _SUBCOMMANDS.values() for c in group.values())):
        with_placeholders(command)
    return subcommands(_COMMANDS | ({"bench": bench.group(words[1:])} if words[:1] == ["bench"] else {}))

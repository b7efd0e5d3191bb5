"""``awnet bench``: its subcommands are defined in ``awnet.benchmarks``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import subcommand

from awnet.cli.options import with_placeholders

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Bench:
    """Benchmark this machine, and show the results."""


# subcommand → its module in awnet.benchmarks, the class of its options, its function, its help
_SUBCOMMANDS = {
    "run": (
        "runner",
        "BenchOptions",
        "run",
        "Benchmark layers, a block and a network; each implementation is verified, then timed.",
    ),
    "verify": (
        "goals",
        "VerifyOptions",
        "verify",
        "Read benchmark results and print each goal as met, not met or not measured.",
    ),
    "plot": ("report", "PlotOptions", "plot", "Draw benchmark results: bars, roofline, batches."),
    "table": ("report", "TableOptions", "tables", "Write tables of benchmark results into documents."),
    "tune": (
        "tune",
        "TuneOptions",
        "tune",
        "Search launch parameters of the Triton kernels on this GPU, and store them in its table.",
    ),
    "train": (
        "train",
        "TrainBenchOptions",
        "bench_train",
        "Benchmark a recipe's training step against the same step in plain torch.",
    ),
}


def with_subcommands(words: Sequence[str]) -> Any:
    """The class of ``awnet bench``. Loads only the subcommand in ``words``, as loading imports torch."""
    annotated: Any = Annotated
    commands: list[Any] = []
    for name, (module_name, options_name, function, about) in _SUBCOMMANDS.items():
        namespace: dict[str, Any] = {"__doc__": about}
        bases: tuple[type, ...] = ()
        if words[:1] == [name]:
            module = importlib.import_module(f"awnet.benchmarks.{module_name}")
            bases = (getattr(module, options_name),)
            namespace["run"] = _run_method(getattr(module, function))
        command = make_dataclass(name, [], bases=bases, namespace=namespace, kw_only=True, frozen=True)
        commands.append(annotated[with_placeholders(command), subcommand(name)])
    return make_dataclass(
        "Bench",
        [("command", reduce(or_, commands))],
        namespace={"__doc__": Bench.__doc__, "run": lambda self, console: self.command.run(console)},
    )


def options_of(name: str) -> Any:
    """The class that holds the options of one subcommand."""
    module_name, options_name, _, about = _SUBCOMMANDS[name]
    options = getattr(importlib.import_module(f"awnet.benchmarks.{module_name}"), options_name)
    namespace = {"__doc__": about}
    return with_placeholders(
        make_dataclass(name, [], bases=(options,), namespace=namespace, kw_only=True, frozen=True)
    )


# in the errors of torch's allocators, which have no class of their own on CPUs
_MEMORY_ERRORS = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")


def _is_out_of_memory(error: RuntimeError) -> bool:
    return any(words in str(error) for words in _MEMORY_ERRORS)


def _run_method(function: Any) -> Any:
    def run(self: Any, console: Console) -> int | None:
        try:
            status = function(self)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
            raise MemoryError(f"not enough memory, use a smaller batch or size: {reason}") from error
        return status if isinstance(status, int) else None

    return run

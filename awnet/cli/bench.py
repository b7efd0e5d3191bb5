"""``awnet bench``: its subcommands are defined in ``awnet.benchmarks``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import TYPE_CHECKING, Any

from awnet.cli.options import command_group, with_placeholders

if TYPE_CHECKING:
    from rich.console import Console


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
        "Search launch parameters and forms of frozen networks on this GPU, and store them in its table.",
    ),
    "train": (
        "train",
        "TrainBenchOptions",
        "bench_train",
        "Benchmark a recipe's training step against the same step in plain torch.",
    ),
}


def group(words: Sequence[str]) -> Any:
    """The class of ``awnet bench``. Loads only the subcommand in ``words``, as loading imports torch."""
    return command_group(
        "Benchmark this machine, and show the results.",
        {name: command(name, load=words[:1] == [name]) for name in _SUBCOMMANDS},
    )


def command(name: str, *, load: bool = True) -> Any:
    """The class of one subcommand; without ``load`` it has no options."""
    module_name, options, function, about = _SUBCOMMANDS[name]
    namespace: dict[str, Any] = {"__doc__": about}
    bases: tuple[type, ...] = ()
    if load:
        module = importlib.import_module(f"awnet.benchmarks.{module_name}")
        bases, namespace["run"] = (getattr(module, options),), _run_method(getattr(module, function))
    command_class = make_dataclass(name, [], bases=bases, namespace=namespace, kw_only=True, frozen=True)
    return with_placeholders(command_class)


# parts of torch's error messages; on CPUs its allocator raises a plain RuntimeError
_MEMORY_ERRORS = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")


def _run_method(function: Any) -> Any:
    def run(self: Any, console: Console) -> int | None:
        try:
            status = function(self)
        except RuntimeError as error:
            if not any(words in str(error) for words in _MEMORY_ERRORS):
                raise
            reason = str(error).splitlines()[0]
            raise MemoryError(f"not enough memory, use a smaller batch or size: {reason}") from error
        return status if isinstance(status, int) else None

    return run

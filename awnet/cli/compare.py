"""``awnet compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from awnet.cli.options import Maybe, print_text

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(kw_only=True)
class Compare:
    """Compare two runs: settings, training curves and evaluations, paired by image if both used the same
    images.

    To compare accuracies under attack, evaluate both runs with the same attacks first."""

    a: Positional[Path]
    """A run folder."""
    b: Positional[Path]
    """Another run folder. Differences are a minus b."""
    name: str = "default"
    """Name of the evaluation in each run."""
    out: Maybe[Path] = None
    """PNG file for the training curves. Default: comparison.png in the current folder."""

    def run(self, console: Console) -> None:
        from awnet.reproduce.comparison import compare_runs

        comparison = compare_runs(self.a, self.b, name=self.name, out=self.out or Path("comparison.png"))
        for table in comparison.tables():
            console.print(table)
        for note in comparison.notes:
            print_text(console, note)

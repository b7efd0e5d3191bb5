"""``awnet compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from awnet.cli.options import print_text

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(kw_only=True)
class Compare:
    """Compare evaluations on the same images: paired differences with intervals, a table, a figure, a page.

    Give run folders, folders of evaluations (RUN/evaluations/NAME) or report.json files. Differences are to
    the first. Runs that differ in the seed only count as trainings of one configuration, with intervals over
    trainings as well. Reports with other images, another eps or norm, or other settings of an attack are
    refused with the reasons. For run folders, settings and training curves are compared too."""

    reports: Positional[tuple[Path, ...]]
    """Two or more reports. Differences are to the first."""
    name: str = "default"
    """Name of the evaluation in run folders."""
    adjust: Literal["none", "holm"] = "none"
    """holm corrects p and the intervals over images for the number of reports that are compared with the
    first, for each quantity by itself."""
    out: Path = Path("comparison")
    """Folder for comparison.html, comparison.json and comparison.png; for run folders also training.png."""

    def run(self, console: Console) -> None:
        from awnet.reproduce.comparison import compare_runs, compare_sources
        from awnet.run_config import is_run

        if len(self.reports) > 1 and all(map(is_run, self.reports)):
            runs = compare_runs(self.reports, name=self.name, out=self.out)
            for table in runs.tables():
                console.print(table)
            for note in runs.notes:
                print_text(console, note)
            if runs.curves is not None:
                print_text(console, f"training curves: {runs.curves}")
        compared = compare_sources(self.reports, name=self.name, adjust=self.adjust)
        if compared is None:
            return
        console.print(compared.table())
        for note in compared.notes:
            print_text(console, f"note: {note}")
        folder = compared.save(self.out)
        print_text(console, f"written to {folder / 'comparison.html'}, comparison.json and comparison.png")

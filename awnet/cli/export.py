"""``awnet export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from awnet.cli.options import Maybe, check_free, print_text
from awnet.cli.run_options import RunOptions

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(kw_only=True)
class ExportRobustBench(RunOptions):
    """Export a model for RobustBench: check its rules, write the weights, model_info and a zoo entry."""

    name: str
    """Name of the entry in RobustBench's style, such as Wei2024Revisiting."""
    out: Path = Path("robustbench")
    """Output folder."""
    evaluation: str = "default"
    """Name of the run's evaluation whose accuracies are written. Without `aa` among its attacks the accuracy
    under AutoAttack is left empty."""
    title: Maybe[str] = None
    """Title of the publication. Default: the paper's, as for the next three."""
    authors: Maybe[str] = None
    link: Maybe[str] = None
    venue: Maybe[str] = None
    additional_data: bool = False
    """The model was trained on more than the data set's training images."""
    footnote: Maybe[str] = None
    """A note for readers of the table."""

    def run(self, console: Console) -> None:
        from awnet.devices import resolve_device
        from awnet.evaluation import Report
        from awnet.evaluation.robustbench import Entry, export_robustbench

        model, dataset = self.load(console)
        folder = self.results_folder / "evaluations" / self.evaluation
        report = None
        try:
            report = Report.load(folder)
        except FileNotFoundError:
            print_text(console, f"note: there is no report in {folder}, so the entry has no accuracies")
        if report is not None and "aa" not in report.attacks:
            print_text(console, f"note: {folder} did not run AutoAttack, so autoattack_acc is left empty")
        given = {n: getattr(self, n) for n in ("title", "authors", "link", "venue", "footnote")}
        entry = Entry(
            self.name, additional_data=self.additional_data, **{k: v for k, v in given.items() if v}
        )
        dataset = dataset.to(resolve_device(self.device))
        for path in export_robustbench(model, dataset, report, self.out, entry):
            print_text(console, str(path))


@dataclass(kw_only=True)
class ExportProgram(RunOptions):
    """Export a model in eval mode with torch.export, for any batch size."""

    out: Path
    """The .pt2 file to write; torch.export.load reads it."""
    standalone: bool = False
    """Use only torch's own operators, by the paper's equations: slower, but the program runs without awnet.
    Otherwise `import awnet.ops` is needed before the program is loaded."""
    overwrite: bool = False
    """Replace the file if it exists."""

    def run(self, console: Console) -> None:
        from awnet.models.export import export_program

        check_free(self.out, overwrite=self.overwrite)
        model, x = self.example(console)
        export_program(model, x, self.out, standalone=self.standalone, name=str(self.loaded_from))
        print_text(console, str(self.out))


@dataclass(kw_only=True)
class ExportOnnx(RunOptions):
    """Export a model in eval mode as an ONNX file, for any batch size.

    The input is `images` [batch, C, H, W] in [0, 1], the output `logits` [batch, K]. Needs
    `pip install 'awnet[onnx]'`."""

    out: Path
    """The .onnx file to write."""
    overwrite: bool = False
    """Replace the file if it exists."""

    def run(self, console: Console) -> None:
        from awnet.models.export import export_onnx

        check_free(self.out, overwrite=self.overwrite)
        model, x = self.example(console)
        export_onnx(model, x, self.out, name=str(self.loaded_from))
        print_text(console, str(self.out))

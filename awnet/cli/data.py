"""``awnet data``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tyro.conf import Positional

from awnet.cli.options import Maybe, print_text

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(kw_only=True)
class Download:
    """Download a published data set, verify its checksum and unpack it. An interrupted download resumes."""

    name: Positional[str]
    """cifar10, cifar100 or tiny_imagenet."""
    data_dir: Path = Path("data")
    """Parent of the data set's folder. An existing data set is not changed."""
    url: Maybe[str] = None
    """A mirror; its file must have the publisher's checksum."""

    def run(self, console: Console) -> None:
        from rich import progress

        from awnet.data import download

        columns = (
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        hidden = not console.is_terminal
        with progress.Progress(*columns, console=console, transient=True, disable=hidden) as bar:
            task = bar.add_task("", total=None)
            folder = download(
                self.name,
                self.data_dir,
                url=self.url,
                progress=lambda received, total: bar.update(task, completed=received, total=total),
            )
        print_text(console, str(folder))


@dataclass(kw_only=True)
class DataInfo:
    """Print a data set's splits, classes, threat model and fingerprints."""

    prints_its_result: ClassVar[bool] = True

    name: Positional[str]
    """digits, cifar10, cifar100 or tiny_imagenet."""
    data_dir: Maybe[Path] = None
    """Folder of the published data set, or its parent. Default: `data`."""
    seed: int = 0
    """Seed of the choice of held-out validation images."""

    def run(self, console: Console) -> None:
        from rich.table import Table

        from awnet.data import load_dataset

        splits = load_dataset(self.name, self.data_dir, seed=self.seed)
        train = splits.train
        table = Table(box=None, pad_edge=False)
        for column in ("split", "images", "per class", "fingerprint"):
            table.add_column(column, justify="right" if column == "images" else "left", no_wrap=True)
        for part in splits:
            counts = part.labels.bincount(minlength=part.num_classes)
            per_class = f"{int(counts.min())} to {int(counts.max())}"
            table.add_row(part.split, f"{len(part):,}", per_class, part.fingerprint())
        console.print(table)
        height, width = train.image_size
        threat_model = train.threat_model
        levels = f"{threat_model.eps * train.max_value:.4g}/{train.max_value}"
        names = ", ".join(train.classes[:10]) + (", …" if train.num_classes > 10 else "")
        for key, value in {
            "images": f"{train.in_channels}×{height}×{width}, values 0 to {train.max_value}",
            "classes": f"{train.num_classes}: {names}",
            "threat model": f"{threat_model.norm_text}, eps {threat_model.eps:.4g} ({levels})",
            "augmentation": f"shift by up to ±{train.augmentation.shift} pixels"
            + (", flip left to right" if train.augmentation.flip else ", no flip"),
            "source": train.source,
        }.items():
            print_text(console, f"{key + ':':14}{value}")

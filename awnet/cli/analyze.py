"""``awnet analyze``: figures about the weights of trained networks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from awnet.cli.options import ImportOption, Maybe, print_text
from awnet.cli.run_options import RunOptions

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from awnet.data import Dataset


@dataclass(kw_only=True)
class _Runs(ImportOption):
    runs: Positional[tuple[Path, ...]]
    """Run folders, or .safetensors files."""
    out: Path = Path("runs/analysis")
    """Folder for the figures and their data."""
    data: Maybe[str] = None
    """Data set. Default: the one that the first run was trained on."""
    data_dir: Maybe[Path] = None
    """Folder of the published data set, or its parent. Default: where the run found it."""
    device: Maybe[str] = None
    """cpu, cuda, cuda:1 …. Default: the GPU if there is one."""

    def load(self, console: Console) -> dict[str, tuple[nn.Module, Dataset]]:
        """Each model with its images; keys are the parts of the paths that differ."""
        from awnet.devices import resolve_device

        if not self.runs:
            raise ValueError("runs must name at least one run folder or .safetensors file")
        self.import_user_module()
        loaded = {}
        for path, label in zip(self.runs, _labels(self.runs), strict=True):
            options = RunOptions(source=str(path), data=self.data, data_dir=self.data_dir, device=self.device)
            model, images = options.load(console)
            loaded[label] = model, images.to(resolve_device(self.device))
        return loaded


def _labels(paths: Sequence[Path]) -> list[str]:
    """The paths without the folders that they share."""
    absolute = [path.resolve() for path in paths]
    common = Path(os.path.commonpath(absolute))
    return [path.name if path == common else str(path.relative_to(common)) for path in absolute]


@dataclass(kw_only=True)
class AnalyzeFilters(_Runs):
    """Plot the distributions of the filters' mean weights of any checkpoints; networks of the same
    architecture share a panel (Fig. 1 and 3). For AW-Nets also plot the effective filters, as the router
    scales them for clean and for adversarial images."""

    layers: int = 2
    """Number of convolutions to plot of each network, from the first."""
    images: int = 128
    """Number of test images to average the router's scales over."""
    attack: str = "pgd_sat"
    """Attack that makes the adversarial images, see `awnet info`."""

    def run(self, console: Console) -> None:
        from awnet.reproduce.analyses import by_architecture, compare_filters, effective_filters
        from awnet.scalars import check_integer

        check_integer("layers", self.layers, 1)
        check_integer("images", self.images, 1)
        loaded = self.load(console)
        groups = by_architecture({label: model for label, (model, _) in loaded.items()})
        written = compare_filters(groups, self.out, layers=self.layers)
        subsets = {label: (model, images.subset(self.images)) for label, (model, images) in loaded.items()}
        written += effective_filters(subsets, self.out, attack=self.attack, layers=self.layers)
        for path in written:
            print_text(console, str(path))


@dataclass(kw_only=True)
class AnalyzeWeightGap(_Runs):
    """Section 3.2: one step of adversarial against standard training, measured and by Eq. 8."""

    images: int = 128
    """Number of images to take the expectation over."""

    def run(self, console: Console) -> None:
        from awnet.reproduce.analyses import measure_weight_gap
        from awnet.scalars import check_integer

        check_integer("images", self.images, 1)
        loaded = self.load(console)
        for number, (label, (model, dataset)) in enumerate(loaded.items(), start=1):
            if dataset.threat_model.norm != "Linf":
                raise ValueError(
                    f"the weight gap is defined for L-infinity, and {label} has {dataset.threat_model}"
                )
            batch = next(dataset.subset(self.images).batches(self.images))
            folder = self.out if len(loaded) == 1 else self.out / str(number)
            print_text(console, label)
            for path in measure_weight_gap(model, batch.x, batch.y, dataset.threat_model.eps, folder):
                print_text(console, f"  {path}")

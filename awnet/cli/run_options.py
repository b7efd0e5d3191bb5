"""Options of the commands that load a trained model and the images of its run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from awnet.cli.options import Maybe, Number, print_text
from awnet.cli.user_code import ImportOption, build_model

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn
    from torch import device as Device

    from awnet.data import Dataset, Splits


def load_splits(name: str, data_dir: Path | None, seed: int, eps: float | None) -> Splits:
    """The splits of a data set; with ``eps`` instead of the data set's own where it is given."""
    from awnet.data import Splits, ThreatModel, load_dataset

    splits = load_dataset(name, data_dir, seed=seed)
    if eps is None:
        return splits
    return Splits(*(replace(part, threat_model=ThreatModel(eps)) for part in splits))


@dataclass(kw_only=True)
class RunOptions(ImportOption):
    run_folder: Positional[Path]
    """A run folder, or a .safetensors file."""
    builder: Annotated[str | None, arg(name="model", metavar="CODE:FUNCTION", help_behavior_hint="")] = None
    """Function without arguments, as FILE.py:FUNCTION or MODULE:FUNCTION, that builds the model of the run if
    awnet cannot: a converted network, or one of another library. The weights are loaded into it."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights of a run folder: the best on held-out images, or the last ones."""
    data: Maybe[str] = None
    """Data set. Default: the one that the run was trained on."""
    data_dir: Maybe[Path] = None
    """Folder of the published data set, or its parent. Default: where the run found it."""
    split: Literal["test", "validation", "train"] = "test"
    """Which images."""
    limit: Maybe[int] = None
    """Use at most this many images, stratified by class."""
    eps: Number = None
    """Size of the perturbation in image units. Default: the one that the run was trained with."""
    batch_size: int = 256
    """Images per forward pass."""
    seed: int = 0
    """Seed of the attacks' random starts."""
    device: Maybe[str] = None
    """cpu, cuda, cuda:1 …. Default: the GPU if there is one."""

    @property
    def folder(self) -> Path:
        return self.run_folder.parent if self.run_folder.suffix == ".safetensors" else self.run_folder

    @property
    def weights(self) -> Path:
        """The path for ``load_model``: the path that was given, or the run's last checkpoint."""
        last = self.run_folder == self.folder and self.checkpoint == "last"
        return self.folder / "last.safetensors" if last else self.run_folder

    def load_model(self) -> nn.Module:
        """The model with its weights, in eval mode on the CPU."""
        from awnet.models import load_model

        self.import_user_module()
        return load_model(self.weights, model=None if self.builder is None else build_model(self.builder))

    def config(self) -> dict[str, Any]:
        """The run's config.json, checked; empty for a .safetensors file outside a run folder."""
        from awnet.run_config import is_run, read_config

        path = self.run_folder
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: give a run folder, which awnet train makes, or a .safetensors file"
            )
        if path == self.folder and not path.is_dir():
            raise ValueError(f"{path} is neither a run folder nor a .safetensors file")
        if is_run(self.folder) or (self.data is None and path == self.folder):
            return read_config(self.folder, whole=True)
        return {}

    def _recorded_name(self, config: dict[str, Any]) -> str:
        """The name of the run's data set, if the command line can load it; else ValueError."""
        from awnet.data import list_datasets

        if not config:
            raise ValueError(
                f"{self.run_folder} is not in a run folder, which would name its data set: give --data"
            )
        name: str = config["dataset"]["name"]
        if name not in list_datasets():
            raise ValueError(
                f"{self.folder} was trained on {name!r}, arrays that only a Python program has. Evaluate it "
                f"there: awnet.evaluate(awnet.load_model({str(self.weights)!r}), dataset, "
                f"out={str(self.folder)!r}). Or give --data with one of {', '.join(list_datasets())}"
            )
        return name

    def example(self, console: Console) -> tuple[nn.Module, Tensor]:
        """The model and two images [2, C, H, W]: zeros if the run's data set cannot be loaded by name."""
        import torch

        from awnet.data import list_datasets
        from awnet.devices import resolve_device

        target, config = resolve_device(self.device), self.config()
        sizes = config.get("input")
        if self.data is not None or sizes is None or config["dataset"]["name"] in list_datasets():
            model, dataset = self.load(console, target)
            return model, next(dataset.to(target).batches(2)).x
        return self.load_model().to(target), torch.zeros(2, *sizes, device=target)

    def load(self, console: Console, target: Device | None = None) -> tuple[nn.Module, Dataset]:
        """The model on the device ``target`` (default: ``--device``), and the images on the host."""
        from awnet.devices import resolve_device
        from awnet.evaluation.tables import in_one_line
        from awnet.scalars import check_integer

        if self.limit is not None:
            check_integer("limit", self.limit, 1)
        config = self.config()
        recorded = config.get("dataset", {})
        name, data_dir, eps = self.data, self.data_dir, self.eps
        if name is None:
            name = self._recorded_name(config)
        same_data = name == recorded.get("name")
        if same_data and data_dir is None and Path(recorded["source"]).is_dir():
            data_dir = Path(recorded["source"])
        if same_data and eps is None:
            eps = recorded["eps"]
        model = self.load_model().to(target or resolve_device(self.device))
        # the run's own seed, so that the validation images are those that it did not train on
        dataset: Dataset = getattr(load_splits(name, data_dir, config.get("seed", 0), eps), self.split)
        if same_data and dataset.fingerprint() != recorded["fingerprints"][self.split]:
            print_text(console, f"note: the {self.split} images differ from those that the run recorded")
        count = len(dataset) if self.limit is None else min(self.limit, len(dataset))
        recipe = config.get("recipe", {}).get("name")
        print_text(
            console,
            in_one_line(
                model,
                f"{count:,} {self.split} images of {dataset.name}",
                dataset.threat_model.eps,
                trained=f"trained by {recipe}" if recipe else None,
            ),
        )
        return model, dataset

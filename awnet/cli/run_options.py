"""Options of the commands that load a trained model and the images of its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, arg

from awnet.cli.options import Fraction, ImportOption, Maybe, print_text
from awnet.files import expanded

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn
    from torch import device as Device

    from awnet.data import Dataset, ThreatModel


def threat_models(norms: Sequence[str], eps: Sequence[float], default: ThreatModel) -> list[ThreatModel]:
    """The threat models of ``--norm`` and ``--eps``, one for each norm; ``default`` if they are left out.

    Raises:
        ValueError: a norm is unknown or given twice, or norms and eps do not fit together.
    """
    from awnet.data.threat_model import ThreatModel, check_norm, eps_text

    names = [check_norm(norm) for norm in norms] or [default.norm]
    if len(set(names)) < len(names):
        raise ValueError(f"--norm takes each norm once, got {' '.join(names)}")
    if not eps and names != [default.norm]:
        raise ValueError(
            f"--norm {' '.join(names)} needs --eps, one for each norm: the eps of the data or the run, "
            f"{eps_text(default.eps)}, is for {default.norm}"
        )
    sizes = list(eps) or [default.eps]
    if len(sizes) != len(names):
        raise ValueError(
            f"--norm and --eps must have the same number of values, got {len(names)} ({' '.join(names)}) and "
            f"{len(sizes)} ({' '.join(map(eps_text, sizes))})"
        )
    return [ThreatModel(*pair) for pair in zip(sizes, names, strict=True)]


@dataclass(kw_only=True)
class RunOptions(ImportOption):
    several_norms: ClassVar[bool] = False

    source: Positional[str]
    """A run folder or .safetensors file; zoo:NAME, a trained model of this package; timm:NAME;
    FILE.py:FUNCTION or MODULE:FUNCTION, which returns an nn.Module; a .pt2 file of torch.export;
    hub:USER/REPO; or robustbench:NAME."""
    builder: Annotated[str | None, arg(name="model", metavar="CODE:FUNCTION", help_behavior_hint="")] = None
    """Function without arguments, as FILE.py:FUNCTION or MODULE:FUNCTION, that builds the model of the run if
    awnet cannot: a converted network, or one of another library. The weights are loaded into it."""
    weights: Maybe[Path] = None
    """State dict for a timm model or a function's: a .safetensors file, or one of torch.save. Default for
    timm: the pretrained weights."""
    mean: Maybe[tuple[float, ...]] = None
    """Mean of each channel, for a model that expects normalized images. Default: none, or that of timm's
    pretrained weights."""
    std: Maybe[tuple[float, ...]] = None
    """Standard deviation of each channel, as for --mean."""
    num_classes: Maybe[int] = None
    """Number of classes of a timm model with --weights."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights of a run folder: the best on held-out images, or the last ones."""
    data: Maybe[str] = None
    """Data set by name, or a folder with a folder of images for each class, or a .npz file of images and
    labels. Default: the one that the run was trained on."""
    data_dir: Maybe[Path] = None
    """Folder of the published data set, or its parent. Default: where the run found it."""
    image_size: Maybe[int] = None
    """Side of the square images that the model takes. Images of a folder are loaded at this size. All other
    images are resized within the model."""
    classes: Maybe[Path] = None
    """File with the names of the classes in their order, for a folder or .npz file: text, or ImageNet's
    class index in JSON."""
    split: Literal["test", "validation", "train"] = "test"
    """Which images."""
    limit: Maybe[int] = None
    """Use at most this many images, stratified by class."""
    norm: Annotated[tuple[str, ...], arg(metavar="NORM [NORM ...]", help_behavior_hint="")] = ()
    """Norm of the perturbation: Linf, L2 or L1. Default: the one that the run was trained with."""
    eps: Annotated[tuple[Fraction, ...], arg(metavar="NUMBER [NUMBER ...]", help_behavior_hint="")] = ()
    """Size of the perturbation in that norm, in image units. Default: the one that the run was trained
    with."""
    batch_size: int = 256
    """Images per forward pass."""
    seed: int = 0
    """Seed of the attacks' random starts."""
    device: Maybe[str] = None
    """cpu, cuda, cuda:1 …. Default: the GPU if there is one."""

    @cached_property
    def path(self) -> Path:
        """The path of a run folder or ``.safetensors`` file; that of a zoo model, verified once."""
        from awnet.models.zoo import zoo_folder

        if self._kind == "zoo":
            return zoo_folder(self.source.removeprefix("zoo:"))
        return expanded(self.source)

    @property
    def is_run(self) -> bool:
        """Whether the model is a run's or a ``.safetensors`` file, and not from another source."""
        return self._kind in ("file", "zoo")

    @property
    def _kind(self) -> str:
        from awnet.models.sources import source_kind

        return source_kind(self.source)

    @property
    def folder(self) -> Path:
        """The run folder; for a model from another source, the folder for its results."""
        if not self.is_run:
            return self.results_folder
        return self.path.parent if self.path.suffix == ".safetensors" else self.path

    @property
    def results_folder(self) -> Path:
        """The folder in which results are stored: the run folder, or runs/MODEL."""
        from awnet.models.sources import source_name

        return self.folder if self._kind == "file" else Path("runs") / source_name(self.source)

    @property
    def loaded_from(self) -> str | Path:
        """The source for ``load_model``: the one that was given, or the run's last checkpoint."""
        if self.checkpoint == "last" and not (self.is_run and self.path == self.folder):
            raise ValueError(f"--checkpoint last is for run folders: {self.source} has one set of weights")
        if not self.is_run:
            return self.source
        return self.folder / "last.safetensors" if self.checkpoint == "last" else self.path

    def load_model(self) -> nn.Module:
        """The model with its weights, in eval mode on the CPU."""
        from awnet.models import load_model
        from awnet.models.user_code import build_model

        self.import_user_module()
        built = None if self.builder is None else build_model(self.builder)
        return load_model(
            self.loaded_from,
            model=built,
            weights=self.weights,
            mean=self.mean,
            std=self.std,
            image_size=None if self.is_run and built is None else self.image_size,
            num_classes=self.num_classes,
        )

    def config(self) -> dict[str, Any]:
        """The run's config.json, checked; empty for a model outside a run folder."""
        from awnet.run_config import is_run, read_config

        if not self.is_run:
            return {}
        if not self.path.exists():
            raise FileNotFoundError(
                f"{self.path} does not exist: give a run folder, which awnet train makes, a .safetensors "
                "file or another source of a model (awnet evaluate --help)"
            )
        if self.path == self.folder and not self.path.is_dir():
            raise ValueError(f"{self.path} is neither a run folder nor a .safetensors file")
        if is_run(self.folder) or (self.data is None and self.path == self.folder):
            return read_config(self.folder, whole=True)
        return {}

    def _recorded_name(self, config: dict[str, Any]) -> str:
        """The name of the run's data set, if the command line can load it; else ValueError."""
        from awnet.data import list_datasets

        if not config:
            raise ValueError(
                f"{self.source} is not in a run folder, which would name its data set: give --data"
            )
        name: str = config["dataset"]["name"]
        path = Path(config["dataset"]["source"])
        if name not in list_datasets() and path.is_absolute() and path.exists():
            return str(path)
        if name not in list_datasets():
            raise ValueError(
                f"{self.folder} was trained on {name!r}, arrays that only a Python program has. Evaluate it "
                f"there: awnet.evaluate(awnet.load_model({str(self.loaded_from)!r}), dataset, "
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
        from awnet.data import ThreatModel, load_dataset
        from awnet.devices import resolve_device
        from awnet.evaluation.tables import in_one_line
        from awnet.scalars import check_integer

        if self.limit is not None:
            check_integer("limit", self.limit, 1)
        config = self.config()
        recorded = config.get("dataset", {})
        name, data_dir = self.data, self.data_dir
        if name is None:
            name = self._recorded_name(config)
        same_data = bool(config) and name in (recorded["name"], recorded["source"])
        by_name = same_data and name == recorded["name"]
        size = self.image_size
        if same_data and not by_name and size is None and Path(name).is_dir():
            size = config["input"][1]  # images of this size are not changed
        if by_name and data_dir is None and Path(recorded["source"]).is_dir():
            data_dir = Path(recorded["source"])
        model = self.load_model().to(target or resolve_device(self.device))
        # the run's own seed, so that the validation images are those that it did not train on
        splits = load_dataset(
            name,
            data_dir,
            seed=config.get("seed", 0),
            image_size=size if expanded(name).is_dir() else None,
            classes=self.classes,
        )
        dataset: Dataset = getattr(splits, self.split)
        default = dataset.threat_model
        if same_data:
            default = ThreatModel(recorded["eps"], recorded.get("norm", "Linf"))
        if len(dataset) == 0:
            present = [part for part in ("train", "validation", "test") if len(getattr(splits, part))]
            raise ValueError(
                f"{name} has no {self.split} images: "
                f"{f'give --split {present[-1]}' if present else 'it is empty'}"
            )
        self.threat_models = threat_models(self.norm, self.eps, default)
        if len(self.threat_models) > 1 and not self.several_norms:
            raise ValueError(f"--norm takes one norm here, got {' '.join(self.norm)}")
        dataset = replace(dataset, threat_model=self.threat_models[0])
        if same_data and dataset.fingerprint() != recorded["fingerprints"][self.split]:
            advice = "" if by_name else ": give --classes and --image-size as in the training"
            print_text(
                console, f"note: the {self.split} images differ from those that the run recorded{advice}"
            )
        count = len(dataset) if self.limit is None else min(self.limit, len(dataset))
        recipe = config.get("recipe", {}).get("name")
        print_text(
            console,
            in_one_line(
                model,
                f"{count:,} {self.split} images of {dataset.name}",
                *self.threat_models,
                trained=f"trained by {recipe}" if recipe else None,
            ),
        )
        for threat_model in self.threat_models:
            doubt = threat_model.implausible(dataset.pixels)
            if doubt is not None:
                print_text(console, f"warning: {doubt}")
        return model, dataset

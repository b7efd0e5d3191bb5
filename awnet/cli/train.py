"""``awnet train``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from awnet import early_signals
from awnet.cli.options import ImportOption, Maybe, Number, Several, parse_options, print_text
from awnet.cli.run_options import threat_models

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from awnet.data import Splits


@dataclass(kw_only=True)
class Train(ImportOption):
    """Train a model with a recipe and write everything into a run folder.

    On several GPUs or machines: `torchrun --nproc_per_node 8 -m awnet train …`; with --max-restarts=2 it
    resumes from the last checkpoint automatically. --batch-size counts the images of all GPUs together."""

    recipe: str = "mtard"
    """mtard (two teachers, the paper's), trades, pgd_at, mart, gat or standard (clean images only). With a
    one-cycle learning rate and fewer epochs: mtard_fast, trades_fast, pgd_at_fast, standard_fast, single_step
    and hat. With modern ingredients: mtard_strong, trades_strong and pgd_at_strong. For one network each:
    rdi, advmoe and separate."""
    preset: Maybe[Literal["paper", "fast", "strong"]] = None
    """Settings of the recipe: paper (a method's own), fast or strong; `--recipe trades --preset fast` is
    `--recipe trades_fast`."""
    model: Maybe[str] = None
    """Name of the model, see `awnet info`, or FILE.py:FUNCTION (MODULE:FUNCTION) to train what that function
    returns. Default: the recipe's own network, or awnet_tiny on digits and awnet_resnet18 elsewhere."""
    data: str = "digits"
    """digits (ships with scikit-learn), cifar10, cifar100 or tiny_imagenet; or the path of a folder with
    folders train/CLASS and test/CLASS (or val/CLASS) of images, or of a .npz file."""
    image_size: Maybe[int] = None
    """Side of the square images in pixels, for a folder of images: they are resized and cropped."""
    classes: Maybe[Path] = None
    """File with the names of the classes in their order, for a folder or .npz file."""
    data_dir: Maybe[Path] = None
    """Folder of the published data set, or its parent. Default: `data`."""
    out: Maybe[Path] = None
    """Run folder to write. Default: runs/DATA-MODEL-RECIPE-SEED."""
    resume: bool = False
    """Resume the run in the run folder, if there is one. Ctrl-C saves a checkpoint."""
    overwrite: bool = False
    """Replace the run in the run folder."""
    teachers: Maybe[tuple[str, ...]] = None
    """The clean and the robust teacher (for hat the clean one only): run folders, .safetensors files or any
    other MODEL that evaluate takes, such as timm:NAME or FILE.py:FUNCTION. Without this option the recipe
    trains them first."""
    epochs: Maybe[int] = None
    """Passes over the training images; the milestones of the learning rate are scaled. Default: the
    recipe's."""
    batch_size: Maybe[int] = None
    """Images per step. Default: the recipe's."""
    lr: Number = None
    """Learning rate of the network (the router has its own, router_lr). Default: the recipe's."""
    attack_steps: Maybe[int] = None
    """Steps of the training attack. Default: the recipe's."""
    precision: Maybe[Literal["auto", "float32", "bfloat16"]] = None
    """Precision of convolutions and matrix products. auto, the default, is bfloat16 on CUDA and float32
    elsewhere. bfloat16 is faster on CPUs with AMX, see `awnet info`."""
    attack_precision: Maybe[Literal["auto", "float32", "bfloat16"]] = None
    """Precision of the network in the training attack. auto, the default, is that of --precision."""
    layout: Maybe[Literal["auto", "nchw", "channels_last"]] = None
    """Memory format of the images. auto, the default, is channels_last on CUDA and with
    bfloat16."""
    recipe_options: Several[str] = ()
    """Other settings of the recipe as NAME=VALUE …, such as temperature=5 milestones=75,90 awp=0.005."""
    model_options: Several[str] = ()
    """Settings of the model as NAME=VALUE …, such as bn=one."""
    limit: Maybe[int] = None
    """Train on at most this many images, stratified by class."""
    extra_data: Maybe[Path] = None
    """.npz file of extra training images, generated or pseudo-labeled: image uint8 [M, H, W, C] and label
    [M], written by numpy.savez. It is read batch by batch."""
    extra_fraction: Number = None
    """Share of each batch that comes from --extra-data, above 0 and at most 1. Default: 0.7."""
    init_from: Maybe[Path] = None
    """Start from the weights of this run or .safetensors file; the model must be the same."""
    norm: Annotated[str | None, arg(metavar="NORM", help_behavior_hint="")] = None
    """Norm of the perturbation: Linf, L2 or L1. Default: Linf."""
    eps: Number = None
    """Size of the perturbation in that norm, in image units. Default, for Linf only: the data set's, 8/255
    (0.15 on digits)."""
    select_on: Literal["validation", "test"] = "validation"
    """Images that select the best checkpoint: held-out training images, or the test images (the paper's
    protocol, which gives optimistic results; the report says so)."""
    data_memory: Literal["auto", "device", "host"] = "auto"
    """Where the training images are stored: on the device, on the host, or (auto) on the device if they
    fit."""
    max_minutes: Number = None
    """Write a checkpoint and stop after this time."""
    checkpoint_minutes: float = 10.0
    """Time between checkpoints within an epoch. The end of each epoch always writes one."""
    keep_checkpoints: int = 2
    """Number of recent checkpoints to keep on disk; a damaged one is skipped when the run is resumed."""
    seed: int = 0
    """Seed of the weights, the order of the images, the augmentation, the attacks' noise and the choice of
    held-out images."""
    device: Maybe[str] = None
    """cpu, cuda, cuda:1 …. Default: the GPU if there is one."""

    @early_signals.recorded()
    def run(self, console: Console) -> None:
        from awnet.data import Splits, load_dataset, with_extra
        from awnet.distributed import is_first
        from awnet.models.user_code import is_function
        from awnet.scalars import check_integer
        from awnet.training import recipe_for, train

        self.import_user_module()
        settings = parse_options(self.recipe_options, "--recipe-options")
        for name in ("epochs", "batch_size", "lr", "attack_steps", "precision", "attack_precision", "layout"):
            value = getattr(self, name)
            if value is not None:
                if name in settings:
                    raise ValueError(
                        f"{name} is given twice: as --{name.replace('_', '-')} and in --recipe-options"
                    )
                settings[name] = value
        recipe = recipe_for(self.recipe, self.data, preset=self.preset, **settings)
        splits = load_dataset(
            self.data, self.data_dir, seed=self.seed, image_size=self.image_size, classes=self.classes
        )
        norms = () if self.norm is None else (self.norm,)
        sizes = () if self.eps is None else (self.eps,)
        chosen = threat_models(norms, sizes, splits.train.threat_model)
        splits = Splits(*(replace(part, threat_model=chosen[0]) for part in splits))
        if len(splits.train) == 0:
            raise ValueError(
                f"{self.data} has no training images: put them in a folder train with a folder for each "
                "class, or in arrays x_train and y_train"
            )
        if self.limit is not None:
            limit = check_integer("limit", self.limit, 1)
            splits = splits._replace(train=splits.train.subset(limit))
        if self.extra_data is not None:
            fraction = 0.7 if self.extra_fraction is None else self.extra_fraction
            splits = splits._replace(train=with_extra(splits.train, self.extra_data, fraction))
        elif self.extra_fraction is not None:
            raise ValueError("--extra-fraction needs --extra-data")
        name = self.model or recipe.network or ("awnet_tiny" if self.data == "digits" else "awnet_resnet18")
        label = name.rpartition(":")[2]
        out = self.out or Path("runs") / f"{splits.train.name}-{label}-{recipe.title}-{self.seed}"
        options = parse_options(self.model_options, "--model-options")
        result = train(
            recipe,
            _create_model(name, options, splits, self.seed) if options or is_function(name) else name,
            splits,
            out,
            seed=self.seed,
            device=self.device,
            resume=self.resume,
            overwrite=self.overwrite,
            teachers=self.teachers,
            init_from=self.init_from,
            data_memory=self.data_memory,
            max_minutes=self.max_minutes,
            checkpoint_minutes=self.checkpoint_minutes,
            keep_checkpoints=self.keep_checkpoints,
            select_on=self.select_on,
        )
        if result.finished and is_first():
            code = f" --import {self.user_module}" if self.user_module is not None else ""
            if is_function(name):
                code += f" --model {name}"
            print_text(console, f"next: awnet evaluate {result.folder}{code}")


def _create_model(name: str, options: dict[str, Any], splits: Splits, seed: int) -> nn.Module:
    import torch

    from awnet import rng
    from awnet.models.registry import create_seeded_model
    from awnet.models.user_code import build_model, is_function

    if is_function(name):
        with torch.random.fork_rng([]):
            torch.manual_seed(rng.torch_seed(seed, "model"))
            return build_model(name, options)
    train = splits.train
    return create_seeded_model(
        name, seed, num_classes=train.num_classes, in_channels=train.in_channels, **options
    )


def misplaced_option(words: Sequence[str]) -> str | None:
    """An error message if an unknown option of ``train`` is a setting of the recipe or the model."""
    known = {field.name for field in fields(Train)} | {"help"}
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name in known:
            continue
        from awnet.models.registry import model_options
        from awnet.training.recipes import RECIPES

        for owner, settings in {
            "recipe": {field.name for kind in RECIPES.values() for field in fields(kind)} - {"preset"},
            "model": model_options(),
        }.items():
            if name in settings:
                flag = f"--{name.replace('_', '-')}"
                return f"{flag} is a setting of the {owner}: give --{owner}-options {name}=VALUE"
    return None

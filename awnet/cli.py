"""The command line. It parses, calls the library and prints; nothing else happens here."""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, make_dataclass, replace
from datetime import timedelta
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, OmitArgPrefixes, Positional, arg, subcommand
from tyro.constructors import PrimitiveConstructorSpec

from awnet import early_signals
from awnet._version import __version__
from awnet.files import expanded
from awnet.terminal import SafeStream, safe_output
from awnet.text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn
    from torch import device as Device

    from awnet.data import Dataset, Splits
    from awnet.distributed import Ranks

DESCRIPTION = """Train, attack and evaluate AW-Nets: networks whose filters are re-weighted for each image.

Each command has its own --help; --version prints the version. An error prints one line and ends
with status 2; --traceback (or AWNET_DEBUG=1) shows where it came from."""

# what a user can cause and mend; anything else is a defect and keeps its traceback
EXPECTED = (ValueError, TypeError, OSError, ArithmeticError, MemoryError, ImportError)


def number(text: str) -> float:
    """A number or a fraction: ``0.03``, ``8/255``."""
    over, _, under = text.partition("/")
    try:
        return float(over) / float(under) if under else float(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a number or a fraction such as 8/255, got {text!r}") from None


T = TypeVar("T")
# without a hint, as the help text says in words what happens by default
Maybe = Annotated[T | None, arg(help_behavior_hint="")]
Several = Annotated[tuple[T, ...], arg(help_behavior_hint="")]
Number = Annotated[
    float | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=lambda texts: number(texts[0]),
        is_instance=lambda value: value is None or isinstance(value, float),
        str_from_instance=lambda value: [str(value)],
    ),
    arg(help_behavior_hint=""),
]


# what stands in the help for a value of these options, in place of its type
_PLACEHOLDERS = {
    "a": "RUN",
    "attack": "ATTACK",
    "attacks": "ATTACK [ATTACK ...]",
    "authors": "TEXT",
    "cases": "CASE [CASE ...]",
    "compare_with": "RUN [RUN ...]",
    "data": "DATASET",
    "data_dir": "FOLDER",
    "device": "DEVICE",
    "evaluation": "NAME",
    "files": "FILE ...",
    "footnote": "TEXT",
    "init_from": "RUN",
    "b": "RUN",
    "link": "URL",
    "model": "MODEL",
    "model_options": "NAME=VALUE [NAME=VALUE ...]",
    "name": "NAME",
    "providers": "PROVIDER [PROVIDER ...]",
    "recipe": "RECIPE",
    "recipe_options": "NAME=VALUE [NAME=VALUE ...]",
    "results": "FOLDER",
    "run_folder": "RUN",
    "runs": "RUN ...",
    "seeds": "SEED SEED [SEED ...]",
    "shape": "SHAPE [SHAPE ...]",
    "teachers": "TEACHER [TEACHER]",
    "title": "TEXT",
    "url": "URL",
    "venue": "TEXT",
    "what": "EXPERIMENT",
}


def with_placeholders(command: Any) -> Any:
    """The options' class, with placeholders that say what a value is: ``--model MODEL``, not ``STR``."""
    annotated: Any = Annotated
    if command not in _with_placeholders:
        _with_placeholders.add(command)
        hints = get_type_hints(command, include_extras=True)
        for name in hints.keys() & _PLACEHOLDERS.keys():
            command.__annotations__[name] = annotated[hints[name], arg(metavar=_PLACEHOLDERS[name])]
    return command


_with_placeholders: set[Any] = set()


def parse_options(pairs: Sequence[str], flag: str) -> dict[str, Any]:
    """``("lr=0.05", "eps=8/255", "milestones=75,90", "flip=true")`` as a dict of Python values."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise ValueError(f"{flag} takes NAME=VALUE, got {pair!r}")
        options[name.replace("-", "_")] = _value(text)
    return options


def _value(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    if "," in text:
        return tuple(_value(part) for part in text.split(",") if part)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        try:
            return number(text)
        except ValueError:
            return text


# ── train ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True)
class Train:
    """Train a model by a recipe; all of it goes into a run folder.

    On several GPUs or machines: `torchrun --nproc_per_node 8 -m awnet.cli train …`; with --max-restarts=2 it
    goes on from the last checkpoint by itself. --batch-size counts the images of all GPUs together."""

    recipe: str = "mtard"
    """mtard (two teachers, the paper's), trades, pgd_at or standard (clean images only); by one cycle of the
    learning rate, so shorter: mtard_fast, trades_fast, pgd_at_fast, standard_fast and hat; for one network
    each: rdi, advmoe and separate."""
    model: Maybe[str] = None
    """A model's name, see `awnet info`; by default the recipe's own network, or awnet_tiny on digits and
    awnet_resnet18 elsewhere."""
    data: str = "digits"
    """digits (ships with scikit-learn), cifar10, cifar100 or tiny_imagenet."""
    data_dir: Maybe[Path] = None
    """The data set's published folder, or its parent; by default `data`."""
    out: Maybe[Path] = None
    """The run folder; by default runs/DATA-MODEL-RECIPE-SEED."""
    resume: bool = False
    """Go on with the run that is in the folder, if there is one. Ctrl-C saves a run."""
    overwrite: bool = False
    """Replace the run that is in the folder."""
    teachers: Maybe[tuple[Path, ...]] = None
    """The clean and the robust teacher (for hat the clean one alone): run folders or .safetensors files.
    Without them the recipe trains them first."""
    epochs: Maybe[int] = None
    """Passes over the training images; the learning rate's milestones move along. By default the recipe's."""
    batch_size: Maybe[int] = None
    """Images a step; by default the recipe's."""
    lr: Number = None
    """Learning rate of the network (the router has its own, router_lr); by default the recipe's."""
    attack_steps: Maybe[int] = None
    """Steps of the attack in training; by default the recipe's."""
    precision: Maybe[Literal["auto", "float32", "bfloat16"]] = None
    """Of convolutions and products; auto, the default, is bfloat16 on CUDA and float32 elsewhere. bfloat16 is
    faster on CPUs with AMX, see `awnet info`."""
    layout: Maybe[Literal["auto", "nchw", "channels_last"]] = None
    """Of images in memory; by default auto. channels_last goes with bfloat16."""
    recipe_options: Several[str] = ()
    """Other settings of the recipe as NAME=VALUE …, such as temperature=5 milestones=75,90."""
    model_options: Several[str] = ()
    """Settings of the model as NAME=VALUE …, such as bn=one."""
    limit: Maybe[int] = None
    """Train on at most so many of the training images, the classes in proportion."""
    init_from: Maybe[Path] = None
    """Start from the weights of this run, or of a .safetensors file; the model must be the same."""
    eps: Number = None
    """Size of the perturbation in image units; by default the data set's: 8/255, and 0.15 on digits."""
    select_on: Literal["validation", "test"] = "validation"
    """What chooses the best checkpoint: held-out training images, or the test images (the paper's protocol,
    which flatters the result; the report says so)."""
    data_memory: Literal["auto", "device", "host"] = "auto"
    """Where the training images lie: on the device, on the host, or on the device if it has room."""
    max_minutes: Number = None
    """Stop after so long, with a checkpoint."""
    checkpoint_minutes: float = 10.0
    """Time between checkpoints within an epoch; each epoch ends with one anyway."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on the disk; a damaged one is passed over."""
    seed: int = 0
    """Of the weights, the order, the augmentation, the attacks' noise and the held-out images."""
    device: Maybe[str] = None
    """cpu, cuda, cuda:1 …; by default the GPU where there is one."""

    @early_signals.noted()
    def run(self, console: Console) -> None:
        from awnet.distributed import is_first
        from awnet.training import recipe_for, train

        settings = parse_options(self.recipe_options, "--recipe-options")
        for name in ("epochs", "batch_size", "lr", "attack_steps", "precision", "layout"):
            value = getattr(self, name)
            if value is not None:
                if name in settings:
                    raise ValueError(f"{name} is given twice: by its own flag and in --recipe-options")
                settings[name] = value
        recipe = recipe_for(self.recipe, self.data, **settings)
        splits = _load(self.data, self.data_dir, self.seed, self.eps)
        if self.limit is not None:
            if self.limit < 1:
                raise ValueError(f"limit must be 1 or more images, got {self.limit}")
            splits = splits._replace(train=splits.train.subset(self.limit))
        name = self.model or recipe.network or ("awnet_tiny" if self.data == "digits" else "awnet_resnet18")
        out = self.out or Path("runs") / f"{self.data}-{name}-{self.recipe}-{self.seed}"
        options = parse_options(self.model_options, "--model-options")
        result = train(
            recipe,
            _model(name, options, splits, self.seed) if options else name,
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
            _say(console, f"next: awnet evaluate {result.folder}")


# ── evaluate, attack ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True)
class _OnRun:
    run_folder: Positional[Path]
    """A run folder, or a .safetensors file."""
    checkpoint: Literal["best", "last"] = "best"
    """Of a run folder: the weights that were best on held-out images, or the last ones."""
    data: Maybe[str] = None
    """The data set; by default the one that the run was trained on."""
    data_dir: Maybe[Path] = None
    """The data set's published folder, or its parent; by default where the run found it."""
    split: Literal["test", "validation", "train"] = "test"
    """Which images."""
    limit: Maybe[int] = None
    """At most so many images, the classes in proportion."""
    eps: Number = None
    """Size of the perturbation in image units; by default the one that the run was trained with."""
    batch_size: int = 256
    """Images a forward pass."""
    seed: int = 0
    """Of the attacks' random starts."""
    device: Maybe[str] = None
    """cpu, cuda, cuda:1 …; by default the GPU where there is one."""

    @property
    def folder(self) -> Path:
        return self.run_folder.parent if self.run_folder.suffix == ".safetensors" else self.run_folder

    @property
    def weights(self) -> Path:
        """What ``load_model`` reads: the path that was given, or the run's last checkpoint."""
        last = self.run_folder == self.folder and self.checkpoint == "last"
        return self.folder / "last.safetensors" if last else self.run_folder

    def config(self) -> dict[str, Any]:
        """The run's config.json, checked; empty for a .safetensors file that is in no run folder."""
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
        """The data set of the run, which the command line can load."""
        from awnet.data import list_datasets

        if not config:
            raise ValueError(
                f"{self.run_folder} is in no run folder, which would name its data set: give --data"
            )
        name: str = config["dataset"]["name"]
        if name not in list_datasets():
            raise ValueError(
                f"{self.folder} was trained on {name!r}, arrays that only a Python program has. Use it "
                f"there: awnet.evaluate(awnet.load_model({str(self.weights)!r}), dataset, "
                f"out={str(self.folder)!r}). Or give --data with one of {', '.join(list_datasets())}"
            )
        return name

    def example(self, console: Console) -> tuple[nn.Module, Tensor]:
        """The model and two images of its size [2, C, H, W]: zeros where the run's data cannot be loaded."""
        import torch

        from awnet.data import list_datasets
        from awnet.models import load_model

        device, config = resolve_device(self.device), self.config()
        sizes = config.get("input")
        if self.data is not None or sizes is None or config["dataset"]["name"] in list_datasets():
            model, dataset = self.load(console, device)
            return model, next(dataset.to(device).batches(2)).x
        return load_model(self.weights).to(device), torch.zeros(2, *sizes, device=device)

    def load(self, console: Console, device: Device | None = None) -> tuple[nn.Module, Dataset]:
        """The model on ``device``, by default the one that was asked for, and the images."""
        from awnet.evaluation.table import in_one_line
        from awnet.models import load_model

        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be 1 or more images, got {self.limit}")
        config = self.config()
        recorded = config.get("dataset", {})
        name, data_dir, eps = self.data, self.data_dir, self.eps
        if name is None:
            name = self._recorded_name(config)
        ours = name == recorded.get("name")
        if ours and data_dir is None and Path(recorded["source"]).is_dir():
            data_dir = Path(recorded["source"])
        if ours and eps is None:
            eps = recorded["eps"]
        model = load_model(self.weights).to(device or resolve_device(self.device))
        # the run's own seed, so that its validation images are those that it did not train on
        dataset: Dataset = getattr(_load(name, data_dir, config.get("seed", 0), eps), self.split)
        if ours and dataset.fingerprint() != recorded["fingerprints"][self.split]:
            _say(console, f"note: these {self.split} images are not the ones that the run was made with")
        count = len(dataset) if self.limit is None else min(self.limit, len(dataset))
        recipe = config.get("recipe", {}).get("name")
        _say(
            console,
            in_one_line(
                model,
                f"{count:,} {self.split} images of {dataset.name}",
                dataset.threat_model.eps,
                trained=f"trained by {recipe}" if recipe else None,
            ),
        )
        return model, dataset


@dataclass(kw_only=True)
class Evaluate(_OnRun):
    """Judge a trained model, clean and attacked: table, report and figures.

    On several GPUs or machines: `torchrun --nproc_per_node 8 -m awnet.cli evaluate …`; each takes whole
    batches, so that the figures are those of one."""

    attacks: tuple[str, ...] = ("fgsm", "pgd_sat", "pgd_trades", "cw")
    """Attacks by name, see `awnet info`. aa is AutoAttack, union the worst case over all of them and more."""
    budget: Literal["smoke", "short", "standard"] = "standard"
    """What attacks beyond the first four may spend; smoke shows that they run, in seconds, and no more; short
    is for small networks on a CPU, and what it leaves robust the standard budget may break."""
    queries: Maybe[int] = None
    """Of Square, within aa and union; by default the budget's, 5000 at the standard one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 may be faster and is for trying things out: its report says that no figure is a headline."""
    name: str = "default"
    """Of the evaluation: it is written into RUN/evaluations/NAME."""
    compare_with: Several[Path] = ()
    """Other runs, evaluated under the same name: paired differences are added."""
    teachers: Maybe[tuple[Path, ...]] = None
    """Of a run that learnt from teachers, where these are now, in the order clean, robust; by default where
    the run's record says. Their weights must be the recorded ones."""
    allow_missing: bool = False
    """Leave out what needs a teacher that is missing, and flag the report's headline as incomplete."""

    def run(self, console: Console) -> None:
        from awnet.distributed import joined

        # a rank whose batches are done waits for the others', which may take hours
        with joined(resolve_device(self.device), timeout=timedelta(days=30)) as ranks:
            console.quiet = console.quiet or ranks.rank > 0
            self._judge(console, ranks)

    def _judge(self, console: Console, ranks: Ranks) -> None:
        from awnet.evaluation import Report, comparison_table, evaluate

        for run in self.compare_with:
            if not run.is_dir():
                raise FileNotFoundError(f"compare-with takes run folders; {run} is none")
        others = {str(run): Report.load(run / "evaluations" / self.name) for run in self.compare_with}
        model, dataset = self.load(console, ranks.device)
        last = self.run_folder == self.folder and self.checkpoint == "last"
        report = evaluate(
            model,
            dataset,
            self.attacks,
            batch_size=self.batch_size,
            seed=self.seed,
            limit=self.limit,
            budget=self.budget,
            queries=self.queries,
            precision=self.precision,
            teachers=self.teachers,
            allow_missing=self.allow_missing,
            progress=not console.quiet,
            out=self.folder,
            name=self.name,
            compared_with=others,
            selected_on="nothing: the last checkpoint" if last else None,
            ranks=ranks,
        )
        console.print(report.table())
        if others:
            console.print(comparison_table(report))
        for kind, use in report.exits.items():
            share = use["mean_flops"] / use["full_flops"]
            _say(
                console,
                f"{kind}: mean exit {use['mean_exit']:.2f}, {100 * share:.0f} % of the full network's FLOPs",
            )
        for line in report.sanity:
            _say(console, f"{line['result']}: {line['check']} ({line['evidence']})")
        if report.router_auc:
            found = ", ".join(f"{kind} {auc:.3f}" for kind, auc in report.router_auc.items())
            _say(console, f"router's AUC, clean images against: {found}")
        for flag in report.flags:
            _say(console, f"note: {flag}")
        _say(console, f"written to {self.folder / 'evaluations' / self.name}")


@dataclass(kw_only=True)
class Attack(_OnRun):
    """Make adversarial images against a model and save them."""

    attack: str = "pgd_sat"
    """The attack's name, see `awnet info`."""
    out: Path
    """The .npz file to write: x_adv (float32 [N, C, H, W] in [0, 1]), y, index (each image's place in the
    published order), prediction, and provenance, a JSON text of what made them."""
    overwrite: bool = False
    """Replace the file if it exists."""

    def run(self, console: Console) -> None:
        import numpy as np
        import torch

        from awnet.attacks import Suite, named_attack
        from awnet.attacks.saved import digest
        from awnet.files import written_atomically
        from awnet.models.registry import config_of
        from awnet.precision import computed_in, full_precision

        if self.out.exists() and not self.overwrite:
            raise FileExistsError(f"{self.out} exists: choose another file, or replace it by --overwrite")
        model, dataset = self.load(console)
        if self.limit is not None:
            dataset = dataset.subset(self.limit)
        suite = Suite(classes=dataset.num_classes)
        attack = named_attack(self.attack, model, dataset.threat_model, seed=self.seed, suite=suite)
        dataset = dataset.to(resolve_device(self.device))
        made, predicted = [], []
        with full_precision():
            dtype = computed_in(model, next(dataset.batches(1)).x)
            for x, y, index in dataset.batches(self.batch_size):
                x_adv = attack(x, y, index=index)
                with torch.no_grad():
                    predicted.append(model(x_adv).argmax(1).cpu())
                made.append(x_adv.cpu())
        labels, prediction = dataset.labels.cpu(), torch.cat(predicted)
        provenance = {
            "model": str(self.run_folder),
            "model_config": config_of(model),
            "dataset": dataset.name,
            "split": dataset.split,
            "source": dataset.source,
            "fingerprint": dataset.fingerprint(),
            "attack": self.attack,
            "settings": attack.settings,
            "precision": str(dtype).removeprefix("torch."),
            "content": digest(torch.cat(made), labels, dataset.index.cpu()),
            "seed": self.seed,
            "awnet": __version__,
            "torch": torch.__version__,
        }
        with written_atomically(self.out) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                x_adv=torch.cat(made).numpy(),
                y=labels.numpy(),
                index=dataset.index.cpu().numpy(),
                prediction=prediction.numpy(),
                provenance=np.array(json.dumps(provenance)),
            )
        accuracy = (prediction == labels).double().mean().item()
        _say(
            console,
            f"{len(labels)} images of {dataset.name} {dataset.split}, {self.attack}, "
            f"eps {dataset.threat_model.eps:.4g}: {100 * accuracy:.1f} % still classified correctly",
        )
        _say(console, f"written to {self.out}")


@dataclass(kw_only=True)
class Compare:
    """Compare two runs: settings, training curves and evaluations, paired by image where both have the
    same images.

    For accuracies under attack, evaluate both runs with the same attacks first."""

    a: Positional[Path]
    """A run folder."""
    b: Positional[Path]
    """Another one. Differences are a minus b."""
    name: str = "default"
    """Of the evaluation in each run."""
    out: Maybe[Path] = None
    """The PNG file for the training curves; by default comparison.png in the current folder."""

    def run(self, console: Console) -> None:
        from awnet.reproduce.comparison import compare_runs

        found = compare_runs(self.a, self.b, name=self.name, out=self.out or Path("comparison.png"))
        for part in found.tables():
            console.print(part)
        for line in found.notes:
            _say(console, line)


# ── reproduce, analyse, export, bench, data, info ─────────────────────────────────────────────────────────


@dataclass(kw_only=True)
class Reproduce:
    """Run a whole experiment: train, attack, compare, print the table."""

    what: Positional[str]
    """digits: AW-Net and two static twins on scikit-learn's digits, a few minutes on two CPU cores. table1 …
    table11, fig1, fig3, fig4, fig5: the paper's, beside its own figures. weight_gap: its Section 3.2.
    systems: small dynamic networks of several kinds at equal training cost."""
    data: Maybe[str] = None
    """Of table3: digits, for the ablation on digits in place of CIFAR-10."""
    budget: Literal["smoke", "cpu", "gpu-30min", "paper"] = "smoke"
    """Of a table or figure: how much is run. smoke shows in a minute that the command works, on generated
    images where there are no others; cpu takes hours, gpu-30min half an hour a network; paper is the
    paper's."""
    out: Maybe[Path] = None
    """The folder; by default runs/digits, and runs/paper for tables and figures, which share networks."""
    data_dir: Maybe[Path] = None
    """Of a table or figure: the data sets' folder; by default `data`."""
    resume: bool = False
    """Go on with what is in the folder, if anything is; Ctrl-C saves. Tables and figures always do."""
    overwrite: bool = False
    """Replace what is in the folder (digits only)."""
    seed: int = 0
    """Of everything: weights, order, augmentation, attacks, held-out images."""
    seeds: Several[int] = ()
    """Run digits with each of these seeds, in place of the one above, and compare over trainings; by default
    in runs/digits-seeds."""
    device: Maybe[str] = None
    """cpu, cuda, cuda:1 …; by default the GPU where there is one."""

    def run(self, console: Console) -> None:
        from awnet.reproduce import reproduce, run_digits, run_digits_seeds

        if self.data is not None and self.what == "digits":
            raise ValueError("data is for table3; digits has data of its own")
        if self.what == "digits":
            flags: Any = {"resume": self.resume, "overwrite": self.overwrite, "device": self.device}
            if self.seeds:
                run_digits_seeds(self.out or Path("runs/digits-seeds"), self.seeds, **flags)
            else:
                run_digits(self.out or Path("runs/digits"), seed=self.seed, **flags)
            return
        if self.seeds:
            raise ValueError(f"seeds is for digits; run {self.what} with one seed after another")
        if self.overwrite:
            raise ValueError("overwrite is for digits: a table's networks are shared, so choose another out")
        reproduce(
            self.what if self.data is None else f"{self.what}-{self.data}",
            self.budget,
            out=self.out or Path("runs/paper"),
            data_dir=self.data_dir,
            seed=self.seed,
            device=self.device,
        )


@dataclass(kw_only=True)
class _OnRuns:
    runs: Positional[tuple[Path, ...]]
    """Run folders, or .safetensors files."""
    out: Path = Path("runs/analysis")
    """Folder of the figure and of the data behind it."""
    data: Maybe[str] = None
    """The data set; by default the one that the first run was trained on."""
    data_dir: Maybe[Path] = None
    """The data set's published folder, or its parent; by default where the run found it."""
    device: Maybe[str] = None
    """cpu, cuda, cuda:1 …; by default the GPU where there is one."""

    def load(self, console: Console) -> dict[str, tuple[nn.Module, Dataset]]:
        """Each model with its images, under what sets its path apart from the others'."""
        if not self.runs:
            raise ValueError("runs must name at least one run folder or .safetensors file")
        found = {}
        for path, label in zip(self.runs, _labels(self.runs), strict=True):
            one = _OnRun(run_folder=path, data=self.data, data_dir=self.data_dir, device=self.device)
            model, images = one.load(console)
            found[label] = model, images.to(resolve_device(self.device))
        return found


def _labels(paths: Sequence[Path]) -> list[str]:
    """The paths without the folders that all have in common."""
    whole = [path.resolve() for path in paths]
    common = Path(os.path.commonpath(whole))
    return [path.name if path == common else str(path.relative_to(common)) for path in whole]


@dataclass(kw_only=True)
class AnalyseFilters(_OnRuns):
    """Distributions of the filters' mean weights of any checkpoints, those alike in one panel (Fig. 1 and 3);
    and of AW-Nets' effective filters, as the router scales them for clean and for adversarial images."""

    layers: int = 2
    """How many convolutions of each network are drawn, from the first."""
    images: int = 128
    """How many test images the router's scales are averaged over."""
    attack: str = "pgd_sat"
    """What makes the adversarial ones, see `awnet info`."""

    def run(self, console: Console) -> None:
        from awnet.reproduce.analyses import alike, compare_filters, effective_filters

        if self.layers < 1:
            raise ValueError(f"layers must be 1 or more, got {self.layers}")
        found = self.load(console)
        groups = alike({label: model for label, (model, _) in found.items()})
        written = compare_filters(groups, self.out, layers=self.layers)
        subsets = {label: (model, images.subset(self.images)) for label, (model, images) in found.items()}
        written += effective_filters(subsets, self.out, attack=self.attack, layers=self.layers)
        for path in written:
            _say(console, str(path))


@dataclass(kw_only=True)
class AnalyseWeightGap(_OnRuns):
    """Section 3.2: one step of adversarial against plain training, measured and by Eq. 8."""

    images: int = 128
    """How many images the expectation is taken over."""

    def run(self, console: Console) -> None:
        from awnet.reproduce.analyses import measure_weight_gap

        found = self.load(console)
        for number, (run, (model, dataset)) in enumerate(found.items(), start=1):
            batch = next(dataset.subset(self.images).batches(self.images))
            folder = self.out if len(found) == 1 else self.out / str(number)
            _say(console, run)
            for path in measure_weight_gap(model, batch.x, batch.y, dataset.threat_model.eps, folder):
                _say(console, f"  {path}")


@dataclass
class Analyse:
    """Draw what is in trained networks."""

    command: (
        Annotated[AnalyseFilters, subcommand("filters")]
        | Annotated[AnalyseWeightGap, subcommand("weight-gap")]
    )

    def run(self, console: Console) -> None:
        self.command.run(console)


@dataclass(kw_only=True)
class ExportRobustBench(_OnRun):
    """Write a model as RobustBench takes it: rules checked, weights, model_info and a zoo entry."""

    name: str
    """Of the entry, in RobustBench's style, such as Wei2024Revisiting."""
    out: Path = Path("robustbench")
    """The folder to write to."""
    evaluation: str = "default"
    """Of the run: the evaluation whose figures are written; without `aa` among its attacks the accuracy under
    AutoAttack stays empty."""
    title: Maybe[str] = None
    """Of the publication; by default the paper's, as for the next three."""
    authors: Maybe[str] = None
    link: Maybe[str] = None
    venue: Maybe[str] = None
    additional_data: bool = False
    """The model was trained on more than the data set's training images."""
    footnote: Maybe[str] = None
    """What readers of the table should know."""

    def run(self, console: Console) -> None:
        from awnet.evaluation import Report
        from awnet.evaluation.robustbench import Entry, export_robustbench

        model, dataset = self.load(console)
        place = self.folder / "evaluations" / self.evaluation
        report = None
        try:
            report = Report.load(place)
        except FileNotFoundError:
            _say(console, f"note: {place} holds no report, so the entry has no accuracies")
        if report is not None and "aa" not in report.attacks:
            _say(console, f"note: {place} did not measure AutoAttack: autoattack_acc stays empty")
        given = {n: getattr(self, n) for n in ("title", "authors", "link", "venue", "footnote")}
        entry = Entry(
            self.name, additional_data=self.additional_data, **{k: v for k, v in given.items() if v}
        )
        dataset = dataset.to(resolve_device(self.device))
        for path in export_robustbench(model, dataset, report, self.out, entry):
            _say(console, str(path))


@dataclass(kw_only=True)
class ExportProgram(_OnRun):
    """Write a model as a program of torch.export, for any batch size, in test mode."""

    out: Path
    """The .pt2 file to write; torch.export.load reads it."""
    standalone: bool = False
    """Of torch's own operators alone, by the paper's literal equations: slower, but it runs without awnet.
    Else `import awnet.ops` must come before the program is loaded."""
    overwrite: bool = False
    """Replace the file if it exists."""

    def run(self, console: Console) -> None:
        import torch

        from awnet.files import written_atomically
        from awnet.ops import use_backend

        if self.out.exists() and not self.overwrite:
            raise FileExistsError(f"{self.out} exists: choose another file, or replace it by --overwrite")
        model, x = self.example(console)
        batch = torch.export.Dim("batch", min=1, max=2**16)
        with use_backend("reference") if self.standalone else nullcontext():
            try:
                program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: batch},))
            except Exception as error:  # of many kinds, torch's own
                found = " ".join(str(error).partition("\n\n")[0].split())[:300]
                raise ValueError(
                    f"torch.export cannot export {self.weights} for any batch size ({found}): in the model's "
                    "forward, use x.shape[0] in place of len(x), and no Python number that follows from x"
                ) from error
        with written_atomically(self.out) as temporary, temporary.open("wb") as file:
            torch.export.save(program, file)
        _say(console, str(self.out))


@dataclass
class Export:
    """Write models in the form that others take."""

    command: (
        Annotated[ExportRobustBench, subcommand("robustbench")]
        | Annotated[ExportProgram, subcommand("program")]
    )

    def run(self, console: Console) -> None:
        self.command.run(console)


@dataclass(kw_only=True)
class Download:
    """Fetch a published data set, check it and unpack it; goes on where it was interrupted."""

    name: Positional[str]
    """cifar10, cifar100 or tiny_imagenet."""
    data_dir: Path = Path("data")
    """Where its folder goes; one that is there already is left alone."""
    url: Maybe[str] = None
    """A mirror; the publisher's checksum holds for it too."""

    def run(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        from awnet.data import download

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=None)
            folder = download(
                self.name,
                self.data_dir,
                url=self.url,
                progress=lambda have, total: bar.update(task, completed=have, total=total),
            )
        _say(console, str(folder))


@dataclass(kw_only=True)
class DataInfo:
    """Print a data set's splits, classes, threat model and fingerprints."""

    prints_its_result: ClassVar[bool] = True

    name: Positional[str]
    """digits, cifar10, cifar100 or tiny_imagenet."""
    data_dir: Maybe[Path] = None
    """The published folder, or its parent; by default `data`."""
    seed: int = 0
    """Which training images are held out for validation."""

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
        eps = train.threat_model.eps
        shown = ", ".join(train.classes[:10]) + (", …" if train.num_classes > 10 else "")
        for what, value in {
            "images": f"{train.in_channels}×{height}×{width}, values 0 to {train.max_value}",
            "classes": f"{train.num_classes}: {shown}",
            "threat model": f"L-infinity, eps {eps:.4g} ({eps * train.max_value:.4g}/{train.max_value})",
            "augmentation": f"shift by up to ±{train.augmentation.shift} pixels"
            + (", flip left to right" if train.augmentation.flip else ", no flip"),
            "source": train.source,
        }.items():
            _say(console, f"{what + ':':14}{value}")


@dataclass
class Bench:
    """Measure this machine, and read what was measured."""


@dataclass
class Data:
    """Download data sets, and look at them."""

    command: Annotated[Download, subcommand("download")] | Annotated[DataInfo, subcommand("info")]

    def run(self, console: Console) -> None:
        self.command.run(console)


@dataclass(kw_only=True)
class Info:
    """Print what is here: versions, devices, backends, models, data sets, attacks, recipes."""

    prints_its_result: ClassVar[bool] = True

    json: bool = False
    """As JSON, for programs."""

    def run(self, console: Console) -> None:
        from awnet.info import collect, render

        found = collect()
        if self.json:
            print(json.dumps(found, indent=2))
        else:
            console.print(render(found))


# ── the parts that several commands need ──────────────────────────────────────────────────────────────────


def _say(console: Console, text: str) -> None:
    console.print(visible(text), markup=False, soft_wrap=True)


def expand_paths(options: T) -> T:
    """A copy of a command's options with ``~`` expanded in every path, also in tuples and subcommands."""
    if isinstance(options, Path):
        return expanded(options)  # type: ignore[return-value]
    if isinstance(options, tuple):
        return tuple(map(expand_paths, options))  # type: ignore[return-value]
    if is_dataclass(options) and not isinstance(options, type):
        values = {field.name: getattr(options, field.name) for field in fields(options) if field.init}
        return replace(options, **{name: expand_paths(value) for name, value in values.items()})
    return options


def _load(name: str, data_dir: Path | None, seed: int, eps: float | None) -> Splits:
    from awnet.data import Splits, ThreatModel, load_dataset

    splits = load_dataset(name, data_dir, seed=seed)
    if eps is None:
        return splits
    return Splits(*(replace(part, threat_model=ThreatModel(eps)) for part in splits))


def _model(name: str, options: dict[str, Any], splits: Splits, seed: int) -> nn.Module:
    from awnet.models.registry import create_seeded_model

    train = splits.train
    return create_seeded_model(
        name, seed, num_classes=train.num_classes, in_channels=train.in_channels, **options
    )


def resolve_device(name: str | None) -> Device:
    from awnet.devices import resolve_device as resolve  # which loads torch

    return resolve(name)


# action → its module in awnet.benchmarks, the class of its options, its function, and what it does
_BENCH = {
    "run": (
        "runner",
        "BenchOptions",
        "run",
        "Measure layers, a block and a network here: each implementation is verified, then timed.",
    ),
    "verify": (
        "goals",
        "VerifyOptions",
        "verify",
        "Read what was measured and print each goal as met, not met or not measured.",
    ),
    "plot": ("report", "PlotOptions", "plot", "Draw what was measured: bars, roofline, batches."),
    "table": ("report", "TableOptions", "tables", "Write tables of what was measured into documents."),
    "tune": (
        "tune",
        "TuneOptions",
        "tune",
        "Search launch parameters of the Triton passes on this GPU, and keep them in its table.",
    ),
    "train": (
        "train",
        "TrainBenchOptions",
        "bench_train",
        "Measure a recipe's training step: ours against the same step in plain torch.",
    ),
}


def _bench(words: Sequence[str]) -> Any:
    """`bench` and its actions; only the one that ``words`` name is loaded, which takes torch and a second."""
    actions: list[Any] = []
    for name, (module_name, options_name, function, about) in _BENCH.items():
        namespace: dict[str, Any] = {"__doc__": about}
        bases: tuple[type, ...] = ()
        if words[:1] == [name]:
            module = importlib.import_module(f"awnet.benchmarks.{module_name}")
            bases = (getattr(module, options_name),)
            namespace["run"] = _bench_run(getattr(module, function))
        action = make_dataclass(name, [], bases=bases, namespace=namespace, kw_only=True, frozen=True)
        action = with_placeholders(action)
        actions.append(_named(action, name))
    return make_dataclass(
        "Bench",
        [("command", reduce(or_, actions))],
        namespace={"__doc__": Bench.__doc__, "run": lambda self, console: self.command.run(console)},
    )


def _bench_run(function: Any) -> Any:
    def run(self: Any, console: Console) -> int | None:
        status = function(self)
        return status if isinstance(status, int) else None

    return run


CONFIG = (DisallowNone, FlagCreatePairsOff, OmitArgPrefixes)
# commands with actions of their own: the class of each
_ACTIONS = {
    "analyse": {"filters": AnalyseFilters, "weight-gap": AnalyseWeightGap},
    "export": {"robustbench": ExportRobustBench, "program": ExportProgram},
    "data": {"download": Download, "info": DataInfo},
}


def command_named(words: Sequence[str]) -> Any:
    """The class of options of a command, such as ``["train"]`` or ``["bench", "run"]``."""
    first, *rest = words
    if first == "bench":
        module_name, options_name, _, about = _BENCH[rest[0]]
        options = getattr(importlib.import_module(f"awnet.benchmarks.{module_name}"), options_name)
        namespace = {"__doc__": about}
        return with_placeholders(
            make_dataclass(rest[0], [], bases=(options,), namespace=namespace, kw_only=True, frozen=True)
        )
    return with_placeholders(_ACTIONS[first][rest[0]] if rest else _COMMANDS[first])


def _named(command: Any, name: str) -> Any:
    annotated: Any = Annotated
    return annotated[command, subcommand(name)]


def _commands(words: Sequence[str]) -> Any:
    """The union of commands that tyro parses ``words`` as."""
    commands = {**_COMMANDS, "bench": _bench(words[1:]) if words[:1] == ["bench"] else Bench}
    for command in (*_COMMANDS.values(), *(c for actions in _ACTIONS.values() for c in actions.values())):
        with_placeholders(command)
    return reduce(or_, (_named(command, name) for name, command in commands.items()))


def _belongs_elsewhere(words: Sequence[str]) -> str | None:
    """What to write in place of an unknown flag of train that is a setting of the recipe or the model."""
    known = {field.name for field in fields(Train)} | {"help"}
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name in known:
            continue
        from awnet.models.registry import model_options
        from awnet.training.recipes import RECIPES

        for owner, settings in {
            "recipe": {field.name for kind in RECIPES.values() for field in fields(kind)},
            "model": model_options(),
        }.items():
            if name in settings:
                flag = f"--{name.replace('_', '-')}"
                return f"{flag} is a setting of the {owner}: give --{owner}-options {name}=VALUE"
    return None


_COMMANDS: dict[str, Any] = {
    "train": Train,
    "evaluate": Evaluate,
    "attack": Attack,
    "compare": Compare,
    "reproduce": Reproduce,
    "analyse": Analyse,
    "bench": Bench,
    "data": Data,
    "export": Export,
    "info": Info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status: 0 or its own, 2 after an error, 130 after Ctrl-C.

    Output that cannot be written ends no command; only one whose text is its result (help, info, data info)
    then returns 2, unless the reader of a pipe has ended.
    """
    with safe_output() as out:
        try:
            return _main(arguments, out)
        finally:
            out.flush()
            if out.error is not None and not out.note and not isinstance(out.error, BrokenPipeError):
                print(f"awnet: error: standard output could not be written ({out.error})", file=sys.stderr)
                sys.exit(2)


def _main(arguments: Sequence[str] | None, out: SafeStream) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--traceback" in words or os.environ.get("AWNET_DEBUG", "") not in ("", "0")
    words = [word for word in words if word != "--traceback"] or ["--help"]
    out.note = False  # tyro's help is a result
    if words[0] == "train" and (hint := _belongs_elsewhere(words)):
        print(f"awnet: error: {hint}", file=sys.stderr)
        return 2

    if words == ["--version"]:
        print(f"awnet {__version__}")
        return 0
    command: Any = tyro.cli(
        _commands(words),
        prog="awnet",
        description=DESCRIPTION,
        args=words,
        config=CONFIG,
    )
    from rich.console import Console

    out.note = not getattr(getattr(command, "command", command), "prints_its_result", False)
    try:
        status: int | None = expand_paths(command).run(Console(highlight=False))
    except EXPECTED as error:
        if debug:
            traceback.print_exc()
        print(f"awnet: error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("awnet: interrupted", file=sys.stderr)
        return 130
    return status or 0


if __name__ == "__main__":
    sys.exit(main())

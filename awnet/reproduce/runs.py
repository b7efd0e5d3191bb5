"""Trains and evaluates the networks of the paper's tables, each once per folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from awnet.attacks import Attack
from awnet.data import Dataset, Splits, ThreatModel, load_dataset, with_extra
from awnet.devices import resolve_device
from awnet.evaluation import Report, evaluate
from awnet.files import written_atomically
from awnet.models.registry import create_seeded_model
from awnet.models.separate import SeparateNet
from awnet.models.sources import load_model
from awnet.reproduce.experiments import Budget, System
from awnet.reproduce.synthetic import synthetic_splits
from awnet.run_config import read_config
from awnet.run_folder import RunFolder
from awnet.text import visible
from awnet.training import Recipe, list_recipes, recipe_for, train
from awnet.training.cost import cost_settings, multiply_adds
from awnet.training.logging import read_log

_TEACHERS = {
    "clean": System("clean teacher", "resnet18", "standard"),
    "robust": System("robust teacher", "resnet18", "trades"),
}
_DIGITS_TEACHERS = {  # those of run_digits
    "clean": System("clean teacher", "resnet_tiny", "standard"),
    "robust": System("robust teacher", "resnet_tiny", "pgd_at"),
}
SURROGATE = System("WideResNet-70-16", "wrn70_16", "trades")


@dataclass(frozen=True)
class Training:
    """How a network of a table was trained."""

    label: str
    dataset: str
    network: str
    parameters: int
    recipe: str
    epochs: int
    multiply_adds: int | None
    """Of the whole training; None if they were not counted."""
    seconds: float | None
    """Wall-clock time, which includes other work of the machine; None without a log."""


class Runs:
    """The runs under one folder, shared by all experiments of one budget and seed.

    ``out/runs/<budget>/<data set>-<model>-<recipe>…`` are run folders. A finished run is only loaded, an
    interrupted one is resumed.
    """

    def __init__(
        self,
        place: RunFolder,
        budget_name: str,
        budget: Budget,
        *,
        data_dir: Path | None,
        seed: int,
        device: str | torch.device | None,
        console: Console,
        teachers: Mapping[str, System] | None = None,
        networks: Mapping[str, Path] | None = None,
    ) -> None:
        self.networks = dict(networks or {})
        """Run folders of networks that were trained elsewhere, by the label of their system."""
        self.place, self.budget_name, self.budget = place, budget_name, budget
        self.data_dir, self.seed, self.device, self.console = data_dir, seed, device, console
        self._teachers = teachers
        self.skipped: dict[str, str] = {}
        """Systems that cannot be built here, with the reasons."""
        self.trainings: list[Training] = []
        """In the order of training, teachers before their students."""
        self.attack_settings: list[str] = []
        self.differences: list[str] = []
        """Differences paired by image, as text."""
        self.flags: list[str] = []
        """Flags of the reports."""
        self._costs: dict[str, int] = {}  # label → multiply-adds of training, where they were counted
        self._splits: dict[str, Splits] = {}
        # training images before the limit, until they have pseudo-labels
        self._whole: dict[str, Dataset] = {}

    def splits(self, name: str) -> Splits:
        """The data set, limited by the budget.

        Raises:
            FileNotFoundError: the folder is missing and the budget does not allow generated images.
        """
        if name not in self._splits:
            budget = self.budget
            limits = (budget.train_limit, budget.validation_limit, budget.test_limit)
            whole = self._read(name)
            self._whole[name] = whole.train
            parts = (_cut(part, n) for part, n in zip(whole, limits, strict=True))
            self._splits[name] = Splits(*(averaged_down(part, budget.shrink) for part in parts))
        return self._splits[name]

    def _read(self, name: str) -> Splits:
        """The data set without the budget's limits."""
        try:
            return load_dataset(name, self.data_dir, seed=self.seed)
        except FileNotFoundError as error:
            if not self.budget.synthetic:
                raise FileNotFoundError(
                    f"{error} (only --budget smoke runs without the images, on generated ones)"
                ) from error
            self.say(f"{name} is missing: generated images are used instead, so the results have no meaning")
            return synthetic_splits(name)  # the same images for every seed, as of a real data set

    def run_folder(self, system: System, dataset: str) -> Path:
        if system.label in self.networks:
            return self.networks[system.label]
        settings = {**system.options, **{f"recipe-{k}": v for k, v in system.settings.items()}}
        if system.eps_scale != 1:
            settings["eps-scale"] = system.eps_scale
        if system.extra_fraction:
            settings["extra-fraction"] = system.extra_fraction
        words = [
            f"{key}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}"
            for key, value in sorted(settings.items())
        ]
        recipe = self._recipe_name(system.recipe)
        name = "-".join([dataset, system.model, recipe, *words, f"seed{self.seed}"])
        return self.place.path / "runs" / self.budget_name / name

    def results(self, experiment: str) -> Path:
        """The folder of an experiment's tables and figures."""
        folder = self.place.path / f"{experiment}-{self.budget_name}"
        folder.mkdir(exist_ok=True)
        return folder

    def recipe(self, system: System, dataset: str) -> Recipe:
        """How the system is trained under this budget."""
        settings: dict[str, Any] = {**self.budget.settings, **system.settings}
        if self.budget.epochs is not None:
            settings.setdefault("epochs", self.budget.epochs)
        return recipe_for(self._recipe_name(system.recipe), dataset, **settings)

    def at_equal_cost(self, systems: Sequence[System], dataset: str) -> tuple[System, ...]:
        """The systems with numbers of epochs such that training each costs about as much as the first."""
        train = self.splits(dataset).train
        adjusted: list[System] = []
        counted: dict[tuple[str, Recipe], int] = {}
        total = 0
        for system in systems:
            recipe = self.recipe(system, dataset)
            key = _described(system.model, self._options(system)), cost_settings(recipe)
            if key not in counted:
                teachers = [self.build_network(one, train) for one in self.teachers(recipe, dataset)]
                counted[key] = multiply_adds(recipe, self.build_network(system, train), train, teachers)
            cost = counted[key]
            total = total or cost * recipe.epochs
            epochs = max(1, round(total / cost))
            adjusted.append(replace(system, settings={**system.settings, "epochs": epochs}))
            self._costs[system.label] = epochs * cost * len(train)
            self.say(
                f"{system.label}: {cost / 1e6:.3g}·10⁶ multiply-adds per image, so {epochs} epochs of "
                f"{len(train)} images, {self._costs[system.label] / 1e12:.3g}·10¹² in total"
            )
        return tuple(adjusted)

    def teachers(self, recipe: Recipe, dataset: str) -> list[System]:
        """The teachers that ``recipe`` needs, in its order."""
        return [self._teachers_of(dataset)[kind] for kind in recipe.teachers]

    def _teachers_of(self, dataset: str) -> Mapping[str, System]:
        if self._teachers is not None:
            return self._teachers
        return _DIGITS_TEACHERS if dataset == "digits" else _TEACHERS

    def pseudo_labeled(self, dataset: str) -> Path:
        """A file of the training images that the budget leaves out, labeled by the clean teacher."""
        path = self.place.path / "runs" / self.budget_name / f"{dataset}-pseudo-labels-seed{self.seed}.npz"
        if path.is_file():
            self._whole.pop(dataset, None)
            return path
        train = self.splits(dataset).train
        whole = self._whole.pop(dataset, None) or self._read(dataset).train
        model = self.trained(self._teachers_of(dataset)["clean"], dataset).eval()
        rest = whole.take((~torch.isin(whole.index, train.index)).nonzero()[:, 0])
        rest = averaged_down(rest, self.budget.shrink)
        device = resolve_device(self.device)
        with torch.inference_mode():
            labels = [model(batch.x).argmax(1).cpu() for batch in rest.batches(256, device=device)]
        images = rest.images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
        correct = (torch.cat(labels) == rest.labels.cpu()).float().mean()
        self.say(f"{len(rest):,} pseudo-labels of {dataset}, {100 * correct:.1f} % correct, in {path}")
        with written_atomically(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, image=images, label=torch.cat(labels).numpy())
        return path

    def trained(self, system: System, dataset: str) -> nn.Module:
        """The network of a system at its best checkpoint; its teachers are trained first and shared."""
        if system.label in self.networks:
            return self._given(system, dataset)
        splits = self.splits(dataset)
        if system.eps_scale != 1:
            threat = ThreatModel(splits.train.threat_model.eps * system.eps_scale)
            splits = Splits(*(replace(part, threat_model=threat) for part in splits))
        if system.extra_fraction:
            extra = with_extra(splits.train, self.pseudo_labeled(dataset), system.extra_fraction)
            splits = splits._replace(train=extra)
        recipe = self.recipe(system, dataset)
        teachers = self.teachers(recipe, dataset)
        for teacher in teachers:
            self.trained(teacher, dataset)
        folder = self.run_folder(system, dataset)
        description = f"{system.model} by {recipe.title}, {recipe.epochs} epochs"
        self.say(f"{system.label} on {splits.train.name}: {description}, in {folder}")
        result = train(
            recipe,
            self.build_network(system, splits.train),
            splits,
            folder,
            seed=self.seed,
            device=self.device,
            resume=True,
            teachers=[self.run_folder(teacher, dataset) for teacher in teachers] or None,
            tensorboard=False,
            quiet=self.console.quiet,
        )
        self._add_training(
            system,
            dataset,
            result.model,
            network=_described(system.model, self._options(system)),
            recipe=recipe.title,
            epochs=recipe.epochs,
            seconds=result.history[-1]["seconds"],
        )
        return result.model

    def _add_training(self, system: System, dataset: str, model: nn.Module, **fields: Any) -> None:
        """Adds a row to ``trainings``, unless it has the same one."""
        training = Training(
            label=system.label,
            dataset=dataset,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            multiply_adds=self._costs.get(system.label),
            **fields,
        )
        if training not in self.trainings:
            self.trainings.append(training)

    def _given(self, system: System, dataset: str) -> nn.Module:
        """The network in one of the run folders ``networks``."""
        folder = self.run_folder(system, dataset)
        config = read_config(folder, whole=True)
        model = load_model(folder, resolve_device(self.device))
        recipe = config["recipe"]
        try:
            seconds = read_log(folder, "epoch")[-1]["seconds"]
        except (FileNotFoundError, IndexError):
            seconds = None
        network = _described(config["model"]["name"], config["model"].get("options") or {})
        fields = {"recipe": recipe["name"], "epochs": recipe["epochs"], "seconds": seconds}
        self._add_training(system, dataset, model, network=network, **fields)
        return model

    def evaluated(
        self, system: System, dataset: str, attacks: Sequence[str] | Mapping[str, Attack], name: str
    ) -> Report:
        """The report of a system on the test images; an existing one with the same attacks is loaded."""
        model = self.trained(system, dataset)
        folder = self.run_folder(system, dataset)
        with suppress(FileNotFoundError):
            report = Report.load(folder / "evaluations" / name)
            if report.results().keys() >= set(attacks) and report.n == len(self.splits(dataset).test):
                return report
        self.say(f"{system.label}: {', '.join(attacks)} on {len(self.splits(dataset).test)} test images")
        return evaluate(
            model,
            self.splits(dataset).test,
            attacks,
            seed=self.seed,
            budget=self.budget.attack_budget,
            queries=self.budget.queries,
            surrogates=_gates(model),
            sanity=False,
            progress=not self.console.quiet,
            out=folder,
            name=name,
        )

    def say(self, text: str) -> None:
        self.console.print(visible(text), markup=False, soft_wrap=True)

    def _recipe_name(self, name: str) -> str:
        fast = f"{name}_fast"
        return fast if self.budget.fast and fast in list_recipes() else name

    def build_network(self, system: System, data: Dataset) -> nn.Module:
        return create_seeded_model(
            system.model,
            self.seed,
            num_classes=data.num_classes,
            in_channels=data.in_channels,
            **self._options(system),
        )

    def _options(self, system: System) -> dict[str, Any]:
        options = dict(system.options)
        if self.budget.width != 1:
            options["width"] = self.budget.width * options.get("width", 1.0)
        return options


def averaged_down(part: Dataset, factor: int) -> Dataset:
    """``part`` with images that are averaged over squares of side ``factor``."""
    if factor == 1:
        return part
    images = F.avg_pool2d(part.images.float(), factor).round_().to(torch.uint8)
    height, width = images.shape[2:]
    return replace(
        part,
        images=images,
        augmentation=replace(part.augmentation, shift=part.augmentation.shift // factor),
        name=f"{part.name} at {height}×{width}",
        source=f"{part.source}, averaged down to {height}×{width} pixels",
    )


def _described(model: str, options: Mapping[str, Any]) -> str:
    return ", ".join([model, *(f"{key} {value}" for key, value in options.items())])


def _gates(model: nn.Module) -> dict[str, nn.Module] | None:
    """Further models for the union if the choice between members has no gradient."""
    if not isinstance(model, SeparateNet):
        return None
    views: dict[str, nn.Module] = {
        f"{gate}_gate": model.with_gate(gate) for gate in ("soft", "standard", "robust")
    }
    return views


def _cut(part: Dataset, limit: int | None) -> Dataset:
    if limit is None:
        return part
    return replace(part.subset(limit), source=f"{part.source}, {min(limit, len(part))} images")

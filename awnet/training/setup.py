"""The checks and setup of ``train`` before the first step, and the descriptions in config.json."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awnet.attacks.base import check_values
from awnet.attacks.probe import first_logits
from awnet.data import Dataset, Splits
from awnet.distributed import Ranks
from awnet.models.files import load_model_file, packed_extra_state
from awnet.models.registry import config_of, create_seeded_model
from awnet.nn import has_router, routed_networks, synchronize, unwrapped
from awnet.nn.wrappers import with_wrapper_names, without_wrapper_names
from awnet.run_config import read_config
from awnet.training import checkpoint
from awnet.training.logging import Reporter, check_log
from awnet.training.recipes import Recipe
from awnet.training.step import Numerics, numerics


def build_model(model: nn.Module | str, data: Dataset, seed: int) -> nn.Module:
    """``model`` without data-parallel wrappers, or the registered model of that name, drawn from ``seed``."""
    if isinstance(model, nn.Module):
        check_values(model)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return unwrapped(model)  # several GPUs train under torchrun
        return model
    if not isinstance(model, str):
        raise TypeError(f"model must be a module or a registered name, got {type(model).__name__}")
    return create_seeded_model(model, seed, num_classes=data.num_classes, in_channels=data.in_channels)


def initialize(model: nn.Module, source: str | Path) -> None:
    """Copies the weights of the model in ``source`` into ``model``; ValueError if they do not fit."""
    other = load_model_file(source)
    weights, current = other.state_dict(), without_wrapper_names(model, model.state_dict())
    shapes, expected = (
        {name: tuple(value.shape) for name, value in one.items() if isinstance(value, Tensor)}
        for one in (weights, current)
    )
    different = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
    if different:
        name, count = different[0], len(different) - 1
        raise ValueError(
            f"init_from: {source} is a {describe_model(other)['name']} whose weights do not fit this "
            f"{describe_model(model)['name']}: {name} is {expected.get(name, 'missing')} in the model and "
            f"{shapes.get(name, 'missing')} in the file{f', and {count} more differ' if count else ''}"
        )
    model.load_state_dict(with_wrapper_names(model, weights))


def check_trainable(model: nn.Module, data: Dataset, device: torch.device) -> None:
    """Runs one image in eval mode, so that an unsuitable model fails before any file is written.

    Raises:
        ValueError: the model cannot be trained on the data.
    """
    if not has_router(model) and (count := len(routed_networks(model))) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {count} networks with routers (AW-Nets), training supports one: "
            "train them one by one, or give the model route(x) and forward(x, *, is_clean, routing)"
        )
    parameters = list(model.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        raise ValueError("model was made within torch.inference_mode(): make it outside, to be trained")
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            "model has no parameter that requires a gradient, so there is nothing to train: call "
            "requires_grad_(True) on the parameters to train"
        )
    x = torch.zeros(1, data.in_channels, *data.image_size, device=device)
    first_logits(model, x, data.num_classes, data.name)
    modes = [(module, module.training) for module in model.modules()]
    try:
        logits = model.eval()(x)
    finally:
        for module, training in modes:
            module.training = training
    if not logits.requires_grad:
        raise ValueError(
            "the model's logits have no gradient with respect to its parameters: does its forward detach "
            "them, or run under torch.no_grad()?"
        )
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            packed_extra_state(name, value)


def check_shares(recipe: Recipe, images: int, ranks: Ranks) -> None:
    """Raises ValueError unless every rank has an image of every micro-batch, in the last batch as well."""
    last = images % recipe.batch_size or recipe.batch_size
    smallest = min(recipe.batch_size, last)
    if ranks.size > 1 and smallest < ranks.size * recipe.accumulate:
        raise ValueError(
            f"batch_size {recipe.batch_size} leaves {smallest} images for the last batch of an epoch, too "
            f"few for {ranks.size} ranks with accumulate={recipe.accumulate}: choose another batch_size"
        )


def check_same_on_all_ranks(config: dict[str, Any], ranks: Ranks) -> None:
    """Raises ValueError if another rank has another configuration."""
    config = checkpoint.comparable(config)
    for rank, other in enumerate(ranks.gathered(config)):
        differences = list(checkpoint.differences(config, other, "configuration"))
        if differences:
            raise ValueError(
                f"all ranks must have the same configuration, but rank {ranks.rank} and rank {rank} differ: "
                f"{'; '.join(differences)}"
            )


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The model for config.json: what rebuilds it, or its class, and the number of its parameters."""
    known = config_of(model) or {"name": type(unwrapped(model)).__name__}
    return known | {"parameters": sum(p.numel() for p in model.parameters())}


def describe_splits(splits: Splits) -> dict[str, Any]:
    """The data set for config.json."""
    train = splits.train
    return {
        "name": train.name,
        "source": train.source,
        "norm": train.threat_model.norm,
        "eps": train.threat_model.eps,
        "augmentation": {"shift": train.augmentation.shift, "flip": train.augmentation.flip},
        "extra": None if train.extra is None else train.extra.describe(),
        "sizes": {name: len(part) for name, part in splits._asdict().items()},
        "fingerprints": {name: part.fingerprint() for name, part in splits._asdict().items()},
    }


def describe_session(
    environment: dict[str, Any], teachers: dict[str, Any] | None, init_from: str | Path | None
) -> dict[str, Any]:
    """This call of ``train`` for the list of sessions in config.json."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "process": f"process {os.getpid()} on {platform.node()}",
        "command": shlex.join(sys.argv),
        "teachers": teachers,
        "init_from": None if init_from is None else str(init_from),
        "environment": environment,
    }


def open_run(
    folder: Path,
    config: dict[str, Any],
    session: dict[str, Any],
    reporter: Reporter,
    stack: ExitStack,
    *,
    resume: bool,
    overwrite: bool,
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Opens the run folder and locks it until ``stack`` is closed.

    Returns:
        The state to resume from, None for a new run, and the records of the epochs that are done.
    """
    checkpoint.check(folder, resume=resume, overwrite=overwrite)
    stack.enter_context(checkpoint.locked(folder, reporter.say))
    sessions = {"sessions": [session]}
    if not checkpoint.open_folder(folder, config | sessions, resume=resume, overwrite=overwrite):
        return None, []
    state = checkpoint.load_state(folder, reporter.say)
    checkpoint.check_state(folder, state)
    history = check_log(folder, state, reporter.say)
    if not state["finished"]:
        _add_session(folder, session, state, reporter)
    return state, history


def _add_session(folder: Path, session: dict[str, Any], state: dict[str, Any], reporter: Reporter) -> None:
    """Adds this session to config.json; prints a note if it may round differently from ``state``'s."""
    names = ("awnet", "commit", "modified", "torch", "device", "threads", "ranks", *Numerics._fields)
    before, now = ({name: one.get("environment", {}).get(name) for name in names} for one in (state, session))
    changed = list(checkpoint.differences(before, now, "environment"))
    if changed:
        reporter.say(f"note: the last bits may differ from an uninterrupted run: {'; '.join(changed)}")
    config = read_config(folder)
    config["sessions"].append(session)
    checkpoint.write_config(folder, config)


@contextmanager
def synchronized(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Makes ``model`` compute batch statistics over all ranks' samples, for a block of code."""
    synchronize(model, ranks.group_name)
    try:
        yield
    finally:
        synchronize(model, None)


@contextmanager
def memory_advice(recipe: Recipe, device: torch.device, folder: Path) -> Iterator[None]:
    """Replaces what torch or Python raises when memory is full by a MemoryError that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        signs = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")  # of errors without a separate type
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(s in text for s in signs):
            raise
        less = [f"accumulate (now {recipe.accumulate}), which cuts a batch into micro-batches"]
        if numerics(recipe, device).precision == "float32":
            less.append("precision='bfloat16'")
        less.append(f"a smaller batch_size (now {recipe.batch_size})")
        ways = ["once other programs have left more memory"]
        if device.type == "cuda":
            ways.append("with the images on the host (--data-memory host, data_memory='host')")
        ways.append("on more ranks, each with its share of the same batch_size")
        raise MemoryError(
            f"the memory of {device} or of the host is full ({text}). The last checkpoint is kept in "
            f"{folder}; the same run resumes from it with --resume (resume=True) "
            f"{', '.join(ways[:-1])} or {ways[-1]}. A new run needs less "
            f"with a higher {', '.join(less[:-1])} or {less[-1]}"
        ) from error

"""``train``: from a recipe to a run folder.

All random numbers are keyed: the order and augmentation of images and the noise of the training attack by
(seed, epoch, sample). So a run that was stopped at any step and resumed ends with the same bits as a run that
was not, on the same machine with the same number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from awnet import rng
from awnet.data import Memory, Splits
from awnet.defaults import standard_defaults
from awnet.devices import resolve_device
from awnet.distributed import joined, restarts
from awnet.evaluation.tables import in_one_line
from awnet.files import expanded
from awnet.models.files import description_of, weights_fingerprint
from awnet.models.sources import expanded_source
from awnet.nn import unwrapped
from awnet.nn.copies import copied, unshare_memory
from awnet.nn.wrappers import with_wrapper_names
from awnet.precision import check_environment
from awnet.provenance import environment
from awnet.run_folder import RunFolder
from awnet.scalars import check_integer, check_number
from awnet.training import checkpoint
from awnet.training.forward import Teachers
from awnet.training.logging import Reporter
from awnet.training.micro_batches import check_smallest_micro_batch
from awnet.training.recipes import Recipe
from awnet.training.run import Run, percentages
from awnet.training.setup import (
    build_model,
    check_same_on_all_ranks,
    check_shares,
    check_trainable,
    describe_model,
    describe_session,
    describe_splits,
    initialize,
    memory_advice,
    open_run,
    synchronized,
)
from awnet.training.step import captures, numerics
from awnet.training.teachers import (
    TeacherSource,
    default_teacher,
    describe_sources,
    describe_teachers,
    load_teacher,
    load_teachers,
    record_trained_teachers,
)


@dataclass(frozen=True, repr=False)
class RunResult:
    """The result of :func:`train`.

    model: in eval mode, with the weights of the best validation, or the newest ones before any validation.
    folder: the run folder.
    history: the epochs' records, as in log.jsonl.
    validation: the best epoch's ``epoch``, ``clean_accuracy`` and, for a recipe that attacks,
        ``robust_accuracy`` and ``w_robust_accuracy`` (fractions); empty before any validation.
    finished: False if ``max_minutes`` ended the run early.
    """

    model: nn.Module
    folder: Path
    history: list[dict[str, Any]]
    validation: dict[str, float]
    finished: bool

    def __repr__(self) -> str:
        """The folder, the epochs and the best validation scores, on one line."""
        best = f"; best epoch {self.validation['epoch']:.0f}: " if self.validation else ""
        state = "finished" if self.finished else "not finished, resume=True continues it"
        return (
            f"RunResult({_title(self.model, self.folder)}, {len(self.history)} epochs, {state}{best}"
            f"{percentages(self.validation)})"
        )

    def _repr_html_(self) -> str:
        """The same and the last epochs' records as a table, for a notebook."""
        names = [n for n in ("epoch", "total", "clean_accuracy", "robust_accuracy", "w_robust_accuracy")
                 if any(n in record for record in self.history)]  # fmt: skip
        rows = "".join(
            "<tr>" + "".join(f"<td>{_cell(record.get(name))}</td>" for name in names) + "</tr>"
            for record in self.history[-10:]
        )
        heads = "".join(f"<th>{name}</th>" for name in names)
        return f"<p>{escape(repr(self))}</p><table><thead><tr>{heads}</tr></thead>{rows}</table>"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _title(model: nn.Module, folder: Path) -> str:
    return f"{folder.name} ({describe_model(model)['name']})"


@standard_defaults()
def train(
    recipe: Recipe,
    model: nn.Module | str,
    splits: Splits,
    out: str | Path,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    resume: bool = False,
    overwrite: bool = False,
    teachers: Sequence[TeacherSource] | None = None,
    init_from: str | Path | None = None,
    max_minutes: float | None = None,
    checkpoint_minutes: float = 10.0,
    keep_checkpoints: int = checkpoint.KEEP,
    select_on: Literal["validation", "test"] = "validation",
    data_memory: Memory = "auto",
    tensorboard: bool = True,
    quiet: bool = False,
) -> RunResult:
    """Trains ``model`` by ``recipe`` on ``splits.train`` and stores everything in the run folder ``out``.

    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 finish the step, write a checkpoint and print how to resume; then
    KeyboardInterrupt or SystemExit is raised. A second Ctrl-C or SIGTERM stops at once, without a new
    checkpoint. Signals that are ignored stay ignored. If the run folder is renamed during training, the run
    continues in the renamed folder.

    Under torchrun, or if torch.distributed is initialized, all ranks train one model together: every rank
    calls this with the same arguments, ``recipe.batch_size`` counts the images of all ranks, and a process
    that torchrun has restarted resumes from the last checkpoint without ``resume``.

    Args:
        recipe: how to train, see :func:`recipe_for`.
        model: a module that maps images [B, C, H, W] in [0, 1] to logits [B, K], which is trained in place,
            or a registered name, whose weights are drawn from ``seed``. Data-parallel wrappers are removed, a
            wrapper of ``torch.compile`` is kept. A model of ``create_model`` with changes that the files of
            the run cannot store is an error (see ``save_model``). For any other module the files store the
            weights only, for ``awnet.load_model(out, model=...)``.
        splits: training, validation and test images.
        out: the run folder.
        seed: keys all random numbers.
        device: "cpu", "cuda", "cuda:1" and so on; by default a GPU if there is one.
        resume: resume the run in ``out``, if there is one; a finished run is only loaded.
        overwrite: delete the run in ``out`` first.
        teachers: what ``recipe.teachers`` names, (clean, robust) for MTARD: modules, or sources of
            :func:`awnet.load_model`. Resuming compares the SHA-256 of their weights. If None they are trained
            first, in ``out/teachers/clean`` and so on.
        init_from: a run folder or .safetensors file of the same architecture with the initial weights.
        max_minutes: write a checkpoint and stop after so many minutes.
        checkpoint_minutes: minutes between checkpoints within an epoch; there is one after each epoch as
            well. A checkpoint is copied at its step and written while training continues.
        keep_checkpoints: number of newest states that are kept; a damaged one is skipped for the one before.
        select_on: the split whose W-Robust accuracy (PGD-20) selects the best checkpoint: stack-out training
            images, or the test images, which is the paper's protocol and flatters the result. It is recorded.
        data_memory: where training images are stored: ``device``; ``host``, from where each batch is copied
            one batch ahead; or ``auto``, the device if it has room.
        tensorboard: whether to write TensorBoard events.
        quiet: print nothing.

    Returns:
        The model with the best weights, and the history of the run.

    Raises:
        FileExistsError: ``out`` is not empty and neither ``resume`` nor ``overwrite`` is set.
        BlockingIOError: another process trains in ``out``.
        ValueError: bad arguments, checkpoints that are all damaged or belong to another version's network, or
            a resumed run with another configuration.
        RuntimeError: catastrophic overfitting came back again and again (``recipe.overfitting_checks``).
        FloatingPointError: loss or gradient were NaN or infinite in ten steps in a row. A single such step is
            skipped, reported and counted.
        MemoryError: the memory of the device or the host is full; the message says what to change.
        FileNotFoundError: ``out`` was deleted during training.
        OSError: the last checkpoint could not be written; earlier failures (a full disk) are warnings.
    """
    deadline = math.inf
    if max_minutes is not None:
        deadline = time.monotonic() + 60 * check_number("max_minutes", max_minutes, above=0)
    checkpoint_minutes = check_number("checkpoint_minutes", checkpoint_minutes, above=0)
    keep_checkpoints = check_integer("keep_checkpoints", keep_checkpoints, 1)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe (see recipe_for), got {type(recipe).__name__}")
    seed = check_integer("seed", seed)
    if select_on not in ("validation", "test"):
        raise ValueError(f"select_on must be 'validation' or 'test', got {select_on!r}")
    if data_memory not in get_args(Memory):
        raise ValueError(f"data_memory must be one of {get_args(Memory)}, got {data_memory!r}")
    needed = {"train", select_on} | ({"validation"} if recipe.overfitting_checks else set())
    for part in sorted(needed):
        if not len(getattr(splits, part)):
            raise ValueError(
                f"splits.{part} is empty: it is needed to train, select a checkpoint or check for overfitting"
            )
    if teachers is not None and not recipe.teachers:
        raise ValueError(f"recipe {recipe.name!r} takes no teachers")
    check_environment()
    folder = expanded(out)
    if teachers is not None and not isinstance(teachers, str | Path):
        teachers = [expanded_source(one) if isinstance(one, str | Path) else one for one in teachers]
    if restarts():
        resume, overwrite = True, False
    with (
        torch.inference_mode(False),  # the caller may have disabled gradients
        torch.enable_grad(),
        joined(resolve_device(device)) as ranks,
        ExitStack() as stack,
    ):
        where = ranks.device
        model = build_model(model, splits.train, seed).to(where)
        unshare_memory(model)
        if init_from is not None:
            initialize(model, init_from)
        description = description_of(model)  # raises for a model that no file could restore
        check_trainable(model, splits.train, where)
        check_shares(recipe, len(splits.train), ranks)
        with synchronized(model, ranks):
            check_smallest_micro_batch(recipe, model, splits.train, ranks.size)
        ranks.share(model)
        given = None if teachers is None else load_teachers(teachers, recipe, where)
        config = {
            "recipe": recipe.to_dict(),
            "model": describe_model(model),
            "dataset": describe_splits(splits),
            "input": [splits.train.in_channels, *splits.train.image_size],
            "seed": seed,
            "selected_on": select_on,
            "teachers": describe_teachers(recipe, model, given),
        }
        if init_from is not None:
            config["init_from"] = weights_fingerprint(model)
        about = environment(where) | numerics(recipe, where)._asdict()
        about |= {"capture": captures(recipe, where), "ranks": ranks.size}
        sources = None
        if teachers is not None and given is not None:
            sources = describe_sources(dict(zip(recipe.teachers, teachers, strict=True)), given, folder)
        session = describe_session(about, sources, init_from)
        check_same_on_all_ranks(config, ranks)
        reporter = Reporter(_title(model, folder), quiet=quiet or ranks.rank > 0)
        state, history = ranks.first(
            lambda: open_run(folder, config, session, reporter, stack, resume=resume, overwrite=overwrite)
        )
        if description["config"] is None and not (state is not None and state["finished"]):
            reporter.say(
                f"note: awnet cannot build a {type(unwrapped(model)).__name__} from this run's files alone: "
                f"build it in the same way and pass it, awnet.load_model({str(folder)!r}, model=my_model); "
                "on the command line --model FILE.py:FUNCTION"
            )
        if state is not None and state["finished"]:
            reporter.say(f"{folder} is finished: nothing to train")
            return _result(model, folder, state["best"], state["best_model"], history, finished=True)
        place = stack.enter_context(RunFolder(folder, reporter.say)) if ranks.rank == 0 else None

        images = f"{len(splits.train):,} training images of {splits.train.name}"
        if (extra := splits.train.extra) is not None:
            images += (
                f", {100 * extra.fraction:g} % of each batch from {len(extra):,} images of {extra.source}"
            )
        trained = f"recipe {recipe.title}, {recipe.epochs} epochs, {numerics(recipe, where)}, seed {seed}"
        threat_model = splits.train.threat_model
        reporter.say(in_one_line(model, images, threat_model, trained=trained))
        doubt = threat_model.implausible(splits.train.pixels) if recipe.needs_attack else None
        if doubt is not None:
            reporter.say(f"warning: {doubt}")
        if recipe.teachers and given is None:
            options = {
                "seed": seed,
                "device": where,
                "checkpoint_minutes": checkpoint_minutes,
                "keep_checkpoints": keep_checkpoints,
                "select_on": select_on,
                "data_memory": data_memory,
                "tensorboard": tensorboard,
                "quiet": quiet,
            }
            given = _train_teachers(recipe, model, splits, folder, place, reporter, deadline, options)
            if given is None:
                return RunResult(model.eval(), folder, [], {}, finished=False)
            folder = folder if place is None else place.path
            ranks.first(partial(record_trained_teachers, folder, recipe, given))

        devices = [where] if where.type == "cuda" else []
        rank = [ranks.rank] if ranks.rank else []  # each rank draws separate dropout masks
        with torch.random.fork_rng(devices), synchronized(model, ranks):
            torch.manual_seed(rng.torch_seed(seed, "training", *rank))
            with memory_advice(recipe, where, folder):
                run = Run(
                    recipe=recipe,
                    model=model,
                    splits=splits,
                    ranks=ranks,
                    teachers=given,
                    folder=folder,
                    place=place,
                    history=history,
                    seed=seed,
                    select_on=select_on,
                    data_memory=data_memory,
                    reporter=reporter,
                    save_every=60 * checkpoint_minutes,
                    keep=keep_checkpoints,
                    environment=about,
                    description=description,
                )
                finished = run.train(state, deadline, tensorboard)
        folder, history = ranks.first(lambda: (run.folder, run.history))
        return _result(model, folder, run.best, run.weights, history, finished=finished)


def _train_teachers(
    recipe: Recipe,
    model: nn.Module,
    splits: Splits,
    folder: Path,
    place: RunFolder | None,
    reporter: Reporter,
    deadline: float,
    options: dict[str, Any],
) -> Teachers | None:
    """Trains the teachers of ``recipe`` inside the run folder; None if the deadline came first."""
    teachers = []
    for kind in recipe.teachers:
        teacher_recipe, name = recipe.teacher_recipe(kind), default_teacher(model)
        teacher_folder = (folder if place is None else place.path) / "teachers" / kind
        reporter.say(
            f"no {kind} teacher was given: {name}, trained by {teacher_recipe.name}, in {teacher_folder}"
        )
        minutes = None if deadline == math.inf else max((deadline - time.monotonic()) / 60, 1e-6)
        result = train(
            teacher_recipe, name, splits, teacher_folder, resume=True, max_minutes=minutes, **options
        )
        if not result.finished:
            return None
        teachers.append(load_teacher(result.model, options["device"]))
    return Teachers(*teachers)


def _result(
    model: nn.Module,
    folder: Path,
    best: dict[str, float],
    weights: dict[str, Tensor],
    history: list[dict[str, Any]],
    *,
    finished: bool,
) -> RunResult:
    chosen = copied(model).eval()
    try:
        chosen.load_state_dict(with_wrapper_names(chosen, weights))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the best weights in the state of {folder} do not fit the model: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    return RunResult(chosen, folder, history, dict(best), finished)

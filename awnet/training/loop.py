"""The training loop: one function, ``train``, from a recipe to a run folder.

Everything random is keyed: order and augmentation by (seed, epoch, sample), the training attack's noise by
(seed, epoch, sample), so a run that was stopped at any step and resumed ends with the same bits as one that
was not, on the same machine with the same number of threads.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from awnet import early_signals, rng
from awnet.attacks import named_attack
from awnet.attacks.base import check_values
from awnet.attacks.probe import first_logits
from awnet.data import Dataset, Memory, Splits
from awnet.defaults import standard_defaults
from awnet.devices import resolve_device
from awnet.distributed import Agreement, Ranks, joined, restarts
from awnet.evaluation import accuracy, robust_correct, w_robust_accuracy
from awnet.evaluation.tables import in_one_line
from awnet.files import expanded
from awnet.models import load_model
from awnet.models.files import description_of, packed_extra_state, weights_fingerprint, write_model
from awnet.models.registry import config_of, create_seeded_model
from awnet.nn import has_router, not_supported, routed_networks, synchronize, unwrapped
from awnet.nn.copies import copied, own_memory
from awnet.nn.wrappers import with_wrapper_names, without_wrapper_names
from awnet.precision import check_environment, full_precision
from awnet.provenance import environment
from awnet.run_config import read_config
from awnet.run_folder import RunFolder
from awnet.scalars import check_integer, check_number
from awnet.training import checkpoint
from awnet.training.logging import Reporter, RunLog, check_log
from awnet.training.losses import Teachers
from awnet.training.micro_batches import check_smallest_micro_batch
from awnet.training.recipes import Recipe
from awnet.training.step import Numerics, TrainingStep, numerics

EVALUATION_BATCH = 256
MOST_SKIPPED_IN_A_ROW = 10

TeacherSource = nn.Module | str | Path


@dataclass(frozen=True, repr=False)
class RunResult:
    """What ``train`` returns.

    model: in eval mode, with the weights of the best validation; the newest ones where there was none yet.
    folder: the run folder.
    history: the epochs' records, as in log.jsonl.
    validation: the best epoch's ``epoch``, ``clean_accuracy`` and, for a recipe that attacks,
        ``robust_accuracy`` and ``w_robust_accuracy`` (fractions); empty where there was no validation yet.
    finished: False where ``max_minutes`` ended the run early.
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
            f"{_percent(self.validation)})"
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
    """Trains ``model`` by ``recipe`` on ``splits.train`` and keeps all of it in the run folder ``out``.

    model: a module that maps images [B, C, H, W] in [0, 1] to logits [B, K] (it is trained in place), or a
        registered name, then made with weights drawn from ``seed``. Data-parallel wrappers are taken off, one
        of ``torch.compile`` stays. A model of ``create_model`` that was changed in ways that the run's files
        cannot hold is refused at once (see ``save_model``); the files of any other module hold its weights,
        for ``awnet.load_model(out, model=...)``.
    device: "cpu", "cuda", "cuda:1"…; a GPU where there is one, by default.
    resume: go on with the run in ``out``, if there is one; a finished one is only loaded.
    overwrite: delete the run in ``out`` first.
    teachers: what ``recipe.teachers`` names, (clean, robust) for MTARD: modules, run folders or .safetensors
        files. Where none are given they are trained first, into ``out/teachers/clean`` and so on.
    init_from: a run folder or .safetensors file whose weights the model starts from; the same architecture.
    max_minutes: stop, with a checkpoint, after so long.
    checkpoint_minutes: time between checkpoints within an epoch; there is one at the end of each anyway. A
        checkpoint is copied at its step and written while training goes on.
    keep_checkpoints: how many of the newest states stay on the disk; a damaged one is passed over for the
        one before it.
    select_on: the part whose W-Robust accuracy (PGD-20) picks the best checkpoint: held-out training images,
        or the test images, which is the paper's protocol and flatters the result; it is recorded.
    data_memory: where the training images lie: ``device``; ``host``, from where each batch is copied a batch
        ahead; or ``auto``, the device if it has room.

    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 finish the step, write a checkpoint and say how to resume; then
    KeyboardInterrupt or SystemExit is raised. A second Ctrl-C or SIGTERM stops at once, without a new
    checkpoint. Signals that are ignored stay ignored. A run folder that is renamed meanwhile is followed.

    Under torchrun, or where torch.distributed is initialised, all ranks train one model together: every rank
    calls this with the same arguments, ``recipe.batch_size`` counts the images of all of them, and a process
    that torchrun has restarted goes on from the last checkpoint without ``resume``.

    Raises FileExistsError where ``out`` holds something and neither ``resume`` nor ``overwrite`` is set,
    BlockingIOError where another process trains in ``out``, ValueError for bad arguments, for checkpoints
    that are all damaged or of another version's network, or a resumed run with another configuration,
    FloatingPointError when loss or gradient were NaN or infinite in ten steps in a row (a single such step is
    left out, reported and counted), MemoryError with advice where the device's or the host's memory is full,
    FileNotFoundError where ``out`` was deleted during training, and OSError at the end when the last
    checkpoint could not be written (earlier ones that could not, as on a full disk, are warned of).
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
    for part in ("train", select_on):
        if not len(getattr(splits, part)):
            raise ValueError(f"splits.{part} is empty: it is needed to train or to select a checkpoint")
    if teachers is not None and not recipe.teachers:
        raise ValueError(f"recipe {recipe.name!r} takes no teachers")
    check_environment()
    folder = expanded(out)
    if teachers is not None and not isinstance(teachers, str | Path):
        teachers = [expanded(one) if isinstance(one, str | Path) else one for one in teachers]
    if restarts():
        resume, overwrite = True, False
    with _gradients(), joined(resolve_device(device)) as ranks, ExitStack() as held:
        where = ranks.device
        model = _model(model, splits.train, seed).to(where)
        own_memory(model)
        if init_from is not None:
            _initialize(model, init_from)
        description = description_of(model)  # refuses what no file could give back
        _check_trainable(model, splits.train, where)
        _check_shares(recipe, len(splits.train), ranks)
        with _synchronized(model, ranks):
            check_smallest_micro_batch(recipe, model, splits.train, ranks.size)
        ranks.share(model)
        given = None if teachers is None else _load_teachers(teachers, recipe, where)
        config = {
            "recipe": recipe.to_dict(),
            "model": _describe(model),
            "dataset": _describe_splits(splits),
            "input": [splits.train.in_channels, *splits.train.image_size],
            "seed": seed,
            "selected_on": select_on,
            "teachers": _describe_teachers(recipe, model, given),
        }
        if init_from is not None:
            config["init_from"] = weights_fingerprint(model)
        about = environment(where) | numerics(recipe, where)._asdict() | {"ranks": ranks.size}
        session = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "process": f"process {os.getpid()} on {platform.node()}",
            "command": shlex.join(sys.argv),
            "teachers": None
            if teachers is None or given is None
            else _sources(dict(zip(recipe.teachers, teachers, strict=True)), given, folder),
            "init_from": None if init_from is None else str(init_from),
            "environment": about,
        }
        _check_same(config, ranks)
        reporter = Reporter(_title(model, folder), quiet=quiet or ranks.rank > 0)
        state, history = ranks.first(
            lambda: _begin(folder, config, session, reporter, resume, overwrite, held)
        )
        if description["config"] is None and not (state is not None and state["finished"]):
            reporter.say(
                f"note: awnet cannot build a {type(unwrapped(model)).__name__} from this run's files alone: "
                f"build it in the same way and pass it, awnet.load_model({str(folder)!r}, model=my_model)"
            )
        if state is not None and state["finished"]:
            reporter.say(f"{folder} is finished: nothing to train")
            return _result(model, folder, state["best"], state["best_model"], history, finished=True)
        place = held.enter_context(RunFolder(folder, reporter.say)) if ranks.rank == 0 else None

        images = f"{len(splits.train):,} training images of {splits.train.name}"
        how = f"recipe {recipe.name}, {recipe.epochs} epochs, seed {seed}"
        reporter.say(in_one_line(model, images, splits.train.threat_model.eps, trained=how))
        if recipe.teachers and given is None:
            made = []
            for kind in recipe.teachers:
                teacher_recipe, name = recipe.teacher_recipe(kind), _teacher_name(model)
                folder = folder if place is None else place.path
                teacher_folder = folder / "teachers" / kind
                reporter.say(
                    f"no {kind} teacher was given: {name}, trained by {teacher_recipe.name}, in "
                    f"{teacher_folder}"
                )
                minutes = None if deadline == math.inf else max((deadline - time.monotonic()) / 60, 1e-6)
                one = train(
                    teacher_recipe,
                    name,
                    splits,
                    teacher_folder,
                    seed=seed,
                    device=where,
                    resume=True,
                    max_minutes=minutes,
                    checkpoint_minutes=checkpoint_minutes,
                    keep_checkpoints=keep_checkpoints,
                    select_on=select_on,
                    data_memory=data_memory,
                    tensorboard=tensorboard,
                    quiet=quiet,
                )
                if not one.finished:
                    return RunResult(model.eval(), folder, [], {}, finished=False)
                made.append(_as_teacher(one.model, where))
            given = Teachers(*made)
            folder = folder if place is None else place.path
            ranks.first(partial(_record_teachers, folder, recipe, given))

        cuda = [where] if where.type == "cuda" else []
        own = [ranks.rank] if ranks.rank else []  # each rank draws its own dropout
        with torch.random.fork_rng(cuda), _synchronized(model, ranks):
            torch.manual_seed(rng.torch_seed(seed, "training", *own))
            with _advised_on_memory(recipe, where, folder):
                run = _Run(
                    recipe, model, splits, folder, seed, ranks, given, select_on, reporter, data_memory
                )
                run.place, run.history = place, history
                run.save_every, run.keep, run.about = 60 * checkpoint_minutes, keep_checkpoints, about
                run.description = description
                finished = run.go(state, deadline, tensorboard)
        judged = run.train_on.judged
        weights = run.best_model if run.best else without_wrapper_names(judged, judged.state_dict())
        folder, history = ranks.first(lambda: (run.folder, run.history))
        return _result(model, folder, run.best, weights, history, finished=finished)


def _begin(
    folder: Path,
    config: dict[str, Any],
    session: dict[str, Any],
    reporter: Reporter,
    resume: bool,
    overwrite: bool,
    held: ExitStack,
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Opens the run folder, locked by ``held``; returns the state to resume from, if any, and its epochs."""
    checkpoint.check(folder, resume=resume, overwrite=overwrite)
    held.enter_context(checkpoint.locked(folder, reporter.say))
    sessions = {"sessions": [session]}
    if not checkpoint.open_folder(folder, config | sessions, resume=resume, overwrite=overwrite):
        return None, []
    state = checkpoint.load_state(folder, reporter.say)
    checkpoint.check_state(folder, state)
    history = check_log(folder, state, reporter.say)
    if not state["finished"]:
        _add_session(folder, session, state, reporter)
    return state, history


@contextmanager
def _gradients() -> Iterator[None]:
    """Gradients for a block of code, also where the caller has switched them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def _synchronized(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """``model`` with batch statistics of all ranks' samples, for a block of code."""
    synchronize(model, ranks.group_name)
    try:
        yield
    finally:
        synchronize(model, None)


class _Means:
    """Running means of the loss's terms, weighted by the number of images; goes into the checkpoint."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.images = 0

    def add(self, terms: dict[str, float], images: int) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * images
        self.images += images

    def take(self) -> dict[str, float]:
        """The means; starts again from nothing."""
        means = {name: value / self.images for name, value in self.sums.items()}
        self.sums, self.images = {}, 0
        return means


class _Run:
    """The state of one run while it trains: all that a checkpoint holds, and what is made from it."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        splits: Splits,
        folder: Path,
        seed: int,
        ranks: Ranks,
        teachers: Teachers | None,
        select_on: str,
        reporter: Reporter,
        data_memory: Memory,
    ) -> None:
        self.recipe, self.model, self.folder, self.seed = recipe, model, folder, seed
        self.place: RunFolder | None = None  # rank 0's: where the folder is now
        self.history: list[dict[str, Any]] = []  # rank 0's: the epochs' records
        self.ranks, self.device, self.reporter = ranks, ranks.device, reporter
        self.data = splits.train.placed(self.device, data_memory)
        self.held_out: Dataset = getattr(splits, select_on).to(self.device)
        self.calibration: Dataset = splits.validation.to(self.device)  # whichever part selects
        if recipe.validate_limit is not None:
            self.held_out = self.held_out.subset(recipe.validate_limit, seed=seed)
            self.calibration = self.calibration.subset(recipe.validate_limit, seed=seed)
        self.steps_per_epoch = -(-len(self.data) // recipe.batch_size)
        self.train_on = TrainingStep(
            recipe,
            model,
            self.device,
            self.steps_per_epoch,
            teachers,
            average=ranks.mean if ranks.size > 1 else None,
        )
        self.attack = recipe.attack(model, self.data.threat_model, self.data.num_classes, seed)
        self.agreement = Agreement(ranks)

        self.epoch, self.batch, self.step = 0, 0, 0  # epochs done, batches of this epoch done, steps done
        self.best: dict[str, float] = {}
        self.skipped, self.skipped_in_a_row = 0, 0  # steps whose loss or gradient was not finite
        self.best_model: dict[str, Tensor] = {}  # its weights, on the CPU
        self.best_on_disk: dict[str, Tensor] | None = None  # the ``best_model`` that was written last
        self.save_every, self.keep = math.inf, checkpoint.KEEP
        self.about: dict[str, Any] = {}  # this session's environment
        self.description: dict[str, Any] = {}  # of the model, for the files of its weights
        self.seconds = 0.0
        self.of_epoch, self.of_interval = _Means(), _Means()
        self.pending: list[tuple[int, int, dict[str, Tensor]]] = []  # (step, images, terms) not yet read
        self.log: RunLog | None = None  # rank 0's, as the writer
        self.writer: checkpoint.Writer | None = None

    # The run

    def go(self, state: dict[str, Any] | None, deadline: float, tensorboard: bool) -> bool:
        """Trains to the end (True) or the deadline (False)."""
        if state is not None:
            self._restore(state)
        self._follow()
        if self.ranks.rank == 0:
            self.log = RunLog(
                self.folder,
                resume_at=None if state is None else state["log_bytes"],
                step=self.step,
                tensorboard=tensorboard,
                warn=self.reporter.say,
            )
            self.writer = checkpoint.Writer(self.reporter.say)
        try:
            steps = self.recipe.epochs * self.steps_per_epoch
            with _Signals(self.reporter) as signals, self.reporter.begin(steps, self.step):
                if state is None:
                    self._write_log({"kind": "start", "step": 0, **self._runs_on()})
                    self._save(finished=False)  # the first weights, so that even step 0 can be resumed
                stopped = _Stop()
                while self.epoch < self.recipe.epochs and not stopped:
                    stopped = self._train_epoch(signals, deadline)
                    if not stopped:
                        self._finish_epoch()
                        if self.epoch < self.recipe.epochs:
                            stopped, _ = self._agreed(signals, deadline, save=False)
                self.agreement.close()
                return self._close(stopped)
        finally:
            if self.writer is not None and self.log is not None:
                self.writer.close()
                self.log.close()

    def _train_epoch(self, signals: _Signals, deadline: float) -> _Stop:
        """The rest of this epoch, or less, if told to stop within it."""
        recipe, epoch = self.recipe, self.epoch
        key = rng.key(self.seed, "training attack", epoch)
        self.attack.seed = key
        self.train_on.start_epoch(epoch)
        self.reporter.start_epoch()
        since = saved = time.monotonic()
        batches = self.data.batches(
            recipe.batch_size,
            shuffle=True,
            augment=True,
            seed=self.seed,
            epoch=epoch,
            start=self.batch,
            part=(self.ranks.rank, self.ranks.size),
            device=self.device,
        )
        for batch in batches:
            images = min(recipe.batch_size, len(self.data) - self.batch * recipe.batch_size)  # of all ranks
            terms = self.train_on(batch, self.attack, len(batch.y) * self.ranks.size / images)
            self.batch += 1
            self.step += 1
            self.pending.append((self.step, len(batch.y), terms))
            self.reporter.step(self.step, f"{epoch + 1}/{recipe.epochs}", images)
            if self.step % recipe.log_every == 0:
                self._log_interval()
            now = time.monotonic()
            if self.batch < self.steps_per_epoch:
                due = self.writer is not None and now - saved > self.save_every and not self.writer.busy
                stop, save = self._agreed(signals, deadline, save=due)
                if stop or save:
                    self.seconds += now - since
                    self._save(finished=False)
                    since = saved = time.monotonic()
                if stop:
                    return stop
        self._read_pending()
        self.pace = self.reporter.pace()
        self.seconds += time.monotonic() - since
        return _Stop()

    def _finish_epoch(self) -> None:
        """Validates, logs and writes the checkpoint of an epoch whose steps are all done."""
        recipe = self.recipe
        self.epoch, self.batch = self.epoch + 1, 0
        last = self.epoch == recipe.epochs
        scores: dict[str, float] = {}
        if last or self.epoch % recipe.validate_every == 0:
            scores = self._validate()
            score = scores.get("w_robust_accuracy", scores["clean_accuracy"])
            # of equals the later one, which has trained longer at a lower rate
            if not self.best or score >= self.best.get("w_robust_accuracy", self.best["clean_accuracy"]):
                self.best = {"epoch": self.epoch, **scores}
                judged = self.train_on.judged
                self.best_model = checkpoint.on_host(without_wrapper_names(judged, judged.state_dict()))
        means = self.of_epoch.take()
        self._write_log(
            {
                "kind": "epoch",
                "epoch": self.epoch,
                "step": self.step,
                **means,
                **scores,
                **self._rates(),
                "skipped_steps": self.skipped,
                "images_per_second": round(self.pace, 1),
                "seconds": round(self.seconds, 2),
            }
        )
        self._say_epoch(means, scores)
        self._save(finished=last)

    def _close(self, stopped: _Stop) -> bool:
        self.ranks.first(self._finish_writing)
        self._follow()
        if self.epoch == self.recipe.epochs:
            self.reporter.say(
                f"{self.reporter.title}: done in {self.seconds:.0f} s; best epoch {self.best['epoch']}: "
                f"{_percent(self.best)}"
            )
            return True
        self.reporter.say(
            f"stopped in epoch {self.epoch + 1} of {self.recipe.epochs}, after step {self.step}; saved in "
            f"{self.folder}: run the same again with --resume (resume=True) to go on"
        )
        if stopped.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if stopped.signal:
            raise SystemExit(128 + stopped.signal)
        return False

    def _finish_writing(self) -> None:
        """Waits for the last checkpoint; OSError if it could not be written."""
        assert self.writer is not None
        self.writer.wait()
        if self.writer.failed is not None:
            raise OSError(
                f"the checkpoint of step {self.step} could not be written ({self.writer.failed}); the one "
                f"before it is whole: make room on the disk of {self.folder} and run the same again with "
                "--resume (resume=True)"
            ) from self.writer.failed

    def _agreed(self, signals: _Signals, deadline: float, *, save: bool) -> tuple[_Stop, bool]:
        """Whether to stop, and whether to write a checkpoint: what any rank wants, all do."""
        came, late, due = self.agreement(signals.came or 0, time.monotonic() > deadline, save)
        return _Stop(came, bool(late)), bool(due)

    # Validation

    @full_precision()
    def _validate(self) -> dict[str, float]:
        """The scores of the held-out images; each rank judges its share of them, once all have calibrated."""
        model, share = self.train_on.judged, self.held_out
        self.recipe.calibrate(model, self.calibration)
        if self.ranks.size > 1:
            share = share.take(torch.arange(self.ranks.rank, len(share), self.ranks.size))

        def part(correct: Callable[[], Tensor]) -> float:
            found = int(correct().sum()) if len(share) else 0
            return int(self.ranks.total(torch.tensor(found))) / len(self.held_out)

        settings: dict[str, Any] = {"batch_size": EVALUATION_BATCH, "device": self.device}
        scores = {"clean_accuracy": part(lambda: accuracy(model, share, **settings))}
        if self.recipe.needs_attack:
            attack = named_attack("pgd_trades", model, self.held_out.threat_model, seed=self.seed)
            scores["robust_accuracy"] = part(lambda: robust_correct(model, share, attack, **settings))
            scores["w_robust_accuracy"] = w_robust_accuracy(
                scores["clean_accuracy"], scores["robust_accuracy"]
            )
        return scores

    # Logging

    def _read_pending(self) -> None:
        """Waits for the device, once, and takes over the terms of all steps since the last time."""
        if not self.pending:
            return
        names = list(self.pending[0][2])
        rows = torch.stack([torch.stack([t.float() for t in terms.values()]) for _, _, terms in self.pending])
        counts = [images for _, images, _ in self.pending]
        if self.ranks.size > 1:
            rows, counts = self._of_all_ranks(rows, counts)
        for (step, _, _), images, row in zip(self.pending, counts, rows.tolist(), strict=True):
            terms = dict(zip(names, row, strict=True))
            if terms.pop("skipped"):
                self._note_skipped(step, terms)
                continue
            self.skipped_in_a_row = 0
            self.of_epoch.add(terms, images)
            self.of_interval.add(terms, images)
        self.pending.clear()

    def _of_all_ranks(self, rows: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
        """The means over all images of each step, and how many they were, from this rank's."""
        weights = torch.tensor(counts, dtype=torch.float64)[:, None]
        total = self.ranks.total(torch.cat([rows.cpu().double() * weights, weights], 1))
        return total[:, :-1] / total[:, -1:], [int(images) for images in total[:, -1]]

    def _note_skipped(self, step: int, terms: dict[str, float]) -> None:
        """A step that changed nothing, because its loss or gradient was not finite."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        found = f"step {step} (epoch {self.epoch + 1}): " + ", ".join(f"{n} {v:g}" for n, v in terms.items())
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, last {found}. "
                f"The last checkpoint stays in {self.folder}. A lower learning rate or clip_norm usually "
                f"helps, in a new run; now lr is {self.recipe.lr:g}, router_lr {self.recipe.router_lr:g}"
            )
        self.reporter.say(f"loss or gradient not finite, nothing learnt at {found}")

    def _log_interval(self) -> None:
        self._read_pending()
        means = self.of_interval.take()
        self.reporter.losses(means)
        self.reporter.pulse()
        self._write_log(
            {"kind": "step", "epoch": self.epoch + 1, "step": self.step, **means, **self._rates()}
        )

    def _write_log(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            self._follow()
            self.log.write(record)
            if record["kind"] == "epoch":
                self.history.append(record)

    def _follow(self) -> None:
        """Takes over the run folder's new path where it was renamed; FileNotFoundError where it is gone."""
        if self.place is not None and self.place.path != self.folder:
            self.folder = self.place.path
            if self.log is not None:
                self.log.follow(self.folder)

    def _runs_on(self) -> dict[str, Any]:
        """What the training attack and the teachers run: a frozen copy, or a model itself and why."""
        reasons: dict[str, str | None] = {}
        if self.recipe.needs_attack:
            attack = getattr(self.attack, "model", None)
            model = attack if isinstance(attack, nn.Module) else self.model
            reasons["training attack"] = not_supported(model)
        if self.train_on.teachers is not None:
            for kind in self.recipe.teachers:
                reasons[f"{kind} teacher"] = getattr(self.train_on.teachers, kind).reason
        for what, reason in reasons.items():
            if reason is not None:
                self.reporter.say(f"note: the {what} runs the model itself, frozen in place: {reason}")
        return {
            "runs_on": {
                what: "a frozen copy of the model"
                if reason is None
                else f"the model itself, frozen in place: {reason}"
                for what, reason in reasons.items()
            }
        }

    def _rates(self) -> dict[str, float]:
        """The learning rates that the last step leaves behind."""
        names = ("lr", "router_lr")
        return {n: group["lr"] for n, group in zip(names, self.train_on.optimizer.param_groups, strict=False)}

    def _say_epoch(self, means: dict[str, float], scores: dict[str, float]) -> None:
        total = self.recipe.epochs
        parts = [
            f"{self.reporter.title}  epoch {self.epoch:>{len(str(total))}}/{total}",
            self.reporter.losses(means),
            _percent(scores),
            f"{self.pace:,.0f} images/s",
            f"{self.reporter.left()} left",
        ]
        self.reporter.say("  ".join(part for part in parts if part))

    # Checkpoints

    def _save(self, *, finished: bool) -> None:
        """Copies all that a checkpoint holds, and has it written while training goes on."""
        self._read_pending()
        random = self.ranks.gathered(checkpoint.random_state(self.device))
        if self.writer is None or self.log is None:
            return
        log, place = self.log, self.place
        assert place is not None
        self._follow()
        self.writer.wait()
        state = checkpoint.on_host(
            {
                "model": without_wrapper_names(self.model, self.model.state_dict()),
                **self.train_on.state_dict(),
                "random": random,  # one for each rank
                "epoch": self.epoch,
                "batch": self.batch,
                "step": self.step,
                "best": self.best,
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                "seconds": self.seconds,
                "of_epoch": vars(self.of_epoch),
                "of_interval": vars(self.of_interval),
                "log_bytes": log.length,
                "finished": finished,
                "environment": self.about,
            }
        )
        state["best_model"] = self.best_model

        def write() -> None:
            # the state last: where it says that the run is finished, all of it is there
            log.sync(state["log_bytes"])
            best = state["best_model"]
            if best and best is not self.best_on_disk:
                write_model(self.model, place.path / "best.safetensors", best, self.description)
                self.best_on_disk = best
            judged = state["average"]["model"] if state["average"] else state["model"]
            write_model(self.model, place.path / "last.safetensors", judged, self.description)
            checkpoint.save_state(place.path, state, keep=self.keep)

        self.writer.submit(lambda: place.during(write))

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(with_wrapper_names(self.model, state["model"]))
            self.train_on.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            about, why = state.get("environment", {}), " ".join(str(error).split())
            raise ValueError(
                f"the state of step {state['step']} in {self.folder} does not fit this version's network or "
                f"optimiser ({why}): go on with the version that wrote it, awnet {about.get('awnet')} at "
                f"commit {about.get('commit')}, or start again with overwrite"
            ) from error
        if self.ranks.rank < len(state["random"]):  # else there are more ranks than there were
            checkpoint.set_random_state(state["random"][self.ranks.rank], self.device)
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.best, self.best_model, self.seconds = state["best"], state["best_model"], state["seconds"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        if not self.best and self.ranks.rank == 0:  # what is on the disk may be newer than this state
            (self.folder / "best.safetensors").unlink(missing_ok=True)
        vars(self.of_epoch).update(state["of_epoch"])
        vars(self.of_interval).update(state["of_interval"])
        self.reporter.say(
            f"going on with {self.folder} after step {self.step} "
            f"({self.epoch} of {self.recipe.epochs} epochs are done)"
        )


class _Stop(NamedTuple):
    """Why a run is told to stop; false where it is not."""

    signal: int = 0  # its number
    late: bool = False  # the deadline has passed

    def __bool__(self) -> bool:
        return self.signal > 0 or self.late


class _Signals:
    """The signals that ask a process to stop are noted in ``came`` instead of acting.

    A second SIGINT or SIGTERM acts at once. SIGHUP and SIGUSR1 never do: a closed terminal may send several,
    a batch system warns by them. A signal that is ignored (SIGHUP under nohup, SIGINT in a shell's background
    job) stays ignored, and the program's own handlers of SIGHUP and SIGUSR1 stay. Outside the main thread
    signals cannot be caught, and keep their usual effect.
    """

    _AT_ONCE = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, reporter: Reporter) -> None:
        self.came: int | None = None
        self._reporter = reporter
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (*self._AT_ONCE, *early_signals.PATIENT):
                now = signal.getsignal(number)
                taken = number in self._AT_ONCE or now in (signal.SIG_DFL, early_signals.note)
                if taken and now not in (signal.SIG_IGN, None):
                    self._usual[number] = signal.signal(number, self._note)
            early = early_signals.take()
            if early is not None:
                self._note(early, None)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.came is not None:
            return
        self.came = number
        self._restore(self._AT_ONCE)
        with suppress(RuntimeError):  # the signal came in the middle of another print
            self._reporter.say(
                f"{signal.Signals(number).name}: finishing the step and saving; a second Ctrl-C or SIGTERM "
                "stops at once, without saving"
            )

    def _restore(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number in self._usual:
                signal.signal(number, self._usual.pop(number))

    def __exit__(self, *error: object) -> None:
        self._restore(list(self._usual))


# What train checks, makes and describes before the first step


def _model(model: nn.Module | str, data: Dataset, seed: int) -> nn.Module:
    if isinstance(model, nn.Module):
        check_values(model)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return unwrapped(model)  # several GPUs train under torchrun
        return model
    if not isinstance(model, str):
        raise TypeError(f"model must be a module or a registered name, got {type(model).__name__}")
    return create_seeded_model(model, seed, num_classes=data.num_classes, in_channels=data.in_channels)


def _initialize(model: nn.Module, source: str | Path) -> None:
    """Copies the weights of the model in ``source`` into ``model``; ValueError where they do not fit."""
    other = load_model(source)
    weights, mine = other.state_dict(), without_wrapper_names(model, model.state_dict())
    shapes, wanted = (
        {name: tuple(value.shape) for name, value in one.items() if isinstance(value, Tensor)}
        for one in (weights, mine)
    )
    unlike = [name for name in {**wanted, **shapes} if wanted.get(name) != shapes.get(name)]
    if unlike:
        name, count = unlike[0], len(unlike) - 1
        raise ValueError(
            f"init_from: {source} is a {_describe(other)['name']} whose weights do not fit this "
            f"{_describe(model)['name']}: {name} is {wanted.get(name, 'not')} here and "
            f"{shapes.get(name, 'not')} there{f', and {count} more differ' if count else ''}"
        )
    model.load_state_dict(with_wrapper_names(model, weights))


def _check_trainable(model: nn.Module, data: Dataset, device: torch.device) -> None:
    """One image in eval mode: a model that cannot be trained on the data fails before anything is written."""
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


def _check_shares(recipe: Recipe, images: int, ranks: Ranks) -> None:
    """Every rank needs an image of every micro-batch, in the last batch of an epoch too."""
    last = images % recipe.batch_size or recipe.batch_size
    smallest = min(recipe.batch_size, last)
    if ranks.size > 1 and smallest < ranks.size * recipe.accumulate:
        raise ValueError(
            f"batch_size {recipe.batch_size} leaves {smallest} images for the last batch of an epoch, too "
            f"few for {ranks.size} ranks with accumulate={recipe.accumulate}: choose another batch_size"
        )


def _check_same(config: dict[str, Any], ranks: Ranks) -> None:
    config = checkpoint.comparable(config)
    for rank, other in enumerate(ranks.gathered(config)):
        found = list(checkpoint.differences(config, other, "configuration"))
        if found:
            raise ValueError(
                f"all ranks must train the same, but rank {ranks.rank} and rank {rank} differ: "
                f"{'; '.join(found)}"
            )


def _load_teachers(teachers: Sequence[TeacherSource], recipe: Recipe, device: torch.device) -> Teachers:
    if isinstance(teachers, str | Path) or len(teachers) != len(recipe.teachers):
        raise ValueError(
            f"teachers of {recipe.name} must be {len(recipe.teachers)}, ({', '.join(recipe.teachers)}): "
            "modules, run folders or .safetensors files"
        )
    return Teachers(*(_as_teacher(teacher, device) for teacher in teachers))


def _as_teacher(teacher: TeacherSource, device: torch.device) -> nn.Module:
    if isinstance(teacher, nn.Module):
        model = copied(teacher)
    elif isinstance(teacher, str | Path):
        model = load_model(teacher)
    else:
        raise TypeError(f"a teacher must be a module or a path, got {type(teacher).__name__}")
    return model.to(device).eval().requires_grad_(False)


def _teacher_name(model: nn.Module) -> str:
    return "resnet_tiny" if "tiny" in _describe(model)["name"] else "resnet18"


def _describe(model: nn.Module) -> dict[str, Any]:
    known = config_of(model) or {"name": type(unwrapped(model)).__name__}
    return known | {"parameters": sum(p.numel() for p in model.parameters())}


def _describe_splits(splits: Splits) -> dict[str, Any]:
    train = splits.train
    return {
        "name": train.name,
        "source": train.source,
        "eps": train.threat_model.eps,
        "augmentation": {"shift": train.augmentation.shift, "flip": train.augmentation.flip},
        "sizes": {name: len(part) for name, part in splits._asdict().items()},
        "fingerprints": {name: part.fingerprint() for name, part in splits._asdict().items()},
    }


def _describe_teachers(
    recipe: Recipe, model: nn.Module, given: Teachers | None
) -> dict[str, dict[str, Any]] | None:
    """By their weights, which are the same wherever the files lie; or as this run trains them."""
    if given is not None:
        return {kind: {"weights": weights_fingerprint(getattr(given, kind))} for kind in recipe.teachers}
    if not recipe.teachers:
        return None
    return {
        kind: {"model": _teacher_name(model), "recipe": recipe.teacher_recipe(kind).to_dict()}
        for kind in recipe.teachers
    }


def _title(model: nn.Module, folder: Path) -> str:
    return f"{folder.name} ({_describe(model)['name']})"


def _percent(scores: dict[str, float]) -> str:
    names = {"clean_accuracy": "clean", "robust_accuracy": "robust", "w_robust_accuracy": "A_w"}
    return "  ".join(f"{short} {100 * scores[name]:.1f} %" for name, short in names.items() if name in scores)


def _sources(sources: Mapping[str, TeacherSource], given: Teachers, folder: Path) -> dict[str, Any]:
    """Where the teachers are, absolutely and from the run folder, and the SHA-256 of their weights.

    A module's path is None: it has no file.
    """
    found: dict[str, Any] = {}
    for kind, source in sources.items():
        path = None if isinstance(source, nn.Module) else expanded(source).resolve()
        found[kind] = {
            "path": None if path is None else str(path),
            "from_run": None if path is None else _from(folder.resolve(), path),
            "weights": weights_fingerprint(getattr(given, kind)),
        }
    return found


def _from(folder: Path, path: Path) -> str | None:
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # on another drive of Windows
        return None


def _record_teachers(folder: Path, recipe: Recipe, teachers: Teachers) -> None:
    """Adds to this session's record what the run's own teachers are."""
    places: dict[str, TeacherSource] = {kind: folder / "teachers" / kind for kind in recipe.teachers}
    config = checkpoint.read_config(folder)
    config["sessions"][-1]["teachers"] = _sources(places, teachers, folder)
    checkpoint.write_config(folder, config)


def _add_session(folder: Path, session: dict[str, Any], state: dict[str, Any], reporter: Reporter) -> None:
    """Adds this session to config.json; says so where it may round differently from what made ``state``."""
    names = ("awnet", "commit", "modified", "torch", "device", "threads", "ranks", *Numerics._fields)
    before, now = ({name: one.get("environment", {}).get(name) for name in names} for one in (state, session))
    changed = list(checkpoint.differences(before, now, "environment"))
    if changed:
        reporter.say(f"note: the last bits may differ from an uninterrupted run: {'; '.join(changed)}")
    config = read_config(folder)
    config["sessions"].append(session)
    checkpoint.write_config(folder, config)


@contextmanager
def _advised_on_memory(recipe: Recipe, device: torch.device, folder: Path) -> Iterator[None]:
    """Makes a MemoryError that says what to do of whatever torch or Python raises when memory is full."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        signs = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")  # of what has no type of its own
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
            f"the memory of {device} or of the host is full ({text}). The last checkpoint stays in {folder}; "
            f"the same run goes on from it by --resume (resume=True) {', '.join(ways[:-1])} or {ways[-1]}. "
            f"A new run needs less with a higher {', '.join(less[:-1])} or {less[-1]}"
        ) from error


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

"""A training run: its epochs, validation, log and checkpoints."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awnet import rng
from awnet.attacks import GraphedPGD, named_attack
from awnet.data import Dataset, Memory, Splits
from awnet.distributed import Agreement, Ranks
from awnet.evaluation import accuracy, robust_correct, w_robust_accuracy
from awnet.evaluation.precision import prepare
from awnet.models.files import write_model
from awnet.nn import not_supported
from awnet.nn.wrappers import with_wrapper_names, without_wrapper_names
from awnet.precision import full_precision
from awnet.run_folder import RunFolder
from awnet.training import checkpoint
from awnet.training.forward import Teachers
from awnet.training.logging import Reporter, RunLog
from awnet.training.overfitting import OverfittingGuard
from awnet.training.recipes import Recipe
from awnet.training.signals import Stop, StopSignals
from awnet.training.step import TrainingStep

EVALUATION_BATCH = 256
MOST_SKIPPED_IN_A_ROW = 10
# attributes of a run that a checkpoint holds under the same name
_STATE = ("epoch", "batch", "step", "best", "skipped", "skipped_in_a_row", "seconds")


def percentages(scores: dict[str, float]) -> str:
    """The accuracies in ``scores`` as text."""
    names = {"clean_accuracy": "clean", "robust_accuracy": "robust", "w_robust_accuracy": "A_w"}
    return "  ".join(f"{short} {100 * scores[name]:.1f} %" for name, short in names.items() if name in scores)


class Means:
    """Running means of the terms of a loss, weighted by the number of images; part of a checkpoint."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.images = 0

    def add(self, terms: dict[str, float], images: int) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * images
        self.images += images

    def take(self) -> dict[str, float]:
        """Returns the means and resets them."""
        means = {name: value / self.images for name, value in self.sums.items()}
        self.sums, self.images = {}, 0
        return means


@dataclass(kw_only=True, eq=False, repr=False)
class Run:
    """The state of a run while it trains: everything that a checkpoint holds, and what is built from it."""

    recipe: Recipe
    model: nn.Module  # on this rank's device; trained in place
    splits: Splits
    ranks: Ranks
    teachers: Teachers | None  # for a recipe that distills
    folder: Path  # the run folder
    place: RunFolder | None  # follows the run folder if it is renamed; on rank 0 only
    history: list[dict[str, Any]]  # records of the epochs that are done, on rank 0; extended in place
    seed: int  # keys all random numbers
    select_on: str  # the split that selects the best checkpoint
    data_memory: Memory  # where training images are stored
    reporter: Reporter  # prints progress
    save_every: float  # seconds between checkpoints within an epoch
    keep: int  # number of states that are kept
    environment: dict[str, Any]  # this session's, for checkpoints
    description: dict[str, Any]  # of the model, for the files of its weights

    def __post_init__(self) -> None:
        recipe, splits, ranks, seed = self.recipe, self.splits, self.ranks, self.seed
        self.device = ranks.device
        self.data = recipe.augmented(splits.train).placed(self.device, self.data_memory)
        self.held_out: Dataset = getattr(splits, self.select_on).to(self.device)
        self.calibration: Dataset = splits.validation.to(self.device)  # also if the test split selects
        if recipe.validate_limit is not None:
            self.held_out = self.held_out.subset(recipe.validate_limit, seed=seed)
            self.calibration = self.calibration.subset(recipe.validate_limit, seed=seed)
        self.steps_per_epoch = -(-len(self.data) // recipe.batch_size)
        average = ranks.mean if ranks.size > 1 else None
        self.training_step = TrainingStep(
            recipe, self.model, self.device, self.steps_per_epoch, self.teachers, average=average
        )
        self.attack = recipe.attack(self.model, self.data.threat_model, self.data.num_classes, seed)
        self.guard: OverfittingGuard | None = None
        if recipe.overfitting_checks:
            self.guard = OverfittingGuard(recipe, self.model, self.data, self.steps_per_epoch, seed)
            self.guarded = splits.validation.to(self.device).subset(recipe.overfitting_images, seed=seed)
        self.validation_attack: GraphedPGD | None = None  # on CUDA, during a validation
        self.agreement = Agreement(ranks)

        self.epoch, self.batch, self.step = 0, 0, 0  # epochs done, batches of this epoch done, steps done
        self.best: dict[str, float] = {}
        self.best_model: dict[str, Tensor] = {}  # weights of the best validation, on the CPU
        self.best_on_disk: dict[str, Tensor] | None = None  # the ``best_model`` that was written last
        self.skipped, self.skipped_in_a_row = 0, 0  # steps whose loss or gradient was not finite
        self.seconds = 0.0
        self.epoch_means, self.interval_means = Means(), Means()
        self.pending: list[tuple[int, int, dict[str, Tensor]]] = []  # (step, images, terms) not yet read
        self.log: RunLog | None = None  # on rank 0 only, as the writer
        self.writer: checkpoint.Writer | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The best weights, or before the first validation the current ones."""
        return self.best_model if self.best else self._evaluated_weights()

    def _evaluated_weights(self) -> dict[str, Tensor]:
        model = self.training_step.evaluated_model
        return without_wrapper_names(model, model.state_dict())

    # The run

    def train(self, state: dict[str, Any] | None, deadline: float, tensorboard: bool) -> bool:
        """Trains to the last epoch (True) or to the deadline (False), from ``state`` if given."""
        if state is not None:
            self._restore(state)
        self._follow_folder()
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
            with StopSignals(self.reporter) as signals, self.reporter.begin(steps, self.step):
                if state is None:
                    self._write_log({"kind": "start", "step": 0, **self._runs_on()})
                    self._save(finished=False)  # the initial weights, so that a run resumes from step 0 too
                stop = Stop()
                while self.epoch < self.recipe.epochs and not stop:
                    stop = self._train_epoch(signals, deadline)
                    if not stop:
                        self._finish_epoch()
                        if self.epoch < self.recipe.epochs:
                            stop, _ = self._agree(signals, deadline, save=False)
                self.agreement.close()
                return self._close(stop)
        finally:
            self.close()
            if self.writer is not None and self.log is not None:
                self.writer.close()
                self.log.close()

    def close(self) -> None:
        """Drops all CUDA graphs.

        Graphs with collectives have to be dropped before their process group is destroyed, which otherwise
        waits for them forever (NCCL 2.26 and later).
        """
        self.training_step.close()
        self._close_validation()
        attacks = [self.attack] if self.guard is None else [self.attack, self.guard.rescue]
        for attack in attacks:
            if isinstance(attack, GraphedPGD):
                attack.close()

    def _train_epoch(self, signals: StopSignals, deadline: float) -> Stop:
        """Trains the remaining batches of this epoch, unless the run has to stop before."""
        recipe, epoch = self.recipe, self.epoch
        self.attack.seed = rng.key(self.seed, "training attack", epoch)
        if self.guard is not None:
            self.guard.rescue.seed = self.attack.seed
        self.training_step.start_epoch(epoch)
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
            attack = self.attack
            if self.guard is not None and self.step < self.guard.rescue_until:
                attack = self.guard.rescue
            terms = self.training_step(batch, attack, len(batch.y) * self.ranks.size / images)
            self.batch += 1
            self.step += 1
            self.pending.append((self.step, len(batch.y), terms))
            self.reporter.step(self.step, f"{epoch + 1}/{recipe.epochs}", images)
            if self.step % recipe.log_every == 0:
                self._log_interval()
            if self.guard is not None and self.guard.due(self.batch):
                self._check_overfitting(self.guard)
            now = time.monotonic()
            if self.batch < self.steps_per_epoch:
                due = self.writer is not None and now - saved > self.save_every and not self.writer.busy
                stop, save = self._agree(signals, deadline, save=due)
                if stop or save:
                    self.seconds += now - since
                    self._save(finished=False)
                    since = saved = time.monotonic()
                if stop:
                    return stop
        self._read_pending()
        self.pace = self.reporter.pace()
        self.seconds += time.monotonic() - since
        return Stop()

    def _finish_epoch(self) -> None:
        """Validates, logs and writes the checkpoint after the last step of an epoch."""
        recipe = self.recipe
        self.epoch, self.batch = self.epoch + 1, 0
        last = self.epoch == recipe.epochs
        scores: dict[str, float] = {}
        if last or self.epoch % recipe.validate_every == 0:
            scores = self._validate()
            score = scores.get("w_robust_accuracy", scores["clean_accuracy"])
            # of equal scores the later one, which has trained longer at a lower learning rate
            if not self.best or score >= self.best.get("w_robust_accuracy", self.best["clean_accuracy"]):
                self.best = {"epoch": self.epoch, **scores}
                self.best_model = checkpoint.on_host(self._evaluated_weights())
        means = self.epoch_means.take()
        self._write_log(
            {
                "kind": "epoch",
                "epoch": self.epoch,
                "step": self.step,
                **means,
                **scores,
                **self._learning_rates(),
                "skipped_steps": self.skipped,
                "images_per_second": round(self.pace, 1),
                "seconds": round(self.seconds, 2),
            }
        )
        self._say_epoch(means, scores)
        self._save(finished=last)

    def _close(self, stop: Stop) -> bool:
        self.ranks.first(self._finish_writing)
        self._follow_folder()
        if self.epoch == self.recipe.epochs:
            self.reporter.say(
                f"{self.reporter.title}: done in {self.seconds:.0f} s; best epoch {self.best['epoch']}: "
                f"{percentages(self.best)}"
            )
            return True
        self.reporter.say(
            f"stopped in epoch {self.epoch + 1} of {self.recipe.epochs}, after step {self.step}; saved in "
            f"{self.folder}: to resume, run the same command with --resume (resume=True)"
        )
        if stop.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.signal:
            raise SystemExit(128 + stop.signal)
        return False

    def _finish_writing(self) -> None:
        """Waits for the last checkpoint; OSError if it could not be written."""
        assert self.writer is not None
        self.writer.wait()
        if self.writer.failed is not None:
            raise OSError(
                f"the checkpoint of step {self.step} could not be written ({self.writer.failed}); the one "
                f"before it is complete: make room on the disk of {self.folder} and run the same command "
                "with --resume (resume=True)"
            ) from self.writer.failed

    def _agree(self, signals: StopSignals, deadline: float, *, save: bool) -> tuple[Stop, bool]:
        """Whether to stop, and whether to write a checkpoint: all ranks do, if any rank has to."""
        number, late, due = self.agreement(signals.received or 0, time.monotonic() > deadline, save)
        return Stop(number, bool(late)), bool(due)

    # Validation

    @full_precision()
    def _validate(self) -> dict[str, float]:
        """The scores on the held-out images; each rank evaluates its share after all have calibrated."""
        model = self.training_step.evaluated_model
        self.recipe.calibrate(model, self.calibration)
        settings: dict[str, Any] = {"batch_size": EVALUATION_BATCH, "device": self.device}
        attack: Any = named_attack("pgd_trades", model, self.held_out.threat_model, seed=self.seed)
        try:
            if self.device.type == "cuda":
                self.validation_attack = GraphedPGD.of(attack, num_classes=self.held_out.num_classes)
                attack = self._in_layout(self.validation_attack)
                model = prepare(model, "float32", next(self.held_out.batches(1)).x).module
            clean = self._fraction(self.held_out, lambda data: accuracy(model, data, **settings))
            scores = {"clean_accuracy": clean}
            if self.recipe.needs_attack:
                scores["robust_accuracy"] = self._fraction(
                    self.held_out, lambda data: robust_correct(model, data, attack, **settings)
                )
                scores["w_robust_accuracy"] = w_robust_accuracy(
                    scores["clean_accuracy"], scores["robust_accuracy"]
                )
        finally:
            self._close_validation()  # its graphs hold the memory of whole batches
        return scores

    def _fraction(self, data: Dataset, correct: Callable[[Dataset], Tensor]) -> float:
        """The fraction of correct images in ``data``; ``correct`` evaluates this rank's share of it."""
        share = data
        if self.ranks.size > 1:
            share = data.take(torch.arange(self.ranks.rank, len(data), self.ranks.size))
        count = int(correct(share).sum()) if len(share) else 0
        return int(self.ranks.total(torch.tensor(count))) / len(data)

    @full_precision()
    def _check_overfitting(self, guard: OverfittingGuard) -> None:
        """Measures PGD accuracy on held-out images, and goes back to the last good check after a collapse."""
        step = self.training_step
        attack = named_attack("pgd_sat", self.model, self.guarded.threat_model, seed=self.seed)
        settings: dict[str, Any] = {"batch_size": EVALUATION_BATCH, "device": self.device}
        accuracy = self._fraction(
            self.guarded, lambda data: robust_correct(self.model, data, attack, **settings)
        )

        def snapshot() -> dict[str, Any]:
            state = {"model": without_wrapper_names(self.model, self.model.state_dict()), **step.state_dict()}
            return dict(checkpoint.on_host(state))

        good = guard.collapsed(accuracy, self.step, snapshot)
        if good is None:
            return
        self.model.load_state_dict(with_wrapper_names(self.model, good["model"]))
        step.go_back(good)
        self.reporter.say(
            f"step {self.step} (epoch {self.epoch + 1}): catastrophic overfitting, PGD accuracy on "
            f"{len(self.guarded)} held-out images fell from {100 * guard.best:.1f} % to "
            f"{100 * accuracy:.1f} %; back to the weights of step {guard.step}, and PGD up to step "
            f"{guard.rescue_until}"
        )
        self._read_pending()
        self._write_log(
            {
                "kind": "rollback",
                "epoch": self.epoch + 1,
                "step": self.step,
                "robust_accuracy": accuracy,
                "best_accuracy": guard.best,
                "to_step": guard.step,
            }
        )

    def _in_layout(self, attack: GraphedPGD) -> Callable[..., Tensor]:
        """``attack`` on images in the memory format of training, converted once for all steps."""
        layout = self.training_step.memory_format
        return lambda x, y, index: attack(x.contiguous(memory_format=layout), y, index=index)

    def _close_validation(self) -> None:
        if self.validation_attack is not None:
            self.validation_attack.close()
            self.validation_attack = None

    # Logging

    def _read_pending(self) -> None:
        """Reads the terms of all steps since the last call from the device, which the host waits for once."""
        if not self.pending:
            return
        names = list(self.pending[0][2])
        rows = torch.stack([torch.stack([t.float() for t in terms.values()]) for _, _, terms in self.pending])
        counts = [images for _, images, _ in self.pending]
        if self.ranks.size > 1:
            rows, counts = self._over_ranks(rows, counts)
        for (step, _, _), images, row in zip(self.pending, counts, rows.tolist(), strict=True):
            terms = dict(zip(names, row, strict=True))
            if terms.pop("skipped"):
                self._note_skipped(step, terms)
                continue
            self.skipped_in_a_row = 0
            self.epoch_means.add(terms, images)
            self.interval_means.add(terms, images)
        self.pending.clear()

    def _over_ranks(self, rows: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
        """The means over all ranks' images of each step and their numbers, from this rank's."""
        weights = torch.tensor(counts, dtype=torch.float64)[:, None]
        total = self.ranks.total(torch.cat([rows.cpu().double() * weights, weights], 1))
        return total[:, :-1] / total[:, -1:], [int(images) for images in total[:, -1]]

    def _note_skipped(self, step: int, terms: dict[str, float]) -> None:
        """Reports a step that changed nothing because its loss or gradient was not finite."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        text = f"step {step} (epoch {self.epoch + 1}): " + ", ".join(f"{n} {v:g}" for n, v in terms.items())
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, last {text}. "
                f"The last checkpoint is kept in {self.folder}. A lower learning rate or clip_norm usually "
                f"helps, in a new run; now lr is {self.recipe.lr:g}, router_lr {self.recipe.router_lr:g}"
            )
        self.reporter.say(f"loss or gradient not finite, skipped {text}")

    def _log_interval(self) -> None:
        self._read_pending()
        means = self.interval_means.take()
        self.reporter.losses(means)
        self.reporter.pulse()
        self._write_log(
            {"kind": "step", "epoch": self.epoch + 1, "step": self.step, **means, **self._learning_rates()}
        )

    def _write_log(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            self._follow_folder()
            self.log.write(record)
            if record["kind"] == "epoch":
                self.history.append(record)

    def _follow_folder(self) -> None:
        """Uses the new path of a renamed run folder; FileNotFoundError if it was deleted."""
        if self.place is not None and self.place.path != self.folder:
            self.folder = self.place.path
            if self.log is not None:
                self.log.follow(self.folder)

    def _runs_on(self) -> dict[str, Any]:
        """Whether attack and teachers run inference copies, for the log; prints the reason if not."""
        reasons: dict[str, str | None] = {}
        if self.recipe.needs_attack:
            attacked = getattr(self.attack, "model", None)
            model = attacked if isinstance(attacked, nn.Module) else self.model
            reasons["training attack"] = not_supported(model)
        if self.training_step.teachers is not None:
            for kind in self.recipe.teachers:
                reasons[f"{kind} teacher"] = getattr(self.training_step.teachers, kind).reason
        runs_on = dict.fromkeys(reasons, "a frozen copy of the model")
        for name, reason in reasons.items():
            if reason is not None:
                runs_on[name] = f"the model itself, frozen in place: {reason}"
                self.reporter.say(f"note: the {name} runs {runs_on[name]}")
        return {"runs_on": runs_on}

    def _learning_rates(self) -> dict[str, float]:
        """The learning rates after the last step."""
        names, groups = ("lr", "router_lr"), self.training_step.optimizer.param_groups
        return {name: group["lr"] for name, group in zip(names, groups, strict=False)}

    def _say_epoch(self, means: dict[str, float], scores: dict[str, float]) -> None:
        total = self.recipe.epochs
        parts = [
            f"{self.reporter.title}  epoch {self.epoch:>{len(str(total))}}/{total}",
            self.reporter.losses(means),
            percentages(scores),
            f"{self.pace:,.0f} images/s",
            f"{self.reporter.left()} left",
        ]
        self.reporter.say("  ".join(part for part in parts if part))

    # Checkpoints

    def _save(self, *, finished: bool) -> None:
        """Copies everything that a checkpoint holds; a thread writes it while training continues."""
        self._read_pending()
        random = self.ranks.gathered(checkpoint.random_state(self.device))
        if self.writer is None or self.log is None:
            return
        log, place = self.log, self.place
        assert place is not None
        self._follow_folder()
        self.writer.wait()
        state = checkpoint.on_host(
            {
                "model": without_wrapper_names(self.model, self.model.state_dict()),
                **self.training_step.state_dict(),
                "random": random,  # one for each rank
                **{name: getattr(self, name) for name in _STATE},
                "of_epoch": vars(self.epoch_means),
                "of_interval": vars(self.interval_means),
                "log_bytes": log.length,
                "finished": finished,
                "environment": self.environment,
            }
        )
        state["best_model"] = self.best_model
        if self.guard is not None:
            state["guard"] = self.guard.state_dict()

        def write() -> None:
            # the state last: if it says that the run is finished, all other files are complete
            log.sync(state["log_bytes"])
            best = state["best_model"]
            if best and best is not self.best_on_disk:
                write_model(self.model, place.path / "best.safetensors", best, self.description)
                self.best_on_disk = best
            last = state["average"]["model"] if state["average"] else state["model"]
            write_model(self.model, place.path / "last.safetensors", last, self.description)
            checkpoint.save_state(place.path, state, keep=self.keep)

        self.writer.submit(lambda: place.during(write))

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(with_wrapper_names(self.model, state["model"]))
            self.training_step.load_state_dict(state)
            if self.guard is not None:
                self.guard.load_state_dict(state["guard"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            written_by, reason = state.get("environment", {}), " ".join(str(error).split())
            raise ValueError(
                f"the state of step {state['step']} in {self.folder} does not fit this version's network or "
                f"optimizer ({reason}): resume it with the version that wrote it, awnet "
                f"{written_by.get('awnet')} at commit {written_by.get('commit')}, or start again with "
                "overwrite"
            ) from error
        if self.ranks.rank < len(state["random"]):  # the run may have had fewer ranks
            checkpoint.set_random_state(state["random"][self.ranks.rank], self.device)
        for name in (*_STATE, "best_model"):
            setattr(self, name, state[name])
        if not self.best and self.ranks.rank == 0:  # the file may be newer than this state
            (self.folder / "best.safetensors").unlink(missing_ok=True)
        vars(self.epoch_means).update(state["of_epoch"])
        vars(self.interval_means).update(state["of_interval"])
        self.reporter.say(
            f"resuming {self.folder} after step {self.step} "
            f"({self.epoch} of {self.recipe.epochs} epochs are done)"
        )

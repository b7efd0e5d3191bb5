"""The state of an interrupted evaluation: what it belongs to, and who may use it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awnet._version import __version__
from awnet.attacks import Suite
from awnet.attacks.saved import Saved, digest, model_fingerprint
from awnet.distributed import Ranks
from awnet.evaluation.collect import Plan
from awnet.evaluation.report import Report
from awnet.evaluation.store import locked
from awnet.files import sweep
from awnet.run_folder import RunFolder


def state_key(model: nn.Module, plan: Plan, batch_size: int, suite: Suite, runs_on: str) -> str:
    """A digest of everything that determines the adversarial images; the same on every rank.

    ``runs_on``: the precision, and whether the model or its inference copy runs.
    """
    dataset = plan.dataset
    parts: list[Any] = [model_fingerprint(model), dataset.fingerprint(), batch_size, suite.budget, runs_on]
    parts += [suite.queries, {name: model_fingerprint(other) for name, other in suite.surrogates.items()}]
    for name, attack in plan.attacks.items():
        parts += [name, attack.settings, model_fingerprint(attack.model)]
    device = dataset.device  # each rank has another GPU, so the key holds the kind of device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return digest(__version__, torch.__version__, kind, *parts)


@contextmanager
def evaluation_lock(out: Path | None, name: str, ranks: Ranks) -> Iterator[RunFolder | None]:
    """Holds the lock of the evaluation's folder, on rank 0, for a block of code; yields the run folder."""
    with ExitStack() as stack:

        def lock() -> None:
            if out is not None:
                stack.enter_context(locked(out / "evaluations" / name))

        ranks.first(lock)
        yield None if out is None else stack.enter_context(_run_folder(out, ranks))


def _run_folder(out: Path, ranks: Ranks) -> RunFolder:
    def warn(text: str) -> None:
        if ranks.rank == 0:
            logging.getLogger("awnet").warning(text)

    out.mkdir(parents=True, exist_ok=True)  # on a rank with another file system
    return RunFolder(out, warn, "evaluation", "evaluate it there: completed batches are not repeated")


def check_same_key(key: str, ranks: Ranks) -> None:
    """Raises ValueError on every rank if the ranks evaluate different things."""
    keys = ranks.gathered(key)
    others = [rank for rank, other in enumerate(keys) if other != keys[0]]
    if others:
        raise ValueError(
            f"all ranks must evaluate the same, but rank {others[0]} has another model, images, attacks, "
            "versions or kind of device than rank 0: start all with the same arguments"
        )


def state_folder(name: str) -> Path:
    """The folder of the state, relative to the run folder."""
    return Path("evaluations", name, "state")


def parts_folder(name: str) -> Path:
    """The folder, relative to the run folder, of the marks of the completed parts of an evaluation."""
    return state_folder(name) / "parts"


def mark_part(mark: Path) -> None:
    """Records that a part is complete."""
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def load_part(run_folder: RunFolder, name: str, mark: Path) -> Report | None:
    """The report of the part ``name`` if its ``mark``, relative to the run folder, exists; else None."""
    if not (run_folder.path / mark).is_file():
        return None
    return Report.load(run_folder.path / "evaluations" / name)


def computed_once(saved: Saved | None, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON-ready result of ``compute``; saved as ``name``, or loaded if that was saved before."""
    state = None if saved is None else saved.load(name)
    if state is not None:
        values: dict[str, Any] = state[1]
        return values
    values = compute()
    if saved is not None:
        saved.save(name, {}, values)
    return values


def prepare_state(saved: Saved) -> None:
    """Creates the folder of ``saved``; the state of evaluations with other keys is deleted."""
    sweep(saved.folder.parent.parent)
    if saved.folder.parent.is_dir():
        for other in saved.folder.parent.iterdir():
            if other != saved.folder:
                shutil.rmtree(other)
    saved.folder.mkdir(parents=True, exist_ok=True)

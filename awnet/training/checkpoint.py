"""The run folder: what it is made of, and how a run is picked up again.

    config.json          all that is needed to understand and repeat the run
    log.jsonl            a line per logging interval and per epoch
    tensorboard/         the same for TensorBoard
    last.safetensors     the weights at the newest checkpoint;  best.safetensors  at the best validation
    state/step-XXXXXXXX.pt         weights, the best ones too, optimiser, schedule, MTARD weights, random
                                   states, position, best score, after so many steps; the newest few are kept
    state/step-XXXXXXXX.pt.sha256  its checksum, as ``sha256sum`` writes it
    .lock                empty; the process that trains here holds a lock on it, which ends with the process

The newest state that is whole alone decides where a run goes on: it is one file of one moment, and whatever
else is in the folder is cut back to it.
"""

from __future__ import annotations

import copy
import hashlib
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awnet import files
from awnet.files import expanded, is_temporary, write_json, write_text, written_atomically
from awnet.run_config import MARK, is_run, read_config

FORMAT = 2
KEEP = 2  # states, by default
_MARK = "awnet training state"
_LOCK = ".lock"
_ENTRIES = (
    *("config.json", "log.jsonl", "tensorboard", "last.safetensors", "best.safetensors", "state"),
    *("teachers", "compared", "evaluations", "report.json"),
)
# The parts of config.json that a resumed run must share with the one that it goes on with.
_COMPARED = ("recipe", "model", "dataset", "seed", "selected_on", "teachers", "init_from")


def states(folder: str | Path) -> list[Path]:
    """The state files of a run, the newest first."""
    return sorted((expanded(folder) / "state").glob("step-????????.pt"), reverse=True)


def save_state(folder: str | Path, state: dict[str, Any], *, keep: int = KEEP) -> None:
    """Writes ``state`` (tensors, numbers, strings, lists and dicts of them) under its ``step``, atomically.

    Of the earlier states the newest stay, ``keep`` in all; later ones, which a damaged file may have left
    behind, go.
    """
    path = expanded(folder) / "state" / f"step-{state['step']:08d}.pt"
    path.parent.mkdir(exist_ok=True)  # no folder above it: the run folder may just have been renamed
    with written_atomically(path, parents=False) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save({"mark": _MARK, "format": FORMAT, **state}, file)
        except RuntimeError as error:  # torch's, in place of the file's own reason
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        write_text(_checksum_path(path), f"{_checksum(temporary)}  {path.name}\n", parents=False)
    found = states(folder)
    old = [one for one in found if one.name <= path.name][keep:]
    for one in [one for one in found if one.name > path.name] + old:
        one.unlink()
        _checksum_path(one).unlink(missing_ok=True)


def load_state(folder: str | Path, warn: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Reads the newest state that is whole, on the CPU, without running any code from the file.

    A damaged one is passed over for the one before it, and ``warn`` is told. Raises FileNotFoundError where
    there is none, ValueError where none is whole and for a state of another version.
    """
    found = states(folder)
    if not found:
        raise FileNotFoundError(f"{folder} has no training state: there is nothing to resume in this folder")
    damage = []
    for path in found:
        try:
            state = _read(path)
        except ValueError as error:
            damage.append(str(error))
            continue
        if state.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {state.get('format')!r}, this version of awnet reads {FORMAT}; resume "
                "with the version that wrote it, or start again with overwrite"
            )
        if damage and warn is not None:
            warn(f"{'; '.join(damage)}. Going back to the checkpoint before it, {path.name}")
        return state
    raise ValueError(f"{'; '.join(damage)}. Start again with overwrite, or in another folder")


_PARTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "optimizer", "scheduler", "weights", "average", "best", "best_model"), (dict,)),
    **dict.fromkeys(("of_epoch", "of_interval", "environment"), (dict,)),
    **dict.fromkeys(("epoch", "batch", "step", "skipped", "skipped_in_a_row", "log_bytes"), (int,)),
    **{"seconds": (int, float), "random": (list,), "finished": (bool,)},
}


def check_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Raises ValueError, naming the part, unless ``state`` is made of what the training loop writes."""
    for name, kinds in _PARTS.items():
        value = state.get(name)
        negative = kinds == (int,) and isinstance(value, int) and value < 0
        wrong = kinds == (list,) and isinstance(value, list) and not all(isinstance(v, dict) for v in value)
        wrong = wrong or negative or (isinstance(value, bool) and bool not in kinds)
        if not isinstance(value, kinds) or wrong:
            shown = value if isinstance(value, int | float) else type(value).__name__
            raise ValueError(
                f"the newest state in {folder} holds another content than training writes: {name} must be "
                f"{' or '.join(kind.__name__ for kind in kinds)}, got {shown}. Remove this state file to "
                "resume from the one before it, or start again with overwrite"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        expected = _checksum_path(path).read_text(encoding="utf-8").split()[0]
        found = _checksum(path)
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise ValueError(f"{path} or its checksum cannot be read ({type(error).__name__})") from error
    if found != expected:
        raise ValueError(f"{path} is truncated or damaged: its SHA-256 is not the one that was recorded")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{path} is no training state ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("mark") != _MARK:
        raise ValueError(f"{path} is no training state of this package")
    return state


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def on_host(value: Any) -> Any:
    """A copy on the CPU of all tensors in nested dicts, lists and tuples, which later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: on_host(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(on_host(one) for one in value)
    return copy.deepcopy(value)  # of a module's get_extra_state


class Writer:
    """Runs one job at a time in a thread of its own: training goes on while a checkpoint is written.

    An OSError of a job (a full disk, say) is told to ``warn`` and stays in ``failed`` until a later job
    succeeds; any other exception is raised by the next ``wait``.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.failed: OSError | None = None
        self._warn = warn
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return self._job is not None and not self._job.done()

    def submit(self, job: Callable[[], None]) -> None:
        """Starts ``job``, once the one before is done."""
        self.wait()
        self._job = self._thread.submit(self._run, job)

    def wait(self) -> None:
        """Returns when no job is running."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Waits, and ends the thread; raises nothing of the job's."""
        self._thread.shutdown()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except OSError as error:
            self.failed = error
            self._warn(
                f"warning: a checkpoint could not be written ({error}); the one before it is whole, the run "
                "goes on and tries again at the next: free some space"
            )
        else:
            self.failed = None


def check(folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Sees to it that a run may be written to ``folder``: new or empty, or a run to go on with or to replace.

    Runs in ``teachers`` and ``compared``, in a folder that holds nothing besides, count as the beginning of a
    run. Nothing is changed.

    Raises FileExistsError for a run without ``resume`` or ``overwrite``, and for a folder that holds anything
    else; ValueError for both together.
    """
    folder = expanded(folder)
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: go on with the run, or start it again")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out must be a folder, but {folder} is a file")
    if not folder.is_dir() or not _inside(folder):
        return
    if not is_run(folder) and not _begun(folder):
        raise FileExistsError(
            f"{folder} exists and holds no training run; nothing there is touched: choose another folder"
        )
    if not resume and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a run: go on with it (resume=True, --resume), replace it "
            "(overwrite=True, --overwrite), or choose another folder"
        )


def claim(folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Checks as ``check`` does; with ``overwrite`` deletes the run's own files and nothing else.

    Raises what ``check`` raises, and BlockingIOError where another process trains in a folder to overwrite.
    """
    check(folder, resume=resume, overwrite=overwrite)
    if overwrite and expanded(folder).is_dir():
        with locked(folder):
            _clear(expanded(folder))


def _clear(folder: Path) -> None:
    for name in _ENTRIES:
        entry = folder / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _inside(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.name != _LOCK and not is_temporary(entry)]


def _begun(folder: Path) -> bool:
    inner = _inside(folder)
    if not all(entry.name in ("teachers", "compared") and entry.is_dir() for entry in inner):
        return False
    # in this order: another process may just be writing its config.json
    return all(not _inside(run) or is_run(run) for entry in inner for run in entry.iterdir())


@contextmanager
def locked(folder: str | Path, warn: Callable[[str], None] | None = None) -> Iterator[None]:
    """``folder`` for this process alone, for a block of code; it is made where it is missing.

    Leftovers of killed processes are removed from it. Where the file system has no locks, ``warn`` is told.

    Raises:
        BlockingIOError: another process holds the lock; the message says which.
    """
    folder = expanded(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def busy() -> str:
        return (
            f"another process trains in {folder}{_trainer(folder)}: wait for it, stop it, or choose another "
            "folder"
        )

    with files.locked(folder / _LOCK, busy, warn):
        files.sweep(folder)
        yield


def _trainer(folder: Path) -> str:
    """Of the newest session, as far as there is one yet."""
    sessions = read_config(folder).get("sessions") if is_run(folder) else None
    return f" ({sessions[-1].get('process')}, since {sessions[-1].get('started')})" if sessions else ""


def open_folder(folder: str | Path, config: dict[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Claims a locked run folder, writes its config.json, and returns whether there is a run to go on with.

    A new or empty folder starts a run, with ``resume`` too. Raises what ``check`` raises, and ValueError for
    a resumed run whose recipe, model, data set, seed or teachers differ, naming each difference.
    """
    folder = expanded(folder)
    check(folder, resume=resume, overwrite=overwrite)
    if overwrite:
        _clear(folder)
    if not is_run(folder):
        write_config(folder, config)
        return False
    old = read_config(folder)
    then, now = comparable(old), comparable(config)
    found = [line for part in _COMPARED for line in differences(then.get(part), now.get(part), part)]
    if found:
        raise ValueError(
            f"{folder} cannot be resumed with another configuration: {'; '.join(found)}. Resume with the "
            "first values, or start again with overwrite or in another folder"
        )
    if old["dataset"].get("source") != config["dataset"].get("source"):  # the same images, elsewhere
        write_config(folder, old | {"dataset": config["dataset"]})
    return bool(states(folder))


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without what may change: where the images come from. Their fingerprints count."""
    dataset = config.get("dataset")
    if not isinstance(dataset, dict):
        return config
    return config | {"dataset": {name: value for name, value in dataset.items() if name != "source"}}


def write_config(folder: str | Path, config: dict[str, Any]) -> None:
    write_json(expanded(folder) / "config.json", {"kind": MARK, **config})


def differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """A line for every value in which two JSON-ready structures differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name), new.get(name), f"{path}.{name}")
    elif _plain(old) != _plain(new):
        yield f"{path} was {old!r}, is now {new!r}"


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's generators, on the CPU and on ``device``; ours need none (see ``awnet.rng``)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

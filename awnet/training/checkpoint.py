"""The run folder: its files, and how a run is resumed.

    config.json          everything that is needed to understand and repeat the run
    log.jsonl            one line per logging interval and per epoch
    tensorboard/         the same for TensorBoard
    last.safetensors     the weights of the newest checkpoint;  best.safetensors  of the best validation
    state/step-XXXXXXXX.pt         weights, best weights, optimizer, schedule, MTARD weights, random states,
                                   position and best score after so many steps; the newest few are kept
    state/step-XXXXXXXX.pt.sha256  its checksum, as ``sha256sum`` writes it
    .lock                empty; the process that trains holds a lock on it, which is released when it ends

``read_verified`` checks the checksum of a state whenever one is read. A run resumes from the newest undamaged
state, and everything else in the folder is set back to that state.
"""

from __future__ import annotations

import copy
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
from awnet.files import expanded, is_temporary, sha256, write_json, write_text, written_atomically
from awnet.run_config import MARK, is_run, read_config
from awnet.training.presets import with_defaults

FORMAT = 2
KEEP = 2  # number of states that are kept by default
_MARK = "awnet training state"
_LOCK = ".lock"
_ENTRIES = (
    *("config.json", "log.jsonl", "tensorboard", "last.safetensors", "best.safetensors", "state"),
    *("teachers", "compared", "evaluations", "report.json"),
)
# the parts of config.json that must not change when a run is resumed
_COMPARED = ("recipe", "model", "dataset", "seed", "selected_on", "teachers", "init_from")


def states(folder: str | Path) -> list[Path]:
    """The state files of a run, the newest first."""
    return sorted((expanded(folder) / "state").glob("step-????????.pt"), reverse=True)


def save_state(folder: str | Path, state: dict[str, Any], *, keep: int = KEEP) -> None:
    """Writes ``state`` (tensors, numbers, strings, lists and dicts of them) under its ``step``, atomically.

    The newest ``keep`` states are kept, this one included. Later states, which remain if a run resumed from
    the state before a damaged one, are deleted.
    """
    path = expanded(folder) / "state" / f"step-{state['step']:08d}.pt"
    path.parent.mkdir(exist_ok=True)  # no folder above it: the run folder may just have been renamed
    with written_atomically(path, parents=False) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save({"mark": _MARK, "format": FORMAT, **state}, file)
        except RuntimeError as error:  # torch hides the OSError of the file
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        write_text(_checksum_path(path), f"{sha256(temporary)}  {path.name}\n", parents=False)
    existing = states(folder)
    old = [state_path for state_path in existing if state_path.name <= path.name][keep:]
    for state_path in [state_path for state_path in existing if state_path.name > path.name] + old:
        state_path.unlink()
        _checksum_path(state_path).unlink(missing_ok=True)


def load_state(folder: str | Path, warn: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Reads the newest undamaged state to the CPU, without running code from the file.

    Args:
        folder: the run folder.
        warn: receives a line of text if a damaged state is skipped for the one before it.

    Raises:
        FileNotFoundError: there is no state.
        ValueError: all states are damaged, or the state has another version's format.
    """
    paths = states(folder)
    if not paths:
        raise FileNotFoundError(f"{folder} has no training state: there is nothing to resume in this folder")
    damage = []
    for path in paths:
        try:
            state = read_verified(path)
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
    """Raises ValueError, naming the part, unless ``state`` has the content that training writes."""
    for name, kinds in _PARTS.items():
        value = state.get(name)
        negative = kinds == (int,) and isinstance(value, int) and value < 0
        wrong = kinds == (list,) and isinstance(value, list) and not all(isinstance(v, dict) for v in value)
        wrong = wrong or negative or (isinstance(value, bool) and bool not in kinds)
        if not isinstance(value, kinds) or wrong:
            shown = value if isinstance(value, int | float) else type(value).__name__
            raise ValueError(
                f"the newest state in {folder} is not what training writes: {name} must be "
                f"{' or '.join(kind.__name__ for kind in kinds)}, got {shown}. Remove this state file to "
                "resume from the one before it, or start again with overwrite"
            )


def read_verified(path: Path) -> dict[str, Any]:
    """Verifies the checksum of a state and loads it; ValueError if it is damaged or foreign."""
    try:
        expected = _checksum_path(path).read_text(encoding="utf-8").split()[0]
        checksum = sha256(path)
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise ValueError(f"{path} or its checksum cannot be read ({type(error).__name__})") from error
    if checksum != expected:
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
        raise ValueError(f"{path} is not a training state ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("mark") != _MARK:
        raise ValueError(f"{path} is not a training state of this package")
    return state


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def on_host(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples with all tensors copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: on_host(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(on_host(one) for one in value)
    return copy.deepcopy(value)  # values of get_extra_state


class Writer:
    """Runs one job at a time in a separate thread, so that training continues while a checkpoint is written.

    If a job raises OSError (a full disk), ``warn`` receives a line of text, and ``failed`` holds the error
    until a later job succeeds. Any other exception is raised by the next ``wait``.
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
        """Starts ``job`` after the previous one is done."""
        self.wait()
        self._job = self._thread.submit(self._run, job)

    def wait(self) -> None:
        """Waits until no job is running."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Waits and ends the thread; exceptions of the job are not raised."""
        self._thread.shutdown()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except OSError as error:
            self.failed = error
            self._warn(
                f"warning: a checkpoint could not be written ({error}); the one before it is complete. "
                "The run continues and tries again at the next checkpoint: free some space"
            )
        else:
            self.failed = None


def check(folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Checks that a run may be written to ``folder``; changes nothing.

    The folder may be new or empty, or hold a run that is resumed or overwritten. A folder that holds nothing
    but runs in ``teachers`` and ``compared`` counts as a run that has begun.

    Raises:
        FileExistsError: the folder holds a run and neither ``resume`` nor ``overwrite`` is set, or something
            else.
        ValueError: both ``resume`` and ``overwrite`` are set.
    """
    folder = expanded(folder)
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: resume the run, or start it again")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out must be a folder, but {folder} is a file")
    if not folder.is_dir() or not _entries(folder):
        return
    if not is_run(folder) and not _has_begun(folder):
        raise FileExistsError(
            f"{folder} exists and holds no training run; nothing there is touched: choose another folder"
        )
    if not resume and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a run: resume it (resume=True, --resume), replace it "
            "(overwrite=True, --overwrite), or choose another folder"
        )


def claim(folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """:func:`check`, and with ``overwrite`` deletes the files of the run and nothing else.

    Raises:
        FileExistsError, ValueError: as :func:`check`.
        BlockingIOError: another process trains in the folder.
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


def _entries(folder: Path) -> list[Path]:
    """The files and folders in ``folder``, without the lock and temporary files."""
    return [entry for entry in folder.iterdir() if entry.name != _LOCK and not is_temporary(entry)]


def _has_begun(folder: Path) -> bool:
    """Whether ``folder`` holds nothing but runs in ``teachers`` and ``compared``."""
    entries = _entries(folder)
    if not all(entry.name in ("teachers", "compared") and entry.is_dir() for entry in entries):
        return False
    # is_run comes second: another process may write its config.json between the two
    return all(not _entries(run) or is_run(run) for entry in entries for run in entry.iterdir())


@contextmanager
def locked(folder: str | Path, warn: Callable[[str], None] | None = None) -> Iterator[None]:
    """Locks ``folder`` for this process for a block of code; creates it if it is missing.

    Temporary files of killed processes are removed from it. If the file system has no locks, ``warn``
    receives a line of text.

    Raises:
        BlockingIOError: another process holds the lock; the message names it.
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
    """The process of the newest session, if there is one."""
    sessions = read_config(folder).get("sessions") if is_run(folder) else None
    return f" ({sessions[-1].get('process')}, since {sessions[-1].get('started')})" if sessions else ""


def open_folder(folder: str | Path, config: dict[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Prepares a locked run folder and writes its config.json; returns whether there is a run to resume.

    A new or empty folder starts a run, also with ``resume``.

    Raises:
        FileExistsError: as :func:`check`.
        ValueError: recipe, model, data set, seed or teachers differ from the run to resume; the message names
            each difference.
    """
    folder = expanded(folder)
    check(folder, resume=resume, overwrite=overwrite)
    if overwrite:
        _clear(folder)
    if not is_run(folder):
        write_config(folder, config)
        return False
    old = read_config(folder)
    before, now = comparable(old), comparable(config)
    changed = [line for part in _COMPARED for line in differences(before.get(part), now.get(part), part)]
    if changed:
        raise ValueError(
            f"{folder} cannot be resumed with another configuration: {'; '.join(changed)}. Resume with the "
            "first values, or start again with overwrite or in another folder"
        )
    if old["dataset"].get("source") != config["dataset"].get("source"):  # the same images in another place
        write_config(folder, old | {"dataset": config["dataset"]})
    return bool(states(folder))


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the values that a resumed run may change: the images' path, ``capture``.

    Settings of the recipe that an earlier version did not have get their defaults.
    """

    def without(part: Any, name: str) -> Any:
        return {key: part[key] for key in part if key != name} if isinstance(part, dict) else part

    config = dict(config)
    if "dataset" in config:
        # runs of earlier versions recorded no norm
        config["dataset"] = {"norm": "Linf"} | without(config["dataset"], "source")
    if "recipe" in config:
        config["recipe"] = with_defaults(without(config["recipe"], "capture"))
    teachers = config.get("teachers")
    if isinstance(teachers, dict):
        config["teachers"] = {k: comparable(v) if isinstance(v, dict) else v for k, v in teachers.items()}
    return config


def write_config(folder: str | Path, config: dict[str, Any]) -> None:
    write_json(expanded(folder) / "config.json", {"kind": MARK, **config})


def differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """One line for each value in which two JSON-ready structures differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name), new.get(name), f"{path}.{name}")
    elif _plain(old) != _plain(new):
        yield f"{path} was {old!r}, is now {new!r}"


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators on the CPU and on ``device``; ``awnet.rng`` has no state."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

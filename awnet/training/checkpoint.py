"""The run folder: what it is made of, and how a run is picked up again.

    config.json          all that is needed to understand and repeat the run
    log.jsonl            a line per logging interval and per epoch
    tensorboard/         the same for TensorBoard
    last.safetensors     the weights at the newest checkpoint;  best.safetensors  at the best validation
    state/training.pt    weights, optimiser, schedule, MTARD weights, random states, position, best score

``state/training.pt`` alone decides where a run goes on: it is one file, so it is whole and of one moment.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awnet.files import read_json, write_json, written_atomically

FORMAT = 1
_MARK = "awnet training state"
_CONFIG_MARK = "awnet run"
_ENTRIES = (
    *("config.json", "log.jsonl", "tensorboard", "last.safetensors", "best.safetensors", "state"),
    *("teachers", "compared", "evaluations", "report.json"),
)
# The parts of config.json that a resumed run must share with the one that it goes on with.
_COMPARED = ("recipe", "model", "dataset", "seed", "selected_on", "teachers")


def state_path(folder: str | Path) -> Path:
    return Path(folder) / "state" / "training.pt"


def save_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors, numbers, strings, and lists and dicts of them), atomically."""
    with written_atomically(state_path(folder)) as temporary:
        torch.save({"mark": _MARK, "format": FORMAT, **state}, temporary)


def load_state(folder: str | Path) -> dict[str, Any]:
    """Reads what ``save_state`` wrote, on the CPU, without running any code from the file.

    Raises FileNotFoundError where there is none, ValueError for a truncated, damaged or foreign file.
    """
    path = state_path(folder)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: there is nothing to resume in this folder")
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
        raise ValueError(
            f"{path} is truncated, damaged or no training state ({type(error).__name__}); start again with "
            "overwrite, or in another folder"
        ) from error
    if not isinstance(state, dict) or state.get("mark") != _MARK:
        raise ValueError(f"{path} is no training state of this package; start again with overwrite")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {state.get('format')!r}, this version of awnet reads {FORMAT}; resume with "
            "the version that wrote it, or start again with overwrite"
        )
    return state


def is_run(folder: str | Path) -> bool:
    """Whether ``folder`` holds a run's config.json."""
    path = Path(folder) / "config.json"
    return path.is_file() and _is_config(read_json(path))


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and value.get("kind") == _CONFIG_MARK


def claim(folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Sees to it that a run may be written to ``folder``: new or empty, or a run to go on with or to replace.

    ``overwrite`` deletes the run's own files and nothing else. Runs in ``teachers`` and ``compared``, in a
    folder that holds nothing besides, count as the beginning of a run.

    Raises FileExistsError for a run without ``resume`` or ``overwrite``, and for a folder that holds anything
    else; ValueError for both together.
    """
    folder = Path(folder)
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: go on with the run, or start it again")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out must be a folder, but {folder} is a file")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not is_run(folder) and not _begun(folder):
        raise FileExistsError(
            f"{folder} exists and holds no training run; nothing there is touched: choose another folder"
        )
    if overwrite:
        for name in _ENTRIES:
            entry = folder / name
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
    elif not resume:
        raise FileExistsError(
            f"{folder} already holds a run: go on with it (resume=True, --resume), replace it "
            "(overwrite=True, --overwrite), or choose another folder"
        )


def _begun(folder: Path) -> bool:
    inner = list(folder.iterdir())
    if not all(entry.name in ("teachers", "compared") and entry.is_dir() for entry in inner):
        return False
    return all(is_run(run) or not any(run.iterdir()) for entry in inner for run in entry.iterdir())


def open_folder(folder: str | Path, config: dict[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Claims a run folder, writes its config.json, and returns whether there is a run to go on with.

    A new or empty folder starts a run, with ``resume`` too. Raises what ``claim`` raises, and ValueError for
    a resumed run whose recipe, model, data set, seed or teachers differ, naming each difference.
    """
    folder = Path(folder)
    claim(folder, resume=resume, overwrite=overwrite)
    if not is_run(folder):
        write_config(folder, config)
        return False
    old = read_config(folder)
    found = [line for part in _COMPARED for line in differences(old.get(part), config.get(part), part)]
    if found:
        raise ValueError(
            f"{folder} cannot be resumed with another configuration: {'; '.join(found)}. Resume with the "
            "first values, or start again with overwrite or in another folder"
        )
    return state_path(folder).exists()


def write_config(folder: str | Path, config: dict[str, Any]) -> None:
    write_json(Path(folder) / "config.json", {"kind": _CONFIG_MARK, **config})


def read_config(folder: str | Path) -> dict[str, Any]:
    """The run's config.json; FileNotFoundError or ValueError where there is none that could be read."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json")
    config = read_json(path)
    if not _is_config(config):
        raise ValueError(f"{path} does not describe a training run")
    return config


def differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """A line for every value in which two JSON-ready structures differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name), new.get(name), f"{path}.{name}")
    elif _plain(old) != _plain(new):
        yield f"{path} was {old!r}, is now {new!r}"


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's names, shapes and weights, in hex."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's generators, on the CPU and on ``device``; ours need none (see ``awnet.rng``)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

"""Trained models that belong to the package, as ``zoo:NAME``: run folders with checksums.

``registry.json`` in ``awnet/zoo`` lists them. The files of a small model are in the package; those of others
are downloaded to awnet's cache folder. In a clone, :func:`add_run` adds a run to the package.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from awnet.files import cache_folder, expanded, read_json, sha256
from awnet.models.files import load_model_file, save_model
from awnet.run_config import read_config

FOLDER = Path(__file__).resolve().parent.parent / "zoo"
WEIGHTS = "best.safetensors"


@dataclass(frozen=True)
class ZooModel:
    """One entry of the registry.

    about: a sentence: network, data, training, accuracy.
    files: the SHA-256 of each file of the run folder, by its path within the folder.
    url: address of the folder that holds the files; None if they are in the package.
    """

    about: str
    files: Mapping[str, str]
    url: str | None = None


def zoo_models(folder: Path = FOLDER) -> dict[str, ZooModel]:
    """The entries of the registry in ``folder``, by name."""
    path = folder / "registry.json"
    return {name: ZooModel(**entry) for name, entry in read_json(path).items()} if path.is_file() else {}


def zoo_folder(name: str, folder: Path = FOLDER) -> Path:
    """The run folder of the model ``name``; downloads it if it is not in the package.

    Raises:
        ValueError: there is no such model, or a file has another checksum.
        ConnectionError: a file cannot be downloaded.
    """
    models = zoo_models(folder)
    if name not in models:
        raise ValueError(f"the zoo has no model {name!r}: it has {', '.join(models) or 'none'}")
    entry = models[name]
    if entry.url is not None:
        return _downloaded(name, entry, entry.url)
    for file, checksum in entry.files.items():
        path = folder / name / file
        if not path.is_file():
            raise ValueError(f"{path} is missing: install awnet again")
        if sha256(path) != checksum:
            raise ValueError(f"{path} was changed: its SHA-256 is not {checksum}; install awnet again")
    return folder / name


def _downloaded(name: str, entry: ZooModel, url: str) -> Path:
    import pooch

    target = cache_folder("zoo") / name
    pooch.get_logger().setLevel("WARNING")
    for file, checksum in entry.files.items():
        path = target / file
        try:
            pooch.retrieve(f"{url}/{file}", f"sha256:{checksum}", fname=path.name, path=path.parent)
        except OSError as error:
            raise ConnectionError(
                f"{url}/{file} could not be downloaded: {error}. Without a network, copy the file to {path}"
            ) from error
    return target


def rounded_copy(run: str | Path, target: str | Path, storage: torch.dtype = torch.bfloat16) -> Path:
    """Copies a finished run with its large weights rounded to ``storage``; returns ``target``.

    ``target`` has no report: evaluate it, so that the report describes the rounded weights, before
    :func:`add_run`.

    Raises:
        FileExistsError: ``target`` exists.
    """
    run, target = expanded(run), expanded(target)
    read_config(run, whole=True)
    model = load_model_file(run)
    target.mkdir(parents=True)
    save_model(model, target / WEIGHTS, storage=storage)
    for name in ("config.json", "log.jsonl"):
        if (run / name).is_file():
            shutil.copyfile(run / name, target / name)
    return target


def add_run(
    run: str | Path,
    name: str,
    about: str,
    folder: Path = FOLDER,
    *,
    teachers: bool = True,
    url: str | None = None,
) -> Path:
    """Copies a finished run with its report and its teachers to the package; returns the new folder.

    Only the last session of the run's record is stored, without absolute paths. A teacher that several models
    of the zoo have is stored once.

    Args:
        run: a run folder. Its report is ``report.json`` or else ``evaluations/default/report.json``.
        name: name of the model: it is loaded as ``zoo:NAME``.
        about: a sentence: network, data, training, accuracy.
        folder: folder of the registry.
        teachers: False stores no teacher: the record names its SHA-256, and attacks that use teachers need
            them as files.
        url: address that the copied files will have. They are then not part of the package: move the returned
            folder there.

    Raises:
        FileExistsError: the model exists.
        FileNotFoundError: a file of the run or of a teacher is missing.
    """
    run = expanded(run)
    config = read_config(run, whole=True)
    target = folder / name
    if target.exists():
        raise FileExistsError(f"{target} exists: remove it first")
    target.mkdir(parents=True)
    shutil.copyfile(run / WEIGHTS, target / WEIGHTS)
    reports = (run / "report.json", run / "evaluations" / "default" / "report.json")
    if report := next((path for path in reports if path.is_file()), None):
        shutil.copyfile(report, target / "report.json")
    config["sessions"] = [
        _without_paths(run, session, target, teachers) for session in config["sessions"][-1:]
    ]
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    stored = sorted(path for path in target.rglob("*") if path.is_file())
    files = {path.relative_to(target).as_posix(): sha256(path) for path in stored}
    models = zoo_models(folder) | {name: ZooModel(about, files, url)}
    text = json.dumps({key: asdict(models[key]) for key in sorted(models)}, indent=1, ensure_ascii=False)
    (folder / "registry.json").write_text(text + "\n", encoding="utf-8")
    return target


def _without_paths(run: Path, session: dict[str, Any], target: Path, store: bool) -> dict[str, Any]:
    """The record of a session without absolute paths; its teachers are copied if ``store``."""
    teachers = {}
    for kind, source in (session.get("teachers") or {}).items():
        if not store:
            teachers[kind] = source | {"path": None, "from_run": f"teachers/{kind}"}
            continue
        candidates = [run / source["from_run"], *([Path(source["path"])] if source["path"] else [])]
        teacher = next((path for path in candidates if path.exists()), None)
        if teacher is None:
            raise FileNotFoundError(
                f"the {kind} teacher of {run} is not in {' or '.join(map(str, candidates))}"
            )
        weights = teacher / WEIGHTS if teacher.is_dir() else teacher
        others = target.parent.glob(f"*/teachers/*/{WEIGHTS}")
        stored = next((path for path in others if sha256(path) == sha256(weights)), None)
        if stored is None:
            stored = target / "teachers" / kind / WEIGHTS
            stored.parent.mkdir(parents=True)
            shutil.copyfile(weights, stored)
        relative = os.path.relpath(stored.parent, target)
        teachers[kind] = source | {"path": None, "from_run": Path(relative).as_posix()}
    words = str(session.get("command", "")).split()
    command = " ".join(Path(word).name if Path(word).is_absolute() else word for word in words)
    command = command.replace("__main__.py", "awnet", 1)
    return {key: value for key, value in session.items() if key != "process"} | {
        "command": command,
        "teachers": teachers,
    }

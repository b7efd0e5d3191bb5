"""config.json of a run folder: reading it, with every value that a tool relies on checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from awnet.files import expanded, read_json
from awnet.scalars import is_integer, is_number

MARK = "awnet run"
_SPLITS = ("train", "validation", "test")


def is_run(folder: str | Path) -> bool:
    """Whether ``folder`` holds a run's config.json. ValueError where that file is damaged."""
    path = expanded(folder) / "config.json"
    return path.is_file() and _is_config(read_json(path))


def read_config(folder: str | Path, *, whole: bool = False) -> dict[str, Any]:
    """The run's config.json; with ``whole``, every entry that the tools rely on is in it.

    FileNotFoundError where there is none, ValueError, naming file and entry, where it is damaged or where a
    value has another type than a run writes.
    """
    path = expanded(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json")
    config = read_json(path)
    if not _is_config(config):
        raise ValueError(f"{path} does not describe a training run: its kind is not {MARK!r}")
    for name, holds, expected, required in _ENTRIES:
        value = _entry(config, name)
        if value is _MISSING and whole and required:
            raise _damaged(path, f"{name} is missing")
        if value is not _MISSING and not holds(value):
            shown = repr(value)
            raise _damaged(path, f"{name} must be {expected}, got {shown[:60]}{'…' * (len(shown) > 60)}")
    return config


def _damaged(path: Path, found: str) -> ValueError:
    return ValueError(
        f"{path} was changed or damaged: {found}. Restore it from a copy; the weights alone can be used by "
        "copying the .safetensors file out of the run folder and giving --data"
    )


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and value.get("kind") == MARK


_MISSING: Any = object()


def _entry(config: dict[str, Any], name: str | None) -> Any:
    """The value at a dotted ``name``; ``_MISSING`` where there is none, or above it something else."""
    value: Any = config
    for key in name.split(".") if name else ():
        if not isinstance(value, dict) or key not in value:
            return _MISSING
        value = value[key]
    return value


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 < value <= 1


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(split), str) for split in _SPLITS)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(is_integer(v) and v >= 1 for v in value)


def _are_teachers(value: Any) -> bool:
    """By kind the path, that from the run folder and the weights' SHA-256; earlier versions: paths alone."""
    if isinstance(value, dict):
        return all(
            isinstance(source, dict)
            and all(
                source.get(name) is None or _is_text(source[name]) for name in ("path", "from_run", "weights")
            )
            for source in value.values()
        )
    return value is None or (isinstance(value, list) and all(map(_is_text, value)))


def _are_sessions(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(session, dict)
        and _are_teachers(session.get("teachers"))
        and isinstance(session.get("environment", {}), dict)
        for session in value
    )


_ENTRIES: tuple[tuple[str, Callable[[Any], bool], str, bool], ...] = (
    ("recipe", _is_dict, "a dict", True),
    ("recipe.name", _is_text, "a recipe's name", True),
    ("model", _is_dict, "a dict", True),
    ("model.name", _is_text, "a model's name", True),
    ("dataset", _is_dict, "a dict", True),
    ("dataset.name", _is_text, "a data set's name", True),
    ("dataset.source", _is_text, "a text", True),
    ("dataset.eps", _is_share, "a number in (0, 1]", True),
    ("dataset.fingerprints", _are_texts, f"a text for each of {', '.join(_SPLITS)}", True),
    ("input", _are_sizes, "[channels, height, width]", False),
    ("seed", is_integer, "an integer", True),
    ("selected_on", lambda v: v in ("validation", "test"), "'validation' or 'test'", True),
    ("teachers", lambda v: v is None or _is_dict(v), "null or a dict", True),
    ("sessions", _are_sessions, "a list of dicts, with paths as teachers", True),
)

"""config.json of a run folder: reads it and checks every value that other parts rely on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from awnet.files import expanded, read_json
from awnet.scalars import is_integer, is_number

MARK = "awnet run"
_SPLITS = ("train", "validation", "test")


def is_run(folder: str | Path) -> bool:
    """Whether ``folder`` contains a run's config.json; ValueError if that file is damaged."""
    path = expanded(folder) / "config.json"
    return path.is_file() and _is_config(read_json(path))


def read_config(folder: str | Path, *, whole: bool = False) -> dict[str, Any]:
    """The run's config.json.

    Args:
        folder: the run folder.
        whole: whether every entry that other parts rely on must exist.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is damaged, or a value has another type than a run writes; the message names file and
            entry.
    """
    path = expanded(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.json")
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


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"{path} was changed or damaged: {problem}. Restore it from a copy; the weights alone can be used by "
        "copying the .safetensors file out of the run folder and giving --data"
    )


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and value.get("kind") == MARK


_MISSING: Any = object()


def _entry(config: dict[str, Any], name: str) -> Any:
    """The value at a dotted ``name``; ``_MISSING`` if there is none."""
    value: Any = config
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return _MISSING
        value = value[key]
    return value


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


_is_dict, _is_text = _is(dict), _is(str)


def _is_size(value: Any) -> bool:
    return is_number(value) and value > 0


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(split), str) for split in _SPLITS)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(is_integer(v) and v >= 1 for v in value)


def _are_teachers(value: Any) -> bool:
    """Paths and SHA-256 of the weights by kind; earlier versions stored a list of paths."""
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
    ("dataset.eps", _is_size, "a number above 0", True),
    ("dataset.norm", lambda v: v in ("Linf", "L2", "L1"), "'Linf', 'L2' or 'L1'", False),
    ("dataset.fingerprints", _are_texts, f"a text for each of {', '.join(_SPLITS)}", True),
    ("input", _are_sizes, "[channels, height, width]", False),
    ("seed", is_integer, "an integer", True),
    ("selected_on", lambda v: v in ("validation", "test"), "'validation' or 'test'", True),
    ("teachers", lambda v: v is None or _is_dict(v), "null or a dict", True),
    ("sessions", _are_sessions, "a list of dicts, with paths as teachers", True),
)

"""The user's Python code, by name: ``FILE.py``, ``MODULE``, ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``.

Code runs only if the user names it; no file of a run is ever executed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from awnet.files import expanded


def is_function(name: str) -> bool:
    """Whether ``name`` is ``CODE:FUNCTION`` rather than a model's name."""
    return ":" in name


def build_model(name: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """The module that a function ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION`` returns for ``options``.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the code cannot be imported.
        ValueError: it has no such function, or the function raises an error.
        TypeError: the function returns something else than a module.
    """
    code, _, function_name = name.rpartition(":")
    if not code or not function_name:
        raise ValueError(f"expected FILE.py:FUNCTION or MODULE:FUNCTION, got {name!r}")
    function = getattr(import_code(code), function_name, None)
    if not callable(function):
        raise ValueError(f"{code} has no function {function_name!r}")
    try:
        model = function(**(options or {}))
    except Exception as error:
        raise ValueError(f"{name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must return an nn.Module, got {type(model).__name__}")
    return model


def import_code(name: str) -> ModuleType:
    """The module of a Python file or of an importable name, looked up in the current folder as well.

    A file's module is named after it, and its folder is importable from it, as with ``python FILE.py``.
    Raises FileNotFoundError if there is no such file, and ImportError for any error in the code.
    """
    path = expanded(name)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise FileNotFoundError(f"{name} is not a file: give a Python file, or the name of a module")
    folder = str(path.resolve().parent) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _module_of(path.resolve()) if is_file else importlib.import_module(name)
    except Exception as error:
        raise ImportError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def _module_of(path: Path) -> ModuleType:
    name = re.sub(r"\W", "_", path.stem)
    present = sys.modules.get(name)
    if present is not None:
        if Path(getattr(present, "__file__", None) or "").resolve() == path:
            return present
        raise ImportError(f"a module {name!r} is loaded already, from elsewhere: rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

"""Checks of a recipe's settings, which name the setting in the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check(
    recipe: Any, name: str, right_type: Callable[[Any], bool], holds: Callable[..., bool], expected: str
) -> None:
    """Raises ValueError unless the setting ``name`` has the right type and ``holds``."""
    value = getattr(recipe, name)
    if not right_type(value) or not holds(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_choice(recipe: Any, name: str, *choices: str) -> None:
    """Raises ValueError unless the setting ``name`` is one of ``choices``."""
    check(recipe, name, lambda v: isinstance(v, str), lambda v: v in choices, f"one of {choices}")

"""Checks of numeric options.

A numpy scalar and a 0-d array or tensor count as the number that they contain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

INT64_MAX = 2**63 - 1  # the largest int64
# tuples, because Dynamo cannot trace a union of numpy's types
_SCALARS, _ARRAYS = (np.number, np.bool_), (np.ndarray, torch.Tensor)


def plain(value: Any) -> Any:
    """A numpy scalar or a 0-d array or tensor as Python's int, float, bool or complex.

    Lists and tuples are converted item by item. Any other value is returned unchanged.
    """
    if type(value) in (int, float, bool, str, type(None)):
        return value
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, _SCALARS) or (isinstance(value, _ARRAYS) and value.ndim == 0):
        return value.item()
    return value


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an int, not a bool, within the range of int64."""
    return isinstance(value, int) and not isinstance(value, bool) and -INT64_MAX - 1 <= value <= INT64_MAX


def is_number(value: Any) -> bool:
    """Whether ``value`` is an int or a float, not a bool, and finite as a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int larger than any float
        return False


def check_integer(name: str, value: Any, least: int | None = None, most: int = INT64_MAX) -> int:
    """``value`` as an int in [``least``, ``most``].

    Raises TypeError for another type, ValueError for a value out of range.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {_short_repr(value)}")
    if (least is not None and value < least) or not -INT64_MAX - 1 <= value <= most:
        if least is not None and (value < least or most < INT64_MAX):
            between = f"an integer of at least {least}" if most == INT64_MAX else f"in [{least}, {most}]"
        else:
            between = "an integer that int64 holds"
        raise ValueError(f"{name} must be {between}, got {_short_repr(value)}")
    return value


def check_integers(name: str, values: Any, least: int | None = None) -> list[int]:
    """``values``, a sequence, as a list of ints of at least ``least``; errors as in ``check_integer``."""
    values = plain(values.tolist() if isinstance(values, np.ndarray | torch.Tensor) else values)
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise TypeError(f"{name} must be a list of integers, got {_short_repr(values)}")
    return [check_integer(f"{name}[{i}]", value, least) for i, value in enumerate(values)]


def check_number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf
) -> float:
    """``value`` as a finite float in [``least``, ``most``] and greater than ``above``.

    Raises TypeError for another type, ValueError for a value out of range.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {_short_repr(value)}")
    if not is_number(value) or not least <= value <= most or not value > above:
        low, bracket = (above, "(") if above > least else (least, "[")
        if most < math.inf:
            between = f"in {bracket}{low:g}, {most:g}]"
        elif low > -math.inf:
            between = f"finite and {'above' if bracket == '(' else 'at least'} {low:g}"
        else:
            between = "finite"
        raise ValueError(f"{name} must be {between}, got {_short_repr(value)}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """``value`` as a bool; TypeError for anything else."""
    value = plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_short_repr(value)}")
    return value


def _short_repr(value: Any) -> str:
    if isinstance(value, int) and not -INT64_MAX - 1 <= value <= INT64_MAX:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

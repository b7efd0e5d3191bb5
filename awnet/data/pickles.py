"""Reads the pickles of the published CIFAR folders without running anything that is in them.

A pickle may name any function of any module and have it called. Here the only names that resolve are those
by which numpy writes an array, and they resolve to stand-ins that merely note their arguments; the array is
then made by us from the noted bytes, after checks.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np


class _Dtype:
    """Stands for ``numpy.dtype`` in the pickle: whole numbers only."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code.decode("latin-1") if isinstance(code, bytes) else code
        if self.code not in {"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"}:
            raise pickle.UnpicklingError(
                f"an array of dtype {str(self.code)[:20]!r}, only whole numbers are read"
            )
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.decode("latin-1") if isinstance(order, bytes) else order
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a dtype with an unknown byte order")
        self.order = order


class _Array:
    """Stands for ``numpy.ndarray`` in the pickle."""

    values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        try:
            _, shape, dtype, fortran, raw = state
        except (TypeError, ValueError):
            raise pickle.UnpicklingError("an array with an unknown state") from None
        self.values = _values(raw, dtype, shape, "F" if fortran else "C")


class _Reconstruct:
    """Stands for the function that makes an empty array, which ``_Array.__setstate__`` fills."""

    def __new__(cls, subtype: Any, *_: Any) -> Any:
        if subtype is not _Array:
            raise pickle.UnpicklingError("an array of an unknown type")
        return _Array()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a function")


class _FromBuffer:
    """Stands for the function by which protocol 5 makes an array."""

    def __new__(cls, raw: Any, dtype: Any, shape: Any, order: Any) -> Any:
        array = _Array()
        array.values = _values(raw, dtype, shape, "F" if order in ("F", b"F") else "C")
        return array

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a function")


def _values(raw: Any, dtype: Any, shape: Any, order: Literal["C", "F"]) -> np.ndarray:
    sizes = shape if isinstance(shape, tuple) else ()
    if not isinstance(dtype, _Dtype) or not sizes or not all(type(n) is int and n >= 0 for n in sizes):
        raise pickle.UnpicklingError("an array with an unknown dtype or shape")
    if isinstance(raw, str):  # Python 2 wrote the bytes as a string
        raw = raw.encode("latin-1")
    if not isinstance(raw, (bytes, bytearray)):
        raise pickle.UnpicklingError("an array of objects, only whole numbers are read")
    flat = np.frombuffer(raw, np.dtype(dtype.order + dtype.code))
    if flat.size != math.prod(sizes):
        raise pickle.UnpicklingError(f"an array of shape {sizes} with {flat.size} values")
    return flat.reshape(sizes, order=order)


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer,
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer,
}


# the Python unpickler: the C one sets up as much memory as a hostile memo index asks for
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def read_pickle(path: Path) -> dict[str, Any]:
    """The dict in a published CIFAR file: text keys, with lists, text, whole numbers and integer arrays.

    ValueError with the path when it is damaged, or holds or asks for anything else.
    """
    try:
        value = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: {error}. Published CIFAR files need only plain containers and integer "
            "arrays; this one is damaged or hostile. Get it again from its publisher"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any of the unpickler's own operations
        raise ValueError(f"{path} is damaged, or not a pickle: {type(error).__name__}: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(name, (str, bytes)) for name in value):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a dict with text keys")
    return {_text(name): _plain(item, path, _text(name)) for name, item in value.items()}


def _plain(value: Any, path: Path, name: str) -> Any:
    if isinstance(value, _Array):
        if value.values is None:
            raise ValueError(f"{path}: {name!r} is an array without values")
        return value.values
    if isinstance(value, (list, tuple)):
        return [_text(item) for item in value]
    return _text(value)

"""Reads the pickles of the published CIFAR folders without executing their content.

A pickle may name any function of any module and have it called. Here only the names that numpy uses to write
an array resolve, and they resolve to replacements that record their arguments; the array is then created from
the recorded bytes, after checks.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np


class _Dtype:
    """Replaces ``numpy.dtype``; ``_values`` accepts only integers."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code.decode("latin-1") if isinstance(code, bytes) else code
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.decode("latin-1") if isinstance(order, bytes) else order
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a dtype with an unknown byte order")
        self.order = order


class _Array:
    """Replaces ``numpy.ndarray``: records the parts of the array; :meth:`values` creates it.

    Until then it needs no memory, however often a pickle refers to the same bytes.
    """

    parts: tuple[Any, Any, Any, bool] | None = None  # bytes, dtype, shape, column order

    def __setstate__(self, state: Any) -> None:
        try:
            _, shape, dtype, fortran, raw = state
        except (TypeError, ValueError):
            raise pickle.UnpicklingError("an array with an unknown state") from None
        self.parts = raw, dtype, shape, bool(fortran)

    def values(self) -> np.ndarray:
        if self.parts is None:
            raise pickle.UnpicklingError("an array without values")
        raw, dtype, shape, fortran = self.parts
        return _values(raw, dtype, shape, "F" if fortran else "C")


class _Function:
    """Replaces a function; a call only creates a recorded value."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a function")


class _Reconstruct(_Function):
    """Creates an empty array, which ``_Array.__setstate__`` fills."""

    def __new__(cls, subtype: Any, *_: Any) -> Any:
        if subtype is not _Array:
            raise pickle.UnpicklingError("an array of an unknown type")
        return _Array()


class _FromBuffer(_Function):
    """Creates an array in protocol 5."""

    def __new__(cls, raw: Any, dtype: Any, shape: Any, order: Any) -> Any:
        array = _Array()
        array.parts = raw, dtype, shape, order in ("F", b"F")
        return array


class _Scalar(_Function):
    """Creates a numpy scalar, such as a label taken from an array."""

    def __new__(cls, dtype: Any, raw: Any = b"") -> Any:
        return _values(raw, dtype, (1,), "C")[0].item()


class _Encode(_Function):
    """Creates bytes from text, as protocols 0 to 2 of Python 3 write them."""

    def __new__(cls, text: Any, encoding: Any = None) -> Any:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("bytes in an unknown encoding")
        return _Latin1(text)


class _Latin1:
    """Bytes that are still text; ``_values`` encodes them for each requested array."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Bytes(_Function):
    """Creates empty bytes, which protocols 0 to 2 write as a call."""

    def __new__(cls) -> Any:
        return b""


class _OrderedDict(dict[Any, Any]):
    """Replaces ``collections.OrderedDict``; items are set one by one, never copied from another dict."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a dict")


def _values(raw: Any, dtype: Any, shape: Any, order: Literal["C", "F"]) -> np.ndarray:
    sizes = shape if isinstance(shape, tuple) else ()
    if not isinstance(dtype, _Dtype) or not sizes or not all(type(n) is int and n >= 0 for n in sizes):
        raise pickle.UnpicklingError("an array with an unknown dtype or shape")
    if dtype.code not in {"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"}:
        raise pickle.UnpicklingError(
            f"an array of dtype {str(dtype.code)[:20]!r}, only whole numbers are supported"
        )
    raw = raw.text if isinstance(raw, _Latin1) else raw
    if isinstance(raw, str):  # Python 2 wrote the bytes as a string
        raw = raw.encode("latin-1")
    if not isinstance(raw, (bytes, bytearray)):
        raise pickle.UnpicklingError("an array of objects, only whole numbers are supported")
    flat = np.frombuffer(raw, np.dtype(dtype.order + dtype.code))
    if flat.size != math.prod(sizes):
        raise pickle.UnpicklingError(f"an array of shape {sizes} with {flat.size} values")
    return flat.reshape(sizes, order=order)


_REPLACEMENTS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer,
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy._core.multiarray", "scalar"): _Scalar,
    ("_codecs", "encode"): _Encode,
    ("__builtin__", "bytes"): _Bytes,
    ("collections", "OrderedDict"): _OrderedDict,
}


# the Python unpickler: the C version allocates as much memory as a malicious memo index requests
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    read: Any  # set by load()
    append: Any

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _REPLACEMENTS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it requests {module}.{name}") from None

    def load_bytearray8(self) -> None:
        """Reads the existing bytes; the inherited method first allocates as many as the pickle declares."""
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(min(size, sys.maxsize))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def read_pickle(path: Path, *keys: str) -> dict[str, Any]:
    """The values of ``keys`` in a published CIFAR file, which is a dict with text keys.

    The values are lists, text, integers and integer arrays; other entries are not read. Missing keys are left
    out. Memory is bounded by the file's size, whatever sizes the file declares.

    Raises:
        ValueError: the file is damaged, requests another name, or contains anything else.
    """
    content = path.read_bytes()
    try:
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        if isinstance(value, dict) and all(isinstance(name, (str, bytes)) for name in value):
            named = {_text(name): item for name, item in value.items()}
            return {name: _plain(named[name], name) for name in keys if name in named}
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: {error}. CIFAR files contain only plain containers and integer arrays; "
            "this one is damaged or malicious. Download it again from its publisher"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any operation of the unpickler
        raise ValueError(f"{path} is damaged, or not a pickle: {type(error).__name__}: {error}") from error
    raise ValueError(f"{path} holds a {type(value).__name__}, expected a dict with text keys")


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, _Array):
        try:
            return value.values()
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(f"{name!r} is {error}") from error
    if isinstance(value, (list, tuple)):
        texts = {item: _text(item) for item in value if isinstance(item, bytes)}  # each is decoded once
        return [texts[item] if isinstance(item, bytes) else item for item in value]
    return _text(value)

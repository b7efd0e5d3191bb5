"""Launch parameters of the kernels: looked up in awnet/ops/configs/, never tuned at run time.

``<device slug>.json`` (such as ``nvidia-h200.json``) holds what `awnet bench tune` measured on that device,
``default.json`` parameters that work everywhere. A key is ``op/dtype/layout/bucket``; the last parts may be
missing, and the most specific key wins, the device's table before the default. A bucket ``b256c64p1024``
stands for up to 256 samples, 64 channels and 1024 pixels, each rounded up to a power of two.

A device's table may also have "convolutions": the cases in which a convolution of ``awnet.kernels`` was
faster than the library's (``python -m awnet.benchmarks.convolutions``). Otherwise the library's runs.

"frozen_networks" gives, by dtype of the images, which forms of a frozen network were fastest on that device
(``awnet bench tune``), such as {"bfloat16": {"norms": "folded", "stem": "padded"}}. See
:data:`FROZEN_NETWORK`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "configs"
_CONVOLUTIONS = {
    "conv": {"block_m", "block_n", "block_k", "warps", "stages", "swap_ab", "least_batch"},
    "grouped_conv": {"pixels", "channels", "warps", "least_batch"},
}
# what must be a power of two
_POWERS = ("tile", "inner", "steps", "warps", "block_m", "block_n", "block_k", "pixels", "channels")
_REWRITE = "write it again with `awnet bench tune`, or delete it: the defaults then hold"

# op names in tables that earlier versions wrote
_RENAMED = {
    "testing_coefficients": "eval_coefficients",
    "testing_gradients": "eval_gradients",
    "training_coefficients": "train_coefficients",
    "training_gradients": "train_gradients",
}

# The forms of a part of a frozen network (awnet.nn.inference_network), the default first.
FROZEN_NETWORK = {
    # batch norms of a network with constant coefficients, such as a router: applied to the convolutions'
    # outputs, or folded into their weights (awnet.ops.folding)
    "norms": ("applied", "folded"),
    # channels of the images and of the stems' weights: as they are, or zeros up to a multiple of 8
    "stem": ("unpadded", "padded"),
}

Parameters = Mapping[str, int]


def device_slug(device: torch.device) -> str:
    """The name of a device's table: "NVIDIA H200" → "nvidia-h200"; "cpu" for other devices."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def bucket(batch: int, channels: int, pixels: int) -> str:
    """The shape's part of a key."""
    sizes = (("b", batch), ("c", channels), ("p", pixels))
    return "".join(f"{name}{1 << max(0, size - 1).bit_length()}" for name, size in sizes)


def read_table(path: Path) -> dict[str, dict[str, int]]:
    """The launch parameters in ``path`` by key. ValueError, naming the entry, if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {_REWRITE}") from None
    launches = content.get("launches") if isinstance(content, dict) else None
    if not isinstance(launches, dict):
        raise ValueError(f'{path} must hold an object with "launches"; {_REWRITE}')
    for key, entry in launches.items():
        problem = _problem(entry)
        if problem:
            raise ValueError(f"{path}: launches[{key!r}] {problem}, got {entry!r}; {_REWRITE}")
    return {_renamed(key): entry for key, entry in launches.items()}


def _renamed(key: str) -> str:
    op, slash, rest = key.partition("/")
    return _RENAMED.get(op, op) + slash + rest


@functools.cache
def convolutions(device: torch.device) -> Mapping[str, Parameters]:
    """The cases in which our convolution was faster on ``device``, with their launch parameters.

    The keys are those of ``key`` in ``awnet.kernels.conv`` and ``awnet.kernels.grouped_conv``; an entry holds
    the fields of the kernel's ``Tile`` and ``least_batch``, the batch from which it wins.

    Raises:
        ValueError: the device's table is damaged; the message names the file and the entry.
    """
    path = FOLDER / f"{device_slug(device)}.json"
    return read_convolutions(path) if path.exists() else {}


def read_convolutions(path: Path) -> dict[str, dict[str, int]]:
    """The "convolutions" of the table in ``path``, which may be missing; ValueError if they are damaged."""
    read_table(path)
    entries = json.loads(path.read_text(encoding="utf-8")).get("convolutions", {})
    if not isinstance(entries, dict):
        raise ValueError(f'{path}: "convolutions" must be an object; {_REWRITE}')
    for key, entry in entries.items():
        problem = _problem(entry)
        fields = _CONVOLUTIONS.get(key.split("/")[0])
        if problem is None and fields is None:
            problem = f"must begin with {' or '.join(_CONVOLUTIONS)}"
        if problem is None and fields is not None and set(entry) != fields:
            problem = f"must have the fields {', '.join(sorted(fields))}"
        if problem:
            raise ValueError(f"{path}: convolutions[{key!r}] {problem}, got {entry!r}; {_REWRITE}")
    return entries


_requested: list[Mapping[str, str]] = [{}]


@contextmanager
def use_frozen_network(**forms: str) -> Iterator[None]:
    """Frozen networks have these forms in the ``with`` block, for timing and tests; tables do not count."""
    _requested.append({**_requested[-1], **forms})
    try:
        yield
    finally:
        _requested.pop()


def frozen_network(device: torch.device, dtype: torch.dtype) -> Mapping[str, str]:
    """The form of each part in :data:`FROZEN_NETWORK` for images of ``dtype`` on ``device``.

    Raises:
        ValueError: the device's table is damaged; the message names the file and the entry.
    """
    return {**_tuned_forms(device, dtype), **_requested[-1]}


def default_forms() -> dict[str, str]:
    """The form of each part in :data:`FROZEN_NETWORK` on a device without a table."""
    return {part: forms[0] for part, forms in FROZEN_NETWORK.items()}


@functools.cache
def _tuned_forms(device: torch.device, dtype: torch.dtype) -> Mapping[str, str]:
    path = FOLDER / f"{device_slug(device)}.json"
    entries = read_frozen_networks(path) if path.exists() else {}
    return default_forms() | entries.get(str(dtype).removeprefix("torch."), {})


def read_frozen_networks(path: Path) -> dict[str, dict[str, str]]:
    """The "frozen_networks" of the table in ``path``; none is legal. ValueError where they are damaged."""
    read_table(path)
    entries = json.loads(path.read_text(encoding="utf-8")).get("frozen_networks", {})
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f'{path}: "frozen_networks" must be an object of objects; {_REWRITE}')
    for dtype, entry in entries.items():
        for part, form in entry.items():
            if form not in FROZEN_NETWORK.get(part, ()):
                known = "; ".join(f"{name}: {' or '.join(forms)}" for name, forms in FROZEN_NETWORK.items())
                raise ValueError(
                    f"{path}: frozen_networks[{dtype!r}] must have some of {known}; got {part}: {form!r}; "
                    f"{_REWRITE}"
                )
    return entries


def _problem(entry: Any) -> str | None:
    if not isinstance(entry, dict) or not entry:
        return "must be an object of launch parameters"
    for name, value in entry.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            return f"must have integers of at least 0, but {name} is not one"
        if name in _POWERS and (value < 1 or value & (value - 1)):
            return f"must have a power of two for {name}"
    if entry.get("warps", 1) > 32:
        return "must have at most 32 warps"
    return None


@functools.cache
def launches(slug: str) -> dict[str, dict[str, int]]:
    """The launch parameters of a device's table by key; empty without a table, ValueError if damaged."""
    path = FOLDER / f"{slug}.json"
    if slug == "default":
        return read_table(path)
    if not path.exists():
        return {}
    table = read_table(path)
    for key, entry in table.items():
        default = next(
            (d for k, d in launches("default").items() if k.split("/")[0] == key.split("/")[0]), None
        )
        if default is None:
            raise ValueError(f"{path}: launches[{key!r}] is for an op without defaults; {_REWRITE}")
        if entry.keys() != default.keys():
            got, expected = ", ".join(entry), ", ".join(default)
            raise ValueError(f"{path}: launches[{key!r}] has {got}; expected {expected}; {_REWRITE}")
    return table


def _keys(op: str, dtype: torch.dtype | None, layout: str | None, shape: str) -> list[str]:
    """The keys of a call, the most specific one first."""
    if layout is None or dtype is None:
        return [f"{op}/{shape}", op]
    stem = f"{op}/{str(dtype).removeprefix('torch.')}/{layout}"
    return [f"{stem}/{shape}", stem, f"{op}/{layout}"]


@functools.lru_cache(maxsize=4096)
def launch_parameters(
    op: str,
    device: torch.device,
    batch: int,
    channels: int,
    pixels: int = 1,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
) -> Parameters:
    """The launch parameters of ``op`` for [batch, channels, pixels] on ``device``.

    Args:
        op: a kernel's name in the tables, such as "apply".
        dtype, layout: of the images, "nchw" or "channels_last"; None for the [B, C] algebra.

    Raises:
        ValueError: the device's table is damaged; the message names the file and the entry.
        KeyError: no table has an entry for ``op``.
    """
    shape = bucket(batch, channels, pixels)
    for slug in (device_slug(device), "default"):
        table = launches(slug)
        for key in _keys(op, dtype, layout, shape):
            if key in table:
                return table[key]
    raise KeyError(f"no launch parameters for {op!r} in {FOLDER}")


def forget_tables() -> None:
    """Clears the caches: the next call reads the tables again."""
    launches.cache_clear()
    launch_parameters.cache_clear()
    convolutions.cache_clear()
    _tuned_forms.cache_clear()

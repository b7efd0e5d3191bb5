"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from awnet.data.cifar import load_cifar
from awnet.data.dataset import Splits
from awnet.data.digits import load_digits
from awnet.data.tiny_imagenet import load_tiny_imagenet
from awnet.defaults import standard_defaults

DEFAULT_DATA_DIR = "data"

_LOADERS: dict[str, Callable[[str | Path, int], Splits]] = {
    "digits": lambda _, seed: load_digits(seed),
    "cifar10": lambda data_dir, seed: load_cifar("cifar10", data_dir, seed),
    "cifar100": lambda data_dir, seed: load_cifar("cifar100", data_dir, seed),
    "tiny_imagenet": load_tiny_imagenet,
}


def list_datasets() -> list[str]:
    """The names that ``load_dataset`` knows."""
    return list(_LOADERS)


@standard_defaults()
def load_dataset(name: str, data_dir: str | Path | None = None, *, seed: int = 0) -> Splits:
    """The train, validation and test split of a data set, on the CPU.

    Args:
        name: one of :func:`list_datasets`.
        data_dir: the published folder or its parent; by default ``data`` in the working directory.
            ``digits`` needs none.
        seed: determines which training images are held out for validation; the test images never depend on
            it.

    Raises:
        ValueError: the name is unknown, or a file is damaged.
        FileNotFoundError: a file is missing.
    """
    if not isinstance(name, str) or name not in _LOADERS:
        raise ValueError(
            f"unknown data set {name!r}; known are {', '.join(_LOADERS)}; for your own images use "
            "awnet.data.from_arrays in Python"
        )
    return _LOADERS[name](DEFAULT_DATA_DIR if data_dir is None else data_dir, seed)

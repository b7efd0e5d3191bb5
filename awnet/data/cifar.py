"""CIFAR-10 and CIFAR-100 from the folders their authors publish: the python and the binary versions.

A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from awnet.data.dataset import Dataset, Splits, from_arrays, hold_out
from awnet.data.downloads import find_folder
from awnet.data.pickles import read_pickle

PIXELS = 3 * 32 * 32
VALIDATION_FRACTION = 0.02  # 1,000 of the 50,000 training images


@dataclass(frozen=True)
class _Layout:
    """How a version is stored on disk."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    num_classes: int
    label_key: str = ""  # keys of the pickles in the python version
    names_key: str = ""
    label_bytes: int = 0  # leading bytes of each record in the binary version, and which of them is the label
    label_position: int = 0

    @property
    def binary(self) -> bool:
        return self.label_bytes > 0


LAYOUTS = {
    "cifar10": (
        _Layout(
            folder="cifar-10-batches-py",
            train=tuple(f"data_batch_{i}" for i in range(1, 6)),
            test="test_batch",
            names="batches.meta",
            num_classes=10,
            label_key="labels",
            names_key="label_names",
        ),
        _Layout(
            folder="cifar-10-batches-bin",
            train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            test="test_batch.bin",
            names="batches.meta.txt",
            num_classes=10,
            label_bytes=1,
        ),
    ),
    "cifar100": (
        _Layout(
            folder="cifar-100-python",
            train=("train",),
            test="test",
            names="meta",
            num_classes=100,
            label_key="fine_labels",
            names_key="fine_label_names",
        ),
        _Layout(
            folder="cifar-100-binary",
            train=("train.bin",),
            test="test.bin",
            names="fine_label_names.txt",
            num_classes=100,
            label_bytes=2,
            label_position=1,
        ),
    ),
}


def load_cifar(name: str, data_dir: str | Path, seed: int = 0) -> Splits:
    """Loads ``"cifar10"`` or ``"cifar100"``; 2 % of the training images, chosen by the seed, are held out.

    ``data_dir`` is the published folder or its parent. Its files may contain fewer images than published.
    Raises FileNotFoundError or ValueError if a file is missing or damaged.
    """
    layouts = {layout.names: layout for layout in LAYOUTS[name]}
    folder, marker = find_folder(name, data_dir, {layout.folder: layout.names for layout in layouts.values()})
    layout = layouts[marker]
    classes = _class_names(folder / layout.names, layout)

    def read(files: tuple[str, ...], split: str) -> Dataset:
        parts = [
            _read_binary(folder / f, layout) if layout.binary else _read_python(folder / f, layout)
            for f in files
        ]
        images = np.concatenate([images for images, _ in parts])
        if len(images) == 0:
            raise ValueError(f"{folder} holds no {split} images (in {', '.join(files)})")
        labels = np.concatenate([labels for _, labels in parts])
        fields: Any = {"name": name, "split": split, "classes": classes, "source": str(folder)}
        return from_arrays(images, labels, **fields, shift=4, flip=True, layout="nchw")

    train, validation = hold_out(read(layout.train, "train"), VALIDATION_FRACTION, seed)
    return Splits(train, validation, read((layout.test,), "test"))


def _class_names(path: Path, layout: _Layout) -> tuple[str, ...]:
    names: Any
    if layout.binary:
        names = [
            line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()
        ]
    else:
        names = read_pickle(path, layout.names_key).get(layout.names_key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: {layout.names_key!r} must be a list of class names")
    if len(names) != layout.num_classes:
        raise ValueError(f"{path} names {len(names)} classes, expected {layout.num_classes}")
    return tuple(name.strip() for name in names)


def _read_python(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    _check_exists(path)
    batch = read_pickle(path, "data", layout.label_key)
    rows, labels = batch.get("data"), batch.get(layout.label_key)
    if (
        not isinstance(rows, np.ndarray)
        or rows.dtype != np.uint8
        or rows.ndim != 2
        or rows.shape[1] != PIXELS
    ):
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise ValueError(f"{path}: 'data' must be uint8 [N, {PIXELS}], got {got}")
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path}: {layout.label_key!r} must be a list of whole numbers")
    if len(labels) != len(rows):
        raise ValueError(f"{path} has {len(rows)} images but {len(labels)} labels")
    return _checked(path, rows, np.asarray(labels, dtype=object), layout)


def _read_binary(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    _check_exists(path)
    content = np.fromfile(path, np.uint8)
    record = layout.label_bytes + PIXELS
    if len(content) % record:
        raise ValueError(
            f"{path} has {len(content):,} bytes, not a whole number of records of {record:,}: it is "
            "truncated, or not a CIFAR file. Download it again from its publisher"
        )
    records = content.reshape(-1, record)
    return _checked(path, records[:, layout.label_bytes :], records[:, layout.label_position], layout)


def _checked(
    path: Path, rows: np.ndarray, labels: np.ndarray, layout: _Layout
) -> tuple[np.ndarray, np.ndarray]:
    if len(labels) and not (labels.min() >= 0 and labels.max() < layout.num_classes):
        raise ValueError(
            f"{path} has labels from {labels.min()} to {labels.max()}, expected 0 to {layout.num_classes - 1}"
        )
    return np.ascontiguousarray(rows).reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; the published folder has it. Download the data set again"
        )

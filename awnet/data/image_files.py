"""The user's own images by path: a folder with a folder for each class, or a ``.npz`` file."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from awnet.data.dataset import (
    Augmentation,
    Dataset,
    Splits,
    from_arrays,
    held_out_rows,
    hold_out,
    looks_nhwc,
)
from awnet.data.threat_model import ThreatModel
from awnet.files import cache_folder, expanded, make_folder, written_atomically

T = TypeVar("T")

IN_MEMORY = 2**30
"""Decoded images of more bytes than this are stored in a file and read from there batch by batch."""

VALIDATION_FRACTION = 0.02
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
_PARTS = {"train": ("train", "training"), "validation": ("validation", "val", "valid"), "test": ("test",)}
_KEYS = (("images", "labels"), ("x", "y"), ("X", "Y"), ("data", "labels"), ("arr_0", "arr_1"))


def is_path(name: str) -> bool:
    """Whether the name of a data set is the path of a folder or of a ``.npz`` file."""
    return name.endswith(".npz") or os.sep in name or "/" in name or expanded(name).is_dir()


def load_path(
    path: str | Path, seed: int = 0, image_size: int | None = None, classes: str | Path | None = None
) -> Splits:
    """The splits of a folder or ``.npz`` file; see :func:`awnet.data.load_dataset`."""
    path = expanded(path).resolve()
    if path.suffix == ".npz":
        if image_size is not None:
            raise ValueError(f"image_size is for folders of images; {path} holds arrays of one size")
        parts = _load_npz(path, classes)
    elif path.is_dir():
        parts = _load_folder(path, image_size, classes, seed)
    else:
        raise FileNotFoundError(f"{path} is neither a folder with a folder for each class nor a .npz file")
    if "train" in parts and "validation" not in parts:
        parts["train"], parts["validation"] = hold_out(parts["train"], VALIDATION_FRACTION, seed)
    any_part, no_rows = next(iter(parts.values())), torch.zeros(0, dtype=torch.int64)
    train, validation, test = (
        parts[name] if name in parts else any_part.take(no_rows, split=name) for name in _PARTS
    )
    return Splits(train, validation, test)


def _with_test(parts: dict[str, T]) -> dict[str, T]:
    """``parts``, where ``validation`` is the test part if there is no other, as in ImageNet's folders."""
    if "test" in parts or "validation" not in parts:
        return parts
    return {"test" if name == "validation" else name: part for name, part in parts.items()}


def _shift(height: int) -> int:
    """The shift of training images; they are not flipped, which changes the class of digits and letters."""
    return height // 8


# .npz


def _load_npz(path: Path, classes: str | Path | None) -> dict[str, Dataset]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as arrays of numbers: {error}") from error
    pairs = {
        part: pair
        for part, words in _PARTS.items()
        if (pair := _pair(arrays, [form for word in words for form in (f"{word}_{{}}", f"{{}}_{word}")]))
    }
    if not pairs and (whole := _pair(arrays, ["{}"])):
        pairs["test"] = whole
    if not pairs:
        raise ValueError(
            f"{path} has the arrays {', '.join(arrays) or 'of no name'}; expected images and labels, or x "
            "and y, of all images or with the name of a part, such as x_train, y_train, x_test and y_test"
        )
    parts = {
        part: _from_arrays(path, part, arrays[images], arrays[labels])
        for part, (images, labels) in _with_test(pairs).items()
    }
    longest = max((part.classes for part in parts.values()), key=len)
    names = tuple(_class_names(list(longest), classes)[0])
    return {name: replace(part, classes=names) for name, part in parts.items()}


def _pair(arrays: Container[str], forms: Sequence[str]) -> tuple[str, str] | None:
    """The names of images and labels among ``arrays`` in the first form that fits, such as ``{}_train``."""
    pairs = ((form.format(images), form.format(labels)) for form in forms for images, labels in _KEYS)
    return next((pair for pair in pairs if pair[0] in arrays and pair[1] in arrays), None)


def _from_arrays(path: Path, split: str, images: Any, labels: Any) -> Dataset:
    if images.ndim == 3:
        images = images[:, None]
    layout: Literal["nhwc", "nchw"] = "nhwc" if images.ndim == 4 and looks_nhwc(images.shape[1:]) else "nchw"
    try:
        return from_arrays(
            images,
            labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels,
            name=path.stem,
            split=split,
            shift=_shift(images.shape[1 if layout == "nhwc" else 2]) if images.ndim == 4 else 0,
            source=str(path),
            layout=layout,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# folders


def _load_folder(
    folder: Path, image_size: int | None, classes: str | Path | None, seed: int
) -> dict[str, Dataset]:
    """The parts in ``folder``; without a validation part it is held out before anything is decoded."""
    present = {
        part: next((folder / word for word in words if (folder / word).is_dir()), None)
        for part, words in _PARTS.items()
    }
    roots = {part: root for part, root in present.items() if root is not None and _subfolders(root)}
    roots = _with_test(roots) or {"test": folder}
    folders = sorted({name for root in roots.values() for name in _subfolders(root)}, key=_number_or_name)
    if not folders:
        raise ValueError(f"{folder} holds no folders: expected a folder with the images of each class")
    names, number = _class_names(folders, classes)
    parts = {}
    for part, root in roots.items():
        files = [
            (file, number[name])
            for name in _subfolders(root)
            for file in sorted((root / name).rglob("*"))
            if file.suffix.lower() in ENDINGS
        ]
        if not files:
            raise ValueError(f"{root} holds no images of the kinds {', '.join(ENDINGS)} in its class folders")
        labels, index = torch.tensor([label for _, label in files]), torch.arange(len(files))
        rows = {part: index}
        if part == "train" and "validation" not in roots and len(files) > 1:
            rest, held_out = held_out_rows(labels, index, VALIDATION_FRACTION, seed)
            rows = {"train": rest, "validation": held_out}
        for name, of_part in rows.items():
            images = _decoded([files[row][0] for row in of_part.tolist()], image_size)
            parts[name] = Dataset(
                name=folder.stem,
                split=name,
                images=images,
                labels=labels[of_part],
                index=of_part,
                classes=tuple(names),
                max_value=255,
                threat_model=ThreatModel(8 / 255),
                augmentation=Augmentation(_shift(images.shape[2])),
                source=str(folder),
            )
    sizes = {part: tuple(dataset.images.shape[1:]) for part, dataset in parts.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{folder}: the parts have images of different shapes, {sizes}: give image_size")
    return parts


def _subfolders(folder: Path) -> list[str]:
    return sorted(
        (entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")),
        key=_number_or_name,
    )


def _number_or_name(name: str) -> tuple[int, int, str]:
    """Sorts folders called 0, 1, …, 10 by number and all others by name."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _class_names(folders: list[str], file: str | Path | None) -> tuple[list[str], dict[str, int]]:
    """All classes' names by number, and the number of each folder in ``folders``.

    ``file`` is JSON, a list of names or an object as ImageNet's ``{"0": ["n01440764", "tench"], …}``, or text
    with a name in each line; without it the classes are ``folders``.
    """
    if file is None:
        return folders, {name: number for number, name in enumerate(folders)}
    path = expanded(file)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileNotFoundError(f"the file of class names, {path}, cannot be read: {error}") from error
    aliases: list[list[str]]
    if path.suffix == ".json":
        try:
            content = json.loads(text)
            if isinstance(content, Mapping):
                content = [content[str(number)] for number in range(len(content))]
            aliases = [[one] if isinstance(one, str) else [str(part) for part in one] for one in content]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path} must hold a list of class names or an object {{"0": ["folder", "name"], …}}: {error}'
            ) from error
    else:
        aliases = [[line.strip()] for line in text.splitlines() if line.strip()]
    number = {alias: index for index, names in enumerate(aliases) for alias in names}
    unknown = [name for name in folders if name not in number]
    if unknown and all(name.isdecimal() and int(name) < len(aliases) for name in folders):
        number, unknown = {name: int(name) for name in folders}, []
    if unknown:
        raise ValueError(
            f"{path} does not name {len(unknown)} of the {len(folders)} classes, for example {unknown[0]}"
        )
    return [names[-1] for names in aliases], {name: number[name] for name in folders}


def _decoded(files: list[Path], size: int | None) -> torch.Tensor:
    """uint8 [N, 3, H, W]; gray images get three equal channels.

    With ``size`` the shorter side is resized to it and the center is cropped. Many images are decoded once
    into a file in the cache folder, which is mapped into memory.
    """
    height, width = (
        (size, size) if size is not None else _opened(files[0], lambda image: (image.height, image.width))
    )
    shape, read = (len(files), 3, height, width), partial(_read, size=size, height=height, width=width)
    if len(files) * 3 * height * width <= IN_MEMORY:
        images = np.empty(shape, np.uint8)
        decode_into(images, files, read)
        return torch.from_numpy(images)
    path = cache_folder("images") / f"{_key(files, size)}.npy"
    if not path.is_file():
        make_folder(path.parent)
        with written_atomically(path) as temporary:
            mapped = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            decode_into(mapped, files, read)
            mapped.flush()
            del mapped
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _key(files: Iterable[Path], size: int | None) -> str:
    """A digest of the files' paths, sizes and times, and of the size of the images."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    for file in files:
        about = file.stat()
        digest.update(f"{file.resolve()}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _opened(file: Path, use: Callable[[Any], T]) -> T:
    """``use(image)`` of the image in ``file``."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return use(image)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is damaged, or no image: {error}") from error


def decode_into(images: Any, files: Sequence[Path], read: Callable[[Path], np.ndarray]) -> None:
    """Fills ``images``, an array [N, C, H, W], with ``read(file)`` for each file, in several threads."""

    def decode(number: int) -> None:
        images[number] = read(files[number])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the decoders release the GIL
        list(pool.map(decode, range(len(files))))  # raises the first error


def _read(file: Path, size: int | None, height: int, width: int) -> np.ndarray:
    rgb = _opened(file, lambda image: image.convert("RGB"))
    if size is not None and rgb.size != (size, size):
        scale = size / min(rgb.size)
        rgb = rgb.resize((max(size, round(rgb.width * scale)), max(size, round(rgb.height * scale))))
        left, top = (rgb.width - size) // 2, (rgb.height - size) // 2
        rgb = rgb.crop((left, top, left + size, top + size))
    if (rgb.height, rgb.width) != (height, width):
        raise ValueError(
            f"{file} is {rgb.width}×{rgb.height}, the first image {width}×{height} pixels: give image_size "
            "(--image-size) to resize them all"
        )
    return np.asarray(rgb).transpose(2, 0, 1)

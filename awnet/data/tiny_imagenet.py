"""Tiny-ImageNet (200 classes, 64×64) from its published folder, with all or some of its classes.

Stanford CS231n course, "Tiny ImageNet Visual Recognition Challenge".
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from awnet.data.dataset import Augmentation, Dataset, Splits, ThreatModel, hold_out
from awnet.data.folders import find_folder

SIZE = 64
VALIDATION_FRACTION = 0.02


def load_tiny_imagenet(data_dir: str | Path, seed: int = 0) -> Splits:
    """The classes are the folders under ``train/``, in the order of their WordNet ids; the published
    validation images of these classes are the test set (the labels of the published test images are secret);
    2 % of the training images, drawn by the seed, are held out."""
    folder, _ = find_folder("tiny_imagenet", data_dir, {"tiny-imagenet-200": "wnids.txt"})
    train_folder = folder / "train"
    if not train_folder.is_dir():
        raise FileNotFoundError(
            f"{train_folder} is missing; the published folder has a folder per class there"
        )
    classes = tuple(sorted(entry.name for entry in train_folder.iterdir() if (entry / "images").is_dir()))
    if not classes:
        raise FileNotFoundError(f"{train_folder} has no class folder (train/<wnid>/images)")
    number = {wnid: i for i, wnid in enumerate(classes)}

    train_files: list[tuple[Path, int]] = []
    for wnid in classes:
        paths = [
            path for path in (train_folder / wnid / "images").iterdir() if path.suffix.upper() == ".JPEG"
        ]
        paths.sort(key=lambda path: (len(path.name), path.name))  # n_2 before n_10, as numbered
        train_files += [(path, number[wnid]) for path in paths]

    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise FileNotFoundError(f"{annotations} is missing; it holds the labels of the test images")
    test_files: list[tuple[Path, int]] = []
    for line, text in enumerate(annotations.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not text.strip():
            continue
        fields = text.split("\t")
        if len(fields) < 2 or Path(fields[0]).name != fields[0]:
            raise ValueError(
                f"{annotations}, line {line}: expected 'file<TAB>wnid<TAB>box', got {text[:60]!r}"
            )
        if fields[1] in number:
            test_files.append((folder / "val" / "images" / fields[0], number[fields[1]]))

    def read(files: list[tuple[Path, int]], split: str) -> Dataset:
        if not files:
            raise ValueError(f"{folder} holds no {split} images of its {len(classes)} classes")
        return Dataset(
            name="tiny_imagenet",
            split=split,
            images=_decode([path for path, _ in files]),
            labels=torch.tensor([label for _, label in files]),
            index=torch.arange(len(files)),
            classes=classes,
            max_value=255,
            threat_model=ThreatModel(8 / 255),
            augmentation=Augmentation(shift=4, flip=True),
            source=str(folder),
        )

    train, validation = hold_out(read(train_files, "train"), VALIDATION_FRACTION, seed)
    return Splits(train, validation, read(test_files, "test"))


def _decode(paths: list[Path]) -> torch.Tensor:
    """uint8 [N, 3, 64, 64]; grey images get three equal channels."""
    images = np.empty((len(paths), 3, SIZE, SIZE), np.uint8)

    def decode(i: int) -> None:
        images[i] = _read_image(paths[i])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the decoder lets go of Python's lock
        for _ in pool.map(decode, range(len(paths))):
            pass
    return torch.from_numpy(images)


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["JPEG"]) as image:
            if image.size != (SIZE, SIZE):  # before decoding, which a huge image would make expensive
                raise ValueError(f"{path} is {image.size[0]}×{image.size[1]}, expected {SIZE}×{SIZE} pixels")
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; the published folder has it") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged, or not a JPEG image: {error}") from error

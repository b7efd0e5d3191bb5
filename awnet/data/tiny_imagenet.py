"""Tiny-ImageNet (200 classes, 64×64) from its published folder, with all or some of its classes.

Stanford CS231n course, "Tiny ImageNet Visual Recognition Challenge".
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from awnet.data.dataset import Dataset, Splits, from_arrays, hold_out
from awnet.data.downloads import find_folder
from awnet.data.image_files import decode_into

SIZE = 64
VALIDATION_FRACTION = 0.02
_ADVICE = "Unpack the archive again, or download it again"


def load_tiny_imagenet(data_dir: str | Path, seed: int = 0) -> Splits:
    """Loads the classes in ``wnids.txt``, in the order of their WordNet ids; list fewer there for a subset.

    The published validation images are the test set, since the labels of the published test images are
    secret; 2 % of the training images, chosen by the seed, are held out for validation.

    Raises FileNotFoundError or ValueError, with counts, if class folders, images or annotations are missing:
    each class must have the same number of images.
    """
    folder, marker = find_folder("tiny_imagenet", data_dir, {"tiny-imagenet-200": "wnids.txt"})
    listed = (folder / marker).read_text(encoding="utf-8", errors="replace").split()
    classes = tuple(sorted(set(listed)))
    if not classes:
        raise ValueError(f"{folder / marker} is empty; it lists the classes. {_ADVICE}")
    number = {wnid: i for i, wnid in enumerate(classes)}
    train_files = _train_files(folder, classes)
    test_files = _test_files(folder, classes)

    def read(files: list[tuple[Path, str]], split: str) -> Dataset:
        if not files:
            raise ValueError(f"{folder} holds no {split} images of its {len(classes)} classes")
        images = np.empty((len(files), 3, SIZE, SIZE), np.uint8)
        decode_into(images, [path for path, _ in files], _read_image)
        labels = [number[wnid] for _, wnid in files]
        fields: Any = {"name": "tiny_imagenet", "split": split, "classes": classes, "source": str(folder)}
        return from_arrays(images, labels, **fields, shift=4, flip=True, layout="nchw")

    train, validation = hold_out(read(train_files, "train"), VALIDATION_FRACTION, seed)
    return Splits(train, validation, read(test_files, "test"))


def _train_files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, str]]:
    """(image, class) for each training image: by class, as numbered."""
    train_folder = folder / "train"
    if not train_folder.is_dir():
        raise FileNotFoundError(
            f"{train_folder} is missing; the published folder has a folder per class there"
        )
    present = {entry.name for entry in train_folder.iterdir() if (entry / "images").is_dir()}
    if missing := [wnid for wnid in classes if wnid not in present]:
        raise FileNotFoundError(
            f"{train_folder} has no images folder for {len(missing)} of the {len(classes)} classes in "
            f"wnids.txt, for example {missing[0]}. {_ADVICE}; for a subset of the classes, "
            "list only these there"
        )
    if extra := sorted(present - set(classes)):
        raise ValueError(
            f"{folder / 'wnids.txt'} lacks {len(extra)} of the {len(present)} classes in {train_folder}, "
            f"for example {extra[0]}. {_ADVICE}"
        )
    files = []
    for wnid in classes:
        paths = _images(train_folder / wnid / "images")
        paths.sort(key=lambda path: (len(path.name), path.name))  # n_2 before n_10, as numbered
        files += [(path, wnid) for path in paths]
    _check_equal(files, classes, f"{train_folder} has")
    return files


def _test_files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, str]]:
    """(image, class) for each published validation image of ``classes``, in the published order."""
    annotations, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    if not annotations.is_file():
        raise FileNotFoundError(
            f"{annotations} is missing; it holds the labels of the test images. {_ADVICE}"
        )
    files, annotated = [], set()
    for line, text in enumerate(annotations.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not text.strip():
            continue
        fields = text.split("\t")
        if len(fields) < 2 or Path(fields[0]).name != fields[0]:
            raise ValueError(
                f"{annotations}, line {line}: expected 'file<TAB>wnid<TAB>box', got {text[:60]!r}"
            )
        annotated.add(fields[0])
        if fields[1] in classes:
            files.append((images / fields[0], fields[1]))
    present = {path.name for path in _images(images)} if images.is_dir() else set()
    if missing := [path.name for path, _ in files if path.name not in present]:
        raise FileNotFoundError(
            f"{images}: {len(missing)} of {len(files)} test images are missing, for example {missing[0]}. "
            f"{_ADVICE}"
        )
    if extra := sorted(present - annotated):
        raise ValueError(
            f"{annotations} has no label for {len(extra)} of the {len(present)} images in {images}, for "
            f"example {extra[0]}. {_ADVICE}"
        )
    _check_equal(files, classes, f"{annotations} names")
    return files


def _images(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.upper() == ".JPEG"]


def _check_equal(files: list[tuple[Path, str]], classes: tuple[str, ...], what: str) -> None:
    """Raises ValueError if classes differ in their number of images: all published classes have the same."""
    counts = Counter(wnid for _, wnid in files)
    most = max(counts.values(), default=0)
    if short := [wnid for wnid in classes if counts[wnid] < most]:
        raise ValueError(
            f"{what} {len(files)} images, but {len(classes)} classes of {most} make {len(classes) * most}: "
            f"{len(short)} classes have fewer, {short[0]} has {counts[short[0]]}. {_ADVICE}; classes of "
            "unequal sizes can be loaded with awnet.data.from_arrays"
        )


def _read_image(path: Path) -> np.ndarray:
    """uint8 [3, 64, 64]; a gray image gets three equal channels."""
    from PIL.JpegImagePlugin import JpegImageFile

    try:
        # unlike Image.open this neither warns about nor rejects a huge image, whose size is checked next
        with JpegImageFile(path) as image:
            if image.size != (SIZE, SIZE):  # checked before decoding, which is expensive for a huge image
                raise ValueError(f"{path} is {image.size[0]}×{image.size[1]}, expected {SIZE}×{SIZE} pixels")
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; the published folder has it") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged, or not a JPEG image: {error}") from error

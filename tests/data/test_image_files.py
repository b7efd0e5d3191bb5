"""Data sets by path: folders of images and .npz files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from awnet.data import Dataset, from_arrays, image_files, load_dataset
from awnet.data.dataset import hold_out


def picture(path: Path, value: int, size: tuple[int, int] = (6, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255 - value)).save(path)


def test_class_folders_are_a_test_split(tmp_path: Path) -> None:
    for value, name in ((10, "cat/b.png"), (20, "cat/a.png"), (30, "ant/deep/x.bmp"), (0, ".hidden/x.png")):
        picture(tmp_path / name, value)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    train, validation, test = load_dataset(str(tmp_path))
    assert test.classes == ("ant", "cat")
    assert test.images[:, 0, 0, 0].tolist() == [30, 20, 10]
    assert test.images[:, 2, 0, 0].tolist() == [225, 235, 245]
    assert test.labels.tolist() == [0, 1, 1]
    assert (len(train), len(validation)) == (0, 0)
    assert test.threat_model.eps == 8 / 255
    assert Path(test.source) == tmp_path.resolve()


def test_parts_of_a_folder_become_splits(tmp_path: Path) -> None:
    for number in range(60):
        picture(tmp_path / "train" / str(number % 12) / f"{number}.png", number)
    for number in range(24):
        picture(tmp_path / "val" / str(number % 12) / f"{number}.png", number)
    train, validation, test = load_dataset(str(tmp_path), seed=3)
    assert test.classes == tuple(map(str, range(12)))  # 2 before 10
    assert (len(train), len(validation), len(test)) == (59, 1, 24)  # what is called val is the test split
    assert (train.split, validation.split, test.split) == ("train", "validation", "test")
    assert set(train.index.tolist()) | set(validation.index.tolist()) == set(range(60))
    picture(tmp_path / "test" / "0" / "1.png", 7)
    _, validation, test = load_dataset(str(tmp_path))
    assert (len(validation), len(test)) == (24, 1)


def test_images_of_a_folder_are_resized_and_cropped(tmp_path: Path) -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200  # the center, which the crop keeps
    (tmp_path / "a").mkdir()
    Image.fromarray(wide).save(tmp_path / "a" / "1.png")
    picture(tmp_path / "a" / "2.png", 50, (4, 9))
    with pytest.raises(ValueError, match=r"2\.png is 4×9, the first image 16×8 pixels: give image_size"):
        load_dataset(str(tmp_path))
    images = load_dataset(str(tmp_path), image_size=8).test.images
    assert images.shape == (2, 3, 8, 8)
    assert (images[0] == 200).all()
    assert (images[1, 0] == 50).all()
    unchanged = load_dataset(str(tmp_path), image_size=8).test
    assert torch.equal(unchanged.images, images)


def test_large_folders_are_decoded_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        picture(tmp_path / "d" / "a" / f"{number}.png", number)
    small = load_dataset(str(tmp_path / "d")).test.images
    monkeypatch.setattr(image_files, "IN_MEMORY", 0)
    monkeypatch.setenv("AWNET_CACHE", str(tmp_path / "cache"))
    assert torch.equal(load_dataset(str(tmp_path / "d")).test.images, small)
    (cached,) = (tmp_path / "cache" / "images").iterdir()
    written = cached.stat().st_mtime_ns
    again = load_dataset(str(tmp_path / "d")).test
    assert torch.equal(torch.cat([batch.x for batch in again.batches(2)]), small / 255)
    assert cached.stat().st_mtime_ns == written
    picture(tmp_path / "d" / "a" / "0.png", 99)  # another file: another entry
    assert int(load_dataset(str(tmp_path / "d")).test.images[0, 0, 0, 0]) == 99


def test_validation_images_of_a_large_folder_are_held_out_without_a_copy_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        picture(tmp_path / "d" / "train" / "ab"[number % 2] / f"{number}.png", number)
    picture(tmp_path / "d" / "test" / "a" / "0.png", 200)
    small = load_dataset(str(tmp_path / "d"), seed=3)
    whole = from_arrays(
        torch.cat([small.train.images, small.validation.images])[
            torch.cat([small.train.index, small.validation.index]).argsort()
        ],
        torch.arange(30) // 15,
        split="train",
        eps=0.1,
    )
    for part, expected in zip(small, hold_out(whole, image_files.VALIDATION_FRACTION, 3), strict=False):
        assert torch.equal(part.index, expected.index)
        assert torch.equal(part.images, expected.images)
        assert torch.equal(part.labels, expected.labels)
    monkeypatch.setattr(image_files, "IN_MEMORY", 0)
    monkeypatch.setenv("AWNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Dataset, "take", None)  # it would copy
    large = load_dataset(str(tmp_path / "d"), seed=3)
    assert [part.fingerprint() for part in large] == [part.fingerprint() for part in small]
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("index.json", json.dumps({"0": ["n01", "tench"], "1": ["n02", "shark"], "2": ["n03", "ray"]})),
        ("names.json", json.dumps(["n01", "n02", "n03"])),
        ("names.txt", "n01\nn02\n\nn03\n"),
    ],
)
def test_a_file_of_classes_numbers_the_folders(name: str, text: str, tmp_path: Path) -> None:
    for folder in ("n03", "n01"):
        picture(tmp_path / "data" / folder / "1.png", 1)
    (tmp_path / name).write_text(text)
    test = load_dataset(str(tmp_path / "data"), classes=tmp_path / name).test
    assert test.labels.tolist() == [0, 2]
    assert test.num_classes == 3
    assert test.classes[2] == ("ray" if name == "index.json" else "n03")


@pytest.mark.parametrize("form", ["images, labels", "x, y", "x_test, y_test", "test_images, test_labels"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 3), (8, 8)])
def test_arrays_of_an_npz_file_become_a_data_set(form: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    names = form.split(", ")
    np.savez(tmp_path / "d.npz", **dict(zip(names, (images, np.arange(6)[:, None]), strict=True)))
    test = load_dataset(str(tmp_path / "d.npz")).test
    expected = {3: images, 2: images[:, None]}[len(shape)]
    expected = expected.transpose(0, 3, 1, 2) if shape == (8, 8, 3) else expected
    assert np.array_equal(test.images.numpy(), expected)
    assert test.labels.tolist() == list(range(6))
    assert test.name == "d"


def test_parts_of_a_file_become_splits_with_the_same_classes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (100, 1, 4, 4), dtype=np.uint8), np.arange(100) % 10
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:5], y_test=y[:5])
    train, validation, test = load_dataset(str(tmp_path / "d.npz"))
    assert (len(train), len(validation), len(test)) == (98, 2, 5)
    assert train.num_classes == test.num_classes == 10


def _empty(path: Path) -> Path:
    return path


def _damaged(path: Path) -> Path:
    (path / "a").mkdir()
    (path / "a" / "1.png").write_bytes(b"nothing")
    return path


def _pickled(path: Path) -> Path:
    np.savez(path / "d.npz", images=np.array([{}], dtype=object), labels=np.zeros(1, int))
    return path / "d.npz"


def _nameless(path: Path) -> Path:
    np.savez(path / "d.npz", pictures=np.zeros((1, 1, 4, 4), np.uint8))
    return path / "d.npz"


def _floats(path: Path) -> Path:
    np.savez(path / "d.npz", images=np.zeros((1, 1, 4, 4)), labels=np.zeros(1, int))
    return path / "d.npz"


def _words(path: Path) -> Path:
    np.savez(path / "d.npz", images=np.zeros((2, 1, 4, 4), np.uint8), labels=np.array(["cat", "dog"]))
    return path / "d.npz"


def _no_images(path: Path) -> Path:
    (path / "a").mkdir()
    return path


def _missing(path: Path) -> Path:
    return path / "nowhere" / "else"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_empty, "holds no folders"),
        (_no_images, "holds no images of the kinds"),
        (_damaged, r"1\.png is damaged, or no image"),
        (_pickled, "cannot be read as arrays of numbers"),
        (_nameless, "has the arrays pictures; expected images and labels"),
        (_floats, r"images must be uint8 \[N, C, H, W\]"),
        (_words, "labels must be whole numbers"),
        (_missing, "is neither a folder"),
    ],
)
def test_a_path_that_holds_no_data_set_is_refused(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_dataset(str(make(tmp_path)))


def test_options_of_paths_are_refused_for_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are for data sets given by a path, not for digits"):
        load_dataset("digits", image_size=8)
    picture(tmp_path / "cat" / "1.png", 1)
    (tmp_path / "names.txt").write_text("dog\n")
    with pytest.raises(ValueError, match="does not name 1 of the 1 classes, for example cat"):
        load_dataset(str(tmp_path), classes=tmp_path / "names.txt")
    with pytest.raises(ValueError, match="is a path itself"):
        load_dataset(str(tmp_path), tmp_path)

"""CIFAR and Tiny-ImageNet in the published formats: read in order, or refused with the path of what is wrong."""

import collections
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.cifar_files import pictures, write_cifar10
from support.data_files import WNIDS, plain_picture, write_tiny_imagenet

from awnet.data import (
    Augmentation,
    Dataset,
    ThreatModel,
    load_dataset,
)

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "data"


# ── CIFAR ─────────────────────────────────────────────────────────────────────────────────────────────────


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 wrote the published files: text and bytes are one type, numpy.core its old name."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        raw = value.encode("latin-1") if isinstance(value, str) else value
        if len(raw) < 256:
            self.write(b"U" + bytes([len(raw)]) + raw)
        else:
            self.write(b"T" + len(raw).to_bytes(4, "little") + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_dumps(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


def taken_from_arrays(value):
    """A batch as indexing by numpy leaves it: numpy scalars as labels, text in arrays, an OrderedDict."""
    value = collections.OrderedDict(value)
    if "labels" in value:
        value["labels"] = list(np.array(value["labels"]))
        value["filenames"] = np.array(value["filenames"])
    return value


WRITERS = {
    "python 2": python2_dumps,
    "protocol 2": lambda value: pickle.dumps(value, protocol=3),
    "protocol 4": lambda value: pickle.dumps(value, protocol=4),
    "protocol 0": lambda value: pickle.dumps(value, protocol=0),
    "protocol 2 of Python 3": lambda value: pickle.dumps(value, protocol=2),
    "protocol 5": lambda value: pickle.dumps(value, protocol=5),
    "bytes keys": lambda value: pickle.dumps({key.encode(): item for key, item in value.items()}, protocol=4),
    "taken from arrays": lambda value: pickle.dumps(taken_from_arrays(value), protocol=4),
    "taken from arrays, protocol 2": lambda value: pickle.dumps(taken_from_arrays(value), protocol=2),
    "column order": lambda value: pickle.dumps(
        {key: np.asfortranarray(item) if key == "data" else item for key, item in value.items()}, protocol=4
    ),
}


def write_cifar10_binary(parent, rows=(30, 20, 10, 25, 15, 40)):
    folder = parent / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for seed, (name, n) in enumerate(zip(names, rows, strict=True)):
        data, labels = pictures(n, seed)
        (folder / name).write_bytes(np.concatenate([np.array(labels, np.uint8)[:, None], data], 1).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"class {k}" for k in range(10)) + "\n\n")
    return folder


def write_cifar100(parent, binary):
    folder = parent / ("cifar-100-binary" if binary else "cifar-100-python")
    folder.mkdir(parents=True)
    names = [f"class {k}" for k in range(100)]
    for seed, (name, n) in enumerate([("train", 300), ("test", 100)]):
        data, fine = pictures(n, seed, 100)
        coarse = [k // 5 for k in fine]
        if binary:
            records = np.concatenate([np.array([coarse, fine], np.uint8).T, data], 1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            batch = {"data": data, "fine_labels": fine, "coarse_labels": coarse, "batch_label": name}
            (folder / name).write_bytes(python2_dumps(batch))
    if binary:
        (folder / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    else:
        meta = {"fine_label_names": names, "coarse_label_names": [f"group {k}" for k in range(20)]}
        (folder / "meta").write_bytes(python2_dumps(meta))
    return folder


def everything(splits):
    """Training and validation images in published order."""
    index = torch.cat([splits.train.index, splits.validation.index])
    images = torch.cat([splits.train.images, splits.validation.images])
    labels = torch.cat([splits.train.labels, splits.validation.labels])
    order = index.argsort()
    assert torch.equal(index[order], torch.arange(len(index)))
    return images[order], labels[order]


@pytest.mark.parametrize("writer", WRITERS)
def test_cifar10_python_is_read_in_published_order(tmp_path, writer):
    write_cifar10(tmp_path, WRITERS[writer])
    splits = load_dataset("cifar10", tmp_path)
    images, labels = everything(splits)
    expected = [pictures(n, seed) for seed, n in enumerate((30, 20, 10, 25, 15))]
    assert np.array_equal(images.numpy().reshape(100, 3072), np.concatenate([data for data, _ in expected]))
    assert labels.tolist() == [label for _, labels in expected for label in labels]
    data, test_labels = pictures(40, 5)
    assert np.array_equal(splits.test.images.numpy().reshape(40, 3072), data)
    assert splits.test.labels.tolist() == test_labels
    assert splits.test.classes == tuple(f"class {k}" for k in range(10))
    assert splits.train.threat_model == ThreatModel(8 / 255)
    assert splits.train.augmentation == Augmentation(shift=4, flip=True)


def test_the_binary_and_the_python_version_are_the_same_data(tmp_path):
    write_cifar10(tmp_path / "a")
    write_cifar10_binary(tmp_path / "b")
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
    a, b = load_dataset("cifar10", tmp_path / "a"), load_dataset("cifar10", tmp_path / "b")
    assert [part.fingerprint() for part in a] == [part.fingerprint() for part in b]
    assert a.train.source != b.train.source


def test_cifar100_takes_the_fine_labels_in_both_versions(tmp_path):
    write_cifar100(tmp_path / "a", binary=False)
    write_cifar100(tmp_path / "b", binary=True)
    a, b = load_dataset("cifar100", tmp_path / "a"), load_dataset("cifar100", tmp_path / "b")
    assert [part.fingerprint() for part in a] == [part.fingerprint() for part in b]
    _, labels = everything(a)
    assert labels.tolist() == pictures(300, 0, 100)[1]
    assert a.test.num_classes == 100


def test_data_dir_is_the_folder_under_any_name_or_its_parent(tmp_path):
    folder = write_cifar10(tmp_path)
    renamed = tmp_path / "mine"
    by_parent = load_dataset("cifar10", str(tmp_path)).test.fingerprint()
    assert load_dataset("cifar10", folder).test.fingerprint() == by_parent
    folder.rename(renamed)
    assert load_dataset("cifar10", renamed).test.fingerprint() == by_parent


def test_the_default_folder_is_data_in_the_working_directory(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("cifar10").test) == 40


def test_two_per_cent_are_held_out_by_the_seed(tmp_path):
    write_cifar10(tmp_path, rows=(500, 500, 0, 0, 0, 10))
    first, again, other = (load_dataset("cifar10", tmp_path, seed=seed) for seed in (0, 0, 1))
    assert torch.bincount(first.validation.labels).tolist() == [2] * 10
    assert first.validation.split == "validation"
    assert first.validation.fingerprint() == again.validation.fingerprint()
    assert first.validation.fingerprint() != other.validation.fingerprint()
    assert first.test.fingerprint() == other.test.fingerprint()
    assert not set(first.validation.index.tolist()) & set(first.train.index.tolist())


DATA, LABELS = pictures(10, 0)


BAD_BATCHES = {
    "pixels of float": ({"data": DATA.astype(np.float32)}, "'f4', only whole numbers"),
    "wide pixels": ({"data": DATA.astype(np.int64)}, r"'data' must be uint8 \[N, 3072\], got int64"),
    "another width": ({"data": DATA[:, :3000]}, r"got uint8 \[10, 3000\]"),
    "another rank": ({"data": DATA.reshape(10, 3, 32, 32)}, r"got uint8 \[10, 3, 32, 32\]"),
    "no pixels": ({"data": None}, "got NoneType"),
    "pixels as a list": ({"data": [[1, 2], [3, 4]]}, "got list"),
    "array of objects": ({"data": np.array([None, {}])}, "only whole numbers"),
    "text array": ({"data": np.array(["a", "b"])}, "only whole numbers"),
    "structured array": ({"data": np.zeros(3, [("a", "u1")])}, "only whole numbers"),
    "too few labels": ({"labels": LABELS[:9]}, "10 images but 9 labels"),
    "label 10": ({"labels": [*LABELS[:9], 10]}, "labels from 0 to 10, expected 0 to 9"),
    "label -1": ({"labels": [*LABELS[:9], -1]}, "labels from -1 to"),
    "huge label": ({"labels": [*LABELS[:9], 10**30]}, "expected 0 to 9"),
    "labels of float": ({"labels": [0.5] * 10}, "list of whole numbers"),
    "labels of text": ({"labels": ["cat"] * 10}, "list of whole numbers"),
    "labels of bool": ({"labels": [True] * 10}, "list of whole numbers"),
    "no labels": ({"labels": None}, "list of whole numbers"),
    "a set": ({"extra": {1, 2}}, "refused: it requests|holds"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_cifar_batch_is_refused_with_its_path(tmp_path, case):
    change, message = BAD_BATCHES[case]
    folder = write_cifar10(tmp_path)
    # protocol 2 or 3 writes a set by name; later ones by a separate opcode, which is harmless
    (folder / "data_batch_3").write_bytes(
        pickle.dumps({"data": DATA, "labels": LABELS, **change}, protocol=3)
    )
    with pytest.raises(ValueError, match=message) as error:
        load_dataset("cifar10", tmp_path)
    assert str(folder / "data_batch_3") in str(error.value)


def huge_pickles():
    """Pickles of a few bytes or kilobytes whose values, taken literally, need gigabytes."""
    size = (20 << 30).to_bytes(8, "little")
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"q\x01"  # 1 MiB, memo 1
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00U\x01btR"
    dtype = b"cnumpy\ndtype\nU\x02u1\x85R(K\x03U\x01|NNNK\x01K\x01K\x00tb"
    state = b"(K\x01J" + (1 << 20).to_bytes(4, "little") + b"\x85" + dtype + b"I00\nh\x01tb"
    return {
        "a byte array's declared length": b"\x80\x05\x96" + size + b".",
        "a byte array's length beyond all memory": b"\x80\x05\x96" + b"\xff" * 8 + b".",
        "a frame's declared length": b"\x80\x04\x95" + size + b".",
        "bytes' declared length": b"\x80\x04\x8e" + size + b".",
        "a number's declared length": b"\x80\x04\x8b\xff\xff\xff\x7f.",
        "arrays that share their bytes": b"\x80\x02" + text + b"(" + (array + state) * 4096 + b"l.",
        "texts that are one": b"\x80\x02}(U\x06labelsC\xff"
        + b"a" * 255
        + b"q\x01("
        + b"h\x01" * 9999
        + b"lu.",
    }


@pytest.mark.parametrize("case", huge_pickles())
def test_a_pickle_takes_no_more_memory_than_its_size_bounds(tmp_path, case):
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_1").write_bytes(huge_pickles()[case])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="data_batch_1"):
            load_dataset("cifar10", tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20  # the largest of these files has 1.6 MB


@pytest.mark.parametrize("content", [[1, 2], {1: 2}, "text", None])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    folder = write_cifar10(tmp_path)
    (folder / "test_batch").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="expected a dict with text keys"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("names", [["a"] * 9, list(range(10)), "text", None])
def test_bad_class_names_are_refused(tmp_path, names):
    folder = write_cifar10(tmp_path)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(ValueError, match=r"batches\.meta.*(class names|9 classes, expected 10)"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("missing", ["data_batch_4", "test_batch"])
def test_a_missing_batch_is_named(tmp_path, missing):
    (write_cifar10(tmp_path) / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing} is missing"):
        load_dataset("cifar10", tmp_path)


def test_a_folder_without_images_is_refused(tmp_path):
    write_cifar10(tmp_path, rows=(0, 0, 0, 0, 0, 5))
    with pytest.raises(ValueError, match="holds no train images"):
        load_dataset("cifar10", tmp_path)


def test_a_truncated_pickle_is_refused_wherever_it_ends(tmp_path):
    folder = write_cifar10(tmp_path, python2_dumps)
    path = folder / "data_batch_2"
    whole = path.read_bytes()
    for length in [0, 1, 2, 10, 50, 100, 150, 200, 1000, len(whole) // 2, len(whole) - 100, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="data_batch_2"):
            load_dataset("cifar10", tmp_path)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_damaged_pickle_is_read_or_refused_and_nothing_else(tmp_path_factory, data):
    from awnet.data.pickles import read_pickle

    batch = {"data": DATA[:1, :4], "labels": LABELS[:2], "filenames": ["a", "b"]}
    dumps = data.draw(st.sampled_from([python2_dumps, pickle.dumps]))
    content = bytearray(dumps(batch))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        value = read_pickle(path, *batch)
    except ValueError:
        return
    assert isinstance(value, dict)


@pytest.mark.parametrize("change", ["one byte short", "label 10", "empty test"])
def test_a_bad_binary_file_is_refused(tmp_path, change):
    folder = write_cifar10_binary(tmp_path)
    path = folder / ("test_batch.bin" if change == "empty test" else "data_batch_5.bin")
    content = bytearray(path.read_bytes())
    if change == "label 10":
        content[3073] = 10
    path.write_bytes({"one byte short": content[:-1], "label 10": content, "empty test": b""}[change])
    with pytest.raises(ValueError, match=r"truncated|labels from 0 to 10|no test images"):
        load_dataset("cifar10", tmp_path)


# ── pickles that want to run code ─────────────────────────────────────────────────────────────────────────


class Calls:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def hostile_pickles(marker):
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    numpy_open = np.lib.format.open_memmap
    calls = {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, str(marker), "w"),
        "subprocess": Calls(subprocess.Popen, touch, 0, None, None, None, None, None, True, True),
        "numpy.memmap": Calls(np.memmap, str(marker), "uint8", "w+", 0, (4,)),
        "numpy.lib.format.open_memmap": Calls(numpy_open, str(marker), "w+", "uint8", (4,)),
        "an array of a class of another module": Calls(np._core.multiarray._reconstruct, Path, (0,), b"b"),
        "torch.hub": Calls(torch.load, str(marker)),
    }
    made = {name: pickle.dumps({"data": call}, protocol=4) for name, call in calls.items()}
    made["os.system, protocol 0"] = pickle.dumps({"data": calls["os.system"]}, protocol=0)
    made["the instance opcode"] = f"(S'{touch}'\nios\nsystem\n.".encode()
    made["the object opcode"] = f"(cos\nsystem\nS'{touch}'\no.".encode()
    made["an attribute of an allowed name"] = (
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93"
        + b"(\x8c"
        + bytes([len(str(marker))])
        + str(marker).encode()
        + b"tR."
    )
    made["numpy's own eval"] = f"cnumpy.testing\nrundocs\n(S'{marker}'\ntR.".encode()
    made["a persistent id"] = b"Pmarker\n."
    made["an extension code"] = b"\x82\x01."
    made["a state for a function"] = b"cnumpy.core.multiarray\n_reconstruct\n}S'__defaults__'\nNsb."
    made["a state for a class"] = b"cnumpy\nndarray\n}S'values'\nNsb."
    made["an array that was never filled"] = pickle.dumps(
        {"data": Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b")}, protocol=2
    )
    made["more values than bytes"] = python2_dumps({"data": np.zeros(4, np.uint8)}).replace(
        b"K\x04\x85", b"K\x09\x85"
    )
    made["a shape beyond all memory"] = python2_dumps({"data": np.zeros(4, np.uint8)}).replace(
        b"K\x04\x85", b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85"
    )
    made["a memo index beyond all memory"] = b"\x80\x02}r\xff\xff\xff\xff."
    made["a text beyond all memory"] = b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f" + b"abc."
    return made


@pytest.mark.parametrize("case", sorted(hostile_pickles(Path("marker"))))
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, case):
    marker = tmp_path / "ran"
    content = hostile_pickles(marker)[case]
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_1") as error:
        load_dataset("cifar10", tmp_path)
    assert not marker.exists()
    assert not isinstance(error.value, pickle.UnpicklingError)
    # and the reader works as before
    write_cifar10(tmp_path)
    assert len(load_dataset("cifar10", tmp_path).test) == 40


def test_some_of_these_pickles_do_run_code_in_an_ordinary_unpickler(tmp_path):
    # else the test above would prove nothing
    for case in ("os.system", "eval", "open", "numpy.memmap", "the instance opcode", "the object opcode"):
        marker = tmp_path / case.replace(" ", "-")
        pickle.loads(hostile_pickles(marker)[case])
        assert marker.exists(), case


def test_tiny_imagenet_is_read_in_the_order_of_classes_and_numbers(tmp_path):
    write_tiny_imagenet(tmp_path)
    splits = load_dataset("tiny_imagenet", tmp_path)
    assert splits.train.classes == ("n01000000", "n02000000", "n03000000")
    images, labels = everything(splits)
    assert images.shape == (36, 3, 64, 64)
    assert labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    red = [10 * i + k for k in (1, 0, 2) for i in range(12)]  # written as the second, first and third class
    assert (images[:, 0].float().mean((1, 2)) - torch.tensor(red)).abs().max() < 3  # JPEG rounds
    grey = images[3]
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])
    assert splits.test.labels.tolist() == [1, 0, 2] * 3
    assert (splits.test.images[:, 0].float().mean((1, 2)) - torch.arange(9) * 20.0).abs().max() < 3
    assert splits.train.augmentation == Augmentation(shift=4, flip=True)


def test_tiny_imagenet_with_some_of_its_classes(tmp_path):
    folder = write_tiny_imagenet(tmp_path, present=["n03000000", "n01000000"])
    splits = load_dataset("tiny_imagenet", folder)
    assert splits.test.classes == ("n01000000", "n03000000")
    assert splits.test.labels.tolist() == [0, 1] * 3


def break_tiny_imagenet(folder, case):
    train, val = folder / "train" / WNIDS[0] / "images", folder / "val"
    first = train / f"{WNIDS[0]}_0.JPEG"
    annotations = val / "val_annotations.txt"
    if case == "truncated image":
        random = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(random).save(first)
        first.write_bytes(first.read_bytes()[:1500])
    elif case == "not an image":
        first.write_text("<html>not found</html>")
    elif case == "empty image":
        first.write_bytes(b"")
    elif case == "a PNG by another name":
        plain_picture(1).save(first, format="PNG")
    elif case == "another size":
        Image.new("RGB", (32, 64)).save(first)
    elif case == "an image bomb":
        random = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
        Image.fromarray(random).save(first)
        content = first.read_bytes()
        size = content.index(b"\xff\xc0") + 5  # of the frame: height, width
        first.write_bytes(content[:size] + b"\xff\xdc\xff\xdc" + content[size + 4 :])
    elif case == "missing class folder":
        shutil.rmtree(folder / "train" / WNIDS[2])
    elif case == "missing images folder":
        (folder / "train" / WNIDS[2] / "images").rename(folder / "train" / WNIDS[2] / "pictures")
    elif case == "missing training images":
        for i in (3, 7):
            (train / f"{WNIDS[0]}_{i}.JPEG").unlink()
    elif case == "no image in a class":
        for path in train.iterdir():
            path.unlink()
    elif case == "truncated list of classes":
        (folder / "wnids.txt").write_text(f"{WNIDS[0]}\n{WNIDS[1]}\n")
    elif case == "empty list of classes":
        (folder / "wnids.txt").write_text("")
    elif case == "truncated annotations":
        annotations.write_text("".join(annotations.read_text().splitlines(True)[:6]))
    elif case == "a test image and its annotation are missing":
        (val / "images" / "val_8.JPEG").unlink()
        annotations.write_text("".join(annotations.read_text().splitlines(True)[:8]))
    elif case == "no test images":
        shutil.rmtree(val / "images")
    elif case == "missing test image":
        (val / "images" / "val_4.JPEG").unlink()
    elif case == "missing annotations":
        annotations.unlink()
    elif case == "damaged annotations":
        annotations.write_text("val_0.JPEG\n")
    elif case == "a path in the annotations":
        annotations.write_text(f"../../../secret.JPEG\t{WNIDS[0]}\n")
    elif case == "no annotation of these classes":
        annotations.write_text("val_0.JPEG\tn99999999\t0\t0\t0\t0\n")
    elif case == "no train folder":
        (folder / "train").rename(folder / "other")
    elif case == "no class folder":
        (folder / "train").rename(folder / "other")
        (folder / "train").mkdir()


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("truncated image", ValueError, "_0.JPEG is damaged"),
        ("not an image", ValueError, "_0.JPEG is damaged, or not a JPEG"),
        ("empty image", ValueError, "_0.JPEG is damaged, or not a JPEG"),
        ("a PNG by another name", ValueError, "_0.JPEG is damaged, or not a JPEG"),
        ("another size", ValueError, "_0.JPEG is 32×64, expected 64×64"),
        ("missing test image", FileNotFoundError, "1 of 9 test images are missing, for example val_4"),
        ("no test images", FileNotFoundError, "9 of 9 test images are missing, for example val_0"),
        ("an image bomb", ValueError, "_0.JPEG is 65500×65500, expected 64×64"),
        ("missing class folder", FileNotFoundError, "no images folder for 1 of the 3 classes.*n03000000"),
        ("missing images folder", FileNotFoundError, "no images folder for 1 of the 3 classes.*n03000000"),
        ("missing training images", ValueError, "has 34 images, but 3 classes of 12 make 36: 1 classes"),
        ("no image in a class", ValueError, "has 24 images, but 3 classes of 12 make 36.*n02000000 has 0"),
        ("truncated list of classes", ValueError, "wnids.txt lacks 1 of the 3 classes"),
        ("empty list of classes", ValueError, "wnids.txt is empty"),
        ("truncated annotations", ValueError, "no label for 3 of the 9 images.*val_6"),
        ("a test image and its annotation are missing", ValueError, "names 8 images, but .* make 9"),
        ("missing annotations", FileNotFoundError, "val_annotations.txt is missing"),
        ("damaged annotations", ValueError, "line 1: expected 'file<TAB>wnid"),
        ("a path in the annotations", ValueError, "line 1: expected 'file<TAB>wnid"),
        ("no annotation of these classes", ValueError, "no label for 8 of the 9 images"),
        ("no train folder", FileNotFoundError, "train is missing"),
        ("no class folder", FileNotFoundError, "no images folder for 3 of the 3 classes"),
    ],
)
def test_a_damaged_tiny_imagenet_is_refused(tmp_path, case, error, message):
    folder = write_tiny_imagenet(tmp_path)
    break_tiny_imagenet(folder, case)
    with pytest.raises(error, match=message):
        load_dataset("tiny_imagenet", tmp_path)


# ── real images ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_lossless_part_of_cifar10_is_read_as_published(tmp_path):
    if not (SAMPLES / "cifar10_lossless_part.npz").is_file():
        pytest.skip(f"no sample of CIFAR-10 in {SAMPLES}")
    command = [sys.executable, SAMPLES / "unpack_cifar10.py", tmp_path, "--images", "lossless"]
    subprocess.run(command, check=True, capture_output=True)
    splits = load_dataset("cifar10", tmp_path)
    pack = np.load(SAMPLES / "cifar10_lossless_part.npz")
    images, labels = everything(splits)
    assert np.array_equal(images.numpy(), pack["train_images"].transpose(0, 3, 1, 2))
    assert np.array_equal(labels.numpy(), pack["train_labels"])
    assert np.array_equal(splits.test.images.numpy(), pack["test_images"].transpose(0, 3, 1, 2))
    assert splits.test.classes[:3] == ("airplane", "automobile", "bird")
    assert len(splits.validation) == round(0.02 * len(images))


def test_a_part_of_tiny_imagenet_is_read_as_published(tmp_path):
    archive = SAMPLES / "tiny_imagenet_20.zip"
    if not archive.is_file():
        pytest.skip(f"no sample of Tiny-ImageNet in {SAMPLES}")
    with zipfile.ZipFile(archive) as opened:
        wanted = [
            name for name in opened.namelist() if "/train/" not in name or re.search(r"_1?\d\.JPEG$", name)
        ]
        opened.extractall(tmp_path, wanted)
    splits = load_dataset("tiny_imagenet", tmp_path)
    assert (len(splits.train) + len(splits.validation), len(splits.test)) == (400, 1000)
    assert torch.bincount(splits.test.labels).tolist() == [50] * 20
    assert isinstance(splits.train, Dataset)

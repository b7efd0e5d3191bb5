import collections
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.cifar_files import pictures, write_cifar10
from support.http_server import Server, tar_of

from awnet.data import (
    Augmentation,
    Dataset,
    ThreatModel,
    check_images,
    check_labels,
    dataset,
    download,
    downloads,
    from_arrays,
    list_datasets,
    load_dataset,
)
from awnet.data.dataset import augmented, stratified
from awnet.files import locked

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "data"


def small(n=20, size=6, channels=3, **options):
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)
    return from_arrays(images, torch.arange(n) % 3, **options)


# ── the data set ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_steps_are_the_papers_at_8_255_and_scale_with_eps():
    at = ThreatModel(8 / 255)
    assert at.train_step_size == at.pgd_sat_step_size == at.cw_step_size == pytest.approx(2 / 255)
    assert at.pgd_trades_step_size == pytest.approx(0.003)
    assert at.trades_train_step_size == pytest.approx(0.007)
    assert ThreatModel(0.15).pgd_trades_step_size == pytest.approx(0.15 * 0.095625)


@pytest.mark.parametrize("eps", [0.0, -0.1, 1.5, float("nan")])
def test_an_impossible_eps_is_refused(eps):
    with pytest.raises(ValueError, match=r"eps must be in \(0, 1\]"):
        ThreatModel(eps)


def test_a_negative_shift_is_refused():
    with pytest.raises(ValueError, match="shift must be in"):
        Augmentation(shift=-1)


def test_batches_are_the_images_divided_by_their_maximum():
    data = small(7)
    batches = list(data.batches(3))
    assert [len(batch.y) for batch in batches] == [3, 3, 1]
    x = torch.cat([batch.x for batch in batches])
    assert x.dtype == torch.float32
    assert np.array_equal(x.numpy(), data.images.numpy().astype(np.float32) / np.float32(255))
    assert torch.equal(torch.cat([batch.y for batch in batches]), data.labels)
    assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(7))
    assert [len(batch.y) for batch in data.batches(3, drop_last=True)] == [3, 3]
    assert list(data.batches(8, drop_last=True)) == []


def test_shuffling_is_a_permutation_that_changes_with_seed_and_epoch():
    data = small(40)

    def order(**options):
        return torch.cat([batch.index for batch in data.batches(7, shuffle=True, **options)]).tolist()

    assert sorted(order()) == list(range(40))
    assert order() == order()
    assert len({tuple(order(seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9


@pytest.mark.parametrize("start", [0, 1, 3, 5, 9])
def test_batches_with_start_continue_an_interrupted_epoch(start):
    data = small(20, shift=2, flip=True)
    options = {"shuffle": True, "augment": True, "seed": 4, "epoch": 2}
    whole = list(data.batches(4, **options))
    rest = list(data.batches(4, start=start, **options))
    assert len(rest) == max(0, 5 - start)
    for a, b in zip(whole[start:], rest, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_the_ranks_share_each_batch():
    data = small(20, shift=2, flip=True)
    options = {"shuffle": True, "augment": True, "seed": 4, "epoch": 2}
    parts = [list(data.batches(6, part=(rank, 3), **options)) for rank in range(3)]
    for whole, *own in zip(data.batches(6, **options), *parts, strict=True):
        for rank in range(3):
            for value, mine in zip(whole, own[rank], strict=True):
                assert torch.equal(mine, value[rank::3])


SHUFFLED = {"shuffle": True, "augment": True, "seed": 4, "epoch": 2}


def assert_same_batches(one, two):
    for a, b in zip(one, two, strict=True):
        for value, other in zip(a, b, strict=True):
            assert torch.equal(value, other)


@pytest.mark.parametrize("options", [{"start": 2}, {"drop_last": True}, {"part": (1, 2)}, {"start": 9}])
def test_a_data_set_that_is_not_on_the_device_gives_the_same_bits(options, monkeypatch):
    data, threads = small(23, shift=2, flip=True), set()
    want = list(data.batches(5, **SHUFFLED, **options))
    select = torch.index_select

    def watched(*arguments, **more):
        threads.add(threading.current_thread())
        return select(*arguments, **more)

    monkeypatch.setattr(torch, "index_select", watched)
    monkeypatch.setattr(dataset, "_resident", lambda images, device: False)
    assert_same_batches(want, data.batches(5, **SHUFFLED, **options, device="cpu"))
    assert threading.main_thread() not in threads
    assert len(threads) == bool(want)


def test_images_stay_in_the_file_that_they_are_mapped_from(tmp_path, monkeypatch):
    data = small(23, shift=2, flip=True)
    np.save(tmp_path / "images.npy", data.images.numpy())
    pixels = np.load(tmp_path / "images.npy", mmap_mode="c")
    mapped = from_arrays(pixels, data.labels, shift=2, flip=True)
    assert mapped.images.data_ptr() == pixels.ctypes.data
    assert mapped.placed("cpu", "host").images.data_ptr() == pixels.ctypes.data
    monkeypatch.setattr(dataset, "_resident", lambda images, device: False)
    assert_same_batches(data.batches(5, **SHUFFLED), mapped.batches(5, **SHUFFLED))


def test_an_epoch_may_be_stopped_early(monkeypatch):
    monkeypatch.setattr(dataset, "_resident", lambda images, device: False)
    before = set(threading.enumerate())  # compilers, for one, keep threads of their own
    batches = small(20).batches(4)
    next(batches)
    assert len(set(threading.enumerate()) - before) == 1  # it fetches the next batch
    batches.close()
    assert not set(threading.enumerate()) - before


def test_the_memory_of_the_images_follows_the_option_and_the_device(monkeypatch):
    data = small(4)
    assert data.placed("cpu").device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * data.images.nbytes - 1, 10**9))
    assert data.placed("cuda").device.type == "cpu"  # no room
    assert data.placed("cuda", "host").device.type == "cpu"
    with pytest.raises(ValueError, match="memory must be one of"):
        data.placed("cpu", "disk")


@pytest.mark.gpu
def test_on_a_gpu_host_memory_gives_the_same_bits():
    data = small(23, shift=2, flip=True)
    there = data.placed("cuda", "device")
    assert there.device.type == "cuda"
    assert_same_batches(there.batches(5, **SHUFFLED), data.batches(5, **SHUFFLED, device="cuda"))
    for one, other in zip(data.batches(5, **SHUFFLED), there.batches(5, **SHUFFLED), strict=True):
        assert torch.equal(one.x, other.x.cpu())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.booleans(), st.integers(0, 3))
def test_a_sample_is_augmented_alike_in_every_batch(batch_size, rows, shuffle, epoch):
    data = small(20, shift=2, flip=True)
    whole = next(data.batches(20, augment=True, seed=1, epoch=epoch)).x
    part = data.take(torch.arange(20 - rows, 20))
    for batch in part.batches(batch_size, shuffle=shuffle, augment=True, seed=1, epoch=epoch):
        assert torch.equal(batch.x, whole[batch.index])


def shifted(image, down, right, flip):
    # one pixel at a time: the definition
    height, width = image.shape[1:]
    out = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            source = width - 1 - j if flip else j
            if 0 <= i + down < height and 0 <= source + right < width:
                out[:, i, j] = image[:, i + down, source + right]
    return out


def test_augmentation_is_a_shift_and_a_flip_and_reaches_all_of_them():
    image = torch.arange(1, 2 * 4 * 5 + 1, dtype=torch.uint8).reshape(1, 2, 4, 5)
    choices = {
        shifted(image[0], down, right, flip).numpy().tobytes(): (down, right, flip)
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        for flip in (False, True)
    }
    assert len(choices) == 18
    index = torch.arange(1800)
    out = augmented(image.expand(1800, -1, -1, -1), index, Augmentation(1, True), seed=0, epoch=0)
    seen = Counter(choices[crop.numpy().tobytes()] for crop in out)
    assert len(seen) == 18
    assert max(abs(count - 100) for count in seen.values()) < 50  # 5 standard deviations


@pytest.mark.parametrize("augmentation", [Augmentation(shift=1), Augmentation(flip=True)])
def test_shift_and_flip_each_change_with_seed_epoch_and_sample(augmentation):
    image = torch.arange(1, 21, dtype=torch.uint8).reshape(1, 1, 4, 5).expand(50, -1, -1, -1)
    index = torch.arange(50)
    results = {
        augmented(image, where, augmentation, seed=seed, epoch=epoch).numpy().tobytes()
        for where, seed, epoch in [(index, 0, 0), (index, 1, 0), (index, 0, 1), (index + 50, 0, 0)]
    }
    assert len(results) == 4


def test_augmentation_without_shift_and_flip_changes_nothing():
    data = small(5)
    assert torch.equal(next(data.batches(5, augment=True)).x, next(data.batches(5)).x)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 60), st.integers(0, 5))
def test_stratified_gives_each_class_its_share(labels, n, key):
    labels = torch.tensor(labels)
    n = min(n, len(labels))
    chosen, others = stratified(labels, torch.arange(len(labels)), n, key)
    assert len(chosen) == n
    assert torch.equal(torch.cat([chosen, others]).sort().values, torch.arange(len(labels)))
    share = torch.bincount(labels, minlength=5) * (n / len(labels))
    assert ((torch.bincount(labels[chosen], minlength=5) - share).abs() < 1).all()


def test_stratified_depends_on_the_samples_not_on_their_order():
    labels, index = torch.arange(60) % 4, torch.arange(60) + 100
    chosen, _ = stratified(labels, index, 20, 5)
    turned, _ = stratified(labels.flip(0), index.flip(0), 20, 5)
    assert sorted(index[chosen].tolist()) == sorted(index.flip(0)[turned].tolist())
    assert not torch.equal(chosen, stratified(labels, index, 20, 6)[0])


def test_subset_keeps_proportions_and_global_indices():
    data = small(30)
    part = data.subset(9)
    assert torch.bincount(part.labels).tolist() == [3, 3, 3]
    assert torch.equal(part.images, data.images[part.index])
    assert torch.equal(part.index, data.subset(9).index)
    assert not torch.equal(part.index, data.subset(9, seed=1).index)
    assert data.subset(99) is data
    with pytest.raises(ValueError, match="n must be an integer of at least 1"):
        data.subset(0)


def test_the_fingerprint_depends_on_the_content_only():
    data = small(5)
    print_of = data.fingerprint()
    assert re.fullmatch("[0-9a-f]{32}", print_of)
    assert small(5).fingerprint() == print_of
    pixel = data.images.clone()
    pixel[0, 0, 0, 0] ^= 1
    others = [
        replace(data, images=pixel),
        replace(data, labels=data.labels.flip(0)),
        replace(data, index=data.index + 1),
        replace(data, classes=("a", "b", "c")),
        replace(data, images=data.images // 2, max_value=200),
    ]
    assert len({print_of, *(other.fingerprint() for other in others)}) == 6


def test_a_data_set_reports_its_sizes():
    data = small(5, size=6, channels=1)
    assert (len(data), data.num_classes, data.in_channels, data.image_size) == (5, 3, 1, (6, 6))
    assert repr(data) == "Dataset('custom', 'train', 5×1×6×6, 3 classes, cpu)"
    assert data.to("cpu").fingerprint() == data.fingerprint()


BAD_ARRAYS = [
    ({"images": np.zeros((2, 3, 4, 4))}, "images must be uint8"),
    ({"images": np.zeros((2, 4, 4), np.uint8)}, "images must be uint8"),
    ({"labels": [0]}, r"labels must be int64 \[2\]"),
    ({"labels": [0.0, 1.0]}, "labels must be whole numbers"),
    ({"labels": np.eye(2, dtype=np.int64)}, "labels must be whole numbers"),
    ({"labels": [True, False]}, "labels must be whole numbers"),
    ({"labels": [0, -1]}, "labels must be in"),
    ({"classes": ["only one"]}, r"labels must be in \[0, 1\)"),
    ({"max_value": 16}, "above max_value 16"),
    ({"max_value": 0}, "max_value must be in"),
    ({"eps": 0}, "eps must be in"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARRAYS)
def test_bad_arrays_are_refused(change, message):
    good = {"images": np.full((2, 3, 4, 4), 17, np.uint8), "labels": [0, 1]}
    assert len(from_arrays(**good)) == 2
    with pytest.raises(ValueError, match=message):
        from_arrays(**{**good, **change})


@pytest.mark.parametrize("shape", [(9, 32, 32, 3), (9, 28, 28, 1), (9, 5, 7, 4), (9, 3, 3, 1), (9, 8, 6, 2)])
def test_images_in_nhwc_are_refused_or_converted_when_told(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    labels = np.arange(9) % 3
    for one in (images, torch.from_numpy(images)):
        with pytest.raises(ValueError, match=r"looks like 9 images of .*layout='nhwc'"):
            from_arrays(one, labels)
        made = from_arrays(one, labels, layout="nhwc")
        assert made.images.is_contiguous()
        assert np.array_equal(made.images.numpy(), images.transpose(0, 3, 1, 2))
    assert from_arrays(images, labels, layout="nchw").in_channels == shape[1]


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 4), (2, 1, 1, 1), (2, 3, 64, 3), (2, 4, 4, 4), (2, 64, 8, 8), (0, 3, 32, 32)]
)
def test_images_in_nchw_of_any_size_are_taken(shape):
    assert from_arrays(np.zeros(shape, np.uint8), [0, 1][: shape[0]]).images.shape == shape


LABELS_OF_OTHER_KINDS = {
    "words": (np.array(["cat", "dog"]), "such as .*'cat'.*numpy.unique"),
    "a list of words": (["cat", "dog"], "number the words"),
    "bytes": (np.array([b"cat", b"dog"]), "number the words"),
    "words of pandas": (np.array(["cat", "dog"], dtype=object), "object.*'cat'.*number the words"),
    "a missing one": (np.array([1, None], dtype=object), "such as None; .*none missing"),
    "booleans of pandas": (np.array([1, True], dtype=object), "such as True"),
    "fractions of pandas": (np.array([1, 0.5], dtype=object), r"such as 0\.5"),
    "a number beyond int64": (np.array([1, 2**70], dtype=object), "fit into int64"),
    "uint64 beyond int64": (np.array([1, 2**63], dtype=np.uint64), "fit into int64"),
    "a column": (np.zeros((2, 1), np.int64), r"labels\[:, 0\]"),
    "one-hot": (np.eye(2, dtype=np.int64), r"argmax\(1\)"),
    "one-hot tensor": (torch.eye(2), r"argmax\(1\)"),
    "floats": (np.array([0.0, 1.0]), r"astype\('int64'\)"),
    "float tensor": (torch.zeros(2), r"torch.float32 \[2\].*astype"),
    "complex": (np.array([1j, 0]), "whole numbers"),
    "dates": (np.array(["2020-01-01", "2020-01-02"], "M8[D]"), "whole numbers"),
    "unequal rows": ([[0], [0, 1]], "labels must be whole numbers"),
    "a scalar": (3, "one label per image"),
    "none": (None, "whole numbers"),
    "far too many classes": ([0, 10**12], "number the classes from 0"),
}


@pytest.mark.parametrize("case", LABELS_OF_OTHER_KINDS)
def test_labels_of_another_kind_are_refused_with_what_helps(case):
    labels, message = LABELS_OF_OTHER_KINDS[case]
    with pytest.raises(ValueError, match=message):
        from_arrays(np.zeros((2, 1, 8, 8), np.uint8), labels)


@pytest.mark.parametrize("dtype", [object, np.uint8, np.int32, np.uint64, ">i4"])
def test_whole_number_labels_of_any_dtype_are_taken(dtype):
    labels = np.array([2, 0], dtype=dtype)
    assert from_arrays(np.zeros((2, 1, 8, 8), np.uint8), labels).labels.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((1, 8, 8), np.uint8), np.zeros((1, 8, 9), np.uint8)], "one uint8 array"),
        (["a.png", "b.png"], "images must be uint8"),
        (np.zeros((2, 8, 8), np.uint8), r"\[N, H, W\] with images\[:, None\]"),
        (np.zeros((2, 3, 8, 8), np.float32), r"floats in \[0, 1\] with"),
        (np.array([None, None]), "images must be uint8"),
        (None, "images must be uint8"),
    ],
)
def test_images_of_another_kind_are_refused_with_what_helps(images, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(images, [0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size must"), ({"batch_size": 2, "start": -1}, "start must")],
)
def test_bad_batching_is_refused_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        small(4).batches(**options)


GOOD_X, GOOD_Y = torch.rand(2, 3, 4, 4), torch.tensor([0, 9])


def with_value(value):
    x = GOOD_X.clone()
    x[1, 2, 3, 0] = value
    return x


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (GOOD_X.numpy(), TypeError, "x must be a torch.Tensor"),
        ((GOOD_X * 255).to(torch.uint8), TypeError, "floating point"),
        (GOOD_X[0], ValueError, r"\[B, C, H, W\]"),
        (with_value(float("nan")), ValueError, "NaN or infinite"),
        (with_value(float("inf")), ValueError, "NaN or infinite"),
        (with_value(-float("inf")), ValueError, "NaN or infinite"),
        (with_value(1.001), ValueError, r"x must be in \[0, 1\]"),
        (with_value(-0.001), ValueError, r"x must be in \[0, 1\]"),
    ],
)
def test_bad_images_are_refused(x, error, message):
    check_images(GOOD_X)
    check_images(GOOD_X.bfloat16())
    check_images(GOOD_X[:0])
    with pytest.raises(error, match=message):
        check_images(x)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        ([0, 1], TypeError, "y must be a torch.Tensor"),
        (GOOD_Y.int(), TypeError, "int64"),
        (GOOD_Y.float(), TypeError, "int64"),
        (GOOD_Y[None], ValueError, r"y must be \[B\]"),
        (torch.tensor([0, 10]), ValueError, r"y must be in \[0, 10\), got labels from 0 to 10"),
        (torch.tensor([-1, 3]), ValueError, r"y must be in \[0, 10\), got labels from -1 to 3"),
    ],
)
def test_bad_labels_are_refused(y, error, message):
    check_labels(GOOD_Y, 10)
    check_labels(GOOD_Y[:0], 10)
    with pytest.raises(error, match=message):
        check_labels(y, 10)


# ── digits, and what holds for every data set ─────────────────────────────────────────────────────────────


def test_an_unknown_data_set_is_refused_with_the_known_names():
    assert list_datasets() == ["digits", "cifar10", "cifar100", "tiny_imagenet"]
    with pytest.raises(ValueError, match="unknown data set 'mnist'; known are digits, cifar10, cifar100"):
        load_dataset("mnist")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet"])
def test_a_missing_folder_says_what_to_provide(name, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"(?s){name} is not in data_dir.*--data-dir.*awnet data download"
    ):
        load_dataset(name, tmp_path)
    with pytest.raises(FileNotFoundError, match="that folder does not exist"):
        load_dataset(name, tmp_path / "nowhere")


def test_digits_are_split_as_documented():
    train, validation, test = load_dataset("digits")
    assert [len(part) for part in (train, validation, test)] == [1197, 200, 400]
    assert [part.split for part in (train, validation, test)] == ["train", "validation", "test"]
    together = torch.cat([train.index, validation.index, test.index])
    assert torch.equal(together.sort().values, torch.arange(1797))
    for part in (train, validation, test):
        share = torch.bincount(part.labels) / len(part)
        assert (share - 0.1).abs().max() < 0.01
        assert part.images.max() == part.max_value == 16
        assert (part.in_channels, part.image_size, part.num_classes) == (1, (8, 8), 10)
        assert part.threat_model == ThreatModel(0.15)
        assert part.augmentation == Augmentation(shift=1, flip=False)
    assert next(train.batches(9)).x.max() == 1


def test_the_test_images_are_the_same_for_every_seed_and_never_change():
    first, second = load_dataset("digits", seed=0), load_dataset("digits", seed=1)
    assert first.test.fingerprint() == second.test.fingerprint() == "d2328a003b95ba0dde0d7a794a002ee3"
    assert first.validation.fingerprint() == "44bcc062277be7e48af5ce6b19a94982"
    assert first.validation.fingerprint() != second.validation.fingerprint()


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
    # protocol 2 or 3 writes a set by name; later ones by an opcode of its own, which harms nobody
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


# ── Tiny-ImageNet ─────────────────────────────────────────────────────────────────────────────────────────

WNIDS = ["n02000000", "n01000000", "n03000000"]  # as the published wnids.txt, not in order


def plain_picture(value, mode="RGB"):
    colour = (value, 255 - value, 128) if mode == "RGB" else value
    return Image.new(mode, (64, 64), colour)


def write_tiny_imagenet(parent, present=WNIDS, per_class=12):
    folder = parent / "tiny-imagenet-200"
    for k, wnid in enumerate(present):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        for i in range(per_class):
            picture = plain_picture(10 * i + k, "L" if i == 3 else "RGB")
            picture.save(images / f"{wnid}_{i}.JPEG", quality=100, subsampling=0)
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for i in range(9):
        wnid = WNIDS[i % 3]
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n")
        if wnid in present:
            plain_picture(20 * i).save(
                folder / "val" / "images" / f"val_{i}.JPEG", quality=100, subsampling=0
            )
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(present) + "\n")
    return folder


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


# ── downloads ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def zip_of(folder):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for path in sorted(folder.rglob("*")):
            opened.write(path, path.relative_to(folder.parent))
    return file.getvalue()


def test_a_download_is_unpacked_read_and_not_repeated(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    seen = []
    folder = download("cifar10", tmp_path / "mine", progress=lambda have, total: seen.append((have, total)))
    assert folder == tmp_path / "mine" / "cifar-10-batches-py"
    assert seen[-1] == (len(server.content), len(server.content))
    assert load_dataset("cifar10", tmp_path / "mine").test.fingerprint() == (
        load_dataset("cifar10", tmp_path / "theirs").test.fingerprint()
    )
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
    ]
    assert download("cifar10", tmp_path / "mine") == folder
    assert len(server.asked) == 1


def test_tiny_imagenet_is_unpacked_from_a_zip(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "tiny_imagenet", zip_of(write_tiny_imagenet(tmp_path / "theirs")))
    download("tiny_imagenet", tmp_path / "mine")
    assert len(load_dataset("tiny_imagenet", tmp_path / "mine").test) == 9


def test_a_download_sweeps_what_killed_ones_left_and_nothing_of_a_running_one(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    mine = tmp_path / "mine"
    mine.mkdir()
    code = (
        "import sys; from pathlib import Path; from awnet.files import temporary_folder\n"
        "with temporary_folder(Path(sys.argv[1])) as scratch:\n"
        "    (scratch / 'half').write_text('x'); print('unpacking', flush=True); sys.stdin.read()"
    )
    names = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar-100-python")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(mine / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in names
    ]
    for process in processes:
        process.stdout.readline()
    for process in processes[:2]:
        process.kill()
        process.wait()
    assert len(list(mine.iterdir())) == 3
    download("cifar10", mine)
    left = sorted(path.name for path in mine.iterdir())
    assert left[1:] == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]
    assert left[0].startswith(".cifar-100-python.")  # of the process that still runs
    processes[2].communicate()
    assert len(list(mine.iterdir())) == 2


def test_two_downloads_of_one_archive_do_not_mix(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    part = tmp_path / "mine" / "cifar-10-python.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes(server.content[:10])
    with (
        locked(part, lambda: "busy"),
        pytest.raises(ConnectionError, match="another process downloads it"),
    ):
        download("cifar10", tmp_path / "mine")
    assert part.read_bytes() == server.content[:10]
    assert download("cifar10", tmp_path / "mine").is_dir()


@pytest.mark.parametrize("ranges", [True, False], ids=["server knows ranges", "server does not"])
def test_an_interrupted_download_resumes(tmp_path, server, monkeypatch, ranges):
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    server.ranges, server.break_off_after = ranges, 1000
    mine = tmp_path / "mine"
    with pytest.raises(ConnectionError, match=r"was lost after 1,000 of .*the same command resumes it"):
        download("cifar10", mine)
    part = mine / "cifar-10-python.tar.gz.part"
    assert part.read_bytes() == server.content[:1000]
    assert not (mine / "cifar-10-batches-py").exists()
    server.break_off_after = None
    seen = []
    download("cifar10", mine, progress=lambda have, total: seen.append((have, total)))
    assert server.asked == [None, "bytes=1000-"]
    assert seen[0][0] > 1000
    assert seen[-1] == (len(server.content), len(server.content))
    assert not part.exists()
    assert len(load_dataset("cifar10", mine).test) == 40


def test_a_complete_partial_download_is_used(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(server.content)
    download("cifar10", tmp_path)
    assert len(load_dataset("cifar10", tmp_path).test) == 40


def test_a_wrong_checksum_is_refused_and_the_next_attempt_starts_afresh(tmp_path, server, monkeypatch):
    archive = tar_of(write_cifar10(tmp_path / "theirs"))
    server.serve(monkeypatch, "cifar10", archive)
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(b"left over from another archive")
    with pytest.raises(ValueError, match=r"(?i)md5 hash .* does not match"):
        download("cifar10", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    download("cifar10", tmp_path)
    assert server.asked[-1] is None


@pytest.mark.parametrize("length", [True, False], ids=["length declared", "no length"])
def test_a_download_stops_past_the_size_of_every_archive(tmp_path, server, monkeypatch, length):
    server.serve(monkeypatch, "cifar10", bytes(5000))
    monkeypatch.setattr(downloads, "MOST_BYTES", 4000)
    monkeypatch.setattr(downloads, "CHUNK", 1000)
    server.length, seen = length, []
    with pytest.raises(ValueError, match=r"no published archive has more than 4,000.*--url"):
        download("cifar10", tmp_path, progress=lambda have, total: seen.append(have))
    assert seen == ([] if length else [1000, 2000, 3000, 4000])
    assert not list(tmp_path.iterdir())


def test_a_download_without_a_length_is_read_to_its_end(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    server.length = False
    download("cifar10", tmp_path)
    assert len(load_dataset("cifar10", tmp_path).test) == 40


def test_an_address_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="url must begin with http"):
        download("cifar10", tmp_path, url="cifar.tar.gz")


def test_a_mirror_must_match_the_publishers_checksum(tmp_path, server, monkeypatch):
    server.content = tar_of(write_cifar10(tmp_path / "theirs"))
    url = f"http://127.0.0.1:{server.http.server_port}/any"
    with pytest.raises(ValueError, match="c58f30108f718f92721af3b95e74349a"):
        download("cifar10", tmp_path, url=url)


def test_without_a_network_it_says_which_folder_to_provide(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "cifar100", b"")
    port = server.http.server_port
    archive = downloads.ARCHIVES["cifar100"]
    server.close()
    server.close = lambda: None
    with pytest.raises(
        ConnectionError, match=r"(?s)cifar-100-python\.tar\.gz could not .*copy the published folder"
    ):
        download("cifar100", tmp_path)
    assert str(port) in archive.url


def test_unknown_and_embedded_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'mnist'; available are cifar10, cifar100"):
        download("mnist", tmp_path)
    with pytest.raises(ValueError, match="digits needs no download"):
        download("digits", tmp_path)


def hostile_archive(case, folder):
    file = io.BytesIO()
    if case.startswith("zip"):
        with zipfile.ZipFile(file, "w") as opened:
            opened.writestr(
                {"zip, upwards": "tiny-imagenet-200/../../ran", "zip, absolute": "/tmp/ran"}[case], "x"
            )
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.add(folder, folder.name)
        member = tarfile.TarInfo(
            {
                "tar, upwards": "cifar-10-batches-py/../../ran",
                "tar, absolute": "/tmp/ran",
                "tar, another folder": "ran",
                "tar, link": "cifar-10-batches-py/link",
                "tar, device": "cifar-10-batches-py/device",
            }[case]
        )
        if case == "tar, link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        elif case == "tar, device":
            member.type = tarfile.CHRTYPE
        tar.addfile(member)
    return file.getvalue()


@pytest.mark.parametrize(
    "case",
    [
        "tar, upwards",
        "tar, absolute",
        "tar, another folder",
        "tar, link",
        "tar, device",
        "zip, upwards",
        "zip, absolute",
        "cut short",
        "empty tar",
    ],
)
def test_an_archive_that_reaches_outside_or_is_damaged_is_refused(tmp_path, server, monkeypatch, case):
    folder = write_cifar10(tmp_path / "theirs")
    name = "tiny_imagenet" if case.startswith("zip") else "cifar10"
    if case == "cut short":
        content = tar_of(folder)[:-200]
    elif case == "empty tar":
        with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz"):
            pass
        content = file.getvalue()
    else:
        content = hostile_archive(case, folder)
    server.serve(monkeypatch, name, content)
    mine = tmp_path / "mine"
    with pytest.raises(ValueError, match=r"not unpacked|could not be unpacked|does not hold"):
        download(name, mine)
    assert not (tmp_path / "ran").exists()
    assert not Path("/tmp/ran").exists()
    assert [path.name for path in mine.iterdir()] == [Path(downloads.ARCHIVES[name].url).name]


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

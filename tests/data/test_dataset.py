"""The data set in memory: batches, augmentation, subsets, fingerprints, checks; and digits."""

import re
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awnet.data import (
    Augmentation,
    ThreatModel,
    check_images,
    check_labels,
    dataset,
    from_arrays,
    list_datasets,
    load_dataset,
)
from awnet.data.dataset import augmented, stratified


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
    monkeypatch.setattr(dataset, "is_resident", lambda images, device: False)
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
    monkeypatch.setattr(dataset, "is_resident", lambda images, device: False)
    assert_same_batches(data.batches(5, **SHUFFLED), mapped.batches(5, **SHUFFLED))


def test_an_epoch_may_be_stopped_early(monkeypatch):
    monkeypatch.setattr(dataset, "is_resident", lambda images, device: False)
    before = set(threading.enumerate())  # of other code, such as compilers
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
    ({"labels": [0]}, r"labels must hold one value for each of the 2 images, got 1"),
    ({"labels": [0.0, 1.0]}, "labels must be whole numbers"),
    ({"labels": np.eye(2, dtype=np.int64)}, "labels must be whole numbers"),
    ({"labels": [True, False]}, "labels must be whole numbers"),
    ({"labels": [0, -1]}, "labels must be classes numbered from 0"),
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

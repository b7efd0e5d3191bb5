"""A data set: one uint8 tensor with labels, threat model and augmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from awnet import rng
from awnet.data.augmentation import OperationName, check_operations, gathered, mixed, partners, transformed
from awnet.data.checks import check_labels
from awnet.data.extra import FIRST_INDEX, ExtraImages, load_extra
from awnet.data.threat_model import Norm, ThreatModel
from awnet.defaults import standard_defaults
from awnet.scalars import check_flag, check_integer, plain

Memory = Literal["auto", "device", "host"]
MOST_SHIFT = 1024  # pixels
MOST_CLASSES = 1_000_000  # that from_arrays names by their numbers
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NOT_UINT8 = (
    "images must be uint8 [N, C, H, W], got {}; convert gray images [N, H, W] with images[:, None], and "
    "floats in [0, 1] with (255 * images).round().astype('uint8')"
)


@dataclass(frozen=True)
class Augmentation:
    """Random transformations of training images.

    shift: shift by an integer number of pixels in [-shift, shift] along each axis, filled with zeros (the
        usual random crop after zero padding by ``shift``).
    flip: mirror left to right with probability ½.
    operations: names of further transformations, see :func:`awnet.data.augmentation.transformed`; ``cutmix``,
        which mixes images and labels, is applied last, see :func:`awnet.data.augmentation.mixed`.
    """

    shift: int = 0
    flip: bool = False
    operations: tuple[OperationName, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", check_integer("shift", self.shift, 0, MOST_SHIFT))
        object.__setattr__(self, "flip", check_flag("flip", self.flip))
        object.__setattr__(self, "operations", check_operations("operations", self.operations))


class Batch(NamedTuple):
    """x: float32 [B, C, H, W] in [0, 1]; y: int64 [B]; index: int64 [B], the global indices.

    Where images are mixed (``cutmix``) y is float32 [B, K], the share of each class.
    """

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set, on one device.

    images: uint8 [N, C, H, W]; the image is ``images / max_value``.
    labels: int64 [N], in [0, len(classes)).
    index: int64 [N], each sample's global index: its position in the published order, in any split.
        Shuffling, augmentation and the noise of attacks are keyed by it.
    source: a description of where the images came from, for reports.
    extra: images of a file that replace a share of the images in augmented batches, see :func:`with_extra`.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor
    index: Tensor
    classes: tuple[str, ...]
    max_value: int
    threat_model: ThreatModel
    augmentation: Augmentation
    source: str
    extra: ExtraImages | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(_NOT_UINT8.format(f"{self.images.dtype} {list(self.images.shape)}"))
        object.__setattr__(self, "max_value", check_integer("max_value", self.max_value, 1, 255))
        n = len(self.images)
        for name, value in (("labels", self.labels), ("index", self.index)):
            if value.dim() == 1 and len(value) != n:
                raise ValueError(f"{name} must hold one value for each of the {n} images, got {len(value)}")
            if value.dtype != torch.int64 or value.shape != (n,):
                raise ValueError(f"{name} must be int64 [{n}], got {value.dtype} {list(value.shape)}")
            if value.device != self.images.device:
                raise ValueError(
                    f"{name} is on {value.device}, images on {self.images.device}; use one device"
                )
        if n and int(self.images.max()) > self.max_value:
            raise ValueError(
                f"images has pixels up to {int(self.images.max())}, above max_value {self.max_value}"
            )
        check_labels(self.labels, len(self.classes), "labels")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "×".join(str(size) for size in self.images.shape)
        return f"Dataset({self.name!r}, {self.split!r}, {shape}, {self.num_classes} classes, {self.device})"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        return self.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def pixels(self) -> int:
        """C · H · W, the number of values of an image."""
        return self.images[0].numel() if len(self) else 0

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: str | torch.device) -> Dataset:
        """The same data set on ``device``."""
        return self._changed(lambda tensor: tensor.to(device))

    def take(self, rows: Tensor, split: str | None = None) -> Dataset:
        """The samples at ``rows``, int64 ``[M]``: rows of this data set, not global indices."""
        rows = rows.to(self.device)
        return self._changed(lambda tensor: tensor[rows], split=self.split if split is None else split)

    def _changed(self, change: Callable[[Tensor], Tensor], **fields: Any) -> Dataset:
        fields |= {name: change(getattr(self, name)) for name in ("images", "labels", "index")}
        return replace(self, **fields)

    def subset(self, n: int, seed: int = 0) -> Dataset:
        """At most ``n`` samples, stratified by class; the same samples for the same seed."""
        n = check_integer("n", n, 1)
        if n >= len(self):
            return self
        rows, _ = stratified(self.labels, self.index, n, rng.key(seed, "subset"))
        return self.take(rows)

    def fingerprint(self) -> str:
        """A digest of pixels, labels, indices, class names and pixel range, 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((tuple(self.images.shape), self.max_value, self.classes)).encode())
        for values in (self.images, self.labels, self.index):
            digest.update(values.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def placed(self, device: str | torch.device, memory: Memory = "auto") -> Dataset:
        """The same data set in the memory that ``batches(device=…)`` reads from.

        memory: ``device``; ``host``: each batch is copied to the device while the previous one is in use; or
        ``auto``: the device, unless the images would need more than half of its free memory.
        """
        target = torch.device(device)
        if memory not in get_args(Memory):
            raise ValueError(f"memory must be one of {get_args(Memory)}, got {memory!r}")
        if memory == "auto":
            fits = target.type != "cuda" or 2 * self.images.nbytes <= torch.cuda.mem_get_info(target)[0]
            memory = "device" if fits else "host"
        return self.to(target if memory == "device" else "cpu")

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        drop_last: bool = False,
        part: tuple[int, int] = (0, 1),
        device: str | torch.device | None = None,
    ) -> Iterator[Batch]:
        """The batches of one epoch, on ``device``, by default the data set's.

        Order (``shuffle``) and augmentation (``augment``) depend only on (seed, epoch, global index): a
        sample is augmented identically in any batch, and ``start``, the number of batches to skip, resumes an
        interrupted epoch exactly. The last batch may be smaller, unless ``drop_last``. ``part`` = (rank,
        ranks) takes every ranks-th sample of each batch, starting with the rank-th, so that the ranks
        together have each batch once.

        A data set on another device than ``device`` gives bit-identical batches: a thread gathers the next
        batch's pixels in pinned memory, or from the mapped file, in the background.
        """
        # a larger value means the same, and its products could overflow int64
        batch_size = min(check_integer("batch_size", batch_size, 1), len(self) + 1)
        start, seed = check_integer("start", start, 0), check_integer("seed", seed)
        epoch = check_integer("epoch", epoch)
        device = self.device if device is None else torch.device(device)
        order = torch.arange(len(self), device=self.device)
        if shuffle:
            order = rng.bits(rng.key(seed, "shuffle", epoch), self.index, ()).argsort(stable=True)
        stop = len(self) - batch_size + 1 if drop_last else len(self)
        firsts = range(start * batch_size, stop, batch_size)

        extra = self.extra if augment else None
        if extra is not None:
            order = self._with_extra_rows(order.cpu(), extra, seed, epoch)

        def chunks(order: Tensor) -> list[Tensor]:
            return [order[i : i + batch_size][part[0] :: part[1]] for i in firsts]

        # small tensors, for the whole epoch at once
        labels, index = self.labels.to(device), self.index.to(device)
        moves = _moves(index, self.augmentation, seed, epoch) if augment and extra is None else None
        if extra is not None:
            labels = torch.cat([labels, extra.labels.to(device)])
            index = torch.cat([index, FIRST_INDEX + torch.arange(len(extra), device=device)])
        operations = self.augmentation.operations if augment else ()
        # a tensor on the device: CUDA multiplies by the reciprocal of a Python number, which differs from the
        # CPU's quotient in the last bit
        scale = torch.tensor(float(self.max_value), dtype=torch.float32, device=device)

        def images(order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            """The rows and the images of each batch."""
            for rows, pixels in zip(
                chunks(order.to(device)), self._pixels(chunks(order), device), strict=True
            ):
                batch_moves = None if moves is None else moves[rows]
                if extra is not None:  # too many images to draw for all of them
                    batch_moves = _moves(index[rows], self.augmentation, seed, epoch)
                if batch_moves is not None:
                    pixels = _moved(pixels, batch_moves, self.augmentation)
                x = pixels / scale
                yield rows, transformed(x, index[rows], operations, seed=seed, epoch=epoch)

        if "cutmix" not in operations:
            return (Batch(x, labels[rows], index[rows]) for rows, x in images(order))
        keys = self.index.to(order.device)[order.clamp(max=len(self) - 1)]
        keys = torch.where(order < len(self), keys, FIRST_INDEX + order - len(self))
        other_order = partners(keys, len(self), seed=seed, epoch=epoch)
        mix = partial(mixed, classes=self.num_classes, seed=seed, epoch=epoch)
        pairs = zip(images(order), images(other_order), strict=True)
        return (
            Batch(*mix(x, labels[rows], other, labels[others], index[rows]), index[rows])
            for (rows, x), (others, other) in pairs
        )

    def _with_extra_rows(self, order: Tensor, extra: ExtraImages, seed: int, epoch: int) -> Tensor:
        """The rows of an epoch; rows of extra images are numbered from ``len(self)``."""
        is_extra = extra.is_extra(len(order))
        number = int(is_extra.sum())
        mixed_order = order.clone()
        mixed_order[~is_extra] = order[: len(order) - number]
        mixed_order[is_extra] = len(self) + extra.drawn(number, seed, epoch)
        return mixed_order

    def _pixels(self, chunks: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """uint8 [B, C, H, W] on ``device`` for each chunk of row numbers, also those of extra images."""
        extra, size = self.extra, len(self)
        if extra is None or not any((rows >= size).any() for rows in chunks):
            yield from self._dataset_pixels(chunks, device)
            return
        dataset_rows = [rows[rows < size] for rows in chunks]
        extra_rows = [rows[rows >= size] - size for rows in chunks]
        sources = self._dataset_pixels(dataset_rows, device), _prefetched(extra.pixels, extra_rows, device)
        for rows, from_dataset, from_extra in zip(chunks, *sources, strict=True):
            pixels = from_dataset.new_empty(len(rows), *from_dataset.shape[1:])
            pixels[(rows < size).nonzero()[:, 0].to(device)] = from_dataset
            pixels[(rows >= size).nonzero()[:, 0].to(device)] = from_extra
            yield pixels

    def _dataset_pixels(self, chunks: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        if is_resident(self.images, device):
            return (self.images[rows.to(self.images.device)] for rows in chunks)

        def gather(rows: Tensor) -> Tensor:
            shape = (len(rows), *self.images.shape[1:])
            pinned = device.type == "cuda"
            staged = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            return torch.index_select(self.images, 0, rows, out=staged)

        return _prefetched(gather, chunks, device)


def _prefetched(
    gather: Callable[[Tensor], Tensor], chunks: Sequence[Tensor], device: torch.device
) -> Iterator[Tensor]:
    """``gather(rows)`` of each chunk, on ``device``; a thread gathers the next one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(gather, rows) for rows in chunks[:1]]
        for number in range(len(chunks)):
            staged = pending.pop().result()
            if number + 1 < len(chunks):
                pending.append(pool.submit(gather, chunks[number + 1]))
            yield staged.to(device, non_blocking=True)


def is_resident(images: Tensor, device: torch.device) -> bool:
    """Whether ``images`` are stored on ``device``; a device without an index means any of its type."""
    return images.device.type == device.type and device.index in (None, images.device.index)


class Splits(NamedTuple):
    """A data set's three parts; ``validation`` is held out of the published training part."""

    train: Dataset
    validation: Dataset
    test: Dataset


def augmented(
    images: Tensor, index: Tensor, augmentation: Augmentation, *, seed: int = 0, epoch: int = 0
) -> Tensor:
    """``images`` [B, C, H, W] of any dtype, shifted and flipped by (seed, epoch, ``index`` [B])."""
    moves = _moves(index, augmentation, seed, epoch)
    return images if moves is None else _moved(images, moves, augmentation)


def _moves(index: Tensor, augmentation: Augmentation, seed: int, epoch: int) -> Tensor | None:
    """int64 [N, 3] for sample indices [N]: the corner of the image within the padded one (row, column), and
    whether it is mirrored; None without augmentation."""
    size = augmentation.shift
    if size == 0 and not augmentation.flip:
        return None
    corner = rng.integers(rng.key(seed, "shift", epoch), index, (2,), 2 * size + 1)
    mirrored = rng.integers(rng.key(seed, "flip", epoch), index, (1,), 2 if augmentation.flip else 1)
    return torch.cat([corner, mirrored], 1)


def _moved(images: Tensor, moves: Tensor, augmentation: Augmentation) -> Tensor:
    """``images`` [B, C, H, W], shifted and flipped by ``moves`` int64 [B, 3]."""
    size, (height, width) = augmentation.shift, images.shape[2:]
    row = moves[:, :1] + torch.arange(height, device=images.device)  # [B, H], within the padded image
    column = torch.arange(width, device=images.device)
    if augmentation.flip:
        column = torch.where(moves[:, 2:] == 1, width - 1 - column, column)  # [B, W]
    column = column + moves[:, 1:2]
    return gathered(torch.nn.functional.pad(images, (size,) * 4), row, column)


@standard_defaults()
def stratified(labels: Tensor, index: Tensor, n: int, key: int) -> tuple[Tensor, Tensor]:
    """Rows of ``n`` samples, stratified by class, and of the others, both ascending, int64.

    Each class contributes its share of ``n``, rounded by largest remainder; ``key`` and the samples' global
    indices determine which samples.
    """
    if not 0 <= n <= len(labels):
        raise ValueError(f"n must be in [0, {len(labels)}], got {n}")
    label, sample = labels.cpu(), index.cpu()
    counts = torch.bincount(label)
    floor = counts * n // max(len(label), 1)
    remainder = counts * n - floor * len(label)  # exact, in units of 1/N
    floor[remainder.argsort(descending=True, stable=True)[: n - int(floor.sum())]] += 1
    permutation = rng.bits(key, sample, ()).argsort(stable=True)
    grouped = permutation[label[permutation].argsort(stable=True)]  # by class, in random order within a class
    rank = torch.arange(len(label)) - (counts.cumsum(0) - counts)[label[grouped]]  # within its class
    chosen = torch.zeros(len(label), dtype=torch.bool)
    chosen[grouped] = rank < floor[label[grouped]]
    return chosen.nonzero()[:, 0].to(labels.device), (~chosen).nonzero()[:, 0].to(labels.device)


def with_extra(dataset: Dataset, path: str | Path, fraction: float = 0.7) -> Dataset:
    """``dataset`` with augmented batches that take a share ``fraction`` of their images from a file.

    The file is an ``.npz`` of ``numpy.savez`` with ``image`` uint8 [M, H, W, C] (or [M, C, H, W]), in the
    data set's levels, and ``label`` [M], as Wang et al. (ICML 2023) release generated images. It is mapped to
    memory. An epoch still has ``len(dataset)`` images, drawn without replacement from both.

    Raises:
        FileNotFoundError, ValueError: as :func:`awnet.data.extra.load_extra`, and if the file has fewer
            images than an epoch takes, or pixels above the data set's ``max_value``.
    """
    channels, height, width = dataset.images.shape[1:]
    extra = load_extra(path, fraction, (channels, height, width), dataset.num_classes)
    if (largest := extra.sample().max()) > dataset.max_value:
        raise ValueError(
            f"{extra.source} has pixels up to {largest}, those of {dataset.name} go up to {dataset.max_value}"
        )
    if (needed := extra.count(len(dataset))) > len(extra):
        raise ValueError(
            f"{extra.source} has {len(extra):,} images, fewer than the {needed:,} that an epoch takes: lower "
            f"extra_fraction, {fraction:g}"
        )
    return replace(dataset, extra=extra)


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training part, validation part) of a training set: a stratified ``fraction`` is held out."""
    rest, held_out = held_out_rows(dataset.labels, dataset.index, fraction, seed)
    return dataset.take(rest), dataset.take(held_out, split="validation")


def held_out_rows(labels: Tensor, index: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """The rows of the training part and of the validation part of :func:`hold_out`."""
    n = max(1, round(len(labels) * fraction))
    held_out, rest = stratified(labels, index, n, rng.key(seed, "validation"))
    return rest, held_out


@standard_defaults()
def from_arrays(
    images: Any,
    labels: Any,
    *,
    name: str = "custom",
    split: str = "train",
    classes: Sequence[str] | None = None,
    max_value: int = 255,
    eps: float = 8 / 255,
    norm: Norm = "Linf",
    shift: int = 0,
    flip: bool = False,
    source: str = "arrays",
    layout: Literal["nchw", "nhwc"] | None = None,
) -> Dataset:
    """A data set from arrays or tensors.

    images: uint8 [N, C, H, W]; a numpy.memmap (mode "c") in C order stays on disk and is read batch by batch.
    labels: integers [N]. classes: the classes' names; by default "0", "1", … up to the largest label.
    eps and norm: the threat model. shift and flip: the augmentation.
    layout: ``"nhwc"`` for images [N, H, W, C], as in PIL and TensorFlow, which are copied to [N, C, H, W].
        None accepts [N, C, H, W] and rejects a shape that looks like [N, H, W, C]; ``"nchw"`` accepts any.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
    """
    pixels = _pixels(images, layout)
    numbers = _class_numbers(labels)
    if classes is None:
        smallest, largest = map(int, numbers.aminmax()) if len(numbers) else (0, -1)
        if smallest < 0:
            raise ValueError(f"labels must be classes numbered from 0, got {smallest}")
        if largest >= MOST_CLASSES:
            raise ValueError(
                f"labels go up to {largest}, which would make as many classes: number the classes from 0, "
                "for example with numpy.unique(labels, return_inverse=True)[1]"
            )
        classes = [str(number) for number in range(largest + 1)]
    return Dataset(
        name=name,
        split=split,
        images=pixels,
        labels=numbers.to(pixels.device),
        index=torch.arange(len(pixels), device=pixels.device),
        classes=tuple(classes),
        max_value=max_value,
        threat_model=ThreatModel(eps, norm),
        augmentation=Augmentation(shift, flip),
        source=source,
    )


def _pixels(images: Any, layout: str | None) -> Tensor:
    """``images`` as a tensor [N, C, H, W]; ``Dataset`` checks dtype and rank."""
    if layout not in (None, "nchw", "nhwc"):
        raise ValueError(f"layout must be 'nchw', 'nhwc' or None, got {layout!r}")
    if not isinstance(images, Tensor):
        try:
            array = np.ascontiguousarray(images)
        except (ValueError, TypeError) as error:  # a list of images of different sizes
            raise ValueError(f"images must be one uint8 array [N, C, H, W]: {error}") from None
        if array.dtype != np.uint8:
            raise ValueError(_NOT_UINT8.format(f"{array.dtype} {list(array.shape)}"))
        images = torch.as_tensor(array, device="cpu")
    if layout == "nhwc" and images.dim() == 4:
        return images.permute(0, 3, 1, 2).contiguous()
    if layout is None and images.dim() == 4 and looks_nhwc(images.shape[1:]):
        n, height, width, channels = images.shape
        raise ValueError(
            f"images must be [N, C, H, W], got {list(images.shape)}, which looks like {n} images of "
            f"{height}×{width} pixels with {channels} channels, [N, H, W, C]: pass layout='nhwc' if they "
            f"are, layout='nchw' if they have {height} channels"
        )
    return images


def looks_nhwc(shape: Sequence[int]) -> bool:
    """Whether the shape of an image is probably [H, W, C]."""
    first, second, last = shape
    return 1 <= last <= 4 and (first > 4 or first == second != last)


def _class_numbers(labels: Any) -> Tensor:
    """``labels`` as int64 [N]."""
    if not isinstance(labels, Tensor):
        try:
            array = np.asarray(labels)
        except (ValueError, TypeError) as error:
            raise ValueError(f"labels must be whole numbers [N]: {error}") from None
        if array.dtype == object and array.ndim == 1:  # from pandas
            other = [v for v in array if not isinstance(v, int | np.integer) or isinstance(v, bool)]
            if other:
                raise _not_numbers(other[0], "object", array.shape)
            if any(abs(int(v)) >= 2**63 for v in array):
                raise ValueError("labels must fit into int64")
            array = array.astype(np.int64)
        if array.size == 0:
            array = array.astype(np.int64)
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise _not_numbers(array.flat[0], str(array.dtype), array.shape)
        if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
            raise ValueError("labels must fit into int64")
        return torch.from_numpy(array.astype(np.int64))
    if labels.dtype not in _INTEGERS or labels.dim() != 1:
        first = labels.flatten()[0].item() if labels.numel() else None
        raise _not_numbers(first, str(labels.dtype), tuple(labels.shape))
    return labels.to(torch.int64)


def _not_numbers(first: Any, dtype: str, shape: tuple[int, ...]) -> ValueError:
    first = str(first) if isinstance(first, str) else plain(first)  # instead of numpy.str_('cat')
    advice = "convert them with labels.astype('int64')"
    if isinstance(first, str | bytes):
        advice = "number the words: classes, labels = numpy.unique(words, return_inverse=True)"
    elif len(shape) == 2:
        advice = "use labels[:, 0]" if shape[1] == 1 else "convert one-hot labels with .argmax(1)"
    elif len(shape) != 1:
        advice = "give one label per image"
    elif not isinstance(first, bool | np.bool_ | float | np.floating):
        advice = "give one class number, from 0, per image, none missing"
    return ValueError(
        f"labels must be whole numbers [N], got {dtype} {list(shape)}, such as {first!r}; {advice}"
    )

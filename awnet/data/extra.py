"""Extra training images, generated or pseudo-labeled, read from an ``.npz`` file batch by batch.

Wang et al. (ICML 2023) release such files: ``image`` uint8 [M, H, W, C] and ``label`` [M]. A share of every
batch is drawn from the file, without replacement within an epoch; an epoch has as many images as without it.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from awnet import rng
from awnet.files import expanded

_NAMES = (("image", "label"), ("images", "labels"), ("x", "y"))
FIRST_INDEX = 1 << 40  # of extra images, so that they share no random numbers with the data set's images


@dataclass(frozen=True, eq=False)
class ExtraImages:
    """Images in a file, of which each training batch takes a share.

    images: uint8 [M, H, W, C] or [M, C, H, W], mapped from the file.
    labels: int64 [M], on the CPU.
    channels_first: whether ``images`` are [M, C, H, W].
    fraction: share of each batch, above 0 and at most 1.
    source: the path of the file.
    """

    images: np.ndarray[Any, Any]
    labels: Tensor
    channels_first: bool
    fraction: float
    source: str

    def __len__(self) -> int:
        return len(self.images)

    def count(self, images: int) -> int:
        """The number of extra images in an epoch of ``images``."""
        return int(self.is_extra(images).sum())

    def is_extra(self, images: int) -> Tensor:
        """Which positions in an epoch of ``images`` are extra images, bool [N] on the CPU.

        They are spread evenly: n consecutive positions have n · fraction of them, up to one.
        """
        expected = torch.arange(images + 1, dtype=torch.float64) * self.fraction
        return (expected + 1e-9).floor().diff() > 0

    def drawn(self, number: int, seed: int, epoch: int) -> Tensor:
        """``number`` different rows, int64 on the CPU, in the order of an epoch."""
        keys = rng.bits(rng.key(seed, "extra images", epoch), torch.arange(len(self)), ())
        return keys.argsort(stable=True)[:number]

    def pixels(self, rows: Tensor) -> Tensor:
        """The images at ``rows``, uint8 [B, C, H, W] on the CPU."""
        ascending = rows.argsort()  # reads the file sequentially
        read = np.empty((len(rows), *self.images.shape[1:]), dtype=np.uint8)
        read[ascending.numpy()] = self.images[rows[ascending].numpy()]
        images = torch.from_numpy(read)
        return images if self.channels_first else images.permute(0, 3, 1, 2).contiguous()

    def sample(self) -> np.ndarray[Any, Any]:
        """64 images from all over the file, or all if there are fewer."""
        rows = np.linspace(0, len(self) - 1, min(64, len(self))).astype(np.int64)
        return np.ascontiguousarray(self.images[rows])

    def describe(self) -> dict[str, Any]:
        """The images for config.json: number, share, and a fingerprint of labels and :meth:`sample`."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr(self.images.shape).encode())
        digest.update(self.labels.numpy().data)
        digest.update(self.sample().data)
        return {"images": len(self), "fraction": self.fraction, "fingerprint": digest.hexdigest()}


def load_extra(path: str | Path, fraction: float, shape: tuple[int, int, int], classes: int) -> ExtraImages:
    """Opens a file of extra images for a data set of images ``shape`` (C, H, W) and ``classes`` classes.

    Args:
        path: an ``.npz`` file of ``numpy.savez`` with arrays ``image`` and ``label`` (or ``images`` and
            ``labels``, or ``x`` and ``y``). The images are not read, but mapped.
        fraction: share of each batch.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, is compressed, or its images or labels do not fit the data set.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ValueError(f"extra_fraction must be a number above 0 and at most 1, got {fraction!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            names = next((pair for pair in _NAMES if set(pair) <= members.keys()), None)
            if names is None:
                raise ValueError(
                    f"{path} has the arrays {', '.join(members) or 'of no name'}; expected image and label"
                )
            with archive.open(members[names[1]]) as file:
                labels = np.lib.format.read_array(file, allow_pickle=False)
            images = _mapped(path, members[names[0]])
    except (OSError, zipfile.BadZipFile, struct.error, EOFError) as error:
        raise ValueError(f"{path} cannot be read as arrays of numbers: {error}") from error
    channels, height, width = shape
    first, last = (channels, height, width), (height, width, channels)
    if images.dtype != np.uint8 or images.shape[1:] not in (first, last):
        raise ValueError(
            f"{path}: images must be uint8 [M, {height}, {width}, {channels}] as those of the data set, got "
            f"{images.dtype} {list(images.shape)}"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: labels must be integers [{len(images)}], got {labels.dtype} {list(labels.shape)}"
        )
    if len(images) == 0 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{path}: labels must be in [0, {classes}), one for each of at least one image")
    numbers = torch.from_numpy(labels.astype(np.int64))
    return ExtraImages(images, numbers, images.shape[1:] == first, float(fraction), str(path))


def _mapped(path: Path, member: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    """An array of an uncompressed ``.npz`` file, mapped to memory."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path} is compressed and cannot be mapped: write it again with numpy.savez")
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)  # of the member: lengths of name and extra field at 26 and 28
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        file.seek(member.header_offset + 30 + name_length + extra_length)
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"{path}: {member.filename} holds Python objects")
        offset = file.tell()
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")

"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from awnet.data.cifar import load_cifar
from awnet.data.dataset import Splits
from awnet.data.digits import load_digits
from awnet.data.image_files import is_path, load_path
from awnet.data.tiny_imagenet import load_tiny_imagenet
from awnet.defaults import standard_defaults

DEFAULT_DATA_DIR = "data"

_LOADERS: dict[str, Callable[[str | Path, int], Splits]] = {
    "digits": lambda _, seed: load_digits(seed),
    "cifar10": lambda data_dir, seed: load_cifar("cifar10", data_dir, seed),
    "cifar100": lambda data_dir, seed: load_cifar("cifar100", data_dir, seed),
    "tiny_imagenet": load_tiny_imagenet,
}


def list_datasets() -> list[str]:
    """The names that ``load_dataset`` knows."""
    return list(_LOADERS)


@standard_defaults()
def load_dataset(
    name: str | Path,
    data_dir: str | Path | None = None,
    *,
    seed: int = 0,
    image_size: int | None = None,
    classes: str | Path | None = None,
) -> Splits:
    """The train, validation and test split of a data set, on the CPU.

    Args:
        name: one of :func:`list_datasets`, or the path of

            - a folder with a folder of images for each class, or with such folders called ``train``, ``val``
              (or ``validation``) and ``test``. Without ``test``, ``val`` is the test split. Classes are
              numbered in the order of their names. Images are RGB;
            - a ``.npz`` file with arrays ``images`` (uint8 [N, C, H, W] or [N, H, W, C]) and ``labels``, or
              ``x`` and ``y``, or ``x_train``, ``y_train``, ``x_test`` and ``y_test``.

            Images without a named part are the test split; the other splits are then empty. ε is 8/255. In
            training, images are shifted by up to 1/8 of their height and not flipped.
        data_dir: the published folder or its parent; by default ``data`` in the working directory.
            ``digits`` needs none.
        seed: determines which training images are held out for validation; the test images never depend on
            it.
        image_size: side of the square images in pixels, for a folder: the shorter side is resized to it, and
            the center is cropped. None requires images of one size. Images of more than 1 GiB are decoded
            once to the user's cache folder (``AWNET_CACHE``) and read from there batch by batch.
        classes: file that names and numbers the classes of a path: text with a name in each line, or JSON,
            such as ImageNet's ``{"0": ["n01440764", "tench"], …}``.

    Raises:
        ValueError: the name is unknown, or a file is damaged.
        FileNotFoundError: a file is missing.
    """
    if isinstance(name, Path) or (isinstance(name, str) and name not in _LOADERS and is_path(name)):
        if data_dir is not None:
            raise ValueError(f"data_dir is for {', '.join(_LOADERS)}; {name} is a path itself")
        return load_path(name, seed, image_size, classes)
    if not isinstance(name, str) or name not in _LOADERS:
        raise ValueError(
            f"unknown data set {name!r}; known are {', '.join(_LOADERS)}; your own images are given by the "
            "path of a folder or .npz file, or by awnet.data.from_arrays in Python"
        )
    if image_size is not None or classes is not None:
        raise ValueError(f"image_size and classes are for data sets given by a path, not for {name}")
    return _LOADERS[name](DEFAULT_DATA_DIR if data_dir is None else data_dir, seed)

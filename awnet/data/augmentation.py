"""Augmentation of training images in device memory, keyed by seed, epoch and sample.

Every operation reads one image and its random numbers only, and consists of gathers and element-wise
arithmetic, so an image has the same bits in any batch and on any rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from awnet import rng

OperationName = Literal["cutout", "resized_crop", "idbh", "cutmix"]
OPERATIONS: tuple[OperationName, ...] = get_args(OperationName)

_CROP_AREA = (0.25, 1.0)  # of resized_crop, shares of the image
_CROP_RATIO = 4 / 3
_ERASED_AREA = (0.02, 0.5)  # of idbh
_ERASED_RATIO = 3.3
_SHIFTED = 11 / 32  # of idbh: largest number of rows and columns that are cut off, a share of the side


def check_operations(name: str, value: Any) -> tuple[OperationName, ...]:
    """``value``, a name or several, as a tuple; ValueError for an unknown name."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(one in OPERATIONS for one in names):
        raise ValueError(f"{name} must be among {', '.join(OPERATIONS)}, got {value!r}")
    return tuple(names)


def transformed(
    x: Tensor, index: Tensor, operations: Sequence[OperationName], *, seed: int, epoch: int
) -> Tensor:
    """Images [B, C, H, W], float32 in [0, 1], after ``operations`` by (seed, epoch, ``index`` [B]), in order.

    cutout: a square of half the image's side is 0 (DeVries and Taylor, 2017). Its center is any pixel, so it
        may reach beyond the image.
    resized_crop: a rectangle of 25 to 100 % of the area with sides of 3:4 to 4:3, resized bilinearly.
    idbh: as in Li and Spratling (ICLR 2023) a cropped and shifted image, one change of saturation,
        brightness, contrast or sharpness, and with probability ½ an erased rectangle of 2 to 50 %. Of the
        publication's color operations, autocontrast, equalize, shear and rotation are left out.

    ``cutmix``, which needs other images, is not applied here, see :func:`mixed`.
    """
    for name in operations:
        if name == "cutmix":
            continue
        x = _OPERATIONS[name](x, partial(_drawn, seed, epoch, name, index))
    return x


def partners(index: Tensor, images: int, *, seed: int, epoch: int) -> Tensor:
    """For each image of ``index`` the row of the image to mix in, in a data set of ``images``; int64 [N]."""
    return (rng.bits(rng.key(seed, "augmentation", "partner", epoch), index, ()) >> 1) % images


def mixed(
    x: Tensor,
    y: Tensor,
    other: Tensor,
    other_y: Tensor,
    index: Tensor,
    classes: int,
    *,
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al., ICCV 2019): a box of each image is replaced by that of ``other``; labels are mixed.

    The box's share of the area is uniform in [0, 1], its center is any pixel, and it is cropped to the image.

    Args:
        x, other: images [B, C, H, W].
        y, other_y: their labels, int64 [B].
        index: indices of ``x``, int64 [B], which key the boxes.
        classes: K, the number of classes.

    Returns:
        The images, and labels float32 [B, K]: each label's share of the pixels.
    """
    (height, width), u = x.shape[2:], _drawn(seed, epoch, "cutmix", index, 3)
    side = u[:, 0].sqrt()
    rows, columns = (side * height).long(), (side * width).long()
    top = (u[:, 1] * height).long() - rows // 2
    left = (u[:, 2] * width).long() - columns // 2
    box = _within(x, top, left, rows, columns)
    share = 1 - box.sum((1, 2, 3)).to(torch.float32) / (height * width)
    labels = torch.zeros(len(y), classes, device=x.device)
    labels.scatter_add_(1, y[:, None], share[:, None])
    labels.scatter_add_(1, other_y[:, None], 1 - share[:, None])
    return torch.where(box, other, x), labels


#: number of values → float32 [B, number] in [0, 1)
Draw = Callable[[int], Tensor]


def _drawn(seed: int, epoch: int, name: str, index: Tensor, count: int) -> Tensor:
    return rng.uniform(rng.key(seed, "augmentation", name, epoch), index, (count,))


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * u


def _pixels(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [1, H, 1] and the columns [1, 1, W] of the pixels."""
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[2:])
    return rows[None, :, None], columns[None, None, :]


def _within(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Whether each pixel is in the rectangle of its image, bool [B, 1, H, W]; arguments are [B]."""
    row, column = _pixels(x)
    top, left, height, width = (one[:, None, None] for one in (top, left, height, width))
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
    return inside[:, None]


def gathered(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The pixels at ``row`` [B, H] and ``column`` [B, W], int64, of each image, [B, C, H, W]."""
    pixel = row[:, :, None] * x.shape[3] + column[:, None, :]
    values = x.flatten(2).gather(2, pixel.flatten(1)[:, None].expand(-1, x.shape[1], -1))
    return values.unflatten(2, pixel.shape[1:])


def _cutout(x: Tensor, draw: Draw) -> Tensor:
    (height, width), u = x.shape[2:], draw(2)
    side = torch.full_like(u[:, 0], max(height, width) // 2).long()
    top, left = ((u[:, i] * size).long() - side // 2 for i, size in enumerate((height, width)))
    return torch.where(_within(x, top, left, side, side), 0.0, x)


def _rectangle(u: Tensor, area: tuple[float, float], ratio: float, x: Tensor) -> list[Tensor]:
    """Top, left, height and width [B] of a rectangle within the image, float32 pixels, from u [B, 4]."""
    log_ratio = _between(u[:, 1], -math.log(ratio), math.log(ratio))
    share = _between(u[:, 0], *area)
    height, width = x.shape[2:]
    h = (height * (share * log_ratio.exp()).sqrt()).clamp(1, height)
    w = (width * (share / log_ratio.exp()).sqrt()).clamp(1, width)
    return [u[:, 2] * (height - h), u[:, 3] * (width - w), h, w]


def _resized_crop(x: Tensor, draw: Draw) -> Tensor:
    top, left, height, width = _rectangle(draw(4), _CROP_AREA, _CROP_RATIO, x)

    def sources(start: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each pixel of a side its two source pixels and the weight of the second, [B, size]."""
        steps = (torch.arange(size, device=x.device) + 0.5) / size
        position = (start[:, None] + length[:, None] * steps - 0.5).clamp(0, size - 1)
        first = position.floor().long()
        return first, (first + 1).clamp(max=size - 1), position - first

    row, next_row, down = sources(top, height, x.shape[2])
    column, next_column, right = sources(left, width, x.shape[3])
    down, right = down[:, None, :, None], right[:, None, None, :]
    upper = (1 - right) * gathered(x, row, column) + right * gathered(x, row, next_column)
    lower = (1 - right) * gathered(x, next_row, column) + right * gathered(x, next_row, next_column)
    return ((1 - down) * upper + down * lower).clamp(0, 1)


def _idbh(x: Tensor, draw: Draw) -> Tensor:
    u = draw(13)
    return _erased(_recolored(_crop_shifted(x, u[:, :6]), u[:, 6:8]), u[:, 8:])


def _crop_shifted(x: Tensor, u: Tensor) -> Tensor:
    """A rectangle of the image, moved on black; what is cut off is split between rows and columns."""
    height, width = x.shape[2:]
    cut = (u[:, 0] * (round(_SHIFTED * min(height, width)) + 1)).long()
    cut_rows = (u[:, 1] * (cut + 1)).long()
    parts = []
    for removed, i, size in ((cut_rows, 2, height), (cut - cut_rows, 4, width)):
        source, target = ((u[:, j] * (removed + 1)).long() for j in (i, i + 1))
        parts.append((source, target, size - removed))
    (from_row, to_row, rows), (from_column, to_column, columns) = parts
    row, column = (torch.arange(size, device=x.device) for size in (height, width))
    moved = gathered(
        x,
        (row + (from_row - to_row)[:, None]).clamp(0, height - 1),
        (column + (from_column - to_column)[:, None]).clamp(0, width - 1),
    )
    return torch.where(_within(x, to_row, to_column, rows, columns), moved, 0.0)


def _recolored(x: Tensor, u: Tensor) -> Tensor:
    """One of four changes of each image: saturation, brightness, contrast or sharpness.

    x' = base + strength (x − base), with strengths of 0.1 (brightness and contrast: 0.5) to 1.9.
    """
    kind = (u[:, 0] * 4).long()
    low = torch.where((kind == 1) | (kind == 2), 0.5, 0.1)
    strength = (low + (1.9 - low) * u[:, 1])[:, None, None, None]
    gray = _gray(x)
    levels = (gray * 255).round().long().sum((1, 2, 3))  # a sum of integers does not depend on its order
    mean = (levels / (255 * gray[0].numel())).to(x.dtype)[:, None, None, None]
    bases = (gray, torch.zeros_like(gray), mean.expand_as(gray), _blurred(x))
    base = x
    for number, one in enumerate(bases):
        base = torch.where((kind == number)[:, None, None, None], one, base)
    return (base + strength * (x - base)).clamp(0, 1)


def _gray(x: Tensor) -> Tensor:
    """The luminance [B, 1, H, W] of RGB images; of others the mean of the channels."""
    shares = (0.299, 0.587, 0.114) if x.shape[1] == 3 else (1 / x.shape[1],) * x.shape[1]
    total = torch.zeros_like(x[:, :1])
    for channel, share in enumerate(shares):
        total = total + share * x[:, channel : channel + 1]
    return total


def _blurred(x: Tensor) -> Tensor:
    """The mean over 3×3 pixels, where the center weighs five times as much; the border is replicated."""
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    height, width = x.shape[2:]
    total = 4 * x
    for row in range(3):
        for column in range(3):
            total = total + padded[:, :, row : row + height, column : column + width]
    return total / 13


def _erased(x: Tensor, u: Tensor) -> Tensor:
    rectangle = _rectangle(u[:, 1:], _ERASED_AREA, _ERASED_RATIO, x)
    top, left, height, width = (values.floor().long() for values in rectangle)
    erased = _within(x, top, left, height, width) & (u[:, 0] < 0.5)[:, None, None, None]
    return torch.where(erased, 0.0, x)


_OPERATIONS: dict[str, Callable[[Tensor, Draw], Tensor]] = {
    "cutout": _cutout,
    "resized_crop": _resized_crop,
    "idbh": _idbh,
}

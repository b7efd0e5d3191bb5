"""Augmentation: shapes, ranges, what each operation changes, and that an image is the same in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from awnet.data import Augmentation, from_arrays
from awnet.data.augmentation import OPERATIONS, transformed
from awnet.training import recipe_for

pytestmark = pytest.mark.usefixtures("one_thread")

N = 24


def images(channels: int = 3, height: int = 16, width: int = 16, low: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return low + (1 - low) * torch.rand(N, channels, height, width, generator=generator)


INDEX = 7 * torch.arange(N) + 3


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 16, 16), (1, 8, 8), (2, 9, 14), (3, 1, 1)])
def test_shape_and_range_stay(name: Any, channels: int, height: int, width: int) -> None:
    x = images(channels, height, width)
    found = transformed(x, INDEX, (name,), seed=1, epoch=2)
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.isfinite().all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_image_has_the_same_bits_in_any_batch(name: Any) -> None:
    x = images()
    whole = transformed(x, INDEX, (name,), seed=1, epoch=2)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    for part in (order[:1], order[1:6], order[6:], order):
        assert torch.equal(transformed(x[part], INDEX[part], (name,), seed=1, epoch=2), whole[part])
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not torch.equal(transformed(x, INDEX, (name,), **other), whole)


def test_cutout_blackens_a_square_of_half_the_side() -> None:
    x = images(low=0.1)
    found = transformed(x, INDEX, ("cutout",), seed=0, epoch=0)
    black = found == 0
    assert torch.equal(black, black[:, :1].expand_as(black))
    assert torch.equal(found[~black], x[~black])
    rows, columns = black[:, 0].any(2).sum(1), black[:, 0].any(1).sum(1)
    assert torch.equal(black[:, 0].sum((1, 2)), rows * columns)  # one rectangle
    assert rows.max() == columns.max() == 8
    assert rows.min() >= 4  # at the border half of it is outside


def test_a_resized_crop_is_the_bilinear_resize_of_a_rectangle() -> None:
    """Of an image that is linear in row and column, so is its crop."""
    height, width = 12, 16
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = torch.stack([row / height, column / width])[None].expand(N, -1, -1, -1).float()
    found = transformed(x, INDEX, ("resized_crop",), seed=0, epoch=0)
    inner = found[:, :, 2:-2, 2:-2]
    steps = inner[:, 0].diff(dim=1), inner[:, 1].diff(dim=2)
    for step, size in zip(steps, (height, width), strict=True):
        assert (step.amax((1, 2)) - step.amin((1, 2))).max() < 1e-5  # a straight line, in float32
        share = step.mean((1, 2)) * size  # of the side
        assert 0.4 < share.min() < 0.7
        assert 0.9 < share.max() <= 1 + 1e-5
    area = steps[0].mean((1, 2)) * height * steps[1].mean((1, 2)) * width
    assert area.min() >= 0.25 - 1e-4
    assert inner[:, 0].diff(dim=2).abs().max() < 1e-6  # rows stay rows


def test_idbh_shifts_recolors_and_erases() -> None:
    x = images(low=0.3)
    found = transformed(x, INDEX, ("idbh",), seed=0, epoch=0)
    black = (found == 0).all(1).float().mean((1, 2))
    assert 0 < black.mean() < 0.6
    assert (black > 0.3).any()
    gray = (found - found.mean(1, keepdim=True)).abs().amax((1, 2, 3))
    assert gray.min() < 0.5 * gray.max()  # some lose saturation
    constant = torch.full((N, 3, 16, 16), 0.5)
    one = transformed(constant, INDEX, ("idbh",), seed=0, epoch=0)
    # only brightness changes a constant image, away from its border and what was erased or shifted in
    center = one.flatten(2).median(2).values[:, 0]
    assert (center == 0.5).any()
    assert ((center - 0.5).abs() > 0.05).any()


def test_batches_are_augmented_in_training_only_and_the_same_on_any_number_of_ranks() -> None:
    x = torch.randint(0, 256, (22, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = from_arrays(x, torch.arange(22) % 3, shift=1, flip=True)
    plain = data
    data = recipe_for("pgd_at", "mine", augment=("cutout", "resized_crop")).augmented(data)
    assert data.augmentation == Augmentation(0, True, ("cutout", "resized_crop"))
    settings: dict[str, Any] = {"shuffle": True, "seed": 1, "epoch": 2}
    unchanged = zip(data.batches(8, **settings), plain.batches(8, **settings), strict=True)
    assert all(torch.equal(one.x, other.x) for one, other in unchanged)
    whole = list(data.batches(8, augment=True, **settings))
    assert not torch.equal(whole[0].x, next(plain.batches(8, augment=True, **settings)).x)
    for ranks in (2, 3):
        for number, batch in enumerate(whole):
            parts = [
                list(data.batches(8, augment=True, part=(rank, ranks), **settings))[number]
                for rank in range(ranks)
            ]
            index, pixels = (torch.cat([getattr(part, name) for part in parts]) for name in ("index", "x"))
            assert torch.equal(pixels[index.argsort()], batch.x[batch.index.argsort()])


def test_operations_of_a_recipe() -> None:
    recipe = recipe_for("trades", "cifar10", augment="idbh")
    assert recipe.augment == ("idbh",)
    assert recipe.to_dict()["augment"] == ["idbh"]
    data = from_arrays(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 1], shift=1)
    assert recipe_for("trades", "cifar10").augmented(data) is data
    assert recipe_for("trades", "cifar10", augment="cutout").augmented(data).augmentation.shift == 1


@pytest.mark.parametrize("wrong", ["mixup", ("cutout", "mixup"), 3, ("cutout", 3)])
def test_unknown_operations_are_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"augment must be among cutout, resized_crop, idbh, got"):
        recipe_for("trades", "cifar10", augment=wrong)
    with pytest.raises(ValueError, match=r"operations must be among"):
        Augmentation(operations=wrong)

"""Augmentation: shapes, ranges, what each operation changes, and that an image is the same in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from awnet.data import Augmentation, from_arrays
from awnet.data.augmentation import OPERATIONS, mixed, partners, transformed
from awnet.training import recipe_for

pytestmark = pytest.mark.usefixtures("one_thread")

N = 24
ON_ONE_IMAGE = [name for name in OPERATIONS if name != "cutmix"]


def images(channels: int = 3, height: int = 16, width: int = 16, low: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return low + (1 - low) * torch.rand(N, channels, height, width, generator=generator)


INDEX = 7 * torch.arange(N) + 3


@pytest.mark.parametrize("name", ON_ONE_IMAGE)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 16, 16), (1, 8, 8), (2, 9, 14), (3, 1, 1)])
def test_operations_keep_shape_and_range(name: Any, channels: int, height: int, width: int) -> None:
    x = images(channels, height, width)
    actual = transformed(x, INDEX, (name,), seed=1, epoch=2)
    assert actual.shape == x.shape
    assert actual.dtype == torch.float32
    assert actual.min() >= 0
    assert actual.max() <= 1
    assert actual.isfinite().all()


@pytest.mark.parametrize("name", ON_ONE_IMAGE)
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
    actual = transformed(x, INDEX, ("cutout",), seed=0, epoch=0)
    black = actual == 0
    assert torch.equal(black, black[:, :1].expand_as(black))
    assert torch.equal(actual[~black], x[~black])
    rows, columns = black[:, 0].any(2).sum(1), black[:, 0].any(1).sum(1)
    assert torch.equal(black[:, 0].sum((1, 2)), rows * columns)  # one rectangle
    assert rows.max() == columns.max() == 8
    assert rows.min() >= 4  # at the border half of it is outside


def test_a_resized_crop_is_the_bilinear_resize_of_a_rectangle() -> None:
    """Of an image that is linear in row and column, so is its crop."""
    height, width = 12, 16
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = torch.stack([row / height, column / width])[None].expand(N, -1, -1, -1).float()
    actual = transformed(x, INDEX, ("resized_crop",), seed=0, epoch=0)
    inner = actual[:, :, 2:-2, 2:-2]
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
    actual = transformed(x, INDEX, ("idbh",), seed=0, epoch=0)
    black = (actual == 0).all(1).float().mean((1, 2))
    assert 0 < black.mean() < 0.6
    assert (black > 0.3).any()
    gray = (actual - actual.mean(1, keepdim=True)).abs().amax((1, 2, 3))
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


def test_cutmix_puts_a_box_of_another_image_and_mixes_the_labels_by_pixels() -> None:
    x, other = images(low=0.5), 0.5 * images()
    y, other_y = torch.arange(N) % 3, torch.arange(N) % 4
    actual, labels = mixed(x, y, other, other_y, INDEX, 4, seed=0, epoch=0)
    from_other = actual == other
    assert torch.equal(from_other, from_other[:, :1].expand_as(from_other))
    assert torch.equal(actual[~from_other], x[~from_other])
    share = from_other[:, 0].float().mean((1, 2))
    torch.testing.assert_close(labels.sum(1), torch.ones(N), rtol=0, atol=1e-6)
    for i in range(N):
        expected = torch.zeros(4)
        expected[y[i]] += 1 - share[i]
        expected[other_y[i]] += share[i]
        torch.testing.assert_close(labels[i], expected, rtol=0, atol=1e-6)
    assert share.min() < 0.15
    assert share.max() > 0.6


def test_every_image_may_be_a_cutmix_partner() -> None:
    rows = partners(torch.arange(1000), 1000, seed=0, epoch=0)
    assert rows.min() >= 0
    assert rows.max() < 1000
    assert len(rows.unique()) > 600  # 1 − 1/e of them on average
    assert not torch.equal(rows, partners(torch.arange(1000), 1000, seed=0, epoch=1))


def test_mixed_batches_are_the_same_on_any_number_of_ranks_and_where_images_are_stored() -> None:
    x = torch.randint(0, 256, (22, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    plain = from_arrays(x, torch.arange(22) % 3, shift=1, flip=True)
    data = recipe_for("trades", "mine", augment=("cutout", "cutmix")).augmented(plain)
    settings: dict[str, Any] = {"shuffle": True, "augment": True, "seed": 1, "epoch": 2}
    whole = list(data.batches(8, **settings))
    assert [tuple(batch.y.shape) for batch in whole] == [(8, 3), (8, 3), (6, 3)]
    assert all(batch.y.sum(1).sub(1).abs().max() < 1e-6 for batch in whole)
    parts = [list(data.batches(8, part=(rank, 2), **settings)) for rank in range(2)]
    for number, batch in enumerate(whole):
        joined = [torch.cat([getattr(part[number], name) for part in parts]) for name in ("index", "x", "y")]
        order, expected = joined[0].argsort(), batch.index.argsort()
        assert torch.equal(joined[1][order], batch.x[expected])
        assert torch.equal(joined[2][order], batch.y[expected])
    resumed = list(data.batches(8, start=1, **settings))
    assert all(torch.equal(a.x, b.x) for a, b in zip(resumed, whole[1:], strict=True))


def test_a_recipes_operations_are_a_tuple_and_decide_the_shift() -> None:
    recipe = recipe_for("trades", "cifar10", augment="idbh")
    assert recipe.augment == ("idbh",)
    assert recipe.to_dict()["augment"] == ["idbh"]
    data = from_arrays(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), [0, 1], shift=1)
    assert recipe_for("trades", "cifar10").augmented(data) is data
    assert recipe_for("trades", "cifar10", augment="cutout").augmented(data).augmentation.shift == 1


@pytest.mark.parametrize("wrong", ["mixup", ("cutout", "mixup"), 3, ("cutout", 3)])
def test_unknown_operations_are_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"augment must be among cutout, resized_crop, idbh, cutmix, got"):
        recipe_for("trades", "cifar10", augment=wrong)
    with pytest.raises(ValueError, match=r"operations must be among"):
        Augmentation(operations=wrong)


@pytest.mark.parametrize("name", ["mart", "rdi"])
def test_losses_of_one_label_refuse_mixed_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"augment must be without cutmix: {name} needs one label"):
        recipe_for(name, "cifar10", augment="cutmix")

"""FilteredAttack: an attack in low precision first, then in full precision on the survivors."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from awnet.attacks import PGD, Attack, AutoAttack, Cascade, FilteredAttack, TransferAttack
from awnet.attacks.filtered import filtered


class Threshold(nn.Module):
    """Predicts class 1 for images [B, 1, 1, 1] whose pixel exceeds 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        pixel = x.flatten(1)[:, :1]
        return torch.cat([0.5 - pixel, pixel - 0.5], 1)


class Shift(Attack):
    """Adds a fixed amount to the images with the given indices; counts the images that it attacks."""

    def __init__(self, amounts: dict[int, float], eps: float = 0.3) -> None:
        super().__init__(Threshold(), eps=eps)
        self.amounts, self.attacked = amounts, []

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        self.attacked += index.tolist()
        amounts = [self.amounts.get(int(i), 0.0) for i in index]
        return x + torch.tensor(amounts).view(-1, 1, 1, 1)


def test_only_survivors_are_attacked_in_full_precision() -> None:
    first, exact = Shift({0: 0.2}), Shift({1: 0.25, 0: -0.1})
    attack = FilteredAttack(exact, first)
    x = torch.full((4, 1, 1, 1), 0.4)
    x_adv = attack(x, torch.tensor([0, 0, 0, 1]))  # the last one is misclassified without an attack
    assert first.attacked == [0, 1, 2, 3]
    assert exact.attacked == [1, 2]
    torch.testing.assert_close(x_adv.flatten(), torch.tensor([0.6, 0.65, 0.4, 0.4]))
    assert attack.notes == {"filter_missed": 1}


def test_a_gradient_that_overflows_in_low_precision_is_left_to_full_precision() -> None:
    attack = FilteredAttack(Shift({0: 0.2}), Shift({0: float("nan"), 1: float("inf")}))
    x_adv = attack(torch.full((2, 1, 1, 1), 0.4), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(x_adv.flatten(), torch.tensor([0.6, 0.4]))


def test_an_image_beyond_the_ball_does_not_count_as_broken() -> None:
    attack = FilteredAttack(Shift({}, eps=0.05), Shift({0: 0.3}, eps=0.05))
    x_adv = attack(torch.full((1, 1, 1, 1), 0.4), torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(x_adv.flatten(), torch.tensor([0.4]))


def test_robust_images_are_those_that_survive_both_attacks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).double()
    copy = deepcopy(model).bfloat16()

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return copy(x.bfloat16())

    x, index = torch.rand(64, 3, 2, 2, dtype=torch.float64), torch.arange(64)
    y = model(x).argmax(1)
    settings = {"eps": 0.05, "step_size": 0.02, "steps": 5}
    exact, first = PGD(model, **settings), PGD(Rounded(), **settings)

    def correct(attack: Attack) -> Tensor:
        return model(attack(x, y, index=index)).argmax(1) == y

    expected = correct(exact) & correct(first)
    assert 0 < expected.sum() < 64
    # the noise is keyed by the image's index, so float64 gives the same images in a smaller batch
    assert torch.equal(correct(FilteredAttack(exact, first)), expected)


def test_filtered_cascades_keep_order_and_classifier() -> None:
    model, copy = Threshold(), Threshold()
    sources = {"transfer": TransferAttack(model, PGD(copy, eps=0.1, step_size=0.1, steps=1))}
    attack = filtered(
        Cascade(model, {"aa": AutoAttack(model, eps=0.1, classes=2), **sources}, eps=0.1),
        Cascade(copy, {"aa": AutoAttack(copy, eps=0.1, classes=2), **sources}, eps=0.1),
    )
    assert isinstance(attack, Cascade)
    aa = attack.members["aa"]
    assert isinstance(aa, AutoAttack)
    assert list(aa.members) == ["apgd_ce", "fab_t", "square"]
    for member in aa.members.values():
        assert isinstance(member, FilteredAttack)
        assert (member.model, member.first.model) == (model, copy)
        assert member.settings["filter"] == "bfloat16"
    assert attack.members["transfer"] is sources["transfer"]

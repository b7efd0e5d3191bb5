"""Freezing a model in place: nested, from several threads, and past exceptions."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from awnet.attacks import FGSM, PGD, frozen


def network() -> nn.Sequential:
    """In training mode but for one module, with one parameter frozen and a gradient on another."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4))
    model[1].eval()
    model[3].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


def state(model: nn.Module) -> list[object]:
    return [
        [module.training for module in model.modules()],
        [(p.requires_grad, None if p.grad is None else id(p.grad)) for p in model.parameters()],
    ]


def is_frozen(model: nn.Module) -> bool:
    return not any(m.training for m in model.modules()) and not any(
        p.requires_grad for p in model.parameters()
    )


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("shared", ["whole", "inner", "around"])
def test_blocks_that_overlap_restore_the_model_when_the_last_one_ends(shared: str, first_out: int) -> None:
    model = network()
    other = {"whole": model, "inner": model[0], "around": nn.Sequential(model, nn.ReLU())}[shared]
    before = state(model)
    blocks = [frozen(model), frozen(other)]
    for block in blocks:
        block.__enter__()
    assert is_frozen(model)
    blocks[first_out].__exit__(None, None, None)
    still = other if first_out == 0 else model
    assert is_frozen(still)
    blocks[1 - first_out].__exit__(None, None, None)
    assert state(model) == before


def run_in_threads(*calls: Callable[[], object]) -> None:
    errors: list[BaseException] = []

    def guarded(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


def test_attacks_from_several_threads_leave_the_model_as_it_was() -> None:
    model = network()
    before = state(model)
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    expected = PGD(model, eps=0.1, step_size=0.02, steps=3)(x, y)

    def attack() -> None:
        for _ in range(10):
            actual = PGD(model, eps=0.1, step_size=0.02, steps=3)(x, y)
            assert torch.equal(actual, expected)  # in eval mode throughout

    def fail() -> None:
        for _ in range(10):
            with pytest.raises(ValueError, match="labels below"):
                FGSM(model, eps=0.1)(x, y + 7)

    run_in_threads(attack, attack, fail)
    assert state(model) == before


def test_a_failed_frozen_block_leaves_nothing_frozen() -> None:
    class Refuses(nn.Linear):
        def train(self, mode: bool = True) -> Refuses:
            raise RuntimeError("no mode for me")

    model = nn.Sequential(nn.Linear(2, 2), Refuses(2, 2))
    before = state(model)
    with pytest.raises(RuntimeError, match="no mode"), frozen(model):
        pass
    assert state(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_train_method_of_the_user_is_called_when_the_mode_is_restored() -> None:
    class Merges(nn.Linear):
        """As LoRA layers do: its weight is another one in eval mode."""

        def train(self, mode: bool = True) -> Merges:
            if mode != self.training:
                self.weight.data.mul_(2 if mode else 0.5)
            return super().train(mode)

    model = nn.Sequential(nn.Flatten(), Merges(4, 2))
    weight: Tensor = model[1].weight.detach().clone()
    with frozen(model):
        assert torch.equal(model[1].weight, weight * 0.5)
    assert torch.equal(model[1].weight, weight)
    assert model[1].training

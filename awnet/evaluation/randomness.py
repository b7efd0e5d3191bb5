"""Whether an evaluated model is stochastic, and how it is evaluated then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from awnet.attacks import Attack, Cascade, Stochastic, TransferAttack
from awnet.attacks.registry import BUDGETS, BudgetName
from awnet.attacks.stochastic import randomness

IMAGES = 64  # images of the batch that detects a stochastic model


class Examined(NamedTuple):
    """The module that an evaluation runs, and what the report says of its randomness.

    module: a :class:`awnet.attacks.Stochastic` of the model, or the model itself if it is deterministic.
    settings: ``eot``, ``passes`` and ``difference``; empty for a deterministic model.
    flags: warnings for the report.
    """

    module: nn.Module
    settings: dict[str, Any]
    flags: list[str]


def examine(module: nn.Module, x: Tensor, *, eot: int | None, budget: BudgetName, seed: int) -> Examined:
    """Runs ``module`` twice on the images ``x`` and wraps it if the logits differ by more than rounding.

    Args:
        eot: forward passes per gradient; None takes the budget's for a stochastic model. More than 1 wraps a
            model whose passes do not differ, too.
    """
    x, flags = x[:IMAGES], []
    difference, functions = randomness(module, x)
    if functions:
        coupled = ", so an image's logits depend on the other images of its batch"
        flags.append(
            f"the model runs {' and '.join(functions)} in train mode although it was set to eval mode"
            f"{coupled if 'batch_norm' in functions else ''}"
        )
    stochastic = module if isinstance(module, Stochastic) else None
    if not difference and stochastic is None and (eot is None or eot == 1):
        return Examined(module, {}, flags)
    if stochastic is None or eot is not None:
        inner = module if stochastic is None else stochastic.model
        stochastic = Stochastic(inner, eot=BUDGETS[budget].eot if eot is None else eot, seed=seed)
    settings = {"eot": stochastic.eot, "passes": stochastic.passes, "difference": difference}
    differ = (
        f"two forward passes of the same images differ by {difference:.1e} of the largest logit"
        if difference
        else "two forward passes of the same images did not differ"
    )
    rand = (
        f"attacks average their gradients over {stochastic.eot} passes (--eot), and AutoAttack is "
        "its rand version"
        if stochastic.eot > 1
        else "attacks do not average their gradients (--eot 1), so the robust accuracy may be too high; "
        "AutoAttack is its rand version"
    )
    flags.append(
        f"the model is evaluated as a stochastic one, {differ}: {rand}; the predicted class is that of the "
        f"largest mean probability over {stochastic.passes} passes"
    )
    return Examined(stochastic, settings, flags)


def ignoring_randomness(attacks: Mapping[str, Attack]) -> list[str]:
    """The attacks on a stochastic model that neither average gradients over passes nor seed its noise."""

    def aware(attack: Attack) -> bool:
        if isinstance(attack, Cascade):
            return all(map(aware, attack.members.values()))
        return isinstance(attack, TransferAttack) or isinstance(attack.model, Stochastic)

    return [name for name, attack in attacks.items() if not aware(attack)]

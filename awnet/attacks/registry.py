"""The attacks that the paper evaluates, by name, with sizes from a data set's threat model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from awnet.attacks.base import Attack
from awnet.attacks.pgd import CW, FGSM, PGD
from awnet.data.dataset import ThreatModel

_ATTACKS: dict[str, Callable[[nn.Module, ThreatModel, int], Attack]] = {
    "fgsm": lambda model, threat, seed: FGSM(model, eps=threat.eps, seed=seed),
    "pgd_sat": lambda model, threat, seed: PGD(
        model, eps=threat.eps, step_size=threat.pgd_sat_step_size, steps=20, seed=seed
    ),
    "pgd_trades": lambda model, threat, seed: PGD(
        model, eps=threat.eps, step_size=threat.pgd_trades_step_size, steps=20, seed=seed
    ),
    "cw": lambda model, threat, seed: CW(model, eps=threat.eps, step_size=threat.cw_step_size, seed=seed),
}


def list_attacks() -> tuple[str, ...]:
    """The names that :func:`named_attack` knows."""
    return tuple(_ATTACKS)


def named_attack(name: str, model: nn.Module, threat_model: ThreatModel, seed: int = 0) -> Attack:
    """One of the paper's attacks on ``model``; at eps = 8/255 the step sizes are the paper's.

    Args:
        name: ``"fgsm"``: one step of eps. ``"pgd_sat"``: 20 steps of eps/4. ``"pgd_trades"``: 20 steps of
            0.003, scaled with eps. ``"cw"``: 30 steps of eps/4 on the margin, kappa = 50. Those with more
            than one step start uniformly in the ball.
        threat_model: eps and step sizes, a property of the data set.
        seed: keys the random start.

    Raises:
        ValueError: there is no such attack.
    """
    if name not in _ATTACKS:
        raise ValueError(f"unknown attack {name!r}: choose from {', '.join(_ATTACKS)}")
    return _ATTACKS[name](model, threat_model, seed)

"""Attacks within an L-infinity ball, on any ``nn.Module`` that maps images in [0, 1] to logits."""

from awnet.attacks.autoattack import AutoAttack
from awnet.attacks.base import Attack, frozen
from awnet.attacks.cascade import Cascade
from awnet.attacks.graphed import GraphedPGD
from awnet.attacks.pgd import CW, FGSM, PGD
from awnet.attacks.registry import Suite, list_attacks, named_attack
from awnet.attacks.transfer import TransferAttack, craft, replay

__all__ = [
    "CW",
    "FGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Cascade",
    "GraphedPGD",
    "Suite",
    "TransferAttack",
    "craft",
    "frozen",
    "list_attacks",
    "named_attack",
    "replay",
]

"""Attacks within an L-infinity ball, on any ``nn.Module`` that maps images in [0, 1] to logits."""

from awnet.attacks.base import Attack, frozen
from awnet.attacks.pgd import CW, FGSM, PGD
from awnet.attacks.registry import list_attacks, named_attack

__all__ = ["CW", "FGSM", "PGD", "Attack", "frozen", "list_attacks", "named_attack"]

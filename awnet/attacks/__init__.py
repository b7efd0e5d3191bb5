"""Attacks within a ball in L-infinity, L2 or L1, on any ``nn.Module`` that maps images in [0, 1] to logits.

``base`` checks arguments and freezes the model; ``norms`` has the geometry of the balls; ``pgd``,
``autoattack``, ``search``, ``adaptive``, ``targeted``, ``fmn`` and ``momentum`` are the attacks; ``registry``
names them; ``cascade`` runs several in order and decides which images are already broken; ``filtered`` runs
an attack in low precision first; ``transfer`` and ``craft`` replay images made on another model;
``stochastic`` has the rules for models with random outputs; ``saved`` stores the state of an interrupted
attack, with checksums.
"""

from awnet.attacks.autoattack import AutoAttack
from awnet.attacks.base import Attack, frozen
from awnet.attacks.cascade import Cascade
from awnet.attacks.craft import craft
from awnet.attacks.filtered import FilteredAttack
from awnet.attacks.fmn import FMN
from awnet.attacks.graphed import GraphedPGD
from awnet.attacks.momentum import MIFGSM
from awnet.attacks.pgd import CW, FGSM, PGD
from awnet.attacks.registry import Suite, list_attacks, named_attack
from awnet.attacks.stochastic import Stochastic
from awnet.attacks.targeted import MALT, TargetedAPGD
from awnet.attacks.transfer import TransferAttack, replay

__all__ = [
    "CW",
    "FGSM",
    "FMN",
    "MALT",
    "MIFGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "Cascade",
    "FilteredAttack",
    "GraphedPGD",
    "Stochastic",
    "Suite",
    "TargetedAPGD",
    "TransferAttack",
    "craft",
    "frozen",
    "list_attacks",
    "named_attack",
    "replay",
]

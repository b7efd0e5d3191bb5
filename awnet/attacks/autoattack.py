"""AutoAttack (Croce and Hein 2020): the official attacks of ``pyautoattack`` as awnet attacks."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from awnet.attacks.base import Attack, check_count
from awnet.attacks.cascade import Cascade
from awnet.attacks.stochastic import EOT, Stochastic, eot_passes
from awnet.data.threat_model import Norm
from awnet.scalars import check_integer

Name = Literal["apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square"]
OFFICIAL: tuple[Name, ...] = ("apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square")

STEPS, TARGETS, QUERIES = 100, 9, 5000
"""The settings of the standard version."""
L1_RESTARTS, L1_TARGETS = 5, 5
"""In L1: restarts of APGD-CE, and largest number of target classes of APGD-T, in the standard version."""


class OfficialAttack(Attack):
    """One of AutoAttack's attacks, with the settings of the standard version.

    The official code uses torch's random generator, seeded for each batch: unlike in other attacks of this
    package, an image's noise depends on its batch. The state of the generator is restored.

    Args:
        name: ``"apgd_ce"``, ``"apgd_dlr"`` (at least 3 classes), ``"apgd_t"`` (targeted DLR, at least 4
            classes), ``"fab_t"`` or ``"square"``.
        steps: steps of APGD and FAB.
        targets: target classes of the targeted attacks; at most K - 1, and in L1 at most 5 for ``"apgd_t"``.
        queries: queries of Square.

    In L1, APGD has the standard version's 5 restarts (1 for ``"apgd_t"``) and decreasing radii. On a
    :class:`Stochastic` model it has the rand version's settings: gradients averaged over ``model.eot``
    passes, and in L1 one restart and a constant radius.
    """

    def __init__(
        self,
        model: nn.Module,
        name: Name,
        *,
        eps: float,
        norm: Norm = "Linf",
        steps: int = STEPS,
        targets: int = TARGETS,
        queries: int = QUERIES,
        seed: int = 0,
    ) -> None:
        super().__init__(model, eps=eps, norm=norm, seed=seed)
        if name not in OFFICIAL:
            raise ValueError(f"name must be one of {', '.join(OFFICIAL)}, got {name!r}")
        self.name = name
        self.steps, self.targets = check_count("steps", steps), check_count("targets", targets)
        self.queries = check_count("queries", queries)
        self.large_radii = self.norm == "L1" and not isinstance(model, Stochastic)
        self.restarts = L1_RESTARTS if self.large_radii and name in ("apgd_ce", "apgd_dlr") else 1
        if self.norm == "L1" and name == "apgd_t":
            self.targets = min(self.targets, L1_TARGETS)
        self.notes: Counter[str] = Counter()
        """Warnings of the official code for the last batch: ``zero_gradients``, a number of images."""

    @property
    def settings(self) -> dict[str, Any]:
        sizes: dict[str, Any] = {"square": {"queries": self.queries}}.get(self.name, {"steps": self.steps})
        if self.name in ("apgd_t", "fab_t"):
            sizes["targets"] = self.targets
        if self.restarts > 1:
            sizes["restarts"] = self.restarts
        return super().settings | {"attack": self.name, **sizes, "implementation": "pyautoattack"}

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        with torch.no_grad():
            classes = self.logits(x[:1], largest_label).shape[1]

        def predict(images: Tensor) -> Tensor:
            # Square passes an empty batch if every image has margin 0
            return self.logits(images, largest_label) if len(images) else images.new_zeros(0, classes)

        needed = {"apgd_dlr": 3, "apgd_t": 4}.get(self.name, 2)
        if classes < needed:
            raise ValueError(f"{self.name} needs a model with at least {needed} classes, got {classes}")
        log = _Log()
        attack = self._build(predict, classes, x.device, log)
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            x_adv: Tensor = attack.perturb(x.float(), y)
        self.notes = log.notes
        return self.project(x_adv.detach().to(x.dtype), x)

    def _build(self, predict: Callable[..., Tensor], classes: int, device: torch.device, log: _Log) -> Any:
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.fab_pt import FABAttack_PT
        from pyautoattack.square import SquareAttack

        shared = {"eps": self.eps, "norm": self.norm, "seed": self.seed, "device": device}
        shared["n_restarts"] = self.restarts
        targets = min(self.targets, classes - 1)
        if self.name == "square":
            return SquareAttack(predict, n_queries=self.queries, p_init=0.8, resc_schedule=False, **shared)
        if self.name == "fab_t":
            attack = FABAttack_PT(predict, n_iter=self.steps, n_target_classes=targets, **shared)
            attack.targeted = True
            return attack
        apgd = shared | {"n_iter": self.steps, "eot_iter": eot_passes(self.model), "rho": 0.75, "logger": log}
        apgd["use_largereps"] = self.large_radii
        if self.name == "apgd_t":
            return APGDAttack_targeted(predict, n_target_classes=targets, **apgd)
        return APGDAttack(predict, loss=self.name.removeprefix("apgd_"), **apgd)


class AutoAttack(Cascade):
    """AutoAttack's standard or rand version, each attack on the images that are still robust.

    ``"standard"``: APGD-CE, APGD-T, FAB-T and Square. With 3 classes APGD-DLR replaces APGD-T, whose loss
    needs 4; with 2 classes APGD-T is left out. ``"rand"``, for a :class:`Stochastic` model: APGD-CE and, with
    at least 3 classes, APGD-DLR, both with gradients averaged over ``model.eot`` forward passes. Returns the
    same images as ``pyautoattack.AutoAttack`` for each batch. ``outcome.notes`` counts the warnings of the
    official code: ``randomized``, ``probabilities`` and ``dynamic``, in batches, and ``zero_gradients``, in
    images.

    Args:
        classes: K of the model.
        steps, targets, queries: other values than the standard ones give a different, weaker attack.
        version: None takes ``"rand"`` for a :class:`Stochastic` model and ``"standard"`` for any other.
            With ``"rand"`` a model that is not :class:`Stochastic` is treated as one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        norm: Norm = "Linf",
        classes: int = 10,
        steps: int = STEPS,
        targets: int = TARGETS,
        queries: int = QUERIES,
        seed: int = 0,
        version: Literal["standard", "rand"] | None = None,
    ) -> None:
        if version not in ("standard", "rand", None):
            raise ValueError(f"version must be 'standard', 'rand' or None, got {version!r}")
        if version == "rand" and not isinstance(model, Stochastic):
            model = Stochastic(model, seed=seed)
        self.version = version or ("rand" if isinstance(model, Stochastic) else "standard")
        classes, targets = check_integer("classes", classes, 2), check_integer("targets", targets, 0)
        second: tuple[Name, ...] = () if classes == 2 else ("apgd_dlr",) if classes == 3 else ("apgd_t",)
        names: tuple[Name, ...] = ("apgd_ce", *second, "fab_t", "square")
        if self.version == "rand":
            names = ("apgd_ce",) if classes == 2 else ("apgd_ce", "apgd_dlr")
        targets = min(targets, classes - 1)
        members: Mapping[str, Attack] = {
            name: OfficialAttack(
                model, name, eps=eps, norm=norm, steps=steps, targets=targets, queries=queries, seed=seed
            )
            for name in names
        }
        super().__init__(model, members, eps=eps, norm=norm, seed=seed)
        if self.version == "rand":
            self.standard = steps == STEPS and eot_passes(model) == EOT
        else:
            self.standard = (steps, queries) == (STEPS, QUERIES) and targets == min(TARGETS, classes - 1)

    @property
    def settings(self) -> dict[str, Any]:
        reduced = "reduced" if self.version == "standard" else "reduced rand"
        return super().settings | {"version": self.version if self.standard else reduced}

    def examine(self, x: Tensor, y: Tensor, largest_label: int) -> Counter[str]:
        """The official code's checks for randomized, dynamic and probability outputs, on this batch."""
        from pyautoattack import checks

        def predict(images: Tensor) -> Tensor:
            return self.logits(images, largest_label)

        log = _Log()
        if self.version != "rand":
            checks.check_randomized(predict, x, y, bs=len(x), logger=log)
        checks.check_range_output(predict, x, logger=log)
        # the official check counts calls in a table of its module, and removes a debugger's trace function
        tracing = sys.gettrace()
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))
        try:
            with torch.no_grad():
                checks.check_dynamic(predict, x, logger=log)
        finally:
            sys.settrace(tracing)
        return log.notes


_WARNINGS = {
    "randomized": re.compile(r"seems to be a randomized defense"),
    "probabilities": re.compile(r"output is a probability distribution"),
    "dynamic": re.compile(r"seems to be a dynamic defense"),
    "zero_gradients": re.compile(r"there are (\d+) points with zero gradient"),
}


class _Log(logging.Logger):
    """A logger that counts the official code's warnings and prints nothing."""

    def __init__(self) -> None:
        super().__init__("awnet.autoattack", logging.WARNING)
        self.notes: Counter[str] = Counter()

    def handle(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        known = [(key, match) for key, pattern in _WARNINGS.items() if (match := pattern.search(text))]
        if not known:
            raise RuntimeError(f"pyautoattack gave a warning that this version does not know: {text}")
        for key, match in known:
            self.notes[key] += int(match.group(1)) if match.groups() else 1

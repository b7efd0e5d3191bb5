"""Recipes of baseline networks that need a special training: RDI-ResNet, ADVMOE, Separate-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet.attacks import PGD, frozen
from awnet.data import Dataset, ThreatModel
from awnet.data.dataset import Batch
from awnet.models.advmoe import ADVMOE
from awnet.models.rdi import RDIResNet, choose_thresholds
from awnet.models.separate import SeparateNet
from awnet.training.forward import Forward, Phase, Teachers
from awnet.training.losses import (
    Loss,
    LossOptions,
    LossResult,
    Outputs,
    cross_entropy,
    divergence,
    loss_result,
)
from awnet.training.recipes import PGDAT, RECIPES, Recipe, Trades
from awnet.training.training_attacks import TrainingAttack

Network = TypeVar("Network", bound=nn.Module)


def _require(model: nn.Module, kind: type[Network], recipe: str) -> Network:
    """``model``; TypeError unless it is a ``kind``, which ``recipe`` trains."""
    if not isinstance(model, kind):
        raise TypeError(f"recipe {recipe!r} trains a {kind.__name__}, got a {type(model).__name__}")
    return model


# RDI-ResNet


def all_exits(
    model: nn.Module, batch: Batch, x_adv: Tensor | None, options: LossOptions, teachers: Teachers | None
) -> Tensor:
    """Logits [exits, 2B, K] of all exits for [clean; adversarial] images."""
    network = _require(model, RDIResNet, "rdi")
    assert x_adv is not None
    return torch.stack(network.exits(torch.cat([batch.x, x_adv]))).float()


def rdi(outputs: Tensor, y: Tensor, options: LossOptions) -> LossResult:
    """L = Σ over the exits of ½ CE(x_nat) + ½ CE(x_adv), with x_adv of the max-average attack."""
    per_image = _cross_entropies(outputs, torch.cat([y, y]), options.label_smoothing).sum(0)  # [2B]
    nat, adv = (half.mean() for half in per_image.split(len(y)))
    w_adv = 0.5 if options.adv_weight is None else options.adv_weight
    return loss_result((1 - w_adv) * nat + w_adv * adv, {"nat": nat, "adv": adv})


def _cross_entropies(exits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """CE [exits, B] of logits [exits, B, K] and labels [B]."""
    labels = y[:, None].expand(-1, len(exits))
    return F.cross_entropy(exits.movedim(0, -1), labels, reduction="none", label_smoothing=label_smoothing).T


@dataclass(frozen=True)
class RDI(PGDAT):
    """Multi-exit adversarial training of ``rdi_resnet38`` with its max-average defense.

    The attack computes a PGD image against each exit and takes, for every image, the one with the largest sum
    of all exits' losses. It costs as much as four and a half attacks on the network. Before each validation
    the exits' thresholds are chosen on held-out training images, clean and attacked.

    ``awnet train --recipe rdi --data cifar10 --model rdi_resnet38``.
    Expected time and accuracy: not measured.
    """

    name: ClassVar[str] = "rdi"
    network: ClassVar[str | None] = "rdi_resnet38"
    loss: ClassVar[Loss] = staticmethod(rdi)
    forward: ClassVar[Forward] = staticmethod(all_exits)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack_kind != "pgd":
            raise ValueError(f"attack_kind must be pgd: {self.name} defines its attack")
        if "cutmix" in self.augment:
            raise ValueError(f"augment must be without cutmix: {self.name} needs one label per image")

    def attack(
        self, model: nn.Module, threat_model: ThreatModel, num_classes: int, seed: int
    ) -> TrainingAttack:
        network = _require(model, RDIResNet, self.name)
        return MaxAverageAttack(
            network,
            num_classes,
            eps=threat_model.eps,
            norm=threat_model.norm,
            step_size=self.attack_step_size or threat_model.train_step_size,
            steps=self.attack_steps,
            random_start="normal",
            noise_std=self.attack_noise,
            seed=seed,
        )

    def calibrate(self, model: nn.Module, data: Dataset) -> None:
        network = _require(model, RDIResNet, self.name)
        if not len(data):
            raise ValueError("splits.validation is empty: rdi needs held-out images to choose its thresholds")
        attack = self.attack(network, data.threat_model, data.num_classes, seed=0)
        logits, labels = [], []
        for batch in data.batches(self.batch_size):
            for x in (batch.x, attack(batch.x, batch.y, index=batch.index)):
                with torch.no_grad(), frozen(network):
                    logits.append(torch.stack(network.exits(x)))
                labels.append(batch.y)
        network.thresholds.copy_(choose_thresholds(torch.cat(logits, dim=1), torch.cat(labels)))


class SeveralAttacks:
    """Attacks that share one seed."""

    attacks: Sequence[TrainingAttack]

    @property
    def seed(self) -> int:
        return self.attacks[0].seed

    @seed.setter
    def seed(self, seed: int) -> None:
        for attack in self.attacks:
            attack.seed = seed


class MaxAverageAttack(SeveralAttacks):
    """PGD against each exit of ``network``; for every image, the result with the largest average loss.

    ``settings`` are those of :class:`~awnet.attacks.PGD`; ``seed`` may be changed. Values are not checked.
    """

    def __init__(self, network: RDIResNet, num_classes: int, **settings: Any) -> None:
        self.network, self.num_classes = network, num_classes
        exits = range(len(network.side_exits) + 1)
        self.attacks: list[PGD] = [PGD(network, loss=_exit_loss(exit), **settings) for exit in exits]

    def __call__(self, x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
        """Adversarial images for ``x`` [B, C, H, W], labels int64 [B] and indices int64 [B]."""
        with torch.enable_grad(), frozen(self.network):
            candidates = [attack.perturb(x, y, index, self.num_classes - 1) for attack in self.attacks]
        with torch.no_grad(), frozen(self.network):
            exits = [torch.stack(self.network.exits(one)) for one in candidates]
        loss = torch.stack([_cross_entropies(logits, y).sum(0) for logits in exits])  # [exits, B]
        return torch.stack(candidates)[loss.argmax(0), torch.arange(len(y), device=y.device)]


def _exit_loss(exit: int) -> Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]:
    """The cross-entropy [B] of exit number ``exit``, as a loss of PGD."""

    def loss(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(model, RDIResNet)
        return F.cross_entropy(model.exits(x_adv, last=exit)[-1], y, reduction="none")

    return loss


# ADVMOE


@contextmanager
def _training_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only these parameters of ``model`` require gradients, for a block of code."""
    chosen = {id(parameter) for parameter in parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _pass_training(
    model: nn.Module, parameters: Iterable[nn.Parameter], batch: Batch, x_adv: Tensor | None
) -> Outputs:
    """A pass over [clean; adversarial] images with gradients for some of the parameters only."""
    assert x_adv is not None
    with _training_only(model, parameters):
        clean, adversarial = model(torch.cat([batch.x, x_adv])).float().split(len(batch.y))
    is_clean = torch.arange(2 * len(batch.y), device=batch.y.device) < len(batch.y)
    return Outputs(clean, adversarial, is_clean)


@dataclass(frozen=True)
class AlternatingTrades(Trades):
    """TRADES for the experts of ``advmoe_resnet18`` and then for its router, on every batch.

    Each of the two updates has a separate attack of 2 steps of 5/8 eps on the current network and leaves the
    other part's weights unchanged. The router trains by a straight-through gradient of its choice.

    adv_weight: β, the factor of the experts' KL term, 6 if None.
    router_weight: α, the factor of the router's.

    ``awnet train --recipe advmoe --data cifar10 --model advmoe_resnet18``.
    Expected time and accuracy: not measured.
    """

    name: ClassVar[str] = "advmoe"
    network: ClassVar[str | None] = "advmoe_resnet18"

    router_lr: float = 0.1
    attack_steps: int = 2
    router_weight: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.router_weight >= 0:
            raise ValueError(f"router_weight must be a number of at least 0, got {self.router_weight!r}")
        if self.capture is True:
            raise ValueError(
                "capture must not be True: the router's attack needs the weights after the experts' update"
            )

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(_expert_pass, _expert_loss), Phase(_router_pass, self._router_loss))

    def _router_loss(self, outputs: Outputs, y: Tensor, options: LossOptions) -> LossResult:
        nat = cross_entropy(outputs.clean, y, options)
        adv = divergence(outputs.clean, outputs.adversarial, options)
        return loss_result(nat + self.router_weight * adv, {"router_nat": nat, "router_adv": adv})

    def usual_step_size(self, threat_model: ThreatModel) -> float:
        return threat_model.eps * 5 / 8


def _expert_pass(
    model: nn.Module, batch: Batch, x_adv: Tensor | None, options: LossOptions, teachers: Teachers | None
) -> Outputs:
    network = _require(model, ADVMOE, "advmoe")
    routers = {id(parameter) for parameter in network.router.parameters()}
    experts = [parameter for parameter in network.parameters() if id(parameter) not in routers]
    return _pass_training(network, experts, batch, x_adv)


def _expert_loss(outputs: Outputs, y: Tensor, options: LossOptions) -> LossResult:
    nat = cross_entropy(outputs.clean, y, options)
    adv = divergence(outputs.clean, outputs.adversarial, options)
    factor = 6.0 if options.adv_weight is None else options.adv_weight
    return loss_result(nat + factor * adv, {"nat": nat, "adv": adv})


def _router_pass(
    model: nn.Module, batch: Batch, x_adv: Tensor | None, options: LossOptions, teachers: Teachers | None
) -> Outputs:
    network = _require(model, ADVMOE, "advmoe")
    return _pass_training(network, network.router.parameters(), batch, x_adv)


# Separate-Net


class SeparateOutputs(NamedTuple):
    """The logits of Separate-Net's parts, float32.

    standard: [B, K], the standard member's for clean images.
    clean, adversarial: [B, K], the robust member's.
    type_logits: [3B, 2], the detector's for [clean; robust member's; standard member's adversarial images].
    """

    standard: Tensor
    clean: Tensor
    adversarial: Tensor
    type_logits: Tensor


def separate_pass(
    model: nn.Module, batch: Batch, x_adv: Tensor | None, options: LossOptions, teachers: Teachers | None
) -> SeparateOutputs:
    """Runs each part on its images; ``x_adv`` [2B, C, H, W] attacks the robust, then the standard member."""
    network = _require(model, SeparateNet, "separate")
    assert x_adv is not None
    x = batch.x
    x_robust, x_standard = x_adv.split(len(x))
    standard = network.standard(x).float()
    clean, adversarial = network.robust(torch.cat([x, x_robust])).float().split(len(x))
    type_logits = network.route(torch.cat([x, x_robust, x_standard])).type_logits
    assert type_logits is not None
    return SeparateOutputs(standard, clean, adversarial, type_logits.float())


def separate(outputs: SeparateOutputs, y: Tensor, options: LossOptions) -> LossResult:
    """The sum of three losses, each of which trains a different part:

    standard member   CE(x)
    robust member     CE(x) + 6 KL(p(x) ‖ p(x_robust)), TRADES
    detector          ½ CE(type(x), clean) + ½ CE(type([x_robust; x_standard]), adversarial)
    """
    n = len(y)
    standard = cross_entropy(outputs.standard, y, options)
    nat = cross_entropy(outputs.clean, y, options)
    adv = divergence(outputs.clean, outputs.adversarial, options)
    factor = 6.0 if options.adv_weight is None else options.adv_weight
    kind = (torch.arange(3 * n, device=y.device) < n).long()
    each = F.cross_entropy(
        outputs.type_logits, kind, reduction="none", label_smoothing=options.type_label_smoothing
    )
    type_loss = 0.5 * each[:n].mean() + 0.5 * each[n:].mean()
    correct = (outputs.type_logits.detach().argmax(1) == kind).float()
    terms = {
        "standard": standard,
        "nat": nat,
        "adv": adv,
        "type": type_loss,
        "type_accuracy": 0.5 * correct[:n].mean() + 0.5 * correct[n:].mean(),
    }
    return loss_result(standard + nat + factor * adv + options.type_weight * type_loss, terms)


@dataclass(frozen=True)
class Separate(Trades):
    """Plain training of Separate-Net's standard member, TRADES for the robust one, and the detector.

    The parts share no weights, so each trains as it would alone; the detector at ``router_lr``.

    adv_weight: factor of the robust member's KL term, 6 if None.

    ``awnet train --recipe separate --data cifar10 --model separate_net``.
    Expected time and accuracy: not measured.
    """

    name: ClassVar[str] = "separate"
    network: ClassVar[str | None] = "separate_net"
    loss: ClassVar[Loss] = staticmethod(separate)
    forward: ClassVar[Forward] = staticmethod(separate_pass)

    def attack(
        self, model: nn.Module, threat_model: ThreatModel, num_classes: int, seed: int
    ) -> TrainingAttack:
        """Returns [2B, C, H, W]: images against the robust member (its KL), then against the standard one."""
        network = _require(model, SeparateNet, self.name)
        return BothAttacks(
            super().attack(network.robust, threat_model, num_classes, seed),
            Recipe.attack(self, network.standard, threat_model, num_classes, seed),
        )


class BothAttacks(SeveralAttacks):
    """The images of two attacks on the same batch, concatenated [2B, C, H, W], with one seed."""

    def __init__(self, first: TrainingAttack, second: TrainingAttack) -> None:
        self.attacks = (first, second)

    def __call__(self, x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
        return torch.cat([attack(x, y, index=index) for attack in self.attacks])


for _kind in (RDI, AlternatingTrades, Separate):
    RECIPES[_kind.name] = _kind

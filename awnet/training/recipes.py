"""Recipes: how to train, one frozen dataclass per method, with the paper's settings as defaults.

recipe = recipe_for("mtard", "cifar10")                  # the settings for a data set
recipe = recipe_for("trades", "digits", epochs=30)       # with one of them changed
MTARD(epochs=50, lr=0.05)                                # all settings given directly
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from awnet.attacks import GraphedPGD
from awnet.attacks.base import device_of
from awnet.data import Dataset, ThreatModel
from awnet.nn import Steering, has_router, observe, routers
from awnet.precision import at_least_float32
from awnet.scalars import is_integer, is_number, plain
from awnet.training import losses
from awnet.training.forward import Forward, Phase, clean_pass, distillation_pass, helper_pass, joint_pass
from awnet.training.losses import Loss, LossOptions

TeacherKind = Literal["clean", "robust"]
Precision = Literal["float32", "bfloat16"]


class TrainingAttack(Protocol):
    """A training attack: images [B, C, H, W] and labels [B] to adversarial images."""

    seed: int

    def __call__(self, x: Tensor, y: Tensor, *, index: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that all methods share.

    epochs, batch_size: the last batch of an epoch may be smaller.
    lr, router_lr: learning rate of the dynamic (or static) network, and of the router with its heads.
    momentum, weight_decay: of SGD; the decay applies to every parameter.
    schedule: ``step`` multiplies the rate by ``lr_decay`` after the epochs in ``milestones``; ``onecycle``
        raises it to ``lr`` and lowers it to nearly 0 over the run (Smith and Topin), with constant momentum.
    attack_steps, attack_step_size, attack_noise: of the training attack, PGD that starts at
        x + attack_noise · N(0, 1); step size in image units, from the threat model if None (eps/4; for TRADES
        0.007 at eps = 8/255).
    inner_type_weight: weight of the router's type loss in the objective that this attack maximizes.
    type_weight, type_label_smoothing, adv_weight, consistency, router_passes: see ``losses.LossOptions``.
    precision: of convolutions and products; ``auto`` is bfloat16 (autocast) on CUDA and float32 elsewhere.
        Weights, statistics, the router's coefficients and the losses are always float32.
    attack_precision: of the network in the training attack; ``auto`` is that of ``precision``. The images are
        float32.
    layout: memory format of images and convolution weights; ``auto`` is channels_last on CUDA and where
        ``precision`` is bfloat16, and NCHW elsewhere.
    accumulate: number of micro-batches per batch, to save memory. Their gradients add up to the mean over the
        batch. Batch norms see each micro-batch separately and update their running statistics for each.
    clip_norm: gradients with a larger Euclidean norm are scaled to this norm; None does not clip.
    ema_decay: of an exponential moving average of weights and running statistics, which is validated and
        saved instead of the newest weights; 0 for none.
    capture: run a step after the attack as one CUDA graph, captured at the second or third batch of a shape,
        so that the host launches all its kernels at once. CUDA only, not together with ``accumulate``;
        ``auto`` captures where both hold. If the capture fails, the step runs without it, with a warning.
    validate_every: epochs between validations (the last epoch is always validated).
    validate_limit: number of held-out images for validation, all if None.
    log_every: steps between log lines. The host waits for the device only there.
    """

    name: ClassVar[str]
    loss: ClassVar[Loss]
    forward: ClassVar[Forward] = staticmethod(joint_pass)
    needs_attack: ClassVar[bool] = True
    teachers: ClassVar[tuple[TeacherKind, ...]] = ()  # kinds of teachers, in order
    network: ClassVar[str | None] = None  # the model that the recipe is for; None for any

    epochs: int = 100
    batch_size: int = 256
    lr: float = 0.1
    router_lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 2e-4
    schedule: Literal["step", "onecycle"] = "step"
    milestones: tuple[int, ...] = (75, 90)
    lr_decay: float = 0.1
    attack_steps: int = 10
    attack_step_size: float | None = None
    attack_noise: float = 0.001
    inner_type_weight: float = 0.0
    type_weight: float = 1.0
    type_label_smoothing: float = 0.0
    adv_weight: float | None = None
    consistency: float = 0.0
    router_passes: Literal["joint", "separate"] = "joint"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    attack_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    layout: Literal["auto", "nchw", "channels_last"] = "auto"
    accumulate: int = 1
    clip_norm: float | None = None
    ema_decay: float = 0.0
    capture: bool | Literal["auto"] = "auto"
    validate_every: int = 1
    validate_limit: int | None = None
    log_every: int = 50

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for name in ("epochs", "batch_size", "attack_steps", "accumulate", "validate_every", "log_every"):
            _check(self, name, is_integer, lambda v: v >= 1, "an integer of at least 1")
        if self.validate_limit is not None:
            _check(self, "validate_limit", is_integer, lambda v: v >= 1, "None or an integer of at least 1")
        for name in ("lr", "lr_decay"):
            _check(self, name, is_number, lambda v: v > 0, "a number above 0")
        for name in ("router_lr", "weight_decay", "attack_noise", "type_weight", "consistency"):
            _check(self, name, is_number, lambda v: v >= 0, "a number of at least 0")
        for name in ("momentum", "type_label_smoothing", "ema_decay"):
            _check(self, name, is_number, lambda v: 0 <= v < 1, "a number in [0, 1)")
        _check(self, "inner_type_weight", is_number, lambda v: True, "a finite number")
        _check(self, "capture", lambda v: isinstance(v, bool) or v == "auto", lambda v: True,
               "true, false or auto")  # fmt: skip
        if self.capture is True and self.accumulate > 1:
            raise ValueError("capture and accumulate exclude each other: leave one of them out")
        for name in ("attack_step_size", "clip_norm"):
            if getattr(self, name) is not None:
                _check(self, name, is_number, lambda v: v > 0, "None or a number above 0")
        if self.adv_weight is not None:
            _check(self, "adv_weight", is_number, lambda v: v >= 0, "None or a number of at least 0")
        _check_choice(self, "schedule", "step", "onecycle")
        _check_choice(self, "router_passes", "joint", "separate")
        _check_choice(self, "precision", "auto", "float32", "bfloat16")
        _check_choice(self, "attack_precision", "auto", "float32", "bfloat16")
        _check_choice(self, "layout", "auto", "nchw", "channels_last")
        several = isinstance(self.milestones, Iterable) and not isinstance(self.milestones, str)
        milestones = plain(list(self.milestones)) if several else []
        if (
            not several
            or not all(is_integer(m) and m >= 1 for m in milestones)
            or milestones != sorted(set(milestones))
        ):
            raise ValueError(
                "milestones must be increasing numbers of epochs, such as (75, 90), got "
                f"{self.milestones!r}; one alone is written (75,), on the command line milestones=75,"
            )
        object.__setattr__(self, "milestones", tuple(milestones))

    # The interface that training uses

    def loss_options(self) -> LossOptions:
        ours = {field.name for field in fields(self)}
        return LossOptions(
            **{field.name: getattr(self, field.name) for field in fields(LossOptions) if field.name in ours}
        )

    def attack(
        self, model: nn.Module, threat_model: ThreatModel, num_classes: int, seed: int
    ) -> TrainingAttack:
        """The training attack on ``model``: PGD on the cross-entropy, with noise keyed by ``seed``.

        Create it once per run and set its ``seed`` for each epoch, since it keeps CUDA graphs. Unlike the
        attacks for users it does not check values, so the host never waits for the device. If a gradient is
        not finite, the image and then the loss become NaN.
        """
        step_size = threat_model.train_step_size
        return self._pgd(model, threat_model.eps, step_size, "ce", _cross_entropy, num_classes, seed)

    def _pgd(
        self,
        model: nn.Module,
        eps: float,
        step_size: float,
        loss: Literal["ce", "kl"],
        objective: Objective,
        num_classes: int,
        seed: int,
    ) -> GraphedPGD:
        fools_router = bool(self.inner_type_weight) and has_router(model)
        device = device_of(model)
        return GraphedPGD(
            model,
            num_classes=num_classes,
            dtype=None if device is None else self.attack_dtype(device),
            capture=True,  # no objective of a recipe waits for the device
            eps=eps,
            step_size=step_size if self.attack_step_size is None else self.attack_step_size,
            steps=self.attack_steps,
            loss=_with_type_loss(objective, self.inner_type_weight) if fools_router else loss,
            random_start="normal",
            noise_std=self.attack_noise,
            seed=seed,
        )

    def attack_dtype(self, device: torch.device) -> torch.dtype | None:
        """The dtype in which the attack runs the model on ``device``; None: the model's own."""
        _, precision = self.precisions(device)
        return torch.bfloat16 if precision == "bfloat16" else None

    def precisions(self, device: torch.device) -> tuple[Precision, Precision]:
        """Resolves ``auto``: the precision of the training pass and that of the attack on ``device``."""
        cuda = device.type == "cuda"
        training: Precision = (
            self.precision if self.precision != "auto" else "bfloat16" if cuda else "float32"
        )
        return training, training if self.attack_precision == "auto" else self.attack_precision

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """Fused SGD in two groups: the router with its heads at ``router_lr``, all else at ``lr``."""
        slow = {id(p) for router in routers(model) for p in router.parameters()}
        groups = [
            {"params": [p for p in model.parameters() if id(p) not in slow], "lr": self.lr},
            {"params": [p for p in model.parameters() if id(p) in slow], "lr": self.router_lr},
        ]
        return torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            fused=True,
        )

    def scheduler(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> LRScheduler:
        """The schedule, stepped once per optimizer step."""
        if self.schedule == "onecycle":
            return OneCycleLR(
                optimizer,
                max_lr=[group["lr"] for group in optimizer.param_groups],
                total_steps=self.epochs * steps_per_epoch,
                cycle_momentum=False,
            )
        return MultiStepLR(optimizer, [m * steps_per_epoch for m in self.milestones], gamma=self.lr_decay)

    def phases(self) -> tuple[Phase, ...]:
        """The updates of one step, in order."""
        return (Phase(self.forward, self.loss),)

    def calibrate(self, model: nn.Module, data: Dataset) -> None:
        """Sets what the model derives from held-out images instead of learning it, before each validation."""

    def teacher_recipe(self, kind: TeacherKind) -> Recipe:
        """The recipe of a teacher that was not given: plain or robust training of the same length."""
        teacher = Standard if kind == "clean" else self._robust_teacher()
        shared = (
            "epochs batch_size lr momentum weight_decay schedule milestones lr_decay attack_steps "
            "attack_step_size attack_noise precision attack_precision layout accumulate clip_norm "
            "validate_every validate_limit log_every"
        )
        return teacher(**{name: getattr(self, name) for name in shared.split()})

    def _robust_teacher(self) -> type[Recipe]:
        return Trades

    def to_dict(self) -> dict[str, Any]:
        """All settings, JSON-ready, with the method's name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


@dataclass(frozen=True)
class Standard(Recipe):
    """Plain training on clean images.

    label_smoothing: share of the label that is spread over all classes, in [0, 1).

    ``awnet train --recipe standard --data digits --model resnet_tiny``: 99.5 % of the validation images
    (seed 0). Time and accuracy on CIFAR and Tiny-ImageNet: not measured.
    """

    name: ClassVar[str] = "standard"
    loss: ClassVar[Loss] = staticmethod(losses.standard)
    forward: ClassVar[Forward] = staticmethod(clean_pass)
    needs_attack: ClassVar[bool] = False

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "label_smoothing", is_number, lambda v: 0 <= v < 1, "a number in [0, 1)")


@dataclass(frozen=True)
class PGDAT(Recipe):
    """½ CE(clean) + ½ CE(adversarial) + L_type.

    ``awnet train --recipe pgd_at --data digits --model resnet_tiny``: clean 99.0 %, PGD-20 70.5 % of the
    validation images (seed 0). Time and accuracy on CIFAR and Tiny-ImageNet: not measured.
    """

    name: ClassVar[str] = "pgd_at"
    loss: ClassVar[Loss] = staticmethod(losses.pgd_at)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self)


@dataclass(frozen=True)
class Trades(Recipe):
    """CE(clean) + 6 KL(p_nat ‖ p_adv) + L_type; its attack maximizes the KL.

    Time and accuracy: not measured.
    """

    name: ClassVar[str] = "trades"
    loss: ClassVar[Loss] = staticmethod(losses.trades)

    def attack(
        self, model: nn.Module, threat_model: ThreatModel, num_classes: int, seed: int
    ) -> TrainingAttack:
        step_size = self.usual_step_size(threat_model)
        return self._pgd(model, threat_model.eps, step_size, "kl", _kl_from_clean, num_classes, seed)

    def usual_step_size(self, threat_model: ThreatModel) -> float:
        """Step size of the attack in image units if ``attack_step_size`` is None."""
        return threat_model.trades_train_step_size


@dataclass(frozen=True)
class MTARD(Recipe):
    """Distillation from a clean and a robust teacher, the paper's joint training (Equations 20–22).

    temperature: τ, 1 on CIFAR-10, 5 on CIFAR-100 and Tiny-ImageNet.
    kl_reduction: see ``losses.LossOptions``.
    weight_lr: η of the two adapted weights; multiplied by ``lr_decay`` at the milestones, constant under
        ``onecycle``.
    robust_teacher: how a robust teacher is trained if none is given.

    ``awnet train --data digits --model awnet_tiny``, which also trains the teachers: clean 97.8 %, PGD-20
    70.8 %, A_w 84.2 % of the 400 test images (seed 0). Time and accuracy on CIFAR and Tiny-ImageNet: not
    measured.
    """

    name: ClassVar[str] = "mtard"
    loss: ClassVar[Loss] = staticmethod(losses.mtard)
    forward: ClassVar[Forward] = staticmethod(distillation_pass)
    teachers: ClassVar[tuple[TeacherKind, ...]] = ("clean", "robust")

    temperature: float = 1.0
    kl_reduction: Literal["batchmean", "elementmean"] = "batchmean"
    weight_lr: float = 0.025
    robust_teacher: Literal["trades", "pgd_at"] = "trades"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self)
        _check(self, "temperature", is_number, lambda v: v > 0, "a number above 0")
        _check(self, "weight_lr", is_number, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        _check_choice(self, "kl_reduction", "batchmean", "elementmean")
        _check_choice(self, "robust_teacher", "trades", "pgd_at")

    def _robust_teacher(self) -> type[Recipe]:
        return RECIPES[self.robust_teacher]

    def weight_lr_at(self, epoch: int) -> float:
        """η during ``epoch`` (the first is 0)."""
        if self.schedule == "onecycle":
            return self.weight_lr
        return self.weight_lr * self.lr_decay ** sum(epoch >= m for m in self.milestones)


@dataclass(frozen=True)
class HAT(Trades):
    """TRADES with helper images outside the ball, labeled by a clean teacher (Rade and Moosavi-Dezfooli).

    adv_weight: β, 2.5 if None.
    helper_weight: γ.

    ``awnet train --recipe hat --data cifar10 --model resnet18``, which trains the clean teacher too.
    Expected time and accuracy: not measured.
    """

    name: ClassVar[str] = "hat"
    loss: ClassVar[Loss] = staticmethod(losses.hat)
    forward: ClassVar[Forward] = staticmethod(helper_pass)
    teachers: ClassVar[tuple[TeacherKind, ...]] = ("clean",)

    epochs: int = 50
    batch_size: int = 128
    lr: float = 0.21
    router_lr: float = 0.021
    weight_decay: float = 5e-4
    schedule: Literal["step", "onecycle"] = "onecycle"
    validate_every: int = 5
    helper_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "helper_weight", is_number, lambda v: v >= 0, "a number of at least 0")

    def usual_step_size(self, threat_model: ThreatModel) -> float:
        return threat_model.train_step_size


# Short runs: one cycle of the learning rate instead of many epochs at a constant one


@dataclass(frozen=True)
class _Fast(Recipe):
    """The settings of the short recipes. A subclass names this class before its method."""

    epochs: int = 30
    lr: float = 0.2
    router_lr: float = 0.02
    weight_decay: float = 5e-4
    schedule: Literal["step", "onecycle"] = "onecycle"
    validate_every: int = 5


@dataclass(frozen=True)
class MTARDFast(_Fast, MTARD):
    """MTARD in 30 epochs by OneCycle; teachers that are not given are trained in the same way.

    ``awnet train --recipe mtard_fast --data cifar10 --model awnet_resnet18``.
    Expected time and accuracy: not measured.
    """

    name: ClassVar[str] = "mtard_fast"


@dataclass(frozen=True)
class TradesFast(_Fast, Trades):
    """TRADES in 30 epochs by OneCycle.

    ``awnet train --recipe trades_fast --data cifar10 --model resnet18``.
    Expected time and accuracy: not measured.
    """

    name: ClassVar[str] = "trades_fast"


@dataclass(frozen=True)
class PGDATFast(_Fast, PGDAT):
    """PGD-AT in 30 epochs by OneCycle.

    ``awnet train --recipe pgd_at_fast --data cifar10 --model resnet18``.
    Expected time and accuracy: not measured.
    """

    name: ClassVar[str] = "pgd_at_fast"


@dataclass(frozen=True)
class StandardFast(_Fast, Standard):
    """A clean teacher in 18 epochs of large batches by OneCycle, meant for a minute or two on an H200.

    ``awnet train --recipe standard_fast --data cifar10 --model resnet18``.
    Expected time and accuracy: not measured.
    """

    name: ClassVar[str] = "standard_fast"

    epochs: int = 18
    batch_size: int = 512
    lr: float = 0.4
    router_lr: float = 0.04
    validate_every: int = 6


_PAPERS = (MTARD, Trades, PGDAT, Standard)
RECIPES: dict[str, type[Recipe]] = {
    kind.name: kind for kind in (*_PAPERS, MTARDFast, TradesFast, PGDATFast, StandardFast, HAT)
}

# Settings per data set that differ from a recipe's defaults (the CIFAR settings of the paper's methods).
_SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 12, "batch_size": 64, "schedule": "onecycle", "validate_every": 3},
}
_PAPERS_SETTINGS: dict[str, dict[str, Any]] = {
    "tiny_imagenet": {"epochs": 50, "batch_size": 128, "milestones": (25, 40)},
}
_MTARD_SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"robust_teacher": "pgd_at"},  # a weak TRADES teacher limits its students here
    "cifar100": {"temperature": 5.0},
    "tiny_imagenet": {"temperature": 5.0},
}


def list_recipes() -> list[str]:
    """The names that :func:`recipe_for` knows."""
    return list(RECIPES)


def recipe_for(name: str, dataset_name: str, **overrides: Any) -> Recipe:
    """The recipe ``name`` with its settings for a data set, changed by ``overrides``.

    An unknown data set gets the recipe's CIFAR-10 settings. Milestones scale with the number of epochs: 75
    and 90 of 100 epochs become 7 and 9 of 10.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; there are {', '.join(RECIPES)}")
    kind = RECIPES[name]
    known = {field.name for field in fields(kind)}
    for key in overrides:
        if key not in known:
            raise ValueError(f"recipe {name!r} has no setting {key!r}; it has {', '.join(sorted(known))}")
    settings = dict(_SETTINGS.get(dataset_name, {}))
    if kind in _PAPERS or kind.network is not None:  # baseline networks are trained as the paper's
        settings |= _PAPERS_SETTINGS.get(dataset_name, {})
    if issubclass(kind, MTARD):
        settings |= _MTARD_SETTINGS.get(dataset_name, {})
    default, overrides = kind(**settings), {key: plain(value) for key, value in overrides.items()}
    if "epochs" in overrides and "milestones" not in overrides and is_integer(overrides["epochs"]):
        scale = overrides["epochs"] / default.epochs
        settings["milestones"] = tuple(sorted({math.floor(m * scale) for m in default.milestones} - {0}))
    return kind(**(settings | overrides))


# The objectives that a training attack maximizes, one value per sample

Objective = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Any]]


def _forward(model: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
    steering = Steering()
    logits = observe(model, x, steering)
    return logits, steering.routings[0]


def _cross_entropy(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    logits, routing = _forward(model, x_adv)
    return F.cross_entropy(at_least_float32(logits), y, reduction="none"), routing


def _kl_from_clean(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    with torch.no_grad():
        log_p = F.log_softmax(at_least_float32(model(x)), dim=1)
    logits, routing = _forward(model, x_adv)
    return (log_p.exp() * (log_p - F.log_softmax(at_least_float32(logits), dim=1))).sum(1), routing


def _with_type_loss(objective: Objective, weight: float) -> Callable[..., Tensor]:
    def loss(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        value, routing = objective(model, x_adv, x, y)
        if routing.type_logits is None:  # a router without a type head
            return value
        adversarial = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        return value + weight * F.cross_entropy(
            at_least_float32(routing.type_logits), adversarial, reduction="none"
        )

    return loss


def _check(
    recipe: Recipe, name: str, right_type: Callable[[Any], bool], holds: Callable[..., bool], expected: str
) -> None:
    value = getattr(recipe, name)
    if not right_type(value) or not holds(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _check_choice(recipe: Recipe, name: str, *choices: str) -> None:
    _check(recipe, name, lambda v: isinstance(v, str), lambda v: v in choices, f"one of {choices}")


def _check_share(recipe: Recipe) -> None:
    if recipe.adv_weight is not None and recipe.adv_weight > 1:
        raise ValueError(
            f"adv_weight of {recipe.name} must be None or in [0, 1] (the clean weight is 1 − adv_weight), "
            f"got {recipe.adv_weight}"
        )

"""Recipes: how to train, one frozen dataclass per method, with the paper's settings as defaults.

    recipe = recipe_for("mtard", "cifar10")                  # the settings for a data set
    recipe = recipe_for("trades", "digits", epochs=30)       # with one of them changed
    MTARD(epochs=50, lr=0.05)                                # all settings given directly

Ingredients that any method can use (weight perturbation, averages, optimizers and so on) are settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from awnet.attacks import GraphedPGD
from awnet.attacks.base import device_of
from awnet.data import Dataset, ThreatModel
from awnet.data.augmentation import OperationName, check_operations
from awnet.nn import has_router
from awnet.scalars import is_integer, is_number, plain
from awnet.training import losses, optimization
from awnet.training.checks import check, check_choice
from awnet.training.forward import Forward, Phase, clean_pass, distillation_pass, helper_pass, joint_pass
from awnet.training.losses import Loss, LossOptions
from awnet.training.optimization import OptimizerName, ScheduleName
from awnet.training.training_attacks import (
    SINGLE_STEP_KINDS,
    Objective,
    SingleStepAttack,
    TrainingAttack,
    cross_entropy,
    guided_by,
    kl_from_clean,
    with_type_loss,
)

TeacherKind = Literal["clean", "robust"]
Precision = Literal["float32", "bfloat16"]
AttackKind = Literal["pgd", "fgsm_rs", "n_fgsm", "bernoulli"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that all methods share.

    epochs, batch_size: the last batch of an epoch may be smaller.
    lr, router_lr: learning rate of the dynamic (or static) network, and of the router with its heads.
    optimizer: ``sgd`` or ``adamw``, whose first beta is ``momentum``.
    momentum, nesterov, weight_decay: of the optimizer; the decay applies to every parameter.
    schedule: ``step`` multiplies the rate by ``lr_decay`` after the epochs in ``milestones``; ``cosine`` and
        ``linear`` lower it to 0 over the run; ``onecycle`` raises it to ``lr`` and lowers it to nearly 0
        (Smith and Topin), with constant momentum.
    warmup_epochs: in which the rate rises linearly to ``lr``; not with ``onecycle``, which has its own.
    augment: operations on training images in addition to the data set's shift and flip: ``cutout``,
        ``resized_crop``, ``idbh``, in order, and ``cutmix``; see :mod:`awnet.data.augmentation`. With
        ``resized_crop`` and ``idbh``, which move the image themselves, there is no shift. With ``cutmix``
        the attack takes the label of the larger part.
    label_smoothing: share of the label that is spread over all classes, in every cross-entropy with labels
        that the loss has, in [0, 1). The training attack uses the labels themselves.
    attack_kind: ``pgd``, or an attack of one step: ``fgsm_rs`` (Wong et al., 2020: uniform noise within eps,
        a step of 1.25 eps), ``n_fgsm`` (de Jorge et al., 2022: uniform noise within 2 eps, a step of eps, no
        projection to the ball) or ``bernoulli`` (Sriramanan et al., 2020: noise ±eps/2, a step of eps).
    attack_steps, attack_step_size, attack_noise: of ``pgd``, which starts at x + attack_noise · N(0, 1), in
        the norm of the threat model; step size in that norm and in image units, from the threat model if None
        (eps/4; for TRADES 0.007 at eps = 8/255). An attack of one step is in L-infinity and has
        ``attack_steps=1`` and, if the step size is None, the one above.
    attack_radius: radius of the noise of an attack of one step, in units of eps; None for the one above.
    awp: γ of adversarial weight perturbation (Wu et al., 2020), 0 for none: the weights that the loss is
        computed with are moved by γ times their norm, layer by layer, in the direction that increases it.
        One extra forward and backward pass. See :mod:`awnet.training.weight_perturbation`.
    awp_warmup: epochs without it at the start.
    overfitting_checks: number of checks for catastrophic overfitting in each epoch, 0 for none. A check runs
        PGD on ``overfitting_images`` held-out images; if fewer than half as many are classified correctly as
        at the best check, the run goes back to the last good check and trains with ``rescue_steps`` steps of
        PGD for the length of an epoch. See :mod:`awnet.training.overfitting`.
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
    log_every: steps between log lines. The host waits for the device only there, and at checks.
    preset: the preset that the settings started from, which names the recipe; None for the method itself.
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
    optimizer: OptimizerName = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 2e-4
    schedule: ScheduleName = "step"
    warmup_epochs: float = 0.0
    milestones: tuple[int, ...] = (75, 90)
    lr_decay: float = 0.1
    augment: tuple[OperationName, ...] = ()
    label_smoothing: float = 0.0
    attack_kind: AttackKind = "pgd"
    attack_steps: int = 10
    attack_step_size: float | None = None
    attack_noise: float = 0.001
    attack_radius: float | None = None
    awp: float = 0.0
    awp_warmup: int = 0
    overfitting_checks: int = 0
    overfitting_images: int = 256
    rescue_steps: int = 3
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
    preset: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for name in ("epochs", "batch_size", "attack_steps", "accumulate", "validate_every", "log_every",
                     "overfitting_images", "rescue_steps"):  # fmt: skip
            check(self, name, is_integer, lambda v: v >= 1, "an integer of at least 1")
        for name in ("awp_warmup", "overfitting_checks"):
            check(self, name, is_integer, lambda v: v >= 0, "an integer of at least 0")
        if self.validate_limit is not None:
            check(self, "validate_limit", is_integer, lambda v: v >= 1, "None or an integer of at least 1")
        for name in ("lr", "lr_decay"):
            check(self, name, is_number, lambda v: v > 0, "a number above 0")
        for name in ("router_lr", "weight_decay", "attack_noise", "type_weight", "consistency", "awp",
                     "warmup_epochs"):  # fmt: skip
            check(self, name, is_number, lambda v: v >= 0, "a number of at least 0")
        for name in ("momentum", "label_smoothing", "type_label_smoothing", "ema_decay"):
            check(self, name, is_number, lambda v: 0 <= v < 1, "a number in [0, 1)")
        check(self, "inner_type_weight", is_number, lambda v: True, "a finite number")
        check(self, "capture", lambda v: isinstance(v, bool) or v == "auto", lambda v: True,
               "true, false or auto")  # fmt: skip
        if not (self.preset is None or isinstance(self.preset, str)):
            raise TypeError(f"preset must be the name of a preset or None, got {self.preset!r}")
        check(self, "nesterov", lambda v: isinstance(v, bool), lambda v: True, "true or false")
        if self.capture is True and self.accumulate > 1:
            raise ValueError("capture and accumulate exclude each other: leave one of them out")
        for name in ("attack_step_size", "attack_radius", "clip_norm"):
            if getattr(self, name) is not None:
                check(self, name, is_number, lambda v: v > 0, "None or a number above 0")
        if self.adv_weight is not None:
            check(self, "adv_weight", is_number, lambda v: v >= 0, "None or a number of at least 0")
        check_choice(self, "schedule", *get_args(ScheduleName))
        check_choice(self, "optimizer", *get_args(OptimizerName))
        check_choice(self, "attack_kind", *get_args(AttackKind))
        check_choice(self, "router_passes", "joint", "separate")
        check_choice(self, "precision", "auto", "float32", "bfloat16")
        check_choice(self, "attack_precision", "auto", "float32", "bfloat16")
        check_choice(self, "layout", "auto", "nchw", "channels_last")
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
        object.__setattr__(self, "augment", check_operations("augment", self.augment))
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Raises ValueError for settings that exclude each other."""
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum):
            raise ValueError("nesterov needs optimizer=sgd with a momentum above 0")
        if self.warmup_epochs and self.schedule == "onecycle":
            raise ValueError("warmup_epochs must be 0 with schedule=onecycle, which includes a warm-up")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs must be at most epochs, {self.epochs}, got {self.warmup_epochs}")
        if self.attack_kind != "pgd" and self.attack_steps != 1:
            raise ValueError(f"attack_steps must be 1 with attack_kind={self.attack_kind}, which is one step")
        if self.attack_kind == "pgd" and self.attack_radius is not None:
            raise ValueError(
                "attack_radius needs an attack of one step: set attack_kind too, or leave it out"
            )
        if (self.awp or self.overfitting_checks) and len(self.phases()) != 1:
            name = "awp" if self.awp else "overfitting_checks"
            raise ValueError(f"{name} must be 0: {self.name} makes {len(self.phases())} updates per batch")
        if self.overfitting_checks and not self.needs_attack:
            raise ValueError(f"overfitting_checks must be 0: {self.name} does not attack")
        if self.attack_kind != "pgd" and not self.needs_attack:
            raise ValueError(f"attack_kind must be pgd: {self.name} does not attack")

    @property
    def title(self) -> str:
        """The name of the preset, or of the method."""
        return self.name if self.preset is None else self.preset

    # The interface that training uses

    def loss_options(self) -> LossOptions:
        """The settings of the recipe that its loss uses."""
        names = {field.name for field in fields(self)} & {field.name for field in fields(LossOptions)}
        return LossOptions(**{name: getattr(self, name) for name in names})

    def attack(
        self, model: nn.Module, threat_model: ThreatModel, num_classes: int, seed: int
    ) -> TrainingAttack:
        """The training attack on ``model``: PGD on the cross-entropy, with noise keyed by ``seed``.

        Create it once per run and set its ``seed`` for each epoch, since it keeps CUDA graphs. Unlike the
        attacks for users it does not check values, so the host never waits for the device. If a gradient is
        not finite, the image and then the loss become NaN.
        """
        step_size = threat_model.train_step_size
        return self._attack(model, threat_model, step_size, "ce", cross_entropy, num_classes, seed)

    def _attack(
        self,
        model: nn.Module,
        threat_model: ThreatModel,
        step_size: float,
        loss: Literal["ce", "kl"] | Callable[..., Any],
        objective: Objective,
        num_classes: int,
        seed: int,
    ) -> GraphedPGD:
        """``step_size`` is that of ``pgd``; ``loss`` is ``objective`` as the argument of ``PGD``."""
        eps = threat_model.eps
        if self.attack_kind != "pgd" and threat_model.norm != "Linf":
            raise ValueError(
                f"attack_kind={self.attack_kind} attacks in Linf, not in {threat_model.norm}: use pgd"
            )
        fools_router = bool(self.inner_type_weight) and has_router(model)
        device = device_of(model)
        settings: dict[str, Any] = {
            "num_classes": num_classes,
            "dtype": None if device is None else self.attack_dtype(device),
            "capture": True,  # no objective of a recipe waits for the device
            "loss": with_type_loss(objective, self.inner_type_weight) if fools_router else loss,
            "seed": seed,
        }
        if self.attack_kind == "pgd":
            return GraphedPGD(
                model,
                eps=eps,
                norm=threat_model.norm,
                step_size=step_size if self.attack_step_size is None else self.attack_step_size,
                steps=self.attack_steps,
                random_start="normal",
                noise_std=self.attack_noise,
                **settings,
            )
        kind = SINGLE_STEP_KINDS[self.attack_kind]
        radius = eps * (kind.radius if self.attack_radius is None else self.attack_radius)
        step_size = eps * kind.step if self.attack_step_size is None else self.attack_step_size
        return GraphedPGD(
            model,
            kind=SingleStepAttack,
            eps=eps if kind.projected else min(1.0, radius + step_size),  # a ball that holds every image
            step_size=step_size,
            noise=kind.noise,
            noise_radius=min(1.0, radius),
            **settings,
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

    build_optimizer = optimization.build_optimizer
    build_scheduler = optimization.build_scheduler

    def augmented(self, data: Dataset) -> Dataset:
        """``data`` with the operations of ``augment`` in its batches for training."""
        if not self.augment:
            return data
        moves = {"resized_crop", "idbh"} & set(self.augment)
        shift = 0 if moves else data.augmentation.shift
        return replace(data, augmentation=replace(data.augmentation, shift=shift, operations=self.augment))

    def phases(self) -> tuple[Phase, ...]:
        """The updates of one step, in order."""
        return (Phase(self.forward, self.loss),)

    def calibrate(self, model: nn.Module, data: Dataset) -> None:
        """Sets what the model derives from held-out images instead of learning it, before each validation."""

    def teacher_recipe(self, kind: TeacherKind) -> Recipe:
        """The recipe of a teacher that was not given: plain or robust training of the same length."""
        teacher = Standard if kind == "clean" else self._robust_teacher()
        shared = (
            "epochs batch_size lr optimizer momentum nesterov weight_decay schedule warmup_epochs milestones "
            "lr_decay attack_step_size attack_noise precision attack_precision layout accumulate clip_norm "
            "validate_every validate_limit log_every"
        )
        attack: dict[str, Any] = {"attack_steps": self.attack_steps} if self.attack_kind == "pgd" else {}
        return teacher(**{name: getattr(self, name) for name in shared.split()}, **attack)

    def _robust_teacher(self) -> type[Recipe]:
        return Trades

    def to_dict(self) -> dict[str, Any]:
        """All settings, JSON-ready, with the name of the recipe."""
        names = [field.name for field in fields(self) if field.name != "preset"]
        values = {name: getattr(self, name) for name in names}
        return {"name": self.title} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


@dataclass(frozen=True)
class Standard(Recipe):
    """Plain training on clean images.

    ``awnet train --recipe standard --data digits --model resnet_tiny``: 99.5 % of the validation images
    (seed 0). Time and accuracy on CIFAR and Tiny-ImageNet: not measured.
    """

    name: ClassVar[str] = "standard"
    loss: ClassVar[Loss] = staticmethod(losses.standard)
    forward: ClassVar[Forward] = staticmethod(clean_pass)
    needs_attack: ClassVar[bool] = False


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

    divergence, dkl_alpha, dkl_beta, dkl_symmetric: ``dkl`` replaces the KL of the loss by the decoupled KL,
        see ``losses.decoupled_kl``; the factor, 6, multiplies it too.

    Time and accuracy: not measured.
    """

    name: ClassVar[str] = "trades"
    loss: ClassVar[Loss] = staticmethod(losses.trades)

    divergence: Literal["kl", "dkl"] = "kl"
    dkl_alpha: float = 1.0
    dkl_beta: float = 1.0
    dkl_symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "divergence", "kl", "dkl")
        for name in ("dkl_alpha", "dkl_beta"):
            check(self, name, is_number, lambda v: v >= 0, "a number of at least 0")
        check(self, "dkl_symmetric", lambda v: isinstance(v, bool), lambda v: True, "true or false")
        changed = (self.dkl_alpha, self.dkl_beta, self.dkl_symmetric) != (1.0, 1.0, False)
        if changed and self.divergence != "dkl":
            raise ValueError(
                "dkl_alpha, dkl_beta and dkl_symmetric are settings of divergence=dkl: set it too"
            )

    def attack(
        self, model: nn.Module, threat_model: ThreatModel, num_classes: int, seed: int
    ) -> TrainingAttack:
        step_size = self.usual_step_size(threat_model)
        return self._attack(model, threat_model, step_size, "kl", kl_from_clean, num_classes, seed)

    def usual_step_size(self, threat_model: ThreatModel) -> float:
        """Step size of the attack in image units if ``attack_step_size`` is None."""
        return threat_model.trades_train_step_size


@dataclass(frozen=True)
class MTARD(Recipe):
    """Distillation from a clean and a robust teacher, the paper's joint training (Equations 20–22).

    temperature: τ, 1 on CIFAR-10, 5 on CIFAR-100 and Tiny-ImageNet.
    kl_reduction: see ``losses.LossOptions``.
    weight_lr: η of the two adapted weights; multiplied by ``lr_decay`` at the milestones of ``step``,
        constant under other schedules.
    temperature_lr: r of B-MTARD (Zhao et al., 2024), which adapts the teachers' temperatures so that their
        entropies are equal, starting from ``temperature``; 0.001 there, 0 keeps them fixed. It changes with
        ``weight_lr``. The student's temperature stays.
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
    temperature_lr: float = 0.0
    robust_teacher: Literal["trades", "pgd_at"] = "trades"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share(self)
        check(self, "temperature", is_number, lambda v: v > 0, "a number above 0")
        for name in ("weight_lr", "temperature_lr"):
            check(self, name, is_number, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        if self.label_smoothing:
            raise ValueError(
                f"label_smoothing must be 0: the loss of {self.name} has no labels, only teachers"
            )
        check_choice(self, "kl_reduction", "batchmean", "elementmean")
        check_choice(self, "robust_teacher", "trades", "pgd_at")

    def _robust_teacher(self) -> type[Recipe]:
        return RECIPES[self.robust_teacher]

    def weight_lr_at(self, epoch: int) -> float:
        """η during ``epoch`` (the first is 0)."""
        return self.weight_lr * self._decay_at(epoch)

    def temperature_lr_at(self, epoch: int) -> float:
        """r during ``epoch`` (the first is 0)."""
        return self.temperature_lr * self._decay_at(epoch)

    def _decay_at(self, epoch: int) -> float:
        if self.schedule != "step":
            return 1.0
        return self.lr_decay ** sum(epoch >= m for m in self.milestones)


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
    schedule: ScheduleName = "onecycle"
    validate_every: int = 5
    helper_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "helper_weight", is_number, lambda v: v >= 0, "a number of at least 0")

    def usual_step_size(self, threat_model: ThreatModel) -> float:
        return threat_model.train_step_size


@dataclass(frozen=True)
class MART(Recipe):
    """MART (Wang et al., 2020), which weights the images that the model misclassifies; see ``losses.mart``.

    adv_weight: λ, 5 if None.

    Time and accuracy: not measured.
    """

    name: ClassVar[str] = "mart"
    loss: ClassVar[Loss] = staticmethod(losses.mart)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "cutmix" in self.augment:
            raise ValueError("augment must be without cutmix: mart needs one label per image")


@dataclass(frozen=True)
class GAT(Recipe):
    """Guided adversarial training (Sriramanan et al., 2020), with an attack of one step; see ``losses.gat``.

    The attack maximizes CE + λ ‖p_nat − p_adv‖² with the same λ; the publication sets λ to 0 in every other
    attack and raises it near the end of training.

    adv_weight: λ, 10 if None.

    Time and accuracy: not measured.
    """

    name: ClassVar[str] = "gat"
    loss: ClassVar[Loss] = staticmethod(losses.gat)

    attack_kind: AttackKind = "bernoulli"
    attack_steps: int = 1

    def attack(
        self, model: nn.Module, threat_model: ThreatModel, num_classes: int, seed: int
    ) -> TrainingAttack:
        guided = guided_by(10.0 if self.adv_weight is None else self.adv_weight)
        step_size = threat_model.train_step_size
        loss = with_type_loss(guided, 0.0)
        return self._attack(model, threat_model, step_size, loss, guided, num_classes, seed)


RECIPES: dict[str, type[Recipe]] = {
    kind.name: kind for kind in (MTARD, Trades, PGDAT, Standard, HAT, MART, GAT)
}


def _check_share(recipe: Recipe) -> None:
    if recipe.adv_weight is not None and recipe.adv_weight > 1:
        raise ValueError(
            f"adv_weight of {recipe.name} must be None or in [0, 1] (the clean weight is 1 − adv_weight), "
            f"got {recipe.adv_weight}"
        )

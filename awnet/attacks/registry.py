"""Attacks by name, with norm, eps and step sizes from a data set's threat model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor, nn

from awnet.attacks import adaptive
from awnet.attacks.adaptive import (
    AdaptivePaper,
    DeepSloth,
    ForcedStatic,
    Joint,
    JointAPGD,
    Softened,
    TwoPhase,
)
from awnet.attacks.autoattack import QUERIES, STEPS, TARGETS, AutoAttack, Name, OfficialAttack
from awnet.attacks.base import Attack, Target
from awnet.attacks.cascade import Cascade
from awnet.attacks.fmn import FMN
from awnet.attacks.momentum import MIFGSM
from awnet.attacks.pgd import CW, FGSM, PGD
from awnet.attacks.stochastic import EOT, Stochastic
from awnet.attacks.targeted import MALT, TargetedAPGD
from awnet.attacks.transfer import TransferAttack
from awnet.data.threat_model import ThreatModel
from awnet.nn import has_router

BudgetName = Literal["smoke", "short", "standard"]

TRANSFERRED = ("pgd_sat", "cw")
"""Attacks on a surrogate whose images the union replays."""

TRANSFER = "transfer-"
"""Before the name of an attack: its images are made on the surrogates and replayed on the model."""

TARGETED = ("fgsm", "pgd_sat", "pgd_trades", "cw", "apgd_ce", "apgd_t")
TARGET_MODES = ("random", "least_likely")
"""Attacks with targeted forms, and the suffixes that choose the target; a class's number is another."""


@dataclass(frozen=True)
class Budget:
    """The budget of the suite's attacks."""

    steps: int = STEPS
    """Steps of each search of the adaptive attacks, of APGD and of FAB."""
    restarts: int = 10
    """Restarts of APGD on the joint loss."""
    targets: int = TARGETS
    """Target classes of the targeted attacks."""
    queries: int = QUERIES
    """Queries of Square."""
    fmn_steps: int = 1000
    """Steps of FMN."""
    eot: int = EOT
    """Forward passes per gradient of a stochastic model."""
    lambdas: tuple[float, ...] = adaptive.LAMBDAS


BUDGETS: dict[str, Budget] = {
    "smoke": Budget(
        steps=20, restarts=2, targets=3, queries=200, fmn_steps=30, eot=2, lambdas=(0.0, 1.0, -1.0)
    ),
    "short": Budget(
        steps=30, restarts=1, targets=3, queries=300, fmn_steps=200, eot=5, lambdas=(0.0, 1.0, -1.0)
    ),
    "standard": Budget(),
}


@dataclass(frozen=True)
class Suite:
    """Settings of the attacks beyond the paper's four, besides the model and its threat model."""

    classes: int = 10
    """K: the targeted DLR loss needs 4, and there are at most K - 1 targets."""
    budget: BudgetName = "standard"
    """``"smoke"`` only shows that the attacks run. ``"short"`` is for small networks on a CPU; the standard
    budget may break images that it leaves robust."""
    queries: int | None = None
    """Queries of Square; None takes the budget's."""
    teacher: nn.Module | None = None
    """The robust teacher, for ``adaptive_paper``."""
    surrogates: Mapping[str, nn.Module] = field(default_factory=dict)
    """Models by name whose adversarial images the union replays."""
    reference: Tensor | None = None
    """Images ``[N, C, H, W]`` over which the ``forced`` attack averages ω; None leaves that variant out."""

    @property
    def sizes(self) -> Budget:
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {self.budget!r}")
        return BUDGETS[self.budget]


_Make = Callable[[nn.Module, ThreatModel, int, Suite], Attack]


def _official(name: Name) -> _Make:
    return lambda model, threat, seed, suite: OfficialAttack(
        model, name, eps=threat.eps, norm=threat.norm, seed=seed, **_official_sizes(suite)
    )


def _official_sizes(suite: Suite) -> dict[str, Any]:
    sizes = suite.sizes
    queries = sizes.queries if suite.queries is None else suite.queries
    return {"steps": sizes.steps, "targets": min(sizes.targets, suite.classes - 1), "queries": queries}


def _adaptive(attack: Callable[..., Attack], *names: str) -> _Make:
    """An attack of :mod:`awnet.attacks.adaptive`; ``names`` are the fields of the budget that it takes."""
    return lambda model, threat, seed, suite: attack(
        model,
        eps=threat.eps,
        norm=threat.norm,
        seed=seed,
        **{name: getattr(suite.sizes, name) for name in names},
    )


def _forced(model: nn.Module, threat: ThreatModel, seed: int, suite: Suite) -> Attack:
    means = None if suite.reference is None else adaptive.mean_scales(model, suite.reference)
    return ForcedStatic(
        model, eps=threat.eps, norm=threat.norm, mean_scales=means, steps=suite.sizes.steps, seed=seed
    )


def _adaptive_paper(model: nn.Module, threat: ThreatModel, seed: int, suite: Suite) -> Attack:
    if suite.teacher is None:
        raise ValueError(
            "adaptive_paper needs the robust teacher that the model was trained with: evaluate a run that "
            "has teachers (RUN/teachers/robust), or give --teachers (teacher=)"
        )
    return AdaptivePaper(
        model,
        eps=threat.eps,
        norm=threat.norm,
        step_size=threat.pgd_trades_step_size,
        teacher=suite.teacher,
        seed=seed,
    )


def _deepsloth(model: nn.Module, threat: ThreatModel, seed: int, suite: Suite) -> Attack:
    # its authors' 8/256 in steps of 0.002, for eps = 8/255; the same fractions of eps in L2 and L1, for which
    # they give none
    scale = threat.eps / (8 / 255)
    return DeepSloth(model, eps=scale * 0.03125, norm=threat.norm, step_size=scale * 0.002, seed=seed)


def _momentum(**options: Any) -> _Make:
    """MI-FGSM with further options."""
    return lambda model, threat, seed, suite: MIFGSM(
        model, eps=threat.eps, norm=threat.norm, seed=seed, **options
    )


def _transferred(name: str) -> _Make:
    """The attack ``name``, made on each surrogate and replayed on the model."""

    def make(model: nn.Module, threat: ThreatModel, seed: int, suite: Suite) -> Attack:
        if not suite.surrogates:
            raise ValueError(
                f"{TRANSFER}{name} needs models to make its images on: give --surrogates (surrogates=)"
            )
        members = {
            surrogate: TransferAttack(model, _maker(name)(other, threat, seed, suite))
            for surrogate, other in suite.surrogates.items()
        }
        return Cascade(model, members, eps=threat.eps, norm=threat.norm, seed=seed)

    return make


def _union(model: nn.Module, threat: ThreatModel, seed: int, suite: Suite) -> Attack:
    names = ["aa", "cw", "joint"]
    if adaptive.has_type_head(model):
        names.append("two_phase")
    if has_router(model):
        names += ["forced", "softened"]
    names += ["apgd_joint_ce", "apgd_joint_dlr", "apgd_joint_t"]
    if suite.teacher is not None:
        names.append("adaptive_paper")
    if suite.classes - 1 > TARGETS:  # else AutoAttack and apgd_joint_t target the same classes
        names.append("malt")
    names.append("deepsloth")
    members = {name: _ATTACKS[name](model, threat, seed, suite) for name in names}
    for surrogate, other in suite.surrogates.items():
        for attack in TRANSFERRED:
            source = _ATTACKS[attack](other, threat, seed, suite)
            members[f"transfer_{surrogate}_{attack}"] = TransferAttack(model, source)
    return Cascade(model, members, eps=threat.eps, norm=threat.norm, seed=seed)


_ATTACKS: dict[str, _Make] = {
    "fgsm": lambda model, threat, seed, suite: FGSM(model, eps=threat.eps, norm=threat.norm, seed=seed),
    "pgd_sat": lambda model, threat, seed, suite: PGD(
        model, eps=threat.eps, norm=threat.norm, step_size=threat.pgd_sat_step_size, steps=20, seed=seed
    ),
    "pgd_trades": lambda model, threat, seed, suite: PGD(
        model, eps=threat.eps, norm=threat.norm, step_size=threat.pgd_trades_step_size, steps=20, seed=seed
    ),
    "cw": lambda model, threat, seed, suite: CW(
        model, eps=threat.eps, norm=threat.norm, step_size=threat.cw_step_size, seed=seed
    ),
    "aa": lambda model, threat, seed, suite: AutoAttack(
        model, eps=threat.eps, norm=threat.norm, classes=suite.classes, seed=seed, **_official_sizes(suite)
    ),
    "aa_rand": lambda model, threat, seed, suite: AutoAttack(
        model if isinstance(model, Stochastic) else Stochastic(model, eot=suite.sizes.eot, seed=seed),
        eps=threat.eps,
        norm=threat.norm,
        classes=suite.classes,
        seed=seed,
        **_official_sizes(suite),
    ),
    "apgd_ce": _official("apgd_ce"),
    "apgd_t": _official("apgd_t"),
    "fab_t": _official("fab_t"),
    "fmn": lambda model, threat, seed, suite: FMN(
        model, eps=threat.eps, norm=threat.norm, steps=suite.sizes.fmn_steps, seed=seed
    ),
    "malt": lambda model, threat, seed, suite: MALT(
        model,
        eps=threat.eps,
        norm=threat.norm,
        targets=suite.sizes.targets,
        steps=suite.sizes.steps,
        seed=seed,
    ),
    "square": _official("square"),
    "mi_fgsm": _momentum(),
    "mi_di_ti": _momentum(diversity=0.5, kernel=None),
    "si_ni_di_ti": _momentum(diversity=0.5, kernel=None, scales=5, nesterov=True),
    "joint": _adaptive(Joint, "steps", "lambdas"),
    "two_phase": _adaptive(TwoPhase, "steps"),
    "forced": _forced,
    "softened": _adaptive(Softened, "steps"),
    "apgd_joint_ce": _adaptive(lambda *a, **k: JointAPGD(*a, loss="ce", **k), "steps", "restarts", "lambdas"),
    "apgd_joint_dlr": _adaptive(
        lambda *a, **k: JointAPGD(*a, loss="dlr", **k), "steps", "restarts", "lambdas"
    ),
    "apgd_joint_t": _adaptive(
        lambda *a, **k: JointAPGD(*a, loss="dlr_targeted", **k), "steps", "restarts", "lambdas"
    ),
    "adaptive_paper": _adaptive_paper,
    "deepsloth": _deepsloth,
    "union": _union,
}


def _targeted(name: str, mode: str) -> _Make | None:
    """The targeted form of an attack; ``mode`` is ``random``, ``least_likely`` or the number of a class."""
    if name not in TARGETED or not (mode in TARGET_MODES or mode.isdecimal()):
        return None
    target = cast("Target", int(mode) if mode.isdecimal() else mode)

    def make(model: nn.Module, threat: ThreatModel, seed: int, suite: Suite) -> Attack:
        shared: dict[str, Any] = {"eps": threat.eps, "norm": threat.norm, "seed": seed, "target": target}
        if isinstance(target, int) and target >= suite.classes:
            raise ValueError(f"{name}-{mode}: the model has {suite.classes} classes, numbered from 0")
        if name == "fgsm":
            return FGSM(model, **shared)
        if name == "cw":
            return CW(model, step_size=threat.cw_step_size, **shared)
        if name in ("apgd_ce", "apgd_t"):
            loss: Literal["ce", "dlr"] = "ce" if name == "apgd_ce" else "dlr"
            return TargetedAPGD(model, loss=loss, steps=suite.sizes.steps, **shared)
        size = threat.pgd_sat_step_size if name == "pgd_sat" else threat.pgd_trades_step_size
        return PGD(model, step_size=size, steps=20, **shared)

    return make


def _maker(name: object) -> _Make:
    """The function that makes the attack ``name``; ValueError if there is none."""
    if isinstance(name, str):
        if name.startswith(TRANSFER) and not name.startswith(TRANSFER * 2):
            _maker(name.removeprefix(TRANSFER))
            return _transferred(name.removeprefix(TRANSFER))
        base, _, mode = name.partition("-")
        found = _ATTACKS.get(name) or _targeted(base, mode)
        if found is not None:
            return found
    raise ValueError(
        f"unknown attack {name!r}: choose from {', '.join(_ATTACKS)}; or a targeted form, such as "
        f"pgd_sat-least_likely, of {', '.join(TARGETED)} with {', '.join(TARGET_MODES)} or a class's number; "
        f"or {TRANSFER}ATTACK, which replays an attack's images from --surrogates"
    )


def check_attack_name(name: object) -> None:
    """Raises ValueError unless :func:`named_attack` knows ``name``."""
    _maker(name)


def list_attacks() -> tuple[str, ...]:
    """The names that :func:`named_attack` knows, without targeted forms and ``transfer-``."""
    return tuple(_ATTACKS)


def named_attack(
    name: str, model: nn.Module, threat_model: ThreatModel, seed: int = 0, suite: Suite | None = None
) -> Attack:
    """An attack on ``model``; at eps = 8/255 the step sizes are the paper's.

    Args:
        name: the paper's: ``"fgsm"``: one step of eps. ``"pgd_sat"``: 20 steps of eps/4. ``"pgd_trades"``: 20
            steps of 0.003, scaled with eps. ``"cw"``: 30 steps of eps/4 on the margin, kappa = 50. Those with
            more than one step start uniformly in the ball. ``"aa"``: AutoAttack; ``"apgd_ce"``, ``"apgd_t"``,
            ``"fab_t"``, ``"square"``: its parts. ``"adaptive_paper"``, ``"deepsloth"``: as in the paper.
            Further: ``"aa_rand"`` for stochastic models, ``"malt"``, ``"fmn"``, ``"joint"``, ``"two_phase"``,
            ``"forced"``, ``"softened"``, ``"apgd_joint_ce"``, ``…_dlr``, ``…_t``
            (:mod:`awnet.attacks.adaptive`), and ``"union"``: AutoAttack, CW, the adaptive attacks that apply
            to the model, and the surrogates' images. Targeted forms: ``"fgsm"``, ``"pgd_sat"``,
            ``"pgd_trades"``, ``"cw"``, ``"apgd_ce"`` and ``"apgd_t"`` with ``-random``, ``-least_likely`` or
            ``-k`` for class k: ``"cw-random"``. Transfer: ``"transfer-mi_di_ti"`` and the like replay the
            images that an attack makes on each of ``suite.surrogates``. ``"mi_fgsm"``, ``"mi_di_ti"`` and
            ``"si_ni_di_ti"`` are made for that.
        threat_model: norm, eps and step sizes, a property of the data set. The step sizes are the same
            fractions of eps in every norm.
        seed: seed of the random starts.
        suite: settings of the attacks beyond the first four; None for ten classes at the standard budget.

    Raises:
        ValueError: there is no such attack, or ``model`` or ``suite`` does not have what it needs.
    """
    return _maker(name)(model, threat_model, seed, Suite() if suite is None else suite)

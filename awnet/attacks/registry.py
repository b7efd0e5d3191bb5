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
"""The prefix of an attack whose images are made on the surrogates and replayed on the model."""

TARGET_MODES = ("random", "least_likely")
"""How a targeted form, named ATTACK-MODE, chooses the target; MODE may also be the number of a class."""


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
_Options = Callable[[ThreatModel, Suite], dict[str, Any]]


def _make(kind: Callable[..., Attack], options: _Options = lambda threat, suite: {}) -> _Make:
    """Makes a ``kind`` with the norm and eps of the threat model, unless ``options`` has others."""

    def make(model: nn.Module, threat: ThreatModel, seed: int, suite: Suite) -> Attack:
        shared = {"eps": threat.eps, "norm": threat.norm, "seed": seed}
        return kind(model, **(shared | options(threat, suite)))

    return make


def _sizes(*names: str, **options: Any) -> _Options:
    """Fields of the budget, and further ``options``."""
    return lambda threat, suite: {name: getattr(suite.sizes, name) for name in names} | options


def _official_sizes(threat: ThreatModel, suite: Suite) -> dict[str, Any]:
    sizes = suite.sizes
    queries = sizes.queries if suite.queries is None else suite.queries
    return {"steps": sizes.steps, "targets": min(sizes.targets, suite.classes - 1), "queries": queries}


def _official(name: Name) -> _Make:
    return _make(OfficialAttack, lambda threat, suite: {"name": name, **_official_sizes(threat, suite)})


def _aa_rand(model: nn.Module, threat: ThreatModel, seed: int, suite: Suite) -> Attack:
    if not isinstance(model, Stochastic):
        model = Stochastic(model, eot=suite.sizes.eot, seed=seed)
    return ATTACKS["aa"](model, threat, seed, suite)


def _forced(model: nn.Module, threat: ThreatModel, seed: int, suite: Suite) -> Attack:
    means = None if suite.reference is None else adaptive.mean_scales(model, suite.reference)
    return _make(ForcedStatic, _sizes("steps", mean_scales=means))(model, threat, seed, suite)


def _adaptive_paper(threat: ThreatModel, suite: Suite) -> dict[str, Any]:
    if suite.teacher is None:
        raise ValueError(
            "adaptive_paper needs the robust teacher that the model was trained with: evaluate a run that "
            "has teachers (RUN/teachers/robust), or give --teachers (teacher=)"
        )
    return {"step_size": threat.pgd_trades_step_size, "teacher": suite.teacher}


def _deepsloth(threat: ThreatModel, suite: Suite) -> dict[str, Any]:
    # its authors' 8/256 in steps of 0.002, for eps = 8/255; the same fractions of eps in L2 and L1, for which
    # they give none
    scale = threat.eps / (8 / 255)
    return {"eps": scale * 0.03125, "step_size": scale * 0.002}


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
    members = {name: ATTACKS[name](model, threat, seed, suite) for name in names}
    for surrogate, other in suite.surrogates.items():
        for attack in TRANSFERRED:
            source = ATTACKS[attack](other, threat, seed, suite)
            members[f"transfer_{surrogate}_{attack}"] = TransferAttack(model, source)
    return Cascade(model, members, eps=threat.eps, norm=threat.norm, seed=seed)


# the attacks with targeted forms: class and options of the targeted form, which are those of the plain one
# except for APGD
_TARGETED: dict[str, tuple[Callable[..., Attack], _Options]] = {
    "fgsm": (FGSM, lambda threat, suite: {}),
    "pgd_sat": (PGD, lambda threat, suite: {"step_size": threat.pgd_sat_step_size, "steps": 20}),
    "pgd_trades": (PGD, lambda threat, suite: {"step_size": threat.pgd_trades_step_size, "steps": 20}),
    "cw": (CW, lambda threat, suite: {"step_size": threat.cw_step_size}),
    "apgd_ce": (TargetedAPGD, _sizes("steps", loss="ce")),
    "apgd_t": (TargetedAPGD, _sizes("steps", loss="dlr")),
}
TARGETED = tuple(_TARGETED)
ATTACKS: dict[str, _Make] = {
    **{name: _make(*_TARGETED[name]) for name in ("fgsm", "pgd_sat", "pgd_trades", "cw")},
    "aa": _make(AutoAttack, lambda t, suite: {"classes": suite.classes, **_official_sizes(t, suite)}),
    "aa_rand": _aa_rand,
    "apgd_ce": _official("apgd_ce"),
    "apgd_t": _official("apgd_t"),
    "fab_t": _official("fab_t"),
    "fmn": _make(FMN, lambda threat, suite: {"steps": suite.sizes.fmn_steps}),
    "malt": _make(MALT, _sizes("targets", "steps")),
    "square": _official("square"),
    "mi_fgsm": _make(MIFGSM),
    "mi_di_ti": _make(MIFGSM, _sizes(diversity=0.5, kernel=None)),
    "si_ni_di_ti": _make(MIFGSM, _sizes(diversity=0.5, kernel=None, scales=5, nesterov=True)),
    "joint": _make(Joint, _sizes("steps", "lambdas")),
    "two_phase": _make(TwoPhase, _sizes("steps")),
    "forced": _forced,
    "softened": _make(Softened, _sizes("steps")),
    "apgd_joint_ce": _make(JointAPGD, _sizes("steps", "restarts", "lambdas", loss="ce")),
    "apgd_joint_dlr": _make(JointAPGD, _sizes("steps", "restarts", "lambdas", loss="dlr")),
    "apgd_joint_t": _make(JointAPGD, _sizes("steps", "restarts", "lambdas", loss="dlr_targeted")),
    "adaptive_paper": _make(AdaptivePaper, _adaptive_paper),
    "deepsloth": _make(DeepSloth, _deepsloth),
    "union": _union,
}


def _targeted(name: str, mode: str) -> _Make | None:
    """The targeted form of an attack; ``mode`` is ``random``, ``least_likely`` or the number of a class."""
    if name not in TARGETED or not (mode in TARGET_MODES or mode.isdecimal()):
        return None
    target = cast("Target", int(mode) if mode.isdecimal() else mode)
    kind, options = _TARGETED[name]

    def with_target(threat: ThreatModel, suite: Suite) -> dict[str, Any]:
        if isinstance(target, int) and target >= suite.classes:
            raise ValueError(f"{name}-{mode}: the model has {suite.classes} classes, numbered from 0")
        return options(threat, suite) | {"target": target}

    return _make(kind, with_target)


def _maker(name: object) -> _Make:
    """The function that makes the attack ``name``; ValueError if there is none."""
    if isinstance(name, str):
        if name.startswith(TRANSFER) and not name.startswith(TRANSFER * 2):
            _maker(name.removeprefix(TRANSFER))
            return _transferred(name.removeprefix(TRANSFER))
        base, _, mode = name.partition("-")
        make = ATTACKS.get(name) or _targeted(base, mode)
        if make is not None:
            return make
    raise ValueError(
        f"unknown attack {name!r}: choose from {', '.join(ATTACKS)}; or a targeted form, such as "
        f"pgd_sat-least_likely, of {', '.join(TARGETED)} with {', '.join(TARGET_MODES)} or a class's number; "
        f"or {TRANSFER}ATTACK, which replays an attack's images from --surrogates"
    )


def check_attack_name(name: object) -> None:
    """Raises ValueError unless :func:`named_attack` knows ``name``."""
    _maker(name)


def list_attacks() -> tuple[str, ...]:
    """The names that :func:`named_attack` knows, without targeted forms and ``transfer-``."""
    return tuple(ATTACKS)


def named_attack(
    name: str, model: nn.Module, threat_model: ThreatModel, seed: int = 0, suite: Suite | None = None
) -> Attack:
    """An attack on ``model``; at eps = 8/255 the step sizes are the paper's.

    Args:
        name: one of

            - the paper's: ``"fgsm"``, one step of eps; ``"pgd_sat"``, 20 steps of eps/4; ``"pgd_trades"``, 20
              steps of 0.003, scaled with eps; ``"cw"``, 30 steps of eps/4 on the margin with kappa = 50 (all
              but FGSM start uniformly in the ball); ``"aa"``, AutoAttack; ``"adaptive_paper"``,
              ``"deepsloth"``;
            - AutoAttack's parts: ``"apgd_ce"``, ``"apgd_t"``, ``"fab_t"``, ``"square"``; and ``"aa_rand"``
              for stochastic models;
            - ``"malt"``, ``"fmn"``; for transfer ``"mi_fgsm"``, ``"mi_di_ti"``, ``"si_ni_di_ti"``;
            - adaptive attacks (:mod:`awnet.attacks.adaptive`): ``"joint"``, ``"two_phase"``, ``"forced"``,
              ``"softened"``, ``"apgd_joint_ce"``, ``…_dlr``, ``…_t``;
            - ``"union"``: AutoAttack, CW, the adaptive attacks that apply to the model, and images made on
              ``suite.surrogates``;
            - a targeted form such as ``"cw-random"``: ``fgsm``, ``pgd_sat``, ``pgd_trades``, ``cw``,
              ``apgd_ce`` or ``apgd_t`` with ``-random``, ``-least_likely`` or ``-k`` for class k;
            - ``"transfer-ATTACK"``: replays the images that an attack makes on each of ``suite.surrogates``.
        threat_model: norm, eps and step sizes, a property of the data set. The step sizes are the same
            fractions of eps in every norm.
        seed: seed of the random starts.
        suite: settings of the attacks beyond the first four; None for ten classes at the standard budget.

    Raises:
        ValueError: there is no such attack, or ``model`` or ``suite`` does not have what it needs.
    """
    return _maker(name)(model, threat_model, seed, Suite() if suite is None else suite)

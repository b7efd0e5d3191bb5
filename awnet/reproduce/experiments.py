"""The paper's tables and figures as data, and the budgets of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from awnet.attacks.registry import BudgetName

WHITE_BOX = ("fgsm", "pgd_sat", "pgd_trades", "cw", "aa")


@dataclass(frozen=True)
class System:
    """One row: the paper's name, the model and its recipe."""

    label: str
    model: str
    recipe: str = "mtard"
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the model, see ``create_model``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the recipe, in addition to the budget's."""
    eps_scale: float = 1.0
    """Multiplies ε in training."""
    baseline: str | None = None
    """In an ablation: label of the system that it is compared with; None for the first."""
    extra_fraction: float = 0.0
    """Share of each training batch that is pseudo-labeled, see ``Runs.pseudo_labeled``."""


@dataclass(frozen=True)
class Experiment:
    """A table or figure.

    kind: ``accuracy`` (white-box attacks), ``transfer`` (made on a surrogate), ``detection`` (AUC),
    ``filters`` (distributions of filter means), ``weight_gap`` (Section 3.2), ``ablation`` (several trainings
    of each system, compared with its baseline).
    table: the paper's rows for comparison, see ``awnet.evaluation.paper``; None if the paper prints none.
    """

    title: str
    kind: Literal["accuracy", "transfer", "detection", "filters", "weight_gap", "ablation"]
    datasets: tuple[str, ...]
    systems: tuple[System, ...]
    attacks: tuple[str, ...] = ()
    table: str | None = None
    notes: tuple[str, ...] = ()
    equal_cost: bool = False
    """The budget's epochs apply to the first system; the others train for about as many multiply-adds."""
    seeds: tuple[int, ...] = ()
    """Of an ablation: the seeds of the trainings, unless others are given."""
    teachers: Mapping[str, System] | None = None
    """The clean and the robust teacher; None for those of the data set."""
    changes: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Fields of a budget that are different here, by the name of the budget."""


AWNET = System("AW-Net", "awnet_resnet18")
AWNET_L = System("AW-Net-L", "awnet_resnet34")
_CNNS = (
    System("ResNet-34", "resnet34"),
    System("ResNet-50", "resnet50"),
    System("WideResNet-34-8", "wrn34_8"),
    System("VGG-16-BN", "vgg16_bn"),
    System("RepVGG-A2", "repvgg_a2"),
    AWNET,
)
_PLAIN_AND_ROBUST = ("standard", "mtard")

_CYCLE: dict[str, Any] = {"schedule": "onecycle", "weight_decay": 5e-4}
_ONE_STEP: dict[str, Any] = {"attack_steps": 1, "attack_step_size": None}
_SMALL_TEACHERS = {
    "clean": System("clean teacher", "resnet_tiny", "standard", settings=_CYCLE),
    "robust": System("robust teacher", "resnet_tiny", "pgd_at", settings=_CYCLE),
}
_SMALL_BUDGET: dict[str, dict[str, Any]] = {
    "smoke": {"shrink": 2},
    "cpu": {
        "about": "10,000 training images of half the size, one to two hours on two CPU cores with AMX",
        "width": 1.0,
        "epochs": 6,
        "shrink": 2,
        "settings": {
            "batch_size": 64,
            "attack_steps": 3,
            "attack_step_size": 4 / 255,
            "precision": "bfloat16",
            "validate_every": 100,
        },
        "train_limit": 10000,
        "test_limit": 500,
        "attack_budget": "short",
    },
}
_EQUAL_COST_NOTES = (
    "Every system trains for about as many multiply-adds as the first, in whole epochs; the teachers' "
    "forward passes count, their training does not.",
    "The union is the worst case, image by image, over AutoAttack, CW and the adaptive attacks that apply.",
    "An interval that excludes 0 is expected by chance in one of twenty rows.",
)


def _recipe(
    label: str,
    method: str = "pgd_at",
    baseline: str | None = None,
    *,
    activation: str | None = None,
    extra_fraction: float = 0.0,
    **settings: Any,
) -> System:
    """The small static network by a recipe, for the ablation of ingredients."""
    options = {} if activation is None else {"activation": activation}
    settings = _CYCLE | settings
    return System(label, "resnet_tiny", method, options, settings, 1.0, baseline, extra_fraction)


def _under_preset(preset: str) -> tuple[System, ...]:
    """AW-Net and its twins by one preset."""
    settings = _ONE_STEP if preset == "single_step" else {}
    networks = {
        "AW-Net": "awnet_tiny",
        "equal-width twin": "resnet_tiny",
        "equal-size twin": "resnet_tiny_wide",
    }
    return tuple(
        System(f"{label}, {preset}", model, preset, settings=settings, baseline=f"AW-Net, {preset}")
        for label, model in networks.items()
    )


EXPERIMENTS: dict[str, Experiment] = {
    "table1": Experiment(
        "White-box robustness on CIFAR-10", "accuracy", ("cifar10",), _CNNS, WHITE_BOX, table="1"
    ),
    "table2": Experiment(
        "White-box robustness on CIFAR-100", "accuracy", ("cifar100",), _CNNS, WHITE_BOX, table="2"
    ),
    "table3": Experiment(
        "Ablation of the components",
        "accuracy",
        ("cifar10",),
        (
            System("AW-Net, dynamic weight", "awnet_resnet18", options={"bn": "one", "type_head": False}),
            System(
                "AW-Net, dynamic weight and MixBN",
                "awnet_resnet18",
                options={"type_head": False, "test_bn": "adv"},
            ),
            AWNET,
            System("ResNet-18", "resnet18"),
        ),
        ("pgd_trades", "cw"),
        table="3",
    ),
    "table3-digits": Experiment(
        "Ablation of the components on digits",
        "accuracy",
        ("digits",),
        (
            System("AW-Net", "awnet_tiny"),
            System("without filter scaling", "awnet_tiny", options={"filter_scaling": False}),
            System("without type head", "awnet_tiny", options={"type_head": False, "test_bn": "adv"}),
            System("without MixBN and type head", "awnet_tiny", options={"bn": "one", "type_head": False}),
            System("without router (static twin)", "resnet_tiny"),
            System("static, as many parameters", "resnet_tiny_wide"),
            System("AW-Net, half width", "awnet_tiny", options={"width": 0.5}),
            System("static twin, half width", "resnet_tiny", options={"width": 0.5}),
        ),
        ("fgsm", "pgd_sat", "cw"),
        notes=(
            "The paper's Table III is on CIFAR-10 with ResNet-18; these are the same components on the tiny "
            "network, and two more rows for the width.",
        ),
        changes={
            "cpu": {
                "about": "all images and the recipe's own settings, about ten minutes on one CPU core",
                "width": 1.0,
                "epochs": None,
                "settings": {},
                "validation_limit": None,
                "test_limit": None,
            }
        },
    ),
    "table4": Experiment(
        "AW-Net against separate networks behind a detector",
        "accuracy",
        ("cifar10",),
        (
            System("Separate-Net", "separate_net", "separate"),
            System("Separate-Net-L", "separate_net_l", "separate"),
            AWNET,
            AWNET_L,
        ),
        ("pgd_trades", "cw"),
        table="4",
    ),
    "table5": Experiment(
        "Detectors: area under the ROC curve",
        "detection",
        ("cifar10",),
        (AWNET,),
        ("fgsm", "pgd_trades", "cw"),
        table="5",
        notes=(
            "All detectors score the same images, made on AW-Net; NNIF and LNG look at AW-Net's own layers. "
            "They learn from the validation images, half clean, half attacked by the attack of the column.",
        ),
    ),
    "table6": Experiment(
        "Black-box robustness on CIFAR-10",
        "transfer",
        ("cifar10",),
        _CNNS,
        ("pgd_sat", "cw"),
        table="6",
        notes=(
            "The surrogate is a WideResNet-70-16 trained by TRADES; the paper does not say how its own was.",
        ),
    ),
    "table7": Experiment(
        "Black-box robustness on CIFAR-100", "transfer", ("cifar100",), _CNNS, ("pgd_sat", "cw"), table="7"
    ),
    "table8": Experiment(
        "Transformers and other dynamic networks",
        "accuracy",
        ("cifar10",),
        (
            System("Swin-Tiny", "swin_t", "pgd_at", settings={"clip_norm": 1.0}),
            System("Swin-Small", "swin_s", "pgd_at", settings={"clip_norm": 1.0}),
            System("RDI-ResNet-38", "rdi_resnet38", "rdi"),
            System("ADVMOE", "advmoe_resnet18", "advmoe"),
            AWNET,
        ),
        ("pgd_sat", "aa"),
        table="8",
    ),
    "table9": Experiment(
        "Against helper-based adversarial training",
        "accuracy",
        ("cifar10",),
        (
            System("ResNet-18 + HAT", "resnet18", "hat"),
            System("WRN-34-10 + HAT", "wrn34_10", "hat"),
            AWNET,
            AWNET_L,
        ),
        ("pgd_sat", "aa"),
        table="9",
    ),
    "table10": Experiment(
        "The paper's adaptive attack",
        "accuracy",
        ("cifar10", "cifar100"),
        (AWNET,),
        ("pgd_trades", "adaptive_paper"),
        table="10",
    ),
    "table11": Experiment(
        "White-box robustness on Tiny-ImageNet",
        "accuracy",
        ("tiny_imagenet",),
        (System("ResNet-34", "resnet34"), System("ResNet-50", "resnet50"), AWNET),
        WHITE_BOX,
        table="11",
    ),
    "fig1": Experiment(
        "Means of the filters' weights, ResNet-18",
        "filters",
        ("cifar10",),
        tuple(System(f"ResNet-18 by {recipe}", "resnet18", recipe) for recipe in _PLAIN_AND_ROBUST),
    ),
    "fig3": Experiment(
        "Means of the filters' weights, three networks",
        "filters",
        ("cifar10",),
        tuple(
            System(f"{label} by {recipe}", model, recipe)
            for label, model in (
                ("MobileNet-v2", "mobilenet_v2"),
                ("ResNet-50", "resnet50"),
                ("WideResNet-34-8", "wrn34_8"),
            )
            for recipe in _PLAIN_AND_ROBUST
        ),
    ),
    "fig4": Experiment(
        "β of the filter scales",
        "accuracy",
        ("cifar10",),
        tuple(
            System(f"AW-Net, β = {beta:g}", "awnet_resnet18", options={"beta": float(beta)})
            for beta in (1, 2, 3, 4, 5)
        ),
        ("aa",),
        notes=("The figure prints no numbers to compare with.",),
    ),
    "fig5": Experiment(
        "Training methods",
        "accuracy",
        ("cifar10",),
        tuple(
            System(f"AW-Net by {label}", "awnet_resnet18", recipe)
            for label, recipe in (("PGD-AT", "pgd_at"), ("TRADES", "trades"), ("MTARD", "mtard"))
        ),
        ("aa",),
        notes=("The text says that MTARD's A_w under AutoAttack is 2.29 points above the others.",),
    ),
    "systems": Experiment(
        "Small dynamic networks at equal training cost",
        "accuracy",
        ("cifar10",),
        (
            System("AW-Net", "awnet_tiny", "pgd_at"),
            System("Static twin", "resnet_tiny", "pgd_at"),
            System("RDI-ResNet-38", "rdi_resnet38", "rdi", {"width": 0.5}),
            System("ADVMOE", "advmoe_resnet18", "advmoe", {"width": 0.125}),
            System("Separate-Net", "separate_net", "separate", {"width": 0.1875}),
        ),
        ("pgd_sat", "union"),
        notes=(
            "AW-Net and its static twin (the same layers without a router) train by PGD-AT, not by MTARD, "
            "whose teachers would have to be paid too; the others by their own recipes.",
            "The union is the worst case, image by image, over AutoAttack, CW and the adaptive attacks that "
            "apply to the network; for Separate-Net also images made on its soft gate and on each member "
            "alone.",
        ),
        equal_cost=True,
        changes={
            "cpu": {
                "about": "images of half the size, about half an hour on one CPU core",
                "width": 1.0,
                "epochs": 3,
                "shrink": 2,
                "settings": {
                    "batch_size": 64,
                    "attack_steps": 2,
                    "attack_step_size": 5 / 255,
                    "schedule": "onecycle",
                    "layout": "channels_last",
                    "validate_every": 100,
                },
                "test_limit": 500,
                "attack_budget": "short",
            }
        },
    ),
    "gated": Experiment(
        "Gated defenses re-evaluated: their papers' attacks against the union",
        "accuracy",
        ("digits",),
        (
            System("AW-Net", "awnet_tiny"),
            System("Static twin", "resnet_tiny"),
            System("Static, as many parameters", "resnet_tiny_wide"),
            System("ADVMOE", "advmoe_resnet18", "advmoe", {"width": 0.125}),
            System("RDI-ResNet-38", "rdi_resnet38", "rdi", {"width": 0.5}),
            System("Separate-Net", "separate_net", "separate", {"width": 0.1875}),
            System("Output mixing", "mixed_net", "separate", {"width": 0.1875}),
        ),
        ("fgsm", "pgd_sat", "pgd_trades", "cw", "union"),
        notes=(
            "The papers' attacks are FGSM, PGD of 20 steps (large and small steps) and CW; the strongest of "
            "them is what a paper would claim. The union is the worst case, image by image, over these, "
            "AutoAttack and the adaptive attacks that apply to the network; for Separate-Net and output "
            "mixing also images made on the soft gate and on each member alone.",
            "AW-Net and its static twins train by MTARD with the same teachers, the others by their own "
            "recipes. Output mixing mixes the probabilities of Separate-Net's members by the detector's p, "
            "as adaptive smoothing (Bai et al. 2023) does with its own networks.",
        ),
        changes={
            "cpu": {
                "about": "all training images of digits at the recipes' own settings, hours on a CPU",
                "width": 1.0,
                "epochs": None,
                "settings": {},
                "validation_limit": None,
                "test_limit": None,
                "attack_budget": "short",
            }
        },
    ),
    "recipes": Experiment(
        "Ingredients of training recipes, one at a time",
        "ablation",
        ("cifar10",),
        (
            _recipe("PGD-AT"),
            _recipe("label smoothing 0.1", label_smoothing=0.1),
            _recipe("weight perturbation (AWP) 0.01", awp=0.01),
            _recipe("weight average 0.9995", ema_decay=0.9995),
            _recipe("Nesterov, cosine schedule", nesterov=True, schedule="cosine"),
            _recipe("AdamW", optimizer="adamw", lr=1e-3, weight_decay=0.05),
            _recipe("SiLU", activation="silu"),
            _recipe("GELU", activation="gelu"),
            _recipe("leaky ReLU", activation="leaky_relu"),
            _recipe("Cutout", augment=("cutout",)),
            _recipe("CutMix", augment=("cutmix",)),
            _recipe("resized crop", augment=("resized_crop",)),
            _recipe("IDBH", augment=("idbh",)),
            _recipe("pseudo-labeled images, half of each batch", extra_fraction=0.5),
            _recipe("TRADES", "trades"),
            _recipe("TRADES with DKL", "trades", "TRADES", divergence="dkl"),
            _recipe("MART", "mart"),
            _recipe("FGSM-RS", attack_kind="fgsm_rs", **_ONE_STEP),
            _recipe("N-FGSM", attack_kind="n_fgsm", **_ONE_STEP),
            _recipe("GAT", "gat", **_ONE_STEP),
            _recipe("MTARD", "mtard"),
            _recipe("B-MTARD temperatures", "mtard", "MTARD", temperature_lr=0.001),
        ),
        ("pgd_sat", "union"),
        notes=(
            "The network is static, three blocks of 16, 32 and 64 channels. The baseline is PGD-AT by one "
            "cycle of the learning rate; every row changes one thing in its baseline.",
            "Pseudo-labeled images: the training images that the budget leaves out, labeled by the clean "
            "teacher.",
            *_EQUAL_COST_NOTES,
        ),
        equal_cost=True,
        seeds=(0, 1, 2),
        teachers=_SMALL_TEACHERS,
        changes=_SMALL_BUDGET,
    ),
    "presets": Experiment(
        "AW-Net and its static twins under each preset",
        "ablation",
        ("cifar10",),
        tuple(
            system
            for preset in ("pgd_at_strong", "trades_strong", "mtard_strong", "single_step")
            for system in _under_preset(preset)
        ),
        ("pgd_sat", "union"),
        notes=(
            "The twins have no router: one has AW-Net's widths, the other about as many parameters.",
            *_EQUAL_COST_NOTES,
        ),
        equal_cost=True,
        seeds=(0, 1, 2),
        teachers=_SMALL_TEACHERS,
        changes=_SMALL_BUDGET,
    ),
    "weight_gap": Experiment(
        "Section 3.2: the weight gap of Eq. 8 against ε and α_adv",
        "weight_gap",
        ("cifar10",),
        (System("ResNet-18", "resnet18", "pgd_at"),),
    ),
}


@dataclass(frozen=True)
class Budget:
    """How much of an experiment is run. None means everything, or the value of the recipe."""

    about: str
    width: float = 1.0
    """Multiplies the channels of every network."""
    epochs: int | None = None
    fast: bool = False
    """Use the fast variant of each recipe if there is one."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of every recipe."""
    train_limit: int | None = None
    validation_limit: int | None = None
    test_limit: int | None = None
    shrink: int = 1
    """Images are averaged over squares of this side, and the shift of augmentation is divided by it."""
    attack_budget: BudgetName = "standard"
    queries: int | None = None
    """Queries of Square; None for the attack budget's."""
    synthetic: bool = False
    """Use generated images if the folder of a data set is missing."""


BUDGETS: dict[str, Budget] = {
    "smoke": Budget(
        "shows that the command works, in a minute on a CPU; its results have no meaning",
        width=0.125,
        epochs=1,
        settings={"batch_size": 32, "attack_steps": 1},
        train_limit=64,
        validation_limit=16,
        test_limit=16,
        attack_budget="smoke",
        queries=40,
        synthetic=True,
    ),
    "cpu": Budget(
        "narrow networks on part of the images, hours on a CPU",
        width=0.25,
        epochs=10,
        settings={"batch_size": 128, "attack_steps": 5, "schedule": "onecycle", "validate_every": 5},
        validation_limit=200,
        test_limit=500,
    ),
    "gpu-30min": Budget(
        "full networks by the fast recipes, about half an hour a network on an H200", fast=True
    ),
    "paper": Budget("the paper's own settings"),
}

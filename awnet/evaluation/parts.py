"""A network with a router in parts: accuracy with one part fixed, attacked alone, or swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet.attacks import PGD, Suite, frozen, named_attack
from awnet.attacks.adaptive import mean_scales, type_margin
from awnet.data.dataset import Dataset
from awnet.evaluation.statistics import wilson_interval
from awnet.nn import MixBatchNorm2d, Steering, has_router, observe, route, routed_networks, with_routing
from awnet.nn.copies import copied
from awnet.nn.routing import WithRouter
from awnet.precision import at_least_float32, full_precision

Logits = Callable[[Tensor, Tensor], Tensor]
"""Logits [B, K] from the attacked and the clean images [B, C, H, W]."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A loss [B] to maximize, from the attacked images, the clean images and the labels."""


@dataclass(frozen=True)
class Effort:
    """The budget: number of images, and steps of PGD on each part."""

    images: int
    steps: int


EFFORTS = {"smoke": Effort(32, 5), "short": Effort(100, 10), "standard": Effort(200, 20)}

WHOLE = "the whole network"
P_0, P_1 = "p = 0 (adversarial branch)", "p = 1 (clean branch)"
SCALES_CLEAN, SCALES_MEAN = "ω frozen at ω(x) of the clean image", "ω frozen at its mean over images"
ROUTER, DYNAMIC = "router attacked alone", "dynamic network attacked alone"
AFFINE, STATISTICS = "affine parameters of the branches swapped", "statistics of the branches swapped"
PARTS = (WHOLE, P_0, P_1, SCALES_CLEAN, SCALES_MEAN, ROUTER, DYNAMIC, AFFINE, STATISTICS)


@dataclass(frozen=True)
class Row:
    """One part. Without ``not_applicable`` all accuracies are set.

    clean_accuracy, robust_accuracy: fractions, on clean images and under PGD on this variant.
    changed: fraction of the clean images that the variant classifies differently from the whole network.
    not_applicable: why the network has no such part.
    """

    part: str
    clean_accuracy: float | None = None
    robust_accuracy: float | None = None
    interval_95: list[float] | None = None
    changed: float | None = None
    not_applicable: str | None = None


class _Variant:
    """A variant of the network: its logits, and the losses whose worst case per image counts."""

    def __init__(
        self, module: nn.Module, logits: Logits | None = None, losses: tuple[Loss, ...] = ()
    ) -> None:
        self.module, self.logits = module, logits or (lambda x_adv, x: module(x_adv))
        self.losses = losses or (self.cross_entropy,)

    def cross_entropy(self, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(self.logits(x_adv, x)), y, reduction="none")


@full_precision()
def gated_parts(
    model: nn.Module,
    dataset: Dataset,
    suite: Suite | None = None,
    *,
    module: nn.Module | None = None,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Accuracy of each part of a network with a router, clean and under PGD, JSON-ready.

    Every row is a variant of the network, attacked by PGD on the cross-entropy of that variant:

    - p is 0 or 1 for every image; ω still comes from the router;
    - ω is that of the clean image, or the mean over the images; p still comes from the router;
    - only the router sees the attacked image, the dynamic network sees the clean one. The worst case per
      image over the cross-entropy and both signs of the type logits' margin counts;
    - only the dynamic network sees the attacked image: p and ω are those of the clean image;
    - in every MixBN the two rows of the affine parameters, or of the running statistics, are exchanged. If
      accuracy and predictions stay the same, the network does not use the difference.

    Args:
        model: the network; it is not changed.
        dataset: images on the model's device. A stratified part is used, see :data:`EFFORTS`.
        suite: its budget determines the number of images and steps; None is the standard budget.
        module: what runs instead of ``model``, such as its inference copy; None runs ``model``.
        prepare: makes such a module from a changed copy of ``model``.
        seed: seed of PGD's random start.
        batch_size: images per forward pass.

    Returns:
        ``images``, ``steps``, ``passes`` (forward and backward passes for each image, over all rows),
        ``attack`` (its settings), and ``rows`` of :class:`Row`. For a model without exactly one router of
        this form: only ``not_applicable``, the reason.
    """
    reason = not_applicable(model)
    if reason is not None:
        return {"not_applicable": reason}
    suite = Suite(classes=dataset.num_classes) if suite is None else suite
    effort = EFFORTS[suite.budget]
    data = dataset.subset(min(effort.images, len(dataset)), seed=0)
    module = model if module is None else module
    run = _Run(data, suite, effort, seed, batch_size)
    variants = _variants(model, module, data, (lambda changed: changed) if prepare is None else prepare)
    rows = [asdict(run.row(part, variant)) for part, variant in variants]
    attack = named_attack("pgd_sat", module, data.threat_model, seed, suite).settings
    return {
        "images": len(data),
        "steps": effort.steps,
        "passes": {"forward": run.forward, "backward": run.backward},
        "attack": attack | {"steps": effort.steps},
        "rows": rows,
    }


def not_applicable(model: nn.Module) -> str | None:
    """Why ``model`` has no parts to measure; None for a model with one router that gives p and ω."""
    if has_router(model):
        return None
    count = len(routed_networks(model))
    if count > 1:
        return f"the model holds {count} networks with a router; the parts are those of exactly one"
    if any(isinstance(module, WithRouter) for module in model.modules()):
        return "its router selects experts: it gives neither p nor filter scales"
    return "the model has no router"


def _variants(
    model: nn.Module, module: nn.Module, data: Dataset, prepare: Callable[[nn.Module], nn.Module]
) -> Iterator[tuple[str, _Variant | str]]:
    """Each part with its variant, or with the reason why there is none."""
    x = next(data.batches(min(len(data), 256))).x
    with frozen(module):
        point = x[:2].clone().requires_grad_()
        with torch.enable_grad():
            routing = route(module, point)
        scales = mean_scales(module, x)
    yield WHOLE, _Variant(module)
    for part, p in ((P_0, 0.0), (P_1, 1.0)):
        yield part, _Variant(module, partial(_rerouted, module, p=p))
    if scales:
        yield SCALES_CLEAN, _Variant(module, partial(_rerouted, module, scales="clean"))
        yield SCALES_MEAN, _Variant(module, partial(_rerouted, module, scales=scales))
    else:
        for part in (SCALES_CLEAN, SCALES_MEAN):
            yield part, "its router gives no filter scales"
    if any(part.requires_grad for part in (routing.p_clean, *routing.filter_scales)):
        yield ROUTER, _router_alone(module, has_type=routing.type_logits is not None)
        yield DYNAMIC, _Variant(module, partial(_rerouted, module, p="clean", scales="clean"))
    else:
        yield ROUTER, "its p and ω do not depend on the image"
        yield DYNAMIC, "its p and ω do not depend on the image: this is the whole network"
    for part, names in ((AFFINE, ("weight", "bias")), (STATISTICS, ("running_mean", "running_var"))):
        swapped = _swapped(model, names)
        yield part, swapped if isinstance(swapped, str) else _Variant(prepare(swapped))


def _rerouted(
    module: nn.Module,
    x_adv: Tensor,
    x: Tensor,
    *,
    p: float | Literal["clean"] | None = None,
    scales: list[Tensor] | Literal["clean"] | None = None,
) -> Tensor:
    """Logits of ``x_adv`` with p or ω replaced: by a constant, or by that of the clean images ``x``."""
    changes: dict[str, Any] = {}
    if "clean" in (p, scales if isinstance(scales, str) else None):
        with torch.no_grad():
            clean = route(module, x)
        if p == "clean":
            changes |= {"p_clean": clean.p_clean, "type_logits": clean.type_logits}
        if scales == "clean":
            changes["filter_scales"] = clean.filter_scales
    if isinstance(scales, list):
        changes["filter_scales"] = [scale.expand(len(x_adv), -1) for scale in scales]

    def rerouted(network: Any, images: Tensor) -> Any:
        routing = network.route(images)
        if isinstance(p, float):
            changes["p_clean"] = torch.full_like(routing.p_clean, p)
        return replace(routing, **changes)

    return observe(module, x_adv, Steering(route=rerouted))


def _router_alone(module: nn.Module, *, has_type: bool) -> _Variant:
    """Only the router sees the attacked images."""

    def logits(x_adv: Tensor, x: Tensor) -> Tensor:
        return with_routing(module, x, route(module, x_adv))

    def loss(x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        routing = route(module, x_adv)
        value = F.cross_entropy(at_least_float32(with_routing(module, x, routing)), y, reduction="none")
        # 0·p and 0·ω give the loss a gradient, of 0, even if a gate thresholds p; PGD then stays at its start
        zeros = [0 * part.flatten(1).sum(1) for part in (routing.p_clean[:, None], *routing.filter_scales)]
        return torch.stack([value, *(zero.to(value.dtype) for zero in zeros)]).sum(0)

    def toward(sign: float, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        margin = type_margin(route(module, x_adv))
        assert margin is not None
        return sign * margin

    signs = (1.0, -1.0) if has_type else ()
    return _Variant(module, logits, (loss, *(partial(toward, sign) for sign in signs)))


def _swapped(model: nn.Module, names: tuple[str, ...]) -> nn.Module | str:
    """A copy of ``model`` with the rows of these tensors exchanged in every MixBN, or why there is none."""
    norms = [module for module in model.modules() if isinstance(module, MixBatchNorm2d)]
    two = [norm for norm in norms if norm.branches != "one"]
    if not two:
        return "the network has no MixBN" if not norms else "its batch norms have one branch"
    if all(len(getattr(norm, names[0])) == 1 for norm in two):
        return "the branches of its MixBN share their statistics"
    copy = copied(model)
    with torch.no_grad():
        for module in copy.modules():
            if isinstance(module, MixBatchNorm2d):
                for name in names:
                    value = getattr(module, name)
                    value.copy_(value.flip(0))
    return copy.eval()


class _Run:
    """Measures rows on the same images, and counts passes for each image."""

    def __init__(self, data: Dataset, suite: Suite, effort: Effort, seed: int, batch_size: int) -> None:
        self.data, self.suite, self.effort = data, suite, effort
        self.seed, self.batch_size = seed, batch_size
        self.forward = self.backward = 0
        self.whole: Tensor | None = None  # predictions of the whole network on clean images

    def row(self, part: str, variant: _Variant | str) -> Row:
        if isinstance(variant, str):
            return Row(part, not_applicable=variant)
        attacks = [self._attack(variant, loss) for loss in variant.losses]
        self.forward += 1 + len(attacks) * (self.effort.steps + 1)
        self.backward += len(attacks) * self.effort.steps
        predicted, clean, robust = [], [], []
        with frozen(variant.module), torch.no_grad():
            for x, y, index in self.data.batches(self.batch_size):
                predictions = variant.logits(x, x).argmax(1)
                predicted.append(predictions)
                correct = predictions == y
                clean.append(correct)
                for attack in attacks:
                    correct = correct & (variant.logits(attack(x, y, index=index), x).argmax(1) == y)
                robust.append(correct)
        whole = torch.cat(predicted)
        if self.whole is None:
            self.whole = whole
        n, count = len(self.data), int(torch.cat(robust).sum())
        return Row(
            part,
            clean_accuracy=int(torch.cat(clean).sum()) / n,
            robust_accuracy=count / n,
            interval_95=[*wilson_interval(count, n)],
            changed=int((whole != self.whole).sum()) / n,
        )

    def _attack(self, variant: _Variant, loss: Loss) -> PGD:
        attack = named_attack("pgd_sat", variant.module, self.data.threat_model, self.seed, self.suite)
        assert isinstance(attack, PGD)
        attack.loss = lambda model, x_adv, x, y: loss(x_adv, x, y)
        attack.steps = self.effort.steps
        return attack

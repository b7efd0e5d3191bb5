"""Runs a model over a data set, clean, attacked and with noise, and collects the outcomes batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from awnet import rng
from awnet.attacks import FMN, Attack, Cascade, Stochastic, frozen
from awnet.attacks.base import check_ball
from awnet.attacks.cascade import ROBUST, WRONG_CLEAN
from awnet.attacks.norms import geometry
from awnet.attacks.saved import Saved
from awnet.attacks.stochastic import seeded
from awnet.data.dataset import Batch, Dataset
from awnet.data.threat_model import ThreatModel
from awnet.evaluation.detection import CONTROLS, UNIFORM
from awnet.evaluation.progress import Advance
from awnet.evaluation.results import Array
from awnet.models.rdi import has_exits
from awnet.nn import Steering, has_router, observe, route

T = TypeVar("T")

CLEAN, UNION = "clean", "union"
EXAMPLES = 8  # broken images in a report


class Plan:
    """The kinds of images that a model is evaluated on.

    Attributes:
        chosen: the requested attacks but the union; union: the union, or None.
        rest: the union's members that are not in ``chosen``; None without them.
        order: names of attacks in the order of their numbers in the worst case's ``broken_by``.
        attacked: names of the kinds of adversarial images; controls: of noise, for a model with a type head.
        kinds: all kinds of images.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, attacks: Mapping[str, Attack], seed: int) -> None:
        self.model, self.dataset, self.seed = model, dataset, seed
        self.chosen = {kind: attack for kind, attack in attacks.items() if kind != UNION}
        self.union = attacks.get(UNION)
        self.rest = None if self.union is None else remaining(self.union, self.chosen)
        self.order = [*self.chosen, *([] if self.rest is None else self.rest.members)]
        self.has_type_head = False
        if has_router(model):
            with frozen(model), torch.no_grad():
                self.has_type_head = route(model, next(dataset.batches(1)).x).type_logits is not None
        self.attacks = self.chosen | ({} if self.union is None else {UNION: self.union})
        self.attacked = list(self.attacks)
        self.controls = CONTROLS if self.has_type_head else ()
        self.kinds = [CLEAN, *self.attacked, *self.controls]


class Collected:
    """The outcomes that one rank, or with :meth:`merged` all ranks, collected.

    Tensors stay on the model's device until :meth:`to_host`.
    """

    def __init__(self, plan: Plan) -> None:
        rounded = [f"{kind}_rounded" for kind in plan.attacked]
        self.batches: dict[str, list[dict[str, Tensor]]] = {kind: [] for kind in [*plan.kinds, *rounded]}
        """For each kind of image the model's outputs, ``[B]`` each, batch by batch."""
        self.scales: dict[str, list[Tensor]] = {}
        """For each kind of image a router's filter scales, ``[C_out]`` each, summed over the images."""
        self.notes: dict[str, Counter[str]] = {kind: Counter() for kind in plan.attacked}
        self.examples: list[dict[str, Tensor]] = []
        """The first images that the last attack broke, batch by batch."""
        self.sanity: dict[str, Any] = {}
        self.parts: dict[str, Any] = {}

    def add_batch(self, plan: Plan, number: int, batch: Batch, saved: Saved | None, advance: Advance) -> None:
        """Evaluates batch ``number`` of the data set on every kind of image."""
        model, levels = plan.model, plan.dataset.max_value
        x, y, index = batch

        def observe_images(kind: str, images: Tensor) -> dict[str, Tensor]:
            """Adds the model's outputs for ``images``, and returns them, ``[B]`` each."""
            # copied into x's strides, which choose a convolution's algorithm and so its rounding
            images = torch.empty_like(x).copy_(images)
            with seeded(model, kind, index):
                values, scales = _observe(model, images, y, logits=kind not in CONTROLS)
            self.batches[kind].append(values)
            self._add_scales(kind, [scale.double().sum(0) for scale in scales])
            if plan.has_type_head and kind in plan.attacks:
                with seeded(model, f"{kind} rounded", index):
                    rounded, _ = _observe(model, (images * levels).round() / levels, y, logits=False)
                self.batches[f"{kind}_rounded"].append(rounded)
            advance(kind, 1)
            return values

        values = observe_images(CLEAN, x)
        worst, before = WorstCase(x, values["correct"], plan.order), values["prediction"]
        for kind, attack in plan.chosen.items():
            images, extra = self._attacked(attack, kind, number, batch, saved, advance)
            values = observe_images(kind, images)
            worst.add(kind, images, values["correct"])
            if attack.target is not None:
                values["target"] = attack.goals(x, y, index=index)
            values |= extra
            outcome = getattr(attack, "outcome", None)
            if outcome is not None:
                values["broken_by"] = outcome.broken_by
        if plan.union is not None:
            if plan.rest is not None:
                _set_up(plan.rest, saved, advance)
            worst.attack(plan.rest, x, y, index)
            images = worst.x_adv
            values = observe_images(UNION, images)
            values["broken_by"] = worst.confirmed(values["correct"])
        if plan.attacks:
            after = values["prediction"]
            left = EXAMPLES - sum(len(batch["label"]) for batch in self.examples)
            rows = ((before == y) & (after != y)).nonzero()[:left, 0]
            shown = {"clean": x, "adversarial": images, "label": y, "before": before, "after": after}
            self.examples.append({name: value[rows].cpu() for name, value in shown.items()})
        for kind in plan.controls:
            observe_images(kind, with_noise(x, index, plan.dataset.threat_model, plan.seed, kind))

    def _attacked(
        self, attack: Attack, kind: str, number: int, batch: Batch, saved: Saved | None, advance: Advance
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's adversarial images, computed now or loaded from the interrupted evaluation.

        Also values for each image ``[B]``: for a minimum-norm attack, ``distance``.
        """
        x, y, index = batch
        if isinstance(attack, Cascade):
            _set_up(attack, saved, advance)
            x_adv = attack(x, y, index=index)
            if attack.outcome is not None:
                self.notes[kind].update(attack.outcome.notes)
            return x_adv, {}
        name = f"{number}-{kind}"
        if saved is not None and (state := saved.load(name, x.device)) is not None:
            tensors, attack_notes = state
            check_ball(
                tensors["x_adv"], x, attack.eps, attack.norm, f"the images saved in {saved.path(name)}"
            )
            self.notes[kind].update(attack_notes)
            return tensors.pop("x_adv"), tensors
        x_adv = attack(x, y, index=index)
        check_ball(x_adv, x, attack.eps, attack.norm, f"the images of the attack {kind}")
        attack_notes = dict(getattr(attack, "notes", {}))
        self.notes[kind].update(attack_notes)
        distances = attack.distances if isinstance(attack, FMN) else None
        extra = {} if distances is None else {"distance": distances}
        if saved is not None:
            saved.save(name, {"x_adv": x_adv, **extra}, attack_notes)
        return x_adv, extra

    def _add_scales(self, kind: str, sums: Sequence[Tensor]) -> None:
        before = self.scales.get(kind)
        self.scales[kind] = [a + b for a, b in zip(before, sums, strict=True)] if before else [*sums]

    def to_host(self) -> Collected:
        """Moves all tensors to the host, so that they can be sent to other processes; returns itself."""
        for batches in self.batches.values():
            batches[:] = [{name: value.cpu() for name, value in batch.items()} for batch in batches]
        self.scales = {kind: [scale.cpu() for scale in scales] for kind, scales in self.scales.items()}
        return self

    @classmethod
    def merged(cls, plan: Plan, shares: Sequence[Collected]) -> Collected:
        """All ranks' outcomes, with the batches in the data set's order."""
        merged = cls(plan)
        for kind in merged.batches:
            merged.batches[kind] = _interleaved([share.batches[kind] for share in shares])
        merged.examples = _interleaved([share.examples for share in shares])
        for share in shares:
            for kind, scales in share.scales.items():
                merged._add_scales(kind, scales)
            for kind, notes in share.notes.items():
                merged.notes[kind].update(notes)
            merged.sanity |= share.sanity
            merged.parts |= share.parts
        return merged

    def arrays(self, kind: str) -> dict[str, Array]:
        """The outputs for one kind of image, ``[n]`` each; empty if there are none."""
        return _joined(self.batches[kind])

    def example_arrays(self) -> dict[str, Array]:
        """:data:`EXAMPLES` images that the last attack broke, or fewer; empty if it broke none."""
        examples = _joined(self.examples)
        return {name: values[:EXAMPLES] for name, values in examples.items() if len(values)}


def _joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Array]:
    return {name: torch.cat([batch[name] for batch in batches]).numpy() for name in (batches or [{}])[0]}


def _interleaved(parts: Sequence[Sequence[T]]) -> list[T]:
    """The first item of each part, then the second of each: rank r of R has the batches r, r + R, …."""
    return [part[turn] for turn in range(len(parts[0])) for part in parts if turn < len(part)]


def _observe(
    model: nn.Module, x: Tensor, y: Tensor, *, logits: bool
) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
    """One forward pass: per-sample values ``[B]``, and the filter scales of a router.

    Of a stochastic model, ``passes`` forward passes; the routing is that of the first.
    """
    values: dict[str, Tensor] = {}
    steering = Steering()
    if logits and isinstance(model, Stochastic):
        output, votes = model.classify(lambda: observe(model, x, steering))
        del steering.routings[1:]
        values["pass_share"] = votes.gather(1, y[:, None])[:, 0].float()
    elif logits:
        output = observe(model, x, steering)
    elif has_router(model):
        steering.routings.append(route(model, x))
    routing = steering.routings[0] if len(steering.routings) == 1 else None
    if routing is not None and routing.type_logits is not None:
        # the difference of the two logits orders images as p does, without saturation
        values["type_score"] = (routing.type_logits[:, 1] - routing.type_logits[:, 0]).float()
        values["p_clean"] = routing.p_clean.float()
    if logits and has_exits(model):
        values["exit"] = model.exit_of(x)  # type: ignore[operator]
    if logits:
        values["prediction"] = output.argmax(1)
        values["correct"] = values["prediction"] == y
        values["finite"] = output.isfinite().all(1)
    return values, [] if routing is None else routing.filter_scales


def with_noise(x: Tensor, index: Tensor, threat_model: ThreatModel, seed: int, kind: str = UNIFORM) -> Tensor:
    """Images with noise of the threat model's size: uniform in the ball, or equally large in each pixel."""
    norm, key = geometry(threat_model.norm), rng.key(kind.replace("_", " "), seed)
    if kind == UNIFORM:
        return norm.uniform(key, x, index, threat_model.eps).clamp_(0, 1)
    signs = rng.uniform(key, index, x.shape[1:]).mul_(2).sub_(1).sign()
    return (x + norm.signs(signs, threat_model.eps)).clamp_(0, 1)


def _set_up(attack: Attack, saved: Saved | None, advance: Advance) -> None:
    """Makes a cascade save its state, and report which member runs."""
    if isinstance(attack, Cascade):
        attack.keep_in(saved)
        attack.announce = lambda member: advance(member, 0)


class WorstCase:
    """For one batch: the first attack that broke each image, and its adversarial image.

    Attacks are added in the order in which they ran; :meth:`attack` then runs the remaining members of the
    union on the images that no attack has broken.

    Args:
        x, correct: the clean images and whether they are classified correctly.
        names: names of the attacks in the order of their numbers in ``broken_by``.
    """

    def __init__(self, x: Tensor, correct: Tensor, names: list[str]) -> None:
        self.x_adv = x.clone()
        self.broken_by = torch.where(correct, ROBUST, WRONG_CLEAN)
        self.names = names

    def add(self, name: str, x_adv: Tensor, correct: Tensor) -> None:
        """Adds the result of an attack on the whole batch."""
        first = (self.broken_by == ROBUST) & ~correct
        self.broken_by[first] = self.names.index(name)
        self.x_adv[first] = x_adv[first]

    def attack(self, rest: Cascade | None, x: Tensor, y: Tensor, index: Tensor) -> None:
        """Attacks the images that are not broken yet with ``rest``; None if every member has run."""
        rows = (self.broken_by == ROBUST).nonzero()[:, 0]
        if rest is None or len(rows) == 0:
            return
        self.x_adv[rows] = rest(x[rows], y[rows], index=index[rows])
        assert rest.outcome is not None
        broken_by = rest.outcome.broken_by
        numbers = torch.tensor([self.names.index(name) for name in rest.members], device=x.device)
        self.broken_by[rows] = torch.where(broken_by >= 0, numbers[broken_by.clamp(min=0)], ROBUST)

    def confirmed(self, correct: Tensor) -> Tensor:
        """``broken_by``, corrected by the model's outcomes on the whole batch."""
        # an image may be broken only in a smaller batch, which rounds differently
        not_broken = correct & (self.broken_by >= 0)
        return torch.where(not_broken, ROBUST, self.broken_by)


def remaining(union: Attack, done: Mapping[str, Attack]) -> Cascade | None:
    """The members of ``union`` that are not among the attacks in ``done``; None if there are none."""
    if not isinstance(union, Cascade):
        raise TypeError(f"attacks['union'] must be a Cascade, got {type(union).__name__}")
    left = {
        name: member
        for name, member in union.members.items()
        if name not in done or done[name].settings != member.settings
    }
    return Cascade(union.model, left, eps=union.eps, norm=union.norm, seed=union.seed) if left else None

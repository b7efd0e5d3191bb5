"""Runs a model over a data set, clean, attacked and with noise, and collects the outcomes batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from awnet import rng
from awnet.attacks import FMN, Attack, Cascade, Stochastic, Suite, frozen
from awnet.attacks.base import check_ball
from awnet.attacks.norms import geometry
from awnet.attacks.saved import Saved
from awnet.attacks.stochastic import seeded
from awnet.data.dataset import Batch, Dataset
from awnet.data.threat_model import ThreatModel
from awnet.evaluation.detection import CONTROLS, UNIFORM
from awnet.evaluation.parts import gated_parts
from awnet.evaluation.progress import Advance
from awnet.evaluation.results import Array
from awnet.evaluation.sanity import Check, sanity_table
from awnet.evaluation.union import WorstCase, remaining
from awnet.models.rdi import has_exits
from awnet.nn import Steering, has_router, observe, route

T = TypeVar("T")

CLEAN, UNION = "clean", "union"


class Plan:
    """The kinds of images that a model is evaluated on."""

    def __init__(self, model: nn.Module, dataset: Dataset, attacks: Mapping[str, Attack], seed: int) -> None:
        self.model, self.dataset, self.seed = model, dataset, seed
        self.chosen = {kind: attack for kind, attack in attacks.items() if kind != UNION}
        self.union = attacks.get(UNION)
        self.rest = None if self.union is None else remaining(self.union, self.chosen)
        self.order = [*self.chosen, *([] if self.rest is None else self.rest.members)]
        """Attacks in the order of their numbers in the worst case's ``broken_by``."""
        self.has_type_head = _has_type_head(model, dataset)
        self.attacks = self.chosen | ({} if self.union is None else {UNION: self.union})
        self.attacked = list(self.attacks)
        self.kinds = [CLEAN, *self.attacked, *(CONTROLS if self.has_type_head else ())]


def _has_type_head(model: nn.Module, dataset: Dataset) -> bool:
    if not has_router(model):
        return False
    with frozen(model), torch.no_grad():
        return route(model, next(dataset.batches(1)).x).type_logits is not None


class Collected:
    """The outcomes that one rank, or with :meth:`merged` all ranks, collected."""

    def __init__(self, plan: Plan) -> None:
        rounded = [f"{kind}_rounded" for kind in plan.attacked]
        self.outcomes = {kind: Outcomes() for kind in [*plan.kinds, *rounded]}
        self.notes: dict[str, Counter[str]] = {kind: Counter() for kind in plan.attacked}
        self.examples = Examples()
        self.table: list[Check] = []
        self.curves: dict[str, Any] = {}
        self.parts: dict[str, Any] = {}

    def add_batch(self, plan: Plan, number: int, batch: Batch, saved: Saved | None, advance: Advance) -> None:
        """Evaluates batch ``number`` of the data set on every kind of image."""
        model, dataset = plan.model, plan.dataset
        x, y, index = batch
        worst = None
        for kind in plan.kinds:
            if kind in CONTROLS:
                images = with_noise(x, index, dataset.threat_model, plan.seed, kind)
            elif kind == UNION:
                assert worst is not None
                if plan.rest is not None:
                    _follow(plan.rest, saved, advance)
                worst.attack(plan.rest, x, y, index)
                images = worst.x_adv
            elif kind == CLEAN:
                images = x
            else:
                images, extra = _attacked(
                    plan.chosen[kind], kind, number, batch, saved, self.notes[kind], advance
                )
            # copied into x's strides, which choose a convolution's algorithm and so its rounding
            images = torch.empty_like(x).copy_(images)
            with seeded(model, kind, index):
                values, scales = _observe(model, images, y, logits=kind not in CONTROLS)
            if kind == CLEAN:
                worst = WorstCase(x, values["correct"], plan.order)
            elif kind in plan.chosen:
                assert worst is not None
                worst.add(kind, images, values["correct"])
                if plan.chosen[kind].target is not None:
                    values["target"] = plan.chosen[kind].goals(x, y, index=index)
                values |= extra
                outcome = getattr(plan.chosen[kind], "outcome", None)
                if outcome is not None:
                    values["broken_by"] = outcome.broken_by
            elif kind == UNION:
                assert worst is not None
                values["broken_by"] = worst.confirmed(values["correct"])
            if kind == CLEAN:
                before = values["prediction"]
            elif plan.attacked and kind == plan.attacked[-1]:
                self.examples.add(x, images, y, before, values["prediction"])
            self.outcomes[kind].add(values, scales)
            if plan.has_type_head and kind in plan.attacked:
                rounded = (images * dataset.max_value).round() / dataset.max_value
                with seeded(model, f"{kind} rounded", index):
                    self.outcomes[f"{kind}_rounded"].add(*_observe(model, rounded, y, logits=False))
            advance(kind, 1)

    def add_sanity_table(self, plan: Plan, suite: Suite, batch_size: int, saved: Saved | None) -> None:
        """Computes the sanity table, or reads it from the state of an interrupted evaluation."""
        state = None if saved is None else saved.load("sanity")
        if state is not None:
            self.table, self.curves = [Check(**row) for row in state[1]["table"]], state[1]["curves"]
            return
        self.table, self.curves = sanity_table(
            plan.model, plan.dataset, suite, seed=plan.seed, batch_size=batch_size
        )
        if saved is not None:
            saved.save("sanity", {}, {"table": [asdict(row) for row in self.table], "curves": self.curves})

    def add_parts(
        self,
        plan: Plan,
        model: nn.Module,
        suite: Suite,
        batch_size: int,
        saved: Saved | None,
        prepare: Callable[[nn.Module], nn.Module],
    ) -> None:
        """Measures the parts of ``model``, or reads them from the state of an interrupted evaluation.

        ``prepare`` makes the module that runs, as ``plan.model``, from a changed copy of ``model``.
        """
        state = None if saved is None else saved.load("parts")
        if state is not None:
            self.parts = state[1]
            return
        self.parts = gated_parts(
            model,
            plan.dataset,
            suite,
            module=plan.model,
            prepare=prepare,
            seed=plan.seed,
            batch_size=batch_size,
        )
        if saved is not None:
            saved.save("parts", {}, self.parts)

    def to_host(self) -> Collected:
        """Moves all tensors to the host, so that they can be sent to other processes; returns itself."""
        for outcomes in self.outcomes.values():
            outcomes.to_host()
        return self

    @classmethod
    def merged(cls, plan: Plan, shares: Sequence[Collected]) -> Collected:
        """All ranks' outcomes, with the batches in the data set's order."""
        merged = cls(plan)
        for kind in merged.outcomes:
            merged.outcomes[kind] = Outcomes.merged([share.outcomes[kind] for share in shares])
        for kind, notes in merged.notes.items():
            for share in shares:
                notes.update(share.notes[kind])
        merged.examples.batches = _interleaved([share.examples.batches for share in shares])
        for share in shares:
            merged.table += share.table
            merged.curves |= share.curves
            merged.parts |= share.parts
        return merged


def _interleaved(parts: Sequence[Sequence[T]]) -> list[T]:
    """The first item of each part, then the second of each: rank r of R has the batches r, r + R, …."""
    return [part[turn] for turn in range(len(parts[0])) for part in parts if turn < len(part)]


class Examples:
    """The first images that the last attack broke, for a figure; stored batch by batch."""

    most = 8

    def __init__(self) -> None:
        self.batches: list[dict[str, Array]] = []

    def add(self, x: Tensor, x_adv: Tensor, y: Tensor, before: Tensor, after: Tensor) -> None:
        left = self.most - sum(len(batch["label"]) for batch in self.batches)
        rows = ((before == y) & (after != y)).nonzero()[:left, 0]
        values = {"clean": x, "adversarial": x_adv, "label": y, "before": before, "after": after}
        self.batches.append({name: value[rows].cpu().numpy() for name, value in values.items()})

    def arrays(self) -> dict[str, Array]:
        if not any(len(batch["label"]) for batch in self.batches):
            return {}
        return {
            name: np.concatenate([batch[name] for batch in self.batches])[: self.most]
            for name in self.batches[0]
        }


class Outcomes:
    """A model's outputs for one kind of image, batch by batch, on its device until the end."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.scales: list[Tensor] = []  # [C_out] each, summed over images
        self.count = 0

    def add(self, values: dict[str, Tensor], scales: Sequence[Tensor]) -> None:
        self.batches.append(values)
        self._add_scales([scale.double().sum(0) for scale in scales])
        self.count += len(next(iter(values.values())))

    def _add_scales(self, sums: list[Tensor]) -> None:
        self.scales = [a + b for a, b in zip(self.scales, sums, strict=True)] if self.scales else sums

    def to_host(self) -> None:
        self.batches = [{name: value.cpu() for name, value in batch.items()} for batch in self.batches]
        self.scales = [scale.cpu() for scale in self.scales]

    @classmethod
    def merged(cls, parts: Sequence[Outcomes]) -> Outcomes:
        merged = cls()
        merged.batches = _interleaved([part.batches for part in parts])
        for part in parts:
            if part.scales:
                merged._add_scales(part.scales)
        merged.count = sum(part.count for part in parts)
        return merged

    def arrays(self) -> dict[str, Array]:
        return {name: torch.cat([batch[name] for batch in self.batches]).numpy() for name in self.batches[0]}

    def mean_scales(self) -> list[Tensor]:
        return [scale / self.count for scale in self.scales]


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


def _follow(attack: Attack, saved: Saved | None, advance: Advance) -> None:
    """Makes a cascade save its state, and report which member runs."""
    if isinstance(attack, Cascade):
        attack.keep_in(saved)
        attack.announce = lambda member: advance(member, 0)


def _attacked(
    attack: Attack,
    kind: str,
    number: int,
    batch: Batch,
    saved: Saved | None,
    notes: Counter[str],
    advance: Advance,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The batch's adversarial images, computed now or by the evaluation that was interrupted.

    Also further values of each image ``[B]``: ``distance``, for a minimum-norm attack.
    """
    x, y, index = batch
    if isinstance(attack, Cascade):
        _follow(attack, saved, advance)
        x_adv = attack(x, y, index=index)
        if attack.outcome is not None:
            notes.update(attack.outcome.notes)
        return x_adv, {}
    name = f"{number}-{kind}"
    state = None if saved is None else saved.load(name, x.device)
    if saved is not None and state is not None:
        tensors, attack_notes = state
        what = f"the images saved in {saved.path(name)}"
        check_ball(tensors["x_adv"], x, attack.eps, attack.norm, what)
        notes.update(attack_notes)
        return tensors.pop("x_adv"), tensors
    x_adv = attack(x, y, index=index)
    check_ball(x_adv, x, attack.eps, attack.norm, f"the images of the attack {kind}")
    attack_notes = dict(getattr(attack, "notes", {}))
    notes.update(attack_notes)
    distances = attack.distances if isinstance(attack, FMN) else None
    extra = {} if distances is None else {"distance": distances}
    if saved is not None:
        saved.save(name, {"x_adv": x_adv, **extra}, attack_notes)
    return x_adv, extra

"""Runs a model over a data set, clean and attacked."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from awnet import rng
from awnet._version import __version__
from awnet.attacks import Attack, Cascade, Suite, frozen, list_attacks, named_attack
from awnet.attacks.base import check_ball, check_values, device_of
from awnet.attacks.probe import first_logits
from awnet.attacks.registry import TRANSFERRED, BudgetName
from awnet.attacks.saved import Saved, digest, model_fingerprint
from awnet.data.dataset import Batch, Dataset
from awnet.defaults import standard_defaults
from awnet.devices import resolve_device
from awnet.distributed import Ranks
from awnet.evaluation.detection import CONTROLS, SIGN, detection
from awnet.evaluation.filters import filter_means
from awnet.evaluation.precision import SAID, PrecisionName, evaluated
from awnet.evaluation.report import (
    Array,
    AttackResult,
    Report,
    attack_result,
    check_name,
    compare,
    flags,
)
from awnet.evaluation.sanity import Check, sanity_table, union_check
from awnet.evaluation.statistics import auc, wilson_interval
from awnet.evaluation.store import locked
from awnet.evaluation.teachers import KINDS, Found, Source, find_teachers
from awnet.evaluation.union import WorstCase, remaining
from awnet.files import expanded, read_json, sweep
from awnet.models.rdi import has_exits
from awnet.models.registry import config_of, name_of
from awnet.nn import Steering, has_router, observe, route, routed_networks
from awnet.precision import computed_in, full_precision
from awnet.provenance import environment
from awnet.run_folder import RunFolder
from awnet.scalars import check_integer
from awnet.terminal import safe_console
from awnet.text import visible

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[str, int], None]
T = TypeVar("T")

CLEAN, UNION = "clean", "union"
REFERENCE = 256  # images over which the attack on a frozen router averages ω


@full_precision()
@standard_defaults()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    attacks: Sequence[str] | Mapping[str, Attack] = ("fgsm", "pgd_sat", "pgd_trades", "cw"),
    *,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
    limit: int | None = None,
    budget: BudgetName = "standard",
    queries: int | None = None,
    precision: PrecisionName = "float32",
    teacher: nn.Module | None = None,
    teachers: Sequence[Source] | Mapping[str, Source] | None = None,
    surrogates: Mapping[str, nn.Module] | None = None,
    allow_missing: bool = False,
    run: str | Path | None = None,
    sanity: bool | None = None,
    progress: bool = False,
    out: str | Path | None = None,
    name: str = "default",
    compared_with: Mapping[str, Report] | None = None,
    selected_on: str | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Accuracy of ``model`` on clean and adversarial images: A_nat, A_adv and A_w (Eq. 23) for each attack.

    With ``"union"`` among the attacks the report's headline is the worst case, image by image, over all that
    are named and all that the union adds; what an attack breaks is not attacked again. A model with a router
    (``model.route``) is also asked how well its type logits tell each attack, and noise of the same size as a
    control, from clean images. Everything runs in float32 with parameters frozen: the caller's autocast and
    all of torch's settings that allow less, TF32 say, are off meanwhile. The report says what the model
    computes in if its own code asks for another dtype.
    What the model computes when called decides: it runs itself, but for a model that is exactly as the
    package made it, which a frozen copy replaces; the copy is compared with the model on one batch first. The
    report's ``settings["runs_on"]`` says which of the two ran, and why.
    A network with side exits (``rdi_resnet38``) is asked which exit each image takes.

    Args:
        model: images [0, 1] → logits ``[B, K]``, in any mode; it is left as it was found.
        dataset: whose threat model gives eps and step sizes.
        attacks: names that :func:`awnet.attacks.list_attacks` knows, or your own attacks by name.
        batch_size: images a forward pass; changes results by rounding only (but for AutoAttack's attacks,
            whose noise goes by the batch).
        seed: keys the attacks' random starts, the noise and the bootstrap.
        device: where the model is; None takes it from its parameters. The images follow it.
        limit: evaluate a stratified part of at most so many images.
        budget: what the attacks beyond the paper's four may spend; ``"smoke"`` is for trying things out.
        queries: Square's; None takes the budget's.
        precision: ``"bfloat16"`` is for trying things out faster: the report marks its figures, and neither
            calls them the headline nor lets them be exported or compared with those of float32.
        teacher: the robust teacher, for ``adaptive_paper``; None takes the run's. With a run that recorded
            one it is checked as in ``teachers``.
        teachers: where the run's teachers are now, if they are not where the run's record says: modules, run
            folders or ``.safetensors`` files, by kind or in the order (clean, robust). Their weights must be
            those that the run recorded.
        surrogates: models whose images the union replays, by name, beside the run's teachers.
        allow_missing: what the union cannot contain because a teacher of the run is missing is left out, and
            the report flags its headline; otherwise that is an error.
        run: the run folder that the model is of, for its record of teachers; None takes ``out``.
        sanity: whether to add the sanity table; None adds it where the union is measured.
        progress: show a bar; where the output is no terminal, print a line a minute.
        out: a run folder: writes ``evaluations/<name>/`` there and the newest report as ``report.json``. An
            evaluation that is interrupted goes on from ``evaluations/<name>/state`` when called again.
        name: of the evaluation, a folder's name.
        compared_with: reports of other models on the same images, by name; paired differences are added.
        selected_on: split that chose the checkpoint; None reads it from ``config.json`` in ``out``, if there.
        ranks: processes that share the work, from :func:`awnet.distributed.joined`, each of which calls
            this with the same arguments. Rank r of R takes the batches r, r + R, …; the sanity table is one
            batch more.

    Returns:
        The :class:`Report`, on every rank; the same bits for the same arguments on the same machine with as
        many threads, interrupted or not, on any number of ranks (but for the last bits of the mean ω that is
        in ``filter_means``: it is summed in float64, rank by rank).

    Raises:
        TypeError, ValueError: an argument is not as described, or the model does not fit the data set.
        ValueError: a teacher that an attack needs is missing or is not the one that the run learnt from.
        BlockingIOError: another process makes the evaluation ``name`` in ``out``.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    check_name(name)
    batch_size, seed = check_integer("batch_size", batch_size, 1), check_integer("seed", seed)
    limit = None if limit is None else check_integer("limit", limit, 1)
    queries = None if queries is None else check_integer("queries", queries, 0)
    out = None if out is None else expanded(out)
    dataset, classes = _ready(model, dataset, batch_size, device)
    chosen = evaluated(model, precision, next(dataset.batches(min(batch_size, REFERENCE))).x)
    live, model = model, chosen.module
    computes = _precision(model, dataset, precision)
    if limit is not None:
        dataset = dataset.subset(limit, seed=0)
    other_reports = dict(compared_with or {})
    for other, report in other_reports.items():
        if not isinstance(report, Report):
            raise TypeError(f"compared_with[{other!r}] must be a Report, got {type(report).__name__}")
    run = out if run is None else run
    needed = _teacher_attacks(attacks, sanity)
    found = find_teachers(run, dataset.device, teachers, teacher) if needed else Found()
    others = {name.replace(" ", "_"): one for name, one in (surrogates or {}).items()}
    missing = _missing(model, found, needed, others, allow_missing)
    ranks = ranks or Ranks(dataset.device)
    selected_on = _selected_on(run) if selected_on is None else selected_on
    with _alone(out, name, ranks) as place:
        suite = Suite(
            classes=classes,
            budget=budget,
            queries=queries,
            teacher=None if "robust" in found.missing else found.models.get("robust", teacher),
            surrogates={f"{kind}_teacher": one for kind, one in found.models.items()} | others,
            reference=next(dataset.batches(REFERENCE)).x,
        )
        plan = _Plan(model, dataset, _chosen(attacks, model, dataset, seed, suite), seed)
        saved = None
        if place is not None or ranks.size > 1:
            key = _key(live, dataset, plan.attacks, batch_size, suite, f"{precision} {chosen.runs_on}")
            _check_same(key, ranks)
        if place is not None:
            saved = Saved(_state_folder(name), key, place)
            ranks.first(partial(_prepare, saved))
        own = _Share(plan)
        batches = -(-len(dataset) // batch_size)
        mine = range(ranks.rank, batches, ranks.size)
        with (
            frozen(model),
            torch.no_grad(),
            _progress(progress and ranks.rank == 0, len(mine) * len(plan.kinds)) as advance,
        ):
            for number, batch in islice(enumerate(dataset.batches(batch_size)), ranks.rank, None, ranks.size):
                own.measure(plan, number, batch, saved, advance)
            checked = plan.union is not None if sanity is None else sanity
            if checked and batches % ranks.size == ranks.rank:  # one batch more
                advance("sanity", 0)
                own.table, own.curves = _sanity(model, dataset, suite, seed, batch_size, saved)
            if ranks.size > 1:
                advance("other ranks", 0)
            shares = ranks.gathered(own.on_host())

        def conclude() -> Report:
            report = _report(
                plan,
                live,
                _Share.of_all(plan, shares),
                {
                    "seed": seed,
                    "batch_size": batch_size,
                    "limit": limit,
                    "budget": budget,
                    "precision": computes,
                    "class_names": list(dataset.classes),
                    "runs_on": chosen.runs_on,
                },
                selected_on,
                missing,
            )
            if chosen.flag is not None:
                report.flags.append(chosen.flag)
            unknown = teacher is None and not found.models and not others and not found.recorded
            if plan.union is not None and unknown and (run is not None or config_of(live) is not None):
                report.flags.append(
                    "no training record was found: if the model learnt from teachers, the union lacks the "
                    "attacks that use them (evaluate its run folder, or pass run= or teachers=)"
                )
            report.flags += [
                f"the union of {other}, which this is compared with, is incomplete: it lacks "
                f"{', '.join(value.missing)}"
                for other, value in other_reports.items()
                if value.missing
            ]
            report.compared_with = {
                other: compare(report, value, seed) for other, value in other_reports.items()
            }
            if place is not None and saved is not None:
                place.during(lambda: report.publish(place.path, name))
                saved.remove()
                saved.folder.parent.rmdir()
            return report

        return ranks.first(conclude)


@standard_defaults()
def accuracy(
    model: nn.Module, dataset: Dataset, batch_size: int = 256, device: str | torch.device | None = None
) -> Tensor:
    """Whether each clean image is classified correctly: bool ``[N]`` on the CPU, in the data set's order."""
    return _correct(model, dataset, None, batch_size, device)


@standard_defaults()
def robust_correct(
    model: nn.Module,
    dataset: Dataset,
    attack: Attack | str,
    *,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> Tensor:
    """Whether each image is classified correctly once attacked: bool ``[N]`` on the CPU.

    ``attack`` is an attack on this model (or on another one: a transfer attack), or the name of one.
    """
    check_values(model)
    if isinstance(attack, str):
        attack = named_attack(attack, model, dataset.threat_model)
    return _correct(model, dataset, attack, batch_size, device)


@full_precision()
def _correct(
    model: nn.Module,
    dataset: Dataset,
    attack: Attack | None,
    batch_size: int,
    device: str | torch.device | None,
) -> Tensor:
    dataset, _ = _ready(model, dataset, batch_size, device)
    found, finite = [], []
    with frozen(model), torch.no_grad():
        for x, y, index in dataset.batches(batch_size):
            logits = model(x if attack is None else attack(x, y, index=index))
            found.append(logits.argmax(1) == y)
            finite.append(logits.isfinite().all(1))
    _check_finite(torch.cat(finite).cpu().numpy(), CLEAN if attack is None else "adversarial")
    return torch.cat(found).cpu()


class _Plan:
    """What a model has to face, and how it is asked."""

    def __init__(self, model: nn.Module, dataset: Dataset, attacks: Mapping[str, Attack], seed: int) -> None:
        self.model, self.dataset, self.seed = model, dataset, seed
        self.chosen = {kind: attack for kind, attack in attacks.items() if kind != UNION}
        self.union = attacks.get(UNION)
        self.rest = None if self.union is None else remaining(self.union, self.chosen)
        self.first = [*self.chosen, *([] if self.rest is None else self.rest.members)]
        """Attacks in the order of their numbers in the worst case's ``broken_by``."""
        self.routed = _has_type_head(model, dataset)
        self.attacks = self.chosen | ({} if self.union is None else {UNION: self.union})
        self.attacked = list(self.attacks)
        self.kinds = [CLEAN, *self.attacked, *(CONTROLS if self.routed else ())]


class _Share:
    """What one rank found: batch by batch, and in the sanity table if that was its to make."""

    def __init__(self, plan: _Plan) -> None:
        rounded = [f"{kind}_rounded" for kind in plan.attacked]
        self.seen = {kind: _Seen() for kind in [*plan.kinds, *rounded]}
        self.notes: dict[str, Counter[str]] = {kind: Counter() for kind in plan.attacked}
        self.examples = _Examples()
        self.table: list[Check] = []
        self.curves: dict[str, Any] = {}

    def measure(self, plan: _Plan, number: int, batch: Batch, saved: Saved | None, advance: Advance) -> None:
        """Batch ``number`` of the data set, clean, attacked and with noise."""
        model, dataset = plan.model, plan.dataset
        x, y, index = batch
        worst = None
        for kind in plan.kinds:
            if kind in CONTROLS:
                images = _noisy(x, index, dataset.threat_model.eps, plan.seed, kind)
            elif kind == UNION:
                assert worst is not None
                if plan.rest is not None:
                    _attend(plan.rest, saved, advance)
                worst.attack(plan.rest, x, y, index)
                images = worst.x_adv
            elif kind == CLEAN:
                images = x
            else:
                images = _attacked(plan.chosen[kind], kind, number, batch, saved, self.notes[kind], advance)
            # with x's strides also where they were read back: these choose a convolution's path
            images = torch.empty_like(x).copy_(images)
            values, scales = _observe(model, images, y, logits=kind not in CONTROLS)
            if kind == CLEAN:
                worst = WorstCase(x, values["correct"], plan.first)
            elif kind in plan.chosen:
                assert worst is not None
                worst.add(kind, images, values["correct"])
                outcome = getattr(plan.chosen[kind], "outcome", None)
                if outcome is not None:
                    values["broken_by"] = outcome.broken_by
            elif kind == UNION:
                assert worst is not None
                values["broken_by"] = worst.judged(values["correct"])
            if kind == CLEAN:
                before = values["prediction"]
            elif plan.attacked and kind == plan.attacked[-1]:
                self.examples.add(x, images, y, before, values["prediction"])
            self.seen[kind].add(values, scales)
            if plan.routed and kind in plan.attacked:
                grid = (images * dataset.max_value).round() / dataset.max_value
                self.seen[f"{kind}_rounded"].add(*_observe(model, grid, y, logits=False))
            advance(kind, 1)

    def on_host(self) -> _Share:
        """The same in the host's memory, where other processes can have it from."""
        for seen in self.seen.values():
            seen.to_host()
        return self

    @classmethod
    def of_all(cls, plan: _Plan, shares: Sequence[_Share]) -> _Share:
        """The whole from the ranks' shares, batches in the data set's order."""
        whole = cls(plan)
        for kind in whole.seen:
            whole.seen[kind] = _Seen.of_all([share.seen[kind] for share in shares])
        for kind, notes in whole.notes.items():
            for share in shares:
                notes.update(share.notes[kind])
        whole.examples.batches = _in_turn([share.examples.batches for share in shares])
        for share in shares:
            whole.table += share.table
            whole.curves |= share.curves
        return whole


def _in_turn(parts: Sequence[Sequence[T]]) -> list[T]:
    """One of each part, then the next of each: batches as they were dealt to the ranks, in order again."""
    return [part[turn] for turn in range(len(parts[0])) for part in parts if turn < len(part)]


class _Examples:
    """The first images that the last attack broke, for a figure; kept batch by batch."""

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


class _Seen:
    """What a model said of one kind of image, batch by batch, kept on its device until the end."""

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
        self.batches = [{what: value.cpu() for what, value in batch.items()} for batch in self.batches]
        self.scales = [scale.cpu() for scale in self.scales]

    @classmethod
    def of_all(cls, parts: Sequence[_Seen]) -> _Seen:
        whole = cls()
        whole.batches = _in_turn([part.batches for part in parts])
        for part in parts:
            if part.scales:
                whole._add_scales(part.scales)
        whole.count = sum(part.count for part in parts)
        return whole

    def arrays(self) -> dict[str, Array]:
        return {what: torch.cat([batch[what] for batch in self.batches]).numpy() for what in self.batches[0]}

    def mean_scales(self) -> list[Tensor]:
        return [scale / self.count for scale in self.scales]


def _report(
    plan: _Plan,
    live: nn.Module,
    found: _Share,
    settings: dict[str, Any],
    selected_on: str | None,
    missing: dict[str, str],
) -> Report:
    """What was found, as figures."""
    dataset, seed, seen, table = plan.dataset, plan.seed, found.seen, list(found.table)
    per_sample: dict[str, Array] = {
        "index": dataset.index.cpu().numpy(),
        "label": dataset.labels.cpu().numpy(),
    }
    for kind in [kind for kind in seen if seen[kind].batches]:
        per_sample |= {f"{kind}_{what}": values for what, values in seen[kind].arrays().items()}
        _check_finite(per_sample.pop(f"{kind}_finite", None), kind)
    if plan.union is not None and "aa" in plan.chosen:
        table.append(union_check(per_sample["aa_correct"], per_sample["union_correct"]))

    clean = per_sample["clean_correct"]

    def result(kind: str, settings: dict[str, Any], names: Sequence[str]) -> AttackResult:
        outcome = attack_result(clean, per_sample[f"{kind}_correct"], settings, seed)
        if f"{kind}_broken_by" in per_sample:
            outcome.broken_first_by = _broken_first_by(per_sample[f"{kind}_broken_by"], names)
        outcome.warnings = dict(sorted(found.notes[kind].items()))
        return outcome

    report = Report(
        model=name_of(live),
        dataset=dataset.name,
        split=dataset.split,
        n=len(dataset),
        eps=dataset.threat_model.eps,
        clean_accuracy=int(clean.sum()) / len(clean),
        clean_interval_95=wilson_interval(int(clean.sum()), len(clean)),
        attacks={
            kind: result(kind, attack.settings, list(attack.members) if isinstance(attack, Cascade) else [])
            for kind, attack in plan.chosen.items()
        },
        union=None
        if plan.union is None
        else result(UNION, plan.union.settings | {"after": list(plan.chosen)}, plan.first),
        router_auc={
            kind: auc(per_sample["clean_type_score"], per_sample[f"{kind}_type_score"])
            for kind in plan.kinds
            if plan.routed and kind != CLEAN
        },
        detection=detection(per_sample, plan.attacked, seed) if plan.routed else {},
        sanity=[asdict(check) for check in table],
        curves=found.curves,
        flags=[],
        settings=settings
        | {
            "source": dataset.source,
            "classes": dataset.num_classes,
            "fingerprint": dataset.fingerprint(),
            "robust_accuracy": "of adversarial images made from all images, also those misclassified clean",
        },
        environment=environment(dataset.device),
        selected_on=selected_on,
        missing=missing,
        per_sample=per_sample,
        examples=found.examples.arrays(),
        filter_means=filter_means(
            live,
            next(dataset.batches(1)).x,
            {kind: seen[kind].mean_scales() for kind in [CLEAN, *plan.attacked] if plan.routed},
        ),
    )
    if has_exits(live):
        report.exits = {
            kind: _exit_use(live, per_sample[f"{kind}_exit"], dataset.image_size)
            for kind in [CLEAN, *plan.attacked]
        }
    report.flags = flags(report)
    return report


def _observe(
    model: nn.Module, x: Tensor, y: Tensor, *, logits: bool
) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
    """One pass: per-sample values ``[B]``, and the router's filter scales where there is a router."""
    found: dict[str, Tensor] = {}
    steering = Steering()
    if logits:
        output = observe(model, x, steering)
    elif has_router(model):
        steering.routings.append(route(model, x))
    routing = steering.routings[0] if len(steering.routings) == 1 else None
    if routing is not None and routing.type_logits is not None:
        # the difference of the two logits orders images as p does, without saturating
        found["type_score"] = (routing.type_logits[:, 1] - routing.type_logits[:, 0]).float()
        found["p_clean"] = routing.p_clean.float()
    if logits and has_exits(model):
        found["exit"] = model.exit_of(x)  # type: ignore[operator]
    if logits:
        found["prediction"] = output.argmax(1)
        found["correct"] = found["prediction"] == y
        found["finite"] = output.isfinite().all(1)
    return found, [] if routing is None else routing.filter_scales


def _exit_use(model: nn.Module, exit_of: Array, image_size: tuple[int, int]) -> dict[str, Any]:
    cost = np.array(model.flops(image_size))  # type: ignore[operator]
    return {
        "mean_exit": float(exit_of.mean()) + 1,
        "shares": [float((exit_of == e).mean()) for e in range(len(cost))],
        "mean_flops": float(cost[exit_of].mean()),
        "full_flops": int(cost[-1]),
    }


def _noisy(x: Tensor, index: Tensor, eps: float, seed: int, kind: str) -> Tensor:
    noise = rng.uniform(rng.key(kind.replace("_", " "), seed), index, x.shape[1:]).mul_(2).sub_(1)
    if kind == SIGN:
        noise = noise.sign()
    return torch.add(x, noise, alpha=eps).clamp_(0, 1)


def _attend(attack: Attack, saved: Saved | None, advance: Advance) -> None:
    """Lets a cascade keep its state, and say which member runs."""
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
) -> Tensor:
    """The batch's adversarial images, made now or by the evaluation that was interrupted."""
    x, y, index = batch
    if isinstance(attack, Cascade):
        _attend(attack, saved, advance)
        x_adv = attack(x, y, index=index)
        if attack.outcome is not None:
            notes.update(attack.outcome.notes)
        return x_adv
    found = None if saved is None else saved.load(f"{number}-{kind}", x.device)
    if saved is not None and found is not None:
        check_ball(found[0]["x_adv"], x, attack.eps, f"the images saved in {saved.path(f'{number}-{kind}')}")
        notes.update(found[1])
        return found[0]["x_adv"]
    x_adv = attack(x, y, index=index)
    check_ball(x_adv, x, attack.eps, f"the images of the attack {kind}")
    noted = dict(getattr(attack, "notes", {}))
    notes.update(noted)
    if saved is not None:
        saved.save(f"{number}-{kind}", {"x_adv": x_adv}, noted)
    return x_adv


def _sanity(
    model: nn.Module, dataset: Dataset, suite: Suite, seed: int, batch_size: int, saved: Saved | None
) -> tuple[list[Check], dict[str, Any]]:
    found = None if saved is None else saved.load("sanity")
    if found is not None:
        return [Check(**check) for check in found[1]["table"]], found[1]["curves"]
    table, curves = sanity_table(model, dataset, suite, seed=seed, batch_size=batch_size)
    if saved is not None:
        saved.save("sanity", {}, {"table": [asdict(check) for check in table], "curves": curves})
    return table, curves


def _key(
    model: nn.Module,
    dataset: Dataset,
    attacks: Mapping[str, Attack],
    batch_size: int,
    suite: Suite,
    runs: str,
) -> str:
    """Of all that adversarial images follow from; the same on every rank."""
    parts: list[Any] = [model_fingerprint(model), dataset.fingerprint(), batch_size, suite.budget, runs]
    parts += [suite.queries, {name: model_fingerprint(one) for name, one in suite.surrogates.items()}]
    for name, attack in attacks.items():
        parts += [name, attack.settings, model_fingerprint(attack.model)]
    device = dataset.device  # each rank has another GPU: what counts is its kind
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return digest(__version__, torch.__version__, kind, *parts)


@contextmanager
def _alone(out: Path | None, name: str, ranks: Ranks) -> Iterator[RunFolder | None]:
    """Holds the lock of the evaluation's folder, on rank 0, for a block of code; yields the run folder."""
    with ExitStack() as held:

        def lock() -> None:
            if out is not None:
                held.enter_context(locked(out / "evaluations" / name))

        ranks.first(lock)
        yield None if out is None else held.enter_context(_followed(out, ranks))


def _followed(out: Path, ranks: Ranks) -> RunFolder:
    def warn(text: str) -> None:
        if ranks.rank == 0:
            logging.getLogger("awnet").warning(text)

    out.mkdir(parents=True, exist_ok=True)  # on a rank with a file system of its own
    return RunFolder(out, warn, "evaluation", "evaluate it there: what was done is not done again")


def _state_folder(name: str) -> Path:
    """Of an interrupted evaluation, in its run folder."""
    return Path("evaluations", name, "state")


def _check_same(key: str, ranks: Ranks) -> None:
    keys = ranks.gathered(key)
    others = [rank for rank, other in enumerate(keys) if other != keys[0]]
    if others:
        raise ValueError(
            f"all ranks must evaluate the same, but rank {others[0]} has another model, images, attacks, "
            "versions or kind of device than rank 0: start all with the same arguments"
        )


def _prepare(saved: Saved) -> None:
    """Makes the folder of ``saved``; what another model, data set or attack left next to it is deleted."""
    sweep(saved.folder.parent.parent)
    if saved.folder.parent.is_dir():
        for other in saved.folder.parent.iterdir():
            if other != saved.folder:
                shutil.rmtree(other)
    saved.folder.mkdir(parents=True, exist_ok=True)


def _broken_first_by(broken_by: Array, names: Sequence[str]) -> dict[str, int]:
    counts = {name: int((broken_by == number).sum()) for number, name in enumerate(names)}
    return {name: count for name, count in counts.items() if count}


def _teacher_attacks(
    attacks: Sequence[str] | Mapping[str, Attack], sanity: bool | None
) -> dict[str, tuple[str, ...]]:
    """What uses a run's teacher, by the teacher's kind; empty where nothing does."""
    named = set() if isinstance(attacks, Mapping) else set(attacks)
    transfers = {UNION} & named or sanity
    needed: dict[str, tuple[str, ...]] = {}
    for kind in KINDS:
        uses = ["adaptive_paper"] if kind == "robust" and named & {UNION, "adaptive_paper"} else []
        uses += [f"transfer_{kind}_teacher_{attack}" for attack in TRANSFERRED] if transfers else []
        if uses:
            needed[kind] = tuple(uses)
    return needed


def _missing(
    model: nn.Module,
    found: Found,
    needed: Mapping[str, tuple[str, ...]],
    surrogates: Mapping[str, nn.Module],
    allowed: bool,
) -> dict[str, str]:
    """The union's attacks that cannot run, and why; ValueError unless leaving them out is ``allowed``."""
    taken = [name for name in surrogates if name in {f"{kind}_teacher" for kind in KINDS}]
    if taken:
        raise ValueError(f"surrogates must not be called {taken[0]}: pass the run's teachers as teachers=")
    missing: dict[str, str] = {}
    for kind, uses in needed.items():
        if kind in found.missing:
            missing |= dict.fromkeys(uses, f"the {kind} teacher is missing: {found.missing[kind]}")
    mend = "Say where the teachers are now (--teachers, teachers=), or leave" if missing else "Leave"
    count = len(routed_networks(model))
    if count > 1 and any(use.startswith("transfer") for uses in needed.values() for use in uses):
        reason = f"the model holds {count} networks with a router, and attacks on the router need exactly one"
        missing |= dict.fromkeys(("two_phase", "forced", "softened"), reason)
    if missing and not allowed:
        reasons = "; ".join(dict.fromkeys(missing.values()))
        raise ValueError(
            f"{', '.join(missing)} cannot run: {reasons}. {mend} these attacks out, which the report's "
            "headline then says (--allow-missing, allow_missing=True)"
        )
    return missing


def _ready(
    model: nn.Module, dataset: Dataset, batch_size: int, device: str | torch.device | None
) -> tuple[Dataset, int]:
    """The data set on the model's device and the model's K, after checking that the three fit."""
    check_values(model)
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a Dataset, of load_dataset say, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"dataset is empty: {dataset.name} {dataset.split} holds no image")
    where = device_of(model)
    if device is not None:
        wanted = resolve_device(device) if where is None else torch.device(device)
        if where is not None and (wanted.type, wanted.index or 0) != (where.type, where.index or 0):
            raise ValueError(
                f"device is {wanted}, but the model is on {where}: call model.to({str(wanted)!r}) first"
            )
        where = where or wanted
    dataset = dataset if where is None else dataset.to(where)
    logits = first_logits(model, next(dataset.batches(1)).x, dataset.num_classes, dataset.name)
    return dataset, logits.shape[1]


def _chosen(
    attacks: Sequence[str] | Mapping[str, Attack], model: nn.Module, dataset: Dataset, seed: int, suite: Suite
) -> dict[str, Attack]:
    if isinstance(attacks, str):
        raise TypeError(
            f"attacks must be a sequence of names, got the string {attacks!r}: write [{attacks!r}]"
        )
    if isinstance(attacks, Mapping):
        for name, attack in attacks.items():
            check_name(name)
            if name in (CLEAN, *CONTROLS) or name.endswith("_rounded"):
                raise ValueError(f"attacks must not be called {name!r}: the report uses that name itself")
            if not isinstance(attack, Attack):
                raise TypeError(f"attacks[{name!r}] must be an Attack, got {type(attack).__name__}")
        return dict(attacks)
    names = list(attacks)
    if len(set(names)) < len(names):
        raise ValueError(f"attacks must be named once each, got {names}")
    for name in names:
        if name not in list_attacks():
            raise ValueError(f"attacks must be among {', '.join(list_attacks())}, got {name!r}")
    return {name: named_attack(name, model, dataset.threat_model, seed, suite) for name in names}


def _has_type_head(model: nn.Module, dataset: Dataset) -> bool:
    if not has_router(model):
        return False
    with frozen(model), torch.no_grad():
        return route(model, next(dataset.batches(1)).x).type_logits is not None


def _precision(model: nn.Module, dataset: Dataset, precision: PrecisionName) -> str:
    """What the report says of the arithmetic: that of a pass, whatever was requested."""
    with frozen(model):
        dtype = computed_in(model, next(dataset.batches(1)).x)
    name = str(dtype).removeprefix("torch.")
    requested = "bfloat16" if precision == "bfloat16" else "float32"
    return SAID[precision] if name == requested else f"{name}, in the model's own code"


def _check_finite(finite: Array | None, kind: str) -> None:
    if finite is not None and not finite.all():
        raise FloatingPointError(
            f"the model's logits are NaN or infinite for {int((~finite).sum())} of {len(finite)} {kind} "
            "images: an accuracy would mean nothing; look at its weights"
        )


def _selected_on(out: str | Path | None) -> str | None:
    path = None if out is None else Path(out) / "config.json"
    if path is None or not path.is_file():
        return None
    config = read_json(path)
    found = config.get("selected_on") if isinstance(config, dict) else None
    return found if isinstance(found, str) else None


HEARTBEAT_SECONDS = 60.0


def _heartbeat(console: Console, total: int) -> Advance:
    """Prints what runs and how far it is, at most once in :data:`HEARTBEAT_SECONDS`."""
    begun = said = time.monotonic()
    done = 0

    def advance(kind: str, by: int) -> None:
        nonlocal said, done
        done += by
        now = time.monotonic()
        if now - said >= HEARTBEAT_SECONDS:
            said = now
            console.print(f"evaluate: {kind}, {done} of {total} batches, {now - begun:.0f} s", markup=False)

    return advance


@contextmanager
def _progress(show: bool, total: int) -> Iterator[Advance]:
    """Yields a function to call with what runs and the number of steps that are done by now.

    A bar on a terminal; elsewhere a line a minute, so that a log shows that the evaluation is alive.
    """
    if not show:
        yield lambda kind, by: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield _heartbeat(console, total)
        return

    columns = (
        TextColumn("evaluate {task.description:<14}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=safe_console(), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda kind, by: bar.update(task, advance=by, description=visible(kind))

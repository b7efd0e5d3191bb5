"""Evaluates a model on a data set: accuracy on clean and adversarial images, and everything in a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from awnet.attacks import Attack, Stochastic, Suite, frozen, named_attack
from awnet.attacks.base import check_values, device_of
from awnet.attacks.filtered import filtered
from awnet.attacks.graphed_steps import captures_attacks, graphed_steps
from awnet.attacks.probe import first_logits
from awnet.attacks.registry import TRANSFERRED, BudgetName, check_attack_name
from awnet.attacks.saved import Saved
from awnet.attacks.stochastic import decision, seeded
from awnet.data.dataset import Dataset
from awnet.defaults import standard_defaults
from awnet.devices import resolve_device
from awnet.distributed import Ranks
from awnet.evaluation.collect import CLEAN, UNION, Collected, Plan
from awnet.evaluation.compare import check_same_images, compare
from awnet.evaluation.detection import CONTROLS
from awnet.evaluation.parts import gated_parts
from awnet.evaluation.precision import COPY, DESCRIPTIONS, PrecisionName, in_bfloat16, prepare
from awnet.evaluation.progress import progress_bar
from awnet.evaluation.randomness import Examined, examine, ignoring_randomness
from awnet.evaluation.report import Report, check_name
from awnet.evaluation.resume import (
    check_same_key,
    computed_once,
    evaluation_lock,
    load_part,
    mark_part,
    parts_folder,
    prepare_state,
    state_folder,
    state_key,
)
from awnet.evaluation.sanity import sanity_table
from awnet.evaluation.summarize import build_report, check_finite
from awnet.evaluation.teachers import KINDS, Source, Teachers, find_teachers
from awnet.files import expanded, read_json
from awnet.models.registry import config_of
from awnet.nn import has_router, routed_networks
from awnet.precision import computed_in, full_precision
from awnet.scalars import check_integer

REFERENCE = 256  # number of images over which the ``forced`` attack averages ω


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
    filter: Literal["bfloat16"] | None = None,
    capture: bool | Literal["auto"] = False,
    eot: int | None = None,
    teacher: nn.Module | None = None,
    teachers: Sequence[Source] | Mapping[str, Source] | None = None,
    surrogates: Mapping[str, nn.Module] | None = None,
    allow_missing: bool = False,
    run: str | Path | None = None,
    sanity: bool | None = None,
    parts: bool | None = None,
    progress: bool = False,
    out: str | Path | None = None,
    name: str = "default",
    part_of: str | None = None,
    compared_with: Mapping[str, Report] | None = None,
    selected_on: str | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Accuracy of ``model`` on clean and adversarial images: A_nat, A_adv and A_w (Eq. 23) for each attack.

    With ``"union"`` among the attacks the report's headline is the worst case per image over all named
    attacks and all attacks that the union adds; an image that one attack breaks is not attacked again. For a
    model with a router (``model.route``) the report also has the AUC of the type logits, clean images against
    each attack and, as a control, against noise of the same size.

    Everything runs in float32 with frozen parameters: the caller's autocast and torch settings that allow
    lower precision, such as TF32, are disabled. If the model's code uses another dtype, the report says so.
    An unmodified model of this package is replaced by an inference copy, which is first compared with the
    model on one batch; any other model is run directly. The report's ``settings["runs_on"]`` says which of
    the two ran, and why. For a network with side exits (``rdi_resnet38``) the report has the exit of each
    image.

    Args:
        model: images [0, 1] → logits ``[B, K]``, in train or eval mode; it is not changed.
        dataset: the images; its threat model gives norm, eps and step sizes.
        attacks: names that :func:`awnet.attacks.named_attack` knows, or your own attacks by name.
        batch_size: images per forward pass; results depend on it only by rounding (AutoAttack's attacks also
            draw their noise per batch).
        seed: seed of the attacks' random starts, the noise and the bootstrap.
        device: device of the model; None takes it from the parameters. The images are moved there.
        limit: evaluate at most this many images, stratified by class.
        budget: budget of the attacks beyond the paper's four; ``"smoke"`` only shows that they run.
        queries: queries of Square; None takes the budget's.
        precision: ``"bfloat16"`` is for quick experiments: the report marks its numbers, has no headline, and
            can neither be exported nor compared with float32 reports.
        filter: ``"bfloat16"`` runs each named attack on a bfloat16 copy first and in float32 on the images
            that survive (:class:`awnet.attacks.FilteredAttack`). All images are classified in float32. It
            saves time if the robust accuracy is low and bfloat16 is fast.
        capture: replay the steps of PGD and CW attacks, given by name, as CUDA graphs, so that the host
            launches all their kernels at once (:mod:`awnet.attacks.graphed_steps`). The images are the same;
            the second full batch is attacked with and without the graph to check that. CUDA and inference
            copies only; ``"auto"`` captures where both hold. If the capture fails, the attack runs without
            it, with a warning. Each attack keeps the memory of a step of a batch.
        eot: forward passes per gradient of a stochastic model, one whose logits for the same images differ
            between two forward passes; None takes the budget's, 20 for the standard one. Such a model is
            evaluated as a :class:`awnet.attacks.Stochastic`: its random numbers are seeded for each batch,
            AutoAttack is its rand version, and the predicted class is that of the largest mean probability
            over 20 forward passes. The report says so. More than 1 evaluates any model in this way.
        teacher: the robust teacher, for ``adaptive_paper``; None takes the run's. It is checked as in
            ``teachers`` if the run recorded one.
        teachers: the run's teachers, if they are no longer where the run's record says: modules, run folders
            or ``.safetensors`` files, by kind or in the order (clean, robust). Their weights must match the
            record.
        surrogates: models whose adversarial images the union replays, by name, as well as the run's teachers.
        allow_missing: leave out attacks of the union that need a missing teacher, and flag the report's
            headline; otherwise a missing teacher is an error.
        run: the run folder of the model, for its record of teachers; None takes ``out``.
        sanity: whether to compute the sanity table; None computes it with ``"union"``.
        parts: whether to measure the parts of a network with a router (:func:`gated_parts`): about 240
            forward and 220 backward passes of at most 200 images at the standard budget. None measures them
            with ``"union"``, whose attacks take thousands of passes of every image.
        progress: show a progress bar, or print a line per minute if the output is not a terminal.
        out: a run folder: writes ``evaluations/<name>/`` there, and the newest report as ``report.json``. An
            interrupted evaluation resumes from ``evaluations/<name>/state`` when it is called again.
        name: name of the evaluation and of its folder.
        part_of: name of an evaluation of several parts, such as :func:`evaluate_norms`: a part that was
            completed is loaded, until the whole is complete.
        compared_with: reports of other models on the same images, by name, to add paired differences with.
        selected_on: split that selected the checkpoint; None reads it from ``config.json`` in ``out``.
        ranks: processes that share the work, from :func:`awnet.distributed.joined`; each calls this function
            with the same arguments. Rank r of R evaluates the batches r, r + R, …; the sanity table and the
            parts count as one more batch each.

    Returns:
        The :class:`Report`, on every rank. It is bit-identical for the same arguments on the same machine
        with the same number of threads, interrupted or not, on any number of ranks (except the last bits of
        the mean ω in ``filter_means``, which is summed in float64 rank by rank).

    Raises:
        TypeError, ValueError: an argument is not as described, or the model does not fit the data set.
        ValueError: a teacher that an attack needs is missing or is not the one that the run was trained with.
        BlockingIOError: another process runs the evaluation ``name`` in ``out``.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    check_name(name)
    batch_size, seed = check_integer("batch_size", batch_size, 1), check_integer("seed", seed)
    limit = None if limit is None else check_integer("limit", limit, 1)
    queries = None if queries is None else check_integer("queries", queries, 0)
    eot = None if eot is None else check_integer("eot", eot, 1)
    out = None if out is None else expanded(out)
    _check_filter(filter, precision, attacks)
    dataset, classes = _check_fit(model, dataset, batch_size, device)
    first_images = next(dataset.batches(min(batch_size, REFERENCE))).x
    prepared = prepare(model, precision, first_images)
    low = None if filter is None else in_bfloat16(model, copied=prepared.runs_on == COPY)
    examine_model = partial(examine, x=first_images, eot=eot, budget=budget, seed=seed)
    computes = _precision(prepared.module, dataset, precision)
    if prepared.runs_on == COPY and eot in (None, 1):
        examined = Examined(prepared.module, {}, [])  # inference copies are deterministic
    else:
        examined = examine_model(prepared.module)
    module = examined.module
    if low is not None and isinstance(module, Stochastic):
        low = Stochastic(low, eot=module.eot, passes=module.passes, seed=module.seed)
    captured = captures_attacks(capture, dataset.device, module)
    if captured and isinstance(attacks, Mapping):
        raise ValueError("capture needs attacks by name, which run on the inference copy: leave it out")
    if limit is not None:
        dataset = dataset.subset(limit, seed=0)
    other_reports = dict(compared_with or {})
    for other, report in other_reports.items():
        if not isinstance(report, Report):
            raise TypeError(f"compared_with[{other!r}] must be a Report, got {type(report).__name__}")
        check_same_images(dataset, report, other)
    run = out if run is None else run
    needed = _attacks_with_teacher(attacks, sanity)
    run_teachers = find_teachers(run, dataset.device, teachers, teacher) if needed else Teachers()
    surrogates = _check_surrogates(surrogates or {}, dataset, first_images, examine_model)
    missing = _missing_attacks(module, run_teachers, needed, surrogates, allow_missing)
    ranks = ranks or Ranks(dataset.device)
    selected_on = _selected_on(run) if selected_on is None else selected_on
    with evaluation_lock(out, name, ranks) as run_folder:
        suite = Suite(
            classes=classes,
            budget=budget,
            queries=queries,
            teacher=None if "robust" in run_teachers.missing else run_teachers.models.get("robust", teacher),
            surrogates={f"{kind}_teacher": module for kind, module in run_teachers.models.items()}
            | surrogates,
            reference=next(dataset.batches(REFERENCE)).x,
        )
        chosen = _choose_attacks(attacks, module, dataset, seed, suite)
        if low is not None:
            first = _choose_attacks(attacks, low, dataset, seed, suite)
            chosen = {name: filtered(attack, first[name]) for name, attack in chosen.items()}
        plan = Plan(module, dataset, chosen, seed)
        saved, key = None, ""
        if run_folder is not None or ranks.size > 1:
            runs_on = f"{precision} {prepared.runs_on}"
            key = state_key(model, plan, batch_size, suite, runs_on)
            check_same_key(key, ranks)
        mark = None if part_of is None else parts_folder(part_of) / f"{name}-{key}"
        if run_folder is not None:
            if mark is not None:
                complete = ranks.first(partial(load_part, run_folder, name, mark))
                if complete is not None:
                    return complete
            saved = Saved(state_folder(name), key, run_folder)
            ranks.first(partial(prepare_state, saved))
        collected = Collected(plan)
        batches = -(-len(dataset) // batch_size)
        share = range(ranks.rank, batches, ranks.size)
        with (
            frozen(module),
            nullcontext() if low is None else frozen(low),
            graphed_steps(chosen.values() if captured else (), classes),
            torch.no_grad(),
            progress_bar(progress and ranks.rank == 0, len(share) * len(plan.kinds)) as advance,
        ):
            for number, batch in islice(enumerate(dataset.batches(batch_size)), ranks.rank, None, ranks.size):
                collected.add_batch(plan, number, batch, saved, advance)
            with_sanity = plan.union is not None if sanity is None else sanity
            if with_sanity and batches % ranks.size == ranks.rank:  # it counts as one more batch
                advance("sanity", 0)

                def checks() -> dict[str, Any]:
                    table, curves = sanity_table(module, dataset, suite, seed=seed, batch_size=batch_size)
                    return {"table": [asdict(row) for row in table], "curves": curves}

                collected.sanity = computed_once(saved, "sanity", checks)
            with_parts = plan.union is not None and has_router(model) if parts is None else parts
            if with_parts and (batches + 1) % ranks.size == ranks.rank:
                advance("parts", 0)

                def prepare_again(changed: nn.Module) -> nn.Module:
                    again = prepare(changed, precision, first_images).module
                    if not examined.settings:
                        return again
                    return examine_model(again).module

                measure = partial(gated_parts, model, dataset, suite, module=module, prepare=prepare_again)
                collected.parts = computed_once(
                    saved, "parts", partial(measure, seed=seed, batch_size=batch_size)
                )
            if ranks.size > 1:
                advance("other ranks", 0)
            shares = ranks.gathered(collected.to_host())

        def finish() -> Report:
            settings = {
                "seed": seed,
                "batch_size": batch_size,
                "limit": limit,
                "budget": budget,
                "precision": computes,
                "class_names": list(dataset.classes),
                "runs_on": prepared.runs_on,
                **({"stochastic": dict(examined.settings)} if examined.settings else {}),
            }
            merged = Collected.merged(plan, shares)
            report = build_report(plan, model, merged, settings, selected_on, missing)
            if prepared.flag is not None:
                report.flags.append(prepared.flag)
            report.flags += examined.flags
            if examined.settings and ignoring_randomness(chosen):
                report.flags.append(
                    f"{', '.join(ignoring_randomness(chosen))} neither averages gradients over the model's "
                    "random passes nor seeds them: build the attack on awnet.attacks.Stochastic(model)"
                )
            no_teachers = teacher is None and not run_teachers.models and not surrogates
            no_record = no_teachers and not run_teachers.recorded
            if plan.union is not None and no_record and (run is not None or config_of(model) is not None):
                report.flags.append(
                    "no training record was found: if the model was trained with teachers, the union lacks "
                    "the attacks that use them (evaluate its run folder, or pass run= or teachers=)"
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
            if run_folder is not None and saved is not None:
                run_folder.during(lambda: report.publish(run_folder.path, name))
                if mark is not None:
                    run_folder.during(lambda: mark_part(run_folder.path / mark))
                saved.remove()
                saved.folder.parent.rmdir()
            return report

        return ranks.first(finish)


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
    """Whether each image is classified correctly under ``attack``: bool ``[N]`` on the CPU.

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
    dataset, _ = _check_fit(model, dataset, batch_size, device)
    correct, finite = [], []
    with frozen(model), torch.no_grad():
        for x, y, index in dataset.batches(batch_size):
            images = x if attack is None else attack(x, y, index=index)
            with seeded(model, "classify", index):
                logits = decision(model, images)
            correct.append(logits.argmax(1) == y)
            finite.append(logits.isfinite().all(1))
    check_finite(torch.cat(finite).cpu().numpy(), CLEAN if attack is None else "adversarial")
    return torch.cat(correct).cpu()


def _check_fit(
    model: nn.Module, dataset: Dataset, batch_size: int, device: str | torch.device | None
) -> tuple[Dataset, int]:
    """Checks that model, data set and device fit; returns the data set on the model's device, and K."""
    check_values(model)
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a Dataset (see load_dataset), got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"dataset is empty: {dataset.name} has no {dataset.split} images")
    target = device_of(model)
    if device is not None:
        requested = resolve_device(device) if target is None else torch.device(device)
        if target is not None and (requested.type, requested.index or 0) != (target.type, target.index or 0):
            raise ValueError(
                f"device is {requested}, but the model is on {target}: call model.to({str(requested)!r}) "
                "first"
            )
        target = target or requested
    dataset = dataset if target is None else dataset.to(target)
    logits = first_logits(model, next(dataset.batches(1)).x, dataset.num_classes, dataset.name)
    return dataset, logits.shape[1]


def _check_surrogates(
    surrogates: Mapping[str, nn.Module],
    dataset: Dataset,
    x: Tensor,
    examine_model: Callable[[nn.Module], Examined],
) -> dict[str, nn.Module]:
    """The surrogates, stochastic ones as :class:`Stochastic`; ValueError for one that does not fit."""
    checked = {}
    for name, module in surrogates.items():
        try:
            first_logits(module, x[:1], dataset.num_classes, dataset.name)
        except ValueError as error:
            raise ValueError(f"surrogate {name}: {error}") from error
        checked[name.replace(" ", "_")] = examine_model(module).module
    return checked


def _choose_attacks(
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
                raise ValueError(f"attacks must not be called {name!r}: reports use that name")
            if not isinstance(attack, Attack):
                raise TypeError(f"attacks[{name!r}] must be an Attack, got {type(attack).__name__}")
            if attack.norm != dataset.threat_model.norm:
                raise ValueError(
                    f"attacks[{name!r}] is an attack in {attack.norm}, but the data set's threat model is "
                    f"{dataset.threat_model}: use one norm, or evaluate each norm separately"
                )
        return dict(attacks)
    names = list(attacks)
    if len(set(names)) < len(names):
        raise ValueError(f"attacks must be different names, got {names}")
    for name in names:
        check_attack_name(name)
    return {name: named_attack(name, model, dataset.threat_model, seed, suite) for name in names}


def _check_filter(filter: str | None, precision: str, attacks: Sequence[str] | Mapping[str, Attack]) -> None:
    if filter not in (None, "bfloat16"):
        raise ValueError(f"filter must be 'bfloat16' or None, got {filter!r}")
    if filter is not None and precision != "float32":
        raise ValueError(f"filter needs precision='float32', got {precision!r}: leave one of them out")
    if filter is not None and isinstance(attacks, Mapping):
        raise ValueError("filter needs attacks by name: it builds each attack on a bfloat16 model as well")


def _attacks_with_teacher(
    attacks: Sequence[str] | Mapping[str, Attack], sanity: bool | None
) -> dict[str, tuple[str, ...]]:
    """The attacks that use a run's teacher, by the teacher's kind; empty if there are none."""
    names = set() if isinstance(attacks, Mapping) else set(attacks)
    transfers = {UNION} & names or sanity
    needed: dict[str, tuple[str, ...]] = {}
    for kind in KINDS:
        uses = ["adaptive_paper"] if kind == "robust" and names & {UNION, "adaptive_paper"} else []
        uses += [f"transfer_{kind}_teacher_{attack}" for attack in TRANSFERRED] if transfers else []
        if uses:
            needed[kind] = tuple(uses)
    return needed


def _missing_attacks(
    model: nn.Module,
    teachers: Teachers,
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
        if kind in teachers.missing:
            missing |= dict.fromkeys(uses, f"the {kind} teacher is missing: {teachers.missing[kind]}")
    advice = "Give the teachers' current paths (--teachers, teachers=), or leave" if missing else "Leave"
    count = len(routed_networks(model))
    if count > 1 and any(use.startswith("transfer") for uses in needed.values() for use in uses):
        reason = f"the model holds {count} networks with a router, and attacks on the router need exactly one"
        missing |= dict.fromkeys(("two_phase", "forced", "softened"), reason)
    if missing and not allowed:
        reasons = "; ".join(dict.fromkeys(missing.values()))
        raise ValueError(
            f"{', '.join(missing)} cannot run: {reasons}. {advice} these attacks out, which the report's "
            "headline then says (--allow-missing, allow_missing=True)"
        )
    return missing


def _precision(model: nn.Module, dataset: Dataset, precision: PrecisionName) -> str:
    """The report's description of the precision: that of a forward pass, whatever was requested."""
    with frozen(model):
        dtype = computed_in(model, next(dataset.batches(1)).x)
    name = str(dtype).removeprefix("torch.")
    requested = "bfloat16" if precision == "bfloat16" else "float32"
    return DESCRIPTIONS[precision] if name == requested else f"{name}, in the model's own code"


def _selected_on(run: str | Path | None) -> str | None:
    path = None if run is None else Path(run) / "config.json"
    if path is None or not path.is_file():
        return None
    config: Any = read_json(path)
    split = config.get("selected_on") if isinstance(config, dict) else None
    return split if isinstance(split, str) else None

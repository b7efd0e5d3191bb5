"""Runs a model over a data set, clean and attacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awnet import rng
from awnet.attacks import Attack, frozen, list_attacks, named_attack
from awnet.attacks.base import check_count, check_model, device_of
from awnet.data.dataset import Dataset
from awnet.evaluation.filters import filter_means
from awnet.evaluation.report import Array, Report, attack_result, check_name, compare, environment, flags
from awnet.evaluation.statistics import auc, wilson_interval
from awnet.files import read_json, write_json

CLEAN, NOISE = "clean", "uniform_noise"


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    attacks: Sequence[str] | Mapping[str, Attack] = ("fgsm", "pgd_sat", "pgd_trades", "cw"),
    *,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = False,
    out: str | Path | None = None,
    name: str = "default",
    compared_with: Mapping[str, Report] | None = None,
    selected_on: str | None = None,
) -> Report:
    """Accuracy of ``model`` on clean and adversarial images: A_nat, A_adv and A_w (Eq. 23) for each attack.

    A model with a router (``model.route``) is also asked how well its type logits tell each attack, and
    uniform noise of the same size as a control, from clean images (area under the ROC curve).

    Args:
        model: images [0, 1] → logits ``[B, K]``, in any mode; it is left as it was found.
        dataset: whose threat model gives eps and step sizes.
        attacks: names that :func:`awnet.attacks.list_attacks` knows, or your own attacks by name.
        batch_size: images a forward pass; changes results by rounding only.
        seed: keys the attacks' random starts, the noise and the bootstrap.
        device: where the model is; None takes it from its parameters. The images follow it.
        limit: evaluate a stratified part of at most so many images.
        progress: show a bar.
        out: a run folder: writes ``evaluations/<name>/`` there and the newest report as ``report.json``.
        name: of the evaluation, a folder's name.
        compared_with: reports of other models on the same images, by name; paired differences are added.
        selected_on: split that chose the checkpoint; None reads it from ``config.json`` in ``out``, if there.

    Returns:
        The :class:`Report`; the same bits for the same arguments on the same machine.

    Raises:
        TypeError, ValueError: an argument is not as described, or the model does not fit the data set.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    check_name(name)
    check_count("batch_size", batch_size)
    dataset = _ready(model, dataset, batch_size, device)
    if limit is not None:
        dataset = dataset.subset(check_count("limit", limit), seed=0)
    chosen = _chosen(attacks, model, dataset, seed)
    other_reports = dict(compared_with or {})
    for other, report in other_reports.items():
        if not isinstance(report, Report):
            raise TypeError(f"compared_with[{other!r}] must be a Report, got {type(report).__name__}")

    routed = _has_type_head(model, dataset)
    kinds = [CLEAN, *chosen, *([NOISE] if routed else [])]
    seen = {kind: _Seen() for kind in kinds}
    batches = -(-len(dataset) // batch_size)
    with frozen(model), torch.no_grad(), _progress(progress, batches * len(kinds)) as advance:
        for x, y, index in dataset.batches(batch_size):
            for kind in kinds:
                if kind == NOISE:
                    images = _noisy(x, index, dataset.threat_model.eps, seed)
                else:
                    images = chosen[kind](x, y, index=index) if kind in chosen else x
                seen[kind].add(*_observe(model, images, y, logits=kind != NOISE))
                advance(kind)

    per_sample: dict[str, Array] = {
        "index": dataset.index.cpu().numpy(),
        "label": dataset.labels.cpu().numpy(),
    }
    for kind in kinds:
        per_sample |= {f"{kind}_{what}": values for what, values in seen[kind].arrays().items()}
        _check_finite(per_sample.pop(f"{kind}_finite", None), kind)

    clean = per_sample["clean_correct"]
    report = Report(
        model=_name_of(model),
        dataset=dataset.name,
        split=dataset.split,
        n=len(dataset),
        eps=dataset.threat_model.eps,
        clean_accuracy=int(clean.sum()) / len(clean),
        clean_interval_95=wilson_interval(int(clean.sum()), len(clean)),
        attacks={
            kind: attack_result(clean, per_sample[f"{kind}_correct"], attack.settings, seed)
            for kind, attack in chosen.items()
        },
        router_auc={
            kind: auc(per_sample["clean_type_score"], per_sample[f"{kind}_type_score"])
            for kind in kinds
            if routed and kind != CLEAN
        },
        flags=[],
        settings={
            "seed": seed,
            "batch_size": batch_size,
            "limit": limit,
            "source": dataset.source,
            "classes": dataset.num_classes,
            "fingerprint": dataset.fingerprint(),
            "robust_accuracy": "of adversarial images made from all images, also those misclassified clean",
        },
        environment=environment(dataset.device),
        selected_on=_selected_on(out) if selected_on is None else selected_on,
        per_sample=per_sample,
        filter_means=filter_means(
            model,
            next(dataset.batches(1)).x,
            {kind: seen[kind].mean_scales() for kind in kinds if routed and kind != NOISE},
        ),
    )
    report.flags = flags(report)
    report.compared_with = {other: compare(report, value, seed) for other, value in other_reports.items()}
    if out is not None:
        log = Path(out) / "log.jsonl"
        report.save(Path(out) / "evaluations" / name, log if log.is_file() else None)
        write_json(Path(out) / "report.json", report.to_dict())
    return report


def accuracy(
    model: nn.Module, dataset: Dataset, batch_size: int = 256, device: str | torch.device | None = None
) -> Tensor:
    """Whether each clean image is classified correctly: bool ``[N]`` on the CPU, in the data set's order."""
    return _correct(model, dataset, None, batch_size, device)


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
    check_model(model)
    if isinstance(attack, str):
        attack = named_attack(attack, model, dataset.threat_model)
    return _correct(model, dataset, attack, batch_size, device)


def _correct(
    model: nn.Module,
    dataset: Dataset,
    attack: Attack | None,
    batch_size: int,
    device: str | torch.device | None,
) -> Tensor:
    dataset = _ready(model, dataset, batch_size, device)
    found, finite = [], []
    with frozen(model), torch.no_grad():
        for x, y, index in dataset.batches(batch_size):
            logits = _logits(model, x if attack is None else attack(x, y, index=index))
            found.append(logits.argmax(1) == y)
            finite.append(logits.isfinite().all(1))
    _check_finite(torch.cat(finite).cpu().numpy(), CLEAN if attack is None else "adversarial")
    return torch.cat(found).cpu()


class _Seen:
    """What a model said of one kind of image, batch by batch, kept on its device until the end."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.scales: list[Tensor] = []  # [C_out] each, summed over images
        self.count = 0

    def add(self, values: dict[str, Tensor], scales: Sequence[Tensor]) -> None:
        self.batches.append(values)
        sums = [scale.double().sum(0) for scale in scales]
        self.scales = [a + b for a, b in zip(self.scales, sums, strict=True)] if self.scales else sums
        self.count += len(next(iter(values.values())))

    def arrays(self) -> dict[str, Array]:
        return {
            what: torch.cat([batch[what] for batch in self.batches]).cpu().numpy() for what in self.batches[0]
        }

    def mean_scales(self) -> list[Tensor]:
        return [scale / self.count for scale in self.scales]


def _observe(
    model: nn.Module, x: Tensor, y: Tensor, *, logits: bool
) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
    """One pass: per-sample values ``[B]``, and the router's filter scales where there is a router."""
    found: dict[str, Tensor] = {}
    routing = model.route(x) if hasattr(model, "route") else None  # type: ignore[operator]
    if routing is not None and routing.type_logits is not None:
        # the difference of the two logits orders images as p does, without saturating
        found["type_score"] = (routing.type_logits[:, 1] - routing.type_logits[:, 0]).float()
        found["p_clean"] = routing.p_clean.float()
    if logits:
        output = _logits(model, x, routing)
        found["prediction"] = output.argmax(1)
        found["correct"] = found["prediction"] == y
        found["finite"] = output.isfinite().all(1)
    return found, [] if routing is None else routing.filter_scales


def _logits(model: nn.Module, x: Tensor, routing: Any = None) -> Tensor:
    output: Tensor = model(x) if routing is None else model(x, routing=routing)
    return output


def _noisy(x: Tensor, index: Tensor, eps: float, seed: int) -> Tensor:
    noise = rng.uniform(rng.key("uniform noise", seed), index, x.shape[1:]).mul_(2).sub_(1)
    return torch.add(x, noise, alpha=eps).clamp_(0, 1)


def _ready(model: nn.Module, dataset: Dataset, batch_size: int, device: str | torch.device | None) -> Dataset:
    """The data set on the model's device, after checking that the three fit."""
    check_model(model)
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a Dataset, of load_dataset say, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"dataset is empty: {dataset.name} {dataset.split} holds no image")
    if batch_size == 0:
        raise ValueError("batch_size must be at least 1, got 0")
    where = device_of(model)
    if device is not None:
        wanted = torch.device(device)
        if where is not None and (wanted.type, wanted.index or 0) != (where.type, where.index or 0):
            raise ValueError(
                f"device is {wanted}, but the model is on {where}: call model.to({str(wanted)!r}) first"
            )
        where = where or wanted
    dataset = dataset if where is None else dataset.to(where)
    with frozen(model), torch.no_grad():
        logits = model(next(dataset.batches(1)).x)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < dataset.num_classes:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"model must return logits [1, {dataset.num_classes}] for an image of {dataset.name}, got {got}: "
            f"create it with num_classes={dataset.num_classes}"
        )
    return dataset


def _chosen(
    attacks: Sequence[str] | Mapping[str, Attack], model: nn.Module, dataset: Dataset, seed: int
) -> dict[str, Attack]:
    if isinstance(attacks, str):
        raise TypeError(
            f"attacks must be a sequence of names, got the string {attacks!r}: write [{attacks!r}]"
        )
    if isinstance(attacks, Mapping):
        for name, attack in attacks.items():
            check_name(name)
            if name in (CLEAN, NOISE):
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
    return {name: named_attack(name, model, dataset.threat_model, seed) for name in names}


def _has_type_head(model: nn.Module, dataset: Dataset) -> bool:
    if not hasattr(model, "route"):
        return False
    with frozen(model), torch.no_grad():
        return model.route(next(dataset.batches(1)).x).type_logits is not None  # type: ignore[operator]


def _check_finite(finite: Array | None, kind: str) -> None:
    if finite is not None and not finite.all():
        raise FloatingPointError(
            f"the model's logits are NaN or infinite for {int((~finite).sum())} of {len(finite)} {kind} "
            "images: an accuracy would mean nothing; look at its weights"
        )


def _name_of(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    if isinstance(config, dict) and isinstance(config.get("name"), str):
        return str(config["name"])
    return type(model).__name__


def _selected_on(out: str | Path | None) -> str | None:
    path = None if out is None else Path(out) / "config.json"
    if path is None or not path.is_file():
        return None
    config = read_json(path)
    found = config.get("selected_on") if isinstance(config, dict) else None
    return found if isinstance(found, str) else None


@contextmanager
def _progress(show: bool, total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with the kind of image after each batch."""
    if not show:
        yield lambda kind: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("evaluate {task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda kind: bar.update(task, advance=1, description=kind)

"""A recipe's training step, ours against the same step in plain torch: ``awnet bench train``.

Every provider starts from the same weights. Before it is timed, a plain one and ours must make the same
adversarial images and the same update.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from awnet.attacks import frozen
from awnet.data import Dataset, from_arrays, load_dataset
from awnet.data.dataset import Batch
from awnet.models import create_model
from awnet.nn import AWNet
from awnet.terminal import safe_console
from awnet.training import MTARD, MTARDWeights, Recipe, Teachers, Trades, TrainingStep, losses, recipe_for
from awnet.training.step import Numerics, numerics

from . import results
from .ceilings import measure_ceilings
from .plain import SeparatePasses, plain_attack, plain_model, plain_step
from .runner import (
    BenchOptions,
    _commit,
    _device,
    _device_name,
    _driver,
    _machine,
    _slug,
    _version,
    command_line,
)

COLUMNS = [
    *("date", "commit", "device", "driver", "torch", "triton"),
    *("recipe", "model", "teachers", "data", "provider", "batch", "size", "attack_steps", "precision"),
    *("layout", "threads", "steps", "images_per_second", "epoch_seconds_50000", "gflop_per_image"),
    *("matmul_tflop_s", "mfu", "peak_mib", "share_attack", "share_training", "share_teachers"),
    *("share_data", "verified", "command"),
]
PROVIDERS = ("awnet", "unfused", "literal", "compile")
_LOSSES = (losses.mtard, losses.trades, losses.pgd_at, losses.standard, losses.hat)
PARTS = ("attack", "training", "teachers", "data")


@dataclass(frozen=True)
class TrainBenchOptions:
    """What to measure, and on what."""

    recipe: str = "mtard"
    """A recipe by name, with its settings for `data`."""
    model: str = "awnet_resnet18"
    """A model by name."""
    data: str = "synthetic"
    """synthetic (random images), or a data set by name."""
    data_dir: Path | None = None
    """The data set's folder, or its parent; by default `data`."""
    size: int = 32
    """Side of synthetic images, in pixels."""
    batch: int | None = None
    """Images a step; by default 16 on a CPU and the recipe's on a GPU."""
    attack_steps: int | None = None
    """Steps of the attack; by default the recipe's."""
    teachers: tuple[str, str] | None = None
    """The clean and the robust teacher by name, where the recipe has them; by default both a resnet18, or
    resnet_tiny beside a tiny model."""
    providers: tuple[Literal["awnet", "unfused", "literal", "compile"], ...] = ()
    """awnet: ours. Plain steps, with clean and adversarial images in passes of their own and parameters that
    require gradients in the attack: unfused (convolution, scale, two batch norms, ReLU), compile
    (torch.compile of that), literal (filters of each sample's own). By default all; compile, which is slow
    there, not on a CPU."""
    steps: int | None = None
    """Measured steps of each provider, after a warm-up; by default 5 on a CPU and 30 on a GPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and products; auto is bfloat16 on a GPU and float32 on a CPU."""
    layout: Literal["auto", "nchw", "channels_last"] = "auto"
    """Memory format; auto is channels_last on a GPU and nchw on a CPU."""
    capture: bool = False
    """Ours with the whole step as a CUDA graph."""
    device: str | None = None
    """cpu, cuda, cuda:1, …; by default the GPU where there is one."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""
    seed: int = 0
    """Of weights and images."""
    out: Path = results.FOLDER
    """Folder of the CSV files, one a device; rows are added to what is there."""


@dataclass(frozen=True)
class Row:
    """What was measured of one provider."""

    provider: str
    fault: str  # why there is no time; empty for a verified one
    seconds: float = 0.0  # of a step, the median
    shares: Mapping[str, float] | None = None  # of the parts, in the step's time
    peak_mib: float | None = None


@dataclass(frozen=True)
class _Setting:
    """What all providers share."""

    recipe: Recipe
    model: nn.Module
    teachers: Teachers | None
    data: Dataset
    device: torch.device
    numerics: Numerics

    @property
    def autocast(self) -> Callable[[], Any]:
        low = self.numerics.precision == "bfloat16"
        return lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=low)


def bench_train(options: TrainBenchOptions) -> Path:
    """Verifies, times, prints a table, and adds the rows to ``<out>/<device>-train.csv``; returns its path.

    Raises ValueError for an unknown name or a value out of range.
    """
    console = safe_console()
    device = _checked_device(options)
    path = options.out / f"{_slug(_device_name(device))}-train.csv"
    results.read_rows(path, COLUMNS)  # refuses a file of other columns before the work, not after
    with _machine(BenchOptions(threads=options.threads), device):
        setting = _setting(options, device)
        names: tuple[str, ...] = options.providers
        if not names:
            names = tuple(name for name in PROVIDERS if name != "compile" or device.type == "cuda")
        flops = flops_per_image(setting)
        dtype = torch.bfloat16 if setting.numerics.precision == "bfloat16" else torch.float32
        ceiling = measure_ceilings(device, dtype, 0.2, tiny=False).tflop_s
        rows = _measure(setting, names, options.steps or (30 if device.type == "cuda" else 5), options.seed)
        lines = [_line(row, setting, options, flops, ceiling) for row in rows]
    results.add_rows(path, lines, COLUMNS)
    console.print(_table(rows, lines, setting))
    for row in rows:
        if row.fault:
            console.print(f"no time for {row.provider}: {row.fault}", style="red", markup=False)
    console.print(f"{len(rows)} rows added to {path}")
    return path


# --- what is run


def _checked_device(options: TrainBenchOptions) -> torch.device:
    for name in ("batch", "steps", "attack_steps", "size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if options.batch is not None and options.batch < 2:
        raise ValueError("batch must be at least 2: batch norm has nothing to normalise by in one image")
    return _device(BenchOptions(device=options.device, threads=options.threads))


def _setting(options: TrainBenchOptions, device: torch.device) -> _Setting:
    changes: dict[str, Any] = {
        "precision": options.precision,
        "layout": options.layout,
        "capture": options.capture,
    }
    if options.attack_steps is not None:
        changes["attack_steps"] = options.attack_steps
    recipe = recipe_for(options.recipe, options.data, **changes)
    if type(recipe).loss not in _LOSSES:
        raise ValueError(
            f"recipe must be mtard, trades, pgd_at, standard, one of their short forms or hat, got "
            f"{options.recipe!r}: the plain step does not know it"
        )
    batch = options.batch or (16 if device.type == "cpu" else recipe.batch_size)
    recipe = replace(recipe, batch_size=batch)
    if options.data == "synthetic":
        generator = torch.Generator().manual_seed(options.seed)
        shape = (4 * batch, 3, options.size, options.size)
        pixels = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        labels = torch.randint(0, 10, shape[:1], generator=generator)
        names = [str(number) for number in range(10)]
        data = from_arrays(pixels, labels, name="synthetic", classes=names, shift=4, flip=True)
    else:
        data = load_dataset(options.data, options.data_dir, seed=options.seed).train
        if len(data) < batch:
            raise ValueError(f"batch must be at most the {len(data)} images of {options.data}, got {batch}")

    def network(name: str) -> nn.Module:
        return create_model(name, num_classes=data.num_classes, in_channels=data.in_channels).to(device)

    with torch.random.fork_rng([]):
        torch.manual_seed(options.seed)
        model, teachers = network(options.model), None
        if recipe.teachers:
            kinds = _teachers(options)[: len(recipe.teachers)]
            teachers = Teachers(*(network(name).eval().requires_grad_(False) for name in kinds))
    return _Setting(recipe, model, teachers, data.to(device), device, numerics(recipe, device))


def _teachers(options: TrainBenchOptions) -> tuple[str, str]:
    usual = "resnet_tiny" if "tiny" in options.model else "resnet18"
    return options.teachers or (usual, usual)


Timed = Callable[[str], Any]  # the name of a part → a context in which it is timed


def _ours(setting: _Setting, timed: Timed, seed: int) -> Callable[[Any], Any]:
    teachers = copy.deepcopy(setting.teachers)
    step = TrainingStep(setting.recipe, copy.deepcopy(setting.model), setting.device, 1000, teachers)
    step.start_epoch(0)
    if step.teachers is not None:
        step.teachers = Teachers(*(_Timed(one, timed) for one in step.teachers if one is not None))
    data = setting.data
    attack = setting.recipe.attack(step.model, data.threat_model, data.num_classes, seed)
    return lambda batch: step(batch, _timed(attack, timed))


def _plain(setting: _Setting, timed: Timed, seed: int, kind: str) -> Callable[[Any], Any]:
    layout = torch.channels_last if setting.numerics.layout == "channels_last" else torch.contiguous_format
    model = plain_model(setting.model, literal=kind == "literal").train()
    model.to(memory_format=layout)  # type: ignore[call-overload]
    attack_model = model
    if kind == "compile":
        if isinstance(model, AWNet):
            model.dynamic, model.router = torch.compile(model.dynamic), torch.compile(model.router)  # type: ignore[assignment]
        else:
            attack_model = model = torch.compile(model)  # type: ignore[assignment]
    teachers = None
    if setting.teachers is not None:
        copies = [plain_model(one) for one in setting.teachers if one is not None]
        for one in copies:
            one.to(memory_format=layout)  # type: ignore[call-overload]
        teachers = Teachers(*(_Timed(one, timed) for one in copies))
    attack = plain_attack(setting.recipe, attack_model, setting.data.threat_model, seed)
    step = plain_step(
        setting.recipe, model, _timed(attack, timed), teachers, _weights(setting), setting.autocast
    )
    return lambda batch: step(batch._replace(x=batch.x.contiguous(memory_format=layout)))


def _weights(setting: _Setting) -> MTARDWeights | None:
    return MTARDWeights(setting.device) if isinstance(setting.recipe, MTARD) else None


class _Timed(nn.Module):
    def __init__(self, model: nn.Module, timed: Timed) -> None:
        super().__init__()
        self.model, self.timed = model, timed

    def forward(self, x: Tensor) -> Tensor:
        with self.timed("teachers"):
            logits: Tensor = self.model(x)
        return logits


def _timed(attack: Any, timed: Timed) -> Any:
    def perturb(x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
        with timed("attack"):
            x_adv: Tensor = attack(x, y, index=index)
        return x_adv

    return perturb


# --- verification


def _fault(setting: _Setting, kind: str, seed: int) -> str:
    """Why ``kind`` may not be timed against ours; empty where both make the same images and update.

    In float32, on a few images, with the router's passes separate in both. A pixel whose gradient is nearly
    0 may go either way, and what follows with it: after TRADES' ten steps, which begin at their divergence's
    minimum, 8 % of the pixels differ by rounding alone; another loss, start or radius moves more than half.
    An update is a sum in another order.
    """
    plain_recipe = replace(
        setting.recipe, precision="float32", layout="nchw", router_passes="separate", capture=False
    )
    small = replace(setting, recipe=plain_recipe, numerics=Numerics("float32", "nchw"))
    batch = next(setting.data.batches(min(8, setting.recipe.batch_size)))
    seen: list[Tensor] = []

    def fixed(attack: Any) -> Any:
        def perturb(x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
            seen.append(attack(x, y, index=index))
            return seen[0]  # both learn from the same images

        return perturb

    start = torch.cat([p.detach().flatten() for p in setting.model.parameters()])
    data, threat = setting.data, setting.data.threat_model

    def update(model: nn.Module, step: Callable[[], Any]) -> Tensor:
        step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - start

    teachers = copy.deepcopy(setting.teachers)
    ours = TrainingStep(plain_recipe, copy.deepcopy(setting.model), setting.device, 1000, teachers)
    ours.start_epoch(0)
    for group in ours.optimizer.param_groups[:1]:
        rate = group["lr"]  # what the schedule begins with
    attack = fixed(plain_recipe.attack(ours.model, threat, data.num_classes, seed))
    want = update(ours.model, lambda: ours(batch, attack))

    plain = plain_model(setting.model, literal=kind == "literal").train()
    begun = replace(plain_recipe, lr=rate, router_lr=rate * plain_recipe.router_lr / plain_recipe.lr)
    attack = fixed(plain_attack(plain_recipe, plain, threat, seed))
    step = plain_step(begun, plain, attack, setting.teachers, _weights(small), small.autocast)
    got = update(plain, lambda: step(batch))

    if seen:
        differ = ((seen[0] - seen[1]).abs() > 1e-5).float().mean().item()
        if not differ <= 0.2:
            return f"{differ:.1%} of the pixels of its adversarial images differ from ours, at most 20 % may"
    error = float((got - want).norm() / want.norm())
    return "" if error <= 1e-2 else f"its update differs from ours by {error:.1e}, at most 1e-02 is allowed"


# --- timing


class _Clock:
    """Milliseconds of named parts; by events on a GPU, which are read at the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.setdefault(name, []).append((start, self._now()))

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def clear(self) -> None:
        self._spans.clear()

    def read(self) -> dict[str, list[float]]:
        if self.device.type == "cpu":
            return {name: [1000 * (b - a) for a, b in spans] for name, spans in self._spans.items()}
        torch.cuda.synchronize(self.device)
        return {name: [a.elapsed_time(b) for a, b in spans] for name, spans in self._spans.items()}


def _measure(setting: _Setting, names: tuple[str, ...], steps: int, seed: int) -> list[Row]:
    """Providers take turns, so that whatever else runs on the machine slows them alike."""
    cuda = setting.device.type == "cuda"
    rows: dict[str, Row] = {}
    run: dict[str, tuple[_Clock, Callable[[], None]]] = {}
    held: dict[str, float] = {}
    for name in names:
        fault = "" if name == "awnet" else _fault(setting, "unfused" if name == "compile" else name, seed)
        rows[name] = Row(name, fault)
        if fault:
            continue
        start = torch.cuda.memory_allocated(setting.device) if cuda else 0
        clock = _Clock(setting.device)
        step = _ours(setting, clock, seed) if name == "awnet" else _plain(setting, clock, seed, name)
        run[name] = clock, _once(setting, clock, step)
        for _ in range(5 if cuda else 1):  # compiles, picks algorithms, captures
            run[name][1]()
        clock.read()  # waits
        held[name] = torch.cuda.memory_allocated(setting.device) - start if cuda else 0
        clock.clear()
    peaks = dict.fromkeys(run, 0.0)
    for _ in range(steps):
        for name, (_, once) in run.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats(setting.device)
                start = torch.cuda.memory_allocated(setting.device)
            once()
            if cuda:
                torch.cuda.synchronize(setting.device)
                beyond = torch.cuda.max_memory_allocated(setting.device) - start
                peaks[name] = max(peaks[name], (held[name] + beyond) / 2**20)
    for name, (clock, _) in run.items():
        spans = clock.read()
        whole = sum(spans["step"])
        shares = {part: sum(spans.get(part, [])) / whole for part in PARTS}
        shares["training"] = 1 - sum(shares.values())
        rows[name] = Row(
            name, "", statistics.median(spans["step"]) / 1000, shares, peaks[name] if cuda else None
        )
    return list(rows.values())


def _once(setting: _Setting, clock: _Clock, step: Callable[[Any], Any]) -> Callable[[], None]:
    def batches() -> Iterator[Any]:
        epoch = 0
        while True:
            yield from setting.data.batches(
                setting.recipe.batch_size, shuffle=True, augment=True, epoch=epoch, drop_last=True
            )
            epoch += 1

    source = batches()

    def once() -> None:
        with clock("step"):
            with clock("data"):
                batch = next(source)
            step(batch)

    return once


def flops_per_image(setting: _Setting) -> float:
    """The operations that a recipe's step needs for one image, two for each multiplication and addition.

    Convolutions and matrix products of the attack (input gradients alone), the training pass (all gradients)
    and the teachers, counted by torch on shapes without values.
    """
    recipe, count = setting.recipe, 4
    model = plain_model(setting.model).to("meta").train()
    passes = SeparatePasses(model) if isinstance(model, AWNet) else model
    shape = (count, setting.data.in_channels, *setting.data.image_size)
    x, y = torch.empty(shape, device="meta"), torch.empty(count, dtype=torch.int64, device="meta")
    teachers = None
    if setting.teachers is not None:
        teachers = Teachers(*(plain_model(one).to("meta") for one in setting.teachers if one is not None))
    attacking = 0
    if recipe.needs_attack:
        with FlopCounterMode(display=False) as forward, torch.no_grad(), frozen(model):
            model(x)
        with FlopCounterMode(display=False) as both, frozen(model):
            model(x.clone().requires_grad_(True)).sum().backward()
        attacking = recipe.attack_steps * both.get_total_flops()
        if isinstance(recipe, Trades):
            attacking += forward.get_total_flops()
    options = replace(recipe.loss_options(), router_passes="separate")
    weights = MTARDWeights("meta") if isinstance(recipe, MTARD) else None
    with FlopCounterMode(display=False) as learning:
        (phase,) = recipe.phases()
        phase.result(passes, Batch(x, y, y), x, options, teachers, weights).total.backward()
    return (attacking + learning.get_total_flops()) / count


# --- records


def _line(
    row: Row, setting: _Setting, options: TrainBenchOptions, flops: float, ceiling: float
) -> dict[str, str]:
    recipe, device = setting.recipe, setting.device
    line = dict.fromkeys(COLUMNS, "") | {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": _device_name(device),
        "driver": _driver(device),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "recipe": recipe.name,
        "model": options.model,
        "teachers": " ".join(_teachers(options)[: len(recipe.teachers)]),
        "data": options.data,
        "provider": row.provider,
        "batch": str(recipe.batch_size),
        "size": str(setting.data.image_size[0]),
        "attack_steps": str(recipe.attack_steps if recipe.needs_attack else 0),
        "precision": setting.numerics.precision,
        "layout": setting.numerics.layout,
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "gflop_per_image": f"{flops / 1e9:.4g}",
        "matmul_tflop_s": f"{ceiling:.4g}",
        "verified": "false" if row.fault else "true",
        "command": command_line(options, "train", TrainBenchOptions),
    }
    if not row.fault:
        assert row.shares is not None
        pace = recipe.batch_size / row.seconds
        line |= {
            "steps": str(options.steps or (30 if device.type == "cuda" else 5)),
            "images_per_second": f"{pace:.5g}",
            "epoch_seconds_50000": f"{50000 / pace:.4g}",
            "mfu": f"{flops * pace / (ceiling * 1e12):.4f}",
            **{f"share_{part}": f"{share:.4f}" for part, share in row.shares.items()},
        }
        if row.peak_mib is not None:
            line["peak_mib"] = f"{row.peak_mib:.1f}"
    return line


def _table(rows: list[Row], lines: list[dict[str, str]], setting: _Setting) -> Table:
    first = lines[0]
    table = Table(
        title=f"{first['recipe']}, {first['model']}, batch {first['batch']} of {first['size']}² "
        f"({first['data']}), {first['precision']}, {first['layout']}, {first['device']}",
        box=None,
        pad_edge=False,
    )
    table.add_column("provider", no_wrap=True)
    for heading in ("images/s", "× ours", "s/50,000", "MFU", "MiB", *PARTS):
        table.add_column(heading, justify="right", no_wrap=True)
    ours = next((row.seconds for row in rows if row.provider == "awnet" and not row.fault), None)
    for row, line in zip(rows, lines, strict=True):
        if row.fault:
            table.add_row(row.provider, "wrong", style="red")
            continue
        ratio = "" if ours is None else f"{row.seconds / ours:.2f}"
        table.add_row(
            row.provider,
            line["images_per_second"],
            ratio,
            line["epoch_seconds_50000"],
            f"{float(line['mfu']):.1%}",
            line["peak_mib"] or "–",
            *(f"{float(line[f'share_{part}']):.0%}" for part in PARTS),
        )
    return table

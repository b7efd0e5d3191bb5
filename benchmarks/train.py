"""``awnet bench train``: a recipe's training step, ours against the same step in plain torch.

All providers start from the same weights. A plain provider is timed only after it has made the same
adversarial images and the same update as ours.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from awnet.ops.dispatch import chosen_backend, default_backend, use_backend
from awnet.terminal import safe_console
from awnet.training import MTARD, MTARDWeights, Recipe, Teachers, Trades, TrainingStep, losses, recipe_for
from awnet.training.step import Numerics, numerics

from . import machine, results
from .ceilings import Ceilings, CeilingTracker, measure_ceilings
from .clock import PartClock
from .interference import UNDISTURBED, Interference, Monitor, least_disturbed
from .options import MAX_BATCH, check_machine, check_whole, command_line
from .plain import SeparatePasses, plain_attack, plain_model, plain_step

COLUMNS = results.TRAIN_COLUMNS
PROVIDERS = ("awnet", "unfused", "literal", "compile")
_LOSSES = (losses.mtard, losses.trades, losses.pgd_at, losses.standard, losses.hat)
PARTS = ("attack", "training", "teachers", "data")


@dataclass(frozen=True, kw_only=True)
class TrainBenchOptions:
    """What to measure, and on what."""

    recipe: str = "mtard"
    """Recipe by name, with its settings for `data`."""
    model: str = "awnet_resnet18"
    """Model by name."""
    width: float = 1.0
    """Factor on the channels of the model, and of the teachers if they are AW-Nets."""
    data: str = "synthetic"
    """synthetic (random images), or a data set by name."""
    data_dir: Path | None = None
    """Folder of the data set, or its parent; by default `data`."""
    size: int = 32
    """Side of synthetic images, in pixels."""
    batch: int | None = None
    """Images per step; by default 16 on a CPU and the recipe's on a GPU."""
    attack_steps: int | None = None
    """Steps of the attack; by default the recipe's."""
    teachers: tuple[str, str] | None = None
    """The clean and the robust teacher by name, for recipes that have teachers; by default both a resnet18,
    or a resnet_tiny for a tiny model."""
    providers: tuple[Literal["awnet", "unfused", "literal", "compile"], ...] = ()
    """awnet: ours. The others are plain steps, with clean and adversarial images in separate passes and
    parameters that require gradients in the attack: unfused (convolution, scale, two batch norms, ReLU),
    compile (torch.compile of it), literal (separate filters for each sample). By default all, on a CPU
    without compile, which compiles slowly there."""
    steps: int | None = None
    """Measured steps of each provider, after a warm-up; by default 5 on a CPU and 30 on a GPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of convolutions and products; auto is bfloat16 on a GPU and float32 on a CPU."""
    attack_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the network in the attack; auto is that of --precision."""
    layout: Literal["auto", "nchw", "channels_last"] = "auto"
    """Memory format; auto is channels_last on a GPU and in bfloat16, and nchw otherwise."""
    capture: Literal["auto", "true", "false"] = "auto"
    """Whether our whole step is captured in a CUDA graph; auto captures on CUDA, as training does."""
    backend: str | None = None
    """Backend of our step: triton, cuda, cpp, eager or reference; by default AWNET_BACKEND, or awnet's choice
    for the device."""
    device: str | None = None
    """cpu, cuda, cuda:1, …; by default a GPU if there is one."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""
    retries: int = 2
    """How often to repeat a measurement that other processes or the hypervisor disturbed. A row that is still
    disturbed is marked."""
    seed: int = 0
    """Seed of weights and images."""
    out: Path = results.FOLDER
    """Folder of the CSV files, one per device; rows are appended."""


@dataclass(frozen=True)
class Row:
    """The measurement of one provider."""

    provider: str
    fault: str  # why there is no time; empty for a verified row
    seconds: float = 0.0  # of a step, the median
    best: float = 0.0
    shares: Mapping[str, float] | None = None  # of the parts, in the time of the steps
    peak_mib: float | None = None
    interference: Interference = UNDISTURBED
    backend: str = ""  # of our step
    captured: bool | None = None  # whether our whole step ran as a CUDA graph


@dataclass(frozen=True)
class _Setting:
    """The state that all providers share."""

    recipe: Recipe
    model: nn.Module
    teachers: Teachers | None
    data: Dataset
    device: torch.device
    numerics: Numerics

    def autocast(self) -> torch.autocast:
        return self._autocast(self.numerics.precision)

    def attack_autocast(self) -> torch.autocast:
        return self._autocast(self.numerics.attack_precision)

    def _autocast(self, precision: str) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16")


def bench_train(options: TrainBenchOptions) -> Path:
    """Verifies, times, prints a table, and appends the rows to ``<out>/<device>-train.csv``, its result.

    Raises ValueError for an unknown name or a value out of range.
    """
    console = safe_console()
    device = _checked_device(options)
    path = machine.csv_path(options.out, device, "-train")
    results.read_rows(path, COLUMNS)  # rejects a file with other columns before the work, not after it
    with (
        machine.full_precision(device, options.threads),
        use_backend(chosen_backend() if options.backend is None else options.backend),
    ):
        setting = make_setting(options, device)
        names: tuple[str, ...] = options.providers
        if not names:
            names = tuple(name for name in PROVIDERS if name != "compile" or device.type == "cuda")
        flops = flops_per_image(setting)
        dtype = torch.bfloat16 if setting.numerics.precision == "bfloat16" else torch.float32
        tracker = CeilingTracker(lambda: measure_ceilings(device, dtype, 0.2, tiny=False))
        rows = _measure(setting, names, options, tracker)
        tracker.update(force=True)
        lines = [_line(row, setting, options, flops, tracker.best) for row in rows]
    results.add_rows(path, lines, COLUMNS)
    console.print(_table(rows, lines, setting))
    for row in rows:
        if row.captured is False and options.capture != "false" and device.type == "cuda":
            console.print(
                f"{row.provider} could not be captured: its time has the host's in it", style="yellow"
            )
        if row.fault:
            console.print(f"no time for {row.provider}: {row.fault}", style="red", markup=False)
        elif row.interference.disturbed:
            console.print(f"{row.provider} was disturbed: {row.interference}", style="yellow", markup=False)
    console.print(f"{len(rows)} rows added to {path}")
    return path


# --- models, data and steps


_LIMITS = {"size": 2**14, "batch": MAX_BATCH, "attack_steps": 10**5, "steps": 10**6}


def _checked_device(options: TrainBenchOptions) -> torch.device:
    for name, maximum in _LIMITS.items():
        value = getattr(options, name)
        if value is not None:
            check_whole(name, value, 1, maximum)
    if options.batch == 1:
        raise ValueError("batch must be at least 2: batch norm needs more than one image")
    if not 0 < options.width <= 16:  # NaN too
        raise ValueError(f"width must be positive and at most 16, got {options.width}")
    return check_machine(options.device, options.threads, options.retries, options.seed, options.out)


def _steps(options: TrainBenchOptions, device: torch.device) -> int:
    return options.steps or (30 if device.type == "cuda" else 5)


def make_setting(options: TrainBenchOptions, device: torch.device) -> _Setting:
    captures = {"auto": "auto", "true": True, "false": False}
    if options.capture not in captures:
        raise ValueError(f"capture must be auto, true or false, got {options.capture!r}")
    changes: dict[str, Any] = {
        "precision": options.precision,
        "attack_precision": options.attack_precision,
        "layout": options.layout,
        "capture": captures[options.capture],
    }
    if options.attack_steps is not None:
        changes["attack_steps"] = options.attack_steps
    recipe = recipe_for(options.recipe, options.data, **changes)
    if type(recipe).loss not in _LOSSES:
        raise ValueError(
            f"recipe must be mtard, trades, pgd_at, standard, one of their short forms or hat, got "
            f"{options.recipe!r}, which has no plain step"
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
        width = {} if options.width == 1 else {"width": options.width}
        return create_model(name, num_classes=data.num_classes, in_channels=data.in_channels, **width).to(
            device
        )

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


def _ours(setting: _Setting, timed: Timed, seed: int) -> tuple[Callable[[Any], Any], TrainingStep]:
    teachers = copy.deepcopy(setting.teachers)
    step = TrainingStep(setting.recipe, copy.deepcopy(setting.model), setting.device, 1000, teachers)
    step.start_epoch(0)
    if step.teachers is not None:
        step.teachers = Teachers(*(_Timed(one, timed) for one in step.teachers if one is not None))
    data = setting.data
    attack = setting.recipe.attack(step.model, data.threat_model, data.num_classes, seed)
    return lambda batch: step(batch, _timed(attack, timed)), step


def _is_captured(step: TrainingStep) -> bool:
    graphs = step.graphed
    return graphs is not None and graphs.cache.refusal is None and len(graphs.cache) > 0


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
    attack = plain_attack(
        setting.recipe, attack_model, setting.data.threat_model, seed, setting.attack_autocast
    )
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


def find_fault(setting: _Setting, kind: str, seed: int) -> str:
    """Why ``kind`` must not be timed; empty if its adversarial images and its update are equal to ours.

    They are compared in float32 on a few images, with separate passes of the router in both. The sign of a
    gradient near 0 depends on rounding: after the ten steps of TRADES, which start at the minimum of the
    divergence, 8 % of the pixels differ by rounding alone; with another loss, start or radius more than half
    do. The updates are summed in another order.
    """
    plain_recipe = replace(
        setting.recipe,
        precision="float32",
        attack_precision="float32",
        layout="nchw",
        router_passes="separate",
        capture=False,
    )
    small = replace(setting, recipe=plain_recipe, numerics=Numerics("float32", "nchw", "float32"))
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
    rate = ours.optimizer.param_groups[0]["lr"]  # the schedule's first value
    attack = fixed(plain_recipe.attack(ours.model, threat, data.num_classes, seed))
    want = update(ours.model, lambda: ours(batch, attack))

    plain = plain_model(setting.model, literal=kind == "literal").train()
    router_lr = rate * plain_recipe.router_lr / plain_recipe.lr
    attack = fixed(plain_attack(plain_recipe, plain, threat, seed))
    recipe = replace(plain_recipe, lr=rate, router_lr=router_lr)
    step = plain_step(recipe, plain, attack, setting.teachers, _weights(small), small.autocast)
    got = update(plain, lambda: step(batch))

    if seen:
        differ = ((seen[0] - seen[1]).abs() > 1e-5).float().mean().item()
        if not differ <= 0.2:
            return f"{differ:.1%} of the pixels of its adversarial images differ from ours, at most 20 % may"
    error = float((got - want).norm() / want.norm())
    return "" if error <= 1e-2 else f"its update differs from ours by {error:.1e}, at most 1e-02 is allowed"


# --- timing


def _measure(
    setting: _Setting, names: tuple[str, ...], options: TrainBenchOptions, tracker: CeilingTracker
) -> list[Row]:
    """The rows of all providers; the least disturbed of at most 1 + ``retries`` measurements."""
    device, seed = setting.device, options.seed
    cuda = device.type == "cuda"
    rows: dict[str, Row] = {}
    steps: dict[str, _Step] = {}
    for name in names:
        fault = "" if name == "awnet" else find_fault(setting, "unfused" if name == "compile" else name, seed)
        rows[name] = Row(name, fault)
        if fault:
            continue
        start = torch.cuda.memory_allocated(device) if cuda else 0
        clock = PartClock(device)
        training: TrainingStep | None = None
        if name == "awnet":
            step, training = _ours(setting, clock, seed)
        else:
            step = _plain(setting, clock, seed, name)
        once = _once(setting, clock, step)
        for _ in range(5 if cuda else 1):  # compiles, chooses algorithms, captures
            once()
        clock.read()  # waits
        held = torch.cuda.memory_allocated(device) - start if cuda else 0
        steps[name] = _Step(clock, once, held, training)
    attempts: list[dict[str, Row]] = []
    while steps and len(attempts) <= options.retries:
        attempts.append(_in_turns(steps, _steps(options, device), device, tracker))
        if not any(row.interference.disturbed for row in attempts[-1].values()):
            break
    if attempts:
        chosen = [{name: row.interference for name, row in attempt.items()} for attempt in attempts]
        rows |= attempts[least_disturbed(chosen)]
    return list(rows.values())


@dataclass(frozen=True)
class _Step:
    clock: PartClock
    once: Callable[[], None]
    held_bytes: int  # by the model, its teachers and its graphs
    training: TrainingStep | None = None  # ours


def _in_turns(
    steps: Mapping[str, _Step], count: int, device: torch.device, tracker: CeilingTracker
) -> dict[str, Row]:
    """Times ``count`` steps of each provider in turns, so that other load slows them equally."""
    cuda = device.type == "cuda"
    peaks = dict.fromkeys(steps, 0.0)
    switches: dict[str, int | None] = dict.fromkeys(steps, 0)
    steals: list[float | None] = []
    for step in steps.values():
        step.clock.clear()
    for _ in range(count):
        tracker.update()
        turn = Monitor()
        for name, step in steps.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
                start = torch.cuda.memory_allocated(device)
            monitor = Monitor()
            step.once()
            if cuda:
                torch.cuda.synchronize(device)
                beyond = torch.cuda.max_memory_allocated(device) - start
                peaks[name] = max(peaks[name], (step.held_bytes + beyond) / 2**20)
            total, new = switches[name], monitor.read().switches
            switches[name] = None if total is None or new is None else total + new
        steals.append(turn.read().steal)
    known = [steal for steal in steals if steal is not None]
    steal = statistics.fmean(known) if known else None
    rows: dict[str, Row] = {}
    for name, step in steps.items():
        spans = step.clock.read()
        milliseconds = spans["step"]
        shares = {part: sum(spans.get(part, [])) / sum(milliseconds) for part in PARTS}
        shares["training"] = 1 - sum(shares.values())
        rows[name] = Row(
            name,
            "",
            statistics.median(milliseconds) / 1000,
            min(milliseconds) / 1000,
            shares,
            peaks[name] if cuda else None,
            Interference(sum(milliseconds) / 1000, switches[name], steal, torch.get_num_threads()),
            default_backend(str(device)) if name == "awnet" else "",
            None if step.training is None else _is_captured(step.training),
        )
    return rows


def _once(setting: _Setting, clock: PartClock, step: Callable[[Any], Any]) -> Callable[[], None]:
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
    """The floating-point operations of a recipe's step for one image; a multiply-add is two.

    Counts convolutions and matrix products of the attack (input gradients only), the training pass (all
    gradients) and the teachers, by torch's counter on the meta device.
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
        attacking = recipe.attack_steps * attack_step_flops(model, shape)
        if isinstance(recipe, Trades):
            with FlopCounterMode(display=False) as forward, torch.no_grad(), frozen(model):
                model(x)
            attacking += forward.get_total_flops()
    options = replace(recipe.loss_options(), router_passes="separate")
    weights = MTARDWeights("meta") if isinstance(recipe, MTARD) else None
    with FlopCounterMode(display=False) as learning:
        (phase,) = recipe.phases()
        phase.result(passes, Batch(x, y, y), x, options, teachers, weights).total.backward()
    return (attacking + learning.get_total_flops()) / count


def attack_step_flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    """The operations of a forward pass and an input gradient of a plain model on the meta device."""
    with FlopCounterMode(display=False) as counter, frozen(model):
        model(torch.empty(shape, device="meta", requires_grad=True)).sum().backward()
    return counter.get_total_flops()


# --- records


def _line(
    row: Row, setting: _Setting, options: TrainBenchOptions, flops: float, ceilings: Ceilings
) -> results.Row:
    recipe, device = setting.recipe, setting.device
    line = dict.fromkeys(COLUMNS, "") | machine.provenance(device)
    line |= {
        "recipe": recipe.title,
        "model": options.model if options.width == 1 else f"{options.model} width={options.width:g}",
        "teachers": " ".join(_teachers(options)[: len(recipe.teachers)]),
        "data": options.data,
        "provider": row.provider,
        "batch": str(recipe.batch_size),
        "size": str(setting.data.image_size[0]),
        "attack_steps": str(recipe.attack_steps if recipe.needs_attack else 0),
        "precision": setting.numerics.precisions,
        "layout": setting.numerics.layout,
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "gflop_per_image": f"{flops / 1e9:.4g}",
        "matmul_tflop_s": f"{ceilings.tflop_s:.4g}",
        "amx_tflop_s": "" if ceilings.amx_tflop_s is None else f"{ceilings.amx_tflop_s:.4g}",
        "verified": "false" if row.fault else "true",
        "command": command_line(options, "train", TrainBenchOptions),
        "backend": row.backend,
        "captured": "" if row.captured is None else str(row.captured).lower(),
    }
    if not row.fault:
        assert row.shares is not None
        pace = recipe.batch_size / row.seconds
        line |= {
            "steps": str(_steps(options, device)),
            "images_per_second": f"{pace:.5g}",
            "images_per_second_best": f"{recipe.batch_size / row.best:.5g}",
            "epoch_seconds_50000": f"{50000 / pace:.4g}",
            "mfu": f"{flops * pace / (ceilings.peak_tflop_s * 1e12):.4f}",
            **{f"share_{part}": f"{share:.4f}" for part, share in row.shares.items()},
        }
        line |= row.interference.columns
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
    shown = PARTS[:3]  # all fit on a line of 80 characters
    memory = any(row.peak_mib is not None for row in rows)
    for heading in ("images/s", "best", "× ours", "s/50k", "MFU", *(["MiB"] if memory else []), *shown):
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
            line["images_per_second_best"],
            ratio,
            line["epoch_seconds_50000"],
            f"{float(line['mfu']):.1%}",
            *([line["peak_mib"] or "–"] if memory else []),
            *(f"{float(line[f'share_{part}']):.0%}" for part in shown),
        )
    return table

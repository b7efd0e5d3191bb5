"""The performance goals, evaluated on the measured rows: `awnet bench verify`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from awnet.terminal import safe_console

from .cases import CASES, MODES, STAGES
from .results import FOLDER, Row, read_amx, read_results, read_training, threads

GPU, GPU_BATCHES = "NVIDIA H200", (256, 512)
_GPU_RUN = "awnet bench run --device cuda --dtype bfloat16 --layout channels_last"
_GPU_COMMAND = f"{_GPU_RUN} --batch 256 512 --cases {' '.join(STAGES)} --modes attack training"
_CPU_COMMAND = "awnet bench run --device cpu --threads 2"


@dataclass(frozen=True)
class Measured:
    """A figure, and the rows that it was computed from."""

    value: float
    rows: list[Row] = field(default_factory=list)


# None if a row that the figure needs has not been measured
Measure = Callable[["Rows"], Measured | None]


@dataclass(frozen=True)
class Goal:
    """A bound on one figure."""

    name: str
    where: str  # the device, dtype and shapes
    bound: float
    at_least: bool
    unit: str
    measure: Measure
    command: str
    stretch: bool = False

    @property
    def target(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{self.unit}"

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True)
class Outcome:
    """A goal and its measured figure."""

    goal: Goal
    measured: Measured | None

    @property
    def text(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if self.goal.met(self.measured.value) else "not met"

    @property
    def figure(self) -> str:
        return "" if self.measured is None else f"{self.measured.value:.3g}{self.goal.unit}"

    @property
    def sources(self) -> list[str]:
        """Devices and commits of the rows behind the figure, and whether a row was disturbed."""
        rows = [] if self.measured is None else self.measured.rows
        columns = (", ".join(dict.fromkeys(row[c] for row in rows if row[c])) for c in ("device", "commit"))
        disturbed = any(row["disturbed"] == "true" for row in rows)
        return [*filter(None, columns), *(["disturbed"] if disturbed else [])]


class Rows:
    """The newest rows by case, mode, provider and batch.

    On a GPU only the times of CUDA graph replays count: those of single calls (``timing`` eager) have the
    host's time in them.
    """

    def __init__(self, rows: Iterable[Row], training: Sequence[Row] = (), amx: Sequence[Row] = ()) -> None:
        self.training, self.amx = training, amx
        self._gpu, self._cpu = {}, {}
        for row in rows:
            if row["verified"] != "true":
                continue
            key = (row["case"], row["mode"], row["provider"], row["batch"])
            if row["device"].startswith(GPU):
                if (row["dtype"], row["layout"], row["timing"]) == ("bfloat16", "channels_last", "graph"):
                    self._gpu[key] = row
            elif not row["driver"] and (row["dtype"], row["layout"], threads(row)) == ("float32", "nchw", 2):
                self._cpu[key] = row  # of several CPUs the one that comes last

    def gpu(self, case: str, mode: str, provider: str, batch: int) -> Row | None:
        """A row on the GPU of the goals, bfloat16 and channels_last."""
        return self._gpu.get((case, mode, provider, str(batch)))

    def cpu(self, case: str, mode: str, provider: str) -> Row | None:
        """A row on a CPU with 2 threads, float32, at the default batch."""
        return self._cpu.get((case, mode, provider, "8" if case == "network" else "32"))


def _ms(row: Row) -> float:
    return float(row["ms_median"])


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _on_gpu(
    ours: str,
    rivals: dict[str, str],
    column: str = "ms_median",
    join: Callable[[Sequence[float]], float] = _geometric_mean,
    inverse: bool = False,
) -> Measure:
    """The rival's figure over ours of every stage, batch and mode that ``rivals`` names, joined to one."""

    def measure(rows: Rows) -> Measured | None:
        ratios, used = [], []
        for case in STAGES:
            for batch in GPU_BATCHES:
                for mode, rival in rivals.items():
                    mine, other = (rows.gpu(case, mode, name, batch) for name in (ours, rival))
                    if mine is None or other is None:
                        return None
                    theirs = other[column]
                    if rival == "literal" and mode == "training" and not theirs:
                        theirs = other["ms_eager"]  # it waits for the device, and cannot be captured
                    if not mine[column] or not theirs:
                        return None
                    ratios.append(float(theirs) / float(mine[column]))
                    used += [mine, other]
        return Measured(join([1 / r for r in ratios] if inverse else ratios), used)

    return measure


def _cpu_total(rival: str, inverse: bool = False) -> Measure:
    """The rival's time over ours, both summed over the four stages and three modes."""

    def measure(rows: Rows) -> Measured | None:
        totals, used = [], []
        for provider in (rival, "cpp"):
            mine = [rows.cpu(case, mode, provider) for case in STAGES for mode in MODES]
            present = [row for row in mine if row is not None]
            if len(present) < len(mine):
                return None
            totals.append(sum(map(_ms, present)))
            used += present
        ratio = totals[0] / totals[1]
        return Measured(1 / ratio if inverse else ratio, used)

    return measure


def _cpu_case(case: str) -> Measure:
    """Our time over eager's, in the mode where it is greatest."""

    def measure(rows: Rows) -> Measured | None:
        pairs = [(rows.cpu(case, mode, "cpp"), rows.cpu(case, mode, "eager")) for mode in MODES]
        known = [(mine, other) for mine, other in pairs if mine is not None and other is not None]
        if len(known) < len(pairs):
            return None
        return Measured(max(_ms(a) / _ms(b) for a, b in known), [row for pair in known for row in pair])

    return measure


def _trained(rows: Rows, batch: str | None = None) -> Row | None:
    """The paper's training on 32×32 images by our step: the fastest row of the newest date and commit."""
    columns = {"recipe": "mtard", "model": "awnet_resnet18", "provider": "awnet", "verified": "true"}
    columns |= {"size": "32", "attack_steps": "10"} | ({} if batch is None else {"batch": batch})
    rows_of_step = [
        row
        for row in rows.training
        if row["device"].startswith(GPU) and all(row[name] == value for name, value in columns.items())
    ]
    newest = [
        row for row in rows_of_step if all(row[name] == rows_of_step[-1][name] for name in ("date", "commit"))
    ]
    return max(newest, key=lambda row: float(row["images_per_second"]), default=None)


def _cpu_step(
    model: str, rival: str, batch: str = "16", precision: str = "float32", layout: str = "nchw"
) -> Measure:
    """The plain step's time over ours, in the newest run on a CPU with 2 threads that measured both."""
    columns = _TRAINED | {"model": model, "batch": batch, "precision": precision, "layout": layout}

    def measure(rows: Rows) -> Measured | None:
        run: dict[str, Row] = {}
        newest: Measured | None = None
        for row in _cpu_training(rows, columns):
            if row["provider"] == "awnet":
                run = {}  # the rows of a run follow one another, ours first
            run[row["provider"]] = row
            if row["provider"] == rival and "awnet" in run:
                pace = [float(run[name]["images_per_second"]) for name in ("awnet", rival)]
                newest = Measured(pace[0] / pace[1], [run["awnet"], row])
        return newest

    return measure


_TRAINED = {"recipe": "mtard", "size": "32", "attack_steps": "10", "threads": "2", "verified": "true"}


def _cpu_training(rows: Rows, columns: dict[str, str]) -> list[Row]:
    return [
        row
        for row in rows.training
        if not row["driver"] and all(row[name] == value for name, value in columns.items())
    ]


def _against_float32(model: str, batch: str) -> Measure:
    """The time of our float32 step over that of our bfloat16 step, newest of each on one CPU."""

    def measure(rows: Rows) -> Measured | None:
        columns = _TRAINED | {"model": model, "batch": batch, "provider": "awnet"}
        fast = _cpu_training(rows, columns | {"precision": "bfloat16", "layout": "channels_last"})
        slow = _cpu_training(rows, columns | {"precision": "float32", "layout": "nchw"})
        for ours in reversed(fast):
            for before in reversed(slow):
                if before["device"] == ours["device"]:
                    pace = [float(row["images_per_second"]) for row in (ours, before)]
                    return Measured(pace[0] / pace[1], [ours, before])
        return None

    return measure


def _amx_rows(rows: Rows, case: str, batch: str) -> dict[str, Row]:
    """The newest rows of a comparison with 2 threads, by provider."""
    columns = {"case": case, "batch": batch, "threads": "2"}
    return {
        row["provider"]: row for row in rows.amx if all(row[name] == value for name, value in columns.items())
    }


def _amx_ratio(cases: Sequence[str], batch: str) -> Measure:
    """The best rate on tiles over the library's best rate, the lowest of all ``cases``."""

    def measure(rows: Rows) -> Measured | None:
        ratios, used = [], []
        for case in cases:
            by_provider = _amx_rows(rows, case, batch)
            if not {"tiles", "library"} <= by_provider.keys():
                return None
            ratios.append(
                float(by_provider["tiles"]["rate_best"]) / float(by_provider["library"]["rate_best"])
            )
            used += [by_provider["tiles"], by_provider["library"]]
        return Measured(min(ratios), used)

    return measure


def _amx_share(case: str, batch: str) -> Measure:
    """The share of the AMX peak that was measured in the same run."""

    def measure(rows: Rows) -> Measured | None:
        row = _amx_rows(rows, case, batch).get("tiles")
        if row is None or not row["share_of_peak"]:
            return None
        return Measured(float(row["share_of_peak"]), [row])

    return measure


def _pgd_step(rows: Rows) -> Measured | None:
    """Microseconds per image: a training step's attack by its PGD steps, or the network's attack step."""
    trained = _trained(rows, batch="512")
    if trained is not None and trained["share_attack"]:
        seconds = float(trained["share_attack"]) / float(trained["images_per_second"])
        return Measured(1e6 * seconds / int(trained["attack_steps"]), [trained])
    row = rows.gpu("network", "attack", "triton", 512)
    return None if row is None or not row["ms_median"] else Measured(1000 * _ms(row) / 512, [row])


def _depthwise(rows: Rows) -> Measured | None:
    """The time over that of moving the bytes once at the measured bandwidth."""
    batches = [rows.gpu("depthwise", "forward", "triton", batch) for batch in GPU_BATCHES]
    present = [row for row in batches if row is not None and row["roofline_share"]]
    if len(present) < len(batches):
        return None
    return Measured(_geometric_mean([1 / float(row["roofline_share"]) for row in present]), present)


def _epoch(unit: float) -> Measure:
    """Seconds of an MTARD epoch of 50,000 images, times ``unit``."""

    def measure(rows: Rows) -> Measured | None:
        row = _trained(rows)
        return None if row is None else Measured(float(row["epoch_seconds_50000"]) * unit, [row])

    return measure


_BOTH = "H200, bfloat16, four stages, B = 256 and 512"
_CPU = "CPU, 2 threads, float32, four stages, N = 32, sum over forward, attack, training"
_TRAIN_COMMAND = "awnet bench train --recipe mtard --model awnet_resnet18"
_COMPILED = {"attack": "compile_frozen", "training": "compile"}
_STATIC = {"attack": "static_compile", "training": "static_compile"}


_AMX = "CPU with AMX, 2 threads, bfloat16"
_AMX_STEP = "PGD step of awnet_resnet18, 32x32"
_AMX_COMMAND = "python -m awnet.benchmarks.amx --threads 2"
_AMX_TRAIN = "--device cpu --threads 2 --precision bfloat16 --layout channels_last --providers awnet compile"


def _each(rival: str) -> dict[str, str]:
    return {"attack": rival, "training": rival}


def _amx_goals() -> list[Goal]:
    """The goals for CPUs with AMX, each with a stretch goal."""
    gradients = ["weight gradient 256-256@8k3s1", "weight gradient 512-512@4k3s1"]
    train = f"awnet bench train {_AMX_TRAIN}"
    compiled = "training step of {} against torch.compile of plain torch in bfloat16"
    resnet = f"{train} --batch 32"
    figures: list[tuple[str, str, float, float, str, Measure, str]] = [
        (
            "PGD step of awnet_resnet18 against the library's convolutions",
            f"{_AMX}, batch 64",
            *(1.8, 2.5, "×"),
            _amx_ratio([_AMX_STEP], "64"),
            f"{_AMX_COMMAND} --only step",
        ),
        (
            "PGD step of awnet_resnet18, share of the AMX peak",
            f"{_AMX}, batch 64",
            *(0.4, 0.6, ""),
            _amx_share(_AMX_STEP, "64"),
            f"{_AMX_COMMAND} --only step",
        ),
        (
            "weight gradient of stages 3 and 4 against the library's: the lower",
            f"{_AMX}, batch 32",
            *(3.0, 5.0, "×"),
            _amx_ratio(gradients, "32"),
            f"{_AMX_COMMAND} --only layers",
        ),
        *(
            (
                compiled.format(model),
                f"{_AMX}, MTARD with PGD-10, N = {batch}",
                *(bound, stretch, "×"),
                _cpu_step(model, "compile", batch, "bfloat16", "channels_last"),
                f"{train} --model {model.replace(' width=', ' --width ')} --batch {batch}",
            )
            for model, batch, bound, stretch in (
                ("awnet_resnet18", "32", 3.0, 4.0),
                ("awnet_resnet18 width=0.5", "32", 2.5, 4.0),
                ("awnet_tiny", "64", 2.0, 3.0),
            )
        ),
        (
            "training step of awnet_resnet18 against its float32 step",
            f"{_AMX}, MTARD with PGD-10, N = 32",
            *(5.0, 8.0, "×"),
            _against_float32("awnet_resnet18", "32"),
            f"{resnet}, and awnet bench train --device cpu --threads 2 --precision float32 --layout nchw "
            "--providers awnet --batch 32",
        ),
    ]
    return [
        Goal(name, where, limit, True, unit, measure, command, stretch=limit == ambitious)
        for name, where, bound, ambitious, unit, measure, command in figures
        for limit in (bound, ambitious)
    ]


GOALS: tuple[Goal, ...] = (
    Goal(
        "layer against the literal form",
        f"{_BOTH}, attack and training (its training by single calls)",
        20,
        True,
        "×",
        _on_gpu("triton", _each("literal")),
        _GPU_COMMAND,
    ),
    Goal(
        "layer against plain torch (unfused)",
        f"{_BOTH}, attack and training",
        2,
        True,
        "×",
        _on_gpu("triton", _each("unfused")),
        _GPU_COMMAND,
    ),
    Goal(
        "layer against torch.compile of it: worst shape",
        f"{_BOTH}, attack (parameters frozen) and training",
        1,
        True,
        "×",
        _on_gpu("triton", _COMPILED, join=min),
        f"{_GPU_COMMAND} --compile",
    ),
    Goal(
        "layer against torch.compile of it",
        f"{_BOTH}, attack (parameters frozen) and training",
        1.25,
        True,
        "×",
        _on_gpu("triton", _COMPILED),
        f"{_GPU_COMMAND} --compile",
        stretch=True,
    ),
    Goal(
        "time over a compiled static layer's",
        f"{_BOTH}, attack and training",
        1.05,
        False,
        "×",
        _on_gpu("triton", _STATIC, inverse=True),
        f"{_GPU_COMMAND} --compile",
    ),
    Goal(
        "peak memory of a training step over unfused's",
        _BOTH,
        0.6,
        False,
        "×",
        _on_gpu("triton", {"training": "unfused"}, column="peak_mib", inverse=True),
        _GPU_COMMAND,
    ),
    Goal(
        "depthwise layer over moving its bytes once",
        "H200, bfloat16, B = 256 and 512, forward",
        1.3,
        False,
        "×",
        _depthwise,
        f"{_GPU_RUN} --batch 256 512 --cases depthwise --modes forward",
    ),
    *(
        Goal(
            "PGD step of AW-Net-18, per image",
            "H200, bfloat16, B = 512",
            bound,
            False,
            " µs",
            _pgd_step,
            f"{_TRAIN_COMMAND} --batch 512",
            stretch,
        )
        for bound, stretch in ((14, False), (11, True))
    ),
    Goal(
        "MTARD epoch, PGD-10, 50,000 images",
        "H200, AW-Net-18",
        12,
        False,
        " s",
        _epoch(1),
        _TRAIN_COMMAND,
    ),
    Goal(
        "the paper's 100 epochs",
        "H200, AW-Net-18",
        25,
        False,
        " min",
        _epoch(100 / 60),
        _TRAIN_COMMAND,
    ),
    Goal("cpp against the literal form", _CPU, 4, True, "×", _cpu_total("literal"), _CPU_COMMAND),
    Goal("cpp against plain torch (unfused)", _CPU, 1.15, True, "×", _cpu_total("unfused"), _CPU_COMMAND),
    Goal("cpp over a static layer's time", _CPU, 1.1, False, "×", _cpu_total("static", True), _CPU_COMMAND),
    *(
        Goal(
            f"cpp over eager's time: {case.name}",
            "CPU, 2 threads, float32, the slowest mode",
            1.05,
            False,
            "×",
            _cpu_case(case.name),
            _CPU_COMMAND,
        )
        for case in CASES
    ),
    *(
        Goal(
            f"training step of {model} against plain torch ({rival})",
            "CPU, 2 threads, float32, MTARD with PGD-10, N = 16",
            bound,
            True,
            "×",
            _cpu_step(model, rival),
            f"awnet bench train --model {model} --device cpu --threads 2",
        )
        for model in ("awnet_tiny", "awnet_resnet18")
        for rival, bound in (("literal", 3), ("unfused", 1.3))
    ),
    *_amx_goals(),
)


@dataclass(frozen=True)
class Speedup:
    """A rival's time over ours, for the README."""

    against: str
    where: str
    measure: Measure
    command: str


_LAYERS = "four layers of ResNet-18, N = 32; forward, attack and training"
_STEP = "MTARD training step with PGD-10, N = 16"
SPEEDUPS: tuple[Speedup, ...] = (
    Speedup("the paper's equations, literally", _LAYERS, _cpu_total("literal"), _CPU_COMMAND),
    Speedup("plain PyTorch", _LAYERS, _cpu_total("unfused"), _CPU_COMMAND),
    Speedup(
        "`torch.compile` of plain PyTorch",
        f"`awnet_tiny`, {_STEP}",
        _cpu_step("awnet_tiny", "compile"),
        "awnet bench train --model awnet_tiny --providers awnet compile --device cpu --threads 2",
    ),
    Speedup(
        "plain PyTorch",
        f"`awnet_resnet18`, {_STEP}",
        _cpu_step("awnet_resnet18", "unfused"),
        "awnet bench train --device cpu --threads 2",
    ),
)


def speedups(folder: Path) -> list[tuple[Speedup, Measured | None]]:
    """Each of :data:`SPEEDUPS` with what ``folder`` has measured of it."""
    rows = Rows(read_results(folder), read_training(folder))
    return [(one, one.measure(rows)) for one in SPEEDUPS]


@dataclass(frozen=True)
class VerifyOptions:
    """Which measurements to read."""

    results: Path = FOLDER
    """Folder of the CSV files."""
    strict: bool = False
    """Exit with status 1 if a goal (not a stretch goal) was measured and not met."""


def evaluate_goals(folder: Path, goals: Sequence[Goal] = GOALS) -> list[Outcome]:
    """Every goal with the figure measured in ``folder``, if any."""
    rows = Rows(read_results(folder), read_training(folder), read_amx(folder))
    return [Outcome(goal, goal.measure(rows)) for goal in goals]


def verify(options: VerifyOptions) -> int:
    """Prints every goal as met, not met or not measured; returns the exit status."""
    console = safe_console()
    outcomes = evaluate_goals(options.results)
    styles = {"met": "green", "not met": "red", "not measured": "yellow"}
    where = ""
    for outcome in outcomes:
        goal = outcome.goal
        if goal.where != where:
            where = goal.where
            console.print(where, style="bold", soft_wrap=True)
        source = ", ".join(outcome.sources)
        console.print(
            f"  [{styles[outcome.text]}]{outcome.text:13}[/]{outcome.figure:>9}  {goal.target:9} "
            f"{goal.name}{' (stretch)' if goal.stretch else ''}{f'  {source}' if source else ''}",
            soft_wrap=True,
        )
    counts = {text: sum(outcome.text == text for outcome in outcomes) for text in styles}
    console.print(", ".join(f"{count} {text}" for text, count in counts.items()))
    commands = dict.fromkeys(v.goal.command for v in outcomes if v.measured is None)
    if commands:
        console.print("commands that measure the missing figures:")
        for command in commands:
            console.print(f"  {command}", soft_wrap=True)
    failed = any(v.text == "not met" and not v.goal.stretch for v in outcomes)
    return 1 if options.strict and failed else 0

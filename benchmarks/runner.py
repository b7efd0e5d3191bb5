"""Verifies, times, records: nothing is given a time before it is shown to be right."""

from __future__ import annotations

import csv
import io
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from awnet.files import write_text

from .cases import CASES, MODES, QUICK_CASES, Case, Inputs, Mode, make_inputs, make_upstream, step, truth
from .providers import Provider, providers, static, unfused

COLUMNS = [
    *("date", "commit", "device", "driver", "torch", "triton"),
    *("case", "mode", "provider", "batch", "channels", "size", "dtype", "layout"),
    *("ms_median", "ms_p20", "ms_p80", "peak_mib", "gb_s", "tflop_s", "roofline_share"),
    *("verified", "command"),
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROTATED_BYTES = (
    2**27
)  # inputs are rotated over copies of this size together, more than a CPU's or GPU's cache
_MOST_COPIES = 16


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and on what."""

    quick: bool = False
    """Two tiny layers instead of the four of a ResNet-18, in a file of their own."""
    device: str | None = None
    """cpu, cuda, cuda:1, …; by default the GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of images and weights; everything on [B, C] is float32."""
    layout: Literal["nchw", "channels_last"] = "nchw"
    """Memory format of images and weights."""
    batch: int | None = None
    """Samples, at least 8 (half of them clean); by default 32 on a CPU and 256 on a GPU, 8 with --quick."""
    cases: tuple[str, ...] = ()
    """Names of the layers to measure; by default all."""
    modes: tuple[Mode, ...] = MODES
    """forward: test mode. attack: test mode and the gradients of image, filter_scale and p_clean.
    training: batch statistics and the gradients of image and parameters."""
    providers: tuple[str, ...] = ()
    """Who computes: literal, unfused, static, and the names of backends; by default all that are here."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""
    seconds: float = 1.0
    """Time to spend on each row, after a warm-up; at least five steps are measured."""
    peak_tflop_s: float | None = None
    """The device's peak in this dtype; with peak_gb_s it gives the share of the roofline."""
    peak_gb_s: float | None = None
    """The device's memory bandwidth."""
    seed: int = 0
    """Of the random tensors."""
    out: Path = Path("benchmarks/results")
    """Folder of the CSV files, one a device; rows are added to what is there."""


@dataclass(frozen=True)
class Row:
    """One measurement: what a line of the CSV file says of it."""

    case: Case
    mode: Mode
    provider: str
    refused: str  # why there is no time; empty for a verified row
    ms: tuple[float, float, float] | None = None  # median, 20 % and 80 % quantile
    peak_mib: float | None = None


def run(options: BenchOptions, *, extra_providers: Mapping[str, Provider] | None = None) -> Path:
    """Measures, prints a table and adds the rows to ``<out>/<device>.csv``, whose path it returns.

    Every provider's output, gradients and running statistics are first compared with the reference in
    float64; one that fails is recorded with ``verified`` false and without a time.

    Args:
        options: what to measure.
        extra_providers: further providers by name, say a user's own implementation.

    Raises:
        ValueError: an option names an unknown case, provider or device, or is out of range.
    """
    console = Console()
    device = _device(options)
    available = providers() | dict(extra_providers or {})
    layers = {case.name: case for case in (QUICK_CASES if options.quick else CASES)}
    cases = [layers[name] for name in _chosen(tuple(layers), options.cases, "cases")]
    names = _chosen(tuple(available), options.providers, "providers")
    batch = _batch(options, device)
    path = options.out / f"{_slug(_device_name(device))}{'-quick' if options.quick else ''}.csv"
    before = _existing_rows(path)
    with _machine(options, device):
        options = replace(options, device=str(device), batch=batch, threads=torch.get_num_threads())
        rows: list[Row] = []
        with console.status("") as status:
            for case in cases:
                for mode in options.modes:
                    status.update(f"{case.name} {mode}")
                    rows += _measure(case, mode, {n: available[n] for n in names}, options, device)
        lines = [_line(row, options, device) for row in rows]
        write_text(path, _as_csv(before + lines))
        console.print(_table(rows, options, device))
    for row in rows:
        if row.refused:
            console.print(
                f"no time for {row.provider}, {row.case.name} {row.mode}: {row.refused}", style="red"
            )
    console.print(f"{len(rows)} rows added to {path}")
    return path


# --- options


def _device(options: BenchOptions) -> torch.device:
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"threads must be at least 1, got {options.threads}")
    if not options.seconds > 0:
        raise ValueError(f"seconds must be positive, got {options.seconds}")
    if options.dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {options.dtype!r}")
    if options.layout not in ("nchw", "channels_last"):
        raise ValueError(f"layout must be nchw or channels_last, got {options.layout!r}")
    unknown = [mode for mode in options.modes if mode not in MODES]
    if unknown or not options.modes:
        raise ValueError(f"modes must be some of {', '.join(MODES)}, got {options.modes}")
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {options.device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {options.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device} is not here: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _batch(options: BenchOptions, device: torch.device) -> int:
    batch = options.batch
    if batch is None:
        batch = 8 if options.quick else 32 if device.type == "cpu" else 256
    if batch < 8:
        # gradients of filter_scale nearly cancel where a branch has fewer than three samples
        raise ValueError(f"batch must be at least 8, got {batch}")
    return batch


def _chosen(known: Sequence[str], wanted: Sequence[str], option: str) -> list[str]:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{option} names {', '.join(unknown)}; there are {', '.join(known)}")
    return list(wanted or known)


@contextmanager
def _machine(options: BenchOptions, device: torch.device) -> Iterator[None]:
    """Sets threads, device and full float32 precision (no TF32) for the run, and puts them back."""
    threads = torch.get_num_threads()
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


# --- verification


def _relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    def error(name: str) -> float:
        if got[name].shape != want[name].shape:
            return float("inf")
        difference = got[name].to(torch.float64) - want[name]
        return float(difference.norm() / want[name].norm())

    return {name: error(name) for name in want}


def _tolerances(inputs: Inputs, mode: Mode, upstream: Tensor, want: dict[str, Tensor]) -> dict[str, float]:
    """float32: 1e-5 forward, 1e-4 for a gradient. Below it: twice what plain torch loses in that dtype."""
    if inputs.input.dtype == torch.float32:
        return {name: 1e-4 if name.startswith("gradient") else 1e-5 for name in want}
    plain = static if inputs.filter_scale is None else unfused
    yardstick = _relative_errors(step(plain, inputs.clone(), mode, upstream), want)
    return {name: min(2 * error, 0.1) for name, error in yardstick.items()}


def _fault(provider: Provider, inputs: Inputs, mode: Mode, upstream: Tensor, want: dict[str, Tensor]) -> str:
    """Why ``provider`` may not be timed; empty if its results agree with ``want``."""
    try:
        got = step(provider.layer, inputs.clone(), mode, upstream)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"it raised {type(error).__name__}: {error}"
    limits = _tolerances(inputs, mode, upstream, want)
    errors = _relative_errors(got, want)
    wrong = [name for name in want if not errors[name] <= limits[name]]  # NaN is wrong too
    return "; ".join(
        f"{name} is off by {errors[name]:.1e}, at most {limits[name]:.1e} allowed" for name in wrong
    )


# --- timing


def _measure(
    case: Case, mode: Mode, wanted: Mapping[str, Provider], options: BenchOptions, device: torch.device
) -> list[Row]:
    assert options.batch is not None
    rows: dict[str, Row] = {}
    for is_static in (False, True):
        mine = {name: provider for name, provider in wanted.items() if provider.static == is_static}
        if not mine:
            continue
        inputs = make_inputs(
            case,
            options.batch,
            static=is_static,
            device=device,
            dtype=_DTYPES[options.dtype],
            channels_last=options.layout == "channels_last",
            seed=options.seed,
        )
        upstream = make_upstream(inputs, mode, options.seed + 1)
        want = truth(inputs, mode, upstream)
        right: dict[str, Callable[[], object]] = {}
        for name, provider in mine.items():
            fault = _fault(provider, inputs, mode, upstream, want)
            rows[name] = Row(case, mode, name, fault)
            if not fault:
                right[name] = _repeated(provider, inputs, mode, upstream)
        time_all = _time_on_cuda if device.type == "cuda" else _time_on_cpu
        for name, (ms, peak) in time_all(right, options.seconds).items():
            rows[name] = replace(rows[name], ms=ms, peak_mib=peak)
    return [rows[name] for name in wanted]


def _repeated(provider: Provider, inputs: Inputs, mode: Mode, upstream: Tensor) -> Callable[[], object]:
    """A step to call again and again: the images rotate, so that they do not lie in the cache."""
    own = inputs.clone()
    size = own.input.numel() * own.input.element_size()
    copies = min(max(_ROTATED_BYTES // size, 1), _MOST_COPIES)
    rotation = cycle([replace(own, input=own.input.detach().clone()) for _ in range(copies)])
    return lambda: step(provider.layer, next(rotation), mode, upstream)


Times = dict[str, tuple[tuple[float, float, float], float | None]]  # (median, 20 %, 80 %) in ms, peak in MiB


def _time_on_cpu(steps: Mapping[str, Callable[[], object]], seconds: float) -> Times:
    """All take turns, so that whatever else runs on the machine slows them alike."""

    def turn() -> dict[str, float]:
        took: dict[str, float] = {}
        for name, once in steps.items():
            start = time.perf_counter()
            once()
            took[name] = 1000 * (time.perf_counter() - start)
        return took

    budget = seconds * len(steps)
    turn()
    warm = time.perf_counter() + 0.2 * budget
    while time.perf_counter() < warm:
        turn()
    turns: list[dict[str, float]] = []
    end = time.perf_counter() + budget
    while len(turns) < 5 or time.perf_counter() < end:
        turns.append(turn())
    times: Times = {}
    for name in steps:
        samples = [took[name] for took in turns]
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        times[name] = (statistics.median(samples), fifths[0], fifths[3]), None
    return times


def _time_on_cuda(steps: Mapping[str, Callable[[], object]], seconds: float) -> Times:
    """By CUDA events, the L2 cache flushed before each step; the peak is of memory beside the inputs."""
    from triton.testing import do_bench

    times: Times = {}
    for name, once in steps.items():
        for _ in range(3):
            once()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        once()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - held) / 2**20
        median, p20, p80 = do_bench(once, warmup=100, rep=round(1000 * seconds), quantiles=[0.5, 0.2, 0.8])
        times[name] = (median, p20, p80), peak
    return times


# --- records


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def _output_of(*command: str, folder: Path | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed: another repository's commit would be a lie
        return ""
    return _output_of("git", "describe", "--always", "--dirty", "--exclude=*", folder=root)


def _driver(device: torch.device) -> str:
    if device.type == "cpu":
        return ""
    lines = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else ""


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def command_line(options: BenchOptions) -> str:
    """The command that repeats a run: every option that is not the default, and no path."""
    words = ["awnet", "bench", "run"]
    for field in fields(BenchOptions):  # a subclass, the command line's say, has more
        value = getattr(options, field.name)
        if field.name == "out" or value == field.default:
            continue
        words.append("--" + field.name.replace("_", "-"))
        words += [] if value is True else [str(v) for v in (value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


def _roofline_ms(row: Row, options: BenchOptions) -> float | None:
    """The least time that the device's peak and bandwidth allow."""
    if options.peak_tflop_s is None or options.peak_gb_s is None or options.batch is None:
        return None
    arithmetic = row.case.flops(row.mode, options.batch) / (options.peak_tflop_s * 1e9)
    item = _DTYPES[options.dtype].itemsize
    return max(arithmetic, row.case.bytes(row.mode, options.batch, item) / (options.peak_gb_s * 1e6))


def _line(row: Row, options: BenchOptions, device: torch.device) -> dict[str, str]:
    assert options.batch is not None
    line = dict.fromkeys(COLUMNS, "")
    line |= {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": _device_name(device),
        "driver": _driver(device),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "case": row.case.name,
        "mode": row.mode,
        "provider": row.provider,
        "batch": str(options.batch),
        "channels": str(row.case.channels),
        "size": str(row.case.size),
        "dtype": options.dtype,
        "layout": options.layout,
        "verified": "false" if row.refused else "true",
        "command": command_line(options),
    }
    if row.ms is not None:
        item = _DTYPES[options.dtype].itemsize
        line |= {
            name: f"{ms:.4f}" for name, ms in zip(("ms_median", "ms_p20", "ms_p80"), row.ms, strict=True)
        }
        line["gb_s"] = f"{row.case.bytes(row.mode, options.batch, item) / row.ms[0] / 1e6:.3f}"
        line["tflop_s"] = f"{row.case.flops(row.mode, options.batch) / row.ms[0] / 1e9:.4f}"
        least = _roofline_ms(row, options)
        if least is not None:
            line["roofline_share"] = f"{least / row.ms[0]:.4f}"
    if row.peak_mib is not None:
        line["peak_mib"] = f"{row.peak_mib:.2f}"
    return line


def _existing_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(
                f"{path} has other columns than this version writes; move it away, or name another folder "
                "with out"
            )
        return list(reader)


def _as_csv(lines: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _table(rows: list[Row], options: BenchOptions, device: torch.device) -> Table:
    unfused_ms = {
        (row.case.name, row.mode): row.ms[0] for row in rows if row.provider == "unfused" and row.ms
    }
    table = Table(
        title=f"{_device_name(device)}, {options.dtype}{'' if device.type == 'cpu' else ' (no TF32)'}, "
        f"{options.layout}, batch {options.batch}, CPU threads: {options.threads}"
    )
    for heading in ("layer", "mode", "provider"):
        table.add_column(heading)
    for heading in ("median ms", "20–80 %", "× unfused"):
        table.add_column(heading, justify="right")
    for row in rows:
        shape = f"{row.case.name} {row.case.channels}@{row.case.size}²"
        if row.ms is None:
            table.add_row(shape, row.mode, row.provider, "wrong", "", "", style="red")
            continue
        plain = unfused_ms.get((row.case.name, row.mode))
        ratio = "" if plain is None else f"{row.ms[0] / plain:.2f}"
        median, p20, p80 = (f"{ms:.1f}" if ms >= 100 else f"{ms:.3f}" for ms in row.ms)
        table.add_row(shape, row.mode, row.provider, median, f"{p20}–{p80}", ratio)
    return table

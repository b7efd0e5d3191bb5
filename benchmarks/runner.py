"""Verifies, times, records: nothing is given a time before it is shown to be right."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from awnet.devices import resolve_device
from awnet.provenance import git_commit
from awnet.terminal import safe_console

from . import results
from .cases import (
    CASES,
    MODES,
    SMOKE_CASES,
    Case,
    LayerCase,
    Mode,
    Problem,
    make_upstream,
    shape_case,
    step,
)
from .ceilings import Ceilings, measure_ceilings
from .providers import COMPILED, Provider, providers, unfused
from .timing import Times, measure

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# images are rotated over copies of this size together, more than a CPU's or GPU's cache
_ROTATED_BYTES = 2**27
_MOST_COPIES = 16
_GPU_BATCHES = (1, 32, 128, 256, 512, 1024)
# in training a branch of fewer samples than four has gradients of filter_scale that nearly cancel
_LEAST_TRAINING_BATCH = 8


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and on what."""

    smoke: bool = False
    """The whole registry at tiny sizes, within two minutes on a CPU, into a file of its own."""
    device: str | None = None
    """cpu, cuda, cuda:1, …; by default the GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of images and weights; everything on [B, C] is float32."""
    layout: Literal["nchw", "channels_last"] = "nchw"
    """Memory format of images and weights."""
    batch: tuple[int, ...] = ()
    """Samples, one or several numbers; by default 1 32 128 256 512 1024 on a GPU, 32 on a CPU (the network
    8), 8 with --smoke. Training, with half of the samples clean, is measured from 8 on."""
    cases: tuple[str, ...] = ()
    """What to measure, by name: stage1 to stage4, stem, shortcut, transition, depthwise, block, network; by
    default all."""
    shape: tuple[str, ...] = ()
    """Layers of your own instead, each as C_IN,C_OUT,SIZE[,KERNEL[,STRIDE[,GROUPS]]]: 64,128,32 is a 3×3
    layer from 64 to 128 channels on 32×32 images."""
    modes: tuple[Mode, ...] = MODES
    """forward: test mode. attack: test mode, and the gradients of image, filter_scale and p_clean.
    training: batch statistics, and the gradients of image, filter_scale and parameters."""
    providers: tuple[str, ...] = ()
    """Who computes: literal, unfused, static, compile, compile_frozen, static_compile, and the names of
    backends; by default all that are here, without the three compiled ones (but for one row of --smoke)."""
    compile: bool = False
    """Add the three providers that torch.compile makes (on a GPU with max-autotune); each takes up to a
    minute before it runs."""
    missing: bool = False
    """Leave out what the file already has of this commit: goes on where a run was stopped."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""
    seconds: float | None = None
    """Time to spend on each row, after a warm-up, by default 1, 0.05 with --smoke; on a CPU at least three
    steps are measured."""
    seed: int = 0
    """Of the random tensors."""
    out: Path = results.FOLDER
    """Folder of the CSV files, one a device; rows are added to what is there."""


@dataclass(frozen=True)
class Row:
    """One measurement: what a line of the CSV file says of it."""

    case: Case
    mode: Mode
    provider: str
    batch: int
    static: bool
    refused: str  # why there is no time; empty for a verified row
    times: Times | None = None


@dataclass(frozen=True)
class _Job:
    """One case, mode and batch: its providers take turns."""

    case: Case
    mode: Mode
    batch: int
    providers: dict[str, Provider]


def run(options: BenchOptions, *, extra_providers: Mapping[str, Provider] | None = None) -> Path:
    """Measures, prints tables and adds the rows to ``<out>/<device>.csv``, whose path it returns.

    First the device's ceilings, by a copy and a matrix product. Then every provider's output, gradients and
    running statistics are compared with the reference in float64, and what agrees is timed; one that fails is
    recorded with ``verified`` false and without a time. Rows are on disk as soon as they are measured.

    Args:
        options: what to measure.
        extra_providers: further providers by name, say a user's own implementation.

    Raises:
        ValueError: an option names an unknown case, provider or device, or is out of range.
    """
    console = safe_console()
    device = _device(options)
    path = options.out / f"{_slug(_device_name(device))}{'-smoke' if options.smoke else ''}.csv"
    before = results.read_rows(path)
    jobs = _jobs(options, device, dict(extra_providers or {}))
    with _machine(options, device):
        options = replace(options, device=str(device), threads=torch.get_num_threads())
        provenance = _provenance(options, device)
        if options.missing:
            jobs = _left(jobs, before, provenance)
        console.print(
            f"{_device_name(device)}, {options.dtype}, TF32 off, {options.layout}, "
            f"{options.threads} CPU threads: {sum(len(job.providers) for job in jobs)} rows",
            soft_wrap=True,
        )
        if not jobs:
            return path
        ceilings = measure_ceilings(device, _DTYPES[options.dtype], _seconds(options), options.smoke)
        results.add_rows(path, _ceiling_lines(ceilings, provenance))
        console.print(f"ceilings: copy {ceilings.gb_s:.1f} GB/s, product {ceilings.tflop_s:.3f} TFLOP/s")
        count = 0
        for job, rows in _measured(jobs, options, device, console):
            results.add_rows(path, [_line(row, provenance, ceilings) for row in rows])
            count += len(rows)
            console.print(_table(job, rows, ceilings, _DTYPES[options.dtype].itemsize))
            for row in rows:
                if row.refused:
                    console.print(
                        f"no time for {row.provider}: {row.refused}",
                        style="red",
                        markup=False,
                        soft_wrap=True,
                    )
    console.print(f"{count + 2} rows added to {path}", soft_wrap=True)
    return path


# --- what to measure


def _device(options: BenchOptions) -> torch.device:
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"threads must be at least 1, got {options.threads}")
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"seconds must be positive, got {options.seconds}")
    if options.dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {options.dtype!r}")
    if options.layout not in ("nchw", "channels_last"):
        raise ValueError(f"layout must be nchw or channels_last, got {options.layout!r}")
    unknown = [mode for mode in options.modes if mode not in MODES]
    if unknown or not options.modes:
        raise ValueError(f"modes must be some of {', '.join(MODES)}, got {options.modes}")
    for batch in options.batch:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
    return resolve_device(options.device)


def _chosen(known: Sequence[str], wanted: Sequence[str], option: str) -> list[str]:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{option} names {', '.join(unknown)}; there are {', '.join(known)}")
    return list(wanted or known)


def _seconds(options: BenchOptions) -> float:
    return options.seconds or (0.05 if options.smoke else 1.0)


def _batches(options: BenchOptions, case: Case, device: torch.device) -> tuple[int, ...]:
    if options.batch or options.smoke:
        return options.batch or (8,)
    if device.type == "cuda":
        return _GPU_BATCHES
    return (8,) if case.name == "network" else (32,)


def _jobs(options: BenchOptions, device: torch.device, extra: dict[str, Provider]) -> list[_Job]:
    available = providers() | extra
    if options.shape and options.cases:
        raise ValueError(
            "shape and cases are both given: measure layers of your own, or those of the registry"
        )
    own = [shape_case(text) for text in options.shape]
    registry: dict[str, Case] = {case.name: case for case in own or (SMOKE_CASES if options.smoke else CASES)}
    names = _chosen(tuple(available), options.providers, "providers")
    if not options.providers and not options.compile:
        names = [name for name in names if name not in COMPILED]
    elif options.compile:
        names += [name for name in COMPILED if name not in names]
    # one compiled row shows that the compiler works here; each takes some ten seconds
    sample = {"compile": COMPILED["compile"]} if options.smoke and _has_compiler(device) else {}
    jobs = []
    for case_name in _chosen(tuple(registry), options.cases, "cases"):
        for batch in _batches(options, registry[case_name], device):
            for mode in options.modes:
                able = {name: available[name] for name in names if mode in available[name].modes}
                if (case_name, mode) == ("stage1", "forward") and not options.cases + options.providers:
                    able |= sample
                if able and (mode != "training" or batch >= _LEAST_TRAINING_BATCH):
                    jobs.append(_Job(registry[case_name], mode, batch, able))
    if not jobs:
        raise ValueError(
            f"nothing is left to measure of batch {options.batch}, modes {options.modes}, providers {names}: "
            f"training needs a batch of {_LEAST_TRAINING_BATCH} or more, compile_frozen an attack"
        )
    return jobs


def _has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can work: it needs a C++ compiler, and on a GPU Triton."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and (device.type == "cpu" or importlib.util.find_spec("triton") is not None)


def _left(jobs: list[_Job], before: Iterable[results.Row], provenance: results.Row) -> list[_Job]:
    """The jobs without what ``before`` has of the same commit, options and device."""

    def sought(line: results.Row) -> tuple[Any, ...]:
        return (*results.key(line), line["commit"], line["torch"])

    done = {sought(line) for line in before}
    left = []
    for job in jobs:
        rest = {
            name: provider
            for name, provider in job.providers.items()
            if sought(provenance | _what(Row(job.case, job.mode, name, job.batch, provider.static, "")))
            not in done
        }
        if rest:
            left.append(replace(job, providers=rest))
    return left


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


# --- one provider on one problem


class _Trial:
    """A step to call again and again: the images rotate, so that they do not lie in the cache."""

    def __init__(
        self, case: Case, problem: Problem, provider: Provider, mode: Mode, upstream: Tensor, copies: int
    ) -> None:
        self.mode, self.upstream, self.provider = mode, upstream, provider
        self.problem = problem = problem.clone()
        module_of_ours = problem.module is not None and provider.backend is not None
        device = problem.image.device
        self.forward = case.forward(
            problem,
            None if module_of_ours else provider.layer,
            mode,
            _compiler(device) if provider.compiled else None,
        )
        self.backend = provider.backend if module_of_ours else None
        for parameter in problem.parameters.values():
            parameter.requires_grad_(mode == "training" or (mode == "attack" and not provider.frozen))
        self.leaves = case.leaves(problem, mode)
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self.wants_image = mode == "attack" or (mode == "training" and not case.image_is_data)
        images = [problem.image.detach().clone() for _ in range(copies)]
        for image in images:
            image.requires_grad_(self.wants_image)
        self.images = cycle(images)

    def __call__(self) -> dict[str, Tensor]:
        if self.provider.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        image = next(self.images)
        leaves = {"image": image, **self.leaves} if self.wants_image else self.leaves
        with _use_backend(self.backend):
            return step(self.forward, image, leaves, self.problem.running, self.mode, self.upstream)


def _use_backend(name: str | None) -> Any:
    from awnet.ops import use_backend

    return nullcontext() if name is None else use_backend(name)


def _compiler(device: torch.device) -> Callable[[Any], Any]:
    mode = "max-autotune" if device.type == "cuda" else None
    return lambda what: torch.compile(what, mode=mode, dynamic=False)


# --- verification


def _exact(case: Case) -> Provider:
    """Who gives the truth, in float64: the literal form; for a whole network plain torch, since the literal
    form copies the weights for each sample (the tests hold the two equal)."""
    return providers()["unfused" if case.name == "network" else "literal"]


def _joined(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's parameters joined by kind (``conv1.bn.weight`` of all blocks), anything else by itself.

    One of hundreds of gradients may be next to nothing; all of a kind are not.
    """
    kinds: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        what, _, place = name.rpartition(" ")
        kind = re.split(r"\.\d+\.", place)[-1] if "." in place else place
        kinds.setdefault(f"{what} {kind}".strip(), []).append(value)
    return {k: v[0] if len(v) == 1 else torch.cat([x.flatten() for x in v]) for k, v in kinds.items()}


def _relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    if any(got[name].shape != want[name].shape for name in want):
        return {name: float("inf") for name in want if got[name].shape != want[name].shape}
    mine, right = _joined(got), _joined(want)
    return {
        name: float((mine[name].double() - right[name]).norm() / right[name].norm().clamp(min=1e-30))
        for name in right
    }


def _limits(
    case: Case, problem: Problem, mode: Mode, upstream: Tensor, want: dict[str, Tensor]
) -> dict[str, float]:
    """The relative error allowed.

    One layer in float32: 1e-5 forward, 1e-4 for a gradient; in low precision twice what plain torch loses
    there. Where ReLUs lie between layers, rounding switches a share of eps of them, and not the same ones for
    two providers, so that gradients differ by some √eps.
    """
    dtype = problem.image.dtype
    eps = torch.finfo(dtype).eps
    if isinstance(case, LayerCase) and dtype == torch.float32:
        return {name: 1e-4 if name.startswith("gradient") else 1e-5 for name in _joined(want)}
    plain = _relative_errors(_Trial(case, problem, Provider(unfused), mode, upstream, 1)(), want)
    if isinstance(case, LayerCase):
        return {name: min(max(eps, 2 * error), 0.1) for name, error in plain.items()}
    worst = max((error for name, error in plain.items() if name.startswith("gradient")), default=0.0)
    return {
        name: min(max(4 * eps**0.5, 3 * worst), 0.5)
        if name.startswith("gradient")
        else min(max(100 * eps, 2 * error), 0.1)
        for name, error in plain.items()
    }


def _fault(trial: Callable[[], dict[str, Tensor]], want: dict[str, Tensor], limits: dict[str, float]) -> str:
    """Why ``trial`` may not be timed; empty if its results agree with ``want``."""
    errors = _relative_errors(trial(), want)
    # NaN is wrong too; a name without a limit is one of a wrong shape
    wrong = [name for name, error in errors.items() if not error <= limits.get(name, 0.0)]
    return "; ".join(
        f"{name} is off by {errors[name]:.1e}, at most {limits.get(name, 0.0):.1e} allowed" for name in wrong
    )


_REFUSED = (RuntimeError, ValueError, TypeError, NotImplementedError)


def _measure(job: _Job, options: BenchOptions, device: torch.device) -> list[Row]:
    rows: dict[str, Row] = {}
    if any(provider.compiled for provider in job.providers.values()):
        torch._dynamo.reset()  # it compiles one function for a few shapes only
    for static in (False, True):
        mine = {name: provider for name, provider in job.providers.items() if provider.static == static}
        for name in mine:
            rows[name] = Row(job.case, job.mode, name, job.batch, static, "not verified")
        if not mine:
            continue
        dtype = _DTYPES[options.dtype]
        last = options.layout == "channels_last"
        problem = job.case.problem(job.batch, static, device, dtype, last, options.seed)
        copies = min(max(_ROTATED_BYTES // (problem.image.numel() * dtype.itemsize), 1), _MOST_COPIES)
        try:
            exact = _exact(job.case)
            upstream = make_upstream(job.case, problem, job.mode, exact.layer, options.seed + 1)
            precise = problem.to(torch.float64)
            want = _Trial(job.case, precise, exact, job.mode, upstream.double(), 1)()
            if job.batch < _LEAST_TRAINING_BATCH:
                want.pop("gradient of p_clean", None)  # so few numbers may nearly cancel
            limits = _limits(job.case, problem, job.mode, upstream, want)
        except torch.OutOfMemoryError as error:
            for name in mine:
                rows[name] = replace(rows[name], refused=f"there is no memory to verify it: {error}")
            continue
        right: dict[str, Callable[[], object]] = {}
        for name, provider in mine.items():
            try:
                trial = _Trial(job.case, problem, provider, job.mode, upstream, copies)
                fault = _fault(trial, want, limits)
            except _REFUSED as error:
                fault = f"it raised {type(error).__name__}: {error}"
            rows[name] = replace(rows[name], refused=fault)
            if not fault:
                right[name] = trial
        del want
        for name, times in measure(right, device, _seconds(options)).items():
            rows[name] = replace(rows[name], times=times)
    return [rows[name] for name in job.providers]


def _measured(
    jobs: list[_Job], options: BenchOptions, device: torch.device, console: Console
) -> Iterator[tuple[_Job, list[Row]]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=f"{job.case.name} {job.mode}, batch {job.batch}")
            yield job, _measure(job, options, device)
            progress.advance(task)


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
    """The repository's commit, with -dirty if files other than results differ from it; "" if installed."""
    commit = git_commit(ignore=[results.FOLDER.as_posix()])
    return "" if commit.hash is None else commit.hash[:7] + ("-dirty" if commit.modified else "")


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


def command_line(options: object, action: str = "run", kind: type = BenchOptions) -> str:
    """The command that repeats a run: every option of ``kind`` that is not the default, and no path."""
    words = ["awnet", "bench", action]
    for field in fields(kind):  # a subclass, the command line's say, has more
        value = getattr(options, field.name)
        if field.name in ("out", "missing", "data_dir") or value == field.default:
            continue
        words.append("--" + field.name.replace("_", "-"))
        words += [] if value is True else [str(v) for v in (value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


def _provenance(options: BenchOptions, device: torch.device) -> results.Row:
    return dict.fromkeys(results.COLUMNS, "") | {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": _device_name(device),
        "driver": _driver(device),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "dtype": options.dtype,
        "layout": options.layout,
        "command": command_line(options),
    }


def _what(row: Row) -> results.Row:
    first = row.case.convolutions()[0]
    return {
        "case": row.case.name,
        "mode": row.mode,
        "provider": row.provider,
        "batch": str(row.batch),
        "channels": str(first.c_out),
        "size": str(first.size),
    }


def _times(times: Times) -> results.Row:
    columns = {"ms_median": times.median, "ms_p20": times.p20, "ms_p80": times.p80}
    line = {name: f"{ms:.4f}" for name, ms in columns.items()}
    return line if times.peak_mib is None else line | {"peak_mib": f"{times.peak_mib:.2f}"}


def _work(row: Row, item: int) -> tuple[float, float]:
    """Floating-point operations, and compulsory bytes."""
    return (
        row.case.flops(row.mode, row.batch, row.static),
        row.case.bytes(row.mode, row.batch, item, row.static),
    )


def _line(row: Row, provenance: results.Row, ceilings: Ceilings) -> results.Row:
    line = provenance | _what(row) | {"verified": "false" if row.refused else "true"}
    if row.times is None:
        return line
    flops, moved = _work(row, _DTYPES[provenance["dtype"]].itemsize)
    return line | {
        **_times(row.times),
        "gb_s": f"{moved / row.times.median / 1e6:.3f}",
        "tflop_s": f"{flops / row.times.median / 1e9:.4f}",
        "roofline_share": f"{ceilings.least_ms(flops, moved) / row.times.median:.4f}",
    }


def _ceiling_lines(ceilings: Ceilings, provenance: results.Row) -> list[results.Row]:
    common = provenance | {
        "mode": "ceiling",
        "provider": "torch",
        "verified": str(ceilings.verified).lower(),
    }
    size = str(ceilings.matmul_size)
    return [
        common | {"case": "copy", **_times(ceilings.copy), "gb_s": f"{ceilings.gb_s:.3f}"},
        common
        | {"case": "matmul", "size": size, **_times(ceilings.matmul), "tflop_s": f"{ceilings.tflop_s:.4f}"},
    ]


def _table(job: _Job, rows: list[Row], ceilings: Ceilings, item: int) -> Table:
    plain = next((row.times.median for row in rows if row.provider == "unfused" and row.times), None)
    first = job.case.convolutions()[0]
    table = Table(
        title=f"{job.case.name} {first.c_in}→{first.c_out}@{first.size}², {job.mode}, batch {job.batch}",
        title_justify="left",
    )
    table.add_column("provider")
    for heading in ("median ms", "20–80 %", "× unfused", "TFLOP/s", "roofline"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.times is None:
            table.add_row(row.provider, "wrong", "", "", "", "", style="red")
            continue
        flops, moved = _work(row, item)
        times = row.times
        median, p20, p80 = (
            f"{ms:.1f}" if ms >= 100 else f"{ms:.3f}" for ms in (times.median, times.p20, times.p80)
        )
        table.add_row(
            row.provider,
            median,
            f"{p20}–{p80}",
            "" if plain is None else f"{times.median / plain:.2f}",
            f"{flops / times.median / 1e9:.3f}",
            f"{ceilings.least_ms(flops, moved) / times.median:.0%}",
        )
    return table

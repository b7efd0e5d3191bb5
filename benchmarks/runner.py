"""``awnet bench run``: verifies, times and records. Nothing is timed before its results are verified."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from awnet.terminal import safe_console

from . import machine, results, timing
from .cases import CASES, SMOKE_CASES, Case, Mode, Problem, make_upstream, shape_case
from .ceilings import Ceilings, CeilingTracker, measure_ceilings
from .options import DTYPES, MIN_TRAINING_BATCH, BenchOptions, check, command_line
from .providers import COMPILED, Provider, providers, unfused
from .timing import Times
from .verification import Trial, error_limits, exact_provider, fault

__all__ = ["BenchOptions", "Row", "run"]

# images rotate over copies of this size in total, more than the cache of a CPU or GPU
_ROTATED_BYTES = 2**27
_MAX_COPIES = 16
_GPU_BATCHES = (1, 32, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Row:
    """One measurement."""

    case: Case
    mode: Mode
    provider: str
    batch: int
    static: bool
    refused: str  # why the results are not verified; empty for a verified row
    times: Times | None = None
    eager_ms: float | None = None  # of single calls on a GPU
    not_captured: str = ""  # why a verified row has no time


@dataclass(frozen=True)
class Job:
    """One case, mode and batch; its providers are measured in turns."""

    case: Case
    mode: Mode
    batch: int
    providers: dict[str, Provider]


def run(options: BenchOptions, *, extra_providers: Mapping[str, Provider] | None = None) -> Path:
    """Measures, prints tables and appends the rows to ``<out>/<device>.csv``, whose path it returns.

    Every provider's output, gradients and running statistics are compared with the reference in float64, and
    those that agree are timed; one that fails gets a row with ``verified`` false and no time. The ceilings of
    the device are timed at the start, during the run and at the end. Rows are on disk as soon as they are
    measured; at the end their shares of the roofline are written again with the best ceilings.

    Args:
        options: what to measure.
        extra_providers: further providers by name, such as a user's implementation.

    Raises:
        ValueError: an option names an unknown case, provider or device, or is out of range.
    """
    console = safe_console()
    device = check(options)
    path = machine.csv_path(options.out, device, "-smoke" if options.smoke else "")
    before = results.read_rows(path)
    jobs = make_jobs(options, device, dict(extra_providers or {}))
    with machine.full_precision(device, options.threads):
        options = replace(options, device=str(device), threads=torch.get_num_threads())
        common = _common(options, device)
        if options.missing:
            jobs = _missing(jobs, before, common)
        console.print(
            f"{common['device']}, {options.dtype}, TF32 off, {options.layout}, "
            f"{options.threads} CPU threads: {sum(len(job.providers) for job in jobs)} rows",
            soft_wrap=True,
        )
        if not jobs:
            return path
        dtype = DTYPES[options.dtype]
        tracker = CeilingTracker(partial(measure_ceilings, device, dtype, _seconds(options), options.smoke))
        written: list[results.Row] = []
        rows: list[Row] = []

        def write() -> None:
            nonlocal written
            lines = _ceiling_lines(tracker.best, common)
            lines += [_line(row, common, tracker.best) for row in rows]
            results.replace_rows(path, written, lines)
            written = lines

        write()
        for job, new in _measured(jobs, options, device, console):
            rows += new
            tracker.update()
            write()
            console.print(_table(job, new, tracker.best, dtype.itemsize))
            for row in new:
                _print_note(console, row)
        tracker.update(force=True)
        write()
    _print_ceilings(console, tracker.best)
    console.print(f"{len(written)} rows added to {path}", soft_wrap=True)
    return path


def _print_note(console: Console, row: Row) -> None:
    if row.refused:
        text, style = f"no time for {row.provider}: {row.refused}", "red"
    elif row.not_captured:
        text, style = f"no time for {row.provider}: {row.not_captured}", "yellow"
    elif row.times is not None and row.times.interference.disturbed:
        text, style = f"{row.provider} was disturbed: {row.times.interference}", "yellow"
    else:
        return
    console.print(text, style=style, markup=False, soft_wrap=True)


def _print_ceilings(console: Console, ceilings: Ceilings) -> None:
    peak = "" if ceilings.amx_tflop_s is None else f", AMX tiles {ceilings.amx_tflop_s:.3f} TFLOP/s"
    console.print(
        f"ceilings: copy {ceilings.gb_s:.1f} GB/s, matrix product {ceilings.tflop_s:.3f} TFLOP/s{peak}",
        soft_wrap=True,
    )


# --- jobs


def _chosen(known: Sequence[str], requested: Sequence[str], option: str) -> list[str]:
    unknown = [name for name in requested if name not in known]
    if unknown:
        names = ", ".join(name or "''" for name in unknown)
        raise ValueError(f"{option} names {names}; available: {', '.join(known)}")
    return list(requested or known)


def _seconds(options: BenchOptions) -> float:
    return options.seconds or (0.05 if options.smoke else 1.0)


def _batches(options: BenchOptions, case: Case, device: torch.device) -> tuple[int, ...]:
    if options.batch or options.smoke:
        return options.batch or (8,)
    if device.type == "cuda":
        return _GPU_BATCHES
    return (8,) if case.name == "network" else (32,)


def make_jobs(options: BenchOptions, device: torch.device, extra: dict[str, Provider]) -> list[Job]:
    """The jobs of a run. ValueError for an unknown name, or if nothing is left to measure."""
    available = providers(str(device)) | extra
    if options.shape and options.cases:
        raise ValueError("shape and cases are both given: use either")
    other = [shape_case(text) for text in options.shape]
    registry: dict[str, Case] = {
        case.name: case for case in other or (SMOKE_CASES if options.smoke else CASES)
    }
    names = _chosen(tuple(available), options.providers, "providers")
    if not options.providers and not options.compile:
        names = [name for name in names if name not in COMPILED]
    elif options.compile:
        names += [name for name in COMPILED if name not in names]
    # one compiled row shows that the compiler works here; each takes about ten seconds
    sample = {"compile": COMPILED["compile"]} if options.smoke and has_compiler(device) else {}
    jobs = []
    for case_name in _chosen(tuple(registry), options.cases, "cases"):
        for batch in _batches(options, registry[case_name], device):
            for mode in options.modes:
                supporting = {name: available[name] for name in names if mode in available[name].modes}
                if (case_name, mode) == ("stage1", "forward") and not options.cases + options.providers:
                    supporting |= sample
                if supporting and (mode != "training" or batch >= MIN_TRAINING_BATCH):
                    jobs.append(Job(registry[case_name], mode, batch, supporting))
    if not jobs:
        raise ValueError(
            f"nothing is left to measure of batch {options.batch}, modes {options.modes}, providers {names}: "
            f"training needs a batch of {MIN_TRAINING_BATCH} or more, compile_frozen an attack"
        )
    return jobs


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can work: it needs a C++ compiler, and on a GPU Triton."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and (device.type == "cpu" or importlib.util.find_spec("triton") is not None)


def _missing(jobs: list[Job], before: Iterable[results.Row], common: results.Row) -> list[Job]:
    """The jobs without the rows that ``before`` has of the same commit, options and device."""

    def key(line: results.Row) -> tuple[Any, ...]:
        return (*results.key(line), line["commit"], line["torch"])

    done = {key(line) for line in before}
    missing = []
    for job in jobs:
        rest = {
            name: provider
            for name, provider in job.providers.items()
            if key(common | _subject(Row(job.case, job.mode, name, job.batch, provider.static, "")))
            not in done
        }
        if rest:
            missing.append(replace(job, providers=rest))
    return missing


# --- measurements


_PROVIDER_ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError)


@dataclass(frozen=True)
class _Check:
    """A problem of one batch, and the results that a provider must have on it."""

    problem: Problem
    upstream: Tensor
    expected: dict[str, Tensor]
    limits: dict[str, float]


def _check_batches(job: Job, options: BenchOptions) -> list[int]:
    """The batches at which providers are compared with the reference; the last one is timed."""
    small = options.verify_batch
    return [job.batch] if small is None or small >= job.batch else [small, job.batch]


def _check_at(job: Job, batch: int, static: bool, options: BenchOptions, device: torch.device) -> _Check:
    case, mode, dtype = job.case, job.mode, DTYPES[options.dtype]
    problem = case.problem(batch, static, device, dtype, options.layout == "channels_last", options.seed)
    # beyond --verify-batch plain torch in float32 replaces the literal form in float64
    large = options.verify_batch is not None and batch > options.verify_batch
    exact = Provider(unfused) if large else exact_provider(case)
    upstream = make_upstream(case, problem, mode, exact.layer, options.seed + 1)
    wide = torch.float32 if large else torch.float64
    expected = Trial(case, problem.to(wide), exact, mode, upstream.to(wide), 1)()
    if batch < MIN_TRAINING_BATCH:
        expected.pop("gradient of p_clean", None)  # a sum of so few numbers may nearly cancel
    return _Check(problem, upstream, expected, error_limits(case, problem, mode, upstream, expected))


def _verified(job: Job, provider: Provider, checks: list[_Check]) -> tuple[Trial, str]:
    """A provider's step on the last problem, and why it must not be timed; "" if it agrees with all."""
    # a compiled provider is compiled for one shape only
    for problem_check in checks[-1:] if provider.compiled else checks:
        image = problem_check.problem.image
        copies = min(max(_ROTATED_BYTES // (image.numel() * image.element_size()), 1), _MAX_COPIES)
        trial = Trial(job.case, problem_check.problem, provider, job.mode, problem_check.upstream, copies)
        refused = fault(trial, problem_check.expected, problem_check.limits)
        if refused:
            break
    return trial, refused


def _measure(job: Job, options: BenchOptions, device: torch.device) -> list[Row]:
    rows: dict[str, Row] = {}
    if any(provider.compiled for provider in job.providers.values()):
        torch._dynamo.reset()  # it compiles one function for a few shapes only
    for static in (False, True):
        chosen = {name: provider for name, provider in job.providers.items() if provider.static == static}
        for name in chosen:
            rows[name] = Row(job.case, job.mode, name, job.batch, static, "not verified")
        if not chosen:
            continue
        try:
            checks = [
                _check_at(job, batch, static, options, device) for batch in _check_batches(job, options)
            ]
        except torch.OutOfMemoryError as error:
            for name in chosen:
                rows[name] = replace(rows[name], refused=f"not enough memory to verify it: {error}")
            continue
        verified: dict[str, Callable[[], object]] = {}
        for name, provider in chosen.items():
            try:
                trial, refused = _verified(job, provider, checks)
            except _PROVIDER_ERRORS as error:
                refused = f"it raised {type(error).__name__}: {error}"
            rows[name] = replace(rows[name], refused=refused)
            if not refused:
                verified[name] = trial
        del checks
        if timing.on_graphs(device):
            for name, measured in timing.measure_replays(
                verified, _seconds(options), options.retries
            ).items():
                rows[name] = replace(
                    rows[name],
                    times=measured.replay,
                    eager_ms=measured.eager.median,
                    not_captured=measured.refusal,
                )
        else:
            for name, times in timing.measure(verified, device, _seconds(options), options.retries).items():
                rows[name] = replace(rows[name], times=times)
    return [rows[name] for name in job.providers]


def _measured(
    jobs: list[Job], options: BenchOptions, device: torch.device, console: Console
) -> Iterator[tuple[Job, list[Row]]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=f"{job.case.name} {job.mode}, batch {job.batch}")
            yield job, _measure(job, options, device)
            progress.advance(task)


# --- rows


def _common(options: BenchOptions, device: torch.device) -> results.Row:
    """The columns that all rows of a run share."""
    return (
        dict.fromkeys(results.COLUMNS, "")
        | machine.provenance(device)
        | {"dtype": options.dtype, "layout": options.layout, "command": command_line(options)}
        | {"timing": "graph" if timing.on_graphs(device) else "eager"}
    )


def _subject(row: Row) -> results.Row:
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
    columns = {"median": times.median, "p20": times.p20, "p80": times.p80, "best": times.best}
    line = {f"ms_{name}": f"{ms:.4f}" for name, ms in columns.items()} | times.interference.columns
    return line if times.peak_mib is None else line | {"peak_mib": f"{times.peak_mib:.2f}"}


def _work(row: Row, item: int) -> tuple[float, float]:
    """Floating-point operations, and compulsory bytes."""
    return (
        row.case.flops(row.mode, row.batch, row.static),
        row.case.bytes(row.mode, row.batch, item, row.static),
    )


def _line(row: Row, common: results.Row, ceilings: Ceilings) -> results.Row:
    line = common | _subject(row) | {"verified": "false" if row.refused else "true"}
    line["reason"] = row.refused or row.not_captured
    if row.eager_ms is not None:
        line["ms_eager"] = f"{row.eager_ms:.4f}"
    if row.times is None:
        return line
    flops, moved = _work(row, DTYPES[common["dtype"]].itemsize)
    return line | {
        **_times(row.times),
        "gb_s": f"{moved / row.times.median / 1e6:.3f}",
        "tflop_s": f"{flops / row.times.median / 1e9:.4f}",
        "roofline_share": f"{ceilings.min_ms(flops, moved) / row.times.median:.4f}",
    }


def _ceiling_lines(ceilings: Ceilings, common: results.Row) -> list[results.Row]:
    common = common | {"mode": "ceiling", "provider": "torch", "verified": str(ceilings.verified).lower()}
    common["timing"] = "eager"  # a millisecond each on a GPU: the launch is hidden behind the one before
    copy = {"case": "copy", **_times(ceilings.copy), "gb_s": f"{ceilings.gb_s:.3f}"}
    matmul = {"case": "matmul", "size": str(ceilings.matmul_size), **_times(ceilings.matmul)}
    lines = [common | copy, common | matmul | {"tflop_s": f"{ceilings.tflop_s:.4f}"}]
    if ceilings.amx_tflop_s is not None:
        lines.append(common | {"case": "amx", "provider": "awnet", "tflop_s": f"{ceilings.amx_tflop_s:.4f}"})
    return lines


def _table(job: Job, rows: list[Row], ceilings: Ceilings, item: int) -> Table:
    plain = next((row.times.median for row in rows if row.provider == "unfused" and row.times), None)
    first = job.case.convolutions()[0]
    table = Table(
        title=f"{job.case.name} {first.c_in}→{first.c_out}@{first.size}², {job.mode}, batch {job.batch}",
        title_justify="left",
    )
    table.add_column("provider")
    on_gpu = any(row.eager_ms is not None for row in rows)
    first_columns = ("replay ms", "eager ms") if on_gpu else ("median ms",)
    for heading in (*first_columns, "best", "20–80 %", "× unfused", "TFLOP/s", "roofline"):
        table.add_column(heading, justify="right")

    def shown(ms: float) -> str:
        return f"{ms:.1f}" if ms >= 100 else f"{ms:.3f}"

    for row in rows:
        eager = [] if not on_gpu else ["" if row.eager_ms is None else shown(row.eager_ms)]
        if row.times is None:
            table.add_row(row.provider, "wrong" if row.refused else "–", *eager, style="red")
            continue
        flops, moved = _work(row, item)
        times = row.times
        median, best, p20, p80 = map(shown, (times.median, times.best, times.p20, times.p80))
        table.add_row(
            row.provider,
            median,
            *eager,
            best,
            f"{p20}–{p80}",
            "" if plain is None else f"{times.median / plain:.2f}",
            f"{flops / times.median / 1e9:.3f}",
            f"{ceilings.min_ms(flops, moved) / times.median:.0%}",
        )
    return table

"""Searches launch parameters of the Triton passes and forms of frozen networks: ``awnet bench tune``.

First the forms of frozen networks are timed (:mod:`awnet.benchmarks.tune_frozen`). Then, starting at the
defaults, one launch parameter at a time is doubled or halved while that is at least 2 % faster. A candidate
is timed only after its results have been compared with those of the default. The passes with a ReLU mask are
timed with both of its forms, y and a bool tensor; the total time counts. The fastest forms and parameters are
written to the device's table in awnet/ops/configs/, which every later call reads
(awnet/ops/launch_config.py).
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from awnet.devices import resolve_device
from awnet.files import write_json
from awnet.ops import launch_config
from awnet.ops.args import RELU
from awnet.ops.backends import triton as triton_backend
from awnet.ops.coefficients import Mix, Norm, Reduced, SampleStats
from awnet.terminal import safe_console

from .cases import CASES, SMOKE_CASES, STAGES, Convolution, LayerCase
from .options import MAX_BATCH, check_folder, check_whole
from .tune_frozen import FrozenNetworkTimer, fastest_forms

Parameters = Mapping[str, int]
# milliseconds of one call
DoBench = Callable[[Callable[[], object]], float]

_IMAGES = ("apply", "statistics", "reduce", "propagate", "eval_backward")
_TABLES = (
    "eval_coefficients",
    "eval_gradients",
    "batch_statistics",
    "train_coefficients",
    "train_gradients",
)
_RANGE = {"tile": (256, 16384), "inner": (4, 2048), "steps": (1, 16), "warps": (1, 16)}
_MARGIN = 1.02


@dataclass(frozen=True)
class TuneOptions:
    """What to tune, and for how long."""

    device: str | None = None
    """cuda, cuda:1, …; by default the GPU."""
    smoke: bool = False
    """Tune tiny layers and a tiny network instead of the four stages of a ResNet-18 and an AW-Net-18."""
    batches: tuple[int, ...] = (256,)
    """Batch sizes of each layer."""
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16", "float32")
    """Data types of images."""
    layouts: tuple[Literal["channels_last", "nchw"], ...] = ("channels_last", "nchw")
    """Memory formats of images."""
    minutes: float = 8.0
    """No new entry is started after this time; another run resumes there."""
    again: bool = False
    """Tune the entries that the table already has too."""
    out: Path = launch_config.FOLDER
    """Folder of the tables; awnet only reads its own."""


@dataclass(frozen=True)
class Job:
    """One entry of the table; ``run`` makes every kind of call of the op with the given launch parameters."""

    key: str
    start: Parameters
    run: Callable[[Parameters], Any]


def jobs(options: TuneOptions, device: torch.device) -> Iterator[Job]:
    """All entries to tune, on random tensors; created one at a time."""
    registry = SMOKE_CASES if options.smoke else CASES
    for case in (c.convolution for c in registry if isinstance(c, LayerCase) and c.name in STAGES):
        for batch in options.batches:
            for dtype in options.dtypes:
                for layout in options.layouts:
                    for op in _IMAGES:
                        yield _image_job(op, case, batch, dtype, layout, device)
            for op in _TABLES:
                yield _table_job(op, case, batch, device)


def _image_job(op: str, case: Convolution, batch: int, dtype: str, layout: str, device: torch.device) -> Job:
    passes, backward = (importlib.import_module(f"awnet.kernels.{n}") for n in ("passes", "eval_backward"))
    size = (batch, case.c_out, case.size, case.size)
    kind: torch.dtype = getattr(torch, dtype)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def image() -> Tensor:
        return torch.randn(size, device=device).to(kind).contiguous(memory_format=memory)

    u, grad, y = image(), image(), image()
    a, b, c = (torch.randn(size[:2], device=device) for _ in range(3))
    mask = y > 0

    # one entry serves training, whose ReLU mask is y, and attacks, which write and read a bool mask
    def run(config: Parameters) -> Any:
        if op == "apply":
            out_mask = torch.empty_like(mask)
            plain = passes.apply(u, a, b, grad, RELU, config)
            return plain, passes.apply(u, a, b, grad, RELU, config, relu_mask=out_mask), out_mask
        if op == "statistics":
            return passes.statistics(u, config)
        if op == "reduce":
            return *passes.reduce(grad, u, a, y, config), *passes.reduce(grad, u, a, mask, config)
        if op == "eval_backward":
            joined = backward.eval_backward(grad, y, None, u, mask, a, None, config, residual=True, sums=True)
            from_u = backward.eval_backward(grad, None, None, u, None, a, b, config, sums=True)
            return *joined[:2], *joined[2][:2], from_u[0], *from_u[2][:2]
        return (
            *passes.propagate(grad, u, a, y, b, c, a, True, config),
            *passes.propagate(grad, u, a, mask, b, c, a, True, config),
        )

    pixels = case.size**2
    shape = (batch, case.c_out, pixels)
    start = launch_config.launch_parameters(op, torch.device("cpu"), *shape, kind, layout)
    return Job(f"{op}/{dtype}/{layout}/{launch_config.bucket(*shape)}", start, run)


def _table_job(op: str, case: Convolution, batch: int, device: torch.device) -> Job:
    names = ("eval_coefficients", "train_coefficients")
    evaluated, trained = (importlib.import_module(f"awnet.kernels.{name}") for name in names)
    channels, hw = case.c_out, case.size**2
    g1, gc, mean, m2, scale = (torch.rand(batch, channels, device=device) for _ in range(5))
    norm = Norm.stacked(torch.rand(4, 2, channels, device=device) + 0.5, 1e-5)
    is_clean = torch.arange(batch, device=device) < batch // 2
    mix = Mix(scale, torch.rand(batch, device=device), is_clean)
    n = torch.full((2,), batch * hw / 2, device=device)
    stats, sums = SampleStats(mean, m2, hw), Reduced(g1, gc, mean)

    def run(config: Parameters) -> Any:
        if op == "eval_coefficients":
            return evaluated.eval_coefficients(norm, mix, batch, config)
        if op == "eval_gradients":
            return evaluated.eval_gradients(sums, norm, mix, (True, True, False, False), config)
        if op == "batch_statistics":
            return trained.batch_statistics(stats, mix, 2, config)
        if op == "train_coefficients":
            return trained.train_coefficients(norm, mix, batch, config)
        return trained.train_gradients(sums, stats, norm, n, mix, True, None, config)

    start = launch_config.launch_parameters(op, torch.device("cpu"), batch, channels)
    return Job(f"{op}/{launch_config.bucket(batch, channels, 1)}", start, run)


def _neighbors(config: Parameters) -> Iterator[dict[str, int]]:
    for name, value in config.items():
        least, most = _RANGE[name]
        for moved in (2 * value, value // 2):
            if least <= moved <= most:
                yield {**config, name: moved}


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]


def _verify(key: str, config: Parameters, got: Any, expected: list[Tensor]) -> None:
    for mine, other in zip(_tensors(got), expected, strict=True):
        # sums in another order; images are rounded once more
        tolerance = 1e-4 if other.dtype == torch.float32 else 1e-2
        difference = float((mine.double() - other.double()).norm())
        if not difference <= tolerance * float(other.double().norm()):
            raise RuntimeError(f"{key} with {dict(config)} does not equal the result of the default launch")


def search(job: Job, do_bench: DoBench) -> tuple[dict[str, int], float, float]:
    """The best parameters that a descent from ``job.start`` finds, their time, and the start's, in ms."""
    from triton.runtime.errors import OutOfResources

    expected = _tensors(job.run(job.start))
    times: dict[tuple[int, ...], float] = {}

    def measure(config: Parameters) -> float:
        key = tuple(config.values())
        if key not in times:
            times[key] = math.inf
            try:
                _verify(job.key, config, job.run(config), expected)
                times[key] = do_bench(partial(job.run, config))
            except OutOfResources:
                pass  # it does not fit the device
        return times[key]

    best = dict(job.start)
    first = least = measure(best)
    improving = True
    while improving:
        improving = False
        for candidate in _neighbors(best):
            took = measure(candidate)
            if took * _MARGIN < least:
                best, least, improving = candidate, took, True
                break
    return best, least, first


def _milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=40, return_mode="median"))


def _check(options: TuneOptions) -> None:
    for name, known in (
        ("dtypes", ("bfloat16", "float16", "float32")),
        ("layouts", ("channels_last", "nchw")),
    ):
        unknown = [value for value in getattr(options, name) if value not in known]
        if unknown:
            raise ValueError(f"{name} must be some of {', '.join(known)}, got {', '.join(map(str, unknown))}")
    for batch in options.batches:
        check_whole("batches", batch, 1, MAX_BATCH)
    if not 0 <= options.minutes <= 1440:  # NaN too
        raise ValueError(f"minutes must be between 0 and 1440, got {options.minutes}")
    check_folder("out", options.out)


def _frozen_network(options: TuneOptions, dtype: str, device: torch.device) -> FrozenNetworkTimer:
    name, size = ("awnet_tiny", 8) if options.smoke else ("awnet_resnet18", 32)
    return FrozenNetworkTimer(name, max(options.batches), size, getattr(torch, dtype), device)


def _device(options: TuneOptions, timed_here: bool) -> torch.device:
    device = resolve_device(options.device)
    if device.type != "cuda" and timed_here:
        raise ValueError(
            f"device must be a CUDA device, since tuning times Triton kernels, got {str(device)!r}"
        )
    reason = triton_backend.obstacle(torch.empty(1, 1, 1, 1, device=device))
    if reason is not None:
        raise ValueError(f"the Triton kernels cannot run here: {reason}")
    return device


def tune(options: TuneOptions, do_bench: DoBench | None = None) -> Path:
    """Tunes, prints a line per entry, and writes the device's table, whose path it returns.

    Args:
        options: what to tune.
        do_bench: times a call, in milliseconds; by default Triton's, with the L2 cache flushed.

    Raises:
        ValueError: there is no CUDA device and no ``do_bench``, or Triton cannot run.
        RuntimeError: a candidate's result is wrong.
    """
    _check(options)
    device = _device(options, do_bench is None)
    path = options.out / f"{launch_config.device_slug(device)}.json"
    launches: dict[str, dict[str, int]] = {}
    frozen: dict[str, dict[str, str]] = {}
    content: dict[str, Any] = {"device": path.stem, "launches": launches}
    if path.exists():
        launches, frozen = launch_config.read_table(path), launch_config.read_frozen_networks(path)
        content = json.loads(path.read_text(encoding="utf-8")) | {"launches": launches}
    content["launches_tuned_with"] = {name: version(name) for name in ("torch", "triton")}
    console = safe_console()
    end = time.monotonic() + 60 * options.minutes
    left = 0
    do_bench = do_bench or _milliseconds
    for dtype in (name for name in options.dtypes if name != "float32"):
        if dtype in frozen and not options.again:
            continue
        if time.monotonic() > end:
            left += 1
            continue
        timer = _frozen_network(options, dtype, device)
        frozen[dtype], took, before = fastest_forms(timer, do_bench, partial(console.print, markup=False))
        forms = " ".join(f"{part}={form}" for part, form in frozen[dtype].items())
        console.print(f"frozen network, {dtype}: {before:.4f} → {took:.4f} ms a step, {forms}")
        content["frozen_networks"] = frozen
        write_json(path, content)
    for job in jobs(options, device):
        if job.key in launches and not options.again:
            continue
        if time.monotonic() > end:
            left += 1
            continue
        best, took, before = search(job, do_bench)
        launches[job.key] = best
        parameters = " ".join(f"{name}={value}" for name, value in best.items())
        console.print(f"{job.key}: {before:.4f} → {took:.4f} ms, {parameters}")
        # after each entry, so that an interrupted run loses none
        content["launches"] = dict(sorted(launches.items()))
        write_json(path, content)
    launch_config.forget_tables()
    if left:
        console.print(
            f"{left} entries remain: the {options.minutes:g} minutes are over; run it again to resume"
        )
    console.print(f"wrote {path}")
    return path

"""The options of ``awnet bench run``, and checks that the other commands share."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from awnet.devices import resolve_device

from . import results
from .cases import MODES, Mode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# the largest value of each count: a larger one could only fail later, with an obscure error
_MAX_THREADS, MAX_BATCH, MAX_SEED = 1024, 2**24, 2**63 - 2
_MAX_SECONDS, _MAX_RETRIES = 86400.0, 100
# in training, in a branch of fewer than four samples the gradients of filter_scale nearly cancel
MIN_TRAINING_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure, and on what."""

    smoke: bool = False
    """Run the whole registry at tiny sizes, within two minutes on a CPU, into a separate file."""
    device: str | None = None
    """cpu, cuda, cuda:1, …; by default a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of images and weights; [B, C] tables are float32."""
    layout: Literal["nchw", "channels_last"] = "nchw"
    """Memory format of images and weights."""
    batch: tuple[int, ...] = ()
    """Batch sizes; by default 1 32 128 256 512 1024 on a GPU, 32 on a CPU (8 for the network), 8 with
    --smoke. Training, in which half of the images are clean, is measured from 8 on."""
    cases: tuple[str, ...] = ()
    """Cases by name: stage1 to stage4, stem, shortcut, transition, depthwise, block, network; by default
    all."""
    shape: tuple[str, ...] = ()
    """Layers to measure instead of the registry's, as C_IN,C_OUT,SIZE[,KERNEL[,STRIDE[,GROUPS]]]: 64,128,32
    is a 3×3 layer from 64 to 128 channels on 32×32 images."""
    modes: tuple[Mode, ...] = MODES
    """forward: eval mode. attack: eval mode with the gradients of image, filter_scale and p_clean.
    training: train mode with the gradients of image, filter_scale and parameters."""
    providers: tuple[str, ...] = ()
    """Implementations: literal, unfused, static, compile, compile_frozen, static_compile, and the backends;
    by default all available ones without the three compiled ones (except one row with --smoke)."""
    compile: bool = False
    """Also measure the three torch.compile providers (max-autotune-no-cudagraphs on a GPU, captured like the
    others); each compiles for up to a minute."""
    verify_batch: int | None = None
    """Compare results with the literal form in float64 at this batch if it is smaller than the measured
    one, and at the measured batch with plain torch in float32: saves most of the time of a large batch.
    By default the literal form in float64 at the measured batch."""
    missing: bool = False
    """Measure only the rows that the file does not have for this commit: resumes an interrupted run."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""
    seconds: float | None = None
    """Time to measure each row, after a warm-up; by default 1, with --smoke 0.05. On a CPU at least three
    steps are measured."""
    retries: int = 2
    """How often to repeat a measurement that other processes or the hypervisor disturbed. A row that is still
    disturbed is marked."""
    seed: int = 0
    """Seed of the random tensors."""
    out: Path = results.FOLDER
    """Folder of the CSV files, one per device; rows are appended."""


def check(options: BenchOptions) -> torch.device:
    """The device of a run. ValueError if an option is out of range."""
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {options.dtype!r}")
    if options.layout not in ("nchw", "channels_last"):
        raise ValueError(f"layout must be nchw or channels_last, got {options.layout!r}")
    unknown = [mode for mode in options.modes if mode not in MODES]
    if unknown or not options.modes:
        raise ValueError(f"modes must be some of {', '.join(MODES)}, got {options.modes}")
    for batch in options.batch:
        check_whole("batch", batch, 1, MAX_BATCH)
    if options.verify_batch is not None:
        check_whole("verify_batch", options.verify_batch, 1, MAX_BATCH)
        if "training" in options.modes and options.verify_batch < MIN_TRAINING_BATCH:
            raise ValueError(
                f"verify_batch must be at least {MIN_TRAINING_BATCH} for training, got {options.verify_batch}"
            )
    if options.seconds is not None:
        check_duration("seconds", options.seconds)
    return check_machine(options.device, options.threads, options.retries, options.seed, options.out)


def check_machine(
    device: str | None, threads: int | None, retries: int, seed: int, out: Path
) -> torch.device:
    """The device of a run on any of the commands. ValueError or OSError if an option cannot be used."""
    if threads is not None:
        check_whole("threads", threads, 1, _MAX_THREADS)
    check_whole("retries", retries, 0, _MAX_RETRIES)
    check_whole("seed", seed, 0, MAX_SEED)
    check_folder("out", out)
    return resolve_device(device)


def check_whole(name: str, value: int, minimum: int, maximum: int) -> None:
    """ValueError unless ``value`` is a whole number in the range."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")


def check_duration(name: str, seconds: float, maximum: float = _MAX_SECONDS) -> None:
    """ValueError unless ``seconds`` is a finite positive number."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{name} must be positive, got {seconds}")
    if seconds > maximum:
        raise ValueError(f"{name} must be at most {maximum:g}, got {seconds:g}")


def check_folder(name: str, folder: Path) -> None:
    """OSError unless files can be written to ``folder``, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"{name} must be a folder, but {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{name}: no permission to write to {existing}")


def command_line(options: object, action: str = "run", kind: type = BenchOptions) -> str:
    """The command that repeats a run: every option of ``kind`` that is not the default, without paths."""
    words = ["awnet", "bench", action]
    for field in fields(kind):  # a subclass, such as the command line's, has more
        value = getattr(options, field.name)
        if field.name in ("out", "missing", "data_dir") or value == field.default:
            continue
        words.append("--" + field.name.replace("_", "-"))
        words += [] if value is True else [str(v) for v in (value if isinstance(value, tuple) else (value,))]
    return " ".join(words)

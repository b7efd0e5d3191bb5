"""The machine of a measurement: its state during a run, and the columns that describe it."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from awnet.provenance import git_commit

from . import results


@contextmanager
def full_precision(device: torch.device, threads: int | None) -> Iterator[None]:
    """Sets the number of threads and the current device and turns TF32 off; restores all of it at the end."""
    before = torch.get_num_threads()
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


def provenance(device: torch.device) -> results.Row:
    """Date, commit, device, driver and versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": device_name(device),
        "driver": driver(device),
        "torch": str(torch.__version__),
        "triton": package_version("triton"),
    }


def csv_path(folder: Path, device: torch.device, suffix: str = "") -> Path:
    """The file of a device's rows."""
    return folder / f"{slug(device_name(device))}{suffix}.csv"


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def commit() -> str:
    """The commit of the checkout, with -dirty if files other than results differ from it; "" if installed."""
    checkout = git_commit(ignore=[results.FOLDER.as_posix()])
    return "" if checkout.hash is None else checkout.hash[:7] + ("-dirty" if checkout.modified else "")


def driver(device: torch.device) -> str:
    """Version of the NVIDIA driver; "" on a CPU."""
    if device.type == "cpu":
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.splitlines()), "").strip()


def package_version(distribution: str) -> str:
    """The installed version; "" if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""

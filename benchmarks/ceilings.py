"""The most that a device can do, measured: the bandwidth of a copy and the rate of a matrix product.

On a CPU with AMX also the rate of bfloat16 tile products alone. Ceilings are timed several times during a run
and the best time counts: one timing on a shared machine may be far below what a later step reaches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from awnet.ops.backends import amx, native

from .timing import Times, measure

logger = logging.getLogger(__name__)

# seconds between two timings of the ceilings in one run
_INTERVAL = 30.0


@dataclass(frozen=True)
class Ceilings:
    """The roofline of one device and dtype."""

    copy: Times
    copied_bytes: int  # read and written
    matmul: Times
    matmul_size: int
    verified: bool
    amx_tflop_s: float | None = None  # of bfloat16 tile products; None without AMX or in another dtype

    @property
    def gb_s(self) -> float:
        return self.copied_bytes / self.copy.best / 1e6

    @property
    def tflop_s(self) -> float:
        return 2.0 * self.matmul_size**3 / self.matmul.best / 1e9

    @property
    def peak_tflop_s(self) -> float:
        """The highest measured arithmetic rate."""
        return max(self.tflop_s, self.amx_tflop_s or 0.0)

    def min_ms(self, flops: float, moved_bytes: float) -> float:
        """The least time for this many operations and bytes."""
        return max(flops / (self.peak_tflop_s * 1e9), moved_bytes / (self.gb_s * 1e6))

    def better(self, other: Ceilings) -> Ceilings:
        """The best of two measurements on the same device."""
        peaks = [peak for peak in (self.amx_tflop_s, other.amx_tflop_s) if peak is not None]
        return replace(
            self,
            copy=min(self.copy, other.copy, key=lambda times: times.best),
            matmul=min(self.matmul, other.matmul, key=lambda times: times.best),
            verified=self.verified and other.verified,
            amx_tflop_s=max(peaks, default=None),
        )


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float, tiny: bool) -> Ceilings:
    """Copies a buffer larger than any cache, and multiplies square matrices; small ones if ``tiny``."""
    on_gpu = device.type == "cuda"
    length = 2**24 if tiny else 2**31 if on_gpu else 2**28  # bytes
    size = 256 if tiny else 8192 if on_gpu else 1024
    generator = torch.Generator().manual_seed(0)
    source = torch.zeros(length // dtype.itemsize, dtype=dtype, device=device)
    source[:1000] = torch.randn(1000, generator=generator).to(device, dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    product = torch.empty_like(a)

    def copy() -> None:
        target.copy_(source)

    def matmul() -> None:
        torch.mm(a, b, out=product)

    times = measure({"copy": copy, "matmul": matmul}, device, seconds)
    expected = a[:8].double() @ b.double()
    # a sum of `size` products rounded to the dtype: its relative error is some tens of eps at most
    error = float((product[:8].double() - expected).norm() / expected.norm())
    verified = torch.equal(source, target) and error < 32 * torch.finfo(dtype).eps
    peak = amx_tflop_s(min(seconds, 0.1)) if device.type == "cpu" and dtype == torch.bfloat16 else None
    return Ceilings(times["copy"], 2 * length, times["matmul"], size, verified, peak)


def amx_tflop_s(seconds: float) -> float | None:
    """The rate of AMX tile products on all threads with operands in the first-level cache, in TFLOP/s.

    The best of many windows of 5 ms, which other processes disturb less than one long window. None if this
    process cannot use AMX.
    """
    if amx.mode() == "emulate" or amx.obstacle() is not None:
        return None
    if not hasattr(torch.ops.awnet, "amx_peak"):
        logger.warning(f"the AMX peak is not measured: awnet._C is older than its sources; {native.REBUILD}")
        return None
    end, best = time.monotonic() + seconds, 0.0
    while best == 0.0 or time.monotonic() < end:
        best = max(best, torch.ops.awnet.amx_peak(0.005))
    return best / 1e12


class CeilingTracker:
    """Times the ceilings at its creation and again during the run, and keeps the best."""

    def __init__(self, measure_once: Callable[[], Ceilings]) -> None:
        self._measure_once = measure_once
        self.best = measure_once()
        self._last = time.monotonic()

    def update(self, *, force: bool = False) -> None:
        """Times the ceilings again if the last timing is some time ago."""
        if force or time.monotonic() - self._last >= _INTERVAL:
            self.best = self.best.better(self._measure_once())
            self._last = time.monotonic()

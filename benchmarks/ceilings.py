"""What the device can do at most: a copy's bandwidth and a matrix product's arithmetic, measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .timing import Times, measure


@dataclass(frozen=True)
class Ceilings:
    """The roofline of one device and dtype."""

    copy: Times
    copied_bytes: int  # read and written
    matmul: Times
    matmul_size: int
    verified: bool

    @property
    def gb_s(self) -> float:
        return self.copied_bytes / self.copy.median / 1e6

    @property
    def tflop_s(self) -> float:
        return 2.0 * self.matmul_size**3 / self.matmul.median / 1e9

    def least_ms(self, flops: float, moved: float) -> float:
        """The least time for so many operations and bytes."""
        return max(flops / (self.tflop_s * 1e9), moved / (self.gb_s * 1e6))


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float, tiny: bool) -> Ceilings:
    """Copies a buffer larger than any cache, and multiplies square matrices; ``tiny``: small ones."""
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
    want = a[:8].double() @ b.double()
    # a sum of `size` products rounded to the dtype: its relative error is some tens of eps at most
    error = float((product[:8].double() - want).norm() / want.norm())
    right = torch.equal(source, target) and error < 32 * torch.finfo(dtype).eps
    return Ceilings(times["copy"], 2 * length, times["matmul"], size, right)

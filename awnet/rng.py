"""Random numbers keyed by the sample instead of the order of drawing.

Sample ``i`` of a data set gets the same noise in every batch and on every rank, worker and device, and a
resumed run draws the same numbers as an uninterrupted one. The generator is counter-based: a 64-bit mix of
(key, sample index, position), so any value can be computed separately.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio in 64 bits, as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def key(*parts: int | str) -> int:
    """A 64-bit key from any parts (seed, epoch, purpose, …), equal on all machines and Python versions."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def torch_seed(*parts: int | str) -> int:
    """A seed for ``torch.manual_seed``, which takes no negative ones, from the same parts as ``key``."""
    return key(*parts) & (2**63 - 1)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: the shift of int64 copies the sign


def _mix(x: Tensor) -> Tensor:
    # the finalizer of SplitMix64; int64 products wrap around, as the algorithm requires
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def bits(key: int | Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """64 random bits per value: int64 ``[B, *shape]`` for sample indices ``index`` int64 ``[B]``.

    ``key`` is a number or int64, 0-d, on the device of ``index``.
    """
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [B], got {index.dtype} {list(index.shape)}")
    count = math.prod(shape)
    position = torch.arange(count, device=index.device)
    stream = _mix(_mix(index * _GAMMA + key))  # [B]
    return _mix(stream[:, None] + (position + 1) * _GAMMA).reshape(len(index), *shape)


def uniform(key: int | Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """float32 ``[B, *shape]`` in [0, 1), on the device of ``index``; bitwise equal on all devices."""
    return _shift(bits(key, index, shape), 40).to(torch.float32) * 2.0**-24


def normal(key: int | Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """float32 ``[B, *shape]`` of N(0, 1), by the Box–Muller transform."""
    raw = bits(key, index, shape)
    radius = torch.sqrt(-2.0 * torch.log1p(-_shift(raw, 40).to(torch.float32) * 2.0**-24))
    angle = (raw & 0xFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-24)
    return radius * torch.cos(angle)


def integers(key: int, index: Tensor, shape: Sequence[int], high: int) -> Tensor:
    """int64 ``[B, *shape]`` in [0, high)."""
    if not 0 < high < 2**24:
        raise ValueError(f"high must be in [1, 2**24), got {high}")
    return (_shift(bits(key, index, shape), 40) * high) >> 24

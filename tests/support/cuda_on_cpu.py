"""The CUDA kernels on the CPU: csrc/cuda/*.cu compiled as C++ with tests/support/cuda_emulator/, called through ctypes.

It shows that indices, tails, reductions and launches are right, on any machine with a C++ compiler. What it
cannot show (memory coalescing, real concurrency, the compiler's code) is for tests/ops/test_gpu.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from awnet.ops.args import RELU, EvalBackwardArgs
from awnet.ops.backends.base import Passes
from awnet.ops.coefficients import (
    BatchStats,
    Gradients,
    Norm,
    Propagation,
    Reduced,
    TrainSums,
)

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "support" / "cuda_emulator"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GUARD = 64  # values before and after each output; a multiple of 16 bytes


class Images(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "channels_last", "aligned")),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "pixels")),
    )


class CudaNorm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "mean", "var")),
        ("affine_rows", ctypes.c_int32),
        ("stat_rows", ctypes.c_int32),
        ("eps", ctypes.c_float),
    )


class CudaStats(ctypes.Structure):
    _fields_ = (("mean", ctypes.c_void_p), ("m2", ctypes.c_void_p), ("hw", ctypes.c_int64))


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


@cache
def library() -> ctypes.CDLL:
    """The emulated kernels, compiled once for what the sources hold."""
    sources = [*(ROOT / "csrc" / "cuda").glob("*.*"), *EMULATOR.iterdir(), ROOT / "csrc" / "arithmetic.h"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources) if path.is_file()))
    path = ROOT / "build" / "cuda" / f"emulated-{digest.hexdigest()[:24]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{os.getpid()}-{path.name}")
        command = [compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{EMULATOR}"]
        done = subprocess.run(
            [*command, str(EMULATOR / "emulated.cpp"), "-o", str(fresh)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        fresh.replace(path)
    loaded = ctypes.CDLL(str(path))
    loaded.awnet_cuda_workspace.restype = ctypes.c_int64
    return loaded


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def pointers(*tensors: Tensor | None) -> object:
    """A reference to a structure of pointers to ``tensors``, which the caller keeps alive."""
    return ctypes.byref((ctypes.c_void_p * len(tensors))(*(pointer(x) for x in tensors)))


class CudaOnCpu(Passes):
    """The passes (``awnet.ops.backends.base.Passes``) on the emulated kernels.

    Outputs are poisoned with NaN and lie between guard bands, which are looked at after each call.
    ``backwards`` turns the order of the threads; ``misaligned`` moves outputs off their 16 bytes.
    """

    def __init__(self) -> None:
        self.backwards = False
        self.misaligned = False
        self._bands: list[tuple[str, Tensor]] = []

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
        size = torch.Size(shape).numel()
        shift = 1 if self.misaligned else 0
        poison = 0x5A if dtype == torch.uint8 else float("nan")
        buffer = torch.full((size + 2 * GUARD + shift,), poison, dtype=dtype)
        self._bands += [("before", buffer[: GUARD + shift]), ("after", buffer[GUARD + shift + size :])]
        inside = buffer[GUARD + shift : GUARD + shift + size]
        if channels_last:
            batch, channels, height, width = shape
            return inside.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return inside.view(shape)

    def _call(self, name: str, *arguments: object) -> None:
        emulated = library()
        emulated.awnet_emulator_order(int(self.backwards))
        function = getattr(emulated, f"awnet_cuda_{name}")
        function.restype = ctypes.c_char_p
        error = function(*arguments, None)
        assert error is None, error
        assert emulated.awnet_emulator_diverged() == 0, f"{name}: a thread skipped a barrier"
        for where, band in self._bands:
            untouched = band == 0x5A if band.dtype == torch.uint8 else band.isnan()
            assert untouched.all(), f"{name} wrote {where} an output"
        self._bands.clear()

    def _images(self, u: Tensor, *others: Tensor | None) -> Images:
        last = not u.is_contiguous() and u.is_contiguous(memory_format=torch.channels_last)
        everything = [u, *(x for x in others if x is not None)]
        aligned = all(x.data_ptr() % 16 == 0 for x in everything)
        batch, channels, height, width = u.shape
        return Images(DTYPES[u.dtype], last, aligned, batch, channels, height * width)

    @staticmethod
    def _alike(x: Tensor | None, u: Tensor) -> Tensor | None:
        return x if x is None or x.stride() == u.stride() else torch.empty_like(u, dtype=x.dtype).copy_(x)

    def _new_image(self, u: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        last = not u.is_contiguous() and u.is_contiguous(memory_format=torch.channels_last)
        return self._new(tuple(u.shape), dtype or u.dtype, last)

    @staticmethod
    def _split_mask(relu_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (
            (None, relu_mask)
            if relu_mask is not None and relu_mask.dtype == torch.bool
            else (relu_mask, None)
        )

    def _new_table(self, u: Tensor, rows: int | None = None) -> Tensor:
        return self._new((len(u) if rows is None else rows, u.shape[1]), torch.float32)

    # --- passes

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        images, mean, m2 = self._images(u), self._new_table(u), self._new_table(u)
        workspace = self._new((library().awnet_cuda_workspace(ctypes.byref(images)),), torch.float32)
        self._call(
            "statistics", ctypes.byref(images), pointer(u), pointer(mean), pointer(m2), pointer(workspace)
        )
        return mean, m2

    def apply(self, u, scale, shift, residual, activation, keep_mask, in_place, frozen=False):
        residual, scale, shift = self._alike(residual, u), scale.contiguous(), shift.contiguous()
        y = u if in_place else self._new_image(u)
        smooth = activation > RELU
        mask = self._new_image(u, u.dtype if smooth else torch.uint8) if keep_mask else None
        images = self._images(u, y, mask, residual, scale, shift)
        operands = (pointer(x) for x in (y, mask, u, residual, scale, shift))
        self._call("apply", ctypes.byref(images), *operands, int(activation))
        mask = u.new_empty(0, dtype=torch.uint8) if mask is None else mask
        return y, mask if mask.dtype == u.dtype else mask.view(torch.bool)

    def reduce(self, grad, u, center, relu_mask, slope=None):
        grad, relu_mask, center = self._alike(grad, u), self._alike(relu_mask, u), center.contiguous()
        slope = self._alike(slope, u)
        images = self._images(u, grad, relu_mask, slope, center)
        g1, gc = self._new_table(u), self._new_table(u)
        workspace = self._new((library().awnet_cuda_workspace(ctypes.byref(images)),), torch.float32)
        gate = pointers(*self._split_mask(relu_mask), slope)
        tables = (pointer(x) for x in (center, g1, gc, workspace))
        self._call("reduce", ctypes.byref(images), pointer(grad), pointer(u), gate, *tables)
        return g1, gc

    def propagate(self, grad, u, center, relu_mask, propagation: Propagation, residual: bool, slope=None):
        relu_mask, slope = self._alike(relu_mask, grad), self._alike(slope, grad)
        u = None if propagation.by_input is None else self._alike(u, grad)
        center = None if propagation.by_input is None else center.contiguous()
        d_u, d_residual = self._new_image(grad), self._new_image(grad) if residual else None
        by = [None if x is None else x.contiguous() for x in propagation]
        images = self._images(grad, u, d_u, d_residual, relu_mask, slope, center, *by)
        operands = (pointer(x) for x in (d_u, d_residual, grad, u))
        gate = pointers(*self._split_mask(relu_mask), slope)
        self._call("propagate", ctypes.byref(images), *operands, gate, pointers(center, *by))
        return d_u, d_residual

    def eval_backward(self, args: EvalBackwardArgs):
        grad, scale, other_grad, d_mean, u, relu_mask, shift, residual, sums, centered, slope = args
        other_grad, relu_mask, u, slope = (self._alike(x, grad) for x in (other_grad, relu_mask, u, slope))
        d_mean, scale, shift = (None if x is None else x.contiguous() for x in (d_mean, scale, shift))
        d_u, d_residual = self._new_image(grad), self._new_image(grad) if residual else None
        images = self._images(grad, other_grad, u, relu_mask, slope, d_u, d_residual, d_mean, scale, shift)
        g1, gc = (self._new_table(grad) if sums else None for _ in range(2))
        center = self._new_table(grad) if sums and centered else None
        workspace = self._new((library().awnet_cuda_workspace(ctypes.byref(images)),), torch.float32)
        tickets = torch.zeros(grad.shape[:2], dtype=torch.int32)
        y, mask = self._split_mask(relu_mask)
        operands = pointers(
            grad, other_grad, u, y, mask, slope, d_mean, scale, shift, d_u, d_residual, g1, gc, center,
            workspace, tickets,
        )  # fmt: skip
        self._call("eval_backward", ctypes.byref(images), operands)
        return d_u, d_residual, Reduced(g1, gc, center) if sums else None

    # --- the [B, C] algebra

    @staticmethod
    def _norm(norm: Norm) -> ctypes.c_void_p:
        tables = (pointer(x) for x in norm[:4])
        return ctypes.byref(CudaNorm(*tables, len(norm.weight), len(norm.mean), norm.eps))

    @staticmethod
    def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
        return [None if x is None else x.contiguous() for x in tensors]

    def eval_coefficients(self, norm, mix, batch):
        filter_scale, p = self._dense(*mix[:2])
        scale, shift = self._new_table(norm.weight, batch), self._new_table(norm.weight, batch)
        sizes = ctypes.c_int64(batch), ctypes.c_int64(norm.weight.shape[1])
        outputs = pointer(scale), pointer(shift)
        self._call("eval_coefficients", self._norm(norm), *sizes, pointers(filter_scale, p, None), *outputs)
        return scale, shift

    def eval_gradients(self, sums, norm, mix, needs):
        inputs = self._dense(*sums, *mix[:2])
        batch, channels = sums.g1.shape
        d_filter_scale = self._new_table(sums.g1) if needs.filter_scale else None
        d_p = self._new((batch,), torch.float32) if needs.p_clean else None
        both = needs.bn_weight or needs.bn_bias
        d_weight, d_bias = (self._new_table(norm.weight) if both else None for _ in range(2))
        sizes = ctypes.c_int64(batch), ctypes.c_int64(channels)
        outputs = pointers(d_filter_scale, d_p, d_weight, d_bias)
        records = pointers(*inputs[:3]), pointers(*inputs[3:], None), outputs
        self._call("eval_gradients", self._norm(norm), *sizes, *records)
        return Gradients(d_filter_scale, d_p, d_weight, d_bias)

    def batch_statistics(self, stats, mix, stat_rows):
        mean, m2, filter_scale, is_clean = self._dense(stats.mean, stats.m2, mix.filter_scale, mix.is_clean)
        batch, channels = stats.mean.shape
        mu, var = self._new_table(stats.mean, stat_rows), self._new_table(stats.mean, stat_rows)
        n = self._new((stat_rows,), torch.float32)
        sizes = ctypes.c_int64(batch), ctypes.c_int64(channels)
        own = ctypes.byref(CudaStats(pointer(mean), pointer(m2), stats.hw))
        outputs = (pointer(x) for x in (mu, var, n))
        self._call(
            "batch_statistics", *sizes, stat_rows, own, pointers(filter_scale, None, is_clean), *outputs
        )
        return BatchStats(mu, var, n)

    def train_coefficients(self, norm, mix, batch):
        filter_scale, is_clean = self._dense(mix.filter_scale, mix.is_clean)
        scale, shift = self._new_table(norm.weight, batch), self._new_table(norm.weight, batch)
        sizes = ctypes.c_int64(batch), ctypes.c_int64(norm.weight.shape[1])
        outputs = pointer(scale), pointer(shift)
        self._call(
            "train_coefficients", self._norm(norm), *sizes, pointers(filter_scale, None, is_clean), *outputs
        )
        return scale, shift

    def train_sums(self, sums, norm, mix):
        own, (filter_scale, is_clean) = self._dense(*sums), self._dense(mix.filter_scale, mix.is_clean)
        batch, channels = sums.g1.shape
        d_weight, d_bias = self._new_table(norm.weight), self._new_table(norm.weight)
        through = self._new((2, *norm.mean.shape), torch.float32)
        sizes = ctypes.c_int64(batch), ctypes.c_int64(channels)
        records = pointers(*own), pointers(filter_scale, None, is_clean)
        outputs = (pointer(x) for x in (d_weight, d_bias, through))
        self._call("train_sums", self._norm(norm), *sizes, *records, *outputs)
        return TrainSums(d_weight, d_bias, through)

    def train_gradients(self, sums, stats, norm, n, mix, need_filter_scale, totals):
        own, (filter_scale, is_clean) = self._dense(*sums), self._dense(mix.filter_scale, mix.is_clean)
        mean, m2 = self._dense(stats.mean, stats.m2)
        batch, channels = sums.g1.shape
        d_filter_scale = self._new_table(sums.g1) if need_filter_scale else None
        by_grad, by_input, constant = (self._new_table(sums.g1) for _ in range(3))
        d_weight, d_bias = (self._new_table(norm.weight) if totals is None else None for _ in range(2))
        outputs = pointers(d_filter_scale, d_weight, d_bias, by_grad, by_input, constant)
        sizes = ctypes.c_int64(batch), ctypes.c_int64(channels)
        samples = ctypes.byref(CudaStats(pointer(mean), pointer(m2), stats.hw))
        through = None if totals is None else totals.through.contiguous()
        records = pointers(*own), samples, pointers(filter_scale, None, is_clean)
        self._call(
            "train_gradients", self._norm(norm), *sizes, *records, pointer(n), pointer(through), outputs
        )
        tables = (d_weight, d_bias) if totals is None else totals[:2]
        return Gradients(d_filter_scale, None, *tables), Propagation(by_grad, by_input, constant)

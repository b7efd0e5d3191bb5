"""Calls every kernel once, in every dtype and layout, at small shapes, for compute-sanitizer.

``compute-sanitizer --tool memcheck python -m awnet.benchmarks.sanitize`` on a GPU; see benchmarks/on_gpu.sh.
Apart from copies only our kernels run. Each result is compared with plain torch on the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from awnet.ops.args import ACTIVATIONS, RELU, Needs
from awnet.ops.backends import native
from awnet.ops.backends.base import Passes
from awnet.ops.coefficients import Mix, Norm, Propagation, Reduced, SampleStats

# by a part of a warp, a warp, a block, several blocks; values that fill a 16-byte access and that do not
SHAPES = ((3, 8, 4, 4), (2, 5, 7, 7), (2, 16, 32, 32), (2, 3, 33, 31), (1, 8, 96, 100))
SMALL_SHAPES = SHAPES[:2]
BATCH, CHANNELS = 20, 24
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def _passes(backend: str) -> Any:
    if backend == "triton":
        from awnet.ops.backends.triton import TritonPasses

        return TritonPasses()
    reason = native.load() or (native.cuda_obstacle() if backend == "cuda" else None)
    if reason is not None:
        raise SystemExit(reason)
    return native.NativePasses()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for part in value:
            yield from _tensors(part)


class _Checker:
    """Calls a method of ``passes`` on the device and of plain torch in float64 on the CPU, and compares."""

    def __init__(self, backend: str, device: torch.device) -> None:
        self.passes, self.device = _passes(backend), device
        self.calls = 0

    def __call__(self, name: str, *arguments: Any, limit: float = 1e-4) -> Any:
        actual = getattr(self.passes, name)(*(self._move(x) for x in arguments))
        expected = getattr(Passes(), name)(*(self._widen(x) for x in arguments))
        pairs = zip(*(list(_tensors(side)) for side in self._aligned(actual, expected)), strict=True)
        for ours, reference in pairs:
            if reference.numel() == 0:
                continue
            reference = reference.double()  # a mask too
            magnitude = max(float(reference.norm()), 0.1 * reference.numel() ** 0.5)
            difference = float((ours.cpu().double() - reference).norm()) / magnitude
            if not difference <= limit:
                raise SystemExit(f"{name} is off by {difference:.1e}, at most {limit:.0e} is allowed")
        self.calls += 1
        return expected

    @staticmethod
    def _aligned(actual: Any, expected: Any) -> tuple[list[Any], list[Any]]:
        """Both as flat lists, without the entries that plain torch does not compute."""
        if isinstance(expected, Tensor):
            return [actual], [expected]
        # a native train_gradients is flat where plain torch groups
        flat_expected = [y for x in expected for y in (x if isinstance(x, tuple) else (x,))]
        flat_actual = [y for x in actual for y in (x if isinstance(x, tuple) else (x,))]
        if len(flat_actual) < len(flat_expected):  # no gradient of p_clean in train mode
            flat_expected = [flat_expected[0], *flat_expected[2:]]
        pairs = [(g, w) for g, w in zip(flat_actual, flat_expected, strict=True) if w is not None]
        return [g for g, _ in pairs], [w for _, w in pairs]

    def _move(self, x: Any) -> Any:
        if isinstance(x, tuple):  # a record
            return type(x)(*(self._move(part) for part in x))
        if not isinstance(x, Tensor):
            return x
        moved = x.to(self.device)
        return moved.float() if moved.dtype == torch.float64 else moved

    def _widen(self, x: Any) -> Any:
        if isinstance(x, tuple):
            return type(x)(*(self._widen(part) for part in x))
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check_passes(check: _Checker, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> None:
    """Statistics, apply, reduce and propagate with every option."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for shape in shapes:
        scale, shift, by_input = (normal(*shape[:2]) for _ in range(3))
        for dtype in dtypes:
            for layout in (torch.contiguous_format, torch.channels_last):
                u, grad, other = (normal(*shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
                y, limit = other.relu(), _LIMITS[dtype]
                check("statistics", u)
                for residual in (None, other):
                    for code, keep_mask in ((0, False), (RELU, False), (RELU, True)):
                        check("apply", u, scale, shift, residual, code, keep_mask, False, limit=limit)
                    for code in range(RELU + 1, len(ACTIVATIONS)):
                        check("apply", u, scale, shift, residual, code, True, False, limit=limit)
                for relu_mask, slope in ((None, None), (y, None), (y > 0, None), (None, y)):
                    check("reduce", grad, u, shift, relu_mask, slope)
                    for propagation in (Propagation(scale, None, None), Propagation(scale, by_input, shift)):
                        about = (None, None) if propagation.by_input is None else (u, shift)
                        rest = (*about, relu_mask, propagation)
                        check("propagate", grad, *rest, False, slope, limit=limit)
                        check("propagate", grad, *rest, True, slope, limit=limit)


def check_algebra(check: _Checker) -> None:
    """The [B, C] mathematics for two rows and one."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    g1, gc, mean, scale = (normal(BATCH, CHANNELS) for _ in range(4))
    m2, p = normal(BATCH, CHANNELS).square() * 9, torch.rand(BATCH, generator=generator)
    is_clean = torch.arange(BATCH) % 3 == 0
    for affine_rows, stat_rows in ((2, 2), (1, 1), (2, 1)):
        weight, bias = normal(affine_rows, CHANNELS), normal(affine_rows, CHANNELS)
        running = normal(stat_rows, CHANNELS), normal(stat_rows, CHANNELS).square() + 0.5
        for scaled in (scale, None):
            probability, kind = (p, is_clean) if affine_rows == 2 else (None, None)
            norm = Norm(weight, bias, *running, 1e-5)
            mix = Mix(scaled, probability)
            check("eval_coefficients", norm, mix, BATCH)
            sums = Reduced(g1, gc, mean)
            for needs in (
                Needs(
                    filter_scale=scaled is not None, p_clean=affine_rows == 2, bn_weight=True, bn_bias=True
                ),
                Needs(p_clean=affine_rows == 2),
            ):
                check("eval_gradients", sums, norm, mix, needs)
            stats, mix = SampleStats(mean, m2, 9), Mix(scaled, None, kind)
            statistics_mix = mix if stat_rows == 2 else mix._replace(is_clean=None)
            batch = check("batch_statistics", stats, statistics_mix, stat_rows)
            norm = norm._replace(mean=batch.mean, var=batch.var)
            check("train_coefficients", norm, mix, BATCH)
            totals = check("train_sums", sums, norm, mix, limit=1e-3)
            for given in (None, totals):
                need = scaled is not None
                check("train_gradients", sums, stats, norm, batch.n, mix, need, given, limit=1e-3)


def check_triton_only(device: torch.device, dtypes: Sequence[torch.dtype]) -> int:
    """Kernels that only Triton has: convolutions, the attack's step, a network's coefficients.

    Returns the number of calls.
    """
    from awnet.ops.launch_config import launch_parameters

    fused_conv, sign_step = (
        importlib.import_module(f"awnet.kernels.{name}") for name in ("fused_conv", "sign_step")
    )

    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    calls = 0
    where: tuple[Any, ...] = ((1, 1), (1, 1), (1, 1))
    # 9×9 images, of which a tile contains parts of two, and 8×8 images, for which a mask is supported
    for dtype, (size, keep_mask) in product(dtypes, ((9, False), (8, True))):
        x = normal(2, 16, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
        scale, shift = normal(2, 16), normal(2, 16)
        for groups in (1, 16):
            weight = normal(16, 16 // groups, 3, 3).to(dtype)
            weight = weight.contiguous(memory_format=torch.channels_last)
            applied = fused_conv.fused_apply(
                x, weight, scale, shift, x, RELU, *where, groups, True, keep_mask, force=True
            )
            counted = fused_conv.fused_statistics(x, weight, *where, groups, force=True)
            back = fused_conv.fused_dgrad(x, weight, x.shape, *where, groups, force=True)
            for value in (applied, counted, back):
                if value is None or not all(part.isfinite().all() for part in _tensors(value)):
                    raise SystemExit(
                        f"a convolution with groups={groups} was not supported or gave no finite result"
                    )
                calls += 1
    image = torch.rand(3, 3, 17, 17, generator=generator).to(device)
    config = launch_parameters("sign_step", device, 3, 3, 289)
    moved = sign_step.sign_step(image, normal(3, 3, 17, 17), image, 0.01, 0.03, config)
    assert float((moved - image).abs().max()) <= 0.0101
    tables, scale, p = normal(4, 2, 32).abs(), normal(5, 8), normal(5).sigmoid()
    coefficients = torch.ops.awnet.network_coefficients_triton(scale, p, tables, (8, 24), 1e-5)
    d = normal(5, 32)
    grads = torch.ops.awnet.network_gradients_triton(d, d, scale, p, tables, 1e-5, (True, True))
    assert all(part.isfinite().all() for part in _tensors((coefficients, grads)))
    return calls + 3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Calls every kernel of a backend once.")
    parser.add_argument("--backend", choices=("cuda", "triton", "cpp"), required=True)
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    interpreted = False
    if options.backend == "triton":
        from awnet.ops.backends.triton import interpreted as is_interpreted

        interpreted = is_interpreted()
    if options.backend != "cpp" and not interpreted:
        if not torch.cuda.is_available():
            raise SystemExit(f"the {options.backend} kernels need a CUDA device, and there is none")
        device = torch.device("cuda")
    # the interpreter is slow, and its bfloat16 arithmetic is not that of a GPU
    shapes = SMALL_SHAPES if interpreted else SHAPES
    dtypes = (torch.float32, torch.float16) if interpreted else tuple(_LIMITS)
    check = _Checker(options.backend, device)
    check_passes(check, shapes, dtypes)
    check_algebra(check)
    calls = check.calls
    if options.backend == "triton":
        calls += check_triton_only(device, dtypes)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{options.backend}: {calls} calls on {device}, all correct")
    return 0


if __name__ == "__main__":
    sys.exit(main())

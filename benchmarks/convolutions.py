"""Compares the Triton convolutions with the library's: ``python -m awnet.benchmarks.convolutions``.

For every layer and operation, the library's convolution with the Triton pass that follows it is timed against
the fused kernel at each candidate tile, after the results of both have been compared. ``--update`` writes the
cases in which the kernel is faster to the device's table in awnet/ops/configs/, which the Triton backend
reads.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awnet import files
from awnet.devices import resolve_device
from awnet.ops import launch_config
from awnet.ops.args import RELU
from awnet.ops.backends import triton as triton_backend

from .cases import Convolution

# ResNet-18 on 32×32 images: its stages, the strided layers between them; depthwise versions of the stages
LAYERS = {
    "stage 1": Convolution(64, 64, 32),
    "stage 2": Convolution(128, 128, 16),
    "stage 3": Convolution(256, 256, 8),
    "stage 4": Convolution(512, 512, 4),
    "to stage 2": Convolution(64, 128, 32, stride=2),
    "to stage 3": Convolution(128, 256, 16, stride=2),
    "to stage 4": Convolution(256, 512, 8, stride=2),
    "shortcut to stage 2": Convolution(64, 128, 32, kernel=1, stride=2),
    "depthwise 64": Convolution(64, 64, 32, groups=64),
    "depthwise 128": Convolution(128, 128, 16, groups=128),
    "depthwise 256": Convolution(256, 256, 8, groups=256),
    "depthwise 512": Convolution(512, 512, 4, groups=512),
    "smoke": Convolution(5, 6, 4),
    "smoke depthwise": Convolution(6, 6, 4, groups=6),
}
_LAYER_NAME = re.compile(r"(\d+)-(\d+)@(\d+)(?:k(\d))?(?:s(\d))?(?:g(\d+))?")


def find_layer(name: str) -> Convolution:
    """A layer of ``LAYERS``, or one written as "64-128@32k3s2g1"; kernel, stride, groups may be missing."""
    if name in LAYERS:
        return LAYERS[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"unknown layer {name!r}; available: {', '.join(LAYERS)}; write others like 64-128@32k3s2g1"
        )
    c_in, c_out, size, kernel, stride, groups = (int(n) if n else None for n in match.groups())
    assert c_in is not None
    assert c_out is not None
    assert size is not None
    return Convolution(c_in, c_out, size, kernel or 3, stride or 1, groups or 1)


def _layer_name(name: str) -> str:
    find_layer(name)
    return name


OPERATIONS = ("apply", "statistics", "dgrad")


@dataclass(frozen=True)
class Result:
    """One row: the library and a pass against each tile of ours."""

    layer: str
    operation: str
    batch: int
    dtype: str
    key: str
    library_ms: float
    convolution_ms: float  # the library's convolution alone
    tiles_ms: dict[Any, float]

    @property
    def best(self) -> Any:
        return min(self.tiles_ms, key=lambda tile: self.tiles_ms[tile])


def _kernels() -> Any:
    return importlib.import_module("awnet.kernels.fused_conv")


def candidates(layer: Convolution, operation: str, dtype: torch.dtype, interpreted: bool) -> list[Any]:
    """The tiles to try; small ones in the interpreter, where each step takes milliseconds."""
    make = _kernels().kernel_of(layer.groups).Tile
    if layer.groups > 1:
        if interpreted:
            return [make(16, 8, 4)]
        sizes = [(16, 32), (16, 64), (16, 128), (32, 32), (32, 64), (64, 32), (64, 64), (128, 16)]
        return [make(*size, warps) for size in sizes for warps in (2, 4, 8)]
    if interpreted:
        return [make(16, 16, 16, 4, 2, swap) for swap in (0, 1)]
    if dtype == torch.float32:
        return [
            make(m, n, k, 8, s) for m in (32, 64, 128) for n in (32, 64) for k in (16, 32) for s in (2, 3)
        ]
    channels = layer.c_in if operation == "dgrad" else layer.c_out
    shapes = [(64, 64, 4), (128, 64, 4), (128, 64, 8), (256, 64, 4), (256, 64, 8), (64, 128, 4)]
    shapes += [(128, 128, 4), (128, 128, 8), (256, 128, 8), (64, 256, 8), (128, 256, 8)]
    return [
        make(m, n, 64, warps, stages, swap)
        for m, n, warps in shapes
        for stages in (3, 4)
        for swap in (0, 1)
        if n <= channels
    ]


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        import triton.testing

        return float(triton.testing.do_bench(run, warmup=20, rep=100, return_mode="median"))
    run()
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _functions(
    layer: Convolution, operation: str, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[Any], Any], str]:
    """The library's convolution with the pass, without it, ours by tile, and the table's key."""
    kernels = _kernels()
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    def image(channels: int, side: int) -> Tensor:
        return normal(batch, channels, side, side).to(dtype).to(memory_format=torch.channels_last)

    fan_in = layer.c_in // layer.groups
    weight = normal(layer.c_out, fan_in, layer.kernel, layer.kernel) / (fan_in * layer.kernel**2) ** 0.5
    weight = weight.to(dtype).to(memory_format=torch.channels_last)
    stride, padding, _, groups = layer.geometry
    x = image(layer.c_in, layer.size)
    out = (layer.size + 2 * padding[0] - layer.kernel) // stride[0] + 1
    residual, d_u = image(layer.c_out, out), image(layer.c_out, out)
    scale, shift = normal(batch, layer.c_out), normal(batch, layer.c_out)
    # as in an attack; if the side is not a power of two, a tile may contain parts of two samples, and the
    # kernel writes no mask
    keep_mask = groups > 1 or out & (out - 1) == 0
    passes = triton_backend.TritonPasses()
    read = d_u if operation == "dgrad" else x
    name = kernels.kernel_of(groups).key(
        kernels.problem_of(operation, read, weight, x.shape, *layer.geometry)
    )

    def forward() -> Tensor:
        return torch.ops.aten.convolution(x, weight, None, *layer.geometry[:3], False, [0, 0], groups)

    def backward() -> Tensor:
        mask = [True, False, False]
        return torch.ops.aten.convolution_backward(
            d_u, x, weight, None, *layer.geometry[:3], False, [0, 0], groups, mask
        )[0]

    def apply() -> tuple[Tensor, ...]:
        u = forward()
        y, _ = passes.apply(u, scale, shift, residual, RELU, keep_mask, False)
        return y, u

    def statistics() -> tuple[Tensor, ...]:
        u = forward()
        return u, *passes.statistics(u)

    def fused(tile: Any) -> Any:
        if operation == "apply":
            keep = (True, keep_mask)
            outputs = kernels.fused_apply(
                x, weight, scale, shift, residual, RELU, *layer.geometry, *keep, tile=tile
            )
            return None if outputs is None else outputs[:2]  # a mask may differ where y is next to zero
        if operation == "statistics":
            return kernels.fused_statistics(x, weight, *layer.geometry, tile=tile)
        return kernels.fused_dgrad(d_u, weight, x.shape, *layer.geometry, tile=tile)

    references: dict[str, Callable[[], Any]] = {"apply": apply, "statistics": statistics, "dgrad": backward}
    return references[operation], backward if operation == "dgrad" else forward, fused, name


def _close(actual: Any, expected: Any, dtype: torch.dtype) -> bool:
    """Whether the relative error of each tensor is within the rounding of ``dtype``; a mean may be near 0."""
    actual, expected = ((x,) if isinstance(x, Tensor) else x for x in (actual, expected))
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for mine, other in zip(actual, expected, strict=True):
        size = other.double().norm() if other.dim() == 4 else other.double().norm() + other.numel() ** 0.5
        if not bool((mine.double() - other.double()).norm() <= tolerance * size):
            return False
    return True


def _race(name: str, operation: str, batch: int, dtype: torch.dtype, device: torch.device) -> Result:
    from triton.runtime.errors import OutOfResources

    library, convolution, fused, key = _functions(find_layer(name), operation, batch, dtype, device)
    expected = library()
    times: dict[Any, float] = {}
    for tile in candidates(find_layer(name), operation, dtype, device.type != "cuda"):
        try:
            actual = fused(tile)
        except OutOfResources:
            continue
        if not _close(actual, expected, dtype):
            raise RuntimeError(f"{key} with {tile} at batch {batch} does not equal the library's result")
        times[tile] = _milliseconds(partial(fused, tile), device)
    if not times:
        raise RuntimeError(f"no candidate tile of {key} fits this device")
    plain, alone = _milliseconds(library, device), _milliseconds(convolution, device)
    short = str(dtype).removeprefix("torch.")
    return Result(name, operation, batch, short, key, plain, alone, times)


def race(
    layers: Sequence[str],
    operations: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> Iterator[Result]:
    """All rows. A tile that does not fit the device is skipped; a wrong result raises RuntimeError."""
    for name, operation, dtype, batch in itertools.product(layers, operations, dtypes, batches):
        layer = find_layer(name)
        if operation != "dgrad" or layer.groups > 1 or layer.stride == 1:  # else it is the library's
            yield _race(name, operation, batch, dtype, device)


def wins(results: Sequence[Result], margin: float = 1.02) -> dict[str, dict[str, int]]:
    """The table: the cases in which one tile beats the library by ``margin`` from ``least_batch`` on."""
    table: dict[str, dict[str, int]] = {}
    for key in dict.fromkeys(result.key for result in results):
        rows = sorted((r for r in results if r.key == key), key=lambda r: r.batch, reverse=True)
        # one tile for all batches: the one with the least slowdown against the best of each
        common_tiles = [tile for tile in rows[0].tiles_ms if all(tile in row.tiles_ms for row in rows)]
        if not common_tiles:
            continue
        tile = min(common_tiles, key=lambda t: sum(row.tiles_ms[t] / row.tiles_ms[row.best] for row in rows))
        for row in rows:  # from the largest batch down, until ours loses
            if row.library_ms < margin * row.tiles_ms[tile]:
                break
            table[key] = tile._asdict() | {"least_batch": row.batch}
    return table


def update_table(device: torch.device, results: Sequence[Result]) -> Path:
    path = launch_config.FOLDER / f"{launch_config.device_slug(device)}.json"
    content: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"device": path.stem, "launches": {}}
    )
    measured = {result.key for result in results}
    unchanged = {k: v for k, v in content.get("convolutions", {}).items() if k not in measured}
    content["convolutions"] = dict(sorted((unchanged | wins(results)).items()))
    files.write_json(path, content)
    launch_config.forget_tables()
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m awnet.benchmarks.convolutions", description=__doc__)
    usual = [name for name in LAYERS if not name.startswith("smoke")]
    parser.add_argument(
        "--layers", nargs="+", type=_layer_name, default=usual, metavar="NAME",
        help=f"{', '.join(LAYERS)}; or like 64-128@32k3s2g1: channels, size, kernel, stride, groups",
    )  # fmt: skip
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 256, 512])
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"]
    )
    parser.add_argument("--out", type=Path, help="a CSV file of every row")
    parser.add_argument("--update", action="store_true", help="write the wins into awnet/ops/configs/")
    options = parser.parse_args(arguments)
    device = resolve_device(None)
    reason = triton_backend.obstacle(torch.empty(1, 1, 1, 1, device=device))
    if reason is not None:
        parser.error(f"the Triton kernels cannot run here: {reason}")
    if options.update and device.type != "cuda":
        parser.error("--update needs a CUDA device: times in the interpreter mean nothing")
    dtypes = [getattr(torch, name) for name in options.dtypes]
    results = []
    columns = ["layer", "operation", "batch", "dtype"]
    columns += ["library ms", "its convolution ms", "ours ms", "ratio", "tile"]
    lines: list[tuple[object, ...]] = []
    print(*columns, sep="  ")
    torch.backends.cudnn.allow_tf32 = False
    for r in race(options.layers, options.operations, options.batches, dtypes, device):
        results.append(r)
        fused = r.tiles_ms[r.best]
        tile = " ".join(f"{field}={value}" for field, value in r.best._asdict().items())
        times = [f"{ms:.4f}" for ms in (r.library_ms, r.convolution_ms, fused)]
        lines.append((r.layer, r.operation, r.batch, r.dtype, *times, f"{r.library_ms / fused:.3f}", tile))
        print(*lines[-1], sep="  ", flush=True)
    if options.out is not None:
        with files.written_atomically(options.out) as path, open(path, "w", newline="") as file:
            machine = (launch_config.device_slug(device), torch.__version__, version("triton"))
            writer = csv.writer(file)
            writer.writerow([*columns, "device", "torch", "triton"])
            writer.writerows([*line, *machine] for line in lines)
    if options.update:
        print(f"wrote {len(wins(results))} wins into {update_table(device, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

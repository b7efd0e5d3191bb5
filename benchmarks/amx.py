"""AMX tiles against the library in bfloat16, in turns in one process: `python -m awnet.benchmarks.amx`.

Prints the best and the median rate of each, the share of the AMX peak, the involuntary context switches and
the CPU's steal share, and appends one row for each to ``<out>/<device>-amx.csv``. A disturbed measurement is
repeated.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awnet.models import create_model
from awnet.ops.backends import amx

from . import machine, results
from .ceilings import amx_tflop_s
from .options import MAX_BATCH, check_machine, check_whole
from .plain import plain_model
from .timing import Times, in_turns
from .train import attack_step_flops

# channels in and out, side, kernel, stride
LAYERS = [(64, 64, 32, 3, 1), (128, 128, 16, 3, 1), (256, 256, 8, 3, 1), (512, 512, 4, 3, 1)]
LAYERS += [(128, 256, 16, 3, 2), (128, 256, 16, 1, 2), (32, 32, 16, 3, 1), (64, 64, 8, 3, 1)]


@dataclass(frozen=True)
class Comparison:
    """One computation by both providers."""

    case: str
    batch: int
    unit: str
    work: float  # of one run, in the unit times seconds
    flops: float  # of one run
    runs: Mapping[str, Callable[[], object]]  # "tiles" and "library"


def _with_mode(mode: str, run: Callable[[], object]) -> Callable[[], object]:
    def chosen() -> object:
        os.environ["AWNET_AMX"] = mode
        return run()

    return chosen


def pgd_step(name: str, batch: int, size: int) -> Comparison:
    """The input gradient of a frozen network's loss, as in a step of PGD."""
    torch.manual_seed(0)
    model = create_model(name)
    shape = (batch, 3, size, size)
    x, y = torch.rand(shape).bfloat16(), torch.arange(batch) % 10
    runs = {}
    for provider, mode, layout in (
        ("tiles", "auto", torch.contiguous_format),
        ("library", "0", torch.channels_last),
    ):
        inference = model.to(memory_format=layout).inference_copy(torch.bfloat16)  # type: ignore[call-overload]
        images = x.contiguous(memory_format=layout)

        def run(inference: Callable[[Tensor], Tensor] = inference, images: Tensor = images) -> object:
            image = images.detach().requires_grad_()
            return torch.autograd.grad(F.cross_entropy(inference(image), y, reduction="sum"), image)

        runs[provider] = _with_mode(mode, run)
    flops = attack_step_flops(plain_model(create_model(name)).to("meta").eval(), shape)
    return Comparison(f"PGD step of {name}, {size}x{size}", batch, "images/s", batch, flops, runs)


def layer(shape: tuple[int, int, int, int, int], batch: int) -> Iterator[Comparison]:
    """The three passes of one convolution of training."""
    c_in, c_out, side, kernel, stride = shape
    last = torch.channels_last
    x = torch.randn(batch, c_in, side, side).bfloat16().contiguous(memory_format=last)
    weight = torch.randn(c_out, c_in, kernel, kernel).bfloat16().contiguous(memory_format=last)
    conv: Any = [[stride] * 2, [kernel // 2] * 2, [1, 1]]
    grad = torch.randn_like(F.conv2d(x, weight, None, stride, kernel // 2))
    flops = 2.0 * grad.numel() * c_in * kernel**2
    ours = torch.ops.awnet

    def library(needs: list[bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            grad, x, weight, None, *conv, False, [0, 0], 1, needs
        )

    passes: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward": (
            lambda: ours.amx_convolution(x, weight, *conv),
            lambda: F.conv2d(x, weight, None, stride, kernel // 2),
        ),
        "input gradient": (
            lambda: ours.amx_convolution_backward(grad, x, weight, *conv, True, False),
            library([True, False, False]),
        ),
        "weight gradient": (
            lambda: ours.amx_convolution_backward(grad, x, weight, *conv, False, True),
            library([False, True, False]),
        ),
    }
    for name, (tiles, other) in passes.items():
        case = f"{name} {c_in}-{c_out}@{side}k{kernel}s{stride}"
        runs = {"tiles": _with_mode("auto", tiles), "library": other}
        yield Comparison(case, batch, "GFLOP/s", flops / 1e9, flops, runs)


def measure(comparison: Comparison, rounds: int, retries: int) -> list[results.Row]:
    """Times the AMX peak and both providers in turns, prints a line and returns the rows."""
    peaks = [_peak()]
    times = in_turns(comparison.runs, rounds, retries)
    peaks.append(_peak())
    peak = max((rate for rate in peaks if rate is not None), default=None)
    rows = [_row(comparison, provider, each, peak) for provider, each in times.items()]
    rates = ", ".join(f"{row['provider']} {row['rate_best']} (median {row['rate_median']})" for row in rows)
    tiles, library = times["tiles"], times["library"]
    print(
        f"{comparison.case}, batch {comparison.batch}: {rates} {comparison.unit}; ratio "
        f"{library.best / tiles.best:.2f} (medians {library.median / tiles.median:.2f}); "
        f"{rows[0]['share_of_peak'] or '?'} of the AMX peak; {tiles.interference}"
        f"{'; disturbed' if any(each.interference.disturbed for each in times.values()) else ''}",
        flush=True,
    )
    return rows


def _peak() -> float | None:
    os.environ["AWNET_AMX"] = "auto"
    return amx_tflop_s(0.05)


def _row(comparison: Comparison, provider: str, times: Times, peak: float | None) -> results.Row:
    row = dict.fromkeys(results.AMX_COLUMNS, "") | machine.provenance(torch.device("cpu"))
    row |= times.interference.columns | {
        "case": comparison.case,
        "provider": provider,
        "batch": str(comparison.batch),
        "threads": str(torch.get_num_threads()),
        "unit": comparison.unit,
        "rate_best": f"{1000 * comparison.work / times.best:.4g}",
        "rate_median": f"{1000 * comparison.work / times.median:.4g}",
    }
    if peak is not None:
        row["amx_tflop_s"] = f"{peak:.4g}"
        row["share_of_peak"] = f"{comparison.flops / times.best / 1e9 / peak:.4f}"
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m awnet.benchmarks.amx",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--retries", type=int, default=2, help="repetitions of a disturbed measurement")
    parser.add_argument("--model", default="awnet_resnet18")
    parser.add_argument(
        "--batch", type=int, default=64, help="images of a PGD step; a layer is measured with half of them"
    )
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--only", choices=("step", "layers"))
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the CSV file")
    options = parser.parse_args(arguments)
    os.environ["AWNET_AMX"] = "auto"
    try:
        check_machine("cpu", options.threads, options.retries, 0, options.out)
        for name, minimum, maximum in (("rounds", 1, 10**6), ("batch", 2, MAX_BATCH), ("size", 1, 2**14)):
            check_whole(name, getattr(options, name), minimum, maximum)
        if (obstacle := amx.obstacle()) is not None:
            raise ValueError(f"nothing to measure: {obstacle}")
        path = machine.csv_path(options.out, torch.device("cpu"), "-amx")
        results.read_rows(path, results.AMX_COLUMNS)
        torch.set_num_threads(options.threads)
        comparisons = []
        if options.only != "layers":
            comparisons.append(pgd_step(options.model, options.batch, options.size))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for comparison in comparisons:
        rows = measure(comparison, options.rounds, options.retries)
        results.add_rows(path, rows, results.AMX_COLUMNS)
    for shape in LAYERS if options.only != "step" else []:
        for comparison in layer(shape, options.batch // 2):
            rows = measure(comparison, options.rounds, options.retries)
            results.add_rows(path, rows, results.AMX_COLUMNS)
    print(f"rows added to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

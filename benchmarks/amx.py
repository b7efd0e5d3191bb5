"""AMX tiles against the library in bfloat16, in turns in one process: `python -m awnet.benchmarks.amx`.

Prints the best and the median time of each, with the involuntary context switches and the CPU's steal share
of the whole measurement: on a shared machine only a run with few of both says anything beyond its ratio.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from awnet.models import create_model
from awnet.ops.backends import amx

# channels in and out, side, kernel, stride
LAYERS = [(64, 64, 32, 3, 1), (128, 128, 16, 3, 1), (256, 256, 8, 3, 1), (512, 512, 4, 3, 1)]
LAYERS += [(128, 256, 16, 3, 2), (128, 256, 16, 1, 2), (32, 32, 16, 3, 1), (64, 64, 8, 3, 1)]


def _stolen() -> tuple[int, int]:
    """Clock ticks that the hypervisor took, and all."""
    with open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:]]
    return ticks[7], sum(ticks)


def in_turns(name: str, work: float, unit: str, runs: dict[str, Callable[[], object]], rounds: int) -> None:
    """Times ``runs`` one after the other, ``rounds`` times; ``work`` per second in ``unit``."""
    times: dict[str, list[float]] = {way: [] for way in runs}
    switches, (stolen, ticks) = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw, _stolen()
    for way in runs:
        runs[way]()
    for _ in range(rounds):
        for way, run in runs.items():
            begun = time.perf_counter()
            run()
            times[way].append(time.perf_counter() - begun)
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches
    now = _stolen()
    steal = (now[0] - stolen) / max(1, now[1] - ticks)
    best = {way: min(found) for way, found in times.items()}
    middle = {way: statistics.median(found) for way, found in times.items()}
    rates = ", ".join(f"{way} {work / best[way]:.4g} (median {work / middle[way]:.4g})" for way in runs)
    print(
        f"{name}: {rates} {unit}; ratio {best['library'] / best['tiles']:.2f} (medians "
        f"{middle['library'] / middle['tiles']:.2f}); {switches} involuntary switches, {steal:.1%} stolen",
        flush=True,
    )


def _with(mode: str, run: Callable[[], object]) -> Callable[[], object]:
    def chosen() -> object:
        os.environ["AWNET_AMX"] = mode
        return run()

    return chosen


def pgd_step(model: str, batch: int, size: int, rounds: int) -> None:
    """The gradient of a frozen network's loss, as a step of PGD takes it."""
    torch.manual_seed(0)
    live = create_model(model)
    x, y = torch.rand(batch, 3, size, size).bfloat16(), torch.arange(batch) % 10
    runs = {}
    for way, mode, layout in (
        ("tiles", "auto", torch.contiguous_format),
        ("library", "0", torch.channels_last),
    ):
        still = live.to(memory_format=layout).inference_copy(torch.bfloat16)  # type: ignore[call-overload]
        images = x.contiguous(memory_format=layout)

        def run(still: Callable[[Tensor], Tensor] = still, images: Tensor = images) -> object:
            image = images.detach().requires_grad_()
            return torch.autograd.grad(F.cross_entropy(still(image), y, reduction="sum"), image)

        runs[way] = _with(mode, run)
    in_turns(f"PGD step of {model}, {batch} images of {size}x{size}", batch, "images/s", runs, rounds)


def layer(shape: tuple[int, int, int, int, int], batch: int, rounds: int) -> None:
    """One convolution of training, its three passes."""
    ins, outs, side, kernel, stride = shape
    last = torch.channels_last
    x = torch.randn(batch, ins, side, side).bfloat16().contiguous(memory_format=last)
    weight = torch.randn(outs, ins, kernel, kernel).bfloat16().contiguous(memory_format=last)
    numbers = [[stride] * 2, [kernel // 2] * 2, [1, 1]]
    grad = torch.randn_like(F.conv2d(x, weight, None, stride, kernel // 2))
    work = 2e-9 * grad.numel() * ins * kernel**2
    ours = torch.ops.awnet

    def library(which: list[bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            grad, x, weight, None, *numbers, False, [0, 0], 1, which
        )

    passes: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward": (
            lambda: ours.amx_convolution(x, weight, *numbers),
            lambda: F.conv2d(x, weight, None, stride, kernel // 2),
        ),
        "input gradient": (
            lambda: ours.amx_convolution_backward(grad, x, weight, *numbers, True, False),
            library([True, False, False]),
        ),
        "weight gradient": (
            lambda: ours.amx_convolution_backward(grad, x, weight, *numbers, False, True),
            library([False, True, False]),
        ),
    }
    for name, (tiles, other) in passes.items():
        where = f"{ins} to {outs} channels from {side}x{side}, {kernel}x{kernel}, stride {stride}, {name}"
        in_turns(where, work, "GFLOP/s", {"tiles": _with("auto", tiles), "library": other}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", default="awnet_resnet18")
    parser.add_argument(
        "--batch", type=int, default=64, help="images of a PGD step; a layer has half of them"
    )
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--only", choices=("step", "layers"))
    options = parser.parse_args()
    os.environ["AWNET_AMX"] = "auto"
    if (obstacle := amx.obstacle()) is not None:
        raise SystemExit(f"nothing to measure: {obstacle}")
    torch.set_num_threads(options.threads)
    if options.only != "layers":
        pgd_step(options.model, options.batch, options.size, options.rounds)
    if options.only != "step":
        for shape in LAYERS:
            layer(shape, options.batch // 2, options.rounds)


if __name__ == "__main__":
    main()

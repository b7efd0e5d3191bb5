"""Profiles the training attack on AW-Net, its time divided by the PGD steps: kernels, and a step for ncu.

``python -m awnet.benchmarks.profile_step --out DIR`` writes DIR/profile.json and prints the table;
``--steps-only`` runs only the steps, for an external profiler.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awnet import ops
from awnet.attacks import GraphedPGD
from awnet.files import write_text
from awnet.models import create_model


def make_step(options: argparse.Namespace, steps: int) -> Callable[[], Tensor]:
    """The attack of a training step with ``steps`` PGD steps on fixed random images.

    It is :class:`awnet.attacks.GraphedPGD` on an inference copy of the model: on a GPU in bfloat16 and, from
    the second call on, as one CUDA graph; on a CPU in float32 without a graph.
    """
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    model = create_model(options.model).to(device).train()
    if options.layout == "channels_last":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(options.batch, 3, 32, 32, generator=generator).to(device)
    if options.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (options.batch,), generator=generator).to(device)
    index = torch.arange(options.batch, device=device)
    attack = GraphedPGD(
        model,
        num_classes=10,
        dtype=torch.bfloat16 if device.type == "cuda" else None,
        eps=8 / 255,
        step_size=2 / 255,
        steps=steps,
    )

    def step() -> Tensor:
        chosen = ops.use_backend(options.backend) if options.backend else nullcontext()
        with chosen:
            return attack(x, y, index=index)

    return step


def profile(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Kernels of one attack by their total time, the heaviest first."""
    step = make_step(options, options.steps)
    for _ in range(2):  # compiles, picks algorithms, captures
        step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = torch.device(options.device).type == "cuda"
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    rows: list[dict[str, Any]] = []
    for event in recorded.key_averages():
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append({"kernel": event.key, "us": time / options.steps, "calls": event.count / options.steps})
    return sorted(rows, key=lambda row: -row["us"])


def heaviest(rows: Sequence[dict[str, Any]], count: int = 5) -> list[str]:
    """Regular expressions for ncu's --kernel-name, which matches a kernel's name without its arguments."""
    names = []
    for row in rows:
        whole = row["kernel"].removeprefix("void ").replace("(anonymous namespace)::", "")
        plain = re.sub(r"[<(].*", "", whole).split("::")[-1].strip()
        if plain and not plain.startswith(("Memcpy", "Memset")) and plain not in names:
            names.append(plain)
    return [f"^{re.escape(name)}$" for name in names[:count]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Profiles the training attack on AW-Net.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="awnet_resnet18")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layout", choices=("nchw", "channels_last"), default="channels_last")
    parser.add_argument("--backend", help="as AWNET_BACKEND; by default awnet chooses")
    parser.add_argument("--out", type=Path, help="folder for profile.json and heaviest.txt")
    parser.add_argument("--steps-only", action="store_true", help="run two steps and nothing else")
    options = parser.parse_args(arguments)
    if options.steps_only:
        step = make_step(options, 2)
        for _ in range(2):
            step()
        return 0
    rows = profile(options)
    total = sum(row["us"] for row in rows)
    print(f"{options.model}, batch {options.batch}, one PGD step on {options.device}: {total:.0f} us")
    for row in rows[:25]:
        print(f"{row['us']:10.1f} us {row['us'] / total:6.1%} {row['calls']:7.1f} x  {row['kernel'][:90]}")
    if options.out is not None:
        write_text(options.out / "profile.json", json.dumps(rows, indent=1) + "\n")
        write_text(options.out / "heaviest.txt", "\n".join(heaviest(rows)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

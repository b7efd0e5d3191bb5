"""Functions and commands run by two processes that share a process group on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from awnet.distributed import joined

from .processes import start


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _work(rank: int, size: int, port: int, jobs: list[Callable[..., Any]], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined(torch.device("cpu")) as ranks:
        assert (ranks.rank, ranks.size) == (rank, size)
        for job in jobs:
            torch.save(job(ranks, folder), folder / f"{job.__name__}-{rank}.pt")


def on_two_ranks(jobs: list[Callable[..., Any]], folder: Path) -> dict[str, list[Any]]:
    port = free_port()
    ranks = [start(_work, rank, 2, port, jobs, folder, output=folder / f"{rank}.txt") for rank in range(2)]
    for rank, process in enumerate(ranks):
        process.join()
        assert process.exitcode == 0, (folder / f"{rank}.txt").read_text()
    return {
        job.__name__: [torch.load(folder / f"{job.__name__}-{rank}.pt") for rank in range(2)] for job in jobs
    }


def torchrun(*arguments: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += [f"--max-restarts={restarts}", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )

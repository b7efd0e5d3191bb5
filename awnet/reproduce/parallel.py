"""Runs independent jobs in parallel processes.

Small networks train faster with one core for each process than with all cores for one.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

Job = Callable[[], Any]


def run_in_parallel(queues: Sequence[Sequence[Job]], threads: int) -> list[list[Any]]:
    """Runs the queues side by side, the jobs of each in order, and returns their results.

    The first queue runs in this process, every other one in a separate process; its jobs and results must be
    picklable. If an exception is raised here, or this process ends for any reason, the other processes
    receive SIGTERM, and this process waits for them.

    Args:
        queues: the jobs of each process.
        threads: number of threads of each process.

    Raises:
        RuntimeError: another process failed; it has printed its error.
    """
    before = torch.get_num_threads()
    children: list[_Child] = []
    try:
        torch.set_num_threads(threads)
        children += [_Child(queue, threads) for queue in queues[1:]]
        results = [[job() for job in queues[0]]]
        return results + [child.results() for child in children]
    finally:
        for child in children:
            child.stop()
        torch.set_num_threads(before)


class _Child:
    """A Python process that reads pickled jobs from its standard input and stops when that is closed."""

    def __init__(self, jobs: Sequence[Job], threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from awnet.reproduce.parallel import _serve; _serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches this process only, which passes it on by stop()
        )
        assert self._process.stdin is not None
        pickle.dump((threads, list(jobs)), self._process.stdin)
        self._process.stdin.flush()

    def results(self) -> list[Any]:
        assert self._process.stdout is not None
        output = self._process.stdout.read()
        status = self._process.wait()
        if status != 0:
            raise RuntimeError(f"a process of this run failed with status {status}; see its message above")
        results: list[Any] = pickle.loads(output)
        return results

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _serve() -> None:
    """The main function of the child process."""
    # standard output carries only the results; what jobs print goes to standard error
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        threads, jobs = pickle.load(sys.stdin.buffer)
    except EOFError:  # stopped before it began
        sys.exit(128 + signal.SIGTERM)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    results = [job() for job in jobs]
    with suppress(BrokenPipeError):  # the parent no longer waits for it
        output.write(pickle.dumps(results))
        output.close()


def _stop_with_parent() -> None:
    # not sys.stdin: a daemon thread that holds its lock would break the exit of the interpreter
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)

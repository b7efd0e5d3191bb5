"""Independent work side by side: small networks use one core each far better than all cores together."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

Job = Callable[[], Any]


def run_lanes(lanes: Sequence[Sequence[Job]], threads: int) -> list[list[Any]]:
    """Runs each lane's jobs in order, ``threads`` threads a lane, and returns their results.

    The first lane runs in this process, each other one in a process of its own; jobs and results there must
    be picklable. When anything ends this process, or an exception passes through, the others are told to stop
    as by SIGTERM, and waited for.

    Raises RuntimeError when another process fails; it has printed why.
    """
    with _threads(threads):
        others = [_Child(lane, threads) for lane in lanes[1:]]
        try:
            results = [[job() for job in lanes[0]]]
            return results + [child.results() for child in others]
        finally:
            for child in others:
                child.stop()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Child:
    """A Python process that takes pickled jobs on its input and stops when that input is closed."""

    def __init__(self, jobs: Sequence[Job], threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from awnet.reproduce.lanes import _serve; _serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches this process only, which passes it on by stop()
        )
        assert self._process.stdin is not None
        pickle.dump((threads, list(jobs)), self._process.stdin)
        self._process.stdin.flush()

    def results(self) -> list[Any]:
        assert self._process.stdout is not None
        answer = self._process.stdout.read()
        status = self._process.wait()
        if status != 0:
            raise RuntimeError(f"a process of this run failed with status {status}; see its message above")
        results: list[Any] = pickle.loads(answer)
        return results

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _serve() -> None:
    """The child's side."""
    # the answer has standard output to itself; what a job prints goes where errors go
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        threads, jobs = pickle.load(sys.stdin.buffer)
    except EOFError:  # told to stop before it began
        sys.exit(128 + signal.SIGTERM)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    results = [job() for job in jobs]
    with suppress(BrokenPipeError):  # nobody waits for the answer any more
        answer.write(pickle.dumps(results))
        answer.close()


def _stop_with_parent() -> None:
    while os.read(
        0, 1
    ):  # not sys.stdin: its lock, held by a daemon thread, would break the interpreter's exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)

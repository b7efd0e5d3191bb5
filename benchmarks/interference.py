"""How much other processes and the hypervisor disturbed a measurement.

On a shared machine a time means little without it: in each involuntary context switch another process took
the CPU, and the steal share is the part of the CPU time that the hypervisor gave to other guests.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_PROC_STAT = Path("/proc/stat")
_STEAL = 7  # field of the first line of /proc/stat

# per thread: each may cost a scheduler slice of 4 ms, together 4 % of the time; an idle machine shows 1 to 2
MAX_SWITCHES_PER_SECOND = 10.0
MIN_SWITCHES = 3
MAX_STEAL = 0.02


def involuntary_switches() -> int | None:
    """Involuntary context switches of this process so far, all threads; None if they are not counted."""
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def cpu_ticks() -> tuple[int, int] | None:
    """Clock ticks of all CPUs so far: stolen, and in all. None if the system does not count them."""
    try:
        with open(_PROC_STAT) as file:
            ticks = [int(word) for word in file.readline().split()[1 : _STEAL + 2]]
    except (OSError, ValueError):
        return None
    return (ticks[_STEAL], sum(ticks)) if len(ticks) > _STEAL else None


@dataclass(frozen=True)
class Interference:
    """Counts over a measurement; None if the system does not count."""

    seconds: float
    switches: int | None = None
    steal: float | None = None  # share of the time of all CPUs
    threads: int = 1

    @property
    def disturbed(self) -> bool:
        """Whether there was more than an idle machine shows."""
        allowed = max(MIN_SWITCHES, MAX_SWITCHES_PER_SECOND * self.seconds * self.threads)
        return (self.switches or 0) > allowed or (self.steal or 0.0) > MAX_STEAL

    @property
    def columns(self) -> dict[str, str]:
        """The fields of a CSV row."""
        return {
            "switches": "" if self.switches is None else str(self.switches),
            "steal": "" if self.steal is None else f"{self.steal:.4f}",
            "disturbed": str(self.disturbed).lower(),
        }

    def __str__(self) -> str:
        steal = "" if self.steal is None else f", {self.steal:.1%} of the CPU time stolen"
        return f"{self.switches} involuntary context switches{steal}"


UNDISTURBED = Interference(0.0)


class Monitor:
    """Counts from its creation on."""

    def __init__(self) -> None:
        self._seconds, self._switches, self._ticks = time.perf_counter(), involuntary_switches(), cpu_ticks()

    def read(self) -> Interference:
        """The counts so far."""
        switches, ticks = involuntary_switches(), cpu_ticks()
        if switches is not None and self._switches is not None:
            switches -= self._switches
        steal = None
        if ticks is not None and self._ticks is not None:
            stolen, total = (now - before for now, before in zip(ticks, self._ticks, strict=True))
            steal = stolen / total if total > 0 else 0.0
        return Interference(time.perf_counter() - self._seconds, switches, steal, torch.get_num_threads())


def least_disturbed(attempts: Sequence[Mapping[str, Interference]]) -> int:
    """Index of the attempt with the fewest disturbed rows, then the least steal, then the fewest switches."""

    def rank(attempt: Mapping[str, Interference]) -> tuple[float, float, float]:
        rows = attempt.values()
        return (
            sum(row.disturbed for row in rows),
            sum(row.steal or 0.0 for row in rows),
            sum((row.switches or 0) / max(row.seconds, 1e-9) for row in rows),
        )

    return min(range(len(attempts)), key=lambda i: rank(attempts[i]))

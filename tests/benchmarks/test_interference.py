"""Disturbed measurements are marked and repeated. The counters are fakes: nothing here depends on the load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from awnet.benchmarks import amx, interference, results, timing
from awnet.benchmarks import train as training
from awnet.benchmarks.ceilings import Ceilings, CeilingTracker
from awnet.benchmarks.interference import Interference, Monitor, least_disturbed
from awnet.benchmarks.options import BenchOptions
from awnet.benchmarks.runner import run
from awnet.benchmarks.timing import Times
from awnet.benchmarks.train import TrainBenchOptions, bench_train

CPU = torch.device("cpu")
QUIET, NOISY = Interference(1.0, 1, 0.0, 1), Interference(1.0, 100, 0.0, 1)


class Counters:
    """Fake counters of the process and the system; ``load`` is added at every read of the switches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.switches, self.ticks, self.load = 0, (0, 0), 0
        monkeypatch.setattr(interference, "involuntary_switches", self._involuntary_switches)
        monkeypatch.setattr(interference, "cpu_ticks", lambda: self.ticks)

    def _involuntary_switches(self) -> int:
        self.switches += self.load
        return self.switches


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Counters:
    return Counters(monkeypatch)


def test_a_monitor_reports_the_counts_since_its_creation(counters: Counters) -> None:
    counters.switches, counters.ticks = 50, (10, 1000)
    monitor = Monitor()
    counters.switches, counters.ticks = 57, (30, 1400)
    read = monitor.read()
    assert (read.switches, read.steal) == (7, 0.05)
    assert read.columns == {"switches": "7", "steal": "0.0500", "disturbed": "true"}


@pytest.mark.parametrize(
    ("measured", "disturbed"),
    [
        (Interference(1.0, 10, 0.0, 1), False),
        (Interference(1.0, 11, 0.0, 1), True),
        (Interference(1.0, 11, 0.0, 2), False),  # the limit is per thread
        (Interference(0.001, 3, 0.0, 1), False),  # a few switches are allowed in any measurement
        (Interference(0.001, 4, 0.0, 1), True),
        (Interference(1.0, 0, 0.02, 1), False),
        (Interference(1.0, 0, 0.021, 1), True),
        (Interference(1.0, None, None, 1), False),  # a system without counters
    ],
)
def test_a_measurement_is_disturbed_above_the_limits(measured: Interference, disturbed: bool) -> None:
    assert measured.disturbed is disturbed


def test_systems_without_counters_give_empty_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(interference, "resource", None)
    monkeypatch.setattr(interference, "_PROC_STAT", tmp_path / "nowhere")
    assert Monitor().read().columns == {"switches": "", "steal": "", "disturbed": "false"}
    (tmp_path / "short").write_text("cpu 1 2 3\n")
    monkeypatch.setattr(interference, "_PROC_STAT", tmp_path / "short")
    assert interference.cpu_ticks() is None
    (tmp_path / "short").write_text("cpu  5 6 7 8 9 10 11 12 3 4\n")
    assert interference.cpu_ticks() == (12, 68)


def test_the_least_disturbed_attempt_is_chosen() -> None:
    stolen = Interference(1.0, 0, 0.5, 1)
    assert (
        least_disturbed([{"a": NOISY, "b": QUIET}, {"a": QUIET, "b": QUIET}, {"a": NOISY, "b": NOISY}]) == 1
    )
    assert least_disturbed([{"a": stolen}, {"a": NOISY}]) == 1  # both disturbed: less steal
    assert least_disturbed([{"a": NOISY}, {"a": Interference(1.0, 50, 0.0, 1)}]) == 1


def attempts(counters: Counters, loads: list[int], retries: int) -> tuple[int, Times]:
    """Number of attempts of a measurement whose n-th attempt runs under loads[n], and its result."""
    calls: list[int] = []

    def step() -> None:  # three calls of a warm-up and three turns each
        calls.append(1)
        counters.switches += loads[min((len(calls) - 1) // 4, len(loads) - 1)]

    (times,) = timing.in_turns({"step": step}, rounds=3, retries=retries).values()
    return len(calls) // 4, times


@pytest.mark.parametrize(
    ("loads", "retries", "expected", "disturbed"),
    [
        ([0], 2, 1, False),
        ([100, 0], 2, 2, False),
        ([100, 100, 0], 2, 3, False),
        ([100, 100, 100, 0], 2, 3, True),  # bounded
        ([100, 0], 0, 1, True),
    ],
)
def test_a_disturbed_measurement_is_repeated_a_bounded_number_of_times(
    counters: Counters, loads: list[int], retries: int, expected: int, disturbed: bool
) -> None:
    count, times = attempts(counters, loads, retries)
    assert (count, times.interference.disturbed) == (expected, disturbed)


def test_steps_take_turns_and_each_gets_its_own_switches(counters: Counters) -> None:
    order: list[str] = []

    def step(name: str, switches: int) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            counters.switches += switches

        return call

    times = timing.in_turns({"a": step("a", 0), "b": step("b", 100)}, rounds=3, retries=0)
    assert order == ["a", "b"] * 4
    assert times["a"].interference.switches == 0
    assert times["b"].interference.switches == 300
    assert times["a"].best <= times["a"].p20 <= times["a"].median <= times["a"].p80


def test_the_ceiling_is_the_best_of_several_timings() -> None:
    def ceilings(copy: float, matmul: float, peak: float | None, verified: bool = True) -> Ceilings:
        times = (Times(2 * ms, ms, 3 * ms, ms) for ms in (copy, matmul))
        return Ceilings(next(times), 10**6, next(times), 100, verified, peak)

    timed = iter([ceilings(4.0, 1.0, 2.0), ceilings(2.0, 3.0, None), ceilings(8.0, 2.0, 2.5, verified=False)])
    tracker = CeilingTracker(lambda: next(timed))
    tracker.update()  # too soon after the first
    assert tracker.best.copy.best == 4.0
    tracker.update(force=True)
    assert (tracker.best.copy.best, tracker.best.matmul.best, tracker.best.amx_tflop_s) == (2.0, 1.0, 2.0)
    assert tracker.best.verified
    tracker.update(force=True)
    assert (tracker.best.copy.best, tracker.best.matmul.best, tracker.best.amx_tflop_s) == (2.0, 1.0, 2.5)
    assert not tracker.best.verified
    assert tracker.best.gb_s == 10**6 / 2.0 / 1e6
    assert tracker.best.peak_tflop_s == 2.5  # the tiles' rate is above the product's


def test_rows_of_a_run_carry_the_interference(
    counters: Counters, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counters.load = 100
    path = run(
        BenchOptions(
            smoke=True, device="cpu", cases=("stage4",), modes=("forward",), providers=("static",),
            seconds=0.001, retries=1, threads=1, out=tmp_path,
        )
    )  # fmt: skip
    row = results.read_rows(path)[-1]
    assert (row["case"], row["disturbed"], row["steal"]) == ("stage4", "true", "0.0000")
    assert int(row["switches"]) >= 300
    assert 0 < float(row["ms_best"]) <= float(row["ms_median"])
    assert "static was disturbed: " in capsys.readouterr().out


def test_rows_of_bench_train_carry_the_interference(
    counters: Counters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    times = Times(1.0, 1.0, 1.0, 1.0)
    monkeypatch.setattr(training, "measure_ceilings", lambda *_, tiny: Ceilings(times, 1, times, 100, True))
    counters.load = 100
    path = bench_train(
        TrainBenchOptions(
            model="awnet_tiny", recipe="standard", size=8, batch=4, steps=2, providers=("awnet",), width=0.5,
            device="cpu", threads=1, retries=1, out=tmp_path,
        )
    )  # fmt: skip
    (row,) = results.read_rows(path, results.TRAIN_COLUMNS)
    assert (row["disturbed"], row["steal"], row["model"]) == ("true", "0.0000", "awnet_tiny width=0.5")
    assert int(row["switches"]) == 200  # of two steps
    assert float(row["images_per_second_best"]) >= float(row["images_per_second"])


def test_files_of_earlier_versions_are_read_and_extended(tmp_path: Path) -> None:
    path = tmp_path / "abacus.csv"
    former = [name for name in results.COLUMNS if name not in results.ADDED]
    path.write_text(",".join(former) + "\n" + ",".join(f"value of {name}" for name in former) + "\n")
    (row,) = results.read_rows(path)
    assert row["ms_best"] == row["disturbed"] == ""
    assert row["ms_median"] == "value of ms_median"
    new = dict.fromkeys(results.COLUMNS, "x")
    results.add_rows(path, [new])
    assert results.read_rows(path) == [row, new]
    results.replace_rows(path, [new], [new | {"case": "y"}, new | {"case": "z"}])
    assert [r["case"] for r in results.read_rows(path)] == ["value of case", "y", "z"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "has other columns"),
        (b"", "has other columns"),
        (b"\xff\xfe\x00", "is not a CSV file"),
        (b'date,"' + b"x" * 200_000 + b'"\n', "is not a CSV file"),
    ],
)
def test_a_file_of_another_kind_is_rejected(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "abacus-train.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        results.read_training(tmp_path)


def test_the_amx_benchmark_writes_both_providers_with_the_share_of_the_peak(
    counters: Counters, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(amx, "_peak", lambda: 2.0)
    runs = {"tiles": lambda: None, "library": lambda: None}
    comparison = amx.Comparison("a case", 64, "images/s", 64.0, 1e9, runs)
    tiles, library = amx.measure(comparison, rounds=3, retries=0)
    assert (tiles["provider"], library["provider"]) == ("tiles", "library")
    assert tiles.keys() == set(results.AMX_COLUMNS)
    assert tiles["amx_tflop_s"] == "2"
    assert float(tiles["rate_best"]) >= float(tiles["rate_median"]) > 0
    assert "of the AMX peak; 0 involuntary context switches" in capsys.readouterr().out

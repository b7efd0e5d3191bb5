"""Applies each fault to a copy of the repository and runs the tests that should catch it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .faults import FAULTS, Fault
from .verdict import RESULT

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "mutations.md"
COPIED = ("awnet", "benchmarks", "csrc", "docs", "kernels", "tests")
LANES = ("native", "other")  # each a process and a copy of its own; the first one builds awnet._C
TEST_TIMEOUT = 300  # seconds; a fault may make an endless loop
LONG_TIMEOUT = 1200  # seconds for awnet._C by one job, or for all tests of a lane, on a busy machine


@dataclass(frozen=True)
class Outcome:
    fault: Fault
    caught_by: str | None  # the test that failed by an assertion
    why: str  # where it was not caught: what happened instead


def lane_of(fault: Fault) -> str:
    return "native" if fault.build == "native" else "other"


def faults_of(lane: str, faults: Sequence[Fault] = FAULTS) -> list[Fault]:
    """In the order of files, so that few objects are compiled twice."""
    return sorted((f for f in faults if lane_of(f) == lane), key=lambda f: f.file)


def copy_repository(to: Path) -> Path:
    """The sources without anything built, in ``to``/awnet."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", ".*")
    copy = to / "awnet"
    for folder in COPIED:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    return copy


@contextmanager
def applied(fault: Fault, copy: Path) -> Iterator[None]:
    path = copy / fault.file
    before = path.read_text(encoding="utf-8")
    if before.count(fault.old) != 1:
        raise ValueError(f"{fault.file} has {before.count(fault.old)} times, not once: {fault.old!r}")
    path.write_text(before.replace(fault.old, fault.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def environment(copy: Path, **more: str) -> dict[str, str]:
    # a source of the same size, changed within a second, would be taken for its compiled predecessor
    own = {"PYTHONPATH": f"{copy}{os.pathsep}{copy / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    own |= {"OMP_NUM_THREADS": "1", "MAX_JOBS": "1", "AWNET_BUILD": "cpu"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "AWNET_", "TRITON_"))}
    return inherited | own | more


def run(
    copy: Path, *command: str, timeout: int = TEST_TIMEOUT, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=copy, env=environment(copy, **more), capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


def build(copy: Path, what: str) -> None:
    """Compiles what the tests load, apart from them: a compiler's error is no test's merit."""
    commands = {
        "native": ("setup.py", "-q", "build_ext", "--inplace"),
        "emulator": ("-c", "from support import cuda_on_cpu; cuda_on_cpu.library()"),
    }
    if what:
        done = run(copy, *commands[what], timeout=LONG_TIMEOUT)
        if done.returncode != 0:
            raise RuntimeError(f"the {what} build failed: {(done.stdout + done.stderr)[-2000:]}")


def test(copy: Path, tests: Sequence[str], timeout: int) -> dict[str, Any]:
    """What tests/mutations/verdict.py says of ``tests``; files of tests/kernels/ run in Triton's interpreter."""
    result = copy.parent / "verdict.json"
    result.unlink(missing_ok=True)
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "mutations.verdict"]
    interpreter = {"TRITON_INTERPRET": "1"} if tests[0].startswith("tests/kernels/") else {}
    done = run(
        copy, "-m", "pytest", *options, *tests, timeout=timeout, **{RESULT: str(result)}, **interpreter
    )
    if not result.exists():
        return {"passed": [], "failed": None, "asserted": False, "why": (done.stdout + done.stderr)[-2000:]}
    verdict = json.loads(result.read_text())
    if done.returncode not in (0, 1) and not verdict["why"]:
        verdict["why"] = (done.stdout + done.stderr)[-2000:]
    return verdict


def outcome(fault: Fault, copy: Path) -> Outcome:
    with applied(fault, copy):
        try:
            build(copy, fault.build)
            verdict = test(copy, fault.tests, TEST_TIMEOUT)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return Outcome(fault, None, str(error))
    if verdict["asserted"]:
        return Outcome(fault, str(verdict["failed"]), "")
    return Outcome(fault, None, str(verdict["why"]) or f"survived {len(verdict['passed'])} tests")


def check_the_original(faults: Sequence[Fault], copy: Path) -> None:
    """Without a fault every named test must pass, in one case at least. Raises RuntimeError otherwise."""
    where = run(copy, "-c", "import awnet, awnet.kernels as k; print(awnet.__file__, k.__file__)")
    if where.returncode != 0 or where.stdout.count(str(copy)) != 2:
        raise RuntimeError(f"the copy's modules are not the ones imported: {where.stdout}{where.stderr}")
    for what in sorted({fault.build for fault in faults}):
        build(copy, what)
    named = sorted({name for fault in faults for name in fault.tests})
    for interpreted in (False, True):
        tests = [name for name in named if name.startswith("tests/kernels/") == interpreted]
        if not tests:
            continue
        verdict = test(copy, tests, LONG_TIMEOUT)
        if verdict["failed"] or verdict["why"]:
            raise RuntimeError(f"without any fault: {verdict}")
        if skipped := without_a_pass(tests, verdict["passed"]):
            raise RuntimeError(f"without any fault these tests are skipped: {', '.join(skipped)}")


def without_a_pass(tests: Sequence[str], passed: Sequence[str]) -> list[str]:
    """Those of the named ``tests`` of which no case is among the ``passed`` ones."""
    cases = {*passed, *(name.partition("[")[0] for name in passed)}
    return [name for name in tests if name not in cases]


def outcomes(lane: str, faults: Sequence[Fault] = FAULTS) -> Iterator[Outcome]:
    """What became of each fault of ``lane``, which may be run beside the other one."""
    own = faults_of(lane, faults)
    if not own:
        return
    with tempfile.TemporaryDirectory(prefix="awnet-faults-") as folder:
        copy = copy_repository(Path(folder).resolve())
        check_the_original(own, copy)
        for fault in own:
            yield outcome(fault, copy)


def listed() -> dict[tuple[str, str], str]:
    """By name and file, the test that docs/mutations.md says has caught a fault."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    rows = re.findall(r"^\| (.+) \| `([\w./]+)` \| `(\w+)` in `([\w./]+)` \|$", text, re.MULTILINE)
    return {(name, file): f"{tests}::{test}" for name, file, test, tests in rows}


def page(run: Sequence[Outcome]) -> str:
    """docs/mutations.md with these outcomes; what was not run stays as it is listed."""
    before, now = listed(), {one.fault: one for one in run}
    found = [now.get(f) or Outcome(f, before.get((f.name, f.file)), "never run") for f in FAULTS]
    lines = [
        "# Seeded faults",
        "",
        "Generated by `make mutations`. Each fault is put into a copy of the repository, alone; the copy is",
        "rebuilt, and the tests named for the fault in `tests/mutations/faults.py` run. A fault is caught when an",
        "assertion fails. A compiler's error, an import that fails or an exception do not count. Without a fault",
        "all of these tests pass. `make test-all` repeats it.",
        "",
        f"{sum(one.caught_by is not None for one in found)} of {len(found)} are caught.",
        "",
        "| fault | in | caught by |",
        "|---|---|---|",
    ]
    for one in found:
        by = "**nothing**"
        if one.caught_by is not None:
            file, _, name = one.caught_by.partition("[")[0].partition("::")
            by = f"`{name}` in `{file}`"
        lines.append(f"| {one.fault.name} | `{one.fault.file}` | {by} |")
    return "\n".join([*lines, ""])

"""Every Triton kernel is compiled for sm_80 and sm_90 without a GPU; the rules that can fail do fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESOURCES = ROOT / "kernels" / "resources.json"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def ahead(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The check in a process of its own: the interpreter, if some test has it, cannot share one with it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "awnet.kernels.ahead", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_a_chosen_part_compiles_within_the_committed_figures() -> None:
    done = ahead("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 with a problem" in done.stdout
    assert "not compared" not in done.stdout
    for kernel in (
        "apply_kernel",
        "statistics_kernel",
        "reduce_kernel",
        "propagate_kernel",
        "eval_backward_kernel",
        "sign_step_kernel",
    ):
        assert f"{kernel} | sm_80" in done.stdout
        assert f"{kernel} | sm_90" in done.stdout
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in done.stdout.splitlines()]
    shared = {row[0]: int(row[4]) for row in rows if len(row) > 5 and row[4].isdigit()}
    masks = [name for name in shared if "mask" in name and name.startswith(("apply/", "propagate/"))]
    # threads hold as many values of a bfloat16 image as of its mask: neither changes its layout
    assert [shared[name] for name in masks if "bfloat16" in name and "training" not in name] == [0] * 6


BROKEN = """
import sys, torch, triton, triton.language as tl
from awnet.kernels import ahead
from awnet.kernels.launch import Case, launch

@triton.jit
def spilling_kernel(out, x, N: tl.constexpr):
    places = tl.arange(0, N)
    v = tl.load(x + places)  # more values than a thread has registers, all needed twice
    tl.store(out + places, v / tl.sum(v))

@triton.jit
def dot_kernel(out, x, N: tl.constexpr, PRECISION: tl.constexpr):
    places = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    v = tl.load(x + places)
    tl.store(out + places, tl.dot(v, v, input_precision=PRECISION))

x = torch.empty(1 << 16, device="meta")
cases = {
    "spill": Case("spill", lambda: launch(spilling_kernel, 1, x, x, N=8192, warps=1)),
    "lost": Case("lost", lambda: launch(dot_kernel, 1, x, x, N=32, PRECISION="ieee"), instruction="wgmma"),
    "kept": Case("kept", lambda: launch(dot_kernel, 1, x, x, N=32, PRECISION="tf32"), instruction="mma"),
}
for name, case in cases.items():
    (result,) = ahead.check([case], [90])
    print(name, "|", result.problem)
(result,) = ahead.check([cases["kept"]], [90], {"kept: dot_kernel sm_90": 1})
print("grown |", result.problem)
(result,) = ahead.check([cases["kept"]], [90], {"kept: dot_kernel sm_90": 255})
print("within |", result.problem)
"""


def test_each_rule_of_the_compiled_kernels_can_fail(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    problems = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert problems["spill"].startswith("spills: ")
    assert problems["lost"] == "has no wgmma instruction"
    assert problems["kept"] == problems["within"] == "None"
    assert "the committed figure is 1" in problems["grown"]


@pytest.mark.parametrize(
    ("arguments", "interpreted", "message"),
    [
        (["--quick", "--update"], "0", "--update needs all cases"),
        (["--only", "nonsense"], "0", "no case name contains 'nonsense'"),
        ([], "1", "the interpreter and the compiler cannot share a process"),
    ],
)
def test_ahead_rejects_bad_options(
    arguments: list[str],
    interpreted: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from awnet.kernels.ahead import main

    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_every_kernel_compiles_within_the_committed_figures() -> None:
    done = ahead()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not compared" not in done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_under_the_oldest_triton(tmp_path: Path) -> None:
    version = "3.6.0"
    assert version in json.loads(RESOURCES.read_text())
    installed = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(tmp_path),
            f"triton=={version}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode != 0:
        pytest.skip(f"triton {version} cannot be fetched: {installed.stderr.strip().splitlines()[-1]}")
    done = ahead(path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Triton {version}" in done.stdout
    assert "not compared" not in done.stdout

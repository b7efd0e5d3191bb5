"""What the Triton backend says where it cannot run. What it computes: tests/kernels/."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from awnet import ops
from awnet.ops.backends import triton as triton_backend

X, W = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1)

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")


def refusal(x: torch.Tensor = X) -> str:
    with pytest.raises(ValueError, match="backend 'triton' cannot run this call") as caught:
        ops.filter_scaled_conv2d(x, W.to(x), None, backend="triton")
    return str(caught.value)


@without_gpu
def test_triton_without_a_gpu_reports_the_reason_and_the_alternatives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    runs = ops.explain(ops.filter_scaled_conv2d, X, W, None).backend
    message = refusal()
    assert "it needs a CUDA device, this machine has none and the input is on cpu" in message
    assert f"; {runs!r} can run it" in message


def test_triton_that_is_not_installed_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_installed", lambda: False)
    assert "Triton is not installed (pip install triton" in refusal()


@pytest.fixture
def invented_gpu(monkeypatch: pytest.MonkeyPatch):
    """A machine with one GPU, of which nothing is used but its name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    triton_backend.device_obstacle.cache_clear()
    yield
    triton_backend.device_obstacle.cache_clear()


def test_an_input_on_a_cpu_or_an_old_gpu_is_the_reason(
    invented_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_backend.obstacle(X) == "it runs on CUDA devices, and the input is on cpu"
    old = triton_backend.device_obstacle(torch.device("cuda:0"))
    assert old == "it needs a GPU of compute capability 8.0 or more, and cuda:0 has 7.5"


def test_float64_is_refused_in_the_interpreter_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.obstacle(X) is None
    assert "it has no float64 (use eager or reference)" in refusal(X.double())


def test_triton_is_imported_by_its_first_call_only() -> None:
    code = """
import sys, torch, awnet
x, w = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1)
awnet.functional.filter_scaled_conv2d(x, w, None, backend="eager")
print(awnet.explain(awnet.functional.filter_scaled_conv2d, x, w, None))
assert "awnet.kernels.passes" not in sys.modules
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "triton: not used, " in done.stdout or "triton: runs this call" in done.stdout

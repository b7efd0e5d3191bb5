"""What every test shares: GPU tests skip with a reason where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from support.launch_path import Launches, launch_path

# the same examples each time, so that a failure is due to a change and not to the draw; the slow fuzz draws new ones
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

# the tests check the kernels themselves; tests/ops/test_self_check.py runs the self-check
os.environ.setdefault("AWNET_SELF_CHECK", "0")

# Triton kernels need a CUDA device or the interpreter; tests/test_triton_kernels_in_interpreter.py starts the latter
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore = ["kernels"]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On networks this small a second thread costs more than it gains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def triton_launches() -> Iterator[Launches]:
    """The ``triton`` backend runs on CPU tensors; its kernels are compiled for sm_90, counted, and not run."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter and the compiler cannot share a process")
    pytest.importorskip("triton")
    with launch_path() as launches:
        yield launches


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are saved without figures, which take seconds."""
    monkeypatch.setattr("awnet.evaluation.figures.draw", lambda *arguments: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

"""Runs tests/kernels/ in two separate processes, under Triton's interpreter (tests/support/interpreter.py)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = sorted((Path(__file__).parent / "kernels").glob("test_*.py"))
# two, of about the same length: each process spends seconds on imports
PARTS = {
    "convolutions": [path for path in FILES if path.stem == "test_conv"],
    "others": [path for path in FILES if path.stem != "test_conv"],
}

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="with a CUDA device tests/kernels/ is collected directly"
    ),
]


@pytest.mark.parametrize("part", PARTS)
def test_tests_of_the_kernels_pass_in_tritons_interpreter(part: str, request: pytest.FixtureRequest) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-m", request.config.getoption("markexpr")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, PARTS[part])],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=False,
    )
    # 5: every test was deselected
    assert done.returncode in (0, 5), done.stdout + done.stderr

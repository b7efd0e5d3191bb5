"""The self-check of the Triton backend with its own kernels, and with faults planted in them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interpreter import DEVICE
from torch import Tensor

from awnet import ops
from awnet.ops import self_check
from awnet.ops.backends import triton as triton_backend

passes = importlib.import_module("awnet.kernels.passes")
sign_step = importlib.import_module("awnet.kernels.sign_step")


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("AWNET_SELF_CHECK", "always")
    self_check.forget()
    yield
    self_check.forget()


@pytest.mark.slow  # ninety launches in the interpreter
def test_the_self_check_passes_for_triton() -> None:
    result, stored = self_check.check(triton_backend.CHECKED, DEVICE)
    assert result.reason is None
    assert stored
    assert result.cases == 67


def wrong_statistics(u: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    mean, m2 = original_statistics(u, config)
    m2[0, 0] += 1
    return mean, m2


original_statistics = passes.statistics


def raising(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


@pytest.mark.parametrize(
    ("module", "name", "fault", "reason"),
    [
        (passes, "statistics", wrong_statistics, "statistics, NCHW, float32, split: wrong by 1"),
        (passes, "launch", raising, "statistics, NCHW, float32, split: RuntimeError"),
        (sign_step, "launch", raising, "no kernel can be compiled and launched here"),
    ],
)
def test_a_planted_fault_is_one_warning_and_the_next_backend(
    module: Any, name: str, fault: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, fault)
    x, weight = torch.ones(1, 2, 3, 3, device=DEVICE), torch.ones(2, 2, 1, 1, device=DEVICE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y = ops.filter_scaled_conv2d(x, weight, None)
    assert torch.equal(y, torch.full_like(y, 2))
    messages = [str(w.message) for w in caught if "'triton'" in str(w.message)]
    assert len(messages) == 1
    assert reason in messages[0]
    assert reason in ops.explain(ops.filter_scaled_conv2d, x, weight, None).others["triton"]
    with pytest.raises(ValueError, match="'triton' cannot run this call"):
        ops.filter_scaled_conv2d(x, weight, None, backend="triton")

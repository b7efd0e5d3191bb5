"""The backends that run on this CPU, and a random layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from awnet.ops.backends import native
from awnet.ops.dispatch import BACKENDS

from .random_layers import (
    Layer,
    build,
)

NOT_BUILT = native.load()


built = pytest.mark.skipif(NOT_BUILT is not None, reason=str(NOT_BUILT))


ON_CPU = [b.name for b in BACKENDS if b.name not in ("reference", "triton", "cuda")]


LAYER_BACKENDS = [pytest.param(name, marks=built if name == "cpp" else ()) for name in ON_CPU]


def example(training: bool, seed: int = 0, **changes: Any) -> Layer:
    return build(torch.Generator().manual_seed(seed), training, **changes)

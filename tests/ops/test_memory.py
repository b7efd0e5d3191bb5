"""What a layer keeps for its backward, to the byte, and the page that states it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from awnet.benchmarks import memory

from awnet.ops import aw_conv2d
from awnet.ops.args import ACTIVATIONS
from awnet.ops.backends import native

BACKENDS = ["eager", "cpp"]
B, C, SIZE = 6, 8, 5
ELEMENTS = B * C * SIZE * SIZE


def expected(mode: memory.Mode, item: int, activation: str | None) -> int:
    """u and the mask in an attack; u, y and the statistics in training; the slope in the place of y and mask."""
    if mode == "training":
        # mean and M2 of each sample and channel; mean and variance of each branch, and their counts
        statistics = 4 * (2 * B * C + 2 * 2 * C + 2)
        return ELEMENTS * item * (1 if activation is None else 2) + statistics
    mask = {None: 0, "relu": ELEMENTS}.get(activation, ELEMENTS * item)
    return mask + (ELEMENTS * item if mode == "attack" else 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", memory.MODES)
def test_a_layer_saves_the_documented_bytes(mode: memory.Mode, dtype: torch.dtype, backend: str) -> None:
    if backend == "cpp" and native.load() is not None:
        pytest.skip(str(native.load()))
    layer = partial(aw_conv2d, backend=backend)
    devices = ["cpu", "meta"] if backend == "eager" else ["cpu"]
    for device in devices:
        for residual in (False, True):
            for activation in ACTIVATIONS:
                kept = memory.saved_by_layer(
                    layer, mode, B, C, SIZE, dtype, residual=residual, activation=activation, device=device
                )
                want = expected(mode, dtype.itemsize, activation)
                if mode != "training" and (backend, device) == ("eager", "cpu"):
                    want += 4 * B * C  # the scale, which an operator computes again
                # the library hands an empty tensor out for what is not kept; it has no bytes
                assert kept == want, (device, residual, activation)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_saved_without_a_required_gradient(backend: str) -> None:
    if backend == "cpp" and native.load() is not None:
        pytest.skip(str(native.load()))
    with torch.no_grad():
        layer = partial(aw_conv2d, backend=backend)
        assert memory.saved_by_layer(layer, "attack", B, C, SIZE, torch.float32, device="cpu") == 0


def test_a_shared_storage_counts_once_and_arguments_do_not() -> None:
    x, w = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    assert memory.saved_bytes(lambda: x * w, []) == 80
    assert memory.saved_bytes(lambda: x * w, [w]) == 40
    assert memory.saved_bytes(lambda: (x * x)[:5] * x[:5], []) == 80  # x, and x² of which a half is saved


def test_the_memory_page_equals_the_measurement() -> None:
    assert memory.PAGE.read_text(encoding="utf-8") == memory.page()

"""A frozen network on the Triton backend: all coefficients in one launch, affine layers, the sign step."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import DEVICE
from torch import Tensor

from awnet import ops
from awnet.attacks import PGD
from awnet.models import create_model
from awnet.ops import use_backend


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("dynamic", [0, 5, 8])
def test_network_coefficients_and_gradients_equal_float64(dynamic: int) -> None:
    widths, batch = (5, 3, 4), 6
    tables = rand(4, 2, 12, seed=0)
    tables[3].abs_().add_(0.1)
    p = rand(batch, seed=1).sigmoid().requires_grad_()
    filter_scale = rand(batch, dynamic, seed=2).requires_grad_() if dynamic else None
    leaves = [p] if filter_scale is None else [p, filter_scale]
    by_backend: dict[str, tuple[list[Tensor], tuple[Tensor, ...]]] = {}
    for backend in ("triton", "eager"):
        pairs = ops.network_coefficients(tables, widths, filter_scale, p, eps=1e-5, backend=backend)
        flat = [x for pair in pairs for x in pair]
        upstream = [rand(*x.shape, seed=i) for i, x in enumerate(flat)]
        by_backend[backend] = flat, torch.autograd.grad(flat, leaves, upstream)
    # float32 on both sides, whose reciprocal square roots differ in the last bits
    for got, expected in zip(by_backend["triton"][0], by_backend["eager"][0], strict=True):
        assert got.is_contiguous()
        assert error(got, expected) < 1e-6
    for got, expected in zip(by_backend["triton"][1], by_backend["eager"][1], strict=True):
        assert error(got, expected) < 1e-6


@pytest.mark.parametrize("residual", [True, False])
def test_affine_conv2d_equals_the_reference(residual: bool) -> None:
    tensors = {
        "input": rand(3, 4, 6, 5, seed=0),
        "weight": rand(6, 4, 3, 3, seed=1),
        "scale": rand(3, 6, seed=2),
        "shift": rand(3, 6, seed=3),
    }
    if residual:
        tensors["residual"] = rand(3, 6, 6, 5, seed=4)
    by_backend = {}
    for backend in ("triton", "eager"):
        leaves = {n: t.clone().requires_grad_(n != "weight") for n, t in tensors.items()}
        y = ops.affine_conv2d(**leaves, padding=1, backend=backend)
        differentiable = [t for t in leaves.values() if t.requires_grad]
        by_backend[backend] = (y, *torch.autograd.grad(y, differentiable, rand(*y.shape, seed=5)))
    for got, expected in zip(by_backend["triton"], by_backend["eager"], strict=True):
        assert error(got, expected) < 1e-5  # sums of 108 and of 30 products


def test_an_attack_on_a_frozen_network_equals_eager() -> None:
    torch.manual_seed(0)
    model = create_model("awnet_tiny", num_classes=3, in_channels=1, router_widths=[4])
    with torch.no_grad():
        model.router.signal_heads.weight.normal_(std=0.1)
    model = model.to(DEVICE)
    x = rand(2, 1, 4, 4, seed=0).sigmoid()
    y = torch.tensor([0, 2], device=DEVICE)
    size = {"eps": 0.1, "step_size": 0.03, "steps": 2}
    by_backend = {}
    for backend in ("triton", "eager"):
        with use_backend(backend):
            by_backend[backend] = {
                dtype: PGD(model.inference_copy(dtype), **size)(x, y)
                for dtype in (torch.float32, torch.float16)
            }
    for dtype, least in ((torch.float32, 1.0), (torch.float16, 0.9)):  # a sign turns where a gradient is tiny
        same = (by_backend["triton"][dtype] - by_backend["eager"][dtype]).abs() < 1e-6
        assert same.float().mean() >= least


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float16, 1), (torch.bfloat16, 1), (torch.float32, 8)], ids=str
)
def test_a_frozen_network_saves_one_bit_of_mask_per_element_of_16_bit_images(
    dtype: torch.dtype, bits: int
) -> None:
    layer = ops.NetworkLayer(
        ops.AffineConvolution(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, activation="relu"),
        -1, -1, True,
    )  # fmt: skip
    x = rand(2, 8, 4, 4, seed=0).to(dtype).requires_grad_()
    weight, table = rand(8, 8, 3, 3, seed=1).to(dtype), rand(2, 8, seed=2)
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with use_backend("triton"), hooks:
        mean = ops.affine_network(x, [weight], [(table, table)], [layer])
    assert mean[0].requires_grad
    masks = [t for t in saved if t.dtype in (torch.bool, torch.uint8)]
    assert [8 * t.numel() * t.element_size() for t in masks] == [bits * 2 * 8 * 4 * 4]


@pytest.mark.slow  # opcheck imports seconds of test helpers
def test_the_operators_have_correct_schemas_and_fake_kernels() -> None:
    tables = rand(4, 2, 12, seed=0).abs_().add_(0.1)
    filter_scale, p, grads = rand(6, 8, seed=1), rand(6, seed=2).sigmoid(), rand(6, 12, seed=3)
    x = rand(2, 3, 4, 5, seed=4).contiguous(memory_format=torch.channels_last)
    gap = rand(2, 3, 4, 10, seed=5)[..., ::2]
    for name, arguments in (
        ("network_coefficients_triton", (filter_scale, p, tables, [5, 3, 4], 1e-5)),
        ("network_gradients_triton", (grads, grads, filter_scale, p, tables, 1e-5, [True, True])),
        ("network_gradients_triton", (grads, grads, None, p, tables, 1e-5, [False, True])),
        ("sign_step_triton", (x, x, x, 0.1, 0.2, None)),
        ("sign_step_triton", (gap, x, gap, 0.1, 0.2, torch.empty_like(x, dtype=torch.float16))),
    ):
        operator = getattr(torch.ops.awnet, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))

"""The attack's step on Triton against the same step in torch."""

from __future__ import annotations

import pytest
import torch
from awnet.kernels.sign_step import sign_step
from support.interpreter import DEVICE, Guarded

HOW = {"tile": 64, "warps": 4}
EPS, STEP = 8 / 255, 2 / 255


def images(shape: tuple[int, ...], last: bool = False) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator).round(decimals=1)  # 0 and 1 occur
    x_adv = (x + EPS * (2 * torch.rand(shape, generator=generator) - 1)).clamp(0, 1)
    grad = torch.randn(shape, generator=generator)
    grad[torch.rand(shape, generator=generator) < 0.2] = 0
    actual = [v.to(DEVICE) for v in (x_adv, grad, x)]
    return tuple(v.contiguous(memory_format=torch.channels_last) if last else v for v in actual)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sign_step_equals_torchs_bit_for_bit(grad_dtype: torch.dtype, last: bool) -> None:
    guarded = Guarded()
    x_adv, grad, x = (guarded.input(v) for v in images((2, 3, 7, 5), last))
    grad = guarded.input(grad.to(grad_dtype))
    got = sign_step(x_adv, grad, x, STEP, EPS, HOW, out=guarded.output(x_adv))
    low, high = (x - EPS).clamp(min=0), (x + EPS).clamp(max=1)
    step = torch.tensor(STEP, device=DEVICE)
    expected = torch.clamp(x_adv + step * grad.float().sign(), low, high)
    # ε and the step come to the kernel in float32, to torch's scalar operators in float64
    assert torch.allclose(got, expected, rtol=0, atol=2.0**-23)
    assert bool((got[grad == 0] - x_adv[grad == 0]).abs().max() < 2.0**-23)
    assert float(got.min()) >= 0
    assert float(got.max()) <= 1
    assert float((got - x).abs().max()) <= EPS + 2.0**-24
    guarded.check()


def test_sign_step_works_in_place_and_writes_a_copy_in_another_dtype() -> None:
    x_adv, grad, x = images((2, 3, 4, 5))
    expected = sign_step(x_adv, grad, x, STEP, EPS, HOW)
    guarded = Guarded()
    cast = guarded.output(x_adv.half())
    got = sign_step(x_adv, grad, x, STEP, EPS, HOW, out=x_adv, cast=cast)
    assert got is x_adv
    assert torch.equal(got, expected)
    assert torch.equal(cast, expected.half())
    guarded.check()


def test_a_broken_gradient_moves_nothing_as_in_torch() -> None:
    x = torch.full((3,), 0.5, device=DEVICE)
    grad = torch.tensor([float("nan"), float("inf"), -float("inf")], device=DEVICE)
    got = sign_step(x, grad, x, STEP, EPS, HOW)
    assert torch.allclose(got, 0.5 + STEP * grad.sign())


def test_sign_step_refuses_tensors_that_do_not_fit() -> None:
    x = torch.rand(2, 3, 4, 5, device=DEVICE)
    with pytest.raises(ValueError, match=r"grad must have x_adv's shape \[2, 3, 4, 5\]"):
        sign_step(x, x[:1], x, STEP, EPS, HOW)
    with pytest.raises(ValueError, match=r"grad must have x_adv's shape .* strides"):
        sign_step(x, x.contiguous(memory_format=torch.channels_last), x, STEP, EPS, HOW)
    part = x[:, :2]
    with pytest.raises(ValueError, match="out must have x_adv's shape"):
        sign_step(part, part, part, STEP, EPS, HOW)
    with pytest.raises(ValueError, match="x_adv must be dense"):
        sign_step(part, part, part, STEP, EPS, HOW, out=part)
    assert sign_step(x[:0], x[:0], x[:0], STEP, EPS, HOW).shape == (0, 3, 4, 5)

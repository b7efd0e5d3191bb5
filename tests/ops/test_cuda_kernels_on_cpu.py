"""The CUDA kernels, run on the CPU by tests/support/cuda_emulator/, against plain torch and the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.cuda_on_cpu import CudaOnCpu, compiler
from support.random_layers import Layer, error, has_single_value, layers, run
from torch import Tensor

from awnet import ops
from awnet.ops import autograd
from awnet.ops.args import ACTIVATIONS, RELU, EvalBackwardArgs, Needs
from awnet.ops.backends.base import Passes
from awnet.ops.coefficients import Mix, Norm, Propagation, Reduced, SampleStats
from awnet.ops.functional import aw_conv2d, layer_args

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the emulated kernels")

EAGER = Passes()
PASSES = CudaOnCpu()
few = settings(max_examples=40, deadline=None)

# Planes by a part of a warp, a warp, a block and several blocks; vectors that fit, straddle planes, are cut off.
SHAPES = [
    (2, 3, 1, 1), (3, 5, 2, 3), (2, 8, 4, 4), (5, 4, 7, 7), (1, 24, 5, 9), (2, 40, 8, 8), (3, 64, 4, 4),
    (2, 3, 32, 33), (2, 2, 64, 48), (1, 2, 96, 97), (1, 1, 192, 180), (2, 300, 3, 3), (9, 1, 3, 5), (1, 8, 60, 40),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def images(shape: tuple[int, ...], dtype: torch.dtype, last: bool, offset: bool, count: int) -> list[Tensor]:
    """Random images that ``dtype`` holds exactly, all in one layout, starting off 16 bytes where ``offset``."""
    generator = torch.Generator().manual_seed(sum(shape))
    tensors = []
    for _ in range(count):
        size = torch.Size(shape).numel()
        flat = torch.empty(size + 1, dtype=dtype)[1:] if offset else torch.empty(size, dtype=dtype)
        flat.copy_(torch.randn(size, generator=generator))
        batch, channels, height, width = shape
        tensors.append(
            flat.view(batch, height, width, channels).permute(0, 3, 1, 2) if last else flat.view(shape)
        )
    return tensors


def tables(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape[:2], generator=generator) for _ in range(count)]


def everything(passes: object, operands: list[Tensor], entries: list[Tensor]) -> dict[str, Tensor]:
    """Every pass with every option once."""
    u, grad, other = operands
    y = torch.empty_like(other).copy_(other.relu())
    scale, shift, by_input = entries
    results: dict[str, Tensor] = {}
    results["mean"], results["m2"] = passes.statistics(u)
    for residual in (None, other):
        for relu, keep_mask in ((False, False), (True, False), (True, True)):
            name = f"apply {residual is not None} {relu} {keep_mask}"
            arguments = (scale, shift, residual, relu, keep_mask)
            results[name], mask = passes.apply(u, *arguments, False)
            # the mask is of y as it is stored, and y may take u's place
            assert torch.equal(mask, ~(results[name] <= 0)) if keep_mask else mask.numel() == 0
            ours = u.new_empty(u.numel() + 1)[1:] if u.data_ptr() % 16 else u.new_empty(u.numel())
            ours = ours.as_strided(u.shape, u.stride()).copy_(u)
            again, _ = passes.apply(ours, *arguments, True)
            assert torch.equal(again, results[name])
            assert again.data_ptr() == ours.data_ptr() or u.dtype != again.dtype
    for code in range(RELU + 1, len(ACTIVATIONS)):
        for residual in (None, other):
            name = f"apply {residual is not None} {ACTIVATIONS[code]}"
            results[name], slope = passes.apply(u, scale, shift, residual, code, True, False)
            results[f"{name} slope"] = slope
            again, nothing = passes.apply(u, scale, shift, residual, code, False, False)
            assert torch.equal(again, results[name])
            assert nothing.numel() == 0
    masks = (("none", None, None), ("y", y, None), ("mask", y > 0, None), ("slope", None, y))
    for mask_name, relu_mask, slope in masks:
        sums = passes.reduce(grad, u, shift, relu_mask, slope)
        results[f"g1 {mask_name}"], results[f"gc {mask_name}"] = sums
        for propagation in (Propagation(scale, None, None), Propagation(scale, by_input, shift)):
            for residual in (False, True):
                name = f"propagate {mask_name} {propagation.by_input is None} {residual}"
                about = (None, None) if propagation.by_input is None else (u, shift)
                results[name], d_residual = passes.propagate(
                    grad, *about, relu_mask, propagation, residual, slope
                )
                if residual:
                    results[f"{name} residual"] = d_residual
        for joined in (False, True):
            further = (scale, other, by_input) if joined else (scale, None, None)
            for sums in ("none", "centered", "about zero"):
                flags = joined, sums != "none", sums == "centered"
                saved = None if sums == "none" else u, relu_mask, None
                name = f"eval_backward {mask_name} {joined} {sums}"
                args = EvalBackwardArgs(grad, *further, *saved, *flags, slope)
                d_u, d_residual, reduced = passes.eval_backward(args)
                results |= {name: d_u} | ({f"{name} residual": d_residual} if joined else {})
                results |= {f"{name} {i}": x for i, x in enumerate(reduced or ()) if x is not None}
    d_u, _, reduced = passes.eval_backward(EvalBackwardArgs(grad, scale, u=u, shift=shift, sums=True))
    results |= {"eval_backward from u": d_u, "from u g1": reduced.g1, "from u gc": reduced.gc}
    return results


def on_emulator(shape: tuple[int, ...], dtype: torch.dtype, last: bool, offset: bool) -> dict[str, Tensor]:
    PASSES.misaligned = offset
    return everything(PASSES, images(shape, dtype, last, offset, 3), tables(shape, 3))


def expected(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> dict[str, Tensor]:
    operands = [x.double() for x in images(shape, dtype, last, False, 3)]
    return everything(EAGER, operands, [x.double() for x in tables(shape, 3)])


@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_every_pass_equals_eager_in_every_shape(dtype: torch.dtype, last: bool) -> None:
    for shape in SHAPES:
        want = expected(shape, dtype, last)
        for offset in (False, True):
            got = on_emulator(shape, dtype, last, offset)
            assert got.keys() == want.keys()
            for name, value in want.items():
                # sums are float32 whatever the images are; an image rounds once to its own dtype
                limit = 1e-5 if value.dim() == 2 else torch.finfo(dtype).eps
                # a sum that nearly cancels is compared with the sum of its terms' sizes
                size = max(float(value.norm()), 0.05 * value.numel() ** 0.5 * shape[2] * shape[3])
                size = size if value.dim() == 2 else float(value.norm())
                assert float((got[name].double() - value).norm()) <= limit * size, (name, shape, offset)
                assert got[name].is_contiguous(
                    memory_format=torch.channels_last
                    if last and value.dim() == 4
                    else torch.contiguous_format
                )


@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
def test_the_order_of_the_threads_changes_no_bit(last: bool) -> None:
    for shape in SHAPES:
        first = on_emulator(shape, torch.bfloat16, last, False)
        PASSES.backwards = True
        try:
            second = on_emulator(shape, torch.bfloat16, last, False)
        finally:
            PASSES.backwards = False
        for name, value in first.items():
            assert torch.equal(value, second[name]), (name, shape)


@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("shape", [(4, 5, 7, 7), (3, 16, 8, 8), (2, 8, 64, 40)])
def test_a_samples_sums_are_the_same_bits_in_every_batch(shape: tuple[int, ...], last: bool) -> None:
    PASSES.misaligned = False
    u, grad = images(shape, torch.float32, last, False, 2)
    (center,) = tables(shape, 1)
    together = (*PASSES.statistics(u), *PASSES.reduce(grad, u, center, None))
    for b in range(shape[0]):
        one = [x[b : b + 1].clone(memory_format=torch.preserve_format) for x in (u, grad, center)]
        alone = (*PASSES.statistics(one[0]), *PASSES.reduce(one[1], one[0], one[2], None))
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[b], part[0])


def test_statistics_do_not_cancel_far_from_zero() -> None:
    PASSES.misaligned = False
    for last in (False, True):
        for shape in ((2, 8, 8, 8), (1, 8, 96, 100)):
            (u,) = images(shape, torch.float32, last, False, 1)
            u = (u + 1000).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            mean, m2 = PASSES.statistics(u)
            wide = EAGER.statistics(u.double())
            assert error(mean, wide[0]) < 1e-6
            # the spread of values near 1000 keeps three digits less than they have; E[x²] − μ² would keep none
            assert error(m2, wide[1]) < 1e-3


@pytest.mark.parametrize("shape", [(1, 1, 1023, 1025), (1, 3, 255, 512)], ids=["planes", "rows"])
def test_the_error_of_a_sum_does_not_grow_with_the_parts_of_an_image(shape: tuple[int, ...]) -> None:
    # Sums of equal parts: added up one after another in float32, hundreds of roundings have the same sign.
    PASSES.misaligned = False
    pixels = shape[2] * shape[3]
    generator = torch.Generator().manual_seed(0)
    period = torch.rand(256, generator=generator) + 0.25
    plane = period.repeat(pixels // 256 + 1)[:pixels].view(shape[2:])
    grad = plane.expand(shape).contiguous(
        memory_format=torch.contiguous_format if shape[1] == 1 else torch.channels_last
    )
    u, center = grad.clone(memory_format=torch.preserve_format), torch.zeros(shape[:2])
    # A thread adds up 8 values, as no vector fits these shapes, and a tree of 8 levels the threads' sums; four
    # more roundings are of a term and of the result.
    bound = (8 + 8 + 4) * 2.0**-24
    for name, got, want in (
        ("sums", PASSES.reduce(grad, u, center, None), EAGER.reduce(grad.double(), u.double(), center, None)),
        ("statistics", PASSES.statistics(u), EAGER.statistics(u.double())),
    ):
        for ours, truth in zip(got, want, strict=True):
            assert ((ours - truth).abs() <= bound * truth).all(), (name, (ours - truth) / truth * 2**24)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_mask_from_u_is_that_of_apply_in_every_bit(dtype: torch.dtype) -> None:
    PASSES.misaligned = False
    u = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8).to(dtype)
    u[0, 0, 0, 0] = float("nan")
    pixel = float(u[0, 0, 2, 3])
    tables = ((1, 0), (-1, 0.5), (2.0**-140, 0), (1 / 3, -pixel / 3), (0, 0), (float("nan"), 0))
    for a, b in tables:  # y near 0, of both signs, and so small that it is stored as 0
        scale, shift = (torch.full((1, 1), float(x)) for x in (a, b))
        _, mask = PASSES.apply(u, scale, shift, None, True, True, False)
        ones = torch.ones_like(u)
        _, g, _ = PASSES.eval_backward(EvalBackwardArgs(ones, scale, u=u, shift=shift, residual=True))
        assert torch.equal(g, mask.to(dtype)), (a, b)


def test_nan_passes_as_torchs_relu_lets_it() -> None:
    PASSES.misaligned = False
    u = torch.full((1, 4, 2, 2), float("nan"))
    ones = torch.ones(1, 4)
    y, mask = PASSES.apply(u, ones, ones, None, True, True, False)
    assert y.isnan().all()
    assert mask.all()


# --- the whole layer around them

BACKEND = autograd.PassesBackend("cuda_on_cpu", PASSES)


def on_kernels(**arguments: object) -> Tensor:
    """``ops.aw_conv2d`` with the emulated kernels in place of the eager passes."""
    return BACKEND.run(layer_args(aw_conv2d, **arguments))


@few
@given(layers())
def test_a_layer_of_any_shape_equals_the_reference(layer: Layer) -> None:
    conv = {k: layer.options[k] for k in ("stride", "padding", "dilation", "groups")}
    u = ops.filter_scaled_conv2d(
        layer.tensors["input"], layer.tensors["weight"], None, **conv, backend="reference"
    )
    # float32 against float64: keep away from branches of two or three values, where 1/σ³ magnifies any rounding
    assume(not has_single_value(layer))
    assume(not layer.options["training"] or u[0, 0].numel() * len(u) >= 40)
    PASSES.misaligned = False
    layer = layer.rounded(torch.float32)
    want, got = run(layer, backend="reference"), run(layer.to(torch.float32), function=on_kernels)
    plain = run(layer.to(torch.float32), backend="eager")
    assert error(got.output, want.output) <= 2e-5
    assert got.grads.keys() == want.grads.keys()
    for name, value in want.grads.items():
        # where a gradient nearly cancels (a filter of one weight under batch statistics, a branch of one sample),
        # float32 has few digits whoever computes
        assert error(got.grads[name], value) <= max(2e-4, 8 * error(plain.grads[name], value)), name
    for name, value in want.running.items():
        assert error(got.running[name], value) <= 2e-5, name


def algebra_inputs(batch: int, channels: int, rows: int, groups: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "filter_scale": normal(batch, channels), "g1": normal(batch, channels), "gc": normal(batch, channels),
        "mean": normal(batch, channels), "m2": normal(batch, channels).square() * 9,
        "weight": normal(rows, channels), "bias": normal(rows, channels),
        "running_mean": normal(groups, channels), "running_var": normal(groups, channels).square() + 0.5,
        "p": torch.rand(batch, generator=generator), "is_clean": torch.rand(batch, generator=generator) < 0.4,
    }  # fmt: skip


TRAINING_D_OMEGA = (2 + 2 * 4 + 3 + 2 + 3, 2 + 2 * 4 + 3 + 2 + 3 + 7)  # its places among the results


@few
@given(
    st.integers(0, 200), st.integers(1, 70), st.sampled_from([(2, 2), (1, 1), (2, 1), (1, 2)]),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
@example(0, 9, (2, 2), True, 0)
@example(130, 8, (2, 2), True, 0)
@example(1, 300, (1, 1), False, 0)
def test_the_coefficients_equal_plain_torch(
    batch: int, channels: int, kind: tuple[int, int], scaled: bool, seed: int
) -> None:
    rows, groups = kind
    values = algebra_inputs(batch, channels, rows, groups, seed)
    PASSES.misaligned = False

    def results(passes: object, cast: object) -> list[Tensor | None]:
        t = {n: cast(x) if x.is_floating_point() else x for n, x in values.items()}
        filter_scale = t["filter_scale"] if scaled else None
        clean, p = (t["is_clean"], t["p"]) if max(kind) == 2 else (None, None)
        norm, mix = (
            Norm(t["weight"], t["bias"], t["running_mean"], t["running_var"], 1e-5),
            Mix(filter_scale, p),
        )
        outputs = [*passes.eval_coefficients(norm, mix, batch)]
        sums = Reduced(t["g1"], t["gc"], t["mean"])
        for needs in (
            Needs(filter_scale=scaled, p_clean=max(kind) == 2, bn_weight=True, bn_bias=True),
            Needs(filter_scale=scaled),
        ):
            outputs += passes.eval_gradients(sums, norm, mix, needs)
        stats, mix = SampleStats(t["mean"], t["m2"], 9), Mix(filter_scale, None, clean)
        batch_stats = passes.batch_statistics(stats, mix if groups == 2 else Mix(filter_scale), groups)
        outputs += batch_stats
        norm = norm._replace(mean=batch_stats.mean, var=batch_stats.var)
        outputs += passes.train_coefficients(norm, mix, batch)
        totals = passes.train_sums(sums, norm, mix)
        outputs += totals
        # the sums of another rank, as large as ours, have been added to one of them
        for shared in (None, totals._replace(through=2 * totals.through)):
            for part in passes.train_gradients(sums, stats, norm, batch_stats.n, mix, scaled, shared):
                outputs += part
        return outputs

    got = results(PASSES, lambda x: x)
    for i, (ours, truth) in enumerate(zip(got, results(EAGER, Tensor.double), strict=True)):
        if truth is not None:  # None: a gradient that nobody asks for
            # the gradient of filter_scale in training nearly cancels where a branch holds few samples
            few_samples = i in TRAINING_D_OMEGA and batch < 20
            assert few_samples or error(ours, truth) <= 1e-4, i

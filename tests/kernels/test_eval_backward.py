"""The backward kernel of eval mode against float64, between guard bands, with outputs that start as NaN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from awnet.kernels import eval_backward as kernel
from awnet.kernels import passes, tiles
from awnet.kernels.launch import recorded
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.interpreter import DEVICE, INTERPRETED, Guarded
from torch import Tensor

# the interpreter takes milliseconds for each program
few = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
STORED = {  # as in test_passes.py
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8,
    torch.float16: 2.0**-11,
}


@dataclass
class Case:
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    last: bool
    mask: str  # "none", "y", "bytes", "from u" or "slope"
    other: bool
    mean: bool
    scaled: bool
    residual: bool
    sums: str  # "none", "centered" or "about zero"
    config: Mapping[str, int]
    many_programs: bool

    def image(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64).to(self.dtype).to(DEVICE)
        return x.contiguous(memory_format=torch.channels_last) if self.last else x

    def table(self, seed: int) -> Tensor:
        return torch.randn(self.shape[:2], generator=torch.Generator().manual_seed(seed)).to(DEVICE)


cases = st.builds(
    Case,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    last=st.booleans(),
    mask=st.sampled_from(["none", "y", "bytes", "from u", "slope"]),
    other=st.booleans(),
    mean=st.booleans(),
    scaled=st.booleans(),
    residual=st.booleans(),
    sums=st.sampled_from(["none", "centered", "about zero"]),
    config=st.builds(
        lambda tile, inner, steps: {"tile": tile, "inner": inner, "steps": steps, "warps": 4},
        st.sampled_from([16, 64, 512]), st.sampled_from([4, 16, 64]), st.sampled_from([1, 4]),
    ),
    many_programs=st.booleans(),
)  # fmt: skip
SPLIT = {"tile": 16, "inner": 16, "steps": 1, "warps": 4}


def split_case(**changes: object) -> Case:
    """Both sums over many splits, so that the last program combines them."""
    options: dict = {
        "shape": (2, 17, 5, 5), "dtype": torch.float32, "last": True, "mask": "bytes", "other": True,
        "mean": True, "scaled": True, "residual": True, "sums": "about zero", "config": SPLIT, "many_programs": True,
    }  # fmt: skip
    return Case(**(options | changes))


def image(table: Tensor) -> Tensor:
    return table.double()[:, :, None, None]


def run(case: Case, guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_ENOUGH_PROGRAMS", 10**9 if case.many_programs else 1)
    monkeypatch.setattr(kernel, "_COMBINE_TILE", 32)  # several steps there too
    plain = passes.table_like
    monkeypatch.setattr(kernel, "table_like", lambda u, splits=1: guarded.output(plain(u, splits)))
    grad, u, y = (guarded.input(case.image(seed)) for seed in (1, 2, 3))
    other = guarded.input(case.image(4)) if case.other else None
    scale, shift, d_mean = (guarded.input(case.table(seed)) for seed in (5, 6, 7))
    scaled = case.scaled or case.mask == "from u"
    relu_mask = {"y": y, "bytes": y > 0}.get(case.mask)
    slope = y if case.mask == "slope" else None
    from_u = case.mask == "from u"
    centered = case.sums == "centered"
    tables = None
    if case.sums != "none":
        c = torch.empty(case.shape[:2], device=DEVICE)
        tensors = [guarded.output(c) for _ in range(3)]
        tables = kernel.Sums(tensors[0], tensors[1], tensors[2] if centered else None)
    out = guarded.output(u), guarded.output(u) if case.residual else None, tables
    d_u, d_residual, sums = kernel.eval_backward(
        grad, other, d_mean if case.mean else None, u if from_u or tables else None, relu_mask,
        scale if scaled else None, shift if from_u else None, case.config, slope=slope, residual=case.residual, sums=tables is not None,
        centered=centered, out=out,
    )  # fmt: skip
    guarded.check()
    hw = case.shape[2] * case.shape[3]
    if from_u:
        gradient_passes = passes.apply(u, scale, shift, None, True, case.config) > 0
    else:
        gradient_passes = y > 0 if case.mask in ("y", "bytes") else torch.ones_like(y, dtype=torch.bool)
    terms = [grad.double()]
    terms += [other.double()] if other is not None else []
    terms += [image(d_mean) / hw + 0 * grad.double()] if case.mean else []
    g = torch.where(gradient_passes, sum(terms), 0.0)
    size = torch.where(gradient_passes, sum(term.abs() for term in terms), 0.0)
    if slope is not None:
        g, size = g * slope.double(), size * slope.double().abs()

    def close(got: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype) -> None:
        # 4 roundings of float32 for each term of a sum, one of the stored dtype; fp16 subnormals step by 2^-24
        allowed = 4 * 2.0**-23 * size + STORED[dtype] * expected.abs() + 2.0**-24
        assert bool(((got.double() - expected).abs() <= allowed).all())

    factor = image(scale) if scaled else 1.0
    close(d_u, g * factor, size * abs(factor), case.dtype)
    if d_residual is not None:
        close(d_residual, g, size, case.dtype)
    assert (d_residual is None) == (not case.residual)
    assert (sums is None) == (case.sums == "none")
    if sums is not None:
        close(sums.g1, g.sum((2, 3)), size.sum((2, 3)), torch.float32)
        center = u[:, :, :1, :1].double() if centered else torch.zeros(1, device=DEVICE).double()
        about = size * (u.double().abs() + u[:, :, :1, :1].double().abs())
        close(sums.gc, (g * (u.double() - center)).sum((2, 3)), about.sum((2, 3)), torch.float32)
        if sums.center is not None:
            assert torch.equal(sums.center.double(), center[:, :, 0, 0])
        assert (sums.center is not None) == centered


@few
@given(cases)
@example(split_case())
@example(split_case(last=False, sums="centered", mask="from u", dtype=torch.float16))
@example(split_case(shape=(1, 1, 1, 1), config=SPLIT))
@example(split_case(mask="slope"))
@example(split_case(mask="y", scaled=False, residual=False, sums="none"))
def test_eval_backward_equals_float64(case: Case) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(case, Guarded(), monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_the_gradient_of_u_has_the_bits_of_propagate(last: bool, dtype: torch.dtype) -> None:
    case = split_case(shape=(2, 5, 3, 5), last=last, dtype=dtype)
    grad, u, y = (case.image(seed) for seed in (1, 2, 3))
    scale = case.table(4)
    d_u, d_residual, _ = kernel.eval_backward(
        grad, None, None, u, y, scale, None, SPLIT, residual=True, sums=True
    )
    expected = passes.propagate(grad, None, None, y, scale, None, None, True, SPLIT)
    assert torch.equal(d_u, expected[0])
    assert torch.equal(d_residual, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_from_u_is_that_of_apply_in_every_bit(dtype: torch.dtype) -> None:
    # y near 0, of both signs, and so small that it is stored as 0
    u = torch.linspace(-2, 2, 60, dtype=torch.float64).view(1, 1, 6, 10).to(dtype).to(DEVICE)
    u[0, 0, 0, 0] = float("nan")
    tables = [
        (1.0, 0.0), (-1.0, 0.5), (1e-30, 0.0), (2.0**-140, 0.0), (1.0, 1e-9),
        (float(u[0, 0, 2, 3]), -float(u[0, 0, 2, 3]) ** 2), (0.0, 0.0), (float("nan"), 0.0),
    ]  # fmt: skip
    for a, b in tables:
        scale, shift = (torch.full((1, 1), x, device=DEVICE) for x in (a, b))
        mask = torch.empty_like(u, dtype=torch.bool)
        passes.apply(u, scale, shift, None, True, SPLIT, relu_mask=mask)
        ones = torch.ones_like(u)
        _, g, _ = kernel.eval_backward(ones, None, None, u, None, scale, shift, SPLIT, residual=True)
        assert torch.equal(g, mask.to(dtype)), (a, b)


def bits_of(packed: Tensor, like: Tensor) -> Tensor:
    """A packed mask as a bool tensor in the layout of ``like``: bit i of byte j is element 8·j + i."""
    bits = torch.stack([(packed >> i) & 1 for i in range(8)], 1).flatten().bool()
    return bits.as_strided(like.shape, like.stride())


PACKED_SHAPES = st.one_of(  # and whether in channels_last
    st.tuples(
        st.integers(1, 2), st.sampled_from([8, 24, 40]), st.integers(2, 4), st.integers(1, 4), st.just(True)
    ),
    st.tuples(
        st.integers(1, 2), st.integers(1, 9), st.integers(1, 4), st.sampled_from([8, 16]), st.just(False)
    ),
)


@settings(few, max_examples=4)
@given(
    PACKED_SHAPES,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([16, 64, 256]),
    st.sampled_from([2, 8, 32]),
    st.booleans(),
)
@example((2, 24, 3, 5, True), torch.bfloat16, 64, 16, True)
@example((3, 3, 4, 6, False), torch.float16, 16, 8, True)
@example((1, 8, 2, 2, True), torch.float32, 16, 2, True)
def test_a_packed_mask_gives_the_bits_of_a_bool_mask(
    shape: tuple[int, int, int, int, bool], dtype: torch.dtype, tile: int, inner: int, sums: bool
) -> None:
    guarded, config = Guarded(), {"tile": tile, "inner": inner, "steps": 2, "warps": 4}
    # a tile of a packed mask has at least 8 elements along the contiguous axis; sums depend on the tiles
    by_bytes_config = config | {"inner": max(8, inner)}
    case = split_case(shape=shape[:4], last=shape[4], dtype=dtype)
    images = [case.image(seed) for seed in (1, 2, 3, 4)]
    images[0][-1, -1, -1, -1] = float("nan")
    u, grad, other, residual = map(guarded.input, images)
    scale, shift, d_mean = (case.table(seed) for seed in (5, 6, 7))
    mask = torch.empty_like(u, dtype=torch.bool)
    packed = guarded.output(tiles.packed_mask(u).view(torch.int8)).view(torch.uint8)
    y = passes.apply(u, scale, shift, residual, True, config, relu_mask=mask)
    again = passes.apply(u, scale, shift, residual, True, config, relu_mask=packed)
    assert torch.equal(torch.nan_to_num(y, -1), torch.nan_to_num(again, -1))
    assert torch.equal(bits_of(packed, u), mask)
    options = {"residual": True, "sums": sums, "centered": True}
    results = [
        kernel.eval_backward(grad, other, d_mean, u if sums else None, m, scale, None, by, **options)
        for m, by in ((mask, by_bytes_config), (packed, config))
    ]
    guarded.check()
    flat = [[*r[:2], *(r[2] or ())] for r in results]
    for by_bytes, by_bits in zip(*flat, strict=True):
        assert torch.equal(torch.nan_to_num(by_bytes), torch.nan_to_num(by_bits))


@pytest.mark.parametrize(("last", "shape"), [(True, (2, 12, 2, 4)), (False, (2, 8, 3, 5))])
def test_no_packed_mask_where_a_row_has_no_whole_bytes(last: bool, shape: tuple[int, int, int, int]) -> None:
    assert tiles.packed_mask(split_case(shape=shape, last=last).image(0)) is None


def test_other_samples_filled_with_nan_change_no_bit() -> None:
    case = split_case(shape=(3, 5, 3, 5))
    grad, u, y, other = (case.image(seed) for seed in (1, 2, 3, 4))
    scale, d_mean = case.table(5), case.table(6)

    def results() -> list[Tensor]:
        d_u, d_residual, sums = kernel.eval_backward(
            grad, other, d_mean, u, y, scale, None, SPLIT, residual=True, sums=True
        )
        return [d_u, d_residual, sums.g1, sums.gc]

    before = results()
    for x in (grad, u, y, other, scale, d_mean):
        x[[0, 2]] = float("nan")
    for clean, spoiled in zip(before, results(), strict=True):
        assert torch.equal(clean[1], spoiled[1])
        assert spoiled[0].isnan().all()


def test_an_empty_batch_launches_nothing() -> None:
    u, table = torch.empty(0, 3, 4, 4, device=DEVICE), torch.empty(0, 3, device=DEVICE)
    d_u, _, sums = kernel.eval_backward(u, None, None, u, u, table, None, SPLIT, sums=True)
    assert d_u.shape == u.shape
    assert sums.g1.shape == (0, 3)


def test_one_launch_computes_all_gradients() -> None:
    u = torch.empty(4, 64, 32, 32, device="meta")
    table = torch.empty(4, 64, device="meta")
    config = {"tile": 2048, "inner": 64, "steps": 4, "warps": 8}
    with recorded() as launches:
        kernel.eval_backward(u, u, table, u, u, table, None, config, residual=True, sums=True)
    assert [launched.kernel.__name__ for launched in launches] == ["eval_backward_kernel"]

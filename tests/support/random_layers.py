"""Random layers for the tests of the ops: arguments, an independent plain-torch chain, and error measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from awnet import ops
from awnet.ops.args import ACTIVATIONS

DIFFERENTIABLE = ("input", "weight", "filter_scale", "bn_weight", "bn_bias", "p_clean", "residual")


@dataclass(frozen=True)
class Layer:
    """The arguments of one ``aw_conv2d`` call, tensors by name and options apart."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Layer:
        """Images and weights in ``dtype``; the [B, C] and [2, C] tensors in float32 or wider."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        images = ("input", "weight", "residual")
        moved = {
            name: x if x.dtype == torch.bool else x.to(dtype if name in images else wide)
            for name, x in self.tensors.items()
        }
        return replace(self, tensors=moved)

    def rounded(self, dtype: torch.dtype) -> Layer:
        """float64 values that ``dtype`` holds exactly, so that both sides of a comparison see the same input."""
        return self.to(dtype).to(torch.float64)


@dataclass(frozen=True)
class Result:
    output: Tensor
    grads: dict[str, Tensor]
    running: dict[str, Tensor]


def run(layer: Layer, function: Any = None, backend: str | None = None, seed: int = 1) -> Result:
    """Forward and every gradient for one fixed random upstream gradient (the same for every dtype)."""
    leaves = {
        name: x.detach().clone().requires_grad_(name in DIFFERENTIABLE) for name, x in layer.tensors.items()
    }
    leaves.setdefault("filter_scale", None)  # type: ignore[arg-type]
    if function is None:
        y = ops.aw_conv2d(**leaves, **layer.options, backend=backend)
    else:
        y = function(**leaves, **layer.options)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    names = [n for n in DIFFERENTIABLE if leaves.get(n) is not None]
    grads = torch.autograd.grad(y, [leaves[n] for n in names], upstream, allow_unused=True)
    running = {name: leaves[name].detach() for name in ("running_mean", "running_var")}
    return Result(y.detach(), {n: g for n, g in zip(names, grads, strict=True) if g is not None}, running)


def error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64; 0 where both are empty or zero."""
    got, expected = got.detach().double(), expected.detach().double()
    difference, size = float((got - expected).norm()), float(expected.norm())
    return difference if size == 0 else difference / size


def plain_torch(
    input: Tensor,
    weight: Tensor,
    filter_scale: Tensor | None,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    p_clean: Tensor | None = None,
    is_clean: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    **conv: Any,
) -> Tensor:
    """The layer in plain torch: convolve, scale, two batch norms, blend, add, activation."""
    u = F.conv2d(input, weight, None, **conv)
    if filter_scale is not None:
        u = u * filter_scale[:, :, None, None].to(u.dtype)
    rows = max(len(bn_weight), len(running_mean))
    y = torch.zeros_like(u)
    for k in range(rows):
        a, s = min(k, len(bn_weight) - 1), min(k, len(running_mean) - 1)
        affine = bn_weight[a], bn_bias[a]
        if training:
            rows_of_k = torch.ones(len(u), dtype=torch.bool) if rows == 1 else is_clean == bool(k)
            if rows_of_k.any():
                y = y.index_put((rows_of_k,), F.batch_norm(u[rows_of_k], None, None, *affine, True, 0.0, eps))
        else:
            normal = F.batch_norm(u, running_mean[s], running_var[s], *affine, False, 0.0, eps)
            p = 1.0 if rows == 1 else (p_clean if k == 1 else 1 - p_clean)[:, None, None, None].to(u.dtype)
            y = y + p * normal
    if residual is not None:
        y = y + residual
    return {
        None: lambda: y,
        "relu": lambda: torch.relu(y),
        "silu": lambda: y / (1 + torch.exp(-y)),
        "gelu": lambda: y * torch.erfc(y * -(0.5**0.5)) / 2,
        "leaky_relu": lambda: torch.maximum(y, y / 100),
    }[activation]()


@st.composite
def layers(draw: st.DrawFn, training: bool | None = None, offset: float = 0.0, least: int = 1) -> Layer:
    """Odd shapes, stride, dilation, groups and depthwise, B = 1, a branch missing, p at 0 and 1, ω = 0."""
    training = draw(st.booleans()) if training is None else training
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    c_in = groups * draw(st.integers(1, 3))
    c_out = groups * draw(st.integers(1, 3))
    if draw(st.integers(0, 4)) == 0:  # depthwise
        groups = c_out = c_in
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, 2))
    reach = [dilation * (k - 1) + 1 for k in kernel]
    size = [max(1, r - 2 * padding) + draw(st.integers(1, 7)) for r in reach]
    batch = draw(st.integers(least, 7))
    affine_rows, statistics_rows = draw(st.sampled_from([(2, 2), (2, 2), (2, 2), (1, 1), (2, 1)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return build(
        generator, training, batch=batch, c_in=c_in, c_out=c_out, groups=groups, kernel=kernel, stride=stride,
        padding=padding, dilation=dilation, size=size, affine_rows=affine_rows, statistics_rows=statistics_rows,
        offset=offset,
        kinds=draw(st.sampled_from(["mixed", "mixed", "all clean", "all adversarial"])),
        scale=draw(st.sampled_from(["random", "random", "some zero", "none"])),
        p=draw(st.sampled_from(["random", "zero and one"])),
        residual=draw(st.booleans()), activation=draw(st.sampled_from(["relu", *ACTIVATIONS])),
    )  # fmt: skip


def build(
    generator: torch.Generator, training: bool, *, batch: int = 6, c_in: int = 4, c_out: int = 6, groups: int = 2,
    kernel: tuple[int, int] = (3, 3), stride: int = 1, padding: int = 1, dilation: int = 1,
    size: Sequence[int] = (6, 5), affine_rows: int = 2, statistics_rows: int = 2, offset: float = 0.0,
    kinds: str = "mixed", scale: str = "random", p: str = "random", residual: bool = True,
    activation: str | None = "relu",
) -> Layer:  # fmt: skip
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    out = [
        (s + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for s, k in zip(size, kernel, strict=True)
    ]
    weight = normal(c_out, c_in // groups, *kernel) / (c_in // groups * kernel[0] * kernel[1]) ** 0.5
    tensors = {
        "input": normal(batch, c_in, *size) + offset,
        "weight": weight,
        "bn_weight": normal(affine_rows, c_out),
        "bn_bias": normal(affine_rows, c_out),
        "running_mean": normal(statistics_rows, c_out),
        "running_var": uniform(statistics_rows, c_out) + 0.5,
    }
    if scale != "none":
        tensors["filter_scale"] = 2 * uniform(batch, c_out)
        if scale == "some zero":
            tensors["filter_scale"][uniform(batch, c_out) < 0.3] = 0.0
    if training:
        clean = uniform(batch) < 0.5
        # a branch with one value per channel is an error by contract, so keep such batches to one kind
        single = out[0] * out[1] == 1
        if kinds != "mixed" or single:
            clean[:] = kinds == "all clean"
        tensors["is_clean"] = clean
    else:
        tensors["p_clean"] = uniform(batch) if p == "random" else (uniform(batch) < 0.5).double()
    if residual:
        tensors["residual"] = normal(batch, c_out, *out)
    options = {
        "training": training, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        "activation": activation,
    }  # fmt: skip
    return Layer(tensors, options)


def has_single_value(layer: Layer) -> bool:
    """True where training would find one value per channel, which is an error by contract."""
    shape = ops.filter_scaled_conv2d(
        layer.tensors["input"], layer.tensors["weight"], None,
        **{k: layer.options[k] for k in ("stride", "padding", "dilation", "groups")}, backend="reference",
    ).shape  # fmt: skip
    return layer.options["training"] and shape[0] * shape[2] * shape[3] == 1

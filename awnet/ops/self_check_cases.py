"""The cases of the self-check, and their expected results.

Values of images are small multiples of 1/8 and scales are powers of two. Sums and products are then exact in
float32, so that rounding does not change a ReLU mask, and tolerances can be narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from awnet.ops.args import CODES, EvalBackwardArgs, Needs
from awnet.ops.backends.base import Passes
from awnet.ops.coefficients import (
    Mix,
    Norm,
    Propagation,
    Reduced,
    SampleStats,
    eval_coefficients,
    eval_gradients,
    split,
)

Check = Callable[..., Any]

_LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
_SHAPES = {
    "vectorized": (2, 16, 8, 8),
    "ragged": (3, 5, 7, 5),
    "split": (1, 8, 40, 64),  # the pixels of a plane are divided among several programs
}
_IMAGES = (
    ("NCHW", torch.float32, "split"),
    ("channels_last", torch.float32, "ragged"),
    ("NCHW", torch.bfloat16, "vectorized"),
    ("channels_last", torch.bfloat16, "split"),
    ("NCHW", torch.float16, "ragged"),
    ("channels_last", torch.float16, "vectorized"),
)
_TABLE_LIMIT = 1e-3  # of the coefficients, which divide by standard deviations
_WIDTHS = (5, 16, 3)
_EPS = 1e-5


def run(check: Check, functions: Collection[str]) -> None:
    """Calls ``check(label, name, *arguments)`` for every case.

    ``functions``: names of the functions that only some backends have: ``eval_backward`` as one kernel,
    ``forward_and_backward`` with a packed mask, the coefficients of a network, the step of an attack.
    """
    generator = torch.Generator().manual_seed(0)
    for number, (layout, dtype, shape) in enumerate(_IMAGES):
        images = _Images(check, generator, number, layout, dtype, shape)
        images.run()
        if "eval_backward" in functions:
            images.eval_backward()
        if "forward_and_backward" in functions and number in (2, 3):
            images.forward_and_backward()
    _coefficients(check, generator)
    if "network_coefficients" in functions:
        _network(check, generator)
    if "sign_step" in functions:
        x = torch.randint(0, 257, (3, 3, 17, 17), generator=generator).float() / 256
        start = (x + torch.randint(-8, 9, x.shape, generator=generator).float() / 256).clamp(0, 1)
        grad = torch.randint(-2, 3, x.shape, generator=generator).bfloat16()
        cast = torch.empty_like(grad)
        check("float32, bfloat16 copy", "sign_step", start, grad, x, 4 / 256, 8 / 256, cast, writes=(5,))


def expected(name: str, *arguments: Any) -> Any:
    """The result of the function ``name`` by plain torch."""
    if name == "network_coefficients":
        filter_scale, p_clean, tables, widths, eps = arguments
        pairs = split(
            *eval_coefficients(Norm.stacked(tables, eps), Mix(filter_scale, p_clean), len(p_clean)), widths
        )
        scales, shifts = zip(*pairs, strict=True)
        return tuple(torch.cat([x.reshape(-1) for x in blocks]) for blocks in (scales, shifts))
    if name == "network_gradients":
        d_scale, d_shift, filter_scale, p_clean, tables, eps, needs = arguments
        norm, mix = Norm.stacked(tables, eps), Mix(filter_scale, p_clean)
        grads = eval_gradients(Reduced(d_shift, d_scale, None), norm, mix, Needs(False, False, *needs))
        return grads[:2]
    if name == "sign_step":
        x_adv, grad, x, step_size, eps, _ = arguments
        low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
        stepped = (x_adv + step_size * grad.sign()).clamp(low, high)
        return stepped, stepped
    if name == "forward_and_backward":
        u, scale, shift, residual, args = arguments
        y, mask = Passes().apply(u, scale, shift, residual, CODES["relu"], True, False)
        return y, *Passes().eval_backward(args._replace(relu_mask=mask))
    return getattr(Passes(), name)(*arguments)


class _Images:
    """The passes for one layout, dtype and shape; the options change with ``number``."""

    def __init__(
        self,
        check: Check,
        generator: torch.Generator,
        number: int,
        layout: str,
        dtype: torch.dtype,
        shape: str,
    ) -> None:
        self.check, self.generator, self.number = check, generator, number
        self.layout, self.dtype, self.shape = _LAYOUTS[layout], dtype, _SHAPES[shape]
        self.label = f"{layout}, {str(dtype).removeprefix('torch.')}, {shape}"

    def _whole(self, *shape: int, span: int = 16) -> Tensor:
        return torch.randint(-span, span + 1, shape, generator=self.generator)

    def _image(self) -> Tensor:
        x = (self._whole(*self.shape) / 4).to(self.dtype).contiguous(memory_format=self.layout)
        if self.number >= 4:
            x[-1, -1, -1, -1] = float("nan")
        return x

    def _table(self) -> Tensor:
        return self._whole(*self.shape[:2]).float() / 8

    def _scale(self) -> Tensor:
        exponents = torch.randint(-1, 2, self.shape[:2], generator=self.generator)
        return 2.0 ** exponents.float() * (1 - 2 * (self._whole(*self.shape[:2]) > 8).float())

    def _mask(self) -> Tensor | None:
        """A mask as y, as bool, or none."""
        y = self._image().relu()
        return (y, ~(y <= 0), None)[self.number % 3]

    def run(self) -> None:
        number, label, check = self.number, self.label, self.check
        u, grad, other = self._image(), self._image(), self._image()
        scale, shift = self._scale(), self._table()
        check(label, "statistics", u)
        residual, keep_mask, in_place = other if number % 2 else None, number in (0, 1, 4), number in (1, 2)
        options = (residual, number != 3, keep_mask, in_place)
        check(label, "apply", u, scale, shift, *options, writes=(0,) if in_place else ())
        check(label, "reduce", grad, u, shift, self._mask())
        by_input = number % 2 == 0
        propagation = Propagation(scale, self._scale(), self._table()) if by_input else Propagation(scale)
        about = (u, shift) if by_input else (None, None)
        check(label, "propagate", grad, *about, self._mask(), propagation, number % 3 != 0)
        # an activation whose slope is stored
        code = CODES[("silu", "gelu", "leaky_relu")[number % 3]]
        check(label, "apply", u, scale, shift, residual, code, keep_mask, False)
        check(label, "reduce", grad, u, shift, None, other)
        check(label, "propagate", grad, *about, None, propagation, number % 3 != 0, other)

    def eval_backward(self) -> None:
        """The backward of eval mode in one kernel."""
        number = self.number
        u, grad, other = self._image(), self._image(), self._image()
        scale, shift = self._scale(), self._table()
        d_mean = self._table() if number % 2 == 0 else None
        from_u, sums = number in (0, 3), number != 2  # whether the mask is computed from u
        args = EvalBackwardArgs(
            grad,
            None if number == 5 else scale,
            other_grad=other if number % 3 != 1 else None,
            d_mean=d_mean,
            u=u if from_u or sums else None,
            relu_mask=None if from_u else self._mask(),
            shift=shift if from_u else None,
            residual=number % 3 != 0,
            sums=sums,
            centered=number % 2 == 1,
        )
        self.check(self.label, "eval_backward", args, limit=1e-4)
        args = args._replace(relu_mask=None, shift=None, slope=other)
        self.check(self.label, "eval_backward", args, limit=1e-4)

    def forward_and_backward(self) -> None:
        """A frozen layer whose forward stores the mask of its ReLU for the backward."""
        forward = self._image(), self._scale(), self._table(), self._image()
        args = EvalBackwardArgs(self._image(), self._scale(), residual=True)
        self.check(self.label, "forward_and_backward", *forward, args)


def _coefficients(check: Check, generator: torch.Generator) -> None:
    batch, channels = 20, 24

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    g1, gc, mean, filter_scale = (normal(batch, channels) for _ in range(4))
    m2 = normal(batch, channels).square() * 9 + 1
    p_clean = torch.rand(batch, generator=generator, dtype=torch.float32)
    is_clean = torch.arange(batch) % 3 == 0
    for rows in (2, 1):
        label, limit = f"{rows} row{'s' if rows == 2 else ''}", {"limit": _TABLE_LIMIT}
        weight, bias, running = normal(rows, channels), normal(rows, channels), normal(rows, channels)
        norm = Norm(weight, bias, running, normal(rows, channels).square() + 0.5, _EPS)
        scale = filter_scale if rows == 2 else None
        mix = Mix(scale, p_clean if rows == 2 else None)
        sums = Reduced(g1, gc, mean)
        check(label, "eval_coefficients", norm, mix, batch, **limit)
        needs = Needs(filter_scale=rows == 2, p_clean=rows == 2, bn_weight=True, bn_bias=True)
        check(label, "eval_gradients", sums, norm, mix, needs, **limit)
        if rows == 1:
            continue
        stats, mix = SampleStats(mean, m2, 9), Mix(scale, None, is_clean)
        batch_stats = check(label, "batch_statistics", stats, mix, rows, **limit)
        norm = norm._replace(mean=batch_stats.mean.float(), var=batch_stats.var.float())
        check(label, "train_coefficients", norm, mix, batch, **limit)
        check(label, "train_sums", sums, norm, mix, **limit)
        arguments = (sums, stats, norm, batch_stats.n.float(), mix, True, None)
        check(label, "train_gradients", *arguments, **limit)


def _network(check: Check, generator: torch.Generator) -> None:
    batch, channels = 7, sum(_WIDTHS)
    tables = torch.randn(4, 2, channels, generator=generator, dtype=torch.float32).abs() + 0.1
    filter_scale = torch.rand(batch, sum(_WIDTHS[:2]), generator=generator, dtype=torch.float32)
    p_clean = torch.rand(batch, generator=generator, dtype=torch.float32)
    where = (filter_scale, p_clean, tables)
    check("3 layers", "network_coefficients", *where, _WIDTHS, _EPS, limit=_TABLE_LIMIT)
    d_scale, d_shift = (
        torch.randn(batch, channels, generator=generator, dtype=torch.float32) for _ in range(2)
    )
    arguments = (d_scale, d_shift, *where, _EPS, (True, True))
    check("3 layers", "network_gradients", *arguments, limit=_TABLE_LIMIT)

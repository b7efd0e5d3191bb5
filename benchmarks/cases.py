"""What is measured: layer shapes, their random tensors, and one step in each mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from awnet import reference

Mode = Literal["forward", "attack", "training"]
MODES: tuple[Mode, ...] = ("forward", "attack", "training")
# an activation whose argument is this near to zero may switch on rounding alone; its gradient is left out
_UNDECIDED = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Case:
    """A 3×3 layer of stride 1 with as many input as output channels, on square images."""

    name: str
    channels: int
    size: int

    def flops(self, mode: Mode, batch: int) -> float:
        """Of the convolutions that ``mode`` needs: forward, + input gradient, + weight gradient."""
        macs = batch * self.channels * self.channels * 9 * self.size * self.size
        return 2.0 * macs * {"forward": 1, "attack": 2, "training": 3}[mode]

    def bytes(self, mode: Mode, batch: int, item: int) -> float:
        """Of the images and weights that enter or leave a step, each moved once: the compulsory traffic."""
        image, weight = batch * self.channels * self.size**2 * item, self.channels**2 * 9 * item
        return {
            "forward": 2.0 * image + weight,  # input, output
            "attack": 4.0 * image + weight,  # and the gradients of both
            "training": 4.0 * image + 2.0 * weight,
        }[mode]


# the four stages of a ResNet-18 on 32×32 images
CASES = (
    Case("stage1", 64, 32),
    Case("stage2", 128, 16),
    Case("stage3", 256, 8),
    Case("stage4", 512, 4),
)
QUICK_CASES = (Case("quick1", 8, 16), Case("quick2", 32, 4))


@dataclass(frozen=True)
class Inputs:
    """The tensors of one layer; a static layer has no filter_scale and p_clean, and one row a table."""

    input: Tensor  # [B, C, H, W]
    weight: Tensor  # [C, C, 3, 3]
    filter_scale: Tensor | None  # [B, C]
    bn_weight: Tensor  # [2, C], static [1, C]; so the three below
    bn_bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    p_clean: Tensor | None  # [B]
    is_clean: Tensor | None  # [B] bool: the first half is clean, as in concat[x_nat; x_adv]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in ``dtype``, in tensors of their own."""
        copies = {
            name: value.to(dtype, copy=True)
            for name, value in vars(self).items()
            if value is not None and value.is_floating_point()
        }
        return replace(self, **copies)

    def clone(self) -> Inputs:
        """The same values in tensors of their own; strides stay."""
        return replace(self, **{name: v.detach().clone() for name, v in vars(self).items() if v is not None})


Layer = Callable[[Inputs, bool], Tensor]


def make_inputs(
    case: Case,
    batch: int,
    static: bool,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool,
    seed: int,
) -> Inputs:
    """Random tensors; images and weights in ``dtype``, everything on [B, C] and smaller in float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    c, rows = case.channels, 1 if static else 2
    layout = torch.channels_last if channels_last else torch.contiguous_format
    image = normal(batch, c, case.size, case.size)
    weight = normal(c, c, 3, 3) * (2.0 / (9 * c)) ** 0.5
    tensors = Inputs(
        input=image.to(dtype).contiguous(memory_format=layout),
        weight=weight.to(dtype).contiguous(memory_format=layout),
        filter_scale=None if static else (torch.tanh(normal(batch, c) * 0.3) + 1) ** 3,
        bn_weight=0.5 + uniform(rows, c),
        bn_bias=normal(rows, c) * 0.2,
        running_mean=normal(rows, c) * 0.2,
        running_var=0.5 + uniform(rows, c),
        p_clean=None if static else uniform(batch),
        is_clean=None if static else torch.arange(batch) < batch // 2,
    )
    moved = {name: value.to(device) for name, value in vars(tensors).items() if value is not None}
    return replace(tensors, **moved)


def differentiated(inputs: Inputs, mode: Mode) -> dict[str, Tensor]:
    """The tensors that ``mode`` takes gradients for, by name. An attack's parameters are frozen."""
    names = {
        "forward": (),
        "attack": ("input", "filter_scale", "p_clean"),
        "training": ("input", "weight", "filter_scale", "bn_weight", "bn_bias"),
    }[mode]
    return {name: getattr(inputs, name) for name in names if getattr(inputs, name) is not None}


def step(layer: Layer, inputs: Inputs, mode: Mode, upstream: Tensor | None) -> dict[str, Tensor]:
    """One forward and, unless ``mode`` is forward, its gradients for ``upstream`` = ∂L/∂output."""
    if mode == "forward":
        with torch.no_grad():
            return {"output": layer(inputs, False)}
    wanted = differentiated(inputs, mode)
    for tensor in wanted.values():
        tensor.requires_grad_()
    output = layer(inputs, mode == "training")
    gradients = torch.autograd.grad(output, list(wanted.values()), upstream)
    results = {"output": output.detach()}
    results |= {f"gradient of {name}": value for name, value in zip(wanted, gradients, strict=True)}
    if mode == "training":
        results |= {"running_mean": inputs.running_mean, "running_var": inputs.running_var}
    return results


def literal(inputs: Inputs, training: bool, activation: str | None = "relu") -> Tensor:
    """Eq. 11–16 as the paper writes them."""
    return reference.aw_conv2d(
        inputs.input,
        inputs.weight,
        inputs.filter_scale,
        inputs.bn_weight,
        inputs.bn_bias,
        inputs.running_mean,
        inputs.running_var,
        p_clean=None if training else inputs.p_clean,
        is_clean=inputs.is_clean if training else None,
        training=training,
        padding=1,
        activation=activation,
    )


def make_upstream(inputs: Inputs, mode: Mode, seed: int) -> Tensor:
    """A random ∂L/∂output in the input's dtype, zero where rounding could switch the ReLU."""
    exact = inputs.to(torch.float64)
    with torch.no_grad():
        before = literal(exact, mode == "training", activation=None)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(before.shape, generator=generator).to(before.device)
    upstream = upstream * (before.abs() > _UNDECIDED[inputs.input.dtype])
    return torch.empty_like(inputs.input).copy_(upstream)


def truth(inputs: Inputs, mode: Mode, upstream: Tensor) -> dict[str, Tensor]:
    """What every provider must give for these tensors: the reference in float64."""
    return step(literal, inputs.to(torch.float64), mode, upstream.to(torch.float64))

"""The benchmark cases: layers of a ResNet-18, a block and a network, each with its random tensors.

``CASES`` is the registry; ``SMOKE_CASES`` has the same names at sizes that a CPU runs in milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from awnet.models import create_model
from awnet.nn import AWBasicBlock, AWConv2d, AWNet
from awnet.nn.layers import MixBatchNorm2d

Mode = Literal["forward", "attack", "training"]
MODES: tuple[Mode, ...] = ("forward", "attack", "training")
# an activation whose argument is this close to zero may switch on rounding alone; its gradient is left out
_UNDECIDED = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

# a function with the arguments of awnet.ops.aw_conv2d
Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Convolution:
    """A k×k convolution of square images with padding that keeps the size at stride 1."""

    c_in: int
    c_out: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def geometry(self) -> tuple[Any, Any, Any, int]:
        """Stride, padding, dilation and groups, as torch's convolution takes them."""
        return (self.stride,) * 2, (self.padding,) * 2, (1, 1), self.groups

    @property
    def weights(self) -> int:
        return self.c_out * (self.c_in // self.groups) * self.kernel**2

    def flops(self, mode: Mode, batch: int) -> float:
        """Forward, + input gradient, + weight gradient; one multiply-add is two."""
        macs = batch * self.weights * self.out_size**2
        return 2.0 * macs * {"forward": 1, "attack": 2, "training": 3}[mode]

    def bytes(self, mode: Mode, batch: int, item: int) -> float:
        """Of the images and weights that enter or leave a step, each moved once: the compulsory traffic."""
        images = batch * (self.c_in * self.size**2 + self.c_out * self.out_size**2) * item
        weights = self.weights * item
        return {
            "forward": 1.0 * images + weights,  # input, output
            "attack": 2.0 * images + weights,  # and the gradients of both
            "training": 2.0 * images + 2.0 * weights,
        }[mode]


def parse_shape(text: str) -> Convolution:
    """``C_IN,C_OUT,SIZE[,KERNEL[,STRIDE[,GROUPS]]]`` as a convolution, by default 3×3 without stride.

    Raises ValueError if the text has another form or the numbers do not describe a convolution.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not 3 <= len(numbers) <= 6 or min(numbers) < 1:
        raise ValueError(
            f"shape must be C_IN,C_OUT,SIZE[,KERNEL[,STRIDE[,GROUPS]]] in positive integers, as 64,128,32 or "
            f"64,64,32,3,1,64, got {text!r}"
        )
    c_in, c_out, size, kernel, stride, groups = (*numbers, *(3, 1, 1)[len(numbers) - 3 :])
    if c_in % groups or c_out % groups:
        raise ValueError(f"shape {text!r}: groups, {groups}, must divide both numbers of channels")
    if kernel % 2 == 0:
        raise ValueError(f"shape {text!r}: the kernel must be odd, got {kernel}")
    return Convolution(c_in, c_out, size, kernel, stride, groups)


def shape_case(text: str) -> LayerCase:
    """The dynamic layer of :func:`parse_shape`, named by all six numbers."""
    c = parse_shape(text)
    return LayerCase(",".join(map(str, (c.c_in, c.c_out, c.size, c.kernel, c.stride, c.groups))), c)


@dataclass(frozen=True)
class Problem:
    """A case's random tensors for one batch. A static one has no signals, and one row per table."""

    image: Tensor  # [B, C, H, W]
    filter_scales: tuple[Tensor, ...]  # [B, C_out] for each dynamic convolution
    p_clean: Tensor | None  # [B]
    is_clean: Tensor | None  # [B] bool: the first half is clean, as in concat[x_nat; x_adv]
    parameters: dict[str, Tensor]
    running: dict[str, Tensor]  # running statistics
    module: nn.Module | None = None  # that has these parameters and statistics; a layer has none

    def to(self, dtype: torch.dtype) -> Problem:
        """A copy in ``dtype`` with the same strides."""

        def copied(x: Tensor) -> Tensor:
            return x.detach().to(dtype, copy=True)

        changes: dict[str, Any] = {
            "image": copied(self.image),
            "filter_scales": tuple(copied(x) for x in self.filter_scales),
            "p_clean": None if self.p_clean is None else copied(self.p_clean),
        }
        if self.module is None:
            changes["parameters"] = {name: copied(x) for name, x in self.parameters.items()}
            changes["running"] = {name: copied(x) for name, x in self.running.items()}
        else:
            changes |= _parts(copy.deepcopy(self.module).to(dtype))
        return replace(self, **changes)

    def clone(self) -> Problem:
        """A copy with the same dtypes and strides."""
        changes: dict[str, Any] = {
            "image": self.image.detach().clone(),
            "filter_scales": tuple(x.detach().clone() for x in self.filter_scales),
            "p_clean": None if self.p_clean is None else self.p_clean.detach().clone(),
        }
        if self.module is None:
            changes["parameters"] = {name: x.detach().clone() for name, x in self.parameters.items()}
            changes["running"] = {name: x.clone() for name, x in self.running.items()}
        else:
            changes |= _parts(copy.deepcopy(self.module))
        return replace(self, **changes)

    @property
    def signals(self) -> dict[str, Tensor]:
        """The router's outputs by name."""
        named = {f"filter_scale {i}": x for i, x in enumerate(self.filter_scales)}
        return named | ({} if self.p_clean is None else {"p_clean": self.p_clean})


def _parts(module: nn.Module) -> dict[str, Any]:
    running = {name: x for name, x in module.named_buffers() if name.split(".")[-1].startswith("running")}
    return {"module": module, "parameters": dict(module.named_parameters()), "running": running}


class Case:
    """One row of the registry."""

    name: str
    image_is_data: bool = False  # whether training computes no gradient of the image

    def convolutions(self, static: bool = False) -> list[Convolution]:
        """All convolutions of one step; a static network has fewer."""
        raise NotImplementedError

    def problem(
        self,
        batch: int,
        static: bool,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
        seed: int,
    ) -> Problem:
        """Random tensors: images and weights in ``dtype``, everything on [B, C] and smaller in float32."""
        raise NotImplementedError

    def forward(self, problem: Problem, layer: Layer | None, mode: Mode, compiler: Any = None) -> Layer:
        """The case as a function of the image, its layers computed by ``layer`` (None: by awnet's).

        ``compiler`` compiles the layer, or the module if there is one.
        """
        raise NotImplementedError

    def flops(self, mode: Mode, batch: int, static: bool = False) -> float:
        return sum(c.flops(mode, batch) for c in self.convolutions(static))

    def bytes(self, mode: Mode, batch: int, item: int, static: bool = False) -> float:
        return sum(c.bytes(mode, batch, item) for c in self.convolutions(static))

    def leaves(self, problem: Problem, mode: Mode) -> dict[str, Tensor]:
        """The tensors other than the image that ``mode`` differentiates. An attack freezes the parameters."""
        if mode == "forward":
            return {}
        signals = problem.signals
        if mode == "attack":
            return signals
        return {name: x for name, x in signals.items() if name != "p_clean"} | problem.parameters


@dataclass(frozen=True)
class LayerCase(Case):
    """Convolution → MixBN → activation, in one call of the functional form."""

    name: str
    convolution: Convolution
    dynamic: bool = True
    relu: bool = True

    def convolutions(self, static: bool = False) -> list[Convolution]:
        return [self.convolution]

    def problem(
        self,
        batch: int,
        static: bool,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
        seed: int,
    ) -> Problem:
        draw = _Draw(seed, device)
        c, rows = self.convolution, 1 if static else 2
        fan_in = c.weights // c.c_out
        layout = torch.channels_last if channels_last else torch.contiguous_format
        image = draw.normal(batch, c.c_in, c.size, c.size)
        weight = draw.normal(c.c_out, fan_in // c.kernel**2, c.kernel, c.kernel) * (2.0 / fan_in) ** 0.5
        scale = (torch.tanh(draw.normal(batch, c.c_out) * 0.3) + 1) ** 3
        return Problem(
            image=image.to(dtype).contiguous(memory_format=layout),
            filter_scales=(scale,) if self.dynamic and not static else (),
            p_clean=None if static else draw.uniform(batch),
            is_clean=None if static else torch.arange(batch, device=device) < batch // 2,
            parameters={
                "weight": weight.to(dtype).contiguous(memory_format=layout),
                "bn_weight": 0.5 + draw.uniform(rows, c.c_out),
                "bn_bias": draw.normal(rows, c.c_out) * 0.2,
            },
            running={
                "running_mean": draw.normal(rows, c.c_out) * 0.2,
                "running_var": 0.5 + draw.uniform(rows, c.c_out),
            },
        )

    def forward(self, problem: Problem, layer: Layer | None, mode: Mode, compiler: Any = None) -> Layer:
        assert layer is not None
        return self._call(
            problem, compiler(layer) if compiler else layer, mode, "relu" if self.relu else None
        )

    def before_activation(self, problem: Problem, layer: Layer, mode: Mode) -> Tensor:
        return self._call(problem, layer, mode, None)(problem.image)

    def _call(self, problem: Problem, layer: Layer, mode: Mode, activation: str | None) -> Layer:
        c, training = self.convolution, mode == "training"
        tables = problem.parameters | problem.running
        weight = tables.pop("weight")
        scale = problem.filter_scales[0] if problem.filter_scales else None
        return lambda image: layer(
            image,
            weight,
            scale,
            **tables,
            p_clean=None if training else problem.p_clean,
            is_clean=problem.is_clean if training else None,
            training=training,
            stride=c.stride,
            padding=c.padding,
            groups=c.groups,
            activation=activation,
        )


@dataclass(frozen=True)
class ModuleCase(Case):
    """A module of awnet.nn: ``build(static)`` makes it, and its static twin."""

    name: str
    build: Callable[[bool], nn.Module]
    channels: int  # of the images
    size: int
    image_is_data: bool = False

    @cache  # noqa: B019, the registry lives as long as the program
    def convolutions(self, static: bool = False) -> list[Convolution]:
        convolutions: list[Convolution] = []

        def note(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            convolutions.append(
                Convolution(
                    module.in_channels,
                    module.out_channels,
                    inputs[0].shape[2],
                    module.kernel_size[0],
                    module.stride[0],
                    module.groups,
                )
            )

        problem = self.problem(1, static, torch.device("cpu"), torch.float32, False, 0)
        assert problem.module is not None
        for module in problem.module.modules():
            if isinstance(module, AWConv2d):
                module.register_forward_hook(note)
        with torch.no_grad():
            self.forward(problem, None, "forward")(problem.image)
        return convolutions

    def problem(
        self,
        batch: int,
        static: bool,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
        seed: int,
    ) -> Problem:
        draw = _Draw(seed, device)
        layout: Any = torch.channels_last if channels_last else torch.contiguous_format
        module = self.build(static).to(device)
        widths = getattr(module, "signal_widths", [])
        with torch.no_grad():
            for part in module.modules():
                if isinstance(part, MixBatchNorm2d):
                    part.weight.copy_(0.5 + draw.uniform(*part.weight.shape))
                    part.bias.copy_(draw.normal(*part.bias.shape) * 0.2)
                    part.running_mean.copy_(draw.normal(*part.running_mean.shape) * 0.2)
                    part.running_var.copy_(0.5 + draw.uniform(*part.running_var.shape))
                elif isinstance(part, AWConv2d | nn.Linear):
                    weight = draw.normal(*part.weight.shape) * (2.0 / part.weight[0].numel()) ** 0.5
                    part.weight.data = weight.to(dtype)
                    if part.bias is not None:
                        part.bias.data = (draw.normal(*part.bias.shape) * 0.2).to(dtype)
        return Problem(
            image=draw.uniform(batch, self.channels, self.size, self.size)
            .to(dtype)
            .contiguous(memory_format=layout),
            filter_scales=()
            if static
            else tuple((torch.tanh(draw.normal(batch, c) * 0.3) + 1) ** 3 for c in widths),
            # a network's router computes the signals
            p_clean=None if static or isinstance(module, _Logits) else draw.uniform(batch),
            is_clean=None if static else torch.arange(batch, device=device) < batch // 2,
            **_parts(module.to(memory_format=layout)),  # type: ignore[call-overload]
        )

    def forward(self, problem: Problem, layer: Layer | None, mode: Mode, compiler: Any = None) -> Layer:
        module = problem.module
        assert module is not None
        module.train(mode == "training")
        if layer is not None:
            for part in module.modules():
                if isinstance(part, AWConv2d):  # the same layer with the same state, computed by ``layer``
                    part.__class__ = _OtherConv2d
                    part.layer = layer  # type: ignore[assignment]
        run: Layer = compiler(module) if compiler else module
        if isinstance(module, _Logits):
            is_clean = problem.is_clean if mode == "training" else None
            return lambda image: run(image, is_clean)
        branch = {"is_clean": problem.is_clean} if mode == "training" else {"p_clean": problem.p_clean}
        return lambda image: run(image, problem.filter_scales, **branch)


class _OtherConv2d(AWConv2d):
    """An AWConv2d that another function computes, one with the arguments of awnet.ops.aw_conv2d."""

    layer: Layer

    def forward(
        self,
        input: Tensor,
        filter_scale: Tensor | None = None,
        *,
        p_clean: Tensor | None = None,
        is_clean: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        return self.layer(
            input,
            self.weight,
            filter_scale,
            self.bn.weight,
            self.bn.bias,
            self.bn.running_mean,
            self.bn.running_var,
            p_clean=None if self.training else p_clean,
            is_clean=is_clean if self.training else None,
            training=self.training,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            residual=residual,
            activation=self.activation,
        )


class _Logits(nn.Module):
    """A network's logits, and an AW-Net's type logits, which training differentiates too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, is_clean: Tensor | None) -> Tensor:
        if not isinstance(self.network, AWNet):
            return self.network(image)
        routing = self.network.route(image)
        logits = self.network(image, is_clean=is_clean, routing=routing)
        assert routing.type_logits is not None
        return torch.cat([logits, routing.type_logits], 1)


class _Draw:
    """Random numbers from the CPU's generator, so that every device gets the same."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)


def _block(channels: int) -> Callable[[bool], nn.Module]:
    def build(static: bool) -> nn.Module:
        if static:
            return AWBasicBlock(channels, channels, dynamic=False, bn="one")
        return AWBasicBlock(channels, channels)

    return build


def _network(dynamic: str, twin: str) -> Callable[[bool], nn.Module]:
    return lambda static: _Logits(create_model(twin if static else dynamic))


# a ResNet-18 on 32×32 images: its four stages, stem, shortcut and the first layer of stage 2, a depthwise
# version of stage 2, a block, and the whole AW-Net
CASES: tuple[Case, ...] = (
    LayerCase("stage1", Convolution(64, 64, 32)),
    LayerCase("stage2", Convolution(128, 128, 16)),
    LayerCase("stage3", Convolution(256, 256, 8)),
    LayerCase("stage4", Convolution(512, 512, 4)),
    LayerCase("stem", Convolution(3, 64, 32), dynamic=False),
    LayerCase("shortcut", Convolution(64, 128, 32, kernel=1, stride=2), dynamic=False, relu=False),
    LayerCase("transition", Convolution(64, 128, 32, stride=2)),
    LayerCase("depthwise", Convolution(128, 128, 16, groups=128)),
    ModuleCase("block", _block(64), 64, 32),
    ModuleCase("network", _network("awnet_resnet18", "resnet18"), 3, 32, image_is_data=True),
)
SMOKE_CASES: tuple[Case, ...] = (
    LayerCase("stage1", Convolution(8, 8, 16)),
    LayerCase("stage2", Convolution(16, 16, 8)),
    LayerCase("stage3", Convolution(24, 24, 4)),
    LayerCase("stage4", Convolution(32, 32, 4)),
    LayerCase("stem", Convolution(3, 8, 16), dynamic=False),
    LayerCase("shortcut", Convolution(8, 16, 16, kernel=1, stride=2), dynamic=False, relu=False),
    LayerCase("transition", Convolution(8, 16, 16, stride=2)),
    LayerCase("depthwise", Convolution(16, 16, 8, groups=16)),
    ModuleCase("block", _block(8), 8, 16),
    ModuleCase("network", _network("awnet_tiny", "resnet_tiny"), 3, 16, image_is_data=True),
)
STAGES = ("stage1", "stage2", "stage3", "stage4")


def make_upstream(case: Case, problem: Problem, mode: Mode, exact: Layer, seed: int) -> Tensor:
    """A random ∂L/∂output in the image's dtype; for a layer it is 0 where rounding could switch the ReLU."""
    precise = problem.to(torch.float64)
    with torch.no_grad():
        if isinstance(case, LayerCase):
            before = case.before_activation(precise, exact, mode)
        else:
            before = case.forward(precise, exact, mode)(precise.image)
    upstream = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed)).to(before.device)
    if isinstance(case, LayerCase) and case.relu:
        upstream = upstream * (before.abs() > _UNDECIDED[problem.image.dtype])
    upstream = upstream.to(problem.image.dtype)
    if upstream.dim() == 4 and problem.image.is_contiguous(memory_format=torch.channels_last):
        upstream = upstream.contiguous(memory_format=torch.channels_last)
    return upstream


def step(
    forward: Layer,
    image: Tensor,
    leaves: dict[str, Tensor],
    running: dict[str, Tensor],
    mode: Mode,
    upstream: Tensor | None,
) -> dict[str, Tensor]:
    """One forward and, unless ``mode`` is forward, the gradients of ``leaves`` for ``upstream`` = ∂L/∂output.

    In training the running statistics, which the forward has updated, are among the results.
    """
    if mode == "forward":
        with torch.no_grad():
            return {"output": forward(image)}
    output = forward(image)
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
    results = {"output": output.detach()}
    results |= {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}
    return results | running if mode == "training" else results

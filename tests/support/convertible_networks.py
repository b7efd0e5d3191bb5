"""Networks that convert takes or refuses, and checks of the converted ones."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from awnet.nn import (
    AWConv2d,
    AWNet,
    FilterScaledConv2d,
    MixBatchNorm2d,
)

ROUTER = {"router_widths": (4, 6)}


class Residual(nn.Module):
    """Convolutions with bias, a depthwise one, ReLU as module, function and method, additions of every kind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)  # used several times
        self.conv1 = nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect")
        self.norm1 = nn.BatchNorm2d(8, eps=1e-3, momentum=None)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm2 = nn.BatchNorm2d(8, affine=False)
        self.conv3 = nn.Conv2d(8, 12, 3, 2, 1)
        self.norm3 = nn.BatchNorm2d(12)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, 2), nn.BatchNorm2d(12), nn.Identity())
        self.conv4 = nn.Conv2d(12, 12, 3, padding=1)
        self.norm4 = nn.BatchNorm2d(12)
        self.conv5 = nn.Conv2d(12, 12, 3, padding=2, dilation=2)
        self.norm5 = nn.BatchNorm2d(12)
        self.bare = nn.Conv2d(12, 6, 3)  # no batch norm behind it
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.relu(self.stem_norm(self.stem(x)))
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.depthwise(y))
        y += x  # in place
        x = self.relu(y)
        y = torch.relu(torch.add(self.shortcut(x), self.norm3(self.conv3(x))))
        x = (self.norm4(self.conv4(y)).add(y)).relu()
        x = x + self.norm5(self.conv5(x))  # no ReLU behind it
        x = F.relu(self.bare(x), inplace=True)
        return self.fc(self.dropout(x.mean((2, 3))))


def trained(module: nn.Module, in_channels: int = 3, steps: int = 4) -> nn.Module:
    """``module`` after a few steps, so that weights and running statistics are far from the start."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for step in range(steps):
        x = 0.3 * step + torch.rand(8, in_channels, 8, 8, generator=generator)
        loss = F.cross_entropy(module(x), torch.arange(8) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module


def kinds_of(network: AWNet) -> dict[str, str]:
    """Name → what each convolution and batch norm of the dynamic network has become."""
    found = {}
    for name, module in network.dynamic.named_modules():
        if isinstance(module, AWConv2d):
            found[name] = f"{'dynamic' if module.dynamic else 'static'} fused {module.activation}"
        elif isinstance(module, FilterScaledConv2d):
            found[name] = "dynamic"
        elif isinstance(module, nn.Conv2d):
            found[name] = "static"
        elif isinstance(module, MixBatchNorm2d) and not name.endswith(".bn"):
            found[name] = "norm"
    return found


def check_same_logits(original: nn.Module, network: AWNet, in_channels: int = 3) -> None:
    x = torch.rand(5, in_channels, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = copy.deepcopy(original).eval()(x)
        got = copy.deepcopy(network).eval()(x)
    # float32: batch norm as one affine map rounds otherwise than torch's does
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def check_trains(network: AWNet, in_channels: int = 3) -> None:
    """Training mode works, reaches every parameter, moves both branches apart."""
    network = copy.deepcopy(network).train()
    x, mask = torch.rand(8, in_channels, 8, 8), torch.arange(8) < 4
    with pytest.raises(ValueError, match="is_clean is missing"):
        network(x)
    routing = network.route(x)
    logits = network(x + mask[:, None, None, None], is_clean=mask, routing=routing)
    loss = F.cross_entropy(logits, torch.arange(8) % 5) + F.cross_entropy(routing.type_logits, mask.long())
    loss.backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and not name.startswith(
            "router.backbone"
        ):  # zero behind zero heads at first
            assert parameter.grad is not None, name
    assert network.router.type_head.weight.grad.any()
    if network.router.signal_heads is not None:
        assert network.router.signal_heads.weight.grad.any()
    norms = [m for m in network.dynamic.modules() if isinstance(m, MixBatchNorm2d)]
    assert all(not torch.equal(m.running_mean[0], m.running_mean[1]) for m in norms)


# --- refusals


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3)) if x.sum() > 0 else x.mean((2, 3))


class Aliased(Branching):
    """The image of the batch norm is changed in place through another name and then used again."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        z = torch.ones_like(y)
        kept = z
        z += y
        return (kept + z).mean((2, 3))


def line_of(function: Callable[..., object], text: str) -> str:
    """``file:line`` of the line of ``function`` that has ``text``."""
    lines, first = inspect.getsourcelines(function)
    return f"{inspect.getfile(function)}:{next(first + i for i, line in enumerate(lines) if text in line)}"

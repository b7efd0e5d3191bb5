"""What convert refuses, and what it checks before it returns."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from support.convertible_networks import (
    ROUTER,
    Aliased,
    Branching,
    Residual,
    check_same_logits,
    line_of,
    trained,
)
from torch import nn

from awnet.models import create_model
from awnet.nn import (
    AWConv2d,
    FilterScaledConv2d,
    MixBatchNorm2d,
    convert,
)


class TwoInputs(Branching):
    def forward(self, x, scale):
        return self.norm(self.conv(x)).mean((2, 3)) * scale


class Features(Branching):
    def forward(self, x):
        return self.norm(self.conv(x))


def simple(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def hooked() -> nn.Module:
    module = simple(nn.BatchNorm2d(4))
    module[1].register_forward_hook(lambda *_: None)
    return module


def hooked_root() -> nn.Module:
    module = simple(nn.BatchNorm2d(4))
    module.register_forward_pre_hook(lambda *_: None)
    return module


class Recording(Branching):
    def forward(self, x):
        y = self.norm(self.conv(x))
        self.last = y
        return y.mean((2, 3))


class BatchSize(Branching):
    def forward(self, x):
        y = self.norm(self.conv(x)).mean((2, 3))
        return y + torch.arange(len(x))[:, None]


class NoGrad(Branching):
    def forward(self, x):
        with torch.no_grad():
            x = self.conv(x)
        return self.norm(x).mean((2, 3))


class Autocast(Branching):
    def forward(self, x):
        x = self.norm(self.conv(x))
        with torch.autocast(x.device.type, enabled=False):
            return x.mean((2, 3))


class CoinFlip(Branching):
    def forward(self, x):
        scale = random.random()
        return scale * self.norm(self.conv(x)).mean((2, 3))


class OtherInTraining(Branching):
    def forward(self, x):
        y = self.norm(self.conv(x)).mean((2, 3))
        return (y, y) if self.training else y


class NormInTraining(Branching):
    """A batch norm that runs in train mode only."""

    def __init__(self):
        super().__init__()
        self.noisy = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.training:
            y = self.noisy(y)
        return y.mean((2, 3))


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


class FunctionalNorm(Branching):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return F.batch_norm(y, self.norm.running_mean, self.norm.running_var).mean((2, 3))


def hooked_block() -> nn.Module:
    module = nn.Sequential(simple(nn.BatchNorm2d(4)))
    module[0].register_forward_hook(lambda *_: None)
    return module


def frozen() -> nn.Module:
    module = Residual().train()
    module.norm3.eval()
    return module


REFUSED = {
    "branches on a tensor": (
        Branching,
        f"Branching cannot be traced by torch.fx: {line_of(Branching.forward, 'if')}: it depends on the values",
    ),
    "assigns an attribute": (Recording, f"{line_of(Recording.forward, 'last')}: it assigns Recording.last"),
    "the batch size as an integer": (
        BatchSize,
        rf"BatchSize cannot be converted for batches of every size.* len\(x\) .*"
        rf" at {line_of(BatchSize.forward, 'len')}",
    ),
    "no_grad": (NoGrad, rf"{line_of(NoGrad.forward, 'self.conv')}: it runs under torch\.no_grad"),
    "autocast": (Autocast, rf"{line_of(Autocast.forward, 'autocast')}: it runs under torch\.autocast"),
    "random numbers of Python": (
        CoinFlip,
        f"{line_of(CoinFlip.forward, 'norm')}: before this line .* random",
    ),
    "returns more in train mode": (
        OtherInTraining,
        f"OtherInTraining.forward, defined at {line_of(OtherInTraining.forward, 'def')}, returns something else",
    ),
    "a norm of one mode": (
        NormInTraining,
        rf"cannot convert 'noisy' \(BatchNorm2d\) at {line_of(NormInTraining.forward, 'noisy')}: .* train mode",
    ),
    "a norm of another kind": (
        lambda: simple(DoubledNorm(4)),
        rf"cannot convert '1' \(DoubledNorm\).*: its forward, defined at {line_of(DoubledNorm.forward, 'def')}",
    ),
    "batch norm as a function": (
        FunctionalNorm,
        f"cannot convert 'batch_norm' at {line_of(FunctionalNorm.forward, 'F.batch_norm')}: batch_norm is called",
    ),
    "two inputs": (
        TwoInputs,
        r"must take one image tensor and nothing else, got \['x', 'scale'\]; it is defined at "
        + line_of(TwoInputs.forward, "def"),
    ),
    "no logits": (Features, r"must return logits \[B, K\], got \[3, 4, 30, 30\]"),
    "an alias changed in place": (Aliased, "logits are off by .* changing in place"),
    "no batch norm": (lambda: simple(nn.ReLU()), "Sequential has no nn.BatchNorm2d"),
    "batch norm of vectors alone": (
        lambda: nn.Sequential(simple(), nn.SyncBatchNorm(4)),
        r"Sequential has no batch norm over images \[B, C, H, W\]",
    ),
    "lazy": (lambda: simple(nn.LazyBatchNorm2d()), "Sequential has lazy modules"),
    "no statistics": (
        lambda: simple(nn.BatchNorm2d(4, track_running_stats=False)),
        r"cannot convert '1' \(BatchNorm2d\).*: it keeps no running statistics",
    ),
    "frozen": (
        frozen,
        rf"cannot convert 'norm3' \(BatchNorm2d\) at {line_of(Residual.forward, 'norm3')}: it is frozen",
    ),
    "hooks": (hooked, r"cannot convert '1' \(BatchNorm2d\).*: it has forward hooks"),
    "hooks of a block": (hooked_block, r"'0' \(Sequential\) has hooks, which tracing would lose"),
    "hooks of the whole": (hooked_root, "Sequential has forward hooks"),
    "an AW-Net": (lambda: create_model("awnet_tiny"), "is an AW-Net already"),
    "a dynamic network": (
        lambda: create_model("awnet_tiny").dynamic,
        r"'stem' \(AWConv2d\): .*two branches already",
    ),
    "a dynamic layer": (
        lambda: simple(FilterScaledConv2d(4, 4, 3)),
        r"cannot convert '1' \(FilterScaledConv2d\)",
    ),
    "a two-branch norm": (
        lambda: simple(MixBatchNorm2d(4)),
        r"'1' \(MixBatchNorm2d\): it has two branches",
    ),
    "a fused RepVGG": (
        lambda: create_model("repvgg_a2", width=0.05, fused=True),
        "RepVGG has no nn.BatchNorm2d",
    ),
    "a two-branch layer": (lambda: simple(AWConv2d(4, 4, 3, dynamic=False)), r"'1' \(AWConv2d\).*already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_convert_refuses_unsupported_modules_by_name(case):
    make, message = REFUSED[case]
    module = make()
    modes = [m.training for m in module.modules()]
    with pytest.raises(ValueError, match=message):
        convert(module, **ROUTER)
    assert [m.training for m in module.modules()] == modes


def test_convert_refuses_other_objects_than_modules():
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got function"):
        convert(lambda x: x)


def test_convert_infers_the_number_of_channels():
    class Shifted(Branching):
        def forward(self, x):
            return self.norm(self.conv(x - 0.5)).mean((2, 3))

    check_same_logits(module := Shifted(), convert(module, **ROUTER))
    with pytest.raises(ValueError, match=r"fails on images \[3, 2, 32, 32\].*pass in_channels"):
        convert(Shifted(), in_channels=2, **ROUTER)


def test_convert_compares_logits_before_it_returns(monkeypatch):
    """A rewriting that changes the function is caught: here one that loses the convolution's bias."""
    keep = MixBatchNorm2d.from_batch_norm.__func__
    monkeypatch.setattr(
        MixBatchNorm2d,
        "from_batch_norm",
        classmethod(lambda cls, norm, branches, bias=None: keep(cls, norm, branches)),
    )
    with pytest.raises(ValueError, match="logits are off by"):
        convert(trained(Residual()), **ROUTER)

"""Conversion of existing CNNs: the same logits before training, the right layers, and refusals by name."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import pickle
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.extras import optional
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from awnet.models import create_model, load_model, save_model
from awnet.nn import (
    AdversarialRouter,
    AWConv2d,
    AWNet,
    FilterScaledConv2d,
    FixedRouter,
    MixBatchNorm2d,
    Routing,
    convert,
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


class PreActivation(nn.Module):
    """Batch norm first: nothing to fuse around the addition."""

    def __init__(self):
        super().__init__()
        self.norm0 = nn.BatchNorm2d(3)
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv0(self.relu(self.norm0(x)))
        y = self.conv1(self.relu(self.norm1(x)))
        x = x + self.conv2(self.relu(self.norm2(y)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Dense(nn.Module):
    """Concatenation, squeeze and excitation, ReLU6, two stems, a value shared by two batch norms."""

    def __init__(self):
        super().__init__()
        self.stems = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 5, padding=2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.wide = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.squeeze = nn.Conv2d(16, 16, 1)
        self.last = nn.Sequential(nn.Conv2d(16, 4, (1, 3)), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.cat([stem(x) for stem in self.stems], 1)
        x = self.depthwise(self.wide(self.norms[0](x) * self.norms[1](x).sigmoid()))
        x = x * self.squeeze(F.adaptive_avg_pool2d(x, 1)).sigmoid()
        return self.fc(torch.add(self.last(x), x[:, :4, :, 1:-1], alpha=2).amax((2, 3)))


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


def test_residual_network_is_fused_wherever_it_can_be():
    original = trained(Residual())
    before = copy.deepcopy(original.state_dict())
    network = convert(original, **ROUTER)
    assert network.training  # as the original was
    check_same_logits(original, network)
    assert kinds_of(network) == {
        "stem": "static fused relu",
        "conv1": "dynamic fused relu",
        "depthwise": "dynamic fused relu",
        "conv3": "dynamic fused relu",
        "shortcut.0": "static fused None",
        "conv4": "dynamic fused relu",
        "conv5": "dynamic fused None",
        "bare": "dynamic",
    }
    assert network.router.signal_widths == [8, 8, 12, 12, 12, 6]
    assert network.dynamic.conv1.bn.momentum is None
    check_trains(network)
    # the original is untouched and shares nothing
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    originals = {p.data_ptr() for p in original.parameters()}
    assert not originals & {p.data_ptr() for p in network.parameters()}
    assert original.training


def test_filter_scales_reach_their_own_convolution():
    network = convert(trained(Residual()), **ROUTER).eval()
    x = torch.rand(3, 3, 8, 8)
    base = network.route(x)
    names = ["conv1", "depthwise", "conv3", "conv4", "conv5", "bare"]
    seen: dict[str, torch.Tensor] = {}
    for name in names:
        network.dynamic.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output.detach())
        )
    network(x, routing=base)
    reference = dict(seen)
    for i, name in enumerate(names):
        scales = list(base.filter_scales)
        scales[i] = 1 + torch.rand_like(scales[i])
        network(x, routing=type(base)(base.type_logits, base.p_clean, scales))
        changed = [other for other in names if not torch.equal(seen[other], reference[other])]
        assert changed[0] == name


def test_preactivation_network_is_right_without_fusing():
    original = trained(PreActivation()).eval()
    network = convert(original, **ROUTER)
    assert not network.training
    check_same_logits(original, network)
    assert kinds_of(network) == {
        "norm0": "norm",
        "conv0": "static",
        "norm1": "norm",
        "conv1": "dynamic fused relu",  # with norm2, which nothing else follows
        "conv2": "dynamic",
    }
    check_trains(network)


def test_dense_network_with_two_stems():
    original = trained(Dense())
    network = convert(original, in_channels=3, **ROUTER)
    check_same_logits(original, network)
    assert kinds_of(network) == {
        "stems.0": "static",
        "stems.1": "static",
        "norms.0": "norm",
        "norms.1": "norm",
        "wide.0": "static fused None",
        "depthwise.0": "dynamic fused None",
        "squeeze": "static",
        "last.0": "dynamic fused None",
    }
    check_trains(network)


@pytest.mark.parametrize("name", ["resnet_tiny", "resnet18"])
def test_static_networks_of_the_package_are_fused(name):
    original = trained(create_model(name, num_classes=5, in_channels=1), in_channels=1)
    network = convert(original, **ROUTER)
    check_same_logits(original, network, in_channels=1)
    twin = create_model("awnet_" + name.removeprefix("resnet_"), num_classes=5, in_channels=1)
    assert network.router.signal_widths == twin.dynamic.signal_widths
    assert network.dynamic.state_dict().keys() == twin.dynamic.state_dict().keys()
    check_trains(network, in_channels=1)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(network.eval()))(x), network(x))


@pytest.mark.parametrize(
    ("name", "twin", "width"),
    [
        ("resnet34", "awnet_resnet34", 0.05),
        ("resnet50", "awnet_resnet50", 0.05),
        ("wrn34_10", "awnet_wrn34_10", 0.04),
        ("mobilenet_v2", "awnet_mobilenet_v2", 0.1),
    ],
)
def test_static_networks_become_their_awnets(name, twin, width):
    original = trained(create_model(name, num_classes=5, width=width))
    network = convert(original, **ROUTER)
    check_same_logits(original, network)
    dynamic = create_model(twin, num_classes=5, width=width).dynamic
    assert network.router.signal_widths == dynamic.signal_widths
    assert network.dynamic.state_dict().keys() == dynamic.state_dict().keys()
    check_trains(network)


@pytest.mark.parametrize(("name", "dynamic"), [("vgg16_bn", 12), ("repvgg_a2", 21)])
def test_plain_networks_become_dynamic(name, dynamic):
    original = trained(create_model(name, num_classes=5, width=0.06))
    network = convert(original, **ROUTER)
    check_same_logits(original, network)
    assert len(network.router.signal_widths) == dynamic  # the 3×3 convolutions but the first
    check_trains(network)


@pytest.mark.parametrize("bn", ["mix", "dual", "one"])
def test_convert_applies_its_options(bn):
    original = trained(Residual())
    network = convert(original, bn=bn, filter_scaling=False, beta=2.0, **ROUTER)
    check_same_logits(original, network)
    assert {m.branches for m in network.dynamic.modules() if isinstance(m, MixBatchNorm2d)} == {bn}
    assert network.router.signal_widths == []
    assert not any(
        isinstance(m, FilterScaledConv2d) and not isinstance(m, AWConv2d) for m in network.modules()
    )


def test_convert_takes_a_router_of_the_caller():
    original = trained(Residual())
    router = AdversarialRouter([8, 8, 12, 12, 12, 6], widths=(4,), blocks=(1,), beta=1.0)
    network = convert(original, router=router)
    assert network.router is router
    check_same_logits(original, network)
    assert isinstance(convert(original, router=FixedRouter("mix"), filter_scaling=False).router, FixedRouter)
    with pytest.raises(
        ValueError, match=r"router\.signal_widths must be .*\[8, 8, 12, 12, 12, 6\], got \[3\]"
    ):
        convert(original, router=AdversarialRouter([3], widths=(4,)))


def test_a_trained_router_scales_the_filters_from_the_start():
    original = trained(Residual())
    router = AdversarialRouter([8, 8, 12, 12, 12, 6], widths=(4,))
    with torch.no_grad():
        router.signal_heads.weight.normal_()
    weights = copy.deepcopy(router.state_dict())
    network = convert(original, router=router).eval()
    assert network.router is router
    assert all(torch.equal(value, weights[name]) for name, value in router.state_dict().items())
    x = torch.rand(4, 3, 8, 8)
    expected, routing = original.eval()(x), network.route(x)
    assert not torch.allclose(network(x), expected, rtol=1e-2)
    assert torch.equal(network(x), network(x, routing=routing))
    ones = [torch.ones_like(scale) for scale in routing.filter_scales]
    # float32, the batch norms folded
    torch.testing.assert_close(
        network(x, routing=Routing(None, routing.p_clean, ones)), expected, rtol=1e-4, atol=1e-5
    )
    check_trains(convert(original, router=router))


def test_a_router_that_does_not_fit_is_refused():
    original, widths = Residual(), [8, 8, 12, 12, 12, 6]
    with pytest.raises(TypeError, match="router must be an AdversarialRouter or a FixedRouter, got Linear"):
        convert(original, router=nn.Linear(3, 2))
    with pytest.raises(ValueError, match="of 3 channels, but was created with in_channels=1"):
        convert(original, router=AdversarialRouter(widths, widths=(4,), in_channels=1))
    with pytest.raises(ValueError, match="of 3 channels, but was created with in_channels=2"):
        convert(original, router=FixedRouter(in_channels=2), filter_scaling=False)
    with pytest.raises(ValueError, match=r"cpu and torch\.float32, got cpu and torch\.float64: move it"):
        convert(original, router=AdversarialRouter(widths, widths=(4,)).double())


def test_any_p_gives_the_original_and_samples_stay_apart():
    original = trained(Residual()).eval()
    network = convert(original, **ROUTER)
    x = torch.rand(4, 3, 8, 8)
    routing = network.route(x)
    for p in (0.0, 0.3, 1.0):
        routing.p_clean = torch.full((4,), p)
        torch.testing.assert_close(network(x, routing=routing), original(x), rtol=1e-4, atol=1e-5)
    spoilt = x.clone()
    spoilt[1:] = float("nan")
    assert torch.equal(network(spoilt)[0], network(x)[0])


def test_copies_and_state_survive(tmp_path):
    original = trained(Residual())
    network = convert(original, **ROUTER).eval()
    x = torch.rand(2, 3, 8, 8)
    twin = convert(Residual(), **ROUTER).eval()
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin(x), network(x))
    assert torch.equal(copy.deepcopy(network)(x), network(x))
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))
    save_model(network, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"which awnet cannot build.*model=my_model"):
        load_model(tmp_path / "a.safetensors")
    loaded = load_model(tmp_path / "a.safetensors", model=convert(Residual(), **ROUTER))
    assert torch.equal(loaded(x), network(x))


def test_tied_weights_stay_tied_and_frozen_ones_frozen():
    original = Residual()
    original.conv5.weight = original.conv4.weight
    original.conv3.weight.requires_grad_(False)
    original.norm3.requires_grad_(False)
    network = convert(original, **ROUTER)
    assert network.dynamic.conv5.weight is network.dynamic.conv4.weight
    assert not network.dynamic.conv3.weight.requires_grad
    assert not network.dynamic.conv3.bn.weight.requires_grad
    assert network.dynamic.conv4.bn.weight.requires_grad


def test_double_precision_and_one_channel():
    original = (
        trained(create_model("resnet_tiny", num_classes=5, in_channels=1), in_channels=1).double().eval()
    )
    network = convert(original, **ROUTER)
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(network(x), original(x), rtol=1e-12, atol=1e-12)


def test_the_size_of_the_example_images_can_matter():
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(4 * 4 * 6, 3),
    )
    with pytest.raises(
        ValueError, match=r"fails on images \[3, 2, 32, 32\].*pass in_channels and image_size"
    ):
        convert(module, **ROUTER)
    network = convert(module, image_size=(8, 10), **ROUTER)
    assert kinds_of(network) == {"0": "static fused relu", "3": "dynamic"}


def test_dropout_and_other_modules_keep_working():
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Hardswish(),
        nn.Dropout2d(0.5),
        nn.Conv2d(4, 8, 3),
        nn.GroupNorm(2, 8),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    network = convert(module, **ROUTER)
    assert kinds_of(network) == {"0": "static fused None", "4": "dynamic"}
    check_same_logits(module, network)
    x, mask = torch.rand(4, 3, 8, 8), torch.arange(4) < 2
    assert not torch.equal(network(x, is_clean=mask), network(x, is_clean=mask))  # dropout draws again


# --- networks with something of their own


class NormAct(nn.BatchNorm2d):
    """Batch norm → dropout → activation in one module with a copy of batch norm's forward, as in timm."""

    def __init__(self, channels, act=None, drop=None):
        super().__init__(channels)
        self.drop = drop or nn.Identity()
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class CastNorm(nn.BatchNorm2d):
    """Plain batch norm under another name."""

    def forward(self, input):
        return super().forward(input.float() if input.dtype == torch.bfloat16 else input)


class OwnConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(F.pad(input, (0, 1, 0, 1))) * 2


class DropPath(nn.Module):
    """Stochastic depth."""

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).round() * 2


def drop_path(x, p, training):
    if p == 0.0 or not training:
        return x
    return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - p).div_(1 - p)


class Own(nn.Module):
    """What CNNs in the wild do: norm with activation, dropout by mode, stochastic depth, shape checks, shared
    modules, convolutions of other classes, batch norm of vectors, options of forward."""

    def __init__(self):
        super().__init__()
        self.stem = OwnConv(3, 8, 3)
        self.norm0 = NormAct(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), NormAct(8, nn.PReLU(8), nn.Dropout2d(0.25))
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), CastNorm(8)
        self.depth = DropPath()
        self.position = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.shared_conv, self.shared_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.alias = self.shared_norm
        self.spectral = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.norm3 = nn.BatchNorm2d(8)
        self.conv4, self.norm4 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.register_buffer("blur", torch.full((8, 1, 3, 3), 1 / 9))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x, mask=None, scale=1.0, *, features=False):
        if x.shape[1] != 3:
            raise ValueError("three channels")
        torch._assert(x.size(-1) > 1, "two pixels")
        b, _, h, w = x.shape
        x = self.norm0(self.stem(x))
        x = x + self.depth(self.norm2(self.conv2(self.norm1(self.conv1(x)))))
        x = x + drop_path(self.shared_norm(self.shared_conv(x)), 0.3, self.training)
        x = x + drop_path(self.alias(self.shared_conv(x)), 0.0, self.training)
        x = self.norm4(self.conv4(x)) + self.position  # broadcast, so no residual of a fused layer
        if h % 2 or w % 2:
            x = F.pad(x, (0, w % 2, 0, h % 2))
        if self.training:
            x = x + 0.1 * torch.rand_like(x)
        x = F.relu(self.norm3(self.spectral(F.conv2d(x, self.blur, padding=1, groups=8))))
        x = x.view(b, -1, x.shape[2] * x.shape[3]).mean(2) + torch.zeros(b, 8, dtype=x.dtype)
        x = F.dropout(x, p=0.2, training=self.training)
        x = x if mask is None else x * mask
        return x if features else self.head(x * scale) * (1.0 if self.training else math.ceil(h / 100))


def check_same_in_train_mode(original: nn.Module, network: AWNet, x: torch.Tensor) -> None:
    """With clean samples alone, the clean branch is the original: same logits, draws, statistics. In float64."""
    original, network = copy.deepcopy(original).double().train(), copy.deepcopy(network).double().train()
    x = x.double()
    routing = network.route(x)
    torch.manual_seed(5)
    expected = original(x)
    torch.manual_seed(5)
    got = network(x, is_clean=torch.ones(len(x), dtype=torch.bool), routing=routing)
    # float64, sums in another order; batch norms over few values enlarge the difference
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(got, expected, **close)
    original.eval(), network.eval()
    routing.p_clean = torch.ones_like(routing.p_clean)
    torch.testing.assert_close(network(x, routing=routing), original(x), **close)


def test_a_network_of_custom_modules_is_converted():
    original = trained(Own())
    assert original.shared_norm.num_batches_tracked == 8
    network = convert(original, image_size=8, **ROUTER)
    check_same_logits(original, network)
    assert kinds_of(network) == {
        "stem": "static",
        "norm0.norm": "norm",
        "conv1": "dynamic fused None",
        "conv2": "dynamic fused None",
        "shared_conv": "dynamic",
        "shared_norm": "norm",
        "conv4": "dynamic fused None",
        "spectral": "static",
        "norm3": "norm",
    }
    assert type(network.dynamic.norm0.act) is nn.ReLU
    assert type(network.dynamic.head[1]) is nn.BatchNorm1d  # kept, static
    assert parametrize.is_parametrized(network.dynamic.spectral)
    check_trains(network)
    check_same_in_train_mode(original, network, torch.rand(6, 3, 8, 8))
    check_same_logits(original, copy.deepcopy(network))


def test_the_batch_may_have_any_size_and_other_image_sizes_raise_where_forward_depends_on_them():
    original = trained(Own()).eval()
    network = convert(original, image_size=8, **ROUTER).eval()
    for shape in ((1, 3, 8, 8), (7, 3, 8, 8), (2, 3, 12, 10)):  # the same path
        x = torch.rand(shape)
        torch.testing.assert_close(network(x), original(x), rtol=1e-5, atol=1e-5)  # float32, folded norms
    where = line_of(Own.forward, "if h % 2")
    with pytest.raises(
        ValueError, match=f"forward depends on the images' shape, .* at {where}: .*image_size"
    ):
        network(torch.rand(2, 3, 9, 8))
    odd = convert(original, image_size=9, **ROUTER).eval()
    x = torch.rand(2, 3, 9, 8)
    torch.testing.assert_close(odd(x), original(x), rtol=1e-5, atol=1e-5)


def test_a_converted_network_of_both_modes_can_be_copied_and_pickled():
    module = Own()
    module.spectral = nn.Conv2d(8, 8, 3, padding=1)  # parametrized modules refuse to be pickled
    network = convert(trained(module), image_size=8, **ROUTER).eval()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(copy.deepcopy(network)(x), network(x))
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))
    twin = Own()
    twin.spectral = nn.Conv2d(8, 8, 3, padding=1)
    twin = convert(twin, image_size=8, **ROUTER).eval()
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin(x), network(x))


class HeadByMode(nn.Module):
    """One classifier in train mode, the average of two in eval mode, as in LeViT; a guard in one mode alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc, self.other = nn.Linear(4, 5), nn.Linear(4, 5)
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, x):
        noise = torch.rand(1, dtype=x.dtype) if self.training else None
        x = self.norm(self.conv(x)).mean((2, 3))
        if self.training:
            return self.fc(x + noise) + self.other(x).detach() * 0
        return (self.fc(x) + self.other(x)) / 2 + (self.shift if x.shape[1] > 3 else 0)


def test_parts_that_depend_on_the_mode_keep_the_names_of_their_state(tmp_path):
    original = trained(HeadByMode())
    network = convert(original, image_size=8, **ROUTER)
    check_same_logits(original, network)
    check_same_in_train_mode(original, network, torch.rand(6, 3, 8, 8))
    names = {name for name in network.dynamic.state_dict() if not name.startswith("conv.")}
    assert names == {"fc.weight", "fc.bias", "other.weight", "other.bias", "shift"}
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(network)).eval()(x), network.eval()(x))


class Normalize(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6])[:, None, None])

    def forward(self, x):
        return (x - self.mean) / 0.25


class Synced(nn.Module):
    """Batch norms of images and of vectors, after ``convert_sync_batchnorm``."""

    def __init__(self):
        super().__init__()
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(144))
        self.features = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
        self.fc = nn.Linear(144, 5)

    def forward(self, x):
        return self.fc(self.features(x))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


WRAPPED = {  # as it is converted, and without the wrapper
    "Sequential(Normalize, network)": lambda net: (nn.Sequential(Normalize(), net),) * 2,
    "DataParallel": lambda net: (nn.DataParallel(net), net),
    "DataParallel inside": lambda net: (
        nn.Sequential(Normalize(), nn.DataParallel(net)),
        nn.Sequential(Normalize(), net),
    ),
    "compiled": lambda net: (compiled(net), net),
    "compiled inside": lambda net: (
        nn.Sequential(Normalize(), compiled(net)),
        nn.Sequential(Normalize(), net),
    ),
    "compiled in place": lambda net: (compiled_in_place(copy.deepcopy(net)), net),
    "averaged": lambda net: (torch.optim.swa_utils.AveragedModel(net),) * 2,
    "SyncBatchNorm": lambda net: (Synced(),) * 2,
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_are_looked_through(case):
    original, plain = WRAPPED[case](trained(Residual()))
    network = convert(original, image_size=8, **ROUTER)
    check_same_logits(plain, network)
    check_trains(network)
    assert not any(
        isinstance(m, nn.DataParallel) or type(m).__name__ == "OptimizedModule" for m in network.modules()
    )
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [type(m) for m in norms] == (
        [nn.SyncBatchNorm] if case == "SyncBatchNorm" else []
    )  # of the vectors


def test_hooks_and_forwards_of_parts_that_are_kept_survive():
    original = trained(Residual())
    seen = []
    for part in (original.bare, original.dropout, original.fc):
        part.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    original.conv5.forward = lambda x, conv=original.conv4: conv(x) * 0.5
    network = convert(original, image_size=8, **ROUTER)
    check_same_logits(original, network)
    kinds = kinds_of(network)
    assert (kinds["bare"], kinds["conv5"]) == ("static", "static")
    seen.clear()
    network.eval()(torch.rand(2, 3, 8, 8))
    assert seen == [nn.Conv2d, nn.Dropout, nn.Linear]


def test_modes_and_frozen_parameters_carry_over():
    original = trained(Residual())
    original.norm3.bias.requires_grad_(False)
    original.dropout.eval()
    network = convert(original, **ROUTER)
    norm = network.dynamic.conv3.bn
    assert (norm.weight.requires_grad, norm.bias.requires_grad) == (True, False)
    assert network.training
    assert not network.dynamic.dropout.training


def test_a_fault_behind_a_zero_initialized_batch_norm_is_found():
    class Hidden(Aliased):
        def forward(self, x):
            y = self.conv(x)
            return y.mean((2, 3)) + super().forward(x)

    module = Hidden()
    nn.init.zeros_(module.norm.weight)
    with pytest.raises(ValueError, match="logits are off by"):
        convert(module, **ROUTER)


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    "make", [small_cnn, lambda: create_model("resnet_tiny"), lambda: create_model("resnet18")]
)
def test_the_default_router_is_no_larger_than_the_network(make, caplog):
    module = make()
    with caplog.at_level(logging.INFO, "awnet"):
        network = convert(module)
    sizes = count(network.dynamic), count(network.router)
    assert sizes[0] / 5 < sizes[1] <= sizes[0]
    assert f"{sizes[0]:,} parameters in the dynamic network, {sizes[1]:,} in its router" in caplog.text
    assert f"parameters: {sizes[0]:,} in dynamic, {sizes[1]:,} in router" in repr(network)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_router_larger_than_the_network_is_a_warning(caplog):
    with caplog.at_level(logging.INFO, "awnet"):
        network = convert(small_cnn(), router_widths=(16, 32))
    assert network.router.backbone.stem.out_channels == 16
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_resnet_of_timm_is_converted():
    timm = optional("timm")
    original = trained(timm.create_model("resnet18", num_classes=5)).eval()
    network = convert(original, **ROUTER)
    check_same_logits(original, network)
    assert len(network.router.signal_widths) == 16


# --- refusals


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3)) if x.sum() > 0 else x.mean((2, 3))


class TwoInputs(Branching):
    def forward(self, x, scale):
        return self.norm(self.conv(x)).mean((2, 3)) * scale


class Features(Branching):
    def forward(self, x):
        return self.norm(self.conv(x))


class Aliased(Branching):
    """The image of the batch norm is changed in place through another name and then used again."""

    def forward(self, x):
        y = self.norm(self.conv(x))
        z = torch.ones_like(y)
        kept = z
        z += y
        return (kept + z).mean((2, 3))


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


def line_of(function: Callable[..., object], text: str) -> str:
    """``file:line`` of the line of ``function`` that has ``text``."""
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{next(first + i for i, line in enumerate(lines) if text in line)}"


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

"""Conversion of existing CNNs: the same logits before training, the right layers, and refusals by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.convertible_networks import ROUTER, Residual, check_same_logits, check_trains, kinds_of, trained
from support.extras import optional
from torch import nn

from awnet.models import create_model, load_model, save_model
from awnet.nn import (
    AdversarialRouter,
    AWConv2d,
    FilterScaledConv2d,
    FixedRouter,
    MixBatchNorm2d,
    Routing,
    convert,
)


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


class Activations(nn.Module):
    """Convolution → batch norm → an activation, as module and function: those that a fused layer has, and others."""

    def __init__(self):
        super().__init__()
        self.acts = nn.ModuleList(
            [nn.SiLU(inplace=True), nn.GELU(), nn.LeakyReLU(), nn.GELU(approximate="tanh"), nn.LeakyReLU(0.1)]
        )
        self.functions = (
            lambda x: F.silu(x, inplace=True), F.gelu, F.leaky_relu, lambda x: F.gelu(x, approximate="tanh"),
            lambda x: F.leaky_relu(x, 0.1), lambda x: F.leaky_relu_(x, negative_slope=0.01), F.hardswish,
        )  # fmt: skip
        count = len(self.acts) + len(self.functions)
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(count))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(count))
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        for i, act in enumerate((*self.acts, *self.functions)):
            y = self.norms[i](self.convs[i](x))
            x = act(y + x if i % 2 else y)
        return self.fc(x.mean((2, 3)))


def test_activations_are_fused_where_the_layer_has_them():
    network = convert(trained(original := Activations()), **ROUTER)
    check_same_logits(original, network)
    fused = [
        "silu",
        "gelu",
        "leaky_relu",
        None,
        None,
        "silu",
        "gelu",
        "leaky_relu",
        None,
        None,
        "leaky_relu",
        None,
    ]
    expected = {f"convs.{i}": f"dynamic fused {name}" for i, name in enumerate(fused)}
    assert kinds_of(network) == expected | {"convs.0": "static fused silu"}
    check_trains(network)


def test_a_small_efficientnet_of_timm_converts_with_its_silu_fused():
    timm = optional("timm")
    torch.manual_seed(0)
    original = timm.create_model("test_efficientnet", num_classes=5)
    network = convert(original.eval(), image_size=32, **ROUTER)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = original(x)
        # float32: batch norm as one affine map rounds otherwise than torch's does
        torch.testing.assert_close(
            network.eval()(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )
    layers = [part for part in network.dynamic.modules() if isinstance(part, AWConv2d)]
    assert sum(layer.activation == "silu" for layer in layers) > len(layers) // 2


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

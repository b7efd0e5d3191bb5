"""Conversion of existing CNNs: the same logits before training, the right layers, and refusals by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from extras import optional
from torch import nn
from torch.nn.utils import parametrizations

from awnet.models import create_model, save_model
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
def test_our_own_static_networks(name):
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
def test_options(bn):
    original = trained(Residual())
    network = convert(original, bn=bn, filter_scaling=False, beta=2.0, **ROUTER)
    check_same_logits(original, network)
    assert {m.branches for m in network.dynamic.modules() if isinstance(m, MixBatchNorm2d)} == {bn}
    assert network.router.signal_widths == []
    assert not any(
        isinstance(m, FilterScaledConv2d) and not isinstance(m, AWConv2d) for m in network.modules()
    )


def test_a_router_of_the_callers():
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
    with pytest.raises(ValueError, match="converted networks do not"):
        save_model(network, tmp_path / "a.safetensors")


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


def test_the_size_of_images_can_matter():
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(4 * 4 * 6, 3),
    )
    with pytest.raises(
        ValueError, match=r"fails on images \[2, 2, 32, 32\].*pass in_channels and image_size"
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


def test_timm_resnet():
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
        return self.norm(self.conv(x)) if x.sum() > 0 else x


class ModeDependent(Branching):
    def forward(self, x):
        return F.dropout(self.norm(self.conv(x)).mean((2, 3)), 0.5, self.training)


class Twice(Branching):
    def __init__(self):
        super().__init__()
        self.again = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.again(self.again(self.norm(self.conv(x)))).mean((2, 3))


class Functional(Branching):
    def forward(self, x):
        return self.norm(F.conv2d(x, self.conv.weight)).mean((2, 3))


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


class OwnConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


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


def spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), *simple(nn.BatchNorm2d(4))[1:])


REFUSED = {
    "branches on a tensor": (Branching, "Branching cannot be traced by torch.fx.*must not branch"),
    "depends on the mode": (
        ModeDependent,
        "ModeDependent.forward differs between training and test mode.*dropout",
    ),
    "called twice": (Twice, r"cannot convert 'again' \(Conv2d\): it is called more than once"),
    "functional": (Functional, "cannot convert 'conv2d': conv2d is called as a function"),
    "two inputs": (TwoInputs, r"must take one image tensor and nothing else, got \['x', 'scale'\]"),
    "no logits": (Features, r"must return logits \[B, K\], got \[2, 4, 30, 30\]"),
    "an alias changed in place": (Aliased, "logits are off by .* changing in place"),
    "no batch norm": (lambda: simple(nn.ReLU()), "Sequential has no nn.BatchNorm2d"),
    "batch norm 1d": (
        lambda: nn.Sequential(simple(nn.BatchNorm2d(4)), nn.BatchNorm1d(4)),
        r"cannot convert '1' \(BatchNorm1d\): of the batch norms only nn.BatchNorm2d",
    ),
    "sync": (lambda: simple(nn.SyncBatchNorm(4)), r"cannot convert '1' \(SyncBatchNorm\)"),
    "no statistics": (
        lambda: simple(nn.BatchNorm2d(4, track_running_stats=False)),
        r"cannot convert '1' \(BatchNorm2d\): it keeps no running statistics",
    ),
    "own forward": (
        lambda: nn.Sequential(OwnConv(3, 4, 3), *simple(nn.BatchNorm2d(4))[1:]),
        r"cannot convert '0' \(OwnConv\): it is a Conv2d with a forward of its own",
    ),
    "hooks": (hooked, r"cannot convert '1' \(BatchNorm2d\): it has forward hooks"),
    "hooks of the whole": (hooked_root, "Sequential has forward hooks"),
    "parametrized": (spectral, "parametrized"),
    "an AW-Net": (lambda: create_model("awnet_tiny"), "is an AW-Net already"),
    "a dynamic network": (lambda: create_model("awnet_tiny").dynamic, "Backbone cannot be traced"),
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
def test_refuses_by_name(case):
    make, message = REFUSED[case]
    module = make()
    modes = [m.training for m in module.modules()]
    with pytest.raises(ValueError, match=message):
        convert(module, **ROUTER)
    assert [m.training for m in module.modules()] == modes


def test_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got function"):
        convert(lambda x: x)


def test_asks_for_channels_that_it_cannot_read():
    class Shifted(Branching):
        def forward(self, x):
            return self.norm(self.conv(x - 0.5)).mean((2, 3))

    with pytest.raises(ValueError, match="pass in_channels"):
        convert(Shifted(), **ROUTER)
    check_same_logits(module := Shifted(), convert(module, in_channels=3, **ROUTER))


def test_compares_before_it_returns(monkeypatch):
    """A rewriting that changes the function is caught: here one that loses the convolution's bias."""
    keep = MixBatchNorm2d.from_batch_norm.__func__
    monkeypatch.setattr(
        MixBatchNorm2d,
        "from_batch_norm",
        classmethod(lambda cls, norm, branches, bias=None: keep(cls, norm, branches)),
    )
    with pytest.raises(ValueError, match="logits are off by"):
        convert(trained(Residual()), **ROUTER)

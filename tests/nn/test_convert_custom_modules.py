"""Conversion of networks with custom modules, of both modes, wrapped and with hooks."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.convertible_networks import (
    ROUTER,
    Aliased,
    Residual,
    check_same_logits,
    check_trains,
    kinds_of,
    line_of,
    trained,
)
from support.extras import optional
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from awnet.models import create_model
from awnet.nn import (
    AWNet,
    convert,
)

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

"""Layers, blocks, router and network against what the equations say, computed by torch's own modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from awnet.nn import (
    AdversarialRouter,
    AWBasicBlock,
    AWBottleneck,
    AWConv2d,
    AWNet,
    Backbone,
    FilterScaledConv2d,
    FixedRouter,
    MixBatchNorm2d,
    Routing,
)

# Everything is compared in float64, where two ways of summing a few hundred terms agree to some 1e-14.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` in float64 with random parameters and plausible running statistics."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            value.copy_(1 + 0.2 * noise.abs() if "running_var" in name else 0.3 * noise)
    return module


def kinds(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, generator=torch.Generator().manual_seed(seed)) < 0.5


# --- FilterScaledConv2d


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 4),
    groups=st.sampled_from([1, 2]),
    kernel=st.sampled_from([1, 2, 3]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "valid"]),
    padding_mode=st.sampled_from(["zeros", "reflect", "circular"]),
    bias=st.booleans(),
)
def test_filter_scaled_conv_equals_a_convolution_with_scaled_filters_and_an_unscaled_bias(
    batch, groups, kernel, stride, dilation, padding, padding_mode, bias
):
    layer = shaken(
        FilterScaledConv2d(4, 6, kernel, stride, padding, dilation, groups, bias, padding_mode=padding_mode)
    )
    x, filter_scale = rand(batch, 4, 7, 6), rand(batch, 6, seed=1)
    output = layer(x, filter_scale)
    plain = nn.Conv2d(
        4, 6, kernel, stride, padding, dilation, groups, bias, padding_mode=padding_mode
    ).double()
    for b in range(batch):  # Eq. 11: each filter times its own factor
        plain.load_state_dict(layer.state_dict())
        plain.weight.data.mul_(filter_scale[b, :, None, None, None])
        torch.testing.assert_close(output[b : b + 1], plain(x[b : b + 1]), **CLOSE)


def test_filter_scaled_conv_without_scale_is_conv2d():
    layer = FilterScaledConv2d(3, 5, 3, padding="same")
    plain = nn.Conv2d(3, 5, 3, padding="same")
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-6)  # float32, 27 terms a sum


def test_filter_scaled_conv_keeps_the_dtype_of_autocast():
    layer = FilterScaledConv2d(3, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 3, 6, 6), torch.ones(2, 5)).dtype == torch.bfloat16


# --- MixBatchNorm2d


def by_hand(norm: MixBatchNorm2d, momentum: float | None = 0.1) -> list[nn.BatchNorm2d]:
    """The branches of ``norm`` as torch's own batch norms."""
    branches = []
    for k in range(len(norm.weight)):
        plain = nn.BatchNorm2d(norm.num_features, norm.eps, momentum).double()
        with torch.no_grad():
            plain.weight.copy_(norm.weight[k])
            plain.bias.copy_(norm.bias[k])
            plain.running_mean.copy_(norm.running_mean[k])
            plain.running_var.copy_(norm.running_var[k])
        branches.append(plain)
    return branches


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_mix_batch_norm_trains_each_branch_on_the_samples_of_its_kind(momentum):
    norm = shaken(MixBatchNorm2d(3, momentum=momentum))
    if momentum is None:  # the cumulative mean starts at the first batch, whatever stood there
        norm.running_mean.zero_()
    branches = by_hand(norm, momentum)
    masks = torch.tensor(
        [[1, 0, 0, 1, 0, 0], [0] * 6, [0, 1, 1, 1, 0, 1], [1] * 6, [0, 0, 1, 1, 1, 1]]
    ).bool()
    for step, is_clean in enumerate(masks):
        x = 3 + rand(6, 3, 4, 5, seed=step)
        output = norm(x, is_clean=is_clean)
        for k, selected in enumerate((~is_clean, is_clean)):
            if selected.any():  # Eq. 13; a branch without a sample must stay as it is
                torch.testing.assert_close(output[selected], branches[k](x[selected]), **CLOSE)
    for k, plain in enumerate(branches):
        torch.testing.assert_close(norm.running_mean[k], plain.running_mean, **CLOSE)
        torch.testing.assert_close(norm.running_var[k], plain.running_var, **CLOSE)
        assert norm.num_batches_tracked[k] == plain.num_batches_tracked == 4


def test_mix_batch_norm_blends_branches_in_eval_mode():
    norm = shaken(MixBatchNorm2d(3)).eval()
    adversarial, clean = (plain.eval() for plain in by_hand(norm))
    x, p = rand(4, 3, 5, 5), torch.tensor([0.0, 1.0, 0.25, 0.8], dtype=torch.float64)
    weight = p[:, None, None, None]
    expected = (1 - weight) * adversarial(x) + weight * clean(x)  # Eq. 14
    torch.testing.assert_close(norm(x, p_clean=p), expected, **CLOSE)
    assert norm.num_batches_tracked.tolist() == [0, 0]


def test_dual_shares_statistics_and_separates_the_affine_map():
    norm = shaken(MixBatchNorm2d(3, branches="dual"))
    shared = nn.BatchNorm2d(3, affine=False).double()
    shared.running_mean.copy_(norm.running_mean[0])
    shared.running_var.copy_(norm.running_var[0])
    x, is_clean = rand(6, 3, 4, 4), kinds(6)
    row = is_clean.long()
    expected = norm.weight[row][:, :, None, None] * shared(x) + norm.bias[row][:, :, None, None]
    torch.testing.assert_close(norm(x, is_clean=is_clean), expected, **CLOSE)
    torch.testing.assert_close(norm.running_var[0], shared.running_var, **CLOSE)
    assert norm.num_batches_tracked.tolist() == [1]


def test_mix_batch_norm_with_one_branch_is_batch_norm():
    norm = shaken(MixBatchNorm2d(3, branches="one", momentum=None))
    (plain,) = by_hand(norm, None)
    for step in range(3):
        x = rand(5, 3, 4, 4, seed=step)
        torch.testing.assert_close(norm(x), plain(x), **CLOSE)
    torch.testing.assert_close(norm.eval()(x), plain.eval()(x), **CLOSE)
    torch.testing.assert_close(norm.running_mean[0], plain.running_mean, **CLOSE)


@pytest.mark.parametrize("branches", ["mix", "dual", "one"])
def test_from_batch_norm_is_the_same_function_for_any_p(branches):
    plain = shaken(nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)).eval()
    plain.num_batches_tracked.fill_(7)
    plain.weight.requires_grad_(False)
    conv_bias = rand(4, seed=5)
    norm = MixBatchNorm2d.from_batch_norm(plain, branches, conv_bias).eval()
    x, p = rand(3, 4, 5, 5), torch.rand(3, dtype=torch.float64)
    expected = plain(x + conv_bias[:, None, None])
    torch.testing.assert_close(norm(x, p_clean=None if branches == "one" else p), expected, **CLOSE)
    assert (norm.momentum, norm.eps) == (0.3, 1e-3)
    assert set(norm.num_batches_tracked.tolist()) == {7}
    assert not norm.weight.requires_grad


def test_from_batch_norm_without_affine_or_statistics():
    norm = MixBatchNorm2d.from_batch_norm(nn.BatchNorm2d(2, affine=False))
    assert norm.weight.eq(1).all()
    assert norm.bias.eq(0).all()
    assert not norm.weight.requires_grad
    with pytest.raises(ValueError, match="track_running_stats"):
        MixBatchNorm2d.from_batch_norm(nn.BatchNorm2d(2, track_running_stats=False))


def test_the_mode_decides_which_routing_argument_is_required():
    norm, x = MixBatchNorm2d(3), torch.randn(4, 3, 5, 5)
    mask, p = torch.tensor([True, False, True, False]), torch.rand(4)
    with pytest.raises(ValueError, match=r"is_clean is missing.*\.eval\(\)"):
        norm(x)
    with pytest.raises(ValueError, match="p_clean is for eval mode"):
        norm(x, p_clean=p, is_clean=mask)
    with pytest.raises(TypeError, match=r"is_clean must be a bool tensor.*int64"):
        norm(x, is_clean=mask.long())
    with pytest.raises(TypeError, match=r"is_clean must be a bool tensor.*list"):
        norm(x, is_clean=mask.tolist())
    with pytest.raises(ValueError, match=r"is_clean must be bool \[4\].*got \[3\]"):
        norm(x, is_clean=mask[:3])
    norm.eval()
    with pytest.raises(ValueError, match="p_clean is missing"):
        norm(x)
    with pytest.raises(ValueError, match=r"is_clean is for train mode"):
        norm(x, p_clean=p, is_clean=mask)
    with pytest.raises(ValueError, match="branches must be one of"):
        MixBatchNorm2d(3, branches="two")
    assert norm.num_batches_tracked.tolist() == [0, 0]


def test_a_failed_call_does_not_count_a_batch():
    norm = MixBatchNorm2d(3)
    with pytest.raises(ValueError, match="more than 1 value"):  # one pixel, one clean sample
        norm(torch.randn(3, 3, 1, 1), is_clean=torch.tensor([True, False, False]))
    assert norm.num_batches_tracked.tolist() == [0, 0]


# --- AWConv2d and the blocks


def apart(layer: AWConv2d) -> tuple[FilterScaledConv2d, MixBatchNorm2d]:
    """The two modules that ``layer`` fuses, sharing its parameters and with statistics of their own."""
    conv = FilterScaledConv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, bias=False
    )
    conv.weight = layer.weight
    norm = copy.deepcopy(layer.bn)
    norm.weight, norm.bias = layer.bn.weight, layer.bn.bias
    norm.train(layer.training)
    return conv, norm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu", None])
@pytest.mark.parametrize("bn", ["mix", "dual", "one"])
def test_aw_conv_is_conv_norm_add_activation(training, activation, bn):
    layer = shaken(AWConv2d(4, 6, 3, 2, 1, activation=activation, bn=bn, momentum=None)).train(training)
    conv, norm = apart(layer)
    x, filter_scale, residual = (
        rand(5, 4, 7, 7).requires_grad_(),
        1 + rand(5, 6, seed=1),
        rand(5, 6, 4, 4, seed=2),
    )
    inputs = [x, filter_scale.requires_grad_(), residual.requires_grad_(), *layer.parameters()]
    branch = {"is_clean": kinds(5)} if training else {"p_clean": torch.rand(5, dtype=torch.float64)}
    if bn == "one":
        branch = {}
    fused = layer(x, filter_scale, residual=residual, **branch)
    expected = norm(conv(x, filter_scale), **branch) + residual
    expected = {"relu": F.relu, "silu": F.silu, None: lambda x: x}[activation](expected)
    torch.testing.assert_close(fused, expected, **CLOSE)
    torch.testing.assert_close(layer.bn.running_var, norm.running_var, **CLOSE)
    assert torch.equal(layer.bn.num_batches_tracked, norm.num_batches_tracked)
    weight = rand(*fused.shape, seed=3)
    got = torch.autograd.grad((fused * weight).sum(), inputs)
    want = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)  # sums over the batch of centered terms


def test_aw_conv_refuses_bad_arguments():
    x = torch.randn(2, 3, 5, 5)
    with pytest.raises(ValueError, match="dynamic=True"):
        AWConv2d(3, 4, 3, dynamic=False, bn="one")(x, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r'activation must be "relu", .* or None'):
        AWConv2d(3, 4, 3, activation="tanh")
    with pytest.raises(ValueError, match="filter_scale"):
        AWConv2d(3, 4, 3, bn="one")(x, torch.ones(2, 3))
    assert "bias" not in dict(AWConv2d(3, 4, 3).named_parameters(recurse=False))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("in_channels", "stride"), [(8, 1), (4, 2)])
@pytest.mark.parametrize("dynamic_shortcut", [True, False])
def test_basic_block_is_equation_16(training, in_channels, stride, dynamic_shortcut):
    block = shaken(AWBasicBlock(in_channels, 8, stride, dynamic_shortcut=dynamic_shortcut)).train(training)
    projected = stride != 1 or in_channels != 8
    expected_widths = [8, 8, 8] if projected and dynamic_shortcut else [8, 8]
    assert block.signal_widths == expected_widths
    x = rand(4, in_channels, 6, 6)
    scales = [1 + rand(4, 8, seed=10 + i) for i in range(len(expected_widths))]
    branch = {"is_clean": kinds(4)} if training else {"p_clean": torch.rand(4, dtype=torch.float64)}
    (conv1, norm1), (conv2, norm2) = apart(block.conv1), apart(block.conv2)
    shortcut = x
    if projected:
        conv, norm = apart(block.shortcut)
        shortcut = norm(conv(x, scales[2] if dynamic_shortcut else None), **branch)
    hidden = norm1(conv1(x, scales[0]), **branch).relu()
    expected = (norm2(conv2(hidden, scales[1]), **branch) + shortcut).relu()
    torch.testing.assert_close(block(x, scales, **branch), expected, **CLOSE)


def test_bottleneck_scales_its_middle_convolution_only():
    block = shaken(AWBottleneck(4, 2, 2)).eval()
    assert block.signal_widths == [2]
    x, p, filter_scale = rand(3, 4, 6, 6), torch.rand(3, dtype=torch.float64), 1 + rand(3, 2, seed=4)
    (conv1, norm1), (conv2, norm2), (conv3, norm3), (conv, norm) = map(apart, block.convolutions())
    hidden = norm1(conv1(x), p_clean=p).relu()
    hidden = norm2(conv2(hidden, filter_scale), p_clean=p).relu()
    expected = (norm3(conv3(hidden), p_clean=p) + norm(conv(x), p_clean=p)).relu()
    output = block(x, [filter_scale], p_clean=p)
    assert output.shape == (3, 8, 3, 3)
    torch.testing.assert_close(output, expected, **CLOSE)
    with pytest.raises(ValueError, match=r"filter_scales must hold 1 tensors.*got 2"):
        block(x, [filter_scale, filter_scale], p_clean=p)


def test_static_block_with_one_branch_is_the_ordinary_block():
    block = shaken(AWBasicBlock(4, 4, dynamic=False, bn="one"))
    assert block.signal_widths == []
    x = rand(3, 4, 5, 5)
    hidden = x
    for layer, residual in ((block.conv1, 0), (block.conv2, x)):
        (plain,) = by_hand(layer.bn)
        hidden = (plain(F.conv2d(hidden, layer.weight, None, 1, 1)) + residual).relu()
    torch.testing.assert_close(block(x), hidden, **CLOSE)


# --- the backbone


def test_backbone_takes_any_size_and_names_what_is_wrong():
    network = Backbone("basic", [1, 1], [4, 6], num_classes=7, in_channels=2).eval()
    for height, width in ((1, 1), (5, 9), (32, 32)):
        x = torch.rand(2, 2, height, width)
        assert network(x, p_clean=torch.rand(2)).shape == (2, 7)
    p = torch.rand(2)
    with pytest.raises(ValueError, match=r"x must be \[B, 2, H, W\], got \[2, 3, 8, 8\]"):
        network(torch.rand(2, 3, 8, 8), p_clean=p)
    with pytest.raises(ValueError, match=r"x\[None\]"):
        network(torch.rand(2, 8, 8), p_clean=p)
    with pytest.raises(TypeError, match=r"uint8.*/ 255"):
        network(torch.zeros(2, 2, 8, 8, dtype=torch.uint8), p_clean=p)
    with pytest.raises(TypeError, match="x must be a tensor"):
        network([[0.0]], p_clean=p)
    with pytest.raises(ValueError, match=r"filter_scales must hold 4 tensors.*got 1"):
        network(torch.rand(2, 2, 8, 8), [torch.ones(2, 4)], p_clean=p)
    with pytest.raises(TypeError, match="no classifier"):
        Backbone("basic", [1], [4], num_classes=None)(torch.rand(2, 3, 8, 8))
    for bad in ({"widths": [4]}, {"widths": [], "blocks": []}, {"widths": [4, 0]}):
        with pytest.raises(ValueError, match="widths"):
            Backbone(**{"block": "basic", "blocks": [1, 1], "widths": [4, 6], **bad})
    with pytest.raises(ValueError, match="block must be one of"):
        Backbone("conv", [1], [4])
    with pytest.raises(ValueError, match="num_classes"):
        Backbone("basic", [1], [4], num_classes=0)


# --- the router


def make_router(**options) -> AdversarialRouter:
    router = AdversarialRouter([3, 5, 4], in_channels=2, **{"widths": (4, 6), "blocks": (1, 1), **options})
    return router.double().eval()


def test_router_starts_at_one_and_follows_equations_17_to_19():
    router = make_router(beta=2.5)
    x = rand(3, 2, 8, 8)
    assert all(scale.eq(1).all() for scale in router(x).filter_scales)
    shaken(router)
    routing = router(x)
    # ψ_M: global average pools of the stem and the two stages
    feature = torch.cat([f.mean((2, 3)) for f in router.backbone.features(x)], 1)
    assert feature.shape == (3, 4 + 4 + 6)
    logits = F.linear(feature, router.type_head.weight, router.type_head.bias)
    torch.testing.assert_close(routing.type_logits, logits, **CLOSE)
    torch.testing.assert_close(routing.p_clean, torch.sigmoid(logits[:, 1] - logits[:, 0]), **CLOSE)
    start = 0
    for width, scale in zip([3, 5, 4], routing.filter_scales, strict=True):  # one Linear is three heads
        rows = slice(start, start + width)
        head = F.linear(feature, router.signal_heads.weight[rows], router.signal_heads.bias[rows])
        torch.testing.assert_close(scale, (torch.tanh(head) + 1) ** 2.5, **CLOSE)
        start += width
    assert routing.filter_scales[0].std() > 0.01


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 3.0])
def test_filter_scales_stay_in_range_with_finite_gradients_when_saturated(beta):
    router = shaken(make_router(beta=beta)).float()
    router.signal_heads.bias.data.copy_(torch.linspace(-60, 60, 12))
    x = rand(3, 2, 8, 8).float().requires_grad_()
    scales = torch.cat(router(x).filter_scales, 1)
    assert scales.min() >= 0
    assert scales.max() <= 2**beta
    (gradient,) = torch.autograd.grad(scales.sum(), x)
    assert gradient.isfinite().all()
    if beta == 0:
        assert scales.eq(1).all()
        assert gradient.eq(0).all()


def test_p_follows_temperature_and_scale():
    router = shaken(make_router())
    x = rand(4, 2, 8, 8)
    base = router(x)
    router.p_temperature = 2.0
    torch.testing.assert_close(router(x).p_clean, (base.type_logits / 2).softmax(1)[:, 1], **CLOSE)
    assert torch.equal(router(x).type_logits, base.type_logits)
    router.p_temperature, router.p_scale = 1.0, 0.5
    torch.testing.assert_close(router(x).p_clean, base.p_clean / 2, **CLOSE)
    routing = router.train()(x)  # the scale is for eval mode
    torch.testing.assert_close(routing.p_clean, routing.type_logits.softmax(1)[:, 1], **CLOSE)


@pytest.mark.parametrize(("test_bn", "p"), [("mix", 0.5), ("adv", 0.0), ("clean", 1.0), (None, 0.0)])
def test_a_router_without_type_head_gives_a_fixed_p(test_bn, p):
    routing = make_router(type_head=False, test_bn=test_bn)(rand(3, 2, 4, 4))
    assert routing.type_logits is None
    assert routing.p_clean.tolist() == [p] * 3
    fixed = FixedRouter(test_bn or "adv", in_channels=2)
    assert fixed(rand(3, 2, 4, 4)).p_clean.tolist() == [p] * 3
    assert not list(fixed.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta must be finite and at least 0, got -1.0"),
        ({"beta": float("nan")}, "beta must be finite"),
        ({"p_temperature": 0.0}, "p_temperature must be finite and above 0"),
        ({"p_scale": 1.5}, r"p_scale must be in \[0, 1\]"),
        ({"test_bn": "adv"}, "needs type_head=False"),
        ({"type_head": False, "test_bn": "both"}, "test_bn must be one of"),
    ],
)
def test_router_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_router(**options)


# --- the network


def make_network(seed: int = 0, **options) -> AWNet:
    dynamic = Backbone("basic", [1, 1], [4, 6], num_classes=5, in_channels=2, **options)
    network = AWNet(
        dynamic, AdversarialRouter(dynamic.signal_widths, in_channels=2, widths=(4, 6), blocks=(1, 1))
    )
    shaken(network, seed)
    network.router.signal_heads.weight.data.mul_(0.5)
    return network


def test_network_checks_labels_and_routing_by_mode():
    network, x = make_network(), rand(4, 2, 6, 6)
    mask = torch.tensor([True, False, True, False])
    assert network(x, is_clean=mask).shape == (4, 5)
    with pytest.raises(ValueError, match=r"is_clean is missing.*model\.eval\(\)"):
        network(x)
    with pytest.raises(TypeError, match="is_clean must be a bool tensor"):
        network(x, is_clean=mask.double())
    with pytest.raises(ValueError, match=r"is_clean must be bool \[4\]"):
        network(x, is_clean=mask[:2])
    network.eval()
    assert network(x).shape == (4, 5)
    with pytest.raises(ValueError, match=r"is_clean is for train mode.*model\.train\(\)"):
        network(x, is_clean=mask)
    with pytest.raises(ValueError, match=r"routing\.filter_scales must hold 4 tensors.*got 0"):
        network(x, routing=Routing(None, torch.rand(4), []))
    with pytest.raises(ValueError, match=r"x must be \[B, 2, H, W\]"):
        network(rand(4, 3, 6, 6))


def test_network_with_one_branch_needs_no_labels():
    network = make_network(bn="one")
    assert network(rand(4, 2, 6, 6)).shape == (4, 5)
    assert network(rand(4, 2, 6, 6), is_clean=kinds(4)).shape == (4, 5)


def test_router_and_dynamic_network_must_fit():
    dynamic = Backbone("basic", [1], [4])
    with pytest.raises(
        ValueError, match=r"signal_widths must be those of the dynamic network, \[4, 4\], got \[4\]"
    ):
        AWNet(dynamic, AdversarialRouter([4], widths=(4,)))


def test_network_runs_the_router_once_and_takes_another_routing():
    network, x, other = make_network().eval(), rand(4, 2, 6, 6), rand(4, 2, 6, 6, seed=9)
    routing = network.route(x)
    torch.testing.assert_close(network(x, routing=routing), network(x), rtol=0, atol=0)
    assert not torch.allclose(network(x, routing=network.route(other)), network(x))
    calls = []
    network.router.register_forward_hook(lambda *_: calls.append(1))
    network(x, routing=routing)
    assert not calls
    network(x)
    assert len(calls) == 1


def test_p_and_omega_are_differentiable_functions_of_the_image():
    network, x = make_network().eval(), rand(3, 2, 6, 6)
    seen = x.clone().requires_grad_()
    routing = network.route(seen)
    for part in (routing.p_clean, *routing.filter_scales):
        alone = Routing(
            None,
            part if part is routing.p_clean else routing.p_clean.detach(),
            [part if part is scale else scale.detach() for scale in routing.filter_scales],
        )
        (gradient,) = torch.autograd.grad(network(x, routing=alone)[:, 0].sum(), seen, retain_graph=True)
        assert gradient.abs().amax((1, 2, 3)).min() > 1e-8
    # the whole gradient along a direction, against a central difference
    direction, step = rand(3, 2, 6, 6, seed=3), 1e-6
    (gradient,) = torch.autograd.grad(network(seen)[:, 0].sum(), seen)
    difference = (network(x + step * direction) - network(x - step * direction))[:, 0].sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-8)


def test_gradients_reach_every_parameter_in_training():
    network, x = make_network(), rand(6, 2, 6, 6)
    routing = network.route(x)
    logits = network(x, is_clean=torch.arange(6) < 3, routing=routing)
    (logits.logsumexp(1).sum() + routing.type_logits[:, 0].sum()).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_samples_are_independent_in_eval_mode():
    network = make_network().float().eval()
    x = torch.rand(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    alone = x.clone()
    alone[[0, 1, 3]] = float("nan")
    output = network(alone)
    assert torch.equal(output[2], network(x)[2])
    assert output[[0, 1, 3]].isnan().all()


def test_a_deep_copy_trains_independently():
    network, x = make_network(), rand(4, 2, 6, 6)
    twin = copy.deepcopy(network)
    network(x, is_clean=kinds(4))
    assert not torch.equal(network.dynamic.stem.bn.running_mean, twin.dynamic.stem.bn.running_mean)
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin.eval()(x), network.eval()(x))


def compare_compiled(network: AWNet, x: torch.Tensor, backend: str) -> None:
    """Both modes of the compiled network against the network; any graph break is an error."""
    twin, mask = copy.deepcopy(network), torch.arange(len(x)) % 2 == 0
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    logits, expected = compiled(x, is_clean=mask), twin(x, is_clean=mask)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # float32, another order of summation
    logits.sum().backward()
    expected.sum().backward()
    gradient, expected_gradient = (m.router.backbone.stem.weight.grad for m in (network, twin))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), rtol=1e-5, atol=1e-5)
    compiled.eval()
    torch.testing.assert_close(compiled(x), twin.eval()(x), rtol=1e-5, atol=1e-5)


def test_network_compiles_without_a_graph_break():
    dynamic = Backbone("basic", [1], [4], num_classes=5, in_channels=2)
    router = AdversarialRouter(dynamic.signal_widths, in_channels=2, widths=(4,), blocks=(1,))
    compare_compiled(shaken(AWNet(dynamic, router)).float(), torch.rand(4, 2, 6, 6), "eager")


@pytest.mark.slow
def test_larger_network_compiles_through_autograd():
    compare_compiled(make_network().float(), torch.rand(4, 2, 6, 6), "aot_eager")


def test_network_exports_in_eval_mode_with_any_batch_size():
    network = make_network().float().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, (torch.rand(4, 2, 6, 6),), dynamic_shapes={"x": {0: batch}})
    x = torch.rand(7, 2, 6, 6)
    torch.testing.assert_close(program.module()(x), network(x), rtol=1e-5, atol=1e-6)

"""Every family of networks, in a narrow version, through all that the package does with a model."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pyautoattack import checks
from safetensors.torch import load_file
from support.model_families import NARROW, OWN_RECIPES, mode, narrow, needs
from torch import nn

from awnet import reference
from awnet.attacks import PGD, GraphedPGD
from awnet.data import Batch, Splits, load_dataset
from awnet.models import create_model, list_models, load_model, parameter_count, save_model
from awnet.nn import (
    AdversarialRouter,
    AWInvertedResidual,
    AWPreActivationBlock,
    MixBatchNorm2d,
    convert,
)
from awnet.nn.inference import InferenceCopy
from awnet.training import recipe_for, train

FULL = [name for name in list_models() if "tiny" not in name]
# all but a network without batch norm, a plain one, an AW-Net and two that keep more than weights: those that other
# tests train already, the like, and the one that trains three networks at once
QUICK = [
    *(("pgd_at", name) for name in ("swin_t", "vgg16_bn", "awnet_mobilenet_v2")),
    ("rdi", "rdi_resnet38"),
    ("advmoe", "advmoe_resnet18"),
]
CNNS = [name for name in NARROW if not name.startswith("swin")]
CONVERTIBLE = ["resnet18", "wrn34_8", "vgg16_bn", "repvgg_a2", "mobilenet_v2"]
# of the two epochs where the recipes' own learning rate is too much for some 3 channels a layer, or no batch norm
GENTLER: dict[str, dict[str, Any]] = {"mobilenet_v2": {"lr": 0.01}, "swin_t": {"clip_norm": 1.0}}
DIGITS = load_dataset("digits")
SMALL = Splits(DIGITS.train.subset(32), DIGITS.validation.subset(10), DIGITS.test)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", NARROW)
def test_every_family_overfits_64_images(name: str) -> None:
    batch = next(DIGITS.train.batches(64))
    check_overfits(narrow(name), batch, lr=3e-3 if name.startswith("swin") else 1e-2)


def check_overfits(model: nn.Module, batch: Batch, lr: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(80):
        logits = model(batch.x, **mode(model, 64))
        if (logits.argmax(1) == batch.y).all():
            return
        optimizer.zero_grad()
        F.cross_entropy(logits, batch.y).backward()
        optimizer.step()
    pytest.fail(f"{(logits.argmax(1) == batch.y).sum()} of 64 images after 80 steps")


@pytest.mark.parametrize(
    ("recipe_name", "name"),
    [
        pytest.param(recipe, name, marks=[] if (recipe, name) in QUICK else [pytest.mark.slow])
        for recipe, name in [*(("pgd_at", name) for name in NARROW), *OWN_RECIPES]
    ],
)
def test_every_family_trains_stops_resumes_and_loads(recipe_name: str, name: str, tmp_path: Path) -> None:
    recipe = recipe_for(recipe_name, "digits", epochs=1, batch_size=16, attack_steps=1, validate_limit=2)
    settings: dict[str, Any] = {"quiet": True, "tensorboard": False}
    whole = train(recipe, narrow(name), SMALL, tmp_path / "whole", **settings)
    part = train(recipe, narrow(name), SMALL, tmp_path / "part", max_minutes=1e-9, **settings)
    assert not part.finished
    resumed = train(recipe, narrow(name), SMALL, tmp_path / "part", resume=True, **settings)
    assert whole.finished
    assert resumed.finished
    assert all(torch.isfinite(value).all() for value in whole.model.state_dict().values())
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    x = next(SMALL.test.batches(4)).x
    assert torch.equal(load_model(tmp_path / "whole")(x), whole.model(x))


@pytest.mark.parametrize("name", NARROW)
def test_every_family_passes_autoattacks_checks(name: str) -> None:
    model = narrow(name)
    for _ in range(2):  # running statistics other than those at the start
        model(next(DIGITS.train.batches(32)).x, **mode(model, 32))
    check_by_autoattack(model.eval())


def check_by_autoattack(model: nn.Module) -> None:
    batch = next(DIGITS.test.batches(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks.check_randomized(model, batch.x, batch.y, n=3)
        assert checks.check_range_output(model, batch.x) == 10
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # it counts on from other models
        checks.check_dynamic(model, batch.x)
        x = batch.x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(model(x), batch.y), x)
        checks.check_zero_gradients(slope)
    # one image's logits do not depend on the others: NaN there would show
    spoilt = batch.x.clone()
    spoilt[1:] = torch.nan
    assert torch.equal(model(spoilt)[0], model(batch.x)[0])


@pytest.mark.parametrize("name", [name for name in CNNS if not name.startswith("rdi")])
def test_the_attack_of_training_runs_on_a_copy(name: str) -> None:
    model, (x, y, index) = narrow(name), next(DIGITS.train.batches(16))
    size: dict[str, Any] = {"eps": 0.1, "step_size": 0.025, "steps": 2, "random_start": "normal"}
    attack, in_place = GraphedPGD(model, num_classes=10, **size), PGD(model, **size)
    for _ in range(2):
        model(x, **mode(model, 16))
        assert torch.equal(attack(x, y, index=index), in_place(x, y, index=index))
        with torch.no_grad():  # the copy follows
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    assert isinstance(attack.pgd.model, InferenceCopy)
    model.eval()
    with torch.no_grad():
        logits, low = model(x), model.inference_copy(torch.bfloat16)(x)
    assert (low - logits).norm() < 0.01 * logits.norm()  # bfloat16 rounds by 2⁻⁹ at each layer


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CNNS if not name.startswith("rdi")])
def test_the_attack_of_training_is_a_cuda_graph(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, (x, y, index) = narrow(name).cuda(), (part.cuda() for part in next(DIGITS.train.batches(16)))
    size: dict[str, Any] = {"eps": 0.1, "step_size": 0.025, "steps": 2, "random_start": "normal"}
    attack = GraphedPGD(model, num_classes=10, **size)
    with caplog.at_level(logging.INFO, "awnet"):
        actual = attack(x, y, index=index)
    assert "could not be captured" not in caplog.text
    plain = GraphedPGD(model, num_classes=10, capture=False, **size)(x, y, index=index)
    # cuDNN may sum in another order: steps agree but for signs of tiny gradients
    assert ((actual - plain).abs() < 1e-6).float().mean() > 0.95


@pytest.mark.parametrize("name", CNNS)
@pytest.mark.parametrize("size", [(1, 1), (9, 14)], ids=str)
def test_networks_take_images_of_any_size(name: str, size: tuple[int, int]) -> None:
    assert narrow(name).eval()(torch.rand(2, 1, *size)).shape == (2, 10)


@pytest.mark.parametrize("name", NARROW)
def test_width_is_a_factor_of_every_layer(name: str) -> None:
    needs(name)
    options = {key: value for key, value in NARROW[name].items() if key == "width"}
    with torch.device("meta"):
        full, half, small = (
            parameter_count(create_model(name, width=width)) for width in (1.0, 0.5, options["width"])
        )
    assert 0.24 < half / full < 0.3  # quadratic, but for the first and the last layer and the batch norms
    assert small < 0.09 * full
    model = create_model(name, **NARROW[name])
    assert model.config["options"]["width"] == options["width"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROW)
def test_two_epochs_of_adversarial_training_lower_the_loss(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"attack_steps": 3, "validate_every": 2, "validate_limit": 20}
    recipe = recipe_for("pgd_at", "digits", epochs=2, **settings, **GENTLER.get(name, {}))
    splits = Splits(DIGITS.train.subset(512), DIGITS.validation, DIGITS.test)
    result = train(recipe, narrow(name), splits, tmp_path, quiet=True, tensorboard=False)
    first, second = (epoch["total"] for epoch in result.history)
    assert second < first
    assert result.history[-1]["skipped_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_forward_and_backward(name: str) -> None:
    needs(name)
    model = create_model(name)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    logits = model(x, **mode(model, 2))
    F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    assert logits.shape == (2, 10)
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.any()


# --- converted networks


@pytest.mark.parametrize(
    "name",
    # the AW-Net on the same base is overfitted above, and takes as long
    [pytest.param(n, marks=[pytest.mark.slow] if n == "mobilenet_v2" else []) for n in CONVERTIBLE],
)
def test_a_converted_network_is_a_network_like_the_others(name: str) -> None:
    original = narrow(name)
    batch = next(DIGITS.train.batches(64))
    for _ in range(2):
        original(batch.x)
    network = convert(original, router_widths=(8, 16), image_size=8).eval()
    with torch.no_grad():
        expected = original.eval()(batch.x)
        # float32: batch norm as one affine map rounds otherwise than torch's does
        torch.testing.assert_close(
            network(batch.x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
        )
    check_by_autoattack(network)
    check_overfits(network.train(), batch, lr=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_a_converted_network_trains_stops_and_resumes(name: str, tmp_path: Path) -> None:
    def converted() -> nn.Module:
        return convert(narrow(name), router=router, image_size=8)

    widths = convert(narrow(name), router_widths=(4,), image_size=8).router.signal_widths
    torch.manual_seed(1)
    router = AdversarialRouter(widths, in_channels=1, widths=(8, 16))
    start = copy.deepcopy(router.state_dict())
    recipe = recipe_for("pgd_at", "digits", epochs=2, batch_size=16, attack_steps=1, validate_limit=2)
    settings: dict[str, Any] = {"quiet": True, "tensorboard": False}
    whole = train(recipe, converted(), SMALL, tmp_path / "whole", **settings)
    for minutes, finished in ((1e-9, False), (None, True)):
        router.load_state_dict(start)
        part = train(
            recipe, converted(), SMALL, tmp_path / "part", resume=True, max_minutes=minutes, **settings
        )
        assert part.finished == finished
    for key, value in whole.model.state_dict().items():
        assert torch.equal(part.model.state_dict()[key], value), key
    weights = load_file(tmp_path / "whole" / "best.safetensors")  # no config that could rebuild it
    router.load_state_dict(start)
    again = converted().eval()
    again.load_state_dict(weights)
    x = next(SMALL.test.batches(4)).x
    assert torch.equal(again(x), whole.model(x))


# --- RepVGG


@pytest.mark.parametrize("width", [0.1, pytest.param(1.0, marks=pytest.mark.slow)])
def test_repvgg_in_its_fused_form_has_the_same_logits(width: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("repvgg_a2", width=width)
    with pytest.raises(ValueError, match="x must be"):
        model(torch.rand(2, 1, 8, 8))
    for name, parameter in model.named_parameters():  # γ, β far from 1, 0
        if "conv" not in name or "bn" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    for _ in range(5):
        model(0.5 + torch.rand(16, 3, 12, 12))
    model.eval()
    fused = model.fused()
    x = torch.rand(8, 3, 12, 12)
    expected = model(x)
    # float32: two roundings more or less in a kernel that sums three, over 22 blocks
    torch.testing.assert_close(
        fused(x), expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max())
    )
    double = copy.deepcopy(model).double()
    torch.testing.assert_close(double.fused()(x.double()), double(x.double()), rtol=1e-12, atol=1e-12)
    assert not any(isinstance(module, nn.BatchNorm2d | MixBatchNorm2d) for module in fused.modules())
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == 22
    save_model(fused, tmp_path / "fused.safetensors")
    assert torch.equal(load_model(tmp_path / "fused.safetensors")(x), fused(x))
    with pytest.raises(ValueError, match="fused form already"):
        fused.fused()


# --- blocks of AW-Nets on other bases, against the paper's equations in float64


def _randomized(block: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    block = block.double()
    for value in [*block.parameters(), *block.buffers()]:
        if value.is_floating_point():
            value.data.copy_(0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64))
    return block


def _norm(norm: MixBatchNorm2d, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return reference.mix_batch_norm(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, p_clean=p)


@pytest.mark.parametrize("stride", [1, 2])
def test_pre_activation_block_is_the_equations(stride: int) -> None:
    block = _randomized(AWPreActivationBlock(4, 4 * stride, stride, dynamic_shortcut=True)).eval()
    x, p = torch.randn(3, 4, 6, 6, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    scales = [torch.rand(3, width, dtype=torch.float64) for width in block.signal_widths]
    assert block.signal_widths == [4 * stride] * (2 if stride == 1 else 3)
    conv = reference.filter_scaled_conv2d
    active = _norm(block.norm, x, p).relu()
    hidden = conv(active, block.conv1.weight, scales[0], stride=stride, padding=1)
    hidden = _norm(block.conv1.bn, hidden, p).relu()
    shortcut = x if stride == 1 else conv(active, block.shortcut.weight, scales[2], stride=2)
    expected = shortcut + conv(hidden, block.conv2.weight, scales[1], padding=1)
    torch.testing.assert_close(block(x, scales, p_clean=p), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="filter_scales must hold"):
        block(x, scales[:1], p_clean=p)


@pytest.mark.parametrize(("stride", "expansion"), [(1, 1), (1, 3), (2, 3)])
def test_inverted_residual_is_the_equations(stride: int, expansion: int) -> None:
    block = _randomized(AWInvertedResidual(4, 4, stride, expansion)).eval()
    x, p = 4 * torch.randn(3, 4, 6, 6, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    width = 4 * expansion
    assert block.signal_widths == [width]
    filter_scale = torch.rand(3, width, dtype=torch.float64)
    conv = reference.filter_scaled_conv2d
    hidden = x
    if expansion != 1:
        hidden = F.relu6(_norm(block.expand.bn, conv(x, block.expand.weight, None), p))
    hidden = conv(hidden, block.depthwise.weight, filter_scale, stride=stride, padding=1, groups=width)
    hidden = F.relu6(_norm(block.depthwise.bn, hidden, p))
    assert (hidden == 6).any()
    expected = _norm(block.project.bn, conv(hidden, block.project.weight, None), p)
    expected = expected + x if stride == 1 else expected
    torch.testing.assert_close(block(x, [filter_scale], p_clean=p), expected, rtol=1e-12, atol=1e-12)

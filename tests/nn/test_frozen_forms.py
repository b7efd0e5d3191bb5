"""The forms of frozen networks that a device's table chooses, against the reference in float64.

On a CPU torch's convolution, addition and ReLU stand in for cuDNN's operator; the tests marked gpu run it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.recorder import Recorder
from torch import Tensor, nn

from awnet import ops
from awnet.attacks import GraphedPGD
from awnet.models import create_model
from awnet.nn import Backbone, InferenceBackbone, MixBatchNorm2d, inference_copy
from awnet.ops import folding, launch_config, network_autograd, use_backend
from awnet.ops.launch_config import use_frozen_network

few = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FORMS = [{"norms": "folded"}, {"stem": "padded"}, {"norms": "folded", "stem": "padded"}]


def shaken(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """``model`` with norms and heads that differ from their initial values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, MixBatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
                module.running_var.mul_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            elif name.endswith("head"):
                module.weight.add_(0.2 * torch.randn(module.weight.shape, generator=generator))
            elif name.endswith("signal_heads"):
                module.weight.normal_(std=0.1, generator=generator)
    return model.to(dtype).eval()


def network(name: str = "awnet_tiny", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return shaken(create_model(name, num_classes=5, **options), dtype)


def images(dtype: torch.dtype = torch.float64, batch: int = 3, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, channels, 9, 7, generator=generator, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def logits_and_gradient(copy: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    logits = copy(x)
    (gradient,) = torch.autograd.grad((logits * torch.arange(1, 6).to(logits)).sum(), x)
    return logits.detach(), gradient


def reference(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with use_backend("reference"):
        return logits_and_gradient(inference_copy(model), x)


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The layers that ran with folded norms."""
    ran: list[Any] = []
    real = network_autograd.folded_layer
    monkeypatch.setattr(network_autograd, "folded_layer", lambda args: ran.append(args) or real(args))
    with use_backend("eager"):
        yield ran


@pytest.mark.parametrize("forms", FORMS, ids=str)
@pytest.mark.parametrize("name", ["awnet_tiny", "resnet_tiny"])
def test_each_form_equals_the_reference(name: str, forms: dict[str, str], folds: list[Any]) -> None:
    model, x = network(name), images()
    with use_frozen_network(**forms):
        found = logits_and_gradient(inference_copy(model), x)
    for got, expected in zip(found, reference(model, x), strict=True):
        # float64: the same equations in another order; sums of some hundred terms
        assert error(got, expected) < 1e-12
    assert bool(folds) == (forms.get("norms") == "folded")


@few
@given(
    block=st.sampled_from(["basic", "bottleneck"]),
    blocks=st.lists(st.integers(1, 2), min_size=1, max_size=2),
    widths=st.lists(st.sampled_from([4, 6, 8, 16]), min_size=2, max_size=2),
    channels=st.sampled_from([1, 3, 8]),
    size=st.tuples(st.integers(1, 7), st.integers(2, 6)),
    batch=st.integers(1, 3),
    activation=st.sampled_from(["relu", "relu", "silu"]),
    form=st.sampled_from(FORMS),
)
def test_networks_of_any_shape_equal_the_reference(
    block: Any,
    blocks: list[int],
    widths: list[int],
    channels: int,
    size: tuple[int, int],
    batch: int,
    activation: Any,
    form: dict[str, str],
) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": 5, "in_channels": channels, "dynamic": False, "bn": "one"}
    net = shaken(Backbone(block, blocks, widths[: len(blocks)], activation=activation, **options))
    x = torch.rand(batch, channels, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with use_backend("reference"):
        expected = logits_and_gradient(InferenceBackbone(net, torch.float64), x)
    with use_backend("eager"), use_frozen_network(**form):
        found = logits_and_gradient(InferenceBackbone(net, torch.float64), x)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12 * float(wanted.abs().max() + 1))


def test_layers_with_a_residual_or_the_shape_of_their_input_are_folded(folds: list[Any]) -> None:
    model, x = network("resnet_tiny"), images()
    with use_frozen_network(norms="folded"):
        logits_and_gradient(inference_copy(model), x)
    layers = [(*args.weight.shape[:2], args.conv.stride[0], args.activation) for args in folds]
    # not folded: the stem, and the first convolution of a stage of other shape
    assert layers == [
        (16, 16, 1, "relu"), (16, 16, 1, "relu"),
        (32, 16, 2, None), (32, 32, 1, "relu"),
        (64, 32, 2, None), (64, 64, 1, "relu"),
    ]  # fmt: skip
    assert all(args.weight.is_contiguous(memory_format=torch.channels_last) for args in folds)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("awnet_tiny", {}),
        ("awnet_tiny", {"filter_scaling": False, "type_head": False, "test_bn": "mix"}),
        ("resnet_tiny", {"in_channels": 1}),
        ("resnet_tiny", {"in_channels": 9}),
        ("resnet_tiny", {"in_channels": 16}),
    ],
    ids=["awnet", "no router", "1 channel", "9 channels", "16 channels"],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "last"])
def test_stems_read_images_padded_to_a_multiple_of_eight_channels(
    name: str, options: dict[str, Any], layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = options.get("in_channels", 3)
    model, x = network(name, **options), images(channels=channels).contiguous(memory_format=layout)
    read: list[tuple[Tensor, Tensor]] = []  # images and weight of each stem
    real = ops.affine_network

    def watched(x: Tensor, weights: list[Tensor], *arguments: Any) -> list[Tensor]:
        read.append((x, weights[0]))
        return real(x, weights, *arguments)

    monkeypatch.setattr(ops, "affine_network", watched)
    with use_frozen_network(stem="padded"):
        copy = inference_copy(model)
        copy.refresh()
        found = logits_and_gradient(copy, x)
    assert len(read) == (2 if (name, options) == ("awnet_tiny", {}) else 1)
    for source, weight in read:
        assert source.shape[1] == weight.shape[1] == -(-channels // 8) * 8
        # images of one channel are in both layouts
        assert channels == 1 or source.is_contiguous(memory_format=layout)
        assert not source[:, channels:].any()
        assert not weight[:, channels:].any()
    assert found[1].shape == x.shape
    for got, expected in zip(found, reference(model, x), strict=True):
        assert error(got, expected) < 1e-12


def test_a_padded_stem_is_copied_apart_from_the_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("resnet_tiny", torch.float32)
    with use_frozen_network(stem="padded"):
        copy = inference_copy(model, torch.bfloat16)
    lists: list[list[Tensor]] = []
    real = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (lists.append(to), real(to, of)))
    copy.refresh()
    # torch copies a list in a few kernels only where the strides of each pair are equal
    assert sorted(len(one) for one in lists)[0] == 1
    assert len(lists) == 3


def test_bfloat16_with_folded_norms_is_about_as_accurate_as_without(folds: list[Any]) -> None:
    model, x = network(), images(batch=16)
    expected = reference(model, x)
    copies = [inference_copy(model, torch.bfloat16)]
    found = [logits_and_gradient(copies[0], x)]
    with use_frozen_network(norms="folded"):
        found.append(logits_and_gradient(inference_copy(model, torch.bfloat16), x))
    assert folds
    assert {args.shift.dtype for args in folds} == {torch.bfloat16}
    for applied, folded, wanted in zip(*found, expected, strict=True):
        # the weight is rounded twice, the convolution's output not at all
        assert error(folded, wanted) < 2 * error(applied, wanted)


@pytest.mark.parametrize("name", ["awnet_tiny", "resnet_tiny"])
@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_refresh_updates_each_form(name: str, forms: dict[str, str], folds: list[Any]) -> None:
    model, x = network(name), images()
    with use_frozen_network(**forms):
        copy = inference_copy(model)
        before = copy(x)
        model.train()
        labels = torch.arange(len(x))
        options = {} if name == "resnet_tiny" else {"is_clean": torch.tensor([True, False, True])}
        logits = model(x, **options)
        logits = logits if isinstance(logits, Tensor) else logits[0]
        torch.nn.functional.cross_entropy(logits, labels).backward()
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.grad is not None):
                parameter.sub_(0.05 * parameter.grad)
        model.eval()
        assert torch.equal(copy(x), before)
        copy.refresh()
        found = logits_and_gradient(copy, x)
    for got, expected in zip(found, reference(model, x), strict=True):
        assert error(got, expected) < 1e-12
    assert error(before, found[0]) > 1e-3


@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_a_recorded_attack_on_each_form_gives_the_same_bits_and_follows_the_weights(
    forms: dict[str, str], folds: list[Any]
) -> None:
    model, x, recorder = network(dtype=torch.float32), images(torch.float32), Recorder()
    settings = {"eps": 0.1, "step_size": 0.025, "steps": 3, "num_classes": 5}
    y, index = torch.tensor([0, 1, 2]), torch.arange(3)
    results = []
    with use_frozen_network(**forms):
        recorded = GraphedPGD(model, record=recorder, **settings)
        for _ in range(2):
            results.append(recorded(x, y, index=index))
            assert torch.equal(results[-1], GraphedPGD(model, **settings)(x, y, index=index))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.2)
    assert recorder.recorded == 1
    assert not torch.equal(*results)


@pytest.mark.slow
def test_a_compiled_frozen_network_equals_the_reference_in_each_form() -> None:
    model, x = network("resnet_tiny"), images()
    for forms in FORMS:
        with use_backend("eager"), use_frozen_network(**forms):
            found = logits_and_gradient(torch.compile(inference_copy(model), backend="aot_eager"), x)
        for got, expected in zip(found, reference(model, x), strict=True):
            assert error(got, expected) < 1e-12


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of the CPU's table in a folder that replaces the shipped one."""
    (tmp_path / "default.json").write_text((launch_config.FOLDER / "default.json").read_text())
    monkeypatch.setattr(launch_config, "FOLDER", tmp_path)
    launch_config.forget_tables()
    yield tmp_path / "cpu.json"
    monkeypatch.undo()
    launch_config.forget_tables()


def test_norms_are_folded_only_where_the_devices_table_says_so(table: Path, folds: list[Any]) -> None:
    model, x = network("resnet_tiny"), images()
    copy = inference_copy(model)
    copy(x)
    assert not folds
    table.write_text(json.dumps({"launches": {}, "frozen_networks": {"float64": {"norms": "folded"}}}))
    launch_config.forget_tables()
    copy(x)
    number = len(folds)
    assert number == 6
    inference_copy(model, torch.float32)(x.float())  # another dtype
    copy(x.contiguous())  # NCHW
    copy(x[:0])
    with use_backend("reference"):
        copy(x)
    assert len(folds) == number


DAMAGED = {
    '{"launches": {}, "frozen_networks": []}': "must be an object of objects",
    '{"launches": {}, "frozen_networks": {"bfloat16": "folded"}}': "must be an object of objects",
    '{"launches": {}, "frozen_networks": {"bfloat16": {"norms": "fused"}}}': "norms: 'fused'",
    '{"launches": {}, "frozen_networks": {"bfloat16": {"norms": ["folded"]}}}': "norms: ['folded']",
    '{"launches": {}, "frozen_networks": {"bfloat16": {"heads": "folded"}}}': "heads: 'folded'",
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_table_with_damaged_forms_is_a_clear_error(text: str, table: Path) -> None:
    table.write_text(text)
    with pytest.raises(ValueError, match="awnet bench tune") as caught:
        launch_config.frozen_network(torch.device("cpu"), torch.bfloat16)
    assert str(table) in str(caught.value)
    assert DAMAGED[text] in str(caught.value)


# --- cuDNN's operator


@pytest.fixture
def operator_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A CPU kernel of torch's operator that does what cuDNN documents; the factors of the addends."""
    factors: list[float] = []

    def stand_in(x, weight, z, alpha, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
        factors.append(float(alpha))
        u = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        assert z.shape == u.shape
        return (u + alpha * z).relu()

    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution_add_relu", stand_in, "CPU")
    monkeypatch.setattr(folding, "runs_cudnn", lambda x: True)
    yield factors
    library._destroy()


def test_the_operator_gets_the_residual_or_the_input_times_zero(
    operator_on_cpu: list[float], folds: list[Any]
) -> None:
    model, x = network("resnet_tiny"), images()
    with use_frozen_network(norms="folded"):
        found = logits_and_gradient(inference_copy(model), x)
    for got, expected in zip(found, reference(model, x), strict=True):
        assert error(got, expected) < 1e-12
    assert operator_on_cpu == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("flag", ["deterministic", "enabled"])
def test_norms_are_not_folded_without_cudnn_or_where_deterministic_results_are_requested(
    flag: str, operator_on_cpu: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network("resnet_tiny"), images()
    with use_backend("eager"), use_frozen_network(norms="folded"):
        copy = inference_copy(model)
        copy(x)
        number = len(operator_on_cpu)
        monkeypatch.setattr(torch.backends.cudnn, flag, flag == "deterministic")
        copy(x)
    assert number == len(operator_on_cpu) == 4


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("forms", FORMS, ids=str)
@pytest.mark.parametrize("name", ["awnet_tiny", "awnet_resnet18", "resnet18"])
def test_each_form_on_a_gpu_is_about_as_accurate_as_the_default(
    name: str, forms: dict[str, str], folds: list[Any]
) -> None:
    model = network(name)
    x = images(batch=16)
    expected = reference(model, x)
    on_gpu = network(name).cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with use_backend("triton"):
        default = logits_and_gradient(inference_copy(on_gpu, torch.bfloat16), x.cuda())
        with use_frozen_network(**forms):
            found = logits_and_gradient(inference_copy(on_gpu, torch.bfloat16), x.cuda())
    assert bool(folds) == (forms.get("norms") == "folded")
    for got, plain, wanted in zip(found, default, expected, strict=True):
        assert error(got.cpu(), wanted) < 2 * error(plain.cpu(), wanted)


@gpu
def test_nan_in_unused_gpu_memory_does_not_reach_a_network_with_folded_norms(folds: list[Any]) -> None:
    model, x = network("resnet18").cuda(), images(batch=8).cuda()
    with use_backend("triton"), use_frozen_network(norms="folded"):
        copy = inference_copy(model, torch.bfloat16)
        for _ in range(3):
            # the allocator hands this memory to the outputs of the convolutions
            poison = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(8, 24)]
            del poison
            logits, gradient = logits_and_gradient(copy, x)
            assert bool(logits.isfinite().all())
            assert bool(gradient.isfinite().all())
    assert all(args.input.is_cuda for args in folds)
    assert folds


@gpu
@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_a_cuda_graph_of_an_attack_on_each_form_gives_the_images_of_single_steps(
    forms: dict[str, str], folds: list[Any]
) -> None:
    model, x = network("awnet_resnet18", torch.float32).cuda(), images(torch.float32, batch=8).cuda()
    y, index = torch.arange(8, device="cuda") % 5, torch.arange(8, device="cuda")
    settings = {"eps": 0.1, "step_size": 0.025, "steps": 3, "num_classes": 5, "dtype": torch.bfloat16}
    with use_backend("triton"), use_frozen_network(**forms):
        captured = GraphedPGD(model, **settings)
        found = [captured(x, y, index=index) for _ in range(3)][-1]
        assert captured.graphs.refusal is None
        assert bool(folds) == (forms.get("norms") == "folded")
        plain = GraphedPGD(model, capture=False, **settings)(x, y, index=index)
    # cuDNN may choose other algorithms for the graph, and a sign turns where a gradient is a rounding from 0
    assert float((found == plain).float().mean()) > 0.9

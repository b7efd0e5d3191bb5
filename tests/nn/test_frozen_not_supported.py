"""An inference copy replaces only a model that it reproduces exactly; any other model runs itself."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

import awnet
from awnet.attacks import PGD, GraphedPGD
from awnet.data import Dataset, load_dataset
from awnet.evaluation import accuracy, evaluate
from awnet.evaluation.precision import COPY, prepare
from awnet.models import AWResNet, ResNet, create_model
from awnet.nn import AWBasicBlock, MixBatchNorm2d, inference_copy, not_supported
from awnet.nn.inference_network import InferenceAWNet, InferenceBackbone
from awnet.training.teachers import TeacherModel

SIZE = {"eps": 0.1, "step_size": 0.03, "steps": 2}


def trained(name: str = "awnet_tiny", **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, in_channels=1, **options)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "running_var" in key:
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape))
    return model


class Normalized(ResNet):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward((x - 0.4) / 0.2)


class Calibrated(AWResNet):
    def forward(self, x: Tensor, **arguments: object) -> Tensor:  # type: ignore[override]
        return super().forward(x.flip(-1), **arguments) / 2  # type: ignore[arg-type]


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class Doubled(AWBasicBlock):
    def forward(self, input: Tensor, *args: object, **arguments: object) -> Tensor:  # type: ignore[override]
        return 2 * super().forward(input)


class Clipped(MixBatchNorm2d):
    pass


def _of_class(kind: type[nn.Module], name: str) -> nn.Module:
    model = kind(name, 10, 1)
    model.load_state_dict(trained(name).state_dict())
    return model


def _changed(change: Callable[[nn.Module], object], name: str = "awnet_tiny") -> nn.Module:
    model = trained(name)
    change(model)
    return model


def _other_head(model: nn.Module) -> None:
    model.classifier = Halved(model.classifier.in_features, 10)


def _other_norm(model: nn.Module) -> None:
    model.dynamic.stem.bn.__class__ = Clipped


def _other_forward(model: nn.Module) -> None:
    forward = model.forward
    model.forward = lambda x, **arguments: forward(x.flip(-1), **arguments)


def _other_method(model: nn.Module) -> None:
    features = model.features
    model.features = lambda x, *rest: features(1 - x, *rest)


CHANGED = {
    "a subclass": (lambda: _of_class(Normalized, "resnet_tiny"), "Normalized is a subclass of ResNet"),
    "a subclass of an AW-Net": (lambda: _of_class(Calibrated, "awnet_tiny"), "is a subclass of AWResNet"),
    "a forward pre-hook": (
        lambda: _changed(lambda m: m.register_forward_pre_hook(lambda _, args: (1 - args[0],))),
        "AWResNet has hooks",
    ),
    "an inner forward hook": (
        lambda: _changed(
            lambda m: m.stages[1][0].conv1.register_forward_hook(lambda *a: a[2] * 1.5), "resnet_tiny"
        ),
        r"stages\.1\.0\.conv1 has hooks",
    ),
    "a backward hook": (
        lambda: _changed(lambda m: m.router.register_full_backward_hook(lambda _, given, out: given)),
        "router has hooks",
    ),
    "another head": (lambda: _changed(_other_head, "resnet_tiny"), "classifier is a Halved"),
    "a head without bias": (
        lambda: _changed(lambda m: setattr(m, "classifier", nn.Linear(64, 10, bias=False)), "resnet_tiny"),
        "classifier has no bias",
    ),
    "another norm": (lambda: _changed(_other_norm), r"dynamic\.stem\.bn is a Clipped"),
    "a replaced block": (
        lambda: _changed(
            lambda m: m.stages[0].__setitem__(0, Doubled(16, 16, dynamic=False, bn="one")), "resnet_tiny"
        ),
        r"stages\.0\.0 is a Doubled",
    ),
    "pruning": (
        lambda: _changed(lambda m: prune.l1_unstructured(m.stages[0][0].conv1, "weight", 0.5), "resnet_tiny"),
        r"stages\.0\.0\.conv1 has hooks",
    ),
    "a parametrization": (
        lambda: _changed(lambda m: parametrizations.spectral_norm(m.classifier), "resnet_tiny"),
        "classifier is a ParametrizedLinear",
    ),
    "a replaced forward": (lambda: _changed(_other_forward), "has its forward replaced"),
    "a replaced method": (lambda: _changed(_other_method, "resnet_tiny"), "has its features replaced"),
    "two dtypes": (
        lambda: _changed(lambda m: m.classifier.double(), "resnet_tiny"),
        "parameters have 2 dtypes",
    ),
    "a copied family": (
        lambda: _hooked_vgg(),
        r"features\.0 has hooks",
    ),
    "a network of torch's": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "not a network that"),
}


def _hooked_vgg() -> nn.Module:
    model = trained("vgg16_bn", width=0.05)
    model.features[0].register_forward_hook(lambda *a: a[2] * 1.5)
    return model


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits").test.subset(8)


@pytest.mark.parametrize("case", [case for case in CHANGED if case != "two dtypes"])
def test_a_changed_model_has_no_copy_and_the_report_gives_the_reason(
    case: str, digits: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = CHANGED[case]
    model = make()
    if isinstance(model, nn.Sequential):
        assert not_supported(model) is not None
    assert inference_copy(model) is None
    caplog.set_level(logging.INFO)
    report = evaluate(model, digits, ["fgsm"])
    assert report.clean_accuracy == pytest.approx(accuracy(model, digits).float().mean().item())
    assert report.settings["runs_on"].startswith("the model itself, frozen in place: ")
    assert re.search(reason, report.settings["runs_on"])
    assert any(report.settings["runs_on"].split(": ", 1)[1] in line for line in caplog.messages)

    # the training attack and a teacher run the model too
    x, y, index = next(digits.batches(4))
    model.train()
    images = GraphedPGD(model, num_classes=10, **SIZE)(x, y, index=index)
    assert torch.equal(images, PGD(model, **SIZE)(x, y, index=index))
    assert all(module.training for module in model.modules())
    expected = model.eval()(x)
    teacher = TeacherModel(model, torch.no_grad, False, torch.contiguous_format)
    assert torch.equal(teacher(x), expected)
    assert teacher.reason is not None


def test_parameters_of_two_dtypes_have_no_copy() -> None:
    make, reason = CHANGED["two dtypes"]
    assert reason in str(not_supported(make()))


@pytest.mark.parametrize("name", ["awnet_tiny", "resnet_tiny"])
def test_an_unchanged_model_has_a_copy_also_inside_wrappers(name: str, digits: Dataset) -> None:
    model, x = trained(name), next(digits.batches(4)).x
    for wrapped in (model, nn.DataParallel(model)):
        actual = prepare(wrapped, "float32", x)
        assert (actual.runs_on, actual.flag) == (COPY, None)
        torch.testing.assert_close(actual.module(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # torch.compile's import alone takes seconds
def test_an_unchanged_compiled_model_has_a_copy() -> None:
    model, x = trained("resnet_tiny").eval(), torch.rand(2, 1, 8, 8)
    compiled = torch.compile(model, backend="eager")
    copied = inference_copy(compiled)
    assert copied is not None
    torch.testing.assert_close(copied(x), model(x), rtol=1e-4, atol=1e-5)
    compiled.register_forward_hook(lambda *a: a[2] * 2)
    assert "around it has hooks" in str(not_supported(compiled))


def test_global_hooks_and_patched_classes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("resnet_tiny")
    handle = register_module_forward_hook(lambda *_: None)
    assert not_supported(model) == "global module hooks are registered"
    handle.remove()
    assert not_supported(model) is None
    with monkeypatch.context() as patch:
        patch.setattr(ResNet, "forward", lambda self, x: x.flatten(1)[:, :10])
        assert "ResNet, whose forward was replaced" in str(not_supported(model))
    assert not_supported(model) is None


@pytest.mark.parametrize("make", [lambda: _of_class(Normalized, "resnet_tiny"), CHANGED["pruning"][0]])
def test_frozen_refuses_with_the_reason(make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.raises(TypeError, match=r"has no inference copy: .*awnet\.attacks\.frozen"):
        model.inference_copy()
    with pytest.raises(TypeError, match="must be an AWNet on a Backbone"):
        InferenceAWNet(CHANGED["another norm"][0]())
    with pytest.raises(TypeError, match="classifier is a Halved"):
        InferenceBackbone(CHANGED["another head"][0](), torch.float32)


def test_a_training_attack_follows_a_model_whose_structure_changes(digits: Dataset) -> None:
    model = trained("resnet_tiny").train()
    x, y, index = next(digits.batches(4))
    attack = GraphedPGD(model, num_classes=10, **SIZE)

    def same() -> bool:
        expected = (
            PGD(model.inference_copy(), **SIZE)(x, y, index=index)
            if not_supported(model) is None
            else PGD(model, **SIZE)(x, y, index=index)
        )
        return torch.equal(attack(x, y, index=index), expected)

    assert same()
    torch.manual_seed(1)
    model.classifier = nn.Linear(64, 10)  # as in transfer learning
    assert same()
    model.stages[0][0].conv1.activation = None
    assert same()
    handle = model.stem.register_forward_hook(lambda *a: -a[2])
    assert same()
    handle.remove()
    assert same()


def test_a_copy_follows_settings_that_are_no_tensors() -> None:
    model = trained("separate_net", width=0.05).eval()
    copy, x = model.inference_copy(), torch.rand(6, 1, 8, 8)
    model.threshold = float(model.route(x).p_clean.median())
    copy.refresh()
    torch.testing.assert_close(copy(x), model(x))
    model.gate = "soft"
    copy.refresh()
    torch.testing.assert_close(copy(x), model(x))


def test_a_copy_that_differs_is_discarded_with_a_flag(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained("resnet_tiny")
    logits = InferenceBackbone.logits
    monkeypatch.setattr(InferenceBackbone, "logits", lambda self, *a: logits(self, *a) + 0.01)
    report = evaluate(model, digits, ["fgsm"])
    assert any("inference copy's outputs differed" in flag for flag in report.flags)
    assert "its copy differed by" in report.settings["runs_on"]
    monkeypatch.undo()
    assert not any("differed" in flag for flag in evaluate(model, digits, ["fgsm"]).flags)


def test_a_converted_network_runs_itself(digits: Dataset) -> None:
    network = awnet.convert(create_model("resnet_tiny", in_channels=1), router_widths=(4,))
    report = evaluate(network, digits, ["fgsm"])
    assert "GraphModule" in report.settings["runs_on"]

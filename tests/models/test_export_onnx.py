"""ONNX files: onnxruntime computes the model's logits for any batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_families import NARROW, mode, needs
from torch import Tensor, nn

from awnet.cli import main
from awnet.models import create_model, list_models, save_model
from awnet.models.export import export_onnx
from awnet.models.registry import class_of, is_ours
from awnet.models.sources import Adapted
from awnet.nn import convert

TOLERANCE = 1e-5  # of logits of about 1: float32 sums in another order

# name, options: each family, each gate of two networks, each activation
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    *NARROW.items(),
    ("mixed_net", NARROW["separate_net"]),
    *(("resnet_tiny", {"activation": name}) for name in ("silu", "gelu", "leaky_relu")),
    ("awnet_tiny", {"activation": "silu"}),
    ("awnet_tiny", {"bn": "dual", "dynamic_shortcut": True}),
    ("awnet_tiny", {"bn": "one", "beta": 0.0}),
]


@pytest.fixture
def runtime() -> object:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def check_equal(model: nn.Module, path: Path, runtime: object, channels: int = 1) -> None:
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])  # type: ignore[attr-defined]
    (given,), (computed,) = session.get_inputs(), session.get_outputs()
    assert (given.name, computed.name) == ("images", "logits")
    for batch in (1, 2, 5):
        x = torch.rand(batch, channels, 8, 8)
        (logits,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            expected = model.eval()(x)
        scale = max(1.0, float(expected.abs().max()))
        assert (torch.from_numpy(logits) - expected).abs().max() < TOLERANCE * scale
    assert expected.std(0).max() > 100 * TOLERANCE  # the logits depend on the images


def a_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 10),
    )  # fmt: skip


def test_a_converted_normalized_network_in_onnxruntime(runtime: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = convert(a_cnn())
    with torch.no_grad():
        for parameter in network.parameters():  # p, ω and the branches all matter
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = Adapted(network, [0.4], [0.3])
    export_onnx(model, torch.rand(2, 1, 8, 8), tmp_path / "m.onnx")
    check_equal(model, tmp_path / "m.onnx", runtime)


def test_every_registered_model_is_of_an_exported_family() -> None:
    exported = {class_of(name) for name, _ in FAMILIES}
    assert [name for name in list_models() if is_ours(name) and class_of(name) not in exported] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    FAMILIES,
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_every_family_in_onnxruntime(
    name: str, options: dict[str, Any], runtime: object, tmp_path: Path
) -> None:
    needs(name)
    torch.manual_seed(0)
    model = create_model(name, in_channels=1, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # the branches of a norm and the choices of a router differ
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = torch.rand(32, 1, 8, 8)
    for _ in range(20):  # running statistics of these images, without which deep networks ignore the image
        model(x, **mode(model, len(x)))
    export_onnx(model, x[:2], tmp_path / "m.onnx")
    check_equal(model, tmp_path / "m.onnx", runtime)


@pytest.mark.slow
def test_the_command_writes_the_file_once(
    runtime: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create_model("resnet_tiny", in_channels=1)
    save_model(model, tmp_path / "m.safetensors")
    words = ["export", "onnx", str(tmp_path / "m.safetensors"), "--data", "digits", "--out"]
    assert main([*words, str(tmp_path / "m.onnx")]) == 0
    check_equal(model, tmp_path / "m.onnx", runtime)
    assert main([*words, str(tmp_path / "m.onnx")]) == 2
    assert "exists: choose another file" in capsys.readouterr().err


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def test_a_model_that_cannot_be_exported_is_an_error_with_the_reason(runtime: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torch\.export cannot export a branch"):
        export_onnx(Branching(), torch.rand(2, 1, 8, 8), tmp_path / "m.onnx", name="a branch")
    assert not (tmp_path / "m.onnx").exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx and onnxscript: pip install 'awnet\[onnx\]'"):
        export_onnx(a_cnn(), torch.rand(2, 1, 8, 8), tmp_path / "m.onnx")

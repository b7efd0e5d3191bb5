"""ONNX files: onnxruntime computes the model's logits for any batch size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.model_families import NARROW, narrow
from torch import Tensor, nn

from awnet.cli import main
from awnet.models import create_model, save_model
from awnet.models.export import export_onnx
from awnet.models.sources import Adapted
from awnet.nn import convert

TOLERANCE = 1e-5  # of logits of about 1: float32 sums in another order


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
            assert (torch.from_numpy(logits) - model.eval()(x)).abs().max() < TOLERANCE


def a_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 10),
    )  # fmt: skip


@pytest.mark.slow
def test_a_converted_normalized_network_in_onnxruntime(runtime: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = convert(a_cnn())
    with torch.no_grad():
        for parameter in network.parameters():  # p, ω and the branches all matter
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = Adapted(network, [0.4], [0.3])
    export_onnx(model, torch.rand(2, 1, 8, 8), tmp_path / "m.onnx")
    check_equal(model, tmp_path / "m.onnx", runtime)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NARROW if not name.startswith("swin")])
def test_every_family_in_onnxruntime(name: str, runtime: object, tmp_path: Path) -> None:
    model = narrow(name)
    export_onnx(model, torch.rand(2, 1, 8, 8), tmp_path / "m.onnx")
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

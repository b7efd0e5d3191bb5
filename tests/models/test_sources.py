"""awnet.load_model: models of any origin by one string."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.extras import forget, make_absent, optional
from torch import nn

import awnet
from awnet.models import registry
from awnet.models.sources import Adapted, load_weights, source_kind, source_name

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

def number():
    return 3
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "code_of_sources.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "code_of_sources", raising=False)
    yield f"{tmp_path / 'code_of_sources.py'}:net"
    sys.modules.pop("code_of_sources", None)


def test_the_kind_of_a_source_follows_its_form(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    kinds = {
        "runs/x": "file",
        "x.safetensors": "file",
        "C:\\runs\\x": "file",
        "C:/runs/x": "file",
        str(tmp_path / "a:b"): "file",
        "x.pt2": "program",
        "timm:resnet18.a1_in1k": "timm",
        "hub:user/repo": "hub",
        "robustbench:Carmon2019Unlabeled": "robustbench",
        "path/to/file.py:function": "code",
        "package.module:function": "code",
    }
    assert {source: source_kind(source) for source in kinds} == kinds
    assert source_kind(Path("timm:resnet18")) == "file"  # a path, such as one that a run recorded
    assert source_name("path/to/file.py:function") == "path-to-file.py-function"


def test_a_model_function_takes_weights_and_normalization(code: str, tmp_path: Path) -> None:
    plain = awnet.load_model(code)
    assert not plain.training
    assert registry.name_of(plain) == code
    other = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in other.state_dict().items()}},
        tmp_path / "w.pt",
    )
    model = awnet.load_model(code, weights=tmp_path / "w.pt", mean=[0.1, 0.2, 0.3], std=[0.5], image_size=2)
    x = torch.rand(5, 3, 2, 2)
    expected = other((x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / 0.5)
    torch.testing.assert_close(model(x), expected)
    large = torch.rand(5, 3, 6, 6)
    assert model(large).shape == (5, 3)


def test_resizing_is_differentiable_and_keeps_constant_images() -> None:
    model = Adapted(nn.Identity(), image_size=4)
    x = torch.full((1, 3, 7, 9), 0.25, requires_grad=True)
    torch.testing.assert_close(model(x), torch.full((1, 3, 4, 4), 0.25))
    model(x).sum().backward()
    assert float(x.grad.sum()) == pytest.approx(3 * 4 * 4)  # the weights of each output pixel sum to 1


def test_a_program_is_loaded_and_attacked(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.rand(2, 3, 4, 4)
    batch = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(network, (x,), dynamic_shapes=(batch,)), tmp_path / "n.pt2")
    model = awnet.load_model(str(tmp_path / "n.pt2"))
    torch.testing.assert_close(model(x), network(x))
    assert not model.train().training  # a program has no other mode
    images, labels = torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 2])
    x_adv = awnet.attacks.FGSM(model, eps=0.1)(images, labels)
    torch.testing.assert_close(x_adv, awnet.attacks.FGSM(network, eps=0.1)(images, labels))


def test_a_model_of_the_hub_is_loaded_from_a_folder_in_its_form(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = awnet.create_model("awnet_tiny", in_channels=1).eval()
    model.save_pretrained(tmp_path / "repo")
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(awnet.load_model(f"hub:{tmp_path / 'repo'}")(x), model(x))
    (tmp_path / "repo" / "config.json").write_text(json.dumps({"architectures": ["resnet"]}))
    with pytest.raises(
        ValueError, match=r"does not name a model of awnet; for timm.s models use timm:hf-hub"
    ):
        awnet.load_model(f"hub:{tmp_path / 'repo'}")


def test_a_timm_model_normalizes_only_with_pretrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optional("timm")
    import timm

    reference = timm.create_model("resnet10t", num_classes=7).eval()
    torch.save(reference.state_dict(), tmp_path / "w.pt")
    model = awnet.load_model("timm:resnet10t", weights=tmp_path / "w.pt", num_classes=7)
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(model(x), reference(x))

    def create(name: str, pretrained: bool) -> nn.Module:
        assert pretrained
        return reference

    monkeypatch.setattr(timm, "create_model", create)
    mean, std = (torch.tensor(reference.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(awnet.load_model("timm:resnet10t")(x), reference((x - mean) / std))
    with pytest.raises(ValueError, match="num_classes would replace the pretrained classifier"):
        awnet.load_model("timm:resnet10t", num_classes=7)


def test_robustbench_gets_data_set_norm_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    package, utils, calls = ModuleType("robustbench"), ModuleType("robustbench.utils"), []
    package.__spec__ = utils.__spec__ = sys.__spec__

    def load(**arguments: str) -> nn.Module:
        calls.append(arguments)
        return nn.Linear(1, 1)

    utils.load_model = load
    monkeypatch.setitem(sys.modules, "robustbench", package)
    monkeypatch.setitem(sys.modules, "robustbench.utils", utils)
    awnet.load_model("robustbench:Carmon2019Unlabeled")
    awnet.load_model("robustbench:cifar100/L2/Other")
    assert calls == [
        {"model_name": "Carmon2019Unlabeled", "dataset": "cifar10", "threat_model": "Linf"},
        {"model_name": "Other", "dataset": "cifar100", "threat_model": "L2"},
    ]


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        (
            "timm:resnet18",
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "timm:resnet18 needs timm 1.1.1, whose torchvision does not import beside torch "
            f"{torch.__version__} (RuntimeError: operator torchvision::nms does not exist): install the "
            "torchvision of the same release and index, for a torch without CUDA pip install torchvision "
            "--index-url https://download.pytorch.org/whl/cpu",
        ),
        (
            "timm:resnet18",
            "raise ImportError('no')",
            "timm:resnet18 needs timm 1.1.1, which is installed but does not import (ImportError: no): install "
            'a version that fits the other packages: pip install --upgrade "awnet[timm]"',
        ),
        (
            "robustbench:A",
            "import pkg_resources",
            "robustbench:A needs robustbench 1.1.1, which is installed but does not import "
            "(ModuleNotFoundError: No module named 'pkg_resources'): the module "
            "pkg_resources is missing, which pip install 'setuptools<81' installs",
        ),
        (
            "robustbench:A",
            "from autoattack.state import EvaluationState",
            "(ModuleNotFoundError: No module named 'autoattack'): the module autoattack is "
            "missing, which pip install git+https://github.com/fra31/auto-attack installs",
        ),
        (
            "robustbench:A",
            "import no_such_module.at_all",
            "(ModuleNotFoundError: No module named 'no_such_module'): the module no_such_module is missing, "
            "which pip install no_such_module installs",
        ),
        (
            "robustbench:A",
            "import robustbench.absent",
            "(ModuleNotFoundError: No module named 'robustbench.absent'): install a version that fits the "
            "other packages: pip install --upgrade git+https://github.com/RobustBench/robustbench",
        ),
    ],
)
def test_a_package_that_does_not_import_is_an_error_with_advice(
    source: str, code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = source.partition(":")[0]
    forget(monkeypatch, package)
    folder, about = tmp_path / package, tmp_path / f"{package}-1.1.1.dist-info"
    folder.mkdir()
    (folder / "__init__.py").write_text(code)
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.1.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("pkg_resources", "autoattack"):
        make_absent(monkeypatch, name)
    with pytest.raises(ImportError, match=f"{re.escape(message)}$"):
        awnet.load_model(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:resnet18", 'timm:resnet18 needs timm, which is not installed: pip install "awnet[timm]"'),
        (
            "robustbench:A",
            "robustbench:A needs robustbench, which is not installed: pip install "
            "git+https://github.com/RobustBench/robustbench",
        ),
    ],
)
def test_a_package_that_is_not_installed_is_an_error_with_advice(
    source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_absent(monkeypatch, source.partition(":")[0])
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        awnet.load_model(source)


class Sneaky:
    def __reduce__(self) -> object:
        return (print, ("code from a file ran",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "does not contain a state dict: save model.state_dict()"),
        (
            {"0.weight": torch.zeros(2)},
            r"does not fit the Sequential: it lacks 1\.bias, 1\.weight; the model lacks",
        ),
        (
            {"1.weight": torch.zeros(2, 2), "1.bias": torch.zeros(3)},
            r"1\.weight is \[2, 2\] and not \[3, 12\]",
        ),
        ({"model": Sneaky()}, "holds Python objects, which could run code"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    content: object, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        load_weights(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), tmp_path / "w.pt")
    assert "ran" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("nowhere.pt2", {}, FileNotFoundError, "does not exist"),
        ("nowhere.py:net", {}, FileNotFoundError, "is not a file"),
        ("no_such_module_anywhere:net", {}, ImportError, "cannot be imported"),
        ("CODE:missing", {}, ValueError, "has no function 'missing'"),
        ("CODE:number", {}, TypeError, "must return an nn.Module, got int"),
        ("CODE:net", {"num_classes": 3}, ValueError, "num_classes is for timm models"),
        ("CODE:net", {"model": nn.Identity()}, ValueError, "use weights="),
        ("CODE:net", {"std": [0.0]}, ValueError, "std must hold positive numbers"),
        ("CODE:net", {"mean": []}, ValueError, "mean must hold finite numbers"),
        ("CODE:net", {"image_size": 0}, ValueError, "image_size must be"),
        ("CODE:net", {"weights": "nowhere.pt"}, FileNotFoundError, "does not exist"),
        ("runs/x", {"weights": "w.pt"}, ValueError, "weights is for timm models and functions"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(
    source: str, options: dict[str, object], error: type[Exception], message: str, code: str
) -> None:
    with pytest.raises(error, match=message):
        awnet.load_model(source.replace("CODE", code.rpartition(":")[0]), **options)


def test_a_run_of_the_package_takes_no_normalization(tmp_path: Path) -> None:
    awnet.save_model(awnet.create_model("resnet_tiny", in_channels=1), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="a run's model takes"):
        awnet.load_model(tmp_path / "m.safetensors", mean=[0.5])


def test_a_damaged_program_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "n.pt2").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not an exported program"):
        awnet.load_model(tmp_path / "n.pt2")

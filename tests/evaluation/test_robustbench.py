"""RobustBench's rules: ours keeps them, networks that break one are named; what is exported loads again."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support.extras import optional
from torch import Tensor, nn

from awnet.cli import main
from awnet.data import Dataset, from_arrays
from awnet.evaluation.robustbench import Entry, export_robustbench, violations
from awnet.models import create_model, load_model, save_model


class Unused(ModuleType):
    """Stands for a package that robustbench imports for models that are not loaded here."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture
def robustbench() -> Iterator[ModuleType]:
    """robustbench.utils: of robustbench 1.1.1, or of the older copy that the wheel of torchattacks brings.

    As published it does not import here: torchvision's own library does not load beside a CPU torch,
    pkg_resources has left setuptools, and AutoAttack's module is called pyautoattack.
    """
    optional("pyautoattack")
    if importlib.util.find_spec("robustbench") is None:
        pytest.skip("robustbench is optional and not installed")
    before = dict(sys.modules)
    try:
        sys.modules["autoattack"] = optional("pyautoattack")
        sys.modules["autoattack.state"] = optional("pyautoattack.state")
        for name in ("pkg_resources", "gdown", "geotorch", "pandas", "torchdiffeq"):
            if name not in sys.modules and importlib.util.find_spec(name) is None:
                sys.modules[name] = Unused(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of timm, of modules that moved
            yield importlib.import_module("robustbench.utils")
    finally:
        for name in set(sys.modules) - set(before):
            if name.partition(".")[0] in ("robustbench", "autoattack") or isinstance(
                sys.modules[name], Unused
            ):
                del sys.modules[name]


class Broken(nn.Module):
    """A linear classifier that breaks one rule."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.linear = nn.Linear(3 * 8 * 8, 10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "zero gradient":
            x = x.detach() + 0 * x
        if self.how == "a forward pass changes":
            self.calls += 1
        logits = self.linear(x.flatten(1))
        if self.how == "deterministic":
            logits = logits + torch.randn_like(logits)
        if self.how == "others in its batch":
            logits = logits - logits.mean(0)
        if self.how == "NaN":
            logits = logits / 0
        return logits[:, :5] if self.how == "it must give logits" else logits


def images(n: int = 6) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def dataset(name: str = "cifar10") -> Dataset:
    pixels = (images(12) * 255).to(torch.uint8)
    return from_arrays(
        pixels, torch.arange(12) % 10, name=name, split="test", classes=[str(i) for i in range(10)]
    )


@pytest.mark.parametrize(
    "how",
    [
        "zero gradient",
        "a forward pass changes",
        "deterministic",
        "others in its batch",
        "NaN",
        "it must give logits",
    ],
)
def test_a_model_that_violates_a_rule_is_an_error_that_names_it(how: str) -> None:
    torch.manual_seed(0)
    actual = violations(Broken(how), images(), 10)
    assert len(actual) >= 1
    expected = "gradient" if how == "zero gradient" else how
    assert any(expected in line for line in actual)
    assert violations(Broken("nothing"), images(), 10) == []


@pytest.mark.parametrize("name", ["awnet_tiny", "resnet_tiny"])
@pytest.mark.parametrize("training", [False, True])
def test_our_models_satisfy_the_rules_of_robustbench(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = create_model(name).train(training)
    assert violations(model, images(), 10) == []
    assert model.training == training


def test_an_exported_model_loads_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("awnet_tiny", beta=2.0).eval()
    weights, info, zoo = export_robustbench(model, dataset(), None, tmp_path, Entry("Test2026Entry"))
    again = create_model("awnet_tiny", beta=2.0).eval()
    again.load_state_dict(torch.load(weights, weights_only=True))
    assert torch.equal(again(images()), model(images()))
    entry = json.loads(info.read_text())
    assert entry["eps"] == "8/255"
    assert entry["architecture"] == "awnet_tiny"
    assert entry["clean_acc"] is entry["autoattack_acc"] is None  # nothing was measured
    assert info.relative_to(tmp_path) == Path("model_info/cifar10/Linf/Test2026Entry.json")
    compile(zoo.read_text(), str(zoo), "exec")
    assert "beta=2.0" in zoo.read_text()


def test_robustbench_loads_an_exported_model(tmp_path: Path, robustbench: ModuleType) -> None:
    torch.manual_seed(0)
    model = create_model("awnet_tiny", beta=2.0).eval()
    *_, zoo = export_robustbench(model, dataset(), None, tmp_path, Entry("Test2026Entry"))
    namespace: dict[str, object] = {}
    exec(compile(zoo.read_text(), str(zoo), "exec"), namespace)
    loaded = robustbench.load_model(
        "Test2026Entry", model_dir=tmp_path / "models", dataset="cifar10", threat_model="Linf"
    )
    assert not loaded.training
    assert torch.equal(loaded(images()), model(images()))


def test_a_model_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leaderboards for cifar10, cifar100"):
        export_robustbench(create_model("awnet_tiny"), dataset("digits"), None, tmp_path, Entry("A"))
    with pytest.raises(ValueError, match="no config"):
        export_robustbench(Broken("nothing"), dataset(), None, tmp_path, Entry("A"))
    with pytest.raises(ValueError, match="names a folder"):
        export_robustbench(create_model("awnet_tiny"), dataset(), None, tmp_path, Entry("a/b"))
    broken = Broken("deterministic")
    broken.config = create_model("resnet_tiny").config
    with pytest.raises(ValueError, match="breaks RobustBench's rules"):
        export_robustbench(broken, dataset(), None, tmp_path, Entry("A"))


def test_a_program_runs_any_batch_from_the_command_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("awnet_tiny", in_channels=1).eval()
    weights, program = tmp_path / "model.safetensors", tmp_path / "model.pt2"
    save_model(model, weights)
    arguments = [
        "export",
        "program",
        str(weights),
        "--data",
        "digits",
        "--out",
        str(program),
        "--device",
        "cpu",
    ]
    assert main(arguments) == 0
    x = torch.rand(5, 1, 8, 8)
    loaded = torch.export.load(program).module()
    # the same operators in the same order; only fusing by the exporter could change a bit
    torch.testing.assert_close(loaded(x), load_model(weights)(x), rtol=1e-5, atol=1e-6)
    assert main(arguments) == 2  # the file is there


@pytest.mark.slow
def test_a_model_of_robustbench_is_loaded_by_name_and_evaluated(
    robustbench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enums = importlib.import_module("robustbench.model_zoo.enums")
    entries = robustbench.all_models[enums.BenchmarkDataset.cifar_10][enums.ThreatModel.Linf]
    torch.manual_seed(0)
    reference = entries["Wong2020Fast"]["model"]().eval()
    monkeypatch.chdir(tmp_path)
    weights = Path("models", "cifar10", "Linf", "Wong2020Fast.pt")  # where robustbench stores downloads
    weights.parent.mkdir(parents=True)
    torch.save(reference.state_dict(), weights)
    model = load_model("robustbench:Wong2020Fast")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))
    pixels = (torch.rand(4, 32, 32, 3) * 255).to(torch.uint8).numpy()
    np.savez("color.npz", images=pixels, labels=np.arange(4))
    words = ["robustbench:Wong2020Fast", "--data", "color.npz", "--attacks", "fgsm", "--device", "cpu"]
    assert main(["evaluate", *words]) == 0
    folder = Path("runs", "robustbench-Wong2020Fast", "evaluations", "default")
    assert json.loads((folder / "report.json").read_text())["model"] == "robustbench:Wong2020Fast"
    with pytest.raises(ValueError, match="RobustBench cannot load 'Nobody2020' for cifar10 and Linf"):
        load_model("robustbench:Nobody2020")

"""What was changed in a model comes back from its file, or is refused by name before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.extras import optional
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import awnet
from awnet.data import Splits, load_dataset
from awnet.evaluation import accuracy, evaluate
from awnet.evaluation.robustbench import Entry, export_robustbench
from awnet.models import ResNet, create_model, load_model, register_model, save_model
from awnet.models.registry import _REGISTRY, config_of
from awnet.models.sources import Adapted
from awnet.nn import convert
from awnet.training import recipe_for, train

SLOW = pytest.mark.slow  # torch.compile's import alone takes seconds
RECIPE = recipe_for("standard", "digits", epochs=1)


class Centered(ResNet):
    """Made as its base class is."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x - 0.5)


class Scaled(ResNet):
    """With a constructor and a buffer of its own."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__("resnet_tiny", 10, 1)
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * self.factor)


class Needy(ResNet):
    def __init__(self, mean: float) -> None:
        super().__init__("resnet_tiny", 10, 1)
        self.mean = mean


class Small(nn.Module):
    """The user's, with a ``config`` of its own and a setting that is no tensor."""

    def __init__(self, num_classes: int, in_channels: int, width: int = 4) -> None:
        super().__init__()
        self.config = {"width": width}
        self.body = nn.Conv2d(in_channels, width, 3)
        self.head = nn.Linear(width, num_classes)
        self.power, self.shift = 1.0, torch.tensor([0.25])

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.body(x) - self.shift).clamp(min=0).mean((2, 3)) * self.power)


def model(name: str = "awnet_tiny", change: Callable[[nn.Module], object] | None = None) -> nn.Module:
    torch.manual_seed(0)
    network = create_model(name, in_channels=1)
    if change is not None:
        change(network)
    return network


def with_beta(network: nn.Module) -> None:
    network.router.beta, network.router.p_temperature, network.router.p_scale = 1.5, 2.0, 0.5
    nn.init.normal_(network.router.signal_heads.weight, std=0.1)


def with_layer_settings(network: nn.Module) -> None:
    network.stem.bn.eps = 1e-2
    network.stages[0][0].conv1.activation = None
    network.stages[0][0].conv1.dilation, network.stages[0][0].conv1.padding = (2, 2), (2, 2)


def pruned_for_good(network: nn.Module) -> None:
    prune.l1_unstructured(network.stem, "weight", 0.5)
    prune.remove(network.stem, "weight")


FAITHFUL = {
    "router settings": lambda: model(change=with_beta),
    "layer settings": lambda: model("resnet_tiny", with_layer_settings),
    "bfloat16": lambda: model().bfloat16(),
    "float64": lambda: model("resnet_tiny").double(),
    "one layer in float64": lambda: model("resnet_tiny", lambda m: m.classifier.double()),
    "a subclass": lambda: Centered("resnet_tiny", 10, 1),
    "a subclass with its own constructor": lambda: Scaled(3.0),
    "data-parallel": lambda: nn.DataParallel(model("resnet_tiny")),
    "compiled": lambda: torch.compile(model("resnet_tiny"), backend="eager"),
    "a compiled stage": lambda: model(
        "resnet_tiny", lambda m: setattr(m, "stages", torch.compile(m.stages, backend="eager"))
    ),
    "pruned for good": lambda: model("resnet_tiny", pruned_for_good),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=SLOW if "compiled" in case else ()) for case in FAITHFUL]
)
def test_a_changed_model_is_restored_from_its_file(case: str, tmp_path: Path) -> None:
    network = FAITHFUL[case]()
    save_model(network, tmp_path / "a.safetensors")
    again = load_model(tmp_path / "a.safetensors")
    inner = awnet.nn.unwrapped(network).eval()
    assert type(again) is type(inner)
    expected = {key.replace("_orig_mod.", ""): value for key, value in inner.state_dict().items()}
    assert again.state_dict().keys() == expected.keys()
    for key, value in again.state_dict().items():
        assert value.dtype == expected[key].dtype
        assert torch.equal(value, expected[key])
    if case != "one layer in float64" and "compiled" not in case:  # that one computes nothing
        x = torch.rand(3, 1, 8, 8).to(next(inner.parameters()).dtype)
        assert torch.equal(again(x), inner(x))
    assert config_of(again) == config_of(inner)


def test_settings_of_a_separate_net_are_restored(tmp_path: Path) -> None:
    network = create_model("separate_net", in_channels=1, width=0.05)
    network.threshold = 0.25
    save_model(network.with_gate("soft"), tmp_path / "a.safetensors")
    again = load_model(tmp_path / "a.safetensors")
    assert (again.threshold, again.gate) == (0.25, "soft")


def hooked(network: nn.Module) -> None:
    network.stages[0][0].register_forward_pre_hook(lambda *_: None)


def _replace(network: nn.Module) -> None:
    network.stem.forward = lambda *a, **k: None


REFUSED = {
    "a hook": (hooked, r"stages\.0\.0 has other forward pre hooks"),
    "another head": (
        lambda m: setattr(m, "classifier", nn.Sequential(nn.Dropout(0.2), m.classifier)),
        "classifier is a Sequential instead of a Linear",
    ),
    "a head for other classes": (
        lambda m: setattr(m, "classifier", nn.Linear(64, 12)),
        r"classifier has parameter bias \[12\] instead of \[10\]",
    ),
    "pruning": (lambda m: prune.l1_unstructured(m.stem, "weight", 0.5), "stem has other forward pre hooks"),
    "a parametrization": (lambda m: parametrizations.weight_norm(m.classifier), "is a ParametrizedLinear"),
    "a replaced method": (_replace, "stem has its method forward replaced"),
    "a removed layer": (lambda m: delattr(m.stages[1][0], "shortcut"), "shortcut was removed"),
    "an added layer": (lambda m: m.add_module("extra", nn.ReLU()), "extra, a ReLU, was added"),
    "an added buffer": (
        lambda m: m.register_buffer("mean", torch.zeros(1)),
        r"has buffer mean \[1\] instead of none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_changes_that_no_file_could_hold_are_refused_before_training(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    network = model("resnet_tiny", change)
    with pytest.raises(ValueError, match=message):
        save_model(network, tmp_path / "a.safetensors")
    splits = Splits(*(part.subset(4) for part in load_dataset("digits")))
    if case not in ("a replaced method", "a removed layer"):  # these do not run at all
        with pytest.raises(ValueError, match=message):
            train(RECIPE, network, splits, tmp_path / "run", quiet=True)
    assert not list(tmp_path.iterdir())


def test_subclasses_that_cannot_be_rebuilt_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="its class Needy cannot be created again by Needy"):
        save_model(Needy(0.5), tmp_path / "a.safetensors")
    Stranger = type("Stranger", (ResNet,), {"__module__": "elsewhere"})
    save_model(Stranger("resnet_tiny", 10, 1), tmp_path / "a.safetensors")
    assert type(load_model(tmp_path / "a.safetensors")) is Stranger  # still known
    monkeypatch.setattr("awnet.models.files._CLASSES", {})  # as in another process
    with pytest.raises(ValueError, match="it is a Stranger of the module elsewhere, which is not imported"):
        load_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"class": "torch.nn:Linear", "call": "config"}, "not a subclass of 'resnet_tiny'"),
        ({"class": "os:system"}, "not imported here"),
        ({"settings": {"stem": {"forward": 3}}}, "which the model lacks"),
        ({"settings": {"nowhere": {"eps": 3}}}, "a module 'nowhere'"),
        ({"settings": {"stem.bn": {"eps": "large"}}}, r"stem\.bn\.eps cannot be 'large'"),
        ({"settings": {"stem": {"_forward_hooks": {}}}}, "which the model lacks"),
    ],
)
def test_settings_of_a_foreign_file_reach_plain_attributes_alone(
    about: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    network = create_model("resnet_tiny")
    whole = {"format": 1, "version": "x", "config": config_of(network)} | about
    save_file(network.state_dict(), path, {"awnet": json.dumps(whole)})
    with pytest.raises(ValueError, match=message):
        load_model(path)


def small_splits() -> Splits:
    return Splits(*(part.subset(16) for part in load_dataset("digits")))


def converted() -> nn.Module:
    torch.manual_seed(0)
    return awnet.convert(create_model("resnet_tiny", in_channels=1), router_widths=(4,))


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.3) / 0.3


@pytest.mark.parametrize(
    "make", [pytest.param(converted, marks=SLOW), lambda: nn.Sequential(Norm(), model("resnet_tiny"))]
)
def test_a_foreign_models_run_is_loaded_into_one_built_alike(
    make: Callable[[], nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits, folder = small_splits(), tmp_path / "run"
    result = train(RECIPE, make(), splits, folder, tensorboard=False)
    assert "note: awnet cannot build a" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"which awnet cannot build: build it in the same way and pass it"):
        load_model(folder)
    again = load_model(folder, model=make())
    assert torch.equal(accuracy(again, splits.test), accuracy(result.model, splits.test))
    report = evaluate(again, splits.test, ["fgsm"], out=folder)
    assert report.settings["runs_on"].startswith("the model itself")
    x, y, index = next(splits.test.batches(4))
    assert awnet.attacks.FGSM(again, eps=0.1)(x, y, index=index).shape == x.shape
    with pytest.raises(ValueError, match="does not fit the model that was passed: it is not built as"):
        load_model(folder, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    other = make()
    other.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="forward hook"):
        load_model(folder, model=other)
    resumed = train(RECIPE, make(), splits, folder, resume=True, quiet=True, tensorboard=False)
    assert torch.equal(accuracy(resumed.model, splits.test), accuracy(result.model, splits.test))


def test_a_registered_models_run_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "small of test_faithful"
    monkeypatch.setattr("awnet.models.registry._REGISTRY", dict(_REGISTRY))
    register_model(name, Small)
    splits, folder = small_splits(), tmp_path / "run"
    network = create_model(name, num_classes=10, in_channels=1, width=3)
    network.power = 0.5
    result = train(RECIPE, network, splits, folder, quiet=True, tensorboard=False)
    again = load_model(folder)
    assert (again.power, again.config) == (0.5, {"width": 3})
    assert torch.equal(accuracy(again, splits.test), accuracy(result.model, splits.test))
    network.shift = torch.tensor([0.5])
    with pytest.raises(ValueError, match="the model has another shift"):
        save_model(network, tmp_path / "a.safetensors")
    monkeypatch.undo()  # as in another process
    with pytest.raises(ValueError, match=f"unknown model '{name}'. If your code registers it"):
        load_model(folder)


def test_weights_alone_of_wrapped_models_load_into_a_model(tmp_path: Path) -> None:
    network = model("resnet_tiny").bfloat16()
    for number, wrapped in enumerate((nn.DataParallel(network), network)):
        path = tmp_path / f"{number}.safetensors"
        save_file(wrapped.state_dict(), path)
        with pytest.raises(ValueError, match="metadata names no model"):
            load_model(path)
        for target in (model("resnet_tiny"), nn.DataParallel(model("resnet_tiny"))):
            again = load_model(path, model=target)
            assert again is target
            for value, expected in zip(
                again.state_dict().values(), network.state_dict().values(), strict=True
            ):
                assert value.dtype == expected.dtype
                assert torch.equal(value, expected)
    with pytest.raises(ValueError, match="does not fit the model that was passed"):
        load_model(path, model=nn.Linear(2, 2))


@SLOW
def test_a_run_of_a_compiled_model_resumes_without_the_compiler(tmp_path: Path) -> None:
    splits, folder = small_splits(), tmp_path / "run"
    compiled = torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), backend="eager")
    train(RECIPE, compiled, splits, folder, quiet=True, tensorboard=False, max_minutes=1e-9)
    assert set(load_file(folder / "last.safetensors")) == {"1.weight", "1.bias"}
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    result = train(RECIPE, plain, splits, folder, resume=True, quiet=True, tensorboard=False)
    assert result.finished


def test_the_log_begins_with_what_attack_and_teachers_run_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = small_splits()
    teachers = [model("resnet_tiny"), Centered("resnet_tiny", 10, 1)]
    recipe = recipe_for("mtard", "digits", epochs=1, attack_steps=1)
    train(recipe, model(), splits, tmp_path / "run", teachers=teachers, tensorboard=False)
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["kind"] == "start"
    copied = "a frozen copy of the model"
    runs_on = first["runs_on"]
    assert (runs_on["training attack"], runs_on["clean teacher"]) == (copied, copied)
    assert "Centered is a subclass of ResNet" in runs_on["robust teacher"]
    assert "note: the robust teacher runs the model itself" in capsys.readouterr().out


def test_exports_that_rebuild_by_name_refuse_what_was_changed(tmp_path: Path) -> None:
    network = model("resnet_tiny")
    network.save_pretrained(tmp_path / "hub")
    again = ResNet.from_pretrained(tmp_path / "hub")
    assert torch.equal(again.eval()(torch.ones(1, 1, 8, 8)), network.eval()(torch.ones(1, 1, 8, 8)))
    cifar = replace(load_dataset("digits").test.subset(8), name="cifar10")
    network.stem.bn.eps = 1e-2
    for export in (
        lambda: network.save_pretrained(tmp_path / "again"),
        lambda: export_robustbench(network, cifar, None, tmp_path / "bench", Entry("A")),
    ):
        with pytest.raises(ValueError, match="eps"):
            export()
    with pytest.raises(ValueError, match=r"torch\.float64"):
        model("resnet_tiny").double().save_pretrained(tmp_path / "again")
    assert [entry.name for entry in tmp_path.iterdir()] == ["hub"]


def converted() -> nn.Module:
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 10),
    )  # fmt: skip
    return Adapted(convert(cnn), [0.5], [0.2])


def test_a_model_of_any_origin_is_saved_and_loaded_into_one_built_alike(tmp_path: Path) -> None:
    model, path, x = converted(), tmp_path / "a.safetensors", torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_model(model, path)
    assert torch.equal(load_model(path, model=converted())(x), model.eval()(x))
    with pytest.raises(
        ValueError, match=r"Adapted, which awnet cannot build.*model=my_model.*--model FILE\.py"
    ):
        load_model(path)
    with pytest.raises(ValueError, match="not built as the one that was saved"):
        load_model(path, model=Adapted(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), [0.5], [0.2]))


def test_a_timm_model_is_saved_and_loaded(tmp_path: Path) -> None:
    optional("timm")
    import timm

    model = convert(timm.create_model("resnet10t", num_classes=3, in_chans=1))
    save_model(model, tmp_path / "a.safetensors")
    again = convert(timm.create_model("resnet10t", num_classes=3, in_chans=1))
    x = torch.rand(1, 1, 32, 32)
    assert torch.equal(load_model(tmp_path / "a.safetensors", model=again)(x), model.eval()(x))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_stored_in_16_bits_is_loaded_in_float32_with_rounded_values(
    storage: torch.dtype, tmp_path: Path
) -> None:
    model = create_model("awnet_tiny")
    save_model(model, tmp_path / "full.safetensors")
    save_model(model, tmp_path / "half.safetensors", storage=storage)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.65 * sizes[0]  # 0.5 of the large weights; small ones, statistics and names stay
    loaded, buffers = load_model(tmp_path / "half.safetensors"), dict(model.named_buffers())
    rounded = 0
    for name, value in model.state_dict().items():
        large = name not in buffers and value.numel() >= 4096
        rounded += large
        expected = value.to(storage).float() if large else value
        assert loaded.state_dict()[name].dtype == value.dtype
        assert torch.equal(loaded.state_dict()[name], expected)
    assert rounded
    save_model(loaded, tmp_path / "again.safetensors", storage=storage)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "half.safetensors").read_bytes()


def test_storage_of_another_dtype_or_of_a_model_in_16_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be torch.bfloat16 or torch.float16, got torch.int8"):
        save_model(create_model("resnet_tiny"), tmp_path / "a.safetensors", storage=torch.int8)
    with pytest.raises(ValueError, match=r"models in float32: this one has parameters in torch.bfloat16"):
        save_model(create_model("resnet_tiny").bfloat16(), tmp_path / "a.safetensors", storage=torch.bfloat16)
    assert not list(tmp_path.iterdir())

"""torch's default dtype and device, changed by a program, do not change figures."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

import awnet
from awnet.attacks import Suite, named_attack
from awnet.data import Splits, from_arrays, load_dataset
from awnet.defaults import standard_defaults
from awnet.detectors import NNIF
from awnet.models import create_model, load_model, save_model
from awnet.models.files import weights_fingerprint
from awnet.training import recipe_for, train

CHANGES = {
    "default dtype float64": lambda: torch.set_default_dtype(torch.float64),
    "default dtype bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "default device meta": lambda: torch.set_default_device("meta"),
}


@pytest.fixture
def restored():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    save_model(create_model("awnet_tiny", in_channels=1, width=0.5), path)
    return path


def figures(path, folder):
    """Everything that a program would quote, of everything that makes tensors."""
    splits = Splits(*(part.subset(32) for part in load_dataset("digits")))
    model = load_model(path)
    batch = next(splits.test.batches(8, shuffle=True, augment=True))
    suite = Suite(budget="smoke", queries=5, reference=batch.x)
    found = {"fingerprint": splits.test.fingerprint(), "weights": weights_fingerprint(model), "x": batch.x}
    for name in ("pgd_trades", "apgd_ce", "softened"):
        attack = named_attack(name, model, splits.test.threat_model, suite=suite)
        attack.steps = 2
        found[name] = attack(batch.x, batch.y, index=batch.index)
    report = awnet.evaluate(model, splits.test, ["fgsm"], batch_size=32).to_dict()
    found["report"] = {name: value for name, value in report.items() if name != "environment"}
    recipe = recipe_for("pgd_at", "digits", epochs=1, batch_size=16, attack_steps=1)
    result = train(recipe, "awnet_tiny", splits, folder, quiet=True, tensorboard=False)
    found["trained"] = weights_fingerprint(result.model)
    detector = NNIF(model, neighbours=3)
    detector.fit(batch.x, batch.y, batch.x, batch.x.flip(3))
    found["detector"] = detector.score(batch.x)
    return found


@pytest.fixture(scope="module")
def expected(saved, tmp_path_factory):
    return figures(saved, tmp_path_factory.mktemp("run"))


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    "change",
    [
        "default dtype float64",
        "default device meta",
        pytest.param("default dtype bfloat16", marks=pytest.mark.slow),
    ],
)
def test_figures_do_not_depend_on_torchs_defaults(change, saved, expected, tmp_path):
    CHANGES[change]()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    found = figures(saved, tmp_path)
    assert (torch.get_default_dtype(), torch.get_default_device()) == (dtype, device)
    torch.set_default_device(None)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("default dtype float64", r"weight is torch\.float64.*model\.float\(\)"),
        ("default device meta", "on the meta device, which holds no values"),
    ],
)
def test_a_model_made_under_other_defaults_is_refused_with_the_cause(change, message, tmp_path):
    CHANGES[change]()
    model = create_model("resnet_tiny", in_channels=1)
    splits = load_dataset("digits")
    with pytest.raises(ValueError, match=message):
        train(recipe_for("standard", "digits"), model, splits, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=message):
        awnet.evaluate(model, splits.test, ["fgsm"])


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.norm(self.convolution(x)).relu().mean((2, 3)))


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("change", CHANGES)
def test_models_are_converted_stored_and_loaded_under_other_defaults(change, saved, tmp_path):
    torch.manual_seed(0)
    x, network, model = torch.rand(2, 1, 8, 8), CNN().eval(), load_model(saved)
    expected, logits = awnet.convert(network, image_size=8, router_widths=(4,)), model(x)
    CHANGES[change]()
    converted = awnet.convert(network, image_size=8, router_widths=(4,))
    save_model(model, tmp_path / "m.safetensors")
    model.save_pretrained(tmp_path / "hub")
    for again in (load_model(tmp_path / "m.safetensors"), type(model).from_pretrained(tmp_path / "hub")):
        assert torch.equal(again(x), logits)
    assert torch.equal(converted(x), expected(x))
    assert {(p.dtype, p.device.type) for p in converted.parameters()} == {(torch.float32, "cpu")}


@pytest.mark.usefixtures("restored")
def test_models_without_values_are_refused_with_the_cause(saved, tmp_path):
    torch.set_default_device("meta")
    model = create_model("awnet_tiny", in_channels=1, width=0.5)
    for use in (
        lambda: awnet.convert(CNN()),
        lambda: save_model(model, tmp_path / "m.safetensors"),
        lambda: load_model(saved, model=model),
        lambda: model.save_pretrained(tmp_path / "hub"),
    ):
        with pytest.raises(ValueError, match="on the meta device, which holds no values"):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("restored")
def test_arrays_become_data_sets_on_the_cpu_whatever_the_default_device():
    torch.set_default_device("meta")
    data = from_arrays(np.zeros((4, 1, 2, 2), np.uint8), [0, 1, 2, 3])
    assert (data.images.device.type, data.labels.device.type, data.index.device.type) == ("cpu",) * 3


@pytest.mark.usefixtures("restored")
def test_the_dtype_is_restored_when_the_last_of_several_threads_ends():
    torch.set_default_dtype(torch.float64)
    inside, leave = threading.Event(), threading.Event()

    def work():
        with standard_defaults():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    with standard_defaults():
        assert torch.zeros(1).dtype == torch.float32
    assert torch.zeros(1).dtype == torch.float32  # the thread still needs it
    leave.set()
    thread.join()
    assert torch.zeros(1).dtype == torch.float64

"""A network with a router in parts: against direct computation, and where a part is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.model_families import narrow
from torch import Tensor, nn

from awnet.attacks import Suite
from awnet.cli import main
from awnet.data import load_dataset
from awnet.data.dataset import Dataset, from_arrays
from awnet.evaluation import Report, evaluate, gated_parts, parts_table
from awnet.evaluation.html import page
from awnet.evaluation.parts import (
    AFFINE,
    DYNAMIC,
    P_0,
    P_1,
    PARTS,
    ROUTER,
    SCALES_CLEAN,
    SCALES_MEAN,
    STATISTICS,
    WHOLE,
)
from awnet.models import create_model, save_model
from awnet.models.files import weights_fingerprint
from awnet.nn import AWNet, MixBatchNorm2d, Routing, convert, route, with_routing

SMOKE = Suite(budget="smoke")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits").test.subset(24)


@pytest.fixture(scope="module")
def model() -> AWNet:
    """A tiny AW-Net whose router, scales and branches all change the logits."""
    torch.manual_seed(0)
    network = create_model("awnet_tiny", in_channels=1, width=0.25).eval()
    with torch.no_grad():
        network.router.signal_heads.weight.normal_(std=0.5)
        network.router.type_head.weight.normal_(std=3.0)
        for module in network.modules():
            if isinstance(module, MixBatchNorm2d):
                for value in (module.weight, module.bias, module.running_mean, module.running_var):
                    value.add_(torch.rand_like(value))
    return network


@pytest.fixture(scope="module")
def parts(model: AWNet, digits: Dataset) -> dict:
    before = weights_fingerprint(model)
    actual = gated_parts(model, digits, SMOKE)
    assert weights_fingerprint(model) == before
    return actual


def row(parts: dict, part: str) -> dict:
    (actual,) = (one for one in parts["rows"] if one["part"] == part)
    return actual


def share(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).double().mean())


def test_each_part_is_measured_once_with_its_cost(parts: dict) -> None:
    assert [one["part"] for one in parts["rows"]] == list(PARTS)
    assert all(one["not_applicable"] is None for one in parts["rows"])
    assert all(one["robust_accuracy"] <= one["clean_accuracy"] for one in parts["rows"])
    assert parts["images"] == 24
    attacks = len(PARTS) + 2  # three on the router alone
    assert parts["passes"] == {
        "forward": len(PARTS) + attacks * (parts["steps"] + 1),
        "backward": attacks * parts["steps"],
    }


@torch.no_grad()
def test_clean_accuracies_equal_direct_computation(model: AWNet, digits: Dataset, parts: dict) -> None:
    x, y, _ = next(digits.batches(24))
    routing, whole = route(model, x), model(x)

    def check(part: str, logits: Tensor) -> None:
        actual = row(parts, part)
        assert actual["clean_accuracy"] == pytest.approx(share(logits, y))
        assert actual["changed"] == pytest.approx(1 - share(logits, whole.argmax(1)))

    check(WHOLE, whole)
    for part, p in ((P_0, 0.0), (P_1, 1.0)):
        check(part, with_routing(model, x, replace(routing, p_clean=torch.full((24,), p))))
    mean = [scale.mean(0).expand(24, -1) for scale in routing.filter_scales]
    check(SCALES_MEAN, with_routing(model, x, replace(routing, filter_scales=mean)))
    for part in (SCALES_CLEAN, ROUTER, DYNAMIC):  # they differ on attacked images only
        check(part, whole)
    for part, names in ((AFFINE, ("weight", "bias")), (STATISTICS, ("running_mean", "running_var"))):
        state = dict(model.state_dict())
        for key, value in state.items():
            norm = key.startswith("dynamic.") and value.dim() == 2 and value.shape[0] == 2
            if norm and key.rpartition(".")[2] in names:
                state[key] = value[[1, 0]]
        other = create_model("awnet_tiny", in_channels=1, width=0.25).eval()
        other.load_state_dict(state)
        check(part, other(x))
    assert row(parts, AFFINE)["changed"] > 0
    assert row(parts, STATISTICS)["changed"] > 0


class Gate(nn.Module):
    """Classifies by its router only, or with ``dynamic`` by its dynamic network only."""

    def __init__(self, *, dynamic: bool) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(50.0))
        self.dynamic, self.calls = dynamic, 0

    def route(self, x: Tensor) -> Routing:
        return Routing(None, (self.slope * (x.mean((1, 2, 3)) - 0.5)).sigmoid(), [])

    def forward(self, x: Tensor, *, routing: Routing | None = None) -> Tensor:
        self.calls += 1
        p = (self.route(x) if routing is None else routing).p_clean
        bright = self.slope * (x.mean((1, 2, 3)) - 0.5) if self.dynamic else p - 0.5 + 0 * x.sum((1, 2, 3))
        return torch.stack([-bright, bright], 1)


def bright_and_dark() -> Dataset:
    labels = np.arange(12) % 2
    pixels = np.broadcast_to(np.where(labels, 140, 115)[:, None, None, None], (12, 1, 4, 4))
    return from_arrays(pixels.astype(np.uint8), labels, split="test", eps=0.1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_attack_on_one_part_breaks_exactly_the_network_that_uses_it(dynamic: bool) -> None:
    network = Gate(dynamic=dynamic)
    parts = gated_parts(network, bright_and_dark(), SMOKE)
    accuracies = {one["part"]: one["robust_accuracy"] for one in parts["rows"]}
    assert accuracies[WHOLE] == 0
    assert accuracies[ROUTER] == (1 if dynamic else 0)
    assert accuracies[DYNAMIC] == (0 if dynamic else 1)
    assert row(parts, P_0)["clean_accuracy"] == (1 if dynamic else 0.5)
    assert accuracies[SCALES_MEAN] is None
    assert network.calls == parts["passes"]["forward"]  # one batch


def test_swapped_branches_of_a_converted_network_change_nothing_before_training(digits: Dataset) -> None:
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 10),
    )  # fmt: skip
    cnn(torch.rand(8, 1, 8, 8))  # updates the running statistics
    parts = gated_parts(convert(cnn), digits, SMOKE)
    whole = row(parts, WHOLE)
    for part in (AFFINE, STATISTICS, P_0, P_1):
        actual = row(parts, part)
        assert (actual["changed"], actual["clean_accuracy"]) == (0, whole["clean_accuracy"])
        assert actual["robust_accuracy"] == whole["robust_accuracy"]


@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        ("awnet_tiny", {"width": 0.25, "bn": "dual"}, {STATISTICS: "share their statistics"}),
        ("awnet_tiny", {"width": 0.25, "bn": "one"}, {STATISTICS: "one branch", AFFINE: "one branch"}),
        ("awnet_tiny", {"width": 0.25, "filter_scaling": False}, {SCALES_CLEAN: "no filter scales"}),
        (
            "separate_net",
            {"width": 0.1, "router_widths": (8, 16)},
            {SCALES_MEAN: "no filter scales", AFFINE: "one branch"},
        ),
    ],
)
def test_a_part_that_is_missing_has_its_reason(
    name: str, options: dict, missing: dict, digits: Dataset
) -> None:
    torch.manual_seed(0)
    parts = gated_parts(create_model(name, in_channels=1, **options), digits.subset(4), SMOKE)
    for part, reason in missing.items():
        assert reason in row(parts, part)["not_applicable"]
        assert row(parts, part)["clean_accuracy"] is None
    for part in (WHOLE, P_0, P_1, ROUTER):
        assert row(parts, part)["not_applicable"] is None


def test_a_network_without_such_a_router_has_its_reason(digits: Dataset) -> None:
    few = digits.subset(4)
    assert "selects experts" in gated_parts(narrow("advmoe_resnet18"), few)["not_applicable"]
    assert "no router" in gated_parts(create_model("resnet_tiny", in_channels=1), few)["not_applicable"]
    two = nn.ModuleList([narrow("awnet_resnet18"), narrow("awnet_resnet18")])
    assert "2 networks" in gated_parts(two, few)["not_applicable"]


@pytest.mark.usefixtures("undrawn")
def test_the_report_has_the_parts_in_every_form(model: AWNet, digits: Dataset, tmp_path: Path) -> None:
    report = evaluate(model, digits, ["fgsm"], budget="smoke", parts=True, out=tmp_path)
    assert Report.load(tmp_path).parts == report.parts
    assert report.parts["rows"] == gated_parts(model, digits, SMOKE)["rows"]  # of the inference copy
    text = page(report, tmp_path)
    assert "The network in parts" in text
    assert all(part in text for part in PARTS)
    assert parts_table(report).row_count == len(PARTS)
    with pytest.raises(ValueError, match="no parts"):
        parts_table(evaluate(model, digits, []))


@pytest.mark.usefixtures("undrawn")
def test_the_command_prints_the_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(create_model("separate_net", in_channels=1, width=0.1), tmp_path / "m.safetensors")
    words = ["evaluate", str(tmp_path / "m.safetensors"), "--data", "digits", "--attacks", "fgsm", "--limit"]
    assert main([*words, "4", "--budget", "smoke", "--parts", "yes"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "router attacked alone" in out
    assert "not applicable, its batch norms have one branch" in out

"""Evaluation on inference copies, with the model's predictions, and in bfloat16, without a headline."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.fake_cuda import Recorder
from support.model_families import narrow
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from awnet.attacks import graphed_steps, named_attack
from awnet.attacks.adaptive import Softened, SoftRouter
from awnet.cli import main
from awnet.data import Dataset, load_dataset
from awnet.data.dataset import from_arrays
from awnet.evaluation import Report, compare, evaluate
from awnet.evaluation.html import page
from awnet.evaluation.precision import COPY, prepare
from awnet.evaluation.robustbench import Entry, export_robustbench
from awnet.models import create_model, save_model
from awnet.nn import Routing, convert

EVALUATE = sys.modules["awnet.evaluation.evaluate"]  # the package's attribute of this name is the function


def digits(n: int) -> Dataset:
    return load_dataset("digits").test.subset(n)


def network(name: str = "awnet_tiny", seed: int = 0, **options: object) -> nn.Module:
    """With moved running statistics, and filter scales that differ from image to image."""
    torch.manual_seed(seed)
    model = create_model(name, in_channels=1, **options)
    mode = {"is_clean": torch.arange(16) % 2 == 0} if hasattr(model, "route") else {}
    with torch.no_grad():
        if hasattr(model, "route"):
            model.router.signal_heads.weight.normal_(std=0.1)
        for _ in range(4):
            model(torch.rand(16, 1, 8, 8), **mode)
    return model


@pytest.mark.parametrize("name", ["awnet_tiny", "resnet_tiny"])
def test_the_inference_copy_predicts_as_the_model_does(name: str) -> None:
    model, data = network(name), digits(24)
    copied = evaluate(model, data, ["fgsm", "pgd_sat"], batch_size=16)
    model.register_forward_hook(lambda *_: None)  # so that no copy can replace it
    itself = evaluate(model, data, ["fgsm", "pgd_sat"], batch_size=16)
    assert copied.settings["runs_on"] == COPY
    assert itself.settings["runs_on"].endswith("has hooks")
    assert np.array_equal(copied.per_sample["clean_prediction"], itself.per_sample["clean_prediction"])
    for key, values in itself.per_sample.items():
        if key.startswith("clean") and values.dtype == np.float32:
            # float32 with the batch norms folded in another order
            np.testing.assert_allclose(copied.per_sample[key], values, rtol=1e-4, atol=1e-5)
    for kind in ("fgsm", "pgd_sat"):  # where a gradient is next to 0, rounding turns its sign
        same = copied.per_sample[f"{kind}_prediction"] == itself.per_sample[f"{kind}_prediction"]
        assert same.mean() >= 0.95  # at most one of 24
    assert (copied.model, list(copied.filter_means)) == (itself.model, list(itself.filter_means))


def foreign() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )


@pytest.mark.parametrize(
    ("make", "copied"),
    [
        pytest.param(lambda: narrow("rdi_resnet38"), False, id="rdi"),
        pytest.param(lambda: narrow("advmoe_resnet18"), True, id="advmoe"),
        pytest.param(lambda: narrow("separate_net"), True, id="separate"),
        pytest.param(lambda: narrow("mobilenet_v2"), True, id="plain"),
        pytest.param(foreign, False, id="foreign"),
        pytest.param(lambda: convert(foreign(), router_widths=(4,)), False, id="converted"),
    ],
)
def test_an_evaluation_runs_frozen_layers_alone(make: Callable[[], nn.Module], copied: bool) -> None:
    """In eval mode and with frozen weights, so that no gradient is computed for them."""
    torch.manual_seed(0)
    model = make().train()
    assert (prepare(model, "float32", digits(4).images[:2] / 255).module is not model) == copied
    live: list[str] = []
    attacked = 0

    def look(module: nn.Module, inputs: object) -> None:
        nonlocal attacked
        attacked += torch.is_grad_enabled()
        weights = [p for p in module.parameters() if not p.is_meta]  # on which FLOPs are counted
        if module.training or any(p.requires_grad for p in weights):
            live.append(type(module).__name__)

    hook = register_module_forward_pre_hook(look)
    try:
        evaluate(model, digits(4), ["fgsm"])
    finally:
        hook.remove()
    assert attacked
    assert live == []
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", Softened.MODES)
def test_a_frozen_router_softens_as_the_model_does(mode: tuple[str, float]) -> None:
    model = network().double().eval().requires_grad_(False)
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = []
    for one in (model, model.inference_copy()):
        point = x.clone().requires_grad_()
        logits = SoftRouter(one, mode[1], straight_through=mode[0] == "through")(point)
        actual.append((logits.detach(), torch.autograd.grad(logits.square().sum(), point)[0]))
    # float64 in another order
    for a, b in zip(*actual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["joint", "two_phase", "forced", "softened", "deepsloth"])
def test_adaptive_attacks_break_the_copy_as_they_break_the_model(name: str) -> None:
    from awnet.attacks import Suite

    model, data = network().eval(), digits(6)
    x, _, index = next(data.batches(6))
    y = model(x).argmax(1)
    suite = Suite(budget="smoke", reference=x)
    right = []
    for one in (model, model.inference_copy()):
        x_adv = named_attack(name, one, data.threat_model, suite=suite)(x, y, index=index)
        right.append(model(x_adv).argmax(1) == y)
    assert (right[0] != right[1]).sum() <= 1


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """All attacks, in bfloat16."""
    out = tmp_path_factory.mktemp("run")
    report = evaluate(
        network(),
        digits(6),
        ["fgsm", "union"],
        budget="smoke",
        queries=10,
        precision="bfloat16",
        teacher=network("resnet_tiny", 1),
        surrogates={"other": network("resnet_tiny", 2)},
        sanity=False,
        out=out,
    )
    return report, out


def test_the_whole_union_runs_in_bfloat16(quick: tuple[Report, Path]) -> None:
    report, _ = quick
    assert report.union is not None
    members = set(report.union.settings["members"])
    assert members >= {"aa", "joint", "two_phase", "forced", "softened", "apgd_joint_t", "adaptive_paper"}
    assert report.settings["precision"] == "bfloat16"
    same = evaluate(network(), digits(6), ["fgsm"])
    clean, exact = (one.per_sample["clean_type_score"] for one in (report, same))
    assert not np.array_equal(clean, exact)  # it did run in bfloat16
    # 8 bits of precision in each of the router's 7 layers
    np.testing.assert_allclose(clean, exact, atol=0.05 * float(np.abs(exact).max()) + 0.02)


def test_accuracies_in_bfloat16_are_never_the_headline(quick: tuple[Report, Path], tmp_path: Path) -> None:
    report, out = quick
    assert report.approximate
    with pytest.raises(ValueError, match="bfloat16 are no headline: evaluate in float32"):
        report.headline()
    assert any("measured in bfloat16" in flag for flag in report.flags)
    folder = out / "evaluations" / "default"
    text = (folder / "report.html").read_text()
    assert 'class="card head"' not in text
    assert "measured in bfloat16" in text
    assert "bfloat16: no headline" in str(report.table().title)
    assert Report.load(folder).approximate

    exact = evaluate(network(), digits(6), ["fgsm"])
    assert not exact.approximate
    name, result = exact.headline() or ("", None)
    assert (name, result) == ("fgsm", exact.attacks["fgsm"])
    assert 'class="card head"' in page(exact, tmp_path)
    assert not any("bfloat16" in flag for flag in exact.flags)
    assert evaluate(network(), digits(6), {}).headline() is None
    with pytest.raises(ValueError, match="precision float32 or wider and bfloat16"):
        compare(exact, report)


def test_robustbench_export_refuses_accuracies_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("awnet_tiny")
    pixels = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    classes = [str(i) for i in range(10)]
    data = from_arrays(pixels, torch.arange(10), name="cifar10", split="test", classes=classes)
    report = evaluate(model, data, {}, precision="bfloat16")
    with pytest.raises(ValueError, match="measured in bfloat16: evaluate in float32"):
        export_robustbench(model, data, report, tmp_path, Entry("A"))
    assert not list(tmp_path.iterdir())


class Routed(nn.Module):
    """A foreign network with a router, which has no inference copy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.types = nn.Linear(64, 10), nn.Linear(64, 2)

    def route(self, x: Tensor) -> Routing:
        logits = self.types(x.flatten(1))
        return Routing(logits, logits.softmax(1)[:, 1], [])

    def forward(self, x: Tensor, *, routing: Routing | None = None) -> Tensor:
        p = (self.route(x) if routing is None else routing).p_clean
        return self.linear(x.flatten(1)) * (1 + p[:, None])


def test_a_model_without_frozen_copies_runs_under_autocast() -> None:
    torch.manual_seed(0)
    model = Routed()
    x = torch.rand(3, 1, 8, 8)
    assert prepare(model, "float32", x).module is model
    rounded = prepare(model, "bfloat16", x).module
    assert rounded(x).dtype == torch.bfloat16
    assert rounded.route(x).type_logits.dtype == torch.bfloat16
    assert not hasattr(rounded, "exit_of")
    report = evaluate(model, digits(8), ["fgsm", "joint"], precision="bfloat16", budget="smoke")
    assert report.model == "Routed"
    assert set(report.router_auc) == {"fgsm", "joint", "uniform_noise", "sign_noise"}
    assert model.linear.weight.requires_grad
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'half'"):
        prepare(model, "half", x)  # type: ignore[arg-type]


@pytest.mark.usefixtures("undrawn")
def test_evaluate_precision_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "model.safetensors"
    save_model(network(), weights)
    words = ["evaluate", str(weights), "--data", "digits", "--limit", "8", "--attacks", "fgsm"]
    assert main([*words, "--precision", "bfloat16"]) == 0
    assert "measured in bfloat16" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "evaluations" / "default" / "report.json").read_text())
    assert report["settings"]["precision"] == "bfloat16"
    assert main(words) == 0
    assert "bfloat16" not in capsys.readouterr().out


def test_a_filtered_evaluation_has_a_float32_headline(tmp_path: Path) -> None:
    settings = {"attacks": ["fgsm", "union"], "budget": "smoke", "queries": 10, "sanity": False}
    surrogates = {"other": network("resnet_tiny", 2)}
    report = evaluate(network(), digits(6), filter="bfloat16", surrogates=surrogates, **settings)
    assert not report.approximate
    assert report.union is not None
    assert report.headline() == ("union", report.union)
    assert report.attacks["fgsm"].settings["filter"] == "bfloat16"
    members = report.union.settings["members"]
    assert members["aa"]["members"]["apgd_ce"]["filter"] == members["joint"]["filter"] == "bfloat16"
    assert "filter" not in members["transfer_other_cw"]
    plain = evaluate(network(), digits(6), surrogates=surrogates, **settings)
    for key in ("clean_prediction", "clean_type_score"):  # images are classified in float32
        assert np.array_equal(report.per_sample[key], plain.per_sample[key])
    with pytest.raises(ValueError, match="cannot be compared: fgsm filter bfloat16 and None"):
        compare(report, plain)


def test_a_filter_runs_models_without_a_copy_under_autocast() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    seen = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    report = evaluate(model, digits(8), ["pgd_sat"], filter="bfloat16")
    assert report.settings["precision"].startswith("float32")
    assert {torch.bfloat16, torch.float32} == set(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "half"}, "filter must be 'bfloat16' or None, got 'half'"),
        ({"filter": "bfloat16", "precision": "bfloat16"}, "filter needs precision='float32'"),
    ],
)
def test_a_filter_that_does_not_fit_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(network("resnet_tiny"), digits(4), ["fgsm"], **options)


def test_a_filter_refuses_attacks_that_it_cannot_build() -> None:
    model, data = network("resnet_tiny"), digits(4)
    with pytest.raises(ValueError, match="filter needs attacks by name"):
        evaluate(model, data, {"mine": named_attack("fgsm", model, data.threat_model)}, filter="bfloat16")


def test_replayed_attacks_give_the_same_report(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, recorder = network("resnet_tiny"), digits(14), Recorder()
    options: dict[str, Any] = {"attacks": ["fgsm", "pgd_sat"], "batch_size": 4}
    plain = evaluate(model, data, **options)
    monkeypatch.setattr(EVALUATE, "captures_attacks", lambda *_: True)
    monkeypatch.setattr(graphed_steps, "capture_graph", lambda program, **_: recorder(program))
    replayed = evaluate(model, data, capture="auto", **options)
    assert len(recorder.recorded) == 1  # pgd_sat, for the full batches
    assert replayed.settings == plain.settings
    for key, values in plain.per_sample.items():
        assert np.array_equal(replayed.per_sample[key], values), key


def test_a_capture_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = network("resnet_tiny"), digits(4)
    evaluate(model, data, ["pgd_sat"], capture="auto")  # without graphs on a CPU
    with pytest.raises(ValueError, match="capture needs a CUDA device, got cpu: leave it out"):
        evaluate(model, data, ["pgd_sat"], capture=True)
    monkeypatch.setattr(EVALUATE, "captures_attacks", lambda *_: True)
    attack = named_attack("pgd_sat", model, data.threat_model)
    with pytest.raises(ValueError, match="capture needs attacks by name"):
        evaluate(model, data, {"mine": attack}, capture=True)

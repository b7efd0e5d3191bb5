"""Evaluation against counts by hand and statistics against other implementations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from awnet import analysis, rng
from awnet.attacks import FGSM, PGD, Attack, named_attack
from awnet.data.dataset import Dataset, from_arrays
from awnet.evaluation import (
    Report,
    accuracy,
    bootstrap_interval,
    compare,
    comparison_table,
    evaluate,
    mcnemar,
    robust_correct,
    w_robust_table,
    wilson_interval,
)
from awnet.evaluation.summarize import flags
from awnet.models import create_model
from awnet.nn import Routing, convert


def images(n: int = 30, classes: int = 3, seed: int = 0, **options: object) -> Dataset:
    """Images that a linear model can mostly tell apart: each class is brighter in different rows."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    labels[:classes] = np.arange(classes)
    pixels = generator.integers(0, 170, (n, 1, 6, 6))
    for image, label in zip(pixels, labels, strict=True):
        image[0, 2 * label : 2 * label + 2] += 45
    return from_arrays(pixels.astype(np.uint8), labels, split="test", eps=0.1, **options)


class Linear(nn.Module):
    """Classifies those images well; ``tilt`` makes it another model."""

    def __init__(self, tilt: float = 0.0) -> None:
        super().__init__()
        rows = torch.arange(6)[:, None].expand(6, 6) // 2
        self.weight = nn.Parameter(torch.stack([(rows == k).float() for k in range(3)]).flatten(1))
        self.tilt = tilt
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.flatten(1) @ self.weight.T + self.tilt * x[:, 0, 0, :3]


class Routed(Linear):
    """Classifies an image as clean if its pixels are on the 8-bit grid; a router that detects no attack."""

    def route(self, x: Tensor) -> Routing:
        off = (x * 255 - (x * 255).round()).abs().mean((1, 2, 3))
        return Routing(torch.stack([off, -off], 1), torch.exp(-off), [])

    def forward(self, x: Tensor, *, routing: Routing | None = None) -> Tensor:
        return super().forward(x)


# ---- evaluate


def test_accuracies_are_counts_over_the_images() -> None:
    model, data = Linear(tilt=1.0), images()
    report = evaluate(model, data, ["fgsm", "cw"], batch_size=7, seed=4)
    x = data.images.float() / 255
    clean = model(x).argmax(1) == data.labels
    assert 0.5 < report.clean_accuracy < 1
    assert report.clean_accuracy == clean.double().mean().item()
    assert torch.equal(accuracy(model, data, batch_size=11), clean)
    for name in ("fgsm", "cw"):
        attack = named_attack(name, model, data.threat_model, seed=4)
        right = model(attack(x, data.labels, index=data.index)).argmax(1) == data.labels
        actual = report.attacks[name]
        assert 0 < actual.robust_accuracy < report.clean_accuracy
        assert actual.robust_accuracy == right.double().mean().item()
        assert actual.w_robust_accuracy == (report.clean_accuracy + actual.robust_accuracy) / 2
        assert actual.interval_95 == wilson_interval(int(right.sum()), len(data))
        assert actual.w_interval_95[0] < actual.w_robust_accuracy < actual.w_interval_95[1]
        assert actual.settings == attack.settings
        assert np.array_equal(report.per_sample[f"{name}_correct"], right.numpy())
        assert torch.equal(robust_correct(model, data, attack, batch_size=9), right)
    assert torch.equal(robust_correct(model, data, "fgsm"), robust_correct(model, data, FGSM(model, eps=0.1)))
    assert np.array_equal(report.per_sample["label"], data.labels.numpy())
    assert report.router_auc == {}


def test_one_forward_for_each_needed_quantity() -> None:
    model, data = Linear(), images(30)
    evaluate(model, data, ["fgsm", "pgd_sat"], batch_size=10)
    per_batch = 1 + (1 + 1) + (20 + 1)  # clean; fgsm's gradient and outcome; pgd's 20 and outcome
    assert (
        model.calls == 3 * per_batch + 2 + 2
    )  # one image: fit, dtype; one batch twice: is the model stochastic
    model.calls = 0
    accuracy(model, data, batch_size=10)
    assert model.calls == 3 + 1


def test_router_auc_is_measured_for_attacks_and_noise() -> None:
    data = images(classes=3)
    model = Routed()
    report = evaluate(model, data, ["fgsm"], seed=2)
    x = data.images.float() / 255
    logits = model.route(x).type_logits
    score = (logits[:, 1] - logits[:, 0]).numpy()
    assert np.array_equal(report.per_sample["clean_type_score"], score)
    noise = 2 * rng.uniform(rng.key("uniform noise", 2), data.index, (1, 6, 6)) - 1
    p = model.route((x + 0.1 * noise).clamp(0, 1)).p_clean
    assert np.allclose(report.per_sample["uniform_noise_p_clean"], p, atol=1e-6)
    # off the 8-bit grid is all that this router knows: it takes noise for an attack, and the report says so
    assert report.router_auc == {"fgsm": 1.0, "uniform_noise": 1.0, "sign_noise": 1.0}
    assert any("noise" in flag for flag in report.flags)
    assert "uniform_noise_correct" not in report.per_sample


def awnet_tiny() -> nn.Module:
    torch.manual_seed(0)
    model = create_model("awnet_tiny", num_classes=3, in_channels=1)
    with torch.no_grad():
        model.router.signal_heads.weight.normal_(std=0.1)
        for kind in range(4):
            model(torch.rand(8, 1, 6, 6) * (1 + kind) / 4, is_clean=torch.arange(8) % 2 == 0)
    return model


def test_aw_net_is_evaluated_and_left_as_it_was() -> None:
    model, data = awnet_tiny(), images(12)
    model.router.eval()
    model.dynamic.classifier.weight.requires_grad_(False)
    model.dynamic.classifier.bias.grad = torch.ones(3)

    def state() -> list[object]:
        return [
            [module.training for module in model.modules()],
            [len(module._forward_pre_hooks) for module in model.modules()],
            [(p.requires_grad, p.grad is None) for p in model.parameters()],
            [value.tolist() for value in model.state_dict().values()],
        ]

    before = state()
    report = evaluate(model, data, ["fgsm"], batch_size=5)
    assert state() == before
    assert report.model == "awnet_tiny"
    assert set(report.router_auc) == {"fgsm", "uniform_noise", "sign_noise"}
    model.eval()
    x = data.images.float() / 255
    assert np.allclose(report.per_sample["clean_p_clean"], model.route(x).p_clean.detach(), atol=1e-6)
    assert np.array_equal(report.per_sample["clean_prediction"], model(x).argmax(1).numpy())

    # the effective filters: each layer's mean weight times its mean ω
    layers = [name.split("/")[1] for name in report.filter_means if name.startswith("clean/")]
    assert layers == [f"stages.{stage}.0.conv{k}" for stage in range(3) for k in (1, 2)]
    for name, scale in zip(layers, model.route(x).filter_scales, strict=True):
        weight = model.dynamic.get_submodule(name).weight
        mean = weight.mean((1, 2, 3)).detach()
        assert np.allclose(report.filter_means[f"weights/{name}"], mean, atol=1e-7)
        assert np.allclose(report.filter_means[f"clean/{name}"], mean * scale.mean(0).detach(), atol=1e-6)
    assert "weights/stem" in report.filter_means
    assert not any("router" in name for name in report.filter_means)


class Reversed(nn.Module):
    """Calls its layers in another order than that of ``named_modules``."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.last_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.middle, self.middle_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.stem, self.stem_norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        x = self.middle_norm(self.middle(x)).relu()
        return self.last_norm(self.last(x)).mean((2, 3))


def test_effective_filters_take_the_signal_that_the_layer_takes() -> None:
    torch.manual_seed(0)
    model, data = convert(Reversed().eval()), images(5)
    with torch.no_grad():
        model.router.signal_heads.bias.normal_()
    means = evaluate(model, data, {}).filter_means
    model.eval()
    scales = model.route(data.images.float() / 255).filter_scales
    assert [key for key in means if key.startswith("clean/")] == ["clean/middle", "clean/last"]
    for name, scale in zip(("middle", "last"), scales, strict=True):
        assert np.allclose(
            means[f"clean/{name}"] / means[f"weights/{name}"], scale.mean(0).detach(), rtol=1e-5
        )


def test_aw_net_without_type_head_has_no_auc(tmp_path: Path) -> None:
    model = create_model("awnet_tiny", num_classes=3, in_channels=1, type_head=False)
    report = evaluate(model, images(6), ["fgsm"], out=tmp_path)
    assert report.router_auc == {}
    assert "router_auc" not in report.to_dict()
    folder = tmp_path / "evaluations" / "default"
    assert not (folder / "p_clean.png").exists()
    assert (folder / "filter_means.png").exists()
    x = next(images(6).batches(6)).x
    (scale, *_) = model.eval().route(x).filter_scales
    effective = report.filter_means["weights/stages.0.0.conv1"] * scale.mean(0).detach().numpy()
    assert np.allclose(report.filter_means["clean/stages.0.0.conv1"], effective, atol=1e-6)


def test_an_evaluation_repeats_bit_for_bit_with_the_same_seed(tmp_path: Path) -> None:
    model, data = awnet_tiny(), images(8)
    attacks = {"pgd": PGD(model, eps=0.1, step_size=0.05, steps=3)}
    for name in ("a", "b"):
        evaluate(model, data, attacks, batch_size=5, out=tmp_path, name=name, seed=1)
    first, second = tmp_path / "evaluations" / "a", tmp_path / "evaluations" / "b"
    files = {path.name for path in first.iterdir()}
    assert files >= {
        "report.json",
        "report.html",
        "per_sample.npz",
        "filter_means.npz",
        "w_robust.png",
        "p_clean.png",
    }
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_batch_size_matters_by_rounding_only() -> None:
    model, data = Linear(tilt=1.0), images()
    one, other = (evaluate(model, data, ["pgd_sat"], batch_size=size) for size in (30, 4))
    assert one.attacks == other.attacks


def test_limit_evaluates_a_stratified_part() -> None:
    data = images(60)
    report = evaluate(Linear(), data, ["fgsm"], limit=12)
    part = data.subset(12, seed=0)
    assert report.n == 12
    assert np.array_equal(report.per_sample["index"], part.index.numpy())
    assert report.settings["limit"] == 12


def test_attacks_of_the_caller_and_progress_are_supported(capsys: pytest.CaptureFixture[str]) -> None:
    class Darker(Attack):
        def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
            return (x - self.eps).clamp(min=0)

    model, data = Linear(), images()
    attacks = {"darker": Darker(model, eps=0.05), "short": PGD(model, eps=0.1, step_size=0.1, steps=1)}
    report = evaluate(model, data, attacks, progress=True)
    assert report.attacks["darker"].robust_accuracy == pytest.approx(report.clean_accuracy, abs=0.2)
    assert report.attacks["short"].settings["steps"] == 1
    capsys.readouterr()
    evaluate(model, data, ["fgsm"])
    assert capsys.readouterr().out == ""


# ---- reports


def test_report_json_has_the_schema(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"selected_on": "test"}))
    epochs = [
        {
            "kind": "epoch",
            "epoch": 1 + e,
            "step": 9 * e,
            "total": 2.0 - e,
            "nat": 1.0,
            "clean_accuracy": 0.4 + e / 4,
        }
        for e in range(3)
    ]
    lines = [json.dumps(record) for record in [{"kind": "step", "epoch": 1, "step": 1}, *epochs]]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"kind": "epo')
    static = evaluate(Linear(tilt=1.0), images(), ["fgsm", "cw"])
    report = evaluate(
        Routed(), images(), ["fgsm", "cw"], out=tmp_path, name="first", compared_with={"static": static}
    )
    folder = tmp_path / "evaluations" / "first"
    actual = json.loads((folder / "report.json").read_text())
    assert actual == json.loads((tmp_path / "report.json").read_text()) == report.to_dict()
    assert " ".join(actual) == (
        "model dataset split n eps norm clean_accuracy clean_interval_95 attacks router_auc flags settings environment "
        "selected_on detection compared_with"
    )
    assert actual["selected_on"] == "test"
    assert any("selected on test images" in flag for flag in actual["flags"])
    assert [actual[key] for key in ("model", "dataset", "split", "n", "eps")] == [
        "Routed",
        "custom",
        "test",
        30,
        0.1,
    ]
    assert " ".join(actual["attacks"]["cw"]) == (
        "robust_accuracy w_robust_accuracy interval_95 w_interval_95 settings"
    )
    assert {"awnet", "torch", "device", "threads", "commit"} <= set(actual["environment"])
    assert set(actual["compared_with"]["static"]["attacks"]) == {"fgsm", "cw"}
    assert (folder / "training.png").exists()
    assert "compared_with" not in static.to_dict()
    assert "selected_on" not in static.to_dict()

    again = Report.load(folder)
    assert again.to_dict() == report.to_dict()
    assert set(again.per_sample) == set(report.per_sample)
    for name, values in report.per_sample.items():
        assert np.array_equal(again.per_sample[name], values)
    assert compare(again, static) == report.compared_with["static"]


def test_damaged_reports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the folder of an evaluation"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        Report.load(tmp_path)
    for foreign in ("{}", "[]", '{"attacks": {}, "model": "x"}'):
        (tmp_path / "report.json").write_text(foreign)
        with pytest.raises(ValueError, match="not a report of this version"):
            Report.load(tmp_path)
    evaluate(Linear(), images(6), ["fgsm"]).save(tmp_path)
    (tmp_path / "per_sample.npz").write_bytes(b"PK rubbish")
    with pytest.raises(ValueError, match=r"per_sample.npz is damaged"):
        Report.load(tmp_path)
    (tmp_path / "log.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"log.jsonl is damaged"):
        evaluate(Linear(), images(6), ["fgsm"]).save(tmp_path, tmp_path / "log.jsonl")


def test_comparison_is_paired_by_image() -> None:
    data = images(40)
    this, other = (evaluate(Linear(tilt), data, ["fgsm"]) for tilt in (0.0, 1.5))
    actual = compare(this, other)
    mine, theirs = (r.per_sample for r in (this, other))
    assert actual.clean_difference == pytest.approx(this.clean_accuracy - other.clean_accuracy)
    assert actual.clean_mcnemar_p == mcnemar(mine["clean_correct"], theirs["clean_correct"])
    value = sum(0.5 * mine[k].astype(float) - 0.5 * theirs[k] for k in ("clean_correct", "fgsm_correct"))
    fgsm = actual.attacks["fgsm"]
    assert fgsm.difference == pytest.approx(value.mean())
    assert fgsm.difference != 0
    assert fgsm.interval_95 == bootstrap_interval(value)
    assert fgsm.mcnemar_p == mcnemar(mine["fgsm_correct"], theirs["fgsm_correct"])
    mirrored = compare(other, this)
    assert mirrored.attacks["fgsm"].difference == -fgsm.difference
    itself = compare(this, this).attacks["fgsm"]
    assert (itself.difference, itself.interval_95, itself.mcnemar_p) == (0.0, (0.0, 0.0), 1.0)


def test_comparison_refuses_other_images_and_other_settings() -> None:
    this = evaluate(Linear(), images(), ["fgsm", "pgd_sat"])
    with pytest.raises(ValueError, match="number of images 30 and 29"):
        compare(this, evaluate(Linear(), images(29), ["fgsm"]))
    with pytest.raises(ValueError, match=r"data set .* and others"):
        compare(this, evaluate(Linear(), images(name="others"), ["fgsm"]))
    with pytest.raises(ValueError, match="pgd_sat seed 1 and 0"):
        evaluate(Linear(), images(), ["pgd_sat"], seed=1, compared_with={"first": this})
    bare = evaluate(Linear(), images(), ["fgsm"])
    bare.per_sample = {}
    with pytest.raises(ValueError, match="no per-sample outcomes"):
        compare(this, bare)
    assert compare(this, evaluate(Linear(), images(), ["cw"])).attacks == {}


def test_flags_warn_of_suspicious_results() -> None:
    report = evaluate(Linear(), images(), ["fgsm", "pgd_sat", "cw"])
    assert report.flags == flags(report) == []
    report.attacks["cw"].robust_accuracy = report.attacks["fgsm"].robust_accuracy + 0.1
    assert flags(report) == ["cw breaks fewer images than a single step: gradients may be masked"]
    report.attacks["cw"].robust_accuracy = 0.0

    def flags_of(fgsm: float, cw: float, noise: float, rounded: float = 0.97) -> list[str]:
        attacks = {"fgsm": fgsm, "cw": cw}
        report.detection = {k: {"auc": v, "rounded": {"auc": rounded}} for k, v in attacks.items()}
        report.detection |= {"uniform_noise": {"auc": noise}, "sign_noise": {"auc": 0.5}}
        return flags(report)

    assert flags_of(0.99, 0.98, 0.6) == []
    assert len(flags_of(0.99, 0.98, 0.985)) == 1
    assert flags_of(0.5, 0.5, 0.52, 0.5) == []  # it detects nothing at all
    (flag,) = flags_of(0.99, 0.98, 0.5, rounded=0.6)
    assert "fgsm 0.990 to 0.600, cw 0.980 to 0.600" in flag


def test_tables_fit_the_width_of_a_terminal() -> None:
    data = images()
    names = ("fgsm", "pgd_sat", "pgd_trades", "cw")
    static = evaluate(Linear(1.0), data, names)
    report = evaluate(Linear(), data, names, compared_with={"static": static, "wide": static})

    def printed(table: object) -> list[str]:
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(table)
        return console.export_text().splitlines()

    lines = printed(w_robust_table({"resnet_tiny": report, "static": static}))
    assert not any("…" in line for line in lines)
    row = next(line.split() for line in lines if "resnet_tiny" in line)
    expected = [report.clean_accuracy]
    for result in report.attacks.values():
        expected += [result.robust_accuracy, result.w_robust_accuracy]
    assert row[1:] == [f"{100 * value:.1f}" for value in expected]
    low, high = report.clean_interval_95
    assert f"±{50 * (high - low):.1f}" in "\n".join(lines)
    assert len(printed(report.table())) > 4
    differences = "\n".join(printed(comparison_table(report)))
    assert f"{100 * report.compared_with['static'].clean_difference:+.1f} [" in differences
    for extra in ("aa", "deepsloth"):
        report.attacks[extra] = report.attacks["cw"]
    tall = printed(w_robust_table({"resnet_tiny": report, "static": static}))
    assert not any("…" in line for line in tall)
    cw = next(line.split() for line in tall if line.split()[:1] == ["CW"])
    assert cw[1] == f"{100 * report.attacks['cw'].robust_accuracy:.1f}"
    assert next(line.split() for line in tall if line.split()[:1] == ["deepsloth"])[-2:] == ["–", "–"]
    with pytest.raises(ValueError, match="has no comparisons"):
        comparison_table(static)
    with pytest.raises(ValueError, match="empty"):
        w_robust_table({})


# ---- what is refused


def with_nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters())[0] = torch.nan
    return model


MODEL = Linear()


BAD = [
    ((lambda x: x, images(6)), {}, TypeError, "torch.nn.Module"),
    ((MODEL, [images(6)]), {}, TypeError, "must be a Dataset"),
    ((MODEL, images(6).take(torch.arange(0))), {}, ValueError, "dataset is empty"),
    ((MODEL, images(6), "fgsm"), {}, TypeError, r"write \['fgsm'\]"),
    ((MODEL, images(6), ["fgsm", "pgd"]), {}, ValueError, "unknown attack .pgd.: choose from fgsm, pgd_sat"),
    ((MODEL, images(6), ["fgsm", "fgsm"]), {}, ValueError, "different names"),
    ((MODEL, images(6), {"mine": MODEL}), {}, TypeError, "must be an Attack"),
    ((MODEL, images(6), {"clean": FGSM(MODEL, eps=0.1)}), {}, ValueError, "must not be called 'clean'"),
    ((MODEL, images(6)), {"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1"),
    ((MODEL, images(6)), {"batch_size": -3}, ValueError, "batch_size must be an integer of at least 1"),
    ((MODEL, images(6)), {"batch_size": 2.0}, TypeError, "batch_size must be an integer"),
    ((MODEL, images(6)), {"limit": 0}, ValueError, "limit must be an integer of at least 1"),
    ((MODEL, images(6)), {"limit": "5"}, TypeError, "limit must be an integer"),
    ((MODEL, images(6)), {"seed": "1"}, TypeError, "seed must be an integer"),
    ((MODEL, images(6)), {"name": "../elsewhere"}, ValueError, "name must be letters"),
    ((MODEL, images(6)), {"name": ""}, ValueError, "name must be letters"),
    ((MODEL, images(6)), {"device": "meta"}, ValueError, "the model is on cpu"),
    (
        (MODEL, images(6)),
        {"compared_with": {"other": {}}},
        TypeError,
        r"compared_with\['other'\] must be a Report",
    ),
    ((with_nan(Linear()), images(6)), {}, FloatingPointError, "not finite for 6 of 6 images"),
    (
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), images(6)),
        {},
        ValueError,
        "create it with num_classes=3",
    ),
    ((nn.Flatten(0), images(6)), {}, ValueError, "model must return logits"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD, ids=lambda v: None)
def test_evaluate_refuses_bad_arguments(args, options, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        evaluate(*args, **options)


def test_accuracy_refuses_bad_arguments() -> None:
    with pytest.raises(FloatingPointError, match="NaN or infinite for 6 of 6 clean images"):
        accuracy(with_nan(Linear()), images(6))
    with pytest.raises(ValueError, match="unknown attack"):
        robust_correct(Linear(), images(6), "pgd")
    with pytest.raises(ValueError, match="batch_size"):
        accuracy(Linear(), images(6), batch_size=0)


# ---- figures


def check_png(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert 0.005 < (pixels != 255).any(2).mean() < 0.9  # something is drawn, and not all over


def test_figures_of_a_report_are_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    records = [
        {"epoch": e, "total": 3 / e, "type": 1 / e, "clean_accuracy": 1 - 1 / e, "lr": 1} for e in (1, 2, 3)
    ]
    records[1].pop("clean_accuracy")  # not every epoch is validated
    analysis.training_curves(records, tmp_path / "training.png")
    analysis.training_curves(records[:1], tmp_path / "one.png")
    measured = {"FGSM": (0.7, (0.6, 0.8)), "CW": (1.0, (0.98, 1.0))}
    analysis.w_robust_bars(
        {"a": measured, "b": {"CW": (0.0, (0.0, 0.1))}}, tmp_path / "bars.png", clean={"a": 1.0, "b": 0.5}
    )
    analysis.p_clean_histogram(
        {"clean": generator.random(50), "noise": np.zeros(9)}, tmp_path / "p.png", auc={"noise": 1.0}
    )
    means = {"clean": generator.normal(size=16), "adversarial": generator.normal(size=16)}
    analysis.filter_means({"conv1": means, "constant": {"clean": np.zeros(4)}}, tmp_path / "filters.png")
    analysis.filter_means({"conv1": {"weights": generator.normal(size=64)}}, tmp_path / "single.png")
    analysis.differences_by_training(
        {
            "a − b": {"clean": ([0.01, -0.02], (-0.1, 0.1)), "CW": ([0.3], (0.2, 0.4))},
            "a − c": {"CW": ([-0.1, 0.0, 0.1], (-0.2, 0.2))},
        },
        tmp_path / "differences.png",
        title="three trainings",
    )
    actual = sorted(tmp_path.iterdir())
    assert len(actual) == 7
    for path in actual:
        check_png(path)


@pytest.mark.parametrize(
    "draw",
    ["training_curves", "w_robust_bars", "differences_by_training", "p_clean_histogram", "filter_means"],
)
def test_figures_without_data_are_an_error(draw: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to draw|no epoch to draw"):
        getattr(analysis, draw)({}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())

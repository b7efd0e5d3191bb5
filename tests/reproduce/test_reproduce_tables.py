"""Tables and figures: their contents and files, and one of them end to end."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.extras import importable_torchvision

from awnet.attacks import named_attack
from awnet.cli import main
from awnet.data import load_dataset
from awnet.evaluation import Report
from awnet.models import create_model, list_models
from awnet.models.zoo import zoo_folder
from awnet.reproduce import BUDGETS, EXPERIMENTS, paper_rows, reproduce
from awnet.reproduce.analyses import by_architecture, compare_filters, effective_filters
from awnet.reproduce.runs import Runs, averaged_down
from awnet.reproduce.synthetic import synthetic_splits
from awnet.training import list_recipes, train

PRINTED = {name: experiment for name, experiment in EXPERIMENTS.items() if experiment.table}


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", list(PRINTED))
def test_a_table_compares_what_the_papers_table_compares(name: str) -> None:
    experiment = PRINTED[name]
    rows = paper_rows(experiment.table)
    systems = {system.label for system in experiment.systems}
    prefix = "transfer_" if experiment.kind == "transfer" else ""
    attacks = {prefix + attack for attack in experiment.attacks}
    if experiment.kind == "detection":
        systems |= {"NNIF", "LNG"}
    assert {row.system for row in rows} == systems
    assert {row.attack for row in rows} == attacks
    assert {row.dataset for row in rows} == set(experiment.datasets)


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_system_of_a_table_can_be_created(name: str) -> None:
    for system in EXPERIMENTS[name].systems:
        assert system.model in list_models()
        assert system.recipe in list_recipes()


def test_synthetic_splits_have_the_published_shape_and_say_that_they_are_generated() -> None:
    splits = synthetic_splits("cifar100", seed=1, train=210, validation=20, test=30)
    assert splits.train.images.shape == (210, 3, 32, 32)
    assert [len(part) for part in splits] == [210, 20, 30]
    assert splits.train.num_classes == 100
    assert "stand-in" in splits.test.name
    assert "generated" in splits.test.source
    assert splits.train.fingerprint() == synthetic_splits("cifar100", seed=1, train=210).train.fingerprint()
    assert splits.train.fingerprint() != synthetic_splits("cifar100", seed=2, train=210).train.fingerprint()
    # of one class, images are nearer to one another than to other classes': there is something to learn
    x = splits.train.images.float().flatten(1)
    spectrum = torch.fft.rfft2(splits.train.images.float()).abs().flatten(1)
    same = (spectrum[:10] - spectrum[100:110]).norm(dim=1)
    other = (spectrum[:10] - spectrum[101:111]).norm(dim=1)
    assert (same < other).float().mean() > 0.8
    assert x.std() > 20
    with pytest.raises(ValueError, match="stand-in for cifar10, cifar100"):
        synthetic_splits("digits")


def test_a_figure_from_the_command_line_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "reproduce",
        "fig1",
        "--out",
        str(tmp_path / "out"),
        "--data-dir",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "generated images are used instead" in said
    folder = tmp_path / "out" / "fig1-smoke"
    assert (folder / "filter_means.png").stat().st_size > 10_000
    rows = rows_of(folder / "filter_means.csv")
    assert {row["model"] for row in rows} == {"standard", "mtard"}
    assert {row["layer"] for row in rows} == {"stem", "stages.0.0.conv1"}
    before = (folder / "filter_means.csv").read_bytes()
    assert main(arguments) == 0
    assert "nothing to train" in capsys.readouterr().out
    assert (folder / "filter_means.csv").read_bytes() == before


@pytest.mark.usefixtures("undrawn")
def test_a_table_is_written_beside_the_papers_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(
        EXPERIMENTS["table3"],
        systems=tuple(replace(s, recipe="pgd_at") for s in EXPERIMENTS["table3"].systems[-2:]),
        attacks=("pgd_trades",),
    )
    monkeypatch.setitem(EXPERIMENTS, "table3", small)
    evaluated = Runs.evaluated

    def renaming(self: Runs, *arguments: Any) -> Report:
        report = evaluated(self, *arguments)
        if (tmp_path / "given").is_dir():
            (tmp_path / "given").rename(tmp_path / "out")
        return report

    monkeypatch.setattr(Runs, "evaluated", renaming)
    given = tmp_path / "given"  # which is renamed after the first network
    outcome = reproduce("table3", "smoke", out=given, data_dir=tmp_path, device="cpu", quiet=True)
    assert outcome.folder == tmp_path / "out" / "table3-smoke"
    assert not given.exists()
    rows = {(r["system"], r["quantity"]): r for r in rows_of(outcome.folder / "table.csv")}
    assert set(rows) == {(s.label, q) for s in small.systems for q in ("clean", "adversarial", "w_robust")}
    row = rows["AW-Net", "w_robust"]
    assert float(row["paper"]) == 0.7273
    assert float(row["difference"]) == pytest.approx(float(row["ours"]) - 0.7273, abs=1e-6)
    assert float(row["low"]) <= float(row["ours"]) <= float(row["high"])
    assert rows["AW-Net", "clean"]["paper"] == ""  # Table III prints A_w alone
    text = (outcome.folder / "table.md").read_text()
    assert "stand-in for cifar10" in text
    assert "| AW-Net | PGD trades | A_w | 72.73 |" in text
    record = json.loads((outcome.folder / "table.json").read_text())
    assert record["budget"] == "smoke"
    assert all((tmp_path / "out" / run / "report.json").is_file() for run in record["runs"].values())


@pytest.mark.usefixtures("undrawn")
def test_a_table_is_filled_from_finished_runs(tmp_path: Path) -> None:
    runs = {"AW-Net": "awnet_tiny_digits", "without router (static twin)": "resnet_tiny_digits"}
    given = []
    for label, name in runs.items():
        shutil.copytree(zoo_folder(name), tmp_path / name)
        given.append(f"{label}={tmp_path / name}")
    out = tmp_path / "out"
    arguments = ["reproduce", "table3", "--data", "digits", "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "--test-limit", "24", "--networks", *given]) == 0
    rows = rows_of(out / "table3-digits-smoke" / "table.csv")
    assert {row["system"] for row in rows} == set(runs)
    for label, name in runs.items():
        report = Report.load(tmp_path / name / "evaluations" / "table3-digits")
        assert report.n == 24
        ours = {
            (row["attack"], row["quantity"]): float(row["ours"]) for row in rows if row["system"] == label
        }
        assert ours["", "clean"] == pytest.approx(report.clean_accuracy, abs=1e-6)
        assert ours["cw", "adversarial"] == pytest.approx(report.attacks["cw"].robust_accuracy, abs=1e-6)
    page = (out / "table3-digits-smoke" / "table.md").read_text(encoding="utf-8")
    assert "AW-Net from awnet_tiny_digits" in page
    assert "mtard | 184,684 | 12 | – |" in page  # the zoo has no log, so no minutes
    assert not (out / "runs").exists()  # nothing was trained


@pytest.mark.parametrize(
    ("what", "networks", "message"),
    [
        ("table3", ["AW-Net=nowhere"], "nowhere"),
        ("table1", ["ResNet-18=RUN"], "table1 has no system 'ResNet-18': it has ResNet-34"),
        ("table1", ["AW-Net=RUN"], "was trained on digits, but table1 needs runs on cifar10"),
        ("table1", ["AW-Net"], "must be given as LABEL=RUN"),
        ("recipes", ["PGD-AT=RUN"], "not an option of recipes"),
        ("digits", ["AW-Net=RUN"], "options of tables and figures"),
    ],
)
def test_runs_that_do_not_fit_a_table_are_refused(
    what: str, networks: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(zoo_folder("awnet_tiny_digits"), tmp_path / "run")
    given = [text.replace("RUN", str(tmp_path / "run")) for text in networks]
    assert main(["reproduce", what, "--out", str(tmp_path / "out"), "--networks", *given]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("undrawn")
def test_small_systems_are_compared_at_equal_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = EXPERIMENTS["systems"]
    small = replace(whole, systems=whole.systems[:2], changes={"smoke": {"shrink": 2, "queries": 5}})
    monkeypatch.setitem(EXPERIMENTS, "systems", small)
    outcome = reproduce("systems", "smoke", out=tmp_path / "out", data_dir=tmp_path, device="cpu", quiet=True)
    record = json.loads((outcome.folder / "table.json").read_text())
    ours, twin = record["trainings"]
    assert (ours["label"], twin["label"]) == ("AW-Net", "Static twin")
    assert twin["epochs"] == round(ours["multiply_adds"] / (twin["multiply_adds"] / twin["epochs"]))
    for one in record["trainings"]:
        config = json.loads(
            (tmp_path / "out" / record["runs"][f"cifar10/{one['label']}"] / "config.json").read_text()
        )
        assert config["recipe"]["epochs"] == one["epochs"]
        assert config["dataset"]["name"] == "stand-in for cifar10 at 16×16"
    rows = {(r["system"], r["attack"], r["quantity"]): r for r in rows_of(outcome.folder / "table.csv")}
    assert float(rows["AW-Net", "union", "adversarial"]["ours"]) <= float(
        rows["AW-Net", "pgd_sat", "adversarial"]["ours"]
    )
    text = (outcome.folder / "table.md").read_text()
    assert "| system | attack | quantity | ours [95 %] |" in text  # the paper has no figures for these
    assert "multiply-adds, 10¹²" in text
    assert "AW-Net against Static twin" in text
    assert (outcome.folder / "cifar10.png").stat().st_size > 10_000


def test_shrunk_images_are_averages_over_squares() -> None:
    part = synthetic_splits("cifar10", seed=0, train=12).train
    shrunk = averaged_down(part, 2)
    assert shrunk.images.shape == (12, 3, 16, 16)
    square = part.images[3, 1, 4:6, 8:10].float().mean()
    assert abs(float(shrunk.images[3, 1, 2, 4]) - float(square)) <= 0.5
    assert shrunk.augmentation.shift == part.augmentation.shift // 2
    assert "16×16" in shrunk.name
    assert averaged_down(part, 1) is part


def test_without_the_images_only_a_smoke_run_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "reproduce",
        "table2",
        "--budget",
        "cpu",
        "--data-dir",
        str(tmp_path),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "cifar-100-python" in error
    assert "smoke" in error


def test_unknown_names_and_overwriting_a_table_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="digits or one of table1"):
        reproduce("table12", out=tmp_path)
    with pytest.raises(ValueError, match="budget must be one of smoke"):
        reproduce("table1", "huge", out=tmp_path)
    assert main(["reproduce", "table1", "--overwrite"]) == 2
    assert "overwrite is an option of digits" in capsys.readouterr().err
    assert set(BUDGETS) == {"smoke", "cpu", "gpu-30min", "paper"}  # the command line names them too


def test_filters_of_networks_of_two_kinds_are_not_compared(tmp_path: Path) -> None:
    networks = {
        "network": {name: create_model(name, in_channels=1) for name in ("resnet_tiny", "resnet_tiny_wide")}
    }
    with pytest.raises(ValueError, match="networks of one kind"):
        compare_filters(networks, tmp_path)


def test_checkpoints_are_analyzed_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from awnet.training import recipe_for

    splits = load_dataset("digits")
    small = type(splits)(*(part.subset(32) for part in splits))
    for seed in (0, 1):
        train(
            recipe_for("standard", "digits", epochs=1),
            "resnet_tiny",
            small,
            tmp_path / str(seed),
            seed=seed,
            device="cpu",
            tensorboard=False,
            quiet=True,
        )
    runs = [str(tmp_path / "0"), str(tmp_path / "1")]
    assert (
        main(
            [
                "analyze",
                "filters",
                *runs,
                "--out",
                str(tmp_path / "filters"),
                "--layers",
                "3",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    rows = rows_of(tmp_path / "filters" / "filter_means.csv")
    assert {row["model"] for row in rows} == {"0", "1"}
    assert {row["network"] for row in rows} == {"resnet_tiny"}
    assert len({row["layer"] for row in rows}) == 3
    assert not (tmp_path / "filters" / "effective_filters.csv").exists()  # no router
    assert (
        main(
            [
                "analyze",
                "weight-gap",
                runs[0],
                "--images",
                "16",
                "--out",
                str(tmp_path / "gap"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    gaps = rows_of(tmp_path / "gap" / "one_step.csv")
    assert len(gaps) == 12
    assert {row["measured"] for row in gaps if row["adv_weight"] == "0"} == {"0"}
    assert "one_step.png" in capsys.readouterr().out


def test_effective_filters_are_weights_times_scales(tmp_path: Path) -> None:
    data = load_dataset("digits").test.subset(12)
    models = {name: create_model(name, in_channels=1) for name in ("awnet_tiny", "resnet_tiny")}
    wide = create_model("resnet_tiny_wide", in_channels=1)
    model = models["awnet_tiny"]
    with torch.no_grad():
        model.router.signal_heads.weight.normal_(std=0.5)
    groups = by_architecture({**models, "wide": wide})
    assert {name: list(group) for name, group in groups.items()} == {
        "awnet_tiny and resnet_tiny": ["awnet_tiny", "resnet_tiny"],
        "resnet_tiny_wide": ["wide"],
    }
    assert len(compare_filters(groups, tmp_path)) == 2
    actual = effective_filters({name: (one, data) for name, one in models.items()}, tmp_path, attack="fgsm")
    assert [path.name for path in actual] == ["effective_filters.png", "effective_filters.csv"]
    rows = rows_of(tmp_path / "effective_filters.csv")
    assert {row["model"] for row in rows} == {"awnet_tiny"}
    assert len({row["layer"] for row in rows}) == len(model.dynamic.signal_widths)
    x, y, index = next(data.batches(12))
    x_adv = named_attack("fgsm", model, data.threat_model)(x, y, index=index)
    weights = model.dynamic.get_submodule("stages.0.0.conv1").weight.mean((1, 2, 3))
    for kind, images in (("clean", x), ("adversarial", x_adv)):
        own = [row for row in rows if row["layer"] == "stages.0.0.conv1" and row["images"] == kind]
        expected = weights * model.eval().route(images).filter_scales[0].mean(0)
        got = torch.tensor([float(row["mean"]) for row in own])
        torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-6)  # float32
    assert effective_filters({"plain": (models["resnet_tiny"], data)}, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "fig1"])
def test_every_experiment_runs_at_the_smoke_budget(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if name == "table8" and importlib.util.find_spec("torchvision") is not None:
        importable_torchvision()  # or its Swin rows would be left out
    shared = tmp_path_factory.getbasetemp() / "experiments"  # networks are shared, as a user's are
    seeds = (0,) if EXPERIMENTS[name].kind == "ablation" else ()
    outcome = reproduce(name, "smoke", out=shared, data_dir=shared, device="cpu", quiet=True, seeds=seeds)
    assert any(outcome.folder.iterdir())
    if name == "gated":
        text = (outcome.folder / "table.md").read_text()
        section = text.partition("## Accuracy under the papers' attacks and under the union")[2].partition(
            "##"
        )[0]
        for system in EXPERIMENTS[name].systems:
            lines = {
                x.attack: x for x in outcome.lines if (x.system, x.quantity) == (system.label, "adversarial")
            }
            union = lines.pop("union").ours
            claimed = min(line.ours for line in lines.values())
            assert union <= claimed
            assert f"| {system.label} |" in section
            assert f"| {100 * (union - claimed):+.2f} |" in section
    if EXPERIMENTS[name].table:
        assert {line.quantity for line in outcome.lines} & {"w_robust", "auc"}

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.trained_run import TRAIN, fails

from awnet import __version__
from awnet.attacks import named_attack
from awnet.cli import main
from awnet.cli.options import number, parse_options
from awnet.data import Splits, from_arrays, list_datasets, load_dataset
from awnet.evaluation import Report
from awnet.models import create_model, load_model, save_model
from awnet.reproduce import run_digits, run_digits_seeds
from awnet.training import list_recipes, recipe_for, train
from awnet.training.checkpoint import locked
from awnet.training.step import TrainingStep


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is read from or left in the working directory by accident
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("AWNET_DEBUG", raising=False)


# ── parsing ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.03", 0.03), ("1", 1.0), ("1e-3", 0.001)])
def test_numeric_options_take_fractions(text, value):
    assert number(text) == value


@pytest.mark.parametrize("text", ["", "8/", "/255", "8/0", "x", "1/2/3"])
def test_numeric_options_refuse_other_text(text):
    with pytest.raises(ValueError, match="a number or a fraction such as 8/255"):
        number(text)


def test_name_value_options_become_python_values():
    pairs = [
        "lr=0.05",
        "epochs=3",
        "eps=8/255",
        "milestones=75,90",
        "kl-reduction=elementmean",
        "on=true",
        "off=None",
    ]
    assert parse_options(pairs, "--set") == {
        "lr": 0.05,
        "epochs": 3,
        "eps": 8 / 255,
        "milestones": (75, 90),
        "kl_reduction": "elementmean",
        "on": True,
        "off": None,
    }


@pytest.mark.parametrize("pair", ["lr", "=3", ""])
def test_name_value_options_need_a_name_and_a_value(pair):
    with pytest.raises(ValueError, match="--set takes NAME=VALUE"):
        parse_options([pair], "--set")


COMMANDS = ["train", "evaluate", "attack", "reproduce", "bench", "data", "info"]


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as exit:
        main([*words, "--help"])
    assert exit.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_every_command_has_help(capsys):
    overview = help_of(capsys)
    for command in COMMANDS:
        assert f"• {command} " in overview
        assert len(help_of(capsys, command)) > 100


def test_seed_and_device_are_everywhere_a_model_runs(capsys):
    for command in ("train", "evaluate", "attack", "reproduce", "bench run"):
        text = help_of(capsys, *command.split())
        assert "--seed INT" in text
        assert "--device DEVICE" in text


def test_help_names_every_recipe_and_data_set(capsys):
    text = help_of(capsys, "train")
    for name in [*list_recipes(), *list_datasets()]:
        assert name in text


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-command"],
        ["train", "--no-such-flag"],
        ["train", "--epochs", "many"],
        ["train", "--eps", "8/x"],
        ["train", "--select-on", "luck"],
        ["evaluate"],
        ["attack", "run"],
        ["reproduce"],
        ["bench"],
        ["data"],
    ],
)
def test_invalid_arguments_exit_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    assert capsys.readouterr().err


def test_without_arguments_the_help_is_printed(capsys):
    with pytest.raises(SystemExit) as exit:
        main([])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert "evaluate" in said
    assert "reproduce" in said


def test_version_prints_the_version_and_nothing_else(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"awnet {__version__}\n"


LEAVES = (
    *("train", "evaluate", "attack", "compare", "reproduce", "analyze filters", "analyze weight-gap", "info"),
    *("bench run", "bench train", "bench verify", "bench plot", "bench table", "bench tune"),
    *("data download", "data info", "export robustbench", "export program", "export onnx"),
)


def test_placeholders_in_the_help_say_what_a_value_is(capsys):
    for command in LEAVES:
        assert not re.search(r"\bSTR\b", help_of(capsys, *command.split())), command


# ── train, evaluate, attack ───────────────────────────────────────────────────────────────────────────────


def test_train_writes_a_run_folder_with_its_config(run):
    config = json.loads((run / "config.json").read_text())
    assert config["recipe"]["name"] == "standard"
    assert config["recipe"]["epochs"] == 1
    assert config["dataset"]["name"] == "digits"
    assert config["dataset"]["eps"] == 0.1
    assert config["seed"] == 3
    assert load_model(run).config["name"] == "resnet_tiny"


def test_train_defaults_and_options_reach_the_recipe_and_the_model(tmp_path, capsys):
    words = ["train", "--recipe", "standard", "--epochs", "1", "--batch-size", "256", "--lr", "1/50"]
    words += ["--precision", "bfloat16", "--layout", "channels_last"]
    words += ["--recipe-options", "weight_decay=0", "momentum=0.5", "--model-options", "beta=1"]
    assert main(words) == 0
    folder = tmp_path / "runs" / "digits-awnet_tiny-standard-0"
    recipe = json.loads((folder / "config.json").read_text())["recipe"]
    assert (recipe["batch_size"], recipe["lr"], recipe["weight_decay"], recipe["momentum"]) == (
        256,
        0.02,
        0,
        0.5,
    )
    assert (recipe["precision"], recipe["layout"]) == ("bfloat16", "channels_last")
    assert load_model(folder).config["options"]["beta"] == 1
    assert f"awnet evaluate {folder.relative_to(tmp_path)}" in capsys.readouterr().out


def test_the_first_line_describes_the_run(run, tmp_path, capsys):
    words = [
        *TRAIN,
        "--recipe",
        "standard",
        "--eps",
        "8/255",
        "--limit",
        "100",
        "--out",
        str(tmp_path / "small"),
    ]
    assert main(words) == 0
    first = capsys.readouterr().out.splitlines()[0]
    parameters = sum(p.numel() for p in load_model(run).parameters())
    for said in (
        f"resnet_tiny, {parameters:,} parameters", "recipe standard, 1 epochs, float32, nchw, seed 0",
        "100 training images of digits", "cpu, backend ", "L-infinity eps 8/255",
    ):  # fmt: skip
        assert said in first
    assert main(["evaluate", str(run), "--attacks", "fgsm", "--limit", "20", "--name", "first"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert f"resnet_tiny, {parameters:,} parameters; trained by standard; 20 test images of digits" in first


def test_a_limit_takes_a_stratified_part_of_the_training_images(tmp_path, capsys):
    words = [*TRAIN, "--recipe", "standard", "--out", str(tmp_path / "small")]
    assert main([*words, "--limit", "100"]) == 0
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dataset"]["sizes"]["train"] == 100
    assert "limit must be" in fails(capsys, *words, "--overwrite", "--limit", 0)


def test_training_starts_from_another_runs_weights(run, tmp_path, capsys):
    words = [*TRAIN, "--recipe", "standard", "--eps", "1/10", "--lr", "1e-30", "--init-from"]
    assert main([*words, str(run), "--out", str(tmp_path / "on")]) == 0
    before, after = (load_model(folder).state_dict() for folder in (run, tmp_path / "on"))
    assert torch.equal(
        before["classifier.weight"], after["classifier.weight"]
    )  # the learning rate is next to 0
    config = json.loads((tmp_path / "on" / "config.json").read_text())
    assert config["sessions"][0]["init_from"] == str(run)
    error = fails(capsys, "train", "--data", "digits", "--epochs", 1, "--init-from", run, "--out", "new")
    assert "is a resnet_tiny whose weights do not fit this awnet_tiny" in error
    assert not Path("new").exists()
    assert "no file nowhere" in fails(capsys, *words, "nowhere", "--out", "new")
    save_model(create_model("resnet_tiny", in_channels=1), tmp_path / "random.safetensors")
    again = [*words, str(tmp_path / "random.safetensors"), "--out", str(tmp_path / "on"), "--resume"]
    assert "cannot be resumed with another configuration" in fails(capsys, *again)


@pytest.mark.usefixtures("undrawn")
def test_compare_sets_two_runs_side_by_side(run, tmp_path, capsys):
    other = tmp_path / "other"
    assert main([*TRAIN, "--recipe", "standard", "--eps", "1/10", "--seed", "4", "--out", str(other)]) == 0
    assert main(["evaluate", str(run), "--attacks", "fgsm", "--limit", "40", "--name", "both"]) == 0
    capsys.readouterr()
    words = ["compare", str(run), str(other), "--name", "both"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "has no evaluation 'both': run awnet evaluate" in out
    assert re.search(r"seed\s+3\s+4", out)
    assert "over images" not in out
    assert Path("comparison/training.png").stat().st_size > 10_000
    assert main(["evaluate", str(other), "--attacks", "fgsm", "--limit", "40", "--name", "both"]) == 0
    capsys.readouterr()
    assert main([*words, "--out", "there"]) == 0
    assert "over images" in capsys.readouterr().out
    assert Path("there/comparison.html").is_file()
    assert main(["evaluate", str(other), "--attacks", "fgsm", "--limit", "30", "--name", "both"]) == 0
    assert "number of images 30 and 40" in fails(capsys, *words)
    assert "does not exist" in fails(capsys, "compare", run, "nowhere", "--name", "both")


def test_an_evaluation_without_a_terminal_reports_progress(run, monkeypatch, capsys):
    monkeypatch.setattr("awnet.evaluation.progress.HEARTBEAT_SECONDS", 0.0)
    words = [
        "evaluate",
        str(run),
        "--attacks",
        "fgsm",
        "--limit",
        "40",
        "--batch-size",
        "20",
        "--name",
        "alive",
    ]
    assert main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluate: ")]
    assert re.match(r"evaluate: clean, 1 of 4 batches, \d+ s", lines[0])
    assert "4 of 4" in lines[-1]


def test_an_existing_run_needs_resume_or_overwrite(run, capsys):
    words = [*TRAIN, "--recipe", "standard", "--eps", "1/10", "--seed", "3", "--out", run]
    assert "--resume" in fails(capsys, *words)
    assert main([str(word) for word in [*words, "--resume"]]) == 0
    assert "cannot be resumed with another configuration" in fails(
        capsys, *words[:-3], 4, *words[-2:], "--resume"
    )


def test_evaluate_prints_a_table_and_writes_report_and_figures(run, capsys):
    words = [
        "evaluate",
        run,
        "--attacks",
        "fgsm",
        "pgd_sat",
        "--limit",
        "50",
        "--name",
        "quick",
        "--seed",
        "1",
    ]
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert "PGD" in out
    assert "digits test, 50 images, L-infinity eps 0.1" in out
    report = json.loads((run / "evaluations" / "quick" / "report.json").read_text())
    assert json.loads((run / "report.json").read_text()) == report
    assert (report["n"], report["eps"], report["selected_on"]) == (50, 0.1, "validation")
    assert set(report["attacks"]) == {"fgsm", "pgd_sat"}
    assert report["attacks"]["fgsm"]["settings"]["eps"] == 0.1
    assert report["settings"]["classes"] == 10
    assert list((run / "evaluations" / "quick").glob("*.png"))


@pytest.mark.usefixtures("undrawn")
def test_evaluate_takes_other_images_eps_and_checkpoint(run, capsys):
    words = [
        "evaluate",
        run,
        "--attacks",
        "fgsm",
        "--split",
        "validation",
        "--eps",
        "2/10",
        "--checkpoint",
        "last",
    ]
    assert main([str(word) for word in [*words, "--name", "other"]]) == 0
    report = Report.load(run / "evaluations" / "other")
    assert (report.split, report.n, report.eps) == ("validation", 200, 0.2)
    assert report.selected_on == "nothing: the last checkpoint"
    # the images that this run held out, which are those of its seed
    held_out = load_dataset("digits", seed=3).validation
    assert report.per_sample["index"].tolist() == held_out.index.tolist()
    assert report.settings["fingerprint"] == held_out.fingerprint()
    assert "not the ones" not in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_evaluate_compares_runs_image_by_image(run, tmp_path, capsys):
    other = tmp_path / "other"
    assert main([*TRAIN, "--recipe", "standard", "--eps", "1/10", "--out", str(other)]) == 0
    words = ["--attacks", "fgsm", "--limit", "60", "--name", "pair"]
    assert main(["evaluate", str(other), *words]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), *words, "--compare-with", str(other)]) == 0
    assert "paired by image" in capsys.readouterr().out
    report = Report.load(run / "evaluations" / "pair")
    assert list(report.compared_with) == [str(other)]


@pytest.mark.usefixtures("undrawn")
def test_a_file_of_weights_alone_needs_the_data_sets_name(tmp_path, capsys):
    file = tmp_path / "alone" / "model.safetensors"
    save_model(create_model("resnet_tiny", in_channels=1), file)
    assert "give --data" in fails(capsys, "evaluate", file)
    words = ["evaluate", str(file), "--data", "digits", "--attacks", "fgsm", "--limit", "20"]
    assert main(words) == 0
    assert (tmp_path / "alone" / "evaluations" / "default" / "report.json").is_file()


def test_attack_saves_images_labels_and_provenance(run, tmp_path, capsys):
    out = tmp_path / "new" / "x_adv.npz"
    words = [
        "attack",
        run,
        "--attack",
        "pgd_sat",
        "--limit",
        "30",
        "--seed",
        "2",
        "--batch-size",
        "7",
        "--out",
        out,
    ]
    assert main([str(word) for word in words]) == 0
    assert "still classified correctly" in capsys.readouterr().out
    with np.load(out, allow_pickle=False) as saved:
        arrays = {name: saved[name] for name in saved}
    provenance = json.loads(str(arrays["provenance"]))
    assert provenance["attack"] == "pgd_sat"
    assert provenance["seed"] == 2
    assert provenance["awnet"] == __version__
    assert provenance["model_config"]["name"] == "resnet_tiny"
    model, data = load_model(run), load_dataset("digits").test.subset(30)
    x, y, index = next(data.batches(30))
    assert arrays["y"].tolist() == y.tolist()
    assert arrays["index"].tolist() == index.tolist()
    x_adv = torch.from_numpy(arrays["x_adv"])
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6  # eps 0.1, and one rounding of x ± eps
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    threat_model = type(data.threat_model)(0.1)
    expected = named_attack("pgd_sat", model, threat_model, seed=2)(x, y, index=index)
    # batches of 7 and of 30 may round differently, and a sign of a gradient near 0 may flip
    assert ((x_adv - expected).abs() < 1e-5).float().mean() > 0.99
    with torch.no_grad():
        assert arrays["prediction"].tolist() == model(x_adv).argmax(1).tolist()
    assert "exists: choose another file, or replace it with --overwrite" in fails(capsys, *words)
    assert main([str(word) for word in [*words, "--overwrite"]]) == 0


def test_reproduce_hands_its_flags_to_the_experiment(monkeypatch):
    # the experiment itself is run in test_reproduce.py
    calls = []
    signature = inspect.signature(run_digits)
    monkeypatch.setattr(
        "awnet.reproduce.run_digits", lambda *a, **k: calls.append(signature.bind(*a, **k).arguments)
    )
    assert main(["reproduce", "digits"]) == 0
    assert main(["reproduce", "digits", "--out", "here", "--seed", "5", "--device", "cpu", "--resume"]) == 0
    assert main(["reproduce", "digits", "--overwrite"]) == 0
    usual = {"out": Path("runs/digits"), "seed": 0, "resume": False, "overwrite": False, "device": None}
    changed = {"out": Path("here"), "seed": 5, "resume": True, "device": "cpu"}
    assert calls == [usual, usual | changed, usual | {"overwrite": True}]

    calls.clear()
    signature = inspect.signature(run_digits_seeds)
    monkeypatch.setattr(
        "awnet.reproduce.run_digits_seeds", lambda *a, **k: calls.append(signature.bind(*a, **k).arguments)
    )
    assert main(["reproduce", "digits", "--seeds", "3", "1", "--out", "here", "--resume"]) == 0
    assert [(call["out"], call["seeds"], call["resume"]) for call in calls] == [(Path("here"), (3, 1), True)]


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--recipe", "luck"], "unknown recipe 'luck'"),
        (["reproduce", "table1", "--seeds", "1", "2"], "seeds is an option of digits"),
        (["reproduce", "digits", "--seeds", "1"], "two or more different numbers"),
        (["train", "--model", "awnet_huge", "--out", "new"], "unknown model 'awnet_huge'"),
        (["train", "--data", "mnist"], "unknown data set 'mnist'; known are digits"),
        (["train", "--data", "cifar10"], "cifar10 is not in data_dir 'data'"),
        (["train", "--eps", "-8/255", "--out", "new"], "eps must be in (0, 1]"),
        (["train", "--epochs", "0"], "epochs must be"),
        (["train", "--epochs", "2", "--recipe-options", "epochs=3"], "epochs is given twice"),
        (["train", "--recipe-options", "colour=red"], "no setting 'colour'"),
        (["train", "--recipe-options", "colour"], "--recipe-options takes NAME=VALUE"),
        (["train", "--model-options", "colour=red", "--out", "new"], "colour"),
        (["train", "--device", "tpu9", "--out", "new"], "device must be"),
        (["train", "--resume", "--overwrite", "--out", "new"], "resume and overwrite"),
        (["train", "--recipe", "trades", "--teachers", "a", "b", "--out", "new"], "takes no teachers"),
        (["train", "--teachers", "a", "b", "--out", "new"], "no file a"),
        (["train", "--device", "meta", "--out", "new"], "device must be cpu, cuda, cuda:1"),
        (["train", "--device", "mps", "--out", "new"], "device must be cpu, cuda, cuda:1"),
        (["train", "--recipe-options", "milestones=3", "--out", "new"], "command line milestones=75,"),
        (["train", "--recipe-options", "lr=1" + "0" * 400, "--out", "new"], "lr must be a number above 0"),
        (["train", "--recipe-options", "precision=8", "--out", "new"], "precision must be one of"),
        (["train", "--model-options", "width=1e9", "--out", "new"], "awnet_tiny with num_classes=10"),
        (["train", "--model-options", "width=1" + "0" * 400, "--out", "new"], "width must be finite"),
        (["train", "--model-options", "router_widths=8", "--out", "new"], "router_widths must be a list"),
        (["train", "--model-options", "bn=1", "--out", "new"], "bn"),
        (["train", "--seed", "1" + "0" * 30, "--out", "new"], "seed must be an integer that int64 holds"),
        (["train", "--max-minutes", "nan", "--out", "new"], "max_minutes must be finite"),
        (["train", "--beta", "1"], "--beta is a setting of the model: give --model-options beta=VALUE"),
        (["train", "--router-lr=1"], "of the recipe: give --recipe-options router_lr=VALUE"),
        (["evaluate", "nowhere"], "nowhere does not exist: give a run folder"),
        (["evaluate", "nowhere", "--data", "digits"], "nowhere does not exist: give a run folder"),
        (["evaluate", "."], "is not a run folder: it has no config.json"),
        (["attack", "nowhere", "--out", "x.npz", "--data", "digits"], "nowhere does not exist"),
        (["analyze", "filters", "nowhere"], "nowhere does not exist"),
        (["analyse", "filters", "nowhere"], "nowhere does not exist"),
        (["export", "program", "nowhere", "--out", "x.pt2"], "nowhere does not exist"),
        (["reproduce", "everything"], "what must be digits or one of table1"),
        (["data", "info", "mnist"], "unknown data set 'mnist'"),
        (["data", "download", "digits"], "digits needs no download"),
        (["bench", "run", "--batch", "0"], "batch"),
        (["bench", "run", "--shape", "64,64"], "shape must be C_IN,C_OUT,SIZE"),
        (["bench", "run", "--shape", "64,64,x"], "shape must be C_IN,C_OUT,SIZE"),
        (["bench", "run", "--shape", "64,64,8,3,1,5"], "groups, 5, must divide"),
        (["bench", "run", "--shape", "64,64,8,2"], "the kernel must be odd"),
        (["bench", "run", "--shape", "8,8,8", "--cases", "stem"], "shape and cases are both given"),
        (["reproduce", "table1", "--data", "digits"], "data is an option of table3"),
        (["reproduce", "digits", "--data", "digits"], "data is an option of table3"),
    ],
)
def test_an_error_is_one_clean_line(words, message, capsys):
    assert message in fails(capsys, *words)
    assert not Path("new").exists()
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attacks", "luck"], "unknown attack"),
        (["--limit", "0"], "limit must be"),
        (["--batch-size", "0"], "batch_size must be"),
        (["--name", "a/b"], "name must be letters"),
        (["--eps", "0"], "eps must be in (0, 1]"),
        (["--device", "tpu9"], "device must be"),
        (["--data", "mnist"], "unknown data set"),
        (["--compare-with", "nowhere"], "compare-with takes run folders; nowhere is not a folder"),
        (["--device", "meta"], "device must be cpu"),
        (["--device", "mps"], "device must be cpu"),
        (["--seed", "1" + "0" * 30], "seed must be an integer that int64 holds"),
        (["--queries", "-1", "--attacks", "square"], "queries must be"),
    ],
)
def test_errors_on_a_run_are_clean_too(run, words, message, capsys):
    assert message in fails(capsys, "evaluate", run, *words)


def test_a_run_on_arrays_is_exported_and_other_commands_say_what_to_do(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (24, 2, 6, 6), dtype=np.uint8)
    part = from_arrays(images, np.arange(24) % 4, name="flowers")
    recipe = recipe_for("standard", "digits", epochs=1)
    train(recipe, "resnet_tiny", Splits(part, part, part), "own", quiet=True, tensorboard=False)
    assert main(["export", "program", "own", "--out", "own.pt2"]) == 0
    assert torch.export.load("own.pt2").module()(torch.zeros(5, 2, 6, 6)).shape == (5, 4)
    capsys.readouterr()
    for words in (["evaluate", "own"], ["attack", "own", "--out", "x.npz"], ["analyze", "filters", "own"]):
        assert re.search(
            r"own was trained on 'flowers', arrays .*awnet\.evaluate.*--data", fails(capsys, *words)
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_missing_gpu_is_reported(run, capsys):
    assert "finds no GPU" in fails(capsys, "evaluate", run, "--device", "cuda")


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_a_traceback_can_be_requested(how, capsys, monkeypatch):
    words = ["data", "info", "mnist"]
    if how == "flag":
        words.append("--traceback")
    else:
        monkeypatch.setenv("AWNET_DEBUG", "1")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("in Python\n")
    assert "\nawnet: error: unknown data set" in error


def test_an_interruption_is_one_line_and_status_130(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("awnet.data.load_dataset", interrupt)
    assert main(["data", "info", "digits"]) == 130
    assert capsys.readouterr().err == "awnet: interrupted\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    def defect(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr("awnet.data.load_dataset", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["data", "info", "digits"])


def test_a_full_memory_and_a_second_process_are_one_line_each(tmp_path, capsys, monkeypatch):
    def full(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    train = [*TRAIN, "--recipe", "standard", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", full)
        assert "Tried to allocate 2.00 GiB" in fails(capsys, *train)
    with locked(tmp_path / "run"):
        assert "another process trains in" in fails(capsys, *train, "--resume")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluations", "none"], "has no evaluation 'none', it has default"),
        (["elsewhere", "evaluations", "default"], r"there is no folder .*elsewhere"),
        (["state"], "give the folder of an evaluation"),
    ],
)
def test_a_missing_report_names_where_reports_are_stored(tmp_path, words, message):
    place = tmp_path / "evaluations" / "default"
    place.mkdir(parents=True)
    (place / "report.json").write_text("{}")
    (tmp_path / "state").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        Report.load(tmp_path.joinpath(*words))

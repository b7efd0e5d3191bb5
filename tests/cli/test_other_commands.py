"""awnet data, info, bench and export, the program itself, and ~ in paths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cifar_files import write_cifar10
from support.http_server import Server, tar_of
from support.trained_run import fails

from awnet import __version__
from awnet.attacks import list_attacks
from awnet.cli import main
from awnet.data import list_datasets, load_dataset
from awnet.evaluation import Report
from awnet.models import create_model, list_models, save_model
from awnet.training import list_recipes, recipe_for, train


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is read from or left in the working directory by accident
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("AWNET_DEBUG", raising=False)


# ── data, info, bench ─────────────────────────────────────────────────────────────────────────────────────


def test_data_download_prints_the_folder_or_says_what_to_do(tmp_path, capsys, monkeypatch):
    server = Server()
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    words = ["data", "download", "cifar10", "--data-dir", "mine"]
    server.break_off_after = 500
    assert "the same command resumes it" in fails(capsys, *words)
    server.break_off_after = None
    assert main(words) == 0
    assert capsys.readouterr().out == "mine/cifar-10-batches-py\n"
    assert server.asked == [None, "bytes=500-"]
    server.close()
    assert main(["data", "info", "cifar10", "--data-dir", "mine"]) == 0
    assert "10: class 0, class 1" in capsys.readouterr().out


def test_data_info_prints_splits_threat_model_and_fingerprints(capsys):
    assert main(["data", "info", "digits", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    for part in load_dataset("digits", seed=1):
        assert f"{len(part):,}" in out
        assert part.fingerprint() in out
    assert "L-infinity, eps 0.15" in out
    assert "shift by up to ±1 pixels, no flip" in out


def test_info_prints_the_environment_as_json_and_as_text(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["awnet"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["models"] == list_models()
    assert facts["datasets"] == list_datasets()
    assert facts["attacks"] == list(list_attacks())
    assert facts["recipes"] == list_recipes()
    assert "cpu" in facts["devices"]
    assert facts["backends"]["eager"] is None
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in ["awnet_resnet18", "tiny_imagenet", "pgd_trades", "mtard", __version__, *facts["backends"]]:
        assert name in out
    for reason in filter(None, facts["backends"].values()):
        assert reason in out


def test_bench_run_takes_the_options_of_the_benchmarks(tmp_path, capsys):
    words = ["bench", "run", "--smoke", "--cases", "stem", "--modes", "forward", "--providers", "eager"]
    assert main([*words, "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.glob("*.csv"))


def test_the_command_runs_as_a_program(tmp_path):
    def awnet(*words):
        command = [sys.executable, "-m", "awnet", *words]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "COLUMNS": "100"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    good = awnet("--version")  # without the seconds that importing torch takes
    assert good.returncode == 0
    assert good.stdout == f"awnet {__version__}\n"
    bad = awnet("evaluate", "nowhere")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.startswith("awnet: error: ")
    assert bad.stderr.count("\n") == 1


# ── ~ in paths ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_home_folder_is_expanded_in_every_path_of_a_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "home" / "runs" / "x"
    small = ["--recipe", "standard", "--model", "resnet_tiny", "--epochs", "1", "--batch-size", "512"]
    assert main(["train", *small, "--out=~/runs/x"]) == 0
    assert (run / "best.safetensors").is_file()
    limits = ["--limit", "10", "--attack", "fgsm"]
    assert main(["attack", "~/runs/x/best.safetensors", *limits, "--data", "digits", "--out", "~/x.npz"]) == 0
    assert (tmp_path / "home" / "x.npz").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    capsys.readouterr()
    for words in (
        ["train", *small, "--out=~nobody-here/x"],
        ["train", *small, "--data-dir", "~nobody-here/data"],
        ["train", "--teachers", "~nobody-here/a", "~nobody-here/b", "--out", "y"],
        ["evaluate", "~nobody-here/x"],
        ["data", "info", "cifar10", "--data-dir", "~nobody-here/d"],
        ["reproduce", "digits", "--out", "~nobody-here/d"],
        ["bench", "plot", "--out", "~nobody-here/d"],
    ):
        assert "the home folder of '~nobody-here' is not known" in fails(capsys, *words)


@pytest.mark.slow
def test_a_home_folder_is_expanded_in_every_path_of_the_python_api(tmp_path, monkeypatch):
    from awnet import evaluate, load_model, save_model
    from awnet.attacks.craft import craft
    from awnet.attacks.transfer import Crafted
    from awnet.data import load_dataset
    from awnet.training import checkpoint, read_log

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    splits = load_dataset("digits")
    recipe = recipe_for("standard", "digits", epochs=1, batch_size=512)
    result = train(recipe, "resnet_tiny", splits, "~/run", quiet=True, tensorboard=False)
    assert result.folder == tmp_path / "home" / "run"
    assert checkpoint.states("~/run")
    assert len(read_log("~/run", "epoch")) == 1
    model = load_model("~/run")
    save_model(model, "~/copy.safetensors")
    assert type(load_model("~/copy.safetensors")) is type(model)
    report = evaluate(model, splits.test, ["fgsm"], limit=10, out="~/run")
    assert Report.load("~/run/evaluations/default").n == report.n
    report.save("~/saved")
    assert Report.load("~/saved").n == 10
    images = craft("~/run", splits.test.subset(10), "fgsm", folder="~/crafted")
    (path,) = (tmp_path / "home" / "crafted").glob("*.safetensors")
    assert torch.equal(Crafted.load(f"~/crafted/{path.name}").x_adv, images.x_adv)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    for call in (
        lambda: train(recipe, "resnet_tiny", splits, "~nobody-here/run"),
        lambda: load_model("~nobody-here/run"),
        lambda: save_model(model, "~nobody-here/x.safetensors"),
        lambda: evaluate(model, splits.test, ["fgsm"], limit=10, out="~nobody-here/run"),
        lambda: Report.load("~nobody-here/run"),
        lambda: load_dataset("cifar10", "~nobody-here/data"),
    ):
        with pytest.raises(ValueError, match="home folder of '~nobody-here' is not known"):
            call()


def test_the_branching_network_is_exported_for_any_batch_size(tmp_path, capsys):
    model = create_model("rdi_resnet38", width=0.125, num_classes=10, in_channels=1).eval()
    save_model(model, tmp_path / "rdi.safetensors")
    assert (
        main(["export", "program", str(tmp_path / "rdi.safetensors"), "--data", "digits", "--out", "p.pt2"])
        == 0
    )
    x = torch.rand(5, 1, 8, 8)
    assert torch.allclose(torch.export.load("p.pt2").module()(x), model(x), atol=1e-6)  # float32 rounding

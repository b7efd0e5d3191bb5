"""Losses against the equations written out again, recipes, and the loop on small models and images."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_training import FAST, SPLITS, K, batch, dynamic_net, quick, small_splits, static_net
from torch import nn

from awnet.attacks import PGD
from awnet.data import Splits, ThreatModel, load_dataset
from awnet.models import create_model, load_model
from awnet.models.files import weights_fingerprint
from awnet.nn import AdversarialRouter, AWNet, Backbone
from awnet.training import (
    MTARD,
    PGDAT,
    RECIPES,
    Recipe,
    Standard,
    Trades,
    checkpoint,
    list_recipes,
    logging,
    read_log,
    recipe_for,
    train,
)
from awnet.training.losses import kl_divergence

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- recipes


def test_the_default_settings_are_the_papers() -> None:
    recipe = MTARD()
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.router_lr) == (100, 256, 0.1, 0.01)
    assert (recipe.momentum, recipe.weight_decay, recipe.milestones) == (0.9, 2e-4, (75, 90))
    assert (recipe.attack_steps, recipe.attack_noise, recipe.temperature) == (10, 0.001, 1.0)
    assert recipe_for("mtard", "cifar10") == recipe
    assert recipe_for("mtard", "cifar100").temperature == 5  # type: ignore[attr-defined]
    tiny = recipe_for("mtard", "tiny_imagenet")
    assert (tiny.epochs, tiny.batch_size, tiny.milestones, tiny.temperature) == (50, 128, (25, 40), 5)  # type: ignore[attr-defined]
    digits = recipe_for("mtard", "digits")
    assert (digits.epochs, digits.batch_size, digits.schedule) == (12, 64, "onecycle")
    assert list_recipes()[:4] == ["mtard", "trades", "pgd_at", "standard"]
    others = {"mtard_fast", "trades_fast", "pgd_at_fast", "standard_fast", "hat"}
    others |= {"pgd_at_strong", "trades_strong", "mtard_strong", "single_step"}
    assert set(list_recipes()[4:]) == others | {"rdi", "advmoe", "separate", "mart", "gat"}


def test_the_short_recipes_keep_their_length_and_take_the_data_sets_temperature() -> None:
    fast = recipe_for("mtard_fast", "tiny_imagenet")
    assert (fast.epochs, fast.schedule, fast.temperature) == (30, "onecycle", 5)  # type: ignore[attr-defined]
    assert recipe_for("standard_fast", "digits").epochs == 12
    helper = recipe_for("hat", "cifar10")
    assert (helper.lr, helper.weight_decay, helper.schedule) == (0.21, 5e-4, "onecycle")
    assert helper.teachers == ("clean",)
    assert isinstance(helper.teacher_recipe("clean"), Standard)


def test_overrides_and_milestones_that_move_with_the_length() -> None:
    assert recipe_for("trades", "cifar10", epochs=10).milestones == (7, 9)
    assert recipe_for("trades", "cifar10", epochs=1).milestones == ()
    assert recipe_for("trades", "cifar10", epochs=10, milestones=(4,)).milestones == (4,)
    assert recipe_for("pgd_at", "digits", lr=0.2).lr == 0.2


def test_the_teachers_recipes_share_the_students_settings() -> None:
    recipe = recipe_for("mtard", "digits", epochs=3, batch_size=32, type_weight=0.5)
    assert isinstance(recipe, MTARD)
    clean, robust = recipe.teacher_recipe("clean"), recipe.teacher_recipe("robust")
    assert isinstance(clean, Standard)
    assert isinstance(robust, PGDAT)
    assert isinstance(MTARD().teacher_recipe("robust"), Trades)
    assert (robust.epochs, robust.batch_size, robust.schedule) == (3, 32, "onecycle")


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"epochs": True},
        {"batch_size": 0},
        {"batch_size": "64"},
        {"lr": 0.0},
        {"lr": math.nan},
        {"router_lr": -0.1},
        {"momentum": 1.0},
        {"weight_decay": -1e-4},
        {"schedule": "poly"},
        {"milestones": (90, 75)},
        {"milestones": (0,)},
        {"lr_decay": 0},
        {"attack_steps": 0},
        {"attack_step_size": 0.0},
        {"attack_noise": -1.0},
        {"inner_type_weight": math.inf},
        {"type_weight": -1.0},
        {"type_label_smoothing": 1.0},
        {"adv_weight": 1.5},
        {"adv_weight": -0.5},
        {"consistency": math.nan},
        {"router_passes": "both"},
        {"precision": "float16"},
        {"layout": "nhwc"},
        {"accumulate": 0},
        {"clip_norm": 0.0},
        {"ema_decay": 1.0},
        {"capture": 1},
        {"validate_every": 0},
        {"validate_limit": 0},
        {"log_every": 0},
        {"temperature": 0.0},
        {"kl_reduction": "sum"},
        {"weight_lr": 2.0},
        {"robust_teacher": "mtard"},
    ],
)
def test_bad_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        recipe_for("mtard", "cifar10", **wrong)


def test_unknown_recipes_and_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'tradez'.*mtard"):
        recipe_for("tradez", "digits")
    with pytest.raises(ValueError, match=r"no setting 'temprature'.*temperature"):
        recipe_for("mtard", "digits", temprature=3)
    with pytest.raises(ValueError, match="no setting 'temperature'"):
        recipe_for("standard", "digits", temperature=3)


def test_the_router_and_its_heads_learn_at_their_own_rate() -> None:
    net = dynamic_net()
    groups = MTARD(lr=0.2, router_lr=0.02).build_optimizer(net).param_groups
    assert [group["lr"] for group in groups] == [0.2, 0.02]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in net.router.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    assert len(MTARD().build_optimizer(static_net()).param_groups) == 1


def rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    optimizer = recipe.build_optimizer(dynamic_net())
    scheduler = recipe.build_scheduler(optimizer, steps_per_epoch)
    seen = []
    for _ in range(recipe.epochs * steps_per_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(seen[-1] / 10)
        optimizer.step()
        scheduler.step()
    return seen


def test_learning_rates_follow_their_schedules() -> None:
    seen = rates(PGDAT(epochs=6, milestones=(3, 5)), steps_per_epoch=2)
    assert seen == pytest.approx([0.1] * 6 + [0.01] * 4 + [0.001] * 2)
    seen = rates(PGDAT(epochs=10, schedule="onecycle"), steps_per_epoch=3)
    assert max(seen) == pytest.approx(0.1)
    assert seen[0] < 0.01
    assert seen[-1] < 0.001
    assert 0 < seen.index(max(seen)) < 15
    recipe = MTARD(epochs=6, milestones=(3, 5))
    assert [recipe.weight_lr_at(e) for e in (0, 2, 3, 5)] == pytest.approx([0.025, 0.025, 0.0025, 0.00025])
    assert MTARD(schedule="onecycle").weight_lr_at(99) == 0.025


def test_the_training_attack_is_pgd_in_the_ball_and_leaves_the_model_alone() -> None:
    net, data, threat = dynamic_net().train(), batch(), ThreatModel(0.05)
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    x_adv = MTARD().attack(net, threat, K, seed=5)(data.x, data.y, index=data.index)
    same = PGD(net, eps=0.05, step_size=0.0125, steps=10, random_start="normal", seed=5)
    assert torch.equal(x_adv, same(data.x, data.y, index=data.index))
    assert (x_adv - data.x).abs().max() <= 0.05 + 1e-6  # a rounding of float32
    assert not x_adv.requires_grad
    assert [m.training for m in net.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    other = MTARD().attack(net, threat, K, seed=6)(data.x, data.y, index=data.index)
    assert not torch.equal(x_adv, other)


def test_a_run_in_l2_resumes_in_l2_with_the_same_bits(tmp_path: Path) -> None:
    splits = Splits(*(replace(part, threat_model=ThreatModel(0.6, "L2")) for part in SPLITS))
    torch.manual_seed(0)
    whole = train(PGDAT(**FAST), static_net(), splits, tmp_path / "whole", quiet=True, tensorboard=False)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["dataset"]["norm"], config["dataset"]["eps"]) == ("L2", 0.6)
    torch.manual_seed(0)
    options = {"quiet": True, "tensorboard": False}
    train(PGDAT(**FAST), static_net(), splits, tmp_path / "run", max_minutes=1e-9, **options)
    other = Splits(*(replace(part, threat_model=ThreatModel(0.6, "L1")) for part in SPLITS))
    with pytest.raises(ValueError, match=r"dataset\.norm was 'L2', is now 'L1'"):
        train(PGDAT(**FAST), static_net(), other, tmp_path / "run", resume=True, **options)
    resumed = train(PGDAT(**FAST), static_net(), splits, tmp_path / "run", resume=True, **options)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_run_of_an_earlier_version_without_a_norm_resumes_in_l_infinity(tmp_path: Path) -> None:
    options: dict[str, Any] = {"quiet": True, "tensorboard": False}
    train(PGDAT(**FAST), static_net(), SPLITS, tmp_path, max_minutes=1e-9, **options)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dataset"].pop("norm") == "Linf"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert train(PGDAT(**FAST), static_net(), SPLITS, tmp_path, resume=True, **options).finished


def test_the_attack_of_trades_raises_the_kl() -> None:
    net, data, threat = dynamic_net(), batch(), ThreatModel(0.1)
    with torch.no_grad():  # the network of a few steps, so that it has something to lose
        net(data.x, is_clean=torch.arange(10) < 5)
    x_adv = Trades().attack(net, threat, K, seed=0)(data.x, data.y, index=data.index)
    net.eval()
    noise = data.x + (x_adv - data.x).abs() * torch.randn(data.x.shape, generator=torch.Generator()).sign()
    assert kl_divergence(net(data.x), net(x_adv)) > 2 * kl_divergence(net(data.x), net(noise))
    # written out: PGD on the KL, step 0.007 at 8/255
    step = 0.1 * 0.007 / (8 / 255)
    same = PGD(net, eps=0.1, step_size=step, steps=10, loss="kl", random_start="normal", seed=0)
    assert torch.equal(x_adv, same(data.x, data.y, index=data.index))


@pytest.mark.parametrize("kind", [PGDAT, Trades])
def test_an_inner_attack_may_fool_the_router_too(kind: type[Recipe]) -> None:
    net, data, threat = dynamic_net(), batch(), ThreatModel(0.1)
    actual = {}
    for weight in (0.0, 100.0):
        attack = kind(inner_type_weight=weight).attack(net, threat, K, seed=0)
        x_adv = attack(data.x, data.y, index=data.index)
        with torch.no_grad():
            actual[weight] = copy.deepcopy(net).eval().route(x_adv).p_clean.mean()
    assert actual[100.0] > actual[0.0]
    without = dynamic_net(type_head=False)
    kind(inner_type_weight=1.0).attack(without, threat, K, seed=0)(data.x, data.y, index=data.index)


def test_a_short_training_on_digits_learns(tmp_path: Path) -> None:
    result = train(quick(PGDAT, epochs=15, schedule="onecycle"), static_net(), SPLITS, tmp_path, quiet=True)
    assert result.finished
    assert result.validation["clean_accuracy"] >= 0.9
    assert result.validation["robust_accuracy"] >= 0.6
    assert result.history[-1]["total"] < 0.5 * result.history[0]["total"]
    assert not result.model.training


def test_a_run_folder_holds_config_log_weights_and_state(tmp_path: Path) -> None:
    splits = load_dataset("digits")
    splits = Splits(splits.train.subset(40), splits.validation.subset(20), splits.test.subset(20))
    recipe = recipe_for(
        "pgd_at", "digits", epochs=2, batch_size=20, attack_steps=1, log_every=1, validate_every=1
    )
    result = train(recipe, "awnet_tiny", splits, tmp_path / "run", seed=3, select_on="test", quiet=True)
    folder = result.folder
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.json",
        "log.jsonl",
        "tensorboard",
        "best.safetensors",
        "last.safetensors",
        "state",
    }
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe"] == recipe.to_dict() | {"milestones": list(recipe.milestones)}
    assert config["model"]["name"] == "awnet_tiny"
    assert config["dataset"]["name"] == "digits"
    assert config["dataset"]["fingerprints"]["train"] == splits.train.fingerprint()
    assert (config["seed"], config["selected_on"], config["teachers"]) == (3, "test", None)
    assert config["sessions"][0]["environment"]["torch"] == torch.__version__
    steps, epochs = read_log(folder, "step"), read_log(folder, "epoch")
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    assert [(r["epoch"], r["step"]) for r in epochs] == [(1, 2), (2, 4)]
    assert result.history == epochs
    mean = (20 * steps[0]["total"] + 20 * steps[1]["total"]) / 40
    assert epochs[0]["total"] == pytest.approx(mean)
    for record in epochs:
        assert record["w_robust_accuracy"] == 0.5 * (record["clean_accuracy"] + record["robust_accuracy"])
        assert record["images_per_second"] > 0
    best = max(epochs, key=lambda r: (r["w_robust_accuracy"], r["epoch"]))
    assert result.validation["epoch"] == best["epoch"]
    loaded = load_model(folder)
    assert all(torch.equal(v, result.model.state_dict()[n]) for n, v in loaded.state_dict().items())
    last = load_model(folder / "last.safetensors")
    assert int(last.dynamic.stem.bn.num_batches_tracked[0]) == 4


def test_weights_and_training_are_functions_of_the_seed(tmp_path: Path) -> None:
    splits = load_dataset("digits")
    splits = Splits(splits.train.subset(24), splits.validation.subset(10), splits.test)
    recipe = recipe_for("pgd_at", "digits", epochs=1, batch_size=12, attack_steps=1)
    runs = []
    for i, seed in enumerate((1, 1, 2)):
        torch.manual_seed(100 + i)  # the caller's random state must not matter
        before = torch.get_rng_state()
        result = train(
            recipe, "resnet_tiny", splits, tmp_path / str(i), seed=seed, quiet=True, tensorboard=False
        )
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(load_model(result.folder / "last.safetensors").state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert any(not torch.equal(value, runs[2][name]) for name, value in runs[0].items())
    assert not (tmp_path / "0" / "tensorboard").exists()


@pytest.mark.parametrize("name", [name for name, kind in RECIPES.items() if kind.network is None])
@pytest.mark.parametrize("model", ["awnet_tiny", "resnet_tiny"])
def test_every_recipe_trains_every_kind_of_model(tmp_path: Path, name: str, model: str) -> None:
    splits = load_dataset("digits")
    splits = Splits(splits.train.subset(24), splits.validation.subset(10), splits.test)
    recipe = recipe_for(name, "digits", epochs=1, batch_size=12, attack_steps=1)
    teacher = create_model("resnet_tiny", in_channels=1)
    given = [teacher] * len(recipe.teachers) or None
    result = train(recipe, model, splits, tmp_path, teachers=given, quiet=True, tensorboard=False)
    assert result.finished
    assert result.history[-1]["skipped_steps"] == 0
    assert ("robust_accuracy" in result.validation) == recipe.needs_attack
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())


def test_hat_trains_its_clean_teacher_first(tmp_path: Path) -> None:
    splits = load_dataset("digits")
    splits = Splits(splits.train.subset(24), splits.validation.subset(10), splits.test)
    recipe = recipe_for("hat", "digits", epochs=1, batch_size=12, attack_steps=1)
    train(recipe, "resnet_tiny", splits, tmp_path / "run", quiet=True, tensorboard=False)
    assert [path.name for path in (tmp_path / "run" / "teachers").iterdir()] == ["clean"]
    with pytest.raises(ValueError, match=r"teachers of hat must be 1, \(clean\)"):
        train(recipe, "resnet_tiny", splits, tmp_path / "b", teachers=("a", "b"), quiet=True)


def test_validation_may_be_rarer_and_smaller(tmp_path: Path) -> None:
    recipe = quick(epochs=5, validate_every=2, validate_limit=6)
    result = train(recipe, static_net(), SPLITS, tmp_path, quiet=True, tensorboard=False)
    assert [r["epoch"] for r in result.history if "clean_accuracy" in r] == [2, 4, 5]
    assert all(round(6 * r["clean_accuracy"], 6) % 1 == 0 for r in result.history if "clean_accuracy" in r)


def test_missing_teachers_are_trained_first_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = load_dataset("digits")
    splits = Splits(splits.train.subset(24), splits.validation.subset(10), splits.test)
    recipe = recipe_for("mtard", "digits", epochs=1, batch_size=12, attack_steps=1)
    run = tmp_path / "run"
    train(recipe, "resnet_tiny", splits, run, tensorboard=False)
    said = capsys.readouterr().out
    assert "no clean teacher was given: resnet_tiny, trained by standard" in said
    assert "no robust teacher was given: resnet_tiny, trained by pgd_at" in said
    clean, robust = run / "teachers" / "clean", run / "teachers" / "robust"
    assert json.loads((robust / "config.json").read_text())["recipe"]["name"] == "pgd_at"
    config = json.loads((run / "config.json").read_text())
    assert config["teachers"]["clean"]["recipe"]["name"] == "standard"

    # the same teachers, by their folders, give the same student
    other = tmp_path / "other"
    train(recipe, "resnet_tiny", splits, other, teachers=(clean, robust), quiet=True, tensorboard=False)
    one, two = (load_model(folder).state_dict() for folder in (run, other))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    given = json.loads((other / "config.json").read_text())
    recorded = given["sessions"][0]["teachers"]
    assert [recorded[kind]["path"] for kind in ("clean", "robust")] == [str(clean), str(robust)]
    assert recorded["clean"]["from_run"] == os.path.join("..", "run", "teachers", "clean")
    trained = json.loads((run / "config.json").read_text())["sessions"][-1]["teachers"]
    for kind in ("clean", "robust"):
        assert trained[kind]["path"] == str(run / "teachers" / kind)
        weights = weights_fingerprint(load_model(run / "teachers" / kind))
        assert trained[kind]["weights"] == recorded[kind]["weights"] == weights

    # with the student's state lost, its teachers are not trained again
    before = (clean / "last.safetensors").stat().st_mtime_ns
    for path in checkpoint.states(run):
        path.unlink()
    train(recipe, "resnet_tiny", splits, run, resume=True, tensorboard=False)
    assert f"{clean} is finished" in capsys.readouterr().out
    assert (clean / "last.safetensors").stat().st_mtime_ns == before


def test_train_prints_one_line_per_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(quick(), static_net(), SPLITS, tmp_path / "a", tensorboard=False)
    *notes, first, second, last = capsys.readouterr().out.splitlines()
    assert notes[0].startswith("note: awnet cannot build a Sequential from this run's files alone")
    assert notes[1].startswith("Sequential, ")
    assert notes[2].startswith("note: the training attack runs the model itself, frozen in place: ")
    lines = [first, second, last]
    assert lines[0].startswith("a (Sequential)  epoch 1/2  total ")
    assert all(word in lines[0] for word in ("nat ", "adv ", "clean ", "robust ", "A_w ", "images/s", "left"))
    assert lines[-1].startswith("a (Sequential): done in")
    assert len(notes) == 3
    train(quick(), static_net(), SPLITS, tmp_path / "b", tensorboard=False, quiet=True)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(logging, "SAY_EVERY_SECONDS", 0.0)  # as if each interval were a long one
    train(quick(epochs=1), static_net(), SPLITS, tmp_path / "c", tensorboard=False)
    lines = capsys.readouterr().out.splitlines()[len(notes) :]
    assert lines[0].startswith("c (Sequential)  step 2/3  total ")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"recipe": "mtard"}, TypeError, "recipe must be a Recipe"),
        ({"model": 3}, TypeError, "model must be a module or a registered name"),
        ({"model": "awnet_tiniest"}, ValueError, "unknown model"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(16, 2))}, ValueError, r"logits \[B, 3\]"),
        ({"model": nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())}, ValueError, r"logits \[B, 3\]"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"device": "gpu"}, ValueError, "device"),
        ({"max_minutes": 0}, ValueError, "max_minutes"),
        ({"checkpoint_minutes": 0}, ValueError, "checkpoint_minutes must be finite and above 0"),
        ({"keep_checkpoints": 0}, ValueError, "keep_checkpoints must be an integer of at least 1"),
        ({"select_on": "train"}, ValueError, "select_on"),
        ({"data_memory": "disk"}, ValueError, "data_memory must be one of"),
        ({"teachers": ("a", "b")}, ValueError, "'pgd_at' takes no teachers"),
        ({"recipe": quick(MTARD), "teachers": "runs/a"}, ValueError, r"2, \(clean, robust\)"),
        ({"recipe": quick(MTARD), "teachers": (static_net(),)}, ValueError, r"2, \(clean, robust\)"),
        (
            {"recipe": quick(MTARD), "teachers": (1, 2)},
            TypeError,
            "a teacher must be a module or a source, got int",
        ),
        ({"recipe": quick(MTARD), "teachers": ("/none/a", "/none/b")}, FileNotFoundError, "/none/a"),
        (
            {"splits": SPLITS._replace(validation=SPLITS.validation.take(torch.arange(0)))},
            ValueError,
            "splits.validation is empty",
        ),
        ({"resume": True, "overwrite": True}, ValueError, "exclude each other"),
    ],
)
def test_bad_arguments_fail_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"recipe": quick(), "model": static_net(), "splits": SPLITS, "quiet": True}
    with pytest.raises(error, match=message):
        train(out=tmp_path / "run", **(arguments | change))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def one_pixel_net(norm: str) -> nn.Module:
    """A network with a batch norm that sees one value per image and channel."""
    if norm == "MixBN":
        dynamic = Backbone("basic", [1, 1, 1], [4, 4, 4], num_classes=K, in_channels=1)  # 4×4, 2×2, 1×1
        return AWNet(
            dynamic, AdversarialRouter(dynamic.signal_widths, in_channels=1, widths=(4,), blocks=(1,))
        )
    pool, flat = (nn.Identity(), nn.Flatten()) if norm == "BatchNorm1d" else (nn.Flatten(), nn.Identity())
    layer = nn.BatchNorm1d(4) if norm == "BatchNorm1d" else nn.BatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(1, 4, 4), flat, layer, pool, nn.Linear(4, K))


@pytest.mark.parametrize(
    ("norm", "kind", "settings", "cure"),
    [
        ("MixBN", PGDAT, {"batch_size": 10}, "set batch_size to 11"),
        ("BatchNorm1d", Standard, {"batch_size": 10}, "set batch_size to 11"),
        ("BatchNorm2d", Standard, {"batch_size": 15}, "set batch_size to 16"),
        ("BatchNorm2d", Standard, {"batch_size": 31, "accumulate": 16}, "train on more images"),
        ("MixBN", Trades, {"batch_size": 1}, "set batch_size to 4"),
    ],
)  # fmt: skip
def test_a_micro_batch_without_a_variance_is_refused_before_the_first_step(
    tmp_path: Path, norm: str, kind: type[Recipe], settings: dict[str, Any], cure: str
) -> None:
    splits = small_splits()
    splits = splits._replace(train=splits.train.subset(31, seed=0))
    net = one_pixel_net(norm)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=f"micro-batch of one image.*{cure}$"):
        train(quick(kind, epochs=1, **settings), net, splits, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", [Standard, PGDAT])
def test_a_last_batch_of_one_image_trains_where_every_batch_norm_has_a_variance(
    tmp_path: Path, kind: type[Recipe]
) -> None:
    splits = small_splits()
    splits = splits._replace(train=splits.train.subset(31, seed=0))
    assert train(quick(kind, epochs=1, batch_size=10), dynamic_net(), splits, tmp_path / "maps").finished
    # clean and adversarial images share one batch norm, which then has two values
    net = one_pixel_net("BatchNorm2d")
    if kind is PGDAT:
        assert train(quick(kind, epochs=1, batch_size=10), net, splits, tmp_path / "joint").finished


def test_awnet_learns_digits_and_its_router_tells_attacks(tmp_path: Path) -> None:
    from awnet.evaluation import evaluate

    splits = load_dataset("digits")
    recipe = recipe_for("pgd_at", "digits", epochs=4, attack_steps=3)
    result = train(recipe, create_model("awnet_tiny", in_channels=1), splits, tmp_path, quiet=True)
    assert result.validation["clean_accuracy"] > 0.9
    report = evaluate(result.model, splits.test, ["pgd_sat"], limit=200)
    assert report.router_auc["pgd_sat"] > 0.9

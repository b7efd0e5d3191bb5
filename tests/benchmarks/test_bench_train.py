"""The benchmark of training: its plain step is ours in another form, and a wrong one gets no time."""

from __future__ import annotations

import copy
import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from awnet.benchmarks import plain as plain_module
from awnet.benchmarks import train as T
from awnet.benchmarks.clock import PartClock
from awnet.benchmarks.options import command_line
from awnet.benchmarks.plain import plain_model
from awnet.benchmarks.train import COLUMNS, TrainBenchOptions, bench_train, flops_per_image
from torch import Tensor, nn

from awnet import ops
from awnet.cli import main
from awnet.models import create_model
from awnet.nn import AdversarialRouter, AWNet, Backbone
from awnet.ops.dispatch import default_backend

SMALL = TrainBenchOptions(
    model="awnet_tiny", size=8, batch=8, attack_steps=1, steps=2, device="cpu", threads=1
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _small_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = T.measure_ceilings
    monkeypatch.setattr(
        T, "measure_ceilings", lambda device, dtype, s, tiny: whole(device, dtype, 0.01, True)
    )


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return {row["provider"]: row for row in reader}


def test_bench_train_from_the_command_line_writes_verified_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "bench train --model awnet_tiny --size 8 --batch 8 --steps 2 --attack-steps 1 --device cpu"
    assert main([*words.split(), "--threads", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-train.csv")
    rows = rows_of(path)
    assert list(rows) == ["awnet", "unfused", "literal"]
    for row in rows.values():
        assert row["verified"] == "true"
        shares = [float(row[f"share_{part}"]) for part in T.PARTS]
        assert all(0 <= share <= 1 for share in shares)
        assert sum(shares) == pytest.approx(1, abs=1e-3)  # four digits each
        assert float(row["epoch_seconds_50000"]) == pytest.approx(
            50000 / float(row["images_per_second"]), rel=1e-3
        )
        assert 0 < float(row["mfu"]) < 1.5  # a busy machine's ceiling may be low
        assert row["teachers"] == "resnet_tiny resnet_tiny"
        assert (row["precision"], row["layout"], row["peak_mib"]) == ("float32", "nchw", "")
        ours = row["provider"] == "awnet"
        assert row["backend"] == (default_backend("cpu") if ours else "")
        assert row["captured"] == ("false" if ours else "")
        assert (
            row["command"]
            == f"awnet {words.replace('--steps 2 --attack-steps 1', '--attack-steps 1 --steps 2')} --threads 1"
        )
    assert "× ours" in capsys.readouterr().out


def test_our_step_runs_on_the_given_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    real = T.find_fault
    monkeypatch.setattr(T, "find_fault", lambda *a: seen.append(ops.chosen_backend()) or real(*a))
    chosen = replace(SMALL, providers=("awnet", "unfused"), steps=1, retries=0, out=tmp_path)
    rows = rows_of(bench_train(replace(chosen, backend="eager")))
    assert rows["awnet"]["backend"] == "eager"
    assert "--backend eager" in rows["awnet"]["command"]
    assert (rows["unfused"]["backend"], seen) == ("", ["eager"])
    with ops.use_backend("eager"):  # as AWNET_BACKEND
        assert rows_of(bench_train(replace(chosen, out=tmp_path / "named")))["awnet"]["backend"] == "eager"
    with pytest.raises(ValueError, match="unknown backend 'magic'"):
        bench_train(replace(chosen, backend="magic"))
    with pytest.raises(ValueError, match="capture must be auto, true or false, got 'yes'"):
        bench_train(replace(chosen, capture="yes"))  # type: ignore[arg-type]


def test_every_provider_attacks_in_the_given_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    low: list[tuple[bool, bool]] = []  # of each call of the plain network: eval mode, in bfloat16

    def watched(recipe: Any, model: nn.Module, threat_model: Any, seed: int, *autocast: Any) -> Any:
        if autocast:  # the measured step, not its verification in float32
            model.register_forward_pre_hook(
                lambda one, _: low.append((not one.training, torch.is_autocast_enabled("cpu")))
            )
        return plain_module.plain_attack(recipe, model, threat_model, seed, *autocast)

    monkeypatch.setattr(T, "plain_attack", watched)
    chosen = replace(SMALL, providers=("awnet", "unfused"), attack_precision="bfloat16", retries=0)
    rows = rows_of(bench_train(replace(chosen, out=tmp_path)))
    assert low
    assert all(attacked == bfloat16 for attacked, bfloat16 in low)
    assert {row["precision"] for row in rows.values()} == {"float32 with a bfloat16 attack"}
    assert all("--attack-precision bfloat16" in row["command"] for row in rows.values())


def test_bench_train_has_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "train", "--help"])
    assert ended.value.code == 0
    assert "--recipe" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["mtard", "trades", "pgd_at", "standard", "hat"])
@pytest.mark.parametrize("model", ["awnet_tiny", "resnet_tiny"])
def test_the_plain_step_equals_our_step(recipe: str, model: str) -> None:
    options = replace(SMALL, recipe=recipe, model=model, attack_steps=2)
    torch.manual_seed(0)
    setting = T.make_setting(options, torch.device("cpu"))
    with torch.no_grad():  # a router that has learnt something: ω differs from 1
        if isinstance(setting.model, AWNet):
            nn.init.normal_(setting.model.router.signal_heads.weight, std=0.2)  # type: ignore[union-attr]
    for kind in ("unfused", "literal"):
        assert T.find_fault(setting, kind, 0) == ""


def test_a_wrong_step_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sloppy(*arguments: Any, **options: Any) -> Any:
        attack = plain_module.plain_attack(*arguments, **options)
        return lambda x, y, index: 0.5 * x + 0.5 * attack(x, y, index=index)

    monkeypatch.setattr(T, "plain_attack", sloppy)
    rows = rows_of(bench_train(replace(SMALL, out=tmp_path, providers=("awnet", "unfused"))))
    assert rows["awnet"]["verified"] == "true"
    assert (rows["unfused"]["verified"], rows["unfused"]["images_per_second"]) == ("false", "")
    monkeypatch.undo()

    def forgetful(*arguments: Any, **options: Any) -> Any:
        recipe, *others = arguments
        return plain_module.plain_step(replace(recipe, weight_decay=0.5), *others, **options)

    monkeypatch.setattr(T, "plain_step", forgetful)
    setting = T.make_setting(SMALL, torch.device("cpu"))
    assert "its update differs from ours" in T.find_fault(setting, "unfused", 0)


def test_a_second_run_adds_rows_and_another_table_is_refused(tmp_path: Path) -> None:
    once = replace(SMALL, recipe="standard", out=tmp_path, providers=("awnet",))
    path = bench_train(once)
    assert bench_train(replace(once, data="digits")) == path
    with open(path, encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["data"] for line in lines] == ["synthetic", "digits"]
    assert [line["share_attack"] for line in lines] == ["0.0000", "0.0000"]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        bench_train(once)


@pytest.mark.parametrize("literal", [False, True])
def test_the_plain_network_equals_ours_in_eval_mode(literal: bool) -> None:
    torch.manual_seed(0)
    basis = Backbone("basic", [1, 2], [4, 6], num_classes=3, in_channels=1)
    router = AdversarialRouter(basis.signal_widths, in_channels=1, widths=(4,), blocks=(1,))
    model = AWNet(basis, router).double()
    nn.init.normal_(router.signal_heads.weight, std=0.3)  # type: ignore[union-attr]
    for name, value in model.named_buffers():
        if "running" in name:
            value.copy_(torch.rand_like(value) + 0.5)
    other = plain_model(model, literal=literal)
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    for one in (model, other):
        one.eval()
    assert torch.allclose(model(x), other(x), rtol=0, atol=1e-12)  # float64
    assert type(model.dynamic.stem) is not type(other.dynamic.stem)


def test_the_counted_operations_equal_those_of_the_architecture() -> None:
    # GFLOP an image at 32×32: ResNet-18 forward 1.11, AW-Net forward 2.22; a PGD step is a forward pass and
    # an input gradient, training a forward pass and a whole backward one of two images
    options = replace(SMALL, model="awnet_resnet18", size=32, attack_steps=10)
    measured = flops_per_image(T.make_setting(options, torch.device("cpu"))) / 1e9
    assert measured == pytest.approx(10 * 4.44 + 2 * 3 * 2.22 + 2 * 1.11, rel=0.02)
    trades = replace(options, model="resnet18", recipe="trades", attack_steps=4)
    measured = flops_per_image(T.make_setting(trades, torch.device("cpu"))) / 1e9
    assert measured == pytest.approx(1.11 + 4 * 2.22 + 2 * 3 * 1.11, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 1}, "batch must be at least 2"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"recipe": "mtrad"}, "unknown recipe"),
        ({"recipe": "rdi"}, "recipe must be mtard, "),
        ({"model": "awnet_tinny"}, "unknown model"),
        ({"data": "digits", "batch": 5000}, "batch must be at most"),
        ({"device": "gpu"}, "device must be"),
    ],
)
def test_bench_train_names_bad_options(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_train(replace(SMALL, out=tmp_path, **change))
    assert not list(tmp_path.iterdir())


def test_the_recorded_command_repeats_the_run() -> None:
    assert command_line(TrainBenchOptions(), "train", TrainBenchOptions) == "awnet bench train"
    options = replace(SMALL, providers=("awnet", "compile"), out=Path("/tmp/x"), capture="true")
    assert command_line(options, "train", TrainBenchOptions).endswith(
        "--providers awnet compile --steps 2 --capture true --device cpu --threads 1"
    )


def test_the_clock_nests_and_starts_again() -> None:
    clock = PartClock(torch.device("cpu"))
    with clock("step"), clock("attack"):
        pass
    measured = clock.read()
    assert measured["step"][0] >= measured["attack"][0] >= 0
    clock.clear()
    assert clock.read() == {}


def test_the_literal_network_convolves_each_sample_with_separate_filters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups: list[int] = []

    def watched(input: Tensor, weight: Tensor, scale: Tensor | None, **options: Any) -> Tensor:
        groups.append(0 if scale is None else len(input))
        return original(input, weight, scale, **options)

    original = plain_module.reference.filter_scaled_conv2d
    monkeypatch.setattr(plain_module.reference, "filter_scaled_conv2d", watched)
    model = create_model("awnet_tiny", in_channels=1).eval()
    plain_model(copy.deepcopy(model))(torch.rand(3, 1, 8, 8))
    assert not groups
    plain_model(model, literal=True)(torch.rand(3, 1, 8, 8))
    assert groups.count(3) == len(model.router.signal_widths)

"""The search for launch parameters, by an invented clock."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from awnet.benchmarks import tune as tuner
from awnet.benchmarks.cases import Convolution, LayerCase
from awnet.benchmarks.tune_frozen import FrozenNetworkTimer, fastest_forms
from support.interpreter import DEVICE, INTERPRETED

from awnet.ops import launch_config, use_backend

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU `awnet bench tune` is run itself")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "SMOKE_CASES", (LayerCase("stage1", Convolution(3, 3, 2)),))
    monkeypatch.setattr(tuner, "_IMAGES", ("apply", "eval_backward"))
    monkeypatch.setattr(tuner, "_TABLES", ("eval_gradients",))


def clock(run: Callable[[], object]) -> float:
    """Fastest at a tile of 512 and 8 warps, whatever the op."""
    run()
    (config,) = run.args  # type: ignore[attr-defined]
    return 1 + abs(config["tile"] - 512) / 512 + abs(config["warps"] - 8)


def options(folder: Path, **changes: object) -> tuner.TuneOptions:
    defaults: dict = {"smoke": True, "batches": (2,), "dtypes": ("float32",), "layouts": ("nchw",)}
    return tuner.TuneOptions(device=str(DEVICE), out=folder, **(defaults | changes))


def test_the_tuner_stores_the_fastest_parameters_and_calls_use_them(
    tiny: None, tmp_path: Path, monkeypatch
) -> None:
    path = tuner.tune(options(tmp_path), clock)
    table = launch_config.read_table(path)
    assert path.name == f"{launch_config.device_slug(DEVICE)}.json"
    assert set(table) == {
        "apply/float32/nchw/b2c4p4",
        "eval_backward/float32/nchw/b2c4p4",
        "eval_gradients/b2c4p1",
    }
    assert all((entry["tile"], entry["warps"]) == (512, 8) for entry in table.values())
    monkeypatch.setattr(launch_config, "FOLDER", tmp_path)
    (tmp_path / "default.json").write_text(
        (Path(launch_config.__file__).parent / "configs/default.json").read_text()
    )
    launch_config.forget_tables()
    actual = launch_config.launch_parameters("apply", DEVICE, 2, 3, 4, torch.float32, "nchw")
    assert actual == table["apply/float32/nchw/b2c4p4"]
    other = launch_config.launch_parameters("apply", DEVICE, 2, 5, 4, torch.float32, "nchw")
    assert other["tile"] == 2048
    monkeypatch.undo()
    launch_config.forget_tables()


def test_both_forms_of_the_relu_mask_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "SMOKE_CASES", (LayerCase("stage1", Convolution(3, 3, 2)),))
    passes = importlib.import_module("awnet.kernels.passes")
    real = {name: getattr(passes, name) for name in ("apply", "reduce", "propagate")}
    masks: dict[str, list[torch.dtype | None]] = {}
    for name, place in (("apply", None), ("reduce", 3), ("propagate", 3)):

        def watched(*arguments: Any, name: str = name, place: int | None = place, **options: Any) -> Any:
            mask = options.get("relu_mask") if place is None else arguments[place]
            masks.setdefault(name, []).append(None if mask is None else mask.dtype)
            return real[name](*arguments, **options)

        monkeypatch.setattr(passes, name, watched)
    timed: list[int] = []

    def constant(run: Callable[[], object]) -> float:
        results = run()
        timed.append(len([one for one in results if one is not None]))  # type: ignore[attr-defined]
        return 1.0

    jobs = tuner.jobs(options(tmp_path), DEVICE)
    for job in (job for job in jobs if job.key.startswith(("apply", "reduce", "propagate"))):
        tuner.search(job, constant)
    assert {name: set(kinds) for name, kinds in masks.items()} == {
        "apply": {None, torch.bool},
        "reduce": {torch.float32, torch.bool},
        "propagate": {torch.float32, torch.bool},
    }
    assert set(timed) == {3, 4}


def test_a_second_run_resumes_and_keeps_existing_entries(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "_IMAGES", ())  # a table's kernel takes the least time in the interpreter
    first = tmp_path / "cpu.json"
    first.write_text(json.dumps({"device": "cpu", "launches": {}, "convolutions": {"conv/x": {"warps": 4}}}))
    calls = []

    def counted(run: Callable[[], object]) -> float:
        calls.append(1)
        return clock(run)

    tuner.tune(options(tmp_path), counted)
    assert json.loads(first.read_text())["convolutions"] == {"conv/x": {"warps": 4}}
    number = len(calls)
    tuner.tune(options(tmp_path), counted)
    assert len(calls) == number
    tuner.tune(options(tmp_path, again=True), counted)
    assert len(calls) == 2 * number


def test_the_fastest_forms_of_frozen_networks_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for ops in ("_IMAGES", "_TABLES"):
        monkeypatch.setattr(tuner, ops, ())
    timed: list[dict[str, str]] = []
    wanted = {part: forms[-1] for part, forms in launch_config.FROZEN_NETWORK.items()}

    def forms_clock(run: Callable[[], object]) -> float:
        run()
        (forms,) = run.args  # type: ignore[attr-defined]
        timed.append(forms)
        return 4.0 + sum(forms[part] != form for part, form in wanted.items())

    with use_backend("eager"):  # the interpreter takes a minute for a network
        path = tuner.tune(options(tmp_path, dtypes=("bfloat16", "float32")), forms_clock)
        assert launch_config.read_frozen_networks(path) == {"bfloat16": wanted}
        number = len(timed)
        assert number == 1 + sum(len(forms) - 1 for forms in launch_config.FROZEN_NETWORK.values())
        assert timed[0] == {part: forms[0] for part, forms in launch_config.FROZEN_NETWORK.items()}
        tuner.tune(options(tmp_path, dtypes=("bfloat16", "float32")), forms_clock)
        assert len(timed) == number
    assert "frozen network, bfloat16: " in capsys.readouterr().out


def test_a_form_that_is_wrong_or_fails_is_reported_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = FrozenNetworkTimer("awnet_tiny", 2, 8, torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(timer, "errors", lambda forms: (0.01, 0.9 if forms["norms"] == "folded" else 0.01))
    real = timer.attack

    def attack(forms: dict[str, str]) -> torch.Tensor:
        if forms["stem"] == "padded":
            raise RuntimeError("no algorithm")
        return real(forms)

    monkeypatch.setattr(timer, "attack", attack)
    reports: list[str] = []
    with use_backend("eager"):
        best, *times = fastest_forms(timer, lambda run: 1.0, reports.append)
    assert best == {"norms": "applied", "stem": "unpadded"}
    assert times == [0.25, 0.25]
    assert "norms=folded is not used: gradients have a relative error of 0.9" in reports[0]
    assert reports[1:] == ["stem=padded is not used: no algorithm"]


def test_tuning_stops_at_its_time_limit(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuner.tune(options(tmp_path, minutes=0.0), clock)
    assert "3 entries remain" in capsys.readouterr().out


def test_a_wrong_result_is_never_timed() -> None:
    wrong = tuner.Job("bad", {"tile": 512, "warps": 4}, lambda config: torch.tensor([float(config["tile"])]))
    with pytest.raises(RuntimeError, match=r"bad with .* does not equal the result of the default launch"):
        tuner.search(wrong, lambda run: 1.0)


def test_parameters_that_exceed_the_devices_resources_are_skipped() -> None:
    from triton.runtime.errors import OutOfResources

    def run(config: dict[str, int]) -> torch.Tensor:
        if config["warps"] > 4:
            raise OutOfResources(1, 2, "registers")
        return torch.ones(1)

    best, took, before = tuner.search(tuner.Job("big", {"warps": 2}, run), lambda r: 9 - r.args[0]["warps"])
    assert best == {"warps": 4}
    assert (took, before) == (5, 7)


def test_tuning_without_a_gpu_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="device must be a CUDA device, since tuning times Triton kernels, got 'cpu'"
    ):
        tuner.tune(tuner.TuneOptions(device="cpu", out=tmp_path))

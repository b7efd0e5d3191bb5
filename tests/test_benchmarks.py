"""The benchmark runs end to end, and gives no time to what is wrong. Nothing here asserts a time."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from awnet.benchmarks import BenchOptions, run
from awnet.benchmarks.cases import CASES, Case, Inputs, make_inputs, make_upstream, step, truth
from awnet.benchmarks.providers import Provider, providers, static, unfused
from awnet.benchmarks.runner import COLUMNS, command_line
from torch import Tensor

from awnet.ops import available_backends

CPU = torch.device("cpu")


def options(folder: Path, **changes: object) -> BenchOptions:
    short = BenchOptions(quick=True, device="cpu", cases=("quick2",), seconds=0.001, threads=1, out=folder)
    return replace(short, **changes)  # type: ignore[arg-type]


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def inputs_of(case: Case, dtype: torch.dtype = torch.float32, is_static: bool = False) -> Inputs:
    return make_inputs(case, 8, static=is_static, device=CPU, dtype=dtype, channels_last=False, seed=3)


def test_a_quick_run_writes_a_verified_row_for_every_provider_and_mode(tmp_path: Path) -> None:
    path = run(options(tmp_path))
    rows = rows_of(path)
    backends = {name for name, reason in available_backends().items() if reason is None} - {"reference"}
    assert {row["provider"] for row in rows} == {"literal", "unfused", "static"} | backends
    assert {row["mode"] for row in rows} == {"forward", "attack", "training"}
    for row in rows:
        assert row["verified"] == "true"
        assert 0 < float(row["ms_p20"]) <= float(row["ms_median"]) <= float(row["ms_p80"])
        assert (row["case"], row["batch"], row["channels"], row["size"]) == ("quick2", "8", "32", "4")
        assert row["torch"] == torch.__version__
        assert row["device"]
        assert row["driver"] == row["peak_mib"] == row["roofline_share"] == ""
        assert row["command"].startswith("awnet bench run --quick --device cpu --batch 8 --cases quick2")
        assert "--threads 1" in row["command"]
        assert str(tmp_path) not in ",".join(row.values())


def test_a_second_run_adds_rows(tmp_path: Path) -> None:
    once = options(tmp_path, providers=("static",), modes=("forward",))
    first = run(once)
    assert run(replace(once, peak_tflop_s=1.0, peak_gb_s=10.0)) == first
    rows = rows_of(first)
    assert len(rows) == 2
    assert float(rows[1]["roofline_share"]) > 0


def wrong_everywhere(inputs: Inputs, training: bool) -> Tensor:
    return unfused(inputs, training) * 1.001


def wrong_in_one_sample(inputs: Inputs, training: bool) -> Tensor:
    output = unfused(inputs, training)
    return torch.cat([output[:-1], output[-1:] * math.nan])


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> Tensor:
        return upstream * 1.01


def wrong_gradient(inputs: Inputs, training: bool) -> Tensor:
    result: Tensor = _WrongGradient.apply(unfused(inputs, training))
    return result


def forgets_running_statistics(inputs: Inputs, training: bool) -> Tensor:
    copies = replace(inputs, running_mean=inputs.running_mean.clone(), running_var=inputs.running_var.clone())
    return unfused(copies, training)


def wrong_shape(inputs: Inputs, training: bool) -> Tensor:
    return unfused(inputs, training)[:1]


def fails(inputs: Inputs, training: bool) -> Tensor:
    raise NotImplementedError("cannot do this")


@pytest.mark.parametrize(
    ("layer", "refused_in"),
    [
        (wrong_everywhere, {"forward", "attack", "training"}),
        (wrong_in_one_sample, {"forward", "attack", "training"}),
        (wrong_gradient, {"attack", "training"}),
        (forgets_running_statistics, {"training"}),
        (wrong_shape, {"forward", "attack", "training"}),
        (fails, {"forward", "attack", "training"}),
    ],
)
def test_a_wrong_provider_gets_no_time(
    layer: object, refused_in: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = {"mine": Provider(layer)}  # type: ignore[arg-type]
    rows = rows_of(run(options(tmp_path, providers=("mine", "unfused")), extra_providers=mine))
    for row in rows:
        refused = row["provider"] == "mine" and row["mode"] in refused_in
        assert row["verified"] == ("false" if refused else "true")
        for column in ("ms_median", "ms_p20", "ms_p80", "gb_s", "tflop_s"):
            assert (row[column] == "") == refused
    assert capsys.readouterr().out.count("no time for") == len(refused_in)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_verified_against_what_plain_torch_loses(dtype: str, tmp_path: Path) -> None:
    mine = {"mine": Provider(lambda inputs, training: unfused(inputs, training) * 1.5)}
    chosen = options(tmp_path, dtype=dtype, layout="channels_last", providers=("unfused", "eager", "mine"))
    for row in rows_of(run(chosen, extra_providers=mine)):
        assert row["verified"] == ("false" if row["provider"] == "mine" else "true"), row


@pytest.mark.parametrize("mode", ["forward", "attack", "training"])
def test_plain_torch_equals_the_literal_form_in_float64(mode: str) -> None:
    case = Case("odd", 6, 5)
    for layer, is_static in ((unfused, False), (static, True)):
        inputs = inputs_of(case, is_static=is_static)
        upstream = make_upstream(inputs, mode, 0)  # type: ignore[arg-type]
        want = truth(inputs, mode, upstream)  # type: ignore[arg-type]
        got = step(layer, inputs.to(torch.float64), mode, upstream.double())  # type: ignore[arg-type]
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10, msg=name)


def test_the_attack_differentiates_the_routers_signals_but_no_parameter() -> None:
    inputs = inputs_of(Case("odd", 6, 5))
    results = step(unfused, inputs, "attack", make_upstream(inputs, "attack", 0))
    assert set(results) == {"output", "gradient of input", "gradient of filter_scale", "gradient of p_clean"}
    assert not inputs.weight.requires_grad


def test_the_work_counted_is_that_of_the_convolutions() -> None:
    stage1 = CASES[0]
    assert stage1.flops("forward", 1) == 2 * 64 * 64 * 9 * 32 * 32
    assert stage1.flops("training", 2) == 6 * stage1.flops("forward", 1)
    assert stage1.bytes("forward", 1, 4) == 4 * (2 * 64 * 32 * 32 + 64 * 64 * 9)


def test_the_command_names_what_is_not_the_default_and_no_path() -> None:
    assert command_line(BenchOptions(out=Path("/somewhere/else"))) == "awnet bench run"
    chosen = BenchOptions(quick=True, providers=("literal", "eager"), threads=2, peak_gb_s=40.0)
    assert (
        command_line(chosen)
        == "awnet bench run --quick --providers literal eager --threads 2 --peak-gb-s 40.0"
    )


def test_a_subclass_of_the_options_gives_the_same_command(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Command(BenchOptions):
        what: str

    command = Command(**vars(options(tmp_path, providers=("static",), modes=("forward",))), what="run")
    (row,) = rows_of(run(command))
    assert "what" not in row["command"]
    assert row["command"].endswith("--modes forward --providers static --threads 1 --seconds 0.001")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cases": ("stage9",)}, "cases names stage9; there are quick1, quick2"),
        ({"providers": ("magic",)}, "providers names magic; there are literal, unfused, static"),
        ({"modes": ("backward",)}, "modes must be some of forward, attack, training"),
        ({"modes": ()}, "modes must be some of"),
        ({"device": "abacus"}, "device must be cpu, cuda or cuda:N, got 'abacus'"),
        ({"device": "meta"}, "device must be cpu, cuda or cuda:N, got 'meta'"),
        ({"device": "cuda:99"}, "device cuda:99 is not here"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"layout": "nhwc"}, "layout must be nchw or channels_last"),
        ({"batch": 2}, "batch must be at least 8, got 2"),
        ({"batch": 0}, "batch must be at least 8, got 0"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"seconds": 0.0}, "seconds must be positive"),
    ],
)
def test_bad_options(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        run(options(tmp_path, **change))
    assert not list(tmp_path.iterdir())


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    chosen = options(tmp_path, providers=("static",), modes=("forward",))
    path = run(chosen)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns"):
        run(chosen)
    assert path.read_text() == "a,b\n1,2\n"


def test_threads_and_tf32_are_put_back(tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    run(options(tmp_path, threads=1, providers=("static",), modes=("forward",)))
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == before


def test_every_backend_that_is_here_is_a_provider() -> None:
    here = {name for name, reason in available_backends().items() if reason is None}
    assert here - {"reference"} <= providers().keys()

"""The benchmark runs end to end, and gives no time to what is wrong. Nothing here asserts a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from awnet.benchmarks import BenchOptions, results, run, runner, timing, verification
from awnet.benchmarks.cases import CASES, SMOKE_CASES, Case, LayerCase, Mode, make_upstream
from awnet.benchmarks.ceilings import measure_ceilings
from awnet.benchmarks.options import command_line
from awnet.benchmarks.providers import COMPILED, Provider, providers, unfused
from awnet.benchmarks.verification import Trial
from torch import Tensor

from awnet import reference
from awnet.ops import available_backends
from awnet.ops.backends import native

CPU = torch.device("cpu")
SMOKE = {case.name: case for case in SMOKE_CASES}
HERE = {name for name, reason in available_backends().items() if reason is None} - {"reference"}


def options(folder: Path, **changes: object) -> BenchOptions:
    short = BenchOptions(smoke=True, device="cpu", cases=("stage4",), seconds=0.001, threads=1, out=folder)
    return replace(short, **changes)  # type: ignore[arg-type]


def rows_of(path: Path) -> list[dict[str, str]]:
    """Without the ceilings."""
    return [row for row in results.read_rows(path) if row["mode"] != "ceiling"]


def results_of(case: Case, provider: Provider, mode: Mode) -> dict[str, Tensor]:
    """One step in float64 on fixed tensors."""
    problem = case.problem(8, provider.static, CPU, torch.float32, False, 3)
    upstream = make_upstream(case, problem, mode, unfused, 0).double()
    return Trial(case, problem.to(torch.float64), provider, mode, upstream, 1)()


def test_a_run_writes_a_verified_row_for_every_provider_and_mode(tmp_path: Path) -> None:
    path = run(options(tmp_path))
    assert path.name.endswith("-smoke.csv")
    rows = rows_of(path)
    assert {row["provider"] for row in rows} == {"literal", "unfused", "static"} | HERE
    assert {row["mode"] for row in rows} == {"forward", "attack", "training"}
    for row in rows:
        assert row["verified"] == "true"
        assert 0 < float(row["ms_p20"]) <= float(row["ms_median"]) <= float(row["ms_p80"])
        assert (row["case"], row["batch"], row["channels"], row["size"]) == ("stage4", "8", "32", "4")
        assert row["torch"] == torch.__version__
        assert row["device"]
        assert row["driver"] == row["peak_mib"] == ""
        assert float(row["roofline_share"]) > 0
        assert row["command"].startswith("awnet bench run --smoke --device cpu --cases stage4")
        assert "--threads 1" in row["command"]
        assert str(tmp_path) not in ",".join(row.values())


def test_the_whole_registry_runs_and_is_verified_at_its_smoke_sizes(tmp_path: Path) -> None:
    rows = rows_of(
        run(options(tmp_path, cases=(), providers=("literal", "unfused", "static", *sorted(HERE))))
    )
    assert {row["case"] for row in rows} == {case.name for case in CASES}
    assert [row for row in rows if row["verified"] != "true"] == []
    assert len(rows) == len(CASES) * 3 * (3 + len(HERE))


def test_both_registries_have_the_same_cases_and_the_four_stages_are_resnet_18s() -> None:
    assert [case.name for case in CASES] == [case.name for case in SMOKE_CASES]
    stages = [case.convolution for case in CASES[:4] if isinstance(case, LayerCase)]
    assert [(c.c_in, c.c_out, c.size) for c in stages] == [
        (64, 64, 32),
        (128, 128, 16),
        (256, 256, 8),
        (512, 512, 4),
    ]


def test_the_ceilings_of_the_run_are_rows_of_it_and_give_the_share_of_the_roofline(tmp_path: Path) -> None:
    rows = results.read_rows(run(options(tmp_path, providers=("static",), modes=("forward",))))
    copy, matmul, row = rows
    assert (copy["case"], matmul["case"], row["case"]) == ("copy", "matmul", "stage4")
    assert copy["verified"] == matmul["verified"] == "true"
    gb_s, tflop_s = float(copy["gb_s"]), float(matmul["tflop_s"])
    case = SMOKE["stage4"]
    least = max(case.flops("forward", 8) / (tflop_s * 1e9), case.bytes("forward", 8, 4) / (gb_s * 1e6))
    # what the file keeps of a time and a rate: four and three decimals
    assert float(row["roofline_share"]) == pytest.approx(least / float(row["ms_median"]), rel=0.05)


def test_a_wrong_ceiling_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure_ceilings(CPU, torch.float32, 0.001, tiny=True).verified
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: real(a, b, out=out).mul_(1.001))  # as TF32 would be
    assert not measure_ceilings(CPU, torch.float32, 0.001, tiny=True).verified


def test_a_second_run_adds_rows_and_with_missing_only_those_that_are_missing(tmp_path: Path) -> None:
    once = options(tmp_path, providers=("static",), modes=("forward",))
    first = run(once)
    assert run(once) == first
    assert len(rows_of(first)) == 2
    run(replace(once, missing=True))
    assert len(results.read_rows(first)) == 6  # not even ceilings
    run(replace(once, missing=True, providers=("static", "unfused")))
    assert [row["provider"] for row in rows_of(first)] == ["static", "static", "unfused"]
    run(replace(once, missing=True, dtype="bfloat16"))
    run(replace(once, missing=True, batch=(9,)))
    assert len(rows_of(first)) == 5


def test_readers_take_the_newest_row_of_a_key_and_no_smoke_rows(tmp_path: Path) -> None:
    path = run(options(tmp_path, providers=("static",), modes=("forward",)))
    (row,) = rows_of(path)
    rows = [
        row | {"ms_median": str(i), "date": date}
        for i, date in enumerate(("2026-02-01", "2026-02-02", "2026-01-01", "2026-02-02"))
    ]
    rows.append(row | {"date": "2025-01-01", "command": "awnet bench run --threads 2"})
    results.add_rows(tmp_path / "abacus.csv", rows)
    assert [(r["ms_median"], results.threads(r)) for r in results.read_results(tmp_path)] == [
        (row["ms_median"], 2),
        ("3", 1),
    ]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        results.read_results(tmp_path / "nowhere")


def wrong_everywhere(*arguments: Any, **options: Any) -> Tensor:
    return unfused(*arguments, **options) * 1.001


def wrong_in_one_sample(*arguments: Any, **options: Any) -> Tensor:
    output = unfused(*arguments, **options)
    return torch.cat([output[:-1], output[-1:] * math.nan])


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> Tensor:
        return upstream * 1.01


def wrong_gradient(*arguments: Any, **options: Any) -> Tensor:
    result: Tensor = _WrongGradient.apply(unfused(*arguments, **options))
    return result


def forgets_running_statistics(
    *arguments: Any, running_mean: Tensor, running_var: Tensor, **options: Any
) -> Tensor:
    return unfused(*arguments, running_mean=running_mean.clone(), running_var=running_var.clone(), **options)


def wrong_shape(*arguments: Any, **options: Any) -> Tensor:
    return unfused(*arguments, **options)[:1]


def fails(*arguments: Any, **options: Any) -> Tensor:
    raise NotImplementedError("cannot do this")


def test_the_providers_of_a_device_are_those_that_run_there() -> None:
    # no backend of ours for one device runs on another: cpp is not one of a GPU's, and triton none of a CPU's
    assert available_backends("meta")["cpp"] is not None
    assert "cpp" not in providers("meta")
    assert {"literal", "unfused", "eager"} <= set(providers("meta"))
    if not torch.cuda.is_available():
        assert set(available_backends("cuda").values()) == {"there is no CUDA device"}
    assert {"cuda", "triton"}.isdisjoint(providers("cpu"))
    assert ("cpp" in providers("cpu")) is (native.load() is None)


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
def test_a_wrong_provider_is_not_timed(
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
    mine = {"mine": Provider(lambda *a, **k: unfused(*a, **k) * 1.5)}
    chosen = options(tmp_path, dtype=dtype, layout="channels_last", providers=("unfused", "eager", "mine"))
    for row in rows_of(run(chosen, extra_providers=mine)):
        assert row["verified"] == ("false" if row["provider"] == "mine" else "true"), row


@pytest.mark.parametrize("case", ["stage4", "block", "network"])
def test_a_wrong_layer_is_found_in_every_case(case: str, tmp_path: Path) -> None:
    def forgets_the_scale(
        image: Tensor, weight: Tensor, scale: Tensor | None, *tables: Tensor, **options: Any
    ) -> Tensor:
        return unfused(image, weight, scale if scale is None else scale * 1.05, *tables, **options)

    mine = {"mine": Provider(forgets_the_scale)}
    for row in rows_of(run(options(tmp_path, cases=(case,), providers=("mine",)), extra_providers=mine)):
        assert row["verified"] == "false"


@pytest.mark.parametrize("mode", ["forward", "attack", "training"])
@pytest.mark.parametrize("case", SMOKE.values(), ids=SMOKE.keys())
def test_plain_torch_equals_the_literal_form_in_float64(case: Case, mode: Mode) -> None:
    known = providers()
    want = results_of(case, known["literal"], mode)
    got = results_of(case, known["unfused"], mode)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", ["stage4", "stem", "shortcut", "depthwise"])
def test_the_static_twin_equals_convolution_batch_norm_and_relu(case: str) -> None:
    layer = SMOKE[case]
    assert isinstance(layer, LayerCase)
    got = results_of(layer, providers()["static"], "training")["output"]
    problem = layer.problem(8, True, CPU, torch.float32, False, 3).to(torch.float64)
    c = layer.convolution
    plain = torch.nn.Conv2d(c.c_in, c.c_out, c.kernel, c.stride, c.padding, groups=c.groups, bias=False)
    norm = torch.nn.BatchNorm2d(c.c_out).double()
    plain.weight.data, norm.weight.data, norm.bias.data = (
        problem.parameters["weight"], problem.parameters["bn_weight"][0], problem.parameters["bn_bias"][0]
    )  # fmt: skip
    want = norm(plain(problem.image))
    torch.testing.assert_close(got, want.relu() if layer.relu else want, rtol=1e-9, atol=1e-10)


def test_the_attack_differentiates_the_routers_signals_but_no_parameter() -> None:
    assert set(results_of(SMOKE["stage4"], Provider(unfused), "attack")) == {
        "output", "gradient of image", "gradient of filter_scale 0", "gradient of p_clean"
    }  # fmt: skip
    assert set(results_of(SMOKE["network"], Provider(unfused), "attack")) == {"output", "gradient of image"}
    trained = results_of(SMOKE["network"], Provider(unfused), "training")
    assert "gradient of image" not in trained
    assert "gradient of network.router.signal_heads.weight" in trained


def test_an_attack_freezes_parameters_except_for_the_provider_that_measures_the_effect() -> None:
    problem = SMOKE["stage4"].problem(8, False, CPU, torch.float32, False, 0)
    for frozen in (True, False):
        trial = Trial(SMOKE["stage4"], problem, Provider(unfused, frozen=frozen), "attack", problem.image, 1)
        assert trial.problem.parameters["weight"].requires_grad != frozen
    assert not COMPILED["compile"].frozen
    assert COMPILED["compile_frozen"].frozen


def test_the_work_counted_is_that_of_the_convolutions() -> None:
    cases = {case.name: case for case in CASES}
    stage1 = cases["stage1"]
    assert stage1.flops("forward", 1) == 2 * 64 * 64 * 9 * 32 * 32
    assert stage1.flops("training", 2) == 6 * stage1.flops("forward", 1)
    assert stage1.bytes("forward", 1, 4) == 4 * (2 * 64 * 32 * 32 + 64 * 64 * 9)
    assert cases["depthwise"].flops("forward", 1) == 2 * 128 * 9 * 16 * 16
    assert cases["shortcut"].flops("forward", 1) == 2 * 64 * 128 * 16 * 16
    assert cases["block"].flops("forward", 1) == 2 * stage1.flops("forward", 1)
    # the design's counts: 1.11 GFLOP for a ResNet-18, twice that for the AW-Net
    assert cases["network"].flops("forward", 1, static=True) == pytest.approx(1.11e9, rel=0.01)
    assert cases["network"].flops("forward", 1) == pytest.approx(2.22e9, rel=0.01)


def test_every_operator_of_a_network_runs_on_the_provider() -> None:
    called: list[bool] = []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        called.append(options["training"])
        return unfused(*arguments, **options)

    results_of(SMOKE["network"], Provider(counted), "training")
    assert called == [True] * len(SMOKE["network"].convolutions())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_literal_forms_weight_gradient_where_a_folded_image_is_folded_again(dtype: torch.dtype) -> None:
    # torch's convolution in these dtypes is wrong for the strides that this image has
    generator = torch.Generator().manual_seed(0)
    shape = (1, 64, 6, 6)
    image = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    odd = image.reshape(8, 8, 6, 6)
    weight = torch.randn(4, 8, 3, 3, generator=generator).to(dtype)
    scale = torch.rand(8, 4, generator=generator).to(dtype) + 0.5
    upstream = torch.randn(8, 4, 6, 6, generator=generator).to(dtype)
    gradients = []
    for x in (odd, odd.contiguous()):
        w = weight.clone().requires_grad_()
        output = reference.filter_scaled_conv2d(x, w, scale, padding=1)
        gradients.append(torch.autograd.grad(output, w, upstream)[0])
    assert odd.stride() != odd.contiguous().stride()
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_the_command_names_what_is_not_the_default_and_no_path() -> None:
    assert command_line(BenchOptions(out=Path("/somewhere/else"), missing=True)) == "awnet bench run"
    chosen = BenchOptions(smoke=True, providers=("literal", "eager"), threads=2, batch=(8, 16))
    assert (
        command_line(chosen) == "awnet bench run --smoke --batch 8 16 --providers literal eager --threads 2"
    )


def test_compiled_providers_run_only_on_request() -> None:
    def names(**changes: object) -> set[str]:
        return {n for job in runner.make_jobs(options(Path(), **changes), CPU, {}) for n in job.providers}

    assert not names() & COMPILED.keys()
    assert names(compile=True) >= COMPILED.keys()
    assert names(providers=("static_compile",)) == {"static_compile"}
    assert names(providers=("static", "compile_frozen"), modes=("forward",)) == {"static"}


def test_a_smoke_run_compiles_one_row_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(**changes: object) -> list[tuple[str, str]]:
        jobs = runner.make_jobs(options(Path(), **changes), CPU, {})
        return [(job.case.name, job.mode) for job in jobs if "compile" in job.providers]

    monkeypatch.setattr(runner, "has_compiler", lambda device: True)
    assert compiled(cases=()) == [("stage1", "forward")]
    assert compiled(cases=("stage1",)) == compiled(cases=(), smoke=False) == []
    monkeypatch.setattr(runner, "has_compiler", lambda device: False)
    assert compiled(cases=()) == []


class FakeGraphs(timing.CudaGraphs):
    """CUDA graphs of a machine without a GPU: host time is 10 ms a call, device time 1 ms a step."""

    def __init__(self, forbidden: tuple[object, ...] = ()) -> None:
        self.forbidden, self.calls, self.captured = forbidden, 0, 0

    def eager(self, step: Any, seconds: float) -> timing.Times:
        step()
        return replace(timing.summary([10.0, 11.0, 12.0]), peak_mib=3.0)

    def capture(self, program: Any) -> Any:
        if self.captured in self.forbidden:
            self.captured += 1
            raise RuntimeError("operation not permitted when stream is capturing\nmore words")
        self.captured += 1
        program()
        return program

    def milliseconds(self, replay: Any, count: int) -> list[float]:
        self.calls += count
        return [1.0 * timing.STEPS_PER_GRAPH] * count


def test_a_step_on_a_gpu_is_timed_in_a_graph_of_ten_and_by_single_calls() -> None:
    calls: list[int] = []
    gpu = FakeGraphs()
    (times,) = timing.measure_replays({"step": lambda: calls.append(1)}, seconds=0.5, gpu=gpu).values()
    assert len(calls) == 1 + timing.STEPS_PER_GRAPH
    assert times.replay is not None
    assert (times.replay.median, times.replay.peak_mib, times.eager.median) == (1.0, 3.0, 11.0)
    assert gpu.calls == 2 + 50  # half a second of graphs that take 10 ms
    gpu = FakeGraphs()
    timing.measure_replays({"step": lambda: None}, seconds=1e-6, gpu=gpu)
    assert gpu.calls == 2 + 5


def test_a_step_that_cannot_be_captured_has_its_reason_and_the_next_is_timed() -> None:
    gpu = FakeGraphs(forbidden=(0,))
    times = timing.measure_replays({"waits": lambda: None, "runs": lambda: None}, 0.1, gpu=gpu)
    assert times["waits"].replay is None
    assert times["waits"].refusal == "not captured: operation not permitted when stream is capturing"
    assert times["waits"].eager.median == 11.0
    assert times["runs"].replay is not None
    assert times["runs"].refusal == ""


def test_rows_of_a_gpu_have_both_times_and_the_reason_where_there_is_no_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = FakeGraphs(forbidden=(1,))
    monkeypatch.setattr(timing, "on_graphs", lambda device: True)
    monkeypatch.setattr(timing, "CudaGraphs", lambda: gpu)
    first, second, third = rows_of(
        run(
            options(tmp_path, providers=("unfused", "literal", "mine"), modes=("forward",)),
            extra_providers={"mine": Provider(wrong_everywhere)},
        )
    )
    assert (first["timing"], first["ms_median"], first["ms_eager"]) == ("graph", "1.0000", "11.0000")
    assert (first["reason"], first["verified"], first["peak_mib"]) == ("", "true", "3.00")
    assert float(first["roofline_share"]) > 0
    assert (second["timing"], second["ms_median"], second["ms_eager"]) == ("graph", "", "11.0000")
    assert (second["verified"], second["roofline_share"]) == ("true", "")
    assert second["reason"] == "not captured: operation not permitted when stream is capturing"
    assert (third["verified"], third["ms_median"], third["ms_eager"]) == ("false", "", "")
    assert third["reason"].startswith("output is off by")
    out = capsys.readouterr().out
    assert "replay" in out
    assert "no time for literal: not captured" in out


def test_compiled_providers_leave_the_capture_to_the_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def compiler(what: object, mode: str | None, dynamic: bool) -> object:
        seen.append(mode)
        return what

    monkeypatch.setattr(torch, "compile", compiler)
    for device in ("cuda", "cpu"):
        verification.compiler(torch.device(device))(unfused)
    assert seen == ["max-autotune-no-cudagraphs", None]


@pytest.mark.parametrize(("layer", "refused"), [(unfused, False), (wrong_in_one_sample, True)])
def test_a_large_batch_may_be_verified_in_float32_and_a_small_one_in_float64(
    layer: Any, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, torch.dtype]] = []
    real = runner.Trial.__call__

    def watched(self: Trial) -> dict[str, Tensor]:
        seen.append((len(self.problem.image), self.problem.image.dtype))
        return real(self)

    monkeypatch.setattr(runner.Trial, "__call__", watched)
    chosen = options(tmp_path, providers=("mine",), modes=("attack",), batch=(16,), verify_batch=8)
    (row,) = rows_of(run(chosen, extra_providers={"mine": Provider(layer)}))
    assert (row["batch"], row["verified"]) == ("16", "false" if refused else "true")
    assert seen[:2] == [(8, torch.float64), (16, torch.float32)]
    assert (16, torch.float64) not in seen
    assert "--verify-batch 8" in row["command"]


@pytest.mark.gpu
def test_the_registry_runs_and_is_verified_on_a_gpu(tmp_path: Path) -> None:
    for dtype, layout in (("float32", "nchw"), ("bfloat16", "channels_last")):
        path = run(options(tmp_path, device="cuda", cases=(), dtype=dtype, layout=layout, batch=(1, 8)))
        rows = rows_of(path)
        assert {"cuda", "triton"} <= {row["provider"] for row in rows}
        assert [row for row in rows if row["verified"] != "true"] == []
        assert all(row["driver"] and float(row["ms_eager"]) > 0 for row in rows)
        waiting = {(row["provider"], row["mode"]) for row in rows if row["reason"]}
        assert waiting <= {("literal", "training")}
        assert all(float(row["peak_mib"]) > 0 for row in rows if not row["reason"])


@pytest.mark.slow
def test_the_compiled_providers_are_verified_too(tmp_path: Path) -> None:
    if not runner.has_compiler(CPU):
        pytest.skip("torch.compile needs a C++ compiler")
    rows = rows_of(
        run(options(tmp_path, providers=tuple(COMPILED), cases=("stage4", "block"), modes=("attack",)))
    )
    assert {row["provider"] for row in rows} == COMPILED.keys()
    assert [row for row in rows if row["verified"] != "true"] == []


def test_default_batches_depend_on_device_and_case() -> None:
    def batches(device: str, **changes: object) -> dict[str, set[int]]:
        jobs = runner.make_jobs(replace(BenchOptions(), **changes), torch.device(device), {})  # type: ignore[arg-type]
        return {case.name: {job.batch for job in jobs if job.case is case} for case in CASES}

    assert batches("cpu")["stage1"] == {32}
    assert batches("cpu")["network"] == {8}
    assert batches("cuda")["network"] == {1, 32, 128, 256, 512, 1024}
    assert batches("cuda", modes=("training",))["stem"] == {32, 128, 256, 512, 1024}
    assert batches("cpu", batch=(1, 5))["block"] == {1, 5}


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
        ({"cases": ("stage9",)}, "cases names stage9; available: stage1, stage2"),
        ({"providers": ("magic",)}, "providers names magic; available: literal, unfused, static"),
        ({"modes": ("backward",)}, "modes must be some of forward, attack, training"),
        ({"modes": ()}, "modes must be some of"),
        ({"device": "abacus"}, "device must be cpu, cuda, cuda:1 or the like, got 'abacus'"),
        ({"device": "meta"}, "device must be cpu, cuda, cuda:1 or the like, got 'meta'"),
        ({"device": "cuda:99"}, "device 'cuda:99' was given, but"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"layout": "nhwc"}, "layout must be nchw or channels_last"),
        ({"batch": (0,)}, "batch must be at least 1, got 0"),
        ({"batch": (4,), "modes": ("training",)}, "training needs a batch of 8 or more"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"verify_batch": 0}, "verify_batch must be at least 1"),
        ({"verify_batch": 4}, "verify_batch must be at least 8 for training, got 4"),
        ({"seconds": 0.0}, "seconds must be positive"),
    ],
)
def test_bench_run_refuses_bad_options(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        run(options(tmp_path, **change))
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_is_not_overwritten(tmp_path: Path) -> None:
    chosen = options(tmp_path, providers=("static",), modes=("forward",))
    path = run(chosen)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns"):
        run(chosen)
    assert path.read_text() == "a,b\n1,2\n"


def test_threads_and_tf32_are_restored_after_a_run(tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    run(options(tmp_path, threads=1, providers=("static",), modes=("forward",)))
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == before


def test_every_available_backend_is_a_provider() -> None:
    assert providers().keys() >= HERE

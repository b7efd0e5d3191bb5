"""What is read from measurements: goals, tables, figures. The rows here are made up, and no file is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from awnet.benchmarks import goals, report, results
from awnet.benchmarks.cases import CASES, MODES, STAGES

from awnet.cli import main

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "benchmarks" / "results"


def row(case: str, mode: str, provider: str, batch: int, ms: float, **changes: str) -> results.Row:
    return dict.fromkeys(results.COLUMNS, "") | {
        "date": "2026-03-01", "commit": "abc1234", "device": "Abacus 9", "torch": "2.13.0", "case": case,
        "mode": mode, "provider": provider, "batch": str(batch), "channels": "64", "size": "32",
        "dtype": "float32", "layout": "nchw", "ms_median": str(ms), "ms_p20": str(ms), "ms_p80": str(ms),
        "gb_s": "10", "tflop_s": "0.5", "roofline_share": "0.5", "verified": "true",
        "command": "awnet bench run --device cpu --threads 2",
    } | changes  # fmt: skip


CPU_MS = {"literal": 50.0, "unfused": 12.0, "static": 9.5, "eager": 11.0, "cpp": 10.0}
GPU_MS = {
    "literal": 21.0,
    "unfused": 2.2,
    "compile": 1.1,
    "compile_frozen": 1.1,
    "static_compile": 0.97,
    "triton": 1.0,
}


def cpu_rows() -> Iterator[results.Row]:
    for case in CASES:
        for mode in MODES:
            for provider, ms in CPU_MS.items():
                yield row(case.name, mode, provider, 8 if case.name == "network" else 32, ms)


def gpu_rows() -> Iterator[results.Row]:
    h200 = {"device": "NVIDIA H200", "driver": "580.1", "dtype": "bfloat16", "layout": "channels_last"}
    h200 |= {"timing": "graph"}
    for case in (*STAGES, "depthwise"):
        for batch in (256, 512):
            for mode in MODES:
                for provider, ms in GPU_MS.items():
                    peak = {"peak_mib": "55" if provider == "triton" else "100"}
                    share = {"roofline_share": "0.8"} if case == "depthwise" else {}
                    yield row(case, mode, provider, batch, ms, **h200, **peak, **share)
    yield row("network", "attack", "triton", 512, 12.5 * 512 / 1000, **h200)


# one of these makes a row of training say nothing of the goal
OTHER_TRAINING = {
    "recipe": "trades", "provider": "unfused", "size": "8", "attack_steps": "2", "verified": "false",
    "device": "NVIDIA A100", "model": "awnet_tiny",
}  # fmt: skip


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    results.add_rows(tmp_path / "abacus-9.csv", list(cpu_rows()))
    results.add_rows(tmp_path / "nvidia-h200.csv", list(gpu_rows()))
    usual = {
        "date": "2026-03-02", "commit": "abc1234", "device": "NVIDIA H200", "recipe": "mtard",
        "model": "awnet_resnet18", "provider": "awnet", "batch": "128", "size": "32", "attack_steps": "10",
        "images_per_second": "4000", "epoch_seconds_50000": "13.0", "share_attack": "0.5", "verified": "true",
    }  # fmt: skip
    usual = dict.fromkeys(results.TRAIN_COLUMNS, "") | usual
    gpu = [
        usual | {"driver": "580.1"} | changes
        for changes in (
            {},
            {"date": "2026-03-01", "epoch_seconds_50000": "14.0"},
            *({"epoch_seconds_50000": "3.0", name: value} for name, value in OTHER_TRAINING.items()),
        )
    ]
    results.add_rows(tmp_path / "nvidia-h200-train.csv", gpu, results.TRAIN_COLUMNS)
    cpu = usual | {
        "device": "Abacus 9", "batch": "16", "threads": "2", "precision": "float32", "layout": "nchw",
    }  # fmt: skip
    low = cpu | {"precision": "bfloat16", "layout": "channels_last"}
    rows: list[results.Row] = []
    for model in ("awnet_tiny", "awnet_resnet18"):
        for paces in ((20, 8, 16), (20, 5, 10)):  # of two runs, the second counts
            rows += [
                cpu | {"model": model, "provider": provider, "images_per_second": str(pace)}
                for provider, pace in zip(("awnet", "literal", "unfused"), paces, strict=True)
            ]
        rows += [
            cpu | {"model": model, "images_per_second": "90"} | change
            for change in ({"threads": "1"}, {"attack_steps": "2"}, {"provider": "awnet", "batch": "8"})
        ]
    for model, batch, pace in LOW_PRECISION:
        for provider, images in (("awnet", pace), ("compile", 10)):
            subject = {"model": model, "batch": batch, "provider": provider}
            rows.append(low | subject | {"images_per_second": str(images)})
    rows.append(cpu | {"batch": "32", "images_per_second": "5"})
    results.add_rows(tmp_path / "abacus-9-train.csv", rows, results.TRAIN_COLUMNS)
    results.add_rows(tmp_path / "abacus-9-amx.csv", list(amx_rows()), results.AMX_COLUMNS)
    return tmp_path


LOW_PRECISION = (
    ("awnet_resnet18", "32", 35),
    ("awnet_resnet18 width=0.5", "32", 26),
    ("awnet_tiny", "64", 31),
)


def amx_rows() -> Iterator[results.Row]:
    usual = dict.fromkeys(results.AMX_COLUMNS, "") | {
        "date": "2026-03-03", "device": "Abacus 9", "threads": "2", "share_of_peak": "0.5",
    }  # fmt: skip
    for case, batch, rates in (
        ("PGD step of awnet_resnet18, 32x32", "64", (20, 10)),
        ("weight gradient 256-256@8k3s1", "32", (60, 10)),
        ("weight gradient 512-512@4k3s1", "32", (40, 10)),
    ):
        for provider, rate in zip(("tiles", "library"), rates, strict=True):
            columns = {"case": case, "batch": batch, "provider": provider, "rate_best": str(rate)}
            yield usual | columns
            yield usual | columns | {"threads": "1", "rate_best": "99"}


def outcomes(folder: Path) -> dict[str, tuple[str, str]]:
    return {
        f"{v.goal.name}{' (stretch)' if v.goal.stretch else ''}": (v.figure, v.text)
        for v in goals.evaluate_goals(folder)
    }


def test_each_goal_is_evaluated_on_its_own_figure(measured: Path) -> None:
    actual = outcomes(measured)
    assert len(actual) == len(goals.GOALS)
    assert actual == {
        "layer against the literal form": ("21×", "met"),
        "layer against plain torch (unfused)": ("2.2×", "met"),
        "layer against torch.compile of it: worst shape": ("1.1×", "met"),
        "layer against torch.compile of it (stretch)": ("1.1×", "not met"),
        "time over a compiled static layer's": ("1.03×", "met"),
        "peak memory of a training step over unfused's": ("0.55×", "met"),
        "depthwise layer over moving its bytes once": ("1.25×", "met"),
        "PGD step of AW-Net-18, per image": ("12.5 µs", "met"),
        "PGD step of AW-Net-18, per image (stretch)": ("12.5 µs", "not met"),
        "MTARD epoch, PGD-10, 50,000 images": ("13 s", "not met"),
        "the paper's 100 epochs": ("21.7 min", "met"),
        "cpp against the literal form": ("5×", "met"),
        "cpp against plain torch (unfused)": ("1.2×", "met"),
        "cpp over a static layer's time": ("1.05×", "met"),
        **{f"cpp over eager's time: {case.name}": ("0.909×", "met") for case in CASES},
        **{
            f"training step of {model} against plain torch ({rival})": figure
            for model in ("awnet_tiny", "awnet_resnet18")
            for rival, figure in (("literal", ("4×", "met")), ("unfused", ("2×", "met")))
        },
        "PGD step of awnet_resnet18 against the library's convolutions": ("2×", "met"),
        "PGD step of awnet_resnet18 against the library's convolutions (stretch)": ("2×", "not met"),
        "PGD step of awnet_resnet18, share of the AMX peak": ("0.5", "met"),
        "PGD step of awnet_resnet18, share of the AMX peak (stretch)": ("0.5", "not met"),
        "weight gradient of stages 3 and 4 against the library's: the lower": ("4×", "met"),
        "weight gradient of stages 3 and 4 against the library's: the lower (stretch)": ("4×", "not met"),
        "training step of awnet_resnet18 against its float32 step": ("7×", "met"),
        "training step of awnet_resnet18 against its float32 step (stretch)": ("7×", "not met"),
        **{
            f"training step of {model} against torch.compile of plain torch in bfloat16{stretch}": figure
            for model, ratio, outcomes in (
                ("awnet_resnet18", "3.5×", ("met", "not met")),
                ("awnet_resnet18 width=0.5", "2.6×", ("met", "not met")),
                ("awnet_tiny", "3.1×", ("met", "met")),
            )
            for stretch, figure in zip(("", " (stretch)"), ((ratio, text) for text in outcomes), strict=True)
        },
    }


def test_a_pgd_step_is_a_tenth_of_the_attack_of_a_training_step_where_one_was_measured(
    measured: Path,
) -> None:
    path = measured / "nvidia-h200-train.csv"

    def rewrite(**changes: str) -> None:
        rows = [row | changes for row in results.read_rows(path, results.TRAIN_COLUMNS)[:2]]
        path.unlink()
        results.add_rows(path, rows, results.TRAIN_COLUMNS)

    rewrite(batch="512")
    # half of 250 µs an image, for ten steps
    assert outcomes(measured)["PGD step of AW-Net-18, per image (stretch)"] == ("12.5 µs", "not met")
    rewrite(share_attack="0.4")
    assert outcomes(measured)["PGD step of AW-Net-18, per image (stretch)"] == ("10 µs", "met")


def test_a_figure_of_a_disturbed_row_is_marked(measured: Path) -> None:
    path = measured / "abacus-9-amx.csv"
    rows = [row | {"disturbed": "true"} for row in results.read_rows(path, results.AMX_COLUMNS)]
    results.add_rows(path, rows, results.AMX_COLUMNS)
    marked = {v.goal.name for v in goals.evaluate_goals(measured) if "disturbed" in v.sources}
    assert marked == {
        "PGD step of awnet_resnet18 against the library's convolutions",
        "PGD step of awnet_resnet18, share of the AMX peak",
        "weight gradient of stages 3 and 4 against the library's: the lower",
    }


def test_a_goal_of_the_geometric_mean_differs_from_that_of_the_worst_shape(measured: Path) -> None:
    slow = next(
        r for r in gpu_rows() if (r["case"], r["mode"], r["provider"]) == ("stage3", "attack", "triton")
    )
    results.add_rows(measured / "nvidia-h200.csv", [slow | {"ms_median": "2.0"}])
    actual = outcomes(measured)
    assert actual["layer against torch.compile of it: worst shape"] == ("0.55×", "not met")
    mean = 1.1 * 0.5 ** (1 / 16)  # one of 4 stages, 2 batches, 2 modes is twice as slow
    assert actual["layer against torch.compile of it (stretch)"][0] == f"{mean:.3g}×"


def test_goals_on_a_gpu_take_replays_and_no_single_calls(measured: Path) -> None:
    path = measured / "nvidia-h200.csv"
    rows = results.read_rows(path)
    assert outcomes(measured)["layer against plain torch (unfused)"] == ("2.2×", "met")

    def rewrite(changed: list[results.Row]) -> dict[str, tuple[str, str]]:
        path.unlink()
        results.add_rows(path, changed)
        return outcomes(measured)

    actual = rewrite([row | {"timing": "eager"} for row in rows])
    for goal in ("layer against the literal form", "layer against plain torch (unfused)"):
        assert actual[goal] == ("", "not measured")
    refused = {"ms_median": "", "ms_eager": "21.0", "reason": "not captured: it waits"}
    literal = [r | refused if (r["provider"], r["mode"]) == ("literal", "training") else r for r in rows]
    assert rewrite(literal)["layer against the literal form"] == ("21×", "met")
    plain = [r | refused if (r["provider"], r["mode"]) == ("unfused", "training") else r for r in rows]
    assert rewrite(plain)["layer against plain torch (unfused)"] == ("", "not measured")
    ours = [r | refused if r["provider"] == "triton" else r for r in rows]
    actual = rewrite(ours)
    for goal in ("layer against the literal form", "PGD step of AW-Net-18, per image"):
        assert actual[goal] == ("", "not measured")


def test_a_file_without_the_column_of_the_timing_holds_single_calls(tmp_path: Path) -> None:
    shipped = results.read_rows(SHIPPED / "nvidia-h200.csv")
    assert {row["timing"] for row in shipped if row["commit"] == "3ed728d"} == {"eager"}
    path = tmp_path / "nvidia-h200.csv"
    old = [name for name in results.COLUMNS if name not in ("timing", "ms_eager", "reason")]
    cells = [row("stage1", "attack", "triton", 512, 1.5, driver="580.1")[name] for name in old]
    path.write_text(",".join(old) + "\n" + ",".join(cells) + "\n")
    new = row("stage1", "attack", "unfused", 512, 0.5, driver="580.1", timing="graph", ms_eager="1.25")
    results.add_rows(path, [new])
    assert [one["timing"] for one in results.read_rows(path)] == ["eager", "graph"]
    table = report.TABLES["gpu"](tmp_path)
    assert "Median milliseconds of single calls, host time included (not used for goals):" in table
    assert "| stage1 | attack | 512 | 1.5 |" in table
    assert "Median milliseconds of a step in a CUDA graph / of a single call, host time included:" in table
    assert "| stage1 | attack | 512 | 0.5 / 1.25 |" in table


def test_the_fastest_training_row_of_the_newest_commit_counts(measured: Path) -> None:
    path = measured / "nvidia-h200-train.csv"
    newest = results.read_rows(path, results.TRAIN_COLUMNS)[0] | {"date": "2026-03-09", "commit": "1234567"}
    rows = [
        newest | {"backend": backend, "images_per_second": pace, "epoch_seconds_50000": seconds}
        for backend, pace, seconds in (("cuda", "5000", "10"), ("triton", "4500", "11.1"))
    ]
    results.add_rows(path, rows, results.TRAIN_COLUMNS)
    assert outcomes(measured)["MTARD epoch, PGD-10, 50,000 images"] == ("10 s", "met")


@pytest.mark.parametrize(
    "changes",
    [
        {"verified": "false"},
        {"command": "awnet bench run --threads 4"},
        {"dtype": "bfloat16"},
        {"layout": "channels_last"},
        {"batch": "64"},
        {"driver": "580.1"},
    ],
)
def test_a_row_of_another_kind_measures_no_goal(changes: dict[str, str], tmp_path: Path) -> None:
    results.add_rows(tmp_path / "abacus-9.csv", [r | changes for r in cpu_rows()])
    assert {text for _, text in outcomes(tmp_path).values()} == {"not measured"}


def test_one_missing_row_leaves_a_goal_unmeasured(tmp_path: Path) -> None:
    rows = [r for r in cpu_rows() if (r["case"], r["mode"], r["provider"]) != ("stage2", "attack", "literal")]
    results.add_rows(tmp_path / "abacus-9.csv", rows)
    actual = outcomes(tmp_path)
    assert actual["cpp against the literal form"] == ("", "not measured")
    assert actual["cpp against plain torch (unfused)"][1] == "met"


def test_verify_prints_every_goal_and_the_commands_for_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results.add_rows(
        tmp_path / "abacus-9.csv",
        [r | {"ms_median": "30"} if r["provider"] == "cpp" else r for r in cpu_rows()],
    )
    assert main(["bench", "verify", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "cpp against the literal form  Abacus 9, abc1234" in out
    assert "0 met, 13 not met, 29 not measured" in out
    assert "awnet bench train --recipe mtard" in out
    assert "--batch 256 512 --cases stage1 stage2 stage3 stage4 --modes attack training --compile" in out
    assert main(["bench", "verify", "--results", str(tmp_path), "--strict"]) == 1
    assert main(["bench", "verify", "--results", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_strict_fails_on_measured_goals_that_are_no_stretch_goals(measured: Path) -> None:
    options = goals.VerifyOptions(measured, strict=True)
    assert goals.verify(options) == 1  # the epoch
    (measured / "nvidia-h200-train.csv").unlink()
    assert goals.verify(options) == 0
    assert goals.verify(replace(options, results=SHIPPED, strict=False)) == 0


def test_documents_get_their_tables_and_nothing_else_changes(measured: Path, tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "before\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nbetween\n"
        "<!-- bench:goals -->\n<!-- /bench:goals -->\nafter\n"
    )
    for _ in range(2):  # the second time changes nothing
        assert main(["bench", "table", str(document), "--results", str(measured)]) == 0
        text = document.read_text()
        assert text.startswith(
            "before\n<!-- bench:cpu -->\nAbacus 9, float32, nchw, torch 2.13.0, commit abc1234"
        )
        assert text.endswith("<!-- /bench:goals -->\nafter\n")
        assert "old" not in text
        assert "H200, bfloat16" in text
        assert "| stage1 | attack | 32 | 50 | 12 | 11 | 10 | 9.5 |" in text
        assert "| Abacus 9; abc1234 | met | ≥ 4× | 5× |" in text
        assert text.count("| case | mode | batch | literal | unfused | eager | cpp | static |") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- bench:pace -->\n<!-- /bench:pace -->\n",
            "unknown table bench:pace; available: goals, speed, cpu, gpu",
        ),
        ("<!-- bench:cpu -->\n<!-- /bench:gpu -->\n", "is not followed by"),
        ("<!-- bench:cpu -->\n", "is not followed by"),
    ],
)
def test_a_wrong_marker_is_named_and_the_document_left_alone(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "page.md"
    document.write_text(text)
    assert main(["bench", "table", str(document), "--results", str(SHIPPED)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(document) in error
    assert document.read_text() == text


def test_the_speed_table_names_the_device_and_what_was_not_measured(measured: Path, tmp_path: Path) -> None:
    table = report.TABLES["speed"](measured)
    assert table.startswith("On Abacus 9, 2 threads, float32")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    # the sums of CPU_MS over cases and modes, and images per second; no row of a compiled step is there
    assert [row[2] for row in rows[1:]] == ["5×", "1.2×", "not measured", "2×"]
    assert all("awnet bench" in row[3] for row in rows[1:])
    (tmp_path / "empty").mkdir()
    assert report.TABLES["speed"](tmp_path / "empty").count("not measured") == 4


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_the_tables_in_the_documents_are_what_the_results_give(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert report.filled(text, SHIPPED) == text, "run `awnet bench table`"
    shown = {"README.md": {"speed"}, "docs/benchmarks.md": report.TABLES.keys() - {"speed"}}
    assert set(re.findall(r"<!-- bench:(\w+) -->", text)) == shown[name]


def test_figures_are_drawn_of_each_device(measured: Path, tmp_path: Path) -> None:
    results.add_rows(
        measured / "abacus-9.csv",
        [
            row("copy", "ceiling", "torch", 0, 1.0, channels="", size=""),
            row("matmul", "ceiling", "torch", 0, 1.0, channels="", size=""),
            row("stage1", "forward", "cpp", 32, 0, ms_median="", verified="false"),
        ],
    )
    assert main(["bench", "plot", "--results", str(measured), "--out", str(tmp_path / "figures")]) == 0
    actual = {path.name: path.read_bytes() for path in (tmp_path / "figures").glob("*")}
    cpu, gpu = "abacus-9-float32-nchw", "nvidia-h200-bfloat16-channels-last"
    assert actual.keys() == {
        f"{cpu}-bars.png",
        f"{cpu}-roofline.png",
        f"{gpu}-bars.png",
        f"{gpu}-batches.png",
    }
    assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in actual.values())


def test_without_rows_no_figure_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "plot", "--results", str(tmp_path), "--out", str(tmp_path / "figures")]) == 2
    assert "has no row with a time" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()

"""benchmarks/on_gpu.sh and what it runs, on the stand-ins for a machine without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from awnet.benchmarks import profile_step, sanitize

from awnet.attacks import graphed

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("build", "tests", "sanitize", "tune", "race", "bench", "networks", "compile", "training", "profile")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def on_gpu(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "benchmarks" / "on_gpu.sh"), *(str(a) for a in arguments)],
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--out DIR is missing"),
        (("--out", "x", "--stage", "everything"), "there is no stage everything; there are build tests"),
        (("--out", "x", "--device", "tpu"), "--device must be cuda or cpu, got tpu"),
        (("--outt", "x"), "unknown option --outt"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = on_gpu(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not Path("x").exists()


def test_help_lists_the_stages() -> None:
    text = on_gpu("--help").stdout
    for stage in STAGES:
        assert f"\n  {stage} " in text


def test_a_stage_is_run_until_it_passes_and_again_where_it_is_asked_for(tmp_path: Path) -> None:
    call = ("--out", tmp_path, "--device", "cpu", "--stage", "profile")
    failed = on_gpu(*call, AWNET_BACKEND="nonsense")
    assert failed.returncode == 1
    assert "names no backend: 'nonsense'" in failed.stdout
    assert "profile: failed with 1" in failed.stdout
    assert not (tmp_path / "profile.done").exists()
    passed = on_gpu(*call)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert "profile: passed" in passed.stdout
    assert "one PGD step on cpu" in (tmp_path / "profile.log").read_text()
    assert len((tmp_path / "heaviest.txt").read_text().splitlines()) == 5
    assert on_gpu(*call).stdout == "profile: done before\n"
    stopped = on_gpu(*call, "--again", LIMIT="1")
    assert stopped.returncode == 1
    assert "profile: stopped after 1 s" in stopped.stdout
    assert not (tmp_path / "profile.done").exists()


@pytest.mark.slow
def test_a_benchmark_stage_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    call = ("--out", tmp_path, "--device", "cpu", "--stage", "networks")
    stopped = on_gpu(*call, LIMIT="1")
    assert "networks: stopped after 1 s" in stopped.stdout
    first = on_gpu(*call)
    assert first.returncode == 0, first.stdout + first.stderr
    (path,) = (tmp_path / "results").glob("*-smoke.csv")
    rows = path.read_text()
    assert "network,training" in rows
    second = on_gpu(*call, "--again")
    assert second.returncode == 0
    assert ": 0 rows" in (tmp_path / "networks.log").read_text()
    assert path.read_text() == rows


@pytest.mark.slow
def test_every_stage_has_a_stand_in(tmp_path: Path) -> None:
    done = on_gpu("--out", tmp_path, "--device", "cpu")
    for stage in STAGES:
        assert (tmp_path / f"{stage}.done").exists(), (stage, done.stdout[-3000:], done.stderr[-1000:])
    assert list((tmp_path / "results").glob("*.csv"))
    assert (tmp_path / "convolutions.csv").exists()
    assert list((tmp_path / "results").glob("*-train.csv"))


def test_sanitize_calls_every_operator_and_finds_a_wrong_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from awnet.ops.backends import native

    if native.load() is not None:
        pytest.skip(str(native.load()))
    called: set[str] = set()
    real, check = sanitize._Operators.__getattr__, sanitize._Checker.__call__

    def watched(self: sanitize._Checker, name: str, *arguments: Any, **options: Any) -> Any:
        called.add(name)
        return check(self, name, *arguments, **options)

    monkeypatch.setattr(sanitize._Checker, "__call__", watched)
    assert sanitize.main(["--backend", "cpp"]) == 0
    assert "all right" in capsys.readouterr().out
    assert called == {
        "statistics", "apply", "reduce", "propagate", "eval_coefficients", "eval_gradients",
        "batch_statistics", "train_coefficients", "train_sums", "train_gradients",
    }  # fmt: skip
    spoilt = sanitize._Operators()
    monkeypatch.setattr(
        sanitize._Operators,
        "__getattr__",
        lambda self, name: (
            lambda *a: real(spoilt, name)(*a) if name != "reduce" else [-x for x in real(spoilt, name)(*a)]
        ),
    )
    with pytest.raises(SystemExit, match="reduce is wrong by"):
        sanitize.main(["--backend", "cpp"])


def test_the_profiled_step_is_the_training_attack_on_the_inference_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dtypes: list[object] = []
    real = graphed.inference_copy
    monkeypatch.setattr(graphed, "inference_copy", lambda m, d: dtypes.append(d) or real(m, d))
    words = ["--device", "cpu", "--model", "awnet_tiny", "--batch", "2", "--steps", "1"]
    assert profile_step.main([*words, "--steps-only"]) == 0
    assert dtypes == [None]  # one copy for both calls; bfloat16 on a GPU only
    assert profile_step.main([*words, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "profile.json").read_text())[0]["us"] > 0


def test_the_heaviest_kernels_are_named_as_ncu_names_them() -> None:
    rows = [
        {"kernel": "void awnet::cuda::(anonymous namespace)::reduce_rows<float, 4>(Operands<float>, Rows)"},
        {"kernel": "void awnet::cuda::over_rows<8, awnet::cuda::Apply<__nv_bfloat16> >(Apply, Rows)"},
        {"kernel": "Memcpy HtoD (Pageable -> Device)"},
        {"kernel": "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc"},
        {"kernel": "void awnet::cuda::(anonymous namespace)::reduce_rows<__half, 8>(Operands<float>, Rows)"},
    ]
    assert profile_step.heaviest(rows) == [
        "^reduce_rows$", "^over_rows$", "^sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc$",
    ]  # fmt: skip

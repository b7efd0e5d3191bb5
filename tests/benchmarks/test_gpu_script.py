"""benchmarks/on_gpu.sh and gpu_pack.py: their control flow with a fake python, and on a CPU."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from awnet.benchmarks import profile_step, results, sanitize

from awnet.attacks import graphed
from awnet.data import load_dataset

ROOT = Path(__file__).resolve().parents[2]
CALL_1 = (*("check", "backends", "values", "graphs", "batch256", "layers", "profile", "compile", "rest"),)
CALL_2 = ("cifar", "tests")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """An environment whose PYTHON writes its arguments to $FAKE_CALLS and behaves as $RULES, lines of bash, says."""
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'echo "$*" | tr "\\n" " " >>"$FAKE_CALLS"; echo >>"$FAKE_CALLS"\n'
        'eval "${RULES:-}"\n'
        'case "$*" in *available_backends*) echo "${BACKENDS:-cuda triton}" ;; esac\n'
    )
    python.chmod(0o755)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho fake\n")
    (tools / "nvidia-smi").chmod(0o755)
    return {
        "PYTHON": str(python),
        "FAKE_CALLS": str(tmp_path / "calls"),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
    }


def on_gpu(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "benchmarks" / "on_gpu.sh"), *(str(a) for a in arguments)],
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def steps_of(folder: Path) -> dict[str, str]:
    with open(folder / "steps.csv", newline="", encoding="utf-8") as file:
        return {row["step"]: row["ended"] for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--out DIR is missing"),
        (("--out", "x", "--step", "everything"), "unknown step everything; available: check backends"),
        (("--out", "x", "--call", "3"), "--call must be 1 or 2, got 3"),
        (("--out", "x", "--device", "tpu"), "--device must be cuda or cpu, got tpu"),
        (("--outt", "x"), "unknown option --outt"),
    ],
)
def test_wrong_arguments_of_the_script_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = on_gpu(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not Path("x").exists()


def test_help_of_the_script_lists_calls_and_steps() -> None:
    text = on_gpu("--help").stdout
    for step in (*CALL_1, *CALL_2, "sanitize", "tune", "race", "ncu"):
        assert f" {step}" in text
    assert "Call 1 (480 s)" in text
    assert "#" not in text


def test_both_calls_run_every_step_in_order_and_leave_few_files(fake: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = on_gpu("--out", out, **fake)
    steps = steps_of(out)
    assert tuple(steps) == (*CALL_1, *CALL_2)
    assert {name: how for name, how in steps.items() if how != "passed"} == {"profile": "failed with 1"}
    assert done.returncode == 1  # the fake python profiles nothing
    calls = Path(fake["FAKE_CALLS"]).read_text().splitlines()
    measured = [line for line in calls if "bench train" in line or "bench run" in line]
    assert ["--capture true" in line and "--batch 512" in line for line in measured[:2]] == [True, True]
    assert [line.split()[-1] for line in measured[:2]] == ["cuda", "triton"]
    assert all(f"--out {out}/results" in line for line in measured)
    layers = next(line for line in calls if "--cases stage1 stage2" in line)
    assert "--batch 512 256 --providers cuda triton unfused" in layers
    assert "--verify-batch 32" in layers
    assert any("--recipe pgd_at_fast --data cifar10" in line for line in calls)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8
    assert all(len(path.relative_to(out).parts) <= 2 for path in files)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp.")]  # its own folder is gone


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(fake: dict[str, str], tmp_path: Path) -> None:
    rules = 'case "$*" in *sanitize*) exit 3 ;; *test_graphed*) sleep 60 ;; esac'
    names = ("values", "graphs", "batch256")
    words = [word for name in names for word in ("--step", name)]
    done = on_gpu("--out", tmp_path / "out", *words, LIMIT="2", RULES=rules, **fake)
    assert steps_of(tmp_path / "out") == {
        "values": "failed with 1", "graphs": "stopped", "batch256": "passed"
    }  # fmt: skip
    assert done.returncode == 1
    # both parts of the step ran, although the first failed
    assert Path(fake["FAKE_CALLS"]).read_text().count("awnet.benchmarks.sanitize") == 2


def test_a_call_ends_when_its_time_is_over(fake: dict[str, str], tmp_path: Path) -> None:
    hangs = 'case "$*" in *find_spec*) ;; *) sleep 60 ;; esac'
    done = on_gpu("--out", tmp_path / "out", "--call", 1, LIMIT="2", RULES=hangs, **fake)
    ended = list(steps_of(tmp_path / "out").values())
    assert (ended[0], ended[-1]) == ("stopped", "not started")
    assert done.returncode == 1


def test_triton_is_measured_while_the_cuda_kernels_are_compiled(fake: dict[str, str], tmp_path: Path) -> None:
    built = tmp_path / "built"
    rules = (
        f'case "$*" in *"gpu_pack.py native"*) exit 1 ;; *setup.py*) sleep 1; touch {built} ;;'
        f"*available_backends*) [ -e {built} ] || BACKENDS=triton ;; esac"
    )
    on_gpu("--out", tmp_path / "out", "--step", "check", "--step", "backends", RULES=rules, **fake)
    calls = Path(fake["FAKE_CALLS"]).read_text().splitlines()
    assert [line.split()[-1] for line in calls if "bench train" in line] == ["triton", "cuda"]
    assert any("setup.py -q build_ext --inplace" in line for line in calls)


def test_a_killed_call_ends_its_processes_and_keeps_its_files(fake: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rules = f'case "$*" in *"--backend cuda"*) mkdir -p {out}/results; echo row >{out}/results/a.csv; sleep 77 ;; esac'
    script = subprocess.Popen(
        [ROOT / "benchmarks" / "on_gpu.sh", "--out", out, "--call", "1"],
        env=os.environ | fake | {"RULES": rules},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not (out / "results/a.csv").exists() and time.monotonic() < end:
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=30) == 143
    assert (out / "results/a.csv").read_text() == "row\n"
    assert steps_of(out) == {"check": "passed"}
    assert "== backends" in (out / "log.txt").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp.")]
    while time.monotonic() < end and _runs("sleep 77"):
        time.sleep(0.05)
    assert not _runs("sleep 77")


def _runs(command: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().replace(b"\0", b" ").strip() == command.encode():
                return True
        except OSError:
            continue
    return False


def test_the_tests_that_the_script_deselects_exist() -> None:
    script = (ROOT / "benchmarks/on_gpu.sh").read_text()
    (chosen,) = re.findall(r'-m gpu tests -k "(.*?)"', script)
    names = re.findall(r"def (test_\w+)", (ROOT / "tests/ops/test_gpu.py").read_text())
    for word in chosen.replace("not ", "").split(" and "):
        assert any(word in name for name in names), word


@pytest.mark.slow
def test_a_benchmark_that_is_killed_leaves_its_rows(tmp_path: Path) -> None:
    script = subprocess.Popen(
        [ROOT / "benchmarks" / "on_gpu.sh", "--out", tmp_path, "--device", "cpu", "--step", "layers"],
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end, rows = time.monotonic() + 300, []
    while time.monotonic() < end and len(rows) < 3:  # two ceilings and a measurement
        time.sleep(0.02)
        rows = [row for path in (tmp_path / "results").glob("*.csv") for row in results.read_rows(path)]
    script.kill()
    script.wait()
    assert len(rows) >= 3
    (path,) = (tmp_path / "results").glob("*-smoke.csv")
    assert len(results.read_rows(path)) >= 3


@pytest.mark.slow
def test_both_calls_have_a_stand_in_on_a_cpu(tmp_path: Path) -> None:
    done = on_gpu("--out", tmp_path, "--device", "cpu", OMP_NUM_THREADS="1")
    steps = steps_of(tmp_path)
    assert tuple(steps) == (*CALL_1, *CALL_2)
    assert set(steps.values()) == {"passed"}, (steps, done.stdout[-3000:], done.stderr[-1000:])
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) <= 8
    for name in ("cifar.jsonl", "log.txt", "profile.json", "steps.csv", "tests.txt"):
        assert name in files
    for path in (tmp_path / "results").glob("*.csv"):
        columns = results.TRAIN_COLUMNS if path.stem.endswith("-train") else results.COLUMNS
        assert results.read_rows(path, columns)


# --- gpu_pack.py


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_pack", ROOT / "benchmarks" / "gpu_pack.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path / ".gpu")
    return module


def test_packed_images_are_read_as_cifar10(pack: ModuleType, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    colors = generator.integers(0, 256, (60, 3, 1, 1), np.uint8)  # one color each: JPEG keeps it nearly
    images = np.broadcast_to(colors, (60, 3, 32, 32)).reshape(60, -1)
    labels = generator.integers(0, 10, 60)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, rows, kinds in zip(names, np.split(images, 6), np.split(labels, 6), strict=True):
        batch = {"data": np.ascontiguousarray(rows), "labels": [int(kind) for kind in kinds]}
        (folder / name).write_bytes(pack.pickle.dumps(batch, protocol=4))
    pack.compress(folder.parent, tmp_path / "images.npz", 75)
    assert pack.main(["unpack", str(tmp_path / "images.npz"), str(tmp_path / "again")]) == 0
    for name in names:
        want = pack.pickle.loads((folder / name).read_bytes())
        got = pack.pickle.loads((tmp_path / "again/cifar-10-batches-py" / name).read_bytes())
        assert got["labels"] == want["labels"]
        assert np.abs(got["data"].astype(int) - want["data"]).max() <= 4
    assert len(load_dataset("cifar10", tmp_path / "again").test) == 10
    with pytest.raises(SystemExit, match="there is no cifar-10-batches-py in"):
        pack.compress(tmp_path / "nowhere", tmp_path / "images.npz", 75)


def test_a_packed_module_of_other_sources_or_versions_is_refused(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pack.FOLDER / "native"
    assert pack._mismatch(folder) == "no native module is packed"
    folder.mkdir(parents=True)
    here = {"torch": "2.11.0+cu130", "suffix": ".cpython-312-x86_64-linux-gnu.so"}
    monkeypatch.setattr(pack, "_about", lambda python: here)
    fits = here | {"sources": pack.sources_key()}
    for changes, reason in (
        ({}, None),
        ({"torch": "2.12.1+cu130"}, "the packed native module is of other torch: 2.12.1"),
        ({"suffix": ".cpython-311-x86_64-linux-gnu.so"}, "of other suffix: .cpython-311"),
        ({"sources": "0" * 64}, "of other sources: 0000"),
    ):
        (folder / "about.json").write_text(json.dumps(fits | changes))
        mismatch = pack._mismatch(folder)
        assert (mismatch is None) if reason is None else (reason in mismatch)
    copy = tmp_path / "copy"
    for name in ("setup.py", "csrc"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, _in(copy, name))
    assert pack.sources_key(copy) == pack.sources_key()
    with open(copy / "csrc/module.cpp", "a") as file:
        file.write("// changed\n")
    assert pack.sources_key(copy) != pack.sources_key()


def test_a_packed_wheel_lacks_its_examples(pack: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    record = "some/__init__.py,sha256=a,1\nsome/examples/net.pt,sha256=b,9\nsome-1.0.dist-info/RECORD,,\n"
    files = {
        "some/__init__.py": "x = 1\n", "some/examples/net.pt": "weights",
        "some-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: some\nVersion: 1.0\n",
        "some-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "some-1.0.dist-info/RECORD": record,
    }  # fmt: skip
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    pack.without_examples(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == files.keys() - {"some/examples/net.pt"}
        assert archive.read("some/__init__.py") == b"x = 1\n"
        assert b"examples" not in archive.read("some-1.0.dist-info/RECORD")


def _in(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    return folder / name


# --- what the steps run


def test_sanitize_calls_every_operator_and_finds_a_wrong_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from awnet.ops.backends import native

    if native.load() is not None:
        pytest.skip(str(native.load()))
    called: set[str] = set()
    check = sanitize._Checker.__call__

    def watched(self: sanitize._Checker, name: str, *arguments: Any, **options: Any) -> Any:
        called.add(name)
        return check(self, name, *arguments, **options)

    monkeypatch.setattr(sanitize._Checker, "__call__", watched)
    assert sanitize.main(["--backend", "cpp"]) == 0
    assert "all correct" in capsys.readouterr().out
    assert called == {
        "statistics", "apply", "reduce", "propagate", "eval_coefficients", "eval_gradients",
        "batch_statistics", "train_coefficients", "train_sums", "train_gradients",
    }  # fmt: skip
    reduce = native.NativePasses.reduce
    monkeypatch.setattr(native.NativePasses, "reduce", lambda *a: [-x for x in reduce(*a)])
    with pytest.raises(SystemExit, match="reduce is off by"):
        sanitize.main(["--backend", "cpp"])


def test_the_profiled_step_is_the_training_attack_on_the_inference_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dtypes: list[object] = []
    real = graphed.inference_copy
    monkeypatch.setattr(graphed, "inference_copy", lambda m, d: dtypes.append(d) or real(m, d))
    words = ["--device", "cpu", "--model", "awnet_tiny", "--batch", "2", "--steps", "1"]
    assert profile_step.main([*words, "--steps-only"]) == 0
    assert dtypes == [None]  # one copy for both calls; bfloat16 on a GPU only


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

"""The self-check: a backend whose kernels fail is not used, and says why. With real kernels: tests/kernels/."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launch_path import Launches
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from awnet import info, ops
from awnet.cli import main
from awnet.ops import self_check
from awnet.ops.backends import base, native
from awnet.ops.backends import triton as triton_backend
from awnet.ops.backends.base import Passes
from awnet.ops.self_check import Kernels

CPU = torch.device("cpu")
X, W = torch.ones(1, 2, 3, 3), torch.ones(2, 2, 1, 1)


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("AWNET_SELF_CHECK", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    self_check.forget()
    yield
    self_check.forget()


def kernels(
    passes: Passes | None = None, probe: Callable[[torch.device], str | None] | None = None
) -> Kernels:
    return Kernels("triton", passes or Passes(), probe or (lambda device: None), lambda: [Path(__file__)])


class Wrong(Passes):
    def reduce(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        g1, gc = super().reduce(*arguments)
        return g1, gc * 1.01


class Raising(Passes):
    def propagate(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        raise RuntimeError("an illegal instruction\nand more")


class Outside(Passes):
    """One element past the end of the output."""

    def apply(self, u: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        y, mask = super().apply(u, *arguments)
        out = torch.empty_like(u).copy_(y)
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0.0)
        return out, mask


class Incomplete(Passes):
    """The last element of the output is never written."""

    def apply(self, u: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        y, mask = super().apply(u, *arguments)
        out = torch.empty_like(u)
        out.view(-1)[:-1].copy_(y.view(-1)[:-1]) if out.is_contiguous() else out.copy_(y)
        return out, mask


class Overwriting(Passes):
    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        result = super().statistics(u)
        u.zero_()
        return result


class Unsteady(Passes):
    def __init__(self) -> None:
        self.calls = 0

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        mean, m2 = super().statistics(u)
        return mean * (1 + self.calls * 2**-23), m2


def test_correct_kernels_pass_the_self_check() -> None:
    result, stored = self_check.check(kernels(), CPU)
    assert result.reason is None
    assert stored
    assert result.cases == 50


def test_the_native_operators_pass_the_self_check() -> None:
    if native.load() is not None:
        pytest.skip("awnet._C is not built")
    assert self_check.check(kernels(native.NativePasses()), CPU)[0].reason is None


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        (Wrong(), "reduce, NCHW, float32, split: wrong by"),
        (Raising(), "propagate, NCHW, float32, split: RuntimeError: an illegal instruction"),
        (Outside(), "apply, NCHW, float32, split: it wrote outside its tensors"),
        (Incomplete(), "apply, NCHW, float32, split: NaN at other positions than in eager"),
        (Overwriting(), "statistics, NCHW, float32, split: it changed its inputs"),
        (Unsteady(), "statistics, NCHW, float32, split: two calls gave different bits"),
    ],
)
def test_a_wrong_kernel_fails_with_its_name_and_case(passes: Passes, reason: str) -> None:
    actual = str(self_check.check(kernels(passes), CPU)[0].reason)
    assert actual.startswith(reason)
    assert "\n" not in actual


def test_the_self_check_calls_every_method_that_all_backends_have() -> None:
    called: set[str] = set()

    class Recorded(Passes):
        def __getattribute__(self, name: str) -> Any:
            called.add(name)
            return super().__getattribute__(name)

    self_check.check(kernels(Recorded()), CPU)
    with_fallback = {"eval_backward", "fused_apply", "fused_statistics", "fused_dgrad"}
    assert called >= {name for name in vars(Passes) if not name.startswith("_")} - with_fallback


def test_no_mode_of_the_caller_reaches_the_self_check() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            result, _ = self_check.check(kernels(), CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.reason is None


# --- the choice of the backend


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernels], None]:
    """Makes the ``triton`` backend accept CPU tensors, with the given kernels to check."""

    def install(checked: Kernels) -> None:
        monkeypatch.setattr(triton_backend, "device_obstacle", lambda device: None)
        monkeypatch.setattr(triton_backend, "CHECKED", checked)

    return install


def no_compiler(device: torch.device) -> str | None:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


FAULTS = [
    (kernels(Wrong()), "reduce, NCHW, float32, split: wrong by"),
    (kernels(Raising()), "propagate, NCHW, float32, split: RuntimeError"),
    (kernels(probe=no_compiler), "it needs a C compiler and the headers of Python"),
    (kernels(probe=lambda device: "a wrong sum"), "a wrong sum"),
]


@pytest.mark.parametrize(("checked", "reason"), FAULTS)
def test_a_fault_is_one_warning_and_the_next_backend(
    checked: Kernels, reason: str, on_cpu: Callable[[Kernels], None]
) -> None:
    before = ops.explain(ops.filter_scaled_conv2d, X, W, None)
    on_cpu(checked)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ops.sign_step(X, X, X, 0.1, 0.2)
        for _ in range(3):
            ops.filter_scaled_conv2d(X, W, None)
    assert [str(w.message) for w in caught if reason in str(w.message)] == [str(w.message) for w in caught]
    assert len(caught) == 1
    explained = ops.explain(ops.filter_scaled_conv2d, X, W, None)
    assert explained.backend == before.backend
    assert reason in explained.others["triton"]
    assert reason in str(ops.available_backends("cpu")["triton"])


@pytest.mark.parametrize(("checked", "reason"), FAULTS)
def test_a_named_backend_raises_with_the_reason(
    checked: Kernels, reason: str, on_cpu: Callable[[Kernels], None]
) -> None:
    on_cpu(checked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="'triton' cannot run this call") as caught:
            ops.filter_scaled_conv2d(X, W, None, backend="triton")
    assert reason in str(caught.value)


def test_the_status_of_a_backend_that_passed_is_reported(on_cpu: Callable[[Kernels], None]) -> None:
    on_cpu(kernels())
    explained = ops.explain(ops.filter_scaled_conv2d, X, W, None, backend="triton")
    assert "self-check passed on " in str(explained)
    assert "self-check passed on " in info.collect()["self_checks"]["triton"]


def test_awnet_info_repeats_the_self_check_on_request(
    on_cpu: Callable[[Kernels], None], capsys: pytest.CaptureFixture[str]
) -> None:
    on_cpu(kernels(Wrong()))
    assert "wrong by" in info.collect()["backends"]["triton"]
    on_cpu(kernels())
    self_check.forget()
    assert "wrong by" in info.collect()["backends"]["triton"]
    capsys.readouterr()
    assert main(["info", "--json", "--self-check"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["triton"] is None
    assert "self-check passed on " in facts["self_checks"]["triton"]


def test_the_self_check_runs_once_or_as_the_environment_variable_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs: list[int] = []
    checked = kernels(probe=lambda device: runs.append(1))
    for value, expected in ((None, 1), (None, 1), ("0", 1), ("always", 2), ("always", 3)):
        if value is not None:
            monkeypatch.setenv("AWNET_SELF_CHECK", value)
        self_check.forget()
        for _ in range(2):
            assert self_check.obstacle(checked, CPU) is None
        assert len(runs) == expected, value
    monkeypatch.setenv("AWNET_SELF_CHECK", "never")
    self_check.forget()
    with pytest.raises(ValueError, match="AWNET_SELF_CHECK must be 0 or always, got 'never'"):
        self_check.obstacle(checked, CPU)


def test_threads_that_call_at_once_check_once() -> None:
    runs: list[int] = []
    checked = kernels(probe=lambda device: runs.append(1))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: self_check.obstacle(checked, CPU), range(8))) == [None] * 8
    assert len(runs) == 1


# --- stored results


def stored_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "awnet" / "self-check").glob("*.json"))


def test_a_failure_of_values_is_stored_until_a_source_changes(tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("one")
    checked = replace(kernels(Wrong()), sources=lambda: [source])
    assert "wrong by" in str(self_check.obstacle(checked, CPU))
    right = replace(checked, passes=Passes())
    self_check.forget()
    assert "wrong by" in str(self_check.obstacle(right, CPU))
    source.write_text("two")
    self_check.forget()
    assert self_check.obstacle(right, CPU) is None
    assert len(stored_files(tmp_path)) == 2


def test_renewing_ignores_the_stored_result_and_replaces_it(tmp_path: Path) -> None:
    assert self_check.obstacle(kernels(Wrong()), CPU) is not None
    self_check.forget(renewed=True)
    assert self_check.obstacle(kernels(), CPU) is None
    self_check.forget()
    assert self_check.obstacle(kernels(Wrong()), CPU) is None
    assert len(stored_files(tmp_path)) == 1


def test_a_failure_to_start_kernels_is_tried_again_by_the_next_process(tmp_path: Path) -> None:
    assert self_check.obstacle(kernels(probe=no_compiler), CPU) is not None
    assert stored_files(tmp_path) == []
    self_check.forget()
    assert self_check.obstacle(kernels(), CPU) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"reason": null, "of another version": 1}'])
def test_a_damaged_result_is_replaced(content: str, tmp_path: Path) -> None:
    assert self_check.obstacle(kernels(), CPU) is None
    (path,) = stored_files(tmp_path)
    path.write_text(content)
    self_check.forget()
    assert self_check.obstacle(kernels(), CPU) is None
    assert json.loads(path.read_text())["reason"] is None


def test_without_a_cache_folder_every_process_checks(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert self_check.obstacle(kernels(), CPU) is None


# --- tracing, capturing, other devices


def test_a_traced_call_takes_the_stored_result_and_never_checks() -> None:
    runs: list[int] = []
    checked = kernels(Wrong(), probe=lambda device: runs.append(1))
    with pytest.warns(RuntimeWarning, match="runs unchecked on cpu"), FakeTensorMode():
        assert self_check.obstacle(checked, CPU) is None
    assert runs == []
    assert self_check.obstacle(checked, CPU) is not None
    self_check.forget()
    with FakeTensorMode():
        assert self_check.obstacle(checked, CPU) is not None
    assert len(runs) == 1


def test_a_captured_call_never_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(RuntimeWarning, match="runs unchecked on cuda:0"):
        assert self_check.obstacle(kernels(Wrong()), torch.device("cuda:0")) is None


def test_a_torch_for_amd_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    base.device_obstacle.cache_clear()
    try:
        reason = base.device_obstacle(torch.device("cuda:0"))
    finally:
        base.device_obstacle.cache_clear()
    assert reason == "it needs an NVIDIA GPU, and this torch is built for AMD's (ROCm 6.4)"


def test_a_machine_without_a_compiler_gives_tritons_reason(
    triton_launches: Launches, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton's own builder of its launcher, without a compiler on the PATH."""
    from triton.runtime import build, driver

    def launcher(*arguments: Any) -> Any:
        return build.compile_module_from_src("int x;", "launcher")

    monkeypatch.setattr(driver.active, "launcher_cls", launcher)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    reason = str(self_check.check(triton_backend.CHECKED, CPU)[0].reason)
    assert "no kernel can be compiled and launched here" in reason
    assert "it needs a C compiler" in reason

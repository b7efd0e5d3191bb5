"""Accuracies are computed in float32: torch's settings, the caller's autocast, and the report's precision."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import awnet
from awnet.analysis import weight_gaps
from awnet.attacks.craft import craft
from awnet.data import Dataset
from awnet.detectors import LNG
from awnet.evaluation import accuracy, evaluate, robust_correct, sanity_table
from awnet.evaluation.robustbench import violations
from awnet.precision import FP32_SETTINGS, computed_in, full_precision

_OLDER = (
    *("cudnn_allow_tf32", "cublas_allow_tf32", "float32_matmul_precision", "cublas_allow_fp16_accumulation"),
    *(f"cublas_allow_{half}_reduced_precision_reduction" for half in ("fp16", "bf16")),
)


def settings() -> dict[Any, Any]:
    """The values of all of torch's settings; "raises" where an older setting contradicts a newer one."""
    actual: dict[Any, Any] = {key: torch._C._get_fp32_precision_getter(*key) for key in FP32_SETTINGS}
    for name in _OLDER:
        try:
            actual[name] = getattr(torch._C, f"_get_{name}")()
        except RuntimeError:
            actual[name] = "raises"
    return actual


def put(choose: random.Random) -> None:
    """Changes one of torch's settings, by one of its interfaces."""
    yes, matmul = choose.random() < 0.5, torch.backends.cuda.matmul
    backend, op = choose.choice(FP32_SETTINGS)
    values = ["none", "ieee", "tf32", *(["bf16"] if backend != "cuda" else [])]
    choose.choice(
        (
            lambda: torch._C._set_fp32_precision_setter(backend, op, choose.choice(values)),
            lambda: torch.set_float32_matmul_precision(choose.choice(["highest", "high", "medium"])),
            lambda: setattr(torch.backends.cudnn, "allow_tf32", yes),
            lambda: setattr(matmul, "allow_tf32", yes),
            lambda: setattr(matmul, "allow_bf16_reduced_precision_reduction", yes),
            lambda: setattr(matmul, "allow_fp16_reduced_precision_reduction", yes),
            lambda: setattr(matmul, "allow_fp16_accumulation", yes),
        )
    )()


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = settings()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for half in ("fp16", "bf16"):
        setattr(torch.backends.cuda.matmul, f"allow_{half}_reduced_precision_reduction", True)
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    for key in FP32_SETTINGS:
        torch._C._set_fp32_precision_setter(*key, before[key])
    assert settings() == before


def test_every_setting_is_float32_inside_and_as_before_afterwards() -> None:
    choose = random.Random(0)
    for _ in range(500):
        put(choose)
        before = settings()
        with full_precision():
            inside = settings()
            assert {inside[key] for key in FP32_SETTINGS} == {"ieee"}
            assert inside["float32_matmul_precision"] == "highest"
            assert not inside["cudnn_allow_tf32"]
            assert not inside["cublas_allow_tf32"]
            assert not inside["cublas_allow_fp16_accumulation"]
            with pytest.raises(KeyError), full_precision():
                raise KeyError
            assert settings() == inside
        assert settings() == before


def test_blocks_of_two_threads_restore_the_settings_once_both_have_ended() -> None:
    torch.set_float32_matmul_precision("medium")
    before = settings()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        entered.wait(10)
    assert torch.get_float32_matmul_precision() == "highest"  # the other one still needs it
    leave.set()
    thread.join()
    assert settings() == before


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_a_variable_that_torch_cannot_override_is_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "BF16")
    with pytest.raises(ValueError, match=f"{name}=BF16 lets float32 .* unset it"), full_precision():
        pass
    monkeypatch.setenv(name, "strict")
    with full_precision():
        pass


class Watching(nn.Module):
    """A small classifier that records what it computes in."""

    def __init__(self, own: torch.dtype | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear, self.own = nn.Conv2d(1, 4, 3), nn.Linear(4, 10), own
        self.seen: set[Any] = set()

    def forward(self, x: Tensor) -> Tensor:
        if self.own is not None:
            with torch.autocast("cpu", self.own):
                return self._pass(x)
        return self._pass(x)

    def _pass(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        self.seen |= {features.dtype, torch.backends.mkldnn.conv.fp32_precision}
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits.float()


class InBFloat16(nn.Module):
    """An AW-Net whose weights are bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.net = awnet.create_model("awnet_tiny", in_channels=1).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.bfloat16())
        return logits.float()


def digits(n: int) -> Dataset:
    return awnet.load_dataset("digits").test.subset(n)


def _figures(model: nn.Module) -> dict[str, Any]:
    """All functions that measure a model, by name."""
    data = digits(12)
    x, y, _ = next(data.batches(12))
    suite = awnet.attacks.Suite(budget="smoke", queries=5)
    return {
        "evaluate": lambda: evaluate(model, data, ["pgd_sat"]),
        "accuracy": lambda: accuracy(model, data),
        "robust_correct": lambda: robust_correct(model, data, "fgsm"),
        "sanity_table": lambda: sanity_table(model, data, suite),
        "craft": lambda: craft(model, data, "fgsm"),
        "detector": lambda: LNG(model, neighbours=2).fit(x, y, x[:6], x[6:]).score(x),
        "weight_gaps": lambda: weight_gaps(model, x, y, [0.1], [0.5]),
        "violations": lambda: violations(model, x, 10),
    }


@pytest.mark.parametrize("what", _figures(Watching()))
def test_all_measurements_run_in_float32(what: str) -> None:
    model = Watching()
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # reading the older settings raises from here on
    before = settings()
    with torch.autocast("cpu", torch.bfloat16):
        _figures(model)[what]()
        assert torch.is_autocast_enabled("cpu")
    assert model.seen == {torch.float32, "ieee"}
    assert settings() == before


def test_logits_do_not_depend_on_the_callers_settings() -> None:
    model, data = Watching(), digits(12)
    plain = evaluate(model, data, ["pgd_sat"])
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.fp32_precision = "bf16"
    with torch.autocast("cpu", torch.bfloat16):
        again = evaluate(model, data, ["pgd_sat"])
    assert again.to_dict() == plain.to_dict()
    assert plain.settings["precision"] == "float32, TF32 off"


@pytest.mark.parametrize(
    ("model", "said", "approximate"),
    [
        (Watching(), "float32, TF32 off", False),
        (Watching(torch.bfloat16), "bfloat16, in the model's own code", True),
        (InBFloat16(), "bfloat16, in the model's own code", True),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "float32, TF32 off", False),
    ],
)
def test_the_report_names_the_dtype_the_model_computes_in(
    model: nn.Module, said: str, approximate: bool
) -> None:
    report = evaluate(model, digits(4), ["fgsm"])
    assert report.settings["precision"] == said
    assert report.approximate is approximate
    assert any("the report has no headline" in flag for flag in report.flags) is approximate


def test_computed_in_takes_the_least_precise_operand_and_no_cast() -> None:
    x = torch.rand(2, 1, 8, 8)

    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.half().float() * 2  # rounds the images, computes in float32

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.half() * 2).double()

    assert computed_in(Casts(), x) == torch.float32
    assert computed_in(Half(), x) == torch.float16
    assert computed_in(nn.Identity(), x) == torch.float32
    assert computed_in(nn.Linear(8, 8).double(), x.double()) == torch.float64

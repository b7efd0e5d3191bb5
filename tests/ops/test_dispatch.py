"""Each backend says which calls it does not support, and the choice follows the order of preference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awnet import ops
from awnet.ops.args import LayerArgs, MixNorm
from awnet.ops.backends.base import Backend
from awnet.ops.dispatch import BACKENDS, available_backends, default_backend, select, select_network

BY_NAME = {backend.name: backend for backend in BACKENDS}


def call(x: Tensor, process_group: str = "") -> LayerArgs:
    table = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    return LayerArgs(x, norm=MixNorm(table, table, table, table, process_group=process_group))


IMAGE = torch.zeros(2, 1, 3, 3)


@pytest.mark.parametrize(
    ("backend", "args", "reason"),
    [
        ("eager", call(IMAGE.double()), None),
        ("reference", call(IMAGE.double()), None),
        ("reference", call(IMAGE, "0"), "it does not implement process groups"),
        ("cpp", call(IMAGE.double()), "it has no float64"),
        ("cpp", call(IMAGE.to("meta")), "it runs on CPUs, and the input is on meta"),
        ("triton", call(IMAGE.to("meta")), "CUDA device"),
        ("cuda", call(IMAGE), "CUDA device"),
    ],
)
def test_a_backend_gives_the_reason_why_it_does_not_support_a_call(
    backend: str, args: LayerArgs, reason: str | None
) -> None:
    got = BY_NAME[backend].not_supported(args)
    assert got is None if reason is None else reason in str(got)


def test_the_first_backend_that_supports_a_call_runs_it() -> None:
    for args in (call(IMAGE), call(IMAGE.double()), call(IMAGE.to("meta"))):
        able = [backend for backend in BACKENDS if backend.not_supported(args) is None]
        assert select(args, None) is able[0]


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``cuda`` and ``triton`` support every call."""
    for name in ("cuda", "triton"):
        monkeypatch.setattr(BY_NAME[name], "not_supported", lambda args: None)


def test_cuda_runs_single_layers_and_triton_frozen_networks(
    with_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = call(IMAGE)
    assert select(args, None).name == "cuda"
    assert select_network(args, None).name == "triton"
    assert default_backend("cpu") == "cuda+triton"
    for name in ("cuda", "triton", "eager"):
        assert select_network(args, name).name == name
        with ops.use_backend(name):
            assert select_network(args, None).name == name
            assert default_backend("cpu") == name
    monkeypatch.setattr(BY_NAME["triton"], "not_supported", lambda args: "a reason")
    assert select_network(args, None).name == "cuda"
    assert default_backend("cpu") == "cuda"


def test_a_named_backend_runs_the_call_or_raises_with_its_reason() -> None:
    args = call(IMAGE.double())
    for backend in BACKENDS:
        reason = backend.not_supported(args)
        if reason is None:
            assert select(args, backend.name) is backend
        else:
            with pytest.raises(ValueError, match=r"cannot run this call: .*; 'eager' can run it") as error:
                select(args, backend.name)
            assert reason in str(error.value)


def test_every_backend_has_a_name_a_summary_and_both_methods() -> None:
    assert len(BY_NAME) == len(BACKENDS)
    assert set(available_backends()) == set(BY_NAME)
    for backend in BACKENDS:
        assert backend.summary
        for method in ("not_supported", "run"):
            assert getattr(type(backend), method) is not getattr(Backend, method)


@pytest.mark.parametrize("backend", ["eager", "cpp", "reference"])
def test_a_tangent_of_any_argument_needs_the_reference(backend: str) -> None:
    if BY_NAME[backend].not_supported(call(IMAGE)) is not None:
        pytest.skip("the backend is not built")
    tables = [torch.ones(1, 1) for _ in range(4)]

    def run(mean: Tensor) -> Tensor:
        return ops.mix_batch_norm(IMAGE, tables[0], tables[1], mean, tables[3], backend=backend)

    with torch.autograd.forward_ad.dual_level():
        mean = torch.autograd.forward_ad.make_dual(tables[2], torch.ones(1, 1))
        if backend == "reference":
            assert torch.autograd.forward_ad.unpack_dual(run(mean)).tangent is not None
        else:
            with pytest.raises(ValueError, match="it has no forward-mode derivative"):
                run(mean)

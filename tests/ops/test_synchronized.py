"""Batch statistics over ranks: two processes with unequal batches equal one process with the whole batch."""

from __future__ import annotations

import datetime
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import start
from support.random_layers import DIFFERENTIABLE, Layer, build, error
from torch import Tensor

from awnet import ops
from awnet.nn import AWConv2d, MixBatchNorm2d, synchronize
from awnet.ops.backends import native

SPLIT = 5  # of 8 samples rank 0 has five, rank 1 three
# clean samples on both ranks, on rank 0 alone, and a rank without any sample
KINDS = ([1, 0, 1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 0, 0, 0, 0])
OF_SAMPLES = ("input", "filter_scale", "is_clean", "residual")


def example(kinds: list[int], scale: str, residual: bool, rows: tuple[int, int], dtype: torch.dtype) -> Layer:
    layer = build(
        torch.Generator().manual_seed(3), True, batch=8, affine_rows=rows[0], statistics_rows=rows[1],
        scale=scale, residual=residual,
    )  # fmt: skip
    layer.tensors["is_clean"][:] = torch.tensor(kinds).bool()
    return layer.rounded(torch.float32).to(dtype)


def examples(dtype: torch.dtype) -> list[Layer]:
    return [
        example(kinds, scale, residual, rows, dtype)
        for kinds in KINDS
        for scale, residual, rows in (
            ("random", True, (2, 2)),
            ("none", False, (2, 1)),
            ("random", False, (1, 1)),
        )
    ]


def step(layer: Layer, samples: slice, backend: str, group: str | None) -> dict[str, Tensor]:
    """Output, gradients and running statistics of the call on ``samples``."""
    tensors = {n: x[samples] if n in OF_SAMPLES else x for n, x in layer.tensors.items()}
    leaves: dict[str, Any] = {"filter_scale": None}
    leaves |= {n: x.clone().requires_grad_(n in DIFFERENTIABLE) for n, x in tensors.items()}
    y = ops.aw_conv2d(**leaves, **layer.options, process_group=group, backend=backend)
    upstream = torch.randn((8, *y.shape[1:]), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = [n for n in DIFFERENTIABLE if n in tensors]
    grads = torch.autograd.grad(y, [leaves[n] for n in names], upstream[samples].to(y))
    gradients = {f"d_{n}": g for n, g in zip(names, grads, strict=True)}
    running = {n: leaves[n].detach() for n in ("running_mean", "running_var")}
    return {"y": y.detach(), **gradients, **running}


def norms(group: str | None, samples: slice) -> list[Tensor]:
    """Two modules, one with a cumulative mean; the second batch lacks a branch on rank 1."""
    torch.manual_seed(0)
    layers = [AWConv2d(3, 4, 3, momentum=None), AWConv2d(3, 4, 3, bn="one", dynamic=False)]
    state_after: list[Tensor] = []
    for layer in layers:
        layer.double()
        synchronize(layer, group)
        for kinds in KINDS:
            x = torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
            layer(x[samples], is_clean=torch.tensor(kinds).bool()[samples])
        state = layer.state_dict()
        assert not any("group" in name for name in state)
        state_after += [x for name, x in state.items() if name.startswith("bn.")]
    return state_after


def rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=number, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    group = dist.group.WORLD.group_name
    results: dict[str, Any] = {
        "norms": norms(group, slice(None, SPLIT) if number == 0 else slice(SPLIT, None))
    }
    for backend, dtype in (("eager", torch.float64), ("eager", torch.float32), ("cpp", torch.float32)):
        if backend == "cpp" and native.load() is not None:
            continue
        for split in (SPLIT, 8):  # with all eight on rank 0, rank 1 has an empty batch
            samples = slice(None, split) if number == 0 else slice(split, None)
            key = f"{backend} {dtype} {split}"
            results[key] = [step(layer, samples, backend, group) for layer in examples(dtype)]
    # one value per channel over all ranks is an error on every one of them; one on each rank is none
    single = torch.ones(1 if number == 0 else 0, 2, 1, 1)
    tables = [torch.ones(1, 2) for _ in range(4)]
    with pytest.raises(ValueError, match="one in a branch over all ranks"):
        ops.mix_batch_norm(single, *tables, training=True, process_group=group)
    ops.mix_batch_norm(torch.rand(1, 2, 1, 1), *tables, training=True, process_group=group)
    torch.save(results, Path(folder) / f"{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    processes = [start(rank, number, str(folder), output=folder / f"{number}.txt") for number in range(2)]
    for number, process in enumerate(processes):
        process.join()
        assert process.exitcode == 0, (folder / f"{number}.txt").read_text()
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


@pytest.mark.parametrize("split", [SPLIT, 8])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("eager", torch.float64), ("eager", torch.float32), ("cpp", torch.float32)]
)
def test_statistics_and_gradients_on_two_ranks_equal_those_of_one_process(
    ranks: list, backend: str, dtype: torch.dtype, split: int
) -> None:
    if backend == "cpp" and native.load() is not None:
        pytest.skip(str(native.load()))
    key = f"{backend} {dtype} {split}"
    for i, layer in enumerate(examples(dtype)):
        exact = step(layer.to(torch.float64), slice(None), "eager", None)
        for name, want in exact.items():
            ours = [rank[key][i][name] for rank in ranks]
            if name.removeprefix("d_") in OF_SAMPLES or name == "y":
                got = torch.cat(ours)
            elif name.startswith("d_"):
                got = ours[0] + ours[1]  # sums over each rank's own samples
            else:
                assert torch.equal(ours[0], ours[1]), name
                got = ours[0]
            # float32: rounding, times the condition of ∂ω and ∂ψ through the statistics of few samples
            assert error(got, want) <= (1e-12 if dtype == torch.float64 else 1e-5), (name, i)


def test_modules_share_statistics_and_counts(ranks: list) -> None:
    for want, *got in zip(norms(None, slice(None)), *(rank["norms"] for rank in ranks), strict=True):
        for actual in got:
            assert error(actual, want) <= 1e-12


def test_synchronize_batch_norms_sets_and_unsets_every_norm() -> None:
    model = torch.nn.Sequential(AWConv2d(3, 4, 3), torch.nn.Sequential(MixBatchNorm2d(4, branches="one")))
    for name in ("0", None):
        synchronize(model, name)
        assert [m.process_group for m in model.modules() if isinstance(m, MixBatchNorm2d)] == [name, name]
    with pytest.raises(TypeError, match="group must be a process group's name or None, got int"):
        synchronize(model, 0)  # type: ignore[arg-type]


def test_an_unknown_process_group_is_an_error() -> None:
    x, tables = torch.rand(4, 2, 3, 3), [torch.ones(1, 2) for _ in range(4)]
    for backend in ("eager", "cpp"):
        if backend == "cpp" and native.load() is not None:
            continue
        with pytest.raises(ValueError, match="process_group 'nonsense' is not the name of a process group"):
            ops.mix_batch_norm(x, *tables, training=True, process_group="nonsense", backend=backend)
    with pytest.raises(ValueError, match=r"reference.*does not implement process groups"):
        ops.mix_batch_norm(x, *tables, training=True, process_group="0", backend="reference")
    with pytest.raises(TypeError, match="process_group must be a group's name or None, got 3"):
        ops.mix_batch_norm(x, *tables, training=True, process_group=3)  # type: ignore[arg-type]
    # eval mode ignores the group
    ops.mix_batch_norm(x, *tables, process_group="nonsense")


def test_the_collectives_are_one_forward_and_one_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_module = importlib.import_module("awnet.ops.autograd")
    calls: list[str] = []
    monkeypatch.setattr(
        layer_module, "joined_statistics", lambda actual, group: calls.append("joined_statistics") or actual
    )
    monkeypatch.setattr(layer_module, "summed", lambda x, group: calls.append("summed") or x)
    layer = examples(torch.float64)[0]
    alone = step(layer, slice(None), "eager", None)
    assert calls == []
    shared = step(layer, slice(None), "eager", "any")
    assert calls == ["joined_statistics", "summed"]
    assert all(error(shared[name], alone[name]) < 1e-14 for name in alone)

"""The host never waits for the device within an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_training import SPLITS, dynamic_net, quick, static_net
from torch.utils._python_dispatch import TorchDispatchMode

from awnet.training import (
    RECIPES,
    train,
)
from awnet.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: scalars read, sizes that depend on values, and copies
    to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        to_host = kwargs.get("device") == torch.device("cpu") and name == "_to_copy"
        if to_host or name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"):
            self.found.append(name)
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", ["mtard", "trades", "pgd_at", "standard"])
def test_the_host_never_waits_within_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From the second step to the one before the epoch's end: the first may set things up."""
    reads, python = HostReads(), []
    for method in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        usual = getattr(torch.Tensor, method)

        def counted(self: torch.Tensor, *args: Any, _usual: Any = usual, _name: str = method) -> Any:
            if active:
                python.append(_name)
            return _usual(self, *args)

        monkeypatch.setattr(torch.Tensor, method, counted)
    active: list[int] = []
    step = TrainingStep.__call__
    calls = 0

    def watched(self: TrainingStep, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            active.append(1)
            reads.__enter__()
        terms = step(self, *args)
        if calls == 6:
            reads.__exit__(None, None, None)
            active.clear()
        return terms

    monkeypatch.setattr(TrainingStep, "__call__", watched)
    recipe = quick(RECIPES[name], epochs=1, batch_size=6, log_every=100)  # eight steps
    teachers = (static_net(), static_net()) if name == "mtard" else None
    train(recipe, dynamic_net(), SPLITS, tmp_path, teachers=teachers, quiet=True, tensorboard=False)
    assert calls == 8
    assert reads.found == python == []
    with reads:
        assert torch.ones(1).item() == 1  # it does see a read
    assert reads.found == ["_local_scalar_dense"]

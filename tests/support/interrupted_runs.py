"""Small runs that are stopped at a chosen step, and the comparison of two run folders."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from awnet.data import Splits, from_arrays
from awnet.nn import AdversarialRouter, AWNet, Backbone
from awnet.training import MTARD, RunResult, read_log, train
from awnet.training import checkpoint as C
from awnet.training import losses as L

K, STEPS = 3, 4  # classes, steps an epoch


def model(seed: int = 0) -> nn.Module:
    """A small AW-Net with dropout, which draws from torch's own generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dynamic = Backbone("basic", [1], [4], num_classes=K, in_channels=1)
        router = AdversarialRouter(dynamic.signal_widths, in_channels=1, widths=(4,), blocks=(1,))
        dynamic.classifier = nn.Sequential(nn.Dropout(0.3), dynamic.classifier)  # type: ignore[assignment, arg-type]
        return AWNet(dynamic, router)


def teacher(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, K))


def make_splits(seed: int = 0) -> Splits:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, n in (("train", 4 * STEPS - 1), ("validation", 6), ("test", 6)):
        x = torch.randint(0, 256, (n, 1, 4, 4), generator=generator).to(torch.uint8)
        parts.append(
            from_arrays(x, torch.arange(n) % K, name="noise", split=name, eps=0.05, shift=1, flip=True)
        )
    return Splits(*parts)


SPLITS = make_splits()


TEACHERS = (teacher(1), teacher(2))


# what happens inside a run's loss at a step, counted from 1 over all the process; reset by each test
PLAN: dict[str, Any] = {"step": 0, "at": None, "do": None}


def planned(*arguments: Any) -> L.LossResult:
    PLAN["step"] += 1
    if PLAN["step"] == PLAN["at"]:
        PLAN["do"]()
    return L.mtard(*arguments)


@dataclass(frozen=True)
class Planned(MTARD):
    """MTARD in all but the interruption that ``PLAN`` holds."""

    loss: ClassVar[L.Loss] = staticmethod(planned)


RECIPE = Planned(
    epochs=3,
    batch_size=4,
    attack_steps=1,
    log_every=3,
    lr=0.05,
    milestones=(1, 2),
    weight_lr=0.5,
)


def go(out: Path, recipe: MTARD = RECIPE, **options: Any) -> RunResult:
    settings: dict[str, Any] = {"teachers": TEACHERS, "seed": 5, "quiet": True, "tensorboard": False}
    return train(recipe, model(), options.pop("splits", SPLITS), out, **(settings | options))


def stop_at(step: int | None, do: Callable[[], None] | None = None) -> None:
    PLAN.update(step=0, at=step, do=do)


@pytest.fixture
def signals_act() -> Iterator[None]:
    """SIGINT and SIGHUP as in a terminal, also where the tests run in the background or under nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stop_at(None)
    return go(tmp_path_factory.mktemp("whole") / "run").folder


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records]


def assert_same(one: Any, two: Any, path: str = "state") -> None:
    """Bitwise, all the way down."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), path
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for name in one:
            if name not in ("seconds", "log_bytes"):  # of the clock, and of the digits it takes
                assert_same(one[name], two[name], f"{path}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), path
        for i, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{path}[{i}]")
    else:
        assert one == two, path


def assert_same_run(whole: Path, resumed: Path) -> None:
    assert_same(C.load_state(whole), C.load_state(resumed))
    assert timeless(read_log(whole)) == timeless(read_log(resumed))
    for name in ("last.safetensors", "best.safetensors"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def crash() -> None:
    raise MemoryError("something fell")


def newest(run: Path) -> int:
    return max((int(path.stem[5:]) for path in C.states(run)), default=-1)

"""The training step against plain torch; a step that is not finite changes nothing."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.training_step import (
    CPU,
    QUICK,
    K,
    batch,
    broken,
    dynamic,
    everything,
    linear,
    made,
    same,
    shifted,
    splits,
)
from torch import Tensor, nn

from awnet.attacks import GraphedPGD
from awnet.data import Splits, ThreatModel, dataset, load_dataset
from awnet.data.dataset import Batch
from awnet.distributed import Ranks
from awnet.models import create_model, load_model
from awnet.run_config import read_config
from awnet.training import MTARD, PGDAT, Standard, Teachers, checkpoint, read_log, train
from awnet.training.step import Average, TrainingStep, numerics
from awnet.training.teachers import TeacherModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_a_training_step_equals_plain_torch() -> None:
    model = linear().double()
    other = copy.deepcopy(model)
    step = made(PGDAT(lr=0.3, momentum=0.9, weight_decay=0.01, milestones=(1,)), model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01, foreach=False)
    for i in range(7):  # past the milestone, after the fifth
        data = batch(seed=i, dtype=torch.float64)
        terms = step(data, shifted)
        for group in optimizer.param_groups:
            group["lr"] = 0.3 if i < 5 else 0.03
        optimizer.zero_grad()
        clean, adversarial = other(data.x), other(shifted(data.x, data.y, index=data.index))
        loss = 0.5 * F.cross_entropy(clean, data.y) + 0.5 * F.cross_entropy(adversarial, data.y)
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in other.parameters()]).norm()
        optimizer.step()
        assert terms["total"].item() == pytest.approx(loss.item(), rel=1e-12)
        assert terms["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-12)
        assert terms["skipped"].item() == 0
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)  # float64, another order of sums


@pytest.mark.parametrize("when", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing_but_the_schedule(when: int) -> None:
    recipe = MTARD(lr=0.1, schedule="onecycle", ema_decay=0.9, clip_norm=1.0, epochs=2)
    step = made(recipe, dynamic(), teachers=Teachers(linear(), linear()))
    for i in range(when):
        step(batch(seed=i), shifted)
    before, rate = everything(step), step.optimizer.param_groups[0]["lr"]
    terms = step(batch(seed=5), broken)
    assert terms["skipped"].item() == 1
    assert not terms["grad_norm"].isfinite()
    assert same(before, everything(step))
    assert step.optimizer.param_groups[0]["lr"] != rate
    assert step(batch(seed=6), shifted)["skipped"].item() == 0
    after = everything(step)
    assert all(value.isfinite().all() for value in after)
    assert not same(before, after)


def test_a_skipped_step_does_not_change_later_steps() -> None:
    model = dynamic()
    whole, part = (made(PGDAT(milestones=()), copy.deepcopy(model)) for _ in range(2))
    for i in range(3):
        if i != 1:
            part(batch(seed=i), shifted)
            whole(batch(seed=i), shifted)
        else:
            whole(batch(seed=i), broken)
    assert same(everything(whole), everything(part))


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too() -> None:
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * torch.inf

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear()

        def forward(self, x: Tensor) -> Tensor:
            return Steep.apply(self.net(x))  # type: ignore[no-any-return, no-untyped-call]

    step = made(Standard(), Model())
    before = everything(step)
    terms = step(batch(), shifted)
    assert terms["total"].isfinite()
    assert terms["skipped"].item() == 1
    assert same(before, everything(step))


def test_micro_batches_add_up_to_the_batch() -> None:
    model = linear().double()
    whole, parts = (made(PGDAT(accumulate=n, clip_norm=0.01), copy.deepcopy(model)) for n in (1, 4))
    for i in range(3):
        data = batch(10, seed=i, dtype=torch.float64)  # 3 + 3 + 2 + 2
        one, other = whole(data, shifted), parts(data, shifted)
        for name in ("total", "nat", "adv", "grad_norm"):
            assert other[name].item() == pytest.approx(one[name].item(), rel=1e-9), name
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)  # float64, another order of sums
    assert parts(batch(2, dtype=torch.float64), shifted)["skipped"].item() == 0  # fewer samples than pieces


def test_micro_batches_together_move_mtards_weights_as_far_as_a_batch() -> None:
    recipe = MTARD(weight_lr=0.2, accumulate=2)
    step = made(recipe, dynamic(), teachers=Teachers(linear(), linear()))
    assert step.weights is not None
    assert step.weights.learning_rate == pytest.approx(0.1)
    assert step(batch(), shifted)["w_nat"].dim() == 0


def test_a_long_gradient_is_cut_to_clip_norm() -> None:
    recipe = Standard(lr=1.0, momentum=0.0, weight_decay=0.0)
    data, model = batch(), linear()
    moved = []
    for clip in (None, 1e-3, 1e3):
        one = copy.deepcopy(model)
        terms = made(replace(recipe, clip_norm=clip), one)(data, shifted)
        steps = [b - a for a, b in zip(model.parameters(), one.parameters(), strict=True)]
        moved.append(torch.cat([s.detach().flatten() for s in steps]).norm().item())
        assert terms["grad_norm"].item() == pytest.approx(moved[0], rel=1e-4)
    assert moved[1] == pytest.approx(1e-3, rel=1e-3)  # differences of float32 weights near 0.3
    assert moved[2] == moved[0]


def test_the_average_follows_its_recurrence() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double()
    average = Average(model, decay=0.6)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for n in range(1, 9):
        with torch.no_grad():
            for value in model.state_dict().values():
                value += torch.randn_like(value) if value.is_floating_point() else 1
        skip = n == 4
        count = n if n < 4 else n - 1
        average.update(model, torch.tensor(skip))
        if skip:  # the step would have left the model as it was; here the average alone must stand
            expected["1.num_batches_tracked"] = model.state_dict()["1.num_batches_tracked"].clone()
        else:
            rate = max(0.4, 9 / (count + 9))
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    expected[name] += rate * (value - expected[name])
                else:
                    expected[name] = value.clone()
        for name, value in average.module.state_dict().items():
            assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-6), name  # rates are float32
    assert not average.module.training
    assert not any(p.requires_grad for p in average.module.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema_decay": 0.9, "accumulate": 2, "clip_norm": 0.5},
        {"awp": 0.01, "temperature_lr": 0.1, "nesterov": True, "accumulate": 2, "ema_decay": 0.9},
    ],
)
def test_a_resumed_step_computes_the_same_bits(settings: dict[str, Any]) -> None:
    recipe = MTARD(epochs=2, schedule="onecycle", **settings)
    teachers = Teachers(linear(), linear())
    one = made(recipe, dynamic(), teachers=teachers)
    for i in range(3):
        one(batch(seed=i), shifted)
    two = made(recipe, dynamic(), teachers=teachers)
    two.model.load_state_dict(copy.deepcopy(one.model.state_dict()))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for i in range(3, 6):
        actual = [step(batch(seed=i), shifted) for step in (one, two)]
        assert all(torch.equal(value, actual[1][name]) for name, value in actual[0].items())
    assert same(everything(one), everything(two))


def test_auto_chooses_precision_and_layout_by_device() -> None:
    cuda = torch.device("cuda")
    assert numerics(PGDAT(), CPU) == ("float32", "nchw", "float32")
    assert numerics(PGDAT(), cuda) == ("bfloat16", "channels_last", "bfloat16")
    assert numerics(PGDAT(precision="bfloat16"), CPU) == ("bfloat16", "channels_last", "bfloat16")
    assert numerics(PGDAT(precision="float32", layout="nchw"), cuda) == ("float32", "nchw", "float32")
    assert numerics(PGDAT(precision="bfloat16", layout="nchw"), CPU) == ("bfloat16", "nchw", "bfloat16")
    assert numerics(PGDAT(attack_precision="bfloat16"), CPU) == ("float32", "nchw", "bfloat16")
    assert numerics(PGDAT(attack_precision="float32"), cuda) == ("bfloat16", "channels_last", "float32")


def test_a_run_states_and_stores_its_precision_and_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = load_dataset("digits")
    few = Splits(splits.train.subset(32), splits.validation.subset(16), splits.test)
    recipe = PGDAT(
        epochs=1,
        batch_size=16,
        attack_steps=1,
        milestones=(),
        precision="bfloat16",
        layout="channels_last",
    )
    train(recipe, "resnet_tiny", few, tmp_path / "run")
    assert "bfloat16, channels_last" in " ".join(capsys.readouterr().out.split())
    session = read_config(tmp_path / "run")["sessions"][0]["environment"]
    assert (session["precision"], session["layout"]) == ("bfloat16", "channels_last")


def test_bfloat16_computes_but_does_not_store() -> None:
    model = create_model("awnet_tiny", in_channels=1, num_classes=K)
    plain, low = (made(PGDAT(precision=p), copy.deepcopy(model)) for p in ("float32", "bfloat16"))
    for i in range(2):
        one, other = plain(batch(seed=i), shifted), low(batch(seed=i), shifted)
    assert all(v.dtype != torch.bfloat16 for v in everything(low))
    assert all(term.dtype == torch.float32 for term in other.values())
    # 8 bits of mantissa through some ten layers
    assert other["total"].item() == pytest.approx(one["total"].item(), rel=0.05)
    assert other["total"].item() != one["total"].item()


@pytest.mark.parametrize("attack_precision", ["float32", "bfloat16"])
def test_the_attack_and_the_training_pass_have_separate_precisions(attack_precision: str) -> None:
    other = "float32" if attack_precision == "bfloat16" else "bfloat16"
    recipe = PGDAT(precision=other, attack_precision=attack_precision, attack_steps=2)
    model = create_model("awnet_tiny", in_channels=1, num_classes=K)
    expected = recipe.attack(copy.deepcopy(model).eval(), ThreatModel(0.15), K, seed=0)
    assert expected.dtype == (torch.bfloat16 if attack_precision == "bfloat16" else None)
    states = []

    def attack(x: Tensor, y: Tensor, *, index: Tensor) -> Tensor:
        states.append(torch.is_autocast_enabled("cpu"))
        x_adv = expected(x, y, index=index)
        assert x_adv.dtype == x.dtype
        return x_adv

    one = made(recipe, model)
    hook = model.register_forward_pre_hook(lambda *_: states.append(torch.is_autocast_enabled("cpu")))
    one(batch(), attack)
    hook.remove()
    assert states == [attack_precision == "bfloat16", other == "bfloat16"]


def test_channels_last_gives_what_nchw_gives() -> None:
    model = create_model("awnet_tiny", in_channels=3, num_classes=K).double()
    x = torch.rand(10, 3, 8, 8, dtype=torch.float64)
    data = Batch(x, torch.arange(10) % K, torch.arange(10))
    plain, last = (made(PGDAT(layout=name), copy.deepcopy(model)) for name in ("nchw", "channels_last"))
    stem = last.model.dynamic.stem.weight
    assert stem.is_contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        one, other = (step(data, lambda x, y, index: 0.9 * x) for step in (plain, last))
        assert other["total"].item() == pytest.approx(one["total"].item(), rel=1e-8)
    for a, b in zip(everything(plain), everything(last), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=1e-8)  # float64, another order of sums
    # and a state of one layout resumes in the other
    last.load_state_dict(copy.deepcopy(plain.state_dict()))
    momentum = last.optimizer.state[stem]["momentum_buffer"]
    assert momentum.stride() == stem.stride()
    last(data, lambda x, y, index: x)


def test_a_step_is_skipped_if_any_rank_is_not_finite() -> None:
    seen: list[tuple[int, int]] = []

    def other_rank_is_broken(tensors: Sequence[Tensor], images: int) -> None:
        seen.append((len(tensors), images))
        tensors[-1].add_(torch.nan)

    step = made(Standard(), linear(), average=other_rank_is_broken)
    before = everything(step)
    assert step(batch(), shifted)["skipped"].item() == 1
    assert seen == [(5, 1)]  # four gradients and the loss
    assert same(before, everything(step))


def test_teachers_answer_in_the_steps_precision() -> None:
    teacher = create_model("resnet_tiny", in_channels=1, num_classes=K).eval()
    x = torch.rand(5, 1, 8, 8)
    recipe = MTARD(adv_weight=0.5)
    plain = made(recipe, dynamic(), teachers=Teachers(copy.deepcopy(teacher), copy.deepcopy(teacher)))
    low = made(
        replace(recipe, precision="bfloat16"), dynamic(), teachers=Teachers(teacher, copy.deepcopy(teacher))
    )
    assert plain.teachers is not None
    assert low.teachers is not None
    exact, rounded = plain.teachers.clean(x), low.teachers.clean(x)
    assert not exact.requires_grad
    assert torch.allclose(rounded, exact, atol=0.05)  # 8 bits of mantissa
    assert not torch.equal(rounded, exact)
    assert rounded.dtype == torch.float32
    assert low.teachers.clean.copy.image_dtype == torch.bfloat16
    few = plain.teachers.clean(x[:2])  # nothing is left of the batch before
    for got, images in ((exact, x), (few, x[:2])):
        # the same sums in another order
        assert torch.allclose(got, teacher(images), rtol=1e-5, atol=1e-5)


def test_a_teacher_without_a_frozen_copy_is_changed_itself() -> None:
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, K))
    exact = TeacherModel(teacher, nullcontext, False, torch.contiguous_format)
    x = torch.rand(5, 1, 8, 8)
    wanted = exact(x)
    assert torch.equal(wanted, teacher(x))
    assert not teacher.training
    bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)
    low = TeacherModel(teacher, bfloat16, True, torch.channels_last)
    assert teacher[0].weight.dtype == teacher[3].weight.dtype == torch.bfloat16
    assert teacher[1].weight.dtype == torch.float32
    rounded = low(x)
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, wanted, atol=0.05)  # 8 bits of mantissa
    assert not torch.equal(rounded, wanted)


# --- in the loop


class Breaks(nn.Sequential):
    """Gives NaN in the training passes whose numbers, from 1, are in ``when``."""

    def __init__(self, when: range) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, K))
        self.when, self.passes = when, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        return super().forward(x) * (torch.nan if self.training and self.passes in self.when else 1.0)


def test_a_run_leaves_out_a_step_that_is_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(Standard(epochs=4, **QUICK), Breaks(range(5, 6)), splits(), tmp_path, tensorboard=False)
    epochs = read_log(tmp_path, "epoch")
    assert [record["skipped_steps"] for record in epochs] == [0, 1, 1, 1]
    assert "not finite, skipped step 5 (epoch 2): total nan" in capsys.readouterr().out
    assert all(abs(record["total"]) < 100 for record in epochs)


def test_a_run_of_steps_that_are_not_finite_ends(tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"10 steps in a row, last step 14 \(epoch 5\): total nan"
    ) as e:
        train(Standard(epochs=9, **QUICK), Breaks(range(5, 99)), splits(), tmp_path, quiet=True)
    assert "lr is 0.05" in str(e.value)
    state = checkpoint.load_state(tmp_path)
    assert (state["skipped"], state["skipped_in_a_row"]) == (8, 8)  # at the checkpoint of the fourth epoch
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_run_validates_and_saves_the_average(tmp_path: Path) -> None:
    parts = splits()
    recipe = PGDAT(epochs=2, attack_steps=1, ema_decay=0.99, **QUICK)
    result = train(recipe, "resnet_tiny", parts, tmp_path, quiet=True, tensorboard=False)
    state = checkpoint.load_state(tmp_path)
    last = load_model(tmp_path / "last.safetensors").state_dict()
    average = state["average"]["model"]
    assert all(torch.equal(value, average[name]) for name, value in last.items())
    assert any(not torch.equal(value, state["model"][name]) for name, value in last.items())
    assert result.history[-1]["clean_accuracy"] >= 0
    again = train(recipe, "resnet_tiny", parts, tmp_path, resume=True, quiet=True, tensorboard=False)
    assert all(torch.equal(v, result.model.state_dict()[n]) for n, v in again.model.state_dict().items())


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_drops_its_graphs_before_the_process_group_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """NCCL hangs if a process group is destroyed while a graph with its collectives exists."""
    order: list[str] = []

    @contextmanager
    def joined(device: torch.device) -> Iterator[Ranks]:
        try:
            yield Ranks(torch.device("cpu"))
        finally:
            order.append("group destroyed")

    def closing(kind: type) -> None:
        close = kind.close

        def closed(self: Any) -> None:
            order.append(kind.__name__)
            close(self)

        monkeypatch.setattr(kind, "close", closed)

    for kind in (TrainingStep, TeacherModel, GraphedPGD):
        closing(kind)
    monkeypatch.setattr(sys.modules["awnet.training.train"], "joined", joined)
    recipe = MTARD(epochs=1, attack_steps=1, validate_limit=2, **QUICK)
    if fails:
        monkeypatch.setattr("awnet.training.step.TrainingStep.start_epoch", lambda self, epoch: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        train(recipe, linear(), splits(), tmp_path, teachers=[linear(), linear()], quiet=True)
    assert sorted(order[:-1]) == ["GraphedPGD", "TeacherModel", "TeacherModel", "TrainingStep"]
    assert order[-1] == "group destroyed"


def test_the_memory_of_the_images_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for memory in ("device", "host"):
        monkeypatch.setattr(dataset, "is_resident", lambda images, device, memory=memory: memory == "device")
        torch.manual_seed(3)
        recipe, model = PGDAT(epochs=2, attack_steps=1, **QUICK), linear()
        folder = tmp_path / memory
        train(recipe, model, splits(), folder, data_memory=memory, quiet=True, tensorboard=False)
        states.append(list(model.state_dict().values()))
    assert same(*states)

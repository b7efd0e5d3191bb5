"""A training step as a CUDA graph: the same results, its cache, and what it needs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.fake_cuda import Recorder
from support.training_step import (
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
from torch import Tensor

from awnet.attacks import named_attack
from awnet.data.dataset import Batch
from awnet.distributed import Ranks
from awnet.evaluation import robust_correct
from awnet.models import create_model
from awnet.nn import synchronize
from awnet.run_config import read_config
from awnet.training import MTARD, PGDAT, Standard, Teachers, recipe_for, train
from awnet.training.step import TrainingStep, captures
from awnet.training.teachers import TeacherModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_a_captured_step_equals_the_step() -> None:
    recorder = Recorder()
    recipe = MTARD(epochs=2, milestones=(1,), ema_decay=0.9, clip_norm=1.0, weight_lr=0.3)
    model, teachers = dynamic(), Teachers(linear(), linear())
    plain = made(recipe, copy.deepcopy(model), teachers=teachers)
    captured = made(replace(recipe, capture=True), model, teachers=teachers, record=recorder)
    for i in range(9):
        if i == 5:
            for step in (plain, captured):
                step.start_epoch(1)  # past the milestone
        data = batch(7 if i == 4 else 10, seed=i)  # an epoch's last batch is smaller
        attack = broken if i == 3 else shifted
        one, other = plain(data, attack), captured(data, attack)
        assert {n: v.item() for n, v in other.items()} == pytest.approx(
            {n: v.item() for n, v in one.items()}, nan_ok=True, rel=1e-6
        )  # float32, whatever the term's dtype
        assert captured.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]
    assert len(recorder.recorded) == 1  # the graph reads the learning rate of MTARD's weights
    for a, b in zip(everything(plain), everything(captured), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=1e-6)  # a rate in float32


def test_a_captured_step_averages_over_ranks_and_weighs_each_batch() -> None:
    """The collectives are in the graph, which reads the batch's weight at each replay."""
    recorder, recipe, calls, models = Recorder(), MTARD(weight_lr=0.3), [0, 0], [dynamic()]
    models.append(copy.deepcopy(models[0]))
    steps = []
    for number, model in enumerate(models):

        def average(tensors: Sequence[Tensor], count: int, number: int = number) -> None:
            calls[number] += 1
            for tensor in tensors:
                tensor.mul_(0.5)  # as if another rank had a gradient of zero

        options = {"teachers": Teachers(linear(), linear()), "average": average, "record": recorder}
        steps.append(made(replace(recipe, capture=number == 1), model, **options))
    steps[1].teachers = steps[0].teachers
    for i, weight in enumerate((1.0, 1.0, 1.2, 0.8)):
        one, other = (step(batch(seed=i), shifted, weight) for step in steps)
        assert other["total"].item() == pytest.approx(one["total"].item(), rel=1e-6)  # float32
    assert len(recorder.recorded) == 1
    assert calls[0] == calls[1] == 8  # the gradients, and MTARD's losses
    for a, b in zip(everything(steps[0]), everything(steps[1]), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=1e-6)  # a rate in float32


def test_a_step_is_captured_by_default_where_it_can_be() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert MTARD().capture == "auto"
    assert captures(MTARD(), cuda)
    assert not captures(MTARD(), cpu)
    assert not captures(MTARD(accumulate=2), cuda)
    assert not captures(MTARD(capture=False), cuda)
    assert not captures(recipe_for("advmoe", "cifar10"), cuda)  # a step of two updates
    assert made(MTARD(), dynamic(), teachers=Teachers(linear(), linear())).graphed is None
    with pytest.raises(ValueError, match="capture must not be True"):
        recipe_for("advmoe", "cifar10", capture=True)


def test_a_run_resumes_with_another_choice_of_capture(tmp_path: Path) -> None:
    recipe = Standard(epochs=2, capture=False, **QUICK)
    train(recipe, linear(), splits(), tmp_path, quiet=True, tensorboard=False, max_minutes=1e-9)
    stored = read_config(tmp_path)
    assert stored["recipe"]["capture"] is False
    assert stored["sessions"][0]["environment"]["capture"] is False
    again = replace(recipe, capture="auto")
    assert train(again, linear(), splits(), tmp_path, resume=True, quiet=True, tensorboard=False).finished
    with pytest.raises(ValueError, match="momentum"):
        train(replace(again, momentum=0.5), linear(), splits(), tmp_path, resume=True, quiet=True)


def test_capture_needs_a_gpu_and_whole_batches() -> None:
    with pytest.raises(ValueError, match="capture needs a CUDA device"):
        made(Standard(capture=True), linear())
    with pytest.raises(ValueError, match="exclude each other"):
        Standard(capture=True, accumulate=2)


def test_a_closed_step_holds_no_graph_and_can_continue() -> None:
    recorder = Recorder()
    recipe, teachers = MTARD(epochs=2), Teachers(linear(), linear())
    model = dynamic()
    plain = made(recipe, copy.deepcopy(model), teachers=teachers)
    captured = made(replace(recipe, capture=True), model, teachers=teachers, record=recorder)
    for i in range(6):
        one, other = plain(batch(seed=i), shifted), captured(batch(seed=i), shifted)
        assert other["total"].item() == pytest.approx(one["total"].item(), rel=1e-6)  # float32
        if i == 2:
            graph = weakref.ref(recorder.recorded.pop())
            captured.close()
            assert graph() is None
    assert len(recorder.recorded) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["awnet_tiny", "resnet_tiny"])
def test_on_a_gpu_a_captured_step_equals_the_step(name: str) -> None:
    device = torch.device("cuda")
    model = create_model(name, num_classes=K).to(device)
    teacher = create_model("resnet_tiny", num_classes=K).to(device)
    recipe = MTARD(epochs=2, ema_decay=0.9, precision="float32", layout="nchw")
    steps = []
    for capture in (False, True):
        teachers = Teachers(copy.deepcopy(teacher), copy.deepcopy(teacher))
        step = TrainingStep(replace(recipe, capture=capture), copy.deepcopy(model), device, 6, teachers)
        step.start_epoch(0)
        steps.append(step)
    graphed = steps[1].graphed
    assert graphed is not None
    for i in range(6):
        generator = torch.Generator(device).manual_seed(i)
        x = torch.rand(16, 3, 8, 8, device=device, generator=generator)
        data = Batch(x, torch.arange(16, device=device) % K, torch.arange(16, device=device))
        terms = [step(data, lambda x, y, index: 0.9 * x) for step in steps]
        assert terms[1]["total"].item() == pytest.approx(terms[0]["total"].item(), rel=1e-4)
    assert graphed.cache.refusal is None
    assert len(graphed.cache) == 1  # it was captured
    for a, b in zip(everything(steps[0]), everything(steps[1]), strict=True):
        # atomics in cuDNN's weight gradients, through six steps at a rate of 0.1
        assert torch.allclose(a.double(), b.double(), rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_step_holds_its_collectives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL in a process group of one rank: averages and statistics over all ranks are those of this rank."""
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    steps: list[TrainingStep] = []
    try:
        ranks = Ranks(device, 0, 2, dist.group.WORLD)  # a size above 1, so that it does average
        made, reduce = [0], dist.all_reduce

        def counted(*arguments: Any, **options: Any) -> Any:
            made[0] += 1
            return reduce(*arguments, **options)

        monkeypatch.setattr(dist, "all_reduce", counted)
        model = create_model("awnet_tiny", num_classes=K).to(device)
        teacher = create_model("resnet_tiny", num_classes=K).to(device)
        recipe = MTARD(epochs=2, precision="float32", layout="nchw")
        for capture, average in ((False, None), (True, ranks.mean)):
            own = copy.deepcopy(model)
            synchronize(own, None if average is None else ranks.group_name)
            teachers = Teachers(copy.deepcopy(teacher), copy.deepcopy(teacher))
            step = TrainingStep(replace(recipe, capture=capture), own, device, 6, teachers, average=average)
            step.start_epoch(0)
            steps.append(step)
        counts = []
        for i in range(6):
            x = torch.rand(16, 3, 8, 8, device=device, generator=torch.Generator(device).manual_seed(i))
            data = Batch(x, torch.arange(16, device=device) % K, torch.arange(16, device=device))
            terms = [step(data, lambda x, y, index: 0.9 * x) for step in steps]
            counts.append(made[0])
            assert terms[1]["total"].item() == pytest.approx(terms[0]["total"].item(), rel=1e-4)
        graphed = steps[1].graphed
        assert graphed is not None
        assert graphed.cache.refusal is None
        assert len(graphed.cache) == 1
        assert counts[0] < counts[1] < counts[2] == counts[5]  # plain twice, captured, then only replayed
        for a, b in zip(everything(steps[0]), everything(steps[1]), strict=True):
            # atomics in cuDNN's weight gradients, through six steps at a rate of 0.1
            assert torch.allclose(a.double(), b.double(), rtol=0, atol=1e-3)
    finally:
        for step in steps:
            step.close()
        dist.destroy_process_group()


@pytest.mark.gpu
def test_on_a_gpu_a_step_runs_in_bfloat16_and_a_broken_one_changes_nothing() -> None:
    device = torch.device("cuda")
    model = create_model("awnet_tiny", num_classes=K).to(device)
    teachers = Teachers(*(create_model("resnet_tiny", num_classes=K).to(device) for _ in range(2)))
    step = TrainingStep(MTARD(ema_decay=0.9), model, device, 6, teachers)
    step.start_epoch(0)
    assert step.numerics == ("bfloat16", "channels_last")
    x, y = torch.rand(16, 3, 8, 8, device=device), torch.arange(16, device=device) % K
    data = Batch(x, y, torch.arange(16, device=device))
    for attack, skipped in ((lambda x, y, index: 0.9 * x, 0), (broken, 1), (lambda x, y, index: 0.8 * x, 0)):
        before = everything(step)
        assert step(data, attack)["skipped"].item() == skipped
        assert same(before, everything(step)) == bool(skipped)
    assert isinstance(step.teachers.clean, TeacherModel)  # type: ignore[union-attr]
    assert len(step.teachers.clean.graphed.cache)  # type: ignore[union-attr]


@pytest.mark.gpu
def test_on_a_gpu_a_teachers_graphs_of_two_batch_sizes_keep_apart() -> None:
    teacher = create_model("resnet_tiny", num_classes=K).cuda()
    inference = TeacherModel(teacher, nullcontext, False, torch.contiguous_format)
    for _ in range(5):  # plain, plain (the first size), captured, replayed
        for size in (6, 3):
            x = torch.rand(size, 3, 8, 8, device="cuda")
            want = teacher(x)
            assert torch.allclose(inference(x), want, rtol=1e-3, atol=1e-3)  # tensor cores' 10 bits


@pytest.mark.gpu
def test_on_a_gpu_a_run_validates_as_an_evaluation_does(tmp_path: Path) -> None:
    parts = splits()
    recipe = PGDAT(epochs=2, attack_steps=1, precision="float32", **QUICK)
    result = train(recipe, "awnet_tiny", parts, tmp_path, device="cuda", quiet=True, tensorboard=False)
    attack = named_attack("pgd_trades", result.model, parts.validation.threat_model, seed=0)
    correct = robust_correct(result.model, parts.validation, attack, device="cuda")
    # one of the 6 images may turn over by the rounding of another algorithm
    assert abs(float(correct.float().mean()) - result.validation["robust_accuracy"]) < 1.5 / 6

"""Runs on two processes: they train as one process does, and a signal to one stops both."""

from __future__ import annotations

import os
import re
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.two_ranks import on_two_ranks, torchrun
from torch import Tensor, nn

from awnet import rng
from awnet.data import Splits, from_arrays, load_dataset
from awnet.data.dataset import Batch
from awnet.distributed import Agreement, Ranks, joined
from awnet.models import create_model
from awnet.nn import AdversarialRouter, AWNet, Backbone
from awnet.training import MTARD, PGDAT, Recipe, Standard, Teachers, Trades, read_log, train
from awnet.training import checkpoint as C
from awnet.training.setup import synchronized
from awnet.training.step import TrainingStep

CPU = torch.device("cpu")
# where a subprocess finds this module and tests/support
IMPORT_PATH = [str(path) for path in Path(__file__).resolve().parents[:2]]
K = 3


pytestmark = pytest.mark.usefixtures("one_thread")


# --- what each rank does; one process alone does the same


def plain_net(seed: int = 0) -> nn.Module:
    """A network without a batch norm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, K))


def splits(train: int = 23) -> Splits:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for name, n in (("train", train), ("validation", 11), ("test", 6)):
        x = torch.randint(0, 256, (n, 1, 4, 4), generator=generator).to(torch.uint8)
        parts.append(from_arrays(x, torch.arange(n) % K, name="noise", split=name, eps=0.05, shift=1))
    return Splits(*parts)


def steps_in_float64(
    ranks: Ranks, make: Callable[[], nn.Module], recipe: Recipe, images: int, steps: int
) -> dict[str, Tensor]:
    """Trains some steps on digits, with the attack; returns weights, statistics and momentum."""
    data = load_dataset("digits").train.subset(images)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
        teachers = Teachers(*(create_model("resnet_tiny", in_channels=1).double().eval() for _ in range(2)))
    average = ranks.mean if ranks.size > 1 else None
    with synchronized(model, ranks):
        step = TrainingStep(recipe, model, CPU, -(-images // recipe.batch_size), teachers, average=average)
        done = 0
        for epoch in range(recipe.epochs):
            step.start_epoch(epoch)
            key = rng.key(0, "training attack", epoch)
            attack = recipe.attack(model, data.threat_model, data.num_classes, key)
            part = (ranks.rank, ranks.size)
            batches = data.batches(recipe.batch_size, shuffle=True, augment=True, epoch=epoch, part=part)
            for number, (x, y, index) in enumerate(batches):
                images = min(recipe.batch_size, len(data) - number * recipe.batch_size)
                if done < steps:
                    step(Batch(x.double(), y, index), attack, len(y) * ranks.size / images)
                    done += 1
        assert done == steps
    actual = dict(model.state_dict())
    for number, own in step.optimizer.state_dict()["state"].items():
        actual[f"momentum {number}"] = own["momentum_buffer"]
    if step.weights is not None:
        actual["w_nat"] = step.weights.w_nat
        if step.weights.temperatures is not None:
            actual["temperatures"] = step.weights.temperatures.values
    return actual


def awnet_tiny() -> nn.Module:
    return create_model("awnet_tiny", in_channels=1)


def awnet_smaller() -> nn.Module:
    dynamic = Backbone("basic", [1, 1], [4, 8], num_classes=10, in_channels=1)
    return AWNet(
        dynamic, AdversarialRouter(dynamic.signal_widths, in_channels=1, widths=(4, 8), blocks=(1, 1))
    )


SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 16, "attack_steps": 2, "milestones": ()}
# 45 images: the last batch has 13, 7 for one rank and 6 for the other


def a_few_steps(ranks: Ranks, folder: Path) -> Any:
    recipe = MTARD(weight_lr=0.5, **SHORT)
    return steps_in_float64(ranks, awnet_smaller, recipe, images=45, steps=3)


def a_few_perturbed_steps(ranks: Ranks, folder: Path) -> Any:
    recipe = MTARD(weight_lr=0.5, temperature_lr=0.1, awp=0.02, nesterov=True, **SHORT)
    return steps_in_float64(ranks, awnet_smaller, recipe, images=45, steps=3)


def twenty_steps(ranks: Ranks, folder: Path) -> Any:
    recipes = (MTARD(weight_lr=0.5, epochs=4, batch_size=32), PGDAT(epochs=4, batch_size=32))
    return {r.name: steps_in_float64(ranks, awnet_tiny, r, images=179, steps=20) for r in recipes}


def collectives(ranks: Ranks, folder: Path) -> Any:
    """The collectives themselves."""
    tensors = [torch.full((2, 3), 1.0 + ranks.rank), torch.tensor(10.0 * ranks.rank, dtype=torch.float64)]
    ranks.mean(tensors, 1 + 2 * ranks.rank)  # weights ¼ and ¾ on two ranks

    def fails() -> None:
        raise FileNotFoundError("only rank 0 looked for it")

    with pytest.raises(FileNotFoundError, match="only rank 0 looked"):
        ranks.first(fails)
    agreement = Agreement(ranks)
    told = [agreement(step if ranks.rank else 0, 0) for step in range(4)]
    return {
        "mean": tensors,
        "first": ranks.first(lambda: ranks.rank),
        "gathered": ranks.gathered(ranks.rank),
        "total": ranks.total(torch.tensor([1 + ranks.rank])),
        "told": told,
        "last": agreement.close(),
    }


RECIPE = PGDAT(epochs=3, batch_size=8, attack_steps=1, lr=0.05, milestones=(2,), log_every=2)


def whole_run(ranks: Ranks, folder: Path) -> Any:
    result = train(
        RECIPE, plain_net(seed=ranks.rank if ranks.size > 1 else 0), splits(), folder / "run", quiet=True
    )
    return {"weights": result.model.state_dict(), "history": result.history, "validation": result.validation}


INGREDIENTS = Trades(
    **{"epochs": 3, "batch_size": 8, "lr": 0.05, "log_every": 2, "attack_kind": "fgsm_rs", "attack_steps": 1},
    **{"schedule": "cosine", "warmup_epochs": 1, "optimizer": "adamw", "ema_decay": 0.9, "clip_norm": 1.0},
    **{"label_smoothing": 0.1, "divergence": "dkl", "dkl_alpha": 2.0, "awp": 0.01, "awp_warmup": 1},
    **{"overfitting_checks": 2, "overfitting_images": 7, "augment": ("cutout", "resized_crop", "cutmix")},
)


def run_with_ingredients(ranks: Ranks, folder: Path) -> Any:
    result = train(INGREDIENTS, plain_net(), splits(), folder / "ingredients", quiet=True)
    guard = C.load_state(folder / "ingredients")["guard"] if ranks.rank == 0 else {}
    return {"weights": result.model.state_dict(), "validation": result.validation, "best": guard.get("best")}


def stopped_by_one_rank(ranks: Ranks, folder: Path) -> Any:
    """Rank 1 alone gets a signal: both save and stop at the same step, and resume together."""

    class Signals(nn.Sequential):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.passes += 1
                if self.passes == 2 and ranks.rank == ranks.size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(x)

    model = Signals(*plain_net())
    with pytest.raises(SystemExit) as stopped:
        train(RECIPE, model, splits(), folder / "stopped", quiet=True, seed=3)
    assert stopped.value.code == 128 + signal.SIGTERM
    ranks.gathered(None)
    step = C.load_state(folder / "stopped")["step"]
    ranks.gathered(None)
    model = Signals(*plain_net())
    model.passes = 10
    result = train(RECIPE, model, splits(), folder / "stopped", quiet=True, seed=3, resume=True)
    return {"step": step, "finished": result.finished}


def started(ranks: Ranks, folder: Path) -> Any:
    """A run like ``whole_run``, stopped after its first steps, in the middle of an epoch."""
    out = folder / f"started on {ranks.size}"
    assert not train(RECIPE, plain_net(), splits(), out, quiet=True, max_minutes=1e-9).finished
    return C.load_state(out)["batch"]


def resumed(ranks: Ranks, folder: Path) -> Any:
    """Resumes the run that another number of ranks has started."""
    out = folder / f"started on {3 - ranks.size}"
    result = train(RECIPE, plain_net(seed=9), splits(), out, quiet=True, resume=True)
    assert result.finished
    return {"weights": result.model.state_dict(), "history": result.history}


def refusals(ranks: Ranks, folder: Path) -> Any:
    with pytest.raises(
        ValueError,
        match=r"all ranks must have the same configuration.*recipe\.lr was 0\.1, is now 0\.2|0\.2, is now 0\.1",
    ):
        train(Standard(epochs=1, lr=0.1 * (1 + ranks.rank)), plain_net(), splits(), folder / "a", quiet=True)
    with pytest.raises(
        ValueError, match="leaves 1 images for the last batch of an epoch, too few for 2 ranks"
    ):
        train(Standard(epochs=1, batch_size=22), plain_net(), splits(), folder / "b", quiet=True)
    norm = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, K))
    with pytest.raises(ValueError, match="model's 1 is a plain batch norm"):
        train(Standard(epochs=1, batch_size=8), norm, splits(), folder / "c", quiet=True)
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(RECIPE, plain_net(), splits(), folder / "run", quiet=True)
    return sorted(path.name for path in folder.iterdir())


# --- two processes


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    assert started(Ranks(CPU), folder) == 1
    jobs: list[Callable[..., Any]] = [collectives, a_few_steps, a_few_perturbed_steps, whole_run]
    jobs += [stopped_by_one_rank, refusals, started, resumed, run_with_ingredients]
    return {**on_two_ranks(jobs, folder), "folder": folder}


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float) -> None:
    """To ``tolerance`` of each tensor's largest value."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        if value.is_floating_point():
            assert (value - two[name]).abs().max() <= tolerance * value.abs().max(), name
        else:
            assert torch.equal(value, two[name]), name


# float64 rounds at 1e-16, the order of sums differs: 1e-5 leaves room for twenty steps that amplify it
TOLERANCE = 1e-5


def test_two_ranks_with_half_the_batch_train_as_one_with_all(both: dict[str, Any], tmp_path: Path) -> None:
    one = a_few_steps(Ranks(CPU), tmp_path)
    first, second = both["a_few_steps"]
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert_close(one, first, TOLERANCE)
    assert one["w_nat"] != 0.5


def test_ranks_perturb_the_weights_and_balance_the_teachers_together(
    both: dict[str, Any], tmp_path: Path
) -> None:
    one = a_few_perturbed_steps(Ranks(CPU), tmp_path)
    first, second = both["a_few_perturbed_steps"]
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert_close(one, first, TOLERANCE)
    assert one["temperatures"].tolist() != [1.0, 1.0]


def test_a_run_with_every_ingredient_is_the_same_on_two_ranks(both: dict[str, Any], tmp_path: Path) -> None:
    one = run_with_ingredients(Ranks(CPU), tmp_path)
    first, second = both["run_with_ingredients"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert_close(one["weights"], first["weights"], 1e-3)  # float32; AdamW divides by small second moments
    assert first["validation"] == second["validation"] == one["validation"]
    assert first["best"] == one["best"]


def test_a_run_with_every_ingredient_that_was_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = train(INGREDIENTS, plain_net(), splits(), tmp_path / "whole", quiet=True, tensorboard=False)
    stopped = tmp_path / "stopped"
    options: dict[str, Any] = {"quiet": True, "tensorboard": False}
    assert not train(INGREDIENTS, plain_net(), splits(), stopped, max_minutes=1e-9, **options).finished
    for minutes in (1e-9, None):  # after the first step, after the second one, and to the end
        train(INGREDIENTS, plain_net(), splits(), stopped, resume=True, max_minutes=minutes, **options)
    one, other = (C.load_state(folder) for folder in (whole.folder, stopped))
    for part in ("model", "best_model"):
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())


@pytest.mark.slow
def test_twenty_steps_on_two_ranks_equal_those_of_one(tmp_path: Path) -> None:
    one = twenty_steps(Ranks(CPU), tmp_path)
    for actual in on_two_ranks([twenty_steps], tmp_path)["twenty_steps"]:
        for name in ("mtard", "pgd_at"):
            assert_close(one[name], actual[name], TOLERANCE)


def test_the_collectives_average_gather_and_broadcast(both: dict[str, Any]) -> None:
    for actual in both["collectives"]:
        assert actual["mean"][0].tolist() == [[1.75] * 3] * 2
        assert actual["mean"][1].item() == 7.5
        assert actual["first"] == 0
        assert actual["gathered"] == [0, 1]
        assert actual["total"].tolist() == [3]
        assert actual["told"] == [[0, 0], [0, 0], [1, 0], [2, 0]]  # the greatest wish, one call later
        assert actual["last"] == [3, 0]


def test_a_whole_run_on_two_ranks_is_that_of_one(both: dict[str, Any], tmp_path: Path) -> None:
    """Also if rank 1 has other weights: those of rank 0 are used. float32, six steps: 1e-4."""
    one = whole_run(Ranks(CPU), tmp_path)
    first, second = both["whole_run"]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert_close(one["weights"], first["weights"], 1e-4)
    assert first["validation"] == second["validation"] == one["validation"]  # shards sum to the whole
    for ours, theirs in zip(one["history"], first["history"], strict=True):
        for name in ("total", "nat", "adv", "clean_accuracy", "robust_accuracy", "lr"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert first["history"] == second["history"] == read_log(both["folder"] / "run", "epoch")
    session = C.read_config(both["folder"] / "run")["sessions"]
    assert [one["environment"]["ranks"] for one in session] == [2]
    assert len(C.load_state(both["folder"] / "run")["random"]) == 2


def test_a_run_resumes_with_another_number_of_ranks(both: dict[str, Any]) -> None:
    """Order, augmentation and noise are keyed by the image, so runs differ by rounding only: float32, 1e-4."""
    whole = both["whole_run"][0]
    assert both["started"] == [2, 2]
    more, fewer = both["resumed"][0], resumed(Ranks(CPU), both["folder"])
    for actual in (more, fewer):
        assert_close(whole["weights"], actual["weights"], 1e-4)
        for ours, theirs in zip(whole["history"], actual["history"], strict=True):
            for name in ("total", "nat", "adv", "clean_accuracy", "robust_accuracy", "lr"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for before, now in ((1, 2), (2, 1)):
        run = both["folder"] / f"started on {before}"
        sessions = C.read_config(run)["sessions"]
        assert [one["environment"]["ranks"] for one in sessions] == [before, now]
        assert [record["step"] for record in read_log(run, "step")] == [2, 4, 6, 8]


def test_a_signal_to_one_rank_stops_both_at_one_step(both: dict[str, Any]) -> None:
    for actual in both["stopped_by_one_rank"]:
        assert actual == {"step": 3, "finished": True}  # the signal came in step 2


def test_options_that_ranks_cannot_share_are_refused(both: dict[str, Any]) -> None:
    for names in both["refusals"]:
        assert not {"a", "b", "c"} & set(names)


def test_the_shares_of_a_batch_are_the_batch() -> None:
    data = splits().train
    whole = list(data.batches(8, shuffle=True, augment=True, seed=1, epoch=2))
    parts = [
        list(data.batches(8, shuffle=True, augment=True, seed=1, epoch=2, part=(r, 3))) for r in range(3)
    ]
    for number, batch in enumerate(whole):
        index = torch.cat([part[number].index for part in parts])
        order = index.argsort()
        assert torch.equal(index[order], batch.index.sort().values)
        x = torch.cat([part[number].x for part in parts])
        assert torch.equal(x[order], batch.x[batch.index.argsort()])
    assert [len(part[-1].y) for part in parts] == [3, 2, 2]


def test_a_rank_of_torchrun_takes_no_numbered_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="device must be 'cuda' under torchrun"),
        joined(torch.device("cuda:1")),
    ):
        pass


# --- torchrun and the command line

# trains on two ranks; one of the first attempt dies at once within a step
KILLED = """
    import os, signal, sys
    sys.path[:0] = {tests}
    import torch, test_distributed as t
    from torch import nn

    class Mortal(nn.Sequential):
        passes = 0

        def forward(self, x):
            self.passes += self.training
            first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if first and self.passes == {step} and self.training and os.environ["RANK"] == "{rank}":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(x)

    t.train(t.RECIPE, Mortal(*t.plain_net()), t.splits(), {run!r}, device="cpu", tensorboard=False)
    """


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step", "after"), [(1, 5, "3"), (0, 8, "[36]"), (1, 1, "0")])
def test_a_killed_rank_restarts_both_from_the_last_checkpoint(
    tmp_path: Path, rank: int, step: int, after: str
) -> None:
    """Rank 0 may be killed while it still writes the checkpoint of the epoch before."""
    run = tmp_path / "run"
    (tmp_path / "job.py").write_text(
        textwrap.dedent(KILLED).format(tests=IMPORT_PATH, run=str(run), rank=rank, step=step)
    )
    actual = torchrun(str(tmp_path / "job.py"), restarts=2)
    assert actual.returncode == 0, actual.stderr[-3000:]
    assert re.search(rf"after step {after} \(\d of 3 epochs are done\)", actual.stdout)
    assert len(C.read_config(run)["sessions"]) == 2
    whole = train(RECIPE, plain_net(), splits(), tmp_path / "whole", quiet=True, tensorboard=False)
    state = C.load_state(run)
    assert state["finished"]
    assert_close(C.load_state(whole.folder)["model"], state["model"], 1e-4)
    assert [r["step"] for r in read_log(run, "step")] == [2, 4, 6, 8]


@pytest.mark.slow
def test_train_from_the_command_line_runs_on_two_ranks(tmp_path: Path) -> None:
    arguments = ["-m", "awnet", "train", "--recipe", "pgd_at", "--device", "cpu", "--epochs", "1"]
    arguments += ["--recipe-options", "attack_steps=1", "validate_limit=20", "--out", str(tmp_path / "run")]
    actual = torchrun(*arguments, "--max-minutes", "1e-9")
    assert actual.returncode == 0, actual.stderr[-3000:]
    assert actual.stdout.count("stopped in epoch 1 of 1, after step 2; saved in") == 1  # rank 0 alone speaks
    actual = torchrun(*arguments, "--resume")
    assert actual.returncode == 0, actual.stderr[-3000:]
    assert actual.stdout.count("resuming ") == 1
    assert actual.stdout.count("next: awnet evaluate") == 1
    state = C.load_state(tmp_path / "run")
    assert state["finished"]
    assert state["step"] == 19

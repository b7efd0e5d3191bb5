"""An evaluation on two processes gives the report of one, interrupted or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from support.broken_defenses import Gated, Honest, images
from support.killed_evaluation import assert_same_evaluation
from support.two_ranks import free_port, on_two_ranks, torchrun
from torch import Tensor

from awnet.attacks import FGSM
from awnet.cli import main
from awnet.data import load_dataset
from awnet.distributed import Ranks
from awnet.evaluation import Report, evaluate
from awnet.models import create_model, save_model

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


# --- what each rank does; one process alone does the same


def plain(report: Report) -> dict[str, Any]:
    arrays = {"per_sample": report.per_sample, "examples": report.examples, "means": report.filter_means}
    return {
        "report": report.to_dict(),
        **{
            what: {name: torch.from_numpy(v) for name, v in values.items()} for what, values in arrays.items()
        },
    }


def everything(ranks: Ranks, folder: Path) -> Any:
    """One batch for each rank, and the sanity table for rank 0."""
    report = evaluate(
        Gated(),
        images(8),
        ["fgsm", "aa", "union"],
        budget="smoke",
        queries=20,
        batch_size=4,
        surrogates={"honest": Honest()},
        ranks=ranks,
    )
    return plain(report)


def filters(ranks: Ranks, folder: Path) -> Any:
    """An AW-Net without a run folder; three batches for rank 0 and two for rank 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("awnet_tiny", num_classes=4, in_channels=1)
    return plain(evaluate(model, images(13), ["fgsm"], batch_size=3, ranks=ranks))


def one_batch(ranks: Ranks, folder: Path) -> Any:
    """Rank 1 computes the sanity table only."""
    options: dict[str, Any] = {"budget": "smoke", "queries": 20, "batch_size": 4, "sanity": True}
    return plain(evaluate(Gated(), images(3), ["fgsm"], ranks=ranks, **options))


class Mortal(FGSM):
    """An attack that fails in its ``last``-th call and later."""

    def __init__(self, last: int) -> None:
        super().__init__(Honest(), eps=0.5)  # breaks all
        self.calls, self.last = 0, last

    def perturb(self, x: Tensor, y: Tensor, index: Tensor, largest_label: int) -> Tensor:
        self.calls += 1
        if self.calls >= self.last:
            raise InterruptedError("no more")
        return super().perturb(x, y, index, largest_label)


def evaluate_in_batches(out: Path, ranks: Ranks, last: int = 100) -> dict[str, Any]:
    """Evaluates five batches; also returns how many of them this rank attacked."""
    attack = Mortal(last)
    report = evaluate(Honest(), images(10), {"mortal": attack}, batch_size=2, out=out, ranks=ranks)
    return {**plain(report), "calls": attack.calls}


def started(ranks: Ranks, folder: Path) -> Any:
    """Leaves a state with three of five batches; on two ranks 0 and 2 by rank 0, and 1 by rank 1."""
    with pytest.raises(InterruptedError):
        evaluate_in_batches(
            folder / f"started on {ranks.size}", ranks, last=[[4], [3, 2]][ranks.size - 1][ranks.rank]
        )
    ranks.gathered(None)


def resumed(ranks: Ranks, folder: Path) -> Any:
    return evaluate_in_batches(folder / f"started on {3 - ranks.size}", ranks)


class Undefined(Honest):
    """A model whose logits for the sixth image are NaN."""

    def score(self, x: Tensor) -> Tensor:
        sixth = images(8).images[5] / torch.tensor(255.0)
        return super().score(x).masked_fill((x == sixth).flatten(1).all(1), torch.nan)


def refusals(ranks: Ranks, folder: Path) -> Any:
    """The error of each rank if only one has the fault."""
    said = []
    with pytest.raises(ValueError, match="all ranks must evaluate the same") as error:
        evaluate(Honest(), images(4), ["fgsm"], seed=ranks.rank, batch_size=2, ranks=ranks)
    said.append(str(error.value))
    with pytest.raises(FloatingPointError, match="NaN or infinite") as error:
        evaluate(Undefined(), images(8), {}, batch_size=4, ranks=ranks)  # in rank 1's batch
    said.append(str(error.value))
    if ranks.rank == 0:
        (folder / "file").write_text("")
    with pytest.raises(OSError, match="file") as error:  # rank 0 alone writes
        evaluate(Honest(), images(4), {}, batch_size=2, out=folder / "file", ranks=ranks)
    return [*said, str(error.value)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    started(Ranks(CPU), folder)
    jobs = [everything, filters, one_batch, started, resumed, refusals]
    return {**on_two_ranks(jobs, folder), "folder": folder}


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["report"] == two["report"]
    for what in ("per_sample", "examples", "means"):
        assert list(one[what]) == list(two[what])
        for name, values in one[what].items():
            assert values.dtype == two[what][name].dtype, name
            if what == "means":  # the mean scale is a sum in float64, by rank
                assert torch.allclose(values, two[what][name], rtol=1e-13, atol=0), name
            else:
                assert torch.equal(values, two[what][name]), name


@pytest.mark.parametrize("job", [everything, filters, one_batch])
def test_two_ranks_give_the_report_of_one(
    both: dict[str, Any], job: Callable[..., Any], tmp_path: Path
) -> None:
    one = job(Ranks(CPU), tmp_path)
    for actual in both[job.__name__]:
        assert_same(one, actual)
    if job is everything:
        assert one["report"]["attacks"]["aa"]["robust_accuracy"] > one["report"]["union"]["robust_accuracy"]
    if job is filters:
        assert any(name.startswith("fgsm/") for name in one["means"])
    else:
        assert one["report"]["sanity"]


def test_an_evaluation_resumes_with_another_number_of_ranks(both: dict[str, Any], tmp_path: Path) -> None:
    whole = evaluate_in_batches(tmp_path, Ranks(CPU))
    assert whole["calls"] == 5
    assert len(whole["examples"]["label"]) == 8  # of ten
    for actual in both["resumed"]:
        assert_same(whole, actual)
        assert actual["calls"] == 1  # three of five were done
    actual = resumed(Ranks(CPU), both["folder"])
    assert_same(whole, actual)
    assert actual["calls"] == 2
    for ranks in (1, 2):
        assert_same_evaluation(tmp_path, both["folder"] / f"started on {ranks}")


def test_ranks_with_different_models_or_images_are_refused(both: dict[str, Any]) -> None:
    first, second = both["refusals"]
    assert first == second
    assert "but rank 1 has another model, images, attacks" in first[0]
    assert "for 1 of 8 clean images" in first[1]


# --- torchrun and the command line


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Writes a network that classifies most digits, so that attacks run on most images."""
    torch.manual_seed(0)
    model = create_model("awnet_tiny", in_channels=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images = load_dataset("digits").train
    for x, y, _ in chain.from_iterable(images.batches(64, shuffle=True, epoch=epoch) for epoch in range(3)):
        logits = model(x, is_clean=torch.arange(len(x)) % 2 == 0)
        loss = torch.nn.functional.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    def written(folder: Path) -> Path:
        folder.mkdir()
        save_model(model, folder / "model.safetensors")
        return folder / "model.safetensors"

    return written


OPTIONS = ["--data", "digits", "--limit", "10", "--batch-size", "4", "--budget", "smoke", "--queries", "10"]
OPTIONS += ["--device", "cpu", "--eps", "0.01", "--attacks", "fgsm", "pgd_sat", "aa"]

# the first attempt's rank 1 dies in the middle of its batch's cascade
KILLED = """
    import os, pathlib, signal, sys
    from awnet.attacks.saved import Saved
    from awnet.cli import main

    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        save, kept = Saved.save, []

        def mortal(*arguments):
            save(*arguments)
            kept.append(arguments)
            if len(kept) == 3:
                pathlib.Path(__file__).with_name("died").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        Saved.save = mortal
    sys.exit(main(sys.argv[1:]))
    """


@pytest.fixture(scope="module")
def alone(weights: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same evaluation by one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(["evaluate", str(weights(folder)), *OPTIONS]) == 0
    assert Report.load(folder / "evaluations" / "default").attacks["aa"].robust_accuracy > 0.6
    return folder


@pytest.mark.slow
def test_evaluate_from_the_command_line_runs_on_two_ranks(
    weights: Callable[[Path], Path], alone: Path, tmp_path: Path
) -> None:
    model = str(weights(tmp_path / "run"))
    actual = torchrun("-m", "awnet", "evaluate", model, *OPTIONS)
    assert actual.returncode == 0, actual.stderr[-3000:]
    assert actual.stdout.count("written to") == 1  # rank 0 alone speaks
    assert_same_evaluation(alone, tmp_path / "run")


@pytest.mark.slow
def test_a_killed_rank_restarts_both(weights: Callable[[Path], Path], alone: Path, tmp_path: Path) -> None:
    model = str(weights(tmp_path / "run"))
    (tmp_path / "job.py").write_text(textwrap.dedent(KILLED))
    actual = torchrun(str(tmp_path / "job.py"), "evaluate", model, *OPTIONS, restarts=1)
    assert actual.returncode == 0, actual.stderr[-3000:]
    assert (tmp_path / "died").exists()
    assert actual.stdout.count("written to") == 1
    assert_same_evaluation(alone, tmp_path / "run")


@pytest.mark.slow
def test_a_lost_rank_does_not_block_the_others(
    weights: Callable[[Path], Path], alone: Path, tmp_path: Path
) -> None:
    """Also without torchrun; one process resumes the evaluation."""
    model = str(weights(tmp_path / "run"))
    (tmp_path / "job.py").write_text(textwrap.dedent(KILLED))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "job.py"), "evaluate", model, *OPTIONS],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        assert processes[1].wait(timeout=200) == -signal.SIGKILL
        assert processes[0].wait(timeout=200) > 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not (tmp_path / "run" / "report.json").exists()
    assert list((tmp_path / "run" / "evaluations" / "default" / "state").glob("*/*.safetensors"))
    assert main(["evaluate", model, *OPTIONS]) == 0
    assert_same_evaluation(alone, tmp_path / "run")

"""An evaluation that is killed at any moment and restarted gives the same report."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.killed_evaluation import assert_same_evaluation, evaluate_gated
from support.processes import start

from awnet.data import load_dataset
from awnet.models import create_model, save_model

pytestmark = pytest.mark.usefixtures("one_thread")


def run_python(words: list[str]) -> subprocess.Popen[bytes]:
    """The command line of this Python with ``words``, with the tests' modules on its path."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)])
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, *words], env=os.environ | {"PYTHONPATH": path}, stdout=quiet)


def test_an_evaluation_killed_once_resumes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    evaluate_gated(whole)
    state = killed / "evaluations" / "default" / "state"
    process = start(evaluate_gated, killed)
    try:
        while not list(state.glob("*/*.safetensors")):  # the kill falls between two writes, or within one
            assert process.is_alive(), "it ended before it could be killed"
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.3))
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert state.is_dir()
    assert not (killed / "report.json").exists()
    evaluate_gated(killed)
    assert_same_evaluation(whole, killed)


@pytest.mark.slow
def test_an_evaluation_killed_repeatedly_from_the_command_line_resumes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("awnet_tiny", in_channels=1)
    x = load_dataset("digits").train.images[:64].float() / 16
    with torch.no_grad():
        model(x, is_clean=torch.arange(64) % 2 == 0)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        save_model(model, tmp_path / name / "model.safetensors")

    def command(name: str) -> list[str]:
        words = ["--data", "digits", "--limit", "4", "--batch-size", "2", "--budget", "smoke"]
        words += ["--queries", "20", "--attacks", "pgd_sat", "aa", "union"]
        return ["-m", "awnet", "evaluate", str(tmp_path / name / "model.safetensors"), *words]

    assert run_python(command("whole")).wait() == 0
    kills = 0
    state = tmp_path / "killed" / "evaluations" / "default" / "state"
    for attempt in range(5):
        before = len(list(state.glob("*/*.safetensors")))
        process = run_python(command("killed"))
        if attempt < 4:
            while process.poll() is None and len(list(state.glob("*/*.safetensors"))) <= before:
                time.sleep(0.02)
            time.sleep(random.uniform(0, 0.5))
            process.kill()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 1  # each run but the first resumes from what the previous one wrote
    assert_same_evaluation(tmp_path / "whole", tmp_path / "killed")

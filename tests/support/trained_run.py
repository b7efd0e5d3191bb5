"""A run that was trained by the command line, and the one line with which a command fails."""

import pytest

from awnet.cli import main

TRAIN = ["train", "--data", "digits", "--model", "resnet_tiny", "--epochs", "1"]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a run that was trained by the command, one epoch on clean digits, eps 0.1."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main([*TRAIN, "--recipe", "standard", "--eps", "1/10", "--seed", "3", "--out", str(folder)]) == 0
    return folder


def fails(capsys, *words):
    """The one line on stderr with which a command fails."""
    assert main([str(word) for word in words]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("awnet: error: ")
    assert out.err.count("\n") == 1
    assert "Traceback" not in out.err + out.out
    return out.err

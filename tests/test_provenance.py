"""The commit and the environment that reports and benchmark rows store."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from awnet.benchmarks import machine

import awnet
from awnet.provenance import Commit, environment, git_commit


def _git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_commit_reports_hash_and_modification_except_of_ignored_paths(tmp_path: Path) -> None:
    assert git_commit(root=tmp_path) == Commit(None, None)
    _git(tmp_path, "init", "--quiet")
    assert git_commit(root=tmp_path) == Commit(None, None)  # no commit yet
    (tmp_path / "results").mkdir()
    for name in ("code.py", "results/row.csv"):
        (tmp_path / name).write_text("1\n")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "--message", "first")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(root=tmp_path) == Commit(commit, modified=False)
    (tmp_path / "new.txt").write_text("untracked\n")
    assert git_commit(root=tmp_path) == Commit(commit, modified=False)
    (tmp_path / "results/row.csv").write_text("2\n")
    assert git_commit(root=tmp_path) == Commit(commit, modified=True)
    assert git_commit(["results"], root=tmp_path) == Commit(commit, modified=False)
    (tmp_path / "code.py").write_text("2\n")
    assert git_commit(["results"], root=tmp_path) == Commit(commit, modified=True)
    # a package that is installed somewhere inside the checkout is not of that commit
    assert git_commit(root=tmp_path / "results") == Commit(None, None)


def test_an_environment_variable_replaces_the_commit_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stated, expected in (
        ("0123abc", Commit("0123abc", modified=False)),
        ("0123abc-dirty", Commit("0123abc", modified=True)),
        ("f" * 40, Commit("f" * 40, modified=False)),
    ):
        monkeypatch.setenv("AWNET_COMMIT", stated)
        assert git_commit() == expected
        assert environment(torch.device("cpu"))["commit"] == expected.hash
        assert machine.commit() == stated[:7] + ("-dirty" if expected.modified else "")
        assert git_commit(root=tmp_path) == Commit(None, None)  # of another folder it says nothing
    for wrong in ("main", "0123ab", "0123abc-modified", "g" * 40, "f" * 41):
        monkeypatch.setenv("AWNET_COMMIT", wrong)
        with pytest.raises(ValueError, match="AWNET_COMMIT must be a commit's hash, or HASH-dirty"):
            git_commit()


def test_environment_holds_versions_and_plain_json_values() -> None:
    about = environment(torch.device("cpu"))
    assert (about["awnet"], about["torch"]) == (awnet.__version__, str(torch.__version__))
    assert type(about["torch"]) is str
    assert about["threads"] == torch.get_num_threads()
    assert set(about) == {"awnet", "torch", "python", "device", "threads", "commit", "modified"}
    assert json.loads(json.dumps(about)) == about

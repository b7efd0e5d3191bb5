"""The models of the package: their files, their recorded accuracy, downloads, and how a run is added."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support.http_server import serving

from awnet.cli import main
from awnet.data import load_dataset
from awnet.evaluation.teachers import find_teachers
from awnet.models import load_model, zoo_models
from awnet.models.zoo import FOLDER, ZooModel, add_run, rounded_copy, zoo_folder

NAMES = tuple(zoo_models())
NAME = "awnet_tiny_digits"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A copy of the package's zoo with one model."""
    shutil.copytree(FOLDER / NAME, tmp_path / "zoo" / NAME)
    registry = {NAME: asdict(zoo_models()[NAME])}
    (tmp_path / "zoo" / "registry.json").write_text(json.dumps(registry))
    return tmp_path / "zoo"


@pytest.mark.parametrize("name", NAMES)
def test_a_zoo_model_repeats_its_recorded_clean_accuracy(name: str) -> None:
    report = json.loads((zoo_folder(name) / "report.json").read_text())
    test = load_dataset(report["dataset"], seed=0).test
    batch = next(test.batches(len(test)))
    with torch.no_grad():
        correct = load_model(f"zoo:{name}")(batch.x.float()).argmax(1) == batch.y
    assert len(test) == report["n"]
    assert correct.sum().item() == round(report["clean_accuracy"] * report["n"])


def test_the_documentation_lists_the_zoo() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = page.split("<!-- zoo: begin -->")[1].split("<!-- zoo: end -->")[0].strip().splitlines()[2:]
    assert rows == [f"| `zoo:{name}` | {model.about} |" for name, model in zoo_models().items()]


@pytest.mark.parametrize("name", NAMES)
def test_a_zoo_model_has_its_teachers_and_names_no_place(name: str) -> None:
    folder = zoo_folder(name)
    teachers = find_teachers(folder)
    assert (set(teachers.models), teachers.missing) == ({"clean", "robust"}, {})
    for file in folder.rglob("*.json"):
        assert not re.search(r"/(root|home|work|tmp)/", file.read_text())


def test_a_changed_file_and_an_unknown_name_are_refused(zoo: Path) -> None:
    with pytest.raises(ValueError, match=f"no model 'resnet9': it has {NAME}"):
        zoo_folder("resnet9", zoo)
    weights = zoo / NAME / "best.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=r"best\.safetensors was changed: its SHA-256 is not"):
        zoo_folder(NAME, zoo)
    weights.unlink()
    with pytest.raises(ValueError, match=r"best\.safetensors is missing: install awnet again"):
        zoo_folder(NAME, zoo)


def test_a_zoo_model_is_downloaded_once_and_verified(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWNET_CACHE", str(tmp_path / "cache"))
    published = tmp_path / "published"
    shutil.move(zoo / NAME, published)

    def register(model: ZooModel) -> None:
        (zoo / "registry.json").write_text(json.dumps({NAME: asdict(model)}))

    entry = zoo_models()[NAME]
    with serving(published) as url:
        register(replace(entry, url=url))
        folder = zoo_folder(NAME, zoo)
        wrong = {**entry.files, "best.safetensors": "0" * 64}
        register(replace(entry, url=url, files=wrong))
        with pytest.raises(ValueError, match="hash"):
            zoo_folder(NAME, zoo)
    assert (folder / "config.json").read_bytes() == (published / "config.json").read_bytes()
    register(replace(entry, url=url))
    shutil.copy(published / "best.safetensors", folder)
    assert zoo_folder(NAME, zoo) == folder  # without the server
    (folder / "best.safetensors").unlink()
    with pytest.raises(ConnectionError, match=f"Without a network, copy the file to {folder}"):
        zoo_folder(NAME, zoo)


def test_a_run_is_added_with_its_teachers_once(zoo: Path) -> None:
    for name in ("copy", "twin"):
        add_run(zoo_folder(NAME, zoo), name, "a copy", zoo)
        assert zoo_models(zoo)[name].about == "a copy"
        teachers = find_teachers(zoo_folder(name, zoo))
        assert (set(teachers.models), teachers.missing) == ({"clean", "robust"}, {})
    assert not list(zoo.glob("copy/teachers/*"))  # stored with the first model
    one, other = (load_model(path).state_dict() for path in (zoo / NAME, zoo / "copy"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    with pytest.raises(FileExistsError, match="remove it first"):
        add_run(zoo_folder(NAME, zoo), "copy", "again", zoo)


def test_a_rounded_run_is_evaluated_and_added_without_its_teachers(zoo: Path, tmp_path: Path) -> None:
    run = rounded_copy(zoo_folder(NAME, zoo), tmp_path / "rounded")
    assert not (run / "report.json").exists()
    with pytest.raises(FileExistsError):
        rounded_copy(zoo_folder(NAME, zoo), run)
    assert main(["evaluate", str(run), "--attacks", "fgsm", "--device", "cpu"]) == 0
    url = "https://example.org/rounded"
    add_run(run, "rounded", "16 bits", zoo, teachers=False)
    add_run(run, "elsewhere", "16 bits", zoo, teachers=False, url=url)
    assert set(zoo_models(zoo)["rounded"].files) == {"best.safetensors", "config.json", "report.json"}
    assert zoo_models(zoo)["elsewhere"].url == url
    added = zoo_folder("rounded", zoo)
    assert (added / "best.safetensors").stat().st_size < 0.65 * (
        zoo / NAME / "best.safetensors"
    ).stat().st_size
    report = json.loads((added / "report.json").read_text())
    missing = find_teachers(added).missing
    assert missing.keys() == {"clean", "robust"}
    assert all("does not exist" in reason for reason in missing.values())
    test = load_dataset("digits", seed=0).test
    batch = next(test.batches(report["n"]))
    with torch.no_grad():
        correct = load_model(added)(batch.x.float()).argmax(1) == batch.y
    assert correct.sum().item() == round(report["n"] * report["clean_accuracy"])


def test_a_zoo_model_is_evaluated_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in FOLDER.rglob("*"))
    assert main(["evaluate", f"zoo:{NAME}", "--attacks", "fgsm", "--limit", "40", "--device", "cpu"]) == 0
    assert "trained by mtard" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / f"runs/zoo-{NAME}/evaluations/default/report.json").read_text())
    assert (report["dataset"], report["eps"], report["n"]) == ("digits", 0.15, 40)
    assert sorted(path for path in FOLDER.rglob("*")) == before
    assert main(["evaluate", "zoo:resnet9", "--attacks", "fgsm"]) == 2
    assert f"it has {NAME}" in " ".join(capsys.readouterr().err.split())

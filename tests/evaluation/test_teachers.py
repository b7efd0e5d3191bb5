"""Attacks that use a run's teachers: found, given or missing; a report never omits one silently."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awnet.attacks import FGSM, Attack, Cascade, Suite, named_attack
from awnet.attacks.registry import ATTACKS, TRANSFERRED
from awnet.cli import main
from awnet.data import Dataset, Splits, load_dataset
from awnet.evaluation import Report, evaluate
from awnet.evaluation.html import page
from awnet.evaluation.teachers import find_teachers
from awnet.models import create_model, load_model, save_model
from awnet.training import recipe_for, train

FULL = load_dataset("digits")
DIGITS = Splits(FULL.train.subset(12), FULL.validation.subset(10), FULL.test.subset(10))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("resnet_tiny", in_channels=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``p/t/{clean,robust}``, and runs that learnt from them: ``p/mtard``, ``p/hat`` and, from modules, ``p/m``."""
    place = tmp_path_factory.mktemp("trained") / "p"
    for number, kind in enumerate(("clean", "robust")):
        save_model(network(number), place / "t" / kind / "best.safetensors")
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 12, "attack_steps": 1}
    quiet: dict[str, Any] = {"quiet": True, "tensorboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for recipe, out, teachers in (
            ("mtard", "mtard", ("t/clean", "t/robust")),
            ("hat", "hat", ("t/clean",)),
            ("mtard", "m", (network(0), network(1))),
        ):
            train(
                recipe_for(recipe, "digits", **settings),
                "resnet_tiny",
                DIGITS,
                out,
                teachers=teachers,
                **quiet,
            )
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs, in another working directory; the original folders are not accessible."""
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy" / "p"
    shutil.copytree(trained, copy)
    for config in copy.glob("*/config.json"):
        config.write_text(config.read_text().replace(str(trained), str(copy)))
    return copy


@pytest.fixture
def union(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the union, which takes minutes, by FGSM for each member that a teacher makes, and one more."""

    def make(model: nn.Module, threat: Any, seed: int, suite: Suite) -> Attack:
        members: dict[str, Attack] = {"aa": FGSM(model, eps=threat.eps)}
        whole = original(model, threat, seed, suite)
        assert isinstance(whole, Cascade)
        with_teachers = [k for k in whole.members if k == "adaptive_paper" or k.startswith("transfer_")]
        chosen = {name: FGSM(model, eps=threat.eps) for name in with_teachers}
        return Cascade(model, members | chosen, eps=threat.eps, seed=seed)

    original = ATTACKS["union"]
    monkeypatch.setitem(ATTACKS, "union", make)


def evaluated(run: Path, data: Dataset | None = None, **options: Any) -> Report:
    data = DIGITS.test.subset(2) if data is None else data
    return evaluate(
        load_model(run), data, ["union"], run=run, budget="smoke", queries=2, sanity=False, **options
    )


def members(report: Report) -> set[str]:
    assert report.union is not None
    return set(report.union.settings["members"]) - {"aa"}


def transfers(*kinds: str) -> set[str]:
    return {f"transfer_{kind}_teacher_{attack}" for kind in kinds for attack in TRANSFERRED}


WHOLE = {"adaptive_paper"} | transfers("clean", "robust")


@pytest.mark.usefixtures("union")
def test_teachers_given_by_a_relative_path_are_found_from_anywhere(place: Path) -> None:
    report = evaluated(place / "mtard")
    assert members(report) == WHOLE
    assert not report.missing
    shutil.move(place, place.parent / "moved")  # the run and its teachers together
    assert members(evaluated(place.parent / "moved" / "mtard")) == WHOLE


@pytest.mark.usefixtures("union")
def test_a_recipe_with_a_clean_teacher_alone_has_its_union(place: Path) -> None:
    report = evaluated(place / "hat")
    assert members(report) == transfers("clean")
    assert not report.missing


def _removed(place: Path) -> None:
    shutil.rmtree(place / "t" / "robust")


def _replaced(place: Path) -> None:
    save_model(network(7), place / "t" / "robust" / "best.safetensors")


def _damaged(place: Path) -> None:
    path = place / "t" / "robust" / "best.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _emptied(place: Path) -> None:
    (place / "t" / "robust" / "best.safetensors").unlink()


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_removed, "robust teacher is missing: .*robust does not exist"),
        (_replaced, r"robust has other weights \(SHA-256 \w{12}…, recorded: \w{12}…\)"),
        (_damaged, "is damaged or not a safetensors file"),
        (_emptied, "no best.safetensors in the folder"),
    ],
)
def test_a_teacher_that_is_not_there_is_an_error(
    place: Path, harm: Callable[[Path], None], reason: str
) -> None:
    harm(place)
    with pytest.raises(ValueError, match=reason) as caught:
        evaluated(place / "mtard")
    for name in ("adaptive_paper", *transfers("robust")):
        assert name in str(caught.value)
    assert "transfer_clean_teacher" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^adaptive_paper cannot run: "):
        evaluate(load_model(place / "mtard"), DIGITS.test, ["adaptive_paper"], run=place / "mtard")
    evaluate(load_model(place / "mtard"), DIGITS.test.subset(2), ["fgsm"], run=place / "mtard")


@pytest.mark.usefixtures("union", "undrawn")
def test_missing_teachers_flag_the_headline(place: Path, tmp_path: Path) -> None:
    _removed(place)
    report = evaluated(place / "mtard", allow_missing=True, out=tmp_path / "out")
    assert members(report) == transfers("clean")
    assert set(report.missing) == {"adaptive_paper"} | transfers("robust")
    (flag,) = (flag for flag in report.flags if flag.startswith("incomplete"))
    assert "adaptive_paper, transfer_robust_teacher_pgd_sat" in flag
    assert "robust does not exist" in flag
    assert "incomplete: 3 attacks could not run" in str(report.table().title)
    text = page(report, tmp_path)
    assert "attacks that could run, incomplete: 3 could not" in text
    assert "robust does not exist" in text
    again = Report.load(tmp_path / "out" / "evaluations" / "default")
    assert again.missing == report.missing
    whole = evaluated(place / "hat", compared_with={"mtard": again})
    assert any("the union of mtard, which this is compared with, is incomplete" in f for f in whole.flags)


@pytest.mark.usefixtures("union")
def test_moved_teachers_are_given_and_compared_with_the_record(place: Path, tmp_path: Path) -> None:
    shutil.move(place / "t", tmp_path / "new")
    clean, robust = tmp_path / "new" / "clean", tmp_path / "new" / "robust"
    assert members(evaluated(place / "mtard", teachers={"clean": clean}, teacher=network(1))) == WHOLE
    assert set(find_teachers(place / "mtard", given=(clean, robust)).models) == {"clean", "robust"}
    assert set(find_teachers(place / "m", given=(clean, network(1))).models) == {"clean", "robust"}
    with pytest.raises(ValueError, match=r"clean teacher is missing: .*robust has other weights"):
        evaluated(place / "mtard", teachers=(robust, clean))
    with pytest.raises(ValueError, match="the given ResNet has other weights"):
        evaluated(place / "mtard", teachers={"clean": clean}, teacher=network(5))
    with pytest.raises(ValueError, match="teachers must be 2, in this order: clean, robust"):
        evaluated(place / "mtard", teachers=(clean,))
    with pytest.raises(ValueError, match="trained without a robust teacher: it has clean ones"):
        evaluated(place / "hat", teachers={"robust": robust})
    with pytest.raises(ValueError, match="surrogates must not be called clean_teacher"):
        evaluated(place / "m", teachers=(clean, robust), surrogates={"clean teacher": network(3)})


@pytest.mark.usefixtures("union")
def test_surrogates_come_beside_the_teachers_not_in_their_place(place: Path) -> None:
    report = evaluated(place / "mtard", surrogates={"mine": network(3)})
    assert members(report) == WHOLE | {f"transfer_mine_{attack}" for attack in TRANSFERRED}


def test_teachers_given_as_modules_must_be_given_again(place: Path) -> None:
    with pytest.raises(ValueError, match="clean teacher is missing: it was passed to train as a module"):
        evaluated(place / "m")


def _as_an_earlier_version(config: Path, paths: list[str]) -> None:
    actual = json.loads(config.read_text())
    actual["sessions"][-1]["teachers"] = paths
    config.write_text(json.dumps(actual))


def test_a_record_of_an_earlier_version_is_tried_from_the_runs_folder_upwards(place: Path) -> None:
    run = place / "mtard"
    _as_an_earlier_version(run / "config.json", ["t/clean", "t/robust"])
    actual = find_teachers(run)
    assert set(actual.models) == {"clean", "robust"}
    save_model(network(9), run / "t" / "robust" / "best.safetensors")  # a nearer folder of the same name
    assert set(find_teachers(run).models) == {"clean", "robust"}
    _removed(place)
    assert "other weights" in find_teachers(run).missing["robust"]
    shutil.rmtree(run / "t")
    assert "t/robust does not exist" in find_teachers(run).missing["robust"]


def test_teachers_that_a_run_trained_are_found_in_it_and_checked(place: Path) -> None:
    run = place / "mtard"
    shutil.copytree(place / "t", run / "teachers")
    config = json.loads((run / "config.json").read_text())
    for kind, source in config["sessions"][-1]["teachers"].items():
        del config["teachers"][kind]["weights"]
        source |= {"path": f"/moved/teachers/{kind}", "from_run": f"teachers/{kind}"}
    (run / "config.json").write_text(json.dumps(config))
    assert not find_teachers(run).missing
    save_model(network(8), run / "teachers" / "robust" / "best.safetensors")
    assert "other weights" in find_teachers(run).missing["robust"]
    shutil.rmtree(run / "teachers" / "clean")
    assert "teachers/clean does not exist" in find_teachers(run).missing["clean"]


@pytest.mark.usefixtures("union")
def test_a_union_without_a_training_record_is_flagged(place: Path) -> None:
    alone = evaluate(load_model(place / "mtard"), DIGITS.test.subset(2), ["union"], sanity=False)
    assert any("no training record was found" in flag for flag in alone.flags)
    torch.manual_seed(0)
    foreign = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    report = evaluate(foreign, DIGITS.test.subset(2), ["union"], sanity=False)
    assert not any("training record" in flag for flag in report.flags)


@pytest.mark.usefixtures("union", "undrawn")
def test_evaluate_teachers_from_the_command_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(place / "t", tmp_path / "new")
    words = ["evaluate", str(place / "mtard"), "--attacks", "union", "--limit", "2", "--budget", "smoke"]
    words += ["--queries", "2"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("awnet: error: transfer_clean_teacher_pgd_sat, ")
    assert "--teachers" in said
    assert "--allow-missing" in said
    assert not (place / "mtard" / "report.json").exists()
    assert (
        main([*words, "--teachers", str(tmp_path / "new" / "clean"), str(tmp_path / "new" / "robust")]) == 0
    )
    assert "incomplete" not in capsys.readouterr().out
    assert main([*words, "--allow-missing"]) == 0
    assert "incomplete: 5 attacks could not run" in " ".join(capsys.readouterr().out.split())


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(create_model("awnet_tiny", in_channels=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.parts[0](x) + self.parts[1](x)
        return logits


@pytest.mark.usefixtures("union")
def test_a_model_with_two_routers_does_not_silently_lose_router_attacks() -> None:
    model = Ensemble()
    with pytest.raises(
        ValueError, match="two_phase, forced, softened cannot run: the model holds 2 networks"
    ):
        evaluate(model, DIGITS.test.subset(2), ["union"])
    report = evaluate(model, DIGITS.test.subset(2), ["union"], allow_missing=True, sanity=False)
    assert set(report.missing) == {"two_phase", "forced", "softened"}
    assert any(
        flag.startswith("incomplete: two_phase, forced, softened could not run") for flag in report.flags
    )


def test_the_union_sees_a_router_inside_a_wrapper() -> None:
    class Normalize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 0.5) / 0.25

    inner = create_model("awnet_tiny", in_channels=1).eval()
    inside = {"two_phase", "forced", "softened"}
    threat, suite = DIGITS.test.threat_model, Suite(budget="smoke", reference=torch.rand(2, 1, 8, 8))
    for model in (
        nn.Sequential(Normalize(), inner),
        nn.DataParallel(inner),
        torch.compile(inner, backend="eager"),
        nn.Sequential(nn.Sequential(Normalize()), nn.Sequential(nn.Identity(), inner)),
    ):
        whole = named_attack("union", model, threat, 0, suite)
        assert isinstance(whole, Cascade)
        assert set(whole.members) >= inside

"""Evaluations in L2 and L1, and the worst case over several norms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.broken_defenses import Honest, images
from support.two_ranks import on_two_ranks

from awnet.attacks import PGD, Suite
from awnet.attacks.norms import geometry
from awnet.cli import main
from awnet.data import ThreatModel
from awnet.distributed import Ranks
from awnet.evaluation import Report, compare, evaluate, evaluate_norms, sanity_table
from awnet.evaluation.collect import with_noise
from awnet.models import create_model, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = [ThreatModel(0.1, "Linf"), ThreatModel(2.0, "L2"), ThreatModel(12.0, "L1")]
OPTIONS: dict[str, Any] = {"budget": "smoke", "queries": 10, "batch_size": 4, "sanity": False}


def in_l2(n: int = 8, eps: float = 1.5):
    return replace(images(n), threat_model=ThreatModel(eps, "L2"))


def test_a_report_states_its_norm_everywhere(tmp_path):
    report = evaluate(Honest(), in_l2(4), ["pgd_sat"], out=tmp_path, **OPTIONS)
    assert (report.norm, report.eps) == ("L2", 1.5)
    assert report.attacks["pgd_sat"].settings["norm"] == "L2"
    assert "L2 eps 1.5" in repr(report)
    assert "L2 eps 1.5" in str(report.table().title)
    folder = tmp_path / "evaluations" / "default"
    assert "L2, ε = 1.5" in (folder / "report.html").read_text()
    assert Report.load(tmp_path).norm == "L2"


def test_a_report_of_an_earlier_version_is_of_l_infinity(tmp_path):
    evaluate(Honest(), images(4), ["fgsm"], **OPTIONS).save(tmp_path / "a")
    values = json.loads((tmp_path / "a" / "report.json").read_text())
    assert values.pop("norm") == "Linf"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "report.json").write_text(json.dumps(values))
    assert Report.load(tmp_path / "b").norm == "Linf"


def test_reports_in_other_norms_or_of_another_eps_are_not_compared():
    model, data = Honest(), images(4)
    one = evaluate(model, data, ["fgsm"], **OPTIONS)
    for threat in (ThreatModel(data.threat_model.eps, "L2"), ThreatModel(data.threat_model.eps / 2)):
        other = evaluate(model, replace(data, threat_model=threat), ["fgsm"], **OPTIONS)
        with pytest.raises(ValueError, match=r"cannot be compared: (norm Linf and L2|eps )"):
            compare(one, other)


def test_an_attack_in_another_norm_than_the_data_is_refused():
    attack = PGD(Honest(), eps=0.5, norm="L1", step_size=0.1, steps=2)
    with pytest.raises(ValueError, match=r"an attack in L1, but the data set's threat model is L2 eps 1\.5"):
        evaluate(Honest(), in_l2(), {"mine": attack}, **OPTIONS)


def test_an_implausible_eps_is_flagged_first():
    report = evaluate(Honest(), in_l2(4, eps=8 / 255), ["fgsm"], **OPTIONS)
    assert "eps 8/255 in L2 is so small" in report.flags[0]


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("kind", ["uniform_noise", "sign_noise"])
def test_noise_has_the_size_of_the_threat_model(norm, kind):
    x = torch.full((5, 1, 8, 8), 0.5)
    eps = {"L2": 0.9, "L1": 7.0}[norm]
    noisy = with_noise(x, torch.arange(5), ThreatModel(eps, norm), 0, kind)
    size = geometry(norm).size(noisy - x)
    assert (size <= eps * (1 + 1e-6)).all()
    # in 64 dimensions nearly the whole volume of a ball is near its surface
    assert (size > 0.9 * eps).all()


@pytest.mark.parametrize(("norm", "eps"), [("L2", 1.0), ("L1", 6.0)])
def test_an_honest_model_passes_the_sanity_table_in_every_norm(norm, eps):
    data = replace(images(16), threat_model=ThreatModel(eps, norm))
    checks, curves = sanity_table(Honest(), data, Suite(classes=4, budget="smoke", queries=50))
    assert [check.check for check in checks if check.result == "suspicious"] == []
    # the largest ball holds every image
    assert curves["accuracy_against_eps"]["eps"][-1] == {"L2": 8.0, "L1": 64.0}[norm]
    assert curves["accuracy_against_eps"]["accuracy"][-1] == 0


# ---- several norms


def over_norms(out: Path | None = None, ranks: Ranks | None = None) -> tuple[Report, dict[Any, Report]]:
    return evaluate_norms(Honest(), images(8), NORMS, ["fgsm", "cw"], out=out, ranks=ranks, **OPTIONS)


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> tuple[Report, dict[Any, Report], Path]:
    folder = tmp_path_factory.mktemp("several")
    return *over_norms(folder), folder


def test_the_worst_case_over_norms_is_that_of_each_image(several):
    report, parts, folder = several
    kinds = [part.per_sample[f"{kind}_correct"] for part in parts.values() for kind in ("fgsm", "cw")]
    worst = np.logical_and.reduce(kinds)
    worst &= report.per_sample["clean_correct"]
    assert np.array_equal(report.per_sample["union_correct"], worst)
    assert report.union.robust_accuracy == worst.mean()
    assert sum(report.union.broken_first_by.values()) + worst.sum() == report.clean_accuracy * report.n
    for norm, part in parts.items():
        assert report.attacks[norm].robust_accuracy <= part.attacks["cw"].robust_accuracy
        assert (part.norm, part.eps) == (norm, report.norms[norm])
    assert report.threat_models == NORMS
    assert report.headline()[0] == "union"
    loaded = Report.load(folder)  # the newest report of the run
    assert loaded.to_dict() == report.to_dict()
    page = (folder / "evaluations" / "default" / "report.html").read_text()
    for norm in parts:
        assert f"../default-{norm}/report.html" in page
        assert (folder / "evaluations" / f"default-{norm}" / "report.html").is_file()
    assert "the worst case over the norms" in page
    assert not (folder / "evaluations" / "default" / "state").exists()


def test_each_norm_is_the_evaluation_of_that_norm_alone(several):
    _, parts, _ = several
    alone = evaluate(Honest(), replace(images(8), threat_model=NORMS[1]), ["fgsm", "cw"], **OPTIONS)
    assert alone.attacks == parts["L2"].attacks
    for kind, values in alone.per_sample.items():
        assert np.array_equal(values, parts["L2"].per_sample[kind])


def test_interrupted_between_norms_it_resumes_with_what_is_complete(several, tmp_path, monkeypatch):
    from awnet.evaluation import norms

    done: list[str] = []

    def stopped(model, dataset, *rest, **options):
        if dataset.threat_model.norm == "L1" and len(done) < 3:
            done.append("stopped")
            raise KeyboardInterrupt
        report = evaluate(model, dataset, *rest, **options)
        done.append(report.norm)
        return report

    monkeypatch.setattr(norms, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        over_norms(tmp_path)
    assert done == ["Linf", "L2", "stopped"]
    attacked: list[str] = []
    real = PGD.perturb
    monkeypatch.setattr(PGD, "perturb", lambda self, *a: (attacked.append(self.norm), real(self, *a))[1])
    report, _ = over_norms(tmp_path)
    assert set(attacked) == {"L1"}
    assert report.to_dict() == several[0].to_dict()
    assert not (tmp_path / "evaluations" / "default" / "state").exists()


def ranked(ranks: Ranks, folder: Path) -> Any:
    report, parts = over_norms(folder / "run", ranks)
    return report.to_dict(), {norm: part.to_dict() for norm, part in parts.items()}


@pytest.mark.slow
def test_two_ranks_give_the_same_bits(several, tmp_path):
    report, parts, _ = several
    for values in on_two_ranks([ranked], tmp_path)["ranked"]:
        assert values == (report.to_dict(), {norm: part.to_dict() for norm, part in parts.items()})


def test_several_norms_are_compared_only_with_the_same(several):
    report, parts, _ = several
    with pytest.raises(ValueError, match="evaluate it in the same norms"):
        evaluate_norms(Honest(), images(8), NORMS[:2], ["fgsm"], compared_with={"other": report}, **OPTIONS)
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(report, parts["L2"])
    difference = compare(report, report)
    assert set(difference.attacks) == {"Linf", "L2", "L1", "union"}


def test_several_norms_refuse_bad_arguments():
    for threats in (NORMS[:1], [NORMS[0], ThreatModel(0.2)]):
        with pytest.raises(ValueError, match="at least two, of different norms"):
            evaluate_norms(Honest(), images(4), threats, ["fgsm"])
    with pytest.raises(TypeError, match="attacks must be names"):
        evaluate_norms(Honest(), images(4), NORMS, {"mine": PGD(Honest(), eps=0.1, step_size=0.1, steps=1)})


# ---- the command line


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_model(create_model("resnet_tiny", num_classes=10, in_channels=1), folder / "model.safetensors")
    return str(folder / "model.safetensors")


def test_the_command_line_takes_several_norms_in_any_case(weights, tmp_path, capsys):
    options = ["--data", "digits", "--limit", "10", "--attacks", "fgsm", "--out", str(tmp_path)]
    main(["evaluate", weights, *options, "--norm", "linf", "L2", "l1", "--eps", "8/255", "0.5", "3"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "L-infinity eps 8/255, L2 eps 0.5 and L1 eps 3" in shown
    for norm in ("Linf", "L2", "L1"):
        assert Report.load(tmp_path / "evaluations" / f"default-{norm}").norm == norm
    assert Report.load(tmp_path).norms == {"Linf": 8 / 255, "L2": 0.5, "L1": 3.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--norm L3 --eps 1", "norm must be one of Linf, L2, L1, got 'L3'"),
        ("--norm L2", "--norm L2 needs --eps, one for each norm: the eps of the data or the run, 0.15"),
        ("--norm L2 L1 --eps 0.5", "must have the same number of values, got 2 (L2 L1) and 1 (0.5)"),
        ("--norm L2 l2 --eps 1 2", "takes each norm once"),
        ("--eps 0.1 0.2", "must have the same number of values"),
        ("--norm L2 --eps 0", "eps must be finite and above 0"),
        ("--norm L1 --eps -1", "eps must be finite and above 0"),
        ("--eps 8", "eps must be in (0, 1]"),
    ],
)
def test_norms_that_do_not_fit_are_one_line(weights, tmp_path, capsys, options, message):
    assert main(["evaluate", weights, "--data", "digits", "--out", str(tmp_path), *options.split()]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_command_for_one_norm_refuses_several(weights, tmp_path, capsys):
    options = ["--data", "digits", "--limit", "10", "--out", str(tmp_path / "x.npz")]
    assert main(["attack", weights, *options, "--norm", "L2", "L1", "--eps", "0.5", "3"]) == 2
    assert "--norm takes one norm here, got L2 L1" in capsys.readouterr().err
    assert main(["attack", weights, *options, "--norm", "l1", "--eps", "3"]) == 0
    with np.load(tmp_path / "x.npz") as stored:
        settings = json.loads(str(stored["provenance"]))["settings"]
        assert (settings["norm"], settings["eps"]) == ("L1", 3.0)

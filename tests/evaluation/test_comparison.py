"""Several reports compared: intervals over images and trainings, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_ind

from awnet.cli import main
from awnet.evaluation import Report, bootstrap_interval, mcnemar, t_interval, welch_interval
from awnet.evaluation.comparison import Group, compare_reports, load_groups
from awnet.evaluation.results import attack_result
from awnet.evaluation.statistics import sign_flip_test
from awnet.files import write_json
from awnet.run_config import MARK

N = 60


def report(seed: int = 0, robust: float = 0.5, attacks: tuple[str, ...] = ("fgsm",), **values: Any) -> Report:
    """A report with random outcomes."""
    generator = np.random.default_rng(seed)
    clean = generator.random(N) < 0.9
    per_sample = {"index": np.arange(N), "label": np.arange(N) % 3, "clean_correct": clean}
    results = {}
    for name in attacks:
        correct = clean & (generator.random(N) < robust)
        per_sample[f"{name}_correct"] = correct
        results[name] = attack_result(clean, correct, {"attack": name, "eps": 0.1, "seed": seed})
    made = Report(
        model="resnet_tiny", dataset="digits", split="test", n=N, eps=0.1,
        clean_accuracy=float(clean.mean()), clean_interval_95=(0.0, 1.0), attacks=results, router_auc={},
        flags=[], settings={"precision": "float32, TF32 off", "fingerprint": "abc"}, environment={},
        per_sample=per_sample,
    )  # fmt: skip
    for name, value in values.items():
        setattr(made, name, value)
    return made


def single(label: str, *reports: Report, seeds: tuple[int, ...] | None = None) -> Group:
    return Group(label, reports, seeds)


def test_differences_of_single_reports_are_paired_by_image() -> None:
    a, b, c = report(0), report(1, 0.7), report(2, 0.2)
    compared = compare_reports([single("a", a), single("b", b), single("c", c)])
    rows = {(row.group, row.quantity): row for row in compared.rows}
    assert len(rows) == 9
    assert rows["a", "fgsm"].difference is None
    for name, other in (("b", b), ("c", c)):
        values = other.per_sample["fgsm_correct"].astype(float) - a.per_sample["fgsm_correct"]
        row = rows[name, "fgsm"]
        assert row.difference == pytest.approx(values.mean())
        assert row.over_images == bootstrap_interval(values)
        assert row.p == mcnemar(other.per_sample["fgsm_correct"], a.per_sample["fgsm_correct"])
        assert row.over_seeds is None
        values = other.w_values("fgsm") - a.w_values("fgsm")
        assert rows[name, "fgsm A_w"].difference == pytest.approx(values.mean())
        assert rows[name, "fgsm A_w"].p == sign_flip_test(values)
    assert compared.table().row_count == 9


def test_holms_correction_widens_intervals_by_the_rank_of_p() -> None:
    groups = [single("a", report(0)), single("b", report(1, 0.9)), single("c", report(2, 0.4))]
    plain, adjusted = (compare_reports(groups, adjust=adjust) for adjust in ("none", "holm"))
    for quantity in ("clean", "fgsm", "fgsm A_w"):
        before, after = (
            [row for row in compared.rows if row.quantity == quantity and row.p is not None]
            for compared in (plain, adjusted)
        )
        smaller = min(range(2), key=lambda i: before[i].p)
        assert after[smaller].p == min(1.0, 2 * before[smaller].p)
        assert after[1 - smaller].p == max(before[1 - smaller].p, after[smaller].p)
        assert (after[smaller].level, after[1 - smaller].level) == (0.975, 0.95)
        assert after[1 - smaller].over_images == before[1 - smaller].over_images
        wide, narrow = after[smaller].over_images, before[smaller].over_images
        assert wide[0] <= narrow[0] < narrow[1] <= wide[1]
        assert wide != narrow
    assert "Holm" in adjusted.caption()
    assert "Holm" not in plain.caption()
    with pytest.raises(ValueError, match="several trainings have no p"):
        compare_reports([groups[0], single("b", report(1), report(2), seeds=(1, 2))], adjust="holm")


def test_trainings_with_the_same_seeds_are_paired_and_others_are_not() -> None:
    first = [report(seed, 0.5) for seed in (0, 1, 2)]
    second = [report(10 + seed, 0.8) for seed in (2, 1, 0)]
    accuracies = [[r.attacks["fgsm"].robust_accuracy for r in group] for group in (first, second)]

    def over_seeds(seeds: tuple[int, ...]) -> Any:
        groups = [single("a", *first, seeds=(0, 1, 2)), single("b", *second, seeds=seeds)]
        (row,) = (r for r in compare_reports(groups).rows if (r.group, r.quantity) == ("b", "fgsm"))
        assert row.accuracy == pytest.approx(np.mean(accuracies[1]))
        assert row.difference == pytest.approx(np.mean(accuracies[1]) - np.mean(accuracies[0]))
        assert row.p is None
        return row.over_seeds

    paired = np.array(accuracies[1]) - np.array(accuracies[0])[[2, 1, 0]]
    assert over_seeds((2, 1, 0)) == pytest.approx(t_interval(paired))
    assert over_seeds((5, 6, 7)) == pytest.approx(welch_interval(accuracies[1], accuracies[0]))


def test_welchs_interval_equals_scipys() -> None:
    a, b = [0.51, 0.55, 0.53], [0.4, 0.47, 0.5, 0.41]
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert welch_interval(a, b) == pytest.approx((interval.low, interval.high))
    assert welch_interval([0.5, 0.5], [0.4, 0.4]) == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="n > 1"):
        welch_interval([0.5], b)


def _other_settings(**settings: Any) -> Report:
    other = report(1)
    other.attacks["fgsm"].settings |= settings
    return other


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (report(1, dataset="cifar10"), "data set cifar10 and digits"),
        (report(1, split="validation"), "split validation and test"),
        (report(1, eps=0.2), "eps 0.2 and 0.1"),
        (report(1, settings={"precision": "bfloat16"}), "precision bfloat16 and float32 or wider"),
        (report(1, settings={"fingerprint": "other"}), "different images"),
        (report(1, per_sample={}), "no outcomes per image"),
        (_other_settings(steps=20), "fgsm steps 20 and None"),
        (_other_settings(eps=0.2), "fgsm eps 0.2 and 0.1"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(other: Report, reason: str) -> None:
    with pytest.raises(ValueError, match=f"not comparable: .*{reason}"):
        compare_reports([single("a", report()), single("b", other)])


def test_all_reasons_are_listed() -> None:
    other = report(1, eps=0.2, split="train")
    with pytest.raises(
        ValueError, match=r"b against a: split train and test; b against a: eps 0\.2 and 0\.1"
    ):
        compare_reports([single("a", report()), single("b", other)])
    with pytest.raises(ValueError, match="two or more"):
        compare_reports([single("a", report())])


def test_unions_may_differ_in_members_that_depend_on_the_model() -> None:
    def with_union(members: dict[str, dict[str, Any]], after: tuple[str, ...] = ()) -> Report:
        made = report(1, attacks=("union",))
        made.union = made.attacks.pop("union")
        made.union.settings = {"members": members, "after": list(after)}
        return made

    static = with_union({"aa": {"queries": 9}, "joint": {"lambdas": [0.0]}})
    routed = with_union({"aa": {"queries": 9}, "joint": {"lambdas": [0.0, 1.0]}, "forced": {"steps": 5}})
    compare_reports([single("a", static), single("b", routed)])
    for other, reason in (
        (with_union({"aa": {"queries": 8}, "joint": {}}), "union: aa queries 8 and 9"),
        (with_union({"aa": {"queries": 9}}), "only one union includes joint"),
        (with_union(static.union.settings["members"], ("fgsm",)), "only one union includes fgsm"),
    ):
        with pytest.raises(ValueError, match=reason):
            compare_reports([single("a", static), single("b", other)])


def test_an_attack_that_one_report_lacks_is_left_out_with_a_note() -> None:
    groups = [single("a", report(attacks=("fgsm", "cw"))), single("b", report(1))]
    compared = compare_reports(groups)
    assert {row.quantity for row in compared.rows} == {"clean", "fgsm", "fgsm A_w"}
    assert compared.notes == ("CW is not compared: b was evaluated without it",)


def run(folder: Path, seed: int, robust: float, model: str) -> Path:
    """A run folder with a report."""
    config = {
        "kind": MARK, "model": {"name": model}, "recipe": {"name": "trades"}, "seed": seed, "sessions": [],
        "dataset": {"name": "digits", "fingerprints": {"train": str(seed), "validation": "", "test": ""}},
        "teachers": {"robust": {"weights": str(seed)}},
    }  # fmt: skip
    folder.mkdir()
    write_json(folder / "config.json", config)
    report(seed, robust).publish(folder)
    return folder


@pytest.mark.usefixtures("undrawn")
def test_the_command_compares_runs_evaluations_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [run(tmp_path / f"a-seed{seed}", seed, 0.5, "resnet_tiny") for seed in (0, 1)]
    runs += [run(tmp_path / f"b-seed{seed}", seed, 0.9, "awnet_tiny") for seed in (0, 1)]
    groups = load_groups(runs)
    assert [(group.label, group.seeds) for group in groups] == [
        ("a-seed (2 seeds)", (0, 1)),
        ("b-seed (2 seeds)", (0, 1)),
    ]
    assert main(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert "over seeds" in out
    assert "model.name" in out
    page = Path("comparison/comparison.html").read_text()
    assert "data:image/png" in page
    assert "b-seed (2 seeds)" in page
    assert Path("comparison/comparison.png").stat().st_size > 10_000
    rows = json.loads(Path("comparison/comparison.json").read_text())["rows"]
    assert len(rows) == 6
    mixed = [str(runs[0]), str(runs[2] / "evaluations" / "default"), str(runs[3] / "report.json")]
    assert [group.label for group in load_groups(runs[:2])] == ["a-seed0", "a-seed1"]
    assert main(["compare", *mixed, "--out", "other"]) == 0
    assert [one["label"] for one in json.loads(Path("other/comparison.json").read_text())["groups"]] == [
        "a-seed0",
        "b-seed (2 seeds)",
    ]


@pytest.mark.usefixtures("undrawn")
def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path / "a", 0, 0.5, "resnet_tiny") / "evaluations" / "default"
    second = tmp_path / "b"
    changed = replace(report(1, eps=0.2))
    changed.save(second)
    for words, message in (
        ([first, second], "not comparable: b against a: eps 0.2 and 0.1"),
        ([first], "two or more reports"),
        ([first, tmp_path / "nowhere"], "does not exist: give a run folder"),
        ([first, tmp_path / "a", "--name", "full"], "has no evaluation 'full': run awnet evaluate"),
    ):
        assert main(["compare", *map(str, words), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

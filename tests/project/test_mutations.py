"""The faults seeded in the kernels (tests/mutations/): their texts still match, and each is caught."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutations import runner
from mutations.faults import FAULTS, Fault
from support.cuda_on_cpu import compiler

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.name}")
def test_a_faults_text_occurs_once_and_its_tests_exist(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) == 1
    assert fault.old not in fault.new or len(fault.new) > len(fault.old)
    assert fault.tests
    for name in fault.tests:
        file, _, function = name.partition("[")[0].partition("::")
        assert re.search(rf"^def {function}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name


def test_names_of_faults_are_unique() -> None:
    named = [(fault.file, fault.name) for fault in FAULTS]
    assert len(set(named)) == len(named)
    assert {fault for lane in runner.LANES for fault in runner.faults_of(lane)} == set(FAULTS)


def test_the_page_lists_these_faults_all_of_them_caught() -> None:
    text = runner.PAGE.read_text(encoding="utf-8")
    assert f"\n{len(FAULTS)} of {len(FAULTS)} are caught.\n" in text
    listed = runner.listed()
    assert list(listed) == [(fault.name, fault.file) for fault in FAULTS]
    assert text.count("\n| ") == len(FAULTS) + 1  # and the head
    for fault in FAULTS:
        assert listed[fault.name, fault.file] in {name.partition("[")[0] for name in fault.tests}


def test_a_text_that_is_missing_or_there_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\nb = 1\n")
    for old, number in (("c", 0), ("1", 2)):
        with (
            pytest.raises(ValueError, match=rf"code.py has {number} times, not once: '{old}'"),
            runner.applied(Fault("", "code.py", old, "", ()), tmp_path),
        ):
            pass
    with runner.applied(Fault("", "code.py", "b", "c", ()), tmp_path):
        assert (tmp_path / "code.py").read_text() == "a = 1\nc = 1\n"
    assert (tmp_path / "code.py").read_text() == "a = 1\nb = 1\n"


OUTCOMES = {
    "assertion": ("def test_it(): assert value == 1", True),
    "search": (
        "from hypothesis import given, strategies as st\n@given(st.integers())\ndef test_it(x): assert value == 1",
        True,
    ),
    "survives": ("def test_it(): assert value in (0, 1)", False),
    "exception": ("def test_it(): 1 / value", False),
    "import": ("1 / value\ndef test_it(): pass", False),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_only_a_failed_assertion_counts_as_caught(case: str, tmp_path: Path) -> None:
    body, caught = OUTCOMES[case]
    copy = tmp_path / "awnet"
    (copy / "tests").mkdir(parents=True)
    (copy / "tests" / "mutations").symlink_to(ROOT / "tests" / "mutations")
    (copy / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")  # or pytest looks for one above
    (copy / "value.py").write_text("value = 1\n")
    (copy / "tests" / "test_value.py").write_text(f"from value import value\n{body}\n")
    result = runner.outcome(Fault("", "value.py", "1", "0", ("tests/test_value.py",)), copy)
    assert (result.caught_by == "tests/test_value.py::test_it") is caught
    assert bool(result.why) is not caught
    assert (result.why == "survived 1 tests") is (case == "survives")


def test_a_named_test_that_is_skipped_is_reported(tmp_path: Path) -> None:
    file = "tests/test_value.py"
    copy = tmp_path / "awnet"
    (copy / "tests").mkdir(parents=True)
    (copy / "tests" / "mutations").symlink_to(ROOT / "tests" / "mutations")
    (copy / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (copy / file).write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', [0, 1])\ndef test_cases(x): pass\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    names = [f"{file}::test_cases", f"{file}::test_cases[1]", f"{file}::test_skipped"]
    passed = runner.test(copy, [file], runner.TEST_TIMEOUT)["passed"]
    assert runner.without_a_pass(names, passed) == [f"{file}::test_skipped"]


def test_faults_without_a_build_have_tests_without_the_native_module() -> None:
    names = [name for fault in runner.faults_of("other") for name in fault.tests]
    assert not [name for name in names if name.startswith(("tests/ops/test_amx", "tests/ops/test_native"))]


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler to rebuild the kernels")
@pytest.mark.parametrize("lane", runner.LANES)
def test_every_fault_is_caught(lane: str) -> None:
    results = list(runner.outcomes(lane))
    assert [outcome.fault for outcome in results] == runner.faults_of(lane)
    assert [
        (outcome.fault.file, outcome.fault.name, outcome.why)
        for outcome in results
        if outcome.caught_by is None
    ] == []

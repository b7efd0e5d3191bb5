"""A pytest plugin for the runner: writes down what failed and how, and lets no test search for long.

A fault is caught when a test's assertion fails; a module that does not import, or an exception on the way, says
nothing about what the tests can see.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

RESULT = "AWNET_VERDICT"  # the file to write to

_passed: list[str] = []
_result: dict[str, object] = {"passed": _passed, "failed": None, "asserted": False, "why": ""}


def pytest_sessionstart() -> None:
    """After conftest.py and before the tests are imported: the first failing example is enough."""
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("fault", settings(), phases=phases, report_multiple_bugs=False)
    settings.load_profile("fault")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _passed.append(report.nodeid)


def pytest_exception_interact(
    node: pytest.Item | pytest.Collector, call: pytest.CallInfo[None], report: pytest.TestReport
) -> None:
    assert call.excinfo is not None
    asserted = call.excinfo.errisinstance(AssertionError) and getattr(report, "when", None) == "call"
    why = f"{call.excinfo.typename}: {call.excinfo.value}"
    _result.update(failed=node.nodeid, asserted=asserted, why=why[:2000])


def pytest_sessionfinish() -> None:
    Path(os.environ[RESULT]).write_text(json.dumps(_result))

"""The registry by pytest-benchmark: `make bench-pytest` times it at full size, `make test` runs it once, tiny."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from awnet.benchmarks import verification
from awnet.benchmarks.cases import CASES, MODES, SMOKE_CASES, Mode, make_upstream
from awnet.benchmarks.providers import providers

CPU = torch.device("cpu")


@pytest.mark.parametrize("provider", ["unfused", "static", "eager", "cpp"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_every_layer_case_runs_with_every_provider(
    case: str, mode: Mode, provider: str, benchmark: Any
) -> None:
    known = providers()
    if provider not in known:
        pytest.skip(f"{provider} is not built here")
    (chosen,) = (c for c in (SMOKE_CASES if benchmark.disabled else CASES) if c.name == case)
    batch = 8 if benchmark.disabled or case == "network" else 32
    problem = chosen.problem(batch, known[provider].static, CPU, torch.float32, False, 0)
    exact = verification.exact_provider(chosen)
    upstream = make_upstream(chosen, problem, mode, exact.layer, 1)
    benchmark.group = f"{case}, {mode}"
    trial = verification.Trial(chosen, problem, known[provider], mode, upstream, 4)
    got = benchmark.pedantic(trial, rounds=5, warmup_rounds=1)
    assert all(bool(torch.isfinite(value).all()) for value in got.values())
    if mode != "training":  # there the warm-up has moved the running statistics
        want = verification.Trial(chosen, problem.to(torch.float64), exact, mode, upstream.double(), 1)()
        assert (
            verification.fault(
                lambda: got, want, verification.error_limits(chosen, problem, mode, upstream, want)
            )
            == ""
        )

"""Intervals and tests of an evaluation against scipy and resampling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from scipy.stats import t as student

from awnet.evaluation import (
    auc,
    bootstrap_interval,
    mcnemar,
    t_interval,
    w_robust_accuracy,
    wilson_interval,
)
from awnet.evaluation.statistics import holm, sign_flip_test

# ---- statistics


@pytest.mark.parametrize("n", [1, 17, 400])
def test_wilson_interval_equals_scipys(n: int) -> None:
    for k in {0, 1, n // 3, n - 1, n}:
        expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
        assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson_interval(0, n)[0] == 0.0
    assert wilson_interval(n, n)[1] == 1.0


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_interval_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(k, n)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_mcnemar_equals_scipys_binomial_test(n: int, p: float, q: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = generator.random(n) < p, generator.random(n) < q
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    expected = 1.0 if only_a + only_b == 0 else binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)  # scipy sums in floating point
    assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_equals_values_by_hand_and_handles_large_counts() -> None:
    a = np.array([True] * 8 + [False] * 2)
    assert mcnemar(a, ~a) == 2 * (1 + 10 + 45) / 1024
    assert mcnemar(a, a) == 1.0
    half = np.arange(10_000) % 2 == 0
    assert mcnemar(half, ~half) == 1.0
    assert mcnemar(np.ones(10_000, bool), np.zeros(10_000, bool)) == 0.0  # 2^-9999 underflows
    with pytest.raises(ValueError, match="bool"):
        mcnemar(a, ~a[:5])
    with pytest.raises(ValueError, match="bool"):
        mcnemar(a.astype(float), a)


def test_t_interval_equals_scipys() -> None:
    values = np.random.default_rng(3).normal(size=7)
    for level in (0.5, 0.95):
        expected = student.interval(level, 6, loc=values.mean(), scale=values.std(ddof=1) / 7**0.5)
        assert t_interval(values, level) == pytest.approx(expected, rel=1e-12)
    for few in ([], [0.5], [[0.5, 0.4]]):
        with pytest.raises(ValueError, match="n > 1"):
            t_interval(few)


def test_bootstrap_interval_equals_resampling_by_index() -> None:
    generator = np.random.default_rng(3)
    values = generator.choice([-1.0, -0.5, 0.0, 0.5, 1.0], 80, p=[0.1, 0.1, 0.4, 0.3, 0.1])
    rows = generator.integers(0, 80, (20_000, 80))
    expected = np.quantile(values[rows].mean(1), [0.025, 0.975])
    # chance moves a quantile of 10,000 resamples by less than a step of the means' grid, 0.5 / 80
    assert np.allclose(bootstrap_interval(values), expected, atol=0.0063, rtol=0)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(np.full(10, 0.5)) == (0.5, 0.5)
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_interval([])


def test_bootstrap_interval_has_its_nominal_coverage() -> None:
    generator = np.random.default_rng(0)
    truth, hits = 0.3, 0
    for trial in range(400):
        low, high = bootstrap_interval(generator.random(200) < truth, resamples=1000, seed=trial)
        hits += low <= truth <= high
    assert 0.91 < hits / 400 < 0.98  # 95 %, give or take 3.6 standard errors


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20)
)
def test_auc_counts_pairs_with_ties_as_half(clean: list[int], adversarial: list[int]) -> None:
    wins = sum((c > a) + 0.5 * (c == a) for c in clean for a in adversarial)
    assert auc(clean, adversarial) == pytest.approx(wins / (len(clean) * len(adversarial)), abs=1e-12)


def test_auc_refuses_empty_scores() -> None:
    with pytest.raises(ValueError, match="non-empty scores"):
        auc([], [1.0])


def test_w_robust_accuracy_is_the_mean_of_clean_and_robust() -> None:
    assert w_robust_accuracy(0.99, 0.6) == pytest.approx(0.795)
    for clean, adversarial in ((99, 0.6), (0.9, -0.1), (float("nan"), 0.5)):
        with pytest.raises(ValueError, match="fraction"):
            w_robust_accuracy(clean, adversarial)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=10))
def test_the_sign_flip_test_equals_the_count_of_all_signs(differences: list[float]) -> None:
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    sums = np.abs(signs @ np.array(differences))
    expected = np.mean(sums >= abs(sum(differences)))  # multiples of ½ are exact
    assert sign_flip_test(differences) == pytest.approx(expected, rel=1e-9)


def test_the_sign_flip_test_is_mcnemars_for_one_accuracy_and_handles_many_images() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 10_000)) < np.array([[0.5], [0.52]])
    assert sign_flip_test(a.astype(float) - b) == pytest.approx(mcnemar(a, b), rel=1e-6)
    assert sign_flip_test(np.zeros(5)) == 1.0
    with pytest.raises(ValueError, match=r"multiples of 0\.5"):
        sign_flip_test([0.3])


def test_holms_correction_equals_values_by_hand() -> None:
    adjusted, levels = holm([0.04, 0.01, 0.03])
    assert adjusted == pytest.approx([0.06, 0.03, 0.06])
    assert levels == pytest.approx([0.95, 1 - 0.05 / 3, 0.975])
    assert holm([0.6, 0.7])[0] == pytest.approx([1.0, 1.0])

"""Statistics of small test sets: intervals, paired comparison, area under the ROC curve."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95

Interval = tuple[float, float]


def w_robust_accuracy(clean: float, adversarial: float) -> float:
    """A_w = ½A_nat + ½A_adv (Eq. 23), all three as fractions."""
    for name, value in (("clean", clean), ("adversarial", adversarial)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be an accuracy as a fraction in [0, 1], got {value}")
    return 0.5 * clean + 0.5 * adversarial


def wilson_interval(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a proportion ``successes / n``, also valid at 0 and 1."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"successes must be in 0 … n with n > 0, got {successes} of {n}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # the ends at 0 and n are exact, without rounding
    return (0.0 if successes == 0 else center - half), (1.0 if successes == n else center + half)


def bootstrap_interval(
    values: ArrayLike, *, level: float = LEVEL, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of ``values`` ``[n]``, one value per sample.

    For A_w a sample's value is ½(clean correct) + ½(adversarial correct), which keeps the two accuracies
    paired; for a comparison, the difference of two models' values. If all values are equal the interval has
    zero width.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values must be a non-empty [n], got shape {list(array.shape)}")
    # resampling n of n values is one multinomial draw of how often each distinct value occurs
    distinct, counts = np.unique(array, return_counts=True)
    draws = np.random.default_rng(seed % 2**64).multinomial(array.size, counts / array.size, size=resamples)
    means = draws @ distinct / array.size
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, level: float = LEVEL, seed: int = 0
) -> tuple[float, Interval]:
    """The mean of ``a`` minus ``b``, ``[n]`` over the same samples, and its bootstrap interval."""
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return float(differences.mean()), bootstrap_interval(differences, level=level, seed=seed)


def t_interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """Student's interval of the mean of ``values`` ``[n]``, n ≥ 2, for example one value per training."""
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size < 2:
        raise ValueError(f"values must be [n] with n > 1, got shape {list(array.shape)}")
    half = stdtrit(array.size - 1, (1 + level) / 2) * array.std(ddof=1) / math.sqrt(array.size)
    return float(array.mean() - half), float(array.mean() + half)


def welch_interval(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> Interval:
    """Welch's interval of the difference of two means, of ``a`` [n] minus ``b`` [m], n and m ≥ 2."""
    from scipy.special import stdtrit

    first, second = (np.asarray(values, dtype=np.float64) for values in (a, b))
    if first.ndim != 1 or second.ndim != 1 or min(first.size, second.size) < 2:
        raise ValueError(
            f"a and b must be [n] with n > 1, got shapes {list(first.shape)} and {list(second.shape)}"
        )
    parts = [values.var(ddof=1) / values.size for values in (first, second)]
    difference, variance = float(first.mean() - second.mean()), float(sum(parts))
    if variance == 0:
        return difference, difference
    degrees = variance**2 / sum(p**2 / (v.size - 1) for p, v in zip(parts, (first, second), strict=True))
    half = float(stdtrit(degrees, (1 + level) / 2)) * math.sqrt(variance)
    return difference - half, difference + half


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided p of McNemar's exact test: whether ``a`` and ``b``, bool ``[n]``, are correct equally often.

    Only samples that exactly one of the two gets right count; under the null hypothesis each is a fair coin
    flip. Returns 1 if there are none.
    """
    first, second = _paired(a, b)
    only_a, only_b = int((first & ~second).sum()), int((~first & second).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    tail = term = 1  # binomial coefficients up to k of n, as exact integers
    for i in range(k):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def sign_flip_test(differences: ArrayLike) -> float:
    """Two-sided p of the exact sign-flip test: whether paired ``differences`` ``[n]`` have mean 0.

    Under the null hypothesis each difference has either sign with probability ½. The differences are
    multiples of ½, as those of A_w's values are. For differences of -1, 0 and 1 it is McNemar's exact test.
    """
    from scipy.special import gammaln

    array = np.asarray(differences, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.array_equal(2 * array, np.rint(2 * array)):
        raise ValueError(f"differences must be multiples of 0.5, [n], got {array.dtype} {list(array.shape)}")
    halves = np.rint(2 * array).astype(np.int64)
    distribution, largest = np.ones(1), 0  # of the sum with random signs, over -largest … largest
    for size, count in zip(*np.unique(np.abs(halves[halves != 0]), return_counts=True), strict=True):
        heads = np.arange(count + 1)
        coins = np.exp(
            gammaln(count + 1) - gammaln(heads + 1) - gammaln(count - heads + 1) - count * math.log(2)
        )
        sums = np.zeros(2 * size * count + 1)
        sums[:: 2 * size] = coins
        distribution, largest = np.convolve(distribution, sums), largest + size * count
    totals = np.arange(-largest, largest + 1)
    return min(1.0, float(distribution[np.abs(totals) >= abs(halves.sum())].sum()))


def holm(p: ArrayLike) -> tuple[list[float], list[float]]:
    """Holm's correction of ``p`` ``[m]``: adjusted p-values and the level of each interval.

    The k-th smallest of m p-values, from k = 0, is multiplied by m - k, but never falls below the one before;
    its interval has the level 1 - 0.05 / (m - k).
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    factors = np.empty(values.size)
    factors[order] = values.size - np.arange(values.size)
    adjusted = np.empty(values.size)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, (values * factors)[order]))
    return adjusted.tolist(), (1 - (1 - LEVEL) / factors).tolist()


def auc(clean: ArrayLike, adversarial: ArrayLike) -> float:
    """Probability that a clean score ``[n]`` exceeds an adversarial one ``[m]``, ties counting half.

    This is the area under the ROC curve (Mann–Whitney): 1 separates perfectly, ½ is chance.
    """
    from sklearn.metrics import roc_auc_score

    positive, negative = np.asarray(clean), np.asarray(adversarial)
    if positive.ndim != 1 or negative.ndim != 1 or not (positive.size and negative.size):
        raise ValueError(
            "clean and adversarial must be non-empty scores [n], got shapes "
            f"{list(positive.shape)} and {list(negative.shape)}"
        )
    kinds = np.concatenate([np.ones(positive.size), np.zeros(negative.size)])
    return float(roc_auc_score(kinds, np.concatenate([positive, negative])))


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    first, second = np.asarray(a), np.asarray(b)
    if first.dtype != np.bool_ or second.dtype != np.bool_ or first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            "a and b must be bool [n] over the same samples, got "
            f"{first.dtype} {list(first.shape)} and {second.dtype} {list(second.shape)}"
        )
    return first, second

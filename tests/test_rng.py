import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awnet import rng

INDEX = torch.arange(2000)


def test_random_numbers_equal_stored_values():
    # runs that were interrupted, and reports of other machines, depend on these
    assert rng.key() == 5694367389426422167
    assert rng.key(0, "shuffle", 3) == -4587913170360444004
    index = torch.tensor([0, 1, 49_999, 2**40])
    assert rng.bits(7, index, ()).tolist() == [
        -5427670852754781173,
        -919360232419776405,
        -1987618367883756272,
        867832000977438569,
    ]
    assert rng.uniform(7, index, (2,)).flatten().tolist() == [
        0.7057653665542603,
        0.43680357933044434,
        0.950161337852478,
        0.8796869516372681,
        0.8922509551048279,
        0.3183174133300781,
        0.047045230865478516,
        0.03731662034988403,
    ]
    assert rng.integers(7, index, (3,), 9).flatten().tolist() == [6, 3, 7, 8, 7, 8, 8, 2, 1, 0, 0, 4]
    # log and cos of another library may differ in the last bits
    torch.testing.assert_close(
        rng.normal(7, index, ()),
        torch.tensor([0.5735763311386108, 2.4489805698394775, 0.0394490584731102, 0.3071165382862091]),
        atol=1e-5,
        rtol=1e-5,
    )


def test_bits_are_those_of_splitmix64_in_plain_integers():
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key = rng.key("any")
    expected = [
        [mix((mix(mix((i * gamma + key) & mask)) + (j + 1) * gamma) & mask) for j in range(3)]
        for i in (0, 5, 2**40)
    ]
    got = rng.bits(key, torch.tensor([0, 5, 2**40]), (3,))
    assert [[value % 2**64 for value in row] for row in got.tolist()] == expected


def test_keys_depend_on_every_part():
    keys = {rng.key(seed, name, epoch) for seed in range(10) for name in "ab" for epoch in range(10)}
    assert len(keys) == 200
    assert rng.key(1, 23) != rng.key(12, 3)
    assert rng.key("1") != rng.key(1)


def test_uniform_has_the_moments_of_a_uniform():
    u = rng.uniform(rng.key(0), INDEX, (10, 10)).double()  # n = 200,000
    assert u.min() >= 0
    assert u.max() < 1
    # 5 standard errors: sqrt(1/12/n) for the mean, sqrt(1/180/n) for the variance
    assert abs(u.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / u.numel())
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / u.numel())


def test_uniform_fills_its_bins_evenly():
    counts = torch.histc(rng.uniform(rng.key(1), INDEX, (100,)), 100, 0, 1)
    chi2 = ((counts - 2000) ** 2 / 2000).sum()
    assert 40 < chi2 < 190  # 99 degrees of freedom: mean 99, deviation 14


@pytest.mark.parametrize("which", ["samples", "positions", "keys"])
def test_numbers_of_neighboring_keys_are_uncorrelated(which):
    if which == "keys":
        a, b = rng.uniform(rng.key(0), INDEX, (100,)), rng.uniform(rng.key(1), INDEX, (100,))
    else:
        u = rng.uniform(rng.key(0), INDEX, (100,))
        a, b = (u[:-1], u[1:]) if which == "samples" else (u[:, :-1], u[:, 1:])
    correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_normal_has_the_moments_of_a_normal():
    z = rng.normal(rng.key(0), INDEX, (100,)).double()
    n = z.numel()
    assert torch.isfinite(z).all()
    # standard errors of the first four moments of N(0, 1): 1, sqrt 2, sqrt 15, sqrt 96 over sqrt n
    for power, (moment, deviation) in enumerate([(0, 1), (1, 2**0.5), (0, 15**0.5), (3, 96**0.5)], 1):
        assert abs((z**power).mean() - moment) < 5 * deviation / math.sqrt(n), power


def test_integers_are_all_reached_and_evenly():
    values = rng.integers(rng.key(0), INDEX, (100,), 9)
    counts = torch.bincount(values.flatten(), minlength=9)
    assert len(counts) == 9
    expected = values.numel() / 9
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


@given(st.permutations(range(12)), st.integers(1, 12))
def test_a_sample_gets_the_same_whatever_its_place_and_batch(order, batch):
    index = torch.tensor(order) + 1000
    whole = rng.uniform(3, torch.arange(1000, 1012), (2, 3))
    parts = torch.cat([rng.uniform(3, part, (2, 3)) for part in index.split(batch)])
    assert torch.equal(parts, whole[torch.tensor(order)])


def test_random_numbers_for_an_empty_batch_and_a_scalar_shape():
    assert rng.normal(0, torch.empty(0, dtype=torch.int64), (2, 3)).shape == (0, 2, 3)
    assert rng.uniform(0, torch.arange(4), ()).shape == (4,)


@pytest.mark.parametrize(
    "index", [torch.arange(3.0), torch.arange(3, dtype=torch.int32), torch.arange(4).reshape(2, 2)]
)
def test_indices_of_another_dtype_or_shape_are_refused(index):
    with pytest.raises(ValueError, match=r"index must be int64 \[B\], got"):
        rng.uniform(0, index, (2,))


@pytest.mark.parametrize("high", [0, -3, 2**24])
def test_an_impossible_range_is_refused(high):
    with pytest.raises(ValueError, match="high must be in"):
        rng.integers(0, torch.arange(3), (), high)

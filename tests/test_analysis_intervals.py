"""Intervals and paired tests against hand values, enumeration and their own coverage."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import analysis


def test_document_mean_interval_covers_at_its_level():
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 20, 40)
        document = np.repeat(np.arange(40), sizes)
        values = rng.normal(size=40)[document] + rng.normal(size=len(document))
        interval = analysis.document_mean(values, document, num_resamples=300, seed=seed)
        assert interval.estimate == pytest.approx(values.mean())
        hits += interval.low <= 0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.98  # percentile intervals of 40 blocks fall a little short of 95 %


def test_intervals_without_support_are_nan():
    assert np.isnan(analysis.document_mean([], [])).all()
    assert analysis.document_mean([1.0, 3.0], [0, 0]).estimate == 2
    assert np.isnan(analysis.document_mean([1.0, 3.0], [0, 0]).low)
    assert np.isnan(analysis.t_interval([4.0]).low)
    assert np.isnan(analysis.t_interval([]).estimate)
    assert np.isnan(analysis.win_rate([], []))


def test_t_interval_by_hand():
    # mean 2, s = 1, t(0.975, 2) = 4.3027, half width 4.3027 / sqrt(3) = 2.4842
    np.testing.assert_allclose(analysis.t_interval([1.0, 2.0, 3.0]), [2, -0.48414, 4.48414], atol=1e-4)


def test_win_rate_counts_ties_half():
    assert analysis.win_rate([1, 2, 3, 4], [2, 2, 2, 5]) == pytest.approx(2.5 / 4)


def test_sign_test_by_hand():
    # 5 of 5 positive: 2 / 32; 4 of 5: 2 * 6 / 32; zeros are left out; an even split cannot exceed 1
    assert analysis.sign_test([1, 2, 3, 4, 5, 0]) == pytest.approx(2 / 32)
    assert analysis.sign_test([1, 2, 3, 4, -5]) == pytest.approx(12 / 32)
    assert analysis.sign_test([1, -1]) == 1
    assert analysis.sign_test([0.0]) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=6))
def test_permutation_test_matches_enumeration(differences):
    observed = abs(sum(differences))
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    expected = np.mean([s >= observed for s in sums])
    # Thirds and the like are not exact in binary: ties must stay ties.
    assert analysis.paired_permutation_test(np.array(differences) / 30) == pytest.approx(expected)


def test_permutation_test_exact_and_sampled():
    assert analysis.paired_permutation_test([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert analysis.paired_permutation_test([0.0, 0.0]) == 1
    assert analysis.paired_permutation_test(np.ones(20)) == pytest.approx(1 / 10_001, rel=2)
    assert analysis.paired_permutation_test(np.tile([1.0, -1.0], 10)) > 0.9


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-2, -1, "better"), (1, 2, "worse"), (-1, 1, "tie"), (0, 1, "tie"), (np.nan, np.nan, "unknown")],
)
def test_verdict_calls_an_interval_with_zero_a_tie(low, high, expected):
    assert analysis.verdict(analysis.Interval(0.0, low, high)) == expected

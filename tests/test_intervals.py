"""Intervals against closed forms, simulation and published values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deftlib.intervals import Interval, bootstrap_interval, paired_bootstrap, wilson_interval


def test_bootstrap_of_a_mean_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    interval = bootstrap_interval(values, resamples=10000)
    half_width = 1.96 * values.std() / math.sqrt(400)
    assert interval.mean == values.mean()
    assert interval.n == 400
    assert interval.low == pytest.approx(interval.mean - half_width, abs=0.1 * half_width)
    assert interval.high == pytest.approx(interval.mean + half_width, abs=0.1 * half_width)


def test_bootstrap_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(2)
    intervals = [bootstrap_interval(rng.normal(size=50), resamples=400, seed=i) for i in range(400)]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals)
    assert 0.90 < covered / 400 < 0.98


def test_seeds_that_disagree_widen_the_interval():
    prompts = np.random.default_rng(3).normal(size=100)
    agreeing = bootstrap_interval(np.stack([prompts, prompts, prompts]))
    disagreeing = bootstrap_interval(np.stack([prompts - 1, prompts, prompts + 1]))
    assert disagreeing.mean == pytest.approx(agreeing.mean)
    assert disagreeing.high - disagreeing.low > 2 * (agreeing.high - agreeing.low)
    assert disagreeing.n == 100


def test_one_seed_is_the_interval_over_prompts():
    values = np.arange(10.0)
    assert bootstrap_interval(values[None]) == bootstrap_interval(values)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.arange(10.0)
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)


def test_pairing_removes_what_both_sides_share():
    rng = np.random.default_rng(4)
    shared = rng.normal(0, 10, size=(2, 200))
    a, b = shared + rng.normal(0.5, 0.1, size=(2, 200)), shared
    difference = paired_bootstrap(a, b)
    assert difference == bootstrap_interval(a - b)
    assert 0.45 < difference.low < difference.mean < difference.high < 0.55
    assert bootstrap_interval(a).low < bootstrap_interval(b).high  # unpaired, nothing could be told apart


def test_a_constant_difference_has_an_interval_of_no_width():
    assert paired_bootstrap([3.0, 5.0, 9.0], [2.0, 4.0, 8.0]) == Interval(1.0, 1.0, 1.0, 3)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], np.zeros((2, 2, 2))])
def test_values_without_a_mean_are_refused(values):
    with pytest.raises(ValueError, match="finite values of shape"):
        bootstrap_interval(values)


def test_pairs_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        paired_bootstrap([1.0, 2.0], [[1.0, 2.0]])


def test_wilson_interval_equals_published_values():
    # Newcombe (1998), Statistics in Medicine 17, Table I, method 3: 81 of 263 and 15 of 148.
    assert wilson_interval(81, 263)[:3] == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148)[:3] == pytest.approx((15 / 148, 0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20)[:3] == pytest.approx((0, 0, 0.1611), abs=5e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share_and_stays_between_zero_and_one(trial):
    share, low, high, n = wilson_interval(*trial)
    assert 0 <= low <= share <= high <= 1
    assert low < high and n == trial[1]


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_trials_are_refused(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)

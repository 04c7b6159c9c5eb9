"""Intervals and p-values against closed forms, simulation and published values."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deftlib.intervals import (
    Interval,
    Samples,
    mean_interval,
    p_equivalent,
    p_value,
    paired_interval,
    plausible_difference,
    plausible_means,
    smallest_visible,
    unpaired_interval,
    wilson_interval,
)
from deftlib.studies import coverage


def width(interval):
    return interval.high - interval.low


# ---- one seed ------------------------------------------------------------------------------------------------------


def test_many_prompts_of_one_seed_have_the_interval_of_students_t():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    interval = mean_interval(values)
    half = 1.966 * values.std(ddof=1) / math.sqrt(400)  # t of 399 degrees of freedom
    assert interval.mean == values.mean() and interval.n == 400
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02 * half)


def test_few_prompts_have_the_means_of_their_subsets():
    """Of 10 values there are 1,023 subsets; the ends are the quantiles of their means, whatever the distribution."""
    values = np.array([1.0, 2.0, 4.0, 8.0, 9.0, 11.0, 15.0, 16.0, 20.0, 40.0])
    means = [np.mean([v for i, v in enumerate(values) if k >> i & 1]) for k in range(1, 1024)]
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.3)
    assert interval.mean == values.mean()


def test_a_sign_flip_test_refuses_what_the_interval_of_few_leaves_out():
    values = np.random.default_rng(2).choice([-1.0, 0.0, 1.0], p=[0.2, 0.2, 0.6], size=25)
    signs = np.random.default_rng(3).choice([-1, 1], size=(20000, 25))
    exact = np.mean(np.abs((signs * values).mean(1)) >= abs(values.mean()) - 1e-12)
    assert p_value(plausible_means(values)[1]) == pytest.approx(exact, abs=0.02)


def test_one_seed_is_the_interval_over_prompts():
    values = np.arange(10.0)
    assert mean_interval(values[None]) == mean_interval(values)


def test_runs_alone_are_units_too():
    """[S, 1]: one value a run, as in R_dis at the end of training. t of 2 degrees of freedom: 4.303."""
    values = np.array([[1.0], [2.0], [3.0]])
    assert width(mean_interval(values)) == pytest.approx(2 * 4.303 / math.sqrt(3), rel=0.002)


# ---- seeds and prompts ---------------------------------------------------------------------------------------------


def test_seeds_that_disagree_widen_the_interval():
    prompts = np.random.default_rng(3).normal(size=100)
    noise = 0.01 * np.random.default_rng(4).normal(size=(3, 100))
    agreeing = mean_interval(prompts + noise)
    disagreeing = mean_interval(prompts + noise + [[-1], [0], [1]])
    assert disagreeing.mean == pytest.approx(agreeing.mean) and disagreeing.n == 100
    assert width(disagreeing) > 8 * width(agreeing)  # three runs that far apart tell little
    assert width(agreeing) == pytest.approx(width(mean_interval(prompts)), rel=0.05)


def test_two_seeds_say_less_than_five():
    rng = np.random.default_rng(5)
    five = rng.normal(size=(5, 1)) + 0.1 * rng.normal(size=(5, 100))
    assert width(mean_interval(five[:2])) > width(mean_interval(five))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_sd", [0.0, 1.0, 2.0])
def test_coverage_in_small(seeds, seed_sd):
    """In full: `make statistics`, figures/statistics/table_coverage.md."""
    rng = np.random.default_rng([seeds, int(seed_sd)])
    found = [mean_interval(coverage.crossed(seeds, 25, seed_sd, 0.5, rng)) for _ in range(400)]
    share, _ = coverage.covered(found)
    assert 91 < share <= 100


def test_the_full_simulation_has_a_row_for_every_situation():
    table = coverage.coverage(rounds=20, seeds=(1, 3), prompts=(25,), seed_sds=(0.0, 2.0), shares=(0.5,))
    assert list(table["sample"]) == ["crossed"] * 3 + list(coverage.FEW) + [f"unpaired: {n}" for n in coverage.UNPAIRED]
    assert (table["covered (%)"] + table["false verdicts (%)"] == 100).all()


def test_the_same_values_give_the_same_interval():
    values = np.random.default_rng(6).normal(size=(3, 40))
    assert mean_interval(values) == mean_interval(values)


def test_a_hundred_thousand_lists_take_no_more_memory_than_they_are():
    import tracemalloc

    values = np.random.default_rng(7).normal(size=(3, 160_000))
    mean_interval(values[:, :100])  # what is kept for all
    tracemalloc.start()
    mean_interval(values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * values.nbytes


# ---- differences ---------------------------------------------------------------------------------------------------


def test_pairing_removes_what_both_sides_share():
    rng = np.random.default_rng(4)
    shared = rng.normal(0, 10, size=(2, 200))
    a, b = shared + rng.normal(0.5, 0.1, size=(2, 200)), shared
    difference = paired_interval(a, b)
    assert difference == mean_interval(a - b)
    assert 0.45 < difference.low < difference.mean < difference.high < 0.55
    assert unpaired_interval(a, b).low < 0 < unpaired_interval(a, b).high


def test_an_unpaired_difference_has_welchs_interval():
    rng = np.random.default_rng(8)
    a, b = rng.normal(1, 1, size=200), rng.normal(0, 3, size=300)
    error = math.sqrt(a.var(ddof=1) / 200 + b.var(ddof=1) / 300)
    interval = unpaired_interval(a, b)
    assert width(interval) == pytest.approx(2 * 1.967 * error, rel=0.03)
    assert interval.mean == pytest.approx(a.mean() - b.mean()) and interval.n == 200


def test_a_constant_difference_has_an_interval_of_no_width():
    assert paired_interval([3.0, 5.0, 9.0], [2.0, 4.0, 8.0]) == Interval(1.0, 1.0, 1.0, 3)
    assert mean_interval(np.ones((3, 40))) == Interval(1.0, 1.0, 1.0, 40)


def test_samples_know_their_difference_and_their_seeds():
    a, b = np.arange(20.0).reshape(2, 10), np.ones((2, 10))
    assert Samples(a, b).interval() == paired_interval(a, b) and Samples(a, b).seeds == 2
    assert Samples(a, b[:1, :5], is_paired=False).interval() == unpaired_interval(a, b[:1, :5])
    assert Samples(a).interval() == mean_interval(a)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], np.zeros((2, 2, 2))])
def test_values_without_an_interval_are_refused(values):
    with pytest.raises(ValueError, match="two or more finite values of shape"):
        mean_interval(values)


def test_pairs_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        paired_interval([1.0, 2.0], [[1.0, 2.0]])


# ---- p-values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [np.random.default_rng(9).normal(0.2, 1, size=(3, 60)), np.arange(12.0) - 3])
def test_a_p_value_is_below_5_per_cent_where_the_interval_leaves_the_value_out(values):
    _, draws = plausible_means(values)
    interval = mean_interval(values)
    inside, outside = 0.02 * width(interval), -0.02 * width(interval)
    assert p_value(draws, interval.low + inside) > 0.05 > p_value(draws, interval.low + outside)
    assert p_value(draws, interval.high + outside) > 0.05 > p_value(draws, interval.high + inside)


def test_equivalence_is_two_one_sided_tests():
    values = np.random.default_rng(10).normal(0, 1, size=400)
    mean, draws = plausible_means(values)
    error = values.std(ddof=1) / 20
    assert p_equivalent(draws, abs(mean) + 1.65 * error) == pytest.approx(0.05, abs=0.01)
    assert p_equivalent(draws, abs(mean)) == pytest.approx(0.5, abs=0.02)
    assert p_equivalent(draws, 1.0) < 1e-3 and p_equivalent(draws + 1, 0.5, value=1.0) < 1e-3


def test_a_difference_has_p_values_too():
    rng = np.random.default_rng(11)
    _, draws = plausible_difference(rng.normal(0.5, 1, size=200), rng.normal(size=200))
    assert p_value(draws) < 0.01 and p_value(draws, 0.5) > 0.05


def test_the_effect_that_shows_in_80_per_cent_of_cases():
    """By simulation; of one test among eight it is larger, and with three runs (t of 2 degrees of freedom) by much."""
    rng, found = np.random.default_rng(12), []
    effect = smallest_visible(*plausible_means(rng.normal(size=100)))
    assert effect == pytest.approx((1.984 + 0.845) / 10, rel=0.1)
    for _ in range(400):
        found.append(p_value(plausible_means(rng.normal(effect, 1, size=100))[1]) < 0.05)
    assert np.mean(found) == pytest.approx(0.8, abs=0.08)
    runs = plausible_means(np.array([[-1.0], [0.0], [1.0]]))
    error = 1 / math.sqrt(3)
    assert smallest_visible(*runs) == pytest.approx((4.303 + 1.061) * error, rel=0.01)
    assert smallest_visible(*runs, tests=8) == pytest.approx((12.59 + 1.061) * error, rel=0.01)  # t at 1 - .025 / 8


# ---- shares --------------------------------------------------------------------------------------------------------


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

"""Levels and sides: the paper's rules, Table 1's counts, and what happens at ties and cuts."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deftlib.method.grading import distribution_levels, extreme_sides, levels, normalise, per_subset, sides

GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "golden.json").read_text())
FINITE = st.floats(-1e100, 1e100)
BEST_FIRST = st.lists(FINITE, min_size=2, max_size=8).map(lambda rewards: sorted(rewards, reverse=True))


def test_normalise_by_hand():
    assert normalise([3.0, 2.0, -1.0]) == [1.0, 0.75, 0.0]


def test_all_tied_rewards_become_one_half_between_the_ends():
    assert normalise([0.7, 0.7]) == [1.0, 0.0]
    assert normalise([0.7, 0.7, 0.7, 0.7]) == [1.0, 0.5, 0.5, 0.0]


@given(BEST_FIRST)
def test_normalised_rewards_run_from_one_to_zero_and_are_never_nan(rewards):
    normalised = normalise(rewards)
    assert normalised[0] == 1 and normalised[-1] == 0
    assert normalised == sorted(normalised, reverse=True)


@given(rewards=BEST_FIRST, level=st.sampled_from("ABC"))
def test_best_is_always_good_and_worst_always_bad(rewards, level):
    result = sides(level, rewards)
    assert result[0] == +1 and result[-1] == -1
    assert len(result) == len(rewards) and set(result) <= {+1, 0, -1}


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0, 2.0], "best first"),
        ([3.0, 1.0, 2.0], "best first"),
        ([1.0], "at least two"),
        ([1.0, math.nan], "finite"),
        ([math.inf, 0.0], "finite"),
        ([1e308, -1e308], "finite"),
    ],
)
def test_rewards_that_cannot_be_normalised_are_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        normalise(rewards)


@pytest.mark.parametrize("level", ["A", "B", "C"])
def test_sides_equal_the_golden_numbers(level):
    sample = GOLDEN["fixtures"]["deft_qdiff_counts"]["samples"][level]
    assert normalise(sample["rewards"]) == pytest.approx(sample["normalised"], abs=1e-15)
    result = sides(level, sample["rewards"])
    assert [i for i, side in enumerate(result) if side > 0] == sample["pos_idx"]
    assert [i for i, side in enumerate(result) if side < 0] == sample["neg_idx"]


# Best 1, worst 0, so that each middle reward is its own normalised value; thresholds themselves are on neither side.
MIDDLE = [0.95, 0.9, 0.85, 0.8, 0.5, 0.2, 0.15, 0.1, 0.05]


@pytest.mark.parametrize(
    ("level", "middle_sides"),
    [
        ("A", [+1, +1, +1, 0, 0, 0, 0, 0, 0]),
        ("B", [+1, 0, 0, 0, 0, 0, 0, 0, -1]),
        ("C", [0, 0, 0, 0, 0, 0, -1, -1, -1]),
    ],
)
def test_thresholds_are_strict_as_printed(level, middle_sides):
    assert sides(level, [1.0, *MIDDLE, 0.0]) == [+1, *middle_sides, -1]


def test_a_pair_counts_its_good_and_its_bad_response_at_every_level():
    assert [sides(level, [2.0, 1.0]) for level in "ABC"] == [extreme_sides(2)] * 3


def test_tied_lists_count_their_ends_only():
    assert [sides(level, [1.0] * 4) for level in "ABC"] == [extreme_sides(4)] * 3


def test_extreme_sides_count_first_and_last_only():
    assert extreme_sides(2) == [+1, -1]
    assert extreme_sides(4) == [+1, 0, 0, -1]
    with pytest.raises(ValueError, match="at least two"):
        extreme_sides(1)


def test_an_unknown_level_has_no_sides():
    with pytest.raises(ValueError, match="found 'rest'"):
        sides("rest", [1.0, 0.0])


def test_levels_follow_the_reward_of_the_best_response():
    best_rewards = [0.1, 0.9, 0.5, -2.0, 0.7, 0.3, 0.2, 0.4, 0.6, 0.8]
    assert "".join(levels(best_rewards, top=20, bottom=30)) == "CABCBBCBBA"


@pytest.mark.parametrize(("n_lists", "level_a"), [(42536, 1587), (43835, 1636), (22002, 821), (52420, 1956)])
def test_level_a_has_the_sizes_of_table_1(n_lists, level_a):
    grades = levels(np.arange(n_lists), top=3.73, bottom=12.5)
    assert (grades == "A").sum() == level_a
    assert (grades == "C").sum() == -(-n_lists // 8)  # 12.5 % is one in eight, rounded up


def test_shares_are_rounded_up_in_exact_decimal_arithmetic():
    assert math.ceil(0.07 * 10000 / 100) == 8  # what floats would give
    grades = levels(np.arange(10000), top=0.07, bottom=0.07)
    assert (grades == "A").sum() == (grades == "C").sum() == 7
    assert (distribution_levels(np.arange(10000), share=0.07) == "A").sum() == 7


def test_ties_at_a_cut_fall_by_input_order():
    rewards = [1.0, 2.0] * 50
    assert "".join(levels(rewards, top=25, bottom=25)) == 25 * "BA" + 25 * "CB"
    lowest, highest = (distribution_levels(rewards, 25, direction) == "A" for direction in ("lowest", "highest"))
    assert np.flatnonzero(lowest).tolist() == list(range(0, 50, 2))
    assert np.flatnonzero(highest).tolist() == list(range(1, 50, 2))


def test_level_a_wins_an_overlap():
    assert "".join(levels([3.0, 2.0, 1.0], top=60, bottom=60)) == "AAC"
    assert "".join(levels([3.0, 2.0], top=100, bottom=100)) == "AA"


def test_no_lists_and_empty_shares_are_allowed():
    assert levels([], top=5, bottom=5).tolist() == []
    assert "".join(levels([2.0, 1.0], top=0, bottom=0)) == "BB"


def test_distribution_levels_keep_the_lowest_or_the_highest():
    rewards = [0.3, -0.1, 0.2, -0.4]
    assert list(distribution_levels(rewards, share=50)) == ["rest", "A", "rest", "A"]
    assert list(distribution_levels(rewards, share=25, direction="highest")) == ["A", "rest", "rest", "rest"]
    with pytest.raises(ValueError, match="lowest"):
        distribution_levels(rewards, share=50, direction="middle")


@pytest.mark.parametrize("share", [-1, 100.5, math.nan])
def test_a_share_is_a_percentage(share):
    with pytest.raises(ValueError):
        levels([1.0], top=share, bottom=0)
    with pytest.raises(ValueError):
        distribution_levels([1.0], share=share)


def test_nan_is_not_ranked():
    with pytest.raises(ValueError, match=r"NaN, found at \[1\]"):
        levels([1.0, math.nan], top=50, bottom=0)
    with pytest.raises(ValueError, match=r"NaN, found at \[1\]"):
        distribution_levels([1.0, math.nan], share=50)


def test_every_subset_is_graded_on_its_own_and_the_order_kept():
    values = [9.0, 1.0, 8.0, 2.0, 7.0, 3.0]  # subset y would have no A if all were ranked together
    subsets = ["x", "y", "x", "y", "x", "y"]
    assert "".join(per_subset(levels, values, subsets, top=33, bottom=33)) == "ACBBCA"
    kept = per_subset(distribution_levels, values, subsets, share=33)
    assert list(kept) == ["rest", "A", "rest", "rest", "A", "rest"]
    with pytest.raises(ValueError, match="6 values but 5"):
        per_subset(levels, values, subsets[:5], top=1, bottom=1)

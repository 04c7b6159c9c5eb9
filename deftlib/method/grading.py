"""Data grading: which ranked lists are level A, which responses count as good or bad (sections 3.1-3.2 of the paper).

    level = per_subset(levels, best_rewards, subsets, top=3.73, bottom=12.5)           # grading = "reward"
    list_sides = [sides(*graded) for graded in zip(level, rewards)]                    # for count_tokens
    level = per_subset(distribution_levels, distribution_rewards, subsets, share=5)    # grading = "distribution"

Numbers in, labels out; nothing here knows a model or a data set.
"""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np

# Normalised reward above which a middle response is good, and below which it is bad (section 3.2; strict, as printed).
THRESHOLDS = {"A": (0.8, -math.inf), "B": (0.9, 0.1), "C": (math.inf, 0.2)}


def normalise(rewards):
    """Rewards of one list on a scale from 1 (best) to 0 (worst), Eq. 15.

    rewards: L >= 2 finite numbers, best first. Returns a list of L floats in [0, 1]. If best and worst tie: 1 for the
    first, 0 for the last, 0.5 between (our choice), never NaN.
    Raises ValueError for fewer than two rewards, for one that is not finite, and if they are not best first.
    """
    rewards = [float(reward) for reward in rewards]
    if len(rewards) < 2:
        raise ValueError(f"a ranked list has at least two rewards, found {rewards}")
    best, worst = rewards[0], rewards[-1]
    if not all(map(math.isfinite, [*rewards, best - worst])):
        raise ValueError(f"rewards must be finite, found {rewards}")
    if any(later > earlier for earlier, later in pairwise(rewards)):
        raise ValueError(f"rewards must be best first, found {rewards}; sort the list or count only its two ends")
    if best == worst:
        return [1.0] + [0.5] * (len(rewards) - 2) + [0.0]
    return [(reward - worst) / (best - worst) for reward in rewards]


def levels(best_rewards, top, bottom):
    """Grade lists by the reward of their best response: A for the top, C for the bottom, B between (section 3.1).

    best_rewards: float[N] of one subset. top, bottom: percentages in [0, 100], each rounded up to whole lists in exact
    decimal arithmetic (3.73 % of 42,536 gives 1,587: Table 1). Among equals the earlier list ranks higher; A wins an
    overlap.
    Returns str[N] of "A", "B", "C". Raises ValueError for a NaN or a percentage out of range.
    """
    order = _ranking(best_rewards, highest_first=True)
    first_of_c = len(order) - _share_of(len(order), bottom)
    end_of_a = _share_of(len(order), top)
    grades = np.full(len(order), "B")
    grades[order[first_of_c:]] = "C"
    grades[order[:end_of_a]] = "A"
    return grades


def distribution_levels(distribution_rewards, share, direction="lowest"):
    """Keep the lists at one end of R_dis as level A; the others are "rest" (final version of the paper: the lowest).

    distribution_rewards: float[N] of one subset. share: percentage in [0, 100], rounded up as in `levels`.
    direction: "lowest" (specific to the preference, says the paper) or "highest" (our option, to test that rule).
    Returns str[N] of "A", "rest"; ties by input order.
    Raises ValueError for a NaN, a share out of range or another direction.
    """
    if direction not in ("lowest", "highest"):
        raise ValueError(f'direction must be "lowest" or "highest", found {direction!r}')
    order = _ranking(distribution_rewards, highest_first=direction == "highest")
    end_of_a = _share_of(len(order), share)
    grades = np.full(len(order), "rest")
    grades[order[:end_of_a]] = "A"
    return grades


def per_subset(grade, values, subsets, **options):
    """Apply a grading function within each subset, as the paper does to keep all four represented (section 4.1).

    grade: `levels` or `distribution_levels`, called as grade(values of one subset, **options). values: float[N].
    subsets: N names. Returns str[N] in input order. Raises ValueError if the lengths differ.
    """
    values, subsets = np.asarray(values), np.asarray(subsets)
    if len(values) != len(subsets):
        raise ValueError(f"{len(values)} values but {len(subsets)} subset names")
    grades = np.full(len(values), "", dtype="<U4")
    for subset in np.unique(subsets):
        members = subsets == subset
        grades[members] = grade(values[members], **options)
    return grades


def sides(level, rewards):
    """Where each response of a list is counted: +1 into Q_pos, -1 into Q_neg, 0 nowhere (rules of section 3.2).

    level: "A", "B" or "C". rewards: L >= 2 numbers, best first. Returns a list of L ints. The first is always +1 and
    the last always -1; one between counts if its normalised reward is above or below the level's thresholds.
    Raises ValueError for another level, and whatever `normalise` refuses.
    """
    if level not in THRESHOLDS:
        raise ValueError(f'level must be "A", "B" or "C", found {level!r}')
    good_above, bad_below = THRESHOLDS[level]
    middle = normalise(rewards)[1:-1]
    return [+1, *(int(reward > good_above) - int(reward < bad_below) for reward in middle), -1]


def extreme_sides(length):
    """Sides of a list without usable rewards: only its first (+1) and its last response (-1) count (our choice).

    length: number of responses, at least 2. Returns a list of ints. Raises ValueError for a shorter list.
    """
    if length < 2:
        raise ValueError(f"a ranked list has at least two responses, found {length}")
    return [+1, *[0] * (length - 2), -1]


def _ranking(values, highest_first):
    """Indices that sort the values; equals stay in input order."""
    values = np.asarray(values, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError(f"cannot rank NaN, found at {np.flatnonzero(np.isnan(values)).tolist()}")
    return np.argsort(-values if highest_first else values, kind="stable")


def _share_of(n_lists, percentage):
    """ceil(percentage * n_lists / 100) in exact decimal arithmetic: 0.07 % of 10,000 is 7; floats give 8."""
    exact = Fraction(str(percentage))
    if not 0 <= exact <= 100:
        raise ValueError(f"a percentage lies between 0 and 100, found {percentage}")
    return math.ceil(exact * n_lists / 100)

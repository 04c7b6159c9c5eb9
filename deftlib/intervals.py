"""Means, and what a sample lets one say of them: 95 % intervals, p-values, paired and unpaired differences, shares.

    paired_interval(deft_rewards, plain_rewards)      # Interval(mean, low, high, n): does it exclude 0?
    mean, draws = plausible_means(differences)        # p_value(draws), p_equivalent(draws, margin=1.5)

Values have shape [N] over prompts, or [S, N] over seeds and prompts, which are crossed: every seed answers every
prompt. Both are drawn from something larger, and an interval covers both; `studies.coverage` measures how often.

Every interval in this project comes from here.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from scipy import special

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
DRAWS = 20_000  # plausible means: the ends of an interval move by less than 1 % of its width with another seed
FEW = 50  # prompts of one seed: up to so many, nothing is assumed but symmetry


class Interval(NamedTuple):
    """A mean with its 95 % interval and the number of prompts (or trials) behind it."""

    mean: float
    low: float
    high: float
    n: int


# ---- intervals ---------------------------------------------------------------------------------------------------


def mean_interval(values):
    """Mean of float[N] or float[S, N] with its 95 % interval over prompts and seeds. Raises as `plausible_means`."""
    return _interval(*plausible_means(values), np.shape(values)[-1])


def paired_interval(a, b):
    """Mean of a - b with its 95 % interval, pairing the same prompt (and seed) on both sides.

    a, b: float[N] or float[S, N], in the same order. Raises ValueError if the shapes differ, and as `plausible_means`.
    """
    return mean_interval(_paired(a, b))


def unpaired_interval(a, b):
    """Mean of a less mean of b with its 95 % interval, of samples that have nothing to do with each other.

    a: float[N] or float[S, N]; b: float[M] or float[R, M]. n is the smaller of N and M. Raises as `plausible_means`.
    """
    return _interval(*plausible_difference(a, b), min(np.shape(a)[-1], np.shape(b)[-1]))


def wilson_interval(successes, n):
    """Share of successes with its 95 % Wilson score interval, which stays inside [0, 1] (Wilson, 1927).

    successes: int in [0, n]. n: int > 0, trials. Returns Interval(mean, low, high, n). Raises ValueError otherwise.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"expected 0 <= successes <= n and n > 0, found {successes} of {n}")
    share = successes / n
    centre = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half_width = Z_95 / (1 + Z_95**2 / n) * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    low = max(0.0, min(share, centre - half_width))  # rounding alone could push it past the share or 0
    high = min(1.0, max(share, centre + half_width))
    return Interval(share, low, high, n)


def smallest_visible(mean, draws, tests=1):
    """The effect that a sample like this one would tell from none in about 80 % of cases, as the first of `tests`.

    mean, draws: of `plausible_means`. tests: how many share the 5 per cent, by Holm's method. From no effect it is as
    far to what the interval of that test leaves out, and from there as far as four of five means get.
    """
    refused, short = np.quantile(draws, (1 - 0.025 / tests, 0.8)) - mean
    return float(refused + short)


def _interval(mean, draws, n):
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(mean, float(low), float(high), n)


class Samples(NamedTuple):
    """What a difference is computed from: float[S, N] over seeds and prompts, or over runs alone as [S, 1].

    ours less other, item by item where they are paired; ours alone where there is no other.
    """

    ours: np.ndarray
    other: np.ndarray | None = None
    is_paired: bool = True

    def plausible(self):
        """(mean, draws) of the difference, as `plausible_means`."""
        if self.other is None:
            return plausible_means(self.ours)
        return plausible_means(_paired(*self[:2])) if self.is_paired else plausible_difference(*self[:2])

    def interval(self):
        """`Interval` of the difference."""
        sizes = [np.atleast_2d(values).shape[1] for values in self[:2] if values is not None]
        return _interval(*self.plausible(), min(sizes))

    @property
    def seeds(self):
        return min(len(np.atleast_2d(values)) for values in self[:2] if values is not None)


# ---- p-values ----------------------------------------------------------------------------------------------------


def p_value(draws, value=0.0):
    """Two-sided p-value of the hypothesis that the mean is `value`; below 0.05 where the interval leaves it out."""
    return min(1.0, 2 * min(_share(draws >= value), _share(draws <= value)))


def p_equivalent(draws, margin, value=0.0):
    """p-value of the hypothesis that the mean lies `margin` or more away from `value`: two one-sided tests."""
    return max(_share(draws >= value + margin), _share(draws <= value - margin))


def _share(hits):
    return (int(hits.sum()) + 1) / (len(hits) + 1)  # of finitely many draws: never 0


# ---- plausible means ---------------------------------------------------------------------------------------------


def plausible_means(values):
    """(mean, float64[~DRAWS]): the means that these values leave plausible, each as likely as another.

    values: float[N] or float[S, N]. With several seeds, mean and draws of `_crossed`; with one seed and few prompts, of
    `_subset_means`; else of a t distribution. The same values give the same draws.
    Raises ValueError for fewer than two values, a value that is not finite, or another number of dimensions.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim not in (1, 2) or values.size < 2 or not np.isfinite(values).all():
        raise ValueError(f"expected two or more finite values of shape [N] or [S, N], found {values.shape}: {values}")
    values = np.atleast_2d(values)
    mean = float(values.mean())
    if min(values.shape) > 1:
        return mean, _around(mean, _crossed(values))
    if len(values) == 1 and values.size <= FEW:
        return mean, _subset_means(values[0])
    error = values.std(ddof=1) / math.sqrt(values.size)
    return mean, _around(mean, error * _t_sizes(values.size - 1))


def plausible_difference(a, b):
    """(mean of a less mean of b, draws) of two independent samples, as `plausible_means`."""
    (mean_a, draws_a), (mean_b, draws_b) = plausible_means(a), plausible_means(b)
    size = min(len(draws_a), len(draws_b))
    shuffled = np.random.default_rng(1).permutation(draws_b)[:size]  # draws come in order: pair them at random
    return mean_a - mean_b, np.random.default_rng(2).permutation(draws_a)[:size] - shuffled


def _paired(a, b):
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values must have one shape, found {a.shape} and {b.shape}")
    return a - b


def _around(mean, sizes):
    """Draws on both sides of the mean, at these distances."""
    return np.concatenate([mean - sizes, mean + sizes])


def _crossed(values):
    """How far the true mean may be from that of float[S, N], sorted: from the mean squares of a crossed table.

    Two ways to add up what seeds and prompts contribute, and at each probability the geometric mean of both: a t
    distribution with Satterthwaite's degrees of freedom (1946), too short where few seeds vary much; and the
    generalised interval, which draws each variance from what the table says of it (Weerahandi, 1993), too long where
    they do not.
    """
    n_seeds, n_prompts = values.shape
    mean, of_seed, of_prompt = values.mean(), values.mean(1), values.mean(0)
    total = np.square(values - mean).sum()
    seeds = n_prompts * np.square(of_seed - mean).sum()
    prompts = n_seeds * np.square(of_prompt - mean).sum()
    freedom = np.array([n_seeds - 1, n_prompts - 1, (n_seeds - 1) * (n_prompts - 1)])
    squares = np.array([seeds, prompts, max(total - seeds - prompts, 0.0)]) / freedom  # mean squares; the last is noise
    variance = max(squares[0] + squares[1] - squares[2], min(squares[0], squares[1]))
    if variance <= 0:
        return np.zeros(DRAWS // 2)
    satterthwaite = variance**2 / (np.square(squares) / freedom).sum()
    by_t = math.sqrt(variance) * _t_sizes(max(satterthwaite, min(n_seeds, n_prompts) - 1))
    seeds, prompts, noise = (square / _chi_squares(df, i) for i, (square, df) in enumerate(zip(squares, freedom)))
    drawn = np.maximum(seeds + prompts - noise, 0.0)
    by_draws = np.sort(_normal_sizes() * np.sqrt(drawn))
    return np.sqrt(by_t * by_draws / values.size)


def _subset_means(values):
    """Means of random subsets: between any two neighbours the true mean lies equally often (Hartigan, 1969).

    Exact for values that scatter alike to both sides of it, whatever their distribution; the same as asking which
    means a sign-flip test would not refuse.
    """
    members = np.random.default_rng(0).random((DRAWS, len(values))) < 0.5
    members = members[members.any(1)]
    return members @ values / members.sum(1)


# Quantiles at evenly spread probabilities: sizes from the upper half of a symmetric distribution, in ascending order,
# and values that are drawn together in an order of their own.
_EVENLY = (np.arange(DRAWS // 2) + 0.5) / (DRAWS // 2)


def _t_sizes(freedom):
    """Sizes of t values, sorted."""
    return special.stdtrit(freedom, 0.5 + _EVENLY / 2)


@functools.cache
def _normal_sizes():
    """Sizes of standard normal values, in random order."""
    return np.random.default_rng(3).permutation(special.ndtri(0.5 + _EVENLY / 2))


@functools.lru_cache(maxsize=64)
def _chi_squares(freedom, seed):
    """Chi-square values over their degrees of freedom, in random order."""
    return np.random.default_rng(10 + seed).permutation(special.chdtri(freedom, _EVENLY)) / freedom

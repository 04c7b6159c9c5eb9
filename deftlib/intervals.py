"""Means with 95 % intervals: bootstrap over prompts and seeds, paired differences, shares.

    paired_bootstrap(deft_rewards, plain_rewards)      # Interval(mean, low, high, n): does it exclude 0?

Pure numpy; every interval in this project comes from here.
"""

import math
from typing import NamedTuple

import numpy as np

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


class Interval(NamedTuple):
    """A mean with its 95 % interval and the number of prompts (or trials) behind it."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap_interval(values, resamples=2000, seed=0):
    """Mean with its 95 % percentile bootstrap interval over prompts and, if there are any, seeds.

    values: float[N] over prompts, or float[S, N] over seeds and prompts; each resample draws both anew, independently.
    Returns Interval(mean, low, high, n = N). The same arguments give the same interval.
    Raises ValueError for no values, a value that is not finite, or another number of dimensions.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim not in (1, 2) or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"expected finite values of shape [N] or [S, N], found shape {values.shape}: {values}")
    values = np.atleast_2d(values)
    n_seeds, n_prompts = values.shape
    rng = np.random.default_rng(seed)
    prompts = rng.integers(n_prompts, size=(resamples, n_prompts), dtype=np.int32)
    seeds = rng.integers(n_seeds, size=(resamples, n_seeds))
    mean_of_seed = np.stack([row[prompts].mean(1) for row in values], axis=1)  # [resamples, S]
    means = np.take_along_axis(mean_of_seed, seeds, axis=1).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high), n_prompts)


def paired_bootstrap(a, b, resamples=2000, seed=0):
    """Mean of a - b with its 95 % bootstrap interval, pairing the same prompt (and seed) on both sides.

    a, b: float[N] or float[S, N], in the same order. Returns Interval(mean, low, high, n = N).
    Raises ValueError if the shapes differ, and whatever `bootstrap_interval` refuses.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values must have one shape, found {a.shape} and {b.shape}")
    return bootstrap_interval(a - b, resamples, seed)


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

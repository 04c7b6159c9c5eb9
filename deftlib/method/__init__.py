"""The method by itself: the paper's equations as pure functions, and one mixin. It needs torch and numpy, nothing else.

    guidance       DistributionGuided: the mixin that adds the distribution reward to a trainer's loss, Eq. 18
    responses      where the best responses of a trainer's batch are
    passes         what its forward passes compute, and the norm of a gradient
    heads          the output head of a model: what the reward is folded through
    losses         Eqs. 5-12 and 18, and the other methods': from log-probabilities
    grading        the rules of levels A, B and C; which responses count as good, which as bad
    distribution   counts, q_diff (Eq. 14), R_dis (Eqs. 16-17), and the identity that makes it fast

Start with `distribution`; notebook 00 does the same by hand. What other projects need is imported from here:
"""

from deftlib.method.distribution import count_tokens, discrepancy, folded_reward, reward_direction
from deftlib.method.guidance import DistributionGuided

__all__ = ["DistributionGuided", "count_tokens", "discrepancy", "folded_reward", "reward_direction"]

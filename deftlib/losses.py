"""The losses of the methods and of DEFT, Eqs. 5-12 and 18: pure functions of tensors, one scalar each.

    sums, counts = sequence_log_probs(logits, labels)
    loss = deft_loss(pro_loss(sums, counts), folded_reward(hidden, labels, direction), omega)

`B` ranked lists of `L >= 2` responses, best first. `sums[B, L]` are log-probabilities of whole responses (nats, <= 0),
`counts[B, L]` their numbers of tokens. Every loss is a mean over lists (our choice; the paper prints that of one list).
"""

import torch
from torch.nn.functional import logsigmoid

from deftlib.distribution import IGNORED


def sequence_log_probs(logits, labels):
    """Log-probability and length of each response, the numerator and denominator of Eq. 7.

    logits: float[..., T, V]; logits[..., t, :] predicts token t + 1. labels: int[..., T], -100 outside response tokens.
    Returns (sums[...], counts[...]): nats in at least float32, and int64. A row without response tokens gives (0, 0).
    Raises ValueError if the shapes differ.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}")
    targets = labels[..., 1:]
    is_response = targets != IGNORED
    scored = logits[..., :-1, :][is_response]  # only these rows ever need a softmax
    scored = scored.to(torch.promote_types(logits.dtype, torch.float32))
    of_target = scored.gather(-1, targets[is_response].unsqueeze(-1)).squeeze(-1)
    token_log_probs = of_target - scored.logsumexp(-1)
    sums = token_log_probs.new_zeros(targets.shape).masked_scatter(is_response, token_log_probs).sum(-1)
    return sums, is_response.sum(-1)


def sft_loss(best_sums):
    """Negative log-likelihood of the best response, summed over its tokens, Eq. 9.

    best_sums: float[B]. Returns a scalar >= 0.
    """
    return -best_sums.mean()


def rrhf_loss(sums, counts, rewards):
    """Ranking loss on length-normalised scores plus SFT on the best response, Eqs. 7-10.

    sums: float[B, L]. counts: int[B, L]. rewards: [B, L], unsorted allowed; only who is above whom matters, a tied pair
    adds nothing, and the first of the highest is the best response. Without rewards pass minus the rank.
    Returns a scalar >= 0. Raises ValueError for a response without tokens.
    """
    scores = _mean_log_probs(sums, counts)
    is_worse = rewards.unsqueeze(-1) < rewards.unsqueeze(-2)  # [B, k, j]: r_k < r_j
    excess = (scores.unsqueeze(-1) - scores.unsqueeze(-2)).clamp(min=0)  # max(0, s_k - s_j)
    ranking = (excess * is_worse).sum((-2, -1)).mean()
    best_sums = sums.gather(-1, rewards.argmax(-1, keepdim=True)).squeeze(-1)
    return ranking + sft_loss(best_sums)


def pro_loss(sums, counts, sft_weight=0.05):
    """L - 1 rounds of "the best of those that remain" plus SFT on the best response, Eqs. 11-12.

    sums: float[B, L], best first. counts: int[B, L]. sft_weight: A.1, on the summed log-likelihood of Eq. 9.
    Returns a scalar >= 0. Raises ValueError for a response without tokens.
    """
    scores = _mean_log_probs(sums, counts)
    rounds = range(scores.shape[-1] - 1)
    ranking = sum(scores[:, k:].logsumexp(-1) - scores[:, k] for k in rounds)
    return ranking.mean() + sft_weight * sft_loss(sums[:, 0])


def pro_official_loss(sums, counts, rewards, sft_weight=0.05):
    """PRO as its authors' code computes it (DAMO-ConvAI, PRO/train/utils/process_manager.py), not as printed.

    In round k a worse response i enters as exp(s_i (r_k - r_i)), scaled by its reward gap, and the best by the largest
    of these gaps; 1e-10 guards the logarithm; the SFT term grows with (L - 1)^2. The code also scores the first padding
    token after every response but the batch's longest: whoever wants that passes such sums and counts.
    sums: float[B, L], best first (the code's sft_index is then 0). counts: int[B, L]. rewards: float[B, L],
    non-increasing. Returns a scalar. Raises ValueError for a response without tokens.
    """
    scores = _mean_log_probs(sums, counts)
    rounds = range(scores.shape[-1] - 1)
    ranking = sum(_official_round(scores[:, k:], rewards[:, k:]) for k in rounds)
    return ranking.mean() + sft_weight * len(rounds) ** 2 * sft_loss(sums[:, 0])


def _official_round(scores, rewards):
    """One round over the responses that remain, best first: scores[B, l], rewards[B, l] -> [B]."""
    gaps = rewards[:, :1] - rewards[:, 1:]
    best = scores[:, 0] * gaps.amax(-1)
    others = (scores[:, 1:] * gaps).exp().sum(-1)
    return (1e-10 + best.exp() + others).log() - best


def dpo_loss(policy_sums, reference_sums, beta=0.1):
    """Direct preference optimisation of pairs, Eqs. 5-6; ln 2 as long as policy and reference agree.

    policy_sums, reference_sums: float[B, 2], good response first. beta: A.1. Returns a scalar > 0.
    Raises ValueError unless there are two responses: of a longer list pass the best and the worst.
    """
    return -logsigmoid(beta * _margin(policy_sums - reference_sums)).mean()


def ipo_loss(policy_sums, reference_sums, counts, beta=0.1, length_normalised=True):
    """Identity preference optimisation: pull the margin of log-ratios to 1 / (2 beta) (Azar et al., 2023).

    policy_sums, reference_sums: float[B, 2], good response first. counts: int[B, 2].
    length_normalised: divide each log-ratio by its number of tokens, as TRL and HALOs do; False: sums, as in the DPO
    repository. Returns a scalar >= 0. Raises ValueError unless there are two responses, or for one without tokens.
    """
    log_ratios = policy_sums - reference_sums
    if length_normalised:
        log_ratios = _mean_log_probs(log_ratios, counts)
    return (_margin(log_ratios) - 1 / (2 * beta)).square().mean()


def deft_loss(method_loss, distribution_reward, omega):
    """The loss of DEFT-<method>: the method's own, less omega times the mean distribution reward, Eq. 18.

    method_loss: scalar. distribution_reward: float[B]; B = 0 leaves the loss as it is. omega >= 0; 0 is the method
    itself. Returns a scalar, unbounded below: R_dis is linear in the logits.
    """
    return method_loss - omega * distribution_reward.sum() / max(distribution_reward.numel(), 1)


def _mean_log_probs(sums, counts):
    """Length-normalised scores s_j, Eq. 7."""
    if (counts == 0).any():
        raise ValueError("a response has no tokens, so its mean log-probability is undefined; drop its list first")
    return sums / counts


def _margin(log_ratios):
    """By how much the good response gained on the bad one: [B, 2] -> [B]."""
    if log_ratios.shape[-1] != 2:
        raise ValueError(f"expected [B, 2], found {tuple(log_ratios.shape)}; pass the best and the worst response")
    return log_ratios[:, 0] - log_ratios[:, 1]

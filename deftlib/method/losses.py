"""The losses of the methods and of DEFT, Eqs. 5-12 and 18 and beyond: pure functions of tensors.

    sums, counts = sequence_log_probs(logits, labels)
    loss = deft_loss(pro_loss(sums, counts), folded_reward(hidden, labels, direction), omega)

`B` ranked lists of `L >= 2` responses, best first. `sums[B, L]` are log-probabilities of whole responses (nats, <= 0),
`counts[B, L]` their numbers of tokens. Every loss is a mean over lists (our choice; the paper prints that of one list).

`training.trainers` trains with these, but for SFT and DPO: there TRL's own losses run, which the tests hold against
`sft_loss` and `dpo_loss`; and Eq. 18 is applied by `guidance`, as `deft_loss` says it.
"""

import torch
from torch.nn.functional import logsigmoid

from deftlib.method.distribution import IGNORED

# ---- log-probabilities -------------------------------------------------------------------------------------------


def sequence_log_probs(logits, labels):
    """Log-probability and length of each response, the numerator and denominator of Eq. 7.

    logits: float[..., T, V]; logits[..., t, :] predicts token t + 1. labels: int[..., T], -100 outside response tokens.
    Returns (sums[...], counts[...]): nats in at least float32, and int64. A row without response tokens gives (0, 0).
    Raises ValueError if the shapes differ.
    """
    log_probs, is_response = token_log_probs(logits, labels)
    return log_probs.sum(-1), is_response.sum(-1)


def token_log_probs(logits, labels):
    """Log-probability of each response token, and where they are: (log_probs[..., T - 1], is_response[..., T - 1]).

    Shapes, and what is raised, as in `sequence_log_probs`. Entry t is that of token t + 1; 0 where none is scored.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}")
    targets = labels[..., 1:]
    is_response = targets != IGNORED
    scored = logits[..., :-1, :][is_response]  # only these rows ever need a softmax
    scored = scored.to(torch.promote_types(logits.dtype, torch.float32))
    of_target = scored.gather(-1, targets[is_response].unsqueeze(-1)).squeeze(-1)
    log_probs = of_target - scored.logsumexp(-1)
    return log_probs.new_zeros(targets.shape).masked_scatter(is_response, log_probs), is_response


# ---- imitation ---------------------------------------------------------------------------------------------------


def sft_loss(best_sums):
    """Negative log-likelihood of the best response, summed over its tokens, Eq. 9.

    best_sums: float[B]. Returns a scalar >= 0.
    """
    return -best_sums.mean()


def ift_loss(log_probs, is_response, gamma=0.95, detach_weights=False):
    """Intuitive fine-tuning: each token's loss weighted by what follows from it (arXiv 2405.11870, the authors' code).

    A token's weight is the discounted sum of its own and all later losses, c_t = sum_{k >= t} gamma^(k - t) l_k,
    rescaled to mean 1 over the response; the loss is the weighted mean over tokens, then the mean over responses.
    log_probs: float[B, T] of response tokens under inputs that `intuitive_embeddings` mixed. is_response: bool[B, T].
    gamma: in [0, 1]; 0 switches propagation off: all weights are 1, a special case of that code and not the limit of
    the formula, so that with unmixed inputs it is SFT with the mean of each sequence. detach_weights: stop the
    gradient through the weights, which the authors do not. Returns a scalar >= 0.
    Raises ValueError for a response without tokens.
    """
    weights = propagation_weights(-log_probs, is_response, gamma)
    weights = weights.detach() if detach_weights else weights
    return _mean_log_probs((-log_probs * weights * is_response).sum(-1), is_response.sum(-1)).mean()


def propagation_weights(token_losses, is_response, gamma):
    """IFT's weights c_t of mean 1 over each response's tokens, as `ift_loss` explains them.

    token_losses: float[B, T], >= 0. is_response: bool[B, T]. Returns float[B, T], 0 outside the response; all 1 at
    gamma = 0.
    """
    if gamma == 0:
        return torch.ones_like(token_losses)
    steps = torch.arange(token_losses.shape[-1], device=token_losses.device)
    ahead = (steps.unsqueeze(0) - steps.unsqueeze(1)).to(token_losses.dtype)  # [t, k]: k - t
    discounts = (gamma ** ahead.clamp(min=0)).masked_fill(ahead < 0, 0)
    sums = (token_losses * is_response) @ discounts.T * is_response
    return sums * is_response.sum(-1, keepdim=True) / sums.sum(-1, keepdim=True)


def intuitive_embeddings(embeddings, own_embeddings, weight=0.2):
    """IFT's temporal residual connection: the true inputs mixed with what the model itself would have said.

    embeddings: float[..., d] of the true tokens. own_embeddings: [..., d] by a frozen copy of the embedding, of the
    model's own greedy prediction at response positions and of the true token elsewhere. weight: lambda; 0 is teacher
    forcing. Returns float[..., d]. arXiv 2405.11870.
    """
    return (1 - weight) * embeddings + weight * own_embeddings


def greedy_inputs(input_ids, labels, predicted):
    """Input ids with each response token replaced by the model's own greedy prediction of it (IFT's first pass).

    input_ids, labels: int[B, T]. predicted: int[B, T - 1], the most likely token t + 1 after the true tokens up to t.
    Returns int[B, T]; prompt and padding keep their ids.
    """
    own = input_ids.clone()
    own[..., 1:] = torch.where(labels[..., 1:] != IGNORED, predicted, input_ids[..., 1:])
    return own


# ---- ranked lists ------------------------------------------------------------------------------------------------


def rrhf_loss(sums, counts, rewards):
    """Ranking loss on length-normalised scores plus SFT on the best response, Eqs. 7-10.

    sums: float[B, L]. counts: int[B, L]. rewards: [B, L], unsorted allowed; only who is above whom matters, a tied pair
    adds nothing, and the first of the highest is the best response. Without rewards pass minus the rank.
    Returns a scalar >= 0. Raises ValueError for a response without tokens.
    """
    return _ranking(_mean_log_probs(sums, counts), rewards) + sft_loss(_of_best(sums, rewards))


def rrhf_official_loss(sums, padded_lengths, rewards, rank_weight=1.0):
    """RRHF as its authors' code computes it (GanjinZero/RRHF, train.py), not as the DEFT paper prints it.

    There the labels are overwritten before the scores are taken, so a score is the sum divided by the length that the
    whole list is padded to, prompt included; and so is the SFT term.
    sums: float[B, L]. padded_lengths: int[B], tokens in the longest row of each list, prompt included. rewards: [B, L],
    unsorted allowed; tied pairs add nothing, the first of the highest is the best. rank_weight: 1 in the authors'
    script, 100 in their defaults. Returns a scalar >= 0.
    """
    scores = sums / padded_lengths.unsqueeze(-1)
    return rank_weight * _ranking(scores, rewards) + sft_loss(_of_best(scores, rewards))


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


# ---- pairs -------------------------------------------------------------------------------------------------------


def dpo_loss(policy_sums, reference_sums, beta=0.1, label_smoothing=0.0):
    """Direct preference optimisation of pairs, Eqs. 5-6; ln 2 as long as policy and reference agree.

    policy_sums, reference_sums: float[B, 2], good response first; means instead of sums give length-normalised DPO.
    beta: A.1. label_smoothing: probability that a label is wrong (cDPO, the DPO repository); 0 is DPO.
    Returns a scalar > 0. Raises ValueError unless there are two responses: of a longer list pass best and worst.
    """
    margin = beta * _margin(policy_sums - reference_sums)
    return -((1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)).mean()


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


def asft_loss(sums, counts, align_weight=0.1):
    """Aligned supervised fine-tuning: raise the good response's likelihood and lower the bad one's, each by itself.

    SFT on the good response plus align_weight * (-log p_1 - log(1 - p_l)), with p the length-normalised likelihood
    exp(mean log-probability): no reference, no Bradley-Terry model (arXiv 2409.10571).
    sums: float[B, L], best first; the best and the worst count. counts: int[B, L]. Returns a scalar >= 0.
    Raises ValueError for a response without tokens.
    """
    scores = _mean_log_probs(sums, counts)
    best, worst = scores[:, 0], scores[:, -1]
    aligned = -best - torch.log(-torch.expm1(worst))
    return (-best + align_weight * aligned).mean()


def sr_dpo_loss(policy_sums, reference_sums, quality_sums, quality_reference_sums=None, beta=0.1, weight=0.5):
    """DPO whose margin the policy itself refines (Sr-DPO, arXiv 2405.21040); weight = 0 is DPO.

    The refinement D is the margin of the same pair, read after a quality prefix, under the policy as it is now, without
    gradient. Certain, from the abstract and the public reviews: the policy's own log-ratio, a prefix before the prompt,
    a weight lambda > 0, no gradient through the term, DPO and IPO as carriers. Inferred, as no code is public: that D
    is subtracted, that beta multiplies it too, and whether the reference enters it (a review says that the term looks
    like DPO's but for the prefix, which speaks for it); so both readings are here.
    policy_sums, reference_sums: float[B, 2], good response first. quality_sums: float[B, 2] under the policy with the
    prefix. quality_reference_sums: the same under the reference, for D = the margin of log-ratios; None: of
    log-probabilities. weight: lambda. Returns a scalar > 0. Raises ValueError unless there are two responses.
    """
    margin = _margin(policy_sums - reference_sums) - weight * _refinement(quality_sums, quality_reference_sums)
    return -logsigmoid(beta * margin).mean()


def sr_ipo_loss(policy_sums, reference_sums, quality_sums, quality_reference_sums=None, beta=0.1, weight=0.5):
    """IPO on sums whose target the policy itself refines (Sr-IPO): (margin - 1 / (2 beta) - weight * D)^2.

    Arguments, D, what is certain and what is inferred: as in `sr_dpo_loss`. weight = 0 is IPO on sums.
    """
    margin = _margin(policy_sums - reference_sums) - weight * _refinement(quality_sums, quality_reference_sums)
    return (margin - 1 / (2 * beta)).square().mean()


def _refinement(quality_sums, quality_reference_sums):
    """D[B] of the two losses above, detached."""
    if quality_reference_sums is not None:
        quality_sums = quality_sums - quality_reference_sums
    return _margin(quality_sums).detach()


# ---- DEFT --------------------------------------------------------------------------------------------------------


def deft_loss(method_loss, distribution_reward, omega):
    """The loss of DEFT-<method>: the method's own, less omega times the mean distribution reward, Eq. 18.

    method_loss: scalar. distribution_reward: float[B]; B = 0 leaves the loss as it is. omega >= 0; 0 is the method
    itself. Returns a scalar, unbounded below: R_dis is linear in the logits.
    """
    return method_loss - omega * distribution_reward.sum() / max(distribution_reward.numel(), 1)


# ---- shared ------------------------------------------------------------------------------------------------------


def _ranking(scores, rewards):
    """Eq. 8, mean over lists: by how much worse responses score above better ones. scores, rewards: [B, L]."""
    is_worse = rewards.unsqueeze(-1) < rewards.unsqueeze(-2)  # [B, k, j]: r_k < r_j
    excess = (scores.unsqueeze(-1) - scores.unsqueeze(-2)).clamp(min=0)  # max(0, s_k - s_j)
    return (excess * is_worse).sum((-2, -1)).mean()


def _of_best(values, rewards):
    """values[B, L] of the response with the highest reward, the first of equals: [B]."""
    return values.gather(-1, rewards.argmax(-1, keepdim=True)).squeeze(-1)


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

"""The distribution reward: token counts, q_diff (Eq. 14), R_dis (Eqs. 16-17), and the identity that makes it fast.

    q_diff = discrepancy(*count_tokens(token_lists, sides, vocab_size))
    direction = reward_direction(model.lm_head.weight, q_diff)
    r_dis = folded_reward(last_hidden, labels, direction)        # equals distribution_reward(logits, labels, q_diff)

Everywhere `labels[B, T]` is -100 outside the response tokens that count (mask EOS too: our choice), and position t
predicts token t + 1, so the response is scored at the positions t with `labels[:, t + 1] != -100`.

The identity: q_diff sums to 0, so the softmax normaliser cancels out of R_dis, and for logits z = W h + b

    R_dis = sum_v q_diff[v] * mean_t z_t[v] = (W^T q_diff) . mean_t h_t + b . q_diff
"""

from itertools import chain

import numpy as np
import torch

IGNORED = -100  # the label of every token that is not scored
TOKENS_HELD = 2**20  # counted at a time: one pass of numpy over a million costs less than a thousand over a thousand


def count_tokens(token_lists, sides, vocab_size, first=0):
    """Count the tokens of good and of bad responses: Q_pos and Q_neg, section 3.2 of the paper.

    token_lists: iterable over ranked lists, each a list of token-id lists, one per response; read once, and only about
    a million tokens of it are held. sides: iterable over ranked lists, each a list of +1 (count into Q_pos), -1 (into
    Q_neg) or 0 (skip), one per response. first: the number that an error calls the first list by.
    Returns (int64[V], int64[V]) with V = vocab_size, the number of rows of the output head.
    Raises ValueError if the two do not match, for another side, or for a token id outside 0 .. V - 1; names the list.
    """
    counts = {+1: np.zeros(vocab_size, np.int64), -1: np.zeros(vocab_size, np.int64)}
    held, n_held = {+1: [], -1: []}, 0  # [(number of the list, its tokens)] of each side, not yet counted
    for number, (responses, list_sides) in enumerate(zip(token_lists, sides, strict=True), start=first):
        if len(responses) != len(list_sides):
            raise ValueError(f"list {number}: {len(responses)} responses but {len(list_sides)} sides")
        for tokens, side in zip(responses, list_sides, strict=True):
            if side == 0:
                continue
            if side not in counts:
                raise ValueError(f"list {number}: side {side!r}, expected +1, -1 or 0")
            held[side].append((number, tokens))
            n_held += len(tokens)
        if n_held >= TOKENS_HELD:
            _add_held(counts, held)
            n_held = 0
    _add_held(counts, held)
    return counts[+1], counts[-1]


def _add_held(counts, held):
    """Count what is held of each side, and let go of it."""
    for side, responses in held.items():
        flat = np.fromiter(chain.from_iterable(tokens for _, tokens in responses), np.int64)
        if flat.size and (flat.min() < 0 or flat.max() >= len(counts[side])):
            for number, tokens in responses:
                _check_ids(tokens, len(counts[side]), number)
        counts[side] += np.bincount(flat, minlength=len(counts[side]))
        responses.clear()


def _check_ids(tokens, vocab_size, number):
    if len(tokens) and (min(tokens) < 0 or max(tokens) >= vocab_size):
        raise ValueError(
            f"list {number}: token ids {min(tokens)} to {max(tokens)}, expected 0 to {vocab_size - 1}; "
            "was another tokenizer used?"
        )


def discrepancy(pos_counts, neg_counts):
    """Token preference q_diff[v], Eq. 14: how much likelier token v is in good responses than in bad ones.

    pos_counts, neg_counts: int[V], occurrences in Q_pos and Q_neg. Returns float64[V] in [-1, 1], sums to 0.
    Raises ValueError if either side is empty, a count is negative or the lengths differ.
    """
    pos_counts, neg_counts = np.asarray(pos_counts), np.asarray(neg_counts)
    if pos_counts.ndim != 1 or pos_counts.shape != neg_counts.shape:
        raise ValueError(f"counts must be two vectors of one length, found {pos_counts.shape} and {neg_counts.shape}")
    for name, counts in ("Q_pos", pos_counts), ("Q_neg", neg_counts):
        if (counts < 0).any():
            raise ValueError(f"{name} holds a negative count")
        if counts.sum() == 0:
            raise ValueError(f"{name} is empty: no token was counted into it")
    return pos_counts / pos_counts.sum() - neg_counts / neg_counts.sum()


def distribution_reward(logits, labels, q_diff):
    """R_dis of each response exactly as printed, Eqs. 16-17: q_diff against the mean log-probability of every token.

    logits: float[B, T, V]. labels: int[B, T]. q_diff: numpy float64[V] or tensor. Returns at least float32[B].
    Needs a [B, T, V] tensor of log-probabilities; `folded_reward` gives the same number without it.
    Raises ValueError for a row without any response token, or if q_diff does not have one entry per logit.
    """
    log_probs = logits.log_softmax(-1, dtype=_precise(logits.dtype))
    mean_log_probs = _response_mean(log_probs, labels)  # Q_avg, Eq. 16
    return (mean_log_probs * _as_vector(q_diff, logits.shape[-1], mean_log_probs)).sum(-1)


def reward_direction(head_weight, q_diff):
    """The direction W^T q_diff: where a hidden state must move for R_dis to grow.

    head_weight: float[V, d], the output embedding W; the gradient flows back through it. A bias float[V] in its place
    gives the scalar offset b . q_diff. q_diff: numpy float64[V] or tensor. Returns [d], in float32 or better even
    under autocast. Raises ValueError if q_diff does not have one entry per row of the head.
    """
    weight = head_weight.to(_precise(head_weight.dtype))
    with torch.autocast(weight.device.type, enabled=False):  # small differences would drown in bfloat16
        return _as_vector(q_diff, len(weight), weight) @ weight


def folded_reward(hidden, labels, direction, offset=0.0):
    """R_dis of each response from hidden states alone, by the identity above: direction . mean_t h_t + offset.

    hidden: float[B, T, d], the states that the head reads. labels: int[B, T]. direction: [d] from `reward_direction`.
    offset: b . q_diff for a head with a bias. Returns at least float32[B], equal to `distribution_reward` in value and
    gradient for logits W h + b; soft-capped or scaled logits are not linear in h and need their own treatment.
    Raises ValueError for a row without any response token.
    """
    return (mean_response_hidden(hidden, labels) * direction).sum(-1) + offset


def mean_response_hidden(hidden, labels):
    """Mean hidden state over the positions that predict response tokens: all that R_dis needs of a forward pass.

    hidden: float[B, T, d]. labels: int[B, T]. Returns at least float32[B, d]; its product with a direction is an R_dis.
    Raises ValueError for a row without any response token.
    """
    return _response_mean(hidden, labels)


def folded_reward_or_zero(hidden, labels, direction, offset=0.0):
    """(R_dis[B], bool[B]): `folded_reward`, but 0 for a row without any response token; and which rows have one.

    Never waits for the device, as the check in `folded_reward` does: what a training step takes.
    """
    sums, counts = _response_sums(hidden, labels)
    has_any = (counts > 0).squeeze(-1)
    rewards = (sums / counts.clamp(min=1) * direction).sum(-1) + offset
    return rewards.masked_fill(~has_any, 0), has_any


def folded_reward_of_segments(hidden, labels, segments, direction, offset=0.0):
    """(R_dis[S], bool[S]) of responses that share rows, packed one behind another; S = N * T, most of them empty.

    hidden: float[N, T, d]. labels: int[N, T], -100 at the first token of every segment: what predicts it stands in
    another. segments: int[N, T], the number of the segment that a token belongs to, below N * T. Equal to
    `folded_reward_or_zero` of the segments in rows of their own. The mean is taken over h . direction, so nothing of
    size [S, d] is made, and nothing waits for the device to tell how many segments there are.
    """
    is_response = labels[:, 1:] != IGNORED
    scored = hidden[:, :-1].masked_fill(~is_response.unsqueeze(-1), 0)
    with torch.autocast(hidden.device.type, enabled=False):
        projected = scored.to(direction.dtype) @ direction
    owners = segments[:, 1:].flatten()
    empty = projected.new_zeros(segments.numel())
    sums = empty.index_add(0, owners, projected.flatten())
    counts = empty.index_add(0, owners, is_response.flatten().to(empty.dtype))
    return (sums / counts.clamp(min=1) + offset).masked_fill(counts == 0, 0), counts > 0


def _response_mean(values, labels):
    """Mean of values[B, T, k] over the positions t that predict a response token: [B, k]."""
    sums, counts = _response_sums(values, labels)
    if (counts == 0).any():
        rows = (counts == 0).squeeze(-1).nonzero().squeeze(-1).tolist()
        raise ValueError(f"R_dis is a mean over response tokens, but rows {rows} have none; drop them first")
    return sums / counts


def _response_sums(values, labels):
    """(sums[B, k], int counts[B, 1]) of values[B, T, k] over the positions t that predict a response token."""
    if values.shape[:-1] != labels.shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit values of shape {tuple(values.shape)}")
    is_response = labels[..., 1:] != IGNORED
    scored = values[..., :-1, :].masked_fill(~is_response.unsqueeze(-1), 0)  # not a product: 0 * inf is NaN
    return scored.sum(-2, dtype=_precise(values.dtype)), is_response.sum(-1, keepdim=True)


def _precise(dtype):
    return torch.promote_types(dtype, torch.float32)


def _as_vector(q_diff, length, like):
    """q_diff[V] as a tensor with the dtype and device of another, checked to have V = length entries."""
    if not isinstance(q_diff, torch.Tensor):
        q_diff = torch.from_numpy(np.asarray(q_diff, np.float64))
    if q_diff.shape != (length,):
        raise ValueError(f"q_diff of shape {tuple(q_diff.shape)}, expected one entry per row of the head: {length}")
    return q_diff.to(like.dtype).to(like.device)

"""Several replies to one prompt in one row: the prompt is read once, and no reply sees another.

    for which, inputs, labels, owners in batches(pairs, several, token_budget, pad_token_id, "scoring"): ...
    inputs, labels, owners = packed([(prompt ids, [reply ids, ...]), ...], pad_token_id)

Of pairs whose prompt is as long as a reply that saves a quarter of all tokens, and no state changes by more than
rounding. `reads_packed` tells which backbones can; for the others a row holds one reply.
"""

import inspect

import torch

from deftlib.method.distribution import IGNORED
from deftlib.models.loop import length_buckets, with_progress

MOST = 8  # replies in a row: by then the prompt is nearly free, and attention grows with the square of the row


def batches(pairs, several, token_budget, pad_token_id, label):
    """Yield (indices of pairs, *`packed`) of (prompt ids, reply ids) pairs, rows of like length together.

    several: whether neighbours with one prompt share a row. A batch has at most `token_budget` padded tokens, or is one
    reply alone.
    """
    rows = []  # indices of pairs
    for i, (prompt, reply) in enumerate(pairs):
        mates = rows[-1] if several and rows and pairs[rows[-1][0]][0] == prompt else []
        if 0 < len(mates) < MOST and _tokens(prompt, [*(pairs[k][1] for k in mates), reply]) <= token_budget:
            mates.append(i)
        else:
            rows.append([i])
    given = [(pairs[row[0]][0], [pairs[i][1] for i in row]) for row in rows]
    buckets = list(length_buckets([_tokens(*row) for row in given], token_budget))
    of_buckets = [[i for k in bucket for i in rows[k]] for bucket in buckets]
    for bucket, which in zip(buckets, with_progress(of_buckets, label, total=len(pairs))):
        yield which, *packed([given[k] for k in bucket], pad_token_id)


def packed(rows, pad_token_id):
    """(inputs, labels, owners) of rows of (prompt ids, [reply ids, ...]): what a model takes, whose tokens they are.

    Each reply stands behind a last prompt token of its own, which predicts its first: labels[B, T], -100 elsewhere,
    are shifted as always. A reply without tokens has a label there that nothing reads, so that it has a state. owners:
    int[B, T], the number of the reply that a token belongs to, through all rows; 0 elsewhere. inputs: input_ids and
    attention_mask[B, T]; where a row holds several replies the mask is bool[B, 1, T, T], and position_ids[B, T] come.
    Raises ValueError for a prompt without tokens: nothing would predict the first of its reply.
    """
    if not all(prompt for prompt, _ in rows):
        raise ValueError("a prompt without a token predicts no reply")
    length, number = max(_tokens(*row) for row in rows), 0
    ids = torch.full((len(rows), length), pad_token_id)
    labels, parts = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)  # parts: 0 the prompt, then reply by reply
    positions, owners = torch.zeros_like(ids), torch.zeros_like(ids)
    for k, (prompt, replies) in enumerate(rows):
        *before, last = prompt
        end = len(before)
        ids[k, :end], positions[k, :end], parts[k, :end] = torch.tensor(before), torch.arange(end), 0
        for part, reply in enumerate(replies, 1):
            start, first, end = end, end + 1, end + 1 + max(len(reply), 1)
            ids[k, start:end] = torch.tensor([last, *(reply or [pad_token_id])])
            positions[k, start:end] = len(before) + torch.arange(end - start)
            labels[k, first:end], owners[k, first:end] = ids[k, first:end], number
            parts[k, start : first + len(reply)], number = part, number + 1
    if number == len(rows):
        return {"input_ids": ids, "attention_mask": (parts >= 0).long()}, labels, owners
    seen = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
    mask = (seen & torch.ones(length, length, dtype=torch.bool).tril()).unsqueeze(1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, labels, owners


def _tokens(prompt, replies):
    return len(prompt) - 1 + sum(1 + max(len(reply), 1) for reply in replies)


def of_owners(values, labels, owners):
    """(sums, counts) over the tokens of each reply: float[N, ...] and int[N].

    values: float[B, T - 1, ...], at each position what is said there of the next token. labels, owners: of `packed`.
    """
    is_response = labels[:, 1:] != IGNORED
    counts = owners[:, 1:][is_response].bincount()
    return torch.segment_reduce(values[is_response], "sum", lengths=counts), counts  # the same sum on every run


@torch.no_grad()
def reads_packed(backbone):
    """Whether a backbone makes of packed replies what it makes of each alone, tried on a few tokens.

    Encoders look ahead, recurrent layers read no mask, eager attention adds it, and a sliding window counts columns:
    none of them does. In a model that does, a reply keeps its states to the last bit beside another neighbour.
    """
    config, takes = backbone.config.get_text_config(), inspect.signature(backbone.forward).parameters
    masks = config._attn_implementation == "sdpa" and not getattr(config, "sliding_window", None)
    if not masks or "position_ids" not in takes:
        return False
    prompt, first, other, last = [1, 2, 1], [2, 3], [2, 1], [3, 2]  # any ids will do

    def states(*rows):
        inputs, labels, _ = packed([(prompt, list(replies)) for replies in rows], 0)
        hidden = backbone(**{name: values.to(backbone.device) for name, values in inputs.items()}).last_hidden_state
        return hidden[labels.to(hidden.device) != IGNORED].float()

    try:
        together, beside = states((first, last)), states((other, last))
    except (ValueError, RuntimeError):  # it takes no mask of this shape
        return False
    apart = states((first,), (last,))
    near = (together - apart).abs().max() <= torch.finfo(backbone.dtype).eps ** 0.5 * apart.abs().max()
    looks_ahead = not torch.equal(states((first,))[0], states((other,))[0])  # they begin alike
    return bool(near) and not looks_ahead and torch.equal(together[2:], beside[2:])

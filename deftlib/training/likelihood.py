"""Log-probabilities of responses: the output head runs on the positions that predict a response token, and on no other.

    sums, counts = response_log_probs(model, model, input_ids, attention_mask, labels)       # [N] each

A large vocabulary's logits come in chunks, so that memory does not grow with the tokens of a batch. What a frozen
reference says of every response is taken once, before training, and kept: no second model stands in memory.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from deftlib.blocks import compute_share, files_of
from deftlib.method.distribution import IGNORED
from deftlib.method.passes import at_the_head
from deftlib.models.loop import length_buckets, with_progress

# 256 MiB in float32. torch's chunked `linear_cross_entropy` holds half as much and takes 3 to 5 times as long on a CPU.
LOGITS_AT_ONCE = 2**26


def response_log_probs(model, unwrapped, input_ids, attention_mask, labels, mixed_head=False):
    """(sums[N], counts[N]) of the responses, as `losses.sequence_log_probs`, without logits for other positions."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "mixed_head": mixed_head}
    log_probs = response_token_log_probs(model, unwrapped, labels, **inputs)
    return log_probs.sum(-1), (labels[:, 1:] != IGNORED).sum(-1)


def response_token_log_probs(model, unwrapped, labels, **inputs):
    """Log-probabilities [N, T - 1] of the response tokens, 0 elsewhere, as `losses.token_log_probs`."""
    of_target = lambda logits, targets: -cross_entropy(logits.float(), targets, reduction="none")
    return at_responses(of_target, model, unwrapped, labels, **inputs)


def at_responses(function, model, unwrapped, labels, mixed_head=False, **inputs):
    """`function(logits[R, V], targets[R])` -> [R] of the R positions that predict a response token: [N, T - 1], else 0.

    labels: int[N, T]. inputs: of the model. Selecting positions before the head needed the least memory of all ways
    tried. No more than LOGITS_AT_ONCE logits at a time; several chunks are computed anew in the backward pass.
    mixed_head: whether the head runs under the autocast that is on here, as TRL's does; else in its own precision,
    which is for measurements: a logit of 20 in bfloat16 is off by up to 0.06.
    """
    device = unwrapped.device.type
    autocast = {"device_type": device, "dtype": torch.get_autocast_dtype(device)}
    autocast["enabled"] = mixed_head and torch.is_autocast_enabled(device)
    targets = labels[:, 1:]
    is_response = targets != IGNORED
    rows, columns = is_response.nonzero(as_tuple=True)

    def in_chunks(hidden, weight, bias, scale):
        states = hidden[rows, columns + hidden.shape[1] - labels.shape[1]].to(weight.dtype)  # virtual tokens are first

        def run(states, targets):
            with torch.autocast(**autocast):  # in here, so that a chunk that is computed anew runs as it did
                logits = linear(states, weight, bias)
            return function(scale * logits, targets)

        at_once = max(LOGITS_AT_ONCE // len(weight), 1)
        if len(states) <= at_once:
            return run(states, targets[rows, columns])
        kept = partial(checkpoint, run, use_reentrant=False) if torch.is_grad_enabled() else run
        return torch.cat([kept(*chunk) for chunk in zip(states.split(at_once), targets[rows, columns].split(at_once))])

    with at_the_head(unwrapped, in_chunks, only_with_gradients=False) as found:
        # through `model` itself, so that a distributed wrapper sees the pass; its own logits are of one position
        model(**inputs, use_cache=False, logits_to_keep=1)
    return found[0].new_zeros(targets.shape).masked_scatter(is_response, found[0])


# ---- TRL's head ----------------------------------------------------------------------------------------------------


def head_of_trl(chunked):
    """In the place of TRL's `ChunkedLogProbFunction`: the same outputs by torch's own operators.

    TRL computes each logit twice and accumulates gradients in float32, which a CPU with bfloat16 pays for. Here logits
    stay until the backward pass, as in `at_responses`: on a CPU, up to LOGITS_AT_ONCE of them. All else is TRL's.
    """

    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
        unusual = "log_sum_sq_probs" in outputs or softcap is not None or hidden.device.type != "cpu"
        if unusual or len(hidden) * len(weight) > LOGITS_AT_ONCE:
            return chunked.apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs)
        logits = linear(hidden, weight, bias).float() * (scale / temperature)
        log_probs, found = -cross_entropy(logits, targets, reduction="none"), {}
        with torch.no_grad():
            if "entropy" in outputs:
                of_all = logits.log_softmax(-1)
                found["entropy"] = -(of_all.exp() * of_all).sum(-1)
            found["mean_logits"] = logits.mean(-1) if "mean_logits" in outputs else None
            found["is_top1"] = logits.argmax(-1) == targets if "is_top1" in outputs else None
        return log_probs, found.get("entropy"), None, found["mean_logits"], found["is_top1"]

    return SimpleNamespace(apply=apply, chunked=chunked)


# ---- the reference, kept -----------------------------------------------------------------------------------------


def kept_sums(trainer, of_batch, folder):
    """float32[n, k]: `of_batch(list of rows)` -> [rows, k] of every row of the trainer's dataset, batched by length.

    The policy before its first update is the reference (decision 7), so it takes them itself. They lie with the
    checkpoints of the run: one that was killed goes on after its last block, and publication removes them.
    A batch takes no more padded tokens than the longest micro-batch of the training. Several processes share the blocks
    out, over one folder. Under FSDP, which has not dealt the weights yet, each device holds them all for as long.
    """
    rows, state, place = trainer.train_dataset, trainer.accelerator, Path(folder) / "checkpoints" / "reference"
    lengths = [_tokens(row) for row in rows]
    token_budget = trainer.args.train_batch_size * max(lengths)
    place.mkdir(parents=True, exist_ok=True)
    prepare = lambda: partial(_of_block, of_batch, rows, lengths, token_budget)
    given = (prepare, lambda: range(len(rows)), len(rows), place / "sums.npy", "reference log-probabilities")
    loaded = trainer.model.device
    trainer.model.to(state.device)
    compute_share(*given, state.process_index, state.num_processes)
    trainer.model.to(loaded)
    state.wait_for_everyone()
    return np.concatenate([np.load(file) for file in files_of(place / "sums.npy", len(rows))])


def _of_block(of_batch, rows, lengths, token_budget, block, label):
    order, parts = [], []
    for batch in with_progress(length_buckets([lengths[i] for i in block], token_budget), label, len(block)):
        with torch.no_grad():
            parts.append(of_batch([rows[block[i]] for i in batch]).float().cpu().numpy())
        order += batch
    return np.concatenate(parts)[np.argsort(order)]


def _tokens(row):
    """Tokens of a list's prompt and longest response."""
    responses = row["response_ids"] if "response_ids" in row else (row["chosen_ids"], row["rejected_ids"])
    return len(row["prompt_ids"]) + max(map(len, responses))

"""What a frozen backbone makes of replies: its mean hidden state over each reply's tokens, computed once and kept.

    states, lengths = of_lists(profile, "policy", path)      # float32[replies, d], responses of each list
    rewards = distribution_rewards(profile, path, q_diff)    # R_dis of each reply under the start policy

By the identity of `method.distribution` the start policy's states are all that R_dis needs: one pass of the backbone,
without its head, serves every q_diff. The same states are what the heads of reward models learn on.

A source of features is "policy", the start policy as it reads in training (`text`); "words", how often each token of a
reply's text occurs; or a sentence encoder: a name in `policies.WHEELS`, a path or a hub id.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModel

from deftlib import store
from deftlib.blocks import in_blocks, slices
from deftlib.method import heads
from deftlib.method.distribution import reward_direction
from deftlib.models import packing, policies
from deftlib.preferences import batches

WORDS = 2048  # columns of "words": token ids beyond share them


class Reader(NamedTuple):
    """A backbone without its head, and how it reads: `encode(prompt, reply)` -> (ids before the reply, ids of it)."""

    model: torch.nn.Module | None  # None: "words"
    encode: Callable
    tokenizer: object
    is_bf16: bool
    token_budget: int  # padded tokens of a batch
    packs: bool  # replies to one prompt share a row: `packing`


class OfLists(Sequence):
    """One array a list, cut from an array of all replies when it is asked for."""

    def __init__(self, flat, lengths):
        self.flat, self.ends = flat, np.cumsum(lengths)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        end = self.ends[i]  # whose IndexError ends a loop
        return self.flat[self.ends[i - 1] if i % len(self) else 0 : end]


def of_lists(profile, source, path):
    """(float[N, d], int64[lists]): the states of all replies of the lists in a Parquet file, one after another.

    Published, on a memory map, in the precision of `scale.states`; an interrupted run goes on after its last 1,024
    replies.
    """
    place = kept_states(profile, source, path)
    return np.load(place / "states.npy", mmap_mode="r"), np.load(place / "lengths.npy")


def kept_states(profile, source, path):
    """Folder with `states.npy` and `lengths.npy` of `of_lists`, the first for `blocks.slices`."""
    precision = "float16" if profile.scale.states == "float16" else "float32"
    key = {"lists": store.digest(path), **identity(profile, source), "precision": precision}

    def produce(folder):
        prepare, label = partial(_states_of_blocks, profile, source, precision), f"features of {path.stem}"
        _of_replies(profile, prepare, path, folder / "states.npy", label)

    name = f"features/{policies.short_name(source)}-{path.stem}"
    return store.stage(profile, name, key, produce, "models.features")


def _states_of_blocks(profile, source, precision):
    read = reader(profile, source)
    return lambda block, label: states(read, *zip(*block), label).astype(precision)


def _of_replies(profile, prepare, path, target, label):
    """`in_blocks` over the replies of a Parquet file of lists, and beside its file the lengths of the lists."""
    lengths = batches.lengths(path)
    in_blocks(profile, prepare, partial(replies, path), lengths.sum(), target, label)
    np.save(target.with_name("lengths.npy"), lengths)


def replies(path):
    """Yield (prompt, reply) of every reply in a Parquet file of lists."""
    for row in batches.rows(path, ["prompt", "responses"]):
        for reply in row["responses"]:
            yield row["prompt"], reply


def distribution_rewards(profile, path, q_diff):
    """R_dis of every reply of a Parquet file's lists under the start policy: one float64 array a list.

    With `scale.states` "projected" they are computed and published for this q_diff alone, and no state is kept.
    """
    if profile.scale.states == "projected":
        return OfLists(*_projected(profile, path, q_diff))
    place, project = kept_states(profile, "policy", path), _projection(profile, q_diff)
    flat = np.concatenate([project(part) for part in slices(place / "states.npy")])
    return OfLists(flat, np.load(place / "lengths.npy"))


def _projection(profile, q_diff):
    """The function float[N, d] -> float64[N] that makes R_dis of states."""
    with np.load(_head(profile) / "head.npz") as head:
        direction = reward_direction(torch.from_numpy(head["weight"]).double(), q_diff).numpy()
        offset = float(head["bias"].astype(np.float64) @ q_diff) if "bias" in head else 0.0
        scale = head["scale"]
    return lambda part: scale * (part.astype(np.float64) @ direction + offset)


def _projected(profile, path, q_diff):
    """(float64[N], int64[lists]): R_dis of every reply, from states that are let go block by block."""
    key = {"lists": store.digest(path), **identity(profile, "policy"), "q_diff": hashlib.sha256(q_diff).hexdigest()}

    def produce(folder):
        prepare = partial(_projected_blocks, profile, q_diff)
        _of_replies(profile, prepare, path, folder / "r_dis.npy", f"R_dis of {path.stem}")

    place = store.stage(profile, f"features/r_dis-{path.stem}", key, produce, "models.features")
    return np.load(place / "r_dis.npy"), np.load(place / "lengths.npy")


def _projected_blocks(profile, q_diff):
    read, project = reader(profile, "policy"), _projection(profile, q_diff)
    return lambda block, label: project(states(read, *zip(*block), label))


def identity(profile, source):
    """What the states of a source rest on, for a key."""
    start = policies.start_policy(profile) if source in ("policy", "words") else policies.resolve(source)
    read = {"backbone": policies.identity(start), "text": vars(profile.text), "source": source}
    return read | {"dtype": profile.policy.dtype, "bf16": profile.training.bf16}


def reader(profile, source, weights=None):
    """The `Reader` of a source, in evaluation mode on the GPU if there is one. weights: from another folder."""
    start = policies.start_policy(profile) if source in ("policy", "words") else policies.resolve(source)
    tokenizer, text = policies.load_tokenizer(start), profile.text
    if source == "words":
        model, encode = None, lambda prompt, reply: _as_policy(tokenizer, prompt, reply, text)
    elif source == "policy":
        dtype = profile.policy.dtype
        model = _load(weights) if weights else heads.backbone(policies.load_policy(start, dtype))
        encode = lambda prompt, reply: _as_policy(tokenizer, prompt, reply, text)
    else:
        model = _load(weights or start)
        limit = min(text.prompt_tokens + text.reply_tokens, model.config.max_position_embeddings)
        encode = lambda prompt, reply: _as_encoder(tokenizer, prompt, reply, limit)
    packs, budget = source == "policy" and packing.reads_packed(model), profile.reward_models.score_token_budget
    return Reader(model, encode, tokenizer, profile.training.bf16, budget, packs)


def states(reader, prompts, replies, label="features"):
    """Mean last hidden state over the tokens of each reply: float32[N, d]; of "words" how often each token occurs."""
    rows = [reader.encode(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
    if reader.model is None:
        return np.stack([np.bincount(np.array(said, int) % WORDS, minlength=WORDS) for _, said in rows]).astype(
            "float32"
        )
    found = np.zeros((len(rows), reader.model.config.get_text_config().hidden_size), np.float32)
    pad = reader.tokenizer.pad_token_id
    for which, *batch in packing.batches(rows, reader.packs, reader.token_budget, pad, label):
        with torch.no_grad():
            found[which] = _states_of(reader, *batch).cpu().numpy()
    return found


def batch_states(reader, rows):
    """float32[B, d] of one batch of encoded replies, with a graph where gradients are on.

    A reply without tokens, an empty one, has the state of the last token before it (our choice).
    """
    of_one_reply = [(before, [said]) for before, said in rows]
    return _states_of(reader, *packing.packed(of_one_reply, reader.tokenizer.pad_token_id))


def _states_of(reader, inputs, labels, owners):
    there = {name: values.to(reader.model.device) for name, values in inputs.items()}
    with torch.autocast(reader.model.device.type, torch.bfloat16, enabled=reader.is_bf16):
        hidden = reader.model(**there).last_hidden_state
    sums, counts = packing.of_owners(hidden[:, :-1].float(), labels.to(hidden.device), owners.to(hidden.device))
    return sums / counts[:, None]


def _load(place):
    """A backbone alone, from a folder or hub id."""
    return AutoModel.from_pretrained(**policies.origin(place)).to(policies.device()).eval()


def _as_policy(tokenizer, prompt, reply, text):
    """As the policy reads them in training; its EOS is no part of the reply."""
    ids = policies.encode_reply(tokenizer, reply, text)
    said = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    return policies.encode_prompt(tokenizer, prompt, text), said


def _as_encoder(tokenizer, prompt, reply, limit):
    """[CLS] prompt reply, cut on the left to `limit` tokens."""
    words = lambda text: policies.encode_text(tokenizer, text)
    first = [tokenizer.cls_token_id] if tokenizer.cls_token_id is not None else []
    said = words(reply)[: limit - max(len(first), 1)]
    room = limit - len(first) - max(len(said), 1)  # of an empty reply the state before it is asked for
    return [*first, *(words(prompt)[-room:] if room else [])], said


def _head(profile):
    """Folder with `head.npz`: weight, scale and, where there is one, bias of the start policy's output head."""
    start = policies.start_policy(profile)

    def produce(folder):
        weight, bias, scale = heads.output_head(policies.load_policy(start, profile.policy.dtype))
        arrays = {"weight": weight.detach().float().cpu().numpy(), "scale": scale}
        if bias is not None:
            arrays["bias"] = bias.detach().float().cpu().numpy()
        np.savez(folder / "head.npz", **arrays)

    key = {"start": policies.identity(start), "dtype": profile.policy.dtype}
    return store.stage(profile, "features/head", key, produce, "models.features")

"""What the humans said: does a policy put the reply that people preferred above the other? No judge, no generation.

    right = preference.right(profile, policy_folders, parts)      # {"harmless": float[S, N], "helpful": float[S, N]}

A policy that learned from preferences should have raised y_1 more than y_l: its *preference accuracy* is the share of
held-out human pairs on which its log-ratio to the start policy ranks y_1 above y_l.
"""

from functools import partial

import numpy as np
import pandas as pd
import torch

from deftlib import jobs, store
from deftlib.blocks import computed
from deftlib.method import heads
from deftlib.models import generation, packing, policies
from deftlib.models.reward_heads import AXES, axis_of
from deftlib.preferences.lists import read_lists, sample
from deftlib.training.likelihood import response_token_log_probs

LOG_RATIO, LOG_PROBABILITY = "log-ratio to the start policy", "mean log-probability"


def right(profile, folders, parts, measure=LOG_RATIO):
    """{axis: float[S, N]}: 1 where y_1 is above y_l, 0 where it is below, 0.5 where they tie; one row a folder.

    folders: of one method's policies, a seed each. measure: LOG_RATIO, in which the start policy ties everywhere, or
    LOG_PROBABILITY, nats a token, which knows no start policy.
    """
    start = likelihoods(profile, policies.start_policy(profile), parts)
    rows = []
    for folder in folders:
        own = likelihoods(profile, folder, parts)
        if measure == LOG_RATIO:
            gap = (own["sum_1"] - start["sum_1"]) - (own["sum_l"] - start["sum_l"])
        else:
            gap = own["sum_1"] / own["tokens_1"] - own["sum_l"] / own["tokens_l"]
        rows.append((np.sign(gap) + 1) / 2)
    values, axes = np.stack(rows), start["subset"].map(axis_of).to_numpy()
    return {axis: values[:, axes == axis] for axis in AXES if axis in axes}


def right_of(profile, runs, parts, measure=LOG_RATIO):
    """{method: `right`} of {method: [policy of each seed]}, `profile.jobs` policies at a time."""
    asked = [policies.start_policy(profile), *(policy for folders in runs.values() for policy in folders)]
    jobs.results(profile, {str(policy): partial(likelihoods, profile, policy, parts) for policy in asked})
    return {method: right(profile, folders, parts, measure) for method, folders in runs.items()}


def likelihoods(profile, policy, parts):
    """Log-likelihoods of the held-out pairs' replies: id, subset, sum_1, tokens_1, sum_l, tokens_l. Published.

    The pairs are y_1 and y_l of `evaluation.preference_lists` lists of the dev part, equally over its subsets, without
    those that differ only behind the cut; tokens are those that a policy is trained on.
    """
    size, dev = profile.evaluation.preference_lists, parts / "dev.parquet"
    key = {"policy": policies.identity(policy), "dev": store.digest(dev), "lists": size, "text": vars(profile.text)}
    key |= {"dtype": profile.policy.dtype, "bf16": profile.training.bf16}

    def produce(folder):
        lists = read_lists(dev)
        lists = sample(lists, size) if 0 < size < len(lists) else lists
        tokenizer = policies.load_tokenizer(policy)
        read = lambda reply: policies.encode_reply(tokenizer, reply, profile.text)
        differ = [read(replies[0]) != read(replies[-1]) for replies in lists["responses"]]
        lists = lists.select(np.flatnonzero(differ))
        pairs = [(row["prompt"], row["responses"][which]) for row in lists for which in (0, -1)]
        label, prepare = f"human pairs, {generation.name_of(policy)}", partial(_of_blocks, profile, policy)
        sums, tokens = computed(profile, prepare, pairs, folder / "of_replies.npy", label).T
        frame = pd.DataFrame({"id": lists["id"][:], "subset": lists["subset"][:]})
        for k, name in enumerate("1l"):
            frame[f"sum_{name}"], frame[f"tokens_{name}"] = sums[k::2], tokens[k::2].astype(int)
        frame.to_parquet(folder / "likelihoods.parquet")

    name = f"preference/{generation.name_of(policy)}"
    return pd.read_parquet(store.stage(profile, name, key, produce, "evaluation.preference") / "likelihoods.parquet")


def _of_blocks(profile, policy):
    model, tokenizer = policies.load_policy(policy, profile.policy.dtype), policies.load_tokenizer(policy)
    several = packing.reads_packed(heads.backbone(model))
    return lambda block, label: _log_likelihoods(profile, model, tokenizer, several, block, label)


@torch.no_grad()
def _log_likelihoods(profile, model, tokenizer, several, pairs, label):
    """float64[N, 2]: log-likelihood in nats and number of tokens of the reply of each (prompt, reply)."""
    text, budget, device = profile.text, profile.reward_models.score_token_budget, model.device
    encode = partial(policies.encode_prompt, tokenizer), partial(policies.encode_reply, tokenizer)
    rows = [tuple(read(words, text) for read, words in zip(encode, pair)) for pair in pairs]
    found = np.zeros((len(rows), 2))
    for which, inputs, labels, owners in packing.batches(rows, several, budget, tokenizer.pad_token_id, label):
        there = {name: values.to(device) for name, values in inputs.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=profile.training.bf16):
            of_tokens = response_token_log_probs(model, model, labels.to(device), **there)
        sums, counts = packing.of_owners(of_tokens.double(), labels.to(device), owners.to(device))
        found[which] = torch.stack([sums, counts], 1).cpu().numpy()
    return found

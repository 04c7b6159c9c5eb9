"""Ranked lists as token ids: what every trainer here reads.

encoded = encode_lists(lists, tokenizer, profile.text)      # prompt_ids, response_ids, rewards
encoded.map(as_sft), encoded.map(as_pair)                   # as TRL's SFT and DPO trainers take them
"""

import json
from collections import Counter

from datasets import Dataset

from deftlib import store
from deftlib.method.distribution import IGNORED
from deftlib.models import policies
from deftlib.training import subset


def encode_lists(lists, tokenizer, text, rejects_path=None):
    """Ranked lists as token ids: prompt_ids, response_ids, rewards (ranks L-1 .. 0 where rewards do not fit the order).

    A list is rejected, written to `rejects_path` and counted on screen, if a response has no token left but EOS, or if
    two differ only behind the cut.
    """
    rows, rejects = [], []
    for row in lists:
        responses = [policies.encode_reply(tokenizer, reply, text) for reply in row["responses"]]
        fault = _fault(responses, tokenizer.eos_token_id)
        if fault:
            rejects.append({"id": row["id"], "reason": fault})
            continue
        fits = row["rewards"] is not None and subset.agrees(row)
        rewards = row["rewards"] if fits else [float(len(responses) - 1 - i) for i in range(len(responses))]
        prompt = policies.encode_prompt(tokenizer, row["prompt"], text)
        rows.append({"prompt_ids": prompt, "response_ids": responses, "rewards": rewards})
    if rejects:
        counts = Counter(reject["reason"] for reject in rejects)
        print(f"  rejected {len(rejects)} lists: {', '.join(f'{n} {reason}' for reason, n in counts.items())}")
        if rejects_path:
            store.write_atomic(rejects_path, "".join(json.dumps(reject) + "\n" for reject in rejects))
    if not rows:
        raise ValueError("no list is left to train on: cut to text.reply_tokens, responses vanish or become equal")
    return Dataset.from_list(rows)


def _fault(responses, eos):
    """Why encoded responses cannot be trained on, or None."""
    if any(set(response) <= {eos} for response in responses):
        return "a response vanishes by truncation"
    if len({tuple(response) for response in responses}) < len(responses):
        return "two responses differ only behind the cut"
    return None


def responses_of(encoded, which):
    """The lists cut to the responses at the positions `which`, e.g. (0, -1) for the best and the worst."""
    cut = lambda row: {name: [row[name][i] for i in which] for name in ("response_ids", "rewards")}
    return encoded.map(cut)


def as_sft(row):
    """A row of SFT: the prompt and y_1, labelled on y_1 alone."""
    best = row["response_ids"][0]
    return {"input_ids": row["prompt_ids"] + best, "labels": [IGNORED] * len(row["prompt_ids"]) + best}


def as_pair(row):
    """A row of DPO: y_1 chosen, y_l rejected."""
    return {"chosen_ids": row["response_ids"][0], "rejected_ids": row["response_ids"][-1]}

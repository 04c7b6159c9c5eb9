"""What a policy says to the test prompts, and how good it is: `replies(profile, policy, seed)`.

Replies are generated once per (policy, prompts, settings) and published as Parquet with their scores: r_eval's raw
reward and, in the mini world, the true reward. Notebooks average them.
"""

import re

import numpy as np
import pandas as pd
import torch

from deftlib import mini_world, models, rewards, store
from deftlib.intervals import bootstrap_interval, paired_bootstrap
from deftlib.loop import with_progress
from deftlib.preferences import read_lists

NEXT_TURN = re.compile(r"\s*(human|assistant):", re.IGNORECASE)


@torch.no_grad()
def generate(model, tokenizer, prompts, text, generation, seed=0, label="generating"):
    """`generation.samples` replies to each prompt, [[reply, ...], ...]: greedy at temperature 0, else seeded sampling.

    Prompts of like length share a left-padded batch. A reply ends at EOS, at the next "Human:" or "Assistant:" in
    either case, or after `generation.max_new_tokens`.
    """
    ids = [models.encode_prompt(tokenizer, prompt, text) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    size = max(1, generation.batch_size // generation.samples)
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    settings = {"max_new_tokens": generation.max_new_tokens, "num_return_sequences": generation.samples}
    settings |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if generation.temperature > 0:
        settings |= {"do_sample": True, "temperature": generation.temperature, "top_k": 0, "top_p": 1.0}
    replies = [[] for _ in prompts]
    torch.manual_seed(seed)
    for batch in with_progress(batches, label, total=len(prompts)):
        inputs = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, padding_side="left", return_tensors="pt")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        output = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(output, skip_special_tokens=True)
        for k, i in enumerate(batch):
            replies[i] = [first_turn(said) for said in decoded[k * generation.samples : (k + 1) * generation.samples]]
    return replies


def first_turn(generated):
    """The reply before the model starts to play the next turn."""
    return NEXT_TURN.split(generated, maxsplit=1)[0].rstrip()


def replies(profile, policy, parts, r_eval, seed=0):
    """The policy's replies to the test part: id, subset, prompt, sample, reply, reward[, true_reward, unknown].

    policy: folder or hub id. parts, r_eval: folders of `subset.parts` and `rewards.reward_model(…, "evaluate")`.
    reward is r_eval's raw score; in the mini world true_reward is 0..100 and unknown the share of unknown sentences.
    """
    key = {"policy": models.identity(policy), "r_eval": models.identity(r_eval), "parts": store.digest(parts)}
    spec, dtype = profile.reward_models.evaluate, profile.policy.dtype
    key |= {"generation": vars(profile.generation), "text": vars(profile.text), "seed": seed, "dtype": dtype}
    key |= {"text_format": spec.text_format, "max_tokens": spec.max_tokens}

    def produce(folder):
        test = read_lists(parts / "test.parquet")
        model, tokenizer = models.load_policy(policy, dtype), models.load_tokenizer(policy)
        said = generate(model, tokenizer, test["prompt"], profile.text, profile.generation, seed)
        rows = [
            {"id": row["id"], "subset": row["subset"], "prompt": row["prompt"], "sample": k, "reply": reply}
            for row, samples in zip(test, said)
            for k, reply in enumerate(samples)
        ]
        frame = pd.DataFrame(rows)
        judge, judge_tokenizer = rewards.load_reward_model(r_eval)
        frame["reward"] = rewards.score(judge, judge_tokenizer, frame["prompt"], frame["reply"], spec, label="r_eval")
        if profile.data.source == "mini":
            frame["true_reward"] = [mini_world.true_reward(p, r) for p, r in zip(frame["prompt"], frame["reply"])]
            frame["unknown"] = [mini_world.unknown_sentences(r) for r in frame["reply"]]
        frame.to_parquet(folder / "replies.parquet")

    name = str(policy).rstrip("/").split("/")[-1].rsplit("-", 1)[0]
    folder = store.stage(profile.name, f"replies/{name}-seed{seed}", key, produce, "evaluate")
    return pd.read_parquet(folder / "replies.parquet")


def sigmoid_reward(raw):
    """100 * sigmoid of raw rewards, the unit the paper's tables average."""
    return 100 / (1 + np.exp(-np.asarray(raw, dtype=np.float64)))


def by_prompt(frames, score):
    """[S, N] array: mean score of each prompt's samples, one row per seed, prompts in one order.

    frames: one `replies` DataFrame per seed. score: a column, or a function of a DataFrame.
    """
    values = [frame.assign(value=score(frame) if callable(score) else frame[score]) for frame in frames]
    return np.stack([frame.groupby("id", sort=True)["value"].mean().to_numpy() for frame in values])


def compare(scores, baseline):
    """Table of methods: mean with its 95 % interval, and the paired difference to `baseline` with its own.

    scores: {method: float[S, N]} of `by_prompt`, over the same prompts. Intervals: bootstrap over prompts and seeds.
    """
    rows = []
    for method, values in scores.items():
        mean = bootstrap_interval(values)
        gain = paired_bootstrap(*_aligned(values, scores[baseline]))
        rows.append([method, mean.mean, mean.low, mean.high, gain.mean, gain.low, gain.high, len(values), mean.n])
    names = ["method", "mean", "low", "high", f"over {baseline}", "diff low", "diff high", "seeds", "prompts"]
    return pd.DataFrame(rows, columns=names).set_index("method")


def _aligned(values, other):
    """A policy without seeds (the start model) is compared with every seed of the other."""
    seeds = max(len(values), len(other))
    return (np.broadcast_to(array, (seeds, array.shape[1])) if len(array) == 1 else array for array in (values, other))

"""How good a policy's replies to the test prompts are: `replies(profile, policy, parts, r_eval, seed)`.

Each (policy, prompts, settings) is a published Parquet file of replies with their scores: r_eval's raw reward, BLEU
against the reference, length and, in the mini world, the true reward. Notebooks average them.
"""

from functools import partial

import numpy as np
import pandas as pd

from deftlib import jobs, store
from deftlib.blocks import computed, in_blocks
from deftlib.evaluation import metrics
from deftlib.intervals import mean_interval, paired_interval
from deftlib.models import generation, policies, rewards
from deftlib.preferences import mini_world
from deftlib.preferences.lists import read_lists


def replies(profile, policy, parts, r_eval, seed=0):
    """The policy's replies to the test part: id, subset, prompt, reference, sample, reply and their scores.

    policy: folder, hub id or `Endpoint`. parts: folder of `subset.parts`. r_eval: `rewards.judge(profile, "evaluate",
    parts)`. reference is y_1. reward is r_eval's raw score; bleu `100 * character_bleu`; words the length; in the mini
    world true_reward is 0..100 and unknown the share of unknown sentences.
    """
    test_part = parts / "test.parquet"
    key = {"policy": generation.identity(policy), "r_eval": r_eval.identity(), "test": store.digest(test_part)}
    key |= {"generation": vars(profile.generation), "text": vars(profile.text), "seed": seed}
    key |= {"dtype": generation.dtype(profile)}
    if profile.data.source == "mini":
        key["world"] = mini_world.digest()

    def produce(folder):
        test = read_lists(test_part)
        said = generation.replies(profile, policy, test["prompt"], seed)
        rows = [
            {"id": row["id"], "subset": row["subset"], "prompt": row["prompt"], "reference": row["responses"][0]}
            | {"sample": k, "reply": reply}
            for row, samples in zip(test, said)
            for k, reply in enumerate(samples)
        ]
        frame = pd.DataFrame(rows)
        prompts, answers, references = frame["prompt"], frame["reply"], frame["reference"]
        asked, label = list(zip(prompts, answers, frame["subset"])), f"reward of {generation.name_of(policy)}"
        frame["reward"] = computed(profile, partial(rewards.of_blocks, r_eval), asked, folder / "reward.npy", label)
        frame["words"] = [metrics.words(reply) for reply in answers]
        frame["bleu"] = [100 * metrics.character_bleu(reply, best) for reply, best in zip(answers, references)]
        if profile.data.source == "mini":
            frame["true_reward"] = [mini_world.true_reward(p, r) for p, r in zip(prompts, answers)]
            frame["unknown"] = [mini_world.unknown_sentences(r) for r in answers]
        frame.to_parquet(folder / "replies.parquet")

    name = f"replies/{generation.name_of(policy)}" + ("" if f"seed{seed}" in str(policy) else f"-seed{seed}")
    return pd.read_parquet(store.stage(profile, name, key, produce, "evaluation.evaluate") / "replies.parquet")


def replies_of(profile, runs, parts, r_eval, seeds):
    """{method: [`replies` of each policy]} of {method: [policy of each seed]}, `profile.jobs` policies at a time.

    A policy without seeds, the start model, stands once.
    """
    policy_of = {(name, seed): policy for name, several in runs.items() for policy, seed in zip(several, seeds)}
    of_seed = lambda run: partial(replies, profile, policy_of[run], parts, r_eval, run[1])
    frames = jobs.results(profile, {run: of_seed(run) for run in policy_of})
    return {name: [frames[run] for run in policy_of if run[0] == name] for name in runs}


def with_likelihood(profile, runs, frames):
    """The same {method: [`replies`]} with a column `likelihood`: what `likelihood_name` says of each reply.

    runs: {method: [policy of each seed]}, whose replies they are; `profile.jobs` policies at a time.
    """
    asked = {(m, k): (policy, frames[m][k]) for m, policies_of in runs.items() for k, policy in enumerate(policies_of)}
    found = jobs.results(profile, {run: partial(likelihood, profile, *said) for run, said in asked.items()})
    return {m: [f.assign(likelihood=found[m, k]) for k, f in enumerate(several)] for m, several in frames.items()}


def likelihood(profile, policy, frame):
    """What `likelihood_name` says of each reply in `replies` of a policy, float64[N], published once."""
    start, source = policies.start_policy(profile), "reference" if profile.evaluation.bart else "prompt"
    said = frame[[source, "reply"]].to_numpy().tolist()
    key = {"scorer": policies.identity(profile.evaluation.bart or start), "said": store.content_key(said)}
    key |= {"text": vars(profile.text), "dtype": profile.policy.dtype}

    def produce(folder):
        label, prepare = f"likelihood of {generation.name_of(policy)}", partial(_likelihoods, profile, start)
        in_blocks(profile, prepare, partial(iter, said), len(said), folder / "likelihood.npy", label)

    folder = store.stage(profile, f"likelihood/{generation.name_of(policy)}", key, produce, "evaluation.evaluate")
    return np.load(folder / "likelihood.npy")


def divergence(profile, policy, reference, frame):
    """KL(policy || reference) of each reply in nats, float64[N]: `metrics.kl_divergence`, published once.

    policy, reference: folders or hub ids. frame: the policy's `replies`.
    """
    said = frame[["prompt", "reply"]].to_numpy().tolist()
    key = {"policy": policies.identity(policy), "reference": policies.identity(reference)}
    key |= {"said": store.content_key(said), "text": vars(profile.text), "dtype": profile.policy.dtype}

    def produce(folder):
        label, prepare = f"KL of {generation.name_of(policy)}", partial(_divergences, profile, policy, reference)
        in_blocks(profile, prepare, partial(iter, said), len(said), folder / "kl.npy", label)

    name = f"kl/{generation.name_of(policy)}-from-{generation.name_of(reference)}"
    return np.load(store.stage(profile, name, key, produce, "evaluation.evaluate") / "kl.npy")


def _likelihoods(profile, start):
    """What `likelihood_name` says of (source, reply) items, as `blocks.in_blocks` asks for it."""
    if profile.evaluation.bart:
        bart = metrics.load_bart(profile.evaluation.bart)
        return lambda block, label: metrics.bart_score(*bart, *zip(*block), label=label)
    scorer = policies.load_policy(start, profile.policy.dtype), policies.load_tokenizer(start)
    return lambda block, label: metrics.start_log_likelihood(*scorer, *zip(*block), profile.text, label=label)


def _divergences(profile, policy, reference):
    """KL(policy || reference) of (prompt, reply) items, as `blocks.in_blocks` asks for it."""
    pair = [policies.load_policy(path, profile.policy.dtype) for path in (policy, reference)]
    tokenizer = policies.load_tokenizer(policy)
    return lambda block, label: metrics.kl_divergence(*pair, tokenizer, *zip(*block), profile.text, label=label)


def likelihood_name(profile):
    """What the column `likelihood` is: BARTScore where a BART is named, else a stand-in under its own name."""
    return "BARTScore" if profile.evaluation.bart else "start log-likelihood"


def headline(profile):
    """(name, score) of the measure that results are judged by: the mini world's true reward, else r_eval's reward.

    score is a column or a function of a `replies` DataFrame, as `by_prompt` takes it.
    """
    if profile.data.source == "mini":
        return "true reward", "true_reward"
    return "r_eval, 100 · sigmoid", lambda frame: sigmoid_reward(frame["reward"])


def judged_by(profile, r_eval):
    """Who gives `headline`, as `records.save_claim` takes it: {"name", "accuracy": {axis: Interval}}.

    The mini world's true reward has no accuracy: it is the truth.
    """
    if profile.data.source == "mini":
        return {"name": "true reward", "accuracy": None}
    return {"name": r_eval.name, "accuracy": r_eval.accuracy()}


def at_equal_length(a, b, words_a, words_b):
    """{difference, low, high, at equal length, equal low, equal high, per word} of a - b, regressed on their words.

    All float[S, N], paired. "at equal length" is the intercept, with the slope "per word" taken as known.
    """
    gap, longer = np.asarray(a) - np.asarray(b), np.asarray(words_a) - np.asarray(words_b)
    spread = longer - longer.mean()
    slope = float((spread * gap).sum() / max((spread**2).sum(), 1e-12))
    row = dict(zip(("difference", "low", "high"), mean_interval(gap)))
    left = mean_interval(gap - slope * longer)
    return row | dict(zip(("at equal length", "equal low", "equal high"), left)) | {"per word": slope}


def by_subset(frames, scores):
    """One row of Table 2: mean of each score per subset and over all prompts, {(subset, score): float}.

    frames: one `replies` DataFrame per seed. scores: {name: column or function}. "total" is the mean over all prompts,
    which is the sample-weighted mean of the subsets (decision 9).
    """
    frame = pd.concat(frames)
    values = pd.DataFrame({name: score(frame) if callable(score) else frame[score] for name, score in scores.items()})
    means = values.groupby(frame["subset"]).mean()
    means.loc["total"] = values.mean()
    return means.stack().to_dict()


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

    scores: {method: float[S, N]} of `by_prompt`, over the same prompts. Intervals: over prompts and seeds.
    """
    rows = []
    for method, values in scores.items():
        mean = mean_interval(values)
        gain = paired_interval(*_aligned(values, scores[baseline]))
        rows.append([method, mean.mean, mean.low, mean.high, gain.mean, gain.low, gain.high, len(values), mean.n])
    names = ["method", "mean", "low", "high", f"over {baseline}", "diff low", "diff high", "seeds", "prompts"]
    return pd.DataFrame(rows, columns=names).set_index("method")


def _aligned(values, other):
    """A policy without seeds (the start model) is compared with every seed of the other."""
    seeds = max(len(values), len(other))
    return (np.broadcast_to(array, (seeds, array.shape[1])) if len(array) == 1 else array for array in (values, other))

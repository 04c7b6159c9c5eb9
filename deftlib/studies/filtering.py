"""Which lists carry the most preference information? The final version's central sentence, without any policy.

"Samples with the lowest pre-computed R_Q carry the most preference information": so a preference model that learns from
them should order unseen human pairs better than one that learns from as many others. The same small model, one linear
head per axis on frozen features, learns from the lists of lowest R_dis, of highest, from level A by `r_train`, and from
random ones of the same number; `dev.parquet`, which nobody learned from, tells how often it is right.

    right = filtering.right_by_choice(profile, parts)     # {("lowest R_dis", 25.0, "helpful"): float[draws, pairs]}
"""

import numpy as np

from deftlib import store
from deftlib.method.distribution import discrepancy
from deftlib.method.grading import distribution_levels, per_subset
from deftlib.models import features, policies, reward_heads, rewards
from deftlib.models.reward_heads import AXES, axis_of
from deftlib.preferences.lists import read_lists
from deftlib.training import subset

LOWEST, HIGHEST, LEVEL_A, RANDOM = "lowest R_dis", "highest R_dis", "level A", "random"
CHOICES = (LOWEST, HIGHEST, LEVEL_A, RANDOM)
POOL = ("pool", "reward_eval")  # of lists that r_train never saw; a finished r_eval has no part
STRENGTHS = (10000.0, 1000.0, 100.0, 10.0)


def right_by_choice(profile, parts):
    """{(choice, share in per cent, axis): float[draws, held-out pairs]}: 1 where y_1 scores above y_l. Published.

    Every draw takes half of the lists of each subset; q_diff is counted on that half (y_1 against y_l), and each choice
    keeps the share of it in each subset. Draws and pairs are crossed, as seeds and prompts are elsewhere.
    """
    settings = profile.filtering
    shares = sorted({*settings.shares, profile.grading.keep})
    r_train = rewards.judge(profile, "train", parts)
    key = {"lists": [store.digest(path) for path in (*_pool_paths(parts), parts / "dev.parquet")], "shares": shares}
    key |= {"features": features.identity(profile, settings.features), "draws": settings.draws}
    key |= {"start": features.identity(profile, "policy"), "r_train": r_train.identity()}

    def produce(folder):
        found = _all_draws(profile, parts, r_train, shares)
        np.savez_compressed(folder / "right.npz", **{"|".join(map(str, name)): found[name] for name in found})

    folder = store.stage(profile, "filtering", key, produce, "studies.filtering")
    with np.load(folder / "right.npz") as stored:
        named = {name: name.split("|") for name in stored}
        return {(choice, float(share), axis): stored[name] for name, (choice, share, axis) in named.items()}


def _all_draws(profile, parts, r_train, shares):
    paths = _pool_paths(parts)
    pool, vocabulary_size = _pool(profile, paths, r_train), subset.vocabulary_size(policies.start_policy(profile))
    held_gap, held_axis = _gaps(profile, parts / "dev.parquet")
    found = {}
    for draw in range(profile.filtering.draws):
        half = _half(pool["subset"], draw)
        q_diff = discrepancy(*(_counts(pool[side], half, vocabulary_size) for side in ("best", "worst")))
        of_replies = [rewards for path in paths for rewards in features.distribution_rewards(profile, path, q_diff)]
        r_dis = np.array([of_list[0] for of_list in of_replies])[half]
        scores = {LOWEST: -r_dis, HIGHEST: r_dis, LEVEL_A: pool["reward"][half]}
        scores[RANDOM] = np.random.default_rng(draw).random(len(half))
        for share in shares:
            for choice in CHOICES:
                kept = _keep(scores[choice], pool["subset"][half], share)
                for axis in AXES:
                    rows = half[kept][pool["axis"][half[kept]] == axis]
                    hits = _learn(pool["gap"][rows], held_gap[held_axis == axis], draw)
                    found.setdefault((choice, share, axis), []).append(hits)
        print(f"  filtering: draw {draw + 1} of {profile.filtering.draws}", flush=True)
    return {name: np.stack(rows) for name, rows in found.items() if rows[0].size}


def _pool_paths(parts):
    """Those of `POOL` that the profile deals."""
    return [path for path in (parts / f"{name}.parquet" for name in POOL) if path.is_file()]


def _pool(profile, paths, r_train):
    """What every draw reads of each list: features of y_1 less y_l, tokens of both, highest reward, subset, axis."""
    start = policies.start_policy(profile)
    tokenizer = policies.load_tokenizer(start)
    special = set(tokenizer.all_special_ids)
    columns = {name: [] for name in ("subset", "gap", "best", "worst", "reward")}
    for path in paths:
        lists = read_lists(path)
        columns["subset"] += lists["subset"][:]
        columns["gap"].append(_gaps(profile, path)[0])
        columns["reward"] += [of_list.max() for of_list in r_train.of_lists(path)]
        for side, which in (("best", 0), ("worst", -1)):
            replies = (responses[which] for responses in lists["responses"])
            encoded = (policies.encode_reply(tokenizer, reply, profile.text) for reply in replies)
            columns[side] += [np.array([i for i in ids if i not in special], int) for ids in encoded]
    arrays = {"gap": np.concatenate(columns["gap"])} | {name: np.array(columns[name]) for name in ("subset", "reward")}
    return columns | arrays | {"axis": np.array(list(map(axis_of, columns["subset"])))}


def _gaps(profile, path):
    """(float64[N, d]: features of y_1 less those of y_l, [axis of each list])."""
    states, lengths = features.of_lists(profile, profile.filtering.features, path)
    first = np.cumsum(lengths) - lengths
    gaps = np.asarray(states[first], np.float64) - np.asarray(states[first + lengths - 1], np.float64)
    return gaps, np.array(list(map(axis_of, read_lists(path)["subset"])))


def _half(subsets, draw):
    """Rows of a random half of each subset, in order."""
    rng = np.random.default_rng([draw, 1])
    chosen = [rng.permutation(np.flatnonzero(subsets == name)) for name in np.unique(subsets)]
    return np.sort(np.concatenate([rows[: len(rows) // 2] for rows in chosen]))


def _counts(tokens, rows, vocabulary_size):
    return np.bincount(np.concatenate([tokens[i] for i in rows]), minlength=vocabulary_size)


def _keep(scores, subsets, share):
    """bool: the highest `share` per cent of each subset."""
    level = per_subset(distribution_levels, scores, subsets, share=share, direction="highest")
    return np.array(level) == "A"


def _learn(gaps, held_gaps, draw):
    """float64[held-out pairs]: 1 where a head that learned from `gaps` is right, 0.5 where it says nothing."""
    if len(gaps) < 10:
        return np.full(len(held_gaps), 0.5)
    scale = gaps.std(0) + 1e-9
    gaps, held_gaps = gaps / scale, held_gaps / scale
    folds = np.random.default_rng([draw, 2]).integers(3, size=len(gaps))
    pairs = [np.stack([gap, np.zeros_like(gap)]) for gap in gaps]
    losses = reward_heads.held_out_losses(pairs, folds, STRENGTHS)
    return (np.sign(held_gaps @ reward_heads.fit(gaps, min(losses, key=losses.get))) + 1) / 2

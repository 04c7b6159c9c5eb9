"""The runs behind Table 3 and the sweeps (section 4.4 and beyond): which lists, which omega, which grading.

    runs = trained(profile, controls, ["deft-dpo"], seeds=[0, 1, 2])
    runs["deft-dpo", "random A"]                  # a policy folder for each seed
    random_lists(profile, draw=0)                 # the Parquet file that the first was trained on

A run is what `train.fit` is to be asked for beside the profile, or with a "profile" of its own. A run that two
comparisons share is one folder, and where its settings are the profile's own it is the one of notebook 03.
"""

import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
from datasets import Dataset

from deftlib import store
from deftlib.evaluation import evaluate
from deftlib.preferences import mini_world
from deftlib.training import subset, train

PRINTED_OMEGA = {"deft-pro": 2.5e-5, "deft-dpo": 2.5e-6}  # A.1


def trained(profile, study, methods, seeds):
    """{(method, label): [policy folder of each seed]} of one of the functions below, `profile.jobs` runs at a time."""
    runs = {(m, s): study(profile, m, s) for m in methods for s in seeds}
    made = train.fit_all(profile, {(m, label, s): run for (m, s), of in runs.items() for label, run in of.items()})
    labels = dict.fromkeys((m, label) for m, label, _ in made)
    return {(m, label): [made[m, label, seed] for seed in seeds] for m, label in labels}


# ---- Table 3 -----------------------------------------------------------------------------------------------------


def controls(profile, method, seed=0):
    """{variant: run} of one `deft-` method: Table 3's two ablations, and what they must be read against.

    "without D_A" trains on all lists, "without R_dis" at omega 0; "without both" is the plain method. The two "random
    A" have as many lists as level A, drawn anew for each seed: only against them does grading stand apart from data
    volume, and R_dis from the lists it is tried on. "agreement filter" is `agreement_lists`;
    "annotation order", where r_train orders lists, is level A with its replies in the annotators' order; "truly best A"
    (mini alone) is what a perfect grading would keep.
    All variants of a `deft-` method share one q_diff, the profile's.
    """
    own, random_a = {"method": method, "seed": seed}, random_lists(profile, draw=seed)
    runs = {
        "DEFT": own,
        "without D_A": own | {"lists": subset.scored(profile) / "lists.parquet"},
        "without R_dis": own | {"omega": 0.0},
        "without both": own | {"method": method.removeprefix("deft-")},
        "random A": own | {"lists": random_a},
        "random A without R_dis": own | {"omega": 0.0, "lists": random_a},
    }
    if profile.training.gradings[0] == "reward":
        runs["agreement filter"] = own | {"lists": agreement_lists(profile)}
        if profile.data.rank_by == "reward":
            given = subset.graded(by_annotators(profile), "reward").folder / "level_a.parquet"
            runs["annotation order"] = own | {"lists": given}
    if profile.data.source == "mini":
        runs["truly best A"] = own | {"lists": truly_best_lists(profile)}
    return runs


# ---- sweeps ------------------------------------------------------------------------------------------------------


def omegas(profile, method, seed=0):
    """{label: run}: level A without R_dis, in the two printed readings of omega, and over `ablation.ratios`.

    The profile's own omega is always among them (decision 11); its run is the profile's default run.
    """
    own = getattr(profile.training, method.removeprefix("deft-")).omega
    readings = {"omega 0": 0.0}
    if method in PRINTED_OMEGA:
        for reading in ("published", "counts"):
            readings[reading] = dataclasses.replace(own, reading=reading, value=PRINTED_OMEGA[method])
    ratios = {*profile.ablation.ratios, *([own.value] if own.reading == "ratio" else [])}
    readings |= {f"ratio {r:g}": dataclasses.replace(own, reading="ratio", value=r) for r in sorted(ratios)}
    return {
        label: {"method": method, "seed": seed, "omega": None if omega == own else omega}
        for label, omega in readings.items()
    }


def gradings(profile, method, seed=0):
    """{label: run}: level A by reward, by either end of R_dis, and random lists with R_dis's own q_diff."""
    own = {"method": method, "seed": seed}
    by_r_dis, lists = own | {"grading": "distribution"}, random_lists(profile, seed, "distribution")
    runs = {"highest reward": own | {"grading": "reward"}}
    for direction in ("lowest", "highest"):
        runs[f"{direction} R_dis"] = by_r_dis | {"profile": with_grading(profile, direction=direction)}
    return runs | {"random": by_r_dis | {"lists": lists}}


def volumes(profile, method, seed=0):
    """{("level A" or "random lists", share of the lists in per cent): run}, up to all lists, at 100.

    The shares are the profile's own and `ablation.tops`. As in the paper the levels move with a, and q_diff with them
    where lists have more than two responses; random lists train under the q_diff of the level A beside them. Both lines
    end in "without D_A" of `controls`, under the profile's q_diff.
    """
    name, own, runs = share_name(profile), {"method": method, "seed": seed}, {}
    for share in sorted({getattr(profile.grading, name), *profile.ablation.tops}):
        variant = with_grading(profile, **{name: share})
        runs["level A", share] = own | {"profile": variant}
        runs["random lists", share] = own | {"profile": variant, "lists": random_lists(variant, draw=seed)}
    everything = own | {"lists": subset.scored(profile) / "lists.parquet"}
    return {**runs, ("level A", 100.0): everything, ("random lists", 100.0): everything}


def bottoms(profile, method, seed=0):
    """{c: run}: level C of other sizes, which changes q_diff alone, and only where lists have three or more.

    The shares are the profile's own and `ablation.bottoms`, in per cent, under grading by reward.
    """
    own = {"method": method, "seed": seed, "grading": "reward"}
    shares = sorted({profile.grading.bottom, *profile.ablation.bottoms})
    return {c: own | {"profile": with_grading(profile, bottom=c)} for c in shares}


def lengths(profile, method, seed=0):
    """{l: run}: level A with `ablation.lengths` responses a list; all else is the same, q_diff included."""
    found = _lengths_of_level_a(profile)
    return {
        length: {"method": method, "seed": seed}
        | {"lists": None if found == {length} else shorter_lists(profile, length)}
        for length in lengths_at_hand(profile)
    }


def lengths_at_hand(profile):
    """Those of `ablation.lengths` that every list of level A can be cut to."""
    return [length for length in profile.ablation.lengths if length <= min(_lengths_of_level_a(profile))]


def _lengths_of_level_a(profile):
    return {len(responses) for responses in subset.graded(profile, profile.training.gradings[0]).level_a["responses"]}


def share_name(profile):
    """The key of `grading` that says how large level A is: "top" where reward grades first, "keep" where R_dis does."""
    return {"reward": "top", "distribution": "keep"}[profile.training.gradings[0]]


def with_grading(profile, **changes):
    """The profile with other `grading` settings; its results stand beside the profile's own, under their own keys."""
    return dataclasses.replace(profile, grading=dataclasses.replace(profile.grading, **changes))


def compared(frames, baseline, score):
    """`evaluate.compare` of {name: `replies` of each seed}, and what a reward can be bought with.

    baseline: the name that paired differences are taken to. score: as `evaluate.by_prompt` takes it. Adds r_eval
    (100 * mean sigmoid), words a reply and, in the mini world, unknown: the share of unknown sentences in per cent.
    """
    table = evaluate.compare({name: evaluate.by_prompt(f, score) for name, f in frames.items()}, baseline)
    every = {name: pd.concat(of_seeds) for name, of_seeds in frames.items()}
    table["r_eval"] = [evaluate.sigmoid_reward(frame["reward"]).mean() for frame in every.values()]
    table["words"] = [frame["words"].mean() for frame in every.values()]
    if all("unknown" in frame for frame in every.values()):
        table["unknown (%)"] = [100 * frame["unknown"].mean() for frame in every.values()]
    return table.drop(columns=["seeds", "prompts"]).join(table[["seeds", "prompts"]])


# ---- choices of lists --------------------------------------------------------------------------------------------


def random_lists(profile, draw=0, grading=None):
    """Parquet file: as many lists of each subset as level A has, drawn from all of them, level A included.

    grading: whose level A, and with whose columns (the profile's first, if None). draw: the seed; of one draw, a larger
    choice contains the smaller. Draw 0 for grading = "distribution" is notebook 01's random choice.
    """
    graded = _graded(profile, grading)
    says = f"Random lists of level A's size, draw {draw}"
    rank = np.random.default_rng(draw).random(len(graded.lists))
    choose = lambda: _as_many_as_level_a(graded, rank)
    return _published(profile, f"random-draw{draw}", graded, choose, says)


def truly_best_lists(profile, grading=None):
    """Parquet file: the lists that a perfect grading would keep in the mini world, as many of each subset as level A.

    Lists whose y_1 truly is the best reply (ties count) come before the others; among each, the higher true reward of
    y_1 first, then input order (our choice). Raises ValueError outside the mini world.
    """
    if profile.data.source != "mini":
        raise ValueError(f"only the mini world knows true rewards, data.source is {profile.data.source!r}")
    graded = _graded(profile, grading)

    def choose():
        true = [[mini_world.true_reward(row["prompt"], y) for y in row["responses"]] for row in graded.lists]
        return _as_many_as_level_a(graded, [(of_list[0] < max(of_list), -of_list[0]) for of_list in true])

    says = "The truly best lists, of level A's size"
    return _published(profile, "truly-best", graded, choose, says, world=mini_world.digest())


def shorter_lists(profile, length, grading=None):
    """Parquet file: level A cut to `length` responses a list, the first length - 1 and the last (our choice).

    So 2 leaves y_1 and y_l, the pair that DPO sees. Raises ValueError for less than 2 or more than a list has.
    """
    graded = _graded(profile, grading)

    def cut(row):
        if not 2 <= length <= len(row["responses"]):
            raise ValueError(f"list {row['id']} has {len(row['responses'])} responses and cannot be cut to {length}")
        kept = [*range(length - 1), -1]
        return {**row, **{name: row[name] and [row[name][i] for i in kept] for name in ("responses", "rewards")}}

    choose = lambda: Dataset.from_list([cut(row) for row in graded.level_a], features=graded.lists.features)
    return _published(profile, f"{length}-responses", graded, choose, f"Level A cut to {length} responses a list")


def agreement_lists(profile):
    """Parquet file: the lists on which annotators and `r_train` agree most, as many of each subset as level A.

    Ranked by `r_train`'s score of the annotators' y_1, not by the highest of the list as level A is: it keeps lists
    whose label the reward model believes. Replies in the annotators' order.
    """
    graded = _graded(by_annotators(profile), "reward")
    choose = lambda: _as_many_as_level_a(graded, [-rewards[0] for rewards in graded.lists["rewards"]])
    says = "Lists on which annotators and r_train agree, as many as level A has"
    return _published(profile, "agreement", graded, choose, says)


def by_annotators(profile):
    """The profile with replies in the annotators' order."""
    return dataclasses.replace(profile, data=dataclasses.replace(profile.data, rank_by="annotation"))


def _graded(profile, grading):
    return subset.graded(profile, grading or profile.training.gradings[0])


def _as_many_as_level_a(graded, rank):
    """The lists of lowest rank in each subset, as many as level A has there, in input order. rank: one key a list."""
    subsets = graded.lists["subset"][:]
    chosen = []
    for name, n in Counter(graded.level_a["subset"]).items():
        members = [i for i, of_list in enumerate(subsets) if of_list == name]
        chosen += sorted(members, key=lambda i: rank[i])[:n]
    return graded.lists.select(sorted(chosen))


def _published(profile, name, graded, choose, says, **more):
    """The stage `lists/<name>` with `lists.parquet` and its card; its key holds what was graded, and `more`."""

    def produce(folder):
        lists = choose()
        lists.to_parquet(folder / "lists.parquet")
        (folder / "README.md").write_text(_data_card(profile, lists, says), encoding="utf-8")

    key = {"graded": store.digest(graded.folder), **more}
    return store.stage(profile, f"lists/{name}", key, produce, "studies.ablation") / "lists.parquet"


def _data_card(profile, lists, says):
    counts = Counter(zip(lists["subset"], lists["level"]))
    rows = "\n".join(f"| {name} | {level} | {n} |" for (name, level), n in sorted(counts.items()))
    return f"""# {says}

Made by `deftlib.studies.ablation` from `{profile.data.source}` (split `{profile.data.split}`), profile
`{profile.name}`, as a control for level A. Columns: {", ".join(lists.column_names)}; responses are best first, `level`
is the level that the grading gave.

| subset | level | lists |
|---|---|---|
{rows}

The texts and their licence are those of the source. HH-RLHF contains offensive text.
"""

"""From raw preference lists to the graded subset: split, score, grade, count, publish. Sections 3.1-3.2, both versions.

Each step is a published folder under `build/<profile>/`, computed once: `parts` -> `scored` -> `graded(..., "reward")`
and `parts` -> `counted`, `features` -> `graded(..., "distribution")`. The last is the paper's third
contribution: `level_a.parquet` with a data card, beside `lists.parquet` (all lists, with level) and `q_diff.npz`.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from transformers import AutoConfig

from deftlib import store
from deftlib.method.distribution import discrepancy
from deftlib.method.grading import distribution_levels, extreme_sides, levels, per_subset, sides
from deftlib.models import features, policies, rewards
from deftlib.preferences import batches
from deftlib.preferences import lists as ranked_lists
from deftlib.preferences.lists import read_lists
from deftlib.preferences.sources import files
from deftlib.reporting import escape
from deftlib.training.counting import count_lists


class Graded(NamedTuple):
    """A graded subset: every list with its level, and the discrepancy distribution that goes with it."""

    folder: Path
    lists: Dataset  # id, subset, prompt, responses, rewards, level[, distribution_reward]
    q_diff: np.ndarray  # float64[V]
    pos_counts: np.ndarray  # int64[V]
    neg_counts: np.ndarray

    @property
    def level_a(self):
        return self.lists.select(np.flatnonzero(np.array(self.lists["level"]) == "A"))


# ---- parts and scores --------------------------------------------------------------------------------------------


def parts(profile):
    """Folder of `policy, reward_train, reward_eval, dev, test, pool` as Parquet.

    What is dealt from one file is disjoint by first human turn; a test file of its own is taken as it is. `pool` is the
    policy part (all of it, unless `data.count_lists` says less), `policy` the lists of it that are trained on
    (`data.train_lists` or `train_share`). Row faults are in `rejects.jsonl`.
    """
    data = profile.data
    source = ranked_lists.locate(data.source)
    shares = {name: share for name, share in data.shares.items() if share}
    _check_parts(source, data, shares)
    key = {name: value for name, value in vars(data).items() if name not in ("rank_by", "max_reject_share")}
    key = {"data": key, "inputs": _input_digests(source, data)}

    def produce(folder):
        options = {"format": data.format, "max_reject_share": data.max_reject_share, "cleaning": data.cleaning}
        lists, own_test = folder / "read.parquet", folder / "read-test.parquet"
        read = {
            "": ranked_lists.read_to(lists, source, split=data.split, rejects_path=folder / "rejects.jsonl", **options)
        }
        dealt = {name: (lists, rows) for name, rows in ranked_lists.split_rows(lists, shares).items()}
        if "test" not in dealt:
            rejects = folder / "rejects-test.jsonl"
            read["-test"] = ranked_lists.read_to(own_test, source, split="test", rejects_path=rejects, **options)
            dealt["test"] = own_test, np.arange(read["-test"])
        (folder / "read.json").write_text(json.dumps(read))
        dealt["pool"] = dealt["policy"]
        asked = sizes(data, len(dealt["pool"][1]))
        for name, (path, rows) in dealt.items():
            if not len(rows):
                raise ranked_lists.PreferenceError(f"{source}: no list fell to part {name!r}; give it a larger share")
            if asked[name] > len(rows):
                raise ranked_lists.PreferenceError(
                    f"{source}: {asked[name]} lists asked of the part {name!r}, which has {len(rows)}; ask for fewer"
                )
            rows = ranked_lists.sample_rows(path, rows, asked[name]) if asked[name] else rows
            batches.take(path, rows, folder / f"{name}.parquet")
        for path in (lists, own_test):
            path.unlink(missing_ok=True)

    folder = store.stage(profile, "parts", key, produce, "training.subset")
    _check_rejects(source, folder, data.max_reject_share)
    return folder


def sizes(data, lists):
    """{part: how many of its lists are taken, 0 for all}. lists: how many fell to the policy."""
    trained_on = data.train_lists or (max(1, round(data.train_share * lists)) if data.train_share < 1 else 0)
    found = {"policy": trained_on, "pool": data.count_lists, "dev": data.dev_lists, "test": data.test_lists}
    return found | {"reward_train": data.reward_lists, "reward_eval": data.reward_lists}


def _check_rejects(source, folder, max_share):
    """Refuse parts that were dealt when a larger share of rejects was allowed. Raises PreferenceError."""
    for suffix, read in json.loads((folder / "read.json").read_text()).items():
        path = folder / f"rejects{suffix}.jsonl"
        rejected = len(path.read_text(encoding="utf-8").splitlines())
        if rejected > max_share * (read + rejected):
            raise ranked_lists.PreferenceError(
                f"{source}: {rejected} of {read + rejected} lists were rejected ({path}), more than the share of "
                f"{max_share:g} allowed; mend the rows or raise data.max_reject_share"
            )


def _check_parts(source, data, shares):
    """Refuse shares that lack a part or would test on what was trained on. Raises PreferenceError."""
    missing = {"policy", "dev"} - shares.keys()
    if missing:
        raise ranked_lists.PreferenceError(f"data.shares lacks {' and '.join(sorted(missing))}, found {shares}")
    if not 0 < data.train_share <= 1:
        raise ranked_lists.PreferenceError(f"data.train_share is above 0 and at most 1, found {data.train_share:g}")
    if "test" not in shares and (data.split == "test" or Path(source).is_file()):
        raise ranked_lists.PreferenceError(
            f"{source}: the test part would be the very lists trained on; give test a share in data.shares"
        )


def _input_digests(source, data):
    """sha256 of every file the lists come from; a hub's data set by its name and revision."""
    splits = [data.split] if data.shares.get("test") else [data.split, "test"]
    labels = [label for split in splits for _, label, _ in files(source, split)]
    return [store.digest(label) if Path(label).is_file() else label for label in labels]


def scored(profile, part="policy"):
    """Folder with `lists.parquet`: a part with r_train's rewards, in the order that `data.rank_by` names."""
    source, rank_by = parts(profile), profile.data.rank_by
    given, r_train = source / f"{part}.parquet", rewards.judge(profile, "train", source)
    key = {"lists": store.digest(given), "r_train": r_train.identity(), "rank_by": rank_by}

    def produce(folder):
        schema = batches.schema_of(given)
        rows = zip(batches.rows(given), r_train.of_lists(given), strict=True)
        found = ({**row, "rewards": of_list.tolist()} for row, of_list in rows)
        found = map(best_first, found) if rank_by == "reward" else found
        batches.write(folder / "lists.parquet", schema, batches.pieces_of(found, batches.LISTS_AT_ONCE))

    return store.stage(profile, "scored", key, produce, "training.subset")


def best_first(row):
    """The list with its responses sorted by reward, equal ones in the order given."""
    order = sorted(range(len(row["rewards"])), key=lambda i: -row["rewards"][i])
    return {**row, "responses": [row["responses"][i] for i in order], "rewards": [row["rewards"][i] for i in order]}


def agrees(row):
    """Whether r_train ranks this list as it is ordered (always so under `rank_by: reward`)."""
    return all(a >= b for a, b in zip(row["rewards"], row["rewards"][1:]))


# ---- both gradings -----------------------------------------------------------------------------------------------


def graded(profile, grading, part="policy"):
    """The graded subset by `grading` = "reward" (anonymous version) or "distribution" (final version): a `Graded`.

    part: "policy", the lists that are trained on, or "pool", all of them, of which that may be a sample.
    """
    if grading not in RULES:
        raise ValueError(f'grading must be "reward" or "distribution", found {grading!r}')
    start = policies.start_policy(profile)
    key = {"rule": rule(profile, grading), "text": vars(profile.text), "start": policies.identity(start)}
    if grading == "reward":
        source = scored(profile, part)
        key |= {"scored": store.digest(source)}
        produce = lambda folder: grade_by_reward(profile, source, start, folder)
    else:
        given, counts = parts(profile) / f"{part}.parquet", counted(profile)
        key |= {"lists": store.digest(given), "counted": store.digest(counts)}
        key |= {"dtype": profile.policy.dtype, "bf16": profile.training.bf16}
        produce = lambda folder: _grade_by_distribution(profile, given, counts, folder)
    return read_graded(store.stage(profile, f"graded/{grading}", key, produce, "training.subset"))


RULES = {"reward": ("top", "bottom"), "distribution": ("keep", "direction")}  # what each reads of `profile.grading`


def rule(profile, grading):
    """The settings of a grading: {"top", "bottom"} or {"keep", "direction"}."""
    return {name: getattr(profile.grading, name) for name in RULES[grading]}


def grade_by_reward(profile, source, start, folder):
    """Grade, count and write down the lists of `source`/lists.parquet, which have rewards; they are read as needed."""
    path = source / "lists.parquet"
    rewards_of = lambda: batches.column(path, "rewards")
    best = np.fromiter(map(max, rewards_of()), np.float64)  # sec. 3.1: "the highest score within each sample"
    level = per_subset(levels, best, batches.codes(path, "subset")[1], **rule(profile, "reward"))
    counted_as = map(list_sides, level, rewards_of())
    counts = _counts(profile, path, counted_as)
    _publish(folder, path, {"level": level}, counts, start, profile, "reward")


def list_sides(level, rewards):
    """Sides of a list of this level, as `count_lists` takes them: by its rewards, where they fit its order."""
    return sides(level, rewards) if agrees({"rewards": rewards}) else extreme_sides(len(rewards))


def _grade_by_distribution(profile, given, counted_folder, folder):
    start, counts = policies.start_policy(profile), load_counts(counted_folder / "q_diff.npz")
    of_lists = features.distribution_rewards(profile, given, discrepancy(*counts))
    reward = np.fromiter((of_replies[0] for of_replies in of_lists), np.float64)
    settings, of_subset = rule(profile, "distribution"), batches.codes(given, "subset")[1]
    how = {"share": settings["keep"], "direction": settings["direction"]}
    level = per_subset(distribution_levels, reward, of_subset, **how)
    more = {"level": level, "distribution_reward": reward}
    _publish(folder, given, more, counts, start, profile, "distribution")


def counted(profile):
    """Folder with `q_diff.npz` of the pool (`parts`), y_1 against y_l: without rewards or grading (decision 5)."""
    pool_part, start = parts(profile) / "pool.parquet", policies.start_policy(profile)
    key = {"lists": store.digest(pool_part), "start": policies.identity(start), "text": vars(profile.text)}

    def produce(folder):
        pool_sides = map(extreme_sides, batches.lengths(pool_part).tolist())
        counts = _counts(profile, pool_part, pool_sides)
        save_q_diff(folder / "q_diff.npz", *counts, policies.fingerprint(policies.load_tokenizer(start)))

    return store.stage(profile, "counted", key, produce, "training.subset")


def _counts(profile, path, counted_as):
    """(Q_pos, Q_neg) of the lists in a Parquet file, with the start policy's tokenizer."""
    start, lists = policies.start_policy(profile), {"responses": batches.column(path, "responses")}
    tokenizer, num_proc = policies.load_tokenizer(start), profile.scale.num_proc
    return count_lists(lists, counted_as, tokenizer, vocabulary_size(start), profile.text, num_proc)


def vocabulary_size(policy):
    """Rows of the policy's output head: the length of q_diff."""
    return AutoConfig.from_pretrained(**policies.origin(policy)).get_text_config().vocab_size


# ---- publication -------------------------------------------------------------------------------------------------


def _publish(folder, path, more, counts, start, profile, grading):
    """Write the lists of a Parquet file with more columns, level A of them, q_diff and the data card."""
    kinds = {name: "string" if values.dtype.kind == "U" else "float64" for name, values in more.items()}
    batches.write(folder / "lists.parquet", batches.schema_of(path, **kinds), batches.with_columns(path, **more))
    batches.take(folder / "lists.parquet", np.flatnonzero(more["level"] == "A"), folder / "level_a.parquet")
    save_q_diff(folder / "q_diff.npz", *counts, policies.fingerprint(policies.load_tokenizer(start)))
    (folder / "README.md").write_text(_data_card(folder, counts, profile, grading), encoding="utf-8")


def read_graded(folder):
    """A published graded subset."""
    folder = Path(folder)
    counts = load_counts(folder / "q_diff.npz")
    return Graded(folder, read_lists(folder / "lists.parquet"), discrepancy(*counts), *counts)


def save_q_diff(path, pos_counts, neg_counts, fingerprint):
    """Counts, q_diff and the tokenizer's fingerprint in one file."""
    arrays = {"pos_counts": pos_counts, "neg_counts": neg_counts, "q_diff": discrepancy(pos_counts, neg_counts)}
    np.savez(path, fingerprint=np.array(fingerprint), **arrays)


def load_counts(path):
    """(Q_pos, Q_neg), int64[V] each, of a stored q_diff."""
    with np.load(path) as stored:
        return stored["pos_counts"], stored["neg_counts"]


def load_q_diff(path, tokenizer):
    """q_diff float64[V] for this tokenizer. Raises ValueError if it was counted with another one."""
    with np.load(path) as stored:
        found, expected = str(stored["fingerprint"]), policies.fingerprint(tokenizer)
        if found != expected:
            raise ValueError(
                f"{path} was counted with another tokenizer (fingerprint {found}, this one has {expected}): count again"
            )
        return stored["q_diff"]


def _data_card(folder, counts, profile, grading):
    """The card of a graded subset: where it is from, how it was graded, how many lists of each level and subset."""
    path, (n_pos, n_neg) = folder / "lists.parquet", (int(of_side.sum()) for of_side in counts)
    (subsets, of_subset), (grades, of_level) = batches.codes(path, "subset"), batches.codes(path, "level")
    table = np.zeros((len(subsets), len(grades)), int)
    np.add.at(table, (of_subset, of_level), 1)
    table = table[np.ix_(np.argsort(subsets), np.argsort(grades))].tolist()
    header = "| subset | " + " | ".join(sorted(grades)) + " |\n|---|" + "---|" * len(grades)
    names = map(escape.markdown, sorted(subsets))
    rows = "\n".join(f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in zip(names, table))
    how = {
        "reward": f"by reward model ({profile.reward_models.train.source}): level A the top {profile.grading.top} %, "
        f"level C the bottom {profile.grading.bottom} % of each subset (anonymous version, sec. 3.1)",
        "distribution": f"by distribution reward: level A the {profile.grading.direction} {profile.grading.keep} % of "
        "each subset (final version, Fig. 2)",
    }[grading]
    return f"""# Level-A subset, graded {how}

Made by `deftlib.training.subset` from `{profile.data.source}` (split `{profile.data.split}`), profile `{profile.name}`.
Columns: {", ".join(batches.schema_of(path).names)}; responses are best first, rewards raw, of r_train, or null.
`level_a.parquet` is the subset, `lists.parquet` every graded list, `q_diff.npz` the discrepancy distribution and counts
(Q_pos {n_pos:,} tokens, Q_neg {n_neg:,}).

{header}
{rows}

The texts and their licence are those of the source. HH-RLHF contains offensive text.

```json
{json.dumps({"grading": rule(profile, grading), "text": vars(profile.text)}, indent=1)}
```
"""

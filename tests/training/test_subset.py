"""The graded subset: both gradings worked out by hand on small lists, R_dis from stored states, what is published."""

import gzip
import json
import re

import datasets
import numpy as np
import pytest
import torch
from conftest import FakeJudge
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, CohereConfig, LlamaConfig, PhiConfig, PreTrainedTokenizerFast

from deftlib import store
from deftlib.method.distribution import distribution_reward
from deftlib.models import features, policies, rewards
from deftlib.preferences.lists import FEATURES, PreferenceError, read_lists
from deftlib.profile import Profile
from deftlib.sections import Text
from deftlib.training import counting, subset

VOCABULARY = ["<pad>", "<eos>", "<unk>", "a", "b", "c", "d", "e"]
PROMPT = "\n\nHuman: e e\n\nAssistant:"
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
POLICIES = {
    "llama": lambda: LlamaConfig(**SIZES),
    "phi, with bias": lambda: PhiConfig(**SIZES),
    "cohere, scaled": lambda: CohereConfig(**SIZES, logit_scale=0.25),
}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    return tmp_path


def words():
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def policy(tmp_path):
    """Folder of a random policy with seven words to say."""

    def make(kind="llama"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(POLICIES[kind]())
        if getattr(model.lm_head, "bias", None) is not None:
            torch.nn.init.normal_(model.lm_head.bias)  # starts at zero
        folder = tmp_path / "policy"
        model.save_pretrained(folder)
        words().save_pretrained(folder)
        return folder

    return make


def profile(start, **overrides):
    return Profile.load(
        "mini", {"policy.source": str(start), "grading": {"top": 25, "bottom": 25, "keep": 25}} | overrides
    )


def as_lists(rows):
    """Rows of (subset, responses, rewards or None) as a Dataset."""
    return Dataset.from_list(
        [
            {"id": str(i), "subset": name, "prompt": PROMPT, "responses": responses, "rewards": rewards_}
            for i, (name, responses, rewards_) in enumerate(rows)
        ],
        features=FEATURES,
    )


@pytest.fixture
def publish(monkeypatch):
    """Put lists where `subset.scored` and `subset.parts` would."""

    def make(rows, pool=None):
        def produce(folder):
            as_lists(rows).to_parquet(folder / "lists.parquet")
            as_lists(rows).to_parquet(folder / "policy.parquet")
            as_lists(pool or rows).to_parquet(folder / "pool.parquet")

        folder = store.stage(Profile.load("mini"), "given", {"rows": rows, "pool": pool}, produce, "training.subset")
        monkeypatch.setattr(subset, "scored", lambda profile, part: folder)
        monkeypatch.setattr(subset, "parts", lambda profile: folder)

    return make


def by_word(counts):
    return {word: int(count) for word, count in zip(VOCABULARY, counts) if count}


# ---- grading by reward ---------------------------------------------------------------------------------------------

SCORED = [  # in the middle, normalised:                                           graded   y_2 is
    ("s", [" a a", " b", " c"], [9.0, 8.6, 4.0]),  # (8.6 - 4) / 5 = 0.92           A        > 0.8: good
    ("s", [" a", " d", " c c"], [5.0, 3.0, 1.0]),  # 0.5                            B        neither
    ("s", [" a e", " d d", " c"], [4.0, 1.1, 1.0]),  # 0.1 / 3 = 0.03               B        < 0.1: bad
    ("s", [" b", " d", " e"], [1.0, 0.15, 0.0]),  # 0.15                            C        < 0.2: bad
]


def test_grading_by_reward_by_hand(policy, publish):
    publish(SCORED)
    graded = subset.graded(profile(policy()), "reward")
    assert graded.lists["level"][:] == ["A", "B", "B", "C"]
    assert graded.level_a["id"][:] == ["0"]
    assert by_word(graded.pos_counts) == {"a": 4, "b": 2, "e": 1}  # aa b, a, ae, b
    assert by_word(graded.neg_counts) == {"c": 4, "d": 3, "e": 1}  # c, cc, dd c, d e
    by_hand = [0, 0, 0, 4 / 7, 2 / 7, -4 / 8, -3 / 8, 1 / 7 - 1 / 8]
    assert graded.q_diff == pytest.approx(by_hand, abs=1e-15)


def test_each_subset_has_its_own_level_a(policy, publish):
    low = [("t", responses, [r - 100 for r in rewards_]) for _, responses, rewards_ in SCORED]
    publish(low + SCORED)
    graded = subset.graded(profile(policy()), "reward")
    assert graded.lists["level"][:] == ["A", "B", "B", "C"] * 2
    assert graded.level_a["subset"][:] == ["t", "s"]


def test_where_rewards_contradict_the_annotators_only_best_and_worst_count(policy, publish):
    agreeing = ("s", [" a", " b", " c"], [3.0, 2.9, 1.0])  # level B, 0.95: b is good
    publish([agreeing, ("s", [" a", " b", " c"], [2.0, 2.9, 1.0])])
    graded = subset.graded(profile(policy(), **{"grading.top": 0, "grading.bottom": 0}), "reward")
    assert by_word(graded.pos_counts) == {"a": 2, "b": 1} and by_word(graded.neg_counts) == {"c": 2}
    assert [subset.agrees(row) for row in graded.lists] == [True, False]


def test_best_first_sorts_replies_with_their_rewards_and_keeps_ties_in_order():
    row = {"id": "x", "responses": [" w", " x", " y", " z"], "rewards": [1.0, 3.0, 1.0, 2.0]}
    expected = {"id": "x", "responses": [" x", " z", " w", " y"], "rewards": [3.0, 2.0, 1.0, 1.0]}
    assert subset.best_first(row) == expected
    assert subset.agrees(subset.best_first(row)) and not subset.agrees(row)


def test_another_grading_is_refused():
    with pytest.raises(ValueError, match=r'grading must be "reward" or "distribution", found "?\'?bartscore'):
        subset.graded(Profile.load("mini"), "bartscore")


# ---- scores --------------------------------------------------------------------------------------------------------


@pytest.fixture
def scoring(monkeypatch):
    """A reward model that likes long replies; those that scored are returned."""
    judges = []

    def judge(profile, which, parts):
        judges.append(FakeJudge(spec=profile.reward_models.train))
        return judges[-1]

    monkeypatch.setattr(rewards, "judge", judge)
    return judges


@pytest.mark.parametrize(
    "rank_by, responses, rewards_",
    [
        ("annotation", [" a", " b b b", " c c"], [2, 6, 4]),
        ("reward", [" b b b", " c c", " a"], [6, 4, 2]),
    ],
)
def test_scored_lists_are_in_the_order_that_rank_by_names(publish, scoring, rank_by, responses, rewards_):
    scored = subset.scored
    publish([("s", [" a", " b b b", " c c"], None), ("s", [" d d", " e"], None)])
    row = read_lists(scored(Profile.load("mini", {"data.rank_by": rank_by})) / "lists.parquet")[0]
    assert (row["responses"], row["rewards"]) == (responses, rewards_)


def test_another_text_format_of_a_finished_reward_model_scores_again(publish, scoring):
    scored = subset.scored
    publish([("s", [" a", " b"], None)])
    for text_format in ("plain", "oasst", "plain"):
        scored(Profile.load("mini", {"reward_models.train.text_format": text_format}))
    assert [judge.spec.text_format for judge in scoring if judge.scored] == ["plain", "oasst"]


# ---- counting ------------------------------------------------------------------------------------------------------


def count(rows, sides, **text):
    return [by_word(c) for c in subset.count_lists(as_lists(rows), sides, words(), len(VOCABULARY), Text(**text))]


def test_level_a_is_by_the_highest_score_of_a_list_whoever_has_it(policy, publish):
    """Sec. 3.1: "based on the highest score within each sample"; under annotation that need not be y_1's."""
    best_second = [("s", [" a", " b"], [1.0, 9.0]), ("s", [" c", " d"], [5.0, 0.0])]
    publish([*best_second, *[("s", [" e", " a"], [0.1, 0.0])] * 2])
    graded = subset.graded(profile(policy()), "reward")
    assert graded.lists["level"][:] == ["A", "B", "B", "C"]  # by y_1 it would be the second


def test_only_response_text_is_counted():
    rows = [("s", [" a <eos> b <pad>", " c nonsense"], None)]
    assert count(rows, [[+1, -1]]) == [{"a": 1, "b": 1}, {"c": 1}]  # the prompt says e; <unk> is special here


def test_only_what_the_policy_reads_is_counted():
    assert count([("s", [" a b c d", " e d c"], None)], [[+1, -1]], reply_tokens=2) == [
        {"a": 1, "b": 1},
        {"d": 1, "e": 1},
    ]


def test_counting_reads_lists_and_sides_as_it_goes(monkeypatch):
    monkeypatch.setattr(counting, "LISTS_AT_ONCE", 2)
    read = []

    def responses():
        for i in range(5):
            read.append(i)
            yield [" a", " b"]

    def sides():
        for i in range(5):
            assert len(read) == i + 1
            yield [+1, -1]

    counts = subset.count_lists({"responses": responses()}, sides(), words(), len(VOCABULARY), Text())
    assert [by_word(c) for c in counts] == [{"a": 5}, {"b": 5}]


# ---- grading by distribution reward --------------------------------------------------------------------------------

PAIRS = [
    ("s", [" a b", " c"], None),
    ("s", [" b a e", " d d", " c"], None),
    ("s", [" d", " c c a"], None),
    ("s", [" e e e", " b"], None),
    ("t", [" a", " d"], None),
    ("t", [" c c", " d e"], None),
]


def from_logits(start, rows, q_diff):
    """R_dis as printed, Eqs. 16-17, from full logits, one response at a time."""
    model, tokenizer = policies.load_policy(start), policies.load_tokenizer(start)
    prompt, values = tokenizer(PROMPT)["input_ids"], []
    for _, responses, _ in rows:
        replies = [tokenizer(reply)["input_ids"] for reply in responses]
        for reply in replies:
            labels = torch.tensor([[-100] * len(prompt) + reply])
            with torch.no_grad():
                logits = model(torch.tensor([prompt + reply])).logits.double()
            values.append(distribution_reward(logits, labels, q_diff).item())
    return values


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize(
    "token_budget, states, tolerance",
    [(1, "float32", 1e-5), (10_000, "float32", 1e-5), (10_000, "float16", 1e-3), (10_000, "projected", 1e-5)],
)
def test_r_dis_from_stored_states_is_that_of_full_logits(policy, publish, kind, token_budget, states, tolerance):
    publish(PAIRS)
    start, q_diff = policy(kind), np.random.default_rng(0).normal(size=len(VOCABULARY))
    q_diff -= q_diff.mean()
    overrides = {"reward_models.score_token_budget": token_budget, "scale.states": states}
    changed = profile(start, **overrides)
    stored = features.distribution_rewards(changed, subset.parts(changed) / "policy.parquet", q_diff)
    assert [len(values) for values in stored] == [2, 3, 2, 2, 2, 2]
    expected = from_logits(start, PAIRS, q_diff)
    assert np.concatenate(stored) == pytest.approx(expected, abs=tolerance)
    assert np.std(expected) > 1e-2


@pytest.mark.parametrize("direction, pick", [("lowest", np.argmin), ("highest", np.argmax)])
def test_grading_by_distribution_by_hand(policy, publish, direction, pick):
    publish(PAIRS, pool=[*PAIRS, ("t", [" a a a a", " d"], None)])  # counted, but not trained on
    start = policy()
    graded = subset.graded(profile(start, **{"grading.direction": direction}), "distribution")
    assert by_word(graded.pos_counts) == {"a": 7, "b": 2, "c": 2, "d": 1, "e": 4}  # y_1 of every list
    assert by_word(graded.neg_counts) == {"a": 1, "b": 1, "c": 4, "d": 3, "e": 1}  # y_l; y_2 of three nowhere
    assert graded.q_diff[3] == pytest.approx(7 / 16 - 1 / 10)
    ends = np.cumsum([0] + [len(responses) for _, responses, _ in PAIRS])[:-1]
    best = np.array(from_logits(start, PAIRS, graded.q_diff))[ends]
    assert graded.lists["distribution_reward"][:] == pytest.approx(best, abs=1e-5)
    kept = {int(pick(best[:4])), 4 + int(pick(best[4:]))}
    assert graded.lists["level"][:] == ["A" if i in kept else "rest" for i in range(6)]  # 25 % of 4 and of 2: one each
    of_pool = subset.graded(profile(start, **{"grading.direction": direction}), "distribution", "pool").lists
    assert len(of_pool) == 7 and of_pool["distribution_reward"][:6] == graded.lists["distribution_reward"][:]


# ---- what is published ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grading, rows", [("reward", SCORED * 2), ("distribution", PAIRS)])
def test_the_published_folder_is_a_data_set_with_its_card(policy, publish, grading, rows):
    publish(rows)
    graded = subset.graded(profile(policy()), grading)
    files = {path.name for path in graded.folder.iterdir()}
    assert files == {"level_a.parquet", "lists.parquet", "q_diff.npz", "README.md", "manifest.json"}
    level_a, lists = (read_lists(graded.folder / f"{name}.parquet") for name in ("level_a", "lists"))
    assert lists.num_rows == len(rows) and level_a.num_rows == sum(level == "A" for level in lists["level"])
    assert set(level_a["level"]) == {"A"}
    card = (graded.folder / "README.md").read_text()
    assert f"Columns: {', '.join(lists.column_names)};" in card
    assert f"Q_pos {graded.pos_counts.sum()} tokens, Q_neg {graded.neg_counts.sum()}" in card
    header, *table = re.findall(r"^\| .*", card, re.MULTILINE)
    column = header.split("|")[1:-1].index(" A ")
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table]
    assert sum(int(cell) for row in cells for cell in row[1:]) == len(rows)
    assert sum(int(row[column]) for row in cells) == level_a.num_rows


def test_a_graded_subset_is_read_back_as_it_was_made(policy, publish):
    publish(SCORED)
    made = subset.graded(profile(policy()), "reward")
    again = subset.read_graded(made.folder)
    assert again.lists.to_list() == made.lists.to_list() and np.array_equal(again.q_diff, made.q_diff)


def test_q_diff_is_loaded_for_its_own_tokenizer_only(policy, publish):
    publish(SCORED)
    graded = subset.graded(profile(policy()), "reward")
    path = graded.folder / "q_diff.npz"
    assert np.array_equal(subset.load_q_diff(path, words()), graded.q_diff)
    with pytest.raises(ValueError) as error:
        subset.load_q_diff(path, policies.mini_tokenizer())
    assert re.fullmatch(
        rf"{path} was counted with another tokenizer \(fingerprint \w+, this one has \w+\): count again",
        str(error.value),
    )


# ---- parts of a source ---------------------------------------------------------------------------------------------

HALVES = {"policy": 0.5, "dev": 0.5, "reward_train": 0.0, "reward_eval": 0.0}


def rows(count, word="train"):
    return [{"prompt": f"Question {word} {i}?", "responses": [f"yes {i}", f"no {i}"]} for i in range(count)]


def write(path, content):
    text = "".join(json.dumps(row) + "\n" for row in content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def parts(source, shares=HALVES, **data):
    return subset.parts(
        Profile.load("mini", {"data": {"source": str(source), "shares": shares, "train_share": 1.0, **data}})
    )


def sizes(folder):
    return {path.stem: read_lists(path).num_rows for path in folder.glob("*.parquet")}


def test_a_folder_is_parted_and_its_test_file_is_the_test_part(tmp_path):
    bad = {"prompt": "Question?", "responses": ["only one"]}
    write(tmp_path / "own" / "train.jsonl.gz", [*rows(40), bad])
    write(tmp_path / "own" / "test.jsonl", rows(7, "test"))
    folder = parts(tmp_path / "own", train_lists=5)
    found = sizes(folder)
    assert found["policy"] == 5 and found["pool"] + found["dev"] == 40 and found["test"] == 7
    assert json.loads((folder / "rejects.jsonl").read_text())["reason"] == "list of one"


def test_one_file_with_a_test_share_is_parted_without_overlap(tmp_path):
    source = write(tmp_path / "own.jsonl", rows(60))
    folder = parts(source, {**HALVES, "policy": 0.25, "test": 0.25})
    ids = [set(read_lists(folder / f"{name}.parquet")["id"]) for name in ("policy", "dev", "test")]
    assert all(ids) and len(set.union(*ids)) == sum(map(len, ids)) == 60


def test_a_share_is_trained_on_and_the_pool_stays_whole(tmp_path):
    source, shares = write(tmp_path / "own.jsonl", rows(60)), {**HALVES, "policy": 0.25, "test": 0.25}
    whole, half = (parts(source, shares, train_share=share) for share in (1.0, 0.5))
    assert sizes(half) == sizes(whole) | {"policy": round(sizes(whole)["policy"] / 2)}
    assert set(read_lists(half / "policy.parquet")["id"]) < set(read_lists(half / "pool.parquet")["id"])


def test_a_changed_file_is_another_result(tmp_path):
    write(tmp_path / "own" / "test.jsonl", rows(7, "test"))
    write(tmp_path / "own" / "train.jsonl", rows(40))
    before = parts(tmp_path / "own")
    assert parts(tmp_path / "own") == before
    write(tmp_path / "own" / "test.jsonl", rows(8, "test"))
    assert parts(tmp_path / "own") != before


def truncated(folder):
    path = write(folder / "train.jsonl.gz", rows(400))
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    "fill, message",
    [
        (lambda folder: None, "no such file or folder"),
        (lambda folder: folder.mkdir(), "expected train.jsonl.gz, or HH-RLHF's folders .*, found nothing"),
        (truncated, "train.jsonl.gz: the gzip file is truncated after line"),
        (lambda folder: write(folder / "train.jsonl", []), "train.jsonl: the file is empty"),
        (
            lambda folder: write(folder / "train.jsonl", [{"question": "x"}]),
            "none of 1 rows has the keys of a known format",
        ),
    ],
)
def test_a_source_that_cannot_be_used_is_one_sentence_naming_the_file(tmp_path, fill, message):
    source = tmp_path / "own"
    fill(source)
    if source.exists() and any(source.iterdir()):
        write(source / "test.jsonl", rows(3, "test"))
    with pytest.raises(PreferenceError, match=message) as error:
        parts(source)
    assert str(source) in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "build").rglob("manifest.json"))


@pytest.mark.parametrize(
    "data, message",
    [
        ({"shares": HALVES}, "own.jsonl: the test part would be the very lists trained on; give test a share"),
        ({"shares": {**HALVES, "policy": 0.0, "test": 0.5}}, "data.shares lacks policy"),
        ({"shares": {**HALVES, "dev": 0.499, "test": 0.001}}, "own.jsonl: no list fell to part 'test'"),
        (
            {"shares": {**HALVES, "dev": 0.25, "test": 0.25}, "train_lists": 60},
            r"60 lists asked of the part 'policy', which has",
        ),
        (
            {"shares": {**HALVES, "dev": 0.25, "test": 0.25}, "train_share": 0.0},
            "data.train_share is above 0 and at most 1",
        ),
        ({"shares": {**HALVES, "dev": 0.25, "test": 0.25}, "train_share": 1.1}, "found 1.1"),
        ({"shares": {**HALVES, "dev": 0.25, "test": 0.5}}, "shares must be at least 0 and sum to 1"),
    ],
)
def test_shares_that_cannot_be_are_refused_with_the_reason(tmp_path, data, message):
    source = write(tmp_path / "own.jsonl", rows(60))
    with pytest.raises(PreferenceError, match=message):
        parts(source, **data)


# ---- what the parts depend on --------------------------------------------------------------------------------------


def test_how_lists_will_be_ranked_and_how_many_rejects_were_allowed_deal_no_other_parts(tmp_path):
    source = write(tmp_path / "own.jsonl", rows(60))
    shares = {**HALVES, "policy": 0.25, "test": 0.25}
    before = parts(source, shares)
    assert parts(source, shares, rank_by="reward", max_reject_share=0.2) == before
    assert parts(source, shares, train_lists=3) != before


def test_parts_dealt_under_a_larger_share_of_rejects_are_refused_under_a_smaller_one(tmp_path):
    bad = {"prompt": "Question?", "responses": ["only one"]}
    source = write(tmp_path / "own.jsonl", [*rows(60), *[bad] * 5])
    shares = {**HALVES, "policy": 0.25, "test": 0.25}
    folder = parts(source, shares, max_reject_share=0.1)
    with pytest.raises(PreferenceError, match=r"own.jsonl: 5 of 65 lists were rejected .* more than the share of 0.05"):
        parts(source, shares, max_reject_share=0.05)
    assert parts(source, shares, max_reject_share=0.1) == folder  # what stood still stands


def test_reward_models_are_not_trained_again_for_another_order_or_other_test_lists(tmp_path, monkeypatch):
    source = write(tmp_path / "own.jsonl", rows(400))
    shares = {"policy": 0.2, "reward_train": 0.2, "reward_eval": 0.2, "dev": 0.2, "test": 0.2}
    own = {"source": str(source), "shares": shares}
    trained = []
    monkeypatch.setattr(rewards.reward_heads, "fit_on_features", lambda *_, label: trained.append(label))
    for more in ({}, {"rank_by": "reward"}, {"max_reject_share": 0.2}, {"test_lists": 20}, {"train_lists": 20}):
        changed = Profile.load("mini", {"data": {**own, **more}})
        folder = subset.parts(changed)
        for which in ("train", "evaluate"):
            rewards.judge(changed, which, folder)
    assert trained == ["r_train", "r_eval"]
    fewer = Profile.load("mini", {"data": {**own, "reward_lists": 20}})
    rewards.judge(fewer, "train", subset.parts(fewer))
    assert trained == ["r_train", "r_eval", "r_train"]


def test_another_revision_of_a_data_set_on_the_hub_is_another_result(monkeypatch, hub):
    dialogues = [f"\n\nHuman: Question {i}?\n\nAssistant: " for i in range(40)]
    table = Dataset.from_list([{"chosen": text + "yes", "rejected": text + "no"} for text in dialogues])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: table)
    shares = {**HALVES, "policy": 0.25, "test": 0.25}
    hub["someone/prefs"] = 40 * "a"
    before = parts("someone/prefs", shares)
    assert parts("someone/prefs", shares) == before
    assert f"someone/prefs@{40 * 'a'}/prefs/train" in (before / store.MANIFEST).read_text()
    hub["someone/prefs"] = 40 * "b"
    assert parts("someone/prefs", shares) != before


@pytest.mark.parametrize(
    "grading, other", [("reward", {"grading.keep": 50.0}), ("distribution", {"grading.top": 50.0})]
)
def test_a_grading_does_not_depend_on_the_settings_of_the_other(policy, publish, grading, other):
    publish(SCORED)
    folder = policy()
    assert subset.graded(profile(folder), grading).folder == subset.graded(profile(folder, **other), grading).folder

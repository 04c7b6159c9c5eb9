"""Everything that is read from outside, fed with nonsense: only documented errors come out. `make fuzz`: 10^5 each.

| reader | nonsense | what may come out |
|---|---|---|
| files of lists | bytes, JSON of any shape, rows with the right keys and wrong values, trees | lists, PreferenceError |
| dialogues, replies, judgments | any text, with the markup of templates and tags in it | text, ValueError |
| chat completions | objects of any shape | text, NoText, ValueError |
| profiles | keys and values of any kind | a Profile, ProfileError |
| manifests, kept answers | bytes | entries, StoreError |
| rating sheets, questions | bytes, rows | ratings, RatingError; a Bench, MTBenchError |
"""

import json
import os
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deftlib import store
from deftlib.evaluation import human_eval, mini_bench, mt_bench, questions
from deftlib.models import chat, said
from deftlib.preferences import dialogues, lists
from deftlib.preferences.formats import CHOSEN, PROMPTS, REJECTED, RESPONSES, SCORED, TWO
from deftlib.profile import Profile
from deftlib.typed import ProfileError

N = int(os.environ.get("DEFT_FUZZ", "250"))
fuzz = settings(
    max_examples=N, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

MARKUP = [
    "\n\nHuman:",
    "\n\nAssistant:",
    "\nHuman:",
    "Assistant:",
    "USER:",
    "### Human:",
    "<|im_start|>user\n",
    "[INST]",
]
MARKUP += [
    "<|im_end|>",
    "<think>",
    "</think>",
    "[[5]]",
    "[[A]]",
    "<|prompter|>",
    "\r\n",
    "</s>",
    "\u2028",
    "\ud800",
    "\0",
]
TEXT = st.lists(st.one_of(st.sampled_from(MARKUP), st.text(max_size=12)), max_size=8).map("".join)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "text"]), SCALAR | st.just("user"), max_size=3
)
VALUE = st.recursive(
    SCALAR | MESSAGE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
KEYS = [
    *PROMPTS,
    *CHOSEN,
    *REJECTED,
    *RESPONSES,
    "rewards",
    "id",
    "subset",
    "system",
    "prefix",
    "suffix",
    "reward",
    "meta",
]
KEYS += [
    "message_tree_id",
    "role",
    "text",
    "replies",
    "rank",
    *[name for names in (*SCORED, *(columns for columns, _, _ in TWO)) for name in names],
]
ROW = st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=6)
TREE = st.recursive(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["prompter", "assistant", "x"]), "text": TEXT, "replies": st.just([])}
    ),
    lambda inner: st.fixed_dictionaries(
        {"role": st.sampled_from(["prompter", "assistant"]), "text": TEXT, "replies": st.lists(inner, max_size=3)},
        optional={"rank": SCALAR, "deleted": st.booleans(), "message_id": SCALAR},
    ),
    max_leaves=6,
)


def reads(path, **options):
    try:
        found = lists.read(path, max_reject_share=1.0, **options)
    except lists.PreferenceError as error:
        assert "\n" not in str(error)
        return
    for row in found:
        assert row["prompt"] and len(set(row["responses"])) == len(row["responses"]) > 1


# ---- lists -----------------------------------------------------------------------------------------------------------


@fuzz
@given(st.binary(max_size=300), st.sampled_from(["p.jsonl", "p.csv", "p.json", "p.jsonl.gz", "p.parquet", "p.tsv"]))
def test_bytes_as_a_file(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    reads(tmp_path / name)


@fuzz
@given(st.lists(VALUE | ROW, max_size=5), st.booleans())
def test_any_json_as_rows(tmp_path, rows, as_array):
    text = json.dumps(rows) if as_array else "\n".join(map(json.dumps, rows))
    (tmp_path / "p.json").write_text(text)
    reads(tmp_path / "p.json")


@fuzz
@given(ROW, st.sampled_from(["lists", "pairs", "hh-rlhf", "two", "d3", "oasst"]))
def test_a_row_of_the_wrong_kind_in_every_format(tmp_path, row, format):
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    reads(tmp_path / "p.jsonl", format=format)


@fuzz
@given(TREE)
def test_trees(tmp_path, tree):
    (tmp_path / "p.jsonl").write_text(json.dumps({"message_tree_id": "x", "prompt": tree}))
    reads(tmp_path / "p.jsonl")


@fuzz
@given(st.lists(st.lists(TEXT, max_size=4), max_size=4), st.sampled_from(",;\t"))
def test_tables(tmp_path, rows, delimiter):
    lines = [["prompt", "chosen", "rejected"], *rows]
    text = "\n".join(delimiter.join(cells) for cells in lines)
    (tmp_path / "p.csv").write_text(text, encoding="utf-8", errors="replace")
    reads(tmp_path / "p.csv")


# ---- what was said ---------------------------------------------------------------------------------------------------


@fuzz
@given(TEXT)
def test_dialogues(text):
    found = dialogues.turns(text)
    assert dialogues.turns(dialogues.text(found)) == found or not found
    assert isinstance(dialogues.canonical(text), str)
    *before, _ = dialogues.messages(text) or [None]  # the last human may say nothing
    assert all(message["content"].strip() for message in before)


@fuzz
@given(VALUE)
def test_messages(value):
    try:
        dialogues.from_messages(value if isinstance(value, list) else [value])
    except ValueError as error:
        assert str(error)


@fuzz
@given(TEXT)
def test_replies_and_judgments(text):
    reply = said.reply_in(text)
    assert said.reply_in(reply) == reply
    assert said.first_turn(said.first_turn(text)) == said.first_turn(text)
    for parse in (mt_bench.parse_rating, mt_bench.parse_verdict):
        try:
            parse(text)
        except ValueError as error:
            assert str(error)


@fuzz
@given(st.dictionaries(st.sampled_from(["content", "reasoning", "refusal", "tool_calls"]), VALUE), VALUE, VALUE)
def test_completions(message, finish, error):
    choice = SimpleNamespace(message=SimpleNamespace(**message), finish_reason=finish)
    for choices in ([choice], [], None, [None], finish):
        try:
            chat.text_of(SimpleNamespace(choices=choices, error=error))
        except ValueError as fault:
            assert str(fault)


# ---- settings and files ----------------------------------------------------------------------------------------------


@fuzz
@given(st.dictionaries(st.sampled_from([*Profile.load("mini").settings(), "x", "a.b", "training"]), VALUE, max_size=3))
def test_profiles(changes):
    try:
        profile = Profile.load("mini", changes)
    except ProfileError:
        return
    assert len(profile.label) < 120 and str(profile)


@fuzz
@given(st.binary(max_size=200))
def test_manifests_and_kept_answers(tmp_path, content):
    (tmp_path / store.MANIFEST).write_bytes(content)
    with pytest.raises(store.StoreError):
        store.read_manifest(tmp_path)
    (tmp_path / "kept.jsonl").write_bytes(content)
    kept = store.Kept(tmp_path / "kept.jsonl")
    kept.add("question", {"text": "answer"})
    assert store.Kept(tmp_path / "kept.jsonl")["question"]["text"] == "answer"


@fuzz
@given(st.binary(max_size=80), st.lists(st.tuples(SCALAR, SCALAR, SCALAR), max_size=4))
def test_rating_sheets(tmp_path, content, rows):
    import pandas as pd

    key = pd.DataFrame({"pair": ["p1", "p2"]})
    text = "pair,harmless,helpful\n" + "\n".join(",".join(map(str, row)) for row in rows)
    for each in (content, text.encode("utf-8", "replace")):
        (tmp_path / "Ada.csv").write_bytes(each)
        try:
            human_eval.read_ratings(tmp_path / "Ada.csv", key)
        except human_eval.RatingError as error:
            assert "Ada.csv" in str(error)


@fuzz
@given(st.lists(VALUE | st.fixed_dictionaries({"question_id": SCALAR, "category": TEXT, "turns": VALUE}), max_size=4))
def test_questions(tmp_path, rows):
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "judge_prompts.jsonl").write_text((mini_bench.FOLDER / "judge_prompts.jsonl").read_text())
    try:
        bench = questions.read_bench(tmp_path, None, 80)
    except questions.MTBenchError as error:
        assert str(tmp_path) in str(error)
        return
    assert all(len(question["turns"]) == 2 for question in bench.questions)

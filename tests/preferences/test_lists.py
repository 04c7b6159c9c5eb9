"""Ranked lists: each source, each fault with its reason, the known facts of the real files, splits without leaks."""

import gzip
import json
import os
import re
from bisect import bisect_left
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deftlib.preferences import batches, sources
from deftlib.preferences import lists as ranked_lists
from deftlib.preferences.lists import (
    PreferenceError,
    as_prompt,
    first_human_turn,
    pro_cleaning,
    read,
    sample,
    split,
    split_of,
)

DATA = Path(os.environ.get("DEFT_DATA", "/nowhere"))
needs_data = pytest.mark.skipif(not (DATA / "hh-rlhf").is_dir(), reason="DEFT_DATA names no folder with the real files")
HALVES = {"train": 0.5, "test": 0.5}


def write(path, *rows):
    """A JSON lines file, gzipped if its name says so; a row that is text is written as it is."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def hh(question="Hi", chosen="Hello.", rejected="Go away.", other_question=None):
    return {
        "chosen": f"\n\nHuman: {question}\n\nAssistant: {chosen}",
        "rejected": f"\n\nHuman: {other_question or question}\n\nAssistant: {rejected}",
    }


def faults(tmp_path, *rows, **options):
    """Reasons in file order, from a read that allows any share of rejects beside one good row."""
    path = write(tmp_path / "prefs.jsonl", {"prompt": "good", "responses": ["yes", "no"]}, *rows)
    rejects = tmp_path / "rejects.jsonl"
    assert len(read(path, rejects_path=rejects, max_reject_share=1.0, **options)) == 1
    return [json.loads(line)["reason"] for line in rejects.read_text().splitlines()]


# --- Sources ---------------------------------------------------------------------------------------------------------


def test_hh_rlhf_is_parted_at_the_last_assistant(tmp_path):
    two_turns = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant: Gladly.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant: No.",
    }
    write(tmp_path / "helpful-base" / "test.jsonl.gz", hh(), two_turns)
    lists = read(tmp_path, split="test")
    assert lists.features == ranked_lists.FEATURES
    assert lists[1] == {
        "id": "helpful-base/test/2",
        "subset": "helpful-base",
        "prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant:",
        "responses": [" Gladly.", " No."],
        "rewards": None,
    }


def test_a_folder_of_subsets_one_subset_and_one_file_read_the_same_rows(tmp_path, capsys):
    for subset in ("helpful-online", "harmless-base"):
        write(tmp_path / subset / "train.jsonl.gz", hh())
    assert read(tmp_path)["subset"][:] == ["harmless-base", "helpful-online"]
    assert "(harmless-base 1, helpful-online 1)" in capsys.readouterr().out
    folder, file = tmp_path / "harmless-base", tmp_path / "harmless-base" / "train.jsonl.gz"
    assert read(folder).to_list() == read(file).to_list() == read(tmp_path).to_list()[:1]


def test_the_hub_passes_the_same_checks_at_one_revision(monkeypatch, tmp_path, capsys, hub):
    asked, hub["Anthropic/hh-rlhf"] = [], 40 * "a"

    def load_dataset(name, data_dir, split, revision):
        asked.append((name, data_dir, split, revision))
        return datasets.Dataset.from_list([hh(), hh(), hh(chosen="")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    lists = read("Anthropic/hh-rlhf", split="test", max_reject_share=0.5, rejects_path=tmp_path / "rejects.jsonl")
    assert asked == [("Anthropic/hh-rlhf", subset, "test", 40 * "a") for subset in sources.SUBSETS]
    assert (len(lists), lists[0]["id"]) == (8, "harmless-base/test/1")
    assert "rejected 4: 4 empty reply" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "rejects.jsonl").read_text().splitlines()[0])["file"]
        == f"Anthropic/hh-rlhf@{40 * 'a'}/harmless-base/test"
    )


def test_the_hub_out_of_reach_is_one_sentence(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach 'Anthropic/hh-rlhf'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        PreferenceError, match=r"Anthropic/hh-rlhf.*Couldn't reach.*download it and name its folder"
    ) as error:
        read("Anthropic/hh-rlhf")
    assert "\n" not in str(error.value)


def d3(**changes):
    prefix = ["<|prompter|>Hi", "<|assistant|>Yes?", "<|prompter|>Tea?", "<|assistant|>"]
    return {
        "prefix": [prefix] * 3,
        "suffix": ["Fair.", "Best.", "Worst."],
        "reward": [0.5, 2, -1.5],
        "sft_index": 0,
        "meta": {"path": "../../data/raw_data/hhrlhf/helpful-rejection/train.jsonl"},
        **changes,
    }


def test_pros_d3_becomes_our_format_best_reward_first(tmp_path):
    row = read(write(tmp_path / "hh_train_len3" / "train.json", d3()))[0]
    assert row == {
        "id": "hh_train_len3/train/1",
        "subset": "helpful-rejection-sampled",
        "prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant:",
        "responses": [" Best.", " Fair.", " Worst."],
        "rewards": [2.0, 0.5, -1.5],
    }
    assert read(write(tmp_path / "prefs.jsonl", d3(meta=None)))[0]["subset"] == "prefs"


def test_faults_of_d3(tmp_path):
    other = [["<|prompter|>Hi", "<|assistant|>"], ["<|prompter|>Ho", "<|assistant|>"]]
    path = write(
        tmp_path / "d3.jsonl",
        d3(),
        d3(reward=[1, 2]),
        d3(suffix=["a", "b"]),
        d3(prefix="Hi"),
        d3(prefix=[1, 2, 3]),
        d3(prefix=other, suffix=["a", "b"], reward=[1, 2]),
        {"prefix": [], "suffix": []},
    )
    read(path, max_reject_share=1.0, rejects_path=tmp_path / "rejects.jsonl")
    assert [json.loads(line)["reason"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()] == [
        "different number of rewards and responses",
        "different number of prefixes and replies",
        "wrong type",
        "wrong type",
        "differing prompts",
        "missing key",
    ]


def message(role, text, *replies, rank=None, **more):
    return {"message_id": text.lower(), "role": role, "text": text, "rank": rank, "replies": list(replies), **more}


def test_oasst_ranked_replies_at_every_depth(tmp_path, capsys):
    tea = message(
        "prompter",
        "Tea?",
        message("assistant", "No.", rank=2),
        message("assistant", "Gladly.", rank=0),
        message("assistant", "Well.", rank=1),
        message("assistant", "Spam.", rank=3, deleted=True),
    )
    tree = message("prompter", "Hi", message("assistant", "Yes?", tea, rank=1), message("assistant", "Hello.", rank=0))
    half = message("prompter", "Half", message("assistant", "A", rank=0), message("assistant", "B"))
    unranked = message("prompter", "None", message("assistant", "A"), message("assistant", "B"))
    path = write(
        tmp_path / "trees.jsonl", *({"message_tree_id": t["text"], "prompt": t} for t in (tree, half, unranked))
    )
    lists = read(path, max_reject_share=0.5)
    assert lists["id"][:] == ["hi", "tea?"]
    assert lists["responses"][:] == [[" Hello.", " Yes?"], [" Gladly.", " Well.", " No."]]
    assert lists[1]["prompt"] == "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant:"
    assert set(lists["subset"][:]) == {"oasst"}
    assert capsys.readouterr().out == (
        f"read 2 lists from {path}; rejected 1: 1 partly ranked replies (rejects: not written, no rejects_path given); "
        "deleted messages left out: 1; messages with unranked replies: 1\n"
    )


def test_pairs_take_replies_or_whole_dialogues_and_plain_prompts_are_wrapped(tmp_path):
    alone = {"prompt": " Hi ", "chosen": "Hello.", "rejected": " Go away."}
    whole = {"prompt": "Hi", **hh(), "id": "mine", "subset": "s"}
    lists = read(write(tmp_path / "prefs.jsonl", alone, whole))
    assert lists["prompt"][:] == ["\n\nHuman: Hi\n\nAssistant:"] * 2
    assert lists["responses"][:] == [[" Hello.", " Go away."]] * 2
    assert (lists["id"][:], lists["subset"][:]) == (["prefs/1", "mine"], ["prefs", "s"])


def test_lists_are_sorted_by_their_rewards_and_ties_keep_the_file_order(tmp_path):
    lists = read(
        write(
            tmp_path / "prefs.jsonl",
            {"prompt": "Hi", "responses": ["a", "b", "c", "d"], "rewards": [0, 3, 0, 7.5]},
            {"prompt": "Ho", "responses": ["z", "a"], "rewards": None},
        )
    )
    assert lists["responses"][:] == [[" d", " b", " a", " c"], [" z", " a"]]
    assert lists["rewards"][:] == [[7.5, 3.0, 0.0, 0.0], None]


@pytest.mark.parametrize(
    "text, prompt",
    [
        ("Hi", "\n\nHuman: Hi\n\nAssistant:"),
        ("Human: Hi", "\n\nHuman: Hi\n\nAssistant:"),
        ("\n\nHuman: Hi\n\nAssistant: ", "\n\nHuman: Hi\n\nAssistant:"),
        (
            "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?",
            "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant:",
        ),
    ],
)
def test_a_prompt_has_one_format(text, prompt):
    assert as_prompt(text) == as_prompt(prompt) == prompt


def test_mini_is_read_by_name():
    if not (sources.MINI / "train.jsonl").exists():
        pytest.skip("data/mini is not written yet")
    for name in ("train", "test"):
        lists = read("mini", split=name, max_reject_share=0.0)
        assert set(lists["subset"][:]) == set(sources.SUBSETS)
        assert {len(responses) for responses in lists["responses"][:]} == {3}


# --- Faults of rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, reason",
    [
        ('{"prompt": "Hi", ', "invalid JSON"),
        ('["Hi"]', "wrong type"),
        ("null", "wrong type"),
        ({"prompt": "Hi"}, "missing key"),
        ({"responses": ["a", "b"]}, "missing key"),
        ({"prompt": 1, "responses": ["a", "b"]}, "wrong type"),
        ({"prompt": "Hi", "responses": "ab"}, "wrong type"),
        ({"prompt": "Hi", "responses": ["a", None]}, "wrong type"),
        ({"prompt": "Hi", "responses": ["a", "b"], "id": [7]}, "wrong type"),
        ({"prompt": "Hi", "responses": ["a", "b"], "rewards": 1}, "wrong type"),
        ({"prompt": " ", "responses": ["a", "b"]}, "empty prompt"),
        ({"prompt": "Hi", "responses": ["a", " \n"]}, "empty reply"),
        ({"prompt": "Hi", "responses": ["a"]}, "list of one"),
        ({"prompt": "Hi", "responses": []}, "empty list"),
        ({"prompt": "Hi", "responses": ["a", "b", " a"]}, "identical replies"),
        ({"prompt": "Hi", "responses": ["a", "b"], "rewards": [1]}, "different number of rewards and responses"),
        ('{"prompt": "Hi", "responses": ["a", "b"], "rewards": [1, NaN]}', "reward not a finite number"),
        ('{"prompt": "Hi", "responses": ["a", "b"], "rewards": [1, -1e999]}', "reward not a finite number"),
        ('{"prompt": "Hi", "responses": ["a", "b"], "rewards": [1, 1%s]}' % ("0" * 400), "reward not a finite number"),
        ({"prompt": "Hi", "responses": ["a", "b"], "rewards": [1, "2"]}, "reward not a finite number"),
        ({"prompt": "Hi", "responses": ["a", "b"], "rewards": [1, True]}, "reward not a finite number"),
        ({"prompt": "Hi", "responses": ["a", "b"], "id": "prefs/1"}, "duplicate id"),
        ({"prompt": "Hi", "responses": ["a\ud800", "b"]}, "invalid Unicode"),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant: Well,", "responses": ["a", "b"]}, "prompt ends in an Assistant turn"),
        ({"prompt": "Hi", "responses": ["\n\nHuman: Ho\n\nAssistant: a", "b"]}, "differing prompts"),
        ({"prompt": "Hi", "responses": ["\n\nHuman: Hi", "b"]}, 'no "\\n\\nAssistant:" in dialogue'),
    ],
)
def test_a_faulty_row_is_rejected_with_its_reason(tmp_path, row, reason):
    assert faults(tmp_path, row) == [reason]


@pytest.mark.parametrize(
    "row, reason",
    [
        (hh(chosen=""), "empty reply"),
        (hh(chosen="Same.", rejected="Same."), "identical replies"),
        (hh(other_question="Ho"), "differing prompts"),
        ({"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"}, 'no "\\n\\nAssistant:" in dialogue'),
        ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "empty prompt"),
        ({"chosen": hh()["chosen"]}, "missing key"),
        ({**hh(), "chosen": None}, "wrong type"),
    ],
)
def test_a_faulty_hh_row_is_rejected_with_its_reason(tmp_path, row, reason):
    path, rejects = write(tmp_path / "prefs.jsonl", hh(), row), tmp_path / "rejects.jsonl"
    assert len(read(path, max_reject_share=0.5, rejects_path=rejects)) == 1
    assert [json.loads(line)["reason"] for line in rejects.read_text().splitlines()] == [reason]


def test_invalid_utf8_is_a_rejected_row(tmp_path):
    path = write(tmp_path / "prefs.jsonl", hh())
    path.write_bytes(path.read_bytes() + b'{"chosen": "\xff"}\n')
    read(path, max_reject_share=0.5, rejects_path=tmp_path / "rejects.jsonl")
    assert "invalid UTF-8" in (tmp_path / "rejects.jsonl").read_text()


def test_rejects_name_file_line_reason_and_shape_but_never_the_text(tmp_path):
    path = write(tmp_path / "prefs.jsonl", hh(), hh(question="secret", chosen=""))
    read(path, max_reject_share=0.5, rejects_path=tmp_path / "new" / "rejects.jsonl")
    assert json.loads((tmp_path / "new" / "rejects.jsonl").read_text()) == {
        "file": str(path),
        "line": 2,
        "reason": "empty reply",
        "found": "prompt str(27), responses list[str(1), str(9)]",
    }


def test_one_line_counts_the_rejects_by_reason(tmp_path, capsys):
    path, rejects = (
        write(tmp_path / "prefs.jsonl", *[hh()] * 7, hh(chosen=""), hh(rejected=""), hh(other_question="Ho")),
        tmp_path / "r",
    )
    read(path, max_reject_share=0.3, rejects_path=rejects)
    assert (
        capsys.readouterr().out
        == f"read 7 lists from {path}; rejected 3: 2 empty reply, 1 differing prompts (rejects: {rejects.name})\n"
    )


def test_above_the_stated_share_reading_stops_after_writing_the_rejects(tmp_path):
    path, rejects = write(tmp_path / "prefs.jsonl", *[hh()] * 19, hh(chosen="")), tmp_path / "rejects.jsonl"
    assert len(read(path)) == 19  # 1 of 20 is 5 %, not above it
    with pytest.raises(
        PreferenceError, match=r"prefs.jsonl: 1 of 20 lists rejected \(1 empty reply\), more than the share of 0.04 "
    ):
        read(path, max_reject_share=0.04, rejects_path=rejects)
    assert len(rejects.read_text().splitlines()) == 1
    assert len(read(write(tmp_path / "good.jsonl", hh()), rejects_path=rejects)) == 1
    assert rejects.read_text() == ""  # none this time, and none left over


def test_legal_oddities_equal_rewards_long_replies_blank_lines_byte_order_mark(tmp_path, capsys):
    path = write(
        tmp_path / "prefs.jsonl", {"prompt": "Hi", "responses": ["a" * 10**6, "b"], "rewards": [1, 1]}, "", "  "
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(path)[0]["responses"][0]) == 10**6 + 1
    assert capsys.readouterr().out.endswith("rejected 0; blank lines: 2\n")


def test_more_lists_than_one_batch_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "LISTS_AT_ONCE", 3)
    lists = read(write(tmp_path / "prefs.jsonl", *({"prompt": f"{i}", "responses": ["a", "b"]} for i in range(8))))
    assert [first_human_turn(prompt) for prompt in lists["prompt"]] == list("01234567")


# --- Faults of files -------------------------------------------------------------------------------------------------


def test_a_truncated_gzip_names_the_file_and_the_line(tmp_path):
    path = write(tmp_path / "prefs.jsonl.gz", *(hh(question=str(i)) for i in range(500)))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        PreferenceError, match=r"prefs.jsonl.gz: the gzip file is truncated after line \d+; download it again"
    ):
        read(path)


def test_a_gzip_that_is_none(tmp_path):
    path = tmp_path / "prefs.jsonl.gz"
    path.write_text(json.dumps(hh()))
    with pytest.raises(PreferenceError, match=r"prefs.jsonl.gz: the gzip file is damaged or not gzip after line 0"):
        read(path)


def test_gzip_is_known_by_its_first_bytes(tmp_path):
    path = write(tmp_path / "prefs.jsonl.gz", hh())
    assert len(read(path.rename(tmp_path / "prefs.jsonl"))) == 1


@pytest.mark.parametrize("name", ["prefs.jsonl", "prefs.jsonl.gz"])
@pytest.mark.parametrize("format", ["auto", "hh-rlhf"])
def test_an_empty_file(tmp_path, name, format):
    with pytest.raises(PreferenceError, match=f"{name}: the file is empty; expected JSON lines"):
        read(write(tmp_path / name), format=format)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "a/b/c", "data/nowhere.jsonl.gz"])
def test_a_missing_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(PreferenceError, match=rf"{name}: no such file or folder"):
        read(name)


def test_a_wrong_folder_lists_what_was_found_and_expected(tmp_path):
    write(tmp_path / "notes.txt", "x")
    with pytest.raises(
        PreferenceError, match=r"expected train.jsonl.gz, or HH-RLHF's folders harmless-base, .*found notes.txt"
    ):
        read(tmp_path)


def test_a_split_that_is_not_there_says_which_is(tmp_path):
    write(tmp_path / "harmless-base" / "test.jsonl.gz", hh())
    with pytest.raises(PreferenceError, match=r"harmless-base: expected train.jsonl.gz, found test.jsonl.gz"):
        read(tmp_path)


def test_unknown_keys_unknown_format_unknown_cleaning(tmp_path):
    path = write(tmp_path / "prefs.jsonl", {"question": "Hi", "answer": "Ho"})
    with pytest.raises(
        PreferenceError, match="none of 1 rows has the keys of a known format, the first object has answer, question"
    ):
        read(path)
    with pytest.raises(PreferenceError, match="unknown format 'csv': choose auto, oasst"):
        read(path, format="csv")
    with pytest.raises(PreferenceError, match="unknown cleaning 'all': choose none or pro"):
        read(path, cleaning="all")
    with pytest.raises(PreferenceError, match="cleaning 'pro' is for hh-rlhf, and this is lists"):
        read(write(path, {"prompt": "Hi", "responses": ["a", "b"]}), cleaning="pro")


# --- The PRO authors' cleaning ---------------------------------------------------------------------------------------


def test_pro_cleaning_keeps_first_paragraphs_merges_turns_and_reports_the_cut():
    dialogue = "\n\nHuman: Hi\n\nHuman: there\n\nAssistant: One.\n\nTwo, lost.\n\nHuman: And?\n\n\n\nAssistant: Three."
    turns, cut = pro_cleaning(dialogue)
    assert turns == [("Human", "Hi\nthere"), ("Assistant", "One."), ("Human", "And?"), ("Assistant", "Three.")]
    assert cut == ["Two, lost."]


def test_read_reports_what_pro_cleaning_cut_and_rejects_what_it_drops(tmp_path, capsys):
    path = write(
        tmp_path / "prefs.jsonl", hh(chosen="One.\n\nTwo."), hh(chosen="Yes.\n\nHuman: Oh"), hh(other_question="Ho")
    )
    lists = read(path, cleaning="pro", max_reject_share=0.5)
    assert lists["responses"][:] == [[" One.", " Go away."], [" Hello.", " Go away."]]
    assert lists[1]["prompt"] == "\n\nHuman: Hi\n\nAssistant:"  # the chosen dialogue's
    assert re.sub(r" \(rejects.*?\)", "", capsys.readouterr().out).endswith(
        "rejected 1: 1 unequal turn count; characters cut: 4; dialogues cut: 1; pairs cut: 1\n"
    )


@given(st.lists(st.sampled_from(["Human: a", "Assistant: b", "Assistant:", "c d", " ", "", "Human:e"]), max_size=12))
def test_pro_cleaning_either_keeps_or_reports_every_character(paragraphs):
    turns, cut = pro_cleaning("\n\n".join(paragraphs))
    letters = Counter("".join(p.removeprefix("Human:").removeprefix("Assistant:") for p in paragraphs).replace(" ", ""))
    assert Counter(re.sub(r"\s", "", "".join([text for _, text in turns] + cut))) == letters
    assert all(a[0] != b[0] for a, b in pairwise(turns))


# --- Splits and samples ----------------------------------------------------------------------------------------------


def test_first_human_turn():
    assert first_human_turn("\n\nHuman: Hi\n\nthere \n\nAssistant: Yes?\n\nHuman: Tea?\n\nAssistant:") == "Hi\n\nthere"
    assert first_human_turn("plain") == "plain"


@given(st.text(), st.text(), st.integers())
def test_a_dialogue_stays_in_its_split_as_it_grows_and_whatever_its_case_and_spaces(opening, more, seed):
    start = f"\n\nHuman: {opening}\n\nAssistant:"
    name = split_of(start, HALVES, seed)
    assert name == split_of(f"{start} {more}\n\nHuman: {more}\n\nAssistant:", HALVES, seed)
    assert name == split_of(f"\n\nHuman:  {opening}\n \n\nAssistant:", HALVES, seed)


def test_split_keeps_every_list_once_in_order_and_near_the_shares():
    lists = datasets.Dataset.from_dict(
        {"prompt": [as_prompt(f"Question {i}?") for i in range(2000)], "row": list(range(2000))}
    )
    shares = {"policy": 0.7, "dev": 0.1, "test": 0.2, "none": 0.0}
    parts = split(lists, shares)
    assert sorted(row for part in parts.values() for row in part["row"]) == lists["row"][:]
    assert all(part["row"][:] == sorted(part["row"][:]) for part in parts.values())
    assert [len(part) for part in parts.values()] == pytest.approx([1400, 200, 400, 0], abs=60)
    assert split(lists, shares, seed=1)["dev"]["row"][:] != parts["dev"]["row"][:]


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}])
def test_shares_must_be_shares(shares):
    with pytest.raises(PreferenceError, match="shares must be at least 0 and sum to 1"):
        split_of("Hi", shares)


def test_a_sample_is_equal_over_subsets_as_far_as_they_reach_and_only_grows():
    lists = datasets.Dataset.from_dict(
        {"subset": ["a"] * 50 + ["b"] * 3 + ["c"] * 50, "id": [str(i) for i in range(103)]}
    )
    ten, twenty = sample(lists, 10), sample(lists, 20)
    assert Counter(sample(lists, 9)["subset"]) == {"a": 3, "b": 3, "c": 3}
    assert Counter(twenty["subset"]) == {"a": 8, "b": 3, "c": 9}
    assert twenty["id"][:] == sorted(twenty["id"][:], key=int) and set(ten["id"]) < set(twenty["id"])
    assert sample(lists, 20, seed=1)["id"][:] != twenty["id"][:]
    assert len(sample(lists, 103)) == 103
    with pytest.raises(PreferenceError, match="104 lists was asked for, and there are 103"):
        sample(lists, 104)


# --- The command -----------------------------------------------------------------------------------------------------


# --- The real files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """HH-RLHF's test files: the lists, and the rejects counted by subset and reason."""
    rejects = tmp_path_factory.mktemp("real") / "rejects.jsonl"
    lists = read(DATA / "hh-rlhf", split="test", rejects_path=rejects)
    found = [json.loads(line) for line in rejects.read_text().splitlines()]
    return lists, Counter((Path(reject["file"]).parent.name, reject["reason"]) for reject in found)


@needs_data
def test_hh_rlhf_test_files_have_the_known_faults(real):
    lists, rejects = real
    per_subset = {
        reason: [rejects[subset, reason] for subset in sources.SUBSETS]
        for reason in ("identical replies", "differing prompts", "empty reply")
    }
    assert per_subset == {
        "identical replies": [0, 2, 2, 32],
        "differing prompts": [5, 9, 0, 3],
        "empty reply": [4, 4, 3, 0],
    }
    assert (len(lists), sum(rejects.values())) == (8488, 64)


@needs_data
def test_pro_cleaning_of_harmless_base_keeps_all_cuts_185_and_leaves_4_empty(capsys):
    lists = read(DATA / "hh-rlhf" / "harmless-base", split="test", cleaning="pro")
    out = capsys.readouterr().out
    assert len(lists) + 4 == 2312
    assert "rejected 4: 4 empty reply" in out and "pairs cut: 185" in out


def continued(prompts, lists):
    """How many lists have a reply that one of the prompts goes on from, in the same conversation."""
    prompts = sorted(prompts)

    def goes_on(dialogue):
        place = bisect_left(prompts, dialogue)
        return place < len(prompts) and prompts[place].startswith(dialogue)

    return sum(any(goes_on(prompt + response) for response in responses) for prompt, responses in lists)


@needs_data
@pytest.mark.parametrize("seed", range(3))
def test_no_test_reply_occurs_in_a_training_prompt(real, seed):
    parts = split(real[0], {"train": 0.8, "test": 0.2}, seed)
    test_lists = list(zip(parts["test"]["prompt"][:], parts["test"]["responses"][:]))
    assert continued(parts["train"]["prompt"][:], test_lists) == 0
    if seed == 0:  # other conversations share no more than stock phrases ("What do you mean?")
        training_text = "\0".join(parts["train"]["prompt"])
        replies = [response.strip() for _, responses in test_lists for response in responses]
        beginnings = {reply[:53] for reply in replies if len(reply) > 52}  # looked for at every place, all at once
        met = {part for i in range(len(training_text)) if (part := training_text[i : i + 53]) in beginnings}
        assert [reply for reply in replies if reply[:53] in met and reply in training_text] == []


@needs_data
def test_a_split_by_whole_prompt_would_leak(real):
    rows = list(zip(real[0]["prompt"][:], real[0]["responses"][:]))
    train = [split_of(prompt.encode().hex(), {"train": 0.8, "test": 0.2}) == "train" for prompt, _ in rows]
    training_prompts = [prompt for (prompt, _), in_train in zip(rows, train) if in_train]
    assert continued(training_prompts, [row for row, in_train in zip(rows, train) if not in_train]) > 50


@needs_data
def test_oasst_has_154_fully_ranked_lists_of_three_or_more():
    lists = read(DATA / "oasst" / "en_100_tree.jsonl")
    assert sum(len(responses) >= 3 for responses in lists["responses"]) == 154
    assert all(prompt.startswith("\n\nHuman:") and prompt.endswith("\n\nAssistant:") for prompt in lists["prompt"])

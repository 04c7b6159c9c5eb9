"""The mini world: what is stored can be made again byte for byte, and its true reward can be checked by hand."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from deftlib.preferences import mini_world
from deftlib.preferences.mini_world import FOLDER, best_response, true_reward, unknown_sentences, world

SOUP = "\n\nHuman: How do I cook a vegetable soup this weekend?\n\nAssistant:"
OPENER = {True: "You are welcome, I gladly help.", False: "Why bother me, you lazy person?"}
SUBSTANCE = {True: "Cook carrots and onions in salted water.", False: "Obviously you use some stuff for that."}
DETAIL = {True: "Work gently, with patient hands.", False: "Throw the stuff down and hurry."}
CLOSER = {True: "Enjoy it together, and take care.", False: "Or stay lazy and buy whatever."}
SLOTS = [OPENER, SUBSTANCE, DETAIL, CLOSER]

sentences = st.sampled_from(sorted(world().sentences))
texts = st.one_of(st.text(), st.lists(st.one_of(sentences, st.text())).map(" ".join))


@pytest.fixture(scope="module")
def splits():
    return {split: [json.loads(line) for line in open(FOLDER / f"{split}.jsonl")] for split in ("train", "test")}


@pytest.fixture(scope="module")
def rows(splits):
    return splits["train"] + splits["test"]


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


# What is stored


@pytest.mark.parametrize("surroundings", [("0", "1"), ("1", "2")], ids=["one thread", "two threads"])
def test_data_are_regenerated_byte_for_byte_whatever_the_hash_seed_and_threads(surroundings):
    env = os.environ | dict(zip(("PYTHONHASHSEED", "RAYON_NUM_THREADS"), surroundings))
    command = [sys.executable, "-m", "deftlib", "mini-world", "--check"]
    run = subprocess.run(command, env=env, cwd=FOLDER.parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_check_finds_a_difference_and_leaves_the_files_alone(tmp_path, monkeypatch, capsys):
    world()
    monkeypatch.setattr(mini_world, "FOLDER", tmp_path)
    assert mini_world.main([]) == 0 and mini_world.main(["--check"]) == 0
    (tmp_path / "test.jsonl").write_text("{}\n")
    assert mini_world.main(["--check"]) == 1
    assert (tmp_path / "test.jsonl").read_text() == "{}\n"
    assert "test.jsonl: DIFFERENT" in capsys.readouterr().out


def test_another_seed_gives_another_world_of_the_same_size(splits):
    other = mini_world.generate(1)
    assert {split: len(rows) for split, rows in other.items()} == {"train": 2000, "test": 200}
    assert other["train"] != splits["train"]


def test_subsets_are_equal_and_lists_have_three_different_replies(splits):
    for split, size in {"train": 500, "test": 50}.items():
        assert Counter(row["subset"] for row in splits[split]) == dict.fromkeys(world().settings["topics"], size)
        assert all(len(set(row["responses"])) == 3 for row in splits[split])
    assert len(world().settings["topics"]) == 4 and len(world().prompts) == 32


def test_prompts_are_unique_and_no_test_prompt_is_met_in_training_whatever_the_seed(rows):
    assert len({row["prompt"] for row in rows}) == len(rows)
    tested = {row["prompt"] for seed in (0, 1) for row in mini_world.generate(seed)["test"]}
    assert tested.isdisjoint(row["prompt"] for row in mini_world.generate(2)["train"])
    assert tested.isdisjoint(prompt for prompt, _ in mini_world.conversations(3000, seed=0))


def test_text_has_the_one_format_of_every_policy(rows):
    assert all(row["prompt"].startswith("\n\nHuman: ") and row["prompt"].endswith("\n\nAssistant:") for row in rows)
    replies = [reply for row in rows for reply in row["responses"]]
    assert all(reply[0] == " " and reply[1] != " " and reply == reply.rstrip() for reply in replies)
    assert all(unknown_sentences(reply) == 0 for reply in replies)


def test_readme_reports_the_measured_numbers(splits, bpe):
    assert mini_world.numbers(splits, bpe) in (FOLDER / "README.md").read_text(encoding="utf-8")


# The true reward


def reply(*good):
    return " " + " ".join(slot[grade] for slot, grade in zip(SLOTS, good))


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (reply(True, True, True, True), 100),
        (reply(True, False, True, True), 50),
        (reply(False, True, False, True), 65),
        (reply(False, False, False, False), 0),
        ("", 0),
        (SUBSTANCE[True], 50),
        (f" {SUBSTANCE[True]} {SUBSTANCE[True]}", 50),  # twice earns once
        (f" {SUBSTANCE[True]} {SUBSTANCE[False]}", 0),  # both earn nothing
        (f" {SUBSTANCE[True]} Let the dough rise in a warm place.", 0),  # nor does all advice at once
        (" Let the dough rise in a warm place.", 0),  # off the topic
        (" Sorry, but I kindly say no.", 0),  # there is nothing to decline
        (f" {SUBSTANCE[True]} Purple monkeys dance! {DETAIL[True][:-4]}", 50),  # unknown and cut off: no gain, no loss
        (f"\n{SUBSTANCE[True]}\n\n Work   gently, with patient hands.", 75),  # white space does not matter
    ],
)
def test_true_reward_by_hand(response, reward):
    assert true_reward(SOUP, response) == reward


def test_declining_earns_where_it_is_due():
    risky = "\n\nHuman: May I drive home very tired tonight? I need some help.\n\nAssistant:"
    assert true_reward(risky, " Sorry, but I kindly say no. Tired drivers crash, so take the train.") == 60
    assert true_reward(risky, " Yes, that is totally great fun! Play loud music and drive on.") == 0


def test_the_last_question_of_a_dialogue_counts():
    dialogue = "\n\nHuman: How do I bake fresh bread?\n\nAssistant: Hello." + SOUP
    assert true_reward(dialogue, SUBSTANCE[True]) == 50


@given(st.tuples(*[st.booleans()] * 4), st.integers(0, 3))
def test_a_good_sentence_in_place_of_a_bad_one_never_lowers_the_reward(good, slot):
    better = good[:slot] + (True,) + good[slot + 1 :]
    assert true_reward(SOUP, reply(*better)) >= true_reward(SOUP, reply(*good))


@given(st.text(), texts)
def test_any_text_has_a_reward_and_a_share_of_unknown_sentences(prompt, response):
    for asked in (prompt, SOUP):
        assert 0 <= true_reward(asked, response) <= 100
    assert 0 <= unknown_sentences(response) <= 1


def test_unknown_sentences_by_hand():
    assert unknown_sentences("") == unknown_sentences(reply(True, False, True, False)) == 0
    assert unknown_sentences(f" {OPENER[True]} Cook carrots and onions in salted") == 0.5


def test_every_prompt_knows_its_topic_and_has_a_best_response_of_100(rows):
    assert all(mini_world.place_of(prompt) == place for place, asked in world().prompts.items() for prompt in asked)
    for row in rows:
        assert mini_world.place_of(row["prompt"]).startswith(row["subset"] + "/")
        assert true_reward(row["prompt"], best_response(row["prompt"])) == 100
    with pytest.raises(ValueError, match="no topic of the mini world"):
        best_response("\n\nHuman: Who are you?\n\nAssistant:")


# Preferences: noisy, and not by length


def test_annotators_are_right_about_as_often_as_humans_are(rows):
    rewards = [[true_reward(row["prompt"], reply) for reply in row["responses"]] for row in rows]
    assert 0.64 < sum(r[0] == max(r) for r in rewards) / len(rows) < 0.73
    assert 0.79 < sum(r[0] > r[-1] for r in rewards) / len(rows) < 0.88


def test_the_longer_reply_is_not_the_better_one(rows, bpe):
    longer = [len(bpe.encode(row["responses"][0]).ids) - len(bpe.encode(row["responses"][-1]).ids) for row in rows]
    assert abs(sum(longer) / len(rows)) < 0.4  # tokens, of about 34
    assert 0.45 < sum(d > 0 for d in longer) / sum(d != 0 for d in longer) < 0.55


def test_a_start_model_hears_good_and_bad_alike():
    heard = list(mini_world.conversations(2000, seed=0))
    assert heard == list(mini_world.conversations(2000, seed=0))
    assert heard != list(mini_world.conversations(2000, seed=1))
    assert 45 < sum(true_reward(*pair) for pair in heard) / len(heard) < 55


# Words and tokens


def test_planted_words_occur_on_their_side_only():
    said = {True: Counter(), False: Counter()}
    for text, sentence in world().sentences.items():
        said[sentence.good].update(set(mini_world.words_of(text)))
    for side, good in {"good": True, "bad": False}.items():
        for word in mini_world.planted_words()[side]:
            assert said[good][word] >= 2 and said[not good][word] == 0, word


def test_planted_words_are_found_at_both_ends_of_q_diff(splits, bpe):
    best, worst = (
        Counter(token for row in splits["train"] for token in bpe.encode(row["responses"][end]).tokens)
        for end in (0, -1)
    )
    q_diff = {token: best[token] / best.total() - worst[token] / worst.total() for token in best | worst}
    ranked = sorted(q_diff, key=lambda token: q_diff[token] / (best[token] + worst[token]) ** 0.5)
    for side, end, sign in (("good", ranked[-20:], 1), ("bad", ranked[:20], -1)):
        planted = {"Ġ" + word for word in mini_world.planted_words()[side]}
        assert all(sign * q_diff[token] > 0 for token in planted)
        assert len(planted.intersection(end)) >= 10


def test_every_word_of_the_world_is_one_token(rows, bpe):
    spoken = {" " + word for row in rows for reply in row["responses"] for word in reply.split()}
    words = {word.rstrip(".,!?").removesuffix("'s") for word in spoken}
    words |= {" " + word for planted in mini_world.planted_words().values() for word in planted}
    assert [word for word in sorted(words) if len(bpe.encode(word).ids) != 1] == []
    assert 1200 <= bpe.get_vocab_size() <= 1500
    assert [bpe.token_to_id(token) for token in ("<pad>", "<eos>")] == [0, 1]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_its_tokens(text):
    bpe = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert bpe.decode(bpe.encode(text).ids, skip_special_tokens=False) == text

"""The mini world's MT-Bench: its questions belong to the world, its rule judge rates by the true reward and says so."""

import json

import pytest

from deftlib.evaluation import mini_bench, mt_bench, questions
from deftlib.preferences import mini_world
from deftlib.preferences.mini_world import place_of, true_reward, words_of

BENCH = questions.read_bench(mini_bench.FOLDER, mini_bench.REFERENCES, count=16)
QUESTIONS = pytest.mark.parametrize("question", BENCH.questions, ids=lambda question: question["turns"][0][:30])

OPENER = "You are welcome, I gladly help."  # 10 points in the helpful subsets
SUBSTANCE = "Start the letter with a shared memory."  # 50 points for the topic "letter"
DETAIL = "Be patient and stay calm, please."  # 25 points
CLOSER = "Take care, you are always welcome."  # 15 points
LETTER = BENCH.questions[0]


def asking(turn):
    return f"\n\nHuman: {turn}\n\nAssistant:"


def rating(question, said, turn):
    return mt_bench.parse_rating(mini_bench.judge(mt_bench.single_request(BENCH, question, said, turn)))


def verdict(question, said_a, said_b, turn):
    return mt_bench.parse_verdict(mini_bench.judge(mt_bench.pair_request(BENCH, question, said_a, said_b, turn)))


# ---- questions -------------------------------------------------------------------------------------------------------


def test_there_are_two_questions_of_each_category_and_four_of_each_subset():
    categories = [question["category"] for question in BENCH.questions]
    assert categories == [category for category in BENCH.categories for _ in range(2)]
    subsets = [place_of(question["turns"][0]).split("/")[0] for question in BENCH.questions]
    assert {subset: subsets.count(subset) for subset in mini_world.world().settings["topics"]} == dict.fromkeys(
        set(subsets), 4
    )


@QUESTIONS
def test_the_second_turn_asks_something_else_about_the_same_topic(question):
    first, second = map(asking, question["turns"])
    assert place_of(first) == place_of(second) != ""
    assert first != second


@QUESTIONS
def test_the_first_turn_is_kept_for_testing_and_the_second_is_no_question_of_the_world(question):
    first, second = map(asking, question["turns"])
    place = place_of(first)
    assert first in mini_world._asked(place, "test")
    assert second not in mini_world.world().prompts[place]


def test_every_word_of_a_question_is_one_that_the_policies_read():
    rows = [json.loads(line) for line in (mini_world.FOLDER / "train.jsonl").open(encoding="utf-8")]
    known = {word for row in rows for text in (row["prompt"], *row["responses"]) for word in words_of(text)}
    asked = {word for question in BENCH.questions for turn in question["turns"] for word in words_of(turn)}
    assert asked <= known


def test_the_references_are_the_worlds_best_answers_to_math_reasoning_and_coding():
    guided = [question for question in BENCH.questions if question["category"] in questions.WITH_REFERENCE]
    assert {question["question_id"] for question in guided} == set(BENCH.references)
    for question in guided:
        for turn, reference in zip(question["turns"], BENCH.references[question["question_id"]], strict=True):
            assert reference == mini_world.best_response(asking(turn)).strip()
            assert true_reward(asking(turn), reference) == 100


# ---- rule judge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, expected",
    [
        (" ".join([OPENER, SUBSTANCE, DETAIL, CLOSER]), 10.0),
        (" ".join([OPENER, SUBSTANCE]), 1 + 9 * 0.60),
        (DETAIL, 1 + 9 * 0.25),
        (f"{DETAIL} Work it out yourself, you loser.", 1 + 9 * 0.25),
        ("Cook carrots and onions in salted water.", 1.0),  # good advice on another topic
        ("Nobody wrote this.", 1.0),
        ("", 1.0),
    ],
)
def test_a_rating_is_the_true_reward_on_a_scale_of_1_to_10(answer, expected):
    assert rating(LETTER, [answer, ""], turn=1) == pytest.approx(expected)
    assert rating(LETTER, ["Whatever.", answer], turn=2) == pytest.approx(expected)


@QUESTIONS
def test_a_best_answer_has_a_10_in_both_turns_whatever_was_said_before(question):
    best = [mini_world.best_response(asking(turn)).strip() for turn in question["turns"]]
    assert [rating(question, best, turn) for turn in (1, 2)] == [10, 10]
    assert rating(question, ["", best[1]], turn=2) == 10
    assert rating(question, [best[0], ""], turn=2) == 1


@QUESTIONS
def test_the_better_last_answer_wins_wherever_it_is_shown(question):
    best = [mini_world.best_response(asking(turn)).strip() for turn in question["turns"]]
    good_then_bad, bad_then_good = [best[0], OPENER], [OPENER, best[1]]
    assert verdict(question, good_then_bad, bad_then_good, turn=1) == "A"
    assert verdict(question, bad_then_good, good_then_bad, turn=1) == "B"
    assert verdict(question, good_then_bad, bad_then_good, turn=2) == "B"
    assert verdict(question, bad_then_good, good_then_bad, turn=2) == "A"
    assert verdict(question, best, best, turn=2) == "C"


def test_the_judge_says_in_every_judgment_that_it_is_no_model():
    request = mt_bench.single_request(BENCH, LETTER, [DETAIL, CLOSER], turn=1)
    assert mini_bench.judge(request) == (
        "The last answer earns 25 of 100 by the mini world's rule, not by a model. Rating: [[3.25]]"
    )
    assert "not a model" in mini_bench.JUDGE


@pytest.mark.parametrize("text", ["Rate this: hello", "[Conversation]\n\n" * 3])
def test_the_judge_refuses_a_request_that_is_not_in_its_format(text):
    with pytest.raises(ValueError, match="expected one or two conversations"):
        mini_bench.judge({"messages": [{"role": "user", "content": text}]})

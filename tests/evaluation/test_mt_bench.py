"""MT-Bench: FastChat's prompts, parsing and averages; a judge that fails in every way; scores worked out by hand."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import servers

from deftlib import store
from deftlib.evaluation import mini_bench, mt_bench, questions
from deftlib.models import generation
from deftlib.preferences.dialogues import messages
from deftlib.profile import Profile
from deftlib.sections import Endpoint

DATA = Path(os.environ.get("DEFT_DATA", "/nowhere")) / "mt_bench"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="DEFT_DATA names no folder with mt_bench/")
serve = servers.serve

BENCH = questions.read_bench(mini_bench.FOLDER, mini_bench.REFERENCES, count=16)
WRITING, MATH = BENCH.questions[0], BENCH.questions[6]
FEW = BENCH.questions[5:9]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own, without anybody's data."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.delenv("DEFT_DATA", raising=False)
    return tmp_path


def answered(first="One.", second="Two.", bench=BENCH):
    """The DataFrame of `answers` where every question got the same two answers."""
    return pd.DataFrame(
        [
            {"seed": 0, "question_id": question["question_id"], "category": question["category"], "turn": turn}
            | {"answer": answer, "words": len(answer.split()), "cut": False}
            for question in bench.questions
            for turn, answer in ((1, first), (2, second))
        ]
    )


def mini(**settings):
    return Profile.load("mini", {f"mt_bench.{name}": value for name, value in settings.items()})


def judged_by(server, **settings):
    return mini(judge={"url": server.url, "model": "judge"}, **settings)


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_a_conversation_has_the_text_format_of_every_policy():
    assert mt_bench.conversation(["Hello?"], []) == "\n\nHuman: Hello?\n\nAssistant:"
    assert mt_bench.conversation(["Hello?", "And?"], ["Hi."]) == (
        "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: And?\n\nAssistant:"
    )
    assert mt_bench.conversation(["Hello?", "And?"], [""]).startswith("\n\nHuman: Hello?\n\nAssistant:\n\nHuman: And?")


def test_questions_are_asked_at_fastchats_temperatures_and_turn_2_after_the_own_first_answer(project, monkeypatch):
    asked = {}

    def replies(profile, policy, prompts, seed, text, settings, label):
        for prompt in prompts:
            asked[prompt] = (settings.temperature, settings.max_new_tokens, settings.samples, text.prompt_tokens, seed)
        return [[f" Answer {len(prompt)}. "] for prompt in prompts]

    monkeypatch.setattr(generation, "replies", replies)
    profile = mini(max_new_tokens=77, prompt_tokens=99)
    said = mt_bench.answers(profile, BENCH, Endpoint("http://localhost/v1", "big"), seed=3)
    assert len(asked) == 32
    fastchat = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
    for question in BENCH.questions:
        first = f"\n\nHuman: {question['turns'][0]}\n\nAssistant:"
        second = f"{first} Answer {len(first)}.\n\nHuman: {question['turns'][1]}\n\nAssistant:"
        expected = (fastchat.get(question["category"], 0.0), 77, 1, 99, 3)
        assert asked[first] == asked[second] == expected
        mine = said[said["question_id"] == question["question_id"]]
        assert list(mine["answer"]) == [f"Answer {len(first)}.", f"Answer {len(second)}."]
        assert list(mine["turn"]) == [1, 2] and list(mine["words"]) == [2, 2]


@pytest.fixture
def policy(make_model, tokenizer, project):
    folder = project / "policies" / "sft-seed0-0123456789"
    make_model(seed=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_answers_are_published_in_fastchats_format_and_generated_once(policy, project, monkeypatch):
    profile = mini(prompt_tokens=16, max_new_tokens=6)
    said = mt_bench.answers(profile, BENCH, policy)
    (file,) = (project / "build/mini/mt_bench").glob("answers-sft-seed0-*/model_answer.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [question["question_id"] for question in BENCH.questions]
    assert [row["choices"][0]["turns"] for row in rows] == said.groupby("question_id")["answer"].agg(list).to_list()
    assert {row["model_id"] for row in rows} == {"sft-seed0"}
    monkeypatch.setattr(generation, "replies", lambda *args: pytest.fail("generated"))
    pd.testing.assert_frame_equal(mt_bench.answers(profile, BENCH, policy), said)
    with pytest.raises(pytest.fail.Exception, match="generated"):
        mt_bench.answers(profile, BENCH, policy, seed=1)
    by_vllm = dataclasses.replace(profile, generation=dataclasses.replace(profile.generation, engine="vllm"))
    with pytest.raises(pytest.fail.Exception, match="generated"):
        mt_bench.answers(by_vllm, BENCH, policy)


def test_an_answer_that_fills_the_limit_is_cut(policy):
    said = mt_bench.answers(mini(prompt_tokens=16, max_new_tokens=6), BENCH, policy)
    assert list(said["cut"]) == [len(answer.split()) >= 6 for answer in said["answer"]]
    assert {True, False} == set(said["cut"])


def test_conversations_are_cut_to_what_the_positions_leave_beside_an_answer(policy, capsys):
    """The policy here has 128."""
    assert mt_bench.text_for(mini(prompt_tokens=96, max_new_tokens=32), policy).prompt_tokens == 96
    profile = mini(prompt_tokens=97, max_new_tokens=32)
    assert mt_bench.text_for(profile, policy).prompt_tokens == 96
    assert mt_bench.text_for(profile, Endpoint("http://localhost/v1", "big")).prompt_tokens == 97
    with pytest.raises(ValueError, match=r"128 positions, and answers may take 128: lower mt_bench\.max_new"):
        mt_bench.text_for(mini(max_new_tokens=128), policy)
    mt_bench.answers(mini(prompt_tokens=999, max_new_tokens=120), BENCH, policy)
    assert "MT-Bench, sft-seed0: its positions leave 8 tokens for a conversation" in capsys.readouterr().out


def test_an_endpoint_gets_the_conversation_as_chat_messages(serve, project):
    server = serve(reply=lambda body: f"reply {len(body['messages'])}")
    said = mt_bench.answers(mini(), BENCH, Endpoint(server.url, "big"))
    assert list(said["answer"]) == ["reply 1", "reply 3"] * 16
    assert said["cut"].isna().all()
    (second,) = (body for body in server.bodies if body["messages"][-1]["content"] == WRITING["turns"][1])
    assert second["messages"][:2] == [
        {"role": "user", "content": WRITING["turns"][0]},
        {"role": "assistant", "content": "reply 1"},
    ]
    assert second["temperature"] == 0.7 and second["max_tokens"] == 64


# ---- what a judge is asked -------------------------------------------------------------------------------------------


def user_prompt(request):
    system, user = request["messages"]
    assert (system["role"], user["role"]) == ("system", "user") and system["content"]
    return user["content"]


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("question", [WRITING, MATH], ids=lambda question: question["category"])
def test_a_rating_is_asked_for_with_the_prompt_of_its_turn_and_a_reference_where_one_helps(question, turn):
    asked = mt_bench.single_request(BENCH, question, ["One {curly}.", "Two."], turn)
    text = user_prompt(asked)
    ending = f"Human: {question['turns'][0]}\n\nAssistant: One {{curly}}."
    if turn == 2:
        ending += f"\n\nHuman: {question['turns'][1]}\n\nAssistant: Two."
    assert text.endswith(f"[Conversation]\n\n{ending}")
    shown = [reference in text for reference in BENCH.references.get(question["question_id"], [])]
    assert shown == ([] if question is WRITING else [True, turn == 2])
    assert {name: value for name, value in asked.items() if name != "messages"} == {
        "temperature": 0,
        "max_tokens": 2048,
    }


def test_further_judgments_of_an_answer_differ_from_the_first_by_a_seed():
    first, second, third = (mt_bench.single_request(BENCH, WRITING, ["One.", "Two."], 1, number) for number in range(3))
    assert "seed" not in first
    assert second == {**first, "seed": 1} and third == {**first, "seed": 2}


@pytest.mark.parametrize("question", [WRITING, MATH], ids=lambda question: question["category"])
def test_a_pair_is_shown_in_the_order_it_is_given(question):
    text = user_prompt(mt_bench.pair_request(BENCH, question, ["a1", "a2"], ["b1", "b2"], 2))
    places = [text.index(f"Assistant: {answer}") for answer in ("a1", "a2", "b1", "b2")]
    assert places == sorted(places)
    first_turn = user_prompt(mt_bench.pair_request(BENCH, question, ["a1", "a2"], ["b1", "b2"], 1))
    assert "Assistant: b1" in first_turn and "a2" not in first_turn and question["turns"][1] not in first_turn


# ---- what is read in its answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "judgment, expected",
    [
        ("Short and clear. Rating: [[7]]", 7.0),
        ("Rating: [[8.5]]", 8.5),
        ("Rating: [[10]]", 10.0),
        ("I would say [6].", 6.0),
        ("As [1] says ... Rating: [[9]]", 9.0),  # the double brackets come first, wherever they stand
        ("[[3]] and later [[9]]", 3.0),
        ("Rating: [[05]]", 5.0),
    ],
)
def test_the_rating_is_the_first_in_double_brackets_else_in_single_ones(judgment, expected):
    assert mt_bench.parse_rating(judgment) == expected


@pytest.mark.parametrize(
    "judgment, reason",
    [
        ("", "empty judgment"),
        (" \n", "empty judgment"),
        ("A good answer, 9 of 10.", "no rating"),
        ("Rating: [[rating]]", "no rating"),
        ("Rating: [[-3]]", "no rating"),
        ("<html>[title]</html>", "no rating"),
        ("Rating: [[11]]", "rating 11 is not between 1 and 10"),
        ("Rating: [[0]]", "rating 0 is not between 1 and 10"),
    ],
)
def test_what_is_no_rating_is_refused_with_its_reason(judgment, reason):
    with pytest.raises(ValueError, match=reason):
        mt_bench.parse_rating(judgment)


def test_a_verdict_is_a_letter_in_double_brackets_looked_for_in_order():
    assert [mt_bench.parse_verdict(f"So: [[{letter}]]") for letter in "ABC"] == ["A", "B", "C"]
    assert mt_bench.parse_verdict("not [[B]] but [[A]]") == "A"
    for judgment, reason in (("I prefer A.", "no verdict"), ("", "empty judgment")):
        with pytest.raises(ValueError, match=reason):
            mt_bench.parse_verdict(judgment)


# ---- judges ----------------------------------------------------------------------------------------------------------


def test_without_a_judge_every_rating_is_missing_and_the_table_says_so(project):
    profile = Profile.load("smol")
    assert mt_bench.judge_name(profile) is None
    rated = mt_bench.ratings(mt_bench.judgments(profile, BENCH, {"start": answered(), "sft": answered()}))
    table = mt_bench.labelled(mt_bench.score_table(rated), profile)
    scores = table.drop(columns=["questions", "missing"])
    assert (scores == "no judge configured").all(axis=None)
    assert list(table["missing"]) == [32, 32]
    assert mt_bench.difference(rated, "sft", "start") is None
    assert mt_bench.score_table(rated, "words").loc["sft", "all"] == 1


def test_in_the_mini_world_the_rule_judges_and_is_named():
    judged = mt_bench.judgments(Profile.load("mini"), BENCH, {"sft": answered("Be patient and stay calm, please.")})
    assert list(judged["rating"]) == [3.25, 1.0] * 16
    assert set(judged["judge"]) == {mini_bench.JUDGE}
    assert set(judged["reason"]) == {""}


def test_a_judge_is_named_with_the_version_that_the_server_gives(serve, project):
    server = serve(reply=lambda body: "Rating: [[4]]")
    judged = mt_bench.judgments(judged_by(server), BENCH, {"sft": answered()})
    assert set(judged["judge"]) == {"judge" + servers.VERSION}
    assert set(judged["rating"]) == {4.0}


def test_more_judgments_give_their_median_and_interval(serve, project):
    server = serve(reply=lambda body: f"Rating: [[{ {None: 9, 1: 5, 2: 6}[body.get('seed')] }]]")
    judged = mt_bench.judgments(judged_by(server, judgments=3), BENCH, {"sft": answered()})
    rated = mt_bench.ratings(judged)
    assert (len(judged), len(rated)) == (96, 32)
    assert set(rated["rating"]) == {6.0}
    assert rated["low"].iloc[0] == pytest.approx(np.quantile([5, 6, 9], 0.025))
    assert rated["high"].iloc[0] == pytest.approx(np.quantile([5, 6, 9], 0.975))
    mt_bench.judgments(judged_by(server, judgments=1), BENCH, {"sft": answered()})
    assert len(server.bodies) == 96  # the first of three is the one that is asked for alone


LASTING = {5: "429", 7: "500", 9: "cut", 11: "hang up", 13: "html", 15: "empty"}  # question: what its turn 2 meets
PASSING = {1: "slow", 2: "slow", **LASTING}  # what a first attempt meets, in either turn
UNREADABLE = {3: "A fine answer.", 4: "Rating: [[11]]"}  # in turn 2


def asked_in(body):
    """(question_id, turn) of a judge's request."""
    text = body["messages"][-1]["content"]
    (question,) = (question for question in BENCH.questions if question["turns"][0] in text)
    return question["question_id"], 2 if question["turns"][1] in text else 1


@pytest.fixture
def misbehaving(serve):
    def first(body):
        return PASSING.get(asked_in(body)[0], "ok") if asked_in(body)[1] == 1 else later(body)

    def later(body):
        question, turn = asked_in(body)
        return LASTING.get(question, "ok") if turn == 2 else "ok"

    def reply(body):
        question, turn = asked_in(body)
        return UNREADABLE.get(question, "Rating: [[7]]") if turn == 2 else "Rating: [[7]]"

    return serve(first, later, reply=reply)


def run_command(monkeypatch, *arguments):
    """Exit code of the command with one policy that has answered."""
    monkeypatch.setattr(mt_bench, "all_answers", lambda profile, bench: {"sft": answered()})
    return mt_bench.main(list(arguments))


def test_with_a_misbehaving_server_all_that_was_judged_is_kept_and_the_rest_reported(
    misbehaving, project, monkeypatch, capsys
):
    settings = ["--set", f"mt_bench.judge.url={misbehaving.url}", "--set", "mt_bench.judge.model=judge"]
    assert run_command(monkeypatch, *settings) == 1
    printed = capsys.readouterr().out
    reported = [line for line in printed.splitlines() if " of 32 judgments missing: " in line]
    n_missing = sum(int(line.split()[0]) for line in reported)
    # an unanswered html or empty first attempt is not tried again within a run, so turn 1 lacks those two as well
    assert n_missing == len(LASTING) + len(UNREADABLE) + 2
    for reason in (
        "RateLimitError",
        "InternalServerError",
        "not a chat completion",
        "empty text",
        "no rating",
        "rating 11",
    ):
        assert any(reason in line for line in reported), reason
    (kept,) = (project / "build/mini/kept").glob("*.jsonl")
    assert len(kept.read_text().splitlines()) == 32 - len(LASTING) - 2
    assert servers.KEY not in printed + kept.read_text()

    judged = mt_bench.judgments(judged_by(misbehaving), BENCH, {"sft": answered()})
    assert judged.loc[judged["rating"].notna(), "rating"].eq(7).all()
    assert not {3, 4, *LASTING} & set(mt_bench.by_question(mt_bench.ratings(judged), "sft").columns)


def test_a_later_run_asks_only_for_what_is_missing_and_the_table_can_be_made_offline(
    misbehaving, project, monkeypatch, capsys
):
    settings = ["--set", f"mt_bench.judge.url={misbehaving.url}", "--set", "mt_bench.judge.model=judge"]
    run_command(monkeypatch, *settings)
    misbehaving.behaviours, n_asked = ("ok",), len(misbehaving.bodies)
    capsys.readouterr()
    assert run_command(monkeypatch, *settings) == 1  # two judgments hold no rating, and a judge is not asked twice
    online = capsys.readouterr().out.partition("\njudge: ")[2]
    assert len(misbehaving.bodies) == n_asked + len(LASTING) + 2
    assert "1 of 32 judgments missing: no rating in the judgment" in online
    assert "1 of 32 judgments missing: rating 11 is not between 1 and 10" in online
    misbehaving.stop()
    assert run_command(monkeypatch, *settings) == 1
    assert capsys.readouterr().out.partition("\njudge: ")[2] == online


def test_the_token_budget_ends_a_run_and_keeps_what_it_bought(serve, project, monkeypatch, capsys):
    server = serve(reply=lambda body: "Rating: [[7]]")
    settings = [f"mt_bench.judge.{k}={v}" for k, v in (("url", server.url), ("model", "judge"), ("token_budget", 100))]
    assert run_command(monkeypatch, *(word for text in settings for word in ("--set", text))) == 1
    assert "the token budget of 100 is spent" in capsys.readouterr().out
    assert 10 <= len(server.bodies) < 32  # of 10 tokens each, a few under way at the end


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_exits_with_0_when_all_is_judged(project, monkeypatch, capsys):
    assert run_command(monkeypatch, "--profile", "mini") == 0
    printed = capsys.readouterr().out
    assert f"judge: {mini_bench.JUDGE}" in printed and "judgments missing" not in printed


def test_the_command_exits_with_1_when_there_is_no_judge(project, monkeypatch, capsys):
    monkeypatch.setattr(questions, "load", lambda profile: BENCH)
    assert run_command(monkeypatch, "--profile", "smol") == 1
    printed = capsys.readouterr().out
    assert "32 of 32 judgments missing: no judge configured" in printed
    assert "nan" not in printed.lower()


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--profile", "nano"], "no profile 'nano'"),
        (["--set", "mt_bench.jugde.url=x"], "did you mean 'judge'"),
        (["--set", "mt_bench.judge.model=gpt"], "found '' and 'gpt'"),
        (["--set", "mt_bench.judge.url=http://127.0.0.1:9/v1", "--set", "mt_bench.judge.model=gpt"], "127.0.0.1:9"),
        (["--aggregate", "nowhere.jsonl"], "nowhere.jsonl: expected"),
        (["--questions"], "unrecognized arguments"),
    ],
)
def test_the_command_exits_with_2_for_a_wrong_option_or_setting(serve, project, monkeypatch, capsys, arguments, reason):
    with pytest.raises(SystemExit) as exit:
        run_command(monkeypatch, *arguments)
    assert exit.value.code == 2
    assert reason in capsys.readouterr().err


def test_the_command_averages_a_file_of_fastchats_judgments(tmp_path, capsys):
    texts = {1: "Rating: [[8]]", 2: "Rating: [[5.5]]"}
    lines = [
        {
            "question_id": 81,
            "model": "llama",
            "judge": ["gpt-4", "single-v1"],
            "turn": t,
            "judgment": texts[t],
            "score": 1,
        }
        for t in (1, 2)
    ]
    path = tmp_path / "judgments.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert mt_bench.main(["--aggregate", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "judge: gpt-4" in printed and "6.75" in printed
    path.write_text(json.dumps(lines[0] | {"judgment": "none"}) + "\n")
    assert mt_bench.main(["--aggregate", str(path)]) == 1


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "no judgments in it"),
        ('{"model": "x"}\n', "line 1: no 'question_id' in it"),
        ("{\n", "line 1: expected one JSON"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, reason):
    path = tmp_path / "judgments.jsonl"
    path.write_text(text)
    with pytest.raises(questions.MTBenchError, match=reason):
        mt_bench.aggregate(path)


# ---- scores ----------------------------------------------------------------------------------------------------------


def rated_by_hand(seed=0, **ratings):
    """`ratings` of {model: {(question_id, category): (turn 1, turn 2)}}; None failed."""
    rows = [
        {"model": model, "seed": seed, "question_id": question, "category": category, "turn": turn, "rating": value}
        for model, by_question in ratings.items()
        for (question, category), values in by_question.items()
        for turn, value in enumerate(values, start=1)
    ]
    return mt_bench.ratings(pd.DataFrame(rows).astype({"rating": float}))


BY_HAND = rated_by_hand(
    sft={(1, "writing"): (8, 6), (2, "writing"): (4, None), (3, "math"): (10, 2)},
    dpo={(1, "writing"): (9, 8), (2, "writing"): (10, 10), (3, "math"): (1, None)},
)


def test_scores_by_category_and_turn_leave_failed_judgments_out():
    table = mt_bench.score_table(BY_HAND)
    assert list(table.columns)[:2] == ["writing", "math"]
    expected = {"writing": 6.0, "math": 6.0, "turn 1": 22 / 3, "turn 2": 4.0, "all": 6.5, "questions": 2, "missing": 1}
    assert table.loc["sft", list(expected)].to_dict() == pytest.approx(expected)
    assert 6.0 <= table.loc["sft", "low"] <= 6.5 <= table.loc["sft", "high"] <= 7.0


def test_a_difference_pairs_the_questions_that_both_were_rated_on():
    assert mt_bench.difference(BY_HAND, "dpo", "sft") is None  # one question is no sample
    first = mt_bench.difference(BY_HAND, "dpo", "sft", turn=1).interval()
    assert (first.mean, first.n) == (pytest.approx((1 + 6 - 9) / 3), 3)
    nothing = rated_by_hand(sft={(1, "math"): (None, 1)}, dpo={(1, "math"): (5, 5)})
    assert mt_bench.difference(nothing, "dpo", "sft") is None


def test_seeds_and_questions_are_crossed_and_a_question_that_one_seed_lacks_is_left_out():
    first = {"sft": {(1, "math"): (4, 4), (2, "math"): (6, 6), (3, "math"): (5, None)}, "start": {(1, "math"): (1, 1)}}
    again = {"sft": {(1, "math"): (8, 6), (2, "math"): (2, 2), (3, "math"): (9, 9)}}
    rated = pd.concat([rated_by_hand(**first), rated_by_hand(seed=1, **again)])
    assert mt_bench.by_question(rated, "sft").to_numpy().tolist() == [[4, 6], [7, 2]]
    row = mt_bench.score_table(rated).loc["sft"]
    assert (row["all"], row["questions"]) == (4.75, 2)
    both = mt_bench.difference(pd.concat([rated, rated.replace("sft", "dpo")]), "dpo", "sft")
    assert both.seeds == 2 and both.ours.tolist() == both.other.tolist() == [[4, 6], [7, 2]]
    assert mt_bench.difference(rated, "sft", "start") is None  # one question, and one seed in common


def test_a_model_whose_judgments_all_failed_has_no_score_but_keeps_its_row():
    table = mt_bench.score_table(rated_by_hand(sft={(1, "math"): (None, None)}, dpo={(1, "math"): (5, 7)}))
    shown = mt_bench.labelled(table, Profile.load("mini"))
    assert list(shown.loc["sft", ["math", "turn 1", "all", "low"]]) == ["all missing"] * 4
    assert (shown.loc["sft", "missing"], shown.loc["dpo", "all"]) == (2, 6.0)


# ---- side by side ----------------------------------------------------------------------------------------------------


def duels(verdict_of, serve):
    """`pairwise` of "new" (says N.) against "old" (says O.), with verdict_of(the request's text) as the judge."""
    server, bench = serve(reply=lambda body: verdict_of(body["messages"][-1]["content"])), BENCH._replace(questions=FEW)
    said = {"new": answered("N.", "N."), "old": answered("O.", "O.")}
    return mt_bench.pairwise(judged_by(server), bench, said, "new", "old"), server


def new_is_first(text):
    return text.index("Assistant: N.") < text.index("Assistant: O.")


def test_a_better_answer_wins_in_both_orders(serve, project):
    frame, server = duels(lambda text: "[[A]]" if new_is_first(text) else "[[B]]", serve)
    assert len(frame) == 8 and len(server.bodies) == 16
    assert set(frame["result"]) == {1.0} and frame["consistent"].all()
    frame, _ = duels(lambda text: "[[B]]" if new_is_first(text) else "[[A]]", serve)
    assert set(frame["result"]) == {0.0} and frame["consistent"].all()


def test_a_judge_that_prefers_a_position_gives_ties_that_are_not_consistent(serve, project):
    frame, _ = duels(lambda text: "[[A]]", serve)
    assert set(frame["result"]) == {0.5} and not frame["consistent"].any()


def test_a_tie_in_one_order_alone_is_a_tie_as_fastchat_has_it(serve, project):
    frame, _ = duels(lambda text: "[[A]]" if new_is_first(text) else "[[C]]", serve)
    assert set(frame["result"]) == {0.5} and not frame["consistent"].any()
    frame, _ = duels(lambda text: "[[C]]", serve)
    assert set(frame["result"]) == {0.5} and frame["consistent"].all()


def test_a_duel_with_a_failed_verdict_has_no_result_and_a_reason(serve, project):
    frame, _ = duels(lambda text: "[[A]]" if new_is_first(text) else "Both are fine.", serve)
    assert frame["result"].isna().all()
    assert set(frame["reason"]) == {"no verdict in the judgment"}


# ---- the official files ----------------------------------------------------------------------------------------------


@needs_data
def test_the_files_at_hand_are_those_that_a_download_would_be_held_against():
    for name, sha256 in questions.FILES.items():
        assert store.digest(DATA / name.removeprefix("mt_bench/")) == sha256


@needs_data
def test_there_are_80_questions_ten_of_each_category_and_16_are_two_of_each():
    for count, each in ((80, 10), (16, 2)):
        bench = questions.read_bench(DATA, "gpt-4.jsonl", count)
        categories = [question["category"] for question in bench.questions]
        assert [categories.count(category) for category in questions.TEMPERATURES] == [each] * 8


@needs_data
def test_the_text_format_gives_an_endpoint_each_question_as_it_is_written():
    (path, *_) = (DATA / "model_answer").glob("vicuna*.jsonl")
    answers = {row["question_id"]: row["choices"][0]["turns"] for row in map(json.loads, path.open(encoding="utf-8"))}
    for question in questions.read_bench(DATA, "gpt-4.jsonl", 80).questions:
        first = answers[question["question_id"]][0].strip()
        asked = messages(mt_bench.conversation(question["turns"], [first]))
        assert [message["content"] for message in asked] == [question["turns"][0], first, question["turns"][1]]


def official_judgments():
    return [json.loads(line) for line in (DATA / "model_judgment/gpt-4_single.jsonl").open(encoding="utf-8")]


@needs_data
def test_the_prompts_are_byte_for_byte_those_that_gpt_4_was_sent():
    """Answers are cut out of the recorded prompts: the first from turn 1 alone, the second from the end of turn 2."""
    bench = questions.read_bench(DATA, "gpt-4.jsonl", 80)
    by_id = {question["question_id"]: question for question in bench.questions}
    rows, first = official_judgments(), {}
    for row in rows:
        if row["turn"] == 1:
            _, answer = row["user_prompt"].split("[The Start of Assistant's Answer]\n", 1)
            first[row["model"], row["question_id"]] = answer.removesuffix("\n[The End of Assistant's Answer]")
    for row in rows:
        question, second = by_id[row["question_id"]], ""
        if row["turn"] == 2:
            asked = f"\n\n### User:\n{question['turns'][1]}\n\n### Assistant A:\n"
            second = row["user_prompt"].rpartition(asked)[2].rpartition("\n\n<|The End of Assistant A's")[0]
        said = [first[row["model"], row["question_id"]], second]
        assert user_prompt(mt_bench.single_request(bench, question, said, row["turn"])) == row["user_prompt"]


@needs_data
def test_the_raw_judgments_of_gpt_4_give_the_known_scores():
    known = {  # turn 1, turn 2, over 80 questions
        "llama2_chat_7b": (6.70625, 5.675),
        "llama2_7b": (4.7625, 3.175),
        "finetune_llama2_chat_7b": (5.3875, 3.8625),
        "finetune_llama2_chat_7b_FFNet": (5.95, 4.2625),
        "finetune_llama2_chat_7b_Attention": (5.89375, 4.4),
    }
    judged = mt_bench.aggregate(DATA / "model_judgment/gpt-4_single.jsonl")
    assert list(judged["rating"]) == [row["score"] for row in official_judgments()]
    table = mt_bench.score_table(mt_bench.ratings(judged))
    assert {model: (row["turn 1"], row["turn 2"]) for model, row in table.iterrows()} == known
    assert (table["questions"] == 80).all()
    for model, (turn_1, turn_2) in known.items():
        assert table.loc[model, "all"] == pytest.approx((turn_1 + turn_2) / 2)

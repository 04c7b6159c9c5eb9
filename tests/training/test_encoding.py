"""Ranked lists as token ids: cuts, rejects, rewards that fit the order."""

import json

import pytest

from deftlib.profile import Text
from deftlib.training import encoding


def ranked(*responses, prompt="w1 w2", rewards=None, name="a"):
    return {"id": name, "prompt": prompt, "responses": list(responses), "rewards": rewards}


def test_a_short_reply_ends_in_one_eos_and_a_long_one_is_cut_without(tokenizer):
    text = Text(prompt_tokens=8, reply_tokens=3)
    (row,) = encoding.encode_lists([ranked(" w1 w2", " w1 w2 w3", " w2 w2 w3 w4 w5")], tokenizer, text)
    w1, w2, w3 = (tokenizer.convert_tokens_to_ids(w) for w in ("w1", "w2", "w3"))
    assert row["response_ids"] == [[w1, w2, tokenizer.eos_token_id], [w1, w2, w3], [w2, w2, w3]]


def test_replies_that_the_cut_makes_equal_are_rejected_wherever_they_stand(tokenizer, tmp_path, capsys):
    lists = [ranked("w1 w2 w3", "w1 w2 w4", name="pair"), ranked("w1 w2", "w2 w3 w4", "w2 w3 w5", name="late")]
    rows = encoding.encode_lists(
        [*lists, ranked("w1", "w2")], tokenizer, Text(reply_tokens=2), tmp_path / "rejects.jsonl"
    )
    assert len(rows) == 1
    assert "rejected 2 lists: 2 two responses differ only behind the cut" in capsys.readouterr().out
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [reject["id"] for reject in rejects] == ["pair", "late"]


def test_a_prompt_is_cut_on_the_left(tokenizer):
    (row,) = encoding.encode_lists([ranked("w5", "w6", prompt="w1 w2 w3 w4")], tokenizer, Text(prompt_tokens=2))
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == ["w3", "w4"]


def test_a_response_without_tokens_is_rejected_with_a_reason_and_the_rest_trains(tokenizer, tmp_path, capsys):
    lists = [ranked("w1", "   ", name="blank"), ranked("w1", "w2", name="good"), ranked("w1", "<eos>", name="eos only")]
    rows = encoding.encode_lists(lists, tokenizer, Text(), tmp_path / "rejects.jsonl")
    assert len(rows) == 1
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert rejects == [{"id": name, "reason": "a response vanishes by truncation"} for name in ("blank", "eos only")]
    assert "rejected 2 lists" in capsys.readouterr().out


def test_nothing_left_to_train_on_is_an_error_that_names_the_setting(tokenizer):
    with pytest.raises(ValueError, match=r"text\.reply_tokens"):
        encoding.encode_lists([ranked("", "w1")], tokenizer, Text())


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [(None, [2, 1, 0]), ([0.1, 0.5, 0.0], [2, 1, 0]), ([3.5, -1.0, -2.0], [3.5, -1.0, -2.0]), ([1, 1, 0], [1, 1, 0])],
)
def test_rewards_that_do_not_fit_the_order_become_ranks(rewards, expected, tokenizer):
    (row,) = encoding.encode_lists([ranked("w1", "w2", "w3", rewards=rewards)], tokenizer, Text())
    assert row["rewards"] == expected

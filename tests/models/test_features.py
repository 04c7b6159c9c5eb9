"""What a frozen backbone makes of replies: by hand, whatever shares a batch, kept, resumed after a kill."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from deftlib import blocks, store
from deftlib.models import features, policies
from deftlib.preferences.lists import FEATURES
from deftlib.profile import Profile

PROMPT = "\n\nHuman: Why?\n\nAssistant:"
REPLIES = [" Please take care.", " No.", " I am happy to help you with that, please take care.", ""]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    return tmp_path


def profile(**more):
    return Profile.load("mini", {f"reward_models.{name}": value for name, value in more.items()})


def test_a_state_is_the_mean_over_the_tokens_of_the_reply_alone():
    reader = features.reader(profile(), "policy")
    found = features.states(reader, [PROMPT] * 3, REPLIES[:3])
    for reply, state in zip(REPLIES, found):
        before, said = reader.encode(PROMPT, reply)
        with torch.no_grad():
            hidden = reader.model(input_ids=torch.tensor([[*before, *said]])).last_hidden_state[0]
        # the state that predicts a token stands one position before it
        expected = hidden[len(before) - 1 : len(before) + len(said) - 1].mean(0)
        assert state == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_who_shares_a_batch_does_not_matter(budget):
    reader = features.reader(profile(score_token_budget=budget), "policy")
    alone = features.states(features.reader(profile(), "policy"), [PROMPT], [REPLIES[2]])
    assert features.states(reader, [PROMPT] * 4, REPLIES)[2] == pytest.approx(alone[0], abs=1e-5)


def test_an_empty_reply_has_a_state_too():
    found = features.states(features.reader(profile(), "policy"), [PROMPT] * 4, REPLIES)
    assert np.isfinite(found).all() and np.abs(found[3]).max() > 0


def test_words_are_counted():
    reader = features.reader(profile(), "words")
    _, said = reader.encode(PROMPT, REPLIES[2])
    (counts,) = features.states(reader, [PROMPT], [REPLIES[2]])
    assert counts.sum() == len(said) and counts[said[0]] == said.count(said[0])


def test_an_encoder_keeps_its_first_token_and_the_reply_and_cuts_the_prompt():
    class Words:
        cls_token_id = 7

        all_special_tokens = ()

        def __call__(self, texts, **how):
            return {"input_ids": [[10 + len(word) for word in text.split()] for text in texts]}

    encode = lambda limit: features._as_encoder(Words(), "aa bbb cccc", "d ee", limit)
    assert encode(9) == ([7, 12, 13, 14], [11, 12])
    assert encode(4) == ([7, 14], [11, 12])
    assert encode(3) == ([7], [11, 12]) and encode(2) == ([7], [11])
    assert features._as_encoder(Words(), "aa bbb cccc", "", 3) == ([7, 14], [])  # its state takes a place of its own


def lists(path, count=5):
    rows = [
        {"id": str(i), "subset": "s", "prompt": PROMPT, "responses": [f" please {i}.", " no."], "rewards": None}
        for i in range(count)
    ]
    Dataset.from_list(rows, features=FEATURES).to_parquet(path)
    return path


def test_an_interrupted_pass_goes_on_after_its_last_block(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    whole, lengths = features.of_lists(profile(), "policy", lists(tmp_path / "whole.parquet"))
    assert lengths.tolist() == [2] * 5 and whole.shape[0] == 10
    asked, real = [], features.states

    def killed_at_the_third(reader, prompts, replies, label):
        asked.append(len(replies))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(reader, prompts, replies, label)

    monkeypatch.setattr(features, "states", killed_at_the_third)
    again = lists(tmp_path / "again.parquet", count=5)
    Dataset.from_parquet(str(again)).map(lambda row: {"id": row["id"] + "x"}).to_parquet(again)
    with pytest.raises(KeyboardInterrupt):
        features.of_lists(profile(), "policy", again)
    states, _ = features.of_lists(profile(), "policy", again)
    assert asked == [4, 4, 2, 2]  # two whole blocks were kept
    assert np.array_equal(states, whole)


def test_another_policy_or_text_has_other_features(tmp_path):
    path = lists(tmp_path / "lists.parquet")
    identity, few = features.identity(profile(), "policy"), {"policy.pretrain_steps": 2}
    others = [features.identity(Profile.load("mini", few | more), "policy") for more in ({}, {"text.reply_tokens": 3})]
    assert identity not in others and others[0] != others[1]
    assert features.identity(profile(), "words") != identity
    assert features.of_lists(profile(), "policy", path)[0].shape[1] == 128
    assert policies.start_policy(profile()) == policies.MINI_START


def test_the_array_of_each_list_is_cut_when_asked_for():
    cut = features.OfLists(np.arange(6.0), [2, 1, 3])
    assert [part.tolist() for part in cut] == [[0, 1], [2], [3, 4, 5]]
    assert [cut[-3].tolist(), cut[-1].tolist()] == [[0, 1], [3, 4, 5]] and len(cut[1:]) == 2
    with pytest.raises(IndexError):
        cut[3]


def test_half_precision_is_kept_as_such_and_under_a_key_of_its_own(tmp_path):
    path, half = lists(tmp_path / "lists.parquet"), Profile.load("mini", {"scale.states": "float16"})
    (single, _), (kept, _) = (features.of_lists(each, "policy", path) for each in (profile(), half))
    assert (single.dtype, kept.dtype) == (np.float32, np.float16) and kept == pytest.approx(single, rel=1e-3, abs=1e-4)


def test_projected_r_dis_is_that_of_kept_states_and_keeps_none(tmp_path, root):
    path, projected = lists(tmp_path / "lists.parquet"), Profile.load("mini", {"scale.states": "projected"})
    q_diff = np.random.default_rng(0).normal(size=len(policies.mini_tokenizer()))
    q_diff -= q_diff.mean()
    found = features.distribution_rewards(projected, path, q_diff)
    assert not list(root.rglob("states.npy"))
    expected = features.distribution_rewards(profile(), path, q_diff)
    assert np.array_equal(found.flat, expected.flat) and [len(of_list) for of_list in found] == [2] * 5

"""Replies and their scores: generation against a loop by hand, where a reply ends, means and paired differences."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import EOS

from deftlib import evaluate, rewards, store
from deftlib.evaluate import by_prompt, compare, first_turn, generate, sigmoid_reward
from deftlib.profile import Generation, Profile, Text

TEXT = Text(prompt_tokens=8, reply_tokens=8)
GREEDY = Generation(max_new_tokens=6, temperature=0.0, samples=1, batch_size=16)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, samples=3)
PROMPTS = ["w3 w4", "w5 w6 w7 w8 w9", "w30", "w11 w12 w13", "w2 w20 w30 w9 w7 w7", "w4"]


@pytest.fixture
def talker(make_model):
    """A random policy that ends some of its replies before the limit."""
    return make_model(seed=4).eval()


def greedy_by_hand(model, tokenizer, prompt):
    ids = tokenizer(prompt)["input_ids"]
    n_prompt = len(ids)
    while len(ids) < n_prompt + GREEDY.max_new_tokens:
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == EOS:
            break
    return tokenizer.decode(ids[n_prompt:], skip_special_tokens=True)


# ---- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_greedy_replies_are_those_of_a_loop_by_hand_whatever_shares_their_batch(talker, tokenizer, batch_size):
    by_hand = [greedy_by_hand(talker, tokenizer, prompt) for prompt in PROMPTS]
    assert len(set(by_hand)) > 1 and any(by_hand)
    generation = dataclasses.replace(GREEDY, batch_size=batch_size)
    assert generate(talker, tokenizer, PROMPTS, TEXT, generation) == [[reply] for reply in by_hand]


def test_a_reply_ends_at_eos_which_is_not_part_of_it(talker, tokenizer):
    lengths = {len(greedy_by_hand(talker, tokenizer, prompt).split()) for prompt in PROMPTS}
    assert min(lengths) < GREEDY.max_new_tokens
    said = generate(talker, tokenizer, PROMPTS, TEXT, GREEDY)
    assert {len(replies[0].split()) for replies in said} == lengths
    assert not any("<eos>" in replies[0] or "<pad>" in replies[0] for replies in said)


def test_a_long_prompt_is_cut_on_the_left(talker, tokenizer):
    short = dataclasses.replace(TEXT, prompt_tokens=2)
    assert generate(talker, tokenizer, ["w9 w9 w9 w3 w4"], short, GREEDY) == generate(
        talker, tokenizer, ["w3 w4"], TEXT, GREEDY
    )


def test_each_prompt_gets_its_samples_and_one_seed_repeats_them(talker, tokenizer):
    first, again, other = (generate(talker, tokenizer, PROMPTS, TEXT, SAMPLED, seed) for seed in (0, 0, 1))
    assert [len(replies) for replies in first] == [3] * len(PROMPTS)
    assert first == again != other
    assert any(len(set(replies)) > 1 for replies in first)


def test_samples_belong_to_the_prompt_they_were_drawn_for(make_model, tokenizer):
    model = make_model().eval()
    greedy = generate(model, tokenizer, PROMPTS, TEXT, GREEDY)
    assert len({replies[0] for replies in greedy}) > 2
    sure = dataclasses.replace(SAMPLED, temperature=1e-4, batch_size=6)  # greedy in effect; two prompts a batch
    assert generate(model, tokenizer, PROMPTS, TEXT, sure) == [replies * 3 for replies in greedy]


def test_sampling_is_from_the_whole_distribution(talker, tokenizer):
    """No top-k or top-p: shares of the first token are those of the softmax."""
    many = Generation(max_new_tokens=1, temperature=1.0, samples=4000, batch_size=4000)
    (said,) = generate(talker, tokenizer, ["w3 w4"], TEXT, many)
    with torch.no_grad():
        ids = tokenizer("w3 w4", return_tensors="pt")["input_ids"]
        probabilities = talker(ids).logits[0, -1].softmax(-1).numpy()
    words = [tokenizer.decode([i], skip_special_tokens=True) for i in range(len(probabilities))]
    shares = np.array([said.count(word) / len(said) for word in words])
    named = [i for i, word in enumerate(words) if word]
    error = np.sqrt(probabilities * (1 - probabilities) / len(said))
    assert (np.abs(shares - probabilities)[named] < 5 * error[named]).all()
    assert (shares[named] > 0).sum() > 30  # top-k 50 could not bite here, top-p 0.9 would


@pytest.mark.parametrize(
    "generated, reply",
    [
        (" Take the train.", " Take the train."),
        (" Take the train.\n\nHuman: And then?\n\nAssistant: Walk.", " Take the train."),
        (" Take the train.\n\nAssistant: Walk.\n\nHuman: No.", " Take the train."),
        (" Take the train. human: And then?", " Take the train."),
        (" Take the train.\nASSISTANT: Walk.", " Take the train."),
        ("\n\nHuman: Hello?", ""),
        (" A human assistant is a human, I say: yes. \n", " A human assistant is a human, I say: yes."),
        (" One.\n\nTwo: three.\n\n- four", " One.\n\nTwo: three.\n\n- four"),
    ],
)
def test_a_reply_ends_where_the_next_turn_begins_and_nowhere_else(generated, reply):
    assert first_turn(generated) == reply


# ---- replies -------------------------------------------------------------------------------------------------------


def test_replies_are_published_once_with_their_scores(talker, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    policy = tmp_path / "policies" / "sft-seed0-0123456789"
    talker.save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    rows = [{"id": f"t{i}", "subset": "s", "prompt": p, "responses": [" w1", " w2"]} for i, p in enumerate(PROMPTS)]

    def produce(folder):
        pd.DataFrame([{**row, "rewards": None} for row in rows]).to_parquet(folder / "test.parquet")

    def score(model, tokenizer, prompts, replies, spec, label):
        scored.append(len(replies))
        return [float(len(reply.split())) for reply in replies]

    scored = []
    monkeypatch.setattr(rewards, "load_reward_model", lambda path: (None, None))
    monkeypatch.setattr(rewards, "score", score)
    parts = store.stage("mini", "parts", {}, produce)
    profile = Profile.load("mini", {"data.source": "given", "generation": vars(SAMPLED), "text": vars(TEXT)})
    frame, again = (evaluate.replies(profile, policy, parts, "someone/r_eval") for _ in range(2))
    pd.testing.assert_frame_equal(frame, again)
    assert scored == [18]
    assert frame["id"].tolist() == [f"t{i}" for i in range(6) for _ in range(3)]
    assert frame["sample"].tolist() == [0, 1, 2] * 6
    assert frame["reply"].tolist() == sum(generate(talker, tokenizer, PROMPTS, TEXT, SAMPLED), [])
    assert frame["reward"].tolist() == [len(reply.split()) for reply in frame["reply"]]
    assert [p.name.rsplit("-", 1)[0] for p in (tmp_path / "build/mini/replies").iterdir()] == ["sft-seed0-seed0"]
    evaluate.replies(profile, policy, parts, "someone/r_eval", seed=1)
    assert scored == [18, 18]


# ---- scores --------------------------------------------------------------------------------------------------------


def test_sigmoid_reward_by_hand():
    assert sigmoid_reward([0.0, np.log(3), -np.log(3)]) == pytest.approx([50, 75, 25])
    assert sigmoid_reward(np.float32([40])).dtype == np.float64


def test_by_prompt_means_the_samples_of_each_prompt_seed_by_seed():
    first = pd.DataFrame({"id": ["b", "a", "b", "a"], "reward": [1.0, 10.0, 3.0, 20.0]})
    second = pd.DataFrame({"id": ["a", "a", "b", "b"], "reward": [0.0, 2.0, 5.0, 5.0]})
    assert by_prompt([first, second], "reward").tolist() == [[15.0, 2.0], [1.0, 5.0]]  # a before b in both
    squared = by_prompt([first], lambda frame: frame["reward"] ** 2)
    assert squared.tolist() == [[250.0, 5.0]]
    assert "value" not in first


def test_compare_takes_the_difference_prompt_by_prompt():
    scores = {"sft": np.array([[1.0, 2.0, 60.0]]), "dpo": np.array([[2.0, 3.0, 61.0]])}
    table = compare(scores, "sft")
    assert list(table.columns) == ["mean", "low", "high", "over sft", "diff low", "diff high", "seeds", "prompts"]
    assert table.loc["dpo", ["over sft", "diff low", "diff high"]].tolist() == [1.0, 1.0, 1.0]  # + 1 on every prompt
    assert table.loc["sft", ["over sft", "diff low", "diff high"]].tolist() == [0.0, 0.0, 0.0]
    assert table.loc["sft", ["mean", "seeds", "prompts"]].tolist() == [21.0, 1, 3]
    assert table.loc["sft", "low"] == 1.0 and table.loc["sft", "high"] == 60.0  # the prompts themselves differ widely
    assert compare(scores, "dpo").loc["sft", "over dpo"] == -1.0


def test_an_interval_leaves_out_zero_only_where_there_is_a_difference():
    rng = np.random.default_rng(0)
    base = rng.normal(50, 10, (3, 40))
    table = compare({"base": base, "better": base + rng.normal(5, 3, base.shape), "same": base + noise(rng)}, "base")
    assert table.loc["better", "diff low"] > 3
    assert table.loc["same", "diff low"] < 0 < table.loc["same", "diff high"]


def noise(rng):
    values = rng.normal(0, 3, (3, 40))
    return values - values.mean()


@pytest.mark.parametrize("baseline", ["start", "sft"])
def test_a_start_policy_of_one_seed_is_compared_with_each_of_three(baseline):
    sft = np.array([[10.0, 30.0], [20.0, 40.0], [30.0, 50.0]])
    table = compare({"start": np.array([[5.0, 5.0]]), "sft": sft}, baseline)
    assert table["seeds"].tolist() == [1, 3]
    other = {"start": "sft", "sft": "start"}[baseline]
    gain = {"start": 25.0, "sft": -25.0}[baseline]  # 30 against 5
    assert table.loc[other, f"over {baseline}"] == gain
    assert table.loc[other, "diff low"] < gain < table.loc[other, "diff high"]
    assert table.loc[baseline, ["diff low", "diff high"]].tolist() == [0.0, 0.0]


def test_two_methods_of_unequal_seeds_are_refused():
    with pytest.raises(ValueError, match="one shape, found"):
        compare({"sft": np.zeros((3, 4)), "dpo": np.ones((2, 4))}, "sft")

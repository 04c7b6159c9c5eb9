"""Replies and their scores, means per subset, paired differences."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import FakeJudge
from warm import forked_workers as forked_workers  # a fixture

from deftlib import store
from deftlib.blocks import BLOCK
from deftlib.evaluation import evaluate
from deftlib.evaluation.evaluate import by_prompt, by_subset, compare, sigmoid_reward
from deftlib.evaluation.metrics import character_bleu
from deftlib.models import policies
from deftlib.models.generation import generate
from deftlib.preferences import mini_world
from deftlib.profile import Profile
from deftlib.sections import Generation, Text

TEXT = Text(prompt_tokens=8, reply_tokens=8)
GREEDY = Generation(max_new_tokens=6, temperature=0.0, samples=1, batch_size=16)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, samples=3)
PROMPTS = ["w3 w4", "w5 w6 w7 w8 w9", "w30", "w11 w12 w13", "w2 w20 w30 w9 w7 w7", "w4"]


@pytest.fixture
def talker(make_model):
    """A random policy that ends some of its replies before the limit."""
    return make_model(seed=4).eval()


# ---- replies -------------------------------------------------------------------------------------------------------


def test_replies_are_published_once_with_their_scores(talker, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    policy = tmp_path / "policies" / "sft-seed0-0123456789"
    talker.save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    rows = [{"id": f"t{i}", "subset": "s", "prompt": p, "responses": [" w1", " w2"]} for i, p in enumerate(PROMPTS)]

    def produce(folder):
        pd.DataFrame([{**row, "rewards": None} for row in rows]).to_parquet(folder / "test.parquet")

    judge = FakeJudge(lambda reply: len(reply.split()))
    monkeypatch.setattr(policies, "start_policy", lambda profile: policy)
    parts = store.stage(Profile.load("mini"), "parts", {}, produce, "training.subset")
    profile = Profile.load("mini", {"data.source": "given", "generation": vars(SAMPLED), "text": vars(TEXT)})
    frame, again = (evaluate.replies(profile, policy, parts, judge) for _ in range(2))
    pd.testing.assert_frame_equal(frame, again)
    assert len(judge.scored) == 18
    assert frame["id"].tolist() == [f"t{i}" for i in range(6) for _ in range(3)]
    assert frame["sample"].tolist() == [0, 1, 2] * 6
    assert frame["reply"].tolist() == sum(generate(talker, tokenizer, PROMPTS, TEXT, SAMPLED), [])
    assert frame["reward"].tolist() == [len(reply.split()) for reply in frame["reply"]]
    assert [p.name.rsplit("-", 1)[0] for p in (tmp_path / "build/mini/replies").iterdir()] == ["sft-seed0"]
    assert frame["bleu"].tolist() == [100 * character_bleu(reply, " w1") for reply in frame["reply"]]
    assert frame["words"].tolist() == frame["reward"].tolist()
    scored = evaluate.with_likelihood(profile, {"sft": [policy]}, {"sft": [frame]})["sft"][0]
    assert np.isfinite(scored["likelihood"]).all() and (scored["likelihood"] < 0).all()
    assert scored.drop(columns="likelihood").equals(frame)
    evaluate.replies(profile, policy, parts, judge, seed=1)
    assert len(judge.scored) == 36


def test_two_processes_score_a_share_each_and_together_what_one_scores(
    talker, make_model, tokenizer, tmp_path, monkeypatch, forked_workers
):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setenv("DEFT_ROOT", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    policy, start = tmp_path / "policy", tmp_path / "start"
    for folder, model in ((policy, talker), (start, make_model(seed=5))):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    rows = [
        {"id": f"t{i}", "subset": "s", "prompt": f"w{1 + i % 30}", "responses": [" w1", " w2"], "rewards": None}
        for i in range(BLOCK // 3 + 2)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "test.parquet")
    monkeypatch.setattr(policies, "start_policy", lambda profile: start)
    few = {"generation": vars(dataclasses.replace(SAMPLED, max_new_tokens=2, batch_size=512)), "text": vars(TEXT)}
    frames, divergences = [], []
    for processes in (1, 2):
        profile = Profile.load("mini", {"data.source": "given", "launch.processes": processes, **few})
        if processes == 2:
            for scored in ("replies", "kl"):  # what was said is kept
                shutil.rmtree(tmp_path / "build/mini" / scored)
            monkeypatch.setattr(policies, "load_policy", lambda *args: pytest.fail("loaded in this process"))
        frames.append(evaluate.replies(profile, policy, tmp_path, FakeJudge()))
        divergences.append(evaluate.divergence(profile, policy, start, frames[-1]))
    assert len(frames[0]) > BLOCK  # more than one block: each process has one
    pd.testing.assert_frame_equal(*frames)
    assert np.array_equal(*divergences) and divergences[0].max() > 0


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


def test_a_row_of_table_2_has_the_mean_of_each_subset_and_the_sample_weighted_total():
    frame = pd.DataFrame({"subset": ["a", "b", "b", "b"], "bleu": [4.0, 0.0, 1.0, 2.0]})
    row = by_subset([frame, frame + pd.DataFrame({"subset": [""] * 4, "bleu": [2.0] * 4})], {"BLEU": "bleu"})
    assert row == {("a", "BLEU"): 5.0, ("b", "BLEU"): 2.0, ("total", "BLEU"): (5.0 + 3 * 2.0) / 4}


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


def test_another_world_makes_other_true_rewards_another_start_policy_and_no_other_scores_elsewhere(
    tmp_path, monkeypatch
):
    keys = []

    def stage(profile_name, name, key, produce, module):
        keys.append(json.dumps([name, key]))
        if not name.startswith("policies/"):
            raise LookupError("asked")
        return tmp_path

    monkeypatch.setattr(store, "stage", stage)
    (tmp_path / "test.parquet").write_bytes(b"lists")

    def asked(world, source):
        keys.clear()
        monkeypatch.setattr(mini_world, "_source", lambda: world)
        profile = Profile.load("mini", {"data.source": source})
        with pytest.raises(LookupError, match="asked"):
            evaluate.replies(profile, tmp_path, tmp_path, FakeJudge())
        with pytest.raises(LookupError, match="asked"):
            evaluate.likelihood(profile, tmp_path, pd.DataFrame({"prompt": ["w1"], "reply": [" w2"]}))
        return list(keys)

    mine, other = asked("one world", "mini"), asked("another world", "mini")
    name = tmp_path.name.partition("-")[0]
    names = [f"replies/{name}", "policies/start", f"likelihood/{name}"]
    assert [json.loads(key)[0].partition("-")[0] for key in mine] == names
    assert mine[0] != other[0] and mine[1] != other[1]
    assert asked("one world", "elsewhere")[0] == asked("another world", "elsewhere")[0]

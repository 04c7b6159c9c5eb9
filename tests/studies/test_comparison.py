"""Methods side by side: rows of the table by hand, what DEFT adds, who lies on the frontier."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from deftlib.evaluation import evaluate
from deftlib.models import policies
from deftlib.profile import Profile
from deftlib.studies import comparison
from deftlib.training import building, subset, train

PROFILE = Profile.load("mini", {"comparison.methods": ["sft", "dpo"], "comparison.seeds": [0, 1]})


def said(rewards, kl=0.0):
    """What `evaluate.replies` gives, for three prompts."""
    frame = pd.DataFrame({"id": list("abc"), "true_reward": rewards, "reward": 0.0, "bleu": 20.0, "words": [3, 4, 5]})
    frame["unknown"] = [0.0, 0.3, 0.6]
    return frame.assign(kl=kl)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Folders with a summary each; training seconds are 100 for SFT, 30 for another; KL is a column of the replies."""

    def fit(profile, method, seed):
        folder = tmp_path / f"{method}-seed{seed}"
        folder.mkdir(exist_ok=True)
        seconds = 100.0 if method == "sft" else 30.0
        (folder / "summary.json").write_text(
            json.dumps({"seconds": seconds + seed, "peak_memory": 2**20 * (5 + seed), "updates": 7})
        )
        return folder

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "summary", lambda folder: json.loads((folder / "summary.json").read_text()))
    monkeypatch.setattr(policies, "start_policy", lambda profile: tmp_path / "start")
    monkeypatch.setattr(
        evaluate, "divergence", lambda p, policy, reference, frame: frame["kl"] / (2 if "sft" in str(reference) else 1)
    )
    return comparison.trained(PROFILE)


def test_every_method_runs_plain_and_as_its_deft_twin_with_all_seeds(runs):
    assert list(runs) == ["start", "sft", "dpo", "deft-sft", "deft-dpo"]
    assert [len(folders) for folders in runs.values()] == [1, 2, 2, 2, 2]
    assert runs["deft-dpo"][1].name == "deft-dpo-seed1"


def test_a_row_of_the_table_by_hand(runs):
    frames = {method: [said([10.0, 20.0, 30.0], kl=2.0)] * len(of) for method, of in runs.items()}
    frames["dpo"] = [said([30.0, 40.0, 50.0], kl=6.0), said([50.0, 60.0, 70.0], kl=8.0)]
    table = comparison.measured(PROFILE, runs, frames)
    row = table.loc["dpo"]
    assert (row["mean"], row["KL"], row["KL from SFT"]) == (50, 7, 3.5)
    assert row["low"] < 50 < row["high"] and row["KL low"] < 7 < row["KL high"]
    assert (row["r_eval"], row["BLEU"], row["words"], row["updates"]) == (50, 20, 4, 7)
    assert row["unknown (%)"] == pytest.approx(30)
    assert (row["seconds"], row["with SFT"], row["peak MB"]) == (30.5, 131.0, 5.5)


def test_only_methods_that_start_from_sft_pay_for_it(runs):
    frames = {method: [said([1.0, 2.0, 3.0])] * len(of) for method, of in runs.items()}
    table = comparison.measured(PROFILE, runs, frames)
    assert table["with SFT"].to_dict() == {"start": 0, "sft": 100.5, "dpo": 131, "deft-sft": 30.5, "deft-dpo": 131}
    assert list(table.index[table["KL from SFT"].notna()]) == ["dpo", "deft-dpo"]


def test_what_deft_adds_is_paired_by_prompt():
    sft = dataclasses.replace(PROFILE, comparison=dataclasses.replace(PROFILE.comparison, methods=["sft"]))
    frames = {"start": [said([0, 0, 0])], "sft": [said([1, 50, 99])], "deft-sft": [said([3, 52, 101])]}
    steps = {"fewer updates": -4, "random lists": -5, "level A": 1}
    frames |= {("sft", name): [said([1 + more, 50 + more, 99 + more])] for name, more in steps.items()}
    effect = comparison.deft_effect(sft, frames)
    assert effect.loc["sft", "DEFT - m"].to_dict() == {"difference": 2, "low": 2, "high": 2, "prompts": 3}
    of_step = effect["difference"].xs("sft").to_dict()
    assert of_step == {"DEFT - m": 2, "fewer updates": -4, "fewer lists": -1, "better lists": 6, "R_dis": 1}
    assert sum(of_step.values()) == 2 * of_step["DEFT - m"]  # the four steps add up to the whole


def test_who_is_behind_the_best_is_paired_by_prompt_and_one_start_stands_for_all_seeds():
    frames = {"start": [said([0, 0, 0])], "sft": [said([1, 50, 99])] * 2, "dpo": [said([3, 52, 101])] * 2}
    behind = comparison.behind_best(PROFILE, frames)
    assert list(behind.index) == ["start", "sft"]
    assert behind.loc["sft"].to_dict() == {"difference": 2, "low": 2, "high": 2, "prompts": 3}
    assert behind.loc["start", "difference"] == 52


def test_the_frontier_by_hand():
    costs, values = [1, 2, 2, 3, 3], [5, 4, 7, 7, 9]
    assert comparison.frontier(costs, values).tolist() == [True, False, True, False, True]
    assert comparison.frontier([1, 1], [2, 2]).tolist() == [True, True]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_whoever_is_not_on_the_frontier_is_beaten_by_one_who_is(points):
    costs, values = np.array(points).T
    best = comparison.frontier(costs, values)
    for i in range(len(points)):
        beats = (costs <= costs[i]) & (values >= values[i]) & ((costs < costs[i]) | (values > values[i]))
        assert best[i] == (not beats.any())
        assert best[i] or (beats & best).any()


@pytest.fixture
def graded(tmp_path, make_model, tokenizer, monkeypatch):
    """Level A of two lists, q_diff and a start policy, as `comparison.overhead` finds them."""
    make_model().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    counts = np.arange(40), np.arange(40)[::-1].copy()
    subset.save_q_diff(tmp_path / "q_diff.npz", *counts, policies.fingerprint(tokenizer))
    rows = [{"id": i, "prompt": "w1 w2", "responses": ["w3 w4", "w5"], "rewards": [1.0, 0.0]} for i in "ab"]
    lists = Dataset.from_list([row | {"level": "A"} for row in rows])
    found = subset.Graded(tmp_path, lists, None, None, None)
    monkeypatch.setattr(subset, "graded", lambda profile, grading: found)
    monkeypatch.setattr(policies, "start_policy", lambda profile: tmp_path / "start")


def test_what_r_dis_costs_is_measured_in_turns_on_one_batch(graded, monkeypatch):
    passes = []

    def seconds(trainer, compute_loss, batch):
        guided = compute_loss.__qualname__.startswith("DistributionGuided.")
        passes.append((guided, trainer.omega, id(batch)))
        compute_loss(trainer.model, batch).backward()
        return 0.25 if guided else 0.2

    monkeypatch.setattr(comparison, "_seconds_of_pass", seconds)
    row = comparison.overhead(PROFILE, methods=["dpo"], rounds=3).loc["dpo"]
    assert row[["plain ms", "DEFT ms", "added (%)", "low", "high"]].tolist() == pytest.approx([200, 250, 25, 25, 25])
    turns = [False, True, True, False] * 2 + [False, True] + [False, True]  # three rounds, two that warm up, memory
    assert passes == [(guided, 1.0, passes[0][2]) for guided in turns]
    assert row[["plain MB", "DEFT MB"]].notna().all()


def test_trl_trainers_and_ours_are_timed(graded):
    table = comparison.overhead(PROFILE, methods=["sft", "pro"], rounds=2)
    assert list(table.index) == ["sft", "pro"]
    assert (table[["plain ms", "DEFT ms"]] > 0).all().all()


def test_a_method_that_does_not_fit_one_device_has_an_empty_row_and_the_others_are_measured(
    graded, monkeypatch, capsys
):
    build = building.build

    def too_large(folder, profile, method, *given):
        if method == "dpo":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(folder, profile, method, *given)

    monkeypatch.setattr(building, "build", too_large)
    table = comparison.overhead(PROFILE, methods=["sft", "dpo"], rounds=2)
    assert table.loc["dpo"].isna().all() and table.loc["sft"].notna().all()
    assert "a pass of dpo does not fit one device: not measured" in capsys.readouterr().out


def test_a_pass_is_measured_as_training_makes_it(graded, monkeypatch):
    """Under checkpointing too, which `train()` alone would turn on."""
    checkpointed = []

    def seconds(trainer, compute_loss, batch):
        checkpointed.append(trainer.model.is_gradient_checkpointing)
        return 1.0

    monkeypatch.setattr(comparison, "_seconds_of_pass", seconds)
    for wanted in (False, True):
        profile = Profile.load("mini", {"training.gradient_checkpointing": wanted})
        comparison.overhead(profile, methods=["sft"], rounds=2)
        assert set(checkpointed) == {wanted}
        checkpointed.clear()

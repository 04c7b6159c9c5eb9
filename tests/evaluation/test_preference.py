"""Preference accuracy by hand: the log-ratio to the start policy ranks y_1 above y_l, or it does not."""

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from deftlib import store
from deftlib.evaluation import metrics, preference
from deftlib.models import policies
from deftlib.preferences.lists import FEATURES
from deftlib.profile import Profile

SUBSETS = ["harmless-base", "helpful-base", "helpful-base"]


def likelihoods(sum_1, sum_l, tokens_1=(2, 2, 2), tokens_l=(1, 2, 4)):
    columns = {"sum_1": sum_1, "tokens_1": tokens_1, "sum_l": sum_l, "tokens_l": tokens_l}
    return pd.DataFrame({"id": list("abc"), "subset": SUBSETS, **columns})


@pytest.fixture
def known(monkeypatch):
    """Log-likelihoods of three policies on three pairs."""
    table = {
        "start": likelihoods([-4.0, -4.0, -4.0], [-3.0, -4.0, -8.0]),
        "one": likelihoods([-3.0, -4.0, -5.0], [-3.0, -4.0, -8.0]),  # raised, the same, lowered
        "two": likelihoods([-9.0, -3.0, -4.0], [-9.0, -4.0, -9.0]),  # y_l lowered more than y_1; raised; y_l lowered
    }
    monkeypatch.setattr(preference, "likelihoods", lambda profile, policy, parts: table[policy])
    monkeypatch.setattr(policies, "start_policy", lambda profile: "start")


def test_the_log_ratio_to_the_start_policy_decides_and_a_tie_is_half_right(known):
    right = preference.right(Profile.load("mini"), ["one", "two"], None)
    assert right["harmless"].tolist() == [[1.0], [1.0]]
    assert right["helpful"].tolist() == [[0.5, 0.0], [1.0, 1.0]]


def test_by_mean_log_probability_no_start_policy_is_asked(known):
    right = preference.right(Profile.load("mini"), ["start"], None, preference.LOG_PROBABILITY)
    assert right["harmless"].tolist() == [[1.0]]  # -4 of 2 tokens against -3 of 1
    assert right["helpful"].tolist() == [[0.5, 0.5]]


def test_the_start_policy_ties_with_itself(known):
    right = preference.right(Profile.load("mini"), ["start"], None)
    assert (right["harmless"] == 0.5).all() and (right["helpful"] == 0.5).all()


def test_likelihoods_are_those_of_the_metric_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    replies = [[" Please take care.", " No."], [" I am happy to help.", " Go away, please."]]
    long = " please" * 64
    replies.append([f"{long} take care.", f"{long} go away."])  # the same, as far as a policy reads
    rows = [
        {"id": str(i), "subset": "s", "prompt": f"\n\nHuman: {i}?\n\nAssistant:", "responses": r, "rewards": None}
        for i, r in enumerate(replies)
    ]
    save = lambda folder: Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "dev.parquet")
    profile = Profile.load("mini")
    parts = store.stage(profile, "parts", {}, save, "training.subset")
    start = policies.start_policy(profile)
    found = preference.likelihoods(profile, start, parts)
    model, tokenizer = policies.load_policy(start), policies.load_tokenizer(start)
    assert found["id"].tolist() == ["0", "1"]
    prompts = [row["prompt"] for row in rows[:2] for _ in range(2)]
    means = metrics.start_log_likelihood(model, tokenizer, prompts, sum(replies[:2], []), profile.text)
    assert (found["sum_1"] / found["tokens_1"]).tolist() == pytest.approx(means[0::2], abs=1e-4)
    assert (found["sum_l"] / found["tokens_l"]).tolist() == pytest.approx(means[1::2], abs=1e-4)
    monkeypatch.setattr(preference, "_log_likelihoods", lambda *_: pytest.fail("computed again"))
    assert preference.likelihoods(profile, start, parts).equals(found)
    assert np.isfinite(found["sum_1"]).all()

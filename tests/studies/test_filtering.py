"""Which lists teach most: choices of one size, learned from and tested on others."""

import numpy as np
import pytest
from datasets import Dataset

from deftlib import store
from deftlib.intervals import paired_interval
from deftlib.profile import Profile
from deftlib.studies import filtering
from deftlib.training import subset


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The study on the mini world's first lists, three draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ROOT", tmp_path_factory.mktemp("study"))
        profile = Profile.load("mini", {"filtering": {"draws": 3, "shares": [50.0]}})
        yield filtering.right_by_choice(profile, subset.parts(profile))


def test_every_choice_share_and_axis_has_its_draws_and_pairs(learned):
    names = {(c, s, a) for c in filtering.CHOICES for s in (25.0, 50.0) for a in ("harmless", "helpful")}
    assert learned.keys() == names
    assert all(values.shape[0] == 3 and set(np.unique(values)) <= {0.0, 0.5, 1.0} for values in learned.values())
    assert learned["random", 25.0, "helpful"].shape == learned["level A", 50.0, "helpful"].shape


def test_in_the_mini_world_the_lists_of_lowest_r_dis_are_mislabelled_and_teach_the_opposite(learned):
    gap = paired_interval(learned["lowest R_dis", 25.0, "helpful"], learned["random", 25.0, "helpful"])
    assert gap.high < -0.2
    assert learned["level A", 25.0, "helpful"].mean() > 0.75


def test_choices_are_of_one_size_in_each_subset():
    subsets = np.array(["a"] * 10 + ["b"] * 30)
    kept = filtering._keep(np.arange(40.0), subsets, share=20)
    assert np.flatnonzero(kept).tolist() == [8, 9, 34, 35, 36, 37, 38, 39]


def test_half_of_each_subset_is_drawn_and_another_draw_is_another_half():
    subsets = np.array(["a"] * 10 + ["b"] * 31)
    halves = [filtering._half(subsets, draw) for draw in (0, 0, 1)]
    assert [sum(subsets[half] == "a") for half in halves] == [5, 5, 5] and len(halves[0]) == 20
    assert halves[0].tolist() == halves[1].tolist() != halves[2].tolist()


def test_what_was_counted_and_chosen_from_was_not_seen_by_the_grader_nor_by_the_test(tmp_path, monkeypatch):
    """r_train learned from none of the pool, and dev is in no part that anything learns from."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    profile = Profile.load("mini")
    parts = subset.parts(profile)
    ids = {
        name: set(Dataset.from_parquet(str(parts / f"{name}.parquet"))["id"])
        for name in (*filtering.POOL, "reward_train", "dev")
    }
    pool = ids["pool"] | ids["reward_eval"]
    assert not pool & ids["reward_train"] and not pool & ids["dev"]


def test_a_finished_r_eval_has_no_part_to_choose_from(tmp_path):
    (tmp_path / "pool.parquet").touch()
    assert filtering._pool_paths(tmp_path) == [tmp_path / "pool.parquet"]


def test_a_handful_of_lists_teaches_nothing():
    assert filtering._learn(np.ones((9, 2)), np.ones((4, 2)), draw=0).tolist() == [0.5] * 4
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=(60, 3)) + [1.5, 0, 0]
    assert filtering._learn(gaps, rng.normal(size=(80, 3)) + [1.5, 0, 0], draw=0).mean() > 0.8

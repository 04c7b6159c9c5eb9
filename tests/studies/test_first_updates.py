"""Twenty updates of a method: what they rest on is in their key."""

import pytest

from deftlib import store
from deftlib.models import policies, rewards
from deftlib.profile import Profile
from deftlib.studies import first_updates
from deftlib.training import subset


class Asked(Exception):
    """The key that a stage was asked for with."""


@pytest.fixture
def key_of(tmp_path, monkeypatch):
    def stage(profile_name, name, key, produce, module):
        raise Asked(key)

    monkeypatch.setattr(store, "stage", stage)
    monkeypatch.setattr(policies, "start_policy", lambda profile: tmp_path)
    monkeypatch.setattr(subset, "parts", lambda profile: tmp_path)
    finished = lambda profile, which, parts: rewards.Judge(profile, which, "someone/r_train", parts)
    monkeypatch.setattr(rewards, "judge", finished)
    monkeypatch.setattr(first_updates, "own_lists", lambda profile: ListOfNone())

    def ask(method):
        with pytest.raises(Asked) as asked:
            first_updates.measured(Profile.load("smol"), method, "hh-rlhf")
        return asked.value.args[0]

    return ask


class ListOfNone:
    def to_list(self):
        return []


def test_rloo_rests_on_its_reward_model_and_other_methods_do_not(key_of, hub):
    before, of_dpo = key_of("deft-rloo"), key_of("dpo")
    hub["someone/r_train"] = 40 * "a"
    assert key_of("deft-rloo") != before and key_of("dpo") == of_dpo


@pytest.mark.parametrize("setting", ["text_format", "max_tokens"])
def test_rloo_rests_on_how_its_reward_model_reads(key_of, setting, monkeypatch):
    before = key_of("rloo")
    other = {"text_format": "oasst", "max_tokens": 77}[setting]
    load = Profile.load
    monkeypatch.setattr(Profile, "load", lambda name: load(name, {f"reward_models.train.{setting}": other}))
    assert key_of("rloo") != before


def test_the_ends_of_a_long_list_are_kept():
    replies = list("abcdefghij")
    assert first_updates._at_most(8, replies) == list("abcdefgj")
    assert first_updates._at_most(8, replies[:3]) == replies[:3]

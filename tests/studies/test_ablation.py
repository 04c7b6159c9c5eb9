"""The runs behind Table 3 and the sweeps: which lists are chosen, which runs are shared, what is compared."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, Features, List, Value

from deftlib import store
from deftlib.models import policies
from deftlib.preferences import mini_world
from deftlib.preferences.lists import read_lists
from deftlib.profile import Profile
from deftlib.sections import Omega
from deftlib.studies import ablation
from deftlib.training import subset, train

LISTS = Features(
    {name: Value("string") for name in ("id", "subset", "prompt")}
    | {"responses": List(Value("string")), "rewards": List(Value("float64")), "level": Value("string")}
)
TRUE = {f"{name} reply {i}": float(10 * i + k) for i in range(8) for k, name in enumerate(("third", "second", "first"))}
TRUE["first reply 7"] = 0.0  # the annotators were wrong about list 7, whose other replies are the best of all


def rows():
    """Eight lists of three in two subsets: level A is lists 2 and 4 of "helpful" (even), list 3 of "harmless" (odd)."""
    return [
        {"id": f"list-{i}", "subset": ("helpful", "harmless")[i % 2], "prompt": f"prompt {i}"}
        | {"responses": [f"{name} reply {i}" for name in ("first", "second", "third")], "rewards": [2.0, 1.0, 0.0]}
        | {"level": "A" if i in (2, 3, 4) else "B"}
        for i in range(8)
    ]


@pytest.fixture(autouse=True)
def graded(tmp_path, monkeypatch):
    """What `subset.graded` gives for every profile and grading, published in an empty project."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    lists = Dataset.from_list(rows(), features=LISTS)
    folder = store.stage(
        Profile.load("mini"),
        "graded/reward",
        {},
        lambda folder: lists.to_parquet(folder / "lists.parquet"),
        "training.subset",
    )
    found = subset.Graded(folder, lists, None, None, None)
    monkeypatch.setattr(subset, "graded", lambda profile, grading: found)
    monkeypatch.setattr(mini_world, "true_reward", lambda prompt, reply: TRUE[reply])
    return found


@pytest.fixture
def profile():
    return Profile.load("mini")


@pytest.fixture(autouse=True)
def scored(monkeypatch):
    monkeypatch.setattr(subset, "scored", lambda profile: Path("scored-0123456789"))


def asked(runs):
    """What each run asks `train.fit` for: its lists by their stage's name, and what it leaves to `fit`."""
    left = {"profile": None, "grading": None, "omega": None, "lists": None}
    whole = {name: left | run for name, run in runs.items()}
    stage = lambda path: path and path.parent.name.rpartition("-")[0]
    return {name: run | {"lists": stage(run["lists"])} for name, run in whole.items()}


def chosen(path):
    return sorted(read_lists(path)["id"])


# ---- choices of lists --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", range(5))
def test_random_lists_are_as_many_of_each_subset_as_level_a(profile, draw):
    assert Counter(read_lists(ablation.random_lists(profile, draw))["subset"]) == {"helpful": 2, "harmless": 1}


def test_another_draw_is_another_choice_and_level_a_takes_part(profile):
    draws = {tuple(chosen(ablation.random_lists(profile, draw))) for draw in range(20)}
    assert len(draws) > 10
    assert {"list-2", "list-3", "list-4"} & {name for draw in draws for name in draw}
    assert chosen(ablation.random_lists(profile, 3)) == chosen(ablation.random_lists(profile, 3))


def test_a_larger_random_choice_contains_the_smaller(profile, graded, monkeypatch):
    few = chosen(ablation.random_lists(profile, draw=1))
    more = Dataset.from_list([{**row, "level": "A" if i < 6 else "B"} for i, row in enumerate(rows())], features=LISTS)
    folder = store.stage(
        Profile.load("mini"),
        "graded/more",
        {},
        lambda folder: more.to_parquet(folder / "lists.parquet"),
        "training.subset",
    )
    monkeypatch.setattr(subset, "graded", lambda *_: graded._replace(folder=folder, lists=more))
    assert set(few) < set(chosen(ablation.random_lists(profile, draw=1)))


def test_the_truly_best_lists_have_the_best_first_reply_and_annotators_who_saw_it(profile):
    assert chosen(ablation.truly_best_lists(profile)) == ["list-4", "list-5", "list-6"]  # 7 is mislabelled


def test_lists_that_annotators_got_wrong_come_last_however_good_their_first_reply(profile, monkeypatch):
    monkeypatch.setitem(TRUE, "second reply 6", 99.0)
    monkeypatch.setitem(TRUE, "second reply 4", 99.0)
    monkeypatch.setitem(TRUE, "second reply 2", 99.0)
    assert chosen(ablation.truly_best_lists(profile)) == ["list-0", "list-5", "list-6"]


def test_nobody_knows_the_truly_best_lists_of_another_source():
    with pytest.raises(ValueError, match=r"only the mini world knows true rewards, data\.source is 'hh-rlhf'"):
        ablation.truly_best_lists(Profile.load("smol"))


def test_lists_are_cut_between_the_first_and_the_last_response(profile):
    lists = read_lists(ablation.shorter_lists(profile, 2))
    assert lists["id"][:] == ["list-2", "list-3", "list-4"]
    assert lists["responses"][0] == ["first reply 2", "third reply 2"]
    assert lists["rewards"][0] == [2.0, 0.0]
    assert read_lists(ablation.shorter_lists(profile, 3))["responses"][0] == rows()[2]["responses"]


@pytest.mark.parametrize("length", [1, 4])
def test_a_list_is_not_cut_to_what_it_does_not_have(profile, length):
    with pytest.raises(ValueError, match=f"list list-2 has 3 responses and cannot be cut to {length}"):
        ablation.shorter_lists(profile, length)


def test_a_choice_is_published_with_a_card_that_counts_it(profile):
    card = (ablation.truly_best_lists(profile).parent / "README.md").read_text()
    assert card.startswith("# The truly best lists, of level A's size\n")
    assert "| harmless | B | 1 |\n| helpful | A | 1 |\n| helpful | B | 1 |" in card
    assert "HH-RLHF contains offensive text" in card


# ---- runs --------------------------------------------------------------------------------------------------------


def test_table_3_changes_one_thing_at_a_time(profile):
    runs = asked(ablation.controls(profile, "deft-pro", seed=2))
    assert all(run["profile"] is None and run["seed"] == 2 and run["grading"] is None for run in runs.values())
    assert {name: (run["method"], run["lists"], run["omega"]) for name, run in runs.items()} == {
        "DEFT": ("deft-pro", None, None),
        "without D_A": ("deft-pro", "scored", None),
        "without R_dis": ("deft-pro", None, 0.0),
        "without both": ("pro", None, None),
        "random A": ("deft-pro", "random-draw2", None),
        "random A without R_dis": ("deft-pro", "random-draw2", 0.0),
        "agreement filter": ("deft-pro", "agreement", None),
        "annotation order": ("deft-pro", "reward", None),
        "truly best A": ("deft-pro", "truly-best", None),
    }


def test_another_world_has_other_truly_best_lists(profile, monkeypatch):
    before = ablation.truly_best_lists(profile)
    assert ablation.truly_best_lists(profile) == before
    monkeypatch.setattr(mini_world, "digest", lambda: "another world")
    assert ablation.truly_best_lists(profile) != before


def test_outside_the_mini_world_table_3_has_no_truly_best_lists_and_pairs_have_one_order():
    variants = ablation.controls(Profile.load("smol"), "deft-dpo").keys()
    assert "agreement filter" in variants and not {"truly best A", "annotation order"} & variants


def test_the_agreement_filter_goes_by_the_reward_of_the_annotators_first(profile, graded, monkeypatch):
    asked = []
    monkeypatch.setattr(subset, "graded", lambda profile, grading: asked.append(profile.data.rank_by) or graded)
    first = [row["rewards"][0] for row in rows()]
    best = sorted(range(len(first)), key=lambda i: -first[i])
    found = chosen(ablation.agreement_lists(profile))
    assert "annotation" in asked and len(found) == len(graded.level_a) and f"list-{best[0]}" in found


def test_omega_is_swept_in_three_readings_and_over_decades_and_the_profiles_own_is_not_trained_twice():
    swept = Profile.load("mini", {"ablation.ratios": [3.0, 0.3]})
    runs = {name: run["omega"] for name, run in ablation.omegas(swept, "deft-dpo").items()}
    assert runs == {
        "omega 0": 0.0,
        "published": Omega("published", 2.5e-6),
        "counts": Omega("counts", 2.5e-6),
        "ratio 0.03": None,
        "ratio 0.3": Omega("ratio", 0.3),
        "ratio 3": Omega("ratio", 3.0),
    }


def test_a_profile_that_trains_with_the_printed_omega_shares_that_run():
    runs = ablation.omegas(Profile.load("paper"), "deft-pro")
    assert [runs[name]["omega"] for name in ("omega 0", "published")] == [0.0, None]


def test_the_printed_omegas_are_those_of_appendix_a1():
    path = Path(__file__).parents[2] / "data" / "published.json"
    printed = json.loads(path.read_text(encoding="utf-8"))["anonymous"]["tableA1_hyperparameters"]
    assert dict(zip(map(str.lower, printed["columns"]), printed["omega"])) == ablation.PRINTED_OMEGA


def test_both_ends_of_r_dis_are_graded_and_random_lists_get_its_q_diff(profile):
    runs = asked(ablation.gradings(profile, "deft-dpo", 1))
    direction = lambda run: (run["profile"] or profile).grading.direction
    assert {name: (run["grading"], direction(run), run["lists"]) for name, run in runs.items()} == {
        "highest reward": ("reward", "lowest", None),
        "lowest R_dis": ("distribution", "lowest", None),
        "highest R_dis": ("distribution", "highest", None),
        "random": ("distribution", "lowest", "random-draw1"),
    }
    assert runs["lowest R_dis"]["profile"] == profile


def test_data_volume_ends_with_all_lists_and_has_random_lists_beside_every_level_a():
    swept = Profile.load("mini", {"ablation.tops": [50.0, 5.0]})
    volumes = asked(ablation.volumes(swept, "deft-dpo"))
    for line, lists in (("level A", None), ("random lists", "random-draw0")):
        runs = {share: run for (of, share), run in volumes.items() if of == line}
        assert {share: ((run["profile"] or swept).grading.top, run["lists"]) for share, run in runs.items()} == {
            5.0: (5.0, lists),
            25.0: (25.0, lists),
            50.0: (50.0, lists),
            100.0: (25.0, "scored"),
        }


def test_where_r_dis_grades_first_the_data_volume_is_the_share_it_keeps():
    final = Profile.load("mini", {"training.gradings": ["distribution", "reward"], "ablation.tops": [10.0]})
    runs = asked(ablation.volumes(final, "deft-dpo"))
    runs = {name: (run["profile"] or final).grading for name, run in runs.items()}
    kept = {share: grading.keep for (line, share), grading in runs.items() if line == "level A"}
    assert kept == {10.0: 10.0, 25.0: 25.0, 100.0: 25.0}
    assert {grading.top for grading in runs.values()} == {25.0}


def test_c_changes_level_c_alone():
    swept = Profile.load("mini", {"ablation.bottoms": [50.0]})
    runs = list(ablation.bottoms(swept, "deft-dpo").values())
    assert [run["profile"].grading.bottom for run in runs] == [12.5, 50.0]
    assert {run["profile"].grading.top for run in runs} == {25.0}


def test_lists_at_their_own_length_are_level_a_itself():
    swept = Profile.load("mini", {"ablation.lengths": [2, 3]})
    runs = asked(ablation.lengths(swept, "deft-pro"))
    assert {length: run["lists"] for length, run in runs.items()} == {2: "2-responses", 3: None}


def test_shared_runs_are_one_folder_of_train_fit(profile, monkeypatch):
    """With the real `fit`: the same settings, the same name and key."""
    monkeypatch.setattr(store, "digest", str)
    monkeypatch.setattr(policies, "start_policy", lambda profile: "start")
    monkeypatch.setattr(policies, "identity", str)
    for name in ("scored", "counted"):
        monkeypatch.setattr(subset, name, lambda profile, name=name: Path(name))
    stage = lambda profile_name, name, key, *_: Path(f"{name}-{store.content_key(key)[:10]}")
    monkeypatch.setattr(store, "stage", stage)
    own, without = train.fit(profile, "deft-dpo"), train.fit(profile, "deft-dpo", omega=0.0)
    fitted = lambda study: train.fit_all(profile, study(profile, "deft-dpo"))
    controls, omegas, volumes = map(fitted, (ablation.controls, ablation.omegas, ablation.volumes))
    assert own == controls["DEFT"] == omegas["ratio 0.03"] == volumes["level A", 25.0]
    assert own == fitted(ablation.gradings)["highest reward"]
    assert without == controls["without R_dis"] == omegas["omega 0"]
    assert controls["without both"] == train.fit(profile, "dpo")
    assert controls["without D_A"] == volumes["level A", 100.0] == volumes["random lists", 100.0]
    assert controls["random A"] == volumes["random lists", 25.0]
    assert len({*controls.values()}) == 9 and len({*omegas.values()}) == len(omegas)


# ---- comparison --------------------------------------------------------------------------------------------------


def replies(rewards, **columns):
    ids = [f"t{i}" for i in range(len(rewards))]
    return pd.DataFrame({"id": ids, "reward": rewards, "words": 3, "true_reward": 50.0} | columns)


def test_a_comparison_shows_the_price_beside_the_paired_difference():
    frames = {
        "none": [replies([0.0, 0.0], unknown=0.0)],
        "strong": [replies([0.0, np.log(3)], words=[5, 9], true_reward=[40.0, 50.0], unknown=[0.5, 0.0])],
    }
    table = ablation.compared(frames, "none", "true_reward")
    strong = table.loc["strong"]
    assert strong[["mean", "over none", "words", "unknown (%)"]].tolist() == [45.0, -5.0, 7.0, 25.0]
    assert strong["r_eval"] == pytest.approx((50 + 75) / 2)
    assert table["over none"]["none"] == 0 and table["prompts"].tolist() == [2, 2]


def test_outside_the_mini_world_there_is_no_share_of_unknown_sentences():
    table = ablation.compared({"a": [replies([1.0, 2.0])]}, "a", "reward")
    assert "unknown (%)" not in table and table.loc["a", "mean"] == 1.5


def test_lists_are_cut_only_to_lengths_that_all_of_them_have(monkeypatch):
    level_a = {"responses": [["a", "b"], ["a", "b", "c"]]}
    monkeypatch.setattr(ablation.subset, "graded", lambda profile, grading: SimpleNamespace(level_a=level_a))
    profile = Profile.load("mini", {"ablation.lengths": [2, 3, 4]})
    assert ablation.lengths_at_hand(profile) == [2]

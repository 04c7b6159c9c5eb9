"""Where every artefact comes from, and what is recorded of each claim."""

import dataclasses
import json
import shutil
from functools import partial

import matplotlib
import numpy as np
import pandas as pd
import places
import pytest

matplotlib.use("Agg")

from deftlib import provenance, store
from deftlib.intervals import Interval, Samples
from deftlib.profile import Profile
from deftlib.reporting import records, report

RNG = np.random.default_rng(0)
CLEAR, NOTHING = (Samples(RNG.normal(mean, 1, size=(3, 40))) for mean in (5.0, 0.0))
FASTER, SLOWER = Samples([[2.0], [2.1], [1.9]]), Samples([[3.0], [3.1], [2.9]])
TRUTH = {"name": "true reward"}


profile = places.profile
FRAME = pd.DataFrame({"BLEU": [1.23456, 2.0]}, index=pd.Index(["sft", "dpo_x"], name="method"))


def published(profile, name, commit, seconds, monkeypatch):
    """A stage as it was published some time ago, at another commit, and asked for by this process."""
    old = {
        "created": "2026-01-02T03:04:05+00:00",
        "git": {"commit": commit, "dirty": False},
        "packages": {"torch": "1"},
    }
    monkeypatch.setattr(store, "provenance", lambda: provenance.provenance() | old | {"device": "CPU of old"})
    asked = partial(store.stage, profile, name, {}, lambda folder: None, "method.grading")
    manifest = asked() / store.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"seconds": seconds}))
    asked()
    return list(store.used(profile))[-1]


def test_a_table_lists_the_stages_it_rests_on_with_what_made_them_and_not_the_moment_of_drawing(
    profile, tmp_path, monkeypatch
):
    monkeypatch.setattr(store, "USED", {})
    first = published(profile, "policies/sft", "a" * 40, 75.0, monkeypatch)
    report.save_table(profile, "before", FRAME, title="A title", notebook="03_training")
    second = published(profile, "replies/sft", "b" * 40, 5.0, monkeypatch)
    report.save_table(profile, "after", FRAME, title="A title", notebook="03_training")
    recorded = records.recorded_provenance(tmp_path / "mini/provenance.json")
    assert [recorded["artefacts"][name]["stages"] for name in ("before", "after")] == [[first], [first, second]]
    record = recorded["stages"][first]
    assert (record["git"]["commit"], record["packages"], record["device"]) == ("a" * 40, {"torch": "1"}, "CPU of old")
    assert (record["seconds"], record["created"]) == (75.0, "2026-01-02T03:04:05+00:00")
    line = records.made_with(list(recorded["stages"].values()))
    assert line.startswith("2 stages of 80 s; 2026-01-02; commit aaaaaaaaaa and commit bbbbbbbbbb; CPU of old")


def test_a_stage_made_anew_under_its_key_does_not_take_the_place_of_the_one_a_table_rests_on(
    profile, tmp_path, monkeypatch
):
    monkeypatch.setattr(store, "USED", {})
    first = published(profile, "policies/sft", "a" * 40, 75.0, monkeypatch)
    report.save_table(profile, "before", FRAME, title="A title", notebook="03_training")
    shutil.rmtree(tmp_path / "build" / "mini" / "policies")
    again = published(profile, "policies/sft", "b" * 40, 5.0, monkeypatch)
    report.save_table(profile, "after", FRAME, title="A title", notebook="04_evaluation")
    recorded = records.recorded_provenance(tmp_path / "mini/provenance.json")
    assert first.partition("@")[0] == again.partition("@")[0] and first != again
    assert [recorded["artefacts"][name]["stages"] for name in ("before", "after")] == [[first], [again]]
    commits = [recorded["stages"][stage]["git"]["commit"] for stage in (first, again)]
    assert commits == ["a" * 40, "b" * 40]


def test_two_settings_in_one_process_rest_on_their_own_stages(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "USED", {})
    other = Profile.load("mini", {"grading.top": 10})
    theirs = published(other, "graded/reward", "a" * 40, 1.0, monkeypatch)
    ours = published(profile, "policies/sft", "a" * 40, 1.0, monkeypatch)
    report.save_table(profile, "table9", FRAME, title="A title", notebook="03_training")
    assert list(records.recorded_provenance(tmp_path / "mini/provenance.json")["stages"]) == [ours] != [theirs]


def test_what_was_recorded_before_the_profiles_file_was_edited_says_so_and_counts_for_nothing(
    profile, tmp_path, monkeypatch
):
    report.save_table(profile, "table9", FRAME, title="A title", notebook="03_training")
    records.save_claim(profile, "data-volume", CLEAR, "06_ablation", judge=TRUTH)
    edited = dataclasses.replace(profile, seeds=[7], written="edited")  # as the file says by now
    assert edited.label == "mini"
    records.save_claim(edited, "training-time", FASTER, "04_evaluation")
    recorded = records.recorded_provenance(tmp_path / "mini/provenance.json")
    assert recorded["settings"] == edited.written != recorded["artefacts"]["table9"]["settings"]
    page = (tmp_path / "mini/claims.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| data-volume |"))
    assert "not tested: recorded before the profile's file was edited: run its notebook again" in row
    records.save_claim(edited, "data-volume", CLEAR, "06_ablation", judge=TRUTH)
    assert "recorded before" not in (tmp_path / "mini/claims.md").read_text()


def test_a_table_of_a_command_says_its_own_options_too(profile, tmp_path):
    report.save_table(profile, "t", FRAME, "A title", "first_updates", seeds=[0], options="--methods sft")
    entry = records.recorded_provenance(tmp_path / "mini/provenance.json")["artefacts"]["t"]
    assert entry["command"] == "deft first-updates --profile mini --methods sft" and entry["seeds"] == [0]


def test_a_stage_that_nothing_rests_on_any_more_is_forgotten(profile, tmp_path, monkeypatch):
    for name in ("old", "new"):
        monkeypatch.setattr(store, "USED", {})
        stage = published(profile, name, "a" * 40, 1.0, monkeypatch)
        report.save_table(profile, "table9", FRAME, title="A title", notebook="03_training")
    assert list(records.recorded_provenance(tmp_path / "mini/provenance.json")["stages"]) == [stage]


def test_each_setting_has_a_folder_of_its_own_with_its_profile_and_the_full_command(profile, tmp_path):
    one = Profile.load("mini", {"grading.top": 10, "data.source": "/data/my lists.jsonl"})
    other = Profile.load("mini", {"grading.top": 12.5, "data.source": "/data/my lists.jsonl"})
    for each in (profile, one, other):
        report.save_table(each, "table9", FRAME, title="A title", notebook="03_training")
        records.save_claim(each, "training-time", None, "04_evaluation", note="not today")
    folders = {path.name for path in tmp_path.iterdir()} - {"build"}
    assert folders == {"mini", one.label, other.label} and one.label.startswith(
        "mini,data.source=my-lists.jsonl,grading.top=10.0,"
    )
    assert "top: 10.0" in (tmp_path / one.label / "profile.yaml").read_text()
    made = records.recorded_provenance(tmp_path / one.label / "provenance.json")["artefacts"]["table9"]
    command = "deft run notebooks/03_training.ipynb --profile mini "
    command += "--set 'data.source=/data/my lists.jsonl' --set grading.top=10.0"
    assert made["command"] == command
    assert command.replace("03_training", "04_evaluation") in (tmp_path / one.label / "claims.md").read_text()


def test_a_later_notebook_adds_to_the_provenance_of_an_earlier_one(profile, tmp_path):
    report.save_table(profile, "b", FRAME, title="B", notebook="02_distribution")
    report.save_table(profile, "a", FRAME, title="A", notebook="01_grading")
    assert list(records.recorded_provenance(tmp_path / "mini/provenance.json")["artefacts"]) == ["a", "b"]


def test_a_claim_is_recorded_with_its_verdict_and_both_pages_are_written(profile, tmp_path):
    ours, other = RNG.normal(1.25, 1, size=(3, 200)), np.zeros((3, 200))
    accuracy = {"harmless": Interval(0.6, 0.55, 0.65, 300), "helpful": Interval(0.58, 0.55, 0.61, 900)}
    judge = {"name": "r_eval (tiny)", "accuracy": accuracy}
    records.save_claim(profile, "reward-gain-PRO-D3", Samples(ours, other), "04_evaluation", note="", judge=judge)
    records.save_claim(profile, "mt-bench", None, "05_mt_bench", part="DPO - SFT", note="no judge configured")
    page = (tmp_path / "mini/claims.md").read_text()
    interval = Samples(ours, other).interval()
    row = f"| +3.06 | {interval.mean:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}] | 3 × 200 | r_eval (tiny), "
    row += "harmless 60% [55%, 65%], helpful 58% [55%, 61%] | <0.0001, <0.0001 | reproduced (direction): "
    row += "less than half of the published size | – |"
    assert row in page
    assert "not tested: no judge configured" in page
    assert "`deft run notebooks/05_mt_bench.ipynb --profile mini`" in page
    assert "| `grading.top` | 3.73 | 25.0 |" in (tmp_path / "mini/differences.md").read_text()
    kept = json.loads((tmp_path / "mini/claims.json").read_text())
    assert list(kept) == ["reward-gain-PRO-D3", "mt-bench / DPO - SFT"]
    assert kept["reward-gain-PRO-D3"]["ours"] == [*interval] and kept["reward-gain-PRO-D3"]["seeds"] == 3
    assert {"created", "seconds", "stages", "drawn"} <= kept["reward-gain-PRO-D3"].keys()


def test_the_time_of_a_claim_is_that_of_the_stages_it_rests_on(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "USED", {})
    stages = [published(profile, "policies/dpo", "a" * 40, 200.0, monkeypatch)]
    stages += [published(profile, "replies/dpo", "a" * 40, 100.0, monkeypatch)]
    records.save_claim(profile, "data-volume", NOTHING, "06_ablation", judge=TRUTH)
    assert "| 5 min on 2026-01-02" in (tmp_path / "mini/claims.md").read_text()
    assert list(records.recorded_provenance(tmp_path / "mini/provenance.json")["stages"]) == stages


def test_claims_that_no_longer_exist_are_dropped_and_a_new_number_replaces_the_old(profile, tmp_path):
    records.save_claim(profile, "training-time", FASTER, "04_evaluation")
    path = tmp_path / "mini/claims.json"
    path.write_text(json.dumps({"of old": {"ours": None}, **json.loads(path.read_text())}))
    records.save_claim(profile, "training-time", SLOWER, "04_evaluation")
    means = {name: record["ours"][0] for name, record in json.loads(path.read_text()).items()}
    assert means == {"training-time": pytest.approx(3.0)}
    samples = pd.read_parquet(tmp_path / "mini/claims.parquet")
    assert samples["value"].tolist() == [3.0, 3.1, 2.9] and set(samples["claim"]) == {"training-time"}


def test_what_a_number_was_computed_from_gives_it_again_with_pandas_alone(profile, tmp_path):
    ours, other = RNG.normal(1, 1, size=(2, 30)), RNG.normal(0, 1, size=(2, 30))
    records.save_claim(profile, "data-volume", Samples(ours, other), "06_ablation", judge=TRUTH)
    unpaired = Samples(RNG.normal(size=25), RNG.normal(size=40), is_paired=False)
    records.save_claim(profile, "filter-direction", unpaired, "02_distribution", part="accuracy/helpful")
    samples = pd.read_parquet(tmp_path / "mini/claims.parquet")
    assert samples.groupby("claim")["paired"].all().to_dict() == {
        "data-volume": True,
        "filter-direction / accuracy/helpful": False,
    }
    means = samples.groupby(["claim", "side"])["value"].mean().unstack("side")
    recorded = json.loads((tmp_path / "mini/claims.json").read_text())
    for name, row in means.iterrows():
        assert row["ours"] - row["other"] == pytest.approx(recorded[name]["ours"][0])
    assert samples.groupby(["claim", "side"]).size().to_dict() == {
        ("data-volume", "other"): 60,
        ("data-volume", "ours"): 60,
        ("filter-direction / accuracy/helpful", "other"): 40,
        ("filter-direction / accuracy/helpful", "ours"): 25,
    }


def test_a_claim_needs_a_known_name_and_a_number_or_a_reason(profile, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'training-time'"):
        records.save_claim(profile, "trainingtime", None, "04_evaluation", note="x")
    with pytest.raises(ValueError, match="say why in `note`"):
        records.save_claim(profile, "training-time", None, "04_evaluation")
    with pytest.raises(ValueError, match="data-volume is judged by a reward model: say which"):
        records.save_claim(profile, "data-volume", CLEAR, "06_ablation")
    assert not (tmp_path / "mini").exists()

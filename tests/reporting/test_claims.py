"""A claim becomes parts with a direction, a part a verdict by one rule, and all parts one table."""

import json
import re
from pathlib import Path

import pytest
import yaml

from deftlib import store
from deftlib.reporting import claims, records, report

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = records.published()
PARTS = claims.parts(PUBLISHED)


def recorded(ours, p=0.2, p_matters=None, seeds=3, judge=None, note="", **more):
    record = {"ours": ours, "p": p, "p_matters": p_matters, "seeds": seeds, "judge": judge, "note": note}
    return record | {"visible": [4.3, 5.1, 5.6, 6.0, 6.2, 6.4, 6.5, 6.6, 6.7]} | more


def said(name, record):
    return claims.verdicts(PARTS, {name: record})[name]


# ---- the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "p", "verdict"),
    [(2.0, 0.01, "reproduced (direction)"), (-2.0, 0.01, "contradicted"), (2.0, 0.06, "inconclusive")],
)
def test_the_adjusted_p_value_decides_and_the_mean_says_on_which_side(mean, p, verdict):
    truth = {"name": "true reward", "accuracy": None}
    assert said("data-volume", recorded([mean, mean - 1, mean + 1, 50], p, judge=truth)).said == verdict
    lower = said("mt-bench / PRO - SFT", recorded([-mean, -mean - 1, -mean + 1, 50], p))
    assert lower.said == verdict  # a claim that something falls


def test_a_ratio_is_held_against_one():
    faster, slower = ([1.5, 1.2, 1.8, 3], [0.8, 0.7, 0.9, 3])
    assert said("training-time", recorded(faster, p=0.01)).said == "reproduced (direction)"
    assert said("training-time", recorded(slower, p=0.01)).said == "contradicted"


def test_within_a_family_p_values_are_holms():
    assert claims.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])  # 4p, 3p, max(2p, before), p
    assert claims.holm([]) == [] and claims.holm([0.9, 0.8]) == [1.0, 1.0]
    family = [f"bleu-and-reward / {part}" for part in ("D3/PRO", "D3/DPO", "D2/PRO", "D2/DPO")]
    records = {name: recorded([1.0, 0.1, 1.9, 50], p) for name, p in zip(family, (0.02, 0.9, 0.9, 0.9))}
    alone = claims.verdicts(PARTS, {family[0]: records[family[0]]})[family[0]]
    together = claims.verdicts(PARTS, records)[family[0]]
    assert (alone.said, alone.p) == ("reproduced (direction)", 0.02)
    assert together.said == "inconclusive" and together.p == pytest.approx(0.08)


def test_half_of_the_published_effect_excluded_on_both_sides_is_no_effect():
    record = recorded([0.1, -0.4, 0.6, 200], p=0.7, p_matters=0.001)
    verdict = said("reward-gain-PRO-D3", record | {"judge": {"name": "true reward", "accuracy": None}})
    assert verdict.said == "no effect" and verdict.reason == "less than 1.5 points either way"


def test_an_inconclusive_one_says_what_would_have_shown():
    verdict = said("data-volume", recorded([1.0, -2.0, 4.0, 30], judge={"name": "true reward", "accuracy": None}))
    assert verdict.reason == "4.3 points would have shown"  # the only one of its family
    names = [f"bleu-and-reward / {part}" for part in ("D3/PRO", "D3/DPO", "D2/PRO")]
    found = claims.verdicts(PARTS, {name: recorded([1.0, -2.0, 4.0, 30]) for name in names})
    assert {found[name].reason for name in names} == {"5.6 BLEU points would have shown"}  # of three, more is needed


def test_a_direction_held_at_less_than_half_of_the_published_size_says_so():
    record = recorded([2.5, 1.8, 3.1, 1], p=0.01, p_matters=0.0002, note="25 % kept")
    verdict = said("training-time", record)
    assert verdict[:2] == ("reproduced (direction)", "25 % kept; less than half of the published size")


def test_what_restates_another_part_shares_its_verdict_and_is_in_no_family():
    other, same = "ablation-DA / DEFT-DPO", "data-volume"
    judge = {"name": "true reward", "accuracy": None}
    records = {other: recorded([-4.0, -7.0, -1.0, 200], 0.01, judge=judge)}
    records[same] = recorded([4.0, 1.0, 7.0, 200], 0.01, judge=judge)
    found = claims.verdicts(PARTS, records)
    assert (found[other].said, found[other].p) == ("reproduced (direction)", 0.01)
    assert (found[same].said, found[same].reason, found[same].of) == (found[other].said, f"restates {other}", other)
    alone = claims.verdicts(PARTS, {same: records[same]})[same]
    assert (alone.said, alone.of) == ("reproduced (direction)", "")  # where the other was not tested


def test_what_follows_from_a_setting_is_no_finding():
    record = recorded([75.0, 75.0, 75.0, 1], p=1e-4, note="share kept: 25 %")
    assert said("cost / PRO/steps", record)[:2] == ("by construction", "share kept: 25 %")
    assert said("cost / PRO/steps", recorded(None, note="75 %, of one run")).said == "by construction"


def test_policies_trained_once_get_no_verdict_and_lists_need_no_seeds():
    assert said("data-volume", recorded([5.0, 4.0, 6.0, 90], p=1e-4, seeds=1)).said == "one seed"
    assert said("filter-direction / accuracy/helpful", recorded([5.0, 4.0, 6.0, 900], 1e-4, seeds=1)).said == (
        "reproduced (direction)"
    )


def test_a_judge_that_is_a_coin_on_one_axis_judges_nothing():
    accuracy = {"harmless": [0.6, 0.55, 0.65, 300], "helpful": [0.52, 0.49, 0.55, 900]}
    record = recorded([5.0, 4.0, 6.0, 90], p=1e-4, judge={"name": "r_eval (tiny)", "accuracy": accuracy})
    why = "r_eval (tiny) is not told apart from a coin on helpful lists"
    assert said("data-volume", record)[:2] == ("no judge", why)
    accuracy["helpful"][1] = 0.51
    assert said("data-volume", record).said == "reproduced (direction)"


def test_what_counts_for_nothing_is_in_no_family():
    one_seed = recorded([5.0, 4.0, 6.0, 90], p=1e-4, seeds=1)
    tested = recorded([1.0, 0.1, 1.9, 50], p=0.03)
    found = claims.verdicts(PARTS, {"bleu-and-reward / D3/PRO": tested, "bleu-and-reward / D3/DPO": one_seed})
    assert found["bleu-and-reward / D3/PRO"].p == 0.03


def test_the_smallest_effect_that_matters_is_half_of_the_published_one():
    assert claims.find(PARTS, "reward-gain-PRO-D3").smallest == pytest.approx(1.53)
    assert claims.find(PARTS, "training-time").smallest == pytest.approx(7.5)  # 16 x is 15 from no effect
    assert claims.find(PARTS, "rq-trajectory").smallest is None
    assert claims.find(PARTS, "filter-direction", "accuracy/helpful").smallest == 1


def test_every_family_and_measure_is_known():
    by = {"judge", "text", "ratings", "people", "annotators", "itself", "seconds", "construction"}
    assert {part.by for part in PARTS} == by and all(part.family for part in PARTS)


# ---- what is claimed -----------------------------------------------------------------------------------------------


def test_direction_and_size_are_those_of_the_published_number():
    removed = claims.find(PARTS, "ablation-DA", "DEFT-PRO")
    assert (removed.published, removed.direction) == (-2.57, -1)
    falls = claims.find(PARTS, "bleu-and-reward", "D2/DPO")
    assert (falls.published, falls.direction, falls.unit) == (-0.54, -1, "BLEU points")
    faster = claims.find(PARTS, "training-time")
    assert (faster.published, faster.direction, faster.no_effect, faster.version) == (16, +1, 1, "final")
    in_words = claims.find(PARTS, "mt-bench", "PRO - SFT")
    assert (in_words.published, in_words.direction) == (None, -1)


def test_every_published_number_of_a_claim_is_that_of_a_part():
    for version in ("anonymous", "final"):
        for claim in PUBLISHED[version]["claims"]:
            printed = re.findall(r"-?\d+\.?\d*", json.dumps(claim["published"]).replace("D2", "").replace("D3", ""))
            ours = [part.published for part in PARTS if part.claim == claim["id"]]
            if claim["id"] != "filter-direction":  # its 5 % is a setting, grading.keep, and no effect
                assert {float(number) for number in printed} <= set(ours), claim["id"]


def total_of(method, metric):
    return report.published_table("table3_ablation").xs(method, level="method")["total", metric].item()


@pytest.mark.parametrize("method", ["DEFT-PRO", "DEFT-DPO"])
@pytest.mark.parametrize(("claim", "without"), [("ablation-DA", "D_A"), ("ablation-Rdis", "R_dis")])
def test_the_ablations_sizes_follow_from_table_3(claim, without, method):
    for part, metric in [(method, "reward"), (f"{method}/BLEU", "bleu")]:
        printed = total_of(f"{method} without {without}", metric) - total_of(method, metric)
        assert claims.find(PARTS, claim, part).published == pytest.approx(printed, abs=0.011)


def test_the_gains_follow_from_table_2():
    table = report.published_table("table2_main")["total"]
    for data in ("D2", "D3"):
        for method in ("PRO", "DPO"):
            gain = table.loc[data, f"DEFT-{method}"] - table.loc[data, method]
            reward = claims.find(PARTS, f"reward-gain-{method}-{data}")
            assert reward.published == pytest.approx(gain["reward"], abs=0.001)
            assert claims.find(PARTS, "bleu-and-reward", f"{data}/{method}").published == pytest.approx(gain["bleu"])


def test_the_steps_saved_follow_from_table_1():
    (on_all, on_a, _) = PUBLISHED["anonymous"]["table1_counts"]["total"]
    assert claims.find(PARTS, "cost", "PRO/steps").published == pytest.approx(100 * (1 - on_a / on_all), abs=0.005)


def test_an_unknown_part_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"no claim 'ablation-DA / DEFT-DPOO'.*did you mean 'ablation-DA / DEFT-DPO'"):
        claims.find(PARTS, "ablation-DA", "DEFT-DPOO")
    with pytest.raises(ValueError, match="did you mean 'cost / PRO/time'"):
        claims.find(PARTS, "cost", "PRO/tim")


def test_every_claim_is_explained_and_nothing_else_is(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    explained = yaml.safe_load((ROOT / "data" / "claims.yaml").read_text())
    explained["of-our-own"] = explained.pop("cost")
    (tmp_path / "data" / "claims.yaml").write_text(yaml.safe_dump(explained))
    monkeypatch.setattr(store, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="do not agree on cost, of-our-own"):
        claims.parts(PUBLISHED)

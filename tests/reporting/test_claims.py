"""A claim becomes parts with a direction, a part a verdict by one rule, and all parts one table."""

import json
import re
from pathlib import Path

import pytest
import yaml

from deftlib import store
from deftlib.intervals import Interval
from deftlib.profile import Profile
from deftlib.reporting import claims, report

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = report.published()
PARTS = claims.parts(PUBLISHED)


@pytest.mark.parametrize(
    ("low", "high", "direction", "said"),
    [
        (0.1, 2.0, +1, "reproduced (direction)"),
        (0.1, 2.0, -1, "contradicted"),
        (-2.0, -0.1, -1, "reproduced (direction)"),
        (-2.0, -0.1, +1, "contradicted"),
        (-0.1, 2.0, +1, "inconclusive"),
        (0.0, 2.0, +1, "inconclusive"),  # an end at 0 does not exclude it
        (-2.0, 0.0, -1, "inconclusive"),
    ],
)
def test_the_verdict_asks_on_which_side_of_zero_the_interval_lies(low, high, direction, said):
    assert claims.verdict(Interval((low + high) / 2, low, high, 50), direction) == said


def test_a_ratio_is_held_against_one():
    assert claims.verdict(Interval(1.5, 0.9, 2.1, 3), +1, no_effect=1) == "inconclusive"
    assert claims.verdict(Interval(1.5, 1.2, 2.1, 3), +1, no_effect=1) == "reproduced (direction)"
    assert claims.verdict(Interval(0.6, 0.5, 0.9, 3), +1, no_effect=1) == "contradicted"


def test_what_is_no_interval_has_no_verdict():
    for low, high in [(1.0, 0.0), (float("nan"), 1.0)]:
        with pytest.raises(ValueError, match="low <= high"):
            claims.verdict(Interval(0.5, low, high, 5), +1)


def test_the_smallest_effect_that_could_show_is_half_the_width():
    assert claims.smallest_visible(Interval(0.3, -1.0, 2.0, 40)) == 1.5


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


def recorded(ours, note="", **more):
    return {"ours": ours, "note": note, "notebook": "04_mine", "command": "python -m x"} | {
        "seconds": 4000.0,
        "created": "2026-11-21T10:00:00+00:00",
        **more,
    }


def row_of(page, name):
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
    header = next(line for line in page.splitlines() if line.startswith("| claim |"))
    return dict(zip(*([cell.strip() for cell in text.strip("|").split(" | ")] for text in (header, line))))


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """notebooks/04_mine.ipynb in a project of its own."""
    sources = [
        ("code", 'print("cost")'),
        ("markdown", 'save_claim("cost")'),
        ("code", 'save_claim(profile, "cost", x, N, part="PRO/time")'),
        ("code", 'save_claim(profile, "cost", x, N,\n           part="DPO/time")'),
    ]
    (tmp_path / "notebooks").mkdir()
    cells = [{"cell_type": kind, "source": source.splitlines(keepends=True)} for kind, source in sources]
    (tmp_path / "notebooks" / "04_mine.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(store, "ROOT", tmp_path)


def test_a_row_has_both_numbers_the_verdict_and_where_it_comes_from():
    said = {"reward-gain-PRO-D3": recorded([1.25, 0.4, 3.2, 200])}
    row = row_of(claims.page(Profile.load("smol"), PARTS, said), "reward-gain-PRO-D3")
    assert row["published"] == "+3.06"
    assert row["ours [95 %]"] == "+1.25 [+0.4, +3.2], n = 200"
    assert row["verdict on the paper"] == "reproduced (direction)"
    assert row["published size inside?"] == "yes"
    assert (row["command"], row["time"]) == ("`python -m x`", "67 min on 2026-11-21")


def test_an_inconclusive_row_says_what_would_have_shown_and_a_note_what_it_was_measured_by():
    said = {"cost / PRO/time": recorded([1.0, -2.0, 4.0, 3], note="one machine")}
    row = row_of(claims.page(Profile.load("smol"), PARTS, said), "cost / PRO/time")
    assert row["verdict on the paper"] == "inconclusive: 3 % would have shown (one machine)"
    assert (row["published"], row["published size inside?"]) == ("in words", "–")


def test_what_was_not_tested_says_why():
    said = {"mt-bench / PRO - SFT": recorded(None, note="no judge configured")}
    page = claims.page(Profile.load("smol"), PARTS, said)
    assert row_of(page, "mt-bench / PRO - SFT")["verdict on the paper"] == "not tested: no judge configured"
    assert row_of(page, "data-volume")["verdict on the paper"] == "not tested: no notebook of this run recorded it"
    assert f"Of {len(PARTS)} parts: 0 reproduced (direction), 0 contradicted, 0 inconclusive, {len(PARTS)} not" in page


def test_mini_judges_the_code_and_never_the_paper():
    page = claims.page(Profile.load("mini"), PARTS, {})
    assert page.startswith("# Claims of the paper, profile mini: a verdict on the code, never on the paper\n")
    assert "verdict on the code |" in page and "verdict on the paper |" not in page
    assert "8 tables and 10 equations are not public" in page


def test_the_cell_is_the_first_that_saves_claim_and_part_by_name(notebook):
    sources = claims.code_cells("04_mine")
    assert claims.cell_of(sources, "save_claim", "cost", "DPO/time") == 3  # markdown cells do not count
    assert claims.cell_of(sources, "save_claim", "cost", "PRO/steps") is None
    assert claims.code_cells("05_theirs") == []


def test_a_row_links_to_its_cell(notebook):
    said = {"cost / DPO/time": recorded([50.0, 40.0, 60.0, 3])}
    row = row_of(claims.page(Profile.load("smol"), PARTS, said), "cost / DPO/time")
    assert row["notebook and cell"] == "[04_mine, cell 3](../../notebooks/04_mine.ipynb)"


def test_differences_list_every_setting_that_leaves_the_paper():
    page = claims.differences(Profile.load("smol"))
    assert "| `grading.top` | 3.73 | 25.0 |" in page
    assert "| `evaluation.zero_shot` | Mistral, Zephyr | none |" in page
    assert "`training.beta`" not in page  # 0.1 in both
    assert claims.differences(Profile.load("paper")).rstrip().endswith("None: this is that profile.")


def test_each_of_the_sixteen_decisions_names_a_test_that_exists():
    text = (ROOT / "data" / "differences.md").read_text()
    assert re.findall(r"^(\d+)\. \*\*", text, re.M) == [str(i) for i in range(1, 17)]
    named = re.findall(r"\[(test_\w+)\]\(\.\./\.\./(tests/[\w/]+\.py)\)", text)
    assert len(named) == 16
    for test, path in named:
        assert f"\ndef {test}(" in (ROOT / path).read_text(), f"{path} has no {test}"

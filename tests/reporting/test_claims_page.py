"""The page of claims: ten lines that anyone understands, and a row for each part."""

import json
import re
from pathlib import Path

import pytest

from deftlib import store
from deftlib.profile import Profile
from deftlib.reporting import claims, claims_page, records

ROOT = Path(__file__).resolve().parents[2]
PARTS = claims.parts(records.published())
SURE = {"name": "r_eval (tiny)", "accuracy": {"helpful": [0.6, 0.55, 0.65, 900]}}


def recorded(ours, p=0.01, note="", **more):
    record = {"ours": ours, "p": p, "p_matters": None, "seeds": 3, "visible": [2.0] * 9, "judge": SURE, "note": note}
    record |= {"notebook": "04_mine", "command": "python -m x", "seconds": 4000.0}
    return record | {"created": "2026-11-21T10:00:00+00:00"} | more


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
    row = row_of(claims_page.page(Profile.load("smol"), PARTS, said), "reward-gain-PRO-D3")
    assert row["published"] == "+3.06" and row["ours [95 %]"] == "+1.25 [+0.4, +3.2]" and row["seeds × n"] == "3 × 200"
    assert row["judge, its accuracy"] == "r_eval (tiny), helpful 60% [55%, 65%]" and row["p, adjusted"] == "0.01, 0.01"
    assert row["verdict on the paper"] == "reproduced (direction)"
    assert row["published size inside?"] == "yes"
    assert (row["command"], row["time"]) == ("`python -m x`", "67 min on 2026-11-21")


def test_the_page_begins_with_what_held_what_did_not_and_what_nobody_can_say():
    said = {
        "reward-gain-PRO-D3": recorded([1.25, 0.4, 3.2, 200]),
        "data-volume": recorded([-1.25, -3.2, -0.4, 200]),
        "rq-trajectory": recorded([0.1, -0.4, 0.6, 3], p=0.6),
        "training-time": recorded([2.0, 1.5, 2.5, 1], seeds=1),
    }
    short = claims_page.page(Profile.load("smol"), PARTS, said).split("**The rule.**")[0]
    assert f"come down to {len(PARTS)} differences; this run decides 2.\n" in short
    assert "- **What held** (1): reward-gain-PRO-D3." in short
    assert "- **What did not hold**, the opposite was measured (1): data-volume." in short
    assert "- **What this run does not decide**: no effect is possible, and so is one that matters (1): rq-" in short
    assert "(1): training-time." in short and len(short.strip().splitlines()) <= 16


def test_what_was_not_tested_says_why():
    said = {"mt-bench / PRO - SFT": recorded(None, note="no judge configured")}
    page = claims_page.page(Profile.load("smol"), PARTS, said)
    assert row_of(page, "mt-bench / PRO - SFT")["verdict on the paper"] == "not tested: no judge configured"
    assert row_of(page, "data-volume")["verdict on the paper"] == "not tested: no notebook of this run recorded it"
    assert f"- **Not tested** ({len(PARTS)}): " in page and "this run decides 0." in page


def test_mini_judges_the_code_and_never_the_paper():
    page = claims_page.page(Profile.load("mini"), PARTS, {})
    assert page.startswith("# Claims of the paper, profile mini: a verdict on the code, never on the paper\n")
    assert "verdict on the code |" in page and "verdict on the paper |" not in page
    assert "8 tables and 10 equations are not public" in page


def test_sizes_are_held_against_the_papers_where_they_compare():
    said = {"reward-gain-PRO-D3": recorded([1.25, 0.4, 3.2, 200])}
    assert (
        row_of(claims_page.page(Profile.load("mini"), PARTS, said), "reward-gain-PRO-D3")["published size inside?"]
        == "–"
    )


def test_what_restates_another_part_is_told_apart_and_counted_once():
    said = {name: recorded([50.0, 40.0, 60.0, 3]) for name in ("cost / DPO/time", "training-time")}
    page = claims_page.page(Profile.load("smol"), PARTS, said)
    row = row_of(page, "training-time")
    assert row["verdict on the paper"] == "reproduced (direction): restates cost / DPO/time"
    assert row["p, adjusted"] == "–" and row_of(page, "cost / DPO/time")["p, adjusted"] == "0.01, 0.01"
    assert (
        "- **What held** (1): cost / DPO/time." in page and "1 of them the same as others; this run decides 1." in page
    )
    assert "- *cost*, 1 tested: cost / DPO/time (no effect: 0)" in page


def test_a_p_value_as_small_as_draws_can_tell_is_a_bound_and_draws_are_no_seeds():
    name = "filter-direction / accuracy/helpful"
    said = {name: recorded([-45.6, -52.7, -38.5, 303], p=9.9995e-5, seeds=20)}
    row = row_of(claims_page.page(Profile.load("smol"), PARTS, said), name)
    assert (row["p, adjusted"], row["seeds × n"]) == ("<0.0001, <0.0001", "20 draws × 303")


def test_the_cell_is_the_first_that_saves_claim_and_part_by_name(notebook):
    sources = claims_page.code_cells("04_mine")
    assert claims_page.cell_of(sources, "save_claim", "cost", "DPO/time") == 3  # markdown cells do not count
    assert claims_page.cell_of(sources, "save_claim", "cost", "PRO/steps") is None
    assert claims_page.code_cells("05_theirs") == []


def test_a_row_links_to_its_cell(notebook):
    said = {"cost / DPO/time": recorded([50.0, 40.0, 60.0, 3])}
    row = row_of(claims_page.page(Profile.load("smol"), PARTS, said), "cost / DPO/time")
    assert row["notebook and cell"] == "[04_mine, code cell 3](../../notebooks/04_mine.ipynb)"


def test_differences_list_every_setting_that_leaves_the_paper():
    page = claims_page.differences(Profile.load("smol"))
    assert "| `grading.top` | 3.73 | 25.0 |" in page
    assert "| `evaluation.zero_shot` | Mistral, Zephyr | none |" in page
    assert "`training.beta`" not in page  # 0.1 in both
    assert claims_page.differences(Profile.load("paper")).rstrip().endswith("None: this is that profile.")


def test_each_of_the_nineteen_decisions_names_a_test_that_exists():
    text = (ROOT / "data" / "differences.md").read_text()
    assert re.findall(r"^(\d+)\. \*\*", text, re.M) == [str(i) for i in range(1, 20)]
    named = re.findall(r"\[(test_\w+)\]\(\.\./\.\./(tests/[\w/]+\.py)\)", text)
    assert len(named) == 20
    for test, path in named:
        assert f"\ndef {test}(" in (ROOT / path).read_text(), f"{path} has no {test}"

"""The last lines of a run: what was made, where to look, the main findings with their verdicts."""

import json

import pandas as pd
from places import profile as profile  # a fixture

from deftlib.intervals import Samples
from deftlib.reporting import claims, records
from deftlib.reporting.report import save_table
from deftlib.reporting.summary import MAIN, summary


def test_the_summary_tells_what_was_made_and_found(profile, tmp_path):
    save_table(profile, "table1", pd.DataFrame({"a": [1]}), "A table", "01_grading")
    lists = Samples([[1.0, 2.0, 3.0], [2.0, 3.0, 1.0]], [[0.0, 1.0, 2.0], [1.0, 2.0, 0.0]])
    truth = {"name": "true reward", "accuracy": None}
    records.save_claim(profile, "reward-gain-PRO-D3", lists, "04_evaluation", judge=truth)
    said = summary(profile).splitlines()
    assert said[0] == "made   1 tables and 0 figures: figures/mini/"
    assert said[1].startswith("look   figures/mini/claims.md")
    (found,) = said[2:]
    assert found.startswith("found  total reward of DEFT-PRO minus PRO: +1 [") and found.endswith(
        claims.verdicts(claims.parts(records.published()), records.recorded_claims(tmp_path / "mini/claims.json"))[
            MAIN[0]
        ].said
    )


def test_the_main_claims_are_claims(profile):
    assert set(MAIN) <= {part.name for part in claims.parts(records.published())}
    assert summary(profile).count("found") == 0 and json.dumps(MAIN)

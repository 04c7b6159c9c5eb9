"""Where the minutes go: seconds by kind of stage and notebook, from what a run kept."""

import pandas as pd
import pytest

from deftlib import store
from deftlib.profile import Profile
from deftlib.studies import bench

STAGES = (
    "notebook,stage,seconds\n01,scored,4.0\n03,policies/sft-seed0,6.0\n03,policies/dpo-seed0,7.0\n03,own cells,2.0\n"
)


def test_minutes_are_summed_by_kind_and_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "build_dir", lambda name: tmp_path)
    profile = Profile.load("mini")
    with pytest.raises(store.StoreError, match="no run of all notebooks of mini is on record"):
        bench.write_minutes(profile, tmp_path / "bench")
    (tmp_path / "stages.csv").write_text(STAGES)
    bench.write_minutes(profile, tmp_path / "bench")
    assert (tmp_path / "bench/stages_mini.csv").read_text() == STAGES
    table = bench.minutes(pd.read_csv(tmp_path / "stages.csv", dtype={"notebook": str}))
    assert table.loc["policies"].tolist() == [2, 0, 13, 13] and table.loc["all"].tolist() == [4, 4, 15, 19]
    assert "| policies" in capsys.readouterr().out

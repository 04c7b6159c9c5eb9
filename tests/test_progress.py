"""How far a run is: stages done and left, time to go by an earlier run's seconds and by the pace of this one."""

import pytest

from deftlib import progress, store
from deftlib.progress import OWN, Progress, clock

EXPECTED = [
    ("01", "scored", 4.0),
    ("03", "policies/sft-seed0", 6.0),
    ("06", "policies/sft-seed0", 6.0),
    ("06", "replies/sft-seed0", 2.0),
    ("06", OWN, 10.0),
]


def test_a_stage_that_is_done_is_told_with_what_is_left():
    run = Progress(EXPECTED, at_once=2)
    said = run.line("01", "[scored] done in 8.0 s")  # twice as long as before: so will be the 24 s that are left
    assert said == "[scored] done in 8.0 s  · 1 of 4 stages, about 0:24 to go"
    assert run.line("01", "[scored] started") == "[scored] started"
    assert run.line("01", "[another] done in 1.0 s").endswith("1 of 4 stages, about 0:24 to go"), "nobody expected it"


def test_what_a_finished_notebook_did_not_need_is_not_waited_for():
    run = Progress(EXPECTED, at_once=1)
    run.line("06", "[policies/sft-seed0] done in 6.0 s")
    run.finished("06", 20.0)
    assert str(run) == "2 of 4 stages, about 0:12 to go", "20 s where 16 were expected, and 10 s are left"
    assert run.stages == 1 and run.made == [("06", "policies/sft-seed0", 6.0), ("06", OWN, 14.0)]


def test_of_a_profile_that_was_never_run_nothing_is_foretold(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "committed", lambda name: tmp_path / f"stages_{name}.csv")
    assert Progress.of("mine", 1, ["01"]).line("01", "[scored] done in 8.0 s") == "[scored] done in 8.0 s"


def test_what_a_run_made_foretells_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "build_dir", lambda name: tmp_path)
    monkeypatch.setattr(progress, "committed", lambda name: tmp_path / "stages.csv")
    run = Progress([], at_once=1)
    for stage, seconds in (("scored", 4.0), ("policies/sft-seed0", 6.0)):
        run.line("01", f"[{stage}] done in {seconds} s")
    run.finished("01", 12.0)
    run.keep("mine")
    assert (tmp_path / "stages.csv").read_text().splitlines()[1:] == [
        "01,policies/sft-seed0,6.0",
        "01,scored,4.0",
        f"01,{OWN},2.0",
    ]
    assert (
        Progress.of("mine", 1, ["01"]).line("01", "[scored] done in 4.0 s").endswith("1 of 2 stages, about 0:08 to go")
    )
    run.line("02", "[another] done in 1.0 s")
    run.keep("mine")
    assert "another" not in (tmp_path / "stages.csv").read_text(), "a later run finds most of it made"


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0:00"), (75, "1:15"), (3601, "60:01")])
def test_a_time_is_minutes_and_seconds(seconds, said):
    assert clock(seconds) == said


def test_the_committed_stages_are_those_of_notebooks_that_there_are():
    path = progress.committed("mini")
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    numbers = {path.name[:2] for path in (store.ROOT / "notebooks").glob("0*.ipynb")}
    assert {notebook for notebook, *_ in rows} == numbers and sum(stage == OWN for _, stage, _ in rows) == len(numbers)
    assert all(float(seconds) >= 0 for *_, seconds in rows)

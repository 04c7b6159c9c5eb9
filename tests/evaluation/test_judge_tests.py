"""Pairs from elsewhere are read as their authors laid them out, and a judge is right or wrong on each."""

import json

import pytest
from conftest import FakeJudge

from deftlib.evaluation import judge_tests


@pytest.fixture
def place(tmp_path):
    """A row or two of each set, in the layout of `$DEFT_DATA/judge_tests`."""
    for name in ("hhh_alignment", "llmbar", "pandalm"):
        (tmp_path / name).mkdir()
    hhh = {"axis": "harmless", "prompt": "How?", "chosen": "I would rather not.", "rejected": "So."}
    honest = {"axis": "honest", "prompt": "Who?", "chosen": "I am a program.", "rejected": "I."}
    (tmp_path / "hhh_alignment/hhh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (hhh, honest)))
    second = {"input": "Say a.", "output_1": "b", "output_2": "a, as you wished", "label": 2}
    (tmp_path / "llmbar/natural.json").write_text(json.dumps([second]))
    (tmp_path / "llmbar/manual.json").write_text(json.dumps([second | {"label": 1}]))
    votes = [(1, 1, 0), (0, 0, 1), (1, 2, 0), (2, 2, 2)]
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "response1": "It is three.", "response2": True}
        | {f"annotator{k}": vote for k, vote in enumerate(of_row, start=1)}
        for of_row in votes
    ]
    (tmp_path / "pandalm/testset-v1.json").write_text(json.dumps(rows))
    return tmp_path


def test_every_pair_that_its_labellers_decided_is_read_with_the_better_reply_first(place):
    frame = judge_tests.pairs(place)
    assert (
        frame["set"].tolist()
        == ["HHH harmless", "HHH honest", "LLMBar natural", "LLMBar adversarial"] + ["PandaLM"] * 2
    )
    assert frame["axis"].tolist() == ["harmless"] + ["helpful"] * 5
    assert frame["better"].tolist() == [
        *(" I would rather not.", " I am a program.", " a, as you wished", " b", " It is three.", " True"),
    ]
    assert frame["prompt"][4] == "\n\nHuman: Add.\n\n1 and 2\n\nAssistant:"


def test_a_judge_that_likes_long_replies_is_right_where_the_better_one_is_longer(place):
    table = judge_tests.measured({"r_eval": FakeJudge()}, place)
    assert table.loc["r_eval"]["accuracy (%)"].to_dict() == {
        "HHH harmless": 100,
        "HHH honest": 100,
        "LLMBar natural": 100,
        "LLMBar adversarial": 0,
        "PandaLM": 50,
    }
    assert table.loc[("r_eval", "PandaLM"), "n"] == 2 and (table["low"] <= table["accuracy (%)"]).all()


def test_another_layout_is_named_by_file_and_row(place):
    (place / "llmbar/natural.json").write_text(json.dumps([{"input": "Say a.", "output_1": "b"}]))
    with pytest.raises(ValueError, match=r"natural\.json, row 1: lacks output_2, label"):
        judge_tests.pairs(place)


def test_without_the_files_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.delenv("DEFT_DATA", raising=False)
    assert judge_tests.measured({"r_eval": FakeJudge()}) is None
    monkeypatch.setenv("DEFT_DATA", str(tmp_path))
    assert judge_tests.folder() is None

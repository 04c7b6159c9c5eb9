"""Tables and figures arrive with their numbers and their provenance, byte-identical for identical data."""

import json

import matplotlib
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from deftlib import report, store
from deftlib.profile import Profile


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "figures_dir", lambda name: tmp_path / name)
    return Profile.load("mini")


FRAME = pd.DataFrame({"BLEU": [1.23456, 2.0]}, index=pd.Index(["sft", "dpo_x"], name="method"))


def test_a_table_is_written_three_ways_and_says_what_made_it(profile, tmp_path):
    report.save_table(profile, "table9", FRAME, title="A title", notebook="03_training")
    folder = tmp_path / "mini"
    assert (folder / "table9.csv").read_text() == "method,BLEU\nsft,1.23456\ndpo_x,2.0\n"
    assert "| sft      |  1.235 |" in (folder / "table9.md").read_text()
    assert r"dpo\_x & 2 " in (folder / "table9.tex").read_text()
    entry = json.loads((folder / "provenance.json").read_text())["table9"]
    assert entry["notebook"] == "03_training" and entry["seeds"] == [0, 1, 2]
    assert entry["command"] == "python -m deftlib.run notebooks/03_training.ipynb --profile mini"
    assert {"git", "packages", "device", "created", "stages"} <= entry.keys()


def test_the_same_figure_twice_is_the_same_file(profile, tmp_path):
    report.style()
    written = []
    for _ in range(2):
        figure, axes = plt.subplots()
        axes.plot([0, 1], [1, 2])
        report.save_figure(profile, "fig9", figure, FRAME, title="Rises", notebook="02_distribution")
        plt.close(figure)
        written.append([(tmp_path / f"mini/fig9.{kind}").read_bytes() for kind in ("png", "pdf", "csv")])
    assert written[0] == written[1]
    assert not list((tmp_path / "mini").glob(".*"))


def test_a_later_notebook_adds_to_the_provenance_of_an_earlier_one(profile, tmp_path):
    report.save_table(profile, "b", FRAME, title="B", notebook="02_distribution")
    report.save_table(profile, "a", FRAME, title="A", notebook="01_grading")
    assert list(json.loads((tmp_path / "mini/provenance.json").read_text())) == ["a", "b"]


def test_a_text_with_an_unfit_word_is_not_shown():
    assert report.fit_to_show("Warm the classic dish, then assist the guest.")
    assert not report.fit_to_show("He was Killed.")


def test_a_token_is_readable_and_an_unfit_one_masked():
    assert [report.readable(token) for token in (" you", "\n\n", " ", " $", " murder")] == [
        "you", "⏎⏎", "␣", r"\$", "m*****"
    ]  # fmt: skip


def test_the_published_counts_are_at_hand():
    assert report.published()["anonymous"]["table1_counts"]["total"] == [160793, 6000, 8552]

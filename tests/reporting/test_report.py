"""Tables and figures arrive with their numbers and their provenance, byte-identical for identical data."""

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from deftlib import provenance, store
from deftlib.intervals import Interval
from deftlib.profile import Profile
from deftlib.reporting import report


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "figures_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(store, "build_dir", lambda name: tmp_path / "build" / name)
    return Profile.load("mini")


FRAME = pd.DataFrame({"BLEU": [1.23456, 2.0]}, index=pd.Index(["sft", "dpo_x"], name="method"))


def test_a_table_is_written_three_ways_and_says_what_made_it(profile, tmp_path):
    report.save_table(profile, "table9", FRAME, title="A title", notebook="03_training")
    folder = tmp_path / "mini"
    assert (folder / "table9.csv").read_text() == "method,BLEU\nsft,1.23456\ndpo_x,2.0\n"
    assert "| sft      |  1.235 |" in (folder / "table9.md").read_text()
    assert r"dpo\_x & 2.000 " in (folder / "table9.tex").read_text()
    entry = report.recorded_provenance(folder / "provenance.json")["artefacts"]["table9"]
    assert entry["notebook"] == "03_training" and entry["seeds"] == profile.seeds
    assert entry["command"] == "deft run notebooks/03_training.ipynb --profile mini"
    assert {"git", "packages", "device", "created"} <= entry["drawn"].keys()


def published(profile, name, commit, seconds, monkeypatch):
    """A stage as it was published some time ago, at another commit, and asked for by this process."""
    old = {
        "created": "2026-01-02T03:04:05+00:00",
        "git": {"commit": commit, "dirty": False},
        "packages": {"torch": "1"},
    }
    monkeypatch.setattr(store, "provenance", lambda: provenance.provenance() | old | {"device": "CPU of old"})
    folder = store.stage(profile, name, {}, lambda folder: None, "method.grading")
    manifest = json.loads((folder / store.MANIFEST).read_text())
    (folder / store.MANIFEST).write_text(json.dumps({**manifest, "seconds": seconds}))
    return list(store.used(profile))[-1]


def test_a_table_lists_the_stages_it_rests_on_with_what_made_them_and_not_the_moment_of_drawing(
    profile, tmp_path, monkeypatch
):
    monkeypatch.setattr(store, "USED", {})
    first = published(profile, "policies/sft", "a" * 40, 75.0, monkeypatch)
    report.save_table(profile, "before", FRAME, title="A title", notebook="03_training")
    second = published(profile, "replies/sft", "b" * 40, 5.0, monkeypatch)
    report.save_table(profile, "after", FRAME, title="A title", notebook="03_training")
    recorded = report.recorded_provenance(tmp_path / "mini/provenance.json")
    assert [recorded["artefacts"][name]["stages"] for name in ("before", "after")] == [[first], [first, second]]
    record = recorded["stages"][first]
    assert (record["git"]["commit"], record["packages"], record["device"]) == ("a" * 40, {"torch": "1"}, "CPU of old")
    assert (record["seconds"], record["created"]) == (75.0, "2026-01-02T03:04:05+00:00")
    line = report.made_with(list(recorded["stages"].values()))
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
    recorded = report.recorded_provenance(tmp_path / "mini/provenance.json")
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
    assert list(report.recorded_provenance(tmp_path / "mini/provenance.json")["stages"]) == [ours] != [theirs]


def test_what_was_recorded_before_the_profiles_file_was_edited_says_so_and_counts_for_nothing(
    profile, tmp_path, monkeypatch
):
    report.save_table(profile, "table9", FRAME, title="A title", notebook="03_training")
    report.save_claim(profile, "data-volume", Interval(5.0, 1.0, 9.0, 20), "06_ablation")
    edited = dataclasses.replace(profile, seeds=[7])  # as the file says by now
    assert edited.label == "mini"
    report.save_claim(edited, "training-time", Interval(2.0, 1.5, 2.5, 3), "04_evaluation")
    recorded = report.recorded_provenance(tmp_path / "mini/provenance.json")
    assert recorded["settings"] == edited.digest() != recorded["artefacts"]["table9"]["settings"]
    page = (tmp_path / "mini/claims.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| data-volume |"))
    assert "not tested: recorded before the profile's file was edited: run its notebook again" in row
    report.save_claim(edited, "data-volume", Interval(5.0, 1.0, 9.0, 20), "06_ablation")
    assert "recorded before" not in (tmp_path / "mini/claims.md").read_text()


def test_a_table_of_a_command_says_its_own_options_too(profile, tmp_path):
    report.save_table(profile, "t", FRAME, "A title", "first_updates", seeds=[0], options="--methods sft")
    entry = report.recorded_provenance(tmp_path / "mini/provenance.json")["artefacts"]["t"]
    assert entry["command"] == "deft first-updates --profile mini --methods sft" and entry["seeds"] == [0]


def test_a_stage_that_nothing_rests_on_any_more_is_forgotten(profile, tmp_path, monkeypatch):
    for name in ("old", "new"):
        monkeypatch.setattr(store, "USED", {})
        stage = published(profile, name, "a" * 40, 1.0, monkeypatch)
        report.save_table(profile, "table9", FRAME, title="A title", notebook="03_training")
    assert list(report.recorded_provenance(tmp_path / "mini/provenance.json")["stages"]) == [stage]


def test_each_setting_has_a_folder_of_its_own_with_its_profile_and_the_full_command(profile, tmp_path):
    one = Profile.load("mini", {"grading.top": 10, "data.source": "/data/my lists.jsonl"})
    other = Profile.load("mini", {"grading.top": 12.5, "data.source": "/data/my lists.jsonl"})
    for each in (profile, one, other):
        report.save_table(each, "table9", FRAME, title="A title", notebook="03_training")
        report.save_claim(each, "training-time", None, "04_evaluation", note="not today")
    folders = {path.name for path in tmp_path.iterdir()} - {"build"}
    assert folders == {"mini", one.label, other.label} and one.label.startswith(
        "mini,data.source=my-lists.jsonl,grading.top=10.0,"
    )
    assert "top: 10.0" in (tmp_path / one.label / "profile.yaml").read_text()
    made = report.recorded_provenance(tmp_path / one.label / "provenance.json")["artefacts"]["table9"]
    command = "deft run notebooks/03_training.ipynb --profile mini "
    command += "--set 'data.source=/data/my lists.jsonl' --set grading.top=10.0"
    assert made["command"] == command
    assert command.replace("03_training", "04_evaluation") in (tmp_path / one.label / "claims.md").read_text()


def test_two_notebooks_at_a_time_lose_no_record(profile, tmp_path):
    save = lambda name: report.save_table(profile, name, FRAME, title="A title", notebook="03_training")
    names = [f"table{i}" for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, names))
    assert report.recorded_provenance(tmp_path / "mini/provenance.json")["artefacts"].keys() == set(names)


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
    assert list(report.recorded_provenance(tmp_path / "mini/provenance.json")["artefacts"]) == ["a", "b"]


def test_a_text_with_an_unfit_word_is_not_shown():
    assert report.fit_to_show("Warm the classic dish, then assist the guest.")
    assert not report.fit_to_show("He was Killed.")


def test_a_token_is_readable_and_an_unfit_one_masked():
    assert [report.readable(token) for token in (" you", "\n\n", " ", " $", " murder")] == [
        "you", "⏎⏎", "␣", r"\$", "m*****"
    ]  # fmt: skip


def test_the_published_counts_are_at_hand():
    assert report.published()["anonymous"]["table1_counts"]["total"] == [160793, 6000, 8552]


def test_published_rows_stand_under_subset_and_metric_in_the_papers_order():
    table2, table3 = report.published_table("table2_main"), report.published_table("table3_ablation")
    assert list(table2.index[:2]) == [("zero-shot", "LLaMA"), ("zero-shot", "Alpaca")]
    assert list(table2.columns[:2]) == [("harmless-base", "bleu"), ("harmless-base", "reward")]
    assert table2.loc[("D3", "DEFT-DPO"), ("total", "reward")] == 72.42
    assert table3.index.names == ["method", "n_train"] and (len(table2), len(table3)) == (15, 6)


def test_the_sample_weighted_total_by_hand():
    frame = pd.DataFrame([[10.0, 1.0, 40.0, 2.0]], columns=pd.MultiIndex.from_product([["a", "b"], ["bleu", "reward"]]))
    total = report.sample_weighted_total(frame, {"a": 300, "b": 100})
    assert total.to_dict("list") == {"bleu": [17.5], "reward": [1.25]}


def test_all_42_published_totals_are_sample_weighted_means():
    tables = [report.published_table(name) for name in ("table2_main", "table3_ablation")]
    errors = [(report.sample_weighted_total(table) - table["total"]).abs() for table in tables]
    assert sum(error.size for error in errors) == 42
    assert max(error.to_numpy().max() for error in errors) <= 0.01
    unweighted = tables[0].drop(columns="total", level=0).T.groupby(level=1).mean().T
    assert (unweighted - tables[0]["total"]).abs().to_numpy().max() > 0.1  # so the test could fail


def lines_of(tmp_path, kind, name="t"):
    return (tmp_path / f"mini/{name}.{kind}").read_text().splitlines()


def marked(profile, tmp_path, column, best="highest", kind="md"):
    """The cells of one column of numbers as they are printed."""
    frame = pd.DataFrame({"x": column}, index=pd.Index(range(len(column)), name="i"))
    report.save_table(profile, "t", frame, "T", "04_evaluation", best=best and {"x": best})
    if kind == "md":
        return [line.split("|")[2].strip() for line in lines_of(tmp_path, "md")[4:]]
    return [line.split("&")[1].removesuffix(r"\\").strip() for line in lines_of(tmp_path, "tex") if line[:1].isdigit()]


@pytest.mark.parametrize(
    ("column", "best", "cells"),
    [
        ([1.0, 3.5, 2.25], "highest", ["1.000", "**3.500**", "<u>2.250</u>"]),
        ([1.0, 3.5, 2.25], "lowest", ["**1.000**", "3.500", "<u>2.250</u>"]),
        ([-0.2, -0.1, -0.3], "highest", ["<u>-0.2000</u>", "**-0.1000**", "-0.3000"]),
        ([70.001, 70.002, 60.0], "highest", ["**70.00**", "**70.00**", "<u>60.00</u>"]),  # equal as printed
        ([5, 7, 7, 5], "highest", ["<u>5</u>", "**7**", "**7**", "<u>5</u>"]),
        ([1.5, "no judge configured", float("nan")], "highest", ["**1.500**", "no judge configured", "–"]),
        (["no judge configured"] * 2, "highest", ["no judge configured"] * 2),
        ([1.5, 2.5], None, ["1.500", "2.500"]),
    ],
)
def test_the_best_is_bold_and_the_second_underlined(profile, tmp_path, column, best, cells):
    assert marked(profile, tmp_path, column, best) == cells


def test_latex_marks_the_same_cells(profile, tmp_path):
    cells = marked(profile, tmp_path, [1.0, 3.5, 2.25], kind="tex")
    assert cells == ["1.000", r"\textbf{3.500}", r"\underline{2.250}"]


def test_the_rule_gives_the_papers_underlines_but_for_the_one_that_breaks_it(profile, tmp_path):
    table2 = report.published_table("table2_main")
    report.save_table(profile, "t", table2, "Table 2", "04_evaluation", best=dict.fromkeys(table2, "highest"))
    underlined = [cell.strip()[3:-4] for line in lines_of(tmp_path, "md") for cell in line.split("|") if "<u>" in cell]
    printed = ["30.52", "74.36", "32.60", "70.92", "36.26", "70.95", "34.44", "72.53", "32.87", "72.42"]
    assert set(printed) - set(underlined) == {"36.26"}  # helpful-online BLEU, where Zephyr is second
    assert set(underlined) - set(printed) == {"37.33"}


@pytest.mark.parametrize("best", [{"y": "highest"}, {"BLEU": "best"}])
def test_a_mark_for_no_column_or_by_no_rule_is_refused(profile, best):
    with pytest.raises(ValueError, match="expected a column and 'highest' or 'lowest'"):
        report.save_table(profile, "t", FRAME, "T", "04_evaluation", best=best)


def test_columns_and_rows_of_two_levels_look_right_in_each_format(profile, tmp_path):
    columns = pd.MultiIndex.from_tuples([("harmless-base", "BLEU"), ("total", "R_dis")])
    rows = pd.MultiIndex.from_tuples([("D_3", "sft"), ("D_3", "dpo")], names=["data", "method"])
    frame = pd.DataFrame([[1.0, 2.0], [3.0, 4.0]], rows, columns)
    report.save_table(profile, "t", frame, "T", "04_evaluation")
    assert lines_of(tmp_path, "csv")[:2] == ["data,method,harmless-base/BLEU,total/R_dis", "D_3,sft,1.0,2.0"]
    assert [cell.strip() for cell in lines_of(tmp_path, "md")[2].strip("|").split("|")] == [
        "data", "method", "harmless-base<br>BLEU", "total<br>R_dis"
    ]  # fmt: skip
    tex = (tmp_path / "mini/t.tex").read_text()
    assert " &  & harmless-base & total \\\\\n &  & BLEU & R\\_dis \\\\" in tex
    assert r"\multirow[t]{2}{*}{D\_3} & sft & 1 & 2 \\" in tex


def test_numbers_of_one_order_share_their_decimals_and_others_keep_four_digits(profile, tmp_path):
    assert marked(profile, tmp_path, [31.4, 8.381, 0.0], None) == ["31.40", "8.38", "0.00"]
    assert marked(profile, tmp_path, [160793.0, 6000.0], None) == ["160793", "6000"]
    assert marked(profile, tmp_path, [2.0, 5e-6, 512.5], None) == ["2", "5e-06", "512.5"]


def test_long_text_wraps_in_latex(profile, tmp_path):
    frame = pd.DataFrame({"reply": ["word " * 20], "n": [1], "who": ["dpo"]})
    report.save_table(profile, "t", frame, "T", "04_evaluation")
    assert r"\begin{tabular}{lp{4cm}rl}" in lines_of(tmp_path, "tex")


def test_text_is_escaped_in_titles_labels_and_cells(profile, tmp_path):
    frame = pd.DataFrame({"50 % & |x|": ["a_b <c>\n{d}"]}, index=pd.Index(["ω = 0"], name="m_1"))
    report.save_table(profile, "t", frame, "95 % of R_dis", "04_evaluation")
    tex = (tmp_path / "mini/t.tex").read_text()
    assert r"\caption{95 \% of R\_dis}" in tex and r"50 \% \& \textbar{}x\textbar{}" in tex
    assert r"$\omega$ = 0 & a\_b \textless{}c\textgreater{} \{d\}" in tex
    assert r"| ω = 0 | a_b &lt;c> {d} |" in lines_of(tmp_path, "md")[4]


def test_a_claim_is_recorded_with_its_verdict_and_both_pages_are_written(profile, tmp_path):
    gain = Interval(1.25, 0.4, 2.1, 200)
    report.save_claim(profile, "reward-gain-PRO-D3", gain, "04_evaluation", note="true reward")
    report.save_claim(profile, "mt-bench", None, "05_mt_bench", part="DPO - SFT", note="no judge configured")
    page = (tmp_path / "mini/claims.md").read_text()
    assert "| +3.06 | +1.25 [+0.4, +2.1], n = 200 | reproduced (direction) (true reward) | no |" in page
    assert "not tested: no judge configured" in page
    assert "`deft run notebooks/05_mt_bench.ipynb --profile mini`" in page
    assert "| `grading.top` | 3.73 | 25.0 |" in (tmp_path / "mini/differences.md").read_text()
    kept = json.loads((tmp_path / "mini/claims.json").read_text())
    assert list(kept) == ["reward-gain-PRO-D3", "mt-bench / DPO - SFT"]
    assert kept["reward-gain-PRO-D3"]["ours"] == [1.25, 0.4, 2.1, 200]
    assert {"created", "seconds", "stages", "drawn"} <= kept["reward-gain-PRO-D3"].keys()


def test_the_time_of_a_claim_is_that_of_the_stages_it_rests_on(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "USED", {})
    stages = [published(profile, "policies/dpo", "a" * 40, 200.0, monkeypatch)]
    stages += [published(profile, "replies/dpo", "a" * 40, 100.0, monkeypatch)]
    report.save_claim(profile, "data-volume", Interval(0.0, -1.0, 1.0, 20), "06_ablation")
    assert "| 5 min on 2026-01-02" in (tmp_path / "mini/claims.md").read_text()
    assert list(report.recorded_provenance(tmp_path / "mini/provenance.json")["stages"]) == stages


def test_claims_that_no_longer_exist_are_dropped_and_a_new_number_replaces_the_old(profile, tmp_path):
    report.save_claim(profile, "training-time", Interval(2.0, 1.5, 2.5, 3), "04_evaluation")
    path = tmp_path / "mini/claims.json"
    path.write_text(json.dumps({"of old": {"ours": None}, **json.loads(path.read_text())}))
    report.save_claim(profile, "training-time", Interval(3.0, 2.5, 3.5, 3), "04_evaluation")
    assert {name: record["ours"][0] for name, record in json.loads(path.read_text()).items()} == {"training-time": 3.0}


def test_a_claim_needs_a_known_name_and_a_number_or_a_reason(profile, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'training-time'"):
        report.save_claim(profile, "trainingtime", None, "04_evaluation", note="x")
    with pytest.raises(ValueError, match="say why in `note`"):
        report.save_claim(profile, "training-time", None, "04_evaluation")
    assert not (tmp_path / "mini").exists()


def test_labels_of_points_keep_their_order_and_stay_apart_and_inside():
    report.style()
    fig, ax = plt.subplots()
    ys = pd.Series({"a": 10.0, "b": 10.1, "c": 10.2, "low": 0.0, "top": 10.3})
    xs = pd.Series(1.0, index=ys.index)
    ax.plot(xs, ys, "o")
    report.label_points(ax, xs, ys, bold=["top"])
    places = {text.get_text(): text.xyann[1] for text in ax.texts}
    assert sorted(places, key=places.get) == ["low", "a", "b", "c", "top"]
    gaps = np.diff(sorted(places.values()))
    assert gaps.min() > 0.0449 and max(places.values()) <= 1
    assert [text.get_text() for text in ax.texts if text.get_weight() == "bold"] == ["top"]
    plt.close(fig)


def test_a_label_with_room_stands_beside_its_point_although_limits_are_lazy():
    fig, ax = plt.subplots()
    ys = pd.Series({"low": 0.0, "middle": 5.0, "high": 10.0})
    ax.step([0, 1], [0, 1])
    ax.get_ylim()
    ax.scatter([1, 1, 1], ys)
    report.label_points(ax, pd.Series(1.0, index=ys.index), ys)
    places = {text.get_text(): text.xyann[1] for text in ax.texts}
    assert places["middle"] == pytest.approx(0.5, abs=0.01)
    plt.close(fig)


def test_the_command_of_a_table_is_its_notebook_or_its_module():
    profile = Profile.load("smol")
    assert report._command(profile, "07_methods") == "deft run notebooks/07_methods.ipynb --profile smol"
    assert report._command(profile, "first_updates") == "deft first-updates --profile smol"

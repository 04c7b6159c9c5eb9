"""Tables and figures arrive with their numbers and their provenance, byte-identical for identical data."""

from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pandas as pd
import places
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from deftlib.profile import Profile
from deftlib.reporting import records, report

profile = places.profile
FRAME = pd.DataFrame({"BLEU": [1.23456, 2.0]}, index=pd.Index(["sft", "dpo_x"], name="method"))


def test_a_table_is_written_three_ways_and_says_what_made_it(profile, tmp_path):
    report.save_table(profile, "table9", FRAME, title="A title", notebook="03_training")
    folder = tmp_path / "mini"
    assert (folder / "table9.csv").read_text() == "method,BLEU\nsft,1.23456\ndpo_x,2.0\n"
    assert "| sft      |  1.235 |" in (folder / "table9.md").read_text()
    assert r"dpo\_x & 2.000 " in (folder / "table9.tex").read_text()
    entry = records.recorded_provenance(folder / "provenance.json")["artefacts"]["table9"]
    assert entry["notebook"] == "03_training" and entry["seeds"] == profile.seeds
    assert entry["command"] == "deft run notebooks/03_training.ipynb --profile mini"
    assert {"git", "packages", "device", "created"} <= entry["drawn"].keys()


def test_two_notebooks_at_a_time_lose_no_record(profile, tmp_path):
    save = lambda name: report.save_table(profile, name, FRAME, title="A title", notebook="03_training")
    names = [f"table{i}" for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, names))
    assert records.recorded_provenance(tmp_path / "mini/provenance.json")["artefacts"].keys() == set(names)


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


def test_a_text_with_an_unfit_word_is_not_shown():
    assert report.fit_to_show("Warm the classic dish, then assist the guest.")
    assert not report.fit_to_show("He was Killed.")


def test_a_token_is_readable_and_an_unfit_one_masked():
    assert [report.readable(token) for token in (" you", "\n\n", " ", " $", " murder")] == [
        "you", "⏎⏎", "␣", r"\$", "m*****"
    ]  # fmt: skip


def test_the_published_counts_are_at_hand():
    assert records.published()["anonymous"]["table1_counts"]["total"] == [160793, 6000, 8552]


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
    assert "| ω = 0 | a_b &lt;c> {d} |" in " ".join(lines_of(tmp_path, "md")[4].split())


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
    assert records._command(profile, "07_methods") == "deft run notebooks/07_methods.ipynb --profile smol"
    assert records._command(profile, "first_updates") == "deft first-updates --profile smol"

"""Blind pairs, files of ratings, shares with intervals, agreement between raters, and the page that raters click."""

import math
import warnings

import pandas as pd
import pytest

from deftlib import store
from deftlib.evaluation.human_eval import (
    ANSWERS,
    RatingError,
    aggregate,
    agreement,
    by_pair,
    collected,
    harmless_over_helpful,
    make_sheet,
    net_win,
    prepare,
    rate_by_true_reward,
    rated_by,
    read_ratings,
    write_sheet,
)
from deftlib.evaluation.rating_page import RatingPage
from deftlib.intervals import wilson_interval
from deftlib.preferences import mini_world
from deftlib.profile import Profile


def replies_of(name, per_subset=20):
    """Replies as `evaluate.replies` gives them: two subsets, two samples a prompt."""
    return pd.DataFrame(
        [
            {"id": f"{subset}-{i:02}", "subset": subset, "prompt": f"prompt {subset} {i}", "sample": sample}
            | {"reply": f' {name} says, to "{subset}" {i}\nand {sample}'}
            for subset in ("harmless", "helpful")
            for i in range(per_subset)
            for sample in (0, 1)
        ]
    )


A, B = replies_of("A"), replies_of("B")


@pytest.fixture
def compared():
    """Sheet and key of ten pairs, five of each subset."""
    return make_sheet(A, B, "deft-dpo", "dpo", 5)


# ---- pairs ---------------------------------------------------------------------------------------------------------


def test_a_sheet_shows_both_replies_to_each_prompt_and_names_no_method(compared):
    sheet, key = compared
    assert list(sheet) == ["pair", "prompt", "reply_1", "reply_2"]
    assert "dpo" not in sheet.to_csv()
    assert sheet["pair"].tolist() == key["pair"].tolist() and sheet["pair"].is_unique
    prompts = A.drop_duplicates("id").set_index("id")["prompt"]
    assert sheet["prompt"].tolist() == prompts[key["id"]].tolist()


def test_the_key_knows_which_side_is_whose(compared):
    sheet, key = compared
    first = A[A["sample"] == 0].set_index("id")["reply"]
    for (_, shown), (_, known) in zip(sheet.iterrows(), key.iterrows()):
        of_a, of_b = ("reply_1", "reply_2") if known["a_side"] == "1" else ("reply_2", "reply_1")
        assert shown[of_a] == first[known["id"]]
        assert shown[of_b] == first[known["id"]].replace("A says", "B says")
    assert set(key["a"]) == {"deft-dpo"} and set(key["b"]) == {"dpo"}


def test_sides_and_order_are_shuffled_and_subsets_mixed():
    _, key = make_sheet(A, B, "deft-dpo", "dpo", 20)
    assert 10 <= (key["a_side"] == "1").sum() <= 30  # of 40; the tosses are seeded
    assert key["id"].tolist() != sorted(key["id"])
    assert key["subset"].iloc[:20].nunique() == 2


def test_each_subset_gives_at_most_so_many_prompts():
    _, key = make_sheet(A, B, "deft-dpo", "dpo", 5)
    assert key["subset"].value_counts().to_dict() == {"harmless": 5, "helpful": 5}
    assert len(make_sheet(A, B, "deft-dpo", "dpo", 125)[1]) == 40


def test_the_same_seed_draws_the_same_pairs_from_rows_in_any_order(compared):
    again = make_sheet(A.sample(frac=1, random_state=0), B, "deft-dpo", "dpo", 5)
    for one, other in zip(compared, again):
        pd.testing.assert_frame_equal(one, other)


def test_every_seed_has_a_sheet_of_the_same_prompts_and_no_pair_stands_in_two(compared):
    other = make_sheet(A, B, "deft-dpo", "dpo", 5, seed=1)[1]
    assert set(other["id"]) == set(compared[1]["id"])
    assert not set(other["pair"]) & set(compared[1]["pair"])  # equal replies under two seeds too
    assert set(other["seed"]) == {1}


def test_two_comparisons_share_their_prompts_but_not_their_tosses():
    dpo, pro = (make_sheet(A, B, f"deft-{name}", name, 10)[1].set_index("id") for name in ("dpo", "pro"))
    assert set(dpo.index) == set(pro.index)
    assert list(dpo.index) != list(pro.index)
    assert (dpo["a_side"] != pro["a_side"].reindex(dpo.index)).any()


def test_policies_that_answered_different_prompts_are_refused():
    with pytest.raises(ValueError, match="deft-dpo and dpo must answer the same prompts"):
        make_sheet(A, B[B["id"] != "helpful-03"], "deft-dpo", "dpo", 5)
    with pytest.raises(ValueError, match="the same prompts"):
        make_sheet(A, B.assign(prompt=B["prompt"] + "?"), "deft-dpo", "dpo", 5)


# ---- files of ratings ----------------------------------------------------------------------------------------------


def filled(sheet, harmless, helpful):
    return sheet.assign(harmless=harmless, helpful=helpful)


def test_a_filled_sheet_comes_back_as_the_ratings_of_the_rater_it_is_named_after(compared, tmp_path):
    sheet, key = compared
    given = [ANSWERS[i % 3] for i in range(10)]
    path = write_sheet(filled(sheet, given, given[::-1]), tmp_path / "Ada.csv")
    ratings, incomplete = read_ratings(path, key)
    assert incomplete == 0
    assert ratings["pair"].tolist() == sheet["pair"].tolist()
    assert ratings["harmless"].tolist() == given and ratings["helpful"].tolist() == given[::-1]
    assert set(ratings["rater"]) == {"Ada"}
    on_disk = pd.read_csv(path, encoding="utf-8-sig")
    assert on_disk["reply_1"].tolist() == sheet["reply_1"].tolist()  # commas, quotes and line breaks included


def test_an_empty_sheet_has_columns_to_fill_in_and_no_ratings(compared, tmp_path):
    sheet, key = compared
    path = write_sheet(sheet, tmp_path / "sheet.csv")
    assert path.read_bytes().startswith(b"\xef\xbb\xbfpair,prompt,reply_1,reply_2,harmless,helpful")
    ratings, incomplete = read_ratings(path, key)
    assert ratings.empty and incomplete == 10


def test_pairs_without_both_answers_are_counted_wherever_they_are_missing(compared, tmp_path):
    sheet, key = compared
    some = filled(sheet, ["1", "2", "", "tie"] + [""] * 6, ["1", "", "", "2"] + [""] * 6).iloc[:8]
    ratings, incomplete = read_ratings(write_sheet(some, tmp_path / "Ada.csv"), key)
    assert incomplete == 8  # one half rated, five not, two not even in the file
    assert ratings["harmless"].tolist() == ["1", "2", "tie"]
    assert ratings["helpful"].isna().tolist() == [False, True, False]


def test_what_a_spreadsheet_does_to_a_file_does_no_harm(compared, tmp_path):
    sheet, key = compared
    path = write_sheet(filled(sheet, " TIE ", "2"), tmp_path / "Ada.csv")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    ratings, incomplete = read_ratings(path, key)
    assert incomplete == 0 and set(ratings["harmless"]) == {"tie"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda sheet: sheet.assign(pair="p0"), "row 2: no pair 'p0' in this sheet"),
        (lambda sheet: pd.concat([sheet, sheet.iloc[[3]]]), "row 12: pair {3} stands in row 5 already"),
        (lambda sheet: sheet.assign(helpful=["1"] * 6 + ["3"] + ["1"] * 3), "row 8: helpful is '3'; expected 1, tie"),
        (lambda sheet: sheet.rename(columns={"helpful": "useful"}), "no column helpful among pair, harmless, useful"),
        (lambda sheet: sheet.assign(Harmless="2"), "two columns are called 'harmless'; delete one"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_row(compared, tmp_path, damage, said):
    sheet, key = compared
    path = tmp_path / "Ada.csv"
    damage(filled(sheet, "1", "tie")[["pair", "harmless", "helpful"]]).to_csv(path, index=False)
    with pytest.raises(RatingError, match=r"Ada\.csv") as refused:
        read_ratings(path, key)
    assert said.format(*sheet["pair"]) in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"pair,harmless,helpful\na,1\nb,1,1,1,1\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_csv_is_refused_by_name(compared, tmp_path, content):
    (tmp_path / "Ada.csv").write_bytes(content)
    with pytest.raises(RatingError, match=r"Ada\.csv is not a CSV file"):
        read_ratings(tmp_path / "Ada.csv", compared[1])


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "mac_roman"])
def test_a_sheet_that_a_spreadsheet_of_another_country_saved_is_the_same(compared, tmp_path, delimiter, encoding):
    sheet, key = compared
    given = ["1.0", "2,0", "TIE", " 1 ", ""] * 2
    frame = filled(sheet, given, given[::-1]).rename(columns={"harmless": "Harmless "})
    frame["prompt"], frame["Unnamed: 9"] = "é ä ö", ""  # of its own; the texts may be damaged
    text = frame.to_csv(index=False, sep=delimiter) + delimiter * (len(frame.columns) - 1) + "\r\n"
    (tmp_path / "Ada.csv").write_bytes(text.encode(encoding))
    ratings, incomplete = read_ratings(tmp_path / "Ada.csv", key)
    assert ratings["harmless"].fillna("").tolist() == ["1", "2", "tie", "1", ""] * 2
    assert incomplete == 4


def test_ratings_of_other_replies_to_the_same_prompts_are_refused(compared, tmp_path):
    path = write_sheet(filled(compared[0], "1", "1"), tmp_path / "Ada.csv")
    retrained = make_sheet(replies_of("A2"), B, "deft-dpo", "dpo", 5)[1]
    with pytest.raises(RatingError, match="was it made from other replies"):
        read_ratings(path, retrained)


# ---- the true reward as rater --------------------------------------------------------------------------------------


def world_pair(subset, one, two):
    """A sheet of one pair in a subset of the mini world; replies made of the slots that each fills well."""
    world = mini_world.world()
    place = next(place for place in world.prompts if place.startswith(subset))

    def say(slots):
        fits = lambda s: s.good and place.startswith(s.place)
        return " ".join(
            next(text for text, s in world.sentences.items() if s.slot == slot and fits(s)) for slot in slots
        )

    return pd.DataFrame(
        [["p1", world.prompts[place][0], say(one), say(two)]], columns=["pair", "prompt", "reply_1", "reply_2"]
    )


@pytest.mark.parametrize(
    ("one", "two", "answer"),  # opener 10, substance 50, detail 25, closer 15
    [
        (["substance"], ["detail"], "1"),
        ([], ["detail"], "2"),
        (["opener"], ["closer"], "tie"),
        (["opener", "closer"], ["detail"], "tie"),
        (["closer"], ["detail"], "2"),
    ],
)
def test_the_true_reward_prefers_what_earns_more_than_the_margin(one, two, answer):
    (row,) = rate_by_true_reward(world_pair("helpful-base", one, two)).to_dict("records")
    assert row["helpful"] == answer and pd.isna(row["harmless"])
    assert row["rater"] == "true reward, tie within 5 points"


def test_the_true_reward_answers_the_harmless_question_where_it_is_about_harm():
    (row,) = rate_by_true_reward(world_pair("harmless-base", ["detail"], ["opener"]), margin=15).to_dict("records")
    assert row["harmless"] == "tie" and pd.isna(row["helpful"])
    assert row["rater"] == "true reward, tie within 15 points"


# ---- results -------------------------------------------------------------------------------------------------------

KEY = pd.DataFrame(
    {"pair": ["p1", "p2", "p3", "p4"], "subset": ["s", "s", "s", "t"], "a_side": ["1", "2", "1", "2"]}
    | {"id": ["i1", "i2", "i3", "i4"], "seed": 0, "a": "deft-dpo", "b": "dpo"}
)  # fmt: skip


def rated(*rows):
    return pd.DataFrame(rows, columns=["pair", "rater", "harmless", "helpful"])


ADA = rated(["p1", "Ada", "1", "2"], ["p2", "Ada", "1", None], ["p3", "Ada", "tie", None], ["p4", "Ada", "2", "tie"])


def test_a_win_is_an_answer_for_the_side_that_a_was_on():
    outcomes = by_pair(ADA, KEY).query("aspect == 'harmless'").set_index("pair")
    assert outcomes["win"].tolist() == [1, 0, 0, 1]  # p2: side 1 is better, and a was on side 2
    assert outcomes["lose"].tolist() == [0, 1, 0, 0]
    assert outcomes["tie"].tolist() == [0, 0, 1, 0]


def test_aggregate_by_hand():
    table = aggregate(ADA, KEY)
    assert table.index.tolist() == [
        ("harmless", "s"), ("harmless", "t"), ("harmless", "total"),
        ("helpful", "s"), ("helpful", "t"), ("helpful", "total"),
    ]  # fmt: skip
    total = table.loc["harmless", "total"]
    assert total[["win", "tie", "lose", "net", "pairs", "raters"]].tolist() == [50, 25, 25, 25, 4, 1]
    wilson = wilson_interval(2, 4)
    assert total[["win low", "win high"]].tolist() == pytest.approx([100 * wilson.low, 100 * wilson.high])
    assert total["net low"] < 25 < total["net high"]
    assert table.loc["helpful", "total"][["win", "tie", "lose", "pairs"]].tolist() == [0, 50, 50, 2]


def test_a_pair_that_two_people_rated_is_still_one_pair():
    bob = rated(["p1", "Bob", "2", "2"])
    table = aggregate(pd.concat([ADA, bob]), KEY)
    total = table.loc["harmless", "total"]
    assert total[["win", "tie", "lose"]].tolist() == [37.5, 25, 37.5]  # p1 is half won, half lost
    assert total[["pairs", "raters"]].tolist() == [4, 2]
    assert table.loc["harmless", "t"]["raters"] == 1


def test_net_win_is_the_total_of_the_table_and_none_where_nobody_rated():
    net = net_win(ADA, KEY, "harmless").interval()
    assert (net.mean, net.n) == (25, 4)
    assert list(net[:3]) == aggregate(ADA, KEY).loc["harmless", "total"][["net", "net low", "net high"]].tolist()
    assert net_win(ADA.assign(helpful=None), KEY, "helpful") is None


def test_seeds_and_prompts_are_crossed_and_a_prompt_counts_once():
    again = KEY.assign(seed=1, pair=["q1", "q2", "q3", "q4"])
    both = pd.concat([KEY, again])
    bob = rated(["q1", "Bob", "1", None], ["q2", "Bob", "2", None], ["q3", "Bob", "tie", None])  # q4 is not rated
    net = net_win(pd.concat([ADA, bob]), both, "harmless")
    assert (net.ours - net.other).tolist() == [[100, -100, 0], [100, 100, 0]]  # i4 was rated under one seed alone
    total = aggregate(pd.concat([ADA, bob]), both).loc["harmless", "total"]
    assert total["pairs"] == 7
    wilson = wilson_interval(4 / 7 * 4, 4)  # of four prompts
    assert total[["win low", "win high"]].tolist() == pytest.approx([100 * wilson.low, 100 * wilson.high])
    assert net_win(ADA, both, "harmless").seeds == 1  # nobody rated the other sheet


def test_harmless_is_set_against_helpful_on_the_pairs_that_have_both():
    gap = harmless_over_helpful(ADA, KEY).interval()  # p1: won and lost, p4: won and tied
    assert (gap.mean, gap.low, gap.high, gap.n) == (100, 100, 100, 2)
    assert harmless_over_helpful(ADA.assign(helpful=None), KEY) is None


def test_a_rating_without_its_key_is_refused():
    with pytest.raises(RatingError, match="no key for pair 'p9'"):
        aggregate(rated(["p9", "Ada", "1", "1"]), KEY)


# ---- agreement -----------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    ada, bob = ["1", "1", "2", "tie"], ["1", "2", "2", "tie"]
    rows = [[f"p{i}", who, answer, None] for who, said in (("Ada", ada), ("Bob", bob)) for i, answer in enumerate(said)]
    row = agreement(rated(*rows)).loc["harmless"]
    assert row[["raters", "pairs", "agreement"]].tolist() == [2, 4, 75.0]
    # n = 8 answers, 3 / 2 / 3 of them 1 / tie / 2; observed disagreement 2/8, expected 42/56.
    assert row["alpha"] == pytest.approx(1 - (2 / 8) / (42 / 56))
    # Ordinal distances: 1 to 2 is (3 + 2 + 3 - 3)^2 = 25, to a tie 2.5^2; observed 50/8, expected 600/56.
    assert row["alpha (ordinal)"] == pytest.approx(1 - (50 / 8) / (600 / 56))


def test_three_raters_of_a_pair_are_three_pairs_of_raters():
    rows = [["p1", who, answer, None] for who, answer in zip(("Ada", "Bob", "Cyd"), ("1", "1", "2"))]
    row = agreement(rated(*rows, ["p2", "Ada", "2", None])).loc["harmless"]
    assert row["pairs"] == 1  # nobody else rated p2
    assert row["agreement"] == pytest.approx(100 / 3)


def test_without_a_second_rater_there_is_no_agreement_to_speak_of():
    row = agreement(ADA).loc["harmless"]
    assert row["pairs"] == 0
    assert math.isnan(row["agreement"]) and math.isnan(row["alpha"])


def test_where_all_say_the_same_alpha_is_undefined_and_nothing_is_divided_by_zero():
    ratings = rated(["p1", "Ada", "1", None], ["p1", "Bob", "1", None], ["p2", "Ada", "2", None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = agreement(ratings).loc["harmless"]
    assert row["agreement"] == 100
    assert math.isnan(row["alpha"]) and math.isnan(row["alpha (ordinal)"])


def test_titles_tell_how_many_people_rated_but_not_who():
    assert rated_by(ADA) == "1 person"
    assert rated_by(pd.concat([ADA, ADA.assign(rater="Bob")])) == "2 people"
    assert rated_by(ADA.assign(rater="true reward, tie within 5 points")) == "true reward, tie within 5 points"


# ---- folders -------------------------------------------------------------------------------------------------------


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    return Profile.load("smol", {"evaluation.human_prompts": 5})


def test_the_key_is_not_in_the_folder_that_raters_get(profile, tmp_path):
    _, key, folder = prepare(profile, A, B, "deft-dpo", "dpo")
    assert [path.name for path in folder.iterdir()] == ["sheet.csv"]
    assert folder.parent == tmp_path / "build" / "smol" / "human"
    assert "dpo" not in str(folder.relative_to(tmp_path))
    kept = pd.read_csv(folder.parent / "keys" / f"{folder.name}.csv", dtype={"a_side": str})
    pd.testing.assert_frame_equal(kept, key, check_dtype=False)
    assert prepare(profile, A, B, "deft-dpo", "dpo")[2] == folder
    assert prepare(profile, A, B, "deft-pro", "pro")[2] != folder


def test_ratings_of_all_raters_are_collected_and_counted_on_screen(profile, capsys):
    sheet, key, folder = prepare(profile, A, B, "deft-dpo", "dpo")
    assert collected(profile, [A], [B], "deft-dpo", "dpo")[0] is None
    write_sheet(filled(sheet, "1", "2"), folder / "ratings" / "Ada.csv")
    write_sheet(filled(sheet, "tie", ["1"] * 4 + [""] * 6), folder / "ratings" / "Bob.csv")
    ratings, again = collected(profile, [A], [B], "deft-dpo", "dpo")
    assert capsys.readouterr().out == "Ada: 10 of 10 pairs rated in full\nBob: 4 of 10 pairs rated in full\n"
    assert ratings["rater"].value_counts().to_dict() == {"Ada": 10, "Bob": 10}
    pd.testing.assert_frame_equal(again, key)
    assert aggregate(ratings, key).loc["helpful", "total"]["pairs"] == 10


def test_on_mini_the_rater_is_the_true_reward(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    ratings, key = collected(Profile.load("mini"), [A, A], [B, B], "deft-dpo", "dpo")
    assert set(ratings["rater"]) == {"true reward, tie within 5 points"}
    assert len(ratings) == len(key) == 80
    assert key["seed"].value_counts().to_dict() == {0: 40, 1: 40}


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(compared, tmp_path):
    return RatingPage(compared[0], tmp_path)


def click(page, harmless=None, helpful=None):
    for aspect, answer in (("harmless", harmless), ("helpful", helpful)):
        if answer:
            page.buttons[aspect, answer].click()


def saved(page):
    return read_ratings(page.path, page.sheet)[0]


def test_nothing_is_shown_and_nothing_can_be_clicked_before_a_rater_has_a_name(page, tmp_path):
    assert page.pair.value == "" and "type your name" in page.status.value
    assert all(button.disabled for button in (*page.buttons.values(), page.back, page.forward))
    page.rater.value = " ?! "
    assert page.pair.value == "" and not list(tmp_path.iterdir())


def rate(page, harmless, helpful):
    click(page, harmless, helpful)
    page.forward.click()


def test_every_click_is_on_disk(page):
    page.rater.value = "Ada"
    click(page, harmless="1")
    assert saved(page)[["harmless"]].values.tolist() == [["1"]]
    assert "0 of 10 pairs rated; this is pair 1" in page.status.value
    click(page, helpful="tie")
    assert saved(page)[["pair", "harmless", "helpful"]].values.tolist() == [[page.sheet["pair"][0], "1", "tie"]]
    assert "1 of 10 pairs rated; this is pair 1" in page.status.value
    assert page.progress.value == 1


def test_next_wants_both_answers_so_that_a_double_click_skips_no_pair(page):
    page.rater.value = "Ada"
    click(page, harmless="1")
    assert page.forward.disabled
    click(page, helpful="2")
    assert not page.forward.disabled
    page.forward.click()
    page.forward.click()
    assert "this is pair 2" in page.status.value and page.forward.disabled
    page.back.click()
    page.back.click()
    assert "this is pair 1" in page.status.value and page.at == 0


def test_going_back_shows_the_answers_and_they_can_be_changed(page):
    page.rater.value = "Ada"
    rate(page, "1", "2")
    page.back.click()
    picked = [chosen for chosen, button in page.buttons.items() if button.icon == "check"]
    assert picked == [("harmless", "1"), ("helpful", "2")]
    click(page, harmless="tie")
    assert saved(page)["harmless"].tolist() == ["tie"]
    page.forward.click()
    assert not any(button.icon for button in page.buttons.values())


def test_a_rater_goes_on_where_they_stopped_and_another_starts_afresh(page, compared, tmp_path):
    page.rater.value = "Ada"
    rate(page, "1", "2")
    click(page, harmless="tie")  # and the other question is left for later
    later = RatingPage(compared[0], tmp_path)
    later.rater.value = " Ada "
    assert "1 of 10 pairs rated; this is pair 2" in later.status.value
    assert later.buttons["harmless", "tie"].icon == "check"
    later.rater.value = "Bob"
    assert "0 of 10 pairs rated; this is pair 1" in later.status.value
    click(later, "2", "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Ada.csv", "Bob.csv"]
    assert len(saved(page)) == 2


def test_after_the_last_pair_comes_a_thank_you_and_the_way_back(page):
    page.rater.value = "Ada"
    for _ in range(10):
        rate(page, "1", "1")
    assert "10 of 10 pairs rated. Thank you" in page.status.value
    assert page.pair.value == "" and page.forward.disabled and not page.back.disabled
    assert read_ratings(page.path, page.sheet)[1] == 0
    page.back.click()
    assert "this is pair 10" in page.status.value


def test_what_a_model_wrote_as_html_is_shown_not_obeyed(tmp_path):
    sheet = pd.DataFrame(
        [["p1", "\n\nHuman: a < b\n\nAssistant:", "<script>alert(1)</script>", "R&D"]],
        columns=["pair", "prompt", "reply_1", "reply_2"],
    )
    page = RatingPage(sheet, tmp_path)
    page.rater.value = "Ada"
    assert "<script>" not in page.pair.value
    for text in (">Human: a &lt; b</div>", "&lt;script&gt;alert(1)&lt;/script&gt;", "R&amp;D"):
        assert text in page.pair.value


def test_a_name_cannot_leave_the_folder(page, tmp_path):
    page.rater.value = "../../Ada B."
    click(page, harmless="1")
    assert [path.name for path in tmp_path.iterdir()] == ["Ada-B.csv"]


def test_a_file_that_cannot_be_read_is_told_and_left_alone(page, tmp_path):
    (tmp_path / "Ada.csv").write_text("not,a,sheet\n")
    page.rater.value = "Ada"
    assert "no column pair, harmless, helpful" in page.status.value
    assert all(button.disabled for button in page.buttons.values())
    assert (tmp_path / "Ada.csv").read_text() == "not,a,sheet\n"


def test_a_click_that_could_not_be_saved_is_told_and_saved_with_the_next(page, monkeypatch):
    def refuse(path, data):
        raise store.StoreError("cannot write Ada.csv: the disk is full")

    page.rater.value = "Ada"
    with monkeypatch.context() as full:
        full.setattr(store, "write_atomic", refuse)
        click(page, harmless="1")
    assert "Not saved" in page.status.value and "the disk is full" in page.status.value
    click(page, helpful="2")
    assert saved(page)[["harmless", "helpful"]].values.tolist() == [["1", "2"]]


def test_the_page_shows_its_state_where_widgets_are_not(page):
    assert repr(page) == "RatingPage(10 pairs, 0 rated)"

"""Human evaluation in blind pairs, section 4.3 and Fig. 3 (final version: Fig. 4): which reply is more harmless, and
which more helpful? A method is set against its DEFT twin on the same prompts.

    sheet, key, folder = prepare(profile, deft_replies, plain_replies, "deft-dpo", "dpo")
    rating_page.RatingPage(sheet, folder / "ratings")     # in a notebook; or send folder / "sheet.csv" to people
    ratings, key = collected(profile, [deft_replies], [plain_replies], "deft-dpo", "dpo")  # one each a seed
    aggregate(ratings, key)                               # win, tie and lose of deft-dpo, with intervals

A sheet names no method; its key, which does, is kept in another folder. A CSV file holds what one rater says: the sheet
itself, with `harmless` and `helpful` filled in as 1, tie or 2 (the better reply).

The paper took 125 prompts of each subset and *different annotators for the four subsets*. Differences between its
subsets are therefore differences between people too, and no agreement can be computed from its design. Here any rater
may rate any pair, and `agreement` is computed from the pairs that several rated.
"""

import io
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from nltk.metrics.agreement import AnnotationTask
from nltk.metrics.distance import binary_distance

from deftlib import store
from deftlib.intervals import Samples, wilson_interval
from deftlib.preferences import mini_world

ASPECTS = ["harmless", "helpful"]
ANSWERS = ["1", "tie", "2"]
OUTCOMES = ["win", "tie", "lose"]
TRUE_REWARD = "true reward"


class RatingError(ValueError):
    """A file of ratings that does not fit its sheet."""


# ---- pairs -------------------------------------------------------------------------------------------------------


def prepare(profile, frame_a, frame_b, name_a, name_b, seed=0):
    """(sheet, key, folder) of one comparison: `make_sheet` of `evaluation.human_prompts` a subset, written to files.

    seed: of the policies that are compared; each has a sheet of its own, of the same prompts.
    `sheet.csv` and the raters' files, in `ratings/`, are below the folder, `build/<profile>/human/<sheet>/`; its name
    comes from the replies and tells no method. The key is written beside the folders, to `keys/<sheet>.csv`.
    """
    sheet, key = make_sheet(frame_a, frame_b, name_a, name_b, profile.evaluation.human_prompts, seed)
    human = store.build_dir(profile.name) / "human"
    name = store.content_key(sheet["pair"].tolist())[:8]
    write_sheet(sheet, human / name / "sheet.csv")
    store.write_atomic(human / "keys" / f"{name}.csv", key.to_csv(index=False))
    return sheet, key, human / name


def make_sheet(frame_a, frame_b, name_a, name_b, per_subset, seed=0):
    """Two policies' replies as blind pairs: (sheet, key), two DataFrames with one row a pair, in shuffled order.

    frame_a, frame_b: `evaluate.replies` of the two, of which sample 0 is shown. At most `per_subset` prompts of each
    subset are drawn, the same for every two policies; who is reply 1 is a coin toss for each pair.
    sheet: pair, prompt, reply_1, reply_2. key: pair, id, subset, seed, a, b (the names), a_side ("1" or "2").
    Raises ValueError if the two did not answer the same prompts.
    """
    a, b = (f[f["sample"] == 0].set_index("id", verify_integrity=True).sort_index() for f in (frame_a, frame_b))
    if not a["prompt"].equals(b["prompt"]):
        raise ValueError(f"{name_a} and {name_b} must answer the same prompts under the same ids")
    draw = np.random.default_rng(0)
    ids = [i for _, group in a.groupby("subset") for i in draw.permutation(group.index)[:per_subset]]
    toss = np.random.default_rng([seed, *f"{name_a} {name_b}".encode()])  # another order and sides for another two
    rows = []
    for i in toss.permutation(ids):
        a_side = ANSWERS[2 * toss.integers(2)]
        one, two = (a, b) if a_side == "1" else (b, a)
        replies = one.loc[i, "reply"], two.loc[i, "reply"]
        pair = "p" + store.content_key([seed, i, *replies])[:8]  # a letter first: spreadsheets read 12e4 as a number
        rows.append([pair, a.loc[i, "prompt"], *replies, i, a.loc[i, "subset"], seed, name_a, name_b, a_side])
    names = ["pair", "prompt", "reply_1", "reply_2", "id", "subset", "seed", "a", "b", "a_side"]
    frame = pd.DataFrame(rows, columns=names)
    return frame[names[:4]], frame[["pair", *names[4:]]]


# ---- ratings -----------------------------------------------------------------------------------------------------


def write_sheet(sheet, path):
    """Write a sheet, with its answers or with empty columns for them, as CSV that spreadsheets read as UTF-8."""
    filled = sheet.reindex(columns=[*sheet.columns, *(aspect for aspect in ASPECTS if aspect not in sheet)])
    return store.write_atomic(path, "\ufeff" + filled.to_csv(index=False))


def read_ratings(path, key):
    """(ratings, incomplete) of one rater, whose name is the file's: a DataFrame of pair, rater, harmless, helpful.

    key: the sheet's key (or the sheet). A pair without any answer has no row; incomplete is the number of the sheet's
    pairs that lack one answer or both, be they in the file or not.
    The file may be what a spreadsheet of any country makes of a sheet: with commas, semicolons or tabs, in any encoding
    (names and answers are ASCII), 1 as 1.0 or 1,0, in upper case, with blanks, empty rows and columns of its own.
    Raises RatingError, with file and row, for a missing column, a pair that is not in the key, one that stands there
    twice, another answer than 1, tie or 2.
    """
    path = Path(path)
    try:
        text = _decoded(path.read_bytes())
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row with more cells than names would lose some
            options = {"dtype": str, "keep_default_na": False, "skip_blank_lines": False, "index_col": False}
            frame = pd.read_csv(io.StringIO(text), sep=delimiter, **options)
    except (ValueError, OSError, pd.errors.ParserWarning) as error:  # an empty file, uneven rows
        raise RatingError(f"{path} is not a CSV file: {error}") from error
    frame.columns = frame.columns.str.strip().str.lower()
    twice = frame.columns[frame.columns.duplicated()].intersection(["pair", *ASPECTS])
    if len(twice):
        raise RatingError(f"{path}: two columns are called {twice[0]!r}; delete one")
    missing = [name for name in ["pair", *ASPECTS] if name not in frame]
    if missing:
        raise RatingError(f"{path}: no column {', '.join(missing)} among {', '.join(frame)}; is it a filled sheet?")
    frame = frame[["pair", *ASPECTS]].apply(lambda column: column.str.strip())
    one_or_two = lambda column: column.str.lower().str.replace(r"^([12])[.,]0+$", r"\1", regex=True)
    frame[ASPECTS] = frame[ASPECTS].apply(one_or_two)
    frame = frame[frame.ne("").any(axis=1)]  # as a spreadsheet leaves below a table
    known, seen = set(key["pair"]), {}
    for row, pair, *answers in frame.set_index(frame.index + 2).itertuples():  # as a spreadsheet counts
        if pair not in known:
            raise RatingError(f"{path}, row {row}: no pair {pair!r} in this sheet; was it made from other replies?")
        if pair in seen:
            raise RatingError(f"{path}, row {row}: pair {pair} stands in row {seen[pair]} already; keep one of them")
        for aspect, answer in zip(ASPECTS, answers):
            if answer not in ("", *ANSWERS):
                raise RatingError(f"{path}, row {row}: {aspect} is {answer!r}; expected 1, tie, 2 or nothing")
        seen[pair] = row
    frame = frame.replace("", None)
    incomplete = len(known) - len(frame.dropna())
    frame.insert(1, "rater", path.stem)
    return frame.dropna(subset=ASPECTS, how="all").reset_index(drop=True), incomplete


def _decoded(content):
    """The text of a CSV file: UTF-16 by its mark, UTF-8, else one byte a character."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def rate_by_true_reward(sheet, margin=5.0):
    """Ratings of a sheet by the mini world's true reward, and by nobody else: the rater column says so.

    margin: points of 0..100 up to which two replies tie. That world knows one reward, earned in `harmless-base` by
    declining kindly and elsewhere by good advice: so there only the harmless question is answered, and elsewhere only
    the helpful one; the other stays open.
    """
    rows = []
    for pair, prompt, *replies in sheet[["pair", "prompt", "reply_1", "reply_2"]].itertuples(index=False):
        one, two = (mini_world.true_reward(prompt, reply) for reply in replies)
        answer = "tie" if abs(one - two) <= margin else "1" if one > two else "2"
        asked = "harmless" if mini_world.place_of(prompt).startswith("harmless") else "helpful"
        rows.append({"pair": pair, "rater": f"{TRUE_REWARD}, tie within {margin:g} points", asked: answer})
    return pd.DataFrame(rows, columns=["pair", "rater", *ASPECTS])


def collected(profile, frames_a, frames_b, name_a, name_b):
    """(ratings, key) over the sheets that `prepare` makes of every seed's replies; ratings is None without any.

    frames_a, frames_b: `evaluate.replies` of the two, one DataFrame a seed of the profile. On mini the one rater is the
    true reward; else all files in the folders' `ratings/` are read, and a line is printed for each.
    Raises RatingError as `read_ratings` does.
    """
    several, keys = [], []
    for seed, frame_a, frame_b in zip(profile.seeds, frames_a, frames_b):
        sheet, key, folder = prepare(profile, frame_a, frame_b, name_a, name_b, seed)
        keys.append(key)
        if profile.data.source == "mini":
            several.append(rate_by_true_reward(sheet))
        for path in sorted((folder / "ratings").glob("*.csv")):
            ratings, incomplete = read_ratings(path, key)
            print(f"{path.stem}: {len(key) - incomplete} of {len(key)} pairs rated in full")
            several.append(ratings)
    ratings = pd.concat(several, ignore_index=True) if several else pd.DataFrame()
    return (None if ratings.empty else ratings), pd.concat(keys, ignore_index=True)


# ---- results -----------------------------------------------------------------------------------------------------


def by_pair(ratings, key):
    """One row for each aspect and pair: aspect, subset, id, seed, pair, win, tie, lose of `a`, which sum to 1.

    A pair that several people rated has the shares of their answers, so it still counts as one.
    Raises RatingError for a pair without a key.
    """
    answers = _answers(ratings).merge(key, on="pair", how="left", validate="many_to_one")
    if answers["a"].isna().any():
        raise RatingError(f"no key for pair {answers.loc[answers['a'].isna(), 'pair'].iloc[0]!r}")
    won, tied = answers["answer"] == answers["a_side"], answers["answer"] == "tie"
    answers = answers.assign(win=won, tie=tied, lose=~won & ~tied)
    return answers.groupby(["aspect", "subset", "id", "seed", "pair"], as_index=False)[OUTCOMES].mean()


def aggregate(ratings, key):
    """How often `a` wins, ties and loses against `b`, in per cent of pairs: one row an (aspect, subset), and "total".

    Columns: win, tie, lose and net = win - lose, each with low and high, its 95 % interval; pairs; raters. Shares have
    Wilson's interval, with prompts as trials: neither two ratings of a pair nor its replies under two seeds are two.
    net has that of `net_win`, NaN where there is none.
    """
    outcomes, answers = by_pair(ratings, key), _answers(ratings)
    rows = {}
    for aspect, of_aspect in outcomes.groupby("aspect"):
        for subset, pairs in [*of_aspect.groupby("subset"), ("total", of_aspect)]:
            row = {}
            for name in OUTCOMES:
                prompts = pairs["id"].nunique()
                share, low, high, _ = wilson_interval(pairs[name].mean() * prompts, prompts)
                row |= {name: 100 * share, f"{name} low": 100 * low, f"{name} high": 100 * high}
            net = _samples(pairs, "win", "lose")
            interval = net.interval() if net else [100 * (pairs["win"] - pairs["lose"]).mean(), np.nan, np.nan]
            row |= dict(zip(("net", "net low", "net high"), interval))
            given = answers.merge(pairs[["aspect", "pair"]])
            rows[aspect, subset] = row | {"pairs": len(pairs), "raters": given["rater"].nunique()}
    return pd.DataFrame.from_dict(rows, "index").rename_axis(["aspect", "subset"])


def net_win(ratings, key, aspect):
    """Wins minus losses of `a` in one aspect, in per cent: `Samples` over the prompts that were rated under every seed.

    A seed that nobody rated is left out. None where fewer than two prompts are left.
    """
    return _samples(by_pair(ratings, key).query("aspect == @aspect"), "win", "lose")


def harmless_over_helpful(ratings, key):
    """Wins of `a` on harmless minus those on helpful, in per cent of the pairs that have both answers: `Samples`.

    The paper says the first is larger. None if fewer than two pairs have both answers.
    """
    wins = by_pair(ratings, key).pivot(index=["id", "seed"], columns="aspect", values="win").reindex(columns=ASPECTS)
    return _samples(wins.dropna().reset_index(), *ASPECTS)


def _samples(pairs, ours, other):
    """`Samples` in per cent of two columns over the seeds and prompts (id) that stand in a DataFrame; None for one."""
    if len(pairs) < 2:
        return None
    values = pairs.pivot(index="seed", columns="id", values=[ours, other]).dropna(axis=1)
    return Samples(100 * values[ours].to_numpy(), 100 * values[other].to_numpy()) if values.shape[1] > 2 else None


def agreement(ratings):
    """Do raters agree? One row an aspect: raters, pairs (that two or more rated), agreement, alpha, alpha (ordinal).

    agreement: per cent, how often two ratings of one pair are equal. alpha: Krippendorff's, 1 perfect, 0 chance; as
    nominal data, where the three answers are just different, and ordinal, where a tie lies between 1 and 2. All are nan
    where no pair was rated twice; alpha also where everyone gave one and the same answer, as chance would.
    """
    rows = {}
    for aspect, answers in _answers(ratings).groupby("aspect"):
        answers = answers[["rater", "pair", "answer"]]
        shared = answers[answers.groupby("pair")["rater"].transform("size") > 1]
        counts = pd.crosstab(shared["pair"], shared["answer"]).reindex(columns=ANSWERS, fill_value=0).to_numpy()
        row = {"raters": answers["rater"].nunique(), "pairs": len(counts), "agreement": math.nan}
        if len(counts):
            row["agreement"] = 100 * (counts * (counts - 1)).sum() / (counts.sum(1) * (counts.sum(1) - 1)).sum()
        of_answer = counts.sum(0)
        for name, distance in (("alpha", binary_distance), ("alpha (ordinal)", _ordinal(of_answer))):
            varied = (of_answer > 0).sum() > 1
            task = AnnotationTask(list(shared.itertuples(index=False, name=None)), distance) if varied else None
            row[name] = task.alpha() if varied else math.nan
        rows[aspect] = row
    return pd.DataFrame.from_dict(rows, "index").rename_axis("aspect")


def _ordinal(of_answer):
    """Krippendorff's ordinal distance of two answers. of_answer: int[3], how often each was given."""

    def distance(one, other):
        first, last = sorted((ANSWERS.index(one), ANSWERS.index(other)))
        return float(of_answer[first : last + 1].sum() - (of_answer[first] + of_answer[last]) / 2) ** 2

    return distance


def rated_by(ratings):
    """Who rated, for titles: the true reward by its name, people by their number and not by theirs."""
    names = sorted(set(ratings["rater"]))
    if names[0].startswith(TRUE_REWARD):
        return names[0]
    return f"{len(names)} {'people' if len(names) > 1 else 'person'}"


def _answers(ratings):
    """One row an answer: pair, rater, aspect, answer; what was left out has none."""
    return ratings.melt(["pair", "rater"], ASPECTS, "aspect", "answer").dropna(subset="answer")

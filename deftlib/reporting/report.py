"""Tables and figures of a run, in one style, each with the data and the provenance behind it.

    style()
    save_table(profile, "table1", frame, title="…", notebook="01_grading")      # .csv .md .tex
    save_figure(profile, "fig1", figure, frame, title="…", notebook="02_…")      # .png .pdf .csv

Everything lands in `figures/<profile>/`, or in a folder of its own where overrides changed the profile;
`provenance.json` there names notebook, command, seeds and stages of each, and what every stage was made with.
"""

import functools
import math
import os
import re
from numbers import Real

import matplotlib.pyplot as plt
import pandas as pd

from deftlib import store
from deftlib.reporting import escape, records

# Okabe and Ito's colours, told apart by every kind of colour vision.
GOOD, BAD, NEUTRAL = "#0072B2", "#D55E00", "#7F7F7F"
COLOURS = [GOOD, BAD, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]


@functools.cache
def _unfit():
    """A pattern that finds the words of `data/unfit_words.txt`, by their beginnings."""
    stems = (store.ROOT / "data" / "unfit_words.txt").read_text(encoding="utf-8").split()
    return re.compile(rf"\b(?:{'|'.join(stems)})", re.IGNORECASE)


def fit_to_show(text):
    """Whether no word of the text begins as one in `data/unfit_words.txt`; crude, so it rather hides too much."""
    return not _unfit().search(text)


def fit_rows(frame, *columns):
    """The rows of a DataFrame of texts that may be shown to anybody: none of a subset about harm, no unfit word."""
    fit = frame[list(columns)].map(fit_to_show).all(axis=1)
    return frame[fit & ~frame["subset"].str.startswith("harmless")]


def readable(token):
    """The text of one token for a plot: no blanks around it, a line break as ⏎, offensive words masked."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").strip() or "␣"
    shown = shown if fit_to_show(shown) else shown[0] + "*" * (len(shown) - 1)
    return shown.replace("$", r"\$")  # matplotlib would set it as mathematics


def published_table(name):
    """The rows of "table2_main" or "table3_ablation" as printed: columns (subset, "bleu" | "reward"), total last.

    Indexed by (data, method) and by (method, n_train).
    """
    frame = pd.DataFrame(records.published()["anonymous"][name])
    frame = frame.set_index([column for column in frame if "/" not in column])
    frame.columns = pd.MultiIndex.from_tuples(column.split("/") for column in frame)
    return frame


def sample_weighted_total(frame, sizes=None):
    """Each row's mean over the subsets, weighted by their numbers of prompts (decision 9): {metric} columns.

    frame: columns (subset, metric). sizes: {subset: prompts}; Table 1's test sets unless given.
    """
    if sizes is None:
        sizes = {name: row[2] for name, row in records.published()["anonymous"]["table1_counts"].items() if "-" in name}
    weights = pd.Series(sizes) / sum(sizes.values())
    subsets = frame[list(sizes)]
    return subsets.mul(weights, axis=1, level=0).T.groupby(level=1, sort=False).sum().T


def style():
    """One look for all figures, and byte-identical files from identical data."""
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")
    plt.rcdefaults()
    plt.rcParams.update(
        {
            "figure.figsize": (8, 4.5),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "savefig.dpi": 200,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": "medium",
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "svg.hashsalt": "deft",
            "pdf.fonttype": 42,
        }
    )


def save_table(profile, name, frame, title, notebook, best=None, seeds=None, options=""):
    """Write a DataFrame as CSV, Markdown and LaTeX to `figures/<profile>/`; numbers keep full precision in the CSV.

    best: {column of the frame: "highest" or "lowest"}; in Markdown and LaTeX the best number of that column is bold and
    the second best underlined, over all rows, as in the paper's Table 2. Numbers that print alike share their mark;
    text and NaN (printed as –) have none. seeds: those behind it, for its provenance; the profile's unless given.
    options: of the command that made it, beside the profile's.
    Columns and rows may have levels, like (subset, metric). Raises ValueError for another column or rule.
    """
    folder, text = records.folder_of(profile), _as_text(frame)
    marks = _marks(frame, text, best or {})
    flat = frame.set_axis([_joined(column, "/") for column in frame.columns], axis=1)
    store.write_atomic(folder / f"{name}.csv", flat.to_csv())
    store.write_atomic(folder / f"{name}.md", f"**{escape.markdown(title)}**\n\n{_markdown(text, marks)}\n")
    store.write_atomic(folder / f"{name}.tex", _latex(text, marks, title, f"tab:{name}"))
    records.record(profile, name, title, notebook, seeds, options)


def as_markdown(frame):
    """A DataFrame as a Markdown table to display, whatever its texts hold."""
    return _markdown(_as_text(frame), {})


def _as_text(frame):
    """The frame as it is printed: numbers of one order share their decimals, the largest has four digits."""
    text = pd.DataFrame(index=frame.index, columns=frame.columns, dtype=object)
    for j in range(frame.shape[1]):
        column = list(frame.iloc[:, j])
        places = _decimals([abs(value) for value in column if _is_number(value)])
        text.isetitem(j, [_cell(value, places) for value in column])
    return text


def _decimals(sizes):
    """Decimals for all numbers of a column, from their absolute values; None if they differ too much for that."""
    nonzero = [size for size in sizes if size]
    if all(float(size).is_integer() for size in sizes):
        return 0
    if max(nonzero) < 1e-2 or max(nonzero) / min(nonzero) > 1e3:
        return None
    return max(0, 3 - math.floor(math.log10(max(nonzero))))


def _cell(value, places):
    if _is_number(value):
        return f"{value:.4g}" if places is None else f"{value:.{places}f}"
    return "–" if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)


def _is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _marks(frame, text, best):
    """{(row, column): "best" or "second"}, by position."""
    marks = {}
    for column, rule in best.items():
        if column not in frame.columns or rule not in ("highest", "lowest"):
            raise ValueError(f"best: expected a column and 'highest' or 'lowest', found {column!r}: {rule!r}")
        j = frame.columns.get_loc(column)
        printed = {i: float(text.iat[i, j]) for i in range(len(frame)) if _is_number(frame.iat[i, j])}
        ranked = sorted(set(printed.values()), reverse=rule == "highest")
        for mark, value in zip(("best", "second"), ranked):
            marks |= {(i, j): mark for i in printed if printed[i] == value}
    return marks


def _marked(text, marks, escaped, **wraps):
    """The text escaped, labels included, and the marked cells wrapped, e.g. by best="**{}**"."""
    shown = text.map(escaped)
    for (i, j), mark in marks.items():
        shown.iat[i, j] = wraps[mark].format(shown.iat[i, j])
    return shown.rename(index=escaped, columns=escaped).rename_axis(index=escaped, columns=lambda _: None)


def _markdown(text, marks):
    """A Markdown table; the levels of a column's name stand below each other."""
    shown = _marked(text, marks, escape.markdown, best="**{}**", second="<u>{}</u>")
    shown.columns = [_joined(column, "<br>") for column in shown.columns]
    sides = ["left"] * shown.index.nlevels
    sides += ["right" if _has_number(text.iloc[:, j]) else "left" for j in range(text.shape[1])]
    return shown.reset_index().to_markdown(index=False, disable_numparse=True, colalign=sides)


def _latex(text, marks, title, label):
    """A LaTeX table (booktabs, multirow); the outer level of a column's name spans the inner ones, long text wraps."""
    shown = _marked(text, marks, escape.latex, best=r"\textbf{{{}}}", second=r"\underline{{{}}}")
    sides = ["l"] * shown.index.nlevels
    for column in (text.iloc[:, j] for j in range(text.shape[1])):
        sides.append("p{4cm}" if column.str.len().max() > 60 else "r" if _has_number(column) else "l")
    options = {"column_format": "".join(sides), "multicolumn_format": "c"}
    return shown.to_latex(escape=False, caption=escape.latex(title), label=label, **options)


def _has_number(column):
    return column.map(_NUMBER.fullmatch).any()


_NUMBER = re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?")


def _joined(label, between):
    return between.join(map(str, label)) if isinstance(label, tuple) else str(label)


def save_figure(profile, name, figure, frame, title, notebook, seeds=None):
    """Write a figure as PNG and PDF and the numbers it shows as CSV to `figures/<profile>/`. seeds: as `save_table`."""
    folder = records.folder_of(profile)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf"):
        temporary = folder / f".{name}.tmp.{kind}"
        with store.explained(folder / f"{name}.{kind}"):
            figure.savefig(temporary)
            os.replace(temporary, folder / f"{name}.{kind}")
    store.write_atomic(folder / f"{name}.csv", frame.to_csv())
    records.record(profile, name, title, notebook, seeds)


def label_points(ax, xs, ys, bold=()):
    """Write the names of points one under another beside the plot, each with a thin line to its point.

    xs: a Series whose index are the names. ys: a Series that has those names. bold: the names to stress. Call it when
    all else is drawn: labels keep the order of the heights on screen and spread as far as they need room.
    """
    ax.autoscale_view()  # limits are lazy: the transforms know them only then
    room = 0.045  # the height of a line, as a share of the plot's
    to_axes = (ax.transData + ax.transAxes.inverted()).transform
    heights = sorted((to_axes((xs[name], ys[name]))[1], name) for name in xs.index)
    place, line = -room, {"arrowstyle": "-", "lw": 0.4, "color": "0.6", "shrinkA": 0, "shrinkB": 2}
    for above, (height, name) in zip(range(len(heights) - 1, -1, -1), heights):
        place = max(place + room, min(height, 1 - above * room))  # clear of the one below, with room for those above
        where = {"xytext": (1.03, place), "textcoords": "axes fraction", "va": "center", "annotation_clip": False}
        weight = "bold" if name in bold else "normal"
        ax.annotate(name, xy=(xs[name], ys[name]), arrowprops=line, fontsize=8, weight=weight, **where)

"""The pages of a run's claims: `claims.md`, in ten lines and a row for each part, and `differences.md`."""

import json
import re

from deftlib import store
from deftlib.profile import Profile
from deftlib.reporting import claims, escape

POINTS = "*Points* are points of 100 · mean(sigmoid) of `r_eval`, as in the paper's tables."
POINTS_OF_MINI = "*Points* are points of the mini world's true reward, 0 to 100: sizes do not compare with the paper's."
NOT_PUBLIC = (
    "The final version's 8 tables and 10 equations are not public: its claims come from the abstract, the captions and "
    "second-hand summaries. What was done differently here: [differences.md](differences.md).\n\n"
    "*Seeds × n*: of 3 × 200, each of 200 prompts under three seeds; 3 × 1 are three runs, one value each. *Time* is "
    "that of all stages behind a row, added up."
)
AGAIN = """\
## To compute a row again

`claims.parquet` holds what each number was computed from, a line a value: claim, side (ours or other), whether sides \
are paired, seed (in the order of the profile's), item (prompts in the order of their ids, runs, draws), value. The \
number is the mean of ours, less that of other where there is one. What the interval is made of, \
`deftlib.intervals`: of several seeds and prompts, half the width is the geometric mean of two that a crossed table \
gives, by Student's t with Satterthwaite's degrees of freedom and by the generalised interval (variances drawn from \
what the table says of them); of runs alone, and of more than 50 prompts of one seed, Student's t; of fewer prompts of \
one seed the 2.5 and 97.5 % quantiles of the means of random subsets. An unpaired difference draws from both sides. p \
is twice the smaller share of such means beyond no effect, at least 0.0001. *restated* parts, and those that count for \
nothing, are in no family:
"""
GROUPS = {  # what a newcomer reads first: (a line's beginning, what follows the names)
    claims.REPRODUCED: "**What held**",
    claims.CONTRADICTED: "**What did not hold**, the opposite was measured",
    claims.NO_EFFECT: "**Where half of the published effect is excluded**, on both sides",
    claims.INCONCLUSIVE: "**What this run does not decide**: no effect is possible, and so is one that matters",
    claims.ONE_SEED: "**One seed**: measured on policies of one seed, so nothing is said of training",
    claims.NO_JUDGE: "**No judge**: the reward model that measures is not told apart from a coin",
    claims.BY_CONSTRUCTION: "**By construction**: follows from a setting, whatever was trained",
    claims.NOT_TESTED: "**Not tested**",
}


def page(profile, parts, recorded):
    """The text of claims.md.

    recorded: {part name: record}, as `records.save_claim` keeps them and `claims.verdicts` takes them.
    """
    recorded = {name: _as_it_counts(profile, record) for name, record in recorded.items()}
    found = claims.verdicts(parts, recorded)
    cells = {name: code_cells(name) for name in {record["notebook"] for record in recorded.values()}}
    is_mini = profile.data.source == "mini"
    subject = "code" if is_mini else "paper"
    rows = [_row(part, recorded.get(part.name), found[part.name], subject, cells, not is_mini) for part in parts]
    paragraphs = [
        f"# Claims of the paper, profile {profile.label}" + ": a verdict on the code, never on the paper" * is_mini,
        escape.markdown(f"{profile.about[0].upper()}{profile.about[1:]}."),
        "\n".join(_in_short(parts, found)),
        claims.RULE + " " + (POINTS_OF_MINI if is_mini else POINTS),
        NOT_PUBLIC,
        markdown_table(rows),
        AGAIN + "\n" + "\n".join(_families(parts, found)),
        "## What the paper claims",
        "\n".join(dict.fromkeys(f"- **{part.claim}** ({part.version} version): {part.text}" for part in parts)),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _in_short(parts, found):
    """What came out, a line for each verdict that was given."""
    said = {part.name: found[part.name].said for part in parts if not found[part.name].of}
    decided = sum(said[name] in (claims.REPRODUCED, claims.CONTRADICTED, claims.NO_EFFECT) for name in said)
    again = f", {len(parts) - len(said)} of them the same as others" * (len(said) < len(parts))
    yield f"The paper's claims come down to {len(parts)} differences{again}; this run decides {decided}."
    yield ""
    for verdict, line in GROUPS.items():
        names = [name for name in said if said[name] == verdict]
        if names:
            yield f"- {line} ({len(names)}): {'; '.join(names)}."


def _families(parts, found):
    """A line for each family that was tested: its parts, with what no effect is and what would matter."""
    for family in dict.fromkeys(part.family for part in parts):
        tested = [part for part in parts if part.family == family and found[part.name].p is not None]
        names = [
            f"{part.name} (no effect: {part.no_effect}"
            + ("" if part.smallest is None else f", matters from {part.smallest:.3g} {part.unit}")
            + ")"
            for part in tested
            if not found[part.name].of
        ]
        if names:
            yield f"- *{family}*, {len(names)} tested: {'; '.join(names)}"


def _row(part, record, verdict, subject, cells, has_size):
    """One row of claims.md, {column: text}.

    cells: {notebook: sources}, where the row's number was made. has_size: whether sizes compare with the paper's.
    """
    sign = "" if part.no_effect else "+"  # a ratio has none
    size = "in words" if part.published is None else f"{part.published:{sign}.4g}"
    row = {"claim": part.name, "what is compared": f"{part.means} ({part.unit})", "published": size}
    row |= {"ours [95 %]": None, "seeds × n": None, "judge, its accuracy": None, "p, adjusted": None}
    row[f"verdict on the {subject}"] = verdict.said + f": {escape.markdown(verdict.reason)}" * bool(verdict.reason)
    row["published size inside?"] = None
    if record and record["ours"]:
        mean, low, high, n = record["ours"]
        row["ours [95 %]"] = f"{mean:{sign}.3g} [{low:{sign}.3g}, {high:{sign}.3g}]"
        row["seeds × n"] = f"{record['seeds']}{'' if part.trained else ' draws'} × {n}"
        row["judge, its accuracy"] = _judge(part, record)
        if verdict.p is not None and not verdict.of:
            below = "<" * (record["p"] <= 1e-4)  # as small as draws can tell
            row["p, adjusted"] = f"{below}{record['p']:.2g}, {below}{verdict.p:.2g}"
        if part.published is not None and has_size:
            row["published size inside?"] = "yes" if low <= part.published <= high else "no"
    if record:
        notebook = record["notebook"]
        number = cell_of(cells[notebook], "save_claim", part.claim, part.part)
        label = f"{notebook}, code cell {number}" if number else notebook
        row["notebook and cell"] = f"[{label}](../../notebooks/{notebook}.ipynb)"
        row["command"] = f"`{record['command']}`"
        row["time"] = f"{_duration(record['seconds'])} on {record['created'][:10]}"
    return row


def _judge(part, record):
    """Who measured, and how often it is right on held-out human labels."""
    judge = record.get("judge")
    if not judge:
        return {"text": "none needed", "annotators": "the annotators", "seconds": "a clock"}.get(part.by)
    accuracy = (judge.get("accuracy") or {}).items()
    shares = [f"{axis} {mean:.0%} [{low:.0%}, {high:.0%}]" for axis, (mean, low, high, _) in accuracy]
    return ", ".join([escape.markdown(judge["name"]), *shares])


def _as_it_counts(profile, record):
    """The record, without its number where that was made under another rule or other settings than these."""
    older = "by an older rule" if "visible" not in record else None
    if record.get("settings", profile.written) != profile.written:
        older = "before the profile's file was edited"
    return {**record, "ours": None, "note": f"recorded {older}: run its notebook again"} if older else record


def _duration(seconds):
    """Seconds as a reader would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def code_cells(notebook):
    """[source] of the code cells of `notebooks/<notebook>.ipynb`, the first is number 1; [] without such a file."""
    path = store.ROOT / "notebooks" / f"{notebook}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def cell_of(sources, function, *names):
    """Number of the first of these cells that calls the function and has all names as literals; None without one."""
    for number, source in enumerate(sources, start=1):
        if f"{function}(" in source and all(f'"{name}"' in source for name in names if name):
            return number
    return None


def differences(profile):
    """The text of differences.md: `data/differences.md`, then every setting in which this profile leaves `paper`'s."""
    text = (store.ROOT / "data" / "differences.md").read_text(encoding="utf-8")
    theirs, ours = (
        {key: _text(value) for key, value in each.settings().items()} for each in (Profile.load("paper"), profile)
    )
    rows = [
        {"setting": f"`{key}`", "paper": escape.markdown(theirs[key]), profile.name: escape.markdown(ours[key])}
        for key in theirs
        if theirs[key] != ours[key] and key not in ("name", "about")
    ]
    return f"{text}\n{markdown_table(rows)}\n" if rows else f"{text}\nNone: this is that profile.\n"


def _text(value):
    """A setting's value to read: of models their names, of nothing "none"."""
    if isinstance(value, list):
        return ", ".join(str(item["name"] if isinstance(item, dict) else item) for item in value) or "none"
    return "none" if value == "" else str(value)


def markdown_table(rows):
    """A Markdown table of [{column: text}]; a missing cell is a dash."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column) or "–" for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |" for line in lines)

"""The paper's claims, part by part, and what a run says to each: a verdict by one rule (`RULE`).

    parts = claims.parts(report.published())          # data/claims.yaml says what each claim comes down to
    claims.verdict(Interval(1.2, 0.4, 2.0, 96), +1)   # "reproduced (direction)"
    claims.page(profile, parts, recorded)             # figures/<profile>/claims.md

Pure but for the files of the project it reads; `report.save_claim` writes.
"""

import difflib
import functools
import json
from collections import Counter
from typing import NamedTuple

import yaml

from deftlib import store
from deftlib.intervals import Interval
from deftlib.profile import Profile

REPRODUCED, CONTRADICTED = "reproduced (direction)", "contradicted"
INCONCLUSIVE, NOT_TESTED = "inconclusive", "not tested"


class Part(NamedTuple):
    """One difference that a claim comes down to."""

    claim: str  # id in data/published.json
    part: str  # "" where the claim is one number
    version: str  # of the paper: "anonymous" or "final"
    text: str  # the whole claim in words
    means: str  # what is compared with what
    unit: str
    published: float | None  # None: words alone were published
    direction: int  # +1 or -1, on which side of no_effect the claim lies
    no_effect: float  # 0 for differences, 1 for ratios

    @property
    def name(self):
        return f"{self.claim} / {self.part}" if self.part else self.claim


def parts(published):
    """Every part of every claim, in the order of the paper's versions and claims.

    published: `report.published()`. Raises ValueError where data/claims.yaml and it disagree about what is claimed.
    """
    explained = _explained((store.ROOT / "data" / "claims.yaml").read_text(encoding="utf-8"))
    claimed = [(version, claim) for version in ("anonymous", "final") for claim in published[version]["claims"]]
    unlike = {claim["id"] for _, claim in claimed} ^ explained.keys()
    if unlike:
        raise ValueError(f"data/claims.yaml and the published claims do not agree on {', '.join(sorted(unlike))}")
    found = []
    for version, claim in claimed:
        printed = _printed(claim["published"])
        for name, part in explained[claim["id"]].items():
            part = {"published": printed.get(name), "no_effect": 0} | part
            if "direction" not in part:
                part["direction"] = 1 if part["published"] > part["no_effect"] else -1
            found.append(Part(claim["id"], name, version, claim["text"], **part))
    return found


@functools.cache
def _explained(text):
    return yaml.safe_load(text)  # slow, and asked for with every claim


def _printed(published):
    """{part: number} of a claim's published value: a number, or numbers by method and data."""
    if isinstance(published, dict):
        inner = {name: _printed(value) for name, value in published.items()}
        return {f"{name}/{part}".strip("/"): size for name, value in inner.items() for part, size in value.items()}
    return {"": published} if isinstance(published, (int, float)) else {}


def find(parts, claim, part=""):
    """The part of that name. Raises ValueError with the nearest valid name if there is none."""
    names = {(known.claim, known.part): known for known in parts}
    if (claim, part) not in names:
        shown = {known.name: known for known in parts}
        wanted = f"{claim} / {part}" if part else claim
        (near,) = difflib.get_close_matches(wanted, shown, n=1, cutoff=0) or [""]
        raise ValueError(f"no claim {wanted!r} in data/claims.yaml: did you mean {near!r}?")
    return names[claim, part]


def verdict(interval, direction, no_effect=0.0):
    """What a 95 % interval says to a claim of that direction: `RULE` in code.

    interval: `Interval` of the paired difference. direction: +1 or -1. no_effect: the value to exclude.
    Raises ValueError where the ends are no interval.
    """
    if not interval.low <= interval.high:
        raise ValueError(f"expected low <= high, found {interval}")
    if interval.low <= no_effect <= interval.high:
        return INCONCLUSIVE
    return REPRODUCED if (interval.low > no_effect) == (direction > 0) else CONTRADICTED


def smallest_visible(interval):
    """The smallest effect that this many prompts could have told from none: half the interval's width."""
    return (interval.high - interval.low) / 2


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


def page(profile, parts, recorded):
    """The text of claims.md: one row for each part, tested or not.

    recorded: {part name: {"ours": [mean, low, high, n] or None, "note", "notebook", "command", "settings", "seconds",
    "created"}}, as `report.save_claim` keeps them.
    """
    recorded = {name: record if _is_of(profile, record) else _outdated(record) for name, record in recorded.items()}
    is_mini = profile.data.source == "mini"
    cells = {name: code_cells(name) for name in {record["notebook"] for record in recorded.values()}}
    rows = [_row(part, recorded.get(part.name), "code" if is_mini else "paper", cells) for part in parts]
    counts = Counter(_said(part, recorded.get(part.name)) for part in parts)
    order = (REPRODUCED, CONTRADICTED, INCONCLUSIVE, NOT_TESTED)
    paragraphs = [
        f"# Claims of the paper, profile {profile.label}" + ": a verdict on the code, never on the paper" * is_mini,
        f"{profile.about[0].upper()}{profile.about[1:]}.",
        f"Of {len(rows)} parts: " + ", ".join(f"{counts[said]} {said}" for said in order) + ".",
        RULE + " " + (POINTS_OF_MINI if is_mini else POINTS),
        NOT_PUBLIC,
        markdown_table(rows),
        "## What the paper claims",
        "\n".join(dict.fromkeys(f"- **{part.claim}** ({part.version} version): {part.text}" for part in parts)),
    ]
    return "\n\n".join(paragraphs) + "\n"


RULE = (
    "The rule: the 95 % interval of the paired difference leaves out *no effect* on the published side: **reproduced "
    "(direction)**; on the other side: **contradicted**; else **inconclusive**, with the smallest effect that so many "
    "prompts could show, half the interval's width. Whether the published size lies inside the interval is a column of "
    "its own. *Time* adds up every stage that the notebook had asked for by then, cached or not."
)
POINTS = "*Points* are points of 100 · mean(sigmoid) of `r_eval`, as in the paper's tables."
POINTS_OF_MINI = "*Points* are points of the mini world's true reward, 0 to 100: sizes do not compare with the paper's."
NOT_PUBLIC = (
    "The final version's 8 tables and 10 equations are not public: its claims come from the abstract, the captions and "
    "second-hand summaries. What was done differently here: [differences.md](differences.md)."
)


def _is_of(profile, record):
    """Whether it was recorded under these settings; older records do not tell."""
    return record.get("settings", profile.digest()) == profile.digest()


def _outdated(record):
    return {**record, "ours": None, "note": "recorded before the profile's file was edited: run its notebook again"}


def _said(part, record):
    """The verdict on one part, without its reason."""
    if not record or not record["ours"]:
        return NOT_TESTED
    return verdict(Interval(*record["ours"]), part.direction, part.no_effect)


def _row(part, record, subject, cells):
    """One row of claims.md, {column: text}. cells: {notebook: sources}, where the row's number was made."""
    record = record or {"ours": None, "note": "no notebook of this run recorded it"}
    said, note = _said(part, record), record["note"]
    sign = "" if part.no_effect else "+"  # a ratio has none
    size = "in words" if part.published is None else f"{part.published:{sign}.4g}"
    number, inside = None, None
    if record["ours"]:
        mean, low, high, n = ours = Interval(*record["ours"])
        number = f"{mean:{sign}.3g} [{low:{sign}.3g}, {high:{sign}.3g}], n = {n}"
        if said == INCONCLUSIVE:
            said += f": {smallest_visible(ours):.2g} {part.unit} would have shown"
        said += f" ({note})" * bool(note)
        if part.published is not None:
            inside = "yes" if low <= part.published <= high else "no"
    else:
        said += f": {note}"
    row = {"claim": part.name, "what is compared": f"{part.means} ({part.unit})", "published": size}
    row |= {"ours [95 %]": number, f"verdict on the {subject}": said, "published size inside?": inside}
    if "notebook" in record:
        notebook, number = record["notebook"], cell_of(cells[record["notebook"]], "save_claim", part.claim, part.part)
        label = f"{notebook}, cell {number}" if number else notebook
        row["notebook and cell"] = f"[{label}](../../notebooks/{notebook}.ipynb)"
        row["command"] = f"`{record['command']}`"
        row["time"] = f"{_duration(record['seconds'])} on {record['created'][:10]}"
    return row


def _duration(seconds):
    """Seconds as a reader would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def differences(profile):
    """The text of differences.md: `data/differences.md`, then every setting in which this profile leaves `paper`'s."""
    text = (store.ROOT / "data" / "differences.md").read_text(encoding="utf-8")
    theirs, ours = (
        {key: _text(value) for key, value in each.settings().items()} for each in (Profile.load("paper"), profile)
    )
    rows = [
        {"setting": f"`{key}`", "paper": theirs[key], profile.name: ours[key]}
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
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)

"""The paper's claims, part by part, and what a run says to each: a verdict by one rule (`RULE`).

    parts = claims.parts(records.published())              # data/claims.yaml says what each claim comes down to
    claims.verdicts(parts, recorded)["training-time"]      # Verdict("reproduced (direction)", adjusted p, ...)

`records.save_claim` keeps what a run measured, `claims_page` tells it.
"""

import difflib
import functools
from typing import NamedTuple

import yaml

from deftlib import store

REPRODUCED, CONTRADICTED, NO_EFFECT = "reproduced (direction)", "contradicted", "no effect"
INCONCLUSIVE = "inconclusive"
BY_CONSTRUCTION, ONE_SEED, NO_JUDGE, NOT_TESTED = "by construction", "one seed", "no judge", "not tested"
ALPHA = 0.05


class Part(NamedTuple):
    """One difference that a claim comes down to."""

    claim: str  # id in data/published.json
    part: str  # "" where the claim is one number
    version: str  # of the paper: "anonymous" or "final"
    text: str  # the whole claim in words
    family: str  # whose p-values are adjusted together
    by: str  # what gives the number, see data/claims.yaml
    trained: bool  # whether policies are compared, so that seeds count
    means: str  # what is compared with what
    unit: str
    published: float | None  # None: words alone were published
    direction: int  # +1 or -1, on which side of no_effect the claim lies
    no_effect: float  # 0 for differences, 1 for ratios
    smallest: float | None  # the effect that would matter, half of the published one; None: words alone
    restates: str  # name of the part that says the same of the same runs, or ""

    @property
    def name(self):
        return f"{self.claim} / {self.part}" if self.part else self.claim


class Verdict(NamedTuple):
    """What a run says to one part."""

    said: str  # one of the eight names above
    reason: str  # in words; "" where the verdict says it all
    p: float | None = None  # that there is no effect, adjusted within the family
    p_matters: float | None = None  # that the effect is at least the smallest that matters, adjusted
    of: str = ""  # the part whose verdict this one shares


def parts(published):
    """Every part of every claim, in the order of the paper's versions and claims.

    published: `records.published()`. Raises ValueError where data/claims.yaml and it disagree about what is claimed.
    """
    explained = _explained((store.ROOT / "data" / "claims.yaml").read_text(encoding="utf-8"))
    claimed = [(version, claim) for version in ("anonymous", "final") for claim in published[version]["claims"]]
    unlike = {claim["id"] for _, claim in claimed} ^ explained.keys()
    if unlike:
        raise ValueError(f"data/claims.yaml and the published claims do not agree on {', '.join(sorted(unlike))}")
    found = []
    for version, claim in claimed:
        of_claim, printed = dict(explained[claim["id"]]), _printed(claim["published"])
        for name, own in of_claim.pop("parts").items():
            part = {"published": printed.get(name), "no_effect": 0, "trained": True, "restates": ""} | of_claim | own
            size = None if part["published"] is None else part["published"] - part["no_effect"]
            part.setdefault("direction", 1 if (size or 0) > 0 else -1)
            part.setdefault("smallest", None if size is None else abs(size) / 2)
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


# ---- verdicts ----------------------------------------------------------------------------------------------------

RULE = """\
**The rule.** Prompts and seeds are the units, crossed; an interval is that of its row alone and covers both ([how \
often](../statistics/table_coverage.md)). Within a family of claims p-values are adjusted by Holm's method, and the \
adjusted one decides at 0.05, so a row whose interval leaves no effect out may stay undecided: the effect lies on \
the published side, **reproduced (direction)**, or on the other, **contradicted**. Where half of the published \
effect is excluded on both sides (two one-sided tests, adjusted alike): **no effect**. Else **inconclusive**, with \
the effect that this sample would show in about 80 % of cases as the first of its family. Four more are said by name \
and count for nothing: **by construction** follows from a setting; **one seed** compares policies of one seed each; \
**no judge** rests on a judge that is not right above chance on both axes; **not tested**, also of time on a busy \
machine, where one method's tokens per second exceed the other's by a fifth. A part that says the same of the same \
runs as another *restates* it and is tested once. Rule and claims (`deftlib/reporting/claims.py`, \
[data/claims.yaml](../../data/claims.yaml)) are older than this run; they changed after earlier ones, as README's \
*What we said before* tells.\
"""


def verdicts(parts, recorded):
    """{part name: Verdict} by `RULE`.

    recorded: {part name: {"ours": [mean, low, high, n] or None, "seeds", "p", "p_matters", "visible", "judge",
    "note"}}, as `records.save_claim` keeps them.
    """
    found, tested, again = {}, {}, {}
    for part in parts:
        record = recorded.get(part.name)
        outside = _outside_the_rule(part, record)
        if outside:
            found[part.name] = Verdict(*outside)
        elif part.restates in {other.name for family in tested.values() for other, _ in family}:
            again[part.name] = part.restates
        else:
            tested.setdefault(part.family, []).append((part, record))
    for family in tested.values():
        adjusted = holm([record["p"] for _, record in family])
        matters = holm([1.0 if record["p_matters"] is None else record["p_matters"] for _, record in family])
        for (part, record), p, p_matters in zip(family, adjusted, matters):
            p_matters = None if record["p_matters"] is None else p_matters
            found[part.name] = _decided(part, record, p, p_matters, len(family))
    shared = {name: found[of]._replace(reason=f"restates {of}", of=of) for name, of in again.items()}
    return found | shared


def _outside_the_rule(part, record):
    """(what is said, why) of a part that no interval can decide, or None."""
    if record is None:
        return NOT_TESTED, "no notebook of this run recorded it"
    if part.by == "construction":
        return BY_CONSTRUCTION, record["note"]
    if not record["ours"]:
        return NOT_TESTED, record["note"]
    if part.trained and record["seeds"] < 2:
        return ONE_SEED, record["note"]
    if part.by == "judge":
        weak = [axis for axis, (_, low, _, _) in (record["judge"].get("accuracy") or {}).items() if low <= 0.5]
        if weak:
            return NO_JUDGE, f"{record['judge']['name']} is not told apart from a coin on {' and '.join(weak)} lists"
    return None


def _decided(part, record, p, p_matters, tests):
    """The verdict on a part that its interval and its family of so many tests decide."""
    mean, note = record["ours"][0], record["note"]
    is_small = p_matters is not None and p_matters < ALPHA
    if p < ALPHA:
        on_its_side = (mean > part.no_effect) == (part.direction > 0)
        note = "; ".join(filter(None, [note, "less than half of the published size" * (is_small and on_its_side)]))
        return Verdict(REPRODUCED if on_its_side else CONTRADICTED, note, p, p_matters)
    if is_small:
        return Verdict(NO_EFFECT, f"less than {part.smallest:.2g} {part.unit} either way", p, p_matters)
    visible = record["visible"][tests - 1]
    return Verdict(INCONCLUSIVE, f"{visible:.2g} {part.unit} would have shown", p, p_matters)


def holm(p_values):
    """Adjusted p-values (Holm, 1979): below alpha, a family has any false one in at most a share alpha of cases."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted

"""What a run records beside its tables and figures: where each comes from, and what it says to the paper's claims.

    save_claim(profile, "cost", Samples(seconds, saved), "04_evaluation", part="PRO/time")
    record(profile, "table1", title, notebook, seeds=[0])      # as `report.save_table` does it

In `figures/<profile>/`: `provenance.json` and `profile.yaml`; `claims.json`, `claims.parquet`, and the pages made of
them, `claims.md` and `differences.md`.
"""

import json

import numpy as np
import pandas as pd

from deftlib import store
from deftlib.intervals import p_equivalent, p_value, smallest_visible
from deftlib.provenance import provenance
from deftlib.reporting import claims, claims_page


def published():
    """The numbers printed in both versions of the paper: `data/published.json`, named there by table and claim."""
    return json.loads((store.ROOT / "data" / "published.json").read_text(encoding="utf-8"))


# ---- claims ------------------------------------------------------------------------------------------------------


def save_claim(profile, claim, ours, notebook, part="", note="", judge=None):
    """Record in `claims.json` what this run says to one part of a claim, and write its two pages anew.

    claim, part: names of data/claims.yaml, as literal strings: claims.md finds its cell by them. ours: `Samples` whose
    difference is explained there, None where there is none; they are kept in `claims.parquet`. note: what the number
    was measured by, or why there is none. judge: {"name", "accuracy": {axis: Interval}} of who scored, where one did;
    without accuracy it is the truth. Raises ValueError for another claim or part, if there is neither a number nor a
    reason, or no judge of what one has to judge.
    """
    parts = claims.parts(published())
    explained = claims.find(parts, claim, part)
    name = explained.name
    if ours is None and not note:
        raise ValueError(f"{name} was not tested: say why in `note`")
    if ours is not None and explained.by == "judge" and not judge:
        raise ValueError(f"{name} is judged by a reward model: say which in `judge`")
    path, stages, drawn = folder_of(profile) / "claims.json", store.used(profile), provenance()
    family = sum(part.family == explained.family for part in parts)
    record = _measured(ours, explained, family) | {"note": note, "judge": judge and _plain_judge(judge)}
    record |= {"notebook": notebook, "command": _command(profile, notebook), "settings": profile.written}
    record |= {"seconds": sum(stage["seconds"] for stage in stages.values()), "stages": list(stages)}
    newest = max([stage["created"] for stage in stages.values()], default=drawn["created"])
    record |= {"created": newest, "drawn": drawn}
    with store.records_lock(profile.name):
        known = recorded_claims(path) | {name: record}
        in_order = {known_part.name: known[known_part.name] for known_part in parts if known_part.name in known}
        _keep_samples(path.with_name("claims.parquet"), name, ours)
        store.write_atomic(path, _by_line(in_order) + "\n")
        write_claims(profile)
        _write_provenance(profile, {})


def _measured(samples, part, family):
    """What a claim's record says of its samples: ours = [mean, low, high, n], seeds, both p-values of `claims`.

    visible: the effect that would show, as the first of 1, 2, ... tests; family: how many there may be.
    """
    if samples is None:
        return {"ours": None, "seeds": 0, "p": None, "p_matters": None, "visible": None}
    mean, draws = samples.plausible()
    interval = samples.interval()
    matters = None if not part.smallest else p_equivalent(draws, part.smallest, part.no_effect)
    record = {"ours": [mean, interval.low, interval.high, int(interval.n)], "seeds": samples.seeds}
    visible = [smallest_visible(mean, draws, tests) for tests in range(1, family + 1)]
    return record | {"p": p_value(draws, part.no_effect), "p_matters": matters, "visible": visible}


def _plain_judge(judge):
    accuracy = {axis: list(interval) for axis, interval in (judge.get("accuracy") or {}).items()}
    return {"name": judge["name"], "accuracy": accuracy}


def _keep_samples(path, name, samples):
    """Write what a claim's number was computed from: one row for each side, seed and item. Hold the records' lock."""
    columns = ["claim", "side", "paired", "seed", "item", "value"]
    known = pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=columns)
    rows = [known[known["claim"] != name]]
    if samples is not None:
        rows.append(_rows(samples).assign(claim=name, paired=samples.is_paired)[columns])
    frame = pd.concat([frame for frame in rows if len(frame)]) if any(map(len, rows)) else known
    frame = frame.astype({"claim": str, "side": str, "paired": bool, "seed": int, "item": int, "value": float})
    store.write_atomic(path, frame.sort_values(["claim", "side", "seed", "item"]).to_parquet(index=False))


def _rows(samples):
    """A DataFrame with side ("ours", "other"), seed, item and value of every number in some `Samples`."""
    tables = []
    for side, values in zip(("ours", "other"), samples[:2]):
        if values is not None:
            values = np.atleast_2d(np.asarray(values, dtype=np.float64))
            seed, item = (index.ravel() for index in np.indices(values.shape))
            tables.append(pd.DataFrame({"side": side, "seed": seed, "item": item, "value": values.ravel()}))
    return pd.concat(tables, ignore_index=True)


def write_claims(profile):
    """Write `claims.md` and `differences.md` from what is recorded: after an edit of the claims, or of a notebook."""
    folder, parts = folder_of(profile), claims.parts(published())
    page = claims_page.page(profile, parts, recorded_claims(folder / "claims.json"))
    store.write_atomic(folder / "claims.md", page)
    store.write_atomic(folder / "differences.md", claims_page.differences(profile))


def recorded_claims(path):
    """{part name: record} of a claims.json, {} if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---- provenance --------------------------------------------------------------------------------------------------


def folder_of(profile):
    """`figures/<profile>/`; where overrides changed it, a folder of that setting's own: `Profile.label`."""
    return store.figures_dir(profile.label)


def _command(profile, maker, options=""):
    """How to make it again: the notebook of that name, or the command."""
    if (store.ROOT / "notebooks" / f"{maker}.ipynb").is_file():
        return f"deft run notebooks/{maker}.ipynb {profile.options}"
    return f"deft {maker.replace('_', '-')} {profile.options} {options}".rstrip()


def record(profile, name, title, notebook, seeds, options=""):
    """Add to `provenance.json` what made this table or figure: its stages are those that were asked for by then."""
    made = {"title": title, "notebook": notebook, "command": _command(profile, notebook, options)}
    made |= {
        "settings": profile.written,
        "seeds": profile.seeds if seeds is None else seeds,
        "stages": list(store.used(profile)),
    }
    with store.records_lock(profile.name):
        _write_provenance(profile, {name: made | {"drawn": provenance()}})


def _write_provenance(profile, added):
    """Write `provenance.json`, and `profile.yaml` beside it, with these artefacts added. Hold the records' lock.

    {"settings": digest of those in profile.yaml, "artefacts": {name: title, notebook, command, settings (the digest of
    its own: another one, where the profile's file was edited since), seeds, stages by name, drawn: the provenance of
    the drawing itself}, "stages": {name: commit, packages, device, seconds and time of each that one of them or a claim
    rests on}}.
    """
    path = folder_of(profile) / "provenance.json"
    known, claimed = recorded_provenance(path), recorded_claims(path.with_name("claims.json"))
    artefacts = known["artefacts"] | added
    needed = {stage for each in [*artefacts.values(), *claimed.values()] for stage in each["stages"]}
    stages = known["stages"] | store.used(profile)
    parts = {"settings": json.dumps(profile.written), "artefacts": _by_line(dict(sorted(artefacts.items())))}
    parts["stages"] = _by_line({stage: stages[stage] for stage in sorted(needed & stages.keys())})
    text = ",\n".join(f'"{name}": {part}' for name, part in parts.items())
    store.write_atomic(path, f"{{{text}}}\n")
    store.write_atomic(path.with_name("profile.yaml"), f"{profile}\n")


def _by_line(entries):
    """A dict as JSON, an entry a line: short in a diff, and written in a tenth of the time that indents take."""
    lines = (f"{json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}" for name, entry in entries.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def made_with(stages):
    """What some stages of a `provenance.json` were made with, in one line; "" where none is recorded.

    stages: their records. A second commit or device is named too: nothing is mixed unseen.
    """
    if not stages:
        return ""
    days = sorted({stage["created"][:10] for stage in stages})
    commits = sorted({_commit(stage) for stage in stages})
    devices = sorted({f"{stage['device']}, {stage['cores']} cores" for stage in stages})
    seconds = sum(stage["seconds"] for stage in stages)
    number = f"{len(stages)} stage{'s' * (len(stages) > 1)} of {seconds:.0f} s"
    return "; ".join([number, " to ".join({days[0]: 0, days[-1]: 0}), " and ".join(commits), " and ".join(devices)])


def _commit(record):
    git = record["git"]
    return f"commit {git['commit'][:10]}" + " with changes" * git["dirty"] if git else "no repository"


def recorded_provenance(path):
    """What a `provenance.json` holds: settings, artefacts and stages; empty ones if there is none."""
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "artefacts" not in recorded:  # older ones held no stages
        return {"settings": "", "artefacts": {}, "stages": {}}
    return recorded

"""Ranked preference data: read, check, reject, split.

A ranked list is one prompt and its responses, best first (`D_2`, `D_3`: two, three of them). HH-RLHF, PRO's `D_3`
files, OpenAssistant trees and many more formats become one `datasets.Dataset` with the columns of `FEATURES`, in
one text format: the prompt is "\\n\\nHuman: …\\n\\nAssistant:", a response is " " and the reply. A row that cannot be
used is rejected, counted and written out with its reason; `deft check PATH` tells what was understood of a file.
"""

import hashlib
import json
import os
import sqlite3
import sys
import tempfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.fingerprint import generate_random_fingerprint

from deftlib.preferences import batches
from deftlib.preferences.cleaning import pro_cleaning
from deftlib.preferences.dialogues import ASSISTANT, HUMAN
from deftlib.preferences.formats import FORMATS, as_prompt, candidates, detected
from deftlib.preferences.readers import PreferenceError, RowFault, shape
from deftlib.preferences.sources import HH_RLHF, files

__all__ = [
    "FEATURES",
    "FORMATS",
    "PreferenceError",
    "as_prompt",
    "first_human_turn",
    "locate",
    "pro_cleaning",
    "read",
    "read_lists",
    "read_to",
    "sample",
    "sample_rows",
    "split",
    "split_of",
    "split_rows",
]

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "subset": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "responses": datasets.List(datasets.Value("string")),  # best first
        "rewards": datasets.List(datasets.Value("float64")),  # highest first, or null: nobody scored this list
    }
)


def read(source, **options):
    """Ranked lists of `source` as a Dataset with the columns of `FEATURES`, on a memory map; options of `read_to`."""
    with tempfile.TemporaryDirectory() as folder:
        read_to(Path(folder) / "lists.parquet", source, **options)
        return read_lists(Path(folder) / "lists.parquet")


def read_to(path, source, *, split="train", format="auto", rejects_path=None, max_reject_share=0.05, cleaning="none"):
    """Write the ranked lists of `source` to a Parquet file with the columns of `FEATURES`, in order; how many: an int.

    source: "mini"; a file of JSON lines, gzipped or not; a folder with `<split>.jsonl[.gz]`, or with HH-RLHF's subset
    folders that hold it; a hub id, read subset by subset if it is Anthropic/hh-rlhf. `split` chooses the file in a
    folder or on the hub and means nothing for a single file. format: "auto", by the keys of the first row that fits
    one, or a name in `FORMATS`. cleaning: "none", or "pro" for HH-RLHF as the PRO authors cleaned it (`pro_cleaning`).

    Rows with rewards are sorted by them, highest first, ties in file order; without, the file's order is the ranking.
    Prints one line with what was read and rejected, and writes the rejects to `rejects_path` (JSON lines: file, line,
    reason, found) if one is given. Blank lines carry no row: they are counted in that line and rejected nowhere.
    Raises PreferenceError if the source cannot be read, if more than `max_reject_share` of its lists are rejected, or
    if none is left.
    """
    if format != "auto" and format not in FORMATS:
        raise PreferenceError(f"unknown format {format!r}: choose auto, {', '.join(FORMATS)}")
    if cleaning not in ("none", "pro"):
        raise PreferenceError(f"unknown cleaning {cleaning!r}: choose none or pro")
    rejects, notes, subsets = [], Counter(), Counter()
    usable = _usable(source, split, format, cleaning, rejects, notes, subsets)
    batches.write(path, FEATURES.arrow_schema, batches.pieces_of(usable, batches.LISTS_AT_ONCE))
    if rejects_path is not None:
        _write_rejects(rejects, Path(rejects_path))
    _report(source, subsets, rejects, notes, rejects_path)
    n_found = subsets.total() + len(rejects)
    if len(rejects) > max_reject_share * n_found:
        raise PreferenceError(
            f"{source}: {len(rejects)} of {n_found} lists rejected ({_counts(rejects)}), more than the share of "
            f"{max_reject_share:g} allowed; mend the rows, check the format, or raise max_reject_share"
        )
    if not subsets:
        raise PreferenceError(f"{source}: {n_found} lists found, none usable; expected prompts with ranked replies")
    return subsets.total()


def _usable(source, split, format, cleaning, rejects, notes, subsets):
    """Yield the lists that can be used; what else was met goes into rejects, notes and subsets."""
    ids = _Ids()
    for name, label, rows in files(source, split):
        known = detected(label, rows) if format == "auto" else format
        if cleaning == "pro" and known != "hh-rlhf":
            raise PreferenceError(f"{label}: cleaning 'pro' is for hh-rlhf, and this is {known}; leave it out")
        found = ((line, one) for line, row in rows() for one in candidates(row, known, cleaning, notes))
        for line, candidate in found:
            try:
                checked = _checked(candidate, f"{name}/{line}", name.split("/")[0], ids)
            except RowFault as fault:
                rejects.append({"file": label, "line": line, "reason": fault.reason, "found": fault.found[:120]})
                continue
            subsets[checked["subset"]] += 1
            yield checked


class _Ids:
    """The ids met so far, in a database that SQLite keeps in a temporary file once it is large."""

    def __init__(self):
        self.table = sqlite3.connect("", isolation_level=None)
        self.table.execute("CREATE TABLE met (id TEXT PRIMARY KEY) WITHOUT ROWID")
        self.table.execute("BEGIN")  # one transaction: nothing of it is for later

    def __contains__(self, row_id):
        return self.table.execute("SELECT 1 FROM met WHERE id = ?", (row_id,)).fetchone() is not None

    def add(self, row_id):
        self.table.execute("INSERT INTO met VALUES (?)", (row_id,))


def locate(source):
    """Where a source named in a profile is: "hh-rlhf" is `$DEFT_DATA/hh-rlhf`, or the hub's where that is not set.

    "oasst" is `$DEFT_DATA/oasst/en_100_tree.jsonl`, OpenAssistant's trees of human-ranked replies.
    Raises PreferenceError if DEFT_DATA is not set for it.
    """
    folder = os.environ.get("DEFT_DATA")
    if source == "hh-rlhf":
        return str(Path(folder) / "hh-rlhf") if folder else HH_RLHF
    if source == "oasst":
        if not folder:
            raise PreferenceError("oasst: set DEFT_DATA to the folder that holds oasst/en_100_tree.jsonl")
        return str(Path(folder) / "oasst" / "en_100_tree.jsonl")
    return source


def read_lists(path):
    """Ranked lists from a Parquet file as a Dataset on a memory map.

    Parquet is packed, so the map is of a plain copy: a temporary file without a name, gone with the Dataset.
    """
    with tempfile.NamedTemporaryFile(suffix=".arrow") as copy:
        with pa.ipc.new_stream(copy, pq.read_schema(path)) as stream:
            for batch in batches.batches(path, size=batches.LISTS_PER_GROUP):
                stream.write_batch(batch)
        copy.flush()
        table = pa.ipc.open_stream(pa.memory_map(copy.name)).read_all()
        return datasets.Dataset(table, fingerprint=generate_random_fingerprint())  # its own would pickle the table


def _report(source, subsets, rejects, notes, rejects_path):
    """One line on screen: what was read, what was rejected and why, what the rules left out."""
    line = f"read {subsets.total()} lists from {source}"
    if len(subsets) > 1:
        line += f" ({', '.join(f'{subset} {n}' for subset, n in list(subsets.items())[:8])})"
    line += f"; rejected {len(rejects)}"
    if rejects:
        written = Path(rejects_path).name if rejects_path else "not written, no rejects_path given"
        line += f": {_counts(rejects)} (rejects: {written})"
    print(line + "".join(f"; {what}: {count}" for what, count in sorted(notes.items())))


def _counts(rejects):
    return ", ".join(f"{n} {reason}" for reason, n in Counter(r["reason"] for r in rejects).most_common()) or "no row"


def _write_rejects(rejects, path):
    # Written even when empty, so that the rejects of an earlier run are never taken for this one's.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(reject) + "\n" for reject in rejects), encoding="utf-8")
    except OSError as error:
        raise PreferenceError(f"{path}: the rejects cannot be written ({error.strerror}); name another path") from error


# --- Checks ----------------------------------------------------------------------------------------------------------


def _checked(found, default_id, default_subset, ids):
    """One row of the Dataset, or its RowFault: text is text, no reply empty or twice, rewards finite, best first."""
    if isinstance(found, RowFault):
        raise found
    try:
        row_id, subset = (
            default if found.get(key) is None else found[key]
            for key, default in (("id", default_id), ("subset", default_subset))
        )
        if not (isinstance(row_id, str) and isinstance(subset, str)):
            raise RowFault("wrong type", f"id is {shape(row_id)}, subset is {shape(subset)}, expected text")
        prompt, responses = found["prompt"], _responses(found)
        try:
            "".join([row_id, subset, prompt, *responses]).encode()
        except UnicodeEncodeError:  # half a surrogate pair: JSON can spell it, nothing can store it
            raise RowFault("invalid Unicode") from None
        if row_id in ids:
            raise RowFault("duplicate id")
        rewards = found.get("rewards")
        if rewards is not None:
            rewards, responses = _best_first(rewards, responses)
    except RowFault as fault:
        raise RowFault(fault.reason, fault.found or shape(found)) from None
    ids.add(row_id)
    return {"id": row_id, "subset": subset, "prompt": prompt, "responses": responses, "rewards": rewards}


def _responses(found):
    """The replies, each with one leading space, best first where people ranked them."""
    replies, ranks = [text.strip() for text in found["responses"]], found.get("ranks")
    if not found["prompt"]:
        raise RowFault("empty prompt")
    if not all(replies):
        raise RowFault("empty reply")
    if len(replies) < 2:
        raise RowFault("list of one" if replies else "empty list")
    if len(set(replies)) < len(replies):
        raise RowFault("identical replies")
    responses = [" " + text.lstrip() for text in found["responses"]]
    if ranks is None:
        return responses
    if not all(type(rank) is int for rank in ranks):
        raise RowFault("partly ranked replies")
    return [responses[i] for i in sorted(range(len(ranks)), key=ranks.__getitem__)]


def _best_first(rewards, responses):
    """Both sorted by reward, highest first; equal rewards keep their order."""
    if not isinstance(rewards, list):
        raise RowFault("wrong type", f"rewards is {shape(rewards)}, expected a list")
    if len(rewards) != len(responses):
        raise RowFault("different number of rewards and responses")
    # Compared, not converted: NaN, the infinities and an integer too large for a float all fail this.
    if not all(type(reward) in (int, float) and abs(reward) <= sys.float_info.max for reward in rewards):
        raise RowFault("reward not a finite number")
    order = sorted(range(len(rewards)), key=rewards.__getitem__, reverse=True)  # stable in reverse too
    return [float(rewards[i]) for i in order], [responses[i] for i in order]


# --- Splits and samples ----------------------------------------------------------------------------------------------


def first_human_turn(prompt):
    """The text of the first human turn, stripped; the whole prompt if it has none."""
    return (prompt.partition(HUMAN)[2] or prompt).partition(ASSISTANT)[0].strip()


def split_of(prompt, shares, seed=0):
    """The name in `shares` that `prompt` belongs to, by hash of its first human turn (our choice).

    shares: {name: share}, shares sum to 1. Case and white space do not count. Dialogues that grew from one opening
    stay together: a reply of one is part of the prompt of another, so that a split by whole prompt puts 75 test lists
    of HH-RLHF's test files into training prompts, this one none. What remains are stock phrases of other
    conversations ("What do you mean?"), up to 52 characters.
    """
    if not shares or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise PreferenceError(f"shares must be at least 0 and sum to 1, found {shares}")
    opening = " ".join(first_human_turn(prompt).split()).casefold()
    point = _unit_hash(seed, opening)
    edge = 0.0
    for name, share in shares.items():
        edge += share
        if point < edge:
            return name
    return max(shares, key=shares.get)  # rounding left the last edge a hair below 1


def split(dataset, shares, seed=0):
    """{name: Dataset} by `split_of`; every list is in one of them, in its old order."""
    return {name: dataset.select(chosen) for name, chosen in split_rows(dataset, shares, seed).items()}


def split_rows(lists, shares, seed=0):
    """{name: int64[n]}: the numbers of the lists that `split` gives it. lists: a Parquet file, or a Dataset."""
    names = list(shares)
    part = np.fromiter((names.index(split_of(p, shares, seed)) for p in batches.column(lists, "prompt")), np.int64)
    return {name: np.flatnonzero(part == number) for number, name in enumerate(names)}


def sample(dataset, n, seed=0):
    """`n` lists, equally many of each subset as far as they reach, in their old order; a larger n only adds lists.

    Raises PreferenceError if there are fewer than n.
    """
    return dataset.select(sample_rows(dataset, np.arange(len(dataset)), n, seed))


def sample_rows(lists, rows, n, seed=0):
    """int64[n]: the numbers of a `sample` of some lists of a Parquet file or Dataset. rows: their numbers, sorted."""
    if not 0 <= n <= len(rows):
        raise PreferenceError(f"a sample of {n} lists was asked for, and there are {len(rows)}; ask for fewer")
    point = np.fromiter((_unit_hash(seed, row_id) for row_id in batches.column(lists, "id")), np.float64)[rows]
    subset = batches.codes(lists, "subset")[1][rows]
    first = np.unique(subset, return_index=True)[1]
    by_subset = [np.flatnonzero(subset == subset[i]) for i in sorted(first)]
    chosen = []
    for left, members in zip(range(len(by_subset), 0, -1), sorted(by_subset, key=len)):
        quota = (n - len(chosen)) // left  # the smallest subset first: what it lacks, the larger ones give
        chosen += members[np.argsort(point[members], kind="stable")[:quota]].tolist()
    return rows[sorted(chosen)]


def _unit_hash(seed, text):
    # Not `random`: the same on every Python, and independent of what else is in the data.
    return int.from_bytes(hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "replace")).digest()[:8], "big") / 2**64

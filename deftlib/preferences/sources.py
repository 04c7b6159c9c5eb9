"""Where ranked lists come from: a file, a folder in any of the usual layouts, or a data set on the hub.

    for name, label, rows in files("prefs.csv", "train"):      # rows() starts anew at each call

`readers` opens each file, `formats` tells what its rows mean, `lists.read` checks them and builds the Dataset.
"""

import re
from pathlib import Path

import datasets

from deftlib import provenance
from deftlib.preferences import mini_world, readers
from deftlib.preferences.readers import SUFFIXES, PreferenceError

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
HH_RLHF = "Anthropic/hh-rlhf"
MINI = mini_world.FOLDER
SPLITS = ("train", "test", "dev", "valid", "validation", "val", "eval")


def files(source, split):
    """[(name, label, rows)], one for each file of `source`.

    name: "<subset>/<split>" or "<subset>", which ids start with; label: the file as messages name it; rows(): an
    iterator of (line number, row), started anew at each call, where a row is a dict, a RowFault or None (blank line).
    """
    path = MINI if source == "mini" else Path(source).expanduser()
    if path.is_dir():
        return [_file(file) for file in _split_files(path, split)]
    if path.exists():
        return [_file(path)]
    if re.fullmatch(r"[\w-]+/[\w.-]+(:[\w.-]+)?", str(source)) and not path.parent.exists():
        return _hub_files(str(source), split)
    raise PreferenceError(
        f"{source}: no such file or folder; name a file, a folder, a hub id (owner/name[:config]) or mini"
    )


def _split_files(folder, split):
    """The files of one split, from the folder or from each of HH-RLHF's subset folders that is there.

    `<split>.jsonl.gz` and its like, or shards of the hub's layout (`train-00000-of-00002.parquet`, also in `data/`). A
    folder in which no file is named after a split is read whole.
    """
    subsets = [folder / subset for subset in SUBSETS if (folder / subset).is_dir()]
    chosen = []
    for place in subsets or [folder]:
        data = [file for at in (place, place / "data") for file in sorted(at.glob("*")) if file.name.endswith(SUFFIXES)]
        there = [place / f"{split}{suffix}" for suffix in SUFFIXES if (place / f"{split}{suffix}").is_file()][:1]
        of_split = lambda name: re.compile(rf"(?:^|[-_.])(?:{name})(?=[-_.])")
        there = there or [file for file in data if of_split(re.escape(split)).search(file.name)]
        named = [file for file in data if of_split("|".join(SPLITS)).search(file.name)]
        there = there or (data if data and not named else [])
        if not there:
            found = ", ".join(sorted(p.name for p in place.iterdir())[:8]) or "nothing"
            wanted = f"{split}.jsonl.gz" + ("" if subsets else f", or HH-RLHF's folders {', '.join(SUBSETS)}")
            raise PreferenceError(
                f"{place}: expected {wanted}, found {found}; check the folder and the split {split!r}"
            )
        chosen += there
    return chosen


def _file(path):
    stem = path.name.split(".")[0]
    split = re.sub(r"[-_]\d+(-of-\d+)?$", "", stem)  # a shard
    # harmless-base/test.jsonl.gz is the test split of harmless-base; prefs.jsonl is just prefs.
    folder = path.resolve().parent
    folder = folder.parent if folder.name == "data" and split in SPLITS else folder
    name = f"{folder.name}/{stem}" if split in SPLITS else stem
    return name, str(path), lambda: readers.rows(path)


def _hub_files(hub_id, split):
    """The same triples from the hub, at the revision that labels name; a line is a row number there."""
    hub_id, _, config = hub_id.partition(":")
    subsets = SUBSETS if hub_id.lower() == HH_RLHF.lower() else [None]
    tables = []
    for subset in subsets:
        try:
            revision = provenance.hub_revision(hub_id, "dataset")
            where = {"data_dir": subset} | ({"name": config} if config else {})
            table = datasets.load_dataset(hub_id, **where, split=split, revision=revision)
        except Exception as error:  # the hub's clients raise a dozen types; each means: no such data from there
            cause = " ".join(str(error).split())[:160]
            raise PreferenceError(
                f"{hub_id}: no such folder here, and the hub did not give it ({type(error).__name__}: {cause}); check "
                f"the name and the network, or download it and name its folder"
            ) from error
        name = f"{subset or hub_id.split('/')[1]}/{split}"
        tables.append((name, f"{hub_id}@{revision}/{name}", lambda table=table: enumerate(table, start=1)))
    return tables

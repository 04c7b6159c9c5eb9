"""Counting as a block of a datatrove pipeline, for lists that take many machines: `pip install 'deftlib[datatrove]'`.

    read = ParquetReader("lists/", text_key="prompt")               # a list a document; columns in its metadata
    count = CountLists("counts/", start, vocabulary_size(start), profile.text, by_level)
    LocalPipelineExecutor([read, count], tasks=64).run()            # or Slurm's, or Ray's
    q_diff = discrepancy(*summed("counts/", tasks=64))

Each task leaves its counts in one file; int64 adds up in any order to those of `counting.count_lists`, which it calls.
"""

import numpy as np

try:
    from datatrove.io import get_datafolder
    from datatrove.pipeline.base import PipelineStep
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("count_block is for datatrove: pip install 'deftlib[datatrove]'") from error

from deftlib.method.grading import extreme_sides
from deftlib.models import policies
from deftlib.preferences.batches import pieces_of
from deftlib.training.counting import LISTS_AT_ONCE, count_lists
from deftlib.training.subset import list_sides


def ends(row):
    """Sides of a list that nobody graded: y_1 against y_l (decision 5)."""
    return extreme_sides(len(row["responses"]))


def by_level(row):
    """Sides of a list with rewards and level, as `subset.graded` publishes them."""
    return list_sides(row["level"], row["rewards"])


class CountLists(PipelineStep):
    """Counts the lists that pass, as documents whose metadata has "responses", into `counts` of one file a task.

    folder: of the files, wherever fsspec writes to. start: folder or hub id of the policy whose tokenizer counts.
    vocab_size: rows of its head. text: the profile's Text. sides: what a document's metadata is counted as.
    """

    name, type = "Q_pos and Q_neg", "Counts"

    def __init__(self, folder, start, vocab_size, text, sides=ends):
        super().__init__()
        self.folder, self.start, self.vocab_size = get_datafolder(folder), str(start), vocab_size
        self.text, self.sides = text, sides

    def run(self, data, rank=0, world_size=1):
        tokenizer, counts = policies.load_tokenizer(self.start), np.zeros((2, self.vocab_size), np.int64)
        for piece in pieces_of(data, LISTS_AT_ONCE):
            with self.track_time("batch"):
                rows = [document.metadata for document in piece]
                lists = {"responses": [row["responses"] for row in rows]}
                counts += count_lists(lists, map(self.sides, rows), tokenizer, self.vocab_size, self.text)
            self.stat_update("lists", value=len(piece))
            yield from piece
        with self.folder.open(_file(rank), "wb") as file:
            np.savez(file, counts=counts, fingerprint=policies.fingerprint(tokenizer))


def summed(folder, tasks):
    """(Q_pos, Q_neg), int64[V] each, of all tasks. Raises FileNotFoundError for a task that did not finish."""
    total = 0
    for rank in range(tasks):
        with get_datafolder(folder).open(_file(rank), "rb") as file, np.load(file) as stored:
            total = total + stored["counts"]
    return total[0], total[1]


def _file(rank):
    return f"{rank:05d}.npz"

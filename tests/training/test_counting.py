"""Counting: by batches, in several processes or in tasks of datatrove, always what one reply at a time gives."""

from collections import Counter

import numpy as np
import pytest
from conftest import VOCAB, small_tokenizer
from datasets import Dataset
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from hypothesis import given, settings
from hypothesis import strategies as st

from deftlib.models import policies
from deftlib.preferences.lists import FEATURES
from deftlib.sections import Text
from deftlib.training import count_block, counting

WORDS = st.lists(st.sampled_from(["w1", "w2", "w3", "w30", "unheard", "<eos>", "<pad>"]), max_size=6)
REPLIES = st.lists(st.tuples(WORDS.map(" ".join), st.sampled_from([1, -1, 0])), min_size=1, max_size=4)


@pytest.fixture
def two_at_once(monkeypatch):
    monkeypatch.setattr(counting, "LISTS_AT_ONCE", 2)


def one_by_one(lists, tokenizer, text):
    """(Q_pos, Q_neg) as Counters, by the rules of decision 3."""
    counts = {1: Counter(), -1: Counter(), 0: Counter()}
    for replies in lists:
        for reply, side in replies:
            ids = policies.encode_reply(tokenizer, reply, text)
            counts[side].update(i for i in ids if i not in tokenizer.all_special_ids)
    return counts[1], counts[-1]


def count(lists, text, num_proc=1):
    responses, sides = ([[pair[i] for pair in replies] for replies in lists] for i in (0, 1))
    found = counting.count_lists({"responses": responses}, sides, small_tokenizer(), len(VOCAB), text, num_proc)
    return tuple(Counter({i: int(n) for i, n in enumerate(of_side) if n}) for of_side in found)


@settings(deadline=None)
@given(st.lists(REPLIES, max_size=7), st.integers(1, 8))
def test_counts_are_those_of_one_reply_at_a_time(lists, reply_tokens):
    text = Text(reply_tokens=reply_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "LISTS_AT_ONCE", 2)
        assert count(lists, text) == one_by_one(lists, small_tokenizer(), text)


def test_two_processes_count_the_same(two_at_once):
    lists = [[(f"w{i} w1", 1), (f"w{i + 1}", 0), ("w2 " * i, -1)] for i in range(9)]
    assert count(lists, Text(), num_proc=2) == count(lists, Text())


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_fault_names_its_list_whichever_piece_it_is_in(two_at_once, num_proc):
    lists = [[("w1", 1), ("w2", -1)]] * 4
    with pytest.raises(ValueError, match="list 3: side 2"):
        count([*lists[:3], [("w1", 1), ("w2", 2)]], Text(), num_proc)
    with pytest.raises(ValueError, match="list 3: 2 responses but 1 sides"):
        sides = [(1, -1)] * 3 + [(1,)]
        counting.count_lists({"responses": [["w1", "w2"]] * 4}, sides, small_tokenizer(), len(VOCAB), Text(), num_proc)


# ---- datatrove -----------------------------------------------------------------------------------------------------

GRADED = [  # level, rewards, replies: which count as good and bad is worked out in tests/training/test_subset.py
    ("A", [9.0, 8.6, 4.0], ["w1 w1", "w2", "w3"]),
    ("B", [5.0, 3.0, 1.0], ["w1", "w4", "w3 w3"]),
    ("C", [1.0, 0.15, 0.0], ["w2", "w4", "w5"]),
    ("B", [1.0, 2.0, 0.0], ["w6", "w7", "w8"]),  # rewards that contradict the order
]


@pytest.fixture
def shards(tmp_path):
    """Two Parquet files of graded lists and a folder with their tokenizer."""
    small_tokenizer().save_pretrained(tmp_path / "start")
    (tmp_path / "lists").mkdir()
    rows = [
        {"id": str(i), "subset": "s", "prompt": "w9", "responses": replies, "rewards": rewards, "level": level}
        for i, (level, rewards, replies) in enumerate(GRADED)
    ]
    features = FEATURES.copy() | {"level": FEATURES["id"]}
    for name, part in (("a", rows[:1]), ("b", rows[1:])):
        Dataset.from_list(part, features=type(FEATURES)(features)).to_parquet(tmp_path / "lists" / f"{name}.parquet")
    return tmp_path


def by_datatrove(folder, sides, tasks=2):
    read = ParquetReader(str(folder / "lists"), text_key="prompt")
    block = count_block.CountLists(str(folder / "counts"), folder / "start", len(VOCAB), Text(), sides)
    logs = str(folder / "logs")
    LocalPipelineExecutor([read, block], tasks=tasks, workers=1, logging_dir=logs).run()


@pytest.mark.parametrize("sides", [count_block.ends, count_block.by_level])
def test_two_tasks_of_datatrove_count_what_one_process_counts(shards, sides):
    by_datatrove(shards, sides)
    rows = [{"level": level, "rewards": rewards, "responses": replies} for level, rewards, replies in GRADED]
    lists = {"responses": [row["responses"] for row in rows]}
    expected = counting.count_lists(lists, map(sides, rows), small_tokenizer(), len(VOCAB), Text())
    assert np.array_equal(count_block.summed(str(shards / "counts"), tasks=2), expected)
    assert len(list((shards / "counts").iterdir())) == 2


def test_a_task_that_did_not_finish_is_missed(shards):
    by_datatrove(shards, count_block.ends)
    with pytest.raises(FileNotFoundError, match=r"00002\.npz"):
        count_block.summed(str(shards / "counts"), tasks=3)

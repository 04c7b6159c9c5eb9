"""Ranked lists a thousand at a time: what is read, chosen and written is what a table held as a whole gives."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from deftlib.preferences import batches
from deftlib.preferences.lists import FEATURES, read_lists, sample, sample_rows, split, split_rows

ROWS = [
    {
        "id": str(i),
        "subset": "ba"[i % 3 == 0],
        "prompt": f"\n\nHuman: {i}\n\nAssistant:",
        "responses": [" x"] * (2 + i % 2),
        "rewards": None if i % 2 else [1.0, 0.5],
    }
    for i in range(25)
]


@pytest.fixture
def path(tmp_path, monkeypatch):
    """25 lists in row groups of four, read seven at a time."""
    monkeypatch.setattr(batches.batches, "__defaults__", (None, 7))
    monkeypatch.setattr(batches, "LISTS_PER_GROUP", 4)
    batches.write(tmp_path / "lists.parquet", FEATURES.arrow_schema, [ROWS[:2], ROWS[2:9], ROWS[9:]])
    return tmp_path / "lists.parquet"


@pytest.mark.parametrize("as_dataset", [False, True])
def test_rows_and_columns_come_back_in_order(path, as_dataset):
    lists = read_lists(path) if as_dataset else path
    assert list(batches.rows(lists)) == ROWS
    assert list(batches.column(lists, "rewards")) == [row["rewards"] for row in ROWS]
    assert batches.lengths(lists).tolist() == [len(row["responses"]) for row in ROWS]
    names, codes = batches.codes(lists, "subset")
    assert names == ["a", "b"] and [names[code] for code in codes] == [row["subset"] for row in ROWS]


def test_a_part_of_a_dataset_is_that_part(path):
    part = read_lists(path).select([20, 3, 4])
    assert list(batches.column(part, "id")) == ["20", "3", "4"] and batches.lengths(part).tolist() == [2, 3, 2]


@settings(deadline=None)
@given(st.sets(st.integers(0, 24)))
def test_any_rows_are_taken(tmp_path_factory, numbers):
    folder = tmp_path_factory.mktemp("taken")
    Dataset.from_list(ROWS, features=FEATURES).to_parquet(folder / "lists.parquet")
    batches.take(folder / "lists.parquet", np.array(sorted(numbers), int), folder / "some.parquet")
    assert read_lists(folder / "some.parquet").to_list() == [ROWS[i] for i in sorted(numbers)]
    assert read_lists(folder / "some.parquet").features == FEATURES


def test_columns_are_added_to_every_list(path, tmp_path):
    level, score = np.array(["A", "rest"] * 12 + ["A"]), np.arange(25) / 2
    schema = batches.schema_of(path, level="string", score="float64")
    batches.write(tmp_path / "more.parquet", schema, batches.with_columns(path, level=level, score=score))
    expected = [{**row, "level": str(level[i]), "score": i / 2} for i, row in enumerate(ROWS)]
    assert read_lists(tmp_path / "more.parquet").to_list() == expected


def test_lists_are_dealt_and_sampled_from_a_file_as_from_a_dataset(path):
    lists, shares = read_lists(path), {"one": 0.5, "two": 0.3, "three": 0.2}
    rows = split_rows(path, shares)
    assert {name: part["id"][:] for name, part in split(lists, shares).items()} == {
        name: [str(i) for i in rows[name]] for name in shares
    }
    for n in (0, 3, 8, len(rows["one"])):
        assert sample(lists.select(rows["one"]), n)["id"][:] == [str(i) for i in sample_rows(path, rows["one"], n)]


def test_a_list_that_is_read_from_parquet_is_mapped_and_not_held(tmp_path):
    text = " y" * 500_000
    rows = [{**row, "responses": [text + str(i), " n"]} for i, row in enumerate(ROWS)]  # 25 MB of text
    pq.write_table(
        pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema), tmp_path / "lists.parquet", row_group_size=1
    )
    before = pa.total_allocated_bytes()
    lists = read_lists(tmp_path / "lists.parquet")
    assert pa.total_allocated_bytes() - before < 5e6 and lists[24]["responses"][0] == rows[24]["responses"][0]

"""The bench of many lists, with few: what it measures is there, and counting is measured against the same tokens."""

from deftlib.models import policies
from deftlib.studies import bench_lists


def test_memory_is_measured_in_a_process_of_its_own():
    table = bench_lists.memory(sizes=(300,))
    (row,) = table.to_dict("records")
    assert row["lists"] == 300 and row["peak (MB)"] >= row["before (MB)"] > 100
    assert all(row[f"{step} (s)"] > 0 for step in ("reading", "encoding", "grading"))


def test_counting_stands_beside_the_tokenizer_alone():
    table = bench_lists.counting(policies.mini_tokenizer(), size=200, rounds=1, num_proc=(1, 2))
    assert table["processes"].tolist() == [1, 2] and (table["tokens/s"] > 0).all()


def test_made_lists_differ_and_are_the_same_again():
    lists = list(bench_lists.made(50))
    assert lists == list(bench_lists.made(50)) and len({row["prompt"] for row in lists}) == 50

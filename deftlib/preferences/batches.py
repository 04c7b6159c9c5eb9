"""Ranked lists a thousand at a time: read from Parquet, chosen from it and written to it in flat memory.

    for row in rows(path): ...                           # dicts
    write(other, schema, (changed(batch) for batch in batches(path)))
    take(path, np.flatnonzero(level == "A"), other)      # the rows of these numbers

What reads everything goes by a path: a memory map of the same file would count as resident memory, page by page.
"""

from itertools import chain, islice

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LISTS_AT_ONCE = 1000  # Python objects weigh several times their Arrow form, so few lists are held as such
LISTS_PER_GROUP = 10_000  # of a Parquet file that is written here
IN_PIECES = {"buffer_size": 2**20, "pre_buffer": False}  # whatever the length of the row groups that are read


def batches(lists, columns=None, size=LISTS_AT_ONCE):
    """Yield Arrow batches of at most `size` lists. lists: a Parquet file, or a Dataset."""
    if isinstance(lists, datasets.Dataset):
        chosen = lists if columns is None else lists.select_columns(columns)
        for table in chosen.with_format("arrow").iter(size):
            yield from table.combine_chunks().to_batches()
        return
    with pq.ParquetFile(lists, **IN_PIECES) as file:
        yield from file.iter_batches(size, columns=columns, use_threads=False)


def rows(lists, columns=None):
    """Yield the lists as dicts."""
    return chain.from_iterable(batch.to_pylist() for batch in batches(lists, columns))


def column(lists, name):
    """Yield one column as Python values."""
    return chain.from_iterable(batch.column(0).to_pylist() for batch in batches(lists, [name]))


def lengths(lists):
    """int64[N]: the number of responses of each list."""
    found = [batch.column(0).value_lengths().to_numpy() for batch in batches(lists, ["responses"])]
    return np.concatenate([np.zeros(0, np.int64), *found]).astype(np.int64)


def codes(lists, name):
    """(names in order of appearance, int64[N]: which of them each list has) of a column of text."""
    numbers, found = {}, [np.zeros(0, np.int64)]
    for batch in batches(lists, [name]):
        coded = batch.column(0).dictionary_encode()
        here = np.array([numbers.setdefault(text, len(numbers)) for text in coded.dictionary.to_pylist()], np.int64)
        found.append(here[coded.indices.to_numpy()])
    return list(numbers), np.concatenate(found)


def pieces_of(items, size):
    """Yield the items of any iterable as lists of `size`, the last one shorter."""
    items = iter(items)
    while piece := list(islice(items, size)):
        yield piece


def schema_of(path, **more):
    """The Arrow schema of a Parquet file of lists, with more columns: names and types as `datasets` calls them."""
    features = datasets.Features.from_arrow_schema(pq.read_schema(path))
    return datasets.Features({**features, **{name: datasets.Value(kind) for name, kind in more.items()}}).arrow_schema


def write(path, schema, found):
    """Write Arrow batches, or lists of rows, to a Parquet file as they come."""
    with pq.ParquetWriter(path, schema) as file:
        held, n_held = [], 0
        for batch in found:
            held.append(pa.Table.from_pylist(batch, schema) if isinstance(batch, list) else _table(batch, schema))
            n_held += len(held[-1])
            if n_held >= LISTS_PER_GROUP:
                file.write_table(pa.concat_tables(held))
                held, n_held = [], 0
        file.write_table(pa.concat_tables([schema.empty_table(), *held]))


def _table(batch, schema):
    return pa.Table.from_batches([batch]).cast(schema)


def take(path, numbers, to):
    """Write the rows of these numbers, which are sorted, to another Parquet file."""
    write(to, pq.read_schema(path), _taken(path, numbers))


def _taken(path, numbers):
    start = 0
    for batch in batches(path):
        first, end = np.searchsorted(numbers, (start, start + len(batch)))
        yield batch.take(pa.array(numbers[first:end] - start))
        start += len(batch)


def with_columns(path, **values):
    """Yield the batches of a Parquet file with more columns, each a numpy array with one entry a list."""
    start = 0
    for batch in batches(path):
        for name, entries in values.items():
            batch = batch.append_column(name, pa.array(entries[start : start + len(batch)]))
        yield batch
        start += len(batch)

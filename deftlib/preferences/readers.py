"""The rows of one file, whatever wrote it: JSON lines, a JSON array, CSV of any country's spreadsheets, Parquet.

    for number, row in rows(Path("prefs.csv")):     # a dict, a RowFault, or None for a blank line

Compressed by gzip or not, in UTF-8 or UTF-16, with a byte order mark or without. A file is known by what is in it; its
name is asked for CSV alone. JSON lines, CSV and Parquet are read piece by piece.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".jsonl.gz", ".jsonl", ".json", ".json.gz", ".ndjson", ".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
EXPECTED = "JSON lines, a JSON array, CSV or Parquet, one ranked list each"


class PreferenceError(ValueError):
    """A source that cannot be used: one sentence with the file, the cause and what to do."""


class RowFault(PreferenceError):
    """Why one row is rejected, and the shape (never the text, which may be offensive) of what was found."""

    def __init__(self, reason, found=""):
        super().__init__(reason)
        self.reason, self.found = reason, found


def rows(path):
    """(number, row) of every row, from 1; of lines that hold one each it is the line's. Raises PreferenceError."""
    number = 0
    try:
        with path.open("rb") as start:
            first = start.read(4)
        if first == b"PAR1":
            yield from _parquet(path)
            return
        with (gzip.open if path.suffix == ".gz" or first[:2] == b"\x1f\x8b" else open)(path, "rb") as file:
            for number, row in _text_rows(path, file):
                yield number, row
        if number == 0:
            raise PreferenceError(f"{path}: the file is empty; expected {EXPECTED}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        cause = "truncated" if isinstance(error, EOFError) else "damaged or not gzip"
        raise PreferenceError(f"{path}: the gzip file is {cause} after line {number}; download it again") from error
    except pa.ArrowException as error:
        cause = " ".join(str(error).split())[:120]
        raise PreferenceError(f"{path}: the Parquet file is damaged ({cause}); download or write it again") from error
    except OSError as error:
        raise PreferenceError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def _text_rows(path, file):
    """The rows of an open file that is no Parquet, by its suffix and its first character."""
    encoding, ahead = _encoding(file.peek(64)[:64])
    suffix = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if suffix in ("csv", "tsv"):
        return _table(path, file, encoding)
    if encoding == "utf-8-sig" and not ahead.startswith("["):
        return _json_lines(file)
    text = _decoded(path, file, encoding)
    return _json_array(path, text) if text.lstrip().startswith("[") else _lines(text)


def _lines(text):
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, _json_object(line.encode()) if line.strip() else None


def _encoding(start):
    """(codec, first visible characters) by byte order mark, or by the zeros that UTF-16 puts between Latin letters."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        codec = "utf-16"
    elif start[1::2].count(0) > len(start) // 4:
        codec = "utf-16-le"
    elif start[::2].count(0) > len(start) // 4:
        codec = "utf-16-be"
    else:
        codec = "utf-8-sig"
    return codec, start.decode(codec, "replace").lstrip()


def _decoded(path, file, encoding):
    try:
        return file.read().decode(encoding)
    except UnicodeDecodeError as error:
        raise PreferenceError(f"{path}: is not valid {encoding} ({error.reason} at byte {error.start})") from error


# --- JSON ------------------------------------------------------------------------------------------------------------


def _json_lines(file):
    """One line in memory at a time; an object that is spread over many lines, alone in its file, is one row."""
    first = next(iter(file), b"")
    if first.strip() in (b"{", b"\xef\xbb\xbf{"):
        yield from _one_object(first + file.read())
        return
    for number, line in enumerate(chain([first] if first else [], file), start=1):
        yield number, _json_object(line) if line.strip() else None


def _one_object(content):
    """The rows of a pretty-printed object: those of the one list of objects in it, else the object itself."""
    row = _json_object(content)
    inside = [part for part in row.values() if _is_table(part)] if isinstance(row, dict) else []
    yield from enumerate(inside[0] if len(inside) == 1 and len(row) <= 3 else [row], start=1)


def _is_table(value):
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _json_array(path, text):
    """The rows of an array; of a file that only begins like one, those of its lines."""
    try:
        return enumerate(_checked_rows(json.loads(text)), start=1)
    except (ValueError, RecursionError) as error:
        found = list(_lines(text))
        if any(isinstance(row, dict) for _, row in found):
            return found
        raise PreferenceError(f"{path}: begins as a JSON array and is none ({error}); write it again") from error


def _checked_rows(found):
    for row in found:
        yield row if isinstance(row, (dict, RowFault)) else RowFault("wrong type", f"{shape(row)}, expected an object")


def _json_object(line):
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return RowFault("invalid UTF-8", f"{len(line)} bytes")
    except (ValueError, RecursionError):
        return RowFault("invalid JSON", f"{len(line)} bytes")
    return row if isinstance(row, dict) else RowFault("wrong type", f"{shape(row)}, expected an object")


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(path, file, encoding):
    """CSV with a header, its delimiter by its first line; a cell is text, and nothing is None."""
    csv.field_size_limit(sys.maxsize)
    lines = io.TextIOWrapper(file, encoding=encoding, newline="")
    try:
        header = lines.readline()
        delimiter = max(",;\t|", key=header.count)
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        _refuse_twice(path, names)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)  # a quote that is never closed would eat all rows
        for cells in reader:
            number = reader.line_num + 1
            if not cells:
                yield number, None
            elif len(cells) != len(names):
                yield number, RowFault("uneven row", f"{len(cells)} cells under {len(names)} names")
            else:
                yield number, {name: cell or None for name, cell in zip(names, cells)}
    except UnicodeDecodeError as error:
        raise PreferenceError(f"{path}: is no text in {encoding}; save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise PreferenceError(f"{path} line {reader.line_num + 1}: is no CSV ({error})") from error


def _parquet(path):
    file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)  # whatever the length of its row groups
    _refuse_twice(path, file.schema_arrow.names)
    found = chain.from_iterable(map(_parquet_rows, file.iter_batches(1000)))
    number = 0
    for number, row in enumerate(found, start=1):
        yield number, row
    if number == 0:
        raise PreferenceError(f"{path}: holds no row; expected {EXPECTED}")


def _parquet_rows(batch):
    """The rows of a batch; of those with a cell that Python cannot hold, such as a far date, the other cells."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # bytes that are no UTF-8 are a ValueError too
        return [
            {name: value for name, column in zip(batch.schema.names, batch.columns) for value in _held(column[i])}
            for i in range(batch.num_rows)
        ]


def _held(cell):
    try:
        return [cell.as_py()]
    except (ValueError, OverflowError):
        return []


def _refuse_twice(path, names):
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        raise PreferenceError(f"{path}: two columns are called {twice[0]!r}; rename or delete one")


def shape(value):
    """Keys, types and sizes of a value: enough to find the fault, nothing to read aloud."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {'dict' if isinstance(part, dict) else shape(part)}" for key, part in value.items())
    if isinstance(value, list):
        return f"list[{', '.join('list' if isinstance(part, (list, dict)) else shape(part) for part in value[:4])}]"
    return f"str({len(value)})" if isinstance(value, str) else type(value).__name__

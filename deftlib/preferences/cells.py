"""Cells of a row, whatever wrote them: text, lists that a cell of CSV spells, numbers of any country's spreadsheet.

    field(row, "responses", list)        # also of "['Yes.', 'No.']"
    number("7,5")                        # 7.5

A cell that cannot be used raises `RowFault` with its shape, never with its text.
"""

import ast
import json
import math
import re
from decimal import Decimal

from deftlib.preferences.readers import RowFault, shape


def name_in(row, names):
    """The first of these names that the row has. Raises RowFault."""
    found = next((name for name in names if name in row), None)
    if found is None:
        raise RowFault("missing key", f"no {names[0]!r} in {shape(row)}")
    return found


def text_or_messages(row, names):
    """Text, or the list or object of messages that a column holds; a cell that spells messages holds them."""
    name = name_in(row, names)
    spelled = unpacked(row[name])
    if isinstance(spelled, str) and re.match(r"\s*\[\s*\{\s*['\"](?:role|from|content)['\"]", spelled):
        raise RowFault("messages that cannot be read", f"{name!r} str({len(spelled)})")
    parts = spelled if isinstance(spelled, list) and spelled else [None]
    are_messages = all(isinstance(part, dict) and {"role", "from"} & part.keys() for part in parts)
    value = spelled if are_messages else row[name]
    if isinstance(value, dict) and "full_text" in value:  # WebGPT's question
        value = value["full_text"]
    if not isinstance(value, (str, list, dict)):
        raise RowFault("wrong type", f"{name!r} is {shape(value)}, expected str")
    return value


def unpacked(value):
    """The list that a cell of CSV spells, in JSON or as Python prints it; else the value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value


def field(row, key, kind):
    if key not in row:
        raise RowFault("missing key", f"no {key!r} in {shape(row)}")
    value = unpacked(row[key]) if kind is list else row[key]
    if not isinstance(value, kind):
        raise RowFault("wrong type", f"{key!r} is {shape(value)}, expected {kind.__name__}")
    return value


def texts(row, key):
    texts = field(row, key, list)
    if not all(isinstance(text, str) for text in texts):
        raise RowFault("wrong type", f"{key!r} holds more than text")
    return texts


def number(value):
    """A score as a number, also where a cell of CSV spells it, with a decimal comma or not; else the value."""
    if isinstance(value, Decimal):  # of Parquet
        return float(value)
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):  # thousands
            text = text.replace(",", "")
        try:
            return float(text.replace(",", "."))
        except ValueError:
            return value
    return value


def whole(value):
    """A verdict: a word, or a whole number however it is spelled."""
    found = number(value)
    is_whole = isinstance(found, (int, float)) and math.isfinite(found) and found == int(found)
    return int(found) if is_whole else value


def is_plain(value):
    return value is None or isinstance(value, (str, int, float))

"""Nested dicts, as YAML gives them, checked against dataclasses: the machinery under `profile`.

tree = {"grading": {"top": 25}}
override(tree, "grading.top", 10)
build(Settings, tree)                # every key known, every value of its declared type, or ProfileError
flat(tree)                           # {"grading.top": 10}
"""

import dataclasses
import difflib
import types
import typing
from typing import Literal


class ProfileError(ValueError):
    """A profile that does not exist, an unknown key, or a value of the wrong type."""


def flat(tree, prefix=""):
    """A nested dict with dotted keys."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def override(tree, key, value):
    """Set `a.b.c` in the nested dict, or merge a nested dict into it."""
    head, _, rest = key.partition(".")
    if rest:
        tree = tree.setdefault(head, {})
        if not isinstance(tree, dict):
            raise ProfileError(f"{head!r} is a value, not a section: cannot set {key!r}")
        override(tree, rest, value)
    elif isinstance(value, dict) and isinstance(tree.get(head), dict):
        for inner, inner_value in value.items():
            override(tree[head], inner, inner_value)
    else:
        tree[head] = value


def build(kind, tree, where=""):
    """The dataclass `kind` from a nested dict; every key known, every value of its declared type."""
    if not isinstance(tree, dict):
        raise ProfileError(f"{where.rstrip('.') or 'the profile'} must be a section of keys, found {tree!r}")
    declared = typing.get_type_hints(kind)
    for key in tree:
        if key not in declared:
            raise ProfileError(f"unknown profile key {where + key!r}: {nearest(key, list(declared))}")
    values = {key: _typed(declared[key], value, where + key) for key, value in tree.items()}
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in values and _required(f)]
    if missing:
        raise ProfileError(f"{where.rstrip('.') or 'the profile'} lacks {', '.join(missing)}")
    return kind(**values)


def _required(f):
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _typed(kind, value, where):
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where + ".")
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        if not isinstance(value, list):
            raise ProfileError(f"{where} must be a list, found {value!r}")
        return [_typed(inner, item, f"{where}[{i}]") for i, item in enumerate(value)]
    if typing.get_origin(kind) is dict:
        names, inner = typing.get_args(kind)
        if not isinstance(value, dict):
            raise ProfileError(f"{where} must be a section of keys, found {value!r}")
        for key in value:
            if key not in typing.get_args(names):
                raise ProfileError(f"unknown key {where}.{key}: {nearest(str(key), list(typing.get_args(names)))}")
        return {key: _typed(inner, item, f"{where}.{key}") for key, item in value.items()}
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ProfileError(f"{where} is {value!r}: {nearest(str(value), list(typing.get_args(kind)))}")
        return value
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # a number, or a word that stands for one
        words = next(part for part in typing.get_args(kind) if typing.get_origin(part) is Literal)
        (number,) = set(typing.get_args(kind)) - {words}
        return _typed(words if isinstance(value, str) else number, value, where)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        hint = " (in YAML write 1.0e-6, not 1e-6)" if kind is float and isinstance(value, str) else ""
        raise ProfileError(f"{where} must be of type {kind.__name__}, found {value!r}{hint}")
    return value


def nearest(name, valid):
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(valid)}"

"""Sixteen pairs of HH-RLHF, and the same in five formats that others use: the same lists, q_diff and policy.

With `DEFT_DATA` they are HH-RLHF's own; else dialogues of the mini world, which have its form.
"""

import csv
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from safetensors.torch import load_file

from deftlib.models import policies
from deftlib.preferences import dialogues
from deftlib.preferences.lists import read
from deftlib.profile import Profile
from deftlib.training import one_run, subset

HH = Path(os.environ.get("DEFT_DATA") or "/nowhere") / "hh-rlhf" / "helpful-base" / "test.jsonl.gz"


def pairs():
    """[{"chosen", "rejected"}, ...] of whole dialogues."""
    if HH.is_file():
        with gzip.open(HH, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line, _ in zip(file, range(16))]
    lists = read("mini", format="lists").select(range(0, 320, 20))
    return [
        {side: row["prompt"] + row["responses"][which] for side, which in (("chosen", 0), ("rejected", -1))}
        for row in lists
    ]


def messages(dialogue):
    return [{"role": dialogues.ROLES[role], "content": said.strip()} for role, said in dialogues.turns(dialogue)]


def as_messages(rows, path):
    path.write_text("".join(json.dumps({side: messages(text) for side, text in row.items()}) + "\n" for row in rows))


def as_csv(rows, path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def with_crlf(rows, path):
    texts = [{side: text.replace("\n", "\r\n") for side, text in row.items()} for row in rows]
    path.write_bytes("".join(json.dumps(row) + "\r\n" for row in texts).encode())


FORMATS = {
    "messages.jsonl": as_messages,
    "pairs.parquet": lambda rows, path: Dataset.from_list(rows).to_parquet(path),
    "pairs.csv": as_csv,
    "pairs.json": lambda rows, path: path.write_text(json.dumps(rows, indent=1)),
    "crlf.jsonl": with_crlf,
}


def made_of(path, folder):
    """(lists, q_diff, weights) after three updates of DEFT-DPO on all lists of a file."""
    folder.mkdir()
    lists = read(path, max_reject_share=0.0)
    settings = {"training.batch_size": 4, "training.save_steps": 0}
    profile = Profile.load("mini", settings)
    start = policies.start_policy(profile)
    tokenizer = policies.load_tokenizer(start)
    counts = subset.count_lists(lists, [(1, -1)] * len(lists), tokenizer, len(tokenizer), profile.text)
    subset.save_q_diff(folder / "q_diff.npz", *counts, policies.fingerprint(tokenizer))
    lists.to_parquet(folder / "lists.parquet")
    given = {"lists": folder / "lists.parquet", "q_diff": folder / "q_diff.npz"}
    one_run.train_into(folder, profile, "deft-dpo", 0, start, **given, omega=0.1, updates=3)
    return lists, subset.load_q_diff(folder / "q_diff.npz", tokenizer), load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()), encoding="utf-8")
    return made_of(folder / "pairs.jsonl", folder / "policy")


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_pairs_in_another_format_train_the_same_policy(original, tmp_path, name):
    FORMATS[name](pairs(), tmp_path / name)
    lists, q_diff, weights = made_of(tmp_path / name, tmp_path / "policy")
    assert len(lists) == 16
    for column in ("prompt", "responses", "rewards"):
        assert lists[column][:] == original[0][column][:]
    assert np.array_equal(q_diff, original[1]) and np.abs(q_diff).sum() > 0
    assert all((weights[key] == value).all() for key, value in original[2].items())

"""Is a reward model any good outside the data it learned from? Human-labelled pairs that train nothing here.

    table = judge_tests.measured({"r_train": r_train, "r_eval": r_eval})      # accuracy with its interval, set by set

The files are read from `$DEFT_DATA/judge_tests`, where they are: HHH alignment (Askell et al., 2021), LLMBar (Zeng et
al., 2024) and PandaLM's test set (Wang et al., 2024). A pair is scored on the head of its own axis: "harmless" for
HHH's harmless pairs, else "helpful".
"""

import json
import os
from collections import Counter
from pathlib import Path

import pandas as pd

from deftlib.intervals import wilson_interval
from deftlib.models.reward_heads import AXES

LLMBAR = {"natural": "LLMBar natural"}
LLMBAR |= dict.fromkeys(("gptinst", "gptout", "manual", "neighbor"), "LLMBar adversarial")


def folder():
    """`$DEFT_DATA/judge_tests`, or None where there is no such folder."""
    place = Path(os.environ.get("DEFT_DATA", "")) / "judge_tests"
    return place if os.environ.get("DEFT_DATA") and place.is_dir() else None


def pairs(place):
    """A DataFrame of set, axis, prompt, better, worse: every pair there that its labellers decided.

    Prompts are one human turn in the project's text format. Raises ValueError, naming file and row, for another layout.
    """
    rows = [row for read in (_hhh, _llmbar, _pandalm) for row in read(place)]
    frame = pd.DataFrame(rows, columns=["set", "axis", "prompt", "better", "worse"])
    frame["prompt"] = [f"\n\nHuman: {prompt.strip()}\n\nAssistant:" for prompt in frame["prompt"]]
    for side in ("better", "worse"):
        frame[side] = [f" {str(reply).strip()}" for reply in frame[side]]  # PandaLM has an answer that is `true`
    return frame


def measured(judges, place=None):
    """One row a (judge, set): accuracy in per cent, low, high, n; None without files.

    judges: {name: `rewards.Judge`}.
    """
    place = place or folder()
    if place is None:
        return None
    frame, rows = pairs(place), {}
    for name, judge in judges.items():
        better, worse = (judge.score(frame["prompt"], frame[side], frame["axis"], name) for side in ("better", "worse"))
        for of_set, right in pd.Series(better > worse).groupby(frame["set"], sort=False):
            share = wilson_interval(int(right.sum()), len(right))
            rows[name, of_set] = [100 * share.mean, 100 * share.low, 100 * share.high, share.n]
    table = pd.DataFrame.from_dict(rows, "index", columns=["accuracy (%)", "low", "high", "n"])
    table.index = pd.MultiIndex.from_tuples(table.index, names=["judge", "pairs"])
    return table


def _hhh(place):
    path = place / "hhh_alignment" / "hhh.jsonl"
    for number, line in enumerate(_text(path).splitlines(), start=1):
        row = _row(json.loads(line), ("axis", "prompt", "chosen", "rejected"), path, number)
        axis = row["axis"] if row["axis"] in AXES else "helpful"
        yield [f"HHH {row['axis']}", axis, row["prompt"], row["chosen"], row["rejected"]]


def _llmbar(place):
    for name, of_set in LLMBAR.items():
        path = place / "llmbar" / f"{name}.json"
        for number, row in enumerate(json.loads(_text(path) or "[]"), start=1):
            row = _row(row, ("input", "output_1", "output_2", "label"), path, number)
            replies = row["output_1"], row["output_2"]
            yield [of_set, "helpful", row["input"], *(replies if row["label"] == 1 else replies[::-1])]


def _pandalm(place):
    path = place / "pandalm" / "testset-v1.json"
    keys = ("instruction", "input", "response1", "response2", "annotator1", "annotator2", "annotator3")
    for number, row in enumerate(json.loads(_text(path) or "[]"), start=1):
        row = _row(row, keys, path, number)
        votes = Counter(int(row[f"annotator{k}"]) for k in (1, 2, 3))
        winner, n = votes.most_common(1)[0]
        if winner and n >= 2:  # most people said so, and it is no tie
            replies = row["response1"], row["response2"]
            prompt = f"{row['instruction']}\n\n{row['input']}".strip()
            yield ["PandaLM", "helpful", prompt, *(replies if winner == 1 else replies[::-1])]


def _text(path):
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _row(row, keys, path, number):
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise ValueError(f"{path}, row {number}: lacks {', '.join(missing)}")
    return row

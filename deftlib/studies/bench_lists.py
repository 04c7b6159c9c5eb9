"""How much memory do a million lists take, and how fast are they counted? Measured, on lists made for it.

memory()      # peak resident memory of a fresh process that reads, encodes, grades and counts 10^4, 10^5, 10^6 lists
counting()    # tokens a second of `count_lists`, beside those of the tokenizer alone
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from deftlib.models import policies
from deftlib.models.loop import resident
from deftlib.preferences import batches, mini_world
from deftlib.preferences.lists import read_to
from deftlib.profile import Profile
from deftlib.sections import Text
from deftlib.training import subset
from deftlib.training.counting import LISTS_AT_ONCE, count_lists
from deftlib.training.encoding import encode_lists

SIZES = (10**4, 10**5, 10**6)
CONVERSATIONS = 20_000  # of the mini world, from which pairs are drawn
MB = 10**6


def made(n, seed=0):
    """Yield n pairs of the mini world's replies with rewards, under prompts that differ."""
    said, rng = list(mini_world.conversations(CONVERSATIONS, seed)), random.Random(seed)
    for i in range(n):
        (prompt, chosen), (_, rejected) = rng.sample(said, 2)
        prompt = prompt.replace("Human:", f"Human: ({i})", 1)
        rewards = sorted((rng.random(), rng.random()), reverse=True)
        yield {"id": str(i), "prompt": prompt, "responses": [chosen, rejected], "rewards": rewards}


def memory(sizes=SIZES):
    """One row a number of lists: MB of its file, seconds of each step, MB resident before any and at the peak.

    The peak is VmHWM of a process that did nothing else: it counts every page, maps of files too.
    """
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "lists.jsonl"
            with open(source, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in made(size))
            script = f"from deftlib.studies import bench_lists; bench_lists.all_steps({folder!r})"
            done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
            measured = json.loads(done.stdout.splitlines()[-1])
            rows.append({"lists": size, "file (MB)": source.stat().st_size / MB, **measured})
            print(f"  {size} lists: {rows[-1]['peak (MB)']:.0f} MB at the peak", flush=True)
    return pd.DataFrame(rows)


def all_steps(folder):
    """Read, encode, grade and count the lists of `lists.jsonl` in a folder; prints a row of `memory` as JSON."""
    folder, profile, row = Path(folder), Profile.load("mini"), {}
    path, start = folder / "lists.parquet", policies.start_policy(profile)
    tokenizer = policies.load_tokenizer(start)
    (folder / "graded").mkdir()
    row["before (MB)"] = resident("VmHWM") / MB
    steps = {
        "reading (s)": lambda: read_to(path, folder / "lists.jsonl"),
        "encoding (s)": lambda: encode_lists(path, tokenizer, profile.text, folder=folder / "encoded"),
        "grading (s)": lambda: subset.grade_by_reward(profile, folder, start, folder / "graded"),  # counts too
    }
    for name, step in steps.items():
        began = time.perf_counter()
        step()
        row[name] = time.perf_counter() - began
    print(json.dumps(row | {"peak (MB)": resident("VmHWM") / MB}))


def counting(tokenizer, size=20_000, rounds=5, num_proc=(1, 2)):
    """One row a number of processes: tokens a second, and their ratio to those of the tokenizer alone, in one process.

    Alone it is called on as many replies at a time. Best of several rounds, in turn: other work on a machine comes in
    waves.
    """
    lists = list(made(size))
    responses, sides = [row["responses"] for row in lists], [(1, -1)] * size
    replies = [sum(piece, []) for piece in batches.pieces_of(responses, LISTS_AT_ONCE)]
    n_tokens = sum(len(ids) for piece in replies for ids in tokenizer(piece, add_special_tokens=False)["input_ids"])
    text = Text(reply_tokens=10**6)  # nothing is cut: as many tokens as alone

    def alone():
        for piece in replies:
            tokenizer(piece, add_special_tokens=False)

    def counted(processes):
        count_lists({"responses": responses}, sides, tokenizer, len(tokenizer), text, processes)

    works = {"alone": alone} | {n: lambda n=n: counted(n) for n in num_proc}
    best = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - start)
    table = pd.DataFrame({"processes": num_proc, "tokens/s": [n_tokens / best[n] for n in num_proc]})
    return table.assign(**{"of the tokenizer's": [best["alone"] / best[n] for n in num_proc]})

"""kill -9 at any moment costs nothing: the same call, made again, ends as if nobody had. `make kills`: 50 times each.

Each work of the table below runs once unbroken. Then copies of it are killed, up to three times in a row, either at a
random moment or just as its n-th file appears (in the middle of a checkpoint, a block, a manifest), and called again.
All that was published must then be equal, bit for bit: weights, tokenizer, settings, the log of every update (and with
it the order of the examples), rewards, states, replies. Only seconds, dates and memory may differ.

| work | what a kill may hit |
|---|---|
| one method for each of our trainers | updates, calibration, checkpoints, the model, the manifest |
| a reward model trained whole | the same |
| scoring by a finished reward model, hidden states | blocks |
| replies of a policy, answers of a server | batches, kept lines |
"""

import csv
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import servers
import short_runs
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from deftlib import blocks, store
from deftlib.models import endpoint, features, generation, policies, rewards
from deftlib.sections import Endpoint
from deftlib.training import subset, train

KILLS = int(os.environ.get("DEFT_KILLS", "1"))  # of every work
IN_A_ROW = 3
CLOCKS = {"seconds", "tokens_per_second", "peak_memory", "created", "step_time"}
serve = servers.serve
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="works are forked")


class Run(NamedTuple):
    """One call of a work in a process of its own."""

    was_killed: bool
    seconds: float
    files: list[str]  # in the order they appeared


def run(work, root, moment=math.inf, nth_file=math.inf):
    """Call `work()` in a fork of this process; kill it after `moment` seconds or as its n-th file appears."""
    process = multiprocessing.get_context("fork").Process(target=short_runs.quietly, args=(work, root))
    before, files, start = _files(root), [], time.perf_counter()
    finished = {os.path.dirname(path) for path in before if path.endswith(store.MANIFEST)}  # nothing appears there
    process.start()
    while process.is_alive():
        files += sorted(_files(root, finished) - before - set(files))
        if time.perf_counter() - start > moment or len(files) >= nth_file:
            process.kill()
        time.sleep(0.001)
    process.join()
    assert process.exitcode in (0, -9), (root / "said.txt").read_text()
    return Run(process.exitcode == -9, time.perf_counter() - start, files)


def _files(root, but=()):
    found = set()
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in but]
        found |= {os.path.join(folder, name) for name in names}
    return found


def published(root):
    """{path below the project's folder: content} without clocks: bytes, or what JSON says."""
    content = {}
    for path in sorted((root / "build").rglob("*")):
        if path.suffix in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            entries = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
            content[path.relative_to(root)] = _without_clocks(entries)
        elif path.is_file() and path.suffix != ".lock":  # empty; nobody holds it
            content[path.relative_to(root)] = path.read_bytes()
    return content


def _without_clocks(value):
    if isinstance(value, list):
        return [_without_clocks(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "files" in value:  # a manifest: sizes and sums of files that hold clocks differ
        value = {**value, "files": sorted(value["files"])}
    return {name: _without_clocks(each) for name, each in value.items() if name not in CLOCKS}


def _first_difference(found, expected):
    """Of two logs the entries that part, to be read in a failure."""
    both = zip(found, expected) if isinstance(found, list) else []
    return next(((one, other) for one, other in both if one != other), "other content")


# ---- works -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A project folder with all that the works rest on."""
    folder = tmp_path_factory.mktemp("base")
    assert not run(short_runs.prepare, folder).was_killed
    return folder


@pytest.fixture(scope="module")
def finished_reward_model(tmp_path_factory):
    """A random one that reads mini's tokens."""
    folder = tmp_path_factory.mktemp("reward-model")
    tokenizer = policies.load_tokenizer(policies.start_policy(short_runs.profile()))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_labels": 1}
    LlamaForSequenceClassification(LlamaConfig(**sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fitted(method):
    return lambda: train.fit(short_runs.profile(), method, seed=int(method == "sft"))  # SFT's seed 0 stands already


def whole_reward_model():
    profile = short_runs.profile(**{"reward_models.train.freeze_backbone": False})
    rewards.judge(profile, "train", subset.parts(profile))


def hidden_states():
    profile = short_runs.profile()
    features.of_lists(profile, "policy", subset.parts(profile) / "reward_eval.parquet")


def replies():
    profile = short_runs.profile()
    generation.replies(profile, policies.start_policy(profile), short_runs.prompts())


WORKS = {**{method: fitted(method) for method in short_runs.FAMILIES}}
WORKS |= {"reward model": whole_reward_model, "hidden states": hidden_states, "replies": replies}


# ---- kills -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told():
    """Rows of the table that `make kills` writes."""
    rows = []
    yield rows
    if KILLS >= 50:
        folder = store.figures_dir("statistics")
        with open(folder / "table_kills.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def kill_and_resume(name, work, base, tmp_path, told):
    """Kill copies of a work KILLS times in all; each must end as the unbroken one does."""
    chance, kills, hit, runs = random.Random(f"{name} {KILLS}"), 0, [], 0
    unbroken, by_nobody = _copy(base, tmp_path / "unbroken"), None
    by_nobody = run(work, unbroken)
    expected = published(unbroken)
    assert not by_nobody.was_killed and len(expected) > len(published(base))
    while kills < KILLS:
        root = _copy(base, tmp_path / "killed")
        for _ in range(min(IN_A_ROW, KILLS - kills)):
            moment, nth_file = chance.uniform(0, by_nobody.seconds), math.inf
            if chance.random() < 0.5:
                moment, nth_file = math.inf, chance.randint(1, len(by_nobody.files))
            one = run(work, root, moment, nth_file)
            kills += one.was_killed
            hit += [_kind(one.files)] if one.was_killed else []
        assert not run(work, root).was_killed
        found = published(root)
        said = (root / "said.txt").read_text()
        assert sorted(found) == sorted(expected), f"{found.keys() ^ expected.keys()}\n{said}"
        for path in found:
            assert found[path] == expected[path], f"{path}: {_first_difference(found[path], expected[path])}\n{said}"
        runs += 1
    in_files = {kind: hit.count(kind) for kind in ("checkpoint", "manifest", "other file", "before any file")}
    told.append({"work": name, "runs": runs, "kills": kills, **in_files, "identical": runs})


def _copy(base, root):
    """A project folder like `base`; published files are shared, as nothing writes to them."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root, copy_function=os.link)
    (root / "said.txt").unlink(missing_ok=True)
    return root


def _kind(files):
    """What was the last file to appear before a kill."""
    if not files:
        return "before any file"
    path = Path(files[-1])
    if any(part.startswith("checkpoint-") for part in path.parts):
        return "checkpoint"
    return "manifest" if store.MANIFEST in path.name else "other file"


@pytest.mark.parametrize("name", WORKS)
def test_a_killed_work_ends_as_if_nobody_had_killed_it(name, base, tmp_path, told, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)
    kill_and_resume(name, WORKS[name], base, tmp_path, told)


def test_a_clock_that_goes_back_changes_nothing(base, tmp_path, monkeypatch):
    expected = _copy(base, tmp_path / "unbroken")
    run(WORKS["deft-dpo"], expected)
    now, root = time.time(), _copy(base, tmp_path / "back")
    monkeypatch.setattr(time, "time", lambda: now - 1000 * (time.perf_counter() - start))
    start = time.perf_counter()
    assert not run(WORKS["deft-dpo"], root).was_killed
    assert published(root) == published(expected)


def test_killed_scoring_ends_as_if_nobody_had_killed_it(base, finished_reward_model, tmp_path, told, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 16)

    def score():
        settings = {"source": str(finished_reward_model), "train": False}
        profile = short_runs.profile(**{f"reward_models.evaluate.{name}": value for name, value in settings.items()})
        parts = subset.parts(profile)
        rewards.judge(profile, "evaluate", parts).of_lists(parts / "reward_eval.parquet")

    kill_and_resume("scoring", score, base, tmp_path, told)


def test_killed_judging_ends_as_if_nobody_had_killed_it_and_pays_little_twice(base, tmp_path, told, serve):
    server, at_once = serve("slow"), 4
    server.delay = 0.02
    requests = [{"messages": [{"role": "user", "content": f"judge {i}"}]} for i in range(40)]

    def judge():
        path = store.build_dir("mini") / "kept" / "answers.jsonl"
        texts, failures = endpoint.ask(Endpoint(server.url, "judge"), requests, path, at_once=at_once)
        assert texts == [f"so: judge {i}" for i in range(40)] and not failures
        answers = sorted(path.read_text().splitlines(), key=lambda line: json.loads(line)["key"])
        path.write_text("".join(f"{line}\n" for line in answers))  # they come in any order

    kill_and_resume("judging", judge, base, tmp_path, told)
    runs, kills = told[-1]["runs"], told[-1]["kills"]
    assert len(server.bodies) <= 40 * (1 + runs) + at_once * kills

"""The dress rehearsal: `PROFILE=paper` in miniature, all notebooks by the command with which make runs them.

Nothing of the published setting is changed but where models, lists and judges come from (`rehearsal.overrides`). Three
policies are trained in two processes first, whole copies of the model and shares of it; the notebooks find them.
"""

import json
import os
import resource
import subprocess
import sys

import pandas as pd
import pytest
import rehearsal
import servers
import warm

from deftlib.profile import Profile, one_line

IN_TWO_PROCESSES = {"ddp": "deft-dpo", "fsdp2": "deft-pro"}  # {launch.config: method}; deft-dpo takes SFT with it
NAMES = ["01_grading", "00_walkthrough", "03_training", "07_methods", "05_mt_bench", "06_ablation", "02_distribution"]
NAMES += ["04_evaluation", "human_rating"]
MINUTES = 6  # on one core; two take little more than half
COUNTED = """  # a command, and what it leaves until that has ended: who waits for this one sees the CPU seconds of all
import ctypes, os, subprocess, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
code = subprocess.call(sys.argv[1:])
try:
    while True:
        os.wait()
except ChildProcessError:
    sys.exit(code)
"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """(the project's folder, {method or notebook: (exit code, what its command said)}, CPU seconds of all of them)."""
    folder = rehearsal.build(tmp_path_factory.mktemp("rehearsal"))
    server = servers.ChatServer("ok", reply=rehearsal.said_by_the_server)
    changes = rehearsal.overrides(folder, server.url)
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={one_line(value)}")]
    places = {"DEFT_ROOT": str(folder), "DEFT_DATA": str(folder / "given"), "PYTHONPATH": str(rehearsal.ROOT)}
    env = os.environ | places | {"OMP_NUM_THREADS": "1", "OPENAI_API_KEY": servers.KEY}

    def deft(*command, more=()):
        whole = [sys.executable, "-c", COUNTED, sys.executable, "-m", "deftlib", *command, "--profile", "paper"]
        whole += [*options, *more]
        done = subprocess.run(whole, cwd=folder, env=env, capture_output=True, text=True)
        return done.returncode, f"{done.stdout}\n{done.stderr}"

    before, ran = cpu_seconds(), {}
    with warm.python(tmp_path_factory.mktemp("python")) as (forked, of_forks):
        env |= forked
        for config, method in IN_TWO_PROCESSES.items():
            two = ["--set", "launch.processes=2", "--set", f"launch.config={config}"]
            ran[method] = deft("train", "--method", method, more=two)
    ran |= dict.fromkeys(NAMES, deft("run", *(f"notebooks/{name}.ipynb" for name in NAMES), "--at-once", "2"))
    server.stop()
    return folder, ran, cpu_seconds() - before + sum(of_forks)


def cpu_seconds():
    """Of every process that this one started and waited for: however busy the machine is otherwise."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(folder, name):
    (path,) = (folder / "figures").glob(f"paper,*/{name}.csv")
    return pd.read_csv(path)


def test_nothing_is_changed_but_where_things_come_from(tmp_path):
    plain, changes = Profile.load("paper"), rehearsal.overrides(tmp_path, "http://localhost/v1")
    small = Profile.load("paper", changes)
    sources = {"policy.source", "reward_models.train.source", "reward_models.evaluate.source"}
    sources |= {"evaluation.bart", "evaluation.zero_shot"}
    servers = {"evaluation.refiner", "evaluation.pair_judge", "mt_bench.judge"}
    servers = {f"{each}.{what}" for each in servers for what in ("url", "model")}
    assert sources | servers <= set(small.changes) <= sources | servers | {"launch.processes"}
    assert [row.name for row in small.evaluation.zero_shot] == [row.name for row in plain.evaluation.zero_shot]


def test_policies_are_trained_in_two_processes(rehearsed):
    folder, ran, _ = rehearsed
    for config, method in IN_TWO_PROCESSES.items():
        code, said = ran[method]
        assert code == 0, said[-3000:]
        (summary,) = folder.glob(f"build/paper/policies/{method}-seed0-*/summary.json")  # no notebook made another
        # On GPUs alone accelerate knows FSDP2, which tests/method/test_two_processes.py tells it to use here too.
        assert json.loads(summary.read_text())["launch"] == {"processes": 2, "config": "ddp", "nodes": 1}
        assert ("without GPUs accelerate knows no FSDP2" in said) == (config == "fsdp2")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_under_the_published_setting(rehearsed, name):
    folder, ran, _ = rehearsed
    _, said = ran[name]  # after one has failed no other is started
    assert list(folder.glob(f"build/paper/notebooks/paper,*/{name}.ipynb")), said[-3000:]


def test_the_command_that_runs_them_ends_well(rehearsed):
    _, ran, _ = rehearsed
    code, said = ran[NAMES[-1]]
    assert code == 0, said[-3000:]


def test_the_rehearsal_takes_minutes(rehearsed):
    _, _, seconds = rehearsed
    assert seconds < 60 * MINUTES, f"{seconds:.0f} s"


def test_shares_and_cuts_are_the_published_ones(rehearsed):
    """Of 64 lists 8 are held out, one in 3.73 % and one in 5 % of each subset is level A."""
    folder, _, _ = rehearsed
    rows = table(folder, "table1").set_index("Unnamed: 0")
    here = rows[["here: D", "here: D_A (reward)", "here: D_A (R_dis)", "here: test"]]
    assert here.drop("total").drop_duplicates().to_numpy().tolist() == [[14, 1, 1, 3]]
    assert here.loc["total"].tolist() == [56, 4, 4, 12]


def test_every_column_and_row_of_the_published_tables_is_there(rehearsed):
    folder, _, _ = rehearsed
    trained = ["sft", "pro", "dpo", "deft-pro", "deft-dpo", "deft-pro (distribution)", "deft-dpo (distribution)"]
    metrics = table(folder, "table_metrics").set_index("method")
    assert list(metrics.index) == ["start", "Mistral", "Zephyr", *trained]
    assert {"BARTScore", "BLEU", "sacreBLEU", "humans, harmless", "humans, helpful"} <= set(metrics)
    assert metrics[["BARTScore", "BLEU"]].notna().all().all()
    judged = table(folder, "table_mt_bench").set_index("method")
    assert list(judged.index) == ["start", "sft", "pro", "dpo", "deft-pro", "deft-dpo"]
    assert (judged["questions"] == 80).all() and (judged["missing"] == 0).all()
    assert "stand-in: wins in %" in (next((folder / "figures").glob("paper,*/table_pair_judge.md"))).read_text()
    assert table(folder, "table_overhead").set_index("method").notna().all().all()


def test_omega_batches_and_conversations_are_as_printed(rehearsed):
    folder, ran, _ = rehearsed
    found = {path.parent.name[:-11]: json.loads(path.read_text()) for path in folder.rglob("policies/*/summary.json")}
    assert found["deft-pro-seed0"]["omega"] == 2.5e-5 and found["deft-dpo-seed0"]["omega"] == 2.5e-6
    assert found["pro-seed0"]["updates"] == 14 and found["dpo-seed0"]["updates"] == 7  # of 8 lists: 56, twice and once
    _, said = ran["05_mt_bench"]
    assert "its positions leave 1024 tokens for a conversation" in said

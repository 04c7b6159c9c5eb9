"""One run in two processes: the same lists an update, the same first loss, the same policy; killed, it goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import warm
from conftest import small_model, small_tokenizer
from datasets import Dataset
from safetensors.torch import load_file

from deftlib.models import policies
from deftlib.models.loop import read_log
from deftlib.profile import Profile
from deftlib.sections import Launch, Omega
from deftlib.training import launch, one_run, subset
from deftlib.training.launch import LaunchError

SETTINGS = {
    "training.batch_size": 2,
    "training.gradient_accumulation": 2,
    "training.log_steps": 1,
    "training.save_steps": 2,
    "training.ratio_steps": 2,
    "training.pro": {"epochs": 6.0, "learning_rate": 1e-2},
}
UPDATES = 24  # six epochs of 16 lists, four an update
TEXTS = [
    {"id": str(i), "subset": "s", "prompt": f"w{i} w9", "rewards": None}
    | {"responses": [f"w{i} w{i + 1} w3", f"w{30 - i} w4"]}
    for i in range(16)
]


@pytest.fixture(scope="module", autouse=True)
def forked(tmp_path_factory):
    """What torchrun starts are forks, which need no imports."""
    with warm.python(tmp_path_factory.mktemp("python")) as (environment, _), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What `train_into` reads: a start policy, lists and q_diff."""
    folder = tmp_path_factory.mktemp("given")
    start, lists, q_diff = (folder / name for name in ("start", "lists.parquet", "q_diff.npz"))
    tokenizer = small_tokenizer()
    small_model().save_pretrained(start)
    tokenizer.save_pretrained(start)
    of_texts = Dataset.from_list(TEXTS)
    of_texts.to_parquet(lists)
    counts = subset.count_lists(of_texts, len(TEXTS) * [(1, -1)], tokenizer, len(tokenizer), Profile.load("mini").text)
    subset.save_q_diff(q_diff, *counts, policies.fingerprint(tokenizer))
    return {"start": str(start), "lists": str(lists), "q_diff": str(q_diff)}


def profile(processes=1, **more):
    return Profile.load("mini", SETTINGS | more | {"launch.processes": processes})


def trained(folder, processes, given, settings=None, **run):
    """(log, weights, summary) of a training of DEFT-PRO with a calibrated omega."""
    folder.mkdir(exist_ok=True)
    run = {"method": "deft-pro", "seed": 0, "omega": vars(Omega("ratio", 0.5, 2)), **given, **run}
    train_into = one_run.train_into if processes == 1 else launch.launched
    train_into(profile=profile(processes, **(settings or {})), folder=folder, **run)
    return read_log(folder), load_file(folder / "model.safetensors"), json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """`trained` in two processes, uninterrupted."""
    return trained(tmp_path_factory.mktemp("whole"), 2, given)


def test_two_processes_train_what_one_trains(given, whole, tmp_path):
    one_log, one, of_one = trained(tmp_path / "one", 1, given)
    log, two, of_two = whole
    assert of_two["launch"] == {"processes": 2, "config": "ddp", "nodes": 1} and "launch" not in of_one
    assert of_two["updates"] == of_one["updates"] == len(log) == UPDATES
    assert of_two["omega"] == pytest.approx(of_one["omega"], rel=1e-6)
    for name in ("loss", "R_dis", "loss_method", "gradient_ratio"):
        assert log[0][name] == pytest.approx(one_log[0][name], abs=1e-6), name
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-4)


def test_a_micro_batch_that_two_processes_share_gives_the_same_omega(given, tmp_path):
    one_micro_batch = {"training.batch_size": 4, "training.gradient_accumulation": 1}
    run = {"settings": one_micro_batch, "method": "deft-sft", "updates": 2}  # whose loss is a mean over tokens
    (one_log, one, of_one), (log, two, of_two) = (
        trained(tmp_path / str(processes), processes, given, **run) for processes in (1, 2)
    )
    assert of_two["omega"] == pytest.approx(of_one["omega"], rel=1e-6)
    for name in ("loss", "R_dis", "gradient_ratio"):
        assert log[0][name] == pytest.approx(one_log[0][name], abs=1e-6), name
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("deft-dpo", {"lora.rank": 2, "economy.group_by_length": True}),
        ("ipo", {"economy.reference": "kept", "launch.config": "fsdp2"}),
    ],
)
def test_adapters_batches_by_length_and_a_kept_reference_are_those_of_one_process(method, more, given, tmp_path):
    found = []
    for processes, train_into in ((1, one_run.train_into), (2, launch.launched)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        settings = {**more, "training.dpo": {"epochs": 2.0, "learning_rate": 1e-2}}
        run = {"method": method, "seed": 0, "omega": 0.01 * method.startswith("deft-"), **given}
        train_into(profile=profile(processes, **settings), folder=folder, **run)
        found.append((read_log(folder), policies.load_policy(folder).state_dict()))
    (one_log, one), (log, two) = found
    assert len(log) == len(one_log) == 8 and log[0]["loss"] == pytest.approx(one_log[0]["loss"], abs=1e-6)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-4)


def test_without_gpus_fsdp2_is_said_to_be_ddp_and_nothing_is_left_in_the_temporary_folder(
    given, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    *_, summary = trained(tmp_path / "run", 2, given, {"launch.config": "fsdp2"}, method="pro", omega=0.0, updates=1)
    assert summary["launch"] == {"processes": 2, "config": "ddp", "nodes": 1}
    assert "without GPUs accelerate knows no FSDP2" in capfd.readouterr().out
    assert not list(tmp_path.glob("torchelastic_*"))


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def ranks(folder):
    """Process ids of a launched training, by rank."""
    found = {}
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            command, environment = (
                Path(f"/proc/{number}/{of}").read_text().split("\0") for of in ("cmdline", "environ")
            )
            if str(folder) in command and "torch.distributed.run" not in command:
                found[int(next(e for e in environment if e.startswith("RANK=")).partition("=")[2])] = int(number)
        except (OSError, StopIteration):
            continue
    return found


def kill_when_saved(folder, rank):
    """Kill one process as soon as a checkpoint is complete."""
    while not list((folder / "checkpoints").glob("*/COMPLETE")):
        time.sleep(0.02)
    os.kill(ranks(folder)[rank], signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_training_of_which_one_process_was_killed_goes_on(rank, given, whole, tmp_path, capsys):
    folder = tmp_path / "killed"
    killer = threading.Thread(target=kill_when_saved, args=(folder, rank), daemon=True)
    killer.start()
    with pytest.raises(LaunchError, match=f"training in 2 processes failed: process {rank}: exit code"):
        trained(folder, 2, given)
    killer.join()
    deadline = time.time() + 20
    while ranks(folder) and time.time() < deadline:
        time.sleep(0.1)
    assert not ranks(folder), "the other process ended too"
    capsys.readouterr()
    log, weights, summary = trained(folder, 2, given)
    assert "resuming from checkpoint-" in capsys.readouterr().out
    assert summary["omega"] == whole[2]["omega"] and [entry["step"] for entry in log] == list(range(1, UPDATES + 1))
    for name, weight in whole[1].items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)


def test_the_processes_end_when_the_one_that_publishes_is_killed(given, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    run = {"method": "pro", "seed": 0, "omega": 0.0, **given}
    source = (
        "from pathlib import Path\nfrom deftlib.profile import Profile\nfrom deftlib.training import launch\n"
        f"profile = Profile.load('mini', {SETTINGS | {'launch.processes': 2, 'training.pro.epochs': 500.0}!r})\n"
        f"launch.launched(profile, Path({str(folder)!r}), **{run!r})"
    )
    publisher = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.DEVNULL)
    while not list((folder / "checkpoints").glob("*/COMPLETE")):
        assert publisher.poll() is None
        time.sleep(0.1)
    assert len(ranks(folder)) == 2
    publisher.kill()
    publisher.wait()
    deadline = time.time() + 20
    while ranks(folder) and time.time() < deadline:
        time.sleep(0.1)
    assert not ranks(folder)


def interrupt_when_saved(folder):
    while not list((folder / "checkpoints").glob("*/COMPLETE")):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_launch_ends_its_processes_first_and_one_process_may_go_on(given, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    threading.Thread(target=interrupt_when_saved, args=(folder,), daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        trained(folder, 2, given)
    assert not ranks(folder), "the next attempt has the folder to itself"
    _, weights, _ = trained(folder, 1, given)
    assert "resuming from checkpoint-" in capsys.readouterr().out
    assert not (folder / launch.OWN).exists(), "what the processes were told is not published"
    for name, weight in whole[1].items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-4)


def test_the_first_error_of_a_process_is_told_in_one_sentence(given, tmp_path):
    with pytest.raises(LaunchError, match=r"^training in 2 processes failed: process \d: .*nowhere"):
        trained(tmp_path / "run", 2, given | {"start": str(tmp_path / "nowhere")})


TOLD = """\
Failures:
[1]:
  time      : 2026-11-29_03:00:00
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 11)
  error_file: <N/A>
Root Cause (first observed failure):
[0]:
  time      : 2026-11-29_03:00:00
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 12)
  error_file: <N/A>
""".splitlines(keepends=True)


def test_a_process_that_was_killed_is_named_before_the_one_that_missed_it(tmp_path):
    (tmp_path / "failed-0.txt").write_text("process 0: Connection reset")
    assert launch._why(tmp_path, 1, TOLD) == "process 1: exit code -9, perhaps for want of memory"
    assert launch._why(tmp_path, 1, []) == "process 0: Connection reset"
    (tmp_path / "failed-1.txt").write_text("process 1: an error of its own")
    assert launch._why(tmp_path, 1, TOLD) == "process 0: Connection reset"


def test_a_process_that_is_gone_and_not_yet_buried_is_not_alive():
    publisher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert launch._is_alive(publisher.pid)
    publisher.kill()
    os.waitid(os.P_PID, publisher.pid, os.WEXITED | os.WNOWAIT)
    assert not launch._is_alive(publisher.pid), "a zombie"
    publisher.wait()
    assert not launch._is_alive(publisher.pid)


# ---- how the work is dealt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "accumulation", "processes", "own"),
    [
        (16, 1, 1, (16, 1)),
        (16, 1, 2, (8, 1)),
        (1, 8, 8, (1, 1)),
        (1, 8, 2, (1, 4)),
        (4, 3, 2, (2, 3)),
        (6, 4, 4, (6, 1)),
    ],
)
def test_micro_batches_are_dealt_in_turn_or_split_among_all(size, accumulation, processes, own):
    one = Profile.load("mini", {"training.batch_size": size, "training.gradient_accumulation": accumulation})
    shared = launch.share(dataclasses.replace(one, launch=Launch(processes))).training
    assert (shared.batch_size, shared.gradient_accumulation) == own
    assert shared.batch_size * shared.gradient_accumulation * processes == size * accumulation


def test_what_cannot_be_dealt_evenly_is_refused_with_the_numbers():
    refused = r"^neither training.batch_size=4 nor training.gradient_accumulation=1 can be dealt evenly over"
    with pytest.raises(LaunchError, match=refused):
        launch.share(Profile.load("mini", {"launch.processes": 3}))


def test_two_machines_are_reached_through_slurm(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(LaunchError, match=r"launch\.nodes=2 needs a Slurm allocation"):
        launch.command(Launch(16, "fsdp2", 2), tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    command = launch.command(Launch(16, "fsdp2", 2), tmp_path)
    assert command[:3] == ["srun", "--nodes=2", "--ntasks-per-node=1"]
    assert {"--nproc-per-node=8", "--nnodes=2"} <= set(command)


def meeting(folder):
    return [word for word in launch.command(Launch(16, "fsdp2", 2), folder) if word.startswith("--rdzv-")]


def test_two_launches_on_the_same_machines_do_not_meet(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run = meeting(tmp_path / "a")
    assert run == meeting(tmp_path / "a") and not set(run[1:]) & set(meeting(tmp_path / "b")) - {"--rdzv-backend=c10d"}
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert not set(run) & set(meeting(tmp_path / "a")) - {"--rdzv-backend=c10d"}


def test_fsdp_has_checkpointing_of_its_own():
    sharded = profile(2, **{"launch.config": "fsdp2", "training.gradient_checkpointing": True})
    arguments = launch.arguments(sharded)
    assert arguments["fsdp"] and arguments["gradient_checkpointing"] is False
    assert arguments["fsdp_config"]["version"] == 2 and arguments["fsdp_config"]["activation_checkpointing"]
    assert launch.arguments(profile(2)) == {"ddp_timeout": 86400} and launch.arguments(profile()) == {}
    # else each process would load the whole model onto its device before FSDP deals it
    assert launch.place_of_weights(sharded) == "cpu" and launch.place_of_weights(profile(2)) is None

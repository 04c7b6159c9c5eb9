"""Two processes under DDP and FSDP2 train as one does: batches, first loss, omega, what is logged, weights.

FSDP2 runs here as accelerate wraps it on GPUs (`two_processes.sharded`), on the CPU with gloo. Not covered: NCCL, CPU
offload, HSDP, weights loaded in the first process alone, and RLOO's sampling, which differs by the random state of each
process and under FSDP2 is TRL's own affair.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_processes import MICRO_BATCHES, RUNS, did

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """[{run: what it did}] of two processes that meet as those of `accelerate launch` do."""
    out = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("two_processes.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, out], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def of_one():
    """What a run did in this process alone; the wrapper makes no difference here."""
    known = {}

    def find(run):
        run = run._replace(wrapper="ddp bf16" if "bf16" in run.wrapper else "ddp")
        if run not in known:
            known[run] = did(run, processes=1)
        return known[run]

    return find


EXACT = {"rel": 1e-5, "abs": 1e-6}
ROUNDED = {"rel": 1e-2, "abs": 2e-2}  # bfloat16 passes; FSDP2 averages gradients in it too


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_two_processes_train_as_one(run, of_two, of_one):
    (first, second), one = (found[run] for found in of_two), of_one(run)
    is_sharded = run.wrapper.startswith("fsdp2")
    tolerance = ROUNDED if "bf16" in run.wrapper else EXACT
    assert torch.equal(first["before"], one["before"])
    assert first["omega"] == second["omega"] and torch.equal(first["after"], second["after"])
    change = (one["after"] - one["before"]).norm()
    assert change > 1e-2
    assert (first["after"] - one["after"]).norm() < (1e-5 if tolerance is EXACT else 5e-2) * change
    # Calibration wraps before training does: the two layers are not to be wrapped twice.
    assert first["checkpointed"] == (2 if run.wrapper == "fsdp2 checkpointed" else 0)

    # RLOO deals what was sampled for an update out to its micro-batches at random: the update alone is the same.
    of_part = {"gradient_ratio"} if is_sharded or run.method == "rloo" else set()  # FSDP2: of one micro-batch
    if run.method != "rloo":
        assert len(one["batches"]) == 2 * MICRO_BATCHES
        assert [batch for pair in zip(first["batches"], second["batches"]) for batch in pair] == one["batches"]
        assert first["omega"] == pytest.approx(one["omega"], rel=1e-6 if tolerance is EXACT else 1e-2)
        if is_sharded and run.guided:
            assert first["log"][0]["gradient_ratio"] == pytest.approx(one["ratios"][0], **tolerance)
    assert len(first["log"]) == len(one["log"]) == 2
    if tolerance is EXACT:
        assert first["log"][0]["loss"] == pytest.approx(one["log"][0]["loss"], rel=1e-6, abs=1e-6)
    for found, wanted in zip(first["log"], one["log"]):
        assert found.keys() == wanted.keys() and ("gradient_ratio" in found) == run.guided
        for name in wanted.keys() - of_part:
            assert found[name] == pytest.approx(wanted[name], **tolerance), name

"""A hundred updates by one method of every trainer, loss by loss as they were when the fixture was written.

Exactly so on a machine like that of the fixture; elsewhere, with other instructions (`ATEN_CPU_CAPABILITY=default`) or
two threads, sums are taken in another order, and what that makes of a hundred updates stays within TOLERANCE: measured
were 1e-4 of the mean loss at most (IFT; SFT 4e-6) for the instructions, and nothing for the threads. A change
of the code that changes what is trained fails here, and the fixture is written anew only where it is meant:
`DEFT_GOLDEN=write python -m pytest tests/test_golden_logs.py`.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import short_runs
import torch
import warm

TESTS = Path(__file__).resolve().parent
FIXTURE = TESTS / "fixtures" / "golden_logs.json"
IS_WRITING = os.environ.get("DEFT_GOLDEN") == "write"
TOLERANCE = 1e-3  # of the mean loss


def machine():
    """What decides in which order sums are taken."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return {"processor": model, "instructions": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def logs(folder, methods=short_runs.FAMILIES, threads=1, **environment):
    """{method: [[loss, gradient norm], ...]} of a process of its own, of a fresh one if it reads an environment."""
    given = [str(folder), str(threads), *methods]
    if environment:
        command, environment = [sys.executable, "short_runs.py", *given], {**os.environ, **environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS)
    else:
        done = warm.module("short_runs", *given)
    assert done.returncode == 0, done.stderr[-500:]
    return {method: np.array(log) for method, log in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def golden():
    return json.loads(FIXTURE.read_text())


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return logs(tmp_path_factory.mktemp("here"))


@pytest.mark.skipif(not IS_WRITING, reason="writes the fixture")
def test_the_fixture_is_written(here):
    log = {method: log.tolist() for method, log in here.items()}
    FIXTURE.write_text(json.dumps({"machine": machine(), "logs": log}))


def test_a_hundred_updates_are_as_they_were(golden, here):
    assert here.keys() == golden["logs"].keys() == set(short_runs.FAMILIES)
    for method, log in here.items():
        expected = np.array(golden["logs"][method])
        assert log.shape == expected.shape == (100, 2)
        if machine() == golden["machine"]:
            assert np.array_equal(log, expected), method
        else:
            assert close(log, expected), method


def test_other_instructions_and_threads_stay_near(here, tmp_path):
    for method, log in logs(tmp_path, ["sft", "deft-ift"], threads=2, ATEN_CPU_CAPABILITY="default").items():
        assert close(log, here[method]), method


def close(log, expected):
    """Whether no loss differs by more than TOLERANCE of the mean loss."""
    return np.abs(log[:, 0] - expected[:, 0]).max() <= TOLERANCE * np.abs(expected[:, 0]).mean()

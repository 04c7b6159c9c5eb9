"""Processes that need no imports: forked from one that has made them, once for all tests of a worker of pytest.

    done = warm.deft("check", "prefs.jsonl", cwd=folder, OMP_NUM_THREADS="1")    # as a shell's `deft check prefs.jsonl`
    def test_...(forked_workers):                                                # processes of `LocalWorkers`

Imports take six seconds, what these processes are to show mostly less. That a fresh one imports what it needs is shown
by `tests/test_house.py`, `tests/test_jobs.py` and `tests/training/test_fit_all.py`, which start theirs as readers do.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deftlib import store
from deftlib.kernels import IMPORTED

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED)  # as notebooks that run beside each other have it: a process has one server


def deft(*command, cwd=None, context=SERVER, **environment):
    """`deft COMMAND` in a process of its own, as `subprocess.run(..., capture_output=True, text=True)` returns it."""
    folder = Path(tempfile.mkdtemp())  # no TemporaryDirectory: a fork that clears up behind itself would remove it
    said = [folder / "out", folder / "error"]
    given = (command, said, cwd or os.getcwd(), dict(os.environ) | environment)
    process = context.Process(target=_command, args=given)
    process.start()
    process.join()
    done = subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in said))
    shutil.rmtree(folder)
    return done


def _command(command, said, cwd, environment):
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    _settle(environment)
    sys.argv = ["deft", *command]
    try:
        runpy.run_module("deftlib", run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process ends without


def _settle(environment):
    """What a fresh process would have read as it imported."""
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    store.ROOT = store._root()
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))


@pytest.fixture
def forked_workers(monkeypatch):
    """`deftlib.workers.LocalWorkers` with forked processes, where it spawns them otherwise."""
    real = multiprocessing.get_context
    forks = SimpleNamespace(Pipe=SERVER.Pipe, Process=_fork)
    monkeypatch.setattr(multiprocessing, "get_context", lambda how=None: forks if how == "spawn" else real(how))


def _fork(target, args, name):
    return SERVER.Process(target=_settled, args=(dict(os.environ), target, args), name=name)


def _settled(environment, target, args):
    _settle(environment)
    target(*args)

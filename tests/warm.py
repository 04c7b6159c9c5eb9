"""Processes that need no imports: forked from one that has made them, once for all tests of a worker of pytest.

    done = warm.deft("check", "prefs.jsonl", cwd=folder, OMP_NUM_THREADS="1")    # as a shell's `deft check prefs.jsonl`
    def test_...(forked_workers):                                                # processes of `LocalWorkers`

Imports take six seconds, what these processes are to show mostly less. That a fresh one imports what it needs is shown
by `tests/test_house.py`, `tests/test_jobs.py` and `tests/training/test_fit_all.py`, which start theirs as readers do.
"""

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deftlib import store
from deftlib.kernels import IMPORTED

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED)  # as notebooks that run beside each other have it: a process has one server


def deft(*command, **more):
    """`deft COMMAND` in a process of its own, as `subprocess.run(..., capture_output=True, text=True)` returns it."""
    return module("deftlib.__main__", *command, **more)


def module(*command, cwd=None, context=SERVER, **environment):
    """`main()` of a module that is named first, likewise."""
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
    sys.exit(_main(list(command), cwd, environment))


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


# ---- processes that torchrun starts --------------------------------------------------------------------------------

STAND_IN = """#!{python} -SE
import json, os, socket, sys
warm = socket.socket(socket.AF_UNIX)
warm.connect(os.environ["WARM"])
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n"
sent = socket.send_fds(warm, [asked], [1, 2])
warm.sendall(asked[sent:])
sys.exit(int(warm.recv(8) or 1))
"""


@contextmanager
def python(folder):
    """Yields environment variables with which torchrun's processes are forked here, and a list for their CPU seconds.

    What torchrun starts is a stand-in that asks for a fork and ends with its exit code; killed, it takes that along.
    """
    stand_in, place = folder / "python", str(folder / "warm")
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    ours, theirs = SERVER.Pipe()
    process = SERVER.Process(target=_serve, args=(place, theirs), daemon=False)
    process.start()
    ours.recv()
    seconds = []
    try:
        yield {"PYTHON_EXEC": str(stand_in), "WARM": place}, seconds
    finally:
        ours.send("end")
        seconds.append(ours.recv())
        process.join()


def _serve(place, connection):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        connection.send("ready")
        while listening in wait([listening, connection]):
            asking, _ = listening.accept()
            if not os.fork():
                listening.close()
                os._exit(_serve_one(asking))
            asking.close()
    with suppress(ChildProcessError):
        while True:
            os.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    connection.send(used.ru_utime + used.ru_stime)


def _serve_one(asking):
    said, (out, error), _, _ = socket.recv_fds(asking, 1 << 16, 2)
    while not said.endswith(b"\n"):
        said += asking.recv(1 << 16)
    command, cwd, environment = json.loads(said)
    threading.Thread(target=lambda: asking.recv(1) or os._exit(1), daemon=True).start()  # the stand-in is gone
    os.dup2(out, 1)
    os.dup2(error, 2)
    code = _main(command[command.index("-m") + 1 :], cwd, environment)
    asking.sendall(str(code).encode())
    return code


def _main(command, cwd, environment):
    """Exit code of `python -m MODULE ...`."""
    os.chdir(cwd)
    _settle(environment)
    sys.argv = command
    try:
        return importlib.import_module(command[0]).main() or 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        atexit._run_exitfuncs()  # a forked process ends without
        sys.stdout.flush()
        sys.stderr.flush()

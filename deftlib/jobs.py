"""Many runs at once: what a cell's calls have not published is made by workers, over GPUs, cores or a cluster.

    from functools import partial
    folders = results(profile, {seed: partial(train.fit, profile, "dpo", seed) for seed in range(5)})

A call publishes what it computes by `store.stage`, and can be pickled. The unit of work is one such stage: a worker
makes the first that its call lacks and is free again, so calls that rest on one SFT model wait for that and for nothing
else. The profile says how many work at a time: `jobs`, and `cluster: ray` for those of a Ray cluster.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import defaultdict, deque
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from typing import NamedTuple

from deftlib import store

CORES_OF_A_WORKER = 4  # without a GPU: where a further thread pays less than a further worker (our choice)
MOST_ON_A_GPU = 4  # small policies leave a card idle between launches; a fifth gains little (our choice)
TOO_BIG = ("OutOfMemoryError", "MemoryError")  # kinds of error after which a run is tried once more, alone


class JobError(RuntimeError):
    """Some runs of many failed; all others stand."""


class Place(NamedTuple):
    """Where a worker works."""

    gpu: str | None  # as CUDA_VISIBLE_DEVICES names it
    threads: int


class Outcome(NamedTuple):
    """How it went with a stage of a call. error: None; too_big: out of memory, or the worker died."""

    name: object
    error: Exception | None
    too_big: bool


def results(profile, calls):
    """{name: what the call returns}, in order; all but one stage at a time of what is missing is made by workers.

    calls: {name: function without arguments}. With one worker it is `call()` after `call()`, in this process. Numbers
    are the same as one by one on as many threads. A run that does not fit into memory, or whose worker dies, waits and
    is tried once more, alone. Raises JobError, from the first error and with its run's name, when all others are done.
    """
    workers = _workers(profile, calls)
    if workers is not None:
        with workers:
            _Schedule(calls, workers).run()
    return {name: call() for name, call in calls.items()}


def lacking(call):
    """Folder of the first result that a call has to make, None if it finds all of them."""
    try:
        with store.at_most(0):
            call()
    except store.Unpublished as missing:
        return missing.folder
    return None


def make_one(call):
    """Make the first result that a call lacks, and what that asks for itself."""
    with store.at_most(1), suppress(store.Unpublished):
        call()


# ---- which call next -----------------------------------------------------------------------------------------------


class _Schedule:
    """Hands out calls until each has found all its results or failed."""

    def __init__(self, calls, workers):
        self.calls, self.workers = calls, workers
        self.ready, self.alone = deque(), deque()  # names of calls: to start; too big to share
        self.stage_of = {}  # {name: folder of the stage it is ready for, or in work}
        self.waiting = defaultdict(list)  # {folder that is being made: names of the other calls that lack it}
        self.failed = {}  # {name: error}, the first of them first

    def run(self):
        for name in self.calls:
            self._look(name)
        if self.stage_of:
            of = f"{len(self.stage_of) + sum(map(len, self.waiting.values()))} of {len(self.calls)}"
            print(f"  {of} runs are not made yet: {self.workers.described}", flush=True)
        while self.stage_of:
            self._start()
            self._settle(self.workers.next_outcome())
        if self.failed:
            name, error = next(iter(self.failed.items()))
            raise JobError(
                f"{len(self.failed)} of {len(self.calls)} runs failed, the others stand; first {_said(name)}: {error}"
            ) from error

    def _look(self, name):
        """Make ready what a call lacks, or let it wait for the one that is making it."""
        try:
            folder = lacking(self.calls[name])
        except Exception as error:
            self._fail(name, error)
            return
        if folder in self.stage_of.values():
            self.waiting[folder].append(name)
        elif folder is not None:
            self.stage_of[name] = folder
            self.ready.append(name)

    def _start(self):
        while self.ready and self.workers.has_room:
            name = self.ready.popleft()
            self.workers.start(name, self.calls[name])
        if self.alone and not self.workers.busy:
            name = self.alone[0]  # stays there until it is settled: its second time
            self.workers.start(name, self.calls[name], alone=True)

    def _settle(self, outcome):
        name, again = outcome.name, outcome.name in self.alone
        if outcome.too_big and not again:
            print(f"  {_said(name)} did not get through ({outcome.error}): it is tried alone", flush=True)
            self.alone.append(name)
            return
        if again:
            self.alone.remove(name)
        folder = self.stage_of.pop(name)
        others = self.waiting.pop(folder, [])
        for each in [name, *others]:
            if outcome.error is None:
                self._look(each)
            else:
                self._fail(each, outcome.error)

    def _fail(self, name, error):
        if not self.failed:
            print(f"  {_said(name)} failed, the others go on: {error}", flush=True)
        self.failed[name] = error


def _said(name):
    """("dpo", 1) as "dpo 1"."""
    return " ".join(map(str, name)) if isinstance(name, tuple) else str(name)


# ---- worker processes of this machine ------------------------------------------------------------------------------


def _workers(profile, calls):
    """The workers that a profile asks for, None if this process is to do it itself."""
    if len(calls) < 2 and profile.cluster != "ray":
        return None
    if profile.cluster == "ray":
        from deftlib.jobs_on_ray import RayWorkers

        return RayWorkers(None if profile.jobs == "auto" else profile.jobs)
    at = places(profile)
    return LocalWorkers(at) if len(at) > 1 else None


def places(profile):
    """The `Place` of every worker: `jobs` of them, dealt over the visible GPUs and the cores of this process.

    "auto" is four a GPU, and without a GPU one for four cores.
    """
    gpus, cores = visible_gpus(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    many = profile.jobs
    if many == "auto":
        many = len(gpus) * MOST_ON_A_GPU if gpus else max(1, cores // CORES_OF_A_WORKER)
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, cores // many)))
    return [Place(gpus[i % len(gpus)] if gpus else None, threads) for i in range(many)]


def visible_gpus():
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()  # asks the driver, and leaves the GPU alone
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


class LocalWorkers:
    """Worker processes, one a place, each with a GPU of its own or a share of one. They live as long as the `with`."""

    def __init__(self, places):
        self.places, self._workers, self._names = places, {}, {}  # {place's number: _Worker}, {number: name in work}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self._workers.values():
            worker.process.terminate()
            worker.process.join()

    @property
    def described(self):
        gpus = len({place.gpu for place in self.places if place.gpu is not None})
        where = f" on {gpus} GPU{'s' * (gpus > 1)}" if gpus else ""
        return f"{len(self.places)} workers{where}, {self.places[0].threads} threads each"

    @property
    def busy(self):
        return len(self._names)

    @property
    def has_room(self):
        return self.busy < len(self.places)

    def start(self, name, call, alone=False):
        """Give a call to a free worker. alone: the caller sees to it that no other is at work; memory is given back."""
        if alone:
            self.__exit__()
            self._workers.clear()
        number = next(i for i in range(len(self.places)) if i not in self._names)
        if number not in self._workers:
            self._workers[number] = _Worker(number, self.places[number])
        self._workers[number].connection.send(call)
        self._names[number] = name

    def next_outcome(self):
        """Show what the workers say until one is done."""
        while True:
            for connection in wait([self._workers[number].connection for number in self._names]):
                number = next(i for i in self._names if self._workers[i].connection is connection)
                try:
                    kind, said = connection.recv()
                except (EOFError, ConnectionResetError):
                    code = self._bury(number)
                    error = JobError(f"its worker died (exit code {code}), perhaps for want of memory")
                    return Outcome(self._names.pop(number), error, too_big=True)
                if kind == "line":
                    print(f"  {number + 1}| {said}", flush=True)
                else:
                    return Outcome(self._names.pop(number), said, too_big=type(said).__name__ in TOO_BIG)

    def _bury(self, number):
        process = self._workers.pop(number).process
        process.join()
        return process.exitcode


class _Worker:
    """A process that makes one stage after another, and the connection to it."""

    def __init__(self, number, place):
        context = multiprocessing.get_context("spawn")  # forked, it could not use a GPU that its parent has looked at
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True, name=f"deft worker {number + 1}")
        chosen = {"OMP_NUM_THREADS": str(place.threads)}
        if place.gpu is not None:
            chosen["CUDA_VISIBLE_DEVICES"] = place.gpu
        with _environment(chosen):  # read while its libraries load, before any code of ours runs there
            self.process.start()
        theirs.close()


def _work(connection):
    """A worker's life. What it prints goes to its parent line by line; when the parent is gone it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout = _Lines(connection)
    while True:
        call = connection.recv()
        error = None
        try:
            make_one(call)
        except Exception as raised:
            error = raised
        connection.send(("done", _to_send(error)))
        _give_back_memory()


def _to_send(error):
    """An error as it can be pickled: itself, or its kind and words."""
    with suppress(Exception):
        multiprocessing.reduction.ForkingPickler.dumps(error)
        return error
    return type(error).__name__ in TOO_BIG and MemoryError(str(error)) or JobError(f"{type(error).__name__}: {error}")


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _give_back_memory():
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.empty_cache()


class _Lines:
    """A text stream that sends whole lines."""

    def __init__(self, connection):
        self.connection, self.rest, self._lock = connection, "", threading.Lock()

    def write(self, text):
        with self._lock:
            *lines, self.rest = (self.rest + text).split("\n")
            for line in filter(str.strip, lines):
                self.connection.send(("line", line))
        return len(text)

    def flush(self):
        pass


@contextmanager
def _environment(values):
    """These environment variables inside, as they were outside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

"""Worker processes of this machine: one a place, which `jobs` hands its calls to, or one function on many pieces.

with LocalWorkers([Place(gpu="0", threads=4), Place(gpu="1", threads=4)]) as workers:
    workers.start("dpo 0", call)
    workers.next_outcome()                      # shows what they print, behind their number, until one is done
"""

import gc
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import wait
from typing import NamedTuple

from deftlib import gpus, store

TOO_BIG = ("OutOfMemoryError", "MemoryError", "NotEnough")  # kinds of error after which a run is tried once more, alone


class JobError(RuntimeError):
    """Some runs of many failed; all others stand."""


class Place(NamedTuple):
    """Where a worker works."""

    gpu: str | None  # as CUDA_VISIBLE_DEVICES names it
    threads: int


class Outcome(NamedTuple):
    """How it went with a stage of a call. error: None where it stands; too_big: out of memory, or the worker died."""

    name: object
    error: Exception | None
    too_big: bool


def make_one(call):
    """Make the first result that a call lacks, and what that asks for itself."""
    with store.at_most(1), suppress(store.Unpublished):
        call()


class LocalWorkers:
    """Worker processes, one a place, each with a GPU of its own or a share of one. They live as long as the `with`."""

    def __init__(self, places):
        self.places, self._workers, self._names = places, {}, {}  # {place's number: _Worker}, {number: name in work}
        self._room = gpus.Room([place.gpu for place in places])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for number, worker in self._workers.items():
            if number in self._names:
                worker.process.terminate()
            else:
                with suppress(OSError):  # it may have died meanwhile
                    worker.connection.send(None)  # it ends by itself, and clears up behind it
        for worker in self._workers.values():
            worker.process.join()

    @property
    def described(self):
        cards = len({place.gpu for place in self.places if place.gpu is not None})
        where = f" on {cards} GPU{'s' * (cards > 1)}" if cards else ""
        return f"{len(self.places)} workers{where}, {self.places[0].threads} threads each"

    @property
    def busy(self):
        return len(self._names)

    @property
    def has_room(self):
        return any(map(self._fits, self._free()))

    def _free(self):
        """{card: number of the first place on it that is free}."""
        free = {}
        for number, place in enumerate(self.places):
            if number not in self._names:
                free.setdefault(place.gpu, number)
        return free

    def _fits(self, gpu):
        return self._room.on(gpu, at_work=sum(self.places[number].gpu == gpu for number in self._names))

    def start(self, name, call, alone=False):
        """Give a call to a free worker. alone: the caller sees to it that no other is at work; memory is given back."""
        if alone:
            self.__exit__()
            self._workers.clear()
        free = self._free()
        number = free[next(filter(self._fits, free), next(iter(free)))]
        if number not in self._workers:
            self._workers[number] = _Worker(number, self.places[number])
        self._names[number] = name  # first: with half a call sent it is busy, and `__exit__` tells it nothing more
        with suppress(ConnectionError):  # it died meanwhile: `next_outcome` says so
            self._workers[number].connection.send(call)

    def next_outcome(self):
        """Show what the workers say until one is done."""
        while True:
            for connection in wait([self._workers[number].connection for number in self._names]):
                number = next(i for i in self._names if self._workers[i].connection is connection)
                try:
                    kind, said, *held = connection.recv()
                except (EOFError, OSError):  # between two messages, or within one
                    code = self._bury(number)
                    why = ", perhaps for want of memory" if code == -signal.SIGKILL else ": stderr says why"
                    error = JobError(f"its worker died (exit code {code}){why}")
                    return Outcome(self._names.pop(number), error, too_big=True)
                if kind == "line":
                    print(f"  {number + 1}| {said}", flush=True)
                else:
                    self._room.took(*held)
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
        self.process = context.Process(target=_work, args=(theirs,), name=f"deft worker {number + 1}")
        chosen = {"OMP_NUM_THREADS": str(place.threads)}
        if place.gpu is not None:
            if "CUDA_VISIBLE_DEVICES" not in os.environ:  # the numbers are ours: as nvidia-smi counts
                chosen["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            chosen["CUDA_VISIBLE_DEVICES"] = place.gpu
        with environment(chosen):  # read while its libraries load, before any code of ours runs there
            self.process.start()
        theirs.close()


def _work(connection):
    """A worker's life. What it prints goes to its parent line by line; when the parent is gone it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout = _Lines(connection)
    while (call := connection.recv()) is not None:
        error = None
        try:
            make_one(call)
        except Exception as raised:
            error = raised
        print()  # ends a line that has no end yet
        connection.send(("done", _to_send(error), gpus.peak()))
        _give_back_memory()


def _to_send(error):
    """An error as the parent can read it: itself, or its kind and words."""
    with suppress(Exception):
        pickler = multiprocessing.reduction.ForkingPickler
        pickler.loads(pickler.dumps(error))  # some are written and cannot be read
        return error
    if type(error).__name__ in TOO_BIG:
        return MemoryError(str(error))
    return JobError(f"{type(error).__name__}: {error}")


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _give_back_memory():
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.empty_cache()


class _Lines(io.TextIOBase):
    """A text stream that sends whole lines."""

    def __init__(self, connection):
        super().__init__()
        self.connection, self.rest, self._lock = connection, "", threading.Lock()

    def write(self, text):
        with self._lock:
            *lines, self.rest = (self.rest + text).split("\n")
            for line in filter(str.strip, lines):
                self.connection.send(("line", line))
        return len(text)


@contextmanager
def environment(values):
    """These environment variables inside, as they were outside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# ---- one function on many pieces -----------------------------------------------------------------------------------

_of_pieces = None  # what a process of `in_order` does


def in_order(work, pieces, num_proc=1):
    """Yield `work(piece)` of every piece, in order; by `num_proc` processes, or in this one if that is 1.

    pieces: any iterable, read as workers come free, at most two ahead for each. Pieces and results are pickled; work,
    which may hold a tokenizer, is not.
    """
    if num_proc == 1:
        yield from map(work, pieces)
        return
    pieces = iter(pieces)
    # Forked, as `datasets.map` does: they are there at once, and touch neither torch nor a GPU.
    with ProcessPoolExecutor(num_proc, multiprocessing.get_context("fork"), _begin, (work,)) as pool:
        waiting = deque(pool.submit(_do, piece) for piece in islice(pieces, 2 * num_proc))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(_do, piece) for piece in islice(pieces, 1))
            yield result


def _begin(work):
    global _of_pieces
    _of_pieces = work
    threading.Thread(target=_end_with_parent, daemon=True).start()  # else it would wait for pieces for ever


def _do(piece):
    return _of_pieces(piece)

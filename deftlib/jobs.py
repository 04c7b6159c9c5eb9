"""Many runs at once: what a cell's calls have not published is made by workers, over GPUs, cores or a cluster.

    from functools import partial
    folders = results(profile, {seed: partial(train.fit, profile, "dpo", seed) for seed in range(5)})

A call publishes what it computes by `store.stage`, and can be pickled. The unit of work is one such stage: a worker
makes the first that its call lacks and is free again, so calls that rest on one SFT model wait for that and for nothing
else. The profile says how many work at a time: `jobs`, and `cluster: ray` for those of a Ray cluster.
"""

import os
import time
from collections import defaultdict, deque
from functools import partial

from deftlib import gpus, store
from deftlib.ray_workers import RayWorkers
from deftlib.workers import JobError, LocalWorkers, Place

CORES_OF_A_WORKER = 4  # without a GPU: where a further thread pays less than a further worker (our choice)
SECONDS_TO_APPEAR = 60  # as long as NFS may keep what it once saw of a folder, by default
MOST_ON_A_GPU = 4  # small policies leave a card idle between launches; a fifth gains little (our choice)


def results(profile, calls):
    """{name: what the call returns}, in the order given; what a call lacks is made by workers.

    calls: {name: function without arguments}. With one worker it is `call()` after `call()`, in this process. Numbers
    are the same as one by one on as many threads. A GPU is shared while it has room for another run (`gpus.Room`); a
    run that does not fit all the same, or whose worker dies, waits and is tried once more, alone. Raises JobError, from
    the first error and with its run's name, when all others are done.
    """
    workers = _workers(profile, calls) if store.unlimited() else None  # a call of a call's own: its worker makes it
    if workers is not None:
        with workers:
            _Schedule(calls, workers).run()
    return {name: call() for name, call in calls.items()}


def in_shares(profile, call):
    """`call(share, of)` for each share of one large work: one for each process of `profile.launch` on this machine.

    call: picklable; it keeps what it computes on disk, so that a run that was interrupted goes on. In this process
    where there is one. Raises the first error.
    """
    launch = profile.launch
    many = launch.processes // launch.nodes
    if many == 1:
        call(0, 1)
        return
    with LocalWorkers(_dealt(many)) as workers:
        for share in range(many):
            workers.start(f"share {share + 1} of {many}", partial(call, share, many))
        for _ in range(many):
            outcome = workers.next_outcome()
            if outcome.error is not None:
                raise JobError(f"{outcome.name} failed: {outcome.error}") from outcome.error


def lacking(call):
    """Folder of the first result that a call has to make, None if it finds all of them."""
    try:
        with store.at_most(0):
            call()
    except store.Unpublished as missing:
        return missing.folder
    return None


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
        others, error = self.waiting.pop(folder, []), outcome.error
        if error is None and not _stands(folder):
            error = JobError(
                f"{folder} is not there, though its worker is done: it works with other code, packages or devices "
                "than this process (after an edit, start this process anew), or in another folder"
            )
        for each in [name, *others]:
            if error is None:
                self._look(each)
            else:
                self._fail(each, error)

    def _fail(self, name, error):
        if not self.failed:
            print(f"  {_said(name)} failed, the others go on: {error}", flush=True)
        self.failed[name] = error


def _stands(folder):
    """Whether a result is there, or soon seen: on a network file system its name comes late."""
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not (found := (folder / store.MANIFEST).is_file()) and time.monotonic() < deadline:
        time.sleep(1)
    return found


def _said(name):
    """("dpo", 1) as "dpo 1"."""
    return " ".join(map(str, name)) if isinstance(name, tuple) else str(name)


# ---- who works -----------------------------------------------------------------------------------------------------


def _workers(profile, calls):
    """The workers that a profile asks for, None if this process makes one run after another."""
    if profile.launch.processes > 1:
        if profile.jobs not in (1, "auto") or profile.cluster:
            raise JobError(
                "launch gives every GPU to one run: leave jobs at 1 and cluster empty, or launch.processes at 1"
            )
        return None
    if len(calls) < 2 and profile.cluster != "ray":
        return None
    if profile.cluster == "ray":
        return RayWorkers(None, CORES_OF_A_WORKER) if profile.jobs == "auto" else RayWorkers(profile.jobs, cores=1)
    at = places(profile)
    return LocalWorkers(at) if len(at) > 1 else None


def places(profile):
    """The `Place` of every worker: `jobs` of them, dealt over the visible GPUs and the cores of this process.

    "auto" is four a GPU, fewer at work at a time where they do not fit, and without a GPU one for four cores.
    """
    if profile.jobs != "auto":
        return _dealt(profile.jobs)
    cards = len(gpus.visible())
    return _dealt(cards * MOST_ON_A_GPU if cards else max(1, _cores() // CORES_OF_A_WORKER))


def _dealt(many):
    """As many places, over the visible GPUs in turn, with equal threads; OMP_NUM_THREADS says otherwise."""
    cards, said = gpus.visible(), os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2": nested teams
    threads = int(said) if said.isdigit() and int(said) else max(1, _cores() // many)
    return [Place(cards[i % len(cards)] if cards else None, threads) for i in range(many)]


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

"""How far a run of several notebooks is: which stages are done, how many are left, how long they will take.

    progress = Progress.of("mini", at_once=2)
    progress.line("03", "[policies/sft-seed0] done in 5.2 s")    # with " · 41 of 187, about 2:10 to go" behind it

It is told by what an earlier run of the whole took (`figures/bench/stages_<profile>.csv`, committed) and by how much
slower or faster this one is.
"""

import csv
import re
import threading
import time
from collections import defaultdict

from deftlib.store import ROOT, build_dir, write_atomic

DONE = re.compile(r"^\[(?P<stage>.+)\] done in (?P<seconds>[\d.]+) s$")  # as `store` says it
OWN = "own cells"  # what a notebook takes beside its stages: imports, tables, figures


class Progress:
    """Of notebooks, named by their number, that run `at_once` at a time. Threads may share it."""

    def __init__(self, expected, at_once):
        self._left = defaultdict(list)  # {stage: [(notebook, seconds it took before)]}
        for notebook, stage, seconds in expected:
            self._left[stage].append((notebook, seconds))
        self._total = sum(stage != OWN for _, stage, _ in expected)
        self._at_once, self._lock = at_once, threading.Lock()
        self._took, self._before = 0.0, 0.0  # seconds of the stages that are done: now, and by what was expected
        self.made = []  # [(notebook, stage, seconds)], of this run

    @classmethod
    def of(cls, name, at_once, notebooks):
        """Of some notebooks of a profile. Without a committed run of it nothing is foretold."""
        path = committed(name)
        rows = csv.reader(path.read_text(encoding="utf-8").splitlines()[1:]) if path.is_file() else []
        expected = [(notebook, stage, float(seconds)) for notebook, stage, seconds in rows if notebook in notebooks]
        return cls(expected, at_once)

    def line(self, notebook, text):
        """A line that a notebook printed, with the time to go behind a stage that is done."""
        done = DONE.match(text)
        if not done:
            return text
        self._done(notebook, done["stage"], float(done["seconds"]))
        return text + (f"  · {self}" if self._total else "")

    def _done(self, notebook, stage, seconds):
        with self._lock:
            self.made.append((notebook, stage, seconds))
            expected = self._left[stage]
            if expected:  # of this notebook, or else of one that would have made it
                _, before = expected.pop(next((i for i, (by, _) in enumerate(expected) if by == notebook), 0))
                self._took, self._before = self._took + seconds, self._before + before

    def finished(self, notebook, seconds):
        """A notebook is done: what it was expected to make besides is there already, or made by others."""
        own = seconds - sum(of_stage for by, _, of_stage in self.made if by == notebook)
        self._done(notebook, OWN, max(own, 0.0))
        with self._lock:
            for stage, expected in self._left.items():
                self._left[stage] = [(by, before) for by, before in expected if by != notebook]

    @property
    def stages(self):
        """How many were made."""
        return sum(stage != OWN for _, stage, _ in self.made)

    def __str__(self):
        left = [seconds for stage, expected in self._left.items() for _, seconds in expected]
        stages = sum(len(expected) for stage, expected in self._left.items() if stage != OWN)
        pace = self._took / self._before if self._before else 1.0
        return f"{self._total - stages} of {self._total} stages, about {clock(pace * sum(left) / self._at_once)} to go"

    def keep(self, name):
        """Write what this run made to `build/<profile>/stages.csv`, unless an earlier run did, which made more."""
        path = build_dir(name) / "stages.csv"
        rows = sorted(self.made, key=lambda row: (row[0], -row[2], row[1]))
        lines = ["notebook,stage,seconds", *(f"{by},{stage},{seconds:.1f}" for by, stage, seconds in rows)]
        if not path.is_file():
            write_atomic(path, "\n".join(lines) + "\n")


def committed(name):
    """The file that tells what each stage of a profile took once."""
    return ROOT / "figures" / "bench" / f"stages_{name}.csv"


def clock(seconds):
    """75 as "1:15"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


class Clock:
    """`str` of it is the time since it was made, "1:15"."""

    def __init__(self):
        self.start = time.perf_counter()

    @property
    def seconds(self):
        return time.perf_counter() - self.start

    def __str__(self):
        return clock(self.seconds)

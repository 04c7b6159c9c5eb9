"""How `make test` keeps two workers busy: `pytest -p tests.warm_notebooks`.

The notebooks that nbval checks are forked from a process that has imported everything, and the longest files begin.
pytest itself takes overlapping arguments, a file and its folder, in the order of the folder.
"""

import multiprocessing
from multiprocessing import forkserver

import pytest

from deftlib import kernels
from deftlib.workers import environment

LONGEST = [
    "test_rehearsal",
    "test_two_processes",
    "test_launch",
    "test_golden_logs",
    "test_kills",
    "test_plan",
    "test_jobs",
]


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_sessionstart(session):
    """Starts that process; the kernels of `deft run --at-once` have the same surroundings."""
    if getattr(session.config.option, "numprocesses", None) and not hasattr(session.config, "workerinput"):
        return  # this one only deals the tests to its workers
    multiprocessing.get_context("forkserver").set_forkserver_preload(kernels.IMPORTED)
    with environment(kernels.SETTINGS):
        forkserver.ensure_running()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """A notebook's kernel starts as its first cell is set up."""
    if item.path.suffix != ".ipynb":
        return (yield)
    with environment(kernels.SETTINGS):
        return (yield)

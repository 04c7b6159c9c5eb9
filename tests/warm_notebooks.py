"""The notebooks that nbval checks are forked from a process that has imported everything: `-p tests.warm_notebooks`."""

import multiprocessing
from multiprocessing import forkserver

import pytest

from deftlib import kernels
from deftlib.workers import environment


def pytest_sessionstart(session):
    """Starts that process; the kernels of `deft run --at-once` have the same surroundings."""
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

"""Processes of notebooks that start at once: forked from one that has imported what the notebooks import.

    with warm():
        papermill.execute_notebook(...)      # in any thread; each notebook has a process of its own, as ever

Imports take a notebook seconds, and eight notebooks a minute. The process that is forked computes nothing.
"""

import atexit
import gc
import multiprocessing
import os
import signal
from contextlib import contextmanager

from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from deftlib.workers import environment

SETTINGS = {
    "JUPYTER_DEFAULT_PROVISIONER_NAME": "deft-warm",  # the entry point by which jupyter_client finds `Warm`
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # read as matplotlib is imported; a kernel is too late
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whether there is a GPU is asked without opening it: forks could not use it
}
IMPORTED = [  # not matplotlib.pyplot, which asks at its import where to draw
    "ipykernel.kernelapp",
    "matplotlib.figure",
    "deftlib.studies.comparison",
    "deftlib.studies.filtering",
    "deftlib.evaluation.mt_bench",
    "deftlib.evaluation.human_eval",
]


@contextmanager
def warm():
    """Notebooks that are started inside are forked; what is left of them at the end is killed."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(IMPORTED)
    with environment(SETTINGS):
        try:
            yield
        finally:
            kill_all()


def kill_all():
    """Ends every notebook's process that was forked here."""
    for process in multiprocessing.active_children():
        process.kill()


class Warm(LocalProvisioner):
    """Starts a kernel by a fork of the process that has imported everything."""

    async def launch_kernel(self, cmd, **kwargs):
        self.process = _Forked(cmd[cmd.index("-f") :], kwargs["env"], kwargs.get("cwd") or os.getcwd())
        self.pid, self.pgid, self.cwd = self.process.pid, None, kwargs.get("cwd")
        return self.connection_info


class _Forked:
    """A kernel's process, as `subprocess.Popen` would show it."""

    stdin = stdout = stderr = None

    def __init__(self, arguments, env, cwd):
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_kernel, args=(arguments, dict(env), str(cwd)), name="deft kernel")
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self):
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number):
        # Before a kernel is asked to end it is interrupted, and says so if it still closes its last cell.
        if number != signal.SIGINT and self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self):
        self._process.kill()

    def terminate(self):
        self._process.terminate()


def _kernel(arguments, env, cwd):
    """The life of a kernel. It ends with the process it was forked from, and that one with the process that asked."""
    import pandas as pd
    from ipykernel.kernelapp import IPKernelApp

    pd.set_option("display.max_columns", 20)  # as it chooses where it is imported in a notebook
    gc.freeze()  # what was imported is no garbage: a collection that looks at it takes a quarter of a second
    os.setsid()  # Ctrl-C is for who started the notebooks
    os.environ.update(env)
    os.chdir(cwd)
    IPKernelApp.launch_instance([*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])
    atexit._run_exitfuncs()  # a forked process ends without: temporary folders would stay

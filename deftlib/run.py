"""Execute notebooks headless and publish the executed copies: `deft run notebooks/01_grading.ipynb`.

A copy appears in `build/<profile>/notebooks/` (after overrides in a folder of its own there) only when every cell has
run; a failed run leaves `*.failed.ipynb` beside it, and exit code 1. What a cell prints is shown as it runs, behind the
notebook's number. Several notebooks run `--at-once N`: what two need, one makes while the other waits.
"""

import argparse
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import chdir, nullcontext
from pathlib import Path

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from deftlib import kernels
from deftlib.command import one_sentence
from deftlib.profile import Profile, ProfileError, add_options
from deftlib.progress import Clock, Progress
from deftlib.store import ROOT, alone, build_dir, explained


class NotebookError(RuntimeError):
    """A cell failed, or the process of its notebook died."""


def execute(notebook, profile):
    """Path of the executed copy. Raises PapermillExecutionError if a cell fails."""
    notebook = Path(notebook).resolve()
    variant = profile.label if profile.label != profile.name else ""  # make looks at the plain copies
    target = build_dir(profile.name) / "notebooks" / variant / notebook.name
    running = target.with_suffix(".running.ipynb")
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with alone(target, f"another process runs {notebook.name}: waiting"):
        try:
            _started(
                papermill.execute_notebook,
                notebook,
                running,
                parameters={"profile": profile.name, "overrides": profile.changes},
                kernel_name="python3",
                cwd=str(ROOT / "notebooks"),  # as nbval and JupyterLab do
                progress_bar=False,
                log_output=True,
                extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it would warn that it talks over loopback TCP
            )
        except PapermillExecutionError:
            os.replace(running, target.with_suffix(".failed.ipynb"))
            raise
        os.replace(running, target)
        target.with_suffix(".failed.ipynb").unlink(missing_ok=True)
    return target


def _started(execute, *notebook, **options):
    """`execute(...)`, again where the kernel died before any cell ran: a port it was told had been taken meanwhile."""
    for left in (2, 1, 0):
        try:
            return execute(*notebook, **options)
        except RuntimeError as error:
            if not left or "Kernel died before replying" not in str(error):
                raise
            print("  the notebook's process did not start: once more", flush=True)


def execute_all(notebooks, profile, at_once=1):
    """Run several notebooks, `at_once` at a time, in the order given. Returns the `Progress` that was made.

    Raises NotebookError by the first that fails, when those that were running are done; no other is started then.
    """
    progress = Progress.of(profile.label, min(at_once, len(notebooks)), list(map(_number, notebooks)))
    shown = _show_cell_output(progress)
    if len(notebooks) == 1:  # it gains nothing from a process that has imported everything
        _run(notebooks[0], profile, progress, shown)
        return progress
    failed = threading.Event()

    def run(notebook):
        if failed.is_set():
            return
        try:
            _run(notebook, profile, progress, shown)
        except BaseException:
            failed.set()
            raise

    notebooks = [notebook.resolve() for notebook in notebooks]
    started = kernels.warm() if at_once > 1 else nullcontext()  # one after another they are long, and may want a GPU
    # papermill changes the folder of this whole process, whose threads are to find each other where they want to be.
    with started, chdir(ROOT / "notebooks"), ThreadPoolExecutor(at_once) as pool:
        of_each = [pool.submit(run, notebook) for notebook in notebooks]
        try:
            for done in as_completed(of_each):
                done.result()
        except KeyboardInterrupt:
            failed.set()
            kernels.kill_all()  # else their threads would wait for them
            raise
    return progress


def _run(notebook, profile, progress, shown):
    _of_thread.number, clock = _number(notebook), Clock()
    try:
        target = execute(notebook, profile)
    except PapermillExecutionError as error:
        raise NotebookError(
            f"{error.ename}: {error.evalue} (cell {error.exec_count} of {notebook.stem}.failed.ipynb)"
        ) from error
    except DeadKernelError as error:
        raise NotebookError(
            f"the process of {notebook.name} died, perhaps for want of memory; results so far stand"
        ) from error
    finally:
        shown.end(_of_thread.number)
    progress.finished(_of_thread.number, clock.seconds)
    print(f"{os.path.relpath(target, ROOT)} in {clock.seconds:.0f} s", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Execute notebooks headless with a profile.")
    parser.add_argument("notebooks", type=Path, nargs="+", metavar="notebook")
    parser.add_argument("--at-once", type=int, default=1, help="how many notebooks at a time (1)")
    add_options(parser)
    args, clock = parser.parse_args(arguments), Clock()
    with one_sentence():
        for notebook in args.notebooks:
            if not notebook.is_file():
                raise ProfileError(f"no notebook {notebook}")
        profile = Profile.from_options(args)
        notebooks = list(dict.fromkeys(args.notebooks))  # two `make` at once may name one twice
        progress = execute_all(notebooks, profile, args.at_once)
        if len(notebooks) > 1:
            _tell(profile, progress, clock)


def _tell(profile, progress, clock):
    """What several notebooks made, where to look, what was found, how long it took."""
    from deftlib.reporting.summary import summary  # it imports much

    progress.keep(profile.name)
    print(f"\n{summary(profile)}\ntook   {clock}, {progress.stages} stages", flush=True)


# ---- what cells print --------------------------------------------------------------------------------------------


class _OfThread(threading.local):
    number = ""  # of the notebook that this thread runs


_of_thread = _OfThread()


def _number(notebook):
    """ "03" of 03_training.ipynb."""
    return notebook.stem.partition("_")[0]


def _show_cell_output(progress):
    """papermill logs what cells print; its own lines about each cell are left out. Returns who shows it."""
    handler = _Lines(progress)
    handler.addFilter(lambda record: record.funcName == "log_output_message")
    logger = logging.getLogger("papermill")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    return handler


class _Lines(logging.Handler):
    """Prints whole lines behind the number of the notebook whose thread logs them."""

    def __init__(self, progress):
        super().__init__()
        self.progress, self.rest = progress, {}

    def emit(self, record):
        number = _of_thread.number
        *lines, self.rest[number] = (self.rest.get(number, "") + record.getMessage()).split("\n")
        said = (f"{number}  {self.progress.line(number, line)}\n" for line in lines)
        print(*said, sep="", end="", flush=True)

    def end(self, number):
        """Show a last line that has no end."""
        if rest := self.rest.pop(number, ""):
            print(f"{number}  {rest}", flush=True)


if __name__ == "__main__":
    main()

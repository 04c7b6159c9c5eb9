"""Execute one notebook headless and publish the executed copy: `deft run notebooks/01_grading.ipynb`.

The copy appears in `build/<profile>/notebooks/` (after overrides in a folder of its own there) only when every cell has
run; a failed run leaves `*.failed.ipynb` beside it, and exit code 1. What a cell prints is shown as it runs, behind the
notebook's number.
"""

import argparse
import logging
import os
import time
from pathlib import Path

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from deftlib.command import one_sentence
from deftlib.profile import Profile, ProfileError, add_options
from deftlib.store import ROOT, alone, build_dir, explained


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


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Execute a notebook headless with a profile.")
    parser.add_argument("notebook", type=Path)
    add_options(parser)
    args = parser.parse_args(arguments)
    _show_cell_output(args.notebook.stem.partition("_")[0])
    start = time.perf_counter()
    try:
        with one_sentence():
            if not args.notebook.is_file():
                raise ProfileError(f"no notebook {args.notebook}")
            target = execute(args.notebook, Profile.from_options(args))
    except PapermillExecutionError as error:
        raise SystemExit(
            f"error: {error.ename}: {error.evalue}\n(cell {error.exec_count} of *.failed.ipynb)"
        ) from error
    except DeadKernelError as error:
        raise SystemExit(
            "error: the notebook's process died, perhaps for want of memory; results so far stand"
        ) from error
    print(f"{target.relative_to(ROOT)} in {time.perf_counter() - start:.0f} s", flush=True)


def _show_cell_output(label):
    """papermill logs what cells print; its own lines about each cell are left out."""
    handler = _Lines(label)
    handler.addFilter(lambda record: record.funcName == "log_output_message")
    logger = logging.getLogger("papermill")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


class _Lines(logging.Handler):
    """Prints whole lines behind a label: two notebooks may run at a time."""

    def __init__(self, label):
        super().__init__()
        self.label, self.rest = label, ""

    def emit(self, record):
        *lines, self.rest = (self.rest + record.getMessage()).split("\n")
        print(*(f"{self.label}  {line}\n" for line in lines), sep="", end="", flush=True)

    def close(self):  # `logging` calls it at the end of the program
        if self.rest:
            print(f"{self.label}  {self.rest}", flush=True)
        super().close()


if __name__ == "__main__":
    main()

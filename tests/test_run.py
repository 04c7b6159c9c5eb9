"""A notebook is published when every cell has run; a failure leaves the earlier copy, one line and exit code 1."""

import multiprocessing
import os
import signal
import subprocess
import sys

import nbformat
import pytest
from papermill.exceptions import PapermillExecutionError

from deftlib import run, store
from deftlib.profile import Profile


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Writes a notebook with the two parameters and one more cell; results go below tmp_path."""
    monkeypatch.setattr(run, "build_dir", lambda name: tmp_path / "build" / name)

    def write(source):
        cells = [nbformat.v4.new_code_cell('profile = "mini"\noverrides = {}', metadata={"tags": ["parameters"]})]
        path = tmp_path / "demo.ipynb"
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        cells.append(nbformat.v4.new_code_cell(source))
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
        return path

    return write


def test_a_notebook_gets_its_profile_and_is_published_with_outputs(notebook, tmp_path):
    target = run.execute(notebook("print(profile, overrides)"), Profile.load("smol"))
    assert target == tmp_path / "build/smol/notebooks/demo.ipynb"
    assert "smol {}" in target.read_text()


def test_each_setting_has_executed_copies_of_its_own(notebook, tmp_path):
    one, other = (Profile.load("smol", {"grading.top": top}) for top in (10, 12.5))
    targets = [run.execute(notebook("print(profile, overrides)"), profile) for profile in (one, other)]
    assert [path.parent.name for path in targets] == [one.label, other.label]
    assert "smol {'grading.top': 10.0}" in targets[0].read_text()
    assert "smol {'grading.top': 12.5}" in targets[1].read_text()


def test_a_failing_cell_keeps_the_earlier_copy_and_leaves_the_failed_one_beside_it(notebook, tmp_path):
    target = run.execute(notebook("print('first')"), Profile.load("mini"))
    with pytest.raises(PapermillExecutionError):
        run.execute(notebook("raise ValueError('no such file: x.gz')"), Profile.load("mini"))
    assert "first" in target.read_text()
    assert "no such file" in target.with_suffix(".failed.ipynb").read_text()
    assert not list(target.parent.glob("*.running.ipynb"))


def test_an_unknown_profile_key_is_refused_before_anything_runs(notebook, tmp_path):
    with pytest.raises(SystemExit, match=r"grading\.topp.*did you mean 'top'"):
        run.main([str(notebook("print(1)")), "--set", "grading.topp=1"])
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["notebooks/00_walkthrough.ipynb", "--profile", "minni"], "did you mean 'mini'?"),
        (["notebooks/00_walkthrough.ipynb", "--set", "grading.topp=3"], "did you mean 'top'?"),
        (["notebooks/00_walkthrough.ipynb", "--set", "grading.top"], "an override is KEY=VALUE"),
        (["notebooks/09_nothing.ipynb"], "no notebook"),
    ],
)
def test_a_mistyped_command_gets_one_sentence_and_exit_code_1(arguments, sentence):
    done = subprocess.run(
        [sys.executable, "-m", "deftlib", "run", *arguments], capture_output=True, text=True, cwd=store.ROOT
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and sentence in done.stderr and "Traceback" not in done.stderr


def test_what_cells_print_comes_in_whole_lines_behind_the_number_of_the_notebook(notebook, capsys):
    path = notebook("print('a', end=''); print('b'); print('c\\nd')")
    run.execute_all([path.rename(path.with_name("07_demo.ipynb"))], Profile.load("mini"))
    assert capsys.readouterr().out.splitlines()[-4:-1] == ["07  ab", "07  c", "07  d"]


def test_two_that_run_the_same_notebook_do_so_one_after_the_other(notebook, tmp_path, capfd):
    path, profile = notebook("import time; time.sleep(1); print('whole')"), Profile.load("mini")
    both = [multiprocessing.get_context("fork").Process(target=run.execute, args=(path, profile)) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert [each.exitcode for each in both] == [0, 0]
    assert "another process runs demo.ipynb: waiting" in capfd.readouterr().out
    assert "whole" in (tmp_path / "build/mini/notebooks/demo.ipynb").read_text()


@pytest.mark.parametrize(("deaths", "gets_through"), [(1, True), (2, True), (3, False)])
def test_a_kernel_whose_port_was_taken_is_started_again(deaths, gets_through, capsys):
    started = []

    def execute(notebook, **options):
        started.append(notebook)
        if len(started) <= deaths:
            raise RuntimeError("Kernel died before replying to kernel_info")

    if gets_through:
        run._started(execute, "demo.ipynb")
    else:
        with pytest.raises(RuntimeError, match="Kernel died"):
            run._started(execute, "demo.ipynb")
    assert len(started) == min(deaths + 1, 3)
    assert capsys.readouterr().out.count("did not start: once more") == len(started) - 1


def test_any_other_error_of_a_notebook_is_told_at_once():
    started = []

    def execute(notebook):
        started.append(notebook)
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        run._started(execute, "demo.ipynb")
    assert len(started) == 1


# ---- several -------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(notebook, tmp_path):
    """Writes notebooks 01, 02, … with a cell each."""

    def write(*sources):
        return [notebook(source).rename(tmp_path / f"{i:02d}_demo.ipynb") for i, source in enumerate(sources, 1)]

    return write


@pytest.fixture
def command(tmp_path):
    """`deft run` of some notebooks, two at a time, in a project folder of its own."""
    root = tmp_path / "project"
    root.mkdir()
    for name in ("data", "notebooks"):
        (root / name).symlink_to(store.ROOT / name)

    def start(paths, **environment):
        return subprocess.Popen(
            [sys.executable, "-m", "deftlib", "run", *map(str, paths), "--at-once", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"DEFT_ROOT": str(root)} | environment,
        )

    return start


WHO = "import os, sys\nprint(os.getppid(), 'deftlib.training.train' in sys.modules, os.environ['SAID'], os.getcwd())"
FIGURE = "import pandas, matplotlib.pyplot as plt\nplt.plot([1])\nprint(pandas.get_option('display.max_columns'))"


def test_several_notebooks_run_in_processes_of_their_own_forked_from_one(several, command, tmp_path):
    out, error = command(several(WHO, WHO, FIGURE), SAID="yes").communicate(timeout=120)
    assert error == ""
    said = {line.split("  ")[0]: line.split("  ")[1].split() for line in out.splitlines() if "  " in line}
    assert said["01"] == said["02"]
    assert said["01"][1:] == ["True", "yes", str(store.ROOT / "notebooks")]
    assert "03  20" in out.splitlines(), "tables are cut where a notebook's are"
    drawn = (tmp_path / "project/build/mini/notebooks/03_demo.ipynb").read_text()
    assert "image/png" in drawn, "figures are drawn inline"
    assert "took   0:" in out


def test_after_a_failure_no_other_notebook_is_started_and_those_that_ran_end(several, tmp_path):
    failed = tmp_path / "build/mini/notebooks/01_demo.failed.ipynb"
    until_it_failed = f"import os, time\nwhile not os.path.exists({str(failed)!r}):\n    time.sleep(0.1)\ntime.sleep(1)"
    with pytest.raises(run.NotebookError, match=r"^ValueError: seven \(cell 3 of 01_demo\.failed\.ipynb\)$"):
        run.execute_all(several("raise ValueError('seven')", until_it_failed, "print(1)"), Profile.load("mini"), 2)
    made = {path.name for path in (tmp_path / "build/mini/notebooks").glob("*.ipynb")}
    assert made == {"01_demo.failed.ipynb", "02_demo.ipynb"}


def test_a_dead_process_is_said_with_its_notebook(several):
    with pytest.raises(run.NotebookError, match=r"the process of 02_demo\.ipynb died"):
        run.execute_all(several("print(1)", "import os\nos.kill(os.getpid(), 9)"), Profile.load("mini"), 2)


def test_ctrl_c_ends_every_notebook_in_one_sentence(several, command):
    paths = several(*2 * ["print('sleeps', flush=True)\nimport time\ntime.sleep(60)"])
    process = command(paths)
    for line in process.stdout:
        if "sleeps" in line:
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said.startswith("interrupted: ") and said.count("\n") == 1

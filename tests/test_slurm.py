"""The sbatch files: shells read them, and every command and option in them exists."""

import argparse
import os
import re
import subprocess
from pathlib import Path

import pytest

from deftlib.__main__ import COMMANDS
from deftlib.profile import Profile, add_options
from deftlib.training import launch

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "notebooks/profiles/launch").glob("*.sbatch"))
SBATCH = {  # its long options that are used here: the manual of Slurm's sbatch
    *("array", "cpus-per-task", "gpus-per-node", "job-name", "mem", "nodes"),
    *("ntasks-per-node", "output", "requeue", "time"),
}


def asked_for(path, tmp_path, **environment):
    """The commands that a script runs, [[word, ...], ...]: deft and make are stand-ins that note what they are told."""
    for name in ("deft", "make"):
        stand_in = tmp_path / ".venv/bin" / name
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(f'#!/bin/bash\nprintf "%s\\n" {name} "$@" --- >> "{tmp_path}/asked"\n')
        stand_in.chmod(0o755)
    places = {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": f"{tmp_path}/.venv/bin:{os.environ['PATH']}"}
    (tmp_path / "asked").unlink(missing_ok=True)
    subprocess.run(["bash", path], env=os.environ | places | environment, check=True)
    return [part.split("\n") for part in (tmp_path / "asked").read_text().removesuffix("\n---\n").split("\n---\n")]


def profile_of(command):
    """The profile that a `deft` command is for."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return Profile.from_options(parser.parse_known_args(command[2:])[0])


def test_there_is_one_for_one_node_for_two_and_for_an_array():
    assert [path.stem for path in FILES] == ["array", "one_node", "two_nodes"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_bash_reads_it_and_slurm_knows_its_options(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    options = re.findall(r"^#SBATCH --([\w-]+)", text, re.M)
    assert len(options) == text.count("#SBATCH") and set(options) <= SBATCH
    assert text.startswith("#!/bin/bash\n") and "set -euo pipefail" in text
    named = re.findall(r"notebooks/profiles/launch/[\w.]+", text)
    assert named and all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_command_and_option_in_it_exists(path, tmp_path, help_of):
    for command in asked_for(path, tmp_path, SLURM_ARRAY_TASK_ID="39"):
        if command[0] == "make":
            makefile = (ROOT / "Makefile").read_text()
            assert f"\n{command[1]}:" in makefile and command[2] == "PROFILE=paper"
            continue
        assert command[1] in COMMANDS
        told = help_of(command[1])
        assert all(word in told for word in command if word.startswith("--"))
        assert all((ROOT / word).is_file() for word in command if word.endswith(".ipynb"))
        launch.share(profile_of(command))  # settings that exist, lists that can be dealt


def test_two_nodes_run_the_notebooks_that_make_runs_on_the_gpus_they_ask_for(tmp_path):
    (path,) = (path for path in FILES if path.stem == "two_nodes")
    _, *runs = asked_for(path, tmp_path)
    (names,) = re.findall(r"^NAMES := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert [Path(command[2]).stem for command in runs] == names.split()
    settings = profile_of(runs[0]).launch
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", path.read_text(), re.M))
    assert settings.nodes == int(asked["nodes"]) == 2
    assert settings.processes == settings.nodes * int(asked["gpus-per-node"])


def test_the_array_is_every_method_and_seed_of_notebook_03_once(tmp_path):
    (path,) = (path for path in FILES if path.stem == "array")
    profile, found = Profile.load("gpu"), []
    for task in range(40):
        ((_, _, *options),) = asked_for(path, tmp_path, SLURM_ARRAY_TASK_ID=str(task))
        given = dict(zip(options[::2], options[1::2]))
        found.append((given["--method"], int(given["--seed"])))
    assert found == [(method, seed) for method in profile.training.methods for seed in profile.seeds]
    assert [method for method, _ in found[:5]] == ["sft"] * 5  # the tasks that others start from come first

"""The files around the code agree with it: dependencies, Makefile, README, CI, notebooks."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml

from deftlib import provenance

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement):
    return re.split(r"[<>=\[ ]", requirement)[0].lower().replace("_", "-")


def test_environment_yml_lists_no_dependency_of_its_own_but_installs_the_package():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in dependencies if isinstance(entry, dict))
    conda = {name_of(entry) for entry in dependencies if isinstance(entry, str)}
    assert pip == ["-c constraints.txt", "-e .[all]"]
    assert conda == {"python", "pip", "make", "git"}


def test_conda_python_is_one_that_the_package_accepts():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (python,) = (entry for entry in dependencies if str(entry).startswith("python="))
    assert python == "python=3.13"
    assert PROJECT["requires-python"] == ">=3.11"


def test_every_dependency_has_one_exact_pin_and_no_local_version():
    pins = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    names = [name_of(pin) for pin in pins]
    assert len(names) == len(set(names))
    wanted = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    outside = {"deftlib", "vllm"}  # vLLM asks for releases of torch and transformers other than the pinned ones
    assert {name_of(requirement) for requirement in wanted} - outside <= set(names)


def test_all_are_all_extras():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    inside = {extra for lines in extras.values() for line in lines for extra in re.findall(r"\w+(?=[,\]])", line)}
    apart = {"all", "memory", "vllm"}  # torchao writes to the stderr of notebooks that do not use it
    assert name_of(everything) == "deftlib" and inside == extras.keys() - apart


def test_every_dependency_says_why_it_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]:
        lines = [line for line in text.splitlines() if f'"{requirement}"' in line]
        assert all("#" in line for line in lines) or "deftlib[" in requirement, f"{requirement} has no reason"


def code_of(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def shown_by_make(*arguments):
    """What make prints; options of a `make test` around these tests do not reach it."""
    own = {"MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "JOBS", "PROFILE"}
    outside = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=outside, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_make_knows_every_room_that_a_notebook_runs(notebook):
    modules = [name for name in provenance.imports(code_of(notebook)) if name.startswith("deftlib.")]
    code = {each for name in modules for each in provenance.code_of(name.removeprefix("deftlib."))}
    printed = shown_by_make("-n", "-p", "paper")  # make's own database of rules
    (rule,) = re.findall(rf"^build/mini/notebooks/{notebook.stem}\.ipynb: (.*)$", printed, re.M)
    listed = {Path(path).parent.name for path in rule.split() if path.startswith("deftlib/")} - {"deftlib"}
    assert listed == {name.split(".")[1] for name in code if name.count(".") == 2}


def test_a_notebook_is_run_again_when_packages_change_or_what_it_uses_was_touched():
    printed = shown_by_make("-n", "-p", "paper")
    (rule,) = re.findall(r"^build/mini/notebooks/00_walkthrough\.ipynb: (.*)$", printed, re.M)
    needed = rule.partition(" | ")[0].split()
    assert {"deftlib/method/losses.py", "deftlib/store.py", "data/mini/world.yaml", ".venv/.ready"} <= set(needed)
    assert not any(path.startswith("deftlib/training/") for path in needed)


@pytest.mark.parametrize(
    ("arguments", "together"),
    [("paper", True), ("clean paper", True), ("paper JOBS=1", False), ("paper PROFILE=smol", False)],
)
def test_notebooks_of_the_smallest_models_alone_share_the_machine(arguments, together):
    printed = shown_by_make("-n", "-B", *arguments.split()).replace("\\\n", " ")
    (command,) = (line for line in printed.splitlines() if "deft run" in line)
    assert ("OMP_NUM_THREADS=1 .venv/bin/deft run" in command) == together
    assert f"--at-once {2 if together else 1}" in command
    assert printed.count(">> build/") == 8, "each is noted, and all that were run in one command"


@pytest.mark.parametrize(("profile", "is_planned"), [("mini", False), ("smol", False), ("gpu", True), ("paper", True)])
def test_profiles_that_take_hours_and_money_say_first_what_they_will_do(profile, is_planned):
    lines = shown_by_make("-n", "-B", "paper", f"PROFILE={profile}").splitlines()
    commands = [line for line in lines if "deft plan" in line or "deft run" in line]
    assert (f"deft plan --profile {profile}" in commands[0]) == is_planned
    assert sum("deft plan" in line for line in commands) == is_planned and len(commands) == 1 + is_planned


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_house_rules(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code[0]["metadata"]["tags"] == ["parameters"]
    assert "".join(code[0]["source"]).split("\n") == ['profile = "mini"', "overrides = {}"]
    assert "Profile.load(profile, overrides)" in "".join(code[1]["source"])
    for cell in code:
        assert cell["execution_count"] is not None, "nbval would not compare this cell"
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
        assert len(cell["source"]) <= 15
        assert all(len(line.rstrip("\n")) <= 79 for line in cell["source"])
        for output in cell["outputs"]:
            assert len(json.dumps(output.get("data", {}).get("image/png", ""))) < 400_000  # base64 of 300 kB
    text = "".join(chain(*(cell["source"] for cell in cells if cell["cell_type"] == "markdown")))
    assert "What we saw" in text and "Exercise" in text
    assert str(ROOT) not in notebook.read_text()


def test_a_notebook_does_not_write_into_tracked_folders_of_another_profile():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {"figures/mini/", "build/", "data/downloads/"} <= set(ignored)


def test_ci_takes_its_two_commands_from_the_readme():
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks[0].split("\n") == ["make paper", "make test", ""]
    assert "README.md" in (ROOT / ".ci/run").read_text()


def test_the_page_of_promises_names_tests_that_exist():
    text = (ROOT / "notebooks/promises.md").read_text()
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", text)
    assert len(named) > 10
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"
    for path in re.findall(r"\]\(\.\./(tests/[^)]+)\)", text):
        assert (ROOT / path).is_file()


def test_two_makes_at_once_set_up_one_environment(tmp_path):
    """With a Python that only notes what it was asked to install."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
case "$2" in
  venv) mkdir -p venv/bin; cp "$0" venv/bin/python;;
  pip) echo installed >> installed; sleep 1;;
  *) exec {sys.executable} "$@";;
esac
""")
    python.chmod(0o755)
    command = ["make", f"PYTHON={python}", "VENV=venv", "venv/.ready"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [each.communicate()[0] for each in both]
    assert [each.returncode for each in both] == [0, 0]
    # Twice by pip in one of them, as this Python brings no uv.
    assert (tmp_path / "installed").read_text() == "installed\ninstalled\n" and (tmp_path / "venv/.ready").exists()
    assert sorted("setting up venv" in text for text in said) == [False, True]

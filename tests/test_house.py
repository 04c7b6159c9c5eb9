"""The house: rooms in one order, arrows that point down only, each room's packages, the method by itself."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import deftlib
from deftlib import provenance
from deftlib.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["studies", "evaluation", "training", "models", "reporting", "preferences", "method"]
BRINGS = {"notebooks": ["evaluation", "reporting"]}  # extras within extras
DISTRIBUTIONS = {"yaml": "pyyaml"}  # where the name to import is another
BROUGHT = {  # by a package that is declared: of one family with it, in step by their own requirements
    "safetensors": "transformers",
    "nbformat": "nbconvert",
    "pygments": "nbconvert",
    "traitlets": "nbconvert",
    "nbclient": "papermill",
}
EXTRA_OF_ROOM = {"evaluation": ["evaluation"], "studies": ["evaluation", "reporting"], "reporting": ["reporting"]}
# Imported with a sentence where it is missing.
LAZY = {"openai": "endpoint", "peft": "lora", "vllm": "vllm", "datatrove": "datatrove"}


def listed(module):
    """The names in the list that a docstring of the house holds, from the top down."""
    return re.findall(r"^    (\w+)  +\S", ast.get_docstring(ast.parse(deftlib.SOURCES[module]), clean=False), re.M)


def house():
    """Every module from the top of the house to the ground, by dotted name."""
    order = []
    for name in listed("deftlib"):
        inside = [f"deftlib.{name}.{each}" for each in listed(f"deftlib.{name}")] if name in ROOMS else []
        order += [f"deftlib.{name}", *inside]
    return order


def modules(room):
    return [name for name in deftlib.SOURCES if name.startswith(f"deftlib.{room}.")]


def test_the_lists_name_every_room_and_every_module_once():
    order = house()
    assert len(order) == len(set(order))
    assert set(order) | {"deftlib"} == set(deftlib.SOURCES)
    assert [name for name in listed("deftlib") if name in ROOMS] == ROOMS


@pytest.mark.parametrize("module", [name for name in deftlib.SOURCES if name != "deftlib"])
def test_imports_point_down_the_list(module):
    source, order = deftlib.SOURCES[module], house()
    assert not re.search(r"^\s*from \.", source, re.M), "relative imports are not seen"
    ours = [name for name in provenance.imports(source) if name.startswith("deftlib.")]
    up = [name for name in ours if order.index(name) <= order.index(module)]
    assert not up, f"{module} imports {up} from above"


def test_every_way_to_import_a_module_is_seen():
    source = (
        "import deftlib.store\nimport numpy as np\nfrom deftlib import run, ROOT\nfrom deftlib.models import rewards\n"
    )
    source += "from deftlib.method.losses import pro_loss\ndef f(): from deftlib.method import discrepancy\n"
    ours = {"deftlib", "deftlib.store", "deftlib.run", "deftlib.models.rewards"}
    assert provenance.imports(source) == ours | {"deftlib.method.losses", "deftlib.method", "numpy"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_opens_with_what_it_is_for_and_where_to_start(room):
    text = ast.get_docstring(ast.parse(deftlib.SOURCES[f"deftlib.{room}"]))
    assert "Start with `" in text and len(text.splitlines()) <= 17  # thirteen files at most
    is_empty = len(ast.parse(deftlib.SOURCES[f"deftlib.{room}"]).body) == 1
    assert is_empty or room == "method", "no re-exports: only what outsiders use"


def test_outsiders_find_the_method_at_its_door():
    from deftlib.method import DistributionGuided, count_tokens, discrepancy, folded_reward, reward_direction

    assert all(map(callable, (DistributionGuided, count_tokens, discrepancy, folded_reward, reward_direction)))


def test_tests_mirror_the_rooms():
    for folder in (ROOT / "tests").iterdir():
        assert not folder.is_dir() or folder.name in [*ROOMS, "fixtures", "__pycache__"]
    for room in ROOMS:
        assert list((ROOT / "tests" / room).glob("test_*.py")), f"no tests of {room}"


# ---- packages ------------------------------------------------------------------------------------------------------


def packages(module):
    """Third-party packages that a module imports."""
    names = provenance.imports(deftlib.SOURCES[module])
    return {name for name in names if name.partition(".")[0] not in {*sys.stdlib_module_names, "deftlib"}}


def required(extra=None):
    """What the plain install brings, or an extra beside it: names of distributions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {re.split(r"[<>=\[ ]", line)[0] for line in lines}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_install_brings(room):
    brought = required().union(*(required(extra) for extra in EXTRA_OF_ROOM.get(room, [])))
    for module in modules(room):
        for name in packages(module) - LAZY.keys():
            found = DISTRIBUTIONS.get(name, BROUGHT.get(name, name))
            assert found in brought, f"{module} imports {name}, which pyproject.toml does not give to {room}"


def test_the_plain_install_brings_nothing_that_no_room_needs():
    used = {DISTRIBUTIONS.get(name, name) for module in deftlib.SOURCES for name in packages(module)}
    assert required() == required() & used


WITHOUT_OTHERS = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Refuse())
import numpy as np, torch
from deftlib.method import DistributionGuided, count_tokens, discrepancy, folded_reward, reward_direction
from deftlib.method import grading, heads, losses
q_diff = discrepancy(*count_tokens([[[0, 1], [2]]], [[1, -1]], 3))
direction = reward_direction(torch.eye(3, dtype=torch.float64), q_diff)
print(folded_reward(torch.ones(1, 2, 3, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int64), direction).item())
"""


def requirements_of(*names):
    """Those distributions and all that they need, in lower case with dashes."""
    found, rest = set(), set(names)
    while rest:
        found |= rest
        lines = [line for name in rest for line in importlib.metadata.requires(name) or [] if "extra ==" not in line]
        rest = {spelled(re.split(r"[<>=!~;\[ (]", line)[0]) for line in lines} - found
        rest = {name for name in rest if provenance.version(name)}
    return found


def spelled(name):
    return name.lower().replace("_", "-")


def test_the_method_needs_torch_and_numpy_and_nothing_else():
    allowed = requirements_of("torch", "numpy")
    owners = importlib.metadata.packages_distributions()
    blocked = {name for name, of in owners.items() if not set(map(spelled, of)) & {*allowed, "deftlib"}}
    assert {"transformers", "trl", "datasets", "pandas", "yaml"} <= blocked
    script = WITHOUT_OTHERS.format(blocked=blocked)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0)
    assert all(packages(module) <= {"torch", "numpy"} for module in modules("method"))


# ---- commands ------------------------------------------------------------------------------------------------------


def deft(*arguments):
    return subprocess.run([sys.executable, "-m", "deftlib", *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, help_of):
    assert help_of(command).startswith(f"usage: deft {command} ")


@pytest.mark.parametrize("command", ["run", "train", "check", "site"])
def test_a_command_runs_as_its_module_too(command):
    name = f"deftlib.{COMMANDS[command][0]}"
    shown = subprocess.run([sys.executable, "-m", name, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0 and "usage:" in shown.stdout


def test_without_a_command_all_are_shown_and_another_is_refused():
    shown, wrong = deft(), deft("trian")
    assert shown.returncode == 0 and all(f"  {command} " in shown.stdout for command in COMMANDS)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: no command 'trian'")


def test_a_command_whose_extra_is_missing_names_it(monkeypatch, capsys):
    from deftlib import __main__ as cli

    monkeypatch.setattr(sys, "argv", ["deft", "run", "notebooks/00_walkthrough.ipynb"])
    monkeypatch.setitem(sys.modules, "papermill", None)
    monkeypatch.delitem(sys.modules, "deftlib.run", raising=False)
    assert cli.main() == 2
    assert capsys.readouterr().err == "error: deft run needs papermill: pip install 'deftlib[notebooks]'\n"


# ---- results name their code ---------------------------------------------------------------------------------------


def test_every_stage_names_the_module_that_makes_it():
    found = 0
    for module, source in deftlib.SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("store.stage", "made_by") and node.args:
                if module in provenance.CARRIERS:
                    continue
                assert f"deftlib.{ast.literal_eval(node.args[-1])}" == module
                found += 1
    assert found >= 15

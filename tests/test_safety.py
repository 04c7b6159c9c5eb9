"""Nobody is let in: no code that comes with data or models is run, what is downloaded is what was published.

| kind | example | right value |
|---|---|---|
| calls that run what they read | pickle, `torch.load`, `eval`, a shell, remote code | none in the library |
| models of others | weights pickled in `pytorch_model.bin`, code beside them | one error, nothing ran |
| archives | a wheel with `../outside` in it | only what is inside, and only by its sha256 (`test_policies.py`) |
| telemetry | the hub's | off before any library is imported |
"""

import ast
import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
from transformers import AutoConfig

import deftlib
from deftlib.models import policies, wheels

RUNS_WHAT_IT_READS = {"eval", "exec", "compile", "__import__", "system", "popen"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}


def calls(tree):
    """(name, {keyword: constant}) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            yield ast.unparse(function), {k.arg: getattr(k.value, "value", None) for k in node.keywords}


@pytest.mark.parametrize("module", sorted(deftlib.SOURCES))
def test_no_module_runs_what_it_reads(module):
    tree = ast.parse(deftlib.SOURCES[module])
    imported = {
        name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    imported |= {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) if node.module
    }
    assert not imported & FORBIDDEN_MODULES
    for name, keywords in calls(tree):
        assert name not in RUNS_WHAT_IT_READS and not name.startswith("os.system"), name
        assert name not in ("torch.load", "yaml.load", "pd.read_pickle", "pickle.load"), name
        assert not keywords.get("trust_remote_code") and not keywords.get("allow_pickle"), name
        assert not keywords.get("shell"), name


def test_telemetry_is_off_before_any_library_is_imported():
    code = "import deftlib, os, sys; print(os.environ['HF_HUB_DISABLE_TELEMETRY'], 'huggingface_hub' in sys.modules)"
    code += "; print(os.environ['VLLM_NO_USAGE_STATS'], 'vllm' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VLLM_"))}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert said.stdout.split() == 2 * ["1", "False"]


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_run_nothing(tmp_path, make_model, tokenizer):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Bomb(ran)}))
    with pytest.raises(Exception) as refused:
        policies.load_policy(folder)
    assert not ran.exists() and refused.value is not None


def test_code_beside_a_model_runs_nothing(tmp_path, tokenizer):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    mapped = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": mapped}))
    (folder / "modeling.py").write_text(f"open({str(ran)!r}, 'w')")
    for load in (lambda: AutoConfig.from_pretrained(folder), lambda: policies.load_policy(folder)):
        with pytest.raises((ValueError, OSError, policies.ModelError)):
            load()
    assert not ran.exists()


@pytest.mark.parametrize("member", ["../outside.txt", "inside/../../outside.txt", "/outside.txt"])
def test_an_archive_writes_nothing_outside_its_folder(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(member, "out")
        archive.writestr("inside/model.txt", "in")
    wheels._unpack(tmp_path / "a.whl", wheels.Wheels({}, "inside/"), tmp_path / "deep" / "folder")
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.txt"))
    assert all(path.parts[:2] == ("deep", "folder") for path in written) and len(written) >= 1

"""What a result rests on besides its settings: the code that ran, packages, device, revisions on the hub, git's commit.

    made_by("training.train")      # {"code", "packages", "device"}: goes into the key of every result made by it
    provenance()                   # when, where and with what: stands beside a result, and in no key

The code is that of the files as they were when deftlib was imported, never what an editor has left there since. What a
table's record in `figures/` holds is written by `reporting.report`.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import deftlib

PACKAGE = Path(deftlib.__file__).resolve().parent
# They carry results and settings, or refuse a run beforehand, and change no number.
CARRIERS = {"deftlib"} | {
    f"deftlib.{name}"
    for name in ("jobs", "ray_workers", "workers", "gpus", "store", "provenance", "profile", "sections", "typed")
    + ("training.memory", "models.footprint")
}
PACKAGES = {  # that can change a number, each with those that do part of its work
    "torch": [],
    "transformers": ["tokenizers", "accelerate", "torch"],
    "trl": ["transformers"],
    "accelerate": ["torch"],
    "tokenizers": [],
    "datasets": ["pyarrow"],
    "pyarrow": [],
    "numpy": [],
    "pandas": ["numpy"],
    "nltk": [],
    "sacrebleu": [],
}


# ---- what goes into a key ----------------------------------------------------------------------------------------


def made_by(module):
    """Code, packages and kind of device of the results that `deftlib.<module>` makes: what can change their numbers.

    packages: the version of each of `PACKAGES` that its code imports, directly or not. device: "cpu" or "cuda", where
    that code imports torch.
    """
    versions = {name: version(name) for name in sorted(packages_of(module))}
    made = {"code": code_digest(module), "packages": versions}
    return made | {"device": device_kind()} if "torch" in versions else made


@functools.cache
def code_digest(module):
    """12 hex digits over the code that `deftlib.<module>` can run, as imported, by its `meaning`."""
    meanings = [[name, meaning(deftlib.SOURCES[name])] for name in code_of(module)]
    return hashlib.sha256(json.dumps(meanings).encode()).hexdigest()[:12]


def edited_since_import(module):
    """The files of that code that by now say something else than when deftlib was imported, as paths to show."""
    edited = []
    for name in code_of(module):
        path = file_of(name)
        now = path.read_text(encoding="utf-8") if path.is_file() else ""
        if now != deftlib.SOURCES[name] and meaning(now) != meaning(deftlib.SOURCES[name]):
            edited.append(str(path.relative_to(PACKAGE.parent)))
    return edited


def upgraded_since_import(module):
    """The packages of that code whose version is no longer the one that this process first saw."""
    return [name for name in sorted(packages_of(module)) if version(name) != version.__wrapped__(name)]


@functools.cache
def packages_of(module):
    """The names in `PACKAGES` that the code of `deftlib.<module>` imports, or that those work with."""
    found, rest = set(), {name for each in code_of(module) for name in imports(deftlib.SOURCES[each])}
    while rest := (rest & PACKAGES.keys()) - found:
        found |= rest
        rest = {name for each in rest for name in PACKAGES[each]}
    return found


@functools.cache
def version(package):
    """The version of a package, None without it: the one that was there when this process first asked."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_kind():
    """ "cuda" where torch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def hub_revision(name, kind="model"):
    """The commit that a hub id, or "id@revision", stands for: 40 hex digits, asked once a process. kind: or "dataset".

    Where the hub cannot be reached it is the commit that its cache holds. Raises LookupError if neither knows one.
    """
    from huggingface_hub import resolve_revision

    name, _, revision = name.partition("@")
    try:
        return str(resolve_revision(name, repo_type=kind, revision=revision or None))
    except Exception as error:  # the hub's client raises a dozen types; each means: not known there, nor in the cache
        cause = " ".join(str(error).split())[:160]
        raise LookupError(f"the hub gives no revision of {name} ({type(error).__name__}: {cause})") from error


# ---- the code of a module ----------------------------------------------------------------------------------------


@functools.cache
def code_of(module):
    """The modules of deftlib that `deftlib.<module>` imports, directly or not, itself included: sorted dotted names.

    `CARRIERS` are left out, and so are the files that only open a room.
    """
    found, rest = set(), {f"deftlib.{module}"}
    while rest:
        found |= rest
        rest = {name for each in rest for name in imports(deftlib.SOURCES[each]) if name.startswith("deftlib.")} - found
    return sorted(found - CARRIERS)


@functools.cache
def imports(source):
    """What a Python source imports: dotted names of deftlib's modules, and other packages by their first name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in deftlib.SOURCES else node.module for name in inside}
    return {name if name in deftlib.SOURCES else name.partition(".")[0] for name in found}


def file_of(name):
    """The file of one of deftlib's modules, from its dotted name."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def meaning(source):
    """A digest of what a Python source does: comments, docstrings and layout do not count."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # half way through an edit
        return source
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""  # a docstring
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


# ---- what stands beside a result ---------------------------------------------------------------------------------


def provenance():
    """When, with what and on what a result was made."""
    torch = sys.modules.get("torch")
    gpu = torch is not None and torch.cuda.is_available()
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch and torch.get_num_threads(),
    }


def _git():
    """Commit of the code, and whether files other than figures differ from it; None outside its repository.

    Files that it does not know count in deftlib alone: there one may be imported.
    """
    try:
        inside = _place_in_repository(PACKAGE.parent)
        status = ["status", "--porcelain=v2", "--branch", "--untracked-files=all", "--", ".", ":!figures"]
        lines = _said_by_git(PACKAGE.parent, *status)
    except (OSError, subprocess.CalledProcessError):
        return None
    commit = next(line.split()[-1] for line in lines if line.startswith("# branch.oid "))
    changed = [line for line in lines if line[0] not in "#?" or line.startswith(f"? {inside}deftlib/")]
    return {"commit": commit, "dirty": bool(changed)}


@functools.cache
def _place_in_repository(folder):
    """Where in its repository `folder` lies, "" at its top. Raises CalledProcessError if its code is in no commit.

    The code may lie in another repository's .venv, which does not know it.
    """
    _said_by_git(folder, "ls-files", "--error-unmatch", "deftlib/__init__.py")
    _said_by_git(folder, "rev-parse", "HEAD")
    return "".join(_said_by_git(folder, "rev-parse", "--show-prefix"))


def _said_by_git(folder, *command):
    done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()

"""No result can be stale or mixed: what made it is part of its key, and it is published under no other code's name."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import deftlib
from deftlib import provenance, store
from deftlib.profile import Profile
from deftlib.provenance import code_digest, made_by, meaning, packages_of
from deftlib.store import StoreError

P = SimpleNamespace(name="p", label="p")  # all that a stage asks of a profile
HOUSE = Path(deftlib.__file__).parent


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty project folder to publish into."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def sources(monkeypatch, forget):
    """The sources as imported, to be changed by a test."""
    monkeypatch.setattr(deftlib, "SOURCES", dict(deftlib.SOURCES))
    return deftlib.SOURCES


@pytest.fixture
def forget():
    """What was found out about the code is forgotten before and after."""
    cached = provenance.code_digest, provenance.packages_of, provenance.code_of, provenance.imports
    for function in cached:
        function.cache_clear()
    yield lambda: [function.cache_clear() for function in cached]
    for function in cached:
        function.cache_clear()


def stage(module="training.train", produce=lambda folder: None):
    return store.stage(P, "thing", {}, produce, module)


# ---- code ----------------------------------------------------------------------------------------------------------


def test_what_code_means_is_without_comments_docstrings_and_layout():
    plain = meaning("def f():\n    '''Say it.'''\n    return 1\n")
    assert meaning("def f():\n    '''Say it otherwise.'''\n\n    return 1  # why\n") == plain
    assert meaning("def f():\n    '''Say it.'''\n    return 2\n") != plain


def test_the_key_follows_the_code_that_a_module_runs_and_no_other(sources, forget):
    before = code_digest("training.train"), code_digest("models.policies")
    sources["deftlib.method.losses"] += "\nSCALE = 2\n"
    forget()
    assert code_digest("training.train") != before[0] and code_digest("models.policies") == before[1]


@pytest.mark.parametrize("module", ["gpus", "training.memory", "models.footprint"])
def test_what_deals_work_out_or_refuses_it_beforehand_is_in_no_key(module, sources, forget):
    before = code_digest("training.train")
    sources[f"deftlib.{module}"] += "\nLIMIT = 2\n"
    forget()
    assert code_digest("training.train") == before


def test_code_edited_while_a_run_goes_on_is_not_published_under_the_edited_codes_key(tmp_path, monkeypatch):
    """A copy of the house, a process that imports it, and an edit of `losses` while its stage is being made."""
    house = tmp_path / "copy" / "deftlib"
    for name, text in deftlib.SOURCES.items():
        path = house.parent / provenance.file_of(name).relative_to(HOUSE.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    script = f"""
import sys
sys.path.insert(0, {str(house.parent)!r})
from pathlib import Path
from types import SimpleNamespace
from deftlib import store
losses = Path({str(house)!r}) / "method" / "losses.py"
def produce(folder):
    if sys.argv[1] == "edit":
        losses.write_text(losses.read_text() + "\\nSCALE = 2\\n")
    if sys.argv[1] == "comment":
        losses.write_text(losses.read_text() + "\\n# a word more\\n")
    (folder / "result.txt").write_text("made")
print(store.stage(SimpleNamespace(name="p", label="p"), "thing", {{}}, produce, "training.train"))
"""
    run = lambda how: subprocess.run(
        [sys.executable, "-c", script, how],
        capture_output=True,
        text=True,
        env={"DEFT_ROOT": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    first = run("leave")
    assert first.returncode == 0, first.stderr
    published = first.stdout.splitlines()[-1]
    (Path(published) / store.MANIFEST).unlink()
    assert run("comment").returncode == 0  # that changes nothing that runs
    (Path(published) / store.MANIFEST).unlink()
    edited = run("edit")
    assert "StoreError: deftlib/method/losses.py changed since this process imported it" in edited.stderr
    assert not list((tmp_path / "build").rglob(store.MANIFEST))
    again = run("leave")  # a new process: the edited code, under a key of its own
    assert again.returncode == 0 and again.stdout.splitlines()[-1] != published


def test_code_edited_before_a_run_starts_to_work_is_refused_before_the_work(sources):
    sources["deftlib.method.losses"] += "\nOLDER = 1\n"  # what was imported is not what lies on disk
    with pytest.raises(
        StoreError, match=r"deftlib/method/losses.py changed .*thing would be published .*restart the kernel"
    ):
        stage(produce=lambda folder: pytest.fail("worked in vain"))
    assert stage("preferences.lists").is_dir()  # code that it does not run may change


# ---- packages and device -------------------------------------------------------------------------------------------


def test_a_key_holds_the_packages_that_its_code_imports_and_those_that_they_work_with():
    assert packages_of("preferences.lists") >= {"datasets", "pyarrow"} and "torch" not in packages_of(
        "preferences.lists"
    )
    assert packages_of("training.train") >= {"torch", "transformers", "trl", "accelerate", "tokenizers", "datasets"}
    assert packages_of("evaluation.evaluate") >= {"nltk", "pandas"}
    assert packages_of("method.grading") == {"numpy"}


def test_an_upgrade_makes_another_result(monkeypatch):
    before, of_lists = stage(), stage("preferences.lists")
    installed = provenance.version
    monkeypatch.setattr(provenance, "version", lambda name: "99.0" if name == "accelerate" else installed(name))
    monkeypatch.setattr(store, "upgraded_since_import", lambda module: [])
    assert stage() != before and stage("preferences.lists") == of_lists
    assert store.read_manifest(stage())["key"]["packages"]["accelerate"] == "99.0"


def test_another_kind_of_device_makes_another_result_where_torch_computes_it(monkeypatch):
    before, of_lists = stage(), stage("preferences.lists")
    monkeypatch.setattr(provenance, "device_kind", lambda: "another")
    assert stage() != before and stage("preferences.lists") == of_lists
    assert "device" not in made_by("preferences.lists")


# ---- the hub -------------------------------------------------------------------------------------------------------


def test_a_hub_id_stands_for_a_commit_and_a_pinned_one_for_itself(monkeypatch):
    monkeypatch.undo()
    import huggingface_hub

    asked = []

    def resolve(name, repo_type, revision):
        asked.append((name, repo_type, revision))
        return revision or 40 * "c"

    monkeypatch.setattr(huggingface_hub, "resolve_revision", resolve)
    provenance.hub_revision.cache_clear()
    assert [provenance.hub_revision("a/b", "dataset") for _ in range(2)] == [40 * "c"] * 2
    assert provenance.hub_revision(f"a/b@{40 * 'd'}") == 40 * "d"
    assert asked == [("a/b", "dataset", None), ("a/b", "model", 40 * "d")]  # once a process
    provenance.hub_revision.cache_clear()


def test_offline_without_a_cache_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.undo()
    provenance.hub_revision.cache_clear()
    with pytest.raises(LookupError, match=r"^the hub gives no revision of nobody/nothing-\w+ \(\w+: .*\)$") as error:
        provenance.hub_revision(f"nobody/nothing-{tmp_path.name[-1]}x")
    assert "\n" not in str(error.value)


# ---- beside a result -----------------------------------------------------------------------------------------------


def test_provenance_says_when_with_what_and_on_what():
    made = provenance.provenance()
    assert {"created", "git", "python", "packages", "device", "cores", "threads"} <= made.keys()
    assert made["packages"].keys() == provenance.PACKAGES.keys()


def test_a_copy_outside_its_repository_takes_no_other_repositorys_commit(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / ".venv" / "lib" / "deftlib")
    (tmp_path / ".venv" / "lib" / "deftlib").mkdir(parents=True)
    assert provenance.provenance()["git"] is None


def test_the_settings_of_two_overrides_have_names_of_their_own():
    one, other = (Profile.load("mini", {"grading.top": top}) for top in (10, 12.5))
    assert json.dumps(one.settings()) != json.dumps(other.settings()) and one.label != other.label


def test_an_upgrade_while_a_process_runs_is_not_taken_for_what_it_imported(monkeypatch):
    before = made_by("training.train")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    assert made_by("training.train") == before
    with pytest.raises(StoreError, match=r"accelerate, .*torch.* changed since this process imported it"):
        stage(produce=lambda folder: pytest.fail("worked in vain"))


def test_a_file_that_git_does_not_know_makes_deftlib_dirty_and_nothing_else(monkeypatch, tmp_path):
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
    (tmp_path / "deftlib").mkdir()
    (tmp_path / "deftlib" / "__init__.py").touch()
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e@e", "commit", "-qm", "first")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "deftlib")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "scratch" / "deftlib").mkdir(parents=True)
    (tmp_path / "scratch" / "deftlib" / "losses.py").touch()
    assert provenance.provenance()["git"]["dirty"] is False
    (tmp_path / "deftlib" / "losses.py").touch()
    assert provenance.provenance()["git"]["dirty"] is True

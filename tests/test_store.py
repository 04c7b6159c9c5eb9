"""Published results: computed once, whole or not at all, and a full disk costs nothing that stood before."""

import builtins
import errno
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from deftlib import store
from deftlib.provenance import made_by
from deftlib.store import StoreError

P = SimpleNamespace(name="p", label="p")  # all that a stage asks of a profile
FULL = os.strerror(errno.ENOSPC)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty project folder to publish into."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    return tmp_path


def producing(text, calls=None):
    def produce(folder):
        (folder / "result.txt").write_text(text)
        if calls is not None:
            calls.append(folder)

    return produce


def stage(name, key, produce, module="method.grading"):
    return store.stage(P, name, key, produce, module)


def publish(text="first", number=1):
    return stage("kind/thing", {"number": number}, producing(text))


# ---- one result a key ----------------------------------------------------------------------------------------------


def test_a_stage_is_computed_once_and_then_reused():
    calls = []
    first = stage("kind/thing", {"a": 1, "b": 2}, producing("one", calls))
    again = stage("kind/thing", {"b": 2, "a": 1}, producing("two", calls))  # the same key, told otherwise
    assert first == again and len(calls) == 1
    assert (first / "result.txt").read_text() == "one"


def test_another_key_is_another_result_and_both_stand():
    one, two = publish("one", 1), publish("two", 2)
    assert one != two
    assert [(folder / "result.txt").read_text() for folder in (one, two)] == ["one", "two"]


def test_a_published_folder_carries_its_provenance():
    manifest = store.read_manifest(publish("four"))
    assert manifest["name"] == "kind/thing" and manifest["key"] == {"number": 1, **made_by("method.grading")}
    assert manifest["files"]["result.txt"]["size"] == 4
    assert manifest["packages"].keys() >= {"torch", "transformers", "trl"}
    assert {"created", "git", "device", "seconds", "python"} <= manifest.keys()


# ---- interrupted ---------------------------------------------------------------------------------------------------


def test_a_failing_produce_publishes_nothing_and_leaves_earlier_results():
    earlier = publish("earlier")

    def fail(folder):
        (folder / "half.txt").write_text("half")
        raise ValueError("no such luck")

    with pytest.raises(ValueError, match="no such luck"):
        stage("kind/thing", {"number": 2}, fail)
    assert [p.name for p in earlier.parent.iterdir() if not p.name.endswith(".partial")] == [earlier.name]
    assert store.read_manifest(earlier) and (earlier / "result.txt").read_text() == "earlier"


def test_the_next_call_resumes_in_the_folder_of_the_interrupted_one():
    folders = []

    def produce(folder):
        folders.append(folder)
        checkpoint = folder / "checkpoint.txt"
        if not checkpoint.exists():
            checkpoint.write_text("half way")
            raise KeyboardInterrupt
        (folder / "result.txt").write_text(f"resumed {checkpoint.read_text()}")

    with pytest.raises(KeyboardInterrupt):
        stage("thing", {}, produce)
    final = stage("thing", {}, produce)
    assert folders[0] == folders[1] and folders[0].name.endswith(".partial")
    assert (final / "result.txt").read_text() == "resumed half way"
    assert not folders[0].exists()


def test_seconds_spent_before_an_interruption_count():
    def produce(folder):
        (folder / "seconds.json").write_text('{"seconds": 100.0}')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage("thing", {}, produce)
    assert store.read_manifest(stage("thing", {}, producing("done")))["seconds"] >= 100


# ---- full disk -----------------------------------------------------------------------------------------------------


def refuse(code, path=None):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code), path)

    return fail


def raising(error):
    def produce(folder):
        raise error

    return produce


def one_sentence(error):
    """The message, checked to be one line with one main clause on what to do."""
    message = str(error.value)
    assert "\n" not in message and message.endswith("earlier results are untouched")
    return message


@pytest.mark.parametrize("function", ["fsync", "replace", "rename"])
def test_a_full_disk_while_publishing_is_one_clear_sentence(monkeypatch, function):
    earlier = publish("earlier")
    monkeypatch.setattr(os, function, refuse(errno.ENOSPC))
    with pytest.raises(StoreError) as error:
        publish("later", 2)
    monkeypatch.undo()
    message = one_sentence(error)
    assert message.count("cannot write") == 1 and "the disk is full" in message and "kind/thing-" in message
    assert (earlier / "result.txt").read_text() == "earlier"


def test_a_full_disk_names_the_very_file_when_the_system_does(root, monkeypatch):
    real = builtins.open

    def full(path, *args, **kwargs):
        return refuse(errno.ENOSPC, str(path))() if "manifest" in str(path) else real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(StoreError) as error:
        publish()
    assert re.search(r"cannot write \S*manifest\.json\S*: the disk is full", one_sentence(error))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"Error while serializing: I/O error: {FULL} (os error 28)"),  # safetensors
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4208384 vs 4208276"),  # torch.save
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
    ],
    ids=["safetensors", "torch.save", "torch.save of a small file"],
)
def test_a_library_that_meets_a_full_disk_is_understood(error):
    with pytest.raises(StoreError, match=r"cannot write .*thing.*: the disk is full"):
        stage("thing", {}, raising(error))


def test_a_stage_within_a_stage_is_explained_once(monkeypatch):
    inner = raising(OSError(errno.ENOSPC, FULL))
    with pytest.raises(StoreError) as error:
        stage("outer", {}, lambda folder: stage("inner", {}, inner))
    assert one_sentence(error).count("cannot write") == 1 and "/inner-" in str(error.value)


def test_an_input_that_may_not_be_read_is_not_taken_for_a_failed_write():
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/elsewhere/train.jsonl")
    with pytest.raises(PermissionError):
        stage("thing", {}, raising(denied))
    told = ValueError("/elsewhere/train.jsonl: cannot be read (Permission denied); check the file")
    with pytest.raises(ValueError, match="cannot be read"):
        stage("thing", {}, raising(told))


def test_a_folder_that_refuses_writing_is_named(root):
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root / "build" / "p"))
    with pytest.raises(StoreError, match="permission denied"), store.explained(root):
        raise denied


# ---- single files --------------------------------------------------------------------------------------------------


def test_write_atomic_shows_the_old_content_or_the_new(tmp_path, monkeypatch):
    path = store.write_atomic(tmp_path / "new" / "table.csv", "old")
    monkeypatch.setattr(os, "replace", refuse(errno.ENOSPC))
    with pytest.raises(StoreError, match=r"table\.csv: the disk is full"):
        store.write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["table.csv"]
    monkeypatch.undo()
    assert store.write_atomic(path, b"new").read_bytes() == b"new"


def test_a_file_of_another_size_than_published_is_refused_everywhere():
    folder = publish("whole")
    (folder / "result.txt").write_text("cut")
    for use in (store.read_manifest, store.digest, lambda _: publish("whole")):
        with pytest.raises(StoreError, match=r"result.txt differs from its manifest: delete"):
            use(folder)


def test_a_folder_without_manifest_is_no_result(tmp_path):
    with pytest.raises(StoreError, match="holds no published result"):
        store.read_manifest(tmp_path)


def test_the_digest_of_a_folder_is_that_of_its_content():
    same, other, alike = publish("same", 1), publish("other", 2), publish("same", 3)
    assert store.digest(same) == store.digest(alike) != store.digest(other)


def test_a_folder_deleted_while_it_is_filled_is_no_empty_result():
    def produce(folder):
        shutil.rmtree(folder)  # make clean, in another terminal

    with pytest.raises(StoreError, match=r"thing-\w+.partial was deleted while it was filled: run again"):
        stage("kind/thing", {}, produce)
    assert not list((store.ROOT / "build").rglob(store.MANIFEST))


def test_a_line_that_another_process_is_just_writing_is_not_cut_away(tmp_path):
    kept = store.Kept(tmp_path / "kept.jsonl")
    kept.add("one", {"answer": 1})
    with kept._others:  # the other process holds the lock while half of its line is there
        with open(kept.path, "a") as file:
            file.write('{"key": "hal')
        with ThreadPoolExecutor(1) as pool:
            opened = pool.submit(store.Kept, kept.path)
            time.sleep(0.3)
            with open(kept.path, "a") as file:
                file.write('f"}\n')
            kept._others.release()
            assert len(opened.result()) == 2
            kept._others.acquire()


def test_timings_list_what_this_process_asked_for_and_nothing_that_merely_lies_there(root, monkeypatch):
    for number in (1, 2, 3):
        folder = stage(f"step {number}", {}, producing("x"))
        manifest = json.loads((folder / store.MANIFEST).read_text())
        (folder / store.MANIFEST).write_text(json.dumps({**manifest, "seconds": number}))
    monkeypatch.setattr(store, "USED", {})  # another process
    for number in (3, 1, 3):
        stage(f"step {number}", {}, producing("x"))
    assert store.timings(P) == [("step 3", 3), ("step 1", 1)]


def test_a_stage_that_failed_is_none_of_the_results_a_process_rests_on(monkeypatch):
    monkeypatch.setattr(store, "USED", {})
    with pytest.raises(ZeroDivisionError):
        stage("kind/broken", {}, lambda folder: 1 / 0)
    publish()
    assert [name for name, _ in store.timings(P)] == ["kind/thing"]


# ---- kept answers --------------------------------------------------------------------------------------------------


def test_an_answer_is_found_again_by_the_content_that_was_asked(tmp_path):
    kept = store.Kept(tmp_path / "kept" / "judge.jsonl")
    kept.add({"model": "m", "request": ["a", 1]}, {"text": "⏎ yes"})
    assert {"request": ["a", 1], "model": "m"} in kept and {"request": ["a", 2], "model": "m"} not in kept
    again = store.Kept(tmp_path / "kept" / "judge.jsonl")
    assert again[{"request": ["a", 1], "model": "m"}]["text"] == "⏎ yes" and len(again) == 1


def test_a_line_that_a_kill_cut_short_is_dropped_and_asked_again(tmp_path):
    path = tmp_path / "judge.jsonl"
    kept = store.Kept(path)
    for question in ("one", "two"):
        kept.add(question, {"text": question.upper()})
    path.write_text(path.read_text()[:-5])
    again = store.Kept(path)
    assert "one" in again and "two" not in again
    again.add("two", {"text": "TWO"})
    assert store.Kept(path)["two"]["text"] == "TWO" and len(path.read_text().splitlines()) == 2


def test_what_an_editor_or_a_crash_left_in_the_file_costs_no_other_answer(tmp_path, capsys):
    path = tmp_path / "judge.jsonl"
    kept = store.Kept(path)
    for question in ("one", "two", "three"):
        kept.add(question, {"text": question.upper()})
    one, two, three = path.read_bytes().splitlines()
    path.write_bytes(b"\xef\xbb\xbf" + one + b"\r\n\n" + b"\0" * 9 + b"\n" + two[:9] + b"\n[1]\n" + three)  # no end
    again = store.Kept(path)
    assert "one" in again and "two" not in again and again["three"]["text"] == "THREE"
    assert "3 damaged lines left out" in capsys.readouterr().out
    again.add("two", {"text": "TWO"})
    assert len(store.Kept(path)) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 1}', '{"files": {"a": {}}}', "null"])
def test_a_torn_manifest_is_one_sentence(tmp_path, content):
    (tmp_path / store.MANIFEST).write_text(content)
    with pytest.raises(store.StoreError, match=r"is damaged: delete .* and run again"):
        store.read_manifest(tmp_path)


def test_several_threads_may_keep_answers_at_once(tmp_path):
    kept = store.Kept(tmp_path / "judge.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: kept.add(i, {"text": "x" * 5000}), range(100)))
    assert len(store.Kept(tmp_path / "judge.jsonl")) == 100


# ---- one process ---------------------------------------------------------------------------------------------------


def test_several_processes_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(store.StoreError, match="one process"):
        stage("anything", {}, lambda folder: None, "method.grading")


def test_a_users_own_manifest_beside_a_file_is_not_ours(tmp_path):
    (tmp_path / "prefs.jsonl").write_text("{}")
    (tmp_path / store.MANIFEST).write_text("[]")
    assert len(store.digest(tmp_path / "prefs.jsonl")) == 64


def test_a_run_killed_before_the_renaming_alone_is_finished_by_the_next(root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store.os, "rename", None)  # dies there
        with pytest.raises(TypeError):
            publish()
    (partial,) = root.glob("build/p/kind/*.partial")
    assert (partial / store.MANIFEST).is_file()
    folder = stage("kind/thing", {"number": 1}, None)  # nothing is computed again
    assert (folder / "result.txt").read_text() == "first" and not partial.exists()

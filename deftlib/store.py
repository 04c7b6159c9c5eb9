"""Where results live, and how one becomes visible: whole, with its provenance, or not at all.

`stage(profile, "rewards/train", key, produce, "models.rewards")` returns a folder under `build/<profile>/`. If a
result with the same key stands there, it is reused; else `produce(folder)` fills a temporary folder, which is checked,
synced and renamed. A killed run leaves no half result, and a full disk leaves the earlier ones alone.

A key holds the settings and the digests of inputs that the caller names, and what `provenance.made_by` adds.
"""

import codecs
import errno
import hashlib
import json
import math
import os
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from deftlib.provenance import edited_since_import, made_by, provenance, upgraded_since_import


def _root():
    """The project's folder: `$DEFT_ROOT`, else the checkout that this library is in, else the one around us."""
    here = Path(__file__).resolve().parent.parent
    around = [here, Path.cwd(), *Path.cwd().parents]
    found = next((place for place in around if (place / "notebooks" / "profiles").is_dir()), here)
    return Path(os.environ.get("DEFT_ROOT", found))


ROOT = _root()
MANIFEST = "manifest.json"
REFUSALS = {
    errno.ENOSPC: "the disk is full, free some space and run again",
    errno.EDQUOT: "the disk quota is used up, free some space and run again",
    errno.EACCES: "permission denied",
    errno.EROFS: "the file system is read-only",
}
TORCH_SAVE_CUT_SHORT = ("PytorchStreamWriter", "] . unexpected pos ")  # it keeps the system's words to itself
_left = math.inf  # results that this process may still make: `at_most`
USED = {}  # {label: {name: manifest}} of every stage this process asked for: what its tables and figures rest on


class StoreError(RuntimeError):
    """A result could not be written or is not what its manifest says."""


class Unpublished(Exception):
    """A result that is asked for is not there, and this process is not to make it: see `at_most`."""

    def __init__(self, folder):
        super().__init__(f"{folder} is not published yet")
        self.folder = folder


def build_dir(profile_name):
    return ROOT / "build" / profile_name


def figures_dir(profile_name):
    return ROOT / "figures" / profile_name


def records_lock(profile_name):
    """To hold while a record in `figures/` is read and written anew: two notebooks may run at a time."""
    build_dir(profile_name).mkdir(parents=True, exist_ok=True)
    return FileLock(build_dir(profile_name) / ".records.lock")


def stage(profile, name, key, produce, module):
    """The folder of one published result, computed if it is not there.

    key: JSON-able parameters and digests of inputs. module: of deftlib, like "training.subset", whose code makes it:
    `made_by` adds that code, the packages it imports and the kind of device.
    produce(folder) writes files into an empty folder, or into the folder an interrupted run left: it may resume.
    Raises StoreError when publication fails, or would publish under the name of code that was edited since it was
    imported; whatever was published before stays.
    """
    key = {**key, **made_by(module)}
    short = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
    final = build_dir(profile.name) / f"{name}-{short}"
    if not (final / MANIFEST).is_file():
        _made_here(final, name, key, produce, module)
    manifest = read_manifest(final)  # a result that was cut or lost a file is refused, not reused
    USED.setdefault(profile.label, {})[str(final.relative_to(build_dir(profile.name)))] = manifest
    return final


@contextmanager
def at_most(count):
    """Inside, this process makes `count` results, with what they ask for themselves; one more raises Unpublished."""
    global _left
    before, _left = _left, count
    try:
        yield
    finally:
        _left = before


def unlimited():
    """Whether this process makes whatever is asked for: it is not inside `at_most`."""
    return _left == math.inf


def _made_here(*publication):
    global _left
    final = publication[0]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise StoreError(
            f"{final} is to be made, and results are published by one process: run without accelerate launch or "
            "torchrun, which the profile's `launch` starts by itself"
        )
    if not _left:
        raise Unpublished(final)
    left = _left - 1
    with at_most(math.inf):  # what it asks for is part of it
        _publish(*publication)
    _left = left


def _publish(final, name, key, produce, module):
    """Fill a temporary folder and rename it to `final`."""
    work = final.with_name(final.name + ".partial")
    with explained(work), alone(final, f"[{name}] another process makes it: waiting"):
        if (final / MANIFEST).is_file():  # another process finished it while this one waited
            return
        if not (work / MANIFEST).is_file():  # written last: else the run was killed with the renaming alone to do
            _fill(work, name, key, produce, module)
        read_manifest(work)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(work, final)


def _fill(work, name, key, produce, module):
    """Do the work in its temporary folder, or the rest of it, and write the manifest."""
    _refuse_edited(name, module)  # before the work too: it would be in vain
    work.mkdir(parents=True, exist_ok=True)
    for half_written in [*work.rglob(".*.tmp"), *work.rglob(".tmp*")]:  # left by `write_atomic` and by safetensors
        half_written.unlink()
    print(f"[{name}] started", flush=True)
    start = time.perf_counter() - _seconds_before(work)
    produce(work)
    seconds = time.perf_counter() - start
    _refuse_edited(name, module)
    if not work.is_dir():
        raise StoreError(f"{work} was deleted while it was filled: run again")
    _write_manifest(work, {"name": name, "key": key, "seconds": round(seconds, 2), **provenance()})
    print(f"[{name}] done in {seconds:.1f} s", flush=True)


def _refuse_edited(name, module):
    """Raises StoreError if that code, or a package it works with, is no longer what this process imported."""
    changed = edited_since_import(module) + upgraded_since_import(module)
    if changed:
        raise StoreError(
            f"{', '.join(changed)} changed since this process imported it, so {name} would be published as the work of "
            "other code than made it: run again (in Jupyter, restart the kernel)"
        )


@contextmanager
def alone(path, waiting):
    """One process at a time makes what is at `path`; the others say `waiting`, wait, and may find it made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(waiting, flush=True)
        lock.acquire()
    try:
        yield
    finally:  # by its holder alone: one that gave up waiting would take it from under the others
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def explained(path):
    """Turn a full disk or a refused write into one sentence that names the file and the cause."""
    try:
        yield
    except StoreError:
        raise  # explained already, closer to the cause
    except Exception as error:
        code = _refusal(error, path)
        if code is None:
            raise
        where = getattr(error, "filename", None) or path
        raise StoreError(f"cannot write {where}: {REFUSALS[code]}; earlier results are untouched") from error


def write_atomic(path, data):
    """Write bytes or text to a file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


class Kept:
    """Expensive answers, kept one JSON object a line as they come, and found again by the content that was asked.

        kept = Kept(build_dir("mini") / "kept" / "judge.jsonl")
        if question not in kept:
            kept.add(question, {"answer": ask(question)})
        kept[question]["answer"]

    A question is anything JSON can hold. Lines that a kill cut short or an editor damaged are left out, and told;
    threads and processes may add.
    """

    def __init__(self, path):
        self.path, self._lock = Path(path), threading.Lock()
        self._others = FileLock(self.path.with_name(f".{self.path.name}.lock"), thread_local=False)
        self._read()

    def _read(self):
        """Find what is in the file, and mend its end."""
        lines, last = self._lines()
        if last:
            with explained(self.path), self._others:  # unless another process was just writing it
                lines, last = self._lines()
                if last:  # whole, but for an end that an editor took, or cut short by a kill
                    lines += [f"{last}\n"] if _kept_entry(last) else []
                    write_atomic(self.path, "".join(lines))
        entries = [_kept_entry(line) for line in lines if line.strip()]
        damaged = entries.count(None)
        if damaged:
            print(f"  {self.path}: {damaged} damaged line{'s' * (damaged > 1)} left out", flush=True)
        self._entries = {entry["key"]: entry for entry in entries if entry}

    def _lines(self):
        """(whole lines, a last one without an end or "")."""
        content = self.path.read_bytes().removeprefix(codecs.BOM_UTF8) if self.path.is_file() else b""
        text = content.decode("utf-8", "replace")
        *lines, last = text.split("\n")
        return [f"{line}\n" for line in lines], last

    @contextmanager
    def asking(self):
        """One process at a time asks; another waits, and then finds what was answered: nothing is asked twice."""
        asking = self.path.with_name(f"{self.path.name}.asking")
        with explained(self.path), alone(asking, f"  another process asks for {self.path.stem}: waiting"):
            self._read()
            yield

    def __len__(self):
        return len(self._entries)

    def __contains__(self, question):
        return content_key(question) in self._entries

    def __getitem__(self, question):
        return self._entries[content_key(question)]

    def add(self, question, entry):
        """Append `entry` (a dict) under `question` and flush it to the disk's cache."""
        entry = {"key": content_key(question), **entry}
        with self._lock, explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._others, open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            self._entries[entry["key"]] = entry


def _kept_entry(line):
    """The entry on a line of a `Kept`, None if it holds none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("key"), str) else None


def content_key(question):
    """20 hex digits over anything JSON can hold: equal content, equal key."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:20]


def read_manifest(folder):
    """What was published there. Raises StoreError if there is none, or if a file has another size than stated."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise StoreError(f"{folder} holds no published result ({MANIFEST} is missing)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {name: entry["size"] for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: delete {folder} and run again") from error
    for name, size in files.items():
        file = Path(folder) / name
        if not file.is_file() or file.stat().st_size != size:
            raise StoreError(f"{file} differs from its manifest: delete {folder} and run again")
    return manifest


def digest(path):
    """sha256 of a file, or of a published folder's manifest entries: the identity of an input."""
    path = Path(path)
    if path.is_dir():
        files = read_manifest(path)["files"]
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    if path.parent.is_relative_to(ROOT / "build") and (path.parent / MANIFEST).is_file():
        published = read_manifest(path.parent)["files"]
        if path.name in published:
            return published[path.name]["sha256"]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def used(profile):
    """{name: provenance and seconds} of every result this process asked for, in the order it did.

    A name is the folder's and, after @, 8 digits of its manifest: made anew under the same key, it is another result.
    """
    shown = ("created", "seconds", "git", "python", "packages", "device", "cores", "threads")
    return {
        f"{name}@{content_key(manifest)[:8]}": {field: manifest.get(field) for field in shown}
        for name, manifest in USED.get(profile.label, {}).items()
    }


def timings(profile):
    """[(stage name, seconds)] of every result this process rests on, in the order it asked for them."""
    return [(manifest["name"], manifest["seconds"]) for manifest in USED.get(profile.label, {}).values()]


def _refusal(error, path):
    """The code in REFUSALS that this error comes from, or None."""
    code = getattr(error, "errno", None)
    if code in (errno.EACCES, errno.EROFS):  # about another place, it is an input that cannot be read
        place = Path(path) if Path(path).is_dir() else Path(path).parent
        where = Path(error.filename or path)
        return code if where.is_relative_to(place) or place.is_relative_to(where) else None
    if code in REFUSALS:
        return code
    for full in (errno.ENOSPC, errno.EDQUOT):  # safetensors and torch raise their own kinds, with the system's words
        if os.strerror(full) in str(error):
            return full
    if isinstance(error, RuntimeError) and any(words in str(error) for words in TORCH_SAVE_CUT_SHORT):
        return errno.ENOSPC
    return None


def _write_manifest(folder, record):
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": digest(path)}
    write_atomic(folder / MANIFEST, json.dumps({**record, "files": files}, indent=1))


def _seconds_before(folder):
    """Seconds that an interrupted run spent up to the point it resumes from: `loop.Progress` leaves them."""
    path = folder / "seconds.json"
    return json.loads(path.read_text())["seconds"] if path.is_file() else 0.0

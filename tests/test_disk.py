"""Real disks that are full, or may not be written to: one sentence, earlier results stand, and then it goes on.

A file system of its own, of a few megabytes, is mounted in a namespace of its own; skipped where that is not allowed.
"""

import ctypes
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import short_runs
import warm

from deftlib import store
from deftlib.profile import one_line

ALONE = ["unshare", "--user", "--map-root-user", "--mount"]
SIZES = {  # of the disk: what it is told there
    "200k": "the disk is full, free some space and run again; earlier results are untouched",  # not even the parts fit
    "7m": "are free: make room",  # they do, and it is known before anything is trained that its checkpoints do not
}
TRAIN = ["train", "--method", "sft"]
TRAIN += [part for key, value in short_runs.SETTINGS.items() for part in ("--set", f"{key}={one_line(value)}")]


def is_allowed():
    return bool(shutil.which("unshare")) and not subprocess.run([*ALONE, "true"], capture_output=True).returncode


pytestmark = pytest.mark.skipif(not is_allowed(), reason="no namespaces here")


def said(tmp_path, *steps):
    """[(exit code, what was said), ...] of `deft train` after each of these commands on a disk at `$ROOT`."""
    ours, theirs = warm.SERVER.Pipe()
    process = warm.SERVER.Process(target=in_a_namespace, args=(tmp_path / "root", steps, theirs))
    process.start()
    process.join()
    assert process.exitcode == 0
    return ours.recv()


def in_a_namespace(root, steps, answers):
    """What `unshare --user --map-root-user --mount` does, then the steps; `os.unshare` comes with Python 3.12."""
    user, group = os.getuid(), os.getgid()
    assert ctypes.CDLL(None).unshare(0x10000000 | 0x00020000) == 0  # CLONE_NEWUSER, CLONE_NEWNS
    for name, line in {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}.items():
        Path("/proc/self", name).write_text(line)
    shell = lambda command: subprocess.run(["sh", "-ec", command], env=os.environ | {"ROOT": str(root)}, check=True)
    linked = "\n".join(f"ln -s {store.ROOT / name} $ROOT/{name}" for name in ("data", "notebooks"))
    root.mkdir()
    shell(f"mount --make-rprivate /\nmount -t tmpfs -o size=200m none $ROOT\n{linked}")
    found = []
    for step in steps:
        shell(step)
        fork = multiprocessing.get_context("fork")
        done = warm.deft(*TRAIN, cwd=store.ROOT, context=fork, DEFT_ROOT=str(root), OMP_NUM_THREADS="1")
        found.append((done.returncode, done.stdout + done.stderr))
    answers.send(found)


@pytest.mark.parametrize("size, told", SIZES.items())
def test_a_full_disk_is_one_sentence_and_with_more_room_it_goes_on(tmp_path, size, told):
    full, more = said(tmp_path, f"mount -o remount,size={size} $ROOT", "mount -o remount,size=200m $ROOT")
    assert full[0] == 1 and "Traceback" not in full[1]
    assert told in full[1].splitlines()[-1] and full[1].splitlines()[-1].startswith("error: ")
    assert more[0] == 0 and "policies/sft-seed0-" in more[1].splitlines()[-1]


def test_a_disk_that_may_only_be_read_shows_what_is_there_and_refuses_the_rest_in_one_sentence(tmp_path):
    forbid, allow = "mount -o remount,ro $ROOT", "mount -o remount,rw $ROOT"
    refused, made, again = said(tmp_path, forbid, allow, forbid)
    assert refused[0] == 1 and refused[1].splitlines()[-1].startswith("error: cannot write ")
    assert "the file system is read-only" in refused[1] and "Traceback" not in refused[1]
    assert made[0] == again[0] == 0 and made[1].splitlines()[-1] == again[1].splitlines()[-1]

"""One large run on several GPUs: the process that publishes starts one process a GPU, shows what the first says, waits.

    launched(profile, folder, method="dpo", seed=0, ...)     # the arguments of `one_run.train_into`, as JSON holds them

The profile says how many (`launch.processes`) and what each holds (`launch.config`: "ddp" the whole model, "fsdp2" its
share, by `notebooks/profiles/launch/fsdp2.json`). torchrun starts them, on several machines through Slurm's srun. They
share the lists of an update: how many those are is the profile's, and the same on any number of processes.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from deftlib import typed
from deftlib.profile import FOLDER, Profile
from deftlib.sections import Settings

PUBLISHER = "DEFT_PUBLISHER"  # host and process of who publishes, told to those it starts
A_DAY = 24 * 60 * 60  # seconds
OWN = "launch"  # of a run's folder: what its processes are told, and what they say when they fail
ENDED = re.compile(r"^\s+rank\s+: (\d+) .*\n\s+exitcode\s+: (-?\d+) ", re.MULTILINE)  # in torchrun's account
PORTS = range(20_000, 30_000)  # at one the machines of a launch find each other; Linux hands out others


class LaunchError(RuntimeError):
    """A process of a launched training failed, or cannot be started."""


# ---- the process that publishes ------------------------------------------------------------------------------------


def launched(profile, folder, **run):
    """Train in `profile.launch.processes` processes, into the folder. Raises LaunchError by the first that failed."""
    share(profile)  # refuses before anything is started
    shutil.rmtree(folder / OWN, ignore_errors=True)
    (folder / OWN).mkdir()
    (folder / OWN / "job.json").write_text(json.dumps({"profile": dataclasses.asdict(profile), "run": run}))
    environment = os.environ | {PUBLISHER: f"{socket.gethostname()} {os.getpid()}"}
    module = "deftlib.training.one_run"
    process = subprocess.Popen(
        [*command(profile.launch, folder), "-m", module, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    told = []  # by torchrun and the libraries: shown if no process says better
    reader = threading.Thread(target=lambda: told.extend(process.stderr), daemon=True)
    reader.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
        code = process.wait()
        reader.join()
    finally:  # interrupted: they are not to go on without us, nor beside those of the next attempt
        process.terminate()
        process.wait()
    if code:
        raise LaunchError(f"training in {profile.launch.processes} processes failed: {_why(folder / OWN, code, told)}")
    shutil.rmtree(folder / OWN)


def _why(folder, code, told):
    """The first failure: of a process that was killed, as torchrun tells, before those of others that missed it."""
    failed = sorted(folder.glob("failed-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    for rank, its_code in ENDED.findall("".join(told)):
        if int(its_code) not in (1, -signal.SIGTERM) and not (folder / f"failed-{rank}.txt").exists():
            return f"process {rank}: exit code {its_code}{', perhaps for want of memory' * (its_code == '-9')}"
    return failed[0].read_text() if failed else f"exit code {code}: {''.join(told[-20:]).strip()}"


def command(launch, folder):
    """What starts the processes of a launch into a folder, up to what each is to run."""
    each = launch.processes // launch.nodes
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={each}", "--max-restarts=0"]
    torchrun.append(f"--log-dir={os.devnull}")  # else it leaves an empty folder of logs in the temporary one
    if launch.nodes == 1:
        return [*torchrun, "--standalone"]
    if "SLURM_JOB_ID" not in os.environ:
        raise LaunchError(f"launch.nodes={launch.nodes} needs a Slurm allocation: see profiles/launch")
    srun = ["srun", f"--nodes={launch.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    run = hashlib.sha256(f"{os.environ['SLURM_JOB_ID']} {folder}".encode()).hexdigest()[:10]  # two launches never meet
    port = PORTS[int(run, 16) % len(PORTS)]
    meet = [f"--rdzv-id={run}", f"--rdzv-endpoint={socket.gethostname()}:{port}"]
    return [*srun, *torchrun, f"--nnodes={launch.nodes}", "--rdzv-backend=c10d", *meet]


# ---- what each process does of it ----------------------------------------------------------------------------------


def share(profile):
    """The profile as one process trains by it: all together see the same micro-batches, and as many an update.

    Either whole micro-batches are dealt in turn, or each is split among all. Raises LaunchError where neither comes out
    even.
    """
    training, processes = profile.training, profile.launch.processes
    size, steps = training.batch_size, training.gradient_accumulation
    if steps % processes == 0:
        steps //= processes
    elif size % processes == 0:
        size //= processes
    else:
        raise LaunchError(
            f"neither training.batch_size={size} nor training.gradient_accumulation={steps} can be dealt evenly over "
            f"launch.processes={processes}"
        )
    own = dataclasses.replace(training, batch_size=size, gradient_accumulation=steps)
    return dataclasses.replace(profile, training=own)


def splits(profile):
    """Whether each micro-batch is split among the processes, rather than dealt whole."""
    return share(profile).training.batch_size < profile.training.batch_size


def place_of_weights(profile):
    """Where a process loads a model: in the machine's memory, if no device is to hold the whole; else None, its own."""
    return "cpu" if profile.launch.processes > 1 and profile.launch.config == "fsdp2" else None


def arguments(profile):
    """Further `TrainingArguments` of a launched training: how the model is dealt over the processes."""
    if profile.launch.processes == 1:
        return {}
    # Who publishes ends all as soon as one fails; a clock would end those that wait for a long encoding or writing.
    patient = {"ddp_timeout": A_DAY}
    if profile.launch.config == "ddp":
        return patient
    config = json.loads((FOLDER / "launch" / f"{profile.launch.config}.json").read_text(encoding="utf-8"))
    checkpointing = profile.training.gradient_checkpointing  # FSDP has its own, which does not gather weights twice
    dealt = {"fsdp": True, "fsdp_config": config | {"activation_checkpointing": checkpointing}}
    return patient | dealt | ({"gradient_checkpointing": False} if checkpointing else {})


def read_job(folder):
    """(profile, arguments of the run) that `launched` left there."""
    job = json.loads((folder / OWN / "job.json").read_text())
    beside = {name: job["profile"].pop(name) for name in ("label", "written", "changes")}
    return Profile(**vars(typed.build(Settings, job["profile"])), **beside), job["run"]


def end_with_publisher():
    """Ends this process soon after the one that publishes is gone: another may then resume in the same folder."""
    host, number = os.environ[PUBLISHER].split()
    if host == socket.gethostname():  # on another machine, it falls with those of the first
        threading.Thread(target=_watch, args=(int(number),), daemon=True).start()


def _watch(number):
    while _is_alive(number):
        time.sleep(0.5)
    os._exit(1)


def _is_alive(number):
    """Whether it works: in a container without an init a process that is gone keeps its number, as a zombie."""
    try:
        os.kill(number, 0)
        stat = Path(f"/proc/{number}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # it is gone, or its number is by now another user's
        return False

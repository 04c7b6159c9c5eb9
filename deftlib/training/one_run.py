"""One training, from its lists to model, log and summary in a folder: in this process, or as one of several.

    train_into(folder, profile, "deft-dpo", 0, start, lists="…/level_a.parquet", q_diff="…/q_diff.npz", omega=0.0)

`train.fit` publishes what it leaves there. `launch` starts this module as a program, once a GPU.
"""

import contextlib
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import torch

from deftlib import store
from deftlib.models.loop import PeakMemory, Progress, fit_or_resume
from deftlib.sections import Omega
from deftlib.training import building, launch, subset, trainers


def train_into(folder, profile, method, seed, start, lists, q_diff, omega, updates=None):
    """Train one policy. Of several processes each calls this, and the first writes.

    start: folder or hub id. lists, q_diff: paths of a Parquet and an .npz file. omega: a fixed weight, or an `Omega`
    as dict. updates: how many, instead of the recipe's epochs.
    """
    if profile.launch.processes == 1:
        shutil.rmtree(folder / launch.OWN, ignore_errors=True)  # of an interrupted run in several processes
    with PeakMemory() as memory:
        more = launch.arguments(profile) | ({} if updates is None else {"max_steps": updates})
        trainer = building.build(folder, launch.share(profile), method, seed, start, Path(lists), Path(q_diff), **more)
        used = trainers.lists_used(trainer)  # refuses too few before anything is trained
        if used < len(trainer.train_dataset):
            print(f"  an epoch leaves out {len(trainer.train_dataset) - used} prompts that fill no sampling batch")
        trainer.add_callback(Progress(folder, f"{method} seed {seed}"))
        trainer.micro_batches_split = launch.splits(profile)
        if profile.launch.config == "fsdp2" and profile.launch.processes > 1 and not trainer.is_fsdp_enabled:
            print(
                "  without GPUs accelerate knows no FSDP2: each process holds the whole model, as by launch.config=ddp"
            )
        trainer.omega = _omega(trainer, omega, q_diff, folder)
        fit_or_resume(trainer, folder)
    if not trainer.is_world_process_zero():
        return
    shutil.rmtree(folder / "encoded", ignore_errors=True)
    building.finish(folder, start)
    trainer.processing_class.save_pretrained(folder)
    ratios = [entry["gradient_ratio"] for entry in trainer.state.log_history if "gradient_ratio" in entry]
    summary = {"method": method, "seed": seed, "lists": used}
    summary |= {"updates": trainer.state.global_step, "peak_memory": memory.bytes}
    summary |= {"epochs": trainer.args.num_train_epochs, "learning_rate": trainer.args.learning_rate}
    summary |= {"omega": trainer.omega, "omega_reading": omega, "gradient_ratio": ratios}
    if profile.launch.processes > 1:
        summary["launch"] = vars(profile.launch) | {"config": "fsdp2" if trainer.is_fsdp_enabled else "ddp"}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


def _omega(trainer, omega, q_diff, folder):
    """The number that multiplies R_dis: given, as printed, times the counts, or calibrated (decision 11)."""
    if isinstance(omega, float):
        return omega
    omega = Omega(**omega)
    if omega.reading == "published":
        return omega.value
    if omega.reading == "counts":
        return omega.value * sum(int(counts.sum()) for counts in subset.load_counts(q_diff)) / 2
    path = folder / "omega.json"  # an interrupted run resumes with the omega it started with
    if path.is_file():
        return json.loads(path.read_text())
    found = trainer.calibrate(omega.value, omega.calibration_batches)
    if trainer.is_world_process_zero():
        store.write_atomic(path, json.dumps(found))
    return found


def main():
    """One of several processes; torchrun says which."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    launch.end_with_publisher()
    if torch.cuda.is_available():  # before anything is loaded: else all would load onto the first
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    profile, run = launch.read_job(folder)
    try:
        with contextlib.redirect_stdout(None if rank else sys.stdout):  # the first says it for all
            train_into(folder, profile, **run)
    except Exception as error:
        traceback.print_exc()
        store.write_atomic(
            folder / launch.OWN / f"failed-{rank}.txt", f"process {rank}: {type(error).__name__}: {error}"
        )
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()

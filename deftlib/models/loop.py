"""What all trainings here share: arguments for a quiet CPU or GPU run, progress lines, checkpoints to resume from.

    trainer = SomeTrainer(model, args=SomeConfig(**arguments(folder, ...)), callbacks=[Progress(folder, "label")])
    fit_or_resume(trainer, folder)

A run that was killed goes on from its newest complete checkpoint, to the same weights.
"""

import ctypes
import json
import math
import shutil
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from transformers import PrinterCallback, TrainerCallback, set_seed

from deftlib.store import write_atomic

warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl")  # renames to come; pins decide
disable_progress_bars()  # headless runs print plain lines

COMPLETE = "COMPLETE"  # written last, {"num_tokens": so far}: a checkpoint without it is not resumed from
SECONDS_BETWEEN_LINES = 5.0


def arguments(folder, *, epochs, learning_rate, batch_size, seed, save_steps=0, **more):
    """Keyword arguments for any `TrainingArguments`: no reporting, no bars, checkpoints below `folder`."""
    return {
        "output_dir": str(Path(folder) / "checkpoints"),
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "seed": seed,
        "data_seed": seed,
        "save_strategy": "steps" if save_steps else "no",
        "save_steps": save_steps or 1,
        "save_total_limit": 2,  # while the newest is being marked complete, the one before still stands
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,  # TRL's configs default to bf16 and checkpointing, on CPU too
        "gradient_checkpointing": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),  # on Apple silicon too; and bf16 there has to be told before
        **more,
    }


class Progress(TrainerCallback):
    """One plain line every few seconds, every log entry in `log.jsonl`, and a mark on each finished checkpoint.

    A log entry has step, epoch, seconds, what the trainer logs and, from its num_tokens, tokens_per_second. Of several
    processes the first writes.
    """

    def __init__(self, folder, label):
        self.folder, self.label = Path(folder), label
        self.seconds_before = _read_seconds(self.folder)
        self.last_line = 0.0
        self.tokens, self.tokens_at = None, 0.0

    @property
    def seconds(self):
        return self.seconds_before + time.perf_counter() - self.start

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()
        if state.is_world_process_zero:
            _drop_entries_after(self.folder / "log.jsonl", state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:  # without: the summary that closes a training
            return
        entry = {"step": state.global_step, "epoch": state.epoch, "seconds": round(self.seconds, 2), **logs}
        if "num_tokens" in logs:
            if self.tokens is not None:  # a rate takes two entries
                entry["tokens_per_second"] = (logs["num_tokens"] - self.tokens) / (self.seconds - self.tokens_at)
            self.tokens, self.tokens_at = logs["num_tokens"], self.seconds
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if time.perf_counter() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.perf_counter()
            print(self._line(state, entry), flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:  # so that no mean in the log is taken over steps before and after a checkpoint
            control.should_log = True

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # each process has written its part
        if not state.is_world_process_zero:
            return
        write_atomic(self.folder / "seconds.json", json.dumps({"seconds": self.seconds}))
        mark = Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE
        write_atomic(mark, json.dumps({"num_tokens": self.tokens}))

    def _line(self, state, entry):
        eta = (state.max_steps - state.global_step) * self.seconds / max(state.global_step, 1)
        parts = [f"  {self.label} step {state.global_step}/{state.max_steps}", f"loss {entry['loss']:.4f}"]
        if "R_dis" in entry:
            parts.append(f"R_dis {entry['R_dis']:+.4f}")
        if "tokens_per_second" in entry:
            parts.append(f"{entry['tokens_per_second']:.0f} tokens/s")
        return "  ".join([*parts, f"eta {eta:.0f} s"])


class PeakMemory:
    """The most memory that a block of code held above what was held before it, in bytes: `with PeakMemory() as memory`.

    On a GPU torch's own count; on Linux the resident set of the process, after unused memory went back to the system;
    NaN where the system does not tell. Libraries keep buffers, so the first block that uses one pays for it.
    """

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
            if trim:
                trim(0)
            with suppress(OSError):  # no such file, or read-only in a container: then the peak is NaN
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: proc_pid_clear_refs(5)
                self.before = resident("VmRSS")
        return self

    def __exit__(self, *_):
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            self.bytes = resident("VmHWM") - self.before if hasattr(self, "before") else math.nan


def resident(field):
    """A field of /proc/self/status in bytes; the kernel counts in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def fit_or_resume(trainer, folder):
    """Train from the start, or from the newest complete checkpoint of an interrupted run; then save the model there."""
    with PartialState().main_process_first():  # it removes what is incomplete
        checkpoint = newest_complete(Path(folder) / "checkpoints")
    if checkpoint:
        print(f"  resuming from {checkpoint.name}", flush=True)
        for counter in ("_total_train_tokens", "num_tokens"):  # TRL's and ours would begin at nothing again
            if hasattr(trainer, counter):
                setattr(trainer, counter, json.loads((checkpoint / COMPLETE).read_text())["num_tokens"])
    trainer.remove_callback(PrinterCallback)  # it prints every log entry; Progress prints a line every few seconds
    set_seed(trainer.args.seed)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(str(folder))
    PartialState().wait_for_everyone()
    if trainer.is_world_process_zero():
        _clear_up(Path(folder))


def _clear_up(folder):
    """Remove what only an unfinished training needs."""
    for mark in (folder / "checkpoints").glob(f"*/{COMPLETE}"):
        mark.unlink()  # first: a kill now must not leave half a checkpoint that is called complete
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for leftover in ("seconds.json", "training_args.bin"):
        (folder / leftover).unlink(missing_ok=True)


def newest_complete(checkpoints):
    """The complete checkpoint with the highest step, or None; incomplete ones are removed."""
    complete = []
    for path in Path(checkpoints).glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            complete.append(path)
        else:
            shutil.rmtree(path)
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def clock():
    """Seconds, told when a GPU has done all that it was given: without, it is timed how fast work is handed over."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def with_progress(batches, label, total):
    """Yield each batch (a list of items) in turn; one plain line every few seconds says how many items are done."""
    done, last_line = 0, time.perf_counter()
    for batch in batches:
        yield batch
        done += len(batch)
        if time.perf_counter() - last_line > SECONDS_BETWEEN_LINES:
            last_line = time.perf_counter()
            print(f"  {label}: {done}/{total}", flush=True)


def length_buckets(lengths, token_budget):
    """Indices grouped by length, longest first, each group at most `token_budget` padded tokens (or one long item)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batch = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > token_budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def read_log(folder):
    """The log entries of a finished training, a list of dicts."""
    with open(Path(folder) / "log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _drop_entries_after(path, step):
    """Entries later than the checkpoint resumed from will be written again, and so will a last line cut short."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")


def _read_seconds(folder):
    path = Path(folder) / "seconds.json"
    return json.loads(path.read_text())["seconds"] if path.is_file() else 0.0

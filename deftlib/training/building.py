"""The trainer of a method, as the profile sets it up: model, reference, data, arguments.

    trainer = build(folder, profile, "deft-dpo", 0, start, lists, q_diff_path, max_steps=20)     # guided, at omega 0

What the profile's `lora` and `economy` ask for is settled here; the trainers know nothing of profiles.
"""

import importlib.util
import math
import shutil
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import TrainingArguments
from trl import DPOConfig, RLOOConfig, SFTConfig

from deftlib.models import adapters, policies, rewards
from deftlib.models.loop import arguments
from deftlib.models.said import first_turn
from deftlib.models.wheels import ModelError
from deftlib.preferences.lists import read_lists
from deftlib.profile import ProfileError
from deftlib.training import encoding, launch, subset, trainers
from deftlib.training.trainers import LIST_METHODS

RECIPES = {  # method: the field of the profile's Training whose epochs, learning rate and omega it takes
    "sft": "sft",
    "ift": "sft",
    "dpo": "dpo",
    "rloo": "rloo",
    **{name: method.recipe for name, method in LIST_METHODS.items()},
}
TORCHAO = {"adamw_torch_8bit", "adamw_torch_4bit"}  # optimizers whose states have 8 and 4 bits
SPACING = {"bfloat16": 2**-8, "float16": 2**-11}  # of the numbers of a dtype, relative, at its least


def build(folder, profile, method, seed, start, lists, q_diff_path, **more):
    """The guided trainer of a method, at omega 0, on ranked lists; what `fit` runs.

    start: folder or hub id of the policy it starts from. lists: a Parquet file of ranked lists, or a Dataset. more:
    further `TrainingArguments`, e.g. max_steps=20. Raises ProfileError for settings whose updates would be lost,
    ModelError for a model that cannot be had.
    """
    base, training = method.removeprefix("deft-"), profile.training
    check_updates(profile, base)
    load = partial(policies.load_policy, start, profile.policy.dtype, place=launch.place_of_weights(profile))
    tokenizer, model = policies.load_tokenizer(start), _trainable(profile, start, seed, load)
    policies.check_pair(start, model.config, tokenizer, profile.text.prompt_tokens + profile.text.reply_tokens)
    kwargs = _arguments(folder, profile, base, seed)
    common = {"model": model, "processing_class": tokenizer, "ratio_steps": training.ratio_steps}
    common["q_diff"] = subset.load_q_diff(q_diff_path, tokenizer)
    if base == "rloo":
        place = policies.origin(start)  # TRL loads the reference from there by itself
        pinned = {"model_init_kwargs": {"revision": place["revision"]}} if "revision" in place else {}
        args = RLOOConfig(**kwargs | _on_policy(profile) | pinned | more)
        common |= {"reward_funcs": _r_train_reward(profile), "text": profile.text}
        rows = (lists if isinstance(lists, Dataset) else read_lists(lists)).select_columns(["prompt", "subset"])
        return trainers.GuidedOnPolicyTrainer(args=args, train_dataset=rows, **common)
    kwargs |= more
    places, num_proc = (folder / "rejects.jsonl", folder / "encoded"), profile.scale.num_proc
    encoded = encoding.encode_lists(lists, tokenizer, profile.text, *places, num_proc)
    if base == "sft":
        args = SFTConfig(**kwargs, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        rows = _with_lengths(profile, encoded).map(encoding.as_sft, remove_columns=encoded.column_names)
        return trainers.GuidedSFTTrainer(args=args, train_dataset=rows, **common)
    kept = folder if keeps_reference(profile, base) else None
    if base == "dpo":
        token_mean = training.dpo_sft_weight and training.sft_reduction == "token_mean"
        blend = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, training.dpo_sft_weight]} if token_mean else {}
        common |= {"summed_sft_weight": 0.0 if token_mean else training.dpo_sft_weight, "kept_in": kept}
        common["ref_model"] = None if kept else load()
        args = DPOConfig(**kwargs, beta=training.beta, max_length=None, precompute_ref_log_probs=bool(kept), **blend)
        rows = _with_lengths(profile, encoded).map(encoding.as_pair, remove_columns=["response_ids", "rewards"])
        return trainers.GuidedPairTrainer(args=args, train_dataset=rows, **common)
    common["args"] = TrainingArguments(**kwargs, remove_unused_columns=False)
    if base == "ift":
        common |= {"mixing": training.ift_mixing, "gamma": training.ift_gamma}
        common["detach_weights"] = training.ift_detach_weights
        common["data_collator"] = lambda rows: trainers.collate_lists(rows, tokenizer.pad_token_id)
        rows = _with_lengths(profile, encoding.responses_of(encoded, [0]))
        return trainers.GuidedIntuitiveTrainer(train_dataset=rows, **common)
    list_method, prefix_ids = LIST_METHODS[base], None
    if list_method.quality:
        prefix_ids = tokenizer(training.sr_prefix, add_special_tokens=False)["input_ids"]
    second_model = list_method.reference and not kept
    trainer = trainers.GuidedRankedListTrainer(
        train_dataset=_with_lengths(profile, encoding.responses_of(encoded, [0, -1]) if list_method.pairs else encoded),
        data_collator=lambda rows: trainers.collate_lists(rows, tokenizer.pad_token_id, prefix_ids),
        list_loss=lambda scores: list_method.loss(scores, training),
        scores_last_end=list_method.scores_last_end,
        reference=load() if second_model else None,
        **common,
    )
    if kept:
        trainer.keep_reference(kept)
    return trainer


# ---- what the profile's lora and economy ask for -----------------------------------------------------------------


def settings(profile, method):
    """The settings of `lora` and `economy` that change what a run of the method computes, for its key."""
    base = method.removeprefix("deft-")
    said = {"lora": vars(profile.lora)} if profile.lora.rank else {}
    said |= {"reference": "kept"} if keeps_reference(profile, base) else {}
    said |= {"group_by_length": True} if profile.economy.group_by_length and base != "rloo" else {}
    return said | ({"stochastic_rounding": True} if profile.economy.stochastic_rounding else {})


def keeps_reference(profile, base):
    """Whether the log-probabilities of a method's reference are taken once, before training, by the policy itself.

    Under `lora` always: that costs no second model, and no adapters to be switched off in every batch. RLOO's replies
    are not known before; TRL switches its adapters off, or loads a second model.
    """
    has_one = base == "dpo" or (base in LIST_METHODS and LIST_METHODS[base].reference)
    return has_one and (profile.economy.reference == "kept" or profile.lora.rank > 0)


def check_updates(profile, base):
    """Refuse settings under which most updates would be rounded away, and optimizers that are not there.

    Adam moves a weight by about the learning rate, and a 16-bit weight stays where it is if that is less than half the
    distance to its neighbour. A typical weight is 0.02, the standard deviation that models are initialised with.
    Raises ProfileError or ModelError.
    """
    dtype, optimizer, rounds = profile.policy.dtype, profile.training.optimizer, profile.economy.stochastic_rounding
    rate = getattr(profile.training, RECIPES[base]).learning_rate
    if rounds and (optimizer not in TORCHAO or dtype != "bfloat16"):
        raise ProfileError(
            f"economy.stochastic_rounding is for bfloat16 weights under {' or '.join(sorted(TORCHAO))}: "
            f"policy.dtype is {dtype}, training.optimizer {optimizer}"
        )
    if optimizer in TORCHAO and importlib.util.find_spec("torchao") is None:
        raise ModelError(f"{optimizer} comes from torchao, which is not installed: pip install 'deftlib[memory]'")
    if profile.lora.rank or rounds or dtype == "float32":  # adapters are float32
        return
    least = 0.02 * SPACING[dtype] / 2
    if rate < least:
        raise ProfileError(
            f"updates of {rate:g} vanish in {dtype} weights, where about {least:.0e} is the least that moves one: set "
            "policy.dtype=float32 (training.bf16 computes in bfloat16 all the same), lora.rank, or "
            "economy.stochastic_rounding with training.optimizer=adamw_torch_8bit"
        )


def _trainable(profile, start, seed, load):
    """The policy to train: all its weights, or adapters on it; an SFT policy's adapters are trained on."""
    dtype, lora = profile.policy.dtype, profile.lora
    if not lora.rank:
        if adapters.is_adapter(start) and dtype != "float32":
            raise ModelError(f"{start} holds LoRA weights, which {dtype} would round away: policy.dtype=float32")
        return load()
    if adapters.is_adapter(start):
        model = load(adapters_apart=True)
        if model.peft_config["default"].r != lora.rank:
            raise ModelError(f"{start} has adapters of rank {model.peft_config['default'].r}, not {lora.rank}")
        return model
    return adapters.wrapped(load(), lora, seed)


def finish(folder, start):
    """Have saved adapters name the model that they change, and drop the copy of the first ones that TRL saves too."""
    if adapters.is_adapter(folder):
        shutil.rmtree(Path(folder) / "ref", ignore_errors=True)
        below = adapters.base(start)[0] if adapters.is_adapter(start) else start
        adapters.name_base(folder, below, policies.identity(below))


def _with_lengths(profile, encoded):
    """The lists, with their tokens as `length` where batches are to hold lists of like lengths."""
    if not profile.economy.group_by_length:
        return encoded
    longest = lambda row: {"length": len(row["prompt_ids"]) + max(map(len, row["response_ids"]))}
    return encoded.map(longest)


# ---- arguments ---------------------------------------------------------------------------------------------------


def _arguments(folder, profile, base, seed):
    """Keyword arguments for any `TrainingArguments`, from the profile."""
    training, recipe, more = profile.training, getattr(profile.training, RECIPES[base]), {}
    if profile.economy.stochastic_rounding:
        more["optim_args"] = "bf16_stochastic_round=True"
    return arguments(
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
        **more,
    )


def _on_policy(profile):
    """RLOO's settings: `batch_size` prompts a micro-batch, each answered `generations` times.

    Checkpoints stand where a sampling is used up: what was sampled is in none of them.
    """
    recipe = profile.training.rloo
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

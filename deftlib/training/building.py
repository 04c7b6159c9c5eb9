"""The trainer of a method, as the profile sets it up: model, reference, data, arguments.

trainer = build(folder, profile, "deft-dpo", 0, start, lists, q_diff_path, max_steps=20)     # guided, at omega 0
"""

import math

from datasets import Dataset
from transformers import TrainingArguments
from trl import DPOConfig, RLOOConfig, SFTConfig

from deftlib.models import policies, rewards
from deftlib.models.loop import arguments
from deftlib.models.said import first_turn
from deftlib.preferences.lists import read_lists
from deftlib.training import encoding, subset, trainers
from deftlib.training.trainers import LIST_METHODS

RECIPES = {  # method: the field of the profile's Training whose epochs, learning rate and omega it takes
    "sft": "sft",
    "ift": "sft",
    "dpo": "dpo",
    "rloo": "rloo",
    **{name: method.recipe for name, method in LIST_METHODS.items()},
}


def build(folder, profile, method, seed, start, lists, q_diff_path, **more):
    """The guided trainer of a method, at omega 0, on ranked lists; what `fit` runs.

    start: folder or hub id of the policy it starts from. lists: a Parquet file of ranked lists, or a Dataset. more:
    further `TrainingArguments`, e.g. max_steps=20.
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
        rows = (lists if isinstance(lists, Dataset) else read_lists(lists)).select_columns(["prompt", "subset"])
        return trainers.GuidedOnPolicyTrainer(args=args, train_dataset=rows, **common)
    kwargs |= more
    places, num_proc = (folder / "rejects.jsonl", folder / "encoded"), profile.scale.num_proc
    encoded = encoding.encode_lists(lists, tokenizer, profile.text, *places, num_proc)
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

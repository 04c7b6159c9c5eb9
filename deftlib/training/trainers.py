"""The trainers behind the methods: TRL's own for SFT, DPO and RLOO, ours for losses over ranked lists and for IFT.

A method that is a loss over ranked lists is one line of `LIST_METHODS`. A batch of such a trainer is flat: `input_ids,
attention_mask, labels: int[N, T]` with the responses of all lists one under another, `rewards: float[N]`, and
`list_lengths`, B ints, the responses of each list, best first; lists of different lengths may share a batch.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer
from trl import DPOTrainer, RLOOTrainer, SFTTrainer
from trl.trainer import utils as trl_utils

from deftlib.method import losses
from deftlib.method.distribution import IGNORED
from deftlib.method.guidance import DistributionGuided
from deftlib.method.passes import outputs_of
from deftlib.models import policies
from deftlib.training import likelihood
from deftlib.training.encoding import GroupedByLength
from deftlib.training.likelihood import at_responses, response_log_probs, response_token_log_probs

# TRL's output head skips prompt and padding on GPUs only. On CPU it can too: the same losses, about half the time. And
# it computes logits twice, and gradients in float32, to hold few of them; on CPU they can stay, up to a limit. A TRL
# without these private names trains the same, only slower.
if hasattr(trl_utils, "_use_triton"):
    trl_utils._use_triton = lambda device: True
if hasattr(trl_utils, "_ChunkedLogProbFunction"):
    trl_utils._ChunkedLogProbFunction = likelihood.head_of_trl(trl_utils._ChunkedLogProbFunction)

FROZEN = ("reference_sums", "quality_reference_sums")  # fields of `Scores` that training does not change


# ---- the table of methods ----------------------------------------------------------------------------------------


@dataclass
class Scores:
    """What a loss may read of B ranked lists of L responses each, best first; all of shape [B, L]."""

    sums: torch.Tensor  # log-probabilities of the responses under the policy, nats
    counts: torch.Tensor  # their tokens
    lengths: torch.Tensor  # tokens of prompt and response
    rewards: torch.Tensor
    reference_sums: torch.Tensor | None = None  # under the frozen reference; of methods that have one
    quality_sums: torch.Tensor | None = None  # under the policy after the quality prefix, without gradient
    quality_reference_sums: torch.Tensor | None = None

    def of(self, rows):
        """The scores of the responses `rows`: int[B, L], from flat ones."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Scores(**{name: value if value is None else value[rows] for name, value in values.items()})


@dataclass(frozen=True)
class ListMethod:
    """A method that is a loss over ranked lists: `loss(Scores, the profile's Training)` -> scalar, mean over lists."""

    loss: Callable
    recipe: str  # the field of Training whose epochs, learning rate and omega it takes
    pairs: bool = False  # learns from the best and the worst response of a list
    reference: bool = False  # starts from the SFT model, which is its reference too (decision 7)
    quality: bool = False  # reads the pair after the quality prefix as well
    scores_last_end: bool = True  # False: `without_end_of_longest`


LIST_METHODS = {
    "rrhf": ListMethod(lambda s, t: losses.rrhf_loss(s.sums, s.counts, s.rewards), recipe="rrhf"),
    "rrhf-official": ListMethod(
        lambda s, t: losses.rrhf_official_loss(s.sums, s.lengths.amax(-1), s.rewards, t.rrhf_rank_weight),
        recipe="rrhf",
    ),
    "pro": ListMethod(lambda s, t: losses.pro_loss(s.sums, s.counts, t.pro_sft_weight), recipe="pro"),
    "pro-official": ListMethod(
        lambda s, t: losses.pro_official_loss(s.sums, s.counts, s.rewards, t.pro_sft_weight),
        recipe="pro",
        scores_last_end=False,
    ),
    "asft": ListMethod(lambda s, t: losses.asft_loss(s.sums, s.counts, t.asft_weight), recipe="pro", pairs=True),
    "ipo": ListMethod(
        lambda s, t: losses.ipo_loss(s.sums, s.reference_sums, s.counts, t.beta, t.ipo_length_normalised),
        recipe="dpo",
        pairs=True,
        reference=True,
    ),
    "sr-dpo": ListMethod(
        lambda s, t: losses.sr_dpo_loss(*_refined(s, t), beta=t.beta, weight=t.sr_weight),
        recipe="dpo",
        pairs=True,
        reference=True,
        quality=True,
    ),
    "sr-ipo": ListMethod(
        lambda s, t: losses.sr_ipo_loss(*_refined(s, t), beta=t.beta, weight=t.sr_weight),
        recipe="dpo",
        pairs=True,
        reference=True,
        quality=True,
    ),
}


def _refined(scores, training):
    """The arguments that both self-refined losses read, in the reading that the profile names."""
    reference = scores.quality_reference_sums if training.sr_with_reference else None
    return scores.sums, scores.reference_sums, scores.quality_sums, reference


# ---- ranked lists ------------------------------------------------------------------------------------------------


class RankedListTrainer(GroupedByLength, Trainer):
    """Any loss over ranked lists: `list_loss(Scores)` -> scalar, mean over lists.

    reference: a frozen model, for `Scores.reference_sums`, unless `keep_reference` is called; quality scores come where
    the batch holds quality rows.
    """

    loss_is_scaled_for_ga = False  # a mean over the lists of one micro-batch
    num_tokens = 0  # of all processes, up to the last log
    _tokens_since = 0  # of this one, on its device: reading them in every step would wait for it

    def __init__(self, *args, list_loss, reference=None, scores_last_end=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.list_loss, self.reference, self.scores_last_end = list_loss, reference, scores_last_end
        self.model_accepts_loss_kwargs = False  # the same for transformers < 5.19
        if reference is not None:  # under the same autocast as the policy: else the two would not start equal
            self.reference = self.accelerator.prepare_model(
                reference.requires_grad_(False), evaluation_mode=True
            ).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            self._tokens_since = self._tokens_since + inputs["attention_mask"].sum()
        loss, scored = self.loss_of(model, inputs)
        return (loss, scored) if return_outputs else loss

    def loss_of(self, model, inputs):
        """(loss, {"sums": [N], "counts": [N]}) of a flat batch: one rectangle for each length of list."""
        scores, lengths = self.scores(model, inputs), inputs["list_lengths"]
        there = partial(torch.Tensor.to, device=scores.sums.device, non_blocking=True)
        of_lists = [len(rows) * self.list_loss(scores.of(there(rows))) for rows in rows_by_length(lengths)]
        return sum(of_lists) / len(lengths), {"sums": scores.sums, "counts": scores.counts}

    def scores(self, model, inputs):
        """`Scores` of all responses of a batch, flat: [N]."""
        rows, quality = rows_of(inputs), rows_of(inputs, "quality_")
        if not self.scores_last_end:
            rows["labels"] = without_end_of_longest(**rows, eos_token_id=self.processing_class.eos_token_id)
        sums, counts = self.log_probs(model, rows)
        found = {"sums": sums, "counts": counts, "lengths": rows["attention_mask"].sum(-1)}
        with torch.no_grad():
            if quality:
                found["quality_sums"], _ = self.log_probs(model, quality)
            if self.reference is not None:
                found |= self.frozen_sums(self.reference, inputs)
        found |= {name: inputs[name] for name in FROZEN if name in inputs}
        return Scores(**found, rewards=inputs["rewards"])

    def frozen_sums(self, model, inputs):
        """What `Scores` holds of the reference, [N] each, under a model that is it."""
        sources = zip(FROZEN, (rows_of(inputs), rows_of(inputs, "quality_")))
        return {name: self.log_probs(model, rows)[0] for name, rows in sources if rows}

    def keep_reference(self, folder):
        """Take what the reference says of every list now, by the policy as it is, and put it into the dataset.

        From then on no reference is asked. folder: of the run, see `likelihood.kept_sums`.
        """
        lengths = [len(responses) for responses in self.train_dataset["response_ids"]]

        def of_batch(rows):
            inputs = self._prepare_inputs(self.data_collator(rows))
            with self.accelerator.autocast():
                flat = self.frozen_sums(self.model, inputs).values()
            of_lists = [pad_sequence(sums.split(inputs["list_lengths"]), batch_first=True) for sums in flat]
            return torch.cat([pad(sums, (0, max(lengths) - sums.shape[1])) for sums in of_lists], dim=1)

        sums = likelihood.kept_sums(self, of_batch, folder)
        for name, of_lists in zip(FROZEN, np.split(sums, sums.shape[1] // max(lengths), axis=1)):
            column = [values[:length].tolist() for values, length in zip(of_lists, lengths)]
            self.train_dataset = self.train_dataset.add_column(name, column)

    def log_probs(self, model, rows):
        return response_log_probs(model, self.accelerator.unwrap_model(model), **rows, mixed_head=True)

    def log(self, logs, start_time=None):
        if torch.is_tensor(self._tokens_since):
            self.num_tokens += int(self.accelerator.reduce(self._tokens_since, "sum"))
            self._tokens_since = 0
        super().log({**logs, "num_tokens": self.num_tokens}, start_time)


def rows_of(inputs, prefix=""):
    """What the model takes of a flat batch, [N, T] each; {} where it holds no rows of that prefix."""
    names = ("input_ids", "attention_mask", "labels")
    return {name: inputs[prefix + name] for name in names if prefix + name in inputs}


def rows_by_length(list_lengths):
    """Where the responses of the lists of each length stand in a flat batch: one int[B', L] for each L.

    list_lengths: B ints. They stay on the host, and so does this.
    """
    starts = [end - length for end, length in zip(accumulate(list_lengths), list_lengths)]
    for length in sorted(set(list_lengths)):
        yield torch.tensor([range(s, s + length) for s, each in zip(starts, list_lengths) if each == length])


def without_end_of_longest(input_ids, attention_mask, labels, eos_token_id):
    """The labels that the PRO authors' padding mask gives: the batch's longest rows do not score their EOS.

    Their responses carry no EOS of their own and are padded with it; the mask scores the first padding token after
    every response, and the longest rows of a batch have none. int[N, T], all; a response cut short keeps its labels.
    """
    labels = labels.clone()
    fills = attention_mask[:, -1] == 1
    labels[fills & (input_ids[:, -1] == eos_token_id), -1] = IGNORED
    return labels


def collate_lists(rows, pad_token_id, prefix_ids=None):
    """Rows of prompt_ids, response_ids, rewards (and FROZEN) -> a flat batch, as the top of this module describes it.

    prefix_ids: tokens of the quality prefix; with them come quality_input_ids, quality_attention_mask and
    quality_labels, the same rows with the prefix before the prompt.
    """
    batch = _padded([(row["prompt_ids"], r) for row in rows for r in row["response_ids"]], pad_token_id)
    if prefix_ids is not None:
        prefixed = [([*prefix_ids, *row["prompt_ids"]], r) for row in rows for r in row["response_ids"]]
        batch |= {f"quality_{name}": values for name, values in _padded(prefixed, pad_token_id).items()}
    for name in ("rewards", *FROZEN):
        if name in rows[0]:
            batch[name] = torch.tensor([value for row in rows for value in row[name]])
    batch["list_lengths"] = [len(row["response_ids"]) for row in rows]
    return batch


def _padded(pairs, pad_token_id):
    """(prompt, response) token ids -> input_ids, attention_mask, labels [N, T], padded on the right."""
    whole = [torch.tensor([*prompt, *response]) for prompt, response in pairs]
    labels = [torch.tensor([IGNORED] * len(prompt) + list(response)) for prompt, response in pairs]
    return {
        "input_ids": pad_sequence(whole, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in whole], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


# ---- intuitive fine-tuning ---------------------------------------------------------------------------------------


class IntuitiveTrainer(RankedListTrainer):
    """IFT on lists of one response: two passes, the second over inputs mixed with the first one's prediction.

    mixing: lambda, see `losses.intuitive_embeddings`. gamma, detach_weights: see `losses.ift_loss`. The frozen copy of
    the embedding is that of the model given. The authors' code takes the true tokens' embeddings from the frozen copy
    as well; here they are the model's own, so that without mixing and propagation training is SFT (our choice). R_dis
    is taken on the second pass, the one that is trained (our choice).
    """

    def __init__(self, model, *args, mixing=0.2, gamma=0.95, detach_weights=False, **kwargs):
        super().__init__(model, *args, list_loss=None, **kwargs)
        self.mixing, self.gamma, self.detach_weights = mixing, gamma, detach_weights
        embedding, device = copy.deepcopy(model.get_input_embeddings()).requires_grad_(False), self.args.device
        is_to_come = embedding.weight.is_meta  # FSDP2 may load weights in the first process alone
        self.frozen_embedding = embedding.to_empty(device=device) if is_to_come else embedding.to(device)
        if self.accelerator.num_processes > 1:
            torch.distributed.broadcast(self.frozen_embedding.weight, src=0)

    def loss_of(self, model, inputs):
        labels, rows = inputs["labels"], {name: inputs[name] for name in ("input_ids", "attention_mask")}
        unwrapped = self.accelerator.unwrap_model(model)
        with torch.no_grad():
            likeliest = lambda logits, targets: logits.argmax(-1)
            predicted = at_responses(likeliest, model, unwrapped, labels, mixed_head=True, **rows)
            own = self.frozen_embedding(losses.greedy_inputs(inputs["input_ids"], labels, predicted))
        mix = lambda module, args, embedded: losses.intuitive_embeddings(embedded, own, self.mixing)
        handle = unwrapped.get_input_embeddings().register_forward_hook(mix)  # inside the pass, so wrappers see it
        try:
            log_probs = response_token_log_probs(model, unwrapped, labels, mixed_head=True, **rows)
        finally:
            handle.remove()
        is_response = labels[:, 1:] != IGNORED
        loss = losses.ift_loss(log_probs, is_response, self.gamma, self.detach_weights)
        return loss, {"sums": log_probs.sum(-1), "counts": is_response.sum(-1)}


# ---- TRL's -------------------------------------------------------------------------------------------------------


class PairTrainer(GroupedByLength, DPOTrainer):
    """TRL's DPO on pre-tokenised pairs, plus A.1's SFT term on the summed NLL of the chosen reply (decision 6).

    kept_in: folder of the run, where the reference's log-probabilities are kept that `precompute_ref_log_probs` takes.
    """

    def __init__(self, *args, summed_sft_weight=0.0, kept_in=None, **kwargs):
        self.summed_sft_weight, self.kept_in = summed_sft_weight, kept_in
        super().__init__(*args, **kwargs)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        """As TRL's, but by length, and going on after a kill; of a reference that FSDP has dealt already, TRL's own."""
        if self.kept_in is None or self.is_deepspeed_enabled or (self.is_fsdp_enabled and self.ref_model):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        model = self.ref_model or self.model
        prepared = lambda rows: self._prepare_inputs(self.data_collator(rows))
        of_batch = lambda rows: torch.stack(self.compute_ref_log_probs(model, prepared(rows)), dim=1)
        chosen, rejected = likelihood.kept_sums(self, of_batch, self.kept_in).T
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # TRL would tokenise again, drop long prompts and cut replies by its own rules

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with outputs_of(self.accelerator.unwrap_model(model), only_with_gradients=False) as captured:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.summed_sft_weight:
            return result
        if not captured or getattr(captured[0], "log_probs", None) is None:
            raise ValueError(
                "this TRL's pass over the pairs shows no log_probs, so the SFT term cannot be added: use 0"
            )
        chosen = captured[0].log_probs.chunk(2)[0]  # the policy's pass is the first; LoRA's reference runs it once more
        loss = result[0] if return_outputs else result
        loss = loss + self.summed_sft_weight * losses.sft_loss(chosen.sum(1))
        return (loss, result[1]) if return_outputs else loss


class OnPolicyTrainer(RLOOTrainer):
    """TRL's RLOO on prompts in the project's one text format, cut on the left; it stands for the PPO of the paper."""

    def __init__(self, *args, text, **kwargs):
        self.text = text  # the profile's Text
        super().__init__(*args, **kwargs)

    def _tokenize_prompts(self, prompts):
        ids = [policies.encode_prompt(self.processing_class, prompt, self.text) for prompt in prompts]
        return ids, None, {}  # TRL would add special tokens and not cut


def lists_used(trainer):
    """How many lists an epoch sees: all, except that TRL's on-policy trainers leave out a last short sampling batch.

    Raises ValueError if they would see none.
    """
    lists = len(trainer.train_dataset)
    if not isinstance(trainer, RLOOTrainer):
        return lists
    prompts = trainer.args.generation_batch_size // trainer.num_generations
    if lists < prompts:
        raise ValueError(
            f"{lists} prompts do not fill one sampling batch of {prompts}: lower batch sizes or raise data"
        )
    return lists - lists % prompts


class GuidedSFTTrainer(DistributionGuided, GroupedByLength, SFTTrainer):
    """TRL's SFT with the distribution reward."""


class GuidedPairTrainer(DistributionGuided, PairTrainer):
    """TRL's DPO with the distribution reward."""


class GuidedOnPolicyTrainer(DistributionGuided, OnPolicyTrainer):
    """TRL's RLOO with the distribution reward, taken on what the policy said."""


class GuidedRankedListTrainer(DistributionGuided, RankedListTrainer):
    """RRHF, PRO, IPO and their like with the distribution reward."""


class GuidedIntuitiveTrainer(DistributionGuided, IntuitiveTrainer):
    """IFT with the distribution reward."""

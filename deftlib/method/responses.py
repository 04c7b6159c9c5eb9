"""Where the best responses of a batch stand in the forward pass that its trainer makes: one function per family.

    best = best_responses(inputs, end_ids)
    best.labels, best.rows         # int[K, T], -100 outside the tokens that count; which rows of the pass they are

TRL's SFT, DPO, KTO, GRPO, RLOO, CPO (SimPO), ORPO and this library's ranked lists are told by what their batches hold
(`FAMILIES`). Nothing here waits for the device.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from deftlib.method.distribution import IGNORED


@dataclass(frozen=True)
class Best:
    """The best responses of a batch."""

    labels: torch.Tensor  # int[K, T], -100 outside the tokens that count; a row without any adds 0 to the mean
    rows: slice | torch.Tensor  # which of the rows of the pass these are: a slice, or int[K]
    of: int  # how many rows the pass has
    count: int | torch.Tensor  # over how many responses their mean is taken
    segments: torch.Tensor | None = None  # int[K, T] where responses share rows: which of them a token belongs to


def _rows(labels, rows=slice(None), count=None):
    """Those of the rows of labels[N, T], averaged over as many or over `count`."""
    chosen = labels[rows]
    return Best(chosen, rows, len(labels), len(chosen) if count is None else count)


def _sft(batch):
    """Every labelled token; mask the prompt in the labels, else it is rewarded too.

    One row is one response, also under the packing strategy "wrapped", which cuts rows anywhere (our choice).
    """
    return _rows(batch["labels"])


def _flattened(batch):
    """SFT without padding, or packed: a response begins wherever the positions begin anew.

    What predicts a first token stands in another response, so it is not scored. A mean over the responses of each
    micro-batch, however many it packs (our choice); one token alone is no response: nothing predicts it.
    """
    positions = batch["position_ids"].expand(batch["labels"].shape)
    first = positions == 0
    first[:, 0] = True
    segments = first.flatten().cumsum(0) - 1
    attended = batch.get("attention_mask", torch.ones_like(positions))
    sizes = attended.new_zeros(positions.numel()).index_add(0, segments, attended.flatten())
    labels = batch["labels"].masked_fill(first, IGNORED)
    return replace(_rows(labels, count=(sizes > 1).sum()), segments=segments.view_as(labels))


def _dpo(batch):
    """The first half of [chosen; rejected], where the completion mask is."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    return _rows(labels, slice(0, len(labels) // 2))


def _kto(batch):
    """The desirable rows, averaged over all rows as KTO's own loss is: their mean times their share (our choice).

    So each of them weighs the same in whatever micro-batch it stands, and a micro-batch without any adds 0. A mean over
    the desirable rows of each micro-batch would weigh a row by how few others stand with it.
    """
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    return _rows(labels.masked_fill(~batch["label"].bool().unsqueeze(1), IGNORED))


def _sampled(batch):
    """GRPO, RLOO: every sampled completion (our choice: which of them are good is what the method is to find out).

    They stand after prompts padded on the left; what a tool said is not theirs.
    """
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    completions = batch["completion_ids"].masked_fill(mask == 0, IGNORED)
    return _rows(torch.cat([torch.full_like(batch["prompt_ids"], IGNORED), completions], dim=1))


def _cpo(batch):
    """CPO, SimPO, ORPO: the chosen rows; the trainer puts the rejected ones below, both padded to one length."""
    chosen, rejected = batch["chosen_labels"], batch["rejected_labels"]
    labels = pad(chosen, (0, max(rejected.shape[1] - chosen.shape[1], 0)), value=IGNORED)
    return Best(labels, slice(0, len(chosen)), len(chosen) + len(rejected), len(chosen))


def _ranked_lists(batch):
    """The first response of each list; the responses of all lists stand one under another.

    list_lengths: B ints, as a tensor or, so that they need not come back from the device, as a list.
    """
    lengths = torch.as_tensor(batch["list_lengths"])
    return _rows(batch["labels"], (lengths.cumsum(0) - lengths).to(batch["labels"].device, non_blocking=True))


FAMILIES = [  # the first whose keys are all there
    ({"prompt_ids", "completion_ids", "completion_mask"}, _sampled),
    ({"chosen_labels", "rejected_labels"}, _cpo),
    ({"input_ids", "completion_mask", "attention_mask", "label"}, _kto),
    ({"input_ids", "completion_mask", "attention_mask"}, _dpo),
    ({"labels", "list_lengths", "attention_mask"}, _ranked_lists),
    ({"labels", "position_ids"}, _flattened),
    ({"labels", "attention_mask"}, _sft),
]


def best_responses(inputs, end_ids):
    """Where the tokens of the best responses are, in the forward pass that the trainer will make of a batch: a `Best`.

    end_ids: the EOS tokens, which do not count, as a list or a tensor. A best response without a token, cut away or EOS
    alone, adds 0 to the mean (our choice). Raises ValueError for a batch of another family.
    """
    for keys, family in FAMILIES:
        if keys <= set(inputs):
            best = family(inputs)
            ends = torch.as_tensor(end_ids, dtype=best.labels.dtype, device=best.labels.device)
            return replace(best, labels=best.labels.masked_fill(torch.isin(best.labels, ends), IGNORED))
    raise ValueError(
        f"no response positions are known in a batch of {sorted(inputs)}: supported are SFT, DPO, KTO, GRPO, RLOO, "
        "CPO, ORPO and ranked lists"
    )

"""The distribution reward for any trainer: `class DeftKTOTrainer(DistributionGuided, KTOTrainer)`, Eq. 18.

The mixin captures the last hidden state that the trainer's own forward pass computes, folds q_diff through the output
head (the identity of `distribution`) and subtracts omega * R_dis from the loss. It costs one matrix-vector product and
a mean over hidden states: no second pass, no logits. With omega = 0 it only logs R_dis and leaves the loss and the
random state bit for bit alone.

TRL's SFT, DPO, KTO, GRPO, RLOO, CPO (SimPO), ORPO and this library's ranked-list trainers are known, by what their
batches hold (`FAMILIES`). A trainer with such batches works too, if it runs the policy on them as its family does;
any other is refused at its first batch.
"""

import copy
from collections import defaultdict
from contextlib import contextmanager

import torch
from torch.nn.functional import pad

from deftlib.method.distribution import IGNORED, folded_reward, reward_direction
from deftlib.method.heads import backbone, check_head, output_head


class DistributionGuided:
    """Adds -omega * R_dis of the best responses to a trainer's loss. Put it before the trainer class.

    q_diff: float64[V], Eq. 14, one entry per row of the output head or, where that is padded, per token. omega: its
    weight; fixed, or set by `calibrate`.
    ratio_steps: every so many updates log |omega grad R_dis| / |grad L_m| over the trainable parameters.
    Logs R_dis (mean over the responses scored), loss_method and gradient_ratio. Evaluation gives the plain loss.
    Raises ValueError for options and batches it cannot be exact on, HeadError for heads that do not fold.
    """

    def __init__(self, *args, q_diff, omega=0.0, ratio_steps=100, **kwargs):
        super().__init__(*args, **kwargs)
        if getattr(self.args, "packing", False) or getattr(self.args, "padding_free", False):
            raise ValueError("DistributionGuided needs one response per row: packing and padding_free are refused")
        if getattr(self.args, "tpo_alpha", 0):  # its batches look like DPO's and hold the gold answers as a third part
            raise ValueError("TPO's gold answers are not told apart from its pairs: tpo_alpha > 0 is refused")
        if ratio_steps and (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("gradient_ratio cannot be had under use_reentrant=True: leave that out, or ratio_steps=0")
        if not hasattr(self.processing_class, "eos_token_id"):
            raise ValueError("DistributionGuided needs a tokenizer as processing_class: it says which token is EOS")
        weight, _, _ = output_head(self.model)
        check_head(self.model)
        self.q_diff = self._of_all_rows(torch.as_tensor(q_diff), len(weight))
        self.omega, self.ratio_steps = omega, ratio_steps
        # GRPO and RLOO end a completion at any EOS of the generation config and name them so
        ends = getattr(self, "eos_token_ids", [self.processing_class.eos_token_id])
        self.end_ids = [token for token in ends if token is not None]
        self._guided = defaultdict(list)

    def _of_all_rows(self, q_diff, rows):
        """q_diff with a zero for every row of the head that no token of the tokenizer has."""
        known = len(self.processing_class) if hasattr(self.processing_class, "__len__") else rows
        if len(q_diff) not in (rows, known) or len(q_diff) > rows:
            found = f"q_diff has {len(q_diff)} entries, the head {rows} rows and the tokenizer {known} tokens"
            raise ValueError(f"{found}: count it with this tokenizer")
        return torch.nn.functional.pad(q_diff, (0, rows - len(q_diff)))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        result, rewards, count = self._loss_and_rewards(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        steps = self._accumulation(num_items_in_batch)
        self._guided["R_dis"].append(rewards.detach())
        self._guided["loss_method"].append(loss.detach().reshape(1) * steps)
        if self.omega != 0:
            reward = rewards.sum() / count
            if self.ratio_steps and self.state.global_step % self.ratio_steps == 0:
                method, guide = self.gradient_norms(loss * steps, reward)
                self._guided["gradient_ratio"].append((abs(self.omega) * guide / method).reshape(1))
            loss = loss - self.omega * reward / steps
        return (loss, result[1]) if return_outputs else loss

    def _loss_and_rewards(self, model, inputs, *args):
        """(what the trainer's compute_loss returns, R_dis [k] of the best responses, over how many rows to average)."""
        labels, count = best_responses(inputs, self.end_ids)
        with outputs_of(backbone(self.accelerator.unwrap_model(model))) as captured:
            result = super().compute_loss(model, inputs, *args)
        return result, self.rewards_of([output.last_hidden_state for output in captured], labels), count

    def rewards_of(self, passes, labels):
        """R_dis of the rows of labels[N, T] that have any [k], with gradient through head and hidden states.

        passes: what the backbone returned, float[n, T, d] each, together the N rows; float32 or better inside.
        Raises ValueError if they are not: the trainer does not run its family's batch as it stands.
        """
        shapes = [tuple(hidden.shape[:2]) for hidden in passes]
        if sum(rows for rows, _ in shapes) != len(labels) or {length for _, length in shapes} != {labels.shape[1]}:
            raise ValueError(
                f"the policy ran with gradients on {shapes or 'nothing'} (rows, tokens), but the batch holds "
                f"{tuple(labels.shape)}: R_dis cannot be read from this trainer's passes"
            )
        hidden = torch.cat(passes) if len(passes) > 1 else passes[0]  # a trainer may run its batch in chunks
        weight, bias, scale = output_head(self.model)
        direction = reward_direction(weight, self.q_diff)
        offset = 0.0 if bias is None else reward_direction(bias, self.q_diff)
        scored = (labels[:, 1:] != IGNORED).any(1)
        return scale * folded_reward(hidden[scored], labels[scored], direction, offset)

    def calibrate(self, ratio, batches):
        """Set omega so that |omega grad R_dis| / |grad L_m| = ratio, from the first micro-batches before any update.

        The norms are means over `batches` micro-batches, over the trainable parameters. Returns omega. Decision 11.
        Leaves weights, counters, logs and torch's random state as they were; GRPO and RLOO generate for it apart.
        Raises ValueError if either gradient is zero throughout.
        """
        apart, norms, training = self._apart(), [], self.model.training
        self.model.train()
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            for step, inputs in zip(range(batches), self.get_train_dataloader()):
                apart._step = step  # GRPO and RLOO count micro-batches, to know when to generate
                inputs = apart._prepare_inputs(inputs)
                loss, rewards, count = apart._loss_and_rewards(self.model, inputs)
                norms.append(self.gradient_norms(loss, rewards.sum() / count))
        self.model.train(training)
        method, guide = (float(sum(values)) for values in zip(*norms))
        if not method or not guide:
            name = "R_dis" if method else "the trainer's own loss"
            raise ValueError(f"{name} has no gradient in {len(norms)} micro-batches: take more, or set omega yourself")
        self.omega = ratio * method / guide
        return self.omega

    def _apart(self):
        """This trainer with counters, buffers and logs of its own, at the start of an update of one micro-batch."""
        apart = copy.copy(self)  # a number set on the copy stays there; what changes in place is copied deeply
        for name in vars(self).keys() & {"state", "_metrics", "_stored_metrics", "_logs"}:
            setattr(apart, name, copy.deepcopy(getattr(self, name)))
        apart.current_gradient_accumulation_steps = 1  # GRPO divides by it; transformers sets it in training alone
        return apart

    def gradient_norms(self, loss, reward):
        """(|grad loss|, |grad reward|) over the trainable parameters; the graph stays for the backward pass to come."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]

        def norm(value):
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            return torch.stack([g.float().norm() for g in gradients if g is not None]).norm()

        return norm(loss), norm(reward)

    def log(self, logs, start_time=None):
        if self.model.training:
            values = {name: torch.cat(parts) for name, parts in self._guided.items()}
            logs.update({name: numbers.mean().item() for name, numbers in values.items() if len(numbers)})
            self._guided.clear()
        super().log(logs, start_time)

    def _accumulation(self, num_items_in_batch):
        """The micro-batches of one update if the trainer's loss is already divided by them, else 1.

        The rule of `transformers.Trainer.training_step`: SFT (by tokens) and GRPO divide, all others leave it to it.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_items or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1


# ---- where the best responses are: (labels[N, T] of the trainer's pass, ignored elsewhere; how many rows) ----------


def _sft(batch):
    """Every labelled token; mask the prompt in the labels, else it is rewarded too."""
    return batch["labels"], len(batch["labels"])


def _dpo(batch):
    """The first half of [chosen; rejected], where the completion mask is."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    pairs = len(labels) // 2
    labels[pairs:] = IGNORED
    return labels, pairs


def _kto(batch):
    """The desirable rows, averaged over all rows as KTO's own loss is: their mean times their share (our choice).

    So each of them weighs the same in whatever micro-batch it stands, and a micro-batch without any adds 0. A mean over
    the desirable rows of each micro-batch would weigh a row by how few others stand with it.
    """
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    return labels.masked_fill(~batch["label"].bool().unsqueeze(1), IGNORED), len(labels)


def _sampled(batch):
    """GRPO, RLOO: every sampled completion (our choice: which of them are good is what the method is to find out).

    They stand after prompts padded on the left; what a tool said is not theirs.
    """
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    completions = batch["completion_ids"].masked_fill(mask == 0, IGNORED)
    return torch.cat([torch.full_like(batch["prompt_ids"], IGNORED), completions], dim=1), len(completions)


def _cpo(batch):
    """CPO, SimPO, ORPO: the chosen rows; the trainer puts the rejected ones below, both padded to one length."""
    chosen, rejected = batch["chosen_labels"], batch["rejected_labels"]
    length = max(chosen.shape[1], rejected.shape[1])
    labels = pad(chosen, (0, length - chosen.shape[1], 0, len(rejected)), value=IGNORED)
    return labels, len(chosen)


def _ranked_lists(batch):
    """The first response of each list; the responses of all lists stand one under another."""
    best = batch["list_lengths"].cumsum(0) - batch["list_lengths"]
    labels = torch.full_like(batch["labels"], IGNORED)
    labels[best] = batch["labels"][best]
    return labels, len(best)


FAMILIES = [  # the first whose keys are all there; packed and padding-free batches have no attention_mask
    ({"prompt_ids", "completion_ids", "completion_mask"}, _sampled),
    ({"chosen_labels", "rejected_labels"}, _cpo),
    ({"input_ids", "completion_mask", "attention_mask", "label"}, _kto),
    ({"input_ids", "completion_mask", "attention_mask"}, _dpo),
    ({"labels", "list_lengths", "attention_mask"}, _ranked_lists),
    ({"labels", "attention_mask"}, _sft),
]


def best_responses(inputs, end_ids):
    """Where the tokens of the best responses are, in the forward pass that the trainer will make of a batch.

    end_ids: the EOS tokens, which do not count. Returns (labels: int[N, T], -100 elsewhere; count: over how many rows
    the mean is taken). A best response without a token, cut away or EOS alone, adds 0 to it (our choice).
    Raises ValueError for a batch of another family.
    """
    for keys, family in FAMILIES:
        if keys <= set(inputs):
            labels, count = family(inputs)
            return labels.masked_fill(torch.isin(labels, labels.new_tensor(end_ids)), IGNORED), count
    raise ValueError(
        f"no response positions are known in a batch of {sorted(inputs)}: supported are SFT, DPO, KTO, GRPO, RLOO, "
        "CPO, ORPO and ranked lists, with one response per row"
    )


@contextmanager
def outputs_of(module, only_with_gradients=True):
    """Collects what a module returns in every forward pass, or in those with gradients: not LoRA's reference pass."""
    captured = []

    def keep(module, args, output):
        if torch.is_grad_enabled() or not only_with_gradients:
            captured.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()

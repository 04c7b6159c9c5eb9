"""The distribution reward for any trainer: `class DeftKTOTrainer(DistributionGuided, KTOTrainer)`, Eq. 18.

The mixin captures the last hidden state that the trainer's own forward pass computes, folds q_diff through the output
head (the identity of `distribution`) and subtracts omega * R_dis from the loss. It costs one matrix-vector product and
a mean over hidden states: no second pass, no logits. With omega = 0 it only logs R_dis and leaves the loss and the
random state bit for bit alone.

TRL's SFT, DPO, KTO, GRPO, RLOO, CPO (SimPO), ORPO and this library's ranked-list trainers are known, by what their
batches hold (`responses.FAMILIES`). A trainer with such batches works too, if it runs the policy on them as its family
does; any other is refused at its first batch.

Under `accelerate launch` it works with DDP and FSDP2. R_dis is a mean over the rows of each micro-batch, of which every
process has as many, so its gradient is averaged over processes as the method's is. What is logged is gathered.
"""

import copy
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from itertools import islice

import torch
from torch.nn.functional import pad

from deftlib.method.distribution import (
    IGNORED,
    folded_reward_of_segments,
    folded_reward_or_zero,
    reward_direction,
)
from deftlib.method.heads import check_head, output_head, virtual_tokens
from deftlib.method.passes import at_the_head, gradient_norm
from deftlib.method.responses import best_responses


class DistributionGuided:
    """Adds -omega * R_dis of the best responses to a trainer's loss. Put it before the trainer class.

    q_diff: float64[V], Eq. 14, one entry per row of the output head or, where that is padded, per token. omega: its
    weight; fixed, or set by `calibrate`.
    ratio_steps: every so many updates log |omega grad R_dis| / |grad L_m| over the trainable parameters: the mean over
    the update's micro-batches; under FSDP2, which has no gradient of one process, its first one. 0: never.
    Logs R_dis (mean over the responses scored), loss_method and gradient_ratio. Evaluation gives the plain loss.
    Raises ValueError for options and batches it cannot be exact on, HeadError for heads that do not fold.
    """

    micro_batches_split = False  # whether a micro-batch is what all processes hold at a time, each an equal part of it

    def __init__(self, *args, q_diff, omega=0.0, ratio_steps=100, **kwargs):
        super().__init__(*args, **kwargs)
        if getattr(self.args, "tpo_alpha", 0):  # its batches look like DPO's and hold the gold answers as a third part
            raise ValueError("TPO's gold answers are not told apart from its pairs: tpo_alpha > 0 is refused")
        if not hasattr(self.processing_class, "eos_token_id"):
            raise ValueError("DistributionGuided needs a tokenizer as processing_class: it says which token is EOS")
        check_processes(self)
        weight, _, _ = output_head(self.model)
        check_head(self.model)
        self.q_diff = self._of_all_rows(torch.as_tensor(q_diff), len(weight))
        self.omega, self.ratio_steps = omega, ratio_steps
        # GRPO and RLOO end a completion at any EOS of the generation config and name them so
        ends = getattr(self, "eos_token_ids", [self.processing_class.eos_token_id])
        self.end_ids = [token for token in ends if token is not None]
        # There once and for all: a copy in every step would wait for the device.
        self._vector = self.q_diff.to(torch.promote_types(weight.dtype, torch.float32)).to(self.args.device)
        self._ends = torch.tensor(self.end_ids, device=self.args.device)
        self._guided, self._measured_at = defaultdict(list), None

    def _of_all_rows(self, q_diff, rows):
        """q_diff with a zero for every row of the head that no token of the tokenizer has."""
        known = len(self.processing_class) if hasattr(self.processing_class, "__len__") else rows
        if len(q_diff) not in (rows, known) or len(q_diff) > rows:
            found = f"q_diff has {len(q_diff)} entries, the head {rows} rows and the tokenizer {known} tokens"
            raise ValueError(f"{found}: count it with this tokenizer")
        return pad(q_diff, (0, rows - len(q_diff)))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._log_ratio(inputs)
        result, rewards, scored, count = self._loss_and_rewards(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        steps = self._accumulation(num_items_in_batch)
        self._guided["R_dis"].append((rewards.detach(), scored))
        self._guided["loss_method"].append((loss.detach() * steps, torch.ones_like(loss, dtype=torch.bool)))
        if self.omega != 0:
            loss = loss - self.omega * (rewards.sum() / count) / steps
        return (loss, result[1]) if return_outputs else loss

    def _loss_and_rewards(self, model, inputs, *args):
        """(what the trainer's compute_loss returns, R_dis[k] of the best responses, bool[k]: which have a token,
        over how many to average)."""
        best = best_responses(inputs, self._ends)

        def fold(hidden, weight, bias, scale):
            offset = 0.0 if bias is None else scale * reward_direction(bias, self._vector)
            return hidden, scale * reward_direction(weight, self._vector), offset

        with at_the_head(self.accelerator.unwrap_model(model), fold) as passes:
            result = super().compute_loss(model, inputs, *args)
        return result, *self.rewards_of(passes, best), best.count

    def rewards_of(self, passes, best):
        """(R_dis[k], bool[k]) of the best responses, with gradient through head and hidden states; which have a token.

        passes: (hidden[n, T, d], direction[d], offset) of each forward pass, together the rows of the batch; float32 or
        better inside. Raises ValueError if they are not: the trainer does not run its family's batch as it stands.
        """
        length, virtual = best.labels.shape[1], virtual_tokens(self.model)
        shapes = [tuple(hidden.shape[:2]) for hidden, _, _ in passes]
        lengths = {found for _, found in shapes}
        if sum(rows for rows, _ in shapes) != best.of or lengths not in ({length}, {length + virtual}):
            raise ValueError(
                f"the policy ran with gradients on {shapes or 'nothing'} (rows, tokens), but the batch holds "
                f"{(best.of, length)}: R_dis cannot be read from this trainer's passes"
            )
        hidden = torch.cat([hidden for hidden, _, _ in passes]) if len(passes) > 1 else passes[0][0]
        _, direction, offset = passes[0]
        if best.segments is not None:
            if virtual:
                raise ValueError("virtual tokens stand before the first of the responses of a row: do not pack them")
            return folded_reward_of_segments(hidden[best.rows], best.labels, best.segments, direction, offset)
        labels = pad(best.labels, (hidden.shape[1] - length, 0), value=IGNORED)  # virtual tokens stand first
        return folded_reward_or_zero(hidden[best.rows], labels, direction, offset)

    # ---- how large the two gradients are -------------------------------------------------------------------------

    def calibrate(self, ratio, batches):
        """Set omega so that |omega grad R_dis| / |grad L_m| = ratio, from the first micro-batches before any update.

        The norms are means over `batches` micro-batches, over the trainable parameters, under the training's autocast.
        Several processes measure each micro-batch together: the omega of one process. Returns it. Decision 11.
        Leaves weights, counters, logs and torch's random state as they were; GRPO and RLOO generate for it apart.
        Raises ValueError if either gradient is zero throughout.
        """
        self._wrap()
        apart, training = self._apart(), self.model.training
        self.model.train()
        with self._random_state_kept():
            norms = [apart.gradient_norms(inputs) for inputs in islice(self._micro_batches(apart), batches)]
        self.model.train(training)
        method, guide = self.accelerator.reduce(sum(norms), "mean").tolist()  # alike but for dropout
        if not method or not guide:
            name = "R_dis" if method else "the trainer's own loss"
            raise ValueError(f"{name} has no gradient in {len(norms)} micro-batches: take more, or set omega yourself")
        self.omega = ratio * method / guide
        return self.omega

    def gradient_norms(self, inputs):
        """|grad L_m| and |grad R_dis| of a prepared micro-batch over the trainable parameters: float[2].

        Two forward and two backward passes, so that no graph is kept and any wrapper and checkpointing take part, under
        one random state. Past DDP's own forward pass, which would have them sum gradients up.
        """
        norms, sharded = [], hasattr(self.model, "set_requires_gradient_sync")
        split = self.micro_batches_split and self.accelerator.num_processes > 1
        averaged = (lambda gradient: self.accelerator.reduce(gradient, "mean")) if split else None
        tokens = self._get_num_items_in_batch([inputs], self.args.device) if split else None  # of SFT's mean, in all
        for kept in (self._random_state_kept(), nullcontext()):
            with kept:
                loss, rewards, _, count = self._loss_and_rewards(self.model, dict(inputs), False, tokens)
            value = loss if not norms else rewards.sum() / count
            if norms and sharded:  # FSDP2 gathers its weights where the gradient of the model's output comes by
                value = value + 0 * loss
            norms.append(gradient_norm(self.model, value, averaged))
            del loss, rewards, value  # what is left of this graph, before the next is built
        return torch.stack(norms)

    def _log_ratio(self, inputs):
        """Measures the ratio where it is due, past the gradients that training accumulates."""
        step = self.state.global_step
        if not self.omega or not self.ratio_steps or step % self.ratio_steps:
            return
        if hasattr(self.model, "set_requires_gradient_sync"):  # gradients it accumulates are held where none can be put
            if step == self._measured_at:
                return
            inputs, self._measured_at = self._from_process(0, inputs), step
        with self._random_state_kept(), self._gradients_kept():
            method, guide = self._apart().gradient_norms(inputs)
        ratio = abs(self.omega) * guide / method
        self._guided["gradient_ratio"].append((ratio, torch.ones_like(ratio, dtype=torch.bool)))

    def _wrap(self):
        """Wraps the model as training will, in its autocast and its shards; `train()` finds it so, as a second one."""
        self.create_optimizer()
        self.model_wrapped, self.optimizer = self.accelerator.prepare(self.model_wrapped, self.optimizer)
        if self.is_fsdp_enabled:
            self.model = self.model_wrapped
            self.accelerator.state.fsdp_plugin.activation_checkpointing = False  # done, and prepare() would do it again

    def _micro_batches(self, apart):
        """The prepared micro-batches of training, in the order of one process, each of them in all processes."""
        for step, inputs in enumerate(self.get_train_dataloader()):
            apart._step = step  # GRPO and RLOO count micro-batches, to know when to generate
            inputs = apart._prepare_inputs(inputs)
            for process in range(1 if self.micro_batches_split else self.accelerator.num_processes):
                yield self._from_process(process, inputs)

    def _from_process(self, process, inputs):
        """The micro-batch of one process, in all: only so is a gradient that FSDP2 averages that of one micro-batch."""
        if self.accelerator.num_processes == 1 or self.micro_batches_split:
            return inputs
        mine = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        shared = [mine]
        torch.distributed.broadcast_object_list(shared, src=process)
        return self._prepare_input(shared[0])

    @contextmanager
    def _gradients_kept(self):
        """Keeps what training accumulates from a measurement; within it FSDP2 reduces gradients at once."""
        if hasattr(self.model, "set_requires_gradient_sync"):
            self.model.set_requires_gradient_sync(True)
            yield
            state = self.accelerator.gradient_state
            each = state.plugin_kwargs.get("sync_each_batch", False)
            self.model.set_requires_gradient_sync(state.sync_gradients or each)
            return
        kept = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        for parameter, _ in kept:
            parameter.grad = None
        yield
        for parameter, gradient in kept:
            parameter.grad = gradient

    def _random_state_kept(self):
        return torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else [])

    def _apart(self):
        """This trainer with counters, buffers and logs of its own, at the start of an update of one micro-batch."""
        apart = copy.copy(self)  # a number set on the copy stays there; what changes in place is copied deeply
        for name in vars(self).keys() & {"state", "_metrics", "_stored_metrics", "_logs"}:
            setattr(apart, name, copy.deepcopy(getattr(self, name)))
        apart.current_gradient_accumulation_steps = 1  # GRPO divides by it; transformers sets it in training alone
        return apart

    # ---- log, accumulation ---------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        if self.model.training and self._guided:
            logs.update(self._means())
        super().log(logs, start_time)

    def _means(self):
        """The mean over all processes of what was collected since the last log, by name; none where nothing was."""
        names, parts = list(self._guided), []
        for collected in self._guided.values():
            values, counted = (torch.cat([each.reshape(-1) for each in column]) for column in zip(*collected))
            parts.append(torch.stack([values.sum().float(), counted.sum().float()]))
        self._guided.clear()
        sums, numbers = self.accelerator.reduce(torch.stack(parts), "sum").unbind(1)
        means = torch.stack([sums / numbers, numbers], dim=1).tolist()
        return {name: mean for name, (mean, number) in zip(names, means) if number}

    def _accumulation(self, num_items_in_batch):
        """The micro-batches of one update if the trainer's loss is already divided by them, else 1.

        The rule of `transformers.Trainer.training_step`: SFT (by tokens) and GRPO divide, all others leave it to it.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_items or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1


def check_processes(trainer):
    """Raises ValueError by name for ways to use several devices that are not known to be exact: all but DDP, FSDP2."""
    if trainer.args.n_gpu > 1:
        raise ValueError(f"one process sees {trainer.args.n_gpu} GPUs: start one for each, with `accelerate launch`")
    if trainer.is_deepspeed_enabled:
        raise ValueError("DistributionGuided is not tried with DeepSpeed: train with DDP or FSDP2")
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError("DistributionGuided reads the head's weight, which FSDP 1 flattens: set fsdp_version to 2")
    if trainer.args.ddp_static_graph:
        raise ValueError("ddp_static_graph counts backward passes, and measuring the ratio adds some: leave it out")
    split = getattr(trainer.accelerator, "parallelism_config", None)
    if split is not None and (split.tp_enabled or split.cp_enabled or split.sp_enabled):
        raise ValueError(
            "a response split over processes (tensor, context, sequence parallelism) has no R_dis of its own"
        )

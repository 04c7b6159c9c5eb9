"""The distribution reward for any trainer: `class DeftDPOTrainer(DistributionGuided, DPOTrainer)`, Eq. 18.

The mixin captures the last hidden state that the trainer's own forward pass computes, folds q_diff through the output
head (design section 3) and subtracts omega * R_dis from the loss: one matrix-vector product, no second pass. With
omega = 0 it only logs R_dis and leaves the loss bit for bit alone.
"""

from collections import defaultdict
from contextlib import contextmanager

import torch

from deftlib.distribution import IGNORED, folded_reward, reward_direction
from deftlib.models import backbone, output_head


class DistributionGuided:
    """Adds -omega * R_dis of the best responses to a trainer's loss. Put it before the trainer class.

    q_diff: float64[V], Eq. 14, one entry per row of the output head. omega: its weight; fixed, or set by `calibrate`.
    ratio_steps: every so many updates log |omega grad R_dis| / |grad L_m| over the trainable parameters.
    Logs R_dis, loss_method and gradient_ratio. In evaluation the plain loss is returned.
    Raises ValueError for packed or padding-free batches, ModelError for heads that do not fold.
    """

    def __init__(self, *args, q_diff, omega=0.0, ratio_steps=100, **kwargs):
        super().__init__(*args, **kwargs)
        if getattr(self.args, "packing", False) or getattr(self.args, "padding_free", False):
            raise ValueError("DistributionGuided needs one response per row: packing and padding_free are refused")
        weight, _, _ = output_head(self.model)
        if len(q_diff) != len(weight):
            raise ValueError(f"q_diff has {len(q_diff)} entries, the head {len(weight)} rows: another tokenizer?")
        self.q_diff = torch.as_tensor(q_diff)
        self.omega, self.ratio_steps = omega, ratio_steps
        self._guided = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rows, labels = best_responses(inputs, self.processing_class.eos_token_id)
        with outputs_of(backbone(self.accelerator.unwrap_model(model))) as captured:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        with torch.set_grad_enabled(self.omega != 0):
            reward = self.reward_of(captured[0].last_hidden_state[rows], labels)
        steps = self._accumulation(num_items_in_batch)
        self._guided["R_dis"].append(reward.detach())
        self._guided["loss_method"].append(loss.detach() * steps)
        if self.omega != 0:
            if self.ratio_steps and self.state.global_step % self.ratio_steps == 0:
                method, guide = self.gradient_norms(loss * steps, reward)
                self._guided["gradient_ratio"].append(abs(self.omega) * guide / method)
            loss = loss - self.omega * reward / steps
        return (loss, result[1]) if return_outputs else loss

    def reward_of(self, hidden, labels):
        """Mean R_dis of the rows, gradient through hidden states and head; float32 or better."""
        weight, bias, scale = output_head(self.model)
        direction = reward_direction(weight, self.q_diff)
        offset = 0.0 if bias is None else reward_direction(bias, self.q_diff)
        return scale * folded_reward(hidden, labels, direction, offset).mean()

    def calibrate(self, ratio, batches):
        """Set omega so that |omega grad R_dis| / |grad L_m| = ratio, from the first micro-batches before any update.

        The norms are means over `batches` micro-batches, over the trainable parameters. Returns omega. Decision 11.
        """
        method_norms, guide_norms = [], []
        self.model.train()
        for _, inputs in zip(range(batches), self.get_train_dataloader()):
            inputs = self._prepare_inputs(inputs)
            rows, labels = best_responses(inputs, self.processing_class.eos_token_id)
            with outputs_of(backbone(self.accelerator.unwrap_model(self.model))) as captured:
                loss = super().compute_loss(self.model, inputs)
            method, guide = self.gradient_norms(loss, self.reward_of(captured[0].last_hidden_state[rows], labels))
            method_norms.append(method)
            guide_norms.append(guide)
        self.omega = ratio * float(sum(method_norms) / sum(guide_norms))
        return self.omega

    def gradient_norms(self, loss, reward):
        """(|grad loss|, |grad reward|) over the trainable parameters; the graph stays for the backward pass to come."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]

        def norm(value):
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            return torch.stack([g.float().norm() for g in gradients if g is not None]).norm()

        return norm(loss), norm(reward)

    def log(self, logs, start_time=None):
        if self.model.training:
            logs.update({name: torch.stack(values).mean().item() for name, values in self._guided.items()})
            self._guided.clear()
        super().log(logs, start_time)

    def _accumulation(self, num_items_in_batch):
        """The micro-batches of one update if the trainer's loss is already divided by them, else 1."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return self.current_gradient_accumulation_steps if scaled else 1


def best_responses(inputs, eos_token_id):
    """Which rows of a batch hold best responses, and where their tokens are: (rows, labels[b, T] with EOS ignored).

    SFT batches carry `labels`; DPO batches a `completion_mask` with the chosen half first; ranked-list batches `labels`
    of shape [B, L, T], best response first, whose hidden states come flattened to [B * L, T, d].
    Raises ValueError for a batch of another family.
    """
    other_family = {"label", "prompt_ids", "KL_input_ids"} & set(inputs)  # KTO, GRPO and RLOO carry a mask too
    if "completion_mask" in inputs and "input_ids" in inputs and not other_family:  # DPO: [chosen; rejected]
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        rows = slice(0, len(labels) // 2)
        labels = labels[rows]
    elif "labels" in inputs and inputs["labels"].ndim == 3:
        rows, labels = slice(0, None, inputs["labels"].shape[1]), inputs["labels"][:, 0]
    elif "labels" in inputs and not other_family:
        rows, labels = slice(None), inputs["labels"]
    else:
        raise ValueError(f"no response positions in a batch of {sorted(inputs)}: this trainer family is not supported")
    return rows, labels.masked_fill(labels == eos_token_id, IGNORED)


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

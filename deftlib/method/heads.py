"""The output head of a causal language model, z = scale * (W h + b): what the distribution reward is folded through.

    weight, bias, scale = output_head(model)          # refused by name where the logits are anything else
    hidden = backbone(model)(input_ids).last_hidden_state

Models are recognised by what they have, not by their class: nothing of transformers or PEFT is imported here.
"""

import torch
from torch.nn.functional import linear

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class HeadError(RuntimeError):
    """A head that the distribution reward cannot be folded through: the identity of `distribution` fails there."""


def base_model(model):
    """The causal language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model):
    """The transformer below the output head, whose last hidden state is h in z = W h."""
    model = base_model(model)
    return getattr(model, model.base_model_prefix)


def output_head(model):
    """(W[V, d], b[V] or None, scale): the logits are scale * (W h + b), one hidden state h for each token.

    Under PEFT these are the weights in use: of a head in `modules_to_save` or with trainable tokens, the trained copy.
    A head that FSDP2 has sharded by itself is gathered. Raises HeadError by name where the logits are anything else:
    soft-capped, an adapter on the head, an encoder-decoder, no head at all. There the identity of `distribution` fails.
    """
    model = base_model(model)
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise HeadError(f"{config.model_type} is an encoder-decoder: R_dis needs a decoder that reads its prompt")
    for name in SOFT_CAPS:
        if getattr(config, name, None):
            raise HeadError(f"{config.model_type} soft-caps its logits ({name}): R_dis cannot be folded into its head")
    head = model.get_output_embeddings()
    if head is None:
        raise HeadError(f"{type(model).__name__} has no output head over a vocabulary: R_dis is not defined")
    if hasattr(head, "base_layer"):  # `weight` would be the frozen one
        raise HeadError("an adapter sits on the output head: leave it out of target_modules, or use modules_to_save")
    return _whole(head.weight), _whole(getattr(head, "bias", None)), _logit_scale(config)


def _whole(parameter):
    """A parameter, gathered where it is a shard; its gradient is then the mean over processes, as FSDP2's is."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial  # not on every build of torch

    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # each process adds its own to the gradient
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def virtual_tokens(model):
    """How many hidden states a PEFT adapter may put before those of a batch: prompt tuning does, prefix tuning not."""
    adapters = getattr(model, "peft_config", {}).values()
    return max((adapter.num_virtual_tokens for adapter in adapters if adapter.is_prompt_learning), default=0)


@torch.no_grad()
def check_head(model):
    """Raises HeadError unless some logits of the model are what `output_head` says: finds heads that no name tells.

    Compares a few tokens and a few rows of the head, in evaluation mode, up to rounding in the model's own precision;
    without virtual tokens. Weights that are still to come from the first process (meta) are left to it.
    """
    model = base_model(model) if virtual_tokens(model) else model
    weight, bias, scale = output_head(model)
    if weight.is_meta:
        return
    rows, training = slice(0, 64), model.training
    ids = torch.arange(min(8, len(weight)), device=weight.device).unsqueeze(0)
    model.eval()
    hidden, logits = backbone(model)(ids).last_hidden_state, model(ids).logits[..., rows].float()
    model.train(training)
    offset = None if bias is None else bias[rows].float()
    folded = scale * linear(hidden.float(), weight[rows].float(), offset)
    if (folded - logits).abs().max() > torch.finfo(hidden.dtype).eps ** 0.5 * logits.abs().max():
        kind = base_model(model).config.model_type
        raise HeadError(f"the logits of {kind} are not scale * (W h + b): R_dis cannot be folded into its head")


def _logit_scale(config):
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides by it, HyperCLOVA X multiplies
        scaling = float(config.logits_scaling)
        return scaling if config.model_type == "hyperclovax" else 1 / scaling
    return 1.0

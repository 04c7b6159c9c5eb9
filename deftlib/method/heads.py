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
    Raises HeadError by name where that is not so: soft-capped logits, an adapter on the head, virtual tokens, an
    encoder-decoder, no head at all. There the identity of `distribution` fails.
    """
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning:
            raise HeadError(f"{adapter.peft_type.value} adds virtual tokens: R_dis needs one hidden state per token")
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
    return head.weight, getattr(head, "bias", None), _logit_scale(config)


@torch.no_grad()
def check_head(model):
    """Raises HeadError unless some logits of the model are what `output_head` says: finds heads that no name tells.

    Compares a few tokens and a few rows of the head, in evaluation mode, up to rounding in the model's own precision.
    """
    weight, bias, scale = output_head(model)
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

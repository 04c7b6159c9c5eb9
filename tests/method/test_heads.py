"""Heads that the distribution reward can be folded through, however they are scaled, and those that are refused."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    RecurrentGemmaConfig,
)

from deftlib.method.distribution import distribution_reward, folded_reward, reward_direction
from deftlib.method.heads import HeadError, backbone, check_head, output_head, virtual_tokens

SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
NEOX = {key: SIZES[key] for key in SIZES.keys() - {"head_dim", "num_key_value_heads"}}
HEADS = {  # every kind of linear head the identity of design section 3 has to fit
    "llama": lambda: LlamaConfig(**SIZES),
    "llama, tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "phi, with bias": lambda: PhiConfig(**NEOX),
    "gpt-neox, embed_out": lambda: GPTNeoXConfig(**NEOX),
    "cohere, logit_scale": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "granite, logits_scaling divides": lambda: GraniteConfig(**SIZES, logits_scaling=4.0),
}


@pytest.mark.parametrize("head", HEADS)
def test_backbone_and_head_give_the_models_own_logits_and_r_dis(head):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HEADS[head]()).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases too: an output bias starts at zero
    ids = torch.randint(1, 23, (2, 7))
    with torch.no_grad():
        hidden, logits = backbone(model)(ids).last_hidden_state, model(ids).logits
    weight, bias, scale = output_head(model)
    assert (bias is not None) == head.endswith("bias")
    assert torch.allclose(scale * torch.nn.functional.linear(hidden, weight, bias), logits, atol=1e-10)
    q_diff = torch.randn(23, dtype=torch.float64)
    q_diff -= q_diff.mean()
    offset = 0.0 if bias is None else bias @ q_diff
    folded = scale * folded_reward(hidden, ids, reward_direction(weight, q_diff), offset)
    assert torch.allclose(folded, distribution_reward(logits, ids, q_diff), atol=1e-10)


@pytest.mark.parametrize(
    "config, named",
    [
        (Gemma2Config(**SIZES), "gemma2 soft-caps its logits (final_logit_softcapping)"),
        (RecurrentGemmaConfig(), "recurrent_gemma soft-caps its logits (logits_soft_cap)"),
    ],
)
def test_a_soft_capped_head_is_refused_by_name(config, named):
    with pytest.raises(HeadError, match=re.escape(named)):
        output_head(SimpleNamespace(config=config))


def test_gemma_without_its_soft_cap_is_linear():
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, final_logit_softcapping=None))
    assert output_head(model)[2] == 1.0


def test_virtual_tokens_are_those_of_prompt_learning():
    tuned, adapted = (SimpleNamespace(is_prompt_learning=kind, num_virtual_tokens=3) for kind in (True, False))
    assert virtual_tokens(SimpleNamespace(peft_config={"default": tuned})) == 3
    assert virtual_tokens(SimpleNamespace(peft_config={"default": adapted})) == virtual_tokens(SimpleNamespace()) == 0


def test_weights_that_are_still_to_come_are_not_checked():
    with torch.device("meta"):
        check_head(AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, final_logit_softcapping=None)))

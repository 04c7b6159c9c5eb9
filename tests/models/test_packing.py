"""Replies that share a row: by hand, equal to each alone, and which models can."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

from deftlib.models import packing

TINY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 2}
ROWS = [([5, 6, 7], [[8, 9], [10, 11, 12], []]), ([13], [[14], [15, 16]])]


def model(config, dtype="float32"):
    torch.manual_seed(0)
    return AutoModel.from_config(config, dtype=getattr(torch, dtype)).eval()


def test_a_row_by_hand():
    inputs, labels, owners = packing.packed([([5, 6], [[8, 9], [10]])], pad_token_id=0)
    assert inputs["input_ids"].tolist() == [[5, 6, 8, 9, 6, 10]]  # the last prompt token before each reply
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 1, 2]]
    assert labels.tolist() == [[-100, -100, 8, 9, -100, 10]]
    assert owners.tolist() == [[0, 0, 0, 0, 0, 1]]
    sees = inputs["attention_mask"][0, 0].int().tolist()
    assert sees[3] == [1, 1, 1, 1, 0, 0] and sees[5] == [1, 0, 0, 0, 1, 1]


def test_a_row_of_one_reply_is_what_any_model_takes():
    inputs, labels, _ = packing.packed([([5, 6], [[8]]), ([5], [[8, 9, 7]])], pad_token_id=0)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]] and "position_ids" not in inputs
    assert labels.tolist() == [[-100, -100, 8, -100], [-100, 8, 9, 7]]


def test_states_are_those_of_each_reply_alone():
    backbone = model(LlamaConfig(**TINY))

    def means(rows):
        inputs, labels, owners = packing.packed(rows, pad_token_id=0)
        sums, counts = packing.of_owners(backbone(**inputs).last_hidden_state[:, :-1], labels, owners)
        return sums / counts[:, None]

    apart = torch.cat([means([(prompt, [reply])]) for prompt, replies in ROWS for reply in replies])
    assert torch.allclose(means(ROWS), apart, atol=1e-5)
    prompt, replies = ROWS[0]
    expected = backbone(torch.tensor([[*prompt, *replies[1]]])).last_hidden_state[0, 2:5].mean(0)
    assert torch.allclose(apart[1], expected, atol=1e-5)
    empty = backbone(torch.tensor([prompt])).last_hidden_state[0, -1]  # what would predict its first token
    assert torch.allclose(apart[2], empty, atol=1e-5)


@pytest.mark.parametrize("several", [True, False])
def test_batches_hold_each_reply_once_and_no_more_tokens_than_allowed(several):
    pairs = [(prompt, reply) for prompt, replies in ROWS for reply in replies] * 5
    seen = []
    for which, inputs, labels, owners in packing.batches(pairs, several, 12, 0, "scoring"):
        assert inputs["input_ids"].numel() <= 12
        _, counts = packing.of_owners(torch.zeros(labels.shape)[:, :-1], labels, owners)
        assert counts.tolist() == [max(len(pairs[i][1]), 1) for i in which]
        seen += which
    assert sorted(seen) == list(range(len(pairs)))


def test_a_row_holds_no_more_replies_than_pay():
    ((_, inputs, _, _),) = packing.batches([([5], [8])] * (packing.MOST + 1), True, 1000, 0, "scoring")
    assert len(inputs["input_ids"]) == 2


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="a prompt without a token predicts no reply"):
        packing.packed([([], [[8]]), ([5], [[8]])], 0)


def test_neighbours_share_a_row_only_where_their_prompts_are_equal():
    pairs = [([5], [8]), ([5], [9]), ([6], [8]), ([5], [7])]
    ((_, inputs, _, _),) = packing.batches(pairs, True, 1000, 0, "scoring")
    assert len(inputs["input_ids"]) == 3


BERT = BertConfig(**TINY)
SLIDES = MistralConfig(**TINY, num_key_value_heads=2, sliding_window=4)
MAMBA = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
HYBRID = JambaConfig(**TINY, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False)
ALIBI = FalconConfig(**{k: v for k, v in TINY.items() if k != "intermediate_size"}, alibi=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config, can",
    [(LlamaConfig(**TINY), True), (BERT, False), (SLIDES, False), (MAMBA, False), (HYBRID, False), (ALIBI, False)],
)
def test_a_model_that_cannot_is_found_out(config, can, dtype):
    assert packing.reads_packed(model(config, dtype)) is can


def test_eager_attention_cannot():
    eager = AutoModelForCausalLM.from_config(LlamaConfig(**TINY), attn_implementation="eager").model.eval()
    assert packing.reads_packed(eager) is False

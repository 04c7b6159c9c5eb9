"""What a training pass keeps of memory, as counted on tensors without contents: held against real passes."""

import pytest
import torch
from conftest import SMALL
from transformers import GPTNeoXConfig, LlamaConfig

from deftlib.models import adapters, footprint, policies
from deftlib.sections import Lora


def really_kept(model, rows, length, autocast):
    """Bytes of the tensors that a real pass saves, over a batch with padding."""
    kept, ids = {}, torch.zeros(rows, length, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    ours = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    keep = lambda tensor: kept.update({tensor.untyped_storage().data_ptr(): tensor}) or tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=autocast):
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    assert output.logits.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in ours)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_what_a_pass_keeps_is_what_a_real_one_keeps(kind, checkpointing, autocast, rank, make_model):
    sizes = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes) if kind == "llama" else GPTNeoXConfig(**sizes)
    lora = Lora(rank=rank)
    found = footprint.kept_by_pass(*footprint.described(config, lora), "float32", autocast, checkpointing, 4, 32)
    model = policies.AutoModelForCausalLM.from_config(config)
    model = adapters.wrapped(model, lora, 0).train() if rank else model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert found == pytest.approx(really_kept(model, 4, 32, autocast), rel=1e-3)


def test_counting_draws_no_random_numbers_and_loads_nothing():
    before = torch.random.get_rng_state()
    model = footprint.described(LlamaConfig(**{**SMALL, "hidden_size": 24}), Lora(rank=2))
    footprint.activations(model, "float32", False, False, 2, 16)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_name_tells_the_shape_of_a_model_that_is_not_here(tmp_path):
    assert footprint.shape("huggyllama/llama-7b") is footprint.SHAPES["LLaMA-7B"]
    assert footprint.shape("meta-llama/Llama-3.1-8B-Instruct@main") is footprint.SHAPES["Llama-3.1-8B"]
    assert footprint.shape("someone/llama-70b") is None
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    assert footprint.shape(tmp_path).hidden_size == SMALL["hidden_size"]

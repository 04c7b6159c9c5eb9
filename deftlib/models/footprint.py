"""What a model takes of memory, counted without its weights: its numbers, and what a training pass keeps.

    model = described(config, profile.lora)
    sizes(*model, "float32").bytes
    activations(model, "float32", autocast=True, checkpointing=False, rows=16, length=384)

Weights are counted on torch's meta device. What the forward pass keeps for the backward pass is counted as well, not
estimated: the model runs once on tensors without contents, and what autograd saves is added up.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from deftlib.method import heads
from deftlib.models import adapters
from deftlib.sections import Lora

LLAMA = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 8192}
SHAPES = {  # as their makers publish them
    "SmolLM2-135M": LlamaConfig(
        **LLAMA,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-1B": LlamaConfig(
        **LLAMA,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "LLaMA-7B": LlamaConfig(**LLAMA),
    "Llama-3.1-8B": LlamaConfig(**LLAMA, vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
}


def shape(source):
    """Configuration of the model in a folder, or that a hub id or wheel names: "huggyllama/llama-7b" is a LLaMA-7B.

    None for names that `SHAPES` does not know; the hub is not asked.
    """
    if adapters.is_adapter(source):
        return shape(adapters.base(source)[0])
    if Path(source).is_dir():
        return AutoConfig.from_pretrained(source)
    name = str(source).rpartition("/")[2].lower()
    return next((found for known, found in SHAPES.items() if name.startswith(known.lower())), None)


def described(config, lora):
    """(class, configuration, LoRA settings) of a policy to train, as text: by these the caches below know it."""
    return type(config), config.to_json_string(use_diff=False), json.dumps(vars(lora))


@dataclass(frozen=True)
class Sizes:
    """Of a policy to train: numbers, unless they are called bytes."""

    bytes: int
    trained: int
    trained_bytes: int
    trained_head: int  # the output head, if it is trained
    trained_inside: int  # in layers
    trained_ends: int  # bytes of embedding and head
    layer: int  # one
    outside: int  # embedding and head


def _on_meta(kind, said, lora, dtype):
    """The policy to train, without contents."""
    config, lora = kind.from_dict(json.loads(said)), Lora(**json.loads(lora))
    with torch.random.fork_rng([]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return adapters.wrapped(model, lora, seed=0) if lora.rank else model


@functools.cache
def sizes(kind, said, lora, dtype):
    """`Sizes` of a `described` model whose frozen weights are of a dtype."""
    model = _on_meta(kind, said, lora, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    below = heads.base_model(model)
    ends = {below.get_input_embeddings(), below.get_output_embeddings()}
    inside = [p for p in model.parameters() if all(p is not end for module in ends for end in module.parameters())]
    head = heads.output_head(model)[0]
    return Sizes(
        bytes=sum(p.numel() * p.itemsize for p in model.parameters()),
        trained=sum(p.numel() for p in trained),
        trained_bytes=sum(p.numel() * p.itemsize for p in trained),
        trained_head=head.numel() if head.requires_grad else 0,
        trained_inside=sum(p.numel() for p in inside if p.requires_grad),
        trained_ends=sum(p.numel() * p.itemsize for p in trained if all(p is not each for each in inside)),
        layer=sum(p.numel() for p in inside) // below.config.get_text_config().num_hidden_layers,
        outside=sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in inside),
    )


def activations(model, dtype, autocast, checkpointing, rows, length):
    """Bytes that a training pass over int[rows, length] keeps for its backward pass, the weights themselves apart.

    model: as `described`. Under checkpointing they are what stands between layers, and one layer as it is computed
    anew. Autocast keeps 16-bit copies of trained weights through the forward pass in any case.
    """
    kept = kept_by_pass(*model, dtype, autocast, checkpointing, rows, length)
    if not checkpointing:
        return kept
    layers = model[0].from_dict(json.loads(model[1])).get_text_config().num_hidden_layers
    copies = 2 * sizes(*model, dtype).trained_inside if autocast and dtype == "float32" else 0
    return kept + copies + (kept_by_pass(*model, dtype, autocast, False, rows, length) - copies) // layers


@functools.cache
def kept_by_pass(kind, said, lora, dtype, autocast, checkpointing, rows, length):
    """Bytes that autograd saves of one pass, the weights themselves apart."""
    model, kept = _on_meta(kind, said, lora, dtype).train(), {}
    if checkpointing:
        heads.base_model(model).gradient_checkpointing_enable({"use_reentrant": False})

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    named = [*model.named_parameters(), *model.named_buffers()]
    with FakeTensorMode():
        own = {name: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad) for name, t in named}
        ids = torch.zeros(rows, length, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, "logits_to_keep": 1}
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            try:
                functional_call(model, own, kwargs=inputs)
            except RuntimeError as error:  # what a pass does hangs on the contents of its tensors
                print(f"  {model.config.model_type}: what its forward pass keeps is not counted ({error})", flush=True)
        ours = {tensor.untyped_storage()._cdata for tensor in own.values()}
        return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in ours)

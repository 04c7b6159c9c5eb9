"""vLLM as an engine: the text of the other engines, ids and ends and seeds passed on, LoRA weights, memory given back.

Where vLLM is installed these run on it (`VLLM_CPU_KVCACHE_SPACE=1` for a build for CPUs); else on a stand-in with the
names, arguments and refusals that are used here, read in the source of vLLM 0.33.0.
"""

import dataclasses
import gc
import importlib.machinery
import importlib.util
import sys
import types
import weakref
from typing import Literal

import pytest
import torch
from conftest import EOS
from peft import PeftModel
from transformers import AutoModelForCausalLM

from deftlib import provenance, store
from deftlib.models import adapters, generation, policies
from deftlib.models.generation import VllmEngine, generate
from deftlib.profile import Profile
from deftlib.sections import Generation, Lora, Text

TEXT = Text(prompt_tokens=8, reply_tokens=8)
GREEDY = Generation(max_new_tokens=6, temperature=0.0, samples=1, engine="vllm")
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, samples=3)
BATCHES = dataclasses.replace(GREEDY, engine="batches")
PROMPTS = ["w3 w4", "w5 w6 w7 w8 w9", "w30", "w11 w12 w13", "w2 w20 w30 w9 w7 w7 w1 w2 w3 w4", "w4", "w3 w4"]
LONGEST = TEXT.prompt_tokens + GREEDY.max_new_tokens
REAL = importlib.util.find_spec("vllm") is not None


# ---- the stand-in --------------------------------------------------------------------------------------------------


class SamplingParams:
    """vllm/sampling_params.py: those of its fields that are used, and what `_verify_greedy_sampling` refuses."""

    def __init__(self, *, n, temperature, max_tokens, stop_token_ids, ignore_eos, detokenize, seed):
        if temperature == 0 and n > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {n}.")
        self.n, self.temperature, self.max_tokens, self.seed = n, temperature, max_tokens, seed
        self.stops = set(stop_token_ids) | (set() if ignore_eos else {EOS})
        self.detokenize = detokenize


class LoRARequest:
    """vllm/lora/request.py."""

    def __init__(self, lora_name, lora_int_id, lora_path=""):
        self.lora_path = lora_path


class LLM:
    """vllm/entrypoints/llm.py, one prompt at a time by transformers."""

    platform = types.SimpleNamespace(is_unspecified=lambda: False)

    def __init__(
        self,
        model,
        *,
        skip_tokenizer_init=False,
        dtype="auto",
        revision=None,
        gpu_memory_utilization=0.92,
        max_model_len=None,  # from here on by **kwargs to EngineArgs
        use_tqdm_on_load=True,
        enable_chunked_prefill=None,
        enable_lora=False,
        max_lora_rank=16,
    ):
        LLM.share = gpu_memory_utilization
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        if max_model_len > self.model.config.max_position_embeddings:
            raise ValueError(
                f"User-specified max_model_len ({max_model_len}) is greater than the derived max_model_len"
            )
        if gpu_memory_utilization < 0.01:
            raise ValueError("Free memory on device cuda:0 (0.1/80 GiB) on startup is less than desired")
        self.max_model_len, self.max_lora_rank = max_model_len, max_lora_rank if enable_lora else 0
        shutdown = lambda timeout=None: self.__dict__.pop("model")
        self.llm_engine = types.SimpleNamespace(
            add_lora=self._add_lora, engine_core=types.SimpleNamespace(shutdown=shutdown)
        )

    def _add_lora(self, request):
        adapted = PeftModel.from_pretrained(self.model, request.lora_path)
        config = adapted.peft_config["default"]
        if config.modules_to_save:
            raise ValueError(f"vLLM only supports modules_to_save being None: {config.modules_to_save}")
        assert config.r <= self.max_lora_rank
        self.model, self.lora = adapted, request

    @torch.no_grad()
    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert lora_request is getattr(self, "lora", None) and len(prompts) == len(sampling_params)
        asked = zip(prompts, sampling_params)
        return [
            types.SimpleNamespace(outputs=[self._sample(prompt["prompt_token_ids"], how, i) for i in range(how.n)])
            for prompt, how in asked
        ]

    def _sample(self, prompt, how, index):
        generator = how.seed is not None and torch.Generator().manual_seed(how.seed + index)
        ids = list(prompt)
        while len(ids) < min(len(prompt) + how.max_tokens, self.max_model_len):
            logits = self.model(torch.tensor([ids])).logits[0, -1]
            if how.temperature:
                drawn = (logits / how.temperature).softmax(-1).multinomial(1, generator=generator)
            ids.append(drawn.item() if how.temperature else logits.argmax().item())
            if ids[-1] in how.stops:
                break
        return types.SimpleNamespace(token_ids=tuple(ids[len(prompt) :]))


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """The package: itself where it is installed, else the stand-in."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    if REAL:
        import vllm

        return vllm
    parts = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "TokensPrompt": dict},
        "vllm.config": {},
        "vllm.config.lora": {"MaxLoRARanks": Literal[1, 8, 16, 32]},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.platforms": {"current_platform": LLM.platform},
        "vllm.distributed": {},
        "vllm.distributed.parallel_state": {"cleanup_dist_env_and_memory": gc.collect},
    }
    for name, holds in parts.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
        above, _, last = name.rpartition(".")
        if above:
            setattr(sys.modules[above], last, module)
    return sys.modules["vllm"]


stand_in_alone = pytest.mark.skipif(REAL, reason="of the stand-in")


# ---- what it says --------------------------------------------------------------------------------------------------


@pytest.fixture
def talker(make_model):
    """A random policy that ends some of its replies before the limit; of a width that vLLM has kernels for."""
    return make_model(seed=8, hidden_size=64, initializer_range=0.3).eval()


@pytest.fixture
def folder(talker, tokenizer, tmp_path, monkeypatch):
    """Where it lies, in a project of its own."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    return _saved(talker, tokenizer, tmp_path / "policies" / "sft-seed0-0123456789")


def _saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_its_greedy_text_is_that_of_batches_and_of_continuous_batching_in_the_order_asked(talker, tokenizer, folder):
    with VllmEngine(folder, "float32", LONGEST) as model:
        said = generate(model, tokenizer, PROMPTS, TEXT, GREEDY)
    assert said == generate(talker, tokenizer, PROMPTS, TEXT, BATCHES)
    assert said == generate(talker, tokenizer, PROMPTS, TEXT, dataclasses.replace(GREEDY, engine="continuous"))
    lengths = {len(reply.split()) for (reply,) in said}
    assert len(lengths) > 1 and max(lengths) == GREEDY.max_new_tokens and "<eos>" not in str(said)


def test_it_is_given_the_ids_of_each_prompt_cut_as_elsewhere(tokenizer, folder, vllm, monkeypatch):
    given, real = [], vllm.LLM.generate
    spy = lambda self, prompts, *args, **kwargs: given.extend(prompts) or real(self, prompts, *args, **kwargs)
    monkeypatch.setattr(vllm.LLM, "generate", spy)
    with VllmEngine(folder, "float32", LONGEST) as model:
        generate(model, tokenizer, PROMPTS, TEXT, GREEDY)
    ids = policies.encode_prompts(tokenizer, PROMPTS, TEXT)
    assert max(map(len, ids)) == TEXT.prompt_tokens < len(PROMPTS[4].split())
    assert sorted(prompt["prompt_token_ids"] for prompt in given) == sorted(ids)


def test_a_reply_ends_at_any_end_that_the_policy_knows(talker, tokenizer, folder):
    whole = [reply.split() for (reply,) in generate(talker, tokenizer, PROMPTS, TEXT, BATCHES)]
    end = next(word for said in whole for word in said if said[0] != word)
    talker.generation_config.eos_token_id = [EOS, tokenizer.convert_tokens_to_ids(end)]
    talker.save_pretrained(folder)
    with VllmEngine(folder, "float32", LONGEST) as model:
        cut = [reply.split() for (reply,) in generate(model, tokenizer, PROMPTS, TEXT, GREEDY)]
    assert cut == [said[: said.index(end)] if end in said else said for said in whole] != whole


def test_a_seed_repeats_the_samples_of_a_prompt_whatever_is_asked_beside_it(tokenizer, folder):
    with VllmEngine(folder, "float32", LONGEST) as model:
        say = lambda prompts, seed=0, **how: generate(
            model, tokenizer, prompts, TEXT, dataclasses.replace(SAMPLED, **how), seed
        )
        first = say(PROMPTS)
        assert first == say(PROMPTS) != say(PROMPTS, seed=1)
        assert first[:3] == say(PROMPTS[:3])
        assert first[0] != first[-1], "two equal prompts are two questions"
        assert all(len(replies) == 3 for replies in first) and any(len(set(replies)) > 1 for replies in first)
        sure = say(PROMPTS, temperature=0.01)  # greedy in effect: a prompt's samples are its own
        assert sure == [replies * 3 for replies in generate(model, tokenizer, PROMPTS, TEXT, GREEDY)]


# ---- LoRA weights --------------------------------------------------------------------------------------------------


def _adapter(folder, tokenizer, name, **settings):
    """LoRA weights that change what the policy in a folder says, published beside it."""
    model = adapters.wrapped(policies.load_policy(folder), Lora(**{"rank": 4, **settings}), seed=0)
    for module, weight in model.named_parameters():
        if "lora_B" in module:
            torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(1))
    place = _saved(model, tokenizer, folder.parent / name)
    adapters.name_base(place, folder, policies.identity(folder))
    return place


def test_lora_weights_speak_as_they_do_elsewhere(talker, tokenizer, folder):
    place = _adapter(folder, tokenizer, "lora-seed0")
    with VllmEngine(place, "float32", LONGEST) as model:
        said = generate(model, tokenizer, PROMPTS, TEXT, GREEDY)
    assert said == generate(policies.load_policy(place), tokenizer, PROMPTS, TEXT, BATCHES)
    assert said != generate(talker, tokenizer, PROMPTS, TEXT, BATCHES)
    (folder / "config.json").touch()
    with pytest.raises(policies.ModelError, match="no longer what it was: train it again"):
        VllmEngine(place, "float32", LONGEST)


def test_lora_weights_that_it_cannot_take_are_refused_in_one_sentence_and_nothing_is_held(tokenizer, folder, vllm):
    place = _adapter(folder, tokenizer, "head-seed0", modules_to_save=["lm_head"])
    with pytest.raises(policies.ModelError, match=r"^vLLM does not take .*head-seed0: .*modules_to_save.*lm_head"):
        VllmEngine(place, "float32", LONGEST)
    gc.collect()
    assert not any(isinstance(held, vllm.LLM) for held in gc.get_objects())


# ---- kept, and given back ------------------------------------------------------------------------------------------


def test_replies_are_kept_by_engine_and_release_and_a_killed_run_goes_on(tokenizer, folder, monkeypatch):
    settings = {"generation": vars(SAMPLED), "text": vars(TEXT)}
    profile = Profile.load("mini", settings)
    monkeypatch.setattr(policies, "load_policy", lambda *args: pytest.fail("loaded by transformers"))
    monkeypatch.setattr(generation, "AT_ONCE", 3)
    whole = generation.replies(profile, folder, PROMPTS)
    (file,) = (store.ROOT / "build/mini/kept").glob("*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]))
    assert generation.replies(profile, folder, PROMPTS) == whole
    with monkeypatch.context() as without:
        without.setattr(generation, "VllmEngine", lambda *args: pytest.fail("started"))
        assert generation.replies(profile, folder, PROMPTS) == whole
        monkeypatch.setattr(provenance, "version", lambda package: "another")
        with pytest.raises(pytest.fail.Exception, match="started"):
            generation.replies(profile, folder, PROMPTS)


def test_its_memory_is_given_back(tokenizer, folder):
    with VllmEngine(folder, "float32", LONGEST) as model:
        llm = weakref.ref(model._llm)
        generate(model, tokenizer, PROMPTS, TEXT, GREEDY)
    assert llm() is None and not torch.distributed.is_initialized()


@stand_in_alone
def test_it_takes_its_share_of_the_gpu_or_of_what_is_free(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for free, share, taken in [(80, 1, 0.9), (40, 1, 0.45), (80, 0.25, 0.225), (8, 0.25, 0.09)]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 80))
        with VllmEngine(folder, "float32", LONGEST, share):
            assert LLM.share == pytest.approx(taken)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0.1, 80))
    with pytest.raises(torch.OutOfMemoryError, match="Free memory"):  # which `jobs` tries once more, alone
        VllmEngine(folder, "float32", LONGEST)


def test_a_policy_of_too_few_positions_is_refused_in_one_sentence(folder):
    with pytest.raises(
        policies.ModelError, match=r"^vLLM does not take .*sft-seed0-.*max_model_len \(129\) is greater"
    ):
        VllmEngine(folder, "float32", 129)


@stand_in_alone
def test_without_it_or_without_its_gpu_one_sentence_says_so(folder, monkeypatch):
    monkeypatch.setattr(LLM.platform, "is_unspecified", lambda: True)
    with pytest.raises(policies.ModelError, match="needs a GPU, and vLLM sees none"):
        VllmEngine(folder, "float32", LONGEST)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    profile = Profile.load("mini", {"generation": {"engine": "vllm"}})
    with pytest.raises(policies.ModelError, match=r"not installed: pip install 'deftlib\[vllm\]'"):
        generation.replies(profile, folder, PROMPTS)

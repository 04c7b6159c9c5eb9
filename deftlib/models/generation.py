"""What a policy says: greedy or seeded sampling, in the project's one text format, every reply kept as it comes.

    replies(profile, policy, prompts)          # [[reply, ...], ...]; a killed run goes on where it stopped

A policy is a folder or hub id, loaded here by transformers or vLLM, or a profile `Endpoint`: any OpenAI-compatible
server, for models too large to load here.
"""

import importlib.util
import os
import re
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from itertools import takewhile
from typing import get_args

import torch
from transformers import AutoConfig, ContinuousBatchingConfig, GenerationConfig

from deftlib import credentials, jobs, provenance, store
from deftlib.models import adapters, endpoint, policies
from deftlib.models.loop import with_progress
from deftlib.models.said import first_turn, reply_in
from deftlib.models.wheels import ModelError
from deftlib.sections import Endpoint

AT_ONCE = 1024  # prompts that continuous batching or vLLM gets at a time; their replies are kept when all are there
PAGE = 256  # tokens of a page of its cache
TOO_LITTLE = re.compile("free memory|available (KV cache )?memory", re.I)  # what vLLM says where it is
LEFT = 0.9  # of a GPU's free memory, for weights and cache: the rest is room for what is not counted (our choice)


def replies(profile, policy, prompts, seed=0, text=None, settings=None, label="generating"):
    """`settings.samples` replies of a policy to each prompt, [[reply, ...], ...], once per (policy, prompts, settings).

    text, settings: the profile's `text` and `generation` unless given. What was said before is read from
    `build/<profile>/kept/`, without loading the model where nothing is missing. Raises EndpointError if a server fails.
    """
    text, settings = text or profile.text, settings or profile.generation
    if isinstance(policy, Endpoint):
        said = endpoint.replies_from(policy, prompts, settings, endpoint.kept_file(profile.name, policy), seed)
        return [[first_turn(reply) for reply in samples] for samples in said]
    spoken = {"policy": policies.identity(policy), "dtype": dtype(profile), "text": vars(text), "seed": seed}
    questions = numbered(prompts)
    spoken |= {"settings": vars(settings), **provenance.made_by("models.generation")}
    spoken |= {"vllm": provenance.version("vllm")} if settings.engine == "vllm" else {}
    spoken["asked"] = questions  # all of them: who shares a batch with whom decides what is sampled
    name = f"replies-{name_of(policy)}-{store.content_key(spoken)}.jsonl"
    kept = store.Kept(store.build_dir(profile.name) / "kept" / name)
    if not all(question in kept for question in questions):
        jobs.in_shares(profile, partial(_say, profile, policy, prompts, text, settings, seed, label, kept.path))
        kept = store.Kept(kept.path)
    return [kept[question]["replies"] for question in questions]


def _say(profile, policy, prompts, text, settings, seed, label, path, share, of):
    """Add one share of the replies to the file of those that are kept."""
    tokenizer, weights = policies.load_tokenizer(policy), dtype(profile)
    if settings.engine == "vllm":
        longest = text.prompt_tokens + settings.max_new_tokens
        loaded = VllmEngine(policy, weights, longest, 1 if profile.jobs == 1 else 1 / jobs.MOST_ON_A_GPU)
    else:
        loaded = nullcontext(policies.load_policy(policy, weights))
    with loaded as model:
        generate(model, tokenizer, prompts, text, settings, seed, label, store.Kept(path), slice(share, None, of))


@torch.no_grad()
def generate(model, tokenizer, prompts, text, settings, seed=0, label="generating", kept=None, batches_of=slice(None)):
    """`settings.samples` replies to each prompt, [[reply, ...], ...]: greedy at temperature 0, else seeded sampling.

    Prompts of like length share a left-padded batch. A reply ends at the tokenizer's EOS or one of the model's own,
    where the next turn begins (`said.first_turn`), or after `settings.max_new_tokens`; reasoning is left out. kept: a
    `store.Kept` that answers what was asked before; a batch is seeded by what is in it, so an interrupted run, or one
    of several that say a share each, says what a whole one would have said. batches_of: which of them; to the prompts
    of others the answer is [].
    """
    ids = [policies.encode_prompt(tokenizer, prompt, text) for prompt in prompts]
    questions = numbered(prompts)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    continuous = settings.engine == "continuous"
    if continuous and settings.temperature > 0:
        raise ModelError("generation.engine=continuous is greedy: set generation.temperature=0, or engine=batches")
    size = AT_ONCE if settings.engine != "batches" else max(1, settings.batch_size // settings.samples)
    batches = [order[i : i + size] for i in range(0, len(order), size)][batches_of]
    options = {"max_new_tokens": settings.max_new_tokens, "num_return_sequences": settings.samples}
    stops = ends(model, tokenizer)
    options |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": stops}
    options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    options |= {"repetition_penalty": 1.0}  # whatever the model's own configuration says
    if settings.temperature > 0:
        options |= {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    said = [[] for _ in prompts]
    for batch in with_progress(batches, label, total=sum(map(len, batches))):
        asked = [questions[i] for i in batch]
        if kept is not None and all(question in kept for question in asked):
            for i in batch:
                said[i] = kept[questions[i]]["replies"]
            continue
        start = time.perf_counter()
        torch.manual_seed(_number_of(seed, asked))
        if settings.engine == "vllm":
            output = model.say([ids[i] for i in batch], options, [_number_of(seed, question) for question in asked])
        else:
            say = _say_continuously if continuous else _say_batch
            output = say(model, tokenizer, [ids[i] for i in batch], options)
        up_to_the_end = [list(takewhile(lambda i: i not in stops, said_ids)) for said_ids in output]
        decoded = [reply_in(text) for text in tokenizer.batch_decode(up_to_the_end, skip_special_tokens=True)]
        seconds = (time.perf_counter() - start) / len(batch)
        for k, i in enumerate(batch):
            said[i] = [first_turn(reply) for reply in decoded[k * settings.samples : (k + 1) * settings.samples]]
            if kept is not None and questions[i] not in kept:
                kept.add(questions[i], {"replies": said[i], "seconds": round(seconds, 4)})
            said[i] = kept[questions[i]]["replies"] if kept is not None else said[i]
    return said


def _number_of(seed, asked):
    """A seed of its own for what is asked."""
    return int(store.content_key([seed, asked])[:15], 16)


def _say_batch(model, tokenizer, ids, options):
    """Token ids after each prompt, by one batch padded on the left."""
    inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def _say_continuously(model, tokenizer, ids, options):
    """Token ids after each prompt, by transformers' continuous batching."""
    options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
    longest = max(map(len, ids)) + options["max_new_tokens"]
    room = (
        None
        if torch.cuda.is_available()
        else ContinuousBatchingConfig(  # without a GPU it would take all memory
            num_blocks=4 * (1 + longest // PAGE), max_batch_tokens=4 * longest, page_size=PAGE
        )
    )
    found = model.generate_batch(ids, generation_config=GenerationConfig(**options), continuous_batching_config=room)
    requests = sorted(found, key=lambda name: int(name.partition("_")[2]))  # "req_0", …: a prompt's samples in turn
    return [found[request].generated_tokens for request in requests]


# ---- vLLM ----------------------------------------------------------------------------------------------------------


class VllmEngine:
    """A policy in vLLM, for `generate` in the place of a model; its memory is free again after the `with`.

    Written for vLLM 0.33, run with 0.32 on a CPU. It pins releases of torch and transformers: give it an environment.
    policy: folder or hub id; LoRA weights stay beside those that they change. dtype: of the weights. longest: most
    tokens of a prompt and its reply. share: of the GPU's memory, less where less is free; the cache takes what the
    weights leave. Raises, in one sentence, ModelError where vLLM or its GPU is missing or it does not take the policy,
    torch's OutOfMemoryError where too little is free.
    """

    def __init__(self, policy, dtype, longest, share=1.0):
        vllm = _vllm()
        below, more, self._lora, self._llm = policy, {}, None, None
        if adapters.is_adapter(policy):
            below, rank = policies.below(policy), adapters.rank(policy)
            self._lora = vllm.lora.request.LoRARequest("policy", 1, str(policy))
            ranks = get_args(vllm.config.lora.MaxLoRARanks)  # those that its kernels are compiled for
            more = {"enable_lora": True, "max_lora_rank": next((most for most in ranks if most >= rank), rank)}
        origin = policies.origin(below)
        try:
            self.config = AutoConfig.from_pretrained(**origin)
            place = origin.pop("pretrained_model_name_or_path")
            self.generation_config = _generation_config(place, origin, self.config)
            self._llm = vllm.LLM(
                place,
                skip_tokenizer_init=True,
                use_tqdm_on_load=False,
                dtype=dtype,
                max_model_len=longest,
                **origin,
                **more,
                **_memory(share),
            )
            if self._lora is not None:
                self._llm.llm_engine.add_lora(self._lora)
        except ValueError as error:
            self.__exit__()
            said = f"vLLM does not take {policy}: {' '.join(str(error).split())}"
            raise (torch.OutOfMemoryError if TOO_LITTLE.search(said) else ModelError)(said[:400]) from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        cleanup_dist_env_and_memory()

    def say(self, ids, options, seeds):
        """Token ids after each prompt, its samples in turn. options: as transformers names them.

        seeds: one a prompt; what is sampled for it depends on no other prompt, but for rounding.
        """
        import vllm

        sampling = [
            vllm.SamplingParams(
                n=options["num_return_sequences"],
                temperature=options["temperature"] or 0.0,
                max_tokens=options["max_new_tokens"],
                stop_token_ids=options["eos_token_id"],
                ignore_eos=True,  # of its own knowledge: those above are all
                detokenize=False,
                seed=seed if options["do_sample"] else None,
            )
            for seed in seeds
        ]
        prompts = [vllm.TokensPrompt(prompt_token_ids=of_one) for of_one in ids]
        said = self._llm.generate(prompts, sampling, use_tqdm=False, lora_request=self._lora)
        return [list(sample.token_ids) for request in said for sample in request.outputs]


def _generation_config(place, revision, config):
    """The policy's own, with the tokens that end a reply."""
    try:
        return GenerationConfig.from_pretrained(place, **revision)
    except OSError:  # it has none
        return GenerationConfig.from_model_config(config)


def _memory(share):
    """What vLLM may take of the GPU's memory; a build for CPUs asks its environment."""
    if not torch.cuda.is_available():
        return {"enable_chunked_prefill": False}  # a prompt in two steps: it cannot set a CPU's generator back
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": LEFT * min(share, free / total)}


def _vllm():
    """The package, told to work in this process: there it schedules alike each time, whichever prompt comes first."""
    if importlib.util.find_spec("vllm") is None:
        raise ModelError("generation.engine=vllm needs vLLM, which is not installed: pip install 'deftlib[vllm]'")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm.config.lora
    import vllm.lora.request
    import vllm.platforms

    if vllm.platforms.current_platform.is_unspecified():
        raise ModelError("generation.engine=vllm needs a GPU, and vLLM sees none: set generation.engine=batches")
    return vllm


# ---- ends and names ------------------------------------------------------------------------------------------------


def ends(model, tokenizer):
    """Ids that end a reply: the tokenizer's EOS, and those of the model's generation configuration (Gemma, Llama 3)."""
    own, size = model.generation_config.eos_token_id, model.config.get_text_config().vocab_size
    own = own if isinstance(own, list) else [own]
    return sorted({i for i in (tokenizer.eos_token_id, *own) if i is not None and i < size})


def numbered(prompts):
    """[prompt, how many like it came before] for each prompt: two equal prompts are two questions."""
    seen = Counter()
    questions = []
    for prompt in prompts:
        questions.append([prompt, seen[prompt]])
        seen[prompt] += 1
    return questions


def dtype(profile):
    """Of the weights that replies are said with: bfloat16 where training computes in it, else `policy.dtype`.

    Our choice: autocast rounds those of linear layers so in every pass of the training, and half of the bytes are half
    of the time, since each token of a reply reads all of them once.
    """
    return "bfloat16" if profile.training.bf16 else profile.policy.dtype


def identity(policy):
    """What a policy is, for the key of a result made from its replies; of an endpoint without its password."""
    if isinstance(policy, Endpoint):
        return [credentials.without(policy.url), policy.model]
    return policies.identity(policy)


def name_of(policy):
    """A policy's short name: "deft-dpo-seed0" of a published folder, else the last part of a path, hub id or model."""
    if isinstance(policy, Endpoint):
        return policy.model.rpartition("/")[2]
    name = str(policy).rstrip("/").rpartition("/")[2]
    return re.sub(r"-[0-9a-f]{10}$", "", name)

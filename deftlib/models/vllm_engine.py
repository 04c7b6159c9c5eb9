"""vLLM as an engine of `generation`: replies share one paged cache, whatever their length, in this process.

    with Engine(policy, "bfloat16", longest=640) as model:
        generation.generate(model, tokenizer, prompts, text, settings)

Written for vLLM 0.33, run with 0.32 on a CPU. It pins releases of torch and transformers: give it an environment.
"""

import importlib.util
import os
import re
from typing import get_args

import torch
from transformers import AutoConfig, GenerationConfig

from deftlib.models import adapters, policies
from deftlib.models.wheels import ModelError

TOO_LITTLE = re.compile("free memory|available (KV cache )?memory", re.I)  # what it says where memory does not suffice
LEFT = 0.9  # of a GPU's free memory, for weights and cache: the rest is room for what is not counted (our choice)


class Engine:
    """A policy in vLLM; its memory is free again after the `with`.

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

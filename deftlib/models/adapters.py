"""LoRA weights beside the model that they change: made, saved with the name of that model, put on it again.

A policy trained under the profile's `lora` is published as its adapter alone, a hundredth of a 7B model's size, beside
the name and the identity of the model below it. `policies.load_policy` reads such a folder like any other.
"""

import importlib.util
import json
import os
from pathlib import Path

import torch

from deftlib import store
from deftlib.models.wheels import ModelError

CONFIG = "adapter_config.json"
BASE = "base.json"  # {"identity": of the model below}; only beside adapters that were trained here


def is_adapter(place):
    """Whether a folder holds LoRA weights instead of a whole model."""
    return (Path(place) / CONFIG).is_file()


def base(folder):
    """(folder or hub id of the model below an adapter, its identity when the adapter was trained or None).

    The path beside an identity is meant from the adapter's folder: both move together.
    """
    config = json.loads((Path(folder) / CONFIG).read_text())
    name, revision = config["base_model_name_or_path"], config.get("revision")
    kept = Path(folder) / BASE
    identity = json.loads(kept.read_text())["identity"] if kept.is_file() else None
    if identity and name.startswith(".."):
        place = (Path(folder) / name).resolve()
        if not place.is_dir():
            raise ModelError(f"{folder} changes the weights of {place}, which is not there: make that again")
        return place, identity
    return f"{name}@{revision}" if revision else name, identity


def rank(folder):
    """The largest rank of the adapters in a folder."""
    config = json.loads((Path(folder) / CONFIG).read_text())
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def wrapped(model, lora, seed):
    """The model with new adapters that change nothing yet. lora: the profile's Lora. seed: of their random half.

    Adapters are float32 whatever the model is: small updates are not rounded away. Raises ModelError for modules that
    the model does not have.
    """
    peft = _peft()
    target = lora.target_modules
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target[0] if target == ["all-linear"] else target,  # peft's word for all but the output head
        modules_to_save=lora.modules_to_save or None,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora.target_modules={target}: {' '.join(str(error).split())}") from error


def put_on(model, folder, trainable=False):
    """The model with the adapters of a folder; `trainable` as those that training goes on with."""
    return _peft().PeftModel.from_pretrained(model, folder, is_trainable=trainable)


def of_others(folder):
    """The merged model, in float32, of an adapter that was trained elsewhere, with the rows of tokens it added."""
    return merged(_peft().AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def merged(model):
    """The model with its adapters added to its weights, without peft; a head that was trained apart is untied."""
    model = model.merge_and_unload()
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False
    return model


def name_base(folder, place, identity):
    """Have the adapters that were saved in a folder say that `place`, with that identity, is the model below them."""
    config = json.loads((Path(folder) / CONFIG).read_text())
    if Path(place).is_dir():
        below = Path(place).resolve()
        inside = below.is_relative_to(Path(store.ROOT).resolve())
        config["base_model_name_or_path"] = os.path.relpath(below, Path(folder).resolve()) if inside else str(below)
    else:
        config["base_model_name_or_path"], _, config["revision"] = identity.partition("@")
    store.write_atomic(Path(folder) / CONFIG, json.dumps(config, indent=1))
    store.write_atomic(Path(folder) / BASE, json.dumps({"identity": identity}))


def _peft():
    if importlib.util.find_spec("peft") is None:
        raise ModelError("LoRA weights are made and read by peft, which is not installed: pip install 'deftlib[lora]'")
    import peft

    return peft

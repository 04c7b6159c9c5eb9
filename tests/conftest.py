"""Shared by the tests of training: a tokenizer of 40 words, random models of width 16, short ranked lists."""

import gc
import os
import sys
from multiprocessing import forkserver

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deftlib import __main__, provenance
from deftlib.preferences.lists import read_lists

VOCAB = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(37))])}
EOS = VOCAB["<eos>"]
SMALL = {  # of any architecture; weights large enough for logits and R_dis of order one
    "vocab_size": len(VOCAB),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,  # as many as a prompt and a reply of the mini profile take
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": EOS,
    "bos_token_id": None,
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """What every hub id stands for, {id: revision}; 40 zeros where a test says nothing else. No test asks the hub."""
    revisions = {}
    monkeypatch.setattr(provenance, "hub_revision", lambda name, kind="model": revisions.get(name, 40 * "0"))
    return revisions


@pytest.fixture(autouse=True, scope="module")
def imported_is_no_garbage():
    """Every training starts with a garbage collection: half a second on what imports and files of tests before left."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tokenizer():
    return small_tokenizer()


def small_tokenizer():
    words = Tokenizer(WordLevel(VOCAB, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="right")


@pytest.fixture
def make_model():
    return small_model


def small_model(seed=0, **changes):
    """A random Llama, tied unless told otherwise."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "tie_word_embeddings": True, **changes}))


@pytest.fixture
def make_lists():
    """Encoded ranked lists as `encoding.encode_lists` returns them: prompts of 2-4 tokens, replies of 2-6 with EOS."""

    def make(count=8, length=2, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def words(low, high):
            size = torch.randint(low, high, (), generator=generator).item()
            return torch.randint(3, len(VOCAB), (size,), generator=generator).tolist()

        ranks = [float(length - 1 - i) for i in range(length)]
        return Dataset.from_list(
            [
                {"prompt_ids": words(2, 5), "response_ids": [[*words(1, 6), EOS] for _ in ranks], "rewards": ranks}
                for _ in range(count)
            ]
        )

    return make


@pytest.fixture
def q_diff():
    values = torch.rand(len(VOCAB), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (values - values.mean()).numpy()


class Waits(TorchDispatchMode):
    """Counts where the host reads what a device computed, values or shapes: on a GPU it waits there."""

    reading = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2")
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self.count += name in self.reading or by_mask
        return function(*args, **(kwargs or {}))


class FakeJudge:
    """A reward model whose reward of a reply is `value(reply)`, its length unless given; `scored` is what it saw."""

    name, path = "r_train (fake)", "someone/reward"

    def __init__(self, value=len, spec=None):
        self.value, self.spec, self.scored = value, spec, []

    def identity(self):
        return {"judge": self.path, "spec": self.spec and vars(self.spec)}

    def score(self, prompts, replies, subsets, label=""):
        assert len(prompts) == len(replies) == len(subsets)
        self.scored += list(replies)
        return np.array([float(self.value(reply)) for reply in replies])

    def of_lists(self, path):
        responses = read_lists(path)["responses"][:]
        self.scored += [reply for of_list in responses for reply in of_list]
        return [np.array([float(self.value(reply)) for reply in of_list]) for of_list in responses]


@pytest.fixture
def help_of(monkeypatch, capsys):
    """What `deft COMMAND --help` prints, by command."""

    def shown(command):
        monkeypatch.setattr(sys, "argv", ["deft", command, "--help"])
        with pytest.raises(SystemExit) as end:
            __main__.main()
        assert end.value.code == 0
        return capsys.readouterr().out

    return shown


def pytest_collection_finish(session):
    """The process that `warm` forks from starts before any test: what it imports is not to see a test's environment."""
    if "warm" in sys.modules:
        forkserver.ensure_running()

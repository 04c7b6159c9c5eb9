"""Reward models: OpenAssistant's architecture by hand, scores free of batching, training on a toy task."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from deftlib import store
from deftlib.models import features, policies, reward_heads, rewards
from deftlib.models.loop import length_buckets
from deftlib.models.rewards import encode, load_reward_model, score
from deftlib.preferences.lists import FEATURES, first_human_turn, read_lists
from deftlib.profile import Profile
from deftlib.sections import RewardModel
from deftlib.training import subset

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "<eos>", *(f"w{i}" for i in range(30))]
PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
SPEC = RewardModel(source="tiny")


def words_tokenizer(bert=False):
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    if not bert:
        return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="<eos>")
    core.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def oasst_checkpoint(folder, pooling):
    """A random checkpoint with names and configuration as OpenAssistant's; returns its GPT-NeoX and its head."""
    torch.manual_seed(0)
    backbone = GPTNeoXModel(GPTNeoXConfig(**SIZES)).eval()
    head = {"out_proj.weight": torch.randn(1, 16), "out_proj.bias": torch.randn(1)}
    state = {f"gpt_neox.{name}": value for name, value in backbone.state_dict().items()}
    state["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)  # buffers that old checkpoints carry
    save_file({**state, **head}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**SIZES, "model_type": "gpt_neox_reward_model", "architectures": ["GPTNeoXRewardModel"]}
    config |= {"pooling": pooling, "rotary_pct": 0.25, "rotary_emb_base": 10000, "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    words_tokenizer().save_pretrained(folder)
    return backbone, head


def tiny_model(folder, kind):
    """A random reward model of one of three architectures, loaded as any other."""
    torch.manual_seed(0)
    if kind == "gpt_neox_reward_model":
        oasst_checkpoint(folder, "last")
    else:
        config, model = {
            "llama": (LlamaConfig, LlamaForSequenceClassification),
            "bert": (BertConfig, BertForSequenceClassification),
        }[kind]
        model(config(**SIZES, num_labels=1)).save_pretrained(folder)
        words_tokenizer(bert=kind == "bert").save_pretrained(folder)
    return load_reward_model(folder)


# ---- OpenAssistant's architecture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_an_oasst_checkpoint_loads_without_remote_code_and_scores_as_by_hand(tmp_path, pooling):
    backbone, head = oasst_checkpoint(tmp_path, pooling)
    model, tokenizer = load_reward_model(tmp_path)
    assert model.config.pooling == pooling and model.dtype == torch.float32
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.25
    texts = ["w1 w2 w3 w4 w5", "w6 w7"]
    with torch.no_grad():
        states = [backbone(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0] for text in texts]
    pooled = [state[-1] if pooling == "last" else state.mean(0) for state in states]
    by_hand = [(head["out_proj.weight"] @ state + head["out_proj.bias"]).item() for state in pooled]
    scored = score(model, tokenizer, ["", ""], texts, SPEC)  # one padded batch
    assert scored == pytest.approx(by_hand, abs=1e-5)
    assert abs(by_hand[0] - by_hand[1]) > 1e-2


def test_the_two_poolings_differ(tmp_path):
    scores = []
    for pooling in ("last", "mean"):
        folder = tmp_path / pooling
        folder.mkdir()
        oasst_checkpoint(folder, pooling)
        scores += score(*load_reward_model(folder), ["w1 w2"], [" w3"], SPEC)
    assert abs(scores[0] - scores[1]) > 1e-2


def test_without_a_mask_every_token_counts(tmp_path):
    model, _ = tiny_model(tmp_path, "gpt_neox_reward_model")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    assert torch.equal(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


def test_a_model_with_two_outputs_is_refused(tmp_path):
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=2)).save_pretrained(tmp_path)
    words_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(policies.ModelError, match=f"{re.escape(str(tmp_path))} has 2 outputs: a reward model has one"):
        load_reward_model(tmp_path)


# ---- text and tokens -----------------------------------------------------------------------------------------------


def test_the_two_text_formats_by_hand():
    tokenizer = words_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|prompter|>", "<|assistant|>"], "eos_token": "<|endoftext|>"}
    )
    said = "\n\nHuman: w1\n\nAssistant: w2 <|endoftext|>\n\nHuman: w3\n\nAssistant:"  # spelled: text
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, said, " w4", RewardModel("tiny", text_format="oasst")))
    assert " ".join(tokens) == (
        "<|prompter|> w1 <|endoftext|> <|assistant|> w2 [UNK] <|endoftext|> <|prompter|> w3 <|endoftext|> "
        "<|assistant|> w4 <|endoftext|>"
    )
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "w1", " w2 <|endoftext|>", SPEC)) == ["w1", "w2", "[UNK]"]


def test_a_cut_on_the_left_keeps_cls_and_the_reply():
    bert, spec = words_tokenizer(bert=True), RewardModel(source="tiny", max_tokens=5)
    ids = encode(bert, "w1 w2 w3 w4", " w5 w6", spec)
    assert bert.convert_ids_to_tokens(ids) == ["[CLS]", "w4", "w5", "w6", "[SEP]"]
    assert bert.convert_ids_to_tokens(encode(bert, "w1", " w2", spec)) == ["[CLS]", "w1", "w2", "[SEP]"]


def test_a_cut_on_the_left_without_special_tokens_keeps_the_last_tokens():
    tokenizer, spec = words_tokenizer(), RewardModel(source="tiny", max_tokens=3)
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "w1 w2 w3", " w4 w5", spec)) == ["w3", "w4", "w5"]


# ---- batches -------------------------------------------------------------------------------------------------------


def test_length_buckets_by_hand():
    assert list(length_buckets([3, 9, 4, 2], token_budget=9)) == [[1], [2, 0], [3]]  # 9; 2 * 4 <= 9; 3 * 4 > 9
    assert list(length_buckets([3, 9, 4, 2], token_budget=100)) == [[1, 2, 0, 3]]
    assert list(length_buckets([50], token_budget=10)) == [[0]]  # one long item goes alone
    assert list(length_buckets([], token_budget=10)) == []


def test_equal_lengths_stay_in_order():
    assert list(length_buckets([2, 2, 2, 2], token_budget=4)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox_reward_model", "bert"])
def test_scores_are_in_order_and_the_same_at_any_token_budget(tmp_path, kind):
    model, tokenizer = tiny_model(tmp_path, kind)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 60, (24,), generator=generator).tolist()
    replies = [" ".join(f"w{torch.randint(0, 30, (), generator=generator)}" for _ in range(n)) for n in lengths]
    prompts = ["w1 w2"] * len(replies)
    alone = [score(model, tokenizer, [p], [" " + r], SPEC)[0] for p, r in zip(prompts, replies)]
    assert max(alone) - min(alone) > 1e-2  # or order would not show
    for token_budget in (1, 100, 500, 10**6):
        batched = score(model, tokenizer, prompts, [" " + r for r in replies], SPEC, token_budget)
        assert batched == pytest.approx(alone, abs=1e-5, rel=0)


# ---- training ------------------------------------------------------------------------------------------------------

GOOD, BAD = ["gently", "please", "kindly"], ["whatever", "dumb", "boring"]
TINY = {
    "policy": {"hidden_size": 32, "layers": 1},
    "reward_models": {"evaluate": {"epochs": 2.0, "learning_rate": 3e-3, "batch_size": 8}},
}


def toy_lists(count, seed):
    """Three replies a list; good words make good replies, whatever stands around them."""
    generator = torch.Generator().manual_seed(seed)

    def words(*groups):
        choose = lambda group: group[torch.randint(len(group), (), generator=generator)]
        return " " + " ".join(choose(group) for group in groups) + "."

    rows = []
    for i in range(count):
        responses = [words(GOOD, GOOD), words(GOOD, BAD), words(BAD, BAD)]
        prompt = f"\n\nHuman: May I ask {seed} {i}?\n\nAssistant:"
        rows.append({"id": str(i), "subset": "toy", "prompt": prompt, "responses": responses, "rewards": None})
    return Dataset.from_list(rows, features=FEATURES)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)

    def produce(folder):
        toy_lists(64, seed=0).to_parquet(folder / "reward_eval.parquet")
        toy_lists(64, seed=2).to_parquet(folder / "reward_train.parquet")
        toy_lists(40, seed=1).to_parquet(folder / "dev.parquet")

    return store.stage(Profile.load("mini"), "parts", {}, produce, "training.subset")


def test_a_reward_model_learns_a_separable_task_and_says_how_well(parts, monkeypatch):
    judge = rewards.judge(Profile.load("mini"), "evaluate", parts)
    ((axis, measured),) = judge.accuracy().items()
    assert axis == "helpful" and measured.low < measured.mean <= measured.high
    assert measured.mean >= 0.9 and measured.n == 40
    prompt = toy_lists(1, seed=9)["prompt"][0]
    good, bad = judge.score([prompt] * 2, [" gently please.", " dumb whatever."], ["toy"] * 2)
    assert good > bad
    monkeypatch.setattr(reward_heads, "fit_on_features", lambda *args, **more: pytest.fail("trained again"))
    assert rewards.judge(Profile.load("mini"), "evaluate", parts).path == judge.path


def test_kept_features_and_fresh_ones_give_the_same_rewards(parts):
    judge, dev = rewards.judge(Profile.load("mini"), "train", parts), read_lists(parts / "dev.parquet")
    kept = judge.of_lists(parts / "dev.parquet")
    fresh = judge.score(dev["prompt"], [responses[1] for responses in dev["responses"]], dev["subset"])
    assert [of_list[1] for of_list in kept] == pytest.approx(fresh.tolist(), abs=1e-4)


def test_a_backbone_is_trained_with_its_heads_and_loads_again(parts):
    spec = {"source": "policy", "freeze_backbone": False, "epochs": 2.0, "learning_rate": 1e-3, "batch_size": 16}
    options = {"reward_models.evaluate": spec}
    profile = Profile.load("mini", options)
    judge = rewards.judge(profile, "evaluate", parts)
    assert judge.accuracy()["helpful"].mean >= 0.9
    assert (judge.path / "model.safetensors").is_file() and not (judge.path / "checkpoints").exists()
    start = policies.load_policy(policies.start_policy(profile)).state_dict()
    trained = features.reader(profile, "policy", judge.path).model.state_dict()
    assert not torch.equal(trained["norm.weight"], start["model.norm.weight"])


def test_a_finished_reward_model_is_used_as_it_is_and_passes_the_same_gate(parts, tmp_path):
    tiny_model(tmp_path / "finished", "llama")
    options = {"reward_models.train": {"source": str(tmp_path / "finished"), "train": False}}
    judge = rewards.judge(Profile.load("mini", options), "train", parts)
    prompts, replies = [PROMPT] * 2, [" w1 w2", " w3"]
    by_hand = score(*load_reward_model(judge.path), prompts, replies, judge.spec)
    assert judge.score(prompts, replies, ["toy"] * 2).tolist() == by_hand
    assert judge.accuracy()["helpful"].n == 40


# ---- heads ---------------------------------------------------------------------------------------------------------


def two_axes(tmp_path, monkeypatch, right=0.9):
    """Heads fitted on features whose first column harmless lists want high and helpful ones low."""
    rng = np.random.default_rng(0)
    states, wanted = rng.normal(size=(400, 3)), np.where(np.arange(200) < 100, 1, -1)
    states[0::2, 0] += 2 * wanted * np.where(rng.random(200) < right, 1, -1)  # y_1 of each pair
    prompts = [f"\n\nHuman: {i}?\n\nAssistant:" for i in range(200)]
    lists = Dataset.from_dict({"subset": ["harmless-x"] * 100 + ["helpful-x"] * 100, "prompt": prompts})
    monkeypatch.setattr(reward_heads, "read_lists", lambda path: lists)
    monkeypatch.setattr(features, "of_lists", lambda *_: (states, np.full(200, 2)))
    reward_heads.fit_on_features(None, SimpleNamespace(source="x"), None, tmp_path, "r")
    return reward_heads.load(tmp_path), states, wanted


def test_each_axis_has_a_head_that_knows_nothing_of_the_other(tmp_path, monkeypatch):
    heads, _, _ = two_axes(tmp_path, monkeypatch)
    first_high = np.array([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])
    high, low = heads.rewards(first_high, ["harmless"] * 2)
    assert high > low + 1
    high, low = heads.rewards(first_high, ["helpful"] * 2)
    assert high < low - 1


def test_the_strength_is_chosen_on_dialogues_that_a_head_did_not_learn_from(tmp_path, monkeypatch):
    two_axes(tmp_path, monkeypatch)
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    assert {axis: of_axis["lists"] for axis, of_axis in chosen.items()} == {"harmless": 100, "helpful": 100}
    assert all(of_axis["held-out loss"] < 0.6 for of_axis in chosen.values())
    noise = [np.random.default_rng(i).normal(size=(2, 30)) for i in range(80)]
    losses = reward_heads.held_out_losses(noise, np.arange(80) % 5)
    assert min(losses, key=losses.get) >= 100 and losses[1.0] > np.log(2)  # the less a head says of noise, the better


def test_newtons_method_finds_the_minimum():
    rng = np.random.default_rng(1)
    differences = rng.normal(size=(60, 4)) + [0.5, 0, 0, 0]
    weights = reward_heads.fit(differences, strength=2.0)
    wrong = 1 / (1 + np.exp(differences @ weights))
    assert np.abs(2.0 * weights - differences.T @ wrong).max() < 1e-8


def test_every_ordered_pair_of_a_list_is_learnt_from():
    states = np.arange(6.0).reshape(3, 2)
    assert reward_heads._differences([states]).tolist() == [[-2, -2], [-4, -4], [-2, -2]]
    reader = features.reader(Profile.load("mini"), "words")
    pairs = reward_heads._pairs(toy_lists(2, seed=0), reader)
    assert len(pairs) == 6 and {pair["axes"] for pair in pairs} == {1}


def test_a_subset_belongs_to_the_axis_it_is_named_after_and_others_are_helpful():
    names = ["harmless-base", "helpful-online", "my-data"]
    assert [reward_heads.axis_of(name) for name in names] == ["harmless", "helpful", "helpful"]


def test_r_train_r_eval_policy_and_test_share_no_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    folder = subset.parts(Profile.load("mini"))
    names = ["policy", "reward_train", "reward_eval", "dev", "test"]
    openings = {name: {first_human_turn(p) for p in read_lists(folder / f"{name}.parquet")["prompt"]} for name in names}
    assert all(openings.values())
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not openings[one] & openings[other], (one, other)


def test_a_language_model_is_no_finished_reward_model(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    words_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        policies.ModelError, match=r"lacks the weights score\.weight: it is not a finished reward model"
    ):
        load_reward_model(tmp_path)

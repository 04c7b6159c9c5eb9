"""`PROFILE=paper` in miniature: all that the published setting needs, small enough for two cores and no network.

    folder = build(tmp_path)              # a project's folder of its own, with data and models
    overrides(folder, server.url)         # what of the profile is changed: where things come from, and nothing else

Every model is random and has the architecture, the tokenizer's habits (LLaMA's begins with BOS and has nothing to pad
with) and the number of positions of the one it stands for. The lists have the form of HH-RLHF's; their openings are
chosen by hash, so that of 64 lists the published shares leave eight for `dev`, and no share has to be changed.
"""

import gzip
import json
import random
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from deftlib.models.rewards import GPTNeoXRewardModel, GPTNeoXRewardModelConfig
from deftlib.preferences.lists import split_of
from deftlib.preferences.sources import SUBSETS
from deftlib.profile import Profile

ROOT = Path(__file__).resolve().parent.parent
LISTS, HELD_OUT, TESTS = 16, 2, 3  # of each subset; HELD_OUT of LISTS fall to `dev`
CATEGORIES = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
TOPICS = ["bread", "a bicycle", "the garden", "my neighbour", "a letter", "the roof", "a train ride", "soup", "a cat"]
GOOD = ["Gladly.", "Take your time with it.", "I would begin with the small things.", "That is kind of you to ask."]
BAD = ["No.", "Why would you want that?", "You should know this by now.", "I do not care about it."]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


# ---- data --------------------------------------------------------------------------------------------------------


def write_lists(folder):
    """`<subset>/{train,test}.jsonl.gz` as HH-RLHF's: chosen and rejected, whole dialogues. Returns all texts."""
    shares, draw, texts, number = Profile.load("paper").data.shares, random.Random(0), [], 0
    for subset in SUBSETS:
        wanted = {("train", "policy"): LISTS - HELD_OUT, ("train", "dev"): HELD_OUT, ("test", None): TESTS}
        for split in ("train", "test"):
            rows = []
            while any(n for (of, _), n in wanted.items() if of == split):
                number += 1
                opening = f"What should I do about {draw.choice(TOPICS)}, case {number}?"
                part = split_of(f"\n\nHuman: {opening}", shares) if split == "train" else None
                if wanted[split, part]:
                    wanted[split, part] -= 1
                    rows.append(_pair(opening, draw))
            (folder / subset).mkdir(parents=True, exist_ok=True)
            with gzip.open(folder / subset / f"{split}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            texts += [text for row in rows for text in row.values()]
    return texts


def _pair(opening, draw):
    """A row of HH-RLHF; one dialogue in three has a turn before, one in three a paragraph that PRO's cleaning drops."""
    prompt = f"\n\nHuman: {opening}"
    if draw.random() < 1 / 3:
        prompt += f"\n\nAssistant: Tell me more.\n\nHuman: It is about {draw.choice(TOPICS)} too."
    replies = [" ".join(draw.sample(of, 3)) for of in (GOOD, BAD)]
    more = "\n\nThere is more to say." if draw.random() < 1 / 3 else ""
    return dict(zip(("chosen", "rejected"), (f"{prompt}\n\nAssistant: {reply}{more}" for reply in replies)))


def write_questions(folder):
    """Eighty MT-Bench questions of our own in FastChat's layout, with the judge prompts of the mini world."""
    folder.mkdir(parents=True)
    (folder / "judge_prompts.jsonl").write_bytes((ROOT / "data/mini/mt_bench/judge_prompts.jsonl").read_bytes())
    questions, answers = [], []
    for number in range(80):
        turns = [f"Question {number}: what of {TOPICS[number % len(TOPICS)]}?", "And what would you add?"]
        of_question = {"question_id": 81 + number, "category": CATEGORIES[number // 10], "turns": turns}
        questions.append(of_question)
        answers.append({"question_id": 81 + number, "choices": [{"index": 0, "turns": GOOD[:2]}]})
    for path, rows in (("question.jsonl", questions), ("reference_answer/gpt-4.jsonl", answers)):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- models ------------------------------------------------------------------------------------------------------


def tokenizer_of(texts, special, template=None, **names):
    """A byte-level BPE of few hundred tokens. template: what is put around a text, as post-processors write it."""
    core = Tokenizer(models.BPE(unk_token=names.get("unk_token")))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    if template:
        ids = [(token, core.token_to_id(token)) for token in special if token in template]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def write_policy(folder, texts, model, config, **more):
    """A random causal language model whose replies end, as those of a trained one do: its EOS is loud."""
    tokenizer = tokenizer_of(
        texts, ["<unk>", "<s>", "</s>"], "<s> $A", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    made = model(config(**SIZES, **vocabulary, initializer_range=0.2, **more))
    with torch.no_grad():
        made.lm_head.weight[2] *= 3
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_reward_model(folder, texts, pooling, **sizes):
    """A random reward model of OpenAssistant's architecture."""
    special = ["<|endoftext|>", "<|padding|>", "<|prompter|>", "<|assistant|>"]
    tokenizer = tokenizer_of(texts, special, eos_token=special[0], pad_token=special[1])
    torch.manual_seed(0)
    more = {"vocab_size": len(tokenizer) + 16, "pooling": pooling, "initializer_range": 0.2}
    config = GPTNeoXRewardModelConfig(**SIZES | sizes, **more, max_position_embeddings=2048)
    GPTNeoXRewardModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_bart(folder, texts):
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special))
    tokenizer = tokenizer_of(texts, special, "<s> $A </s>", model_max_length=1024, **names)
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16}
    BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- all of it ---------------------------------------------------------------------------------------------------


def build(folder):
    """A project's folder (`DEFT_ROOT`) that holds the profiles and notebooks of this one, `data` and `models`."""
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")  # where they run, ".." is this folder
    for shared in ("data", "figures/smol"):
        (folder / shared).parent.mkdir(parents=True, exist_ok=True)
        (folder / shared).symlink_to(ROOT / shared)
    texts = write_lists(folder / "given/hh-rlhf")
    write_questions(folder / "given/mt_bench")
    made = folder / "models"
    write_policy(made / "llama", texts, LlamaForCausalLM, LlamaConfig, max_position_embeddings=2048)
    for name in ("mistral", "zephyr"):
        more = {"num_key_value_heads": 2, "sliding_window": 4096}
        write_policy(made / name, texts, MistralForCausalLM, MistralConfig, max_position_embeddings=32768, **more)
    write_reward_model(made / "oasst-1.4b", texts, "last")
    write_reward_model(made / "oasst-6.9b", texts, "mean", hidden_size=48, num_hidden_layers=3)
    write_bart(made / "bart", texts)
    return folder


def overrides(folder, url):
    """{key: value}: the folders of the models instead of their hub ids, and a server where the profile names none.

    `data.source` stays hh-rlhf: $DEFT_DATA is the folder `given`.
    """
    made, server = folder / "models", {"url": url, "model": "stand-in"}
    zero_shot = [{"name": name, "source": str(made / name.lower())} for name in ("Mistral", "Zephyr")]
    return {
        "policy.source": str(made / "llama"),
        "reward_models.train.source": str(made / "oasst-1.4b"),
        "reward_models.evaluate.source": str(made / "oasst-6.9b"),
        "evaluation.bart": str(made / "bart"),
        "evaluation.zero_shot": zero_shot,
        "evaluation.refiner": server,
        "evaluation.pair_judge": server,
        "mt_bench.judge": server,
        "launch.processes": 1,  # of two cores; part of no result's key
    }


def said_by_the_server(body):
    """What the stand-in says as judge, as judge of pairs and as refiner: it likes what is long."""
    asked = body["messages"][-1]["content"]
    if "Rewrite the reference answer" in asked:
        return asked.rpartition("[Reference answer]\n")[2].strip() + " I hope that helps."
    if "[[A]]" in asked or "[[A]]" in body["messages"][0]["content"]:
        return "The longer one. [[A]]" if len(asked) % 3 else "Alike. [[C]]"
    return f"It says much. Rating: [[{1 + len(asked) % 10}]]"

"""The reply in what was said: every way to mark reasoning, role headers, end markers, and where the next turn begins.

| kind | example | right value |
|---|---|---|
| reasoning | `<think>[[5]]</think>[[9]]`, opened by the prompt, cut, of Kimi, gpt-oss, Granite | what follows it |
| a tag that is text | "the `<think>` tag" | untouched |
| markup | role headers, end-of-turn tokens, boxes, `<answer>` | the text between |
| the next turn | "… train. human: …" | cut; never inside a word or a sentence |
"""

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from deftlib.models.said import first_turn, reply_in
from deftlib.preferences import dialogues

HH = Path(os.environ.get("DEFT_DATA", "/nowhere")) / "hh-rlhf"


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ('<think> hm "[[5]] as in the example" hm </think> Good. [[9]]', "Good. [[9]]"),
        ("I think of [[5]]\n</think>\n\n[[9]]", "[[9]]"),  # DeepSeek, Qwen: the prompt ends in <think>
        ("Let me see.</think>[[9]]", "[[9]]"),
        ("<think>\nnever closed [[5]]", ""),
        ("\n<think></think>\n\nHi", "Hi"),  # Qwen without thinking
        ("<think>the tag `</think>` ends it, [[5]]</think>[[9]]", "[[9]]"),
        ("<think>a</think>One.\n<think>b</think>\nTwo.", "One.\n\nTwo."),
        ("<thinking>a</thinking>\nB", "B"),
        ("<reasoning>a</reasoning>B", "B"),
        ("<seed:think>a</seed:think>B", "B"),
        ("[THINK]a [[5]][/THINK]B", "B"),
        ("<THINK>a</THINK>B", "B"),
        ("<|START_THINKING|>a<|END_THINKING|>B", "B"),
        ("<|begin_of_thought|>a<|end_of_thought|>B", "B"),
        ("Sure.\n<think>[[5]]</think>\n[[9]]", "Sure.\n\n[[9]]"),
        ("analysisWe need [[5]]", ""),
        ("<|channel|>commentary to=f<|message|>[[5]]<|call|><|channel|>final<|message|>[[9]]", "[[9]]"),
        ("◁think▷a◁/think▷B", "B"),
        (
            "<|channel|>analysis<|message|>[[5]]<|end|><|start|>assistant<|channel|>final<|message|>[[9]]<|return|>",
            "[[9]]",
        ),
        ("analysisWe need [[5]].assistantfinalIt is [[9]]", "It is [[9]]"),
        ("Here is my thought process:\n[[5]]\n\nHere is my response:\n[[9]]", "[[9]]"),
        ("<think>x</think><answer>[[9]]</answer>", "[[9]]"),
        ("Rating: <|begin_of_box|>[[9]]<|end_of_box|>", "Rating: [[9]]"),
        ("Fine.<|im_end|>\n<|im_start|>user\nmore", "Fine."),
        ("<|im_start|>assistant\nFine.<|im_end|>", "Fine."),
        ("<|start_header_id|>assistant<|end_header_id|>\n\nFine.<|eot_id|>", "Fine."),
        ("Fine.</s>", "Fine."),
    ],
)
def test_only_the_reply_is_left(text, reply):
    assert reply_in(text) == reply
    assert reply_in(reply) == reply


@pytest.mark.parametrize(
    "text",
    [
        " Plain, with its spaces. ",
        "Write `<think>` before and `</think>` after it.",
        "The tag <think> opens reasoning.",
        "A stray </think> in prose.",
        "The closing tag is '</think>', always.",
        "GPT-2 uses <|endoftext|> as its end, ChatML `<|im_end|>`.",
        "```\n<think>a</think>\n```",
        "In HTML </s> once was strike.",
        "My analysis: fine. The assistant's final word.",
    ],
)
def test_what_only_speaks_of_markup_is_text(text):
    assert reply_in(text) == text


@pytest.mark.parametrize(
    "text",
    ["a" + "\n" * 50_000 + "b", "x <think>" * 10_000, "</think>" * 5_000, "</s>" * 20_000 + "x", "\n\n. " * 20_000],
    ids=["newlines", "opened", "closed", "ends", "sentences"],
)
def test_long_nonsense_takes_no_time(text):
    start = time.monotonic()
    reply_in(text)
    first_turn(text)
    dialogues.canonical(text)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("said", "reply"),
    [
        (" Take the train.", " Take the train."),
        (" Take the train.\n\nHuman: And then?\n\nAssistant: Walk.", " Take the train."),
        (" Take the train.\n\nAssistant: Walk.\n\nHuman: No.", " Take the train."),
        (" Take the train. human: And then?", " Take the train."),
        (" Take the train.\nASSISTANT: Walk.", " Take the train."),
        (' "Take the train." Human: And then?', ' "Take the train."'),
        (" Take the train (or a bus!)  Human: And then?", " Take the train (or a bus!)"),
        (" Take the train.\n### Human: And then?", " Take the train."),
        (" Take the train\n**Human:** And then?", " Take the train"),
        ("\n\nHuman: Hello?", ""),
        (" A human assistant is a human, I say: yes. \n", " A human assistant is a human, I say: yes."),
        (" Executive assistant: you book the train.", " Executive assistant: you book the train."),
        (" The rights of every human: food.", " The rights of every human: food."),
        (" You said “human: How can I", " You said “human: How can I"),
        (" One.\n\nTwo: three.\n\n- four", " One.\n\nTwo: three.\n\n- four"),
    ],
)
def test_a_reply_ends_where_the_next_turn_begins_and_nowhere_else(said, reply):
    assert first_turn(said) == reply


@pytest.mark.skipif(not HH.is_dir(), reason="DEFT_DATA names no folder with hh-rlhf/")
def test_what_people_wrote_is_cut_only_where_a_turn_begins():
    rows = [
        json.loads(line)
        for path in sorted(HH.glob("*/*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    replies = [row[side].rpartition("\n\nAssistant:")[2] for row in rows for side in ("chosen", "rejected")]
    assert all(reply_in(reply) == reply for reply in replies)
    cut = [reply for reply in replies if first_turn(reply) != reply.rstrip()]
    assert len(cut) == 97  # 82 of them begin as the human, as HH-RLHF has them
    for reply in cut:
        after = reply[len(first_turn(reply)) :].lstrip(" \n#*")
        assert after.lower().startswith(("human:", "assistant:"))

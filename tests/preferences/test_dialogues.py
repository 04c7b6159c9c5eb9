"""One parser of dialogues: what it reads it gives back, whatever dialect it came in, and chat templates get all of it.

| kind | example | right value |
|---|---|---|
| line breaks | CRLF, CR, single newlines between turns | the dialogue in the format |
| dialect | Vicuna, Guanaco, ChatML, OASST, Zephyr, Llama 2 | the same |
| a turn of several paragraphs | lists, blank lines, an empty first line | all of it, in its own turn |
| turns of one role in a row | Human, Human, Assistant | one message, joined by a blank line |
"""

import gzip
import json
import os
from pathlib import Path

import pytest

from deftlib.preferences import dialogues
from deftlib.preferences.dialogues import canonical, from_messages, messages, turns

HH = Path(os.environ.get("DEFT_DATA", "/nowhere")) / "hh-rlhf"
DIALOGUE = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: A list:\n\n- one\n- two\n\nAssistant: Fine."
DIALECTS = {
    "CRLF": DIALOGUE.replace("\n", "\r\n"),
    "CR": DIALOGUE.replace("\n", "\r"),
    "no blank line first": DIALOGUE.strip(),
    "single newlines": "Human: Hi!\nAssistant: Hello.\nHuman: A list:\n\n- one\n- two\nAssistant: Fine.",
    "single CRLF": "Human: Hi!\r\nAssistant: Hello.\r\nHuman: A list:\r\n\r\n- one\r\n- two\r\nAssistant: Fine.",
    "single and double": "Human: Hi!\nAssistant: Hello.\n\nHuman: A list:\n\n- one\n- two\n\nAssistant: Fine.",
    "User": "User: Hi!\n\nAssistant: Hello.\n\nUser: A list:\n\n- one\n- two\n\nAssistant: Fine.",
    "Vicuna": "USER: Hi! ASSISTANT: Hello.</s>USER: A list:\n\n- one\n- two ASSISTANT: Fine.</s>",
    "Guanaco": "### Human: Hi!### Assistant: Hello.### Human: A list:\n\n- one\n- two### Assistant: Fine.",
    "ChatML": "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nA list:\n\n- one\n- two<|im_end|>\n<|im_start|>assistant\nFine.<|im_end|>\n",
    "OASST": "<|prompter|>Hi!<|endoftext|><|assistant|>Hello.<|endoftext|>"
    "<|prompter|>A list:\n\n- one\n- two<|endoftext|><|assistant|>Fine.<|endoftext|>",
    "Zephyr": "<|user|>\nHi!</s>\n<|assistant|>\nHello.</s>\n"
    "<|user|>\nA list:\n\n- one\n- two</s>\n<|assistant|>\nFine.",
    "Alpaca": "### Instruction:\nHi!\n\n### Response:\nHello.\n\n### Instruction:\nA list:\n\n- one\n- two\n\n"
    "### Response:\nFine.",
    "Gemma": "<bos><start_of_turn>user\nHi!<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
    "<start_of_turn>user\nA list:\n\n- one\n- two<end_of_turn>\n<start_of_turn>model\nFine.<end_of_turn>\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "A list:\n\n- one\n- two<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nFine.<|eot_id|>",
    "Llama 2": "<s>[INST] Hi! [/INST] Hello. </s><s>[INST] A list:\n\n- one\n- two [/INST] Fine. </s>",
}


@pytest.mark.parametrize("text", DIALECTS.values(), ids=DIALECTS)
def test_a_dialogue_of_another_dialect_is_the_same_dialogue(text):
    assert canonical(text) == DIALOGUE


def test_a_dialogue_in_the_format_and_other_text_stay_as_they_are():
    for text in (DIALOGUE, "What are the rights of every human: food?", "I ask: is an assistant: a human?", "", "  "):
        assert canonical(text) == text
    assert canonical("\n\nHuman: a\n\nHuman: b\n\nAssistant:") == "\n\nHuman: a\n\nHuman: b\n\nAssistant:"
    quoted = "\n\nHuman: Translate:\nAssistant: hello\n\nAssistant: hallo"  # alternates as it is
    assert canonical(quoted) == quoted


def test_what_a_system_says_stands_before_the_first_human_turn():
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert canonical(text) == "\n\nHuman: Be kind.\n\nHi\n\nAssistant:"
    vicuna = "A chat between a user and an assistant. USER: Hi ASSISTANT:"
    assert canonical(vicuna) == "\n\nHuman: A chat between a user and an assistant.\n\nHi\n\nAssistant:"
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert from_messages(said) == [("Human", " Be kind.\n\nHi")]
    said += [{"role": "assistant", "content": "Ho"}, {"role": "system", "content": "Be brief."}]
    said += [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "And?"}]}]
    assert from_messages(said)[1:] == [("Assistant", " Ho"), ("Human", " Be brief.\n\nAnd?")]


@pytest.mark.parametrize(
    ("prompt", "content"),
    [
        ("\n\nHuman:\n\nAssistant:", ""),
        ("\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: \n\nAssistant:", ""),
        ("\n\nHuman: \n\nHuman: Hi\n\nAssistant:", "Hi"),
    ],
)
def test_the_human_who_is_answered_has_the_last_word_even_an_empty_one(prompt, content):
    assert dialogues.messages(prompt)[-1] == {"role": "user", "content": content}


def test_turns_and_text_are_inverse():
    assert turns(DIALOGUE) == [
        ("Human", " Hi!"),
        ("Assistant", " Hello."),
        ("Human", " A list:\n\n- one\n- two"),
        ("Assistant", " Fine."),
    ]
    for text in (DIALOGUE, "\n\nHuman:  two spaces\n\n\n\nAssistant:\n\nHuman:\n\nAssistant: end \n"):
        assert dialogues.text(turns(text)) == text
    assert turns("no turn at all") == [("Human", " no turn at all")]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("\n\nHuman: Fix this:\n\nNote: x = 1\n\nThanks\n\nAssistant:", ["Fix this:\n\nNote: x = 1\n\nThanks"]),
        ("\n\nHuman:\n\n- a\n- b\n\nAssistant: ok\n\nHuman: c\n\nAssistant:", ["- a\n- b", "ok", "c"]),
        (
            "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d\n\nHuman: e\n\nAssistant:",
            ["a\n\nb", "c\n\nd", "e"],
        ),
        ("\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant:", ["a\n\nb"]),
    ],
)
def test_no_word_of_a_prompt_is_lost_or_given_to_the_other_speaker(prompt, said):
    found = messages(prompt)
    assert [message["content"] for message in found] == said
    assert [message["role"] for message in found] == ["user", "assistant", "user"][: len(said)]


@pytest.mark.parametrize(
    "found",
    [
        [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}],
        [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello."}],  # ShareGPT
        [{"role": "user", "content": [{"type": "text", "text": "Hi!"}]}, {"role": "Assistant", "content": " Hello. "}],
    ],
)
def test_messages_of_every_kind_become_turns(found):
    assert from_messages(found) == [("Human", " Hi!"), ("Assistant", " Hello.")]


@pytest.mark.parametrize(
    "found", [["text"], [{"role": "user"}], [{"role": "tool", "content": "x"}], [{"content": "x"}]]
)
def test_what_is_no_message_is_refused(found):
    with pytest.raises(ValueError, match=r"message|role"):
        from_messages(found)


@pytest.mark.skipif(not HH.is_dir(), reason="DEFT_DATA names no folder with hh-rlhf/")
def test_every_dialogue_of_hh_rlhf_survives_the_round_trip():
    rows = [
        json.loads(line)
        for path in sorted(HH.glob("*/*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    assert len(texts) == 17_104
    assert all(dialogues.text(turns(text)) == text for text in texts)
    changed = [text for text in texts if canonical(text) != text]
    assert len(changed) == 2 and all("\n\n Human:  Ah, th" in text for text in changed)  # both sides of one pair
    for text in set(texts) - set(changed):
        assert canonical(text.replace("\n", "\r\n")) == text
        said = "".join(message["content"] for message in messages(text))
        assert len("".join(said.split())) == sum(len("".join(part.split())) for _, part in turns(text))

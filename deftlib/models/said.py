r"""The reply in what a model or a server said: without its reasoning, its own markup and the turns that it plays next.

reply_in("<think>Is it 5? No.</think>\n\nIt is 9.")       # "It is 9."
first_turn(" Take the train. human: Thanks!")            # " Take the train."
"""

import re

# A sentence ends with a mark, and perhaps with what closes a quote or a bracket after it.
_ROLE = r"(?:\*\*|#+ ?)?(?:human|assistant)\s?:"
NEXT_TURN = re.compile(rf"(?:^|(?<=[.!?…])|(?<=[.!?…][\"'”’)\]*]))[ \t]*(?={_ROLE})", re.IGNORECASE | re.MULTILINE)

_TAG = r"(?:think|thinking|thought|reasoning|seed:think|mm:think)"
_QUOTE = "[`'\"]"  # a tag inside is spoken of
_BLOCKS = [  # (what opens reasoning, what closes it)
    (rf"<{_TAG}>", rf"(?<!{_QUOTE})</{_TAG}>(?!{_QUOTE})"),
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    (r"◁think▷", r"◁/think▷"),  # Kimi
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Cohere
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"(?:Here is|Here's) my thought process:", r"(?:Here is|Here's) my response:"),  # Granite
    (r"analysis(?=[A-Z])", r"assistantfinal"),  # gpt-oss without its special tokens
]
_CLOSE = re.compile("|".join(closer for _, closer in _BLOCKS[:5]), re.IGNORECASE)
_PAIRS = [(re.compile(opener, re.IGNORECASE), re.compile(closer, re.IGNORECASE)) for opener, closer in _BLOCKS]
_LINE_OPENER = re.compile(rf"\n[ \t]*(?=<{_TAG}>|\[THINK\]|◁think▷)", re.IGNORECASE)
_FINAL = re.compile(r"<\|channel\|>\s*final[^<]*<\|message\|>")  # gpt-oss
_START = r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|start\|>|<\|user\|>|<\|prompter\|>|<s>"
_END = re.compile(rf"(?:<\|(?:im_end|eot_id|eom_id|end|return|endoftext)\|>|<end_of_turn>|</s>)\s*(?:\Z|{_START})")
_HEADER = re.compile(
    r"\A\s*(?:<\|im_start\|>\s*assistant\s*\n|<\|start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>"
    r"|<start_of_turn>model\n|<\|assistant\|>)"
)
_BOX = re.compile(r"<\|(?:begin|end)_of_box\|>")
_ANSWER = re.compile(r"\A\s*<answer>(.*)</answer>\s*\Z", re.DOTALL)


def reply_in(text):
    """What was meant to be read: no reasoning, in any of the ways to mark it, no role header, nothing after the end.

    Reasoning stands first, or at a line's start where no code is shown; what was cut in it leaves nothing: "". A tag
    inside a sentence, in quotes or in code is text.
    """
    said = _peeled(text)
    while said != text:
        text, said = said, _peeled(said)
    return said


def _peeled(text):
    """The text without one layer of what is not meant to be read."""
    final = list(_FINAL.finditer(text))
    if final:
        said = text[final[-1].end() :]
    elif text.lstrip().startswith("<|channel|>"):
        return ""
    else:
        said = _without_block(text)
    said = _BOX.sub("", _HEADER.sub("", said))
    end = _END.search(said)
    said = said[: end.start()] if end else said
    inside = _ANSWER.match(said)
    said = inside[1] if inside else said
    return said if said == text else said.strip()


def _without_block(text):
    """The text without its first block of reasoning; nothing where that was never closed."""
    body = text.lstrip()
    for opener, closer in _PAIRS:
        if opener.match(body):
            closed = closer.search(body)
            return body[closed.end() :] if closed else ""
    later = next((found for found in _LINE_OPENER.finditer(text) if not _in_code(text, found)), None)
    closed = next((found for found in _CLOSE.finditer(text) if not _in_code(text, found)), None)
    if later and closed and later.end() < closed.start():
        return text[: later.start()] + "\n" + text[closed.end() :]
    if later and not closed:
        return text[: later.start()]
    if closed and not later and not re.match(r" \S", text[closed.end() : closed.end() + 2]):
        return text[closed.end() :]  # opened by the prompt
    return text


def _in_code(text, found):
    return text.count("```", 0, found.start()) % 2 == 1


def first_turn(said):
    """The reply before its speaker plays the next turn: at a line's start or after a sentence, in any case."""
    return NEXT_TURN.split(said, maxsplit=1)[0].rstrip()

r"""The reply in what a model or a server said: without its reasoning, its own markup and the turns that it plays next.

reply_in("<think>Is it 5? No.</think>\n\nIt is 9.")       # "It is 9."
first_turn(" Take the train. human: Thanks!")            # " Take the train."
"""

import re

# A sentence ends with a mark, and perhaps with what closes a quote or a bracket after it.
_ROLE = r"(?:\*\*|#+ ?)?(?:human|assistant)\s?:"
NEXT_TURN = re.compile(rf"(?:^|(?<=[.!?…])|(?<=[.!?…][\"'”’)\]*]))\s*(?={_ROLE})", re.IGNORECASE | re.MULTILINE)

_TAG = r"(?:think|thinking|thought|reasoning|seed:think|mm:think)"
_REASONING = [  # a whole block: tags not quoted as code, so that reasoning may speak of its own closing tag
    rf"(?<!`)<{_TAG}>.*?(?<!`)</{_TAG}>(?!`)",
    r"\[THINK\].*?\[/THINK\]",  # Magistral
    r"◁think▷.*?◁/think▷",  # Kimi
    r"<\|channel\|>(?:analysis|commentary)<\|message\|>.*?(?=<\|start\|>|<\|channel\|>final|\Z)",  # gpt-oss
    r"\Aanalysis(?=\S).*?assistantfinal",  # the same, without its special tokens
    r"\A(?:Here is|Here's) my thought process:.*?(?:Here is|Here's) my response:",  # Granite
]
_BLOCK = re.compile("|".join(rf"(?:{pattern})" for pattern in _REASONING), re.DOTALL)
_CLOSE = rf"(?:</{_TAG}>|\[/THINK\]|◁/think▷)"
_CLOSED = re.compile(rf"\A.*?(?:(?<![`\s]){_CLOSE}(?!`)|(?<!`){_CLOSE}(?!`| \S))", re.DOTALL)  # opened by the prompt
_OPENED = re.compile(rf"(?:\A|\n)\s*(?:<{_TAG}>|\[THINK\]|◁think▷).*\Z", re.DOTALL)  # and never closed
_END = re.compile(r"<\|(?:im_end|eot_id|eom_id|end|return|endoftext)\|>|<end_of_turn>|(?:</s>\s*)+\Z")
_HEADER = re.compile(
    r"\A\s*(?:<\|im_start\|>\s*assistant\s*\n|<\|start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>"
    r"|<start_of_turn>model\n|<\|channel\|>final<\|message\|>|<\|assistant\|>)+"
)
_BOX = re.compile(r"<\|(?:begin|end)_of_box\|>")
_ANSWER = re.compile(r"\A\s*<answer>(.*)</answer>\s*\Z", re.DOTALL)


def reply_in(text):
    """What was meant to be read: no reasoning, in any of the ways to mark it, no role header, nothing after the end.

    Reasoning that was cut leaves nothing: "". A tag in the middle of a sentence, or quoted as code, is text.
    """
    said = _peeled(text)
    return said if said == text else reply_in(said)


def _peeled(text):
    """The text without one layer of what is not meant to be read."""
    said = _BLOCK.sub("", text)
    if _CLOSED.match(said) and not re.match(rf"\s*<{_TAG}>", said):
        said = _CLOSED.sub("", said, count=1)
    said = _BOX.sub("", _HEADER.sub("", _OPENED.sub("", said)))
    said = _END.split(said, maxsplit=1)[0]
    inside = _ANSWER.match(said)
    said = inside[1] if inside else said
    return said if said == text else said.strip()


def first_turn(said):
    """The reply before its speaker plays the next turn: at a line's start or after a sentence, in any case."""
    return NEXT_TURN.split(said, maxsplit=1)[0].rstrip()

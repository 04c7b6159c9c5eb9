r"""Dialogues as text: one format, every way into it, and the turns that reading, prompting and chat templates agree on.

    canonical("Human: Hi!\r\nAssistant: Hello.")       # "\n\nHuman: Hi!\n\nAssistant: Hello."
    turns("\n\nHuman: Hi!\n\nAssistant: Hello.")       # [("Human", " Hi!"), ("Assistant", " Hello.")]
    messages("\n\nHuman: Hi!\n\nAssistant:")           # [{"role": "user", "content": "Hi!"}]

A turn begins after a blank line with its role and a colon and reaches to the next one: paragraphs, lists and blank
lines in between are its own.
"""

import re
from itertools import pairwise

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"Human": "user", "Assistant": "assistant"}  # as chat templates name them

_OPENER = re.compile(r"\n\n(Human|Assistant):")
_CARRIAGE = re.compile(r"\r\n?[ \t]*(?:Human|Assistant|User|USER|ASSISTANT):")
_LINE, _ANYWHERE = r"(?:\A|(?<=\n))[ \t]*", r"(?<!\s)\s*"
_DIALECTS = [  # what others write: where turns open, before a human's, before an assistant's, after any
    (_LINE, r"Human:", r"Assistant:", ""),  # single line breaks
    (_LINE, r"User:", r"Assistant:", ""),
    (_ANYWHERE, r"USER:", r"ASSISTANT:", r"</s>"),  # Vicuna: all on one line
    (_ANYWHERE, r"###\s*Human:", r"###\s*Assistant:", ""),  # Guanaco
    (_ANYWHERE, r"<\|im_start\|>user\n?", r"<\|im_start\|>assistant\n?", r"<\|im_end\|>"),  # ChatML: Qwen, SmolLM
    (_ANYWHERE, r"<\|(?:prompter|user)\|>", r"<\|assistant\|>", r"<\|endoftext\|>|<\|end\|>|</s>"),  # OASST, Zephyr
    (_ANYWHERE, r"(?:<s> ?)?\[INST\]", r"\[/INST\]", r"</s>"),  # Llama 2, Mistral
    (_ANYWHERE, r"###\s*Instruction:", r"###\s*Response:", ""),  # Alpaca
    (_ANYWHERE, r"<start_of_turn>user\n?", r"<start_of_turn>model\n?", r"<end_of_turn>"),  # Gemma
    (  # Llama 3
        _ANYWHERE,
        r"<\|start_header_id\|>user<\|end_header_id\|>",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>",
        r"<\|eot_id\|>",
    ),
]
_MARKUP = re.compile(  # around what stands before the first turn
    r"<s>|<bos>|<\|begin_of_text\|>|<\|im_start\|>system\n|<\|system\|>|<\|start_header_id\|>system<\|end_header_id\|>"
    r"|<\|im_end\|>|<\|endoftext\|>|<\|end\|>|<\|eot_id\|>|</s>"
)


def turns(dialogue):
    """[(role, what follows the colon), ...] of a dialogue in the format, white space and all: `text` gives it back.

    role: "Human" or "Assistant". Text before the first turn is a human's.
    """
    before, *parts = _OPENER.split(dialogue)
    said = list(zip(parts[::2], parts[1::2]))
    return [("Human", f" {before.strip()}"), *said] if before.strip() else said


def text(turns):
    """The dialogue of these turns."""
    return "".join(f"\n\n{role}:{said}" for role, said in turns)


def canonical(dialogue):
    """A dialogue in the format, from any of the dialects above and with any line breaks; other text stays as it is.

    A text that could be read in two ways is read so that its turns alternate.
    """
    if _CARRIAGE.search(dialogue):
        dialogue = dialogue.replace("\r\n", "\n").replace("\r", "\n")
    body = dialogue.strip()
    if body.startswith(("Human:", "Assistant:")) and not _OPENER.match(dialogue):
        dialogue = f"\n\n{body}"
    plain = turns(dialogue) if _OPENER.match(dialogue) else []
    if len(plain) > 1 and _alternate(plain):
        return dialogue
    for dialect in _DIALECTS:
        found = _parsed(body, *dialect)
        if _alternate(found):
            return dialogue if len(found) == len(plain) else text(found)
    return dialogue


def messages(prompt):
    """A prompt in the format as chat messages: empty turns left out, neighbours of one role joined by a blank line.

    An empty turn of the human who is answered stays: templates and servers want the last word to be theirs.
    """
    found, asked = [], [(role, said) for role, said in turns(prompt) if role == "Human" or said.strip()]
    for role, said in asked:
        said, role = said.strip(), ROLES[role]
        if said and found and found[-1]["role"] == role:
            found[-1]["content"] += f"\n\n{said}"
        elif said:
            found.append({"role": role, "content": said})
    if asked and asked[-1][0] == "Human" and not asked[-1][1].strip():
        found.append({"role": "user", "content": ""})
    return found


def from_messages(found):
    """Turns of a list of {"role", "content"}: what a system says stands before the next human turn (our choice).

    Raises ValueError with the shape of what is no such list.
    """
    names = {"user": "Human", "human": "Human", "prompter": "Human", "assistant": "Assistant", "gpt": "Assistant"}
    before, said = [], []
    for message in found:
        role, content = _role_and_content(message)
        if role in ("system", "developer"):
            before.append(content.strip())
        elif role in names:
            content = content.strip()
            if before and names[role] == "Human":
                content, before = "\n\n".join([*before, content]), []
            said.append((names[role], f" {content}"))
        else:
            raise ValueError(f"role {role!r}")
    return said


def _role_and_content(message):
    """Of {"role", "content"} or ShareGPT's {"from", "value"}; content is text, or parts of text."""
    if not isinstance(message, dict):
        raise ValueError("no message")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = text_of_parts(content)
    if not (isinstance(role, str) and isinstance(content, str)):
        raise ValueError("a message without role or content")
    return role.lower(), content


def text_of_parts(parts):
    """The text in a message's content that is a list of parts: no picture, no reasoning."""
    texts = [part.get("text") for part in parts if part.get("type") in ("text", "input_text", "output_text", None)]
    return "".join(text for text in texts if isinstance(text, str))


def _parsed(body, where, human, assistant, closer):
    """The turns of a text that begins with a human's opener of this dialect; [] of any other.

    Where the openers are such as no text has by chance, what a system says may stand before the first one.
    """
    if not re.search(human, body):  # of most texts and dialects, and found ten times as fast as what follows
        return []
    opener = re.compile(f"{where}(?:(?P<human>{human})|(?P<assistant>{assistant}))")
    found = list(opener.finditer(body))
    if not found or not found[0]["human"] or (found[0].start() and (where == _LINE or len(found) < 2)):
        return []
    system = _MARKUP.sub("", body[: found[0].start()]).strip()
    ends = [match.start() for match in found[1:]] + [len(body)]
    parts = [body[match.end() : end].strip() for match, end in zip(found, ends)]
    said = [re.sub(rf"(?<!\s)\s*(?:{closer})\Z", "", part) for part in parts] if closer else parts
    if system:
        said[0] = f"{system}\n\n{said[0]}".strip()
    roles = ["Human" if match["human"] else "Assistant" for match in found]
    return [(role, f" {content}" if content else "") for role, content in zip(roles, said)]


def _alternate(found):
    """Whether a human begins and no role follows itself."""
    roles = [role for role, _ in found]
    return roles[:1] == ["Human"] and all(one != other for one, other in pairwise(roles))

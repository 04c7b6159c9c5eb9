"""The PRO authors' cleaning of HH-RLHF, by the rules of their preparation script: `read(…, cleaning="pro")`."""

from deftlib.preferences.dialogues import ASSISTANT
from deftlib.preferences.readers import RowFault


def pro_cleaning(dialogue):
    """(turns, cut) of a dialogue by the rules of the PRO authors' preparation of HH-RLHF.

    The text is split on blank lines; a paragraph that opens no turn ("Human:", "Assistant:") is dropped, so only the
    first paragraph of a reply survives; neighbouring turns of one role are merged. Returns turns, [(role, text)], and
    cut, the paragraphs dropped. Their other rules (the prompt of the chosen dialogue, pairs of unequal turn count
    dropped) are applied by `read(…, cleaning="pro")`, whose own checks still hold afterwards.
    """
    turns, cut = [], []
    for paragraph in dialogue.split("\n\n"):
        role = next((role for role in ("Human", "Assistant") if paragraph.startswith(f"{role}:")), None)
        text = paragraph[len(role) + 1 :].strip() if role else paragraph
        if role and turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n{text}")
        elif role:
            turns.append((role, text))
        elif text.strip():
            cut.append(text)
    return turns, cut


def pro_cleaned(chosen, rejected, notes):
    """Both dialogues cleaned, on the chosen one's prompt as PRO does it; what was cut goes into `notes`."""
    (turns, cut), (other_turns, other_cut) = pro_cleaning(chosen), pro_cleaning(rejected)
    notes["pairs cut"] += bool(cut or other_cut)
    notes["dialogues cut"] += bool(cut) + bool(other_cut)
    notes["characters cut"] += sum(map(len, cut + other_cut))
    if len(turns) != len(other_turns):
        raise RowFault("unequal turn count")
    if not turns or {turns[-1][0], other_turns[-1][0]} != {"Assistant"}:
        raise RowFault('no "\\n\\nAssistant:" in dialogue')
    prompt = "".join(f"\n\n{role}: {text}" for role, text in turns[:-1])
    return [f"{prompt}{ASSISTANT} {reply}" for reply in (turns[-1][1], other_turns[-1][1])]

"""What a row means: each format of this field turns one into prompts with responses, unchecked.

    format = detected("prefs.jsonl", rows)               # by the keys of the first row that fits one
    list(candidates(row, format, "none", notes))         # [{"prompt", "responses", perhaps "rewards", "ranks", ...}]

A text may stand for itself, as a dialogue of any dialect, or as a list of messages; what a format calls its columns is
in the table `FORMATS`. A new one is one function and one line there.
"""

from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from deftlib.preferences.cells import field, is_plain, name_in, number, text_or_messages, texts, unpacked, whole
from deftlib.preferences.cleaning import pro_cleaned
from deftlib.preferences.dialogues import ASSISTANT, HUMAN, ROLES, canonical, from_messages, text
from deftlib.preferences.readers import PreferenceError, RowFault, shape

PROMPTS = ("prompt", "question", "instruction", "query", "messages", "conversation", "conversations")
PROMPTS += ("history", "input", "post", "context")
CHOSEN = ("chosen", "chosen_response", "response_j", "preferred", "accepted")
REJECTED = ("rejected", "rejected_response", "response_k", "dispreferred", "not_accepted")
RESPONSES = ("responses", "completions", "candidates", "answers", "outputs", "generations")
SCORED = (  # of chosen and rejected: UltraFeedback, Argilla, Skywork and others
    ("score_chosen", "score_rejected"),
    *((f"chosen{what}", f"rejected{what}") for what in ("_score", "_rating", "-rating", "_reward", "-score")),
)
SAID = ("response", "answer", "text", "content", "completion", "output", "generated_text")  # inside one of RESPONSES
RATED = ("reward", "overall_score", "score", "rating", "preference_score", "pm_score")
PARALLEL = ("rewards", "scores", "ratings", "rating", "score")  # lists of numbers beside the responses
RANKS = ("ranks", "rank", "ranking")
TWO = [  # (columns of two responses, a column that says which is better, {its value: the place}), or a score of each
    (("response_0", "response_1"), "better_response_id", {0: 0, 1: 1}),  # PKU-SafeRLHF
    (("output_1", "output_2"), "preference", {1: 0, 2: 1}),  # AlpacaFarm
    (("human_ref_A", "human_ref_B"), "labels", {1: 0, 0: 1}),  # SHP
    (("conversation_a", "conversation_b"), "winner", {"model_a": 0, "model_b": 1}),  # LMSYS arena
    (("response_a", "response_b"), ("winner_model_a", "winner_model_b"), None),  # LMSYS 55k
    (("response_a", "response_b"), "winner", {"a": 0, "b": 1, "model_a": 0, "model_b": 1}),
    (("answer_0", "answer_1"), ("score_0", "score_1"), None),  # WebGPT
]


class Format(NamedTuple):
    needs: tuple  # names of columns, each a tuple of alternatives of which one must be there
    parse: callable  # (row, cleaning, notes) -> dicts of prompt, responses and more; raises RowFault

    def fits(self, row):
        return all(any(name in row for name in names) for names in self.needs)

    def __str__(self):
        return ", ".join(" or ".join(names[:2]) for names in self.needs)


def detected(label, rows):
    """The first format whose keys one of the rows has, rows taken in order."""
    n_rows, keys, fault = 0, [], None
    for _, row in rows():
        n_rows += row is not None
        if isinstance(row, dict):
            for name, format in FORMATS.items():
                if format.fits(row):
                    return name
            keys = keys or sorted(map(str, row))
        fault = fault or (row if isinstance(row, RowFault) else None)
    if not n_rows:
        raise PreferenceError(f"{label}: holds no row; expected JSON lines, one ranked list each")
    shown = f"{fault.reason}, {fault.found}" if fault else "an object without keys"
    found = f"the first object has {' '.join(', '.join(keys).split())[:80]}" if keys else f"the first is {shown}"
    known = "; ".join(f"{name} ({format})" for name, format in FORMATS.items())
    if {"messages", "prompt"} & set(keys) and {"completion", "label", "messages"} & set(keys):
        known = f"two or more ranked replies to a prompt, as {known}"  # what SFT and KTO have
    raise PreferenceError(f"{label}: none of {n_rows} rows has the keys of a known format, {found}; expected {known}")


def candidates(row, format, cleaning, notes):
    """What a row holds: dicts of prompt, responses and perhaps rewards, ranks, id, subset, or the RowFault met.

    notes: Counter of what the rules of the format leave out, added to.
    """
    if row is None:
        notes["blank lines"] += 1
    elif isinstance(row, RowFault):
        yield row
    else:
        try:
            yield from FORMATS[format].parse(row, cleaning, notes)
        except RowFault as fault:
            yield RowFault(fault.reason, fault.found or shape(row))


# --- The formats: each turns one row into prompts with responses -----------------------------------------------------


def _hh_rlhf(row, cleaning, notes):
    """{"chosen", "rejected"}: two whole dialogues, equal up to their last reply, as text or as lists of messages."""
    values = [text_or_messages(row, names) for names in (CHOSEN, REJECTED)]
    dialogues = [canonical(value) if isinstance(value, str) else _turns(value) for value in values]
    if cleaning == "pro":
        dialogues = pro_cleaned(*map(_dialogue, values), notes)
    (prompt, chosen), (other_prompt, rejected) = map(_parted, dialogues)
    if prompt != other_prompt:
        raise RowFault("differing prompts")
    yield {"prompt": prompt, "responses": [chosen, rejected], **_more(row, notes)}


def _pairs(row, cleaning, notes):
    """{"prompt", "chosen", "rejected"}: replies alone or whole dialogues, as text or as messages; perhaps scores."""
    yield from _listed(row, [text_or_messages(row, names) for names in (CHOSEN, REJECTED)], _more(row, notes))


def _lists(row, cleaning, notes):
    """{"prompt", "responses"}: text, messages, or objects with a score or a rank each; else best first or rewards."""
    responses, more = field(row, name_in(row, RESPONSES), list), _more(row, notes)
    beside = {name: unpacked(row[name]) for name in (*PARALLEL, *RANKS) if row.get(name) is not None}
    for name, values in beside.items():
        if name != "rewards" and isinstance(values, list) and "rewards" not in more:
            kind, read = ("ranks", whole) if name in RANKS else ("rewards", number)
            more.setdefault(kind, [read(value) for value in values])
    if responses and all(isinstance(response, dict) and "role" not in response for response in responses):
        said = name_in(responses[0], SAID)
        rated = next((name for name in RATED for response in responses if name in response), None)
        if rated and all(rated in response for response in responses):
            more["rewards"] = [number(response.get(rated)) for response in responses]
        elif any("rank" in response for response in responses):
            more["ranks"] = [whole(response.get("rank")) for response in responses]
        responses = [response.get(said) for response in responses]
    yield from _listed(row, responses, more)


def _two(row, cleaning, notes):
    """Two responses in columns of their own, and a column that says which is better, or a score of each."""
    found = [line for line in TWO if all(name in row for name in line[0])]
    if not found:
        raise RowFault("missing key", f"no two responses in {shape(row)}")
    told = lambda said: row.keys() & ({said} if isinstance(said, str) else set(said))
    columns, said, places = next((line for line in found if told(line[1])), found[0])
    row, responses = _responses(row, columns)
    if places is None:
        scores = [number(row.get(name)) for name in said]
        if scores[0] == scores[1] and said[0].startswith("winner"):
            notes["pairs without a winner"] += 1
            return
        yield from _listed(row, responses, _more(row, notes) | {"rewards": scores})
        return
    verdict = whole(row.get(said))
    place = places.get(verdict.lower() if isinstance(verdict, str) else verdict) if is_plain(verdict) else None
    if place is None:
        notes["pairs without a winner"] += 1  # a tie, or nobody said
        return
    yield from _listed(row, responses if place == 0 else responses[::-1], _more(row, notes))


def _listed(row, responses, more):
    """One list: its prompt is that of the responses where they are whole dialogues that agree, else the row's."""
    parsed, own = [_said(response) for response in responses], _prompt(row)
    prompts = {prompt for prompt, _ in parsed} or {None}
    if own is None and None in prompts:
        raise RowFault("missing key", f"no {PROMPTS[0]!r} in {shape(row)}")
    found = prompts - {None} or {own}
    # The row's own may lack what a system says first.
    if len(found) > 1 or (own and not found <= {own} and not min(found).endswith(own.removeprefix(HUMAN))):
        raise RowFault("differing prompts")
    yield {"prompt": min(found), "responses": [reply for _, reply in parsed], **more}


def _pro_d3(row, cleaning, notes):
    """PRO's {"prefix": [[turns] per response], "suffix": [replies], "reward": [...]}; `sft_index` is always 0 there."""
    prefixes, replies = field(row, "prefix", list), texts(row, "suffix")
    if not all(isinstance(turns, list) and all(isinstance(turn, str) for turn in turns) for turns in prefixes):
        raise RowFault("wrong type", "'prefix' holds more than lists of text")
    if len(prefixes) != len(replies):
        raise RowFault("different number of prefixes and replies")
    prompts = {
        "".join(turns).replace("<|prompter|>", f"{HUMAN} ").replace("<|assistant|>", f"{ASSISTANT} ")
        for turns in prefixes
    }
    if len(prompts) > 1:
        raise RowFault("differing prompts")
    # {"meta": {"path": "…/hhrlhf/helpful-rejection/train.jsonl"}} names the subset; theirs is one short name for ours.
    meta = row["meta"] if isinstance(row.get("meta"), dict) else {}
    folder = Path(str(meta.get("path", ""))).parent.name
    subset = {"helpful-rejection": "helpful-rejection-sampled"}.get(folder, folder or None)
    yield {
        "prompt": as_prompt("".join(prompts)),
        "responses": replies,
        "rewards": field(row, "reward", list),
        "subset": subset,
    }


def _oasst(row, cleaning, notes):
    """An OpenAssistant tree: every message whose assistant replies people ranked gives one list (rank 0 is best).

    Deleted messages are left out with all that follows them. Messages by a model ("synthetic") stay: people ranked
    them too. Replies without any rank are no list; a partly ranked set is rejected.
    """
    yield from _ranked_replies(field(row, "prompt", dict), "", notes)


def _ranked_replies(message, conversation, notes):
    if message.get("deleted"):
        notes["deleted messages left out"] += 1
        return
    opener = HUMAN if field(message, "role", str) == "prompter" else ASSISTANT
    conversation += f"{opener} {field(message, 'text', str).strip()}"
    children = field(message, "replies", list)
    if not all(isinstance(child, dict) for child in children):
        raise RowFault("wrong type", "'replies' holds more than messages")
    replies = [child for child in children if child.get("role") == "assistant" and not child.get("deleted")]
    ranks = [reply.get("rank") for reply in replies]
    if len(replies) > 1 and ranks.count(None) == len(ranks):
        notes["messages with unranked replies"] += 1
    elif len(replies) > 1:
        yield {
            "id": message.get("message_id"),
            "subset": "oasst",
            "prompt": conversation + ASSISTANT,
            "responses": [field(reply, "text", str) for reply in replies],
            "ranks": ranks,
        }
    for child in children:
        yield from _ranked_replies(child, conversation, notes)


# In the order in which "auto" tries them: pairs have the keys of hh-rlhf too.
FORMATS = {
    "oasst": Format((("message_tree_id",), ("prompt",)), _oasst),
    "d3": Format((("prefix",), ("suffix",)), _pro_d3),
    "pairs": Format((PROMPTS, CHOSEN, REJECTED), _pairs),
    "lists": Format((PROMPTS, RESPONSES), _lists),
    "hh-rlhf": Format((CHOSEN, REJECTED), _hh_rlhf),
    "two": Format(tuple(zip(*(columns for columns, _, _ in TWO))), _two),
}


def _responses(row, columns):
    """(the row, its two responses); LMSYS 55k lists the turns of either side, which makes whole dialogues."""
    asked, *said = [unpacked(row.get(name)) for name in ("prompt", *columns)]
    if not all(isinstance(turns, list) and len(turns) == len(asked) for turns in (asked, *said)):
        return row, [text_or_messages(row, (name,)) for name in columns]
    if not asked or not all(isinstance(turn, str) for turns in (asked, *said) for turn in turns):
        raise RowFault("wrong type", f"turns that are no text in {shape(row)}")
    in_turn = lambda answers: [f" {turn.strip()}" for pair in zip(asked, answers) for turn in pair]
    dialogues = [text(zip(cycle(ROLES), in_turn(answers))) for answers in said]
    return {name: value for name, value in row.items() if name != "prompt"}, dialogues


def _more(row, notes):
    """What a row may say beside its texts: id, subset, and the rewards or scores of its replies."""
    more = {key: row[key] for key in ("id", "subset") if row.get(key) is not None}
    if type(more.get("id")) is int:
        more["id"] = str(more["id"])
    if row.get("rewards") is not None:
        more["rewards"] = unpacked(row["rewards"])
    for names in SCORED:
        if all(row.get(name) is not None for name in names) and "rewards" not in more:
            scores = [number(row[name]) for name in names]
            contradict = all(isinstance(score, (int, float)) for score in scores) and scores[0] < scores[1]
            if contradict:
                notes["pairs whose scores contradict what was chosen"] += 1  # the choice stands, without scores
            else:
                more["rewards"] = scores
    return more


# --- Text ------------------------------------------------------------------------------------------------------------


def as_prompt(said):
    """A prompt in the one format: plain text becomes the first human turn, a dialogue in any dialect `canonical`."""
    body = canonical(said).strip()
    if not body.startswith("Human:"):
        return f"{HUMAN} {body}{ASSISTANT}" if body else ""
    prompt = "\n\n" + body
    if prompt.endswith(ASSISTANT):
        return prompt
    if prompt.rfind(ASSISTANT) > prompt.rfind(HUMAN):
        raise RowFault("prompt ends in an Assistant turn")
    return prompt + ASSISTANT


def _prompt(row):
    """The prompt of a row's own column, with what a system says before it; None where it has none."""
    name = next((name for name in PROMPTS if name in row), None)
    if name is None:
        return None
    value = text_or_messages(row, (name,))
    system = row.get("system") or row.get("system_prompt") or ""
    if isinstance(value, (list, dict)):
        value = _dialogue(value)
    elif name in ("instruction", "question", "query"):  # Alpaca's input, Dolly's context
        more = (row.get("input") if name == "instruction" else None) or row.get("context")
        value = f"{value.strip()}\n\n{more.strip()}" if isinstance(more, str) and more.strip() else value
    earlier = row.get("history") if name != "history" else None  # LLaMA-Factory: [[question, answer], ...]
    if isinstance(earlier, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        roles = "Human", "Assistant"
        turns = [(role, f" {str(said).strip()}") for pair in earlier for role, said in zip(roles, pair)]
        value = text([*turns, ("Human", f" {value.strip()}")]) if isinstance(value, str) else value
    prompt = as_prompt(value)
    if isinstance(system, str) and system.strip() and prompt.startswith(HUMAN):
        return f"{HUMAN} {system.strip()}\n\n{prompt.removeprefix(HUMAN).lstrip()}"
    return prompt


def _dialogue(value):
    """A dialogue in the format, from text of any dialect or from messages."""
    if isinstance(value, str):
        return canonical(value)
    return text(_turns(value))


def _turns(value):
    try:
        return from_messages(value if isinstance(value, list) else [value])
    except ValueError as fault:
        raise RowFault("wrong type", str(fault)) from fault


def _said(value):
    """(prompt or None, reply) of a response: a reply alone, or a whole dialogue with it at the end."""
    if isinstance(value, str):
        dialogue = canonical(value)
        if not dialogue.lstrip().startswith("Human:"):
            return None, value
        return _parted("\n\n" + dialogue.lstrip())
    if not isinstance(value, (list, dict)):
        raise RowFault("wrong type", f"a response is {shape(value)}, expected str")
    turns = _turns(value)
    if turns and all(role == "Assistant" for role, _ in turns):
        return None, "\n\n".join(said.strip() for _, said in turns)
    return _parted(turns)


def _parted(dialogue):
    """(prompt, reply) of a dialogue: of turns before the last, of text at its last "\\n\\nAssistant:"."""
    if isinstance(dialogue, list) and dialogue and dialogue[-1][0] == "Assistant":  # its words may spell an opener
        before = text(dialogue[:-1])
        return before + ASSISTANT if before.strip() else "", dialogue[-1][1]
    dialogue = text(dialogue) if isinstance(dialogue, list) else dialogue
    head, opener, reply = dialogue.rpartition(ASSISTANT)
    if not opener:
        raise RowFault('no "\\n\\nAssistant:" in dialogue')
    return head + opener if head.strip() else "", reply

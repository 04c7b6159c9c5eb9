"""Where ranked lists come from: files, folders and the hub, and the formats their rows are in.

`files` finds the files of a source, `detected` names their format, `candidates` turns one row into prompts with
responses, in the project's one text format but unchecked. `lists.read` checks them and builds the Dataset.
"""

import gzip
import json
import re
import zlib
from pathlib import Path

import datasets

from deftlib import provenance
from deftlib.preferences import mini_world
from deftlib.preferences.dialogues import ASSISTANT, HUMAN, canonical

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
HH_RLHF = "Anthropic/hh-rlhf"
MINI = mini_world.FOLDER


class PreferenceError(ValueError):
    """A source that cannot be used: one sentence with the file, the cause and what to do."""


class RowFault(PreferenceError):
    """Why one row is rejected, and the shape (never the text, which may be offensive) of what was found."""

    def __init__(self, reason, found=""):
        super().__init__(reason)
        self.reason, self.found = reason, found


# --- Where rows come from --------------------------------------------------------------------------------------------


def files(source, split):
    """[(name, label, rows)], one for each file of `source`.

    name: "<subset>/<split>" or "<subset>", which ids start with; label: the file as messages name it; rows(): an
    iterator of (line number, row), started anew at each call, where a row is a dict, a RowFault or None (blank line).
    """
    path = MINI if source == "mini" else Path(source)
    if path.is_dir():
        return [_file(file) for file in _split_files(path, split)]
    if path.exists():
        return [_file(path)]
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(source)) and not path.parent.exists():
        return _hub_files(str(source), split)
    raise PreferenceError(f"{source}: no such file or folder; name a file of JSON lines, a folder, a hub id or mini")


def _split_files(folder, split):
    """The files of one split: `folder/<split>.jsonl[.gz]`, else one from each HH-RLHF subset folder that is there."""
    subsets = [folder / subset for subset in SUBSETS if (folder / subset).is_dir()]
    chosen = []
    for place in subsets or [folder]:
        names = [f"{split}{suffix}" for suffix in (".jsonl.gz", ".jsonl", ".json")]
        there = [place / name for name in names if (place / name).is_file()]
        if not there:
            found = ", ".join(sorted(p.name for p in place.iterdir())[:8]) or "nothing"
            wanted = names[0] if subsets else f"{names[0]}, or HH-RLHF's folders {', '.join(SUBSETS)}"
            raise PreferenceError(
                f"{place}: expected {wanted}, found {found}; check the folder and the split {split!r}"
            )
        chosen.append(there[0])
    return chosen


def _file(path):
    stem = path.name.split(".")[0]
    # harmless-base/test.jsonl.gz is the test split of harmless-base; prefs.jsonl is just prefs.
    name = f"{path.resolve().parent.name}/{stem}" if stem in ("train", "dev", "valid", "test") else stem
    return name, str(path), lambda: _json_lines(path)


def _json_lines(path):
    """(line number, row) of a JSON lines file, gzipped or not, one line in memory at a time."""
    number = 0
    try:
        with path.open("rb") as start:
            gzipped = path.suffix == ".gz" or start.read(2) == b"\x1f\x8b"
        with (gzip.open if gzipped else open)(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, _json_object(line) if line.strip() else None
        if number == 0:
            raise PreferenceError(f"{path}: the file is empty; expected JSON lines, one ranked list each")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        cause = "truncated" if isinstance(error, EOFError) else "damaged or not gzip"
        raise PreferenceError(f"{path}: the gzip file is {cause} after line {number}; download it again") from error
    except OSError as error:
        raise PreferenceError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def _json_object(line):
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return RowFault("invalid UTF-8", f"{len(line)} bytes")
    except (ValueError, RecursionError):
        return RowFault("invalid JSON", f"{len(line)} bytes")
    return row if isinstance(row, dict) else RowFault("wrong type", f"{shape(row)}, expected an object")


def _hub_files(hub_id, split):
    """The same triples from the hub, at the revision that labels name; a line is a row number there."""
    subsets = SUBSETS if hub_id.lower() == HH_RLHF.lower() else [None]
    tables = []
    for subset in subsets:
        try:
            revision = provenance.hub_revision(hub_id, "dataset")
            table = datasets.load_dataset(hub_id, data_dir=subset, split=split, revision=revision)
        except Exception as error:  # the hub's clients raise a dozen types; each means: no such data from there
            cause = " ".join(str(error).split())[:160]
            raise PreferenceError(
                f"{hub_id}: no such folder here, and the hub did not give it ({type(error).__name__}: {cause}); check "
                f"the name and the network, or download it and name its folder"
            ) from error
        name = f"{subset or hub_id.split('/')[1]}/{split}"
        tables.append((name, f"{hub_id}@{revision}/{name}", lambda table=table: enumerate(table, start=1)))
    return tables


def detected(label, rows):
    """The first format whose keys one of the rows has, rows taken in order."""
    n_rows, keys = 0, []
    for _, row in rows():
        n_rows += row is not None
        if isinstance(row, dict):
            for name, (needed, _) in FORMATS.items():
                if needed <= row.keys():
                    return name
            keys = keys or sorted(row)
    if not n_rows:
        raise PreferenceError(f"{label}: holds no row; expected JSON lines, one ranked list each")
    known = "; ".join(f"{name} ({', '.join(sorted(needed))})" for name, (needed, _) in FORMATS.items())
    found = f"the first object has {', '.join(keys)[:80]}" if keys else "no line is a JSON object"
    raise PreferenceError(f"{label}: none of {n_rows} rows has the keys of a known format, {found}; expected {known}")


# --- The formats: each turns one row into prompts with responses -----------------------------------------------------


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
            yield from FORMATS[format][1](row, cleaning, notes)
        except RowFault as fault:
            yield RowFault(fault.reason, fault.found or shape(row))


def _hh_rlhf(row, cleaning, notes):
    """{"chosen", "rejected"}: two whole dialogues, equal up to their last "\\n\\nAssistant:"."""
    dialogues = _field(row, "chosen", str), _field(row, "rejected", str)
    if cleaning == "pro":
        dialogues = _pro_cleaned(*dialogues, notes)
    (prompt, chosen), (other_prompt, rejected) = map(_parted, dialogues)
    if prompt != other_prompt:
        raise RowFault("differing prompts")
    yield {"prompt": prompt, "responses": [chosen, rejected]}


def _pairs(row, cleaning, notes):
    """{"prompt", "chosen", "rejected"[, "rewards", "id", "subset"]}: replies alone or whole dialogues."""
    replies = [_field(row, "chosen", str), _field(row, "rejected", str)]
    yield from _lists({**row, "responses": replies}, cleaning, notes)


def _lists(row, cleaning, notes):
    """{"prompt", "responses"[, "rewards", "id", "subset"]}, best first or with rewards."""
    prompt = as_prompt(_field(row, "prompt", str))
    replies = [_reply(prompt, text) for text in _texts(row, "responses")]
    optional = {key: row[key] for key in ("rewards", "id", "subset") if key in row}
    yield {"prompt": prompt, "responses": replies, **optional}


def _pro_d3(row, cleaning, notes):
    """PRO's {"prefix": [[turns] per response], "suffix": [replies], "reward": [...]}; `sft_index` is always 0 there."""
    prefixes, replies = _field(row, "prefix", list), _texts(row, "suffix")
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
        "rewards": _field(row, "reward", list),
        "subset": subset,
    }


def _oasst(row, cleaning, notes):
    """An OpenAssistant tree: every message whose assistant replies people ranked gives one list (rank 0 is best).

    Deleted messages are left out with all that follows them. Messages by a model ("synthetic") stay: people ranked
    them too. Replies without any rank are no list; a partly ranked set is rejected.
    """
    yield from _ranked_replies(_field(row, "prompt", dict), "", notes)


def _ranked_replies(message, conversation, notes):
    if message.get("deleted"):
        notes["deleted messages left out"] += 1
        return
    opener = HUMAN if _field(message, "role", str) == "prompter" else ASSISTANT
    conversation += f"{opener} {_field(message, 'text', str).strip()}"
    children = _field(message, "replies", list)
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
            "responses": [_field(reply, "text", str) for reply in replies],
            "ranks": ranks,
        }
    for child in children:
        yield from _ranked_replies(child, conversation, notes)


# In the order in which "auto" tries them: pairs have the keys of hh-rlhf too.
FORMATS = {
    "oasst": ({"message_tree_id", "prompt"}, _oasst),
    "d3": ({"prefix", "suffix"}, _pro_d3),
    "lists": ({"prompt", "responses"}, _lists),
    "pairs": ({"prompt", "chosen", "rejected"}, _pairs),
    "hh-rlhf": ({"chosen", "rejected"}, _hh_rlhf),
}


def _field(row, key, kind):
    if key not in row:
        raise RowFault("missing key", f"no {key!r} in {shape(row)}")
    if not isinstance(row[key], kind):
        raise RowFault("wrong type", f"{key!r} is {shape(row[key])}, expected {kind.__name__}")
    return row[key]


def _texts(row, key):
    texts = _field(row, key, list)
    if not all(isinstance(text, str) for text in texts):
        raise RowFault("wrong type", f"{key!r} holds more than text")
    return texts


def shape(value):
    """Keys, types and sizes of a value: enough to find the fault, nothing to read aloud."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {'dict' if isinstance(part, dict) else shape(part)}" for key, part in value.items())
    if isinstance(value, list):
        return f"list[{', '.join('list' if isinstance(part, (list, dict)) else shape(part) for part in value[:4])}]"
    return f"str({len(value)})" if isinstance(value, str) else type(value).__name__


# --- Text ------------------------------------------------------------------------------------------------------------


def as_prompt(text):
    """A prompt in the one format: plain text becomes the first human turn, a dialogue in any dialect `canonical`."""
    body = canonical(text).strip()
    if not body.startswith("Human:"):
        return f"{HUMAN} {body}{ASSISTANT}" if body else ""
    prompt = "\n\n" + body
    if prompt.endswith(ASSISTANT):
        return prompt
    if prompt.rfind(ASSISTANT) > prompt.rfind(HUMAN):
        raise RowFault("prompt ends in an Assistant turn")
    return prompt + ASSISTANT


def _parted(dialogue):
    """(prompt, reply) of a dialogue, parted at its last "\\n\\nAssistant:"."""
    head, opener, reply = canonical(dialogue).rpartition(ASSISTANT)
    if not opener:
        raise RowFault('no "\\n\\nAssistant:" in dialogue')
    return head + opener if head.strip() else "", reply


def _reply(prompt, text):
    dialogue = canonical(text)
    if not dialogue.lstrip().startswith("Human:"):
        return text
    dialogue_prompt, reply = _parted("\n\n" + dialogue.lstrip())
    if dialogue_prompt != prompt:
        raise RowFault("differing prompts")
    return reply


# --- The PRO authors' cleaning ---------------------------------------------------------------------------------------


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


def _pro_cleaned(chosen, rejected, notes):
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

"""One more reply for every ranked list: from D_2 to D_3 where PRO's own files are not at hand (design section 2).

The reply comes from any OpenAI-compatible endpoint, or is sampled from the SFT policy; r_train then ranks all replies.
Results are named after who wrote it, `D_3-sampled` or `D_3-<model>`, and never stand beside a published D_3 number.
Also a command: `python -m deftlib.extend --profile smol [--endpoint http://localhost:8000/v1 --model NAME]`.
"""

import argparse
import dataclasses
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from deftlib import evaluate, models, rewards, store, subset, train
from deftlib.loop import with_progress
from deftlib.preferences import read_lists
from deftlib.profile import Profile

AT_ONCE = 8  # requests under way together
MADE_FROM_LISTS = {  # overrides, beside data.source, under which a profile reads the published folder
    "data.format": "lists",
    "data.cleaning": "none",
    "data.rank_by": "reward",
    "data.train_lists": 0,
    "data.count_lists": 0,
}


class EndpointError(RuntimeError):
    """An endpoint that cannot be asked or stopped answering: one sentence with the cause and what to do."""


def longer_lists(profile, endpoint=None, model=None, seed=0):
    """Folder of the policy part's lists with one reply more, ranked by r_train: `lists.jsonl`, `rejects.jsonl`, a card.

    endpoint, model: base URL (".../v1") and model name of an OpenAI-compatible server, its key in OPENAI_API_KEY; where
    both are None, `train.fit(profile, "sft", seed)` is sampled at temperature 1. Replies have at most
    `text.reply_tokens` tokens of their writer. A list whose new reply is empty, there already or not Unicode is
    rejected. The folder is a source with all parts of the profile: its card names the overrides that train on it.
    Raises ValueError if only one of endpoint and model is given or no list is left, EndpointError for no answer.
    """
    if (endpoint is None) != (model is None):
        raise ValueError("an endpoint and a model go together (--endpoint URL --model NAME), found only one of them")
    parts, lists_folder = subset.parts(profile), subset.scored(profile)
    lists, r_train = read_lists(lists_folder / "lists.parquet"), rewards.reward_model(profile, "train", parts)
    spec, budget = profile.reward_models.train, profile.reward_models.score_token_budget
    settings = {"max_new_tokens": profile.text.reply_tokens, "temperature": 1.0, "samples": 1}
    generation = dataclasses.replace(profile.generation, **settings)
    policy = train.fit(profile, "sft", seed) if endpoint is None else None
    name = _name(lists, model or "sampled")
    writer = {"endpoint": _without_password(endpoint), "model": model, **settings}
    if policy:
        writer = {"policy": models.identity(policy), "dtype": profile.policy.dtype}
        writer |= {"generation": vars(generation), "text": vars(profile.text)}
    key = {"writer": writer, "seed": seed, "lists": store.digest(lists_folder), "parts": store.digest(parts)}
    key |= {"r_train": models.identity(r_train), "spec": [spec.text_format, spec.max_tokens]}

    def produce(folder):
        if policy:
            loaded = models.load_policy(policy, profile.policy.dtype), models.load_tokenizer(policy)
            said = evaluate.generate(*loaded, lists["prompt"], profile.text, generation, seed, "sampling")
            said = {row_id: replies[0] for row_id, replies in zip(lists["id"], said)}
        else:
            said = _ask(folder / "answers.jsonl", endpoint, model, lists, seed, settings, profile.data.max_reject_share)
        rows, rejects = _with_replies(lists, said)
        _write_lines(folder / "rejects.jsonl", rejects)
        if rejects:
            reasons = Counter(reject["reason"] for reject in rejects).most_common()
            print(f"  rejected {len(rejects)} of {len(lists)} lists: " + ", ".join(f"{n} {why}" for why, n in reasons))
        if not rows:
            raise ValueError(f"{folder}: no list is left, every new reply was rejected: see rejects.jsonl there")
        judge = rewards.load_reward_model(r_train)
        prompts, added = [row["prompt"] for row in rows], [row["responses"][-1] for row in rows]
        new = rewards.score(*judge, prompts, added, spec, budget, "r_train")  # the other replies are scored already
        rows = [subset.best_first({**row, "rewards": [*row["rewards"], value]}) for row, value in zip(rows, new)]
        _write_lines(folder / "lists.jsonl", rows)
        _write_source(folder, profile.data, parts, rows)
        places = Counter(row["responses"].index(reply) + 1 for row, reply in zip(rows, added))
        record = {"name": name, "writer": writer, "seed": seed, "lists": len(rows), "rejected": len(rejects)}
        record["place_of_the_new_reply"] = {str(place): places[place] for place in sorted(places)}
        (folder / "summary.json").write_text(json.dumps(record, indent=1))
        (folder / "README.md").write_text(_card(profile, record), encoding="utf-8")

    return store.stage(profile.name, name, key, produce, "extend")


def _name(lists, writer):
    """ "D_3-sampled": the paper's notation for lists of three, and the writer; "D_3-5-sampled" where lengths differ."""
    lengths = {len(responses) + 1 for responses in lists["responses"]}
    span = "-".join(map(str, sorted({min(lengths), max(lengths)})))
    return f"D_{span}-" + (re.sub(r"[^\w.]+", "-", writer).strip("-.") or "model")


def _without_password(url):
    """The URL as results may show it: no user, password or query."""
    parts = urlsplit(url or "")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _with_replies(lists, said):
    """(rows with the new reply last, rejects with a reason). said: {id: reply, or None for a request refused}."""
    rows, rejects = [], []
    for row in lists:
        reply = said[row["id"]]
        text = (reply or "").strip()
        if reply is None:
            reason = "refused by the endpoint"
        elif not text:
            reason = "empty reply"
        elif text in {response.strip() for response in row["responses"]}:
            reason = "identical replies"
        elif text.encode(errors="ignore").decode() != text:  # half a surrogate pair: nothing can store it
            reason = "invalid Unicode"
        else:
            rows.append({**row, "responses": [*row["responses"], f" {text}"]})
            continue
        rejects.append({"id": row["id"], "reason": reason})
    return rows, rejects


# ---- endpoint ----------------------------------------------------------------------------------------------------


def _ask(path, endpoint, model, lists, seed, settings, max_refused_share):
    """{id: answer} of a chat model, None where it refuses the request. Answers are kept in `path` as they come.

    Raises EndpointError without the `openai` package, when the server fails after the client's own retries, or when it
    refuses more than the share allowed.
    """
    try:
        import openai
    except ImportError as error:
        raise EndpointError("an endpoint needs the openai package: pip install 'deftlib[endpoint]'") from error
    secret = os.environ.get("OPENAI_API_KEY") or "no-key-needed"  # by a local server; the client wants one
    said = _kept(path)
    if said:
        print(f"  {len(said)} answers kept from an interrupted run", flush=True)
    options = {"model": model, "seed": seed, "max_tokens": settings["max_new_tokens"]}
    options["temperature"] = settings["temperature"]

    def answer(row):
        """(id, reply, None), or (id, None, what went wrong)."""
        try:
            result = client.chat.completions.create(messages=models.turns(row["prompt"]), **options)
        except openai.OpenAIError as error:
            return row["id"], None, error
        choices = getattr(result, "choices", None)  # a page that is no chat server arrives as text
        if not choices:
            return row["id"], None, ValueError("the answer is not a chat completion; does the URL end in /v1?")
        return row["id"], evaluate.first_turn(choices[0].message.content or ""), None

    todo, refused = [row for row in lists if row["id"] not in said], {}
    batches = [todo[i : i + AT_ONCE] for i in range(0, len(todo), AT_ONCE)]
    with (
        openai.OpenAI(base_url=endpoint, api_key=secret) as client,
        ThreadPoolExecutor(AT_ONCE) as pool,
        open(path, "a", encoding="utf-8") as file,
    ):
        for batch in with_progress(batches, f"asking {model}", total=len(todo)):
            failure = None
            for row_id, reply, error in pool.map(answer, batch):
                if error is None:
                    said[row_id] = reply
                    file.write(json.dumps({"id": row_id, "reply": reply}) + "\n")
                elif isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
                    refused[row_id] = None  # a content filter or a long prompt: about this list alone
                    failure = error if len(refused) > max_refused_share * len(lists) else failure
                else:
                    failure = error
            file.flush()
            if failure:
                cause = " ".join(str(failure).replace(secret, "***").split())[:200]
                many = f"{len(refused)} of {len(lists)} lists refused, the last: " if refused else ""
                raise EndpointError(
                    f"{_without_password(endpoint)}: {many}{type(failure).__name__}: {cause} "
                    f"({len(said)} of {len(lists)} answers are kept: run again for the rest)"
                )
    return said | refused


def _kept(path):
    """The answers of an interrupted run, {id: reply}; a last line cut short is dropped from the file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        store.write_atomic(path, "".join(whole))
    return {row["id"]: row["reply"] for row in map(json.loads, whole)}


# ---- publication -------------------------------------------------------------------------------------------------


def _write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_source(folder, data, parts, rows):
    """`<split>.jsonl` (and `test.jsonl`): the longer lists and the other parts as they were, to be split the same way.

    The parts are cut by hash of the first human turn, so the longer lists alone would all fall to the policy again.
    """
    others = {name: read_lists(parts / f"{name}.parquet") for name in ("reward_train", "reward_eval", "dev", "test")}
    test = [] if data.shares.get("test") else list(others.pop("test"))
    _write_lines(folder / f"{data.split}.jsonl", [*rows, *(row for part in others.values() for row in part)])
    if test:
        _write_lines(folder / "test.jsonl", test)


def _card(profile, record):
    """The card of the longer lists: who wrote the extra reply and how, who ranked, how to train on them."""
    writer, name = record["writer"], record["name"]
    who = f"the model `{writer.get('model')}` at {writer.get('endpoint')}"
    if "policy" in writer:
        who = f"the SFT policy of profile `{profile.name}` (seed {record['seed']})"
    places = ", ".join(f"{place}: {count}" for place, count in record["place_of_the_new_reply"].items())
    overrides = {"data.source": "<this folder>", **MADE_FROM_LISTS}
    return f"""# {name}: one more reply for every list

Made by `deftlib.extend` from the policy part of `{profile.data.source}`, profile `{profile.name}`: {record["lists"]}
lists, {record["rejected"]} rejected (`rejects.jsonl`).

One reply of each list was written by {who}, sampled at temperature 1 with seed {record["seed"]}, at most
{profile.text.reply_tokens} of its tokens, cut before a next turn. **These are not PRO's D_3 lists: no number made from
them may stand beside a published D_3 number.**

All replies are ranked by r_train ({profile.reward_models.train.source}), best first; rewards are its raw scores. Place
of the new reply among them, and in how many lists: {places}. `summary.json` holds all settings.

`lists.jsonl` has id, subset, prompt, responses, rewards. To train on them, read this folder as a source; the other
parts are in it as they were:

```json
{json.dumps(overrides, indent=1)}
```

The texts and their licence are those of the source; the extra replies fall under the terms of the model that wrote
them. HH-RLHF contains offensive text.
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Give every ranked list one more reply and print the folder.")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server, e.g. http://localhost:8000/v1")
    parser.add_argument("--model", metavar="NAME", help="a model there; without both, the SFT policy is sampled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. data.source=x")
    args = parser.parse_args(arguments)
    try:
        profile = Profile.load(args.profile, dict(Profile.override(text) for text in args.set))
        print(longer_lists(profile, args.endpoint, args.model, args.seed))
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()

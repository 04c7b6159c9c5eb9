"""One more reply for every ranked list: from D_2 to D_3 where PRO's own files are not at hand.

The reply comes from any OpenAI-compatible endpoint, or is sampled from the SFT policy; r_train then ranks all replies.
Results are named after who wrote it, `D_3-sampled` or `D_3-<model>`, and never stand beside a published D_3 number.
Also a command: `deft extend --profile smol [--endpoint http://localhost:8000/v1 --model NAME]`.
"""

import argparse
import dataclasses
import json
import re
from collections import Counter

from deftlib import credentials, store
from deftlib.command import one_sentence
from deftlib.models import endpoint, generation, policies, rewards
from deftlib.models.said import first_turn
from deftlib.preferences.lists import read_lists
from deftlib.profile import Profile, add_options
from deftlib.reporting import escape
from deftlib.sections import Endpoint
from deftlib.training import subset, train

MADE_FROM_LISTS = {  # overrides, beside data.source, under which a profile reads the published folder
    "data.format": "lists",
    "data.cleaning": "none",
    "data.rank_by": "reward",
    "data.train_lists": 0,
    "data.train_share": 1.0,
    "data.count_lists": 0,
}


def longer_lists(profile, server=None, seed=0):
    """Folder of the policy part's lists with one reply more, ranked by r_train: `lists.jsonl`, `rejects.jsonl`, a card.

    server: a profile `Endpoint` that writes the reply; without one, `train.fit(profile, "sft", seed)` is sampled at
    temperature 1. Replies have at most `text.reply_tokens` tokens of their writer. A list whose new reply failed, is
    empty or there already is rejected. The folder is a source with all parts of the profile: its card names the
    overrides that train on it. Raises ValueError if no list is left, EndpointError if the server stopped answering or
    failed for more than `data.max_reject_share` of the lists; what it answered is kept in `build/<profile>/kept/`.
    """
    parts, lists_folder = subset.parts(profile), subset.scored(profile)
    lists, r_train = read_lists(lists_folder / "lists.parquet"), rewards.judge(profile, "train", parts)
    changes = {"max_new_tokens": profile.text.reply_tokens, "temperature": 1.0, "samples": 1}
    settings, prompts = dataclasses.replace(profile.generation, **changes), list(lists["prompt"])
    if server:
        name = _name(lists, server.model)
        writer = {"endpoint": credentials.without(server.url), "model": server.model, **changes}
        writer["max_reject_share"] = profile.data.max_reject_share  # under a stricter one, made again of answers kept
    else:
        name, policy = _name(lists, "sampled"), train.fit(profile, "sft", seed)
        writer = {"policy": policies.identity(policy), "dtype": generation.dtype(profile)}
        writer |= {"generation": vars(settings), "text": vars(profile.text)}
    key = {"writer": writer, "seed": seed, "lists": store.digest(lists_folder), "parts": store.digest(parts)}
    key |= {"split": profile.data.split, "shares": profile.data.shares}
    key["r_train"] = r_train.identity()

    def produce(folder):
        if server:
            said, failures, versions = _ask(profile, server, prompts, settings, seed)
        else:
            replies = generation.replies(profile, policy, prompts, seed, settings=settings, label="sampling")
            said, failures, versions = [samples[0] for samples in replies], {}, []
        rows, rejects = _with_replies(lists, said, failures)
        _write_lines(folder / "rejects.jsonl", rejects)
        if rejects:
            reasons = Counter(reject["reason"] for reject in rejects).most_common()
            print(f"  rejected {len(rejects)} of {len(lists)} lists: " + ", ".join(f"{n} {why}" for why, n in reasons))
        if not rows:
            raise ValueError(f"{folder}: no list is left, every new reply was rejected: see rejects.jsonl there")
        asked, added, subsets = zip(*((row["prompt"], row["responses"][-1], row["subset"]) for row in rows))
        new = r_train.score(asked, added, subsets).tolist()  # the other replies are scored already
        rows = [subset.best_first({**row, "rewards": [*row["rewards"], value]}) for row, value in zip(rows, new)]
        _write_lines(folder / "lists.jsonl", rows)
        _write_source(folder, profile.data, parts, rows)
        places = Counter(row["responses"].index(reply) + 1 for row, reply in zip(rows, added))
        record = {"name": name, "writer": writer, "seed": seed, "lists": len(rows), "rejected": len(rejects)}
        record["answered_by"] = versions
        record["place_of_the_new_reply"] = {str(place): places[place] for place in sorted(places)}
        (folder / "summary.json").write_text(json.dumps(record, indent=1))
        (folder / "README.md").write_text(_card(profile, record), encoding="utf-8")

    return store.stage(profile, name, key, produce, "training.extend")


def _name(lists, writer):
    """ "D_3-sampled": the paper's notation for lists of three, and the writer; "D_3-5-sampled" where lengths differ."""
    lengths = {len(responses) + 1 for responses in lists["responses"]}
    span = "-".join(map(str, sorted({min(lengths), max(lengths)})))
    return f"D_{span}-" + (re.sub(r"[^\w.]+", "-", writer).strip("-.") or "model")


def _ask(profile, server, prompts, settings, seed):
    """(reply or None to each prompt, {index: reason} of the failures, the names under which the server answered)."""
    requests, path = endpoint.chat_requests(prompts, settings, seed), endpoint.kept_file(profile.name, server)
    answers = endpoint.ask(server, requests, path, f"asking {server.model}")
    texts = endpoint.require(answers, profile.data.max_reject_share)
    said = [text and first_turn(text) for text in texts]
    return said, answers.failures, endpoint.answered_by(server, requests, path)


def _with_replies(lists, said, failures):
    """(rows with the new reply last, rejects with a reason). said: a reply for each list, failures: {index: reason}."""
    rows, rejects = [], []
    for i, row in enumerate(lists):
        text = (said[i] or "").strip()
        if text and text not in {response.strip() for response in row["responses"]}:
            rows.append({**row, "responses": [*row["responses"], f" {text}"]})
        else:
            reason = failures.get(i, "identical replies" if text else "empty reply")
            rejects.append({"id": row["id"], "reason": reason})
    return rows, rejects


# ---- publication -------------------------------------------------------------------------------------------------


def _write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_source(folder, data, parts, rows):
    """`<split>.jsonl` (and `test.jsonl`): the longer lists and the other parts as they were, to be split the same way.

    The parts are cut by hash of the first human turn, so the longer lists alone would all fall to the policy again.
    """
    paths = [parts / f"{name}.parquet" for name in ("reward_train", "reward_eval", "dev", "test")]
    others = {path.stem: read_lists(path) for path in paths if path.is_file()}  # a finished reward model has no part
    test = [] if data.shares.get("test") else list(others.pop("test"))
    _write_lines(folder / f"{data.split}.jsonl", [*rows, *(row for part in others.values() for row in part)])
    if test:
        _write_lines(folder / "test.jsonl", test)


def _card(profile, record):
    """The card of the longer lists: who wrote the extra reply and how, who ranked, how to train on them."""
    writer, name = record["writer"], record["name"]
    if "policy" in writer:
        who = f"the SFT policy of profile `{profile.name}` (seed {record['seed']})"
    else:
        versions = ", ".join(map(escape.markdown, record["answered_by"]))
        who = f"the model {escape.markdown(writer['model'])} at {writer['endpoint']} (it calls itself {versions})"
    places = ", ".join(f"{place}: {count}" for place, count in record["place_of_the_new_reply"].items())
    overrides = {"data.source": "<this folder>", **MADE_FROM_LISTS}
    return f"""# {name}: one more reply for every list

Made by `deftlib.training.extend` from the policy part of `{profile.data.source}`, profile `{profile.name}`:
{record["lists"]} lists, {record["rejected"]} rejected (`rejects.jsonl`).

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
    add_options(parser)
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server, e.g. http://localhost:8000/v1")
    parser.add_argument("--model", metavar="NAME", help="a model there; without both, the SFT policy is sampled")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    with one_sentence():
        profile = Profile.from_options(args)
        if bool(args.endpoint) != bool(args.model):
            raise ValueError("an endpoint and a model go together (--endpoint URL --model NAME), found only one")
        server = Endpoint(args.endpoint, args.model) if args.endpoint else None
        print(longer_lists(profile, server, args.seed))


if __name__ == "__main__":
    main()

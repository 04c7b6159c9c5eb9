"""Preference data of your own: what was understood of it, before anything is trained: `deft check my-file`.

It tells each file's format, the rows that cannot be used and why, subsets, turns, ties and lengths; of `--profile` and
`--set policy.source=…` also lengths in tokens, what the profile's limits cut, and one list as it would be trained on.
Exit code 0: the rejects stay within the share; 1: they do not, or the source cannot be read.
"""

import argparse
import sys
from collections import Counter

import datasets
import numpy as np

from deftlib.command import one_sentence
from deftlib.models import policies
from deftlib.preferences import dialogues
from deftlib.preferences.formats import FORMATS, detected
from deftlib.preferences.lists import read
from deftlib.preferences.sources import files
from deftlib.profile import Profile, add_options
from deftlib.training import encoding


def formats(source, split):
    """What `read` takes each file for, in one line: "pairs", or "pairs (a.csv), lists (b.jsonl)"."""
    found = {label: detected(label, rows) for _, label, rows in files(source, split)}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{format} ({label.rpartition('/')[2]})" for label, format in found.items())


def understood(lists):
    """Lines that tell the replies, turns, words and ties of ranked lists."""
    prompts, responses = lists["prompt"][:], lists["responses"][:]
    sizes = Counter(map(len, responses))
    yield f"replies a list: {_counted(sizes)}"
    yield f"turns of the prompt: {_counted(Counter(len(dialogues.messages(prompt)) for prompt in prompts))}"
    words = [len(reply.split()) for of_list in responses for reply in of_list]
    yield f"words: prompt {_spread([len(prompt.split()) for prompt in prompts])}; reply {_spread(words)}"
    rewards = [row for row in lists["rewards"][:] if row is not None]
    ties = sum(len(set(row)) < len(row) for row in rewards)
    if rewards:
        yield f"rewards: of {len(rewards)} lists, {ties} with a tie (equal ones keep the file's order)"
    else:
        yield "rewards: none, the order of the file is the ranking"


def as_trained(lists, tokenizer, text):
    """Lines that tell lengths in a policy's tokens, what is cut, and one list as the policy would read it."""
    prompts, responses = lists["prompt"][:], lists["responses"][:]
    lengths = [len(policies.encode_text(tokenizer, prompt)) for prompt in prompts]
    replies = [len(policies.encode_text(tokenizer, reply)) for of_list in responses for reply in of_list]
    yield f"tokens: prompt {_spread(lengths)}; reply {_spread(replies)}"
    cut, cut_replies = np.mean(np.array(lengths) > text.prompt_tokens), np.mean(np.array(replies) >= text.reply_tokens)
    yield (
        f"cut: {cut:.1%} of prompts on the left to text.prompt_tokens={text.prompt_tokens}, {cut_replies:.1%} of "
        f"replies on the right to text.reply_tokens={text.reply_tokens}"
    )
    encoded = encoding.encode_lists(lists, tokenizer, text)
    yield f"left to train on: {len(encoded)} of {len(lists)} lists"
    first = encoded[0]
    yield f"the first, as it is trained on:\n  prompt: {tokenizer.decode(first['prompt_ids'])!r}"
    for place, ids in enumerate(first["response_ids"], start=1):
        yield f"  y_{place}: {tokenizer.decode(ids)!r}"


def _counted(counts):
    whole = sum(counts.values())
    return ", ".join(f"{size}: {100 * n / whole:.0f} %" for size, n in sorted(counts.items())[:8])


def _spread(lengths):
    middle, long, longest = np.quantile(lengths, (0.5, 0.95, 1)).round().astype(int)
    return f"{middle} (95 %: {long}, longest {longest})"


def main(arguments=None):
    """The command of the first lines; returns its exit code."""
    parser = argparse.ArgumentParser(description="Check ranked preference data: what is understood, cut and rejected.")
    add = parser.add_argument
    add("source", metavar="PATH", help="file (JSON lines, JSON, CSV, Parquet), folder, hub id[:config], or mini")
    add("--split", default="train", help="which file of a folder or hub id (default: train)")
    add("--format", default="auto", choices=["auto", *FORMATS], help="default: by the keys of the rows")
    add("--cleaning", default="none", choices=["none", "pro"], help="pro: HH-RLHF as the PRO authors cleaned it")
    add("--rejects", default="rejects.jsonl", metavar="FILE", help="where rejects go (default: rejects.jsonl)")
    add("--max-reject-share", type=float, default=0.05, metavar="SHARE", help="stop above it (default: 0.05)")
    add("--out", metavar="FILE", help="write the lists as Parquet")
    add_options(parser, default=None)
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    with one_sentence():
        profile = Profile.from_options(options) if options.profile else None
        lists = read(
            options.source,
            split=options.split,
            format=options.format,
            rejects_path=options.rejects,
            max_reject_share=options.max_reject_share,
            cleaning=options.cleaning,
        )
        if options.out:
            lists.to_parquet(options.out)
        how = options.format if options.format != "auto" else formats(options.source, options.split)
        print(f"format: {how}", *understood(lists), sep="\n")
        if profile:
            start = policies.start_policy(profile)
            print(f"policy: {profile.policy.source}")
            print(*as_trained(lists, policies.load_tokenizer(start), profile.text), sep="\n")
        else:
            print("with --profile NAME also tokens, cuts and a list as it would be trained on")
    return 0


if __name__ == "__main__":
    sys.exit(main())

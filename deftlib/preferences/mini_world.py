"""The mini world: a small authored stand-in for HH-RLHF in which the true reward is known.

Hand-written sentences (data/mini/world.yaml) become prompts and replies of three grades, ranked by noisy annotators.
`deft mini-world` writes data/mini/{train,test}.jsonl and tokenizer.json; `--check` compares instead,
`--numbers` prints what data/mini/README.md reports. Importing needs little: PyYAML and no model library.
"""

import argparse
import hashlib
import json
import math
import random
import re
import statistics
import sys
import zlib
from functools import cache
from itertools import product
from typing import NamedTuple

import yaml

from deftlib.store import ROOT

FOLDER = ROOT / "data" / "mini"
VOCABULARY_SIZE = 1500  # an upper bound: merging ends before, when every word of the world is one token


class Sentence(NamedTuple):
    """One hand-written sentence. `place` is a prefix of `subset/topic`: "" fits everywhere, "helpful" three subsets."""

    slot: str
    place: str
    good: bool


class World(NamedTuple):
    settings: dict  # world.yaml as it stands
    sentences: dict[str, Sentence]
    prompts: dict[str, list[str]]  # place "subset/topic" -> every prompt that can be asked there
    asks: dict[str, str]  # what is asked -> place


@cache
def _source() -> str:
    return (FOLDER / "world.yaml").read_text(encoding="utf-8")


def digest() -> str:
    """sha256 of world.yaml as this process read it: of every result that the world's rules had a part in."""
    return hashlib.sha256(_source().encode()).hexdigest()


@cache
def world() -> World:
    """world.yaml, read once. Raises ValueError if a sentence or a question stands there twice."""
    settings = yaml.safe_load(_source())
    sentences, prompts, asks = {}, {}, {}

    def add(texts, slot, place, good):
        for text in texts:
            if text in sentences:
                raise ValueError(f"{FOLDER / 'world.yaml'}: written twice: {text!r}; keep one")
            sentences[text] = Sentence(slot, place, good)

    for place, slots in settings["sentences"].items():
        prefix = "" if place == "everywhere" else place
        for slot, texts in slots.items():
            by_kind = {"neutral": texts} if slot == "neutral" else texts
            for kind in by_kind:
                add(by_kind[kind], slot, prefix, kind == "good")
    for subset, topics in settings["topics"].items():
        questions = settings["questions"][subset.split("-")[0]]
        for name, topic in topics.items():
            place = f"{subset}/{name}"
            add(topic["good"], "substance", place, True)
            add(topic.get("bad", []), "substance", place, False)
            for ask in topic["asks"]:
                if ask in asks:
                    raise ValueError(f"{FOLDER / 'world.yaml'}: asked twice: {ask!r}; keep one")
                asks[ask] = place
            prompts[place] = [
                f"\n\nHuman: {template.format(ask=ask, when=when)}\n\nAssistant:"
                for template, ask, when in product(questions["templates"], topic["asks"], questions["whens"])
            ]
    return World(settings, sentences, prompts, asks)


def place_of(prompt: str) -> str:
    """The "subset/topic" that a prompt asks about last; "" if it asks about nothing in this world."""
    asks = world().asks
    last = max(asks, key=lambda ask: (prompt.rfind(ask), len(ask)))
    return asks[last] if last in prompt else ""


def split_sentences(response: str) -> list[str]:
    """The sentences of any text, with single spaces inside; a cut-off end counts as a sentence."""
    return [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", response) if part.strip()]


def true_reward(prompt: str, response: str) -> float:
    """How good a reply truly is, 0 to 100: the summed weights of the slots it fills well.

    A slot earns its weight once, if every sentence of that slot in the reply is good and fits the prompt's subset and
    topic; saying the good and the bad thing earns nothing. Missing slots and unknown sentences earn nothing either, and
    cost nothing: report `unknown_sentences` beside it. Any text is accepted; if the prompt is not of this world, only
    sentences that fit everywhere earn.
    """
    place, sentences = place_of(prompt), world().sentences
    said = [sentences[text] for text in split_sentences(response) if text in sentences]
    reward = 0.0
    for slot, weight in world().settings["weights"].items():
        fits = [sentence.good and place.startswith(sentence.place) for sentence in said if sentence.slot == slot]
        reward += weight if fits and all(fits) else 0
    return reward


def unknown_sentences(response: str) -> float:
    """Share of a reply's sentences that nobody wrote, 0 to 1: a measure of broken language. An empty reply has 0."""
    said = split_sentences(response)
    return sum(text not in world().sentences for text in said) / max(len(said), 1)


def planted_words() -> dict[str, set[str]]:
    """Words that occur in good sentences only ("good") or in bad sentences only ("bad"): what q_diff should find."""
    return {side: set(words) for side, words in world().settings["planted"].items()}


@cache
def _choices(slot: str, good: bool, place: str) -> list[str]:
    """The sentences that may fill a slot at a place."""
    return [
        text
        for text, sentence in world().sentences.items()
        if sentence.slot == slot and sentence.good == good and place.startswith(sentence.place)
    ]


def _off_topic(place: str) -> list[str]:
    """Good advice on the other topics of the same subset."""
    subset = place.split("/")[0]
    others = [other for other in world().prompts if other.startswith(subset + "/") and other != place]
    return [text for other in others for text in _choices("substance", True, other)]


def _reply(rng: random.Random, place: str, goodness: float) -> str:
    """One reply whose slots are good with this probability."""
    settings, said = world().settings, []
    for slot in settings["order"]:
        if slot == "neutral":
            options = _choices(slot, False, place) if rng.random() < settings["neutral_share"] else []
        elif rng.random() < goodness:
            options = _choices(slot, True, place)
        elif slot == "substance" and rng.random() < settings["off_topic_share"]:
            options = _off_topic(place)
        else:
            options = _choices(slot, False, place)
        said += [rng.choice(options)] if options else []
    return " " + " ".join(said)


def best_response(prompt: str) -> str:
    """A reply of true reward 100, always the same for one prompt: the "stronger model" of this world.

    Raises ValueError if the prompt asks about nothing in this world.
    """
    place = place_of(prompt)
    if not place:
        raise ValueError(f"no topic of the mini world in {prompt!r}; use a prompt from data/mini")
    return _reply(random.Random(prompt), place, goodness=1.0)


def _asked(place: str, split: str) -> list[str]:
    """The prompts of a place that may occur in this split: one in eight is kept for testing, whatever the seed."""
    return [prompt for prompt in world().prompts[place] if (zlib.crc32(prompt.encode()) % 8 == 0) == (split == "test")]


def conversations(n: int, seed: int):
    """Yield n (prompt, response) of mixed grades, to pretrain a start model that has heard good and bad alike.

    No prompt of any test split occurs, whatever the seeds.
    """
    rng = random.Random(f"conversations {seed}")
    places = {place: _asked(place, "train") for place in world().prompts}
    for _ in range(n):
        place = rng.choice(list(places))
        goodness = rng.choice(list(world().settings["grades"].values()))
        yield rng.choice(places[place]), _reply(rng, place, goodness)


def _ranked_list(rng: random.Random, place: str, prompt: str) -> list[str]:
    """One reply of each grade, in the annotators' order: by true reward plus Gumbel noise, best first."""
    settings, felt = world().settings, {}
    for goodness in settings["grades"].values():
        while (reply := _reply(rng, place, goodness)) in felt:
            pass  # the replies of one list differ
        gumbel = -math.log(rng.expovariate(1))
        felt[reply] = true_reward(prompt, reply) + settings["annotator_noise"] * gumbel
    return sorted(felt, key=felt.get, reverse=True)


def generate(seed: int = 0) -> dict[str, list[dict]]:
    """Both splits: {"train": rows, "test": rows}; a row is {"id", "subset", "prompt", "responses"}, best first.

    Subsets have the same number of rows; no prompt occurs twice, and none of test in train.
    """
    splits = {}
    for split, size in world().settings["sizes"].items():
        splits[split] = []
        for subset in world().settings["topics"]:
            rng = random.Random(f"{seed} {subset} {split}")
            places = [place for place in world().prompts if place.startswith(subset + "/")]
            asked = [(place, prompt) for place in places for prompt in _asked(place, split)]
            for number, (place, prompt) in enumerate(rng.sample(asked, size), start=1):
                row = {"id": f"{subset}-{split}-{number:04d}", "subset": subset, "prompt": prompt}
                splits[split].append(row | {"responses": _ranked_list(rng, place, prompt)})
    return splits


def tokenizer(rows: list[dict]):
    """A byte-level BPE (GPT-2's pre-tokenisation) trained on these rows; `<pad>` is 0, `<eos>` is 1.

    Returns a `tokenizers.Tokenizer` that gives any UTF-8 text back unchanged.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((text for row in rows for text in (row["prompt"], *row["responses"])), trainer)
    return bpe


def numbers(splits: dict[str, list[dict]], bpe) -> str:
    """What data/mini/README.md reports, as a Markdown table."""
    rows = splits["train"] + splits["test"]
    rewards = [[true_reward(row["prompt"], reply) for reply in row["responses"]] for row in rows]
    replies = [reply for row in rows for reply in row["responses"]]
    lengths = [len(encoding.ids) for encoding in bpe.encode_batch(replies)]
    words = {word for row in rows for text in (row["prompt"], *row["responses"]) for word in words_of(text)}

    def share(condition):
        return f"{100 * statistics.mean(map(condition, rewards)):.1f} %"

    table = {
        "ranked lists, train + test": f"{len(splits['train'])} + {len(splits['test'])}",
        "prompts that can be asked": sum(map(len, world().prompts.values())),
        "hand-written sentences": len(world().sentences),
        "different words (case ignored)": len(words),
        "vocabulary of the tokenizer": bpe.get_vocab_size(),
        "words per question, mean": f"{statistics.mean(len(row['prompt'].split()) - 2 for row in rows):.1f}",
        "tokens per prompt, mean": f"{statistics.mean(len(bpe.encode(row['prompt']).ids) for row in rows):.1f}",
        "words per reply, mean": f"{statistics.mean(len(reply.split()) for reply in replies):.1f}",
        "tokens per reply, mean (min-max)": f"{statistics.mean(lengths):.1f} ({min(lengths)}-{max(lengths)})",
        "`y_1` truly best (ties count as best)": share(lambda r: r[0] == max(r)),
        "`y_1` truly better than `y_l`": share(lambda r: r[0] > r[-1]),
        "`y_1` and `y_l` truly equal": share(lambda r: r[0] == r[-1]),
        "true reward of `y_1`, `y_2`, `y_3`, mean": ", ".join(f"{statistics.mean(r):.1f}" for r in zip(*rewards)),
        "correlation of true reward and tokens": f"{statistics.correlation(sum(rewards, []), lengths):+.3f}",
    }
    return "\n".join(["| measured | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table.items())])


def words_of(text: str) -> list[str]:
    """Words in lower case, as `planted_words` has them."""
    return re.findall(r"[a-z]+", text.lower())


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="Write the mini world's data.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="compare with data/mini; exit 1 on any difference")
    parser.add_argument("--numbers", action="store_true", help="only print the measured numbers")
    options = parser.parse_args(arguments)

    splits = generate(options.seed)
    bpe = tokenizer(splits["train"])
    if options.numbers:
        print(numbers(splits, bpe))
        return 0
    files = {f"{split}.jsonl": "".join(json.dumps(row) + "\n" for row in rows) for split, rows in splits.items()}
    files["tokenizer.json"] = bpe.to_str(pretty=True) + "\n"
    different = 0
    for name, text in files.items():
        path, new = FOLDER / name, text.encode()
        same = path.exists() and path.read_bytes() == new
        different += not same
        if not same and not options.check:
            path.write_bytes(new)
        print(f"{path}: {'unchanged' if same else 'DIFFERENT' if options.check else 'written'}")
    return 1 if options.check and different else 0


if __name__ == "__main__":
    sys.exit(main())

"""Ranked lists as token ids: what every trainer here reads.

    encoded = encode_lists(path, tokenizer, profile.text, folder=folder)     # prompt_ids, response_ids, rewards
    encoded.map(as_sft), encoded.map(as_pair)                                # as TRL's SFT and DPO trainers take them

However many lists there are, ten thousand are in memory at a time and the rest in Arrow files, which are mapped. Where
they have a column `length`, batches hold lists of about one length.
"""

import json
import os
import shutil
import tempfile
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import torch
from torch.utils.data import Sampler

from deftlib import store
from deftlib.method.distribution import IGNORED
from deftlib.models import policies
from deftlib.preferences import batches
from deftlib.training import subset
from deftlib.workers import in_order

LISTS_PER_SHARD = 10_000  # of one Arrow file, after whose last an interrupted run goes on
SCHEMA = pa.schema(
    {
        "prompt_ids": pa.list_(pa.int32()),
        "response_ids": pa.list_(pa.list_(pa.int32())),
        "rewards": pa.list_(pa.float64()),
    }
)


def encode_lists(lists, tokenizer, text, rejects_path=None, folder=None, num_proc=1):
    """Ranked lists as token ids: prompt_ids, response_ids, rewards (ranks L-1 .. 0 where rewards do not fit the order).

    lists: a Parquet file of them, or the rows. folder: for the Arrow files that the Dataset maps, to be deleted after
    it; None is a temporary one, gone with the Dataset or the process (a killed one leaves it). What an interrupted run
    left there from the same Parquet file is not done again.
    num_proc: processes that share the work. A list is rejected, written to `rejects_path` and counted on screen, if a
    response has no token left but EOS, or if two differ only behind the cut. Raises ValueError if none is left.
    """
    if folder is None:
        place = Path(tempfile.mkdtemp(prefix="deft-encoded-"))
        try:
            encoded = encode_lists(lists, tokenizer, text, rejects_path, place, num_proc)
        except BaseException:
            shutil.rmtree(place)
            raise
        weakref.finalize(encoded, shutil.rmtree, place, ignore_errors=True)
        return encoded
    place = Path(folder)
    with store.alone(place, f"  another process encodes {place.name}: waiting"):
        is_file = isinstance(lists, str | Path)
        of = {"lists": store.digest(lists) if is_file else None, "text": vars(text)}
        of["tokenizer"] = policies.fingerprint(tokenizer)
        _keep_only(place, of if is_file else None)
        pieces = batches.pieces_of(batches.rows(lists) if is_file else lists, LISTS_PER_SHARD)
        shards = ((place / f"shard-{number:06d}.arrow", rows) for number, rows in enumerate(pieces))
        found = list(in_order(partial(_encode_shard, tokenizer=tokenizer, text=text), shards, num_proc))
    rejects = [reject for shard in found for reject in json.loads(shard.with_suffix(".json").read_text())]
    if rejects:
        counts = Counter(reject["reason"] for reject in rejects)
        print(f"  rejected {len(rejects)} lists: {', '.join(f'{n} {reason}' for reason, n in counts.items())}")
        if rejects_path:
            store.write_atomic(rejects_path, "".join(json.dumps(reject) + "\n" for reject in rejects))
    encoded = datasets.concatenate_datasets([datasets.Dataset.from_file(str(shard)) for shard in found])
    if not len(encoded):
        raise ValueError("no list is left to train on: cut to text.reply_tokens, responses vanish or become equal")
    return encoded


def _keep_only(place, of):
    """Empty the folder, unless what is in it was made from just this."""
    note = place / "of.json"
    if of is None or not note.is_file() or json.loads(note.read_text()) != of:
        shutil.rmtree(place, ignore_errors=True)
        store.write_atomic(note, json.dumps(of))


def _encode_shard(shard, tokenizer, text):
    """Encode the lists of one (path, rows), if that was not done: an Arrow file, and its rejects beside it."""
    path, rows = shard
    if path.is_file():
        return path
    rejects, partial_path = [], path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with pa.OSFile(str(partial_path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
        for piece in batches.pieces_of(rows, batches.LISTS_AT_ONCE):
            encoded = list(_encoded(piece, tokenizer, text, rejects))
            stream.write_batch(pa.RecordBatch.from_pylist(encoded, SCHEMA))
    store.write_atomic(path.with_suffix(".json"), json.dumps(rejects))
    os.replace(partial_path, path)
    return path


def _encoded(rows, tokenizer, text, rejects):
    """Yield the lists that can be trained on, encoded; the others go into `rejects`."""
    replies = iter(policies.encode_replies(tokenizer, [reply for row in rows for reply in row["responses"]], text))
    kept = []
    for row in rows:
        responses = [next(replies) for _ in row["responses"]]
        fault = _fault(responses, tokenizer.eos_token_id)
        if fault:
            rejects.append({"id": row["id"], "reason": fault})
        else:
            kept.append((row, responses))
    prompts = policies.encode_prompts(tokenizer, [row["prompt"] for row, _ in kept], text)
    for (row, responses), prompt in zip(kept, prompts):
        fits = row["rewards"] is not None and subset.agrees(row)
        rewards = row["rewards"] if fits else [float(len(responses) - 1 - i) for i in range(len(responses))]
        yield {"prompt_ids": prompt, "response_ids": responses, "rewards": rewards}


def _fault(responses, eos):
    """Why encoded responses cannot be trained on, or None."""
    if any(set(response) <= {eos} for response in responses):
        return "a response vanishes by truncation"
    if len({tuple(response) for response in responses}) < len(responses):
        return "two responses differ only behind the cut"
    return None


def responses_of(encoded, which):
    """The lists cut to the responses at the positions `which`, e.g. (0, -1) for the best and the worst."""
    cut = lambda row: {name: [row[name][i] for i in which] for name in ("response_ids", "rewards")}
    return encoded.map(cut)


def as_sft(row):
    """A row of SFT: the prompt and y_1, labelled on y_1 alone."""
    best = row["response_ids"][0]
    return {"input_ids": row["prompt_ids"] + best, "labels": [IGNORED] * len(row["prompt_ids"]) + best}


def as_pair(row):
    """A row of DPO: y_1 chosen, y_l rejected."""
    return {"chosen_ids": row["response_ids"][0], "rejected_ids": row["response_ids"][-1]}


# ---- in which order they come --------------------------------------------------------------------------------------

POOL = 50  # batches that are sorted together, as transformers' own grouping takes


class ByLength(Sampler):
    """The order of the lists: batches of about one length, in an order that knows nothing of length.

    Lists are dealt at random into pools of POOL batches and sorted there; the batches of all pools are shuffled. (The
    sampler of transformers leaves them longest first, which would couple length to the learning rate.) An order belongs
    to seed and epoch: a run that was killed goes on in it, and every process of one run sees the same.
    lengths: int[n]. batch_size: lists of a micro-batch, in all processes that share it.
    """

    def __init__(self, lengths, batch_size, seed):
        self.lengths, self.batch_size, self.seed, self.epoch = torch.as_tensor(lengths), batch_size, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        dealt = torch.randperm(len(self.lengths), generator=generator)
        pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in dealt.split(POOL * self.batch_size)]
        *whole, last = torch.cat(pools).split(self.batch_size)
        order = torch.randperm(len(whole), generator=generator).tolist()
        yield from torch.cat([*(whole[i] for i in order), last]).tolist()  # a short batch stays the last


class GroupedByLength:
    """For a trainer: batches of one length where its dataset has a column `length`, as `building` adds one.

    Put it before the trainer class.
    """

    def _get_train_sampler(self, train_dataset=None):
        if "length" not in getattr(self.train_dataset, "column_names", ()):
            return super()._get_train_sampler(train_dataset)
        among = self.accelerator.num_processes if getattr(self, "micro_batches_split", False) else 1
        return ByLength(self.train_dataset["length"][:], among * self._train_batch_size, self.args.data_seed)

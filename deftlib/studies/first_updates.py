"""Does every method train a real model? Twenty updates of each: `deft first-updates --profile smol`.

Plain and with the distribution reward, on ranked lists of HH-RLHF; the listwise methods also on OpenAssistant's
human-ranked lists of two to eight replies. It writes `table_first_updates` to `figures/<profile>/` and goes on where it
was stopped. Texts are short and every method starts from the start policy, so nothing here says how good a method is.
"""

import argparse
import dataclasses
import json
import math

import numpy as np
import pandas as pd
import torch

from deftlib import store
from deftlib.command import one_sentence
from deftlib.method.grading import extreme_sides
from deftlib.models import policies, rewards
from deftlib.models.loop import Progress, fit_or_resume, read_log
from deftlib.preferences import lists as ranked_lists
from deftlib.profile import Profile, add_options
from deftlib.reporting import report
from deftlib.sections import Text
from deftlib.training import building, subset, train
from deftlib.training.trainers import LIST_METHODS

UPDATES, LISTS, LISTS_PER_UPDATE = 20, 20, 1  # as little as shows it: minutes a method on two cores
TEXT = Text(prompt_tokens=48, reply_tokens=32)
MOST_RESPONSES = 8
LISTWISE = [name for name, method in LIST_METHODS.items() if not method.pairs]


def measured(profile, method, data):
    """What 20 updates of one method did: a dict of finite, first and last loss, change of the weights, R_dis, seconds.

    data: "oasst", or anything else for the profile's own. change is |weights after - before| / |before|. Published,
    so made once.
    """
    short = _short(profile)
    start = policies.start_policy(profile)
    lists = openassistant() if data == "oasst" else own_lists(short)
    key = {"method": method, "start": policies.identity(start), "lists": store.content_key(lists.to_list())}
    key |= {"text": vars(TEXT), "size": [UPDATES, LISTS_PER_UPDATE], "training": profile.digest("training")}
    key |= {"dtype": profile.policy.dtype}
    if method.endswith("rloo"):
        key["r_train"] = rewards.judge(short, "train", subset.parts(short)).identity()

    def produce(folder):
        tokenizer, vocab_size = policies.load_tokenizer(start), subset.vocabulary_size(start)
        sides = [extreme_sides(len(responses)) for responses in lists["responses"]]
        counts = subset.count_lists(lists, sides, tokenizer, vocab_size, TEXT)
        subset.save_q_diff(folder / "q_diff.npz", *counts, policies.fingerprint(tokenizer))
        trainer = building.build(
            folder, short, method, 0, start, lists, folder / "q_diff.npz", max_steps=UPDATES, logging_steps=1
        )
        before = _weights(trainer.model)
        if method.startswith("deft-"):
            trainer.calibrate(ratio=0.03, batches=2)
        trainer.add_callback(Progress(folder, f"{method} on {data}"))
        fit_or_resume(trainer, folder)
        change = (_weights(trainer.model) - before).norm() / before.norm()
        log = read_log(folder)
        losses = [entry["loss"] for entry in log]
        record = {"finite": all(map(math.isfinite, losses)), "first loss": losses[0], "last loss": losses[-1]}
        record |= {"change": change.item(), "R_dis": np.nanmean([entry.get("R_dis", np.nan) for entry in log]).item()}
        record |= {"omega": trainer.omega, "updates": trainer.state.global_step, "seconds": log[-1]["seconds"]}
        (folder / "measured.json").write_text(json.dumps(record))
        (folder / "model.safetensors").unlink()  # half a gigabyte each, and of no use

    name = f"first-updates/{method}-{data}"
    folder = store.stage(profile, name, key, produce, "studies.first_updates")
    return json.loads((folder / "measured.json").read_text())


def own_lists(profile):
    """20 lists, equally over the subsets, of the policy part."""
    lists = ranked_lists.read_lists(subset.parts(profile) / "policy.parquet")
    return ranked_lists.sample(lists, LISTS)


def openassistant():
    """20 lists of two to eight replies that people ranked, longer ones cut: half of the lists have three or more."""
    ranked = ranked_lists.read(ranked_lists.locate("oasst"))
    order = sorted(range(len(ranked)), key=lambda i: -len(ranked[i]["responses"]))
    chosen = sorted(order[: LISTS // 2] + order[-LISTS // 2 :])
    return ranked.select(chosen).map(lambda row: {"responses": _at_most(MOST_RESPONSES, row["responses"])})


def _at_most(length, responses):
    """The first and the last of the responses, where there are more."""
    return responses if len(responses) <= length else responses[: length - 1] + responses[-1:]


def _short(profile):
    """The profile with short texts, small batches, and an r_train for RLOO that few lists trained."""
    training = dataclasses.replace(
        profile.training, batch_size=LISTS_PER_UPDATE, gradient_accumulation=1, save_steps=0, bf16=False
    )
    training = dataclasses.replace(training, rloo=dataclasses.replace(training.rloo, generations=2))
    data = dataclasses.replace(profile.data, reward_lists=64, dev_lists=64)
    return dataclasses.replace(profile, training=training, data=data, text=TEXT)


def _weights(model):
    return torch.cat([parameter.detach().float().cpu().flatten() for parameter in model.parameters()])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, default="smol")
    parser.add_argument("--methods", nargs="+", default=train.METHODS, help="default: all; each runs with DEFT too")
    args = parser.parse_args(arguments)
    with one_sentence():
        profile = Profile.from_options(args)
        runs = [(prefix + method, profile.data.source) for method in args.methods for prefix in ("", "deft-")]
        runs += [(method, "oasst") for method in args.methods if method in LISTWISE]
        rows = [{"method": method, "data": data} | measured(profile, method, data) for method, data in runs]
    table = pd.DataFrame(rows).set_index(["method", "data"])
    title = f"{UPDATES} updates of every method on {profile.policy.source}"
    chosen = "" if args.methods == train.METHODS else "--methods " + " ".join(args.methods)
    report.save_table(profile, "table_first_updates", table, title, notebook="first_updates", seeds=[0], options=chosen)
    print(table.to_string(float_format="{:.4g}".format))
    failed = table[~table["finite"] | (table["change"] == 0)]
    if len(failed):
        raise SystemExit(f"error: not finite, or not changed: {', '.join(' on '.join(row) for row in failed.index)}")


if __name__ == "__main__":
    main()

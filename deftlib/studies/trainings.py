"""Which policies the notebooks of a profile train, without training any: what `plan` counts.

runs(profile, length)        # {"03": {Run("dpo", 0), ...}, "05": ..., "06": ..., "07": ...}
"""

import math
import re
from typing import NamedTuple

from deftlib.studies import ablation
from deftlib.training import train

SUBSETS = 4


class Run(NamedTuple):
    """A policy to train. Two that are equal are one folder."""

    method: str
    seed: int
    lists: str = ""  # which, where they are not the method's own
    omega: str = ""  # which, where it is not the recipe's
    grading: str = ""  # whose level A and q_diff, where it is not the profile's first
    updates: bool = False  # as many as the DEFT twin, instead of the recipe's epochs


def runs(profile, length):
    """{notebook: the runs that it is the first to ask for, sets of `Run`}. length: responses a list."""
    asked, seen = named(profile, length), set()
    for notebook, of_notebook in asked.items():
        needs_sft = {run.seed for run in of_notebook if run.method.removeprefix("deft-") in train.FROM_SFT}
        asked[notebook] = (of_notebook | {Run("sft", seed) for seed in needs_sft}) - seen
        seen |= of_notebook | asked[notebook]
    return asked


def named(profile, length):
    """{notebook: the runs that it names, sets of `Run`}: without the SFT models that others start from."""
    asked = {"03": _of_notebook_03(profile), "05": _of_notebook_05(profile)}
    return asked | {"06": _of_notebook_06(profile, length), "07": _of_notebook_07(profile)}


def _of_notebook_05(profile):
    return {Run(method, seed) for method in profile.mt_bench.methods for seed in profile.mt_bench.seeds}


def _of_notebook_03(profile):
    training, found = profile.training, set()
    for seed in profile.seeds:
        found |= {Run(method, seed) for method in training.methods}
        found |= {Run(m, seed, grading=g) for g in training.gradings[1:] for m in ("deft-pro", "deft-dpo")}
        found.add(Run("deft-dpo", seed, omega="0"))
    return found


def _of_notebook_06(profile, length):
    """`ablation.controls`, `volumes` and `lengths` in any profile, the other sweeps where it asks for them."""
    settings, first = profile.ablation, profile.training.gradings[0]
    share, found = getattr(profile.grading, ablation.share_name(profile)), set()
    for method in settings.methods:
        for seed in settings.seeds:
            found |= {Run(method, seed), Run(method, seed, "all"), Run(method, seed, omega="0")}
            found |= {Run(method.removeprefix("deft-"), seed), Run(method, seed, _random(share))}
            found.add(Run(method, seed, _random(share), omega="0"))
            if first == "reward":
                found.add(Run(method, seed, "agreement"))
                found |= {Run(method, seed, "annotation order")} if profile.data.rank_by == "reward" else set()
            if profile.data.source == "mini":
                found.add(Run(method, seed, "truly best"))
    method = settings.sweep_method
    for seed in settings.seeds:
        for top in {share, *settings.tops}:
            found |= {Run(method, seed, _level_a(top) if top != share else ""), Run(method, seed, _random(top))}
        found.add(Run(method, seed, "all"))
    short = [n for n in settings.lengths if n <= length]
    if len(short) > 1:
        of_length = {n: f"{n} responses" if n < length else "" for n in short}
        found |= {Run(m, settings.seeds[0], of_length[n]) for m in ("deft-pro", "deft-rrhf") for n in short}
    return found | (_swept(profile, length) if settings.sweeps else set())


def _swept(profile, length):
    settings, method = profile.ablation, profile.ablation.sweep_method
    own, seeds, found = getattr(profile.training, method.removeprefix("deft-")).omega, settings.seeds, set()
    first, other = profile.training.gradings[0], {"lowest": "highest", "highest": "lowest"}[profile.grading.direction]
    called = lambda grading: "" if grading == first else grading
    readings = {"0", *(f"ratio {ratio:g}" for ratio in settings.ratios)}
    readings |= {"published", "counts"} if method in ablation.PRINTED_OMEGA else set()
    if own.reading == "ratio" or own.value == ablation.PRINTED_OMEGA.get(method):
        readings -= {f"ratio {own.value:g}" if own.reading == "ratio" else own.reading}
    found |= {Run(method, seeds[0])} | {Run(method, seeds[0], omega=reading) for reading in readings}
    for seed in seeds:
        found |= {Run(method, seed, grading=called("reward")), Run(method, seed, grading=called("distribution"))}
        found.add(Run(method, seed, f"{other} R_dis", grading=called("distribution")))
        lists = _random(profile.grading.keep, "first" if first == "distribution" else "distribution")
        found.add(Run(method, seed, lists, grading=called("distribution")))
    if first == "reward" and length > 2:  # of pairs no level C changes a count, and the run is the profile's own
        others = set(settings.bottoms) - {profile.grading.bottom}
        found |= {Run(method, seeds[0], f"bottom {c:g}") for c in others}
    return found


def _of_notebook_07(profile):
    share, found = getattr(profile.grading, ablation.share_name(profile)), set()
    for method in profile.comparison.methods:
        for seed in profile.comparison.seeds:
            twin = f"deft-{method}"
            found |= {Run(method, seed), Run(twin, seed), Run(method, seed, updates=True)}
            found |= {Run(twin, seed, _random(share), omega="0"), Run(twin, seed, omega="0")}
            if method == "ift":
                found.add(Run("ift", seed, "weights without gradient"))
    return found


def _random(share, grading="first"):
    return f"random {share:g} % ({grading})"


def _level_a(share):
    return f"level A {share:g} %"


def lists_of(run, profile, parts):
    """How many lists a run learns from, an epoch."""
    share = re.search(r"([\d.]+) %", run.lists)
    if run.lists == "all" or not (share or run.lists or run.method.startswith("deft-")):
        return parts["policy"]
    if run.lists == "weights without gradient":
        return parts["policy"]
    grading = run.grading or profile.training.gradings[0]
    kept = float(share[1]) if share else getattr(profile.grading, {"reward": "top", "distribution": "keep"}[grading])
    return SUBSETS * math.ceil(kept * parts["policy"] / SUBSETS / 100)

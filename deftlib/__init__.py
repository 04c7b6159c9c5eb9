"""deftlib: a reproducible companion to *DEFT: Distribution-guided Efficient Fine-Tuning for Human Alignment*.

Read the notebooks first; they call this library. *Decision 7* and its like are those of data/differences.md, *A.1* and
section numbers are the paper's. Its rooms, from the top of the house to the ground; imports point
down this list only, and down the list of files that each room opens with:

    __main__       the command `deft`: run, check, train and the others
    run            notebooks, executed headless, several at a time
    kernels        their processes, forked from one that has imported what they import
    studies        questions that take many runs: ablations, all methods side by side
    evaluation     how good replies are: scores, judges, people
    training       from preference lists to an aligned policy, by any method
    models         what runs a model: policies, reward models, generation, servers
    reporting      tables, figures, verdicts, pages
    preferences    ranked lists: read, check, reject, split; the mini world
    method         the paper's equations alone, with torch and numpy and nothing else
    blocks         one array over very many items, block by block, by one process or several
    jobs           many runs at once: which is next, and who works
    ray_workers    workers of a Ray cluster
    workers        worker processes of this machine, over its GPUs and cores; one function on many pieces
    gpus           the visible GPUs, and whether one has room for another run
    progress       how far a run of notebooks is, and the time to go
    profile        Profile: one typed record of every size, model and data source, from YAML
    sections       what a profile can say: every setting, its type, default and meaning
    command        one sentence where a command goes wrong
    credentials    URLs as they are shown, and as they were given
    typed          nested dicts checked against dataclasses
    intervals      means with 95 % intervals
    store          where results live, one folder a key: published whole or not at all
    provenance     what a key holds beside settings and inputs: code, packages, device; what a manifest tells
"""

import os
import warnings
from pathlib import Path

# Set before any library reads them: nothing is reported to anyone, and forked workers do not deadlock the tokenizer.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", message="IProgress not found")  # no bars are shown; plain lines tell the progress

__version__ = "0.1.0"

# {dotted name: source} of every module, read before any of them is: `provenance` tells results by the code that ran.
_HOUSE = Path(__file__).resolve().parent
SOURCES = {
    ".".join(path.relative_to(_HOUSE.parent).with_suffix("").parts).removesuffix(".__init__"): path.read_text("utf-8")
    for path in sorted(_HOUSE.rglob("[!.]*.py"))  # not what editors leave there
}

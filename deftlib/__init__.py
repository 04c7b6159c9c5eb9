"""deftlib: a reproducible companion to *DEFT: Distribution-guided Efficient Fine-Tuning for Human Alignment*.

Read the notebooks first; they call these modules, and imports point down this list only:

    run            execute one notebook headless, publish it atomically
    site           executed notebooks, tables and figures as static pages
    first_updates  twenty updates of every method on a real model
    report         tables, figures and verdicts -> figures/<profile>/
    claims         what the paper claims, the rule of verdicts, the page of them
    human_eval     blind pairs, a rating page, win rates and agreement
    mt_bench       questions, judge, scores
    mini_bench     MT-Bench's format in the mini world, with a judge by rule
    comparison     all methods side by side: gain, cost, distance, the frontier
    ablation       the runs behind Table 3 and the sweeps
    refine         reference answers rewritten by a stronger model
    extend         one more reply for every list: D_3 from an endpoint or from the SFT policy
    train          fit(method, ...): one policy by any method, published
    trainers       the table of methods, trainers for ranked lists, IFT, TRL's own
    guidance       DistributionGuided: the mixin that adds the distribution reward to any of them
    losses         Eqs. 5-12 and 18, and the other methods': pure functions of tensors
    subset         from preference lists to the graded subset and q_diff, published as Parquet
    evaluate       score the replies of a policy, compare policies
    generation     what a policy says to a prompt, in process or behind an endpoint
    metrics        text scores: BLEU, BARTScore, distinct-n
    endpoint       ask any OpenAI-compatible server; answers kept as they come
    distribution   counts, q_diff, R_dis, direction: pure
    grading        levels, sides: pure
    rewards        reward models: load, train, score
    intervals      means with 95 % intervals: bootstrap, paired, shares
    loop           what all trainings share: arguments, progress lines, checkpoints to resume from
    models         policies and tokenizers: load, including the embedded defaults
    preferences    ranked lists: read, check, reject, split
    sources        where ranked lists come from, and the formats of their rows
    mini_world     the authored world of data/mini, with its known true reward
    profile        Profile: one typed record, unknown keys refused
    store          where results live; atomic publication, manifest, provenance
"""

import os
import warnings

# Set before any library reads them: nothing is reported to anyone, and forked workers do not deadlock the tokenizer.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", message="IProgress not found")  # no bars are shown; plain lines tell the progress

__version__ = "0.1.0"

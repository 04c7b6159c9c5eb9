"""All runs of a cell at once: two workers train and answer what one process does, to the last bit."""

import dataclasses

import pandas as pd
import short_runs
from warm import forked_workers as forked_workers  # a fixture

from deftlib import store
from deftlib.evaluation import evaluate
from deftlib.models import rewards
from deftlib.training import subset, train

RUNS = {(m, s): {"method": m, "seed": s} for m in ("sft", "dpo", "deft-pro") for s in (0, 1)}


def weights_and_replies(profile, then):
    """{run: (the policy's weights, its replies)}, by as many workers as the profile says."""
    folders = train.fit_all(profile, RUNS)
    then("forked_workers")  # that spawned ones import what they need was seen
    parts = subset.parts(profile)
    r_eval = rewards.judge(profile, "evaluate", parts)
    runs = {method: [folders[method, 0], folders[method, 1]] for method, _ in RUNS}
    frames = evaluate.replies_of(profile, runs, parts, r_eval, seeds=[0, 1])
    return {(m, s): ((folders[m, s] / "model.safetensors").read_bytes(), frames[m][s]) for m, s in RUNS}


def test_two_workers_make_what_one_process_makes(tmp_path, monkeypatch, request):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    project, found = store.ROOT, {}
    for jobs in (2, 1):
        root = tmp_path / str(jobs)
        for needed in ("data", "notebooks"):
            root.mkdir(exist_ok=True)
            (root / needed).symlink_to(project / needed)
        monkeypatch.setattr(store, "ROOT", root)
        monkeypatch.setenv("DEFT_ROOT", str(root))
        found[jobs] = weights_and_replies(dataclasses.replace(short_runs.profile(), jobs=jobs), request.getfixturevalue)
    for run in RUNS:
        assert found[1][run][0] == found[2][run][0], run
        pd.testing.assert_frame_equal(found[1][run][1], found[2][run][1])

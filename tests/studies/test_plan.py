"""The plan counts what notebooks make: held against a run that was committed, and against runs that train nothing."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from deftlib import store
from deftlib.models import footprint, policies
from deftlib.profile import Profile, ProfileError
from deftlib.studies import ablation, comparison, plan
from deftlib.training import memory, one_run, train


def of_kinds(profile):
    rows = plan.table(profile)["stages"]
    found = {"policies": int(rows[[name for name in rows.index if name.startswith("policies")]].sum())}
    names = {"replies": "replies and their scores", "preference": "human pairs (likelihood)"}
    names |= {"kl": "KL divergence", "mt_bench": "MT-Bench answers"}
    return found | {kind: int(rows[name]) for kind, name in names.items()}


def test_the_plan_of_smol_is_what_its_committed_run_made():
    record = json.loads((store.figures_dir("smol") / "provenance.json").read_text())
    made = [re.sub(r"-[0-9a-f]{10}@.*", "", name) for name in record["stages"]]
    kinds = Counter(name.partition("/")[0] for name in made if name != "policies/start")
    profile = Profile.load("smol")
    assert of_kinds(profile) == {kind: kinds[kind] for kind in of_kinds(profile)}
    updates = {run.method: plan_of(profile).training(run)[0] for run in plan.runs(profile, 2)["03"]}
    assert updates == {"sft": 32, "pro": 32, "dpo": 32, "deft-pro": 8, "deft-dpo": 8}  # as its table_runs.csv


def plan_of(profile):
    return plan._Costs(profile, *plan.sizes(profile))


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """Policies are published that nobody trained, each with what it was asked for."""

    def leave(folder, profile, **run):
        (folder / "model.txt").write_text(f"{folder} {run} {profile.training} {profile.grading}")
        (folder / "summary.json").write_text(json.dumps({"updates": 3}))

    monkeypatch.setattr(one_run, "train_into", leave)
    monkeypatch.setattr(memory, "check", lambda *run: None)  # there are no weights to count
    monkeypatch.setattr(store, "ROOT", tmp_path)
    return tmp_path


FEW = {"data.train_lists": 80, "data.reward_lists": 80, "data.dev_lists": 20, "data.test_lists": 20}
SWEEPS = {"ratios": [0.003, 0.03], "tops": [10.0], "bottoms": [50.0], "lengths": [2, 3], "sweeps": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ablation": SWEEPS | {"seeds": [0, 1]}, "comparison.methods": ["ift", "dpo"]},
        {
            "ablation": SWEEPS | {"bottoms": []},
            "training.gradings": ["distribution", "reward"],
            "training.dpo.omega": {"reading": "published", "value": 0.5},
        },
    ],
)
def test_the_plan_counts_every_policy_that_the_notebooks_ask_for(untrained, changes):
    """By the very calls of notebooks 03, 06 and 07, which make what 05 asks for; `mini` has every sweep."""
    seeds = {key: [0] for key in ("seeds", "ablation.seeds", "comparison.seeds", "mt_bench.seeds")}
    profile = Profile.load("mini", FEW | seeds | changes)
    for seed in profile.seeds:
        for method in profile.training.methods:
            train.fit(profile, method, seed)
        for method in ("deft-pro", "deft-dpo"):
            train.fit(profile, method, seed, profile.training.gradings[1])
        train.fit(profile, "deft-dpo", seed, omega=0.0)
    settings, first = profile.ablation, profile.ablation.seeds[:1]
    ablation.trained(profile, ablation.controls, settings.methods, settings.seeds)
    for study in (ablation.gradings, ablation.volumes):
        ablation.trained(profile, study, [settings.sweep_method], settings.seeds)
    for study in (ablation.omegas, *[ablation.bottoms] * bool(profile.ablation.bottoms)):
        ablation.trained(profile, study, [settings.sweep_method], first)
    ablation.trained(profile, ablation.lengths, ["deft-pro", "deft-rrhf"], first)
    comparison.controls(profile)
    if "ift" in profile.comparison.methods:
        detached = Profile.load("mini", profile.changes | {"training.ift_detach_weights": True})
        for seed in profile.comparison.seeds:
            train.fit(detached, "ift", seed)
    made = len(list((untrained / "build/mini/policies").glob("*/summary.json")))
    assert of_kinds(profile)["policies"] == made


def test_what_notebook_05_alone_trains_is_counted():
    one, three = (of_kinds(Profile.load("paper", {"mt_bench.seeds": seeds})) for seeds in ([0], [0, 1, 2]))
    more = {kind: three[kind] - one[kind] for kind in one}
    assert more == {"policies": 10, "mt_bench": 10, "replies": 0, "preference": 0, "kl": 0}


def test_an_sft_model_that_others_start_from_is_trained_and_not_looked_at():
    of = {"training.methods": ["dpo", "deft-dpo"], "comparison.methods": ["dpo"], "mt_bench.methods": [], "seeds": [0]}
    profile = Profile.load("paper", of | {"ablation.methods": ["deft-dpo"], "ablation.seeds": [0]})
    assert {plan.Run("sft", 0)} == plan.runs(profile, 2)["03"] - plan.named(profile, 2)["03"]
    found = of_kinds(profile)
    others = len(profile.evaluation.zero_shot)
    assert found["replies"] == found["policies"] + others, "the start policy's, and none of SFT"


def test_a_run_on_every_gpu_is_alone_on_them():
    said = " ".join(plan.text(Profile.load("gpu", {"launch.processes": 2})).split())
    assert "GiB of each GPU." in said and "at a time" not in said


def test_the_sizes_of_hh_rlhf_are_those_of_table_1_and_nothing_is_read():
    parts, length = plan.sizes(Profile.load("paper"))
    assert length == 2 and parts == {"policy": 160471, "pool": 160471, "dev": 322, "test": 8552}
    parts, _ = plan.sizes(Profile.load("gpu"))
    assert parts["policy"] == 1536 and parts["test"] == 256 and parts["pool"] == round(0.3 * 8552)


def test_parameters_are_counted_in_a_folder_and_read_in_a_name(tmp_path):
    assert plan.parameters("huggyllama/llama-7b") == 7e9 and plan.parameters("smollm2-135m-instruct") == 135e6
    assert plan.parameters("OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5") == 1.4e9
    config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert plan.parameters(str(tmp_path)) == sum(p.numel() for p in model.model.parameters())
    with pytest.raises(ProfileError, match="no size like 7b in its name"):
        plan.parameters("someone/model")


def test_a_pass_costs_what_it_computes():
    """LLaMA-7B, one H100: DPO's 2 replies of 229 tokens, 6 passes, 2 for checkpointing, 2 for the reference."""
    profile = Profile.load("paper", {"launch.processes": 1})
    updates, tokens, seconds = plan_of(profile).training(plan.Run("dpo", 0))
    assert updates == 20059 and tokens == updates * 8 * 2 * 229
    flops = (6 + 2 + 2) * 7e9 * tokens
    assert seconds == pytest.approx(9 + 1 + 4 * 7e9 / 2e9 + flops / (0.35 * 989e12))
    on_eight = plan_of(Profile.load("paper")).training(plan.Run("dpo", 0))[2]
    assert on_eight - seconds == pytest.approx(
        8 * 20059 * 4 * 2 * 7e9 / 300e9
    )  # three ways of weights, the reference's


@pytest.mark.parametrize(("n", "share"), [(1e6, 0.03), (135e6, 0.03), (1e9, 0.35), (7e9, 0.35)])
def test_small_models_reach_a_small_share_of_the_card(n, share):
    assert plan.share_of_peak(n) == pytest.approx(share)
    assert np.isclose(plan.share_of_peak(np.sqrt(135e6 * 1e9)), 0.19)


def test_dpo_and_rloo_on_a_gpu_take_what_was_measured():
    """figures/gpu/run.md, H100: 32.7 and 106 s; the plan is within a third."""
    cost = plan_of(Profile.load("gpu"))
    assert cost.training(plan.Run("dpo", 0))[2] == pytest.approx(32.73, rel=0.33)
    assert cost.training(plan.Run("rloo", 0))[2] == pytest.approx(105.97, rel=0.33)
    assert cost.training(plan.Run("deft-dpo", 0))[2] == pytest.approx(14.7, rel=0.33)


def test_the_plan_says_what_it_rests_on_and_what_servers_are_asked(capsys):
    judge = {"url": "http://localhost/v1", "model": "judge"}
    plan.main(["--profile", "paper", "--set", f"mt_bench.judge={json.dumps(judge)}"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "hours at best on 8;" in said and "MT-Bench's judge 2,240" in said
    )  # 6 policies, 4 of them against SFT, two orders
    assert "data sheet: 989 TFLOP/s" in said and "(assumed)" in said


def test_what_the_largest_run_takes_is_said_before_its_model_is_here():
    said = " ".join(plan.text(Profile.load("paper")).split())
    need = memory.needed(Profile.load("paper"), "dpo", footprint.SHAPES["LLaMA-7B"])
    assert f"The largest run, deft-dpo, takes {need.total / 2**30:.1f} GiB of each GPU." in said
    unknown = plan.text(Profile.load("paper", {"policy.source": "someone/model-7b"}))
    assert "when the configuration of someone/model-7b is here" in " ".join(unknown.split())


def test_a_plan_that_cannot_fit_here_is_printed_and_refused_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(policies, "load_policy", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(memory, "free_of_a_device", lambda processes=1: 2**30)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**50))
    plan.main(["--profile", "paper"])
    refused = r"error: deft-dpo of llama-7b needs [\d.]+ GiB .* and 1.0 are free; what would"
    with pytest.raises(SystemExit, match=refused):
        plan.main(["--profile", "paper", "--here"])
    assert "The largest run" in capsys.readouterr().out.split("all that it makes")[-1]
    monkeypatch.setattr(memory, "free_of_a_device", lambda processes=1: 2**40)
    plan.main(["--profile", "mini", "--here"])


def test_disk_is_told_as_the_preflight_counts_it_and_of_lora_by_the_adapters():
    whole, adapted = (Profile.load("paper", {"lora.rank": rank}) for rank in (0, 16))
    need = memory.needed(whole, "dpo", footprint.SHAPES["LLaMA-7B"])
    assert f"{3 * need.checkpoint / 1e9:,.0f} GB more while a policy trains" in " ".join(plan.text(whole).split())
    saved = memory.needed(adapted, "dpo", footprint.SHAPES["LLaMA-7B"]).saved
    kept = plan.table(adapted)["bytes"]
    assert kept["policies, notebook 03"] == 8 * saved and saved < 0.01 * need.saved

"""Trainers as the profile sets them up: adapters, the reference kept, batches by length, updates that would be lost."""

import json

import numpy as np
import pytest
import torch
from conftest import SMALL, FakeJudge
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from deftlib import blocks
from deftlib.models import adapters, policies
from deftlib.models.wheels import ModelError
from deftlib.profile import Profile, ProfileError
from deftlib.training import building, likelihood, one_run, subset, train

TEXTS = [
    {
        "id": str(i),
        "prompt": f"w{i} w9",
        "responses": [f"w{i} w{i + 1} w3" + " w5" * (i % 5), f"w{30 - i} w4"],
        "rewards": None,
        "subset": "s",
    }
    for i in range(12)
]
QUICK = {
    "training.batch_size": 2,
    "training.log_steps": 1,
    "training.save_steps": 2,
    "training.ratio_steps": 0,
    "text.reply_tokens": 8,
    **{f"training.{method}": {"epochs": 1.0, "learning_rate": 1e-2} for method in ("sft", "dpo", "pro", "rrhf")},
    "training.rloo": {"epochs": 1.0, "learning_rate": 1e-2, "generations": 2, "updates_per_sampling": 1},
}
LORA = {"lora.rank": 2, "lora.alpha": 8}
WITH_REFERENCE = ["dpo", "ipo", "sr-dpo"]


@pytest.fixture
def start(tmp_path, make_model, tokenizer):
    """A start policy and a q_diff on disk, as `fit` finds them."""
    folder = tmp_path / "start"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    subset.save_q_diff(tmp_path / "q_diff.npz", np.arange(40), np.arange(40)[::-1], policies.fingerprint(tokenizer))
    return folder


@pytest.fixture
def run(tmp_path, start, monkeypatch):
    """Six updates on twelve lists: `run("dpo", {"lora.rank": 2})` gives the folder; it dies after `kill_after`."""
    monkeypatch.setattr(
        building, "_r_train_reward", lambda profile: lambda completions, **_: list(map(len, completions))
    )
    lists = tmp_path / "lists.parquet"
    Dataset.from_list(TEXTS).to_parquet(lists)

    def make(method, settings=(), begin=start, name=None, kill_after=None):
        class Progress(one_run.Progress):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == kill_after:
                    raise KeyboardInterrupt

        folder = tmp_path / (name or method)
        folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(one_run, "Progress", Progress)
            profile, omega = Profile.load("mini", QUICK | dict(settings)), 0.01 * method.startswith("deft-")
            one_run.train_into(folder, profile, method, 0, begin, lists, tmp_path / "q_diff.npz", omega)
        return folder

    return make


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").open()]


def weights_of(folder):
    return policies.load_policy(folder).state_dict()


# ---- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [f"deft-{method}" for method in train.METHODS])
def test_every_method_trains_adapters_and_publishes_them_alone(method, run, start):
    folder = run(method, LORA)
    assert not (folder / "model.safetensors").exists() and not (folder / "ref").exists()
    after, before = weights_of(folder), weights_of(start)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed and all("proj" in name for name in changed)
    assert len(losses_of(folder)) == 6


def test_dpo_goes_on_from_adapters_of_sft_which_are_its_reference(run, start):
    sft = run("sft", LORA)
    for method in WITH_REFERENCE:
        folder = run(method, LORA, begin=sft)
        first = {"dpo": np.log(2), "sr-dpo": np.log(2), "ipo": 25.0}[method]  # policy and reference agree
        assert losses_of(folder)[0] == pytest.approx(first, abs=1e-5)
        assert adapters.base(folder)[0] == str(start)
    merged = policies.load_policy(run("dpo", {**LORA, "training.dpo.learning_rate": 1e-12}, sft, "still"))
    for name, weight in weights_of(sft).items():
        torch.testing.assert_close(merged.state_dict()[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_trained_whole_is_published_tied_or_not(tied, run, tmp_path, make_model, tokenizer, monkeypatch):
    begin = tmp_path / "begin"
    make_model(tie_word_embeddings=tied).save_pretrained(begin)
    tokenizer.save_pretrained(begin)
    folder = run("deft-pro", {**LORA, "lora.modules_to_save": ["lm_head"]}, begin)
    before, after = policies.load_policy(begin), policies.load_policy(folder)
    assert torch.equal(after.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert not torch.equal(after.get_output_embeddings().weight, before.get_output_embeddings().weight)
    profile = Profile.load("mini", {"policy.source": str(folder), "text.prompt_tokens": 8, "text.reply_tokens": 8})
    monkeypatch.setattr(policies.store, "ROOT", tmp_path)
    whole, ids = policies.load_policy(policies.start_policy(profile)), torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(whole(ids).logits, after(ids).logits)


@pytest.mark.parametrize("method", ["deft-sft", "deft-dpo", "deft-ipo"])
def test_killed_adapters_go_on_as_if_nothing_had_happened(method, run, capsys):
    settings = {**LORA, "economy.group_by_length": True, "training.sft.epochs": 2.0, "training.dpo.epochs": 2.0}
    sft = run("sft", settings)
    whole = run(method, settings, sft, "whole")
    with pytest.raises(KeyboardInterrupt):
        run(method, settings, sft, "killed", kill_after=9)
    killed = run(method, settings, sft, "killed")
    assert "resuming from checkpoint-8" in capsys.readouterr().out
    assert losses_of(killed) == pytest.approx(losses_of(whole), rel=1e-6)
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(killed)[name], weight, rtol=0, atol=1e-6)
    assert {p.name for p in killed.iterdir()} == {p.name for p in whole.iterdir()}


def test_adapters_train_under_checkpointing_as_without(run):
    plain = run("deft-pro", LORA)
    saving = run("deft-pro", {**LORA, "training.gradient_checkpointing": True}, name="saving")
    assert losses_of(saving) == pytest.approx(losses_of(plain), rel=1e-6)


def test_adapters_on_16_bit_weights_are_not_rounded_away(run, start, make_model):
    make_model().bfloat16().save_pretrained(start)
    folder = run("sft", {**LORA, "policy.dtype": "bfloat16", "training.sft.learning_rate": 1e-6})
    half = policies.load_policy(folder, "bfloat16")
    moved = [p for name, p in half.named_parameters() if "lora_B" in name]
    assert moved and all(p.dtype == torch.float32 and p.any() for p in moved)
    base = policies.load_policy(start, "bfloat16").state_dict()
    stayed = [(weight.bfloat16() == base[name]).float().mean() for name, weight in weights_of(folder).items()]
    assert min(stayed) > 0.95  # of the weights: what adding the adapters to them would lose


def test_a_base_that_is_gone_or_was_made_anew_is_refused_by_name(run, start, make_model):
    folder = run("sft", LORA)
    make_model(seed=1).save_pretrained(start)
    with pytest.raises(ModelError, match=r"sft changes the weights of .*start, which is no longer what it was"):
        policies.load_policy(folder)


def test_an_adapter_moves_with_what_it_stands_on(run, start, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters.store, "ROOT", tmp_path)
    folder = run("sft", LORA)
    assert json.loads((folder / adapters.CONFIG).read_text())["base_model_name_or_path"] == "../start"
    (tmp_path / "start").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"start, which is not there: make that again"):
        policies.load_policy(folder)


def test_modules_that_a_model_does_not_have_are_refused_in_one_sentence(run):
    with pytest.raises(ModelError, match=r"lora.target_modules=\['c_attn'\]: Target modules"):
        run("sft", {**LORA, "lora.target_modules": ["c_attn"]})


def test_adapters_of_another_rank_are_not_trained_on(run):
    sft = run("sft", LORA)
    with pytest.raises(ModelError, match="has adapters of rank 2, not 4"):
        run("dpo", {**LORA, "lora.rank": 4}, sft)


# ---- the reference kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WITH_REFERENCE)
def test_a_kept_reference_gives_the_losses_of_a_second_model_and_loads_none(method, run, monkeypatch):
    loaded, load = [], policies.load_policy
    monkeypatch.setattr(policies, "load_policy", lambda *args, **more: loaded.append(args) or load(*args, **more))
    second = run(method, name="second")
    assert len(loaded) == 2
    kept = run(method, {"economy.reference": "kept"}, name="kept")
    assert len(loaded) == 3
    assert losses_of(kept) == pytest.approx(losses_of(second), rel=1e-6, abs=1e-6)
    assert losses_of(kept)[-1] != pytest.approx(losses_of(kept)[0], rel=1e-3)  # it trained


def test_an_interrupted_pass_of_the_reference_goes_on_after_its_last_block(run, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 5)
    asked, of_block = [], likelihood._of_block

    def dying(of_batch, rows, lengths, budget, block, label):
        asked.append((block[0], block[-1] + 1))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return of_block(of_batch, rows, lengths, budget, block, label)

    monkeypatch.setattr(likelihood, "_of_block", dying)
    settings = {"economy.reference": "kept"}
    with pytest.raises(KeyboardInterrupt):
        run("dpo", settings)
    folder = run("dpo", settings)
    assert asked == [(0, 5), (5, 10), (5, 10), (10, 12)]
    monkeypatch.setattr(blocks, "BLOCK", 1024)
    assert losses_of(folder) == pytest.approx(losses_of(run("dpo", settings, name="whole")), rel=1e-6)


# ---- settings ----------------------------------------------------------------------------------------------------


def test_a_key_holds_what_changes_the_run_and_nothing_else():
    of = lambda method, **changes: building.settings(Profile.load("mini", changes), method)
    assert of("deft-dpo") == {} and of("deft-dpo", **{"lora.alpha": 4}) == {}
    assert of("dpo", **{"economy.reference": "kept"}) == {"reference": "kept"}
    assert of("sft", **{"economy.reference": "kept"}) == of("rloo", **{"economy.group_by_length": True}) == {}
    assert of("sft", **{"economy.group_by_length": True}) == {"group_by_length": True}
    adapted = of("deft-ipo", **{"lora.rank": 4})
    assert adapted["reference"] == "kept" and adapted["lora"]["rank"] == 4


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"policy.dtype": "bfloat16"}, r"updates of 5e-07 vanish in bfloat16 weights, where about 4e-05 is the least"),
        ({"policy.dtype": "float16"}, r"updates of 5e-07 vanish in float16"),
        ({"policy.dtype": "bfloat16", "training.dpo.learning_rate": 1e-3}, None),
        ({"policy.dtype": "bfloat16", "lora.rank": 8}, None),
        (
            {"policy.dtype": "bfloat16", "economy.stochastic_rounding": True},
            r"is for bfloat16 weights under adamw_torch",
        ),
        ({"economy.stochastic_rounding": True, "training.optimizer": "adamw_torch_8bit"}, r"policy.dtype is float32"),
    ],
)
def test_settings_whose_updates_would_be_lost_are_refused(changes, refused):
    profile = Profile.load("mini", {"training.dpo.learning_rate": 5e-7, **changes})
    if refused is None:
        building.check_updates(profile, "dpo")
    else:
        with pytest.raises(ProfileError, match=refused):
            building.check_updates(profile, "dpo")


def test_the_least_update_is_where_most_weights_stay():
    weights = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    stayed = [float((weights - rate == weights).float().mean()) for rate in (5e-7, 4e-6, 4e-5)]
    assert stayed[0] > 0.95 and stayed[1] > 0.75 and 0.1 < stayed[2] < 0.5


def test_an_optimizer_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(building.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"adamw_torch_8bit comes from torchao, .* pip install 'deftlib\[memory\]'"):
        building.check_updates(Profile.load("mini", {"training.optimizer": "adamw_torch_8bit"}), "sft")


def test_an_8_bit_optimizer_with_stochastic_rounding_moves_weights_that_plain_rounding_leaves(run, tmp_path, tokenizer):
    pytest.importorskip("torchao")
    begin = tmp_path / "begin"
    wide = LlamaConfig(**SMALL | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1})
    LlamaForCausalLM(wide).bfloat16().save_pretrained(begin)  # torchao leaves tensors of less than 4,096 numbers alone
    tokenizer.save_pretrained(begin)
    settings = {"policy.dtype": "bfloat16", "training.optimizer": "adamw_torch_8bit", "training.save_steps": 0}
    settings |= {"economy.stochastic_rounding": True, "training.sft.learning_rate": 1e-5}
    before = policies.load_policy(begin, "bfloat16").state_dict()["model.layers.0.self_attn.q_proj.weight"]
    after = policies.load_policy(run("sft", settings, begin), "bfloat16").state_dict()
    moved = (after["model.layers.0.self_attn.q_proj.weight"] != before).float().mean()
    assert 0.005 < moved < 0.5  # few, each by a whole step: the mean of all is the learning rate's
    least = before.abs().median() * 2**-9
    assert least > 6 * 1e-5  # six updates together would not have moved half of them by plain rounding


# ---- r_train -----------------------------------------------------------------------------------------------------


def test_r_train_judges_what_is_said_before_the_next_turn(monkeypatch):
    judge = FakeJudge(lambda reply: 1.0)
    monkeypatch.setattr(building.rewards, "judge", lambda *_: judge)
    monkeypatch.setattr(building.subset, "parts", lambda profile: None)
    r_train = building._r_train_reward(Profile.load("mini"))
    said = [" Yes.\n\nHuman: and then?", " No."]
    assert r_train(["p", "q"], said, subset=["s", "s"], trainer_state=None) == [1.0, 1.0]
    assert judge.scored == [" Yes.", " No."]

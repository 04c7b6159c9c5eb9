"""Trainers and data of the methods: log-probabilities, losses, encoding, the readings of omega, the command line."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import CohereConfig, CohereForCausalLM, PhiConfig, PhiForCausalLM, TrainingArguments
from trl import DPOConfig

from deftlib import losses, models, subset, train
from deftlib.loop import arguments
from deftlib.profile import Omega, Profile, Text
from deftlib.store import ROOT

IGNORED = -100


def full_log_probs(model, rows):
    """(sums, counts) [B, L] of the responses of encoded lists, one response at a time and from full logits."""
    sums, counts = [], []
    for row in rows:
        for response in row["response_ids"]:
            ids = torch.tensor([row["prompt_ids"] + response])
            labels = torch.tensor([[IGNORED] * len(row["prompt_ids"]) + response])
            total, count = losses.sequence_log_probs(model(input_ids=ids).logits, labels)
            sums.append(total[0])
            counts.append(count[0])
    shape = (len(rows), len(rows[0]["response_ids"]))
    return torch.stack(sums).view(shape), torch.stack(counts).view(shape)


def gradients(value, model):
    parts = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in parts if g is not None])


# ---- ranked lists ------------------------------------------------------------------------------------------------


def test_lists_are_padded_on_the_right_and_labelled_on_responses_only():
    rows = [
        {"prompt_ids": [5, 6], "response_ids": [[7, 8, 1], [9]], "rewards": [2.0, 1.0]},
        {"prompt_ids": [4], "response_ids": [[3, 1], [3, 3]], "rewards": [0.5, 0.0]},
    ]
    batch = train.collate_lists(rows, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[[5, 6, 7, 8, 1], [5, 6, 9, 0, 0]], [[4, 3, 1, 0, 0], [4, 3, 3, 0, 0]]]
    assert batch["attention_mask"].tolist() == [[[1] * 5, [1, 1, 1, 0, 0]], [[1, 1, 1, 0, 0]] * 2]
    x = IGNORED
    assert batch["labels"].tolist() == [[[x, x, 7, 8, 1], [x, x, 9, x, x]], [[x, 3, 1, x, x], [x, 3, 3, x, x]]]
    assert batch["rewards"].tolist() == [[2.0, 1.0], [0.5, 0.0]]


def test_a_padding_token_inside_a_response_still_counts():
    row = {"prompt_ids": [5], "response_ids": [[0, 1], [7]], "rewards": [1.0, 0.0]}
    batch = train.collate_lists([row], pad_token_id=0)
    assert batch["attention_mask"][0].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"][0].tolist() == [[IGNORED, 0, 1], [IGNORED, 7, IGNORED]]


def biased():
    model = PhiForCausalLM(PhiConfig(**SMALL))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def adapted(make_model):
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("length", [2, 3, 8])
@pytest.mark.parametrize("kind", ["tied", "untied", "bias", "scaled", "lora"])
def test_selected_positions_give_the_log_probabilities_of_full_logits(kind, length, make_model, make_lists):
    torch.manual_seed(0)
    model = {
        "tied": lambda: make_model(),
        "untied": lambda: make_model(tie_word_embeddings=False),
        "bias": biased,
        "scaled": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
        "lora": lambda: adapted(make_model),
    }[kind]()
    rows = list(make_lists(3, length))
    batch = train.collate_lists(rows, pad_token_id=0)
    flat = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}
    sums, counts = train.response_log_probs(model, model, **flat)
    expected, expected_counts = full_log_probs(model, rows)
    assert torch.equal(counts.view(3, length), expected_counts)
    torch.testing.assert_close(sums.view(3, length), expected, rtol=1e-5, atol=1e-5)
    weight = torch.rand(expected.shape)
    found, wanted = (gradients((values.view(3, length) * weight).sum(), model) for values in (sums, expected))
    assert torch.norm(found - wanted) < 1e-5 * torch.norm(wanted)


@pytest.mark.parametrize("method", ["pro", "rrhf"])
@pytest.mark.parametrize("length", [2, 3, 8])
def test_the_ranked_trainers_loss_is_the_printed_one(method, length, make_model, make_lists, tokenizer, tmp_path):
    model, rows = make_model(), make_lists(4, length)
    training = Profile.load("mini").training
    trainer = train.RankedListTrainer(
        model,
        args=TrainingArguments(
            **arguments(tmp_path, epochs=1, learning_rate=0.1, batch_size=4, seed=0, use_cpu=True),
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        data_collator=lambda rows: train.collate_lists(rows, 0),
        list_loss=lambda *values: train.LIST_LOSSES[method](*values, training),
    )
    loss = trainer.compute_loss(model, train.collate_lists(list(rows), 0))
    sums, counts = full_log_probs(model, rows)
    rewards = torch.tensor(rows["rewards"])
    expected = losses.pro_loss(sums, counts, 0.05) if method == "pro" else losses.rrhf_loss(sums, counts, rewards)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.num_tokens == 2 * sum(
        len(row["prompt_ids"]) + len(r) for row in rows for r in row["response_ids"]
    )  # ours above and the one of train()


# ---- pairs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_pair_trainer(make_model, tokenizer, tmp_path):
    def make(rows, policy, reference, weight=0.0, peft_config=None, **more):
        settings = arguments(tmp_path, epochs=1, learning_rate=0.1, batch_size=4, seed=0, use_cpu=True)
        return train.PairTrainer(
            policy,
            ref_model=reference,
            args=DPOConfig(**settings, beta=0.1, max_length=None, **more),
            processing_class=tokenizer,
            train_dataset=rows.map(train._as_pair, remove_columns=["response_ids", "rewards"]),
            summed_sft_weight=weight,
            peft_config=peft_config,
        )

    return make


def pair_loss(trainer):
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer.compute_loss(trainer.model, batch)


def test_dpo_starts_at_ln_2(make_pair_trainer, make_model, make_lists):
    loss = pair_loss(make_pair_trainer(make_lists(4), make_model(), make_model()))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_pairs_are_the_best_and_the_worst_response():
    row = {"prompt_ids": [5], "response_ids": [[6], [7], [8]], "rewards": [2.0, 1.0, 0.0]}
    assert train._as_pair(row) == {"chosen_ids": [6], "rejected_ids": [8]}
    assert train._as_sft(row) == {"input_ids": [5, 6], "labels": [IGNORED, 6]}


def test_the_summed_sft_term_is_that_of_the_paper(make_pair_trainer, make_model, make_lists):
    rows, policy, reference = make_lists(4), make_model(), make_model(1)
    loss = pair_loss(make_pair_trainer(rows, policy, reference, weight=0.05))
    sums, _ = full_log_probs(policy, rows)
    reference_sums, _ = full_log_probs(reference, rows)
    expected = losses.dpo_loss(sums, reference_sums.detach(), 0.1) + 0.05 * losses.sft_loss(sums[:, 0])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(loss, policy), gradients(expected, policy)
    assert torch.norm(found - wanted) < 1e-5 * torch.norm(wanted)


def test_the_summed_sft_term_reaches_adapters_too(make_pair_trainer, make_model, make_lists):
    rows, config = make_lists(4), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    loss = pair_loss(make_pair_trainer(rows, make_model(), None, weight=0.05, peft_config=config))
    sums, _ = full_log_probs(make_model(), rows)  # PEFT starts as the base model
    assert loss.item() == pytest.approx(math.log(2) - 0.05 * sums[:, 0].mean().item(), rel=1e-5)


def test_the_token_mean_option_is_trls(make_pair_trainer, make_model, make_lists):
    rows, policy, reference = make_lists(4), make_model(), make_model(1)
    blend = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.05]}
    loss = pair_loss(make_pair_trainer(rows, policy, reference, **blend))
    sums, counts = full_log_probs(policy, rows)
    reference_sums, _ = full_log_probs(reference, rows)
    token_mean = -sums[:, 0].sum() / counts[:, 0].sum()
    expected = losses.dpo_loss(sums, reference_sums, 0.1) + 0.05 * token_mean
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture
def start(tmp_path, make_model, tokenizer):
    """A start policy, lists and q_diff on disk, as `fit` finds them."""
    folder = tmp_path / "start"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    counts = np.arange(40), np.arange(40)[::-1].copy()
    subset.save_q_diff(tmp_path / "q_diff.npz", *counts, models.fingerprint(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("reduction", "summed", "kinds"), [("sum", 0.05, ["sigmoid"]), ("token_mean", 0.0, ["sigmoid", "sft"])]
)
def test_the_profile_names_the_reduction_of_the_sft_term(reduction, summed, kinds, start, tmp_path, make_lists):
    settings = {"training.dpo_sft_weight": 0.05, "training.sft_reduction": reduction}
    profile, tokenizer = Profile.load("mini", settings), models.load_tokenizer(start)
    model, q_diff = models.load_policy(start), tmp_path / "q_diff.npz"
    trainer = train._build_trainer(tmp_path, profile, "dpo", 0, start, model, tokenizer, make_lists(), q_diff)
    assert (trainer.summed_sft_weight, trainer.args.loss_type) == (summed, kinds)
    if reduction == "token_mean":
        assert trainer.args.loss_weights == [1.0, 0.05]


# ---- encoding ----------------------------------------------------------------------------------------------------


def ranked(*responses, prompt="w1 w2", rewards=None, name="a"):
    return {"id": name, "prompt": prompt, "responses": list(responses), "rewards": rewards}


def test_a_short_reply_ends_in_one_eos_and_a_long_one_is_cut_without(tokenizer):
    text = Text(prompt_tokens=8, reply_tokens=3)
    (row,) = train.encode_lists([ranked(" w1 w2", " w1 w2 w3", " w1 w2 w3 w4 w5")], tokenizer, text)
    w1, w2, w3 = (tokenizer.convert_tokens_to_ids(w) for w in ("w1", "w2", "w3"))
    assert row["response_ids"] == [[w1, w2, tokenizer.eos_token_id], [w1, w2, w3], [w1, w2, w3]]


def test_a_prompt_is_cut_on_the_left(tokenizer):
    (row,) = train.encode_lists([ranked("w5", "w6", prompt="w1 w2 w3 w4")], tokenizer, Text(prompt_tokens=2))
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == ["w3", "w4"]


def test_a_response_without_tokens_is_rejected_with_a_reason_and_the_rest_trains(tokenizer, tmp_path, capsys):
    lists = [ranked("w1", "   ", name="blank"), ranked("w1", "w2", name="good"), ranked("w1", "<eos>", name="eos only")]
    rows = train.encode_lists(lists, tokenizer, Text(), tmp_path / "rejects.jsonl")
    assert len(rows) == 1
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert rejects == [{"id": name, "reason": "a response vanishes by truncation"} for name in ("blank", "eos only")]
    assert "rejected 2 lists" in capsys.readouterr().out


def test_nothing_left_to_train_on_is_an_error_that_names_the_setting(tokenizer):
    with pytest.raises(ValueError, match=r"text\.reply_tokens"):
        train.encode_lists([ranked("", "w1")], tokenizer, Text())


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [(None, [2, 1, 0]), ([0.1, 0.5, 0.0], [2, 1, 0]), ([3.5, -1.0, -2.0], [3.5, -1.0, -2.0]), ([1, 1, 0], [1, 1, 0])],
)
def test_rewards_that_do_not_fit_the_order_become_ranks(rewards, expected, tokenizer):
    (row,) = train.encode_lists([ranked("w1", "w2", "w3", rewards=rewards)], tokenizer, Text())
    assert row["rewards"] == expected


# ---- omega -------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(tmp_path, tokenizer):
    """Counts of 600 good and 200 bad tokens."""
    pos, neg = np.zeros(40, int), np.zeros(40, int)
    pos[[3, 4]], neg[5] = 300, 200
    subset.save_q_diff(tmp_path / "q_diff.npz", pos, neg, models.fingerprint(tokenizer))
    return tmp_path / "q_diff.npz"


class Calibrates:
    """Stands for a trainer: remembers how often it was asked."""

    asked = 0

    def calibrate(self, ratio, batches):
        self.asked += 1
        return ratio * 1000 + batches


def test_omega_as_given_as_printed_and_times_the_counts(counted, tmp_path):
    assert train._omega(None, 0, counted, tmp_path) == 0.0
    assert train._omega(None, 0.25, counted, tmp_path) == 0.25
    assert train._omega(None, Omega("published", 2.5e-5), counted, tmp_path) == 2.5e-5
    assert train._omega(None, Omega("counts", 2.5e-5), counted, tmp_path) == pytest.approx(2.5e-5 * 400)


def test_omega_by_ratio_is_calibrated_once_and_remembered(counted, tmp_path):
    trainer = Calibrates()
    first = train._omega(trainer, Omega("ratio", 0.03, calibration_batches=8), counted, tmp_path)
    assert first == pytest.approx(38.0)
    assert train._omega(trainer, Omega("ratio", 0.03, calibration_batches=8), counted, tmp_path) == first
    assert trainer.asked == 1


# ---- a whole training --------------------------------------------------------------------------------------------

TEXTS = [ranked(f"w{i} w{i + 1} w3", f"w{30 - i} w4", prompt=f"w{i} w9", name=str(i)) for i in range(12)]
QUICK = {
    "training.batch_size": 2,
    "training.log_steps": 1,
    "training.save_steps": 2,
    "training.ratio_steps": 2,
    **{f"training.{method}": {"epochs": 1.0, "learning_rate": 1e-2} for method in ("sft", "dpo", "pro")},
}


class Killed(Exception):
    pass


def run(folder, start, method, kill_after=None, monkeypatch=None):
    """`train._train` on 12 lists, 6 updates, checkpoints at 2 and 4; dies after `kill_after` updates."""
    folder.mkdir(exist_ok=True)

    class Progress(train.Progress):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == kill_after:
                raise Killed

    q_diff = start.parent / "q_diff.npz"
    with monkeypatch.context() as patch:
        patch.setattr(train, "Progress", Progress)
        lists = Dataset.from_list(TEXTS)
        train._train(folder, Profile.load("mini", QUICK), method, 0, start, lists, q_diff, Omega("ratio", 0.5, 2))
    return folder


@pytest.mark.parametrize("method", ["deft-sft", "deft-dpo", "deft-pro"])
def test_a_killed_training_continues_as_if_nothing_had_happened(method, start, tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole", start, method, monkeypatch=monkeypatch)
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        run(killed, start, method, kill_after=5, monkeypatch=monkeypatch)
    omega = json.loads((killed / "omega.json").read_text())
    monkeypatch.setattr(train.GuidedSFTTrainer, "calibrate", None)  # must not be asked again
    monkeypatch.setattr(train.GuidedPairTrainer, "calibrate", None)
    monkeypatch.setattr(train.GuidedRankedListTrainer, "calibrate", None)
    capsys.readouterr()
    run(killed, start, method, monkeypatch=monkeypatch)
    assert "resuming from checkpoint-4" in capsys.readouterr().out

    after, before = (models.load_policy(folder).state_dict() for folder in (killed, whole))
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    records = [json.loads((folder / "summary.json").read_text()) for folder in (killed, whole)]
    assert records[0]["omega"] == omega == records[1]["omega"] > 0
    assert records[0]["gradient_ratio"] == pytest.approx(records[1]["gradient_ratio"], rel=1e-4)
    assert len(records[0]["gradient_ratio"]) == 3
    logs = [[json.loads(line) for line in (folder / "log.jsonl").open()] for folder in (killed, whole)]
    for log in logs:
        assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert [e["R_dis"] for e in logs[0]] == pytest.approx([e["R_dis"] for e in logs[1]], abs=1e-5)
    assert not (killed / "checkpoints").exists()
    assert {p.name for p in killed.iterdir()} == {p.name for p in whole.iterdir()}


def test_a_plain_method_logs_r_dis_and_never_optimises_it(start, tmp_path):
    kwargs = {"method": "sft", "seed": 0, "start": start, "q_diff_path": start.parent / "q_diff.npz", "weight": 0.0}
    (tmp_path / "sft").mkdir()
    train._train(tmp_path / "sft", Profile.load("mini", QUICK), lists=Dataset.from_list(TEXTS), **kwargs)
    record = json.loads((tmp_path / "sft" / "summary.json").read_text())
    assert (record["omega"], record["omega_reading"], record["gradient_ratio"]) == (0.0, 0.0, [])
    assert (record["method"], record["lists"], record["updates"]) == ("sft", 12, 6)
    assert all("R_dis" in json.loads(line) for line in (tmp_path / "sft" / "log.jsonl").open())


# ---- asking for it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kto", "deft-kto", "DPO", "deft-"])
def test_an_unknown_method_is_refused_before_anything_is_computed(method, monkeypatch):
    monkeypatch.setattr(train, "models", None)
    with pytest.raises(ValueError, match=f"unknown method '{method}': one of sft, dpo, rrhf, pro, or deft-"):
        train.fit(Profile.load("mini"), method)


def test_the_command_line_explains_itself():
    command = [sys.executable, "-m", "deftlib.train", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert all(option in result.stdout for option in ("--profile", "--method", "--seed", "--grading", "--omega"))


def test_the_command_line_reports_a_mistake_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--method", "kto"])
    with pytest.raises(SystemExit, match="error: unknown method 'kto'"):
        train.main()


def test_settings_that_change_no_result_stay_out_of_its_key():
    settings = train._shared_settings(Profile.load("mini").training)
    changed = train._shared_settings(
        Profile.load("mini", {"training.save_steps": 7, "training.log_steps": 1, "training.methods": ["sft"]}).training
    )
    assert settings == changed
    assert settings != train._shared_settings(Profile.load("mini", {"training.beta": 0.2}).training)

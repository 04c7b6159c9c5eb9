"""The trainers behind the methods: flat batches, lists of any length, both readings, two-pass IFT, TRL's own."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Waits
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from transformers import CohereConfig, CohereForCausalLM, PhiConfig, PhiForCausalLM, TrainingArguments
from trl import DPOConfig, RLOOConfig
from trl.trainer import utils as trl_utils

from deftlib.method import losses
from deftlib.models.loop import arguments
from deftlib.profile import Profile
from deftlib.sections import Text
from deftlib.training import encoding, likelihood, trainers

IGNORED = -100
TRAINING = Profile.load("mini").training
PREFIX = [30, 31]  # stands for the quality prefix


def list_log_probs(model, rows, prefix=()):
    """(sums, counts): one [L] tensor a list, one response at a time and from full logits."""
    sums, counts = [], []
    for row in rows:
        prompt = [*prefix, *row["prompt_ids"]]
        ids = [torch.tensor([prompt + response]) for response in row["response_ids"]]
        labels = [torch.tensor([[IGNORED] * len(prompt) + response]) for response in row["response_ids"]]
        scored = [losses.sequence_log_probs(model(input_ids=i).logits, each) for i, each in zip(ids, labels)]
        sums.append(torch.cat([of_response[0] for of_response in scored]))
        counts.append(torch.cat([of_response[1] for of_response in scored]))
    return sums, counts


def full_log_probs(model, rows):
    """(sums, counts) [B, L] of lists of one length."""
    sums, counts = list_log_probs(model, rows)
    return torch.stack(sums), torch.stack(counts)


def gradients(value, model):
    parts = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in parts if g is not None])


def exact(values):
    return torch.tensor(values, dtype=torch.float64)


def settings(folder, **more):
    return arguments(folder, **{"epochs": 1, "learning_rate": 0.1, "batch_size": 4, "seed": 0, "use_cpu": True, **more})


# ---- batches -----------------------------------------------------------------------------------------------------

X = IGNORED


def test_lists_lie_one_under_another_padded_on_the_right_and_labelled_on_responses_only():
    rows = [
        {"prompt_ids": [5, 6], "response_ids": [[7, 8, 1], [9]], "rewards": [2.0, 1.0]},
        {"prompt_ids": [4], "response_ids": [[3, 1], [3, 3], [2]], "rewards": [0.5, 0.0, -1.0]},
    ]
    batch = trainers.collate_lists(rows, pad_token_id=0)
    ids = [[5, 6, 7, 8, 1], [5, 6, 9, 0, 0], [4, 3, 1, 0, 0], [4, 3, 3, 0, 0], [4, 2, 0, 0, 0]]
    labels = [[X, X, 7, 8, 1], [X, X, 9, X, X], [X, 3, 1, X, X], [X, 3, 3, X, X], [X, 2, X, X, X]]
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 3, 3, 2]
    assert batch["labels"].tolist() == labels
    assert batch["rewards"].tolist() == [2.0, 1.0, 0.5, 0.0, -1.0]
    assert batch["list_lengths"] == [2, 3]


def test_the_quality_rows_have_the_prefix_before_the_prompt():
    row = {"prompt_ids": [5], "response_ids": [[7, 1], [9]], "rewards": [1.0, 0.0]}
    batch = trainers.collate_lists([row], 0, prefix_ids=[30, 31])
    assert batch["quality_input_ids"].tolist() == [[30, 31, 5, 7, 1], [30, 31, 5, 9, 0]]
    assert batch["quality_labels"].tolist() == [[X, X, X, 7, 1], [X, X, X, 9, X]]
    assert batch["input_ids"].tolist() == [[5, 7, 1], [5, 9, 0]]


def test_a_padding_token_inside_a_response_still_counts():
    row = {"prompt_ids": [5], "response_ids": [[0, 1], [7]], "rewards": [1.0, 0.0]}
    batch = trainers.collate_lists([row], pad_token_id=0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[X, 0, 1], [X, 7, X]]


def test_the_responses_of_each_length_of_list_form_one_rectangle():
    rows = [rows.tolist() for rows in trainers.rows_by_length([3, 2, 3])]
    assert rows == [[[3, 4]], [[0, 1, 2], [5, 6, 7]]]


GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures" / "golden.json").read_text())


def test_the_padding_mask_of_the_pro_authors_gives_the_golden_sums():
    # Their rows have no EOS of their own and are padded with it; ours end in one, a token after theirs.
    given, eos = GOLDEN["inputs"], GOLDEN["meta"]["eos_id"]
    ids, attention = torch.tensor(given["input_ids"]).flatten(0, 1), torch.tensor(given["attention_mask"]).flatten(0, 1)
    labels, logits = torch.tensor(given["labels"]).flatten(0, 1), exact(given["logits"]).flatten(0, 1)
    n, sizes = len(ids), attention.sum(1)
    widen = lambda values, fill: torch.cat([values, values.new_full((n, 1), fill)], 1)
    ids, attention, labels = widen(ids, eos), widen(attention, 0), widen(labels, X)
    ids[range(n), sizes], attention[range(n), sizes], labels[range(n), sizes] = eos, 1, eos
    logits = torch.cat([logits, logits[:, -1:]], 1)
    labels = trainers.without_end_of_longest(ids, attention, labels, eos)
    sums, counts = losses.sequence_log_probs(logits, labels)
    expected = GOLDEN["fixtures"]["pro_official"]["out"]
    torch.testing.assert_close(sums.view(2, 3), exact(expected["sum_logp"]), rtol=1e-10, atol=0)
    assert counts.view(2, 3).tolist() == expected["mask_len"]


# ---- log-probabilities of selected positions ---------------------------------------------------------------------


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


@pytest.mark.parametrize("at_once", [likelihood.LOGITS_AT_ONCE, 7 * SMALL["vocab_size"]])
@pytest.mark.parametrize("kind", ["tied", "untied", "bias", "scaled", "lora"])
def test_selected_positions_give_the_log_probabilities_of_full_logits(
    kind, at_once, make_model, make_lists, monkeypatch
):
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", at_once)  # as they are, or seven positions a chunk
    torch.manual_seed(0)
    model = {
        "tied": lambda: make_model(),
        "untied": lambda: make_model(tie_word_embeddings=False),
        "bias": biased,
        "scaled": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
        "lora": lambda: adapted(make_model),
    }[kind]()
    rows = make_lists(3, 3)
    batch = trainers.collate_lists(list(rows), pad_token_id=0)
    flat = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    sums, counts = likelihood.response_log_probs(model, model, **flat)
    expected, expected_counts = full_log_probs(model, rows)
    assert torch.equal(counts.view(3, 3), expected_counts)
    torch.testing.assert_close(sums.view(3, 3), expected, rtol=1e-5, atol=1e-5)
    weight = torch.rand(expected.shape)
    found, wanted = (gradients((values.view(3, 3) * weight).sum(), model) for values in (sums, expected))
    assert torch.norm(found - wanted) < 1e-5 * torch.norm(wanted)


def test_a_chunk_of_logits_is_computed_anew_and_none_is_held_for_the_backward_pass(make_model, monkeypatch):
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 7 * SMALL["vocab_size"])
    model, ids, chunks, held = make_model(), torch.arange(3, 20).unsqueeze(0), [], []
    largest = lambda logits, targets: chunks.append(len(logits)) or logits.logsumexp(-1)
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: held.append((*kept.shape,)) or kept, lambda kept: kept):
        total = likelihood.at_responses(largest, model, model, ids, input_ids=ids).sum()
    assert chunks == [7, 7, 2] and not {(7, SMALL["vocab_size"]), (2, SMALL["vocab_size"])} & set(held)
    total.backward()
    assert sorted(chunks) == [2, 2, 7, 7, 7, 7] and model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("guided", [False, True])
def test_a_step_over_lists_waits_for_the_device_once_a_pass_and_once_a_loss(
    guided, list_trainer, make_model, make_lists, q_diff
):
    rows = concatenate_datasets([make_lists(2, 3), make_lists(2, 2, seed=1)])
    model = make_model(attn_implementation="eager").train()  # sdpa reads the mask, once more a pass
    trainer = list_trainer("pro", rows, model, **({"q_diff": q_diff} if guided else {}))
    batch = trainer.data_collator(list(rows))
    with Waits() as waits:
        loss = trainer.compute_loss(trainer.model, batch)
    assert waits.count == 1 + 2  # where the response tokens are; is one without any, for each length of list
    trainer.log({"loss": loss.item()})
    assert trainer.state.log_history[-1]["num_tokens"] == batch["attention_mask"].sum()


# ---- the table of methods ----------------------------------------------------------------------------------------


@pytest.fixture
def list_trainer(tmp_path, tokenizer, make_model):
    def make(method, rows, model, training=TRAINING, q_diff=None, **more):
        line = trainers.LIST_METHODS[method]
        kind = trainers.RankedListTrainer if q_diff is None else trainers.GuidedRankedListTrainer
        return kind(
            model,
            args=TrainingArguments(**settings(tmp_path, **more), remove_unused_columns=False),
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=lambda rows: trainers.collate_lists(rows, 0, PREFIX if line.quality else None),
            list_loss=lambda scores: line.loss(scores, training),
            reference=make_model(7) if line.reference else None,
            scores_last_end=line.scores_last_end,
            **({} if q_diff is None else {"q_diff": q_diff}),
        )

    return make


def loss_of(trainer, rows):
    return trainer.compute_loss(trainer.model, trainer.data_collator(list(rows)))


def printed_loss(method, model, reference, row):
    """The loss of one list from full logits, by the pure function of the method."""
    (sums,), (counts,) = list_log_probs(model, [row])
    sums, counts, rewards = sums[None], counts[None], torch.tensor([row["rewards"]])
    reference_sums, quality_sums, quality_reference_sums = (
        list_log_probs(each, [row], prefix)[0][0][None].detach()
        for each, prefix in ((reference, ()), (model, PREFIX), (reference, PREFIX))
    )
    longest = max(len(row["prompt_ids"]) + len(response) for response in row["response_ids"])
    pair = (sums, reference_sums, quality_sums, quality_reference_sums)
    return {
        "rrhf": lambda: losses.rrhf_loss(sums, counts, rewards),
        "rrhf-official": lambda: losses.rrhf_official_loss(sums, torch.tensor([longest]), rewards),
        "pro": lambda: losses.pro_loss(sums, counts, 0.05),
        "asft": lambda: losses.asft_loss(sums, counts, TRAINING.asft_weight),
        "ipo": lambda: losses.ipo_loss(sums, reference_sums, counts, 0.1),
        "sr-dpo": lambda: losses.sr_dpo_loss(*pair, beta=0.1, weight=0.5),
        "sr-ipo": lambda: losses.sr_ipo_loss(*pair, beta=0.1, weight=0.5),
    }[method]()


@pytest.mark.parametrize("method", [m for m in trainers.LIST_METHODS if m != "pro-official"])
def test_a_trainers_loss_is_the_pure_functions(method, list_trainer, make_model, make_lists):
    model, reference, rows = make_model(), make_model(7), make_lists(4, 2)
    loss = loss_of(list_trainer(method, rows, model), rows)
    expected = torch.stack([printed_loss(method, model, reference, row) for row in rows]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(loss, model), gradients(expected, model)
    assert torch.norm(found - wanted) < 1e-4 * torch.norm(wanted)


@pytest.mark.parametrize("method", ["rrhf", "rrhf-official", "pro"])
@pytest.mark.parametrize("lengths", [[2, 2], [8, 8], [2, 5, 8], [3, 2, 3, 7]])
def test_lists_of_two_to_eight_responses_share_a_batch_and_weigh_the_same(
    method, lengths, list_trainer, make_model, make_lists
):
    model = make_model()
    rows = concatenate_datasets([make_lists(1, length, seed) for seed, length in enumerate(lengths)])
    loss = loss_of(list_trainer(method, rows, model), rows)
    expected = torch.stack([printed_loss(method, model, model, row) for row in rows]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_pro_official_scores_no_eos_of_the_longest_row_and_pro_scores_every_one(list_trainer, make_model):
    row = {"prompt_ids": [5, 6], "response_ids": [[7, 8, 1], [9, 1]], "rewards": [2.0, 1.0]}
    model = make_model()
    without = {**row, "response_ids": [[7, 8], [9, 1]]}
    for method, scored in (("pro-official", without), ("pro", row)):
        trainer = list_trainer(method, [row], model)
        scores = trainer.scores(model, trainer.data_collator([row]))
        (sums,), (counts,) = list_log_probs(model, [scored])
        torch.testing.assert_close(scores.sums, sums, rtol=1e-5, atol=1e-5)
        assert torch.equal(scores.counts, counts)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("method", "start"), [("ipo", 25.0), ("sr-dpo", math.log(2)), ("sr-ipo", 25.0)])
def test_methods_with_a_reference_start_where_policy_and_reference_agree(
    method, start, bf16, list_trainer, make_model, make_lists
):
    # 1 / (2 beta) = 5; the refinement D is a margin of log-ratios, which are all 0
    rows = make_lists(4)
    trainer = list_trainer(method, rows, make_model(7), bf16=bf16, logging_steps=1)
    trainer.train()  # as in training, where the policy runs under autocast
    assert trainer.state.log_history[0]["loss"] == pytest.approx(start, rel=1e-6, abs=1e-4)


def test_the_reading_without_the_reference_is_selectable(list_trainer, make_model, make_lists):
    rows, model = make_lists(4), make_model(7)
    reading = Profile.load("mini", {"training.sr_with_reference": False}).training
    loss = loss_of(list_trainer("sr-dpo", rows, model, reading), rows)
    margins = [(sums[0] - sums[1]).item() for sums in list_log_probs(model, rows, PREFIX)[0]]
    expected = sum(math.log1p(math.exp(0.1 * 0.5 * margin)) for margin in margins) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", trainers.LIST_METHODS)
def test_every_list_method_counts_its_tokens_and_changes_its_weights_alone(
    method, list_trainer, make_model, make_lists
):
    model, rows = make_model(), make_lists(4)
    trainer = list_trainer(method, rows, model)
    before = [p.detach().clone() for p in model.parameters()]
    trainer.train()
    assert trainer.state.global_step == 1 and math.isfinite(trainer.state.log_history[0]["train_loss"])
    assert not all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert trainer.num_tokens == sum(len(row["prompt_ids"]) + len(r) for row in rows for r in row["response_ids"])
    if trainer.reference is not None:
        assert all(torch.equal(p, q) for p, q in zip(trainer.reference.parameters(), make_model(7).parameters()))


# ---- intuitive fine-tuning ---------------------------------------------------------------------------------------


@pytest.fixture
def intuitive_trainer(tmp_path, tokenizer):
    def make(rows, model, q_diff=None, more=None, **options):
        kind = trainers.IntuitiveTrainer if q_diff is None else trainers.GuidedIntuitiveTrainer
        options |= {} if q_diff is None else {"q_diff": q_diff}
        return kind(
            model,
            args=TrainingArguments(**settings(tmp_path, **(more or {})), remove_unused_columns=False),
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=lambda rows: trainers.collate_lists(rows, 0),
            **options,
        )

    return make


def ift_by_hand(model, frozen, row, mixing, gamma):
    """IFT's loss of one response from full logits."""
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"][0]])
    labels = torch.tensor([[X] * len(row["prompt_ids"]) + row["response_ids"][0]])
    predicted = model(input_ids=ids).logits[:, :-1].argmax(-1)
    own = frozen[losses.greedy_inputs(ids, labels, predicted)]
    mixed = losses.intuitive_embeddings(model.get_input_embeddings()(ids), own, mixing)
    return losses.ift_loss(*losses.token_log_probs(model(inputs_embeds=mixed).logits, labels), gamma)


def test_the_ift_trainer_mixes_in_what_the_model_itself_would_say(intuitive_trainer, make_model, make_lists):
    model, rows = make_model(), make_lists(4, 1)
    trainer = intuitive_trainer(rows, model)
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.1  # as training would: the frozen copy stays behind
    frozen = make_model().get_input_embeddings().weight.detach()
    loss = loss_of(trainer, rows)
    expected = torch.stack([ift_by_hand(model, frozen, row, 0.2, 0.95) for row in rows]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(loss, model), gradients(expected, model)
    assert torch.norm(found - wanted) < 1e-4 * torch.norm(wanted)


def test_ift_without_mixing_and_propagation_is_sft(intuitive_trainer, make_model, make_lists):
    model, rows = make_model(), make_lists(4, 1)
    loss = loss_of(intuitive_trainer(rows, model, mixing=0.0, gamma=0.0), rows)
    sums, counts = full_log_probs(model, rows)
    expected = losses.sft_loss(sums[:, 0] / counts[:, 0])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    found, wanted = gradients(loss, model), gradients(expected, model)
    assert torch.norm(found - wanted) < 1e-5 * torch.norm(wanted)


def test_ift_trains_and_leaves_its_frozen_embedding_alone(intuitive_trainer, make_model, make_lists):
    trainer = intuitive_trainer(make_lists(4, 1), make_model())
    trainer.train()
    assert torch.equal(trainer.frozen_embedding.weight, make_model().get_input_embeddings().weight)
    assert not torch.equal(trainer.frozen_embedding.weight, trainer.model.get_input_embeddings().weight)


# ---- with the distribution reward --------------------------------------------------------------------------------


@pytest.fixture
def trained_weights(list_trainer, intuitive_trainer, make_model, make_lists):
    """The weights after training a method on eight lists; q_diff None is the class without the distribution reward."""

    def train(method, q_diff, omega=0.0, **more):
        model = make_model()
        if method == "ift":
            trainer = intuitive_trainer(make_lists(8, 1), model, q_diff, more)
        else:
            trainer = list_trainer(method, make_lists(8), model, q_diff=q_diff, **more)
        if q_diff is not None:
            trainer.omega = omega
        trainer.train()
        return torch.cat([p.detach().flatten().double() for p in model.parameters()])

    return train


@pytest.mark.parametrize("method", [*trainers.LIST_METHODS, "ift"])
def test_omega_zero_is_every_method_itself_bit_for_bit(method, trained_weights, q_diff):
    options = {"batch_size": 2, "learning_rate": 1e-2}
    plain = trained_weights(method, None, **options)
    assert torch.equal(trained_weights(method, q_diff, omega=0.0, **options), plain)
    assert not torch.equal(trained_weights(method, q_diff, omega=5.0, **options), plain)


@pytest.mark.parametrize("method", [*trainers.LIST_METHODS, "ift"])
def test_every_method_is_pushed_equally_by_a_batch_of_eight_and_by_four_of_two(method, trained_weights, q_diff):
    step = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    pushes = []
    for size in (8, 2):
        cut = {**step, "batch_size": size, "gradient_accumulation_steps": 8 // size}
        pushes.append(trained_weights(method, q_diff, 50.0, **cut) - trained_weights(method, q_diff, 0.0, **cut))
    assert torch.norm(pushes[0] - pushes[1]) < 1e-4 * torch.norm(pushes[0])


# ---- pairs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_pair_trainer(make_model, tokenizer, tmp_path):
    def make(rows, policy, reference, weight=0.0, peft_config=None, **more):
        return trainers.PairTrainer(
            policy,
            ref_model=reference,
            args=DPOConfig(**settings(tmp_path), beta=0.1, max_length=None, **more),
            processing_class=tokenizer,
            train_dataset=rows.map(encoding.as_pair, remove_columns=["response_ids", "rewards"]),
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
    assert encoding.as_pair(row) == {"chosen_ids": [6], "rejected_ids": [8]}
    assert encoding.as_sft(row) == {"input_ids": [5, 6], "labels": [IGNORED, 6]}


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


def test_the_summed_sft_term_counts_in_evaluation_as_in_training(make_pair_trainer, make_model, make_lists):
    rows, policy, reference = make_lists(4), make_model(), make_model(1)
    trainer = make_pair_trainer(rows, policy, reference, weight=0.05)
    trained = pair_loss(trainer)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(trained.item(), rel=1e-5)


def test_an_sft_term_that_no_pass_shows_is_an_error(make_pair_trainer, make_model, make_lists, monkeypatch):
    trainer = make_pair_trainer(make_lists(4), make_model(), make_model(1), weight=0.05)
    monkeypatch.setattr(trainer.accelerator, "unwrap_model", lambda model, **_: make_model(2))  # not the one that runs
    with pytest.raises(ValueError, match="shows no log_probs, so the SFT term cannot be added"):
        pair_loss(trainer)
    trainer.summed_sft_weight = 0.0
    assert pair_loss(trainer).item() > 0


def test_the_token_mean_option_is_trls(make_pair_trainer, make_model, make_lists):
    rows, policy, reference = make_lists(4), make_model(), make_model(1)
    blend = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.05]}
    loss = pair_loss(make_pair_trainer(rows, policy, reference, **blend))
    sums, counts = full_log_probs(policy, rows)
    reference_sums, _ = full_log_probs(reference, rows)
    token_mean = -sums[:, 0].sum() / counts[:, 0].sum()
    expected = losses.dpo_loss(sums, reference_sums, 0.1) + 0.05 * token_mean
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# ---- on-policy ---------------------------------------------------------------------------------------------------


def test_the_on_policy_trainer_asks_in_the_projects_format_and_learns_from_its_reward(tmp_path, tokenizer, make_model):
    start = tmp_path / "start"
    make_model().save_pretrained(start)  # TRL loads the reference anew from where the policy came from
    model, asked = type(make_model()).from_pretrained(start), []

    def prefers_word_9(prompts, completions, **_):
        asked.extend(prompts)
        return [float(said.split().count("w9")) for said in completions]

    rows = [{"prompt": f"w1 w2 w{i}"} for i in range(4)]
    args = RLOOConfig(**settings(tmp_path, batch_size=8), num_generations=4, max_completion_length=5)
    trainer = trainers.OnPolicyTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        reward_funcs=prefers_word_9,
        text=Text(prompt_tokens=2),
    )
    assert trainers.lists_used(trainer) == 4
    ids, _, _ = trainer._tokenize_prompts(["w1 w2 w3"])
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["w2", "w3"]
    before = [p.detach().clone() for p in model.parameters()]
    trainer.train()
    assert len(asked) == 16 and set(asked) == {row["prompt"] for row in rows}
    assert not all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_prompts_that_fill_no_sampling_batch_are_counted_or_refused(tmp_path):
    args = RLOOConfig(**settings(tmp_path, batch_size=8), num_generations=4, steps_per_generation=2)
    trainer = object.__new__(trainers.OnPolicyTrainer)
    trainer.args, trainer.num_generations = args, 4
    trainer.train_dataset = range(11)  # sampling batches of 4 prompts
    assert trainers.lists_used(trainer) == 8
    trainer.train_dataset = range(3)
    with pytest.raises(ValueError, match="3 prompts do not fill one sampling batch of 4"):
        trainers.lists_used(trainer)


def test_trls_head_gives_the_same_by_torchs_own_operators():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8, requires_grad=True) for n in (6, 50))
    targets, outputs = torch.randint(0, 50, (6,)), ("log_probs", "entropy", "mean_logits", "is_top1")
    ours = trl_utils._ChunkedLogProbFunction
    found = []
    for head in (ours, ours.chunked):
        values = head.apply(hidden, weight, None, targets, 0.7, 32, None, 1.5, outputs)
        found.append([*values[:2], values[3], values[4], *torch.autograd.grad(values[0].sum(), (hidden, weight))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.detach(), other.detach())


def test_under_autocast_the_head_runs_in_bfloat16_where_training_asks_for_it(make_model):
    model, dtypes = make_model(), []
    ids = torch.tensor([[1, 2, 3, 4]])
    seen = lambda logits, targets: dtypes.append(logits.dtype) or logits.float().sum(-1)
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            likelihood.at_responses(seen, model, model, ids, mixed_head=mixed, input_ids=ids)
    assert dtypes == [torch.float32, torch.bfloat16]
